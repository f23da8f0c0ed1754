"""What preflight reads from a host, and what it makes of it: findings, which stop, and warnings.

The hosts are made up, below a directory of their own; nothing of this machine is read.
"""

from __future__ import annotations

import http.server
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from judge import Judge
from made_up_host import (
    FULL_LINK,
    GPU,
    RULES,
    SWITCH,
    add_board,
    add_device,
    add_kernel,
    add_package,
    add_server,
    bind,
    resource,
    rules_against,
    write,
)

DIES = ["0000:05:00.0", "0000:06:00.0"]
UPSTREAM = "0000:00:02.0/0000:03:00.0"
PATHS = [f"{UPSTREAM}/0000:04:{slot}.0/{die}" for slot, die in zip(("08", "10"), DIES, strict=True)]


@pytest.fixture
def k80_host(judge: Judge) -> ModuleType:
    return judge.module


@pytest.fixture
def plugin(judge: Judge) -> ModuleType:
    return judge.plugin


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return add_server(tmp_path / "server")


def test_a_healthy_server(server: Path, judge: Judge) -> None:
    assert judge(server) == ([], [])


def test_a_healthy_gateway_needs_no_card(tmp_path: Path, judge: Judge) -> None:
    assert judge(tmp_path, groups=["k80_gateways"]) == ([], [])


def test_a_server_without_a_card(tmp_path: Path, judge: Judge) -> None:
    assert judge(tmp_path) == (
        [
            f"there is no Tesla K80 in its PCI tree ({tmp_path}/sys/bus/pci/devices, 10de:102d);"
            " check that the card is seated and powered, or take the host out of k80_servers."
        ],
        [],
    )


# --- The dies, from the PCI tree --------------------------------------------


def test_dies_of_two_boards_among_other_cards(tmp_path: Path, k80_host: ModuleType) -> None:
    add_board(tmp_path, "0000:80:02.0", 0x82, numa_node=1)
    add_board(tmp_path, "0000:00:02.0", 3, numa_node=0)
    v100 = GPU | {"device": "0x1db4", "numa_node": "0"}
    add_device(tmp_path, "0000:00:03.0/0000:09:00.0", v100)
    audio = GPU | {"class": "0x040300"}  # another function with a die's numbers
    add_device(tmp_path, "0000:00:03.1/0000:0a:00.1", audio)

    dies = k80_host.find_dies(tmp_path)
    assert [(die["pci_address"], die["board"], die["numa_node"]) for die in dies] == [
        ("0000:05:00.0", "0000:03:00.0", 0),
        ("0000:06:00.0", "0000:03:00.0", 0),
        ("0000:84:00.0", "0000:82:00.0", 1),
        ("0000:85:00.0", "0000:82:00.0", 1),
    ]
    assert {die["local_cpulist"] for die in dies} == {"0-9"}


@pytest.mark.parametrize(
    ("with_memory", "nodes"),
    [("0-1", [0, 0, 1, 1]), ("0", [0, 0, -1, -1]), ("0,2-3", [0, 0, -1, -1]), ("", [0, 0, 1, 1])],
)
def test_a_node_without_memory_is_none(
    tmp_path: Path, k80_host: ModuleType, with_memory: str, nodes: list[int]
) -> None:
    """As on a server of two processors with all its memory at the first."""
    add_board(tmp_path, "0000:80:02.0", 0x82, numa_node=1)
    add_board(tmp_path, "0000:00:02.0", 3, numa_node=0)
    write(tmp_path / "sys/devices/system/node/has_memory", f"{with_memory}\n")
    assert [die["numa_node"] for die in k80_host.find_dies(tmp_path)] == nodes


def test_a_board_behind_a_switch_of_the_mainboard_is_a_board(
    tmp_path: Path, k80_host: ModuleType
) -> None:
    add_device(tmp_path, "0000:01:00.0", SWITCH)
    for bus, port in ((4, "08"), (9, "10")):
        add_board(tmp_path, f"0000:01:00.0/0000:02:{port}.0", bus, numa_node=0)
    boards = [die["board"] for die in k80_host.find_dies(tmp_path)]
    assert boards == ["0000:04:00.0"] * 2 + ["0000:09:00.0"] * 2


def test_what_the_kernel_does_not_say(tmp_path: Path, k80_host: ModuleType, judge: Judge) -> None:
    """No NUMA node, no list of CPUs; and devices that are plain directories, so no bridges."""
    for address, node in zip(DIES, ("-1", None), strict=True):
        device = tmp_path / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        attributes = GPU | ({"numa_node": node} if node else {})
        del attributes["local_cpulist"]
        for name, value in attributes.items():
            (device / name).write_text(value)
    assert k80_host.find_dies(tmp_path) == [
        {"pci_address": address, "board": address, "numa_node": -1, "local_cpulist": ""}
        for address in DIES
    ]
    assert judge(tmp_path) == ([], [])


def test_a_host_without_pci_has_no_dies(tmp_path: Path, k80_host: ModuleType) -> None:
    assert k80_host.find_dies(tmp_path) == []


# --- Memory regions, links, ways between dies -------------------------------


def attribute(root: Path, path: str, name: str) -> Path:
    return root / "sys/devices/pci0000:00" / path / name


def test_a_die_whose_memory_has_no_address(server: Path, judge: Judge) -> None:
    attribute(server, PATHS[1], "resource").write_text(resource(0))
    assert judge(server) == (
        [
            "the BIOS gave no address to the memory of die 0000:06:00.0 (BAR1, 16 GB); turn on"
            " 'Above 4G Decoding' in its setup (docs/hardware.md)."
        ],
        [],
    )


def test_a_narrow_slot_and_a_slow_link(server: Path, judge: Judge) -> None:
    attribute(server, UPSTREAM, "current_link_width").write_text("8\n")
    attribute(server, UPSTREAM, "current_link_speed").write_text("5.0 GT/s PCIe\n")
    attribute(server, PATHS[0], "current_link_width").write_text("4\n")
    rest = (
        "which slows the loading of models and instances of several dies; reseat the card, or give"
        " it a slot with all lanes (docs/hardware.md)."
    )
    assert judge(server) == (
        [],
        [
            "the PCIe link of board 0000:03:00.0 to the slot is x8 gen 2, not x16 gen 3, " + rest,
            "the PCIe link of die 0000:05:00.0 to its board's switch is x4, not x16, " + rest,
        ],
    )


def test_a_die_without_work_saves_power(server: Path, judge: Judge) -> None:
    attribute(server, PATHS[0], "current_link_speed").write_text("2.5 GT/s PCIe\n")
    assert judge(server) == ([], [])


def config_with_acs(control: int) -> bytes:
    """Configuration space with two extended capabilities, the second being ACS."""
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
    struct.pack_into("<IHH", space, 0x148, 0x000D | 1 << 16, 0x005F, control)
    return bytes(space)


BOTH = [{"name": "both", "dies": DIES}]


def test_acs_and_iommu_matter_to_instances_of_several_dies(server: Path, judge: Judge) -> None:
    downstream = PATHS[0].rsplit("/", 1)[0]
    attribute(server, downstream, "config").write_bytes(config_with_acs(0x1D))
    for path in PATHS:
        write(attribute(server, path, "iommu_group") / "type", "DMA-FQ\n")
    assert judge(server) == ([], [])
    findings, warnings = judge(server, vllm_instance_instances=BOTH)
    assert not findings
    assert warnings == [
        "instance 'both' has several dies, and the IOMMU translates the addresses of dies"
        " 0000:05:00.0, 0000:06:00.0, with which NVIDIA does not support copies between dies; boot"
        " with iommu=pt (docs/hardware.md).",
        "instance 'both' has several dies, and access control (ACS) on 0000:04:08.0 sends what they"
        " tell each other through the processor, which is slower; turn ACS off in the BIOS setup"
        " (docs/hardware.md).",
    ]


def test_acs_that_redirects_nothing_and_an_iommu_that_passes(server: Path, judge: Judge) -> None:
    downstream = PATHS[0].rsplit("/", 1)[0]
    attribute(server, downstream, "config").write_bytes(config_with_acs(0x01))
    for path in PATHS:
        write(attribute(server, path, "iommu_group") / "type", "identity\n")
    assert judge(server, vllm_instance_instances=BOTH) == ([], [])


def test_other_gpus_are_left_alone(server: Path, judge: Judge) -> None:
    add_device(server, "0000:00:03.0/0000:09:00.0", GPU | {"device": "0x1db4"} | FULL_LINK)
    findings, warnings = judge(server)
    assert not findings
    assert warnings == [
        "besides its K80s it has NVIDIA GPUs, which serve nothing here and run only if driver 470"
        " knows them: 0000:09:00.0 (10de:1db4); take them out if another driver is wanted for them."
    ]


# --- Dies that are left out --------------------------------------------------


def test_a_die_that_is_left_out_counts_nowhere(
    server: Path, judge: Judge, k80_host: ModuleType
) -> None:
    """With all that would speak against it, if it were looked at."""
    attribute(server, PATHS[1], "resource").write_text(resource(0))
    attribute(server, PATHS[1], "current_link_width").write_text("4\n")
    bind(server, DIES[1], "nouveau")
    findings, warnings = judge(server)
    assert (len(findings), len(warnings)) == (1, 2)
    memory = {"memtotal_mb": 1024 + 3072}
    for address in (DIES[1], DIES[1].upper()):
        left_out = {"nvidia_driver_disabled_dies": [address]}
        assert judge(server, facts=memory, **left_out) == ([], []), "one instance, not two"
    assert [die["pci_address"] for die in k80_host.find_dies(str(server), [DIES[1]])] == [DIES[0]]
    assert k80_host.look_at_pci(str(server), [DIES[1]])["others"] == []


def test_a_die_that_is_left_out_may_be_off_the_bus_already(server: Path, judge: Judge) -> None:
    (server / "sys/bus/pci/devices" / DIES[1]).unlink()
    write(server / RULES, rules_against(DIES[1]))
    assert judge(server, nvidia_driver_disabled_dies=[DIES[1]]) == ([], [])


@pytest.mark.parametrize("value", [DIES[1], 360.0])
def test_dies_to_be_left_out_are_a_list(server: Path, judge: Judge, value: object) -> None:
    findings, _ = judge(server, nvidia_driver_disabled_dies=value)
    assert (
        f'nvidia_driver_disabled_dies is {value!r}, which is no list; write it as ["0000:06:00.0"].'
    ) in findings


@pytest.mark.parametrize("address", ["06:00.0", "00000000:06:00.0", "GPU-4f0a", "", 360.0])
def test_what_is_no_address_is_refused(server: Path, judge: Judge, address: object) -> None:
    assert judge(server, nvidia_driver_disabled_dies=[address]) == (
        [
            f"nvidia_driver_disabled_dies has {str(address).lower()!r}, which is no PCI address;"
            ' write it as lspci -D shows it, and in quotes: "0000:06:00.0".'
        ],
        [],
    )


def test_nothing_else_is_taken_off_the_bus(server: Path, judge: Judge) -> None:
    """The board's switch would take both dies with it."""
    assert judge(server, nvidia_driver_disabled_dies=["0000:03:00.0"]) == (
        [
            "nvidia_driver_disabled_dies has 0000:03:00.0, which is a device of another kind than a"
            " K80's die; correct the address."
        ],
        [],
    )


def test_an_instance_of_a_die_that_is_left_out(server: Path, judge: Judge) -> None:
    instances = [{"name": "a", "dies": [DIES[0]]}, {"name": "b", "dies": [DIES[1].upper()]}]
    assert judge(
        server, nvidia_driver_disabled_dies=[DIES[1]], vllm_instance_instances=instances
    ) == (
        [
            "instance 'b' wants die 0000:06:00.0, which nvidia_driver_disabled_dies leaves out;"
            " take it out of one of the two."
        ],
        [],
    )


@pytest.mark.parametrize("gone", [[], DIES])
def test_a_server_of_which_no_die_is_left(server: Path, judge: Judge, gone: list[str]) -> None:
    for die in gone:
        (server / "sys/bus/pci/devices" / die).unlink()
    assert judge(server, nvidia_driver_disabled_dies=DIES) == (
        [
            "it has no die besides those in nvidia_driver_disabled_dies (0000:05:00.0,"
            " 0000:06:00.0); take one out of the list, or the host out of k80_servers."
        ],
        [],
    )


def test_a_die_that_is_wanted_again_comes_back_with_a_boot(server: Path, judge: Judge) -> None:
    (server / "sys/bus/pci/devices" / DIES[1]).unlink()
    write(server / RULES, rules_against(DIES[1]))
    warning = (
        "die 0000:06:00.0 is no longer in nvidia_driver_disabled_dies, but has been taken off the"
        " bus by it; it is back after the boot that follows this run, so run site.yml once more"
        " then."
    )
    assert judge(server) == ([], [warning])
    # A run that this instance stops would never get as far as to let it back.
    assert judge(server, vllm_instance_instances=[{"name": "a", "dies": [DIES[1]]}]) == (
        [
            "instance 'a' wants die 0000:06:00.0, which an earlier run has taken off the bus"
            " (nvidia_driver_disabled_dies); remove /etc/udev/rules.d/40-k80-disabled-dies.rules"
            " from the server, reboot it, and run this again."
        ],
        [warning],
    )


# --- Kernels and drivers ----------------------------------------------------

NEW_KERNEL = "6.12.43+deb12-amd64"
TOO_NEW = "newer than 6.9 (nvidia_driver_kernel_max), the newest that driver 470 builds on"
REMOVE = f"with apt-get purge 'linux-*-{NEW_KERNEL}'"
WORKS = "(5.10 to 6.9, such as linux-image-amd64, 6.1)"


def test_an_installed_kernel_that_is_too_new(server: Path, judge: Judge) -> None:
    add_kernel(server, NEW_KERNEL)
    assert judge(server) == (
        [
            f"its installed kernel {NEW_KERNEL} is {TOO_NEW}; remove it {REMOVE}, and hold one that"
            f" works {WORKS}."
        ],
        [],
    )
    # Whoever brings his own driver knows its kernels.
    assert judge(server, nvidia_driver_source="none") == ([], [])
    assert judge(server, nvidia_driver_kernel_max="6.12") == ([], [])


def test_the_running_kernel_is_too_new(server: Path, judge: Judge) -> None:
    add_kernel(server, NEW_KERNEL)
    assert judge(server, facts={"kernel": NEW_KERNEL}) == (
        [
            f"its running kernel {NEW_KERNEL} is {TOO_NEW}; boot and hold one that works {WORKS},"
            f" then remove this one {REMOVE}."
        ],
        [],
    )


def test_a_container_boots_no_kernel(server: Path, judge: Judge) -> None:
    """Its running kernel, and what is loaded there, are another machine's."""
    write(server / "sys/kernel/realtime", "1\n")
    write(server / "sys/module/nvidia/version", "550.90.07\n")
    bind(server, "0000:05:00.0", "nouveau")
    write(server / "sys/firmware/efi/efivars/SecureBoot-8be4df61", "\x06\0\0\0\x01")
    facts = {"kernel": "6.18.1"}
    findings, warnings = judge(server, facts=facts)
    assert len(findings) == 4, findings
    assert len(warnings) == 1, warnings
    assert judge(server, facts=facts, nvidia_driver_load_module=False) == ([], [])


def test_what_a_removed_kernel_left_is_none(server: Path, judge: Judge) -> None:
    write(server / "lib/modules/6.12.1-amd64/updates/dkms/nvidia.ko", "")
    assert judge(server) == ([], [])


def test_a_running_kernel_that_was_removed(server: Path, judge: Judge) -> None:
    findings, _ = judge(server, facts={"kernel": "6.1.0-17-amd64"})
    assert findings == [
        "its running kernel 6.1.0-17-amd64 is not installed any more, so no driver can be built for"
        " it; reboot into one that is (6.1.0-18-amd64)."
    ]


@pytest.mark.parametrize("place", ["boot/config-{}", "lib/modules/{}/config"])
def test_a_realtime_kernel(server: Path, judge: Judge, place: str) -> None:
    version = "5.14.0-503.11.1.el9_5.x86_64+rt"
    add_kernel(server, version)
    (server / f"boot/config-{version}").unlink()
    write(server / place.format(version), "#\nCONFIG_PREEMPT_RT=y\n")
    el9 = {"distribution": "AlmaLinux", "distribution_major_version": "9", "os_family": "RedHat"}
    findings, _ = judge(server, facts=el9, preflight_distributions=["AlmaLinux 9"])
    assert findings == [
        f"its installed kernel {version} is a PREEMPT_RT one, which driver 470 does not build on;"
        f" remove it with dnf remove 'kernel*-{version}', and hold one that works (5.10 to 6.9,"
        " such as kernel, 5.14)."
    ]


def add_packages_file(root: Path, *names: str) -> None:
    """Package lists as apt has them after an update."""
    write(
        root / "etc/apt/sources.list.d/debian.sources",
        "Types: deb\nURIs: file:/nowhere\nSuites: ./\nTrusted: yes\n",
    )
    entry = "Package: {}\nVersion: 1\nArchitecture: all\nFilename: ./a.deb\nSize: 1\nSHA256: 0\n"
    lists = "\n".join(entry.format(name) for name in names)
    write(root / "var/lib/apt/lists/_nowhere_._Packages", lists)
    (root / "var/lib/apt/lists/partial").mkdir()


def test_headers_that_can_be_had_and_that_cannot(server: Path, judge: Judge) -> None:
    for version in ("6.1.0-13-amd64", "6.1.0-17-amd64"):
        add_kernel(server, version, headers=False)
    # Before the first update nothing is known.
    assert judge(server) == ([], [])
    add_packages_file(server, "linux-headers-6.1.0-17-amd64")
    assert judge(server) == (
        [
            "the headers of its kernel 6.1.0-13-amd64 are neither installed nor in its package"
            " lists, so no driver can be built for it; boot the newest that fits (5.10 to 6.9, such"
            " as linux-image-amd64, 6.1) and remove this one with apt-get purge"
            " 'linux-*-6.1.0-13-amd64'."
        ],
        [],
    )
    assert judge(server, nvidia_driver_source="none") == ([], [])


def fake_program(directory: Path, name: str, text: str) -> None:
    write(directory / name, f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def el9(server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with rpm's database and dnf's lists instead of Debian's."""
    (server / "var/lib/dpkg/status").unlink()
    write(server / "var/lib/rpm/rpmdb.sqlite", "")
    (server / "etc/yum.repos.d").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return server


def test_packages_and_headers_of_el(el9: Path, tmp_path: Path, k80_host: ModuleType) -> None:
    fake_program(tmp_path / "bin", "rpm", "echo nvidia-driver-cuda 535.54.03; echo bash 5.1.8")
    fake_program(tmp_path / "bin", "dnf", "echo 5.14.0-503.11.1.el9_5.x86_64")
    assert k80_host.look_at_packages(el9, 5) == [
        {"name": "nvidia-driver-cuda", "version": "535.54.03"}
    ]
    versions = ["5.14.0-503.11.1.el9_5.x86_64", "5.14.0-70.el9.x86_64"]
    known = k80_host.header_packages(str(el9), versions, 5)
    assert known == dict(zip(versions, (True, False), strict=True))


@pytest.mark.parametrize("clocks", ["", "2505,875", "2505, 562"])
def test_clocks_are_two_numbers_or_nothing(server: Path, judge: Judge, clocks: str) -> None:
    assert judge(server, nvidia_driver_application_clocks=clocks) == ([], [])


@pytest.mark.parametrize("clocks", ["fast", "875", "2505,875,1"])
def test_other_clocks_are_refused(server: Path, judge: Judge, clocks: str) -> None:
    findings, warnings = judge(server, nvidia_driver_application_clocks=clocks)
    assert len(findings) == 1
    assert f"nvidia_driver_application_clocks is '{clocks}'; give" in findings[0]
    assert warnings == []


@pytest.mark.parametrize("address", ["", "http://mirror.example.org:8080/debian", "https://[::1]"])
def test_mirrors_with_an_address(server: Path, judge: Judge, address: str) -> None:
    assert judge(server, vllm_image_debian_mirror=address) == ([], [])


@pytest.mark.parametrize("address", ["mirror.example.org", "http://", "http://a b", "http://a#b"])
@pytest.mark.parametrize(
    "name",
    ["vllm_image_debian_mirror", "vllm_image_python_index_url", "vllm_model_python_index_url"],
)
def test_mirrors_without_one(server: Path, judge: Judge, name: str, address: str) -> None:
    findings, warnings = judge(server, **{name: address})
    assert f"{name} is '{address}', which is no address; write it like http" in findings[0]
    assert warnings == []


@pytest.mark.parametrize("path", ["cache", "~/cache", "/srv:1", "/"])
def test_a_cache_without_a_place(server: Path, judge: Judge, path: str) -> None:
    assert judge(server, vllm_instance_cache_dir=path)[0] == [
        f"vllm_instance_cache_dir is '{path}', but Docker mounts whole paths without a colon;"
        " write it like /var/lib/vllm-k80/cache."
    ]
    assert judge(server, vllm_instance_cache_dir="/srv/a b") == ([], [])


def test_secure_boot(server: Path, judge: Judge) -> None:
    variable = server / "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    write(variable, "\x06\0\0\0\0")
    assert judge(server) == ([], [])
    write(variable, "\x06\0\0\0\x01")
    assert judge(server) == (
        [
            "Secure Boot is on, which refuses a driver that was built here; turn it off in the BIOS"
            " setup, or set nvidia_driver_secure_boot to enroll and confirm the key at the console."
        ],
        [],
    )
    assert judge(server, nvidia_driver_secure_boot="enroll") == ([], [])


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("nvidia-driver-535-server", "535.183.01-0ubuntu0.22.04.1"),
        ("linux-modules-nvidia-550-6.8.0-40-generic", "6.8.0-40.40"),
        ("libcuda1", "525.147.05-7~deb12u1"),
        ("cuda-drivers", "560.35.03-1"),
    ],
)
def test_a_newer_driver_is_installed(server: Path, judge: Judge, name: str, version: str) -> None:
    add_package(server, name, version)
    assert judge(server) == (
        [
            "a driver of a newer branch than 470, which does not know the K80, is installed"
            f" ({name} {version}); remove it with apt-get purge {name}, then reboot."
        ],
        [],
    )


def test_a_newer_driver_for_another_gpu(server: Path, judge: Judge) -> None:
    add_device(server, "0000:00:03.0/0000:09:00.0", GPU | {"device": "0x2684"} | FULL_LINK)
    write(server / "sys/module/nvidia/version", "550.90.07\n")
    findings, _ = judge(server)
    assert findings == [
        "the loaded driver 550.90.07 is of a newer branch than 470 and does not know the K80;"
        " remove what brought it, then reboot; a server has one NVIDIA driver, so take out either"
        " the K80s or 0000:09:00.0 (10de:2684)."
    ]


def test_a_newer_driver_from_a_runfile(server: Path, judge: Judge) -> None:
    (server / "var/lib/dpkg/status").unlink()
    library = server / "usr/lib/x86_64-linux-gnu/libcuda.so.535.54.03"
    write(library, "")
    findings, _ = judge(server)
    assert findings == [
        "a driver of a newer branch than 470, which does not know the K80, is installed"
        f" ({library} 535.54.03); remove it with nvidia-uninstall, then reboot."
    ]


def test_drivers_that_are_in_nobodys_way(server: Path, judge: Judge) -> None:
    add_package(server, "nvidia-driver-535", "535.1-1", status="deinstall ok config-files")
    add_package(server, "nvidia-kernel-common", "20220217+3~deb12u1")
    add_package(server, "libnvidia-container1", "1.17.8-1")
    write(server / "sys/module/nvidia/version", "470.256.02\n")
    assert judge(server) == ([], [])


def test_installed_packages_are_told_by_name(server: Path, k80_host: ModuleType) -> None:
    add_package(server, "haproxy", "2.6.12-1", status="deinstall ok config-files")
    add_package(server, "socat", "1.7.4.4-2")
    told = k80_host.look_at_host(
        {
            "root": str(server),
            "timeout": 10,
            "disabled_dies": [],
            "space": [],
            "repositories": False,
            "now": 0.0,
        },
        0.0,
    )
    assert told["installed"]["socat"] == "1.7.4.4-2"
    assert "haproxy" not in told["installed"]


def test_nouveau_is_told(server: Path, judge: Judge) -> None:
    write(server / "sys/module/nouveau/refcnt", "1\n")
    assert judge(server) == ([], [])  # as far as it goes: it does not know the card
    bind(server, "0000:05:00.0", "nouveau")
    assert judge(server) == (
        [],
        [
            "the driver nouveau has 0000:05:00.0; role nvidia_driver keeps it out from"
            " the next boot on, which nvidia_driver_reboot allows it to cause."
        ],
    )


def test_another_docker_is_not_removed_unasked(server: Path, judge: Judge) -> None:
    for name in ("docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin"):
        add_package(server, name, "5:27.3.1-1~debian.12~bookworm")
    assert judge(server) == (
        [
            "it has a Docker of another origin (containerd.io, docker-ce, docker-ce-cli), which"
            " would be removed, with what runs in it, for docker.io; remove it yourself with"
            " apt-get purge containerd.io docker-ce docker-ce-cli, or set docker_packages to [] to"
            " have it used (which was never tried)."
        ],
        [],
    )
    assert judge(server, docker_packages=[]) == ([], [])
    asked = ["docker-ce=5:27.3.1-1~debian.12~bookworm", "docker-compose-plugin"]
    assert judge(server, docker_packages=asked) == ([], [])


def test_the_toolkits_repository_has_one_key(server: Path, judge: Judge) -> None:
    sources = server / "etc/apt/sources.list.d"
    address = "https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH)"
    write(sources / "nvidia-container-toolkit.sources", f"URIs: {address}\n")
    write(sources / "off.list", f"# deb {address} /\n")
    write(sources / "off.sources", f"Enabled: no\nURIs: {address}\n\nURIs: https://a.example/\n")
    write(sources / "old.list", f"deb {address.replace('deb/', 'debian11/')} /\n")
    assert judge(server) == ([], [])
    write(sources / "nvidia.list", f"deb [signed-by=/usr/share/keyrings/n.gpg] {address} /\n")
    assert judge(server) == (
        [
            "/etc/apt/sources.list.d/nvidia.list names the repository of NVIDIA's container"
            " toolkit, and apt reads no source at all where two of them give it different keys;"
            " remove the file, for the role has one of its own."
        ],
        [],
    )
    assert judge(server, nvidia_container_toolkit_key="/usr/share/keyrings/n.gpg") == ([], [])
    mirror = "https://mirror.example.org/toolkit/deb"
    assert judge(server, nvidia_container_toolkit_repository=mirror) == ([], [])


# --- Clock and network ------------------------------------------------------


def test_an_address_to_listen_on(server: Path, judge: Judge) -> None:
    facts: dict[str, Any] = {"default_ipv4": {}}
    findings, _ = judge(server, facts=facts)
    assert findings == [
        "it has no default route, which tells the address that instances listen on; set"
        " vllm_instance_bind_address to the one by which the gateways reach it."
    ]
    assert judge(server, facts=facts, vllm_instance_bind_address="10.0.0.7") == ([], [])
    gateway = judge(server, facts=facts, groups=["k80_gateways"])
    assert gateway[0] == [
        "it has no default route, which tells the address that the servers' firewalls let in; set"
        " vllm_instance_gateway_addresses to those from which the gateways ask."
    ]
    assert judge(
        server,
        facts=facts,
        groups=["k80_gateways"],
        vllm_instance_gateway_addresses=["10.0.0.1"],
    ) == ([], [])


def test_a_clock_that_is_off(server: Path, judge: Judge) -> None:
    assert judge(server, ahead=-200) == ([], [])
    findings, warnings = judge(server, ahead=-3 * 3600)
    assert not findings
    assert len(warnings) == 1
    assert "UTC, 3 hours behind this machine's (preflight_clock_tolerance), so" in warnings[0]


def test_a_clock_before_its_package_lists(server: Path, judge: Judge) -> None:
    release = server / "var/lib/apt/lists/deb.debian.org_dists_bookworm_InRelease"
    write(release, "Origin: Debian\nDate: Sat, 09 Nov 2024 10:10:04 UTC\n")
    assert judge(server) == ([], [])
    write(release, "Origin: Debian\nDate: Sat, 09 Nov 2999 10:10:04 UTC\n")
    findings, warnings = judge(server)
    assert not warnings
    assert len(findings) == 1
    assert "but its package lists were made on 2999-11-09 10:10, so that no" in findings[0]


@pytest.mark.parametrize(("may", "told"), [("000001ffffffffff", 1), ("00000000a80425fb", 0)])
def test_a_clock_that_nothing_keeps(
    server: Path,
    judge: Judge,
    k80_host: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    may: str,
    told: int,
) -> None:
    """That is the machine's business where it may not be set, as in a container."""
    monkeypatch.setattr(k80_host, "kernel_clock_is_synchronised", lambda: False)
    write(server / "proc/self/status", f"Name:\tcat\nCapBnd:\t{may}\n")
    findings, warnings = judge(server)
    assert not findings
    assert [w[:31] for w in warnings] == ["its clock is not synchronised, "] * told


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        there = self.path == "/good/dists/bookworm/InRelease"
        self.send_response(200 if there else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def mirror() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# The roles' own sources, if any, are not on the mirror of these tests.
TRY = {"preflight_try_repositories": True, "__preflight_unused_roles": ["nvidia_container_toolkit"]}


def test_repositories_that_do_not_answer(server: Path, judge: Judge, mirror: str) -> None:
    write(
        server / "etc/apt/sources.list",
        f"deb {mirror}/good bookworm main contrib\n"
        f"deb {mirror}/gone bookworm main\n"
        f"deb file:/srv/mirror ./\n",
    )
    url = f"{mirror}/driver.run"
    with_password = url.replace("//", "//user:secret@")
    advice = (
        "; correct its network, its proxy or the source that names it (preflight_try_repositories:"
        " false for no such check)."
    )
    told = [
        f"{mirror}/gone/dists/bookworm cannot be had from it (404  Not Found [IP: 127.0.0.1"
        f" {mirror.rsplit(':', 1)[1]}]){advice}",
        f"{url} cannot be had from it (404 Not Found){advice}",
    ]
    variables = TRY | {
        "nvidia_driver_source": "runfile",
        "nvidia_driver_runfile_url": with_password,
    }
    assert judge(server, **variables) == (told, [])
    # A server that serves already may need nothing of them.
    paths = {"k80_servers": str(server)}
    assert judge(server, **variables, __preflight_serving_paths=paths) == ([], told)


def test_the_disc_of_the_installer_is_no_source(server: Path, judge: Judge) -> None:
    disc = "[Debian GNU/Linux 12.8.0 _Bookworm_ - Official amd64 DVD Binary-1]"
    write(server / "etc/apt/sources.list", f"deb cdrom:{disc}/ bookworm contrib main\n")
    findings, _ = judge(server, **TRY)
    [finding] = findings
    assert finding.startswith(
        f"cdrom://{disc}/dists/bookworm cannot be had from it (it is a disc, and nobody is there to"
        " insert it); correct"
    )


def test_apt_is_tried_through_its_proxy(
    server: Path, judge: Judge, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server / "etc/apt/sources.list", "deb http://nowhere.invalid/debian bookworm main\n")
    monkeypatch.setenv("http_proxy", mirror)
    findings, _ = judge(server, **TRY)
    assert len(findings) == 1
    assert "(404" in findings[0], "the proxy did not answer"


def role(plugin: ModuleType, name: str, variables: list[str]) -> Any:
    """A role with these variables."""
    options: dict[str, Any] = {variable: {} for variable in variables}
    if f"{name}_source" in variables:
        choices = ["distribution", "repository", "runfile", "none"]
        options[f"{name}_source"] = {"choices": choices}
    specs = {"argument_specs": {"main": {"options": options}}}
    return plugin.Role(Path(name), lambda path: specs)


DRIVER = {"uri": "http://user:pw@m/driver/", "suite": "bookworm"}
SOURCES = {
    "a_source": "repository",
    "a_repository": DRIVER,
    "a_runfile_url": "https://m/a.run",
    "a_repository_key": "https://m/a.asc",
    "a_api_key": "a secret",
    "b_repository": "http://m/b",
    "b_suite": "/",
    "c_source": "repository",
    "c_repository_url": "http://m/c",
    "c_repository_suite": "stable",
}


@pytest.mark.parametrize(
    ("settings", "apt", "urls"),
    [
        (
            {"c_source": "distribution"},
            ["http://user:pw@m/driver/dists/bookworm", "http://m/b"],
            ["https://m/a.asc"],
        ),
        (
            {"a_source": "runfile", "b_state": "absent"},
            ["http://m/c/dists/stable"],
            ["https://m/a.run"],
        ),
        ({"a_source": "none", "__preflight_unused_roles": ["c"]}, ["http://m/b"], []),
        (
            {"a_source": "none", "c_source": "none", "facts": {"os_family": "RedHat"}},
            [],
            ["http://m/b/repodata/repomd.xml"],
        ),
    ],
)
def test_only_what_roles_will_use_is_tried(
    judge: Judge, plugin: ModuleType, settings: dict[str, Any], apt: list[str], urls: list[str]
) -> None:
    host = judge.host(**SOURCES | settings)
    host.roles = [role(plugin, name, [v for v in SOURCES if v[0] == name]) for name in "abc"]
    assert plugin.role_repositories(host) == (apt, urls)


# --- Probes -----------------------------------------------------------------


def test_a_probe_that_hangs_or_breaks_is_told(server: Path, judge: Judge) -> None:
    host = judge.host()
    host.seen = judge.module.look_at_host(
        {"root": str(server), "timeout": 5, "now": 0.0, "space": [], "repositories": False}
        | {"disabled_dies": []},
        time.time(),
    )
    del host.seen["clock"]
    host.seen["silent"] = {"clock": "no answer within 10 s"}
    assert [str(s) for s in judge.plugin.told_of(host)] == [
        "its clock could not be read (no answer within 10 s); look for a broken file or a file"
        " system that no longer answers."
    ]


def test_probes_run_beside_each_other_with_a_limit(k80_host: ModuleType) -> None:
    started = time.monotonic()
    answers, silent = k80_host.run_probes(
        {"quick": (str, 1), "hangs": (time.sleep, 60), "breaks": (int, "x")}, 2
    )
    assert time.monotonic() - started < 30
    assert answers == {"quick": "1"}
    assert silent["hangs"] == "no answer within 2 s"
    assert silent["breaks"].startswith("ValueError: ")


def test_space_is_that_of_the_nearest_directory(tmp_path: Path, k80_host: ModuleType) -> None:
    there, yet_to_come = (k80_host.space_of(str(tmp_path / name)) for name in ("", "a/b"))
    assert there["exists"]
    assert not yet_to_come["exists"]
    assert there["filesystem"] == yet_to_come["filesystem"]
    assert yet_to_come["free_bytes"] > 0
