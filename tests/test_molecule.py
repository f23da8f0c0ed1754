"""The molecule scenarios: a server from bare to a chat, and what must hold on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# What make test leaves to make test-all, so that it ends within its 75 minutes on two cores.
MORE = ["cuda", "driver-matrix"]
SCENARIOS = [
    pytest.param(name, marks=pytest.mark.more if name in MORE else ())
    for name in sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
]


@pytest.mark.molecule
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str) -> None:
    # Its output goes straight to the terminal: a run takes many minutes (pytest --capture=no).
    done = subprocess.run(
        [BIN / "molecule", "test", "--scenario-name", scenario],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0
