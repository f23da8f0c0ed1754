"""A K80 server below a directory, as far as preflight looks: PCI tree, kernels, packages."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Template

ROOT = Path(__file__).resolve().parent.parent
RULES = "etc/udev/rules.d/40-k80-disabled-dies.rules"
GPU = {"vendor": "0x10de", "device": "0x102d", "class": "0x030200", "local_cpulist": "0-9"}
SWITCH = {"vendor": "0x10b5", "device": "0x8747", "class": "0x060400"}
ROOT_PORT = {"vendor": "0x8086", "device": "0x2f04", "class": "0x060400"}
FULL_LINK = {
    "current_link_speed": "8.0 GT/s PCIe",
    "max_link_speed": "8.0 GT/s PCIe",
    "current_link_width": "16",
    "max_link_width": "16",
}
KERNEL = "6.1.0-18-amd64"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_device(root: Path, path: str, attributes: dict[str, str]) -> Path:
    """A device as Linux lays it out: in the directory of its bridge, with a link to it."""
    device = root / "sys/devices/pci0000:00" / path
    device.mkdir(parents=True)
    for name, value in attributes.items():
        (device / name).write_text(f"{value}\n")
    links = root / "sys/bus/pci/devices"
    links.mkdir(parents=True, exist_ok=True)
    (links / device.name).symlink_to(os.path.relpath(device, links))
    return device


def bind(root: Path, address: str, driver: str) -> None:
    """This driver has that device."""
    device = root / "sys/bus/pci/devices" / address
    (device / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)


def resource(memory: int) -> str:
    """A die's regions: registers, its memory's window at that address, and 32 MB."""
    regions = [
        (0xF5000000, 0xF5FFFFFF, 0x40200),
        (memory, memory + (16 << 30) - 1, 0x14220C),
        (0, 0, 0),
        (0xF6000000, 0xF7FFFFFF, 0x14220C),
    ]
    return "\n".join(" ".join(f"0x{number:016x}" for number in region) for region in regions)


def add_board(root: Path, port: str, bus: int, numa_node: int) -> None:
    """A K80: the switch's upstream port on `bus`, and its two dies two buses further."""
    upstream = f"{port}/0000:{bus:02x}:00.0"
    add_device(root, port, ROOT_PORT)
    add_device(root, upstream, SWITCH | FULL_LINK)
    for index, slot in enumerate(("08", "10")):
        downstream = f"{upstream}/0000:{bus + 1:02x}:{slot}.0"
        add_device(root, downstream, SWITCH)
        die = GPU | FULL_LINK | {"numa_node": str(numa_node)}
        die["resource"] = resource((0x3800 + bus + index) << 32)
        add_device(root, f"{downstream}/0000:{bus + 2 + index:02x}:00.0", die)


def rules_against(*dies: str) -> str:
    """What the role nvidia_driver writes for dies that are left out."""
    template = ROOT / "roles/nvidia_driver/templates/k80-disabled-dies.rules.j2"
    variables = {"__nvidia_driver_disabled": dies, "__nvidia_driver_disabled_rules": f"/{RULES}"}
    return Template(template.read_text(), trim_blocks=True).render(variables)


def add_kernel(root: Path, version: str, headers: bool = True) -> None:
    """An installed kernel, by Debian's packages."""
    write(root / f"boot/vmlinuz-{version}", "")
    write(root / f"boot/config-{version}", "#\n# CONFIG_PREEMPT_RT is not set\n")
    write(root / f"lib/modules/{version}/kernel/net/ipv6.ko", "")
    if headers:
        write(root / f"usr/src/linux-headers-{version}/Makefile", "")
        build = root / f"lib/modules/{version}/build"
        build.symlink_to(f"../../../usr/src/linux-headers-{version}")


def add_package(root: Path, name: str, version: str, status: str = "install ok installed") -> None:
    path = root / "var/lib/dpkg/status"
    known = path.read_text() if path.exists() else ""
    write(path, f"{known}Package: {name}\nStatus: {status}\nVersion: {version}\nDepends: a\n\n")


def add_server(root: Path) -> Path:
    """A healthy one with one board."""
    add_board(root, "0000:00:02.0", 3, numa_node=0)
    add_kernel(root, KERNEL)
    add_package(root, "nvidia-tesla-470-kernel-dkms", "470.256.02-1~deb12u1")
    # Its tools have versions of their own.
    add_package(root, "nvidia-persistenced", "535.171.04-1~deb12u1")
    add_package(root, "nvidia-container-toolkit", "1.17.8-1")
    return root
