"""Checkpoints that are elsewhere: a directory behind HTTP, or a model on the Hugging Face hub.

:func:`open_remote` fetches what says how a checkpoint is laid out (configuration, tokenizer, indexes, headers) and lays it out
in ``NAME.partial``, with data files of the right size and without data. From then on it is an index like any other: its plan is
read by the reader, and only the bytes of its chunks come from a :class:`ChunkSource` of this module, by range requests. Each of
the reader's threads has one connection and one request under way. A server without ranges is read as one stream, file by file.

Who may be asked is said by :class:`Access`. Credentials go to the host that they were given for, and no redirect takes them
along. What changes at the source during a load ends the load.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import http.client
import io
import ipaddress
import re
import shutil
import socket
import ssl
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import huggingface_hub

from sllmdask.errors import (
    Cancelled,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    DiskFull,
    SllmError,
    SourceUnreachable,
)
from sllmdask.loader import fast_format, libc
from sllmdask.loader.arrivals import fresh
from sllmdask.loader.buffers import Buffer
from sllmdask.loader.format import (
    ADAPTER,
    MAX_HEADER,
    SHARDED,
    SINGLE,
    CheckpointIndex,
    parse_json,
    read_config,
    read_index,
)
from sllmdask.loader.plan import ChunkRead, ReadPlan, plan_reads
from sllmdask.loader.reader import ChunkSource, check
from sllmdask.loader.tee import FarFile, Manifest, Partial, Resumed, Tee, check_name

#: A hub id, ``name`` or ``organisation/name``; the hub itself allows neither ``..`` nor ``--``.
_HUB_ID = re.compile(r"^(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?$")
#: Configuration and tokenizer; no pickle, no code.
SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
#: The same, for a server that lists nothing.
_SMALL_NAMES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)
#: Bytes of the largest file that is taken for a small one, and of all of them.
_MAX_SMALL, _MAX_ALL_SMALL = MAX_HEADER, 4 * MAX_HEADER
_MAX_FILES = 10_000
#: Bytes: what is asked of a file to have its header, most often in one request.
_FIRST_READ = 256 * 1024
#: Bytes between two looks at the clock and at who waits.
_STEP = 1024**2
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
#: What a redirect to another host must not carry.
_PRIVATE_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to connect, without a byte, and (``None``: any) in all; failures in a row before a source is given up.

    The pause after the n-th failure is ``backoff_s * 2 ** (n - 1)`` seconds, or what the server asks for, up to 30.
    """

    connect_s: float = 10.0
    idle_s: float = 30.0
    total_s: float | None = None
    attempts: int = 5
    backoff_s: float = 0.2
    redirects: int = 5


class Access:
    """Which addresses may be asked. `allowed`: ``https://*``, ``https://*.example.org``, ``http://models.internal:8080``.

    Beside those, loopback and private hosts may be asked over http, but no redirect leads from https to http unless listed.
    """

    def __init__(self, allowed: Sequence[str] = ("https://*",)) -> None:
        self._allowed = [urlsplit(entry) for entry in allowed]
        for entry, parsed in zip(allowed, self._allowed, strict=True):
            if parsed.scheme not in ("http", "https") or not parsed.netloc or parsed.path not in ("", "/"):
                raise ConfigError(f"{entry!r} is not like https://*, https://*.example.org or http://host:port", "remote_hosts")

    def check(self, url: str, *, before: str | None = None) -> None:
        """Raise :class:`ConfigError` unless `url` may be asked, where `before` redirected to it."""
        parsed = _split(url)
        if parsed.scheme not in ("http", "https"):
            raise ConfigError(f"{url!r} is not an http or https address")
        if any(_matches(parsed, entry) for entry in self._allowed):
            return
        down = before is not None and _split(before).scheme == "https"
        if parsed.scheme == "http" and not down and _is_private(parsed.hostname or ""):
            return
        here = f"{parsed.scheme}://{parsed.netloc}"
        why = f"a redirect from {before!r} leads to {here}, which" if before else here
        raise ConfigError(f"{why} may not be asked; if it should be, add {here!r} to worker.remote_hosts", "remote_hosts")


def _split(url: str) -> SplitResult:
    try:
        parsed = urlsplit(url)
        # Looked at here, because it raises.
        _ = parsed.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}") from None
    if not parsed.hostname or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is not an address of a host")
    if parsed.username is not None or parsed.password is not None:
        raise ConfigError("an address must not hold a name or a password; give them as a header")
    return parsed


def _port(parsed: SplitResult) -> int:
    return parsed.port or (443 if parsed.scheme == "https" else 80)


def _matches(parsed: SplitResult, entry: SplitResult) -> bool:
    if parsed.scheme != entry.scheme:
        return False
    host, _, port = entry.netloc.rpartition(":") if re.search(r":\d+$", entry.netloc) else (entry.netloc, "", "")
    if port and int(port) != _port(parsed):
        return False
    if not port and host != "*" and parsed.port not in (None, 443 if parsed.scheme == "https" else 80):
        return False
    return fnmatch.fnmatchcase((parsed.hostname or "").lower(), host.strip("[]").lower())


def _is_private(host: str) -> bool:
    """Whether every address of `host` is loopback or private; those that clouds answer secrets on are neither."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        addresses = [ipaddress.ip_address(str(address).partition("%")[0]) for address in found]
    except (OSError, ValueError):
        return False
    return bool(addresses) and all(
        a.is_loopback or (a.is_private and not (a.is_link_local or a.is_unspecified or a.is_reserved)) for a in addresses
    )


def _origin(url: str) -> tuple[str, str, int]:
    parsed = _split(url)
    return parsed.scheme, (parsed.hostname or "").lower(), _port(parsed)


# --- sockets that a cancelled load lets go of ------------------------------------------------------------------------


class Sockets:
    """The sockets of one load. In the ``with`` block they are shut down once `cancel` is set, so that no thread hangs."""

    def __init__(self, cancel: threading.Event | None) -> None:
        self.cancel = cancel or threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._watcher = threading.Thread(target=self._watch, name="cancel-watch", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._lock:
            sockets, self._open = self._open, set()
        for sock in sockets:
            sock.close()

    def add(self, sock: socket.socket) -> None:
        """`sock` is shut down and closed with the others."""
        with self._lock:
            self._open.add(sock)
        if self.cancel.is_set():
            _shut_down(sock)

    def drop(self, sock: socket.socket) -> None:
        """Close `sock`."""
        with self._lock:
            self._open.discard(sock)
        sock.close()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the load was called off."""
        if self.cancel.is_set():
            raise Cancelled("the fetch was called off")

    def _watch(self) -> None:
        while not self._closed.wait(0.1):
            if self.cancel.is_set():
                with self._lock:
                    for sock in self._open:
                        _shut_down(sock)
                return


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not TLS's: that one forgets its state, which another thread is using.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


# --- one client ------------------------------------------------------------------------------------------------------


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
class _HttpFile:
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


class _Client:
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
        self._private_to = _origin(private_to)
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

    def small(self, file: _HttpFile, limit: int) -> bytes | None:
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

    def head(self, file: _HttpFile, nbytes: int) -> bytes | None:
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

    def range(self, file: _HttpFile, offset: int, nbytes: int, address: int) -> None:
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

    def stream(self, file: _HttpFile, take: Callable[[int, memoryview], None]) -> None:
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

    def _try(self, file: _HttpFile, attempt: Callable[[], None], progress: Callable[[], int] = lambda: 0) -> None:
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

    def _look(self, file: _HttpFile) -> None:
        self._sockets.check()
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise SourceUnreachable(file.url, f"it was not done after {self._limits.total_s:g} s")

    @contextmanager
    def _ask(self, file: _HttpFile, span: tuple[int, int] | None) -> Iterator[http.client.HTTPResponse]:
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
        parsed = _split(url)
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if _origin(url) != self._private_to:
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
        key = (parsed.scheme, (parsed.hostname or "").lower(), _port(parsed))
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

    def _content_range(self, file: _HttpFile, reply: http.client.HTTPResponse) -> tuple[int, int, int]:
        """Offsets of the first byte of the answer and behind its last, and the size of the file."""
        found = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
        if found is None:
            raise _lying(file, reply)
        first, last, total = map(int, found.groups())
        if not first <= last < total or (reply.length is not None and reply.length != last + 1 - first):
            raise _lying(file, reply)
        return first, last + 1, total

    def _note(self, file: _HttpFile, reply: http.client.HTTPResponse, nbytes: int) -> None:
        if file.nbytes is not None and file.nbytes != nbytes:
            raise CheckpointCorrupt(file.url, None, f"it has {nbytes} bytes, not the {file.nbytes} that its listing says")
        file.nbytes = nbytes
        if file.tag is None:
            file.tag = _tag_of(reply.headers)
        if file.modified_ns is None and (text := reply.headers.get("Last-Modified")):
            with suppress(ValueError, OverflowError):
                file.modified_ns = int(parsedate_to_datetime(text).timestamp()) * 10**9

    def _check_tag(self, file: _HttpFile, reply: http.client.HTTPResponse) -> None:
        if file.tag and file.sha256 is None and _tag_of(reply.headers) != file.tag:
            reason = f"it has changed at the source: it was {file.tag!r} and is {_tag_of(reply.headers)!r}"
            raise CheckpointCorrupt(file.url, None, reason)


def _lying(file: _HttpFile, reply: http.client.HTTPResponse) -> CheckpointCorrupt:
    said = reply.headers.get("Content-Range")
    reason = f"the server's answer is not what was asked for: range {said!r}, {reply.length} bytes, of a file of {file.nbytes}"
    return CheckpointCorrupt(file.url, None, reason)


def _denied(refused: _Refused) -> CheckpointNotFound:
    hint = ": is a token needed (HF_TOKEN), or another one?" if refused.status in (401, 403) else ""
    return CheckpointNotFound(refused.url, f"the server answers {refused.reason}{hint}")


def _gone(refused: _Refused, file: _HttpFile) -> SllmError:
    if refused.status in (404, 410, 412, 416):
        return CheckpointCorrupt(file.url, None, f"it has changed at the source during the load: {refused.reason}")
    return _denied(refused)


class _Connection(http.client.HTTPConnection):
    """A connection that is open from the start."""

    via_proxy = False


class _TlsConnection(http.client.HTTPSConnection, _Connection):
    pass


def _connect(parsed: SplitResult, limits: Limits, tls: Callable[[], ssl.SSLContext]) -> _Connection:
    host, port = parsed.hostname or "", _port(parsed)
    proxy = None if urllib.request.proxy_bypass(parsed.netloc) else urllib.request.getproxies().get(parsed.scheme)
    at = _split(proxy if "//" in proxy else f"http://{proxy}") if proxy else None
    to = (at.hostname or "", _port(at)) if at else (host, port)
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


# --- chunks ----------------------------------------------------------------------------------------------------------


class _DiskFailed(Exception):
    """Our own disk, and not the network: to ask the server again is no help."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _HttpChunks:
    """A :class:`ChunkSource` over HTTP; `files` by the plan's numbers, `numbers` are those of the same files in `partial`."""

    def __init__(self, client: _Client, files: Sequence[_HttpFile], partial: Partial, numbers: Sequence[int]) -> None:
        self._client, self._files = client, files
        self._spools = {i: _Spool(client, file, partial, numbers[i]) for i, file in enumerate(files) if not file.ranges}

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for spool in self._spools.values():
            spool.stop()
        self._client.__exit__(kind, error, trace)
        for spool in self._spools.values():
            spool.join()

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring the wanted bytes of `chunk` to `address`."""
        if chunk.file in self._spools:
            self._spools[chunk.file].fetch(chunk, address)
        else:
            self._client.range(self._files[chunk.file], chunk.offset, chunk.wanted, address)


class _Spool:
    """One file of a server without ranges: a thread writes it to disk in its order, and chunks are taken from there."""

    def __init__(self, client: _Client, file: _HttpFile, partial: Partial, number: int) -> None:
        self._client, self._file, self._partial, self._number = client, file, partial, number
        self._front = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        with self._moved:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"stream {self._file.name}", daemon=True)
                self._thread.start()
            self._moved.wait_for(lambda: self._error is not None or self._front >= chunk.offset + chunk.wanted)
            if self._front < chunk.offset + chunk.wanted:
                assert self._error is not None
                # Made anew: several threads must not add their frames to one traceback.
                raise fresh(self._error)
        if not self._partial.pread(self._number, chunk.offset, chunk.wanted, address):
            raise CheckpointCorrupt(self._file.name, None, "its disk copy was cut while it was filled")
        self._partial.note(self._number, chunk.offset, chunk.wanted, address)

    def stop(self) -> None:
        self._stopped = True

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._client.stream(self._file, self._take)
        except BaseException as error:  # noqa: BLE001 - raised again by the threads that wait
            with self._moved:
                self._error = error.error if isinstance(error, _DiskFailed) else error
                self._moved.notify_all()

    def _take(self, offset: int, data: memoryview) -> None:
        if self._stopped:
            raise Cancelled("nobody waits for it any more")
        try:
            self._partial.put(self._number, offset, data)
        except OSError as error:
            raise _DiskFailed(error) from None
        with self._moved:
            self._front = offset + len(data)
            self._moved.notify_all()


# --- where checkpoints are -------------------------------------------------------------------------------------------


class Origin(Protocol):
    """A place that a checkpoint can be fetched from."""

    def survey(self, cancel: threading.Event) -> Manifest:
        """What is there; the heads of all files are fetched."""

    def chunks(self, index: CheckpointIndex, partial: Partial, numbers: Sequence[int], cancel: threading.Event) -> ChunkSource:
        """A source of the bytes of `index`'s files, whose numbers in the manifest are `numbers`."""


class _HttpOrigin:
    """What the two kinds of server have in common. `_list` says which files there are, where the server tells."""

    def __init__(
        self,
        source: str,
        url: str,
        access: Access,
        limits: Limits,
        headers: Mapping[str, str],
        variant: str | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        access.check(url)
        self._source, self._url, self._access, self._limits = source, url, access, limits
        self._headers, self._variant, self._tls = headers, variant, tls
        self._files: dict[str, _HttpFile] = {}
        self._revision = ""

    def _client(self, cancel: threading.Event) -> _Client:
        return _Client(self._access, self._limits, self._headers, self._url, cancel, self._tls)

    def _list(self) -> Mapping[str, _HttpFile] | None:
        return None

    def _at(self, name: str) -> _HttpFile:
        check_name(self._url, name)
        return _HttpFile(name, urljoin(self._url, quote(name)))

    def survey(self, cancel: threading.Event) -> Manifest:
        listed = self._list()
        with self._client(cancel) as client:

            def find(name: str) -> _HttpFile | None:
                if listed is None:
                    return self._at(name)
                return listed.get(name)

            smalls: dict[str, bytes] = {}

            def small(name: str) -> bytes | None:
                if name not in smalls and (file := find(name)) is not None:
                    text = client.small(file, _MAX_SMALL)
                    if text is not None:
                        smalls[name], self._files[name] = text, file
                return smalls.get(name)

            heads = self._weights(client, find, small)
            names = _SMALL_NAMES if listed is None else [name for name in listed if _is_small(name) and name not in heads]
            names = [name for name in names if listed is None or (listed[name].nbytes or 0) <= _MAX_SMALL]
            with ThreadPoolExecutor(8, thread_name_prefix="small") as pool:
                list(pool.map(small, names))
        if sum(map(len, smalls.values())) > _MAX_ALL_SMALL:
            raise CheckpointCorrupt(self._source, None, f"its small files have more than {_MAX_ALL_SMALL} bytes")
        now = time.time_ns()
        files = tuple(
            FarFile(name, file.nbytes or 0, (smalls | heads)[name], file.modified_ns or now, file.tag or "", file.sha256)
            for name, file in sorted(self._files.items())
            if name in smalls or name in heads
        )
        # Where nothing tells whether a file has changed, nothing of an earlier fetch can be used.
        told = self._revision or all(file.tag or file.name in smalls for file in files)
        state = repr([(file.name, file.nbytes, file.tag, file.head) for file in files])
        revision = self._revision or (hashlib.sha256(state.encode()).hexdigest() if told else uuid.uuid4().hex)
        return Manifest(self._source, revision, files)

    def _weights(
        self, client: _Client, find: Callable[[str], _HttpFile | None], small: Callable[[str], bytes | None]
    ) -> dict[str, bytes]:
        """The heads of the files that hold tensors."""
        preferred = [self._variant] if self._variant else ["split16", "raw"]
        for variant in preferred:
            name = fast_format.INDEXES[variant]
            text = small(name)
            if text is not None and text.startswith(f'{{"magic":"{fast_format.MAGIC}"'.encode()):
                index = fast_format.parse_index(text, urljoin(self._url, name), variant)
                sizes = {file.name: file.nbytes for file in index.files}
                return self._heads(client, find, sizes, header=False)
        if (file := find(SINGLE)) is not None and (found := self._header(client, file)) is not None:
            return {SINGLE: found}
        if (text := small(SHARDED)) is not None:
            weight_map = parse_json(text, urljoin(self._url, SHARDED), "the file").get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) and all(map(_is_str, weight_map.values())) else set()
            if not names or len(names) > _MAX_FILES:
                raise CheckpointCorrupt(urljoin(self._url, SHARDED), None, "weight_map does not map tensors to files")
            return self._heads(client, find, dict.fromkeys(sorted(names)), header=True)
        if (file := find(ADAPTER)) is not None and (found := self._header(client, file)) is not None:
            return {ADAPTER: found}
        raise CheckpointNotFound(
            self._source, f"there is neither {SINGLE} nor {SHARDED} nor an index of our own format at {self._url}"
        )

    def _heads(
        self, client: _Client, find: Callable[[str], _HttpFile | None], sizes: Mapping[str, int | None], *, header: bool
    ) -> dict[str, bytes]:
        def head(name: str) -> bytes:
            check_name(self._url, name)
            file = find(name)
            found = None
            if file is not None:
                found = self._header(client, file) if header else client.head(file, 1)
            if file is None or found is None:
                raise CheckpointNotFound(self._source, f"{name} is not there, and the index names it")
            if not header and file.nbytes != sizes[name]:
                raise CheckpointCorrupt(file.url, None, f"it has {file.nbytes} bytes, and its index says {sizes[name]}")
            self._files[name] = file
            return found if header else b""

        with ThreadPoolExecutor(8, thread_name_prefix="head") as pool:
            return dict(zip(sizes, pool.map(head, sizes), strict=True))

    def _header(self, client: _Client, file: _HttpFile) -> bytes | None:
        """The header of a safetensors file; what is no such is left to the one who reads it."""
        found = client.head(file, _FIRST_READ)
        if found is None:
            return None
        end = 8 + int.from_bytes(found[:8], "little")
        if end > len(found) and len(found) >= 8 and end <= min(8 + MAX_HEADER, file.nbytes or 0):
            if file.ranges:
                rest = bytearray(end - len(found))
                client.range(file, len(found), len(rest), libc.address_of_bytes(rest))
                found += bytes(rest)
            else:
                found = client.head(file, end) or b""
        self._files[file.name] = file
        return found[:end]

    def chunks(self, index: CheckpointIndex, partial: Partial, numbers: Sequence[int], cancel: threading.Event) -> ChunkSource:
        files = [replace(self._files[file.name]) for file in index.files]
        return _HttpChunks(self._client(cancel), files, partial, numbers)


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_small(name: str) -> bool:
    # Our own format's indexes are fetched with what they index: of two variants, one.
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_PATTERNS) and name not in fast_format.INDEXES.values()


class HttpDirectory(_HttpOrigin):
    """The files of a checkpoint, of either format, below `url`. `headers` may hold ``Authorization``, for `url`'s host alone.

    `variant`: which of our format's variants; ``None``: the smaller one that is there. Raises :class:`ConfigError` if `url` may
    not be asked.
    """

    def __init__(
        self,
        url: str,
        *,
        access: Access | None = None,
        limits: Limits | None = None,
        headers: Mapping[str, str] | None = None,
        variant: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if _split(url).query or _split(url).fragment:
            raise ConfigError(f"{url!r} is not the address of a directory")
        base = url if url.endswith("/") else url + "/"
        super().__init__(url, base, access or Access(), limits or Limits(), headers or {}, variant, tls)


class HubModel(_HttpOrigin):
    """Model `repo` of the hub at `revision`, a branch, tag or commit; it is pinned to the commit when it is surveyed.

    The endpoint is `endpoint` or ``HF_ENDPOINT``, the token ``HF_TOKEN``'s or the one that was logged in with.
    """

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        endpoint: str | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        variant: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not _HUB_ID.match(repo):
            raise CheckpointNotFound(repo, "it is not the id of a model on the hub")
        self._repo, self._asked, self._endpoint = repo, revision, (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        token = None if huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else huggingface_hub.get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        super().__init__(repo, self._endpoint + "/", access or Access(), limits or Limits(), headers, variant, tls)

    def _list(self) -> Mapping[str, _HttpFile]:
        try:
            api = huggingface_hub.HfApi(endpoint=self._endpoint)
            info = api.model_info(self._repo, revision=self._asked, files_metadata=True, timeout=self._limits.idle_s)
        except Exception as error:
            # The hub's client lets errors of several libraries through; all of them mean the same here.
            reason = f"there is no such directory, and the hub did not supply it ({type(error).__name__}: {error})"
            raise CheckpointNotFound(self._repo, " ".join(reason.split())) from error
        if not info.sha or not info.siblings:
            raise CheckpointNotFound(self._repo, "the hub lists no files of it")
        self._revision = info.sha
        changed = info.last_modified
        modified_ns = int(changed.timestamp()) * 10**9 if changed else None
        listed = {}
        for sibling in info.siblings[:_MAX_FILES]:
            name = sibling.rfilename
            check_name(self._repo, name)
            url = f"{self._endpoint}/{self._repo}/resolve/{info.sha}/{quote(name)}"
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            # The commit pins the bytes; what a cache in between calls them may change.
            listed[name] = _HttpFile(name, url, sibling.size, sha256 or sibling.blob_id or "", sha256, modified_ns)
        return listed


# --- fetching --------------------------------------------------------------------------------------------------------


class Fetch:
    """A checkpoint that is being fetched to `final`. `index` is that of its layout in `directory`, where small files are whole.

    One of: :meth:`chunks` and :meth:`tee`, for the reader to load it while the disk copy is made; :meth:`pull`, for the disk copy
    alone. Then :meth:`close`. Also a ``with`` block.
    """

    def __init__(self, origin: Origin, manifest: Manifest, partial: Partial, index: CheckpointIndex) -> None:
        self._origin, self._partial, self.manifest, self.index = origin, partial, manifest, index
        number_of = {file.name: number for number, file in enumerate(manifest.files)}
        self._numbers = [number_of[file.name] for file in index.files]
        self._resumed = partial.n_held > 0

    @classmethod
    def open(cls, origin: Origin, final: Path, *, cancel: threading.Event | None = None) -> Fetch | None:
        """Ask `origin` what it has; ``None`` if `final` is complete, after waiting for a process that was fetching it.

        Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`, :class:`ConfigError`,
        :class:`Cancelled` and :class:`OSError`.
        """
        cancel = cancel or threading.Event()
        partial = Partial.open(final, cancel)
        if partial is None:
            return None
        try:
            manifest = origin.survey(cancel)
            partial.begin(manifest)
            return cls(origin, manifest, partial, read_index(partial.path))
        except BaseException:
            partial.close()
            raise

    @property
    def resumed(self) -> bool:
        """Whether an earlier fetch has left something, which does not come from elsewhere."""
        return self._resumed

    @property
    def directory(self) -> Path:
        """Where the files are: ``NAME.partial``, and `final` once it is complete."""
        return self._partial.path if self._partial.path.is_dir() else self._partial.final

    def chunks(self, cancel: threading.Event | None = None) -> ChunkSource:
        """What a reader of `index` takes its chunks from; what an earlier fetch has left comes from disk."""
        inner = self._origin.chunks(self.index, self._partial, self._numbers, cancel or threading.Event())
        return Resumed(inner, self._partial, self._numbers)

    def without_disk(self) -> None:
        """Make no disk copy: there is no room for one. What has arrived of one is given back."""
        self._partial.forget_data()

    def tee(self, plan: ReadPlan, buffer: Buffer) -> Tee:
        """What brings the chunks of `plan`, a plan of `index` that is read to `buffer`, to disk beside."""
        return Tee(self._partial, plan, self._numbers, self.chunks, buffer)

    def pull(
        self,
        chunk_size: int,
        *,
        n_threads: int = 4,
        on_progress: Callable[[int, int], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Path:
        """Bring the checkpoint to disk, through one chunk of scratch memory per thread; returns where it is.

        `on_progress` is called with the bytes so far and in all, never backwards. Raises as :meth:`open`, and :class:`DiskFull`.
        """
        cancel = cancel or threading.Event()
        plan = plan_reads(self.index, chunk_size)
        pulling = _Pull(plan, self._partial, self._numbers, on_progress, cancel)
        try:
            with self.chunks(cancel) as source, ThreadPoolExecutor(n_threads, thread_name_prefix="pull") as pool:
                for future in [pool.submit(pulling.work, source) for _ in range(n_threads)]:
                    future.result()
            return self._partial.complete(cancel)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._partial.remove()
            free = shutil.disk_usage(self._partial.final.parent).free
            raise DiskFull(str(self._partial.final), self.index.nbytes, free) from None

    def close(self, *, keep: bool = True) -> None:
        """Let go. What is not complete stays for the next fetch to go on with, unless `keep` is false. Twice does nothing."""
        if keep and not self._partial.given_up:
            self._partial.close()
        else:
            self._partial.remove()

    def leave(self) -> None:
        """Let go, but of nothing that is on disk: somebody uses the small files."""
        self._partial.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True)
class _Pull:
    """What the threads of one pull share."""

    plan: ReadPlan
    partial: Partial
    numbers: Sequence[int]
    on_progress: Callable[[int, int], None] | None
    cancel: threading.Event
    next: int = 0
    done: int = 0
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, source: ChunkSource) -> None:
        scratch = bytearray(self.plan.largest_read)
        try:
            while (number := self._take()) is not None:
                chunk, address = self.plan.chunks[number], libc.address_of_bytes(scratch)
                source.fetch(chunk, address)
                check(self.plan, number, address)
                if not self.partial.holds(self.numbers[chunk.file], chunk.offset, chunk.wanted):
                    self.partial.write(self.numbers[chunk.file], chunk.offset, chunk.wanted, address)
                with self.lock:
                    self.done += chunk.payload
                    if self.on_progress is not None:
                        self.on_progress(self.done, self.plan.payload)
        except BaseException:
            self.failed = True
            raise

    def _take(self) -> int | None:
        with self.lock:
            if self.cancel.is_set():
                raise Cancelled("the fetch was called off")
            if self.failed or self.next == len(self.plan.chunks):
                return None
            self.next += 1
            return self.next - 1


def is_remote(source: str) -> bool:
    """Whether `source` is the address of a directory behind HTTP, or could be the id of a model on the hub."""
    return source.startswith(("http://", "https://")) or _HUB_ID.match(source) is not None


def local_name(source: str, revision: str | None = None) -> str:
    """The name of the directory that the files of `source` are kept in: another one for each source and revision, readable."""
    if not source.startswith(("http://", "https://")):
        return source.replace("/", "--") + (f"--{quote(revision, safe='')}" if revision else "")
    parsed = _split(source.rstrip("/"))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", f"{parsed.netloc}{parsed.path}".strip("/"))[-100:].lstrip(".-")
    return f"{readable}--{hashlib.sha256(source.rstrip('/').encode()).hexdigest()[:12]}"


def find_fetched(source: str, store_dir: Path, revision: str | None = None) -> Path | None:
    """Where a complete copy of `source` is: in `store_dir`, or in the Hugging Face cache, which is used in place."""
    fetched = store_dir / local_name(source, revision)
    if fetched.is_dir():
        return fetched
    if not _HUB_ID.match(source):
        return None
    try:
        cached = Path(huggingface_hub.snapshot_download(source, revision=revision, local_files_only=True))
        # A snapshot may lack files, but has none that is not complete.
        read_index(cached)
        read_config(cached)
    except (FileNotFoundError, CheckpointError, ValueError):
        return None
    return cached


def origin_of(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
) -> Origin:
    """Where `source`, an http(s) address or a hub id, is fetched from. Raises :class:`ConfigError`."""
    if source.startswith(("http://", "https://")):
        return HttpDirectory(source, access=access, limits=limits, variant=variant)
    return HubModel(source, revision=revision, access=access, limits=limits, variant=variant)


def open_remote(
    source: str,
    store_dir: Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
    cancel: threading.Event | None = None,
) -> Fetch | Path:
    """Begin to fetch `source`, an http(s) address or a hub id, to `store_dir`; its path if a complete copy is found.

    Raises as :meth:`Fetch.open`.
    """
    if not is_remote(source):
        raise CheckpointNotFound(source, "it is neither an http(s) address nor the id of a model on the hub")
    found = find_fetched(source, store_dir, revision)
    if found is not None:
        return found
    origin = origin_of(source, revision=revision, variant=variant, access=access, limits=limits)
    final = store_dir / local_name(source, revision)
    return Fetch.open(origin, final, cancel=cancel) or final


__all__ = [
    "Access",
    "Fetch",
    "HttpDirectory",
    "HubModel",
    "Limits",
    "find_fetched",
    "is_remote",
    "local_name",
    "open_remote",
    "origin_of",
]
