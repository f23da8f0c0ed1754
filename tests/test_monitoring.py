"""Alerts and dashboards: that they can come, and speak of what is there.

Whether a live server has the metrics is seen in molecule/default/tests/test_monitoring.py.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documentation import anchors

ROOT = Path(__file__).resolve().parent.parent
ROLE = ROOT / "roles/monitoring"
RULES = ROLE / "files/rules.yml"
EXAMPLES = ROOT / "tests/monitoring_rules.yml"
DASHBOARDS = sorted((ROLE / "files/grafana").glob("*.json"))
# tools/test-packages puts it into build, where it is not installed.
PATH = f"{os.environ['PATH']}:{ROOT / 'build'}"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries(dashboard: Path) -> Iterator[str]:
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def program(path: str) -> Any:
    loader = importlib.machinery.SourceFileLoader(Path(path).name.replace("-", "_"), path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments],
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_alert_comes_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", EXAMPLES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_is_without_an_example() -> None:
    shown = set(re.findall(r'alertname[=:] ?"?(\w+)', EXAMPLES.read_text()))
    assert shown == {rule["alert"] for rule in rules()}


def test_a_die_whose_model_has_changed_shows_its_tokens(tmp_path: Path) -> None:
    """Its instance has two series then, for as long as a rate looks back."""
    (query,) = [query for query in queries(ROLE / "files/grafana/die.json") if "tokens" in query]
    of_one = 'host="a", vllm_instance="die0"'
    case = {
        "interval": "15s",
        "input_series": [
            {
                "series": f'vllm:generation_tokens_total{{{of_one}, model_name="old"}}',
                "values": "0+15x8 _x12",
            },
            {
                "series": f'vllm:generation_tokens_total{{{of_one}, model_name="new"}}',
                "values": "_x10 0+15x10",
            },
            {"series": f'k80_die_up{{{of_one}, pci_address="p"}}', "values": "1x20"},
        ],
        "promql_expr_test": [
            {
                "expr": f"count({re.sub(r'[$](host|die)', '.*', query)} > 0)",
                "eval_time": "5m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }
    file = tmp_path / "case.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [case]}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule['alert']} {rule['labels']}")
def test_each_alert_says_what_to_do_and_where_there_is_more(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "action", "see"}
    path, _, anchor = rule["annotations"]["see"].partition("#")
    assert anchor in anchors(ROOT / path)
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_page_s_table_is_made_of_the_rules() -> None:
    table = program(str(ROOT / "tools/alerts-table"))
    assert table.PAGE.read_text() == table.page(), "run: make docs"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_s_queries_can_be_read(dashboard: Path, tmp_path: Path) -> None:
    variables = re.compile(r"\$(host|die|model)\b")
    assert not [q for q in queries(dashboard) if "$" in variables.sub("", q)]
    recorded = [
        {"record": f"query_{number}", "expr": variables.sub(".*", query)}
        for number, query in enumerate(queries(dashboard))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_s_panels_do_not_lie_on_each_other(dashboard: Path) -> None:
    board = json.loads(dashboard.read_text())
    assert board["uid"] == f"vllm-k80-{dashboard.stem}"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_doctor_knows_every_metric_that_is_asked_of_it() -> None:
    doctor = program(str(ROOT / "roles/doctor/files/k80-doctor"))
    texts = [RULES.read_text(), *(path.read_text() for path in DASHBOARDS)]
    asked = set(re.findall(r"\bk80_(?:die|doctor|driver)_?\w*", " ".join(texts)))
    assert asked - {"k80_dies"} <= set(doctor.METRICS)
    checks = {check.name for check in doctor.CHECKS}
    for names in re.findall(r'k80_doctor_check\{name!?[=~]+"([^"]+)"', RULES.read_text()):
        for part in re.sub(r"(\w+)-\((.*?)\)", lambda m: expand(m[1], m[2]), names).split("|"):
            assert part in checks


def expand(stem: str, ends: str) -> str:
    return "|".join(f"{stem}-{end}" for end in ends.split("|"))
