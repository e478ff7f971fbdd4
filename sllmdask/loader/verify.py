"""Finds all that is wrong with the files of a checkpoint."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointNotFound, CheckpointTooNew
from sllmdask.loader import kernels
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.fast_format import CHUNK, INDEXES, MAX_INDEX, check_sizes, found, parse_index, tensors_in
from sllmdask.loader.format import (
    SHARDED,
    SINGLE,
    CheckpointIndex,
    ChunkEntry,
    FileEntry,
    TensorEntry,
    read_header,
    read_index,
    read_small,
    read_weight_map,
)
from sllmdask.loader.sources import OpenFiles, memory, read_all, read_chunk


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with `file`, and the tensors whose bytes that concerns; none where it concerns the file as such."""

    file: str
    tensors: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What :func:`verify` found: `nbytes` were read from disk, and each of `problems` is one place that is wrong."""

    path: str
    format: str
    variants: tuple[str, ...]
    n_tensors: int
    nbytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Task:
    """Bytes ``[offset, offset + nbytes)`` of a file that are to be read; with a chunk, that are to be summed."""

    index: CheckpointIndex
    file: FileEntry
    offset: int
    nbytes: int
    chunk: ChunkEntry | None = None
    #: XXH64 of the logical bytes, where another variant has them raw.
    expected: int | None = None


def _problem_of(
    error: CheckpointCorrupt | CheckpointNotFound | CheckpointTooNew, file: str, tensors: Iterable[str] = ()
) -> Problem:
    """`error` as a problem of `file`, or of the file that it names, and of the tensor that it names, or else of `tensors`."""
    if isinstance(error, CheckpointCorrupt):
        return Problem(error.file, (error.tensor,) if error.tensor else tuple(tensors), error.reason)
    return Problem(file, tuple(tensors), error.reason if isinstance(error, CheckpointNotFound) else error.message)


def _tasks_of(index: CheckpointIndex, raw: Mapping[tuple[str, int, int], int]) -> Iterator[_Task]:
    for file in index.files:
        for chunk in file.chunks:
            expected = raw.get((file.name.partition(".")[0], chunk.position, chunk.nbytes))
            yield _Task(index, file, chunk.offset, chunk.stored, chunk, expected)
        if not file.chunks:
            for offset in range(0, file.nbytes, CHUNK):
                yield _Task(index, file, offset, min(CHUNK, file.nbytes - offset))


def _verify_task(task: _Task, files: OpenFiles, buffers: tuple[Buffer, Buffer]) -> Problem | None:
    path = task.index.path(task.file.name)
    if task.chunk is None:
        begin, end = task.offset, task.offset + task.nbytes
    else:
        begin, end = task.chunk.position, task.chunk.position + task.chunk.nbytes
    try:
        if task.chunk is None:
            read_all(files.fd(task.file.name), buffers[0][: task.nbytes], task.offset, path, None)
            return None
        logical = read_chunk(files, task.index, task.file, task.chunk, buffers)
        if task.expected is None or kernels.xxh64(address_of(logical), logical.size) == task.expected:
            return None
        reason = f"bytes [{task.offset}, {task.offset + task.nbytes}) decode to others than those of the raw variant"
    except (CheckpointCorrupt, CheckpointNotFound) as error:
        reason = error.reason
    return Problem(path, tensors_in(task.index.tensors, task.file.name, begin, end), reason)


def _fast_indexes(path: Path, problems: list[Problem]) -> list[CheckpointIndex]:
    """The index of each variant, as far as it can be made out, with the partitions that are there."""
    indexes = []
    for variant in found(path):
        name = INDEXES[variant]
        try:
            index = parse_index(read_small(str(path), name, MAX_INDEX), str(path / name), variant)
        except (CheckpointCorrupt, CheckpointNotFound, CheckpointTooNew) as error:
            problems.append(_problem_of(error, str(path / name)))
            continue
        there = []
        for file in index.files:
            here = tensors_in(index.tensors, file.name, 0, file.logical_nbytes)
            try:
                check_sizes(replace(index, files=(file,)))
            except CheckpointNotFound as error:
                problems.append(_problem_of(error, index.path(file.name), here))
                continue
            except CheckpointCorrupt as error:
                # Which chunks that concerns shows when they are read.
                problems.append(Problem(error.file, (), error.reason))
            there.append(file)
        indexes.append(replace(index, files=tuple(there)))
    return indexes


def _safetensors_index(path: Path, problems: list[Problem]) -> CheckpointIndex | None:
    """The index of what can be made out of safetensors files; shards are looked at one by one."""
    if (path / SINGLE).exists() or not (path / SHARDED).exists():
        try:
            return read_index(path)
        except CheckpointCorrupt as error:
            problems.append(_problem_of(error, str(path)))
            return None
    try:
        weight_map = read_weight_map(path / SHARDED)
    except (CheckpointCorrupt, CheckpointNotFound) as error:
        problems.append(_problem_of(error, str(path / SHARDED)))
        return None
    files, tensors = [], list[TensorEntry]()
    for shard in sorted(set(weight_map.values())):
        named = [name for name, file in weight_map.items() if file == shard]
        try:
            entry, inside = read_header(str(path), shard)
        except (CheckpointCorrupt, CheckpointNotFound) as error:
            # A header that is wrong in one place is of no use for the tensors either that it is right about.
            where = f"tensor {error.tensor!r}: " if isinstance(error, CheckpointCorrupt) and error.tensor else ""
            problems.append(Problem(str(path / shard), tuple(named), where + error.reason))
            continue
        files.append(entry)
        tensors += inside
        missing = tuple(sorted(set(named) - {tensor.name for tensor in inside}))
        if missing:
            problems.append(Problem(str(path / shard), missing, "the index names them, but the shard does not hold them"))
    if not problems:
        try:
            return read_index(path)
        except CheckpointCorrupt as error:
            problems.append(_problem_of(error, str(path)))
    return CheckpointIndex(str(path), tuple(tensors), tuple(files))


def _layout_of(index: CheckpointIndex) -> list[tuple[object, ...]]:
    """What two variants of one checkpoint have in common."""
    return [(t.name, t.dtype, t.shape, t.stride, t.offset, t.nbytes, t.file.partition(".")[0]) for t in index.tensors]


def verify(
    path: str | os.PathLike[str],
    on_progress: Callable[[int], None] | None = None,
    n_threads: int = 4,
    *,
    cancel: threading.Event | None = None,
) -> Verified:
    """Read every byte of the checkpoint at `path`, all its variants, and tell all that is wrong.

    Our own format: each chunk's checksum, that what is compressed can be decoded, and that it decodes to what the raw variant
    has. safetensors, which has no checksums: that the headers are right and the bytes can be read. `on_progress` is told the
    bytes that were read, from any thread, never backwards.

    Raises :class:`CheckpointNotFound` where there is no checkpoint at all, and :class:`Cancelled`; all else is in the report.
    """
    path = Path(path).absolute()
    cancel = cancel or threading.Event()
    problems: list[Problem] = []
    there = found(path) if path.is_dir() else ()
    if there:
        indexes = _fast_indexes(path, problems)
    else:
        single = _safetensors_index(path, problems)
        indexes = [] if single is None else [single]
    if len(indexes) == 2 and _layout_of(indexes[0]) != _layout_of(indexes[1]):
        problems.append(Problem(str(path / INDEXES[there[1]]), (), "its tensors are not those of the raw variant"))
    raw = {
        (file.name.partition(".")[0], chunk.position, chunk.nbytes): chunk.checksum
        for index in indexes[:-1]
        for file in index.files
        for chunk in file.chunks
    }
    tasks = [task for index in indexes for task in _tasks_of(index, raw)]

    lock = threading.Lock()
    buffers: queue.SimpleQueue[tuple[Buffer, Buffer]] = queue.SimpleQueue()
    size = max((chunk.nbytes for index in indexes for file in index.files for chunk in file.chunks), default=CHUNK)
    for _ in range(n_threads):
        buffers.put((memory(max(size, CHUNK)), memory(max(size, CHUNK))))
    done = 0

    def work(task: _Task, files: OpenFiles) -> Problem | None:
        nonlocal done
        if cancel.is_set():
            return None
        pair = buffers.get()
        try:
            problem = _verify_task(task, files, pair)
        finally:
            buffers.put(pair)
        with lock:
            done += task.nbytes
            if on_progress is not None:
                on_progress(done)
        return problem

    if on_progress is not None:
        on_progress(0)
    with ExitStack() as opened, ThreadPoolExecutor(n_threads, thread_name_prefix="verify") as executor:
        files_of = {id(index): opened.enter_context(OpenFiles(index)) for index in indexes}
        results = executor.map(lambda task: work(task, files_of[id(task.index)]), tasks)
        problems += [problem for problem in results if problem is not None]
    if cancel.is_set():
        raise Cancelled("the verification was called off")
    n_tensors = len({tensor.name for index in indexes for tensor in index.tensors})
    kind = "fast" if there else "safetensors"
    return Verified(str(path), kind, there or ("raw",), n_tensors, sum(task.nbytes for task in tasks), tuple(problems))
