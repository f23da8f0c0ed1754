"""What of quantizations is served, and that the rest is refused in words before it is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import quantization
from vllm.platforms import current_platform

from vllm_k80 import cli, serve
from vllm_k80.errors import UserError
from vllm_k80.quantization import awq, compressed, gguf, gptq, k80, methods
from vllm_k80.quantization.gguf_file import SUPPORTED_TYPES

OURS = {
    "gguf": gguf.K80GGUFConfig,
    "gptq": gptq.K80GPTQConfig,
    "awq": awq.K80AWQConfig,
    "compressed-tensors": compressed.K80CompressedTensorsConfig,
    "k80-w4": k80.K80W4Config,
    "k80-w8": k80.K80W8Config,
    "k80-f16": k80.K80F16Config,
}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    EngineArgs(model="x")  # loads vLLM's plugins, ours with them


def test_every_method_that_vllm_registers_is_in_the_table() -> None:
    assert set(quantization.QUANTIZATION_METHODS) == set(methods.METHODS)


def test_what_is_served_are_our_classes() -> None:
    served = {name for name, method in methods.METHODS.items() if method.served}
    assert served == set(OURS)
    for name, config in OURS.items():
        assert quantization.get_quantization_config(name) is config
        current_platform.verify_quantization(name)


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - set(OURS)))
def test_what_is_not_served_is_refused_with_reason_and_alternative(name: str) -> None:
    method = methods.METHODS[name]
    with pytest.raises(ValueError, match="is not served on a K80") as raised:
        current_platform.verify_quantization(name)
    assert str(raised.value).startswith(f"Quantization {name} ")
    assert f"({method.what})" in str(raised.value)
    assert str(raised.value).endswith(f"Use {method.instead}.")


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["support"]) == 0
    served, refused = capsys.readouterr().out.split("Quantizations refused:")
    for name, method in methods.METHODS.items():
        line = next(
            line
            for line in (served if method.served else refused).splitlines()
            if f" {name} " in line
        )
        assert method.what in line
        assert method.instead in line
    assert all(kind in served for kind in SUPPORTED_TYPES)


def test_the_table_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, vllm=None)\n"
        "from vllm_k80 import cli; cli.main(['support'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Quantizations refused:" in done.stdout, done.stderr


GROUP = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}


def with_group(**changes: Any) -> dict[str, Any]:
    weights = GROUP["weights"] | changes.pop("weights", {})
    return {
        "quant_method": "compressed-tensors",
        "format": changes.pop("format", "pack-quantized"),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights} | changes},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


def write_config(directory: Path, quantization: dict[str, Any]) -> None:
    """A config.json of a Llama that is quantized so."""
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, "GPTQ of 3 bits"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "packed for bitblas"),
        (AWQ | {"bits": 8}, "AWQ of 8 bits"),
        (AWQ | {"zero_point": False}, "AWQ without zero points"),
        (AWQ | {"version": "GEMV"}, "packed for gemv"),
        (
            with_group(format="int-quantized", input_activations={"num_bits": 8}),
            r"quantized activations \(int, int-quantized\)",
        ),
        (with_group(format="float-quantized", weights={"type": "float", "num_bits": 8}), "float"),
        (with_group(format="nvfp4-pack-quantized", weights={"type": "float"}), "nvfp4"),
        (with_group(format="marlin-24"), "marlin-24"),
        (with_group(weights={"num_bits": 3}), "weights of 3 bits"),
        (with_group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    ],
)
def test_variants_that_are_not_served_are_refused_by_config_and_command(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{message}.* not served.*Use "):
        OURS[config["quant_method"]].from_config(config)
    write_config(tmp_path, config)
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*{message}"):
        serve.server_arguments(str(tmp_path), [])


@pytest.mark.parametrize("config", [GPTQ, AWQ, with_group(), GPTQ | {"bits": 8}])
def test_variants_that_are_served_pass(config: dict[str, Any], tmp_path: Path) -> None:
    OURS[config["quant_method"]].from_config(config)
    write_config(tmp_path, config)
    assert serve.server_arguments(str(tmp_path), [])[:2] == ["serve", str(tmp_path)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "Quantization fp8 is not served"),
        ({"quant_method": "compressed_tensors", "config_groups": {}}, None),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "Quantization marlin "),
        ({"quant_method": "aqlm"}, "Quantization aqlm is unknown here. Use a GPTQ or AWQ"),
        ({"load_in_4bit": True}, "Quantization bitsandbytes is not served"),
        ({"bits": 2}, "Quantization (unnamed) is unknown here"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "Quantization modelopt is not served"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "Quantization modelopt_fp4 is not"),
        *(
            ({"quant_method": name}, f"Quantization {name} is not served on a K80 ({method.what})")
            for name, method in methods.METHODS.items()
            if not method.served
        ),
    ],
)
def test_methods_of_checkpoints(config: dict[str, Any], message: str | None) -> None:
    refusal = methods.checkpoint_refusal(config)
    assert (refusal is None) == (message is None)
    assert (refusal or "").startswith(message or "")


@pytest.mark.parametrize(
    "flags", [["--quantization", "fp8"], ["--quantization=fp8"], ["-q", "fp8"], ["-q=fp8"]]
)
def test_a_flag_for_what_is_not_served_is_refused_in_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["serve", str(tmp_path), *flags]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm-k80: Quantization fp8 is not served on a K80 (8-bit floats")


def test_quantizing_what_is_quantized_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, GPTQ)
    with pytest.raises(UserError, match=r"quantized already, by gptq\. Leave --quantization out"):
        serve.server_arguments(str(tmp_path), ["--quantization", "k80-w4"])


def test_the_servers_command_line_takes_ours() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for name in ("k80-w4", "k80-w8", "k80-f16"):
        assert parser.parse_args(["--quantization", name]).quantization == name
