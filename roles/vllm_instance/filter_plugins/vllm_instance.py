"""Filters of the role vllm_instance."""

from __future__ import annotations

import hashlib
import json
import re

from ansible.errors import AnsibleFilterError


def uuids_by_address(report: str) -> dict[str, str]:
    """PCI address to UUID, from ``nvidia-smi --query-gpu=pci.bus_id,uuid --format=csv,noheader``.

    The driver writes addresses with an eight digit domain in capitals, the kernel with four.
    """
    found = {}
    for line in report.splitlines():
        address, _, uuid = (part.strip() for part in line.partition(","))
        if uuid:
            domain, _, rest = address.lower().partition(":")
            found[f"{int(domain, 16):04x}:{rest}"] = uuid
    return found


def _cpus(dies: list[dict]) -> str:
    lists = {die["local_cpulist"] for die in dies if die.get("local_cpulist")}
    return ",".join(sorted(lists)) if all(die.get("local_cpulist") for die in dies) else ""


def _nodes(dies: list[dict]) -> str:
    nodes = sorted({int(die.get("numa_node", -1)) for die in dies})
    return ",".join(map(str, nodes)) if nodes[0] >= 0 else ""


def resolve_instances(
    instances: list[dict],
    dies: list[dict],
    uuids: dict[str, str],
    models: dict[str, dict],
    catalogue: dict[str, dict],
    settings: dict,
) -> list[dict]:
    """What is declared, completed with what was found: one dictionary an instance.

    Args:
        instances: as declared; empty for one on each die.
        dies: ``preflight_dies``.
        uuids: from `uuids_by_address`.
        models: ``vllm_model_paths``. catalogue: ``vllm_model_catalogue``.
        settings: model, base_port, address, extra_args: what instances have in common.
    """
    by_address = {die["pci_address"]: die for die in dies}
    declared = instances or [
        {"name": f"die{index}", "dies": [die["pci_address"]]} for index, die in enumerate(dies)
    ]
    resolved = []
    for index, instance in enumerate(declared):
        addresses = [address.lower() for address in instance["dies"]]
        for address in addresses:
            if address not in by_address:
                raise AnsibleFilterError(
                    f"Instance {instance['name']}: there is no K80 die at {address}; there are "
                    f"{', '.join(by_address) or 'none'}."
                )
            if address not in uuids:
                raise AnsibleFilterError(
                    f"Instance {instance['name']}: nvidia-smi does not list the die at {address}, "
                    f"which the PCI bus has. Look at `dmesg | grep NVRM` on the server."
                )
        name = instance.get("model") or settings["model"]
        model = models[name]
        arguments = [*settings["extra_args"], *(instance.get("extra_args") or [])]
        if len(addresses) > 1:
            arguments = ["--tensor-parallel-size", str(len(addresses)), *arguments]
        identity = [name, model["revision"], arguments]
        own_dies = [by_address[address] for address in addresses]
        resolved.append(
            {
                "name": instance["name"],
                "dies": addresses,
                "uuids": [uuids[address] for address in addresses],
                "cpus": _cpus(own_dies),
                "nodes": _nodes(own_dies),
                "address": settings["address"],
                "port": int(instance.get("port") or settings["base_port"] + index),
                "model": name,
                "served_model": catalogue[name].get("served_name") or name,
                "host_path": model["host_path"],
                "serve_path": model["serve_path"],
                "arguments": arguments,
                # Another model or setting has other tokens; another image is judged by these.
                "golden": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12],
            }
        )
    return resolved


def systemd_quote(word: str) -> str:
    """One word of an ``ExecStart=`` line, whatever is in it (systemd.service(5), command lines)."""
    if re.fullmatch(r"[\w@+=:,./-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("%", "%%").replace("$", "$$") + '"'


class FilterModule:
    """Filters of the role vllm_instance."""

    def filters(self) -> dict:
        return {
            "vllm_instance_uuids_by_address": uuids_by_address,
            "vllm_instance_resolve": resolve_instances,
            "vllm_instance_systemd_quote": systemd_quote,
        }
