"""Makes vllm_k80/costs.json, by which `vllm-k80 predict` works, out of the report of the kernels.

    python tools/kernels_costs.py REPORT.json [--write]

Without --write it compares the table with the report (`make kernels-report` writes it), and exit
status 1 says that the kernels have become others since the table was made.

Of each kernel, `kernels` has [fixed, slope], microseconds without the launch: fixed + slope * x is
fitted to the report's lines, with x the time in which the memory could move what it must
(microseconds), or thousands of elements of the result for those between products and attention.
A kernel with one line takes `fixed` from its sibling with more: of one row of x, of four heads.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import smx
from kernels_predict import HEAD_SIZE, MEASURED_US

SOURCE = Path(__file__).parent.parent
COSTS = SOURCE / "vllm_k80" / "costs.json"
# The newest measurement of the engine, on another GPU: the host's part does not depend on the card.
ENGINE = max((SOURCE / "benchmarks" / "results").glob("*-engine.json"))
_BY_MEMORY = re.compile(r"gemv_(w4|w8)_f16_m|gemv_f16_m|paged_attention_f")
_BY_ELEMENTS = re.compile(r"fused_add_rms_norm|rotary|reshape|silu")


def line(x: np.ndarray, us: np.ndarray, fixed: float = 0.0) -> tuple[float, float]:
    """Fixed and slope of the least relative error, not negative; one point keeps ``fixed``."""
    if len(set(x)) > 1:
        relative = np.stack((1 / us, x / us), 1)
        fixed, slope = np.linalg.lstsq(relative, np.ones(len(us)), rcond=None)[0]
        if slope < 0:
            return float(us.mean()), 0.0
    fixed = max(0.0, float(fixed))
    return fixed, float(((us - fixed) * x / us**2).sum() / (x**2 / us**2).sum())


def kernels(report: list[dict[str, Any]]) -> dict[str, list[float]]:
    """See the module."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in report:
        us = entry["predicted_us"] - smx.SETTINGS["launch_us"]
        name = entry["kernel"]
        if _BY_MEMORY.match(name):
            points.setdefault(name, []).append((entry["dram_bound_us"], us))
        elif _BY_ELEMENTS.match(name):
            points.setdefault(name, []).append((entry["n"] / 1e3, us))
    fitted: dict[str, tuple[float, float]] = {}
    for name in sorted(points, key=lambda name: -len(points[name])):
        sibling = re.sub(r"_h8$", "_h4", re.sub(r"_m\d$", "_m1", name))
        x, us = np.array(points[name]).T
        fitted[name] = line(x, us, fitted.get(sibling, (0.0, 0.0))[0])
    return {name: [round(number, 4) for number in fitted[name]] for name in sorted(fitted)}


def host() -> dict[str, float]:
    """Milliseconds: of a step with graphs that are not the GPU's; of an eager layer's launches."""
    model = json.loads(ENGINE.read_text())["llama2_7b_shape_random_int4"]
    graphs = model["graphs"]
    waits = [entry["step_ms"] - entry["decode_step"]["gpu_ms"] for entry in graphs]
    sequence, step = np.polyfit([entry["batch"] for entry in graphs], waits, 1)
    eager = model["eager"][0]["cpu_ms_of_the_model_call"] / model["layers"]
    return {
        "step": round(step, 3),
        "sequence": round(sequence, 4),
        "eager_layer": round(eager, 3),
    }


def costs(report: list[dict[str, Any]]) -> dict[str, Any]:
    """The table."""
    varlen = next(entry for entry in report if entry["kernel"].startswith("varlen_attention"))
    products = varlen["n"] * HEAD_SIZE * varlen["k"] * (varlen["k"] + 1)
    naive = {
        f"{entry['n']}x{entry['k']}": entry["predicted_us"] / MEASURED_US[entry["n"], entry["k"]]
        for entry in report
        if entry["kernel"] == "naive_gemv_w4"
    }
    settings = ("smx", "clock_mhz", "dram_gb_s", "launch_us")
    return {
        "about": "made by tools/kernels_costs.py, which explains it; predictions, not measurements",
        **{name: smx.SETTINGS[name] for name in settings},
        "kernels": kernels(report),
        "varlen_us_a_million_products": round(
            (varlen["predicted_us"] - smx.SETTINGS["launch_us"]) / products * 1e6, 3
        ),
        "host_ms": host(),
        "of_measured": {name: round(ratio, 2) for name, ratio in naive.items()},
    }


def differences(table: Any, made: Any, where: str = "") -> list[str]:
    """Where the table is not what the report makes it, numbers by more than 3 % and 0.05."""
    if isinstance(table, dict) and isinstance(made, dict):
        return [
            text
            for name in sorted({*table, *made})
            for text in differences(table.get(name), made.get(name), f"{where} {name}".strip())
        ]
    if isinstance(table, list) and isinstance(made, list) and len(table) == len(made):
        pairs = enumerate(zip(table, made, strict=True))
        return [text for i, pair in pairs for text in differences(*pair, f"{where} [{i}]")]
    if isinstance(table, int | float) and isinstance(made, int | float):
        if abs(table - made) <= max(0.03 * abs(made), 0.05):
            return []
    elif table == made:
        return []
    return [f"{where}: {table} in the table, {made} by the report"]


def main() -> int:
    """Write the table, or compare it."""
    paths = [argument for argument in sys.argv[1:] if argument != "--write"]
    if len(paths) != 1:
        print("usage: kernels_costs.py REPORT.json [--write]", file=sys.stderr)
        return 2
    try:
        made = costs(json.loads(Path(paths[0]).read_text()))
    except OSError as error:
        print(f"kernels_costs: {paths[0]}: {error.strerror}", file=sys.stderr)
        return 1
    if "--write" in sys.argv:
        COSTS.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    wrong = differences(json.loads(COSTS.read_text()), made)
    for text in wrong:
        print(f"kernels_costs: {text}", file=sys.stderr)
    if wrong:
        print(
            f"kernels_costs: vllm-k80 predict goes by other kernels than these; renew its table: "
            f"python {sys.argv[0]} {paths[0]} --write",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
