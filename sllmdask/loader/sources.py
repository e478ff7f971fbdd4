"""Where the bytes of a tensor come from while it is written: memory, or the files of another checkpoint."""

from __future__ import annotations

import bisect
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound
from sllmdask.loader import codec, kernels, libc
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.fast_format import tensors_in
from sllmdask.loader.format import CheckpointIndex, ChunkEntry, FileEntry, TensorEntry
from sllmdask.loader.plan import BLOCK


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor that is to be written.

    `dtype` is a key of ``format.BITS``, `stride` is in elements and dense, or ``None`` for contiguous. ``read(offset, target)``
    fills the uint8 array `target` with the tensor's bytes from `offset` on, in the order of its storage; it is called from one
    thread, for each byte once, in order. A tensor that shares all its bytes with another names it as `alias_of`, and is not read.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, Buffer], None]
    stride: tuple[int, ...] | None = None
    alias_of: str | None = None


def from_bytes(
    dtype: str,
    shape: tuple[int, ...],
    data: Any,
    stride: tuple[int, ...] | None = None,
    alias_of: str | None = None,
) -> TensorSource:
    """A tensor whose bytes are in memory, in a contiguous buffer."""
    view = memoryview(data)
    array = np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.empty(0, np.uint8)

    def read(offset: int, target: Buffer) -> None:
        target[:] = array[offset : offset + target.size]

    return TensorSource(dtype, shape, read, stride, alias_of)


def memory(nbytes: int) -> Buffer:
    """`nbytes` of memory on pages of its own, as direct writes want it."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def read_all(fd: int, target: Buffer, offset: int, path: str, tensor: str | None) -> None:
    done = 0
    while done < target.size:
        try:
            n = os.preadv(fd, [target[done:]], offset + done)  # type: ignore[list-item]
        except OSError as error:
            raise CheckpointCorrupt(path, tensor, f"it cannot be read at byte {offset + done}: {error.strerror}") from None
        if n == 0:
            size, end = os.fstat(fd).st_size, offset + target.size
            raise CheckpointCorrupt(path, tensor, f"it is truncated: it ends at byte {size}, before {end}")
        done += n


class OpenFiles:
    """Files that are opened when they are first read, and closed at the end of a ``with`` block."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                try:
                    self._fds[file] = libc.open_buffered(self._index.path(file))
                except OSError as error:
                    raise CheckpointNotFound(self._index.directory, f"{file} cannot be read: {error.strerror}") from None
            return self._fds[file]

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)


def read_chunk(
    files: OpenFiles, index: CheckpointIndex, file: FileEntry, chunk: ChunkEntry, buffers: tuple[Buffer, Buffer]
) -> Buffer:
    """The logical bytes of `chunk`, in one of the two buffers; raises :class:`CheckpointCorrupt` if its checksum is another."""
    path = index.path(file.name)
    stored, logical = buffers

    def corrupt(reason: str) -> CheckpointCorrupt:
        here = tensors_in(index.tensors, file.name, chunk.position, chunk.position + chunk.nbytes)
        where = f"bytes [{chunk.offset}, {chunk.offset + chunk.stored})"
        return CheckpointCorrupt(path, here[0] if here else None, f"{where}: {reason}")

    stored = stored[: chunk.stored]
    try:
        read_all(files.fd(file.name), stored, chunk.offset, path, None)
    except CheckpointCorrupt as error:
        raise corrupt(error.reason) from None
    checksum = kernels.xxh64(address_of(stored), chunk.stored)
    if checksum != chunk.checksum:
        raise corrupt(f"their checksum is {checksum:016x}, not {chunk.checksum:016x}")
    if chunk.codec == "raw":
        return stored
    logical = logical[: chunk.nbytes]
    try:
        codec.decode_split16(address_of(stored), chunk.stored, address_of(logical), chunk.nbytes)
    except ValueError as error:
        raise corrupt(f"they cannot be decoded: {error}") from None
    return logical


class _FastReader:
    """The logical bytes of our own format, chunk by chunk; the last chunk is kept, since most hold several tensors."""

    def __init__(self, files: OpenFiles, index: CheckpointIndex) -> None:
        self._files = files
        self._index = index
        size = max((chunk.nbytes for file in index.files for chunk in file.chunks), default=BLOCK)
        self._buffers = (memory(size), memory(size))
        self._at: ChunkEntry | None = None
        self._bytes = self._buffers[0]

    def read(self, file: FileEntry, offset: int, target: Buffer) -> None:
        done = 0
        while done < target.size:
            number = bisect.bisect_right(file.chunks, offset + done, key=lambda chunk: chunk.position) - 1
            chunk = file.chunks[number]
            if chunk is not self._at:
                self._at = None
                self._bytes = read_chunk(self._files, self._index, file, chunk, self._buffers)
                self._at = chunk
            begin = offset + done - chunk.position
            n = min(chunk.nbytes - begin, target.size - done)
            target[done : done + n] = self._bytes[begin : begin + n]
            done += n


def index_sources(files: OpenFiles, index: CheckpointIndex) -> dict[str, TensorSource]:
    """The tensors of a checkpoint on disk, to be read while they are written."""
    of_name = {file.name: file for file in index.files}
    reader = _FastReader(files, index) if index.format == "fast" else None

    def source(tensor: TensorEntry, alias_of: str | None) -> TensorSource:
        def read(offset: int, target: Buffer) -> None:
            if reader is not None:
                reader.read(of_name[tensor.file], tensor.offset + offset, target)
            else:
                read_all(files.fd(tensor.file), target, tensor.offset + offset, index.path(tensor.file), tensor.name)

        return TensorSource(tensor.dtype, tensor.shape, read, tensor.stride, alias_of)

    sources: dict[str, TensorSource] = {}
    owners: dict[tuple[str, int], str] = {}
    for tensor in index.tensors:
        owner = owners.setdefault((tensor.file, tensor.offset), tensor.name) if tensor.nbytes else tensor.name
        sources[tensor.name] = source(tensor, owner if owner != tensor.name else None)
    return sources
