"""One worker's checkpoints: which are on disk, which are in host memory, who uses them.

A failure says why, and the next load tries afresh; want of memory is no failure of the checkpoint, which stays where it is. One
event loop is the only writer; bytes are moved by threads. A load of one key is shared by all who want it, a lease pins what it
handed out, and a copy is declared resident after its last byte was checked. Host memory belongs to a pool
(:mod:`sllmdask.loader.hostpool`), which the workers of a node may share: what one of them has read, the others have.

A lease may be had before its bytes are there: its tensors have their places, and its ``arrivals`` say which of them may be
looked at. So a model can be built, and run layer by layer, while it is read.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sllmdask.config import WorkerSettings
from sllmdask.errors import CheckpointNotFound, SllmError
from sllmdask.loader.background import Background
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.buffers import lease_nbytes
from sllmdask.loader.disk import DiskTier
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.format import CheckpointInfo, read_info
from sllmdask.loader.hostpool import HostPool, Progress
from sllmdask.loader.loads import Loads
from sllmdask.loader.places import Places
from sllmdask.loader.plan import BLOCK
from sllmdask.loader.records import Copy, HostLease, State, Waiter
from sllmdask.loader.sharing import Sharing
from sllmdask.loader.speeds import KeptSpeeds
from sllmdask.loader.throttle import Throttle
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Brings checkpoints to the host memory of `pool` and keeps them there. All methods belong to one event loop.

    The store owns the pool: :meth:`close` closes it. A checkpoint whose files have changed since it was read is read again.
    """

    def __init__(self, settings: WorkerSettings, pool: HostPool) -> None:
        self._settings = settings
        self._disk = DiskTier(Path(settings.store_dir).expanduser(), settings.disk_quota)
        self._pool = pool
        self._bandwidth = BandwidthMeter()
        throttle = Throttle(settings.read_limit)
        self._speeds = KeptSpeeds(self._disk, throttle, settings.n_readers)
        self._keeps_speeds = self._keeping = self._learned_more = False
        self._background = Background()
        self._sharing = Sharing(self._find)
        self._places = Places(settings, self._disk, self._sharing, self._bandwidth, self._background)
        self._loads = Loads(
            settings,
            pool,
            self._disk,
            self._sharing,
            self._places,
            self._bandwidth,
            self._background,
            self._changed,
            throttle,
            self._learned,
        )
        #: Leases on what is to stay in host memory, by key.
        self._pins: dict[str, HostLease] = {}
        #: Where the files of keys were seen that were not loaded.
        self._seen: dict[str, str] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._version = 0
        self._announcing = False
        #: Bytes of the largest checkpoint that was seen.
        self._largest = 0
        pool.subscribe(self._changed)

    async def start(self) -> None:
        """Join the pool, and see what there is. Raises :class:`HostPoolUnavailable`."""
        await self._pool.start()
        await self._loads.look_at_disk()

    # --- asking ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything a scheduler needs to know, as plain msgpack types; ``version`` grows with every change but progress.

        Keys that another worker of the node has loaded are listed too: they are resident here.
        """
        resident = self._pool.resident()
        keys = {}
        for record in self._loads.records.values():
            # What is in use here is here, even where the pool's keeper has died.
            in_host = record.flight is None and (record.pool_key in resident or record.copy is not None)
            keys[record.key] = {
                "source": record.source,
                "state": str(State.HOST if in_host else record.state),
                "nbytes": record.nbytes,
                "done": record.nbytes if in_host else record.done,
                "leases": record.n_leases,
                "pinned": record.key in self._pins,
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
                    "pinned": False,
                    "reason": None,
                },
            )
        return {
            "version": self._version,
            "keys": keys,
            "tiers": {
                "host": {"used": self._pool.used, "capacity": self._pool.capacity},
                "disk": {"used": self._loads.disk_used, "capacity": self._loads.disk_capacity},
            },
            "bandwidth": {kind: speed for kind, speed in self._bandwidth.snapshot().items() if "/" not in kind},
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` soon after each change, once for changes made together; returns what ends that."""
        self._subscribers.append(callback)
        return partial(self._subscribers.remove, callback)

    def tier_of_load(self, key: str) -> Tier:
        """Where the bytes of the load of `key` that is under way come from."""
        record = self._loads.records.get(key)
        if record is None or record.flight is None:
            return Tier.HOST
        return record.flight.tier_from

    async def on_disk(self, source: str) -> bool:
        """Whether the files of `source` are on this node: a directory, or a complete copy of what is elsewhere."""
        try:
            return await self._background.in_thread(self._disk.find, source) is not None
        except CheckpointNotFound:
            return False

    async def inspect(self, key: str, source: str, peers: Sequence[str] = ()) -> CheckpointInfo:
        """What the files of `source` say: a directory, an http(s) address, a hub id, or what one of `peers` has.

        Of what is elsewhere only the small files and the headers are fetched; ``path`` has those. Raises
        :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`.
        """

        def look(fetch: Fetch) -> CheckpointInfo:
            return read_info(source, str(fetch.directory))

        path = await self._places.directory(source, peers)
        found = path if path is not None else await self._places.use(key, source, peers, look)
        if isinstance(found, Path):
            found = await self._background.in_thread(read_info, source, str(found))
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
            self._loads.free_disk(source, fetch.index.nbytes)
            return fetch.pull(self._settings.chunk_size, n_threads=self._settings.n_readers, on_progress=advance, cancel=cancel)

        path = await self._places.directory(source, peers)
        if path is None:
            path = await self._places.use(key, source, peers, pull, cancel)
            await self._loads.look_at_disk()
        self._seen[key] = str(path)
        return str(path)

    def _expect(self, nbytes: int) -> None:
        """A checkpoint of so many bytes may be wanted: have memory ready whose pages need not be found first."""
        if self._settings.prefault and nbytes > self._largest:
            self._largest = nbytes
            self._pool.prefault(min(lease_nbytes(nbytes + BLOCK), self._pool.capacity))

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
        record = self._loads.record(key, source)
        copy = record.copy
        if copy is not None and (copy.arrivals is None or not whole):
            if on_progress is not None:
                on_progress(record.nbytes if copy.arrivals is None else record.done, record.nbytes)
                if record.flight is not None:
                    record.flight.listeners.append(on_progress)
            return self._loads.pin(record, copy, started, hit=copy.arrivals is None)

        flight = record.flight or self._loads.take_off(record, peers)
        waiter = Waiter(asyncio.get_running_loop().create_future(), started, whole)
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
            self._loads.left(record, flight)

    async def pin(self, key: str, source: str, peers: Sequence[str] = ()) -> Tier:
        """Bring checkpoint `key` to host memory, where it stays until :meth:`unpin`: the store itself has a lease on it.

        Returns where it was. Raises what :meth:`load` does; what was pinned before stays so.
        """
        lease = await self.load(key, source, peers=peers)
        self.unpin(key)
        self._pins[key] = lease
        lease.on_damage(partial(self._pin_again, key, source))
        self._changed()
        return lease.tier_from

    def unpin(self, key: str) -> bool:
        """The host copy of `key` may be evicted again; false if it was not pinned."""
        lease = self._pins.pop(key, None)
        if lease is None:
            return False
        lease.release()
        self._changed()
        return True

    def _pin_again(self, key: str, source: str, error: SllmError) -> None:
        """The bytes that were pinned are not the model's."""

        async def pin() -> None:
            try:
                await self.pin(key, source)
            except SllmError as failure:
                logger.warning("not pinned any more model=%s cause=%s", key, failure.message)

        logger.warning("pinned copy is damaged model=%s cause=%s", key, error.message)
        if self.unpin(key) and not self._loads.closing.is_set():
            self._background.later(pin())

    async def forget(self, key: str) -> bool:
        """Nobody wants `key` any more: unpin and :meth:`evict` it; a disk copy that was fetched leaves before all others."""
        self.unpin(key)
        record = self._loads.records.get(key)
        path = record.path if record is not None and record.path else self._seen.get(key)
        if path is not None:
            await self._background.in_thread(self._disk.demote, Path(path))
        return await self.evict(key)

    async def evict(self, key: str) -> bool:
        """Drop the host copy of `key`; false if there is none or a lease pins it, of any worker of the node."""
        record = self._loads.records.get(key)
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
        self._places.close()
        for key in list(self._pins):
            self.unpin(key)
        await self._loads.end()
        server = self._sharing.end()
        if server is not None:
            await self._background.in_thread(server.close)
        self._loads.close()
        self._sharing.close()
        await self._pool.close()
        self._background.close()

    # --- how fast it is ----------------------------------------------------------------------------------------------

    async def measure(self) -> None:
        """Know how fast the tiers were before, and find out in the background how fast the disk is; from now on it is kept."""
        self._keeps_speeds = True
        self._bandwidth.take_over(await self._background.in_thread(self._speeds.recall))
        self._background.later(self._probe())

    async def _probe(self) -> None:
        found = await self._background.in_thread(self._speeds.probe, self._loads.closing)
        if found is not None:
            self._bandwidth.probed(str(Tier.DISK), found)
            self._changed()

    def observe_hit(self, nbytes: int, seconds: float) -> None:
        """An instance was made ready of what was in host memory."""
        self._bandwidth.observe(str(Tier.HOST), nbytes, seconds)
        self._learned()

    def _learned(self) -> None:
        self._changed()
        self._learned_more = self._keeps_speeds
        if self._learned_more and not self._keeping and not self._loads.closing.is_set():
            self._keeping = True
            self._background.later(self._keep())

    async def _keep(self) -> None:
        while self._learned_more:
            self._learned_more = False
            await self._background.in_thread(self._speeds.keep, self._bandwidth.kept())
        self._keeping = False

    def bound_disk(self, nbytes: int) -> None:
        """Copies of what is elsewhere take no more of the disk than this, nor than the quota in the settings."""
        self._disk.quota = min(self._settings.disk_quota or nbytes, nbytes)
        self._background.later(self._loads.look_at_disk())

    # --- giving away -------------------------------------------------------------------------------------------------

    @property
    def data_address(self) -> str | None:
        """``host:port`` at which other workers may have what is here; ``None`` before :meth:`serve`."""
        return self._sharing.address

    async def serve(
        self,
        host: str,
        token: str,
        listen_tls: ssl.SSLContext | None = None,
        connect_tls: ssl.SSLContext | None = None,
    ) -> None:
        """Give checkpoints to other workers that know `token`, and take theirs; again, with another token, in its place."""
        if not self._sharing.knows(token):
            old = self._sharing.begin(host, token, listen_tls, connect_tls)
            if old is not None:
                await self._background.in_thread(old.close)
            self._changed()

    def _find(self, key: str) -> tuple[Copy | None, str | None]:
        """In any thread: the copy of `key` in memory, and its directory."""
        record = self._loads.records.get(key)
        copy = None if record is None else (record.flight.copy if record.flight else None) or record.copy
        return copy, record.path if record and record.path else self._seen.get(key)

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
