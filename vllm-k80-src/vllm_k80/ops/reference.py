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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _linear_in_tiles(
    x: Tensor, rows: int, bias: Tensor | None, multiply: Callable[[Tensor, slice, Tensor], None]
) -> Tensor:
    """`linear` with a weight of ``rows`` rows that ``multiply(x, rows, out)`` takes in tiles."""
    columns = x.shape[-1]
    wide = x.float().view(-1, columns)
    y = torch.empty(wide.shape[0], rows, dtype=torch.float32, device=x.device)
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        multiply(wide, part, y[:, part])
    if bias is not None:
        y += bias.float()
    return y.view(*x.shape[:-1], rows).to(x.dtype)


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


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(x[..., :d]) * x[..., d:]`` with ``d`` half of the last dimension.

    Args:
        x: [..., 2 d], FP32 or FP16.

    Returns:
        [..., d] in the dtype of ``x``.

    Raises:
        ValueError: the last dimension is odd.
    """
    _require(x.shape[-1] % 2 == 0, f"silu_and_mul: x has an odd number of columns, {x.shape[-1]}")
    gate, up = x.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in FP32.

    Args:
        x: [..., K], FP32 or FP16.
        weight: [N, K], FP32 or FP16.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        ValueError: K differs.
    """
    _require(
        x.shape[-1] == weight.shape[-1],
        f"linear: x has {x.shape[-1]} columns, weight has {weight.shape[-1]}",
    )
    wide_bias = None if bias is None else bias.float()
    return functional.linear(x.float(), weight.float(), wide_bias).to(x.dtype)


def _groups(name: str, elements: int, scale: Tensor, rows: int) -> int:
    """Elements a group of a quantized weight of ``rows`` rows, checked."""
    _require(
        scale.dim() == 2 and scale.shape[0] == rows and elements % scale.shape[1] == 0,
        f"{name}: scale has shape {tuple(scale.shape)}, which does not divide a weight of "
        f"{rows} x {elements}",
    )
    return elements // int(scale.shape[1])


def _dequantize_w4_halves(qweight: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd columns of an INT4 weight, each [N, K/2] FP32."""
    rows, packed = qweight.shape
    grouped = qweight.view(rows, scale.shape[1], -1)
    wide_scale, wide_minimum = scale.float().unsqueeze(-1), minimum.float().unsqueeze(-1)
    even, odd = (
        nibbles.float().mul_(wide_scale).add_(wide_minimum).view(rows, packed)
        for nibbles in (grouped & 0x0F, grouped >> 4)
    )
    return even, odd


def linear_w4(
    x: Tensor, qweight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear` with an INT4 weight, ``w[n, k] = q[n, k] * scale[n, g] + minimum[n, g]``.

    Args:
        x: [..., K], FP32 or FP16.
        qweight: [N, K/2] uint8; byte j holds column 2j in its low and 2j+1 in its high half.
        scale, minimum: [N, K/group], FP16 or FP32; group is even.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        ValueError: the shapes do not fit.
    """
    rows, packed = qweight.shape
    _require(
        x.shape[-1] == 2 * packed,
        f"linear_w4: x has {x.shape[-1]} columns, qweight holds {2 * packed}",
    )
    group = _groups("linear_w4", 2 * packed, scale, rows)
    _require(group % 2 == 0, f"linear_w4: the group size must be even, it is {group}")
    _require(
        minimum.shape == scale.shape,
        f"linear_w4: minimum is {tuple(minimum.shape)}, scale is {tuple(scale.shape)}",
    )

    def multiply(wide: Tensor, part: slice, out: Tensor) -> None:
        even, odd = _dequantize_w4_halves(qweight[part], scale[part], minimum[part])
        # Even and odd columns apart: the sum is the same and no nibble has to be moved.
        torch.addmm(wide[:, 0::2] @ even.t(), wide[:, 1::2], odd.t(), out=out)

    return _linear_in_tiles(x, rows, bias, multiply)


def _dequantize_w8(qweight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = qweight.shape
    grouped = qweight.view(rows, scale.shape[1], -1).float()
    return grouped.mul_(scale.float().unsqueeze(-1)).view(rows, columns)


def linear_w8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with an INT8 weight, ``w[n, k] = q[n, k] * scale[n, g]``.

    Args:
        x: [..., K], FP32 or FP16.
        qweight: [N, K] int8.
        scale: [N, K/group], FP16 or FP32.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of ``x``.

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

    return _linear_in_tiles(x, rows, bias, multiply)


def embedding_w4(
    ids: Tensor, qweight: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows ``ids`` of an INT4 weight (layout of `linear_w4`), dequantized.

    Args:
        ids: [...] integer. dtype: of the result.

    Returns:
        [..., K] in ``dtype``.
    """
    flat = ids.flatten()
    halves = _dequantize_w4_halves(qweight[flat], scale[flat], minimum[flat])
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


def reshape_and_cache(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the keys and values of new tokens into the paged cache.

    Args:
        key, value: [tokens, kv_heads, head_size].
        kv_cache: [2, blocks, block_size, kv_heads, head_size], FP32 or FP16, written in place.
        slot_mapping: [<= tokens] integer: slot ``block * block_size + offset`` of each token.
            A padded token has slot -1 and is written to block 0, which holds no sequence.
    """
    slots = slot_mapping.long().clamp(min=0)
    block_size = kv_cache.shape[2]
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    tokens = slots.shape[0]
    kv_cache[0, blocks, offsets] = key[:tokens].to(kv_cache.dtype)
    kv_cache[1, blocks, offsets] = value[:tokens].to(kv_cache.dtype)


def varlen_attention(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Causal attention of new tokens over their sequences, straight from the paged cache.

    Sequence ``i`` has ``seq_lens[i]`` tokens in the cache; its last ones are the queries
    ``query_start_loc[i] .. query_start_loc[i + 1]``. Decode is one query a sequence.

    Args:
        query: [tokens, heads, head_size], FP32 or FP16.
        kv_cache: [2, blocks, block_size, kv_heads, head_size]; heads is a multiple of kv_heads.
        out: [>= tokens, heads, head_size], written in place.
        query_start_loc: [sequences + 1] int32, seq_lens: [sequences] int32; read on the host.
        block_table: [sequences, blocks a sequence] int32.
        scale: multiplies the scores. window: a query sees this many last keys, itself included;
            0 is all. soft_cap: ``cap * tanh(scores / cap)``; 0 is none.
        alibi_slopes: [heads] or None (arXiv:2108.12409).

    Raises:
        ValueError: heads is not a multiple of kv_heads.
    """
    heads, kv_heads, block_size = query.shape[1], kv_cache.shape[3], kv_cache.shape[2]
    _require(
        heads % kv_heads == 0,
        f"varlen_attention: {heads} query heads are not a multiple of {kv_heads} key heads",
    )
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        queries = end - start
        if queries == 0:
            continue
        used = -(-length // block_size)
        pages = kv_cache[:, block_table[sequence, :used].long()]
        keys, values = pages.flatten(1, 2)[:, :length].float()  # each [length, kv_heads, size]
        # [kv_heads, heads of a key head x queries, size]: one matrix product a key head.
        grouped = query[start:end].float().view(queries, kv_heads, -1, query.shape[2])
        grouped = grouped.permute(1, 2, 0, 3).reshape(kv_heads, -1, query.shape[2])
        scores = torch.bmm(grouped * scale, keys.permute(1, 2, 0))
        scores = scores.view(heads, queries, length)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        positions = torch.arange(length - queries, length, device=query.device).unsqueeze(1)
        behind = positions - torch.arange(length, device=query.device)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.float().view(heads, 1, 1) * behind
        hidden = behind < 0
        if window:
            hidden = hidden | (behind >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        context = torch.bmm(weights.view(kv_heads, -1, length), values.transpose(0, 1))
        context = context.view(heads, queries, -1).transpose(0, 1)
        out[start:end] = context.to(out.dtype)
