"""Installed from a mirror on the server's own disk, held, upgraded and removed, in this order."""

from __future__ import annotations

import re

import pytest
import scenario
from conftest import SERVERS, VERSION, Server

WITH_PACKAGES = [server for server in SERVERS if server.packages]
packages = pytest.mark.parametrize(
    "server", WITH_PACKAGES, ids=[server.name for server in WITH_PACKAGES]
)


def has_the_module(server: Server, version: str) -> None:
    """For every kernel that has headers here: Debian's, on all of these servers."""
    kernels = server.run("ls /lib/modules").split()
    assert kernels
    status = server.run("dkms status").splitlines()
    assert status == [
        f"{server.dkms_name}/{version}, {kernel}, x86_64: installed" for kernel in kernels
    ]
    for kernel in kernels:
        found = server.run(f"modinfo -k {kernel} -F version {server.module}")
        assert found == version


# --- The older version, which the inventory names -----------------------------


def test_there_is_no_way_out(server: Server) -> None:
    """So that all that is here came from the mirror."""
    up = server.run("ip -brief link show up").splitlines()
    assert [line.split()[0] for line in up] == ["lo"]
    listed = server.run(
        "grep -rhoE '(file|http|https|cdrom):[^ ]*' /etc/apt/sources.list* /etc/yum.repos.d || true"
    )
    assert listed
    for source in listed.split():
        assert source.startswith(("file:/srv/mirror/", "file:///srv/mirror/"))


@packages
def test_all_packages_have_the_pinned_version(server: Server) -> None:
    installed = server.installed()
    assert {name: installed.get(name) for name in server.packages} == dict.fromkeys(
        server.packages, server.older
    )
    assert "nvidia-driver" not in installed, "what draws on a screen is left out"


def test_dkms_has_built_the_module(server: Server) -> None:
    has_the_module(server, VERSION if server.packages else server.older)


@packages
def test_an_upgrade_by_hand_keeps_the_driver(server: Server) -> None:
    """Though the mirror has a newer one."""
    if server.package_manager == "dnf":
        offered = server.run("dnf --quiet repoquery --disableplugin=versionlock --upgrades")
        upgraded = server.host.run("dnf --assumeno upgrade").stdout.split()
    else:
        offered = server.run(f"apt-cache madison {server.packages[0]}")
        assert set(server.packages) <= set(server.run("apt-mark showhold").split())
        simulated = server.run("apt-get --simulate dist-upgrade").splitlines()
        upgraded = [line.split()[1] for line in simulated if line.startswith("Inst ")]
    assert server.newer in offered
    assert not set(server.packages) & set(upgraded)


def test_components_are_added_where_they_are_missing() -> None:
    source = "/etc/apt/sources.list.d/k80-components.sources"
    debian, *ubuntus = (server.host.file(source) for server in SERVERS[:3])
    assert "Suites: bullseye\nComponents: contrib non-free\n" in debian.content_string
    # Sources of one repository that name different keys are refused by apt.
    assert "Signed-By: /srv/mirror/key.asc\n" in debian.content_string
    assert not any(ubuntu.exists for ubuntu in ubuntus)


@packages
def test_automatic_updates_leave_the_driver_alone(server: Server) -> None:
    if server.package_manager == "dnf":
        kept = server.run("sed -n 's/^excludepkgs = //p' /etc/dnf/automatic.conf").split(",")
        assert {"nvidia*", "libnvidia*", "cuda*", "kernel*"} <= set(kept)
    else:
        assert "^nvidia" in server.run("apt-config dump Unattended-Upgrade::Package-Blacklist")


def test_nouveau_is_kept_out_and_the_dies_are_set_up_at_boot(server: Server) -> None:
    assert "blacklist nouveau" in server.run("cat /etc/modprobe.d/k80-nouveau.conf")
    for unit in ("k80-nvidia-uvm", "k80-nvidia-settings"):
        shown = server.run(f"systemctl show --property=ActiveState,UnitFileState {unit}")
        assert shown.splitlines() == ["ActiveState=active", "UnitFileState=enabled"]


def test_the_installers_driver_gets_the_unit_that_packages_bring() -> None:
    unit = SERVERS[-1].run("systemctl cat nvidia-persistenced.service")
    assert "ExecStart=nvidia-persistenced" in unit


# --- The newer version --------------------------------------------------------


@pytest.mark.usefixtures("upgraded")
def test_an_upgrade_goes_to_the_version_that_the_inventory_names(server: Server) -> None:
    installed = server.installed()
    for name in server.packages:
        assert installed[name] == server.newer
    has_the_module(server, VERSION)


@pytest.mark.usefixtures("upgraded")
def test_a_kernel_of_el_is_tried_before_it_comes() -> None:
    el = next(server for server in SERVERS if server.package_manager == "dnf")
    options = ("playbooks/kernel-check.yml", f"--limit={el.name}")
    status, said = scenario.play(*options, nvidia_driver_version=VERSION)
    assert status != 0
    assert "does not build for kernel 6.12.0-55.el9.noarch of k80-matrix-el9" in said
    assert "dnf versionlock add kernel-core" in said
    assert "Error! Your kernel headers" in said, "DKMS's own reason"
    assert "kernel-devel-6.12" not in el.run("rpm -qa")

    tried = "5.14.0-570.el9.noarch"
    status, said = scenario.play(
        *options, nvidia_driver_version=VERSION, nvidia_driver_kernel=tried
    )
    assert status == 0, said
    assert f"Driver {VERSION} builds for kernel {tried} of {el.name}" in said
    assert f"nvidia/{VERSION}, {tried}, x86_64: built" in el.run("dkms status")


# Called so, and none of the driver's: the container toolkit's, and the kernel's own headers.
OTHERS = re.compile(r"nvidia-container|^/usr/src/linux-")


# --- Nothing ------------------------------------------------------------------


@pytest.mark.usefixtures("removed")
def test_a_removal_leaves_nothing(server: Server) -> None:
    assert server.installed() == {}
    assert server.modules() == []
    # Where DKMS came with the driver it has gone with it.
    assert server.host.run("dkms status").stdout == ""
    left = server.run("find /etc /usr/local/lib /usr/src /lib/systemd -iname '*nvidia*'")
    assert [path for path in left.splitlines() if not OTHERS.search(path)] == []
    assert not server.host.file("/etc/modprobe.d/k80-nouveau.conf").exists
    assert server.run("apt-mark showhold") == ""
    if server.package_manager == "dnf":
        assert "nvidia" not in server.run("cat /etc/dnf/plugins/versionlock.list")
        assert "nvidia" not in server.run("cat /etc/dnf/automatic.conf")


# --- What is refused ----------------------------------------------------------


def test_an_installer_with_another_checksum_is_not_run(refused: str) -> None:
    assert "NVIDIA's installer could not be had for k80-matrix-runfile" in refused
    assert "did not match" in refused
    assert "nvidia_driver_runfile_sha256" in refused
    server = SERVERS[-1]
    assert server.run("dkms status") == ""
    left = server.run("find /usr/src /usr/bin -name 'nvidia*'")
    assert [path for path in left.splitlines() if not OTHERS.search(path)] == []


def test_a_distribution_without_the_driver_is_refused(refused: str) -> None:
    assert "Driver 470 cannot be had from the packages of Debian 13" in refused
    assert "set nvidia_driver_source to runfile" in refused
    assert SERVERS[0].installed() == {}
