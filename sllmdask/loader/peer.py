"""Checkpoints from another worker of ours: its memory, or its disk, by byte ranges of their files.

:class:`DataServer` gives away what its `lookup` knows, in threads of its own; :class:`PeerOrigin` is where a receiver's
:class:`~sllmdask.loader.fetch.Fetch` takes a checkpoint from. Bytes are pulled: a connection has one request under way, so that
a receiver never gets more than it has room for. They go from the memory, or the page cache, of one side straight to their place
on the other. Each frame carries its XXH64; one that arrives damaged is asked for once more.

Several receivers of one server form a chain instead of a star: whoever comes while another one is being fed is sent on to the
last one in the chain, which gives away what it has so far; a range that has not arrived yet is waited for. The network link of
the first server thus carries the checkpoint once, however many want it. Whoever loses what is before it in the chain goes back to
the first server for what it still misses.

Both sides prove that they know the token, by HMAC over fresh random numbers; it is never sent. What is sent is not encrypted,
unless both sides are given a TLS context.

On the wire: a greeting of magic, status (ok or busy) and 32 random bytes; the receiver's 32 random bytes and its HMAC; a status
and the server's HMAC. Then requests of 24 bytes, ``op, file, offset, nbytes``, those for a range, or with a body of JSON; and
replies of 24 bytes, ``status, nbytes, checksum``, before as many bytes. Integers are in network order.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hmac
import json
import logging
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, SllmError, SourceUnreachable
from sllmdask.loader import fast_format, libc
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.format import MAX_HEADER, SMALL_PATTERNS, CheckpointIndex, is_size
from sllmdask.loader.plan import ChunkRead, ReadPlan
from sllmdask.loader.sockets import Limits, Sockets
from sllmdask.loader.tee import FarFile, Manifest, Partial, check_name, checksum

logger = logging.getLogger(__name__)

_MAGIC = b"SLLMPEER\x01"
_NONCE = _MAC = 32
_GREETING = struct.Struct(f"!{len(_MAGIC)}sB{_NONCE}s")
_REQUEST = struct.Struct("!BxxxIQQ")
_REPLY = struct.Struct("!B7xQQ")
_CALL, _RANGE = 1, 2
_OK, _WAIT, _UNKNOWN, _GONE, _BUSY, _BAD, _DENIED = range(7)
#: Bytes: of a request's JSON, of an answer's, and of one frame of data; a longer range is answered in part.
_MAX_CALL, _MAX_ANSWER, _MAX_FRAME = 64 * 1024, 64 * 1024**2, 16 * 1024**2
#: Seconds after which a receiver that waits for a range hears that it is still waited for.
_WAIT_S = 0.5
#: How many ranges are brought to the page cache when one is asked for.
_READ_AHEAD = 4
#: Seconds within which a caller must prove itself: until then anybody holds a connection.
_GREETING_S = 10.0
_MAX_FILES = 10_000
#: Ranges of one checkpoint whose checksums are kept.
_MAX_CHECKSUMS = 1_000_000


class PeerBusy(Exception):
    """The server has as many connections as it may have."""


class _Refused(Exception):
    """The server answered that it will not."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class _Damaged(Exception):
    """A frame's bytes are not those of its checksum."""


# --- a connection ----------------------------------------------------------------------------------------------------


class _Wire:
    """A connected socket: whole messages in and out, straight from and to memory, each within `idle_s` seconds of silence."""

    def __init__(self, sock: socket.socket, idle_s: float) -> None:
        self.sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._scratch = bytearray()
        self.limit(idle_s)

    def scratch(self, nbytes: int) -> bytearray:
        """At least `nbytes` of memory, the same ones each time: fresh pages are dear."""
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
        return self._scratch

    def limit(self, idle_s: float | None) -> None:
        """Allow `idle_s` seconds of silence from now on; ``None``: any, as long as the other host lives."""
        if idle_s is None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if self._tls:
            self.sock.settimeout(idle_s)
            return
        # Not Python's own timeout, which polls before each call and cannot wait for a whole message in one.
        self.sock.settimeout(None)
        # Zero is none.
        limit = struct.pack("@ll", int(idle_s or 0), int((idle_s or 0) % 1 * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def receive_into(self, view: memoryview) -> None:
        """Fill `view`; raises :class:`OSError`, :class:`TimeoutError` and, at the end, :class:`ConnectionError`."""
        while view:
            try:
                n = self.sock.recv_into(view, 0, 0 if self._tls else socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError("nothing came") from None
            if n == 0:
                raise ConnectionResetError("the other side closed the connection")
            view = view[n:]

    def receive(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self.receive_into(memoryview(data))
        return bytes(data)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of `parts`, without joining them."""
        if self._tls:
            for part in parts:
                self.sock.sendall(part)
            return
        rest = [memoryview(part) for part in parts]
        while rest:
            try:
                n = self.sock.sendmsg(rest)
            except BlockingIOError:
                raise TimeoutError("the other side takes nothing") from None
            while rest and n >= rest[0].nbytes:
                n -= rest.pop(0).nbytes
            if rest:
                rest[0] = rest[0][n:]

    def send_file(self, fd: int, offset: int, nbytes: int) -> None:
        """Send a range of a file, from the page cache."""
        while nbytes:
            if self._tls:
                data = os.pread(fd, min(nbytes, 1024**2), offset)
                self.sock.sendall(data)
                n = len(data)
            else:
                try:
                    n = os.sendfile(self.sock.fileno(), fd, offset, nbytes)
                except BlockingIOError:
                    raise TimeoutError("the other side takes nothing") from None
            if n == 0:
                raise ConnectionAbortedError("the file ends before the range")
            offset, nbytes = offset + n, nbytes - n


def _mac(token: bytes, who: bytes, challenge: bytes, answer: bytes) -> bytes:
    return hmac.digest(token, who + challenge + answer, "sha256")


def _token(token: str | bytes) -> bytes:
    data = token.encode() if isinstance(token, str) else token
    if len(data) < 16:
        raise ValueError("a token of less than 16 bytes can be guessed")
    return data


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; raises :class:`ValueError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


# --- what is given away ----------------------------------------------------------------------------------------------


class Served:
    """A checkpoint of this process that others may have: bytes of its files, from `buffer` as far as they are there as they are
    stored, else from its files, if those are complete (`on_disk`).

    With `arrivals` it may still be on its way to `buffer`, which holds, or will hold, what `plan` says. Heads and small files
    are always read from the files, which are held open: they may be renamed or removed. :meth:`close` it before the buffer's
    memory is given up, or another file takes the place of one.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        *,
        plan: ReadPlan | None = None,
        buffer: Buffer | None = None,
        arrivals: Arrivals | None = None,
        on_disk: bool = True,
    ) -> None:
        self._plan, self._buffer, self._arrivals, self._on_disk = plan, buffer, arrivals, on_disk
        self.fingerprint, self.format = index.fingerprint, index.format
        self._lock = threading.Condition()
        self._users: dict[int, socket.socket] = {}
        self._n_uses = 0
        self._closed = False
        self._checksums: dict[tuple[int, int, int], int] = {}
        self._fds: list[int] = []
        self.files: list[dict[str, Any]] = []
        try:
            self._open(index)
        except BaseException:
            self.close()
            raise
        self._chunks: list[list[tuple[int, int]]] = [[] for _ in self.files]
        for number, chunk in enumerate(plan.chunks if plan is not None else ()):
            self._chunks[chunk.file].append((chunk.offset, number))
            if chunk.checksum is not None:
                self._checksums[chunk.file, chunk.offset, chunk.wanted] = chunk.checksum
        for chunks in self._chunks:
            chunks.sort()

    def _open(self, index: CheckpointIndex) -> None:
        """Data files first, by the index's numbers, then small ones."""
        for file in index.files:
            self._add(index.directory, file.name, file.data_offset)
            for entry in file.chunks:
                self._checksums[len(self.files) - 1, entry.offset, entry.stored] = entry.checksum
        data = {file.name for file in index.files}
        for name in sorted(os.listdir(index.directory)):
            if name in data or name.startswith(".") or not any(fnmatch.fnmatchcase(name, p) for p in SMALL_PATTERNS):
                continue
            path = Path(index.directory, name)
            if not path.is_file() or path.stat().st_size > MAX_HEADER:
                continue
            if name in fast_format.INDEXES.values() and not _is_index(path, index.fingerprint):
                # Of another variant, whose data files are not given away.
                continue
            self._add(index.directory, name, None)

    def _add(self, directory: str, name: str, head: int | None) -> None:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        found = os.fstat(fd)
        self.files.append(
            {
                "name": name,
                "nbytes": found.st_size,
                "head": found.st_size if head is None else head,
                "modified_ns": found.st_mtime_ns,
            }
        )

    def note(self, file: int, offset: int, nbytes: int, found: int) -> None:
        """The checksum of a range is known already."""
        with self._lock:
            if len(self._checksums) < _MAX_CHECKSUMS:
                self._checksums[file, offset, nbytes] = found

    def close(self) -> None:
        """Give nothing away any more; returns when no thread uses the memory. Whoever was being fed is cut off."""
        with self._lock:
            self._closed = True
            for sock in self._users.values():
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            self._lock.wait_for(lambda: not self._users)
            fds, self._fds, self._buffer = self._fds, [], None
        for fd in fds:
            os.close(fd)

    def send(self, wire: _Wire, file: int, offset: int, nbytes: int) -> None:
        """Answer the request for a range, or the first part of it."""
        if file >= len(self.files) or nbytes == 0 or offset + nbytes > self.files[file]["nbytes"]:
            raise _Refused(_BAD, f"there are no bytes [{offset}, {offset + nbytes}) of file {file}")
        with self._using(wire):
            # Heads are on disk before the first chunk is anywhere.
            in_head = offset + nbytes <= self.files[file]["head"]
            number = None if in_head else self._chunk_at(file, offset)
            if number is not None and self._plan is not None:
                chunk = self._plan.chunks[number]
                nbytes = min(nbytes, chunk.offset + chunk.wanted - offset, _MAX_FRAME)
                if chunk.codec == "raw":
                    self._wait(wire, number)
                    self._send_memory(wire, file, offset, nbytes, chunk.position + offset - chunk.offset)
                    return
                if not self._on_disk:
                    raise _Refused(_GONE, "its compressed bytes are not on this host's disk")
            elif not self._on_disk and not in_head:
                raise _Refused(_GONE, "these bytes are not on this host")
            self._send_file(wire, file, offset, min(nbytes, _MAX_FRAME))

    @contextlib.contextmanager
    def _using(self, wire: _Wire) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise _Refused(_GONE, "it is not here any more")
            self._n_uses += 1
            use = self._n_uses
            self._users[use] = wire.sock
        try:
            yield
        finally:
            with self._lock:
                del self._users[use]
                self._lock.notify_all()

    def _chunk_at(self, file: int, offset: int) -> int | None:
        """The number of the chunk whose bytes in the file hold the one at `offset`; only where there is a buffer."""
        if self._plan is None or self._buffer is None:
            return None
        at = bisect_right(self._chunks[file], offset, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None
        number = self._chunks[file][at][1]
        chunk = self._plan.chunks[number]
        return number if offset < chunk.offset + chunk.wanted else None

    def _wait(self, wire: _Wire, number: int) -> None:
        if self._arrivals is None:
            return
        while True:
            try:
                self._arrivals.wait_chunk(number, _WAIT_S)
                return
            except TimeoutError:
                if self._closed:
                    raise _Refused(_GONE, "it is not here any more") from None
                # Fails once the receiver is gone.
                wire.send(_REPLY.pack(_WAIT, 0, 0))
            except SllmError as error:
                raise _Refused(_GONE, f"it does not come here: {error.message}") from None
            except OSError as error:
                raise _Refused(_GONE, f"it does not come here: {error}") from None

    def _send_memory(self, wire: _Wire, file: int, offset: int, nbytes: int, position: int) -> None:
        assert self._buffer is not None
        address = address_of(self._buffer) + position
        found = self._checksums.get((file, offset, nbytes))
        if found is None:
            found = checksum(address, nbytes)
            self.note(file, offset, nbytes, found)
        wire.send(_REPLY.pack(_OK, nbytes, found), libc.memory_view(address, nbytes))

    def _send_file(self, wire: _Wire, file: int, offset: int, nbytes: int) -> None:
        # This range at once, and those that the receiver asks for next: the system's own read-ahead is small.
        os.posix_fadvise(self._fds[file], offset, _READ_AHEAD * nbytes, os.POSIX_FADV_WILLNEED)
        found = self._checksums.get((file, offset, nbytes))
        if found is not None:
            wire.send(_REPLY.pack(_OK, nbytes, found))
            wire.send_file(self._fds[file], offset, nbytes)
            return
        # Whoever needs a checksum needs the bytes.
        scratch, done = wire.scratch(nbytes), 0
        view = memoryview(scratch)[:nbytes]
        while done < nbytes:
            n = os.preadv(self._fds[file], [view[done:]], offset + done)
            if n == 0:
                raise _Refused(_GONE, f"{self.files[file]['name']} was cut short on this host")
            done += n
        wire.send(_REPLY.pack(_OK, nbytes, checksum(libc.address_of_bytes(scratch), nbytes)), view)


def _is_index(path: Path, fingerprint: str) -> bool:
    with open(path, "rb") as file:
        return f'"sha256":"{fingerprint}"'.encode() in file.readline(4096)


# --- the server ------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Member:
    """One receiver that this server sees to, itself or by the chain; `address` is that of its own server."""

    address: str


class DataServer:
    """Gives away checkpoints to whoever knows `token`, at `host` and `port` (0: any free one; see :attr:`address`).

    ``lookup(key)``, called in any thread, says what there is. At most `max_connections` are served at a time; the next hear that
    it is busy. One without a request for `idle_s` seconds is closed. `advertise` is the host that others reach this one by.
    Without `chain`, every receiver is fed from here.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str | bytes,
        lookup: Callable[[str], Served | None],
        *,
        advertise: str | None = None,
        tls: ssl.SSLContext | None = None,
        max_connections: int = 64,
        idle_s: float = 60.0,
        chain: bool = True,
    ) -> None:
        self.lookup = lookup
        self._token, self._tls, self._idle_s, self._chain = _token(token), tls, idle_s, chain
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._sockets: dict[threading.Thread, socket.socket] = {}
        self._members: dict[str, list[_Member]] = {}
        self._closed = False
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
        self.port: int = self._listener.getsockname()[1]
        name = advertise or host
        #: ``host:port``
        self.address = f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"
        self._acceptor = threading.Thread(target=self._accept, name="peer-accept", daemon=True)
        self._acceptor.start()

    def receivers(self, key: str) -> list[str]:
        """The addresses of those that are in the chain of `key`, the first fed from here."""
        with self._lock:
            return [member.address for member in self._members.get(key, [])]

    def close(self) -> None:
        """Cut everybody off; returns when all threads have ended."""
        with self._lock:
            self._closed = True
            sockets = list(self._sockets.items())
        for sock in (self._listener, *(sock for _, sock in sockets)):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread, _ in sockets:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                # Out of descriptors, or a connection that was gone already.
                time.sleep(0.05)
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="peer-serve", daemon=True)
            with self._lock:
                if not self._closed and len(self._sockets) < self._max_connections:
                    self._sockets[thread] = sock
                    thread.start()
                    continue
            with contextlib.suppress(OSError), sock:
                sock.setblocking(False)
                if self._tls is None:
                    sock.send(_GREETING.pack(_MAGIC, _BUSY, bytes(_NONCE)))

    def _serve(self, sock: socket.socket) -> None:
        joined: list[tuple[str, _Member]] = []
        try:
            if self._tls is not None:
                sock.settimeout(min(_GREETING_S, self._idle_s))
                sock = self._tls.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._sockets[threading.current_thread()] = sock
            wire = _Wire(sock, min(_GREETING_S, self._idle_s))
            if self._greet(wire):
                wire.limit(self._idle_s)
                self._answer_all(wire, joined)
        except OSError as error:
            # It went away, fell silent, or does not speak TLS.
            logger.debug("peer connection ended cause=%s", error)
        finally:
            for key, member in joined:
                self._leave(key, member)
            with self._lock:
                self._sockets.pop(threading.current_thread(), None)
            sock.close()

    def _greet(self, wire: _Wire) -> bool:
        challenge = secrets.token_bytes(_NONCE)
        wire.send(_GREETING.pack(_MAGIC, _OK, challenge))
        answer = wire.receive(_NONCE + _MAC)
        nonce, mac = answer[:_NONCE], answer[_NONCE:]
        if not hmac.compare_digest(mac, _mac(self._token, b"receiver", challenge, nonce)):
            logger.warning("peer refused cause=wrong token")
            wire.send(bytes([_DENIED]) + bytes(_MAC))
            return False
        wire.send(bytes([_OK]) + _mac(self._token, b"server", challenge, nonce))
        return True

    def _answer_all(self, wire: _Wire, joined: list[tuple[str, _Member]]) -> None:
        served: Served | None = None
        while True:
            op, file, offset, nbytes = _REQUEST.unpack(wire.receive(_REQUEST.size))
            try:
                if op == _RANGE and served is not None:
                    served.send(wire, file, offset, nbytes)
                elif op == _CALL and nbytes <= _MAX_CALL:
                    call = _parse_object(wire.receive(nbytes))
                    served = self._served(call)
                    answer = json.dumps(self._answer(call, served, joined)).encode()
                    if joined:
                        # A member says nothing until the end of its load.
                        wire.limit(None)
                    wire.send(_REPLY.pack(_OK, len(answer), 0), answer)
                else:
                    raise _Refused(_BAD, "this is no request")
            except _Refused as refused:
                text = refused.reason.encode()[:_MAX_CALL]
                wire.send(_REPLY.pack(refused.status, len(text), 0), text)
                if refused.status == _BAD:
                    return

    def _served(self, call: Mapping[str, Any]) -> Served:
        key, fingerprint = call.get("key"), call.get("fingerprint")
        found = self.lookup(key) if isinstance(key, str) else None
        if found is None:
            raise _Refused(_UNKNOWN, f"{key!r} is not here")
        if fingerprint is not None and fingerprint != found.fingerprint:
            raise _Refused(_UNKNOWN, f"{key!r} is here in another version")
        return found

    def _answer(self, call: Mapping[str, Any], served: Served, joined: list[tuple[str, _Member]]) -> dict[str, Any]:
        match call.get("op"):
            case "open":
                return {"fingerprint": served.fingerprint, "format": served.format, "files": served.files}
            case "use":
                return {}
            case "join":
                address, failed = call.get("address"), call.get("failed", [])
                if not isinstance(address, str) or not isinstance(failed, list):
                    raise _Refused(_BAD, "join needs an address and a list of those that failed")
                return {"upstream": self._join(call["key"], address, failed, joined)}
        raise _Refused(_BAD, "there is no such op")

    def _join(self, key: str, address: str, failed: list[Any], joined: list[tuple[str, _Member]]) -> str | None:
        """The address of the one that `address` is to be fed by; ``None``: by this server."""
        with self._lock:
            members = self._members.setdefault(key, [])
            members[:] = [member for member in members if member.address not in failed]
            if any(member.address == address for _, member in joined):
                # It is in the chain already, and others may be fed by it: to send it on could close a circle.
                return None
            members[:] = [member for member in members if member.address != address]
            upstream = members[-1].address if members and self._chain and not failed else None
            member = _Member(address)
            members.append(member)
            joined.append((key, member))
            return upstream

    def _leave(self, key: str, member: _Member) -> None:
        with self._lock:
            members = self._members.get(key, [])
            if member in members:
                members.remove(member)
            if not members:
                self._members.pop(key, None)


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise _Refused(_BAD, "the request is not valid JSON") from None
    if not isinstance(data, dict):
        raise _Refused(_BAD, "the request is not an object")
    return data


# --- the receiver ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Caller:
    """What every connection of one receiver needs."""

    token: bytes
    key: str
    tls: ssl.SSLContext | None
    limits: Limits

    def connect(self, address: str, sockets: Sockets) -> _Line:
        """A connection to `address` on which both sides have proved themselves. Waits a little for a server that is busy.

        Raises :class:`OSError`, :class:`PeerBusy` and :class:`_Refused`.
        """
        for attempt in range(self.limits.attempts):
            sockets.check()
            try:
                return self._connect(address, sockets)
            except PeerBusy:
                if attempt + 1 == self.limits.attempts:
                    raise
            sockets.cancel.wait(self.limits.backoff_s * 2**attempt)
        raise PeerBusy(address)

    def _connect(self, address: str, sockets: Sockets) -> _Line:
        host, port = split_address(address)
        sock = socket.create_connection((host, port), self.limits.connect_s)
        try:
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_hostname=host)
            wire = _Wire(sock, self.limits.idle_s)
            sockets.add(sock)
            magic, status, challenge = _GREETING.unpack(wire.receive(_GREETING.size))
            if magic != _MAGIC:
                raise _Refused(_BAD, "it is no data server of ours, or one of another version")
            if status != _OK:
                raise PeerBusy(address)
            nonce = secrets.token_bytes(_NONCE)
            wire.send(nonce + _mac(self.token, b"receiver", challenge, nonce))
            reply = wire.receive(1 + _MAC)
            if reply[0] != _OK or not hmac.compare_digest(reply[1:], _mac(self.token, b"server", challenge, nonce)):
                raise _Refused(_DENIED, "it does not accept our token, or does not know it")
        except BaseException:
            sockets.drop(sock)
            raise
        return _Line(address, wire, sockets, self.key)


class _Line:
    """A connection to a data server."""

    def __init__(self, address: str, wire: _Wire, sockets: Sockets, key: str) -> None:
        self.address, self._wire, self._sockets, self._key = address, wire, sockets, key

    def close(self) -> None:
        self._sockets.drop(self._wire.sock)

    def call(self, op: str, **more: Any) -> dict[str, Any]:
        """The answer to `op`; raises :class:`_Refused` and :class:`OSError`."""
        body = json.dumps({"op": op, "key": self._key, **more}).encode()
        self._wire.send(_REQUEST.pack(_CALL, 0, 0, len(body)), body)
        nbytes, _ = self._reply(_MAX_ANSWER)
        return _parse_object(self._wire.receive(nbytes))

    def range(self, file: int, offset: int, view: memoryview) -> tuple[int, int]:
        """Fill the first part of `view` from `offset` of a file; returns how many bytes that are, and their checksum, which was
        found right. Raises :class:`_Damaged`, :class:`_Refused` and :class:`OSError`.
        """
        self._wire.send(_REQUEST.pack(_RANGE, file, offset, view.nbytes))
        nbytes, expected = self._reply(view.nbytes)
        if nbytes == 0:
            raise _Refused(_BAD, "it answers without bytes")
        self._wire.receive_into(view[:nbytes])
        if checksum(libc.address_of_bytes(view), nbytes) != expected:
            raise _Damaged
        return nbytes, expected

    def _reply(self, limit: int) -> tuple[int, int]:
        while True:
            status, nbytes, found = _REPLY.unpack(self._wire.receive(_REPLY.size))
            self._sockets.check()
            if status == _WAIT:
                continue
            if status != _OK:
                reason = self._wire.receive(min(nbytes, _MAX_CALL)).decode(errors="replace")
                raise _Refused(status, reason)
            if nbytes > limit:
                raise _Refused(_BAD, f"it answers with {nbytes} bytes, and {limit} were asked for")
            return nbytes, found


class PeerOrigin:
    """Checkpoint `key` of other workers, at `addresses` (``host:port``): the first that answers, then, if it fails, the next.

    All of `addresses` must hold the checkpoint complete: two that wait for each other would wait forever. With `server`, this
    process's own, the receiver takes its place in a chain, as soon as that server knows the key.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        token: str | bytes,
        key: str,
        *,
        server: DataServer | None = None,
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        for address in addresses:
            split_address(address)
        self._addresses, self._server = tuple(addresses), server
        self._caller = _Caller(_token(token), key, tls, limits or Limits())
        self._fingerprint = ""

    def survey(self, cancel: threading.Event) -> Manifest:
        """The layout, from the first of the addresses that knows the key.

        Raises :class:`CheckpointNotFound` if none does, :class:`SourceUnreachable`, :class:`CheckpointCorrupt` and
        :class:`Cancelled`.
        """
        reasons = {}
        unknown = True
        with Sockets(cancel) as sockets:
            for address in self._addresses:
                try:
                    return self._survey(address, sockets)
                except (OSError, PeerBusy, _Refused, _Damaged) as error:
                    sockets.check()
                    reasons[address] = _reason(error)
                    unknown = unknown and isinstance(error, _Refused) and error.status in (_UNKNOWN, _GONE)
        told = "; ".join(f"{address}: {reason}" for address, reason in reasons.items()) or "no worker is known to have it"
        raise (CheckpointNotFound if unknown else SourceUnreachable)(self._caller.key, told)

    def _survey(self, address: str, sockets: Sockets) -> Manifest:
        line = self._caller.connect(address, sockets)
        answer = line.call("open")
        entries, fingerprint = answer.get("files"), answer.get("fingerprint")
        if not isinstance(entries, list) or not isinstance(fingerprint, str) or len(entries) > _MAX_FILES:
            raise CheckpointCorrupt(address, None, "its answer says neither files nor a fingerprint")
        files = [_far_file(address, entry) for entry in entries]
        if sum(head for _, head in files) > 4 * MAX_HEADER:
            raise CheckpointCorrupt(address, None, "its heads and small files have more bytes than any checkpoint's")
        self._fingerprint = fingerprint
        filled = []
        for number, (file, n_head) in enumerate(files):
            head, done = memoryview(bytearray(n_head)), 0
            while done < n_head:
                done += line.range(number, done, head[done:])[0]
            filled.append(FarFile(file.name, file.nbytes, bytes(head), file.modified_ns, fingerprint))
        return Manifest(self._caller.key, fingerprint, tuple(filled))

    def chunks(
        self,
        index: CheckpointIndex,  # noqa: ARG002 - another origin needs it
        partial: Partial,  # noqa: ARG002
        numbers: Sequence[int],
        cancel: threading.Event,
    ) -> PeerSource:
        """A source of the bytes of files whose numbers at the server are `numbers`."""
        return PeerSource(self._addresses, self._caller, self._fingerprint, numbers, self._server, cancel)


def _far_file(address: str, entry: Any) -> tuple[FarFile, int]:
    """One file of an answer, and the bytes of its head."""
    if not isinstance(entry, dict):
        raise CheckpointCorrupt(address, None, "its answer is not a list of files")
    name = entry.get("name")
    nbytes, head, modified_ns = (entry.get(field) for field in ("nbytes", "head", "modified_ns"))
    if not isinstance(name, str) or not (is_size(nbytes) and is_size(head) and is_size(modified_ns)):
        raise CheckpointCorrupt(address, None, "its answer has a file without a name or sizes")
    assert isinstance(nbytes, int)
    assert isinstance(head, int)
    assert isinstance(modified_ns, int)
    check_name(address, name)
    if head > min(nbytes, 8 + MAX_HEADER):
        raise CheckpointCorrupt(address, None, f"it says that {name} has {nbytes} bytes, {head} of them its head")
    return FarFile(name, nbytes, b"", modified_ns), head


def _reason(error: BaseException) -> str:
    if isinstance(error, _Refused):
        return error.reason
    if isinstance(error, PeerBusy):
        return "it is busy"
    if isinstance(error, _Damaged):
        return "its bytes arrive damaged"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@dataclass(slots=True)
class _Route:
    """Where the chunks come from now; `generation` tells connections that were made for an earlier route."""

    generation: int = 0
    address: str = ""
    #: Of the addresses, the one whose chain this receiver is in.
    origin: str = ""
    left: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    damaged: bool = False


class PeerSource:
    """A :class:`ChunkSource` of what other workers have; made by :class:`PeerOrigin`."""

    def __init__(
        self,
        addresses: Sequence[str],
        caller: _Caller,
        fingerprint: str,
        numbers: Sequence[int],
        server: DataServer | None,
        cancel: threading.Event,
    ) -> None:
        self._caller, self._fingerprint, self._numbers, self._server = caller, fingerprint, numbers, server
        self._sockets = Sockets(cancel)
        self._route = _Route(left=list(addresses))
        self._lock = threading.Lock()
        self._local = threading.local()
        self._membership: _Line | None = None
        self._served: Served | None = None
        #: Frames that arrived damaged, and routes that were left, so far.
        self.n_damaged = self.n_rerouted = 0

    def __enter__(self) -> Self:
        self._sockets.__enter__()
        try:
            self._served = self._server.lookup(self._caller.key) if self._server is not None else None
            with self._lock:
                self._advance()
        except BaseException:
            self._sockets.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sockets.__exit__(kind, error, trace)

    @property
    def upstream(self) -> str:
        """The address that chunks come from now."""
        return self._route.address

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring the wanted bytes of `chunk` to `address`, each frame checked.

        Raises :class:`SourceUnreachable` when no address is left, :class:`CheckpointCorrupt` if the last one's frames are
        damaged, and :class:`Cancelled`.
        """
        view, done, damaged, broken = libc.memory_view(address, chunk.wanted), 0, 0, 0
        file = self._numbers[chunk.file]
        while done < chunk.wanted:
            generation = self._route.generation
            try:
                nbytes, found = self._line().range(file, chunk.offset + done, view[done:])
            except (OSError, PeerBusy, _Refused, _Damaged) as error:
                self._sockets.check()
                if isinstance(error, _Damaged):
                    damaged += 1
                    self.n_damaged += 1
                    if damaged < 2:
                        continue
                else:
                    self._hang_up()
                    broken += 1
                    # A connection may be closed because it was idle: the next one tells whether its server is gone.
                    if broken < 2 and isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionRefusedError):
                        continue
                damaged = broken = 0
                self._leave(generation, error)
                continue
            if self._served is not None:
                self._served.note(chunk.file, chunk.offset + done, nbytes, found)
            done += nbytes
            damaged = broken = 0

    # --- the route -------------------------------------------------------------------------------------------------------

    def _line(self) -> _Line:
        """This thread's connection to where the chunks come from now."""
        route = self._route
        generation, address = route.generation, route.address
        line: _Line | None = getattr(self._local, "line", None)
        if line is not None and self._local.generation == generation:
            return line
        self._hang_up()
        line = self._caller.connect(address, self._sockets)
        try:
            line.call("use", fingerprint=self._fingerprint)
        except BaseException:
            line.close()
            raise
        self._local.line, self._local.generation = line, generation
        return line

    def _hang_up(self) -> None:
        line: _Line | None = getattr(self._local, "line", None)
        if line is not None:
            self._local.line = None
            line.close()

    def _leave(self, generation: int, error: BaseException) -> None:
        """The route of `generation` failed: take another one, unless another thread has done so."""
        with self._lock:
            route = self._route
            if route.generation != generation:
                return
            if route.address not in route.reasons:
                logger.warning("peer failed key=%s address=%s cause=%s", self._caller.key, route.address, _reason(error))
            route.reasons[route.address], route.damaged = _reason(error), isinstance(error, _Damaged)
            self.n_rerouted += 1
            if route.address != route.origin and self._membership is not None:
                own = self._own_address()
                try:
                    self._membership.call("join", address=own, fingerprint=self._fingerprint, failed=[route.address])
                    self._route = replace(route, generation=generation + 1, address=route.origin)
                    return
                except (OSError, _Refused) as another:
                    self._sockets.check()
                    route.reasons[route.origin] = _reason(another)
            self._advance()

    def _advance(self) -> None:
        """Take the next of the addresses that answers."""
        route = self._route
        while route.left:
            origin = route.left.pop(0)
            try:
                upstream = self._join(origin, again=bool(route.reasons))
            except (OSError, PeerBusy, _Refused) as error:
                self._sockets.check()
                route.reasons[origin] = _reason(error)
                route.damaged = False
                continue
            self._route = replace(route, generation=route.generation + 1, address=upstream, origin=origin)
            return
        # The threads that come later find the same.
        told = "; ".join(f"{address}: {reason}" for address, reason in route.reasons.items()) or "no worker is known to have it"
        if route.damaged:
            raise CheckpointCorrupt(self._caller.key, None, f"its bytes arrive damaged, twice in a row ({told})")
        raise SourceUnreachable(self._caller.key, told)

    def _join(self, origin: str, *, again: bool) -> str:
        """Take a place in `origin`'s chain; returns the address to be fed from. The connection is the membership."""
        if self._membership is not None:
            self._membership.close()
            self._membership = None
        line = self._caller.connect(origin, self._sockets)
        if self._served is None:
            line.call("use", fingerprint=self._fingerprint)
            line.close()
            return origin
        self._membership = line
        failed = list(self._route.reasons) if again else []
        answer = line.call("join", address=self._own_address(), fingerprint=self._fingerprint, failed=failed)
        upstream = answer.get("upstream")
        if upstream is None:
            return origin
        if not isinstance(upstream, str):
            raise _Refused(_BAD, "it names no address")
        try:
            split_address(upstream)
        except ValueError as error:
            raise _Refused(_BAD, str(error)) from None
        return upstream

    def _own_address(self) -> str:
        assert self._server is not None
        return self._server.address


__all__ = ["DataServer", "PeerOrigin", "PeerSource", "Served", "split_address"]
