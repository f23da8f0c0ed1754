"""What docs/quickstart.md has its readers type for their own servers, until these are needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.slow
def test_keys_are_made_encrypted_and_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text()
    block = re.search(r"^2\. Make keys.*?\n\n(.*?)\n\n3\. ", page, re.M | re.S)
    assert block
    shutil.copytree(ROOT / "inventories" / "example", tmp_path / "inventories" / "mine")
    (tmp_path / "password").write_text("correct horse")
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        # In the place of who types it.
        "ANSIBLE_VAULT_PASSWORD_FILE": str(tmp_path / "password"),
    }
    commands = textwrap.dedent(block[1])
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=environment, check=True)
    vault = tmp_path / "inventories/mine/group_vars/all/vault.yml"
    assert vault.read_text().startswith("$ANSIBLE_VAULT;")

    shown = subprocess.run(
        ["ansible-inventory", "-i", "inventories/mine", "--list"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    hosts = json.loads(shown)["_meta"]["hostvars"]
    keys = [hosts["gateway1"][name] for name in ("vault_key_of_instances", "vault_key_of_anna")]
    assert all(re.fullmatch("[0-9a-f]{48}", key) for key in keys)
    assert keys[0] != keys[1]
