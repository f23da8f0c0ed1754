"""The molecule scenarios: a server from bare to a chat, and what must hold on the way.

The Makefile has their names, and runs them two at a time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCENARIOS = [
    name
    for names in re.findall(
        r"^[A-Z]+_SCENARIOS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    for name in names.split()
]
# KEEP=default leaves that scenario's server.
KEEP = os.environ.get("KEEP", "").split()
# What says why a scenario failed: Ansible's lines, pytest's, molecule's own.
REASON = re.compile(r"fatal: |failed: |FAILED |ERROR |E   |CRITICAL ")


def test_every_scenario_is_in_the_makefile() -> None:
    there = ROOT.glob("molecule/*/molecule.yml")
    assert sorted(SCENARIOS) == sorted(path.parent.name for path in there)


@pytest.mark.parametrize("target", ["scenario-%", "test-apart", "test-unit", "test-unit-fast"])
def test_programs_that_tests_run_are_there_before_the_first_of_them(target: str) -> None:
    """A scenario wants a browser, which the tests beside it once brought too late."""
    # What make knows, for a target that has nothing to do: a dry run would run what calls make.
    command = ["make", "--print-data-base", "--question", "packages"]
    known = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout
    assert f"\n{target}: venv packages\n" in known


@pytest.mark.molecule
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str) -> None:
    """Each line appears at once, after the scenario's name; the reasons of a failure at the end."""
    reasons = []
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "FORCE_COLOR": "0"}
    # A server that is to be kept is not removed at the start either, and a clean host would not be
    # seen. `operations` begins with one that is there: that of a run that was cut off may be gone.
    first = "destroy" if scenario in KEEP else "reset" if scenario == "operations" else ""
    if first:
        command = [BIN / "molecule", first, "--scenario-name", scenario]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    kept = ["--destroy=never"] if scenario in KEEP else []
    with subprocess.Popen(
        [BIN / "molecule", "test", "--scenario-name", scenario, *kept],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as molecule:
        assert molecule.stdout
        for line in molecule.stdout:
            sys.stdout.write(f"{scenario} | {line}")
            sys.stdout.flush()
            if REASON.match(line):
                reasons.append(line)
    if molecule.returncode:
        pytest.fail(f"{scenario}\n{''.join(reasons[-40:])}", pytrace=False)
