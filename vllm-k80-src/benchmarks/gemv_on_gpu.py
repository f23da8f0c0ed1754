"""The gemv and dequant operators on a GPU: see kernels_on_gpu.py."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import error, graph_microseconds, host_microseconds

from vllm_k80.ops import driver

SEEDS = 1500  # random cases of each operator
ROWS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 257, 1000, 1021, 4096)
COLUMNS = (32, 64, 128, 160, 256, 576, 1024, 1056, 1152, 4096, 4224, 5120, 11008, 13824)
TOKENS = (0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32)
GROUPS = (32, 64, 128)
FLOATS = (torch.float32, torch.float16)
VALUES = {"normal": 1.0, "large": 1e9, "small": 1e-9, "outlier": 1.0}
# Allowed error against FP64, as a multiple of that of FP32 cuBLAS on the dequantized weight, or,
# where that is more, relative to the largest sum of the terms' magnitudes: q * scale and the
# offset apart, since the kernels multiply them with x apart. Where a large x meets a weight of
# zero they cancel, and a product of the dequantized weight has no such term.
FACTOR = 2.0
FLOOR = 2.0**-20  # 16 roundings of it; a lane adds up to 432 products one after another
HALF = 2.0**-10  # rounding of an FP16 result, relative to the largest
NAIVE = Path(__file__).parent / "naive_gemv.fatbin"
L2_BYTES = 256 << 20  # more than any cache: weights are read from memory

vllm_k80 = torch.ops.vllm_k80


def weight_w4(
    rows: int, columns: int, group: int, dtype: torch.dtype, zero: bool, seed: int = 0
) -> tuple[list[torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """[qweight, scale, minimum, zero], the same weight in FP64, its terms' magnitudes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    packed = torch.randint(
        0, 256, (rows, columns // 2), generator=generator, device="cuda", dtype=torch.uint8
    )
    shape = rows, columns // group
    scale = torch.rand(shape, generator=generator, device="cuda").add_(0.1).mul_(0.02).to(dtype)
    if zero:
        offset = torch.randint(0, 17, shape, generator=generator, device="cuda").to(dtype)
    else:
        offset = torch.randn(shape, generator=generator, device="cuda").mul_(0.1).to(dtype)
    q = torch.stack((packed & 15, packed >> 4), dim=-1).view(rows, -1, group).double()
    s, o = scale.double().unsqueeze(-1), offset.double().unsqueeze(-1)
    exact = (q - o) * s if zero else q * s + o
    parts = [packed, scale, None, offset] if zero else [packed, scale, offset, None]
    terms = q * s + (o * s if zero else o).abs()
    return parts, exact.view(rows, columns), terms.view(rows, columns)


def weight_w8(
    rows: int, columns: int, group: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[qweight, scale], the same weight in FP64, its terms' magnitudes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q = torch.randint(
        -128, 128, (rows, columns), generator=generator, device="cuda", dtype=torch.int8
    )
    shape = rows, columns // group
    scale = torch.rand(shape, generator=generator, device="cuda").mul_(1e-3).to(dtype)
    wide, s = q.view(rows, -1, group).double(), scale.double().unsqueeze(-1)
    terms = (wide + 256) * s  # the kernels take bytes as q + 128, and 128 off
    return [q, scale], (wide * s).view(rows, columns), terms.view(rows, columns)


def case(index: int) -> dict[str, Any]:
    """A random case."""
    draw = random.Random(index)
    columns = draw.choice(COLUMNS)
    values = draw.choice([*VALUES])
    dtype = draw.choice(FLOATS)
    return {
        "tokens": draw.choice(TOKENS),
        "rows": draw.choice(ROWS),
        "columns": columns,
        "group": draw.choice([g for g in GROUPS if columns % g == 0]),
        "scale": draw.choice(FLOATS),
        "zero": draw.random() < 0.5,
        "bias": draw.choice([None, *FLOATS]),
        "x": dtype,
        "values": values if dtype is torch.float32 else "normal",
    }


def inputs(case: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and bias."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(case["tokens"], case["columns"], generator=generator, device="cuda")
    x *= VALUES[case["values"]]
    if case["values"] == "outlier":
        x[:, case["columns"] // 3] = 3e4
    bias = None
    if case["bias"] is not None:
        bias = torch.randn(case["rows"], generator=generator, device="cuda").to(case["bias"])
    return x.to(case["x"]), bias


def compare() -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Every operator; returns how many comparisons there were, and those that are off."""
    off: list[dict[str, Any]] = []
    count = beyond = 0

    def check(
        name: str,
        about: dict[str, Any],
        result: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        terms: torch.Tensor | None = None,
    ) -> None:
        nonlocal count, beyond
        count += 1
        exact = x.double() @ weight.t()
        plain = x.float() @ weight.float().t()
        if bias is not None:
            exact, plain = exact + bias.double(), plain + bias.float()
        ours, theirs = error(result, exact), error(plain.to(x.dtype), exact)
        shape = (*x.shape[:-1], weight.shape[0])
        allowed = FACTOR * theirs
        if exact.numel():
            beyond += ours > max(allowed, HALF if x.dtype is torch.float16 else 0.0)
            total = x.double().abs() @ (weight.abs() if terms is None else terms).t()
            largest = exact.abs().max().clamp(min=1e-30)
            allowed = max(allowed, (FLOOR * total.max() / largest).item())
            if x.dtype is torch.float16:
                allowed = max(allowed, HALF)
        if result.shape != shape or result.dtype != x.dtype or not ours <= allowed:
            about = {key: str(value) for key, value in about.items()}
            off.append({"operator": name, **about, "error": ours, "error_of_cublas": theirs})

    def check_gated(
        name: str, about: dict[str, Any], x: torch.Tensor, weight: Any, bias: Any, *more: Any
    ) -> None:
        """The activation of the product in FP32, rounded once, to the last bit."""
        nonlocal count
        even = about["rows"] // 2 * 2
        if not even:
            return
        count += 1
        weight, more = (
            [part if part is None else part[:even] for part in parts] for parts in (weight, more)
        )
        bias = bias if bias is None else bias[:even]
        operator = getattr(vllm_k80, name)
        result = operator(x, *weight, bias, *more, gated=True)
        apart = vllm_k80.silu_and_mul(operator(x.float(), *weight, bias, *more)).to(x.dtype)
        if result.shape != (x.shape[0], even // 2) or not torch.equal(result, apart):
            off.append({"operator": f"gated {name}", **{k: str(v) for k, v in about.items()}})

    for index in range(SEEDS):
        about = case(index)
        rows, columns, group = about["rows"], about["columns"], about["group"]
        x, bias = inputs(about, index)
        parts, weight, terms = weight_w4(rows, columns, group, about["scale"], about["zero"], index)
        result = vllm_k80.gemv_w4(x, *parts[:3], bias, parts[3])
        check("gemv_w4", about, result, x, weight, bias, terms)
        check_gated("gemv_w4", about, x, parts[:3], bias, parts[3])
        dense = vllm_k80.dequant_w4(*parts)
        count += 1
        if not error(dense, weight) < 1e-6:
            off.append({"operator": "dequant_w4", **{k: str(v) for k, v in about.items()}})
        if index % 4 == 0:
            group = columns
        elif index % 4 == 1:
            group = 16
        parts8, weight, terms = weight_w8(rows, columns, group, about["scale"], index)
        result = vllm_k80.gemv_w8(x, *parts8, bias)
        check("gemv_w8", {**about, "group": group}, result, x, weight, bias, terms)
        check_gated("gemv_w8", {**about, "group": group}, x, parts8, bias)
        dense = vllm_k80.dequant_w8(*parts8)
        count += 1
        if not error(dense, weight) < 1e-6:
            off.append({"operator": "dequant_w8", **{k: str(v) for k, v in about.items()}})
        half = weight.half()
        result = vllm_k80.gemv_f16(x, half, bias)
        check("gemv_f16", about, result, x, half.double(), bias)
        check_gated("gemv_f16", about, x, [half], bias)
    # Rows that the last tile shares with the one before are that one's, to the last bit: the last
    # one's columns may be added up in parts.
    for index, rows in enumerate((833, 835, 839, 1667)):
        about = {"tokens": 8, "rows": rows, "columns": 4096, "values": "normal", "bias": None}
        whole = rows // 832 * 832
        x, _ = inputs(about | {"x": torch.float32}, index)
        for name, (parts, *_) in (
            ("gemv_w4", weight_w4(rows, 4096, 128, torch.float16, False, index)),
            ("gemv_w8", weight_w8(rows, 4096, 128, torch.float16, index)),
        ):
            count += 1
            operator = getattr(vllm_k80, name)
            fewer = [part if part is None else part[:whole] for part in parts[:3]]
            if not torch.equal(operator(x, *parts[:3])[:, :whole], operator(x, *fewer)):
                off.append({"operator": f"{name}, shared rows", "rows": str(rows)})
    # Prefill: several tiles of the work buffer, and a part of one.
    for index, tokens in enumerate((33, 128, 513)):
        about = {"tokens": tokens, "rows": 4100, "columns": 5120, "group": 128, "values": "normal"}
        about |= {"x": FLOATS[index % 2], "bias": torch.float32}
        x, bias = inputs(about, index)
        parts, weight, _ = weight_w4(4100, 5120, 128, torch.float16, bool(index % 2), index)
        check(
            "linear_w4", about, vllm_k80.linear_w4(x, *parts[:3], bias, parts[3]), x, weight, bias
        )
        parts8, weight, _ = weight_w8(4100, 5120, 128, torch.float16, index)
        check("linear_w8", about, vllm_k80.linear_w8(x, *parts8, bias), x, weight, bias)
        half = weight.half()
        check("linear", about, vllm_k80.linear(x, half, bias), x, half.double(), bias)
    return {"comparisons": count, "beyond_twice_cublas": beyond}, off


def _copies(bytes_each: int) -> int:
    return max(2, -(-L2_BYTES // bytes_each))


def time_all() -> list[dict[str, Any]]:
    """Times on this GPU for the shapes of a 7B model, from memory, in CUDA graphs."""
    out = []
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
        for tokens in (1, 2, 4, 8, 32):
            x = torch.randn(tokens, columns, device="cuda")
            line: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": tokens}

            def timed(
                name: str,
                make: Callable[[int], tuple[Any, ...]],
                call: Callable[..., Any],
                line: dict[str, Any] = line,
            ) -> None:
                first = make(0)
                size = sum(p.numel() * p.element_size() for p in first if p is not None)
                weights = [first] + [make(i) for i in range(1, _copies(size))]
                line[name] = round(graph_microseconds([lambda w=w: call(*w) for w in weights]), 2)

            def w4(seed: int, dtype: torch.dtype = torch.float16, shape=(rows, columns)) -> Any:
                return tuple(weight_w4(*shape, 128, dtype, True, seed)[0])

            timed(
                "gated_gemv_w4_us",
                w4,
                lambda q, s, m, z, x=x: vllm_k80.gemv_w4(x, q, s, m, None, z, True),
            )
            timed("gemv_w4_us", w4, lambda q, s, m, z, x=x: vllm_k80.gemv_w4(x, q, s, m, None, z))
            timed(
                "gemv_w8_us",
                lambda seed, r=rows, c=columns: tuple(weight_w8(r, c, 128, torch.float16, seed)[0]),
                lambda q, s, x=x: vllm_k80.gemv_w8(x, q, s),
            )

            def dense(dtype: torch.dtype, shape=(rows, columns)) -> Callable[[int], Any]:
                return lambda seed: (torch.randn(shape, device="cuda").to(dtype),)

            timed("gemv_f16_us", dense(torch.float16), lambda w, x=x: vllm_k80.gemv_f16(x, w))
            timed("torch_fp32_us", dense(torch.float32), lambda w, x=x: x @ w.t())
            half = x.half()
            timed("torch_fp16_us", dense(torch.float16), lambda w, x=half: x @ w.t())
            if tokens == 1 and NAIVE.exists():
                y = torch.empty(1, rows, device="cuda")
                naive = driver.Kernel("naive_gemv_w4", "pppppii", 0, NAIVE)

                def launch(q, s, m, z, x=x, y=y, r=rows, c=columns, naive=naive) -> None:
                    pointers = (t.data_ptr() for t in (q, s, z, x, y))
                    naive.launch(-(-r // 8), 256, *pointers, r, c)

                timed("naive_w4_us", lambda seed: w4(seed, torch.float32), launch)
                parts, weight, _ = weight_w4(rows, columns, 128, torch.float32, True, 1)
                launch(*parts)
                line["naive_w4_error"] = error(y, x.double() @ weight.t())
                ours = vllm_k80.gemv_w4(x, *parts[:3], None, parts[3])
                line["gemv_w4_error"] = error(ours, x.double() @ weight.t())
                line["gemv_w4_host_us"] = round(
                    host_microseconds(lambda p=parts, x=x: vllm_k80.gemv_w4(x, *p[:3], None, p[3])),
                    2,
                )
            out.append(line)
    return out
