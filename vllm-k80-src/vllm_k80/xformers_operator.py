"""Our attention operator as one of xformers' ``memory_efficient_attention``.

xformers' own kernels start at sm_50. Its dispatcher asks each operator class whether it
supports the inputs; this one answers for causal self-attention without a paged cache. The
engine calls the operator directly on its cache instead (`vllm_k80.attention`).
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, LowerTriangularMask
from xformers.ops.fmha.common import AttentionFwOpBase, Inputs

from vllm_k80 import ops  # noqa: F401  (defines torch.ops.vllm_k80)


class FwOp(AttentionFwOpBase):
    """Forward pass of causal self-attention, FP32 arithmetic, FP32 or FP16 storage."""

    OPERATOR = torch.ops.vllm_k80.varlen_attention
    SUPPORTED_DEVICES: ClassVar = {"cuda", "cpu"}
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (3, 5)
    SUPPORTED_DTYPES: ClassVar = {torch.float32, torch.float16}
    SUPPORTED_MAX_K = 256
    SUPPORTED_ATTN_BIAS_TYPES: ClassVar = {LowerTriangularMask, BlockDiagonalCausalMask}
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = False
    NAME = "vllm_k80"

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        reasons = [
            reason
            for reason in super().not_supported_reasons(d)
            # Said of every CUDA input when xformers' own kernels were not built.
            if "build with CUDA" not in reason
        ]
        if d.query.shape[-1] % 8:
            reasons.append("the head size is no multiple of 8")
        if any(x.requires_grad for x in (d.query, d.key, d.value)):
            reasons.append("there is no backward pass")
        if d.query.shape[1] != d.key.shape[1] or (
            isinstance(d.attn_bias, BlockDiagonalCausalMask)
            and d.attn_bias.q_seqinfo.seqstart_py != d.attn_bias.k_seqinfo.seqstart_py
        ):
            reasons.append("queries and keys differ in length")
        return reasons

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[torch.Tensor, None]:
        """Attention of [batch, tokens, heads, head_size] inputs; a result of the same shape.

        Each sequence of keys and values is one page of a cache, with room for the longest.
        """
        batch, tokens, heads, size = inp.query.shape
        if isinstance(inp.attn_bias, BlockDiagonalCausalMask):
            starts = list(inp.attn_bias.q_seqinfo.seqstart_py)
        else:
            starts = [tokens * sequence for sequence in range(batch + 1)]
        lengths = [end - start for start, end in pairwise(starts)]
        query = inp.query.reshape(-1, heads, size)
        longest = max(lengths)
        room = 1 << (longest - 1).bit_length()  # the operator's pages are powers of two
        pages = query.new_zeros(2, len(lengths), room, heads, size)
        for page, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            pages[0, page, :length] = inp.key.reshape(-1, heads, size)[start : start + length]
            pages[1, page, :length] = inp.value.reshape(-1, heads, size)[start : start + length]
        out = torch.empty_like(query)
        torch.ops.vllm_k80.varlen_attention(
            query,
            pages,
            out,
            torch.tensor(starts, dtype=torch.int32, device=query.device),
            torch.tensor(lengths, dtype=torch.int32, device=query.device),
            torch.arange(len(lengths), dtype=torch.int32, device=query.device).unsqueeze(1),
            longest,
            size**-0.5 if inp.scale is None else inp.scale,
        )
        return out.view(inp.query.shape), None


def register(module: Any = fmha) -> None:
    """Put the operator in front of xformers' dispatcher, for what it supports."""
    dispatch = module._dispatch_fw

    def dispatch_fw(inp: Inputs) -> type[AttentionFwOpBase]:
        return FwOp if FwOp.supports(inp) else dispatch(inp)

    module._dispatch_fw = dispatch_fw
