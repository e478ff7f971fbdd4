"""The way to a device, against one whose memory is another buffer and whose copies run as late as they may; CUDA at the end."""

from __future__ import annotations

import errno
import gc
import os
import queue
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllmdask.errors import Cancelled, CheckpointCorrupt, ConfigError, InsufficientMemory
from sllmdask.loader import device as device_module
from sllmdask.loader import libc, tiers, writer
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Buffer, BufferPool, address_of
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.device import (
    CudaDevice,
    DeviceCopy,
    Layout,
    Pins,
    Ring,
    copy_behind,
    lay_out,
    load_to_device,
    pinned,
    ring_nbytes,
    stream_through,
)
from sllmdask.loader.format import CheckpointIndex, read_index
from sllmdask.loader.plan import ChunkRead, ReadPlan, plan_reads
from sllmdask.loader.reader import LocalFiles, read_chunks
from sllmdask.loader.tiers import device_views, sources_of
from sllmdask.loader.writer import write_checkpoint
from tests.loader.tensors import assert_same, octets

KiB = 1024
CHUNK = 32 * KiB
pytestmark = pytest.mark.usefixtures("no_thread_is_left")

Tensors = dict[str, torch.Tensor]


class Broken(Exception):
    """What a device that is told to fail raises."""


class FakeDevice:
    """A device whose memory is another buffer of this process.

    A copy runs when it is waited for and no sooner, or, with `threaded`, on another thread as soon as it can: a source that is
    used again too early, or a wait that is missing, shows as a wrong byte. A copy that leaves the memory, or that comes from
    memory that is not locked or was locked in two pieces, is an error, as it is (or is slow) with CUDA. `fails` is the name of a
    method and the number of the call that raises. `limit` is the bytes it has, `pinnable` those that can be locked.
    """

    def __init__(self, *, threaded: bool = False, fails: tuple[str, int] | None = None, limit: int = 2**40) -> None:
        self.threaded, self.fails, self.limit = threaded, fails, limit
        self.pinnable = 2**40
        self.needs_pins = True
        self.pins: dict[int, int] = {}
        self.peak_pinned = 0
        self.n_allocated = self.n_lanes = 0
        #: (host address, byte of the memory, bytes) of every copy, in the order in which they were begun.
        self.copies: list[tuple[int, int, int]] = []
        self.on_copy: Callable[[int], None] = lambda _: None
        self.calls: Counter[str] = Counter()
        self.lock = threading.RLock()

    def call(self, name: str) -> None:
        with self.lock:
            self.calls[name] += 1
            if self.fails == (name, self.calls[name]):
                raise Broken(name)

    @property
    def is_clean(self) -> bool:
        """No memory is locked, no lane is open, no memory is held."""
        if self.n_allocated:
            gc.collect()
        return (self.n_lanes, self.n_allocated, self.pins) == (0, 0, {})

    def allocate(self, model: str, nbytes: int) -> torch.Tensor:
        self.call("allocate")
        if nbytes > self.limit:
            raise InsufficientMemory(model, nbytes, self.limit)
        array = np.full(nbytes, 0xA5, np.uint8)
        self.n_allocated += 1
        weakref.finalize(array, self._free).atexit = False
        return torch.from_numpy(array)

    def _free(self) -> None:
        self.n_allocated -= 1

    def lane(self, memory: torch.Tensor) -> FakeLane:
        self.call("lane")
        return FakeLane(self, memory)

    def pin(self, address: int, nbytes: int) -> bool:
        self.call("pin")
        with self.lock:
            assert not self.touching(address, nbytes), "locked twice"
            if sum(self.pins.values()) + nbytes > self.pinnable:
                return False
            self.pins[address] = nbytes
            self.peak_pinned = max(self.peak_pinned, sum(self.pins.values()))
        return True

    def unpin(self, address: int) -> None:
        with self.lock:
            del self.pins[address]

    def touching(self, address: int, nbytes: int) -> list[tuple[int, int]]:
        """(address, nbytes) of the locked pieces of which a part is there."""
        with self.lock:
            return [(at, size) for at, size in self.pins.items() if at < address + nbytes and address < at + size]

    def check_source(self, address: int, nbytes: int) -> None:
        touched = self.touching(address, nbytes)
        if touched or self.needs_pins:
            [(start, size)] = touched
            assert start <= address and address + nbytes <= start + size, "from locked and unlocked memory"


class FakeLane:
    def __init__(self, device: FakeDevice, memory: torch.Tensor) -> None:
        self._device, self._memory = device, memory
        self._owner = threading.current_thread()
        self._open = False
        self._n_begun = self._n_done = 0
        self._waiting: list[tuple[int, int, int]] = []
        self._jobs: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="fake-lane") if device.threaded else None

    def __enter__(self) -> Self:
        self._open = True
        with self._device.lock:
            self._device.n_lanes += 1
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            # The failed ones are over. The others run now, at the latest.
            self._run_until(self._n_begun)
        finally:
            if self._thread is not None:
                self._jobs.put(None)
                self._thread.join()
            self._open = False
            with self._device.lock:
                self._device.n_lanes -= 1
        if self._failure is not None:
            raise self._failure

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._check()
        self._device.call("copy")
        assert nbytes > 0 and target >= 0 and target + nbytes <= len(self._memory)
        self._device.check_source(source, nbytes)
        with self._device.lock:
            self._device.copies.append((source, target, nbytes))
        self._device.on_copy(source)
        self._n_begun += 1
        if self._thread is not None:
            self._jobs.put((target, source, nbytes))
        else:
            self._waiting.append((target, source, nbytes))

    def mark(self) -> object:
        self._check()
        self._device.call("mark")
        return self._n_begun

    def wait(self, mark: object) -> None:
        self._check()
        assert isinstance(mark, int)
        self._device.call("wait")
        self._run_until(mark)
        if self._failure is not None:
            raise self._failure

    def _check(self) -> None:
        assert self._open and threading.current_thread() is self._owner

    def _run_until(self, mark: int) -> None:
        if self._thread is not None:
            with self._changed:
                assert self._changed.wait_for(lambda: self._n_done >= mark, timeout=30)
            return
        while self._n_done < mark:
            self._copy(*self._waiting.pop(0))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._copy(*job)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        try:
            # It must still be locked, else it is perhaps not even mapped.
            self._device.check_source(source, nbytes)
            libc.copy(self._memory.data_ptr() + target, source, nbytes)
        except (AssertionError, ValueError) as error:
            self._failure = self._failure or error
        with self._changed:
            self._n_done += 1
            self._changed.notify_all()


class Watched:
    """The files of `plan`, with something done before each read."""

    def __init__(self, plan: ReadPlan, on_fetch: Callable[[int], None]) -> None:
        self._files, self._on_fetch = LocalFiles(plan), on_fetch
        self._number = {id(chunk): number for number, chunk in enumerate(plan.chunks)}

    def __enter__(self) -> Self:
        self._files.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind, error, trace)

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        self._on_fetch(self._number[id(chunk)])
        self._files.fetch(chunk, address)


class Loaded:
    """A checkpoint, its plan, and its place in a device's memory."""

    def __init__(self, path: Path, device: FakeDevice | CudaDevice, chunk_size: int = CHUNK) -> None:
        self.index: CheckpointIndex = read_index(path)
        self.plan: ReadPlan = plan_reads(self.index, chunk_size)
        self.layout: Layout = lay_out(self.index, self.plan)
        self.device = device
        self.memory = device.allocate(str(path), self.layout.nbytes)

    @property
    def tensors(self) -> Tensors:
        return device_views(self.index, self.layout.positions, self.memory)

    def through(self, ring: Ring, **options: Any) -> None:
        stream_through(self.plan, self.layout, self.memory, self.device, ring, **options)

    def behind(self, address: int, **options: Any) -> None:
        copy_behind(self.plan, address, self.layout, self.memory, self.device, **options)


def host_copy(plan: ReadPlan) -> Buffer:
    buffer = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer))
    return buffer


@pytest.fixture
def small_chunks(monkeypatch):
    """Checkpoints of our format are written in chunks of 32 KiB, and host memory is locked by 256 KiB."""
    monkeypatch.setattr(writer, "CHUNK", CHUNK)
    monkeypatch.setattr(device_module, "STEP", 256 * KiB)


def layers(n: int = 8) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layers.{i}.w": torch.randn(96, 256, generator=generator).mul(0.02).bfloat16() for i in range(n)}
    return {**tensors, "embed.w": torch.randn(64, 256, generator=generator).bfloat16(), "norm.w": torch.ones(7)}


@pytest.fixture(params=["safetensors", "raw", "split16"])
def checkpoint(request, tmp_path, small_chunks) -> Path:
    path = tmp_path / request.param
    if request.param == "safetensors":
        path.mkdir()
        safetensors.torch.save_file(layers(), path / "model.safetensors")
    else:
        write_checkpoint(sources_of(layers()), path, compress="yes" if request.param == "split16" else "no")
    codecs = {chunk.codec for file in read_index(path).files for chunk in file.chunks}
    assert ("split16" in codecs) == (request.param == "split16")
    return path


# --- where tensors lie -----------------------------------------------------------------------------------------------

DTYPES = sorted(set(tiers._DTYPES.values()) - {torch.float4_e2m1fn_x2}, key=str)
shapes = st.lists(st.integers(0, 60), max_size=3).map(tuple)
named = st.dictionaries(
    st.sampled_from([f"layers.{i}.{part}" for i in range(12) for part in ("w", "b")] + ["embed", "lm_head", "norm"]),
    st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()),
    min_size=1,
    max_size=10,
)


def bits(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, seed: int) -> torch.Tensor:
    """Random bytes as a tensor of `dtype`; small exponents, so that those of 16 bits can be compressed."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel() * dtype.itemsize
    tensor = torch.randint(0, 2 if dtype is torch.bool else 256, (n,), dtype=torch.uint8, generator=generator)
    if dtype in (torch.bfloat16, torch.float16):
        tensor[1::2] = 0x3C
    tensor = tensor.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if transposed and len(shape) > 1 else tensor


def write_any(directory: Path, form: str, spec: dict[str, tuple[Any, ...]], n_shards: int) -> Tensors:
    """A checkpoint of `spec` in one of the formats, and what it holds."""
    tensors = {name: bits(*each, seed=i) for i, (name, each) in enumerate(spec.items())}
    if form != "safetensors":
        write_checkpoint(sources_of(tensors), directory / "c", compress="yes" if form == "split16" else "no")
        return tensors
    tensors = {
        name: tensor.contiguous() for name, tensor in tensors.items() if tensor.dtype not in (torch.complex32, torch.complex128)
    }
    # Some dtypes are not in safetensors, but a checkpoint without any tensor is none.
    tensors["rest"] = torch.ones(3)
    (directory / "c").mkdir()
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in names[number::n_shards]} for number in range(n_shards)]
    files = {f"model-{number:05}.safetensors": shard for number, shard in enumerate(shards)}
    for file, shard in files.items():
        safetensors.torch.save_file(shard, directory / "c" / file)
    weight_map = {name: file for file, shard in files.items() for name in shard}
    text = str({"metadata": {}, "weight_map": weight_map}).replace("'", '"')
    (directory / "c" / "model.safetensors.index.json").write_text(text)
    return tensors


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["safetensors", "raw", "split16"]),
    spec=named,
    n_shards=st.integers(1, 3),
    chunk_size=st.sampled_from([4096, 20_000, 100_000]),
    n_threads=st.integers(1, 4),
    threaded=st.booleans(),
    way=st.sampled_from(["ring", "host", "behind"]),
)
def test_any_checkpoint_is_on_the_device_as_it_was_written(
    small_chunks, form, spec, n_shards, chunk_size, n_threads, threaded, way
):
    device = FakeDevice(threaded=threaded)
    with tempfile.TemporaryDirectory() as directory:
        expected = write_any(Path(directory), form, spec, n_shards)
        loaded = Loaded(Path(directory) / "c", device, chunk_size)
        if way == "ring":
            with Ring(device, ring_nbytes(loaded.plan, n_threads)) as ring:
                loaded.through(ring, n_threads=n_threads)
        else:
            buffer = BufferPool(2**30).lease(loaded.plan.nbytes)
            arriving = Arrivals(loaded.plan) if way == "behind" else None
            options = {"arrivals": arriving, "n_threads": n_threads}
            reading = threading.Thread(target=read_chunks, args=(loaded.plan, address_of(buffer)), kwargs=options)
            with pinned(device, address_of(buffer), buffer.nbytes):
                reading.start()
                if arriving is None:
                    reading.join()
                loaded.behind(address_of(buffer), arriving=arriving)
                reading.join()
    assert_same(loaded.tensors, expected)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.tensors.values() if tensor.numel())
    del loaded
    assert device.is_clean


def test_a_file_whose_tensors_lie_off_their_alignment_is_aligned_on_the_way(tmp_path, write_raw, assert_equal):
    header = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "double": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        "half": {"dtype": "F16", "shape": [], "data_offsets": [17, 19]},
        "empty": {"dtype": "F64", "shape": [0, 2], "data_offsets": [19, 19]},
        "bytes": {"dtype": "U8", "shape": [40_000], "data_offsets": [19, 40_019]},
    }
    text = str(header).replace("'", '"').encode()
    for padding in range(8):
        file = write_raw(tmp_path / f"{padding}.safetensors", text + b" " * padding, bytes([1]) + os.urandom(40_018))
        device = FakeDevice()
        assert_equal(load_to_device(file, device), safetensors.torch.load_file(file))
        nbytes = sum(size for _, _, size in device.copies)
        assert nbytes == 40_019, "what is not a tensor is not copied"


def test_a_well_made_file_is_copied_in_one_piece_and_the_device_holds_nothing_else(tmp_path, write_single):
    for name in ("x", "xxxxxxxx"):
        path = write_single(tmp_path / name, {f"{name}.{i}": torch.full((64, 64), float(i)) for i in range(20)})
        loaded = Loaded(path, FakeDevice())
        assert len(loaded.layout.pieces) == 1
        assert loaded.layout.nbytes == 20 * 64 * 64 * 4


def test_each_tensor_has_a_storage_of_its_own_except_that_tied_ones_share_it(tmp_path):
    weight = torch.arange(600.0).reshape(20, 30)
    tensors = {"embed.w": weight, "lm_head.w": weight, "turned": weight.clone().t(), "scalar": torch.tensor(3.0)}
    write_checkpoint(sources_of(tensors), tmp_path / "c")
    found = load_to_device(tmp_path / "c", FakeDevice())
    assert_same(found, tensors)
    assert found["turned"].stride() == (1, 30)
    assert found["embed.w"].untyped_storage().data_ptr() == found["lm_head.w"].untyped_storage().data_ptr()
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in found.items()} == {
        name: tensor.untyped_storage().nbytes() for name, tensor in tensors.items()
    }


def test_packed_pairs_of_four_bits_are_what_safetensors_makes_of_them(tmp_path, write_single):
    pairs = torch.arange(96, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(4, 24)
    path = write_single(tmp_path / "c", {"w": pairs, "x": torch.ones(3)})
    assert_same(load_to_device(path, FakeDevice()), safetensors.torch.load_file(path / "model.safetensors"))


def test_a_checkpoint_without_any_byte_is_loaded_too(tmp_path, write_single):
    path = write_single(tmp_path / "c", {"w": torch.empty(0, 3), "x": torch.empty(0, dtype=torch.bool)})
    assert_same(load_to_device(path, device := FakeDevice()), {"w": torch.empty(0, 3), "x": torch.empty(0, dtype=torch.bool)})
    assert device.copies == []


def test_the_memory_is_given_back_when_the_last_tensor_is_gone(checkpoint):
    device = FakeDevice()
    tensors = load_to_device(checkpoint, device)
    part = tensors["layers.3.w"][5:]
    expected = layers()["layers.3.w"][5:]
    del tensors
    gc.collect()
    assert device.n_allocated == 1
    assert torch.equal(part, expected)
    del part
    assert device.is_clean


# --- through a ring --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_checkpoint_larger_than_the_ring_takes_no_more_host_memory_than_the_ring(checkpoint, threaded, n_threads, monkeypatch):
    mapped: list[int] = []
    map_memory = libc.map_memory
    monkeypatch.setattr(libc, "map_memory", lambda nbytes: mapped.append(nbytes) or map_memory(nbytes))
    device = FakeDevice(threaded=threaded)
    limit = ring_nbytes(plan_reads(read_index(checkpoint), CHUNK), n_threads)
    loaded = Loaded(checkpoint, device)
    assert loaded.index.nbytes > limit
    with Ring(device, limit) as ring:
        begin = next(iter(sorted(device.pins)))
        loaded.through(ring, n_threads=n_threads)
    assert_same(loaded.tensors, layers())
    assert mapped == [limit] and device.peak_pinned == limit
    assert all(begin <= source and source + nbytes <= begin + limit for source, _, nbytes in device.copies)
    # Each byte is written once, and slots are used again and again.
    targets = sorted((target, nbytes) for _, target, nbytes in device.copies)
    assert all(target + nbytes <= after for (target, nbytes), (after, _) in pairwise(targets))


def test_a_ring_with_room_for_fewer_threads_serves_with_those(checkpoint):
    device = FakeDevice()
    least = ring_nbytes(plan_reads(read_index(checkpoint), 4 * 1024**2), 1)
    assert_same(load_to_device(checkpoint, device, n_readers=8, ring_nbytes=least + 100), layers())
    assert device.calls["lane"] == 1
    assert device.peak_pinned == least


def test_a_ring_that_is_too_small_is_refused_with_the_bytes_that_are_needed(checkpoint):
    device = FakeDevice()
    least = ring_nbytes(plan_reads(read_index(checkpoint), 4 * 1024**2), 1)
    with pytest.raises(ConfigError, match=f"needs {least}") as caught:
        load_to_device(checkpoint, device, ring_nbytes=least - 1)
    assert caught.value.param == "ring_nbytes"
    del caught
    assert device.is_clean


def test_a_copy_begins_while_later_chunks_are_still_to_be_read(checkpoint):
    device, copied = FakeDevice(threaded=True), threading.Event()
    device.on_copy = lambda _: copied.set()
    loaded = Loaded(checkpoint, device)

    def wait_for_a_copy(number: int) -> None:
        assert number < len(loaded.plan.chunks) - 1 or copied.wait(20)

    with Ring(device, 2**20) as ring:
        loaded.through(ring, source=Watched(loaded.plan, wait_for_a_copy), n_threads=2)
    assert_same(loaded.tensors, layers())


def test_one_thread_reads_the_next_chunk_while_the_last_is_copied(checkpoint):
    device = FakeDevice()
    loaded, waits = Loaded(checkpoint, device), []
    source = Watched(loaded.plan, lambda _: waits.append(device.calls["wait"]))
    with Ring(device, 2**20) as ring:
        loaded.through(ring, source=source, n_threads=1)
    # When chunk n is read, of those before it all but the last have been waited for.
    assert waits == [max(0, n - 1) for n in range(len(waits))]


@pytest.mark.parametrize("threaded", [False, True])
def test_what_is_said_to_have_arrived_is_on_the_device(checkpoint, threaded):
    device = FakeDevice(threaded=threaded)
    loaded, expected, seen = Loaded(checkpoint, device), layers(), []
    arrived = Arrivals(loaded.plan)

    def look(done: int) -> None:
        for name in expected:
            if arrived.has(name):
                assert octets(loaded.tensors[name]) == octets(expected[name])
                seen.append(name)

    with Ring(device, 2**20) as ring:
        loaded.through(ring, arrived=arrived, on_progress=look)
    assert arrived.done
    assert set(seen) == set(expected)


def test_progress_runs_from_nothing_to_all_bytes_and_never_back(checkpoint):
    seen: list[tuple[int, int]] = []
    load_to_device(checkpoint, FakeDevice(), progress=lambda *so_far: seen.append(so_far))
    done = [done for done, _ in seen]
    assert done == sorted(done) and done[0] == 0
    assert seen[-1][0] == seen[-1][1] >= sum(tensor.nbytes for tensor in layers().values())


def test_what_is_read_can_be_written_beside(tmp_path, small_chunks):
    write_checkpoint(sources_of(layers()), tmp_path / "c", compress="yes")
    device = FakeDevice()
    loaded = Loaded(tmp_path / "c", device)
    stored = (tmp_path / "c" / "data-00000.split16.bin").read_bytes()
    beside = bytearray(len(stored))

    def tee(chunk: ChunkRead, address: int) -> None:
        beside[chunk.offset : chunk.offset + chunk.wanted] = (np.ctypeslib.as_array(_bytes_at(address, chunk.wanted))).tobytes()

    with Ring(device, 2**20) as ring:
        loaded.through(ring, tee=tee)
    assert bytes(beside) == stored


def _bytes_at(address: int, nbytes: int) -> Any:
    return np.ctypeslib.ctypes.cast(address, np.ctypeslib.ctypes.POINTER(np.ctypeslib.ctypes.c_uint8 * nbytes)).contents


def test_a_ring_serves_one_load_after_the_other_and_is_locked_once(checkpoint):
    device = FakeDevice(threaded=True)
    loads = [Loaded(checkpoint, device) for _ in range(3)]
    with Ring(device, 2**20) as ring:
        n_pins = device.calls["pin"]
        threads = [threading.Thread(target=loaded.through, args=(ring,)) for loaded in loads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert device.calls["pin"] == n_pins
    for loaded in loads:
        assert_same(loaded.tensors, layers())
    assert device.pins == {}


def test_a_load_that_waits_for_the_ring_can_be_called_off(checkpoint):
    device, cancel = FakeDevice(), threading.Event()
    loaded = Loaded(checkpoint, device)
    cancel.set()
    arrived = Arrivals(loaded.plan)
    with Ring(device, 2**20) as ring:
        with ring.slots(CHUNK), pytest.raises(Cancelled):
            loaded.through(ring, cancel=cancel, arrived=arrived)
        with pytest.raises(Cancelled):
            arrived.wait(())
        assert device.copies == []
        loaded.through(ring)
    assert_same(loaded.tensors, layers())


def test_a_ring_that_is_forgotten_is_given_back():
    device = FakeDevice()
    ring = Ring(device, 2**20)
    assert sum(device.pins.values()) == 2**20
    ring.close()
    ring.close()
    assert device.pins == {}
    ring = Ring(device, 2**20)
    del ring
    assert device.is_clean


def test_a_ring_that_cannot_be_locked_to_its_end_is_given_back_at_once(monkeypatch):
    monkeypatch.setattr(device_module, "STEP", 64 * KiB)
    given_back: list[int] = []
    unmap = libc.unmap_memory
    monkeypatch.setattr(libc, "unmap_memory", lambda address, nbytes: given_back.append(nbytes) or unmap(address, nbytes))
    device = FakeDevice(fails=("pin", 3))
    with pytest.raises(Broken) as caught:
        Ring(device, 2**20)
    # Not only when nobody looks at the error any more.
    assert caught.value.__traceback__ is not None
    assert device.pins == {} and 2**20 in given_back


def test_without_locked_memory_all_works_as_well(checkpoint):
    device = FakeDevice()
    device.pinnable, device.needs_pins = 0, False
    assert_same(load_to_device(checkpoint, device), layers())
    assert device.calls["pin"] == 1, "a refusal is not asked for again"


# --- from host memory ------------------------------------------------------------------------------------------------


def test_a_host_copy_goes_in_few_large_copies_in_the_order_of_the_plan(checkpoint):
    device = FakeDevice()
    loaded = Loaded(checkpoint, device)
    buffer = host_copy(loaded.plan)
    with pinned(device, address_of(buffer), buffer.nbytes):
        loaded.behind(address_of(buffer))
    assert_same(loaded.tensors, layers())
    # 432 KiB of tensors: 14 chunks or more, in steps of 256 KiB, and where the order is not the file's.
    assert len(loaded.plan.chunks) >= 13
    assert len(device.copies) <= 6
    numbers = [
        next(
            number
            for number, chunk in enumerate(loaded.plan.chunks)
            if chunk.position <= source - address_of(buffer) < chunk.position + chunk.decoded
        )
        for source, _, _ in device.copies
    ]
    assert numbers == sorted(numbers)


def test_no_copy_crosses_the_end_of_what_was_locked_at_once(tmp_path, write_single, monkeypatch):
    monkeypatch.setattr(device_module, "STEP", 8 * KiB)
    path = write_single(tmp_path / "c", {"w": torch.arange(50_000)})
    device = FakeDevice()
    loaded = Loaded(path, device)
    pool = BufferPool(2**30)
    buffer = pool.lease(loaded.plan.nbytes + 4 * KiB)[4 * KiB :]
    read_chunks(loaded.plan, address_of(buffer))
    with pinned(device, address_of(buffer), buffer.nbytes) as pins:
        assert pins.nbytes == buffer.nbytes and len(device.pins) > 40
        loaded.behind(address_of(buffer))
    assert_same(loaded.tensors, {"w": torch.arange(50_000)})
    assert len(device.copies) > 40


def test_memory_that_is_locked_meanwhile_disturbs_no_copy(checkpoint):
    device = FakeDevice()
    device.needs_pins = False
    loaded = Loaded(checkpoint, device)
    buffer = host_copy(loaded.plan)
    pins = Pins(device)
    parts = list(device_module._steps(address_of(buffer), buffer.nbytes))
    assert len(parts) > 1
    device.on_copy = lambda _: pins.add(*parts.pop()) if parts else None
    loaded.behind(address_of(buffer))
    pins.close()
    assert_same(loaded.tensors, layers())


def arrive(arriving: Arrivals, numbers: list[int]) -> None:
    for number in numbers:
        arriving.arrived(number)


def test_chunks_go_in_the_order_of_the_plan_and_neighbours_that_are_there_go_together(tmp_path, write_single, small_chunks):
    path = write_single(tmp_path / "c", {"w": torch.arange(6 * CHUNK // 8)})
    device = FakeDevice()
    loaded = Loaded(path, device)
    assert len(loaded.plan.chunks) == 7
    buffer = host_copy(loaded.plan)
    arriving, arrived = Arrivals(loaded.plan), Arrivals(loaded.plan)
    told: list[int] = []
    # 0 and 1 at first; then 4, 3 and 2, in this order, when both are on the device; then the rest.
    later = {2: [4, 3, 2], 5: [5, 6]}
    arrive(arriving, [0, 1, 3])

    def tell(done: int) -> None:
        n = sum(arrived.has_chunk(number) for number in range(7))
        told.append(n)
        arrive(arriving, later.pop(n, []))

    with pinned(device, address_of(buffer), buffer.nbytes):
        loaded.behind(address_of(buffer), arriving=arriving, arrived=arrived, on_progress=tell)
    assert told == [0, 2, 5, 7]
    assert_same(loaded.tensors, {"w": torch.arange(6 * CHUNK // 8)})
    sources = [source - address_of(buffer) for source, _, _ in device.copies]
    assert sources == sorted(sources)


def test_what_is_copied_is_told_before_the_next_chunk_is_waited_for(tmp_path, write_single):
    path = write_single(tmp_path / "c", {"w": torch.arange(4 * CHUNK // 8)})
    device = FakeDevice()
    loaded = Loaded(path, device)
    buffer = host_copy(loaded.plan)
    arriving, arrived = Arrivals(loaded.plan), Arrivals(loaded.plan)
    n = len(loaded.plan.chunks)

    def feed() -> None:
        for number in range(n):
            arriving.arrived(number)
            arrived.wait_chunk(number, timeout_s=20)

    feeding = threading.Thread(target=feed)
    feeding.start()
    with pinned(device, address_of(buffer), buffer.nbytes):
        loaded.behind(address_of(buffer), arriving=arriving, arrived=arrived)
    feeding.join()
    assert arrived.done
    assert_same(loaded.tensors, {"w": torch.arange(4 * CHUNK // 8)})


@pytest.mark.parametrize("threaded", [False, True])
def test_what_a_copy_from_host_memory_says_has_arrived_is_on_the_device(checkpoint, threaded, monkeypatch):
    monkeypatch.setattr(device_module, "STEP", CHUNK)
    device = FakeDevice(threaded=threaded)
    loaded, expected, seen = Loaded(checkpoint, device), layers(), []
    buffer, arrived = host_copy(loaded.plan), Arrivals(loaded.plan)

    def look(done: int) -> None:
        for name in expected:
            if arrived.has(name):
                assert octets(loaded.tensors[name]) == octets(expected[name])
                seen.append(name)

    with pinned(device, address_of(buffer), buffer.nbytes):
        loaded.behind(address_of(buffer), arrived=arrived, on_progress=look)
    assert arrived.done
    assert set(seen) == set(expected)


def test_the_copy_begins_while_later_chunks_are_still_to_be_read(checkpoint):
    device, copied = FakeDevice(), threading.Event()
    device.on_copy = lambda _: copied.set()
    loaded = Loaded(checkpoint, device)
    buffer = BufferPool(2**30).lease(loaded.plan.nbytes)
    arriving = Arrivals(loaded.plan)

    def wait_for_a_copy(number: int) -> None:
        assert number < len(loaded.plan.chunks) - 1 or copied.wait(20)

    source = Watched(loaded.plan, wait_for_a_copy)
    options = {"source": source, "arrivals": arriving, "n_threads": 2}
    reading = threading.Thread(target=read_chunks, args=(loaded.plan, address_of(buffer)), kwargs=options)
    with pinned(device, address_of(buffer), buffer.nbytes):
        reading.start()
        loaded.behind(address_of(buffer), arriving=arriving)
        reading.join()
    assert_same(loaded.tensors, layers())


# --- locked memory ---------------------------------------------------------------------------------------------------

GRID = 64 * 1024**2


def test_memory_is_locked_step_by_step_each_once_and_unlocked_at_the_end():
    device = FakeDevice()
    pins = Pins(device)
    begin, nbytes = 10 * GRID + 8 * KiB, 3 * GRID
    assert pins.add(begin, nbytes)
    assert sorted(device.pins) == [begin, 11 * GRID, 12 * GRID, 13 * GRID]
    assert pins.nbytes == sum(device.pins.values()) == nbytes
    assert pins.add(begin, nbytes)
    assert device.calls["pin"] == 4
    pins.close()
    assert device.pins == {} and pins.nbytes == 0
    assert not pins.add(begin, nbytes)
    assert device.pins == {}


def test_two_threads_that_lock_the_same_memory_lock_it_once():
    device = FakeDevice()
    pins = Pins(device)
    threads = [threading.Thread(target=pins.add, args=(GRID, 200 * GRID)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.calls["pin"] == 200 and pins.nbytes == 200 * GRID


def test_what_is_removed_is_unlocked_and_the_rest_stays():
    device = FakeDevice()
    pins = Pins(device)
    pins.add(GRID, 2 * GRID)
    pins.add(5 * GRID, GRID // 2)
    pins.add(5 * GRID + GRID // 2, GRID // 2)
    pins.remove(GRID, 2 * GRID)
    pins.remove(5 * GRID, GRID // 2)
    pins.remove(100 * GRID, GRID)
    assert device.pins == {5 * GRID + GRID // 2: GRID // 2}
    assert pins.add(GRID, 2 * GRID)


def test_a_system_that_locks_no_more_is_asked_no_more_and_what_is_locked_stays():
    device = FakeDevice()
    device.pinnable = 2 * GRID
    pins = Pins(device)
    assert not pins.add(GRID, 10 * GRID)
    assert pins.nbytes == 2 * GRID
    assert device.calls["pin"] == 3


def test_locking_can_be_called_off_between_steps():
    device, cancel = FakeDevice(), threading.Event()
    pins = Pins(device)
    pin = device.pin

    def third_is_the_last(address: int, nbytes: int) -> bool:
        if device.calls["pin"] == 2:
            cancel.set()
        return pin(address, nbytes)

    device.pin = third_is_the_last
    assert not pins.add(GRID, 10 * GRID, cancel)
    assert pins.nbytes == 3 * GRID


def test_memory_is_unlocked_when_the_block_ends_whatever_ends_it():
    device = FakeDevice(fails=("pin", 3))
    with pytest.raises(Broken), pinned(device, GRID, 5 * GRID):
        pass
    assert device.pins == {}
    with pytest.raises(ZeroDivisionError), pinned(device, GRID, 5 * GRID):
        raise ZeroDivisionError
    assert device.pins == {}


# --- faults at every place -------------------------------------------------------------------------------------------


def outcome(run: Callable[[], None]) -> type[BaseException] | None:
    try:
        run()
    except BaseException as error:  # noqa: BLE001 - its class is the result
        return type(error)
    return None


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("name", ["allocate", "pin", "lane", "copy", "mark", "wait"])
def test_a_device_that_fails_at_any_call_ends_the_load_with_its_error_and_nothing_is_left(checkpoint, name, threaded, n_fds):
    before = n_fds()
    for number in range(1, 100):
        device = FakeDevice(threaded=threaded, fails=(name, number))
        ended = outcome(lambda device=device: load_to_device(checkpoint, device, n_readers=2))
        assert device.is_clean and n_fds() == before
        if device.calls[name] < number:
            # There are not so many calls.
            assert ended is None and number > 1
            return
        assert ended is Broken
    pytest.fail("no end")


@pytest.mark.parametrize("name", ["pin", "lane", "copy", "mark", "wait"])
def test_a_load_that_failed_holds_no_memory_of_the_device_until_some_garbage_collection(checkpoint, name):
    device = FakeDevice(fails=(name, 1))
    gc.disable()
    try:
        assert outcome(lambda: load_to_device(checkpoint, device, n_readers=2)) is Broken
        assert device.n_allocated == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["lane", "copy", "mark", "wait"])
def test_a_device_that_fails_behind_a_read_tells_all_who_wait(checkpoint, name):
    for number in range(1, 100):
        device = FakeDevice(fails=(name, number))
        loaded = Loaded(checkpoint, device)
        buffer, arrived = host_copy(loaded.plan), Arrivals(loaded.plan)
        with pinned(device, address_of(buffer), buffer.nbytes):
            ended = outcome(lambda: loaded.behind(address_of(buffer), arrived=arrived))  # noqa: B023
            assert device.n_lanes == 0
        if device.calls[name] < number:
            assert ended is None and arrived.done and number > 1
            return
        assert ended is Broken
        with pytest.raises(Broken):
            arrived.wait(())
    pytest.fail("no end")


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_read_that_fails_at_any_chunk_ends_the_load_and_nothing_is_left(checkpoint, n_threads, n_fds):
    before = n_fds()
    n = len(plan_reads(read_index(checkpoint), CHUNK).chunks)
    for bad in range(n):
        device = FakeDevice()
        loaded = Loaded(checkpoint, device)
        arrived = Arrivals(loaded.plan)

        def fail(number: int, bad: int = bad) -> None:
            if number == bad:
                raise OSError(errno.EIO, "broken", "file")

        with Ring(device, 2**20) as ring, pytest.raises(OSError, match="broken"):
            loaded.through(ring, source=Watched(loaded.plan, fail), n_threads=n_threads, arrived=arrived)
        with pytest.raises(OSError, match="broken"):
            arrived.wait(())
        assert not arrived.has_chunk(bad)
        del loaded
        assert device.is_clean and n_fds() == before


@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_load_that_is_called_off_at_any_moment_leaves_nothing(checkpoint, n_threads, n_fds):
    before = n_fds()
    n = len(plan_reads(read_index(checkpoint), CHUNK).chunks)
    for moment in range(n):
        device, cancel = FakeDevice(), threading.Event()
        loaded = Loaded(checkpoint, device)
        begun: list[int] = []
        n_begun: list[int] = []

        def call_off(
            number: int, moment: int = moment, cancel: threading.Event = cancel, begun: Any = begun, n_begun: Any = n_begun
        ) -> None:
            begun.append(number)
            if number == moment:
                cancel.set()
                n_begun.append(len(begun))

        with Ring(device, 2**20) as ring:
            ended = outcome(
                lambda loaded=loaded, ring=ring, cancel=cancel, call_off=call_off: loaded.through(
                    ring, source=Watched(loaded.plan, call_off), n_threads=n_threads, cancel=cancel
                )
            )
        # Unless the last chunks were on their way already, and nothing was left to call off.
        assert ended is Cancelled or (ended is None and n_begun[0] > n - n_threads)
        if ended is None:
            assert_same(loaded.tensors, layers())
        del loaded
        assert device.is_clean and n_fds() == before


def test_a_copy_behind_a_read_that_fails_at_any_chunk_hears_why(checkpoint):
    n = len(plan_reads(read_index(checkpoint), CHUNK).chunks)
    for bad in range(n):
        device = FakeDevice()
        loaded = Loaded(checkpoint, device)
        buffer = BufferPool(2**30).lease(loaded.plan.nbytes)
        arriving, arrived = Arrivals(loaded.plan), Arrivals(loaded.plan)

        def fail(number: int, bad: int = bad) -> None:
            if number == bad:
                raise OSError(errno.EIO, "broken", "file")

        def read(loaded: Loaded = loaded, buffer: Buffer = buffer, arriving: Arrivals = arriving, fail: Any = fail) -> None:
            with suppress(OSError):
                read_chunks(loaded.plan, address_of(buffer), source=Watched(loaded.plan, fail), arrivals=arriving, n_threads=2)

        reading = threading.Thread(target=read)
        with pinned(device, address_of(buffer), buffer.nbytes):
            reading.start()
            with pytest.raises(OSError, match="broken"):
                loaded.behind(address_of(buffer), arriving=arriving, arrived=arrived)
            assert device.n_lanes == 0
            reading.join()
        with pytest.raises(OSError, match="broken"):
            arrived.wait(())


def test_a_copy_from_host_memory_is_called_off_between_copies(checkpoint, monkeypatch):
    monkeypatch.setattr(device_module, "STEP", CHUNK)
    device, cancel = FakeDevice(), threading.Event()
    loaded = Loaded(checkpoint, device)
    buffer = host_copy(loaded.plan)
    device.on_copy = lambda _: cancel.set() if len(device.copies) == 3 else None
    with pinned(device, address_of(buffer), buffer.nbytes), pytest.raises(Cancelled):
        loaded.behind(address_of(buffer), cancel=cancel)
    assert 3 <= len(device.copies) < len(loaded.plan.chunks)
    assert device.n_lanes == 0


def test_a_callback_that_raises_ends_the_load_with_its_error(checkpoint):
    def broken(done: int, _: int) -> None:
        if done:
            raise ValueError("broken")

    device = FakeDevice()
    with pytest.raises(ValueError, match="broken"):
        load_to_device(checkpoint, device, progress=broken)
    assert device.is_clean


@pytest.mark.parametrize("compress", ["no", "yes"])
def test_a_changed_bit_is_found_on_the_way_and_named(tmp_path, small_chunks, compress):
    write_checkpoint(sources_of(layers()), tmp_path / "c", compress=compress)
    index = read_index(tmp_path / "c")
    file = Path(index.path(index.files[0].name))
    data = bytearray(file.read_bytes())
    data[index.files[0].chunks[5].offset + 17] ^= 1
    file.write_bytes(data)
    device = FakeDevice()
    with pytest.raises(CheckpointCorrupt, match="checksum") as caught:
        load_to_device(tmp_path / "c", device)
    assert caught.value.file == str(file)
    assert caught.value.tensor.startswith("layers.")
    if compress == "no":
        assert load_to_device(tmp_path / "c", device, verify=False).keys() == layers().keys()
    del caught
    assert device.is_clean


def test_a_model_larger_than_the_device_is_refused_with_numbers_before_anything_is_read(checkpoint, preads):
    device = FakeDevice(limit=100_000)
    with pytest.raises(InsufficientMemory) as caught:
        load_to_device(checkpoint, device)
    nbytes = sum(tensor.nbytes for tensor in layers().values())
    assert nbytes <= caught.value.needed < nbytes + 256 * len(layers())
    assert (caught.value.model, caught.value.available) == (str(checkpoint), 100_000)
    assert preads == [] and device.calls["pin"] == 0
    del caught
    assert device.is_clean


# --- CUDA, as far as it goes without a GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:100", "cuda:256", 100, 256, 4096, -1, "cpu", "toaster:1"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=f"{name}'") as caught:
        CudaDevice(name)
    assert caught.value.param == "device"


def test_a_number_that_torch_would_take_for_another_is_refused_where_there_are_gpus(pretended):
    assert CudaDevice("cuda:0").device == CudaDevice(0).device == torch.device("cuda:0")
    for name in ("cuda:256", 256, "cuda:128", "cuda:1"):
        with pytest.raises(ConfigError, match="torch sees 1 GPUs"):
            CudaDevice(name)


@pytest.fixture
def pretended(monkeypatch) -> SimpleNamespace:
    """torch, as it is where there is one GPU, as far as allocating and locking go: what it was asked for, and what it answers."""
    answers = SimpleNamespace(registered=[], unregistered=[], register=0, touched=0)

    class Cudart:
        def cudaHostRegister(self, *args: int) -> int:
            answers.registered.append(args)
            return answers.register

        def cudaHostUnregister(self, address: int) -> int:
            answers.unregistered.append(address)
            return 0

    def no_room(*args: Any, **_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def pending_error(*args: Any, **_: Any) -> None:
        answers.touched += 1
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12_345, 99_999))
    monkeypatch.setattr(torch, "empty", no_room)
    monkeypatch.setattr(torch, "zeros", pending_error)
    return answers


def test_a_gpu_without_room_is_an_error_with_numbers(pretended):
    with pytest.raises(InsufficientMemory) as caught:
        CudaDevice("cuda:0").allocate("opt-13b", 50_000)
    assert (caught.value.model, caught.value.needed, caught.value.available) == ("opt-13b", 50_000, 12_345)


def test_memory_is_locked_for_every_gpu_and_a_refusal_is_no_error_also_not_of_the_next_kernel(pretended):
    device = CudaDevice(0)
    assert device.pin(4096, 8192)
    assert pretended.registered == [(4096, 8192, 1)] and pretended.touched == 0
    device.unpin(4096)
    assert pretended.unregistered == [4096]
    pretended.register = 2
    assert not device.pin(4096, 8192)
    assert pretended.touched == 1


# --- CUDA: pytest -m gpu ---------------------------------------------------------------------------------------------

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.fixture
def gpu() -> CudaDevice:
    return CudaDevice("cuda:0")


@pytest.fixture
def large(tmp_path) -> Path:
    """256 MiB in chunks of 2 MiB, compressed and not."""
    generator = torch.Generator().manual_seed(2)
    tensors = {f"layers.{i}.w": torch.randn(4096, 1024, generator=generator).mul(0.02).bfloat16() for i in range(32)}
    write_checkpoint(sources_of(tensors), tmp_path / "large", compress="both")
    return tmp_path / "large"


class TestGpu:
    pytestmark = on_a_gpu

    def test_every_byte_reaches_the_gpu_from_each_format(self, checkpoint, gpu):
        tensors = load_to_device(checkpoint, "cuda:0")
        assert all(tensor.device == gpu.device for tensor in tensors.values())
        assert_same(tensors, layers())

    def test_a_ring_far_smaller_than_the_checkpoint_is_enough(self, large, gpu):
        assert_same(load_to_device(large, gpu, ring_nbytes=16 * 1024**2), read_checkpoint(large))

    def test_a_host_copy_reaches_the_gpu_and_so_does_one_that_is_not_locked(self, large, gpu):
        for locked in (True, False):
            loaded = Loaded(large, gpu)
            buffer = host_copy(loaded.plan)
            pins = Pins(gpu)
            assert not locked or pins.add(address_of(buffer), buffer.nbytes)
            arrived = Arrivals(loaded.plan)
            loaded.behind(address_of(buffer), arrived=arrived)
            pins.close()
            assert arrived.done
            assert_same(loaded.tensors, read_checkpoint(large))

    def test_the_memory_of_a_gpu_that_is_too_small_is_named_and_what_follows_works(self, gpu):
        _, total = torch.cuda.mem_get_info(gpu.device)
        with pytest.raises(InsufficientMemory) as caught:
            gpu.allocate("opt-175b", 4 * total)
        assert caught.value.needed == 4 * total and 0 < caught.value.available <= total
        assert torch.ones(3, device=gpu.device).sum().item() == 3

    def test_a_refusal_to_lock_does_not_disturb_the_next_kernel(self, gpu):
        assert not gpu.pin(4096, 4096)
        assert torch.ones(3, device=gpu.device).sum().item() == 3

    def test_memory_that_is_used_by_queued_kernels_is_not_overwritten_by_a_load(self, checkpoint, gpu):
        before = torch.full((64 * 1024**2,), 1.0, device=gpu.device)
        results = [before.mul(i).sum(dtype=torch.float64) for i in range(50)]
        del before
        tensors = load_to_device(checkpoint, gpu)
        assert [result.item() / (64 * 1024**2) for result in results] == list(range(50))
        assert_same(tensors, layers())

    def test_the_memory_is_given_back_with_the_last_tensor(self, large, gpu):
        before = torch.cuda.memory_allocated(gpu.device)
        tensors = load_to_device(large, gpu)
        assert torch.cuda.memory_allocated(gpu.device) >= before + 256 * 1024**2
        del tensors
        gc.collect()
        assert torch.cuda.memory_allocated(gpu.device) == before


# --- a copy that an engine follows -----------------------------------------------------------------------------------


def test_tensors_on_the_device_can_be_waited_for_while_their_bytes_are_still_read(checkpoint):
    device, may = FakeDevice(threaded=True), threading.Event()
    index = read_index(checkpoint)
    plan = plan_reads(index, CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    arriving = Arrivals(plan)
    last = len(plan.chunks) - 1
    source = Watched(plan, lambda number: None if number < last else assert_set(may))
    reading = threading.Thread(
        target=read_chunks, args=(plan, address_of(buffer)), kwargs={"source": source, "arrivals": arriving, "n_threads": 1}
    )
    reading.start()
    copying = DeviceCopy("model", index, plan, buffer, device, arriving)
    first = min(copying.tensors, key=lambda name: max(plan.chunks_of[name]))
    copying.arrived.wait([first], 30)
    assert octets(copying.tensors[first]) == octets(layers()[first])
    assert not arriving.done
    may.set()
    reading.join()
    assert copying.join(30)
    assert device.pins == {}
    assert_same(copying.tensors, layers())
    copying.close()
    del copying
    assert device.is_clean


def test_a_copy_that_is_closed_early_leaves_nothing_and_tells_who_waits(checkpoint):
    device = FakeDevice()
    index = read_index(checkpoint)
    plan = plan_reads(index, CHUNK)
    arriving = Arrivals(plan)
    copying = DeviceCopy("model", index, plan, BufferPool(2**30).lease(plan.nbytes), device, arriving)
    arriving.fail(Cancelled("the read was called off"))
    copying.close()
    with pytest.raises(Cancelled):
        copying.arrived.wait(["norm.w"])
    del copying
    assert device.is_clean


def test_a_device_without_room_says_so_before_anything_is_copied(checkpoint):
    device = FakeDevice(limit=1000)
    index = read_index(checkpoint)
    plan = plan_reads(index, CHUNK)
    with pytest.raises(InsufficientMemory):
        DeviceCopy("model", index, plan, host_copy(plan), device, None)
    assert device.is_clean


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)
