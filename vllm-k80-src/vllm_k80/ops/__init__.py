"""The operators ``torch.ops.vllm_k80.*``: the only door between vLLM's layers and our kernels.

Layers call them as ``k80.*``, which leaves torch's dispatcher out where there is nothing to choose.

Every operator has a reference in plain torch (`reference`), which runs on a CPU and, until an
operator has a kernel of its own, on a GPU. Kernels (`kernels`) are launched through the CUDA
driver API and are used where a GPU and the compiled fat binary are there.

Importing this module defines the operators. `CALLS` counts the calls of each in this process:
how a test proves that a layer went through here.
"""

from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from vllm_k80.ops import attention_kernels, attention_reference, kernels, reference

CALLS: Counter[str] = Counter()

_SCHEMAS: dict[str, str] = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "fused_add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)"
    ),
    "silu_and_mul": "(Tensor x) -> Tensor",
    "gelu_and_mul": "(Tensor x, str approximate='none') -> Tensor",
    "gelu_new": "(Tensor x) -> Tensor",
    "gelu_fast": "(Tensor x) -> Tensor",
    "gelu_quick": "(Tensor x) -> Tensor",
    "rotary_embedding": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size,"
        " Tensor cos_sin_cache, bool is_neox) -> ()"
    ),
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None, bool gated=False) -> Tensor",
    "linear_w4": (
        "(Tensor x, Tensor qweight, Tensor scale, Tensor? minimum, Tensor? bias=None,"
        " Tensor? zero=None, bool gated=False) -> Tensor"
    ),
    "linear_w8": (
        "(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None, bool gated=False) -> Tensor"
    ),
    "gemv_w4": (
        "(Tensor x, Tensor qweight, Tensor scale, Tensor? minimum, Tensor? bias=None,"
        " Tensor? zero=None, bool gated=False) -> Tensor"
    ),
    "gemv_w8": (
        "(Tensor x, Tensor qweight, Tensor scale, Tensor? bias=None, bool gated=False) -> Tensor"
    ),
    "gemv_f16": "(Tensor x, Tensor weight, Tensor? bias=None, bool gated=False) -> Tensor",
    "dequant_w4": ("(Tensor qweight, Tensor scale, Tensor? minimum, Tensor? zero=None) -> Tensor"),
    "dequant_w8": "(Tensor qweight, Tensor scale) -> Tensor",
    "embedding_w4": (
        "(Tensor ids, Tensor qweight, Tensor scale, Tensor? minimum, ScalarType dtype,"
        " Tensor? zero=None) -> Tensor"
    ),
    "embedding_w8": "(Tensor ids, Tensor qweight, Tensor scale, ScalarType dtype) -> Tensor",
    "reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()"
    ),
    "rotary_and_cache": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!) key, Tensor value, Tensor cos_sin_cache,"
        " bool is_neox, Tensor(c!) kv_cache, Tensor slot_mapping) -> ()"
    ),
    "paged_attention": (
        "(Tensor query, Tensor kv_cache, Tensor(a!) out, Tensor seq_lens, Tensor block_table,"
        " int max_seq_len, float scale, int window=0, float soft_cap=0.0,"
        " Tensor? alibi_slopes=None) -> ()"
    ),
    "varlen_attention": (
        "(Tensor query, Tensor kv_cache, Tensor(a!) out, Tensor query_start_loc, Tensor seq_lens,"
        " Tensor block_table, int max_query_len, float scale, int window=0, float soft_cap=0.0,"
        " Tensor? alibi_slopes=None) -> ()"
    ),
}

_LIBRARY = torch.library.Library("vllm_k80", "DEF")


def _counted(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        CALLS[name] += 1
        return implementation(*args)

    return call


_REFERENCES = (reference, attention_reference)
_KERNELS = (kernels, attention_kernels, *_REFERENCES)


def _find(name: str, modules: tuple[ModuleType, ...]) -> Callable[..., Any]:
    found: Callable[..., Any] = next(getattr(m, name) for m in modules if hasattr(m, name))
    return found


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _counted(_name, _find(_name, _REFERENCES)), "CPU")
    _LIBRARY.impl(_name, _counted(_name, _find(_name, _KERNELS)), "CUDA")


def _straight(name: str) -> Callable[..., Any]:
    """The operator ``name``, without torch's dispatcher for tensors on a GPU.

    The dispatcher takes each argument apart and makes it anew for an implementation in Python: 5 to
    8 us a call (2026-11-26, torch 2.0.1, x86 server core), more than the launch.
    """
    dispatched, on_gpu = getattr(torch.ops.vllm_k80, name), _find(name, _KERNELS)

    def call(first: torch.Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return dispatched(first, *others)
        CALLS[name] += 1
        return on_gpu(first, *others)

    return call


def bind(name: str, *others: torch.Tensor | bool | None) -> Callable[[torch.Tensor], Any]:
    """The operator ``linear``, ``linear_w4`` or ``linear_w8`` with all arguments but x given.

    A layer's weight stays where it is, so that what was found of it is taken for granted as long as
    it has not moved: finding it anew cost as much as the launch, at each layer of each step.
    """
    operator = getattr(k80, name)
    tensors = [other for other in others if isinstance(other, torch.Tensor)]
    product, addresses, called = None, [], False

    def call(x: torch.Tensor) -> Any:
        nonlocal product, addresses, called
        if product is not None and product.takes(x) and addresses == _addresses(tensors):
            CALLS[name] += 1
            return product(x)
        y = operator(x, *others)
        # Not for one call only. Prefill, which is no product, forgets none.
        if called and x.is_cuda and (found := kernels.product_of(name, x, others)):
            product, addresses = found, _addresses(tensors)
        called = True
        return y

    return call


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


k80 = SimpleNamespace(**{name: _straight(name) for name in _SCHEMAS})
