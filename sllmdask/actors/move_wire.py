"""What two workers say to each other while a request moves: a message of plain msgpack types, and bytes that go with it.

On connections of their own, with a thread at either end, so that KV waits for no token and no token for KV. One message is under
way on a connection, and the next one waits for its answer: a sender never has more in flight than the receiver has asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from sllmdask.loader.peer_listener import PeerListener
from sllmdask.loader.peer_wire import BAD, Refused, Wire

#: Bytes of the message, and of what goes with it.
_FRAME = struct.Struct("!IQ")
#: A message has the tokens of a request and its parameters; what goes with it, at most all KV of a request.
MAX_MESSAGE, MAX_PAYLOAD = 64 * 1024**2, 4 * 1024**3

#: Makes an answer of a message and the bytes that came with it; in any thread.
Answer = Callable[[Mapping[str, Any], bytes | bytearray], dict[str, Any]]


def send(wire: Wire, message: Mapping[str, Any], payload: bytes = b"") -> None:
    """Raises :class:`OSError`."""
    head = msgpack.packb(message)
    wire.send(_FRAME.pack(len(head), len(payload)), head, *([payload] if payload else []))


def receive(wire: Wire) -> tuple[dict[str, Any], bytearray]:
    """The next message and its bytes. Raises :class:`OSError`, and :class:`Refused` for what is no message."""
    n_message, n_payload = _FRAME.unpack(wire.receive(_FRAME.size))
    if n_message > MAX_MESSAGE or n_payload > MAX_PAYLOAD:
        raise Refused(BAD, "this is no message of ours")
    try:
        message = msgpack.unpackb(wire.receive(n_message))
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Refused(BAD, f"a message cannot be read: {error}") from None
    if not isinstance(message, dict):
        raise Refused(BAD, "a message is not a map")
    payload = bytearray(n_payload)
    wire.receive_into(memoryview(payload))
    return message, payload


class MoveServer(PeerListener):
    """Answers those workers from which requests come, by `answer`."""

    def __init__(self, host: str, token: str, answer: Answer, *, tls: Any = None, idle_s: float = 60.0) -> None:
        self._answer = answer
        super().__init__(host, 0, token, tls=tls, max_connections=256, idle_s=idle_s)

    def serve(self, wire: Wire) -> None:
        while True:
            try:
                message, payload = receive(wire)
            except Refused:
                return
            send(wire, self._answer(message, payload))
