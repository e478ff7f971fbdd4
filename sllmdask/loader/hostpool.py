"""Host memory for checkpoints: of this process alone, or shared by all worker processes of the node.

Both pools, :class:`~sllmdask.loader.private_pool.PrivatePool` and :class:`~sllmdask.loader.shared_pool.SharedPool`, have one
interface. A key is brought by one owner at a time, who fills a :class:`Segment` and publishes it; all others adopt what is
there, or wait for it, and take over where the owner fails. What is ready stays until its room is needed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from sllmdask.loader.buffers import Buffer
from sllmdask.loader.ledger import MAX_KEY, MAX_META, pack

#: (bytes so far, bytes in all).
Progress = Callable[[int, int], None]

#: Progress is told to other processes so often.
_PROGRESS_S = 0.05


class Segment:
    """A lease on `nbytes` of host memory that holds, or will hold, one checkpoint.

    `buffer` is uint8 of shape ``(nbytes,)``. It may be read; only the owner may write to it, until it publishes, from byte
    `resident_nbytes` on: what is before is what it shall be already. It keeps the lease alive, and so does every slice of it
    and every tensor over it: the memory is handed out again only when the last is gone, whatever was released before.

    All methods may be called on any thread, and again.
    """

    def __init__(
        self,
        key: str,
        buffer: Buffer,
        *,
        owner: bool,
        resident_nbytes: int,
        meta: dict[str, Any],
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.key = key
        self.nbytes = len(buffer)
        self.resident_nbytes = resident_nbytes
        #: This process fills it.
        self.owner = owner
        #: Every byte is there.
        self.ready = not owner
        #: What is said about it to all who ask, as plain JSON types. The owner may change it until it publishes.
        self.meta = meta
        self._buffer: Buffer | None = buffer
        self._tell: Callable[[str, dict[str, Any]], None] | None = tell
        self._told_at = 0.0
        # A release may run inside the end of some object, and so inside another method of this one.
        self._lock = threading.RLock()

    @property
    def buffer(self) -> Buffer:
        assert self._buffer is not None, "released"
        return self._buffer

    def progress(self, done: int) -> None:
        """`done` bytes are there: told to those who wait, now and then."""
        now = time.monotonic()
        with self._lock:
            if self._tell is None or self.ready or now < self._told_at + _PROGRESS_S:
                return
            self._told_at = now
            self._tell("progress", {"done": done})

    def publish(self) -> None:
        """Every byte is there: whoever asks may have it."""
        with self._lock:
            if self._tell is not None and not self.ready:
                assert len(pack(self.meta)) <= MAX_META, "metadata too long"
                self.ready, self.resident_nbytes = True, self.nbytes
                self._tell("publish", {"meta": self.meta})

    def discard(self) -> None:
        """It will not be filled. Who waits for it takes over."""
        with self._lock:
            if not self.ready:
                self._leave("discard")

    def release(self) -> None:
        """Unpin it, or discard it if it was not published. What was ready stays until its room is needed."""
        with self._lock:
            self._leave("release" if self.ready else "discard")

    def _leave(self, op: str) -> None:
        # The buffer first: if nothing else refers to it, that is the end of the lease, and memory that nobody looks at can be
        # given to the next as it is.
        tell, self._tell, self._buffer = self._tell, None, None
        if tell is not None:
            tell(op, {})


class HostPool(Protocol):
    """Where checkpoints are in host memory. All methods belong to one event loop."""

    async def start(self) -> None:
        """Get ready: what is resident is known afterwards. Done by the first :meth:`acquire` at the latest."""

    @property
    def capacity(self) -> int:
        """Bytes that may be in use."""

    @property
    def used(self) -> int:
        """Bytes in use: resident, being filled, or still looked at."""

    async def acquire(self, key: str, nbytes: int, meta: dict[str, Any], *, on_progress: Progress | None = None) -> Segment:
        """A lease of `key`: adopted if it is ready, else ours to fill; if another fills it, waits for that.

        `meta` (plain JSON types) says what is known of it; ``reload_s``, the seconds that reading it takes, decides with the
        number of uses what is evicted. A ready copy of another size is given up. Raises :class:`InsufficientMemory`.
        """

    def resident(self) -> dict[str, dict[str, Any]]:
        """Of each ready segment its `meta` and ``nbytes``, ``leases`` (that pin it) and ``last_used`` (seconds since 1970)."""

    async def evict(self, key: str) -> bool:
        """Give `key` up; false if it is not resident or a lease pins it. Its memory is free when nobody looks at it."""

    def prefault(self, nbytes: int) -> None:
        """From now on keep so many free bytes with pages behind them, so that a load does not wait for pages."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` soon after :meth:`resident`, `used` or `capacity` changed; returns what ends that."""

    async def close(self) -> None:
        """End. Segments that live stay valid; an :meth:`acquire` that waits raises :class:`Cancelled`."""


# --- what both pools are made of -------------------------------------------------------------------------------------


class Leased:
    """What every view of a segment holds on to: the end of this object is the end of the lease."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class Subscribers:
    """Callbacks, called once for changes made together."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self._announced = False

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """As :meth:`HostPool.subscribe`."""
        self._callbacks.append(callback)
        return partial(self._callbacks.remove, callback)

    def changed(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call all of them soon, on `loop`."""
        # Memory may come back when the loop, and who listened on it, is gone.
        if self._callbacks and not self._announced and not loop.is_closed():
            self._announced = True
            loop.call_soon(self._announce, loop)

    def _announce(self, loop: asyncio.AbstractEventLoop) -> None:
        self._announced = False
        # Each by itself: one that raises must not keep the others from hearing.
        for callback in self._callbacks:
            loop.call_soon(callback)


def check_request(key: str, nbytes: int, meta: dict[str, Any]) -> None:
    """That a caller asks for a segment as :meth:`HostPool.acquire` says."""
    assert 0 < len(key) <= MAX_KEY
    assert nbytes > 0
    assert len(pack(meta)) <= MAX_META, "metadata too long"
