"""What ``vllm-k80 bench`` has measured, as a table, as CSV and as a page."""

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_k80 import plot
from vllm_k80.errors import UserError

# Columns of a file of samples, after the time in seconds since 1970: what nvidia-smi calls them.
SAMPLED = (
    "uuid",
    "name",
    "temperature.gpu",
    "clocks.current.sm",
    "clocks_throttle_reasons.active",
    "power.draw",
    "utilization.gpu",
)
_PREDICTED = "predicted for one K80 die"
_OPTIMISTIC = "predicted, if it errs as on known kernels"
# nvml.h: what slows a die down, and neither idleness nor the clocks that were set.
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --paper: #fff; --soft: #5c6773; --rule: #d8dde3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --paper: #14181d; --soft: #9aa6b2; --rule: #343c45 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .25em .7em; border-bottom: 1px solid var(--rule); text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto; display: block; margin: 1.5em 0 }
.soft { color: var(--soft) }
"""


def document(title: str, body: Sequence[str]) -> str:
    """A page that needs nothing else; `title` is escaped, `body` is HTML."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    )
    view = '<meta name="viewport" content="width=device-width">'
    return "\n".join([head, view, f"<style>{STYLE}</style>", *body, "</html>\n"])


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table of anything."""
    cells = [(tag, line) for tag, line in [("th", head), *(("td", row) for row in rows)]]
    lines = (
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in line) + "</tr>"
        for tag, line in cells
    )
    return f"<table>{''.join(lines)}</table>"


# ---- temperature and clocks


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None  # [N/A] and the like


def samples(paths: Sequence[Path], began: float, ended: float) -> dict[str, Any]:
    """What was sampled of each die in that time, by its UUID.

    Raises:
        UserError: a file cannot be read, or is of another kind.
    """
    found: dict[str, Any] = {}
    for path in paths:
        try:
            rows = list(csv.reader(path.read_text(errors="replace").splitlines()))
        except OSError as error:
            raise UserError(f"--samples {path}: {error.strerror}.") from None
        for row in rows:
            when, *values = (cell.strip() for cell in row)
            # The last line may be half written, and a die that is lost leaves words.
            if len(values) != len(SAMPLED) or _number(when) is None:
                continue
            known = dict(zip(SAMPLED, values, strict=True))
            if not began <= float(when) <= ended:
                continue
            die = found.setdefault(known["uuid"], {"card": known["name"], "rows": []})
            reasons = known["clocks_throttle_reasons.active"]
            bits = int(reasons, 16) if reasons.startswith("0x") else 0
            die["rows"].append(
                {
                    "s": round(float(when) - began, 1),
                    "celsius": _number(known["temperature.gpu"]),
                    "sm_mhz": _number(known["clocks.current.sm"]),
                    "watts": _number(known["power.draw"]),
                    "utilization": _number(known["utilization.gpu"]),
                    "throttled": [name for bit, name in _THROTTLES.items() if bits & bit],
                }
            )
    return found


def sample_plots(sampled: dict[str, Any]) -> list[str]:
    """Temperature and clock over the time, a line for each die."""
    if not sampled:
        return ['<p class="soft">Temperature and clocks were not sampled.</p>']

    def over_time(title: str, key: str, label: str) -> str:
        lines = {
            uuid: [(row["s"], row[key]) for row in die["rows"]] for uuid, die in sampled.items()
        }
        return plot.line_plot(lines, title=title, x_label="seconds", y_label=label)

    slowed = {
        uuid: sorted({reason for row in die["rows"] for reason in row["throttled"]})
        for uuid, die in sampled.items()
    }
    said = [
        f"<p>{html.escape(uuid)}, {html.escape(die['card'])}: "
        f"{'slowed down by ' + ', '.join(slowed[uuid]) if slowed[uuid] else 'not slowed down'}.</p>"
        for uuid, die in sampled.items()
    ]
    return [
        over_time("Temperature", "celsius", "°C"),
        over_time("Clock of the multiprocessors", "sm_mhz", "MHz"),
        *said,
    ]


# ---- the benchmark

HEAD = ("step", "tokens/s", "TTFT ms", "p90", "p99", "TPOT ms", "p90", "p99", "failed")


def _of(result: dict[str, Any], sweep: str) -> list[dict[str, Any]]:
    return [step for step in result["steps"] if step["sweep"] == sweep]


def step_name(step: dict[str, Any]) -> str:
    """For a person."""
    if step["sweep"] == "concurrency":
        return f"{step['concurrency']} at once"
    if step["sweep"] == "soak":
        return f"soak, {step['concurrency']} at once"
    return f"prompt of {step['prompt_tokens']:,}"


def rows(result: dict[str, Any]) -> list[list[str]]:
    """What HEAD names, for each step; medians."""
    lines = []
    for step in result["steps"]:
        tpot = step["tpot_ms"]
        lines.append(
            [
                step_name(step),
                f"{step['tokens_per_second']:.1f}" if tpot else "",
                *(f"{step['ttft_ms'][key]:.0f}" for key in ("p50", "p90", "p99")),
                *(f"{tpot[key]:.1f}" if tpot else "" for key in ("p50", "p90", "p99")),
                f"{step['failed']} of {step['requests']}" if step["failed"] else "0",
            ]
        )
    return lines


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, on what and when."""
    settings, about = result["settings"], result["about"]
    return [
        ("model", result["model"]),
        ("address", result["url"]),
        ("server", about.get("server") or "not said"),
        ("card", about.get("card") or "not said"),
        ("measured from", result["client"]),
        ("when", result["began"]),
        ("with", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        (
            "requests",
            f"prompts of {settings['prompt_tokens']} tokens, {settings['output_tokens']} tokens "
            f"generated; seed {settings['seed']}",
        ),
    ]


def _failures(result: dict[str, Any]) -> list[str]:
    return [
        f"{step_name(step)}: {count} failed: {reason}"
        for step in result["steps"]
        for reason, count in step["failures"].items()
    ]


def text(result: dict[str, Any]) -> str:
    """The table, for a terminal."""
    lines = ["MEASURED", *(f"{name + ':':15}{value}" for name, value in facts(result)), ""]
    for row in [list(HEAD), *rows(result)]:
        lines.append(f"{row[0]:18}" + "".join(f"{cell:>10}" for cell in row[1:]))
    lines += ["", "TTFT: to the first token; TPOT: for each further one; medians first."]
    return "\n".join(lines + _failures(result))


def table_csv(result: dict[str, Any]) -> str:
    """A line for each step."""
    out = io.StringIO()
    names = ["sweep", "concurrency", "prompt_tokens", "output_tokens", "requests", "failed"]
    names += ["seconds", "tokens_per_second", "requests_per_second"]
    times = [(kind, key) for kind in ("ttft_ms", "tpot_ms", "latency_ms") for key in _KEYS]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names + [f"{kind[:-3]}_{key}_ms" for kind, key in times])
    for step in result["steps"]:
        measured = [(step[kind] or {}).get(key, "") for kind, key in times]
        writer.writerow([step[name] for name in names] + measured)
    return out.getvalue()


_KEYS = ("mean", "p50", "p90", "p99")


def page(result: dict[str, Any]) -> str:
    """The report."""
    predicted = result["predicted"]
    speed = {
        "measured": [(s["concurrency"], s["tokens_per_second"]) for s in _of(result, "concurrency")]
    }
    first = {
        "measured, median": [
            (s["prompt_tokens"], s["ttft_ms"]["p50"]) for s in _of(result, "prompt_length")
        ]
    }
    if "none" in predicted:
        note = f"Nothing was predicted: {predicted['none']}"
    else:
        decode = predicted["decode"]
        speed[_PREDICTED] = [(d["batch"], d["tokens_per_second"]) for d in decode]
        speed[_OPTIMISTIC] = [(d["batch"], d["if_as_optimistic_as_known"]) for d in decode]
        first[_PREDICTED] = [(length, 1e3 * s) for length, s in predicted["first_token_s"]]
        note = (
            "Dashed lines are predicted for one die of a Tesla K80 and measured nowhere: "
            "`vllm-k80 predict` makes them from the kernels' code and the model's shape, and "
            "says how far to trust them."
        )
    dashed = (_PREDICTED, _OPTIMISTIC)
    return document(
        f"Benchmark of {result['model']}",
        [
            f"<h1>Benchmark of {html.escape(result['model'])}</h1>",
            table(("", ""), facts(result)),
            "<h2>Measured</h2>",
            table(HEAD, rows(result)),
            *(f"<p>{html.escape(line)}</p>" for line in _failures(result)),
            '<p class="soft">TTFT: to the first token; TPOT: for each further one; medians '
            "first.</p>",
            plot.line_plot(
                speed,
                title="Tokens a second, all requests together",
                x_label="requests at once",
                y_label="tokens/s",
                dashed=dashed,
            ),
            plot.line_plot(
                first,
                title="Time to the first token, one request at a time",
                x_label="tokens of the prompt",
                y_label="ms",
                dashed=dashed,
            ),
            f'<p class="soft">{html.escape(note)}</p>',
            "<h2>Temperature and clocks, as nvidia-smi has them</h2>",
            *sample_plots(result["samples"]),
        ],
    )
