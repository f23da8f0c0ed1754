"""``vllm-k80 predict``: how fast a model would run on a K80 die, and whether it fits.

A decode step is a list of launches. What each takes is in `costs.json`: a line fitted to what the
simulator predicts of our kernels (tools/kernels_costs.py makes it from `make kernels-report`). To
them come what the host adds, and in prefill cuBLAS, of which there are assumptions only, named
below. So all of it is a prediction; the output says so, with the model's known error.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_k80 import device
from vllm_k80.errors import UserError

COSTS: dict[str, Any] = json.loads((Path(__file__).parent / "costs.json").read_text())

BATCHES = (1, 2, 4, 8, 16, 32)
# ops/reference.py: more rows of x than that are dequantized for cuBLAS, in tiles.
_GEMV_ROWS = 32
# vLLM's --max-num-batched-tokens for a server on a card like this one: tokens of a prefill step.
_CHUNK = 2048
_UTILIZATION = 0.9  # vLLM's --gpu-memory-utilization
# Assumed: what CUDA's context, the activations of a prefill step and the tile that weights are
# dequantized into (32 MB) take together.
_OTHER_MEMORY = 600 * 1024**2
# Assumed: the share of the card's FP32 peak that cuBLAS reaches on large products.
_SGEMM_SHARE = 0.7
_LANES = 192  # of FP32 in a multiprocessor
# Assumed: how much longer a Xeon of the K80's time needs than the host whose times are known.
_OLDER_HOST = 2.0
# cuBLAS' SGEMV on a real die (the vllm37 project, CUDA 11.4): rows, columns, microseconds.
_SGEMV_US = ((4096, 4096, 597.5), (11008, 4096, 1242.9), (4096, 11008, 1510.7))
# Of vLLM itself, seen in the engine's profile on a GPU (benchmarks/results, 404 operations in a
# step of 32 layers): a copy in each layer, and these of head, sampler and inputs.
_STEP_LAUNCHES = 20

_DTYPES = {"half": ("f16", 2), "float": ("f32", 4)}
_CONFIG_DTYPES = {"float16": "half", "float32": "float", "bfloat16": "float"}
# Decoders of Llama's build: attention and a gated feed-forward layer, RMS norms, rotary embedding.
# The number is that of the norms in a layer.
_ARCHITECTURES = {
    "LlamaForCausalLM": 2,
    "MistralForCausalLM": 2,
    "Qwen2ForCausalLM": 2,
    "Qwen3ForCausalLM": 4,
    "llama": 2,
    "qwen2": 2,
    "qwen3": 4,
}
# GGUF's types in our layouts (quantization/gguf.py): the products' kernel, and its group.
_GGUF = {
    "Q4_0": ("w4_f16", 32),
    "Q4_1": ("w4_f16", 32),
    "Q5_0": ("w8_f16", 32),
    "Q5_1": ("w8m_f16", 32),
    "Q8_0": ("w8_f16", 32),
    "Q4_K": ("w4_f16", 32),
    "Q5_K": ("w8m_f16", 32),
    "Q6_K": ("w8_f16", 16),
    "F16": ("f16", 0),
    "F32": ("f32", 0),
}
# w8m_f16: INT8 with a minimum, which takes a second product (`PackedWeight.linear`).
_BITS = {"w4_f16": 4, "w8_f16": 8, "w8m_f16": 8, "f16": 16, "f32": 32}
# FP16 numbers a group: scale and minimum, or scale.
_SCALES = {"w4_f16": 2, "w8_f16": 1, "w8m_f16": 2}


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight of ``n`` rows and ``k`` columns, and the kernel that it is for."""

    n: int
    k: int
    kind: str
    group: int = 0

    @property
    def bytes(self) -> int:
        """What it takes in memory, and what a product must read."""
        elements = self.n * self.k
        scales = elements // self.group * 2 * _SCALES[self.kind] if self.group else 0
        return elements * _BITS[self.kind] // 8 + scales


@dataclass
class Model:
    """What a step depends on. Sizes are elements; ``activations`` and the KV cache have a dtype."""

    name: str
    format: str
    activations: str  # half or float
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    norms: int
    window: int | None
    longest: int
    layers: list[list[Weight]] = field(default_factory=list)
    head: Weight = Weight(0, 0, "f16")
    embedding: int = 0  # bytes, 0 where the head is the embedding too

    @property
    def weights(self) -> int:
        """Bytes."""
        return (
            sum(weight.bytes for layer in self.layers for weight in layer)
            + self.head.bytes
            + self.embedding
        )

    @property
    def element(self) -> int:
        """Bytes of an activation, and of a number in the KV cache."""
        return _DTYPES[self.activations][1]

    @property
    def cache_of_a_token(self) -> int:
        """Bytes, of all layers."""
        return len(self.layers) * 2 * self.kv_heads * self.head_size * self.element


# ---- what a model is


def _fused(weights: list[Weight]) -> list[Weight]:
    """Neighbours of one layout as one weight, as `quantization.packed.concatenate` joins them."""
    joined: list[Weight] = []
    for weight in weights:
        if joined and (joined[-1].kind, joined[-1].group) == (weight.kind, weight.group):
            weight = Weight(joined.pop().n + weight.n, weight.k, weight.kind, weight.group)
        joined.append(weight)
    return joined


def _known_architecture(name: str, where: Path) -> int:
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(
            f"{where}: the architecture {name} cannot be judged; these can: {known}. Others may be "
            f"served all the same (docs/models.md)."
        )
    return _ARCHITECTURES[name]


def _as_if(weights: str, columns: int, where: Path) -> tuple[str, int]:
    """Kernel and group of a linear layer that is stored so."""
    kind = {"int4": "w4_f16", "int8": "w8_f16", "fp16": "f16", "fp32": "f32"}[weights]
    if kind not in _SCALES:
        return kind, 0
    for group in (128, 64, 32):
        if columns % group == 0:
            return kind, group
    raise UserError(
        f"{where}: {columns} columns are no multiple of 32, which {weights} kernels need."
    )


def of_directory(path: Path, dtype: str, weights: str | None) -> Model:
    """The model of a Hugging Face checkpoint, from its ``config.json`` alone.

    Args:
        dtype: auto, half or float, as vLLM's ``--dtype``.
        weights: int4, int8, fp16 or fp32: linear layers as if stored so; None: as they are.

    Raises:
        UserError: no such file, or one that cannot be judged.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} does not hold a JSON object: it is no model's configuration.")

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{file}: {name} is {value!r}; a whole number above 0 is needed.")
        return value

    norms = _known_architecture((config.get("architectures") or ["(none)"])[0], file)
    quantization = config.get("quantization_config")
    if quantization and weights is None:
        if isinstance(quantization, dict):
            quantization = quantization.get("quant_method")
        raise UserError(
            f"{file}: quantization {quantization} is not judged by its configuration. Say with "
            f"--weights int4 or int8 how many bits its weights have."
        )
    stored = str(config.get("torch_dtype") or config.get("dtype"))
    if dtype == "auto" and stored not in _CONFIG_DTYPES:
        known = ", ".join(_CONFIG_DTYPES)
        raise UserError(
            f"{file}: torch_dtype is {stored}; {known} can be judged. Say --dtype half or float."
        )
    activations = _CONFIG_DTYPES[stored] if dtype == "auto" else dtype
    plain, element = _DTYPES[activations]
    own = {"half": "fp16", "float": "fp32"}[activations]

    hidden, inner = size("hidden_size"), size("intermediate_size")
    heads, vocabulary = size("num_attention_heads"), size("vocab_size")
    kv_heads = size("num_key_value_heads", heads)
    head_size = size("head_dim", hidden // heads)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None

    def linear(n: int, k: int) -> Weight:
        return Weight(n, k, *_as_if(weights or own, k, file))

    layer = [
        linear((heads + 2 * kv_heads) * head_size, hidden),
        linear(hidden, heads * head_size),
        linear(2 * inner, hidden),
        linear(hidden, inner),
    ]
    group = layer[0].group
    return Model(
        name=path.resolve().name,
        format=(weights or own).upper() + (f", group {group}" if group else ""),
        activations=activations,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        norms=norms,
        window=window,
        longest=size("max_position_embeddings"),
        layers=[layer] * size("num_hidden_layers"),
        # Head and embedding are not quantized.
        head=Weight(vocabulary, hidden, plain),
        embedding=0 if config.get("tie_word_embeddings") else vocabulary * hidden * element,
    )


def of_gguf(path: Path, dtype: str) -> Model:
    """The model of a GGUF file, from its metadata and the types of its tensors.

    Args:
        dtype: auto (which is float for such files), half or float.

    Raises:
        UserError: no such file, or one that cannot be served or judged.
    """
    import gguf

    from vllm_k80.quantization.gguf_file import check_types

    try:
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file (it does not begin with these bytes).")
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged or of an unknown version: {error}.") from None
    check_types(path, reader)

    def entry(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = str(entry("general.architecture"))
    norms = _known_architecture(architecture, path)
    if entry(f"{architecture}.expert_count"):
        raise UserError(f"{path} is a mixture of experts, which cannot be judged.")

    def size(name: str, default: int | None = None) -> int:
        name = f"{architecture}.{name}"
        value = entry(name)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:  # a list has a number for each layer
            raise UserError(f"{path}: {name} is {value!r}; a whole number above 0 is needed.")
        return value

    heads, hidden = size("attention.head_count"), size("embedding_length")

    tensors: dict[str, Weight] = {}
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            kind, group = _GGUF[tensor.tensor_type.name]
            k, n = (int(size) for size in tensor.shape)
            tensors[tensor.name] = Weight(n, k, kind, group)

    def of_layer(index: int) -> list[Weight]:
        try:
            q, k, v, output, gate, up, down = (
                tensors[f"blk.{index}.{name}.weight"]
                for name in (
                    *("attn_q", "attn_k", "attn_v", "attn_output"),
                    *("ffn_gate", "ffn_up", "ffn_down"),
                )
            )
        except KeyError as error:
            raise UserError(f"{path} has no tensor {error}, which a {architecture} has.") from None
        return [*_fused([q, k, v]), output, *_fused([gate, up]), down]

    layers = [of_layer(index) for index in range(size("block_count"))]
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no tensor token_embd.weight: it is no whole model.")
    head = tensors.get("output.weight")
    kinds = {(w.kind, w.group) for layer in layers for w in layer}
    formats = [
        f"INT{kind[1]}, group {group}" if group else f"FP{kind[1:]}"
        for kind, group in sorted(kinds, key=lambda layout: ("wf".find(layout[0][0]), layout))
    ]
    return Model(
        name=path.name,
        format=" and ".join(dict.fromkeys(formats)),
        activations="float" if dtype == "auto" else dtype,
        hidden=hidden,
        inner=size("feed_forward_length"),
        heads=heads,
        kv_heads=size("attention.head_count_kv", heads),
        head_size=size("attention.key_length", hidden // heads),
        norms=norms,
        window=entry(f"{architecture}.attention.sliding_window"),
        longest=size("context_length"),
        layers=layers,
        head=head or embedding,
        embedding=embedding.bytes if head else 0,
    )


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
        minimums = Weight(weight.n, weight.k // weight.group, "f16")
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
        *[("fused_add_rms_norm_f16", model.hidden)] * 2,
        *[("fused_add_rms_norm_f16", width)] * (model.norms - 2),
        ("rotary_embedding_f16", width + keys),
        *[("reshape_and_cache_f16", 2 * keys)] * 2,  # and vLLM's copy
        ("silu_and_mul_f16", model.inner),
    ]
    # Further tokens are other blocks, which run beside the first token's: they cost memory only,
    # up to four numbers read or written for each of the result.
    others = sum(_line(kernel, n / 1e3) for kernel, n in small)
    others += sum(_memory_us(4 * model.element * (batch - 1) * n) for _, n in small)
    linear = sum(product_us(weight, batch) for layer in model.layers for weight in layer)
    launches = sum(len(layer) + 1 + len(small) for layer in model.layers)
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
    for begin in range(0, prompt, _CHUNK):
        end = min(begin + _CHUNK, prompt)
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


def judge(model: Model, context: int, batches: tuple[int, ...]) -> dict[str, Any]:
    """All that is predicted, as plain data.

    Args:
        context: tokens of the prompt, and of each sequence in decode.
        batches: sequences that decode together; those that do not fit are left out.

    Raises:
        UserError: the model, or no batch of this context, fits; or the kernels do not take it.
    """
    if model.head_size > 256 or model.head_size % 8 or model.heads % model.kv_heads:
        raise UserError(
            f"{model.name}: {model.heads} heads of {model.head_size} with {model.kv_heads} key "
            f"heads; attention takes multiples of 8 up to 256, and as many heads for each key head."
        )
    if context > model.longest:
        raise UserError(
            f"--context {context}: {model.name} is made for {model.longest} tokens at most."
        )
    try:
        room = device.kv_cache_bytes(device.K80_MEMORY, _UTILIZATION, model.weights, _OTHER_MEMORY)
    except ValueError as error:
        raise UserError(f"{model.name}, {model.format}: {error}") from None
    tokens = room // model.cache_of_a_token
    fitting = [batch for batch in batches if batch * context <= tokens]
    if not fitting:
        raise UserError(
            f"{model.name}, {model.format}: {tokens:,} tokens of KV cache fit beside the weights, "
            f"{min(batches)} x {context} were asked for. Lower --context or --batch."
        )
    worst = min(COSTS["of_measured"].values())
    decoding = []
    for batch in fitting:
        parts = decode(model, batch, context)
        step = sum(parts.values())
        slow = (step - parts["host"]) / worst + parts["host"]
        decoding.append(
            {
                "batch": batch,
                "tokens_per_second": round(1e3 * batch / step, 1),
                "if_as_optimistic_as_known": round(1e3 * batch / slow, 1),
                "step_ms": round(step, 2),
                "by_operator_ms": {name: round(ms, 2) for name, ms in parts.items()},
            }
        )
    return {
        "predicted": True,
        "model": model.name,
        "weights": model.format,
        "activations_and_kv_cache": {"half": "FP16", "float": "FP32"}[model.activations],
        "context": context,
        "weights_bytes": model.weights,
        "kv_cache_tokens": tokens,
        "batches_that_do_not_fit": [batch for batch in batches if batch not in fitting],
        "decode": decoding,
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
        "operator (norms: with rotary embedding, activation and the cache's writing):",
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
        f"{_OTHER_MEMORY // 1024**2} MiB for all that is neither weights nor KV cache.",
    ]
    return "\n".join(lines)


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
    path = Path(model)
    if path.suffix == ".gguf":
        if weights is not None:
            raise UserError("--weights is for checkpoint directories; a GGUF file has its own.")
        known = of_gguf(path, dtype)
    else:
        known = of_directory(path, dtype, weights)
    result = judge(known, context, BATCHES if batch is None else (batch,))
    return json.dumps(result, indent=2) if as_json else text(result)
