"""Servers for tests: `vllm-k80 serve` on this host, as a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

KEY = "sk-test-0123456789abcdef"
MODEL = "smollm2"


@dataclass
class Server:
    url: str
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def call(
        self, path: str, payload: Any = None, key: str | None = KEY, **options: Any
    ) -> requests.Response:
        """POST the payload as JSON, or GET without one. A server that hangs fails the test."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        method = "GET" if payload is None else "POST"
        return requests.request(
            method, self.url + path, json=payload, headers=headers, timeout=60, **options
        )

    def post(self, path: str, **payload: Any) -> dict[str, Any]:
        response = self.call(path, {"model": MODEL, **payload})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, prompt: Any, tokens: int) -> Iterator[str]:
        """The events of a streamed completion of so many tokens, as they come."""
        payload = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        answer = self.call("/v1/completions", payload | {"stream": True}, stream=True)
        assert answer.status_code == 200, answer.text
        for line in answer.iter_lines():
            if line:
                yield line.decode().removeprefix("data: ")


@contextmanager
def serving(model: Path, folder: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server of this model that answers /health; ended if the test has not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "VLLM_API_KEY": KEY,
        "VLLM_K80_PROOF": str(folder / "proof.json"),
        "VLLM_NO_USAGE_STATS": "1",
        **environment,
    }
    arguments = ["--host", "127.0.0.1", "--port", port, "--served-model-name", MODEL, *flags]
    log = folder / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_k80.cli", "serve", str(model), *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    started = Server(f"http://127.0.0.1:{port}", log, environment, process)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if started.call("/health").status_code == 200:
                    break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
