"""What a store knows of a key: its state, its copy in host memory, the load that is under way, and the leases on it.

A key goes absent -> fetching -> disk -> reading -> host. A failure says why, and the next load tries afresh.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar

from sllmdask.errors import Cancelled, CheckpointCorrupt, SllmError
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Buffer
from sllmdask.loader.format import CheckpointIndex
from sllmdask.loader.hostpool import Progress, Segment
from sllmdask.loader.peer_server import Served
from sllmdask.loader.plan import ReadPlan
from sllmdask.loader.tiers import StateDict
from sllmdask.policy.views import Tier

T = TypeVar("T")


class State(StrEnum):
    """What a key is to one store."""

    ABSENT = "absent"
    FETCHING = "fetching"
    DISK = "disk"
    READING = "reading"
    HOST = "host"
    FAILED = "failed"


@dataclass(eq=False)
class Copy:
    """A checkpoint in host memory, or on its way there."""

    segment: Segment
    #: Where the files beside the weights are.
    path: str
    index: CheckpointIndex
    plan: ReadPlan
    tensors: StateDict
    tier_from: Tier
    #: ``None``: every byte is there.
    arrivals: Arrivals | None
    #: Done when every byte is there, or with what went wrong.
    whole: asyncio.Future[None]
    n_leases: int = 0
    #: Seconds for which its load waited for others, and for which its bytes came.
    queue_s: float = 0.0
    read_s: float = 0.0
    #: While it is open no process removes the disk copy.
    hold: int | None = None
    #: ``None``: it was given up, and is another's to use.
    buffer: Buffer | None = None
    #: What others are given of it.
    served: Served | None = None
    #: Set when it has turned out that bytes which had come from elsewhere are not the model's, and who is told then.
    damage: CheckpointCorrupt | None = None
    on_damage: list[Callable[[SllmError], None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.index.nbytes


@dataclass(eq=False)
class Waiter:
    """Who has asked for a lease at `started`: when every byte is there, or, not `whole`, when each tensor has its place."""

    lease: asyncio.Future[HostLease]
    started: float
    whole: bool


@dataclass(eq=False)
class Flight:
    """One load under way. When its last waiter has left it is called off: it is its record's flight no more, and ends soon."""

    cancel: threading.Event = field(default_factory=threading.Event)
    waiters: set[Waiter] = field(default_factory=set)
    listeners: list[Progress] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    tier_from: Tier = Tier.DISK
    copy: Copy | None = None
    #: What it waits for before it reads, see :meth:`unless_called_off`.
    waiting: asyncio.Future[Any] | None = None

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it, or has a lease on what it brings."""
        return bool(self.waiters) or (self.copy is not None and self.copy.n_leases > 0)

    def call_off(self) -> None:
        """End it soon."""
        self.cancel.set()
        if self.waiting is not None:
            self.waiting.cancel()

    def check(self) -> None:
        """Raise :class:`Cancelled` if it was called off."""
        if self.cancel.is_set():
            raise Cancelled("nobody waits for it any more")

    async def unless_called_off(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which uses no thread and may take as long as others like."""
        waiting = self.waiting = asyncio.ensure_future(work)
        try:
            return await waiting
        finally:
            self.waiting = None


@dataclass(eq=False)
class Record:
    """A key that this store was asked for."""

    key: str
    source: str
    #: Anything but HOST, which is the pool's to say.
    state: State = State.ABSENT
    #: Where its files are, complete.
    path: str | None = None
    pool_key: str | None = None
    nbytes: int = 0
    done: int = 0
    reason: str | None = None
    copy: Copy | None = None
    flight: Flight | None = None

    @property
    def n_leases(self) -> int:
        """Leases on its copy, in this process."""
        return self.copy.n_leases if self.copy else 0

    @property
    def at_rest(self) -> State:
        """Its state when nothing is done with it."""
        return State.DISK if self.path else State.ABSENT


class HostLease:
    """A checkpoint in host memory that stays there until :meth:`release`, on the store's event loop. Also a ``with`` block.

    `tensors` are views shared with other leases, of other processes too, not to be written to; `nbytes` counts their bytes.
    `tier_from` says where they were (``host``: nothing had to be read), `seconds` how long this caller waited. `arrivals` is
    ``None``, or tells which tensors may be looked at: those of a lease that was asked for before all its bytes were there.
    """

    def __init__(self, key: str, copy: Copy, *, seconds: float, hit: bool, release: Callable[[], None]) -> None:
        self.key = key
        self.nbytes = copy.nbytes
        self.tier_from = Tier.HOST if hit else copy.tier_from
        self._hit = hit
        self.seconds = seconds
        self.tensors = dict(copy.tensors)
        self.arrivals = copy.arrivals
        self.index, self.plan = copy.index, copy.plan
        self._copy: Copy | None = copy
        self._release: Callable[[], None] | None = release

    @property
    def path(self) -> str:
        """Where the files beside the weights are; it changes when a fetch from elsewhere is completed."""
        assert self._copy is not None, "released"
        return self._copy.path

    @property
    def times(self) -> tuple[float, float]:
        """Seconds for which its load waited for others, and for which its bytes came; known once every byte is there."""
        assert self._copy is not None, "released"
        return (0.0, 0.0) if self._hit else (self._copy.queue_s, self._copy.read_s)

    @property
    def buffer(self) -> Buffer:
        """The memory behind `tensors`: uint8 of shape ``(plan.nbytes,)``, laid out as `plan` says. It stays while it is held."""
        assert self._copy is not None, "released"
        return self._copy.segment.buffer

    async def complete(self) -> None:
        """Until every byte is there and was checked. Raises what ended the load; the tensors are worth nothing then."""
        if self._copy is not None:
            try:
                await asyncio.shield(self._copy.whole)
            except SllmError as error:
                # Made anew: the traceback of the first one would hold on to who waited before.
                raise type(error)(*error.args) from None

    def on_damage(self, callback: Callable[[SllmError], None]) -> None:
        """Call `callback` if the bytes turn out to be wrong: the hash of a file that was fetched is compared behind the load."""
        if self._copy is not None:
            self._copy.on_damage.append(callback)

    def release(self) -> None:
        """Unpin the copy, which stays until its room is needed; doing it twice does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            self.tensors, self._copy = {}, None
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
