"""Our kernels on whatever NVIDIA GPU is here, against their references, and timed.

The fat binary carries PTX beside the code for the K80, so any newer GPU can run the very
kernels. Needs torch with CUDA and `vllm_k80/kernels/vllm_k80.fatbin` (csrc/build.sh), not vLLM.

    python benchmarks/kernels_on_gpu.py {norms,gemv,layers,attention} [RESULT.json]

Exit status 1 if any result is off. Times are those of this GPU, not of a K80.
"""

import itertools
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import attention_on_gpu
import gemv_on_gpu
import layers_on_gpu
from measure import error, microseconds

from vllm_k80 import ops
from vllm_k80.ops import driver, reference

HIDDEN = (1, 2, 31, 32, 33, 64, 255, 256, 257, 576, 1000, 1536, 4096, 5120, 11008)
TOKENS = (0, 1, 2, 7, 8, 64, 513)
DTYPES = (torch.float32, torch.float16)
VALUES = {"normal": 1.0, "large": 1e4, "small": 1e-6}
# Allowed error, as a multiple of that of the reference, both against FP64. The kernel adds in
# another order, so it is not equal to the last digit.
FACTOR = 2.0


def compare() -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Both norms over all shapes; returns how many comparisons there were, and those off."""
    off: list[dict[str, Any]] = []
    count = 0
    for index, (tokens, hidden, dtype, (kind, factor)) in enumerate(
        itertools.product(TOKENS, HIDDEN, DTYPES, VALUES.items())
    ):
        if dtype is torch.float16 and kind != "normal":
            continue  # the squares of 1e4 overflow FP16's result, those of 1e-6 vanish in it
        generator = torch.Generator("cuda").manual_seed(index)

        def draw(*shape: int, scale: float = 1.0, dtype=dtype, generator=generator) -> Any:
            return torch.randn(*shape, device="cuda", generator=generator).mul(scale).to(dtype)

        x, residual = draw(tokens, hidden, scale=factor), draw(tokens, hidden, scale=factor)
        weight = draw(hidden)
        wide, total = x.double(), x.double() + residual.double()

        def exact(v: torch.Tensor, weight=weight) -> torch.Tensor:
            return v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

        triples = [
            (
                "rms_norm",
                torch.ops.vllm_k80.rms_norm(x, weight, 1e-5),
                reference.rms_norm(x, weight, 1e-5),
                exact(wide),
            )
        ]
        fused = torch.ops.vllm_k80.fused_add_rms_norm(x, residual, weight, 1e-5)
        plain = reference.fused_add_rms_norm(x, residual, weight, 1e-5)
        triples += [
            ("fused_add_rms_norm", fused[0], plain[0], exact(total)),
            ("fused_add_rms_norm sum", fused[1], plain[1], total),
        ]
        for name, kernel, plain_result, wanted in triples:
            count += 1
            ours, theirs = error(kernel, wanted), error(plain_result, wanted)
            if not ours <= max(FACTOR * theirs, 1e-6 if dtype is torch.float32 else 1e-3):
                off.append(
                    {
                        "operator": name,
                        "tokens": tokens,
                        "hidden": hidden,
                        "dtype": str(dtype),
                        "values": kind,
                        "error": ours,
                        "error_of_reference": theirs,
                    }
                )
    return {"comparisons": count}, off


def time_all() -> list[dict[str, Any]]:
    """Kernel against reference, for hidden sizes of 135M, 7B and 13B models."""
    rows = []
    for hidden, tokens in itertools.product((576, 4096, 5120), (1, 8, 512)):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.float32)
        residual, weight = torch.randn_like(x), torch.randn(hidden, device="cuda")
        kernel = microseconds(
            lambda x=x, r=residual, w=weight: torch.ops.vllm_k80.fused_add_rms_norm(x, r, w, 1e-5)
        )
        plain = microseconds(
            lambda x=x, r=residual, w=weight: reference.fused_add_rms_norm(x, r, w, 1e-5)
        )
        rows.append(
            {
                "operator": "fused_add_rms_norm",
                "tokens": tokens,
                "hidden": hidden,
                "kernel_us": round(kernel, 2),
                "reference_us": round(plain, 2),
            }
        )
    return rows


SUITES = {
    "norms": (compare, time_all),
    "gemv": (gemv_on_gpu.compare, gemv_on_gpu.time_all),
    "attention": (attention_on_gpu.compare, attention_on_gpu.time_all),
    "layers": (layers_on_gpu.compare, layers_on_gpu.time_all),
}


def main() -> int:
    """Compare, time, print and write the result."""
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        print(f"usage: kernels_on_gpu.py {{{','.join(SUITES)}}} [RESULT.json]", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("kernels_on_gpu: no CUDA device here.", file=sys.stderr)
        return 2
    if not driver.available():
        print(
            f"kernels_on_gpu: {driver.FAT_BINARY} is missing; run csrc/build.sh.", file=sys.stderr
        )
        return 2
    compare_suite, time_suite = SUITES[sys.argv[1]]
    counts, off = compare_suite()
    try:
        times = time_suite()
    except torch.cuda.OutOfMemoryError:
        times = []  # the comparisons count all the same
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "card": torch.cuda.get_device_name(0),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[
            0
        ],
        "torch": torch.__version__,
        "note": "code for sm_37"
        if torch.cuda.get_device_capability() == (3, 7)
        else "compute_37 PTX, translated by this driver; not measured on a K80",
        **counts,
        "off": off,
        "launches": dict(ops.CALLS),
        "times": times,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
