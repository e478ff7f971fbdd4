"""Which bytes of which files go where in one host buffer: byte ranges to large chunk reads. Pure.

The data of a file is one contiguous run, so it is read as one, in chunks, whatever tensors it holds: no small read is left.
A direct read (``O_DIRECT``) wants file offset, length and address to be multiples of a block; a file's data therefore starts
in the buffer as far from a block's start as it does in the file. The last chunk asks for a whole block past the end of the
file, of which only the file's bytes arrive.

Source of the idea: ServerlessLLM (OSDI '24), section 4 (chunked, direct, sequential reads into one pool).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sllmdask.loader.format import CheckpointIndex

#: Bytes. Direct reads on any common device and file system are aligned if they are aligned to this.
BLOCK = 4096
#: Bytes of the largest element; data that starts at a multiple of it keeps every well-made tensor aligned.
WORD = 8


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Read `nbytes` at `offset` of file number `file` to `position` of the buffer.

    At least `wanted` of them must arrive: less only where the file ends inside the last block. `payload` bytes are tensors'.
    """

    file: int
    offset: int
    position: int
    nbytes: int
    wanted: int
    payload: int


@dataclass(frozen=True, slots=True)
class FileRead:
    """One file to open; `nbytes` is the size that its header was checked against."""

    path: str
    nbytes: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Move `nbytes` inside the buffer: a tensor whose bytes lie where its dtype may not."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one checkpoint into a buffer of `nbytes` bytes.

    `positions`: where each tensor begins in the buffer, once all `chunks` are there and then `copies` are done.
    """

    nbytes: int
    files: tuple[FileRead, ...]
    chunks: tuple[ChunkRead, ...]
    copies: tuple[Copy, ...]
    positions: Mapping[str, int]

    @property
    def payload(self) -> int:
        """Bytes of tensor data that the chunks bring."""
        return sum(chunk.payload for chunk in self.chunks)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def plan_reads(index: CheckpointIndex, chunk_size: int) -> ReadPlan:
    """Plan the reads of `index` in chunks of `chunk_size` bytes, rounded up to blocks.

    A file whose data does not start at a word is read through the page cache, straight to where its tensors are aligned:
    one pass instead of a direct read and a copy of every tensor.
    """
    chunk_size = round_up(max(chunk_size, 1), BLOCK)
    files, chunks, copies = [], [], []
    base_of: dict[str, int] = {}
    end = 0
    for number, file in enumerate(index.files):
        direct = file.data_offset % WORD == 0
        first = file.data_offset // BLOCK * BLOCK if direct else file.data_offset
        base_of[file.name] = end - first
        files.append(FileRead(index.path(file.name), file.nbytes, direct))
        for offset in range(first, file.nbytes if file.data_nbytes else first, chunk_size):
            wanted = min(chunk_size, file.nbytes - offset)
            chunks.append(
                ChunkRead(
                    file=number,
                    offset=offset,
                    position=end + offset - first,
                    nbytes=round_up(wanted, BLOCK) if direct else wanted,
                    wanted=wanted,
                    payload=offset + wanted - max(offset, file.data_offset),
                )
            )
        end += round_up(file.nbytes - first, BLOCK)

    positions = {}
    for tensor in index.tensors:
        position = base_of[tensor.file] + tensor.offset
        if position % tensor.itemsize and tensor.nbytes:
            copies.append(Copy(position, end, tensor.nbytes))
            position = end
            end += round_up(tensor.nbytes, WORD)
        positions[tensor.name] = position
    return ReadPlan(round_up(end, BLOCK), tuple(files), tuple(chunks), tuple(copies), positions)
