"""Engines for tests, in a process of their own: they keep threads, groups and patched defaults."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run(*command: str, **environment: str) -> str:
    """What a Python process with these arguments prints. Its engines get little memory."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "0.1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(code: str, arguments: Any, **environment: str) -> list[Any]:
    """The JSON behind RESULT in each line that ``code`` prints, given JSON as its argument."""
    lines = run("-c", code, json.dumps(arguments), **environment).splitlines()
    return [
        json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")
    ]


def results_together(code: str, arguments: Any, ranks: int) -> list[Any]:
    """The same of so many processes, which find each other as those of torchrun do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    places = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda place: results(code, arguments, **place), places))
    return [result for of_rank in found for result in of_rank]
