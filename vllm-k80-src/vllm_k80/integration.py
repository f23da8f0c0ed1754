"""Puts our operators where vLLM looks for its own. Runs once in every vLLM process."""

from collections.abc import Callable
from typing import Any


def install() -> None:
    """Register layers and quantizations, and replace what upstream keys on ``is_cuda``."""
    import torch
    import vllm._custom_ops
    import vllm.model_executor.layers.linear
    import vllm.model_executor.layers.rotary_embedding
    import vllm.model_executor.layers.vocab_parallel_embedding
    import vllm.model_executor.models.registry
    import vllm.utils

    from vllm_k80 import layers
    from vllm_k80.quantization import awq, compressed, gguf, gptq, k80, loader

    for part in (gguf, gptq, awq, compressed, k80, loader):
        part.register()

    # Upstream's registry hook covers custom operators; linear layers without quantization
    # ask this function instead, by the name that these two modules imported.
    def dispatch_unquantized_gemm() -> Callable[..., Any]:
        return layers.unquantized_gemm

    for module in (
        vllm.model_executor.layers.linear,
        vllm.model_executor.layers.vocab_parallel_embedding,
    ):
        module.dispatch_unquantized_gemm = dispatch_unquantized_gemm

    # Not one of the custom operators, for which upstream has a hook.
    rotary = vllm.model_executor.layers.rotary_embedding
    rotary.Phi3LongRoPEScaledRotaryEmbedding = layers.K80LongRotaryEmbedding

    # Upstream takes its compiled operator wherever the logits are on a GPU; it is not built here.
    vllm._custom_ops.apply_repetition_penalties = vllm._custom_ops.apply_repetition_penalties_torch

    # Upstream frees the memory of a captured graph's output through a compiled operator. Here the
    # output, a few rows, stays.
    vllm.utils.weak_ref_tensor = lambda tensor: tensor

    # A convolution would open cuDNN's libraries, which the image leaves out (0.9 GB), and a missing
    # one ends the process. Without cuDNN, torch uses its own convolutions.
    torch.backends.cudnn.enabled = False

    # Upstream asks a model's class what it can do in an interpreter of its own, lest CUDA be
    # initialized before a worker is forked. Ours are spawned, and importing everything once more
    # is a third of a start on an old processor.
    vllm.model_executor.models.registry._run_in_subprocess = lambda function: function()
