"""Attention and its cache against an independent formulation in FP64."""

import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_k80.ops import attention_kernels, attention_reference, driver

vllm_k80 = torch.ops.vllm_k80


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def attention(query, keys, values, scale, window=0, soft_cap=0.0, slopes=None):
    """One sequence, one head at a time, one query at a time, in FP64."""
    queries, heads, size = query.shape
    length, kv_heads, _ = keys.shape
    out = torch.empty(queries, heads, size, dtype=torch.float64)
    for head in range(heads):
        key, value = (t[:, head * kv_heads // heads].double() for t in (keys, values))
        for index in range(queries):
            position = length - queries + index
            first = max(0, position - window + 1) if window else 0
            scores = []
            for other in range(first, position + 1):
                score = float(query[index, head].double() @ key[other]) * scale
                if soft_cap:
                    score = soft_cap * math.tanh(score / soft_cap)
                if slopes is not None:
                    score -= slopes[head] * (position - other)
                scores.append(score)
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            out[index, head] = weights @ value[first : position + 1]
    return out


BLOCK_SIZE = 4
TABLES = torch.tensor([[5, 2, 0, 0], [7, 1, 9, 4], [3, 8, 6, 0], [10, 0, 0, 0]], dtype=torch.int32)


def filled(lengths: list[int], kv_heads: int, size: int, dtype: torch.dtype) -> Any:
    """A cache with sequences in scattered blocks, and their keys and values."""
    cache = torch.full((2, 12, BLOCK_SIZE, kv_heads, size), 99.0, dtype=dtype)
    keys = [random(n, kv_heads, size, seed=n).to(dtype) for n in lengths]
    values = [random(n, kv_heads, size, seed=n + 1).to(dtype) for n in lengths]
    for row, key, value in zip(TABLES, keys, values, strict=True):
        slots = [int(row[i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE for i in range(len(key))]
        slot_mapping = torch.tensor(slots, dtype=torch.int64)
        vllm_k80.reshape_and_cache(key.float(), value.float(), cache, slot_mapping)
    return cache, keys, values


OPTIONS = [
    (4, 4, 64, {}),
    (9, 3, 64, {}),
    (8, 1, 80, {"window": 5}),
    (4, 2, 128, {"soft_cap": 5.0}),
    (2, 2, 32, {"slopes": [0.5, 0.25]}),
]


def positional(options: dict[str, Any]) -> tuple[Any, ...]:
    """Window, soft cap and slopes as the operators take them."""
    slopes = options.get("slopes")
    return (
        options.get("window", 0),
        options.get("soft_cap", 0.0),
        None if slopes is None else torch.tensor(slopes),
    )


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "options"), OPTIONS)
def test_varlen_attention_over_the_paged_cache(heads, kv_heads, size, options, cache_dtype) -> None:
    """A prefill, a chunk, a decode and an idle sequence in one batch."""
    lengths, queries = [7, 13, 9, 3], [7, 5, 1, 0]
    starts = torch.tensor([0, 7, 12, 13, 13], dtype=torch.int32)
    cache, keys, values = filled(lengths, kv_heads, size, cache_dtype)
    query = random(13, heads, size, seed=99)
    out = torch.full((14, heads, size), -1.0)  # one padded row, which must stay as it is
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    vllm_k80.varlen_attention(
        query, cache, out, starts, seq_lens, TABLES, 7, size**-0.5, *positional(options)
    )
    for index, count in enumerate(queries):
        part = slice(int(starts[index]), int(starts[index]) + count)
        expected = attention(query[part], keys[index], values[index], size**-0.5, **options)
        torch.testing.assert_close(out[part], expected.float(), atol=2e-6, rtol=1e-5)
    assert (out[13] == -1.0).all()


@pytest.mark.parametrize(("heads", "kv_heads", "size", "options"), OPTIONS)
def test_paged_attention_is_decode_and_pads_with_zeros(heads, kv_heads, size, options) -> None:
    lengths = [7, 13, 0, 1]
    cache, keys, values = filled(lengths, kv_heads, size, torch.float16)
    both = random(4, 2, heads, size, seed=99)  # the operator takes a view of something wider
    query, out = both[:, 0], torch.full((4, heads, size), -1.0)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    vllm_k80.paged_attention(
        query, cache, out, seq_lens, TABLES, 16, size**-0.5, *positional(options)
    )
    for index, length in enumerate(lengths):
        expected = torch.zeros(1, heads, size)
        if length:
            part = query[index : index + 1]
            expected = attention(part, keys[index], values[index], size**-0.5, **options)
        torch.testing.assert_close(out[index], expected[0].float(), atol=2e-6, rtol=1e-5)


def test_slots_outside_of_the_cache_are_skipped() -> None:
    cache = torch.zeros(2, 4, 4, 1, 8)
    slots = torch.tensor([6, -1, 16])
    vllm_k80.reshape_and_cache(torch.ones(3, 1, 8), 2 * torch.ones(3, 1, 8), cache, slots)
    assert cache[0, 1, 2].eq(1).all()
    assert cache[1, 1, 2].eq(2).all()
    cache[:, 1, 2] = 0
    assert not cache.any()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_keys_are_rotated_on_their_way_into_the_cache(
    cache_dtype: torch.dtype, is_neox: bool
) -> None:
    """What the two operators do one after the other, of the tokens that have a slot."""
    heads, kv_heads, size, rotary = 4, 2, 16, 8
    positions, slots = torch.tensor([0, 7, 3, 9]), torch.tensor([6, -1, 2])
    cos_sin = random(10, rotary, seed=1)
    qkv = random(4, (heads + 2 * kv_heads) * size)
    before, sizes = qkv.clone(), [heads * size, kv_heads * size, kv_heads * size]
    query, key, value = (x.unflatten(1, (-1, size)) for x in qkv.split(sizes, dim=1))
    cache = torch.zeros(2, 2, 4, kv_heads, size, dtype=cache_dtype)
    vllm_k80.rotary_and_cache(positions, query, key, value, cos_sin, is_neox, cache, slots)

    old_query, old_key, old_value = before.split(sizes, dim=1)
    assert torch.equal(query[3].flatten(), old_query[3])  # it pads the batch
    rotated = old_query[:3].clone(), old_key[:3].clone()
    vllm_k80.rotary_embedding(positions[:3], *rotated, size, cos_sin, is_neox)
    assert torch.equal(query[:3].flatten(1), rotated[0])
    assert torch.equal(value.flatten(1), old_value)
    expected = torch.zeros(2, 8, kv_heads * size, dtype=cache_dtype)
    expected[0, [6, 2]] = rotated[1][[0, 2]].to(cache_dtype)
    expected[1, [6, 2]] = old_value[[0, 2]].to(cache_dtype)
    assert torch.equal(cache.view(2, 8, -1), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": torch.zeros(2)}, "positions must be contiguous torch.int64"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "3 positions, 2 queries and 2 keys"),
        ({"query": torch.ones(2, 4, 16).half()}, "query is torch.float16, key torch.float32"),
        ({"query": torch.ones(2, 4, 8)}, r"query has shape \(2, 4, 8\); .* 16\] fits"),
        ({"value": torch.ones(2, 1, 16)}, "key is .* value .*"),
        ({"cos_sin": torch.ones(4, 24)}, "has 24 columns; an even number up to .* 16"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "3 slots for 2 tokens"),
    ],
)
def test_what_cannot_be_rotated_into_the_cache_is_named(
    changed: dict[str, Any], message: str
) -> None:
    arguments = {
        "positions": torch.zeros(2, dtype=torch.int64),
        "query": torch.ones(2, 4, 16),
        "key": torch.ones(2, 2, 16),
        "value": torch.ones(2, 2, 16),
        "cos_sin": torch.ones(4, 16),
        "is_neox": True,
        "cache": torch.ones(2, 3, 4, 2, 16),
        "slots": torch.zeros(2, dtype=torch.int64),
    } | changed
    with pytest.raises(ValueError, match=f"rotary_and_cache: .*{message}"):
        vllm_k80.rotary_and_cache(*arguments.values())


class Kernel:
    """A kernel that only keeps what it is launched with."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)


def test_layers_of_one_step_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are alike; what lies at an odd address is checked always."""
    checks, launches = [], []
    check = attention_reference.check_attention
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel(launches))
    monkeypatch.setattr(
        attention_reference, "check_attention", lambda *a: checks.append(1) or check(*a)
    )

    def decode(lengths: Any, table: Any, query: Any, window: int = 0) -> tuple[Any, ...]:
        cache, out = torch.ones(2, 3, 4, 2, 64), torch.empty(2, 4, 64)
        attention_kernels.paged_attention(query, cache, out, lengths, table, 99, 0.5, window)
        assert launches[-1][2:5] == (query.data_ptr(), cache.data_ptr(), out.data_ptr())
        return launches[-1]

    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    query = torch.ones(2, 4, 64)
    first = decode(lengths, table, query)
    again = decode(lengths, table, query.clone())
    assert len(checks) == 1
    assert first[:2] == again[:2]
    assert first[6:] == again[6:]
    windowed = decode(lengths, table, query, window=5)
    assert len(checks) == 2
    assert windowed != first
    decode(lengths, table, query)
    assert len(checks) == 2
    decode(lengths.clone(), table, query)  # another step
    decode(lengths, table, query)
    assert len(checks) == 4
    with pytest.raises(ValueError, match="query begins at"):
        decode(lengths, table, torch.ones(2 * 4 * 64 + 1)[1:].view(2, 4, 64))


def test_a_step_rotates_with_its_own_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arguments in their order, also where they were found before."""
    launches: list[Any] = []
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel(launches))
    cos_sin, cache = torch.ones(16, 8), torch.zeros(2, 3, 4, 2, 16)
    for _ in range(2):
        positions, slots = torch.tensor([3, 4]), torch.tensor([5, 6])
        for _ in range(2):
            query, both = torch.ones(2, 4, 16), torch.ones(2, 2, 2, 16)
            key, value = both[:, 0], both[:, 1]
            attention_kernels.rotary_and_cache(
                positions, query, key, value, cos_sin, True, cache, slots
            )
            tensors_of = positions, query, key, value, cos_sin, cache, slots
            sizes = 4, 2, 16, 8, 64, 64, 64, 16, 12, True
            addresses = (x.data_ptr() for x in tensors_of)
            assert launches[-1] == ((2, 1), 256, *addresses, *sizes)


def test_a_decode_step_launches_the_same_for_layers_that_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing for one that is not: it is left to the operators."""
    launches: list[Any] = []
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "kernel", lambda name, signature, device: Kernel(launches))
    positions, slots = torch.tensor([3, 4]), torch.tensor([5, 6])
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    cos_sin, options = torch.ones(16, 64), (99, 0.5, 0, 0.0, None)

    def layer() -> tuple[Any, Any]:
        return torch.ones(2, 512).split([256, 128, 128], -1), torch.zeros(2, 3, 4, 2, 64)

    def operators(rows: Any, cache: Any) -> tuple[Any, Any]:
        out = torch.empty(2, 4, 64)
        rotated = rows[0].view(2, 4, 64), rows[1].view(2, 2, 64), rows[2].view(2, 2, 64)
        attention_kernels.rotary_and_cache(positions, *rotated, cos_sin, True, cache, slots)
        attention_kernels.paged_attention(rotated[0], cache, out, lengths, table, *options)
        shared = positions, cos_sin, True, cache, slots, out, lengths, table
        return attention_kernels.decode_step(rows, rotated, *shared, *options), launches[-2:]

    step, _ = operators(*layer())
    rows, cache = layer()
    _, expected = operators(rows, cache)
    again = step(*rows, positions, cache)
    assert launches[-2] == expected[0]
    # The results are elsewhere, and so is the buffer of the splits.
    assert launches[-1][:4] == expected[1][:4]
    assert launches[-1][4] == again.data_ptr()
    assert launches[-1][6:] == expected[1][6:]
    assert again.shape == (2, 256)

    count = len(launches)
    assert step(*rows, positions.clone(), cache) is None
    assert step(rows[0].contiguous(), *rows[1:], positions, cache) is None
    assert step(rows[0][:1], rows[1][:1], rows[2][:1], positions, cache) is None
    assert step(rows[0].half(), *rows[1:], positions, cache) is None
    odd = torch.ones(2 * 512 + 1)[1:].view(2, 512).split([256, 128, 128], -1)
    assert step(*odd, positions, cache) is None
    assert len(launches) == count


def test_a_block_of_decode_is_one_of_about_as_many_as_fill_a_die() -> None:
    assert attention_kernels.splits(8, 2048) == 8
    assert attention_kernels.splits(64, 2048) == 1
    assert attention_kernels.splits(64, 32768) == 4  # one long sequence among short ones
    assert attention_kernels.splits(1, 40) == 2  # a split has 32 keys at least
    assert attention_kernels.splits(1, 0) == 1


def test_a_batch_is_split_only_if_each_of_its_blocks_has_a_counter() -> None:
    source = (Path(__file__).parent.parent / "csrc" / "attention.cu").read_text()
    counters = int(re.findall(r"kCounters = (\d+);", source)[0])
    assert attention_kernels.splits(counters, 32768) == 4
    assert attention_kernels.splits(counters + 1, 32768) == 1


def tensors(dtype: torch.dtype, **changed: Any) -> dict[str, Any]:
    """Arguments of `paged_attention` that fit, but for what is ``changed``."""
    return {
        "query": torch.ones(2, 4, 64, dtype=dtype),
        "kv_cache": torch.ones(2, 3, 4, 2, 64),
        "out": torch.empty(2, 4, 64),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "max_seq_len": 1,
        "scale": 1.0,
        "window": 0,
        "soft_cap": 0.0,
        "alibi_slopes": None,
    } | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.ones(2, 3, 64)}, "3 query heads are not a multiple of 2 key heads"),
        ({"query": torch.ones(2, 4, 32)}, r"query has shape \(2, 4, 32\); .* 64\] fits"),
        ({"query": torch.ones(1, 4, 64)}, "query has 1 tokens for 2 sequences"),
        ({"query": torch.ones(2, 4, 64).double()}, "query is torch.float64; torch.float32 and"),
        ({"query": torch.ones(4, 2, 64).transpose(0, 1)}, "query has strides .* contiguous"),
        ({"query": torch.ones(2, 258)[:, 1:257].view(2, 4, 64)}, "query begins at .* of 4 elem"),
        ({"kv_cache": torch.ones(2, 3, 4, 64)}, "kv_cache has shape .* is supported"),
        ({"kv_cache": torch.ones(2, 3, 4, 2, 64).bfloat16()}, "kv_cache is torch.bfloat16"),
        ({"kv_cache": torch.ones(2, 3, 4, 2, 60)}, "head size is 60; multiples of 8 up to 256"),
        ({"kv_cache": torch.ones(2, 3, 4, 2, 264)}, "head size is 264; multiples of 8 up to 256"),
        ({"kv_cache": torch.ones(2, 3, 12, 2, 64)}, "blocks of 12 tokens; powers of two"),
        ({"kv_cache": torch.ones(2, 3, 4, 2, 128)[..., :64]}, "kv_cache must be contiguous"),
        ({"kv_cache": torch.ones(2, 0, 4, 2, 64)}, "kv_cache is empty"),
        ({"out": torch.ones(1, 4, 64)}, r"out is .* shape \(1, 4, 64\).* at least \(2, 4, 64\)"),
        ({"out": torch.ones(2, 4, 64).bfloat16()}, "out is torch.bfloat16"),
        ({"seq_lens": torch.ones(2)}, "seq_lens is torch.float32 .* torch.int32 of 2 on"),
        (
            {"block_table": torch.zeros(3, 1).int()},
            r"block_table is .* \(3, 1\) .* of 2 contiguous rows",
        ),
        ({"block_table": torch.zeros(1, 2).int().t()}, None),
        ({"block_table": torch.zeros(2, 2).int().t()}, r"block_table is .* strides \(1, 2\)"),
        ({"window": -1}, "window is -1"),
        ({"soft_cap": -2.0}, "soft_cap -2.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes is torch.float32 of shape \(3,\)"),
        ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes is torch.float16"),
    ],
)
def test_what_attention_cannot_take_is_named(changed: dict[str, Any], message: str | None) -> None:
    arguments = tensors(torch.float32, **changed).values()
    if message is None:
        vllm_k80.paged_attention(*arguments)
        return
    with pytest.raises(ValueError, match=f"paged_attention: .*{message}"):
        vllm_k80.paged_attention(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": torch.ones(2, 1, 16)}, "key is .* value .*"),
        ({"key": torch.ones(2, 3, 16), "value": torch.ones(2, 3, 16)}, "the cache has 2 heads"),
        ({"value": torch.ones(2, 2, 16).half()}, "value torch.float16"),
        ({"slots": torch.zeros(2).int()}, "slot_mapping is torch.int32 .* torch.int64"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "3 slots for 2 tokens"),
    ],
)
def test_what_the_cache_cannot_take_is_named(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "key": torch.ones(2, 2, 16),
        "value": torch.ones(2, 2, 16),
        "cache": torch.ones(2, 3, 4, 2, 16),
        "slots": torch.zeros(2, dtype=torch.int64),
    } | changed
    with pytest.raises(ValueError, match=f"reshape_and_cache: .*{message}"):
        vllm_k80.reshape_and_cache(*arguments.values())


def test_the_starts_of_varlen_attention_fit_the_sequences() -> None:
    arguments = tensors(torch.float16)
    starts = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"query_start_loc is .* \(2,\) .* of 3 on"):
        vllm_k80.varlen_attention(
            *(arguments[name] for name in ("query", "kv_cache", "out")),
            starts,
            *(arguments[name] for name in ("seq_lens", "block_table", "max_seq_len", "scale")),
        )


def test_what_is_too_large_for_32_bits_is_refused() -> None:
    query = torch.empty(1, device="meta").expand(1 << 20, 32, 64)
    cache = torch.empty(2, 1, 4, 32, 64, device="meta")
    wide = torch.empty_strided(query.shape, (2048, 64, 1), device="meta")
    with pytest.raises(ValueError, match=r"less than 2\*\*31 elements"):
        attention_reference.check_rows("paged_attention", "query", wide, cache)


def test_the_fat_binary_holds_every_kernel_that_is_launched() -> None:
    if not driver.available() or shutil.which("cuobjdump") is None:
        pytest.skip("no fat binary or no cuobjdump here: csrc/build.sh vllm_k80/kernels")
    command = ["cuobjdump", "-res-usage", str(driver.FAT_BINARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = {
        f"{name}_{kind}"
        for name in ("reshape_and_cache", "rotary_and_cache")
        for kind in ("f16", "f32")
    }
    for kind, size in itertools.product(("f16", "f32"), (64, 128, 256)):
        names |= {f"varlen_attention_{kind}_d{size}"}
        names |= {
            f"paged_attention_{kind}_d{size}_h{attention_kernels.tile_of_heads(group)}"
            for group in range(1, 9)
        }
    assert names <= set(re.findall(r"Function (\w+):", done.stdout + done.stderr))
