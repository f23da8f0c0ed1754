"""The proof at the end of the role: which dies no container can get, in words; and the script that
keeps the specification for when one die keeps it from being made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made_up_run import failures_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "roles/nvidia_container_toolkit/files/nvidia-cdi"
DIES = [{"pci_address": "0000:05:00.0"}, {"pci_address": "0000:8a:00.0"}]
SMI = "00000000:05:00.0, GPU-4f0a\n00000000:8A:00.0, GPU-b7e6\n"
LISTED = "\n".join(f"nvidia.com/gpu={name}" for name in ("0", "1", "GPU-4f0a", "GPU-b7e6", "all"))


@pytest.fixture(scope="module")
def filters(load_module: Callable[[str], ModuleType]) -> dict[str, Any]:
    module = load_module(
        "roles/nvidia_container_toolkit/filter_plugins/nvidia_container_toolkit.py"
    )
    filters: dict[str, Any] = module.FilterModule().filters()
    return filters


@pytest.fixture(scope="module")
def unspecified(filters: dict[str, Any]) -> Callable[..., list[str]]:
    unspecified: Callable[..., list[str]] = filters["nvidia_container_toolkit_unspecified"]
    return unspecified


def test_every_die_is_there(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI, LISTED) == []


def test_a_die_of_another_uuid_is_told(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI, LISTED.replace("GPU-b7e6", "GPU-b7e60")) == [
        "the die at 0000:8a:00.0 (GPU-b7e6) is not in the CDI specification"
    ]


def test_a_die_that_the_driver_does_not_show_is_told(
    unspecified: Callable[..., list[str]],
) -> None:
    assert unspecified(DIES, SMI.splitlines()[0], LISTED) == [
        "the driver does not show the die at 0000:8a:00.0"
    ]


@pytest.mark.parametrize("smi", ["", "No devices were found\n"])
def test_all_are_told_at_once(unspecified: Callable[..., list[str]], smi: str) -> None:
    assert len(unspecified(DIES, smi, "")) == 2


def test_other_gpus_do_not_matter(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI + "00000000:C1:00.0, GPU-77\n", LISTED) == []


LOST = "Unable to determine the device handle for GPU {}: GPU is lost.  Reboot the system to"


@pytest.mark.parametrize(
    ("smi", "dies"),
    [
        (SMI, []),
        (SMI.splitlines()[0], ["0000:8a:00.0"]),
        (LOST.format("0000:8A:00.0"), ["0000:8a:00.0"]),
        (LOST.format("00000000:8A:00.0"), ["0000:8a:00.0"]),
        # Not the matter of single dies.
        ("No devices were found", []),
        ("", []),
    ],
)
def test_single_dies_to_which_the_driver_does_not_get_through(
    filters: dict[str, Any], smi: str, dies: list[str]
) -> None:
    assert filters["nvidia_container_toolkit_silent"](DIES, smi) == dies


REMEDY = (
    "Power the server off and on; if that does not help, reseat the board or exchange it, or leave"
    " the die out: add its address to nvidia_driver_disabled_dies and run site.yml again"
    " (docs/hardware.md)."
)


@pytest.mark.slow
def test_a_proof_that_fails_for_one_die_names_it_and_the_remedy(tmp_path: Path) -> None:
    fails = ("level=error msg='failed to generate CDI spec: GPU is lost'", 1)
    hosts: dict[str, dict[str, Any]] = {
        "lost": {"nvidia-smi": (LOST.format("0000:8A:00.0"), 15), "nvidia-ctk": fails},
        "no-die": {"nvidia-smi": ("No devices were found", 6), "nvidia-ctk": fails},
    }
    for name, programs in hosts.items():
        hosts[name] = {"programs": programs, "preflight_dies": DIES}
    failed = failures_of("nvidia_container_toolkit", "prove", hosts, tmp_path)
    assert failed["lost"].startswith("nvidia-ctk cannot describe the dies of lost:")
    told = f"The driver does not get through to die 0000:8a:00.0. {REMEDY}"
    assert failed["lost"].endswith(told)
    assert failed["no-die"].endswith("see that `nvidia-smi` works on the server.")


# --- The script that makes the specification ---------------------------------

SPECIFICATION = """\
---
cdiVersion: 0.5.0
containerEdits:
    deviceNodes:
        - path: /dev/nvidiactl
    mounts:
        - hostPath: {library}
          containerPath: /usr/lib/libcuda.so.470.256.02
        - containerPath: /dev/log
          hostPath: /dev/k80-no-such-node
devices:
    - name: GPU-4f0a
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
    - name: GPU-b7e6
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia1
"""


class Cdi:
    """The script with an nvidia-ctk of this test's, and a driver that has two dies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.library = directory / "libcuda.so.470.256.02"
        self.library.touch()
        self.written, self.made = directory / "cdi/nvidia.yaml", directory / "made.yaml"
        self.made.write_text(SPECIFICATION.format(library=self.library))
        self.sys, self.state = directory / "sys", directory / "state"
        self.state.mkdir()
        (self.sys / "module/nvidia").mkdir(parents=True)
        (self.sys / "module/nvidia/version").write_text("470.256.02\n")
        self.bound = self.sys / "bus/pci/drivers/nvidia"
        self.bound.mkdir(parents=True)
        for name in ("bind", "uevent", "0000:05:00.0", "0000:8a:00.0"):
            (self.bound / name).touch()
        self.program("nvidia-modprobe", "")
        self.works()

    def program(self, name: str, script: str) -> None:
        path = self.directory / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.directory}/calls\n{script}\n')
        path.chmod(0o755)

    def works(self) -> None:
        put = f"mkdir -p {self.written.parent} && cp {self.made} {self.written}"
        self.program("nvidia-ctk", f'case "$*" in *generate*) {put} ;; esac')

    def fails(self, at: str = "generate") -> None:
        self.program("nvidia-ctk", f'case "$*" in *{at}*) echo lost >&2; exit 1 ;; esac')

    def boot(self) -> None:
        self.written.unlink(missing_ok=True)
        self.written.parent.rmdir()

    def run(self) -> tuple[int, list[str]]:
        (self.directory / "calls").unlink(missing_ok=True)
        command = ["nvidia-ctk", "--quiet", "cdi", "generate"]
        done = subprocess.run(
            [SCRIPT, self.written, *command],
            env=os.environ
            | {
                "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
                "STATE_DIRECTORY": str(self.state),
                "K80_SYS": str(self.sys),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, [line for line in done.stderr.splitlines() if line != "lost"]

    @property
    def calls(self) -> list[str]:
        return (self.directory / "calls").read_text().splitlines()


@pytest.fixture
def cdi(tmp_path: Path) -> Cdi:
    return Cdi(tmp_path)


def test_what_nvidia_ctk_makes_is_left_as_it_is_and_kept(cdi: Cdi) -> None:
    assert cdi.run() == (0, [])
    assert cdi.written.read_text() == cdi.made.read_text()
    assert cdi.calls == [
        f"nvidia-ctk --quiet cdi generate --output={cdi.written}",
        "nvidia-ctk --quiet system create-dev-char-symlinks",
    ]
    assert [path.name for path in cdi.state.iterdir()] == ["nvidia.yaml"]


def test_where_it_fails_after_a_boot_the_last_one_is_used_again(cdi: Cdi) -> None:
    cdi.run()
    cdi.boot()
    cdi.fails()
    for _ in range(2):
        code, said = cdi.run()
        assert code == 0
        assert len(said) == 1
        assert said[0].startswith("nvidia-cdi: nvidia-ctk fails, so that the specification of 20")
        assert said[0].endswith(" is used again (same driver, same dies)")
        assert cdi.written.read_text() == cdi.made.read_text()
    # The nodes that a driver which stopped at the broken die has not made; and then the links.
    assert cdi.calls[1:] == [
        "nvidia-modprobe -c=0",
        "nvidia-modprobe -c=1",
        "nvidia-ctk --quiet system create-dev-char-symlinks",
    ]
    cdi.works()
    assert cdi.run() == (0, [])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.library.unlink(), "the last one names {library}, which is gone"),
        (
            lambda c: (c.sys / "module/nvidia/version").write_text("470.223.02"),
            "the last one was made with driver 470.256.02: 0000:05:00.0 0000:8a:00.0, and now it is"
            " driver 470.223.02: 0000:05:00.0 0000:8a:00.0",
        ),
        # Its node is another die's by now.
        (
            lambda c: (c.bound / "0000:05:00.0").unlink(),
            "the last one was made with driver 470.256.02: 0000:05:00.0 0000:8a:00.0, and now it is"
            " driver 470.256.02: 0000:8a:00.0",
        ),
        (lambda c: (c.state / "nvidia.yaml").unlink(), "there is none from before"),
        (lambda c: (c.state / "nvidia.yaml").write_text(""), "there is none from before"),
    ],
)
def test_one_of_another_driver_or_other_dies_is_not_used(
    cdi: Cdi, change: Callable[[Cdi], object], why: str
) -> None:
    cdi.run()
    cdi.boot()
    cdi.fails()
    change(cdi)
    code, said = cdi.run()
    assert code == 1
    assert not cdi.written.exists()
    assert said == [
        "nvidia-cdi: nvidia-ctk fails, and no specification can stand in for its own: "
        + why.format(library=cdi.library)
    ]
    assert cdi.calls[-1] == "nvidia-ctk --quiet system create-dev-char-symlinks", "all the same"


def test_links_that_fail_leave_the_specification(cdi: Cdi) -> None:
    cdi.run()
    cdi.fails("symlinks")
    assert cdi.run() == (1, [])
    assert cdi.written.read_text() == cdi.made.read_text()
