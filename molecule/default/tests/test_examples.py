"""The examples of docs/examples.md, as a user runs them: through the gateway, with a user's key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from scenario import ROOT

Run = Callable[..., str]


@pytest.fixture(scope="module")
def environment(gateway_url: str, gateway_key: str) -> dict[str, str]:
    # Offline: no example may need a hub.
    return os.environ | {
        "OPENAI_BASE_URL": f"{gateway_url}/v1",
        "OPENAI_API_KEY": gateway_key,
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def run(environment: dict[str, str]) -> Run:
    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_chat(run: Run) -> None:
    answer = json.loads(run("examples/chat.sh"))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_chat_without_a_key_says_what_is_wrong(environment: dict[str, str]) -> None:
    without = {name: value for name, value in environment.items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(["examples/chat.sh"], cwd=ROOT, env=without, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert b"Give the key" in done.stderr


def test_a_stream_comes_piece_by_piece(environment: dict[str, str]) -> None:
    command = [sys.executable, "examples/stream.py", "What is the capital of France?"]
    pieces, times = [], []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 4096):
            pieces.append(piece)
            times.append(time.monotonic())
    assert process.returncode == 0
    assert "Paris" in b"".join(pieces).decode()
    assert len(pieces) > 3
    assert times[-1] - times[0] > 0.05


def test_structured_output_keeps_to_the_schema(run: Run) -> None:
    ticket = json.loads(run(sys.executable, "examples/structured.py"))
    assert list(ticket) == ["component", "server", "urgent"]
    assert ticket["component"] in ("cooling", "power", "network", "software")
    assert type(ticket["server"]) is int
    assert 1 <= ticket["server"] <= 99
    assert type(ticket["urgent"]) is bool


def test_retrieval_finds_the_passage_and_answers_from_it(run: Run) -> None:
    question = "Which power cable does a board need?"
    found, _, answer = run(sys.executable, "examples/retrieval.py", question).rpartition("\n\n")
    assert found.startswith("docs/hardware.md:\n")
    assert "EPS 8-pin" in found
    assert answer.strip()
