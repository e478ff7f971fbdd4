"""A directory that appears whole or not at all, also when its writer is killed.

It is made under another name beside the target and renamed when all of it is on disk. A lock on a third name tells whether the
writer lives; the kernel gives the lock back when it dies, so the next writer knows what is left over and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from sllmdask.loader import libc


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; what is not there, or what another removes meanwhile, is no error."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock `path`; ``None`` where another process has it, or removed it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise  # nobody removed it: no file can be made here
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, there = os.fstat(fd), os.stat(path)
        if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_left_over(target: Path) -> None:
    """Remove what writers of `target` that are dead have left."""
    for lock in target.parent.glob(f".{_escaped(target.name)}.*.lock"):
        fd = _lock(lock, 0)
        if fd is None:
            continue
        # The directory first: while its lock is there, it is known for what it is.
        _remove(lock.with_suffix(".partial"))
        lock.unlink(missing_ok=True)
        os.close(fd)


def _escaped(name: str) -> str:
    """`name` as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


class NewDirectory:
    """``with NewDirectory(target) as new``: write to ``new.path``, then ``new.publish()``; without that, nothing remains.

    `target`'s parent is made if need be. Raises :class:`OSError` where nothing can be written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
        _remove_left_over(self.target)
        while self._lock is None:
            self.path = self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.partial")
            self._lock = _lock(self.path.with_suffix(".lock"), os.O_CREAT | os.O_EXCL)
        try:
            self.path.mkdir()
        except BaseException:
            self._unlock()
            raise
        return self

    def publish(self, *, replace: bool = False) -> None:
        """Give the directory its name. What has that name is replaced, or, without `replace`, a :class:`FileExistsError`.

        The files' contents must be on disk. Where the system can, old and new are exchanged in one step; elsewhere the old one is
        moved aside first, and for a moment there is neither.
        """
        for directory, _, _ in os.walk(self.path):
            sync(Path(directory))
        if not replace or not os.path.lexists(self.target):
            if not libc.renameat2(self.path, self.target, libc.RENAME_NOREPLACE):
                if os.path.lexists(self.target):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target))
                os.rename(self.path, self.target)
        elif not libc.renameat2(self.path, self.target, libc.RENAME_EXCHANGE):
            aside = self.path.with_suffix(".old")
            os.rename(self.target, aside)
            os.rename(self.path, self.target)
            sync(self.target.parent)
            _remove(aside)
        sync(self.target.parent)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After an exchange it is what was replaced that has this name.
        _remove(self.path)
        self._unlock()

    def _unlock(self) -> None:
        assert self._lock is not None
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        os.close(self._lock)
