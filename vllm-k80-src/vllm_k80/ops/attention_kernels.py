"""Attention and its paged cache on the GPU: csrc/attention.cu.

Each function has the contract of its namesake in `attention_reference`, reads nothing back to the
host, and falls back to it only where the installation carries no compiled kernels at all.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from vllm_k80.ops import attention_reference as reference
from vllm_k80.ops import driver, kernels

_SUFFIX = {torch.float32: "f32", torch.float16: "f16"}
_HALF_QUERY, _HALF_OUT = 1, 2

# csrc/attention.cu.
_CACHE_THREADS, _DECODE_THREADS, _PREFILL_THREADS = 256, 128, 64
_CACHE_WARPS = _CACHE_THREADS // 32
_SPLIT_KEYS = 32
# Blocks of decode that fill a die: five for each of its 13 multiprocessors. More splits than that
# cost more in beginnings and ends than they gain, fewer do not keep the memory busy.
_BLOCKS = 5 * 13
# More keys than that a block takes only if there are too many splits: long and short sequences in
# one batch.
_LONG_SPLIT = 8192
_MAX_SPLITS = 64
_COUNTERS = 16384  # of csrc/attention.cu: one for each block of a split


class _Step:
    """What was found, and checked, of tensors that all layers of a step share.

    Checking them and laying out a launch took longer than launching it, and only its first
    arguments differ from layer to layer. What all layers share is known by its objects, which are
    kept as long as they are the last.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[Tensor, ...], dict[Any, Any]] = ((), {})

    def of(self, shared: tuple[Tensor, ...]) -> dict[Any, Any]:
        """What was found of this step, by the layouts of a layer's own tensors; to be added to."""
        last, found = self._last
        if len(shared) != len(last) or not all(map(operator.is_, shared, last)):
            found = {}
            self._last = shared, found
        return found


_DECODE, _CACHE = _Step(), _Step()


def _layout(x: Tensor) -> tuple[Any, ...]:
    """All that a kernel's checks ask of a tensor but its address."""
    return x.shape, x.stride(), x.dtype, x.device


def _aligned(addresses: tuple[int, ...]) -> bool:
    """Whether they need no further check; less may do."""
    return not any(address % 16 for address in addresses)


def _cache_layouts(
    query: Tensor, key: Tensor, value: Tensor, is_neox: bool, kv_cache: Tensor
) -> tuple[Any, ...]:
    """What layers have in common for which a step's launch of `rotary_and_cache` is the same."""
    return _layout(query), _layout(key), _layout(value), _layout(kv_cache), is_neox


def _decode_layouts(
    query: Tensor, kv_cache: Tensor, out: Tensor, *options: float | Tensor | None
) -> tuple[Any, ...]:
    """The same of `paged_attention`."""
    return _layout(query), _layout(kv_cache), _layout(out), *options


@functools.cache
def _size(head_size: int) -> int:
    """What a kernel for this head size is laid out for."""
    return next(size for size in (64, 128, 256) if head_size <= size)


def splits(blocks: int, max_seq_len: int) -> int:
    """In how many parts each sequence's keys are taken.

    Args:
        blocks: key heads, or tiles of their query heads, of all sequences together.
        max_seq_len: keys of the longest sequence, at most.
    """
    if blocks > _COUNTERS:
        return 1  # splits could not be combined, and need not be made
    wanted = max(_BLOCKS // blocks, -(-max_seq_len // _LONG_SPLIT))
    return max(1, min(wanted, -(-max_seq_len // _SPLIT_KEYS), _MAX_SPLITS))


def tile_of_heads(group: int) -> int:
    """Query heads that a block of decode takes, of ``group`` that share a key head."""
    return 1 if group == 1 else 4 if group <= 4 else 8


def reshape_and_cache(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `attention_reference.reshape_and_cache`; kernels ``reshape_and_cache_f32``, ``_f16``."""
    if not driver.available():
        reference.reshape_and_cache(key, value, kv_cache, slot_mapping)
        return
    key_stride, value_stride = reference.check_reshape(
        "reshape_and_cache", key, value, kv_cache, slot_mapping
    )
    _, blocks, block_size, kv_heads, head_size = kv_cache.shape
    if tokens := slot_mapping.shape[0]:
        name = f"reshape_and_cache_{_SUFFIX[kv_cache.dtype]}"
        driver.kernel(name, "ppppiiiii", kv_cache.device.index).launch(
            (tokens, 2),
            _CACHE_THREADS,
            key.data_ptr(),
            value.data_ptr(),
            kv_cache.data_ptr(),
            slot_mapping.data_ptr(),
            key_stride,
            value_stride,
            kv_heads * head_size,
            blocks * block_size,
            key.dtype == torch.float16,
        )


def rotary_and_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    kv_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """See `attention_reference.rotary_and_cache`; kernels ``rotary_and_cache_f32``, ``_f16``.

    Where not all tensors have the dtype of one, two launches.
    """
    tensors = positions, query, key, value, cos_sin_cache
    if not driver.available():
        reference.rotary_and_cache(*tensors, is_neox, kv_cache, slot_mapping)
        return
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr(), kv_cache.data_ptr()
    layer = _cache_layouts(query, key, value, is_neox, kv_cache)
    step = _CACHE.of((positions, slot_mapping, cos_sin_cache))
    launch = step.get(layer)
    if launch is None or not _aligned(addresses):
        strides = reference.check_rotary_and_cache(*tensors, kv_cache, slot_mapping)
        _, blocks, block_size, kv_heads, head_size = kv_cache.shape
        tokens, heads, dtype = slot_mapping.shape[0], query.shape[1], query.dtype
        if cos_sin_cache.dtype != dtype or kv_cache.dtype != dtype:
            kernels.rotary_embedding(
                positions[:tokens],
                query[:tokens].flatten(1),
                key[:tokens].flatten(1),
                head_size,
                cos_sin_cache,
                is_neox,
            )
            reshape_and_cache(key, value, kv_cache, slot_mapping)
            return
        if not tokens:
            return
        name = f"rotary_and_cache_{_SUFFIX[dtype]}"
        kernel = driver.kernel(name, "pppppppiiiiiiiiii", kv_cache.device.index)
        cached, rotary = cos_sin_cache.shape
        cache = kv_heads, head_size, rotary, *strides, cached, blocks * block_size, is_neox
        grid = tokens, -(-(heads + 2 * kv_heads) // _CACHE_WARPS)
        shared = positions.data_ptr(), cos_sin_cache.data_ptr(), slot_mapping.data_ptr()
        launch = kernel, grid, shared, (heads, *cache)
        step[layer] = launch
    _launch_cache(launch, *addresses)


def _launch_cache(launch: Any, query: int, key: int, value: int, kv_cache: int) -> None:
    """What was found of a step for `rotary_and_cache`, at a layer's addresses."""
    kernel, grid, (place, rotations, slots), sizes = launch
    kernel.launch(
        grid, _CACHE_THREADS, place, query, key, value, rotations, kv_cache, slots, *sizes
    )


def _batch(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    stride: int,
    scale: float,
    window: int,
    soft_cap: float,
    alibi_slopes: Tensor | None,
) -> tuple[float | None, ...]:
    """ATTENTION_BATCH of csrc/attention.cu."""
    _, blocks, block_size, kv_heads, head_size = kv_cache.shape
    half_query, half_out = query.dtype == torch.float16, out.dtype == torch.float16
    return (
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        None if alibi_slopes is None else alibi_slopes.data_ptr(),
        kv_heads,
        query.shape[1] // kv_heads,
        head_size,
        stride,
        blocks,
        block_size.bit_length() - 1,
        block_table.shape[1],
        block_table.stride(0),
        window,
        half_query * _HALF_QUERY | half_out * _HALF_OUT,
        scale,
        soft_cap,
    )


_BATCH = "pppiiiiiiiiiiff"


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> None:
    """See `attention_reference.paged_attention`; kernels ``paged_attention_...``.

    Several splits leave their results in a buffer, and the last of them combines all. Launches on
    one device must follow each other: they share the counters by which it knows that it is.
    """
    options = (window, soft_cap, alibi_slopes)
    if not driver.available():
        reference.paged_attention(
            query, kv_cache, out, seq_lens, block_table, max_seq_len, scale, *options
        )
        return
    addresses = query.data_ptr(), kv_cache.data_ptr(), out.data_ptr()
    layer = _decode_layouts(query, kv_cache, out, max_seq_len, scale, *options)
    step = _DECODE.of((seq_lens, block_table))
    launch = step.get(layer)
    if launch is None or not _aligned(addresses):
        _, _, kv_heads, head_size, stride = reference.check_attention(
            "paged_attention", query, kv_cache, out, seq_lens, block_table, *options
        )
        reference.check_paged("paged_attention", query, seq_lens)
        sequences, heads = query.shape[:2]
        if not sequences:
            return
        group = heads // kv_heads
        tile = tile_of_heads(group)
        tiles = kv_heads * -(-group // tile)
        seen = min(max_seq_len, window) if window else max_seq_len
        # As many splits as in a batch padded to a power of two, as graphs pad it: the same result.
        padded = 1 << (sequences - 1).bit_length()
        parts = splits(padded * tiles, seen)
        name = f"paged_attention_{_SUFFIX[kv_cache.dtype]}_d{_size(head_size)}_h{tile}"
        kernel = driver.kernel(name, f"pppp{_BATCH}i", query.device.index)
        sizes = _batch(query, kv_cache, out, seq_lens, block_table, stride, scale, *options)
        partial_shape = (sequences, heads, parts, head_size + 4) if parts > 1 else None
        launch = kernel, (tiles, parts, sequences), partial_shape, (*sizes, parts)
        step[layer] = launch
    _launch_decode(launch, query, *addresses)


def _launch_decode(launch: Any, like: Tensor, query: int, kv_cache: int, out: int) -> None:
    """What was found of a step for `paged_attention`, at a layer's addresses.

    Args:
        like: a tensor on the device.
    """
    kernel, grid, partial_shape, sizes = launch
    partial = None
    if partial_shape is not None:
        partial = like.new_empty(partial_shape, dtype=torch.float32)
    splits_at = None if partial is None else partial.data_ptr()
    kernel.launch(grid, _DECODE_THREADS, query, kv_cache, out, splits_at, *sizes)


class DecodeStep:
    """`rotary_and_cache`, then `paged_attention`, for further layers of a step that are alike.

    What they found and checked of the last layer holds for the next one whose tensors have the same
    layouts: so no view is made of these, and only their addresses are asked for. Views and layouts
    took longer than the two launches.

    Args:
        rows: query [tokens, heads * head_size], key and value [tokens, kv_heads * head_size], as
            the layer has them.
        positions: what the query and the key were rotated by.
        cache, decode: what the two have found.
    """

    def __init__(
        self,
        rows: tuple[Tensor, Tensor, Tensor],
        positions: Tensor | None,
        cache: Any,
        decode: Any,
    ) -> None:
        self._rows = self._layouts(*rows)
        self._positions = positions
        self._cache, self._decode = cache, decode

    @staticmethod
    def _layouts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        strides = query.stride(), key.stride(), value.stride()
        dtypes = query.dtype, key.dtype, value.dtype
        return (query.shape, key.shape, *strides, *dtypes, query.get_device())

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, kv_cache: Tensor
    ) -> Tensor | None:
        """[tokens, heads * head_size]; None where a layer is not alike.

        Args: as above, of the layer; its cache has the layout of the last layer's.
        """
        rows = query.data_ptr(), key.data_ptr(), value.data_ptr()
        at = kv_cache.data_ptr()
        if (
            positions is not self._positions
            or (rows[0] | rows[1] | rows[2] | at) % 16
            or self._layouts(query, key, value) != self._rows
        ):
            return None
        out = query.new_empty(query.shape)
        _launch_cache(self._cache, *rows, at)
        _launch_decode(self._decode, query, rows[0], at, out.data_ptr())
        return out


def decode_step(
    rows: tuple[Tensor, Tensor, Tensor],
    rotated: tuple[Tensor, Tensor, Tensor],
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    is_neox: bool,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *options: float | Tensor | None,
) -> DecodeStep | None:
    """What the two operators have just found of a layer; None where they keep nothing.

    Args:
        rows: see `DecodeStep`. rotated: the views of them that the operators got, like all others.
        options: those of `paged_attention` from ``max_seq_len`` on.
    """
    shared = positions, slot_mapping, cos_sin_cache
    cache = _CACHE.of(shared).get(_cache_layouts(*rotated, is_neox, kv_cache))
    decode = _DECODE.of((seq_lens, block_table)).get(
        _decode_layouts(rotated[0], kv_cache, out, *options)
    )
    return DecodeStep(rows, positions, cache, decode) if cache and decode else None


def varlen_attention(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> None:
    """See `attention_reference.varlen_attention`; kernels ``varlen_attention_...``."""
    options = (window, soft_cap, alibi_slopes)
    if not driver.available():
        reference.varlen_attention(
            query,
            kv_cache,
            out,
            query_start_loc,
            seq_lens,
            block_table,
            max_query_len,
            scale,
            *options,
        )
        return
    _, _, kv_heads, head_size, stride = reference.check_attention(
        "varlen_attention", query, kv_cache, out, seq_lens, block_table, *options
    )
    sequences = seq_lens.shape[0]
    reference.check_integers(
        "varlen_attention", "query_start_loc", query_start_loc, sequences + 1, 1, kv_cache
    )
    tokens, heads = query.shape[:2]
    size = _size(head_size)
    tiles = -(-min(max_query_len, tokens) * (heads // kv_heads) // (32 if size == 256 else 64))
    if not sequences or tiles <= 0:
        return
    name = f"varlen_attention_{_SUFFIX[kv_cache.dtype]}_d{size}"
    driver.kernel(name, f"pppp{_BATCH}i", query.device.index).launch(
        (kv_heads, tiles, sequences),
        _PREFILL_THREADS,
        query.data_ptr(),
        kv_cache.data_ptr(),
        out.data_ptr(),
        query_start_loc.data_ptr(),
        *_batch(query, kv_cache, out, seq_lens, block_table, stride, scale, *options),
        tokens,
    )
