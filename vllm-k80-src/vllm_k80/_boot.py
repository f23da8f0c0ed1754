"""Completes torch, transformers and xformers at the moment they are imported.

`vllm_k80.pth` imports this module when the interpreter starts, in every process of
the environment: the API server, the engine and the workers that it spawns. It only
puts a finder in front of `sys.meta_path`; the work is done when somebody imports one
of the modules below, right after that module has been executed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Execute = Callable[[ModuleType], None]


def _import_torch(module: ModuleType, execute: Execute) -> None:
    execute(module)
    from vllm_k80.compat import install

    install(module)


def _import_transformers_utils(module: ModuleType, execute: Execute) -> None:
    from vllm_k80.compat.transformers_version import execute_accepting_old_torch

    execute_accepting_old_torch(module, execute)


def _import_xformers_attention(module: ModuleType, execute: Execute) -> None:
    execute(module)
    from vllm_k80.xformers_operator import register

    register(module)


_IMPORTERS: dict[str, Callable[[ModuleType, Execute], None]] = {
    "torch": _import_torch,
    "transformers.utils.import_utils": _import_transformers_utils,
    "xformers.ops.fmha": _import_xformers_attention,
}


class _Completer(MetaPathFinder):
    """Wraps the execution of a module's own code, without replacing its loader."""

    def __init__(self) -> None:
        self._pending = dict(_IMPORTERS)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "transformers" and "torch" in self._pending:
            # torch 2.0.1's dynamo, which completing torch imports, patches a transformers that
            # is already there and fails on one that is half imported. So torch comes first.
            importlib.import_module("torch")
        importer = self._pending.pop(name, None)
        if importer is None:
            return None
        # `name` is no longer pending, so this look-up goes to the finders behind us.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: importer(module, execute)  # type: ignore[method-assign]
        return spec


if not any(isinstance(finder, _Completer) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Completer())
