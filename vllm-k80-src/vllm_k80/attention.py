"""The attention backend: our operator on vLLM's paged KV cache.

It answers to vLLM's backend name XFORMERS, the one that vLLM's own code took for cards
before FlashAttention.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.attention.backends.utils import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_k80.ops import CALLS, attention_kernels, k80
from vllm_k80.ops.attention_reference import MAX_HEAD_SIZE

# Multiples of 8 keep an FP16 row aligned for 16-byte loads.
_HEAD_SIZES = list(range(8, MAX_HEAD_SIZE + 1, 8))


@dataclass
class K80AttentionMetadata:
    """One batch: where each sequence's queries and cache pages are.

    Shapes are those of the operator `varlen_attention`. The tensors are on the device and stay
    there; the numbers are bounds that the host knows.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    is_decode: bool  # one query for each sequence
    # What layers of this step have found, by the kind of layer.
    found: dict[int, attention_kernels.DecodeStep] = field(default_factory=dict)


class K80MetadataBuilder(AttentionMetadataBuilder[K80AttentionMetadata]):
    """Builds the metadata of a batch from what is common to all backends.

    A graph of a decode batch is replayed with whatever lengths come, so the bound of the lengths is
    always the model's: eager execution then shares out the work as the graph does, and their
    results are the same to the last bit.
    """

    cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.max_model_len = vllm_config.model_config.max_model_len

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> K80AttentionMetadata:
        common = common_attn_metadata
        return K80AttentionMetadata(
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=self.max_model_len,
            is_decode=common.max_query_len == 1 and common.num_actual_tokens == common.num_reqs,
        )


class Rotation:
    """A layer's rotary embedding, put off until the keys are written to the cache.

    `fusion.fuse` lets the layer call `remember` in its place; its attention comes right after.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.positions: Tensor | None = None

    def remember(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key as they are."""
        self.positions = positions
        return query, key


# Numbers for layers that differ in nothing but their tensors.
_KINDS: dict[tuple[Any, ...], int] = {}


class K80AttentionImpl(AttentionImpl[K80AttentionMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise ValueError(
                f"Attention of type {attn_type} is not served on a K80: only decoder "
                f"self-attention has an operator. Choose a decoder-only model."
            )
        if kv_cache_dtype != "auto":
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype}: on a K80 the KV cache has the dtype of the "
                f"activations. Remove the flag."
            )
        self.query_shape = (-1, num_heads, head_size)
        self.key_shape = (-1, num_kv_heads or num_heads, head_size)
        self.scale = float(scale)
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        # Layers are made while the activations' dtype is torch's default.
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.shares_cache = kv_sharing_target_layer_name is not None
        self.rotation: Rotation | None = None
        self._kind_with: tuple[Any, int] = (lambda: None, 0)

    def _kind(self, kv_cache: Tensor) -> int:
        """The layer's number in `_KINDS`, with this cache."""
        known, kind = self._kind_with
        if known() is not kv_cache:
            layouts = kv_cache.shape, kv_cache.stride(), kv_cache.dtype
            rotary = None if self.rotation is None else id(self.rotation.layer)
            options = self.scale, self.window, self.soft_cap
            of = (self.query_shape, self.key_shape, *options, rotary, *layouts)
            kind = _KINDS.setdefault(of, len(_KINDS))
            self._kind_with = weakref.ref(kv_cache), kind
        return kind

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: K80AttentionMetadata | None,
        output: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values, then attend.

        Args:
            query: [tokens, heads * head_size]; key, value: [tokens, kv_heads * head_size].
            kv_cache: [2, blocks, block_size, kv_heads, head_size].
            attn_metadata: None in vLLM's memory profiling run.
            output: None, as the backend asks.

        Returns:
            [tokens, heads * head_size]. Rows that pad the batch hold anything: no row's result
            depends on another's.
        """
        if attn_metadata is None:
            return torch.zeros_like(query)
        rotation = self.rotation
        kind = None
        if attn_metadata.is_decode and rotation is not None and self.alibi_slopes is None:
            kind = self._kind(kv_cache)
            if found := attn_metadata.found.get(kind):
                context = found(query, key, value, rotation.positions, kv_cache)
                if context is not None:
                    CALLS["rotary_and_cache"] += 1
                    CALLS["paged_attention"] += 1
                    return context
        rows = query, key, value
        context = query.new_empty(query.shape)
        output, query = context.view(self.query_shape), query.view(self.query_shape)
        key, value = key.view(self.key_shape), value.view(self.key_shape)
        if rotation is not None:
            k80.rotary_and_cache(
                rotation.positions,
                query,
                key,
                value,
                rotation.layer.cos_sin_cache,
                rotation.layer.is_neox_style,
                kv_cache,
                attn_metadata.slot_mapping,
            )
        elif not self.shares_cache:
            k80.reshape_and_cache(key, value, kv_cache, attn_metadata.slot_mapping)
        if self.alibi_slopes is not None and self.alibi_slopes.device != query.device:
            self.alibi_slopes = self.alibi_slopes.to(query.device)
        if attn_metadata.num_actual_tokens != query.shape[0]:
            query = query[: attn_metadata.num_actual_tokens]
        options = (self.scale, self.window, self.soft_cap, self.alibi_slopes)
        if attn_metadata.is_decode:
            k80.paged_attention(
                query,
                kv_cache,
                output,
                attn_metadata.seq_lens,
                attn_metadata.block_table,
                attn_metadata.max_seq_len,
                *options,
            )
            if kind is not None and rotation is not None and len(query) == len(rows[0]):
                found = attention_kernels.decode_step(
                    rows,
                    (query, key, value),
                    rotation.positions,
                    rotation.layer.cos_sin_cache,
                    rotation.layer.is_neox_style,
                    kv_cache,
                    attn_metadata.slot_mapping,
                    output,
                    attn_metadata.seq_lens,
                    attn_metadata.block_table,
                    attn_metadata.max_seq_len,
                    *options,
                )
                if found:
                    attn_metadata.found[kind] = found
        else:
            k80.varlen_attention(
                query,
                kv_cache,
                output,
                attn_metadata.query_start_loc,
                attn_metadata.seq_lens,
                attn_metadata.block_table,
                attn_metadata.max_query_len,
                *options,
            )
        return context


class K80AttentionBackend(AttentionBackend):
    """What vLLM's model runner asks of an attention backend."""

    # vLLM would fill the buffer with zeros: a launch a layer, of what is overwritten.
    accept_output_buffer = False

    @staticmethod
    def get_name() -> str:
        return "XFORMERS_VLLM_V1"

    @classmethod
    def get_supported_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return _HEAD_SIZES

    @classmethod
    def validate_head_size(cls, head_size: int) -> None:
        if head_size not in _HEAD_SIZES:
            raise ValueError(
                f"Attention heads of size {head_size} are not served on a K80: multiples of 8 up "
                f"to {_HEAD_SIZES[-1]} are."
            )

    @staticmethod
    def get_impl_cls() -> type[K80AttentionImpl]:
        return K80AttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[K80AttentionMetadata]:
        return K80AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[K80MetadataBuilder]:
        return K80MetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def use_cascade_attention(*_: Any, **__: Any) -> bool:
        return False
