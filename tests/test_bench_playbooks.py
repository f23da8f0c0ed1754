"""bench-here and accept-here, which playbooks run on servers, with a made-up docker and others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from scenario import play

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "playbooks" / "files"
DIE = "GPU-11111111"
TIMES = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
SOAK = {"sweep": "soak", "concurrency": 8, "requests": 9, "failed": 0, "tokens_per_second": 1.0}
RESULT = {
    "steps": [SOAK | {"ttft_ms": TIMES, "tpot_ms": TIMES}],
    "samples": {
        DIE: {
            "card": "Tesla K80",
            "rows": [{"s": 1, "celsius": 71.0, "sm_mhz": 875, "throttled": ["power cap"]}],
        }
    },
}

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="gives files to the image's user")

# What a program answers: by the words of its command line that begin a key, the longest counts.
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
name = os.path.basename(sys.argv[0])
line = " ".join([name, *sys.argv[1:]])
world = json.load(open(os.environ["WORLD"]))
with open(os.environ["WORLD"] + ".log", "a") as log:
    log.write(line + "\\n")
for key, answer in sorted(world.items(), key=lambda item: -len(item[0])):
    if all(word in line for word in key.split()) and line.startswith(key.split()[0]):
        for volume, files in answer.get("writes", {}).items():
            mounted = next(w.split(":")[0] for w in sys.argv if w.endswith(":" + volume))
            for file, content in files.items():
                json.dump(content, open(os.path.join(mounted, file), "w"))
        print(answer.get("out", ""))
        print(answer.get("err", ""), file=sys.stderr)
        sys.exit(answer.get("code", 0))
sys.exit(f"nobody told what to answer to: {line}")
"""


def container(*flags: str, dies: str = DIE) -> dict:
    serve = ["serve", "/models/m/m.gguf", *flags]
    config = {"Image": "vllm-k80:tag", "Cmd": serve, "Env": [f"NVIDIA_VISIBLE_DEVICES={dies}"]}
    return {"out": json.dumps([{"State": {"Running": True}, "Config": config}])}


def info(*capabilities: str) -> dict:
    devices = [{"name": "Tesla K80", "capability": capability} for capability in capabilities]
    return {"out": json.dumps({"devices": devices})}


def healthy() -> dict[str, dict]:
    doctor = {"checks": [{"name": "container-die", "status": "ok", "detail": "can be opened"}]}
    comparisons = {"comparisons": 9, "off": [], "card": "Tesla K80", "times": []}
    return {
        "k80-instance list": {"out": json.dumps([{"name": "die0"}])},
        "k80-instance": {"out": "done"},
        "systemctl": {},
        "k80-doctor": {"out": json.dumps(doctor)},
        "nvidia-smi": {"out": f"{DIE}, Tesla K80, 60, 875, 0x0000000000000000, 100.1, 97"},
        "nvidia-smi driver_version": {"out": "470.256.02"},
        "docker ps": {"out": "0123456789ab"},
        "docker container inspect vllm-k80-die0": container(),
        "docker exec info": info("3.7"),
        "docker exec env": {"out": f"VLLM_K80_REQUIRE_GPU=1\nNVIDIA_VISIBLE_DEVICES={DIE}"},
        "docker exec probe": {"out": "Generated one token."},
        "docker run selftest": {"out": "selftest passed"},
        **{
            f"docker run kernels_on_gpu.py {suite}": {
                "writes": {"/figures": {f"{suite}-{DIE}.json": comparisons}}
            }
            for suite in ("norms", "gemv", "layers", "attention")
        },
        "docker run bench": {
            "out": "MEASURED",
            "writes": {"/bench": {"result.json": RESULT}},
        },
    }


class Server:
    """A server whose programs answer from a table."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.world = healthy()
        (directory / "bin").mkdir()
        for name in ("docker", "nvidia-smi", "k80-instance", "k80-doctor", "systemctl"):
            program = directory / "bin" / name
            program.write_text(STAND_IN)
            program.chmod(0o755)

    def run(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        world = self.directory / "world.json"
        world.write_text(json.dumps(self.world))
        path = f"{self.directory}/bin:{os.environ['PATH']}"
        results = self.directory / "results"
        return subprocess.run(
            [sys.executable, FILES / program, results, *arguments],
            env=os.environ | {"PATH": path, "WORLD": str(world)} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def asked(self, *words: str) -> list[str]:
        """The command lines that have these words."""
        lines = (self.directory / "world.json.log").read_text().splitlines()
        return [line for line in lines if all(word in line.split() for word in words)]

    def checks(self) -> dict[str, str]:
        found = json.loads((self.directory / "results" / "checks.json").read_text())
        return {row["check"]: row["result"] for row in found}

    def said(self, check: str) -> str:
        found = json.loads((self.directory / "results" / "checks.json").read_text())
        return next(row["said"] for row in found if row["check"].startswith(check))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


# ---- bench-here


def test_an_instance_is_measured_in_its_network_with_its_key_and_without_its_die(
    server: Server,
) -> None:
    done = server.run("bench-here", "instances", "--", "--requests", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "== die0\nMEASURED" in done.stdout
    (line,) = server.asked("docker", "run")
    for words in (
        "--network container:vllm-k80-die0",
        "--env-file /etc/vllm-k80/die0.env",
        "--env NVIDIA_VISIBLE_DEVICES=void",
        "vllm-k80:tag bench --url http://127.0.0.1:8000",
        "--predict /models/m/m.gguf",
        "--card 1 x Tesla K80, driver 470.256.02",
        "--samples /bench/samples.csv --requests 4",
    ):
        assert words in line
    assert "--runtime" not in line
    results = server.directory / "results" / "die0"
    assert (results / "result.json").exists()
    sampled = (results / "samples.csv").read_text().splitlines()
    assert sampled[0].split(", ")[1:3] == [DIE, "Tesla K80"]
    assert server.asked("nvidia-smi", "-i", DIE)


@pytest.mark.parametrize(
    ("flags", "dies", "predicted"),
    [
        (("--dtype", "float16"), DIE, "--predict /models/m/m.gguf --dtype half"),
        (("--quantization", "k80-w8"), DIE, "--predict /models/m/m.gguf --weights int8"),
        (("--dtype", "bfloat16"), DIE, "--predict /models/m/m.gguf --output"),
        ((), f"{DIE},GPU-2", None),
    ],
)
def test_what_is_predicted_is_what_is_served(
    server: Server, flags: tuple[str, ...], dies: str, predicted: str | None
) -> None:
    server.world["docker container inspect vllm-k80-die0"] = container(*flags, dies=dies)
    assert server.run("bench-here", "instances", "die0").returncode == 0
    (line,) = server.asked("docker", "run")
    if predicted is None:
        assert "--predict" not in line
    else:
        assert predicted in line


def test_what_computes_on_the_cpu_is_no_card_whatever_nvidia_smi_lists(server: Server) -> None:
    server.world["docker exec info"] = info()
    assert server.run("bench-here", "instances").returncode == 0
    (line,) = server.asked("docker", "run")
    assert "--card none: CUDA finds no device, operators run on the CPU" in line
    assert "Tesla" not in line


@pytest.mark.parametrize("authority", [False, True])
def test_a_gateway_is_asked_from_here_with_a_key_that_nobody_sees(
    authority: bool, server: Server
) -> None:
    (server.directory / "gateway.env").write_text("VLLM_API_KEY=a-secret-of-the-tests\n")
    volume = f"--volume {server.directory}/ca.pem:/ca.pem:ro --env SSL_CERT_FILE=/ca.pem"
    if authority:
        (server.directory / "ca.pem").touch()
    done = server.run("bench-here", "gateway", "https://ai.example.org")
    assert done.returncode == 0, done.stderr
    (line,) = server.asked("docker", "run")
    assert f"--network host --env-file {server.directory}/gateway.env" in line
    assert (volume in line) == authority
    assert "--url https://ai.example.org" in line
    assert "a-secret" not in (server.directory / "world.json.log").read_text()
    assert "--predict" not in line


def test_what_fails_is_said_and_the_others_are_measured(server: Server) -> None:
    server.world["k80-instance list"]["out"] = json.dumps([{"name": "die1"}, {"name": "die0"}])
    server.world["docker container inspect vllm-k80-die1"] = {"code": 1}
    done = server.run("bench-here", "instances")
    assert done.returncode == 1
    assert done.stderr.strip() == "die1: it does not run here; `k80-instance list` shows what does."
    assert "== die0" in done.stdout
    server.world["docker run bench"] = {"code": 1, "err": "vllm-k80: it answered 401"}
    (server.directory / "results").rename(server.directory / "before")
    assert "die0: vllm-k80: it answered 401" in server.run("bench-here", "together", "die0").stderr
    server.world["k80-instance list"] = {"code": 1}
    assert "run site.yml" in server.run("bench-here", "instances").stderr


# ---- accept-here


def test_on_a_k80_all_is_tried_and_the_instance_serves_again(server: Server) -> None:
    done = server.run("accept-here", "60", "--", "--requests", "4")
    assert done.returncode == 0, done.stderr
    assert set(server.checks().values()) == {"pass"}
    assert server.said("CUDA") == "Tesla K80 (sm_3.7)"
    assert server.said("operators against references: gemv") == "9 comparisons, 0 off"
    assert server.said("soak") == "9 requests, 0 failed; 71 degrees Celsius at most"
    # Free while it is tried, and given back after that.
    log = (server.directory / "world.json.log").read_text().splitlines()
    order = [
        next(i for i, line in enumerate(log) if all(word in line.split() for word in words))
        for words in (
            ("k80-instance", "drain", "die0"),
            ("systemctl", "stop", "vllm-k80-die0.service"),
            ("docker", "run", "selftest"),
            ("k80-instance", "start", "die0"),
            ("k80-instance", "undrain", "die0"),
            ("systemctl", "daemon-reload"),
            ("docker", "run", "bench"),
        )
    ]
    assert order == sorted(order)
    assert "--requests 4 --soak 60" in log[order[-1]]


def test_without_a_cuda_device_that_is_not_required_what_needs_one_is_not_run(
    server: Server,
) -> None:
    server.world["docker exec info"] = info()
    server.world["docker exec env"]["out"] = "VLLM_K80_REQUIRE_GPU=0"
    assert server.run("accept-here", "5").returncode == 0
    checks = server.checks()
    assert {name for name, result in checks.items() if result == "not run"} == {
        "CUDA opens the die",
        "self-test",
        "operators against references",
        "soak of 5 s under load",
    }
    assert checks["systemctl daemon-reload while it serves"] == "pass"
    assert "CUDA finds no device" in server.said("self-test")
    assert not server.asked("systemctl", "stop", "vllm-k80-die0.service")


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        ({"docker exec info": info()}, "CUDA opens the die", "CUDA finds no device"),
        ({"docker exec info": info("9.0")}, "CUDA opens the die", "sm_9.0"),
        ({"docker exec info": info("3.7", "3.7")}, "CUDA opens the die", "Tesla K80"),
        (
            {"docker exec info": {"code": 1, "err": "no such container"}},
            "CUDA",
            "no such container",
        ),
        ({"docker run selftest": {"code": 1, "err": "FAILED"}}, "self-test", "FAILED"),
        ({"k80-instance start": {"code": 1, "err": "not proven"}}, "it serves again", "not proven"),
        ({"docker exec probe": {"code": 1, "err": "hangs"}}, "systemctl daemon-reload", "hangs"),
        ({"docker run bench": {"code": 1, "err": "refused"}}, "soak", "refused"),
    ],
)
def test_what_is_wrong_has_failed(
    server: Server, change: dict[str, dict], check: str, words: str
) -> None:
    server.world |= change
    assert server.run("accept-here", "5").returncode == 0
    failed = [name for name, result in server.checks().items() if result == "fail"]
    assert len(failed) == 1
    assert failed[0].startswith(check)
    assert words in server.said(check)


def test_an_instance_that_is_not_idle_in_time_is_left_as_it_was(server: Server) -> None:
    server.world["k80-instance drain"] = {"code": 1, "err": "it still has requests after 300 s"}
    assert server.run("accept-here", "5").returncode == 0
    assert server.checks()["self-test"] == "not run"
    assert "it still has requests" in server.said("self-test")
    assert server.asked("k80-instance", "undrain", "die0")
    assert not server.asked("systemctl", "stop", "vllm-k80-die0.service")


def test_a_die_that_its_container_has_lost_and_one_that_is_hot_have_failed(server: Server) -> None:
    lost = {"name": "container-die", "status": "fail", "detail": "die0 cannot open its die"}
    server.world["k80-doctor"]["out"] = json.dumps({"checks": [lost]})
    rows = [{"celsius": 89.0, "throttled": ["hardware thermal"]}]
    hot = RESULT | {"samples": {DIE: {"card": "Tesla K80", "rows": rows}}}
    server.world["docker run bench"]["writes"]["/bench"]["result.json"] = hot
    assert server.run("accept-here", "5").returncode == 0
    assert server.said("systemctl daemon-reload") == "die0 cannot open its die"
    assert "89 degrees Celsius at most; slowed down by hardware thermal" in server.said("soak")
    failed = {name for name, result in server.checks().items() if result == "fail"}
    assert failed == {"systemctl daemon-reload while it serves", "soak of 5 s under load"}


# ---- the playbooks, on this machine, with the same programs


@pytest.fixture
def playing(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a playbook for server1, which is this machine, and gateway1, which is nowhere."""
    authorities = server.directory / ".gateway-ca"
    authorities.mkdir()
    (authorities / "ca.pem").write_text("a certificate")
    (server.directory / "hosts.yml").write_text(
        f"""
k80:
  vars:
    ansible_python_interpreter: {sys.executable}
  children:
    k80_servers:
      hosts:
        server1: {{ansible_connection: local}}
    k80_gateways:
      hosts:
        gateway1:
          ansible_host: ai.example.org
          gateway_tls_source: ca
          gateway_api_keys: [{{name: anna, key: annas-secret}}, {{name: b, key: bs-secret}}]
"""
    )

    def play_here(playbook: str, **variables: object) -> tuple[int, str]:
        world = server.directory / "world.json"
        world.write_text(json.dumps(server.world))
        monkeypatch.setenv("WORLD", str(world))
        monkeypatch.setenv("PATH", f"{server.directory}/bin:{os.environ['PATH']}")
        return play(playbook, inventory=server.directory / "hosts.yml", **variables)

    return play_here


@pytest.mark.slow
def test_benchmark_brings_instances_and_gateway(
    server: Server,
    playing: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brought = tmp_path / "brought"
    monkeypatch.setenv("ANSIBLE_VERBOSITY", "3")  # shows the command lines that a server sees
    code, said = playing(
        "playbooks/benchmark.yml",
        benchmark_directory=str(brought),
        benchmark_gateway_key_of="b",
        benchmark_flags="--requests 4",
    )
    assert code == 0, said
    assert "== die0" in said
    assert "MEASURED" in said
    assert "changed=0" in said
    found = {str(path.relative_to(brought)) for path in brought.rglob("*") if path.is_file()}
    assert found == {
        f"server1/{name}/{file}"
        for name in ("die0", "gateway")
        for file in ("result.json", "samples.csv")
    }
    through = server.asked("docker", "run", "--network", "host")
    assert len(through) == 1
    assert "--url https://ai.example.org:8080 " in through[0]
    assert "/ca.pem:/ca.pem:ro --env SSL_CERT_FILE=/ca.pem" in through[0]
    assert all("--requests 4" in line for line in server.asked("docker", "run"))
    # Where the results were is gone, and keys were in no command line and are not printed.
    volume = through[0].split("--volume ")[1].split(":")[0]
    assert not Path(volume).exists()
    assert "secret" not in said + (server.directory / "world.json.log").read_text()


@pytest.mark.slow
def test_benchmark_of_a_fleet_without_a_gateway(
    server: Server, playing: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    inventory = server.directory / "hosts.yml"
    inventory.write_text(inventory.read_text().partition("    k80_gateways:")[0])
    code, said = playing("playbooks/benchmark.yml", benchmark_directory=str(tmp_path / "brought"))
    assert code == 0, said
    assert "== die0" in said
    assert "== gateway" not in said


@pytest.mark.slow
def test_benchmark_says_what_was_not_measured_in_a_sentence(
    server: Server, playing: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    server.world["docker run bench"] = {"code": 1, "err": "vllm-k80: the key was refused."}
    code, said = playing("playbooks/benchmark.yml", benchmark_directory=str(tmp_path / "brought"))
    assert code != 0
    assert "server1: die0: vllm-k80: the key was refused." in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("playbook", "variables", "told"),
    [
        ("benchmark.yml", {"benchmark_gateway_key_of": "nobody"}, "name an owner of a key in"),
        ("acceptance.yml", {"acceptance_soak": "long"}, "give a whole number of seconds"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    server: Server,
    playing: Callable[..., tuple[int, str]],
    playbook: str,
    variables: dict[str, str],
    told: str,
) -> None:
    code, said = playing(f"playbooks/{playbook}", **variables)
    assert code != 0
    assert told in said
    assert not (server.directory / "world.json.log").exists()


@pytest.mark.slow
def test_acceptance_brings_a_page_and_fails_with_what_has_failed(
    server: Server, playing: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    server.world["docker run selftest"] = {"code": 1, "err": "computes wrongly"}
    brought = tmp_path / "brought"
    code, said = playing(
        "playbooks/acceptance.yml", acceptance_directory=str(brought), acceptance_soak=7
    )
    assert code != 0
    assert f"server1 die0 {DIE}: self-test: computes wrongly" in said
    page = (brought / "index.html").read_text()
    assert "8 pass, 1 fail, 0 not run." in page
    assert "soak of 7 s under load" in page


# ---- the page


@pytest.fixture(scope="module")
def acceptance_report(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("vllm-k80-src/tools/acceptance_report.py")


@pytest.fixture
def brought(tmp_path: Path) -> Callable[[str], Path]:
    def bring(result: str) -> Path:
        server = tmp_path / "server1"
        (server / "die0").mkdir(parents=True)
        checks = [
            {"check": "self-test", "instance": "die0", "result": "pass", "said": "it passed"},
            {"check": "CUDA", "instance": "die0", "result": result, "said": "<b>no device</b>"},
        ]
        (server / "checks.json").write_text(json.dumps(checks))
        times = [
            {"rows": 4096, "columns": 4096, "tokens": 1, "gemv_w4_us": 90.0},
            {"rows": 1, "columns": 1, "tokens": 1, "gemv_w4_us": 1.0},
        ]
        figures = {"card": "Tesla K80", "times": times}
        (server / "die0" / "gemv-GPU-1.json").write_text(json.dumps(figures))
        return tmp_path

    return bring


def test_the_page_puts_measured_beside_predicted(
    acceptance_report: ModuleType, brought: Callable[[str], Path]
) -> None:
    text, _ = acceptance_report.page(
        brought("pass"), {"gemv_w4_f16_m1 n=4096 k=4096 m=1 group=128": 63.0}
    )
    cells = "gemv_w4_f16_m1 n=4096 k=4096 m=1 group=128</td><td>90.0</td><td>63.0</td><td>0.70"
    assert cells in text
    assert "n=1 k=1" not in text
    assert "<b>no" not in text
    assert "&lt;b&gt;no device" in text


@pytest.mark.parametrize(("result", "code"), [("pass", 0), ("not run", 0), ("fail", 1)])
def test_its_exit_status_says_whether_anything_failed(
    brought: Callable[[str], Path], result: str, code: int
) -> None:
    directory = brought(result)
    program = ROOT / "vllm-k80-src" / "tools" / "acceptance_report.py"
    done = subprocess.run(
        [sys.executable, program, directory], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("server1 die0: CUDA" in done.stderr) == (code == 1)
    page = (directory / "index.html").read_text()
    assert f"<td>{result}</td>" in page
    assert "1 not run" in page if result == "not run" else "0 not run" in page
