"""A fleet under load: servers with two dies each behind gateways.

Scenario fleet has all of these tests, scenario fleet-short those that are not marked `full`, on
fewer servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import pytest
import report
import testinfra
import yaml
from load import Load
from scenario import ROOT

INVENTORY_FILE = Path(os.environ["MOLECULE_INVENTORY_FILE"])
INVENTORY = yaml.safe_load(INVENTORY_FILE.read_text())
SERVERS, GATEWAYS = (list(INVENTORY[group]["hosts"]) for group in ("k80_servers", "k80_gateways"))
INSTANCES = 2 * len(SERVERS)
# Each twice, and a report.
RELIABILITY = "RELIABILITY" in os.environ
# What was measured on these servers, in all runs of these tests since they were made.
MEASURED = INVENTORY_FILE.parents[1] / "reliability.json"
ROWS = pytest.StashKey[list[report.Row]]()
ROW = pytest.StashKey[report.Row]()
# Of any change of these, an instance makes a new container.
CONTAINERS = "docker ps --no-trunc --quiet"
ECC_ERRORS = "/etc/k80-emulator/dies/0000:05:00.0/ecc.errors.uncorrected.volatile.total"
VARIABLES = ROOT / "molecule" / "fleet" / "inventory" / "group_vars" / "k80_fleet.yml"


def address(server: str) -> str:
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    command = ["docker", "inspect", "--format", form, server]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


ADDRESSES = {name: address(name) for name in SERVERS + GATEWAYS}
URLS = [f"http://{ADDRESSES[name]}:8080" for name in GATEWAYS]


def on(host: str, command: str) -> str:
    """Runs a shell command on a host, which must succeed."""
    result = testinfra.get_host(f"docker://{host}").run("bash -c %s", command)
    assert result.rc == 0, f"{host}: {command}: {result.stderr}{result.stdout}"
    return str(result.stdout.strip())


@contextmanager
def started(playbook: str | Path, **variables: object) -> Iterator[subprocess.Popen[bytes]]:
    """A playbook that runs, in a session of its own."""
    with subprocess.Popen(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={INVENTORY_FILE}",
            f"--extra-vars={json.dumps(variables)}",
            playbook,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as ansible:
        yield ansible


def end(ansible: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Ends it as a key of the terminal does (SIGINT), or with its machine (SIGKILL).

    Its workers have sessions of their own, which no terminal knows.
    """
    running = [ansible.pid]
    for pid in running:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            running += map(int, children.read_text().split())
    for pid in running if how == signal.SIGKILL else []:
        with suppress(ProcessLookupError):
            os.kill(pid, how)
    with suppress(ProcessLookupError):
        os.killpg(ansible.pid, how)


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """All that is seen meanwhile, here and on the servers, whose processes are this machine's."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(file.read_text(errors="replace"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


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


KEY = yaml.safe_load(VARIABLES.read_text())["gateway_api_keys"][0]["key"]  # a user's


def load_on_fleet() -> Load:
    return Load(URLS, KEY)


@pytest.fixture
def under_load(request: pytest.FixtureRequest) -> Iterator[Callable[..., Fault]]:
    """Does something to the fleet while it is asked, and tells what that did to who asked.

    So many long streams are on their way when it is done.
    """

    def run(
        fault: Callable[[], object],
        *,
        detected: Callable[[Ready], bool] | None = None,
        mend: Callable[[], object] | None = None,
        within: float = 90,
        streams: int = 0,
        gateway_lost: bool = False,
    ) -> Fault:
        began = f"{time.time():.0f}"
        with load_on_fleet() as load:
            wait_for(load, everything, time.monotonic(), 60)
            time.sleep(3)
            load.open_streams(streams)
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
        name, _, case = request.node.name.removeprefix("test_").rstrip("]").partition("[")
        case = case.removeprefix(getattr(request, "param", "")).lstrip("-")
        title = name.replace("_", " ") + (f": {case}" if case else "")
        row = {"name": title, "on": date.today().isoformat(), "machine": report.machine()}
        request.node.stash[ROW] = row | asdict(result)
        bad = [answer for answer in load.answers if answer.outcome in ("failed", "wrong")]
        assert not bad, f"{bad[:5]} and so on; {result}"
        assert result.sent == result.finished + result.cut
        assert gateway_lost or not result.other_gateway, "a gateway took no connection"
        return result

    yield run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: for scenario fleet, not for fleet-short")
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if RELIABILITY and "under_load" in metafunc.fixturenames:
        metafunc.parametrize("under_load", ["first", "second"], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Keeps what a test measured, and whether all was as it should be."""
    passed = False
    try:
        yield
        passed = True
    finally:
        if row := item.stash.get(ROW, None):
            item.config.stash[ROWS].append(row | {"passed": passed})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.write_line("\n".join(report.table(rows)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[ROWS]
    if RELIABILITY and rows:
        rows = (json.loads(MEASURED.read_text()) if MEASURED.exists() else []) + rows
        MEASURED.write_text(json.dumps(rows))
        report.write(ROOT / "docs" / "reliability.md", rows)
