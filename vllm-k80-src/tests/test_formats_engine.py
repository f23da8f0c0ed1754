"""Tiny checkpoints of each format, through the whole engine: the tokens of their dequantized twin.

    python tests/test_formats_engine.py DIRECTORY

writes those of two dies, with the tokens that are expected, for benchmarks/engine_on_gpu.py.

All engines run one after the other in one process: importing vLLM takes longer than a tiny model.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32
from ggml_blocks import quantized
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    awq_pack,
    gptq_pack,
    pack_cols,
    quantize_weights,
)
from vllm.scalar_type import scalar_types

from vllm_k80 import memory, plan
from vllm_k80.quantization import k80
from vllm_k80.quantization.gguf_file import extract_metadata

pytestmark = pytest.mark.engine

PROMPT, TOKENS, LAYERS = [1, 17, 200, 33, 5], 6, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "initializer_range": 0.25,
    "torch_dtype": "float32",
}
# As many columns in a layer's part on one of two dies as FORMATS' groups have.
OF_TWO_DIES = CONFIG | {"hidden_size": 256}

# A linear layer's weight [N, K] to the tensors that a checkpoint has in its place, and to what
# these stand for.
Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def _integers(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, ...]:
    """q, zero and FP16 scale by vLLM's code, [K, N] and [groups, N]; and what they stand for."""
    biased = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}
    unsigned = {4: scalar_types.uint4, 8: scalar_types.uint8}
    kind = biased[bits] if symmetric else unsigned[bits]
    _, q, scale, zero = quantize_weights(weight.t(), kind, group, zero_points=not symmetric)
    if zero is None:
        zero = torch.full_like(scale, 1 << (bits - 1), dtype=torch.int32)
    scale = scale.half()
    size = len(q) // len(scale)
    wide = (q - zero.repeat_interleave(size, 0)) * scale.float().repeat_interleave(size, 0)
    return q, zero, scale, wide


def gptq(bits: int, group: int, symmetric: bool, act_order: bool) -> Quantize:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        order = torch.randperm(columns) if act_order else torch.arange(columns)
        # Groups are of columns in the order in which GPTQ has taken them.
        q, zero, scale, wide = _integers(weight[:, order], bits, group, symmetric)
        back = order.argsort()
        tensors = {
            "qweight": gptq_pack(q[back], bits, columns, rows),
            "qzeros": pack_cols((zero - 1) % (1 << bits), bits, len(zero), rows),
            "scales": scale,
            "g_idx": (torch.arange(columns) // (len(q) // len(scale)))[back].int(),
        }
        return tensors, wide[back].t()

    return quantize


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    q, zero, scale, wide = _integers(weight, 4, 64, symmetric=False)
    tensors = {
        "qweight": awq_pack(q, 4, columns, rows),
        "qzeros": awq_pack(zero, 4, len(zero), rows),
        "scales": scale,
    }
    return tensors, wide.t()


def compressed(bits: int, group: int, symmetric: bool) -> Quantize:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, zero, scale, wide = _integers(weight, bits, group, symmetric)
        half = 1 << (bits - 1)
        tensors = {
            "weight_packed": pack_to_int32((q - half).to(torch.int8).t(), bits),
            "weight_scale": scale.t(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            signed = (zero - half).to(torch.int8).t()
            tensors["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0)
        return tensors, wide.t()

    return quantize


def compressed_config(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int"} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def gptq_config(bits: int, group: int, symmetric: bool, act_order: bool) -> dict[str, Any]:
    settings = {"bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    return {"quant_method": "gptq"} | settings


FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    # q, k and v, and gate and up, each with an order of its own.
    "gptq 4 bits": (gptq(4, 32, False, True), gptq_config(4, 32, False, True)),
    "gptq 8 bits": (gptq(8, -1, True, False), gptq_config(8, -1, True, False)),
    "gptq 8 bits, zero points": (gptq(8, 64, False, False), gptq_config(8, 64, False, False)),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    ),
    "w4a16": (
        compressed(4, 128, False),
        compressed_config(num_bits=4, strategy="group", group_size=128, symmetric=False),
    ),
    "w4a16, symmetric": (
        compressed(4, 128, True),
        compressed_config(num_bits=4, strategy="group", group_size=128, symmetric=True),
    ),
    "w8a16": (
        compressed(8, -1, True),
        compressed_config(num_bits=8, strategy="channel", symmetric=True),
    ),
}
# The same of other architectures of which quantized releases are public: format, and changes of
# CONFIG. Biases, norms of heads, tensors that are stored fused, layers to which vLLM gives no name.
UNGROUPED = {"num_key_value_heads": CONFIG["num_attention_heads"]}
# Or a token's own embedding would outweigh all layers, and the next token be the last one.
TIED = {"tie_word_embeddings": True, "initializer_range": 0.01}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a Qwen2, awq": ("awq", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
    "a Qwen3, w4a16": (
        "w4a16",
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
    ),
    "a Phi-3, gptq": (
        "gptq 4 bits",
        {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0},
    ),
    "a GPT-NeoX, gptq": (
        "gptq 4 bits",
        {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"} | UNGROUPED,
    ),
    "a Mistral, awq": ("awq", {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}),
    "a Granite, w4a16": (
        "w4a16, symmetric",
        {"architectures": ["GraniteForCausalLM"], "model_type": "granite"},
    ),
    "a Gemma 2, gptq": (
        "gptq 4 bits",
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 64}
        | {"hidden_act": "gelu_pytorch_tanh"}
        | TIED,
    ),
    "a Gemma 3, w4a16": (
        "w4a16, symmetric",
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 64}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | TIED,
    ),
    "a StableLM, gptq": (
        "gptq 4 bits",
        {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"} | UNGROUPED,
    ),
    "a Falcon, gptq": (
        "gptq 4 bits",
        {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
        | {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
        | {"tie_word_embeddings": False, "intermediate_size": 4 * CONFIG["hidden_size"]},
    ),
    "a SmolLM3, w4a16": (
        "w4a16, symmetric",
        {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "pad_token_id": 0}
        | {"tie_word_embeddings": True},
    ),
    "an OPT, gptq": (
        "gptq 8 bits",
        {"architectures": ["OPTForCausalLM"], "model_type": "opt", "init_std": 0.25}
        | {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True}
        | UNGROUPED,
    ),
}
ON_THE_FLY = ("k80-w4", "k80-w8", "k80-f16")
# Changes of CONFIG, and options: loaded without a file of weights, for the memory that they take.
PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a tied Qwen2 with biases, FP16": (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 250}
        | {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"dtype": "half"},
    ),
    "a Qwen3 with norms of heads": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
        {},
    ),
    "a Llama with biases and lengthened positions": (
        {"attention_bias": True, "mlp_bias": True, "vocab_size": 250}
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {},
    ),
}

# The types that llama.cpp's presets give to tensors whose names begin so, the last that fits; "" is
# all others. Of a layer, v and down, which K-quants hurt most, get more bits in some.
GGUF_FILES: dict[str, dict[str, Kind]] = {
    "Q4_K_M": {
        "": Kind.Q4_K,
        "token_embd": Kind.Q6_K,  # the head as well
        "blk.0.attn_v": Kind.Q6_K,
        "blk.0.ffn_down": Kind.Q6_K,
        "blk.1.ffn_down": Kind.Q5_0,  # of rows that 256 does not divide
    },
    "Q5_K_M": {
        "": Kind.Q5_K,
        "output.weight": Kind.Q6_K,
        "blk.1.attn_v": Kind.Q6_K,
        "blk.0.ffn_down": Kind.Q6_K,
        "blk.1.ffn_down": Kind.Q5_1,
    },
}
# How often a step calls these operators: products of both layers and of the head, the embedding.
GGUF_CALLS = {
    # q and k, v apart; o; gate and up; down.
    "Q4_K_M": {"linear_w4": 3 + 3, "linear_w8": 2 + 1 + 1, "embedding_w8": 1},
    # A minimum is a product of its own: of q, k and v (or q and k), o, gate and up, down.
    "Q5_K_M": {"linear_w8": 4 + 5 + 1, "linear": 3 + 4, "embedding_w8": 1},
}

RUN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm_k80 import ops
from vllm_k80.worker import kv_cache_bytes
jobs, prompt, tokens = json.loads(sys.argv[1])
sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
results = {}
for name, options in jobs.items():
    options |= {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 2048}
    engine = LLM(skip_tokenizer_init=True, **options)
    ops.CALLS.clear()
    [output] = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    worker = engine.llm_engine.model_executor.driver_worker.worker
    runner = worker.model_runner
    model = runner.get_model()
    tensors = [*model.parameters(), *model.buffers()]
    loaded = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    specs = runner.get_kv_cache_spec().values()
    cache = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    parts = {n: (str(b.dtype), b.data_ptr()) for n, b in model.named_buffers(remove_duplicate=False)
             if "weight_" in n}
    try:
        kv_cache_bytes(worker, 40_000)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    budgets = kv_cache_bytes(worker), kv_cache_bytes(worker, 1 << 30), refusal
    allocated = sum(loaded.values()), cache, *budgets
    results[name] = [list(output.outputs[0].token_ids), dict(ops.CALLS), parts, allocated]
print("RESULT " + json.dumps(results))
"""


def _model(config: dict[str, Any]) -> torch.nn.Module:
    """Hugging Face's model, in FP32, with random weights."""
    described = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(described, attn_implementation="eager")
    return model.float().eval()


def _is_linear(key: str) -> bool:
    return key.endswith(".weight") and not re.search("norm|ln_f|embed|head", key)


def _expected(config: dict[str, Any], state: dict[str, Tensor]) -> list[int] | None:
    """Greedy tokens of Hugging Face's model with these weights.

    None where two were near a tie, or where it repeats itself, which little of it may decide.
    """
    model = _model(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    ids = list(PROMPT)
    for _ in range(TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-2:
            return None
        ids.append(int(best.indices[0]))
    tokens = ids[len(PROMPT) :]
    return tokens if len(set(tokens)) > 2 else None


def _weights(config: dict[str, Any]) -> dict[str, Tensor]:
    state = _model(config).state_dict()
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    # Off centre, so that zero points differ from the middle.
    offset = 0.1 * config["initializer_range"]
    return {
        name: part + offset * torch.randn(len(part), 1) if _is_linear(name) else part
        for name, part in state.items()
    }


# GGUF files of other architectures than llama: what is their own in a configuration.
GGUF_MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "sliding_window": 4},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 96},
    "stablelm": {
        "architectures": ["StableLmForCausalLM"],
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
}


Checkpoint = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


def _quantized(name: str, config: dict[str, Any] = CONFIG) -> Checkpoint:
    """Configuration, tensors of the checkpoint, and what these stand for."""
    quantize, settings = FORMATS[name]
    tensors, twin = {}, {}
    for key, weight in _weights(config).items():
        if _is_linear(key):
            parts, twin[key] = quantize(weight)
            prefix = key.removesuffix("weight")
            tensors |= {prefix + part: tensor for part, tensor in parts.items()}
        else:
            tensors[key] = twin[key] = weight
    return config | {"quantization_config": settings}, tensors, twin


def _unquantized(name: str, config: dict[str, Any] = CONFIG) -> Checkpoint:
    """The same of a BF16 checkpoint that is narrowed as it is loaded; k80-w4 has a tied head."""
    config = config | {"tie_word_embeddings": name == "k80-w4", "torch_dtype": "bfloat16"}
    tensors = {key: weight.bfloat16() for key, weight in _weights(config).items()}

    def narrowed(key: str, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return weight
        if name == "k80-f16":
            return weight.half().float()
        four = name == "k80-w4" and _is_linear(key)
        packed = (k80.quantize_w4 if four else k80.quantize_w8)(weight, 128)
        return packed.linear(torch.eye(weight.shape[1])).t()

    return config, tensors, {key: narrowed(key, part.float()) for key, part in tensors.items()}


def _writer(directory: Path, config: dict[str, Any]) -> gguf.GGUFWriter:
    """Of model.gguf, which says already what its configuration is."""
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(directory / "model.gguf", config["model_type"])
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(config.get("rope_theta", 10000))
    writer.add_vocab_size(config["vocab_size"])
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_model(name: str, directory: Path, config: dict[str, Any]) -> list[int] | None:
    """Write model.gguf of another architecture, by gguf's names of Hugging Face's tensors, with a
    tokenizer that nobody asks; the tokens expected."""
    config = config | {"model_type": name, "rope_theta": 500.0} | GGUF_MODELS[name]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    writer = _writer(directory, config)
    writer.add_layer_norm_eps(1e-5)
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_key_length(head)
    writer.add_rope_dimension_count(int(head * config.get("partial_rotary_factor", 1)))
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    writer.add_tokenizer_model("llama" if name == "phi3" else "gpt2")
    writer.add_token_list([chr(0x21 + index) for index in range(254)] + ["ab", "cd"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([1] * 256)
    writer.add_token_scores([0.0] * 256)
    for add in (writer.add_unk_token_id, writer.add_pad_token_id, writer.add_eos_token_id):
        add(0)
    writer.add_bos_token_id(1)
    twin = {}
    for key, part in _model(config).state_dict().items():
        name_there = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if part.dim() == 2:
            raw = gguf.quantize(part.numpy(), Kind.Q8_0)
            writer.add_tensor(name_there, raw, raw_dtype=Kind.Q8_0)
            twin[key] = torch.from_numpy(gguf.dequantize(raw, Kind.Q8_0))
        else:
            twin[key] = part + 0.1 * torch.randn(part.shape)
            writer.add_tensor(name_there, twin[key].numpy())
    _finish(writer)
    return _expected(config, twin)


def _gguf(name: str, directory: Path, columns: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write model.gguf and its config.json; what transformers reads of the file, in FP32."""
    types = GGUF_FILES[name]
    tied = "output.weight" not in types
    sizes = {"hidden_size": columns, "intermediate_size": columns}
    config = CONFIG | sizes | {"tie_word_embeddings": tied}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys = columns // heads * kv_heads
    rows = {"attn_q": columns, "attn_k": keys, "attn_v": keys, "attn_output": columns}
    rows |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), columns)
    shapes = {f"blk.{i}.{part}.weight": n for i in range(LAYERS) for part, n in rows.items()}
    shapes |= dict.fromkeys(("token_embd.weight", "output.weight"), config["vocab_size"])
    if tied:
        del shapes["output.weight"]

    writer = _writer(directory, config)
    for key, n in shapes.items():
        kind = [kind for start, kind in types.items() if key.startswith(start)][-1]
        seed = int(torch.randint(1 << 31, ()))
        raw = quantized(kind, n, columns, seed, spread=0.15)
        writer.add_tensor(key, raw, raw_dtype=kind)
    norms = [f"blk.{i}.{part}_norm.weight" for i in range(LAYERS) for part in ("attn", "ffn")]
    for key in (*norms, "output_norm.weight"):
        writer.add_tensor(key, np.ones(columns, np.float32))
    _finish(writer)
    (directory / "config.json").write_text(json.dumps(config))
    model = _model(config)
    read = load_gguf_checkpoint(directory / "model.gguf", return_tensors=True, model_to_load=model)
    state = read["tensors"]
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return config, state


def _write(
    root: Path, config: dict[str, Any], gguf_columns: int
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Write a checkpoint of each kind; the engine's arguments for them, and the tokens expected."""
    jobs, expected = {}, {}
    cases = {name: (name, config) for name in [*FORMATS, *ON_THE_FLY]}
    if config is CONFIG:
        cases |= {name: (kind, config | changes) for name, (kind, changes) in OTHERS.items()}
    for name, (kind, settings) in cases.items():
        tokens = None
        while tokens is None:
            make = _quantized if kind in FORMATS else _unquantized
            whole, tensors, twin = make(kind, settings)
            tokens = _expected(whole, twin)
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(whole))
        contiguous = {key: part.contiguous() for key, part in tensors.items()}
        save_file(contiguous, root / name / "model.safetensors")
        jobs[name] = {"model": str(root / name)}
        if name in ON_THE_FLY:
            jobs[name]["quantization"] = name
        expected[name] = tokens
    for name in GGUF_FILES:
        (root / name).mkdir()
        tokens = None
        while tokens is None:
            tokens = _expected(*_gguf(name, root / name, gguf_columns))
        jobs[name] = {"model": str(root / name / "model.gguf"), "hf_config_path": str(root / name)}
        expected[name] = tokens
    for name in GGUF_MODELS:
        (root / name).mkdir()
        path = root / name / "model.gguf"
        while (tokens := _gguf_model(name, root / name, config)) is None:
            pass
        # What the file itself says of its configuration.
        metadata = extract_metadata(path, root / "metadata")
        jobs[name] = {"model": str(path), "hf_config_path": str(metadata)}
        expected[name] = tokens
    return jobs, expected


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each model: tokens expected, tokens, calls of operators, tensors of the model; bytes of
    them, of a token's KV cache and for the cache; and what the engine was given."""
    root = tmp_path_factory.mktemp("formats")
    torch.manual_seed(37)
    jobs, expected = _write(root, CONFIG, 256)
    for name, (changes, options) in PLAIN.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(CONFIG | changes))
        jobs[name] = {"model": str(root / name), "load_format": "dummy"} | options
    [found] = engines.results(RUN, [jobs, PROMPT, TOKENS])
    return {name: [expected.get(name), *found[name], jobs[name]] for name in jobs}


@pytest.mark.parametrize("name", [*FORMATS, *ON_THE_FLY, *OTHERS])
def test_tokens_are_those_of_the_dequantized_checkpoint(name: str, results: dict[str, Any]) -> None:
    expected, tokens, calls, *_ = results[name]
    assert tokens == expected
    assert len(set(tokens)) > 1
    if name in OTHERS:  # no layer was left unquantized
        assert calls.get("linear_w4", 0) + calls.get("linear_w8", 0) >= 4 * LAYERS * TOKENS
        assert calls["linear"] == TOKENS  # the head
        return
    bits = 8 if "8" in name.removeprefix("k80") else 4
    if name == "k80-f16":
        assert calls["linear"] == (4 * LAYERS + 1) * TOKENS
    elif name == "gptq 4 bits":  # q, k and v apart, gate and up apart
        assert calls["linear_w4"] == (3 + 1 + 2 + 1) * LAYERS * TOKENS
    else:
        head = TOKENS if name == "k80-w8" else 0
        assert calls[f"linear_w{bits}"] == 4 * LAYERS * TOKENS + head


@pytest.mark.parametrize("name", GGUF_FILES)
def test_tokens_are_those_of_the_dequantized_gguf_file(name: str, results: dict[str, Any]) -> None:
    expected, tokens, calls, *_ = results[name]
    assert tokens == expected
    assert len(set(tokens)) > 1
    products = {key: calls.get(key, 0) for key in ("linear", "linear_w4", "linear_w8")}
    products["embedding_w8"] = calls["embedding_w8"]
    assert products == {key: GGUF_CALLS[name].get(key, 0) * TOKENS for key in products}


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_tokens_are_those_of_a_gguf_file_of_another_architecture(
    name: str, results: dict[str, Any]
) -> None:
    expected, tokens, calls, *_ = results[name]
    assert tokens == expected
    assert len(set(tokens)) > 1
    assert calls["embedding_w8"] == TOKENS
    assert calls["linear_w8"] == (4 * LAYERS + 1) * TOKENS


def test_a_tied_head_shares_the_narrowed_embeddings(results: dict[str, Any]) -> None:
    _, _, calls, parts, *_ = results["k80-w4"]
    assert calls["linear_w8"] == calls["embedding_w8"] == TOKENS
    head, embeddings = parts["lm_head.qweight_0"], parts["model.embed_tokens.qweight_0"]
    assert head == embeddings
    assert head[0] == "torch.int8"


def test_f16_is_stored_as_fp16(results: dict[str, Any]) -> None:
    dtypes = {dtype for dtype, _ in results["k80-f16"][3].values()}
    assert dtypes == {"torch.float16"}


def _write_for_two_dies(root: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    torch.manual_seed(37)
    return _write(root, OF_TWO_DIES, 512)


def test_two_dies_give_the_same_tokens_and_again_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, expected = _write_for_two_dies(tmp_path)
    del jobs["gptq 4 bits"]  # whose columns are reordered: refused for two dies
    together = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "external_launcher",
        "seed": 0,
    }
    jobs = {name: options | together for name, options in jobs.items()}
    monkeypatch.setenv("VLLM_K80_CACHE", str(tmp_path / "cache"))
    for entries in (0, 2 * len(jobs)):
        assert len(list(tmp_path.glob("cache/weights/*.safetensors"))) == entries
        for found in engines.results_together(RUN, [jobs, PROMPT, TOKENS], 2):
            assert {name: tokens for name, (tokens, *_) in found.items()} == {
                name: expected[name] for name in jobs
            }


@pytest.mark.parametrize(
    "name", [*FORMATS, *OTHERS, *ON_THE_FLY, *PLAIN, *GGUF_FILES, *GGUF_MODELS]
)
def test_what_is_planned_is_what_is_allocated(name: str, results: dict[str, Any]) -> None:
    *_, (loaded, cache, budget, profiled, refusal), options = results[name]
    weights = {quantization: bits for bits, quantization in plan.WEIGHTS.items()}
    settings = plan.Settings(
        dtype=options.get("dtype", "auto"), weights=weights.get(options.get("quantization"))
    )
    model = plan.source(options["model"]).model(settings)
    assert model.loaded == pytest.approx(loaded, rel=0.01)
    assert model.cache_of_a_token == cache
    # The worker gives the KV cache what was planned; less where a profiling run has found less.
    limits = memory.Limits(tokens=2048, sequences=2)
    assert budget == pytest.approx(memory.left(model, limits), rel=0.001)
    assert profiled == 1 << 30
    if cache * (64 + 16) > 40_000:  # a page is kept empty
        shown = "model.gguf" if options["model"].endswith(".gguf") else name
        assert refusal.startswith(f"{shown} does not fit: one sequence of 64 tokens needs 0.00 GB")
        halved = "The nearest that fits: --dtype half (FP16 activations and KV cache)."
        # A page is kept empty, and theirs are larger.
        none = "No setting makes it fit; choose a smaller model."
        shared = "The nearest that fits: --tensor-parallel-size 2 (two dies)."
        nearest = shared if name == "qwen3" else halved  # its heads are the widest
        # Of Gemma 2 vLLM refuses FP16 activations.
        narrowest = name in GGUF_FILES or "Gemma 2" in name
        assert refusal.endswith(none if narrowest else nearest)
    else:
        assert refusal is None


if __name__ == "__main__":
    there = Path(sys.argv[1])
    there.mkdir(parents=True)
    jobs, expected = _write_for_two_dies(there)
    # The directory may be elsewhere when they are read.
    moved = {
        name: {key: value.replace(str(there), "{}") for key, value in options.items()}
        for name, options in jobs.items()
    }
    (there / "jobs.json").write_text(json.dumps([moved, expected, PROMPT]))
