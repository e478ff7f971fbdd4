"""The loaders that ``bench_load.py`` compares, and what one load is.

Each contender has a process of its own, which stays: imports are done, threads and heaps are warm, one load of the whole
checkpoint was made and compared byte for byte. Before every load the heap's free memory is given back to the kernel
(``malloc_trim``), so that nobody profits from the pages of the load before; whoever keeps a pool on purpose says so in its name.

The end of a load is the same for all: every tensor is there under its name, and one byte of each of its pages was read.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from scripts.bench_load_measure import MIB, PAGE, BenchError, Bytes, digest, page_sum, weights_in
from scripts.bench_load_process import cpu_seconds, give_back_memory, memory_of_self, reset_peak

#: What a pool is filled with before it is used again, so that bytes of the load before cannot pass for this one's.
POISON = 0xA5


@dataclass(frozen=True)
class Setting:
    """One way to use a contender: environment variables for its process, arguments for its calls."""

    name: str = "default"
    env: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Contender:
    """A loader. The constructor imports what it needs; an :class:`ImportError` there means that it cannot take part."""

    name: ClassVar[str]
    #: Which directory of the work directory it reads: see :data:`FORMATS`.
    format: ClassVar[str] = "safetensors"
    ours: ClassVar[bool] = False
    #: Tried in turn; the fastest one takes part.
    settings: ClassVar[tuple[Setting, ...]] = (Setting(),)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting, self.device = setting, device

    def prepare(self, directory: Path) -> None:
        """What may happen before the clock runs."""

    def load(self, directory: Path) -> Mapping[str, Any]:
        """The tensors by name; whatever keeps them valid is kept until :meth:`finish`."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the load, when nobody holds its tensors any more: back to where :meth:`prepare` found it."""


# --- ours --------------------------------------------------------------------------------------------------------------------


class _Fresh(Contender):
    """Our loader into memory that the process never had."""

    ours = True
    devices = ("cpu", "cuda")

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from sllmdask import load_state_dict
        from sllmdask.loader.kernels import warm_up

        warm_up()
        self._read: Callable[..., Mapping[str, Any]] = load_state_dict

    def load(self, directory: Path) -> Mapping[str, Any]:
        return self._read(directory, device=self.device)


class _Pooled(Contender):
    """Our loader into its pool, whose memory was used before, as in a worker that has unloaded a model."""

    ours = True

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from sllmdask.config import WorkerSettings
        from sllmdask.loader import buffers, plan, reader, tiers
        from sllmdask.loader.format import read_index
        from sllmdask.loader.kernels import warm_up

        warm_up()
        self._buffers, self._plan, self._reader, self._tiers, self._read_index = buffers, plan, reader, tiers, read_index
        defaults = WorkerSettings()
        self._chunk_size, self._n_readers = defaults.chunk_size, defaults.n_readers
        self._pool: Any = None
        self._staging: Any = None

    def _plan_of(self, directory: Path) -> tuple[Any, Any]:
        index = self._read_index(directory)
        return index, self._plan.plan_reads(index, self._chunk_size)

    def prepare(self, directory: Path) -> None:
        _, plan = self._plan_of(directory)
        nbytes = self._buffers.lease_nbytes(plan.nbytes)
        self._pool = self._buffers.BufferPool(nbytes, keep=nbytes)
        self._pool.lease(plan.nbytes).fill(POISON)
        self._pool.prefault(nbytes)
        self._staging = self._buffers.Staging()
        encoded = [chunk.nbytes for chunk in plan.chunks if chunk.codec != "raw"]
        if encoded:
            self._staging.prefault(self._n_readers, max(encoded))

    def load(self, directory: Path) -> Mapping[str, Any]:
        index, plan = self._plan_of(directory)
        buffer = self._pool.lease(plan.nbytes)
        self._reader.read_chunks(plan, self._buffers.address_of(buffer), n_threads=self._n_readers, staging=self._staging)
        tensors: Mapping[str, Any] = self._tiers.tensor_views(index, plan, buffer)
        return tensors

    def finish(self) -> None:
        self._pool = self._staging = None


class SafetensorsFresh(_Fresh):
    name = "sllmdask, safetensors in place"


class SafetensorsPooled(_Pooled):
    name = "sllmdask, safetensors in place, pool"


class Model(Contender):
    """Our ``load_model``: the whole model, as ``from_pretrained`` gives it."""

    name, ours = "sllmdask load_model, safetensors in place", True
    devices = ("cpu", "cuda")

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from sllmdask import load_model

        self._load_model = load_model

    def load(self, directory: Path) -> Mapping[str, Any]:
        tensors: Mapping[str, Any] = self._load_model(directory, device=self.device).state_dict()
        return tensors


class FastFresh(_Fresh):
    name, format = "sllmdask, fast format", "fast"


class FastPooled(_Pooled):
    name, format = "sllmdask, fast format, pool", "fast"


class CompressedFresh(_Fresh):
    name, format = "sllmdask, compressed", "split16"


class CompressedPooled(_Pooled):
    name, format = "sllmdask, compressed, pool", "split16"


# --- torch -------------------------------------------------------------------------------------------------------------------


class TorchLoad(Contender):
    name, format = "torch.load", "torch"
    devices = ("cpu", "cuda")
    mmap: ClassVar[bool] = False

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        import torch

        self._torch = torch

    def load(self, directory: Path) -> Mapping[str, Any]:
        tensors: dict[str, Any] = {}
        for path in weights_in(directory):
            tensors |= self._torch.load(path, map_location=self.device, mmap=self.mmap, weights_only=True)
        return tensors


class TorchLoadMmap(TorchLoad):
    name, mmap = "torch.load, mmap", True


# --- safetensors -------------------------------------------------------------------------------------------------------------


class Safetensors(Contender):
    """The library's own ``load_file``: a mapping of the file."""

    name = "safetensors, mmap"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from safetensors import torch

        self._safetensors = torch

    def load(self, directory: Path) -> Mapping[str, Any]:
        tensors: dict[str, Any] = {}
        for path in weights_in(directory):
            tensors |= self._file(path)
        return tensors

    def _file(self, path: Path) -> Mapping[str, Any]:
        return self._safetensors.load_file(path, device=self.device)


class SafetensorsClone(Safetensors):
    name = "safetensors, mmap and clone"
    devices = ("cpu",)

    def _file(self, path: Path) -> Mapping[str, Any]:
        return {name: tensor.clone() for name, tensor in super()._file(path).items()}


class SafetensorsPread(Safetensors):
    name = "safetensors, pread"

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        if "backend" not in (self._safetensors.load_file.__kwdefaults__ or {}):
            raise ImportError("this version of safetensors has no other backend than mmap")

    def _file(self, path: Path) -> Mapping[str, Any]:
        return self._safetensors.load_file(path, device=self.device, backend="pread")


class SafetensorsBytes(Safetensors):
    name = "safetensors, read() and load"
    devices = ("cpu",)

    def _file(self, path: Path) -> Mapping[str, Any]:
        return self._safetensors.load(path.read_bytes())


# --- transformers ------------------------------------------------------------------------------------------------------------


class FromPretrained(Contender):
    """The whole model, as most programs get it; its tensors are those of ``state_dict()``."""

    name = "transformers from_pretrained"
    devices = ("cpu", "cuda")
    arguments: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._class = transformers.AutoModelForCausalLM

    def load(self, directory: Path) -> Mapping[str, Any]:
        on_device = {} if self.device == "cpu" else {"device_map": self.device}
        return self._class.from_pretrained(directory, dtype="auto", **on_device, **self.arguments).state_dict()


class FromPretrainedRead(FromPretrained):
    name = "transformers from_pretrained, disable_mmap"
    arguments = {"disable_mmap": True}  # noqa: RUF012 - declared as a class variable above


# --- others ------------------------------------------------------------------------------------------------------------------


def _runai_settings() -> tuple[Setting, ...]:
    def setting(name: str, **env: str) -> Setting:
        return Setting(name, {f"RUNAI_STREAMER_{key}": value for key, value in env.items()})

    direct = [
        setting(f"io_uring_direct, depth {depth}", FS_STRATEGY="io_uring_direct", FS_QUEUE_DEPTH=str(depth)) for depth in (16, 64)
    ]
    buffered = [
        setting(
            f"sync_buffered, concurrency {n}, chunk {size} MiB",
            FS_STRATEGY="sync_buffered",
            CONCURRENCY=str(n),
            CHUNK_BYTESIZE=str(size * MIB),
            FS_CHUNK_BYTESIZE=str(size * MIB),
        )
        for n, size in ((4, 2), (8, 8), (16, 2))
    ]
    return (
        setting("default"),
        setting("default, no memory limit", MEMORY_LIMIT="-1"),
        *direct,
        setting("io_uring_direct, no memory limit", FS_STRATEGY="io_uring_direct", MEMORY_LIMIT="-1"),
        setting("libaio_direct", FS_STRATEGY="libaio_direct"),
        *buffered,
    )


class RunaiStreamer(Contender):
    name = "Run:ai Model Streamer"
    devices = ("cpu", "cuda")
    settings = _runai_settings()

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from runai_model_streamer import SafetensorsStreamer

        self._streamer = SafetensorsStreamer

    def load(self, directory: Path) -> Mapping[str, Any]:
        with self._streamer() as streamer:
            streamer.stream_files([str(path) for path in weights_in(directory)], device=self.device)
            return dict(streamer.get_tensors())


class FastSafetensors(Contender):
    name = "fastsafetensors"
    devices = ("cpu", "cuda")
    settings = tuple(
        Setting(f"{n} threads, {size} MiB", arguments={"max_threads": n, "bbuf_size_kb": size * 1024})
        for n, size in ((16, 16), (4, 16), (8, 4), (4, 4))
    )

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from fastsafetensors import SafeTensorsFileLoader

        self._loader = SafeTensorsFileLoader

    def load(self, directory: Path) -> Mapping[str, Any]:
        device = "cuda:0" if self.device == "cuda" else self.device
        loader = self._loader(None, device, nogds=True, **self.setting.arguments)
        loader.add_filenames({0: [str(path) for path in weights_in(directory)]})
        files = loader.copy_files_to_device()
        tensors = {name: files.get_tensor(name) for name in loader.get_keys()}
        files.close()
        loader.close()
        return tensors


class Tensorizer(Contender):
    name, format = "tensorizer", "tensorizer"
    devices = ("cpu", "cuda")
    settings = tuple(Setting("default" if n is None else f"{n} readers", arguments={"num_readers": n}) for n in (None, 1, 4, 8))

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from tensorizer import TensorDeserializer

        self._deserializer = TensorDeserializer

    def load(self, directory: Path) -> Mapping[str, Any]:
        with self._deserializer(str(directory / "model.tensors"), device=self.device, **self.setting.arguments) as tensors:
            return dict(tensors.items())


class InstantTensor(Contender):
    name = "instanttensor"
    devices = ("cuda",)

    def __init__(self, setting: Setting, device: str) -> None:
        super().__init__(setting, device)
        from instanttensor import safe_open

        self._open = safe_open

    def load(self, directory: Path) -> Mapping[str, Any]:
        with self._open([str(path) for path in weights_in(directory)], framework="pt", device=0) as file:
            # What it yields lies in a buffer that it uses again.
            return {name: tensor.clone() for name, tensor in file.tensors()}


CONTENDERS: tuple[type[Contender], ...] = (
    SafetensorsFresh,
    SafetensorsPooled,
    Model,
    FastFresh,
    FastPooled,
    CompressedFresh,
    CompressedPooled,
    TorchLoad,
    TorchLoadMmap,
    Safetensors,
    SafetensorsClone,
    SafetensorsPread,
    SafetensorsBytes,
    FromPretrained,
    FromPretrainedRead,
    RunaiStreamer,
    FastSafetensors,
    Tensorizer,
    InstantTensor,
)

#: Loaders that exist and that no contender here stands for, with the reason.
NOT_HERE = {"serverless-llm-store": "it is built on CUDA or ROCm only, and its Python side needs its own server"}

#: Distributions whose versions belong to the figures.
PACKAGES = (
    "sllmdask",
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "transformers",
    "accelerate",
    "runai-model-streamer",
    "fastsafetensors",
    "tensorizer",
    "instanttensor",
)


def pinned_copy_rate(nbytes: int) -> float:
    """Bytes per second from pinned host memory to the device; the best of five."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(nbytes / (time.perf_counter() - started))
    return max(rates)


# --- formats -----------------------------------------------------------------------------------------------------------------


def _write_torch(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for path in weights_in(source):
        torch.save(load_file(path), target / path.with_suffix(".bin").name)


def _write_tensorizer(source: Path, target: Path) -> None:
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(target / "model.tensors"))
    serializer.write_state_dict({name: tensor for path in weights_in(source) for name, tensor in load_file(path).items()})
    serializer.close()


def _write_fast(source: Path, target: Path) -> None:
    from sllmdask.loader.convert import convert

    target.rmdir()
    convert(source, target, compress="no")


def _write_split16(source: Path, target: Path) -> None:
    from sllmdask.loader.convert import convert

    target.rmdir()
    convert(source, target, compress="yes")


#: Makes the directory of a format (it exists and is empty) from a safetensors checkpoint.
FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "torch": _write_torch,
    "tensorizer": _write_tensorizer,
    "fast": _write_fast,
    "split16": _write_split16,
}


# --- a load ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One load, as its process saw it. Bytes of memory count from before the load, or from before the pool where there is one."""

    seconds: float
    cpu_s: float
    #: Most that was resident during the load.
    peak_nbytes: int
    #: Private memory when the load was done.
    private_nbytes: int
    touch_sum: int
    #: SHA-256 by tensor, if it was asked for.
    digests: dict[str, str] | None = None


class Loading:
    """What a contender's process holds: the contender, and how its loads are measured."""

    def __init__(self, class_: type[Contender], setting: Setting, device: str) -> None:
        self._contender = class_(setting, device)

    def load(self, directory: Path, names: list[str], with_digests: bool) -> Load:
        """Load `directory` once and touch the tensors `names`; their digests are taken after the clock has stopped."""
        contender = self._contender
        give_back_memory()
        resident, private = memory_of_self("VmRSS", "RssAnon")
        contender.prepare(directory)
        reset_peak()
        started, cpu_started = time.perf_counter(), cpu_seconds()
        tensors = contender.load(directory)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise BenchError(f"{len(missing)} tensors are missing, {missing[0]!r} first")
        touch_sum = _touch(tensors, names, contender.device)
        seconds, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu_started
        peak, private_now = memory_of_self("VmHWM", "RssAnon")
        digests = _digests([tensors[name] for name in names], names) if with_digests else None
        del tensors
        gc.collect()
        contender.finish()
        return Load(seconds, cpu_s, peak - resident, private_now - private, touch_sum, digests)


def _bytes_of(tensor: Any) -> Bytes:
    """The bytes of a contiguous tensor in host memory; nothing is copied."""
    import torch

    flat = tensor.detach()
    if not flat.is_contiguous():
        raise BenchError(f"a tensor of shape {tuple(flat.shape)} is not contiguous")
    array: Bytes = flat.reshape(-1).view(torch.uint8).numpy()
    return array


def _touch(tensors: Mapping[str, Any], names: list[str], device: str) -> int:
    """Read a byte of every page of every tensor, where it lies; the sum is known in advance."""
    if device == "cpu":
        return sum(page_sum(_bytes_of(tensors[name])) for name in names)
    import torch

    total = torch.zeros((), dtype=torch.int64, device=device)
    for name in names:
        flat = tensors[name].detach().reshape(-1).view(torch.uint8)
        total += flat[::PAGE].sum() + flat[-1]
    return int(total)


def _digests(tensors: list[Any], names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(lambda tensor: digest(_bytes_of(tensor.cpu())), tensors), strict=True))
