"""A local server that speaks the API of the Hugging Face hub, for the real clients with ``HF_ENDPOINT``.

It serves repositories from memory: the model and data set information, the file tree, and files. Files of at least
``LFS_BYTES`` are stored as the hub stores large files, behind a redirect and named by their SHA-256.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1000


@dataclass
class Repo:
    """One repository. ``kind`` is ``models`` or ``datasets``."""

    kind: str
    name: str
    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        """A commit that changes with the content."""
        hasher = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            hasher.update(name.encode() + b"\0" + content)
        return hasher.hexdigest()


@dataclass
class Hub:
    """The state of the server, and the faults to simulate."""

    url: str = ""
    repos: list[Repo] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and ``Range`` of each request so far."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """File name -> close the connection after this many bytes of it, each time."""
    hold_after: dict[str, int] = field(default_factory=dict)
    """File name -> send this many bytes of it, then wait until ``release`` is set."""
    release: threading.Event = field(default_factory=threading.Event)
    announced_size: dict[str, int] = field(default_factory=dict)
    """File name -> the size that the hub reports."""
    spoiled: set[str] = field(default_factory=set)
    """Names of files whose first byte is changed."""

    def add(self, kind: str, name: str, files: dict[str, bytes], *, gated: bool = False) -> Repo:
        self.repos.append(Repo(kind, name, files, gated))
        return self.repos[-1]

    def downloads(self, name: str) -> list[str | None]:
        """The ``Range`` header of each request for the content of a file."""
        blob = next((_sha256(r.files[name]) for r in self.repos if name in r.files), "")
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith((name, blob))]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/blobs/([^/]+)/([0-9a-f]{64})", path):
            content = next(c for r in self.hub.repos for c in r.files.values() if _sha256(c) == match[2])
            self._send_file(match[1], content, {}, head=head)
        elif match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|auth-check)(?:/[^/]+)?)?", path
        ):
            self._answer_api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._answer_file("datasets" if match[1] else "models", match[2], match[3], head=head)
        else:
            self._send(404, b"", {})

    def _find(self, kind: str, name: str, *, content: bool) -> Repo | None:
        """The repository, or None after sending the hub's error. The files of a gated repository may be listed."""
        repo = next((repo for repo in self.hub.repos if (repo.kind, repo.name) == (kind, name)), None)
        if repo is None:  # the hub does not reveal whether a private repository exists
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif repo.gated and content:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
            return None
        return repo

    def _answer_api(self, kind: str, name: str, part: str | None) -> None:
        repo = self._find(kind, name, content=part == "auth-check")
        if repo is None:
            return
        if part == "auth-check":
            self._send(200, b"", {})
            return
        if part == "tree":
            entries: list[dict[str, Any]] = []
            for path, content in repo.files.items():
                entry: dict[str, Any] = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "path": path}
                entry["size"] = len(content)
                if len(content) >= LFS_BYTES:
                    entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._send_json(entries)
            return
        siblings = [{"rfilename": path} for path in repo.files]
        self._send_json(
            {"_id": "0", "id": name, "sha": repo.commit, "siblings": siblings, "private": False, "gated": False}
            | {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": "2024-01-01T00:00:00.000Z"}
        )

    def _answer_file(self, kind: str, name: str, file: str, *, head: bool) -> None:
        repo = self._find(kind, name, content=True)
        if repo is None:
            return
        headers = {"X-Repo-Commit": repo.commit}
        if file not in repo.files:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = repo.files[file]
        if len(content) < LFS_BYTES:
            self._send_file(file, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, head=head)
            return
        size = self.hub.announced_size.get(file, len(content))
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{_sha256(content)}"'}
        # A different host, as with the real hub: clients must not send their token there.
        storage = self.hub.url.replace("127.0.0.1", "localhost")
        self._send(302, b"", headers | {"Location": f"{storage}/blobs/{file}/{_sha256(content)}"})

    def _send_file(self, name: str, content: bytes, headers: dict[str, str], *, head: bool) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if name in self.hub.spoiled:
            content = bytes([content[0] ^ 1]) + content[1:]
        body = content[start:]
        self.send_response(206 if asked else 200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if head:
            return
        if name in self.hub.cut_after:
            self.wfile.write(body[: self.hub.cut_after[name]])
            self.close_connection = True
        elif name in self.hub.hold_after:
            held = self.hub.hold_after[name]
            self.wfile.write(body[:held])
            self.wfile.flush()
            self.hub.release.wait()
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.release.set()
            server.shutdown()
