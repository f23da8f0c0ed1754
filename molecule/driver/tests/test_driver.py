"""Debian's own driver on a server with Debian's own kernels: DKMS has really built it."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host

VERSION = "470.256.02"
MODULE = "nvidia-tesla-470"


def kernels(host: Host) -> list[str]:
    return str(host.check_output("ls /lib/modules")).split()


def test_every_kernel_has_the_module(host: Host) -> None:
    assert kernels(host)
    status = host.check_output("dkms status").splitlines()
    for kernel in kernels(host):
        assert f"{MODULE}/{VERSION}, {kernel}, x86_64: installed" in status
        assert host.check_output(f"modinfo -k {kernel} -F version {MODULE}") == VERSION
        # What udev and modprobe ask for is another name of it.
        assert f"install modprobe -i {MODULE}" in host.check_output(
            f"modprobe --set-version {kernel} --show-depends nvidia"
        )


def test_every_module_is_signed_by_the_key_that_secure_boot_knows(host: Host) -> None:
    assert "already enrolled" in host.run("mokutil --test-key /var/lib/dkms/mok.pub").stdout
    for kernel in kernels(host):
        signer = host.check_output(f"modinfo -k {kernel} -F signer {MODULE}")
        assert signer == "DKMS module signing key"


def test_no_initial_ram_disk_lets_nouveau_in(host: Host) -> None:
    for kernel in kernels(host):
        image = f"/boot/initrd.img-{kernel}"
        assert "etc/modprobe.d/k80-nouveau.conf" in host.check_output(f"lsinitramfs {image}")
        assert "nouveau" not in host.check_output(
            f"modprobe --set-version {kernel} --show-depends --use-blacklist nouveau || true"
        )


def moved_away(pattern: str) -> tuple[str, str]:
    """The first file of this pattern is gone."""
    path = f"path=$(ls {pattern} | head -n1)"
    return (
        f"{path}; mv $path /root/kept; echo $path > /root/its-place",
        "mv /root/kept $(cat /root/its-place)",
    )


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("nouveau", moved_away("/etc/modprobe.d/k80-nouveau.conf")),
        # As of a kernel that was installed before.
        (
            "nouveau",
            ("touch --date=2020-01-01 /boot/initrd.img-*", "touch /boot/initrd.img-*"),
        ),
        ("driver-kernels", moved_away(f"/lib/modules/*/updates/dkms/{MODULE}.ko*")),
        ("held", (f"apt-mark unhold {MODULE}-smi", f"apt-mark hold {MODULE}-smi")),
    ],
)
def test_the_doctor_names_what_a_boot_or_an_upgrade_would_bring(
    host: Host, check: str, fault: tuple[str, str]
) -> None:
    def status() -> str:
        report = json.loads(host.run("k80-doctor --json").stdout)
        return next(str(row["status"]) for row in report["checks"] if row["name"] == check)

    inject, undo = fault
    assert status() == "ok"
    host.check_output(inject)
    try:
        assert status() == "warn"
    finally:
        host.check_output(undo)
    assert status() == "ok"


def test_the_libraries_are_of_the_same_version(host: Host) -> None:
    assert f"libcuda.so.{VERSION}" in host.check_output(
        "readlink -f /usr/lib/x86_64-linux-gnu/libcuda.so.1"
    )
    # Another branch's, which Debian's persistenced would bring by itself.
    installed = host.check_output("dpkg-query --show --showformat '${Package}\\n' '*nvidia*cfg1'")
    assert "libnvidia-tesla-470-cfg1" in installed.split()


def test_an_upgrade_by_hand_keeps_the_driver(host: Host) -> None:
    held = host.check_output("apt-mark showhold").split()
    assert {"nvidia-tesla-470-kernel-dkms", "libnvidia-tesla-470-cuda1"} <= set(held)
    assert "libnvidia-tesla-470-ml1" in held, "what came as a dependency is held too"


def test_unattended_upgrades_leave_the_driver_alone(host: Host) -> None:
    """As the program itself understands its configuration."""
    said = host.check_output("unattended-upgrade --dry-run --debug 2>&1")
    blacklist = next(line for line in said.splitlines() if "blacklist" in line)
    for pattern in ("^nvidia", "^libnvidia", "^cuda"):
        assert pattern in blacklist.split()


def test_the_dies_are_set_up_before_docker(host: Host) -> None:
    for unit in ("k80-nvidia-uvm", "k80-nvidia-settings"):
        shown = host.check_output(
            f"systemctl show --property=Before,ActiveState,UnitFileState {unit}"
        )
        assert "docker.service" in shown
        assert "ActiveState=active" in shown
        assert "UnitFileState=enabled" in shown
    kind = host.check_output("stat --format %F /dev/nvidia-uvm")
    assert kind == "character special file"


def test_clocks_are_what_was_asked_for(host: Host) -> None:
    said = host.check_output(
        "nvidia-smi --query-gpu=clocks.applications.memory,clocks.applications.graphics"
        " --format=csv,noheader,nounits"
    )
    assert said.splitlines() == ["2505, 875"] * 2


def test_nothing_has_failed(host: Host) -> None:
    assert host.check_output("systemctl is-system-running") == "running"
    assert json.loads(host.file("/etc/vllm-k80/nvidia-settings.json").content_string)
