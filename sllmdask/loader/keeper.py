"""Keeps the host memory that the workers of a node share, in a small process of its own that outlives each of them.

The memory is one ``memfd``: it dies with the last process that holds it, whatever became of the others, so nothing is left
behind even if all of them are killed, and no limit of ``/dev/shm`` applies. The keeper hands it to its members, the workers,
over a Unix socket, and knows who uses which part of it. It reads and writes none of it.

A segment is the room for one checkpoint. It is filled by one member, becomes ready when that one says so, and is then leased
to whoever asks. A member's hanging up ends its leases and hands what it was filling to the next who waits; what is ready stays
for a successor. The socket hangs up when the last thread of a process is gone, so nobody writes to memory that came free.

A message is one packet of at most :data:`MAX_MESSAGE` bytes of JSON. From a member, where ``id`` is its own number for the
answer, and ``lease`` the keeper's number:

====================================  =================================================================================
``hello capacity grace_s trim_s``     Join: the pool may hold `capacity` bytes more. First of all messages.
``acquire id key nbytes meta``        Answered, perhaps after others' ``progress``, by ``granted`` or ``refused``.
``cancel id``                         Not wanted any more. A grant that was on its way is to be ended.
``progress lease done``               `done` bytes have arrived, for those who wait.
``publish lease meta``                Every byte is there.
``discard lease``                     It will not be filled, but may still be looked at, or written to, until its end.
``release lease``                     It may be evicted; its memory is looked at until its end.
``end lease``                         Nothing refers to the memory any more.
``evict id key``                      Answered by ``evicted``.
``prefault nbytes``                   Keep so many free bytes with pages behind them.
``leave``                             Contribute nothing any more; leases last until their ends or the hang-up.
====================================  =================================================================================

A member that breaks these rules is told ``malformed`` and listened to no more; its leases last until it hangs up, because its
process may still look at them. What concerns all (``resident``) is merged per member until it can be sent, and a member that
does not read is not read from: the keeper neither blocks nor grows.

This process imports nothing but the standard library and small modules of ours: no numpy, no asyncio.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import queue
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sllmdask.loader import libc
from sllmdask.policy.eviction import HostCopy, departures

logger = logging.getLogger(__name__)

#: Bytes. Memory is handed out in multiples of it.
GRANULE = libc.HUGE_PAGE
#: Bytes that are faulted in or given back at a time.
STEP = 32 * 1024**2
#: Bytes of a message, of a key, and of the metadata of a segment as JSON.
MAX_MESSAGE, MAX_KEY, MAX_META = 64 * 1024, 1024, 16 * 1024

#: Part of the socket's name: members and a keeper that would not understand each other do not meet.
_VERSION = 1
_MAX_MEMBERS = 512
#: Requests of one member that may wait at the same time; messages that may wait for a member that does not read.
_MAX_WAITING, _MAX_OUTBOX = 1024, 256
#: Pieces that a segment is put together from where no single one is large enough; at 20 bytes each they fit a message.
_MAX_FRAGMENTS, _MAX_EXTENTS = 128, 1024
#: Bytes of the largest number that is taken for a size.
_MAX_NBYTES = 2**50
#: Bytes per second, for the cost of reading what does not say how long it took.
_PRIOR_BYTES_PER_S = 1e9
#: Seconds in which a keeper that was just started is joined by its first member, at the latest.
_FIRST_MEMBER_S = 10.0
#: Seconds until memory is looked for again after there was none.
_STARVED_S = 2.0

#: (offset, bytes) in the pool's file.
Extent = tuple[int, int]


def address_of_pool(name: str, uid: int) -> str:
    """The abstract Unix socket of pool `name` of user `uid`: binding it is atomic, and no file is left behind."""
    return f"\0sllmdask-host-v{_VERSION}-{uid}-{name}"


def pack(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def reload_seconds(meta: dict[str, Any], nbytes: int) -> float:
    """How long it takes to read `nbytes` again: what `meta` says, or a guess."""
    value = meta.get("reload_s")
    if isinstance(value, int | float) and math.isfinite(value) and value > 0:
        return float(value)
    return nbytes / _PRIOR_BYTES_PER_S


# --- which parts of the file are free --------------------------------------------------------------------------------


class _FreeList:
    """Disjoint extents; neighbours are one."""

    def __init__(self) -> None:
        self.total = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    def __iter__(self) -> Iterator[Extent]:
        return iter([(start, end - start) for start, end in self._end_of.items()])

    def add(self, start: int, nbytes: int) -> None:
        self.total += nbytes
        end = start + nbytes
        if end in self._end_of:
            end = self._end_of.pop(end)
        if start in self._start_of:
            start = self._start_of.pop(start)
        self._end_of[start], self._start_of[end] = end, start

    def remove(self, start: int, nbytes: int) -> int:
        """Take what is in the list of ``[start, start + nbytes)`` out of it; returns how many bytes that were."""
        end, removed = start + nbytes, 0
        for first, last in [each for each in self._end_of.items() if each[0] < end and each[1] > start]:
            del self._end_of[first], self._start_of[last]
            removed += min(last, end) - max(first, start)
            for rest, rest_end in ((first, min(last, start)), (max(first, end), last)):
                if rest < rest_end:
                    self._end_of[rest], self._start_of[rest_end] = rest_end, rest
        self.total -= removed
        return removed


class Extents:
    """Which parts of a file of `nbytes` bytes are free, and which of those have pages behind them already ("warm").

    All sizes are multiples of :data:`GRANULE`.
    """

    def __init__(self, nbytes: int) -> None:
        self._warm, self._cold = _FreeList(), _FreeList()
        self._cold.add(0, nbytes)

    @property
    def warm(self) -> int:
        return self._warm.total

    @property
    def free(self) -> int:
        return self._warm.total + self._cold.total

    def take(self, nbytes: int) -> list[Extent]:
        """`nbytes` of what is free: warm before cold, because pages cost far more than mapping several pieces; then in one piece,
        and then out of the smallest that is large enough.
        """
        assert 0 < nbytes <= self.free, "more than is free"
        reach = min(nbytes, self.warm)
        window = self._window(nbytes)
        if window is not None and window[0] >= reach - nbytes // 16:
            return self._cut([(window[1], nbytes)])
        pieces: list[Extent] = []
        for kind, limit in ((self._warm, _MAX_FRAGMENTS), (self._cold, None)):
            for start, size in sorted(kind, key=lambda extent: (-extent[1], extent[0]))[:limit]:
                missing = nbytes - sum(piece[1] for piece in pieces)
                if missing == 0:
                    break
                pieces.append((start, min(size, missing)))
        missing = nbytes - sum(piece[1] for piece in pieces)
        if missing:
            # Only where there are very many warm pieces: the small ones after all.
            taken = dict(pieces)
            for start, size in self._warm:
                if start not in taken and missing:
                    pieces.append((start, min(size, missing)))
                    missing -= pieces[-1][1]
        return self._cut(pieces)

    def take_warm(self, nbytes: int) -> Extent | None:
        """At most `nbytes` in one piece out of the smallest warm one."""
        return self._take_from(self._warm, nbytes)

    def take_cold(self, nbytes: int) -> Extent | None:
        """At most `nbytes` in one piece, cold, next to what is warm if there is such a place."""
        beside = {start + size for start, size in self._warm}
        for start, size in self._cold:
            if start in beside:
                piece = (start, min(size, nbytes))
                self._cold.remove(*piece)
                return piece
        return self._take_from(self._cold, nbytes)

    def give(self, extents: Iterable[Extent], *, warm: bool = True) -> None:
        for start, nbytes in extents:
            (self._warm if warm else self._cold).add(start, nbytes)

    def _take_from(self, kind: _FreeList, nbytes: int) -> Extent | None:
        extents = sorted(kind, key=lambda extent: (extent[1], extent[0]))
        if not extents:
            return None
        start, size = extents[0]
        kind.remove(start, min(size, nbytes))
        return start, min(size, nbytes)

    def _window(self, nbytes: int) -> tuple[int, int] | None:
        """(warm bytes, start) of the best free place for `nbytes` in one piece: most warm bytes, then tightest, then first."""
        runs = _FreeList()
        for extent in (*self._warm, *self._cold):
            runs.add(*extent)
        best: tuple[int, int, int] | None = None
        for run, size in runs:
            if size < nbytes:
                continue
            inside = [(start, length) for start, length in self._warm if run <= start < run + size]
            last = run + size - nbytes
            starts = {run, *(min(start, last) for start, _ in inside), *(max(start + n - nbytes, run) for start, n in inside)}
            for start in starts:
                warm = sum(max(0, min(first + n, start + nbytes) - max(first, start)) for first, n in inside)
                best = max(best or (-1, 0, 0), (warm, -size, -start))
        return best and (best[0], -best[2])

    def _cut(self, pieces: list[Extent]) -> list[Extent]:
        merged = _FreeList()
        for start, nbytes in pieces:
            found = self._warm.remove(start, nbytes) + self._cold.remove(start, nbytes)
            assert found == nbytes, "handed out twice"
            merged.add(start, nbytes)
        return sorted(merged)


# --- who uses what: no I/O ------------------------------------------------------------------------------------------


class Malformed(Exception):
    """A message that no member of ours sends."""


@dataclass(eq=False)
class _Waiter:
    member: Member
    id: int
    key: str
    nbytes: int
    meta: dict[str, Any]


@dataclass(eq=False)
class _Lease:
    id: int
    member: Member
    segment: _Segment
    pinned: bool = True


@dataclass(eq=False)
class _Segment:
    id: int
    key: str
    nbytes: int
    meta: dict[str, Any]
    extents: list[Extent]
    #: Leading bytes that are what they shall be; all: it is ready.
    resident: int = 0
    owner: _Lease | None = None
    done: int = 0
    leases: set[_Lease] = field(default_factory=set)
    waiters: list[_Waiter] = field(default_factory=list)
    uses: int = 0
    floor: float = 0.0
    used_at: float = 0.0
    last_used: int = 0

    @property
    def size(self) -> int:
        return sum(nbytes for _, nbytes in self.extents)

    @property
    def ready(self) -> bool:
        return self.resident == self.nbytes

    @property
    def idle(self) -> bool:
        return self.owner is None and not self.leases

    def shorten(self, nbytes: int) -> list[Extent]:
        """Give the last `nbytes` bytes of memory up."""
        lost = []
        while nbytes:
            start, size = self.extents.pop()
            cut = min(size, nbytes)
            if cut < size:
                self.extents.append((start, size - cut))
            lost.append((start + size - cut, cut))
            nbytes -= cut
        self.resident = min(self.resident, self.size)
        return lost


@dataclass(eq=False)
class Member:
    """One connection. What is to be sent is in `outbox`; what may be merged with what comes later, in the three after it."""

    name: str = ""
    joined: bool = False
    present: bool = False
    capacity: int = 0
    prefault: int = 0
    leases: dict[int, _Lease] = field(default_factory=dict)
    waiting: dict[int, _Waiter] = field(default_factory=dict)
    outbox: deque[bytes] = field(default_factory=deque)
    progress: dict[int, int] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Work on memory that nobody has meanwhile: take pages for it (`fault`) or give them back."""

    fault: bool
    offset: int
    nbytes: int


def _integer(message: dict[str, Any], name: str, least: int = 0, most: int = _MAX_NBYTES) -> int:
    value = message.get(name)
    if type(value) is not int or not least <= value <= most:
        raise Malformed(f"{name}={value!r}")
    return value


def _number(message: dict[str, Any], name: str) -> float:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise Malformed(f"{name}={value!r}")
    return float(value)


def _key(message: dict[str, Any]) -> str:
    key = message.get("key")
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
        raise Malformed("key")
    return key


def _meta(message: dict[str, Any]) -> dict[str, Any]:
    meta = message.get("meta")
    if not isinstance(meta, dict) or len(pack(meta)) > MAX_META:
        raise Malformed("meta")
    return meta


class Pool:
    """Segments, leases and members of one pool over a file of `file_nbytes` bytes that holds at most `limit` at a time.

    ``unsent`` collects the members for whom there is something to send. `now` is monotonic seconds; `clock` tells the time of
    day, for people.
    """

    def __init__(self, file_nbytes: int, limit: int, clock: Callable[[], float] = time.time) -> None:
        assert file_nbytes >= limit + STEP, "what is used and what is in transit must fit at the same time"
        self._wall = clock
        self.extents = Extents(file_nbytes)
        self.members: set[Member] = set()
        self.unsent: dict[Member, None] = {}
        self.used = 0
        self.grace_s = _FIRST_MEMBER_S
        self._limit = limit
        self._trim_s = 0.0
        self._segments: dict[str, _Segment] = {}
        self._left: list[tuple[float, int]] = []
        self._transit: Job | None = None
        self._freed_at = 0.0
        self._starved_until = 0.0
        self._clock = 0.0
        self._ids = 0
        self._now = 0.0

    # --- members -----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """What members contribute, and what those contributed who left less than the grace time ago.

        Not more than three quarters of the memory there is, unless one of them says so alone: two clusters of one machine, each
        of which may take half, must not take all of it.
        """
        shares = [member.capacity for member in self.members] + [nbytes for _, nbytes in self._left]
        return min(sum(shares), self._limit, max([self._limit * 3 // 4 // GRANULE * GRANULE, *shares]))

    @property
    def warm(self) -> int:
        """Free bytes with pages behind them, those that are just being given back included."""
        return self.extents.warm + (self._transit.nbytes if self._transit is not None and not self._transit.fault else 0)

    @property
    def present(self) -> int:
        """Members that have joined and not left."""
        return sum(member.present for member in self.members)

    def handle(self, member: Member, message: dict[str, Any], now: float) -> None:
        """Do what `member` asks. Raises :class:`Malformed`, and has then done nothing."""
        self._tick(now)
        op = message.get("op")
        if not isinstance(op, str) or (op == "hello") == member.joined:
            raise Malformed(f"op={op!r}")
        if op == "hello":
            self._join(member, message)
        elif op == "acquire":
            waiter = _Waiter(member, _integer(message, "id"), _key(message), _integer(message, "nbytes", 1), _meta(message))
            if waiter.id in member.waiting or len(member.waiting) >= _MAX_WAITING:
                raise Malformed(f"request {waiter.id} of {len(member.waiting)}")
            member.waiting[waiter.id] = waiter
            self._acquire(waiter)
        elif op == "cancel":
            cancelled = member.waiting.get(_integer(message, "id"))
            if cancelled is not None:
                self._forget(cancelled)
        elif op == "evict":
            id_ = _integer(message, "id")
            self._send(member, {"op": "evicted", "id": id_, "done": self._evict(_key(message))})
        elif op == "prefault":
            member.prefault = _integer(message, "nbytes")
        elif op == "leave":
            self._depart(member)
        else:
            self._on_lease(op, member, message)

    def leave(self, member: Member, now: float) -> None:
        """`member`'s process is gone, or will never look at its leases again."""
        self._tick(now)
        self._depart(member)
        for waiter in list(member.waiting.values()):
            self._forget(waiter)
        for lease in list(member.leases.values()):
            self._end(lease)
        self.members.discard(member)
        self.unsent.pop(member, None)

    def mute(self, member: Member, now: float) -> None:
        """`member` is listened to no more: what it fills will not be published, and nothing is given to it."""
        self._tick(now)
        self._depart(member)
        for waiter in list(member.waiting.values()):
            self._forget(waiter)
        for lease in list(member.leases.values()):
            if lease.segment.owner is lease:
                self._detach(lease.segment)

    def _join(self, member: Member, message: dict[str, Any]) -> None:
        capacity = _integer(message, "capacity")
        grace_s, trim_s = _number(message, "grace_s"), _number(message, "trim_s")
        member.name = str(message.get("name", ""))[:256]
        member.capacity, member.joined, member.present = capacity // GRANULE * GRANULE, True, True
        self.grace_s, self._trim_s = grace_s, trim_s
        # A successor takes its predecessor's place, not one beside it.
        for number, (_, nbytes) in enumerate(self._left):
            if nbytes == member.capacity:
                del self._left[number]
                break
        self.members.add(member)
        member.changed = dict.fromkeys(self._segments)
        self._stale()

    def _depart(self, member: Member) -> None:
        if member.present:
            member.present, member.prefault = False, 0
            if member.capacity:
                self._left.append((self._now + self.grace_s, member.capacity))
                member.capacity = 0
            self._stale()

    def _on_lease(self, op: str, member: Member, message: dict[str, Any]) -> None:
        if op not in ("progress", "publish", "discard", "release", "end"):
            raise Malformed(f"op={op!r}")
        lease = member.leases.get(_integer(message, "lease"))
        done = _integer(message, "done") if op == "progress" else 0
        meta = _meta(message) if op == "publish" else {}
        # An end may overtake what another thread says about the same lease.
        if lease is None:
            return
        segment = lease.segment
        filling = segment.owner is lease
        if op == "end":
            self._end(lease)
        elif op == "release" and not filling:
            lease.pinned = False
            self._changed(segment.key)
        elif op in ("release", "discard") and filling:
            # Its memory may still be written to: who wants the key gets other memory.
            self._detach(segment)
        elif op == "progress" and filling:
            segment.done = min(done, segment.nbytes)
            for waiter in segment.waiters:
                self._progress(waiter, segment.done)
        elif op == "publish" and filling:
            segment.owner, segment.resident, segment.meta = None, segment.nbytes, meta
            self._again(segment)
            self._changed(segment.key)

    # --- segments ----------------------------------------------------------------------------------------------------

    def resident(self, key: str) -> dict[str, Any] | None:
        """What members are told of `key`; ``None``: not to be had without reading."""
        segment = self._segments.get(key)
        if segment is None or not segment.resident or segment.owner is not None:
            return None
        return {
            "segment": segment.id,
            "nbytes": segment.nbytes,
            "resident": segment.resident,
            "leases": sum(lease.pinned for lease in segment.leases),
            "last_used": segment.used_at,
            "meta": segment.meta,
        }

    def _acquire(self, waiter: _Waiter) -> None:
        segment = self._segments.get(waiter.key)
        if segment is not None and segment.owner is not None:
            segment.waiters.append(waiter)
            self._progress(waiter, segment.done)
            return
        if segment is not None and segment.nbytes != waiter.nbytes:
            self._detach(segment)
            segment = None
        if segment is not None and not segment.ready:
            segment = self._extended(segment, waiter)
        elif segment is None:
            segment = self._reserved(waiter)
        if segment is not None:
            self._grant(segment, waiter)

    def _reserved(self, waiter: _Waiter) -> _Segment | None:
        extents = self._room(waiter, -(-waiter.nbytes // GRANULE) * GRANULE)
        if extents is None:
            return None
        self._ids += 1
        segment = self._segments[waiter.key] = _Segment(self._ids, waiter.key, waiter.nbytes, waiter.meta, extents)
        return segment

    def _extended(self, segment: _Segment, waiter: _Waiter) -> _Segment | None:
        """`segment`, of which only the beginning is resident, with room for the rest."""
        extents = self._room(waiter, -(-waiter.nbytes // GRANULE) * GRANULE - segment.size, besides=segment)
        if extents is None:
            return None
        if len(segment.extents) + len(extents) > _MAX_EXTENTS:
            self._free(extents)
            self._detach(segment)
            return self._reserved(waiter)
        segment.extents += extents
        segment.meta = waiter.meta
        # Pages that a member has mapped for it are not where they were.
        self._ids += 1
        segment.id = self._ids
        return segment

    def _room(self, waiter: _Waiter, nbytes: int, besides: _Segment | None = None) -> list[Extent] | None:
        """Free memory of `nbytes`, after evicting what must go; refuses `waiter` where there is none."""
        idle = {key: each for key, each in self._segments.items() if each.idle and each is not besides}
        missing = self.used + nbytes - self.capacity
        leaving = departures([self._copy(each) for each in idle.values()], missing, granule=GRANULE) if missing > 0 else []
        if leaving is None:
            available = max(0, self.capacity - self.used) + sum(each.size for each in idle.values())
            self._answer(waiter, {"op": "refused", "needed": nbytes, "available": available})
            return None
        for departure in leaving:
            segment = idle[departure.key]
            self._clock = max(self._clock, departure.worth)
            if departure.nbytes == segment.size:
                self._detach(segment)
            else:
                self._free(segment.shorten(departure.nbytes))
                self._changed(segment.key)
        extents = self.extents.take(nbytes)
        self.used += nbytes
        self._stale()
        return extents

    def _copy(self, segment: _Segment) -> HostCopy:
        return HostCopy(
            key=segment.key,
            nbytes=segment.size,
            total_nbytes=segment.nbytes,
            reload_s=reload_seconds(segment.meta, segment.nbytes),
            uses=segment.uses,
            floor=segment.floor,
            last_used=segment.last_used,
        )

    def _grant(self, segment: _Segment, waiter: _Waiter) -> None:
        self._ids += 1
        lease = _Lease(self._ids, waiter.member, segment)
        segment.leases.add(lease)
        waiter.member.leases[lease.id] = lease
        segment.uses += 1
        segment.last_used, segment.used_at, segment.floor = lease.id, self._wall(), self._clock
        if not segment.ready:
            segment.owner, segment.done = lease, 0
        self._changed(segment.key)
        self._answer(
            waiter,
            {
                "op": "granted",
                "lease": lease.id,
                "segment": segment.id,
                "extents": segment.extents,
                "nbytes": segment.nbytes,
                "resident": segment.resident,
                "meta": segment.meta,
            },
        )

    def _end(self, lease: _Lease) -> None:
        """Nobody looks at the memory through `lease` any more."""
        segment = lease.segment
        del lease.member.leases[lease.id]
        segment.leases.discard(lease)
        if self._segments.get(segment.key) is not segment:
            if not segment.leases:
                self._free(segment.extents)
        elif segment.owner is lease:
            # What was there before the filler came is still there.
            segment.owner = None
            kept = segment.resident // GRANULE * GRANULE
            if kept:
                self._free(segment.shorten(segment.size - kept))
            else:
                self._detach(segment)
            self._again(segment)
        self._changed(segment.key)

    def _evict(self, key: str) -> bool:
        segment = self._segments.get(key)
        if segment is None or segment.owner is not None or any(lease.pinned for lease in segment.leases):
            return False
        self._detach(segment)
        return True

    def _detach(self, segment: _Segment) -> None:
        """Nobody gets `segment` any more; its memory is free when nobody looks at it."""
        del self._segments[segment.key]
        segment.owner = None
        self._changed(segment.key)
        if not segment.leases:
            self._free(segment.extents)
        self._again(segment)

    def _again(self, segment: _Segment) -> None:
        waiters, segment.waiters = segment.waiters, []
        for waiter in waiters:
            self._acquire(waiter)

    def _forget(self, waiter: _Waiter) -> None:
        waiter.member.waiting.pop(waiter.id, None)
        waiter.member.progress.pop(waiter.id, None)
        segment = self._segments.get(waiter.key)
        if segment is not None and waiter in segment.waiters:
            segment.waiters.remove(waiter)

    def _free(self, extents: list[Extent]) -> None:
        self.extents.give(extents)
        self.used -= sum(nbytes for _, nbytes in extents)
        self._freed_at = self._now
        self._stale()

    # --- pages -------------------------------------------------------------------------------------------------------

    def next_job(self, now: float) -> Job | None:
        """What to do about pages, if anything. Its memory is nobody's until :meth:`finished`."""
        self._tick(now)
        if self._transit is not None:
            return None
        room = max(0, self.capacity - self.used)
        ahead = min(self._ahead(), room)
        over = self.extents.warm - (ahead if now >= self._freed_at + self._trim_s else max(ahead, room))
        extent: Extent | None = None
        if over > 0:
            extent = self.extents.take_warm(min(STEP, over))
        elif self.extents.warm < ahead and now >= self._starved_until:
            extent = self.extents.take_cold(min(STEP, ahead - self.extents.warm))
        if extent is not None:
            self._transit = Job(over <= 0, *extent)
        return self._transit

    def finished(self, job: Job, *, done: bool, now: float) -> None:
        """`job` has ended; not `done`: there was no memory for it."""
        self._tick(now)
        self._transit = None
        self.extents.give([(job.offset, job.nbytes)], warm=job.fault and done)
        self._stale()
        if not done:
            self._starved_until = now + _STARVED_S

    def wake_at(self, now: float) -> float:
        """When something is due though nothing happens; ``inf``: never."""
        self._tick(now)
        times = [expires for expires, _ in self._left]
        if self._transit is None:
            ahead = min(self._ahead(), max(0, self.capacity - self.used))
            if self.extents.warm > ahead:
                times.append(self._freed_at + self._trim_s)
            elif self.extents.warm < ahead:
                times.append(self._starved_until)
        return min(times, default=math.inf)

    def _ahead(self) -> int:
        most = max((member.prefault for member in self.members), default=0)
        return -(-most // GRANULE) * GRANULE

    def _tick(self, now: float) -> None:
        self._now = now
        left = [each for each in self._left if each[0] > now]
        if len(left) < len(self._left):
            self._left = left
            self._stale()

    # --- telling -----------------------------------------------------------------------------------------------------

    def _send(self, member: Member, message: dict[str, Any]) -> None:
        member.outbox.append(pack(message))
        self.unsent[member] = None

    def _answer(self, waiter: _Waiter, message: dict[str, Any]) -> None:
        waiter.member.waiting.pop(waiter.id, None)
        waiter.member.progress.pop(waiter.id, None)
        self._send(waiter.member, {**message, "id": waiter.id})

    def _progress(self, waiter: _Waiter, done: int) -> None:
        waiter.member.progress[waiter.id] = done
        self.unsent[waiter.member] = None

    def _changed(self, key: str) -> None:
        for member in self.members:
            member.changed[key] = None
        self._stale()

    def _stale(self) -> None:
        for member in self.members:
            member.stale = True
            self.unsent[member] = None

    def merged(self, member: Member) -> bytes | None:
        """The next message to `member` about what has changed; ``None``: it knows everything."""
        if member.progress:
            id_, done = member.progress.popitem()
            return pack({"op": "progress", "id": id_, "done": done})
        if not member.stale or not member.joined:
            return None
        keys: dict[str, Any] = {}
        size = 0
        while member.changed and size < MAX_MESSAGE // 4:
            key = next(iter(member.changed))
            del member.changed[key]
            keys[key] = self.resident(key)
            size += len(pack({key: keys[key]}))
        member.stale = bool(member.changed)
        pool = {"used": self.used, "capacity": self.capacity, "warm": self.warm}
        return pack({"op": "resident", "keys": keys, "more": member.stale, **pool})


# --- the process -----------------------------------------------------------------------------------------------------


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total_memory()


def _wants_advice() -> bool:
    """Whether this kernel gives shared memory huge pages where it is asked for them."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", encoding="ascii") as file:
            return "[advise]" in file.read()
    except OSError:
        return False


class _Pager(threading.Thread):
    """Does jobs one after the other, after everything else that this machine has to do; `fd` is readable when one is done."""

    def __init__(self, memory: int) -> None:
        super().__init__(name="pager", daemon=True)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.done: deque[tuple[Job, bool]] = deque()
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._memory = memory
        self._advise = _wants_advice()

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            job = self.jobs.get()
            self.done.append((job, self._do(job)))
            os.eventfd_write(self.fd, 1)

    def _do(self, job: Job) -> bool:
        try:
            if not job.fault:
                libc.punch_hole(self._memory, job.offset, job.nbytes)
                return True
            # The last sixteenth of the machine's memory is not for pages that nobody needs yet.
            if _available_memory() - job.nbytes < total_memory() // 16:
                return False
            if self._advise:
                self._fault_huge(job)
            libc.allocate(self._memory, job.offset, job.nbytes)
        except OSError as error:
            logger.warning("pages cause=%s", error)
            return False
        return True

    def _fault_huge(self, job: Job) -> None:
        """Huge pages are given for the asking to a mapping, not to a file."""
        address = libc.reserve_addresses(job.nbytes)
        try:
            libc.map_shared(self._memory, job.offset, job.nbytes, address)
            libc.advise_huge(address, job.nbytes)
            libc.populate(address, job.nbytes)
        finally:
            libc.unmap_memory(address, job.nbytes)


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    member: Member
    mask: int = select.EPOLLIN
    muted: bool = False
    unsent: bytes | None = None


class Keeper:
    """Serves one pool on a listening socket until nobody has been there for the grace time."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._memory = os.memfd_create("sllmdask-host-memory", os.MFD_CLOEXEC)
        limit = total_memory() // GRANULE * GRANULE
        # Twice the memory, so that free places are long; only what is used takes pages.
        self._file_nbytes = 2 * limit + STEP
        os.ftruncate(self._memory, self._file_nbytes)
        self._pool = Pool(self._file_nbytes, limit)
        self._pager = _Pager(self._memory)
        self._connections: dict[int, _Connection] = {}
        self._epoll = select.epoll()
        self._deaf = False

    def run(self) -> None:
        self._pager.start()
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._pager.fd, select.EPOLLIN)
        alone_since: float | None = time.monotonic()
        while True:
            now = time.monotonic()
            job = self._pool.next_job(now)
            if job is not None:
                self._pager.jobs.put(job)
            self._flush_all()
            wake_at = self._pool.wake_at(now)
            if alone_since is not None:
                if now >= alone_since + self._pool.grace_s:
                    return
                wake_at = min(wake_at, alone_since + self._pool.grace_s)
            # epoll counts milliseconds, and must not wake up just too early.
            timeout = -1.0 if wake_at == math.inf else max(0.0, wake_at - now) + 0.001
            for fd, events in self._epoll.poll(timeout):
                self._on_event(fd, events)
            if self._pool.present:
                alone_since = None
            elif alone_since is None:
                alone_since = time.monotonic()

    def _on_event(self, fd: int, events: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd == self._pager.fd:
            os.eventfd_read(fd)
            while self._pager.done:
                job, done = self._pager.done.popleft()
                self._pool.finished(job, done=done, now=time.monotonic())
        elif fd in self._connections:
            connection = self._connections[fd]
            gone = bool(events & (select.EPOLLHUP | select.EPOLLERR))
            if events & select.EPOLLIN:
                self._receive(connection, to_the_end=gone)
            # Not at the end of what a member sends, but when its side is closed: until then it may look at its leases.
            if gone:
                self._hang_up(connection)
            else:
                self._flush(connection)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptor left, most likely: one comes free when a member goes.
            logger.warning("accept cause=%s", error)
            self._epoll.unregister(self._listener)
            self._deaf = True
            return
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid() or len(self._connections) >= _MAX_MEMBERS:
            logger.warning("refused uid=%d", uid)
            peer.close()
            return
        peer.setblocking(False)
        self._connections[peer.fileno()] = _Connection(peer, Member())
        self._epoll.register(peer, select.EPOLLIN)

    def _receive(self, connection: _Connection, *, to_the_end: bool) -> None:
        while not connection.muted and (to_the_end or len(connection.member.outbox) < _MAX_OUTBOX):
            try:
                # What comes with a packet, descriptors for instance, is thrown away by the kernel.
                data = connection.socket.recv(MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It went without having read everything; what it had sent before still comes.
                continue
            if not data:
                connection.muted = True
                return
            try:
                self._take(connection, data)
            except Malformed as error:
                logger.warning("malformed member=%s cause=%s", connection.member.name, error)
                connection.muted = True
                self._pool.mute(connection.member, time.monotonic())
                connection.member.outbox.append(pack({"op": "malformed", "reason": str(error)[:1000]}))

    def _take(self, connection: _Connection, data: bytes) -> None:
        if len(data) > MAX_MESSAGE:
            raise Malformed(f"more than {MAX_MESSAGE} bytes")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Malformed("no JSON") from error
        if not isinstance(message, dict):
            raise Malformed("no object")
        member = connection.member
        self._pool.handle(member, message, time.monotonic())
        if message["op"] == "hello":
            welcome = pack({"op": "welcome", "nbytes": self._file_nbytes, "pid": os.getpid()})
            logger.info("joined member=%s capacity=%d", member.name, member.capacity)
            try:
                socket.send_fds(connection.socket, [welcome], [self._memory])
            except OSError as error:
                raise Malformed("not there any more") from error

    def _flush_all(self) -> None:
        for connection in [each for each in self._connections.values() if each.member in self._pool.unsent]:
            self._flush(connection)
        self._pool.unsent.clear()

    def _flush(self, connection: _Connection) -> None:
        member = connection.member
        blocked = False
        try:
            while True:
                if connection.unsent is None:
                    # What has changed before the answers: who hears that it was done also knows what is resident now.
                    connection.unsent = self._pool.merged(member) or (member.outbox.popleft() if member.outbox else None)
                if connection.unsent is None:
                    break
                connection.socket.send(connection.unsent, socket.MSG_NOSIGNAL)
                connection.unsent = None
        except BlockingIOError:
            blocked = True
        except OSError:
            # It is not there any more. What it said last is read when the event of its hanging up comes.
            member.outbox.clear()
            connection.unsent = None
        reading = not connection.muted and len(member.outbox) < _MAX_OUTBOX
        mask = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if blocked else 0)
        if mask != connection.mask:
            connection.mask = mask
            self._epoll.modify(connection.socket, mask)

    def _hang_up(self, connection: _Connection) -> None:
        logger.info("left member=%s leases=%d", connection.member.name, len(connection.member.leases))
        del self._connections[connection.socket.fileno()]
        self._epoll.unregister(connection.socket)
        connection.socket.close()
        self._pool.leave(connection.member, time.monotonic())
        if self._deaf:
            self._epoll.register(self._listener, select.EPOLLIN)
            self._deaf = False


def _listen(name: str) -> socket.socket | None:
    """The pool's listening socket; ``None``: another keeper has it and answers."""
    address = address_of_pool(name, os.getuid())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    listener.listen(_MAX_MEMBERS)
    return listener


def _go_away(log: str | None) -> None:
    """Leave the starter's terminal, session, directory and open files."""
    # The files are unbuffered descriptors of the starter: closing them tells it that the socket is there.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_MEMBERS
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))
    if log is not None:
        logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")


def main(arguments: list[str] | None = None) -> int:
    """``python -m sllmdask.loader.keeper NAME``: returns when a keeper of pool NAME listens, this one or an earlier one."""
    parser = argparse.ArgumentParser(description="Keeps the host memory that the workers of a node share.")
    parser.add_argument("name", help="of the pool; one per user")
    parser.add_argument("--log", help="a file to append to; else nothing is logged")
    options = parser.parse_args(arguments)
    try:
        log = os.path.abspath(options.log) if options.log else None
        listener = _listen(options.name)
        if listener is None:
            return 0
        keeper = Keeper(listener)
        if os.fork():
            # Not the listening socket's last holder.
            os._exit(0)
        os.setsid()
        _go_away(log)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
