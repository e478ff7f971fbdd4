"""Writes checkpoints of our own format (:mod:`sllmdask.loader.fast_format`).

The tensors pass through memory in pieces of one chunk: one thread gathers the next chunk while others compress, sum and write
those before it, so that a checkpoint of any size takes some tens of megabytes. What is written has another name until all of
it is on disk (:mod:`sllmdask.loader.atomic`).
"""

from __future__ import annotations

import errno
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from sllmdask import __version__
from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointError, CheckpointExists, DiskFull, TensorUnsupported
from sllmdask.loader import codec, kernels, libc
from sllmdask.loader.atomic import NewDirectory, sync
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.fast_format import CHUNK, INDEXES, format_index, found, is_dense, partition_name, place
from sllmdask.loader.format import (
    BITS,
    SHARDED,
    WEIGHTS,
    ChunkEntry,
    FileEntry,
    TensorEntry,
    execution_rank,
    read_weight_map,
    tensor_nbytes,
)
from sllmdask.loader.plan import BLOCK, round_up
from sllmdask.loader.sources import TensorSource, memory

#: Logical bytes of a partition, if no tensor is larger: small enough to be sent again whole, large enough to be few.
PARTITION = 8 * 1024**3
#: What `compress` may say, and the variants that it writes.
COMPRESS: Mapping[str, tuple[str, ...]] = {"no": ("raw",), "yes": ("split16",), "both": ("raw", "split16")}

#: What transformers and peft call pickled weights.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
#: Weights by the names that transformers, peft and the hub give them.
_NAMED_WEIGHTS = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|(pytorch_model|adapter_model)(-\d+-of-\d+)?\.bin"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json|tf_model\.h5|flax_model\.msgpack|rust_model\.ot"
)
#: Partitions of our own format.
_PARTITION = re.compile(r"data-\d{5,}(\.split16)?\.bin")
#: What belongs to a checkpoint beside its weights, at the places where transformers, peft and the hub put it.
_BESIDE = re.compile(
    r"([a-z0-9_]*_)?config\.json|params\.json"
    r"|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|[a-z0-9_.]*\.(tiktoken|model)"
    r"|chat_template\.(json|jinja)|additional_chat_templates/[^/]*\.jinja"
    r"|(configuration|modeling|tokenization|processing|image_processing)_[a-z0-9_]*\.py"
    r"|README\.md|USE_POLICY\.md|(LICENSE|NOTICE)(\.txt|\.md)?|\.gitattributes|\.cache/huggingface/.*"
)
#: Files that a refusal names.
_N_NAMED = 3
#: What a disk that is full, for this user or for this file, answers.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: bytes of tensors, and of all partitions of each variant on disk."""

    path: str
    n_tensors: int
    nbytes: int
    stored_nbytes: Mapping[str, int]


# --- the layout of what is written -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Piece:
    """A run of one tensor's bytes, at `begin` of a chunk."""

    source: TensorSource
    offset: int
    begin: int
    end: int


@dataclass(slots=True)
class _Job:
    """One chunk that is to be written."""

    number: int
    partition: int
    position: int
    nbytes: int
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def payload(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)


def _checked_nbytes(name: str, source: TensorSource) -> int:
    nbytes = tensor_nbytes(source.dtype, list(source.shape), lambda reason: TensorUnsupported(name, reason))
    if source.stride is not None:
        dense = len(source.stride) == len(source.shape) and is_dense(source.shape, source.stride)
        if not dense or nbytes == 0 or BITS[source.dtype] < 8:
            raise TensorUnsupported(name, f"stride {source.stride} does not fill shape {source.shape}")
    return nbytes


class _Layout:
    """Where each tensor goes: ``owners`` with bytes of their own in order, aliases behind the tensor whose bytes they share."""

    def __init__(self, tensors: Mapping[str, TensorSource], partition_nbytes: int) -> None:
        nbytes = {name: _checked_nbytes(name, source) for name, source in tensors.items()}
        rank = {name: execution_rank(name) for name in tensors}
        aliases: dict[str, list[str]] = {name: [] for name, source in tensors.items() if source.alias_of is None}
        for name, source in tensors.items():
            if source.alias_of is None:
                continue
            if source.alias_of not in aliases or nbytes[name] != nbytes[source.alias_of]:
                raise TensorUnsupported(
                    name, f"it cannot be an alias of {source.alias_of!r}, which has other bytes or is not there"
                )
            aliases[source.alias_of].append(name)
        owners = sorted(aliases, key=lambda name: min(rank[each] for each in (name, *aliases[name])))
        places, self.logical_nbytes = place((nbytes[name] for name in owners), partition_nbytes)
        self.nbytes = sum(nbytes[name] for name in owners)
        #: (name, source, partition, offset, bytes), as the index lists them.
        self.tensors = [
            (name, tensors[name], partition, offset, nbytes[name])
            for owner, (partition, offset) in zip(owners, places, strict=True)
            for name in (owner, *sorted(aliases[owner]))
        ]

    def jobs(self) -> Iterator[_Job]:
        """The chunks of all partitions in order."""
        number = 0
        for partition, logical_nbytes in enumerate(self.logical_nbytes):
            here = [
                (offset, nbytes, source)
                for _, source, at, offset, nbytes in self.tensors
                if at == partition and nbytes and source.alias_of is None
            ]
            first = 0
            for position in range(0, logical_nbytes, CHUNK):
                job = _Job(number, partition, position, min(CHUNK, logical_nbytes - position))
                end = position + job.nbytes
                while first < len(here) and here[first][0] + here[first][1] <= position:
                    first += 1
                for offset, nbytes, source in here[first:]:
                    if offset >= end:
                        break
                    begin = max(offset, position)
                    job.pieces.append(_Piece(source, begin - offset, begin - position, min(offset + nbytes, end) - position))
                number += 1
                yield job

    def entries(self, variant: str) -> list[TensorEntry]:
        return [
            TensorEntry(name, source.dtype, source.shape, partition_name(variant, partition), offset, nbytes, source.stride)
            for name, source, partition, offset, nbytes in self.tensors
        ]


# --- writing ---------------------------------------------------------------------------------------------------------


class _OutputFile:
    """One partition that is being written, directly where the file system can. Any thread may write."""

    def __init__(self, path: Path, nbytes: int | None) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644)
        self._direct: int | None = None
        try:
            if nbytes:
                self._allocate(nbytes)
            self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                self.close()
                raise

    def _allocate(self, nbytes: int) -> None:
        try:
            libc.allocate(self._fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise

    def write(self, data: Buffer, offset: int) -> None:
        done = 0
        direct = self._direct
        while done < data.size:
            try:
                n = os.pwrite(direct if direct is not None else self._fd, data[done:], offset + done)  # type: ignore[arg-type]
            except OSError as error:
                if direct is not None and error.errno == errno.EINVAL:
                    direct = None
                    continue
                raise
            done += n
            if done % BLOCK:
                direct = None

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd is not None:
                os.close(fd)


class _VariantWriter:
    """The partitions of one variant. Chunks are stored in order, though they may be ready in another."""

    def __init__(self, directory: Path, variant: str, layout: _Layout) -> None:
        self.variant = variant
        self._directory = directory
        self._layout = layout
        self._turn = threading.Condition()
        self._next = 0
        self._failed = False
        self._ends = [0] * len(layout.logical_nbytes)
        self._chunks: list[list[ChunkEntry]] = [[] for _ in layout.logical_nbytes]
        self._files: list[_OutputFile | None] = [None] * len(layout.logical_nbytes)

    def prepare(self) -> None:
        """Take the room on disk where it is known, so that a disk that is too small shows now."""
        if self.variant == "raw":
            for number in range(len(self._files)):
                self._file(number)

    def _file(self, number: int) -> _OutputFile:
        with self._turn:
            file = self._files[number]
            if file is None:
                nbytes = self._layout.logical_nbytes[number] if self.variant == "raw" else None
                file = _OutputFile(self._directory / partition_name(self.variant, number), nbytes)
                self._files[number] = file
            return file

    def _reserve(self, job: _Job, stored: int, checksum: int, name: str) -> int:
        """Where in the file the chunk goes; waits for the chunks before it to have been told."""
        with self._turn:
            self._turn.wait_for(lambda: self._next == job.number or self._failed)
            if self._failed:
                raise Cancelled("another chunk failed")
            offset = self._ends[job.partition]
            self._chunks[job.partition].append(ChunkEntry(job.position, job.nbytes, offset, stored, checksum, name))
            self._ends[job.partition] = offset + round_up(stored, BLOCK)
            self._next += 1
            self._turn.notify_all()
            return offset

    def fail(self) -> None:
        with self._turn:
            self._failed = True
            self._turn.notify_all()

    def store(self, job: _Job, data: Buffer, spare: Buffer) -> None:
        """Write a chunk's logical bytes `data`; `spare` is as large, and may be written to."""
        encoded = codec.encode_split16(data) if self.variant == "split16" else None
        name = "raw"
        stored = data.size
        # Less than a block saved is nothing saved: the file is padded to blocks.
        if encoded is not None and round_up(len(encoded), BLOCK) < data.size:
            name, stored = "split16", len(encoded)
            padded = spare[: round_up(stored, BLOCK)]
            padded[:stored] = np.frombuffer(encoded, np.uint8)
            padded[stored:] = 0
            data = padded
        offset = self._reserve(job, stored, kernels.xxh64(address_of(data), stored), name)
        self._file(job.partition).write(data, offset)

    def finish(self, creator: str, info: Mapping[str, str]) -> int:
        """Bring all to disk and write the index; returns the bytes of the partitions."""
        for number in range(len(self._files)):
            self._file(number).sync()
        files = [
            FileEntry(partition_name(self.variant, number), self._ends[number], 0, logical_nbytes, tuple(self._chunks[number]))
            for number, logical_nbytes in enumerate(self._layout.logical_nbytes)
        ]
        _write_file(
            self._directory / INDEXES[self.variant],
            format_index(self.variant, files, self._layout.entries(self.variant), creator=creator, info=info),
        )
        return sum(self._ends)

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()


def _write_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


class _Pipeline:
    """Chunks from their tensors to the files: gathered by the calling thread, stored by others."""

    def __init__(
        self, writers: list[_VariantWriter], n_threads: int, on_progress: Callable[[int], None] | None, cancel: threading.Event
    ) -> None:
        self._writers = writers
        self._n_threads = n_threads
        self._on_progress = on_progress
        self._cancel = cancel
        self._lock = threading.Lock()
        self._done = 0
        self._error: BaseException | None = None
        self._slots: queue.SimpleQueue[tuple[Buffer, Buffer]] = queue.SimpleQueue()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        for writer in self._writers:
            writer.fail()

    def _store(self, job: _Job, slot: tuple[Buffer, Buffer]) -> None:
        data, spare = slot
        try:
            for writer in self._writers:
                writer.store(job, data[: job.nbytes], spare)
            with self._lock:
                self._done += job.payload
                if self._on_progress is not None and self._error is None:
                    self._on_progress(self._done)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for all
            self._fail(error)
        finally:
            self._slots.put(slot)

    @staticmethod
    def _gather(job: _Job, data: Buffer) -> None:
        end = 0
        for piece in job.pieces:
            data[end : piece.begin] = 0
            piece.source.read(piece.offset, data[piece.begin : piece.end])
            end = piece.end
        data[end : job.nbytes] = 0

    def run(self, jobs: Iterator[_Job]) -> None:
        for _ in range(self._n_threads + 1):
            self._slots.put((memory(CHUNK), memory(CHUNK)))
        if self._on_progress is not None:
            self._on_progress(0)
        with ThreadPoolExecutor(self._n_threads, thread_name_prefix="write") as executor:
            try:
                for job in jobs:
                    slot = self._slots.get()
                    if self._error is not None:
                        break
                    if self._cancel.is_set():
                        raise Cancelled("the conversion was called off")
                    self._gather(job, slot[0])
                    executor.submit(self._store, job, slot)
            except BaseException as error:  # noqa: BLE001 - raised again below, when no thread writes any more
                self._fail(error)
        failure, self._error = self._error, None
        if failure is not None:
            try:
                raise failure
            finally:
                # Else it would be reachable from its own traceback, and keep the tensors' memory for a while.
                del failure


def _free_nbytes(path: Path) -> int | None:
    """Bytes that may still be written where `path` is or would be; ``None`` where nothing is counted, or read-only."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    counts = status.f_blocks > 0 and not status.f_flag & os.ST_RDONLY
    return status.f_bavail * status.f_frsize if counts else None


@contextmanager
def _named_errors(target: Path, needed: int) -> Iterator[None]:
    """What the system refuses while `target` is written, as an error that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            why = {errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "a file may not become so large here"}
            reason = why.get(error.errno or 0, "the disk is full")
            raise DiskFull(str(target), needed, _free_nbytes(target) or 0, reason) from None
        reason, advice = error.strerror or str(error), ""
        if isinstance(error.filename, str | bytes):
            where = Path(os.fsdecode(error.filename))
            # Beside the target lie names that only the writer knows.
            where = target.parent if where.parent == target.parent and where != target else where
            reason += f" ({str(where)!r})"
            advice = " Choose a directory that can be written to." if target.is_relative_to(where) else ""
        raise CheckpointError(f"The checkpoint {str(target)!r} was not written: {reason}.{advice}") from error


def written_names(compress: str, files_beside: Collection[str]) -> set[str]:
    """The names that are written for `compress` with these `files_beside`, but for the partitions."""
    return {*files_beside, *(INDEXES[variant] for variant in COMPRESS[compress])}


def _weights_of(directory: Path) -> set[str]:
    """The files that the lists of shards in `directory` name, as far as they can be read."""
    shards = set[str]()
    for name, suffix in ((SHARDED, ".safetensors"), ("pytorch_model.bin.index.json", ".bin")):
        try:
            shards |= set(read_weight_map(directory / name, suffix).values())
        except CheckpointError:
            continue
    return shards


def _foreign(directory: Path, written: Collection[str]) -> Iterator[str]:
    """What is in the checkpoint `directory` and no part of one, nor among the names that are to be `written`."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    there = found(directory)
    known = {*written, *(INDEXES[variant] for variant in there), *_weights_of(directory)}
    for parent, subdirectories, names in os.walk(directory, onerror=refuse):
        links = [name for name in subdirectories if os.path.islink(os.path.join(parent, name))]
        subdirectories.sort()
        for name in sorted(names + links):
            path = Path(parent, name).relative_to(directory).as_posix()
            if path in known or _NAMED_WEIGHTS.fullmatch(path) or _BESIDE.fullmatch(path):
                continue
            if not (there and _PARTITION.fullmatch(path)):
                yield path


def refuse_target(target: Path, overwrite: bool, written: Collection[str] = ()) -> None:
    """Raises :class:`CheckpointExists` where something is in the way that may not or must not be replaced.

    What must not be is anything but a checkpoint, and one with files that are no part of it and not among the names that are to
    be `written`. :class:`CheckpointError` where it cannot be read.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointExists(str(target), "something is there already; choose another name, or have it overwritten")
    with _named_errors(target, 0):
        is_checkpoint = target.is_dir() and (
            not any(target.iterdir()) or found(target) or any((target / name).exists() for name in (*WEIGHTS, *PICKLED))
        )
        if not is_checkpoint:
            raise CheckpointExists(str(target), "what is there is not a checkpoint, so it is not overwritten")
        foreign = list(islice(_foreign(target, written), _N_NAMED + 1))
    if foreign:
        named = ", ".join(map(repr, foreign[:_N_NAMED])) + (" and others" if len(foreign) > _N_NAMED else "")
        reason = f"it has files that are no part of a checkpoint, and would be lost: {named}"
        raise CheckpointExists(str(target), f"{reason}. Move them away, or choose another directory")


def _write_beside(directory: Path, files_beside: Mapping[str, str | os.PathLike[str] | bytes]) -> None:
    for name, content in files_beside.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise CheckpointCorrupt(name, None, "it is not a name inside the checkpoint")
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise CheckpointCorrupt(name, None, "it has the name of a file of the format")
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
        sync(target)


def write_checkpoint(
    tensors: Mapping[str, TensorSource],
    target: str | os.PathLike[str],
    *,
    files_beside: Mapping[str, str | os.PathLike[str] | bytes] | None = None,
    compress: str = "no",
    overwrite: bool = False,
    partition_nbytes: int = PARTITION,
    info: Mapping[str, str] | None = None,
    creator: str = f"sllmdask {__version__}",
    n_threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> Written:
    """Write `tensors` as a checkpoint of our own format to the directory `target`, which appears when all of it is on disk.

    `compress`: ``no`` for the raw variant, ``yes`` for ``split16``, ``both``. `files_beside` are written as well: contents, or a
    file to copy, by name. `overwrite` replaces a checkpoint, in one step where the system can; nothing but a checkpoint is
    replaced, and none with other files in it, which would be lost. `on_progress` is told the tensors' bytes that are done, from
    any thread, never backwards. Memory: two chunks for each of `n_threads` and one more, and what the tensors' sources and the
    codec take.

    Raises :class:`TensorUnsupported`, :class:`CheckpointExists`, :class:`DiskFull`, :class:`Cancelled`, and what the tensors'
    sources raise; :class:`CheckpointError` with the system's reason where `target` cannot be written for another one. Whatever it
    raises, nothing is left, and what was at `target` is as it was.
    """
    target = Path(target).absolute()
    wanted = COMPRESS[compress]
    names = written_names(compress, files_beside or {})
    refuse_target(target, overwrite, names)
    layout = _Layout(tensors, max(partition_nbytes, CHUNK))
    needed = sum(layout.logical_nbytes) * len(wanted)
    n_threads = n_threads or min(4, os.cpu_count() or 1)
    with _named_errors(target, needed):
        free = _free_nbytes(target)
        if "raw" in wanted and free is not None and free < sum(layout.logical_nbytes):
            raise DiskFull(str(target), needed, free)
        with NewDirectory(target) as new:
            with ExitStack() as open_files:
                writers = []
                for variant in wanted:
                    writers.append(_VariantWriter(new.path, variant, layout))
                    open_files.callback(writers[-1].close)
                    writers[-1].prepare()
                _Pipeline(writers, n_threads, on_progress, cancel or threading.Event()).run(layout.jobs())
                stored = {writer.variant: writer.finish(creator, dict(info or {})) for writer in writers}
            _write_beside(new.path, files_beside or {})
            if overwrite:
                refuse_target(target, overwrite, names)  # again: somebody may have put files there meanwhile
            try:
                new.publish(replace=overwrite)
            except FileExistsError as error:
                raise CheckpointExists(str(target), f"another writer was faster: {error.strerror}") from None
    return Written(str(target), len(tensors), layout.nbytes, stored)
