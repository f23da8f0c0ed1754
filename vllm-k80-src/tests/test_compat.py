"""What `vllm_k80.compat` adds to torch 2.0.1, used as its callers use it."""

import pickle
import subprocess
import sys

import pytest
import torch

from vllm_k80.compat import install, needs_completion
from vllm_k80.compat.torch20 import MissingDtype


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.0.1+cu117", True), ("1.13.1", True), ("2.1.0", False), ("2.11.0+cu130", False)],
)
def test_only_old_torch_is_completed(version: str, needed: bool) -> None:
    assert needs_completion(version) is needed


def test_newer_torch_is_left_alone() -> None:
    class NewTorch:
        __version__ = "2.1.0"

    install(NewTorch)  # type: ignore[arg-type]
    assert vars(NewTorch).keys() & {"compiler", "compile", "finfo"} == set()


@pytest.mark.parametrize("order", [("torch", "transformers"), ("transformers", "torch"), ("vllm",)])
def test_any_import_order_works(order: tuple[str, ...]) -> None:
    """torch 2.0.1's dynamo fails on a half imported transformers; the hook orders them."""
    code = "; ".join(f"import {name}" for name in order) + (
        "; import torch, transformers"
        "; assert torch.compiler.is_compiling() is False"
        "; assert transformers.utils.is_torch_available()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Disabling PyTorch" not in done.stderr


def test_tensor_nbytes() -> None:
    assert torch.ones(3, 5, dtype=torch.float16).nbytes == 30


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]
)
def test_itemsize_is_the_element_size(dtype: torch.dtype) -> None:
    assert dtype.itemsize == torch.empty(0, dtype=dtype).element_size()


def test_missing_dtypes_are_keys_but_not_storage() -> None:
    float8 = torch.float8_e4m3fn
    assert isinstance(float8, MissingDtype)
    assert {float8: 1}[torch.float8_e4m3fn] == 1
    assert float8 != torch.float8_e5m2
    assert pickle.loads(pickle.dumps(float8)) is float8
    with pytest.raises(TypeError):
        torch.empty(1, dtype=float8)


def test_finfo_of_real_and_missing_dtypes() -> None:
    assert torch.finfo(torch.float16).max == 65504.0
    assert isinstance(torch.finfo(torch.float32), torch.finfo)
    assert torch.finfo(torch.float8_e4m3fn).max == 448.0
    with pytest.raises(TypeError, match="no limits"):
        torch.finfo(torch.float8_e8m0fnu)


def test_compile_changes_nothing() -> None:
    @torch.compile(dynamic=True)
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8
    assert torch.compile(double) is double


def test_infer_schema_and_fragment() -> None:
    def scale_(x: torch.Tensor, by: float, bias: torch.Tensor | None = None, n: int = 2) -> None:
        x.mul_(by)

    schema = torch.library.infer_schema(scale_, mutates_args=["x"])
    assert schema == "(Tensor(a0!) x, float by, Tensor? bias=None, SymInt n=2) -> ()"
    library = torch.library.Library("vllm_k80_test", "FRAGMENT")
    library.define("scale_" + schema)
    library.impl("scale_", scale_, "CPU")
    x = torch.ones(2)
    torch.ops.vllm_k80_test.scale_(x, 3.0)
    assert x.tolist() == [3.0, 3.0]


def test_infer_schema_refuses_what_it_has_no_word_for() -> None:
    def odd(x: dict[str, int]) -> None: ...

    with pytest.raises(ValueError, match="odd: no operator schema"):
        torch.library.infer_schema(odd)


def test_load_state_dict_assign() -> None:
    module = torch.nn.Linear(2, 2, bias=False)
    weight = torch.arange(4.0).view(2, 2)
    module.load_state_dict({"weight": weight}, assign=True)
    assert module.weight.data_ptr() == weight.data_ptr()
    with pytest.raises(RuntimeError, match="no parameter or buffer 'other'"):
        module.load_state_dict({"other": weight}, assign=True)


def test_every_torch_name_that_vllm_uses_for_serving_resolves() -> None:
    """The modules of the serving path import: none names something torch still lacks."""
    modules = (
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.worker.gpu_worker",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    )
    code = "\n".join(f"import {name}" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fp16_on_the_cpu_is_computed_in_fp32_and_rounded_once() -> None:
    x = torch.randn(3, 8).half()
    weight, bias = torch.randn(8).half(), torch.randn(8).half()
    norm = torch.nn.LayerNorm(8)
    norm.weight.data, norm.bias.data = weight.float(), bias.float()
    expected = norm(x.float()).half()
    assert torch.equal(norm.half()(x), expected)
    for layer in (torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU("tanh"), torch.nn.ReLU()):
        assert torch.equal(layer(x), layer(x.float()).half())
        assert layer(x.double()).dtype is torch.float64
