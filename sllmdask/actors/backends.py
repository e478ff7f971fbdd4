"""The backends that are installed on a worker, found by entry point, and what those hold that read the files of a checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from sllmdask.batching.backend import GROUP, Backend
from sllmdask.errors import ConfigError, SllmError
from sllmdask.loader.hostpool import Progress
from sllmdask.loader.store import CheckpointStore
from sllmdask.policy.views import Tier

#: The backend that a deployment has unless it names another one.
OWN = "transformers"
#: Also in the metadata of an installation; a source tree need not have been installed.
_OWN_POINT = EntryPoint(OWN, "sllmdask.engine.backend:TransformersBackend", GROUP)


class Backends:
    """One backend of each name, made when it is asked for first. For any thread; looking for one may import what is large."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, Backend] = {}

    def find(self, name: str) -> Backend:
        """Raises :class:`ConfigError` if there is none of that name, or two, or if it cannot be imported."""
        with self._lock:
            made = self._made.get(name)
            if made is None:
                made = self._made[name] = self._make(name)
            return made

    def _make(self, name: str) -> Backend:
        points = [_OWN_POINT, *entry_points(group=GROUP)]
        found = {point.value: point for point in sorted(points, key=lambda each: each.value) if point.name == name}
        if not found:
            installed = ", ".join(sorted({point.name for point in points}))
            hint = f"the workers have {installed}. Install the distribution that brings it on each of them, or name another one."
            raise ConfigError(f"The backend {name!r} is not installed: {hint}", "backend")
        if len(found) > 1:
            raise ConfigError(f"The backend {name!r} is installed twice, as {' and '.join(found)}: remove one.", "backend")
        [(value, point)] = found.items()
        try:
            made: Backend = point.load()()
        except Exception as error:
            raise ConfigError(f"The backend {name!r} ({value}) cannot be imported: {error!r}", "backend") from error
        return made


@dataclass
class FilesLease:
    """Where the files of a checkpoint are: all that an instance holds of it whose backend reads them itself.

    It has what an instance asks of a :class:`~sllmdask.loader.records.HostLease`. Nothing is pinned.
    """

    path: str
    nbytes: int
    tier_from: Tier
    seconds: float
    tensors: None = None
    arrivals: None = None
    #: Seconds for which it waited for others, and for which bytes came.
    times: tuple[float, float] = (0.0, 0.0)

    async def complete(self) -> None:
        """Every byte is there."""

    def on_damage(self, callback: Callable[[SllmError], None]) -> None:
        """The bytes were checked when they were fetched."""

    def release(self) -> None:
        """The files stay."""


async def lease_files(
    store: CheckpointStore, key: str, source: str, on_progress: Progress, peers: Sequence[str] = ()
) -> FilesLease:
    """Bring the files of `source` to this node's disk, and to no memory. Raises what :meth:`CheckpointStore.pull` raises."""
    began_at = time.monotonic()
    tier_from = Tier.DISK if await store.on_disk(source) else Tier.REMOTE
    path = await store.pull(key, source, on_progress, peers)
    info = await store.inspect(key, source, peers)
    return FilesLease(path, info.nbytes, tier_from, time.monotonic() - began_at)
