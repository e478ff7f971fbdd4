"""Brings checkpoints to host memory: what is loaded now, for whom, and from where.

A load of one key is shared by all who want it, and called off when the last of them leaves. A lease pins what it handed out, and
a copy is declared resident after its last byte was checked. One event loop is the only writer of all records; bytes are moved by
threads.

Checkpoints are read from disk one after the other, each by all readers: alone on the disk it is read at full speed, and what
was measured predicts the next load. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``: one queue per server.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sllmdask.config import WorkerSettings
from sllmdask.errors import Cancelled, CheckpointCorrupt, DiskFull, InsufficientMemory, LoadFailed, SllmError
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.background import Background
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.buffers import Staging, address_of
from sllmdask.loader.disk import DiskTier
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.format import CheckpointIndex
from sllmdask.loader.hostpool import HostPool, Segment
from sllmdask.loader.places import Places, key_in_pool, kind_of
from sllmdask.loader.plan import ReadPlan, plan_reads
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.reader import ChunkSource, FileSystems, LocalFiles, read_chunks
from sllmdask.loader.records import Copy, Flight, HostLease, Record, State
from sllmdask.loader.sharing import Sharing
from sllmdask.loader.tee import Tee
from sllmdask.loader.throttle import Throttle
from sllmdask.loader.tiers import tensor_views
from sllmdask.policy.estimate import PRIOR_BYTES_PER_S
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: Seconds within which the memory of a load that was called off is free again once its threads have stopped.
SETTLE_S = 1.0


class Loads:
    """The records of one store, and its loads. All methods belong to its event loop.

    `changed` is told of each change, `learned` of each load that `bandwidth` has learned from.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        pool: HostPool,
        disk: DiskTier,
        sharing: Sharing,
        places: Places,
        bandwidth: BandwidthMeter,
        background: Background,
        changed: Callable[[], None],
        throttle: Throttle,
        learned: Callable[[], None],
    ) -> None:
        self._settings, self._pool, self._disk, self._sharing, self._places = settings, pool, disk, sharing, places
        self._bandwidth, self._background, self._changed = bandwidth, background, changed
        self._throttle, self._learned = throttle, learned
        self.records: dict[str, Record] = {}
        self.flights: set[Flight] = set()
        self.closing = threading.Event()
        #: Bytes of the disk tier.
        self.disk_used = self.disk_capacity = 0
        self._disk_turn = asyncio.Lock()
        self._staging = Staging()
        self._file_systems = FileSystems()
        self._loop: asyncio.AbstractEventLoop | None = None
        #: When the last load that was called off has ended.
        self._called_off_at = -math.inf

    async def end(self) -> None:
        """Call off all loads, and wait for whatever is done in the background."""
        self.closing.set()
        for flight in self.flights:
            flight.call_off()
        while tasks := [*self._background.tasks, *(flight.task for flight in self.flights if flight.task is not None)]:
            await asyncio.wait(tasks)

    def close(self) -> None:
        """Give nothing away any more, and hold no disk copy. Memory that is leased stays."""
        for record in self.records.values():
            copy = record.copy
            if copy is not None and copy.served is not None:
                copy.served.close()
                copy.served = None
            if copy is not None and copy.hold is not None:
                os.close(copy.hold)
                copy.hold = None

    # --- one key -----------------------------------------------------------------------------------------------------

    def record(self, key: str, source: str) -> Record:
        """The record of `key`, to be loaded from `source`."""
        if self.closing.is_set():
            raise LoadFailed(key, "the worker's store is closed")
        record = self.records.get(key)
        if record is not None and record.source != source:
            if record.flight or record.n_leases:
                raise LoadFailed(key, f"it is in use from {record.source!r}; unload it before it is loaded from {source!r}")
            if record.pool_key is not None:
                self._background.later(self._drop(record.pool_key))
            record = None
        if record is None:
            record = self.records[key] = Record(key, source)
        return record

    def pin(self, record: Record, copy: Copy, started: float, *, hit: bool) -> HostLease:
        """A lease on `copy` for who has asked for it at `started`; `hit`: every byte was there already."""
        copy.n_leases += 1
        self._changed()
        seconds, release = time.perf_counter() - started, partial(self._unpin, record, copy)
        return HostLease(record.key, copy, seconds=seconds, hit=hit, release=release)

    def _unpin(self, record: Record, copy: Copy) -> None:
        assert copy.n_leases > 0
        copy.n_leases -= 1
        if record.flight is not None and record.flight.copy is copy:
            self.left(record, record.flight)
        elif not copy.n_leases:
            self._let_go(record, copy)
        self._changed()

    def _let_go(self, record: Record, copy: Copy) -> None:
        """Nobody here uses the copy: it is the pool's to keep."""
        if record.copy is copy:
            record.copy = None
        self._give_up(copy)
        if copy.damage is not None and record.pool_key is not None:
            self._background.later(self._drop(record.pool_key))

    def _give_up(self, copy: Copy) -> None:
        """Let go of the memory: unpinned, if it is whole, or discarded."""
        copy.tensors, copy.buffer = {}, None
        served, copy.served = copy.served, None
        copy.segment.release()
        hold, copy.hold = copy.hold, None
        if hold is not None:
            os.close(hold)
        if served is not None:
            # It waits for who is being fed.
            self._background.later(self._background.in_thread(served.close))

    # --- one flight --------------------------------------------------------------------------------------------------

    def take_off(self, record: Record, peers: Sequence[str]) -> Flight:
        """Begin to load `record`, which `peers` may have, too."""
        self._loop = asyncio.get_running_loop()
        flight = record.flight = Flight()
        record.reason, record.done = None, 0
        self.flights.add(flight)
        flight.task = asyncio.get_running_loop().create_task(self._fly(record, flight, peers), name=f"load {record.key}")
        return flight

    def left(self, record: Record, flight: Flight) -> None:
        """Somebody has left; a flight that nobody wants is called off."""
        if record.flight is not flight or flight.wanted:
            return
        flight.call_off()
        if flight.copy is not None and flight.copy.arrivals is not None:
            flight.copy.arrivals.fail(Cancelled("the load was called off"))
        record.flight = record.copy = None
        record.state, record.done = record.at_rest, 0
        self._changed()

    async def _fly(self, record: Record, flight: Flight, peers: Sequence[str]) -> None:
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
            failure = LoadFailed(record.key, self._places.why(error))
        except Exception as error:
            logger.exception("load failed model=%s source=%s", record.key, record.source)
            failure = LoadFailed(record.key, f"{type(error).__name__}: {error}")
        finally:
            self.flights.discard(flight)
            if flight.cancel.is_set():
                self._called_off_at = time.monotonic()
            self._land(record, flight, failure)

    async def _bring(self, record: Record, flight: Flight, peers: Sequence[str]) -> None:
        """Bring `record`'s checkpoint to host memory, from the first of its places that can supply it."""
        path = await self._places.directory(record.source, peers)
        if path is not None:
            if record.flight is flight:
                record.path = str(path)
            try:
                await self._bring_from_disk(record, flight, path)
                return
            except CheckpointCorrupt as error:
                if not await self._background.in_thread(self._disk.quarantine, path, error.message):
                    raise
                record.path = None
                # Somebody may build upon these tensors already; then the next load finds another place.
                if not self._start_over(record, flight):
                    raise
        await self._bring_from_afar(record, flight, peers)

    def _start_over(self, record: Record, flight: Flight) -> bool:
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

    async def _bring_from_disk(self, record: Record, flight: Flight, path: Path) -> None:
        index = await self._background.in_thread(self._places.index, path, self._pool.resident())
        plan = plan_reads(index, self._settings.chunk_size)
        self._move(record, flight, State.DISK)
        await self._into_memory(record, flight, index, plan, Tier.DISK)

    async def _bring_from_afar(self, record: Record, flight: Flight, peers: Sequence[str]) -> None:
        """Fetch the checkpoint to host memory, and to disk beside; or find that another worker of the node has done so."""
        self._move(record, flight, State.FETCHING)
        tier, fetch = await self._background.in_thread(self._places.open, record.key, record.source, peers, flight.cancel)
        if not isinstance(fetch, Fetch):
            await self._bring_from_disk(record, flight, fetch)
            return
        teeing = False
        try:
            flight.check()
            try:
                await self._background.in_thread(self.free_disk, record.source, fetch.index.nbytes)
            except DiskFull as error:
                logger.warning("no disk copy source=%s cause=%s; the load goes on from memory", record.source, error.message)
                await self._background.in_thread(fetch.without_disk)
            plan = plan_reads(fetch.index, self._settings.chunk_size)
            teeing = await self._into_memory(record, flight, fetch.index, plan, tier, fetch)
        finally:
            if not teeing:
                await self._background.in_thread(fetch.close)

    async def _into_memory(
        self,
        record: Record,
        flight: Flight,
        index: CheckpointIndex,
        plan: ReadPlan,
        tier_from: Tier,
        fetch: Fetch | None = None,
    ) -> bool:
        """Find the checkpoint in the pool, or read it to there, from local files or from `fetch`.

        Returns whether what was fetched is still on its way to disk; `fetch` is closed at the end of it.
        """
        flight.check()
        pool_key = key_in_pool(index)
        if record.flight is flight:
            record.nbytes, record.pool_key = index.nbytes, pool_key
        seconds = self._bandwidth.estimate(kind_of(tier_from, index), index.nbytes)
        meta = {
            "key": record.key,
            "source": record.source,
            "checkpoint_nbytes": index.nbytes,
            "reload_s": seconds or index.nbytes / PRIOR_BYTES_PER_S[tier_from],
        }
        asked_at = time.perf_counter()
        segment = await self._acquire(record, flight, pool_key, plan.nbytes, meta)
        copy = flight.copy = self._copy_in(segment, index, plan, tier_from)
        if copy.arrivals is None:
            # Another process of the node may have been bringing it.
            copy.queue_s = time.perf_counter() - asked_at
        flight.tier_from = copy.tier_from
        copy.hold = self._disk.hold(Path(copy.path))
        if copy.arrivals is None:
            return False
        tee = None if fetch is None else fetch.tee(plan, segment.buffer)
        try:
            self._placed(record, flight, copy)
            if fetch is None:
                waits_since = time.perf_counter()
                await flight.unless_called_off(self._disk_turn.acquire())
                copy.queue_s = time.perf_counter() - waits_since
                try:
                    await self._timed_read(record, flight, plan, copy)
                finally:
                    self._disk_turn.release()
            else:
                await self._timed_read(record, flight, plan, copy, fetch, tee)
        except BaseException:
            if tee is not None:
                await asyncio.shield(self._background.in_thread(tee.close))
            raise
        segment.publish()
        if fetch is None or tee is None:
            return False
        self._start_tee(record, fetch, tee, copy)
        return True

    async def _acquire(self, record: Record, flight: Flight, pool_key: str, nbytes: int, meta: dict[str, Any]) -> Segment:
        waited = partial(self._heard, record, flight)
        while True:
            try:
                return await flight.unless_called_off(self._pool.acquire(pool_key, nbytes, meta, on_progress=waited))
            except InsufficientMemory as error:
                ending = [other.task for other in self.flights if other.task is not None and other.cancel.is_set()]
                settling = time.monotonic() < self._called_off_at + SETTLE_S
                if not (ending or settling) or flight.cancel.is_set():
                    raise InsufficientMemory(record.key, error.needed, error.available) from None
            # What was called off has its memory until its threads have stopped, and the pool has heard of it.
            await flight.unless_called_off(_any_of(ending) if ending else asyncio.sleep(SETTLE_S / 50))

    def _copy_in(self, segment: Segment, index: CheckpointIndex, plan: ReadPlan, tier_from: Tier) -> Copy:
        """What `segment` holds, or will hold; no local name has its tensors, which the traceback of a failure would keep."""
        whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting for it.
        whole.add_done_callback(lambda done: done.cancelled() or done.exception())
        return Copy(
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
        record: Record,
        flight: Flight,
        plan: ReadPlan,
        copy: Copy,
        fetch: Fetch | None = None,
        tee: Tee | None = None,
    ) -> None:
        flight.check()
        # While it comes from elsewhere its files are not complete: nobody may count on them.
        self._move(record, flight, State.READING if fetch is None else State.FETCHING)
        kind = kind_of(copy.tier_from, copy.index)
        started = time.perf_counter()
        source: ChunkSource
        if fetch is None:
            source = LocalFiles(plan, self._file_systems, self._throttle, flight.cancel)
        else:
            source = fetch.chunks(flight.cancel)
        turn = self._bandwidth.begin(kind, started)
        try:
            await self._background.in_thread(self._read, record, flight, plan, copy, source, tee)
        finally:
            ended = time.perf_counter()
            seconds = self._bandwidth.end(turn, ended)
        copy.read_s = ended - started
        # What came from the page cache, or was there from the last time, tells nothing of the tier.
        if isinstance(source, LocalFiles):
            cached = source.cached_nbytes > copy.nbytes // 10
        else:
            cached = fetch is not None and fetch.resumed
        if copy.segment.resident_nbytes == 0 and not cached:
            self._bandwidth.observe(kind, copy.nbytes, seconds)
            self._learned()

    def _read(
        self,
        record: Record,
        flight: Flight,
        plan: ReadPlan,
        copy: Copy,
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

    def free_disk(self, source: str, nbytes: int) -> None:
        """In a thread: room for a copy of `source`. Raises :class:`DiskFull`."""
        records = list(self.records.values())
        in_use = {Path(record.path) for record in records if record.path and (record.flight or record.copy)}
        removed = set(map(str, self._disk.make_room(source, nbytes, in_use)))
        self._sharing.forget([record.key for record in records if record.path in removed])

    async def look_at_disk(self) -> None:
        """Learn what the disk tier holds: for the account, which must not wait for a disk."""
        paths = {record.path for record in self.records.values() if record.path}

        def look() -> tuple[int, int, set[str]]:
            return self._disk.used, self._disk.capacity, {path for path in paths if not os.path.isdir(path)}

        self.disk_used, self.disk_capacity, gone = await self._background.in_thread(look)
        for record in self.records.values():
            if record.path in gone:
                record.path = None
                record.state = record.at_rest if record.state is State.DISK else record.state
        self._changed()

    def _start_tee(self, record: Record, fetch: Fetch, tee: Tee, copy: Copy) -> None:
        """Complete the disk copy behind the load; the buffer stays until it is complete."""
        self._background.later(self._finish_tee(record, fetch, tee, copy))

    async def _finish_tee(self, record: Record, fetch: Fetch, tee: Tee, copy: Copy) -> None:
        buffer = copy.segment.buffer
        try:
            path = await self._background.in_thread(tee.finish, self.closing)
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
            await self._background.in_thread(tee.close)
            # A model that is about to be built over its tensors needs its configuration, whatever became of the disk copy.
            await self._background.in_thread(fetch.leave if copy.n_leases else fetch.close)
            del buffer
            await self.look_at_disk()

    def _damaged(self, record: Record, copy: Copy, error: CheckpointCorrupt) -> None:
        """The next load fetches it again; who uses these bytes hears of it."""
        copy.damage = error
        record.reason = error.message
        if not copy.n_leases and record.pool_key is not None:
            self._background.later(self._drop(record.pool_key))
        for callback in copy.on_damage:
            # Each by itself, and none inside of what it may end.
            asyncio.get_running_loop().call_soon(callback, error)

    def _placed(self, record: Record, flight: Flight, copy: Copy) -> None:
        """Every tensor has its place: who does not wait for the bytes has its lease."""
        if record.flight is not flight:
            return
        record.copy = copy
        for waiter in list(flight.waiters):
            if not waiter.whole and not waiter.lease.done():
                waiter.lease.set_result(self.pin(record, copy, waiter.started, hit=False))

    def _advance(self, record: Record, flight: Flight, done: int) -> None:
        if record.flight is not flight:
            return
        # What another process had brought when it died has to be read again, which is nothing new to who listens.
        record.done = max(done, record.done)
        for listener in flight.listeners:
            # Each by itself: one that raises must not keep the others from hearing.
            asyncio.get_running_loop().call_soon(listener, record.done, record.nbytes)

    def _heard(self, record: Record, flight: Flight, done: int, _total: int) -> None:
        """Another process of the node brings it."""
        self._advance(record, flight, min(done, record.nbytes))

    def _move(self, record: Record, flight: Flight, state: State) -> None:
        if record.flight is flight:
            record.state = state
            self._changed()

    def _land(self, record: Record, flight: Flight, failure: SllmError | None) -> None:
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
                waiter.lease.set_result(self.pin(record, copy, waiter.started, hit=False))
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


async def _any_of(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
