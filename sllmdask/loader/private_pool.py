"""Host memory for the checkpoints of one process: `capacity` bytes, gone with it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sllmdask.errors import Cancelled, InsufficientMemory
from sllmdask.loader.buffers import Buffer, BufferPool, address_of, lease_nbytes
from sllmdask.loader.hostpool import Leased, Progress, Segment, Subscribers, check_request
from sllmdask.loader.ledger import reload_seconds
from sllmdask.policy.eviction import HostCopy, departures


@dataclass(eq=False)
class _Waiter:
    grant: asyncio.Future[Segment]
    nbytes: int
    meta: dict[str, Any]
    on_progress: Progress | None


@dataclass(eq=False)
class _Entry:
    key: str
    nbytes: int
    meta: dict[str, Any]
    #: Kept from the moment of publishing; before, the owner alone keeps it.
    buffer: Buffer | None = None
    owner: int | None = None
    #: Whether it pins, by number of the lease.
    leases: dict[int, bool] = field(default_factory=dict)
    waiters: list[_Waiter] = field(default_factory=list)
    done: int = 0
    uses: int = 0
    floor: float = 0.0
    used_at: float = 0.0
    last_used: int = 0


class PrivatePool:
    """Host memory of this process: `capacity` bytes, gone with it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pool = BufferPool(capacity, on_return=self._memory_came_back)
        self._entries: dict[str, _Entry] = {}
        self._leased: dict[int, _Entry] = {}
        # What segments say on other threads, in order: the end of an object may take no lock.
        self._said: deque[tuple[int, str, dict[str, Any]]] = deque()
        self._ids = itertools.count(1)
        self._clock = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers = Subscribers()
        self._cancel = threading.Event()

    @property
    def used(self) -> int:
        self._settle()
        return self._pool.used

    @property
    def prefaulted(self) -> int:
        """Free bytes that are kept; with pages behind them as far as they were touched."""
        return self._pool.kept

    def resident(self) -> dict[str, dict[str, Any]]:
        self._settle()
        return {
            key: {
                **entry.meta,
                "nbytes": entry.nbytes,
                "leases": sum(entry.leases.values()),
                "last_used": entry.used_at,
            }
            for key, entry in self._entries.items()
            if entry.buffer is not None
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    async def start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._touch()

    async def acquire(self, key: str, nbytes: int, meta: dict[str, Any], *, on_progress: Progress | None = None) -> Segment:
        check_request(key, nbytes, meta)
        await self.start()
        if self._cancel.is_set():
            raise Cancelled("the pool of host memory is closed")
        self._settle()
        waiter = _Waiter(asyncio.get_running_loop().create_future(), nbytes, meta, on_progress)
        self._serve(key, waiter)
        try:
            return await waiter.grant
        except asyncio.CancelledError:
            if waiter.grant.done() and not waiter.grant.cancelled() and waiter.grant.exception() is None:
                # It was granted in the moment in which its caller left; never filled, it goes to the next.
                waiter.grant.result().release()
            entry = self._entries.get(key)
            if entry is not None and waiter in entry.waiters:
                entry.waiters.remove(waiter)
            raise

    async def evict(self, key: str) -> bool:
        self._settle()
        entry = self._entries.get(key)
        if entry is None or entry.buffer is None or any(entry.leases.values()):
            return False
        self._drop(entry)
        self._changed()
        return True

    def prefault(self, nbytes: int) -> None:
        self._pool.keep = nbytes
        self._touch()

    async def close(self) -> None:
        self._settle()
        self._cancel.set()
        for entry in list(self._entries.values()):
            for waiter in entry.waiters:
                if not waiter.grant.done():
                    waiter.grant.set_exception(Cancelled("the pool of host memory is closed"))
            self._drop(entry)
        self._pool.keep = 0
        await asyncio.to_thread(self._pool.trim)

    # --- granting ----------------------------------------------------------------------------------------------------

    def _serve(self, key: str, waiter: _Waiter) -> None:
        if waiter.grant.done():
            return
        entry = self._entries.get(key)
        if entry is not None and entry.owner is not None:
            entry.waiters.append(waiter)
            self._hear(entry, waiter)
            return
        if entry is not None and entry.nbytes != waiter.nbytes:
            self._drop(entry)
            entry = None
        try:
            buffer = self._room(key, waiter.nbytes) if entry is None else entry.buffer
        except (InsufficientMemory, OSError) as error:
            waiter.grant.set_exception(error)
            return
        assert buffer is not None
        if entry is None:
            entry = self._entries[key] = _Entry(key, waiter.nbytes, waiter.meta)
        waiter.grant.set_result(self._lease(entry, buffer))
        self._changed()

    def _room(self, key: str, nbytes: int) -> Buffer:
        size = lease_nbytes(nbytes)
        idle = {key: entry for key, entry in self._entries.items() if entry.buffer is not None and not entry.leases}
        leaving = departures([_copy_of(entry) for entry in idle.values()], size - self._pool.available)
        for departure in leaving or ():
            self._clock = max(self._clock, departure.worth)
            self._drop(idle[departure.key])
        if leaving is None or self._pool.available < size:
            available = self._pool.available + sum(lease_nbytes(each.nbytes) for each in idle.values() if each.buffer is not None)
            raise InsufficientMemory(key, size, available)
        return self._pool.lease(nbytes)

    def _lease(self, entry: _Entry, buffer: Buffer) -> Segment:
        number = next(self._ids)
        leased = Leased(address_of(buffer), entry.nbytes)
        # Emptied on the event loop when the lease has ended: memory comes back before the next waiter needs it.
        held = [buffer]
        weakref.finalize(leased, self._say, number, "end", {"held": held}).atexit = False
        if entry.buffer is None:
            entry.owner, entry.done = number, 0
        entry.leases[number] = True
        self._leased[number] = entry
        entry.uses += 1
        entry.last_used, entry.used_at, entry.floor = number, time.time(), self._clock
        owner = entry.buffer is None

        def tell(op: str, fields: dict[str, Any]) -> None:
            self._say(number, op, {**fields, "held": held})

        return Segment(
            entry.key,
            np.asarray(leased),
            owner=owner,
            resident_nbytes=0 if owner else entry.nbytes,
            meta=dict(entry.meta),
            tell=tell,
        )

    # --- hearing from segments ---------------------------------------------------------------------------------------

    def _say(self, number: int, op: str, fields: dict[str, Any]) -> None:
        """On any thread, perhaps inside the end of an object."""
        self._said.append((number, op, fields))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        while self._said:
            self._heed(*self._said.popleft())

    def _heed(self, number: int, op: str, fields: dict[str, Any]) -> None:
        entry = self._leased.get(number)
        if entry is None:
            return
        filling = entry.owner == number
        if op == "end":
            del entry.leases[number], self._leased[number]
            fields["held"].clear()
        if op == "progress":
            if filling:
                entry.done = min(fields["done"], entry.nbytes)
                for waiter in entry.waiters:
                    self._hear(entry, waiter)
            return
        if op == "publish" and filling:
            entry.owner, entry.buffer, entry.meta = None, fields["held"][0], fields["meta"]
            self._again(entry)
            self._touch()
        elif op == "release" and not filling:
            entry.leases[number] = False
        elif op in ("release", "discard", "end") and filling:
            self._drop(entry)
        self._changed()

    def _hear(self, entry: _Entry, waiter: _Waiter) -> None:
        if waiter.on_progress is not None:
            asyncio.get_running_loop().call_soon(waiter.on_progress, entry.done, entry.nbytes)

    def _drop(self, entry: _Entry) -> None:
        """Nobody gets `entry` any more; its memory is free when nobody looks at it."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.owner = entry.buffer = None
        self._again(entry)

    def _again(self, entry: _Entry) -> None:
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            self._serve(entry.key, waiter)

    # --- pages -------------------------------------------------------------------------------------------------------

    def _memory_came_back(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_back)

    def _give_back(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._pool.trim)
        self._changed()

    def _touch(self) -> None:
        """Make pages in the background, unless a load is under way: it has more need of the processors."""
        filling = any(entry.owner is not None for entry in self._entries.values())
        if self._pool.keep and not filling and not self._cancel.is_set() and self._loop is not None:
            touching = self._loop.run_in_executor(None, self._pool.prefault, self._pool.keep, self._cancel)
            touching.add_done_callback(lambda _: self._changed())

    def _changed(self) -> None:
        if self._loop is not None:
            self._subscribers.changed(self._loop)


def _copy_of(entry: _Entry) -> HostCopy:
    return HostCopy(
        key=entry.key,
        nbytes=lease_nbytes(entry.nbytes),
        total_nbytes=entry.nbytes,
        reload_s=reload_seconds(entry.meta, entry.nbytes),
        uses=entry.uses,
        floor=entry.floor,
        last_used=entry.last_used,
    )
