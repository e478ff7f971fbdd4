"""A checkpoint that comes from elsewhere: first what says how it is laid out, then its bytes, to memory or to disk or to both.

:meth:`Fetch.open` asks an :class:`Origin` for configuration, tokenizer, indexes and headers, and lays them out in
``NAME.partial``, with data files of the right size and without data. From then on it is an index like any other: its plan is
read by the reader, and only the bytes of its chunks come from the origin's :class:`ChunkSource`.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from sllmdask.errors import Cancelled, DiskFull
from sllmdask.loader import libc
from sllmdask.loader.buffers import Buffer
from sllmdask.loader.format import CheckpointIndex, read_index
from sllmdask.loader.plan import ReadPlan, plan_reads
from sllmdask.loader.reader import ChunkSource, check
from sllmdask.loader.tee import Manifest, Partial, Resumed, Tee


class Origin(Protocol):
    """A place that a checkpoint can be fetched from."""

    def survey(self, cancel: threading.Event) -> Manifest:
        """What is there; the heads of all files are fetched."""

    def chunks(self, index: CheckpointIndex, partial: Partial, numbers: Sequence[int], cancel: threading.Event) -> ChunkSource:
        """A source of the bytes of `index`'s files, whose numbers in the manifest are `numbers`."""


class Fetch:
    """A checkpoint that is being fetched to `final`. `index` is that of its layout in `directory`, where small files are whole.

    One of: :meth:`chunks` and :meth:`tee`, for the reader to load it while the disk copy is made; :meth:`pull`, for the disk copy
    alone. Then :meth:`close`. Also a ``with`` block.
    """

    def __init__(self, origin: Origin, manifest: Manifest, partial: Partial, index: CheckpointIndex) -> None:
        self._origin, self._partial, self.manifest, self.index = origin, partial, manifest, index
        number_of = {file.name: number for number, file in enumerate(manifest.files)}
        self._numbers = [number_of[file.name] for file in index.files]
        self._resumed = partial.n_held > 0

    @classmethod
    def open(cls, origin: Origin, final: Path, *, cancel: threading.Event | None = None) -> Fetch | None:
        """Ask `origin` what it has; ``None`` if `final` is complete, after waiting for a process that was fetching it.

        Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`SourceUnreachable`, :class:`ConfigError`,
        :class:`Cancelled` and :class:`OSError`.
        """
        cancel = cancel or threading.Event()
        partial = Partial.open(final, cancel)
        if partial is None:
            return None
        try:
            manifest = origin.survey(cancel)
            partial.begin(manifest)
            return cls(origin, manifest, partial, read_index(partial.path))
        except BaseException:
            partial.close()
            raise

    @property
    def resumed(self) -> bool:
        """Whether an earlier fetch has left something, which does not come from elsewhere."""
        return self._resumed

    @property
    def directory(self) -> Path:
        """Where the files are: ``NAME.partial``, and `final` once it is complete."""
        return self._partial.path if self._partial.path.is_dir() else self._partial.final

    def chunks(self, cancel: threading.Event | None = None) -> ChunkSource:
        """What a reader of `index` takes its chunks from; what an earlier fetch has left comes from disk."""
        inner = self._origin.chunks(self.index, self._partial, self._numbers, cancel or threading.Event())
        return Resumed(inner, self._partial, self._numbers)

    def without_disk(self) -> None:
        """Make no disk copy: there is no room for one. What has arrived of one is given back."""
        self._partial.forget_data()

    def tee(self, plan: ReadPlan, buffer: Buffer) -> Tee:
        """What brings the chunks of `plan`, a plan of `index` that is read to `buffer`, to disk beside."""
        return Tee(self._partial, plan, self._numbers, self.chunks, buffer)

    def pull(
        self,
        chunk_size: int,
        *,
        n_threads: int = 4,
        on_progress: Callable[[int, int], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Path:
        """Bring the checkpoint to disk, through one chunk of scratch memory per thread; returns where it is.

        `on_progress` is called with the bytes so far and in all, never backwards. Raises as :meth:`open`, and :class:`DiskFull`.
        """
        cancel = cancel or threading.Event()
        plan = plan_reads(self.index, chunk_size)
        pulling = _Pull(plan, self._partial, self._numbers, on_progress, cancel)
        try:
            with self.chunks(cancel) as source, ThreadPoolExecutor(n_threads, thread_name_prefix="pull") as pool:
                for future in [pool.submit(pulling.work, source) for _ in range(n_threads)]:
                    future.result()
            return self._partial.complete(cancel)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._partial.remove()
            free = shutil.disk_usage(self._partial.final.parent).free
            raise DiskFull(str(self._partial.final), self.index.nbytes, free) from None

    def close(self, *, keep: bool = True) -> None:
        """Let go. What is not complete stays for the next fetch to go on with, unless `keep` is false. Twice does nothing."""
        if keep and not self._partial.given_up:
            self._partial.close()
        else:
            self._partial.remove()

    def leave(self) -> None:
        """Let go, but of nothing that is on disk: somebody uses the small files."""
        self._partial.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True)
class _Pull:
    """What the threads of one pull share."""

    plan: ReadPlan
    partial: Partial
    numbers: Sequence[int]
    on_progress: Callable[[int, int], None] | None
    cancel: threading.Event
    next: int = 0
    done: int = 0
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, source: ChunkSource) -> None:
        scratch = bytearray(self.plan.largest_read)
        try:
            while (number := self._take()) is not None:
                chunk, address = self.plan.chunks[number], libc.address_of_bytes(scratch)
                source.fetch(chunk, address)
                check(self.plan, number, address)
                if not self.partial.holds(self.numbers[chunk.file], chunk.offset, chunk.wanted):
                    self.partial.write(self.numbers[chunk.file], chunk.offset, chunk.wanted, address)
                with self.lock:
                    self.done += chunk.payload
                    if self.on_progress is not None:
                        self.on_progress(self.done, self.plan.payload)
        except BaseException:
            self.failed = True
            raise

    def _take(self) -> int | None:
        with self.lock:
            if self.cancel.is_set():
                raise Cancelled("the fetch was called off")
            if self.failed or self.next == len(self.plan.chunks):
                return None
            self.next += 1
            return self.next - 1
