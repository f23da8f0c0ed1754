"""What a GGUF file says before its tensors' data, with nothing but Python's own library.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3; the types are
ggml.h's ``enum ggml_type``, the sizes of their blocks those of ggml-common.h. gguf-py needs numpy,
keeps each word of a vocabulary, and takes a minute for a large one.
"""

import struct
from pathlib import Path
from typing import IO, Any, NamedTuple

from vllm_k80.errors import UserError


class Type(NamedTuple):
    """A type of tensors: elements of a block, and bytes that it takes."""

    name: str
    elements: int
    bytes: int


class Tensor(NamedTuple):
    """A tensor of the file. ``shape`` as the file has it: columns before rows."""

    name: str
    shape: tuple[int, ...]
    tensor_type: Type


class Header(NamedTuple):
    """Metadata by key, and the tensors. Lists of texts are told by their lengths only."""

    fields: dict[str, Any]
    tensors: list[Tensor]


_TYPES = {
    0: Type("F32", 1, 4),
    1: Type("F16", 1, 2),
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    9: Type("Q8_1", 32, 40),
    10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    15: Type("Q8_K", 256, 292),
    16: Type("IQ2_XXS", 256, 66),
    17: Type("IQ2_XS", 256, 74),
    18: Type("IQ3_XXS", 256, 98),
    19: Type("IQ1_S", 256, 50),
    20: Type("IQ4_NL", 32, 18),
    21: Type("IQ3_S", 256, 110),
    22: Type("IQ2_S", 256, 82),
    23: Type("IQ4_XS", 256, 136),
    24: Type("I8", 1, 1),
    25: Type("I16", 1, 2),
    26: Type("I32", 1, 4),
    27: Type("I64", 1, 8),
    28: Type("F64", 1, 8),
    29: Type("IQ1_M", 256, 56),
    30: Type("BF16", 1, 2),
    34: Type("TQ1_0", 256, 54),
    35: Type("TQ2_0", 256, 66),
}
# Of metadata: 8 is a text, 9 a list.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _LIST = 8, 9
# No header has more of anything; a damaged file would have us wait or run out of memory.
_MOST = 1 << 26


class _Damaged(ValueError):
    """What the file says cannot be."""


class _Reader:
    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def bytes(self, count: int) -> bytes:
        if count > _MOST:
            raise _Damaged(f"a length of {count}")
        read = self.file.read(count)
        if len(read) != count:
            raise _Damaged("it ends within its header")
        return read

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _LIST:
            raise _Damaged(f"a value of type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST:
            raise _Damaged(f"a list of {count}")
        if kind in _NUMBERS:
            codes = f"<{count}{_NUMBERS[kind]}"
            return list(struct.unpack(codes, self.bytes(struct.calcsize(codes))))
        if kind != _TEXT:
            raise _Damaged(f"a list of type {kind}")
        for _ in range(count):  # a vocabulary: hundreds of thousands, of no use here
            self.bytes(self.number("Q"))
        return count

    def tensor(self) -> Tensor:
        name, dimensions = self.text(), self.number("I")
        if dimensions > 4:
            raise _Damaged(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        self.number("Q")  # where its data are
        return Tensor(name, shape, _TYPES.get(kind, Type(f"number {kind}", 1, 1)))

    def header(self) -> Header:
        """What follows the first four bytes."""
        version, tensors, entries = self.number("I"), self.number("Q"), self.number("Q")
        if version not in (2, 3):
            raise _Damaged(f"version {version}")
        if max(tensors, entries) > _MOST:
            raise _Damaged(f"{tensors} tensors and {entries} entries")
        fields = {}
        for _ in range(entries):
            name = self.text()
            fields[name] = self.value(self.number("I"))
        return Header(fields, [self.tensor() for _ in range(tensors)])


def read(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        UserError: no such file, or none of GGUF, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            return read_from(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None


def read_from(file: IO[bytes], name: str) -> Header:
    """The header of an open GGUF file, of which no more is read; name and errors as of `read`."""
    try:
        if file.read(4) != b"GGUF":
            raise UserError(f"{name} is not a GGUF file (it does not begin with these bytes).")
        return _Reader(file).header()
    except _Damaged as error:
        raise UserError(f"{name} is damaged or of an unknown version: {error}.") from None
