"""``vllm-k80 info``: what this installation consists of and what it runs on."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def version_of(package: str) -> str:
    """The version of an installed package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def collect() -> dict[str, Any]:
    """Versions, kernels and devices, as plain data."""
    import torch

    from vllm_k80 import device
    from vllm_k80.ops import driver

    devices = [
        {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
            "memory_mib": torch.cuda.get_device_properties(index).total_memory // 1024**2,
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "versions": {
            name: version_of(name)
            for name in ("vllm-k80", "vllm", "torch", "transformers", "xformers", "xgrammar")
        },
        "kernels": str(driver.FAT_BINARY) if driver.available() else None,
        "die": os.environ.get("NVIDIA_VISIBLE_DEVICES"),
        "devices": devices,
        "operators_run_on": "GPU" if devices else "CPU, by their references",
        "reported_capability": "{}.{}".format(*device.K80) if not devices else None,
    }


def show(*, as_json: bool) -> None:
    """Print it, for a person or for a program."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts["versions"].items():
        print(f"{name:14} {value}")
    print(f"{'kernels':14} {facts['kernels'] or 'none: this installation has references only'}")
    print(f"{'die':14} {facts['die'] or '(NVIDIA_VISIBLE_DEVICES is not set)'}")
    for entry in facts["devices"]:
        print(
            f"{'device':14} {entry['index']}: {entry['name']}, sm_{entry['capability']}, "
            f"{entry['memory_mib']} MiB"
        )
    print(f"{'operators':14} {facts['operators_run_on']}")
