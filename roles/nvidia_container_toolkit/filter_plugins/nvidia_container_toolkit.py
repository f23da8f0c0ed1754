"""Filter of the role nvidia_container_toolkit."""

from __future__ import annotations

from typing import Any


def unspecified(dies: list[dict[str, Any]], smi_output: str, cdi_output: str) -> list[str]:
    """Which dies no container can get, one sentence each.

    `smi_output` is nvidia-smi's pci.bus_id and uuid as CSV, `cdi_output` what `nvidia-ctk cdi list`
    prints.
    """
    rows = [line.split(", ") for line in smi_output.splitlines() if ", " in line]
    # nvidia-smi writes the domain with eight digits, and in capitals.
    uuids = {bus_id[-12:].lower(): uuid.strip() for bus_id, uuid in rows}
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
        return {"nvidia_container_toolkit_unspecified": unspecified}
