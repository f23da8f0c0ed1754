"""GGUF checkpoints.

vLLM reads the file and hands each tensor over as the bytes of its blocks. They are repacked
here once: 4-bit types into the INT4 layout, Q8_0 into the INT8 layout, without loss.
Block formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm.config
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from vllm.model_executor import model_loader
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import gguf as upstream
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import gguf_loader
from vllm.model_executor.model_loader.gguf_loader import GGUFModelLoader
from vllm.transformers_utils.config import maybe_override_with_speculators_target_model

from vllm_k80.quantization.gguf_file import SUPPORTED_TYPES, shared_reader, tensor_names
from vllm_k80.quantization.linear import CardConfig, apply, attach, register_config
from vllm_k80.quantization.loader import CachingLoader
from vllm_k80.quantization.packed import PackedWeight, concatenate

_HALF = 2  # bytes of an FP16 scale at the head of a block


def _blocks(raw: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """[N, bytes a row] uint8 to [N, blocks a row, bytes a block]."""
    return raw.view(raw.shape[0], -1, GGML_QUANT_SIZES[kind][1])


def _fp16(field: Tensor) -> Tensor:
    """The FP16 number in each block's 2 bytes: [N, blocks, 2] uint8 to [N, blocks] FP16."""
    return field.contiguous().view(torch.float16).squeeze(-1)


def _pair_neighbours(halves: Tensor) -> Tensor:
    """Nibbles from GGUF's order into ours.

    A GGUF block holds element j in the low and element j + 16 in the high half of byte j; our
    layout holds neighbours in a byte. [N, blocks, 16] uint8 to [N, blocks * 16] uint8.
    """
    elements = torch.cat((halves & 0x0F, halves >> 4), dim=-1)
    return (elements[..., 0::2] | (elements[..., 1::2] << 4)).flatten(1)


def _pack_q4_0(raw: Tensor) -> PackedWeight:
    blocks = _blocks(raw, GGMLQuantizationType.Q4_0)
    scale = _fp16(blocks[..., :_HALF])
    # Q4_0 is (q - 8) * scale. 8 * scale is exact in FP16 unless it overflows.
    minimum = scale.float() * -8.0
    if not minimum.half().isinf().any():
        minimum = minimum.half()
    return PackedWeight(_pair_neighbours(blocks[..., _HALF:]), scale.to(minimum.dtype), minimum)


def _pack_q4_1(raw: Tensor) -> PackedWeight:
    blocks = _blocks(raw, GGMLQuantizationType.Q4_1)
    scale, minimum = _fp16(blocks[..., :_HALF]), _fp16(blocks[..., _HALF : 2 * _HALF])
    return PackedWeight(_pair_neighbours(blocks[..., 2 * _HALF :]), scale, minimum)


def _pack_q8_0(raw: Tensor) -> PackedWeight:
    blocks = _blocks(raw, GGMLQuantizationType.Q8_0)
    qweight = blocks[..., _HALF:].contiguous().view(torch.int8).flatten(1)
    return PackedWeight(qweight, _fp16(blocks[..., :_HALF]))


_PACKERS: dict[GGMLQuantizationType, Callable[[Tensor], PackedWeight]] = {
    GGMLQuantizationType.Q4_0: _pack_q4_0,
    GGMLQuantizationType.Q4_1: _pack_q4_1,
    GGMLQuantizationType.Q8_0: _pack_q8_0,
    GGMLQuantizationType.F16: PackedWeight,
    GGMLQuantizationType.F32: PackedWeight,
}

assert {kind.name for kind in _PACKERS} == {*SUPPORTED_TYPES}


def pack(raw: Tensor, kind: int) -> PackedWeight:
    """Repack one GGUF tensor.

    Args:
        raw: [N, bytes a row] uint8 for a quantized type, [N, K] floats for F32 and F16.
        kind: `gguf.GGMLQuantizationType`.

    Raises:
        ValueError: a type that has no operator here.
    """
    name = GGMLQuantizationType(kind)
    if name not in _PACKERS:
        raise ValueError(
            f"GGUF tensors of type {name.name} are not supported; {', '.join(SUPPORTED_TYPES)} "
            f"are. Quantize the model to Q4_1 or Q8_0."
        )
    return _PACKERS[name](raw)


class K80GGUFLinearMethod(upstream.GGUFLinearMethod):
    """Upstream's loading, our layout and operators."""

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
                    raw.data_container[raw.shard_id_map[shard]].to(device),
                    kinds.shard_weight_type[shard],
                )
                for shard in order
            ]
        else:
            weights = [pack(raw.data.to(device), kinds.weight_type)]
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
            return K80GGUFLinearMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            return K80GGUFEmbeddingMethod(self)
        return None


class K80GGUFModelLoader(CachingLoader, GGUFModelLoader):
    """Upstream's loader; the file's header is parsed once instead of once a question."""

    def checkpoint_files(self, model: torch.nn.Module, model_config: Any) -> list[Path]:
        return [Path(self._prepare_weights(model_config.model))]

    def load_model(self, vllm_config: Any, model_config: Any) -> torch.nn.Module:
        # Upstream builds the Hugging Face model without weights, to learn its names, and
        # transformers refuses its default attention below torch 2.1.1.
        model_config.hf_config._attn_implementation = "eager"
        with shared_reader():
            return super().load_model(vllm_config=vllm_config, model_config=model_config)


def _extra_tensor_names(path: str, name_map: dict[str, str]) -> list[str]:
    """Hugging Face's names of tensors that the file does not have, which tells of a tied head.

    Upstream's parses the whole header, which nothing else asks for when weights are cached.
    """
    return [name_map[name] for name in name_map.keys() - tensor_names(path)]


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
