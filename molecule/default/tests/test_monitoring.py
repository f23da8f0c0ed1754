"""What Prometheus reads of the server, and whether alerts and dashboards speak of what is there."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from conftest import Server
from scenario import ROOT

pytestmark = pytest.mark.operations

ROLE = ROOT / "roles/monitoring"
RULES = [
    rule
    for group in yaml.safe_load((ROLE / "files/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
DIE = "/etc/k80-emulator/dies/0000:06:00.0"
# What the server has no reason to show: it serves without TLS.
ABSENT = {"probe_ssl_earliest_cert_expiry"}
# Metrics in a rule's expression, each with the labels that it is chosen by.
SELECTOR = re.compile(r"\b(?:up\b|(?:k80|node|haproxy|probe)_\w+|vllm:\w+)(?:\{[^}]*\})?")
Samples = list[dict[str, Any]]


def panels() -> list[tuple[str, str]]:
    """Title and query of each panel, of all dies, hosts and models."""
    return [
        (f"{path.stem}: {panel['title']}", re.sub(r"\$(host|die|model)\b", ".*", target["expr"]))
        for path in sorted((ROLE / "files/grafana").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


def get(server: Server, url: str) -> Any:
    """JSON of an address on the server's loopback."""
    script = f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())"
    result = server.host.run("python3 -c %s", script)
    assert result.rc == 0, f"{url}: {result.stderr}"
    return json.loads(result.stdout)


def ask(server: Server, query: str) -> Samples:
    url = f"http://127.0.0.1:9090/api/v1/query?{urlencode({'query': query})}"
    found: Samples = get(server, url)["data"]["result"]
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """What the condition gives as soon as it gives something; the last otherwise."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(2)
    return found


@pytest.fixture(scope="module")
def watched(server: Server) -> Server:
    """The server, once Prometheus has read everything twice, so that rates can be told."""
    # Debian's own configuration, with which Prometheus starts for a moment, names no host.
    read = "min(sum_over_time(up{host!='', job!='endpoint'}[3m])) >= 3"
    assert wait_for(lambda: ask(server, read))
    return server


def test_a_grafana_would_find_prometheus_and_the_dashboards(server: Server) -> None:
    def provisioned(kind: str) -> Any:
        return yaml.safe_load(server.run(f"cat /etc/grafana/provisioning/{kind}/vllm-k80.yml"))

    (source,) = provisioned("datasources")["datasources"]
    assert get(server, f"{source['url']}/api/v1/status/buildinfo")["status"] == "success"
    (provider,) = provisioned("dashboards")["providers"]
    directory = provider["options"]["path"]
    for name in ("die", "fleet", "host", "model"):
        dashboard = json.loads(server.run(f"cat {directory}/{name}.json"))
        assert dashboard["templating"]["list"][0]["query"] == source["type"]


def test_everything_is_read(watched: Server) -> None:
    def states() -> dict[str, str]:
        targets = get(watched, "http://127.0.0.1:9090/api/v1/targets")["data"]["activeTargets"]
        return {f"{t['labels']['job']} {t['labels']['instance']}": t["health"] for t in targets}

    name = watched.host.run("hostname").stdout.strip()
    expected = {f"{job} {name}" for job in ("node", "haproxy", "endpoint")}
    expected |= {f"vllm {name}:{instance.name}" for instance in watched.instances}
    expected |= {f"{job} {name}" for job in ("prometheus", "alertmanager")}
    assert wait_for(lambda: {*states().values()} == {"up"}), states()
    assert {*states()} == expected


def test_each_die_is_told_by_what_names_it(watched: Server) -> None:
    dies = [sample["metric"] for sample in ask(watched, "k80_die_up == 1")]
    assert {(die["uuid"], die["vllm_instance"]) for die in dies} == {
        (instance.uuid, instance.name) for instance in watched.instances
    }
    assert {die["board"] for die in dies} == {"0000:03:00.0"}


@pytest.mark.parametrize(("title", "query"), panels())
def test_a_dashboard_shows_something(watched: Server, title: str, query: str) -> None:
    assert wait_for(lambda: ask(watched, query)), title


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['alert']} {rule['labels']}")
def test_what_an_alert_speaks_of_is_there(watched: Server, rule: dict[str, Any]) -> None:
    known = {"value"}
    if "label_replace" in rule["expr"]:
        known |= {*re.findall(r'"(\w+)", "\$1"', rule["expr"])}
    for selector in SELECTOR.findall(rule["expr"]):
        if selector not in ABSENT:
            samples = wait_for(partial(ask, watched, selector))
            assert samples, selector
            known |= {*samples[0]["metric"]}
    told = " ".join(rule["annotations"].values())
    if not ABSENT & {*SELECTOR.findall(rule["expr"])}:
        assert {*re.findall(r"\$labels\.(\w+)", told)} <= known


def alerts(server: Server) -> Samples:
    """What Alertmanager has."""
    found: Samples = get(server, "http://127.0.0.1:9093/api/v2/alerts")
    return found


def test_a_broken_die_is_alerted_to_and_a_mended_one_no_more(watched: Server) -> None:
    field = f"{DIE}/ecc.errors.uncorrected.volatile.total"

    def told() -> Samples:
        found = alerts(watched)
        return [a for a in found if a["labels"]["alertname"] == "K80DieDoubleBitErrors"]

    assert not told()
    try:
        watched.run(f"echo 2 > {field} && systemctl start k80-metrics-dies.service")
        wait_for(told)
        (alert,) = told()
        assert alert["labels"]["pci_address"] == "0000:06:00.0"
        assert "has had 2 double-bit ECC errors" in alert["annotations"]["summary"]
    finally:
        watched.run(f"rm {field} && systemctl start k80-metrics-dies.service")
    gone = 'ALERTS{alertname="K80DieDoubleBitErrors"}'
    assert wait_for(lambda: not ask(watched, gone))


def test_a_lost_die_is_told_with_its_name(watched: Server) -> None:
    """The alert itself waits a minute; tests/monitoring_rules.yml has that."""
    lost = 'ALERTS{alertname="K80DieLost", alertstate="pending", vllm_instance="die1"}'
    try:
        watched.run(f"touch {DIE}/lost && systemctl start k80-metrics-dies.service")
        assert wait_for(lambda: ask(watched, lost))
        assert ask(watched, 'k80_die_up{vllm_instance="die0"} == 1')
    finally:
        watched.run(f"rm {DIE}/lost && systemctl start k80-metrics-dies.service")
    assert wait_for(lambda: not ask(watched, 'ALERTS{alertname="K80DieLost"}'))


def test_nobody_else_reads(watched: Server) -> None:
    """A server that watches itself opens no port for it."""
    address = watched.host.run("hostname --ip-address").stdout.split()[0]
    for port in (9090, 9093, 9094, 9100, 9115, 9999):
        with socket.socket() as other:
            other.settimeout(5)
            assert other.connect_ex((address, port)) != 0, port
