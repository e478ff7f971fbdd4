"""Host memory for checkpoints: aligned, on huge pages, counted to the byte, handed out as leases.

A lease ends when nothing refers to its memory any more: neither the array, nor a slice of it, nor a tensor over it. Only then
are its bytes free, so a view can never show another model's weights. Memory that has come back is kept until
:meth:`BufferPool.trim`, so that the next lease can have pages that are faulted in already: page faults, not Python, are what
loading costs.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sllmdask.loader import libc
from sllmdask.loader.plan import BLOCK, round_up

Buffer = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Mapping:
    """`nbytes` of mapped memory at `address`."""

    address: int
    nbytes: int


def lease_nbytes(nbytes: int) -> int:
    """Bytes that a lease of `nbytes` takes: whole huge pages, or whole blocks where it is smaller than one huge page."""
    return round_up(max(nbytes, 1), libc.HUGE_PAGE if nbytes >= libc.HUGE_PAGE else BLOCK)


def address_of(buffer: Buffer) -> int:
    """Where `buffer` begins; keeps nothing alive."""
    return int(buffer.__array_interface__["data"][0])


class _Memory:
    """What every view of a mapping holds on to: the end of this object is the end of the lease."""

    def __init__(self, mapping: Mapping, nbytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (mapping.address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class BufferPool:
    """Hands out at most `capacity` bytes at a time. :meth:`lease` belongs to one thread; :meth:`trim` to any.

    `on_return` is called, on whatever thread drops the last reference, when a lease has ended. It must return at once.
    """

    def __init__(self, capacity: int, on_return: Callable[[], None] | None = None) -> None:
        self.capacity = capacity
        self._on_return = on_return
        self._used = 0
        # A lease may end inside a garbage collection, anywhere: its finalizer may take no lock, so it only appends here.
        self._returned: deque[Mapping] = deque()
        self._kept: list[Mapping] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _unmap_all, self._returned, self._kept).atexit = False

    @property
    def used(self) -> int:
        """Bytes in leases that live."""
        with self._lock:
            self._settle()
            return self._used

    @property
    def available(self) -> int:
        """Bytes that can be leased."""
        return self.capacity - self.used

    def lease(self, nbytes: int) -> Buffer:
        """`nbytes` of memory, contents undefined; counted as ``lease_nbytes(nbytes)``. Whole huge pages start on one.

        Takes the smallest kept mapping that is large enough and leaves the rest kept; else a new one. Makes no slow call.
        Raises :class:`OSError` (ENOMEM) where the system has no room; to ask for more than `available` is the caller's mistake.
        """
        size = lease_nbytes(nbytes)
        with self._lock:
            self._settle()
            assert size <= self.capacity - self._used, "lease beyond the pool's capacity"
            # A small lease must not cut a huge page.
            fits = [kept for kept in self._kept if kept.nbytes == size or (kept.nbytes > size and size % libc.HUGE_PAGE == 0)]
            if fits:
                mapping = min(fits, key=lambda kept: kept.nbytes)
                self._kept.remove(mapping)
                if mapping.nbytes > size:
                    self._kept.append(Mapping(mapping.address + size, mapping.nbytes - size))
                    mapping = Mapping(mapping.address, size)
            else:
                mapping = Mapping(libc.map_memory(size), size)
            self._used += size
        memory = _Memory(mapping, nbytes)
        # It holds the pool, which therefore outlives its leases. Not at exit: threads may still read weights while the
        # interpreter ends.
        weakref.finalize(memory, self._take_back, mapping).atexit = False
        return np.asarray(memory)

    def trim(self) -> None:
        """Give memory that no lease holds back to the system. Slow for much memory: not for an event loop."""
        with self._lock:
            self._settle()
            kept, self._kept[:] = self._kept[:], []
        for mapping in kept:
            libc.unmap_memory(mapping.address, mapping.nbytes)

    def _take_back(self, mapping: Mapping) -> None:
        self._returned.append(mapping)
        if self._on_return is not None:
            self._on_return()

    def _settle(self) -> None:
        while self._returned:
            mapping = self._returned.popleft()
            self._used -= mapping.nbytes
            self._kept.append(mapping)


def _unmap_all(returned: deque[Mapping], kept: list[Mapping]) -> None:
    for mapping in (*returned, *kept):
        libc.unmap_memory(mapping.address, mapping.nbytes)
    returned.clear()
    kept.clear()
