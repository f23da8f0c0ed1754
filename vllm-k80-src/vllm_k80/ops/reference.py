"""The operators in plain torch: what each kernel must compute, and what a CPU runs.

All arithmetic is FP32, whatever the storage: the card has no other (CUDA C++ programming
guide, "Arithmetic Instructions", compute capability 3.7). Results are rounded once, to the
dtype of the activations that came in.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Elements of a weight that are dequantized at a time: 1 MB of FP32 stays in a core's L2
# cache. Twice as much took twice the time (2026-11-24, x86 server core).
_TILE_ELEMENTS = 1 << 18

# Most rows of x that the gemv operators take: beyond, dequantization and a matrix product,
# which read the weight once, cost less.
GEMV_ROWS = 32
# Columns that may share a scale in the gemv operators: of an INT4 weight, and of an INT8 weight,
# of which 128 bits hold half as many.
GROUPS = (32, 64, 128)
GROUPS_W8 = (16, *GROUPS)
_DTYPES = (torch.float32, torch.float16)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def linear_in_tiles(
    x: Tensor,
    rows: int,
    bias: Tensor | None,
    multiply: Callable[[Tensor, slice, Tensor], None],
    activation: Callable[[Tensor], Tensor] | None = None,
    tile: int = _TILE_ELEMENTS,
) -> Tensor:
    """`linear` with a weight of ``rows`` rows that ``multiply(x, rows, out)`` takes in tiles.

    ``tile`` is the number of a tile's elements, at most (but at least one row). The result goes
    through ``activation``, if there is one, before it is rounded.
    """
    columns = x.shape[-1]
    wide = x.float().view(-1, columns)
    y = torch.empty(wide.shape[0], rows, dtype=torch.float32, device=x.device)
    step = max(1, tile // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        multiply(wide, part, y[:, part])
    if bias is not None:
        y += bias.float()
    if activation is not None:
        y = activation(y)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv:1910.07467).

    Args:
        x: [..., hidden], FP32 or FP16.
        weight: [hidden], any floating dtype.
        eps: added to the mean of squares.

    Returns:
        [..., hidden] in the dtype of ``x``.

    Raises:
        ValueError: ``weight`` does not have ``hidden`` elements.
    """
    _require(
        weight.shape == x.shape[-1:],
        f"rms_norm: weight has shape {tuple(weight.shape)}, x has {x.shape[-1]} columns",
    )
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of ``x + residual``, and that sum.

    Args:
        x, residual: [..., hidden], FP32 or FP16, same shape and dtype.
        weight: [hidden]. eps: as in `rms_norm`.

    Returns:
        (normalized, sum), both [..., hidden] in the dtype of ``x``. The norm is taken of the
        FP32 sum, before it is rounded.

    Raises:
        ValueError: the shapes do not fit.
    """
    _require(
        x.shape == residual.shape,
        f"fused_add_rms_norm: x is {tuple(x.shape)}, residual is {tuple(residual.shape)}",
    )
    total = x.float() + residual.float()
    return rms_norm(total, weight, eps).to(x.dtype), total.to(x.dtype)


def check_activation(name: str, x: Tensor, gated: bool) -> int:
    """Check what the activations take; returns the columns of the result.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}; torch.float32 and torch.float16 are supported")
    if not x.dim():
        raise ValueError(f"{name}: x has no dimension; at least one is needed")
    columns = int(x.shape[-1])
    if gated and columns % 2:
        raise ValueError(f"{name}: x has an odd number of columns, {columns}")
    return columns // 2 if gated else columns


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[..., :d]) * x[..., d:]``, ``silu(v) = v / (1 + exp(-v))`` (arXiv:2002.05202).

    Args:
        x: [..., 2 d], FP32 or FP16.

    Returns:
        [..., d] in the dtype of ``x``.

    Raises:
        ValueError: another dtype, or the last dimension is odd.
    """
    check_activation("silu_and_mul", x, gated=True)
    gate, up = x.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def check_gelu_and_mul(x: Tensor, approximate: str) -> int:
    """`check_activation` for `gelu_and_mul`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu_and_mul: approximate is {approximate!r}; 'none' and 'tanh' are supported"
        )
    return check_activation("gelu_and_mul", x, gated=True)


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(x[..., :d]) * x[..., d:]`` (arXiv:1606.08415, 2002.05202).

    Args:
        x: [..., 2 d], FP32 or FP16.
        approximate: ``none`` is ``v / 2 * (1 + erf(v / sqrt(2)))``, ``tanh`` is `gelu_new`.

    Returns:
        [..., d] in the dtype of ``x``.

    Raises:
        ValueError: as `silu_and_mul`, or another ``approximate``.
    """
    check_gelu_and_mul(x, approximate)
    gate, up = x.float().chunk(2, dim=-1)
    return (functional.gelu(gate, approximate=approximate) * up).to(x.dtype)


def gelu_new(x: Tensor) -> Tensor:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`` (arXiv:1606.08415).

    Args:
        x: [...], FP32 or FP16.

    Returns:
        [...] in the dtype of ``x``.

    Raises:
        ValueError: another dtype.
    """
    check_activation("gelu_new", x, gated=False)
    return functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def gelu_fast(x: Tensor) -> Tensor:
    """`gelu_new` under the name of models that round ``sqrt(2 / pi)`` to ten digits.

    In FP32 that is the same number.
    """
    check_activation("gelu_fast", x, gated=False)
    return functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def gelu_quick(x: Tensor) -> Tensor:
    """``x / (1 + exp(-1.702 x))`` (arXiv:1606.08415).

    Args:
        x: [...], FP32 or FP16.

    Returns:
        [...] in the dtype of ``x``.

    Raises:
        ValueError: another dtype.
    """
    check_activation("gelu_quick", x, gated=False)
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def check_rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor
) -> tuple[int, int]:
    """Check what `rotary_embedding` takes; returns the heads of query and key.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    name = "rotary_embedding"
    check_rotation(name, positions, head_size, cos_sin_cache)
    tokens, heads, dtype, device = positions.shape[0], [], query.dtype, positions.device
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: query is {dtype}; torch.float32 and torch.float16 are supported")
    for argument, x in (("query", query), ("key", key)):
        if x is None:
            heads.append(0)
            continue
        shape = x.shape
        if len(shape) != 2 or shape[0] != tokens or shape[1] % head_size:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(shape)}; {tokens} rows of heads of "
                f"{head_size} are supported"
            )
        if x.dtype != dtype or x.stride(1) != 1:
            raise ValueError(
                f"{name}: {argument} is {x.dtype} with strides {x.stride()}; {dtype}, as query, is "
                f"supported, and rows that may be apart but are each contiguous"
            )
        if x.device != device:
            raise ValueError(f"{name}: {argument} is on {x.device}, positions on {device}")
        heads.append(shape[1] // head_size)
    return heads[0], heads[1]


def check_rotation(name: str, positions: Tensor, head_size: int, cos_sin_cache: Tensor) -> None:
    """Check positions and cache of a rotary embedding.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if positions.dim() != 1 or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(
            f"{name}: positions must be contiguous torch.int64 of 1 dimension, they are "
            f"{positions.dtype} of {positions.dim()} with strides {positions.stride()}"
        )
    if cos_sin_cache.dim() != 2 or not cos_sin_cache.is_contiguous():
        raise ValueError(
            f"{name}: cos_sin_cache must be contiguous of 2 dimensions, it has "
            f"{cos_sin_cache.dim()} with strides {cos_sin_cache.stride()}"
        )
    cached, rotary = cos_sin_cache.shape
    if not cached:
        raise ValueError(f"{name}: cos_sin_cache has no rows; one a position is needed")
    if rotary % 2 or rotary > head_size:
        raise ValueError(
            f"{name}: cos_sin_cache has {rotary} columns; an even number up to the head size, "
            f"{head_size}, is supported"
        )
    if cos_sin_cache.device != positions.device:
        raise ValueError(
            f"{name}: cos_sin_cache is on {cos_sin_cache.device}, positions on {positions.device}"
        )


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """Rotate pairs of each head's first elements by angles of its position (arXiv:2104.09864).

    ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. The other elements stay as they are.

    Args:
        positions: [tokens] int64, read on the device. One that is not in the cache gives NaN.
        query, key: [tokens, heads * head_size], FP32 or FP16, written in place; rows may be
            apart, as in parts of one tensor. key may be None and have fewer heads.
        cos_sin_cache: [positions, rotary]: cos, then sin, of rotary / 2 angles; rotary is even
            and at most head_size.
        is_neox: pairs are elements i and i + rotary / 2; otherwise 2 i and 2 i + 1.

    Raises:
        ValueError: shapes that do not fit, other dtypes or devices, rows that are not contiguous.
    """
    check_rotary_embedding(positions, query, key, head_size, cos_sin_cache)
    cached, rotary = cos_sin_cache.shape
    known = (positions >= 0) & (positions < cached)
    rows = cos_sin_cache[positions * known].float().masked_fill(~known.unsqueeze(1), float("nan"))
    cos, sin = rows.unsqueeze(1).chunk(2, dim=-1)
    for x in (query, key):
        if x is None:
            continue
        rotated = x.unflatten(1, (x.shape[1] // head_size, head_size))[..., :rotary]
        a, b = rotated.chunk(2, dim=-1) if is_neox else (rotated[..., 0::2], rotated[..., 1::2])
        first, second = a * cos - b * sin, b * cos + a * sin
        a.copy_(first)
        b.copy_(second)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """``x @ weight.T + bias`` in FP32.

    Args:
        x: [..., K], FP32 or FP16.
        weight: [N, K], FP32 or FP16.
        bias: [N] or None.
        gated: whether the result is `silu_and_mul` of that: the first half of the weight's rows
            are a gate's.

    Returns:
        [..., N], or [..., N / 2] if gated, in the dtype of ``x``.

    Raises:
        ValueError: K differs.
    """
    _require(
        x.shape[-1] == weight.shape[-1],
        f"linear: x has {x.shape[-1]} columns, weight has {weight.shape[-1]}",
    )
    wide_bias = None if bias is None else bias.float()
    y = functional.linear(x.float(), weight.float(), wide_bias)
    return (silu_and_mul(y) if gated else y).to(x.dtype)


def _groups(name: str, elements: int, scale: Tensor, rows: int) -> int:
    """Elements a group of a quantized weight of ``rows`` rows, checked."""
    shape = scale.shape
    if len(shape) != 2 or shape[0] != rows or not shape[1] or elements % shape[1]:
        raise ValueError(
            f"{name}: scale has shape {tuple(shape)}, which does not divide a weight of "
            f"{rows} x {elements}"
        )
    return elements // int(shape[1])


def _dequantize_w4_halves(
    qweight: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The even and the odd columns of an INT4 weight, each [N, K/2] FP32."""
    rows, packed = qweight.shape
    grouped = qweight.view(rows, scale.shape[1], -1)
    halves = []
    for nibbles in (grouped & 0x0F, grouped >> 4):
        wide = nibbles.float()
        if zero is not None:
            wide.sub_(zero.float().unsqueeze(-1))
        wide.mul_(scale.float().unsqueeze(-1))
        if minimum is not None:
            wide.add_(minimum.float().unsqueeze(-1))
        halves.append(wide.view(rows, packed))
    return halves[0], halves[1]


def check_w4(
    name: str, qweight: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None
) -> int:
    """The group size of an INT4 weight, checked."""
    offset = minimum if zero is None else zero
    if offset is None or not (minimum is None or zero is None):
        raise ValueError(f"{name}: give either minimum or zero")
    if qweight.dim() != 2 or qweight.dtype != torch.uint8:
        raise ValueError(
            f"{name}: qweight must be torch.uint8 of 2 dimensions, it is {qweight.dtype} of "
            f"{qweight.dim()}"
        )
    rows, packed = qweight.shape
    group = _groups(name, 2 * packed, scale, rows)
    if group % 2:
        raise ValueError(f"{name}: the group size must be even, it is {group}")
    if offset.shape != scale.shape:
        raise ValueError(
            f"{name}: {'minimum' if zero is None else 'zero'} is {tuple(offset.shape)}, "
            f"scale is {tuple(scale.shape)}"
        )
    return group


def linear_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`linear` with an INT4 weight.

    ``w[n, k] = q[n, k] * scale[n, g] + minimum[n, g]`` or, with ``zero`` in place of
    ``minimum``, ``(q[n, k] - zero[n, g]) * scale[n, g]``.

    Args:
        x: [..., K], FP32 or FP16.
        qweight: [N, K/2] uint8; byte j holds column 2j in its low and 2j+1 in its high half.
        scale, minimum, zero: [N, K/group], FP16 or FP32; group is even.
        bias: [N] or None. gated: as in `linear`.

    Returns:
        [..., N], or [..., N / 2] if gated, in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not fit, or not exactly one of minimum and zero is given.
    """
    rows, packed = qweight.shape
    _require(
        x.shape[-1] == 2 * packed,
        f"linear_w4: x has {x.shape[-1]} columns, qweight holds {2 * packed}",
    )
    check_w4("linear_w4", qweight, scale, minimum, zero)

    def multiply(wide: Tensor, part: slice, out: Tensor) -> None:
        even, odd = _dequantize_w4_halves(
            qweight[part],
            scale[part],
            None if minimum is None else minimum[part],
            None if zero is None else zero[part],
        )
        # Even and odd columns apart: the sum is the same and no nibble has to be moved.
        torch.addmm(wide[:, 0::2] @ even.t(), wide[:, 1::2], odd.t(), out=out)

    return linear_in_tiles(x, rows, bias, multiply, silu_and_mul if gated else None)


def _dequantize_w8(qweight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = qweight.shape
    grouped = qweight.view(rows, scale.shape[1], -1).float()
    return grouped.mul_(scale.float().unsqueeze(-1)).view(rows, columns)


def linear_w8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """`linear` with an INT8 weight, ``w[n, k] = q[n, k] * scale[n, g]``.

    Args:
        x: [..., K], FP32 or FP16.
        qweight: [N, K] int8.
        scale: [N, K/group], FP16 or FP32.
        bias: [N] or None. gated: as in `linear`.

    Returns:
        [..., N], or [..., N / 2] if gated, in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, columns = qweight.shape
    _require(
        x.shape[-1] == columns,
        f"linear_w8: x has {x.shape[-1]} columns, qweight has {columns}",
    )
    _groups("linear_w8", columns, scale, rows)

    def multiply(wide: Tensor, part: slice, out: Tensor) -> None:
        torch.mm(wide, _dequantize_w8(qweight[part], scale[part]).t(), out=out)

    return linear_in_tiles(x, rows, bias, multiply, silu_and_mul if gated else None)


# In the checks below a message is made only when it is needed: they run at every layer of every
# step, and making them took three quarters of an operator's time.


def check_gemv(
    name: str,
    x: Tensor,
    rows: int,
    columns: int,
    group: int | None,
    weight: Tensor,
    scales: tuple[Tensor, ...],
    bias: Tensor | None,
    gated: bool,
    groups: tuple[int, ...] = GROUPS,
) -> int:
    """Check what the gemv operators take; returns the rows of ``x``.

    Args:
        name: of the operator. x: its first argument.
        rows, columns: of the weight. group: columns of a group, None for any.
        weight: its narrow tensor. scales: scale, and minimum or zero, of a shape already checked.
        groups: what ``group`` may be.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}; torch.float32 and torch.float16 are supported")
    if x.shape[-1] != columns:
        raise ValueError(f"{name}: x has {x.shape[-1]} columns, the weight has {columns}")
    tokens = x.numel() // columns if columns else 0
    if tokens > GEMV_ROWS:
        raise ValueError(f"{name}: x has {tokens} rows; up to {GEMV_ROWS} are supported")
    if group is not None and group not in groups:
        supported = ", ".join(map(str, groups))
        raise ValueError(f"{name}: the group size is {group}; {supported} are supported")
    for part in (weight, *scales) if bias is None else (weight, *scales, bias):
        if part.device != x.device:
            raise ValueError(f"{name}: the weight or bias is on {part.device}, x on {x.device}")
        if not part.is_contiguous():
            raise ValueError(
                f"{name}: the weight's tensors and bias must be contiguous; one of shape "
                f"{tuple(part.shape)} has strides {part.stride()}"
            )
        if part is not weight and part.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: scale, minimum, zero or bias is {part.dtype}; torch.float32 and "
                f"torch.float16 are supported"
            )
    if len(scales) == 2 and scales[0].dtype != scales[1].dtype:
        raise ValueError(f"{name}: scale is {scales[0].dtype}, its companion {scales[1].dtype}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}, the weight {rows} rows")
    if gated and rows % 2:
        raise ValueError(f"{name}: the weight has {rows} rows; gated takes as many of the gate")
    return int(tokens)


def check_gemv_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    zero: Tensor | None,
    gated: bool,
) -> tuple[int, int]:
    """`check_gemv` for `gemv_w4`; returns the rows of ``x`` and the group size."""
    group = check_w4("gemv_w4", qweight, scale, minimum, zero)
    offset = minimum if zero is None else zero
    assert offset is not None
    rows, packed = qweight.shape
    scales = (scale, offset)
    tokens = check_gemv("gemv_w4", x, rows, 2 * packed, group, qweight, scales, bias, gated)
    return tokens, group


def gemv_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`linear_w4` for up to 32 rows of x, in one kernel.

    Raises:
        ValueError: more rows of x, a group size other than 32, 64 and 128, other dtypes than
            FP32 and FP16, parts that are not contiguous, shapes that do not fit.
    """
    check_gemv_w4(x, qweight, scale, minimum, bias, zero, gated)
    return linear_w4(x, qweight, scale, minimum, bias, zero, gated)


def check_gemv_w8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, gated: bool
) -> tuple[int, int]:
    """`check_gemv` for `gemv_w8`; returns the rows of ``x`` and the group size."""
    if qweight.dim() != 2 or qweight.dtype != torch.int8:
        raise ValueError(
            f"gemv_w8: qweight must be torch.int8 of 2 dimensions, it is {qweight.dtype} of "
            f"{qweight.dim()}"
        )
    rows, columns = qweight.shape
    group = _groups("gemv_w8", columns, scale, rows)
    if columns % 16:
        raise ValueError(f"gemv_w8: the weight has {columns} columns, no multiple of 16")
    limited = None if group == columns else group  # or one scale a row
    tokens = check_gemv(
        "gemv_w8", x, rows, columns, limited, qweight, (scale,), bias, gated, GROUPS_W8
    )
    return tokens, group


def gemv_w8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """`linear_w8` for up to 32 rows of x, in one kernel.

    Raises:
        ValueError: as `gemv_w4`; the group size may also be 16, or the whole row, of a multiple of
            16 columns.
    """
    check_gemv_w8(x, qweight, scale, bias, gated)
    return linear_w8(x, qweight, scale, bias, gated)


def check_gemv_f16(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> int:
    """`check_gemv` for `gemv_f16`; returns the rows of ``x``."""
    if weight.dim() != 2 or weight.dtype != torch.float16:
        raise ValueError(
            f"gemv_f16: weight must be torch.float16 of 2 dimensions, it is {weight.dtype} of "
            f"{weight.dim()}"
        )
    rows, columns = weight.shape
    if columns % 8:
        raise ValueError(f"gemv_f16: the weight has {columns} columns, no multiple of 8")
    return check_gemv("gemv_f16", x, rows, columns, None, weight, (), bias, gated)


def gemv_f16(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """`linear` with an FP16 weight for up to 32 rows of x, in one kernel.

    Raises:
        ValueError: more rows of x, other dtypes, a number of columns that is no multiple of 8,
            parts that are not contiguous, shapes that do not fit.
    """
    check_gemv_f16(x, weight, bias, gated)
    return linear(x, weight, bias, gated)


def dequant_w4(
    qweight: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None = None
) -> Tensor:
    """An INT4 weight (layout of `linear_w4`) in FP32, [N, K]: what prefill hands to cuBLAS.

    Raises:
        ValueError: the shapes do not fit, or not exactly one of minimum and zero is given.
    """
    check_w4("dequant_w4", qweight, scale, minimum, zero)
    halves = _dequantize_w4_halves(qweight, scale, minimum, zero)
    return torch.stack(halves, dim=-1).view(qweight.shape[0], -1)


def dequant_w8(qweight: Tensor, scale: Tensor) -> Tensor:
    """An INT8 weight (layout of `linear_w8`) in FP32, [N, K].

    Raises:
        ValueError: the shapes do not fit.
    """
    _groups("dequant_w8", qweight.shape[1], scale, qweight.shape[0])
    return _dequantize_w8(qweight, scale)


def embedding_w4(
    ids: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    dtype: torch.dtype,
    zero: Tensor | None = None,
) -> Tensor:
    """Rows ``ids`` of an INT4 weight (layout of `linear_w4`), dequantized.

    Args:
        ids: [...] integer. dtype: of the result.

    Returns:
        [..., K] in ``dtype``.
    """
    flat = ids.flatten()
    halves = _dequantize_w4_halves(
        qweight[flat],
        scale[flat],
        None if minimum is None else minimum[flat],
        None if zero is None else zero[flat],
    )
    return torch.stack(halves, dim=-1).to(dtype).view(*ids.shape, 2 * qweight.shape[1])


def embedding_w8(ids: Tensor, qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of an INT8 weight (layout of `linear_w8`), dequantized.

    Args:
        ids: [...] integer. dtype: of the result.

    Returns:
        [..., K] in ``dtype``.
    """
    flat = ids.flatten()
    rows = _dequantize_w8(qweight[flat], scale[flat])
    return rows.to(dtype).view(*ids.shape, qweight.shape[1])
