"""A server that models come from, as tests of the store need it: files below a directory by HTTP, or as the hub lists them."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_DATA = (".safetensors", ".bin")
#: Last bytes of the requests that only look for a file's size and header.
_HEADS = (0, 256 * 1024 - 1)


@dataclass
class Site:
    """The files below `root`: of one model, or, `hub`, of models by ``organisation/name``. Starts with the block."""

    root: Path
    hub: bool = False
    #: Told of each request for tensor data, (path, first byte, byte behind the last); may wait, raise to cut it, or return the
    #: status that refuses it.
    on_data: Callable[[str, int, int], int | None] = lambda *_: None
    #: What the hub says of some files, by name, instead of their SHA-256.
    lies: dict[str, str] = field(default_factory=dict)
    #: Bytes of tensor data that were asked for, and paths of the listings.
    data: list[tuple[str, int, int]] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)

    def __enter__(self) -> Site:
        handler = type("Handler", (_Handler,), {"site": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def n_data(self) -> int:
        """Bytes of tensor data that were asked for."""
        return sum(stop - start for _, start, stop in self.data)


class Gate:
    """Passed when it is open; `reached` is set when somebody has come."""

    def __init__(self) -> None:
        self.reached, self._may = threading.Event(), threading.Event()
        self.open = self._may.set

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self._may.wait(30)


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that leave are part of many tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.site.hub and path.startswith("api/models/"):
            self._list("/".join(path.split("/")[2:4]))
        elif self.site.hub:
            organisation, name, resolve, commit, *rest = path.split("/")
            assert (resolve, commit) == ("resolve", COMMIT)
            self._file(self.site.root.joinpath(organisation, name, *rest))
        else:
            self._file(self.site.root / path)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"no such file")
        data, start = path.read_bytes(), 0
        headers = {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True),
        }
        size, status, last = len(data), 200, 0
        if asked := self.headers.get("Range"):
            start, last = map(int, asked.removeprefix("bytes=").split("-"))
            data, status = data[start : last + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"
        if path.suffix in _DATA and (start > 0 or last not in _HEADS):
            name = path.relative_to(self.site.root).as_posix()
            self.site.data.append((name, start, start + len(data)))
            if refused := self.site.on_data(name, start, start + len(data)):
                return self._answer(refused, b"no")
        return self._answer(status, data, **headers)

    def _list(self, repo: str) -> None:
        self.site.listed.append(repo)
        root = self.site.root / repo
        siblings = []
        for file in sorted(root.iterdir()) if root.is_dir() else ():
            data = file.read_bytes()
            entry = {"rfilename": file.name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if file.suffix in _DATA:
                sha256 = self.site.lies.get(file.name) or hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        if not siblings:
            return self._answer(404, b"{}")
        found = {"id": repo, "sha": COMMIT, "siblings": siblings, "lastModified": "2026-01-02T03:04:05.000Z", "tags": []}
        return self._answer(200, json.dumps(found).encode(), **{"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def gone_offline(site: Site) -> Iterator[None]:
    """Until the end of the block the server of `site` cuts every request for data."""

    def cut(*_: object) -> None:
        raise ConnectionAbortedError("the line went dead")

    before, site.on_data = site.on_data, cut
    try:
        yield
    finally:
        site.on_data = before
