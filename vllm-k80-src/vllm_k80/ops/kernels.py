"""The operators that have a kernel for the GPU; the others run their reference there too.

Each function has the contract of its namesake in `reference` and falls back to it where the
installation carries no compiled kernels, or for a dtype that has none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_k80.ops import driver, reference

_SUFFIX = {torch.float32: "f32", torch.float16: "f16"}
_THREADS = 256  # kThreads in csrc/rms_norm.cu and csrc/gemv.cu

# csrc/gemv.cu: rows of x that a kernel takes, and rows of the weight that its block takes.
_GEMV_TOKENS = (1, 2, 4, 8)
_BLOCK_ROWS, _BLOCK_ROWS_M8 = 32, 64  # gemv_f16_m8 takes 32 too
_HALF_X, _HALF_BIAS = 1, 2
# Elements of a weight that prefill dequantizes at a time: a work buffer of 32 MB of FP32, far
# more than the L2 cache, and enough rows for cuBLAS to fill the die.
_TILE_ELEMENTS = 1 << 23


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        driver.available()
        and x.dtype in _SUFFIX
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`; kernel ``rms_norm_f32`` or ``rms_norm_f16``."""
    if not _has_kernel(x, weight):
        return reference.rms_norm(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    if (hidden := x.shape[-1]) and (tokens := x.numel() // hidden):
        driver.kernel(f"rms_norm_{_SUFFIX[x.dtype]}", "pppif", x.device.index).launch(
            tokens, _THREADS, x.data_ptr(), weight.data_ptr(), y.data_ptr(), hidden, eps
        )
    return y


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.fused_add_rms_norm`; kernel ``fused_add_rms_norm_f32`` or ``_f16``."""
    if not _has_kernel(x, weight) or residual.shape != x.shape or residual.dtype != x.dtype:
        return reference.fused_add_rms_norm(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    if (hidden := x.shape[-1]) and (tokens := x.numel() // hidden):
        name = f"fused_add_rms_norm_{_SUFFIX[x.dtype]}"
        driver.kernel(name, "pppppif", x.device.index).launch(
            tokens,
            _THREADS,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            total.data_ptr(),
            hidden,
            eps,
        )
    return y, total


def _gemv(
    kernel: str,
    weight: tuple[Tensor | None, ...],
    x: Tensor,
    bias: Tensor | None,
    rows: int,
    tokens: int,
    group_shift: int | None,
) -> Tensor:
    """Launch ``kernel`` for ``tokens`` rows of x.

    Args:
        weight: its tensors, in the order of the kernel's arguments.
        rows: of the weight. group_shift: log2 of the 128-bit units in a group; None if the
            kernel has no such argument.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:  # a view into something else; the kernel loads 128 bits at a time
        x = x.clone()
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    if not tokens or not rows:
        return y
    at_once = next((m for m in _GEMV_TOKENS if m >= tokens), 8)
    wide = at_once == 8 and kernel != "gemv_f16"
    blocks = -(-rows // (_BLOCK_ROWS_M8 if wide else _BLOCK_ROWS))
    half_bias = bias is not None and bias.dtype == torch.float16
    flags = (x.dtype == torch.float16) * _HALF_X | half_bias * _HALF_BIAS
    shift = () if group_shift is None else (group_shift,)
    driver.kernel(
        f"{kernel}_m{at_once}",
        "p" * (len(weight) + 3) + "i" * (4 + len(shift)),
        x.device.index,
    ).launch(
        (-(-tokens // 8), blocks) if at_once == 8 else blocks,
        _THREADS,
        *(None if part is None else part.data_ptr() for part in weight),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows,
        x.shape[-1],
        *shift,
        tokens,
        flags,
    )
    return y


def _aligned(*parts: Tensor) -> bool:
    """Whether the kernels may load 128 bits at a time from these; torch's allocations are."""
    return all(part.data_ptr() % 16 == 0 for part in parts)


def _w4_name(scale: Tensor, zero: Tensor | None) -> str:
    return f"{'z' if zero is not None else 'f'}{8 * scale.element_size()}"


def gemv_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """See `reference.gemv_w4`; kernels ``gemv_w4_...``."""
    tokens, group = reference.check_gemv_w4(x, qweight, scale, minimum, bias, zero)
    if not driver.available() or not _aligned(qweight):
        return reference.linear_w4(x, qweight, scale, minimum, bias, zero)
    offset = minimum if zero is None else zero
    shift = (group // 32).bit_length() - 1
    name = f"gemv_w4_{_w4_name(scale, zero)}"
    return _gemv(name, (qweight, scale, offset), x, bias, qweight.shape[0], tokens, shift)


def gemv_w8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.gemv_w8`; kernels ``gemv_w8_...``."""
    tokens, group = reference.check_gemv_w8(x, qweight, scale, bias)
    if not driver.available() or not _aligned(qweight):
        return reference.linear_w8(x, qweight, scale, bias)
    shift = 30 if scale.shape[1] == 1 else (group // 16).bit_length() - 1
    name = f"gemv_w8_f{8 * scale.element_size()}"
    return _gemv(name, (qweight, scale), x, bias, qweight.shape[0], tokens, shift)


def gemv_f16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.gemv_f16`; kernels ``gemv_f16_...``."""
    tokens = reference.check_gemv_f16(x, weight, bias)
    if not driver.available() or not _aligned(weight):
        return reference.linear(x, weight, bias)
    return _gemv("gemv_f16", (weight,), x, bias, weight.shape[0], tokens, None)


def _can_dequantize(qweight: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether a kernel takes this weight: 32 bits of it never cross a group."""
    offset = scale if offset is None else offset
    if not driver.available() or qweight.dim() != 2 or scale.dim() != 2 or not scale.shape[1]:
        return False
    return (
        qweight.shape[1] % (4 * scale.shape[1]) == 0
        and qweight.shape[0] == scale.shape[0]
        and offset.shape == scale.shape
        and offset.dtype == scale.dtype
        and scale.dtype in _SUFFIX
        and qweight.dtype in (torch.uint8, torch.int8)
        and all(part.is_contiguous() for part in (qweight, scale, offset))
        and _aligned(qweight)
    )


def _dequantize(kernel: str, weight: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """All rows of ``weight`` (its tensors, in the kernel's order), written as FP32 to ``out``."""
    qweight, scale = weight[:2]
    if words := qweight.numel() // 4:
        driver.kernel(kernel, "p" * (len(weight) + 1) + "ii", out.device.index).launch(
            -(-words // _THREADS),
            _THREADS,
            *(part.data_ptr() for part in weight),
            out.data_ptr(),
            words,
            words // scale.numel(),
        )
    return out


def dequant_w4(
    qweight: Tensor, scale: Tensor, minimum: Tensor | None, zero: Tensor | None = None
) -> Tensor:
    """See `reference.dequant_w4`; kernels ``dequant_w4_...``."""
    reference.check_w4("dequant_w4", qweight, scale, minimum, zero)
    offset = minimum if zero is None else zero
    if offset is None or not _can_dequantize(qweight, scale, offset):
        return reference.dequant_w4(qweight, scale, minimum, zero)
    rows, packed = qweight.shape
    out = torch.empty(rows, 2 * packed, dtype=torch.float32, device=qweight.device)
    return _dequantize(f"dequant_w4_{_w4_name(scale, zero)}", (qweight, scale, offset), out)


def dequant_w8(qweight: Tensor, scale: Tensor) -> Tensor:
    """See `reference.dequant_w8`; kernels ``dequant_w8_...``."""
    if qweight.dtype != torch.int8 or not _can_dequantize(qweight, scale, None):
        return reference.dequant_w8(qweight, scale)
    out = torch.empty(qweight.shape, dtype=torch.float32, device=qweight.device)
    return _dequantize(f"dequant_w8_f{8 * scale.element_size()}", (qweight, scale), out)


def _rows(x: Tensor) -> int:
    return int(x.numel()) // max(1, int(x.shape[-1]))


def _in_tiles(
    x: Tensor, rows: int, bias: Tensor | None, dequantized: Callable[[slice], Tensor]
) -> Tensor:
    """``x @ weight.T + bias`` by cuBLAS, with ``dequantized(rows)`` of the weight at a time.

    torch's allocator gives each tile the memory of the one before: the work buffer is bounded.
    """

    def multiply(wide: Tensor, part: slice, out: Tensor) -> None:
        torch.mm(wide, dequantized(part).t(), out=out)

    return reference.linear_in_tiles(x.contiguous(), rows, bias, multiply, _TILE_ELEMENTS)


def linear_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_w4`: `gemv_w4` in decode, `dequant_w4` and cuBLAS in prefill."""
    columns = 2 * qweight.shape[1]
    if x.shape[-1] != columns or scale.dim() != 2 or not driver.available():
        return reference.linear_w4(x, qweight, scale, minimum, bias, zero)
    supported = columns // max(1, scale.shape[1]) in reference.GROUPS and x.dtype in _SUFFIX
    if _rows(x) <= reference.GEMV_ROWS and supported:
        return gemv_w4(x, qweight, scale, minimum, bias, zero)

    def dequantized(part: slice) -> Tensor:
        return dequant_w4(
            qweight[part],
            scale[part],
            None if minimum is None else minimum[part],
            None if zero is None else zero[part],
        )

    return _in_tiles(x, qweight.shape[0], bias, dequantized)


def linear_w8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear_w8`: `gemv_w8` in decode, `dequant_w8` and cuBLAS in prefill."""
    rows, columns = qweight.shape
    if x.shape[-1] != columns or scale.dim() != 2 or not driver.available():
        return reference.linear_w8(x, qweight, scale, bias)
    groups = max(1, scale.shape[1])
    supported = columns % 16 == 0 and (groups == 1 or columns // groups in reference.GROUPS)
    if _rows(x) <= reference.GEMV_ROWS and supported and x.dtype in _SUFFIX:
        return gemv_w8(x, qweight, scale, bias)
    return _in_tiles(x, rows, bias, lambda part: dequant_w8(qweight[part], scale[part]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`: with an FP16 weight `gemv_f16` in decode, tiles in prefill."""
    halves = weight.dim() == 2 and weight.dtype == torch.float16 and x.dtype in _SUFFIX
    if not halves or x.shape[-1] != weight.shape[-1] or not driver.available():
        return reference.linear(x, weight, bias)
    decode = _rows(x) <= reference.GEMV_ROWS and weight.shape[1] % 8 == 0
    if decode and weight.is_contiguous():
        return gemv_f16(x, weight, bias)
    return _in_tiles(x, weight.shape[0], bias, lambda part: weight[part].float())
