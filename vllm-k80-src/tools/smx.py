"""Predicts how long a kernel takes on a K80 die, from its machine code for sm_37.

What it is for: no K80 is here, and designs must be compared all the same. It ranks designs that
differ by more than about 30 %. It is a prediction, never a measurement: the settings
(smx_settings.json) are a fit to the six public measurements of a real die, with no data held out.

The model, one SMX of the die with its share of the memory:

- Warps execute the code, integers and control flow for all 32 lanes, so that addresses, loops and
  divergence are the real ones. Loads give what the buffer holds if its `Pointer` says so, else
  nothing that means anything; shared memory and shuffles carry values on. Floating-point results
  are not computed, but for what the compiler divides integers with: comparisons of them compare
  zeros. Kernels whose loops or addresses depend on them cannot be predicted so.
- Four schedulers, to which warps belong in turn. Each issues the oldest ready warp's next
  instruction in a clock, and the one after it too where the compiler's control code allows both at
  once. Control codes also set the least distance to the next instruction. Registers become ready
  after the latency of what writes them. Schedulers are served in one order: of a unit that is
  saturated the last gets least, which exaggerates the end of kernels bound by FP32 alone.
- Units take so many warps a clock (CUDA C++ programming guide, throughput of arithmetic
  instructions, 3.7): FP32 6, integer add and logic 5, shift 2, conversion and special functions 1.
- Shared memory serves `shared_bytes` a clock and replays for bank conflicts. The read-only path
  serves `texture_threads` and `texture_bytes` a clock and one 128-byte line, through a cache of 32
  byte sectors; then L2; then DRAM, each a queue with a bandwidth and a latency. The L2 holds what
  this SMX has read before.
- The SMX gets every 13th block, as many at once as registers, shared memory and slots allow.
- Blocks may count their arrivals with atomicInc, once each; n of them share a counter, and the
  last does more. The other SMX are taken to go at the same pace: the last block to arrive here is
  the last of its counter, and so is every n-th before it. What the last does is thus never left
  out, nor counted less often than it happens. A fence waits until the warp's stores are in memory.

Control codes: in sm_35/37 code every eighth 64-bit word holds seven codes of eight bits, as public
disassemblers document; 0x04 is issue with the next instruction, 0x20 + n is wait n clocks.
"""

import heapq
import json
import math
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: dict[str, float] = json.loads((Path(__file__).parent / "smx_settings.json").read_text())

_LANES = np.arange(32, dtype=np.uint32)
_ALL = np.ones(32, dtype=bool)
_RZ = 255

# Warps a clock of each unit, by class of instruction.
_RATE = {"fp": 6, "int": 5, "shift": 2, "multiply": 1, "convert": 1, "branch": 4, "move": 5}
_CLASS = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "FMNMX"), "fp"),
    **dict.fromkeys(
        ("IADD", "IADD32I", "ISUB", "LOP", "LOP32I", "ISETP", "IMNMX", "SEL", "ICMP", "ISET"),
        "int",
    ),
    **dict.fromkeys(("FSETP", "FSET", "PSETP", "FCMP"), "int"),
    **dict.fromkeys(("SHL", "SHR", "SHF"), "shift"),
    **dict.fromkeys(
        ("BFE", "BFI", "IMAD", "IMUL", "IMUL32I", "IMAD32I", "PRMT", "ISCADD", "ISCADD32I"),
        "multiply",
    ),
    **dict.fromkeys(("I2F", "F2I", "F2F", "I2I", "MUFU", "FCHK"), "convert"),
    **dict.fromkeys(("BRA", "EXIT", "SSY", "CAL", "RET", "PBK", "BRK"), "branch"),
    "LDS": "shared",
    "STS": "shared",
    "SHFL": "shared",
    "LDG": "texture",
    "LD": "memory",
    "ST": "memory",
    "ATOM": "memory",
    "BAR": "barrier",
    "TEXDEPBAR": "wait",
    "VOTE": "int",
}


@dataclass
class Operand:
    """One operand: a register, predicate, constant, immediate, or address in brackets."""

    kind: str
    index: int = 0
    value: int = 0
    negative: bool = False
    inverted: bool = False
    carry: bool = False


@dataclass
class Instruction:
    """One instruction, its registers (predicate p is 300 + p, the carry 310) and control code."""

    address: int
    text: str
    name: str
    modifiers: tuple[str, ...]
    operands: list[Operand]
    predicate: int
    negated: bool
    control: int
    unit: str
    width: int
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    target: int = 0
    run: Callable[["_Warp", np.ndarray], None] | None = None


def _operand(text: str) -> Operand:
    text = text.strip()
    carry = ".CC" in text
    text = re.sub(r"\.(CC|reuse|H0|H1|B\d)", "", text)
    negative = text.startswith("-") and not re.match(r"-[\d.]", text)
    inverted = text.startswith(("~", "!"))
    text = text.lstrip("~!") if inverted else text[1:] if negative else text
    text = text.strip("|")
    if match := re.fullmatch(r"\[(?:R(\d+|Z))?\s*(?:\+?(-?0x[0-9a-f]+))?\]", text):
        register = _RZ if match[1] in (None, "Z") else int(match[1])
        return Operand("address", register, int(match[2] or "0", 16))
    if match := re.fullmatch(r"c\[0x([0-9a-f]+)\]\s*\[0x([0-9a-f]+)\]", text):
        return Operand("constant", int(match[1], 16), int(match[2], 16), negative, inverted)
    if match := re.fullmatch(r"R(\d+|Z)", text):
        register = _RZ if match[1] == "Z" else int(match[1])
        return Operand("register", register, 0, negative, inverted, carry)
    if match := re.fullmatch(r"P(\d|T)", text):
        return Operand("predicate", 7 if match[1] == "T" else int(match[1]), 0, False, inverted)
    if text.startswith("SR_"):
        return Operand("special", 0, 0)
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("immediate", 0, int(text, 16) & 0xFFFFFFFF, negative)
    return Operand("immediate")  # a floating-point number: its value changes no time


def parse(sass: str, kernel: str) -> list[Instruction]:
    """The instructions of ``kernel`` in what `cuobjdump -sass` prints.

    Raises:
        ValueError: no such kernel.
    """
    match = re.search(rf"Function : {re.escape(kernel)}\n(.*?)\n\s*\.{{6,}}", sass, re.DOTALL)
    if match is None:
        raise ValueError(f"no kernel {kernel} in the SASS")
    program: list[Instruction] = []
    codes: deque[int] = deque()
    for line in match[1].splitlines():
        if control := re.fullmatch(r"\s*/\* 0x([0-9a-f]{16}) \*/", line):
            word = int(control[1], 16)
            if word >> 58 == 2:
                codes = deque(word >> (2 + 8 * i) & 0xFF for i in range(7))
            continue
        found = re.match(
            r"\s*/\*([0-9a-f]+)\*/\s+(?:@(!?)P(\d|T)\s+)?([A-Z0-9]+)(\S*)\s*(.*?);", line
        )
        if found is None:
            continue
        address, negated, predicate, name, modifiers, rest = found.groups()
        operands = [_operand(part) for part in rest.split(",")] if rest else []
        program.append(
            _instruction(
                Instruction(
                    int(address, 16),
                    line.split("*/")[1].split(";")[0].strip(),
                    name,
                    tuple(m for m in modifiers.split(".") if m),
                    operands,
                    7 if predicate in (None, "T") else int(predicate),
                    bool(negated),
                    codes.popleft() if codes else 0x20,
                    _CLASS.get(name, "move"),
                    4,
                )
            )
        )
        if name == "S2R":
            program[-1].operands[1].value = (
                "SR_TID.X",
                "SR_CTAID.X",
                "SR_CTAID.Y",
                "SR_CTAID.Z",
            ).index(rest.split(",")[1].strip())
    return program


def _instruction(i: Instruction) -> Instruction:
    """``i`` with width, target, and the registers that it reads and writes."""
    sizes = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    if i.unit in ("shared", "texture", "memory") and i.name != "SHFL":
        i.width = next((sizes[m] for m in i.modifiers if m in sizes), 4)
    if i.name in ("BRA", "SSY", "CAL", "PBK"):
        i.target = i.operands[-1].value
        i.operands = []
    store = i.name in ("ST", "STS")
    words = max(1, i.width // 4)
    destinations = 0 if store or i.unit in ("branch", "barrier", "wait") else 1
    if i.name in ("ISETP", "FSETP", "PSETP", "SHFL", "VOTE"):
        destinations = 2
    reads: list[int] = []
    writes: list[int] = []
    for position, operand in enumerate(i.operands):
        is_destination = position < destinations
        if operand.kind == "register" and operand.index != _RZ:
            if is_destination:
                writes += range(operand.index, operand.index + (words if i.width > 4 else 1))
            else:
                reads += range(operand.index, operand.index + (words if store else 1))
        elif operand.kind == "predicate" and operand.index != 7:
            (writes if is_destination else reads).append(300 + operand.index)
        elif operand.kind == "address" and operand.index != _RZ:
            reads += [operand.index, operand.index + 1] if "E" in i.modifiers else [operand.index]
        if operand.carry:
            writes.append(310)
    if "X" in i.modifiers:
        reads.append(310)
    if i.predicate != 7:
        reads.append(300 + i.predicate)
    i.reads, i.writes = tuple(reads), tuple(writes)
    return i


@dataclass
class Launch:
    """How a kernel is launched.

    ``grid`` has up to three dimensions. ``arguments`` in order: integers of 32 bits, or `Pointer`
    for a buffer of so many bytes.
    """

    grid: tuple[int, ...]
    block: int
    arguments: list["int | Pointer"]
    registers: int
    shared_bytes: int
    constants: bytes = b""  # bank 2, where the compiler keeps literals


@dataclass
class Pointer:
    """An argument that points to a buffer of ``size`` bytes; 0 is null.

    ``contents``, if loops or addresses depend on it, is what the kernel finds there.
    """

    size: int
    contents: np.ndarray | None = None


@dataclass
class Prediction:
    """What `simulate` found. ``microseconds`` includes the launch."""

    microseconds: float
    cycles: float
    blocks_an_smx: int
    warps: int
    instructions: int
    warp_instructions: dict[str, int] = field(default_factory=dict)
    dram_bytes: int = 0


class _Warp:
    """Registers and control flow of one warp, and when it may go on."""

    def __init__(self, block: "_Block", number: int, age: int, start: int) -> None:
        self.block, self.number, self.age = block, number, age
        self.registers = np.zeros((256, 32), dtype=np.uint32)
        self.predicates = np.zeros((8, 32), dtype=bool)
        self.predicates[7] = True
        self.carry = np.zeros(32, dtype=bool)
        self.active, self.exited = _ALL, np.zeros(32, dtype=bool)
        # Where paths join or go on, with which lanes, and whether it is the end of a loop (PBK).
        self.stack: list[tuple[int, np.ndarray, bool]] = []
        self.calls: list[int] = []
        self.pc = 0
        self.done = False
        self.earliest = start
        self.ready = dict[int, float]()
        self.fetches: deque[float] = deque(maxlen=64)
        self.stored = 0.0  # when its last store has reached memory


@dataclass
class _Block:
    index: tuple[int, int, int]
    alive: int
    shared: np.ndarray  # as 32-bit words
    waiting: list[_Warp] = field(default_factory=list)


class _Code:
    """The program with its arguments bound, as functions that run one instruction on a warp."""

    def __init__(
        self, program: list[Instruction], launch: Launch, settings: dict[str, float]
    ) -> None:
        self.program = program
        self.at = {instruction.address: n for n, instruction in enumerate(program)}
        self.bank0 = np.zeros(0x400, dtype=np.uint8)
        self.bank2 = np.frombuffer(launch.constants.ljust(0x400, b"\0"), dtype=np.uint8)
        self.bank0[0x28:0x2C] = np.frombuffer(np.uint32(launch.block).tobytes(), np.uint8)
        grid = np.array((*launch.grid, 1, 1)[:3], np.uint32)
        self.bank0[0x34:0x40] = np.frombuffer(grid.tobytes(), np.uint8)
        self.to_arrive = -(-math.prod(launch.grid) // int(settings["smx"]))  # blocks of this SMX
        self.contents: list[tuple[int, np.ndarray]] = []  # address and 32-bit words of buffers
        offset, free = 0x140, 1 << 32  # where arguments start on this card; buffers anywhere
        for argument in launch.arguments:
            if isinstance(argument, Pointer):
                offset = -(-offset // 8) * 8
                value, size = np.uint64(free if argument.size else 0), 8
                if argument.contents is not None:
                    words = np.frombuffer(argument.contents.tobytes(), np.uint32)
                    self.contents.append((free, words))
                free += -(-argument.size // 4096) * 4096 + 4096
            else:
                value, size = np.uint32(argument & 0xFFFFFFFF), 4
            self.bank0[offset : offset + size] = np.frombuffer(value.tobytes(), np.uint8)
            offset += size
        for instruction in program:
            instruction.run = self._compile(instruction)

    def index(self, address: int) -> int:
        """Position of the instruction at ``address``, or of the next: control words are skipped."""
        return self.at[address] if address in self.at else self.at[address + 8]

    def _value(self, operand: Operand) -> Callable[[_Warp], Any]:
        if operand.kind == "register":
            index = operand.index
            if operand.negative:
                return lambda w: -w.registers[index]
            if operand.inverted:
                return lambda w: ~w.registers[index]
            return lambda w: w.registers[index]
        if operand.kind == "predicate":
            index, inverted = operand.index, operand.inverted
            return lambda w: ~w.predicates[index] if inverted else w.predicates[index]
        raw = operand.value
        if operand.kind == "constant":
            bank = self.bank2 if operand.index == 2 else self.bank0
            raw = int(np.frombuffer(bank[raw : raw + 4].tobytes(), np.uint32)[0])
        if operand.negative:
            raw = -raw
        if operand.inverted:
            raw = ~raw
        value = np.full(32, raw & 0xFFFFFFFF, dtype=np.uint32)
        return lambda w: value

    def _compile(self, i: Instruction) -> Callable[[_Warp, np.ndarray], None] | None:
        """What ``i`` does to registers and predicates; None if that changes no time."""
        if i.name in ("LDS", "STS") and i.width >= 4:
            return self._move_shared(i)
        if i.unit == "texture" and i.width >= 4 and self.contents:
            return self._load(i)
        compute = self._compute(i)
        if compute is None:
            return None
        if i.name in ("ISETP", "PSETP", "FSETP", "FCHK"):
            first = i.operands[0].index
            second = 7 if i.name == "FCHK" else i.operands[1].index

            def set_predicates(w: _Warp, mask: np.ndarray) -> None:
                result, opposite = compute(w)
                for index, value in ((first, result), (second, opposite)):
                    if index != 7:
                        w.predicates[index] = np.where(mask, value, w.predicates[index])

            return set_predicates
        if i.name == "VOTE":
            ballot, result = i.operands[0].index, i.operands[1].index

            def vote(w: _Warp, mask: np.ndarray) -> None:
                lanes = compute(w) & mask
                if ballot != _RZ:
                    bits = int(np.packbits(lanes, bitorder="little").view(np.uint32)[0])
                    w.registers[ballot] = np.where(mask, np.uint32(bits), w.registers[ballot])
                if result != 7:
                    said = lanes.any() if "ANY" in i.modifiers else (lanes == mask).all()
                    w.predicates[result] = np.where(mask, said, w.predicates[result])

            return vote
        if i.name == "SHFL":
            target = i.operands[1].index

            def shuffle(w: _Warp, mask: np.ndarray) -> None:
                w.registers[target] = np.where(mask, compute(w), w.registers[target])

            return shuffle
        destination, sets_carry = i.operands[0].index, i.operands[0].carry

        def set_register(w: _Warp, mask: np.ndarray) -> None:
            result = compute(w)
            if sets_carry:
                w.carry = np.where(mask, result >> np.uint64(32) & np.uint64(1) != 0, w.carry)
            if destination != _RZ:
                low = result.astype(np.uint32)
                w.registers[destination] = (
                    low if mask is _ALL else np.where(mask, low, w.registers[destination])
                )

        return set_register

    def _move_shared(self, i: Instruction) -> Callable[[_Warp, np.ndarray], None]:
        """A load from shared memory or a store to it."""
        address = next(o for o in i.operands if o.kind == "address")
        register = next(o.index for o in i.operands if o.kind == "register")
        words = np.arange(i.width // 4)[:, None]

        def move(w: _Warp, mask: np.ndarray) -> None:
            lanes = mask if register != _RZ else np.zeros_like(mask)
            base = w.registers[address.index] if address.index != _RZ else np.zeros_like(_LANES)
            places = ((base[lanes] + np.uint32(address.value & 0xFFFFFFFF)) >> 2) + words
            block = slice(register, register + len(words))
            if i.name == "STS":
                w.block.shared[places] = w.registers[block, lanes]
            else:
                w.registers[block, lanes] = w.block.shared[places]

        return move

    def _load(self, i: Instruction) -> Callable[[_Warp, np.ndarray], None]:
        """A load from buffers whose contents are known; other registers stay as they are."""
        register = i.operands[0].index

        def load(w: _Warp, mask: np.ndarray) -> None:
            if register == _RZ or not mask.any():
                return
            addresses = _addresses(w, i)
            for start, contents in self.contents:
                places = (addresses - np.uint64(start)).astype(np.int64) >> 2
                lanes = mask & (places >= 0) & (places + i.width // 4 <= len(contents))
                if lanes.any():
                    for word in range(i.width // 4):
                        w.registers[register + word, lanes] = contents[places[lanes] + word]

        return load

    def _compute(self, i: Instruction) -> Callable[..., Any] | None:
        wide, u32 = np.uint64, np.uint32
        name, modifiers = i.name, i.modifiers
        get = [self._value(o) for o in i.operands]
        extended = "X" in modifiers
        if name in ("MOV", "MOV32I"):
            return lambda w: get[1](w)
        if name == "S2R":
            which = i.operands[1].value
            return lambda w: (
                _LANES + u32(w.number * 32)
                if which == 0
                else np.full(32, w.block.index[which - 1], dtype=u32)
            )
        if name in ("IADD", "IADD32I", "ISUB"):
            subtract = i.operands[2].negative or name == "ISUB"
            plain = Operand(**{**vars(i.operands[2]), "negative": False})
            b = self._value(plain)
            flip = wide(0xFFFFFFFF if subtract else 0)

            def add(w: _Warp) -> Any:
                carry = w.carry.astype(wide) if extended else wide(subtract)
                return get[1](w).astype(wide) + (b(w).astype(wide) ^ flip) + carry

            return add
        if name in ("ISCADD", "ISCADD32I"):
            shift = u32(i.operands[3].value)
            return lambda w: (get[1](w) << shift).astype(wide) + get[2](w).astype(wide)
        if name in ("IMAD", "IMUL", "IMUL32I", "IMAD32I"):
            signed, high = "U32" not in modifiers, "HI" in modifiers
            adds = name.startswith("IMAD")

            def multiply(w: _Warp) -> Any:
                a, b = get[1](w), get[2](w)
                if signed:
                    product = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)
                    product = product.view(wide)
                else:
                    product = a.astype(wide) * b.astype(wide)
                part = (product >> wide(32 if high else 0)) & wide(0xFFFFFFFF)
                if adds:
                    part = part + get[3](w).astype(wide)
                return part + w.carry.astype(wide) if extended else part

            return multiply
        if name in ("SHL", "SHR"):
            signed = name == "SHR" and "U32" not in modifiers

            def shift_by(w: _Warp) -> Any:
                a, n = get[1](w), np.minimum(get[2](w) & u32(63), u32(32)).astype(wide)
                if name == "SHL":
                    return (a.astype(wide) << n) & wide(0xFFFFFFFF)
                if signed:
                    return (a.view(np.int32).astype(np.int64) >> n.astype(np.int64)).astype(u32)
                return a.astype(wide) >> n

            return shift_by
        if name == "SHF":
            left = modifiers[0] == "L"

            def funnel(w: _Warp) -> Any:
                both = get[3](w).astype(wide) << wide(32) | get[1](w).astype(wide)
                n = np.minimum(get[2](w) & u32(63), u32(32)).astype(wide)
                return (both << n) >> wide(32) if left else (both >> n) & wide(0xFFFFFFFF)

            return funnel
        if name in ("LOP", "LOP32I"):
            logic = {
                "AND": np.bitwise_and,
                "OR": np.bitwise_or,
                "XOR": np.bitwise_xor,
                "PASS_B": lambda a, b: b,
            }[modifiers[0]]
            return lambda w: logic(get[1](w), get[2](w))
        if name == "BFE":
            field_ = i.operands[2]
            start, length = u32(field_.value & 0xFF), field_.value >> 8 & 0xFF
            return lambda w: (get[1](w) >> start) & u32((1 << length) - 1)
        if name == "BFI":
            start, length = i.operands[2].value & 0xFF, i.operands[2].value >> 8 & 0xFF
            mask = u32(((1 << length) - 1) << start & 0xFFFFFFFF)
            return lambda w: (get[3](w) & ~mask) | ((get[1](w) << u32(start)) & mask)
        if name == "PRMT" and not modifiers:

            def permute(w: _Warp) -> Any:
                selector = get[2](w)
                both = np.stack((get[1](w), get[3](w)), axis=1).view(np.uint8)  # little-endian
                result = np.zeros(32, dtype=u32)
                for byte in range(4):
                    chosen = selector >> u32(4 * byte) & u32(15)
                    value = both[_LANES, chosen & u32(7)]
                    value = np.where(chosen & u32(8), (value >> 7) * np.uint8(255), value)
                    result |= value.astype(u32) << u32(8 * byte)
                return result

            return permute
        if name in ("ISETP", "ICMP"):
            compare = {
                "GE": np.greater_equal,
                "GT": np.greater,
                "LE": np.less_equal,
                "LT": np.less,
                "EQ": np.equal,
                "NE": np.not_equal,
            }[modifiers[0]]
            kind = u32 if "U32" in modifiers else np.int32
            if name == "ICMP":
                zero = np.zeros(32, dtype=kind)
                return lambda w: np.where(compare(get[3](w).view(kind), zero), get[1](w), get[2](w))
            combine = np.logical_or if "OR" in modifiers else np.logical_and

            def set_predicate(w: _Warp) -> Any:
                result = compare(get[2](w).view(kind), get[3](w).view(kind))
                return combine(result, get[4](w)), combine(~result, get[4](w))

            return set_predicate
        if name == "PSETP":
            first, then = (
                {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[m]
                for m in modifiers[:2]
            )

            def set_both(w: _Warp) -> Any:
                result = first(get[2](w), get[3](w))
                return then(result, get[4](w)), then(~result, get[4](w))

            return set_both
        if name == "IMNMX":
            kind = u32 if "U32" in modifiers else np.int32

            def extreme(w: _Warp) -> Any:
                a, b = get[1](w).view(kind), get[2](w).view(kind)
                return np.where(get[3](w), np.minimum(a, b), np.maximum(a, b)).view(u32)

            return extreme
        if name == "SEL":
            return lambda w: np.where(get[3](w), get[1](w), get[2](w))
        if name == "SHFL":
            return self._shuffle(i, get)
        if name == "VOTE":
            return get[-1]
        if name == "ATOM" and "INC" in modifiers:

            def arrive(w: _Warp) -> Any:
                self.to_arrive -= 1
                limit = get[2](w).astype(np.int64)
                return ((limit - self.to_arrive) % (limit + 1)).astype(u32)

            return arrive
        if name == "FCHK":  # whether a division is one of the rare ones
            return lambda w: (False, False)
        if name == "FSETP":  # of zeros
            result = modifiers[0].removesuffix("U") in ("GE", "LE", "EQ")
            return lambda w: (result & get[4](w), (not result) & get[4](w))
        if name == "I2F":  # these three divide unsigned integers
            return lambda w: _rounded(get[1](w), upwards="RP" in modifiers).view(u32)
        if name == "MUFU" and modifiers[0] == "RCP":
            return lambda w: (np.float32(1) / _nonzero(get[1](w).view(np.float32))).view(u32)
        if name == "F2I":
            most = np.float32(2**32 - 256)  # the largest FP32 that fits
            return lambda w: np.clip(get[1](w).view(np.float32), 0, most).astype(u32)
        return None

    def _shuffle(self, i: Instruction, get: list[Callable[[_Warp], Any]]) -> Callable[[_Warp], Any]:
        """The values that lanes get from each other."""
        lanes = _LANES.astype(np.int64)

        def shuffled(w: _Warp) -> Any:
            other = get[3](w).astype(np.int64)
            limits = get[4](w).astype(np.int64)
            kept = limits >> 8 & 31  # bits of a lane's number that it has in common with its source
            first, last = lanes & kept, (limits & 31 & ~kept) | (lanes & kept)
            source = {
                "IDX": (other & 31 & ~kept) | first,
                "BFLY": lanes ^ other,
                "UP": lanes - other,
                "DOWN": lanes + other,
            }[i.modifiers[0]]
            outside = source < last if i.modifiers[0] == "UP" else source > last
            return get[2](w)[np.where(outside, lanes, source) & 31]

        return shuffled


def _addresses(w: _Warp, i: Instruction) -> np.ndarray:
    """Where each lane's load or store goes."""
    operand = next(o for o in i.operands if o.kind == "address")
    addresses = w.registers[operand.index].astype(np.uint64)
    if operand.index == _RZ:
        addresses = np.zeros_like(addresses)
    elif "E" in i.modifiers:
        addresses |= w.registers[operand.index + 1].astype(np.uint64) << np.uint64(32)
    return addresses + np.uint64(operand.value & 0xFFFFFFFFFFFFFFFF)


def _rounded(values: np.ndarray, upwards: bool) -> np.ndarray:
    """Integers as FP32, rounded to the nearest or upwards."""
    result = values.astype(np.float32)
    low = upwards & (result.astype(np.float64) < values)
    return np.where(low, np.nextafter(result, np.float32(np.inf)), result)


def _nonzero(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < 1e-30, np.float32(1), values)


class _Memory:
    """The read-only cache, the L2 as this SMX sees it, and DRAM: when data arrives."""

    def __init__(self, settings: dict[str, float]) -> None:
        self.s = settings
        smx, clock = settings["smx"], settings["clock_mhz"]
        self.dram_cycles = 32 * clock * smx / (settings["dram_gb_s"] * 1e3)  # for 32 bytes
        self.l2_cycles = 32 * clock * smx / (settings["l2_gb_s"] * 1e3)
        self.dram_free = self.l2_free = 0.0
        self.l2: dict[int, float] = {}
        self.sets = int(settings["texture_kb"] * 1024 // (24 * 32))
        self.cache: list[OrderedDict[int, float]] = [OrderedDict() for _ in range(self.sets)]
        self.dram_bytes = 0

    def _dram(self, now: float) -> float:
        self.dram_free = max(self.dram_free, now) + self.dram_cycles
        self.dram_bytes += 32
        return self.dram_free - self.dram_cycles + self.s["dram_latency"]

    def read(self, sectors: list[int], now: float, cached: bool) -> float:
        """When the last of ``sectors`` is there, if asked for ``now``."""
        arrival = now
        for sector in sectors:
            ways = self.cache[sector % self.sets]
            if cached and sector in ways:
                ways.move_to_end(sector)
                arrival = max(arrival, ways[sector], now + self.s["texture_latency"])
                continue
            self.l2_free = max(self.l2_free, now) + self.l2_cycles
            there = max(now, self.l2_free) + self.s["l2_latency"]
            if sector in self.l2:
                there = max(there, self.l2[sector])
            else:
                there = max(there, self._dram(now))
                self.l2[sector] = there
            if cached:
                ways[sector] = there
                if len(ways) > 24:
                    ways.popitem(last=False)
            arrival = max(arrival, there)
        return arrival

    def write(self, sectors: list[int], now: float) -> float:
        """Stores take bandwidth; only a fence waits for them, until the time returned."""
        return max((self._dram(now) for _ in sectors), default=now)


def _replays(addresses: np.ndarray, width: int, lanes: int) -> int:
    """Clocks that shared memory needs: ``lanes`` at a time, more where words share a bank."""
    clocks = 0
    words = (addresses[:, None] >> 2) + np.arange(max(1, width // 4), dtype=np.uint64)
    for start in range(0, len(words), lanes):
        distinct = np.unique(words[start : start + lanes])
        clocks += int(np.bincount((distinct % 32).astype(np.int64)).max())
    return clocks


def occupancy(launch: Launch, settings: dict[str, float] = SETTINGS) -> int:
    """Blocks that an SMX holds at once."""
    warps = -(-launch.block // 32)
    registers = -(-launch.registers // 8) * 8 * 32 * warps
    shared = max(1, -(-launch.shared_bytes // 256) * 256)
    return int(
        min(
            settings["blocks"],
            settings["threads"] // launch.block,
            settings["registers"] // registers,
            settings["shared_kb"] * 1024 // shared,
        )
    )


class _Smx:
    """One SMX at work: see the module."""

    def __init__(
        self, program: list[Instruction], launch: Launch, settings: dict[str, float]
    ) -> None:
        self.code, self.launch, self.s = _Code(program, launch, settings), launch, settings
        self.memory = _Memory(settings)
        self.units = dict.fromkeys([*_RATE, "shared", "texture", "memory", "barrier", "wait"], 0.0)
        self.counts: dict[str, int] = {}
        self.replays: dict[bytes, int] = {}
        self.warps_a_block = -(-launch.block // 32)
        width, height, depth = (*launch.grid, 1, 1)[:3]
        self.pending = deque(
            (n % width, n // width % height, n // (width * height))
            for n in range(0, width * height * depth, int(settings["smx"]))
        )
        self.age = 0
        # Of each scheduler: warps that wait for a time, and those that are ready, oldest first.
        self.later: list[list[tuple[float, int, _Warp]]] = [[] for _ in range(4)]
        self.ready: list[list[tuple[int, _Warp]]] = [[] for _ in range(4)]

    def _start_block(self, now: int) -> None:
        if not self.pending:
            return
        words = -(-self.launch.shared_bytes // 4) + 1
        shared = np.zeros(words, dtype=np.uint32)
        block = _Block(self.pending.popleft(), self.warps_a_block, shared)
        for number in range(self.warps_a_block):
            self.age += 1
            self._queue(_Warp(block, number, self.age, now + 20))

    def _queue(self, w: _Warp) -> None:
        i = self.code.program[w.pc]
        time: float = w.earliest
        for register in (*i.reads, *i.writes):
            time = max(time, w.ready.get(register, 0))
        if i.unit == "wait":
            left = i.operands[0].value if i.operands else 0
            if len(w.fetches) > left:
                time = max(time, w.fetches[-1 - left])
        heapq.heappush(self.later[(w.age - 1) % 4], (math.ceil(time), w.age, w))

    def _unit(self, i: Instruction) -> str:
        return "shared" if i.unit == "memory" else i.unit  # both go through the load/store unit

    def run(self) -> Prediction:
        blocks = occupancy(self.launch, self.s)
        for _ in range(blocks):
            self._start_block(0)
        now = issued = 0
        window = 4  # clocks of work that may wait in a unit's queue
        while True:
            busy, soonest = False, math.inf
            for later, ready in zip(self.later, self.ready, strict=True):
                while later and later[0][0] <= now:
                    _, age, w = heapq.heappop(later)
                    heapq.heappush(ready, (age, w))
                if later:
                    soonest = min(soonest, later[0][0])
                skipped = []
                while ready:
                    age, w = heapq.heappop(ready)
                    free = self.units[self._unit(self.code.program[w.pc])] - window
                    if free > now:
                        skipped.append((age, w))
                        soonest = min(soonest, math.ceil(free))
                        continue
                    issued += self._issue(w, now, window)
                    busy = True
                    break
                for entry in skipped:
                    heapq.heappush(ready, entry)
                if ready:
                    soonest = min(soonest, max(soonest if skipped else now + 1, now + 1))
            if busy:
                now += 1
            elif soonest is math.inf:
                break
            else:
                now = max(now + 1, int(soonest))
        cycles = max(float(now), self.memory.dram_free)
        return Prediction(
            cycles / self.s["clock_mhz"] + self.s["launch_us"],
            cycles,
            blocks,
            blocks * self.warps_a_block,
            issued,
            self.counts,
            self.memory.dram_bytes,
        )

    def _issue(self, w: _Warp, now: int, window: int) -> int:
        """One instruction of ``w``, or two; returns how many."""
        for count in (1, 2):
            i = self.code.program[w.pc]
            self._execute(w, i, now)
            if w.done or i.unit == "barrier":
                return count
            if count == 2 or not (i.control == 0x04 or i.unit == "wait"):
                break
            following = self.code.program[w.pc]
            waits = any(w.ready.get(r, 0) > now for r in (*following.reads, *following.writes))
            if following.unit == "wait":
                left = following.operands[0].value if following.operands else 0
                waits = waits or (len(w.fetches) > left and w.fetches[-1 - left] > now)
            if waits or self.units[self._unit(following)] > now + window:
                break
        self._queue(w)
        return count

    def _execute(self, w: _Warp, i: Instruction, now: int) -> None:
        mask = w.active
        if i.predicate != 7:
            condition = w.predicates[i.predicate]
            mask = mask & (~condition if i.negated else condition)
        self.counts[i.unit] = self.counts.get(i.unit, 0) + 1
        latency = self._time(w, i, mask, now)
        for register in i.writes:
            w.ready[register] = max(w.ready.get(register, 0), now + latency)
        gap = 1
        if i.control & 0xE0 == 0x20:
            gap = min(8, max(1, i.control & 0x1F))
        if i.name == "BRA":
            gap = max(gap, 10)
        w.earliest = now + gap
        if i.name == "MEMBAR":
            w.earliest = max(w.earliest, math.ceil(w.stored))
        if i.run is not None:
            i.run(w, mask)
        self._step(w, i, mask, now)

    def _time(self, w: _Warp, i: Instruction, mask: np.ndarray, now: int) -> float:
        """Occupy the unit; returns the latency of the result."""
        unit, s = self._unit(i), self.s
        start = max(self.units[unit], now)
        if i.unit in _RATE:
            self.units[unit] = start + 1 / _RATE[i.unit]
            return s["alu_latency"] + (2 if i.unit == "convert" else 0)
        if i.name == "SHFL":
            self.units[unit] = start + 1
            return s["shared_latency"] - 8
        if i.unit not in ("shared", "texture", "memory") or not mask.any():
            return 0
        addresses = _addresses(w, i)[mask]
        if i.unit == "shared":
            lanes = int(s["shared_bytes"]) // max(4, i.width)
            key = (addresses - (addresses[0] & ~np.uint64(127))).tobytes() + bytes((i.width,))
            if key not in self.replays:
                self.replays[key] = _replays(addresses, i.width, lanes)
            self.units[unit] = start + self.replays[key]
            return 0 if i.name == "STS" else self.units[unit] - now + s["shared_latency"] - 1
        last = addresses + np.uint64(i.width - 1)
        sectors = np.unique(np.concatenate((addresses >> 5, last >> 5)))
        listed = sectors.tolist()
        if i.name == "ST":
            self.units[unit] = start + 1
            w.stored = max(w.stored, self.memory.write(listed, now))
            return 0
        if i.unit == "texture":
            lines = len(np.unique(sectors >> 2))
            self.units[unit] = start + max(
                32 / s["texture_threads"], len(listed) * 32 / s["texture_bytes"], lines
            )
        else:
            self.units[unit] = start + 1
        arrival = self.memory.read(listed, now, cached=i.unit == "texture")
        if i.unit == "texture":  # fetches come back in order
            arrival = max(arrival, w.fetches[-1] if w.fetches else 0)
            w.fetches.append(arrival)
        return arrival - now

    def _step(self, w: _Warp, i: Instruction, mask: np.ndarray, now: int) -> None:
        """Where ``w`` goes next."""
        following = w.pc + 1
        if i.name in ("SSY", "PBK"):
            w.stack.append((self.code.index(i.target), w.active, i.name == "PBK"))
        elif i.name == "BRK" and mask.any():
            # These lanes wait at the loop's end: nothing inside of it is theirs any more.
            end = max(n for n, (_, _, is_end) in enumerate(w.stack) if is_end)
            inside = [(to, lanes & ~mask, is_end) for to, lanes, is_end in w.stack[end + 1 :]]
            w.stack[end + 1 :] = inside
            w.active = w.active & ~mask
            if not w.active.any():
                resumed = self._resume(w)
                following = following if resumed is None else resumed
        elif i.name == "BRA":
            if mask is w.active or mask.all() or not (w.active & ~mask).any():
                following = self.code.index(i.target)
            elif mask.any():
                w.stack.append((w.pc + 1, w.active & ~mask, False))
                w.active, following = mask, self.code.index(i.target)
        elif i.name == "CAL":
            w.calls.append(w.pc + 1)
            following = self.code.index(i.target)
        elif i.name == "RET":
            following = w.calls.pop()
        elif i.name == "EXIT":
            w.exited = w.exited | mask
            w.active = w.active & ~mask
            if not w.active.any():
                resumed = self._resume(w)
                if resumed is None:
                    self._finish(w, now)
                    return
                following = resumed
        if "S" in i.modifiers and mask.any():
            staying = w.active & ~mask
            if staying.any():
                w.active = staying  # the others wait where the paths join
            else:
                resumed = self._resume(w)
                following = following if resumed is None else resumed
        w.pc = following
        if i.unit == "barrier" and mask.any():
            w.block.waiting.append(w)
            self._release(w.block, now)
        elif i.unit == "barrier":
            self._queue(w)

    def _resume(self, w: _Warp) -> int | None:
        while w.stack:
            position, lanes, _ = w.stack.pop()
            lanes = lanes & ~w.exited
            if lanes.any():
                w.active = _ALL if lanes.all() else lanes
                return position
        return None

    def _release(self, block: _Block, now: int) -> None:
        if block.waiting and len(block.waiting) == block.alive:
            for w in block.waiting:
                w.earliest = max(w.earliest, now + 15)
                self._queue(w)
            block.waiting = []

    def _finish(self, w: _Warp, now: int) -> None:
        w.done = True
        w.block.alive -= 1
        if w.block.alive:
            self._release(w.block, now)
        else:
            self._start_block(now)


def simulate(
    sass: str, kernel: str, launch: Launch, settings: dict[str, float] = SETTINGS
) -> Prediction:
    """Predict one launch of ``kernel``, whose code is in ``sass`` (`cuobjdump -sass`).

    Raises:
        ValueError: no such kernel, or an SMX cannot hold one block of it.
    """
    if not occupancy(launch, settings):
        raise ValueError(f"{kernel}: an SMX cannot hold a block of it")
    return _Smx(parse(sass, kernel), launch, settings).run()
