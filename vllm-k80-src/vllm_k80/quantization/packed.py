"""Quantized weights in memory: one INT4 layout, one INT8 layout, or plain floats.

INT4: ``qweight`` [N, K/2] uint8, row-major; byte j of a row holds column 2j in its low and
column 2j + 1 in its high half, so a little-endian 32-bit word holds eight neighbours, nibble i
(bits 4i to 4i + 3) the i-th. ``scale`` [N, K/group], and ``minimum`` or ``zero`` of the same
shape and dtype, FP16 or FP32: ``w = q * scale + minimum`` or ``w = (q - zero) * scale``. The
kernels take groups of 32, 64 and 128 columns.

INT8: ``qweight`` [N, K] int8, row-major, and ``scale`` [N, K/group], one column for a scale a
row: ``w = q * scale``. With ``minimum``, of the shape of ``scale``, ``w = q * scale + minimum``.
The kernels take groups of 16 columns as well.

FP16 and FP32: ``qweight`` [N, K].

Columns may be stored in another order than the layer's input has, as GPTQ with ``desc_act`` needs
it to keep a group's columns together.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vllm_k80.ops import bind, k80
from vllm_k80.ops.reference import GROUPS

_INT8_COLUMNS = 16  # the INT8 kernels load as many columns at a time


@dataclass
class PackedWeight:
    """A weight of N rows and K columns, as the operators take it.

    INT4: ``qweight``, ``scale``, and ``minimum`` or ``zero``.
    INT8: ``qweight`` and ``scale``, and perhaps ``minimum``.
    Float: ``qweight`` alone.

    ``order`` [K] int64: column j is stored for element ``order[j]`` of x; None: for element j. It
    costs one gather a product: 8 bytes of x and 8 of ``order`` a column and row of x, and a launch.
    """

    qweight: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    zero: Tensor | None = None
    order: Tensor | None = None

    def linear(self, x: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
        """``x @ weight.T + bias``: [..., K] to [..., N], in the dtype of ``x``.

        With ``gated`` `silu_and_mul` of that, [..., N / 2].
        """
        return self.product(bias, gated)(x)

    def product(self, bias: Tensor | None, gated: bool) -> Callable[[Tensor], Tensor]:
        """`linear` with this bias, all that does not depend on x decided."""
        if self.order is None:
            return self._product(bias, gated)
        order, product = self.order, self._product(bias, gated)
        return lambda x: product(x.index_select(-1, order))

    def _product(self, bias: Tensor | None, gated: bool) -> Callable[[Tensor], Tensor]:
        """`product` of x in the order of the columns."""
        qweight, scale, minimum, zero = self.qweight, self.scale, self.minimum, self.zero
        if scale is None:
            return bind("linear", qweight, bias, gated)
        if qweight.dtype != torch.int8:
            return bind("linear_w4", qweight, scale, minimum, bias, zero, gated)
        if minimum is None:
            return bind("linear_w8", qweight, scale, bias, gated)
        offset = minimum

        def with_minimum(x: Tensor) -> Tensor:
            # The minimum meets each group's sum of x: a product that is a group size narrower.
            wide = x.float()
            sums = wide.unflatten(-1, (offset.shape[1], -1)).sum(-1)
            y = k80.linear_w8(wide, qweight, scale, bias)
            y += k80.linear(sums, offset, None)
            return (k80.silu_and_mul(y) if gated else y).to(x.dtype)

        return with_minimum

    def embedding(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` in ``dtype``: [...] to [..., K].

        Raises:
            ValueError: no checkpoint has token embeddings with an ``order``.
        """
        if self.scale is None:
            return torch.nn.functional.embedding(ids, self.qweight).to(dtype)
        if self.order is not None:
            raise ValueError("embedding: reordered columns are not served.")
        if self.qweight.dtype == torch.int8:
            if self.minimum is None:
                return k80.embedding_w8(ids, self.qweight, self.scale, dtype)
            rows = k80.embedding_w8(ids, self.qweight, self.scale, torch.float32)
            minimum = torch.nn.functional.embedding(ids, self.minimum).float()
            groups = rows.unflatten(-1, (minimum.shape[-1], -1))
            return groups.add_(minimum.unsqueeze(-1)).flatten(-2).to(dtype)
        return k80.embedding_w4(ids, self.qweight, self.scale, self.minimum, dtype, self.zero)

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

    def rows(weight: PackedWeight) -> dict[str, Tensor]:
        return {name: part for name, part in weight.named_parts().items() if name != "order"}

    def alike(one: PackedWeight, other: PackedWeight) -> bool:
        first, second = (
            {name: (part.dtype, part.shape[1:]) for name, part in rows(weight).items()}
            for weight in (one, other)
        )
        if one.order is None or other.order is None:
            return first == second and one.order is other.order
        return first == second and torch.equal(one.order, other.order)

    for weight in weights:
        if joined and alike(joined[-1][0], weight):
            joined[-1].append(weight)
        else:
            joined.append([weight])
    return [
        run[0]
        if len(run) == 1
        else PackedWeight(
            **{name: torch.cat([getattr(w, name) for w in run]) for name in rows(run[0])},
            order=run[0].order,
        )
        for run in joined
    ]


def group_of_kernels(columns: int) -> int | None:
    """The largest group size of the INT4 kernels that divides ``columns``, None without one."""
    return next((group for group in reversed(GROUPS) if columns % group == 0), None)


def pair(columns: Tensor) -> Tensor:
    """Neighbours of a row into a byte, in the order of INT4: [N, K] uint8 to [N, K/2] uint8."""
    both = columns.contiguous().view(torch.int16)
    return (both | both >> 4).to(torch.uint8)  # of two bytes, the lower is what remains


def integers(packed: Tensor, bits: int) -> Tensor:
    """Neighbours apart, the lowest bits first: [R, B] uint8 to [R, B * 8 / bits] uint8."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(1)


def _narrowest(scale: Tensor) -> Tensor:
    """FP16 where that loses nothing, else FP32: a BF16 scale may be too small or large for FP16."""
    half = scale.half()
    return half if torch.equal(half.float(), scale.float()) else scale.float()


def pack_integers(
    layer: str,
    bits: int,
    stored: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None = None,
) -> PackedWeight:
    """A weight of unsigned integers, ``w = (q - zero) * scale``, as `PackedWeight`, without loss.

    Args:
        layer: its name, for errors.
        bits: 4 or 8.
        stored: [N, K/2] uint8 in INT4's order, or [N, K] uint8.
        scale: [N, groups], a floating dtype; one group a row or more.
        zero: [N, groups], integers up to ``2 ** bits``; None: all ``2 ** (bits - 1)``.
        order: as in `PackedWeight`; the columns of ``stored`` are put into it, groups are of the
            reordered columns.

    Raises:
        ValueError: a shape that the kernels do not take.
    """
    columns = stored.shape[1] * 8 // bits
    groups = scale.shape[1]
    middle = 1 << (bits - 1)
    zero = torch.full_like(scale, middle) if zero is None else zero
    symmetric = bool((zero == middle).all())
    whole_rows = bits == 8 and groups == 1  # which the INT8 kernels take as they are
    size = columns if whole_rows else group_of_kernels(columns // groups)
    if size is None or columns % groups or (bits == 8 and columns % _INT8_COLUMNS):
        raise ValueError(
            f"{layer}: its {columns} columns in {groups} groups cannot be served; the kernels take "
            f"groups of a multiple of {GROUPS[0]} columns. Use a checkpoint quantized with group "
            f"size {', '.join(map(str, GROUPS))}; with several dies, use fewer, for each gets a "
            f"part of the columns of some layers."
        )
    if order is not None:
        spread = integers(stored, bits).index_select(1, order)
        stored = pair(spread) if bits == 4 else spread
    # A larger group than the kernels have is several that share a scale.
    repeats = columns // groups // size
    scale, zero = (part.repeat_interleave(repeats, dim=1) for part in (scale, zero))
    scale = _narrowest(scale).contiguous()
    if bits == 4:
        return PackedWeight(stored, scale, zero=zero.to(scale.dtype).contiguous(), order=order)
    # 0 to 255 less 128. What is left of the zero point, times the scale, is exact in FP32.
    qweight = (stored ^ 0x80).view(torch.int8)
    minimum = None if symmetric else ((middle - zero.float()) * scale.float()).contiguous()
    return PackedWeight(qweight, scale, minimum, order=order)
