"""The compiler out of the distribution's packages, and what role cuda_toolkit refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = "usr/lib/x86_64-linux-gnu/libcublas_static.a"
# As Debian's packages lay it out.
FILES = {
    "nvidia-cuda-toolkit": [
        "etc/nvcc.profile",
        "usr/bin/cuobjdump",
        "usr/bin/nvcc",
        "usr/include/nvvm.h",
        "usr/lib/nvidia-cuda-toolkit/bin/crt/link.stub",
        "usr/lib/nvidia-cuda-toolkit/bin/nvcc",
        "usr/lib/nvidia-cuda-toolkit/compute-sanitizer/libsanitizer.so",
        "usr/lib/nvidia-cuda-toolkit/libdevice/libdevice.10.bc",
        "usr/share/doc/nvidia-cuda-toolkit/copyright",
    ],
    "nvidia-cuda-dev": ["usr/include/cuda.h", "usr/include/crt/device_functions.h", LIBRARIES],
}
APT_CACHE = """#!/bin/sh
[ -e {packages}/$2.deb ] || exit 0
echo "$2:"
echo "  Installed: (none)"
echo "  Candidate: $(dpkg-deb --field {packages}/$2.deb Version)"
"""
APT_GET = """#!/bin/sh
for package; do :; done
cp {packages}/${{package%=*}}.deb . && echo "$package" >> {packages}/downloaded
"""


class Apt:
    """Stands in for apt, with packages of these names and no more in them than names."""

    def __init__(self, directory: Path) -> None:
        self.packages = directory / "packages"
        self.packages.mkdir()
        for name, script in (("apt-cache", APT_CACHE), ("apt-get", APT_GET)):
            program = directory / name
            program.write_text(script.format(packages=self.packages))
            program.chmod(0o755)

    def offer(self, version: str) -> None:
        for package, files in FILES.items():
            root = self.packages / package
            (root / "DEBIAN").mkdir(parents=True, exist_ok=True)
            (root / "DEBIAN/control").write_text(
                f"Package: {package}\nVersion: {version}\nArchitecture: amd64\n"
                "Maintainer: nobody <nobody@localhost>\nDescription: stand-in\n"
            )
            for path in files:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(f"{path} of {version}")
            profile = root / "usr/lib/nvidia-cuda-toolkit/bin/nvcc.profile"
            if package == "nvidia-cuda-toolkit" and not profile.is_symlink():
                profile.symlink_to("/etc/nvcc.profile")
            build = ["dpkg-deb", "--build", root, self.packages / f"{package}.deb"]
            subprocess.run(build, check=True, capture_output=True)

    def downloaded(self) -> list[str]:
        return (self.packages / "downloaded").read_text().splitlines()


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Apt(tmp_path)


@pytest.fixture(scope="module")
def unpacked(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("roles/cuda_toolkit/library/cuda_toolkit_unpacked.py")


def test_the_compiler_and_its_headers_and_nothing_else(
    tmp_path: Path, apt: Apt, unpacked: ModuleType
) -> None:
    apt.offer("11.8-5")
    prefix = tmp_path / "cuda"
    versions = unpacked.candidates()
    unpacked.build(versions, str(prefix))
    there = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    assert there == {
        "bin/crt/link.stub",
        "bin/cuobjdump",
        "bin/nvcc",
        "bin/nvcc.profile",
        "include/crt/device_functions.h",
        "include/cuda.h",
        "libdevice/libdevice.10.bc",
        "made-from",
    }
    # The compiler itself, not the script that calls it where the package would be installed.
    assert (prefix / "bin/nvcc").read_text().startswith("usr/lib/nvidia-cuda-toolkit/bin/nvcc")
    assert "$(TOP)/include" in (prefix / "bin/nvcc.profile").read_text()
    assert unpacked.made_from(str(prefix)) == unpacked.record(versions)
    assert not (tmp_path / "cuda.new").exists()


def test_a_new_version_takes_the_old_ones_place(
    tmp_path: Path, apt: Apt, unpacked: ModuleType
) -> None:
    prefix = tmp_path / "cuda"
    for version in ("11.8-4", "11.8-5"):
        apt.offer(version)
        assert unpacked.made_from(str(prefix)) != unpacked.record(unpacked.candidates())
        unpacked.build(unpacked.candidates(), str(prefix))
        (prefix / "bin" / version).touch()
    assert (prefix / "include/cuda.h").read_text().endswith("of 11.8-5")
    assert not (prefix / "bin/11.8-4").exists()
    assert apt.downloaded()[2:] == ["nvidia-cuda-toolkit=11.8-5", "nvidia-cuda-dev=11.8-5"]


def test_a_failed_download_leaves_what_was_there(
    tmp_path: Path, apt: Apt, unpacked: ModuleType
) -> None:
    apt.offer("11.8-5")
    versions = unpacked.candidates()
    prefix = tmp_path / "cuda"
    unpacked.build(versions, str(prefix))
    (apt.packages / "nvidia-cuda-dev.deb").unlink()
    with pytest.raises(unpacked.UnpackError, match=r"apt-get download .* failed: cp: cannot stat"):
        unpacked.build(versions, str(prefix))
    assert unpacked.made_from(str(prefix)) == unpacked.record(versions)


def test_a_package_that_apt_does_not_know_has_no_version(apt: Apt, unpacked: ModuleType) -> None:
    assert unpacked.candidates() == {}


# ---- what the role refuses


def refusal(directory: Path, distribution: str, version: str, **variables: Any) -> str:
    """What the role says, in check mode, on a host with these facts."""
    facts = {
        "ansible_distribution": distribution,
        "ansible_distribution_version": version,
        "ansible_distribution_major_version": version.split(".")[0],
        "ansible_os_family": "Debian",
        "ansible_pkg_mgr": "apt",
    }
    set_facts = {"name": "Set the facts", "ansible.builtin.set_fact": facts | {"cacheable": True}}
    play = {
        "hosts": "server",
        "gather_facts": False,
        "vars_files": [str(ROOT / "group_vars/all/versions.yml")],
        "pre_tasks": [set_facts],
    }
    playbook = directory / "play.yml"
    playbook.write_text(json.dumps([play | {"roles": ["cuda_toolkit"]}]))
    variables |= {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [program, "--check", "-i", "server,", "-e", json.dumps(variables), playbook],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("distribution", "version", "variables", "sentence"),
    [
        (
            "Ubuntu",
            "24.04",
            {},
            "Ubuntu 24.04 of server packages no CUDA 11, and newer ones do not know the K80: set "
            "cuda_toolkit_source to repository or runfile.",
        ),
        (
            "Debian",
            "13",
            {"cuda_toolkit_source": "runfile"},
            "Debian 13 of server is not known to have a C++ compiler that CUDA 11 accepts",
        ),
        (
            "Debian",
            "12",
            {"cuda_toolkit_source": "repository", "cuda_toolkit_repository_release": "12.2"},
            "cuda_toolkit_repository_release is 12.2, but the K80 needs one of CUDA 11",
        ),
        (
            "Debian",
            "12",
            {"cuda_toolkit_source": "image"},
            "value of cuda_toolkit_source must be one of: distribution, repository, runfile",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, distribution: str, version: str, variables: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(tmp_path, distribution, version, **variables)
