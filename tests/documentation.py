"""What can be wrong with a page: its links, and the commands, paths and variables in its code.

Code is what stands in backticks or in a block. What programs take is asked of their `--help`. Not
judged: links to other sites, which are not fetched; the flags that `vllm-k80 serve` hands on to
vLLM, which is not here; and programs that are not ours, but for ansible-playbook.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
# What runs each program, and whether its first argument is a command of it.
PROGRAMS = {
    "vllm-k80": ([sys.executable, "-m", "vllm_k80.cli"], True),
    "k80-instance": ([sys.executable, "roles/vllm_instance/files/k80-instance"], True),
    "k80-doctor": ([sys.executable, "roles/doctor/files/k80-doctor"], False),
    "tools/demo": ([sys.executable, "tools/demo"], True),
    "ansible-playbook": (["ansible-playbook"], False),
}
CALL = re.compile(rf"(?:^|[\s/])({'|'.join(PROGRAMS)})(?::[\w.-]+)?((?: .*)?)$")
HANDED_ON = {("vllm-k80", "serve")}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Directories whose files are named from the root, or from that of the package.
PATH = re.compile(
    r"(?<![\w./<-])((?:benchmarks|csrc|docs|examples|files|molecule|playbooks|roles|tests|tools"
    r"|vllm-k80-src|inventories/(?:demo|example)|group_vars/all)/[\w./*-]*[\w*])"
)
# By the demo, and by the command that is shown.
MADE = {"inventories/demo/host_vars/k80-demo/secrets.yml", "benchmarks/naive_gemv.fatbin"}
# What the reader puts there: benchmarks/DATE/HOST.
PLACEHOLDER = re.compile(r"/[A-Z]+(?:[/-]|$)")
PLAYBOOK = re.compile(r"(?:^|\s)(?:playbooks/)?([\w-]+\.yml)(?=\s|$)")
# Jinja without braces.
CONDITIONS = {"when", "that", "failed_when", "changed_when", "until"}
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())
# Not the roles' own names, files or directories.
VARIABLE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(ROLES)})_\w*[a-z0-9])(?![\w/]|\.py)")


def pages() -> list[Path]:
    package = ("vllm-k80-src/README.md", "vllm-k80-src/docker/README.md")
    patterns = ("*.md", "docs/*.md", "roles/*/README.md", "files/*/README.md", *package)
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


# --- What there is ----------------------------------------------------------


@functools.cache
def help_of(program: str, command: str) -> str | None:
    """What it says of itself, or None if it does not know the command."""
    done = subprocess.run(
        [*PROGRAMS[program][0], *([command] if command else []), "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "vllm-k80-src")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@functools.cache
def variables() -> set[str]:
    """What roles take or set, and what group_vars has."""
    of_preflight = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text())
    found = set(of_preflight["__preflight_role_facts"])
    for file in ROOT.glob("roles/*/meta/argument_specs.yml"):
        specs = yaml.safe_load(file.read_text())["argument_specs"]
        found |= set(specs["main"].get("options", {}))
    for file in ROOT.glob("group_vars/all/*.yml"):
        found |= set(yaml.safe_load(file.read_text()))
    return found


def expressions(value: Any, key: str = "") -> Iterator[str]:
    """The Jinja in a playbook."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from expressions(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner, key)
    elif isinstance(value, str):
        yield "{{ " + value + " }}" if key in CONDITIONS and "{{" not in value else value


@functools.cache
def all_variables() -> set[str]:
    """With those that only a playbook reads."""
    return variables().union(*(read_by(file) for file in ROOT.glob("playbooks/*.yml")))


@functools.cache
def read_by(playbook: Path) -> set[str]:
    """The names that a playbook, or one that it imports, asks for."""
    found = set()
    plays = yaml.safe_load(playbook.read_text())
    for text in expressions(plays):
        tree = jinja2.Environment(autoescape=True).parse(text)
        found |= {name.name for name in tree.find_all(jinja2.nodes.Name)}
    for play in plays:
        if imported := play.get("ansible.builtin.import_playbook"):
            found |= read_by((playbook.parent / imported).resolve())
    return found


# --- What a page has --------------------------------------------------------


def tokens_of(text: str) -> Iterator[tuple[int, Token]]:
    """The page's tokens, those within lines too, each with its line."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        yield line, token
        for inner in token.children or []:
            yield line, inner
            line += inner.type == "softbreak"


@functools.cache
def anchors(page: Path) -> set[str]:
    """What can be linked to: headings, as GitHub names them, and the page's own anchors."""
    found, seen = set(), Counter[str]()
    previous = ""
    for _, token in tokens_of(page.read_text()):
        if token.type == "inline" and previous == "heading_open":
            said = "".join(inner.content for inner in token.children or [])
            slug = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        elif token.type in ("html_inline", "html_block"):
            found |= set(re.findall(r'<a id="([^"]+)">', token.content))
        previous = token.type
    return found


def commands(code: str) -> Iterator[str]:
    """Each command of some code, without comments and the variables that are set before it."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\|?|;", re.sub(r"(^|\s)#.*", "", line)):
            if command := re.sub(r"^[$\s]*(?:[A-Z_]+=\S+\s+)*", "", part).strip():
                yield command


# --- What is wrong with it --------------------------------------------------


def wrong_link(target: str, page: Path) -> Iterator[str]:
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        yield f"links to {target}, which is not there"
    elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        yield f"links to {target}, but {file.name} has no heading or anchor of that name"


def wrong_call(program: str, rest: str) -> Iterator[str]:
    named = re.match(r" ([a-z][\w-]*)", rest) if PROGRAMS[program][1] else None
    command = named[1] if named else ""
    told = help_of(program, command)
    if told is None:
        yield f"{program} has no command {command}"
    elif (program, command) not in HANDED_ON:
        for flag in FLAG.findall(rest):
            if flag not in FLAG.findall(told):
                yield f"{program} {command}".rstrip() + f" has no flag {flag}"


def wrong_extra_variables(command: str) -> Iterator[str]:
    """Of ansible-playbook, or of what stands for it: a playbook's name, or three dots."""
    names = re.findall(r"""-e ["']?\{?["']?([a-z]\w*)["']?[=:]""", command)
    named = PLAYBOOK.findall(command)
    files = [file for name in named for file in (ROOT / "playbooks" / name, ROOT / name)]
    read = (read_by(file) for file in files if file.exists())
    known = variables().union(*read) if named else all_variables()
    for name in names:
        if name not in known:
            yield f"-e {name}: neither the roles nor {' or '.join(named) or 'a playbook'} take it"


def wrong_command(command: str) -> Iterator[str]:
    words = command.split()
    target = re.match(r"make ([a-z][a-z-]*)", command)
    if target and target[1] not in make_targets():
        yield f"the Makefile has no target {target[1]}"
    if call := CALL.search(command):
        yield from wrong_call(call[1], call[2])
    is_playbook = PLAYBOOK.match(command) and len(words) > 1 and words[1].startswith("-")
    if words[0] == "ansible-playbook" or is_playbook:
        for name in PLAYBOOK.findall(command):
            if not (ROOT / name).exists() and not (ROOT / "playbooks" / name).exists():
                yield f"there is no playbook {name}"
    if words[0] in ("ansible-playbook", "…", "-e") or PLAYBOOK.match(command):
        yield from wrong_extra_variables(command)


def wrong_code(code: str, page: Path) -> Iterator[str]:
    for command in commands(code):
        yield from wrong_command(command)
    for path in PATH.findall(code):
        places = (ROOT, ROOT / "vllm-k80-src", page.parent)
        if path in MADE or PLACEHOLDER.search(path):
            continue
        if not any(any(place.glob(path)) for place in places):
            yield f"names {path}, which is not there"
    for name in VARIABLE.findall(code):
        if name not in all_variables():
            yield f"{name} is not a variable of any role"


def faults(page: Path) -> Iterator[str]:
    """What is wrong with a page, a sentence each."""
    for line, token in tokens_of(page.read_text()):
        found: Iterator[str] = iter(())
        if token.type == "link_open":
            found = wrong_link(str(token.attrs["href"]), page)
        elif token.type == "image":
            found = wrong_link(str(token.attrs["src"]), page)
        elif token.type in ("code_inline", "code_block", "fence"):
            found = wrong_code(token.content, page)
        for fault in found:
            yield f"{page}:{line}: {fault}."
