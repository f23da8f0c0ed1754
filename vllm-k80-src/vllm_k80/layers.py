"""vLLM's layers with our operators, through its hook for out-of-tree custom operators."""

import math

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import (
    FastGELU,
    GeluAndMul,
    NewGELU,
    QuickGELU,
    SiluAndMul,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_k80.ops import k80


def normalized(
    weight: Tensor, eps: float, x: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization, or with a residual that of the sum, and the sum; see the operators."""
    if residual is None:
        return k80.rms_norm(x, weight, eps)
    return k80.fused_add_rms_norm(x, residual, weight, eps)


@CustomOp.register_oot(name="RMSNorm")
class K80RMSNorm(RMSNorm):
    """RMS normalization, with the residual added where there is one."""

    @property
    def is_plain(self) -> bool:
        """Whether it is over all columns, with a weight: what our operators compute."""
        return self.variance_size_override is None and bool(self.has_weight)

    def forward_oot(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.is_plain:
            return self.forward_native(x, residual)
        return normalized(self.weight, self.variance_epsilon, x, residual)


@CustomOp.register_oot(name="SiluAndMul")
class K80SiluAndMul(SiluAndMul):
    """The activation of Llama's feed-forward layers."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return k80.silu_and_mul(x)


@CustomOp.register_oot(name="GeluAndMul")
class K80GeluAndMul(GeluAndMul):
    """The activation of Gemma's feed-forward layers, exact or by tanh."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return k80.gelu_and_mul(x, self.approximate)


@CustomOp.register_oot(name="NewGELU")
class K80NewGELU(NewGELU):
    """The activation of GPT-2's feed-forward layers."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return k80.gelu_new(x)


@CustomOp.register_oot(name="FastGELU")
class K80FastGELU(FastGELU):
    """`K80NewGELU` under another name."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return k80.gelu_fast(x)


@CustomOp.register_oot(name="QuickGELU")
class K80QuickGELU(QuickGELU):
    """The activation of CLIP's feed-forward layers."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return k80.gelu_quick(x)


class Rotary:
    """Rotary embedding in place, as upstream's own kernel does it."""

    head_size: int
    cos_sin_cache: Tensor
    is_neox_style: bool

    def forward_oot(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if offsets is not None:
            positions = positions + offsets
        tokens = positions.numel()
        k80.rotary_embedding(
            positions.flatten(),
            query.view(tokens, query.numel() // max(1, tokens)),
            None if key is None else key.view(tokens, key.numel() // max(1, tokens)),
            self.head_size,
            self.cos_sin_cache,
            self.is_neox_style,
        )
        return query, key


# vLLM looks a layer up by the name of its class, so each that differs from the first in its cache
# alone is registered too. Those with a forward of their own are not: multimodal and vision models',
# DeepSeek's.
for _layer in (
    RotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
):
    CustomOp.register_oot(name=_layer.__name__)(
        type(f"K80{_layer.__name__}", (Rotary, _layer), {"__doc__": Rotary.__doc__})
    )


class K80LongRotaryEmbedding(Rotary, RotaryEmbedding):
    """Rotary embedding of Phi-3's long contexts, in the place of upstream's (`integration`).

    A model has one list of factors for contexts up to its original length and one for longer ones.
    Upstream takes the second in each step in which any sequence of the batch is longer, and the
    cache keeps keys of earlier steps as the first list has turned them: with chunks of prefill and
    shared prefixes, an answer depends on where a prompt was cut and who else was served. Here the
    server's longest context decides, once, as in newer releases of vLLM.

    Args: as upstream's class, whose formula this is (`LongRoPE <https://arxiv.org/abs/2402.13753>`_
    gives the factors and the scale of cosine and sine).
    """

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position_embeddings: int,
        original_max_position_embeddings: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype,
        short_factor: list[float],
        long_factor: list[float],
        short_mscale: float | None = None,
        long_mscale: float | None = None,
    ) -> None:
        original = original_max_position_embeddings
        longer = get_current_vllm_config().model_config.max_model_len > original
        self.factors = long_factor if longer else short_factor
        scale = long_mscale if longer else short_mscale
        if scale is None:
            ratio = max(1.0, max_position_embeddings / original)
            scale = math.sqrt(1 + math.log(ratio) / math.log(original))
        self.scale = scale
        positions = max_position_embeddings if longer else original
        super().__init__(head_size, rotary_dim, positions, base, is_neox_style, dtype)

    def _compute_inv_freq(self, base: float) -> Tensor:
        return super()._compute_inv_freq(base) / torch.tensor(self.factors)

    def _compute_cos_sin_cache(self) -> Tensor:
        return super()._compute_cos_sin_cache() * self.scale


def unquantized_gemm(
    layer: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What vLLM's unquantized linear layers call; see the operator `linear`, and `fusion.fuse`."""
    return k80.linear(x, weight, bias, getattr(layer, "gated", False))
