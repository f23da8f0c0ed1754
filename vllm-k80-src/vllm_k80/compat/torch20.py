"""The pieces of torch >= 2.1 that this stack names, for torch 2.0.1.

Each function adds one piece and says who needs it. They run in order, once, right
after torch has been imported (`vllm_k80._boot`).
"""

import contextlib
import ctypes
import datetime
import functools
import gc
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any


def _identity_decorator(function: Any = None, *_: Any, **__: Any) -> Any:
    """``@decorator`` and ``@decorator(...)`` that change nothing."""
    return function if callable(function) else (lambda f: f)


def _add_missing(target: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        if not hasattr(target, name):
            setattr(target, name, value)


def add_compiler(torch: ModuleType) -> None:
    """``torch.compiler`` (2.1): transformers' modeling files, vllm.compilation, vLLM's layers."""
    compiler = ModuleType("torch.compiler")
    _add_missing(
        compiler,
        disable=_identity_decorator,
        allow_in_graph=_identity_decorator,
        assume_constant_result=_identity_decorator,
        is_compiling=lambda: False,
        is_dynamo_compiling=lambda: False,
        cudagraph_mark_step_begin=lambda: None,
        reset=lambda: None,
        set_stance=lambda *_, **__: contextlib.nullcontext(),
    )
    sys.modules["torch.compiler"] = compiler
    torch.compiler = compiler  # type: ignore[attr-defined]
    # Decorates at import time in vLLM (vocab_parallel_embedding, rejection_sampler); 2.0.1
    # refuses Python 3.11, and there is no Triton for the card, so nothing is compiled.
    torch.compile = _identity_decorator  # type: ignore[attr-defined]


class MissingDtype:
    """Stands where a dtype of a newer torch is named: hashable, comparable, never allocatable."""

    is_floating_point = True
    is_complex = False
    is_signed = True

    def __init__(self, name: str, itemsize: int) -> None:
        self.name = name
        self.itemsize = itemsize

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _missing_dtype, (self.name,)


def _missing_dtype(name: str) -> Any:
    """The one object that stands for this dtype, so that identity survives pickling."""
    import torch

    return getattr(torch, name)


# Bytes an element, and for the float8 kinds the largest finite value (OCP 8-bit floating
# point specification, table 1; the fnuz variants: Noune et al., arXiv:2206.02915).
_MISSING_DTYPES: dict[str, tuple[int, float | None]] = {
    "float8_e4m3fn": (1, 448.0),
    "float8_e4m3fnuz": (1, 240.0),
    "float8_e5m2": (1, 57344.0),
    "float8_e5m2fnuz": (1, 57344.0),
    "float8_e8m0fnu": (1, None),
    "float4_e2m1fn_x2": (1, None),
    "uint16": (2, None),
    "uint32": (4, None),
    "uint64": (8, None),
}


def add_dtypes(torch: ModuleType) -> None:
    """The dtypes after 2.0 (2.1 to 2.8): keys and defaults in vLLM's tables of quantizations."""
    _add_missing(
        torch, **{name: MissingDtype(name, size) for name, (size, _) in _MISSING_DTYPES.items()}
    )


def add_finfo(torch: ModuleType) -> None:
    """``torch.finfo`` of a float8: evaluated at import by vLLM's fp8 layers."""
    real = torch.finfo

    class _FinfoMeta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class finfo(metaclass=_FinfoMeta):
        def __new__(cls, dtype: Any = None) -> Any:
            if not isinstance(dtype, MissingDtype):
                return real() if dtype is None else real(dtype)
            largest = _MISSING_DTYPES[dtype.name][1]
            if largest is None:
                raise TypeError(f"torch.finfo: {dtype!r} has no limits in torch 2.0.1")
            return types.SimpleNamespace(
                dtype=dtype.name, bits=8 * dtype.itemsize, max=largest, min=-largest
            )

    torch.finfo = finfo  # type: ignore[attr-defined]


def add_itemsize(torch: ModuleType) -> None:
    """``dtype.itemsize`` (2.1): sizes of the KV cache. ``dtype`` is a C type: write its dict."""
    sizes = {
        getattr(torch, name): size
        for size, names in {
            1: ("bool", "uint8", "int8", "qint8", "quint8"),
            2: ("float16", "bfloat16", "int16"),
            4: ("float32", "int32", "complex32", "qint32"),
            8: ("float64", "int64", "complex64"),
            16: ("complex128",),
        }.items()
        for name in names
    }
    type_dict = gc.get_referents(torch.dtype.__dict__)[0]
    if "itemsize" not in type_dict:
        type_dict["itemsize"] = property(sizes.__getitem__)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(torch.dtype))


def add_tensor_nbytes(torch: ModuleType) -> None:
    """``Tensor.nbytes`` (2.1): vllm/v1/serial_utils.py.

    Without it a response that carries a tensor (prompt_logprobs, echo) kills the engine's
    output thread, and the server hangs while /health stays 200.
    """
    _add_missing(
        torch.Tensor, nbytes=property(lambda tensor: tensor.numel() * tensor.element_size())
    )


def _schema_of(function: Callable[..., Any], mutates_args: Iterable[str]) -> str:
    """Operator schema of an annotated Python function, as ``torch.library.infer_schema`` (2.4).

    Raises:
        ValueError: an annotation that operator schemas have no word for.
    """
    import torch

    words = {
        torch.Tensor: "Tensor",
        torch.dtype: "ScalarType",
        torch.device: "Device",
        int: "SymInt",
        float: "float",
        bool: "bool",
        str: "str",
    }

    def word(annotation: Any, alias: str = "") -> str:
        if annotation in words:
            return words[annotation] + (alias if annotation is torch.Tensor else "")
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType) and type(None) in arguments:
            return word(next(a for a in arguments if a is not type(None)), alias) + "?"
        if isinstance(origin, type) and issubclass(origin, typing.Sequence):
            return word(arguments[0]) + "[]"
        raise ValueError(f"{function.__qualname__}: no operator schema for {annotation!r}")

    def default(value: Any) -> str:
        if isinstance(value, str):
            return f'="{value}"'
        return f"={str(value).removeprefix('torch.')}"

    hints = typing.get_type_hints(function)
    parameters = [
        word(hints[name], f"(a{index}!)" if name in mutates_args else "")
        + f" {name}"
        + ("" if parameter.default is inspect.Parameter.empty else default(parameter.default))
        for index, (name, parameter) in enumerate(inspect.signature(function).parameters.items())
    ]
    result = hints.get("return")
    if result in (None, type(None)):
        returned = "()"
    elif typing.get_origin(result) is tuple:
        returned = f"({', '.join(word(part) for part in typing.get_args(result))})"
    else:
        returned = word(result)
    return f"({', '.join(parameters)}) -> {returned}"


def add_library(torch: ModuleType) -> None:
    """``Library(ns, "FRAGMENT")``, ``define(tags=)``, ``infer_schema``: vllm/utils/__init__.py.

    2.0.1's C++ knows fragments; only its Python refuses the word.
    """
    library = importlib.import_module("torch.library")
    real_init, real_define = library.Library.__init__, library.Library.define

    def __init__(self: Any, ns: str, kind: str, dispatch_key: str = "") -> None:
        if kind != "FRAGMENT":
            real_init(self, ns, kind, dispatch_key)
            return
        caller = traceback.extract_stack(limit=2)[0]
        self.ns, self.kind, self.dispatch_key = ns, kind, dispatch_key
        self._op_impls = set()
        self.m = torch._C._dispatch_library(kind, ns, dispatch_key, caller.filename, caller.lineno)

    def define(self: Any, schema: str, alias_analysis: str = "", *, tags: Any = ()) -> Any:
        if self.kind == "FRAGMENT":
            return self.m.define(schema, alias_analysis)
        return real_define(self, schema, alias_analysis)

    library.Library.__init__ = __init__
    library.Library.define = define
    _add_missing(library.Library, _register_fake=lambda *_, **__: None, _destroy=lambda self: None)

    def register_fake(op: Any, func: Any = None, /, **_: Any) -> Any:
        return func if func is not None else (lambda f: f)

    def infer_schema(
        prototype: Callable[..., Any], /, *, mutates_args: Iterable[str] = (), op_name: Any = None
    ) -> str:
        return (op_name or "") + _schema_of(prototype, tuple(mutates_args))

    _add_missing(
        library,
        register_fake=register_fake,
        infer_schema=infer_schema,
        # vllm.utils.supports_custom_op() asks only whether the name is there.
        custom_op=_identity_decorator,
    )
    _add_missing(torch.Tag, needs_fixed_stride_order="needs_fixed_stride_order")


def add_distributed(torch: ModuleType) -> None:
    """Names of ``torch.distributed`` after 2.0: vllm/distributed/{utils,parallel_state}.py."""
    distributed = torch.distributed
    if not distributed.is_available():
        return
    c10d = importlib.import_module("torch.distributed.distributed_c10d")
    _add_missing(
        c10d,
        _get_default_timeout=lambda backend=None: datetime.timedelta(minutes=30),
        _unregister_process_group=lambda name: None,
    )

    def is_backend_available(backend: str) -> bool:
        probe = getattr(distributed, f"is_{backend.lower()}_available", None)
        return bool(probe()) if probe else hasattr(distributed.Backend, backend.upper())

    _add_missing(
        distributed,
        DistNetworkError=RuntimeError,
        DistBackendError=RuntimeError,
        is_gloo_available=lambda: True,  # always built into the wheel
        is_backend_available=is_backend_available,
    )


def add_dynamo(torch: ModuleType) -> None:
    """``torch._inductor.config`` as an attribute (vllm/env_override.py), marks of dynamo."""
    importlib.import_module("torch._inductor.config")
    dynamo = importlib.import_module("torch._dynamo")
    nothing = _identity_decorator
    _add_missing(
        dynamo,
        mark_static_address=nothing,
        mark_static=nothing,
        mark_dynamic=nothing,
        maybe_mark_dynamic=nothing,
    )


def add_load_state_dict_assign(torch: ModuleType) -> None:
    """``Module.load_state_dict(assign=True)`` (2.1): transformers' ``from_pretrained``."""
    module_type = torch.nn.Module
    real = module_type.load_state_dict

    @functools.wraps(real)
    def load_state_dict(
        self: Any, state_dict: Any, strict: bool = True, assign: bool = False
    ) -> Any:
        if not assign:
            return real(self, state_dict, strict)
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        for key, value in state_dict.items():
            owner_name, _, leaf = key.rpartition(".")
            owner = self.get_submodule(owner_name)
            if key in parameters:
                trainable = parameters[key].requires_grad and value.is_floating_point()
                owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=trainable)
            elif key in buffers:
                owner._buffers[leaf] = value
            elif strict:
                raise RuntimeError(f"{type(self).__name__} has no parameter or buffer {key!r}")
        missing = (parameters.keys() | buffers.keys()) - state_dict.keys() if strict else ()
        return torch.nn.modules.module._IncompatibleKeys(sorted(missing), [])

    module_type.load_state_dict = load_state_dict


def replace_inference_mode(torch: ModuleType) -> None:
    """``inference_mode`` becomes ``no_grad`` where there is no GPU.

    gloo of 2.0.1 writes its results from another thread, outside the mode: "Inplace update
    to inference tensor outside InferenceMode". vLLM's workers use the decorator directly.
    """
    if torch.cuda.is_available():
        return

    class inference_mode(torch.no_grad):  # type: ignore[name-defined, misc]
        def __new__(cls, mode: bool = True) -> Any:
            return object.__new__(cls)

        def __init__(self, mode: bool = True) -> None:
            super().__init__()

    torch.inference_mode = inference_mode  # type: ignore[attr-defined]


def add_half_on_cpu(torch: ModuleType) -> None:
    """Functions of FP16 on the CPU (2.1), where there is no GPU: in FP32, and rounded once.

    Models whose normalization or activation is torch's own call them with ``--dtype half``, which
    is what an FP16 checkpoint gets: GPT-2, OPT, GPT-NeoX, Falcon, StableLM, SmolLM3. On a GPU torch
    does the same by itself.
    """
    if torch.cuda.is_available():
        return
    half, tensor_type = torch.float16, torch.Tensor

    def widened(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def function(input: Any, *args: Any, **kwargs: Any) -> Any:
            if input.dtype is not half:
                return real(input, *args, **kwargs)

            def wide(value: Any) -> Any:
                return value.float() if isinstance(value, tensor_type) else value

            arguments = map(wide, args)
            return real(wide(input), *arguments, **{k: wide(v) for k, v in kwargs.items()}).half()

        return function

    functional = torch.nn.functional
    for name in ("layer_norm", "silu", "gelu", "relu"):
        setattr(functional, name, widened(getattr(functional, name)))


def add_xpu(torch: ModuleType) -> None:
    """``torch.xpu`` (2.3): vLLM asks whether one is in use before it forks the engine."""
    torch.xpu = SimpleNamespace(_is_compiled=lambda: False)  # type: ignore[attr-defined]


PIECES: tuple[Callable[[ModuleType], None], ...] = (
    add_compiler,
    add_dtypes,
    add_finfo,
    add_itemsize,
    add_tensor_nbytes,
    add_library,
    add_distributed,
    add_dynamo,
    add_load_state_dict_assign,
    replace_inference_mode,
    add_half_on_cpu,
    add_xpu,
)
