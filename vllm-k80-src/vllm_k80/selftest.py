"""``vllm-k80 selftest``: a tiny model with known weights must generate its known tokens here.

The weights come from numpy's legacy generator, whose stream is frozen for good
(NumPy enhancement proposal 19), so every installation makes the same model. It has what a
served model has: grouped-query attention, rotary embedding, RMS norms and SwiGLU, through
the whole engine.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ((1, 17, 200, 33, 5), (1, 250), (1, *range(40, 75)))
TOKENS = 12

# Greedy continuations of PROMPTS, equal to Hugging Face's LlamaForCausalLM on the same weights
# in FP32 (tests/test_selftest.py). The smallest gap between the best and the second best
# logit along them is over 1e-2, a thousand times the rounding of FP32.
EXPECTED: tuple[tuple[int, ...], ...] = (
    (254, 56, 233, 86, 65, 158, 210, 122, 118, 133, 181, 128),
    (151, 213, 216, 233, 194, 248, 204, 29, 103, 43, 151, 93),
    (213, 231, 0, 233, 150, 218, 155, 233, 47, 178, 229, 201),
)

_SEED = 37
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _FEED_FORWARD, _VOCABULARY = 2, 64, 4, 2, 128, 256

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _FEED_FORWARD,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def write_model(directory: Path) -> None:
    """Write the checkpoint: `config.json` and `model.safetensors`, FP32, about 0.4 MB."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.RandomState(_SEED)
    head = _HIDDEN // _HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (_HEADS * head, _HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (_KV_HEADS * head, _HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (_KV_HEADS * head, _HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (_HIDDEN, _HEADS * head),
            f"{prefix}mlp.gate_proj.weight": (_FEED_FORWARD, _HIDDEN),
            f"{prefix}mlp.up_proj.weight": (_FEED_FORWARD, _HIDDEN),
            f"{prefix}mlp.down_proj.weight": (_HIDDEN, _FEED_FORWARD),
            f"{prefix}input_layernorm.weight": (_HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (_HIDDEN,),
        }
    shapes |= {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}
    # 0.25 keeps the hidden state from vanishing in two layers; norms vary around one.
    tensors = {
        name: (random.standard_normal(shape) * 0.25 + (1.0 if len(shape) == 1 else 0.0)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def generate(directory: Path) -> tuple[tuple[int, ...], ...]:
    """Greedy continuations of `PROMPTS` by the engine, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
        # A die that serves has little memory to spare; this model needs next to none.
        gpu_memory_utilization=0.1,
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = engine.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], sampling, use_tqdm=False
    )
    return tuple(tuple(output.outputs[0].token_ids) for output in outputs)


def run() -> int:
    """Print the verdict in one line; returns the exit status.

    Raises:
        UserError: it is to run on a GPU, and there is none.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_k80.platform import check_gpu

    check_gpu()
    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="vllm-k80-selftest-") as name:
        directory = Path(name)
        write_model(directory)
        with contextlib.redirect_stdout(log):
            generated = generate(directory)
    import torch

    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "the CPU (no GPU here)"
    for index, (tokens, expected) in enumerate(zip(generated, EXPECTED, strict=True)):
        if tokens != expected:
            print(
                f"vllm-k80: selftest FAILED on {where}: prompt {index} gave {list(tokens)} instead "
                f"of {list(expected)}. This device computes wrongly: do not serve from it.",
                file=sys.stderr,
            )
            return 1
    print(f"selftest passed on {where}: {len(EXPECTED)} x {TOKENS} tokens as expected")
    return 0
