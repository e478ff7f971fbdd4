"""The disk copy of a checkpoint that comes from elsewhere: filled while its bytes pass by, seen when it is complete.

The bytes go to ``NAME.partial``, at the offsets that they have in the files, and a journal beside them says which have arrived,
with a checksum of each range. After a kill, or a loss of power, the journal is read again and a range is used if its bytes have
that checksum. A complete copy is synced and then renamed to ``NAME``. One process at a time fills it: it holds a lock on the
directory, which ends with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import queue
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader import libc
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.plan import BLOCK, ChunkRead, ReadPlan, round_up
from sllmdask.loader.reader import ChunkSource, check

logger = logging.getLogger(__name__)

_STATE, JOURNAL = ".fetch.json", ".fetch.ranges"
#: File number, offset, nbytes, XXH64 of the range; then the CRC-32 of these.
_RANGE, _CRC = struct.Struct("<IQQQ"), struct.Struct("<I")
#: Bytes of one read while a file is hashed.
_HASH_READ = 4 * 1024**2
#: Seconds between two looks at a lock that another process holds.
_LOCK_POLL_S = 0.05


def checksum(address: int, nbytes: int) -> int:
    """XXH64, seed 0, of the bytes at `address`."""
    # Here, because numba takes longer to import than many a checkpoint to fetch.
    from sllmdask.loader.kernels import xxh64

    return xxh64(address, nbytes)


@dataclass(frozen=True, slots=True)
class FarFile:
    """One file of a checkpoint that is elsewhere, of `nbytes` bytes; `head` are its first ones, all of them if it is small.

    `modified_ns` is its time of change there. `tag` is a text that changes with its bytes, as far as the source tells one;
    `sha256` is of the whole file.
    """

    name: str
    nbytes: int
    head: bytes
    modified_ns: int
    tag: str = ""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a checkpoint that is elsewhere; `revision` changes when any of them does, as far as the source tells."""

    source: str
    revision: str
    files: tuple[FarFile, ...]


def check_name(source: str, name: str) -> None:
    """Raise :class:`CheckpointCorrupt` unless `name` is that of a file inside a directory, told by `source`."""
    parts = PurePosixPath(name)
    bad = parts.is_absolute() or ".." in parts.parts or "\\" in name or str(parts) != name or name == "."
    if bad or not name.isprintable() or name in (_STATE, JOURNAL) or len(name) > 1024:
        raise CheckpointCorrupt(source, None, f"{name!r} is not the name of a file inside a directory")


# --- the directory ---------------------------------------------------------------------------------------------------


class Partial:
    """``NAME.partial``, locked. :meth:`open`, then :meth:`begin`; then reads and writes by any thread; at last one of
    :meth:`complete`, :meth:`remove` and :meth:`close`, which leaves what has arrived for the next to go on with.
    """

    def __init__(self, path: Path, final: Path, lock: int) -> None:
        self.path, self.final = path, final
        self._lock_fd: int | None = lock
        self._manifest: Manifest | None = None
        self._mutex = threading.Lock()
        self._fds: dict[int, int] = {}
        self._journal: int | None = None
        self._held: dict[tuple[int, int, int], int] = {}
        #: Whether there is nothing in it that another fetch could go on with.
        self.given_up = False

    @classmethod
    def open(cls, final: Path, cancel: threading.Event) -> Partial | None:
        """Lock what is to become `final`; ``None`` once `final` is there. Waits while another process fills it.

        Raises :class:`Cancelled` and :class:`OSError`.
        """
        path = final.with_name(final.name + ".partial")
        while not final.is_dir():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if os.path.lexists(path) and not path.is_dir():
                    raise
                continue  # it was there, and was renamed or removed before it could be seen to be a directory
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # It may have been renamed or removed between the two calls.
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return cls(path, final, fd)
            except FileNotFoundError:
                pass
            except BlockingIOError:
                if cancel.wait(_LOCK_POLL_S):
                    os.close(fd)
                    raise Cancelled("the fetch was called off") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        return None

    def begin(self, manifest: Manifest) -> None:
        """Lay out the files of `manifest`: small ones whole, of the others the head and the size. Keeps what has arrived of it.

        Raises :class:`CheckpointCorrupt` for a file that cannot be what it claims, and :class:`OSError`.
        """
        for file in manifest.files:
            check_name(manifest.source, file.name)
        state = {
            "version": 1,
            "source": manifest.source,
            "revision": manifest.revision,
            "files": [[file.name, file.nbytes, file.tag, file.sha256] for file in manifest.files],
        }
        if self._state() != state:
            self._clear()
            (self.path / _STATE).write_text(json.dumps(state), encoding="utf-8")
        self._manifest = manifest
        self._held = self._read_journal(manifest)
        self._journal = os.open(self.path / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        for number, file in enumerate(manifest.files):
            (self.path / file.name).parent.mkdir(parents=True, exist_ok=True)
            fd = self._fds[number] = os.open(self.path / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, file.nbytes)
            except (OSError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.EFBIG, errno.EINVAL):
                    raise
                raise CheckpointCorrupt(file.name, None, f"no file can have the {file.nbytes} bytes that it claims") from None
            _write_all(fd, file.head, 0)
            # Before any byte of data: what is made of it, a fingerprint say, must not change as the data arrives.
            os.utime(fd, ns=(file.modified_ns, file.modified_ns))

    # --- ranges, by any thread -------------------------------------------------------------------------------------------

    @property
    def n_held(self) -> int:
        """Ranges that have arrived."""
        with self._mutex:
            return len(self._held)

    def holds(self, file: int, offset: int, nbytes: int) -> bool:
        """Whether this range of file number `file` of the manifest has arrived."""
        with self._mutex:
            return (file, offset, nbytes) in self._held

    def read(self, file: int, offset: int, nbytes: int, address: int) -> bool:
        """Bring a range that has arrived to `address`; false, and it has not arrived after all, if its bytes are not the same."""
        key = (file, offset, nbytes)
        with self._mutex:
            expected = self._held.get(key)
        if expected is None:
            return False
        if self.pread(file, offset, nbytes, address) and checksum(address, nbytes) == expected:
            return True
        with self._mutex:
            self._held.pop(key, None)
        return False

    def write(self, file: int, offset: int, nbytes: int, address: int) -> None:
        """Put a range on disk and note it. Raises :class:`OSError`."""
        libc.pwrite(self._fds[file], address, nbytes, offset)
        self.note(file, offset, nbytes, address)

    def note(self, file: int, offset: int, nbytes: int, address: int) -> None:
        """Note a range that is on disk; the same bytes are at `address`."""
        record = _RANGE.pack(file, offset, nbytes, found := checksum(address, nbytes))
        with self._mutex:
            if self._journal is not None and self._held.get((file, offset, nbytes)) != found:
                self._held[file, offset, nbytes] = found
                # One call: of two threads' records, neither is torn by the other, and a kill tears at most the last.
                os.write(self._journal, record + _CRC.pack(zlib.crc32(record)))

    def pread(self, file: int, offset: int, nbytes: int, address: int) -> bool:
        """Bring a range to `address`, arrived or not; false if the file ends before it."""
        done = 0
        while done < nbytes:
            n = libc.pread(self._fds[file], address + done, nbytes - done, offset + done)
            if n == 0:
                return False
            done += n
        return True

    def put(self, file: int, offset: int, data: memoryview) -> None:
        """Put bytes on disk that are noted later, by :meth:`note`, as what they are part of. Raises :class:`OSError`."""
        _write_all(self._fds[file], data, offset)

    # --- the end ---------------------------------------------------------------------------------------------------------

    def complete(self, cancel: threading.Event) -> Path:
        """Every range has arrived: check what has a SHA-256, sync, and make it be seen. Returns where it is.

        Raises :class:`CheckpointCorrupt`, after which nothing of it is used again, :class:`Cancelled` and :class:`OSError`.
        """
        assert self._manifest is not None
        hashed = [number for number, file in enumerate(self._manifest.files) if file.sha256]
        try:
            with ThreadPoolExecutor(2, thread_name_prefix="sha256") as pool:
                list(pool.map(lambda number: self._check_sha256(number, cancel), hashed))
        except CheckpointCorrupt:
            self.remove()
            raise
        for number, file in enumerate(self._manifest.files):
            os.utime(self._fds[number], ns=(file.modified_ns, file.modified_ns))
            os.fsync(self._fds[number])
        for directory in {(self.path / file.name).parent for file in self._manifest.files} | {self.path}:
            _sync_directory(directory)
        try:
            self.path.rename(self.final)
        except OSError:
            if not self.final.is_dir():
                raise
            # Somebody has put the same model there by hand.
            self.remove()
            return self.final
        _sync_directory(self.final.parent)
        for name in (_STATE, JOURNAL):
            (self.final / name).unlink(missing_ok=True)
        self.close()
        return self.final

    def forget_data(self) -> None:
        """Give the disk back what has arrived; heads and small files stay, for a load that goes on without it."""
        assert self._manifest is not None
        with self._mutex:
            self.given_up = True
            self._held.clear()
            if self._journal is not None:
                (self.path / JOURNAL).unlink(missing_ok=True)
                os.close(self._journal)
                self._journal = None
        for number, file in enumerate(self._manifest.files):
            start = round_up(len(file.head), BLOCK)
            if start < file.nbytes:
                with contextlib.suppress(OSError):
                    libc.punch_hole(self._fds[number], start, file.nbytes - start)

    def remove(self) -> None:
        """Give up: nothing is left."""
        if self._lock_fd is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of it; doing it twice does nothing."""
        if self._manifest is None and self._lock_fd is not None:
            with contextlib.suppress(OSError):
                # Empty, unless an earlier fetch has left something.
                self.path.rmdir()
        with self._mutex:
            fds = [*self._fds.values()] + [fd for fd in (self._journal, self._lock_fd) if fd is not None]
            self._fds, self._journal, self._lock_fd = {}, None, None
        for fd in fds:
            os.close(fd)

    # --- inside ----------------------------------------------------------------------------------------------------------

    def _state(self) -> Any:
        try:
            return json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _clear(self) -> None:
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _read_journal(self, manifest: Manifest) -> dict[tuple[int, int, int], int]:
        try:
            text = (self.path / JOURNAL).read_bytes()
        except FileNotFoundError:
            return {}
        held, size, good = dict[tuple[int, int, int], int](), _RANGE.size + _CRC.size, 0
        for start in range(0, len(text) - size + 1, size):
            record = text[start : start + _RANGE.size]
            if _CRC.unpack_from(text, start + _RANGE.size)[0] != zlib.crc32(record):
                break
            file, offset, nbytes, found = _RANGE.unpack(record)
            if file < len(manifest.files) and offset + nbytes <= manifest.files[file].nbytes:
                held[file, offset, nbytes] = found
            good = start + size
        # What comes behind a torn record would never be read.
        os.truncate(self.path / JOURNAL, good)
        return held

    def _check_sha256(self, number: int, cancel: threading.Event) -> None:
        assert self._manifest is not None
        file, digest, scratch = self._manifest.files[number], hashlib.sha256(), bytearray(_HASH_READ)
        offset = 0
        while n := os.preadv(self._fds[number], [scratch], offset):
            if cancel.is_set():
                raise Cancelled("the fetch was called off")
            digest.update(memoryview(scratch)[:n])
            offset += n
        if digest.hexdigest() != file.sha256:
            reason = f"its SHA-256 is {digest.hexdigest()}, and {self._manifest.source} says that it is {file.sha256}"
            raise CheckpointCorrupt(file.name, None, reason)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what is read comes by here --------------------------------------------------------------------------------------


class Resumed:
    """A :class:`ChunkSource` that takes what `partial` holds from there and the rest from `inner`."""

    def __init__(self, inner: ChunkSource, partial: Partial, numbers: Sequence[int]) -> None:
        self._inner, self._partial, self._numbers = inner, partial, numbers

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inner.__exit__(kind, error, trace)

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        """Bring the wanted bytes of `chunk` to `address`."""
        if not self._partial.read(self._numbers[chunk.file], chunk.offset, chunk.wanted, address):
            self._inner.fetch(chunk, address)


class Tee:
    """Called by the reader with each chunk's checked stored bytes; own threads bring them to disk.

    A raw chunk that has reached its place in `buffer` is written from there. Another one is copied to one of `n_slots` pieces of
    scratch memory; where none is free, because the disk is slow, it is left for :meth:`finish`, which writes raw ones from
    `buffer` and fetches compressed ones once more. A disk that fails, or is full, ends the disk copy and not the load.

    `buffer` must hold the plan's bytes until :meth:`finish` or :meth:`close` has returned. Also a ``with`` block.
    """

    def __init__(
        self,
        partial: Partial,
        plan: ReadPlan,
        numbers: Sequence[int],
        again: Callable[[], ChunkSource],
        buffer: Buffer,
        *,
        n_threads: int = 2,
        n_slots: int = 4,
    ) -> None:
        self._partial, self._plan, self._numbers, self._again, self._buffer = partial, plan, numbers, again, buffer
        self._base = address_of(buffer)
        self._failed = partial.given_up
        self._mutex = threading.Lock()
        #: Chunk, address, and the slot that it is in.
        self._queue: queue.SimpleQueue[tuple[ChunkRead, int, bytearray | None] | None] = queue.SimpleQueue()
        self._n_slots_left = n_slots
        self._slots: list[bytearray] = []
        self._threads = [threading.Thread(target=self._work, name=f"tee-{i}", daemon=True) for i in range(n_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def failed(self) -> bool:
        """Whether the disk copy was given up."""
        return self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, chunk: ChunkRead, address: int) -> None:
        """Take the ``chunk.wanted`` stored bytes at `address`; returns soon, and needs them no more."""
        if self._failed or self._has(chunk):
            return
        if chunk.codec == "raw" and address == self._base + chunk.position:
            self._queue.put((chunk, address, None))
        elif (slot := self._slot(chunk.wanted)) is not None:
            target = libc.address_of_bytes(slot)
            libc.copy(target, address, chunk.wanted)
            self._queue.put((chunk, target, slot))

    def finish(self, cancel: threading.Event | None = None) -> Path | None:
        """Bring what is missing to disk and complete it, after the reader has returned; ``None`` if the disk failed.

        Raises :class:`CheckpointCorrupt`, what the source raises where bytes must come once more, and :class:`Cancelled`.
        """
        cancel = cancel or threading.Event()
        self._stop()
        with contextlib.ExitStack() as stack:
            source: ChunkSource | None = None
            scratch = bytearray(self._plan.largest_read)
            for number, chunk in enumerate(self._plan.chunks):
                if self._failed:
                    break
                if cancel.is_set():
                    raise Cancelled("the fetch was called off")
                if self._has(chunk):
                    continue
                address = self._base + chunk.position
                if chunk.codec != "raw":
                    source = source or stack.enter_context(self._again())
                    address = libc.address_of_bytes(scratch)
                    source.fetch(chunk, address)
                    check(self._plan, number, address)
                self._write(chunk, address)
        if not self._failed:
            try:
                return self._partial.complete(cancel)
            except OSError as error:
                self._give_up(error)
        return None

    def close(self) -> None:
        """Stop; no thread touches `buffer` any more. What is on disk stays for the next fetch to go on with."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._stop()

    def _stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _has(self, chunk: ChunkRead) -> bool:
        return self._partial.holds(self._numbers[chunk.file], chunk.offset, chunk.wanted)

    def _slot(self, nbytes: int) -> bytearray | None:
        with self._mutex:
            if self._slots:
                return self._slots.pop()
            if self._n_slots_left == 0:
                return None
            self._n_slots_left -= 1
        return bytearray(max(nbytes, self._plan.largest_read))

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            chunk, address, slot = job
            if not self._failed:
                self._write(chunk, address)
            if slot is not None:
                with self._mutex:
                    self._slots.append(slot)

    def _write(self, chunk: ChunkRead, address: int) -> None:
        try:
            self._partial.write(self._numbers[chunk.file], chunk.offset, chunk.wanted, address)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with self._mutex:
            if self._failed:
                return
            self._failed = True
        # As text: whoever keeps what was logged must not keep the traceback, and with it the buffer.
        logger.warning("no disk copy path=%s cause=%s; the load goes on from memory", self._partial.final, str(error))
        self._partial.forget_data()
