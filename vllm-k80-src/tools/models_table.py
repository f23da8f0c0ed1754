#!/usr/bin/env python3
"""The table of docs/models.md: what of well-known models fits on a die, as `vllm-k80 plan` has it.

    models_table.py [--write]

Their configurations are in `models.json`, with the repository that each is of. The numbers of
parameters there are those that the repositories tell; a test holds the configurations against
them. Without ``--write`` it fails if the document has another table.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from vllm_k80 import plan
from vllm_k80.errors import NotServed

MODELS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "models.json").read_text())
DOCUMENT = Path(__file__).parent.parent.parent / "docs/models.md"
BEGIN, END = "<!-- models_table.py -->\n", "<!-- end -->\n"
CONTEXT = 2048  # of the predicted speed
FEW = 16  # --max-num-seqs, where that lets a model fit
WIDTHS = {"FP16": None, "INT8": "int8", "INT4": "int4"}


def source(model: dict[str, Any]) -> plan.Source:
    """What describes a model of the list."""
    return plan.Source(model["name"], model["source"], model["config"])


def dtype(model: dict[str, Any]) -> str:
    """half, but for those that are not served with it; their FP16 is of weights alone."""
    try:
        source(model).model(plan.Settings(dtype="half"))
    except NotServed:
        return "float32"
    return "half"


def cell(model: dict[str, Any], weights: str | None) -> str:
    """Weights of a die and the longest context of one sequence, with as little as that takes."""
    if weights is None and dtype(model) != "half":
        weights = "fp16"
    for dies, sequences, mark in ((1, 256, ""), (1, FEW, " *"), (2, 256, " †")):
        limits = plan.Limits(sequences=sequences)
        settings = plan.Settings(dtype=dtype(model), weights=weights, dies=dies, limits=limits)
        try:
            result = plan.judge(source(model), settings)
        except NotServed:  # heads that two dies cannot share
            break
        if result["largest_context"] >= min(CONTEXT, result["context"]):
            return f"{result['weights_bytes'] / 1e9:.1f} GB, {result['largest_context']:,}{mark}"
    return "no"


def speed(model: dict[str, Any]) -> str:
    """Predicted tokens a second in INT4, and if the prediction is as wrong as it is at worst."""
    limits = plan.Limits(sequences=FEW)
    settings = plan.Settings(dtype=dtype(model), weights="int4", limits=limits)
    context = min(CONTEXT, source(model).model(settings).longest)
    settings = replace(settings, context=context)
    predicted = plan.judge(source(model), settings)["predicted"]
    if predicted is None:
        return ""
    line = predicted["decode"][0]
    return f"{line['tokens_per_second']:.0f} ({line['if_as_optimistic_as_known']:.0f})"


def table() -> str:
    """Lines of the table."""
    rows = [["model", *WIDTHS, "INT4, tokens/s"], ["---"] * (len(WIDTHS) + 2)]
    for model in MODELS:
        cells = [cell(model, weights) for weights in WIDTHS.values()]
        rows.append([f"[{model['name']}](https://huggingface.co/{model['source']})", *cells])
        rows[-1].append(speed(model))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    """Compare, or write."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{DOCUMENT} has no place for the table: {BEGIN.strip()} … {END.strip()}")
    new = table()
    if old == new:
        return 0
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(before + BEGIN + new + END + after)
        return 0
    print(f"{DOCUMENT} has another table; `make models-table` writes this one:\n{new}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
