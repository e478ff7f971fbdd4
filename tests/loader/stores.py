"""What tests of the store, and of what it is made of, have in common."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from sllmdask.loader import libc
from sllmdask.loader.hostpool import HostPool
from sllmdask.loader.store import CheckpointStore

CHUNK = 64 * 1024
#: Elements of the test models' one tensor: dozens of chunks, and two huge pages.
N = 600_000


class Gate:
    """Holds every read, in place of ``libc.pread``, at its first byte until ``open()``; `reached` is set when one has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._may = threading.Event()
        self.open = self._may.set
        self.n_reads = 0
        #: Offset below which reads are let pass meanwhile.
        self.free_below = 0
        self._pread = libc.pread
        self._lock = threading.Lock()

    def pread(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        with self._lock:
            self.n_reads += 1
        if offset >= self.free_below:
            self.reached.set()
            assert self._may.wait(30)
        return self._pread(fd, address, nbytes, offset)


def entry(store: CheckpointStore, key: str) -> dict[str, Any]:
    return store.snapshot()["keys"].get(key, {"state": "absent", "leases": 0, "reason": None})


def state(store: CheckpointStore, key: str) -> str:
    return entry(store, key)["state"]


def used(store: CheckpointStore) -> int:
    return store.snapshot()["tiers"]["host"]["used"]


async def until(changing: CheckpointStore | HostPool, condition: Callable[[], Any]) -> None:
    """Return when `condition` holds, which is asked after each change."""
    changed = asyncio.Event()
    end = changing.subscribe(changed.set)
    try:
        while not condition():
            changed.clear()
            await asyncio.wait_for(changed.wait(), 30)
    finally:
        end()


def eventually(condition: Callable[[], Any]) -> None:
    """Return when `condition` holds, of what tells nobody when it changes."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 30)


async def flights_ended(store: CheckpointStore) -> None:
    """Until the loads that were called off have ended, too."""
    while flights := [flight.task for flight in store._loads.flights]:
        await asyncio.wait(flights)
