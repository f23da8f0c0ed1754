"""What operators do with a fleet that serves, by playbook: nobody who asks notices."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import (
    ADDRESSES,
    CONTAINERS,
    ECC_ERRORS,
    GATEWAYS,
    INSTANCES,
    INVENTORY,
    INVENTORY_FILE,
    SERVERS,
    URLS,
    VARIABLES,
    Fault,
    command_lines,
    on,
)
from scenario import play
from test_faults import fewer, one_is_away

UnderLoad = Callable[..., Fault]
pytestmark = pytest.mark.full
KEY = "molecule-only-instance-key-0001"


def good(playbook: str, *options: str, inventory: Path | None = None, **variables: object) -> None:
    """Runs a playbook, which must do what it is there for."""
    code, said = play(f"playbooks/{playbook}", *options, inventory=inventory, **variables)
    assert code == 0, said


def containers() -> set[str]:
    return {name for server in SERVERS for name in on(server, CONTAINERS).split()}


def arguments(server: str) -> str:
    """The command line of a server's first instance."""
    return on(server, "docker inspect --format '{{.Config.Cmd}}' vllm-k80-die0")


def test_a_server_is_drained_and_undrained(under_load: UnderLoad) -> None:
    limit = f"--limit={SERVERS[0]}"
    before = containers()
    met = under_load(
        partial(good, "drain.yml", limit),
        detected=fewer(2),
        mend=partial(good, "undrain.yml", limit),
    )
    assert met.cut == 0
    assert containers() == before


def test_all_instances_are_restarted(under_load: UnderLoad) -> None:
    before = containers()
    assert under_load(partial(good, "restart.yml")).cut == 0
    assert not before & containers()


@pytest.fixture
def broken_die() -> Iterator[str]:
    """A server one of whose dies has ECC errors, for as long as the fixture lasts."""
    server = SERVERS[0]
    on(server, f"echo 2 > {ECC_ERRORS}")
    yield server
    on(server, f"rm --force {ECC_ERRORS}")


def test_an_update_stops_at_an_ill_server_and_is_rolled_back(
    under_load: UnderLoad, broken_die: str
) -> None:
    before = [arguments(server) for server in SERVERS]
    changed = {"vllm_instance_extra_args": ["--max-num-seqs", "5"], "site_soak": 0}
    code, said = play("playbooks/update.yml", **changed)
    assert code != 0
    assert f"{broken_die}: ecc-errors: " in said
    assert [arguments(server) for server in SERVERS[1:]] == before[1:]
    on(broken_die, f"rm {ECC_ERRORS}")
    good("update.yml", **changed)
    assert all("--max-num-seqs 5" in arguments(server) for server in SERVERS)
    assert under_load(partial(good, "rollback.yml")).cut == 0
    assert [arguments(server) for server in SERVERS] == before


def test_another_model_is_brought(under_load: UnderLoad) -> None:
    """Served by the same name, so that users may ask all the time."""
    for server in SERVERS:
        on(server, "cp --recursive /srv/known /srv/other")
    bring = partial(
        good,
        "update.yml",
        vllm_model_catalogue={
            "known": {"source": "directory", "path": "/srv/known"},
            "other": {"source": "directory", "path": "/srv/other", "served_name": "known"},
        },
        vllm_instance_model="other",
        site_soak=0,
    )
    assert under_load(bring).cut == 0
    assert all("serve /models/other" in arguments(server) for server in SERVERS)
    good("rollback.yml")
    assert all("serve /models/known" in arguments(server) for server in SERVERS)


ASK = """
import sys, urllib.error, urllib.request
url, key = sys.argv[1:]
request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def answers_to(key: str) -> set[str]:
    """What the instances say to a gateway that comes with this key."""
    urls = [f"http://{ADDRESSES[server]}:{port}" for server in SERVERS for port in (8001, 8002)]
    ask = f"python3 -c {shlex.quote(ASK)}"
    return {on(GATEWAYS[0], f"{ask} {url}/v1/models {key}") for url in urls}


def test_the_instances_key_is_changed(under_load: UnderLoad) -> None:
    other = "molecule-only-instance-key-0002"
    try:
        change = partial(good, "rotate-keys.yml", vllm_instance_api_key=other, rotate_keys_wait=10)
        with command_lines() as seen:
            assert under_load(change).cut == 0
        assert any("k80-instance" in line for line in seen)
        # As the playbook's own extra variable it is in one, here.
        shown = [line for line in seen if "molecule-only-" in line]
        assert not [line for line in shown if "--extra-vars" not in line], "a key in ps"
        assert answers_to(other) == {"200"}
        assert answers_to(KEY) == {"401"}
    finally:
        good("rotate-keys.yml", rotate_keys_wait=10)
    assert answers_to(KEY) == {"200"}
    assert answers_to(other) == {"401"}


def test_a_server_is_rebooted_unless_it_is_ill(under_load: UnderLoad, broken_die: str) -> None:
    limit = f"--limit={broken_die}"
    boot = "cat /proc/sys/kernel/random/boot_id; stat --format %Y /proc/1"
    booted = on(broken_die, boot)

    def reboot() -> None:
        code, said = play("playbooks/update-host.yml", limit, update_host_reboot=True)
        assert code != 0, said
        assert "ecc-errors" in said
        assert f"{broken_die} stays drained" in said
        assert on(broken_die, boot) != booted
        drained = on(broken_die, "k80-instance list")
        assert drained.count("maintenance") == 2, drained

    def mend() -> None:
        on(broken_die, f"rm {ECC_ERRORS}")
        good("update-host.yml", limit)

    assert under_load(reboot, detected=fewer(2), mend=mend).cut == 0


@contextmanager
def inventory_without(gone: str) -> Iterator[Path]:
    """One beside the other, for the same variables. Whatever happens, the host is back after it."""
    without = INVENTORY_FILE.with_name("without.yml")
    fewer_hosts = {
        group: content | {"hosts": {h: v for h, v in content["hosts"].items() if h != gone}}
        for group, content in INVENTORY.items()
        if "hosts" in content
    }
    without.write_text(yaml.safe_dump(fewer_hosts))
    try:
        yield without
    except BaseException:
        play("site.yml")
        raise
    finally:
        without.unlink()


def test_a_server_is_removed_and_added(under_load: UnderLoad) -> None:
    """With all that was put there, so that it comes back to a bare one."""
    gone = SERVERS[-1]
    fetched = "/var/lib/vllm-k80/models/one/file"
    clear = partial(good, "teardown.yml", f"--limit={gone}", teardown=True)

    def remove() -> None:
        on(gone, f"install -D /dev/null {fetched}")
        clear()
        on(gone, f"test -e {fetched} && docker version")
        clear(teardown_also="models,driver,container-toolkit,docker")
        good("../site.yml", inventory=without)

    def add() -> None:
        there = "ls /etc/systemd/system/vllm-k80* /var/lib/vllm-k80 /etc/vllm-k80 2> /dev/null"
        assert on(gone, f"{there} || true") == ""
        packages = on(gone, "dpkg-query --show --showformat '${Package} ${db:Status-Status}\\n'")
        for package in ("docker.io", "nvidia-container-toolkit"):
            assert f"{package} installed" not in packages
        good("../site.yml")

    with inventory_without(gone) as without:
        assert under_load(remove, detected=fewer(2), mend=add).cut == 0


def test_a_gateway_is_removed_and_added(under_load: UnderLoad) -> None:
    """Users who ask it go to the other; streams through it end with it."""
    gone = GATEWAYS[-1]
    before = containers()

    def remove() -> None:
        good("teardown.yml", f"--limit={gone}", teardown=True)
        good("../site.yml", inventory=without)

    def add() -> None:
        assert on(gone, "ls -d /etc/haproxy /usr/sbin/haproxy 2> /dev/null || true") == ""
        for server in SERVERS:
            assert ADDRESSES[gone] not in on(server, "nft list ruleset")
        good("../site.yml")

    with inventory_without(gone) as without:
        under_load(remove, detected=one_is_away, mend=add, gateway_lost=True)
    assert containers() == before, "instances do not notice"


def test_users_keys_are_changed(under_load: UnderLoad) -> None:
    (first,) = yaml.safe_load(VARIABLES.read_text())["gateway_api_keys"]
    second = {"name": "other", "key": "molecule-only-gateway-key-0002"}

    def answers(key: str) -> set[str]:
        ask = f"python3 -c {shlex.quote(ASK)}"
        return {on(SERVERS[0], f"{ask} {url}/v1/models {key}") for url in URLS}

    assert answers(second["key"]) == {"401"}
    change = partial(good, "rotate-keys.yml", gateway_api_keys=[first, second], rotate_keys_wait=0)
    assert under_load(change).cut == 0
    assert answers(second["key"]) == {"200"}
    assert under_load(partial(good, "rotate-keys.yml", rotate_keys_wait=0)).cut == 0
    assert answers(second["key"]) == {"401"}
    assert answers(first["key"]) == {"200"}


def test_a_gateway_speaks_tls(tmp_path: Path) -> None:
    """With a certificate of the lab's CA, which is made with it; and plain HTTP again."""
    limit = f"--limit=k80_servers:{GATEWAYS[0]}"  # a gateway must learn of all instances
    good("../site.yml", limit, gateway_tls_source="ca", gateway_tls_ca_dir=str(tmp_path / "ca"))
    ask = ["curl", "--silent", "--show-error", "--cacert", tmp_path / "ca/ca.pem"]
    url = f"{URLS[0].replace('http:', 'https:')}/health"
    told = subprocess.run([*ask, url], capture_output=True, text=True, check=False)
    assert f'"ready_instances":{INSTANCES}' in told.stdout, told.stderr
    good("../site.yml", limit)
    assert on(SERVERS[0], f"python3 -c {shlex.quote(ASK)} {URLS[0]}/health none") == "200"
