"""A short measurement of a disk: direct reads, as a load makes them, of a checkpoint's file or of one made for it.

What it finds is a prior: real loads say more.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sllmdask.errors import Cancelled
from sllmdask.loader import libc
from sllmdask.loader.buffers import Staging
from sllmdask.loader.plan import BLOCK
from sllmdask.loader.throttle import Throttle

#: Bytes that are read at most, bytes of a file that is made for it, and bytes of one read.
READ_NBYTES, FILE_NBYTES, CHUNK_NBYTES = 64 * 1024**2, 32 * 1024**2, 2 * 1024**2
#: Seconds of reading, and of writing a file for it, after which it makes do with what there is.
READ_S, WRITE_S = 0.25, 0.25
#: A file is made only where it takes no more than this share of what is free.
_SHARE_OF_FREE = 64
_PREFIX = ".probe-"


def probe(root: Path, file: Path | None, *, n_threads: int, throttle: Throttle, cancel: threading.Event) -> float | None:
    """In a thread: bytes per second of direct reads of `file`, or, ``None``, of a new file in `root`, which does not stay.

    ``None`` where nothing can be told: no direct reads, no room, a file that is too short. Raises :class:`OSError`.
    """
    if file is not None:
        return _timed(str(file), os.stat(file).st_size, n_threads, throttle, cancel)
    with _new_file(root) as (path, nbytes):
        return _timed(path, nbytes, n_threads, throttle, cancel) if nbytes else None


@contextmanager
def _new_file(root: Path) -> Iterator[tuple[str, int]]:
    """Its path and size, 0 if there is no room. Of a process that was killed meanwhile a file is left, which the next removes."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"{_PREFIX}*"):
        # One of another process that measures just now goes on under no name.
        old.unlink(missing_ok=True)
    if shutil.disk_usage(root).free < _SHARE_OF_FREE * FILE_NBYTES:
        yield "", 0
        return
    path = root / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Nothing that a file system would compress.
        data = os.urandom(CHUNK_NBYTES)
        written, started = 0, time.perf_counter()
        while written < FILE_NBYTES and time.perf_counter() < started + WRITE_S:
            written += os.write(fd, data)
        os.fdatasync(fd)
        yield str(path), written
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _timed(path: str, nbytes: int, n_threads: int, throttle: Throttle, cancel: threading.Event) -> float | None:
    with suppress(FileNotFoundError):
        fd = libc.open_direct(path)
        if fd is not None:
            try:
                most = READ_NBYTES if not throttle.bytes_per_s else min(READ_NBYTES, int(throttle.bytes_per_s * READ_S))
                return _read(fd, min(nbytes, most), n_threads, throttle, cancel)
            finally:
                os.close(fd)
    return None


def _read(fd: int, nbytes: int, n_threads: int, throttle: Throttle, cancel: threading.Event) -> float | None:
    """Whole chunks of the first `nbytes`, by several threads, for as long as there is time."""
    offsets = list(range(0, nbytes - CHUNK_NBYTES + 1, CHUNK_NBYTES))
    if len(offsets) < 2 or cancel.is_set():
        return None
    staging = Staging()
    staging.prefault(n_threads, CHUNK_NBYTES + BLOCK)
    lock = threading.Lock()
    done = 0
    pending = iter(offsets)
    started = time.perf_counter()

    def work() -> None:
        nonlocal done
        with suppress(OSError, Cancelled), staging.borrow(CHUNK_NBYTES + BLOCK) as address:
            while not cancel.is_set() and time.perf_counter() < started + READ_S:
                with lock:
                    offset = next(pending, None)
                if offset is None:
                    return
                throttle.take(CHUNK_NBYTES, cancel)
                n = libc.pread(fd, address, CHUNK_NBYTES, offset)
                with lock:
                    done += n

    threads = [threading.Thread(target=work, name=f"probe-{number}", daemon=True) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return done / seconds if done and seconds > 0 else None
