"""What docs/compose.md says: the same image without Ansible, on the same server."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest
from conftest import SERVER, Server
from scenario import ROOT

KEY = "sk-compose"
# What it is run as: a copy of vllm-k80-src, without which compose.dev.yaml is nothing.
SOURCES = "/var/tmp/vllm-k80-src"
ASK = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "model": "SmolLM2-135M-Instruct.Q4_1",
    "max_tokens": 24,
    "temperature": 0,
}


class Compose:
    """docker-compose on the server, in the directory of compose.yaml."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def __call__(self, arguments: str) -> str:
        return self.server.run(f"cd {SOURCES}/docker && docker-compose --no-ansi {arguments}")

    def container(self, service: str) -> str:
        return self(f"ps --quiet {service}")

    def curl(self, arguments: str) -> tuple[int, str]:
        """Status and answer."""
        command = f"curl --silent --max-time 60 --write-out '\\n%{{http_code}}' {arguments}"
        body, _, status = self.server.host.run(command).stdout.rpartition("\n")
        return int(status), body

    def wait(self, *ports: int) -> None:
        """Until /ready says 200 at all these ports."""
        deadline = time.monotonic() + 600
        while any(self.curl(f"http://127.0.0.1:{port}/ready")[0] != 200 for port in ports):
            assert time.monotonic() < deadline, self("logs --tail 60")
            time.sleep(1)


@pytest.fixture(scope="module")
def compose(server: Server) -> Iterator[Compose]:
    """Both containers up, as the page says, in the place of the server's own instances."""
    server.wait_until_serving(600)
    models = "/var/lib/vllm-k80/models"
    model = server.run(f"find {models} -name '*.gguf'")
    image = server.run("docker inspect --format {{.Config.Image}} vllm-k80-die0")
    server.run("apt-get install --quiet --yes --no-install-recommends docker-compose curl")
    server.run(f"rm -rf {SOURCES} && mkdir {SOURCES}")
    for part in ("docker", "vllm_k80"):
        source = ROOT / "vllm-k80-src" / part
        subprocess.run(["docker", "cp", source, f"{SERVER}:{SOURCES}"], check=True)
    values = {
        "VLLM_K80_IMAGE": image,
        "VLLM_K80_DIE0": server.instances[0].uuid,
        "VLLM_K80_DIE1": server.instances[1].uuid,
        "VLLM_K80_MODELS": models,
        "VLLM_K80_MODEL": model.replace(models, "/models"),
        "VLLM_API_KEY": KEY,
    }
    edits = " ".join(f"-e 's|^{name}=.*|{name}={value}|'" for name, value in values.items())
    server.run(
        f"cd {SOURCES}/docker && cp compose.env.example .env && chmod 600 .env"
        f" && sed -i {edits} .env"
        # There is no card in this server, and little memory. The page's reader has both.
        " && printf 'VLLM_K80_REQUIRE_GPU=0\nVLLM_K80_MEMORY=6g\n' >> .env"
    )
    units = " ".join(f"{each.unit}.service {each.unit}-liveness.timer" for each in server.instances)
    server.run(f"systemctl stop {units}")
    compose = Compose(server)
    try:
        compose("up --detach")
        yield compose
    finally:
        server.host.run(f"cd {SOURCES}/docker && docker-compose down; rm -rf {SOURCES}")
        server.run(f"systemctl start --no-block {units}")
        deadline = time.monotonic() + 600
        while '"ready_instances":2' not in compose.curl("http://127.0.0.1:8080/health")[1]:
            assert time.monotonic() < deadline, "the instances have not come back"
            time.sleep(1)


def test_both_answer_with_their_key_only(compose: Compose) -> None:
    compose.wait(8001, 8002)
    for port in (8001, 8002):
        url = f"http://127.0.0.1:{port}/v1"
        assert compose.curl(f"{url}/models")[0] == 401
        key = f"--header 'Authorization: Bearer {KEY}'"
        status, body = compose.curl(f"{url}/models {key}")
        assert (status, json.loads(body)["data"][0]["id"]) == (200, ASK["model"])
        json_header = "--header 'Content-Type: application/json'"
        status, body = compose.curl(
            f"{url}/chat/completions {key} {json_header} --data '{json.dumps(ASK)}'"
        )
        assert status == 200, body
        assert "Paris" in json.loads(body)["choices"][0]["message"]["content"]


def test_each_has_its_die_and_the_walls_of_an_instance(compose: Compose) -> None:
    for own, service in enumerate(("die0", "die1")):
        container = compose.container(service)
        devices = compose.server.run(f"docker exec {container} ls /dev")
        assert f"nvidia{own}\n" in devices
        assert f"nvidia{1 - own}\n" not in devices
        status = compose.server.run(f"docker exec {container} cat /proc/1/status")
        for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
            assert line in status
        refused = compose.server.host.run(f"docker exec {container} touch /opt/x")
        assert "Read-only file system" in refused.stderr


def test_docker_learns_that_it_is_healthy(compose: Compose) -> None:
    form = "{{.State.Health.Status}}"
    deadline = time.monotonic() + 90  # it is asked every 30 seconds
    while True:
        states = {
            compose.server.run(f"docker inspect --format {form} {compose.container(service)}")
            for service in ("die0", "die1")
        }
        if states == {"healthy"}:
            return
        assert time.monotonic() < deadline, states
        time.sleep(2)


def test_the_sources_can_be_tried_without_a_build(compose: Compose) -> None:
    module = f"{SOURCES}/vllm_k80/__init__.py"
    compose.server.run(f"echo 'EDITED = \"yes\"' >> {module}")
    compose("stop die0")
    compose("--file compose.yaml --file compose.dev.yaml up --detach die0")
    compose.wait(8001)
    edited = "import vllm_k80; print(vllm_k80.EDITED)"
    assert compose.server.run(f"docker exec {compose.container('die0')} python3 -c '{edited}'") == (
        "yes"
    )
