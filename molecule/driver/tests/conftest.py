"""A server with a kernel of its own and the driver in it."""

from __future__ import annotations

import pytest
import testinfra
from scenario import reporting
from testinfra.host import Host

SERVER = "k80-driver"

pytest_runtest_makereport = reporting(
    SERVER,
    {
        "modules": "dkms status; find /lib/modules -name 'nvidia*.ko*'",
        "the last build": "tail -n 30 /var/lib/dkms/*/*/build/make.log",
        "journal": "journalctl --no-pager -u 'k80-nvidia-*' -u nvidia-persistenced | tail -n 50",
    },
)


@pytest.fixture(scope="session")
def host() -> Host:
    return testinfra.get_host(f"docker://{SERVER}")
