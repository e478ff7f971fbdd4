"""Which bytes of which files go where in one host buffer, and in which order: byte ranges to large chunk reads. Pure.

The data of a file is one contiguous run, so it is read as one, in chunks, whatever tensors it holds: no small read is left.
Chunks are read in the order in which a forward pass needs their tensors, so that the first layers can run while the last ones
are on their way. safetensors files are written in the order of names, in which layer 10 comes before layer 2; each read is as
large as ever, only their order is another one.

A direct read (``O_DIRECT``) wants file offset, length and address to be multiples of a block; a file's data therefore starts
in the buffer as far from a block's start as it does in the file. The last chunk asks for a whole block past the end of the
file, of which only the file's bytes arrive.

Source of the idea: ServerlessLLM (OSDI '24), section 4 (chunked, direct, sequential reads into one pool).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from sllmdask.loader.format import CheckpointIndex, FileEntry, Rank, TensorEntry, execution_rank

#: Bytes. Direct reads on any common device and file system are aligned if they are aligned to this.
BLOCK = 4096
#: Bytes of the largest element; data that starts at a multiple of it keeps every well-made tensor aligned.
WORD = 8
#: Sorts bytes that no tensor of the checkpoint claims behind all others.
_LAST: Rank = (99, 0, 0, ())


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Bring `nbytes` at `offset` of file number `file`, at least `wanted` of them, and have `decoded` bytes at `position`.

    Fewer than `nbytes` arrive only where the file ends inside the last block. `payload` of the decoded bytes are tensors'.
    `checksum` is XXH64, seed 0, of the `wanted` stored bytes; `codec` is ``raw``, where stored bytes are decoded ones, or
    ``split16``. Only a raw chunk may be read straight to its place in the buffer.
    """

    file: int
    offset: int
    position: int
    nbytes: int
    wanted: int
    payload: int
    decoded: int = 0
    codec: str = "raw"
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class FileRead:
    """One file to open; `nbytes` is the size that its header was checked against."""

    path: str
    nbytes: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Move the `nbytes` of `tensor` inside the buffer, once its chunks are there: they lie where its dtype may not."""

    tensor: str
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one checkpoint into a buffer of `nbytes` bytes, the first needed first.

    `positions`: where each tensor begins in the buffer; those of aliases are equal. `chunks_of`: the numbers of the `chunks`
    that bring a tensor's bytes; none if it is empty. A tensor is there when they are, and its copy, if `copies` has one, is done.
    """

    nbytes: int
    files: tuple[FileRead, ...]
    chunks: tuple[ChunkRead, ...]
    copies: tuple[Copy, ...]
    positions: Mapping[str, int]
    chunks_of: Mapping[str, tuple[int, ...]]

    @property
    def payload(self) -> int:
        """Bytes of tensor data that the chunks bring."""
        return sum(chunk.payload for chunk in self.chunks)

    @property
    def largest_read(self) -> int:
        """Bytes of the largest chunk as it is stored, in whole blocks: the scratch memory that a thread needs."""
        return max((round_up(chunk.nbytes, BLOCK) for chunk in self.chunks), default=0)

    def first_tensor(self, chunk: int) -> str | None:
        """The tensor whose bytes come first in chunk number `chunk`."""
        return min(
            (name for name, chunks in self.chunks_of.items() if chunk in chunks), key=self.positions.__getitem__, default=None
        )


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(slots=True)
class _Piece:
    """A chunk without a number yet. `start` counts as its file's tensors' offsets do, `rank` is its first-needed tensor's."""

    start: int
    read: ChunkRead
    rank: Rank = _LAST


def _cut(number: int, file: FileEntry, first: int, position: int, chunk_size: int, direct: bool) -> list[ChunkRead]:
    """The reads of a safetensors file from byte `first` to its end."""
    reads = []
    for offset in range(first, file.nbytes if file.data_nbytes else first, chunk_size):
        wanted = min(chunk_size, file.nbytes - offset)
        reads.append(
            ChunkRead(
                file=number,
                offset=offset,
                position=position + offset - first,
                nbytes=round_up(wanted, BLOCK) if direct else wanted,
                wanted=wanted,
                payload=offset + wanted - max(offset, file.data_offset),
                decoded=wanted,
            )
        )
    return reads


def _stored(number: int, file: FileEntry, position: int) -> list[ChunkRead]:
    """The reads of a file of our own format: one for each chunk, since each has a checksum."""
    return [
        ChunkRead(
            file=number,
            offset=chunk.offset,
            position=position + chunk.position,
            nbytes=round_up(chunk.stored, BLOCK),
            wanted=chunk.stored,
            payload=chunk.nbytes,
            decoded=chunk.nbytes,
            codec=chunk.codec,
            checksum=chunk.checksum,
        )
        for chunk in file.chunks
    ]


def plan_reads(index: CheckpointIndex, chunk_size: int) -> ReadPlan:
    """Plan the reads of `index`: its own chunks, or, of safetensors, chunks of `chunk_size` bytes, rounded up to blocks.

    A file whose data does not start at a word is read through the page cache, straight to where its tensors are aligned:
    one pass instead of a direct read and a copy of every tensor.
    """
    chunk_size = round_up(max(chunk_size, 1), BLOCK)
    fast = index.format == "fast"
    files, pieces = [], list[_Piece]()
    base_of: dict[str, int] = {}
    pieces_of: dict[str, list[_Piece]] = {}
    end = 0
    for number, file in enumerate(index.files):
        direct = file.data_offset % WORD == 0
        first = file.data_offset // BLOCK * BLOCK if direct else file.data_offset
        base_of[file.name] = end - first
        files.append(FileRead(index.path(file.name), file.nbytes, direct))
        reads = _stored(number, file, end) if fast else _cut(number, file, first, end, chunk_size, direct)
        pieces_of[file.name] = [_Piece(read.position - base_of[file.name], read) for read in reads]
        pieces += pieces_of[file.name]
        end += round_up(file.logical_nbytes if fast else file.nbytes - first, BLOCK)

    held: dict[str, list[_Piece]] = {}
    for tensor in index.tensors:
        held[tensor.name] = _holding(tensor, pieces_of[tensor.file])
        rank = execution_rank(tensor.name)
        for piece in held[tensor.name]:
            piece.rank = min(piece.rank, rank)
    # Pieces of one rank stay in the order of the files.
    pieces.sort(key=lambda piece: piece.rank)
    number_of = {id(piece): number for number, piece in enumerate(pieces)}

    positions, copies = {}, []
    for tensor in index.tensors:
        position = base_of[tensor.file] + tensor.offset
        if position % tensor.itemsize and tensor.nbytes:
            copies.append(Copy(tensor.name, position, end, tensor.nbytes))
            position = end
            end += round_up(tensor.nbytes, WORD)
        positions[tensor.name] = position
    return ReadPlan(
        nbytes=round_up(end, BLOCK),
        files=tuple(files),
        chunks=tuple(piece.read for piece in pieces),
        copies=tuple(copies),
        positions=positions,
        chunks_of={name: tuple(sorted(number_of[id(piece)] for piece in found)) for name, found in held.items()},
    )


def _holding(tensor: TensorEntry, pieces: list[_Piece]) -> list[_Piece]:
    """Those of a file's `pieces`, gapless and in the order of the file, that hold bytes of `tensor`."""
    if not tensor.nbytes:
        return []
    first = bisect_right(pieces, tensor.offset, key=lambda piece: piece.start) - 1
    return pieces[first : bisect_left(pieces, tensor.offset + tensor.nbytes, key=lambda piece: piece.start)]
