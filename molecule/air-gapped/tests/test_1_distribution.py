"""Debian's compiler on the server, and the image that it made the kernels of."""

from __future__ import annotations

import json
import re

import pytest
from conftest import SERVER, Role, Server
from scenario import ROOT

COMPILER = "/opt/vllm-k80/cuda"
KERNELS = "/var/lib/vllm-k80/image/context/kernels/vllm_k80.fatbin"
IN_IMAGE = "/opt/vllm-k80/lib/python3.11/site-packages/vllm_k80/kernels/vllm_k80.fatbin"


@pytest.fixture(scope="module")
def image(server: Server) -> str:
    record = json.loads(server.run("cat /var/lib/vllm-k80/image/image.json"))
    return str(record["current"])


def in_image(server: Server, image: str, program: str, arguments: str) -> str:
    return server.run(f"docker run --rm --network none --entrypoint {program} {image} {arguments}")


def test_the_compiler_is_debians_and_nothing_came_with_it(server: Server) -> None:
    assert "release 11.8" in server.run(f"{COMPILER}/bin/nvcc --version")
    record = server.run(f"cat {COMPILER}/made-from").splitlines()
    assert [line.split()[0] for line in record] == ["nvidia-cuda-toolkit", "nvidia-cuda-dev"]
    # No package of it, no library of another driver, and no more than it needs.
    packages = server.run("dpkg-query --show --showformat '${Package} ${Version}\\n'").splitlines()
    assert not [name for name in packages if name.startswith(("nvidia-cuda", "libcudart"))]
    assert not [name for name in packages if "libcuda1 " in name]
    libraries = server.run("/sbin/ldconfig -p | awk '/libcuda.so/ {print $NF}' | xargs readlink -f")
    assert {path.rpartition(".so.")[2] for path in libraries.split()} == {"470.256.02"}
    assert int(server.run(f"du -sm {COMPILER}").split()[0]) < 200


def test_the_image_has_the_very_kernels_that_the_server_compiled(
    server: Server, image: str
) -> None:
    code = server.code_in(COMPILER, KERNELS)
    assert "ELF file" in code and "sm_37.cubin" in code
    assert "PTX file" in code and "sm_37.ptx" in code
    own = server.run(f"sha256sum {KERNELS}").split()[0]
    assert in_image(server, image, "sha256sum", IN_IMAGE).split()[0] == own
    said = json.loads(in_image(server, image, "vllm-k80", "info --json"))
    assert said["kernels"] == IN_IMAGE


def test_the_build_fetched_no_cuda_of_its_own(server: Server) -> None:
    log = server.run("cat /var/lib/vllm-k80/image/build.log")
    assert f"== the kernels, for sm_37, with {COMPILER}/bin/nvcc" in log
    assert "CUDA 11.8's compiler" not in log
    assert "kernels.lock" not in log


def test_the_kernels_are_reported_by_the_servers_own_compiler(role: Role) -> None:
    """With the system's Python; `make kernels-report` begins with the same program."""
    code, changed, said = role.play(ROOT / "playbooks/kernels-report.yml")
    assert (code, changed) == (0, 0), said
    assert f"csrc, compiled by {COMPILER}/bin/nvcc (CUDA 11.8):" in said
    assert re.search(r"rms_norm_f16 +38 +0 +32 +\d+ +256 +8 +100% +warps", said)


def test_without_a_compiler_the_image_is_refused_in_words(role: Role) -> None:
    code, changed, said = role.run(
        "vllm_image",
        vllm_image_repository="another",
        vllm_image_cuda_source="host",
        vllm_image_base_image="vllm-k80-base:debian12",
        vllm_image_build_free_gb=0,
    )
    assert (code, changed) == (2, 0)
    assert (
        f"vllm_image_cuda_source is host, but {SERVER} has no compiler that this run knows of: "
        "run the role cuda_toolkit before this one" in said
    )
