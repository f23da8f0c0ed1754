"""site.yml, the playbooks in playbooks/ and molecule see the same variables, so the same image.

Ansible reads the group_vars beside a playbook: those of the root serve site.yml, and a link to them
serves playbooks/.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO, EXAMPLE = ROOT / "inventories/demo", ROOT / "inventories/example"


def run(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def tag_in(done: subprocess.CompletedProcess) -> str:
    """The one image that a command names."""
    assert done.returncode == 0, done.stdout + done.stderr
    images = set(re.findall(r"vllm-k80:[0-9a-f]{16}\b", done.stdout))
    assert len(images) == 1, done.stdout
    return images.pop()


def image_tag_playbook(
    inventory: Path, playbook: Path, *options: str
) -> subprocess.CompletedProcess:
    return run("ansible-playbook", "-i", inventory, *options, playbook)


def as_a_playbook_in(directory: Path, inventory: Path) -> subprocess.CompletedProcess:
    """The same task with the variables that any playbook in a directory has."""
    role = "name=vllm_image tasks_from=reference.yml"
    where = ("-i", inventory, "--playbook-dir", directory)
    return run("ansible", "k80_servers", *where, "-v", "-m", "include_role", "-a", role)


@functools.cache
def site_tag(inventory: Path) -> str:
    return tag_in(as_a_playbook_in(ROOT, inventory))


@pytest.mark.parametrize("inventory", [DEMO, EXAMPLE], ids=lambda path: path.name)
def test_site_and_playbooks_name_the_same_image(inventory: Path) -> None:
    assert (ROOT / "site.yml").exists()
    playbook = ROOT / "playbooks/image-tag.yml"
    assert tag_in(image_tag_playbook(inventory, playbook)) == site_tag(inventory)


def test_a_mirror_offers_the_same_parts_so_the_image_keeps_its_name() -> None:
    mirrors = {
        "vllm_image_debian_mirror": "http://mirror.example.org",
        "vllm_image_python_index_url": "http://mirror.example.org/simple",
    }
    options = [f"--extra-vars={name}={url}" for name, url in mirrors.items()]
    done = image_tag_playbook(EXAMPLE, ROOT / "playbooks/image-tag.yml", *options)
    assert tag_in(done) == site_tag(EXAMPLE)


def test_an_archive_names_its_image_itself(tmp_path: Path) -> None:
    manifest = [{"Config": "config.json", "RepoTags": ["vllm-k80:0123456789abcdef"], "Layers": []}]
    for name, content in {"manifest.json": manifest, "config.json": {}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("config.json", "manifest.json"):
            tar.add(tmp_path / name, name)
    options = [f"--extra-vars=vllm_image_archive={archive} vllm_image_cache={tmp_path}/cache"]
    done = image_tag_playbook(EXAMPLE, ROOT / "playbooks/image-tag.yml", *options)
    assert tag_in(done) == "vllm-k80:0123456789abcdef"


def test_without_group_vars_beside_it_a_playbook_names_none(tmp_path: Path) -> None:
    """The control: were the link missing, the test above would fail."""
    playbook = shutil.copy(ROOT / "playbooks/image-tag.yml", tmp_path)
    for done in (image_tag_playbook(EXAMPLE, playbook), as_a_playbook_in(tmp_path, EXAMPLE)):
        assert done.returncode != 0
        assert "vllm_image_base_image" in done.stdout + done.stderr


def test_molecule_names_the_same_images(tmp_path: Path) -> None:
    # Molecule writes its inventory, with its links, for any of its actions; it converges site.yml.
    done = run("molecule", "syntax", MOLECULE_EPHEMERAL_DIRECTORY=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"playbook: {ROOT}/site.yml" in done.stdout + done.stderr

    assert site_tag(tmp_path / "inventory") == site_tag(DEMO)
    # The demo's variables name a base image of their own; without them, the root's hold here too.
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "inventory/ansible_inventory.yml", bare)
    assert site_tag(bare) == site_tag(EXAMPLE)
    assert site_tag(DEMO) != site_tag(EXAMPLE)
