"""What breaks, breaks under load: no request fails that had not received a byte, all comes back."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial

import pytest
from conftest import (
    ADDRESSES,
    CONTAINERS,
    ECC_ERRORS,
    GATEWAYS,
    INSTANCES,
    SERVERS,
    Fault,
    Ready,
    on,
)

UnderLoad = Callable[..., Fault]
STREAMS = 2 * INSTANCES
STATE = "/var/lib/vllm-k80/instances"


def fewer(by: int) -> Callable[[Ready], bool]:
    """All gateways are without so many instances."""
    return lambda ready: all(count is not None and count <= INSTANCES - by for count in ready)


def one_is_away(ready: Ready) -> bool:
    """A gateway does not say."""
    return None in ready


def docker(*arguments: str) -> None:
    subprocess.run(["docker", *arguments], check=True, capture_output=True)


def test_an_instance_is_killed(under_load: UnderLoad) -> None:
    under_load(lambda: on(SERVERS[0], "docker kill vllm-k80-die0"), detected=fewer(1))


def test_an_engine_hangs(under_load: UnderLoad) -> None:
    """Its web server says 200 to /health, as vLLM's does."""
    under_load(lambda: on(SERVERS[1], f"touch {STATE}/die1/hang"), detected=fewer(1))


@pytest.mark.full
def test_dockerd_is_killed(under_load: UnderLoad) -> None:
    kill = "systemctl kill --signal KILL --kill-whom main docker.service"
    under_load(lambda: on(SERVERS[0], kill), detected=fewer(2))


@pytest.mark.full
def test_a_host_is_powered_off(under_load: UnderLoad) -> None:
    """In mid-stream: of so many streams, some are of its instances."""

    def power_on() -> None:
        time.sleep(30)  # by then all that waited for it must have gone elsewhere
        docker("start", SERVERS[1])

    power_off = partial(docker, "kill", SERVERS[1])
    met = under_load(power_off, detected=fewer(2), mend=power_on, streams=STREAMS)
    # The others' went on.
    assert 0 < met.cut < STREAMS


@pytest.mark.full
def test_a_host_is_rebooted(under_load: UnderLoad) -> None:
    under_load(lambda: on(SERVERS[2], "systemctl reboot --no-block"), detected=fewer(2), within=120)


@pytest.mark.full
@pytest.mark.parametrize("how", ["its node is gone", "nvidia-smi fails"])
def test_a_die_is_lost(under_load: UnderLoad, how: str) -> None:
    """And so is the engine that had it."""
    lost = "/etc/k80-emulator/dies/0000:06:00.0/lost"
    lose = f"touch {lost}; docker kill vllm-k80-die1"
    find = f"rm {lost}; nvidia-modprobe -c 1"
    if how == "its node is gone":
        lose = f"rm /dev/nvidia1; {lose}"

    def mend() -> None:
        time.sleep(10)
        on(SERVERS[0], find)

    under_load(lambda: on(SERVERS[0], lose), detected=fewer(1), mend=mend)


@pytest.mark.full
def test_a_die_has_memory_errors(under_load: UnderLoad) -> None:
    """Its instance goes on generating: k80-doctor has it drained, and let in again."""
    server = SERVERS[1]
    before = on(server, CONTAINERS)

    def mend() -> None:
        time.sleep(10)
        assert "drained by k80-doctor" in on(server, "k80-instance list")
        on(server, f"rm {ECC_ERRORS}")

    try:
        ill = partial(on, server, f"echo 2 > {ECC_ERRORS}")
        assert under_load(ill, detected=fewer(1), mend=mend).cut == 0
    finally:
        on(server, f"rm --force {ECC_ERRORS}")
    assert on(server, CONTAINERS) == before


@pytest.mark.full
def test_a_disk_is_full(under_load: UnderLoad) -> None:
    """Docker has no room for a container, nor has what is ours, just when one has to be made."""
    places = ("/var/lib/docker/containers", "/var/lib/vllm-k80")
    moved = "; ".join(
        f"cp --archive --parents {place} /run/full; mount --bind /run/full{place} {place}"
        for place in places
    )
    fill = f"""set -e
        mkdir -p /run/full
        kilobytes=$(du --summarize --total --block-size=1K {" ".join(places)} | tail -n1 | cut -f1)
        mount -t tmpfs -o size=$((kilobytes + 1024))k full /run/full
        {moved}
        ! dd if=/dev/zero of=/run/full/filling bs=4k status=none
        docker kill vllm-k80-die0
    """

    def mend() -> None:
        time.sleep(10)
        on(SERVERS[2], "rm /run/full/filling")

    under_load(lambda: on(SERVERS[2], fill), detected=fewer(1), mend=mend)
    # Docker holds mounts in there for as long as it runs.
    on(
        SERVERS[2],
        f"systemctl stop docker.socket docker && umount {' '.join(places)} /run/full"
        " && systemctl start docker",
    )


@pytest.mark.full
def test_a_gateway_reloads(under_load: UnderLoad) -> None:
    def reload() -> None:
        for _ in range(3):
            on(GATEWAYS[0], "systemctl reload haproxy")
            time.sleep(2)

    assert under_load(reload).cut == 0


@pytest.mark.full
def test_a_gateway_is_lost(under_load: UnderLoad) -> None:
    def power_on() -> None:
        time.sleep(10)
        docker("start", GATEWAYS[1])

    power_off = partial(docker, "kill", GATEWAYS[1])
    met = under_load(
        power_off, detected=one_is_away, mend=power_on, streams=STREAMS, gateway_lost=True
    )
    assert 0 < met.cut < STREAMS


@pytest.mark.full
def test_the_network_to_a_host_is_cut(under_load: UnderLoad) -> None:
    gateways = ", ".join(ADDRESSES[name] for name in GATEWAYS)
    cut = f"""nft -f - <<'.'
        table inet cut {{
            chain in {{
                type filter hook prerouting priority -400
                ip saddr {{ {gateways} }} drop
            }}
            chain out {{
                type filter hook postrouting priority 400
                ip daddr {{ {gateways} }} drop
            }}
        }}
    """

    def mend() -> None:
        time.sleep(40)
        on(SERVERS[0], "nft delete table inet cut")

    under_load(lambda: on(SERVERS[0], cut), detected=fewer(2), mend=mend)


@pytest.mark.full
def test_the_network_to_a_host_is_slow(under_load: UnderLoad) -> None:
    """It still has all its packets, at 50 kbit/s."""
    device = "$(ip -o -4 route show default | sed 's/.* dev \\([^ ]*\\).*/\\1/')"

    def slow() -> None:
        on(SERVERS[1], f"tc qdisc add dev {device} root tbf rate 50kbit burst 3k latency 5s")
        time.sleep(30)
        on(SERVERS[1], f"tc qdisc del dev {device} root")

    assert under_load(slow).cut == 0


def test_instances_are_for_gateways_only() -> None:
    """Tried from each other server; the gateways reach them, or nothing of the above would."""
    for server in SERVERS:
        for port in (8001, 8002):
            reach = (
                "import socket; "
                f"socket.create_connection(('{ADDRESSES[server]}', {port}), timeout=2).close()"
            )
            for gateway in GATEWAYS:
                on(gateway, f'python3 -c "{reach}"')
            for other in SERVERS:
                if other != server:
                    told = on(other, f'python3 -c "{reach}" 2>&1 || true')
                    assert "timed out" in told
