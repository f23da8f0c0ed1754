"""A fleet under load: three servers with two dies each behind two gateways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import testinfra
import yaml
from load import Load
from scenario import ROOT

SERVERS = ["k80-fleet-1", "k80-fleet-2", "k80-fleet-3"]
GATEWAYS = ["k80-fleet-gateway-1", "k80-fleet-gateway-2"]
# prepare.yml gives them these addresses.
ADDRESSES = {name: f"198.18.38.{10 + index}" for index, name in enumerate(SERVERS + GATEWAYS)}
URLS = [f"http://{ADDRESSES[name]}:8080" for name in GATEWAYS]
INSTANCES = 2 * len(SERVERS)
VARIABLES = ROOT / "molecule" / "fleet" / "inventory" / "group_vars" / "k80_fleet.yml"


def on(host: str, command: str) -> str:
    """Runs a shell command on a host, which must succeed."""
    result = testinfra.get_host(f"docker://{host}").run("bash -c %s", command)
    assert result.rc == 0, f"{host}: {command}: {result.stderr}{result.stdout}"
    return str(result.stdout.strip())


@dataclass
class Fault:
    """What the load met, in figures."""

    sent: int
    finished: int
    failed: int
    wrong: int
    cut: int
    retried: int
    other_gateway: int
    slowest: float
    # Seconds until no gateway had the instance ready any more, and until all had all.
    detected: float | None
    recovered: float


Ready = list[int | None]


def everything(ready: Ready) -> bool:
    return ready == [INSTANCES] * len(URLS)


def wait_for(load: Load, condition: Callable[[Ready], bool], since: float, seconds: float) -> float:
    """Seconds from `since` until the gateways' counts of ready instances are as wanted."""
    seen = 0
    while True:
        for seen, (when, ready) in enumerate(load.ready[seen:], start=seen):
            if when >= since and condition(ready):
                return when - since
        last = load.ready[-1:]
        assert time.monotonic() - since < seconds, f"not within {seconds} s; the gateways: {last}"
        time.sleep(0.1)


def retried(since: str) -> int:
    """How many requests the gateways have sent again, by their logs."""
    count = (
        "journalctl --unit haproxy --output cat --since @{} | grep -cE 'retries=\\+?[1-9]' || true"
    )
    return sum(int(on(gateway, count.format(since))) for gateway in GATEWAYS)


def load_on_fleet() -> Load:
    key = yaml.safe_load(VARIABLES.read_text())["gateway_api_keys"][0]["key"]
    return Load(URLS, key)


@pytest.fixture
def under_load(request: pytest.FixtureRequest) -> Iterator[Callable[..., Fault]]:
    """Does something to the fleet while it is asked, and tells what that did to who asked."""

    def run(
        fault: Callable[[], object],
        *,
        detected: Callable[[Ready], bool] | None = None,
        mend: Callable[[], object] | None = None,
        within: float = 90,
    ) -> Fault:
        began = f"{time.time():.0f}"
        with load_on_fleet() as load:
            wait_for(load, everything, time.monotonic(), 60)
            time.sleep(3)
            at = time.monotonic()
            fault()
            noticed = wait_for(load, detected, at, within) if detected else None
            if mend:
                mend()
            at_last = time.monotonic() if mend else at + (noticed or 0)
            back = wait_for(load, everything, at_last, within)
            recovered = back if mend else at_last - at + back
            time.sleep(3)
        counts = load.count()
        result = Fault(
            sent=len(load.answers),
            finished=counts["finished"],
            failed=counts["failed"],
            wrong=counts["wrong"],
            cut=counts["cut"],
            retried=retried(began),
            other_gateway=sum(answer.other_gateway for answer in load.answers),
            slowest=max(answer.seconds for answer in load.answers),
            detected=noticed,
            recovered=recovered,
        )
        print(request.node.name, result)
        bad = [answer for answer in load.answers if answer.outcome in ("failed", "wrong")]
        assert not bad, f"{bad[:5]} and so on; {result}"
        assert result.sent == result.finished + result.cut
        return result

    yield run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: for make test-reliability, not for CI")
