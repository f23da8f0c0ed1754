"""Rotary embedding and activations: the references by their definitions, and vLLM's layers."""

import copy
import math
from typing import Any

import pytest
import torch

from vllm_k80 import ops
from vllm_k80.ops import kernels

vllm_k80 = torch.ops.vllm_k80


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_of(positions: int, rotary: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """cos and sin as vLLM's RotaryEmbedding makes them."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    angles = torch.arange(positions).unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotated(x: Any, positions: Any, size: int, rotary: int, is_neox: bool) -> torch.Tensor:
    """One pair at a time, in FP64, by the definition."""
    out = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for start in range(0, x.shape[1], size):
            for i in range(rotary // 2):
                angle = position * 10000.0 ** (-2 * i / rotary)
                first, second = (i, i + rotary // 2) if is_neox else (2 * i, 2 * i + 1)
                a, b = (float(x[token, start + j]) for j in (first, second))
                out[token, start + first] = a * math.cos(angle) - b * math.sin(angle)
                out[token, start + second] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "rotary"), [(4, 2, 16, 16), (3, 1, 20, 8), (2, 0, 8, 6)]
)
def test_query_and_key_are_rotated_where_they_are(
    heads: int, key_heads: int, size: int, rotary: int, dtype: torch.dtype, is_neox: bool
) -> None:
    """As vLLM calls it: both are parts of one tensor, whose third part must stay as it is."""
    positions = torch.tensor([0, 7, 3, 63, 7])
    qkv = draw(5, (heads + 2 * key_heads) * size, dtype=dtype)
    before = qkv.clone()
    query, key, value = qkv.split((heads * size, key_heads * size, key_heads * size), dim=1)
    cache = cache_of(64, rotary, dtype)
    vllm_k80.rotary_embedding(positions, query, key if key_heads else None, size, cache, is_neox)
    parts = before.split((heads * size, key_heads * size, key_heads * size), dim=1)
    limit = 1e-2 if dtype == torch.float16 else 1e-5
    for x, old in ((query, parts[0]), (key, parts[1])):
        expected = rotated(old, positions, size, rotary, is_neox)
        torch.testing.assert_close(x.double(), expected, atol=limit, rtol=limit)
    assert torch.equal(value, parts[2])


def test_no_tokens_are_rotated() -> None:
    x = torch.ones(0, 8)
    vllm_k80.rotary_embedding(torch.zeros(0, dtype=torch.int64), x, None, 8, cache_of(4, 8), True)


def test_a_position_that_is_not_in_the_cache_passes_for_no_result() -> None:
    x = torch.ones(3, 8)
    positions = torch.tensor([4, -1, 3])
    vllm_k80.rotary_embedding(positions, x, None, 8, cache_of(4, 4), True)
    assert x[:2, :4].isnan().all()
    assert x[:2, 4:].eq(1).all()
    assert not x[2].isnan().any()


ROTARY = {
    "positions": torch.zeros(3, dtype=torch.int64),
    "query": torch.ones(3, 16),
    "key": torch.ones(3, 8),
    "head_size": 8,
    "cos_sin_cache": torch.ones(4, 8),
    "is_neox": True,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": torch.zeros(3)}, r"must be contiguous torch.int64 .* torch.float32"),
        ({"positions": torch.zeros(3, 1, dtype=torch.int64)}, r"of 1 dimension, .* of 2 with"),
        ({"query": torch.ones(2, 16)}, r"query has shape \(2, 16\); 3 rows of heads of 8"),
        ({"key": torch.ones(3, 12)}, r"key has shape \(3, 12\); 3 rows of heads of 8"),
        ({"query": torch.ones(3, 16).double()}, r"query is torch.float64; torch.float32 and"),
        ({"key": torch.ones(3, 8).half()}, r"key is torch.float16 .*; torch.float32, as query"),
        ({"key": torch.ones(8, 3).t()}, r"key is torch.float32 with strides \(1, 3\)"),
        ({"cos_sin_cache": torch.ones(4, 10)}, r"has 10 columns; .* head size, 8, is supported"),
        ({"cos_sin_cache": torch.ones(4, 5)}, r"has 5 columns; an even number"),
        ({"cos_sin_cache": torch.ones(0, 8)}, r"cos_sin_cache has no rows"),
        ({"cos_sin_cache": torch.ones(8, 4).t()}, r"cos_sin_cache must be contiguous"),
    ],
)
def test_what_rotary_embedding_cannot_take_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^rotary_embedding: .*{message}"):
        vllm_k80.rotary_embedding(*{**ROTARY, **changed}.values())


def tanh_gelu(v: torch.Tensor) -> torch.Tensor:
    return v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


FUNCTIONS = {
    "silu_and_mul": lambda v: v / (1 + torch.exp(-v)),
    "gelu_and_mul": lambda v: v / 2 * (1 + torch.erf(v / math.sqrt(2))),
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_quick": lambda v: v / (1 + torch.exp(-1.702 * v)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 34), (0, 4), (6,)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * draw(*shape)).to(dtype)
    wide = x.double()
    if name.endswith("_and_mul"):
        gate, up = wide.chunk(2, dim=-1)
        expected = FUNCTIONS[name](gate) * up
    else:
        expected = FUNCTIONS[name](wide)
    y = getattr(vllm_k80, name)(x)
    limit = 1e-3 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(y, expected.to(dtype), atol=limit, rtol=limit)


def test_gelu_by_tanh() -> None:
    x = 3 * draw(4, 10)
    gate, up = x.double().chunk(2, dim=-1)
    expected = (tanh_gelu(gate) * up).float()
    torch.testing.assert_close(vllm_k80.gelu_and_mul(x, "tanh"), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_far_from_zero_are_their_limits(name: str) -> None:
    x = torch.tensor([[-1e30, 1e30]])
    if name.endswith("_and_mul"):
        x = torch.tensor([[-1e30, 1e30, 1.0, 1.0]])
    assert getattr(vllm_k80, name)(x).tolist() == [[0.0, torch.tensor(1e30).item()]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vllm_k80.gelu_and_mul(torch.ones(1, 3)), "gelu_and_mul: .* columns, 3"),
        (lambda: vllm_k80.gelu_and_mul(torch.ones(1, 2), "erf"), "approximate is 'erf'; 'none'"),
        (lambda: vllm_k80.gelu_new(torch.ones(2).double()), "gelu_new: x is torch.float64"),
        (lambda: vllm_k80.gelu_fast(torch.ones(2).int()), "gelu_fast: x is torch.int32"),
        (lambda: vllm_k80.gelu_quick(torch.tensor(1.0)), "gelu_quick: x has no dimension"),
        (lambda: vllm_k80.silu_and_mul(torch.ones(2).bfloat16()), "x is torch.bfloat16"),
    ],
)
def test_what_an_activation_cannot_take_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class Launches:
    """Stands in for a kernel where there is no GPU: what would be launched."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def kernel(self, name: str, signature: str, device: int) -> Any:
        launches = self

        class Kernel:
            def launch(self, grid: Any, block: int, *arguments: Any) -> None:
                assert len(arguments) == len(signature)
                launches.names.append(name)
                launches.arguments.append(arguments)

        return Kernel()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    monkeypatch.setattr(kernels.driver, "available", lambda: True)
    monkeypatch.setattr(kernels.driver, "kernel", launches.kernel)
    return launches


def test_a_checked_weight_is_checked_again_when_anything_of_it_changes(launches: Launches) -> None:
    qweight, scale = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2)
    minimum, other, bias = torch.ones(8, 2), torch.ones(8, 2), torch.ones(8)
    x = torch.ones(1, 64)
    kernels.linear_w4(x, qweight, scale, minimum)
    kernels.linear_w4(x, qweight, scale, minimum)
    kernels.linear_w4(x, qweight, scale, None, None, minimum)
    kernels.linear_w4(x, qweight, scale, other, bias)
    assert [name.removeprefix("gemv_w4_") for name in launches.names] == [
        "f32_m1",
        "f32_m1",
        "z32_m1",
        "f32_m1",
    ]
    assert launches.arguments[0][:3] == launches.arguments[1][:3]
    assert launches.arguments[3][2] == other.data_ptr()
    assert launches.arguments[3][4] == bias.data_ptr()
    with pytest.raises(ValueError, match=r"bias has shape \(7,\)"):
        kernels.gemv_w4(x, qweight, scale, other, bias[:7])
    with pytest.raises(ValueError, match="x has 65 columns"):
        kernels.gemv_w4(torch.ones(1, 65), qweight, scale, other, bias)
    with pytest.raises(ValueError, match="x has 33 rows"):
        kernels.gemv_w4(torch.ones(33, 64), qweight, scale, other, bias)
    scale.data = torch.ones(8, 2)  # the same object elsewhere
    kernels.gemv_w4(x.half(), qweight, scale, other, bias)
    assert launches.arguments[-1][1] == scale.data_ptr()
    assert launches.arguments[-1][-1] == 1  # FP16 x


def test_a_weight_that_was_multiplied_can_be_copied(launches: Launches) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 16).half(), requires_grad=False)
    kernels.gemv_f16(torch.ones(1, 16), weight)
    copied = copy.deepcopy(weight)
    kernels.gemv_f16(torch.ones(1, 16), copied)
    assert launches.arguments[0][0] == weight.data_ptr()
    assert launches.arguments[1][0] == copied.data_ptr() != weight.data_ptr()


SCALINGS: dict[str, dict[str, Any]] = {
    "RotaryEmbedding": {},
    "LinearScalingRotaryEmbedding": {"rope_type": "linear", "factor": 2.0},
    "DynamicNTKScalingRotaryEmbedding": {"rope_type": "dynamic", "factor": 2.0},
    "DynamicNTKAlphaRotaryEmbedding": {"rope_type": "dynamic", "alpha": 2.0},
    "NTKScalingRotaryEmbedding": {"rope_type": "ntk", "factor": 2.0},
    "YaRNScalingRotaryEmbedding": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    },
    "Llama3RotaryEmbedding": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_vllms_rotary_embeddings_are_ours(name: str) -> None:
    """Whatever the scaling, the layer that vLLM makes goes through our operator."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        layer = get_rope(16, 16, 64, 10000.0, rope_scaling=SCALINGS[name] or None)
    assert type(layer).__name__ == f"K80{name}"
    positions = torch.tensor([0, 5, 63])
    query, key = draw(3, 64), draw(3, 32, seed=1)
    expected = layer.forward_native(positions, query.clone(), key.clone())
    before = ops.CALLS["rotary_embedding"]
    result = layer(positions, query, key)
    assert ops.CALLS["rotary_embedding"] == before + 1
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    shifted = layer(positions - positions, query, None, offsets=positions)
    assert shifted[1] is None
    torch.testing.assert_close(shifted[0], layer.forward_native(positions, expected[0])[0])
