"""What the role nvidia_driver reads of DKMS and kernels, and how it sets the dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from made_up_host import RULES, add_server, bind, rules_against
from made_up_run import failures_of

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "roles/nvidia_driver/files/nvidia-settings"
GOOD = {
    "kernel": "6.1.0-56-amd64",
    "headers": True,
    "dkms": "installed",
    "module_version": "470.256.02",
    "signer": "DKMS module signing key",
}


@pytest.fixture
def state(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("roles/nvidia_driver/library/nvidia_driver_state.py")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # DKMS 3 (Debian 12, Ubuntu, EL 9) and 2.8 (Debian 11).
        (
            "nvidia-tesla-470/470.256.02, 6.1.0-56-amd64, x86_64: installed",
            {"6.1.0-56-amd64": "installed"},
        ),
        (
            "nvidia-tesla-470, 470.256.02, 5.10.0-30-amd64, x86_64: installed",
            {"5.10.0-30-amd64": "installed"},
        ),
        (
            "nvidia/470.256.02, 5.14.0-427.el9.x86_64, x86_64: built",
            {"5.14.0-427.el9.x86_64": "built"},
        ),
        (
            "nvidia/470.256.02, 6.1.0-56-amd64, x86_64: installed"
            " (WARNING! Diff between built and installed module!)",
            {"6.1.0-56-amd64": "installed"},
        ),
        # Without headers apt ends well and DKMS has no kernel to name.
        ("nvidia-tesla-470/470.256.02: added", {}),
        ("", {}),
    ],
)
def test_both_forms_of_dkms_status_are_read(
    state: ModuleType, line: str, expected: dict[str, str]
) -> None:
    assert state.dkms_states(line) == expected


def test_two_kernels_are_told_apart(state: ModuleType) -> None:
    lines = "n/1, 6.1.0-55-amd64, x86_64: added\nn/1, 6.1.0-56-amd64, x86_64: installed\n"
    assert state.dkms_states(lines) == {"6.1.0-55-amd64": "added", "6.1.0-56-amd64": "installed"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"headers": False, "dkms": "", "module_version": ""}, "6.1.0-56-amd64 has no headers"),
        ({"dkms": "added", "module_version": ""}, "(it says: added)"),
        ({"dkms": "built", "module_version": ""}, "(it says: built)"),
        ({"dkms": "", "module_version": ""}, "(it says: nothing)"),
        ({"module_version": "535.183.01"}, "would load driver 535.183.01 instead of 470.256.02"),
        ({"signer": ""}, "DKMS does not sign the driver for kernel 6.1.0-56-amd64"),
    ],
)
def test_each_fault_is_one_sentence_with_its_remedy(
    state: ModuleType, change: dict[str, object], words: str
) -> None:
    told = state.fault_of(GOOD | change, "nvidia-tesla-470", "470.256.02", signed=True)
    assert words in told
    assert ": " in told
    assert told.endswith(".")


def test_a_kernel_with_its_module_has_no_fault(state: ModuleType) -> None:
    unsigned = GOOD | {"signer": ""}
    for there, signed in ((GOOD, True), (GOOD, False), (unsigned, False)):
        assert state.fault_of(there, "nvidia-tesla-470", "470.256.02", signed) is None


def test_kernels_are_what_has_modules_of_its_own(
    state: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MODULES", str(tmp_path))
    assert state.installed_kernels() == []
    # Headers alone, as in a container: DKMS builds for these.
    (tmp_path / "6.1.0-55-amd64/build").mkdir(parents=True)
    assert state.installed_kernels() == ["6.1.0-55-amd64"]
    # Beside a real kernel they are a remnant.
    (tmp_path / "6.1.0-56-amd64/kernel").mkdir(parents=True)
    assert state.installed_kernels() == ["6.1.0-56-amd64"]


def test_an_initial_ram_disk_older_than_the_rule_is_noticed(
    state: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "BOOT", str(tmp_path))
    rule, image = tmp_path / "k80-nouveau.conf", tmp_path / "initrd.img-6.1"
    assert not state.initramfs_is_old("6.1", str(rule)), "a host without one"
    image.touch()
    rule.touch()
    os.utime(image, (1, 1))
    assert state.initramfs_is_old("6.1", str(rule))
    os.utime(rule, (0, 0))
    assert not state.initramfs_is_old("6.1", str(rule))


def test_the_driver_that_has_a_die(
    state: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_server(tmp_path)
    monkeypatch.setattr(state, "SYSFS", str(tmp_path / "sys"))
    bind(tmp_path, "0000:05:00.0", "nouveau")
    assert [state.driver_of(f"0000:0{bus}:00.0") for bus in (5, 6, 7)] == ["nouveau", "", ""]


# --- The settings of the dies, with a made-up nvidia-smi ---------------------

SMI = """\
#!{python}
import json, sys
path = {state!r}
dies = json.load(open(path))
arguments = sys.argv[1:]
chosen = dies
if arguments[0] == "-i" and arguments[2].startswith("--query-gpu="):
    chosen = [die for die in dies if die["pci.bus_id"].endswith(arguments[1])]
    del arguments[:2]
if arguments[0].startswith("--query-gpu="):
    lost = [die for die in chosen if die["uuid"] == "GPU-lost"]
    if lost:
        print("Unable to determine the device handle for GPU", lost[0]["pci.bus_id"])
        sys.exit(15)
    for die in chosen:
        print(", ".join(die[field] for field in arguments[0].split("=")[1].split(",")))
    corrupted = [die for die in dies if die["uuid"] == "GPU-corrupted"]
    for die in corrupted:
        print("WARNING: infoROM is corrupted at gpu", die["pci.bus_id"])
    sys.exit(14 if corrupted else 0)
die = next(die for die in dies if die["pci.bus_id"] == arguments[1])
flag, value = arguments[2:]
if flag == "-ac":
    die["clocks.applications.memory"], die["clocks.applications.graphics"] = value.split(",")
elif flag == "-e":
    die["ecc.mode.pending"] = {{"0": "Disabled", "1": "Enabled"}}[value]
elif flag == "-pm":
    die["persistence_mode"] = {{"0": "Disabled", "1": "Enabled"}}[value]
elif flag == "-c":
    die["compute_mode"] = {{"0": "Default", "3": "Exclusive_Process"}}[value]
elif flag == "-pl" and die["uuid"] != "GPU-stubborn":
    die["power.limit"] = value + ".00"
json.dump(dies, open(path, "w"))
"""
DIE = {
    "uuid": "GPU-a",
    "pci.bus_id": "00000000:05:00.0",
    "pci.device_id": "0x102D10DE",
    "clocks.applications.memory": "2505",
    "clocks.applications.graphics": "562",
    "ecc.mode.current": "Enabled",
    "ecc.mode.pending": "Enabled",
    "persistence_mode": "Disabled",
    "compute_mode": "Default",
    "power.limit": "149.00",
}
LEAVE = {"application_clocks": "", "ecc": "unchanged", "compute_mode": "default", "power_limit": 0}


class Dies:
    def __init__(self, directory: Path) -> None:
        self.state, self.file = directory / "dies.json", directory / "settings.json"
        self.root = add_server(directory / "root")
        program = directory / "bin/nvidia-smi"
        program.parent.mkdir()
        program.write_text(SMI.format(python=sys.executable, state=str(self.state)))
        program.chmod(0o755)
        self.path = str(program.parent)
        self.have(DIE)

    def have(self, *dies: dict[str, str]) -> None:
        self.state.write_text(json.dumps(dies))

    def __getitem__(self, field: str) -> list[str]:
        return [die[field] for die in json.loads(self.state.read_text())]

    def settings(self, *arguments: str, **wanted: object) -> tuple[int, str]:
        self.file.write_text(json.dumps(LEAVE | wanted))
        done = subprocess.run(
            [sys.executable, SETTINGS, *arguments, self.file],
            env={"PATH": self.path, "K80_SYS": str(self.root / "sys")},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def dies(tmp_path: Path) -> Dies:
    return Dies(tmp_path)


def test_every_setting_is_applied_and_read_back(dies: Dies) -> None:
    wanted = {
        "application_clocks": "2505,875",
        "ecc": "disabled",
        "persistence": True,
        "compute_mode": "exclusive_process",
        "power_limit": 140,
    }
    code, said = dies.settings("--check", **wanted)
    assert code == 2
    assert "application clocks are 2505,562, not 2505,875" in said
    assert dies["clocks.applications.graphics"] == ["562"], "a check changes nothing"

    assert dies.settings(**wanted) == (0, "")
    assert dies["clocks.applications.graphics"] == ["875"]
    assert dies["ecc.mode.pending"] == ["Disabled"]
    assert dies["persistence_mode"] == ["Enabled"]
    assert dies["compute_mode"] == ["Exclusive_Process"]
    assert dies["power.limit"] == ["140.00"]
    assert dies.settings("--check", **wanted) == (0, "")


def test_what_is_not_wanted_is_left(dies: Dies) -> None:
    before = dies.state.read_text()
    assert dies.settings() == (0, "")
    assert dies.state.read_text() == before


def test_other_gpus_are_left_alone(dies: Dies) -> None:
    dies.have(DIE, DIE | {"uuid": "GPU-other", "pci.device_id": "0x1DB610DE"})
    assert dies.settings(application_clocks="2505,875") == (0, "")
    assert dies["clocks.applications.graphics"] == ["875", "562"]


def test_a_lost_die_keeps_no_other_from_its_settings(dies: Dies) -> None:
    dies.have(DIE, DIE | {"uuid": "GPU-lost", "pci.bus_id": "00000000:06:00.0"})
    code, said = dies.settings(application_clocks="2505,875")
    assert code == 1
    assert "Unable to determine the device handle for GPU 00000000:06:00.0" in said
    assert dies["clocks.applications.graphics"] == ["875", "562"]
    dies.have(DIE | {"uuid": "GPU-lost"})
    code, said = dies.settings(application_clocks="2505,875")
    assert code == 1
    assert "Unable to determine the device handle for GPU 00000000:05:00.0" in said


def test_a_corrupted_inforom_is_no_error(dies: Dies) -> None:
    dies.have(DIE, DIE | {"uuid": "GPU-corrupted", "pci.bus_id": "00000000:06:00.0"})
    assert dies.settings(application_clocks="2505,875") == (0, "")
    assert dies["clocks.applications.graphics"] == ["875", "875"]


def test_a_value_that_does_not_stick_is_an_error(dies: Dies) -> None:
    dies.have(DIE | {"uuid": "GPU-stubborn"})
    code, said = dies.settings(power_limit=120)
    assert code == 1
    assert "die 00000000:05:00.0: power limit is 149.00 W, not 120" in said
    assert "the die refuses this value" in said


def test_a_server_without_the_driver_is_told_so(dies: Dies, tmp_path: Path) -> None:
    (tmp_path / "bin/nvidia-smi").unlink()
    code, said = dies.settings(application_clocks="2505,875")
    assert (code, said) == (1, "nvidia-settings: nvidia-smi is not there: install the driver.\n")


# --- Dies that are broken ----------------------------------------------------


def test_the_rule_takes_that_die_off_the_bus_and_nothing_else() -> None:
    """A rule of udev's, written so that a copy in an initial RAM disk does nothing."""
    lines = rules_against("0000:06:00.0", "0000:8a:00.0").replace("\\\n", "").splitlines()
    rules = [re.split(r", +", line) for line in lines if not line.startswith("#")]
    assert rules == [
        [
            'ACTION=="add"',
            'SUBSYSTEM=="pci"',
            f'KERNEL=="{die}"',
            'ATTR{vendor}=="0x10de"',
            'ATTR{device}=="0x102d"',
            f'TEST=="/{RULES}"',
            'TEST!="/etc/initrd-release"',
            'ATTR{remove}="1"',
        ]
        for die in ("0000:06:00.0", "0000:8a:00.0")
    ]


LOST = (
    "Unable to determine the device handle for GPU {}: GPU is lost.  Reboot the system to recover"
    " this GPU"
)
REMEDY = (
    "Power the server off and on; if that does not bring it back, reseat the board or exchange it,"
    ' or leave the die out: add "0000:06:00.0" to nvidia_driver_disabled_dies and run this again.'
    " `journalctl -k -g NVRM` on the server says more; docs/hardware.md says what to do."
)
NO_REMEDY = "`journalctl -k -g NVRM` on the server says more; docs/drivers.md says what to do."
FIRST_ROW, SECOND_ROW = (f"00000000:0{bus}:00.0, 470.256.02, Enabled, Enabled" for bus in (5, 6))
# What nvidia-smi prints, how it ends, and what the proof makes of it.
PROOFS = {
    "lost": (LOST.format("0000:06:00.0"), 15, [], REMEDY),
    "lost-too": (LOST.format("00000000:06:00.0"), 15, [], REMEDY),
    "unlisted": (FIRST_ROW, 0, [], f"PCI tree. {REMEDY}"),
    "none": ("No devices were found", 6, [], f"says: No devices were found. {NO_REMEDY}"),
    "stayed": (
        f"{FIRST_ROW}\n{SECOND_ROW}",
        0,
        ["0000:06:00.0"],
        f"lists die 0000:06:00.0, which /{RULES} is to take off the bus at every boot. {NO_REMEDY}",
    ),
}


@pytest.mark.slow
def test_a_proof_that_fails_for_one_die_names_it_and_the_remedy(tmp_path: Path) -> None:
    hosts = {}
    for name, (said, code, disabled, _) in PROOFS.items():
        left = [bus for bus in (5, 6) if f"0000:0{bus}:00.0" not in disabled]
        hosts[name] = {
            "programs": {"nvidia-smi": (said, code)},
            "preflight_dies": [{"pci_address": f"0000:0{bus}:00.0"} for bus in left],
            "nvidia_driver_disabled_dies": disabled,
            "nvidia_driver_version": "470.256.02",
            "nvidia_driver_installed": {"persistence": False},
        }
    failed = failures_of("nvidia_driver", "prove", hosts, tmp_path)
    assert failed.keys() == PROOFS.keys(), failed
    for name, (_, _, _, told) in PROOFS.items():
        assert failed[name].endswith(told), failed[name]
    assert "nvidia-smi on lost says: Unable to determine the device handle" in failed["lost"]


@pytest.mark.slow
def test_a_corrupted_inforom_fails_no_proof(tmp_path: Path) -> None:
    warning = "WARNING: infoROM is corrupted at gpu 00000000:06:00.0"
    host = {
        "programs": {"nvidia-smi": (f"{FIRST_ROW}\n{SECOND_ROW}\n{warning}", 14)},
        "preflight_dies": [{"pci_address": f"0000:0{bus}:00.0"} for bus in (5, 6)],
        "nvidia_driver_version": "470.256.02",
        "nvidia_driver_installed": {"persistence": False},
        "__nvidia_driver_script_dir": str(tmp_path / "none"),
    }
    failed = failures_of("nvidia_driver", "prove", {"corrupted": host}, tmp_path)
    # What comes after the proof: the units that apply settings, of which this machine has none.
    assert failed == {"corrupted": "One or more items failed"}
