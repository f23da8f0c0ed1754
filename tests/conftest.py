"""Fixtures shared by the tests of the roles and tools."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from judge import Judge

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def load_module() -> Callable[[str], ModuleType]:
    """Imports a module, plug-in or program of a role by its path in the repository."""

    def load(path: str) -> ModuleType:
        # The loader is named for programs, whose names have no ending.
        name = Path(path).stem.replace("-", "_")
        loader = SourceFileLoader(name, str(ROOT / path))
        spec = importlib.util.spec_from_file_location(name, ROOT / path, loader=loader)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and named tuples look their module up.
        sys.modules.setdefault(name, module)
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
