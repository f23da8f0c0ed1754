"""Where the keys are: in files that root alone may read, and nowhere that others look."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import HOST_VARS, Server
from scenario import ROOT

VARIABLES = yaml.safe_load(HOST_VARS.read_text())
INSTANCE_KEY = VARIABLES["vllm_instance_api_key"]
USERS_KEY = VARIABLES["gateway_api_keys"][0]["key"]


@pytest.fixture(params=[INSTANCE_KEY, USERS_KEY], ids=["instances' key", "user's key"])
def key(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def files_with(server: Server, key: str, user: str, *places: str) -> set[str]:
    """The small files in which a user of the server finds a key, below these places."""
    find = f"find {' '.join(places)} -xdev -type f -size -1024k -exec grep -lsF {key} {{}} +"
    return set(server.run(f"runuser -u {user} -- {find} 2> /dev/null || true").split())


def test_no_log_has_it(server: Server, key: str) -> None:
    # Of all boots and units, Ansible's modules among them, which log their parameters.
    server.run("journalctl --sync")
    assert int(server.run("journalctl --no-pager | wc -l")) > 100
    assert server.run(f"journalctl --no-pager --output=cat | grep -cF {key} || true") == "0"


def test_no_command_line_and_no_unit_has_it(server: Server, key: str) -> None:
    seen = server.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "vllm" in seen
    assert key not in seen
    units = server.run("systemctl show --all '*.service'; systemctl cat 'vllm-k80-*' haproxy")
    assert "ExecStart=/usr/bin/docker run" in units
    assert key not in units


def test_no_image_has_it(server: Server, key: str) -> None:
    """Images are built before there is a key, of the sources alone; and nothing else runs them."""
    images = server.run("docker image ls --quiet --no-trunc").split()
    assert images
    for image in set(images):
        told = server.run(f"docker image inspect {image}; docker history --no-trunc {image}")
        assert key not in told
    # What was written since, where a container may write.
    for instance in server.instances:
        root = f"/proc/{server.container_pid(instance)}/root"
        places = [f"{root}{path}" for path in ("/tmp", "/var/lib/vllm-k80", "/var/cache/vllm-k80")]
        assert files_with(server, key, "root", *places) == set()


def test_no_layer_of_an_image_or_container_has_it(server: Server) -> None:
    """All files of all of them, large ones too, the build's own among them."""
    layers = "find /var/lib/docker/overlay2/*/diff -xdev -type f"
    assert "/readiness.py" in server.run(f"{layers} -name readiness.py")
    found = server.run(f"{layers} -exec grep -lsF -e {INSTANCE_KEY} -e {USERS_KEY} {{}} + || true")
    assert found == ""


def test_it_is_in_files_for_root_alone(server: Server) -> None:
    places = "/etc /home /opt /root /run /srv /tmp /usr/local /var"
    found = files_with(server, INSTANCE_KEY, "root", *places.split())
    names = [instance.name for instance in server.instances]
    configuration = {"/etc/haproxy/haproxy.cfg"} | {f"/etc/vllm-k80/{name}.env" for name in names}
    assert configuration <= found
    # Docker and containerd keep the environment of what runs, as `docker inspect` shows it to root;
    # the next test sees that nobody else gets there.
    theirs = re.compile(r"/(var/lib|run)/(docker|containerd)/")
    for path in found:
        if theirs.match(path):
            continue
        assert path.startswith(("/etc/haproxy/", "/etc/vllm-k80/")), path
        assert server.run(f"stat --format '%a %U' {path}") == "600 root", path
    # Of users' keys there are only hashes, which nobody else sees either.
    assert server.run("stat --format '%a %U' /etc/haproxy/vllm-k80-keys.map") == "600 root"
    assert files_with(server, USERS_KEY, "root", *places.split()) == set()


def test_another_user_of_the_server_finds_it_nowhere(server: Server) -> None:
    # A mount of its own is no part of what is searched above it.
    places = ("/etc", "/run", "/tmp", "/var", "/usr/local", "/var/lib/docker")
    assert files_with(server, INSTANCE_KEY, "nobody", *places) == set()
    # The search does find what may be read.
    server.run(f"install -m 644 /etc/vllm-k80/{server.instances[0].name}.env /var/tmp/readable")
    try:
        assert files_with(server, INSTANCE_KEY, "nobody", *places) == {"/var/tmp/readable"}
    finally:
        server.run("rm /var/tmp/readable")
    result = server.host.run(
        "runuser -u nobody -- sh -c 'docker ps || cat /proc/%s/environ'",
        str(server.container_pid(server.instances[0])),
    )
    assert result.rc != 0
    assert INSTANCE_KEY not in result.stdout


def test_no_fact_has_it(key: str) -> None:
    """What Ansible knows of the server by asking it: facts of its own, too."""
    setup = [Path(sys.executable).with_name("ansible"), "all", "--module-name=setup"]
    inventory = f"--inventory={os.environ['MOLECULE_INVENTORY_FILE']}"
    done = subprocess.run([*setup, inventory], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ansible_all_ipv4_addresses" in done.stdout
    assert key not in done.stdout + done.stderr


def test_what_the_doctor_tells_has_none(server: Server) -> None:
    told = server.run("cat /etc/vllm-k80/doctor.json; k80-doctor --json; k80-instance list --json")
    assert json.loads(server.run("cat /etc/vllm-k80/doctor.json"))["instances"]
    assert INSTANCE_KEY not in told
    assert USERS_KEY not in told
