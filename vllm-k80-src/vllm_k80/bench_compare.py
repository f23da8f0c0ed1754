"""``vllm-k80 bench --compare``: whether two results differ by more than chance explains.

Requests that run at once share every step of the engine, so they are not independent: those that
were sent together count as one value, their mean. Of these values' logarithms the difference of the
means has Welch's t-interval (B. L. Welch, The generalization of "Student's" problem when several
different population variances are involved, Biometrika 34, 1947), which makes an interval of the
ratio. All intervals of a comparison hold together with 95 %, by Bonferroni's correction.
"""

import json
import math
from pathlib import Path
from typing import Any

from vllm_k80.bench_report import step_name
from vllm_k80.errors import UserError

CONFIDENCE = 0.95
MEASURES = {"ttft_ms": "first token", "tpot_ms": "each further token", "latency_ms": "whole answer"}


# ---- statistics


def t_quantile(probability: float, freedom: float) -> float:
    """The value below which Student's t lies with that probability, which is at least 1/2."""
    # With t = sqrt(freedom) tan(angle) the density is a power of a cosine on a finite interval.
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(math.pi)

    def beyond_half(angle: float, steps: int = 200) -> float:
        width = angle / steps
        powers = [math.pow(math.cos(i * width), freedom - 1) for i in range(steps + 1)]
        # Simpson's rule.
        inner = 4 * sum(powers[1:-1:2]) + 2 * sum(powers[2:-1:2])
        return scale * width / 3 * (powers[0] + inner + powers[-1])

    low, high = 0.0, math.pi / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + beyond_half(middle) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def ratio(a: list[float], b: list[float], confidence: float) -> tuple[float, float, float] | None:
    """How many times as large B is as A, and the ends of the interval; None if nothing can be said.

    Of geometric means, for what is compared are times.
    """
    logs = [[math.log(value) for value in values] for values in (a, b)]
    if min(len(a), len(b)) < 2:
        return None
    means = [sum(values) / len(values) for values in logs]
    errors = [
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, mean in zip(logs, means, strict=True)
    ]
    difference, error = means[1] - means[0], math.sqrt(sum(errors))
    if error == 0:
        return None
    freedom = sum(errors) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(errors, logs, strict=True)
    )
    half = t_quantile((1 + confidence) / 2, freedom) * error
    return math.exp(difference), math.exp(difference - half), math.exp(difference + half)


# ---- results


def load(path: Path) -> dict[str, Any]:
    """A result.json, or that of a directory.

    Raises:
        UserError: there is none.
    """
    file = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text())
        result["steps"][0]["each"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{file} is not a result of `vllm-k80 bench`.") from None
    return dict(result)


def together(step: dict[str, Any], measure: str) -> list[float]:
    """A value for each group of requests that were sent together."""
    values = []
    for begin in range(0, len(step["each"]), step["concurrency"]):
        group = [each for each in step["each"][begin : begin + step["concurrency"]] if each]
        if measure == "tpot_ms":
            further = step["output_tokens"] - 1
            times = [(each["latency_ms"] - each["ttft_ms"]) / further for each in group]
        else:
            times = [each[measure] for each in group]
        if times and min(times) > 0:
            values.append(sum(times) / len(times))
    return values


def verdict(found: tuple[float, float, float] | None) -> str:
    """In words; `found` is about times, of which more is slower."""
    if found is None:
        return "too few requests to say"
    middle, low, high = found
    word = "no difference shown" if low <= 1 <= high else "slower" if middle > 1 else "faster"
    ends = f"{low - 1:+.1%} to {high - 1:+.1%}"
    return f"{word}: time {middle - 1:+.1%} ({ends})"


def _shape(step: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(step[k] for k in ("sweep", "concurrency", "prompt_tokens", "output_tokens"))


def run(first: Path, second: Path) -> str:
    """What changed from A to B, for a person.

    Raises:
        UserError: a file is not a result, or they have no step in common.
    """
    a, b = load(first), load(second)
    others = {_shape(step): step for step in b["steps"]}
    pairs = [(step, others[_shape(step)]) for step in a["steps"] if _shape(step) in others]
    if not pairs:
        raise UserError(
            f"{first} and {second} have no step in common: measure with the same --concurrency, "
            f"--prompt-tokens, --output-tokens and --prompt-lengths."
        )
    planned = [
        (one, two, measure)
        for one, two in pairs
        for measure in (MEASURES if one["tpot_ms"] else ("ttft_ms",))
    ]
    confidence = 1 - (1 - CONFIDENCE) / len(planned)
    lines = [f"A: {first}: {a['model']}, {a['began']}", f"B: {second}: {b['model']}, {b['began']}"]
    for name, of_a, of_b in (
        ("model", a["model"], b["model"]),
        ("address", a["url"], b["url"]),
        ("measured from", a["client"], b["client"]),
        ("seed", a["settings"]["seed"], b["settings"]["seed"]),
        *((key, a["about"].get(key), b["about"].get(key)) for key in ("server", "card")),
        *((key, a["versions"][key], b["versions"].get(key)) for key in a["versions"]),
    ):
        if of_a != of_b:
            lines.append(f"not the same: {name}: {of_a or 'not said'}; {of_b or 'not said'}")
    alone = len(a["steps"]) + len(b["steps"]) - 2 * len(pairs)
    if alone:
        lines.append(f"steps that only one of them has, not compared: {alone}")
    for one, two in pairs:
        lines += ["", f"{step_name(one)}, prompt of {one['prompt_tokens']:,}"]
        if one["tpot_ms"]:
            speeds = f"{one['tokens_per_second']:.1f} and {two['tokens_per_second']:.1f}"
            lines.append(f"  {'tokens/s':20}{speeds} (one value a run: no interval)")
        for _, _, measure in (entry for entry in planned if entry[0] is one):
            found = ratio(together(one, measure), together(two, measure), confidence)
            lines.append(f"  {MEASURES[measure]:20}{verdict(found)}")
    lines += [
        "",
        f"Intervals: Welch's t on the logarithms, requests sent together as one value; all "
        f"{len(planned)}",
        "hold together with 95 % (Bonferroni). They are about chance within these two runs: what "
        "else",
        "changes from run to run (heat, other users) is not in them; measure A and B twice.",
    ]
    return "\n".join(lines)
