"""The layout of a checkpoint on disk: which files, which tensors, where their bytes are.

Two formats are read: our own (:mod:`sllmdask.loader.fast_format`), and safetensors, which is here: one ``model.safetensors``,
shards named by ``model.safetensors.index.json``, or an adapter's ``adapter_model.safetensors``. Such a file is 8 bytes of header
length (little endian), a JSON header, then the tensors' bytes without holes. Everything a header claims is checked before a
byte of data is read, so that nothing later has to: a contradiction is a :class:`CheckpointCorrupt` that names file and tensor.
Pickled weights are refused: reading them runs code.

Source of the layout: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sllmdask.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound

#: Bits per element, by safetensors' names; ``C32`` and ``C128`` are torch's, which safetensors lacks. ``F4`` packs two in a byte.
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
    "C32": 32,
    "C64": 64,
    "C128": 128,
}

SINGLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"
#: A LoRA adapter, as peft saves it beside ``adapter_config.json``.
ADAPTER = "adapter_model.safetensors"
WEIGHTS = (SINGLE, SHARDED, ADAPTER)
#: Configuration and tokenizer, which lie beside the weights; no pickle, no code.
SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")

#: Bytes; safetensors' own bound, which keeps a damaged length from filling the memory.
MAX_HEADER = 100_000_000
#: numpy's bound on dimensions, and more than any model has.
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: bytes ``[offset, offset + nbytes)`` of `file`. `dtype` is safetensors' name, a key of :data:`BITS`.

    `stride` counts elements; ``None`` means contiguous. A tensor with a stride is dense all the same: its elements fill its bytes
    in another order. Two tensors with the same file and offset, and with bytes, are aliases: they share storage (tied weights).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None

    @property
    def itemsize(self) -> int:
        """Bytes that an element's address must be a multiple of."""
        return min(max(BITS[self.dtype] // 8, 1), 8)


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One checksummed piece of a file: logical bytes ``[position, position + nbytes)``, of which the file keeps `stored` bytes.

    `position`, `nbytes` and `offset` are multiples of 4096; behind the stored bytes the file is zero to the next multiple.
    `checksum` is XXH64, seed 0, of the stored bytes. `codec` is ``raw`` (the stored bytes are the logical ones) or ``split16``.
    """

    position: int
    nbytes: int
    offset: int
    stored: int
    checksum: int
    codec: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of `nbytes` bytes on disk. `name` is relative to the directory.

    safetensors: ``[data_offset, nbytes)`` are tensors, gapless, and their offsets count in the file. Our own format: tensors'
    offsets count in the `logical_nbytes` that `chunks`, in order and without gaps, decode to; `data_offset` is 0.
    """

    name: str
    nbytes: int
    data_offset: int
    logical_nbytes: int = 0
    chunks: tuple[ChunkEntry, ...] = ()

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensors, and of the padding between them, once they are in memory."""
        return self.logical_nbytes if self.chunks else self.nbytes - self.data_offset


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Every tensor of a checkpoint. Names are unique; tensors lie inside their files and overlap only as aliases.

    `format` is ``safetensors`` or ``fast`` (our own). Two indexes with the same `fingerprint`, a hexadecimal number, stand for
    the same bytes: it is made of the files' names, sizes and times of change, or of the checksums where there are some.
    """

    directory: str
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    format: str = "safetensors"
    fingerprint: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data of all files, in memory."""
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


# --- the order in which a model needs its tensors --------------------------------------------------------------------

_EMBEDDING, _LAYER, _NORM, _HEAD, _REST = range(5)
_EMBEDDINGS = re.compile(r"embed|^(wte|wpe|shared|project_in|rotary)")
_HEADS = re.compile(r"(^|_)head$|^(embed_out|project_out|output|score|classifier|cls)$")
_NORMS = re.compile(r"norm|^ln(_|$)", re.IGNORECASE)
_FIRST_STACKS = re.compile(r"encoder|vision|visual|audio|image")
#: What cannot be counted is a text, so that a hostile name costs nothing.
_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})(?![0-9])")

#: (stage, stack, layer, (text, number, text, number, ...)).
Rank = tuple[int, int, int, tuple[str | int, ...]]


def execution_rank(name: str) -> Rank:
    """Sorts tensors into the order in which a model needs them: embeddings, layers by number, final norm, head, the rest.

    The first three numbers are the stage, the stack (what encodes, text or images, before what decodes) and the layer's number;
    inside a layer names are in natural order, so that expert 10 comes after expert 9. Known by the names in which transformers'
    models call their parts; a name that says nothing is in the rest.
    """
    parts = name.split(".")
    natural = tuple(int(piece) if i % 2 else piece for i, piece in enumerate(_NUMBER.split(name)))
    stack = 0 if any(_FIRST_STACKS.search(part) for part in parts[:-2]) else 1
    layer = next((int(part) for part in parts if _NUMBER.fullmatch(part)), None)
    if layer is not None:
        return _LAYER, stack, layer, natural
    for stage, pattern in ((_HEAD, _HEADS), (_EMBEDDING, _EMBEDDINGS), (_NORM, _NORMS)):
        if any(pattern.search(part) for part in parts):
            return stage, stack, 0, natural
    return _REST, stack, 0, natural


# --- JSON that nobody has vouched for --------------------------------------------------------------------------------


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for :mod:`json`; raises :class:`ValueError` where a key occurs twice."""
    found = dict(pairs)
    for name in found:
        # Half a surrogate pair is JSON, but no text: the first message or path that holds it would fail.
        name.encode("utf-8")
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def parse_json(text: bytes, file: str, what: str) -> dict[str, Any]:
    """The JSON object that `text` is; raises :class:`CheckpointCorrupt`, which says `what` is not one."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(file, None, f"{what} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointCorrupt(file, None, f"{what} is not a JSON object")
    return data


def read_small(directory: str, file: str, limit: int) -> bytes:
    """All of a file of at most `limit` bytes. Raises :class:`CheckpointNotFound`, and :class:`CheckpointCorrupt` for a larger."""
    path = os.path.join(directory, file)
    try:
        # A pipe would block at open.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointNotFound(directory, f"{file} is not a file")
        with open(path, "rb") as opened:
            nbytes = os.fstat(opened.fileno()).st_size
            if nbytes > limit:
                raise CheckpointCorrupt(path, None, f"it is larger than {limit} bytes")
            # Memory for as much as is asked for is taken at once.
            return opened.read(nbytes)
    except OSError as error:
        raise CheckpointNotFound(directory, f"{file} cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(read_small(str(path.parent), path.name, MAX_HEADER), str(path), "the file")


# --- one file --------------------------------------------------------------------------------------------------------


def _is_text(value: str) -> bool:
    """Whether `value` has no half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_size(value: Any) -> bool:
    """Whether `value` can be a number of bytes or elements."""
    return type(value) is int and 0 <= value < 2**63


def tensor_nbytes(dtype: Any, shape: Any, refused: Callable[[str], CheckpointError]) -> int:
    """Bytes of a tensor of which nobody has vouched for `dtype` and `shape`; raises ``refused(reason)`` for what is wrong."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refused(f"the dtype {reprlib.repr(dtype)} is not supported; known are {', '.join(BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_size, shape)):
        raise refused(f"the shape is not a list of at most {MAX_DIMENSIONS} sizes")
    n_elements = 1
    for size in sorted(shape, reverse=True):
        n_elements *= size
        if n_elements >= 2**63:
            raise refused("its shape has more elements than can be counted")
    n_bits = n_elements * BITS[dtype]
    if n_bits % 8:
        raise refused(f"its {n_bits} bits do not fill whole bytes")
    # torch has no type of one packed element: a row must end where a byte ends.
    if BITS[dtype] < 8 and n_elements and (not shape or shape[-1] % 2):
        raise refused("its rows do not fill whole bytes")
    return int(n_bits // 8)


def _parse_entry(name: str, data: Any, file: str, path: str, data_offset: int, data_nbytes: int) -> TensorEntry:
    """The tensor that one entry of a header describes; offsets become the file's."""

    def refused(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, name, reason)

    if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
        raise refused("it needs dtype, shape and data_offsets")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise refused("data_offsets is not two offsets")
    nbytes = tensor_nbytes(dtype, shape, refused)
    begin, end = offsets
    if not begin <= end <= data_nbytes:
        raise refused(f"its bytes [{begin}, {end}) are not inside the {data_nbytes} bytes of data")
    if nbytes != end - begin:
        raise refused(f"shape {shape} of {dtype} is {nbytes} bytes, but its offsets span {end - begin}")
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
    header = parse_json(text, path, "the header")
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


def read_weight_map(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor name to shard, from ``model.safetensors.index.json`` or its like; no shard lies outside the directory.

    Raises :class:`CheckpointNotFound` and :class:`CheckpointCorrupt`, also for a shard without `suffix`.
    """
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(str(path), None, "weight_map does not map tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(suffix):
            raise CheckpointCorrupt(str(path), tensor, f"its shard {file!r} is not a {suffix[1:]} file")
        # Checked as a name, not resolved: the hub's own cache has links that lead out of the directory.
        parts = PurePosixPath(file)
        if not _is_text(file):
            raise CheckpointCorrupt(str(path), tensor, f"its shard {file!r} is not a text")
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file or str(parts) != file:
            raise CheckpointCorrupt(str(path), tensor, f"its shard {file!r} is not a name inside the directory")
    return weight_map


def _read_sharded(directory: Path) -> CheckpointIndex:
    path = directory / SHARDED
    weight_map = read_weight_map(path)
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


def _fingerprint(directory: str, files: Iterable[FileEntry]) -> str:
    """A number for the state of `files`: names, sizes, times of change."""
    digest = hashlib.sha256()
    for file in files:
        changed_ns = os.stat(os.path.join(directory, file.name)).st_mtime_ns
        digest.update(f"{file.name!r} {file.nbytes} {changed_ns}\n".encode())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> CheckpointIndex:
    if path.is_file():
        index = _read_one(path.parent, path.name)
    elif (path / SINGLE).exists():
        index = _read_one(path, SINGLE)
    elif (path / SHARDED).exists():
        index = _read_sharded(path)
    elif (path / ADAPTER).exists():
        index = _read_one(path, ADAPTER)
    else:
        raise _missing_weights(path)
    return replace(index, fingerprint=_fingerprint(index.directory, index.files))


def _read_one(directory: Path, file: str) -> CheckpointIndex:
    entry, tensors = read_header(str(directory), file)
    return CheckpointIndex(str(directory), tensors, (entry,))


def read_index(path: str | os.PathLike[str], variant: str | None = None) -> CheckpointIndex:
    """The tensors of the checkpoint at `path`, a directory or one safetensors file; reads headers and indexes only.

    `variant` chooses between what a checkpoint of our own format may be stored as, ``raw`` or ``split16`` (compressed); ``None``
    takes the raw one where there are both. Where a directory has both formats, ours is read.

    Raises :class:`CheckpointNotFound`, also for a variant that is not there, :class:`CheckpointCorrupt` and
    :class:`CheckpointTooNew`.
    """
    # Below, because our own format is made of the types and checks of this module.
    from sllmdask.loader import fast_format

    path = Path(path).absolute()
    if not path.is_dir() and not (path.is_file() and path.suffix == ".safetensors"):
        raise CheckpointNotFound(
            str(path), "it is neither a directory nor a safetensors file" if path.exists() else "no such directory"
        )
    try:
        if path.is_dir() and fast_format.found(path):
            return fast_format.read_fast_index(path, variant)
        if variant not in (None, "raw"):
            raise CheckpointNotFound(str(path), f"it is safetensors, which has no variant {variant!r}")
        return _read_safetensors(path)
    except OSError as error:
        raise CheckpointNotFound(str(path), f"it cannot be read: {error.strerror}") from None


def variants(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """What the checkpoint at `path` can be read as: ``raw``, ``split16`` or both. safetensors: ``raw``; neither: nothing."""
    from sllmdask.loader import fast_format

    path = Path(path)
    there = fast_format.found(path)
    if there:
        return there
    weights = path.suffix == ".safetensors" if path.is_file() else any((path / name).exists() for name in WEIGHTS)
    return ("raw",) if weights else ()


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint; raises :class:`CheckpointNotFound` and :class:`CheckpointCorrupt`."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointNotFound(str(directory), "it has no config.json")
    return _read_json(path)


def read_info(source: str, directory: str) -> CheckpointInfo:
    """What :class:`CheckpointInfo` says of the files in `directory`; raises as :func:`read_index` and :func:`read_config`.

    An adapter has no ``config.json``: its ``adapter_config.json`` is no model's configuration, so there is none.
    """
    index = read_index(directory)
    beside = [Path(directory) / name for name in ("adapter_config.json", "config.json")]
    config = {} if [path.is_file() for path in beside] == [True, False] else read_config(directory)
    return CheckpointInfo(source, index.directory, index.nbytes, config)
