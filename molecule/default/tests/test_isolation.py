"""What an instance may do, as the kernel enforces it rather than as the configuration claims."""

from __future__ import annotations

import json

import pytest
from conftest import Instance, Server

OPEN = "open({path!r}, 'rb')"


@pytest.fixture(params=[0, 1], ids=["die0", "die1"])
def instance(request: pytest.FixtureRequest, server: Server) -> Instance:
    return server.instances[request.param]


def test_there_is_one_instance_for_each_die(server: Server) -> None:
    assert len(server.instances) == 2
    owners = server.owners()
    assert set(owners) == {instance.uuid for instance in server.instances}
    assert [len(containers) for containers in owners.values()] == [1, 1]
    for instance in server.instances:
        shown = server.in_container(
            instance, "import subprocess; print(subprocess.getoutput('nvidia-smi -L'))"
        )
        assert shown.splitlines() == [f"GPU 0: Tesla K80 (UUID: {instance.uuid})"]


def test_docker_runs_with_its_options(server: Server) -> None:
    info = json.loads(server.run("docker info --format '{{json .}}'"))
    assert (info["LoggingDriver"], info["LiveRestoreEnabled"]) == ("json-file", False)
    assert "nvidia" in info["Runtimes"]
    options = json.loads(server.run("cat /etc/docker/daemon.json"))
    assert options["log-opts"] == {"max-size": "10m", "max-file": "3"}
    # Without it Docker starts no container where the kernel has AppArmor.
    assert "AppArmor parser" in server.run("apparmor_parser --version")


def test_the_image_is_as_small_as_promised(server: Server) -> None:
    """Also the layer of our own package, which is all that a change of it brings."""
    container = server.instances[0].unit
    image = server.run(f"docker inspect --format {{{{.Image}}}} {container}")
    assert int(server.run(f"docker image inspect --format {{{{.Size}}}} {image}")) < 5e9
    layers = server.run(f"docker history --human=false --format {{{{.Size}}}} {image}").split()
    assert 0 < next(int(size) for size in layers if size != "0") < 200e6


def test_the_container_has_its_own_die_and_no_other(server: Server, instance: Instance) -> None:
    own = server.instances.index(instance)
    # ENXIO: the open passed the device cgroup, and there is no driver behind the node.
    assert "No such device or address" in server.in_container(
        instance, OPEN.format(path=f"/dev/nvidia{own}")
    )
    assert "No such file or directory" in server.in_container(
        instance, OPEN.format(path=f"/dev/nvidia{1 - own}")
    )


def test_the_kernel_refuses_the_other_die(server: Server, instance: Instance) -> None:
    """A shell on the server that joins the instance's device cgroup meets what would meet a
    process in there that got hold of the other die's node."""
    own = server.instances.index(instance)
    script = f"""
        set -e
        pid={server.container_pid(instance)}
        path=$(sed -nE 's/^[0-9]+:devices://p; s/^0:://p' /proc/$pid/cgroup | head -n1)
        for root in /sys/fs/cgroup/devices /sys/fs/cgroup; do
            procs=$root$path/cgroup.procs
            if [ -e "$procs" ]; then echo $$ > "$procs"; break; fi
        done
        for node in nvidia{own} nvidia{1 - own}; do
            python3 -c "open('/dev/$node', 'rb')" 2>&1 | tail -n1
        done
    """
    own_die, other_die = server.host.run("bash -c %s", script).stdout.splitlines()
    assert "No such device or address" in own_die
    assert "Operation not permitted" in other_die


def test_the_process_is_confined(server: Server, instance: Instance) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in server.in_container(
            instance, "print(open('/proc/1/status').read())"
        ).splitlines()
    )
    assert int(status["CapEff"], 16) == 0
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Uid"].split() == ["10037"] * 4


@pytest.mark.parametrize("path", ["/x", "/etc/x", "/usr/x", "/models/x"])
def test_the_file_system_refuses_writes(server: Server, instance: Instance, path: str) -> None:
    told = server.in_container(instance, f"open({path!r}, 'w')")
    assert "Read-only file system" in told or "Permission denied" in told


def test_the_root_is_mounted_read_only(server: Server, instance: Instance) -> None:
    mounts = server.in_container(instance, "print(open('/proc/mounts').read())").splitlines()
    options = {line.split()[1]: line.split()[3].split(",") for line in mounts}
    assert "ro" in options["/"]
    assert [path for path in options if path.startswith("/models/") and "ro" in options[path]]


def test_secrets_are_readable_by_root_alone(server: Server, instance: Instance) -> None:
    file = server.host.file(f"/etc/vllm-k80/{instance.name}.env")
    assert (file.user, file.group, file.mode) == ("root", "root", 0o600)
    # Nor do they show in what any user may read.
    command_lines = server.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "molecule-only-instance-key-0001" not in command_lines
    unit = server.run(f"systemctl cat {instance.unit}")
    assert "molecule-only-instance-key-0001" not in unit


def test_it_says_what_it_computes_on(server: Server, instance: Instance) -> None:
    info = json.loads(server.run(f"docker exec {instance.unit} vllm-k80 info --json"))
    assert info["die"] == instance.uuid
    assert info["versions"]["torch"].startswith("2.0.1")
    assert info["kernels"].endswith(".fatbin")
    assert (info["devices"], info["operators_run_on"]) == ([], "CPU, by their references")
    # In the journal too: once, in one line, at each start.
    run = server.run(f"systemctl show --property InvocationID --value {instance.unit}")
    said = server.run(f"journalctl _SYSTEMD_INVOCATION_ID={run} --output cat")
    assert said.count("No CUDA device: the reference operators run on the CPU.") == 1


def test_limits_are_set(server: Server, instance: Instance) -> None:
    limits = server.run(
        "docker inspect --format "
        "'{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}} {{.HostConfig.CpusetMems}}"
        " {{.HostConfig.CpusetCpus}}' "
        f"{instance.unit}"
    ).split()
    assert int(limits[0]) > 0
    assert int(limits[1]) > 0
    node, cpus = limits[2:]
    assert node == "0"
    assert cpus == server.run("cat /sys/bus/pci/devices/0000:05:00.0/local_cpulist")
    assert server.in_container(
        instance, "import os; print(os.statvfs('/tmp').f_blocks * os.statvfs('/tmp').f_frsize)"
    ) == str(2 << 30)
