"""compressed-tensors checkpoints of format pack-quantized, repacked once at load time.

Packing, as the library's ``pack_to_int32`` writes it (compressors/quantized_compressors,
https://github.com/neuralmagic/compressed-tensors): ``weight_packed`` [N, K * bits / 32] int32
holds neighbours of a row, the first in the lowest bits, each plus ``2 ** (bits - 1)``;
``weight_scale`` [N, groups]; ``weight_zero_point`` [N * bits / 32, groups] int32, packed alike
along N, where the weight is not symmetric; ``weight_g_idx`` [K] where columns were reordered
(``actorder: group``). ``w = (q - zero) * scale``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors as upstream,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from vllm_k80.quantization.linear import (
    CheckpointConfig,
    apply,
    attach,
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
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_g_idx: Tensor | None,
) -> PackedWeight:
    """Repack one weight.

    Args:
        layer: its name, for errors. bits: 4 or 8. The others: as the module says.

    Raises:
        ValueError: a shape that the kernels do not take, groups of different sizes.
    """
    stored = weight_packed.contiguous().view(torch.uint8)
    zero = order = None
    if weight_zero_point is not None:
        words = weight_zero_point.t().contiguous().view(torch.uint8)
        zero = integers(words, bits).t()
    if weight_g_idx is not None:
        order = column_order(layer, weight_g_idx, weight_scale.shape[1])
    return pack_integers(layer, bits, stored, weight_scale, zero, order)


class K80WNA16(CompressedTensorsScheme):
    """Weights of 4 or 8 bits, a scale a group or a row."""

    def __init__(self, weights: Any) -> None:
        """``weights``: compressed-tensors' `QuantizationArgs`."""
        self.bits, self.symmetric = weights.num_bits, weights.symmetric
        self.group = weights.group_size if weights.strategy == "group" else None
        self.reordered = weights.actorder == "group"

    @classmethod
    def get_min_capability(cls) -> int:
        return 35

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        name, rows, columns = layer.prefix, sum(output_partition_sizes), input_size_per_partition
        factor, group = 32 // self.bits, self.group or input_size
        check_parallel(name, self.reordered and self.group is not None, input_size, columns)
        words_of_rows = [] if self.symmetric else output_partition_sizes
        if (
            any(size % factor for size in words_of_rows)
            or columns % factor
            or (self.group and columns % group)
        ):
            raise does_not_divide(name, rows, columns, group, factor)
        loader, groups = {"weight_loader": weight_loader}, columns // group or 1
        packed = {"packed_factor": factor, **loader}
        layer.weight_packed = PackedvLLMParameter(
            data=torch.empty(rows, columns // factor, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            **packed,
        )
        # FP32 until the checkpoint's own dtype is known to fit FP16.
        scale = torch.empty(rows, groups, dtype=torch.float32)
        zero = torch.empty(rows // factor, groups, dtype=torch.int32)
        if self.group:
            layer.weight_scale = GroupQuantScaleParameter(
                data=scale, input_dim=1, output_dim=0, **loader
            )
        else:  # one scale for the whole input belongs to each die that has a part of it
            layer.weight_scale = ChannelQuantScaleParameter(data=scale, output_dim=0, **loader)
        if not self.symmetric and self.group:
            layer.weight_zero_point = PackedvLLMParameter(
                data=zero, input_dim=1, output_dim=0, packed_dim=0, **packed
            )
        elif not self.symmetric:
            layer.weight_zero_point = PackedColumnParameter(
                data=zero, output_dim=0, packed_dim=0, **packed
            )
        # In the checkpoint and told by the others' shapes.
        layer.weight_shape = BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), **loader)
        if self.reordered:
            layer.weight_g_idx = group_index(
                input_size, columns, group, len(output_partition_sizes)
            )
        self.sizes = output_partition_sizes

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if hasattr(layer, "packed_weights"):  # from the cache
            return
        packed, scale = layer.weight_packed.data, layer.weight_scale.data
        zero = None if self.symmetric else layer.weight_zero_point.data
        g_idx = layer.weight_g_idx.data if self.reordered else None
        factor = 32 // self.bits
        weights = [
            pack(
                layer.prefix,
                self.bits,
                packed[rows],
                scale[rows],
                None if zero is None else zero[rows.start // factor : rows.stop // factor],
                index,
            )
            for rows, index in parts_of(self.sizes, g_idx)
        ]
        for name in ("packed", "scale", "zero_point", "shape", "g_idx"):
            if hasattr(layer, f"weight_{name}"):
                delattr(layer, f"weight_{name}")
        attach(layer, concatenate(weights))

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return apply(layer, x, bias)


class K80CompressedTensorsConfig(CheckpointConfig, upstream.CompressedTensorsConfig):
    """Quantization ``compressed-tensors``, served by our operators."""

    method = "compressed-tensors"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        self.refuse_experts(layer, prefix)
        return super().get_quant_method(layer, prefix)

    def _get_scheme_from_parts(
        self, weight_quant: Any, input_quant: Any, format: str | None = None
    ) -> CompressedTensorsScheme:
        return K80WNA16(weight_quant)  # what else there is `from_config` has refused


def register() -> None:
    """Make ours what vLLM takes for ``compressed-tensors``."""
    register_config("compressed-tensors", K80CompressedTensorsConfig)
