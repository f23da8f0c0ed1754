"""A fleet under load: three servers with two dies each behind two gateways."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import report
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
# Everything, each twice, and a report; else what CI has the time for.
RELIABILITY = "RELIABILITY" in os.environ
ROWS = pytest.StashKey[list[str]]()
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
    # Seconds until no gateway gave the instance any more requests, and until all had all again,
    # since the fault or, where it did not end by itself, since its end.
    detected: float | None
    recovered: float

    def row(self, name: str) -> str:
        """Of the table in docs/reliability.md."""
        noticed = "" if self.detected is None else f"{self.detected:.1f} s"
        figures = (self.sent, self.finished, self.failed, self.cut, self.retried)
        cells = [name, *figures, self.other_gateway, f"{self.slowest:.1f} s", noticed]
        return f"| {' | '.join(map(str, cells))} | {self.recovered:.1f} s |"


Ready = list[int | None]


def everything(ready: Ready) -> bool:
    return ready == [INSTANCES] * len(URLS)


def wait_for(load: Load, condition: Callable[[Ready], bool], since: float, seconds: float) -> float:
    """When the gateways' counts of ready instances were as wanted, from some time on."""
    while True:
        for when, ready in list(load.ready):
            if when >= since and condition(ready):
                return when
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
            # From the fault on, where nobody had to end it.
            begun = at if detected and not mend else time.monotonic()
            back = wait_for(load, everything, noticed if noticed and not mend else begun, within)
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
            detected=noticed - at if noticed else None,
            recovered=back - begun,
        )
        name = request.node.name.removeprefix("test_").replace("_", " ")
        request.config.stash[ROWS].append(result.row(name))
        bad = [answer for answer in load.answers if answer.outcome in ("failed", "wrong")]
        assert not bad, f"{bad[:5]} and so on; {result}"
        assert result.sent == result.finished + result.cut
        return result

    yield run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: for make test-reliability, not for CI")
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not RELIABILITY:
        left = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if RELIABILITY and "under_load" in metafunc.fixturenames:
        metafunc.parametrize("under_load", ["first", "second"], indirect=True)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[ROWS]
    terminalreporter.write_line("\n".join(rows))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # Only of a run in which all was as it should be.
    if RELIABILITY and exitstatus == 0:
        report.write(ROOT / "docs" / "reliability.md", session.config.stash[ROWS])
