"""transformers 4.55 turns its torch support off below torch 2.1, by version alone."""

import logging
from collections.abc import Callable
from types import ModuleType


def execute_accepting_old_torch(
    import_utils: ModuleType, execute: Callable[[ModuleType], None]
) -> None:
    """Execute `transformers.utils.import_utils` so that it accepts the installed torch.

    What vLLM takes from transformers (configurations, tokenizers, the GGUF reader) works on
    torch 2.0.1 once `vllm_k80.compat` has completed it. The warning that PyTorch is disabled
    would be wrong, so it is not shown.
    """
    import torch

    from vllm_k80.compat import needs_completion

    if not needs_completion(torch.__version__):
        execute(import_utils)
        return
    logger = logging.getLogger(import_utils.__name__)

    def keep(record: logging.LogRecord) -> bool:
        return "Disabling PyTorch" not in record.getMessage()

    logger.addFilter(keep)
    try:
        execute(import_utils)
    finally:
        logger.removeFilter(keep)
    import_utils._torch_available = True  # type: ignore[attr-defined]
