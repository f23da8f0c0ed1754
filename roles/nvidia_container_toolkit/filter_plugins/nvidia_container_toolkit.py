"""Filters of the role nvidia_container_toolkit."""

from __future__ import annotations

import re
from typing import Any


def uuids_of(smi_output: str) -> dict[str, str]:
    """What nvidia-smi printed of pci.bus_id and uuid as CSV, by the kernel's addresses."""
    rows = [line.split(", ") for line in smi_output.splitlines() if ", " in line]
    # nvidia-smi writes the domain with eight digits, and in capitals.
    return {bus_id[-12:].lower(): uuid.strip() for bus_id, uuid in rows}


def silent(dies: list[dict[str, Any]], smi_output: str) -> list[str]:
    """The single dies to which the driver does not get through; none where that is all of them."""
    addresses = [die["pci_address"] for die in dies]
    named = re.findall(r"(?i)device handle for GPU ?([0-9a-f]+:[0-9a-f:]+\.[0-7])", smi_output)
    if named:
        return [address[-12:].lower() for address in named]
    uuids = uuids_of(smi_output)
    left = [address for address in addresses if address not in uuids]
    return left if left != addresses else []


def unspecified(dies: list[dict[str, Any]], smi_output: str, cdi_output: str) -> list[str]:
    """Which dies no container can get, one sentence each.

    `smi_output` is nvidia-smi's pci.bus_id and uuid as CSV, `cdi_output` what `nvidia-ctk cdi list`
    prints.
    """
    uuids = uuids_of(smi_output)
    specified = set(cdi_output.split())
    told = []
    for address in (die["pci_address"] for die in dies):
        uuid = uuids.get(address)
        if uuid is None:
            told.append(f"the driver does not show the die at {address}")
        elif f"nvidia.com/gpu={uuid}" not in specified:
            told.append(f"the die at {address} ({uuid}) is not in the CDI specification")
    return told


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "nvidia_container_toolkit_silent": silent,
            "nvidia_container_toolkit_unspecified": unspecified,
        }
