"""Changes while requests come, on the real engine; scenario fleet has more, on a stand-in."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import openai
import pytest
from conftest import Server, asked_all_the_time
from scenario import play

pytestmark = pytest.mark.operations

UPDATE = "playbooks/update.yml"
# The demo's arguments, and what is changed.
ARGUMENTS = "vllm_instance_extra_args"


def containers(server: Server) -> list[str]:
    return [server.container_id(instance) for instance in server.instances]


def test_an_update_loses_no_request(server: Server, ask: Callable[..., str]) -> None:
    before = containers(server)
    image = server.run(f"docker inspect --format {{{{.Config.Image}}}} {before[0]}")
    for tag in ("old", "older"):
        server.run(f"tar --create --files-from /dev/null | docker import - vllm-k80:{tag}")
    # As if the older of both had been served before this one, and were the way back.
    previous = r's|"previous": ".*"|"previous": "vllm-k80:older"|'
    server.run(f"sed --in-place '{previous}' /var/lib/vllm-k80/image/image.json")
    with asked_all_the_time(ask) as answers:
        rc, said = play(UPDATE, site_soak=0, **{ARGUMENTS: ["--max-num-seqs", "8"]})
        assert rc == 0, said
    kept = server.run("docker image ls --format '{{.Repository}}:{{.Tag}}' vllm-k80").split()
    assert set(kept) == {image, "vllm-k80:older"}  # as many as vllm_image_keep says
    assert not set(before) & set(containers(server))
    for instance in server.instances:
        assert "--max-num-seqs 8" in server.run(f"systemctl cat {instance.unit}")
    assert len(answers) > 4
    assert len(set(answers)) == 1  # the same tokens from all of them
    assert server.diagnosis() == {}


def test_an_update_that_fails_goes_back_and_stops(server: Server, ask: Callable[..., str]) -> None:
    first, second = containers(server)
    with asked_all_the_time(ask) as answers:
        rc, said = play(UPDATE, site_soak=0, **{ARGUMENTS: ["--no-such-flag"]})
        assert rc != 0
    assert "instance die0: it did not start." in said
    assert "unrecognized arguments: --no-such-flag" in said
    assert "What was proven before, its image, unit and environment, serves again." in said
    now = containers(server)
    assert now[0] not in ("", first)
    assert now[1] == second  # not reached
    assert len(set(answers)) == 1
    for instance in server.instances:
        assert "--max-num-seqs 8" in server.run(f"systemctl cat {instance.unit}")


def wait_until_known(client: openai.OpenAI, known: bool) -> None:
    """Until the gateway takes the client's key, or refuses it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            client.models.list()
            found = True
        except openai.AuthenticationError:
            found = False
        if found == known:
            return
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_rollback_brings_back_what_was_before(
    server: Server, ask: Callable[..., str], client: openai.OpenAI
) -> None:
    # As a run that was cut off leaves it: a user's key is gone from the file, and HAProxy has it.
    keys, key = "/etc/haproxy/vllm-k80-keys.map", "sk-of-a-user-who-left"
    left = client.with_options(api_key=key)
    digest = hashlib.sha256(key.encode()).hexdigest()
    server.run(f"echo {digest} left 0 0 >> {keys} && systemctl reload haproxy")
    wait_until_known(left, True)
    server.run(f"sed --in-place '$d' {keys}")
    with asked_all_the_time(ask):
        server.run("k80-instance rollback die1")
    assert "--max-num-seqs" not in server.run(f"systemctl cat {server.instances[1].unit}")
    # The inventory says so too: only the first instance is changed.
    second = server.container_id(server.instances[1])
    rc, said = play("site.yml", "-vvv")
    assert rc == 0, said
    # However much it tells, no key of the scenario.
    assert "EXEC" in said
    assert "molecule-only-" not in said
    assert server.container_id(server.instances[1]) == second
    assert "--max-num-seqs" not in server.run(f"systemctl cat {server.instances[0].unit}")
    wait_until_known(left, False)
