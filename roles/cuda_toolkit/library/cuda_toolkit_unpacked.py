#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Unpacks CUDA's compiler and its headers from the distribution's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: cuda_toolkit_unpacked
short_description: CUDA's compiler from the distribution's packages, unpacked and not installed
description:
  - Puts nvcc, what it calls, cuobjdump and the headers into a directory of their own, so that none
    of the packages' dependencies comes along. apt fetches the packages and checks their signatures.
  - Follows the version that apt offers. The directory is replaced when the new one is complete.
options:
  prefix: {description: The directory, which is this module's alone., type: path, required: true}
attributes:
  check_mode:
    description: Says whether the directory would be made, as it would where apt knows none yet.
    support: full
"""

EXAMPLES = r"""
- name: Unpack the compiler and its headers
  cuda_toolkit_unpacked:
    prefix: /opt/vllm-k80/cuda
"""

RETURN = r"""
version:
  description: Version of the distribution's nvidia-cuda-toolkit; empty where apt offers none.
  type: str
  returned: success
"""

# From each package: its directories, and where they go. They are in this order in the archive, so
# that what comes after the headers, 2.7 GB of libraries, is not even read.
PACKAGES = {
    "nvidia-cuda-toolkit": {
        "usr/bin/": "bin/",
        "usr/lib/nvidia-cuda-toolkit/bin/": "bin/",
        "usr/lib/nvidia-cuda-toolkit/libdevice/": "libdevice/",
    },
    "nvidia-cuda-dev": {"usr/include/": "include/"},
}
# The script that calls nvcc where the package would be installed, and the settings for there.
LEFT_OUT = ("usr/bin/nvcc", "usr/lib/nvidia-cuda-toolkit/bin/nvcc.profile")
PROFILE = """\
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/libdevice
PATH += $(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
"""
RECORD = "made-from"


class UnpackError(Exception):
    """Why there is no compiler; the text is for the user."""


def run(*argv, cwd=None):
    environment = dict(os.environ, LC_ALL="C")
    done = subprocess.run(
        argv, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False
    )
    if done.returncode != 0:
        raise UnpackError(
            f"{' '.join(argv)} failed: {done.stderr.decode(errors='replace').strip()}"
        )
    return done.stdout.decode()


def candidates():
    """The version of each package that apt would install; none for one that it does not know."""
    versions = {}
    for package in PACKAGES:
        for line in run("apt-cache", "policy", package).splitlines():
            name, _, value = line.strip().partition(": ")
            if name == "Candidate" and value != "(none)":
                versions[package] = value
    return versions


def destination(path, directories):
    """Where a file of a package goes, or None."""
    if path in LEFT_OUT:
        return None
    for source, target in directories.items():
        if path.startswith(source):
            return target + path[len(source) :]
    return None


def unpack(archive, directories, prefix):
    """Takes the wanted directories out of a package, and reads it no further than that."""
    last = max(directories)
    stream = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=stream.stdout, mode="r|") as members:
        for member in members:
            path = member.name[2:] if member.name.startswith("./") else member.name
            if path > last and not path.startswith(last):
                break
            target = destination(path, directories)
            if target and not member.isdir():
                member.name = target
                members.extract(member, prefix)
    stream.kill()
    stream.wait()


def build(versions, prefix):
    staging = prefix + ".new"
    shutil.rmtree(staging, ignore_errors=True)
    downloads = os.path.join(staging, "downloads")
    os.makedirs(downloads)
    for package, directories in PACKAGES.items():
        # apt's own user may not write here.
        sandbox = ("-o", "APT::Sandbox::User=root")
        run("apt-get", "download", "-qq", *sandbox, f"{package}={versions[package]}", cwd=downloads)
        (archive,) = os.listdir(downloads)
        unpack(os.path.join(downloads, archive), directories, staging)
        os.unlink(os.path.join(downloads, archive))
    os.rmdir(downloads)
    with open(os.path.join(staging, "bin", "nvcc.profile"), "w") as file:
        file.write(PROFILE)
    with open(os.path.join(staging, RECORD), "w") as file:
        file.write(record(versions))
    shutil.rmtree(prefix, ignore_errors=True)
    os.rename(staging, prefix)


def record(versions):
    return "".join(f"{package} {versions[package]}\n" for package in PACKAGES)


def made_from(prefix):
    try:
        with open(os.path.join(prefix, RECORD)) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def main():
    module = AnsibleModule(
        argument_spec={"prefix": {"type": "path", "required": True}}, supports_check_mode=True
    )
    prefix = module.params["prefix"].rstrip("/")
    try:
        versions = candidates()
        missing = [package for package in PACKAGES if package not in versions]
        if missing and not module.check_mode:
            raise UnpackError(
                f"apt knows no package {' and '.join(missing)}: give the server a source with the "
                "component non-free (Ubuntu: multiverse), or set cuda_toolkit_source to repository "
                "or runfile."
            )
        changed = bool(missing) or made_from(prefix) != record(versions)
        if changed and not module.check_mode:
            build(versions, prefix)
    except (UnpackError, OSError, tarfile.TarError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, version=versions.get("nvidia-cuda-toolkit", ""))


if __name__ == "__main__":
    main()
