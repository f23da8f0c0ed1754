"""How a die's memory is shared out: weights, work buffers, and the KV cache that is left.

The one account of it. `plan` and `predict` ask it before a model is loaded, and the workers when
it is, so that an engine takes for its KV cache what was planned.
"""

from dataclasses import dataclass

from vllm_k80 import device
from vllm_k80.model import Model

BLOCK = 16  # tokens of a page of the KV cache, vLLM's --block-size


@dataclass(frozen=True)
class Limits:
    """What bounds an engine's memory; the defaults are those of ``vllm serve`` on such a card."""

    total: int = device.K80_MEMORY  # bytes of the die
    utilization: float = 0.9  # --gpu-memory-utilization
    tokens: int = 2048  # of a prefill step, --max-num-batched-tokens
    sequences: int = 256  # at once, --max-num-seqs

    @property
    def usable(self) -> int:
        """Bytes of the die that may be used."""
        return int(self.total * self.utilization)


def work(model: Model, limits: Limits) -> dict[str, int]:
    """Bytes that a die needs beside weights and KV cache, by part (`device.work_bytes`)."""
    return device.work_bytes(
        tokens=limits.tokens,
        sequences=limits.sequences,
        vocabulary=model.head.n * model.dies,
        hidden=model.hidden,
        widest=max(model.inner, model.heads * model.head_size),
    )


def left(model: Model, limits: Limits) -> int:
    """Bytes of a die that are left for the KV cache; below 0 where that much is lacking."""
    used = sum(work(model, limits).values())
    return device.bytes_left(limits.total, limits.utilization, model.loaded, used)


def cache_tokens(model: Model, size: int) -> int:
    """Tokens of all layers' keys and values in so many bytes: whole pages, less the one that vLLM
    keeps empty (`BlockPool.null_block`)."""
    return max(0, size // (BLOCK * model.cache_of_a_token) - 1) * BLOCK


def sequence_tokens(model: Model, context: int, limits: Limits) -> int:
    """Tokens of KV cache that a sequence of this context takes, in whole pages.

    With a sliding window in all layers those before it are given back
    (`SlidingWindowSpec.max_memory_usage_bytes`).
    """
    if model.window and context > model.window - 1 + limits.tokens:
        return (-(-(model.window - 1 + limits.tokens) // BLOCK) + 1) * BLOCK
    return -(-context // BLOCK) * BLOCK


def largest_context(model: Model, tokens: int, sequences: int, limits: Limits) -> int:
    """The longest context of which so many sequences fit into ``tokens`` of KV cache; 0: none."""
    share = tokens // sequences // BLOCK * BLOCK
    if sequence_tokens(model, model.longest, limits) <= share:
        return model.longest
    return min(share, model.longest)
