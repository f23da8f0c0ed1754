"""The module that writes several files in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils import basic

MODULE = Path(__file__).resolve().parent.parent / "library/k80_files.py"


def write(*files: dict[str, Any], check: bool = False, diff: bool = True) -> dict[str, Any]:
    """What the module answers."""
    mine = {"owner": str(os.getuid()), "group": str(os.getgid())}
    arguments = {
        "files": [mine | file for file in files],
        "_ansible_check_mode": check,
        "_ansible_diff": diff,
    }
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(json.loads(done.stdout))


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o7777)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return tmp_path / "one"


def test_it_writes_what_is_missing_and_then_nothing(tmp_path: Path, one: Path) -> None:
    secret = tmp_path / "new/directory/secret"
    wanted = [
        {"path": str(one), "content": "first\n"},
        {"path": str(secret), "content": "ü\n", "mode": "0600"},
    ]
    answer = write(*wanted)
    assert answer["changed_paths"] == [str(one), str(secret)]
    assert one.read_text() == "first\n"
    assert mode(one) == "0o644"
    assert secret.read_text() == "ü\n"
    assert mode(secret) == "0o600"
    assert mode(secret.parent) == "0o755"

    before = one.stat()
    answer = write(*wanted)
    assert answer["changed"] is False
    assert answer["changed_paths"] == []
    assert one.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one"], "no draft is left"


def test_only_what_differs_is_changed(tmp_path: Path, one: Path) -> None:
    other = tmp_path / "other"
    one.write_text("old\n")
    other.write_text("same\n")
    other.chmod(0o644)
    answer = write(
        {"path": str(one), "content": "new\n"}, {"path": str(other), "content": "same\n"}
    )
    assert answer["changed_paths"] == [str(one)]
    assert [(part["before"], part["after"]) for part in answer["diff"]] == [("old\n", "new\n")]


def test_a_mode_that_somebody_changed_comes_back(one: Path) -> None:
    one.write_text("secret\n")
    one.chmod(0o644)
    wanted = {"path": str(one), "content": "secret\n", "mode": "0600"}
    assert write(wanted, check=True)["changed"] is True
    assert mode(one) == "0o644"
    assert write(wanted)["changed_paths"] == [str(one)]
    assert mode(one) == "0o600"


def test_a_dry_run_says_and_leaves(tmp_path: Path, one: Path) -> None:
    answer = write({"path": str(tmp_path / "not/there"), "content": "x"}, check=True)
    assert answer["changed"] is True
    assert list(tmp_path.iterdir()) == []
    one.write_text("old")
    assert write({"path": str(one), "content": "new"}, check=True)["changed"] is True
    assert one.read_text() == "old"


def test_a_link_is_replaced_and_what_it_led_to_is_left(tmp_path: Path, one: Path) -> None:
    target = tmp_path / "target"
    target.write_text("content")
    one.symlink_to(target)
    assert write({"path": str(one), "content": "content"})["changed"] is True
    assert not one.is_symlink()
    assert target.read_text() == "content"


def test_what_is_to_be_absent_is_removed_once(tmp_path: Path, one: Path) -> None:
    one.write_text("old")
    unwanted = {"path": str(one), "state": "absent"}
    assert write(unwanted, check=True)["changed_paths"] == [str(one)]
    assert one.exists()
    assert write(unwanted)["changed_paths"] == [str(one)]
    assert not one.exists()
    assert write(unwanted, {"path": str(tmp_path / "a/b"), "state": "absent"})["changed"] is False


def test_what_its_reader_refuses_does_not_replace_the_old(tmp_path: Path, one: Path) -> None:
    one.write_text("good\n")
    judge = {"path": str(one), "validate": "grep --quiet good %s"}
    answer = write({**judge, "content": "bad\n"})
    assert answer["failed"] is True
    assert str(one) in answer["msg"]
    assert one.read_text() == "good\n"
    assert list(tmp_path.iterdir()) == [one]
    assert write({**judge, "content": "also good\n"})["changed"] is True


def test_an_error_names_the_file(tmp_path: Path, one: Path) -> None:
    one.write_text("")
    answer = write({"path": str(one / "below"), "content": "x"})
    assert answer["failed"] is True
    assert f"{one}/below could not be changed" in answer["msg"]
    assert "Traceback" not in answer["msg"]


@pytest.mark.parametrize("path", ["one", "one/below"], ids=["written", "refused"])
def test_contents_are_in_no_answer(tmp_path: Path, one: Path, path: str) -> None:
    one.write_text("the old secret")
    answer = write({"path": str(tmp_path / path), "content": "the new secret"}, diff=False)
    assert "secret" not in json.dumps(answer)
    assert answer["invocation"]["module_args"] == {"files": [str(tmp_path / path)]}


def test_contents_are_in_no_log(
    one: Path, load_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules write their parameters to the system's log, unless the task forbids it."""
    logged: list[str] = []
    monkeypatch.setattr(basic, "has_journal", False)
    monkeypatch.setattr(
        basic.AnsibleModule, "_log_to_syslog", lambda _, message: logged.append(message)
    )
    arguments = {"files": [{"path": str(one), "content": "a secret"}], "_ansible_no_log": False}
    monkeypatch.setattr(
        basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
    )
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
    with pytest.raises(SystemExit):
        load_module("library/k80_files.py").main()
    assert "secret" not in "".join(logged)
