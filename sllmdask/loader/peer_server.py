"""Gives checkpoints of this process to other workers: from its memory, or its disk, by byte ranges of their files.

:class:`DataServer` gives away what its `lookup` knows, in threads of its own. Bytes are pulled: a connection has one request
under way, so that a receiver never gets more than it has room for. They go from the memory, or the page cache, of one side
straight to their place on the other.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import socket
import ssl
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sllmdask.errors import SllmError
from sllmdask.loader import fast_format, libc
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.format import MAX_HEADER, SMALL_PATTERNS, CheckpointIndex
from sllmdask.loader.peer_chain import Chains, Member
from sllmdask.loader.peer_listener import PeerListener
from sllmdask.loader.peer_wire import (
    BAD,
    CALL,
    GONE,
    MAX_CALL,
    OK,
    RANGE,
    REPLY,
    REQUEST,
    UNKNOWN,
    WAIT,
    Refused,
    Wire,
    parse_object,
)
from sllmdask.loader.plan import ReadPlan
from sllmdask.loader.tee import checksum

logger = logging.getLogger(__name__)

#: Bytes of one frame of data; a longer range is answered in part.
_MAX_FRAME = 16 * 1024**2
#: Seconds after which a receiver that waits for a range hears that it is still waited for.
_WAIT_S = 0.5
#: How many ranges are brought to the page cache when one is asked for.
_READ_AHEAD = 4
#: Ranges of one checkpoint whose checksums are kept.
_MAX_CHECKSUMS = 1_000_000


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
        # sentence-transformers' way of pooling is in a folder of its own.
        nested = [f"{path.parent.name}/{path.name}" for path in sorted(Path(index.directory).glob("[!.]*/config.json"))]
        for name in [*sorted(os.listdir(index.directory)), *nested]:
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

    def send(self, wire: Wire, file: int, offset: int, nbytes: int) -> None:
        """Answer the request for a range, or the first part of it."""
        if file >= len(self.files) or nbytes == 0 or offset + nbytes > self.files[file]["nbytes"]:
            raise Refused(BAD, f"there are no bytes [{offset}, {offset + nbytes}) of file {file}")
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
                    raise Refused(GONE, "its compressed bytes are not on this host's disk")
            elif not self._on_disk and not in_head:
                raise Refused(GONE, "these bytes are not on this host")
            self._send_file(wire, file, offset, min(nbytes, _MAX_FRAME))

    @contextlib.contextmanager
    def _using(self, wire: Wire) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise Refused(GONE, "it is not here any more")
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

    def _wait(self, wire: Wire, number: int) -> None:
        if self._arrivals is None:
            return
        while True:
            try:
                self._arrivals.wait_chunk(number, _WAIT_S)
                return
            except TimeoutError:
                if self._closed:
                    raise Refused(GONE, "it is not here any more") from None
                # Fails once the receiver is gone.
                wire.send(REPLY.pack(WAIT, 0, 0))
            except SllmError as error:
                raise Refused(GONE, f"it does not come here: {error.message}") from None
            except OSError as error:
                raise Refused(GONE, f"it does not come here: {error}") from None

    def _send_memory(self, wire: Wire, file: int, offset: int, nbytes: int, position: int) -> None:
        assert self._buffer is not None
        address = address_of(self._buffer) + position
        found = self._checksums.get((file, offset, nbytes))
        if found is None:
            found = checksum(address, nbytes)
            self.note(file, offset, nbytes, found)
        wire.send(REPLY.pack(OK, nbytes, found), libc.memory_view(address, nbytes))

    def _send_file(self, wire: Wire, file: int, offset: int, nbytes: int) -> None:
        # This range at once, and those that the receiver asks for next: the system's own read-ahead is small.
        os.posix_fadvise(self._fds[file], offset, _READ_AHEAD * nbytes, os.POSIX_FADV_WILLNEED)
        found = self._checksums.get((file, offset, nbytes))
        if found is not None:
            wire.send(REPLY.pack(OK, nbytes, found))
            wire.send_file(self._fds[file], offset, nbytes)
            return
        # Whoever needs a checksum needs the bytes.
        scratch, done = wire.scratch(nbytes), 0
        view = memoryview(scratch)[:nbytes]
        while done < nbytes:
            n = os.preadv(self._fds[file], [view[done:]], offset + done)
            if n == 0:
                raise Refused(GONE, f"{self.files[file]['name']} was cut short on this host")
            done += n
        wire.send(REPLY.pack(OK, nbytes, checksum(libc.address_of_bytes(scratch), nbytes)), view)


def _is_index(path: Path, fingerprint: str) -> bool:
    with open(path, "rb") as file:
        return f'"sha256":"{fingerprint}"'.encode() in file.readline(4096)


# --- the server ------------------------------------------------------------------------------------------------------


class DataServer(PeerListener):
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
        self._chains = Chains(linked=chain)
        super().__init__(host, port, token, advertise=advertise, tls=tls, max_connections=max_connections, idle_s=idle_s)

    def receivers(self, key: str) -> list[str]:
        """The addresses of those that are in the chain of `key`, the first fed from here."""
        return self._chains.receivers(key)

    def serve(self, wire: Wire) -> None:
        joined: list[tuple[str, Member]] = []
        try:
            self._answer_all(wire, joined)
        finally:
            for key, member in joined:
                self._chains.leave(key, member)

    def _answer_all(self, wire: Wire, joined: list[tuple[str, Member]]) -> None:
        served: Served | None = None
        while True:
            op, file, offset, nbytes = REQUEST.unpack(wire.receive(REQUEST.size))
            try:
                if op == RANGE and served is not None:
                    served.send(wire, file, offset, nbytes)
                elif op == CALL and nbytes <= MAX_CALL:
                    call = parse_object(wire.receive(nbytes))
                    served = self._served(call)
                    answer = json.dumps(self._answer(call, served, joined)).encode()
                    if joined:
                        # A member says nothing until the end of its load.
                        wire.limit(None)
                    wire.send(REPLY.pack(OK, len(answer), 0), answer)
                else:
                    raise Refused(BAD, "this is no request")
            except Refused as refused:
                text = refused.reason.encode()[:MAX_CALL]
                wire.send(REPLY.pack(refused.status, len(text), 0), text)
                if refused.status == BAD:
                    return

    def _served(self, call: Mapping[str, Any]) -> Served:
        key, fingerprint = call.get("key"), call.get("fingerprint")
        found = self.lookup(key) if isinstance(key, str) else None
        if found is None:
            raise Refused(UNKNOWN, f"{key!r} is not here")
        if fingerprint is not None and fingerprint != found.fingerprint:
            raise Refused(UNKNOWN, f"{key!r} is here in another version")
        return found

    def _answer(self, call: Mapping[str, Any], served: Served, joined: list[tuple[str, Member]]) -> dict[str, Any]:
        match call.get("op"):
            case "open":
                return {"fingerprint": served.fingerprint, "format": served.format, "files": served.files}
            case "use":
                return {}
            case "join":
                address, failed = call.get("address"), call.get("failed", [])
                if not isinstance(address, str) or not isinstance(failed, list):
                    raise Refused(BAD, "join needs an address and a list of those that failed")
                return {"upstream": self._chains.join(call["key"], address, failed, joined)}
        raise Refused(BAD, "there is no such op")
