"""make kernels-report: what it reads from cuobjdump, and what it says of a wrong compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "vllm-k80-src/tools/kernels_report.py"
NVCC = Path("/usr/bin/nvcc")  # Debian's nvidia-cuda-toolkit
OCCUPANCY_HEADER = Path("/usr/include/cuda_occupancy.h")

# What cuobjdump 11.8 printed of two kernels, one of which spills, shortened.
HEADER = """\

Fatbin {kind} code:
================
arch = {arch}
code version = [1,7]
host = linux
compile_size = 64bit
"""
ELF, PTX = (HEADER.format(kind=kind, arch="sm_37") for kind in ("elf", "ptx"))
OTHER = HEADER.format(kind="elf", arch="sm_70")
USAGE = f"""\
{ELF}
Resource usage:
 Common:
  GLOBAL:0
 Function spills:
  REG:32 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function rms_norm_f32:
  REG:38 STACK:0 SHARED:32 LOCAL:0 CONSTANT[0]:352 CONSTANT[2]:16 TEXTURE:0 SURFACE:0 SAMPLER:0
{OTHER}
Resource usage:
 Function newer:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352
{PTX}compressed
"""
SASS = f"""\
{ELF}
	code for sm_37
		Function : spills
	.headerflags    @"EF_CUDA_SM37 EF_CUDA_PTX_SM(EF_CUDA_SM37)"
                                                                /* 0x08b09010888010c0 */
        /*0008*/                   MOV R1, c[0x0][0x44];        /* 0x64c03c00089c0006 */
        /*0010*/                   STL [R1+0x8], R4;            /* 0x7ab80000041c0410 */
        /*0018*/                   LDL.LU R4, [R1+0x8];         /* 0x7a980000041c0410 */
        /*0020*/               @P1 NOP.S;                       /* 0x8580000000443c02 */
        /*0028*/                   EXIT;                        /* 0x18000000001c003c */
        /*0030*/                   BRA 0x30;                    /* 0x12007ffffc1c003c */
        /*0038*/                   NOP;                         /* 0x85800000001c3c02 */
		..........


		Function : rms_norm_f32
	.headerflags    @"EF_CUDA_SM37 EF_CUDA_PTX_SM(EF_CUDA_SM37)"
        /*0008*/                   FFMA R0, R1, R2, R3;         /* 0x64c03c00089c0006 */
        /*0010*/              @!P2 BRA 0x8;                     /* 0x12000000001c003c */
        /*0018*/                   FFMA.FTZ R0, R1, R2, R3;     /* 0x64c03c00089c0006 */
        /*0020*/                   EXIT;                        /* 0x18000000001c003c */
        /*0028*/                   BRA 0x28;                    /* 0x12007ffffc1c003c */
        /*0030*/                   NOP;                         /* 0x85800000001c3c02 */
{OTHER}
	code for sm_70
		Function : newer
        /*0000*/                   FFMA R0, R1, R2, R3;         /* 0x64c03c00089c0006 */
"""
PTX_TEXT = f"""\
{ELF}{PTX}compressed
.version 7.8
.target sm_37

.visible .entry rms_norm_f32(
.param .u64 rms_norm_f32_param_0,
.param .u32 rms_norm_f32_param_1
)
.maxntid 128, 2, 1
{{
ret;
}}
.visible .entry spills()
{{
ret;
}}
"""


@pytest.fixture(scope="module")
def tool(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module(str(TOOL.relative_to(ROOT)))


def test_each_kernel_for_the_card_is_reported(tool: ModuleType) -> None:
    rms_norm, spills = tool.report(USAGE, SASS, PTX_TEXT)
    assert rms_norm == {
        "kernel": "rms_norm_f32",
        "registers": 38,
        "stack_bytes": 0,
        "local_loads_and_stores": 0,
        "shared_bytes": 32,
        "instructions": 4,
        "by_opcode": {"FFMA": 2, "BRA": 1, "EXIT": 1},
        "threads_per_block": 256,
        "threads_are_declared": True,
        "blocks_per_multiprocessor": 8,
        "occupancy": 1.0,
        "limited_by": ["warps"],
    }
    # The padding after the end is no instruction; a NOP that does something (.S) is one.
    assert spills["by_opcode"] == {"MOV": 1, "STL": 1, "LDL": 1, "NOP": 1, "EXIT": 1}
    assert (spills["stack_bytes"], spills["local_loads_and_stores"]) == (48, 2)
    assert not spills["threads_are_declared"]

    lines = tool.table([rms_norm, spills]).splitlines()
    assert lines[1].split() == ["rms_norm_f32", "38", "0", "32", "4", "256", "8", "100%", "warps"]
    assert lines[2].split() == ["spills", "32", "2", "0", "5", "256?", "8", "100%", "warps"]


def test_a_binary_without_code_for_the_card_is_refused(tool: ModuleType) -> None:
    with pytest.raises(tool.ReportError, match="no kernel for sm_37"):
        tool.report(USAGE.replace("sm_37", "sm_35"), SASS, PTX_TEXT)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks", "limits"),
    [
        (256, 38, 32, 8, ["warps"]),
        (64, 16, 0, 16, ["blocks"]),
        (256, 128, 0, 4, ["registers"]),
        (256, 32, 48 * 1024, 2, ["shared memory"]),
        (1024, 65, 0, 0, ["registers"]),  # 65,536 registers are what a block may have
        (256, 32, 48 * 1024 + 1, 0, ["shared memory"]),
        (1, 256, 0, 0, ["registers"]),
    ],
)
def test_occupancy(
    tool: ModuleType, threads: int, registers: int, shared: int, blocks: int, limits: list[str]
) -> None:
    assert tool.occupancy(threads, registers, shared) == (blocks, limits)


@pytest.mark.skipif(not OCCUPANCY_HEADER.exists(), reason="no CUDA headers here")
def test_occupancy_is_what_cudas_own_header_computes(tool: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "occupancy.c"
    program.write_text(
        r"""
        #include <stddef.h>
        #include <stdio.h>
        #include <cuda_occupancy.h>
        int main(void) {
          cudaOccDeviceProp gk210 = {.computeMajor = 3, .computeMinor = 7, .warpSize = 32,
            .maxThreadsPerBlock = 1024, .maxThreadsPerMultiprocessor = 2048, .numSms = 13,
            .regsPerBlock = 65536, .regsPerMultiprocessor = 131072, .sharedMemPerBlock = 49152,
            .sharedMemPerBlockOptin = 49152, .sharedMemPerMultiprocessor = 114688};
          cudaOccDeviceState state = {.cacheConfig = CACHE_PREFER_SHARED};
          for (int threads = 1; threads <= 1024; threads += 31)
            for (int registers = 1; registers <= 256; registers += 3)
              for (int shared = 0; shared <= 50000; shared += 2500) {
                cudaOccFuncAttributes kernel = {.maxThreadsPerBlock = 1024, .numRegs = registers,
                  .sharedSizeBytes = (size_t)shared, .maxDynamicSharedSizeBytes = 49152};
                cudaOccResult result;
                if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gk210, &kernel, &state,
                                                            threads, 0))
                  return 1;
                printf("%d %d %d %d\n", threads, registers, shared,
                       result.activeBlocksPerMultiprocessor);
              }
          return 0;
        }
        """
    )
    subprocess.run(["gcc", "-o", tmp_path / "occupancy", program], check=True)
    computed = subprocess.run([tmp_path / "occupancy"], capture_output=True, text=True, check=True)
    cases = [tuple(map(int, line.split())) for line in computed.stdout.splitlines()]
    assert len(cases) > 50_000
    wrong = [case for case in cases if tool.occupancy(*case[:3])[0] != case[3]]
    assert wrong == []


def kernels_report(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def a_compiler(directory: Path, release: str) -> Path:
    nvcc = directory / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_a_newer_compiler_is_refused_in_words(tmp_path: Path) -> None:
    nvcc = a_compiler(tmp_path, "12.0")
    done = kernels_report(NVCC=str(nvcc))
    assert done.returncode == 1
    assert f"{nvcc} is of CUDA 12.0, which does not know the K80. Install" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_compiler_it_says_what_to_install(tool: ModuleType, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(tool.ReportError, match=r"There is no nvcc here\. Install .*cuda_toolkit"):
        tool.find_nvcc(None, places=())


def test_the_first_compiler_of_cuda_11_is_taken(
    tool: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    for name, release in (("a", "12.3"), ("b", "11.4")):
        (tmp_path / name).mkdir()
        a_compiler(tmp_path / name, release)
    monkeypatch.setenv("PATH", str(tmp_path / "a"))
    assert tool.find_nvcc(None, (f"{tmp_path}/?/nvcc",)) == (f"{tmp_path}/b/nvcc", "11.4")


@pytest.mark.skipif(not NVCC.exists(), reason="Debian's nvidia-cuda-toolkit is not installed")
def test_the_kernels_here_suit_the_card(tmp_path: Path) -> None:
    done = kernels_report("--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["cuda"].startswith("11.")
    names = [kernel["kernel"] for kernel in said["kernels"]]
    assert {"rms_norm_f32", "fused_add_rms_norm_f16"} <= set(names)
    for kernel in said["kernels"]:
        assert kernel["instructions"] > 20, kernel
        assert kernel["threads_are_declared"], kernel
        assert kernel["blocks_per_multiprocessor"] > 0, kernel
        assert kernel["local_loads_and_stores"] == 0, f"{kernel['kernel']} spills"


def test_make_prints_the_resources_before_it_needs_an_environment() -> None:
    make = ["make", "--dry-run", "kernels-report"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    resources, environment, predictions, costs = done.stdout.splitlines()
    assert resources == "python3 vllm-k80-src/tools/kernels_report.py"
    assert environment == "tools/package-env"
    assert predictions.endswith("kernels_predict.py build/kernels-report.json")
    assert costs.endswith("kernels_costs.py build/kernels-report.json")
