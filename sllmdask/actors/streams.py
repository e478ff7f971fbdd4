"""Messages between a front door and the scheduler or a worker: one persistent Dask comm each, both directions.

A message is a list whose first item names it; what is written at a time is a list of messages. Plain msgpack types only, so
nothing on this path can execute code. Dask's TCP has no back-pressure, hence the cap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from distributed.comm import Comm, CommClosedError, connect
from distributed.security import Security

logger = logging.getLogger(__name__)

Message = list[Any]

#: Messages that may wait for one peer; a peer that far behind is not reading any more and is cut off.
MAX_PENDING = 200_000


class Outbox:
    """A coalescing writer: everything put while a write is under way goes out together with the next one."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._pending: list[Message] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._write())

    def put(self, message: Message) -> None:
        """Queue one message; never blocks. Messages to a closed peer are dropped: its reader learns of the end."""
        if self._comm.closed():
            return
        self._pending.append(message)
        self._wake.set()
        if len(self._pending) > MAX_PENDING:
            self._comm.abort()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                batch, self._pending = self._pending, []
                await self._comm.write(batch)
        except CommClosedError:
            self._pending.clear()
        except Exception:
            # Something that msgpack cannot say. A connection that takes messages and sends none would hang both sides.
            logger.exception("cannot write to %s: closing the connection", self._comm.peer_address)
            self._pending.clear()
            self._comm.abort()
            raise

    async def close(self) -> None:
        """Stop writing and close the connection."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._comm.abort()


async def messages(comm: Comm) -> AsyncIterator[Message]:
    """The peer's messages, one by one, until the connection is closed by either side."""
    while True:
        try:
            batch = await comm.read()
        except (CommClosedError, OSError):
            return
        for message in batch:
            yield message


async def open_stream(address: str, op: str, *, timeout_s: float, **first: Any) -> Comm:
    """Connect to `address` and hand the connection to its handler `op`, with the fields of `first`.

    Raises ``OSError`` if nobody answers within `timeout_s` seconds.
    """
    arguments = Security().get_connection_args("client")
    comm = await connect(address, timeout=timeout_s, **arguments)
    await comm.write({"op": op, "reply": False, **first})
    return comm
