"""Quantized weights in memory: one INT4 layout, one INT8 layout, or plain floats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_k80 import ops  # noqa: F401  (defines torch.ops.vllm_k80)


@dataclass
class PackedWeight:
    """A weight of N rows and K columns, as the operators take it.

    INT4: ``qweight`` [N, K/2] uint8 with ``scale`` and ``minimum`` [N, K/group].
    INT8: ``qweight`` [N, K] int8 with ``scale``.
    Float: ``qweight`` [N, K] FP32 or FP16 alone.
    """

    qweight: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``: [..., K] to [..., N], in the dtype of ``x``."""
        if self.scale is None:
            return torch.ops.vllm_k80.linear(x, self.qweight, bias)
        if self.minimum is None:
            return torch.ops.vllm_k80.linear_w8(x, self.qweight, self.scale, bias)
        return torch.ops.vllm_k80.linear_w4(x, self.qweight, self.scale, self.minimum, bias)

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` in ``dtype``: [...] to [..., K]."""
        if self.scale is None:
            return torch.nn.functional.embedding(ids, self.qweight).to(dtype)
        if self.minimum is None:
            return torch.ops.vllm_k80.embedding_w8(ids, self.qweight, self.scale, dtype)
        return torch.ops.vllm_k80.embedding_w4(ids, self.qweight, self.scale, self.minimum, dtype)

    def parts(self) -> list[Tensor]:
        """The tensors it consists of."""
        return [part for part in (self.qweight, self.scale, self.minimum) if part is not None]


def concatenate(weights: list[PackedWeight]) -> list[PackedWeight]:
    """Join neighbours of the same layout along N, so that a fused layer is one operator call."""
    joined: list[list[PackedWeight]] = []
    for weight in weights:
        layout = [(part.dtype, part.shape[1:]) for part in weight.parts()]
        if joined and [(p.dtype, p.shape[1:]) for p in joined[-1][0].parts()] == layout:
            joined[-1].append(weight)
        else:
            joined.append([weight])
    return [
        PackedWeight(*(torch.cat(parts) for parts in zip(*(w.parts() for w in run), strict=True)))
        for run in joined
    ]
