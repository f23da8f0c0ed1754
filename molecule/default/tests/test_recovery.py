"""Faults that a server meets in its life. After each, both instances and the chat come back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SERVER, Instance, Server, asked_all_the_time
from scenario import reboot

# An instance has started when it has loaded its model and generated from it; two do so at once,
# and the machine may have much else to do.
START = 600


@pytest.fixture(autouse=True)
def both_serve_before_and_after(server: Server, ask: Callable[..., str]) -> Iterator[None]:
    server.wait_until_serving(START)
    yield
    server.wait_until_serving(START)
    assert "Paris" in ask()


def replaced(server: Server, instance: Instance, old: str, timeout: float) -> None:
    """Waits until the instance's container is another one than it was."""
    deadline = time.monotonic() + timeout
    while server.container_id(instance) in ("", old):
        server.assert_one_container_per_die()
        assert time.monotonic() < deadline, f"{instance.unit} was not restarted in {timeout:.0f} s"
        time.sleep(1)


def busy_instance(server: Server) -> Instance:
    """The instance that has a request under way."""
    script = (
        "import urllib.request; "
        "print(urllib.request.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
    )
    for _ in range(60):
        for instance in server.instances:
            for line in server.in_container(instance, script).splitlines():
                if line.startswith("vllm:num_requests_running{") and float(line.split()[-1]) > 0:
                    return instance
        time.sleep(0.2)
    pytest.fail("no instance has a request under way")


def test_a_killed_container_comes_back(server: Server, ask: Callable[..., str]) -> None:
    instance = server.instances[0]
    old = server.container_id(instance)
    with asked_all_the_time(ask, streams=[False]) as answers:
        server.run(f"docker kill {instance.unit}")
        replaced(server, instance, old, timeout=60)
    assert len(set(answers)) == 1


def test_a_request_under_way_is_answered_by_the_other_instance(
    server: Server, ask: Callable[..., str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, "Tell me a long story about a river.", max_tokens=96)
        instance = busy_instance(server)
        assert not answer.done()
        server.run(f"docker kill {instance.unit}")
        # No byte of the answer had come back, so the user notices nothing but time.
        assert "river" in answer.result()


def test_the_gateway_answers_while_one_instance_is_down(
    server: Server, ask: Callable[..., str], status_page: Callable[[], str]
) -> None:
    instance = server.instances[1]
    began = int(server.run("date +%s"))
    server.run(f"systemctl stop {instance.unit}")
    assert server.run(f"systemctl show --property Result --value {instance.unit}") == "success"
    said = server.run(f"journalctl --unit {instance.unit} --output cat --since @{began}")
    assert "Application shutdown complete." in said
    stopped = time.monotonic()
    try:
        # The check that met its end may have been reset; the next one says what is the matter.
        while ">down: takes no connection<" not in (page := status_page()):
            assert time.monotonic() - stopped < 120, page
            time.sleep(1)
        assert "1 of 2 instances are ready" in page
        for _ in range(4):
            assert "Paris" in ask()
        assert server.container_id(instance) == ""
        assert server.diagnosis() == {"instance-unit": "fail"}
    finally:
        server.run(f"systemctl start --no-block {instance.unit}")


def test_a_die_with_memory_errors_gets_no_requests_until_it_has_none(
    server: Server, ask: Callable[..., str], status_page: Callable[[], str]
) -> None:
    """The instance on it generates as before: it is the doctor who keeps requests away."""
    errors = "/etc/k80-emulator/dies/0000:05:00.0/ecc.errors.uncorrected.volatile.total"
    old = server.container_id(server.instances[0])
    injected = int(server.run("date +%s"))
    server.run(f"echo 2 > {errors}")
    began = time.monotonic()
    try:
        # The page is made every 15 seconds: one from before may say something else.
        while ">drained: gets no new requests<" not in (page := status_page()):
            assert time.monotonic() - began < 300, page  # it is asked every 30 seconds
            time.sleep(1)
        assert "1 of 2 instances are ready" in page
        for _ in range(4):
            assert "Paris" in ask()
        assert server.diagnosis() == {"ecc-errors": "fail"}
        (row, _) = json.loads(server.run("k80-doctor --status --json"))
        assert (row["instance"], row["state"]) == ("die0", "drained by k80-doctor")
        assert row["why"].startswith("ecc-errors: die 0000:05:00.0 has had 2 double-bit")
        examined = f"vllm-k80-die0-examine --output cat --since @{injected}"
        said = server.run(f"journalctl --unit {examined}")
        assert "die0: gets no new requests. k80-doctor says ecc-errors" in said
    finally:
        server.run(f"rm {errors}")
    server.wait_until_serving(START)
    assert server.container_id(server.instances[0]) == old, "nothing was restarted for it"


def test_a_hung_engine_is_restarted(server: Server, ask: Callable[..., str]) -> None:
    """The web server answers, the engine behind it does not: only generating can tell.

    Whoever's request it has is answered in the end, by the other instance.
    """
    instance = server.instances[0]
    old = server.container_id(instance)
    engine = server.engine(instance)
    began = int(server.run("date +%s"))
    server.run(f"kill -STOP {engine}")
    assert "T" in server.run(f"ps -o stat= {engine}")
    health = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/health'))"
    assert "HTTPResponse" in server.in_container(instance, health)
    with asked_all_the_time(ask, streams=[False]) as answers:
        replaced(server, instance, old, timeout=START)
    assert len(set(answers)) == 1
    said = server.run(f"journalctl --unit {instance.unit}-liveness --output cat --since @{began}")
    assert "failed to generate a token 2 times in a row and is restarted" in said


def test_daemon_reload(server: Server, ask: Callable[..., str]) -> None:
    """systemd applies again what it knows of each container; what it does not know is lost."""
    before = [server.container_id(instance) for instance in server.instances]
    server.run("systemctl daemon-reload")
    for index, instance in enumerate(server.instances):
        for node in (f"nvidia{index}", "nvidiactl", "nvidia-uvm"):
            # ENXIO: the open passed the device cgroup, and there is no driver behind the node.
            told = server.in_container(instance, f"open('/dev/{node}', 'rb')")
            assert "No such device or address" in told
    assert "Paris" in ask()
    assert [server.container_id(instance) for instance in server.instances] == before


def test_the_first_probe_is_not_put_off_by_reloads(server: Server) -> None:
    """Every new unit reloads systemd, several times a minute in the rest of a first run."""
    units, timer = "/run/systemd/system", "k80-first-probe.timer"
    copied = f"/etc/systemd/system/{server.instances[1].unit}-liveness.timer"
    server.run(f"cp {copied} {units}/{timer}")
    server.run(f"printf '[Service]\nExecStart=true\n' > {units}/k80-first-probe.service")
    server.run(f"systemctl daemon-reload && systemctl start {timer}")
    due = []
    try:
        for _ in range(3):
            time.sleep(2)
            server.run("systemctl daemon-reload")
            (row,) = json.loads(server.run(f"systemctl list-timers --output json {timer}"))
            due.append(row["next"] / 1e6)
    finally:
        server.run(f"systemctl stop {timer}; rm {units}/k80-first-probe.*")
        server.run("systemctl daemon-reload")
    assert max(due) - min(due) < 1.5, due


def dockerd(server: Server) -> str:
    return server.run("systemctl show --property MainPID --value docker.service")


def test_docker_restart(server: Server) -> None:
    old = dockerd(server)
    server.run("systemctl restart docker")
    assert dockerd(server) not in ("0", old)


def test_docker_stop_and_start(server: Server) -> None:
    # Its socket would start it again at the first request.
    server.run("systemctl stop docker.socket docker.service")
    # Longer than the instances wait before they try again: they leave it to whoever stopped it.
    time.sleep(12)
    assert not server.host.service("docker").is_running
    server.run("systemctl start docker.service")


def test_docker_killed(server: Server) -> None:
    old = dockerd(server)
    server.run("systemctl kill --signal KILL --kill-whom main docker.service")
    deadline = time.monotonic() + 60
    while dockerd(server) in ("0", old):
        server.assert_one_container_per_die()
        assert time.monotonic() < deadline, "systemd has not started it again"
        time.sleep(0.5)


def test_reboot(server: Server) -> None:
    reboot(SERVER)
    server.wait_until_serving(START)
    assert server.diagnosis() == {}
