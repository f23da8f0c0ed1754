"""The driver over the years: mismatches, kernels that come and that cannot, upgrades, removal.

In this order: each test leaves the server as the next one finds it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scenario
from testinfra.host import Host

MODULE = "nvidia-tesla-470"
BOOTED = "systemctl show --property=UserspaceTimestamp --value"


def play(playbook: str = "molecule/driver/converge.yml", **variables: object) -> tuple[int, str]:
    return scenario.play(playbook, **variables)


def versions(host: Host) -> dict[str, str]:
    lines = host.check_output("dpkg-query --show --showformat '${Package} ${Version}\\n'")
    return dict(line.split() for line in lines.splitlines())


@pytest.fixture
def kernel(host: Host, request: pytest.FixtureRequest) -> Iterator[str]:
    """A kernel that is on the server as far as anybody can see."""
    path = f"/lib/modules/{request.param}"
    host.check_output(f"mkdir -p {path}/kernel")
    yield request.param
    host.check_output(f"rm -r {path}")


@pytest.mark.parametrize("kernel", ["6.12.95+deb12-amd64"], indirect=True)
def test_a_kernel_that_is_too_new_is_refused(host: Host, kernel: str) -> None:
    before = versions(host)
    code, said = play()
    assert code != 0
    assert kernel in said
    assert "6.9" in said
    assert "Nothing was changed" in said
    assert versions(host) == before


@pytest.mark.parametrize("kernel", ["6.1.0-999-own"], indirect=True)
def test_a_kernel_without_headers_is_refused_by_name(host: Host, kernel: str) -> None:
    code, said = play()
    assert code != 0
    assert kernel in said
    assert "headers" in said


def mismatch(host: Host) -> None:
    """What nvidia-smi says after an upgrade of the libraries alone, until the next boot."""
    host.check_output("mkdir -p /run/k80-emulator/nvidia-smi")
    host.check_output("echo 18 > /run/k80-emulator/nvidia-smi/exit_code")
    host.check_output(
        "echo 'Failed to initialize NVML: Driver/library version mismatch'"
        " > /run/k80-emulator/nvidia-smi/message"
    )


def test_a_module_of_another_version_wants_a_reboot(host: Host) -> None:
    mismatch(host)
    code, said = play()
    assert code != 0
    assert "has to be rebooted: the running module and the installed libraries" in said
    booted = host.check_output(BOOTED)

    code, said = play(nvidia_driver_reboot=True)
    assert code == 0, said
    assert host.check_output(BOOTED) != booted
    # Whoever boots finds the dies set up.
    assert host.service("k80-nvidia-settings").is_running
    assert host.file("/dev/nvidia-uvm").exists


def test_a_die_that_is_left_out_is_gone_after_a_boot(host: Host) -> None:
    """The driver has it, and holds on to it until then."""
    die = "0000:06:00.0"
    host.check_output(f"touch /etc/k80-emulator/dies/{die}/lost")
    code, said = play()
    assert code != 0
    assert "nvidia-smi on k80-driver says: Unable to determine the device handle for GPU" in said
    assert f'add "{die}" to nvidia_driver_disabled_dies and run this again' in said

    code, said = play(nvidia_driver_disabled_dies=[die])
    assert code != 0
    assert f"has to be rebooted: a driver has {die} of nvidia_driver_disabled_dies" in said
    assert host.file(f"/sys/bus/pci/devices/{die}").exists

    code, said = play(nvidia_driver_disabled_dies=[die], nvidia_driver_reboot=True)
    assert code == 0, said
    assert not host.file(f"/sys/bus/pci/devices/{die}").exists
    assert len(host.check_output("nvidia-smi -L").splitlines()) == 1
    code, said = play(nvidia_driver_disabled_dies=[die])
    assert code == 0, said
    assert "changed=0" in said

    # It was exchanged, and is wanted again.
    host.check_output(f"rm /etc/k80-emulator/dies/{die}/lost")
    code, said = play()
    assert code == 0, said
    assert f"die {die} is no longer in nvidia_driver_disabled_dies" in said
    scenario.reboot("k80-driver")
    deadline = time.monotonic() + 60
    while host.run("systemctl is-system-running --wait").rc != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    code, said = play()
    assert code == 0, said
    assert len(host.check_output("nvidia-smi -L").splitlines()) == 2


VARIABLES = "/sys/firmware/efi/efivars"
OWNER = "605dab50-e046-4300-abb6-3dd810dd8b23"


def test_a_key_that_secure_boot_does_not_know_is_enrolled_at_the_console(host: Host) -> None:
    host.check_output(f"rm {VARIABLES}/MokListRT-{OWNER}")  # "reset to factory keys", say
    for _ in range(2):  # what a run that was cut off had asked for is asked for anew
        code, said = play()
        assert code != 0
        asked = re.search(r'"Enroll MOK" and enter (\d{8});', said)
        assert asked, said
    # Which is what the console will compare with: mokutil itself makes the same of it.
    request = f"{VARIABLES}/MokAuth-{OWNER}"
    salt = host.check_output(f"tail --bytes=+17 {request} | head --bytes=16")
    host.check_output(
        "mkdir /run/other && cp /sys/firmware/efi/efivars/S* /run/other"
        f" && openssl passwd -6 -salt {salt} {asked[1]} | tr -d '\\n' > /run/code"
        " && EFIVARFS_PATH=/run/other/ /usr/bin/mokutil"
        " --import /var/lib/dkms/mok.pub --hash-file /run/code"
        f" && cmp /run/other/MokAuth-{OWNER} {request}"
        f" && cmp /run/other/MokNew-{OWNER} {VARIABLES}/MokNew-{OWNER}"
    )
    # What the console does with the right code.
    host.check_output(
        f"rm {request} && mv {VARIABLES}/MokNew-{OWNER} {VARIABLES}/MokListRT-{OWNER}"
    )
    code, said = play()
    assert code == 0, said


@pytest.fixture
def loaded(host: Host) -> Iterator[Callable[[str], None]]:
    """Lets the server's kernel have modules, which are its own and no container's."""
    host.check_output("mount -t tmpfs modules /sys/module")
    yield lambda command: host.check_output(f"cd /sys/module && {command}")
    host.check_output("umount /sys/module")


@pytest.fixture
def role(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The role as on a server that loads the module; preflight would judge the kernel that runs."""
    playbook = scenario.playbook_of("nvidia_driver", tmp_path)
    given = {
        "preflight_dies": [{"pci_address": f"0000:0{bus}:00.0"} for bus in (5, 6)],
        "preflight_secure_boot": True,
        "nvidia_driver_load_module": True,
    }
    return lambda: scenario.play(playbook, **given)


def test_what_runs_is_what_is_installed_and_is_kept_running(
    host: Host, loaded: Callable[[str], None], role: Callable[..., tuple[int, str]]
) -> None:
    bound = "/sys/bus/pci/devices/0000:05:00.0/driver"
    loaded(f"mkdir nouveau && ln -s /sys/bus/pci/drivers/nouveau {bound}")
    code, said = role()
    assert code != 0
    assert "k80-driver has to be rebooted: nouveau has 0000:05:00.0." in said

    # It does not know the card, and is then there for nothing.
    loaded(f"rm {bound} && mkdir nvidia && echo 470.223.02 > nvidia/version")
    code, said = role()
    assert code != 0
    assert "rebooted: driver 470.223.02 runs, but 470.256.02 is installed." in said

    loaded("echo 470.256.02 > nvidia/version")
    code, said = role()
    assert code != 0
    assert "nvidia-persistenced of k80-driver is failed, so that the driver forgets" in said

    # It finds no driver here. One that runs is taken for what it is.
    override = "/run/systemd/system/nvidia-persistenced.service.d"
    host.check_output(
        f"mkdir -p {override} && printf '[Service]\nType=exec\nExecStart=\nExecStart=sleep 600\n'"
        f" > {override}/stand-in.conf && systemctl daemon-reload"
    )
    code, said = role()
    assert code == 0, said
    host.check_output(f"rm -r {override} && systemctl daemon-reload")


def test_clocks_that_somebody_changed_come_back_and_kernels_are_kept_away(host: Host) -> None:
    host.check_output("nvidia-smi -i 0 -ac 2505,562")
    code, said = play(
        nvidia_driver_compute_mode="exclusive_process", nvidia_driver_hold_kernel=True
    )
    assert code == 0, said
    blacklist = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert {'"^linux-image";', '"^linux-headers";'} <= set(blacklist.split())
    query = "clocks.applications.graphics,compute_mode"
    shown = host.check_output(f"nvidia-smi --query-gpu={query} --format=csv,noheader,nounits")
    assert shown.splitlines() == ["875, Exclusive_Process"] * 2


def test_another_version_of_the_packages_is_an_upgrade_of_these_alone(host: Host) -> None:
    before = versions(host)
    code, said = play(
        nvidia_driver_package_version="470.256.02-5*",
        nvidia_driver_repository={
            "uri": "http://deb.debian.org/debian",
            "suite": "bookworm-backports",
            "components": ["contrib", "non-free"],
        },
    )
    assert code == 0, said
    after = versions(host)
    changed = {name for name in after if after[name] != before.get(name)}
    assert f"{MODULE}-kernel-dkms" in changed
    assert all("nvidia-tesla-470" in name for name in changed), changed
    assert all(after[name].startswith("470.256.02-5") for name in changed)
    assert "libnvidia-tesla-470-ml1" in changed, "what they depend on follows"
    assert "libnvidia-tesla-470-ml1" in host.check_output("apt-mark showhold").split()


def offered_kernels(host: Host, flavour: str) -> list[str]:
    names = host.check_output(
        f"apt-cache --names-only search '^linux-headers-6[.]1[.]0-[0-9]+-{flavour}$'"
    )
    return sorted(line.split()[0].removeprefix("linux-headers-") for line in names.splitlines())


def test_a_second_kernel_is_tried_before_it_comes(host: Host) -> None:
    installed = host.check_output("ls /lib/modules").split()
    second = next(
        name for name in reversed(offered_kernels(host, "amd64")) if name not in installed
    )
    code, said = play("playbooks/kernel-check.yml", nvidia_driver_kernel=second)
    assert code == 0, said
    assert f"470.256.02 builds for kernel {second}" in said

    host.check_output(
        "DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends"
        f" linux-image-{second}"
    )
    code, said = play()
    assert code == 0, said
    assert f", {second}, x86_64: installed" in host.check_output("dkms status")
    assert "k80-nouveau.conf" in host.check_output(f"lsinitramfs /boot/initrd.img-{second}")


def test_a_kernel_that_the_driver_cannot_be_built_for_is_named(host: Host) -> None:
    """A real-time kernel is excluded by the driver's own dkms.conf."""
    real_time = offered_kernels(host, "rt-amd64")[-1]
    code, said = play("playbooks/kernel-check.yml", nvidia_driver_kernel=real_time)
    assert code != 0
    assert f"does not build for kernel {real_time}" in said
    assert "apt-mark hold linux-image-amd64" in said
    assert "BUILD_EXCLUSIVE" in said, "DKMS's own reason"
    # Nothing is left that would fail at the next upgrade.
    assert f"linux-headers-{real_time}" not in versions(host)
    host.check_output("dpkg --audit")


def test_removal_leaves_nothing(host: Host) -> None:
    code, said = play(nvidia_driver_state="absent")
    assert code == 0, said
    assert not [name for name in versions(host) if "nvidia" in name]
    assert host.check_output("find /lib/modules -path '*/updates/*' -name 'nvidia*'") == ""
    assert host.check_output("apt-mark showhold") == ""
    left = host.run(
        "ls -d /etc/*/k80* /etc/apt/*/*k80* /etc/systemd/system/k80-nvidia* /etc/udev/*/*k80*"
    ).stdout
    assert left.split() in ([], ["/etc/apt/sources.list.d/k80-components.sources"])
