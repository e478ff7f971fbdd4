"""Where a checkpoint is to be had: on this disk, from other workers of the cluster, or at its source."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TypeVar

from sllmdask.config import WorkerSettings
from sllmdask.errors import Cancelled, CheckpointError, CheckpointNotFound, LoadFailed, SllmError, SourceUnreachable
from sllmdask.loader.access import Access
from sllmdask.loader.background import Background
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.disk import PARTIAL, DiskTier
from sllmdask.loader.fallback import Fallback
from sllmdask.loader.fetch import Fetch, Origin
from sllmdask.loader.format import CheckpointIndex, read_index, variants
from sllmdask.loader.remote import is_remote, open_remote, origin_of
from sllmdask.loader.sharing import Sharing
from sllmdask.policy.estimate import smaller_is_faster
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: The variant of our own format beside ``raw``.
COMPRESSED = "split16"

T = TypeVar("T")


class Places:
    """The places of one store's checkpoints: `disk` first, then those that `sharing` can reach, then the source itself."""

    def __init__(
        self, settings: WorkerSettings, disk: DiskTier, sharing: Sharing, bandwidth: BandwidthMeter, background: Background
    ) -> None:
        self._settings, self._disk, self._sharing = settings, disk, sharing
        self._bandwidth, self._background = bandwidth, background
        #: Of the fetches that are no loads.
        self._cancels: set[threading.Event] = set()
        self._closed = False

    def close(self) -> None:
        """Find nothing any more, and call off what :meth:`use` is doing."""
        self._closed = True
        for cancel in self._cancels:
            cancel.set()

    async def directory(self, source: str, peers: Sequence[str]) -> Path | None:
        """Where the files are on this disk; ``None``: elsewhere. Raises :class:`CheckpointNotFound`: nowhere."""
        if self._closed:
            raise Cancelled("the worker's store is closed")
        try:
            path = await self._background.in_thread(self._disk.find, source)
        except CheckpointNotFound:
            if not peers:
                raise
            return None
        if path is not None:
            self._disk.touch(path)
        return path

    def index(self, path: Path, resident: Container[str]) -> CheckpointIndex:
        """The index of the checkpoint at `path`; where it is there compressed, too, of the variant that is loaded sooner.

        Of keys of the pool those are `resident`.
        """
        if len(variants(path)) < 2:
            return read_index(path)
        raw, smaller = (read_index(path, variant) for variant in ("raw", COMPRESSED))
        for index in (raw, smaller):
            if key_in_pool(index) in resident:
                return index
        speeds = self._bandwidth.snapshot()
        as_is, compressed = (speeds.get(kind, {}).get("bytes_per_s") for kind in (str(Tier.DISK), kind_of(Tier.DISK, smaller)))
        stored_nbytes = sum(file.nbytes for file in smaller.files)
        return smaller if smaller_is_faster(raw.nbytes, stored_nbytes, as_is, compressed) else raw

    def open(self, key: str, source: str, peers: Sequence[str], cancel: threading.Event) -> tuple[Tier, Fetch | Path]:
        """In a thread: a fetch of `source`, from a peer if one can supply it; or where another process has completed one."""
        failure: SllmError | None = None
        access = Access(self._settings.remote_hosts)
        try:
            peer = self._sharing.origin(peers, key)
            if peer is not None:
                origin: Origin = peer
                if is_remote(source):
                    origin = Fallback(origin, lambda variant: origin_of(source, variant=variant, access=access))
                final = self._disk.final(source)
                return Tier.PEER, Fetch.open(origin, final, cancel=cancel) or final
        except (CheckpointError, SourceUnreachable) as error:
            logger.info("peers cannot supply it model=%s cause=%s", key, error.message)
            failure = error
        if is_remote(source):
            return Tier.REMOTE, open_remote(source, self._disk.root, access=access, cancel=cancel)
        raise failure or CheckpointNotFound(source, "no such directory, and no worker that could supply it")

    async def use(
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
            _, fetch = self.open(key, source, peers, cancel)
            if not isinstance(fetch, Fetch):
                return fetch
            # Closed by the thread that uses it: whoever waits may be cancelled.
            with fetch:
                if cancel.is_set():
                    raise Cancelled("nobody waits for it any more")
                return use(fetch)

        self._cancels.add(cancel)
        try:
            return await self._background.in_thread(work)
        except OSError as error:
            raise LoadFailed(key, self.why(error)) from None
        finally:
            cancel.set()
            self._cancels.discard(cancel)

    def why(self, error: OSError) -> str:
        """What the system said, and whose directory it was."""
        below = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(self._disk.root)
        return f"{error}; worker.store_dir is {str(self._disk.root)!r}" if below else str(error)


def key_in_pool(index: CheckpointIndex) -> str:
    """The same for the same bytes: in the same directory, which keeps its key when a fetch is completed, and unchanged."""
    directory = os.path.realpath(index.directory).removesuffix(PARTIAL)
    return hashlib.sha256(f"{directory}\0{index.fingerprint}".encode()).hexdigest()


def kind_of(tier: Tier, index: CheckpointIndex) -> str:
    """What the speed of a load is kept under: a compressed checkpoint has a speed of its own."""
    return f"{tier}/{COMPRESSED}" if any(c.codec != "raw" for file in index.files for c in file.chunks) else str(tier)
