"""What each CUDA compute capability can do, as far as serving depends on it.

Pure functions of the capability: the platform asks them, and tests ask them for cards that
are not there.
"""

from typing import NamedTuple


class Capability(NamedTuple):
    """CUDA compute capability, for example ``Capability(3, 7)`` for a K80 die."""

    major: int
    minor: int


K80 = Capability(3, 7)
K80_NAME = "Tesla K80"

# Usable memory of one K80 die in bytes: 11,441 MiB as nvidia-smi reports it, ECC on.
K80_MEMORY = 11_441 * 1024**2

# vLLM's names of attention backends that need instructions or a compiler the card lacks.
REFUSED_BACKENDS: dict[str, str] = {
    "FLASH_ATTN": "FlashAttention needs sm_80",
    "FLASH_ATTN_VLLM_V1": "FlashAttention needs sm_80",
    "FLASHINFER": "FlashInfer needs sm_75",
    "FLASHINFER_VLLM_V1": "FlashInfer needs sm_75",
    "TRITON_ATTN_VLLM_V1": "Triton has no target below sm_70",
    "TRITON_MLA": "Triton has no target below sm_70",
    "TRITON_MLA_VLLM_V1": "Triton has no target below sm_70",
    "FLEX_ATTENTION": "FlexAttention is compiled by Triton, which has no target below sm_70",
    "TREE_ATTN": "tree attention is written in Triton, which has no target below sm_70",
}

# Both mean the attention operator of this package; the second is V1's name for it.
ACCEPTED_BACKENDS = ("XFORMERS", "XFORMERS_VLLM_V1")


def has_native_fp16(capability: Capability) -> bool:
    """Whether the card adds and multiplies FP16 (CUDA C++ programming guide: 5.3, and 6.0 on)."""
    return capability >= (5, 3)


def dtype_names(capability: Capability) -> tuple[str, ...]:
    """Activation dtypes in order of preference, by torch's names.

    The first is what FP32 and BF16 checkpoints get with ``--dtype auto``. Without FP16
    arithmetic that is FP32; FP16 is then a storage format only. BF16 is never there: torch
    2.0.1 has no BF16 kernels for cards below sm_80.
    """
    return ("float16", "float32") if has_native_fp16(capability) else ("float32", "float16")


def backend_refusal(capability: Capability, backend: str | None) -> str | None:
    """Why this attention backend cannot be used, as one sentence, or None if it can.

    Args:
        capability: of the die.
        backend: name from ``VLLM_ATTENTION_BACKEND``, or None for the default.
    """
    if backend is None or backend in ACCEPTED_BACKENDS:
        return None
    reason = REFUSED_BACKENDS.get(backend, "vllm_k80 carries no such operator")
    return (
        f"The attention backend {backend} cannot run on a device of compute capability "
        f"{capability.major}.{capability.minor}: {reason}. Unset VLLM_ATTENTION_BACKEND, or set "
        f"it to XFORMERS, which here means the operator of vllm_k80."
    )


def bytes_left(total: int, utilization: float, weights: int, work: int) -> int:
    """Bytes of a die left for the KV cache; below 0 where that much is lacking.

    Args:
        total: memory of the die in bytes.
        utilization: share of it that may be used (``--gpu-memory-utilization``).
        weights: bytes taken by them. work: by all else, the sum of `work_bytes`.
    """
    return int(total * utilization) - weights - work


def kv_cache_bytes(total: int, utilization: float, weights: int, activations: int) -> int:
    """`bytes_left`, where something is.

    Raises:
        ValueError: nothing is left.
    """
    left = bytes_left(total, utilization, weights, activations)
    if left <= 0:
        mib = 1024**2
        raise ValueError(
            f"The model does not fit on a die: weights take {weights // mib} MiB and activations "
            f"{activations // mib} MiB of {int(total * utilization) // mib} MiB. Use a smaller or "
            f"a quantized model, or lower --max-num-seqs or --max-num-batched-tokens."
        )
    return left


# Assumed: CUDA's context, and the machine code and work spaces of torch, cuBLAS and our kernels.
_CONTEXT = 300 * 1024**2
# What weights are dequantized into for a prefill step, FP32 (ops/kernels.py, _TILE_ELEMENTS).
_TILE = 4 * (1 << 23)
# vLLM's sampler with top-k and top-p (v1/sample/ops/topk_topp_sampler.py), bytes a logit: the
# model's output and its FP32 copy, their sort with INT64 indices, as much again while it sorts.
_SAMPLING = 4 + 4 + 2 * (4 + 8)
# A step's floats a token, at most: residual, input and its FP32 copy; in the widest layer a product
# of two parts, and what is made of these.
_HIDDEN, _INNER = 2, 3


def work_bytes(
    *, tokens: int, sequences: int, vocabulary: int, hidden: int, widest: int
) -> dict[str, int]:
    """What a die needs beside weights and KV cache, in bytes by part.

    The parts are not all needed at the same time. Their sum leaves torch's allocator room for
    fragments, so that a server does not die of one after hours.

    Args:
        tokens: of a prefill step (``--max-num-batched-tokens``).
        sequences: whose next tokens are chosen together (``--max-num-seqs``).
        vocabulary: of the whole model, for each die gets all logits.
        hidden: of an activation between layers. widest: of a die's part of the feed-forward layer
            or of all heads, whichever is more.
    """
    return {
        "context": _CONTEXT,
        "tile": _TILE,
        "activations": 4 * tokens * (_HIDDEN * hidden + _INNER * widest),
        "sampling": _SAMPLING * min(sequences, tokens) * vocabulary,
    }
