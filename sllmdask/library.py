"""The loader for anybody's script: tensors or a transformers model from a checkpoint, and back. No Dask, no server.

Bytes are read by several threads while transformers builds the model; parameters on the CPU are the memory that was read, not
copies. transformers' own ``from_pretrained`` puts them in place, so that every architecture that it knows comes out right, also
where a checkpoint has other names than the modules, or experts that must be fused. It is given tensors that say their names and
shapes at once, and their values when they have arrived.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import transformers
from torch import Tensor

from sllmdask.engine.families import read_config
from sllmdask.errors import CheckpointCorrupt, ConfigError, InsufficientMemory, SllmError, UnsupportedArchitecture
from sllmdask.loader import tiers
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.convert import write_checkpoint
from sllmdask.loader.device import load_to_device
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import ReadPlan, plan_reads
from sllmdask.loader.reader import read_chunks

#: (bytes so far, bytes in all): never backwards, and equal at the end.
Progress = Callable[[int, int], None]

#: Bytes of one read.
_CHUNK_NBYTES = 4 * 1024**2
_HUGE_PAGE = 2 * 1024**2

#: What transformers raises over a configuration or weights that it cannot make a model of.
_REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    n_readers: int = 4,
    verify: bool = True,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The tensors of the checkpoint at `path`, our format or safetensors, a directory or one file, by name.

    On the CPU they lie over memory that is the caller's alone, and may be written to; the memory of one is given back when
    nothing refers to it any more. `dtype` converts what is floating point. `verify`: compare the checksums of our format.
    `progress` is called from any thread.

    Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt` (which names file and tensor), :class:`OSError`.
    """
    if torch.device(device).type == "cuda" and dtype is None:
        return load_to_device(path, device, n_readers=n_readers, verify=verify, progress=progress)
    with _Reading(path, n_readers, verify, progress) as reading:
        loaded = {}
        for name in list(reading.tensors):
            tensor = reading.take(name)
            loaded[name] = tensor.to(device, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            del tensor
    return loaded


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    model_class: str | type[Any] | None = None,
    attn_implementation: str | None = None,
    n_readers: int = 4,
    verify: bool = True,
    progress: Progress | None = None,
    torch_dtype: str | torch.dtype | None = None,
    hf_model_class: str | None = None,
    storage_path: str | os.PathLike[str] | None = None,
    fully_parallel: bool = True,
) -> Any:
    """The transformers model in the directory `path`, whose weights are in our format or safetensors, in eval mode.

    What it returns is what ``from_pretrained(path, dtype=dtype)`` returns, sooner. `dtype`: as there, ``auto`` being what
    ``config.json`` says, or else what the weights are in. `model_class`: a class of transformers or its name, an ``AutoModel...``
    too; by default the class that ``config.json`` names. All goes to `device`, by default the CPU; or `device_map`, ``auto`` or a
    dict of modules to devices, spreads the model over several devices by accelerate, within `max_memory`; nothing is put on disk.
    `verify` and `progress` as in :func:`load_state_dict`. On the CPU parameters are the caller's own memory: it may train them.

    The last four are for scripts that were written for ServerlessLLM's function of this name: other names of `dtype` and
    `model_class`, the directory that `path` is in, and whether the model is built while it is read, which it always is.

    Besides what :func:`load_state_dict` raises: :class:`CheckpointCorrupt` where a weight of the model is missing or of another
    shape, :class:`UnsupportedArchitecture` where transformers cannot build it or its weights are quantized, :class:`ConfigError`,
    :class:`InsufficientMemory` of a device.
    """
    del fully_parallel
    dtype = torch_dtype if torch_dtype is not None else dtype
    model_class = hf_model_class if hf_model_class is not None else model_class
    directory = Path(path) if storage_path is None else Path(storage_path) / path
    with _Reading(directory, n_readers, verify, progress) as reading:
        description = read_config(directory)
        architecture = str((description.get("architectures") or [description.get("model_type", "unknown")])[0])
        if quantization := description.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise UnsupportedArchitecture(architecture, f"its weights are quantized ({method}); load the unquantized model")
        _check_arguments(device, dtype, device_map)
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            chosen = _class_of(model_class, config, architecture)
            model, info = chosen.from_pretrained(
                None,
                config=config,
                state_dict={name: _Arriving(reading, name) for name in reading.tensors},
                dtype=dtype,
                device_map=_device_map(device, device_map),
                max_memory=max_memory,
                generation_config=_generation_config(directory),
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info()
            raise InsufficientMemory(str(directory), reading.nbytes, free) from error
        except SllmError:
            raise
        except _REFUSALS as error:
            raise UnsupportedArchitecture(architecture, f"transformers cannot build it ({error})") from error
    for name, found, expected in info["mismatched_keys"]:
        reason = f"its shape is {list(found)}, but config.json asks for {list(expected)}"
        raise CheckpointCorrupt(str(directory), name, reason)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointCorrupt(str(directory), missing[0], f"it is missing, with {len(missing) - 1} others")
    model.config.name_or_path = str(directory)
    return model


def save_model(
    model: torch.nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    compress: str = "no",
    overwrite: bool = False,
) -> None:
    """Write a transformers model to the directory `path` in our format, with its configuration: :func:`load_model` reads it.

    Of any other module, and of a mapping of names to tensors, the tensors alone are written: :func:`load_state_dict` reads them.
    `compress`: ``no``, ``yes`` (lossless, 16-bit weights get smaller), ``both``. `overwrite` replaces a checkpoint that is there,
    unless other files in its directory would be lost.

    Raises :class:`CheckpointExists`, :class:`DiskFull`, :class:`TensorUnsupported` (quantized weights, those that are not in
    memory, and what is no tensor), :class:`ConfigError`, :class:`CheckpointError` where `path` cannot be written. Whatever it
    raises, nothing is left, and what was at `path` is as it was.
    """
    if compress not in ("no", "yes", "both"):
        raise ConfigError(f"compress must be 'no', 'yes' or 'both', not {compress!r}", "compress")
    if isinstance(model, torch.nn.Module):
        tensors: Mapping[str, Tensor] = model.state_dict()
        beside = _configuration_of(model)
    elif isinstance(model, Mapping) and all(isinstance(name, str) for name in model):
        tensors, beside = model, {}
    else:
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        known = "a transformers model, another torch.nn.Module, or a mapping of names (str) to tensors"
        raise ConfigError(f"model must be {known}; this {kind} is none of them", "model")
    write_checkpoint(tiers.sources_of(tensors), path, files_beside=beside, compress=compress, overwrite=overwrite)


def _configuration_of(model: torch.nn.Module) -> dict[str, bytes]:
    """The files that tell how to build `model` and to generate with it, as far as it says."""
    beside = {}
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    if isinstance(config, transformers.PreTrainedConfig):
        config = copy.deepcopy(config)
        if isinstance(model, transformers.PreTrainedModel):
            config.architectures = [type(model).__name__]
            config.dtype = str(model.dtype).removeprefix("torch.")
        beside["config.json"] = config.to_json_string(use_diff=True).encode()
    generates = not isinstance(model, transformers.PreTrainedModel) or model.can_generate()
    if generates and isinstance(generation_config, transformers.GenerationConfig):
        beside["generation_config.json"] = generation_config.to_json_string(use_diff=True).encode()
    return beside


# --- which model, and where it goes ---


def _class_of(wanted: str | type[Any] | None, config: Any, architecture: str) -> Any:
    """The class to build. Raises :class:`UnsupportedArchitecture` or :class:`ConfigError`."""
    if wanted is None:
        found = getattr(transformers, architecture, None)
        if found is None:
            reason = "this transformers has no such class; name one as model_class"
            raise UnsupportedArchitecture(architecture, reason)
        return found
    found = getattr(transformers, wanted, None) if isinstance(wanted, str) else wanted
    if found is None:
        raise ConfigError(f"transformers has no class {wanted!r}", "model_class")
    mapping = getattr(found, "_model_mapping", None)
    if mapping is None:
        return found
    if type(config) not in mapping:
        raise UnsupportedArchitecture(architecture, f"{found.__name__} does not build models of type {config.model_type!r}")
    mapped = mapping[type(config)]
    if not isinstance(mapped, list | tuple):
        return mapped
    return next((candidate for candidate in mapped if candidate.__name__ == architecture), mapped[0])


def _check_arguments(
    device: str | torch.device | None, dtype: str | torch.dtype, device_map: str | Mapping[str, Any] | None
) -> None:
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map exclude each other: give one of them", "device_map")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"torch knows no dtype {dtype!r}", "dtype")
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"torch knows no device {device!r}: {str(error).splitlines()[0]}", "device") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(device)!r}, but torch sees no GPU here", "device")
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise ConfigError("device_map puts modules on disk; this loader keeps every weight in memory", "device_map")


def _device_map(device: str | torch.device | None, device_map: str | Mapping[str, Any] | None) -> Any:
    if device_map is not None:
        return device_map if isinstance(device_map, str) else dict(device_map)
    return None if device is None or torch.device(device).type == "cpu" else {"": torch.device(device)}


def _generation_config(directory: Path) -> Any:
    """As ``from_pretrained`` finds it: from its own file, or from what old checkpoints say in ``config.json``."""
    if (directory / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return transformers.GenerationConfig.from_pretrained(
        directory, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


# --- reading ---


class _Reading:
    """A checkpoint that threads read into private memory while the block of the ``with`` statement runs.

    At the end of the block all has been read, or what the read has failed of is raised; if the block raises, the read is called
    off.
    """

    def __init__(self, path: str | os.PathLike[str], n_readers: int, verify: bool, progress: Progress | None) -> None:
        index = read_index(path)
        self.nbytes = index.nbytes
        plan = plan_reads(index, _CHUNK_NBYTES)
        if not verify:
            plan = replace(plan, chunks=tuple(replace(chunk, checksum=None) for chunk in plan.chunks))
        memory, buffer = _private_memory(plan.nbytes)
        #: By name, in the order of a forward pass; the bytes behind them are on their way.
        self.tensors = _in_order(_on_pages_of_their_own(tiers.tensor_views(index, plan, buffer), memory), plan)
        self.arrivals = Arrivals(plan)
        self._cancel = threading.Event()
        on_progress = None if progress is None else lambda done: progress(done, plan.payload)
        self._thread = threading.Thread(
            target=_read,
            args=(plan, buffer),
            kwargs={"arrivals": self.arrivals, "n_threads": n_readers, "on_progress": on_progress, "cancel": self._cancel},
            name="read-0",
        )

    def take(self, name: str) -> Tensor:
        """The tensor of this name, once its bytes are there; it can be taken once. Raises what the read has failed of."""
        self.arrivals.wait((name,))
        return self.tensors.pop(name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._cancel.set()
        self._thread.join()
        if error is None:
            self.arrivals.wait(())


def _read(plan: ReadPlan, buffer: np.ndarray[Any, np.dtype[np.uint8]], **options: Any) -> None:
    # `arrivals` has what is raised here, and raises it where somebody waits.
    with suppress(BaseException):
        read_chunks(plan, buffer.__array_interface__["data"][0], **options)


class _Arriving:
    """What ``from_pretrained`` takes for a tensor: it knows what it will be, and becomes it when it is asked for its values."""

    def __init__(self, reading: _Reading, name: str) -> None:
        self._reading, self._name = reading, name
        tensor = reading.tensors[name]
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self._reading.take(self._name)[index]


def _private_memory(nbytes: int) -> tuple[mmap.mmap, np.ndarray[Any, np.dtype[np.uint8]]]:
    """A mapping, and `nbytes` of it that begin on a huge page."""
    memory = mmap.mmap(-1, max(nbytes, 1) + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.__array_interface__["data"][0] % _HUGE_PAGE
    return memory, whole[start : start + nbytes]


class _Pages:
    """The bytes of one tensor. When no tensor is over them any more, the pages that it had to itself go back to the system."""

    def __init__(self, memory: mmap.mmap, address: int, start: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        first = math.ceil(start / mmap.PAGESIZE) * mmap.PAGESIZE
        inside = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        # It holds the mapping. Not at exit: it goes back as a whole then.
        weakref.finalize(self, _give_back, memory, first, inside).atexit = False


def _give_back(memory: mmap.mmap, start: int, nbytes: int) -> None:
    if nbytes > 0:
        memory.madvise(mmap.MADV_DONTNEED, start, nbytes)


def _on_pages_of_their_own(views: Mapping[str, Tensor], memory: mmap.mmap) -> dict[str, Tensor]:
    """The same tensors, each of which frees its memory when it goes, although the others stay; aliases stay aliases."""
    base = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    bytes_at: dict[int, Tensor] = {}
    tensors = {}
    for name, view in views.items():
        if not view.numel():
            tensors[name] = view
            continue
        address, nbytes = view.data_ptr(), view.untyped_storage().nbytes()
        if address not in bytes_at:
            bytes_at[address] = torch.frombuffer(np.asarray(_Pages(memory, address, address - base, nbytes)), dtype=torch.uint8)
        tensors[name] = bytes_at[address].view(view.dtype).as_strided(view.shape, view.stride())
    return tensors


def _in_order(tensors: dict[str, Tensor], plan: ReadPlan) -> dict[str, Tensor]:
    last = {name: max(plan.chunks_of[name], default=-1) for name in tensors}
    return dict(sorted(tensors.items(), key=lambda item: last[item[0]]))
