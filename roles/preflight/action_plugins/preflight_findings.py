# SPDX-License-Identifier: Apache-2.0
"""What speaks against provisioning a host: every finding, one sentence each.

A check is a generator decorated with the group whose hosts it looks at. To add
one, write it below the others:

    @check("k80_servers")
    def swap_is_off(host):
        if host.facts["swaptotal_mb"]:
            yield "swap is on; turn it off with swapoff -a and remove it from /etc/fstab."

Checks see the values that the roles will see: the inventory's, else the roles'
defaults. They change nothing.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.errors import UnsupportedError
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import module_loader

Check = Callable[["Host"], Iterator[str]]
CHECKS: list[tuple[str, Check]] = []


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
        for role in all_roles:
            self._variables = role.defaults | self._variables

        self.name: str = variables["inventory_hostname"]
        self.inventory: dict[str, list[str]] = variables["groups"]
        self.groups = {*variables["group_names"], "k80"}
        # What is wrong with models, by their names; found on the server.
        self.model_faults: dict[str, str] = {}
        self.facts: dict[str, Any] = variables["ansible_facts"]
        self.dies: list[dict[str, Any]] = self["__preflight_dies"]
        self.space = {entry["path"]: entry for entry in self["__preflight_space"]}

        mine = [name for group in self.groups for name in self["__preflight_roles"].get(group, [])]
        self.roles = [role for role in all_roles if role.name in mine]

    def __getitem__(self, variable: str) -> Any:
        return self._template(self._variables[variable], self._variables)

    def get(self, variable: str, type_: type) -> Any:
        """A value of that type, or an empty one: other checks report the wrong type."""
        try:
            value = self[variable]
        except (KeyError, AnsibleError):
            return type_()
        return value if isinstance(value, type_) else type_()

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
            }
            for index, instance in enumerate(wanted)
            if isinstance(instance, dict)
        ]

    @staticmethod
    def _addresses(dies: Any) -> list[str]:
        """PCI addresses as the kernel writes them."""
        return [str(die).lower() for die in dies] if isinstance(dies, list) else []

    @staticmethod
    def _port(port: Any) -> int | str:
        return port if isinstance(port, int) else str(port)

    def models(self) -> dict[str, Any]:
        """The entries of the catalogue that the instances name."""
        catalogue = self.get("vllm_model_catalogue", dict)
        names = {instance["model"] for instance in self.instances()}
        return {name: catalogue[name] for name in sorted(names & catalogue.keys())}


# --- The host ---------------------------------------------------------------


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


@check("k80_servers")
def kernel_is_recent_enough(host: Host) -> Iterator[str]:
    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

    if version(host.facts["kernel"]) < version(host["preflight_kernel_min"]):
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
    if not host.dies:
        yield (
            f"there is no Tesla K80 in its PCI tree ({host['preflight_sysfs_root']}/bus/pci/devices"
            ", 10de:102d); check that the card is seated and powered, or take the host out of"
            " k80_servers."
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
    serving = host.space[host["__preflight_serving_path"]]["exists"]
    filesystems = defaultdict(list)
    for path in host["preflight_disk_free_gb"]:
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
        if die not in here:
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
def instances_serve_one_model(host: Host) -> Iterator[str]:
    # The gateway hands any request to any instance. Servers that differ are told by its role.
    entries = {name: entry for name, entry in host.models().items() if isinstance(entry, dict)}
    served = {name: entry.get("served_name") for name, entry in entries.items()}
    names = sorted({served.get(i["model"]) or i["model"] for i in host.instances()})
    if len(names) > 1 and host.inventory.get("k80_gateways"):
        yield (
            f"its instances serve {' and '.join(names)}, but a gateway takes instances of one"
            " model; let all of vllm_instance_instances name the same."
        )


@check("k80_servers")
def models_can_be_had(host: Host) -> Iterator[str]:
    for name, fault in host.model_faults.items():
        yield f"model '{name}': {fault}; correct its entry in vllm_model_catalogue or the server."


@check("k80")
def ports_are_free_of_each_other(host: Host) -> Iterator[str]:
    users = defaultdict(list)
    if "k80_servers" in host.groups:
        for instance in host.instances():
            users[instance["port"]].append(f"instance '{instance['name']}'")
    for role in host.roles:
        for name in role.options:
            if name.endswith("_port") and name != "vllm_instance_base_port":
                users[host.get(name, int)].append(name)
    for port, names in users.items():
        if not isinstance(port, int) or not 0 < port < 65536:
            yield f"{names[0]} has port {port}, but ports are numbers from 1 to 65535; correct it."
        if len(names) > 1:
            yield f"{' and '.join(names)} all want port {port}; give each one of its own."


@check("k80_gateways")
def gateways_have_servers(host: Host) -> Iterator[str]:
    if not host.inventory.get("k80_servers"):
        yield "there is no server behind this gateway; add one to k80_servers."


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
        if not re.fullmatch(r"[A-Za-z0-9._@-]+", str(key.get("name"))):
            yield (
                f"gateway_api_keys names '{key.get('name')}', which the access log could not hold;"
                " use letters, digits and ._@- alone."
            )
    for field in ("name", "key"):
        for value, count in Counter(str(key.get(field)) for key in keys).items():
            if count > 1:
                which = f"the name '{value}'" if field == "name" else "one and the same key"
                yield f"{count} entries of gateway_api_keys have {which}; tell them apart."


class ActionModule(ActionBase):
    """Returns the findings; a later task reports those of all hosts together."""

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
        specs = sorted(roles.glob("*/meta/argument_specs.yml"))
        host = Host(variables, [Role(spec.parent.parent, load) for spec in specs], template)
        if "k80_servers" in host.groups:
            host.model_faults = self._model_faults(host, variables)
        findings = [
            f"{host.name}: {sentence}"
            for group, function in CHECKS
            if group in host.groups
            for sentence in function(host)
        ]
        return {"changed": False, "findings": findings}

    def _model_faults(self, host: Host, variables: dict[str, Any]) -> dict[str, str]:
        """What the module that will put the models in place says against them."""
        faults = {}
        for name, source in host.models().items():
            arguments = {"name": name, "source": source, "root": host["vllm_model_root"]}
            result = self._execute_module("vllm_model_store", arguments, task_vars=variables)
            if result.get("failed"):
                faults[name] = result["msg"].removeprefix(f"Model {name}: ").rstrip(".")
        return faults
