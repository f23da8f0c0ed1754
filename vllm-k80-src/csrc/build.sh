#!/bin/sh
# Compiles the kernels into one fat binary: code for the K80 (sm_37) and PTX that any newer
# GPU can translate, which is how the same kernels are tested where there is no K80.
#
#   build.sh OUT        writes OUT/vllm_k80.fatbin
#   NVCC=/path/to/nvcc  a CUDA 11.x compiler (11.8 is the last that knows the card); without it
#   CUDA_HOME=/path     that CUDA's, and without both the one that PATH finds
#   VLLM_K80_CUDA_ARCHS="3.7"  compute capabilities to compile for, space separated
set -eu

out=${1:?usage: build.sh OUTPUT_DIRECTORY}
source=$(dirname "$0")
nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
if ! command -v "$nvcc" > /dev/null; then
    echo "build.sh: there is no $nvcc; name a CUDA 11 compiler in NVCC, or its CUDA in CUDA_HOME (on a server the role cuda_toolkit sets one up)." >&2
    exit 1
fi
mkdir -p "$out"

release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
if [ "$release" != 11 ]; then
    echo "build.sh: $nvcc is of CUDA ${release:-(unknown)}; the K80 needs a CUDA 11 compiler (11.8 is the last that knows it)." >&2
    exit 1
fi
# nvcc takes ptxas from PATH: one of another CUDA would refuse sm_37. Where nvcc is a script that starts one elsewhere,
# that one says where it looks for the rest of its CUDA.
PATH=$(dirname "$(command -v "$nvcc")"):$PATH
looks_in=$("$nvcc" --dryrun -x cu -ptx /dev/null 2>&1 | sed -n 's/^#\$ PATH=//p')
PATH=${looks_in:-$PATH}

# The kernels do not call each other, so one translation unit is the whole program. PTX is made apart:
# it says to a newer GPU too how many blocks must fit a K80's registers, and there it would spill.
cat "$source"/*.cu > "$out/vllm_k80.cu"
set --
for arch in ${VLLM_K80_CUDA_ARCHS:-3.7}; do
    number=$(echo "$arch" | tr -d .)
    "$nvcc" -O3 -std=c++14 -Wno-deprecated-gpu-targets -Xptxas -warn-spills \
        -arch "sm_$number" -cubin -o "$out/sm_$number.cubin" "$out/vllm_k80.cu"
    "$nvcc" -O3 -std=c++14 -Wno-deprecated-gpu-targets -DVLLM_K80_PTX \
        -arch "compute_$number" -ptx -o "$out/sm_$number.ptx" "$out/vllm_k80.cu"
    set -- "$@" "--image3=kind=elf,sm=$number,file=$out/sm_$number.cubin" \
        "--image3=kind=ptx,sm=$number,file=$out/sm_$number.ptx"
done
fatbinary -64 "--create=$out/vllm_k80.fatbin" "$@"
rm "$out/vllm_k80.cu" "$out"/sm_*.cubin "$out"/sm_*.ptx
