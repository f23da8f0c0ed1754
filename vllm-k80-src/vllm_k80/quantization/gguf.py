"""GGUF checkpoints.

vLLM reads the file and hands each tensor over as the bytes of its blocks. They are repacked
here once: 4-bit types into the INT4 layout, those of 5, 6 and 8 bits into the INT8 layout. The
integers stay what they are. K-quants have integers for scales too, and an FP16 factor for those of
a block of 256; their product becomes the scale, rounded to FP16.
Block formats: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vllm.config
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from vllm.model_executor import model_loader
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import gguf as upstream
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import gguf_loader
from vllm.model_executor.model_loader.gguf_loader import GGUFModelLoader
from vllm.transformers_utils.config import maybe_override_with_speculators_target_model

from vllm_k80.architectures import gguf_refusal
from vllm_k80.quantization import gguf_header
from vllm_k80.quantization.gguf_file import INSTEAD, SUPPORTED_TYPES, shared_reader
from vllm_k80.quantization.linear import CardConfig, apply, attach, register_config
from vllm_k80.quantization.loader import CachingLoader, check_range
from vllm_k80.quantization.packed import PackedWeight, concatenate, pair

# Bytes of a tensor that are repacked at a time. What is made of them on the way takes some times as
# much, of a die's memory too.
_BYTES_AT_ONCE = 1 << 21

_Unpacked = tuple[Tensor, ...]
"""Integers, one a byte, [N, blocks, columns a block]; scale, and perhaps minimum, both FP32,
[N, blocks, groups a block]."""


def _fields(raw: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """[N, bytes a row] uint8 to the fields of its blocks: [N, blocks a row, size] each."""
    fields: tuple[Tensor, ...] = raw.view(len(raw), -1, sum(sizes)).split(sizes, dim=-1)
    return fields


def _fp16(field: Tensor) -> Tensor:
    """The FP16 number in each block's 2 bytes: [N, blocks, 2] uint8 to [N, blocks, 1] FP32."""
    return field.contiguous().view(torch.float16).float()


def _integers(field: Tensor, bits: int, run: int) -> Tensor:
    """Narrow integers, one a byte, in the order of their columns.

    Every ``run`` bytes, a multiple of 8, hold as many columns in their lowest ``bits`` bits, the
    next in the bits above, and so on. [N, blocks, bytes] uint8 to [N, blocks, bytes * 8 / bits].
    """
    # Eight bytes at a time: nothing of what is shifted from one into another passes the mask.
    words = field.clone(memory_format=torch.contiguous_format).view(torch.int64)
    runs = words.unflatten(-1, (-1, run // 8))
    mask = ((1 << bits) - 1) * 0x0101010101010101
    planes = [runs >> shift & mask for shift in range(0, 8, bits)]
    return torch.stack(planes, dim=-2).flatten(-3).view(torch.uint8)


def _fifth_bits(field: Tensor) -> Tensor:
    """Bit i of each block's 4 bytes as 16 in column i: [N, blocks, 4] to [N, blocks, 32] uint8."""
    of_byte = torch.arange(8, dtype=torch.uint8, device=field.device)
    return (field.unsqueeze(-1) >> of_byte & 1).flatten(-2) << 4


def _unpack_q4_0(raw: Tensor) -> _Unpacked:
    scale, q = _fields(raw, 2, 16)
    scale = _fp16(scale)
    return _integers(q, 4, run=16), scale, -8 * scale


def _unpack_q4_1(raw: Tensor) -> _Unpacked:
    scale, minimum, q = _fields(raw, 2, 2, 16)
    return _integers(q, 4, run=16), _fp16(scale), _fp16(minimum)


def _unpack_q5_0(raw: Tensor) -> _Unpacked:
    scale, high, low = _fields(raw, 2, 4, 16)
    q = _integers(low, 4, run=16) | _fifth_bits(high)
    return q - 16, _fp16(scale)


def _unpack_q5_1(raw: Tensor) -> _Unpacked:
    scale, minimum, high, low = _fields(raw, 2, 2, 4, 16)
    q = _integers(low, 4, run=16) | _fifth_bits(high)
    return q, _fp16(scale), _fp16(minimum)


def _unpack_q8_0(raw: Tensor) -> _Unpacked:
    scale, q = _fields(raw, 2, 32)
    return q, _fp16(scale)


def _scales_and_minimums(factors: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of the eight groups in a block of Q4_K or Q5_K, [N, blocks, 8] FP32 each.

    Args:
        factors: [N, blocks, 4] uint8, the FP16 factors of scales and of minimums.
        packed: [N, blocks, 12] uint8, integers of 6 bits. Scales of the first four groups are in
            the first four bytes, minimums in the next; those of the last four groups have their
            lower four bits in the last four bytes, and their upper two above the others' six.
    """
    first, second, low = packed.split(4, dim=-1)
    scale = torch.cat((first & 0x3F, low & 0x0F | first >> 2 & 0x30), dim=-1)
    minimum = torch.cat((second & 0x3F, low >> 4 | second >> 2 & 0x30), dim=-1)
    return _fp16(factors[..., :2]) * scale, _fp16(factors[..., 2:]) * -minimum.float()


def _unpack_q4_k(raw: Tensor) -> _Unpacked:
    factors, packed, q = _fields(raw, 4, 12, 128)
    return _integers(q, 4, run=32), *_scales_and_minimums(factors, packed)


def _unpack_q5_k(raw: Tensor) -> _Unpacked:
    factors, packed, high, low = _fields(raw, 4, 12, 32, 128)
    q = _integers(low, 4, run=32) | _integers(high, 1, run=32) << 4
    return q, *_scales_and_minimums(factors, packed)


def _unpack_q6_k(raw: Tensor) -> _Unpacked:
    low, high, scale, factor = _fields(raw, 128, 64, 16, 2)
    q = _integers(low, 4, run=64) | _integers(high, 2, run=32) << 4
    return q - 32, _fp16(factor) * scale.view(torch.int8)


# Bits of the layout that each type goes to, and what unpacks it.
_QUANTIZED: dict[Kind, tuple[int, Callable[[Tensor], _Unpacked]]] = {
    Kind.Q4_0: (4, _unpack_q4_0),
    Kind.Q4_1: (4, _unpack_q4_1),
    Kind.Q5_0: (8, _unpack_q5_0),
    Kind.Q5_1: (8, _unpack_q5_1),
    Kind.Q8_0: (8, _unpack_q8_0),
    Kind.Q4_K: (4, _unpack_q4_k),
    Kind.Q5_K: (8, _unpack_q5_k),
    Kind.Q6_K: (8, _unpack_q6_k),
}
_FLOATS = (Kind.F16, Kind.F32)

assert {kind.name for kind in (*_QUANTIZED, *_FLOATS)} == {*SUPPORTED_TYPES}


def _narrowed(*wide: Tensor) -> tuple[Tensor, ...]:
    """Scale, and perhaps minimum, as FP16; as they are, FP32, if one overflows.

    The error is 2^-11 of a number at most. FP16's smallest ones, with fewer bits, do not change
    that: an FP16 number times a whole one either is not among them or is one of them exactly.
    """
    narrow = tuple(part.half() for part in wide)
    return wide if any(bool(part.isinf().any()) for part in narrow) else narrow


def pack(layer: str, raw: Tensor, kind: int) -> PackedWeight:
    """Repack one GGUF tensor.

    Args:
        layer: its name, for errors.
        raw: [N, bytes a row] uint8 for a quantized type, [N, K] floats for F32 and F16.
        kind: `gguf.GGMLQuantizationType`.

    Raises:
        ValueError: a type that has no operator here, or a die's part that cuts a block.
    """
    known = Kind(kind)
    if known in _FLOATS:
        return PackedWeight(raw)
    if known not in _QUANTIZED:
        raise ValueError(
            f"{layer}: GGUF tensors of type {known.name} cannot be served; those of "
            f"{', '.join(SUPPORTED_TYPES)} can. Use a file quantized to {INSTEAD}."
        )
    columns, size = GGML_QUANT_SIZES[known]
    rows, of_row = raw.shape
    if of_row % size:
        raise ValueError(
            f"{layer}: rows of {known.name} are blocks of {columns} columns, and each die's part "
            f"of a row would end within one. Use fewer dies, or a file quantized to Q8_0 or Q4_1, "
            f"whose blocks are of 32 columns."
        )
    bits, unpack = _QUANTIZED[known]
    step = max(1, _BYTES_AT_ONCE // of_row)
    wholes: list[Tensor] = []
    for start in range(0, rows, step):
        q, *scales = (part.flatten(1) for part in unpack(raw[start : start + step]))
        parts = [pair(q) if bits == 4 else q.view(torch.int8), *scales]
        wholes = wholes or [part.new_empty(rows, part.shape[1]) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            whole[start : start + step] = part
    return PackedWeight(wholes[0], *_narrowed(*wholes[1:]))


class K80GGUFLinearMethod(upstream.GGUFLinearMethod):
    """Upstream's loading, our layout and operators."""

    def __init__(self, config: "K80GGUFConfig", prefix: str) -> None:
        super().__init__(config)
        self.prefix = prefix

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if hasattr(layer, "packed_weights"):  # from the cache
            return
        raw, kinds = layer.qweight, layer.qweight_type
        # The parts of a fused layer are kept where the file was read: on the host.
        device = kinds.device
        if raw.data_container:  # q, k and v, or gate and up: one tensor each
            order = sorted(raw.shard_id_map, key="qkv".find if "q" in raw.shard_id_map else None)
            weights = [
                pack(
                    self.prefix,
                    raw.data_container[raw.shard_id_map[shard]].to(device),
                    kinds.shard_weight_type[shard],
                )
                for shard in order
            ]
        else:
            weights = [pack(self.prefix, raw.data.to(device), kinds.weight_type)]
        del layer.qweight, layer.qweight_type, raw
        attach(layer, concatenate(weights))

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return apply(layer, x, bias)


class K80GGUFEmbeddingMethod(K80GGUFLinearMethod):
    """Token embeddings, and the language model head that may share them."""

    def embedding(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        return layer.packed_weights[0].embedding(x, self.params_dtype)


class K80GGUFConfig(CardConfig, upstream.GGUFConfig):
    """Quantization ``gguf``, served by our operators."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return K80GGUFLinearMethod(self, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return K80GGUFEmbeddingMethod(self, prefix)
        return None


class K80GGUFModelLoader(CachingLoader, GGUFModelLoader):
    """Upstream's loader; the file's header is parsed once instead of once a question.

    Nothing becomes infinite unsaid when an FP32 tensor is stored as FP16.
    """

    _narrow = False

    def checkpoint_files(self, model: torch.nn.Module, model_config: Any) -> list[Path]:
        return [Path(self._prepare_weights(model_config.model))]

    def load_model(self, vllm_config: Any, model_config: Any) -> torch.nn.Module:
        header = gguf_header.read(Path(model_config.model))
        if refusal := gguf_refusal(header.fields):
            raise ValueError(f"{model_config.model}: {refusal}")
        self._narrow = model_config.dtype == torch.float16
        # Upstream builds the Hugging Face model without weights, to learn its names, and
        # transformers refuses its default attention below torch 2.1.1.
        model_config.hf_config._attn_implementation = "eager"
        with shared_reader():
            return super().load_model(vllm_config=vllm_config, model_config=model_config)

    def _get_weights_iterator(
        self, model_name_or_path: str, gguf_to_hf_name_map: dict[str, str]
    ) -> Iterator[tuple[str, Tensor]]:
        weights = super()._get_weights_iterator(model_name_or_path, gguf_to_hf_name_map)
        for name, tensor in weights:
            if self._narrow:
                check_range(name, tensor)
            yield name, tensor


def _extra_tensor_names(path: str, name_map: dict[str, str]) -> list[str]:
    """Hugging Face's names of tensors that the file does not have, which tells of a tied head.

    Upstream's makes an object of each token of the vocabulary: 6 s for 49,152 on an x86 server.
    """
    there = {tensor.name for tensor in gguf_header.read(Path(path)).tensors}
    return [name_map[name] for name in name_map.keys() - there]


def _target_model(model: str, tokenizer: str, *args: Any, **options: Any) -> tuple[str, str]:
    """The model for which a draft model was made, which a GGUF file never is; without asking it."""
    if model.endswith(".gguf"):
        return model, tokenizer
    found: tuple[str, str] = maybe_override_with_speculators_target_model(
        model, tokenizer, *args, **options
    )
    return found


def register() -> None:
    """Make ours what vLLM takes for ``gguf``, loader included (as `linear.register_config`)."""
    gguf_loader.get_gguf_extra_tensor_names = _extra_tensor_names
    vllm.config.maybe_override_with_speculators_target_model = _target_model
    register_config("gguf", K80GGUFConfig)
    model_loader._LOAD_FORMAT_TO_MODEL_LOADER["gguf"] = K80GGUFModelLoader
