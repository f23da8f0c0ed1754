"""What the linear layers of all quantized checkpoints share: packed once, then our operators."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import linear, quantization
from vllm.model_executor.layers.fused_moe.layer import FusedMoE

from vllm_k80.ops import k80
from vllm_k80.quantization import methods as served
from vllm_k80.quantization.packed import PackedWeight


def attach(layer: torch.nn.Module, weights: list[PackedWeight]) -> None:
    """Give the layer its weights, whose rows follow one another in the layer's output."""
    layer.packed_weights = weights
    # Registered so that memory accounting and .to(device) see them.
    for index, weight in enumerate(weights):
        for name, part in weight.named_parts().items():
            layer.register_buffer(f"{name}_{index}", part, persistent=False)


def apply(layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of a layer that `attach` has given its weights.

    If `fusion.fuse` has found that the layer is gated, `silu_and_mul` of that.
    """
    weights: list[PackedWeight] = layer.packed_weights
    gated = getattr(layer, "gated", False)
    if len(weights) == 1:
        return weights[0].linear(x, bias, gated)
    y = torch.cat([weight.linear(x) for weight in weights], dim=-1)
    y = y if bias is None else y + bias
    return k80.silu_and_mul(y) if gated else y


def group_index(columns: int, per_rank: int, group: int, shards: int) -> torch.nn.Parameter:
    """Parameter for ``g_idx``: the group of each column, for each part of a fused layer.

    vLLM's own parameter keeps one for the whole layer, the last that is loaded. The parts are
    quantized apart, and nothing promises that their columns come in one order.

    Args:
        columns: of the weight. per_rank: those of this rank. group: columns a group.
        shards: parts of the layer.

    Returns:
        [shards, per_rank] int32, as of a checkpoint that has no ``g_idx``.
    """
    default = torch.arange(per_rank, dtype=torch.int32) // group
    parameter = torch.nn.Parameter(default.repeat(shards, 1), requires_grad=False)

    def load(parameter: Tensor, loaded: Tensor, shard: int | str | None = None) -> None:
        if per_rank != columns:
            loaded = loaded.narrow(0, get_tensor_model_parallel_rank() * per_rank, per_rank)
        index = "qkv".index(shard) if isinstance(shard, str) else shard
        target = parameter.data if index is None else parameter.data[index]
        target.copy_(loaded)  # a layer that is fused in the checkpoint has one for all its parts

    parameter.weight_loader = load
    return parameter


def parts_of(sizes: list[int], g_idx: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Which rows of a layer can be packed together, and the group of each of their columns.

    Args:
        sizes: rows of each part of a fused layer. g_idx: [parts, K] as of `group_index`, or None.

    Returns:
        All rows, or those of each part where the parts' columns are ordered differently.
    """
    if g_idx is None:
        return [(slice(0, sum(sizes)), None)]
    # A die's part of the input may begin with a later group than the first.
    g_idx = g_idx - g_idx.min()
    if bool((g_idx == g_idx[0]).all()):
        return [(slice(0, sum(sizes)), g_idx[0])]
    ends = [sum(sizes[: part + 1]) for part in range(len(sizes))]
    rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return list(zip(rows, g_idx, strict=True))


def column_order(layer: str, g_idx: Tensor, groups: int) -> Tensor | None:
    """The order that brings the columns of each group together, None where they are already.

    Args:
        layer: its name, for errors. g_idx: [K] integer, the group of each column. groups: of a row.

    Returns:
        [K] int64, as in `PackedWeight`.

    Raises:
        ValueError: groups of different sizes.
    """
    columns = g_idx.shape[0]
    expected = torch.arange(columns, device=g_idx.device) // (columns // groups)
    if torch.equal(g_idx.long(), expected):
        return None
    ordered, order = g_idx.long().sort(stable=True)
    if not torch.equal(ordered, expected):
        raise ValueError(
            f"{layer}: its g_idx does not give each of the {groups} groups the same number of the "
            f"{columns} columns. Use a checkpoint quantized with desc_act false."
        )
    return order


def check_parallel(layer: str, reordered: bool, columns: int, per_rank: int) -> None:
    """Refuse reordered columns that are dealt out to several dies.

    Raises:
        ValueError: a die would get parts of groups.
    """
    if reordered and columns != per_rank:
        raise ValueError(
            f"{layer}: a checkpoint with reordered columns (desc_act, actorder) cannot be split "
            f"over several dies by tensor parallelism: each would get parts of groups. Use one "
            f"die, or a checkpoint quantized with desc_act false."
        )


def does_not_divide(layer: str, rows: int, columns: int, group: int, factor: int) -> ValueError:
    """The error for a part of a weight that cuts a group or a word of ``factor`` weights."""
    return ValueError(
        f"{layer}: {rows} x {columns} on each die does not divide into groups of {group} columns "
        f"and words of {factor} weights. Use fewer dies, or a checkpoint with a smaller group size."
    )


class CardConfig:
    """What every quantization's configuration says of the card. Before upstream's class."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 35


class CheckpointConfig(CardConfig):
    """The same of a quantized checkpoint's, and what is refused of it."""

    method: ClassVar[str]
    """vLLM's name of the quantization."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        if refusal := served.checkpoint_refusal({"quant_method": cls.method} | config):
            raise ValueError(refusal)
        return super().from_config(config)  # type: ignore[misc]  # upstream's, mixed in

    @staticmethod
    def refuse_experts(layer: torch.nn.Module, prefix: str) -> None:
        """Raise a ValueError for a mixture of experts."""
        if isinstance(layer, FusedMoE):
            raise ValueError(f"{prefix}: {served.refusal('moe_wna16')}")


def register_config(name: str, config: type, methods: tuple[type, ...] = ()) -> None:
    """Make ours what vLLM takes for quantization ``name``.

    Upstream's decorator refuses names that exist already. Its table does not: customized methods
    take precedence in it.

    Args:
        name: of the quantization. config: `QuantizationConfig`.
        methods: linear methods whose parameters load themselves, as upstream's newer ones do.
    """
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG[name] = config
    if name not in quantization.QUANTIZATION_METHODS:
        quantization.QUANTIZATION_METHODS.append(name)
    linear.WEIGHT_LOADER_V2_SUPPORTED.extend(
        method.__name__
        for method in methods
        if method.__name__ not in linear.WEIGHT_LOADER_V2_SUPPORTED
    )


class PackedLinearMethod(linear.LinearMethodBase):
    """A layer's parameters as the checkpoint has them, replaced by `PackedWeight` once loaded."""

    def pack(self, layer: torch.nn.Module) -> list[PackedWeight]:
        """The layer's weight, from its parameters; the rows of the items follow one another."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if hasattr(layer, "packed_weights"):  # from the cache
            return
        weights = self.pack(layer)
        for name, _ in list(layer.named_parameters(recurse=False)):
            if name != "bias":
                delattr(layer, name)
        attach(layer, weights)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return apply(layer, x, bias)
