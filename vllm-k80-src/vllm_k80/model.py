"""What a model takes on a die: weights, their layouts and KV cache, from what describes it.

A ``config.json`` or the header of a GGUF file is enough, and neither torch nor vLLM is needed.
`predict` says of it how fast it would be, `plan` what fits.

What is counted is what vLLM 0.10.1.1 allocates: embeddings padded to a multiple of 64 rows
(layers/vocab_parallel_embedding.py), query, key and value in one layer and gate and up in another,
the cache of the rotary embedding (layers/rotary_embedding), norms and biases in the dtype of the
activations; and the layouts of `quantization.packed`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_k80.errors import BadSetting, NotServed, UserError
from vllm_k80.quantization import gguf_header, methods
from vllm_k80.quantization.gguf_file import check_types

# Activations by vLLM's name of the dtype: the kind of plain weights, and bytes of an element.
DTYPES = {"half": ("f16", 2), "float": ("f32", 4)}
_CONFIG_DTYPES = {"float16": "half", "float32": "float", "bfloat16": "float"}
# w8m_f16: INT8 with a minimum, which takes a second product (`quantization.packed.PackedWeight`).
_BITS = {"w4_f16": 4, "w8_f16": 8, "w8m_f16": 8, "f16": 16, "f32": 32}
# FP16 numbers a group: scale and minimum or zero point, or the scale.
_SCALES = {"w4_f16": 2, "w8_f16": 1, "w8m_f16": 2}
FORMATS = {"w4_f16": "INT4", "w8_f16": "INT8", "w8m_f16": "INT8", "f16": "FP16", "f32": "FP32"}
# Of --quantization: what linear layers get, and what embeddings and head (quantization/k80.py).
ON_THE_FLY = {
    "k80-w4": ("int4", "int8"),
    "k80-w8": ("int8", "int8"),
    "k80-f16": ("fp16", "fp16"),
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
_GROUPS = (128, 64, 32)  # of the INT4 kernels, the largest first (ops/reference.py)
_INT8_COLUMNS = 16  # a row of one group must be a multiple of so many (quantization/packed.py)
_VOCABULARY_PADDING = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True)
class Weight:
    """A weight of ``n`` rows and ``k`` columns, and the kernel that it is for.

    ``wide``: the minimums are FP32, as zero points become with INT8. ``orders``: how many times the
    order of its columns is kept, an INT64 number a column (`quantization.packed.PackedWeight`).
    """

    n: int
    k: int
    kind: str
    group: int = 0
    wide: bool = False
    orders: int = 0

    @property
    def bytes(self) -> int:
        """What it takes in memory, and what a product must read."""
        elements = self.n * self.k
        groups = elements // self.group if self.group else 0
        scales = groups * 2 * (_SCALES.get(self.kind, 0) + self.wide)
        return elements * _BITS[self.kind] // 8 + scales + 8 * self.k * self.orders


@dataclass
class Model:
    """What a step depends on. Sizes are elements, of one die's part of the model."""

    name: str
    format: str
    activations: str  # half or float; the KV cache has the same dtype
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    norms: int  # of the hidden size, in a layer
    head_norms: int  # of a head's size
    window: int | None
    longest: int  # context in tokens
    layers: list[list[Weight]] = field(default_factory=list)
    head: Weight = Weight(0, 0, "f16")
    embedding: Weight | None = None  # None where the head is the embedding too
    rest: int = 0  # bytes of norms, biases and the rotary embedding's cache
    dies: int = 1  # that share the model
    quantized: bool = False  # so in its files
    known: bool = True  # False: of another build, ``rest`` is all of it and ``layers`` are empty
    simulated: bool = True  # the kernels' cost model has its operators
    gelu: bool = False  # of the gate, which is a launch of its own; SiLU is the product's

    @property
    def matrices(self) -> list[Weight]:
        """All weights that products or embeddings read."""
        whole = [self.head] if self.embedding is None else [self.head, self.embedding]
        return [weight for layer in self.layers for weight in layer] + whole

    @property
    def weights(self) -> int:
        """Bytes of `matrices`."""
        return sum(weight.bytes for weight in self.matrices)

    @property
    def loaded(self) -> int:
        """Bytes that are allocated when it is loaded."""
        return self.weights + self.rest

    @property
    def by_format(self) -> dict[str, int]:
        """`loaded` by the format of what it is."""
        found = dict.fromkeys(FORMATS.values(), 0)
        for weight in self.matrices:
            found[FORMATS[weight.kind]] += weight.bytes
        found[FORMATS[DTYPES[self.activations][0]]] += self.rest
        return {name: size for name, size in found.items() if size}

    @property
    def element(self) -> int:
        """Bytes of an activation, and of a number in the KV cache."""
        return DTYPES[self.activations][1]

    @property
    def cache_of_a_token(self) -> int:
        """Bytes, of all layers."""
        return len(self.layers) * 2 * self.kv_heads * self.head_size * self.element


# ---- a number of the configuration


class _Config:
    """A configuration that is asked for its numbers by name, in words where they are wrong."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, *names: str) -> Any:
        """The first of these that is there and not null."""
        return next((self.values[n] for n in names if self.values.get(n) is not None), None)

    def size(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(
                f"{self.where}: {names[0]} is {value!r}; a whole number above 0 is needed."
            )
        return value


# ---- builds


@dataclass(frozen=True)
class _Build:
    """How decoders differ: their norms, biases, positions and layers."""

    norms: int = 2  # of the hidden size, in a layer
    head_norms: int = 0  # of a head's size, in a layer
    centred: bool = False  # norms have a bias too
    last_norm: bool = True  # there is one behind the layers
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output
    inner_bias: bool = False  # of the feed-forward layer
    head_bias: bool = False
    gated: bool = True  # the feed-forward layer has gate and up
    gelu: bool = False  # of the gate, in place of SiLU
    stored_fused: bool = False  # query, key and value are one tensor of a checkpoint, and so on
    windows: bool = True  # in all layers, where the configuration has one
    tied: bool = False  # the head is the embedding, where the configuration says nothing
    half: bool = True  # False: vLLM refuses FP16 activations (_FLOAT16_NOT_SUPPORTED_MODELS)
    two_bases: bool = False  # of the rotary embedding: one for layers with a window
    rotary: float = 1.0  # the share of a head that is rotated, where the configuration has none
    learned: int | None = None  # positions are learned, and that many rows more; None: rotated
    longest: int | None = None  # context, where the configuration says nothing
    # vLLM's names of the layers that quantizations go by: "" where it gives none to a layer.
    prefix: str = "model.layers.{}."
    names: tuple[str, ...] = (
        *("self_attn.qkv_proj", "self_attn.o_proj"),
        *("mlp.gate_up_proj", "mlp.down_proj"),
    )
    simulated: bool = True  # the kernels' cost model has its operators
    # What else the configuration says of these.
    by_config: Callable[["_Config"], dict[str, Any]] = lambda config: {}


def _llama(config: "_Config") -> dict[str, Any]:
    attention = bool(config.get("attention_bias") or config.get("bias"))
    inner = bool(config.get("mlp_bias"))
    return {"qkv_bias": attention, "output_bias": attention, "inner_bias": inner}


def _falcon(config: "_Config") -> dict[str, Any]:
    # FalconDecoderLayer's rules; what a configuration leaves out is transformers' FalconConfig's.
    new, bias = bool(config.get("new_decoder_architecture")), bool(config.get("bias"))
    one = config.get("parallel_attn") is not False and not new
    of_parallel = config.get("num_ln_in_parallel_attn") or (1 if one else 2)
    return {
        "norms": 2 if config.get("parallel_attn") is False else of_parallel,
        "rotary": 0.0 if config.get("alibi") else 1.0,
        **dict.fromkeys(("qkv_bias", "output_bias", "inner_bias"), bias),
    }


def _opt(config: "_Config") -> dict[str, Any]:
    before = config.get("do_layer_norm_before") is not False
    bias = config.get("enable_bias") is not False
    return {
        "last_norm": before and not config.get("_remove_final_layer_norm"),
        **dict.fromkeys(("qkv_bias", "output_bias", "inner_bias"), bias),
    }


def _neox(config: "_Config") -> dict[str, Any]:
    attention = config.get("attention_bias") is not False
    return {"qkv_bias": attention, "output_bias": attention}


_PLAIN = _Build(centred=True, gated=False, inner_bias=True, simulated=False)
_UNNAMED = dataclasses.replace(_PLAIN, prefix="", names=("",) * 4)

_BUILDS = {
    "LlamaForCausalLM": _Build(by_config=_llama),
    "MistralForCausalLM": _Build(by_config=_llama),
    "Qwen2ForCausalLM": _Build(qkv_bias=True),
    "Qwen3ForCausalLM": _Build(
        head_norms=2, by_config=lambda config: {"qkv_bias": bool(config.get("attention_bias"))}
    ),
    "GraniteForCausalLM": _Build(by_config=_llama),
    "Phi3ForCausalLM": _Build(stored_fused=True),
    "GemmaForCausalLM": _Build(gelu=True, tied=True),
    "Gemma2ForCausalLM": _Build(norms=4, gelu=True, windows=False, tied=True, half=False),
    "Gemma3ForCausalLM": _Build(
        norms=4, head_norms=2, gelu=True, windows=False, tied=True, two_bases=True
    ),
    # By vLLM's way to Hugging Face's own model, which computes its rotary embedding each time.
    "SmolLM3ForCausalLM": _Build(
        windows=False, tied=True, rotary=0.0, simulated=False, by_config=_llama
    ),
    "StableLmForCausalLM": _Build(
        centred=True,
        rotary=0.25,
        simulated=False,
        by_config=lambda config: {"qkv_bias": bool(config.get("use_qkv_bias"))},
    ),
    "GPT2LMHeadModel": dataclasses.replace(
        _PLAIN,
        qkv_bias=True,
        output_bias=True,
        tied=True,
        learned=0,
        stored_fused=True,
        prefix="transformer.h.{}.",
        names=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "OPTForCausalLM": dataclasses.replace(
        _PLAIN,
        tied=True,
        learned=2,
        prefix="model.decoder.layers.{}.",
        names=("self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2"),
        by_config=_opt,
    ),
    "GPTNeoXForCausalLM": dataclasses.replace(
        _UNNAMED, rotary=0.25, stored_fused=True, by_config=_neox
    ),
    "PhiForCausalLM": dataclasses.replace(
        _UNNAMED, norms=1, qkv_bias=True, output_bias=True, head_bias=True, rotary=0.5
    ),
    "FalconForCausalLM": dataclasses.replace(
        _UNNAMED, tied=True, stored_fused=True, longest=2048, by_config=_falcon
    ),
    # GGUF's names. Biases are tensors there.
    "llama": _Build(),
    "qwen2": _Build(),
    "qwen3": _Build(head_norms=2),
    "phi3": _Build(stored_fused=True),
    "stablelm": _Build(centred=True, rotary=0.25, simulated=False),
    "starcoder2": _PLAIN,
}


# ---- layouts


def _as_if(weights: str, columns: int, where: str) -> tuple[str, int]:
    """Kernel and group of a weight that is stored so: int4, int8, fp16 or fp32."""
    kind = {"int4": "w4_f16", "int8": "w8_f16", "fp16": "f16", "fp32": "f32"}[weights]
    if kind not in _SCALES:
        return kind, 0
    for group in _GROUPS:
        if columns % group == 0:
            return kind, group
    if weights == "int8" and columns % _INT8_COLUMNS == 0:
        return kind, columns
    raise NotServed(
        f"{where}: {columns} columns are no multiple of 32, which {weights} kernels need."
    )


@dataclass(frozen=True)
class _Integers:
    """How a quantized checkpoint stores a layer. ``group``: columns, None for whole rows."""

    bits: int
    group: int | None
    symmetric: bool
    reordered: bool

    def weight(self, name: str, n: int, k: int, whole: int, parts: int) -> Weight:
        """As `quantization.packed.pack_integers` lays it out.

        Args:
            n, k: rows and columns on a die. whole: columns of all dies.
            parts: of a fused layer. Each has an order of its own, if any: a bound, for parts that
                were quantized by the same inputs may share one.
        """
        if self.reordered and self.group and k != whole:
            raise NotServed(
                f"{name}: a checkpoint with reordered columns (desc_act, actorder) cannot be split "
                f"over several dies. Use one die, or a checkpoint quantized with desc_act false."
            )
        size = self.group or k
        if k % size:
            raise NotServed(
                f"{name}: {k} columns on each die do not divide into groups of {size}. Use fewer "
                f"dies, or a checkpoint with a smaller group size."
            )
        by_row = self.bits == 8 and size == k
        fitting = size if by_row else next((g for g in _GROUPS if size % g == 0), None)
        if fitting is None or (self.bits == 8 and k % _INT8_COLUMNS):
            raise NotServed(
                f"{name}: its {k} columns in groups of {size} cannot be served; the kernels take "
                f"groups of a multiple of {_GROUPS[-1]} columns. Use a checkpoint quantized with "
                f"group size 128, 64 or 32."
            )
        wide = self.bits == 8 and not self.symmetric
        kind = "w4_f16" if self.bits == 4 else "w8m_f16" if wide else "w8_f16"
        return Weight(
            n,
            k,
            kind,
            fitting,
            wide,
            orders=parts if self.reordered and self.group else 0,
        )


# A layer's full name, and the names of its parts, to how it is stored; None: not quantized.
_Scheme = Callable[[str, tuple[str, ...]], _Integers | None]


def _gptq(config: dict[str, Any]) -> _Scheme:
    def scheme(layer: str, parts: tuple[str, ...]) -> _Integers | None:
        settings = dict(config)
        # GPTQModel's rules for single layers, the first that fits, as vLLM reads them.
        for pattern, rule in (config.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), layer):
                if pattern.startswith("-:"):
                    return None
                settings |= rule
                break
        if layer == "lm_head" and not config.get("lm_head"):
            return None
        group = settings.get("group_size", -1)
        return _Integers(
            settings["bits"],
            None if group == -1 else group,
            settings.get("sym", True),
            bool(settings.get("desc_act")),
        )

    return scheme


def _awq(config: dict[str, Any]) -> _Scheme:
    group = config.get("q_group_size", config.get("group_size", 128))
    stored = _Integers(4, None if group == -1 else group, False, False)
    skipped = config.get("modules_to_not_convert") or []

    def scheme(layer: str, parts: tuple[str, ...]) -> _Integers | None:
        return None if layer == "lm_head" or any(name in layer for name in skipped) else stored

    return scheme


def _compressed(config: dict[str, Any]) -> _Scheme:
    def matches(pattern: str, name: str) -> bool:
        if pattern.startswith("re:"):
            return re.match(pattern[3:], name) is not None
        return pattern in (name, "Linear")

    def scheme(layer: str, parts: tuple[str, ...]) -> _Integers | None:
        if layer == "lm_head":  # vLLM quantizes linear layers alone
            return None
        stem = layer.rpartition(".")[0]
        names = [f"{stem}.{part}" if stem else part for part in parts]
        if all(any(matches(p, name) for p in config.get("ignore") or []) for name in names):
            return None
        for group in config["config_groups"].values():
            if any(matches(pattern, names[0]) for pattern in group.get("targets") or ["Linear"]):
                weights = group["weights"]
                return _Integers(
                    weights["num_bits"],
                    weights["group_size"] if weights.get("strategy") == "group" else None,
                    weights.get("symmetric", True),
                    weights.get("actorder") == "group",
                )
        return None

    return scheme


_SCHEMES = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}


def _scheme(config: _Config) -> _Scheme | None:
    """How a checkpoint's layers are stored, None where they are not quantized."""
    quantized = methods.quantization_of(config.values)
    if not quantized:
        return None
    if refusal := methods.checkpoint_refusal(quantized):
        raise NotServed(f"{config.where}: {refusal}")
    method = str(quantized["quant_method"]).lower().replace("_tensors", "-tensors")
    if method not in _SCHEMES:
        raise UserError(f"{config.where}: quantization {method} cannot be judged.")
    try:
        scheme = _SCHEMES[method](quantized)
        stored = scheme("model.layers.0.self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"))
        if (
            stored
            and stored.group is not None
            and (type(stored.group) is not int or stored.group < 1)
        ):
            raise ValueError(f"group size {stored.group!r}")
    except (LookupError, TypeError, AttributeError, ValueError, re.error) as error:
        raise UserError(
            f"{config.where}: its quantization_config lacks or has something odd ({error!r})."
        ) from None
    return scheme


# ---- what a model is


# Where configurations have what; Falcon's number of key heads follows other settings of it.
_HIDDEN = "hidden_size", "n_embd", "d_model"
_HEADS = "num_attention_heads", "n_head", "n_heads"
_LAYERS = "num_hidden_layers", "n_layer", "n_layers", "num_layers"
_INNER = "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"
_LONGEST = "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"
_ROTARY = "rope_pct", "partial_rotary_factor", "rotary_pct"


def _all_key_heads(config: _Config, heads: int) -> int:
    """As vLLM's `ModelConfig.get_total_num_kv_heads`."""
    falcon = config.get("architectures") == ["FalconForCausalLM"]
    if falcon and not config.get("new_decoder_architecture"):
        return heads if config.get("multi_query") is False else 1
    default = 1 if config.get("multi_query") and not falcon else heads
    return config.size("num_key_value_heads", "num_kv_heads", default=default)


def _build(name: str, where: str) -> _Build:
    if name not in _BUILDS:
        known = ", ".join(_BUILDS)
        raise UserError(
            f"{where}: the architecture {name} cannot be judged; these can: {known}. Others may be "
            f"served all the same (docs/models.md)."
        )
    return _BUILDS[name]


def _activations(config: _Config, dtype: str) -> str:
    """half or float, as vLLM makes it of ``--dtype`` and the checkpoint's own."""
    if dtype != "auto":
        return {"float16": "half", "float32": "float"}.get(dtype, dtype)
    # Without one vLLM takes FP32. What transformers 5 calls dtype, the installed one does not read.
    stored = str(config.get("torch_dtype") or "float32")
    if stored not in _CONFIG_DTYPES:
        known = ", ".join(_CONFIG_DTYPES)
        raise UserError(
            f"{config.where}: torch_dtype is {stored}; {known} can be judged. Say --dtype half or "
            f"float."
        )
    return _CONFIG_DTYPES[stored]


def _positions(config: _Config, longest: int, build: _Build) -> tuple[int, int]:
    """The longest context, and the rows of the rotary embedding's caches.

    vLLM's `_get_and_verify_max_len` and layers/rotary_embedding: some kinds of scaling lengthen
    both, the others come with a number that is lengthened already.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return longest, longest * (1 + build.two_bases)
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor", 1.0)
    if build.two_bases:  # Gemma 3's longest is lengthened already, and its cache once more
        return longest, longest + int(longest * (factor if kind == "linear" else 1))
    if kind in ("longrope", "su"):  # factors for short contexts, and for long ones
        return longest, longest + config.size("original_max_position_embeddings", default=longest)
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float):
        return longest, longest
    if kind == "yarn":
        longest = config.size("original_max_position_embeddings", default=longest)
        own = scaling.get("original_max_position_embeddings")
        longest = own if isinstance(own, int) and own > 0 else longest
    return int(longest * factor), int(longest * factor)


def _share(what: str, size: int, dies: int, where: str) -> int:
    if size % dies:
        raise NotServed(f"{where}: {size} {what} cannot be shared by {dies} dies. Use one die.")
    return size // dies


def _key_heads(heads: int, dies: int, where: str) -> int:
    """Those of a die: a part of them, or the same one on several."""
    if dies % heads == 0:
        return 1
    return _share("key heads", heads, dies, where)


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def of_config(
    values: dict[str, Any],
    *,
    name: str,
    where: str,
    dtype: str = "auto",
    weights: str | None = None,
    dies: int = 1,
    elements: int | None = None,
) -> Model:
    """The model of a Hugging Face checkpoint, from its ``config.json``.

    Args:
        values: of the configuration. name, where: of the model and the file, for what is said.
        dtype: as vLLM's ``--dtype``.
        weights: int4, int8, fp16 or fp32: linear layers as if stored so; k80-w4, k80-w8 or k80-f16:
            as that quantization loads an unquantized checkpoint; None: as they are.
        dies: that share it by tensor parallelism; the model is the part of one.
        elements: of the checkpoint's files, by which models of another build can be judged.

    Raises:
        NotServed: the kernels do not take it.
        UserError: it cannot be judged.
    """
    config = _Config(values, where)
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in _BUILDS and elements is not None:
        return _of_elements(config, name, dtype, weights, dies, elements)
    build = _build(architecture, where)
    build = dataclasses.replace(build, **build.by_config(config))
    scheme = _scheme(config) if weights is None or weights in ON_THE_FLY else None
    if scheme and weights:
        raise BadSetting(f"{where}: it is quantized already. Leave {weights} out.")
    activations = _activations(config, dtype)
    if activations == "half" and not build.half:
        raise NotServed(
            f"{where}: vLLM refuses FP16 activations for a {architecture}: they are too narrow for "
            f"its values. Use --dtype float32."
        )
    element = DTYPES[activations][1]
    own = {"half": "fp16", "float": "fp32"}[activations]

    hidden, heads = config.size(*_HIDDEN), config.size(*_HEADS)
    inner = config.size(*_INNER, default=None if build.gated else 4 * hidden)
    vocabulary, count = config.size("vocab_size"), config.size(*_LAYERS)
    embedded = config.size("word_embed_proj_dim", default=hidden)  # of a token, as OPT 350m has it
    all_kv_heads = _all_key_heads(config, heads)
    head_size = config.size("head_dim", default=hidden // heads)
    whole_width, whole_inner = heads * head_size, inner
    heads = _share("heads", heads, dies, where)
    inner = _share("columns of the feed-forward layer", inner, dies, where)
    kv_heads = _key_heads(all_kv_heads, dies, where)
    rows = _share("rows of the vocabulary", _padded(vocabulary), dies, where)
    windows = build.windows and config.get("use_sliding_window") is not False
    window = config.get("sliding_window") if windows else None
    longest, positions = _positions(config, config.size(*_LONGEST, default=build.longest), build)
    linear, table = ON_THE_FLY.get(weights or "", (weights or own, own))

    def weight(layer: str, parts: tuple[str, ...], n: int, k: int, whole: int) -> Weight:
        if scheme and (stored := scheme(layer, parts)):
            return stored.weight(f"{where}: {layer}", n, k, whole, len(parts))
        if layer == "lm_head":
            return Weight(n, k, *_as_if(table, k, where))
        return Weight(n, k, *_as_if(own if scheme else linear, k, where))

    width, keys = heads * head_size, kv_heads * head_size
    fan_out = (1 + build.gated) * inner
    attention_parts: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    inner_parts: tuple[str, ...] = ("gate_proj", "up_proj")
    if build.stored_fused:
        attention_parts = ("qkv_proj",)
    if build.stored_fused or not build.gated:
        inner_parts = ("gate_up_proj",)
    shapes: tuple[tuple[tuple[str, ...], int, int, int], ...] = (
        (attention_parts, width + 2 * keys, hidden, hidden),
        (("o_proj",), hidden, width, whole_width),
        (inner_parts, fan_out, hidden, hidden),
        (("down_proj",), hidden, inner, whole_inner),
    )
    layers = [
        [
            weight(build.prefix.format(index) + name, *shape)
            for name, shape in zip(build.names, shapes, strict=True)
        ]
        for index in range(count)
    ]
    biases = build.qkv_bias * (width + 2 * keys) + build.output_bias * hidden
    biases += build.inner_bias * (fan_out + hidden)
    norm = (1 + build.centred) * hidden
    in_a_layer = build.norms * norm + build.head_norms * head_size + biases
    if build.learned is None:
        share = config.get(*_ROTARY)
        placing = positions * int(head_size * (build.rotary if share is None else share))
    else:
        placing = (longest + build.learned) * hidden
    rest = count * in_a_layer + build.last_norm * norm + build.head_bias * rows + placing
    # Into and out of layers that are wider than what is known of a token; each die has all of both.
    wider = [] if embedded == hidden else [(hidden, embedded), (embedded, hidden)]
    projections = [Weight(n, k, *_as_if(linear, k, where)) for n, k in wider]
    group, tied = layers[0][0].group, config.get("tie_word_embeddings")
    return Model(
        name=name,
        format=FORMATS[layers[0][0].kind] + (f", group {group}" if group else ""),
        activations=activations,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        norms=build.norms,
        head_norms=build.head_norms,
        window=window,
        longest=longest,
        layers=layers,
        head=weight("lm_head", ("lm_head",), rows, embedded, embedded),
        embedding=None
        if (build.tied if tied is None else tied)
        else Weight(rows, embedded, *_as_if(table, embedded, where)),
        rest=rest * element + sum(weight.bytes for weight in projections),
        dies=dies,
        quantized=scheme is not None,
        simulated=build.simulated,
        gelu=build.gelu,
    )


def _of_elements(
    config: _Config, name: str, dtype: str, weights: str | None, dies: int, elements: int
) -> Model:
    """A model of a build that is not known here, by the size of its files."""
    architecture = (config.get("architectures") or ["(none)"])[0]
    if weights or methods.quantization_of(config.values):
        raise UserError(
            f"{config.where}: what the architecture {architecture} takes when it is quantized "
            f"cannot be judged; these can: {', '.join(_BUILDS)}."
        )
    activations = _activations(config, dtype)
    plain, element = DTYPES[activations]
    hidden, heads, count = config.size(*_HIDDEN), config.size(*_HEADS), config.size(*_LAYERS)
    kv_heads, longest = _all_key_heads(config, heads), config.size(*_LONGEST)
    return Model(
        name=name,
        format=FORMATS[plain],
        activations=activations,
        hidden=hidden,
        inner=config.size(*_INNER, default=4 * hidden),
        heads=_share("heads", heads, dies, config.where),
        kv_heads=_key_heads(kv_heads, dies, config.where),
        head_size=config.size("head_dim", default=hidden // heads),
        norms=0,
        head_norms=0,
        window=None,  # not of all layers in many of them: as much as without
        longest=_positions(config, longest, _Build())[0],
        layers=[[] for _ in range(count)],
        head=Weight(_padded(config.size("vocab_size")), 0, plain),
        rest=elements * element // dies,
        dies=dies,
        known=False,
        simulated=False,
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is no such file, or another thing in it.
    """
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged, it is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged, it does not hold a JSON object.")
    return values


def told_beside(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What files beside config.json have of a quantization that is not in it, as config.json would.

    Empty where there is nothing to add. Errors: `read_json`.
    """
    name = methods.sidecar(config, [file.name for file in path.iterdir()])
    return methods.of_sidecar(name, read_json(path / name)) if name else {}


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory, and `told_beside`; errors: `read_json`."""
    config = read_json(path / "config.json")
    return config | told_beside(path, config)


def of_directory(path: Path, dtype: str, weights: str | None, dies: int = 1) -> Model:
    """The model of a Hugging Face checkpoint in a directory; arguments and errors: `of_config`."""
    return of_config(
        read_config(path),
        name=path.resolve().name,
        where=str(path / "config.json"),
        dtype=dtype,
        weights=weights,
        dies=dies,
        elements=elements_of(path),
    )


def elements_of(path: Path) -> int | None:
    """Elements of all tensors in a directory's safetensors files, by their headers.

    Format: https://github.com/huggingface/safetensors. None without such files.

    Raises:
        UserError: a file that is damaged.
    """
    total = None
    for file in sorted(path.glob("*.safetensors")):
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(length, 1 << 27)))
            header.pop("__metadata__", None)
            total = (total or 0) + sum(math.prod(entry["shape"]) for entry in header.values())
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}.") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file} is not a whole safetensors file; copy it again.") from None
    return total


def _fused(weights: list[Weight]) -> list[Weight]:
    """Neighbours of one layout as one weight, as `quantization.packed.concatenate` joins them."""
    joined: list[Weight] = []
    for weight in weights:
        if joined and (joined[-1].kind, joined[-1].group) == (weight.kind, weight.group):
            weight = dataclasses.replace(weight, n=joined.pop().n + weight.n)
        joined.append(weight)
    return joined


def of_gguf(path: Path, dtype: str, dies: int = 1) -> Model:
    """The model of a GGUF file; arguments and errors: `of_header`."""
    return of_header(gguf_header.read(path), path, dtype, dies)


def of_header(header: gguf_header.Header, path: Path, dtype: str, dies: int = 1) -> Model:
    """The model of a GGUF file, from its metadata and the types of its tensors.

    Args:
        dtype: auto (which is float for such files), or as vLLM's ``--dtype``.
        dies: as in `of_config`.

    Raises:
        NotServed: tensors that no operator takes.
        UserError: a file that cannot be judged.
    """
    try:
        check_types(path, header)
    except UserError as error:
        raise NotServed(str(error)) from None
    architecture = str(header.fields.get("general.architecture"))
    build, where = _build(architecture, str(path)), str(path)
    prefix = f"{architecture}."
    config = _Config(header.fields, where)

    def size(name: str, default: int | None = None) -> int:  # a list has a number for each layer
        return config.size(prefix + name, default=default)

    heads, hidden = size("attention.head_count"), size("embedding_length")
    all_kv_heads = size("attention.head_count_kv", heads)
    head_size = size("attention.key_length", hidden // heads)
    kv_heads = _key_heads(all_kv_heads, dies, where)

    tensors: dict[str, Weight] = {}
    blocks: dict[str, int] = {}  # columns that are stored together
    vectors = 0
    for tensor in header.tensors:
        if len(tensor.shape) == 2:
            kind, group = _GGUF[tensor.tensor_type.name]
            k, n = tensor.shape
            tensors[tensor.name] = Weight(n, k, kind, group)
            blocks[tensor.name] = tensor.tensor_type.elements
        elif tensor.name != "rope_freqs.weight":
            vectors += math.prod(tensor.shape)

    def rows(weight: Weight) -> Weight:
        return dataclasses.replace(weight, n=_share("rows", weight.n, dies, where))

    def vocabulary(weight: Weight) -> Weight:
        return rows(dataclasses.replace(weight, n=_padded(weight.n)))

    def columns(weight: Weight, name: str) -> Weight:
        k = _share("columns", weight.k, dies, where)
        if k % blocks[name]:
            raise NotServed(f"{path}: {k} columns on each die cut its blocks. Use one die.")
        return dataclasses.replace(weight, k=k)

    fused = build.stored_fused
    attention_names = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
    inner_names = ("ffn_gate", "ffn_up") if build.gated and not fused else ("ffn_up",)

    def of_layer(index: int) -> list[Weight]:
        def named(name: str) -> str:
            return f"blk.{index}.{name}.weight"

        try:
            attention, inner = (
                [tensors[named(name)] for name in names] for names in (attention_names, inner_names)
            )
            output, down = (tensors[named(name)] for name in ("attn_output", "ffn_down"))
        except KeyError as error:
            raise UserError(f"{path} has no tensor {error}, which a {architecture} has.") from None
        keys = 2 * kv_heads * head_size
        if fused:
            of_queries = _share("rows", attention[0].n - 2 * all_kv_heads * head_size, dies, where)
            attention = [dataclasses.replace(attention[0], n=of_queries + keys)]
        else:
            q, k, v = attention
            attention = [rows(q), *(dataclasses.replace(part, n=keys // 2) for part in (k, v))]
        return [
            *_fused(attention),
            columns(output, named("attn_output")),
            *_fused([rows(part) for part in inner]),
            columns(down, named("ffn_down")),
        ]

    layers = [of_layer(index) for index in range(size("block_count"))]
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no tensor token_embd.weight: it is no whole model.")
    head = tensors.get("output.weight")
    layouts = {(weight.kind, weight.group) for layer in layers for weight in layer}
    formats = [
        FORMATS[kind] + (f", group {group}" if group else "")
        for kind, group in sorted(layouts, key=lambda layout: ([*FORMATS].index(layout[0]), layout))
    ]
    activations = "float" if dtype == "auto" else _activations(config, dtype)
    longest = size("context_length")
    rotated = size("rope.dimension_count", int(head_size * build.rotary))
    return Model(
        name=path.name,
        format=" and ".join(dict.fromkeys(formats)),
        activations=activations,
        hidden=hidden,
        inner=_share("columns of the feed-forward layer", size("feed_forward_length"), dies, where),
        heads=_share("heads", heads, dies, where),
        kv_heads=kv_heads,
        head_size=head_size,
        norms=build.norms,
        head_norms=build.head_norms,
        window=config.get(prefix + "attention.sliding_window"),
        longest=longest,
        layers=layers,
        head=vocabulary(head or embedding),
        embedding=vocabulary(embedding) if head else None,
        rest=(vectors + longest * rotated) * DTYPES[activations][1],
        dies=dies,
        quantized=True,
        simulated=build.simulated,
        gelu=build.gelu,
    )
