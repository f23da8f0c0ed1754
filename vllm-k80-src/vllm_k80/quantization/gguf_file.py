"""What a GGUF file says of its model, extracted once for Hugging Face's classes.

vLLM asks transformers for configuration and tokenizer of a GGUF file, in every process and
several times, and each time the whole header is parsed: over a minute for a vocabulary of
49,152. Written out once as `config.json` and `tokenizer.json`, they load in a blink.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_k80.errors import UserError

SUPPORTED_TYPES = ("Q4_0", "Q4_1", "Q8_0", "F16", "F32")

# In the key of the extracted files: raise when what is written changes.
_FORMAT = 1


@contextlib.contextmanager
def shared_reader() -> Iterator[None]:
    """Within this context `gguf.GGUFReader` parses each file once."""
    import gguf

    real = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(real)
    try:
        yield
    finally:
        gguf.GGUFReader = real


def _check_types(path: Path, reader: Any) -> None:
    unsupported = sorted(
        {tensor.tensor_type.name for tensor in reader.tensors} - {*SUPPORTED_TYPES}
    )
    if unsupported:
        raise UserError(
            f"{path}: tensors of type {', '.join(unsupported)} cannot be served yet. "
            f"Use a file quantized to Q4_1, Q4_0 or Q8_0."
        )


def extract_metadata(path: Path, cache: Path) -> Path:
    """Directory with the configuration and tokenizer of a GGUF file.

    Args:
        path: the file.
        cache: where such directories are kept; made if need be. A directory appears there
            complete or not at all.

    Raises:
        UserError: no such file, not a GGUF file, or tensor types that cannot be served.
    """
    try:
        stat = path.stat()
        with path.open("rb") as file:
            head = file.read(1 << 20)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    if not head.startswith(b"GGUF"):
        raise UserError(f"{path} is not a GGUF file (it does not begin with the bytes GGUF).")

    identity = f"{_FORMAT}:{path.name}:{stat.st_size}".encode()
    target = cache / hashlib.sha256(identity + head).hexdigest()[:16]
    if target.is_dir():
        return target

    import gguf
    from transformers import AutoConfig, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=cache))
    try:
        with shared_reader():
            try:
                _check_types(path, gguf.GGUFReader(path))
            except (ValueError, IndexError) as error:
                raise UserError(f"{path} is damaged or of an unknown version: {error}.") from None
            source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            config = AutoConfig.from_pretrained(**source)
            tokenizer = AutoTokenizer.from_pretrained(**source)
        if not config.architectures:
            # A GGUF file names the kind of model only; vLLM wants the class.
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        # Else vLLM looks for safetensors files to learn the dtype, logs errors and waits.
        config.torch_dtype = "float32"
        config.save_pretrained(staging)
        tokenizer.vocab_file = None  # else the whole GGUF file is copied as "tokenizer.model"
        tokenizer.save_pretrained(staging)
        try:
            os.rename(staging, target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
