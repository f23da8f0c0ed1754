"""``vllm-k80 predict``: how fast a model would run on a K80 die, and whether it fits.

A decode step is a list of launches. What each takes is in `costs.json`: a line fitted to what the
simulator predicts of our kernels (tools/kernels_costs.py makes it from `make kernels-report`). To
them come what the host adds, and in prefill cuBLAS, of which there are assumptions only, named
below. So all of it is a prediction; the output says so, with the model's known error.
"""

import json
from pathlib import Path
from typing import Any

from vllm_k80 import device, memory
from vllm_k80.architectures import MAX_HEAD_SIZE
from vllm_k80.errors import NotServed, UserError
from vllm_k80.model import Model, Weight, of_directory, of_gguf

COSTS: dict[str, Any] = json.loads((Path(__file__).parent / "costs.json").read_text())

BATCHES = (1, 2, 4, 8, 16, 32)
# ops/reference.py: more rows of x than that are dequantized for cuBLAS, in tiles.
_GEMV_ROWS = 32
_LIMITS = memory.Limits()  # those of a server
# Assumed: the share of the card's FP32 peak that cuBLAS reaches on large products.
_SGEMM_SHARE = 0.7
_LANES = 192  # of FP32 in a multiprocessor
# Assumed: how much longer a Xeon of the K80's time needs than the host whose times are known.
_OLDER_HOST = 2.0
# cuBLAS' SGEMV on a real die (the vllm37 project, CUDA 11.4): rows, columns, microseconds.
_SGEMV_US = ((4096, 4096, 597.5), (11008, 4096, 1242.9), (4096, 11008, 1510.7))
# Of vLLM itself, seen in the engine's profile on a GPU (benchmarks/results): those of head, sampler
# and inputs.
_STEP_LAUNCHES = 20
# Rows of x up to which an INT4 or INT8 product of gate and up makes the activation itself.
_GATED_ROWS = 4

# ---- what it takes


def _memory_us(size: float) -> float:
    """Microseconds in which the die's memory can move so many bytes, at best."""
    return float(size / COSTS["dram_gb_s"] / 1e3)


def _line(kernel: str, x: float) -> float:
    """Microseconds of a kernel without its launch; ``x`` as costs.json explains it."""
    fixed, slope = COSTS["kernels"][kernel]
    return float(fixed + slope * x)


def _sgemm_us(operations: float) -> float:
    peak = COSTS["smx"] * _LANES * 2 * COSTS["clock_mhz"]  # operations a microsecond
    return float(operations / (_SGEMM_SHARE * peak))


def product_us(weight: Weight, rows: int) -> float:
    """Microseconds of ``x @ weight.T`` for so many rows of x, without the launch."""
    if weight.kind == "w8m_f16":
        integers = Weight(weight.n, weight.k, "w8_f16", weight.group)
        minimums = Weight(weight.n, weight.k // weight.group, "f32" if weight.wide else "f16")
        # Three launches more: sums of x, their product with the minimums, and adding it.
        more = product_us(minimums, rows) + 3 * COSTS["launch_us"]
        return float(product_us(integers, rows) + more)
    vectors = 4 * rows * (weight.n + weight.k)
    operations = 2.0 * rows * weight.n * weight.k
    if weight.kind == "f32" or rows > _GEMV_ROWS:
        # cuBLAS, on the weight or on what was written of it to a tile.
        floats = 4 * weight.n * weight.k
        dequantize = 0.0 if weight.kind == "f32" else _memory_us(weight.bytes + floats)
        slower = sum(us / _memory_us(4 * n * k) for n, k, us in _SGEMV_US) / len(_SGEMV_US)
        return dequantize + max(slower * _memory_us(floats + vectors), _sgemm_us(operations))
    at_once = next((m for m in (1, 2, 4, 8) if m >= rows), 8)
    passes = -(-rows // at_once)
    bound = _memory_us(weight.bytes + vectors / passes)
    return passes * _line(f"gemv_{weight.kind}_m{at_once}", bound)


def _is_gated(weight: Weight, model: Model) -> bool:
    """Whether it is gate and up as one, in a format whose kernels of eight rows have no gate."""
    return weight.n == 2 * model.inner and weight.kind[:3] in ("w4_", "w8_")


def tile_of_heads(group: int) -> int:
    """`ops.attention_kernels.tile_of_heads`, which cannot be imported without torch."""
    return 1 if group == 1 else 4 if group <= 4 else 8


def attention_us(model: Model, batch: int, context: int) -> float:
    """Microseconds of a layer's paged attention in decode, without the launch."""
    group = model.heads // model.kv_heads
    tile = tile_of_heads(group)
    tiles = -(-group // tile)  # each reads the keys and values again
    keys = min(context, model.window or context)
    cache = 2 * batch * keys * model.kv_heads * model.head_size * model.element * tiles
    vectors = 2 * 4 * batch * model.heads * model.head_size
    # An FP32 cache is taken to be read as fast, in bytes, as an FP16 one; other head sizes as 128.
    return _line(f"paged_attention_f16_d128_h{tile}", _memory_us(cache + vectors))


def decode(model: Model, batch: int, context: int) -> dict[str, float]:
    """Milliseconds of a step that makes one token for each of ``batch`` sequences, by operator."""
    width, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    small = [
        *[("fused_add_rms_norm_f16", model.hidden)] * model.norms,
        *[("fused_add_rms_norm_f16", width)] * model.head_norms,
        ("rotary_and_cache_f16", width + 2 * keys),
    ]
    # Further tokens are other blocks, which run beside the first token's: they cost memory only,
    # up to four numbers read or written for each of the result.
    others = sum(_line(kernel, n / 1e3) for kernel, n in small)
    others += sum(_memory_us(4 * model.element * (batch - 1) * n) for _, n in small)
    linear = sum(product_us(weight, batch) for layer in model.layers for weight in layer)
    launches = sum(len(layer) + 1 + len(small) for layer in model.layers)
    if model.gelu:
        apart = len(model.layers)
    elif batch > _GATED_ROWS:
        apart = sum(_is_gated(weight, model) for layer in model.layers for weight in layer)
    else:
        apart = 0
    if apart:  # GELU is taken to cost what SiLU does: both move much and compute little.
        activation = _line("silu_and_mul_f16", model.inner / 1e3)
        linear += apart * (activation + _memory_us(10 * (batch - 1) * model.inner))
        launches += apart
    launches += _STEP_LAUNCHES
    host = COSTS["host_ms"]["step"] + COSTS["host_ms"]["sequence"] * batch
    return {
        "linear": (linear + product_us(model.head, batch)) / 1e3,
        "attention": attention_us(model, batch, context) * len(model.layers) / 1e3,
        "norms_and_activations": others * len(model.layers) / 1e3,
        "launches": launches * COSTS["launch_us"] / 1e3,
        "host": host * _OLDER_HOST,
    }


def first_token(model: Model, prompt: int) -> float:
    """Seconds from a prompt of so many tokens, alone on the die, to its first token."""
    total = 0.0
    for begin in range(0, prompt, _LIMITS.tokens):
        end = min(begin + _LIMITS.tokens, prompt)
        rows = end - begin
        linear = sum(product_us(weight, rows) for layer in model.layers for weight in layer)
        keys = sum(min(token, model.window or token) for token in range(begin + 1, end + 1))
        products = 2 * keys * model.heads * model.head_size  # with keys, and with values
        attention = products * COSTS["varlen_us_a_million_products"] / 1e6
        width = (model.heads + model.kv_heads) * model.head_size
        moved = rows * model.element * (2 * 4 * model.hidden + 4 * width + 3 * model.inner)
        gpu = linear + (attention + _memory_us(moved)) * len(model.layers)
        host = COSTS["host_ms"]["eager_layer"] * len(model.layers) * _OLDER_HOST
        total += max(gpu / 1e3, host)  # launches run ahead of the die
    total += product_us(model.head, 1) / 1e3
    total += (COSTS["host_ms"]["step"] + COSTS["host_ms"]["sequence"]) * _OLDER_HOST
    return float(total / 1e3)


# ---- the answer


def decoding(model: Model, batch: int, context: int) -> dict[str, Any]:
    """What is predicted of so many sequences that decode together, as plain data."""
    parts = decode(model, batch, context)
    step = sum(parts.values())
    slow = (step - parts["host"]) / min(COSTS["of_measured"].values()) + parts["host"]
    return {
        "batch": batch,
        "tokens_per_second": round(1e3 * batch / step, 1),
        "if_as_optimistic_as_known": round(1e3 * batch / slow, 1),
        "step_ms": round(step, 2),
        "by_operator_ms": {name: round(ms, 2) for name, ms in parts.items()},
    }


def check_heads(model: Model) -> None:
    """Refuse heads that the attention kernels do not take (NotServed)."""
    if model.head_size > MAX_HEAD_SIZE or model.head_size % 8 or model.heads % model.kv_heads:
        raise NotServed(
            f"{model.name}: {model.heads} heads of {model.head_size} with {model.kv_heads} key "
            f"heads; attention takes multiples of 8 up to {MAX_HEAD_SIZE}, and as many heads for "
            f"each key head."
        )


def judge(model: Model, context: int, batches: tuple[int, ...]) -> dict[str, Any]:
    """All that is predicted, as plain data.

    Args:
        context: tokens of the prompt, and of each sequence in decode.
        batches: sequences that decode together; those that do not fit are left out.

    Raises:
        UserError: the model, or no batch of this context, fits; or the kernels do not take it.
    """
    check_heads(model)
    if not model.simulated:
        raise UserError(
            f"{model.name}: how fast its architecture is cannot be predicted; `vllm-k80 plan` says "
            f"what it takes."
        )
    if context > model.longest:
        raise UserError(
            f"--context {context}: {model.name} is made for {model.longest} tokens at most."
        )
    other = memory.work(model, _LIMITS)
    try:
        room = device.kv_cache_bytes(
            _LIMITS.total, _LIMITS.utilization, model.loaded, sum(other.values())
        )
    except ValueError as error:
        raise UserError(f"{model.name}, {model.format}: {error}") from None
    tokens = memory.cache_tokens(model, room)
    fitting = [batch for batch in batches if batch * context <= tokens]
    if not fitting:
        raise UserError(
            f"{model.name}, {model.format}: {tokens:,} tokens of KV cache fit beside the weights, "
            f"{min(batches)} x {context} were asked for. Lower --context or --batch."
        )
    return {
        "predicted": True,
        "model": model.name,
        "weights": model.format,
        "activations_and_kv_cache": {"half": "FP16", "float": "FP32"}[model.activations],
        "context": context,
        "weights_bytes": model.loaded,
        "other_memory_bytes": sum(other.values()),
        "kv_cache_tokens": tokens,
        "batches_that_do_not_fit": [batch for batch in batches if batch not in fitting],
        "decode": [decoding(model, batch, context) for batch in fitting],
        "first_token_s": round(first_token(model, context), 2),
        "of_measured": COSTS["of_measured"],
    }


def _table(result: dict[str, Any]) -> str:
    head = ["batch", "tokens/s", "or *", "step ms"]
    head += ["linear", "attention", "norms", "launches", "host"]
    rows = [
        (
            line["batch"],
            *(line[name] for name in ("tokens_per_second", "if_as_optimistic_as_known", "step_ms")),
            *line["by_operator_ms"].values(),
        )
        for line in result["decode"]
    ]
    return "\n".join("".join(f"{cell:>10}" for cell in row) for row in (head, *rows))


def text(result: dict[str, Any]) -> str:
    """The same for a person."""
    ratios = [f"{ratio:.2f}" for ratio in result["of_measured"].values()]
    lines = [
        f"PREDICTED for one die of a Tesla K80, not measured: {result['model']}",
        f"weights {result['weights']}; activations and KV cache "
        f"{result['activations_and_kv_cache']}; {result['context']:,} tokens of context",
        f"It fits: weights take {result['weights_bytes'] / 1e9:.2f} GB of the die's "
        f"{device.K80_MEMORY / 1e9:.1f}; {result['kv_cache_tokens']:,} tokens of KV cache fit "
        f"beside them.",
        "",
        "Decode with CUDA graphs: tokens a second of all sequences; milliseconds of a step by",
        "operator (norms: with rotary embedding and the cache's writing):",
        "",
        _table(result),
        "",
    ]
    if result["batches_that_do_not_fit"]:
        left_out = ", ".join(map(str, result["batches_that_do_not_fit"]))
        lines += [f"Batches of {left_out} do not fit with that context.", ""]
    lines += [
        f"First token of a prompt of {result['context']:,} tokens, alone: "
        f"{result['first_token_s']:.1f} s.",
        "",
        "The kernels are simulated from their code for the card. The only INT4 kernel with",
        "published times on a K80 is another; for one built like it the simulator says",
        f"{', '.join(ratios)} of these times. So it is optimistic: * is what comes out if it is",
        "so here too, by the worst of them.",
        f"Assumed: a host {_OLDER_HOST:g} times as slow as the one where host times were measured;",
        f"cuBLAS at {_SGEMM_SHARE:.0%} of the FP32 peak at {COSTS['clock_mhz']} MHz, which decides "
        f"when the first token comes;",
        f"{result['other_memory_bytes'] // 1024**2} MiB for all that is neither weights nor KV "
        f"cache (`vllm-k80 plan` says of what).",
    ]
    return "\n".join(lines)


def known(model: str, dtype: str, weights: str | None) -> Model:
    """What a GGUF file or a checkpoint directory holds.

    Raises:
        UserError: it cannot be read, or --weights was given for a file.
    """
    path = Path(model)
    if path.suffix != ".gguf":
        return of_directory(path, dtype, weights)
    if weights is not None:
        raise UserError("--weights is for checkpoint directories; a GGUF file has its own.")
    return of_gguf(path, dtype)


def run(
    model: str, context: int, batch: int | None, dtype: str, weights: str | None, *, as_json: bool
) -> str:
    """The answer for a GGUF file or checkpoint directory, as text or JSON.

    Raises:
        UserError: what cannot be predicted, and why.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1.")
    result = judge(known(model, dtype, weights), context, BATCHES if batch is None else (batch,))
    return json.dumps(result, indent=2) if as_json else text(result)
