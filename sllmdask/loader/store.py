"""One worker's checkpoints: which are on disk, which are in host memory, who uses them.

A key goes absent -> fetching -> disk -> reading -> host. A failure says why, and the next load tries afresh; want of memory is
no failure of the checkpoint, which stays on disk. One event loop is the only writer; bytes are moved by threads. A load of one
key is shared by all who want it, a lease pins what it handed out, and a copy is declared resident after its last byte. A key
in use is in host memory: whatever else fails, its tensors stay.

Checkpoints are read from disk one after the other, each by all readers: alone on the disk it is read at full speed, and what
was measured predicts the next load. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``: one queue per server.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import huggingface_hub

from sllmdask.config import WorkerSettings
from sllmdask.errors import Cancelled, CheckpointNotFound, InsufficientMemory, LoadFailed, SllmError
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.buffers import Buffer, BufferPool, address_of, lease_nbytes
from sllmdask.loader.format import CheckpointInfo, read_index, read_info
from sllmdask.loader.plan import ReadPlan, plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.tiers import StateDict, tensor_views
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: (bytes so far, bytes in all): never backwards, and equal at the end.
Progress = Callable[[int, int], None]

#: A hub id, ``name`` or ``organisation/name``; the hub itself allows neither ``..`` nor ``--``.
_HUB_ID = re.compile(r"^(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?$")
#: Weights, configuration and tokenizer; no pickle, no code, no other framework's weights.
_WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
#: The same weights once more, in another layout.
_UNWANTED_FILES = ["consolidated*.safetensors"]


class State(StrEnum):
    """What a key is to one store."""

    ABSENT = "absent"
    FETCHING = "fetching"
    DISK = "disk"
    READING = "reading"
    HOST = "host"
    FAILED = "failed"


def read_checkpoint(path: str | os.PathLike[str], *, chunk_size: int = 16 * 1024**2, n_readers: int = 4) -> StateDict:
    """The tensors of the checkpoint at `path`, a directory or one safetensors file, in fresh private memory.

    Reads `chunk_size` bytes at a time with `n_readers` threads; needs no store, no event loop. All tensors lie over one buffer,
    which is given back when the last of them is gone. Raises :class:`CheckpointError` and :class:`OSError`.
    """
    index = read_index(path)
    plan = plan_reads(index, chunk_size)
    buffer = BufferPool(lease_nbytes(plan.nbytes)).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), n_threads=n_readers)
    return tensor_views(index, plan, buffer)


def _directory_of(source: str, store_dir: Path) -> Path | None:
    """Where the files of `source` are on this disk; ``None`` if they would have to be fetched.

    Raises :class:`CheckpointNotFound` for what is neither a directory nor a hub id.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path.absolute()
    if not _HUB_ID.match(source):
        raise CheckpointNotFound(source, "there is no such directory, and it is not the id of a model on the hub")
    fetched = store_dir / source.replace("/", "--")
    return fetched if fetched.is_dir() else None


def _fetch(source: str, store_dir: Path) -> Path:
    """Download hub model `source`; what was interrupted goes on where it stopped, and only the complete is seen.

    Raises :class:`CheckpointNotFound`, also where the hub cannot be reached, and :class:`CheckpointCorrupt`.
    """
    fetched = store_dir / source.replace("/", "--")
    partial_path = fetched.with_name(fetched.name + ".partial")
    try:
        huggingface_hub.snapshot_download(
            source, local_dir=partial_path, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES
        )
    except Exception as error:
        # The hub's client lets errors of several libraries through; all of them mean the same here.
        reason = f"there is no such directory, and the hub did not supply it ({type(error).__name__}: {error})"
        raise CheckpointNotFound(source, " ".join(reason.split())) from error
    try:
        read_index(partial_path)
        partial_path.rename(fetched)
    except (CheckpointNotFound, OSError) as error:
        # Another worker of this host may have been faster with the same model.
        if not fetched.is_dir():
            reason = error.reason if isinstance(error, CheckpointNotFound) else str(error)
            raise CheckpointNotFound(source, f"the hub's files are no checkpoint: {reason}") from None
    return fetched


@dataclass(eq=False)
class _HostCopy:
    tensors: StateDict
    #: Bytes of the pool.
    size: int
    n_leases: int = 0


@dataclass(eq=False)
class _Waiter:
    lease: asyncio.Future[HostLease]
    started: float
    on_progress: Progress | None


@dataclass(eq=False)
class _Flight:
    """One load under way. When its last waiter has left it is called off: it is its record's flight no more, and ends soon."""

    cancel: threading.Event = field(default_factory=threading.Event)
    waiters: set[_Waiter] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    tier_from: Tier = Tier.DISK
    fetching: bool = False

    def stop(self) -> None:
        self.cancel.set()
        # The threads of a read see the event. A download sees nothing: it is left to itself.
        if self.fetching and self.task is not None:
            self.task.cancel()


@dataclass(eq=False)
class _Record:
    key: str
    source: str
    state: State = State.ABSENT
    path: str | None = None
    nbytes: int = 0
    done: int = 0
    reason: str | None = None
    copy: _HostCopy | None = None
    flight: _Flight | None = None
    last_used: int = 0

    @property
    def n_leases(self) -> int:
        return self.copy.n_leases if self.copy else 0


class HostLease:
    """A checkpoint in host memory that stays there until :meth:`release`, on the store's event loop. Also a ``with`` block.

    `tensors` are views shared with other leases, not to be written to; `nbytes` counts their bytes. `tier_from` says where they
    were (``host``: nothing had to be read), `seconds` how long this caller waited.
    """

    def __init__(self, store: CheckpointStore, record: _Record, tier_from: Tier, seconds: float) -> None:
        assert record.copy is not None
        assert record.path is not None
        self.key = record.key
        self.path = record.path
        self.nbytes = record.nbytes
        self.tier_from = tier_from
        self.seconds = seconds
        self.tensors = dict(record.copy.tensors)
        self._release: Callable[[], None] | None = partial(store._unpin, record)

    def release(self) -> None:
        """Unpin the copy, which stays until its room is needed; doing it twice does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            self.tensors = {}
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class CheckpointStore:
    """Brings checkpoints to at most `capacity` bytes of host memory and keeps them there. All methods belong to one event loop.

    The files of a checkpoint are taken not to change: evict a key after replacing its files.
    """

    def __init__(self, settings: WorkerSettings, capacity: int) -> None:
        self._settings = settings
        self._store_dir = Path(settings.store_dir).expanduser()
        self._pool = BufferPool(capacity, on_return=self._memory_came_back)
        self._records: dict[str, _Record] = {}
        self._fetches: dict[str, asyncio.Task[Path]] = {}
        self._flights: set[_Flight] = set()
        self._disk_turn = asyncio.Lock()
        self._bandwidth = BandwidthMeter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers: list[Callable[[], None]] = []
        self._version = 0
        self._announcing = False
        self._uses = itertools.count(1)
        self._closed = False

    # --- asking ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything a scheduler needs to know, as plain msgpack types; ``version`` grows with every change but progress."""
        return {
            "version": self._version,
            "keys": {
                record.key: {
                    "source": record.source,
                    "state": str(record.state),
                    "nbytes": record.nbytes,
                    "done": record.done,
                    "leases": record.n_leases,
                    "reason": record.reason,
                }
                for record in self._records.values()
            },
            "tiers": {"host": {"used": self._pool.used, "capacity": self._pool.capacity}},
            "bandwidth": self._bandwidth.snapshot(),
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` soon after each change, once for changes made together; returns what ends that."""
        self._subscribers.append(callback)
        return partial(self._subscribers.remove, callback)

    async def on_disk(self, source: str) -> bool:
        """Whether the files of `source` are on this node: a directory, or a hub model that was fetched."""
        try:
            return await asyncio.to_thread(_directory_of, source, self._store_dir) is not None
        except CheckpointNotFound:
            return False

    async def inspect(self, source: str) -> CheckpointInfo:
        """What the files of `source`, a directory or a hub id, say; a hub id is downloaded first.

        Raises :class:`CheckpointNotFound` and :class:`CheckpointCorrupt`.
        """
        path = await asyncio.to_thread(_directory_of, source, self._store_dir)
        if path is None:
            path = await self._fetched(source)
        return await asyncio.to_thread(read_info, source, str(path))

    # --- loading -----------------------------------------------------------------------------------------------------

    async def load(self, key: str, source: str, on_progress: Progress | None = None) -> HostLease:
        """A lease of checkpoint `key`, read from `source` unless it is in host memory. Loads of one key share one read.

        A caller that is cancelled leaves the others alone; when the last has left, the read stops. Raises
        :class:`CheckpointError`, :class:`InsufficientMemory` (in bytes of the pool), :class:`LoadFailed`.
        """
        started = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        record = self._record(key, source)
        if record.copy is not None:
            if on_progress is not None:
                on_progress(record.nbytes, record.nbytes)
            return self._pin(record, Tier.HOST, started)

        flight = record.flight or self._take_off(record)
        waiter = _Waiter(self._loop.create_future(), started, on_progress)
        flight.waiters.add(waiter)
        if on_progress is not None and record.state is State.READING:
            on_progress(record.done, record.nbytes)
        try:
            return await waiter.lease
        except asyncio.CancelledError:
            # The lease may have arrived in the moment in which its caller left.
            if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
                waiter.lease.result().release()
            raise
        finally:
            flight.waiters.discard(waiter)
            if not flight.waiters and record.flight is flight:
                self._call_off(record, flight)

    def evict(self, key: str) -> bool:
        """Drop the host copy of `key`; false if there is none or a lease pins it."""
        record = self._records.get(key)
        if record is None or record.copy is None or record.copy.n_leases:
            return False
        self._drop(record)
        return True

    async def close(self) -> None:
        """Stop all reads and give back what no lease holds. Loads end with :class:`LoadFailed`; a download goes on by itself."""
        self._closed = True
        for flight in self._flights:
            flight.stop()
        while tasks := [flight.task for flight in self._flights if flight.task is not None]:
            await asyncio.wait(tasks)
        for key in list(self._records):
            self.evict(key)
        await asyncio.to_thread(self._pool.trim)

    # --- one key -----------------------------------------------------------------------------------------------------

    def _record(self, key: str, source: str) -> _Record:
        """The record of `key`, to be loaded from `source`: a copy of something else is dropped."""
        if self._closed:
            raise LoadFailed(key, "the worker's store is closed")
        record = self._records.get(key)
        if record is not None and record.source != source:
            if record.flight or record.n_leases:
                raise LoadFailed(key, f"it is in use from {record.source!r}; unload it before it is loaded from {source!r}")
            if record.copy is not None:
                self._drop(record)
            record = None
        if record is None:
            record = self._records[key] = _Record(key, source)
        return record

    def _pin(self, record: _Record, tier_from: Tier, started: float) -> HostLease:
        assert record.copy is not None
        record.copy.n_leases += 1
        record.last_used = next(self._uses)
        self._changed()
        return HostLease(self, record, tier_from, time.perf_counter() - started)

    def _unpin(self, record: _Record) -> None:
        assert record.copy is not None
        assert record.copy.n_leases > 0
        record.copy.n_leases -= 1
        record.last_used = next(self._uses)
        self._changed()

    def _drop(self, record: _Record) -> None:
        assert record.copy is not None
        assert record.copy.n_leases == 0
        record.copy = None
        record.done = 0
        record.state = State.DISK
        logger.info("evicted model=%s nbytes=%d", record.key, record.nbytes)
        self._changed()

    # --- one flight --------------------------------------------------------------------------------------------------

    def _take_off(self, record: _Record) -> _Flight:
        flight = record.flight = _Flight()
        record.reason, record.done = None, 0
        self._flights.add(flight)
        flight.task = asyncio.get_running_loop().create_task(self._fly(record, flight), name=f"load {record.key}")
        return flight

    def _call_off(self, record: _Record, flight: _Flight) -> None:
        flight.stop()
        record.flight = None
        record.state = State.DISK if record.path else State.ABSENT
        record.done = 0
        self._changed()

    async def _fly(self, record: _Record, flight: _Flight) -> None:
        copy: _HostCopy | None = None
        failure: SllmError = LoadFailed(record.key, "the worker's store is closed")
        try:
            copy = await self._bring(record, flight)
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
            if record.flight is flight:
                self._land(record, flight, copy, failure)

    async def _bring(self, record: _Record, flight: _Flight) -> _HostCopy:
        """The copy of `record`'s checkpoint in host memory, fetched and read as far as it must be."""
        path = await asyncio.to_thread(_directory_of, record.source, self._store_dir)
        if path is None and not flight.cancel.is_set():
            flight.tier_from = Tier.REMOTE
            self._move(record, flight, State.FETCHING)
            flight.fetching = True
            path = await self._fetched(record.source)
            flight.fetching = False
        if path is None or flight.cancel.is_set():
            raise Cancelled("nobody waits for it any more")
        index = await asyncio.to_thread(read_index, path)
        plan = plan_reads(index, self._settings.chunk_size)
        size = lease_nbytes(plan.nbytes)
        if record.flight is flight:
            record.path, record.nbytes = index.directory, index.nbytes
        self._move(record, flight, State.DISK)
        if size > self._pool.capacity:
            raise InsufficientMemory(record.key, size, self._pool.capacity)

        async with self._disk_turn:
            if flight.cancel.is_set():
                raise Cancelled("nobody waits for it any more")
            self._make_room(record.key, size)
            held = [self._pool.lease(plan.nbytes)]
            self._move(record, flight, State.READING)
            started = time.perf_counter()
            await asyncio.to_thread(self._read, record, flight, plan, held)
            self._bandwidth.observe(Tier.DISK, index.nbytes, time.perf_counter() - started)
        return _HostCopy(tensor_views(index, plan, held.pop()), size)

    def _read(self, record: _Record, flight: _Flight, plan: ReadPlan, held: list[Buffer]) -> None:
        """In a thread: bring the bytes to the buffer in `held`, which a failure empties.

        The thread holds the list, so that no memory is unmapped under a read. An error's traceback, and the executor that is a
        moment late to forget its arguments, hold the list and not the buffer, so that its bytes are free when they ought to be.
        """
        loop = self._loop
        assert loop is not None
        # Memory that the pool kept and this read could not use would come on top of what is read now.
        self._pool.trim()

        def advance(done: int) -> None:
            loop.call_soon_threadsafe(self._advance, record, flight, done)

        try:
            read_chunks(plan, address_of(held[0]), n_threads=self._settings.n_readers, on_progress=advance, cancel=flight.cancel)
        except BaseException:
            held.clear()
            raise

    def _advance(self, record: _Record, flight: _Flight, done: int) -> None:
        if record.flight is not flight:
            return
        record.done = done
        for waiter in flight.waiters:
            if waiter.on_progress is not None:
                # Each by itself: one that raises must not keep the others from hearing.
                asyncio.get_running_loop().call_soon(waiter.on_progress, done, record.nbytes)

    def _move(self, record: _Record, flight: _Flight, state: State) -> None:
        if record.flight is flight:
            record.state = state
            self._changed()

    def _land(self, record: _Record, flight: _Flight, copy: _HostCopy | None, failure: SllmError) -> None:
        """In one step: the flight ends, the copy is resident, and each waiter has its lease."""
        waiters = [waiter for waiter in flight.waiters if not waiter.lease.done()]
        record.flight = None
        if copy is None:
            # Want of memory is no fault of the files: they are where they were.
            record.state = State.DISK if isinstance(failure, InsufficientMemory) else State.FAILED
            record.reason, record.done = failure.message, 0
            logger.warning("load failed model=%s source=%s cause=%s", record.key, record.source, failure.message)
            for waiter in waiters:
                waiter.lease.set_exception(type(failure)(*failure.args))
        else:
            record.copy, record.state, record.last_used = copy, State.HOST, next(self._uses)
            for waiter in waiters:
                waiter.lease.set_result(self._pin(record, flight.tier_from, waiter.started))
        self._changed()

    # --- room --------------------------------------------------------------------------------------------------------

    def _make_room(self, key: str, size: int) -> None:
        """Evict until `size` bytes are free, what was used longest ago first; nothing if that would not suffice."""
        idle = sorted(
            (record for record in self._records.values() if record.copy is not None and not record.copy.n_leases),
            key=lambda record: record.last_used,
        )
        available = self._pool.available + sum(record.copy.size for record in idle if record.copy is not None)
        if size > available:
            raise InsufficientMemory(key, size, available)
        for record in idle:
            if self._pool.available >= size:
                return
            self._drop(record)
        # Tensors that outlive their lease still hold their bytes.
        if self._pool.available < size:
            raise InsufficientMemory(key, size, self._pool.available)

    def _memory_came_back(self) -> None:
        """On any thread, inside the end of some object."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._give_memory_back)
        except RuntimeError:
            # The loop is closed.
            threading.Thread(target=self._pool.trim, name="trim", daemon=True).start()

    def _give_memory_back(self) -> None:
        self._changed()
        threading.Thread(target=self._pool.trim, name="trim", daemon=True).start()

    # --- fetching, telling -------------------------------------------------------------------------------------------

    async def _fetched(self, source: str) -> Path:
        """The directory of hub model `source`, downloaded once for all who wait; it goes on when they have left."""
        task = self._fetches.get(source)
        if task is None:
            task = self._fetches[source] = asyncio.get_running_loop().create_task(self._fetch(source), name=f"fetch {source}")
            task.add_done_callback(lambda _: self._fetches.pop(source))
        return await asyncio.shield(task)

    async def _fetch(self, source: str) -> Path:
        resumed = (self._store_dir / (source.replace("/", "--") + ".partial")).exists()
        started = time.perf_counter()
        path = await asyncio.to_thread(_fetch, source, self._store_dir)
        seconds = time.perf_counter() - started
        if not resumed:
            index = await asyncio.to_thread(read_index, path)
            self._bandwidth.observe(Tier.REMOTE, index.nbytes, seconds)
        return path

    def _changed(self) -> None:
        self._version += 1
        if not self._announcing and self._subscribers:
            self._announcing = True
            assert self._loop is not None
            self._loop.call_soon(self._announced)
            # Each by itself: one that raises must not keep the others from hearing.
            for callback in self._subscribers:
                self._loop.call_soon(callback)

    def _announced(self) -> None:
        self._announcing = False
