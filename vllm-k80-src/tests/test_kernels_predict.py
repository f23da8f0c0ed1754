"""The model that predicts times on a K80 die, on code small enough to know the answer."""

import json
import shutil
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import kernels_predict  # noqa: E402
import smx  # noqa: E402

from vllm_k80.ops import driver  # noqa: E402

STALL = 0x21  # wait one clock
PAIR = 0x04  # issue with the next


def listing(*instructions: str, codes: int = STALL) -> str:
    """What cuobjdump prints for a kernel `k`: every eighth word is control codes."""
    lines = ["\t\tFunction : k", "\t.headerflags    @"]
    control = 2 << 58 | sum(codes << (2 + 8 * i) for i in range(7))
    for number, text in enumerate((*instructions, "EXIT")):
        if number % 7 == 0:
            lines.append(f"      /* 0x{control:016x} */")
        address = 8 * (number + number // 7 + 1)
        lines.append(f"        /*{address:04x}*/       {text};      /* 0x0000000000000000 */")
    return "\n".join([*lines, "\t\t.................................\n"])


def run(*instructions: str, blocks: int = 1, warps: int = 1, codes: int = STALL, **other):
    launch = smx.Launch(
        (blocks, 1),
        32 * warps,
        [smx.Pointer(1 << 20), smx.Pointer(1 << 20)],
        other.get("registers", 32),
        other.get("shared_bytes", 0),
    )
    return smx.simulate(listing(*instructions, codes=codes), "k", launch)


def loop(count: int, *body: str) -> list[str]:
    """``body`` ``count`` times; it begins at the second instruction, at address 0x10."""
    return [
        "MOV32I R0, 0x0",
        *body,
        "IADD32I R0, R0, 0x1",
        f"ISETP.LT.AND P0, PT, R0, 0x{count:x}, PT",
        "@P0 BRA 0x10",
    ]


def test_a_chain_of_dependent_instructions_takes_their_latency() -> None:
    few, many = (run(*["FADD R1, R1, R1"] * n).cycles for n in (10, 110))
    assert many - few == pytest.approx(100 * smx.SETTINGS["alu_latency"], rel=0.02)


def test_loops_run_as_often_as_they_say() -> None:
    assert run(*loop(25, "FADD R1, R1, R1")).warp_instructions["fp"] == 25


def test_fp32_takes_six_warps_a_clock_at_most() -> None:
    body = [f"FADD R{n}, R30, R31" for n in range(1, 25)] * 8
    alone, paired = (run(*body, warps=32, codes=code).cycles for code in (STALL, PAIR))
    assert 32 * len(body) / 6 <= paired <= alone


def test_conflicting_banks_take_as_long_as_the_words_in_one_bank() -> None:
    def cycles(shift: int) -> float:
        address = ["S2R R2, SR_TID.X", f"SHL R2, R2, 0x{shift:x}"]
        loads = [f"LDS R{n}, [R2]" for n in range(4, 52)] * 4
        return run(*address, *loads, shared_bytes=8192).cycles

    assert cycles(7) > 10 * cycles(2)  # 32 words of one bank, and one of each


def test_reading_is_bound_by_memory() -> None:
    """Each warp reads its own 512 bytes; 13 SMX share the bandwidth."""
    code = [
        "S2R R2, SR_CTAID.X",
        "S2R R3, SR_TID.X",
        "SHL R2, R2, 0xd",  # 8 KB a block of 16 warps
        "ISCADD R2, R3, R2, 0x4",
        "IADD R4.CC, R2, c[0x0][0x140]",
        "IADD.X R5, RZ, c[0x0][0x144]",
        "LDG.E.128.T R8, [R4]",
        "TEXDEPBAR 0x0",
    ]
    result = run(*code, blocks=13 * 60, warps=16)
    assert result.dram_bytes == 60 * 8192
    bound = 13 * result.dram_bytes / smx.SETTINGS["dram_gb_s"] / 1e3
    assert bound < result.microseconds - smx.SETTINGS["launch_us"] < 1.15 * bound


def test_lanes_that_branch_apart_meet_again() -> None:
    code = [
        "S2R R2, SR_TID.X",  # 0x08
        "ISETP.LT.AND P0, PT, R2, 0x10, PT",  # 0x10
        "SSY 0x40",  # 0x18
        "@P0 BRA 0x38",  # 0x20
        "FADD R1, R1, R1",  # 0x28: the upper lanes
        "NOP.S",  # 0x30
        "NOP.S",  # 0x38: the lower lanes
        "FADD R3, R3, R3",  # behind the control word at 0x40: all
    ]
    assert run(*code).warp_instructions["fp"] == 2


def test_occupancy_is_bound_by_registers_shared_memory_and_slots() -> None:
    def blocks(registers: int, shared: int, threads: int = 256) -> int:
        return smx.occupancy(smx.Launch((1, 1), threads, [], registers, shared))

    assert (blocks(72, 17408), blocks(255, 0), blocks(32, 0, 32)) == (6, 2, 16)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="no kernel other in the SASS"):
        smx.parse(listing(), "other")


def test_the_int4_kernel_is_not_predicted_slower_than_before() -> None:
    if not driver.available() or shutil.which("cuobjdump") is None:
        pytest.skip("no fat binary or no cuobjdump here: csrc/build.sh vllm_k80/kernels")
    kernels = kernels_predict.compiled(driver.FAT_BINARY)
    case = kernels_predict.gemv(kernels, "w4_f16", 512, 1024, 1)
    used = kernels[case.kernel]
    now = smx.simulate(used.sass, case.kernel, case.launch).microseconds
    before = json.loads(kernels_predict.BASELINE.read_text())[
        "gemv_w4_f16_m1 n=512 k=1024 m=1 group=128"
    ]
    assert now <= kernels_predict.ALLOWED_GROWTH * before
