"""The proof at the end of the role: which dies no container can get, in words."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

DIES = [{"pci_address": "0000:05:00.0"}, {"pci_address": "0000:8a:00.0"}]
SMI = "00000000:05:00.0, GPU-4f0a\n00000000:8A:00.0, GPU-b7e6\n"
LISTED = "\n".join(f"nvidia.com/gpu={name}" for name in ("0", "1", "GPU-4f0a", "GPU-b7e6", "all"))


@pytest.fixture(scope="module")
def unspecified(load_module: Callable[[str], ModuleType]) -> Callable[..., list[str]]:
    module = load_module(
        "roles/nvidia_container_toolkit/filter_plugins/nvidia_container_toolkit.py"
    )
    filters: dict[str, Any] = module.FilterModule().filters()
    unspecified: Callable[..., list[str]] = filters["nvidia_container_toolkit_unspecified"]
    return unspecified


def test_every_die_is_there(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI, LISTED) == []


def test_a_die_of_another_uuid_is_told(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI, LISTED.replace("GPU-b7e6", "GPU-b7e60")) == [
        "the die at 0000:8a:00.0 (GPU-b7e6) is not in the CDI specification"
    ]


def test_a_die_that_the_driver_does_not_show_is_told(
    unspecified: Callable[..., list[str]],
) -> None:
    assert unspecified(DIES, SMI.splitlines()[0], LISTED) == [
        "the driver does not show the die at 0000:8a:00.0"
    ]


@pytest.mark.parametrize("smi", ["", "No devices were found\n"])
def test_all_are_told_at_once(unspecified: Callable[..., list[str]], smi: str) -> None:
    assert len(unspecified(DIES, smi, "")) == 2


def test_other_gpus_do_not_matter(unspecified: Callable[..., list[str]]) -> None:
    assert unspecified(DIES, SMI + "00000000:C1:00.0, GPU-77\n", LISTED) == []
