"""The other sources, from stand-ins for what NVIDIA offers; and what the role refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import SERVER, Role, Server
from scenario import ROOT

PREFIX = "/opt/vllm-k80/cuda"
PACKAGES = "/usr/local/cuda-11.4"
REPOSITORY = {
    "cuda_toolkit_source": "repository",
    "cuda_toolkit_repository_url": "file:/srv/cuda/repository",
    "cuda_toolkit_repository_key": "file:///srv/cuda/key.asc",
}
RUNFILE = {
    "cuda_toolkit_source": "runfile",
    "cuda_toolkit_runfile_url": "file:///srv/cuda/cuda.run",
}


@pytest.fixture(scope="module", autouse=True)
def stand_ins(server: Server) -> None:
    """Around a copy of the compiler that the role has set up and will remove."""
    script = (ROOT / "molecule/air-gapped/files/make-stand-ins").read_text()
    server.run("mkdir -p /srv/cuda && cp -a %s /srv/cuda/compiler", PREFIX)
    server.run("bash -c %s make-stand-ins /srv/cuda /srv/cuda/compiler", script)


@pytest.fixture
def compat(server: Server) -> Iterator[str]:
    """A library as cuda-compat brings it, where the loader finds it."""
    directory = "/usr/local/cuda-11.4/compat"
    server.run(f"mkdir -p {directory} && echo {directory} > /etc/ld.so.conf.d/compat.conf")
    server.run(
        f"echo | gcc-11 -shared -x c - -Wl,-soname,libcuda.so.1 -o {directory}/libcuda.so.1"
        " && ldconfig"
    )
    yield f"{directory}/libcuda.so.1"
    server.run(f"rm -r {directory} /etc/ld.so.conf.d/compat.conf && ldconfig")


def applied(role: Role, **variables: Any) -> None:
    """It succeeds, and a second time it changes nothing."""
    code, changed, said = role.run("cuda_toolkit", **variables)
    assert code == 0, said
    assert changed > 0
    code, changed, said = role.run("cuda_toolkit", **variables)
    assert (code, changed) == (0, 0), said


def refused(role: Role, **variables: Any) -> str:
    code, _, said = role.run("cuda_toolkit", **variables)
    assert code == 2, said
    return said


def candidate(server: Server, package: str) -> str:
    policy = server.run(f"LC_ALL=C apt-cache policy {package}").splitlines()
    return next(line.split()[1] for line in policy if "Candidate:" in line)


def test_nvidias_repository(server: Server, role: Role) -> None:
    applied(role, **REPOSITORY)
    server.run(f"test ! -e {PREFIX}")
    held = set(server.run("apt-mark showhold").split())
    assert {"cuda-nvcc-11-4", "cuda-cudart-dev-11-4", "cuda-cuobjdump-11-4"} <= held
    # What the repository has besides cannot even be installed by hand, or by an upgrade.
    for package in ("cuda-drivers", "cuda-compat-11-4", "libnvidia-compute-575", "cuda"):
        assert candidate(server, package) == "(none)"
        assert server.host.run(f"dpkg --status {package}").rc != 0


def test_a_library_that_stands_in_for_a_driver_is_refused(
    server: Server, role: Role, compat: str
) -> None:
    said = refused(role, **REPOSITORY)
    assert f"The loader of {SERVER} finds {compat}, with which CUDA fails on driver 470" in said


def test_an_installer_that_is_not_the_known_one_is_not_run(server: Server, role: Role) -> None:
    said = refused(role, **RUNFILE)
    assert f"{SERVER}: file:///srv/cuda/cuda.run was not run. The checksum for" in said
    server.run("test ! -e /srv/cuda-run-was-started")
    server.run("test ! -e /var/cache/vllm-k80/cuda.run")


def test_too_little_space_is_refused_before_anything(server: Server, role: Role) -> None:
    server.run("mkdir -p /srv/small && mount -t tmpfs -o size=64m none /srv/small")
    try:
        said = refused(role, **RUNFILE, cuda_toolkit_prefix="/srv/small/cuda")
        assert f"{SERVER} has 0.1 GB free for /srv/small/cuda" in said
        server.run("test ! -e /srv/small/cuda")
    finally:
        server.run("umount /srv/small")


def test_nvidias_installer(server: Server, role: Role) -> None:
    sha256 = server.run("sha256sum /srv/cuda/cuda.run").split()[0]
    applied(role, **RUNFILE, cuda_toolkit_runfile_sha256=sha256)
    # The packages of the other source are gone, and apt no longer asks NVIDIA.
    assert server.host.run("dpkg --status cuda-nvcc-11-4").rc != 0
    assert "cuda" not in server.run("ls /etc/apt/sources.list.d /etc/apt/preferences.d")
    # It had no rights, and left nothing outside the prefix.
    assert server.run(f"cat {PREFIX}/installed-by") == "65534"
    assert server.run(f"stat --format %U {PREFIX} {PREFIX}/bin/nvcc") == "root\nroot"
    for path in (
        "/etc/ld.so.conf.d/cuda-11-4.conf",
        "/usr/local/cuda",
        "/lib/modules/nvidia.ko",
        "/tmp/cuda-installer.log",
        "/srv/cuda-run-was-started",
        "/var/cache/vllm-k80/cuda.run",
    ):
        server.run(f"test ! -e {path}")


def test_removal(server: Server, role: Role) -> None:
    code, changed, said = role.run("cuda_toolkit", cuda_toolkit_state="absent")
    assert code == 0, said
    assert changed > 0
    server.run(f"test ! -e {PREFIX}")
    server.run(f"test ! -e {PACKAGES}/bin/nvcc")
