"""SmolLM2's greedy tokens are Hugging Face's, on the same weights dequantized to FP32."""

import json
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
import torch

from vllm_k80.ops import k80
from vllm_k80.quantization.gguf_file import extract_metadata, shared_reader
from vllm_k80.serve import metadata_cache

pytestmark = pytest.mark.engine

TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "The three primary colours are",
    "Q: What is the largest planet of the solar system?\nA:",
    "Dear Ms. Smith,\n\nThank you for your letter of",
    "1, 1, 2, 3, 5, 8,",
    "To bake bread you need flour,",
    "In 1969, Neil Armstrong",
    "Photosynthesis is the process by which",
    '{"name": "Anna", "age":',
    "The opposite of hot is",
    "Shakespeare wrote plays such as",
    "SELECT name FROM users WHERE",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
    "Grüße aus Köln! Das Wetter ist",
    "A list of fruits:\n- apple\n- banana\n-",
]


def engine(gguf: Path) -> None:
    """Print RESULT {"prompts": [[token, ...], ...], "plain": ..., "broken": ...}.

    The tokens of all prompts, as they are and with a broken attention mask.
    """
    from vllm import LLM, SamplingParams

    metadata = str(extract_metadata(gguf, metadata_cache()))
    llm = LLM(
        model=str(gguf),
        tokenizer=metadata,
        hf_config_path=metadata,
        max_model_len=256,
        max_num_seqs=len(PROMPTS),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(tokens: int) -> list[Any]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return llm.generate(PROMPTS, sampling, use_tqdm=False)

    plain = generate(TOKENS)
    real = k80.varlen_attention

    def near_sighted(*args: Any) -> None:
        """A query does not see farther back than four keys."""
        real(*args[:7], 4, *args[8:])

    k80.varlen_attention = near_sighted
    broken = generate(TOKENS // 4)
    result = {
        "prompts": [list(output.prompt_token_ids) for output in plain],
        "plain": [list(output.outputs[0].token_ids) for output in plain],
        "broken": [list(output.outputs[0].token_ids) for output in broken],
    }
    print("RESULT " + json.dumps(result))


@pytest.fixture(scope="module")
def generated(smollm2: Path) -> dict[str, list[list[int]]]:
    code = (
        "import json, pathlib, sys, test_smollm2; "
        "test_smollm2.engine(pathlib.Path(json.loads(sys.argv[1])))"
    )
    # The engine in that very process, so that its mask can be broken.
    [result] = engines.results(code, str(smollm2), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    found: dict[str, list[list[int]]] = result
    return found


@pytest.fixture(scope="module")
def hugging_face(smollm2: Path) -> Any:
    """transformers' own reading of the file; from_pretrained would do this, and want accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with shared_reader():
        config = AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        weights = load_gguf_checkpoint(smollm2, return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(weights["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model.eval()


def agreements(model: Any, prompts: list[list[int]], continuations: list[list[int]]) -> list[bool]:
    """Whether each continuation is the model's own greedy one.

    One pass over prompt and continuation suffices: if at every place the token that follows is the
    most probable one, then, by induction, greedy generation takes just these.
    """
    same = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0]
        greedy = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        same.append(greedy == continuation)
    return same


def test_twenty_of_twenty(hugging_face: Any, generated: dict[str, list[list[int]]]) -> None:
    same = agreements(hugging_face, generated["prompts"], generated["plain"])
    differing = [prompt for prompt, equal in zip(PROMPTS, same, strict=True) if not equal]
    assert not differing
    assert [len(tokens) for tokens in generated["plain"]] == [TOKENS] * 20
    assert len({tuple(tokens) for tokens in generated["plain"]}) == 20


def test_a_broken_mask_is_noticed(hugging_face: Any, generated: dict[str, list[list[int]]]) -> None:
    assert not any(agreements(hugging_face, generated["prompts"], generated["broken"]))


if __name__ == "__main__":
    engine(Path(sys.argv[1]))
