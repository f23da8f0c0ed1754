"""With every test that fails on an emulated server comes what that server has to say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import testinfra


def reporting(server: str, commands: Mapping[str, str]) -> Callable[[], Iterator[Any]]:
    """A hook for a conftest.py: `pytest_runtest_makereport = reporting(SERVER, {…})`."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport() -> Iterator[Any]:
        report = yield
        if report.failed:
            host = testinfra.get_host(f"docker://{server}")
            for title, command in commands.items():
                result = host.run(command)
                report.sections.append((f"{title} of {server}", result.stdout + result.stderr))
        return report

    return pytest_runtest_makereport
