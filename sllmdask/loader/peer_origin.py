"""Takes a checkpoint from other workers: :class:`PeerOrigin` is where a :class:`~sllmdask.loader.fetch.Fetch` gets it from.

A frame that arrives damaged is asked for once more. A receiver takes its place in the chain of the worker that it asks
(:mod:`sllmdask.loader.peer_chain`) and gives away what it has so far. Whoever loses what is before it in the chain goes back to
the first server for what it still misses.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, SourceUnreachable
from sllmdask.loader import libc
from sllmdask.loader.format import MAX_HEADER, CheckpointIndex, is_size
from sllmdask.loader.peer_server import DataServer, Served
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
    Damaged,
    PeerBusy,
    Refused,
    Wire,
    checked_token,
    introduce,
    parse_object,
    split_address,
)
from sllmdask.loader.plan import ChunkRead
from sllmdask.loader.sockets import Limits, Sockets
from sllmdask.loader.tee import FarFile, Manifest, Partial, check_name, checksum

logger = logging.getLogger(__name__)

#: Bytes of an answer's JSON, and files of one checkpoint.
_MAX_ANSWER, _MAX_FILES = 64 * 1024**2, 10_000


# --- a connection ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Caller:
    """What every connection of one receiver needs."""

    token: bytes
    key: str
    tls: ssl.SSLContext | None
    limits: Limits

    def connect(self, address: str, sockets: Sockets) -> _Line:
        """A connection to `address` on which both sides have proved themselves. Waits a little for a server that is busy.

        Raises :class:`OSError`, :class:`PeerBusy` and :class:`Refused`.
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
            wire = Wire(sock, self.limits.idle_s)
            sockets.add(sock)
            introduce(wire, self.token, address)
        except BaseException:
            sockets.drop(sock)
            raise
        return _Line(address, wire, sockets, self.key)


class _Line:
    """A connection to a data server."""

    def __init__(self, address: str, wire: Wire, sockets: Sockets, key: str) -> None:
        self.address, self._wire, self._sockets, self._key = address, wire, sockets, key

    def close(self) -> None:
        self._sockets.drop(self._wire.sock)

    def call(self, op: str, **more: Any) -> dict[str, Any]:
        """The answer to `op`; raises :class:`Refused` and :class:`OSError`."""
        body = json.dumps({"op": op, "key": self._key, **more}).encode()
        self._wire.send(REQUEST.pack(CALL, 0, 0, len(body)), body)
        nbytes, _ = self._reply(_MAX_ANSWER)
        return parse_object(self._wire.receive(nbytes))

    def range(self, file: int, offset: int, view: memoryview) -> tuple[int, int]:
        """Fill the first part of `view` from `offset` of a file; returns how many bytes that are, and their checksum, which was
        found right. Raises :class:`Damaged`, :class:`Refused` and :class:`OSError`.
        """
        self._wire.send(REQUEST.pack(RANGE, file, offset, view.nbytes))
        nbytes, expected = self._reply(view.nbytes)
        if nbytes == 0:
            raise Refused(BAD, "it answers without bytes")
        self._wire.receive_into(view[:nbytes])
        if checksum(libc.address_of_bytes(view), nbytes) != expected:
            raise Damaged
        return nbytes, expected

    def _reply(self, limit: int) -> tuple[int, int]:
        while True:
            status, nbytes, found = REPLY.unpack(self._wire.receive(REPLY.size))
            self._sockets.check()
            if status == WAIT:
                continue
            if status != OK:
                reason = self._wire.receive(min(nbytes, MAX_CALL)).decode(errors="replace")
                raise Refused(status, reason)
            if nbytes > limit:
                raise Refused(BAD, f"it answers with {nbytes} bytes, and {limit} were asked for")
            return nbytes, found


# --- where checkpoints are -------------------------------------------------------------------------------------------


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
        self._caller = _Caller(checked_token(token), key, tls, limits or Limits())
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
                except (OSError, PeerBusy, Refused, Damaged) as error:
                    sockets.check()
                    reasons[address] = _reason(error)
                    unknown = unknown and isinstance(error, Refused) and error.status in (UNKNOWN, GONE)
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
    if isinstance(error, Refused):
        return error.reason
    if isinstance(error, PeerBusy):
        return "it is busy"
    if isinstance(error, Damaged):
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
            except (OSError, PeerBusy, Refused, Damaged) as error:
                self._sockets.check()
                if isinstance(error, Damaged):
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
            route.reasons[route.address], route.damaged = _reason(error), isinstance(error, Damaged)
            self.n_rerouted += 1
            if route.address != route.origin and self._membership is not None:
                own = self._own_address()
                try:
                    self._membership.call("join", address=own, fingerprint=self._fingerprint, failed=[route.address])
                    self._route = replace(route, generation=generation + 1, address=route.origin)
                    return
                except (OSError, Refused) as another:
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
            except (OSError, PeerBusy, Refused) as error:
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
            raise Refused(BAD, "it names no address")
        try:
            split_address(upstream)
        except ValueError as error:
            raise Refused(BAD, str(error)) from None
        return upstream

    def _own_address(self) -> str:
        assert self._server is not None
        return self._server.address
