"""An image that is on its builder gets to the other servers: in parts, or by way of a registry."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ADDRESSES, GATEWAYS, SERVERS, on
from scenario import ROOT, play, playbook_of

pytestmark = pytest.mark.full
BUILDER, *OTHERS = SERVERS
# Images of a few more parts, so that there is a middle to be interrupted in.
FROM_BUILDER = {"vllm_image_archive": "", "vllm_image_builder": BUILDER, "__vllm_image_part_mb": 5}
PARTS = "/var/lib/vllm-k80/image/parts"
REGISTRY = "127.0.0.1:5000"  # without TLS, which Docker allows to addresses of its own machine


@pytest.fixture
def built(tmp_path: Path) -> Iterator[tuple[Path, str, str]]:
    """A playbook that brings images, and the name and ID of one that its builder has built.

    The name is that of the sources here, the content the stand-in's.
    """
    code, said = play("playbooks/image-tag.yml", vllm_image_archive="")
    assert code == 0, said
    name = said.partition('"vllm_image_reference": "')[2].partition('"')[0]
    assert name.startswith("vllm-k80:"), said
    on(BUILDER, f"docker tag $(docker inspect --format '{{{{.Image}}}}' vllm-k80-die0) {name}")
    playbook = playbook_of("vllm_image", tmp_path)
    yield playbook, name, image(BUILDER, name)
    # The fleet's own image is the current one again, and the other is gone.
    code, said = play(playbook)
    assert code == 0, said
    for server in SERVERS:
        on(server, f"docker image rm {name} || true")


def image(server: str, name: str) -> str:
    return on(server, f"docker image inspect --format '{{{{.Id}}}}' {name} 2> /dev/null || true")


def recap(said: str, server: str, figure: str) -> int:
    """A figure of the last lines of a run, which has these for each host."""
    line = said.rpartition("PLAY RECAP")[2].partition(f"{server} ")[2]
    return int(line.partition(f"{figure}=")[2].split()[0])


def test_parts_are_sent_once(built: tuple[Path, str, str]) -> None:
    """The run is killed while they are copied; the next goes on, and knows a damaged one."""
    playbook, name, wanted = built
    others = ",".join(OTHERS)
    with subprocess.Popen(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={os.environ['MOLECULE_INVENTORY_FILE']}",
            f"--extra-vars={json.dumps(FROM_BUILDER)}",
            playbook,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as ansible:
        while "part-0002" not in on(OTHERS[0], f"ls {PARTS}/* 2> /dev/null || true"):
            assert ansible.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.1)
        os.killpg(ansible.pid, signal.SIGKILL)
    assert image(OTHERS[0], name) == ""
    on(OTHERS[0], f"printf x | dd of=$(ls -d {PARTS}/*)/part-0001 conv=notrunc status=none")

    code, said = play(playbook, f"--limit={others}", **FROM_BUILDER)
    assert code == 0, said
    assert f"ok: [{OTHERS[0]}] => (item=part-0000)" in said
    assert f"changed: [{OTHERS[0]}] => (item=part-0001)" in said
    assert "(item=part-0003)" in said, "the image has too few parts for this test"
    assert f"changed: [{OTHERS[0]} -> {BUILDER}] => (item=part-" not in said, "fetched twice"
    assert {image(server, name) for server in SERVERS} == {wanted}
    assert on(OTHERS[0], f"ls {PARTS} 2> /dev/null || true") == ""

    code, said = play(playbook, **FROM_BUILDER)
    assert code == 0, said
    assert [recap(said, server, "changed") for server in SERVERS] == [0] * len(SERVERS)


@contextmanager
def registry() -> Iterator[None]:
    """A registry on a gateway, which each server reaches by an address of its own."""
    gateway = GATEWAYS[0]
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": "/srv/registry"}},
        "http": {"addr": ":5000"},
    }
    start = "systemd-run --collect --unit test-registry docker-registry serve /srv/registry.yml"
    proxy = "/lib/systemd/systemd-socket-proxyd"
    on(gateway, "apt-get install -qq -y --no-install-recommends docker-registry > /dev/null")
    on(gateway, "systemctl disable --quiet --now docker-registry")
    on(gateway, f"echo {shlex.quote(json.dumps(config))} > /srv/registry.yml; {start}")
    for server in SERVERS:
        on(
            server,
            "systemd-run --collect --unit test-registry"
            f" --socket-property=ListenStream={REGISTRY} {proxy} {ADDRESSES[gateway]}:5000",
        )
    yield
    for server in SERVERS:
        on(server, "systemctl stop test-registry.socket test-registry.service")
    on(gateway, "systemctl stop test-registry; apt-get purge -qq -y docker-registry > /dev/null")
    on(gateway, "rm -rf /srv/registry /srv/registry.yml")


def test_a_registry_is_the_way(built: tuple[Path, str, str]) -> None:
    playbook, name, wanted = built
    by_registry = FROM_BUILDER | {"vllm_image_registry": f"{REGISTRY}/vllm-k80"}
    code, said = play(playbook, **by_registry)
    assert code != 0
    assert f"{BUILDER} cannot push the image to {REGISTRY}/vllm-k80" in said
    with registry():
        code, said = play(playbook, **by_registry)
        assert code == 0, said
    assert {image(server, name) for server in SERVERS} == {wanted}
    for server in SERVERS:
        assert REGISTRY not in on(server, "docker image ls"), "under one name it goes"
    # Nobody asks a registry for what is here.
    code, said = play(playbook, **by_registry)
    assert code == 0, said
    assert [recap(said, server, "changed") for server in SERVERS] == [0] * len(SERVERS)
