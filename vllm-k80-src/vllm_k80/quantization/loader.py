"""vLLM's loader of safetensors checkpoints, with a check that values fit the storage."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

_LARGEST = torch.finfo(torch.float16).max


def check_range(name: str, tensor: Tensor) -> None:
    """See that a tensor of the checkpoint can be stored as FP16.

    Raises:
        ValueError: it has values beyond 65504, FP16's largest, or that are not numbers.
    """
    if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.numel():
        return
    low, high = tensor.aminmax()
    if not (low >= -_LARGEST and high <= _LARGEST):  # so written, a NaN is found too
        raise ValueError(
            f"{name} has values from {low.item():g} to {high.item():g}, which FP16 storage "
            f"cannot hold ({_LARGEST:g} is its largest). Use --dtype float32 without "
            f"--quantization, or a checkpoint that was quantized before."
        )


class K80ModelLoader(DefaultModelLoader):
    """Upstream's loader; nothing becomes infinite unsaid when BF16 or FP32 is stored as FP16."""

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        quantization = model_config.quantization or ""
        narrow = model_config.dtype == torch.float16 or quantization.startswith("k80-")
        for name, tensor in super().get_all_weights(model_config, model):
            if narrow:
                check_range(name, tensor)
            yield name, tensor


def register() -> None:
    """Make ours what vLLM takes wherever it took its default loader."""
    formats = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    formats.update({k: K80ModelLoader for k, v in formats.items() if v is DefaultModelLoader})
