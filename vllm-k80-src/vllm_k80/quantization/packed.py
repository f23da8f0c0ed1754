"""Quantized weights in memory: one INT4 layout, one INT8 layout, or plain floats.

INT4: ``qweight`` [N, K/2] uint8, row-major; byte j of a row holds column 2j in its low and
column 2j + 1 in its high half, so a little-endian 32-bit word holds eight neighbours, nibble i
(bits 4i to 4i + 3) the i-th. ``scale`` [N, K/group], and ``minimum`` or ``zero`` of the same
shape and dtype, FP16 or FP32: ``w = q * scale + minimum`` or ``w = (q - zero) * scale``. The
kernels take groups of 32, 64 and 128 columns.

INT8: ``qweight`` [N, K] int8, row-major, and ``scale`` [N, K/group], one column for a scale a
row: ``w = q * scale``.

FP16 and FP32: ``qweight`` [N, K].
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vllm_k80 import ops  # noqa: F401  (defines torch.ops.vllm_k80)


@dataclass
class PackedWeight:
    """A weight of N rows and K columns, as the operators take it.

    INT4: ``qweight``, ``scale``, and ``minimum`` or ``zero``.
    INT8: ``qweight`` and ``scale``.
    Float: ``qweight`` alone.
    """

    qweight: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    zero: Tensor | None = None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``: [..., K] to [..., N], in the dtype of ``x``."""
        if self.scale is None:
            return torch.ops.vllm_k80.linear(x, self.qweight, bias)
        if self.minimum is None and self.zero is None:
            return torch.ops.vllm_k80.linear_w8(x, self.qweight, self.scale, bias)
        return torch.ops.vllm_k80.linear_w4(
            x, self.qweight, self.scale, self.minimum, bias, self.zero
        )

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` in ``dtype``: [...] to [..., K]."""
        if self.scale is None:
            return torch.nn.functional.embedding(ids, self.qweight).to(dtype)
        if self.minimum is None and self.zero is None:
            return torch.ops.vllm_k80.embedding_w8(ids, self.qweight, self.scale, dtype)
        return torch.ops.vllm_k80.embedding_w4(
            ids, self.qweight, self.scale, self.minimum, dtype, self.zero
        )

    def parts(self) -> list[Tensor]:
        """The tensors it consists of."""
        return [*self.named_parts().values()]

    def named_parts(self) -> dict[str, Tensor]:
        """The same, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in named.items() if part is not None}


def concatenate(weights: list[PackedWeight]) -> list[PackedWeight]:
    """Join neighbours of the same layout along N, so that a fused layer is one operator call."""
    joined: list[list[PackedWeight]] = []

    def layout(weight: PackedWeight) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (part.dtype, part.shape[1:]) for name, part in weight.named_parts().items()}

    for weight in weights:
        if joined and layout(joined[-1][0]) == layout(weight):
            joined[-1].append(weight)
        else:
            joined.append([weight])
    return [
        PackedWeight(
            **{name: torch.cat([getattr(w, name) for w in run]) for name in run[0].named_parts()}
        )
        for run in joined
    ]
