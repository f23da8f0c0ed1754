"""An image that is made already: what its archive says of it, and the parts that it travels in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = b'{"architecture": "amd64"}'
ID = f"sha256:{hashlib.sha256(CONFIG).hexdigest()}"


@pytest.fixture(scope="module")
def filters(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("roles/vllm_image/filter_plugins/vllm_image.py")


def archive_of(images: Any, **files: bytes) -> bytes:
    """The output of `docker save`, the manifest last, as Docker writes it."""
    buffer = io.BytesIO()
    manifest = {"manifest.json": json.dumps(images).encode()} if images is not None else {}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (files | {"config.json": CONFIG, "layer.tar": b"x" * 5000}).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, data in manifest.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def image(*tags: str, config: str = "config.json") -> dict[str, Any]:
    return {"Config": config, "RepoTags": list(tags), "Layers": ["layer.tar"]}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_an_archive_tells_which_image_it_holds(
    filters: ModuleType, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    archive = tmp_path / "image"
    archive.write_bytes(pack(archive_of([image("vllm-k80:1")])))
    told = filters.archived_image(str(archive), str(tmp_path / "cache"))
    assert (told["reference"], told["id"]) == ("vllm-k80:1", ID)
    assert told["bytes"] > 5000


def test_dockers_own_registry_is_no_part_of_a_name(filters: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "image"
    for name, reference in {
        "docker.io/library/vllm-k80:1": "vllm-k80:1",
        "docker.io/lab/vllm-k80:1": "lab/vllm-k80:1",
        "registry.example.org:5000/vllm-k80:1": "registry.example.org:5000/vllm-k80:1",
    }.items():
        archive.write_bytes(archive_of([image(name)]))
        assert filters.read_archive(archive)["reference"] == reference


def test_an_archive_is_read_again_when_it_is_another(filters: ModuleType, tmp_path: Path) -> None:
    archive, cache = tmp_path / "image", str(tmp_path / "cache")
    archive.write_bytes(archive_of([image("vllm-k80:1")]))
    os.utime(archive, (1, 1))
    first = filters.archived_image(str(archive), cache)
    # Not read again, or it would tell.
    archive.write_bytes(bytes(archive.stat().st_size))
    os.utime(archive, (1, 1))
    assert filters.archived_image(str(archive), cache) == first

    archive.write_bytes(archive_of([image("vllm-k80:2")]))
    os.utime(archive, (2, 2))
    assert filters.archived_image(str(archive), cache)["reference"] == "vllm-k80:2"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"no archive", "cannot be read"),
        (gzip.compress(archive_of([image("a:1")]))[:-2000], "cannot be read"),
        (archive_of(None), "no image in it"),
        (archive_of([image("a:1", config="other")]), "no image in it"),
        (archive_of([image()]), "1 images with 0 names"),
        (archive_of([image("a:1", "a:2")]), "1 images with 2 names"),
        (
            archive_of([image("a:1"), image("a:2", config="second")], second=b"{}"),
            "2 images with 2 names",
        ),
    ],
    ids=["missing", "other", "cut", "no-manifest", "no-config", "nameless", "names", "images"],
)
def test_what_is_no_archive_of_one_image_is_refused(
    filters: ModuleType, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    archive = tmp_path / "image"
    if content is not None:
        archive.write_bytes(content)
    with pytest.raises(AnsibleFilterError, match=r"^vllm_image_archive: .* docker save") as told:
        filters.archived_image(str(archive), str(tmp_path / "cache"))
    assert reason in str(told.value)


# ---- the parts


def cut(directory: Path, *command: str) -> str:
    script = ROOT / "roles/vllm_image/files/cut-image"
    done = subprocess.run(
        [script, directory, "1KB", "gzip -1", *command], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3500))
    return file


def joined(directory: Path, names: list[str]) -> bytes:
    return gzip.decompress(b"".join((directory / name).read_bytes() for name in names))


def test_the_parts_make_the_whole(filters: ModuleType, tmp_path: Path, data: Path) -> None:
    parts = tmp_path / "parts/sha256-1"
    assert filters.part_names(str(parts)) == []
    cut(parts, "cat", str(data))
    names = filters.part_names(str(parts))
    assert names == [f"part-000{number}" for number in range(4)]
    assert filters.unsound_parts(str(parts)) == []
    assert joined(parts, names) == data.read_bytes()


def test_parts_that_are_damaged_or_missing_are_told(
    filters: ModuleType, tmp_path: Path, data: Path
) -> None:
    parts = tmp_path / "parts"
    cut(parts, "cat", str(data))
    (parts / "part-0000").unlink()
    (parts / "part-0002").write_bytes((parts / "part-0002").read_bytes()[:-1] + b"!")
    assert filters.unsound_parts(str(parts)) == ["part-0000", "part-0002"]


def test_sound_parts_are_not_cut_again(tmp_path: Path, data: Path) -> None:
    parts = tmp_path / "parts"
    cut(parts, "cat", str(data))
    assert cut(parts, "false") == "the parts are here\n"


@pytest.mark.parametrize("fault", ["damaged", "no list"])
def test_others_are(filters: ModuleType, tmp_path: Path, data: Path, fault: str) -> None:
    parts = tmp_path / "parts"
    cut(parts, "cat", str(data))
    if fault == "damaged":
        (parts / "part-0001").write_bytes(b"")
    else:
        (parts / "SHA256SUMS").unlink()
        (parts / "part-0009").write_text("left by an interrupted run")
    assert cut(parts, "cat", str(data)) == ""
    assert joined(parts, filters.part_names(str(parts))) == data.read_bytes()
    assert not (parts / "part-0009").exists()


def test_what_was_not_written_to_its_end_has_no_list(
    filters: ModuleType, tmp_path: Path, data: Path
) -> None:
    parts = tmp_path / "parts"
    with pytest.raises(subprocess.CalledProcessError):
        cut(parts, "sh", "-c", f"cat '{data}'; exit 1")
    assert filters.part_names(str(parts)) == []
