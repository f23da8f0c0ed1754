"""docs/reliability.md, from what `make test-reliability` measured."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

COLUMNS = [
    "what happened",
    "sent",
    "finished",
    "failed",
    "cut",
    "sent again",
    "asked the other",
    "slowest answer",
    "noticed",
    "back",
]


def write(path: Path, rows: list[str]) -> None:
    where = f"Measured on {date.today().isoformat()}, {os.cpu_count()} cores, {machine()}."
    head = Path(__file__).with_name("reliability.md").read_text()
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows]
    path.write_text("\n".join([head, where, "", *table, ""]))


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()
