"""The attention operators and the cache on a GPU: see kernels_on_gpu.py.

For illegal accesses, in this folder (SEEDS smaller, or it takes hours):

    compute-sanitizer python -c 'import sys; sys.path.insert(0, ".."); import attention_on_gpu as a
    a.SEEDS = 100; print(a.compare())'
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from measure import error, graph_microseconds, host_microseconds
from torch.nn import functional

from vllm_k80.ops import attention_kernels

SEEDS = 1200  # random cases of decode, and as many of prefill
HEAD_SIZES = (64, 80, 96, 112, 120, 128, 192, 256, 8, 40)
GROUPS = (1, 1, 2, 3, 4, 5, 6, 7, 8, 71)  # query heads that share a key head
LENGTHS = (0, 1, 1, 2, 7, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 500, 1000, 2047)
FLOATS = (torch.float32, torch.float16)
# Values are normal; "sharp" makes the scores so large that one key takes nearly all the weight,
# "large" are keys and values near the end of FP16.
VALUES = ("normal", "sharp", "large", "small")
# Allowed error against FP64, as a multiple of that of torch in FP32, or, where that is more, eight
# roundings of what is summed: the weighted values' magnitudes, since values of both signs cancel.
# An error of a score is one of its weight, so a rounding counts as often as the score is large.
FACTOR = 2.0
FLOOR = 2.0**-21
HALF = 2.0**-10  # rounding of an FP16 result, relative to the largest
LONG = (32768, 16)  # one long context, and its head count
L2_BYTES = 256 << 20  # more than any cache: keys and values are read from memory

vllm_k80 = torch.ops.vllm_k80


def case(index: int, prefill: bool) -> dict[str, Any]:
    """A random case."""
    draw = random.Random(2 * index + prefill)
    group = draw.choice(GROUPS)
    kv_heads = 1 if group == 71 else draw.choice((1, 2, 3, 8))
    lengths = [draw.choice(LENGTHS) for _ in range(draw.choice((1, 1, 2, 3, 8)))]
    queries = [1] * len(lengths)
    if prefill:
        whole = draw.random() < 0.5
        queries = [n if whole else draw.randint(0, n) for n in lengths]
    cache, query, out = (draw.choice(FLOATS) for _ in range(3))
    values = draw.choice(VALUES)
    if values == "small" or (values == "large" and torch.float16 not in (cache, query)):
        out = torch.float32  # what FP16 does not hold is no result
    return {
        "prefill": prefill,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_size": draw.choice(HEAD_SIZES),
        "block_size": draw.choice((1, 8, 16, 16, 32, 128)),
        "lengths": lengths,
        "queries": queries,
        "cache": cache,
        "query": query,
        "out": out,
        "window": draw.choice((0, 0, 1, 5, 64, 100)),
        "soft_cap": draw.choice((0.0, 0.0, 5.0, 50.0)),
        "alibi": draw.random() < 0.25,
        "values": values,
        "bound": draw.choice((1, 1, 3)),  # how far the host's bounds exceed the lengths
        "padding": draw.choice((0, 0, 2)),  # sequences of length 0, rows and slots of no token
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def tensors(about: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the operators take, with the cache filled by `reshape_and_cache`."""
    source = generator(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, device="cuda")

    heads, kv_heads, size = about["heads"], about["kv_heads"], about["head_size"]
    padding, block_size = about["padding"], about["block_size"]
    lengths = about["lengths"] + [0] * padding
    pages = [-(-n // block_size) for n in lengths]
    blocks = sum(pages) + 3
    order = torch.randperm(blocks, generator=source, device="cuda").tolist()
    table = torch.zeros(len(lengths), max(*pages, 1) + 1, dtype=torch.int32)
    slots: list[int] = []
    for row, count in enumerate(pages):
        mine = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(mine, dtype=torch.int32)
        slots += [mine[i // block_size] * block_size + i % block_size for i in range(lengths[row])]
    slots += [-1] * padding
    table = table.cuda()
    # Queries, keys and values are views of one tensor, as a fused projection makes it.
    tokens = len(slots)
    key_value = normal(tokens, 2 * kv_heads, size)
    # "large" is near the end of FP16 if that is in use, and far beyond it if not.
    large = 1e4 if torch.float16 in (about["cache"], about["query"]) else 1e9
    factor = {"large": large, "small": 1e-6}.get(about["values"], 1.0)
    key_value = (key_value * factor).clamp(-65000, 65000) if large == 1e4 else key_value * factor
    key_value = key_value.to(about["query"])
    key, value = key_value[:, :kv_heads], key_value[:, kv_heads : 2 * kv_heads]
    # What nobody wrote must not matter.
    kv_cache = torch.full((2, blocks, block_size, kv_heads, size), 123.0, device="cuda").to(
        about["cache"]
    )
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device="cuda")
    vllm_k80.reshape_and_cache(key, value, kv_cache, slot_mapping)
    queries = about["queries"] + [about["prefill"] is False] * padding
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    query = normal(int(starts[-1]) + padding, heads + 1, size)
    query *= {"sharp": 30.0, "large": 1 / large, "small": 1e4}.get(about["values"], 1.0)
    return {
        "key": key,
        "value": value,
        "slots": slot_mapping,
        "cache": kv_cache,
        "query": query.to(about["query"])[:, :heads],
        "starts": starts.cuda(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "table": table,
        "slopes": torch.rand(heads, generator=source, device="cuda") if about["alibi"] else None,
        "scale": size**-0.5,
    }


def plain(
    about: dict[str, Any], given: dict[str, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """The results, computed in ``dtype`` by torch, and what a rounding may do.

    That is the largest sum of the weighted values' magnitudes, times the largest score if that is
    above 1.
    """
    heads, kv_heads, size = about["heads"], about["kv_heads"], about["head_size"]
    starts, rounded = given["starts"].tolist(), 0.0
    out = torch.zeros(given["query"].shape, dtype=dtype, device="cuda")
    rows = given["cache"].view(2, -1, kv_heads, size)
    for sequence, length in enumerate(given["seq_lens"].tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end or not length:
            continue
        positions = torch.arange(length, device="cuda")
        block_size = about["block_size"]
        places = given["table"][sequence].long()[positions // block_size] * block_size
        keys, values = rows[:, places + positions % block_size].to(dtype)
        keys, values = (
            x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (keys, values)
        )
        scores = given["query"][begin:end].to(dtype).transpose(0, 1) @ keys.transpose(1, 2)
        scores = scores * given["scale"]
        largest = scores.abs().max().clamp(min=1.0)
        if about["soft_cap"]:
            scores = about["soft_cap"] * torch.tanh(scores / about["soft_cap"])
        behind = (positions[-(end - begin) :].unsqueeze(1) - positions).to(dtype)
        if given["slopes"] is not None:
            scores = scores - given["slopes"].to(dtype).view(-1, 1, 1) * behind
        hidden = behind < 0
        if about["window"]:
            hidden = hidden | (behind >= about["window"])
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1)
        out[begin:end] = (weights @ values).transpose(0, 1)
        rounded = max(rounded, (largest * (weights @ values.abs()).max()).item())
    return out, rounded


def run(about: dict[str, Any], given: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    """The operator's result, in ``out``: of decode or of prefill."""
    options = (given["scale"], about["window"], about["soft_cap"], given["slopes"])
    common = (given["seq_lens"], given["table"])
    if about["prefill"]:
        bound = about["bound"] * max(about["queries"])
        vllm_k80.varlen_attention(
            given["query"], given["cache"], out, given["starts"], *common, bound, *options
        )
    else:
        tokens = len(given["seq_lens"])
        bound = about["bound"] * max(about["lengths"])
        query = given["query"][:tokens]
        vllm_k80.paged_attention(query, given["cache"], out, *common, bound, *options)
    return out


def bad_data() -> int:
    """Lengths, tables, starts and slots that make no sense must not read or write outside.

    compute-sanitizer sees if they do; here only a fault would show. Returns how many were run.
    """
    count = 0
    for index in range(40):
        for prefill in (False, True):
            about = case(index, prefill)
            given = tensors(about, index)
            source = generator(index)
            for name, low, high in (
                ("seq_lens", -5, 5000),
                ("table", -(2**31), 2**31 - 1),
                ("starts", -100, 1000),
                ("slots", -(2**62), 2**62),
            ):
                wrong = torch.randint(
                    low, high, given[name].shape, generator=source, device="cuda"
                ).to(given[name].dtype)
                out = torch.empty(given["query"].shape, device="cuda").to(about["out"])
                run(about, given | {name: wrong}, out)
                if name == "slots":
                    key, value = given["key"], given["value"]
                    vllm_k80.reshape_and_cache(key, value, given["cache"], wrong)
                count += 1
    torch.cuda.synchronize()
    return count


def replayed() -> tuple[int, list[dict[str, Any]]]:
    """A decode captured as a CUDA graph and replayed on other lengths is as the eager one.

    Captured with the longest context as bound, as vLLM does it. Returns how many were compared
    and those that differ in a bit.
    """
    off = []
    for index in range(20):
        about = case(index, False) | {"lengths": [2000] * 4, "queries": [1] * 4, "padding": 0}
        given = tensors(about, index)
        options = (given["scale"], about["window"], about["soft_cap"], given["slopes"])
        captured = torch.zeros(given["query"].shape, device="cuda").to(about["out"])
        eager = captured.clone()

        def attend(out: torch.Tensor, given=given, options=options) -> None:
            tensors_of = (given["cache"], out, given["seq_lens"], given["table"])
            vllm_k80.paged_attention(given["query"], *tensors_of, 32768, *options)

        attend(captured)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend(captured)
        several = [2000, 0, 77, 1024]  # splits, whose counters each replay must leave at zero
        for lengths in ([1, 2, 3, 4], several, several, [5, 1999, 600, 33]):
            given["seq_lens"].copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            attend(eager)
            if not torch.equal(captured, eager):
                off.append({"operator": "paged_attention in a graph", "case": str(about)})
    return 80, off


def repeated() -> tuple[int, list[dict[str, Any]]]:
    """Decode gives the same bits whichever split is the last to arrive, whatever ran before.

    Batches of all shapes use the same counters of arrivals, so one that is not at zero again
    spoils the next. Returns how many were compared and those that differ in a bit.
    """
    lengths = [[32768], [2047, 64, 0], [4096] * 8, [1, 129, 20000], [512] * 64, [100, 9000] * 4]
    steps = []
    for index, (long, group, size) in enumerate(
        itertools.product(lengths, (1, 4, 7), (64, 128, 256))
    ):
        about = case(index, False) | {"lengths": long, "queries": [1] * len(long), "padding": 0}
        about |= {"kv_heads": 2, "heads": 2 * group, "head_size": size, "values": "normal"}
        given = tensors(about, index)
        first = run(about, given, torch.zeros_like(given["query"], dtype=about["out"]))
        steps.append((about, given, first))
    count, off, draw = 0, [], random.Random(37)
    for _ in range(20):
        draw.shuffle(steps)
        for about, given, first in steps:
            again = run(about, given, torch.full_like(first, -7.0))
            count += 1
            if not torch.equal(again, first):
                off.append({"operator": "paged_attention, repeated", "case": str(about)})
    return count, off


def rotated() -> tuple[int, list[dict[str, Any]]]:
    """Keys rotated on their way into the cache are what two operators leave there, bit by bit."""
    off = []
    for index in range(SEEDS // 2):
        draw, source = random.Random(index), generator(index)
        dtype, cache_dtype = draw.choice(FLOATS), draw.choice(FLOATS)
        kv_heads, group = draw.choice((1, 2, 3, 8, 32)), draw.choice((1, 2, 4, 7))
        size, tokens = draw.choice(HEAD_SIZES), draw.choice((1, 1, 2, 8, 33))
        rotary = size // draw.choice((1, 1, 2, 4)) // 2 * 2
        about = {"dtype": dtype, "cache": cache_dtype, "heads": kv_heads * group, "size": size}
        about |= {"kv_heads": kv_heads, "rotary": rotary, "tokens": tokens, "case": index}
        sizes = [kv_heads * group * size, kv_heads * size, kv_heads * size]
        qkv = torch.randn(tokens, sum(sizes), generator=source, device="cuda").to(dtype)
        cos_sin = torch.randn(64, rotary, generator=source, device="cuda").to(dtype)
        positions = torch.randint(-1, 65, (tokens,), generator=source, device="cuda")
        cache = torch.full((2, 4, 16, kv_heads, size), 123.0, device="cuda").to(cache_dtype)
        slots = torch.randperm(64, generator=source, device="cuda")[:tokens] - draw.choice((0, 1))
        slots = slots[: tokens - draw.choice((0, 0, 1))]  # one token may be padding
        is_neox, done = draw.random() < 0.5, []
        for joined in (False, True):
            both, into = qkv.clone(), cache.clone()
            query, key, value = (x.unflatten(1, (-1, size)) for x in both.split(sizes, dim=1))
            if joined:
                tensors_of = positions, query, key, value, cos_sin, is_neox, into, slots
                vllm_k80.rotary_and_cache(*tensors_of)
            else:
                rows = query[: len(slots)].flatten(1), key[: len(slots)].flatten(1)
                places = positions[: len(slots)]
                vllm_k80.rotary_embedding(places, *rows, size, cos_sin, is_neox)
                vllm_k80.reshape_and_cache(key, value, into, slots)
            done.append([x.nan_to_num(nan=-7.0) for x in (query, value, into)])
        if not all(map(torch.equal, *done)):
            off.append({"operator": "rotary_and_cache", **{k: str(v) for k, v in about.items()}})
    return SEEDS // 2, off


def compare() -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Every operator; returns how many comparisons there were, and those that are off."""
    off: list[dict[str, Any]] = []
    count = beyond = 0
    long, heads = LONG
    extra = [
        case(index, prefill)
        | {"lengths": [long, 5], "queries": [100 if prefill else 1, 1], "heads": heads}
        | {"kv_heads": 2, "window": window, "values": "normal", "padding": 0, "block_size": 16}
        for index in range(6)
        for prefill in (False, True)
        for window in (0, 4096)
    ]
    cases = [case(index, prefill) for index in range(SEEDS) for prefill in (False, True)]
    for index, about in enumerate(cases + extra):
        given = tensors(about, index)
        count += 2
        rows = given["cache"].view(2, -1, *given["cache"].shape[3:])
        kept = given["slots"] >= 0
        expected = torch.full_like(rows, 123.0)
        for part, x in enumerate((given["key"], given["value"])):
            expected[part, given["slots"][kept]] = x[kept].to(rows.dtype)
        printable = {key: str(value) for key, value in about.items()}
        if not torch.equal(rows, expected):
            off.append({"operator": "reshape_and_cache", **printable})
        nowhere = torch.full(given["query"].shape, -7.0, device="cuda").to(about["out"])
        result = run(about, given, nowhere)
        exact, rounded = plain(about, given, torch.float64)
        tokens = int(given["starts"][-1])
        ours = error(result[:tokens], exact[:tokens])
        theirs = error(plain(about, given, torch.float32)[0][:tokens], exact[:tokens])
        half = HALF if about["out"] is torch.float16 else 0.0
        beyond += ours > max(FACTOR * theirs, half)
        allowed = max(FACTOR * theirs, half)
        if tokens:
            relative = rounded / exact[:tokens].abs().max().clamp(min=1e-30).item()
            allowed = max(allowed, FLOOR * relative)
        untouched = bool((result[tokens:] == -7.0).all())
        if not ours <= allowed or not untouched:
            operator = "varlen_attention" if about["prefill"] else "paged_attention"
            about_error = {"error": ours, "error_of_torch": theirs, "untouched": untouched}
            off.append({"operator": operator, **printable, **about_error})
    replays, differing = replayed()
    repetitions, unequal = repeated()
    rotations, other = rotated()
    counts = {"comparisons": count, "beyond_twice_torch": beyond, "replays": replays}
    counts |= {"repetitions": repetitions, "rotated": rotations, "bad_data": bad_data()}
    return counts, off + differing + unequal + other


def timed_case(prefill: bool, sequences: int, length: int, kv_heads: int) -> dict[str, Any]:
    """32 heads of 128, FP16 cache and FP32 activations, as a 7B model has them."""
    return case(0, prefill) | {
        "heads": 32,
        "kv_heads": kv_heads,
        "head_size": 128,
        "block_size": 16,
        "lengths": [length] * sequences,
        "queries": [length if prefill else 1] * sequences,
        "cache": torch.float16,
        "query": torch.float32,
        "out": torch.float32,
        "window": 0,
        "soft_cap": 0.0,
        "alibi": False,
        "values": "normal",
        "bound": 1,
        "padding": 0,
    }


def time_all() -> list[dict[str, Any]]:
    """Times on this GPU against torch's attention on contiguous keys, in CUDA graphs."""
    lines = []
    shapes = [(False, b, 2048, kv) for kv in (8, 32) for b in (1, 8, 16)]
    shapes += [(True, 1, n, kv) for kv in (8, 32) for n in (512, 2048)]
    for prefill, sequences, length, kv_heads in shapes:
        about = timed_case(prefill, sequences, length, kv_heads)
        size = 4 * sequences * length * kv_heads * 128
        copies = max(2, -(-L2_BYTES // size)) if not prefill else 2
        given = [tensors(about, seed) for seed in range(min(copies, 24))]
        line: dict[str, Any] = {
            "operator": "varlen_attention" if prefill else "paged_attention",
            "sequences": sequences,
            "length": length,
            "heads": 32,
            "kv_heads": kv_heads,
            "splits": None if prefill else attention_kernels.splits(sequences * kv_heads, length),
        }
        out = torch.empty_like(given[0]["query"])
        ours = graph_microseconds([lambda g=g, a=about, o=out: run(a, g, o) for g in given])
        line["kernel_us"] = round(ours, 2)
        line["host_us"] = round(
            host_microseconds(lambda g=given[0], a=about, o=out: run(a, g, o)), 2
        )
        for name, dtype in (("torch_fp32_us", torch.float32), ("torch_fp16_us", torch.float16)):
            calls: list[Callable[[], Any]] = []
            for _ in given:
                shape = sequences, 32, length, 128
                query = torch.randn(sequences, 32, length if prefill else 1, 128, device="cuda")
                q, (k, v) = query.to(dtype), torch.randn(2, *shape, device="cuda").to(dtype)
                attend = functional.scaled_dot_product_attention
                calls.append(
                    lambda q=q, k=k, v=v, f=attend, causal=prefill: f(q, k, v, is_causal=causal)
                )
                if 8 * len(calls) * sequences * length * 32 * 128 > 24 << 30:
                    break
            line[name] = round(graph_microseconds(calls), 2)
            del calls
        lines.append(line)
    return lines
