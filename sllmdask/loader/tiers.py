"""What the weights of a model look like in a tier. The only place of the loader that knows torch.

On disk a checkpoint is an index and bytes (:mod:`sllmdask.loader.format`), in host memory it is one buffer with tensors over
it, which is made here.
"""

from __future__ import annotations

import torch

from sllmdask.loader.buffers import Buffer
from sllmdask.loader.format import CheckpointIndex, TensorEntry
from sllmdask.loader.plan import ReadPlan

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
    "C64": torch.complex64,
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
            views[tensor.name] = torch.empty(shape, dtype=dtype)
            continue
        count, position = tensor.nbytes // dtype.itemsize, plan.positions[tensor.name]
        views[tensor.name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=position).reshape(shape)
    return views
