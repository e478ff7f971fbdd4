"""Checkpoints as tests need them: well-made ones by safetensors itself, damaged ones byte by byte."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import safetensors.torch
import torch

from sllmdask.config import WorkerSettings
from sllmdask.loader import libc
from sllmdask.loader.buffers import lease_nbytes
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.shared_pool import SharedPool
from sllmdask.loader.store import CheckpointStore
from tests.loader.serving import Site
from tests.loader.stores import CHUNK, Gate, N

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def write_sharded() -> Callable[[Path, list[Tensors]], Path]:
    """``write_sharded(directory, shards)``: safetensors files, their index and a config, as the hub has them."""

    def write(directory: Path, shards: list[Tensors]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        weight_map = {}
        for number, tensors in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            safetensors.torch.save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (directory / "config.json").write_text('{"model_type": "test"}')
        return directory

    return write


@pytest.fixture
def write_single() -> Callable[[Path, Tensors], Path]:
    """``write_single(directory, tensors)``: one ``model.safetensors`` and a config."""

    def write(directory: Path, tensors: Tensors) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "test"}')
        return directory

    return write


@pytest.fixture
def write_raw() -> Callable[..., Path]:
    """``write_raw(path, header, data)``: a file with just this header, given as text or as what JSON makes of it."""

    def write(path: Path, header: object, data: bytes = b"") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def assert_equal() -> Callable[[Tensors, Tensors], None]:
    """Same names, dtypes, shapes and bytes: NaN and every 8-bit float included."""

    def check(actual: Tensors, expected: Tensors) -> None:
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
            assert actual[name].is_contiguous(), name
            if tensor.numel():
                theirs, ours = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, actual[name]))
                assert torch.equal(ours, theirs), name

    return check


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Grows by (offset, nbytes) with each read of tensor data."""
    seen: list[tuple[int, int]] = []
    pread = libc.pread

    def counting(fd: int, address: int, nbytes: int, offset: int) -> int:
        seen.append((offset, nbytes))
        return pread(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "pread", counting)
    return seen


@pytest.fixture
def cold() -> Callable[[Path], Path]:
    """``cold(directory)``: what is in its files is not in the page cache any more."""

    def forget(directory: Path) -> Path:
        for path in directory.iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        return directory

    return forget


@pytest.fixture
def models(tmp_path: Path, write_single: Callable[[Path, Tensors], Path]) -> dict[str, Path]:
    """Directories of three models of one size, by name; the tensor of each says which it is: 0, 1 or 2."""
    return {name: write_single(tmp_path / name, {"w": torch.full((N,), float(i))}) for i, name in enumerate("abc")}


@pytest.fixture
def size(models: dict[str, Path]) -> int:
    """Bytes of a pool that each of the models takes."""
    return lease_nbytes(plan_reads(read_index(models["a"]), CHUNK).nbytes)


@pytest_asyncio.fixture(params=["private", "shared"])
async def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[CheckpointStore]]]:
    """``await new_store(capacity)``: a store over either pool, closed after the test. All of one test share a pool, or none."""
    name, stores = f"test-{uuid.uuid4()}", []

    async def new(capacity: int, **settings: object) -> CheckpointStore:
        settings = {"chunk_size": CHUNK, "n_readers": 2, "store_dir": str(tmp_path / "store"), **settings}
        pool = PrivatePool(capacity) if request.param == "private" else SharedPool(name, capacity, grace_s=0.0, trim_s=0.0)
        stores.append(CheckpointStore(WorkerSettings.model_validate(settings), pool))
        await stores[-1].start()
        return stores[-1]

    yield new
    for store in stores:
        await store.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every read of tensor data comes by here."""
    gate = Gate()
    monkeypatch.setattr(libc, "pread", gate.pread)
    yield gate
    gate.open()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A hub that this process asks, without models, and without a cache of what it had before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with Site(tmp_path / "hub", hub=True) as site:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", site.url)
        yield site


@pytest.fixture
def n_fds() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tensors() -> Tensors:
    """Twenty layers of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return {f"model.layers.{i}.weight": torch.randn(100 + 37 * i, 33, generator=generator) for i in range(20)}


@pytest.fixture
def checkpoint(tmp_path: Path, write_sharded: Callable[[Path, list[Tensors]], Path], tensors: Tensors) -> Path:
    """Two shards of `tensors`, of some 20 chunks, small files, and one that is no part of a checkpoint."""
    names = sorted(tensors)
    directory = write_sharded(tmp_path / "origin", [{n: tensors[n] for n in names[:9]}, {n: tensors[n] for n in names[9:]}])
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "README.md").write_text("not wanted")
    return directory


@pytest.fixture
def name() -> str:
    """Of a pool that no other test knows."""
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture
def fenced() -> Iterator[Callable[[int], tuple[int, int]]]:
    """``fenced(n_pages)``: begin and end of writable memory outside of which any access kills the process."""
    taken: list[tuple[int, int]] = []
    page = os.sysconf("SC_PAGESIZE")

    def fence(n_pages: int) -> tuple[int, int]:
        start = libc.reserve_addresses((n_pages + 2) * page)
        taken.append((start, (n_pages + 2) * page))
        fd = os.memfd_create("fenced")
        os.ftruncate(fd, n_pages * page)
        libc.map_shared(fd, 0, n_pages * page, start + page)
        os.close(fd)
        return start + page, start + (n_pages + 1) * page

    yield fence
    for start, nbytes in taken:
        libc.unmap_memory(start, nbytes)
