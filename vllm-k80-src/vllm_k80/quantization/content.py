"""What files contain, as digests: read once, then known again by what the file system says of them.

As git does it for its index (https://git-scm.com/docs/racy-git): a file whose inode, size and times
of modification and change are those seen before has the content seen before. The time of change is
the kernel's own and moves with every write, whatever `touch` or `rsync --times` set the other to.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PIECE = 1 << 26  # bytes that one thread digests at a time
_AT_ONCE = 1 << 20  # bytes of it in memory
_REMEMBERED = 256  # files
# A file that was written so recently may be written again without a change of its times, which
# stand still for a tick of the kernel's clock, and for up to 2 s on some file systems.
_SETTLED_S = 3.0


def threads() -> int:
    """How many threads a short piece of work on large data takes: others serve meanwhile."""
    return min(4, len(os.sched_getaffinity(0)))


def _digest(path: Path) -> str:
    """BLAKE2b over the digests of the file's pieces, which several processors make."""

    def piece(start: int) -> bytes:
        digest, left = hashlib.blake2b(digest_size=32), _PIECE
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (part := file.read(min(left, _AT_ONCE))):
                digest.update(part)
                left -= len(part)
        return digest.digest()

    with ThreadPoolExecutor(threads()) as pool:
        pieces = pool.map(piece, range(0, path.stat().st_size, _PIECE))
        return hashlib.blake2b(b"".join(pieces), digest_size=32).hexdigest()


def _identity(seen: os.stat_result) -> str:
    return f"{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def digests(paths: Iterable[Path], memory: Path) -> dict[str, str]:
    """The content of files.

    Args:
        paths: of the files, each of another name.
        memory: JSON file that remembers digests. Where it cannot be written, they are made anew.

    Returns:
        Digest by the file's name.

    Raises:
        OSError: a file cannot be read.
    """
    known, found, learned = _remembered(memory), {}, {}
    for path in paths:
        seen, began = path.stat(), time.time()
        identity = _identity(seen)
        if identity not in known:
            digest = _digest(path)
            settled = began - max(seen.st_mtime, seen.st_ctime) > _SETTLED_S
            if settled and _identity(path.stat()) == identity:
                learned[identity] = digest
            known[identity] = digest
        found[path.name] = known[identity]
    if learned:
        _remember(memory, learned)
    return found


def _remember(memory: Path, learned: dict[str, str]) -> None:
    """Add digests to the file. What another process adds at the same moment may be lost to it."""
    kept = dict([*(_remembered(memory) | learned).items()][-_REMEMBERED:])
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=memory.parent, prefix=memory.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(kept, file, indent=1)
            os.replace(name, memory)
        except OSError:
            os.unlink(name)
            raise
