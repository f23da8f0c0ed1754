"""GPTQ checkpoints, repacked once at load time (arXiv:2210.17323).

Packing, as AutoGPTQ's ``QuantLinear.pack`` writes it (auto_gptq/nn_modules/qlinear,
https://github.com/AutoGPTQ/AutoGPTQ): ``qweight`` [K * bits / 32, N] int32 holds neighbours of a
column, the first in the lowest bits; ``qzeros`` [groups, N * bits / 32] int32 holds neighbours of
a row; ``scales`` [groups, N]; ``g_idx`` [K] the group of each column of the layer.
``w = (q - zero) * scale``. Version 1 of the format (``checkpoint_format: gptq``) stores the zero
point less one, modulo ``2 ** bits``; version 2 (``gptq_v2``, https://github.com/ModelCloud/GPTQModel)
as it is.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization import gptq as upstream
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from vllm_k80.quantization.linear import (
    CheckpointConfig,
    PackedLinearMethod,
    check_parallel,
    column_order,
    does_not_divide,
    group_index,
    parts_of,
    register_config,
)
from vllm_k80.quantization.packed import PackedWeight, concatenate, integers, pack_integers


def pack(
    layer: str,
    bits: int,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    stored_less: int = 1,
) -> PackedWeight:
    """Repack one GPTQ weight.

    Args:
        layer: its name, for errors. bits: 4 or 8.
        qweight, qzeros, scales: as the module says. g_idx: [K] integer.
        stored_less: by how much a stored zero point is too small: 1 in version 1, 0 in version 2.

    Raises:
        ValueError: a shape that the kernels do not take, groups of different sizes.
    """
    # Eight neighbours of a column in 32 bits are, little-endian, what INT4 has in a row.
    stored = qweight.t().contiguous().view(torch.uint8)
    zero = integers(qzeros.contiguous().view(torch.uint8), bits)
    zero = (zero + stored_less) & ((1 << bits) - 1)
    order = column_order(layer, g_idx, scales.shape[0])
    return pack_integers(layer, bits, stored, scales.t(), zero.t(), order)


class K80GPTQLinearMethod(PackedLinearMethod):
    """vLLM's parameters for the checkpoint's tensors, our layout and operators."""

    def __init__(self, config: "K80GPTQConfig", prefix: str) -> None:
        self.config, self.prefix = config, prefix

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
        config, columns, rows = self.config, input_size_per_partition, sum(output_partition_sizes)
        factor = 32 // config.weight_bits
        group = input_size if config.group_size == -1 else config.group_size
        check_parallel(
            self.prefix, config.desc_act and config.group_size != -1, input_size, columns
        )
        # One scale for the whole input belongs to each die that has a part of it.
        divided = config.group_size != -1
        if any(size % factor for size in output_partition_sizes) or (
            divided and (columns % group or columns % factor)
        ):
            raise does_not_divide(self.prefix, rows, columns, group, factor)
        loader = {"weight_loader": extra_weight_attrs.get("weight_loader")}
        packed = {"packed_factor": factor, **loader}
        qweight = torch.empty(columns // factor, rows, dtype=torch.int32)
        zeros = torch.empty(columns // group or 1, rows // factor, dtype=torch.int32)
        # FP32 until the checkpoint's own dtype is known to fit FP16.
        scales = torch.empty(columns // group or 1, rows, dtype=torch.float32)
        layer.qweight = PackedvLLMParameter(
            data=qweight, input_dim=0, output_dim=1, packed_dim=0, **packed
        )
        if divided:
            layer.qzeros = PackedvLLMParameter(
                data=zeros, input_dim=0, output_dim=1, packed_dim=1, **packed
            )
            layer.scales = GroupQuantScaleParameter(
                data=scales, input_dim=0, output_dim=1, **loader
            )
        else:
            layer.qzeros = PackedColumnParameter(data=zeros, output_dim=1, packed_dim=1, **packed)
            layer.scales = ChannelQuantScaleParameter(data=scales, output_dim=1, **loader)
        layer.g_idx = group_index(input_size, columns, group, len(output_partition_sizes))
        self.sizes = output_partition_sizes

    def pack(self, layer: torch.nn.Module) -> list[PackedWeight]:
        """The layer's weight; in parts where those of a fused layer have other column orders."""
        factor = 32 // self.config.weight_bits
        return concatenate(
            [
                pack(
                    self.prefix,
                    self.config.weight_bits,
                    layer.qweight.data[:, rows],
                    layer.qzeros.data[:, rows.start // factor : rows.stop // factor],
                    layer.scales.data[:, rows],
                    g_idx,
                    self.config.stored_less,
                )
                for rows, g_idx in parts_of(self.sizes, layer.g_idx.data)
            ]
        )


class K80GPTQConfig(CheckpointConfig, upstream.GPTQConfig):
    """Quantization ``gptq``, served by our operators."""

    method = "gptq"
    stored_less = 1

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "K80GPTQConfig":
        made: K80GPTQConfig = super().from_config(config)
        made.stored_less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        return made

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        self.refuse_experts(layer, prefix)
        return get_linear_quant_method(
            self, layer, prefix, lambda config: K80GPTQLinearMethod(config, prefix)
        )


def register() -> None:
    """Make ours what vLLM takes for ``gptq``."""
    register_config("gptq", K80GPTQConfig, (K80GPTQLinearMethod,))
