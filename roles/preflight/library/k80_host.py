#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a host with Tesla K80 cards says of itself."""

DOCUMENTATION = r"""
module: k80_host
short_description: Read what matters to K80 cards from a host
description:
  - Reads the PCI tree, kernels, packages, clock and free space, and tries the package
    repositories.
  - Needs no driver and installs nothing.
  - Every probe runs beside the others and has a time limit of its own.
options:
  root:
    description: Where the host's root is mounted.
    type: path
    default: /
  disabled_dies:
    description: PCI addresses of dies that are not looked at, as if they were not there.
    type: list
    elements: str
    default: []
  space:
    description: Absolute paths whose free space is asked for. They need not exist yet.
    type: list
    elements: path
    default: []
  repositories:
    description: Whether to try the host's own package repositories, and the two lists below.
    type: bool
    default: true
  apt_repositories:
    description: Directories of Release files to try besides.
    type: list
    elements: str
    default: []
  urls:
    description: URLs to try besides.
    type: list
    elements: str
    default: []
  now:
    description: The time by the controller's clock, in seconds since 1970.
    type: float
    required: true
  timeout:
    description: Seconds that each probe may take.
    type: int
    default: 10
attributes:
  check_mode:
    description: Changes nothing, ever.
    support: full
"""

EXAMPLES = r"""
- name: Look at the host
  k80_host:
    space: [/var/lib/docker]
    now: "{{ now().timestamp() }}"
  register: __host
"""

RETURN = r"""
silent:
  description: What could not be read, and why; its key below is then missing.
  type: dict
  returned: success
dies:
  description: The dies, sorted by PCI address.
  type: list
  elements: dict
  returned: success
  contains:
    pci_address:
      description: Address with its domain.
      type: str
      sample: "0000:05:00.0"
    board:
      description:
        - Address of the board's switch (its upstream port).
        - The die's own address where there is no such switch.
      type: str
      sample: "0000:03:00.0"
    numa_node:
      description: NUMA node; -1 where the kernel does not say. Then nothing may be pinned by it.
      type: int
      sample: 0
    local_cpulist:
      description: CPUs of that node, as the kernel writes lists.
      type: str
      sample: 0-9,20-29
pci:
  description: The state of the dies on the bus.
  type: dict
  returned: success
  contains:
    without_memory:
      description: Addresses of dies whose first or second memory region has no place.
      type: list
    links:
      description:
        - The PCIe links of the boards and dies, as C(address), C(board), C(width), C(max_width),
          C(speed) and C(max_speed) (GT/s).
        - Null where the kernel does not say.
      type: list
    peers:
      description:
        - By die, the type of its C(iommu) group and the bridges above it whose C(acs) redirects.
      type: dict
    others:
      description: Other GPUs of NVIDIA, as C(pci_address) and C(id).
      type: list
    no_dies:
      description: Addresses in C(disabled_dies) at which there is a device of another kind.
      type: list
    taken_off:
      description: Addresses of the dies that an earlier run has taken off the bus at every boot.
      type: list
kernels:
  description:
    - The installed kernels, as C(version), C(headers), C(headers_available) and C(realtime).
    - C(headers_available) is null where the package manager has no lists to know it by.
  type: list
  returned: success
system:
  description:
    - C(realtime) of the running kernel; C(secure_boot), null where the machine has none; the
      dies that C(nouveau) has; and the version of the module C(nvidia) that is.
  type: dict
  returned: success
installed:
  description: Version of each installed package, by name.
  type: dict
  returned: success
packages:
  description:
    - Installed parts of an NVIDIA driver, as C(name) and C(version).
    - The library that NVIDIA's runfile leaves counts as one, by its path.
  type: list
  returned: success
docker:
  description: Installed parts of a Docker that is not the distribution's.
  type: list
  returned: success
toolkit_sources:
  description: What names the toolkit's repositories to apt, as C(file) and C(uri).
  type: list
  returned: success
clock:
  description:
    - C(now); how far it is C(ahead) of the controller, in seconds; C(synchronised), null where the
      host may not set its clock; and when the C(newest_release) of its package lists was made.
  type: dict
  returned: success
repositories:
  description: The URLs tried, as C(url) and C(error), which is empty where one answered.
  type: list
  returned: success
space:
  description: One entry per path.
  type: list
  elements: dict
  returned: success
  contains:
    path:
      description: The path asked for.
      type: str
    exists:
      description: Whether it is there.
      type: bool
    filesystem:
      description: The same number for paths on the same filesystem.
      type: int
    free_bytes:
      description: What is free there, less what the filesystem keeps for root.
      type: int
"""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from email.utils import mktime_tz, parsedate_tz
from glob import glob
from urllib.error import HTTPError

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

NVIDIA = "0x10de"
DIE = (NVIDIA, "0x102d")
SWITCH = ("0x10b5", "0x8747")
CLASS_3D_CONTROLLER = "0x0302"
CLASS_VGA_CONTROLLER = "0x0300"
# What the role nvidia_driver writes for dies that are left out.
DISABLED_RULES = "etc/udev/rules.d/40-k80-disabled-dies.rules"

CAP_SYS_TIME = 25
STA_UNSYNC = 0x40

# The parts that make a driver: its modules, its libraries and the packages that draw them in. Tools
# with versions of their own (nvidia-persistenced, nvidia-modprobe) go with any driver.
DRIVER_PARTS = re.compile(
    r"(cuda-drivers|kmod-nvidia|linux-(modules|objects|signatures)-nvidia|libcuda1$|libnvidia-("
    r"compute|ml1$|tesla)|nvidia-(driver|headless|open|dkms|kmod|kernel|utils|compute-utils|smi$|"
    r"tesla))"
)

# What is not installed beside the distribution's Docker.
FOREIGN_DOCKER = re.compile(
    r"(docker-(ce|ce-cli|engine)|containerd\.io|podman-docker|moby-(engine|cli|containerd))$"
)


def read(*path):
    """Content of a small file, such as sysfs has; empty where there is none."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="replace") as attribute:
            return attribute.read().strip()
    except OSError:
        return ""


def apt_options(root):
    """For apt's programs: the lists and sources of that root, and no cache written."""
    options = [
        "Dir::Etc=" + os.path.join(root, "etc/apt"),
        "Dir::State=" + os.path.join(root, "var/lib/apt"),
        "Dir::State::status=" + os.path.join(root, "var/lib/dpkg/status"),
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
    ]
    return [word for option in options for word in ("-o", option)]


def output_of(command, seconds):
    """What a command prints; empty where there is no such command or it fails."""
    if not shutil.which(command[0]):
        return ""
    # Messages are parsed, so they must be in English.
    environment = dict(os.environ, LC_ALL="C.UTF-8")
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=seconds,
        env=environment,
        check=False,
    )
    return "" if done.returncode else done.stdout.decode("utf-8", "replace")


# --- The PCI tree -----------------------------------------------------------


def is_a(device, identity):
    return (read(device, "vendor"), read(device, "device")) == identity


def pci_devices(root):
    devices = os.path.join(root, "sys/bus/pci/devices")
    # A host without PCI has no such directory, and no dies.
    addresses = sorted(os.listdir(devices)) if os.path.isdir(devices) else []
    return [os.path.join(devices, address) for address in addresses]


def is_a_die(device):
    return is_a(device, DIE) and read(device, "class").startswith(CLASS_3D_CONTROLLER)


def die_paths(root, disabled=()):
    return [
        path
        for path in pci_devices(root)
        if is_a_die(path) and os.path.basename(path) not in disabled
    ]


def board_path(die):
    """The upstream port of the switch that the die shares with its sibling.

    In sysfs a device lies in the directory of its bridge: …/upstream port/downstream
    port/die. Exactly two levels count, as the board may sit behind another such
    switch on the mainboard.
    """
    downstream = os.path.dirname(os.path.realpath(die))
    upstream = os.path.dirname(downstream)
    return upstream if is_a(downstream, SWITCH) and is_a(upstream, SWITCH) else die


def numbers(listed):
    """The numbers of a list as the kernel writes it, such as 0-1,3."""
    found = set()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def numa_node_of(die, with_memory):
    """The node that the die is at; -1 if none, or one without memory, which Docker would refuse."""
    try:
        node = int(read(die, "numa_node"))
    except ValueError:
        return -1
    return -1 if with_memory and node not in with_memory else node


def find_dies(root, disabled=()):
    with_memory = numbers(read(root, "sys/devices/system/node/has_memory"))
    return [
        {
            "pci_address": os.path.basename(path),
            "board": os.path.basename(board_path(path)),
            "numa_node": numa_node_of(path, with_memory),
            "local_cpulist": read(path, "local_cpulist"),
        }
        for path in die_paths(root, disabled)
    ]


def lacks_memory(die):
    """Whether the registers or the 16 GB window have no address.

    The file has a line of start, end and flags for each region.
    """
    lines = read(die, "resource").splitlines()[:2]
    return any(int(line.split()[0], 16) == 0 for line in lines)


def number(text):
    """The number that a text such as `8.0 GT/s PCIe` begins with; null where it has none."""
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found.group()) if found else None


def link_of(path, is_board):
    link = {"address": os.path.basename(path), "board": is_board}
    for ours, name in (("width", "link_width"), ("speed", "link_speed")):
        link[ours] = number(read(path, "current_" + name))
        link["max_" + ours] = number(read(path, "max_" + name))
    return link


def redirects(bridge):
    """Whether access control services (ACS) send requests between devices below up to the root.

    They are the extended capability 0x000d; bits 2 and 3 of its control word redirect
    requests and completions. Only root may read that far.
    """
    try:
        with open(os.path.join(bridge, "config"), "rb") as config:
            space = config.read(4096)
    except OSError:
        return False
    offset, seen = 0x100, set()
    while 0x100 <= offset <= len(space) - 8 and offset not in seen:
        seen.add(offset)
        (header,) = struct.unpack_from("<I", space, offset)
        if header & 0xFFFF == 0x000D:
            (control,) = struct.unpack_from("<H", space, offset + 6)
            return bool(control & 0x0C)
        offset = header >> 20
    return False


def bridges_above(die):
    """The bridges between a die and the root, nearest first."""
    path = os.path.dirname(os.path.realpath(die))
    while read(path, "class").startswith("0x0604"):
        yield path
        path = os.path.dirname(path)


def look_at_pci(root, disabled=()):
    dies = die_paths(root, disabled)
    boards = sorted(
        {os.path.realpath(board_path(die)) for die in dies} - {*map(os.path.realpath, dies)}
    )
    return {
        "without_memory": [os.path.basename(die) for die in dies if lacks_memory(die)],
        "links": [link_of(board, True) for board in boards] + [link_of(die, False) for die in dies],
        "peers": {
            os.path.basename(die): {
                "iommu": read(die, "iommu_group/type"),
                "acs": [os.path.basename(path) for path in bridges_above(die) if redirects(path)],
            }
            for die in dies
        },
        "others": [
            {
                "pci_address": os.path.basename(path),
                "id": read(path, "vendor")[2:] + ":" + read(path, "device")[2:],
            }
            for path in pci_devices(root)
            if not is_a_die(path)
            and read(path, "vendor") == NVIDIA
            and read(path, "class").startswith((CLASS_3D_CONTROLLER, CLASS_VGA_CONTROLLER))
        ],
        "no_dies": [
            os.path.basename(path)
            for path in pci_devices(root)
            if os.path.basename(path) in disabled and not is_a_die(path)
        ],
        "taken_off": re.findall(r'^[^#\n]*KERNEL=="([^"]+)"', read(root, DISABLED_RULES), re.M),
    }


# --- Kernels and drivers ----------------------------------------------------


def installed_kernels(root):
    """Versions that can be booted or built for; not those of which a removal left some files."""
    modules = os.path.join(root, "lib/modules")
    versions = {
        path.rsplit("/vmlinuz-", 1)[1] for path in glob(os.path.join(root, "boot/vmlinuz-*"))
    }
    for path in glob(os.path.join(modules, "*")):
        if any(
            os.path.lexists(os.path.join(path, name)) for name in ("kernel", "vmlinuz", "build")
        ):
            versions.add(os.path.basename(path))
    # The copy for rescue that EL makes of a kernel takes no driver.
    return sorted(version for version in versions if not version.startswith("0-rescue"))


def header_packages(root, versions, seconds):
    """Which of these kernels' headers the package manager could install, by version.

    Null where its lists have not been fetched, so that it does not know.
    """
    if glob(os.path.join(root, "var/lib/apt/lists/*Packages*")):
        names = ["linux-headers-" + version for version in versions]
        listed = output_of(["apt-cache", *apt_options(root), "policy", *names], seconds)
        known = dict(re.findall(r"^(\S+):\n.*\n  Candidate: (.*)$", listed, re.M))
        return {v: known.get("linux-headers-" + v, "(none)") != "(none)" for v in versions}
    if shutil.which("dnf") and os.path.isdir(os.path.join(root, "etc/yum.repos.d")):
        # From its cache alone: fetching the lists takes longer than a probe may.
        query = ["dnf", "--quiet", "--cacheonly", "repoquery", "kernel-devel"]
        form = ["--queryformat", "%{version}-%{release}.%{arch}\n"]
        listed = output_of(query + form, seconds).split()
        if listed:
            return {version: version in listed for version in versions}
    return dict.fromkeys(versions)


def is_realtime(root, version):
    """Whether a kernel is PREEMPT_RT, by its configuration."""
    places = ("boot/config-" + version, os.path.join("lib/modules", version, "config"))
    return any("\nCONFIG_PREEMPT_RT=y" in read(root, place) for place in places)


def look_at_kernels(root, seconds):
    versions = installed_kernels(root)
    headers = {
        v: os.path.exists(os.path.join(root, "lib/modules", v, "build/Makefile")) for v in versions
    }
    missing = [version for version in versions if not headers[version]]
    available = header_packages(root, missing, seconds) if missing else {}
    return [
        {
            "version": version,
            "headers": headers[version],
            "headers_available": available.get(version),
            "realtime": is_realtime(root, version),
        }
        for version in versions
    ]


def secure_boot(root):
    """Whether it is on; None without EFI. The variable is four bytes of attributes and a 0 or 1."""
    for path in glob(os.path.join(root, "sys/firmware/efi/efivars/SecureBoot-*")):
        with open(path, "rb") as variable:
            return variable.read()[-1:] == b"\x01"
    return None


def look_at_system(root, disabled=()):
    return {
        "realtime": read(root, "sys/kernel/realtime") == "1",
        "secure_boot": secure_boot(root),
        "nouveau": [
            os.path.basename(die)
            for die in die_paths(root, disabled)
            if os.path.basename(os.path.realpath(os.path.join(die, "driver"))) == "nouveau"
        ],
        "nvidia": read(root, "sys/module/nvidia/version"),
    }


def installed_packages(root, seconds):
    """Name and version of every package, from dpkg's status or rpm."""
    for paragraph in read(root, "var/lib/dpkg/status").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.M))
        # Removed packages stay listed for their configuration.
        if fields.get("Status", "").endswith((" config-files", " not-installed")):
            continue
        if "Package" in fields and "Version" in fields:
            yield fields["Package"], fields["Version"]
    if glob(os.path.join(root, "usr/lib/sysimage/rpm/*")) or glob(
        os.path.join(root, "var/lib/rpm/*")
    ):
        query = [
            "rpm",
            "--root",
            os.path.abspath(root),
            "-qa",
            "--queryformat",
            "%{NAME} %{VERSION}\n",
        ]
        for line in output_of(query, seconds).splitlines():
            yield tuple(line.split(" ", 1))


def look_at_packages(root, seconds):
    parts = [
        {"name": name, "version": version}
        for name, version in sorted(set(installed_packages(root, seconds)))
        if DRIVER_PARTS.match(name)
    ]
    if not parts:
        # NVIDIA's runfile tells no package manager, but its library bears the version.
        for directory in ("usr/lib/x86_64-linux-gnu", "usr/lib64"):
            for path in sorted(glob(os.path.join(root, directory, "libcuda.so.*.*"))):
                parts.append({"name": path, "version": path.rsplit("libcuda.so.", 1)[1]})
    return parts


def look_at_docker(root, seconds):
    return sorted(
        {name for name, _ in installed_packages(root, seconds) if FOREIGN_DOCKER.match(name)}
    )


def look_at_toolkit_sources(root):
    """The files, and the URI that each names first."""
    found = []
    for path in sorted(glob(os.path.join(root, "etc/apt/sources.list.d/*"))):
        if not path.endswith((".list", ".sources")):
            continue
        for stanza in read(path).split("\n\n" if path.endswith(".sources") else "\n"):
            uri = re.search(r"^[^#\n]*?\b(https?://\S*/libnvidia-container/\S*)", stanza, re.M)
            if uri and not re.search(r"^Enabled: *no$", stanza, re.M | re.I):
                file = "/" + os.path.relpath(path, root)
                found.append({"file": file, "uri": uri[1].replace("$(ARCH)", "amd64").rstrip("/")})
    return found


# --- Clock, repositories, space ---------------------------------------------


def may_set_the_clock(root):
    capabilities = re.search(r"^CapBnd:\s*([0-9a-f]+)$", read(root, "proc/self/status"), re.M)
    return bool(capabilities and int(capabilities.group(1), 16) >> CAP_SYS_TIME & 1)


def kernel_clock_is_synchronised():
    """What timedatectl calls NTPSynchronized, by the same call, which works without D-Bus."""
    timex = (ctypes.c_uint * 128)()  # struct timex: modes, offset, freq, maxerror, esterror, status
    ctypes.CDLL(None).adjtimex(timex)
    status_at = ctypes.sizeof(ctypes.c_long) * 5 // ctypes.sizeof(ctypes.c_uint)
    return not timex[status_at] & STA_UNSYNC


def newest_release(root):
    """When the newest of its package lists was made, in seconds since 1970; 0 without any."""
    newest = 0
    for path in glob(os.path.join(root, "var/lib/apt/lists/*Release")):
        date = re.search(r"^Date: (.*)$", read(path), re.M)
        parsed = parsedate_tz(date.group(1)) if date else None
        newest = max(newest, mktime_tz(parsed) if parsed else 0)
    return newest


def look_at_clock(root, now, started):
    return {
        "now": int(started),
        "ahead": round(started - now),
        # A container's clock is its machine's.
        "synchronised": kernel_clock_is_synchronised() if may_set_the_clock(root) else None,
        "newest_release": int(newest_release(root)),
    }


def apt_sources(root, seconds):
    """The directories of the Release files of the host's repositories, in whichever format."""
    # --no-release-info: those of which there are no lists yet too.
    command = ["apt-get", *apt_options(root), "indextargets", "--no-release-info"]
    command += ["--format", "$(BASE_URI)", "Created-By: Packages"]
    return sorted({line.rstrip("/.") for line in output_of(command, seconds).splitlines()})


def try_apt(root, repository, seconds):
    """Fetches the Release file as apt will: its proxies, certificates and passwords included."""
    helper = ["/usr/lib/apt/apt-helper", *apt_options(root)]
    for option in ("Retries=0", "http::Timeout=4", "https::Timeout=4"):
        helper += ["-o", "Acquire::" + option]
    with tempfile.TemporaryDirectory() as directory:
        for name in ("InRelease", "Release"):
            done = subprocess.run(
                [*helper, "download-file", repository + "/" + name, os.path.join(directory, name)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                env=dict(os.environ, LC_ALL="C.UTF-8"),
                check=False,
            )
            if not done.returncode:
                return ""
            errors = re.findall(r"^E: (.*)$", done.stderr.decode("utf-8", "replace"), re.M)
            # apt names the URL first, which the caller knows.
            reason = (
                re.sub(r"^Failed to fetch \S+\s+", "", errors[0]) if errors else "apt-helper failed"
            )
            if "404" not in reason:
                break
    return reason


def try_url(url, seconds):
    """Asks for a URL as get_url would, with the proxies of the environment."""
    try:
        open_url(url, method="HEAD", timeout=seconds)
    except HTTPError as error:
        # A server may know no HEAD; it answers, and that is what was asked.
        return "" if error.code in (405, 501) else "%s %s" % (error.code, error.reason)
    except Exception as error:
        return str(getattr(error, "reason", error))
    return ""


def look_at_repositories(root, apt_repositories, urls, seconds):
    tries = {}

    def attempt(url, function, *arguments):
        with suppress(subprocess.TimeoutExpired):  # told below
            tries[url] = function(*arguments)

    jobs = {
        url: (try_apt, root, url, seconds)
        for url in [*apt_sources(root, seconds), *apt_repositories]
    }
    jobs.update({url: (try_url, url, seconds) for url in urls})
    # The installer may leave its disc among the sources, and then apt-get update fails.
    discs = [
        {"url": url, "error": "it is a disc, and nobody is there to insert it"}
        for url in jobs
        if url.startswith("cdrom:")
    ]
    # What lies on the host itself is the business of who reads it.
    jobs = {url: job for url, job in jobs.items() if url.startswith(("http:", "https:"))}
    threads = [
        threading.Thread(target=attempt, args=(url, *job), daemon=True) for url, job in jobs.items()
    ]
    wait_for(threads, seconds)
    silence = "no answer within %d s" % seconds
    return discs + [{"url": url, "error": tries.get(url, silence)} for url in jobs]


def space_of(path):
    there = os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    filesystem = os.statvfs(there)
    return {
        "path": path,
        "exists": os.path.exists(path),
        "filesystem": os.stat(there).st_dev,
        "free_bytes": filesystem.f_bavail * filesystem.f_frsize,
    }


def wait_for(threads, seconds):
    """Starts threads and gives all of them together that long."""
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))


# --- All of it --------------------------------------------------------------


def run_probes(probes, seconds):
    """The probes' answers, and the reasons of those that gave none in time.

    Reading a file from a server that is gone never ends: so each probe has a thread
    that the process does not wait for.
    """
    answers, silent = {}, {}

    def run(name, function, arguments):
        try:
            answers[name] = function(*arguments)
        except Exception as error:
            silent[name] = "%s: %s" % (type(error).__name__, error)

    threads = [
        threading.Thread(target=run, args=(name, function, arguments), daemon=True)
        for name, (function, *arguments) in probes.items()
    ]
    wait_for(threads, seconds)
    answers, silent = dict(answers), dict(silent)
    for name in probes.keys() - answers.keys() - silent.keys():
        silent[name] = "no answer within %d s" % seconds
    return answers, silent


def look_at_host(given, started):
    """What the module returns, by its parameters."""
    root, seconds, disabled = given["root"], given["timeout"], given["disabled_dies"]
    probes = {
        "dies": (find_dies, root, disabled),
        "pci": (look_at_pci, root, disabled),
        "kernels": (look_at_kernels, root, seconds),
        "system": (look_at_system, root, disabled),
        "installed": (lambda: dict(installed_packages(root, seconds)),),
        "packages": (look_at_packages, root, seconds),
        "docker": (look_at_docker, root, seconds),
        "toolkit_sources": (look_at_toolkit_sources, root),
        "clock": (look_at_clock, root, given["now"], started),
        "space": (lambda paths: [space_of(path) for path in paths], given["space"]),
    }
    if given["repositories"]:
        more = given["apt_repositories"], given["urls"]
        probes["repositories"] = (look_at_repositories, root, *more, seconds)
    # Those with limits of their own say more than that there was no answer.
    answers, silent = run_probes(probes, seconds + 2)
    return dict(answers, silent=silent)


def main():
    started = time.time()
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/"},
            "disabled_dies": {"type": "list", "elements": "str", "default": []},
            "space": {"type": "list", "elements": "path", "default": []},
            "repositories": {"type": "bool", "default": True},
            "apt_repositories": {"type": "list", "elements": "str", "default": []},
            "urls": {"type": "list", "elements": "str", "default": []},
            "now": {"type": "float", "required": True},
            "timeout": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **look_at_host(module.params, started))


if __name__ == "__main__":
    main()
