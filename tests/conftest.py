"""Fixtures shared by the tests of the roles and tools."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from judge import Judge

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def load_module() -> Callable[[str], ModuleType]:
    """Imports a module or plug-in of a role by its path in the repository."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def judge(load_module: Callable[[str], ModuleType]) -> Judge:
    """The checks of preflight."""
    return Judge(
        load_module("roles/preflight/library/k80_host.py"),
        load_module("roles/preflight/action_plugins/preflight_findings.py"),
    )
