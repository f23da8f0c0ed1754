"""Debian's Chromium, without a window."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def document(url: str, *options: str) -> str:
    """A page as the browser has it when all of it has been loaded."""
    found = shutil.which("chromium")
    if not found:
        pytest.fail("There is no browser to test with: tools/test-packages", pytrace=False)
    # Tests run as root, where its sandbox does not; what they show it is their own.
    basics = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    done = subprocess.run(
        [found, *basics, *options, "--dump-dom", url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
