"""Rotary embedding and activations on a GPU, and the host's time of each operator's call.

See kernels_on_gpu.py.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from measure import error, graph_microseconds, host_microseconds

from vllm_k80.ops import reference

SEEDS = 500  # random cases of each operator
TOKENS = (0, 1, 1, 2, 7, 8, 33, 513)
COLUMNS = (1, 2, 31, 32, 255, 256, 257, 576, 1000, 4864, 11008, 13824)
FLOATS = (torch.float32, torch.float16)
VALUES = {"normal": 1.0, "wide": 8.0, "large": 1e4, "small": 1e-6}
HEADS = ((1, 0), (1, 1), (9, 3), (32, 8), (32, 32), (71, 1))  # of query and key; no key
SIZES = (64, 80, 96, 112, 120, 128, 192, 256)
CACHED = 4096  # positions
# Allowed error against FP64, as a multiple of that of torch in FP32, or, where that is more,
# relative to the largest value: a few roundings of the result.
FACTOR = 2.0
FLOOR = {torch.float32: 2.0**-22, torch.float16: 2.0**-10}

vllm_k80 = torch.ops.vllm_k80


def _silu(v: torch.Tensor) -> torch.Tensor:
    return v * torch.sigmoid(v)


def _gelu(v: torch.Tensor) -> torch.Tensor:
    return v / 2 * (1 + torch.erf(v / 2**0.5))


def _gelu_tanh(v: torch.Tensor) -> torch.Tensor:
    return v / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))


def _gelu_quick(v: torch.Tensor) -> torch.Tensor:
    return v * torch.sigmoid(1.702 * v)


# Name, further arguments, definition.
ACTIVATIONS: tuple[tuple[str, tuple[str, ...], Callable[[torch.Tensor], torch.Tensor]], ...] = (
    ("silu_and_mul", (), _silu),
    ("gelu_and_mul", ("none",), _gelu),
    ("gelu_and_mul", ("tanh",), _gelu_tanh),
    ("gelu_new", (), _gelu_tanh),
    ("gelu_fast", (), _gelu_tanh),
    ("gelu_quick", (), _gelu_quick),
)


def _cache(rotary: int, dtype: torch.dtype) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2, device="cuda") / rotary)
    angles = torch.arange(CACHED, device="cuda").unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotary_case(index: int) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    """What it is, and query, key and value as parts of one tensor, positions, cache."""
    draw = random.Random(index)
    heads, key_heads = draw.choice(HEADS)
    size = draw.choice(SIZES)
    about = {
        "tokens": draw.choice(TOKENS),
        "heads": heads,
        "key_heads": key_heads,
        "size": size,
        "rotary": draw.choice((size, size, size // 2, size // 4)),
        "dtype": draw.choice(FLOATS),
        "is_neox": draw.random() < 0.5,
    }
    generator = torch.Generator("cuda").manual_seed(index)
    parts = heads * size, key_heads * size, key_heads * size
    qkv = torch.randn(about["tokens"], sum(parts), generator=generator, device="cuda")
    positions = torch.randint(
        0, CACHED, (about["tokens"],), generator=generator, device="cuda", dtype=torch.int64
    )
    if index % 8 == 0 and about["tokens"]:
        positions[-1] = draw.choice((-1, CACHED, 1 << 40))  # in no cache
    split = qkv.to(about["dtype"]).split(parts, dim=1)
    return about, (*split, positions, _cache(about["rotary"], about["dtype"]))


def rotated(x: torch.Tensor, about: dict[str, Any], positions: Any, cache: Any) -> torch.Tensor:
    """In FP64, by the definition."""
    rotary = about["rotary"]
    known = (positions >= 0) & (positions < CACHED)
    rows = cache[positions * known].double()
    rows[~known] = float("nan")
    cos, sin = rows[:, : rotary // 2].unsqueeze(1), rows[:, rotary // 2 :].unsqueeze(1)
    out = x.double().view(x.shape[0], x.shape[1] // about["size"], about["size"]).clone()
    half = rotary // 2
    first = slice(0, half) if about["is_neox"] else slice(0, rotary, 2)
    second = slice(half, rotary) if about["is_neox"] else slice(1, rotary, 2)
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out.view(x.shape)


def compare() -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Every operator; returns how many comparisons there were, and those that are off."""
    off: list[dict[str, Any]] = []
    count = 0

    def check(name: str, about: dict[str, Any], result: Any, plain: Any, exact: Any) -> None:
        nonlocal count
        count += 1
        missing = exact.isnan()
        ours, theirs = (
            error(y.masked_fill(missing, 0), exact.nan_to_num(0)) for y in (result, plain)
        )
        same = result.shape == exact.shape and torch.equal(result.isnan(), missing)
        if not same or not ours <= max(FACTOR * theirs, FLOOR[result.dtype]):
            about = {key: str(value) for key, value in about.items()}
            off.append({"operator": name, **about, "error": ours, "error_of_torch": theirs})

    for index in range(SEEDS):
        draw = random.Random(index)
        dtype = draw.choice(FLOATS)
        values = draw.choice([*VALUES]) if dtype is torch.float32 else "normal"
        about = {"tokens": draw.choice(TOKENS), "columns": draw.choice(COLUMNS), "dtype": dtype}
        generator = torch.Generator("cuda").manual_seed(index)
        both = torch.randn(
            about["tokens"], 2 * about["columns"], generator=generator, device="cuda"
        )
        both = both.mul_(VALUES[values]).to(dtype)
        for name, more, function in ACTIVATIONS:
            gated = name.endswith("_and_mul")
            x = both if gated else both[:, : about["columns"]].contiguous()
            gate, up = both.double().chunk(2, dim=-1)
            exact = function(gate) * (up if gated else 1)
            result = getattr(vllm_k80, name)(x, *more)
            plain = getattr(reference, name)(x, *more)
            check(name, about | {"values": values, "more": more}, result, plain, exact)

        about, (query, key, value, positions, cache) = rotary_case(index)
        exact = [rotated(x, about, positions, cache) for x in (query, key)]
        plain = query.clone(), key.clone()
        kept = value.clone()
        size, is_neox = about["size"], about["is_neox"]
        reference.rotary_embedding(positions, *plain, size, cache, is_neox)
        no_key = about["key_heads"] == 0 and index % 2
        vllm_k80.rotary_embedding(positions, query, None if no_key else key, size, cache, is_neox)
        for part, x, y, z in zip("qk", (query, key), plain, exact, strict=True):
            check("rotary_embedding", about | {"part": part}, x, y, z)
        if not torch.equal(value, kept):
            off.append({"operator": "rotary_embedding", "part": "v", "index": index})
    return {"comparisons": count}, off


def _host() -> dict[str, float]:
    """The host's time of a call of each operator that decode calls, in microseconds.

    The least of nine medians: other work on a shared host only adds.
    """
    x, wide = torch.randn(1, 4096, device="cuda"), torch.randn(1, 22016, device="cuda")
    qkv = torch.randn(1, 6144, device="cuda")
    query, key, _ = qkv.split((4096, 1024, 1024), dim=1)
    positions, cache = torch.zeros(1, dtype=torch.int64, device="cuda"), _cache(128, torch.float32)
    weight = torch.ones(4096, device="cuda")
    q4 = torch.zeros(4096, 2048, dtype=torch.uint8, device="cuda")
    q8 = torch.zeros(4096, 4096, dtype=torch.int8, device="cuda")
    half = torch.zeros(4096, 4096, dtype=torch.float16, device="cuda")
    s4 = torch.ones(4096, 32, dtype=torch.float16, device="cuda")
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-5),
        "fused_add_rms_norm": (x, x, weight, 1e-5),
        "rotary_embedding": (positions, query, key, 128, cache, True),
        "silu_and_mul": (wide,),
        "gelu_and_mul": (wide, "tanh"),
        "gelu_new": (x,),
        "linear_w4": (x, q4, s4, s4),
        "linear_w8": (x, q8, s4),
        "linear": (x, half),
        "gemv_w4": (x, q4, s4, s4),
        "gemv_w8": (x, q8, s4),
        "gemv_f16": (x, half),
    }
    times: dict[str, float] = {}
    for _ in range(9):
        for name, arguments in calls.items():
            if hasattr(vllm_k80, name):
                operator = getattr(vllm_k80, name)
                median = host_microseconds(lambda o=operator, a=arguments: o(*a))
                times[name] = min(times.get(name, median), median)
    return {name: round(time, 2) for name, time in times.items()}


def time_all() -> list[dict[str, Any]]:
    """Against torch, for the shapes of a 7B model, in CUDA graphs; then the host's times."""
    out: list[dict[str, Any]] = []
    for tokens in (1, 8, 512):
        x = torch.randn(tokens, 22016, device="cuda")
        for name, more, function in ACTIVATIONS:
            gated = name.endswith("_and_mul")
            y = x if gated else x[:, :11008].contiguous()

            def plain(y=y, f=function, gated=gated) -> torch.Tensor:
                return f(y[:, :11008]) * y[:, 11008:] if gated else f(y)

            ours = [lambda n=name, y=y, m=more: getattr(vllm_k80, n)(y, *m)] * 20
            line = {"operator": name, "more": more, "tokens": tokens, "columns": 11008}
            line["kernel_us"] = round(graph_microseconds(ours), 2)
            line["torch_us"] = round(graph_microseconds([plain] * 20), 2)
            out.append(line)
        qkv = torch.randn(tokens, 6144, device="cuda")
        query, key, _ = qkv.split((4096, 1024, 1024), dim=1)
        positions = torch.arange(tokens, device="cuda")
        cache = _cache(128, torch.float32)
        arguments = positions, query, key, 128, cache, True
        line = {"operator": "rotary_embedding", "tokens": tokens, "heads": 32, "key_heads": 8}
        line["kernel_us"] = round(
            graph_microseconds([lambda a=arguments: vllm_k80.rotary_embedding(*a)] * 20), 2
        )
        line["torch_us"] = round(
            graph_microseconds([lambda a=arguments: reference.rotary_embedding(*a)] * 20), 2
        )
        out.append(line)
    out.append({"host_us": _host()})
    return out
