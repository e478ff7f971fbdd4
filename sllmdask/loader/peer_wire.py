"""The wire between two workers: whole messages over a connection on which both sides prove that they know the same token.

They prove it by HMAC over fresh random numbers; the token is never sent. What is sent is not encrypted, unless both sides are
given a TLS context.

On the wire: a greeting of magic, status (ok or busy) and 32 random bytes; the receiver's 32 random bytes and its HMAC; a status
and the server's HMAC. Then requests of 24 bytes, ``op, file, offset, nbytes``, those for a range, or with a body of JSON; and
replies of 24 bytes, ``status, nbytes, checksum`` (XXH64), before as many bytes. Integers are in network order.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import socket
import ssl
import struct
from typing import Any

logger = logging.getLogger(__name__)

MAGIC = b"SLLMPEER\x01"
_NONCE = _MAC = 32
GREETING = struct.Struct(f"!{len(MAGIC)}sB{_NONCE}s")
REQUEST = struct.Struct("!BxxxIQQ")
REPLY = struct.Struct("!B7xQQ")
CALL, RANGE = 1, 2
OK, WAIT, UNKNOWN, GONE, BUSY, BAD, DENIED = range(7)
#: What a server says instead of a greeting that has as many connections as it may have.
BUSY_GREETING = GREETING.pack(MAGIC, BUSY, bytes(_NONCE))
#: Bytes of a request's JSON.
MAX_CALL = 64 * 1024


class PeerBusy(Exception):
    """The server has as many connections as it may have."""


class Refused(Exception):
    """The server answered that it will not."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Damaged(Exception):
    """A frame's bytes are not those of its checksum."""


class Wire:
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


def _proof(token: bytes, who: bytes, challenge: bytes, answer: bytes) -> bytes:
    return hmac.digest(token, who + challenge + answer, "sha256")


def greet(wire: Wire, token: bytes) -> bool:
    """The server's side of the greeting; returns whether the receiver knows `token`."""
    challenge = secrets.token_bytes(_NONCE)
    wire.send(GREETING.pack(MAGIC, OK, challenge))
    answer = wire.receive(_NONCE + _MAC)
    nonce, mac = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(mac, _proof(token, b"receiver", challenge, nonce)):
        logger.warning("peer refused cause=wrong token")
        wire.send(bytes([DENIED]) + bytes(_MAC))
        return False
    wire.send(bytes([OK]) + _proof(token, b"server", challenge, nonce))
    return True


def introduce(wire: Wire, token: bytes, address: str) -> None:
    """The receiver's side of the greeting, with the server at `address`.

    Raises :class:`PeerBusy`, :class:`Refused` and :class:`OSError`.
    """
    magic, status, challenge = GREETING.unpack(wire.receive(GREETING.size))
    if magic != MAGIC:
        raise Refused(BAD, "it is no data server of ours, or one of another version")
    if status != OK:
        raise PeerBusy(address)
    nonce = secrets.token_bytes(_NONCE)
    wire.send(nonce + _proof(token, b"receiver", challenge, nonce))
    reply = wire.receive(1 + _MAC)
    if reply[0] != OK or not hmac.compare_digest(reply[1:], _proof(token, b"server", challenge, nonce)):
        raise Refused(DENIED, "it does not accept our token, or does not know it")


def dial(address: str, token: bytes, tls: ssl.SSLContext | None, *, connect_s: float, idle_s: float) -> Wire:
    """A connection to the listener at `address` (``host:port``) on which both sides have proved themselves.

    Raises :class:`PeerBusy`, :class:`Refused` and :class:`OSError`.
    """
    host, port = split_address(address)
    sock = socket.create_connection((host, port), connect_s)
    try:
        sock.settimeout(connect_s)
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname=host)
        wire = Wire(sock, connect_s)
        introduce(wire, token, address)
        wire.limit(idle_s)
    except BaseException:
        sock.close()
        raise
    return wire


def checked_token(token: str | bytes) -> bytes:
    """`token` as bytes; raises :class:`ValueError` for one that can be guessed."""
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


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object of a request or an answer; raises :class:`Refused`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(BAD, "the request is not valid JSON") from None
    if not isinstance(data, dict):
        raise Refused(BAD, "the request is not an object")
    return data
