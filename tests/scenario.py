"""What the scenarios' tests share: their playbooks, reboots, and reports of what failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import testinfra

ROOT = Path(__file__).resolve().parent.parent


def play(
    playbook: str | Path,
    *options: str,
    inventory: str | Path | None = None,
    **variables: object,
) -> tuple[int, str]:
    """Runs a playbook, named from the root of the project, with some variables otherwise.

    On the scenario's servers unless an inventory is named. Returns its exit code and what it
    printed, on one line and without colours.
    """
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={inventory or os.environ['MOLECULE_INVENTORY_FILE']}",
            f"--extra-vars={json.dumps(variables)}",
            *options,
            playbook,
        ],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def playbook_of(role: str, directory: Path) -> Path:
    """A playbook in this directory that runs one role, with the project's versions."""
    play = {
        "hosts": "k80_servers",
        "gather_subset": ["min"],
        "vars_files": [str(ROOT / "group_vars/all/versions.yml")],
        "roles": [role],
    }
    playbook = directory / "play.yml"
    playbook.write_text(json.dumps([play]))
    return playbook


def reboot(server: str) -> None:
    """Reboots a server from inside; returns when another boot of it has begun."""

    def started_at() -> str:
        state = "{{.State.StartedAt}} {{.State.Running}}"
        command = ["docker", "inspect", "--format", state, server]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    before = started_at()
    testinfra.get_host(f"docker://{server}").run("systemctl reboot")  # ends before it can answer
    deadline = time.monotonic() + 300
    while (now := started_at()) == before or "true" not in now:
        assert time.monotonic() < deadline, f"{server} did not come up again"
        time.sleep(1)


def reporting(server: str, commands: Mapping[str, str]) -> Callable[[], Iterator[Any]]:
    """A hook for a conftest.py: with every test that fails comes what that server has to say.

    pytest_runtest_makereport = reporting(SERVER, {"title": "shell command", …})
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport() -> Iterator[Any]:
        report = yield
        if report.failed:
            host = testinfra.get_host(f"docker://{server}")
            for title, command in commands.items():
                result = host.run(command)
                report.sections.append((f"{title} of {server}", result.stdout + result.stderr))
        return report

    return pytest_runtest_makereport
