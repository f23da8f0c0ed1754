"""xformers' own entry point reaches our operator, for what it supports."""

import pytest
import torch
import xformers.ops as xops
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, LowerTriangularMask

from vllm_k80 import ops


def inputs(batch: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, 4, 64, generator=generator).to(dtype) for _ in range(3)]


def expected(query, key, value) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * 64**-0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_causal_attention(dtype: torch.dtype) -> None:
    query, key, value = inputs(2, 17, dtype)
    before = ops.CALLS["varlen_attention"]
    out = xops.memory_efficient_attention(query, key, value, attn_bias=LowerTriangularMask())
    assert ops.CALLS["varlen_attention"] == before + 1
    torch.testing.assert_close(out, expected(query, key, value).to(dtype))


def test_sequences_side_by_side() -> None:
    lengths = [3, 9, 5]
    query, key, value = inputs(1, sum(lengths), torch.float32)
    mask = BlockDiagonalCausalMask.from_seqlens(lengths)
    out = xops.memory_efficient_attention(query, key, value, attn_bias=mask)
    parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    wanted = torch.cat([expected(*part) for part in parts], dim=1)
    torch.testing.assert_close(out, wanted.float())


def test_what_it_does_not_support_is_left_to_xformers() -> None:
    query, key, value = inputs(1, 8, torch.float32)
    with pytest.raises(NotImplementedError, match="No operator found"):
        xops.memory_efficient_attention(query, key[:, :4], value[:, :4], LowerTriangularMask())
