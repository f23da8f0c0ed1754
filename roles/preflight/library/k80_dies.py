#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Find the Tesla K80 dies of a host in its PCI tree."""

DOCUMENTATION = r"""
module: k80_dies
short_description: Find the Tesla K80 dies of a host
description:
  - Reads the PCI tree that Linux shows in sysfs, so it needs no driver and no root.
  - A K80 board is two dies (GK210, 10de:102d) behind a PLX PEX 8747 switch of its own.
options:
  sysfs_root:
    description: Where sysfs is mounted.
    type: path
    default: /sys
attributes:
  check_mode:
    description: Changes nothing, ever.
    support: full
"""

EXAMPLES = r"""
- name: Find the dies
  k80_dies:
  register: __found
"""

RETURN = r"""
dies:
  description: The dies, sorted by PCI address.
  type: list
  elements: dict
  returned: success
  contains:
    pci_address:
      description: Address with its domain.
      type: str
      sample: "0000:05:00.0"
    board:
      description:
        - Address of the board's switch (its upstream port).
        - The die's own address where there is no such switch.
      type: str
      sample: "0000:03:00.0"
    numa_node:
      description: NUMA node; -1 where the kernel does not say. Then nothing may be pinned by it.
      type: int
      sample: 0
    local_cpulist:
      description: CPUs of that node, as the kernel writes lists.
      type: str
      sample: 0-9,20-29
"""

import os

from ansible.module_utils.basic import AnsibleModule

DIE = ("0x10de", "0x102d")
SWITCH = ("0x10b5", "0x8747")
CLASS_3D_CONTROLLER = "0x0302"


def read(device, name):
    """Content of a sysfs attribute; empty where there is none."""
    try:
        with open(os.path.join(device, name)) as attribute:
            return attribute.read().strip()
    except OSError:
        return ""


def is_a(device, identity):
    return (read(device, "vendor"), read(device, "device")) == identity


def board_of(die):
    """The upstream port of the switch that the die shares with its sibling.

    In sysfs a device lies in the directory of its bridge: …/upstream port/downstream
    port/die. Exactly two levels count, as the board may sit behind another such
    switch on the mainboard.
    """
    downstream = os.path.dirname(os.path.realpath(die))
    upstream = os.path.dirname(downstream)
    if is_a(downstream, SWITCH) and is_a(upstream, SWITCH):
        return os.path.basename(upstream)
    return os.path.basename(die)


def numa_node_of(die):
    try:
        return int(read(die, "numa_node"))
    except ValueError:
        return -1


def find_dies(sysfs_root):
    devices = os.path.join(sysfs_root, "bus", "pci", "devices")
    # A host without PCI has no such directory, and no dies.
    addresses = sorted(os.listdir(devices)) if os.path.isdir(devices) else []
    paths = [os.path.join(devices, address) for address in addresses]
    return [
        {
            "pci_address": os.path.basename(path),
            "board": board_of(path),
            "numa_node": numa_node_of(path),
            "local_cpulist": read(path, "local_cpulist"),
        }
        for path in paths
        if is_a(path, DIE) and read(path, "class").startswith(CLASS_3D_CONTROLLER)
    ]


def main():
    module = AnsibleModule(
        argument_spec={"sysfs_root": {"type": "path", "default": "/sys"}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, dies=find_dies(module.params["sysfs_root"]))


if __name__ == "__main__":
    main()
