"""AWQ checkpoints, repacked once at load time (arXiv:2306.00978).

Packing "GEMM", as AutoAWQ's ``WQLinear_GEMM.from_linear`` writes it (awq/modules/linear/gemm.py,
https://github.com/casper-hansen/AutoAWQ): ``qweight`` [K, N / 8] int32 and ``qzeros``
[groups, N / 8] int32 hold eight neighbours of a row, whose nibbles are, from the lowest, those of
rows 0, 2, 4, 6, 1, 3, 5, 7 of the layer; ``scales`` [groups, N]. ``w = (q - zero) * scale``.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import awq as upstream

from vllm_k80.quantization.linear import (
    CheckpointConfig,
    PackedLinearMethod,
    does_not_divide,
    register_config,
)
from vllm_k80.quantization.packed import PackedWeight, pack_integers, pair

# Where in a word the nibble of each of its eight rows is: the inverse of 0, 2, 4, 6, 1, 3, 5, 7.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def _rows_of_words(words: Tensor) -> Tensor:
    """[R, N / 8] int32 to [N, R] uint8."""
    packed = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(2)
    return nibbles[..., _NIBBLES].flatten(1).t()


def pack(layer: str, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """Repack one AWQ weight.

    Args:
        layer: its name, for errors. qweight, qzeros, scales: as the module says.

    Raises:
        ValueError: a shape that the kernels do not take.
    """
    stored = pair(_rows_of_words(qweight)).contiguous()
    return pack_integers(layer, 4, stored, scales.t(), _rows_of_words(qzeros))


class K80AWQLinearMethod(upstream.AWQLinearMethod, PackedLinearMethod):
    """Upstream's parameters for the checkpoint's tensors, our layout and operators."""

    process_weights_after_loading = PackedLinearMethod.process_weights_after_loading
    apply = PackedLinearMethod.apply

    def __init__(self, config: "K80AWQConfig", prefix: str) -> None:
        super().__init__(config)
        self.prefix = prefix

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        try:
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                torch.float32,  # until the checkpoint's own dtype is known to fit FP16
                **extra_weight_attrs,
            )
        except ValueError:
            rows, group = sum(output_partition_sizes), self.quant_config.group_size
            raise does_not_divide(self.prefix, rows, input_size_per_partition, group, 8) from None

    def pack(self, layer: torch.nn.Module) -> list[PackedWeight]:
        """The layer's weight."""
        parts = layer.qweight.data, layer.qzeros.data, layer.scales.data
        return [pack(self.prefix, *parts)]


class K80AWQConfig(CheckpointConfig, upstream.AWQConfig):
    """Quantization ``awq``, served by our operators."""

    method = "awq"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        self.refuse_experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        if upstream.is_layer_skipped_awq(prefix, self.modules_to_not_convert):
            return UnquantizedLinearMethod()
        return K80AWQLinearMethod(self, prefix)


def register() -> None:
    """Make ours what vLLM takes for ``awq``."""
    register_config("awq", K80AWQConfig, (K80AWQLinearMethod,))
