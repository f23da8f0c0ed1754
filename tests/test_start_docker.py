"""tools/start-docker where it cannot do by itself what is missing, and where nothing is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools/start-docker"
# Every other program that it would call is one that fails the test.
USED = ("bash", "env", "id", "grep")


class Machine:
    """A machine of which the script sees the programs that are put there."""

    def __init__(self, directory: Path) -> None:
        self.programs, self.called = directory / "bin", directory / "called"
        self.programs.mkdir()
        for name in USED:
            (self.programs / name).symlink_to(str(shutil.which(name)))
        for name in ("apt-get", "apt-cache", "systemctl", "setsid"):
            self.program(name, f"echo {name} >> {self.called}; exit 1")

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def start(self) -> tuple[int, str]:
        """Exit status and what was said; nothing may have been installed or started."""
        done = subprocess.run(
            [SCRIPT],
            env={"PATH": str(self.programs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not self.called.exists(), self.called.read_text()
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_done_where_docker_answers(machine: Machine) -> None:
    machine.program("docker", "exit 0")
    assert machine.start() == (0, "")


@pytest.mark.parametrize("lacking", ["root", "apt"])
def test_what_it_cannot_install_is_asked_for_in_one_sentence(
    machine: Machine, lacking: str
) -> None:
    if lacking == "root":
        machine.program("id", "echo 1000")
    else:
        machine.program("id", "echo 0")
        machine.program("grep", "exit 1")  # in /etc/os-release
    code, said = machine.start()
    assert code == 1
    assert said == (
        "start-docker: Docker is not installed: install Docker Engine 20.10 or newer for this"
        " system, start it, then run this again.\n"
    )


def test_a_daemon_that_is_not_the_user_s_is_not_started(machine: Machine) -> None:
    machine.program("docker", "exit 1")
    machine.program("dockerd", "exit 1")
    machine.program("id", 'if [ "$1" = -un ]; then echo somebody; else echo 1000; fi')
    code, said = machine.start()
    assert code == 1
    assert said == (
        "start-docker: Docker does not answer to user somebody: start its service and add the user"
        " to group docker, or run this as root.\n"
    )
