"""What the doctor compares a server with, and what the doctors of a fleet have told."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

INSTANCE = ("name", "dies", "uuids", "address", "port", "model")


def declared(
    facts: dict,
    instances: list[dict],
    models: dict[str, dict],
    catalogue: dict[str, dict],
    known: dict,
) -> dict:
    """The content of ``/etc/vllm-k80/doctor.json``. Nothing of it is secret.

    Args:
        facts: dies (``preflight_dies``), driver, toolkit, image, limits. What a run has left out
            is empty.
        instances: ``vllm_instance_resolved``.
        models: ``vllm_model_paths``. catalogue: ``vllm_model_catalogue``.
        known: what an earlier run has declared, which stays where this run has left it out. What
            none has declared is left out, so that the doctor skips what it would judge by it.
    """
    instances = instances or known.get("instances", [])
    uuids = {
        die: uuid
        for instance in instances
        for die, uuid in zip(instance["dies"], instance["uuids"], strict=True)
    }
    dies = [
        {
            "pci_address": die["pci_address"],
            "board": die["board"],
            "uuid": uuids.get(die["pci_address"], ""),
        }
        for die in facts["dies"]
    ]
    units = ["docker.service"]
    units += [unit for unit in known.get("boot_units", []) if not unit.startswith("vllm-k80-")]
    parts = {}
    for name in ("driver", "toolkit"):
        parts[name] = {key: value for key, value in facts[name].items() if key != "units"}
        units += facts[name].get("units", [])
    for instance in instances:
        unit = f"vllm-k80-{instance['name']}"
        units += [f"{unit}.service", f"{unit}-liveness.timer"]
        if instance["address"] != "127.0.0.1":
            units.append("vllm-k80-firewall.service")
    content = dict(
        facts,
        **parts,
        dies=dies,
        boot_units=list(dict.fromkeys(units)),
        models={
            name: {
                "host_path": model["host_path"],
                "serve_path": model["serve_path"],
                # What lies in a directory of the user's own has no manifest.
                "fetched": catalogue[name]["source"] != "directory",
            }
            for name, model in models.items()
        },
        instances=[{key: instance[key] for key in INSTANCE} for instance in instances],
    )
    return known | {name: value for name, value in content.items() if value}


def status_rows(answers: dict[str, dict]) -> list[dict]:
    """The rows of all hosts, under their names in the inventory, also of those that told none.

    Args:
        answers: by host, what ``k80-doctor --status --json`` ended with.
    """
    rows = []
    for host, answer in answers.items():
        if answer.get("unreachable"):
            rows.append(_row(host, "unreachable", answer.get("msg")))
            continue
        try:
            told = json.loads(answer["stdout"])
        except (KeyError, ValueError):
            said = answer.get("stderr") or answer.get("stdout") or answer.get("msg")
            rows.append(_row(host, "unknown", said))
            continue
        none = _row(host, "no dies", "there is no Tesla K80 in its PCI tree")
        rows += [row | {"host": host} for row in told] or [none]
    return rows


def _row(host: str, state: str, said: str | None) -> dict:
    """A row of a host that told none; the last line of what was said tells why."""
    lines = str(said or "it said nothing").strip().splitlines()
    why = lines[-1].strip().removeprefix("Task failed: ")
    texts = dict.fromkeys(("die", "uuid", "instance", "model", "image"), "")
    numbers = dict.fromkeys(("tokens_per_second", "kv_cache", "temperature", "since"))
    return {"host": host, **texts, "state": state, "why": why, **numbers}


def status_table(rows: list[dict]) -> str:
    """The table as the program itself prints it."""
    path = Path(__file__).parents[1] / "files/k80-doctor"
    loader = SourceFileLoader("k80_doctor", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("k80_doctor", loader))
    loader.exec_module(module)
    return module.status_table(rows)


class FilterModule:
    """Filters of the role doctor."""

    def filters(self) -> dict:
        return {
            "doctor_declared": declared,
            "doctor_status_rows": status_rows,
            "doctor_status_table": status_table,
        }
