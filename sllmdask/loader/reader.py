"""Reads the chunks of a plan into memory, several at a time.

Threads take the next chunk when they are done with one, so a slow read delays only itself. ctypes lets go of the GIL while a
read runs, and a chunk is large, so Python's share is some microseconds per megabyte. The first failure stops all.

Source of the idea: ServerlessLLM (OSDI '24), section 4; there the chunks are dealt to the threads in advance.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader import libc
from sllmdask.loader.plan import BLOCK, ChunkRead, FileRead, ReadPlan


class _File:
    """One open file: directly where that works, through the page cache where it does not or stops to."""

    def __init__(self, file: FileRead) -> None:
        self.path = file.path
        self._lock = threading.Lock()
        self._buffered: int | None = None
        self.direct = libc.open_direct(file.path) if file.direct else None
        nbytes = os.fstat(self.direct if self.direct is not None else self.buffered()).st_size
        if nbytes != file.nbytes:
            self.close()
            raise CheckpointCorrupt(file.path, None, f"it was {file.nbytes} bytes long a moment ago and is {nbytes} now")

    def buffered(self) -> int:
        with self._lock:
            if self._buffered is None:
                self._buffered = libc.open_buffered(self.path)
            return self._buffered

    def close(self) -> None:
        for fd in (self.direct, self._buffered):
            if fd is not None:
                os.close(fd)


class _Files:
    """The files of a plan, open for the length of a ``with`` block."""

    def __init__(self, files: tuple[FileRead, ...]) -> None:
        self._files = files
        self.open: list[_File] = []

    def __enter__(self) -> Self:
        try:
            for file in self._files:
                self.open.append(_File(file))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self.open:
            file.close()


def _pread(file: _File, fd: int, address: int, nbytes: int, offset: int) -> int:
    while True:
        try:
            return libc.pread(fd, address, nbytes, offset)
        except InterruptedError:
            continue
        except OSError as error:
            raise OSError(error.errno, f"{os.strerror(error.errno or 0)} at byte {offset}", file.path) from None


def _read_direct(file: _File, chunk: ChunkRead, address: int) -> int:
    """Read what direct reads can bring of `chunk`; returns how many bytes, whole blocks unless they are all."""
    assert file.direct is not None
    done = 0
    while done < chunk.wanted:
        try:
            n = _pread(file, file.direct, address + done, chunk.nbytes - done, chunk.offset + done)
        except OSError as error:
            # Some file systems open a file for direct reads and then refuse each.
            if error.errno == errno.EINVAL:
                return done
            raise
        if done + n >= chunk.wanted:
            return chunk.wanted
        if n < BLOCK:
            return done
        # The next direct read must begin at a block.
        done += n // BLOCK * BLOCK
    return done


def _read_chunk(file: _File, chunk: ChunkRead, address: int) -> None:
    """Bring all wanted bytes of `chunk` to `address`; raises :class:`CheckpointCorrupt` where the file ends before them."""
    done = _read_direct(file, chunk, address) if file.direct is not None else 0
    while done < chunk.wanted:
        n = _pread(file, file.buffered(), address + done, chunk.wanted - done, chunk.offset + done)
        if n == 0:
            end = chunk.offset + chunk.wanted
            raise CheckpointCorrupt(file.path, None, f"it is truncated: it ends at byte {chunk.offset + done}, before {end}")
        done += n


class _Reading:
    """What the threads of one read share."""

    def __init__(self, plan: ReadPlan, address: int, on_progress: Callable[[int], None] | None, cancel: threading.Event) -> None:
        self.address = address
        self.error: BaseException | None = None
        self._chunks = iter(plan.chunks)
        self._on_progress = on_progress
        self._cancel = cancel
        self._lock = threading.Lock()
        self._done = 0

    def _next(self) -> ChunkRead | None:
        with self._lock:
            if self.error is not None:
                return None
            if self._cancel.is_set():
                self.error = Cancelled("the read was called off")
                return None
            return next(self._chunks, None)

    def _finished(self, chunk: ChunkRead) -> None:
        # Under the lock, so that reports never run backwards.
        with self._lock:
            self._done += chunk.payload
            if self._on_progress is not None and self.error is None:
                self._on_progress(self._done)

    def work(self, files: list[_File]) -> None:
        try:
            while (chunk := self._next()) is not None:
                _read_chunk(files[chunk.file], chunk, self.address + chunk.position)
                self._finished(chunk)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for all
            with self._lock:
                self.error = self.error or error


def read_chunks(
    plan: ReadPlan,
    address: int,
    *,
    n_threads: int = 4,
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Bring every byte of `plan` to the ``plan.nbytes`` bytes at `address`, a multiple of ``BLOCK``; returns when all are there.

    `on_progress` is called with the tensor bytes read so far: 0 at the start, then after each chunk, from any of the threads,
    never backwards. `cancel` is looked at between chunks. The caller keeps the memory alive.

    Raises :class:`CheckpointCorrupt` (a file ends early or has changed), :class:`OSError` with the file's name and the offset,
    :class:`Cancelled`. When it raises, no thread touches the memory any more.
    """
    assert address % BLOCK == 0
    reading = _Reading(plan, address, on_progress, cancel or threading.Event())
    with _Files(plan.files) as files:
        if on_progress is not None:
            on_progress(0)
        n_threads = max(1, min(n_threads, len(plan.chunks)))
        threads = [threading.Thread(target=reading.work, args=(files.open,), name=f"read-{i}") for i in range(1, n_threads)]
        for thread in threads:
            thread.start()
        reading.work(files.open)
        for thread in threads:
            thread.join()
    error, reading.error = reading.error, None
    if error is not None:
        try:
            raise error
        finally:
            # An error that is reachable from its own traceback would keep the caller's frames, and their memory, for a while.
            del error
    for copy in plan.copies:
        ctypes.memmove(address + copy.target, address + copy.source, copy.nbytes)
