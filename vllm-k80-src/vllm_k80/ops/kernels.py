"""The operators that have a kernel for the GPU; the others run their reference there too.

Each function has the contract of its namesake in `reference` and falls back to it where the
installation carries no compiled kernels, or for a dtype that has none.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_k80.ops import driver, reference

_SUFFIX = {torch.float32: "f32", torch.float16: "f16"}
_THREADS = 256  # kThreads in csrc/*.cu
_WARPS = _THREADS // 32
_MOST_PARTS = 65535  # blocks in y (CUDA C++ programming guide, compute capability 3.7)

# csrc/gemv.cu: rows of x that a kernel takes, and rows of the weight that its block takes.
_GEMV_TOKENS = (1, 2, 4, 8)
_BLOCK_ROWS = 32
# The same of the kernels of eight rows of x and INT4 or INT8; the SMX that tiles of so many rows
# are dealt to; the most parts of a tile; and the bits of a row of the weight that a step takes.
_TILE_ROWS, _SMX, _MOST_PARTS_OF_TILE, _STEP_BITS = 64, 13, 16, 4096
_HALF_X, _HALF_BIAS, _FLOAT_Y = 1, 2, 4
# Elements of a weight that prefill dequantizes at a time: a work buffer of 32 MB of FP32, far
# more than the L2 cache, and enough rows for cuBLAS to fill the die.
_TILE_ELEMENTS = 1 << 23


def _names(kernel: str) -> dict[torch.dtype, str]:
    """The kernel's name for each dtype of the activations, made once and not in every call."""
    return {dtype: f"{kernel}_{suffix}" for dtype, suffix in _SUFFIX.items()}


_RMS_NORM, _FUSED_ADD_RMS_NORM = _names("rms_norm"), _names("fused_add_rms_norm")
_SILU_AND_MUL = _names("silu_and_mul")
_SILU_AND_MUL_OF_FLOAT = {torch.float32: "silu_and_mul_f32", torch.float16: "silu_and_mul_f32_f16"}
_GELU_AND_MUL = {"none": _names("gelu_and_mul"), "tanh": _names("gelu_tanh_and_mul")}
_GELU_TANH, _GELU_QUICK = _names("gelu_tanh"), _names("gelu_quick")
_ROTARY_EMBEDDING = _names("rotary_embedding")


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
        driver.kernel(_RMS_NORM[x.dtype], "pppif", x.device.index).launch(
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
        driver.kernel(_FUSED_ADD_RMS_NORM[x.dtype], "pppppif", x.device.index).launch(
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


def _activation(
    names: dict[torch.dtype, str], x: Tensor, columns: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Launch an activation of csrc/layers.cu whose result has ``columns`` columns.

    ``names`` are by the result's dtype: ``dtype``, or that of ``x``.
    """
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], columns), dtype=dtype)
    if columns and (tokens := y.numel() // columns):
        driver.kernel(names[y.dtype], "ppi", x.device.index).launch(
            (tokens, -(-columns // _THREADS)), _THREADS, x.data_ptr(), y.data_ptr(), columns
        )
    return y


def silu_and_mul(x: Tensor) -> Tensor:
    """See `reference.silu_and_mul`; kernels ``silu_and_mul_...``."""
    columns = reference.check_activation("silu_and_mul", x, gated=True)
    if not _has_activation(columns):
        return reference.silu_and_mul(x)
    return _activation(_SILU_AND_MUL, x, columns)


def gelu_and_mul(x: Tensor, approximate: str = "none") -> Tensor:
    """See `reference.gelu_and_mul`; kernels ``gelu_and_mul_...``, ``gelu_tanh_and_mul_...``."""
    columns = reference.check_gelu_and_mul(x, approximate)
    if not _has_activation(columns):
        return reference.gelu_and_mul(x, approximate)
    return _activation(_GELU_AND_MUL[approximate], x, columns)


def gelu_new(x: Tensor) -> Tensor:
    """See `reference.gelu_new`; kernels ``gelu_tanh_...``."""
    return _ungated("gelu_new", _GELU_TANH, x)


def gelu_fast(x: Tensor) -> Tensor:
    """See `reference.gelu_fast`; kernels ``gelu_tanh_...``."""
    return _ungated("gelu_fast", _GELU_TANH, x)


def gelu_quick(x: Tensor) -> Tensor:
    """See `reference.gelu_quick`; kernels ``gelu_quick_...``."""
    return _ungated("gelu_quick", _GELU_QUICK, x)


def _ungated(name: str, names: dict[torch.dtype, str], x: Tensor) -> Tensor:
    """The operator ``name``, of as many columns as ``x`` has."""
    columns = reference.check_activation(name, x, gated=False)
    if not _has_activation(columns):
        y: Tensor = getattr(reference, name)(x)
        return y
    return _activation(names, x, columns)


def _has_activation(columns: int) -> bool:
    return driver.available() and columns <= _MOST_PARTS * _THREADS


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """See `reference.rotary_embedding`; kernels ``rotary_embedding_...``, one launch for both."""
    heads, key_heads = reference.check_rotary_embedding(
        positions, query, key, head_size, cos_sin_cache
    )
    parts = -(-(heads + key_heads) // _WARPS)
    if not driver.available() or cos_sin_cache.dtype != query.dtype or parts > _MOST_PARTS:
        reference.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)
        return
    cached, rotary = cos_sin_cache.shape
    if parts and (tokens := positions.shape[0]):
        driver.kernel(_ROTARY_EMBEDDING[query.dtype], "ppppiiiiiiii", query.device.index).launch(
            (tokens, parts),
            _THREADS,
            positions.data_ptr(),
            query.data_ptr(),
            0 if key is None else key.data_ptr(),
            cos_sin_cache.data_ptr(),
            heads,
            key_heads,
            head_size,
            rotary,
            query.stride(0),
            0 if key is None else key.stride(0),
            cached,
            is_neox,
        )


def _aligned(*parts: Tensor) -> bool:
    """Whether the kernels may load 128 bits at a time from these; torch's allocations are."""
    return all(part.data_ptr() % 16 == 0 for part in parts)


def blocks_of_eight(rows: int, columns: int, bits: int) -> int:
    """Blocks in y of a product with eight rows of x: of a weight of INT4 or INT8 (``bits``).

    Tiles of rows that are left over when each SMX has as many are split by columns, into as few
    parts as take the least time. See `product_of_eight` in csrc/gemv.cu.
    """
    tiles, steps = -(-rows // _TILE_ROWS), -(-columns * bits // _STEP_BITS)
    split = tiles % _SMX

    def time(parts: int) -> int:
        return -(-split * parts // _SMX) * -(-steps // parts)

    parts = min(range(1, min(steps, _MOST_PARTS_OF_TILE) + 1), key=time)
    return tiles + split * (parts - 1)


class _Product:
    """A weight that has passed a gemv operator's checks, ready to be multiplied.

    Checking a weight and naming its kernel took longer than launching it, at every layer of every
    step, so it is done once. What comes of it depends on nothing but the addresses, shapes, strides
    and dtypes of the weight's parts, so these are what it is found by. (The tensors cannot carry
    it: torch 2.0 gives an operator written in Python new objects for them in every call.) Objects
    that were seen before, and live, are asked for their addresses only, since asking for all took
    as long as the launch.

    Args:
        kernel: its name without the rows of x.
        parts: of the weight and its bias, as the operator got them, and whether it is gated.
        arguments: the kernel's, up to x. rows, columns: of the weight.
        group_shift: log2 of the 128-bit units in a group; None if the kernel has no such argument.
    """

    _KNOWN: ClassVar[dict[tuple[Any, ...], "_Product"]] = {}
    # By identities and addresses of the parts, with what forgets them when one of them is gone.
    _SEEN: ClassVar[dict[tuple[int, ...], tuple["_Product", list[weakref.ref[Tensor]]]]] = {}

    def __init__(
        self,
        kernel: str,
        parts: tuple[Tensor | bool | None, ...],
        arguments: tuple[Tensor, ...],
        bias: Tensor | None,
        rows: int,
        columns: int,
        group_shift: int | None,
    ) -> None:
        self._gated = gated = parts[-1] is True
        self._kernel = kernel
        self._pointers = tuple(part.data_ptr() for part in arguments)
        self._bias = 0 if bias is None else bias.data_ptr()
        self._rows, self._columns = rows, columns
        self._outputs = rows // 2 if gated else rows
        self._group_shift = () if group_shift is None else (group_shift,)
        self._device = arguments[0].device
        self._flags = {
            dtype: (dtype == torch.float16) * _HALF_X
            | (bias is not None and bias.dtype == torch.float16) * _HALF_BIAS
            for dtype in _SUFFIX
        }
        self._launches: dict[int, tuple[driver.Kernel, int | tuple[int, int]]] = {}
        self._KNOWN[self._identify(parts)] = self

    @staticmethod
    def _identify(parts: tuple[Tensor | bool | None, ...]) -> tuple[Any, ...]:
        return tuple(
            [
                (part.data_ptr(), part.shape, part.stride(), part.dtype)
                if isinstance(part, Tensor)
                else part
                for part in parts
            ]
        )

    @classmethod
    def known(cls, x: Tensor, parts: tuple[Tensor | bool | None, ...]) -> "_Product | None":
        """What was made of these parts, if it is known and takes ``x``."""
        objects = (
            *map(id, parts),
            *[part.data_ptr() for part in parts if isinstance(part, Tensor)],
        )
        if (seen := cls._SEEN.get(objects)) is not None:
            product = seen[0]
        elif (known := cls._KNOWN.get(cls._identify(parts))) is not None:
            product = known

            def forget(_: object) -> None:
                cls._SEEN.pop(objects, None)

            tensors = (part for part in parts if isinstance(part, Tensor))
            cls._SEEN[objects] = product, [weakref.ref(part, forget) for part in tensors]
        else:
            return None
        return product if product.takes(x) else None

    def takes(self, x: Tensor) -> bool:
        """Whether this is a product of ``x`` as in decode: of few rows, in a dtype of ours."""
        shape = x.shape
        return (
            x.dtype in _SUFFIX
            and shape[-1] == self._columns
            and shape.numel() <= reference.GEMV_ROWS * self._columns
            and x.device == self._device
        )

    def _is_of_eight(self, tokens: int) -> bool:
        """Whether `product_of_eight` of csrc/gemv.cu takes it, which has no gated form."""
        return tokens > 4 and self._kernel != "gemv_f16"

    def _launch(self, tokens: int) -> tuple[driver.Kernel, int | tuple[int, int]]:
        """The kernel for so many rows of x, and its grid."""
        at_once = next((m for m in _GEMV_TOKENS if m >= tokens), 8)
        signature = "p" * (len(self._pointers) + 3) + "i" * (4 + len(self._group_shift))
        name = f"{self._kernel}_m{at_once}"
        if self._is_of_eight(tokens):
            bits = 4 if self._kernel.startswith("gemv_w4") else 8
            blocks = blocks_of_eight(self._rows, self._columns, bits)
        else:
            blocks = -(-self._rows // _BLOCK_ROWS)
            name = f"gated_{name}" if self._gated else name
        kernel = driver.kernel(name, signature, self._device.index)
        return kernel, (-(-tokens // 8), blocks) if at_once == 8 else blocks

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, or `silu_and_mul` of it."""
        x = x.contiguous()
        shape = x.shape
        if x.data_ptr() % 16:  # a view into something else; the kernel loads 128 bits at a time
            x = x.clone()
        tokens = shape.numel() // self._columns
        if self._gated and self._is_of_eight(tokens):
            return self._activated_apart(x, tokens)
        y = x.new_empty((*shape[:-1], self._outputs))
        if not tokens:
            return y
        self._multiply(x, tokens, y, self._flags[x.dtype])
        return y

    def _activated_apart(self, x: Tensor, tokens: int) -> Tensor:
        """The product in FP32, then its activation, which rounds to the dtype of ``x``."""
        product = x.new_empty((*x.shape[:-1], self._rows), dtype=torch.float32)
        self._multiply(x, tokens, product, self._flags[x.dtype] | _FLOAT_Y)
        return _activation(_SILU_AND_MUL_OF_FLOAT, product, self._outputs, x.dtype)

    def _multiply(self, x: Tensor, tokens: int, y: Tensor, flags: int) -> None:
        if tokens not in self._launches:
            self._launches[tokens] = self._launch(tokens)
        kernel, grid = self._launches[tokens]
        kernel.launch(
            grid,
            _THREADS,
            *self._pointers,
            x.data_ptr(),
            self._bias,
            y.data_ptr(),
            self._rows,
            self._columns,
            *self._group_shift,
            tokens,
            flags,
        )


def product_of(name: str, x: Tensor, others: tuple[Tensor | bool | None, ...]) -> _Product | None:
    """What the operator ``linear``, ``linear_w4`` or ``linear_w8`` has just multiplied ``x`` by.

    Args:
        others: the operator's arguments after ``x``.

    Returns:
        None where it was no product of ours.
    """
    if name == "linear_w4":
        qweight, scale, minimum, bias, zero, gated = others
        others = qweight, scale, minimum, zero, bias, gated
    return _Product.known(x, others)


def _has_product(weight: Tensor) -> bool:
    return driver.available() and _aligned(weight) and weight.shape[0] > 0


def _w4_name(scale: Tensor, zero: Tensor | None) -> str:
    return f"{'z' if zero is not None else 'f'}{8 * scale.element_size()}"


def gemv_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """See `reference.gemv_w4`; kernels ``gemv_w4_...``, ``gated_gemv_w4_...``.

    Launches of more than four rows on one device, here and in `gemv_w8`, must follow each other:
    they share the memory in which parts of a tile are added up.
    """
    parts = qweight, scale, minimum, zero, bias, gated
    product = _Product.known(x, parts)
    if product is None:
        _, group = reference.check_gemv_w4(x, qweight, scale, minimum, bias, zero, gated)
        offset = minimum if zero is None else zero
        if offset is None or not _has_product(qweight):
            return reference.linear_w4(x, qweight, scale, minimum, bias, zero, gated)
        name, shift = f"gemv_w4_{_w4_name(scale, zero)}", (group // 32).bit_length() - 1
        weight, rows = (qweight, scale, offset), qweight.shape[0]
        product = _Product(name, parts, weight, bias, rows, x.shape[-1], shift)
    return product(x)


def gemv_w8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """See `reference.gemv_w8`; kernels ``gemv_w8_...``, ``gated_gemv_w8_...``; and `gemv_w4`."""
    parts = qweight, scale, bias, gated
    product = _Product.known(x, parts)
    if product is None:
        _, group = reference.check_gemv_w8(x, qweight, scale, bias, gated)
        if not _has_product(qweight):
            return reference.linear_w8(x, qweight, scale, bias, gated)
        shift = 30 if scale.shape[1] == 1 else (group // 16).bit_length() - 1
        name, rows = f"gemv_w8_f{8 * scale.element_size()}", qweight.shape[0]
        product = _Product(name, parts, (qweight, scale), bias, rows, x.shape[-1], shift)
    return product(x)


def gemv_f16(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """See `reference.gemv_f16`; kernels ``gemv_f16_...``, ``gated_gemv_f16_...``."""
    parts = weight, bias, gated
    product = _Product.known(x, parts)
    if product is None:
        reference.check_gemv_f16(x, weight, bias, gated)
        rows, columns = weight.shape
        if not columns or not _has_product(weight):
            return reference.linear(x, weight, bias, gated)
        product = _Product("gemv_f16", parts, (weight,), bias, rows, columns, None)
    return product(x)


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
    x: Tensor,
    rows: int,
    bias: Tensor | None,
    gated: bool,
    dequantized: Callable[[slice], Tensor],
) -> Tensor:
    """``x @ weight.T + bias`` by cuBLAS, with ``dequantized(rows)`` of the weight at a time.

    torch's allocator gives each tile the memory of the one before: the work buffer is bounded.
    """

    def multiply(wide: Tensor, part: slice, out: Tensor) -> None:
        torch.mm(wide, dequantized(part).t(), out=out)

    activation = silu_and_mul if gated else None
    return reference.linear_in_tiles(
        x.contiguous(), rows, bias, multiply, activation, _TILE_ELEMENTS
    )


def linear_w4(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """See `reference.linear_w4`: `gemv_w4` in decode, `dequant_w4` and cuBLAS in prefill."""
    if product := _Product.known(x, (qweight, scale, minimum, zero, bias, gated)):
        return product(x)
    columns = 2 * qweight.shape[1]
    if x.shape[-1] != columns or scale.dim() != 2 or not driver.available():
        return reference.linear_w4(x, qweight, scale, minimum, bias, zero, gated)
    supported = columns // max(1, scale.shape[1]) in reference.GROUPS and x.dtype in _SUFFIX
    if _rows(x) <= reference.GEMV_ROWS and supported:
        return gemv_w4(x, qweight, scale, minimum, bias, zero, gated)

    def dequantized(part: slice) -> Tensor:
        return dequant_w4(
            qweight[part],
            scale[part],
            None if minimum is None else minimum[part],
            None if zero is None else zero[part],
        )

    return _in_tiles(x, qweight.shape[0], bias, gated, dequantized)


def linear_w8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """See `reference.linear_w8`: `gemv_w8` in decode, `dequant_w8` and cuBLAS in prefill."""
    if product := _Product.known(x, (qweight, scale, bias, gated)):
        return product(x)
    rows, columns = qweight.shape
    if x.shape[-1] != columns or scale.dim() != 2 or not driver.available():
        return reference.linear_w8(x, qweight, scale, bias, gated)
    groups = max(1, scale.shape[1])
    supported = columns % 16 == 0 and (groups == 1 or columns // groups in reference.GROUPS_W8)
    if _rows(x) <= reference.GEMV_ROWS and supported and x.dtype in _SUFFIX:
        return gemv_w8(x, qweight, scale, bias, gated)
    return _in_tiles(x, rows, bias, gated, lambda part: dequant_w8(qweight[part], scale[part]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """See `reference.linear`: with an FP16 weight `gemv_f16` in decode, tiles in prefill."""
    if product := _Product.known(x, (weight, bias, gated)):
        return product(x)
    halves = weight.dim() == 2 and weight.dtype == torch.float16 and x.dtype in _SUFFIX
    if not halves or x.shape[-1] != weight.shape[-1] or not driver.available():
        return reference.linear(x, weight, bias, gated)
    decode = _rows(x) <= reference.GEMV_ROWS and weight.shape[1] % 8 == 0
    if decode and weight.is_contiguous():
        return gemv_f16(x, weight, bias, gated)
    return _in_tiles(x, weight.shape[0], bias, gated, lambda part: weight[part].float())
