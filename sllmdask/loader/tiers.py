"""What the weights of a model look like in a tier. Only here and in :mod:`sllmdask.loader.device` the loader knows torch.

On disk a checkpoint is an index and bytes (:mod:`sllmdask.loader.format`), in host memory it is one buffer with tensors over
it, which is made here.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.dlpack import from_dlpack

from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, TensorUnsupported
from sllmdask.loader.buffers import Buffer
from sllmdask.loader.fast_format import is_dense
from sllmdask.loader.format import CheckpointIndex, TensorEntry, read_weight_map
from sllmdask.loader.plan import ReadPlan
from sllmdask.loader.sources import TensorSource

#: Tensor by name.
StateDict = dict[str, torch.Tensor]

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F4": torch.float4_e2m1fn_x2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C32": torch.complex32,
    "C64": torch.complex64,
    "C128": torch.complex128,
}


def _shape(tensor: TensorEntry) -> tuple[int, ...]:
    """`tensor`'s shape in torch, which counts packed pairs where safetensors counts the ``F4`` in them."""
    if tensor.dtype == "F4" and tensor.shape:
        return (*tensor.shape[:-1], tensor.shape[-1] // 2)
    return tensor.shape


def tensor_views(index: CheckpointIndex, plan: ReadPlan, buffer: Buffer) -> StateDict:
    """Tensors over the bytes that `plan` has brought to `buffer`; nothing is copied. Each keeps the buffer alive.

    `buffer` is uint8 of shape ``(plan.nbytes,)``. Tensors have the names, dtypes and shapes of the checkpoint, each its own
    storage of just its bytes. They are shared by all who load the checkpoint: to write to one, clone it.
    """
    assert buffer.shape == (plan.nbytes,)
    views: StateDict = {}
    for tensor in index.tensors:
        dtype, shape = _DTYPES[tensor.dtype], _shape(tensor)
        if tensor.nbytes == 0:
            views[tensor.name] = torch.empty(0, dtype=torch.uint8).view(dtype).reshape(shape)
            continue
        count, position = tensor.nbytes // dtype.itemsize, plan.positions[tensor.name]
        view = torch.frombuffer(buffer, dtype=dtype, count=count, offset=position)
        views[tensor.name] = view.reshape(shape) if tensor.stride is None else view.as_strided(shape, tensor.stride)
    return views


def device_views(index: CheckpointIndex, positions: Mapping[str, int], memory: torch.Tensor) -> StateDict:
    """Tensors over `memory`, uint8 of one dimension on any device; nothing is copied. Each keeps all of `memory` alive.

    `positions`: the byte at which each tensor with bytes begins, a multiple of its element's size; where two are equal they share
    storage. Else each tensor has a storage of just its bytes, so that saving one does not save all.
    """
    views: StateDict = {}
    storages: dict[int, torch.Tensor] = {}
    for tensor in index.tensors:
        dtype, shape = _DTYPES[tensor.dtype], _shape(tensor)
        if tensor.nbytes == 0:
            views[tensor.name] = memory.new_empty(0).view(dtype).reshape(shape)
            continue
        position = positions[tensor.name]
        if position not in storages:
            # A slice would show the whole memory as its storage.
            storages[position] = from_dlpack(memory[position : position + tensor.nbytes])
        view = storages[position].view(dtype)
        views[tensor.name] = view.reshape(shape) if tensor.stride is None else view.as_strided(shape, tensor.stride)
    return views


# --- tensors that are to be written ----------------------------------------------------------------------------------


class _Bytes:
    """Reads a tensor's bytes in order: brought to host memory at the first, let go with the last."""

    def __init__(self, tensor: torch.Tensor, order: list[int]) -> None:
        self._tensor = tensor
        self._order = order
        self._bytes: Buffer | None = None

    def __call__(self, offset: int, target: Buffer) -> None:
        if self._bytes is None:
            tensor = self._tensor.cpu().resolve_conj().resolve_neg()
            # In the order of its strides a dense tensor is contiguous, and nothing is copied.
            self._bytes = tensor.permute(self._order).contiguous().reshape(-1).view(torch.uint8).numpy()
        end = offset + target.size
        target[:] = self._bytes[offset:end]
        if end == self._bytes.size:
            self._bytes = None


def sources_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSource]:
    """A state dict as :func:`sllmdask.loader.writer.write_checkpoint` takes it.

    Tensors that share all their bytes (tied weights) become aliases; those that share some of them are written apart. A stride
    is kept where it is that of a permuted dense tensor; any other tensor is written contiguous. A tensor on a device is brought
    to host memory when it is its turn, and let go before the next.

    Raises :class:`TensorUnsupported` for what is no plain tensor (sparse, quantised by torch, on the meta device, a subclass) and
    for a dtype that the format lacks.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    owners: dict[tuple[torch.device, int, int], str] = {}
    sources: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TensorUnsupported(name, f"it is a {type(tensor).__module__}.{type(tensor).__qualname__}, not a plain tensor")
        if tensor.dtype not in names:
            raise TensorUnsupported(name, f"its dtype is {tensor.dtype}; known are {', '.join(map(str, names))}")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise TensorUnsupported(name, "it is sparse or nested, or on the meta device, where it has no values")
        tensor = tensor.detach()
        dtype, shape = names[tensor.dtype], tuple(tensor.shape)
        as_it_is = tensor.numel() > 0 and is_dense(shape, tensor.stride()) and not (tensor.is_conj() or tensor.is_neg())
        stride = tensor.stride() if as_it_is and not tensor.is_contiguous() and dtype != "F4" else None
        alias_of = None
        if as_it_is and (stride is not None or tensor.is_contiguous()):
            owner = owners.setdefault((tensor.device, tensor.data_ptr(), tensor.nbytes), name)
            alias_of = owner if owner != name else None
        order = (
            sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True) if stride else list(range(tensor.dim()))
        )
        if dtype == "F4" and shape:
            shape = (*shape[:-1], 2 * shape[-1])
        sources[name] = TensorSource(dtype, shape, _Bytes(tensor, order), stride, alias_of)
    return sources


def load_pickled(path: Path) -> StateDict:
    """The tensors of a pickled checkpoint, a file or a directory, mapped where torch can. No code of the pickle is run.

    Raises :class:`CheckpointNotFound`, and :class:`CheckpointCorrupt` for what torch does not read with ``weights_only``.
    """
    tensors: StateDict = {}
    for file in _pickled_files(path):
        try:
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise CheckpointNotFound(str(path), f"{file.name} cannot be read: {error.strerror}") from None
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.PickleError) as error:
            raise CheckpointCorrupt(str(file), None, f"torch cannot read it as weights only: {error}") from None
        # Training frameworks put the weights under one of these names, beside an optimiser's state.
        for name in ("state_dict", "model"):
            if isinstance(data, dict) and isinstance(data.get(name), dict):
                data = data[name]
        if not isinstance(data, dict) or not data:
            raise CheckpointCorrupt(str(file), None, "it does not map names to tensors")
        for name, tensor in data.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointCorrupt(str(file), str(name), "it is not a tensor")
            if name in tensors:
                raise CheckpointCorrupt(str(file), name, "another shard holds it as well")
            tensors[name] = tensor
    return tensors


def _pickled_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "pytorch_model.bin.index.json"
    if index.exists():
        return [path / file for file in sorted(set(read_weight_map(index, ".bin").values()))]
    return [path / name for name in ("pytorch_model.bin", "adapter_model.bin") if (path / name).exists()][:1]
