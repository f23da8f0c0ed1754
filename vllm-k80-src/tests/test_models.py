"""Tiny checkpoints of the architectures that are proven: the tokens are Hugging Face's.

Each has random weights and the configuration that a model of its family was published with
(data/published_configs.json), but for sizes: fewer and smaller layers, and windows and original
contexts so short that a prompt of 41 tokens reaches beyond them. Some families have no such file
here; theirs are the settings that set them apart. Prefill is in chunks of 16 tokens. Then the same
prompts come again, from the prefix cache.

The reference is Hugging Face's own model with eager attention, in FP32, on the very weights that
the engine stores. It computes a whole sequence at once: no cache, no chunks.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from vllm_k80 import plan
from vllm_k80.quantization import k80
from vllm_k80.quantization.packed import group_of_kernels

pytestmark = pytest.mark.engine

TOKENS = 5
LONG = [(7 * i * i + 3 * i + 11) % 251 + 4 for i in range(41)]
# The first 32 tokens of the longest are two blocks of cache, which the second shares.
PROMPTS = [LONG, [*LONG[:33], 9, 8, 7], LONG[20:]]
CACHED_AT_FIRST, CACHED_THEN = [0, 32, 0], [32, 32, 16]

# How a checkpoint is stored: arguments of the engine, and how far a log-probability may be from the
# reference's. FP16 activations are rounded, to 1 in 2048, by each operator; FP32's tell more.
STORAGES: dict[str, tuple[dict[str, Any], float]] = {
    "FP16": ({"dtype": "half"}, 0.1),
    "W4": ({"dtype": "float32", "quantization": "k80-w4"}, 2e-3),
}
# vLLM refuses Gemma 2 with FP16 activations, for its values are too large.
FP16_WEIGHTS = {"dtype": "float32", "quantization": "k80-f16"}


@dataclass(frozen=True)
class Family:
    """A tiny model.

    Args:
        config: name of transformers' class, without "Config".
        settings: of that.
        matter: settings that undo a feature of it. The engine's log-probabilities must not be those
            of a reference with one of them, else the feature would not be tested.
        engine: arguments of the engine.
        reference: arguments of the reference's forward.
    """

    config: str
    settings: dict[str, Any]
    matter: tuple[dict[str, Any], ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)


# Of what was published, by the repository that has it. Read from copies of these on GitHub on
# 2026-11-27.
PUBLISHED = json.loads((Path(__file__).parent / "data/published_configs.json").read_text())
# What is not of the architecture, or of the vocabulary, which is another one here.
NOT_TAKEN = (
    *("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype"),
    *("transformers_version", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def published(repository: str, **changes: Any) -> dict[str, Any]:
    """A model's own configuration, with these sizes; lists of layers get shorter with them."""
    own = {key: value for key, value in PUBLISHED[repository].items() if key not in NOT_TAKEN}
    for key in ("layer_types", "no_rope_layers"):
        if key in own:
            own[key] = own[key][: changes["num_hidden_layers"]]
    return own | changes


def shortened(repository: str, **changes: Any) -> dict[str, Any]:
    """The scaling of its rotary embedding, with changes."""
    return dict(PUBLISHED[repository]["rope_scaling"]) | changes


def llama(**settings: Any) -> dict[str, Any]:
    """Sizes of what most have: grouped heads, RMS norms, rotary embedding, gated layers."""
    common = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 128,
    }
    return {key: value for key, value in (common | settings).items() if value is not None}


NO_ROPE_SCALING = {"rope_scaling": None}
NO_WINDOW = {"sliding_window": None}
PHI3 = {"hidden_size": 384, "head_dim": None, "num_key_value_heads": 4, "pad_token_id": 0}
LLAMA_31, LLAMA_32 = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
PHI3_LONG = "microsoft/Phi-3-mini-128k-instruct"
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_ctx": 128}
OPT = {
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 128,
}
FALCON = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES = {
    "Llama 2": Family(
        "Llama",
        published("meta-llama/Llama-2-7b-hf", **llama(num_key_value_heads=4, head_dim=128)),
    ),
    "Llama 3": Family(
        "Llama", published("meta-llama/Meta-Llama-3-8B-Instruct", **llama(head_dim=128))
    ),
    "Llama 3.1": Family(
        "Llama",
        published(
            LLAMA_31,
            **llama(head_dim=128),
            rope_scaling=shortened(LLAMA_31, original_max_position_embeddings=32),
        ),
        (NO_ROPE_SCALING,),
    ),
    "Llama 3.2": Family(
        "Llama",
        published(
            LLAMA_32,
            **llama(num_attention_heads=3),
            rope_scaling=shortened(LLAMA_32, original_max_position_embeddings=32),
        ),
        (NO_ROPE_SCALING,),
    ),
    "TinyLlama": Family(
        "Llama", published("TinyLlama/TinyLlama-1.1B-Chat-v1.0", **llama(num_attention_heads=8))
    ),
    "Mistral": Family(
        "Mistral",
        published("mistralai/Mistral-7B-v0.1", **llama(head_dim=128), sliding_window=16),
        (NO_WINDOW,),
    ),
    "Qwen2.5": Family(
        "Qwen2",
        published("Qwen/Qwen2.5-7B-Instruct", **llama(hidden_size=448, num_attention_heads=7)),
    ),
    "Qwen3": Family(
        "Qwen3", published("Qwen/Qwen3-0.6B", **llama(head_dim=128, num_key_value_heads=2))
    ),
    "Gemma": Family("Gemma", llama(head_dim=256, hidden_activation="gelu_pytorch_tanh")),
    "Gemma 2": Family(
        "Gemma2",
        published(
            "google/gemma-2-2b-it",
            **llama(head_dim=256, num_hidden_layers=3),
            sliding_window=16,
            # Of scores and logits as small as here.
            attn_logit_softcapping=2.0,
            final_logit_softcapping=10.0,
        ),
        (
            {"sliding_window": 4096},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
        ),
    ),
    "Gemma 3": Family(
        "Gemma3Text",
        published(
            "google/gemma-3-1b-it",
            **llama(head_dim=256, num_hidden_layers=6),
            sliding_window=16,
            # The 1B has none; larger ones do.
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        ({"sliding_window": 4096}, {"rope_local_base_freq": 1e6}, NO_ROPE_SCALING),
    ),
    "Phi-3": Family(
        "Phi3",
        published("microsoft/Phi-3-mini-4k-instruct", **llama(**PHI3), sliding_window=16),
        (NO_WINDOW,),
    ),
    "Phi-3 128k": Family(
        "Phi3", published(PHI3_LONG, **llama(**PHI3), original_max_position_embeddings=16)
    ),
    "Phi-3 128k at 4k": Family(
        "Phi3",
        published(
            PHI3_LONG,
            **llama(**PHI3, max_position_embeddings=256),
            original_max_position_embeddings=64,
        ),
        engine={"max_model_len": 64},
    ),
    "Phi-4": Family(
        "Phi3",
        published("microsoft/phi-4", **llama(hidden_size=512, head_dim=None, pad_token_id=0)),
    ),
    "Phi-4-mini": Family(
        "Phi3",
        published(
            "microsoft/Phi-4-mini-instruct",
            **llama(**PHI3 | {"num_attention_heads": 3, "num_key_value_heads": 1}),
            original_max_position_embeddings=16,
        ),
    ),
    "Phi-2": Family(
        "Phi",
        published(
            "microsoft/phi-2",
            hidden_size=320,
            intermediate_size=1280,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
        ),
    ),
    "Granite": Family(
        "Granite",
        published("ibm-granite/granite-3.3-8b-instruct", **llama(hidden_size=256, head_dim=None)),
    ),
    "SmolLM3": Family(
        "SmolLM3",
        published(
            "HuggingFaceTB/SmolLM3-3B",
            **llama(hidden_size=256, head_dim=None, num_hidden_layers=4, pad_token_id=0),
        ),
    ),
    "GPT-2": Family("GPT2", published("openai-community/gpt2", **GPT2)),
    "DialoGPT": Family("GPT2", published("microsoft/DialoGPT-small", **GPT2)),
    "OPT": Family("OPT", published("facebook/opt-125m", **OPT)),
    "OPT 350m": Family("OPT", OPT | {"word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "Pythia": Family(
        "GPTNeoX",
        published(
            "EleutherAI/pythia-1b",
            hidden_size=320,
            intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        ({"use_parallel_residual": False},),
    ),
    "Falcon 7B": Family("Falcon", published("tiiuae/falcon-7b-instruct", **FALCON)),
    "Falcon 40B": Family(
        "Falcon",
        FALCON
        | {"alibi": False, "bias": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "Falcon RW": Family(
        "Falcon",
        FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        ({"alibi": False},),
        # Without a mask of heads, transformers 4.55.4 with eager attention adds ALiBi twice: to the
        # scores, and to the causal mask.
        reference={"head_mask": torch.ones(2, 4)},
    ),
    "StableLM 3B": Family(
        "StableLm",
        published(
            "stabilityai/stablelm-3b-4e1t",
            **llama(hidden_size=320, head_dim=None, num_key_value_heads=4),
        ),
        ({"partial_rotary_factor": 0.5},),
    ),
    "StableLM 2": Family(
        "StableLm",
        published(
            "stabilityai/stablelm-2-zephyr-1_6b",
            **llama(hidden_size=256, head_dim=None, num_key_value_heads=4),
        ),
    ),
}

CASES = [(name, storage) for name in FAMILIES for storage in STORAGES]

# All engines one after the other in one process: importing vLLM takes longer than a tiny model.
RUN = """
import gc, json, os, sys, traceback
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead, VocabParallelEmbedding)
jobs, prompts, tokens = json.loads(sys.argv[1])
prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
for key, options in jobs:
    # vLLM collects garbage around the loading of a model: three times through all modules is most
    # of the time of a tiny one.
    gc.freeze()
    try:
        engine = LLM(skip_tokenizer_init=True, num_gpu_blocks_override=64, max_num_seqs=4,
                     max_num_batched_tokens=16, **options)
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        parts = [p for p in runner.get_model().modules() if isinstance(p, VocabParallelEmbedding)]
        packed = {isinstance(p, ParallelLMHead): hasattr(p, "packed_weights") for p in parts}
        tensors = [*runner.get_model().parameters(), *runner.get_model().buffers()]
        loaded = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
        runs = []
        for _ in range(2):
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            runs.append([])
            for output in outputs:
                [best] = output.outputs
                chosen = [at[token].logprob for token, at in zip(best.token_ids, best.logprobs)]
                runs[-1].append([output.num_cached_tokens, list(best.token_ids), chosen])
        vocabulary = [packed[False], packed.get(True, packed[False])]
    except Exception:
        runs, vocabulary, loaded = traceback.format_exc(), None, 0
    print("RESULT " + json.dumps([key, runs, vocabulary, loaded]))
"""


def arguments_of(name: str, storage: str) -> dict[str, Any]:
    """The engine's, for a checkpoint that is stored so."""
    if name == "Gemma 2" and storage == "FP16":
        return FP16_WEIGHTS
    return STORAGES[storage][0]


def make(family: Family, **changes: Any) -> nn.Module:
    cls = getattr(transformers, f"{family.config}Config")
    common = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
    config = cls(**common | family.settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def fill(model: nn.Module) -> None:
    """Random weights, rounded to FP16, with which layers neither fade nor drown each other."""
    for name, part in model.named_parameters():
        if part.dim() == 1:
            part.data += 0.1 * torch.randn_like(part)
        else:
            columns = part.shape[0] if "c_" in name else part.shape[1]
            part.data = torch.randn_like(part) * 1.5 / columns**0.5
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    # A tied head would tell of the last token and of little else.
    head.data *= 0.6 if head is embeddings else 2
    for part in model.parameters():
        part.data = part.data.half().float()


def saved(family: Family, directory: Path) -> nn.Module:
    """A checkpoint of the family in FP16, and the reference with its weights."""
    torch.manual_seed(37)
    model = make(family)
    fill(model)
    # A copy: narrowing would round the reference's frequencies too.
    copy.deepcopy(model).half().save_pretrained(directory)
    return model


@torch.no_grad()
def narrow(model: nn.Module) -> None:
    """Replace the weights by what `k80-w4` stores of them."""
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    linear = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D)]
    done = set()  # a tied head's weight is there once
    for part in (*vocabulary, *linear):
        if id(part.weight) in done:
            continue
        done.add(id(part.weight))
        transposed = isinstance(part, Conv1D)
        rows = part.weight.t().contiguous() if transposed else part.weight
        pack = k80.quantize_w8 if part in vocabulary else k80.quantize_w4
        packed = pack(rows, group_of_kernels(rows.shape[1]))
        wide = packed.linear(torch.eye(rows.shape[1]))
        part.weight.data = wide if transposed else wide.t().contiguous()


@torch.no_grad()
def judge(
    family: Family, model: nn.Module, prompt: list[int], tokens: list[int]
) -> tuple[list[float], list[float]]:
    """What the reference holds of tokens that an engine has generated.

    Returns:
        For each its log-probability, and by how much its logit is below that of the best.
    """
    ids = torch.tensor([prompt + tokens])
    logits = model(ids, use_cache=False, **family.reference).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(tokens)[:, None]
    logprobs = logits.log_softmax(-1).gather(1, chosen)
    behind = logits.amax(-1, keepdim=True) - logits.gather(1, chosen)
    return logprobs.flatten().tolist(), behind.flatten().tolist()


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[nn.Module, Any, int, plan.Source]]:
    """Of each selected case the reference; of each run and prompt what the engine said; the bytes
    that the model takes in it; and what describes the checkpoint."""
    cases = [
        (item.callspec.params["name"], item.callspec.params["storage"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    models, sources, jobs = {}, {}, []
    for name, storage in cases:
        family = FAMILIES[name]
        directory = tmp_path_factory.mktemp("model")
        models[name, storage] = saved(family, directory)
        sources[name, storage] = plan.source(str(directory))
        options = {"model": str(directory), "max_model_len": 128}
        options |= arguments_of(name, storage) | family.engine
        jobs.append([(name, storage), options])
    found = {}
    for case, runs, vocabulary, loaded in engines.results(RUN, [jobs, PROMPTS, TOKENS]):
        name, storage = case
        if storage == "W4" and vocabulary:
            # Upstream gives those of Gemma, OPT, GPT-NeoX and Falcon no quantization.
            assert vocabulary == [True, True], f"{name}: embeddings or head are not narrowed"
            narrow(models[name, storage])
        found[name, storage] = models[name, storage], runs, loaded, sources[name, storage]
    return found


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_tokens_are_those_of_hugging_face(
    name: str, storage: str, results: dict[tuple[str, str], tuple[nn.Module, Any, int, plan.Source]]
) -> None:
    family = FAMILIES[name]
    model, runs, *_ = results[name, storage]
    assert not isinstance(runs, str), runs
    _, tolerance = STORAGES[storage]
    first, again = runs
    for prompt, (_, tokens, logprobs) in zip(PROMPTS, first, strict=True):
        expected, behind = judge(family, model, prompt, tokens)
        # The reference's own choice, but where two are so near that rounding may decide.
        assert max(behind) < 2 * tolerance
        assert logprobs == pytest.approx(expected, abs=tolerance)
    for change in family.matter:
        other = make(family, **change)
        other.load_state_dict(model.state_dict())
        [_, tokens, logprobs] = first[0]
        without, _ = judge(family, other, LONG, tokens)
        assert logprobs != pytest.approx(without, abs=2 * tolerance), change
    assert [cached for cached, *_ in first] == CACHED_AT_FIRST
    assert [cached for cached, *_ in again] == CACHED_THEN
    assert [tokens for _, tokens, _ in again] == [tokens for _, tokens, _ in first]


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_what_is_planned_is_what_is_allocated(
    name: str, storage: str, results: dict[tuple[str, str], tuple[nn.Module, Any, int, plan.Source]]
) -> None:
    *_, loaded, source = results[name, storage]
    arguments = arguments_of(name, storage)
    settings = plan.Settings(dtype=arguments["dtype"], weights=arguments.get("quantization"))
    planned = source.model(settings).loaded
    if FAMILIES[name].engine:  # so short a context needs no factors for long ones
        assert loaded < planned < 1.1 * loaded
    else:
        assert planned == pytest.approx(loaded, rel=0.01)
