"""The layout of a checkpoint on disk: which files, which tensors, where their bytes are.

What is read is safetensors: one ``model.safetensors``, or shards named by ``model.safetensors.index.json``. A file is 8 bytes
of header length (little endian), a JSON header, then the tensors' bytes without holes. Everything a header claims is
checked before a byte of data is read, so that nothing later has to: a contradiction is a :class:`CheckpointCorrupt` that
names file and tensor. Pickled weights are refused: reading them runs code.

Source of the layout: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound

#: Bits per element, by safetensors' names. ``F4`` packs two elements in a byte.
BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}

SINGLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"

#: Bytes; safetensors' own bound, which keeps a damaged length from filling the memory.
MAX_HEADER = 100_000_000
#: numpy's bound on dimensions, and more than any model has.
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: bytes ``[offset, offset + nbytes)`` of `file`. `dtype` is safetensors' name, a key of :data:`BITS`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes that an element's address must be a multiple of."""
        return max(BITS[self.dtype] // 8, 1)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of `nbytes` bytes; ``[data_offset, nbytes)`` are tensors, gapless. `name` is relative to the directory."""

    name: str
    nbytes: int
    data_offset: int

    @property
    def data_nbytes(self) -> int:
        return self.nbytes - self.data_offset


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Every tensor of a checkpoint. Names are unique; tensors lie inside their files and do not overlap."""

    directory: str
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(file.data_nbytes for file in self.files)

    def path(self, file: str) -> str:
        return os.path.join(self.directory, file)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a deployment needs to know of a checkpoint: where its files are, bytes of tensor data, ``config.json``."""

    source: str
    path: str
    nbytes: int
    config: dict[str, Any]


# --- JSON that nobody has vouched for --------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _parse_json(text: bytes, file: str, what: str) -> dict[str, Any]:
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(file, None, f"{what} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointCorrupt(file, None, f"{what} is not a JSON object")
    return data


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointNotFound(str(path.parent), f"{path.name} cannot be read: {error.strerror}") from None
    return _parse_json(text, str(path), "the file")


# --- one file --------------------------------------------------------------------------------------------------------


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(name: str, data: Any, file: str, path: str, data_offset: int, data_nbytes: int) -> TensorEntry:
    """The tensor that one entry of a header describes; offsets become the file's."""

    def check(ok: bool, reason: str) -> None:
        if not ok:
            raise CheckpointCorrupt(path, name, reason)

    check(isinstance(data, dict) and data.keys() == {"dtype", "shape", "data_offsets"}, "it needs dtype, shape and data_offsets")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    check(
        isinstance(dtype, str) and dtype in BITS, f"the dtype {reprlib.repr(dtype)} is not supported; known are {', '.join(BITS)}"
    )
    check(
        isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(map(_is_size, shape)),
        f"the shape is not a list of at most {MAX_DIMENSIONS} sizes",
    )
    check(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)), "data_offsets is not two offsets")
    begin, end = offsets
    check(begin <= end <= data_nbytes, f"its bytes [{begin}, {end}) are not inside the {data_nbytes} bytes of data")

    n_elements = 1
    for size in sorted(shape, reverse=True):
        n_elements *= size
        check(n_elements < 2**63, "its shape has more elements than can be counted")
    n_bits = n_elements * BITS[dtype]
    check(n_bits % 8 == 0, f"its {n_bits} bits do not fill whole bytes")
    # torch has no type of one packed element: a row must end where a byte ends.
    check(BITS[dtype] >= 8 or n_elements == 0 or (bool(shape) and shape[-1] % 2 == 0), "its rows do not fill whole bytes")
    check(n_bits // 8 == end - begin, f"shape {shape} of {dtype} is {n_bits // 8} bytes, but its offsets span {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), file, data_offset + begin, end - begin)


def read_header(directory: str, file: str) -> tuple[FileEntry, tuple[TensorEntry, ...]]:
    """The header of one safetensors file, checked against itself and the file's size.

    Tensors come in the order of their bytes. Raises :class:`CheckpointCorrupt`, and :class:`CheckpointNotFound` where the file
    is missing or cannot be opened.
    """
    path = os.path.join(directory, file)
    try:
        # A pipe would block at open.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointNotFound(directory, f"{file} is not a file")
        with open(path, "rb") as opened:
            nbytes = os.fstat(opened.fileno()).st_size
            if nbytes < 8:
                raise CheckpointCorrupt(path, None, f"it is truncated: {nbytes} bytes do not hold a header")
            header_nbytes = int.from_bytes(opened.read(8), "little")
            if header_nbytes > MAX_HEADER:
                raise CheckpointCorrupt(path, None, f"the header's length, {header_nbytes} bytes, is above {MAX_HEADER}")
            if 8 + header_nbytes > nbytes:
                raise CheckpointCorrupt(
                    path, None, f"it is truncated: the header ends at {8 + header_nbytes}, the file at {nbytes}"
                )
            text = opened.read(header_nbytes)
    except OSError as error:
        raise CheckpointNotFound(directory, f"{file} cannot be read: {error.strerror}") from None

    if not text.startswith(b"{"):
        raise CheckpointCorrupt(path, None, "the header does not begin with '{': this is not a safetensors file")
    header = _parse_json(text, path, "the header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointCorrupt(path, None, "__metadata__ does not map names to texts")

    entry = FileEntry(file, nbytes, 8 + header_nbytes)
    tensors = [_parse_entry(name, data, file, path, entry.data_offset, entry.data_nbytes) for name, data in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = entry.data_offset
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlap those of the tensor before it" if tensor.offset < end else "leave a hole before it"
            raise CheckpointCorrupt(path, tensor.name, f"its bytes {what}: it begins at {tensor.offset}, not {end}")
        end += tensor.nbytes
    if end != nbytes:
        raise CheckpointCorrupt(path, None, f"its tensors end at {end}, the file at {nbytes}")
    return entry, tuple(tensors)


# --- a directory -----------------------------------------------------------------------------------------------------


def _missing_weights(directory: Path) -> CheckpointNotFound:
    names = sorted(entry.name for entry in directory.iterdir())
    other = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if other:
        reason = f"it has {', '.join(other[:3])}, but neither {SINGLE} nor {SHARDED}, which says how shards belong together"
    elif pickled:
        reason = f"its weights are pickled ({', '.join(pickled[:3])}), and reading those runs code; convert them to safetensors"
    else:
        reason = f"it has neither {SINGLE} nor {SHARDED}"
    return CheckpointNotFound(str(directory), reason)


def _read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to shard, from ``model.safetensors.index.json``; no shard lies outside the directory."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(str(path), None, "weight_map does not map tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointCorrupt(str(path), tensor, f"its shard {file!r} is not a safetensors file")
        # Checked as a name, not resolved: the hub's own cache has links that lead out of the directory.
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file or str(parts) != file:
            raise CheckpointCorrupt(str(path), tensor, f"its shard {file!r} is not a name inside the directory")
    return weight_map


def _read_sharded(directory: Path) -> CheckpointIndex:
    path = directory / SHARDED
    weight_map = _read_weight_map(path)
    files, tensors = [], dict[str, TensorEntry]()
    for file in sorted(set(weight_map.values())):
        entry, found = read_header(str(directory), file)
        files.append(entry)
        for tensor in found:
            # A tensor that the index leaves out belongs to the checkpoint, as it does in transformers.
            if weight_map.get(tensor.name, file) != file:
                continue
            if tensor.name in tensors:
                raise CheckpointCorrupt(str(path), tensor.name, f"it is in {tensors[tensor.name].file} and in {file}")
            tensors[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointCorrupt(str(path), name, f"{file} does not hold it")
    return CheckpointIndex(str(directory), tuple(tensors.values()), tuple(files))


def read_index(path: str | os.PathLike[str]) -> CheckpointIndex:
    """The tensors of the checkpoint at `path`, a directory or one safetensors file; reads headers only.

    Raises :class:`CheckpointNotFound` and :class:`CheckpointCorrupt`.
    """
    path = Path(path).absolute()
    if path.is_file() and path.suffix == ".safetensors":
        entry, tensors = read_header(str(path.parent), path.name)
        return CheckpointIndex(str(path.parent), tensors, (entry,))
    if not path.is_dir():
        raise CheckpointNotFound(
            str(path), "it is neither a directory nor a safetensors file" if path.exists() else "no such directory"
        )
    try:
        if (path / SINGLE).exists():
            entry, tensors = read_header(str(path), SINGLE)
            return CheckpointIndex(str(path), tensors, (entry,))
        if (path / SHARDED).exists():
            return _read_sharded(path)
        raise _missing_weights(path)
    except OSError as error:
        raise CheckpointNotFound(str(path), f"it cannot be read: {error.strerror}") from None


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint; raises :class:`CheckpointNotFound` and :class:`CheckpointCorrupt`."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointNotFound(str(directory), "it has no config.json")
    return _read_json(path)


def read_info(source: str, directory: str) -> CheckpointInfo:
    """What :class:`CheckpointInfo` says of the files in `directory`; raises as :func:`read_index` and :func:`read_config`."""
    index = read_index(directory)
    return CheckpointInfo(source, index.directory, index.nbytes, read_config(directory))
