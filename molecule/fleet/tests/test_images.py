"""An image that its builder has gets to the other servers: in parts, or by way of a registry."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ADDRESSES, GATEWAYS, SERVERS, end, on, started
from scenario import play, playbook_of

pytestmark = pytest.mark.full
BUILDER, *OTHERS = SERVERS
RECEIVER = OTHERS[0]
PARTS = "/var/lib/vllm-k80/image/parts"
REGISTRY = "127.0.0.1:5000"  # without TLS, which Docker allows to addresses of its own machine


@dataclass
class Built:
    """An image that the builder alone has: by name that of the sources here."""

    name: str
    id: str
    playbook: Path
    variables: dict[str, Any]

    def bring(self, **more: object) -> str:
        code, said = play(self.playbook, **self.variables | more)
        assert code == 0, said
        return said

    def there(self) -> list[bool]:
        """Which of the servers have it; none has another of that name."""
        ids = [on(server, f"docker images --quiet --no-trunc {self.name}") for server in SERVERS]
        assert set(ids) <= {"", self.id}
        return [bool(found) for found in ids]

    def assert_nothing_is_left_to_do(self) -> None:
        recap = self.bring().rpartition("PLAY RECAP")[2]
        assert re.findall(r"(\S+) : ok=\d+ changed=(\d+)", recap) == [(s, "0") for s in SERVERS]


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Built]:
    variables = {
        "vllm_image_archive": "",
        "vllm_image_builder": BUILDER,
        "vllm_image_base_image": "vllm-k80-base:debian12",  # as of the inventory
        "vllm_image_cache": str(tmp_path / "cache"),
        "__vllm_image_part_mb": 5,  # more parts, so that there is a middle to be interrupted in
    }
    code, said = play("playbooks/image-tag.yml", **variables)
    named = re.search(r"vllm_image_reference: (vllm-k80:[0-9a-f]+)", said)
    assert code == 0, said
    assert named, said
    name = named[1]
    # The stand-in with another label is an image that no server has had.
    build = """
        base=$(docker inspect --format '{{.Config.Image}}' vllm-k80-die0)
        printf 'FROM %%s\\nLABEL made=%%s\\n' $base $(date +%%s%%N) | docker build --tag %s - >&2
        docker images --quiet --no-trunc %s
    """
    image = Built(
        name, on(BUILDER, build % (name, name)), playbook_of("vllm_image", tmp_path), variables
    )
    assert image.there() == [True, *(False for _ in OTHERS)]
    yield image
    # The fleet's own image is the current one again, and the other is gone.
    code, said = play(image.playbook)
    assert code == 0, said
    for server in SERVERS:
        on(server, f"docker image rm {name} || true")


def test_parts_are_sent_once(built: Built) -> None:
    """The machine that sends them goes away meanwhile; the next run goes on, and sees damage."""
    with started(built.playbook, **built.variables) as ansible:
        while "part-0002" not in on(RECEIVER, f"ls {PARTS}/*/ 2> /dev/null || true"):
            assert ansible.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.1)
        end(ansible, signal.SIGKILL)
    time.sleep(1)
    came = on(RECEIVER, f"ls {PARTS}/*/").split()
    assert built.there() == [True, *(False for _ in OTHERS)]
    on(RECEIVER, f"printf x | dd of=$(ls -d {PARTS}/*)/part-0001 conv=notrunc status=none")
    (cache,) = Path(built.variables["vllm_image_cache"]).glob("sha256-*")
    fetched = {part.name: part.stat().st_mtime_ns for part in cache.glob("part-*")}
    assert set(came) < set(fetched), "all had been sent"

    said = built.bring()
    words = re.findall(rf"(ok|changed): \[{RECEIVER}\] => \(item=(part-\d+)\)", said)
    sent = {part: word for word, part in words}
    assert sent.keys() == fetched.keys()
    for part, word in sent.items():
        assert word == ("ok" if part in came and part != "part-0001" else "changed"), part
    assert fetched == {part.name: part.stat().st_mtime_ns for part in cache.glob("part-*")}
    assert all(built.there())
    assert on(RECEIVER, f"ls {PARTS} 2> /dev/null || true") == ""
    built.assert_nothing_is_left_to_do()


def test_an_archive_of_what_a_builder_has_sent(built: Built, tmp_path: Path) -> None:
    """The same image by both ways, whose parts are not each other's."""
    built.bring()
    archive = tmp_path / "image.tar"
    with archive.open("wb") as file:
        save = ["docker", "exec", BUILDER, "docker", "save", built.name]
        subprocess.run(save, check=True, stdout=file)
    for way in ({"vllm_image_archive": str(archive)}, {}):
        on(RECEIVER, f"docker image rm {built.name}")
        built.bring(**way)
        assert all(built.there())


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
    try:
        on(gateway, "apt-get install -qq -y --no-install-recommends docker-registry > /dev/null")
        on(gateway, "systemctl disable --quiet --now docker-registry")
        on(gateway, f"echo {shlex.quote(json.dumps(config))} > /srv/registry.yml; {start}")
        for server in SERVERS:
            on(
                server,
                "systemd-run --collect --unit test-registry"
                f" --socket-property=ListenStream={REGISTRY}"
                f" /lib/systemd/systemd-socket-proxyd {ADDRESSES[gateway]}:5000",
            )
        yield
    finally:
        for server in SERVERS:
            on(server, "systemctl stop test-registry.socket test-registry.service || true")
        on(gateway, "systemctl stop test-registry || true; rm -rf /srv/registry*")
        on(gateway, "apt-get purge -qq -y docker-registry > /dev/null")


def test_a_registry_is_the_way(built: Built) -> None:
    name = f"{REGISTRY}/vllm-k80"
    by_registry = built.variables | {"vllm_image_registry": name}
    code, said = play(built.playbook, **by_registry)
    assert code != 0
    assert f"{BUILDER} cannot push the image to {name} (vllm_image_registry)" in said
    built.variables = by_registry
    with registry():
        built.bring()
    assert all(built.there())
    for server in SERVERS:
        assert REGISTRY not in on(server, "docker images"), "under one name it goes"
    assert not list(Path(built.variables["vllm_image_cache"]).glob("sha256-*")), "not by parts"
    built.assert_nothing_is_left_to_do()  # nobody asks a registry for what is here
