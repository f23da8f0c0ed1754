"""Quantizations ``k80-w4``, ``k80-w8`` and ``k80-f16``: unquantized checkpoints, narrowed as they
are loaded.

A weight never exists in the model in its checkpoint's dtype. Each tensor is narrowed, some rows at
a time, into its part of the layer's `PackedWeight` when vLLM hands it over, and is gone before the
next.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_k80.ops.reference import GROUPS
from vllm_k80.quantization.linear import CardConfig, PackedLinearMethod, register_config
from vllm_k80.quantization.packed import PackedWeight, group_of_kernels, pair

# Elements that are narrowed at a time, as FP32: 8 MB and a few times that of work.
_ELEMENTS_AT_ONCE = 1 << 21


def quantize_w4(rows: Tensor, group: int) -> PackedWeight:
    """Round to the nearest of 16 steps between each group's minimum and maximum.

    Args:
        rows: [N, K] FP32, within FP16's range. group: columns that share a scale, divides K.

    Returns:
        INT4 with FP16 ``scale`` and ``minimum``, to whose rounded values the steps refer.
    """
    grouped = rows.unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, minimum = ((high - low) / 15).half(), low.half()
    steps = (grouped - minimum.float()).div_(scale.float())
    # A group of equal values has scale 0 and is its minimum.
    steps.nan_to_num_(nan=0.0).round_().clamp_(0, 15)
    qweight = pair(steps.flatten(1).to(torch.uint8))
    return PackedWeight(qweight, scale.squeeze(-1), minimum.squeeze(-1))


def quantize_w8(rows: Tensor, group: int) -> PackedWeight:
    """Round to the nearest of 255 steps, 127 of them each group's largest magnitude.

    Args:
        rows: [N, K] FP32, within FP16's range. group: columns that share a scale, divides K.

    Returns:
        INT8 with FP16 ``scale``, to whose rounded value the steps refer.
    """
    grouped = rows.unflatten(1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / 127).half()
    steps = (grouped / scale.float()).nan_to_num_(nan=0.0).round_().clamp_(-127, 127)
    return PackedWeight(steps.flatten(1).to(torch.int8), scale.squeeze(-1))


def _to_f16(rows: Tensor, group: int) -> PackedWeight:
    return PackedWeight(rows.half())


_Narrow = Callable[[Tensor, int], PackedWeight]


def _row(layer: str, narrow: _Narrow, columns: int) -> tuple[PackedWeight, int]:
    """A row of zeros in the layout of ``narrow``, and its group size.

    Raises:
        ValueError: a number of columns that the kernels do not take.
    """
    group = group_of_kernels(columns) or (
        columns if narrow is _to_f16 or (narrow is quantize_w8 and columns % 16 == 0) else None
    )
    if group is None:
        raise ValueError(
            f"{layer}: its {columns} columns are no multiple of {GROUPS[0]}, the smallest group of "
            f"the kernels. Use --quantization k80-f16; with several dies, use fewer, for each gets "
            f"a part of the columns of some layers."
        )
    return narrow(torch.zeros(1, columns), group), group


@dataclass
class _Rows:
    """What vLLM's loaders take for the data of a parameter, or for rows of it.

    They narrow it to the part that a tensor of the checkpoint is for, and copy that in.
    """

    parameter: "NarrowedParameter"
    start: int
    rows: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.parameter.shape[1]))

    @property
    def data(self) -> "_Rows":
        return self

    def narrow(self, dimension: int, start: int, rows: int) -> "_Rows":
        assert dimension == 0, "columns are never loaded apart"
        return _Rows(self.parameter, self.start + start, rows)

    def copy_(self, loaded: Tensor) -> None:
        weight, narrow, group = self.parameter.weight, self.parameter.narrow_, self.parameter.group
        step = max(1, _ELEMENTS_AT_ONCE // loaded.shape[1])
        for start in range(0, self.rows, step):
            some = loaded[start : start + step].to(weight.qweight.device).float()
            first = self.start + start
            for name, part in narrow(some, group).named_parts().items():
                getattr(weight, name)[first : first + some.shape[0]] = part

    def fill_(self, value: float) -> None:
        assert value == 0, "the weight is zero where nothing is loaded"


class NarrowedParameter(ModelWeightParameter):
    """A weight that has a shape but no memory; what is loaded goes to a `PackedWeight`.

    Upstream's ``RTNParameter`` has the idea of a parameter whose data are not a tensor.
    """

    def __new__(cls, rows: int, columns: int, *_: Any, **__: Any) -> "NarrowedParameter":
        made: NarrowedParameter = super().__new__(cls, torch.empty(rows, columns, device="meta"))
        return made

    def __init__(
        self, rows: int, columns: int, layer: str, narrow: _Narrow, loader: Callable[..., None]
    ) -> None:
        shape = torch.empty(rows, columns, device="meta")
        super().__init__(data=shape, input_dim=1, output_dim=0, weight_loader=loader)
        self.narrow_ = narrow
        self.row, self.group = _row(layer, narrow, columns)

    @functools.cached_property
    def weight(self) -> PackedWeight:
        """What is loaded, zero elsewhere. Nothing takes its memory when it comes from the cache."""
        parts = self.row.named_parts().items()
        return PackedWeight(
            **{name: part.new_zeros(self.shape[0], part.shape[1]) for name, part in parts}
        )

    @property
    def data(self) -> _Rows:
        return _Rows(self, 0, self.shape[0])

    @property
    def device(self) -> torch.device:
        # Transformers' models, as vLLM runs them, get a new tensor for each parameter on "meta".
        return self.row.qweight.device

    def __getitem__(self, rows: slice) -> _Rows:
        start, stop, _ = rows.indices(self.shape[0])
        return _Rows(self, start, stop - start)


class K80LinearMethod(PackedLinearMethod):
    """A linear layer whose weight is narrowed as it is loaded."""

    def __init__(self, prefix: str, narrow: _Narrow) -> None:
        self.prefix, self.narrow = prefix, narrow

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
        self.params_dtype = params_dtype
        layer.weight = NarrowedParameter(
            sum(output_partition_sizes),
            input_size_per_partition,
            layer=self.prefix,
            narrow=self.narrow,
            loader=extra_weight_attrs["weight_loader"],
        )

    def pack(self, layer: torch.nn.Module) -> list[PackedWeight]:
        """The weight as it was loaded. A head that shares the embeddings' parameter shares it."""
        return [layer.weight.weight]


class K80EmbeddingMethod(K80LinearMethod):
    """Token embeddings, and the language model head that may share them."""

    def embedding(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        return layer.packed_weights[0].embedding(x, self.params_dtype)


class K80Config(CardConfig, QuantizationConfig):
    """Base of the three."""

    name: ClassVar[str]
    narrowing: ClassVar[tuple[_Narrow, _Narrow]]
    """What narrows linear layers, and what embeddings and head."""

    def get_name(self) -> str:
        return self.name

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "K80Config":
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        linear, vocabulary = self.narrowing
        if isinstance(layer, LinearBase):
            return K80LinearMethod(prefix, linear)
        if isinstance(layer, VocabParallelEmbedding):
            return K80EmbeddingMethod(prefix, vocabulary)
        return None


class K80W4Config(K80Config):
    """``k80-w4``. Embeddings and head, which 4 bits hurt most, get 8."""

    name = "k80-w4"
    narrowing = quantize_w4, quantize_w8


class K80W8Config(K80Config):
    """``k80-w8``."""

    name = "k80-w8"
    narrowing = quantize_w8, quantize_w8


class K80F16Config(K80Config):
    """``k80-f16``."""

    name = "k80-f16"
    narrowing = _to_f16, _to_f16


@CustomOp.register_oot(name="VocabParallelEmbedding")
class K80VocabParallelEmbedding(VocabParallelEmbedding):
    """Token embeddings that ask the quantization also where their model does not hand it on.

    Upstream's Gemma, OPT, GPT-NeoX, Falcon and others give their embeddings none, for checkpoints
    that are quantized leave these as they were. Narrowed while loading, they can be as all others.
    """

    def __init__(
        self, *args: Any, quant_config: QuantizationConfig | None = None, **named: Any
    ) -> None:
        configured = get_current_vllm_config().quant_config
        if isinstance(configured, K80Config):
            quant_config = configured
        super().__init__(*args, quant_config=quant_config, **named)


@CustomOp.register_oot(name="ParallelLMHead")
class K80ParallelLMHead(K80VocabParallelEmbedding, ParallelLMHead):
    """The same of a head."""


def register() -> None:
    """Add the three to vLLM's quantizations."""
    for config in (K80W4Config, K80W8Config, K80F16Config):
        register_config(config.name, config, (K80LinearMethod,))
