"""Repacked weights on disk: a later start neither reads the checkpoint nor repacks it.

An entry is one safetensors file (https://github.com/huggingface/safetensors, "Format") with the
whole state of the model of one rank, as loading left it. Its name is a digest of all that this
state depends on: the content of the checkpoint's files, its configuration, quantization, dtype and
rank, the names and shapes that the model has before loading, our code that packs, and versions.

It is written under another name, synchronized and renamed, so that it is there whole or not at all,
and each tensor has a checksum. Whatever is wrong with the cache, the start goes on without it.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger

from vllm_k80 import __version__
from vllm_k80.ops import reference
from vllm_k80.quantization import content
from vllm_k80.quantization.linear import attach
from vllm_k80.quantization.packed import PackedWeight

logger: logging.Logger = init_logger("vllm.k80.cache")

_DEFAULT_GB = 20.0
# Left free on the disk: more than `preflight` wants to see on a server that serves.
_SPARE = 6_000_000_000
_SYNCHRONIZED = 1 << 28  # bytes that may wait for the disk
_PIECE = 1 << 20  # bytes read at a time
# Instances share the directory: a link or a pipe that one of them has left there must neither lead
# another elsewhere nor keep it waiting.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK

_NAMES = {  # safetensors' of dtypes
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Unusable(Exception):
    """Why weights do not get into the cache, or not out of it. The end of a sentence."""


def limit() -> int:
    """Bytes that entries may take together: ``VLLM_K80_CACHE_GB`` (20) of 1e9 bytes."""
    named = os.environ.get("VLLM_K80_CACHE_GB", "")
    try:
        return int(float(named or _DEFAULT_GB) * 1e9)
    except (ValueError, OverflowError):
        logger.warning("VLLM_K80_CACHE_GB=%s is no number: weights are not cached.", named)
        return 0


def directory() -> Path | None:
    """Where entries are: ``weights`` in ``VLLM_K80_CACHE``. None: weights are not cached."""
    named = os.environ.get("VLLM_K80_CACHE")
    return Path(named) / "weights" if named and limit() > 0 else None


@functools.cache
def _code() -> str:
    """Digest of what packs and writes: surer than a number that somebody remembers to raise."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(reference.__file__)]
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _tensors(model: torch.nn.Module, parts: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that loading sets, by name; those of a shared module once.

    Not buffers that modules compute when they are made, such as rotary embeddings have, which
    torch calls not persistent; but ``parts``, which are not persistent either.
    """
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                name = f"{prefix}.{key}" if prefix else key
                computed = key in module._non_persistent_buffers_set and name not in parts
                if tensor is not None and not computed:
                    yield name, tensor


def _shape(tensor: Tensor) -> list[Any]:
    if isinstance(tensor, UninitializedParameter):  # GGUF's, until the file is read
        return []
    return [str(tensor.dtype), *tensor.shape]


def find(
    files: list[Path], model: torch.nn.Module, model_config: Any, device: torch.device
) -> "Entry | None":
    """The entry of a model that is about to be loaded, be it there or not.

    Args:
        files: of the checkpoint, with all that its weights depend on.
        model: initialized, not loaded. model_config: vLLM's `ModelConfig`.
        device: where its weights are to be.

    Returns:
        None where there is no cache, or nothing to repack.
    """
    root = directory()
    if root is None or model_config.quantization is None:
        return None
    try:
        root.mkdir(parents=True, exist_ok=True)
        found = content.digests(files, root / "digests.json")
    except OSError as error:
        logger.warning("%s: %s: weights are not cached.", error.filename, error.strerror)
        return None
    try:
        config = json.loads(model_config.hf_config.to_json_string())
    except (TypeError, ValueError) as error:
        logger.warning("The model's configuration is no JSON (%s): weights are not cached.", error)
        return None
    config.pop("_name_or_path", None)  # where it is, not what it is
    before = {name: _shape(tensor) for name, tensor in _tensors(model)}
    identity = {
        "code": _code(),
        "versions": [__version__, version("vllm"), torch.__version__],
        "files": found,
        "config": config,
        "quantization": model_config.quantization,
        "dtype": str(model_config.dtype),
        "device": device.type,  # whose rounding they have, where they are quantized here
        "ranks": [
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
            get_pp_group().rank_in_group,
            get_pp_group().world_size,
        ],
        "model": type(model).__name__,
        "tensors": before,
    }
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
    return Entry(root / f"{key.hexdigest()}.safetensors", device, before)


@dataclass
class Entry:
    """The weights of one model, with all that they depend on, for one rank.

    ``path`` is its file, ``device`` where the weights are to be, ``before`` what tensors the model
    has until they are loaded (`_shape`).
    """

    path: Path
    device: torch.device
    before: dict[str, list[Any]]

    def restore(self, model: torch.nn.Module) -> bool:
        """Give the model its final state. False where the entry is not there or damaged.

        Of modules with packed weights, ``process_weights_after_loading`` has nothing left to do.
        Upstream's for others runs as it would; it reads only the scales of a quantized KV cache,
        which is not served.
        """
        began = time.perf_counter()
        try:
            state, size = _read(self.path)
            state.check(model, self.before)
        except FileNotFoundError:
            return False
        except (
            *(_Unusable, OSError, SafetensorError),
            *(ValueError, LookupError, TypeError, AttributeError),
        ) as error:
            logger.warning(
                "%s is damaged (%s): the weights are read from the checkpoint.", self.path, error
            )
            with contextlib.suppress(OSError):
                self.path.unlink()
            return False
        state.place(model, self.device)
        with contextlib.suppress(OSError):  # a directory that may only be read
            os.utime(self.path)  # when it was last of use, for `_make_room`
        seconds = time.perf_counter() - began
        logger.info("Weights from the cache %s (%.2f GB, %.1f s).", self.path, size / 1e9, seconds)
        return True

    def save(self, model: torch.nn.Module) -> None:
        """Write the state of the loaded model, tensor by tensor; or log why not."""
        if self.path.exists():  # another instance was faster
            return
        began = time.perf_counter()
        try:
            size = _write(self.path, _State.of(model, self.before))
        except BlockingIOError:
            logger.info("Another instance is writing %s.", self.path)
        except (_Unusable, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("The weights are not cached in %s: %s.", self.path.parent, reason)
        else:
            seconds = time.perf_counter() - began
            logger.info("Weights cached to %s (%.2f GB, %.1f s).", self.path, size / 1e9, seconds)


@dataclass
class _State:
    """A model's tensors by name; names of the same memory; how packed weights consist of them.

    ``packed``: by module, for each of its weights the names of its parts.
    """

    tensors: dict[str, Tensor]
    same: dict[str, str]
    packed: dict[str, list[list[str]]]

    @staticmethod
    def of(model: torch.nn.Module, before: dict[str, list[Any]]) -> "_State":
        """That of a loaded model, which had the tensors ``before`` loading.

        Raises:
            _Unusable: nothing of it was repacked, or it is more than can be restored.
        """
        packed = {}
        for name, module in model.named_modules():
            if weights := getattr(module, "packed_weights", None):
                packed[name] = [_names_of_parts(weight) for weight in weights]
        if not packed:
            raise _Unusable("none of this model was repacked")
        state = _State({}, {}, packed)
        parts, seen = state.parts(), dict[Any, str]()
        for name, tensor in _tensors(model, parts):
            if name not in parts and before.get(name) != _shape(tensor):
                raise _Unusable(f"loading has made {name}, and only packed weights are expected")
            if tensor.dtype not in _NAMES or tensor.is_meta:
                raise _Unusable(f"{name} is {tensor.dtype} on {tensor.device}")
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            first = seen.setdefault(memory, name)
            if first == name:
                state.tensors[name] = tensor.detach()
            else:  # a tied head
                state.same[name] = first
        return state

    def parts(self) -> set[str]:
        """Names of the tensors that packed weights consist of, as `attach` makes them."""
        return {
            f"{prefix}.{name}_{index}"
            for prefix, weights in self.packed.items()
            for index, names in enumerate(weights)
            for name in names
        }

    def check(self, model: torch.nn.Module, before: dict[str, list[Any]]) -> None:
        """See that `place` can be done: ``before`` as of `of`.

        Raises:
            _Unusable: this is not the state of such a model.
        """
        parts = self.parts()
        known = {field.name for field in fields(PackedWeight)}
        stored = {name: self.tensors[name] for name in self.tensors}
        stored |= {name: self.tensors[first] for name, first in self.same.items()}
        if unknown := self.packed.keys() - dict(model.named_modules()).keys():
            raise _Unusable(f"the model has no {min(unknown)}")
        if missing := parts - stored.keys():
            raise _Unusable(f"it has no {min(missing)}")
        if not all({*names} <= known for weights in self.packed.values() for names in weights):
            raise _Unusable("its description")
        for name, tensor in stored.items():
            if name not in parts and before.get(name) != _shape(tensor):
                raise _Unusable(f"{name} is not what the model has")

    def description(self) -> str:
        """All of it that is not a tensor."""
        return json.dumps({"same": self.same, "packed": self.packed}, sort_keys=True)

    def place(self, model: torch.nn.Module, device: torch.device) -> None:
        """Replace the tensors of the model by these. On the CPU they stay mapped from the file."""
        stored = {name: name for name in self.tensors} | self.same
        placed: dict[str, Tensor] = {}

        def tensor(name: str) -> Tensor:
            source = stored[name]
            if source not in placed:
                placed[source] = self.tensors[source].to(device)
            return placed[source]

        for prefix, weights in self.packed.items():
            module = model.get_submodule(prefix)
            for name, _ in list(module.named_parameters(recurse=False)):
                if f"{prefix}.{name}" not in stored:  # as the checkpoint has it
                    delattr(module, name)
            attach(
                module,
                [
                    PackedWeight(**{name: tensor(f"{prefix}.{name}_{index}") for name in names})
                    for index, names in enumerate(weights)
                ],
            )
        for name, target in _tensors(model, self.parts()):
            if name in stored:
                target.data = tensor(name).to(target.device)


def _names_of_parts(weight: PackedWeight) -> list[str]:
    """Names of the weight's parts.

    Raises:
        _Unusable: it is more than its parts.
    """
    parts = weight.named_parts()
    others = {field.name for field in fields(weight) if getattr(weight, field.name) is not None}
    if type(weight) is not PackedWeight or others != parts.keys():
        raise _Unusable(f"{type(weight).__name__} has what entries do not hold")
    return list(parts)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(name: str, dtype: str, shape: list[int], pieces: Iterable[bytes | memoryview]) -> str:
    """CRC-32 of a tensor's bytes, after its name, safetensors' dtype and shape: 8 digits."""
    crc = zlib.crc32(f"{name} {dtype} {shape}".encode())
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _pieces(file: int, start: int, end: int) -> Iterator[bytes]:
    """Bytes of a file, read: a disk that fails under a map would kill the process.

    Raises:
        _Unusable: the file is shorter.
    """
    while start < end:
        piece = os.pread(file, min(_PIECE, end - start), start)
        if not piece:
            raise _Unusable("it is cut off")
        yield piece
        start += len(piece)


def _read(path: Path) -> tuple[_State, int]:
    """An entry's tensors, mapped, each compared with its checksum; and the file's bytes.

    Raises:
        FileNotFoundError: there is none.
        _Unusable, OSError, SafetensorError, ValueError, KeyError, TypeError: it is damaged.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | _PLAIN), "rb") as whole:
        seen = os.fstat(whole.fileno())
        if not stat.S_ISREG(seen.st_mode):
            raise _Unusable("it is no file")
        # In order, before several threads ask for it here and there.
        os.posix_fadvise(whole.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        length = int.from_bytes(whole.read(8), "little")
        if length > seen.st_size:
            raise _Unusable("it is cut off")
        head = json.loads(whole.read(length))
        metadata = head.pop("__metadata__")

        def checksum(name: str) -> str:
            start, end = (8 + length + offset for offset in head[name]["data_offsets"])
            pieces = _pieces(whole.fileno(), start, end)
            return _checksum(name, head[name]["dtype"], head[name]["shape"], pieces)

        with ThreadPoolExecutor(content.threads()) as pool:
            found = dict(zip(head, pool.map(checksum, head), strict=True))
    found[""] = f"{zlib.crc32(metadata['state'].encode()):08x}"
    if differing := found.items() ^ json.loads(metadata["checksums"]).items():
        raise _Unusable(f"the checksum of {min(differing)[0] or 'its description'}")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _State(tensors, **json.loads(metadata["state"])), seen.st_size


def _header(state: _State, names: list[str], checksums: dict[str, str]) -> bytes:
    """Head of a safetensors file: length, then JSON. As long whatever the checksums are."""
    head: dict[str, Any] = {
        "__metadata__": {"state": state.description(), "checksums": json.dumps(checksums)}
    }
    end = 0
    for name in names:
        tensor = state.tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, state: _State) -> int:
    """Write an entry; the host holds one tensor of the card's at a time. Returns its bytes.

    Raises:
        BlockingIOError: another process is writing it.
        _Unusable, OSError: there is no room, or the disk does not take it.
    """
    # Those of the largest elements first, so that all are aligned to theirs.
    names = sorted(state.tensors, key=lambda name: -state.tensors[name].element_size())
    described = f"{zlib.crc32(state.description().encode()):08x}"
    checksums = {"": described} | dict.fromkeys(names, "0" * 8)
    header = _header(state, names, checksums)
    size = len(header)
    for tensor in state.tensors.values():
        size += tensor.numel() * tensor.element_size()
    _make_room(path.parent, size)
    with _replacing(path) as file:
        file.write(header)
        waiting = 0
        for name in names:
            tensor = state.tensors[name].cpu().contiguous()
            dtype, content = _NAMES[tensor.dtype], _bytes(tensor)
            checksums[name] = _checksum(name, dtype, list(tensor.shape), [content])
            waiting += file.write(content)
            if waiting > _SYNCHRONIZED:  # what is not on the disk counts as the container's memory
                os.fdatasync(file.fileno())
                waiting = 0
        file.seek(0)
        file.write(_header(state, names, checksums))
    return size


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """An empty file of this process alone that gets the name ``path`` once it is on the disk.

    A killed process leaves it, without its lock: the next one that writes this entry takes it over,
    one that writes another removes it (`_make_room`).

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written; nothing of it is left.
    """
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | _PLAIN, 0o644), "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Before it was locked, its last owner may have renamed it, or another have removed it.
        if not part.exists() or part.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise BlockingIOError
        file.truncate()
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the name too
    finally:
        os.close(directory)


def _make_room(root: Path, size: int) -> None:
    """Remove what killed processes have left, and entries as needed, longest out of use first.

    Raises:
        _Unusable: there is no room for ``size`` bytes all the same; then no entry is removed.
    """
    for part in root.glob("*.part"):
        with (
            contextlib.suppress(OSError),
            os.fdopen(os.open(part, os.O_RDONLY | _PLAIN), "rb") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    allowed = limit()
    if size > allowed:
        raise _Unusable(f"they take {size / 1e9:.1f} GB, and VLLM_K80_CACHE_GB is less")
    entries = [(path.stat(), path) for path in root.glob("*.safetensors")]
    entries.sort(key=lambda entry: entry[0].st_mtime)
    excess = sum(seen.st_size for seen, _ in entries) + size - allowed
    freed, oldest = 0, []
    for seen, path in entries:
        if freed < excess:
            freed += seen.st_size
            oldest.append(path)
    free = shutil.disk_usage(root).free + freed
    if free < size + _SPARE:
        raise _Unusable(
            f"they take {size / 1e9:.1f} GB, and of {free / 1e9:.1f} GB free "
            f"{_SPARE / 1e9:.0f} are left to others"
        )
    for path in oldest:
        path.unlink(missing_ok=True)
