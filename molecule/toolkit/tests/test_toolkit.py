"""What containers get, what takes it away from them, and what does not.

The kernel's answer to a process that opens a die tells: "No such device or address" means that it
may (there is no driver behind the node), "Operation not permitted" that it may not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scenario
from conftest import SERVER, Container, Server, converge

PACKAGES = [
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
]
NODES = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"]
MAY, MAY_NOT = "No such device or address", "Operation not permitted"
ABSENT = "No such file or directory"


def test_all_four_packages_are_held_at_one_version(server: Server) -> None:
    assert {server.packages()[name] for name in PACKAGES} == {"1.17.8-1"}
    assert sorted(server.run("apt-mark showhold").split()) == sorted(PACKAGES)


def test_they_come_from_the_mirror_that_the_inventory_names(server: Server) -> None:
    """Signed with its key, and not from anywhere else: as on a site without the internet."""
    source = server.run("cat /etc/apt/sources.list.d/nvidia-container-toolkit.sources")
    assert "URIs: file:/srv/mirror/libnvidia-container/stable/deb/amd64" in source
    assert "Signed-By: /etc/apt/keyrings/nvidia-container-toolkit.asc" in source
    key = server.host.file("/etc/apt/keyrings/nvidia-container-toolkit.asc")
    mirror = server.host.file("/srv/mirror/libnvidia-container/gpgkey")
    assert key.content_string == mirror.content_string
    assert "nvidia.github.io" not in server.run("cat /etc/apt/sources.list.d/*")


def test_docker_leaves_cgroups_to_systemd_as_on_a_real_server(server: Server) -> None:
    """Without this the tests of daemon-reload below would prove nothing."""
    assert server.run("docker info --format {{.CgroupDriver}}") == "systemd"


@pytest.mark.parametrize("own", [0, 1])
def test_a_container_has_its_die_and_keeps_it(
    server: Server, container: Container, own: int
) -> None:
    container.start(server.uuids[own])
    for _ in range(2):
        assert {node: container.opens(node) for node in (f"nvidia{own}", *NODES)} == dict.fromkeys(
            (f"nvidia{own}", *NODES), MAY
        )
        assert container.opens(f"nvidia{1 - own}") == ABSENT
        server.run("systemctl daemon-reload")
    seen = server.run(f"docker exec {container.name} cat /proc/mounts")
    assert " /usr/bin/nvidia-smi " in seen


def test_without_links_in_dev_char_it_would_lose_it(server: Server, container: Container) -> None:
    """Negative control of the links that the unit makes, with Debian 12's runc. On cgroup v2 the
    container would not even have it before."""
    server.run("rm -r /dev/char")
    try:
        container.start(server.uuids[0])
        server.run("systemctl daemon-reload")
        assert container.opens("nvidia0") == MAY_NOT
    finally:
        server.run("systemctl restart k80-nvidia-cdi.service")


def test_in_the_legacy_mode_it_would_lose_it(server: Server, container: Container) -> None:
    """Negative control of CDI mode. The setting counts for the next container, with no restart."""
    if not server.host.file("/sys/fs/cgroup/devices").exists:
        pytest.skip("the emulated toolkit has the legacy mode for cgroup v1 only")
    mode = "nvidia-ctk config --in-place --set nvidia-container-runtime.mode="
    server.run(f"{mode}legacy")
    try:
        container.start(server.uuids[0])
        assert container.opens("nvidia0") == MAY
        assert container.opens("nvidia1") == ABSENT
        server.run("systemctl daemon-reload")
        assert container.opens("nvidia0") == MAY_NOT
    finally:
        server.run(f"{mode}cdi")


def test_a_die_that_is_not_there_is_refused(server: Server, container: Container) -> None:
    with pytest.raises(AssertionError, match=r"unresolvable CDI devices nvidia\.com/gpu=GPU-x"):
        container.start("GPU-x")


def test_a_driver_that_moves_its_libraries_is_followed(server: Server) -> None:
    """As the change from Debian's packages to NVIDIA's installer does."""
    libraries = "/usr/lib/x86_64-linux-gnu"
    old, new = f"{libraries}/nvidia/libcuda.so.470.256.02", f"{libraries}/libcuda.so.470.256.02"
    server.run(f"install -D /dev/null {old}")
    server.run("ldconfig")
    server.wait_for(f"grep -q 'hostPath: {old}' /run/cdi/nvidia.yaml")
    server.run(f"mv {old} {new}")
    server.run("ldconfig")
    server.wait_for(f"grep -q 'hostPath: {new}' /run/cdi/nvidia.yaml")
    assert old not in server.specification()
    server.run(f"rm {new}")
    server.run("ldconfig")
    server.wait_for("! grep -q libcuda /run/cdi/nvidia.yaml")


def test_after_a_boot_the_specification_is_fresh_and_before_docker(
    server: Server, container: Container
) -> None:
    """A board was replaced while the server was off, and one container names the new die."""
    old = server.uuids[1]
    new = f"{old[:-4]}{int(old[-4:], 16) ^ 0xFFFF:04x}"
    container.start(old, "--restart", "always")
    server.run(f"echo {new} > /etc/k80-emulator/dies/0000:06:00.0/uuid")
    server.reboot()
    assert f"name: {new}" in server.specification()
    assert old not in server.specification()
    # Docker tried to start the container again, and was told that its die is gone.
    assert "unresolvable CDI devices" in server.run(
        f"docker inspect --format {{{{.State.Error}}}} {container.name}"
    )
    done, started = (
        int(server.run(f"systemctl show --value --property {stamp}TimestampMonotonic {unit}"))
        for unit, stamp in (("k80-nvidia-cdi", "ExecMainExit"), ("docker", "ExecMainStart"))
    )
    assert 0 < done <= started
    assert {"195:0", "195:1", "195:255"} <= set(server.run("ls /dev/char").split())


def test_a_die_that_is_lost_takes_no_other_with_it(server: Server, container: Container) -> None:
    """nvidia-ctk describes all dies or none, and a boot has taken away what it wrote."""
    first, before = server.uuids[0], server.specification()
    lost = "/etc/k80-emulator/dies/0000:06:00.0/lost"
    server.run(f"touch {lost} && rm -r /run/cdi /dev/char")
    try:
        server.run("systemctl restart k80-nvidia-cdi.service")
        assert server.specification() == before
        said = server.run("journalctl --unit k80-nvidia-cdi --output cat --lines 5")
        assert "nvidia-ctk fails, so that the specification of 20" in said
        container.start(first)
        for _ in range(2):
            assert container.opens("nvidia0") == MAY
            server.run("systemctl daemon-reload")
    finally:
        server.run(f"rm {lost} && systemctl restart k80-nvidia-cdi.service")


def test_a_die_that_is_left_out_is_off_the_bus(server: Server, tmp_path: Path) -> None:
    """At once, where no driver has it; and after every boot."""
    include = {"name": "nvidia_driver", "tasks_from": "disabled"}
    tasks = [{"ansible.builtin.include_role": include}]
    playbook = tmp_path / "play.yml"
    playbook.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    die = "0000:06:00.0"
    there, driver = f"/sys/bus/pci/devices/{die}", f"/etc/k80-emulator/dies/{die}/driver"
    boot = "systemctl restart k80-emulator"

    # A driver has it, which is asked for nothing.
    assert scenario.play(playbook, nvidia_driver_disabled_dies=[die])[0] == 0
    assert server.host.file(there).exists

    server.run(f": > {driver} && rm /etc/udev/rules.d/40-k80-disabled-dies.rules && {boot}")
    try:
        status, output = scenario.play(playbook, nvidia_driver_disabled_dies=[die])
        assert status == 0, output
        server.wait_for(f"! [ -e {there} ] && [ $(nvidia-smi -L | wc -l) = 1 ]")
    finally:
        server.run(f"rm -f {driver} /run/k80-emulator/removed/* && {boot}")
    assert not server.host.file(there).exists, "the rule takes it off"
    assert len(server.uuids) == 1

    # Nothing misses it.
    status, output = converge(nvidia_driver_disabled_dies=[die])
    assert status == 0, output
    assert "path: /dev/nvidia1" not in server.specification()

    server.run("rm /etc/udev/rules.d/40-k80-disabled-dies.rules")
    server.run(f"{boot} && systemctl restart k80-nvidia-cdi.service")
    assert server.host.file(there).exists
    assert len(server.uuids) == 2


def test_another_version_takes_all_four_packages_and_nothing_else(
    server: Server, container: Container
) -> None:
    """Down and up again, under a container that runs; down while the driver lacks a die."""
    container.start(server.uuids[0])
    pid = server.run(f"docker inspect --format {{{{.State.Pid}}}} {container.name}")
    before = server.packages()

    server.run("rm /dev/nvidia1")
    try:
        status, output = converge(nvidia_container_toolkit_version="1.17.7-1")
    finally:
        server.run("systemctl restart k80-emulator")
    assert status != 0
    assert f"No container of {SERVER} can have all its dies" in output
    assert "the driver does not show the die at 0000:06:00.0" in output
    assert server.packages() == before | dict.fromkeys(PACKAGES, "1.17.7-1")
    assert "path: /dev/nvidia1" not in server.specification()

    # The specification is stale now; the next run sees it.
    status, output = converge()
    assert status == 0, output
    assert server.packages() == before | dict.fromkeys(PACKAGES, "1.17.8-1")
    assert sorted(server.run("apt-mark showhold").split()) == sorted(PACKAGES)
    assert 'mode = "cdi"' in server.run("cat /etc/nvidia-container-runtime/config.toml")
    assert "path: /dev/nvidia1" in server.specification()

    assert server.run(f"docker inspect --format {{{{.State.Pid}}}} {container.name}") == pid
    assert container.opens("nvidia0") == MAY


def test_removal(server: Server, container: Container) -> None:
    """Refused under a container, which only its runtime can stop; then it is as before."""
    container.start(server.uuids[0])
    status, output = converge(nvidia_container_toolkit_state="absent")
    assert status != 0
    assert f"still needed to stop the containers {container.name}" in output
    server.run(f"docker rm --force {container.name}")

    status, output = converge(nvidia_container_toolkit_state="absent")
    assert status == 0, output
    assert not set(PACKAGES) & server.packages().keys()
    assert server.run("apt-mark showhold") == ""
    left = server.host.run(
        "ls -d /run/cdi/nvidia.yaml /etc/nvidia-container-runtime"
        " /var/lib/k80-nvidia-cdi /usr/local/lib/vllm-k80/nvidia-cdi"
        " /etc/systemd/system/k80-nvidia-cdi*"
        " /etc/systemd/system/multi-user.target.wants/k80-nvidia-cdi*"
        " /etc/apt/sources.list.d/nvidia* /etc/apt/keyrings/nvidia*"
    )
    assert left.stdout == ""
    assert server.run("systemctl is-system-running") == "running"
