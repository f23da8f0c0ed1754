"""tools/demo where nothing runs: its secrets, its port, and what it says of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the tool with an inventory of its own, and a Docker that has no server."""
    for name in ("tools", "inventories/demo/host_vars/k80-demo", "bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "demo", tmp_path / "tools")
    for name, script in (("tools/start-docker", "exit 0"), ("bin/docker", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def run(demo: Path) -> Run:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("Q", "DEMO_PORT")}
        return subprocess.run(
            [sys.executable, demo / "tools" / "demo", *arguments],
            env=clean | {"PATH": f"{demo / 'bin'}:{os.environ['PATH']}"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1
    assert result.stderr.startswith("demo: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_without_a_server_it_says_how_to_start_one(run: Run, command: str) -> None:
    assert_one_sentence(run(command, Q="Why?"), "make demo")


def test_a_question_is_needed(run: Run) -> None:
    assert_one_sentence(run("ask"), "make ask Q=")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status_without_a_server(run: Run, options: list[str]) -> None:
    assert_one_sentence(run("status", *options), "make demo")


def test_status_as_json_is_nothing_but_json(run: Run, demo: Path) -> None:
    """The playbook is tested elsewhere; here one that fails, and one that writes a row."""
    (demo / "bin/docker").write_text("#!/bin/sh\necho running\n")
    result = run("status", "--json")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("demo: playbooks/status.yml failed")
    (demo / "playbooks").mkdir()
    shutil.copy(ROOT / "ansible.cfg", demo)
    write = {"content": "[]\n", "dest": "{{ status_json }}", "mode": "0600"}
    tasks = [{"ansible.builtin.copy": write, "delegate_to": "localhost"}]
    plays = [{"hosts": "k80-demo", "gather_facts": False, "tasks": tasks}]
    (demo / "playbooks/status.yml").write_text(json.dumps(plays))
    (demo / "inventories/demo/hosts.yml").write_text("all: {hosts: {k80-demo: }}\n")
    result = run("status", "--json")
    assert (result.returncode, json.loads(result.stdout)) == (0, []), result.stderr


def test_a_busy_port_is_named(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert_one_sentence(run("up", DEMO_PORT=str(port)), f"port {port}", "DEMO_PORT=")


@pytest.mark.parametrize("port", ["http", "70000"])
def test_what_is_no_port_is_refused(run: Run, port: str) -> None:
    assert_one_sentence(run("up", DEMO_PORT=port), f"DEMO_PORT={port} is not a port")


def test_secrets_are_made_once_and_for_the_owner_alone(run: Run, demo: Path) -> None:
    path = demo / "inventories/demo/host_vars/k80-demo/secrets.yml"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    # There is no playbook to run in the copy: it ends there, after the secrets.
    assert run("up", DEMO_PORT=port).returncode == 1
    assert path.stat().st_mode & 0o777 == 0o600
    made = yaml.safe_load(path.read_text())
    keys = [made["gateway_api_keys"][0]["key"], made["vllm_instance_api_key"]]
    assert len(set(keys)) == 2
    assert min(map(len, keys)) >= 40
    assert run("up", DEMO_PORT=port).returncode == 1
    assert yaml.safe_load(path.read_text()) == made
