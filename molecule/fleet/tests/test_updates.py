"""Updates under load: good ones arrive everywhere, bad ones nowhere; nobody who asks notices."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from conftest import SERVERS, Fault, command_lines, end, on, started
from scenario import ROOT, play

UnderLoad = Callable[..., Fault]
UPDATE = "playbooks/update.yml"
# What each bad image is refused for.
BAD = {
    "no-start": "it did not start",
    "wrong-tokens": "are not reproduced",
    "slow": "as long as when they were recorded",
    "dies": "",
    "selftest": "the self-test",
}


def archive(name: str) -> str:
    """The stand-in of this name, made if it is not there yet."""
    directory = ROOT / ".cache" / "stand-in"
    subprocess.run([ROOT / "molecule/fleet/stand-in/make", directory, name], check=True)
    return str(directory / f"{name}.tar")


def served() -> list[str]:
    """The images of all instances, by name."""
    shown = "docker inspect --format '{{.Config.Image}}' vllm-k80-die0 vllm-k80-die1"
    images = [image for server in SERVERS for image in on(server, shown).split()]
    return [image.rpartition(":")[2] for image in images]


def the_one() -> str:
    images = set(served())
    assert len(images) == 1, images
    return images.pop()


def other_good_one() -> str:
    return "good" if the_one() == "better" else "better"


def test_a_good_update(under_load: UnderLoad) -> None:
    wanted = other_good_one()
    image = archive(wanted)

    def update() -> None:
        rc, said = play(UPDATE, vllm_image_archive=image, site_soak=0)
        assert rc == 0, said

    with command_lines() as seen:
        assert under_load(update).cut == 0
    assert the_one() == wanted
    assert any("k80-instance" in line for line in seen)
    assert not [line for line in seen if "molecule-only-" in line], "a key in ps"


@pytest.mark.parametrize(
    "name",
    ["wrong-tokens", *(pytest.param(n, marks=pytest.mark.full) for n in BAD if n[0] != "w")],
)
def test_a_bad_update_goes_back(under_load: UnderLoad, name: str) -> None:
    before, image = the_one(), archive(name)
    others = [on(server, "docker ps --quiet --no-trunc") for server in SERVERS[1:]]
    said = ""

    def update() -> None:
        nonlocal said
        # Longer than the image that dies lives.
        soak = 70 if name == "dies" else 0
        rc, said = play(UPDATE, vllm_image_archive=image, site_soak=soak)
        assert rc != 0, said

    assert under_load(update).cut == 0
    assert f"{SERVERS[0]}: instance die0: " in said
    assert BAD[name] in said
    assert the_one() == before
    # Those behind the first server were not even restarted.
    assert [on(server, "docker ps --quiet --no-trunc") for server in SERVERS[1:]] == others


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_update_goes_on(under_load: UnderLoad, how: signal.Signals) -> None:
    wanted = other_good_one()
    variables = {"vllm_image_archive": archive(wanted), "site_soak": 0}

    def interrupted() -> None:
        with started(UPDATE, **variables) as ansible:
            # In the middle of a change: the first server has an instance drained.
            while not on(SERVERS[0], "cat /var/lib/vllm-k80/instances/*/drained || true"):
                assert ansible.poll() is None, "the update ended before it could be interrupted"
                time.sleep(0.2)
            end(ansible, how)
        rc, said = play(UPDATE, **variables)
        assert rc == 0, said

    assert under_load(interrupted).cut == 0
    assert the_one() == wanted
