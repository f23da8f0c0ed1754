"""What a GGUF file says of its model, extracted once for Hugging Face's classes.

vLLM asks transformers for configuration and tokenizer of a GGUF file, in every process and
several times, and each time the whole header is parsed: over a minute for a vocabulary of
49,152. Written out once as `config.json` and `tokenizer.json`, they load in a blink.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_k80 import architectures
from vllm_k80.errors import UserError
from vllm_k80.quantization import gguf_header

SUPPORTED_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q4_K", "Q5_K", "Q6_K"),
    *("F16", "F32"),
)
# What to use in place of a file with others, as publishers name files.
INSTEAD = "Q4_K_M, Q6_K or Q8_0"

# In the key of the extracted files: raise when what is written changes.
_FORMAT = 7


@contextlib.contextmanager
def shared_reader() -> Iterator[None]:
    """Within this context `gguf.GGUFReader` parses each file once, and faster."""
    import gguf
    import numpy

    real = gguf.GGUFReader

    class Reader(gguf.GGUFReader):
        """Cuts its strings out of a plain array: out of a memmap, each would be a memmap."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(numpy.ndarray)

    read = functools.lru_cache(maxsize=1)(Reader)
    # A file is the same whether it is named by a string or by a Path.
    gguf.GGUFReader = lambda path: read(os.fspath(path))
    try:
        yield
    finally:
        gguf.GGUFReader = real


def check_types(path: Path, reader: Any) -> None:
    """Refuse a file with tensors of types that no operator takes (UserError)."""
    unsupported = sorted(
        {tensor.tensor_type.name for tensor in reader.tensors} - {*SUPPORTED_TYPES}
    )
    if unsupported:
        raise UserError(
            f"{path}: tensors of type {', '.join(unsupported)} cannot be served; those of "
            f"{', '.join(SUPPORTED_TYPES)} can. Use a file quantized to {INSTEAD}."
        )


def check_architecture(path: Path) -> None:
    """Refuse a file of an architecture that is not served (UserError)."""
    if refusal := architectures.gguf_refusal(gguf_header.read(path).fields):
        raise UserError(f"{path}: {refusal}")


# Of Llama 3.1, 3.2 and 3.3 alike (their config.json); "factor" differs.
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_scaling(
    path: Path, tensors: Mapping[str, Any], theta: float, head_size: int
) -> dict[str, Any] | None:
    """The ``rope_scaling`` of a config.json, of which a GGUF file keeps what it amounts to.

    llama.cpp's converter (convert_hf_to_gguf.py) writes a divisor for each frequency, the tensor
    ``rope_freqs``, and leaves the numbers out that it was made of; transformers does not read it.
    Without it a Llama 3.1 would be served with the positions of a Llama 3, and answer a little
    wrong. The largest divisor is the factor; the others must follow from it by Llama 3's formula
    (transformers, modeling_rope_utils.py).

    Args:
        path: of the file, for errors. tensors: its numbers, [head_size / 2], by the tensor's name.
        theta: the base of the frequencies.

    Raises:
        UserError: divisors of another kind.
    """
    import numpy

    refused = UserError(
        f"{path}: its rotary embedding is scaled in a way that is not read from GGUF files. Use "
        f"the model's safetensors checkpoint, with --quantization k80-w4 if it is not quantized."
    )
    if any(name.startswith("rope_factors_") for name in tensors):  # Phi-3's, of long contexts
        raise refused
    if "rope_freqs.weight" not in tensors:
        return None
    found = numpy.asarray(tensors["rope_freqs.weight"], dtype=numpy.float64).reshape(-1)
    factor = round(float(found.max()), 4)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    original = _LLAMA3["original_max_position_embeddings"]
    waves = 2 * numpy.pi * theta ** (numpy.arange(0, head_size, 2) / head_size)
    smooth = ((original / waves - low) / (high - low)).clip(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not numpy.allclose(found, expected, rtol=1e-3):
        raise refused
    return _LLAMA3 | {"factor": factor} if factor != 1 else None


def _mend_config(config: Any, fields: Mapping[str, Any]) -> None:
    """Adds what transformers does not read of every architecture.

    Without its window a Phi-3 would look back further than it was trained to, and a StarCoder2 with
    a rotary embedding of another base would answer nonsense. The size of a head is the hidden size
    by the heads unless it is told; a Qwen3's is not.
    """
    architecture = fields["general.architecture"]
    for key, name in (
        ("attention.sliding_window", "sliding_window"),
        ("attention.key_length", "head_dim"),
        ("rope.freq_base", "rope_theta"),
    ):
        told = fields.get(f"{architecture}.{key}")
        if told and hasattr(config, name):
            setattr(config, name, told)
    rotated = fields.get(f"{architecture}.rope.dimension_count")
    if rotated and hasattr(config, "partial_rotary_factor"):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.partial_rotary_factor = rotated / head


def _mend_tokenizer(tokenizer: Any, reader: Any) -> Any:
    """The tokenizer as the file describes it.

    transformers takes a byte-level vocabulary ("gpt2") of a Llama for Llama's own: it puts a
    beginning-of-text token before each prompt, ends texts with the wrong token, and names a decoder
    by which structured output misreads every token that has a space.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def field(name: str, default: Any = None) -> Any:
        entry = reader.get_field(f"tokenizer.ggml.{name}")
        return default if entry is None else entry.contents()

    if field("model") != "gpt2":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if field("pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: field(f"{theirs}_token_id") for ours, theirs in names.items()}
    special = {f"{k}_token": backend.id_to_token(i) for k, i in ids.items() if i is not None}
    if field("add_bos_token", False):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **special
    )


def extract_metadata(path: Path, cache: Path) -> Path:
    """Directory with the configuration and tokenizer of a GGUF file.

    Args:
        path: the file.
        cache: where such directories are kept; made if need be. A directory appears there
            complete or not at all. If it cannot be written, a temporary directory serves.

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
    if _is_whole(target):
        return target

    check_architecture(path)
    # Not into the cache: what libraries say of a disk that is full is not always an OSError.
    extracted = Path(tempfile.mkdtemp(prefix="vllm-k80-metadata-"))
    try:
        _extract(path, extracted)
    except BaseException:
        shutil.rmtree(extracted, ignore_errors=True)
        raise
    try:
        _keep(extracted, target)
    except OSError as error:
        from vllm.logger import init_logger

        init_logger("vllm.k80.gguf").warning(
            "What %s says of its model cannot be kept in %s, and is extracted at each start: %s.",
            path.name,
            cache,
            error.strerror,
        )
        atexit.register(shutil.rmtree, extracted, ignore_errors=True)
        return extracted
    shutil.rmtree(extracted, ignore_errors=True)
    return target


def _is_whole(directory: Path) -> bool:
    try:
        for name in ("config.json", "tokenizer.json"):
            json.loads((directory / name).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _extract(path: Path, into: Path) -> None:
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    with shared_reader():
        try:
            reader = gguf.GGUFReader(path)
            check_types(path, reader)
        except (ValueError, IndexError) as error:
            raise UserError(f"{path} is damaged or of an unknown version: {error}.") from None
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        config = AutoConfig.from_pretrained(**source)
        # Without the configuration it would read the metadata for it once more.
        tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
        tokenizer = _mend_tokenizer(tokenizer, reader)
    _mend_config(config, gguf_header.read(path).fields)
    factors = {t.name: t.data for t in reader.tensors if t.name.startswith("rope_")}
    if factors:
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        config.rope_scaling = rope_scaling(path, factors, config.rope_theta, size)
    if not config.architectures:
        # A GGUF file names the kind of model only; vLLM wants the class.
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    # Else vLLM looks for safetensors files to learn the dtype, logs errors and waits.
    config.torch_dtype = "float32"
    config.save_pretrained(into)
    tokenizer.vocab_file = None  # else the whole GGUF file is copied as "tokenizer.model"
    tokenizer.save_pretrained(into)


def _keep(extracted: Path, target: Path) -> None:
    """A copy of the directory under another name, which appears when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for file in extracted.iterdir():
            with (staging / file.name).open("wb") as copy:
                copy.write(file.read_bytes())
                copy.flush()
                os.fsync(copy.fileno())
        if _is_whole(target):  # another process was faster
            return
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.rename(staging, target)
        except OSError:  # as above
            if not _is_whole(target):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
