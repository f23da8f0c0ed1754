"""A server that reaches its site's mirror and nothing else serves like any other."""

from __future__ import annotations

import json

import yaml
from conftest import HOST_VARS, SERVER, Server

MIRROR = "198.18.37.2"


def test_there_is_no_way_out(server: Server) -> None:
    connect = "timeout 3 bash -c '< /dev/tcp/%s'"
    server.run(connect % f"{MIRROR}/80")
    assert server.host.run(connect % "1.1.1.1/443").rc != 0
    for host in ("deb.debian.org", "pypi.org", "nvidia.github.io"):
        assert server.host.run(f"getent hosts {host}").rc != 0


def test_nothing_was_asked_of_anyone_else(server: Server) -> None:
    sources = server.run(
        "grep -rhoE '(https?|file):[^ ]+' /etc/apt/sources.list /etc/apt/sources.list.d"
    )
    assert {url.split("/")[2] for url in sources.splitlines()} == {MIRROR}, sources
    log = server.run("cat /var/lib/vllm-k80/image/build.log")
    assert "debian.org" not in log
    assert "pypi.org" not in log


def test_it_answers(server: Server) -> None:
    keys = yaml.safe_load(HOST_VARS.read_text())["gateway_api_keys"]
    question = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    script = (
        "import sys, urllib.request as r; print(r.urlopen(r.Request("
        "'http://127.0.0.1:8080/v1/chat/completions', data=sys.argv[1].encode(), headers={"
        "'Content-Type': 'application/json', 'Authorization': 'Bearer ' + sys.argv[2]}"
        "), timeout=120).read().decode())"
    )
    answer = server.run("python3 -c %s %s %s", script, json.dumps(question), keys[0]["key"])
    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"], answer


def test_both_instances_run(server: Server) -> None:
    for name in ("die0", "die1"):
        assert server.run(f"systemctl is-active vllm-k80-{name}") == "active", SERVER
