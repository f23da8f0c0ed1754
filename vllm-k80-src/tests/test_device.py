"""Decisions by compute capability, for cards that are not here."""

import pytest

from vllm_k80 import device
from vllm_k80.device import Capability

GIB = 1024**3


@pytest.mark.parametrize(
    ("capability", "preferred"),
    [
        (Capability(3, 5), "float32"),
        (Capability(3, 7), "float32"),
        (Capability(5, 2), "float32"),
        (Capability(7, 0), "float16"),
    ],
)
def test_preferred_dtype(capability: Capability, preferred: str) -> None:
    names = device.dtype_names(capability)
    assert names[0] == preferred
    assert set(names) == {"float32", "float16"}  # never bfloat16


@pytest.mark.parametrize("capability", [(3, 5), (3, 7), (5, 2), (7, 0)])
@pytest.mark.parametrize(
    "backend",
    [
        "FLASH_ATTN",
        "FLASH_ATTN_VLLM_V1",
        "FLASHINFER",
        "TRITON_ATTN_VLLM_V1",
        "FLEX_ATTENTION",
        "TORCH_SDPA",
    ],
)
def test_other_backends_are_refused_by_name(capability: tuple[int, int], backend: str) -> None:
    refusal = device.backend_refusal(Capability(*capability), backend)
    assert refusal is not None
    assert backend in refusal
    assert f"{capability[0]}.{capability[1]}" in refusal
    assert "XFORMERS" in refusal  # what to use instead


@pytest.mark.parametrize("backend", [None, "XFORMERS", "XFORMERS_VLLM_V1"])
def test_our_backend_is_accepted(backend: str | None) -> None:
    assert device.backend_refusal(device.K80, backend) is None


def test_kv_cache_is_what_a_die_has_left() -> None:
    left = device.kv_cache_bytes(device.K80_MEMORY, 0.9, weights=4 * GIB, activations=GIB)
    assert left == int(device.K80_MEMORY * 0.9) - 5 * GIB


def test_a_model_that_leaves_nothing_is_refused_with_figures() -> None:
    with pytest.raises(ValueError, match=r"weights take 13312 MiB .* of 10296 MiB"):
        device.kv_cache_bytes(device.K80_MEMORY, 0.9, weights=13 * GIB, activations=0)
