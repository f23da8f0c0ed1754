#!/usr/bin/env python3
"""Says what each kernel costs on a K80: registers, spills, shared memory, instructions, occupancy.

    kernels_report.py [--json] [--nvcc NVCC] [FAT_BINARY]

Compiles csrc with a CUDA 11 compiler (without FAT_BINARY) and reads the code for sm_37 with
cuobjdump. Needs no GPU and nothing but Python 3.9, so that it runs on a server as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

BUILD = Path(__file__).resolve().parent.parent / "csrc" / "build.sh"
# After $NVCC and before what PATH finds. The first is where the role cuda_toolkit unpacks it.
PLACES = ("/opt/vllm-k80/cuda/bin/nvcc", "/usr/local/cuda-11.*/bin/nvcc", "/usr/bin/nvcc")

# A multiprocessor of the GK210 and what it allocates by: table "Technical Specifications per
# Compute Capability" (3.7) of the CUDA C++ Programming Guide 11.8, and its cuda_occupancy.h.
WARP = 32
WARPS = 64
BLOCKS = 16
REGISTERS = 128 * 1024
REGISTERS_PER_BLOCK = 64 * 1024
REGISTERS_PER_THREAD = 255
REGISTER_UNIT = 256  # of a warp
SCHEDULERS = 4  # each has a quarter of the registers and of the warps
SHARED = 112 * 1024
SHARED_PER_BLOCK = 48 * 1024
SHARED_UNIT = 256
# For a kernel that does not say how many threads a block has (__launch_bounds__).
THREADS = 256


class ReportError(Exception):
    """Why there is no report; the text is for the user."""


def run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ReportError(f"{command[0]} does not run: {error.strerror}.") from None
    if done.returncode != 0:
        raise ReportError(
            f"{' '.join(map(str, command))} failed: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout


# ---- the compiler


def release(nvcc: str) -> str:
    found = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))
    return found[1] if found else "unknown"


def find_nvcc(named: str | None, places: tuple[str, ...] = PLACES) -> tuple[str, str]:
    """The compiler and its release: the one that was named, or the first of CUDA 11."""
    if named:
        candidates = [named]
    else:
        globs = [sorted(Path("/").glob(place[1:]), reverse=True) for place in places]
        candidates = [str(path) for found in globs for path in found]
        candidates += filter(None, [shutil.which("nvcc")])
    others = []
    for nvcc in candidates:
        number = release(nvcc)
        if number.startswith("11."):
            return nvcc, number
        others.append(f"{nvcc} is of CUDA {number}, which does not know the K80")
    raise ReportError(
        f"{'; '.join(dict.fromkeys(others)) or 'There is no nvcc here'}. Install a CUDA 11 "
        "compiler (11.8 is the last that knows the card; Debian 12 has it as nvidia-cuda-toolkit, "
        "the role cuda_toolkit sets one up on a server), or name one with NVCC=/path/to/nvcc."
    )


def compile_kernels(nvcc: str, directory: str) -> Path:
    environment = dict(os.environ, NVCC=nvcc)
    done = subprocess.run(
        ["sh", BUILD, directory], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ReportError(f"The kernels do not compile: {done.stderr.strip()}")
    return Path(directory) / "vllm_k80.fatbin"


# ---- what cuobjdump prints


def parts(dump: str, kind: str) -> str:
    """Of a dump of a fat binary, the members of one kind (elf, ptx) that are for sm_37."""
    members = re.split(r"^Fatbin (\w+) code:\n=+\n", dump, flags=re.MULTILINE)
    return "".join(
        text
        for name, text in zip(members[1::2], members[2::2])  # noqa: B905
        if name == kind and re.match(r"arch = sm_37$", text, re.MULTILINE)
    )


def resources(dump: str) -> dict[str, dict[str, int]]:
    """From --dump-resource-usage: of each kernel, its registers, stack and shared memory."""
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        for name, usage in re.findall(r"^ Function (\w+):\n(.*)$", parts(dump, "elf"), re.MULTILINE)
    }


def instructions(dump: str) -> dict[str, Counter[str]]:
    """From -sass: of each kernel, how often each instruction is in it, padding left out."""
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in parts(dump, "elf").splitlines():
        if function := re.match(r"\s+Function : (\w+)", line):
            counts = kernels.setdefault(function[1], Counter())
        elif found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+ )?([A-Z]\w*)(\S*)(.*?);", line):
            address, name, modifiers, operands = found.groups()
            # The end of a function is a jump to itself, and then plain NOPs.
            loops = name == "BRA" and operands.split() == [f"0x{int(address, 16):x}"]
            if not loops and (name, modifiers) != ("NOP", ""):
                counts[name] += 1
    return kernels


def launch_bounds(dump: str) -> dict[str, int]:
    """From -ptx: of each kernel that says so, the most threads that a block may have."""
    bounds = {}
    for name, directives in re.findall(
        r"\.entry\s+(\w+)\s*(?:\([^)]*\))?([^{]*)\{", parts(dump, "ptx")
    ):
        if found := re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives):
            x, y, z = (int(number or 1) for number in found.groups())
            bounds[name] = x * y * z
    return bounds


# ---- the report


def occupancy(threads: int, registers: int, shared: int) -> tuple[int, list[str]]:
    """Blocks that a multiprocessor holds at once, and what limits them."""

    def up(number: int, unit: int) -> int:
        return -(-number // unit) * unit

    warps = -(-threads // WARP)
    per_warp = up(registers * WARP, REGISTER_UNIT)
    # The hardware counts a block's registers as if it had warps on every scheduler alike.
    fits = (
        registers <= REGISTERS_PER_THREAD
        and per_warp * up(warps, SCHEDULERS) <= REGISTERS_PER_BLOCK
    )
    limits = {
        "registers": REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps if fits else 0,
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    if shared:
        limits["shared memory"] = (
            SHARED // up(shared, SHARED_UNIT) if shared <= SHARED_PER_BLOCK else 0
        )
    blocks = min(limits.values())
    return blocks, [name for name, limit in limits.items() if limit == blocks]


def report(usage: str, sass: str, ptx: str) -> list[dict[str, Any]]:
    """One entry a kernel, from what cuobjdump printed of one fat binary."""
    counts, bounds = instructions(sass), launch_bounds(ptx)
    kernels = []
    for name, used in sorted(resources(usage).items()):
        threads = bounds.get(name, THREADS)
        blocks, limits = occupancy(threads, used["REG"], used["SHARED"])
        kernels.append(
            {
                "kernel": name,
                "registers": used["REG"],
                "stack_bytes": used["STACK"],
                "local_loads_and_stores": counts[name]["LDL"] + counts[name]["STL"],
                "shared_bytes": used["SHARED"],
                "instructions": sum(counts[name].values()),
                "by_opcode": dict(counts[name].most_common()),
                "threads_per_block": threads,
                "threads_are_declared": name in bounds,
                "blocks_per_multiprocessor": blocks,
                "occupancy": blocks * -(-threads // WARP) / WARPS,
                "limited_by": limits,
            }
        )
    if not kernels:
        raise ReportError("There is no kernel for sm_37 in it.")
    return kernels


def table(kernels: list[dict[str, Any]]) -> str:
    head = (
        "kernel",
        "registers",
        "spills",
        "shared",
        "instructions",
        "threads",
        "blocks",
        "occupancy",
        "limited by",
    )
    rows = [
        (
            each["kernel"],
            each["registers"],
            each["local_loads_and_stores"],
            each["shared_bytes"],
            each["instructions"],
            f"{each['threads_per_block']}{'' if each['threads_are_declared'] else '?'}",
            each["blocks_per_multiprocessor"],
            f"{each['occupancy']:.0%}",
            ", ".join(each["limited_by"]),
        )
        for each in kernels
    ]
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]  # noqa: B905
    ends = (0, len(head) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in ends else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))  # noqa: B905
        ).rstrip()
        for row in cells
    )


EXPLANATION = """\
Of each kernel's code for sm_37: registers of a thread; spills: loads and stores of local memory;
shared: bytes a block, without what a launch adds; instructions: in the code, not executed. Blocks
of that many threads (?: not declared, assumed) that a multiprocessor holds at once, and the share
of its 64 warps that they fill."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Says what each kernel costs on a K80, from its code. Needs no GPU."
    )
    parser.add_argument(
        "binary", nargs="?", type=Path, metavar="FAT_BINARY", help="default: compile csrc"
    )
    parser.add_argument(
        "--nvcc", default=os.environ.get("NVCC"), help="a CUDA 11 compiler (or NVCC)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    try:
        nvcc, number = find_nvcc(arguments.nvcc)
        beside = Path(shutil.which(nvcc) or nvcc).with_name("cuobjdump")
        with tempfile.TemporaryDirectory() as directory:
            binary = arguments.binary or compile_kernels(nvcc, directory)
            if not binary.is_file():
                raise ReportError(f"{binary} is not there.")
            dumps = [
                run(beside, option, binary) for option in ("--dump-resource-usage", "-sass", "-ptx")
            ]
            kernels = report(*dumps)
    except ReportError as error:
        print(f"kernels-report: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"nvcc": nvcc, "cuda": number, "kernels": kernels}, indent=2))
    else:
        made = (
            f"{arguments.binary}"
            if arguments.binary
            else f"csrc, compiled by {nvcc} (CUDA {number})"
        )
        print(f"{made}:\n\n{table(kernels)}\n\n{EXPLANATION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
