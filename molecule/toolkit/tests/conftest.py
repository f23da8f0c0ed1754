"""The emulated server with Docker and NVIDIA's container toolkit on it, and no instances."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import testinfra
from server_report import reporting
from testinfra.host import Host

SERVER = "k80-toolkit"
ROOT = Path(__file__).resolve().parents[3]
IMAGE = "vllm-k80-base:debian12"

pytest_runtest_makereport = reporting(
    SERVER,
    {
        "containers": "docker ps --all",
        "specification": "cat /run/cdi/nvidia.yaml",
        "journal": "journalctl --no-pager -u 'k80-*' -u docker --since -10min | tail -n 60",
    },
)


@dataclass(frozen=True)
class Container:
    """A container that waits, with what NVIDIA_VISIBLE_DEVICES gave to it."""

    host: Host
    name: str

    def opens(self, node: str) -> str:
        """What the kernel answers to a process in there that opens a node."""
        result = self.host.run("docker exec %s bash -c %s", self.name, f"exec 3< /dev/{node}")
        assert result.rc != 0, "there is no driver behind the nodes"
        return str(result.stderr.strip().rsplit(": ", 1)[1])

    def start(self, devices: str, *options: str) -> None:
        command = ["docker", "run", "--detach", "--runtime", "nvidia", "--name", self.name]
        command += [*options, "--env", f"NVIDIA_VISIBLE_DEVICES={devices}", IMAGE, "sleep", "9999"]
        result = self.host.run(" ".join(command))
        assert result.rc == 0, result.stderr


class Server:
    def __init__(self, host: Host) -> None:
        self.host = host

    def run(self, command: str) -> str:
        result = self.host.run(command)
        assert result.rc == 0, f"{command}: exit {result.rc}: {result.stderr}{result.stdout}"
        return str(result.stdout.strip())

    @property
    def uuids(self) -> list[str]:
        return self.run("nvidia-smi --query-gpu=uuid --format=csv,noheader").split()

    def packages(self) -> dict[str, str]:
        lines = self.run("dpkg-query --show --showformat '${Package} ${Version}\\n'").splitlines()
        return dict(line.split() for line in lines)

    def specification(self) -> str:
        return self.run("cat /run/cdi/nvidia.yaml")

    def wait_for(self, condition: str) -> None:
        """Until a shell command on the server succeeds."""
        deadline = time.monotonic() + 30
        while self.host.run("bash -c %s", condition).rc != 0:
            assert time.monotonic() < deadline, f"after 30 s this still fails: {condition}"
            time.sleep(0.5)

    def reboot(self) -> None:
        def started_at() -> str:
            state = "{{.State.StartedAt}} {{.State.Running}}"
            command = ["docker", "inspect", "--format", state, SERVER]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        before = started_at()
        self.host.run("systemctl reboot")  # ends before it can answer
        deadline = time.monotonic() + 60
        while (now := started_at()) == before or "true" not in now:
            assert time.monotonic() < deadline, "the server did not come up again"
            time.sleep(1)
        self.wait_for("systemctl is-system-running --wait")

    def converge(self, **variables: str) -> tuple[int, str]:
        """Runs the roles again: exit status and output."""
        command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"]]
        command += [str(ROOT / "molecule" / "toolkit" / "converge.yml")]
        for name, value in variables.items():
            command += ["--extra-vars", f"{name}={value}"]
        # No pipes, no colours: what is compared is the text.
        environment = os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def server() -> Server:
    server = Server(testinfra.get_host(f"docker://{SERVER}"))
    server.run("docker load --quiet --input /srv/vllm-k80-base.tar")
    return server


@pytest.fixture
def container(server: Server, request: pytest.FixtureRequest) -> Iterator[Container]:
    container = Container(server.host, request.node.originalname.replace("_", "-"))
    yield container
    server.host.run("docker rm --force %s", container.name)
