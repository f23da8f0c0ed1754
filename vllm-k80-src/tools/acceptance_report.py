"""One page of what playbooks/acceptance.yml has brought from all servers.

    python3 tools/acceptance_report.py DIRECTORY

DIRECTORY has a directory for each server, with what playbooks/files/accept-here has written there.
It gets index.html. Exit status 1 if anything has failed. Standard library only.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from vllm_k80 import bench_report as report  # noqa: E402

HEAD = ("result", "server", "instance", "what", "what it said")
# gemv_on_gpu.py's names, and those of the kernels that the report of kernels predicts.
_PRODUCTS = {"gemv_w4_us": ("w4", 128), "gemv_w8_us": ("w8", 128), "gemv_f16_us": ("f16", 0)}


def _key(kernel: str, n: int, k: int, m: int, group: int) -> str:
    return f"{kernel} n={n} k={k} m={m} group={group}"


def kernel_times(figures: dict[str, Any], predicted: dict[str, float]) -> list[tuple[str, ...]]:
    """Kernel, measured and predicted microseconds, and their ratio, where there are both."""
    found = []
    for line in figures["times"]:
        if "columns" in line:
            for name, (kind, group) in _PRODUCTS.items():
                kernel = f"gemv_{kind}_f16" if kind != "f16" else "gemv_f16"
                shape = line["rows"], line["columns"], line["tokens"], group
                found.append((_key(f"{kernel}_m{line['tokens']}", *shape), line.get(name)))
        elif line["operator"] == "paged_attention":
            group = line["heads"] // line["kv_heads"]
            kernel = f"paged_attention_f16_d128_h{group}"
            shape = line["heads"], line["length"], line["sequences"], group
            found.append((_key(kernel, *shape), line.get("kernel_us")))
    return [
        (key, f"{us:.1f}", f"{predicted[key]:.1f}", f"{predicted[key] / us:.2f}")
        for key, us in found
        if us and key in predicted
    ]


def page(directory: Path, predicted: dict[str, float]) -> tuple[str, list[tuple[str, ...]]]:
    """The page, and its rows of checks as HEAD has them."""
    rows: list[tuple[str, ...]] = []
    times: list[str] = []
    soaks: list[str] = []
    for server in sorted(path.parent for path in directory.glob("*/checks.json")):
        for check in json.loads((server / "checks.json").read_text()):
            words = [check[key] for key in ("result", "instance", "check", "said")]
            rows.append((words[0], server.name, *words[1:]))
        for file in sorted(server.glob("*/*.json")):
            suite = re.match(r"(gemv|attention)-", file.name)
            if suite and file.parent.name != "soak":
                figures = json.loads(file.read_text())
                lines = kernel_times(figures, predicted)
                times.append(f"<h3>{server.name} {file.stem}, {figures['card']}</h3>")
                head = ("kernel and shape", "measured us", "predicted us", "predicted/measured")
                times.append(report.table(head, lines) if lines else "<p>No times.</p>")
        for file in sorted(server.glob("soak/*/result.json")):
            result = json.loads(file.read_text())
            soaks.append(f"<h3>{server.name} {file.parent.name}</h3>")
            soaks += [report.table(report.HEAD, report.rows(result))]
            soaks += report.sample_plots(result["samples"])
    # What has failed first, then what was not run.
    rows.sort(key=lambda row: ("fail", "not run", "pass").index(row[0]))
    body = [
        "<h1>Acceptance</h1>",
        f"<p>{summary(rows)}</p>",
        report.table(HEAD, rows),
        "<h2>Kernel times, measured and predicted</h2>",
        *(times or ["<p>Not run: no die was free for them, or CUDA opened none.</p>"]),
        "<h2>Under load</h2>",
        *(soaks or ["<p>Not run.</p>"]),
    ]
    return report.document("Acceptance", body), rows


def summary(rows: list[tuple[str, ...]]) -> str:
    """How many of each."""
    counts = {name: sum(row[0] == name for row in rows) for name in ("pass", "fail", "not run")}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + "."


def main() -> int:
    """Write the page, print the checks."""
    directory = Path(sys.argv[1])
    predicted = json.loads((HERE / "kernels_baseline.json").read_text())
    text, rows = page(directory, predicted)
    if not rows:
        print(f"{directory}: no server has brought results; see above why.", file=sys.stderr)
        return 1
    (directory / "index.html").write_text(text)
    for row in rows:
        print(f"{row[0]:8} {row[1]} {row[2]}: {row[3]}: {row[4]}")
    print(f"{summary(rows)} The page: {directory / 'index.html'}")
    failed = [f"{row[1]} {row[2]}: {row[3]}: {row[4]}" for row in rows if row[0] == "fail"]
    if failed:
        print("; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
