"""docs/reliability.md, from what `make test-reliability` measured."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

# What a test measured: its name, the day, the machine, whether it passed, and the figures of
# conftest's Fault.
Row = dict[str, Any]

COLUMNS = {
    "name": "what happened",
    "sent": "sent",
    "finished": "finished",
    "failed": "failed",
    "cut": "cut",
    "retried": "sent again",
    "other_gateway": "asked the other",
    "slowest": "slowest answer",
    "detected": "noticed",
    "recovered": "back",
}


def table(rows: list[Row]) -> list[str]:
    """The lines of a table, the runs of a test one below the other."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.1f} s" if isinstance(value, float) else str(value)

    def line(row: Row) -> str:
        cells = [cell(row[column]) for column in COLUMNS]
        cells[0] += "" if row["passed"] else " (the test failed)"
        return f"| {' | '.join(cells)} |"

    names = list(dict.fromkeys(row["name"] for row in rows))
    return [
        f"| {' | '.join(COLUMNS.values())} |",
        "|---" * len(COLUMNS) + "|",
        *map(line, sorted(rows, key=lambda row: names.index(row["name"]))),
    ]


def last_two(rows: list[Row]) -> list[Row]:
    """The last two runs of each."""
    left: Counter[str] = Counter()
    kept = []
    for row in reversed(rows):
        left[row["name"]] += 1
        if left[row["name"]] <= 2:
            kept.append(row)
    return kept[::-1]


def often(rows: list[Row]) -> str:
    """How often each ran, and what failed, as sentences."""
    runs = Counter(row["name"] for row in rows)
    once = [name for name, count in runs.items() if count == 1]
    failed = sorted({row["name"] for row in rows if not row["passed"]})
    told = f"Once only: {'; '.join(once)}." if once else "Each twice, one after the other."
    return told + (f" **Not as it should be: {'; '.join(failed)}.**" if failed else "")


def places(rows: list[Row]) -> str:
    """Days and machines; where there are several, what was measured there, too."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        names.setdefault(f"on {row['on']}, {row['machine']}", {})[row["name"]] = None
    if len(names) == 1:
        return "".join(names)
    return "; ".join(f"{place}: {', '.join(them)}" for place, them in names.items())


def write(path: Path, rows: list[Row]) -> None:
    rows = last_two(rows)
    where = f"Measured {places(rows)}. {often(rows)}"
    head = Path(__file__).with_name("reliability.md").read_text()
    path.write_text("\n".join([head, where, "", *table(rows), ""]))


def machine() -> str:
    """Cores and processor of this one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores, {next(named, platform.machine())}"
