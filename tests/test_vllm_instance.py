"""Filters of the role vllm_instance, and the firewall that its templates make."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from ansible.errors import AnsibleFilterError
from made_up_run import tasks_of
from scenario import play

ROLE = Path(__file__).parent.parent / "roles" / "vllm_instance"
DIES = [
    {"pci_address": "0000:05:00.0", "numa_node": 0, "local_cpulist": "0-7"},
    {"pci_address": "0000:06:00.0", "numa_node": 0, "local_cpulist": "0-7"},
    {"pci_address": "0000:84:00.0", "numa_node": 1, "local_cpulist": "8-15"},
    {"pci_address": "0000:85:00.0", "numa_node": -1, "local_cpulist": ""},
]
REPORT = """\
00000000:05:00.0, GPU-aa
00000000:06:00.0, GPU-bb
00000000:84:00.0, GPU-cc
00000000:85:00.0, GPU-dd
"""
MODELS = {
    "small": {"host_path": "/m/small", "serve_path": "/models/small/s.gguf", "revision": "1"},
    "large": {"host_path": "/m/large", "serve_path": "/models/large", "revision": "2"},
}


@pytest.fixture(scope="module")
def filters(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("roles/vllm_instance/filter_plugins/vllm_instance.py")


def resolve(filters: ModuleType, instances: list[dict[str, Any]], **settings: Any) -> Any:
    common = {
        "model": "small",
        "base_port": 8001,
        "address": "127.0.0.1",
        "extra_args": ["--dtype", "auto"],
    }
    return filters.resolve_instances(
        instances,
        DIES,
        filters.uuids_by_address(settings.pop("report", REPORT)),
        MODELS,
        {"small": {}, "large": {"served_name": "Large"}},
        common | settings,
    )


def test_without_a_declaration_each_die_has_an_instance(filters: ModuleType) -> None:
    resolved = resolve(filters, [])
    assert [(i["name"], i["uuids"], i["port"]) for i in resolved] == [
        ("die0", ["GPU-aa"], 8001),
        ("die1", ["GPU-bb"], 8002),
        ("die2", ["GPU-cc"], 8003),
        ("die3", ["GPU-dd"], 8004),
    ]
    assert [(i["cpus"], i["nodes"]) for i in resolved] == [
        ("0-7", "0"),
        ("0-7", "0"),
        ("8-15", "1"),
        ("", ""),
    ]


def test_two_dies_share_a_model(filters: ModuleType) -> None:
    declared = {
        "name": "both",
        "dies": ["0000:05:00.0", "0000:84:00.0"],
        "model": "large",
        "port": 9000,
        "extra_args": ["--enforce-eager"],
    }
    (instance,) = resolve(filters, [declared])
    assert instance["uuids"] == ["GPU-aa", "GPU-cc"]
    assert (instance["cpus"], instance["nodes"]) == ("0-7,8-15", "0,1")
    assert (instance["port"], instance["served_model"]) == (9000, "Large")
    assert instance["arguments"] == [
        "--tensor-parallel-size",
        "2",
        "--dtype",
        "auto",
        "--enforce-eager",
    ]


def test_golden_tokens_belong_to_model_and_settings(filters: ModuleType) -> None:
    one = {"name": "a", "dies": ["0000:05:00.0"]}
    base = resolve(filters, [one])[0]["golden"]
    assert resolve(filters, [one])[0]["golden"] == base
    assert resolve(filters, [one | {"port": 9000}])[0]["golden"] == base
    others = {
        resolve(filters, [one | {"model": "large"}])[0]["golden"],
        resolve(filters, [one | {"extra_args": ["--seed", "1"]}])[0]["golden"],
    }
    assert len(others | {base}) == 3


def test_a_die_that_is_not_there_is_named(filters: ModuleType) -> None:
    with pytest.raises(AnsibleFilterError, match=r"at 0000:07:00\.0; there are 0000:05"):
        resolve(filters, [{"name": "a", "dies": ["0000:07:00.0"]}])


def test_a_die_that_the_driver_does_not_list_is_named(filters: ModuleType) -> None:
    with pytest.raises(AnsibleFilterError, match=r"nvidia-smi does not list the die at 0000:06"):
        resolve(filters, [], report="00000000:05:00.0, GPU-aa\n")


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("--max-model-len=4096", "--max-model-len=4096"),
        ("/models/a b.gguf", '"/models/a b.gguf"'),
        ('{"a": "50%"}', '"{\\"a\\": \\"50%%\\"}"'),
        ("$HOME\\x", '"$$HOME\\\\x"'),
        ("", '""'),
    ],
)
def test_words_of_a_unit_are_quoted(filters: ModuleType, word: str, quoted: str) -> None:
    assert filters.systemd_quote(word) == quoted


def firewall(path: Path, gateways: list[str]) -> Path:
    """The table for these gateways, and instances on two ports."""
    template = jinja2.Template(
        (ROLE / "templates" / "firewall.nft.j2").read_text(), trim_blocks=True
    )
    file = path / "firewall.nft"
    file.write_text(
        template.render(
            ansible_managed="test",
            vllm_instance_gateway_addresses=gateways,
            vllm_instance_resolved=[{"port": 8001}, {"port": 8002}],
        )
    )
    return file


@pytest.mark.parametrize("gateways", [[], ["192.0.2.1"], ["192.0.2.1", "192.0.2.2"]])
def test_nft_accepts_the_firewall(tmp_path: Path, gateways: list[str]) -> None:
    nft = shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin")
    if nft is None:
        pytest.fail("nft is not installed: apt install nftables")
    done = subprocess.run(
        [nft, "--check", "--file", firewall(tmp_path, gateways)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# A server and another host, each a network namespace. The host has two addresses.
TWO_HOSTS = r"""
set -e
exec 3>&1 >/dev/null  # else what is left behind would keep the test waiting
unshare --net sleep 20 & other=$!
children=$other
trap 'kill $children' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link set lo up
ip link add here type veth peer name there netns $other
ip address add 192.0.2.10/24 dev here
ip link set here up
there() { nsenter --target $other --net "$@"; }
there ip address add 192.0.2.1/24 dev there
there ip address add 192.0.2.9/24 dev there
there ip link set there up
for port in 8001 8002 8080; do
    timeout 20 socat TCP-LISTEN:$port,fork,reuseaddr SYSTEM:'echo in' &
    children="$children $!"
done
while [ "$(grep -c ' 0A ' /proc/net/tcp)" != 3 ]; do sleep 0.05; done
nft --file "$1"
ask() { # FROM PORT
    met=$("$3" socat -u TCP:192.0.2.10:$2,bind=$1,connect-timeout=0.5 - 2>&- || echo out)
    echo "$1 $2 $met" >&3
}
for port in 8001 8002 8080; do
    ask 192.0.2.10 $port command
    ask 192.0.2.1 $port there
    ask 192.0.2.9 $port there
done
"""


def test_the_firewall_lets_the_gateways_in_and_nobody_else(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", TWO_HOSTS, "sh", firewall(tmp_path, ["192.0.2.1"])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    met = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert len(met) == 9
    assert {who for who, what in met.items() if what == "out"} == {
        "192.0.2.9 8001",
        "192.0.2.9 8002",
    }


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """An environment whose systemctl and docker answer from files and note what they are told."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "state").write_text("active")
    (tmp_path / "invocation").write_text("first")
    (tmp_path / "docker").write_text("active")
    (tmp_path / "probe").write_text("exit 1")
    scripts = {
        "systemctl": """
            case "$*" in
                *ActiveState*) cat "$HOST/state" ;;
                *InvocationID*) cat "$HOST/invocation" ;;
                *NRestarts*) cat "$HOST/restarts" ;;
                "is-active docker.service") cat "$HOST/docker"; grep -qx active "$HOST/docker" ;;
                *) echo "$*" >> "$HOST/log" ;;
            esac
            """,
        "docker": """
            case $1 in
                exec) . "$HOST/probe" ;;
                ps) cat "$HOST/containers" 2> /dev/null || true ;;
                container)
                    shift 4
                    printf '%s\\n' "$@" | grep -v ghost
                    ! echo "$@" | grep -q ghost
                    ;;
                rm) rm "$HOST/containers"; echo "$*" >> "$HOST/log" ;;
                kill) echo "$*" >> "$HOST/log" ;;
            esac
            """,
        # As where the last examination has not ended.
        "systemd-run": 'echo "$*" > "$HOST/examined"; exit 1',
    }
    scripts["sleep"] = 'echo "sleep $*" >> "$HOST/log"'
    for name, text in scripts.items():
        (commands / name).write_text("#!/bin/sh\n" + text)
        (commands / name).chmod(0o755)
    return {
        "HOST": str(tmp_path),
        "RUNTIME_DIRECTORY": str(tmp_path),
        "PATH": f"{commands}:/usr/bin:/bin",
    }


def call(host: dict[str, str], script: str, *arguments: str) -> tuple[int, str]:
    """Runs a script of the role; returns its exit status and what it told systemd and Docker."""
    log = Path(host["HOST"]) / "log"
    log.unlink(missing_ok=True)
    done = subprocess.run([ROLE / "files" / script, *arguments], env=host, check=False)
    return done.returncode, log.read_text() if log.exists() else ""


def probe(host: dict[str, str]) -> str:
    status, told = call(host, "prove-life", "vllm-k80-die0", "1", "2")
    assert status == 0
    return told


RESTART = "kill vllm-k80-die0\ntry-restart --no-block vllm-k80-die0.service\n"


def test_an_instance_that_fails_twice_in_a_row_is_restarted(host: dict[str, str]) -> None:
    answer = Path(host["HOST"]) / "probe"
    assert probe(host) == ""
    answer.write_text("exit 0")
    assert probe(host) == ""
    examined = (Path(host["HOST"]) / "examined").read_text()
    assert "--unit vllm-k80-die0-examine " in examined
    assert examined.endswith(" k80-instance examine die0\n")
    answer.write_text("exit 1")
    assert probe(host) == ""
    assert probe(host) == RESTART


def test_failures_of_an_earlier_run_do_not_count(host: dict[str, str]) -> None:
    assert probe(host) == ""
    (Path(host["HOST"]) / "invocation").write_text("second")
    assert probe(host) == ""
    assert probe(host) == RESTART


@pytest.mark.parametrize(
    "meanwhile", ["echo deactivating > $HOST/state", "echo second > $HOST/invocation"]
)
def test_a_stop_during_a_probe_is_not_undone(host: dict[str, str], meanwhile: str) -> None:
    assert probe(host) == ""
    (Path(host["HOST"]) / "probe").write_text(f"{meanwhile}; exit 1")
    assert probe(host) == ""


@pytest.mark.parametrize("state", ["activating", "deactivating", "inactive", "failed"])
def test_what_is_not_up_is_not_judged(host: dict[str, str], state: str) -> None:
    (Path(host["HOST"]) / "state").write_text(state)
    for _ in range(3):
        assert probe(host) == ""


def test_what_holds_a_die_is_removed(host: dict[str, str]) -> None:
    (Path(host["HOST"]) / "containers").write_text("aa\nbb\n")
    status, told = call(host, "clear-dies", "vllm-k80-die0")
    assert (status, told) == (0, "rm --force aa bb\n")


def test_a_dead_container_that_docker_does_not_know_holds_none(host: dict[str, str]) -> None:
    """Docker 20.10 was seen to list one for ever after it had been killed."""
    containers = Path(host["HOST"]) / "containers"
    containers.write_text("ghost\n")
    assert call(host, "clear-dies", "vllm-k80-die0", "GPU-aa") == (0, "")
    containers.write_text("ghost\naa\n")
    status, told = call(host, "clear-dies", "vllm-k80-die0")
    assert (status, told) == (0, "rm --force aa\n")


@pytest.mark.parametrize(
    ("docker", "status", "told"),
    [("inactive", 1, ""), ("failed", 0, "start docker.service\n"), ("activating", 1, "")],
)
def test_a_docker_that_somebody_stopped_is_left_alone(
    host: dict[str, str], docker: str, status: int, told: str
) -> None:
    (Path(host["HOST"]) / "docker").write_text(docker)
    assert call(host, "clear-dies", "vllm-k80-die0", "GPU-aa") == (status, told)
    # After a stop there is nothing to make room for.
    assert call(host, "clear-dies", "vllm-k80-die0") == (0, "")


def test_an_instance_that_never_serves_waits_longer_each_time(host: dict[str, str]) -> None:
    restarts = Path(host["HOST"]) / "restarts"

    def waits(*, start: int) -> str:
        """How long, besides systemd's own 5 s."""
        restarts.write_text(str(start))
        status, told = call(host, "back-off", "vllm-k80-die0", "5", "60")
        assert status == 0
        return told.strip()

    longer = ["", "", "sleep 5", "sleep 15", "sleep 35", "sleep 55", "sleep 55"]
    assert [waits(start=start) for start in range(7)] == longer
    # Somebody starts it by hand; it does not get far.
    assert [waits(start=start) for start in range(3)] == longer[:3]
    # It is proven, and ends much later.
    assert call(host, "back-off", "vllm-k80-die0") == (0, "")
    assert [waits(start=start) for start in range(3, 6)] == longer[1:4]


# --- Instances that fail, with a made-up k80-instance ------------------------

# Tells the states of each instance, by `apply --if-stopped` and by `apply`, and writes what it was
# asked.
K80_INSTANCE = """\
#!{python}
import json, sys
states, asked = {states!r}, {asked!r}
name, if_stopped = sys.argv[2], "--if-stopped" in sys.argv
with open(asked, "a") as file:
    file.write(name + (" if stopped" if if_stopped else "") + "\\n")
state = states[name][0 if if_stopped else 1]
serves, state = state == "back", "failed" if state == "back" else state
row = {{"name": name, "state": state, "detail": "its die is dead.", "serves": serves}}
print(json.dumps([row]))
sys.exit(1 if state == "failed" else 0)
"""


@pytest.fixture
def apply(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Has the role put these instances to work: exit code, what Ansible said, what was asked."""

    def run(states: dict[str, tuple[str, str]], stop: bool) -> tuple[int, str, list[str]]:
        program, asked = tmp_path / "k80-instance", tmp_path / "asked"
        program.write_text(
            K80_INSTANCE.format(python=sys.executable, states=states, asked=str(asked))
        )
        program.chmod(0o755)
        tasks: list[dict[str, Any]] = [
            {"ansible.builtin.include_vars": str(ROLE / path)}
            for path in ("defaults/main.yml", "vars/main.yml")
        ]
        tasks += [
            {"ansible.builtin.set_fact": {"vllm_instance_failed": []}},
            {
                "ansible.builtin.include_tasks": str(ROLE / "tasks/apply.yml"),
                "loop": [{"name": name} for name in states],
                "loop_control": {"loop_var": "__vllm_instance"},
            },
            {"ansible.builtin.debug": {"msg": "failed: {{ vllm_instance_failed | join(',') }}"}},
        ]
        playbook = tmp_path / "play.yml"
        playbook.write_text(
            json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}])
        )
        code, said = play(
            playbook,
            "--connection=local",
            inventory="localhost,",
            vllm_instance_stop_at_failure=stop,
            __vllm_instance_program=str(program),
            ansible_python_interpreter=sys.executable,
        )
        assert asked.is_file(), said
        return code, said, asked.read_text().splitlines()

    return run


@pytest.mark.slow
def test_an_instance_that_does_not_start_keeps_no_other_from_it(apply: Any) -> None:
    states = {
        "die0": ("failed", ""),
        "die1": ("changed", ""),
        "die2": ("waiting", "changed"),
        "die3": ("failed", ""),
    }
    code, said, asked = apply(states, stop=False)
    assert code == 0, said
    assert asked == [
        "die0 if stopped",
        "die1 if stopped",
        "die2 if stopped",
        "die2",
        "die3 if stopped",
    ]
    assert "instance die0: its die is dead." in said
    assert "failed: die0,die3" in said


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_a_change_that_fails_on_one_that_serves_is_tried_on_no_other(
    apply: Any, stop: bool
) -> None:
    states = {"die0": ("waiting", "failed"), "die1": ("waiting", "changed")}
    code, said, asked = apply(states, stop)
    assert code == 2, said
    assert asked == ["die0 if stopped", "die0"]
    assert "instance die0: its die is dead." in said


@pytest.mark.slow
def test_a_change_that_went_back_is_tried_on_no_other(apply: Any) -> None:
    """It was starting, with what serves again: the gateways are not to be told of anything else."""
    code, said, asked = apply({"die0": ("back", ""), "die1": ("changed", "")}, stop=False)
    assert code == 2, said
    assert asked == ["die0 if stopped"]


@pytest.mark.slow
def test_an_update_ends_with_the_first_that_does_not_start(apply: Any) -> None:
    states = {"die0": ("failed", ""), "die1": ("changed", "")}
    code, said, asked = apply(states, stop=True)
    assert code == 2, said
    assert asked == ["die0 if stopped"]
    assert "instance die0: its die is dead." in said


@pytest.mark.parametrize(
    ("stop_at_failure", "together"),
    [(False, [["one", "two"], ["two"]]), (True, [["one"], ["two"], ["two"]])],
)
def test_servers_go_through_their_instances_together(
    stop_at_failure: bool, together: list[list[str]], tmp_path: Path
) -> None:
    """So that a fleet's first start takes as long as one server's.

    Not where the first failure is to leave the others alone.
    """
    servers = {
        name: {
            "programs": {"nvidia-smi": (REPORT.replace("GPU-", f"GPU-{name}-"), 0)},
            "preflight_dies": DIES[:count],
            "vllm_instance_stop_at_failure": stop_at_failure,
            "vllm_instance_api_key": "k" * 24,
            "vllm_instance_bind_address": "127.0.0.1",
            "vllm_instance_memory_mb": 8192,
            "vllm_instance_model": "small",
            "vllm_model_paths": MODELS,
            "vllm_model_catalogue": {"small": {}, "large": {}},
            "vllm_image_reference": "vllm-k80:1",
        }
        for name, count in (("one", 1), ("two", 2))
    }
    tasks = tasks_of("vllm_instance", "main", servers, tmp_path, "--check", "-e", "facts=true")
    staged = [
        sorted(task["hosts"])
        for task in tasks
        if task["task"]["name"].endswith("Stage the instance's environment")
    ]
    assert staged == together
