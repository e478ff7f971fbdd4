"""What a store has learned of its tiers, kept in its directory for the next worker, and a probe of its disk before it has.

One small JSON file per host, replaced as a whole: a directory may be on a disk that several hosts share. What does not read as
such is ignored.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sllmdask.loader.disk import DiskTier
from sllmdask.loader.probe import probe
from sllmdask.loader.throttle import Throttle
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

_VERSION = 1
#: Seconds for which a probe is believed: disks are replaced, and clouds have neighbours.
_FRESH_S = 24 * 3600.0


class KeptSpeeds:
    """The file of one store. Its methods may wait for a disk, and belong to threads. `clock`: since 1970."""

    def __init__(self, disk: DiskTier, throttle: Throttle, n_readers: int, clock: Callable[[], float] = time.time) -> None:
        self._disk, self._throttle, self._n_readers, self._clock = disk, throttle, n_readers, clock
        self.path = disk.root / f".speeds-{socket.gethostname()}.json"
        #: When the disk was probed last.
        self._probed_at = 0.0

    def recall(self) -> dict[str, Any]:
        """What was kept, as :meth:`BandwidthMeter.kept` told it; of another disk, or another share of it, only the network's."""
        try:
            kept: dict[str, Any] = json.loads(self.path.read_bytes())
            if kept["version"] != _VERSION:
                return {}
            if (kept["device"], kept["read_limit"]) == (self._device(), self._throttle.bytes_per_s):
                self._probed_at = float(kept["probed_at"])
            else:
                for name in ("loads", "probed"):
                    kept[name] = {tier: known for tier, known in kept[name].items() if tier.partition("/")[0] != Tier.DISK}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.info("speeds cannot be read path=%s cause=%r", self.path, error)
            return {}
        return kept

    def keep(self, known: dict[str, Any]) -> None:
        """Write what a meter knows; where that fails it is learned again one day."""
        try:
            with self._locked():
                self._write(known)
        except OSError as error:
            logger.info("speeds cannot be kept path=%s cause=%s", self.path, error)

    def _write(self, known: dict[str, Any]) -> None:
        told = {
            "version": _VERSION,
            "device": self._device(),
            "read_limit": self._throttle.bytes_per_s,
            "probed_at": self._probed_at,
            **known,
        }
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(told))
            aside.replace(self.path)
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, of all processes: who measures would find half of the disk, and who writes must not be overtaken."""
        self._disk.root.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._disk.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def probe(self, cancel: threading.Event) -> float | None:
        """Bytes per second of the store's disk, by a short read; ``None``: nothing can be told, or what is kept is fresh."""
        try:
            with self._locked():
                kept = self.recall()
                if self._clock() < self._probed_at + _FRESH_S or cancel.is_set():
                    return _probed_disk(kept)
                file = self._largest_file()
                found = probe(self._disk.root, file, n_threads=self._n_readers, throttle=self._throttle, cancel=cancel)
                self._probed_at = self._clock()
                if found is not None:
                    probed = {**kept.get("probed", {}), str(Tier.DISK): found}
                    self._write({"loads": kept.get("loads", {}), "probed": probed})
                return found
        except OSError as error:
            logger.info("the disk cannot be probed path=%s cause=%s", self._disk.root, error)
            return None

    def _largest_file(self) -> Path | None:
        """Of the copy that was used last."""
        for copy in reversed(self._disk.copies()):
            files = [file for file in copy.path.iterdir() if file.is_file()]
            if files:
                return max(files, key=lambda file: file.stat().st_size)
        return None

    def _device(self) -> int:
        try:
            return os.stat(self._disk.root).st_dev
        except OSError:
            return 0


def _probed_disk(kept: dict[str, Any]) -> float | None:
    found = kept.get("probed", {}).get(str(Tier.DISK))
    return float(found) if isinstance(found, int | float) else None
