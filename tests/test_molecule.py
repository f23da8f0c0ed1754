"""The molecule scenarios: a server from bare to a chat, and what must hold on the way.

They run two at a time: half of what a scenario does is waiting for downloads and for one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# By the marks that choose them. On two cores make test is to end within 40 minutes, CI, which runs
# hosts beside it, within 75, and the rest is for make test-all. The longest first; but the one with
# five servers at once when the main one has ended.
SCENARIOS = {
    "main": ["default"],
    "hosts": ["driver", "toolkit", "driver-matrix"],
    "more": ["air-gapped", "fleet", "fleet-short"],
}
AT_ONCE = int(os.environ.get("MOLECULE_AT_ONCE", "2"))


def run(scenario: str) -> int:
    """Runs a scenario; each of its lines appears at once, after the scenario's name."""
    with subprocess.Popen(
        [BIN / "molecule", "test", "--scenario-name", scenario],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "FORCE_COLOR": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as molecule:
        assert molecule.stdout
        for line in molecule.stdout:
            sys.stdout.write(f"{scenario} | {line}")
            sys.stdout.flush()
    return molecule.returncode


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[int]]]:
    """The scenarios that were asked for, begun."""
    asked = [item.callspec.params["scenario"] for item in request.session.items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {scenario: pool.submit(run, scenario) for scenario in asked}


def test_every_scenario_is_known() -> None:
    there = ROOT.glob("molecule/*/molecule.yml")
    known = [name for names in SCENARIOS.values() for name in names]
    assert sorted(known) == sorted(path.parent.name for path in there)


@pytest.mark.molecule
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=getattr(pytest.mark, mark))
        for mark, names in SCENARIOS.items()
        for name in names
    ],
)
def test_scenario(scenario: str, runs: dict[str, Future[int]]) -> None:
    assert runs[scenario].result() == 0
