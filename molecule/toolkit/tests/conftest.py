"""The emulated server with Docker and NVIDIA's container toolkit on it, and no instances."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import scenario
import testinfra
from scenario import reporting
from testinfra.host import Host

SERVER = "k80-toolkit"
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
        scenario.reboot(SERVER)
        self.wait_for("systemctl is-system-running --wait")


def converge(**variables: object) -> tuple[int, str]:
    """Runs the roles again: exit status, and output in one line."""
    return scenario.play("molecule/toolkit/converge.yml", **variables)


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
