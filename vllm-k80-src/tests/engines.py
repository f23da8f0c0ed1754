"""Engines for tests, in a process of their own: they keep threads, groups and patched defaults."""

import json
import os
import subprocess
import sys
from typing import Any


def run(*command: str) -> str:
    """What a Python process with these arguments prints. Its engines get little memory."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "0.1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(code: str, arguments: Any) -> list[Any]:
    """The JSON behind RESULT in each line that ``code`` prints, given JSON as its argument."""
    lines = run("-c", code, json.dumps(arguments)).splitlines()
    return [
        json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")
    ]
