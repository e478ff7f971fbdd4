"""One worker's checkpoints: which are on disk, which are in host memory, who uses them.

A key goes absent -> fetching -> disk -> reading -> host. A failure says why, and the next load tries afresh; want of memory is
no failure of the checkpoint, which stays where it is. One event loop is the only writer; bytes are moved by threads. A load of
one key is shared by all who want it, a lease pins what it handed out, and a copy is declared resident after its last byte was
checked. Host memory belongs to a pool (:mod:`sllmdask.loader.hostpool`), which the workers of a node may share: what one of
them has read, the others have.

A lease may be had before its bytes are there: its tensors have their places, and its ``arrivals`` say which of them may be
looked at. So a model can be built, and run layer by layer, while it is read.

Checkpoints are read from disk one after the other, each by all readers: alone on the disk it is read at full speed, and what
was measured predicts the next load. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``: one queue per server.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sllmdask.config import WorkerSettings
from sllmdask.errors import (
    Cancelled,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    DiskFull,
    InsufficientMemory,
    LoadFailed,
    SllmError,
    SourceUnreachable,
)
from sllmdask.loader.access import Access
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.buffers import Buffer, BufferPool, Staging, address_of, lease_nbytes
from sllmdask.loader.disk import PARTIAL, DiskTier
from sllmdask.loader.fallback import Fallback
from sllmdask.loader.fetch import Fetch, Origin
from sllmdask.loader.format import CheckpointIndex, CheckpointInfo, read_index, read_info, variants
from sllmdask.loader.hostpool import HostPool, Segment
from sllmdask.loader.peer_origin import PeerOrigin
from sllmdask.loader.peer_server import DataServer, Served
from sllmdask.loader.plan import BLOCK, ReadPlan, plan_reads
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.reader import ChunkSource, FileSystems, LocalFiles, read_chunks
from sllmdask.loader.remote import is_remote, open_remote, origin_of
from sllmdask.loader.tee import Tee
from sllmdask.loader.tiers import StateDict, tensor_views
from sllmdask.policy.estimate import PRIOR_BYTES_PER_S, smaller_is_faster
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: The variant of our own format beside ``raw``.
COMPRESSED = "split16"

#: Threads of one store. Most of them wait: for a network, or for another thread or process that fetches the same. The event
#: loop's own few would all wait one day, and those that they wait for would find no thread.
_MAX_THREADS = 256

T = TypeVar("T")

#: Seconds within which the memory of a load that was called off is free again once its threads have stopped.
SETTLE_S = 1.0

#: (bytes so far, bytes in all): never backwards, and equal at the end.
Progress = Callable[[int, int], None]


class State(StrEnum):
    """What a key is to one store."""

    ABSENT = "absent"
    FETCHING = "fetching"
    DISK = "disk"
    READING = "reading"
    HOST = "host"
    FAILED = "failed"


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    chunk_size: int = 16 * 1024**2,
    n_readers: int = 4,
    variant: str | None = None,
    pool: BufferPool | None = None,
    staging: Staging | None = None,
    file_systems: FileSystems | None = None,
) -> StateDict:
    """The tensors of the checkpoint at `path`, a directory or one safetensors file, in private memory.

    Reads with `n_readers` threads, safetensors `chunk_size` bytes at a time; needs no store, no event loop. All tensors lie over
    one buffer, which is given back when the last of them is gone: to `pool`, whose pages are used again, or to the system. Who
    loads often keeps `staging` (scratch memory) and `file_systems` (what was learnt of them), too. `variant` is one of our own
    format's. Raises :class:`CheckpointError` and :class:`OSError`.
    """
    index = read_index(path, variant)
    plan = plan_reads(index, chunk_size)
    buffer = (pool or BufferPool(lease_nbytes(plan.nbytes))).lease(plan.nbytes)
    source = LocalFiles(plan, file_systems)
    read_chunks(plan, address_of(buffer), source=source, n_threads=n_readers, staging=staging)
    return tensor_views(index, plan, buffer)


@dataclass(eq=False)
class _Copy:
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
        return self.index.nbytes


@dataclass(eq=False)
class _Waiter:
    lease: asyncio.Future[HostLease]
    started: float
    whole: bool


@dataclass(eq=False)
class _Flight:
    """One load under way. When its last waiter has left it is called off: it is its record's flight no more, and ends soon."""

    cancel: threading.Event = field(default_factory=threading.Event)
    waiters: set[_Waiter] = field(default_factory=set)
    listeners: list[Progress] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    tier_from: Tier = Tier.DISK
    copy: _Copy | None = None
    #: What it waits for before it reads, see :meth:`unless_called_off`.
    waiting: asyncio.Future[Any] | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.waiters) or (self.copy is not None and self.copy.n_leases > 0)

    def call_off(self) -> None:
        self.cancel.set()
        if self.waiting is not None:
            self.waiting.cancel()

    async def unless_called_off(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which uses no thread and may take as long as others like."""
        waiting = self.waiting = asyncio.ensure_future(work)
        try:
            return await waiting
        finally:
            self.waiting = None


@dataclass(eq=False)
class _Record:
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
    copy: _Copy | None = None
    flight: _Flight | None = None

    @property
    def n_leases(self) -> int:
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

    def __init__(self, store: CheckpointStore, record: _Record, copy: _Copy, seconds: float, hit: bool) -> None:
        self.key = record.key
        self.nbytes = copy.nbytes
        self.tier_from = Tier.HOST if hit else copy.tier_from
        self.seconds = seconds
        self.tensors = dict(copy.tensors)
        self.arrivals = copy.arrivals
        self.index, self.plan = copy.index, copy.plan
        self._copy: _Copy | None = copy
        self._release: Callable[[], None] | None = partial(store._unpin, record, copy)

    @property
    def path(self) -> str:
        """Where the files beside the weights are; it changes when a fetch from elsewhere is completed."""
        assert self._copy is not None, "released"
        return self._copy.path

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


class CheckpointStore:
    """Brings checkpoints to the host memory of `pool` and keeps them there. All methods belong to one event loop.

    The store owns the pool: :meth:`close` closes it. A checkpoint whose files have changed since it was read is read again.
    """

    def __init__(self, settings: WorkerSettings, pool: HostPool) -> None:
        self._settings = settings
        self._disk = DiskTier(Path(settings.store_dir).expanduser(), settings.disk_quota)
        self._pool = pool
        self._records: dict[str, _Record] = {}
        self._flights: set[_Flight] = set()
        self._tasks: set[asyncio.Future[None]] = set()
        self._closing = threading.Event()
        self._server: DataServer | None = None
        self._token = ""
        self._connect_tls: ssl.SSLContext | None = None
        self._serving = threading.Lock()
        self._from_disk: dict[str, Served] = {}
        #: Where the files of keys were seen that were not loaded.
        self._seen: dict[str, str] = {}
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="store")
        #: Of the fetches that are no loads.
        self._cancels: set[threading.Event] = set()
        self._disk_turn = asyncio.Lock()
        self._staging = Staging()
        self._file_systems = FileSystems()
        self._bandwidth = BandwidthMeter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: list[Callable[[], None]] = []
        self._version = 0
        self._announcing = False
        self._closed = False
        #: When the last load that was called off has ended.
        self._called_off_at = -math.inf
        self._disk_used = self._disk_capacity = 0
        #: Bytes of the largest checkpoint that was seen.
        self._largest = 0
        pool.subscribe(self._changed)

    async def start(self) -> None:
        """Join the pool, and see what there is. Raises :class:`HostPoolUnavailable`."""
        self._loop = asyncio.get_running_loop()
        await self._pool.start()
        await self._look_at_disk()

    # --- asking ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything a scheduler needs to know, as plain msgpack types; ``version`` grows with every change but progress.

        Keys that another worker of the node has loaded are listed too: they are resident here.
        """
        resident = self._pool.resident()
        keys = {}
        for record in self._records.values():
            # What is in use here is here, even where the pool's keeper has died.
            in_host = record.flight is None and (record.pool_key in resident or record.copy is not None)
            keys[record.key] = {
                "source": record.source,
                "state": str(State.HOST if in_host else record.state),
                "nbytes": record.nbytes,
                "done": record.nbytes if in_host else record.done,
                "leases": record.n_leases,
                "reason": record.reason,
            }
        for meta in resident.values():
            keys.setdefault(
                meta["key"],
                {
                    "source": meta["source"],
                    "state": str(State.HOST),
                    "nbytes": meta["checkpoint_nbytes"],
                    "done": meta["checkpoint_nbytes"],
                    "leases": 0,
                    "reason": None,
                },
            )
        return {
            "version": self._version,
            "keys": keys,
            "tiers": {
                "host": {"used": self._pool.used, "capacity": self._pool.capacity},
                "disk": {"used": self._disk_used, "capacity": self._disk_capacity},
            },
            "bandwidth": {kind: speed for kind, speed in self._bandwidth.snapshot().items() if "/" not in kind},
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` soon after each change, once for changes made together; returns what ends that."""
        self._subscribers.append(callback)
        return partial(self._subscribers.remove, callback)

    def tier_of_load(self, key: str) -> Tier:
        """Where the bytes of the load of `key` that is under way come from."""
        record = self._records.get(key)
        if record is None or record.flight is None:
            return Tier.HOST
        return record.flight.tier_from

    async def on_disk(self, source: str) -> bool:
        """Whether the files of `source` are on this node: a directory, or a complete copy of what is elsewhere."""
        try:
            return await self._in_thread(self._disk.find, source) is not None
        except CheckpointNotFound:
            return False

    async def inspect(self, key: str, source: str, peers: Sequence[str] = ()) -> CheckpointInfo:
        """What the files of `source` say: a directory, an http(s) address, a hub id, or what one of `peers` has.

        Of what is elsewhere only the small files and the headers are fetched; ``path`` has those. Raises
        :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`.
        """

        def look(fetch: Fetch) -> CheckpointInfo:
            return read_info(source, str(fetch.directory))

        path = await self._directory(source, peers)
        found = path if path is not None else await self._fetched(key, source, peers, look)
        if isinstance(found, Path):
            found = await self._in_thread(read_info, source, str(found))
            self._seen[key] = found.path
        self._expect(found.nbytes)
        return found

    async def pull(self, key: str, source: str, on_progress: Progress | None = None, peers: Sequence[str] = ()) -> str:
        """Bring the files of `source` to this node's disk, and to no memory; returns the directory.

        Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`, :class:`DiskFull`.
        """
        loop, cancel = asyncio.get_running_loop(), threading.Event()

        def advance(done: int, nbytes: int) -> None:
            if on_progress is not None:
                loop.call_soon_threadsafe(on_progress, done, nbytes)

        def pull(fetch: Fetch) -> Path:
            self._free_disk(source, fetch.index.nbytes)
            return fetch.pull(self._settings.chunk_size, n_threads=self._settings.n_readers, on_progress=advance, cancel=cancel)

        path = await self._directory(source, peers)
        if path is None:
            path = await self._fetched(key, source, peers, pull, cancel)
            await self._look_at_disk()
        self._seen[key] = str(path)
        return str(path)

    async def _fetched(
        self,
        key: str,
        source: str,
        peers: Sequence[str],
        use: Callable[[Fetch], T],
        cancel: threading.Event | None = None,
    ) -> T | Path:
        """What `use`, called in a thread, makes of a fetch of `source`; or where another process has completed one meanwhile."""
        cancel = cancel or threading.Event()

        def work() -> T | Path:
            _, fetch = self._open_fetch(key, source, peers, cancel)
            if not isinstance(fetch, Fetch):
                return fetch
            # Closed by the thread that uses it: whoever waits may be cancelled.
            with fetch:
                if cancel.is_set():
                    raise Cancelled("nobody waits for it any more")
                return use(fetch)

        self._cancels.add(cancel)
        try:
            return await self._in_thread(work)
        except OSError as error:
            raise LoadFailed(key, self._why(error)) from None
        finally:
            cancel.set()
            self._cancels.discard(cancel)

    # --- loading -----------------------------------------------------------------------------------------------------

    async def load(
        self,
        key: str,
        source: str,
        on_progress: Progress | None = None,
        *,
        whole: bool = True,
        peers: Sequence[str] = (),
    ) -> HostLease:
        """A lease of checkpoint `key`, brought from `source` unless it is in host memory. Loads of one key share one read.

        `whole`: when every byte is there; otherwise as soon as every tensor has its place, see :class:`HostLease`. `peers`
        have the checkpoint too, and are asked where it is not on this disk. A caller that is cancelled leaves the others
        alone; when the last has left, the read stops.

        Raises :class:`CheckpointError`, :class:`InsufficientMemory` (in bytes of the pool), :class:`LoadFailed`.
        """
        started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        record = self._record(key, source)
        copy = record.copy
        if copy is not None and (copy.arrivals is None or not whole):
            if on_progress is not None:
                on_progress(record.nbytes if copy.arrivals is None else record.done, record.nbytes)
                if record.flight is not None:
                    record.flight.listeners.append(on_progress)
            return self._pin(record, copy, started, hit=copy.arrivals is None)

        flight = record.flight or self._take_off(record, peers)
        waiter = _Waiter(self._loop.create_future(), started, whole)
        flight.waiters.add(waiter)
        if on_progress is not None:
            flight.listeners.append(on_progress)
            if flight.copy is not None:
                on_progress(record.done, record.nbytes)
        try:
            return await waiter.lease
        except asyncio.CancelledError:
            if on_progress is not None:
                flight.listeners.remove(on_progress)
            # The lease may have arrived in the moment in which its caller left.
            if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
                waiter.lease.result().release()
            raise
        finally:
            flight.waiters.discard(waiter)
            self._left(record, flight)

    async def evict(self, key: str) -> bool:
        """Drop the host copy of `key`; false if there is none or a lease pins it, of any worker of the node."""
        record = self._records.get(key)
        if record is not None and record.copy is not None:
            return False
        pool_keys = {pool_key for pool_key, meta in self._pool.resident().items() if meta["key"] == key}
        if record is not None and record.pool_key is not None:
            # What has lost its last bytes is not resident, but it is there.
            pool_keys.add(record.pool_key)
        evicted = any([await self._pool.evict(pool_key) for pool_key in pool_keys])
        if evicted:
            self._changed()
        return evicted

    async def close(self) -> None:
        """Stop all reads and leave the pool. Loads end with :class:`LoadFailed`."""
        self._closed = True
        self._closing.set()
        for cancel in self._cancels:
            cancel.set()
        for flight in self._flights:
            flight.call_off()
        while tasks := [*self._tasks, *(flight.task for flight in self._flights if flight.task is not None)]:
            await asyncio.wait(tasks)
        server, self._server = self._server, None
        if server is not None:
            await self._in_thread(server.close)
        for record in self._records.values():
            copy = record.copy
            if copy is not None and copy.served is not None:
                copy.served.close()
                copy.served = None
            if copy is not None and copy.hold is not None:
                os.close(copy.hold)
                copy.hold = None
        while self._from_disk:
            self._from_disk.popitem()[1].close()
        await self._pool.close()
        self._threads.shutdown(wait=False)

    # --- giving away -------------------------------------------------------------------------------------------------

    @property
    def data_address(self) -> str | None:
        """``host:port`` at which other workers may have what is here; ``None`` before :meth:`serve`."""
        return None if self._server is None else self._server.address

    async def serve(
        self,
        host: str,
        token: str,
        listen_tls: ssl.SSLContext | None = None,
        connect_tls: ssl.SSLContext | None = None,
    ) -> None:
        """Give checkpoints to other workers that know `token`, and take theirs; again, with another token, in its place."""
        if self._server is None or token != self._token:
            old = self._server
            self._token, self._connect_tls = token, connect_tls
            self._server = DataServer(host, 0, token, self._lookup, tls=listen_tls)
            if old is not None:
                await self._in_thread(old.close)
            self._changed()

    def _lookup(self, key: str) -> Served | None:
        """In a thread of the server: what is here of `key`; from memory while it is in use here, else from disk."""
        with self._serving:
            record = self._records.get(key)
            copy = None if record is None else (record.flight.copy if record.flight else None) or record.copy
            found = None if copy is None else self._served_from_memory(copy)
            if found is not None:
                return found
            return self._served_from_disk(key, record.path if record and record.path else self._seen.get(key))

    def _served_from_memory(self, copy: _Copy) -> Served | None:
        buffer, index = copy.buffer, copy.index
        if copy.served is not None or buffer is None:
            return copy.served
        complete = not index.directory.endswith(PARTIAL)
        try:
            served = copy.served = Served(index, plan=copy.plan, buffer=buffer, arrivals=copy.arrivals, on_disk=complete)
        except OSError as error:
            if copy.index is not index:
                # The directory has its final name only now.
                return self._served_from_memory(copy)
            logger.info("cannot be given away path=%s cause=%s", index.directory, str(error))
            return None
        if copy.buffer is None:
            # It was given up meanwhile, by the event loop, which has not seen this.
            copy.served = None
            served.close()
            return None
        return served

    def _served_from_disk(self, key: str, path: str | None) -> Served | None:
        old = self._from_disk.pop(key, None)
        served = None
        try:
            index = None if path is None else read_index(path)
            if index is not None:
                served = old if old is not None and old.fingerprint == index.fingerprint else Served(index)
                self._from_disk[key] = served
        except (CheckpointError, OSError) as error:
            logger.info("cannot be given away any more key=%s cause=%s", key, str(error))
        if old is not None and old is not served:
            old.close()
        return served

    # --- one key -----------------------------------------------------------------------------------------------------

    def _record(self, key: str, source: str) -> _Record:
        """The record of `key`, to be loaded from `source`."""
        if self._closed:
            raise LoadFailed(key, "the worker's store is closed")
        record = self._records.get(key)
        if record is not None and record.source != source:
            if record.flight or record.n_leases:
                raise LoadFailed(key, f"it is in use from {record.source!r}; unload it before it is loaded from {source!r}")
            if record.pool_key is not None:
                self._background(self._drop(record.pool_key))
            record = None
        if record is None:
            record = self._records[key] = _Record(key, source)
        return record

    def _pin(self, record: _Record, copy: _Copy, started: float, *, hit: bool) -> HostLease:
        copy.n_leases += 1
        self._changed()
        return HostLease(self, record, copy, time.perf_counter() - started, hit)

    def _unpin(self, record: _Record, copy: _Copy) -> None:
        assert copy.n_leases > 0
        copy.n_leases -= 1
        if record.flight is not None and record.flight.copy is copy:
            self._left(record, record.flight)
        elif not copy.n_leases:
            self._let_go(record, copy)
        self._changed()

    def _let_go(self, record: _Record, copy: _Copy) -> None:
        """Nobody here uses the copy: it is the pool's to keep."""
        if record.copy is copy:
            record.copy = None
        self._give_up(copy)
        if copy.damage is not None and record.pool_key is not None:
            self._background(self._drop(record.pool_key))

    def _give_up(self, copy: _Copy) -> None:
        """Let go of the memory: unpinned, if it is whole, or discarded."""
        copy.tensors, copy.buffer = {}, None
        served, copy.served = copy.served, None
        copy.segment.release()
        hold, copy.hold = copy.hold, None
        if hold is not None:
            os.close(hold)
        if served is not None:
            # It waits for who is being fed.
            self._background(self._in_thread(served.close))

    # --- one flight --------------------------------------------------------------------------------------------------

    def _take_off(self, record: _Record, peers: Sequence[str]) -> _Flight:
        flight = record.flight = _Flight()
        record.reason, record.done = None, 0
        self._flights.add(flight)
        flight.task = asyncio.get_running_loop().create_task(self._fly(record, flight, peers), name=f"load {record.key}")
        return flight

    def _left(self, record: _Record, flight: _Flight) -> None:
        """Somebody has left; a flight that nobody wants is called off."""
        if record.flight is not flight or flight.wanted:
            return
        flight.call_off()
        if flight.copy is not None and flight.copy.arrivals is not None:
            flight.copy.arrivals.fail(Cancelled("the load was called off"))
        record.flight = record.copy = None
        record.state, record.done = record.at_rest, 0
        self._changed()

    async def _fly(self, record: _Record, flight: _Flight, peers: Sequence[str]) -> None:
        failure: SllmError | None = LoadFailed(record.key, "the worker's store is closed")
        try:
            await self._bring(record, flight, peers)
            failure = None
        except (Cancelled, asyncio.CancelledError):
            flight.cancel.set()
            if record.flight is not flight:
                failure = Cancelled("the load was called off")
        except SllmError as error:
            # Made anew: the traceback of this one holds the buffer of the failed read.
            failure = type(error)(*error.args)
        except OSError as error:
            failure = LoadFailed(record.key, self._why(error))
        except Exception as error:
            logger.exception("load failed model=%s source=%s", record.key, record.source)
            failure = LoadFailed(record.key, f"{type(error).__name__}: {error}")
        finally:
            self._flights.discard(flight)
            if flight.cancel.is_set():
                self._called_off_at = time.monotonic()
            self._land(record, flight, failure)

    async def _bring(self, record: _Record, flight: _Flight, peers: Sequence[str]) -> None:
        """Bring `record`'s checkpoint to host memory, from the first of its places that can supply it."""
        path = await self._directory(record.source, peers)
        if path is not None:
            if record.flight is flight:
                record.path = str(path)
            try:
                await self._bring_from_disk(record, flight, path)
                return
            except CheckpointCorrupt as error:
                if not await self._in_thread(self._disk.quarantine, path, error.message):
                    raise
                record.path = None
                # Somebody may build upon these tensors already; then the next load finds another place.
                if not self._start_over(record, flight):
                    raise
        await self._bring_from_afar(record, flight, peers)

    def _start_over(self, record: _Record, flight: _Flight) -> bool:
        """Give up the copy that `flight` was to fill, unless somebody has a lease on it."""
        copy = flight.copy
        if copy is None:
            return True
        if copy.n_leases:
            return False
        flight.copy = None
        if record.copy is copy:
            record.copy = None
        self._give_up(copy)
        return True

    async def _bring_from_disk(self, record: _Record, flight: _Flight, path: Path) -> None:
        index = await self._in_thread(self._read_index, path, self._pool.resident())
        plan = plan_reads(index, self._settings.chunk_size)
        self._move(record, flight, State.DISK)
        await self._into_memory(record, flight, index, plan, Tier.DISK)

    def _read_index(self, path: Path, resident: Container[str]) -> CheckpointIndex:
        """The index of the checkpoint at `path`; where it is there compressed, too, of the variant that is loaded sooner.

        Of keys of the pool those are `resident`.
        """
        if len(variants(path)) < 2:
            return read_index(path)
        raw, smaller = (read_index(path, variant) for variant in ("raw", COMPRESSED))
        for index in (raw, smaller):
            if self._pool_key(index) in resident:
                return index
        speeds = self._bandwidth.snapshot()
        as_is, compressed = (speeds.get(kind, {}).get("bytes_per_s") for kind in (str(Tier.DISK), _kind(Tier.DISK, smaller)))
        stored_nbytes = sum(file.nbytes for file in smaller.files)
        return smaller if smaller_is_faster(raw.nbytes, stored_nbytes, as_is, compressed) else raw

    async def _bring_from_afar(self, record: _Record, flight: _Flight, peers: Sequence[str]) -> None:
        """Fetch the checkpoint to host memory, and to disk beside; or find that another worker of the node has done so."""
        self._move(record, flight, State.FETCHING)
        tier, fetch = await self._in_thread(self._open_fetch, record.key, record.source, peers, flight.cancel)
        if not isinstance(fetch, Fetch):
            await self._bring_from_disk(record, flight, fetch)
            return
        teeing = False
        try:
            _give_up_if(flight)
            try:
                await self._in_thread(self._free_disk, record.source, fetch.index.nbytes)
            except DiskFull as error:
                logger.warning("no disk copy source=%s cause=%s; the load goes on from memory", record.source, error.message)
                await self._in_thread(fetch.without_disk)
            plan = plan_reads(fetch.index, self._settings.chunk_size)
            teeing = await self._into_memory(record, flight, fetch.index, plan, tier, fetch)
        finally:
            if not teeing:
                await self._in_thread(fetch.close)

    async def _directory(self, source: str, peers: Sequence[str]) -> Path | None:
        """Where the files are on this disk; ``None``: elsewhere. Raises :class:`CheckpointNotFound`: nowhere."""
        if self._closed:
            raise Cancelled("the worker's store is closed")
        try:
            path = await self._in_thread(self._disk.find, source)
        except CheckpointNotFound:
            if not peers:
                raise
            return None
        if path is not None:
            self._disk.touch(path)
        return path

    def _open_fetch(self, key: str, source: str, peers: Sequence[str], cancel: threading.Event) -> tuple[Tier, Fetch | Path]:
        """In a thread: a fetch of `source`, from a peer if one can supply it; or where another process has completed one."""
        failure: SllmError | None = None
        access = Access(self._settings.remote_hosts)
        if peers and self._server is not None:
            final = self._disk.final(source)
            try:
                origin: Origin = PeerOrigin(peers, self._token, key, server=self._server, tls=self._connect_tls)
                if is_remote(source):
                    origin = Fallback(origin, lambda variant: origin_of(source, variant=variant, access=access))
                return Tier.PEER, Fetch.open(origin, final, cancel=cancel) or final
            except (CheckpointError, SourceUnreachable) as error:
                logger.info("peers cannot supply it model=%s cause=%s", key, error.message)
                failure = error
        if is_remote(source):
            return Tier.REMOTE, open_remote(source, self._disk.root, access=access, cancel=cancel)
        raise failure or CheckpointNotFound(source, "no such directory, and no worker that could supply it")

    async def _into_memory(
        self,
        record: _Record,
        flight: _Flight,
        index: CheckpointIndex,
        plan: ReadPlan,
        tier_from: Tier,
        fetch: Fetch | None = None,
    ) -> bool:
        """Find the checkpoint in the pool, or read it to there, from local files or from `fetch`.

        Returns whether what was fetched is still on its way to disk; `fetch` is closed at the end of it.
        """
        _give_up_if(flight)
        pool_key = self._pool_key(index)
        if record.flight is flight:
            record.nbytes, record.pool_key = index.nbytes, pool_key
        seconds = self._bandwidth.estimate(_kind(tier_from, index), index.nbytes)
        meta = {
            "key": record.key,
            "source": record.source,
            "checkpoint_nbytes": index.nbytes,
            "reload_s": seconds or index.nbytes / PRIOR_BYTES_PER_S[tier_from],
        }
        segment = await self._acquire(record, flight, pool_key, plan.nbytes, meta)
        copy = flight.copy = self._copy_in(segment, index, plan, tier_from)
        flight.tier_from = copy.tier_from
        copy.hold = self._disk.hold(Path(copy.path))
        if copy.arrivals is None:
            return False
        tee = None if fetch is None else fetch.tee(plan, segment.buffer)
        try:
            self._placed(record, flight, copy)
            if fetch is None:
                await flight.unless_called_off(self._disk_turn.acquire())
                try:
                    await self._timed_read(record, flight, plan, copy)
                finally:
                    self._disk_turn.release()
            else:
                await self._timed_read(record, flight, plan, copy, fetch, tee)
        except BaseException:
            if tee is not None:
                await asyncio.shield(self._in_thread(tee.close))
            raise
        segment.publish()
        if fetch is None or tee is None:
            return False
        self._start_tee(record, fetch, tee, copy)
        return True

    async def _acquire(self, record: _Record, flight: _Flight, pool_key: str, nbytes: int, meta: dict[str, Any]) -> Segment:
        waited = partial(self._heard, record, flight)
        while True:
            try:
                return await flight.unless_called_off(self._pool.acquire(pool_key, nbytes, meta, on_progress=waited))
            except InsufficientMemory as error:
                ending = [other.task for other in self._flights if other.task is not None and other.cancel.is_set()]
                settling = time.monotonic() < self._called_off_at + SETTLE_S
                if not (ending or settling) or flight.cancel.is_set():
                    raise InsufficientMemory(record.key, error.needed, error.available) from None
            # What was called off has its memory until its threads have stopped, and the pool has heard of it.
            await flight.unless_called_off(_any_of(ending) if ending else asyncio.sleep(SETTLE_S / 50))

    def _copy_in(self, segment: Segment, index: CheckpointIndex, plan: ReadPlan, tier_from: Tier) -> _Copy:
        """What `segment` holds, or will hold; no local name has its tensors, which the traceback of a failure would keep."""
        whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting for it.
        whole.add_done_callback(lambda done: done.cancelled() or done.exception())
        return _Copy(
            segment,
            index.directory,
            index,
            plan,
            tensor_views(index, plan, segment.buffer),
            Tier.HOST if segment.ready else tier_from,
            None if segment.ready else Arrivals(plan),
            whole,
            buffer=segment.buffer,
        )

    async def _timed_read(
        self,
        record: _Record,
        flight: _Flight,
        plan: ReadPlan,
        copy: _Copy,
        fetch: Fetch | None = None,
        tee: Tee | None = None,
    ) -> None:
        _give_up_if(flight)
        # While it comes from elsewhere its files are not complete: nobody may count on them.
        self._move(record, flight, State.READING if fetch is None else State.FETCHING)
        started = time.perf_counter()
        source = LocalFiles(plan, self._file_systems) if fetch is None else fetch.chunks(flight.cancel)
        await self._in_thread(self._read, record, flight, plan, copy, source, tee)
        # What came from the page cache, or was there from the last time, tells nothing of the tier.
        if isinstance(source, LocalFiles):
            cached = source.cached_nbytes > copy.nbytes // 10
        else:
            cached = fetch is not None and fetch.resumed
        if copy.segment.resident_nbytes == 0 and not cached:
            self._bandwidth.observe(_kind(copy.tier_from, copy.index), copy.nbytes, time.perf_counter() - started)

    def _read(
        self,
        record: _Record,
        flight: _Flight,
        plan: ReadPlan,
        copy: _Copy,
        source: ChunkSource,
        tee: Tee | None,
    ) -> None:
        """In a thread."""
        loop = self._loop
        assert loop is not None
        # Until no thread writes to it, whatever the event loop has given up meanwhile.
        buffer = copy.segment.buffer

        def advance(done: int) -> None:
            copy.segment.progress(done)
            loop.call_soon_threadsafe(self._advance, record, flight, done)

        try:
            read_chunks(
                plan,
                address_of(buffer),
                source=source,
                n_threads=self._settings.n_readers,
                arrivals=copy.arrivals,
                staging=self._staging,
                tee=tee,
                on_progress=advance,
                cancel=flight.cancel,
                direct_target=isinstance(self._pool, PrivatePool),
                resident_nbytes=copy.segment.resident_nbytes,
            )
        finally:
            # The traceback of a failure lives longer.
            del buffer

    # --- the disk ----------------------------------------------------------------------------------------------------

    def _free_disk(self, source: str, nbytes: int) -> None:
        """In a thread: room for a copy of `source`. Raises :class:`DiskFull`."""
        records = list(self._records.values())
        in_use = {Path(record.path) for record in records if record.path and (record.flight or record.copy)}
        removed = set(map(str, self._disk.make_room(source, nbytes, in_use)))
        with self._serving:
            for record in records:
                if record.path in removed:
                    # Open files would keep its room on the disk.
                    self._served_from_disk(record.key, None)

    async def _look_at_disk(self) -> None:
        """Learn what the disk tier holds: for the account, which must not wait for a disk."""
        paths = {record.path for record in self._records.values() if record.path}

        def look() -> tuple[int, int, set[str]]:
            return self._disk.used, self._disk.capacity, {path for path in paths if not os.path.isdir(path)}

        self._disk_used, self._disk_capacity, gone = await self._in_thread(look)
        for record in self._records.values():
            if record.path in gone:
                record.path = None
                record.state = record.at_rest if record.state is State.DISK else record.state
        self._changed()

    def _start_tee(self, record: _Record, fetch: Fetch, tee: Tee, copy: _Copy) -> None:
        """Complete the disk copy behind the load; the buffer stays until it is complete."""
        self._background(self._finish_tee(record, fetch, tee, copy))

    async def _finish_tee(self, record: _Record, fetch: Fetch, tee: Tee, copy: _Copy) -> None:
        buffer = copy.segment.buffer
        try:
            path = await self._in_thread(tee.finish, self._closing)
            if path is not None:
                record.path = copy.path = str(path)
                copy.index = replace(copy.index, directory=str(path))
                record.state = record.at_rest if record.state is State.ABSENT else record.state
                if copy.buffer is not None:
                    copy.hold = self._disk.hold(path)
        except Cancelled:
            logger.info("disk copy not completed source=%s", record.source)
        except CheckpointCorrupt as error:
            logger.error("wrong bytes were fetched, and are dropped source=%s cause=%s", record.source, error.message)
            self._damaged(record, copy, CheckpointCorrupt(*error.args))
        except SllmError as error:
            # The bytes in memory were checked as far as that goes; those of the next fetch may be right.
            logger.warning("disk copy given up source=%s cause=%s", record.source, error.message)
        finally:
            await self._in_thread(tee.close)
            # A model that is about to be built over its tensors needs its configuration, whatever became of the disk copy.
            await self._in_thread(fetch.leave if copy.n_leases else fetch.close)
            del buffer
            await self._look_at_disk()

    def _damaged(self, record: _Record, copy: _Copy, error: CheckpointCorrupt) -> None:
        """The next load fetches it again; who uses these bytes hears of it."""
        copy.damage = error
        record.reason = error.message
        if not copy.n_leases and record.pool_key is not None:
            self._background(self._drop(record.pool_key))
        for callback in copy.on_damage:
            # Each by itself, and none inside of what it may end.
            asyncio.get_running_loop().call_soon(callback, error)

    def _placed(self, record: _Record, flight: _Flight, copy: _Copy) -> None:
        """Every tensor has its place: who does not wait for the bytes has its lease."""
        if record.flight is not flight:
            return
        record.copy = copy
        for waiter in list(flight.waiters):
            if not waiter.whole and not waiter.lease.done():
                waiter.lease.set_result(self._pin(record, copy, waiter.started, hit=False))

    def _advance(self, record: _Record, flight: _Flight, done: int) -> None:
        if record.flight is not flight:
            return
        # What another process had brought when it died has to be read again, which is nothing new to who listens.
        record.done = max(done, record.done)
        for listener in flight.listeners:
            # Each by itself: one that raises must not keep the others from hearing.
            asyncio.get_running_loop().call_soon(listener, record.done, record.nbytes)

    def _heard(self, record: _Record, flight: _Flight, done: int, _total: int) -> None:
        """Another process of the node brings it."""
        self._advance(record, flight, min(done, record.nbytes))

    def _expect(self, nbytes: int) -> None:
        """A checkpoint of so many bytes may be wanted: have memory ready whose pages need not be found first."""
        if self._settings.prefault and nbytes > self._largest:
            self._largest = nbytes
            self._pool.prefault(min(lease_nbytes(nbytes + BLOCK), self._pool.capacity))

    def _pool_key(self, index: CheckpointIndex) -> str:
        """The same for the same bytes: in the same directory, which keeps its key when a fetch is completed, and unchanged."""
        directory = os.path.realpath(index.directory).removesuffix(PARTIAL)
        return hashlib.sha256(f"{directory}\0{index.fingerprint}".encode()).hexdigest()

    def _move(self, record: _Record, flight: _Flight, state: State) -> None:
        if record.flight is flight:
            record.state = state
            self._changed()

    def _land(self, record: _Record, flight: _Flight, failure: SllmError | None) -> None:
        """In one step: the flight ends, the copy is whole, and each waiter has its lease; or the reason why not."""
        copy, waiters = flight.copy, [waiter for waiter in flight.waiters if not waiter.lease.done()]
        if copy is not None and failure is None:
            copy.arrivals = None
            copy.whole.set_result(None)
        elif copy is not None:
            # It went wrong, or was called off; with `failure` for who holds tensors that will never be whole.
            assert failure is not None
            copy.whole.set_exception(type(failure)(*failure.args))
            self._give_up(copy)
        if record.flight is not flight:
            if copy is not None and failure is None:
                self._give_up(copy)
            return
        if failure is None and record.done < record.nbytes:
            self._advance(record, flight, record.nbytes)
        record.flight = None
        if failure is None:
            assert copy is not None
            record.copy, record.state, record.done = copy, record.at_rest, record.nbytes
            for waiter in waiters:
                waiter.lease.set_result(self._pin(record, copy, waiter.started, hit=False))
            if not copy.n_leases:
                self._let_go(record, copy)
        else:
            record.copy = None
            # Want of memory is no fault of the files: they are where they were.
            record.state = State.DISK if isinstance(failure, InsufficientMemory) and record.path else State.FAILED
            record.reason, record.done = failure.message, 0
            logger.warning("load failed model=%s source=%s cause=%s", record.key, record.source, failure.message)
            for waiter in waiters:
                waiter.lease.set_exception(type(failure)(*failure.args))
        self._changed()

    def _why(self, error: OSError) -> str:
        """What the system said, and whose directory it was."""
        below = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(self._disk.root)
        return f"{error}; worker.store_dir is {str(self._disk.root)!r}" if below else str(error)

    async def _drop(self, pool_key: str) -> None:
        await self._pool.evict(pool_key)

    def _background(self, work: Awaitable[None]) -> None:
        """Do something that :meth:`close` waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._version += 1
        if not self._announcing and self._subscribers:
            self._announcing = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._announced)
            # Each by itself: one that raises must not keep the others from hearing.
            for callback in self._subscribers:
                loop.call_soon(callback)

    def _announced(self) -> None:
        self._announcing = False


def _kind(tier: Tier, index: CheckpointIndex) -> str:
    """What the speed of a load is kept under: a compressed checkpoint has a speed of its own."""
    return f"{tier}/{COMPRESSED}" if any(c.codec != "raw" for file in index.files for c in file.chunks) else str(tier)


async def _any_of(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _give_up_if(flight: _Flight) -> None:
    if flight.cancel.is_set():
        raise Cancelled("nobody waits for it any more")
