"""What decides on the bits of a result besides model and input: the machine, the libraries, and how the engine computes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sllmdask.engine.construct import Skeleton
from sllmdask.engine.linears import matrices_outside
from sllmdask.errors import UnsupportedArchitecture

#: Whose arithmetic is in a forward pass.
_LIBRARIES = ("torch", "transformers", "numba")
#: What ``/proc/cpuinfo`` says of a processor that libraries choose their code by.
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")

#: Where the modules of activation functions are defined.
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
#: Numbers that torch's elementwise kernels take at a time, at most; elements below which they use one thread.
_STRIDE, _GRAIN = 64, 1 << 15


def numerics_id(device: torch.device, dtype: torch.dtype, mode: str) -> str:
    """Equal for two engines whose results can be equal bit by bit, readable, and otherwise to be compared only.

    ``cpu/AVX512-1f3a9c02/bfloat16/torch-2.13.0/transformers-5.23.0/numba-0.65.1/deterministic``.
    """
    return "/".join((device.type, _processor(device), str(dtype).removeprefix("torch."), *_versions(), mode))


def refuse_batch_dependence(skeleton: Skeleton) -> None:
    """Raise :class:`UnsupportedArchitecture` if a row of this model may depend on its neighbours by construction."""
    matrices = matrices_outside(skeleton.model)
    stacked = next((name for name, matrix in matrices.items() if matrix.dim() > 2), None)
    architecture = skeleton.family.architecture
    if stacked is not None:
        raise UnsupportedArchitecture(
            architecture,
            f"with engine.deterministic, a mixture of experts ({stacked}) is not served: "
            "the products of an expert depend on how many rows of the batch were sent to it",
        )
    if matrices:
        raise UnsupportedArchitecture(
            architecture, f"with engine.deterministic, {next(iter(matrices))} is not served: its product may depend on the batch"
        )


class EvenActivations:
    """Makes the activation functions of `model` give a number the same bits wherever it is in the tensor.

    torch computes exponentials and the like in vectors, and the numbers left over at the end, or at the end of a thread's share,
    by another formula. Which those are depends on how many rows there are. Here, none are left over: tensors of an uneven size
    are padded. The modules stay as they are but for their ``forward``, until :meth:`close`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [module for module in model.modules() if type(module).__module__ in _ACTIVATIONS]
        for module in self._modules:
            module.__dict__["forward"] = _Even(module.forward)

    def close(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules.clear()


class _Even:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def __call__(self, numbers: Tensor) -> Tensor:
        n_all = _even(numbers.numel(), torch.get_num_threads())
        if n_all == numbers.numel() and numbers.is_contiguous():
            return self._function(numbers)
        padded = numbers.new_zeros(n_all)
        padded[: numbers.numel()] = numbers.reshape(-1)
        return self._function(padded)[: numbers.numel()].view(numbers.shape)


def _even(n_numbers: int, n_threads: int) -> int:
    """The least number above that torch divides into whole strides, for as many threads as it gives that number to."""
    while True:
        n_shares = max(1, min(n_threads, math.ceil(n_numbers / _GRAIN)))
        even = math.ceil(n_numbers / (n_shares * _STRIDE)) * n_shares * _STRIDE
        if even == n_numbers:
            return even
        n_numbers = even


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    return tuple(f"{name}-{importlib.metadata.version(name)}" for name in _LIBRARIES)


@lru_cache(maxsize=8)
def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device).replace(' ', '-')}-sm{major}{minor}"
    told: dict[str, str] = {"machine": platform.machine()}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _PROCESSOR:
                told.setdefault(name.strip(), value.strip())
    digest = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:8]
    return f"{torch.backends.cpu.get_cpu_capability()}-{digest}"
