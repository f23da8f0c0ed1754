"""A file server and a hub on this machine: what vllm_model_store fetches models from.

The hub speaks as much of huggingface.co's HTTP interface as a download needs, and as there, large
files are at another address than the hub's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")
CACHED = "/api/resolve-cache/models/"


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        get = self.headers.get
        request = Request(self.command, self.path, get("Range"), get("Authorization"))
        self.server.requests.append(request)
        # A client may leave when it knows enough.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.server.answer(self, request)

    do_HEAD = do_GET  # noqa: N815

    def head(self, status: int, headers: dict[str, str | int]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def whole(self, status: int, content: bytes, **headers: str) -> None:
        self.head(
            status,
            {k.replace("_", "-"): v for k, v in headers.items()} | {"Content-Length": len(content)},
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Keeps the requests that it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, handler: Handler, request: Request) -> None:
        raise NotImplementedError

    @contextmanager
    def running(self) -> Iterator[None]:
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()


class Storage(Server):
    """Files by their paths."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.knows_ranges = True
        self.tells_size = True
        # At these offsets connections are cut, the first at the first, and so on.
        self.cuts: list[int] = []
        self.announced: int | None = None  # a size that is not the true one
        # Answers in place of the file, the first to the first request, and so on; 0 is the file.
        self.statuses: list[int] = []

    def answer(self, handler: Handler, request: Request) -> None:
        content = self.files.get(request.path.split("?")[0])
        if content is None:
            handler.whole(404, b"")
            return
        if self.statuses and (status := self.statuses.pop(0)):
            handler.whole(status, b"")
            return
        size, start = len(content), 0
        if request.range and self.knows_ranges:
            start = int(request.range.removeprefix("bytes=").rstrip("-"))
            if start >= size:
                handler.whole(416, b"")
                return
        end = self.cuts.pop(0) if self.cuts else size
        length: dict[str, str | int] = {"Content-Length": self.announced or size - start}
        if start:
            length["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        handler.head(206 if start else 200, length if self.tells_size else {})
        if handler.command != "HEAD":
            handler.wfile.write(content[start:end])


@dataclass
class Repository:
    files: dict[str, bytes]
    token: str = ""
    told: dict[str, dict[str, object]] = field(default_factory=dict)  # other than the truth


class Hub(Server):
    """Repositories of one revision each."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.repositories: dict[tuple[str, str], Repository] = {}

    def add(self, name: str, revision: str, files: dict[str, bytes], token: str = "") -> Repository:
        repository = Repository(files, token)
        self.repositories[name, revision] = repository
        for content in files.values():
            self.storage.files[f"/{hashlib.sha256(content).hexdigest()}"] = content
        return repository

    def answer(self, handler: Handler, request: Request) -> None:
        address = urlsplit(request.path)
        cached = address.path.startswith(CACHED)
        asked = re.fullmatch(
            r"/(api/models/)?([^/]+/[^/]+)/(?:revision|resolve)/(\w+)/?(.*)",
            address.path.replace(CACHED, "/", 1) if cached else address.path,
        )
        repository = asked and self.repositories.get((asked[2], asked[3]))
        if not asked or not repository:
            handler.whole(404, b"", X_Error_Code="RepoNotFound")
        elif repository.token and request.authorization != f"Bearer {repository.token}":
            handler.whole(401, b"", X_Error_Code="GatedRepo")
        elif asked[1]:
            with_blobs = parse_qs(address.query).get("blobs") in (["true"], ["True"])
            told = self.tell(asked[2], asked[3], repository, with_blobs)
            handler.whole(200, json.dumps(told).encode(), Content_Type="application/json")
        elif (content := repository.files.get(unquote(asked[4]))) is None:
            handler.whole(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=asked[3])
        elif asked[4].endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            handler.whole(
                302,
                b"",
                Location=f"{self.storage.url}/{digest}?signature=secret",
                X_Repo_Commit=asked[3],
                X_Linked_Size=str(len(content)),
                X_Linked_Etag=f'"{digest}"',
            )
        elif not cached:
            # As huggingface.co does: to another path of its own, which wants the token too.
            handler.whole(307, b"", Location=CACHED + address.path[1:], X_Repo_Commit=asked[3])
        else:
            handler.whole(200, content, ETag=f'"{git_digest(content)}"', X_Repo_Commit=asked[3])

    @staticmethod
    def tell(name: str, revision: str, repository: Repository, with_blobs: bool) -> object:
        siblings = []
        for file, content in repository.files.items():
            entry: dict[str, object] = {"rfilename": file}
            if with_blobs:
                entry |= {"size": len(content), "blobId": git_digest(content)}
                if file.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            siblings.append(entry | repository.told.get(file, {}))
        return {"id": name, "modelId": name, "sha": revision, "siblings": siblings}
