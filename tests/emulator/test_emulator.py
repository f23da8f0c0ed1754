"""The emulated K80's own parts: nvidia-smi and -modprobe, the container toolkit, the PCI tree."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from made_up_host import rules_against

ROOTFS = Path(__file__).resolve().parents[2] / "files" / "emulator" / "rootfs"
LIBRARY = ROOTFS / "usr" / "lib" / "k80-emulator"
UUIDS = [
    "GPU-4f0a2c1e-7d35-4b9a-8e61-c2a5d0937b14",
    "GPU-b7e61d93-05fa-4c28-9b47-1f8d3ea260c5",
]
CONTROL = {"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"}


class Emulator:
    """A copy of the emulator's files and of a driver's device nodes, for one test."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state, self.dev = directory, directory / "state", directory / "dev"
        self.settings, self.libraries = directory / "run", directory / "lib"
        shutil.copytree(ROOTFS / "etc" / "k80-emulator", self.state)
        self.dev.mkdir()
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
            # What matters is that a character device is there; its numbers need root.
            (self.dev / name).symlink_to("/dev/null")
        self.bin = directory / "bin"
        self.bin.mkdir()
        smi = ROOTFS / "usr" / "local" / "bin" / "nvidia-smi"
        for name, script in (("runc", 'echo runc "$@"'), ("nvidia-smi", f'{smi} "$@"')):
            (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
            (self.bin / name).chmod(0o755)
        self.environment = os.environ | {
            "K80_EMULATOR_STATE": str(self.state),
            "K80_EMULATOR_RUN": str(self.settings),
            "K80_EMULATOR_DEV": str(self.dev),
            "K80_EMULATOR_LIBRARIES": str(self.libraries),
            "XDG_CONFIG_HOME": str(directory / "etc"),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(LIBRARY),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def die(self, number: int) -> Path:
        return self.state / "dies" / ("0000:05:00.0", "0000:06:00.0")[number]

    @staticmethod
    def programs(name: str) -> Path:
        directories = (ROOTFS / "usr" / "local" / "bin", ROOTFS.parent / "toolkit")
        return next(path / name for path in directories if (path / name).exists())

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, self.programs(program), *arguments],
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


def test_what_computes_is_what_its_die_s_file_says(emulator: Emulator) -> None:
    query = ("--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader")
    assert emulator.smi(*query) == (0, [])
    (emulator.die(1) / "processes").write_text("12 34\n")
    assert emulator.smi(*query) == (0, [f"{UUIDS[1]}, 12", f"{UUIDS[1]}, 34"])
    assert emulator.smi("--query-compute-apps=pid", "--format=csv") == (0, ["pid", "12", "34"])


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


def test_a_driver_that_takes_its_time(emulator: Emulator) -> None:
    fault = emulator.state / "nvidia-smi"
    fault.mkdir()
    (fault / "seconds").write_text("0.3\n")
    started = time.monotonic()
    assert emulator.smi("-L")[0] == 0
    assert time.monotonic() - started > 0.3


@pytest.mark.parametrize("place", ["state", "settings"])
def test_a_fault_of_nvidia_smi_may_lie_where_a_boot_forgets_it(
    emulator: Emulator, place: str
) -> None:
    fault = getattr(emulator, place) / "nvidia-smi"
    fault.mkdir(parents=True)
    (fault / "exit_code").write_text("9\n")
    assert emulator.smi("-L") == (9, [""])


# ---- nvidia-smi sets


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="nvidia-smi lets only root set")
GPU1 = "00000000:06:00.0"


@as_root
@pytest.mark.parametrize(
    ("arguments", "said", "field", "now"),
    [
        (
            ["-pm", "0"],
            f"Disabled persistence mode for GPU {GPU1}.",
            "persistence_mode",
            "Disabled",
        ),
        (
            ["-pm", "1"],
            f"Persistence mode is already Enabled for GPU {GPU1}.",
            "persistence_mode",
            "Enabled",
        ),
        (
            ["-ac", "2505,875"],
            f'Applications clocks set to "(MEM 2505, SM 875)" for GPU {GPU1}',
            "clocks.applications.graphics",
            "875 MHz",
        ),
        (
            ["-c", "EXCLUSIVE_PROCESS"],
            f"Set compute mode to EXCLUSIVE_PROCESS for GPU {GPU1}.",
            "compute_mode",
            "Exclusive_Process",
        ),
        (
            ["-pl", "130"],
            f"Power limit for GPU {GPU1} was set to 130.00 W from 149.00 W.",
            "power.limit",
            "130.00 W",
        ),
    ],
)
def test_a_setting_holds_for_the_die_that_it_names(
    emulator: Emulator, arguments: list[str], said: str, field: str, now: str
) -> None:
    query = (f"--query-gpu={field}", "--format=csv,noheader", "-i")
    other = emulator.smi(*query, "0")
    status, lines = emulator.smi(*arguments, "-i", "1")
    assert (status, lines[0], lines[-1]) == (0, said, "All done.")
    assert emulator.smi(*query, "1") == (0, [now])
    assert emulator.smi(*query, "0") == other


@as_root
def test_a_boot_forgets_what_was_set_but_for_ecc(
    emulator: Emulator, plug_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = "clocks.applications.graphics,ecc.mode.current,ecc.mode.pending"
    query = (f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0")
    emulator.smi("-ac", "2505,875")
    status, lines = emulator.smi("-e", "0")
    assert (status, lines[-2:]) == (0, ["All done.", "Reboot required."])
    assert emulator.smi(*query) == (0, ["875, Enabled, Disabled"])
    shutil.rmtree(emulator.settings)
    monkeypatch.setattr(sys.modules["k80_dies"], "STATE", emulator.state)
    plug_in.apply_ecc()
    assert emulator.smi(*query) == (0, ["562, Disabled, Disabled"])


@as_root
def test_a_card_that_does_not_do_what_it_is_told(emulator: Emulator) -> None:
    (emulator.die(0) / "clocks.applications.graphics").write_text("562\n")
    assert emulator.smi("-ac", "2505,875")[0] == 0
    assert emulator.smi(
        "--query-gpu=clocks.applications.graphics", "--format=csv,noheader,nounits"
    ) == (0, ["562", "875"])


@as_root
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-ac", "2505,900"], 'Specified clock combination "(MEM 2505, SM 900)" is not supported'),
        (["-pl", "300"], "Provided power limit 300.00 W is not a valid power limit"),
        (["-c", "7"], "Invalid combination of input arguments."),
        (["-pm", "1", "-e", "1"], "Invalid combination of input arguments."),
    ],
)
def test_a_setting_that_the_card_has_not(
    emulator: Emulator, arguments: list[str], message: str
) -> None:
    status, lines = emulator.smi(*arguments)
    assert status == 2
    assert lines[0].startswith(message)
    assert not emulator.settings.exists()


# ---- nvidia-modprobe


def test_the_nodes_of_unified_memory(emulator: Emulator) -> None:
    for name in ("nvidia-uvm", "nvidia-uvm-tools"):
        (emulator.dev / name).unlink()
    result = emulator.run("nvidia-modprobe", "-u", "-c=0")
    if os.geteuid() == 0:
        assert result.returncode == 0, result.stderr
        assert (emulator.dev / "nvidia-uvm").is_char_device()
        assert (emulator.dev / "nvidia-uvm-tools").is_char_device()


def test_no_module_without_a_card(emulator: Emulator) -> None:
    shutil.rmtree(emulator.state / "dies")
    assert emulator.run("nvidia-modprobe", "-u", "-c=0").returncode == 1


# ---- the container toolkit


def configure(emulator: Emulator, mode: str) -> None:
    """As the package and the role do; the directories of the specifications are this test's."""
    assert emulator.run("nvidia-ctk", "config", "--in-place").returncode == 0
    result = emulator.run(
        "nvidia-ctk", "config", "--in-place", "--set", f"nvidia-container-runtime.mode={mode}"
    )
    assert result.returncode == 0, result.stderr
    file = emulator.directory / "etc" / "nvidia-container-runtime" / "config.toml"
    file.write_text(file.read_text().replace("/var/run/cdi", str(emulator.directory / "cdi")))


def generate(emulator: Emulator) -> dict[str, Any]:
    path = emulator.directory / "cdi" / "nvidia.yaml"
    result = emulator.run("nvidia-ctk", "cdi", "generate", f"--output={path}")
    assert result.returncode == 0, result.stderr
    spec: dict[str, Any] = yaml.safe_load(path.read_text())
    return spec


def create(emulator: Emulator, *environment: str) -> tuple[int, dict[str, Any], str]:
    """Has the runtime make a container with this environment: exit status, configuration, log."""
    config, log = emulator.directory / "config.json", emulator.directory / "log.json"
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
        "nvidia-container-runtime", "--log", str(log), "create", "--bundle", str(config.parent), "x"
    )
    if result.returncode == 0:
        assert result.stdout.startswith("runc --log"), result.stdout
    return (
        result.returncode,
        json.loads(config.read_text()),
        json.loads(log.read_text())["msg"] if log.exists() else "",
    )


def nodes(config: dict[str, Any]) -> set[str]:
    devices = config["linux"].get("devices", [])
    rules = config["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    # Each node comes with the rule that lets it be opened, and no rule comes without a node.
    assert len(rules) - 1 == len(devices)
    assert all(rule["allow"] for rule in rules[1:])
    return {Path(device["path"]).name for device in devices}


REFUSED = (
    "could not apply required modification to OCI specification: error modifying OCI spec: "
    "failed to inject CDI devices: "
)


@pytest.fixture
def cdi(emulator: Emulator) -> Emulator:
    configure(emulator, "cdi")
    generate(emulator)
    return emulator


def test_setting_the_mode_leaves_the_rest_as_it_is(emulator: Emulator) -> None:
    before = emulator.run("nvidia-ctk", "config").stdout.splitlines()
    after = emulator.run(
        "nvidia-ctk", "config", "--set", "nvidia-container-runtime.mode=cdi"
    ).stdout.splitlines()
    assert [pair for pair in zip(before, after, strict=True) if len(set(pair)) == 2] == [
        ('mode = "auto"', 'mode = "cdi"')
    ]
    unknown = emulator.run("nvidia-ctk", "config", "--set", "nvidia-container-runtime.colour=red")
    assert unknown.returncode == 1
    assert "invalid config option" in unknown.stderr


def test_the_specification_names_dies_nodes_and_the_drivers_libraries(emulator: Emulator) -> None:
    library = emulator.libraries / "nvidia" / "libcuda.so.470.256.02"
    library.parent.mkdir(parents=True)
    library.touch()
    (library.parent / "libcuda.so.535.1").touch()
    (emulator.dev / "nvidia-uvm").unlink()
    spec = generate(emulator)
    assert spec["kind"] == "nvidia.com/gpu"
    assert {device["name"] for device in spec["devices"]} == {"0", "1", *UUIDS, "all"}
    common = spec["containerEdits"]
    # The real one, too, leaves out what is not there.
    names = [Path(node["path"]).name for node in common["deviceNodes"]]
    assert names == ["nvidia-uvm-tools", "nvidiactl"]
    mounted = [mount["hostPath"] for mount in common["mounts"]]
    assert [path for path in mounted if "libcuda" in path] == [str(library)]
    listed = emulator.run("nvidia-ctk", "cdi", "list", f"--spec-dir={emulator.directory}/cdi")
    assert f"nvidia.com/gpu={UUIDS[1]}\n" in listed.stdout


def test_no_specification_without_a_driver(emulator: Emulator) -> None:
    (emulator.dev / "nvidiactl").unlink()
    result = emulator.run("nvidia-ctk", "cdi", "generate")
    assert (result.returncode, result.stdout) == (1, "")
    assert "couldn't communicate with the NVIDIA driver" in result.stderr


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (UUIDS[0], {"nvidia0", *CONTROL}),
        (UUIDS[1], {"nvidia1", *CONTROL}),
        (",".join(UUIDS), {"nvidia0", "nvidia1", *CONTROL}),
        ("1", {"nvidia1", *CONTROL}),
        ("all", {"nvidia0", "nvidia1", *CONTROL}),
        ("void", set()),
        ("", set()),
        (None, set()),
    ],
)
def test_visible_devices(cdi: Emulator, wanted: str | None, expected: set[str]) -> None:
    environment = [] if wanted is None else [f"NVIDIA_VISIBLE_DEVICES={wanted}"]
    status, config, log = create(cdi, *environment)
    assert status == 0, log
    assert nodes(config) == expected
    mounts = config.get("mounts", [])
    assert bool(mounts) == bool(expected)
    assert all("ro" in mount["options"] for mount in mounts)


@pytest.mark.parametrize(("wanted", "name"), [("GPU-0", "GPU-0"), ("none", "")])
def test_an_unknown_device_is_refused_by_name(cdi: Emulator, wanted: str, name: str) -> None:
    status, config, log = create(cdi, f"NVIDIA_VISIBLE_DEVICES={wanted}")
    assert status == 1
    assert nodes(config) == set()
    assert log == f"{REFUSED}unresolvable CDI devices nvidia.com/gpu={name}"


def test_a_stale_specification_is_refused(cdi: Emulator) -> None:
    (cdi.dev / "nvidia1").unlink()
    status, _, log = create(cdi, f"NVIDIA_VISIBLE_DEVICES={UUIDS[1]}")
    assert status == 1
    assert log == (
        f"{REFUSED}failed to inject devices: failed to stat CDI host device "
        f'"{cdi.dev}/nvidia1": no such file or directory'
    )


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_the_legacy_mode_leaves_it_to_a_hook(emulator: Emulator, mode: str) -> None:
    configure(emulator, mode)
    status, config, log = create(emulator, f"NVIDIA_VISIBLE_DEVICES={UUIDS[0]}")
    assert status == 0, log
    assert nodes(config) == set()
    assert [hook["path"] for hook in config["hooks"]["prestart"]] == [
        "/usr/bin/nvidia-container-runtime-hook"
    ]


def test_other_commands_pass_through(emulator: Emulator) -> None:
    result = emulator.run("nvidia-container-runtime", "--root", "/run/x", "kill", "name", "TERM")
    assert (result.returncode, result.stdout) == (0, "runc --root /run/x kill name TERM\n")


# ---- the PCI tree


@pytest.fixture(scope="module")
def plug_in() -> ModuleType:
    sys.path.insert(0, str(LIBRARY))
    os.environ["K80_EMULATOR_STATE"] = str(ROOTFS / "etc" / "k80-emulator")
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader = SourceFileLoader("plug_in", str(LIBRARY / "plug-in"))
        module = ModuleType("plug_in")
        sys.modules["plug_in"] = module  # where dataclass looks for it
        loader.exec_module(module)
    finally:
        sys.path.remove(str(LIBRARY))
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


def test_the_rules_that_take_dies_off_the_bus_are_heeded(
    plug_in: ModuleType, tmp_path: Path
) -> None:
    """Those that the role nvidia_driver writes, and no others."""
    assert plug_in.ruled_off(tmp_path) == []
    (tmp_path / "40-k80.rules").write_text(rules_against("0000:06:00.0", "0000:8a:00.0"))
    (tmp_path / "50-other.rules").write_text(
        '# ACTION=="add", KERNEL=="0000:01:00.0", ATTR{remove}="1"\n'
        'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="0000:02:00.0", ATTR{power/control}="auto"\n'
    )
    assert plug_in.ruled_off(tmp_path) == ["0000:06:00.0", "0000:8a:00.0"]


def test_a_die_that_is_off_the_bus_is_not_there_for_anybody(emulator: Emulator) -> None:
    removed = emulator.settings / "removed"
    removed.mkdir(parents=True)
    (removed / "0000:05:00.0").write_text("1\n")
    assert emulator.smi("-L") == (0, [f"GPU 0: Tesla K80 (UUID: {UUIDS[1]})"])
    assert {device["name"] for device in generate(emulator)["devices"]} == {"0", UUIDS[1], "all"}
    (removed / "0000:05:00.0").unlink()
    (emulator.settings / "ruled-off").write_text("0000:06:00.0\n")
    assert emulator.smi("-L") == (0, [f"GPU 0: Tesla K80 (UUID: {UUIDS[0]})"])


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
