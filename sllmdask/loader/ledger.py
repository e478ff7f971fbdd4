"""Who uses which part of a node's shared host memory: segments, leases and members. No I/O; it is told what time it is.

A segment is the room for one checkpoint. It is filled by one member, becomes ready when that one says so, and is then leased
to whoever asks. A member's hanging up ends its leases and hands what it was filling to the next who waits; what is ready stays
for a successor.

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
process may still look at them. What concerns all (``resident``) is merged per member until it can be sent.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sllmdask.loader.extents import GRANULE, Extent, Extents
from sllmdask.policy.eviction import HostCopy, departures

#: Bytes that are faulted in or given back at a time.
STEP = 32 * 1024**2
#: Bytes of a message, of a key, and of the metadata of a segment as JSON.
MAX_MESSAGE, MAX_KEY, MAX_META = 64 * 1024, 1024, 16 * 1024

#: Requests of one member that may wait at the same time.
_MAX_WAITING = 1024
#: Pieces of one segment; at 20 bytes each they fit a message.
_MAX_EXTENTS = 1024
#: Bytes of the largest number that is taken for a size.
_MAX_NBYTES = 2**50
#: Bytes per second, for the cost of reading what does not say how long it took.
_PRIOR_BYTES_PER_S = 1e9
#: Seconds in which a keeper that was just started is joined by its first member, at the latest.
_FIRST_MEMBER_S = 10.0
#: Seconds until memory is looked for again after there was none.
_STARVED_S = 2.0


def pack(message: dict[str, Any]) -> bytes:
    """`message` as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode()


def reload_seconds(meta: dict[str, Any], nbytes: int) -> float:
    """How long it takes to read `nbytes` again: what `meta` says, or a guess."""
    value = meta.get("reload_s")
    if isinstance(value, int | float) and math.isfinite(value) and value > 0:
        return float(value)
    return nbytes / _PRIOR_BYTES_PER_S


# --- what it is made of ----------------------------------------------------------------------------------------------


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


# --- the ledger ------------------------------------------------------------------------------------------------------


class Ledger:
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
