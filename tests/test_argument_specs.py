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


@pytest.mark.parametrize(
    ("file", "text", "is_told"),
    [
        ("tasks/main.yml", "- debug: {msg: '{{ cache_size }} MB'}\n  when: cache_size\n", True),
        ("tasks/main.yml", "- debug: {msg: set cache_size}\n  when: cache_size | int > 5\n", False),
        ("vars/main.yml", "__cache_more: '{{ cache_size + 1 }}'\n", True),
        ("vars/main.yml", "__cache_more: '{{ cache_size | int + 1 }}'\n", False),
        ("vars/main.yml", "__cache_most: '{{ [cache_size, 5] | max }}'\n", True),
        ("templates/cache.j2", "{% if cache_size %}{{ cache_size }}{% endif %}\n", True),
        ("templates/cache.j2", "size {{ cache_size }}m\n", False),
    ],
)
def test_what_may_be_text_is_made_a_number(
    tmp_path: Path, file: str, text: str, is_told: bool
) -> None:
    """`-e cache_size=0` is the text "0", which is as true as any other."""
    path = tmp_path / "cache" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    sentence = f"{path}: cache_size may be text, and something depends on it; add `| int`."
    told = [sentence] if is_told else []
    assert check_role(tmp_path, SPECS, DEFAULTS) == (int(is_told), told)
