"""How fast this machine brings this checkpoint from its disk to memory, next to what the disk can do at all.

Cold: before each load every file is dropped from the page cache, and the system is asked whether that worked. The end is the
same for all: every tensor under its name, one byte of each page read. Loaders take turns in an order shuffled anew for each
repeat, after one load each that does not count.

The limit is direct reads of the checkpoint's files, a few at a time, into memory that is there already.
"""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sllmdask.errors import ConfigError, SllmError
from sllmdask.library import load_model, load_state_dict
from sllmdask.loader import libc
from sllmdask.loader.buffers import BufferPool, address_of, lease_nbytes
from sllmdask.loader.format import CheckpointIndex, read_index, variants
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.tiers import StateDict, tensor_views
from sllmdask.units import format_bytes

#: Reads of the limit, and of ours: bytes at a time, and how many at once.
READ_NBYTES, N_READERS = 2 * 1024**2, 4
PAGE = 4096
#: Of the checkpoint's bytes: what has to be available. The pool, a load beside it, and what a loader needs on its way.
NEEDED = 2.5
LIMIT, OURS = "direct reads (the limit)", "sllmdask"
#: Sizes of the generated checkpoint.
_HIDDEN, _MLP, _VOCAB = 1024, 2816, 32000


@dataclass(frozen=True)
class Row:
    """One loader. `seconds` is the median of `runs`, `ratio` what that is to the limit's; ``None`` where it `failed`."""

    name: str
    seconds: float | None
    gb_per_s: float | None
    ratio: float | None
    runs: tuple[float, ...]
    failed: str | None


@dataclass(frozen=True)
class Result:
    """What was measured; `nbytes` are the tensors', `cold` whether no load found anything in the page cache."""

    path: str
    format: str
    nbytes: int
    device: str
    cold: bool
    rows: tuple[Row, ...]


@dataclass
class _Loader:
    """One way to load: `load` returns what keeps the tensors alive, and the tensors."""

    name: str
    load: Callable[[], tuple[object, Iterator[Tensor]]]
    #: The limit: bytes that it reads, which are fewer than the tensors' where all that there is is compressed.
    stored: int | None = None
    runs: list[float] = field(default_factory=list)
    failed: str | None = None

    def row(self, nbytes: int, limit_s: float) -> Row:
        if self.failed is not None:
            return Row(self.name, None, None, None, (), self.failed)
        seconds = statistics.median(self.runs)
        return Row(self.name, seconds, nbytes / seconds / 1e9, seconds / limit_s, tuple(self.runs), None)


def measure(
    path: Path, *, repeats: int = 5, device: str = "cpu", seed: int = 0, on_progress: Callable[[str], None] | None = None
) -> Result:
    """Load the checkpoint at `path` to `device` in every way that there is, `repeats` times each.

    Raises :class:`CheckpointError`, and :class:`ConfigError` where the memory is too small or the device is not there. A loader
    of others that fails is listed with its reason.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_device(device)
    index = read_index(path)
    _check_memory(index.nbytes)
    indexes = [read_index(path, variant) for variant in variants(path)]
    files = sorted({Path(each.path(file.name)) for each in indexes for file in each.files})
    loaders = _loaders(path, index, device)
    cold = _can_check(files[0])
    rng = random.Random(seed)
    gc.collect()
    gc.freeze()  # collections between loads then look at no more than the loads have left
    try:
        for repeat in range(repeats + 1):
            if on_progress is not None:
                on_progress(f"round {repeat} of {repeats}" if repeat else "warming up")
            cold = _take_turns(loaders, rng, files, device, counts=repeat > 0) and cold
    finally:
        gc.unfreeze()
    limit = loaders[0]
    if limit.stored is not None and limit.stored < index.nbytes:
        limit.name += ", scaled to as many bytes as the tensors have"
        limit.runs = [seconds * index.nbytes / limit.stored for seconds in limit.runs]
    limit_s = statistics.median(limit.runs)
    rows = tuple(loader.row(index.nbytes, limit_s) for loader in loaders)
    return Result(str(path), index.format, index.nbytes, device, cold, rows)


def _take_turns(loaders: list[_Loader], rng: random.Random, files: list[Path], device: str, *, counts: bool) -> bool:
    """One load of each; returns whether all of them were cold."""
    cold = True
    turns = [loader for loader in loaders if loader.failed is None]
    rng.shuffle(turns)
    for loader in turns:
        cold = _drop(files) and cold
        seconds = _time(loader, device)
        if counts and seconds is not None:
            loader.runs.append(seconds)
    return cold


def check_device(device: str) -> None:
    """Raise :class:`ConfigError` where `device`, ``cpu`` or ``cuda``, is not there."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"There is no device {device!r} here: torch sees no GPU.", "device")


def _time(loader: _Loader, device: str) -> float | None:
    """Seconds of one load up to its last byte; ``None`` if the loader failed, which it will tell."""
    gc.collect()
    began_s = time.perf_counter()
    try:
        held, tensors = loader.load()
        for tensor in tensors:
            if tensor.numel():
                tensor.detach().flatten().view(torch.uint8)[::PAGE].sum()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began_s
        del held, tensors
    except (SllmError, OSError, RuntimeError, ValueError, ImportError) as error:
        if loader.stored is not None:
            raise
        loader.failed = " ".join(f"{type(error).__name__}: {error}".split())
        return None
    return seconds


def _loaders(path: Path, index: CheckpointIndex, device: str) -> list[_Loader]:
    """The limit first, then ours, then the others'."""
    capacity = max(lease_nbytes(plan_reads(read_index(path, variant), READ_NBYTES).nbytes) for variant in variants(path))
    pool = BufferPool(capacity + 2 * libc.HUGE_PAGE, keep=capacity + 2 * libc.HUGE_PAGE)
    pool.prefault(capacity)
    found = [_Loader(LIMIT, partial(_read_files, index, pool), stored=sum(file.nbytes for file in index.files))]
    if device == "cpu":
        for variant in variants(path):
            of = f", {variant}" if len(variants(path)) > 1 else ""
            found.append(_Loader(f"{OURS} worker{of}", partial(_load_as_worker, path, variant, pool)))
    found.append(_Loader(f"{OURS}.load_state_dict", partial(_load_state_dict, path, device)))
    is_model = (path / "config.json").is_file()
    if is_model:
        found.append(_Loader(f"{OURS}.load_model", partial(_load_model, path, device)))
    if index.format == "safetensors":
        found.append(_Loader("safetensors load_file", partial(_load_safetensors, index, device)))
        if is_model:
            found.append(_Loader("transformers from_pretrained", partial(_from_pretrained, path, device)))
    return found


def _load_as_worker(path: Path, variant: str, pool: BufferPool) -> tuple[object, Iterator[Tensor]]:
    index = read_index(path, variant)
    plan = plan_reads(index, READ_NBYTES)
    buffer = pool.lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), n_threads=N_READERS)
    tensors: StateDict = tensor_views(index, plan, buffer)
    return tensors, iter(tensors.values())


def _load_state_dict(path: Path, device: str) -> tuple[object, Iterator[Tensor]]:
    tensors = load_state_dict(path, device=device)
    return tensors, iter(tensors.values())


def _load_model(path: Path, device: str) -> tuple[object, Iterator[Tensor]]:
    model = load_model(path, device=device)
    return model, model.parameters()


def _load_safetensors(index: CheckpointIndex, device: str) -> tuple[object, Iterator[Tensor]]:
    from safetensors.torch import load_file

    tensors = {name: tensor for file in index.files for name, tensor in load_file(index.path(file.name), device=device).items()}
    return tensors, iter(tensors.values())


def _from_pretrained(path: Path, device: str) -> tuple[object, Iterator[Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=None if device == "cpu" else device)
    return model, model.parameters()


def _read_files(index: CheckpointIndex, pool: BufferPool) -> tuple[object, Iterator[Tensor]]:
    """Every byte of the files by direct reads, to one after the other place of memory that is there."""
    buffer = pool.lease(pool.available)
    address, nbytes = address_of(buffer), buffer.size
    pieces = [(index.path(file.name), offset) for file in index.files for offset in range(0, file.nbytes, READ_NBYTES)]
    lock, fds = threading.Lock(), _open_all(index)

    def work() -> None:
        while True:
            with lock:
                if not pieces:
                    return
                path, offset = pieces.pop(0)
            libc.pread(fds[path], address + offset % (nbytes - READ_NBYTES) // PAGE * PAGE, READ_NBYTES, offset)

    try:
        with ThreadPoolExecutor(N_READERS) as executor:
            for future in [executor.submit(work) for _ in range(N_READERS)]:
                future.result()
    finally:
        for fd in fds.values():
            os.close(fd)
    return buffer, iter(())


def _open_all(index: CheckpointIndex) -> dict[str, int]:
    fds: dict[str, int] = {}
    for file in index.files:
        path = index.path(file.name)
        direct = libc.open_direct(path)
        fds[path] = libc.open_buffered(path) if direct is None else direct
    return fds


# --- cold ------------------------------------------------------------------------------------------------------------


def _drop(files: list[Path]) -> bool:
    """Drop `files` from the page cache; returns whether nothing of them is left there, as far as the system tells."""
    left = 0
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            left += libc.cached_pages(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    return left == 0


def _can_check(path: Path) -> bool:
    """Whether the system tells what of `path` is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, PAGE, 0)
        return libc.cached_pages(fd, 0, PAGE) > 0
    finally:
        os.close(fd)


def _check_memory(nbytes: int) -> None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(found[1]) * 1024 if found else None
    if available is not None and available < NEEDED * nbytes:
        raise ConfigError(
            f"Measuring {format_bytes(nbytes)} needs {format_bytes(NEEDED * nbytes)} of memory, {format_bytes(available)} are "
            "available. Take a smaller checkpoint, or generate one with --size.",
            "size",
        )


# --- a checkpoint where there is none --------------------------------------------------------------------------------


@contextmanager
def generated(nbytes: int, directory: Path) -> Iterator[Path]:
    """A Llama checkpoint of about `nbytes` with random bfloat16 weights, in `directory` for as long as the block lasts.

    Raises :class:`ConfigError` where `directory` is not there, cannot be written to or has too little room.
    """
    try:
        disk = shutil.disk_usage(directory)
        # Some file systems count nothing; whether they take it shows when it is written.
        if disk.total and disk.free < nbytes:
            raise ConfigError(f"{directory} has {format_bytes(disk.free)} free, not {format_bytes(nbytes)}.", "size")
        temporary = tempfile.TemporaryDirectory(prefix="sllmdask-bench-", dir=directory)
    except OSError as error:
        raise ConfigError(f"No checkpoint can be generated in {directory}: {error.strerror}. Choose a --dir.", "dir") from None
    with temporary as made:
        _generate(Path(made), nbytes)
        yield Path(made)


def _generate(directory: Path, nbytes: int) -> None:
    import json

    from safetensors.torch import save_file

    layer: Mapping[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj.weight": (_HIDDEN, _HIDDEN),
        "self_attn.v_proj.weight": (_HIDDEN, _HIDDEN),
        "self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj.weight": (_MLP, _HIDDEN),
        "mlp.up_proj.weight": (_MLP, _HIDDEN),
        "mlp.down_proj.weight": (_HIDDEN, _MLP),
        "input_layernorm.weight": (_HIDDEN,),
        "post_attention_layernorm.weight": (_HIDDEN,),
    }
    layer_nbytes = sum(2 * torch.Size(shape).numel() for shape in layer.values())
    n_layers = max(1, (nbytes - 2 * _VOCAB * _HIDDEN) // layer_nbytes)
    generator = torch.Generator().manual_seed(0)

    def weights(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": weights((_VOCAB, _HIDDEN)), "model.norm.weight": weights((_HIDDEN,))}
    for number in range(n_layers):
        tensors |= {f"model.layers.{number}.{name}": weights(shape) for name, shape in layer.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": n_layers,
        "vocab_size": _VOCAB,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
