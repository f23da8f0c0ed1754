"""The selftest's expected tokens come from Hugging Face, and it fails when it should."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_k80 import selftest
from vllm_k80.errors import UserError

pytestmark = pytest.mark.engine


def test_expected_tokens_are_hugging_faces(tmp_path: Path) -> None:
    selftest.write_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for prompt, expected in zip(selftest.PROMPTS, selftest.EXPECTED, strict=True):
        ids = list(prompt)
        for _ in range(selftest.TOKENS):
            with torch.no_grad():
                best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-2  # far from a near tie
            ids.append(int(best.indices[0]))
        assert tuple(ids[len(prompt) :]) == expected


def test_where_a_die_is_meant_the_cpu_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_K80_REQUIRE_GPU", "1")
    with pytest.raises(UserError, match="CUDA finds no device here"):
        selftest.run()


@pytest.mark.parametrize("broken", [False, True])
def test_verdict(broken: bool) -> None:
    """As a user runs it; the negative control adds 1 % to one activation function."""
    code = "import sys; from vllm_k80 import cli; "
    if broken:
        code += (
            "from vllm_k80 import layers; product = layers.unquantized_gemm; "
            "layers.unquantized_gemm = lambda layer, *x: "
            "product(layer, *x) * (1.01 if hasattr(layer, 'gated') else 1); "
        )
    code += "sys.exit(cli.main(['selftest']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == int(broken), done.stderr
    if broken:
        assert "selftest FAILED" in done.stderr
    else:
        assert "selftest passed on the CPU" in done.stdout
