"""The platform as vLLM asks it, on this host and on faked devices."""

import subprocess
import sys

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import _Backend

from vllm_k80 import platform
from vllm_k80.platform import K80Platform


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, int]:
    """A CUDA device of the capability in the parameter, as torch would report it."""
    capability: tuple[int, int] = request.param
    properties = type("Properties", (), {"total_memory": 4 * 1024**3})()
    monkeypatch.setattr(platform, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Fake")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
    return capability


def test_vllm_found_the_plugin() -> None:
    assert isinstance(current_platform, K80Platform)
    assert current_platform.is_out_of_tree()


def test_a_host_without_a_gpu_decides_as_a_k80() -> None:
    assert current_platform.get_device_capability() == (3, 7)
    assert current_platform.get_device_total_memory() == 11_441 * 1024**2
    assert current_platform.supported_dtypes == [torch.float32, torch.float16]


@pytest.mark.parametrize("fake_gpu", [(3, 5), (3, 7), (5, 2), (7, 0)], indirect=True)
def test_faked_devices(fake_gpu: tuple[int, int]) -> None:
    instance = K80Platform()
    assert instance.get_device_capability() == fake_gpu
    assert instance.get_device_total_memory() == 4 * 1024**3
    first = torch.float16 if fake_gpu >= (5, 3) else torch.float32
    assert instance.supported_dtypes[0] is first
    choose = instance.get_attn_backend_cls
    arguments = (64, torch.float32, "auto", 16, True, False)
    for backend in (None, _Backend.XFORMERS, _Backend.XFORMERS_VLLM_V1):
        assert choose(backend, *arguments) == "vllm_k80.attention.K80AttentionBackend"
    for backend in (_Backend.FLASH_ATTN, _Backend.FLASHINFER, _Backend.FLEX_ATTENTION):
        with pytest.raises(ValueError, match=backend.name):
            choose(backend, *arguments)


def test_attention_kinds_without_an_operator_are_refused() -> None:
    with pytest.raises(ValueError, match="Multi-head latent attention"):
        K80Platform.get_attn_backend_cls(None, 64, torch.float32, None, 16, True, True)
    with pytest.raises(ValueError, match="sinks"):
        K80Platform.get_attn_backend_cls(None, 64, torch.float32, None, 16, True, False, True)


def test_v0_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V1", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V1=0"):
        K80Platform.pre_register_and_update()


def test_cpu_kv_cache_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.cpu_kv_cache_limit() == 1024**3
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.5")
    assert platform.cpu_kv_cache_limit() == 1024**3 // 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_USE_V1", "0"),
        ("VLLM_ATTENTION_BACKEND", "FLASH_ATTN"),
        ("VLLM_K80_REQUIRE_GPU", "1"),
    ],
)
def test_serve_refuses_settings_in_one_line(
    variable: str, value: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    done = subprocess.run(
        [sys.executable, "-m", "vllm_k80.cli", "serve", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-k80: ")
    assert value in last
    assert "Traceback" not in done.stderr
