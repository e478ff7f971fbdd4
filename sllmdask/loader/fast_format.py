"""Our own checkpoint format: an index with checksums, and partitions that are read in large aligned pieces.

Bytes, rules and a worked example: ``docs/format.md``. In short: a directory holds ``index.json``, ``data-00000.bin`` and so on.
Tensors lie in a partition's *logical* bytes, in the order in which a model needs them, each at a multiple of 256. The logical
bytes are cut in chunks of 2 MiB, and each chunk is stored at a multiple of 4096 with its XXH64, as it is or compressed. What is
stored compressed (``split16``) has an index and partitions of its own, so that a directory may hold both variants.

Nothing of an index is believed before its SHA-256 was found right, and nothing of it is used before all of it was checked against
itself and the sizes of the files. A reader of the tensors' bytes checks each chunk's XXH64.

Source of the idea, partitions of dense tensors beside an index: ServerlessLLM (OSDI '24), section 4.1.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, CheckpointTooNew
from sllmdask.loader.format import (
    BITS,
    CheckpointIndex,
    ChunkEntry,
    FileEntry,
    TensorEntry,
    is_size,
    parse_json,
    read_small,
    tensor_nbytes,
)
from sllmdask.loader.plan import BLOCK, round_up

MAGIC = "sllmdask-checkpoint"
#: Read are this version and those before it; written is this.
VERSION = 1
#: The index of each variant, in the order of preference.
INDEXES: Mapping[str, str] = {"raw": "index.json", "split16": "index.split16.json"}
CODECS: Mapping[str, frozenset[str]] = {"raw": frozenset({"raw"}), "split16": frozenset({"raw", "split16"})}

#: Bytes. Where a tensor may begin: what a device's widest loads ask for.
ALIGNMENT = 256
#: Logical bytes of every chunk that is written, but the last of a partition.
CHUNK = 2 * 1024**2
#: Logical bytes of the largest chunk that is read, which bounds the memory of a thread that decodes.
MAX_CHUNK = 64 * 1024**2
#: Bytes; an index of 1 TB of weights has 40 MB. Parsing takes some 25 times the text at worst.
MAX_INDEX = 64 * 1024**2

_FIRST_LINE = re.compile(rb'\{"magic":"' + MAGIC.encode() + rb'","sha256":"([0-9a-f]{64})",\n')
_FIRST_LINE_NBYTES = len('{"magic":"","sha256":"",\n') + len(MAGIC) + 64
_KEYS = {"magic", "sha256", "version", "variant", "creator", "info", "partitions", "tensors"}
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


def partition_name(variant: str, number: int) -> str:
    """The name under which partition `number` of a variant is written."""
    return f"data-{number:05}.bin" if variant == "raw" else f"data-{number:05}.{variant}.bin"


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements at these strides fill their bytes without a hole and without overlap: a permuted contiguous tensor."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def tensors_in(tensors: Iterable[TensorEntry], file: str, begin: int, end: int) -> tuple[str, ...]:
    """Names of the tensors that have bytes among ``[begin, end)`` of a file, in the order of their bytes."""
    here = sorted((t.offset, t.name) for t in tensors if t.file == file and t.offset < end and t.offset + t.nbytes > begin)
    return tuple(name for _, name in here)


# --- writing ---------------------------------------------------------------------------------------------------------


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def _tensor_line(tensor: TensorEntry, numbers: Mapping[str, int], alias_of: str | None) -> str:
    line: dict[str, Any] = {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape}
    if tensor.stride is not None:
        line["stride"] = tensor.stride
    line |= {"partition": numbers[tensor.file], "offset": tensor.offset, "nbytes": tensor.nbytes}
    if alias_of is not None:
        line["alias_of"] = alias_of
    return _compact(line)


def _partition_line(file: FileEntry) -> str:
    chunks = [
        (chunk.position, chunk.nbytes, chunk.offset, chunk.stored, f"{chunk.checksum:016x}", chunk.codec) for chunk in file.chunks
    ]
    return _compact({"file": file.name, "logical_nbytes": file.logical_nbytes, "stored_nbytes": file.nbytes, "chunks": chunks})


def format_index(
    variant: str,
    files: Sequence[FileEntry],
    tensors: Sequence[TensorEntry],
    *,
    creator: str,
    info: Mapping[str, str],
) -> bytes:
    """The bytes of an index. Of tensors that share their bytes the first is written as such, the others as its aliases."""
    numbers = {file.name: number for number, file in enumerate(files)}
    first: dict[tuple[str, int], str] = {}
    lines = []
    for tensor in tensors:
        owner = first.setdefault((tensor.file, tensor.offset), tensor.name) if tensor.nbytes else tensor.name
        lines.append(_tensor_line(tensor, numbers, owner if owner != tensor.name else None))
    rest = "\n".join(
        (
            f'"version":{VERSION},',
            f'"variant":{_compact(variant)},',
            f'"creator":{_compact(creator)},',
            f'"info":{_compact(dict(info))},',
            '"partitions":[',
            ",\n".join(map(_partition_line, files)),
            "],",
            '"tensors":[',
            ",\n".join(lines),
            "]}\n",
        )
    ).encode("ascii")
    return f'{{"magic":"{MAGIC}","sha256":"{hashlib.sha256(rest).hexdigest()}",\n'.encode() + rest


# --- reading ---------------------------------------------------------------------------------------------------------


def _parse_chunk(row: Any, codecs: frozenset[str], position: int, offset: int) -> ChunkEntry:
    """One row of a chunk table, which must begin at `position` and at `offset`; raises :class:`ValueError`."""
    if not isinstance(row, list) or len(row) != 6 or not all(map(is_size, row[:4])):
        raise ValueError("is not [position, nbytes, offset, stored, checksum, codec]")
    begin, nbytes, at, stored, checksum, codec = row
    if not isinstance(checksum, str) or _CHECKSUM.fullmatch(checksum) is None:
        raise ValueError("has a checksum that is not 16 hexadecimal digits")
    if not isinstance(codec, str) or codec not in codecs:
        raise ValueError(f"has a codec that is not one of {', '.join(sorted(codecs))}")
    if not 0 < nbytes <= MAX_CHUNK or nbytes % BLOCK:
        raise ValueError(f"has {nbytes} logical bytes, which is not a multiple of {BLOCK} up to {MAX_CHUNK}")
    if begin != position:
        raise ValueError(f"begins at logical byte {begin}, not {position}")
    if at != offset:
        raise ValueError(f"begins at byte {at} of the file, not {offset}")
    if stored != nbytes if codec == "raw" else not 0 < stored < nbytes:
        raise ValueError(f"stores {nbytes} {codec} bytes in {stored}")
    return ChunkEntry(begin, nbytes, at, stored, int(checksum, 16), codec)


def _parse_partition(number: int, data: Any, path: str, codecs: frozenset[str]) -> FileEntry:
    """One partition, whose chunks follow each other without gaps, in logical bytes and in the file."""

    def refused(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, None, f"partition {number}: {reason}")

    if not isinstance(data, dict) or data.keys() != {"file", "logical_nbytes", "stored_nbytes", "chunks"}:
        raise refused("it needs file, logical_nbytes, stored_nbytes and chunks")
    file, logical_nbytes, stored_nbytes = data["file"], data["logical_nbytes"], data["stored_nbytes"]
    if not isinstance(file, str) or _FILE.fullmatch(file) is None:
        raise refused("its file is not a plain name")
    if not is_size(logical_nbytes) or not is_size(stored_nbytes):
        raise refused("its sizes are no sizes")
    if not isinstance(data["chunks"], list):
        raise refused("its chunks are not a list")
    chunks = []
    logical = stored = 0
    for i, row in enumerate(data["chunks"]):
        try:
            chunk = _parse_chunk(row, codecs, logical, stored)
        except ValueError as error:
            raise refused(f"chunk {i} {error}") from None
        chunks.append(chunk)
        logical += chunk.nbytes
        stored += round_up(chunk.stored, BLOCK)
    if logical != logical_nbytes:
        raise refused(f"its chunks have {logical} logical bytes, not {logical_nbytes}")
    if stored != stored_nbytes:
        raise refused(f"its chunks are stored in {stored} bytes, not {stored_nbytes}")
    return FileEntry(file, stored_nbytes, 0, logical_nbytes, tuple(chunks))


_NEEDED = frozenset({"name", "dtype", "shape", "partition", "offset", "nbytes"})
_ALLOWED = _NEEDED | {"stride", "alias_of"}


def _parse_tensor(number: int, data: Any, path: str, files: Sequence[FileEntry]) -> tuple[TensorEntry, str | None]:
    """One tensor, and the name of the one whose bytes it shares."""
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name:
        raise CheckpointCorrupt(path, None, f"tensor {number} has no name")

    def refused(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, name, reason)

    if not _NEEDED <= data.keys() <= _ALLOWED:
        raise refused(f"it needs {', '.join(sorted(_NEEDED))}")
    dtype, shape, partition, offset, nbytes = (data[key] for key in ("dtype", "shape", "partition", "offset", "nbytes"))
    computed = tensor_nbytes(dtype, shape, refused)
    if not is_size(offset) or not is_size(nbytes):
        raise refused("its offset and nbytes are no sizes")
    if not is_size(partition) or partition >= len(files):
        raise refused(f"its partition is not one of the {len(files)}")
    if nbytes != computed:
        raise refused(f"shape {shape} of {dtype} is {computed} bytes, not {nbytes}")
    file = files[partition]
    if nbytes == 0 and (partition or offset):
        raise refused("it has no bytes, but a place that is not the start of partition 0")
    if offset % ALIGNMENT:
        raise refused(f"it begins at {offset}, which is not a multiple of {ALIGNMENT}")
    if offset + nbytes > file.logical_nbytes:
        raise refused(f"its bytes [{offset}, {offset + nbytes}) are not inside the {file.logical_nbytes} of {file.name}")
    stride, alias_of = data.get("stride"), data.get("alias_of")
    if "alias_of" in data and (not isinstance(alias_of, str) or nbytes == 0):
        raise refused("alias_of is not the name of another with bytes")
    if "stride" in data:
        if not isinstance(stride, list) or len(stride) != len(shape) or not all(map(is_size, stride)):
            raise refused("its stride is not one per size")
        if nbytes == 0 or BITS[dtype] < 8 or not is_dense(shape, stride):
            raise refused(f"stride {stride} does not fill shape {shape}")
        stride = tuple(stride)
    return TensorEntry(name, dtype, tuple(shape), file.name, offset, nbytes, stride), alias_of


def _check_places(path: str, tensors: Iterable[tuple[TensorEntry, str | None]]) -> None:
    """No two tensors overlap, but aliases, which share all their bytes with one that is no alias."""
    owners: dict[str, TensorEntry] = {}
    aliases = []
    for tensor, alias_of in tensors:
        if alias_of is None:
            owners[tensor.name] = tensor
        else:
            aliases.append((tensor, alias_of))
    for tensor, alias_of in aliases:
        owner = owners.get(alias_of)
        if owner is None:
            raise CheckpointCorrupt(path, tensor.name, "what it is an alias of is not there, or is itself an alias")
        if (owner.file, owner.offset, owner.nbytes) != (tensor.file, tensor.offset, tensor.nbytes):
            raise CheckpointCorrupt(path, tensor.name, f"it is an alias of {alias_of!r}, but has other bytes")
    file, end = "", 0
    for tensor in sorted((owner for owner in owners.values() if owner.nbytes), key=lambda owner: (owner.file, owner.offset)):
        if tensor.file == file and tensor.offset < end:
            raise CheckpointCorrupt(path, tensor.name, "its bytes overlap those of the tensor before it")
        file, end = tensor.file, tensor.offset + tensor.nbytes


def parse_index(text: bytes, path: str, variant: str) -> CheckpointIndex:
    """The index that `text` is, checked against itself; the sizes of the files are not looked at.

    `path` is the index's own, for messages and for the directory. The fingerprint is the SHA-256 of the index, which stands for
    every byte of the checkpoint. Raises :class:`CheckpointCorrupt` and :class:`CheckpointTooNew`.
    """

    def refused(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, None, reason)

    if len(text) > MAX_INDEX:
        raise refused(f"it is larger than {MAX_INDEX} bytes")
    first = _FIRST_LINE.match(text)
    if first is None:
        raise refused(f"its first line is not that of a {MAGIC}")
    digest = first[1].decode()
    computed = hashlib.sha256(memoryview(text)[_FIRST_LINE_NBYTES:]).hexdigest()
    if computed != digest:
        raise refused(f"its checksum is {computed}, but it says {digest}: it was changed after it was written")
    data = parse_json(text, path, "the index")
    version = data.get("version")
    if not isinstance(version, int) or not is_size(version) or version == 0:
        raise refused("its version is not a number")
    if version > VERSION:
        raise CheckpointTooNew(path, version, VERSION)
    if data.keys() != _KEYS:
        raise refused(f"it needs {', '.join(sorted(_KEYS))}")
    if data["variant"] != variant:
        raise refused(f"it is not of variant {variant!r}, as its name says")
    info = data["info"]
    if not isinstance(data["creator"], str):
        raise refused("creator is not a text")
    if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
        raise refused("info does not map names to texts")
    if not isinstance(data["partitions"], list) or not data["partitions"]:
        raise refused("it has no partitions")
    if not isinstance(data["tensors"], list):
        raise refused("its tensors are not a list")
    files = tuple(_parse_partition(number, entry, path, CODECS[variant]) for number, entry in enumerate(data["partitions"]))
    if len({file.name for file in files}) != len(files):
        raise refused("two partitions have one file")
    parsed = [_parse_tensor(number, entry, path, files) for number, entry in enumerate(data["tensors"])]
    names: set[str] = set()
    for tensor, _ in parsed:
        if tensor.name in names:
            raise CheckpointCorrupt(path, tensor.name, "it occurs twice")
        names.add(tensor.name)
    _check_places(path, parsed)
    return CheckpointIndex(os.path.dirname(path), tuple(tensor for tensor, _ in parsed), files, "fast", digest)


def check_sizes(index: CheckpointIndex) -> None:
    """Raises :class:`CheckpointNotFound` where a partition is missing, :class:`CheckpointCorrupt` where its size is another."""
    for file in index.files:
        try:
            status = os.stat(index.path(file.name))
        except OSError as error:
            raise CheckpointNotFound(index.directory, f"{file.name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointNotFound(index.directory, f"{file.name} is not a file")
        if status.st_size != file.nbytes:
            cut = file.chunks[bisect.bisect_left(file.chunks, status.st_size, key=lambda c: c.offset + c.stored) :]
            lost = tensors_in(index.tensors, file.name, cut[0].position, file.logical_nbytes) if cut else ()
            what = "truncated" if status.st_size < file.nbytes else "too long"
            raise CheckpointCorrupt(
                index.path(file.name),
                lost[0] if lost else None,
                f"it is {what}: it has {status.st_size} bytes of {file.nbytes}",
            )


def found(directory: Path) -> tuple[str, ...]:
    """The variants of our format that `directory` has an index of. An ``index.json`` may also be another program's."""
    there = []
    for variant, name in INDEXES.items():
        path = directory / name
        if not path.is_file():
            continue
        try:
            with open(path, "rb") as opened:
                ours = opened.read(_FIRST_LINE_NBYTES).startswith(f'{{"magic":"{MAGIC}"'.encode())
        except OSError:
            ours = True  # whoever reads it will tell why that fails
        # A flipped bit in the magic is to be told as such.
        if ours or variant != "raw" or (directory / partition_name("raw", 0)).exists():
            there.append(variant)
    return tuple(there)


def read_fast_index(directory: Path, variant: str | None = None) -> CheckpointIndex:
    """The index of one variant in `directory`, checked against itself and the sizes of the files.

    Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt` and :class:`CheckpointTooNew`.
    """
    there = found(directory)
    if variant is None and there:
        variant = there[0]
    if variant is None or variant not in there:
        raise CheckpointNotFound(str(directory), f"it has no variant {variant!r}, but {' and '.join(there) or 'none'}")
    name = INDEXES[variant]
    index = parse_index(read_small(str(directory), name, MAX_INDEX), str(directory / name), variant)
    check_sizes(index)
    return index


def place(sizes: Iterable[int], partition_nbytes: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Where tensors of these sizes go: (partition, offset) of each, and the logical bytes of each partition.

    A tensor begins at a multiple of ``ALIGNMENT``, in the partition of the one before it if it ends there within
    `partition_nbytes` bytes and in a new one otherwise: none spans two, and one that is larger than a partition has one for
    itself. Logical bytes end at a block. A tensor without bytes is at the start of partition 0, and there always is one.
    """
    places, ends = [], [0]
    for nbytes in sizes:
        if nbytes == 0:
            places.append((0, 0))
            continue
        offset = round_up(ends[-1], ALIGNMENT)
        if offset and offset + nbytes > partition_nbytes:
            ends.append(0)
            offset = 0
        places.append((len(ends) - 1, offset))
        ends[-1] = offset + nbytes
    return places, [round_up(end, BLOCK) for end in ends]
