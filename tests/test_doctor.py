"""The doctor, on made-up servers: files below a directory, and programs that answer from files."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from made_up_host import add_server, bind, write

ROOT = Path(__file__).resolve().parent.parent
DOCTOR = ROOT / "roles/doctor/files/k80-doctor"
DIES = ("0000:05:00.0", "0000:06:00.0")
BOARD = "0000:03:00.0"
UUIDS = ("GPU-4f0a2c1e-7d35-4b9a-8e61-c2a5d0937b14", "GPU-b7e61d93-05fa-4c28-9b47-1f8d3ea260c5")
DRIVER, KERNEL, IMAGE = "470.256.02", "6.1.0-18-amd64", "vllm-k80:0123456789abcdef"
SPECIFICATION = "---\nkind: nvidia.com/gpu\n"
MODEL = "/var/lib/vllm-k80/models/tiny/1-abc"
UNITS = ["docker.service", "k80-nvidia-cdi.service"]
# Answers by the first words of the command line that have a file; its exit status beside it.
STUB = """\
#!/bin/sh
name=${0##*/}
for key in "$name $1 $2" "$name $1" "$name"; do
    file="${0%/*}/../answers/$key"
    [ -e "$file.sleep" ] && { trap '' TERM; sleep "$(cat "$file.sleep")"; }
    [ -e "$file" ] && { cat "$file"; exit "$(cat "$file.code" 2>/dev/null || echo 0)"; }
done
exit 1
"""
PROGRAMS = ["dmesg", "docker", "dpkg-query", "journalctl", "ldconfig", "modinfo"]
PROGRAMS += ["nvidia-container-runtime", "nvidia-ctk", "nvidia-smi", "nft", "systemctl"]


@pytest.fixture(scope="session")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The program as a module."""
    copy = tmp_path_factory.mktemp("doctor") / "k80_doctor.py"
    shutil.copy(DOCTOR, copy)
    sys.path.insert(0, str(copy.parent))
    import k80_doctor

    module: ModuleType = k80_doctor
    return module


class Server:
    """A healthy server with two dies, an instance on each; tests make it ill."""

    def __init__(self, directory: Path, fields: tuple[str, ...], port: int) -> None:
        self.root, self.answers, self.bin = (directory / n for n in ("root", "answers", "bin"))
        for path in (self.answers, self.bin):
            path.mkdir()
        for name in PROGRAMS:
            (self.bin / name).write_text(STUB)
            (self.bin / name).chmod(0o755)
        add_server(self.root)
        self.fields = fields
        self.smi = [self.healthy_die(number) for number in (0, 1)]
        self.declared = self.healthy_declaration(port)
        self.units = {name: {"ActiveState": "active"} for name in self.unit_names()}
        for name in UNITS:
            self.units[name]["UnitFileState"] = "enabled"
        self.docker = self.healthy_docker()
        self.inside = {f"die{number}": self.healthy_inside(number) for number in (0, 1)}
        self.file("sys/module/nvidia/version", DRIVER)
        self.file("etc/modprobe.d/k80-nouveau.conf", "blacklist nouveau")
        settings = {"application_clocks": "2505,875", "ecc": "unchanged"}
        settings |= {"compute_mode": "default", "power_limit": 0}
        self.file("etc/vllm-k80/nvidia-settings.json", json.dumps(settings))
        program = self.root / "usr/local/lib/vllm-k80/nvidia-settings"
        program.parent.mkdir(parents=True)
        shutil.copy(ROOT / "roles/nvidia_driver/files/nvidia-settings", program)
        self.file("run/cdi/nvidia.yaml", SPECIFICATION)
        self.file(
            "etc/nvidia-container-runtime/config.toml",
            '[nvidia-container-runtime]\nlog-level = "info"\nmode = "cdi"\nruntimes = ["runc"]\n'
            '\n[nvidia-container-runtime.modes.cdi]\ndefault-kind = "nvidia.com/gpu"\n',
        )
        (self.root / "dev/char").mkdir(parents=True)
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
            # What matters is that a character device is there; its numbers need root.
            (self.root / "dev" / name).symlink_to("/dev/null")
        (self.root / "dev/char/1:3").symlink_to("../nvidia0")
        digest = hashlib.sha256(b"weights").hexdigest()
        self.file(MODEL + "/tiny.gguf", "weights")
        self.file(MODEL + "/manifest.json", json.dumps({"files": {"tiny.gguf": digest}}))
        for name in ("die0", "die1"):
            unit, sha256 = f"/etc/systemd/system/vllm-k80-{name}.service", hashlib.sha256(b"unit")
            self.file(unit, "unit")
            self.file(f"etc/vllm-k80/staged/{name}.service", "unit")
            for place in ("", "staged/"):
                self.file(f"etc/vllm-k80/{place}{name}.env", "# of it\nVLLM_API_KEY=a\n")
            # A root of its own, in which the path is the host's.
            self.file(f"run/vllm-k80/vllm-k80-{name}.started", f"{sha256.hexdigest()}  {unit}\n")
        self.answer("ldconfig", f"\tlibcuda.so.1 (libc6,x86-64) => {self.library()}\n")
        self.answer("modinfo", DRIVER + "\n")
        self.answer("nvidia-ctk", SPECIFICATION)
        self.answer("journalctl", "Linux version 6.1\n")
        self.answer("dpkg-query", "nvidia-container-toolkit hold installed 1.17.8-1\n")
        self.answer("systemctl is-active", "active\n")
        # An instance's engine, as the driver sees it.
        self.answer("docker inspect", "/vllm-k80-die0\n")
        self.computes((UUIDS[0], 100))

    def computes(self, *processes: tuple[str, int], container: str = "a" * 64) -> None:
        """Programs that compute, by die's UUID and PID, in a container or in none."""
        for _, pid in processes:
            self.file(f"proc/{pid}/cgroup", f"0::/system.slice/docker-{container}.scope\n")
            self.file(f"proc/{pid}/comm", "python3\n")
        rows = "".join(f"{uuid}, {pid}\n" for uuid, pid in processes)
        self.answer("nvidia-smi --query-compute-apps=gpu_uuid,pid", rows)

    def healthy_die(self, number: int) -> dict[str, str]:
        values = dict.fromkeys(self.fields, "0") | {
            "pci.bus_id": "0000" + DIES[number].upper(),
            "pci.device_id": "0x102D10DE",
            "uuid": UUIDS[number],
            "driver_version": DRIVER,
            "persistence_mode": "Enabled",
            "temperature.gpu": "38",
            "clocks_throttle_reasons.active": "0x0000000000000001",
            "clocks.applications.memory": "2505",
            "clocks.applications.graphics": "875",
            "ecc.mode.current": "Enabled",
            "ecc.mode.pending": "Enabled",
            "retired_pages.pending": "No",
            "compute_mode": "Default",
            "power.limit": "149.00",
        }
        return values

    def healthy_declaration(self, port: int) -> dict[str, Any]:
        return {
            "dies": [
                {"pci_address": die, "board": BOARD, "uuid": uuid}
                for die, uuid in zip(DIES, UUIDS, strict=True)
            ],
            "driver": {"version": DRIVER, "module": "nvidia-tesla-470", "persistence": True},
            "toolkit": {
                "version": "1.17.8-1",
                "packages": ["nvidia-container-toolkit"],
                "mode": "cdi",
                "specification": "/run/cdi/nvidia.yaml",
                "generate": ["nvidia-ctk", "cdi", "generate"],
            },
            "boot_units": UNITS,
            "image": IMAGE,
            "models": {
                "tiny": {
                    "host_path": MODEL,
                    "serve_path": "/models/tiny/tiny.gguf",
                    "fetched": True,
                }
            },
            "instances": [
                {
                    "name": f"die{number}",
                    "dies": [DIES[number]],
                    "uuids": [UUIDS[number]],
                    "address": "127.0.0.1",
                    "port": port,
                    "model": "tiny",
                }
                for number in (0, 1)
            ],
            # The machine that runs the tests may be short of space.
            "limits": {"disk_warn_gb": 0, "disk_fail_gb": 0},
        }

    def healthy_docker(self) -> dict[str, Any]:
        labels = {"org.opencontainers.image.version": IMAGE.split(":")[1]}
        mounts = [{"Source": MODEL, "Destination": "/models/tiny"}]
        return {
            "info": {
                "LiveRestoreEnabled": False,
                "Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}},
            },
            "image": [{"Id": "sha256:1", "Config": {"Labels": labels}}],
            "container": [
                {
                    "Name": f"/vllm-k80-die{number}",
                    "Image": "sha256:1",
                    "Config": {"Image": IMAGE},
                    "State": {"Running": True},
                    "Mounts": mounts,
                }
                for number in (0, 1)
            ],
        }

    def healthy_inside(self, number: int) -> dict[str, Any]:
        nodes = {f"/dev/nvidia{number}": "", "/dev/nvidia-uvm": "", "/dev/nvidiactl": ""}
        return {"nodes": nodes, "shown": [UUIDS[number]], "compat": []}

    def library(self) -> Path:
        link = self.root / "usr/lib/libcuda.so.1"
        write(link.with_name(f"libcuda.so.{DRIVER}"), "")
        link.symlink_to(f"libcuda.so.{DRIVER}")
        return link

    def listen_on_the_network(self) -> None:
        """The instances are at an address that leads to this machine, but is not 127.0.0.1."""
        for instance in self.declared["instances"]:
            instance["address"] = "127.1"

    def unit_names(self) -> list[str]:
        names = list(UNITS)
        for instance in ("die0", "die1"):
            names += [f"vllm-k80-{instance}.service", f"vllm-k80-{instance}-liveness.timer"]
        return names

    def file(self, path: str, text: str) -> None:
        write(self.root / path.lstrip("/"), text)

    def device(self, address: str) -> Path:
        return self.root / "sys/bus/pci/devices" / address

    def answer(self, command: str, text: str, code: int = 0) -> None:
        (self.answers / command).write_text(text)
        (self.answers / f"{command}.code").write_text(str(code))

    def examine(self, *options: str) -> tuple[int, dict[str, Any]]:
        """The doctor's exit status and report."""
        done = self.run("--json", *options)
        return done.returncode, json.loads(done.stdout)

    def metrics(self, *options: str) -> dict[str, float]:
        """What it tells Prometheus, by name and labels."""
        done = self.run("--metrics", *options)
        assert done.returncode == 0
        lines = [line.rpartition(" ") for line in done.stdout.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in lines}

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The program, on the server as it is by now."""
        if self.declared:
            self.file("etc/vllm-k80/doctor.json", json.dumps(self.declared))
        if not (self.answers / "nvidia-smi").exists():
            rows = [", ".join(die[field] for field in self.fields) for die in self.smi]
            self.answer("nvidia-smi", "\n".join(rows) + "\n")
        paragraphs = [
            "\n".join(f"{key}={value}" for key, value in state.items())
            for state in self.units.values()
        ]
        self.answer("systemctl show", "\n\n".join(paragraphs) + "\n")
        for name, content in self.docker.items():
            if not (self.answers / f"docker {name}").exists():
                self.answer(f"docker {name}", json.dumps(content))
        for name, content in self.inside.items():
            self.answer(f"docker exec vllm-k80-{name}", json.dumps(content))
        done = subprocess.run(
            [sys.executable, DOCTOR, "--root", self.root, *options],
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return done


METRICS = """\
vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {tokens}
vllm:kv_cache_usage_perc{{engine="0",model_name="tiny"}} 0.25
"""


class Listener(ThreadingHTTPServer):
    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # the other asks for the machine's name, which takes seconds


class Ready(BaseHTTPRequestHandler):
    """GET /ready and /metrics, as an instance answers them."""

    status, content = 200, b'{"ready": true, "proof": {"age": 3.2}}'
    tokens = 0

    def do_GET(self) -> None:
        status, content = self.status, self.content
        if self.path == "/metrics":
            type(self).tokens += 40
            status, content = 200, METRICS.format(tokens=self.tokens).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def instances() -> Iterator[tuple[int, type[Ready]]]:
    """The port of an instance that answers, and what it answers with."""
    handler = type("Handler", (Ready,), {})
    with Listener(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield server.server_address[1], handler
        server.shutdown()


@pytest.fixture
def server(
    tmp_path: Path, doctor: ModuleType, instances: tuple[int, type[Ready]]
) -> Iterator[Server]:
    yield Server(tmp_path, doctor.SMI_FIELDS, instances[0])


def told(report: dict[str, Any]) -> dict[str, str]:
    """The checks that are not well."""
    return {
        row["name"]: row["status"] for row in report["checks"] if row["status"] in ("warn", "fail")
    }


def detail(report: dict[str, Any], name: str) -> str:
    return next(str(row["detail"]) for row in report["checks"] if row["name"] == name)


def test_a_healthy_server_has_no_warning_and_nothing_is_skipped(server: Server) -> None:
    code, report = server.examine("--deep")
    assert {row["status"] for row in report["checks"]} == {"ok"}, report["checks"]
    assert not any(row["remedy"] or row["dies"] for row in report["checks"])
    assert (code, report["verdict"]) == (0, "ok")
    assert report["dies"] == [
        {
            "pci_address": die,
            "uuid": uuid,
            "instance": f"die{number}",
            "verdict": "ok",
            "checks": [],
        }
        for number, (die, uuid) in enumerate(zip(DIES, UUIDS, strict=True))
    ]


# ---- one fault each: what is done to the server, and what the doctor says of it

Fault = Callable[[Server], object]


def smi(number: int, **values: str) -> Fault:
    def set_values(server: Server) -> None:
        server.smi[number] |= {name.replace("__", "."): value for name, value in values.items()}

    return set_values


def attribute(address: str, name: str, value: str) -> Fault:
    return lambda server: (server.device(address) / name).write_text(f"{value}\n")


def unit(name: str, **state: str) -> Fault:
    return lambda server: server.units[name].update(state)


def answer(command: str, text: str, code: int = 0) -> Fault:
    return lambda server: server.answer(command, text, code)


def remove(path: str) -> Fault:
    return lambda server: (server.root / path.lstrip("/")).unlink()


def content(path: str, text: str) -> Fault:
    return lambda server: server.file(path, text)


def uncalled(name: str) -> Fault:
    """As if there were no such program on this machine either."""
    return lambda server: (server.bin / name).unlink()


def xid(*codes: int) -> Fault:
    lines = [f"NVRM: Xid (PCI:0000:06:00): {code}, pid=1234, it said so" for code in codes]
    return answer("journalctl", "\n".join(["Linux version 6.1", *lines]))


def inforom(number: int) -> Fault:
    """All rows, and what the driver adds to them."""

    def corrupt(server: Server) -> None:
        rows = [", ".join(die[field] for field in server.fields) for die in server.smi]
        bus_id = f"0000{DIES[number].upper()}"
        rows.append(f"WARNING: infoROM is corrupted at gpu {bus_id}")
        server.answer("nvidia-smi", "\n".join(rows) + "\n", 14)

    return corrupt


def both(*faults: Fault) -> Fault:
    return lambda server: [fault(server) for fault in faults]


LOST = "Unable to determine the device handle for GPU 0000:06:00.0: GPU is lost.  Reboot it\n"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\n"
FIRST, SECOND, ALL = [DIES[0]], [DIES[1]], [*DIES]
LOG = "the kernel's log"

FAULTS: dict[str, tuple[Fault, dict[str, str], list[str]]] = {
    # name: (fault, checks that are not well, dies whose verdict is not ok)
    "die taken out": (
        lambda server: server.device(DIES[1]).unlink(),
        {"die-present": "fail"},
        SECOND,
    ),
    "board added": (lambda s: s.declared["dies"].pop(), {"die-present": "warn"}, SECOND),
    "BAR unassigned": (
        attribute(DIES[0], "resource", "0x0 0x0 0x0\n0x0 0x0 0x0"),
        {"die-memory": "fail"},
        FIRST,
    ),
    "die's lanes": (attribute(DIES[1], "current_link_width", "8"), {"pcie-link": "warn"}, SECOND),
    "board's lanes": (attribute(BOARD, "current_link_width", "4"), {"pcie-link": "warn"}, ALL),
    "board's speed": (
        attribute(BOARD, "current_link_speed", "2.5 GT/s PCIe"),
        {"pcie-link": "warn"},
        ALL,
    ),
    "nouveau has a die": (
        lambda server: bind(server.root, DIES[1], "nouveau"),
        {"nouveau": "fail"},
        SECOND,
    ),
    "nouveau at the next boot": (
        remove("etc/modprobe.d/k80-nouveau.conf"),
        {"nouveau": "warn"},
        [],
    ),
    "nouveau in an initramfs of before": (
        both(
            content(f"boot/initrd.img-{KERNEL}", ""),
            lambda s: os.utime(s.root / f"boot/initrd.img-{KERNEL}", (0, 0)),
        ),
        {"nouveau": "warn"},
        [],
    ),
    "Secure Boot": (
        both(
            content("sys/firmware/efi/efivars/SecureBoot-8be4", "\6\0\0\0\1"),
            remove("sys/module/nvidia/version"),
            answer("nvidia-smi", "couldn't communicate with the NVIDIA driver\n", 9),
        ),
        {"secure-boot": "fail"},
        ALL,
    ),
    "no module for a kernel": (answer("modinfo", "", 1), {"driver-kernels": "warn"}, []),
    "another module for a kernel": (
        answer("modinfo", "535.183.01\n"),
        {"driver-kernels": "warn"},
        [],
    ),
    "no driver": (uncalled("nvidia-smi"), {"driver-installed": "fail"}, ALL),
    "version mismatch": (answer("nvidia-smi", MISMATCH, 18), {"driver-match": "fail"}, ALL),
    "other driver runs": (
        both(
            smi(0, driver_version="470.82.01"),
            smi(1, driver_version="470.82.01"),
            content("sys/module/nvidia/version", "470.82.01"),
        ),
        {"driver-match": "fail"},
        ALL,
    ),
    "libraries replaced": (
        answer("ldconfig", "\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.535.183.01\n"),
        {"driver-match": "fail"},
        ALL,
    ),
    "module not loaded": (
        both(
            remove("sys/module/nvidia/version"),
            answer("nvidia-smi", "couldn't communicate with the NVIDIA driver\n", 9),
        ),
        {"driver-loaded": "fail"},
        ALL,
    ),
    "driver fails": (answer("nvidia-smi", "Unknown Error\n", 255), {"driver-answers": "fail"}, ALL),
    "die lost": (
        both(answer("nvidia-smi", LOST, 15), xid(79)),
        {"die-lost": "fail"},
        ALL,  # the other is not listed either, by this stub: see the test below
    ),
    "die not listed": (lambda s: s.smi.pop(), {"die-listed": "fail"}, SECOND),
    "InfoROM corrupted": (inforom(1), {"inforom": "warn"}, SECOND),
    "board exchanged": (smi(1, uuid="GPU-other"), {"die-identity": "fail"}, SECOND),
    "double-bit errors": (
        both(smi(0, ecc__errors__uncorrected__volatile__total="2"), xid(31)),
        {"ecc-errors": "fail", "xid": "warn"},
        ALL,
    ),
    "double-bit errors and their Xids": (
        both(smi(1, ecc__errors__uncorrected__volatile__total="2"), xid(48, 63)),
        {"ecc-errors": "fail"},
        SECOND,
    ),
    "pages to be retired": (
        smi(0, retired_pages__pending="Yes"),
        {"retired-pages": "warn"},
        FIRST,
    ),
    "many pages retired": (
        smi(
            0,
            retired_pages__single_bit_ecc__count="40",
            retired_pages__double_bit__count="20",
        ),
        {"retired-pages": "warn"},
        FIRST,
    ),
    "Xid of the hardware": (xid(79, 13), {"xid": "fail"}, SECOND),
    "Xid of a program": (xid(13, 13), {"xid": "warn"}, SECOND),
    "Xid in dmesg": (
        both(answer("journalctl", ""), answer("dmesg", "[1.2] NVRM: Xid (PCI:0000:05:00): 62, x")),
        {"xid": "fail"},
        FIRST,
    ),
    "warm": (smi(1, temperature__gpu="80"), {"temperature": "warn"}, SECOND),
    "hot, and slowed down by it": (
        smi(1, temperature__gpu="88", clocks_throttle_reasons__active="0x0000000000000048"),
        {"temperature": "fail"},
        SECOND,
    ),
    "slowed down": (
        smi(0, clocks_throttle_reasons__active="0x0000000000000080"),
        {"throttle": "warn"},
        FIRST,
    ),
    "clocks": (smi(0, clocks__applications__graphics="562"), {"settings": "warn"}, FIRST),
    "ECC at the next boot": (smi(1, ecc__mode__pending="Disabled"), {"settings": "warn"}, SECOND),
    "persistence": (smi(0, persistence_mode="Disabled"), {"persistence": "warn"}, FIRST),
    "no UVM": (
        both(remove("dev/nvidia-uvm"), answer("nvidia-ctk", "---\n")),
        {"uvm": "fail"},
        ALL,
    ),
    "no links of nodes": (remove("dev/char/1:3"), {"device-links": "warn"}, []),
    "unit not enabled": (
        unit("k80-nvidia-cdi.service", UnitFileState="disabled"),
        {"boot-units": "warn"},
        [],
    ),
    "unit not there": (
        unit("k80-nvidia-cdi.service", UnitFileState=""),
        {"boot-units": "warn"},
        [],
    ),
    "unit failed": (
        unit("k80-nvidia-cdi.service", ActiveState="failed"),
        {"failed-units": "warn"},
        [],
    ),
    "ports open": (
        lambda s: (s.listen_on_the_network(), s.answer("nft", "No such file", 1)),
        {"firewall": "warn"},
        [],
    ),
    "Docker stopped": (answer("systemctl is-active", "inactive\n", 3), {"docker": "fail"}, ALL),
    "Docker fails": (answer("docker info", "Cannot connect\n", 1), {"docker": "fail"}, ALL),
    "live-restore": (
        lambda s: s.docker["info"].update(LiveRestoreEnabled=True),
        {"live-restore": "warn"},
        [],
    ),
    "toolkit of another version": (
        answer("dpkg-query", "nvidia-container-toolkit hold installed 1.18.0-1\n"),
        {"toolkit": "warn"},
        [],
    ),
    "toolkit removed": (
        answer("dpkg-query", "nvidia-container-toolkit hold config-files 1.17.8-1\n"),
        {"toolkit": "fail"},
        ALL,
    ),
    "toolkit not held": (
        answer("dpkg-query", "nvidia-container-toolkit install installed 1.17.8-1\n"),
        {"held": "warn"},
        [],
    ),
    "no runtime": (lambda s: s.docker["info"]["Runtimes"].clear(), {"runtime": "fail"}, ALL),
    "no program of the runtime": (
        uncalled("nvidia-container-runtime"),
        {"runtime": "fail"},
        ALL,
    ),
    "legacy mode": (
        content(
            "etc/nvidia-container-runtime/config.toml",
            '[nvidia-container-runtime]\nmode = "legacy"\n',
        ),
        {"runtime": "fail"},
        ALL,
    ),
    "CDI stale": (content("run/cdi/nvidia.yaml", "---\nkind: old\n"), {"cdi": "fail"}, ALL),
    "CDI gone": (remove("run/cdi/nvidia.yaml"), {"cdi": "fail"}, ALL),
    "image gone": (answer("docker image", "[]\n", 1), {"image": "fail"}, ALL),
    "other image of this name": (
        lambda s: s.docker["image"][0]["Config"].update(Labels=None),
        {"image": "fail"},
        ALL,
    ),
    "other image runs": (
        lambda s: s.docker["container"][1].update(Image="sha256:2"),
        {"image": "fail"},
        SECOND,
    ),
    "model gone": (remove(MODEL + "/tiny.gguf"), {"model": "fail"}, ALL),
    "model's manifest gone": (remove(MODEL + "/manifest.json"), {"model": "fail"}, ALL),
    "other model served": (
        lambda s: s.docker["container"][0].update(
            Mounts=[{"Source": "/srv/old", "Destination": "/models/tiny"}]
        ),
        {"model": "fail"},
        FIRST,
    ),
    "instance failed": (
        both(
            unit("vllm-k80-die1.service", ActiveState="failed"),
            lambda s: s.docker["container"].pop(),
        ),
        {"instance-unit": "fail"},
        SECOND,
    ),
    "environment changed": (
        content("etc/systemd/system/vllm-k80-die0.service", "changed"),
        {"instance-current": "warn"},
        FIRST,
    ),
    "update that failed": (
        content("etc/vllm-k80/staged/die1.service", "new unit"),
        {"instance-change": "warn"},
        SECOND,
    ),
    "update interrupted": (
        content("etc/vllm-k80/before/die0.service", "old unit"),
        {"instance-change": "warn"},
        FIRST,
    ),
    "keys still changing": (
        content("etc/vllm-k80/die0.env", "# of it\nVLLM_API_KEY=a\nVLLM_K80_SECOND_API_KEY=b\n"),
        {"instance-change": "warn"},
        FIRST,
    ),
    "drained": (
        content("var/lib/vllm-k80/instances/die1/drained", "operator\n"),
        {"instance-drained": "warn"},
        SECOND,
    ),
    "probes stopped": (
        unit("vllm-k80-die0-liveness.timer", ActiveState="inactive"),
        {"instance-liveness": "fail"},
        FIRST,
    ),
    "probes fail": (
        both(
            unit("vllm-k80-die1.service", InvocationID="abc"),
            content("run/vllm-k80/vllm-k80-die1.failures", "abc 1\n"),
        ),
        {"instance-liveness": "warn"},
        SECOND,
    ),
    "another's container computes": (
        both(
            lambda s: s.computes((UUIDS[1], 300)),
            answer("docker inspect", "/somebody\n"),
        ),
        {"die-shared": "warn"},
        SECOND,
    ),
    "an instance computes on another's die": (
        lambda s: s.computes((UUIDS[1], 100)),
        {"die-shared": "warn"},
        SECOND,
    ),
    "a program in no container computes": (
        lambda s: s.computes((UUIDS[0], 300), container=""),
        {"die-shared": "warn"},
        FIRST,
    ),
    "die not openable in its container": (
        lambda s: s.inside["die0"]["nodes"].update({"/dev/nvidia0": "EPERM"}),
        {"container-die": "fail"},
        FIRST,
    ),
    "die not in its container": (
        lambda s: s.inside["die1"]["nodes"].pop("/dev/nvidia1"),
        {"container-die": "fail"},
        SECOND,
    ),
    "NVML fails in the container": (
        lambda s: s.inside["die1"].update(shown=["Failed to initialize NVML: Unknown Error"]),
        {"container-die": "fail"},
        SECOND,
    ),
    "libcuda in the image": (
        lambda s: s.inside["die0"].update(compat=["/usr/local/cuda-11.8/compat/libcuda.so.1"]),
        {"container-libcuda": "warn"},
        FIRST,
    ),
    "disk fills": (
        lambda s: s.declared["limits"].update(disk_warn_gb=1e6),
        {"disk": "warn"},
        [],
    ),
    "disk is full": (
        lambda s: s.declared["limits"].update(disk_fail_gb=1e6),
        {"disk": "fail"},
        ALL,
    ),
}


@pytest.mark.parametrize(("fault", "checks", "dies"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_nothing_else(
    server: Server, fault: Fault, checks: dict[str, str], dies: list[str]
) -> None:
    fault(server)
    code, report = server.examine()
    assert told(report) == checks, report["checks"]
    assert [die["pci_address"] for die in report["dies"] if die["verdict"] != "ok"] == dies
    assert code == (2 if "fail" in checks.values() else 1)
    assert report["verdict"] == ("fail" if code == 2 else "warn")
    for row in report["checks"]:
        assert bool(row["remedy"]) == (row["name"] in checks)
        if row["name"] in checks:
            assert row["detail"]


def test_every_check_has_a_fault_that_it_names(doctor: ModuleType) -> None:
    named = {name for _, checks, _ in FAULTS.values() for name in checks}
    # Each of these has a test of its own below.
    named |= {"declared", "driver-hangs", "instance-ready"}
    assert named == {check.name for check in doctor.CHECKS}


def test_who_else_computes_is_named(server: Server) -> None:
    server.computes((UUIDS[0], 300), container="")
    _, report = server.examine()
    told_of = f"die {DIES[0]}, which is instance die0's, has python3 (PID 300)"
    assert detail(report, "die-shared") == told_of
    server.computes((UUIDS[0], 300))
    server.answer("docker inspect", "/somebody\n")
    _, report = server.examine()
    assert detail(report, "die-shared") == f"{told_of} of container somebody"
    # Gone before it could be looked at, as when an instance restarts.
    shutil.rmtree(server.root / "proc/300")
    assert server.examine()[0] == 0
    # A die that no instance has is anybody's.
    server.computes((UUIDS[0], 300))
    server.declared["instances"] = server.declared["instances"][1:]
    assert "die-shared" not in told(server.examine()[1])


def test_an_initramfs_is_old_for_the_driver_s_role_as_well(
    server: Server, doctor: ModuleType, load_module: Callable[[str], ModuleType]
) -> None:
    driver = load_module("roles/nvidia_driver/library/nvidia_driver_state.py")
    driver.BOOT = str(server.root / "boot")
    conf = server.root / "etc/modprobe.d/k80-nouveau.conf"
    for name in (f"initrd.img-{KERNEL}", f"initramfs-{KERNEL}.img"):
        image = server.root / "boot" / name
        image.write_text("")
        for made in (0, 2**32):
            os.utime(image, (made, made))
            old = doctor.look_at_system(str(server.root))["old_initramfs"]
            assert old == ([name] if driver.initramfs_is_old(KERNEL, str(conf)) else [])
            assert bool(old) == (made == 0)
        image.unlink()


def test_an_instance_that_does_not_generate(
    server: Server, instances: tuple[int, type[Ready]]
) -> None:
    handler = instances[1]
    handler.status, handler.content = 503, b'{"ready": false, "reason": "the last proof is old"}'
    code, report = server.examine()
    assert told(report) == {"instance-ready": "fail"}
    assert "the last proof is old" in detail(report, "instance-ready")
    assert code == 2


def test_who_drained_an_instance_and_when(
    server: Server, instances: tuple[int, type[Ready]]
) -> None:
    drained = server.root / "var/lib/vllm-k80/instances/die1/drained"
    write(drained, "maintenance\n")
    os.utime(drained, (1e9, 1e9))
    # It goes on generating.
    handler = instances[1]
    handler.status = 404
    handler.content = b'{"ready": false, "reason": "drained", "proof": {"age": 3.2}}'
    code, report = server.examine()
    assert told(report) == {"instance-drained": "warn"}
    assert "instance die1 is drained by maintenance since 2001-09-" in detail(
        report, "instance-drained"
    )
    assert code == 1
    # One of an update that a reboot has ended.
    write(drained, "update 00000000-0000-0000-0000-000000000001\n")
    assert told(server.examine()[1]) == {}


def test_what_is_said_of_a_change(server: Server) -> None:
    server.file("etc/vllm-k80/staged/die0.service", "new unit")
    server.file("etc/vllm-k80/staged/die0.env", "VLLM_API_KEY=b\n")
    _, report = server.examine()
    words = "instance die0 does not run the unit and environment staged for it"
    assert detail(report, "instance-change") == words


def test_an_instance_that_nobody_answers_for(server: Server) -> None:
    server.declared["instances"][1]["port"] = 9  # discard: nobody listens
    _, report = server.examine()
    assert told(report) == {"instance-ready": "fail"}
    assert [die["verdict"] for die in report["dies"]] == ["ok", "fail"]


def test_the_other_die_is_judged_when_one_is_lost(server: Server) -> None:
    server.answer("nvidia-smi", LOST, 15)
    row = server.smi[0] | {"temperature.gpu": "90"}
    server.answer(f"nvidia-smi -i {DIES[0]}", ", ".join(row[field] for field in server.fields))
    _, report = server.examine()
    assert told(report) == {"die-lost": "fail", "temperature": "fail"}
    assert [die["checks"] for die in report["dies"]] == [["temperature"], ["die-lost"]]
    assert "nvidia-smi" in detail(report, "die-shared")


def test_a_driver_that_hangs_holds_nobody_up(server: Server) -> None:
    (server.answers / "nvidia-smi.sleep").write_text("60")
    started = time.monotonic()
    code, report = server.examine("--timeout=4")
    assert time.monotonic() - started < 30
    assert told(report) == {"driver-hangs": "fail"}
    assert code == 2


def test_what_cannot_be_killed_is_not_waited_for(
    doctor: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in uninterruptible sleep does not end by SIGKILL: here none is sent."""
    pids: list[int] = []
    monkeypatch.setattr(doctor.os, "killpg", lambda pid, _: pids.append(pid))
    started = time.monotonic()
    answers = doctor.ask({"slow": lambda: time.sleep(60), "quick": lambda: 1}, 2)
    assert time.monotonic() - started < 10
    assert answers["quick"] == 1
    assert str(answers["slow"]) == "no answer within 2 s"
    monkeypatch.undo()
    for pid in pids:
        os.killpg(pid, 9)
        os.waitpid(pid, 0)


def test_a_probe_that_breaks_is_a_warning_and_no_traceback(server: Server) -> None:
    server.answer("docker info", "this is not JSON\n")
    server.smi[0]["clocks_throttle_reasons.active"] = "0xnonsense"
    code, report = server.examine()
    assert told(report) == {"docker": "fail", "throttle": "warn"}
    assert "JSONDecodeError" in detail(report, "docker")
    assert code == 2


def test_a_model_that_was_changed_is_found_when_asked_for(server: Server) -> None:
    server.file(MODEL + "/tiny.gguf", "weighty")
    assert told(server.examine()[1]) == {}
    code, report = server.examine("--deep")
    assert told(report) == {"model": "fail"}
    assert "another sha256" in detail(report, "model")
    assert code == 2


def test_before_site_yml_has_run(server: Server) -> None:
    """A server with a card, a driver and Docker, and nothing of ours."""
    server.declared = {}
    for path in ("etc/vllm-k80", "etc/modprobe.d", "etc/nvidia-container-runtime", "var", "run"):
        shutil.rmtree(server.root / path)
    code, report = server.examine()
    assert told(report) == {"declared": "warn"}
    assert [die["pci_address"] for die in report["dies"]] == [*DIES]
    assert code == 1
    statuses = {row["name"]: row["status"] for row in report["checks"]}
    assert statuses["cdi"] == statuses["image"] == statuses["settings"] == "skip"
    assert statuses["temperature"] == statuses["uvm"] == statuses["docker"] == "ok"


def test_a_bare_server(server: Server) -> None:
    server.declared = {}
    shutil.rmtree(server.root)
    server.root.mkdir()
    for name in PROGRAMS:
        (server.bin / name).unlink()
    code, report = server.examine()
    wrong = told(report)
    # The machine that runs the tests may have a Docker of its own.
    wrong.pop("docker", None)
    assert wrong == {"declared": "warn", "die-present": "fail", "driver-installed": "fail"}
    assert code == 2


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_declaration_that_cannot_be_read(server: Server, text: str) -> None:
    server.declared = {}
    server.file("etc/vllm-k80/doctor.json", text)
    _, report = server.examine()
    assert told(report) == {"declared": "warn"}
    assert "cannot be read" in detail(report, "declared")


def test_a_die_without_a_board_s_switch_may_slow_its_link_down(server: Server) -> None:
    """As it does while it has no work."""
    server.declared["dies"][0]["board"] = DIES[0]
    attribute(DIES[0], "current_link_speed", "2.5 GT/s PCIe")(server)
    assert told(server.examine()[1]) == {}


def test_a_driver_that_somebody_else_installed_is_not_asked_for_what_the_role_leaves(
    server: Server,
) -> None:
    server.declared["driver"] |= {"module": "", "persistence": False}
    remove("etc/modprobe.d/k80-nouveau.conf")(server)
    code, report = server.examine()
    assert (code, told(report)) == (0, {})
    skipped = {row["name"] for row in report["checks"] if row["status"] == "skip"}
    assert skipped == {"driver-kernels", "persistence"}


def test_an_instance_of_two_dies_fails_with_either(server: Server) -> None:
    server.declared["instances"].pop()
    server.declared["instances"][0] |= {"dies": [*DIES], "uuids": [*UUIDS]}
    server.units = {name: state for name, state in server.units.items() if "die1" not in name}
    server.docker["container"].pop()
    server.inside["die0"]["nodes"]["/dev/nvidia1"] = ""
    server.inside["die0"]["shown"] = [*UUIDS]
    assert told(server.examine()[1]) == {}
    server.units["vllm-k80-die0.service"]["ActiveState"] = "failed"
    _, report = server.examine()
    assert told(report) == {"instance-unit": "fail"}
    assert [die["verdict"] for die in report["dies"]] == ["fail", "fail"]


def test_the_table_names_host_dies_checks_and_remedies(server: Server) -> None:
    smi(1, temperature__gpu="95")(server)
    server.examine()
    done = subprocess.run(
        [sys.executable, DOCTOR, "--root", server.root],
        env=os.environ | {"PATH": f"{server.bin}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0].endswith(": fail")
    assert lines[1] == f"die {DIES[0]}  die0: ok"
    assert lines[2] == f"die {DIES[1]}  die1: fail  (temperature)"
    place = next(n for n, line in enumerate(lines) if line.startswith("FAIL  temperature"))
    assert f"die {DIES[1]} has 95 degrees Celsius" in lines[place]
    assert lines[place + 1].strip().startswith("-> See to the cooling")


def test_ports_are_closed_where_a_network_leads_to_them(server: Server) -> None:
    server.listen_on_the_network()
    server.answer("nft", "table inet vllm_k80 {\n}\n")
    code, report = server.examine()
    assert code == 0, [row for row in report["checks"] if row["status"] != "ok"]


def test_what_is_declared_is_what_the_roles_have_told(
    load_module: Callable[[str], ModuleType],
) -> None:
    declared = load_module("roles/doctor/filter_plugins/doctor.py").declared
    facts = {
        "dies": [
            {"pci_address": die, "board": BOARD, "numa_node": 0, "local_cpulist": "0"}
            for die in DIES
        ],
        "driver": {"version": DRIVER, "units": ["k80-nvidia-uvm.service"]},
        "toolkit": {},
        "image": IMAGE,
        "limits": {},
    }
    instance = {"name": "a", "dies": SECOND, "uuids": [UUIDS[1]], "address": "127.0.0.1"}
    instance |= {"port": 8001, "model": "tiny", "arguments": ["--api-key", "secret"]}
    models = {"tiny": {"host_path": "/srv/tiny", "serve_path": "/models/tiny", "revision": "1"}}
    content = declared(facts, [instance], models, {"tiny": {"source": "directory"}}, {})
    assert content == {
        "dies": [
            {"pci_address": DIES[0], "board": BOARD, "uuid": ""},
            {"pci_address": DIES[1], "board": BOARD, "uuid": UUIDS[1]},
        ],
        "driver": {"version": DRIVER},
        "image": IMAGE,
        "boot_units": [
            "docker.service",
            "k80-nvidia-uvm.service",
            "vllm-k80-a.service",
            "vllm-k80-a-liveness.timer",
        ],
        "models": {
            "tiny": {
                "host_path": "/srv/tiny",
                "serve_path": "/models/tiny",
                "fetched": False,
            }
        },
        "instances": [
            {key: instance[key] for key in ("name", "dies", "uuids", "address", "port", "model")}
        ],
    }
    elsewhere = declared(
        facts, [instance | {"address": "192.0.2.7"}], models, {"tiny": {"source": "directory"}}, {}
    )
    assert elsewhere["boot_units"] == [*content["boot_units"], "vllm-k80-firewall.service"]
    # A run of the driver's role alone.
    later = {"dies": facts["dies"], "driver": {"version": "470.1", "units": ["new.service"]}}
    later |= {"toolkit": {}, "image": "", "limits": {}}
    assert declared(later, [], {}, {}, content) == content | {
        "driver": {"version": "470.1"},
        "boot_units": [
            "docker.service",
            "k80-nvidia-uvm.service",
            "new.service",
            "vllm-k80-a.service",
            "vllm-k80-a-liveness.timer",
        ],
    }


def test_it_sees_in_the_pci_tree_what_preflight_sees(
    server: Server, doctor: ModuleType, load_module: Callable[[str], ModuleType]
) -> None:
    """The doctor must run where no Ansible is, so that it has its own eyes."""
    preflight = load_module("roles/preflight/library/k80_host.py")
    attribute(DIES[0], "resource", "0x0 0x0 0x0\n0x0 0x0 0x0")(server)
    attribute(DIES[1], "device", "0x1db4")(server)
    found = doctor.look_at_pci(str(server.root), [BOARD])
    assert [*found["dies"]] == [die["pci_address"] for die in preflight.find_dies(str(server.root))]
    without = [die for die, state in found["dies"].items() if state["without_memory"]]
    assert without == preflight.look_at_pci(str(server.root))["without_memory"] == FIRST


def test_it_looks_for_modules_where_the_driver_s_role_does(
    server: Server,
    doctor: ModuleType,
    load_module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = load_module("roles/nvidia_driver/library/nvidia_driver_state.py")
    monkeypatch.setattr(driver, "MODULES", str(server.root / "lib/modules"))
    monkeypatch.setenv("PATH", str(server.bin), prepend=":")
    for left in ("kernel", "build", ""):
        seen = [*doctor.look_at_kernels(str(server.root), "nvidia")]
        assert seen == driver.installed_kernels()
        if left:
            path = server.root / "lib/modules" / KERNEL / left
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- metrics


def die_of(number: int) -> str:
    """A die's labels, as they are written."""
    return (
        f'pci_address="{DIES[number]}",uuid="{UUIDS[number]}",board="{BOARD}"'
        f',vllm_instance="die{number}"'
    )


def test_readings_are_told_in_base_units_by_what_names_the_die(server: Server) -> None:
    values = {"temperature__gpu": "61", "power__draw": "121.50", "memory__used": "2"}
    values |= {"clocks__current__graphics": "875", "utilization__gpu": "97"}
    values |= {"ecc__errors__uncorrected__volatile__total": "2", "retired_pages__pending": "Yes"}
    values |= {"clocks_throttle_reasons__active": "0x0000000000000044"}
    smi(1, **values)(server)
    xid(31, 31)(server)
    told = server.metrics("dies")
    die = die_of(1)
    assert {name: told[name] for name in told if die in name} == {
        f"k80_die_up{{{die}}}": 1,
        f"k80_die_temperature_celsius{{{die}}}": 61,
        f"k80_die_power_watts{{{die}}}": 121.5,
        f"k80_die_power_limit_watts{{{die}}}": 149,
        f'k80_die_clock_hertz{{{die},clock="graphics"}}': 875e6,
        f'k80_die_clock_hertz{{{die},clock="memory"}}': 0,
        f'k80_die_utilization_ratio{{{die},part="kernels"}}': 0.97,
        f'k80_die_utilization_ratio{{{die},part="memory"}}': 0,
        f"k80_die_memory_used_bytes{{{die}}}": 2 * 1024**2,
        f"k80_die_memory_bytes{{{die}}}": 0,
        f'k80_die_ecc_errors_total{{{die},bits="single"}}': 0,
        f'k80_die_ecc_errors_total{{{die},bits="double"}}': 2,
        f'k80_die_retired_pages{{{die},bits="single"}}': 0,
        f'k80_die_retired_pages{{{die},bits="double"}}': 0,
        f"k80_die_retired_pages_pending{{{die}}}": 1,
        f'k80_die_throttled{{{die},reason="hardware slowdown"}}': 0,
        f'k80_die_throttled{{{die},reason="software thermal slowdown"}}': 0,
        f'k80_die_throttled{{{die},reason="hardware thermal slowdown"}}': 1,
        f'k80_die_throttled{{{die},reason="power brake"}}': 0,
        f'k80_die_throttled{{{die},reason="power limit"}}': 1,
        f'k80_die_xids_total{{{die},xid="31"}}': 2,
        **{f'k80_die_xids_total{{{die},xid="{code}"}}': 0 for code in (48, 62, 64, 79)},
    }
    assert told["k80_driver_up{}"] == 1
    assert told[f'k80_driver_info{{version="{DRIVER}"}}'] == 1
    assert told['k80_doctor_limit{name="temperature_fail"}'] == 88
    assert f"k80_die_up{{{die_of(0)}}}" in told


def test_a_lost_die_keeps_its_name_and_has_no_readings(server: Server) -> None:
    rows = [", ".join(die[field] for field in server.fields) for die in server.smi]
    server.answer("nvidia-smi", LOST, 15)
    server.answer(f"nvidia-smi -i {DIES[0]}", rows[0] + "\n")
    told = server.metrics("dies")
    assert (told[f"k80_die_up{{{die_of(0)}}}"], told[f"k80_die_up{{{die_of(1)}}}"]) == (1, 0)
    assert told["k80_driver_up{}"] == 1
    assert f"k80_die_temperature_celsius{{{die_of(0)}}}" in told
    assert f"k80_die_temperature_celsius{{{die_of(1)}}}" not in told


@pytest.mark.parametrize("said", [MISMATCH, None])
def test_a_driver_that_is_silent_is_told_and_what_has_no_value_is_not(
    server: Server, said: str | None
) -> None:
    if said:
        server.answer("nvidia-smi", said, 18)
        told = server.metrics("dies")
        assert (told["k80_driver_up{}"], told[f"k80_die_up{{{die_of(0)}}}"]) == (0, 0)
    else:
        smi(0, temperature__gpu="[N/A]", retired_pages__pending="[N/A]")(server)
        told = server.metrics("dies")
        assert f"k80_die_temperature_celsius{{{die_of(0)}}}" not in told
        assert f"k80_die_retired_pages_pending{{{die_of(0)}}}" not in told


def test_verdicts_are_told_and_skipped_checks_are_not(server: Server) -> None:
    smi(1, temperature__gpu="83")(server)
    told = server.metrics("checks")
    assert told['k80_doctor_check{name="temperature"}'] == 1
    assert told['k80_doctor_check{name="ecc-errors"}'] == 0
    assert told[f"k80_doctor_die{{{die_of(0)}}}"] == 0
    assert told[f"k80_doctor_die{{{die_of(1)}}}"] == 1
    (server.answers / "nvidia-smi").unlink()
    smi(1, ecc__errors__uncorrected__volatile__total="1")(server)
    told = server.metrics("checks")
    assert told['k80_doctor_check{name="ecc-errors"}'] == 2
    server.answer("nvidia-smi", MISMATCH, 18)
    told = server.metrics("checks")
    assert told['k80_doctor_check{name="driver-match"}'] == 2
    assert 'k80_doctor_check{name="temperature"}' not in told


def test_a_file_of_metrics_is_replaced_as_a_whole(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "metrics" / "k80_dies.prom"
    file.parent.mkdir()
    file.write_text("old")
    before = file.stat().st_ino
    assert server.metrics("dies", "--output", str(file)) == {}
    assert file.stat().st_ino != before
    assert file.stat().st_mode & 0o777 == 0o644
    assert [*file.parent.iterdir()] == [file]
    assert file.read_text().startswith("# HELP k80_driver_up ")


def test_metrics_that_cannot_be_written_are_a_sentence(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "k80.prom"
    done = subprocess.run(
        [sys.executable, DOCTOR, "--root", server.root, "--metrics", "dies", "--output", file],
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"k80-doctor: {file} cannot be written: No such file or directory.\n"
    assert (done.returncode, done.stderr) == (3, told)


@pytest.mark.parametrize("arguments", [["--paint"], ["--timeout", "soon"], ["--output", "x"]])
def test_a_wrong_option_is_not_taken_for_a_failed_check(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, DOCTOR, *arguments], capture_output=True, check=False)
    assert done.returncode == 3


def test_remedies_are_one_sentence_each(doctor: ModuleType) -> None:
    for check in doctor.CHECKS:
        assert re.fullmatch(r"[A-Z`](?:[^.]|\.(?! ))*\.", check.remedy), check.remedy


def test_python_3_9_reads_it() -> None:
    """EL 9's and Debian 11's."""
    ast.parse(DOCTOR.read_text(), feature_version=(3, 9))


def test_the_page_is_what_the_checks_say(doctor: ModuleType) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert page == doctor.markdown() + "\n", "run: make docs"


# ---- which dies are given requests


@pytest.mark.parametrize(
    ("fault", "second", "first"),
    [
        (lambda _: None, (0, ""), (0, "")),
        # What is wrong with a server, or slows a die down, makes nothing that it computes wrong.
        (smi(1, temperature__gpu="95"), (0, ""), (0, "")),
        (smi(1, retired_pages__pending="Yes"), (0, ""), (0, "")),
        (uncalled("docker"), (0, ""), (0, "")),
        (
            smi(1, ecc__errors__uncorrected__volatile__total="2"),
            (2, f"ecc-errors: die {DIES[1]} has had 2 double-bit ECC errors"),
            (0, ""),
        ),
        (
            xid(62),
            (2, f"xid: die {DIES[1]} reported Xid 62 (micro-controller halted)"),
            (0, ""),
        ),
        (xid(13), (0, ""), (0, "")),
        # Pages that wait for a boot explain that they were retired, and not that one could not be.
        (both(smi(1, retired_pages__pending="Yes"), xid(63)), (0, ""), (0, "")),
        (
            both(smi(1, retired_pages__pending="Yes"), xid(64)),
            (2, f"xid: die {DIES[1]} reported Xid 64 (page could not be retired)"),
            (0, ""),
        ),
        # What one die has done is not held against another that is told of beside it.
        (
            answer(
                "journalctl",
                "NVRM: Xid (PCI:0000:06:00): 79, it fell\nNVRM: Xid (PCI:0000:05:00): 31, a fault",
            ),
            (2, f"xid: die {DIES[1]} reported Xid 79 (fallen off the bus)"),
            (0, ""),
        ),
        # A driver that says nothing says nothing of a die.
        (
            answer("nvidia-smi", MISMATCH, 18),
            (1, "die-lost: because of driver-match"),
            (1, "die-lost: because of driver-match"),
        ),
    ],
    ids=[
        *("well", "hot", "pages", "no docker", "ecc", "xid", "other xid", "page retired"),
        *("page not retired", "the other's xid", "silent driver"),
    ],
)
def test_a_die_that_may_compute_wrongly_is_not_to_be_trusted(
    server: Server, fault: Fault, second: tuple[int, str], first: tuple[int, str]
) -> None:
    fault(server)
    for uuid, (code, said) in zip(UUIDS, (first, second), strict=True):
        done = server.run("--dies", uuid)
        assert (done.returncode, done.stdout[: len(said)], bool(done.stdout)) == (
            code,
            said,
            bool(said),
        )
    both_dies = server.run("--dies", *UUIDS)
    assert both_dies.returncode == second[0]


def test_a_die_that_is_lost_is_not_to_be_trusted_and_an_unknown_one_is_not_judged(
    server: Server,
) -> None:
    server.answer("nvidia-smi", LOST, 15)
    rows = [server.smi[0][field] for field in server.fields]
    server.answer(f"nvidia-smi -i {DIES[0]}", ", ".join(rows) + "\n")
    server.answer(f"nvidia-smi -i {DIES[1]}", LOST, 15)
    assert server.run("--dies", UUIDS[0]).returncode == 0
    done = server.run("--dies", UUIDS[1])
    assert done.returncode == 2
    assert done.stdout.startswith(f"die-lost: the driver has lost die {DIES[1]}")
    done = server.run("--dies", "GPU-none")
    assert (done.returncode, done.stdout) == (1, "no die is known by the UUID GPU-none\n")


def test_a_kernel_log_that_is_not_read_in_time_lets_no_die_in_again(server: Server) -> None:
    (server.answers / "journalctl.sleep").write_text("60")
    done = server.run("--timeout", "2", "--dies", UUIDS[0])
    assert done.returncode == 1
    assert done.stdout.startswith("no answer within 2 s")


def test_status_says_why_the_doctor_keeps_requests_away(server: Server) -> None:
    with_units(server)
    server.file("var/lib/vllm-k80/instances/die1/drained-by-doctor", "xid: die 6 reported 48\n")
    first, second = status(server)
    assert (first["state"], first["why"]) == ("ready", "")
    assert (second["state"], second["why"]) == ("drained by k80-doctor", "xid: die 6 reported 48")


def test_that_requests_are_kept_away_is_told_by_the_check_that_has_failed(server: Server) -> None:
    server.file("var/lib/vllm-k80/instances/die1/drained-by-doctor", "xid: die 6 reported 48\n")
    _, report = server.examine()
    assert told(report) == {}


# ---- status

SHOW = "systemctl show --property=ActiveState,SubState,StateChangeTimestampMonotonic"


def with_units(server: Server) -> None:
    """Instances as k80-instance knows them, which have been so for a minute."""
    for number, uuid in enumerate(UUIDS):
        name = f"vllm-k80-die{number}"
        port = server.declared["instances"][number]["port"]
        settings = f"Address=127.0.0.1\nPort={port}\nDies={uuid}\nImage={IMAGE}\nModel=tiny\n"
        server.file(f"etc/systemd/system/{name}.service", f"[Unit]\n\n[X-K80]\n{settings}")
        server.file(f"etc/systemd/system/{name}-liveness.timer", "")
    since = int((time.monotonic() - 60) * 1e6)
    state = f"ActiveState=active\nSubState=running\nStateChangeTimestampMonotonic={since}\n"
    server.answer(SHOW, state)


def status(server: Server) -> list[dict[str, Any]]:
    done = server.run("--status", "--json", "--timeout", "6")
    assert done.returncode == 0
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_status_tells_what_each_die_serves(server: Server) -> None:
    with_units(server)
    server.file("var/lib/vllm-k80/instances/die1/drained", "operator\n")
    first, second = status(server)
    assert first.pop("tokens_per_second") > 0
    assert time.time() - first.pop("since") == pytest.approx(60, abs=10)
    assert first.pop("host")
    assert first == {
        "die": DIES[0],
        "uuid": UUIDS[0],
        "instance": "die0",
        "model": "tiny",
        "image": IMAGE,
        "state": "ready",
        "why": "",
        "kv_cache": 0.25,
        "temperature": 38,
    }
    assert (second["instance"], second["state"]) == ("die1", "drained by operator")
    assert time.time() - second["since"] < 30


def test_status_divides_the_tokens_by_the_time_that_they_took(
    doctor: ModuleType, instances: tuple[int, type[Ready]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = iter((100.0, 102.5))
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: next(answered), sleep=slept.append)
    monkeypatch.setattr(doctor, "time", clock)
    load = doctor.look_at_load("127.0.0.1", instances[0])
    assert (load["tokens_per_second"], load["kv_cache"]) == (16, 0.25)  # 40 tokens
    assert slept == [doctor.SAMPLE_SECONDS]


def test_status_of_dies_that_are_lost_and_instances_that_do_not_generate(
    server: Server, instances: tuple[int, type[Ready]]
) -> None:
    with_units(server)
    instances[1].status, instances[1].content = 503, b'{"reason": "the last proof is 400 s old"}'
    server.answer("nvidia-smi", LOST, 15)
    rows = [server.smi[0][field] for field in server.fields]
    server.answer(f"nvidia-smi -i {DIES[0]}", ", ".join(rows) + "\n")
    server.answer(f"nvidia-smi -i {DIES[1]}", LOST, 15)
    first, second = status(server)
    assert (first["state"], first["since"], first["temperature"]) == ("not ready", None, 38)
    assert first["why"].endswith("/ready: the last proof is 400 s old")
    assert (second["state"], second["temperature"]) == ("die lost", None)
    assert second["uuid"] == UUIDS[1]


def test_status_where_site_yml_has_never_run(server: Server, doctor: ModuleType) -> None:
    server.declared = {}
    rows = status(server)
    assert [(row["die"], row["uuid"], row["state"]) for row in rows] == [
        (die, uuid, "no instance") for die, uuid in zip(DIES, UUIDS, strict=True)
    ]
    lines = doctor.status_table(rows).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["HOST", "DIE", "UUID"],
        *([row["host"], die, uuid[:12]] for row, die, uuid in zip(rows, DIES, UUIDS, strict=True)),
    ]


@pytest.mark.parametrize(
    ("unit", "load", "state", "why"),
    [
        (None, None, "unknown", "no answer within 5 s"),
        ({"state": "stopped"}, None, "stopped", ""),
        ({"state": "active"}, None, "not ready", "it has no address"),
        ({"state": "active"}, "silent", "not ready", "no answer within 5 s"),
        ({"state": "active"}, {"ready": True}, "ready", ""),
        ({"state": "active", "drained": "update"}, {"ready": True}, "drained by update", ""),
        (
            {"state": "active", "drained": "k80-doctor", "why": "xid: 48"},
            {"ready": True},
            "drained by k80-doctor",
            "xid: 48",
        ),
    ],
)
def test_status_has_a_word_for_each_state(
    doctor: ModuleType, unit: dict[str, Any] | None, load: Any, state: str, why: str
) -> None:
    silent = doctor.SilentError("no answer within 5 s")
    whole = unit and {"settings": {"Model": "m"}, "drained": "", "why": "", "since": 1.0} | unit
    loads = {"die0": silent if load == "silent" else load} if load else {}
    row = doctor.instance_row({"die0": whole or silent}, loads, "die0")
    assert (row["state"], row["why"]) == (state, why)
    # A word of why stands below the table, which shows a dash where nothing is known.
    table = doctor.status_table([{"host": "server1", "die": "", **row}])
    assert ("server1 die0: " + why in table) == bool(why)
    assert table.splitlines()[1].split()[:2] == ["server1", "-"]


def test_the_fleet_has_a_row_for_each_host(load_module: Callable[[str], ModuleType]) -> None:
    filters = load_module("roles/doctor/filter_plugins/doctor.py")
    row = {"host": "its own name", "die": DIES[0], "state": "ready", "instance": "die0"}
    rows = filters.status_rows(
        {
            "server1": {"rc": 0, "stdout": json.dumps([row])},
            "server2": {"unreachable": True, "msg": "Task failed: ssh: no route to host"},
            "server3": {"rc": 127, "stdout": "", "stderr": "sh: 1:\npython3: not found\n"},
            "server4": {"rc": 0, "stdout": "[]"},
        }
    )
    assert [(row["host"], row["state"], row.get("why")) for row in rows] == [
        ("server1", "ready", None),
        ("server2", "unreachable", "ssh: no route to host"),
        ("server3", "unknown", "python3: not found"),
        ("server4", "no dies", "there is no Tesla K80 in its PCI tree"),
    ]
    lines = filters.status_table(rows).splitlines()
    assert lines[0].startswith("HOST     DIE           UUID")
    assert lines[2].split()[:2] == ["server2", "-"]
    assert "server2: ssh: no route to host" in lines
