"""Which architectures are served: each that vLLM registers is judged, and refused in words."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from vllm.model_executor.models import registry

from vllm_k80 import architectures, cli, platform, serve
from vllm_k80.architectures import ARCHITECTURES, State, gguf_refusal, refusal, state
from vllm_k80.errors import UserError
from vllm_k80.ops.attention_reference import MAX_HEAD_SIZE
from vllm_k80.quantization.gguf_file import extract_metadata

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "rope_theta": 500000.0,
}


def test_every_architecture_that_vllm_registers_is_judged() -> None:
    assert set(registry._VLLM_MODELS) - set(ARCHITECTURES) == set()


def test_none_is_judged_twice() -> None:
    lists = [architectures._UNPROVEN, *(names for *_, names in architectures._REFUSED)]
    names = [*architectures._PROVEN, *(name for text in lists for name in text.split())]
    assert sorted(names) == sorted(set(names))


def test_what_is_served_is_known_to_vllm_and_needs_nothing_that_is_refused() -> None:
    """By vLLM's own description of each model's class, which imports it."""
    for name, architecture in ARCHITECTURES.items():
        if architecture.state is State.REFUSED:
            continue
        module, cls = registry._VLLM_MODELS[name]
        model = registry._LazyRegisteredModel(f"vllm.model_executor.models.{module}", cls)
        info = registry._ModelInfo.from_model_cls(model.load_model_cls())
        assert info.is_text_generation_model, name
        for kind in ("has_inner_state", "is_attention_free", "is_hybrid", "supports_v0_only"):
            assert not getattr(info, kind), (name, kind)
        assert not info.supports_multimodal, name


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.state is State.REFUSED])
def test_a_refusal_has_a_reason_and_an_alternative(name: str) -> None:
    found = refusal(LLAMA | {"architectures": [name]})
    assert found is not None
    assert found.startswith(f"Architecture {name} is not served on a K80 (")
    assert "). Use a" in found or "). Use the" in found
    assert found.endswith(".")


@pytest.mark.parametrize("name", ["Qwen7ForCausalLM", "LlamaForSequenceClassification"])
def test_what_nobody_has_judged_is_refused(name: str) -> None:
    assert f"Architecture {name} is unknown" in str(refusal({"architectures": [name]}))
    assert state({"architectures": [name]}) is State.REFUSED


def test_states() -> None:
    assert state(LLAMA) is State.PROVEN
    assert state(LLAMA | {"architectures": ["OlmoForCausalLM"]}) is State.UNPROVEN
    # vLLM takes the first that it knows.
    assert state(LLAMA | {"architectures": ["Other", "LlamaForCausalLM"]}) is State.PROVEN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": None}, "config.json names no architecture"),
        ({"num_local_experts": 8}, r"with 8 experts \(num_local_experts\)"),
        ({"moe_num_experts": [0, 16]}, "16 experts"),
        ({"vision_config": {"hidden_size": 8}}, "a tower for images or sound"),
        ({"is_causal": False}, "attention to later tokens"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual chunk attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
        ({"head_dim": 100}, "heads of size 100"),
        ({"head_dim": MAX_HEAD_SIZE + 8}, f"heads of size {MAX_HEAD_SIZE + 8}"),
        ({"hidden_size": 3200}, "heads of size 100"),
        ({"rope_scaling": {"type": "deepseek_yarn"}}, "rope scaling of kind deepseek_yarn"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope scaling of kind mrope"),
        (
            {"architectures": ["StableLmForCausalLM"], "qk_layernorm": True},
            "qk_layernorm, which vLLM 0.10.1.1 does not read",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters, in which transformers 5"),
        (
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}},
            "rope_parameters, in which transformers 5",
        ),
    ],
)
def test_features_without_an_operator_are_refused(settings: dict[str, Any], message: str) -> None:
    assert re.search(message, str(refusal(LLAMA | settings)))


@pytest.mark.parametrize(
    "settings",
    [
        *({"head_dim": size} for size in (64, 80, 96, 112, 120, 128, 192, 256)),
        {"num_local_experts": 0, "num_experts": 1, "n_routed_experts": None},
        {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        *({"rope_scaling": {"type": kind}} for kind in architectures._ROPE_KINDS),
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"hidden_size": None, "n_embd": 768, "num_attention_heads": None, "n_head": 12},
        {"hidden_size": None},
    ],
)
def test_features_with_an_operator_pass(settings: dict[str, Any]) -> None:
    assert refusal(LLAMA | settings) is None


def test_head_sizes_are_those_of_the_operators() -> None:
    assert architectures.MAX_HEAD_SIZE == MAX_HEAD_SIZE


def test_serve_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LLAMA | {"architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["serve", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vllm-k80: {tmp_path}: Architecture MixtralForCausalLM is not served")


def test_serve_does_not_judge_a_configuration_that_flags_change(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 100}))
    with pytest.raises(UserError, match="heads of size 100"):
        serve.server_arguments(str(tmp_path), [])
    for flag in ('--hf-overrides={"head_dim": 128}', f"--hf-config-path={tmp_path}"):
        assert serve.server_arguments(str(tmp_path), [flag])[:2] == ["serve", str(tmp_path)]


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        serve.server_arguments(str(tmp_path), [])


class Configuration:
    """One of transformers', as far as the platform asks it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.architectures = settings, settings["architectures"]

    def to_dict(self) -> dict[str, Any]:
        return self.settings


@pytest.mark.parametrize("settings", [{"architectures": ["BambaForCausalLM"]}, {"num_experts": 8}])
def test_the_engine_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not served on a K80"):
        platform.check_architecture(Configuration(LLAMA | settings))


def test_the_engine_warns_once_of_what_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(platform.logger, "warning", lambda text, *a, **_: said.append(text % a))
    platform.check_architecture(Configuration(LLAMA))
    assert said == []
    for _ in range(2):
        platform.check_architecture(Configuration(LLAMA | {"architectures": ["OlmoForCausalLM"]}))
    [line] = said
    assert line.startswith("Architecture OlmoForCausalLM should be served rightly, but no test")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", None),
        ("qwen3", None),
        ("phi3", None),
        ("gemma2", "llama.cpp changes its tensors"),
        ("qwen3moe", "no operator runs it"),
        ("newer", "no operator runs it"),
    ],
)
def test_gguf(name: str, message: str | None) -> None:
    found = gguf_refusal({"general.architecture": name})
    assert (found is None) == (message is None)
    assert (message or "") in (found or "")


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("gemma2", 0, "GGUF files of architecture gemma2 are not"),
        ("llama", 8, "A mixture of 8 experts, which need Triton, is not served .* Use a dense"),
    ],
)
def test_a_gguf_file_of_a_refused_architecture_is_refused(
    tmp_path: Path, name: str, experts: int, message: str
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, name)
    if experts:  # a Mixtral's files have the architecture of a Llama
        writer.add_expert_count(experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=rf"model\.gguf: {message}"):
        extract_metadata(path, tmp_path / "cache")


def test_the_table_is_printed_without_torch_and_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None)\n"
        "from vllm_k80 import cli; cli.main(['support'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    proven, rest = done.stdout.split("Architectures not proven")
    unproven, refused = rest.split("Architectures refused:")
    parts = {State.PROVEN: proven, State.UNPROVEN: unproven, State.REFUSED: refused}
    for name, architecture in ARCHITECTURES.items():
        assert re.search(rf"\b{name}\b", parts[architecture.state])
        assert architecture.what in parts[architecture.state]
        assert architecture.instead in parts[architecture.state]
