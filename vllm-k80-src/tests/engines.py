"""Engines for tests, each in a process of its own: they keep threads, groups and patched defaults.

The processes are forked from one that has imported vLLM, which takes longer than a tiny model.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(
    ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "transformers"]
)


def _execute(code: str, argument: str, environment: dict[str, str], output: str) -> None:
    """Runs in the process: what it prints, also by other means than Python's, goes to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", argument]
    exec(compile(code, "engine", "exec"), {"__name__": "__main__"})


def said(code: str, arguments: Any, **environment: str) -> str:
    """All that ``code`` prints, given JSON as its argument. Its engines get little memory."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "0.1"} | environment
    with tempfile.NamedTemporaryFile("r", suffix=".log") as output:
        process = _forked.Process(
            target=_execute, args=(code, json.dumps(arguments), environment, output.name)
        )
        process.start()
        process.join()
        text = output.read()
    assert process.exitcode == 0, text[-3000:]
    return text


def results_in(text: str) -> list[Any]:
    """The JSON behind RESULT in each line of what was printed."""
    lines = text.splitlines()
    return [
        json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")
    ]


def results(code: str, arguments: Any, **environment: str) -> list[Any]:
    """The same of what ``code`` prints."""
    return results_in(said(code, arguments, **environment))


def results_together(code: str, arguments: Any, ranks: int) -> list[Any]:
    """The same of so many processes, which find each other as those of torchrun do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    places = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda place: results(code, arguments, **place), places))
    return [result for of_rank in found for result in of_rank]
