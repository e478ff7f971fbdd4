"""An HTTP client for the bytes of files: whole, their beginnings, ranges, and streams, with attempts and redirects.

Credentials go to the host that they were given for, and no redirect takes them along. What an answer says of a file is compared
with what was said before: what changes at the source during a load ends the load.
"""

from __future__ import annotations

import http.client
import io
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, urljoin

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, SllmError, SourceUnreachable
from sllmdask.loader import libc
from sllmdask.loader.access import Access, port_of, site_of, split_url
from sllmdask.loader.sockets import Limits, Sockets

#: Bytes between two looks at the clock and at who waits.
_STEP = 1024**2
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
#: What a redirect to another host must not carry.
_PRIVATE_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})


class _Refused(Exception):
    """The server answered, and no other attempt will be answered better."""

    def __init__(self, status: int, url: str, reason: str) -> None:
        super().__init__(status, url, reason)
        self.status, self.url, self.reason = status, url, reason


class _Retry(Exception):
    """The server wants to be asked later."""

    def __init__(self, reason: str, after_s: float | None) -> None:
        super().__init__(reason)
        self.reason, self.after_s = reason, after_s


@dataclass(slots=True)
class HttpFile:
    """One file behind HTTP. `tag` and `nbytes` are what every answer must still say; ``None``: not known, or not checked."""

    name: str
    url: str
    nbytes: int | None = None
    tag: str | None = None
    sha256: str | None = None
    modified_ns: int | None = None
    ranges: bool = True
    #: Where a redirect led; forgotten when it does not answer any more, as signed addresses do.
    resolved: str | None = None


def _tag_of(headers: http.client.HTTPMessage) -> str:
    return " ".join(filter(None, (headers.get("ETag"), headers.get("Last-Modified"))))


class HttpClient:
    """Asks for bytes of files, each thread over its own connections. Close it by leaving its ``with`` block."""

    def __init__(
        self,
        access: Access,
        limits: Limits,
        headers: Mapping[str, str],
        private_to: str,
        cancel: threading.Event | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._access, self._limits, self._tls = access, limits, tls
        self._headers = {"User-Agent": "sllmdask", **headers}
        self._private_to = site_of(private_to)
        self._sockets = Sockets(cancel)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._deadline = None if limits.total_s is None else time.monotonic() + limits.total_s

    def __enter__(self) -> Self:
        self._sockets.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sockets.__exit__(kind, error, trace)

    def _context(self) -> ssl.SSLContext:
        """Made once: to read the system's certificates takes longer than a handshake."""
        with self._lock:
            self._tls = self._tls or ssl.create_default_context()
            return self._tls

    # --- bytes -----------------------------------------------------------------------------------------------------------

    def small(self, file: HttpFile, limit: int) -> bytes | None:
        """All of `file`, at most `limit` bytes; ``None`` if there is no such. Notes its tag and its time of change."""
        sink = io.BytesIO()

        def attempt() -> None:
            sink.seek(0)
            sink.truncate()
            with self._ask(file, None) as reply:
                claimed = reply.length
                while data := reply.read(min(_STEP, limit + 1 - sink.tell())):
                    sink.write(data)
                    self._look(file)
                if sink.tell() > limit:
                    raise CheckpointCorrupt(file.url, None, f"it is larger than {limit} bytes")
                if claimed is not None and sink.tell() != claimed:
                    raise http.client.IncompleteRead(b"", claimed - sink.tell())
                self._note(file, reply, sink.tell())

        try:
            self._try(file, attempt)
        except _Refused as refused:
            if refused.status in (404, 410):
                return None
            raise _denied(refused) from None
        return sink.getvalue()

    def head(self, file: HttpFile, nbytes: int) -> bytes | None:
        """The first `nbytes` bytes of `file`, fewer if it is shorter; ``None`` if there is none. Notes what the answer says."""
        found = b""

        def attempt() -> None:
            nonlocal found
            with self._ask(file, (0, nbytes - 1)) as reply:
                if reply.status == 206:
                    start, stop, total = self._content_range(file, reply)
                    if start != 0 or stop > nbytes:
                        raise _lying(file, reply)
                    wanted = stop
                else:
                    file.ranges = False
                    if reply.length is None:
                        raise CheckpointNotFound(file.url, "the server tells no size of it and knows no ranges")
                    total, wanted = reply.length, min(reply.length, nbytes)
                found = reply.read(wanted)
                if len(found) != wanted:
                    raise http.client.IncompleteRead(found, wanted - len(found))
                self._note(file, reply, total)

        try:
            self._try(file, attempt)
        except _Refused as refused:
            if refused.status in (404, 410):
                return None
            if refused.status == 416 and file.nbytes in (None, 0):
                file.nbytes = 0
                return b""
            raise _denied(refused) from None
        return found

    def range(self, file: HttpFile, offset: int, nbytes: int, address: int) -> None:
        """Bring these bytes of `file` to `address`. What has come before a failure is not asked for again."""
        view, done = libc.memory_view(address, nbytes), 0

        def attempt() -> None:
            nonlocal done
            while done < nbytes:
                with self._ask(file, (offset + done, offset + nbytes - 1)) as reply:
                    if reply.status != 206:
                        raise CheckpointCorrupt(file.url, None, "the server knows no ranges any more")
                    start, stop, total = self._content_range(file, reply)
                    if start != offset + done or not start < stop <= offset + nbytes or total != file.nbytes:
                        raise _lying(file, reply)
                    self._check_tag(file, reply)
                    while done < stop - offset:
                        n = reply.readinto(view[done : min(done + _STEP, stop - offset)])
                        if n == 0:
                            raise http.client.IncompleteRead(b"", stop - offset - done)
                        done += n
                        self._look(file)

        try:
            self._try(file, attempt, lambda: done)
        except _Refused as refused:
            raise _gone(refused, file) from None

    def stream(self, file: HttpFile, take: Callable[[int, memoryview], None]) -> None:
        """Read all of `file` in its order and give it to ``take(offset, bytes)``, each byte once, whatever has to be repeated."""
        scratch, nbytes, done = memoryview(bytearray(_STEP)), file.nbytes or 0, 0

        def attempt() -> None:
            nonlocal done
            with self._ask(file, None) as reply:
                if reply.length != nbytes:
                    raise CheckpointCorrupt(file.url, None, f"it had {nbytes} bytes a moment ago and has {reply.length} now")
                self._check_tag(file, reply)
                at = 0
                while at < nbytes:
                    n = reply.readinto(scratch)
                    if n == 0:
                        raise http.client.IncompleteRead(b"", nbytes - at)
                    self._look(file)
                    if at + n > done:
                        take(done, scratch[max(done - at, 0) : n])
                        done = at + n
                    at += n

        try:
            self._try(file, attempt, lambda: done)
        except _Refused as refused:
            raise _gone(refused, file) from None

    # --- attempts --------------------------------------------------------------------------------------------------------

    def _try(self, file: HttpFile, attempt: Callable[[], None], progress: Callable[[], int] = lambda: 0) -> None:
        """Make `attempt` until it ends well, or fails too often without progress. The first failure costs no pause:
        a server may close a connection that was idle.
        """
        failures, before = 0, progress()
        while True:
            self._look(file)
            try:
                return attempt()
            except _Retry as error:
                reason, after_s = error.reason, error.after_s
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise SourceUnreachable(file.url, f"its certificate is not trusted: {error.verify_message}") from None
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                after_s = 0.0 if failures == 0 else None
            self._look(file)
            file.resolved = None
            if progress() > before:
                failures, before = 0, progress()
            failures += 1
            if failures >= self._limits.attempts:
                raise SourceUnreachable(file.url, f"{failures} attempts failed, the last with {reason}")
            self._sockets.cancel.wait(self._limits.backoff_s * 2 ** (failures - 1) if after_s is None else min(after_s, 30.0))

    def _look(self, file: HttpFile) -> None:
        self._sockets.check()
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise SourceUnreachable(file.url, f"it was not done after {self._limits.total_s:g} s")

    @contextmanager
    def _ask(self, file: HttpFile, span: tuple[int, int] | None) -> Iterator[http.client.HTTPResponse]:
        """One request, redirects followed; the connection is kept only if the whole answer was read."""
        url = file.resolved or file.url
        for _ in range(self._limits.redirects + 1):
            self._access.check(url)
            reply, connection = self._request(url, span)
            sound = False
            try:
                if reply.status in (301, 302, 303, 307, 308):
                    target = urljoin(url, reply.headers.get("Location", ""))
                    self._access.check(target, before=url)
                    url = target
                    reply.read(_STEP)
                    sound = True
                    continue
                if file.resolved and url == file.resolved and reply.status in (401, 403, 404, 410):
                    raise _Retry(f"{reply.status} where a redirect led to", 0.0)
                if reply.status in _RETRIED:
                    after = reply.headers.get("Retry-After", "")
                    raise _Retry(f"{reply.status} {reply.reason}", float(after) if after.isascii() and after.isdigit() else None)
                if reply.status not in (200, 206) or (span is None and reply.status != 200):
                    reason = f"{reply.status} {reply.reason}"
                    reply.read(_STEP)
                    sound = True
                    raise _Refused(reply.status, url, reason)
                if reply.headers.get("Content-Encoding", "identity") != "identity":
                    raise CheckpointCorrupt(file.url, None, "the server sends it compressed, which was not asked for")
                file.resolved = url if url != file.url else None
                yield reply
                sound = True
                return
            finally:
                if not sound or not reply.isclosed() or reply.will_close:
                    self._drop(connection)
        raise SourceUnreachable(file.url, f"it is redirected more than {self._limits.redirects} times")

    def _request(self, url: str, span: tuple[int, int] | None) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        parsed = split_url(url)
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if site_of(url) != self._private_to:
            headers = {name: value for name, value in headers.items() if name.lower() not in _PRIVATE_HEADERS}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1]}"
        connection = self._connection(parsed)
        target = parsed.path or "/"
        if parsed.query:
            target += f"?{parsed.query}"
        if connection.via_proxy and parsed.scheme == "http":
            target = url
        try:
            connection.request("GET", target, headers=headers)
            return connection.getresponse(), connection
        except BaseException:
            self._drop(connection)
            raise

    def _connection(self, parsed: SplitResult) -> _Connection:
        kept: dict[tuple[str, str, int], _Connection] = self._local.__dict__.setdefault("kept", {})
        key = (parsed.scheme, (parsed.hostname or "").lower(), port_of(parsed))
        connection = kept.get(key)
        if connection is None or connection.sock is None:
            connection = kept[key] = _connect(parsed, self._limits, self._context)
            self._sockets.add(connection.sock)
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        for key, kept in list(self._local.kept.items()):
            if kept is connection:
                del self._local.kept[key]
        if connection.sock is not None:
            self._sockets.drop(connection.sock)
        connection.close()

    # --- what an answer must say -----------------------------------------------------------------------------------------

    def _content_range(self, file: HttpFile, reply: http.client.HTTPResponse) -> tuple[int, int, int]:
        """Offsets of the first byte of the answer and behind its last, and the size of the file."""
        found = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if found is None:
            raise _lying(file, reply)
        first, last, total = map(int, found.groups())
        if not first <= last < total or (reply.length is not None and reply.length != last + 1 - first):
            raise _lying(file, reply)
        return first, last + 1, total

    def _note(self, file: HttpFile, reply: http.client.HTTPResponse, nbytes: int) -> None:
        if file.nbytes is not None and file.nbytes != nbytes:
            raise CheckpointCorrupt(file.url, None, f"it has {nbytes} bytes, not the {file.nbytes} that its listing says")
        file.nbytes = nbytes
        if file.tag is None:
            file.tag = _tag_of(reply.headers)
        if file.modified_ns is None and (text := reply.headers.get("Last-Modified")):
            with suppress(ValueError, OverflowError):
                file.modified_ns = int(parsedate_to_datetime(text).timestamp()) * 10**9

    def _check_tag(self, file: HttpFile, reply: http.client.HTTPResponse) -> None:
        if file.tag and file.sha256 is None and _tag_of(reply.headers) != file.tag:
            reason = f"it has changed at the source: it was {file.tag!r} and is {_tag_of(reply.headers)!r}"
            raise CheckpointCorrupt(file.url, None, reason)


def _lying(file: HttpFile, reply: http.client.HTTPResponse) -> CheckpointCorrupt:
    said = reply.headers.get("Content-Range")
    reason = f"the server's answer is not what was asked for: range {said!r}, {reply.length} bytes, of a file of {file.nbytes}"
    return CheckpointCorrupt(file.url, None, reason)


def _denied(refused: _Refused) -> CheckpointNotFound:
    hint = ": is a token needed (HF_TOKEN), or another one?" if refused.status in (401, 403) else ""
    return CheckpointNotFound(refused.url, f"the server answers {refused.reason}{hint}")


def _gone(refused: _Refused, file: HttpFile) -> SllmError:
    if refused.status in (404, 410, 412, 416):
        return CheckpointCorrupt(file.url, None, f"it has changed at the source during the load: {refused.reason}")
    return _denied(refused)


class _Connection(http.client.HTTPConnection):
    """A connection that is open from the start."""

    via_proxy = False


class _TlsConnection(http.client.HTTPSConnection, _Connection):
    pass


def _connect(parsed: SplitResult, limits: Limits, tls: Callable[[], ssl.SSLContext]) -> _Connection:
    host, port = parsed.hostname or "", port_of(parsed)
    proxy = None if urllib.request.proxy_bypass(parsed.netloc) else urllib.request.getproxies().get(parsed.scheme)
    at = split_url(proxy if "//" in proxy else f"http://{proxy}") if proxy else None
    to = (at.hostname or "", port_of(at)) if at else (host, port)
    connection: _Connection
    if parsed.scheme == "https":
        connection = _TlsConnection(*to, timeout=limits.connect_s, context=tls())
        if at:
            connection.set_tunnel(host, port)
    else:
        connection = _Connection(*to, timeout=limits.connect_s)
    connection.via_proxy = at is not None
    connection.connect()
    connection.sock.settimeout(limits.idle_s)
    return connection
