"""vLLM's layers with our operators, through its hook for out-of-tree custom operators."""

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_k80 import ops  # noqa: F401  (defines torch.ops.vllm_k80)


@CustomOp.register_oot(name="RMSNorm")
class K80RMSNorm(RMSNorm):
    """RMS normalization, with the residual added where there is one."""

    def forward_oot(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.variance_size_override is not None or not self.has_weight:
            return self.forward_native(x, residual)
        if residual is None:
            return torch.ops.vllm_k80.rms_norm(x, self.weight, self.variance_epsilon)
        return torch.ops.vllm_k80.fused_add_rms_norm(
            x, residual, self.weight, self.variance_epsilon
        )


@CustomOp.register_oot(name="SiluAndMul")
class K80SiluAndMul(SiluAndMul):
    """The activation of Llama's feed-forward layers."""

    def forward_oot(self, x: Tensor) -> Tensor:
        return torch.ops.vllm_k80.silu_and_mul(x)


def unquantized_gemm(
    layer: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What vLLM's unquantized linear layers call; see the operator `linear`."""
    return torch.ops.vllm_k80.linear(x, weight, bias)
