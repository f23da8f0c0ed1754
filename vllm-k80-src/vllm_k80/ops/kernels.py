"""The operators that have a kernel for the GPU; the others run their reference there too.

Each function has the contract of its namesake in `reference` and falls back to it where the
installation carries no compiled kernels, or for a dtype that has none.
"""

import torch
from torch import Tensor

from vllm_k80.ops import driver, reference

_SUFFIX = {torch.float32: "f32", torch.float16: "f16"}
_THREADS = 256  # kThreads in csrc/rms_norm.cu


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        driver.available()
        and x.dtype in _SUFFIX
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`; kernel ``rms_norm_f32`` or ``rms_norm_f16``."""
    if not _has_kernel(x, weight):
        return reference.rms_norm(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    if (hidden := x.shape[-1]) and (tokens := x.numel() // hidden):
        driver.kernel(f"rms_norm_{_SUFFIX[x.dtype]}", "pppif", x.device.index).launch(
            tokens, _THREADS, x.data_ptr(), weight.data_ptr(), y.data_ptr(), hidden, eps
        )
    return y


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.fused_add_rms_norm`; kernel ``fused_add_rms_norm_f32`` or ``_f16``."""
    if not _has_kernel(x, weight) or residual.shape != x.shape or residual.dtype != x.dtype:
        return reference.fused_add_rms_norm(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    if (hidden := x.shape[-1]) and (tokens := x.numel() // hidden):
        name = f"fused_add_rms_norm_{_SUFFIX[x.dtype]}"
        driver.kernel(name, "pppppif", x.device.index).launch(
            tokens,
            _THREADS,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            total.data_ptr(),
            hidden,
            eps,
        )
    return y, total
