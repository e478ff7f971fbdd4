"""The disk tier: copies of checkpoints that came from elsewhere, below one directory that the processes of a node share.

A copy is a directory of its own, complete from the moment in which it has its name (:mod:`sllmdask.loader.tee`). Directories of
users are read where they are: they count for nothing here, and nothing here removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sllmdask.errors import CheckpointNotFound, DiskFull
from sllmdask.loader.remote import find_fetched, is_remote, local_name
from sllmdask.loader.tee import JOURNAL

logger = logging.getLogger(__name__)

#: What is being fetched, is on its way out, or was found damaged; a name of a copy ends in none of these.
PARTIAL, LEAVING, DAMAGED = ".partial", ".leaving", ".damaged"


def named_now(path: Path) -> Path:
    """The directory at `path`, which may have got its final name a moment ago, because what was fetched to it is complete."""
    final = path.with_name(path.name.removesuffix(PARTIAL))
    return final if final != path and not path.is_dir() and final.is_dir() else path


@dataclass(frozen=True, slots=True)
class DiskCopy:
    """One complete copy: `nbytes` on disk; `last_used` in nanoseconds since 1970, kept as the directory's time of change."""

    path: Path
    nbytes: int
    last_used: int


class DiskTier:
    """The copies below `root`, of at most `quota` bytes together (0: as many as the disk holds). Any thread may ask."""

    def __init__(self, root: Path, quota: int = 0) -> None:
        self.root, self.quota = root.absolute(), quota

    def find(self, source: str) -> Path | None:
        """Where the files of `source` are on this disk: a directory, or a complete copy; ``None``: they must be fetched.

        Raises :class:`CheckpointNotFound` for what is neither on this disk nor anything that could be fetched.
        """
        path = Path(source).expanduser()
        if source and path.is_dir():
            return path.absolute()
        if is_remote(source):
            return find_fetched(source, self.root)
        fetched = self.final(source)
        if source and fetched.is_dir():
            return fetched
        raise CheckpointNotFound(source, "there is no such directory, and it is not the id of a model on the hub")

    def final(self, source: str) -> Path:
        """Where a copy of `source` is kept; a directory of another node has a name of its own, too."""
        if is_remote(source):
            return self.root / local_name(source)
        return self.root / f"node--{Path(source).name[-100:]}--{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def owns(self, path: Path) -> bool:
        """Whether `path` is a copy that was fetched, and may be fetched again."""
        return path.parent == self.root

    def touch(self, path: Path) -> None:
        """A copy was used: it leaves later."""
        if self.owns(path):
            try:
                os.utime(path)
            except OSError:
                # Its life is shorter than it could be; that is all.
                logger.debug("cannot note the use of %s", path)

    def demote(self, path: Path) -> None:
        """A copy will not be used soon: it leaves first."""
        if self.owns(path):
            with contextlib.suppress(OSError):
                os.utime(path, ns=(0, 0))

    def hold(self, path: Path) -> int | None:
        """A descriptor; until it is closed no process of the node removes the copy. ``None``: it is not ours to remove."""
        return _lock(path, fcntl.LOCK_SH) if self.owns(path) and path.suffix != PARTIAL else None

    def copies(self) -> list[DiskCopy]:
        """All complete copies, the one that was used longest ago first."""
        found = []
        for entry in os.scandir(self.root) if self.root.is_dir() else ():
            if entry.name.endswith((PARTIAL, LEAVING, DAMAGED)) or entry.name.startswith(".") or not entry.is_dir():
                continue
            try:
                found.append(DiskCopy(Path(entry.path), _nbytes_below(entry.path), entry.stat().st_mtime_ns))
            except OSError:
                continue  # another process has just removed it
        return sorted(found, key=lambda copy: (copy.last_used, copy.path))

    @property
    def used(self) -> int:
        """Bytes of the complete copies."""
        return sum(copy.nbytes for copy in self.copies())

    @property
    def capacity(self) -> int:
        """Bytes that copies may take: the quota, or what the disk has free beside them."""
        if self.quota:
            return self.quota
        existing = next(parent for parent in (self.root, *self.root.parents) if parent.is_dir())
        return self.used + shutil.disk_usage(existing).free

    def make_room(self, source: str, nbytes: int, in_use: Collection[Path]) -> list[Path]:
        """Remove copies, what was used longest ago first, until `nbytes` more fit; returns what was removed.

        Nothing in `in_use` leaves, and nothing that is held; nothing at all if that would not suffice: :class:`DiskFull`. What
        is being fetched counts with all its bytes; what was left of a fetch leaves first.
        """
        if not self.quota:
            return []
        self._sweep()
        copies = self.copies()
        leaving: list[Path] = []
        with contextlib.ExitStack() as locks:

            def lock(path: Path) -> bool:
                found = None if path in in_use else _lock(path, fcntl.LOCK_EX)
                if found is not None:
                    locks.callback(os.close, found)
                return found is not None

            kept, left = self._fetches(self.final(source), lock)
            kept += sum(copy.nbytes for copy in copies)
            for copy in (*left, *copies):
                if kept + nbytes <= self.quota:
                    break
                if copy in left or lock(copy.path):
                    leaving.append(copy.path)
                    kept -= copy.nbytes
            if kept + nbytes > self.quota:
                free = max(self.quota - kept, 0)
                raise DiskFull(str(self.final(source)), nbytes, free, "the quota of the disk tier is used up (worker.disk_quota)")
            for path in leaving:
                self.remove(path)
        return leaving

    def _fetches(self, own: Path, lock: Callable[[Path], bool]) -> tuple[int, list[DiskCopy]]:
        """What fetches take but that of `own`: bytes, all that it will take of one under way; and what was left of others."""
        taken, left = 0, []
        for path in self.root.glob(f"*{PARTIAL}"):
            if path == own.with_name(own.name + PARTIAL):
                continue
            with contextlib.suppress(OSError):  # its fetch has just ended
                journal = path / JOURNAL
                under_way = not lock(path) and journal.exists()
                taken += _nbytes_below(path, on_disk=not under_way)
                if not under_way and journal.exists() and journal.stat().st_size:
                    left.append(DiskCopy(path, _nbytes_below(path, on_disk=True), path.stat().st_mtime_ns))
        return taken, left

    def remove(self, path: Path) -> None:
        """Remove a copy: gone at once under its name, and then from the disk."""
        aside = _free_name(path, LEAVING)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.rename(aside)
            logger.info("removed from disk path=%s", path)
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """End what a process that was killed had begun to remove."""
        for path in self.root.glob(f"*{LEAVING}"):
            shutil.rmtree(path, ignore_errors=True)

    def quarantine(self, path: Path, reason: str) -> bool:
        """Put a damaged copy aside, so that the next load fetches it again; false for what is not ours to move."""
        if not self.owns(path):
            return False
        for old in path.parent.glob(f"{path.name}.*{DAMAGED}"):
            shutil.rmtree(old, ignore_errors=True)  # one is enough to look at
        aside = _free_name(path, DAMAGED)
        try:
            path.rename(aside)
        except FileNotFoundError:
            return True  # another process was faster
        logger.error("damaged checkpoint put aside path=%s cause=%s", aside, reason)
        return True


def _lock(directory: Path, kind: int) -> int | None:
    """A descriptor that holds a lock on `directory`; ``None`` if it is not there, or others hold what excludes it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _nbytes_below(directory: str | Path, *, on_disk: bool = False) -> int:
    """Bytes of the files in a copy, which has no links; `on_disk`: of those that are there, holes apart."""
    files = [os.lstat(os.path.join(parent, name)) for parent, _, names in os.walk(directory) for name in names]
    return sum(512 * file.st_blocks if on_disk else file.st_size for file in files)


def _free_name(path: Path, ending: str) -> Path:
    names = (path.with_name(f"{path.name}.{os.getpid()}-{number}{ending}") for number in itertools.count())
    return next(name for name in names if not name.exists())
