#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What DKMS has made of the driver for each installed kernel, and what is loaded."""

DOCUMENTATION = r"""
module: nvidia_driver_state
short_description: The driver's module in each installed kernel
description:
  - Reads DKMS, the modules themselves and the initial RAM disks. Changes nothing.
options:
  dkms_name:
    description: Name of the driver in DKMS.
    type: str
    required: true
  module:
    description: Name of the kernel module.
    type: str
    required: true
  version:
    description: Version of the driver that is wanted.
    type: str
    required: true
  boot_file:
    description: A file of which the initial RAM disks have a copy, so that they must not be older.
    type: path
    required: true
  signed:
    description: Whether a module that nobody has signed is a fault, as Secure Boot takes it.
    type: bool
    default: false
  dies:
    description: PCI addresses of the dies that the driver is for.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Changes nothing, ever.
    support: full
"""

EXAMPLES = r"""
- name: Look at the module in every kernel
  nvidia_driver_state:
    dkms_name: nvidia-tesla-470
    module: nvidia-tesla-470
    version: 470.256.02
    boot_file: /etc/modprobe.d/k80-nouveau.conf
  register: __state
"""

RETURN = r"""
kernels:
  description: Every installed kernel, sorted by name. One without its headers' directory has none.
  type: list
  elements: dict
  returned: success
  contains:
    kernel:
      description: Its release, as C(uname -r) says it.
      type: str
    headers:
      description: Whether modules can be built for it.
      type: bool
    dkms:
      description: What DKMS says; C(installed) is the only good answer.
      type: str
    module_version:
      description: Version of the module that this kernel would load; empty where there is none.
      type: str
    signer:
      description: Who signed that module, as Secure Boot would ask; empty where nobody did.
      type: str
    initramfs_is_old:
      description: Whether its initial RAM disk was made before C(boot_file).
      type: bool
faults:
  description: What is wrong, one sentence for each kernel.
  type: list
  elements: str
  returned: success
loaded_version:
  description: Version of the module that is loaded; empty if none is.
  type: str
  returned: success
nouveau:
  description: The dies that the driver nouveau has. Without any it does no harm.
  type: list
  elements: str
  returned: success
"""

import os
import re

from ansible.module_utils.basic import AnsibleModule

# Overridden by tests.
MODULES = "/lib/modules"
BOOT = "/boot"
SYSFS = "/sys"
DKMS_TREE = "/var/lib/dkms"


def installed_kernels():
    """Kernels with modules of their own; on a host without any, those with headers."""
    releases = sorted(os.listdir(MODULES)) if os.path.isdir(MODULES) else []

    def having(part):
        return [each for each in releases if os.path.exists(os.path.join(MODULES, each, part))]

    return having("kernel") or having("build")


def dkms_states(output):
    """What `dkms status` says, by kernel.

    Both its forms: "name, version, kernel, arch: state" until 2.8 and
    "name/version, kernel, arch: state" since 3.0. Warnings follow the state.
    """
    line = re.compile(r"^[^/,\s]+(?:/|, )[^,]+, ([^,]+), [^:]+: ([\w-]+)", re.MULTILINE)
    return dict(line.findall(output))


def initramfs_is_old(kernel, boot_file):
    for name in ("initrd.img-" + kernel, "initramfs-" + kernel + ".img"):
        path = os.path.join(BOOT, name)
        if os.path.exists(path):
            made = os.path.getmtime(path)
            return os.path.exists(boot_file) and made < os.path.getmtime(boot_file)
    return False  # a host that boots without one, or not by itself


def fault_of(state, name, version, signed):
    """What is wrong with the driver in one kernel, or nothing."""
    kernel = state["kernel"]
    if state["dkms"] == "installed" and state["module_version"] == version:
        if state["signer"] or not signed:
            return None
        return (
            "DKMS does not sign the driver for kernel %s, so that Secure Boot lets it in by no key:"
            " turn Secure Boot off in the BIOS setup, or have DKMS sign (mok_signing_key in"
            " /etc/dkms/framework.conf)." % kernel
        )
    if not state["headers"]:
        return (
            "kernel %s has no headers, so the driver cannot be built for it: install them, or"
            " remove that kernel." % kernel
        )
    if state["dkms"] != "installed":
        log = "%s/%s/%s/build/make.log" % (DKMS_TREE, name, version)
        return "DKMS has not built driver %s for kernel %s (it says: %s): see %s on the server." % (
            version,
            kernel,
            state["dkms"] or "nothing",
            log,
        )
    return (
        "kernel %s would load driver %s instead of %s: remove the other one (dkms status, and"
        " modinfo -k %s nvidia)." % (kernel, state["module_version"] or "(none)", version, kernel)
    )


def read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except (IOError, OSError):
        return ""


def driver_of(device):
    driver = os.path.join(SYSFS, "bus/pci/devices", device, "driver")
    return os.path.basename(os.path.realpath(driver)) if os.path.islink(driver) else ""


def main():
    module = AnsibleModule(
        argument_spec={
            "dkms_name": {"type": "str", "required": True},
            "module": {"type": "str", "required": True},
            "version": {"type": "str", "required": True},
            "boot_file": {"type": "path", "required": True},
            "signed": {"type": "bool", "default": False},
            "dies": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    wanted = module.params

    def output(*command):
        program = module.get_bin_path(command[0], opt_dirs=["/usr/sbin", "/sbin"])
        return module.run_command([program, *command[1:]])[1] if program else ""

    def modinfo(kernel, field):
        return output("modinfo", "-k", kernel, "-F", field, wanted["module"]).strip()

    states = dkms_states(
        output("dkms", "status", "-m", wanted["dkms_name"], "-v", wanted["version"])
    )
    kernels = [
        {
            "kernel": kernel,
            "headers": os.path.exists(os.path.join(MODULES, kernel, "build")),
            "dkms": states.get(kernel, ""),
            "module_version": modinfo(kernel, "version"),
            "signer": modinfo(kernel, "signer"),
            "initramfs_is_old": initramfs_is_old(kernel, wanted["boot_file"]),
        }
        for kernel in installed_kernels()
    ]
    faults = [
        fault_of(state, wanted["dkms_name"], wanted["version"], wanted["signed"])
        for state in kernels
    ]
    if not kernels:
        faults = ["there is no kernel in %s: install the distribution's." % MODULES]
    module.exit_json(
        changed=False,
        kernels=kernels,
        faults=[fault for fault in faults if fault],
        loaded_version=read(os.path.join(SYSFS, "module/nvidia/version")),
        nouveau=[die for die in wanted["dies"] if driver_of(die) == "nouveau"],
    )


if __name__ == "__main__":
    main()
