"""The operators against independent formulations, in FP64 where it matters."""

from types import SimpleNamespace

import pytest
import torch

from vllm_k80 import ops
from vllm_k80.ops import reference

vllm_k80 = torch.ops.vllm_k80


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (2, 3, 64), (0, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    y = vllm_k80.rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual = random(5, 96, dtype=dtype), random(5, 96, seed=1, dtype=dtype)
    weight = random(96, seed=2, dtype=dtype)
    y, total = vllm_k80.fused_add_rms_norm(x, residual, weight, 1e-6)
    exact = x.double() + residual.double()
    torch.testing.assert_close(total, exact.to(dtype))
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(y, expected.to(dtype))


def test_silu_and_mul() -> None:
    x = random(3, 10)
    gate, up = x[:, :5].double(), x[:, 5:].double()
    torch.testing.assert_close(vllm_k80.silu_and_mul(x), (gate / (1 + (-gate).exp()) * up).float())


def w4(rows: int, columns: int, group: int) -> tuple[torch.Tensor, ...]:
    """A random INT4 weight: the integers, their packed form, scale and minimum."""
    generator = torch.Generator().manual_seed(rows + columns)
    q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = random(rows, columns // group, seed=3).abs().half()
    minimum = random(rows, columns // group, seed=4).half()
    return q, q[:, 0::2] | (q[:, 1::2] << 4), scale, minimum


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_linear_w4(tokens: int, group: int) -> None:
    rows, columns = 300, 1024  # more rows than one tile holds
    q, packed, scale, minimum = w4(rows, columns, group)
    assert columns * rows > reference._TILE_ELEMENTS
    weight = (
        q.double().view(rows, -1, group) * scale.double().unsqueeze(-1)
        + minimum.double().unsqueeze(-1)
    ).view(rows, columns)
    x, bias = random(tokens, columns), random(rows, seed=9)
    y = vllm_k80.linear_w4(x, packed, scale, minimum, bias)
    expected = (x.double() @ weight.t() + bias.double()).float()
    # Rounding of an FP32 sum of 1024 terms, relative to the largest result.
    limit = 1e-5 * (expected.abs().max().item() if tokens else 1.0)
    torch.testing.assert_close(y, expected, atol=limit, rtol=0)


def test_embedding_w4_gives_rows_of_the_weight() -> None:
    q, packed, scale, minimum = w4(50, 64, 32)
    weight = (
        q.float().view(50, 2, 32) * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)
    ).view(50, 64)
    ids = torch.tensor([[3, 0], [49, 3]])
    rows = vllm_k80.embedding_w4(ids, packed, scale, minimum, torch.float32)
    torch.testing.assert_close(rows, weight[ids])


@pytest.mark.parametrize("group", [32, 1024])
def test_linear_w8_and_embedding_w8(group: int) -> None:
    rows, columns = 300, 1024
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = random(rows, columns // group, seed=6).abs().half()
    weight = (q.double().view(rows, -1, group) * scale.double().unsqueeze(-1)).view(rows, columns)
    x = random(2, columns)
    expected = (x.double() @ weight.t()).float()
    y = vllm_k80.linear_w8(x, q, scale)
    torch.testing.assert_close(y, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    ids = torch.tensor([7, 299])
    torch.testing.assert_close(
        vllm_k80.embedding_w8(ids, q, scale, torch.float16), weight[ids].half()
    )


def test_arithmetic_is_fp32_when_storage_is_fp16() -> None:
    """1 + 2^-11 many times: FP16 accumulation would stay at 1, or overflow at 65504."""
    x = torch.full((1, 4096), 16.0, dtype=torch.float16)
    weight = torch.full((1, 4096), 1.0, dtype=torch.float16)
    weight[0, 1::2] = -1.0
    weight[0, 0] = 2.0
    assert vllm_k80.linear(x, weight).item() == 16.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vllm_k80.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5), "weight has shape"),
        (lambda: vllm_k80.silu_and_mul(torch.ones(1, 3)), "odd number of columns, 3"),
        (lambda: vllm_k80.linear(torch.ones(1, 3), torch.ones(2, 4)), "x has 3 columns"),
        (
            lambda: vllm_k80.linear_w4(
                torch.ones(1, 64),
                torch.zeros(2, 16, dtype=torch.uint8),
                torch.ones(2, 1),
                torch.ones(2, 1),
            ),
            "x has 64 columns, qweight holds 32",
        ),
        (
            lambda: vllm_k80.linear_w8(
                torch.ones(1, 32), torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 5)
            ),
            "does not divide",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_calls_are_counted() -> None:
    before = ops.CALLS["silu_and_mul"]
    vllm_k80.silu_and_mul(torch.ones(1, 2))
    assert ops.CALLS["silu_and_mul"] == before + 1


def test_layers_reach_kernels_without_torchs_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tensors on a GPU; others go to the operator, and both are counted."""
    on_gpu = SimpleNamespace(silu_and_mul=lambda x: "kernel")
    monkeypatch.setattr(ops, "_KERNELS", (on_gpu,))
    silu_and_mul, before = ops._straight("silu_and_mul"), ops.CALLS["silu_and_mul"]
    assert silu_and_mul(SimpleNamespace(is_cuda=True)) == "kernel"
    x = torch.ones(1, 4)
    assert torch.equal(silu_and_mul(x), torch.ops.vllm_k80.silu_and_mul(x))
    assert ops.CALLS["silu_and_mul"] == before + 3
