"""tools/check_argument_specs, on the roles here and on a broken one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPECS = """\
argument_specs:
  main:
    options:
      cache_size:
        description: Size in MB.
        type: int
        default: 10
      cache_owner:
        description: Who owns it.
        type: str
        required: true
      cache_paths:
        description: Its parts.
        type: list
        elements: dict
        default: []
        options:
          path:
            description: Where it is.
            type: path
"""
DEFAULTS = "cache_size: 10\ncache_paths: []\n"


def check(*arguments: Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/check_argument_specs", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


def check_role(roles: Path, specs: str, defaults: str) -> tuple[int, list[str]]:
    for path, text in (("meta/argument_specs.yml", specs), ("defaults/main.yml", defaults)):
        file = roles / "cache" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return check(roles)


def test_the_roles_here_agree() -> None:
    assert check() == (0, [])


def test_a_role_that_agrees_passes(tmp_path: Path) -> None:
    assert check_role(tmp_path, SPECS, DEFAULTS) == (0, [])


@pytest.mark.parametrize(
    ("in_specs", "in_defaults", "sentence"),
    [
        (("default: 10", "default: 11"), None, "cache_size has the default 11, but {d} sets 10."),
        (("default: 10", 'default: "10"'), None, 'has the default "10", but {d} sets 10.'),
        (("        default: 10\n", ""), None, "cache_size lacks the default that {d} sets."),
        (("description: Size in MB.", "description: ''"), None, "cache_size has no description."),
        (
            ("description: Where it is.\n            ", ""),
            None,
            "cache_paths.path has no description.",
        ),
        (None, ("cache_size: 10\n", ""), "cache_size of {s} is not set."),
        (None, ("cache_size", "cache_sizes"), "cache_sizes of {d} is not declared."),
        (None, ("cache_size: 10", "cache_size: 10\ncache_owner: me"), "cache_owner is required"),
        (("cache_size:", "__cache_size:"), None, "__cache_size is internal (__)"),
        (("cache_size:", "store_size:"), None, "store_size does not begin with the role's name"),
        (None, ("cache_size", "size"), "size does not begin with the role's name"),
    ],
)
def test_each_mistake_is_told(
    tmp_path: Path,
    in_specs: tuple[str, str] | None,
    in_defaults: tuple[str, str] | None,
    sentence: str,
) -> None:
    specs = SPECS.replace(*in_specs) if in_specs else SPECS
    defaults = DEFAULTS.replace(*in_defaults) if in_defaults else DEFAULTS
    assert (specs, defaults) != (SPECS, DEFAULTS)
    code, told = check_role(tmp_path, specs, defaults)
    role = tmp_path / "cache"
    expected = sentence.format(d=role / "defaults/main.yml", s=role / "meta/argument_specs.yml")
    assert code == 1
    assert [line for line in told if expected in line], told


def test_how_a_template_is_wrapped_does_not_matter(tmp_path: Path) -> None:
    specs = SPECS.replace("default: 10", "default: >-\n          {{ a\n             + b }}")
    assert check_role(tmp_path, specs, DEFAULTS.replace("10", '"{{ a + b }}"')) == (0, [])


def test_a_role_without_specs_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    code, told = check(tmp_path)
    assert code == 1
    assert told == [
        f"{tmp_path}/cache/meta/argument_specs.yml: is missing; it declares the role's options."
    ]
