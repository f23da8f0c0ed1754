"""tools/role-readmes: what the roles' READMEs say of their variables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
SPECS = """\
argument_specs:
  main:
    options:
      cache_mode:
        description: C(off) keeps nothing.
        type: str
        choices: [all, "off"]
        default: "off"
      cache_places:
        description: >-
          Where it
          is.
        type: list
        elements: dict
        default: "{{ a
          | b }}"
        options:
          path:
            description: A directory.
            type: path
            required: true
      cache_size:
        description: In MB.
        type: int
        required: true
"""
TABLE = r"""
| variable | type | default | what it is |
| --- | --- | --- | --- |
| `cache_mode` | str | `'off'` | `off` keeps nothing. One of `all`, `'off'`. |
| `cache_places` | list of dict | `{{ a \| b }}` | Where it is. |
| `cache_places[].path` | path | required | A directory. |
| `cache_size` | int | required, set in [sizes.yml](../../group_vars/all/sizes.yml) | In MB. |
"""


@pytest.fixture(scope="module")
def tool(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("tools/role-readmes")


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_readme_is_what_the_specs_say(tool: ModuleType, role: Path) -> None:
    assert (role / "README.md").read_text() == tool.page(role), "run: make docs"


def test_all_roles_are_written(tool: ModuleType) -> None:
    assert tool.roles() == ROLES


@pytest.fixture
def role(tmp_path: Path) -> Path:
    for path, text in (
        ("roles/cache/meta/argument_specs.yml", SPECS),
        ("roles/cache/README.md", "# cache\n\nBy hand.\n"),
        ("group_vars/all/sizes.yml", "cache_size: 3\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path / "roles/cache"


def test_the_table_follows_what_is_written_by_hand(
    tool: ModuleType, role: Path, tmp_path: Path
) -> None:
    page = tool.page(role, tmp_path)
    assert page.startswith("# cache\n\nBy hand.\n\n" + tool.MARK)
    assert page.endswith("## Variables\n" + TABLE)


def test_what_is_stale_is_replaced_and_the_rest_kept(
    tool: ModuleType, role: Path, tmp_path: Path
) -> None:
    page = tool.page(role, tmp_path)
    (role / "README.md").write_text(page.replace("In MB.", "In GB.") + "| more |\n")
    assert tool.page(role, tmp_path) == page
