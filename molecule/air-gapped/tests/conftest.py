"""A server without a way out, which compiles the kernels of its image itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import scenario
import testinfra
from scenario import ROOT, reporting
from testinfra.host import Host

SERVER = "k80-air-gapped"
HOST_VARS = ROOT / ".config" / "molecule" / "host_vars" / f"{SERVER}.yml"

pytest_runtest_makereport = reporting(
    SERVER,
    {
        "compilers": "ls -l /opt/vllm-k80/cuda /opt/vllm-k80/cuda/bin /usr/local/cuda-11.4/bin",
        "apt": "apt-cache policy cuda-nvcc-11-4 cuda-drivers; ls /etc/apt/sources.list.d",
        "units": "systemctl list-units --all --no-pager 'vllm-k80-*' docker haproxy",
        "journal": "journalctl --no-pager -u 'vllm-k80-*' -u docker -u haproxy | tail -n 60",
        "build": "tail -n 40 /var/lib/vllm-k80/image/build.log",
    },
)


class Server:
    def __init__(self, host: Host) -> None:
        self.host = host

    def run(self, command: str, *arguments: str) -> str:
        result = self.host.run(command, *arguments)
        assert result.rc == 0, f"{command}: exit {result.rc}: {result.stderr}{result.stdout}"
        return str(result.stdout.strip())

    def code_in(self, compiler: str, binary: str) -> str:
        """What cuobjdump finds in a fat binary: code (ELF) and text for newer GPUs (PTX)."""
        return self.run(f"{compiler}/bin/cuobjdump --list-elf --list-ptx {binary}")


class Role:
    """A role, run on the server as in a playbook, with some variables otherwise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, role: str, **variables: Any) -> tuple[int, int, str]:
        """Its exit status, how many tasks changed something, and all that it said."""
        return self.play(scenario.playbook_of(role, self.directory), **variables)

    def play(self, playbook: Path, **variables: Any) -> tuple[int, int, str]:
        variables["ansible_connection"] = "community.docker.docker"
        inventory = self.directory / "inventory.json"
        inventory.write_text(json.dumps({"k80_servers": {"hosts": {SERVER: {}}}}))
        code, said = scenario.play(playbook, inventory=inventory, **variables)
        changed = re.search(r"changed=(\d+)", said)
        assert changed, said
        return code, int(changed[1]), said


@pytest.fixture(scope="session")
def host() -> Host:
    return testinfra.get_host(f"docker://{SERVER}")


@pytest.fixture(scope="session")
def server(host: Host) -> Server:
    return Server(host)


@pytest.fixture
def role(tmp_path: Path) -> Role:
    return Role(tmp_path)
