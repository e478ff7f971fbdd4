"""Host memory for checkpoints: aligned, on huge pages, counted to the byte, handed out as leases.

A lease ends when nothing refers to its memory any more: neither the array, nor a slice of it, nor a tensor over it. Only then
are its bytes free, so a view can never show another model's weights.

Page faults, not Python, are what loading costs: a page that the system has to find takes longer than its bytes take to read. So
a pool keeps what came back, and can touch memory ahead of need. Kept pieces of any size serve a lease of any size: their pages
are moved, not copied, to where the lease has its addresses.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sllmdask.loader import libc
from sllmdask.loader.plan import BLOCK, round_up

Buffer = NDArray[np.uint8]

#: Bytes that :meth:`BufferPool.prefault` touches at a time: 0.1 s where the system's pages are dear.
PREFAULT_STEP = 32 * 1024**2


@dataclass(frozen=True, slots=True)
class Mapping:
    """`nbytes` of mapped memory at `address`, which the system knows as (part of) one mapping. `touched`: its pages are there."""

    address: int
    nbytes: int
    touched: bool = False

    def split(self, nbytes: int) -> tuple[Mapping, Mapping]:
        """The first `nbytes`, and the rest."""
        return replace(self, nbytes=nbytes), replace(self, address=self.address + nbytes, nbytes=self.nbytes - nbytes)


def lease_nbytes(nbytes: int) -> int:
    """Bytes that a lease of `nbytes` takes: whole huge pages, or whole blocks where it is smaller than one huge page."""
    return round_up(max(nbytes, 1), libc.HUGE_PAGE if nbytes >= libc.HUGE_PAGE else BLOCK)


def address_of(buffer: Buffer) -> int:
    """Where `buffer` begins; keeps nothing alive."""
    return int(buffer.__array_interface__["data"][0])


class _Memory:
    """What every view of a mapping holds on to: the end of this object is the end of the lease."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class BufferPool:
    """Hands out at most `capacity` bytes at a time, and keeps up to `keep` bytes that came back through every :meth:`trim`.

    What is leased and what is kept are together never more than `capacity`, apart from the one step, ``PREFAULT_STEP`` bytes,
    that each thread in :meth:`prefault` has in hand. All methods belong to any thread. Kept memory may move: what a device was
    told about its addresses ends with the lease.

    `on_return` is called, on whatever thread drops the last reference, when a lease has ended. It must return at once.
    """

    def __init__(self, capacity: int, on_return: Callable[[], None] | None = None, *, keep: int = 0) -> None:
        self.capacity = capacity
        self.keep = keep
        self._on_return = on_return
        self._used = 0
        # A lease may end inside a garbage collection, anywhere: its finalizer may take no lock, so it only appends here.
        self._returned: deque[tuple[Mapping, ...]] = deque()
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

    @property
    def kept(self) -> int:
        """Bytes that no lease holds and that were not given back to the system."""
        with self._lock:
            self._settle()
            return self._kept_nbytes()

    def lease(self, nbytes: int) -> Buffer:
        """`nbytes` of memory, contents undefined; counted as ``lease_nbytes(nbytes)``. Whole huge pages start on one.

        Takes kept memory first, what is touched before what is not; the rest is new. Makes no slow call. Raises
        :class:`OSError` (ENOMEM) where the system has no room; to ask for more than `available` is the caller's mistake.
        """
        size = lease_nbytes(nbytes)
        with self._lock:
            self._settle()
            assert size <= self.capacity - self._used, "lease beyond the pool's capacity"
            pieces = self._take(size)
            self._used += size
            excess = self._cut(self.capacity - self._used)
        _unmap(excess)
        memory = _Memory(pieces[0].address, nbytes)
        # It holds the pool, which therefore outlives its leases. Not at exit: threads may still read weights while the
        # interpreter ends.
        weakref.finalize(memory, self._take_back, pieces).atexit = False
        return np.asarray(memory)

    def prefault(self, nbytes: int, cancel: threading.Event | None = None) -> int:
        """Touch memory until `nbytes` of it are kept, or leases leave no room for more; returns the bytes kept.

        Slow: seconds per gigabyte where the system's pages are dear. For a thread in the background; `cancel` is looked at, and
        the lock is free, between steps of ``PREFAULT_STEP`` bytes. A :meth:`trim` gives back what is above `keep`. Stops early
        where the system has no memory.
        """
        while cancel is None or not cancel.is_set():
            with self._lock:
                self._settle()
                piece = self._take_untouched()
                if piece is None:
                    room = min(nbytes, self.capacity - self._used) - self._kept_nbytes()
                    step = min(PREFAULT_STEP, room // libc.HUGE_PAGE * libc.HUGE_PAGE)
                    if step <= 0:
                        break
            try:
                piece = piece or Mapping(libc.map_memory(step), step)
                _touch(piece.address, piece.nbytes)
            except OSError:
                if piece is not None:
                    _unmap([piece])
                break
            with self._lock:
                self._settle()
                self._kept.append(replace(piece, touched=True))
                excess = self._cut(self.capacity - self._used)
            _unmap(excess)
        return self.kept

    def trim(self) -> None:
        """Give memory that no lease holds, above `keep` bytes, back to the system. Slow for much of it: not for an event loop."""
        with self._lock:
            self._settle()
            excess = self._cut(self.keep)
        _unmap(excess)

    # --- under the lock ----------------------------------------------------------------------------------------------

    def _kept_nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._kept)

    def _take(self, size: int) -> tuple[Mapping, ...]:
        """`size` bytes in a row, as the pieces that they are made of."""
        if size % libc.HUGE_PAGE:
            # It takes no part of a huge page.
            same = next((piece for piece in self._kept if piece.nbytes == size), None)
            if same is None:
                return (Mapping(libc.map_memory(size), size),)
            self._kept.remove(same)
            return (same,)

        whole = [piece for piece in self._kept if piece.nbytes >= size and piece.nbytes % libc.HUGE_PAGE == 0]
        if whole:
            chosen = min(whole, key=lambda piece: (not piece.touched, piece.nbytes))
            self._kept.remove(chosen)
            chosen, rest = chosen.split(size)
            if rest.nbytes:
                self._kept.append(rest)
            return (chosen,)

        address = libc.map_memory(size)
        pieces: list[Mapping] = []
        position = 0
        for piece in sorted(self._kept, key=lambda piece: (not piece.touched, -piece.nbytes)):
            if position == size or piece.nbytes % libc.HUGE_PAGE:
                continue
            part, rest = piece.split(min(piece.nbytes, size - position))
            try:
                libc.move_pages(part.address, part.nbytes, address + position)
            except OSError:
                # More mappings than the system allows a process: new memory will do.
                break
            self._kept.remove(piece)
            if rest.nbytes:
                self._kept.append(rest)
            pieces.append(replace(part, address=address + position))
            position += part.nbytes
        if position < size:
            pieces.append(Mapping(address + position, size - position))
        return tuple(pieces)

    def _take_untouched(self) -> Mapping | None:
        """Up to a step of kept memory that came back from a lease that may have left pages untouched."""
        for piece in self._kept:
            if not piece.touched and piece.nbytes % libc.HUGE_PAGE == 0:
                self._kept.remove(piece)
                first, rest = piece.split(min(piece.nbytes, PREFAULT_STEP))
                if rest.nbytes:
                    self._kept.append(rest)
                return first
        return None

    def _cut(self, limit: int) -> list[Mapping]:
        """What must be unmapped so that `limit` bytes are kept: the untouched first, and whole huge pages."""
        excess = []
        surplus = self._kept_nbytes() - limit
        for piece in sorted(self._kept, key=lambda piece: (piece.touched, piece.nbytes)):
            if surplus <= 0:
                break
            self._kept.remove(piece)
            cut, rest = piece.split(min(piece.nbytes, round_up(surplus, libc.HUGE_PAGE)))
            if rest.nbytes:
                self._kept.append(rest)
            excess.append(cut)
            surplus -= cut.nbytes
        return excess

    def _settle(self) -> None:
        while self._returned:
            pieces = self._returned.popleft()
            self._used -= sum(piece.nbytes for piece in pieces)
            self._kept.extend(pieces)

    def _take_back(self, pieces: tuple[Mapping, ...]) -> None:
        """On any thread, at any moment: without the lock."""
        self._returned.append(pieces)
        if self._on_return is not None:
            self._on_return()


def _unmap(pieces: list[Mapping]) -> None:
    for piece in pieces:
        libc.unmap_memory(piece.address, piece.nbytes)


def _unmap_all(returned: deque[tuple[Mapping, ...]], kept: list[Mapping]) -> None:
    for pieces in returned:
        kept.extend(pieces)
    returned.clear()
    _unmap(kept)
    kept.clear()


class Staging:
    """Scratch memory for threads that read: private, on huge pages, touched once and used again. Any thread may borrow.

    Each borrower has its piece to itself, so that several reads may share one `Staging`. What is not borrowed is kept, `keep`
    bytes at most.
    """

    def __init__(self, keep: int = 64 * 1024**2) -> None:
        self.keep = keep
        self._free: list[Mapping] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _unmap_all, deque(), self._free).atexit = False

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[int]:
        """The address, on a huge page, of at least `nbytes` bytes, contents undefined. Raises :class:`OSError` (ENOMEM)."""
        with self._lock:
            fits = [piece for piece in self._free if piece.nbytes >= nbytes]
            piece = min(fits, key=lambda piece: piece.nbytes, default=None)
            if piece is not None:
                self._free.remove(piece)
        piece = piece or _touched(nbytes)
        try:
            yield piece.address
        finally:
            with self._lock:
                self._free.append(piece)
                self._free.sort(key=lambda piece: piece.nbytes)
                excess = []
                while sum(piece.nbytes for piece in self._free) > self.keep:
                    excess.append(self._free.pop(0))
            _unmap(excess)

    def prefault(self, n_threads: int, nbytes: int) -> None:
        """Have memory ready for `n_threads` that borrow `nbytes` each."""
        with self._lock:
            n_missing = n_threads - sum(piece.nbytes >= nbytes for piece in self._free)
        pieces = [_touched(nbytes) for _ in range(n_missing)]
        with self._lock:
            self._free += pieces


def _touched(nbytes: int) -> Mapping:
    size = round_up(max(nbytes, 1), libc.HUGE_PAGE)
    address = libc.map_memory(size)
    _touch(address, size)
    return Mapping(address, size, touched=True)


def _touch(address: int, nbytes: int) -> None:
    """Have pages behind memory that nobody uses."""
    if not libc.populate(address, nbytes):
        libc.clear(address, nbytes)
