"""Tasks of a role on hosts that are this machine, each with programs of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def reported(
    directory: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """How ansible-playbook ends in that directory, and its report, with the project's roles."""
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), *arguments],
        env=os.environ
        | {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    # The project's callbacks print times behind the JSON.
    report, _ = json.JSONDecoder().raw_decode(done.stdout)
    return done, report


def tasks_of(
    role: str,
    tasks_from: str,
    hosts: dict[str, dict[str, Any]],
    directory: Path,
    *arguments: str,
) -> list[dict[str, Any]]:
    """The tasks, as reported, of a role on hosts that have programs of their own.

    Of a host's variables `programs` has by name what each prints, and how it ends.
    """
    for name, variables in hosts.items():
        programs = directory / name
        programs.mkdir()
        for program, (said, code) in variables.pop("programs").items():
            text = f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n"
            (programs / program).write_text(text)
            (programs / program).chmod(0o755)
        variables["programs"] = f"{programs}:{os.environ['PATH']}"
    play = {
        "hosts": "all",
        "gather_facts": "{{ facts | default(false) }}",
        "vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
        "environment": {"PATH": "{{ programs }}"},
        "tasks": [{"ansible.builtin.include_role": {"name": role, "tasks_from": tasks_from}}],
    }
    (directory / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts}}))
    (directory / "play.yml").write_text(json.dumps([play]))
    _, report = reported(directory, "-i", "hosts.yml", "play.yml", *arguments)
    tasks: list[dict[str, Any]] = report["plays"][0]["tasks"]
    return tasks


def failures_of(
    role: str, tasks_from: str, hosts: dict[str, dict[str, Any]], directory: Path
) -> dict[str, str]:
    """What those hosts on which a task fails say, in one line (hosts: see tasks_of)."""
    return {
        host: " ".join(result["msg"].split())
        for task in tasks_of(role, tasks_from, hosts, directory)
        for host, result in task["hosts"].items()
        if result.get("failed")
    }
