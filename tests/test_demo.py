"""tools/demo where nothing runs: its secrets, its port, and what it says of what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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
    def run(
        *arguments: str, standard_input: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("Q", "DEMO_PORT")}
        return subprocess.run(
            [sys.executable, demo / "tools" / "demo", *arguments],
            env=clean | {"PATH": f"{demo / 'bin'}:{os.environ['PATH']}"} | environment,
            input=standard_input,
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


@pytest.mark.parametrize("given", ["make", "environment"])
def test_a_question_may_hold_any_character(tmp_path: Path, given: str) -> None:
    make = f"touch {tmp_path}/made"
    question = f"""Costs it $5, $({make}) or $(shell {make})? `{make}` 'a' "b" #"""
    command = ["make", f"--file={ROOT}/Makefile", "--silent", "--eval=show: ; @printenv Q", "show"]
    by_make = given == "make"
    shown = subprocess.run(
        [*command, f"Q={question}"] if by_make else command,
        cwd=ROOT,
        env=os.environ | ({} if by_make else {"Q": question}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{question}\n"
    assert not list(tmp_path.iterdir())


class Gateway(BaseHTTPRequestHandler):
    """Streams an answer; that to "break" ends in its middle, a second question is one too many."""

    def do_GET(self) -> None:
        self.send(200, json.dumps({"object": "list", "data": [{"id": "known", "object": "model"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        if len(asked) > 1:
            self.send(400, json.dumps({"error": {"message": "the context is full", "code": 400}}))
            return
        question = asked[0]["content"]
        if question == "refuse":
            self.send(503, json.dumps({"error": {"message": "no instance is ready"}}))
            return
        events = ["It is ", f"{question}."]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events[: 1 if question == "break" else 2]:
            choice = {"index": 0, "delta": {"content": event}, "finish_reason": None}
            self.chunk(f"data: {json.dumps({'id': 'a', 'choices': [choice]})}\n\n")
        if question != "break":
            self.chunk("data: [DONE]\n\n")
            self.chunk("")
        self.close_connection = True

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway(demo: Path) -> Iterator[None]:
    """What a running demo has: a gateway, a port of it that Docker knows, and a key."""
    keys = {"gateway_api_keys": [{"name": "demo", "key": "sk-demo"}]}
    (demo / "inventories/demo/host_vars/k80-demo/secrets.yml").write_text(json.dumps(keys))
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        (demo / "bin/docker").write_text(f"#!/bin/sh\necho 127.0.0.1:{server.server_port}\n")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield
        server.shutdown()


@pytest.mark.usefixtures("gateway")
def test_one_answer_and_nothing_else(run: Run) -> None:
    asked = run("ask", Q="blue")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "It is blue.\n", "")
    broken = run("ask", Q="break")
    assert broken.stdout == "It is "
    assert_one_sentence(broken, "the answer broke off (", "ask again")
    assert_one_sentence(run("ask", Q="refuse"), "answered 503: no instance is ready.")


@pytest.mark.usefixtures("gateway")
def test_a_chat_goes_on_after_what_fails(run: Run) -> None:
    """One whose history the model has no room for, too."""
    said = run("chat", standard_input="blue\nbreak\nrefuse\n\ngreen\n")
    assert (said.returncode, said.stderr) == (0, "")
    in_order = r"known at .*It is blue\..*It is .*broke off.*answered 503.*It is green\."
    assert re.search(in_order, said.stdout, re.DOTALL), said.stdout


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
