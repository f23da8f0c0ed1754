"""Predicted times of our kernels on a K80 die, for the layers of 7B and 13B models.

    python tools/kernels_predict.py [REPORT.json] [--quick]

Compiles csrc/ and a naive kernel (benchmarks/naive_gemv.cu) for sm_37, simulates them (smx.py),
prints a table and the model's error on the only public measurements, and writes the report: a
list of {kernel, n, k, m, group, predicted_us, predicted_us_tex32, dram_bound_us, registers, spills,
occupancy, instructions_per_weight}. predicted_us_tex32 has the read-only cache's bandwidth
halved, the model's least certain setting. Needs nvcc and cuobjdump of CUDA 11 and numpy.

Of attention, n are query heads of 128 elements, k is the tokens of context, m the sequences and
group the query heads that share a key head; its cache is FP16 and its elements count as weights.

Exit status 1 if a kernel spills registers or is slower than tools/kernels_baseline.json says by
more than 3 %. Every time is a prediction; nothing here was measured.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernels_report
import numpy as np
import smx

SOURCE = Path(__file__).parent.parent
BASELINE = Path(__file__).parent / "kernels_baseline.json"
ALLOWED_GROWTH = 1.03
SHAPES_7B = ((4096, 4096), (11008, 4096), (4096, 11008))
HEAD_SIZE = 128
SHAPES_13B = ((5120, 5120), (13824, 5120), (5120, 13824))
# The vllm37 project's INT4 prototype (group 128) on a real die, CUDA 11.4, in microseconds: our
# naive kernel has its structure.
MEASURED_US = {(4096, 4096): 209.1, (11008, 4096): 407.3, (4096, 11008): 757.9}


@dataclass
class Compiled:
    """A kernel's machine code and what it needs."""

    sass: str
    constants: bytes
    registers: int
    shared_bytes: int
    stack_bytes: int


@dataclass
class Case:
    """A launch to predict: rows n, columns k, rows of x m, bytes that it must read or write.

    See the module for what n, k and m are of attention.
    """

    kernel: str
    n: int
    k: int
    m: int
    launch: smx.Launch
    least_bytes: float
    group: int  # columns that share a scale, 0 for none
    weights: float = 0  # elements of the weight, or of the cache; 0 is n x k


def _cuobjdump(binary: Path, *options: str) -> str:
    command = ["cuobjdump", *options, str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compiled(binary: Path) -> dict[str, Compiled]:
    """The kernels in a fat binary, by name."""
    sass, elf = _cuobjdump(binary, "-sass"), _cuobjdump(binary, "-elf")
    pools = {
        name: b"".join(int(word, 16).to_bytes(4, "little") for word in words.split())
        for name, words in re.findall(r"\.nv\.constant2\.(\w+)\n((?:0x[0-9a-f]+\s*)+)", elf)
    }
    use = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _cuobjdump(binary, "-res-usage")
    )
    return {
        name: Compiled(sass, pools.get(name, b""), int(registers), int(shared), int(stack))
        for name, registers, stack, shared in use
    }


def build(directory: Path) -> dict[str, Compiled]:
    """All kernels, compiled into ``directory``."""
    nvcc, _ = kernels_report.find_nvcc(os.environ.get("NVCC"))
    # nvcc takes ptxas from there, and we cuobjdump: those of the same CUDA.
    os.environ["PATH"] = f"{Path(shutil.which(nvcc) or nvcc).parent}:{os.environ['PATH']}"
    kernels_report.compile_kernels(nvcc, str(directory))
    naive = directory / "naive.fatbin"
    command = [nvcc, "-O3", "-std=c++14", "-Wno-deprecated-gpu-targets"]
    command += ["-gencode", "arch=compute_37,code=sm_37", "-fatbin", "-o", str(naive)]
    subprocess.run([*command, str(SOURCE / "benchmarks" / "naive_gemv.cu")], check=True)
    return compiled(directory / "vllm_k80.fatbin") | compiled(naive)


def blocks_of_eight(rows: int, columns: int, bits: int) -> int:
    """What `vllm_k80.ops.kernels.blocks_of_eight` says, which needs torch."""
    tiles, steps = -(-rows // 64), -(-columns * bits // 4096)
    split = tiles % 13

    def time(parts: int) -> int:
        return -(-split * parts // 13) * -(-steps // parts)

    return tiles + split * (min(range(1, min(steps, 16) + 1), key=time) - 1)


def gemv(
    kernels: dict[str, Compiled],
    kind: str,
    n: int,
    k: int,
    m: int,
    group: int = 128,
    gated: bool = False,
) -> Case:
    """A gemv of csrc/gemv.cu: ``kind`` is w4_f16, w8_f16 and so on, or f16."""
    name = f"{'gated_' if gated else ''}gemv_{kind}_m{m}"
    bits = {"w4": 4, "w8": 8, "f1": 16}[kind[:2]]
    of_eight = m == 8 and kind != "f16"
    blocks = blocks_of_eight(n, k, bits) if of_eight else -(-n // 32)  # csrc/gemv.cu: rows a block
    weight = n * k * bits // 8
    scales = 0 if kind == "f16" else n * k // group * (4 if kind.endswith("32") else 2)
    buffers: list[int | smx.Pointer] = [smx.Pointer(weight)]
    shift: list[int | smx.Pointer] = []
    if kind != "f16":
        buffers += [smx.Pointer(scales)] * (2 if bits == 4 else 1)
        shift = [(group * bits // 128).bit_length() - 1]
    x_and_y = [smx.Pointer(4 * k * m), smx.Pointer(0), smx.Pointer(4 * n * m)]
    launch = smx.Launch(
        (1, blocks) if m == 8 else (blocks, 1),
        256,
        [*buffers, *x_and_y, n, k, *shift, m, 0],
        kernels[name].registers,
        kernels[name].shared_bytes,
        kernels[name].constants,
    )
    least = weight + scales * (2 if bits == 4 else 1) + 4 * m * (n + k)
    return Case(name, n, k, m, launch, least, 0 if kind == "f16" else group)


def _cached(heads: int, kv_heads: int, context: int, sequences: int) -> tuple[Any, ...]:
    """ATTENTION_BATCH of csrc/attention.cu, and how many bytes the cache has.

    The sequences' blocks are of 16 tokens and scattered. Addresses depend on lengths and table, so
    the buffers have contents.
    """
    pages = -(-context // 16) * sequences
    table = np.random.default_rng(0).permutation(pages).astype(np.int32)
    lengths = np.full(sequences, context, np.int32)
    width, scale = pages // sequences, int(np.float32(HEAD_SIZE**-0.5).view(np.int32))
    shape = [kv_heads, heads // kv_heads, HEAD_SIZE, heads * HEAD_SIZE, pages, 4, width, width]
    tensors = [smx.Pointer(x.nbytes, x) for x in (lengths, table)]
    return [*tensors, smx.Pointer(0), *shape, 0, 0, scale, 0], 4 * pages * 16 * kv_heads * HEAD_SIZE


def paged_attention(
    kernels: dict[str, Compiled], heads: int, kv_heads: int, context: int, sequences: int
) -> Case:
    """Decode, with all that its splits take."""
    group = heads // kv_heads
    tile = 1 if group == 1 else 4 if group <= 4 else 8  # vllm_k80/ops/attention_kernels.py
    tiles = kv_heads * -(-group // tile)
    splits = max(1, 65 // (sequences * tiles))
    batch, cache = _cached(heads, kv_heads, context, sequences)
    rows = smx.Pointer(4 * sequences * heads * HEAD_SIZE)
    partial = smx.Pointer(4 * sequences * heads * splits * (HEAD_SIZE + 4))

    name = f"paged_attention_f16_d128_h{tile}"
    used, grid = kernels[name], (tiles, splits, sequences)
    arguments = [rows, smx.Pointer(cache), rows, partial, *batch, splits]
    launch = smx.Launch(grid, 128, arguments, used.registers, used.shared_bytes, used.constants)
    least = cache + 2 * rows.size
    return Case(name, heads, context, sequences, launch, least, group, cache / 2)


def varlen_attention(kernels: dict[str, Compiled], heads: int, kv_heads: int, tokens: int) -> Case:
    """Prefill of one sequence; its weights are the products that causality leaves."""
    name, group = "varlen_attention_f16_d128", heads // kv_heads
    batch, cache = _cached(heads, kv_heads, tokens, 1)
    rows = smx.Pointer(4 * tokens * heads * HEAD_SIZE)
    starts = np.array([0, tokens], np.int32)
    arguments = [rows, smx.Pointer(cache), rows, smx.Pointer(8, starts), *batch, tokens]
    used = kernels[name]
    grid = (kv_heads, -(-tokens * group // 64), 1)
    launch = smx.Launch(grid, 64, arguments, used.registers, used.shared_bytes, used.constants)
    products = 2 * heads * HEAD_SIZE * tokens * (tokens + 1) / 2
    return Case(name, heads, tokens, 1, launch, cache + 2 * rows.size, group, products)


def layer_kernels(
    kernels: dict[str, Compiled], hidden: int, inner: int, heads: int, kv_heads: int
) -> list[Case]:
    """What lies between the products and attention, of one token; m and group are 1.

    n is the width of the result and k how many numbers are read for each of its elements.
    """
    width, keys = heads * HEAD_SIZE, kv_heads * HEAD_SIZE
    zero = np.zeros(1, np.int64)  # of the only token, the position or the slot of the cache
    eps = int(np.float32(1e-5).view(np.int32))
    place, parts = smx.Pointer(8, zero), -(-(heads + kv_heads) // 8)

    def half(elements: int) -> smx.Pointer:
        return smx.Pointer(2 * elements)

    def case(name: str, n: int, k: int, grid: tuple[int, int], arguments: list[Any]) -> Case:
        used = kernels[name]
        launch = smx.Launch(grid, 256, arguments, used.registers, used.shared_bytes, used.constants)
        return Case(name, n, k, 1, launch, 2 * n * (k + 1), 1)

    row, sizes = half(hidden), [heads, kv_heads, HEAD_SIZE, HEAD_SIZE, width, keys, 1, 1]
    rotary = [place, half(width), half(keys), half(HEAD_SIZE), *sizes]
    cached = [half(keys), half(keys), half(32 * keys), place, keys, keys, keys, 16, 1]
    tensors = [place, half(width), half(keys), half(keys), half(HEAD_SIZE), half(32 * keys), place]
    strides = [heads, kv_heads, HEAD_SIZE, HEAD_SIZE, width, keys, keys]
    into_cache, all_parts = [*tensors, *strides, 1, 16, 1], -(-(heads + 2 * kv_heads) // 8)
    norm = [row, row, row, row, row, hidden, eps]
    silu = [half(2 * inner), half(inner), inner]
    return [
        case("fused_add_rms_norm_f16", hidden, 3, (1, 1), norm),
        case("rotary_embedding_f16", width + keys, 2, (1, parts), rotary),
        case("rotary_and_cache_f16", width + 2 * keys, 1, (1, all_parts), into_cache),
        case("reshape_and_cache_f16", 2 * keys, 1, (1, 2), cached),
        case("silu_and_mul_f16", inner, 2, (1, -(-inner // 256)), silu),
    ]


def naive(kernels: dict[str, Compiled], n: int, k: int) -> Case:
    """The naive kernel."""
    sizes = (n * k // 2, n * k // 32, n * k // 32, 4 * k, 4 * n)
    used = kernels["naive_gemv_w4"]
    # The prototype stages as much of x as there is; ours reserves the largest.
    launch = smx.Launch(
        (-(-n // 8), 1), 256, [*map(smx.Pointer, sizes), n, k], used.registers, 4 * k
    )
    launch.constants = used.constants
    return Case("naive_gemv_w4", n, k, 1, launch, sum(sizes), 128)


def predict(kernels: dict[str, Compiled], case: Case) -> dict[str, Any]:
    """One line of the report."""
    used = kernels[case.kernel]
    first = smx.simulate(used.sass, case.kernel, case.launch)
    halved = smx.SETTINGS | {"texture_bytes": smx.SETTINGS["texture_bytes"] / 2}
    second = smx.simulate(used.sass, case.kernel, case.launch, halved)
    weights_an_smx = (case.weights or case.n * case.k) / smx.SETTINGS["smx"]
    return {
        "kernel": case.kernel,
        "n": case.n,
        "k": case.k,
        "m": case.m,
        "group": case.group,
        "predicted_us": round(first.microseconds, 1),
        "predicted_us_tex32": round(second.microseconds, 1),
        "dram_bound_us": round(case.least_bytes / smx.SETTINGS["dram_gb_s"] / 1e3, 1),
        "registers": used.registers,
        "spills": used.stack_bytes,
        "occupancy": round(first.warps * 32 / smx.SETTINGS["threads"], 2),
        "instructions_per_weight": round(first.instructions * 32 / weights_an_smx, 2),
    }


def cases(kernels: dict[str, Compiled], quick: bool) -> list[Case]:
    """What is predicted. ``quick`` leaves out all but a 4096 x 4096 layer."""
    shapes = SHAPES_7B[:1] if quick else SHAPES_7B + SHAPES_13B
    chosen = [gemv(kernels, "w4_f16", n, k, 1) for n, k in shapes]
    chosen += [gemv(kernels, kind, n, k, 1) for kind in ("w8_f16", "f16") for n, k in shapes[:3]]
    chosen.append(paged_attention(kernels, 32, 8, 2048, 1))
    if not quick:
        for n, k in (SHAPES_7B[1], SHAPES_13B[1]):  # of gate and up, which are one weight
            chosen.append(gemv(kernels, "w4_f16", 2 * n, k, 1, gated=True))
        for kv_heads, sequences in ((32, 1), (8, 8), (32, 8)):
            chosen.append(paged_attention(kernels, 32, kv_heads, 2048, sequences))
        chosen.append(paged_attention(kernels, 32, 4, 2048, 1))
        chosen.append(varlen_attention(kernels, 16, 4, 256))
        chosen += layer_kernels(kernels, 4096, 11008, 32, 32)
        chosen += layer_kernels(kernels, 5120, 13824, 40, 40)
        chosen += [
            gemv(kernels, kind, 4096, 4096, m)
            for kind in ("w4_f16", "w8_f16", "f16")
            for m in (2, 4, 8)
        ]
        chosen += [gemv(kernels, "w4_f16", n, k, 8) for n, k in (SHAPES_7B + SHAPES_13B)[1:]]
        chosen += [gemv(kernels, kind, 4096, 4096, 1, 32) for kind in ("w4_f16", "w4_f32")]
        chosen += [naive(kernels, n, k) for n, k in SHAPES_7B]
    return chosen


def main() -> int:
    """Compile, simulate, print, write and compare."""
    quick = "--quick" in sys.argv
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as directory:
        try:
            kernels = build(Path(directory))
        except kernels_report.ReportError as error:
            print(f"kernels_predict: {error}", file=sys.stderr)
            return 1
    report, wrong = [], []
    columns = (
        "kernel",
        "n",
        "k",
        "m",
        "group",
        "predicted",
        "tex32",
        "bound",
        "regs",
        "occ.",
        "instr/w",
    )
    print("Predicted microseconds on one K80 die (simulated, not measured):")
    print("{:28} {:>6} {:>6} {:>2} {:>5} {:>9} {:>7} {:>7} {:>4} {:>5} {:>7}".format(*columns))
    baseline = json.loads(BASELINE.read_text())
    for case in cases(kernels, quick):
        line = predict(kernels, case)
        report.append(line)
        print(
            "{kernel:28} {n:>6} {k:>6} {m:>2} {group:>5} {predicted_us:>9} {predicted_us_tex32:>7} "
            "{dram_bound_us:>7} {registers:>4} {occupancy:>5} "
            "{instructions_per_weight:>7}".format(**line),
            flush=True,
        )
        key = f"{case.kernel} n={case.n} k={case.k} m={case.m} group={case.group}"
        limit = baseline.get(key, line["predicted_us"]) * ALLOWED_GROWTH
        if line["predicted_us"] > limit:
            wrong.append(f"{key}: {line['predicted_us']} us, was {baseline[key]}")
        if line["spills"]:
            wrong.append(f"{case.kernel} spills {line['spills']} bytes")
        if case.kernel == "naive_gemv_w4":
            measured = MEASURED_US[case.n, case.k]
            ratio = line["predicted_us"] / measured
            print(f"{'':28} a prototype of its structure, measured: {measured}; ratio {ratio:.2f}")
    if paths:
        Path(paths[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(paths[0]).write_text(json.dumps(report, indent=1) + "\n")
    for line in wrong:
        print(f"kernels_predict: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
