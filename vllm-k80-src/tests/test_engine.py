"""The engine with our operators under it: every layer goes through them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_k80 import selftest
from vllm_k80.model import of_gguf
from vllm_k80.quantization.gguf_file import extract_metadata
from vllm_k80.serve import metadata_cache

pytestmark = pytest.mark.engine

# Runs in a process of its own: an engine keeps threads, groups and patched defaults.
RUN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from collections import Counter
from vllm import LLM, SamplingParams
from vllm_k80 import ops
arguments = json.loads(sys.argv[1])
engine = LLM(max_model_len=128, max_num_seqs=4, **arguments["engine"])
runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
from vllm.attention.layer import Attention
from vllm.model_executor.layers.linear import LinearBase
layers = Counter()
for module in runner.get_model().modules():
    layers["attention"] += isinstance(module, Attention)
    layers["linear"] += isinstance(module, LinearBase)
    layers["decided"] += "forward" in vars(module)
prompts = [{"prompt_token_ids": list(p)} for p in arguments["prompts"]]
sampling = SamplingParams(temperature=0, max_tokens=arguments["tokens"], ignore_eos=True)
# What a step of the model does that may be a launch: neither a view nor an allocation.
from torch.utils._python_dispatch import TorchDispatchMode
step = Counter()
class Launches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        views = [r.alias_info and not r.alias_info.is_write for r in function._schema.returns]
        if "empty" not in str(function) and not any(views):
            step[str(function).removesuffix(".default")] += 1
        return function(*arguments, **(options or {}))
forward = runner.model.forward
def counted(*arguments, **options):
    step.clear()
    with Launches():
        return forward(*arguments, **options)
runner.model.forward = counted
ops.CALLS.clear()
import torch.nn.functional as F
def refused(*a, **k): raise AssertionError("torch's own linear layer was called by vLLM")
import vllm.model_executor.layers.utils as utils
utils.default_unquantized_gemm = refused
outputs = engine.generate(prompts, sampling, use_tqdm=False)
tensors = [*runner.get_model().parameters(), *runner.get_model().buffers()]
print("RESULT " + json.dumps({
    "bytes": sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()),
    "layers": layers, "calls": ops.CALLS, "dtype": str(runner.dtype),
    "cache": str(runner.kv_caches[0].dtype), "last_step": step,
    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
}))
"""


def run(engine: dict[str, Any], prompts: Any, tokens: int) -> dict[str, Any]:
    arguments = {"engine": engine, "prompts": prompts, "tokens": tokens}
    result: dict[str, Any]
    [result] = engines.results(RUN, arguments)
    return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    selftest.write_model(directory)
    return directory


def test_every_layer_of_smollm2_goes_through_our_operators(smollm2: Path) -> None:
    metadata = str(extract_metadata(smollm2, metadata_cache()))
    engine = {"model": str(smollm2), "tokenizer": metadata, "hf_config_path": metadata}
    steps = 3
    result = run(engine, [[1, 2, 3]], steps)
    # 30 decoder layers: qkv, output, gate and up, down; one attention each. What is decided when
    # the model is loaded are these products, and the norms: two a layer, and one at the end.
    assert result["layers"] == {"attention": 30, "linear": 120, "decided": 120 + 61}
    calls = result["calls"]
    assert calls["linear_w4"] == 120 * steps
    assert calls["linear_w8"] == steps  # the language model head, shared with the embedding
    assert calls["embedding_w8"] == steps
    assert (calls["varlen_attention"], calls["paged_attention"]) == (30, 30 * (steps - 1))
    # Activations are applied by the products, keys are rotated into the cache.
    assert calls["rotary_and_cache"] == 30 * steps
    assert not {"silu_and_mul", "rotary_embedding", "reshape_and_cache"} & calls.keys()
    # Two norms a layer and one at the end; the first has no residual to add.
    assert calls["fused_add_rms_norm"] == 60 * steps
    assert calls["rms_norm"] == steps
    assert calls.get("linear", 0) == 0
    assert (result["dtype"], result["cache"]) == ("torch.float32", "torch.float32")
    assert of_gguf(smollm2, "auto").loaded == pytest.approx(result["bytes"], rel=0.001)


def test_an_unquantized_model_goes_through_our_operators(tiny: Path) -> None:
    engine = {"model": str(tiny), "skip_tokenizer_init": True}
    result = run(engine, [selftest.PROMPTS[0]], 4)
    assert result["tokens"][0] == list(selftest.EXPECTED[0][:4])
    assert result["calls"]["linear"] == (8 + 1) * 4  # 2 layers of 4, and the head
    assert (result["calls"]["varlen_attention"], result["calls"]["paged_attention"]) == (2, 2 * 3)
    # Eight launches a layer in decode, the embedding, and the first norm, which adds nothing.
    assert result["last_step"] == {
        "aten._to_copy": 1,  # of the tokens, to int64
        "aten.embedding": 1,
        "vllm_k80.rms_norm": 1,
        "vllm_k80.linear": 2 * 4,
        "vllm_k80.rotary_and_cache": 2,
        "vllm_k80.paged_attention": 2,
        "vllm_k80.fused_add_rms_norm": 2 * 2,
    }


SCORE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
arguments = json.loads(sys.argv[1])
engine = LLM(max_num_seqs=4, max_num_batched_tokens=100, max_model_len=256, **arguments["engine"])
runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
planned, runner.scored = runner.scored, 64  # of so few words all would fit
rows, compute = [], runner.model.compute_logits
def counted(hidden, *more):
    rows.append(len(hidden))
    return compute(hidden, *more)
runner.model.compute_logits = counted
scheduler = engine.llm_engine.engine_core.engine_core.scheduler
preempted, again = [], scheduler.waiting.prepend_request
def put_back(request):
    preempted.append(request.status.name == "PREEMPTED")
    again(request)
scheduler.waiting.prepend_request = put_back
options = {"temperature": 0, "detokenize": False, "ignore_eos": True}
sampling = SamplingParams(max_tokens=arguments["tokens"], prompt_logprobs=2, **options)
prompts = [{"prompt_token_ids": prompt} for prompt in arguments["prompts"]]
outputs = engine.generate(prompts, sampling, use_tqdm=False)
print("RESULT " + json.dumps({
    "preempted": any(preempted), "planned": planned, "rows": max(rows),
    "left": len(runner.input_batch.num_prompt_logprobs),
    "scores": [
        [at[token].logprob if at else None
         for token, at in zip(o.prompt_token_ids, o.prompt_logprobs, strict=True)]
        for o in outputs
    ],
}))
"""


def test_a_long_prompt_is_scored_in_parts(tiny: Path) -> None:
    """All logits of 2,048 tokens of a large vocabulary, and what is made of them, take gigabytes.

    Prompts end at, before and after the end of a part, and of a prefill step.
    """
    prompts = [[3 + (7 * i + n) % 90 for i in range(n)] for n in (1, 2, 64, 65, 100, 164, 165, 250)]
    engine = {"model": str(tiny), "skip_tokenizer_init": True}
    [result] = engines.results(SCORE, {"engine": engine, "prompts": prompts, "tokens": 2})
    assert result["rows"] == 64
    assert result["left"] == 0
    # 4 requests' choices at 32 bytes a logit, and the step's activations, at 16 bytes a logit.
    config = json.loads((tiny / "config.json").read_text())
    floats = 2 * config["hidden_size"] + 3 * config["intermediate_size"]
    assert result["planned"] == (4 * 100 * floats) // (16 * config["vocab_size"]) + 4 * 32 // 16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny, torch_dtype=torch.float32, attn_implementation="eager"
    )
    for prompt, scores in zip(prompts, result["scores"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        assert scores[0] is None
        assert scores[1:] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_prompt_is_scored_once_though_its_request_is_begun_anew(tiny: Path) -> None:
    """Of two for which the KV cache has no room at once, one is put back while it generates."""
    prompts = [[3 + (7 * i + n) % 90 for i in range(96)] for n in range(2)]
    engine = {"model": str(tiny), "skip_tokenizer_init": True, "num_gpu_blocks_override": 18}
    [result] = engines.results(SCORE, {"engine": engine, "prompts": prompts, "tokens": 100})
    assert result["preempted"]
    assert [len(scores) for scores in result["scores"]] == [96, 96]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("architecture", "settings", "operators"),
    [
        ("Llama", {"rope_scaling": LLAMA3}, ["rotary_and_cache"]),
        ("Gemma", {"head_dim": 16}, ["rotary_and_cache", "gelu_and_mul"]),
        ("GPTJ", {"rotary_dim": 8}, ["rotary_and_cache", "gelu_new"]),
        ("GPT2", {"activation_function": "gelu_fast"}, ["gelu_fast"]),
        ("GPT2", {"activation_function": "quick_gelu"}, ["gelu_quick"]),
    ],
)
def test_layers_go_through_our_operators_and_change_no_token(
    architecture: str, settings: dict[str, Any], operators: list[str], tmp_path: Path
) -> None:
    """Tiny models with random weights: the tokens are those of Hugging Face."""
    names = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64}
    if architecture.startswith("GPT"):
        names = {"n_head": 4, "n_layer": 2, "n_embd": 64}
    elif architecture in ("Llama", "Gemma"):
        names |= {"num_key_value_heads": 2, "intermediate_size": 128}
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=256, bos_token_id=1, eos_token_id=0, initializer_range=0.2, **names, **settings
    )
    torch.manual_seed(37)
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{architecture}{suffix}")(config).float().eval()
    model.save_pretrained(tmp_path)
    ids = list(selftest.PROMPTS[2])
    for _ in range(5):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3  # far from a near tie
        ids.append(int(best.indices[0]))
    engine = {"model": str(tmp_path), "skip_tokenizer_init": True}
    result = run(engine, [selftest.PROMPTS[2]], 5)
    for operator in operators:
        assert result["calls"][operator] == 2 * 5
    assert result["tokens"][0] == ids[len(selftest.PROMPTS[2]) :]


def test_half_is_fp16_storage(tiny: Path) -> None:
    engine = {"model": str(tiny), "skip_tokenizer_init": True, "dtype": "half"}
    result = run(engine, [selftest.PROMPTS[0]], 2)
    assert (result["dtype"], result["cache"]) == ("torch.float16", "torch.float16")
    assert result["tokens"][0] == list(selftest.EXPECTED[0][:2])


def test_a_bf16_checkpoint_is_converted_with_one_warning(tiny: Path, tmp_path: Path) -> None:
    stored = load_file(tiny / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in stored.items()}
    wide = {name: tensor.float() for name, tensor in rounded.items()}
    for dtype, tensors in (("bfloat16", rounded), ("float32", wide)):
        (tmp_path / dtype).mkdir()
        config = selftest.CONFIG | {"torch_dtype": dtype}
        (tmp_path / dtype / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / dtype / "model.safetensors")
    prompts = [list(selftest.PROMPTS[0])]
    same = run({"model": str(tmp_path / "float32"), "skip_tokenizer_init": True}, prompts, 6)
    engine = {"model": str(tmp_path / "bfloat16"), "skip_tokenizer_init": True}
    said = engines.said(RUN, {"engine": engine, "prompts": prompts, "tokens": 6})
    assert said.count("Falling back to torch.float32") == 1
    assert engines.results_in(said) == [same]
    assert same["dtype"] == "torch.float32"


def test_chunked_prefill_and_prefix_cache_change_no_token(tiny: Path) -> None:
    prompt = [1, *range(40, 75)]
    engine = {"model": str(tiny), "skip_tokenizer_init": True, "max_num_batched_tokens": 128}
    whole = run(engine, [prompt, prompt], 6)["tokens"]
    chunked = run(engine | {"max_num_batched_tokens": 8}, [prompt, prompt], 6)["tokens"]
    assert whole == chunked
    assert whole[0] == whole[1]


def test_tensor_parallel_of_two_gives_the_same_tokens(tiny: Path) -> None:
    code = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    e = LLM(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128,\n"
        "            tensor_parallel_size=2, max_num_seqs=4)\n"
        "    o = e.generate([{'prompt_token_ids': json.loads(sys.argv[2])}],\n"
        "                   SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))\n"
        "    print('RESULT', list(o[0].outputs[0].token_ids))\n"
    )
    script = tiny / "tp.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, tiny, json.dumps(selftest.PROMPTS[0])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "0.1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"RESULT {list(selftest.EXPECTED[0][:6])}" in done.stdout
