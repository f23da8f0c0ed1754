"""Servers of several distributions as far as the role can tell, each with the driver in it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import scenario
import testinfra
from testinfra.host import Host

VERSION = "470.256.02"


@dataclass(frozen=True)
class Server:
    """What a server has, and how its distribution names it."""

    name: str
    dkms_name: str
    module: str
    # What the driver is made of, and the versions that it begins with and is upgraded to.
    packages: tuple[str, ...]
    older: str
    newer: str

    @property
    def host(self) -> Host:
        return testinfra.get_host(f"docker://{self.name}")

    def run(self, command: str) -> str:
        return str(self.host.check_output(command))

    @property
    def package_manager(self) -> str:
        return "dnf" if self.name.endswith("el9") else "apt"

    def installed(self) -> dict[str, str]:
        """Versions of NVIDIA's packages, by name."""
        if self.package_manager == "dnf":
            listed = self.run("rpm -qa --queryformat '%{NAME} %{VERSION}-%{RELEASE}\\n' '*nvidia*'")
        else:
            query = "${db:Status-Abbrev} ${Package} ${Version}\\n"
            listed = self.run(f"dpkg-query --show --showformat '{query}' | sed -n 's/^.i  *//p'")
        return {
            name: version
            for name, version in (line.split() for line in listed.splitlines())
            if "nvidia" in name
        }

    def modules(self) -> list[str]:
        return self.run("find /lib/modules -name 'nvidia*.ko*'").splitlines()


TESLA = ("nvidia-tesla-470-kernel-dkms", "nvidia-tesla-470-smi", "libnvidia-tesla-470-ml1")
UBUNTU = ("nvidia-dkms-470-server", "nvidia-utils-470-server", "libnvidia-compute-470-server")
EL = ("kmod-nvidia-latest-dkms", "nvidia-driver-cuda", "nvidia-driver-cuda-libs")
SERVERS = [
    Server(
        "k80-matrix-debian11",
        "nvidia-tesla-470",
        "nvidia-tesla-470",
        (*TESLA, "libnvidia-tesla-470-cuda1", "libnvidia-tesla-470-cfg1"),
        f"{VERSION}-1~deb11u1",
        f"{VERSION}-1~deb11u2",
    ),
    *(
        Server(
            f"k80-matrix-ubuntu{release}",
            "nvidia-srv",
            "nvidia",
            (*UBUNTU, "nvidia-compute-utils-470-server", "libnvidia-cfg1-470-server"),
            f"{VERSION}-0ubuntu0.{release}.04.1",
            f"{VERSION}-0ubuntu0.{release}.04.2",
        )
        for release in (22, 24)
    ),
    Server(
        "k80-matrix-el9",
        "nvidia",
        "nvidia",
        (*EL, "nvidia-persistenced"),
        f"{VERSION}-1.el9",
        f"{VERSION}-2.el9",
    ),
    Server("k80-matrix-runfile", "nvidia", "nvidia", (), "470.223.02", VERSION),
]


def converge(limit: str = "all", **variables: object) -> tuple[int, str]:
    """Runs the roles again: exit status, and output in one line."""
    return scenario.play("molecule/driver/converge.yml", f"--limit={limit}", **variables)


@pytest.fixture(params=SERVERS, ids=[server.name for server in SERVERS])
def server(request: pytest.FixtureRequest) -> Server:
    return request.param


@pytest.fixture(scope="session")
def upgraded() -> None:
    """Every server with the newer version that its mirror has."""
    newer = {server.name: server.newer for server in SERVERS}
    running = "/etc/k80-emulator/dies/*/driver_version"
    SERVERS[-1].run(f"sh -c 'rm -f {running}'")  # the emulated nvidia-smi is that of 470.256.02
    status, said = converge(
        nvidia_driver_version=VERSION,
        newer=newer,
        nvidia_driver_package_version="{{ newer[inventory_hostname] }}",
    )
    assert status == 0, said[max(said.find("fatal:"), 0) :]


@pytest.fixture(scope="session")
def removed(upgraded: None) -> None:
    """Every server after the driver's removal."""
    status, said = converge(nvidia_driver_version=VERSION, nvidia_driver_state="absent")
    assert status == 0, said[max(said.find("fatal:"), 0) :]


@pytest.fixture(scope="session")
def refused(removed: None) -> str:
    """What is said to a server whose installer is another one, and to one that became Debian 13."""
    debian = SERVERS[0]
    debian.run("sed -i -e s/11/13/ -e s/bullseye/trixie/ /usr/lib/os-release /etc/debian_version")
    status, said = converge(
        f"{debian.name},{SERVERS[-1].name}",
        nvidia_driver_version=VERSION,
        nvidia_driver_runfile_sha256="0" * 64,
        preflight_distributions=["Debian 12", "Debian 13"],
    )
    assert status != 0
    return said
