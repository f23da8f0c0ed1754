"""What the doctor compares a server with: the facts that the roles before it have set."""

from __future__ import annotations

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


class FilterModule:
    """Filters of the role doctor."""

    def filters(self) -> dict:
        return {"doctor_declared": declared}
