"""Brings the chunks of a plan into memory, several at a time, checked and decoded.

Threads take the next chunk when they are done with one, so a slow read delays only itself. ctypes and the kernels let go of
the GIL while they run, and a chunk is large, so Python's share is some microseconds per megabyte. The first failure stops all.

Source of the idea: ServerlessLLM (OSDI '24), section 4; there the chunks are dealt to the threads in advance.
"""

from __future__ import annotations

import errno
import os
import queue
import statistics
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader import libc
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Staging
from sllmdask.loader.plan import BLOCK, ChunkRead, FileRead, ReadPlan
from sllmdask.loader.throttle import Throttle

#: Told of a chunk and the address of its stored bytes, once they are checked and before they are decoded.
Tee = Callable[[ChunkRead, int], None]

#: Files that a source keeps open, apart from those that it reads just now: shards may be more than a process may open.
MAX_OPEN_FILES = 64
#: Bytes of one read of chunks that lie side by side, in a file and in memory, and threads that check them meanwhile. 3.09 GB with
#: checksums: 1.02 of the direct-read limit; read and checked by the same threads, 2 MiB at a time, 1.06 with 8, 1.12 with 4.
RUN_NBYTES, CHECKERS = 8 * 1024**2, 1
#: Bytes. A smaller read tells more of latency than of how fast a file system is.
TRIAL_NBYTES = 1024**2
#: Reads of each kind that a trial compares.
TRIAL_READS = 4
#: Bytes per second of one thread's direct reads above which no trial is made: four such threads fill any disk.
FAST_ENOUGH = 500e6
#: How much faster buffered reads must be to be preferred: they cost a copy, and memory for the page cache.
TRIAL_MARGIN = 1.25


class ChunkSource(Protocol):
    """Where the stored bytes of a plan's chunks come from; a context manager, inside which several threads call :meth:`fetch`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring at least the ``chunk.wanted`` stored bytes to `address`, a multiple of ``BLOCK``, with room for ``chunk.nbytes``.

        Raises :class:`CheckpointCorrupt` where there are fewer, :class:`OSError`, or another :class:`SllmError`. Checksums are
        the caller's.
        """


class Scratch(Protocol):
    """Where threads that read borrow memory: :class:`Staging` is one."""

    def borrow(self, nbytes: int) -> AbstractContextManager[int]:
        """The address, a multiple of ``BLOCK``, of at least `nbytes` bytes that are the borrower's alone."""


class Outlet(Protocol):
    """Where one thread of a read leaves its chunks, one after the other."""

    def room(self, chunk: int) -> int:
        """The address, a multiple of ``BLOCK``, for the decoded bytes of chunk number `chunk`, with room for a direct read."""

    def put(self, chunk: int) -> None:
        """They are there, checked."""


class Sink(Protocol):
    """Where chunks go that are not to stay in one buffer."""

    def open(self, landed: Callable[[int], None]) -> AbstractContextManager[Outlet]:
        """An outlet for the thread that asks, which calls `landed` with each chunk once it is where it shall be.

        To leave the context waits for all of them; after an error, until none of them is used any more.
        """


# --- local files -----------------------------------------------------------------------------------------------------


class FileSystems:
    """Which file systems are read faster through the page cache than directly, learnt while they are read.

    Direct reads win on disks; on some network and user-space file systems, which read ahead only what they cache, they lose.
    Where the first direct reads are slow, a few buffered ones are compared with them, and the result is kept for as long as
    this object. All methods belong to any thread. A file system is known by its ``st_dev``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._direct: dict[int, bool] = {}
        self._seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def on_trial(self, device: int) -> bool:
        """Whether reads of this file system are still compared."""
        with self._lock:
            return device not in self._direct

    def direct(self, device: int) -> bool:
        """Whether the next read should be a direct one."""
        with self._lock:
            return self._direct.get(device, len(self._seconds[device, True]) < TRIAL_READS)

    def observe(self, device: int, direct: bool, nbytes: int, seconds: float) -> None:
        """One thread read `nbytes` in `seconds`, none of them from the page cache."""
        with self._lock:
            if device in self._direct or nbytes < TRIAL_NBYTES:
                return
            directly, buffered = self._seconds[device, True], self._seconds[device, False]
            (directly if direct else buffered).append(seconds / nbytes)
            if len(directly) < TRIAL_READS:
                return
            if 1 / statistics.median(directly) >= FAST_ENOUGH:
                self._direct[device] = True
            elif len(buffered) >= TRIAL_READS:
                self._direct[device] = statistics.median(directly) < TRIAL_MARGIN * statistics.median(buffered)


class _File:
    """One open file: directly where that works, through the page cache where it does not or stops to."""

    def __init__(self, file: FileRead) -> None:
        self.path = file.path
        self.n_users = 0
        self._lock = threading.Lock()
        self._buffered: int | None = None
        self.direct = libc.open_direct(file.path) if file.direct else None

    @property
    def fd(self) -> int:
        """Any descriptor of the file."""
        return self.buffered() if self.direct is None else self.direct

    def buffered(self) -> int:
        with self._lock:
            if self._buffered is None:
                self._buffered = libc.open_buffered(self.path)
            return self._buffered

    def close(self) -> None:
        for fd in (self.direct, self._buffered):
            if fd is not None:
                os.close(fd)


def _stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class LocalFiles:
    """The files of `plan` on this machine: read directly where that works and is faster, else in large buffered reads.

    What happens to be in the page cache is read from there. `file_systems` remembers, between plans, what was measured.
    `throttle` bounds what is read from the disk; whoever waits for it notices that `cancel` is set.
    """

    def __init__(
        self,
        plan: ReadPlan,
        file_systems: FileSystems | None = None,
        throttle: Throttle | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self._files = plan.files
        self._file_systems = file_systems or FileSystems()
        self._throttle, self._cancel = throttle, cancel
        self._stamps: list[tuple[int, int, int, int]] = []
        #: By number; what was used last comes last.
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        #: Bytes that came from the page cache: what they took says nothing of the disk.
        self.cached_nbytes = 0

    def __enter__(self) -> Self:
        """Raises :class:`OSError`, and :class:`CheckpointCorrupt` if a file has not the size that its header was checked with."""
        self._stamps = [_stamp(os.stat(file.path)) for file in self._files]
        for file, (_, _, nbytes, _) in zip(self._files, self._stamps, strict=True):
            if nbytes != file.nbytes:
                raise CheckpointCorrupt(file.path, None, f"it was {file.nbytes} bytes long a moment ago and is {nbytes} now")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises :class:`CheckpointCorrupt` if all went well but a file was written to meanwhile."""
        try:
            if kind is None:
                for number, file in self._open.items():
                    self._check_unchanged(number, file)
        finally:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """As :meth:`ChunkSource.fetch` says; an :class:`OSError` has the file's name and the offset."""
        with self._opened(chunk.file) as file:
            in_cache = self._in_cache(file, chunk)
            if self._throttle is not None and not in_cache:
                self._throttle.take(chunk.wanted, self._cancel)
            if file.direct is None or in_cache:
                _read_buffered(file, chunk, address, 0, ahead=not in_cache)
                return
            device = self._stamps[chunk.file][0]
            direct, on_trial = self._file_systems.direct(device), self._file_systems.on_trial(device)
            if on_trial and not direct:
                # Else pages that an earlier reader left there would be compared with the disk.
                os.posix_fadvise(file.buffered(), chunk.offset, chunk.wanted, os.POSIX_FADV_DONTNEED)
            started = self._file_systems.clock()
            done = _read_direct(file, chunk, address) if direct else 0
            _read_buffered(file, chunk, address, done)
            if on_trial:
                self._file_systems.observe(device, direct, chunk.wanted, self._file_systems.clock() - started)

    def _in_cache(self, file: _File, chunk: ChunkRead) -> bool:
        """Whether all of `chunk` is in the page cache, from where it comes five times as fast as from a disk of 4 GB/s."""
        page = os.sysconf("SC_PAGESIZE")
        n_pages = (chunk.offset + chunk.wanted - 1) // page - chunk.offset // page + 1
        if libc.cached_pages(file.fd, chunk.offset, chunk.wanted) < n_pages:
            return False
        with self._lock:
            self.cached_nbytes += chunk.wanted
        return True

    @contextmanager
    def _opened(self, number: int) -> Iterator[_File]:
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _File(self._files[number])
                self._check_unchanged(number, file)
            self._open.move_to_end(number)
            file.n_users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.n_users -= 1
                n_spare = len(self._open) - MAX_OPEN_FILES
                if n_spare > 0:
                    for stale in [number for number, file in self._open.items() if not file.n_users][:n_spare]:
                        self._close(stale)

    def _close(self, number: int) -> None:
        file = self._open.pop(number)
        try:
            self._check_unchanged(number, file)
        finally:
            file.close()

    def _check_unchanged(self, number: int, file: _File) -> None:
        if _stamp(os.fstat(file.fd)) != self._stamps[number]:
            raise CheckpointCorrupt(file.path, None, "it was written to, or replaced, while it was read")


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


def _read_buffered(file: _File, chunk: ChunkRead, address: int, done: int, *, ahead: bool = True) -> None:
    """Bring all but the first `done` wanted bytes of `chunk`; :class:`CheckpointCorrupt` where the file ends before them."""
    if ahead and chunk.wanted - done >= BLOCK:
        # The whole range at once: the system's own read-ahead is small. Cold 2 MiB reads: 0.7 s per 1.56 GB instead of 1.1.
        os.posix_fadvise(file.buffered(), chunk.offset + done, chunk.wanted - done, os.POSIX_FADV_WILLNEED)
    while done < chunk.wanted:
        n = _pread(file, file.buffered(), address + done, chunk.wanted - done, chunk.offset + done)
        if n == 0:
            end = chunk.offset + chunk.wanted
            raise CheckpointCorrupt(file.path, None, f"it is truncated: it ends at byte {chunk.offset + done}, before {end}")
        done += n


# --- one chunk -------------------------------------------------------------------------------------------------------


def check(plan: ReadPlan, number: int, stored: int) -> None:
    """Compare the stored bytes of chunk `number`, at address `stored`, with its checksum, if it has one.

    Raises :class:`CheckpointCorrupt` with the file and the first tensor of the chunk.
    """
    chunk = plan.chunks[number]
    if chunk.checksum is None:
        return
    # Here, because numba takes longer to import than many a checkpoint to read, and safetensors have no checksums.
    from sllmdask.loader.kernels import xxh64

    found = xxh64(stored, chunk.wanted)
    if found != chunk.checksum:
        end = chunk.offset + chunk.wanted
        raise _corrupt(plan, number, f"bytes [{chunk.offset}, {end}) have checksum {found:016x}, not {chunk.checksum:016x}")


def decode(plan: ReadPlan, number: int, stored: int, target: int) -> None:
    """Bring the ``decoded`` bytes of chunk `number` to address `target` from its stored bytes elsewhere, at address `stored`.

    Raises :class:`CheckpointCorrupt` with the file and the first tensor of the chunk.
    """
    chunk = plan.chunks[number]
    if chunk.codec == "raw":
        libc.copy(target, stored, chunk.wanted)
        return
    from sllmdask.loader.codec import decode_split16

    assert chunk.codec == "split16"
    try:
        decode_split16(stored, chunk.wanted, target, chunk.decoded)
    except ValueError as error:
        raise _corrupt(plan, number, f"the chunk at byte {chunk.offset} cannot be decoded: {error}") from None


def unpack(plan: ReadPlan, number: int, stored: int, target: int) -> None:
    """:func:`check` chunk `number`, then :func:`decode` it."""
    check(plan, number, stored)
    decode(plan, number, stored, target)


def _corrupt(plan: ReadPlan, number: int, reason: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(plan.files[plan.chunks[number].file].path, plan.first_tensor(number), reason)


# --- many at a time --------------------------------------------------------------------------------------------------


class _Copying:
    """The copies of a plan, each made by the thread that brings the last of its chunks."""

    def __init__(self, plan: ReadPlan) -> None:
        self._missing = {number: set(plan.chunks_of[copy.tensor]) for number, copy in enumerate(plan.copies)}
        self._waiting: dict[int, list[int]] = defaultdict(list)
        for number, chunks in self._missing.items():
            for chunk in chunks:
                self._waiting[chunk].append(number)
        self._plan = plan
        self._lock = threading.Lock()

    def arrived(self, chunk: int, address: int) -> None:
        """Make, in the buffer at `address`, the copies that waited for nothing but `chunk`."""
        for number in self._waiting.get(chunk, ()):
            with self._lock:
                self._missing[number].discard(chunk)
                ready = not self._missing[number]
            if ready:
                copy = self._plan.copies[number]
                libc.copy(address + copy.target, address + copy.source, copy.nbytes)


class _Buffer:
    """The buffer at an address, as a sink."""

    def __init__(self, plan: ReadPlan, address: int) -> None:
        self.plan, self.address = plan, address
        self.copying = _Copying(plan)

    def open(self, landed: Callable[[int], None]) -> AbstractContextManager[Outlet]:
        return nullcontext(_Place(self, landed))


class _Place:
    """A chunk has landed in a buffer when it is there and the copies that waited for it are made."""

    def __init__(self, buffer: _Buffer, landed: Callable[[int], None]) -> None:
        self._buffer, self._landed = buffer, landed

    def room(self, chunk: int) -> int:
        return self._buffer.address + self._buffer.plan.chunks[chunk].position

    def put(self, chunk: int) -> None:
        self._buffer.copying.arrived(chunk, self._buffer.address)
        self._landed(chunk)


class _Reading:
    """What the threads of one read share."""

    def __init__(
        self,
        plan: ReadPlan,
        target: int | Sink,
        source: ChunkSource,
        arrivals: Arrivals | None,
        tee: Tee | None,
        on_progress: Callable[[int], None] | None,
        cancel: threading.Event | None,
        direct_target: bool,
    ) -> None:
        self.error: BaseException | None = None
        self._plan, self._source = plan, source
        self._sink: Sink = _Buffer(plan, target) if isinstance(target, int) else target
        self._arrivals, self._tee, self._on_progress, self._cancel = arrivals, tee, on_progress, cancel
        self._staged = [chunk.codec != "raw" or not direct_target for chunk in plan.chunks]
        #: Whether chunks with checksums are read in larger runs, and checked by threads that read nothing.
        self.checks_apart = isinstance(source, LocalFiles) and isinstance(target, int) and direct_target and _has_checksums(plan)
        self._unchecked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pending = deque(range(len(plan.chunks)))
        self._done = 0
        self._lock = threading.Lock()

    def skip(self, resident_nbytes: int) -> None:
        """The buffer's first bytes are what they shall be: their chunks have arrived."""
        if resident_nbytes:
            resident = [n for n, chunk in enumerate(self._plan.chunks) if chunk.position + chunk.decoded <= resident_nbytes]
            self._pending = deque(sorted(set(self._pending) - set(resident)))
            with self._sink.open(self._finished) as outlet:
                for number in resident:
                    outlet.put(number)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of scratch memory that each thread needs."""
        return max((chunk.nbytes for chunk, staged in zip(self._plan.chunks, self._staged, strict=True) if staged), default=0)

    def fail(self, error: BaseException) -> None:
        """No chunk is begun any more. The first error counts."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        if self._arrivals is not None:
            self._arrivals.fail(error)

    def work(self, staging: Scratch) -> None:
        try:
            nbytes = self.scratch_nbytes
            # No ExitStack: its frame would keep an error that one of these ends with, and so the caller's frames and memory.
            with staging.borrow(nbytes) if nbytes else nullcontext(0) as scratch, self._sink.open(self._finished) as outlet:
                while run := self._next():
                    if self._is_apart(run[0]):
                        self._fetch_run(run)
                    else:
                        self._bring(run[0], scratch, outlet)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for all
            self.fail(error)

    def check(self) -> None:
        """Check what :meth:`work` has read as runs, until :meth:`checked` ends it."""
        try:
            with self._sink.open(self._finished) as outlet:
                while (number := self._unchecked.get()) is not None:
                    if self.error is None:
                        self._accept(number, self._address_of(number))
                        outlet.put(number)
        except BaseException as error:  # noqa: BLE001 - as above
            self.fail(error)

    def checked(self) -> None:
        """Nothing more will be read: one thread in :meth:`check` ends when it has seen all."""
        self._unchecked.put(None)

    def _next(self) -> list[int]:
        """The numbers of the chunks to bring next: one, or several that one read brings; none are left if it is empty."""
        with self._lock:
            if self.error is not None or not self._pending:
                return []
            if self._cancel is None or not self._cancel.is_set():
                run = [self._pending.popleft()]
                while self._pending and self._follows(run, self._pending[0]):
                    run.append(self._pending.popleft())
                return run
        raise Cancelled("the read was called off")

    def _is_apart(self, number: int) -> bool:
        """Whether chunk `number` is read to its place by one thread and checked by another."""
        return self.checks_apart and not self._staged[number] and self._plan.chunks[number].checksum is not None

    def _follows(self, run: list[int], number: int) -> bool:
        """Whether chunk `number` may be read together with `run`: it lies behind it, in the file and in the buffer."""
        if not self._is_apart(run[0]) or not self._is_apart(number):
            return False
        first, last, chunk = self._plan.chunks[run[0]], self._plan.chunks[run[-1]], self._plan.chunks[number]
        return (
            chunk.file == last.file
            and chunk.offset == last.offset + last.wanted
            and chunk.position == last.position + last.wanted
            and chunk.offset + chunk.nbytes - first.offset <= RUN_NBYTES
        )

    def _address_of(self, number: int) -> int:
        assert isinstance(self._sink, _Buffer)
        return self._sink.address + self._plan.chunks[number].position

    def _fetch_run(self, run: list[int]) -> None:
        """Read chunks that lie side by side, each with a checksum of its own, as one."""
        first, last = self._plan.chunks[run[0]], self._plan.chunks[run[-1]]
        nbytes, wanted = last.offset + last.nbytes - first.offset, last.offset + last.wanted - first.offset
        self._source.fetch(replace(first, nbytes=nbytes, wanted=wanted, decoded=wanted), self._address_of(run[0]))
        for number in run:
            self._unchecked.put(number)

    def _accept(self, number: int, stored: int) -> None:
        """The stored bytes of chunk `number` are at `stored`: check them, and tell who wants them."""
        check(self._plan, number, stored)
        if self._tee is not None:
            self._tee(self._plan.chunks[number], stored)

    def _bring(self, number: int, scratch: int, outlet: Outlet) -> None:
        """Chunk `number`, checked and decoded, at its place. A staged chunk stays in the processor's cache until it is there."""
        chunk, staged = self._plan.chunks[number], self._staged[number]
        target = outlet.room(number)
        stored = scratch if staged else target
        self._source.fetch(chunk, stored)
        self._accept(number, stored)
        if staged:
            decode(self._plan, number, stored, target)
        outlet.put(number)

    def _finished(self, number: int) -> None:
        if self._arrivals is not None:
            self._arrivals.arrived(number)
        # Under the lock, so that reports never run backwards.
        with self._lock:
            self._done += self._plan.chunks[number].payload
            if self._on_progress is not None and self.error is None:
                self._on_progress(self._done)


def read_chunks(
    plan: ReadPlan,
    address: int | Sink,
    *,
    source: ChunkSource | None = None,
    n_threads: int = 4,
    arrivals: Arrivals | None = None,
    staging: Scratch | None = None,
    tee: Tee | None = None,
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
    direct_target: bool = True,
    resident_nbytes: int = 0,
) -> None:
    """Bring every byte of `plan` to the ``plan.nbytes`` bytes at `address`, a multiple of ``BLOCK``; returns when all are there.

    In place of an address it takes a :class:`Sink`, to which each thread hands its chunks; ``plan.copies`` are then the sink's.

    The stored bytes come from `source`, by default the plan's files on this machine. `direct_target` is for private memory on
    huge pages: raw chunks are read straight to their place. Without it, and where chunks are encoded, each goes through scratch
    memory of `staging`, which several reads may share: direct reads want to hold each page, and of shared memory's small pages
    there are 512 times as many (3.09 GB: 1.07 s straight there, 0.85 s by way of 2 MiB of scratch, which the cache holds).

    The buffer's first `resident_nbytes` bytes are what they shall be already: their chunks are not read again.

    `arrivals` hears of each chunk when it is in its place. `tee` is called with each chunk and the address of its stored bytes,
    checked, from any of the threads; what it raises ends the read. `on_progress` is called with the tensor bytes so far: 0 at
    the start, then after each chunk, from any of the threads, never backwards. `cancel` is looked at between chunks. The caller
    keeps the memory alive.

    Raises :class:`CheckpointCorrupt` (a checksum differs, a chunk cannot be decoded, a file ends early or has changed), whatever
    `source` raises (:class:`OSError` with the file's name and the offset), :class:`Cancelled`. When it returns or raises, no
    thread touches the memory any more.
    """
    assert not isinstance(address, int) or address % BLOCK == 0
    try:
        with source or LocalFiles(plan) as opened:
            reading = _Reading(plan, address, opened, arrivals, tee, on_progress, cancel, direct_target)
            if on_progress is not None:
                on_progress(0)
            reading.skip(resident_nbytes)
            _run(reading, max(1, min(n_threads, len(plan.chunks))), staging or Staging())
            error, reading.error = reading.error, None
            if error is not None:
                try:
                    raise error
                finally:
                    # Reachable from its own traceback it would keep the caller's frames, and their memory, for a while.
                    del error
    except BaseException as error:
        # The files may have been wrong before the first chunk or after the last.
        if arrivals is not None:
            arrivals.fail(error)
        raise


def _run(reading: _Reading, n_threads: int, staging: Scratch) -> None:
    """Work on this thread and others; returns when none of them works any more, whatever interrupts this one meanwhile."""
    readers, checkers = list[threading.Thread](), list[threading.Thread]()
    try:
        for number in range(CHECKERS if reading.checks_apart else 0):
            checkers.append(_started(threading.Thread(target=reading.check, name=f"check-{number}")))
        for number in range(1, n_threads):
            readers.append(_started(threading.Thread(target=reading.work, args=(staging,), name=f"read-{number}")))
    except RuntimeError:
        # The system has no more threads: those that there are will do.
        pass
    except BaseException as error:  # noqa: BLE001 - an interrupt, raised again once the threads have stopped
        reading.fail(error)
    reading.work(staging)
    _join(readers, reading)
    if reading.checks_apart:
        # This thread helps to check what is left.
        for _ in range(len(checkers) + 1):
            reading.checked()
        reading.check()
        _join(checkers, reading)


def _has_checksums(plan: ReadPlan) -> bool:
    return any(chunk.checksum is not None and chunk.codec == "raw" for chunk in plan.chunks)


def _started(thread: threading.Thread) -> threading.Thread:
    thread.start()
    return thread


def _join(threads: list[threading.Thread], reading: _Reading) -> None:
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:  # noqa: BLE001 - an interrupt, raised again once the threads have stopped
                reading.fail(error)
