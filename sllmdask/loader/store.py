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
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sllmdask.config import WorkerSettings
from sllmdask.errors import (
    Cancelled,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    InsufficientMemory,
    LoadFailed,
    SllmError,
    SourceUnreachable,
)
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.buffers import BufferPool, Staging, address_of, lease_nbytes
from sllmdask.loader.disk import PARTIAL, DiskTier
from sllmdask.loader.format import CheckpointIndex, CheckpointInfo, read_index, read_info, variants
from sllmdask.loader.hostpool import HostPool, PrivatePool, Segment
from sllmdask.loader.peer import DataServer, PeerOrigin, Served
from sllmdask.loader.plan import BLOCK, ReadPlan, plan_reads
from sllmdask.loader.reader import ChunkSource, FileSystems, LocalFiles, read_chunks
from sllmdask.loader.remote import Access, Fetch, is_remote, open_remote
from sllmdask.loader.tee import Tee
from sllmdask.loader.tiers import StateDict, tensor_views
from sllmdask.policy.estimate import PRIOR_BYTES_PER_S, smaller_is_faster
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: The variant of our own format beside ``raw``.
COMPRESSED = "split16"

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
    #: What others are given of it.
    served: Served | None = None

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

    @property
    def wanted(self) -> bool:
        return bool(self.waiters) or (self.copy is not None and self.copy.n_leases > 0)


@dataclass(eq=False)
class _Record:
    key: str
    source: str
    #: Anything but HOST, which is the pool's to say.
    state: State = State.ABSENT
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
        self._copy: _Copy | None = copy
        self._release: Callable[[], None] | None = partial(store._unpin, record, copy)

    @property
    def path(self) -> str:
        """Where the files beside the weights are; it changes when a fetch from elsewhere is completed."""
        assert self._copy is not None, "released"
        return self._copy.path

    async def complete(self) -> None:
        """Until every byte is there and was checked. Raises what ended the load; the tensors are worth nothing then."""
        if self._copy is not None:
            try:
                await asyncio.shield(self._copy.whole)
            except SllmError as error:
                # Made anew: the traceback of the first one would hold on to who waited before.
                raise type(error)(*error.args) from None

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
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        self._server: DataServer | None = None
        self._token = ""
        self._connect_tls: ssl.SSLContext | None = None
        self._serving = threading.Lock()
        self._from_disk: dict[str, Served] = {}
        self._disk_turn = asyncio.Lock()
        self._staging = Staging()
        self._file_systems = FileSystems()
        self._bandwidth = BandwidthMeter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: list[Callable[[], None]] = []
        self._version = 0
        self._announcing = False
        self._closed = False
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
            return await asyncio.to_thread(self._disk.find, source) is not None
        except CheckpointNotFound:
            return False

    async def inspect(self, key: str, source: str, peers: Sequence[str] = ()) -> CheckpointInfo:
        """What the files of `source` say: a directory, an http(s) address, a hub id, or what one of `peers` has.

        Of what is elsewhere only the small files and the headers are fetched; ``path`` has those. Raises
        :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`.
        """
        path = await self._directory(source, peers)
        if path is None:
            _, fetch = await self._open_fetch(key, source, peers, threading.Event())
            if isinstance(fetch, Fetch):
                path = fetch.directory
                try:
                    info = await asyncio.to_thread(read_info, source, str(path))
                finally:
                    fetch.close()
                self._expect(info.nbytes)
                return info
            path = fetch
        info = await asyncio.to_thread(read_info, source, str(path))
        self._expect(info.nbytes)
        return info

    async def pull(self, key: str, source: str, on_progress: Progress | None = None, peers: Sequence[str] = ()) -> str:
        """Bring the files of `source` to this node's disk, and to no memory; returns the directory.

        Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`, :class:`DiskFull`.
        """
        path = await self._directory(source, peers)
        if path is None:
            cancel = threading.Event()
            _, fetch = await self._open_fetch(key, source, peers, cancel)
            if not isinstance(fetch, Fetch):
                return str(fetch)
            try:
                with fetch:
                    await self._make_disk_room(source, fetch.index.nbytes)
                    pulling = partial(
                        fetch.pull,
                        self._settings.chunk_size,
                        n_threads=self._settings.n_readers,
                        on_progress=on_progress,
                        cancel=cancel,
                    )
                    path = await asyncio.to_thread(pulling)
            except asyncio.CancelledError:
                cancel.set()
                raise
            await self._look_at_disk()
        return str(path)

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
            return self._pin(record, copy, started, hit=copy.arrivals is None)

        flight = record.flight or self._take_off(record, peers)
        waiter = _Waiter(self._loop.create_future(), started, whole)
        flight.waiters.add(waiter)
        if on_progress is not None:
            flight.listeners.append(on_progress)
            if record.state is State.READING:
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
        pool_keys = [pool_key for pool_key, meta in self._pool.resident().items() if meta["key"] == key]
        evicted = any([await self._pool.evict(pool_key) for pool_key in pool_keys])
        if evicted:
            self._changed()
        return evicted

    async def close(self) -> None:
        """Stop all reads and leave the pool. Loads end with :class:`LoadFailed`."""
        self._closed = True
        self._closing.set()
        for flight in self._flights:
            flight.cancel.set()
        while tasks := [*self._tasks, *(flight.task for flight in self._flights if flight.task is not None)]:
            await asyncio.wait(tasks)
        if self._server is not None:
            await asyncio.to_thread(self._server.close)
        for served in self._from_disk.values():
            served.close()
        await self._pool.close()

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
                await asyncio.to_thread(old.close)
            self._changed()

    def _lookup(self, key: str) -> Served | None:
        """In a thread of the server: what is here of `key`; from memory while it is in use here, else from disk."""
        with self._serving:
            record = self._records.get(key)
            copy = None if record is None else (record.flight.copy if record.flight else None) or record.copy
            if copy is not None:
                if copy.served is None:
                    buffer = copy.segment.buffer
                    copy.served = Served(copy.index, plan=copy.plan, buffer=buffer, arrivals=copy.arrivals, on_disk=False)
                return copy.served
            served = self._from_disk.get(key)
            if record is None or record.path is None:
                return served
            if served is None:
                served = self._from_disk[key] = Served(read_index(record.path))
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

    def _give_up(self, copy: _Copy) -> None:
        """Let go of the memory: unpinned, if it is whole, or discarded."""
        copy.tensors = {}
        served, copy.served = copy.served, None
        copy.segment.release()
        if served is not None:
            # It waits for who is being fed.
            self._background(asyncio.to_thread(served.close))

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
        flight.cancel.set()
        if flight.copy is not None and flight.copy.arrivals is not None:
            flight.copy.arrivals.fail(Cancelled("the load was called off"))
        record.flight = record.copy = None
        record.state = State.DISK if record.path else State.ABSENT
        record.done = 0
        self._changed()

    async def _fly(self, record: _Record, flight: _Flight, peers: Sequence[str]) -> None:
        failure: SllmError | None = LoadFailed(record.key, "the worker's store is closed")
        try:
            await self._bring(record, flight, peers)
            failure = None
        except (Cancelled, asyncio.CancelledError):
            flight.cancel.set()
        except SllmError as error:
            # Made anew: the traceback of this one holds the buffer of the failed read.
            failure = type(error)(*error.args)
        except OSError as error:
            failure = LoadFailed(record.key, str(error))
        except Exception as error:
            logger.exception("load failed model=%s source=%s", record.key, record.source)
            failure = LoadFailed(record.key, f"{type(error).__name__}: {error}")
        finally:
            self._flights.discard(flight)
            self._land(record, flight, failure)

    async def _bring(self, record: _Record, flight: _Flight, peers: Sequence[str]) -> None:
        """Bring `record`'s checkpoint to host memory, from the first of its places that can supply it."""
        path = await self._directory(record.source, peers)
        if path is not None:
            try:
                await self._bring_from_disk(record, flight, path)
                return
            except CheckpointCorrupt as error:
                # Somebody may build upon these tensors already; then the next load finds another place.
                if not await asyncio.to_thread(self._disk.quarantine, path, error.message) or flight.copy is not None:
                    raise
                record.path = None
        await self._bring_from_afar(record, flight, peers)

    async def _bring_from_disk(self, record: _Record, flight: _Flight, path: Path) -> None:
        index = await asyncio.to_thread(self._read_index, path)
        plan = plan_reads(index, self._settings.chunk_size)
        if record.flight is flight:
            record.path = index.directory
        self._move(record, flight, State.DISK)
        await self._into_memory(record, flight, index, plan, Tier.DISK)

    def _read_index(self, path: Path) -> CheckpointIndex:
        """The index of the checkpoint at `path`; where it is there compressed, too, of the variant that is loaded sooner."""
        if len(variants(path)) < 2:
            return read_index(path)
        raw, smaller = (read_index(path, variant) for variant in ("raw", COMPRESSED))
        resident = self._pool.resident()
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
        tier, fetch = await self._open_fetch(record.key, record.source, peers, flight.cancel)
        if not isinstance(fetch, Fetch):
            await self._bring_from_disk(record, flight, fetch)
            return
        teeing = False
        try:
            _give_up_if(flight)
            await self._make_disk_room(record.source, fetch.index.nbytes)
            plan = plan_reads(fetch.index, self._settings.chunk_size)
            if record.flight is flight:
                record.path = str(fetch.directory)
            teeing = await self._into_memory(record, flight, fetch.index, plan, tier, fetch)
        finally:
            if not teeing:
                await asyncio.to_thread(fetch.close)

    async def _directory(self, source: str, peers: Sequence[str]) -> Path | None:
        """Where the files are on this disk; ``None``: elsewhere. Raises :class:`CheckpointNotFound`: nowhere."""
        try:
            path = await asyncio.to_thread(self._disk.find, source)
        except CheckpointNotFound:
            if not peers:
                raise
            return None
        if path is not None:
            self._disk.touch(path)
        return path

    async def _open_fetch(
        self, key: str, source: str, peers: Sequence[str], cancel: threading.Event
    ) -> tuple[Tier, Fetch | Path]:
        """A fetch of `source`, from a peer if one can supply it; or where another process has completed one meanwhile."""
        failure: SllmError | None = None
        if peers and self._server is not None:
            final = self._disk.final(source)
            try:
                origin = PeerOrigin(peers, self._token, key, server=self._server, tls=self._connect_tls)
                return Tier.PEER, await asyncio.to_thread(Fetch.open, origin, final, cancel=cancel) or final
            except (CheckpointError, SourceUnreachable) as error:
                logger.info("peers cannot supply it model=%s cause=%s", key, error.message)
                failure = error
        if is_remote(source):
            access = Access(self._settings.remote_hosts)
            return Tier.REMOTE, await asyncio.to_thread(open_remote, source, self._disk.root, access=access, cancel=cancel)
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
        waited = partial(self._heard, record, flight)
        try:
            segment = await self._pool.acquire(pool_key, plan.nbytes, meta, on_progress=waited)
        except InsufficientMemory as error:
            raise InsufficientMemory(record.key, error.needed, error.available) from None
        copy = flight.copy = self._copy_in(segment, index, plan, tier_from)
        flight.tier_from = copy.tier_from
        if copy.arrivals is None:
            return False
        tee = None if fetch is None else fetch.tee(plan, segment.buffer)
        try:
            self._placed(record, flight, copy)
            if fetch is None:
                async with self._disk_turn:
                    await self._timed_read(record, flight, plan, copy, None, None)
            else:
                await self._timed_read(record, flight, plan, copy, fetch.chunks(flight.cancel), tee)
        except BaseException:
            if tee is not None:
                await asyncio.shield(asyncio.to_thread(tee.close))
            segment.discard()
            raise
        segment.publish()
        if fetch is None or tee is None:
            return False
        self._start_tee(record, fetch, tee, copy)
        return True

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
        )

    async def _timed_read(
        self,
        record: _Record,
        flight: _Flight,
        plan: ReadPlan,
        copy: _Copy,
        source: ChunkSource | None,
        tee: Tee | None,
    ) -> None:
        _give_up_if(flight)
        self._move(record, flight, State.READING)
        started = time.perf_counter()
        local = LocalFiles(plan, self._file_systems) if source is None else None
        await asyncio.to_thread(self._read, record, flight, plan, copy, local or source, tee)
        # What came from the page cache, or was there from the last time, tells nothing of the tier.
        if copy.segment.resident_nbytes == 0 and (local is None or not local.cached_nbytes):
            self._bandwidth.observe(_kind(copy.tier_from, copy.index), copy.nbytes, time.perf_counter() - started)

    def _read(
        self,
        record: _Record,
        flight: _Flight,
        plan: ReadPlan,
        copy: _Copy,
        source: ChunkSource | None,
        tee: Tee | None,
    ) -> None:
        """In a thread."""
        loop = self._loop
        assert loop is not None

        def advance(done: int) -> None:
            copy.segment.progress(done)
            loop.call_soon_threadsafe(self._advance, record, flight, done)

        read_chunks(
            plan,
            address_of(copy.segment.buffer),
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

    # --- the disk ----------------------------------------------------------------------------------------------------

    async def _make_disk_room(self, source: str, nbytes: int) -> None:
        in_use = {Path(record.path) for record in self._records.values() if record.path and (record.flight or record.copy)}
        await asyncio.to_thread(self._disk.make_room, source, nbytes, in_use)

    async def _look_at_disk(self) -> None:
        """Learn what the disk tier holds: for the account, which must not wait for a disk."""
        self._disk_used, self._disk_capacity = await asyncio.to_thread(lambda: (self._disk.used, self._disk.capacity))
        self._changed()

    def _start_tee(self, record: _Record, fetch: Fetch, tee: Tee, copy: _Copy) -> None:
        """Complete the disk copy behind the load; the buffer stays until it is complete."""
        self._background(self._finish_tee(record, fetch, tee, copy))

    async def _finish_tee(self, record: _Record, fetch: Fetch, tee: Tee, copy: _Copy) -> None:
        buffer = copy.segment.buffer
        try:
            path = await asyncio.to_thread(tee.finish, self._closing)
            if path is not None:
                record.path = copy.path = str(path)
        except Cancelled:
            logger.info("disk copy not completed source=%s", record.source)
        except SllmError as error:
            # The bytes in memory were checked as far as that goes; those of the next fetch may be right.
            logger.warning("disk copy given up source=%s cause=%s", record.source, error.message)
        finally:
            await asyncio.to_thread(tee.close)
            await asyncio.to_thread(fetch.close)
            del buffer
            await self._look_at_disk()

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
        record.done = done
        for listener in flight.listeners:
            # Each by itself: one that raises must not keep the others from hearing.
            asyncio.get_running_loop().call_soon(listener, done, record.nbytes)

    def _heard(self, record: _Record, flight: _Flight, done: int, _total: int) -> None:
        """Another process of the node brings it."""
        self._advance(record, flight, min(done, record.nbytes))

    def _expect(self, nbytes: int) -> None:
        """A checkpoint of so many bytes may be wanted: have memory ready whose pages need not be found first."""
        if self._settings.prefault and nbytes > self._largest:
            self._largest = nbytes
            self._pool.prefault(min(nbytes + BLOCK, self._pool.capacity))

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
        record.flight = None
        if failure is None:
            assert copy is not None
            record.copy, record.state, record.done = copy, State.DISK, record.nbytes
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

    async def _drop(self, pool_key: str) -> None:
        await self._pool.evict(pool_key)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that :meth:`close` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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


def _give_up_if(flight: _Flight) -> None:
    if flight.cancel.is_set():
        raise Cancelled("nobody waits for it any more")
