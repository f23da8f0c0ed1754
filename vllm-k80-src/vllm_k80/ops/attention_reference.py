"""Attention and its paged cache in plain torch: what the kernels must compute.

All arithmetic is FP32; results are rounded once. These references read lengths and tables on the
host and loop over the sequences there, so on a GPU they are what an installation without compiled
kernels runs, and what kernels are tested against.
"""

import torch
from torch import Tensor

from vllm_k80.ops.reference import check_rotation, rotary_embedding

DTYPES = (torch.float32, torch.float16)
MAX_HEAD_SIZE = 256

# A message is made only when it is needed: the checks run at every layer of every step.


def check_cache(name: str, kv_cache: Tensor) -> tuple[int, int, int, int]:
    """The cache's blocks, block size, key heads and head size, checked.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if kv_cache.dim() != 5 or kv_cache.shape[0] != 2:
        raise ValueError(
            f"{name}: kv_cache has shape {tuple(kv_cache.shape)}; [2, blocks, block_size, "
            f"kv_heads, head_size] is supported"
        )
    _, blocks, block_size, kv_heads, head_size = kv_cache.shape
    if kv_cache.dtype not in DTYPES:
        raise ValueError(
            f"{name}: kv_cache is {kv_cache.dtype}; torch.float32 and torch.float16 are supported"
        )
    if head_size % 8 or not 0 < head_size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{name}: the head size is {head_size}; multiples of 8 up to {MAX_HEAD_SIZE} are "
            f"supported"
        )
    if block_size <= 0 or block_size & (block_size - 1):
        raise ValueError(
            f"{name}: kv_cache has blocks of {block_size} tokens; powers of two are supported"
        )
    if not blocks or not kv_heads:
        raise ValueError(f"{name}: kv_cache is empty, it has shape {tuple(kv_cache.shape)}")
    if not kv_cache.is_contiguous() or kv_cache.data_ptr() % 16:
        raise ValueError(
            f"{name}: kv_cache must be contiguous and 16-byte aligned; it has strides "
            f"{kv_cache.stride()} and begins at {kv_cache.data_ptr():#x}"
        )
    return blocks, block_size, kv_heads, head_size


def check_rows(name: str, argument: str, x: Tensor, kv_cache: Tensor) -> int:
    """Elements from token to token of ``x`` [tokens, heads, head_size], checked.

    Tokens may be apart, as in a view of one tensor that holds queries, keys and values.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    shape, head_size = x.shape, kv_cache.shape[4]
    if len(shape) != 3 or shape[2] != head_size:
        raise ValueError(
            f"{name}: {argument} has shape {tuple(shape)}; [tokens, heads, {head_size}] fits "
            f"the cache"
        )
    dtype = x.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{name}: {argument} is {dtype}; torch.float32 and torch.float16 are supported"
        )
    if x.device != kv_cache.device:
        raise ValueError(f"{name}: {argument} is on {x.device}, kv_cache on {kv_cache.device}")
    tokens, heads, _ = shape
    stride, between_heads, between_elements = x.stride()
    if between_elements != 1 or (between_heads != head_size and heads > 1):
        raise ValueError(
            f"{name}: {argument} has strides {x.stride()}; the heads of a token must be contiguous"
        )
    if tokens <= 1:
        stride = 0
    if stride % 4 or x.data_ptr() % (16 if dtype is torch.float32 else 8):
        raise ValueError(
            f"{name}: {argument} begins at {x.data_ptr():#x}, with {stride} elements from token "
            f"to token; multiples of 4 elements are supported"
        )
    if tokens * stride >= 1 << 31:
        raise ValueError(
            f"{name}: {argument} has {tokens} tokens, {stride} elements apart; less than 2**31 "
            f"elements are supported"
        )
    return int(stride)


def check_integers(
    name: str, argument: str, x: Tensor, rows: int, dimensions: int, kv_cache: Tensor
) -> None:
    """Check an int32 tensor: ``rows``, or that many rows that are each contiguous.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if (
        x.dtype is not torch.int32
        or x.dim() != dimensions
        or x.shape[0] != rows
        or (x.stride(-1) != 1 and x.shape[-1] > 1)
        or x.device != kv_cache.device
    ):
        raise ValueError(
            f"{name}: {argument} is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} "
            f"on {x.device}; torch.int32 of {rows}{' contiguous rows' if dimensions == 2 else ''} "
            f"on {kv_cache.device} is supported"
        )


def check_attention(
    name: str,
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    window: int,
    soft_cap: float,
    alibi_slopes: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Check what both attention operators take.

    Returns:
        The cache's blocks, block size, key heads and head size, and the query's stride.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    blocks, block_size, kv_heads, head_size = check_cache(name, kv_cache)
    stride = check_rows(name, "query", query, kv_cache)
    tokens, heads, _ = query.shape
    if not heads or heads % kv_heads:
        raise ValueError(f"{name}: {heads} query heads are not a multiple of {kv_heads} key heads")
    if (
        out.dtype not in DTYPES
        or out.dim() != 3
        or out.shape[1:] != query.shape[1:]
        or not tokens <= out.shape[0] < (1 << 31) / (heads * head_size)
        or not out.is_contiguous()
        or out.device != kv_cache.device
        or out.data_ptr() % 16
    ):
        raise ValueError(
            f"{name}: out is {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} on "
            f"{out.device}; torch.float32 or torch.float16 of at least {tuple(query.shape)} and "
            f"less than 2**31 elements on {kv_cache.device}, contiguous and 16-byte aligned, is "
            f"supported"
        )
    sequences = seq_lens.numel()
    check_integers(name, "seq_lens", seq_lens, sequences, 1, kv_cache)
    check_integers(name, "block_table", block_table, sequences, 2, kv_cache)
    if not 0 <= window < 1 << 31 or soft_cap < 0:
        raise ValueError(
            f"{name}: window is {window}, soft_cap {soft_cap}; 0 (none) and above are supported"
        )
    if alibi_slopes is not None and (
        alibi_slopes.dtype != torch.float32
        or alibi_slopes.shape != (heads,)
        or alibi_slopes.device != query.device
        or not alibi_slopes.is_contiguous()
    ):
        raise ValueError(
            f"{name}: alibi_slopes is {alibi_slopes.dtype} of shape {tuple(alibi_slopes.shape)} on "
            f"{alibi_slopes.device}; torch.float32 of ({heads},) on {query.device}, contiguous, is "
            f"supported"
        )
    return blocks, block_size, kv_heads, head_size, stride


def check_paged(name: str, query: Tensor, seq_lens: Tensor) -> None:
    """Check that there is one query a sequence."""
    if query.shape[0] != seq_lens.shape[0]:
        raise ValueError(
            f"{name}: query has {query.shape[0]} tokens for {seq_lens.shape[0]} sequences; one for "
            f"each is supported"
        )


def check_reshape(
    name: str, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> list[int]:
    """Check what goes into the cache; returns the strides of key and value.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    kv_heads = check_cache(name, kv_cache)[2]
    strides = [
        check_rows(name, "key", key, kv_cache),
        check_rows(name, "value", value, kv_cache),
    ]
    if key.shape != value.shape or key.shape[1] != kv_heads or key.dtype != value.dtype:
        raise ValueError(
            f"{name}: key is {key.dtype} of shape {tuple(key.shape)}, value {value.dtype} of "
            f"{tuple(value.shape)}; the cache has {kv_heads} heads"
        )
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1:
        raise ValueError(
            f"{name}: slot_mapping is {slot_mapping.dtype} of {slot_mapping.dim()} dimensions; "
            f"torch.int64 of 1 is supported"
        )
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"{name}: slot_mapping has {slot_mapping.shape[0]} slots for {key.shape[0]} tokens"
        )
    if not slot_mapping.is_contiguous() or slot_mapping.device != kv_cache.device:
        raise ValueError(
            f"{name}: slot_mapping must be contiguous and on {kv_cache.device}; it has strides "
            f"{slot_mapping.stride()} and is on {slot_mapping.device}"
        )
    return strides


def reshape_and_cache(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the keys and values of new tokens into the paged cache.

    Args:
        key, value: [tokens, kv_heads, head_size], FP32 or FP16; tokens may be apart.
        kv_cache: [2, blocks, block_size, kv_heads, head_size], FP32 or FP16, written in place.
        slot_mapping: [<= tokens] int64: slot ``block * block_size + offset`` of each token. A
            token of another slot, such as the -1 of padding, is skipped.

    Raises:
        ValueError: what no kernel takes, naming the argument, its value and what is supported.
    """
    check_reshape("reshape_and_cache", key, value, kv_cache, slot_mapping)
    tokens = slot_mapping.shape[0]
    cache = kv_cache.view(2, -1, *kv_cache.shape[3:])
    kept = (slot_mapping >= 0) & (slot_mapping < cache.shape[1])
    slots = slot_mapping[kept]
    cache[0, slots] = key[:tokens][kept].to(kv_cache.dtype)
    cache[1, slots] = value[:tokens][kept].to(kv_cache.dtype)


def check_rotary_and_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin_cache: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
) -> list[int]:
    """Check what `rotary_and_cache` takes; returns the strides of query, key and value.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    name = "rotary_and_cache"
    strides = check_reshape(name, key, value, kv_cache, slot_mapping)
    strides.insert(0, check_rows(name, "query", query, kv_cache))
    check_rotation(name, positions, kv_cache.shape[4], cos_sin_cache)
    if query.dtype != key.dtype or positions.device != kv_cache.device:
        raise ValueError(
            f"{name}: query is {query.dtype}, key {key.dtype}; positions are on "
            f"{positions.device}, kv_cache on {kv_cache.device}: each pair must be the same"
        )
    if not positions.shape[0] == query.shape[0] == key.shape[0]:
        raise ValueError(
            f"{name}: {positions.shape[0]} positions, {query.shape[0]} queries and {key.shape[0]} "
            f"keys; one of each for a token is supported"
        )
    return strides


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
    """`rotary_embedding` of query and key, and `reshape_and_cache` of the rotated key and value.

    Args:
        positions: [tokens] int64.
        query: [tokens, heads, head_size], FP32 or FP16, rotated in place; tokens may be apart.
        key, value: [tokens, kv_heads, head_size], likewise. What key holds afterwards is left open.
        cos_sin_cache, is_neox: as in `rotary_embedding`.
        kv_cache: as in `reshape_and_cache`, written in place.
        slot_mapping: [<= tokens] int64, as in `reshape_and_cache`. Tokens that have none pad the
            batch, and stay as they are.

    Raises:
        ValueError: what no kernel takes, naming the argument, its value and what is supported.
    """
    check_rotary_and_cache(positions, query, key, value, cos_sin_cache, kv_cache, slot_mapping)
    tokens = slot_mapping.shape[0]
    rotated = query[:tokens].flatten(1), key[:tokens].flatten(1)
    rotary_embedding(positions[:tokens], *rotated, kv_cache.shape[4], cos_sin_cache, is_neox)
    reshape_and_cache(key, value, kv_cache, slot_mapping)


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
    """Attention of the last token of each sequence over its sequence: decode.

    Args:
        query: [sequences, heads, head_size]; the others as in `varlen_attention`.
        max_seq_len: an upper bound of ``seq_lens`` known to the host. It decides how the work is
            shared out, not what is computed.

    A sequence of length 0, which pads a batch, gets zeros.

    Raises:
        ValueError: what no kernel takes, naming the argument, its value and what is supported.
    """
    name = "paged_attention"
    check_attention(
        name, query, kv_cache, out, seq_lens, block_table, window, soft_cap, alibi_slopes
    )
    check_paged(name, query, seq_lens)
    starts = range(query.shape[0] + 1)
    _attention(
        query, kv_cache, out, starts, seq_lens, block_table, scale, window, soft_cap, alibi_slopes
    )


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
    """Causal attention of new tokens over their sequences, straight from the paged cache.

    Sequence ``i`` has ``seq_lens[i]`` tokens in the cache; its last ones are the queries
    ``query_start_loc[i] .. query_start_loc[i + 1]``.

    Args:
        query: [tokens, heads, head_size], FP32 or FP16; tokens may be apart.
        kv_cache: [2, blocks, block_size, kv_heads, head_size], FP32 or FP16; block_size is a power
            of two, heads a multiple of kv_heads, head_size a multiple of 8 up to 256.
        out: [>= tokens, heads, head_size], FP32 or FP16, written in place. Rows of no sequence
            stay as they are.
        query_start_loc: [sequences + 1] int32, seq_lens: [sequences] int32.
        block_table: [sequences, blocks a sequence] int32.
        max_query_len: an upper bound of the queries of a sequence, known to the host. What is
            beyond it may stay undone.
        scale: multiplies the scores. window: a query sees this many last keys, itself included;
            0 is all. soft_cap: ``cap * tanh(scores / cap)``; 0 is none.
        alibi_slopes: [heads] FP32 or None (arXiv:2108.12409).

    Raises:
        ValueError: what no kernel takes, naming the argument, its value and what is supported.
    """
    name = "varlen_attention"
    check_attention(
        name, query, kv_cache, out, seq_lens, block_table, window, soft_cap, alibi_slopes
    )
    check_integers(name, "query_start_loc", query_start_loc, len(seq_lens) + 1, 1, kv_cache)
    starts = query_start_loc.tolist()
    _attention(
        query, kv_cache, out, starts, seq_lens, block_table, scale, window, soft_cap, alibi_slopes
    )


def _attention(
    query: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    starts: "list[int] | range",
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    alibi_slopes: Tensor | None,
) -> None:
    """`varlen_attention` of what is checked, with ``starts`` on the host."""
    heads, kv_heads, block_size = query.shape[1], kv_cache.shape[3], kv_cache.shape[2]
    for sequence, length in enumerate(seq_lens.tolist()):
        start, end = starts[sequence], starts[sequence + 1]
        queries = end - start
        if not queries or not length:
            out[start:end] = 0
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
