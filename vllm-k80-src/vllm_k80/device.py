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


def kv_cache_bytes(total: int, utilization: float, weights: int, activations: int) -> int:
    """Bytes of a die left for the KV cache.

    Args:
        total: memory of the die in bytes.
        utilization: share of it that may be used (``--gpu-memory-utilization``).
        weights, activations: bytes taken by them.

    Raises:
        ValueError: nothing is left.
    """
    left = int(total * utilization) - weights - activations
    if left <= 0:
        mib = 1024**2
        raise ValueError(
            f"The model does not fit on a die: weights take {weights // mib} MiB and activations "
            f"{activations // mib} MiB of {int(total * utilization) // mib} MiB. Use a smaller or "
            f"a quantized model, or lower --max-num-batched-tokens."
        )
    return left
