"""vLLM's loader of safetensors checkpoints, with a check that values fit the storage.

And what it shares with the one of GGUF files: the cache of repacked weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_k80.quantization import cache

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


class CachingLoader:
    """Takes weights from the cache, or puts them there. Before upstream's class."""

    load_config: Any
    _device: torch.device
    _unsaved: cache.Entry | None = None

    def checkpoint_files(self, model: torch.nn.Module, model_config: Any) -> list[Path] | None:
        """The files that the model's weights depend on; None: too many to say."""
        raise NotImplementedError

    def load_model(self, vllm_config: Any, model_config: Any) -> torch.nn.Module:
        """Load and process the weights, or restore the state in which that has left them."""
        self._device = torch.device(self.load_config.device or vllm_config.device_config.device)
        model: torch.nn.Module = super().load_model(  # type: ignore[misc]  # upstream's, mixed in
            vllm_config=vllm_config, model_config=model_config
        )
        if self._unsaved:
            self._unsaved.save(model)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """What lies between a model's initialization and ``process_weights_after_loading``."""
        self._unsaved = None
        if cache.directory() and (files := self.checkpoint_files(model, model_config)):
            entry = cache.find(files, model, model_config, self._device)
            if entry and entry.restore(model):
                return
            self._unsaved = entry
        super().load_weights(model, model_config)  # type: ignore[misc]  # upstream's, mixed in


class K80ModelLoader(CachingLoader, DefaultModelLoader):
    """Upstream's loader; nothing becomes infinite unsaid when BF16 or FP32 is stored as FP16."""

    def checkpoint_files(self, model: torch.nn.Module, model_config: Any) -> list[Path] | None:
        if getattr(model, "secondary_weights", ()):  # from other checkpoints
            return None
        folder, names, _ = self._prepare_weights(
            model_config.model,
            model_config.revision,
            getattr(model, "fall_back_to_pt_during_load", True),
            getattr(model, "allow_patterns_overrides", None),
        )
        # Some formats have their settings in a file of their own, some models their code.
        others = (path for form in ("*config*.json", "*.py") for path in Path(folder).glob(form))
        return sorted({*map(Path, names), *others})

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
