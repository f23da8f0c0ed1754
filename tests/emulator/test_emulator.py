"""The emulated K80's own parts: nvidia-smi, the container runtime, the PCI tree."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOTFS = Path(__file__).resolve().parents[2] / "files" / "emulator" / "rootfs"
UUIDS = [
    "GPU-4f0a2c1e-7d35-4b9a-8e61-c2a5d0937b14",
    "GPU-b7e61d93-05fa-4c28-9b47-1f8d3ea260c5",
]
CONTROL = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]


class Emulator:
    """A copy of the emulator's files and of a driver's device nodes, for one test."""

    def __init__(self, directory: Path) -> None:
        self.state, self.dev = directory / "state", directory / "dev"
        shutil.copytree(ROOTFS / "etc" / "k80-emulator", self.state)
        self.dev.mkdir()
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
            # What matters is that a character device is there; its numbers need root.
            (self.dev / name).symlink_to("/dev/null")
        runc = directory / "bin" / "runc"
        runc.parent.mkdir()
        runc.write_text('#!/bin/sh\necho runc "$@"\n')
        runc.chmod(0o755)
        self.environment = os.environ | {
            "K80_EMULATOR_STATE": str(self.state),
            "K80_EMULATOR_DEV": str(self.dev),
            "PATH": f"{runc.parent}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def die(self, number: int) -> Path:
        return self.state / "dies" / ("0000:05:00.0", "0000:06:00.0")[number]

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOTFS / "usr" / "bin" / program, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def smi(self, *arguments: str) -> tuple[int, list[str]]:
        result = self.run("nvidia-smi", *arguments)
        assert result.stderr == ""
        return result.returncode, result.stdout.splitlines()


@pytest.fixture
def emulator(tmp_path: Path) -> Emulator:
    return Emulator(tmp_path)


# ---- nvidia-smi


def test_list(emulator: Emulator) -> None:
    assert emulator.smi("-L") == (
        0,
        [f"GPU {index}: Tesla K80 (UUID: {uuid})" for index, uuid in enumerate(UUIDS)],
    )


def test_query_as_the_roles_ask_it(emulator: Emulator) -> None:
    fields = "--query-gpu=pci.bus_id,uuid,memory.total,driver_version"
    assert emulator.smi(fields, "--format=csv,noheader") == (
        0,
        [
            f"00000000:05:00.0, {UUIDS[0]}, 11441 MiB, 470.256.02",
            f"00000000:06:00.0, {UUIDS[1]}, 11441 MiB, 470.256.02",
        ],
    )


def test_header_names_the_unit_and_the_whole_field(emulator: Emulator) -> None:
    status, lines = emulator.smi(
        "--query-gpu=gpu_name,clocks.sm,power.draw", "--format=csv,nounits", "-i", "1"
    )
    assert (status, lines) == (
        0,
        ["name, clocks.current.sm [MHz], power.draw [W]", "Tesla K80, 324, 26.62"],
    )


@pytest.mark.parametrize("name", ["1", UUIDS[1], "00000000:06:00.0", "0000:06:00.0", "06:00.0"])
def test_a_die_is_named_by_index_uuid_or_bus_id(emulator: Emulator, name: str) -> None:
    assert emulator.smi("--query-gpu=uuid", "--format=csv,noheader", "-i", name) == (0, [UUIDS[1]])


def test_every_line_of_the_table_is_as_wide_as_its_frame(emulator: Emulator) -> None:
    status, lines = emulator.smi()
    assert status == 0
    assert {len(line) for line in lines[1:]} == {79}
    assert sum("Tesla K80" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--query-gpu=colour", "--format=csv"],
            2,
            'Field "colour" is not a valid field to query.',
        ),
        (
            ["--query-gpu=uuid"],
            2,
            '"--format=" switch is missing. At least "csv" format must be specified.',
        ),
        (
            ["--paint"],
            2,
            "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.",
        ),
        (["-i", "2"], 6, "No devices were found"),
    ],
)
def test_refusals(emulator: Emulator, arguments: list[str], status: int, message: str) -> None:
    result = emulator.smi(*arguments)
    assert (result[0], result[1][0]) == (status, message)


def test_a_file_overrides_a_value(emulator: Emulator) -> None:
    (emulator.die(0) / "temperature.gpu").write_text("95\n")
    (emulator.die(0) / "memory.used").write_text("11000\n")
    status, lines = emulator.smi("--query-gpu=temperature.gpu,memory.free", "--format=csv,noheader")
    assert (status, lines) == (0, ["95, 441 MiB", "38, 11438 MiB"])


def test_only_what_has_a_node_is_seen(emulator: Emulator) -> None:
    (emulator.dev / "nvidia0").unlink()
    assert emulator.smi("-L") == (0, [f"GPU 0: Tesla K80 (UUID: {UUIDS[1]})"])


def test_no_driver(emulator: Emulator) -> None:
    (emulator.dev / "nvidiactl").unlink()
    status, lines = emulator.smi()
    assert status == 9
    assert lines[0].startswith("NVIDIA-SMI has failed because it couldn't communicate")


def test_a_die_that_fell_off_the_bus(emulator: Emulator) -> None:
    (emulator.die(1) / "lost").touch()
    assert emulator.smi("-i", "0", "-L")[0] == 0
    status, lines = emulator.smi("-L")
    assert status == 15
    assert "0000:06:00.0: GPU is lost" in lines[0]


def test_an_injected_exit_code(emulator: Emulator) -> None:
    fault = emulator.state / "nvidia-smi"
    fault.mkdir()
    (fault / "exit_code").write_text("18\n")
    (fault / "message").write_text("Failed to initialize NVML: Driver/library version mismatch\n")
    assert emulator.smi("-L") == (
        18,
        ["Failed to initialize NVML: Driver/library version mismatch"],
    )


# ---- the container runtime


def create(
    emulator: Emulator, directory: Path, *environment: str
) -> tuple[int, dict[str, Any], str]:
    """Has the runtime make a container with this environment: exit status, configuration, log."""
    config, log = directory / "config.json", directory / "log.json"
    deny = {"allow": False, "access": "rwm"}
    config.write_text(
        json.dumps(
            {
                "process": {"env": ["PATH=/bin", *environment]},
                "linux": {"resources": {"devices": [deny]}},
            }
        )
    )
    result = emulator.run(
        "nvidia-container-runtime", "--log", str(log), "create", "--bundle", str(directory), "name"
    )
    if result.returncode == 0:
        assert result.stdout.startswith("runc --log"), result.stdout
    return (
        result.returncode,
        json.loads(config.read_text()),
        log.read_text() if log.exists() else "",
    )


def nodes(config: dict[str, Any]) -> list[str]:
    devices = config["linux"].get("devices", [])
    rules = config["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    # Each node comes with the rule that lets it be opened, and no rule comes without a node.
    assert len(rules) - 1 == len(devices)
    assert all(rule["access"] == "rw" for rule in rules[1:])
    return [device["path"] for device in devices]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (UUIDS[0], ["/dev/nvidia0", *CONTROL]),
        (UUIDS[1], ["/dev/nvidia1", *CONTROL]),
        (",".join(UUIDS), ["/dev/nvidia0", "/dev/nvidia1", *CONTROL]),
        ("1", ["/dev/nvidia1", *CONTROL]),
        ("all", ["/dev/nvidia0", "/dev/nvidia1", *CONTROL]),
        ("none", CONTROL),
        ("void", []),
        ("", []),
        (None, []),
    ],
)
def test_visible_devices(
    emulator: Emulator, tmp_path: Path, wanted: str | None, expected: list[str]
) -> None:
    environment = [] if wanted is None else [f"NVIDIA_VISIBLE_DEVICES={wanted}"]
    status, config, _ = create(emulator, tmp_path, *environment)
    assert status == 0
    assert nodes(config) == expected
    mounts = config.get("mounts", [])
    assert bool(mounts) == bool(expected)
    assert all("ro" in mount["options"] for mount in mounts)


def test_nvidia_smi_is_a_capability_of_its_own(emulator: Emulator, tmp_path: Path) -> None:
    _, config, _ = create(
        emulator, tmp_path, "NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute"
    )
    assert "mounts" not in config


def test_an_unknown_device_is_refused_by_name(emulator: Emulator, tmp_path: Path) -> None:
    status, config, log = create(emulator, tmp_path, "NVIDIA_VISIBLE_DEVICES=GPU-0")
    assert status == 1
    assert nodes(config) == []
    assert json.loads(log)["msg"] == "nvidia-container-cli: device error: GPU-0: unknown device"


def test_a_missing_uvm_node_does_not_stop_a_container(emulator: Emulator, tmp_path: Path) -> None:
    """As after a boot without nvidia-modprobe: nvidia-smi works in there, CUDA would not."""
    (emulator.dev / "nvidia-uvm").unlink()
    status, config, _ = create(emulator, tmp_path, f"NVIDIA_VISIBLE_DEVICES={UUIDS[0]}")
    assert status == 0
    assert "/dev/nvidia-uvm" not in nodes(config)


def test_other_commands_pass_through(emulator: Emulator) -> None:
    result = emulator.run("nvidia-container-runtime", "--root", "/run/x", "kill", "name", "TERM")
    assert (result.returncode, result.stdout) == (0, "runc --root /run/x kill name TERM\n")


# ---- the PCI tree


@pytest.fixture(scope="module")
def plug_in() -> ModuleType:
    library = ROOTFS / "usr" / "lib" / "k80-emulator"
    sys.path.insert(0, str(library))
    os.environ["K80_EMULATOR_STATE"] = str(ROOTFS / "etc" / "k80-emulator")
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader = SourceFileLoader("plug_in", str(library / "plug-in"))
        module = ModuleType("plug_in")
        sys.modules["plug_in"] = module  # where dataclass looks for it
        loader.exec_module(module)
    finally:
        sys.path.remove(str(library))
        del os.environ["K80_EMULATOR_STATE"]
        sys.dont_write_bytecode = before
    return module


def test_a_die_hangs_below_its_boards_switch(plug_in: ModuleType) -> None:
    first, second = (plug_in.functions(die) for die in plug_in.dies())
    assert [function.address for function in first] == [
        "0000:00:0f.0",
        "0000:03:00.0",
        "0000:04:08.0",
        "0000:05:00.0",
    ]
    # One board: the same switch above both.
    assert first[1].path == second[1].path
    assert (first[1].vendor, first[1].device) == (0x10B5, 0x8747)
    assert (first[3].vendor, first[3].device, first[3].pci_class) == (0x10DE, 0x102D, 0x030200)


def test_sysfs_files_and_configuration_space_agree(plug_in: ModuleType, tmp_path: Path) -> None:
    die = plug_in.functions(plug_in.dies()[0])[-1]
    die.write(tmp_path, "1", "8-15", (0, 0))
    directory = tmp_path / die.path
    assert (directory / "numa_node").read_text() == "1\n"
    assert (directory / "local_cpulist").read_text() == "8-15\n"
    space = (directory / "config").read_bytes()
    assert struct.unpack_from("<HH", space) == (0x10DE, 0x102D)
    regions = [line.split() for line in (directory / "resource").read_text().splitlines()]
    start, end = (int(word, 16) for word in regions[1][:2])
    assert end - start + 1 == 16 << 30
    low, high = struct.unpack_from("<II", space, 0x14)
    assert (high << 32 | low & ~0xF) == start
