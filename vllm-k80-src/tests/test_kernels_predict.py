"""The model that predicts times on a K80 die, on code small enough to know the answer."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import kernels_predict  # noqa: E402
import smx  # noqa: E402

from vllm_k80.ops import attention_kernels, driver  # noqa: E402
from vllm_k80.ops import kernels as operators  # noqa: E402

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
        other.get("arguments", [smx.Pointer(1 << 20), smx.Pointer(1 << 20)]),
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


FIRST = ["MOV R4, c[0x0][0x140]", "MOV R5, c[0x0][0x144]"]  # the first argument, a pointer


def iterations(*code: str, contents: list[int]) -> int:
    """How often a loop runs whose bound ``code`` puts into R2; at least once."""
    buffer = np.array(contents, dtype=np.int32)
    before = [*FIRST, *code, "MOV R0, RZ"]
    number = len(before) + 1  # of the instruction that the loop begins with, from 1
    again = 8 * (number + (number - 1) // 7)
    body = ["FADD R1, R1, R1", "IADD32I R0, R0, 0x1", "ISETP.LT.AND P0, PT, R0, R2, PT"]
    result = run(
        *before,
        *body,
        f"@P0 BRA 0x{again:x}",
        arguments=[smx.Pointer(buffer.nbytes, buffer)],
        shared_bytes=256,
    )
    return result.warp_instructions["fp"]


def test_a_loop_may_depend_on_what_a_buffer_holds() -> None:
    assert iterations("LDG.E.P R2, [R4+0x4]", "TEXDEPBAR 0x0", contents=[3, 21]) == 21
    assert iterations("LDG.E.64.P R2, [R4]", "TEXDEPBAR 0x0", contents=[5, 9]) == 5


def test_loaded_values_go_through_shared_memory_and_shuffles() -> None:
    shared = ["LDG.E.P R6, [R4]", "STS [RZ+0x10], R6", "LDS R2, [RZ+0x10]"]
    assert iterations(*shared, contents=[17]) == 17
    # Lane l holds l; each takes that of the lane with the opposite last bit, and then of lane 9.
    lanes = [
        "S2R R6, SR_TID.X",
        "SHFL.BFLY PT, R6, R6, 0x1, 0x1f",
        "SHFL.IDX PT, R2, R6, 0x9, 0x1f",
    ]
    assert iterations(*lanes, contents=[0]) == 8


def test_bytes_are_permuted() -> None:
    code = ["LDG.E.P R6, [R4]", "PRMT R2, RZ, 0x765, R6"]  # bytes 1 to 3 of it, and a zero
    assert iterations(*code, contents=[0x1234]) == 0x12


def test_a_vote_gathers_lanes() -> None:
    code = [
        "S2R R6, SR_TID.X",
        "ISETP.LT.AND P1, PT, R6, 0x4, PT",
        "VOTE.ANY R2, PT, P1",
    ]
    assert iterations(*code, contents=[0]) == 0b1111


def test_integers_are_divided_as_the_compiler_does_it() -> None:
    """100 / 7, by the reciprocal in FP32 and one correction."""
    code = [
        "LDG.E.64.P R6, [R4]",
        "TEXDEPBAR 0x0",
        "I2F.F32.U32.RP R8, R7",
        "MUFU.RCP R8, R8",
        "IADD32I R8, R8, 0xffffffe",
        "F2I.FTZ.U32.F32.TRUNC R8, R8",
        "IMAD R9, -R8, R7, RZ",
        "IMAD.U32.U32.HI R8, R8, R9, R8",
        "IMUL.U32.U32.HI R2, R8, R6",
        "IMAD R9, -R2, R7, R6",
        "ISETP.GE.U32.AND P1, PT, R9, R7, PT",
        "@P1 IADD32I R2, R2, 0x1",
    ]
    assert iterations(*code, contents=[100, 7]) == 14


def test_blocks_have_three_numbers() -> None:
    code = ["S2R R2, SR_CTAID.Z", "ISETP.EQ.AND P0, PT, R2, 0x2, PT", "@!P0 EXIT"]
    launch = smx.Launch((1, 13, 4), 32, [], 32, 0)  # this SMX gets (0, 0, z)
    result = smx.simulate(listing(*code, "FADD R1, R1, R1"), "k", launch)
    assert result.warp_instructions["fp"] == 1


def test_lanes_leave_a_loop_one_after_the_other() -> None:
    code = [
        "S2R R2, SR_TID.X",  # 0x08
        "MOV R0, RZ",  # 0x10
        "PBK 0x50",  # 0x18
        "FADD R1, R1, R1",  # 0x20
        "IADD32I R0, R0, 0x1",  # 0x28
        "ISETP.GT.AND P0, PT, R0, R2, PT",  # 0x30
        "@P0 BRK",  # 0x38: lane l after l + 1 times
        "BRA 0x20",  # 0x48, behind the control word at 0x40
        "FADD R3, R3, R3",
    ]
    assert run(*code).warp_instructions["fp"] == 32 + 1


# A block counts its arrival, up to the limit in R2; the last one goes on.
ARRIVE = ["ATOM.E.INC R6, [R4], R2", "ISETP.NE.AND P0, PT, R6, R2, PT", "@P0 EXIT"]


@pytest.mark.parametrize(("splits", "last"), [(3, 2), (5, 1), (8, 1)])
def test_the_last_block_that_arrives_goes_on(splits: int, last: int) -> None:
    """This SMX has five blocks of 65, of which every ``splits`` share a counter."""
    code = [*FIRST, f"MOV32I R2, 0x{splits - 1:x}", *ARRIVE, "FADD R1, R1, R1"]
    assert run(*code, blocks=5 * 13).warp_instructions["fp"] == last


def test_a_fence_waits_for_stores() -> None:
    fence, store = (run(*FIRST, *code, "MEMBAR.GL").cycles for code in ([], ["ST.E [R4], R2"]))
    assert store - fence > smx.SETTINGS["dram_latency"] - 10


def test_the_size_of_the_grid_is_known() -> None:
    code = ["MOV R2, c[0x0][0x34]", "ISETP.EQ.AND P0, PT, R2, 0x1a, PT", "@!P0 EXIT"]
    assert run(*code, "FADD R1, R1, R1", blocks=26).warp_instructions["fp"] == 2


def test_occupancy_is_bound_by_registers_shared_memory_and_slots() -> None:
    def blocks(registers: int, shared: int, threads: int = 256) -> int:
        return smx.occupancy(smx.Launch((1, 1), threads, [], registers, shared))

    assert (blocks(72, 17408), blocks(255, 0), blocks(32, 0, 32)) == (6, 2, 16)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="no kernel other in the SASS"):
        smx.parse(listing(), "other")


@pytest.fixture(scope="module")
def kernels() -> dict[str, kernels_predict.Compiled]:
    if not driver.available() or shutil.which("cuobjdump") is None:
        pytest.skip("no fat binary or no cuobjdump here: csrc/build.sh vllm_k80/kernels")
    return kernels_predict.compiled(driver.FAT_BINARY)


def is_not_slower(kernels: dict[str, kernels_predict.Compiled], case: kernels_predict.Case) -> None:
    used = kernels[case.kernel]
    now = smx.simulate(used.sass, case.kernel, case.launch).microseconds
    key = f"{case.kernel} n={case.n} k={case.k} m={case.m} group={case.group}"
    before = json.loads(kernels_predict.BASELINE.read_text())[key]
    assert now <= kernels_predict.ALLOWED_GROWTH * before


def test_the_int4_kernel_is_not_predicted_slower_than_before(kernels) -> None:
    is_not_slower(kernels, kernels_predict.gemv(kernels, "w4_f16", 512, 1024, 1))


def test_the_activation_costs_a_product_little_of_the_launch_it_saves(kernels) -> None:
    def predicted(gated: bool) -> float:
        case = kernels_predict.gemv(kernels, "w4_f16", 512, 1024, 1, gated=gated)
        used = kernels[case.kernel]
        return float(smx.simulate(used.sass, case.kernel, case.launch).microseconds)

    assert predicted(True) - predicted(False) < smx.SETTINGS["launch_us"] / 6


def test_attention_is_not_predicted_slower_than_before(kernels) -> None:
    is_not_slower(kernels, kernels_predict.paged_attention(kernels, 32, 8, 512, 1))
    is_not_slower(kernels, kernels_predict.varlen_attention(kernels, 2, 2, 128))


def test_decode_is_split_as_the_operator_does_it(kernels) -> None:
    for sequences, kv_heads in ((1, 8), (1, 32), (8, 8), (3, 4)):
        case = kernels_predict.paged_attention(kernels, 32, kv_heads, 2048, sequences)
        tiles, splits, _ = case.launch.grid
        group = attention_kernels.tile_of_heads(32 // kv_heads)
        assert tiles == kv_heads * -(-(32 // kv_heads) // group)
        assert splits == attention_kernels.splits(sequences * tiles, 2048)


def test_the_grid_of_eight_rows_is_the_one_that_is_launched() -> None:
    for rows in (1, 64, 832, 4096, 5120, 11008, 13824, 22016):
        for columns in (128, 4096, 11008, 13824):
            for bits in (4, 8):
                grid = kernels_predict.blocks_of_eight(rows, columns, bits)
                assert grid == operators.blocks_of_eight(rows, columns, bits)
