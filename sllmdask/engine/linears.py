"""Linear layers over weights that oneDNN has rearranged for its own kernels, once instead of in every product.

With a few rows in the batch, products are faster by 1.3 to 2 times, and a row's bits do not depend on how many rows there are.
Only for a single row oneDNN has another kernel: layers that are to be `invariant` compute it twice.

A packed layer stays the module that it was, with its hooks and its name; only what its ``forward`` does is exchanged, and
exchanged back by :meth:`LinearPacker.close`.

The operators are private to torch. They are tried once (:func:`can_pack`); where they are missing or compute something else,
layers stay as they are.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from queue import Empty, Queue
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from sllmdask.batching.memory import Kind, MemoryAccount, MemoryLedger
from sllmdask.engine.sizing import available_memory

log = logging.getLogger(__name__)

#: Packed weights that wait for the end of a step, at most: until then there are both copies.
_N_READY = 8

#: Rows and columns of a packed weight are multiples of a divisor of it.
_BLOCK = 64
#: Elements of a weight below which a single row takes longer over the packed one, which costs 10 us a call. On one thread, a row
#: and eight rows: 512 x 512 in float32 15 us plain, 24 us packed, and 60 against 33; 256 x 256 in bfloat16 16 and 12, 17 and 13.
LEAST_NUMEL = {torch.float32: 2**19, torch.bfloat16: 2**16}
#: Added to the nice value of the thread that packs while others serve.
_NICENESS = 10


@dataclass(frozen=True)
class Packing:
    """When weights are packed, and how much memory that may take."""

    #: ``always``: before the first token, which comes later by that. ``auto``: when the model is hot, and where it pays.
    mode: Literal["auto", "always", "never"] = "auto"
    #: Steps with work after which a model is hot.
    after_steps: int = 32
    #: Bytes that packed copies beside plain ones may take; 0: half of what is available when packing begins. In any case, no more
    #: than the packer is given of the memory that it shares with others.
    memory: int = 0
    #: Whether a row's bits shall be the same alone and among others.
    invariant: bool = False


class PackedLinear:
    """``rows @ weight.T + bias`` over a packed weight: the ``forward`` of a packed layer."""

    __slots__ = ("bias", "invariant", "n_out", "nbytes", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, invariant: bool = False) -> None:
        """`weight` (n_out, n_in) is read, not kept."""
        self.n_out = weight.shape[0]
        self.invariant = invariant
        with torch.inference_mode():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias
        self.nbytes = int(torch.ops.mkldnn._nbytes(self.weight))

    def __call__(self, rows: Tensor) -> Tensor:
        if not rows.numel():
            return rows.new_empty(*rows.shape[:-1], self.n_out)
        if self.invariant and rows.numel() == rows.shape[-1]:
            twice = self._product(rows.reshape(1, -1).expand(2, -1).contiguous())
            return twice[:1].view(*rows.shape[:-1], self.n_out)
        return self._product(rows)

    def _product(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(rows, self.weight, self.bias, "none", [], "")


@lru_cache(maxsize=8)
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch packs weights of `dtype` here, and computes the same with them; tried once in a process."""
    n_in, n_out = 80, 48
    weight = torch.linspace(-3, 3, n_out * n_in).sin().view(n_out, n_in).to(dtype)
    bias = torch.linspace(-1, 1, n_out).to(dtype)
    try:
        if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
            raise NotImplementedError("not for this dtype, or built without oneDNN")
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise NotImplementedError("the processor has no bfloat16")
        packed = PackedLinear(weight, bias)
        for n_rows in (1, 5):
            rows = torch.linspace(-2, 2, n_rows * n_in).cos().view(1, n_rows, n_in).to(dtype)
            found, expected = packed(rows).float(), linear(rows.float(), weight.float(), bias.float())
            if not torch.allclose(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2):
                raise NotImplementedError("its products differ from the plain ones")
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("weights are not packed: dtype=%s cause=%s", dtype, str(error).partition("\n")[0])
        return False
    return True


def packable(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of `model` that compute a plain linear map of their rows, in the order of the modules."""
    for module in model.modules():
        if type(module).forward in (torch.nn.Linear.forward, Conv1D.forward):
            yield module


def matrices_outside(model: torch.nn.Module) -> dict[str, Tensor]:
    """By name, the parameters with two dimensions or more that belong to no packable layer and no embedding."""
    inside = {id(module) for module in packable(model)}
    return {
        f"{path}.{key}": parameter
        for path, module in model.named_modules()
        if id(module) not in inside and not isinstance(module, torch.nn.Embedding)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    }


class LinearPacker:
    """Packs the linear layers of one model: now (:meth:`pack`), or on a thread of its own (:meth:`start`) and in between steps.

    :meth:`pack` may be called on another thread than the rest, for layers that do not run yet.
    """

    def __init__(self, model: torch.nn.Module, packing: Packing, owned: set[int], memory: MemoryAccount | None = None) -> None:
        """`owned`: addresses of plain weights that nobody else needs. Such a one is dropped when its layer has the packed one.

        `memory` is asked for each layer, and owned weights that are dropped are given back to it; by default, nobody is asked.
        """
        self._model = model
        self._packing = packing
        self._owned = owned
        self._memory = MemoryLedger(sys.maxsize).account("packing") if memory is None else memory
        #: Bytes of packed weights in use.
        self.nbytes = 0
        #: Of these, and of those that are ready, bytes beside a plain copy that stays.
        self._n_beside = 0
        self._limit: int | None = None
        self._installed: list[tuple[torch.nn.Module, PackedLinear]] = []
        self._ready: Queue[tuple[torch.nn.Module, PackedLinear]] = Queue(_N_READY)
        self._thread: threading.Thread | None = None
        #: Whether a layer stayed plain because there was no memory for it.
        self.full = False
        self._stopped = False

    @property
    def n_packed(self) -> int:
        """Layers that run over packed weights."""
        return len(self._installed)

    @property
    def ended(self) -> bool:
        """Nothing is being packed in the background, and nothing that was waits to be used."""
        return (self._thread is None or not self._thread.is_alive()) and self._ready.empty()

    def expected_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that packing takes beside plain weights in `dtype`, if all of them are lent; the model need not have them yet."""
        if self._packing.mode == "never":
            return 0
        every = self._packing.mode == "always"
        sizes = [_packed_nbytes(layer, dtype.itemsize) for layer in packable(self._model) if every or _pays(layer, dtype)]
        return min(sum(sizes), self._packing.memory or sys.maxsize)

    def pack(self, module: torch.nn.Module) -> None:
        """Pack the layers of `module` at once and use them, as far as they may take memory."""
        for layer in packable(module):
            if self._reserve(layer):
                self._use(layer, _pack(layer, self._packing.invariant))

    def start(self) -> None:
        """Begin to pack what is not packed, on a thread that gives way to others. Once."""
        if self._thread is None:
            done = {id(layer) for layer, _ in self._installed}
            left = [layer for layer in packable(self._model) if id(layer) not in done and _pays(layer)]
            self._thread = threading.Thread(target=self._pack_all, args=(left,), name="sllmdask-packing", daemon=True)
            self._thread.start()

    def install(self) -> None:
        """Use what is ready. Between two steps."""
        with suppress(Empty):
            while True:
                self._use(*self._ready.get_nowait())

    def close(self) -> None:
        """Give the layers their own ``forward`` back, and let go of every packed weight."""
        self._stopped = True
        with suppress(Empty):
            while True:
                self._ready.get_nowait()
        if self._thread is not None:
            # There is room for what it has in hand.
            self._thread.join()
            self._thread = None
        for layer, _ in self._installed:
            layer.__dict__.pop("forward", None)
        self._installed.clear()
        self._ready = Queue(_N_READY)
        self._memory.clear(Kind.PACKED)
        self.nbytes = self._n_beside = 0

    def _use(self, layer: torch.nn.Module, packed: PackedLinear) -> None:
        layer.__dict__["forward"] = packed
        self._installed.append((layer, packed))
        self.nbytes += packed.nbytes
        weight = layer._parameters["weight"]
        assert weight is not None
        expected = _packed_nbytes(layer, weight.itemsize)
        if packed.nbytes <= expected:
            self._memory.release(Kind.PACKED, expected - packed.nbytes)
        else:
            self._memory.take(Kind.PACKED, packed.nbytes - expected)
        if weight.data_ptr() in self._owned:
            self._owned.discard(weight.data_ptr())
            self._memory.release(Kind.CONVERTED, min(weight.nbytes, self._memory.held(Kind.CONVERTED)))
            # Of the same dtype: models ask for it.
            hollow = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            layer._parameters["weight"] = torch.nn.Parameter(hollow, requires_grad=False)

    def _reserve(self, layer: torch.nn.Module) -> bool:
        weight = layer._parameters["weight"]
        assert weight is not None
        nbytes = _packed_nbytes(layer, weight.itemsize)
        beside = 0 if weight.data_ptr() in self._owned else nbytes
        if self._limit is None:
            self._limit = self._packing.memory or available_memory() // 2
        if (beside and self._n_beside + beside > self._limit) or not self._memory.offer(Kind.PACKED, nbytes):
            if not self.full:
                free = self._memory.ledger.free
                log.info("some layers stay plain: packed=%d limit=%d free=%d", self._n_beside, self._limit, free)
            self.full = True
            return False
        self._n_beside += beside
        return True

    def _pack_all(self, layers: list[torch.nn.Module]) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        for number, layer in enumerate(layers):
            if self._stopped or not self._reserve(layer):
                return
            try:
                self._ready.put((layer, _pack(layer, self._packing.invariant)))
            except (MemoryError, RuntimeError) as error:
                log.warning("packing stopped: packed=%d plain=%d cause=%s", number, len(layers) - number, error)
                weight = layer._parameters["weight"]
                self._memory.release(Kind.PACKED, 0 if weight is None else _packed_nbytes(layer, weight.itemsize))
                return


def _pays(layer: torch.nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether a single row is not slower over the packed weight. `dtype`: what it will be in."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.numel() >= LEAST_NUMEL[dtype or weight.dtype]


def _packed_nbytes(layer: torch.nn.Module, itemsize: int) -> int:
    """Bytes of the packed weight: oneDNN fills up what is not a multiple of its blocks."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return math.prod(-(-size // _BLOCK) * _BLOCK for size in weight.shape) * itemsize


def _pack(layer: torch.nn.Module, invariant: bool) -> PackedLinear:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    rows = weight.detach().t() if isinstance(layer, Conv1D) else weight
    return PackedLinear(rows, None if bias is None else bias.detach(), invariant=invariant)
