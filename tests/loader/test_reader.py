from __future__ import annotations

import errno
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader import codec, libc, reader
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import BufferPool, Staging, address_of
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.format import CheckpointIndex, ChunkEntry, FileEntry, TensorEntry, read_index
from sllmdask.loader.kernels import xxh64
from sllmdask.loader.plan import BLOCK, ChunkRead, ReadPlan, plan_reads, round_up
from sllmdask.loader.reader import FileSystems, LocalFiles, read_chunks
from sllmdask.loader.tiers import sources_of, tensor_views
from sllmdask.loader.writer import write_checkpoint

CHUNK = 64 * 1024


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}": torch.randn(100 + 37 * i, 33, generator=generator) for i in range(20)}


@pytest.fixture
def checkpoint(tmp_path, write_single, tensors):
    return write_single(tmp_path / "m", tensors)


@pytest.fixture
def uncached(monkeypatch):
    """Nothing is found in the page cache, although these small files were written a moment ago."""
    monkeypatch.setattr(libc, "cached_pages", lambda *_: 0)


def read(path, **options):
    """Read by 64 KiB; returns the buffer."""
    index = read_index(path)
    plan = plan_reads(index, CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), **options)
    return buffer


def test_a_checkpoint_of_many_chunks_is_read_as_it_was_written(checkpoint, tensors, assert_equal, preads, n_fds):
    before = n_fds()
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK, n_readers=4), tensors)
    size = (checkpoint / "model.safetensors").stat().st_size
    assert sorted(offset for offset, _ in preads) == list(range(0, size, CHUNK))
    assert n_fds() == before


@pytest.mark.parametrize("n_threads", [1, 3, 64])
def test_any_number_of_threads_reads_the_same(checkpoint, tensors, assert_equal, n_threads):
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK, n_readers=n_threads), tensors)


def test_progress_begins_at_zero_never_falls_and_ends_at_the_bytes_of_the_tensors(checkpoint, tensors):
    seen: list[int] = []
    read(checkpoint, on_progress=seen.append)
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(seen) > 5


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(checkpoint, tensors, assert_equal, monkeypatch):
    def refuse(path, flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return os_open(path, flags)

    os_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    assert libc.open_direct(str(checkpoint / "model.safetensors")) is None
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK), tensors)


def test_shared_memory_can_be_read_from(tensors, assert_equal, write_single):
    directory = Path("/dev/shm") / f"sllmdask-test-{uuid.uuid4()}"
    try:
        write_single(directory, tensors)
        assert_equal(read_checkpoint(directory, chunk_size=CHUNK), tensors)
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def test_a_file_system_that_refuses_a_direct_read_late_is_read_through_the_page_cache(
    checkpoint, tensors, assert_equal, monkeypatch, n_fds, uncached
):
    pread, direct, before = libc.pread, set(), n_fds()

    def refuse(fd, address, nbytes, offset):
        if fd in direct:
            raise OSError(errno.EINVAL, "refused")
        return pread(fd, address, nbytes, offset)

    def open_direct(path, wrapped=libc.open_direct):
        direct.add(fd := wrapped(path))
        return fd

    monkeypatch.setattr(libc, "open_direct", open_direct)
    monkeypatch.setattr(libc, "pread", refuse)
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK), tensors)
    assert direct
    assert n_fds() == before


def test_short_reads_and_interruptions_lose_nothing(checkpoint, tensors, assert_equal, monkeypatch, uncached):
    pread, calls = libc.pread, []

    def hesitant(fd, address, nbytes, offset):
        calls.append(offset)
        if len(calls) % 3 == 0:
            raise OSError(errno.EINTR, "interrupted")
        # Not a multiple of a block: a direct read cannot go on just there.
        return pread(fd, address, nbytes, offset) if len(calls) % 2 else min(pread(fd, address, nbytes, offset), 2 * BLOCK + 100)

    monkeypatch.setattr(libc, "pread", hesitant)
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK, n_readers=2), tensors)


def test_less_than_a_block_at_a_time_still_arrives(checkpoint, tensors, assert_equal, monkeypatch, uncached):
    pread = libc.pread
    monkeypatch.setattr(libc, "pread", lambda fd, address, nbytes, offset: min(pread(fd, address, nbytes, offset), 3000))
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK), tensors)


def test_the_first_error_stops_all_and_names_file_and_offset(checkpoint, monkeypatch, n_fds, uncached):
    pread, calls, before = libc.pread, [], n_fds()

    def failing(fd, address, nbytes, offset):
        calls.append(offset)
        if offset == 2 * CHUNK:
            raise OSError(errno.EIO, "broken")
        return pread(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "pread", failing)
    with pytest.raises(OSError, match=f"error at byte {2 * CHUNK}: .*model.safetensors") as caught:
        read(checkpoint, n_threads=1)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(checkpoint / "model.safetensors")
    plan = plan_reads(read_index(checkpoint), CHUNK)
    assert calls == [chunk.offset for chunk in plan.chunks[: calls.index(2 * CHUNK) + 1]]
    assert n_fds() == before


@pytest.mark.parametrize("cut", [1, 100, CHUNK, 3 * CHUNK + 5])
def test_a_file_that_shrinks_before_it_is_opened_is_corrupt(checkpoint, cut, n_fds):
    file = checkpoint / "model.safetensors"
    plan = plan_reads(read_index(checkpoint), CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    before = n_fds()
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(CheckpointCorrupt, match="bytes long a moment ago"):
        read_chunks(plan, address_of(buffer))
    assert n_fds() == before


@pytest.mark.parametrize("cut", [1, 100, CHUNK, 3 * CHUNK + 5])
def test_a_file_that_shrinks_while_it_is_read_is_corrupt(checkpoint, cut, uncached):
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size

    def shrink(done: int) -> None:
        if done and file.stat().st_size == size:
            os.truncate(file, size - cut)

    with pytest.raises(CheckpointCorrupt, match=f"ends at byte .*{size - cut}|was written to") as caught:
        read(checkpoint, on_progress=shrink, n_threads=1)
    assert caught.value.file == str(file)


def test_a_read_that_is_called_off_stops_between_chunks(checkpoint, preads):
    cancel = threading.Event()

    def call_off(done: int) -> None:
        if done:
            cancel.set()

    with pytest.raises(Cancelled):
        read(checkpoint, on_progress=call_off, cancel=cancel, n_threads=1)
    assert len(preads) == 1


def test_a_progress_callback_that_raises_ends_the_read_with_its_error(checkpoint):
    def broken(done: int) -> None:
        if done:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        read(checkpoint, on_progress=broken)


def test_old_files_whose_data_starts_anywhere_are_read_too(tmp_path, tensors, assert_equal):
    saved = safetensors.torch.save(tensors)
    n = int.from_bytes(saved[:8], "little")
    for padding in range(8):
        header = saved[8 : 8 + n].rstrip() + b" " * padding
        file = tmp_path / f"{padding}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + saved[8 + n :])
        assert_equal(read_checkpoint(file, chunk_size=CHUNK), safetensors.torch.load_file(file))


# --- which way a file is read ----------------------------------------------------------------------------------------


def drop_from_cache(path: Path) -> None:
    """Skips the test where the file system keeps files in the cache, as tmpfs does."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    left = libc.cached_pages(fd, 0, 2**40)
    os.close(fd)
    if left:
        pytest.skip("the file system keeps files in the page cache")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one with each read of tensor data: whether it was direct."""
    seen: list[bool] = []
    direct: set[int] = set()
    pread, open_direct = libc.pread, libc.open_direct

    def opening(path: str) -> int | None:
        fd = open_direct(path)
        if fd is not None:
            direct.add(fd)
        return fd

    def reading(fd: int, address: int, nbytes: int, offset: int) -> int:
        seen.append(fd in direct)
        return pread(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "open_direct", opening)
    monkeypatch.setattr(libc, "pread", reading)
    return seen


def test_what_is_not_in_the_page_cache_is_read_directly_and_stays_out_of_it(checkpoint, tensors, assert_equal, ways):
    file = checkpoint / "model.safetensors"
    drop_from_cache(file)
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK), tensors)
    assert len(ways) > 10
    # The header was read through the cache, which reads a little ahead.
    assert sum(ways) >= len(ways) - 8


def test_what_is_in_the_page_cache_is_read_from_there(checkpoint, tensors, assert_equal, ways):
    file = checkpoint / "model.safetensors"
    file.read_bytes()
    with open(file, "rb") as opened:
        if not libc.cached_pages(opened.fileno(), 0, 2**40):
            pytest.skip("this system does not tell what is in the page cache")
    plan = plan_reads(read_index(checkpoint), CHUNK)
    source = LocalFiles(plan)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), source=source)
    assert_equal(tensor_views(read_index(checkpoint), plan, buffer), tensors)
    assert not any(ways)
    assert source.cached_nbytes == sum(chunk.wanted for chunk in plan.chunks)


DEVICE = 7


def observe(systems: FileSystems, *seconds_per_mb: float) -> list[bool]:
    """Let `systems` choose reads, direct ones that take the first time and buffered ones that take the second; what it chose."""
    chosen = []
    while systems.on_trial(DEVICE):
        chosen.append(systems.direct(DEVICE))
        systems.observe(DEVICE, chosen[-1], 10**6 * 4, seconds_per_mb[0 if chosen[-1] else 1] * 4)
    return chosen


def test_where_direct_reads_are_fast_nothing_else_is_tried():
    systems = FileSystems()
    assert observe(systems, 1 / 800, 0) == [True] * reader.TRIAL_READS
    assert systems.direct(DEVICE)


@pytest.mark.parametrize(
    ("direct", "buffered", "chosen"), [(1 / 100, 1 / 300, False), (1 / 300, 1 / 310, True), (1 / 300, 1 / 90, True)]
)
def test_where_direct_reads_are_slow_buffered_ones_must_be_clearly_faster(direct, buffered, chosen):
    systems = FileSystems()
    assert observe(systems, direct, buffered) == [True] * reader.TRIAL_READS + [False] * reader.TRIAL_READS
    assert systems.direct(DEVICE) is chosen
    assert not systems.on_trial(DEVICE)
    assert systems.on_trial(DEVICE + 1), "another file system is another matter"


def test_small_reads_decide_nothing():
    systems = FileSystems()
    for _ in range(100):
        systems.observe(DEVICE, True, reader.TRIAL_NBYTES - 1, 100.0)
    assert systems.on_trial(DEVICE)
    assert systems.direct(DEVICE)


def test_one_slow_read_among_fast_ones_decides_nothing():
    systems = FileSystems()
    for seconds in (0.001, 10.0, 0.001, 0.001):
        systems.observe(DEVICE, True, 10**6 * 4, seconds)
    assert systems.direct(DEVICE)
    assert not systems.on_trial(DEVICE)


def test_a_file_system_whose_direct_reads_are_slow_is_read_through_the_page_cache_from_then_on(
    tmp_path, write_single, monkeypatch, ways, uncached
):
    tensors = {f"t{i}": torch.full((2**20,), i, dtype=torch.uint8) for i in range(20)}
    checkpoint = write_single(tmp_path / "m", tensors)
    drop_from_cache(checkpoint / "model.safetensors")
    now = 0.0
    counting = libc.pread

    def slow(fd: int, address: int, nbytes: int, offset: int) -> int:
        nonlocal now
        n = counting(fd, address, nbytes, offset)
        now += 1.0 if ways[-1] else 0.001
        return n

    advice, advise = [], os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: (advice.append(args), advise(*args)))
    monkeypatch.setattr(libc, "pread", slow)
    systems = FileSystems(clock=lambda: now)
    for n_direct in (reader.TRIAL_READS, 0):
        plan = plan_reads(read_index(checkpoint), 2**20)
        buffer = BufferPool(2**30).lease(plan.nbytes)
        ways.clear()
        read_chunks(plan, address_of(buffer), source=LocalFiles(plan, systems), n_threads=1)
        assert sum(ways) == n_direct
        assert len(ways) >= 20
        assert tensor_views(read_index(checkpoint), plan, buffer)["t7"].eq(7).all()
    # Compared is what comes from the file system, not what an earlier reader left in memory.
    assert sum(kind == os.POSIX_FADV_DONTNEED for *_, kind in advice) == reader.TRIAL_READS


# --- files that change, many files -----------------------------------------------------------------------------------


def test_a_file_that_is_written_to_while_it_is_read_is_not_used(checkpoint):
    file = checkpoint / "model.safetensors"

    def touch(done: int) -> None:
        os.utime(file, ns=(done, done))

    with pytest.raises(CheckpointCorrupt, match="was written to, or replaced, while it was read"):
        read(checkpoint, on_progress=touch)


def test_a_file_that_is_replaced_before_its_turn_is_not_used(tmp_path, tensors, write_sharded):
    checkpoint = write_sharded(tmp_path / "m", [{name: tensor} for name, tensor in tensors.items()])
    last = sorted(checkpoint.glob("*.safetensors"))[-1]

    def replace_last(done: int) -> None:
        copy = last.with_suffix(".new")
        copy.write_bytes(last.read_bytes())
        copy.replace(last)

    with pytest.raises(CheckpointCorrupt, match="replaced") as caught:
        read(checkpoint, on_progress=lambda done: None if done else replace_last(done), n_threads=1)
    assert caught.value.file == str(last)


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(checkpoint, tensors, assert_equal):
    index = read_index(checkpoint)
    plan = plan_reads(index, CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)

    def delete(done: int) -> None:
        if done:
            (checkpoint / "model.safetensors").unlink(missing_ok=True)

    read_chunks(plan, address_of(buffer), on_progress=delete)
    assert_equal(tensor_views(index, plan, buffer), tensors)


def test_more_shards_than_may_be_open_are_read_with_few_open_at_a_time(tmp_path, write_sharded, assert_equal, monkeypatch, n_fds):
    tensors = {f"layers.{i}.w": torch.full((100,), i, dtype=torch.int32) for i in range(200)}
    checkpoint = write_sharded(tmp_path / "m", [{name: tensor} for name, tensor in tensors.items()])
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 3)
    index = read_index(checkpoint)
    plan = plan_reads(index, CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    before, most = n_fds(), 0

    def count(done: int) -> None:
        nonlocal most
        most = max(most, n_fds())

    read_chunks(plan, address_of(buffer), on_progress=count, n_threads=2)
    assert_equal(tensor_views(index, plan, buffer), tensors)
    # Up to two for each of the three files that are kept and of the two that are read.
    assert most <= before + 10
    assert n_fds() == before


# --- checked, decoded, staged ----------------------------------------------------------------------------------------

Written = tuple[CheckpointIndex, np.ndarray]


@pytest.fixture
def fast(tmp_path: Path) -> Written:
    """Our own format, byte by byte: ten chunks of 64 KiB bfloat16, raw and split16 by turns, one tensor in each two."""
    rng = np.random.default_rng(0)
    data = torch.from_numpy(rng.normal(size=10 * CHUNK // 2)).to(torch.bfloat16).view(torch.uint8).numpy()
    chunks, offset = [], 0
    with open(tmp_path / "0.bin", "wb") as opened:
        for number in range(10):
            plain = np.ascontiguousarray(data[number * CHUNK : (number + 1) * CHUNK])
            encoded = codec.encode_split16(plain) if number % 2 else None
            assert (encoded is not None) == number % 2
            stored = np.frombuffer(encoded, np.uint8) if encoded is not None else plain
            name = "raw" if encoded is None else "split16"
            chunks.append(
                ChunkEntry(number * CHUNK, CHUNK, offset, stored.nbytes, xxh64(address_of(stored), stored.nbytes), name)
            )
            opened.write(stored.tobytes().ljust(round_up(stored.nbytes, BLOCK), b"\0"))
            offset += round_up(stored.nbytes, BLOCK)
    tensors = tuple(TensorEntry(f"layers.{i}", "BF16", (CHUNK,), "0.bin", i * 2 * CHUNK, 2 * CHUNK) for i in range(5))
    return CheckpointIndex(str(tmp_path), tensors, (FileEntry("0.bin", offset, 0, 10 * CHUNK, tuple(chunks)),), "fast"), data


@pytest.mark.parametrize("direct_target", [True, False])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_stored_chunks_are_checked_and_decoded_to_their_places_and_nothing_around_them_is_hit(fast, direct_target, n_threads):
    index, data = fast
    plan = plan_reads(index, 1)
    memory = BufferPool(2**30).lease(plan.nbytes + 2 * BLOCK)
    memory[:] = 0xA5
    arrivals, seen = Arrivals(plan), []
    read_chunks(
        plan,
        address_of(memory) + BLOCK,
        n_threads=n_threads,
        arrivals=arrivals,
        on_progress=seen.append,
        direct_target=direct_target,
    )
    assert np.array_equal(memory[BLOCK:-BLOCK], data)
    assert (memory[:BLOCK] == 0xA5).all() and (memory[-BLOCK:] == 0xA5).all()
    assert arrivals.done
    assert seen == sorted(seen) and seen[-1] == index.nbytes == arrivals.nbytes


@pytest.mark.parametrize("number", range(10))
def test_a_flipped_bit_is_found_before_it_is_used_and_the_tensor_is_named(fast, number):
    index, _ = fast
    chunk = index.files[0].chunks[number]
    with open(index.path("0.bin"), "r+b") as opened:
        opened.seek(chunk.offset + chunk.stored // 2)
        [byte] = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))
    plan = plan_reads(index, 1)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    arrivals, told = Arrivals(plan), []
    with pytest.raises(CheckpointCorrupt, match="have checksum") as caught:
        read_chunks(plan, address_of(buffer), arrivals=arrivals, tee=lambda *of: told.append(of[0]))
    assert (caught.value.file, caught.value.tensor) == (index.path("0.bin"), f"layers.{number // 2}")
    assert not arrivals.has(f"layers.{number // 2}")
    assert plan.chunks[number] not in told
    with pytest.raises(CheckpointCorrupt, match=f"layers.{number // 2}"):
        arrivals.wait([f"layers.{number // 2}"])


def test_a_chunk_that_its_codec_refuses_is_an_error_that_names_the_tensor(fast):
    index, _ = fast
    plan = plan_reads(index, 1)
    garbage = np.full(plan.chunks[1].nbytes, 0xFF, np.uint8)
    with open(index.path("0.bin"), "r+b") as opened:
        opened.seek(plan.chunks[1].offset)
        opened.write(garbage.tobytes())
    checksum = xxh64(address_of(garbage), plan.chunks[1].wanted)
    chunks = (plan.chunks[0], replace(plan.chunks[1], checksum=checksum), *plan.chunks[2:])
    buffer = BufferPool(2**30).lease(plan.nbytes)
    with pytest.raises(CheckpointCorrupt, match="cannot be decoded") as caught:
        read_chunks(replace(plan, chunks=chunks), address_of(buffer))
    assert caught.value.tensor == "layers.0"


@pytest.mark.parametrize("direct_target", [True, False])
def test_a_tee_sees_the_stored_bytes_of_each_chunk_once(fast, direct_target):
    index, _ = fast
    plan = plan_reads(index, 1)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    copy = bytearray(index.files[0].nbytes)

    def tee(chunk: ChunkRead, address: int) -> None:
        libc.copy(address_of(np.frombuffer(copy, np.uint8)) + chunk.offset, address, chunk.wanted)

    read_chunks(plan, address_of(buffer), tee=tee, direct_target=direct_target)
    assert bytes(copy) == Path(index.path("0.bin")).read_bytes()


def test_a_tee_that_raises_ends_the_read(fast):
    index, _ = fast
    plan = plan_reads(index, 1)
    buffer = BufferPool(2**30).lease(plan.nbytes)

    def full(chunk: ChunkRead, address: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere")

    with pytest.raises(OSError, match="No space left on device: '/elsewhere'"):
        read_chunks(plan, address_of(buffer), tee=full)


def test_reads_that_share_their_scratch_memory_do_not_share_a_piece_of_it(fast, checkpoint, tensors, assert_equal):
    index, data = fast
    staging, start = Staging(), threading.Barrier(2)
    results: dict[str, np.ndarray] = {}

    def load(name: str, index: CheckpointIndex) -> None:
        start.wait()
        for _ in range(20):
            plan = plan_reads(index, CHUNK)
            results[name] = BufferPool(2**30).lease(plan.nbytes)
            read_chunks(plan, address_of(results[name]), staging=staging, direct_target=False)

    threads = [threading.Thread(target=load, args=(name, of)) for name, of in (("a", index), ("b", read_index(checkpoint)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(results["a"], data)
    assert_equal(tensor_views(read_index(checkpoint), plan_reads(read_index(checkpoint), CHUNK), results["b"]), tensors)


def test_a_tensor_that_must_be_moved_is_moved_once_and_has_arrived_only_then(tmp_path, write_raw, monkeypatch):
    value = np.arange(50_000, dtype=np.float64)
    header = {
        "layers.0": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "layers.1": {"dtype": "F64", "shape": [50_000], "data_offsets": [1, 400_001]},
        "layers.2": {"dtype": "U8", "shape": [99_999], "data_offsets": [400_001, 500_000]},
    }
    file = write_raw(tmp_path / "m.safetensors", header, b"\1" + value.tobytes() + b"\2" * 99_999)
    index = read_index(file)
    plan = plan_reads(index, CHUNK)
    assert plan.copies and len(plan.chunks_of["layers.1"]) > 3
    buffer = BufferPool(2**30).lease(plan.nbytes)
    arrivals, seen, copied, copy = Arrivals(plan), [], [], libc.copy

    def counting(target: int, source: int, nbytes: int) -> None:
        copied.append(nbytes)
        copy(target, source, nbytes)

    monkeypatch.setattr(libc, "copy", counting)

    def look(done: int) -> None:
        if arrivals.has("layers.1"):
            seen.append(np.array_equal(tensor_views(index, plan, buffer)["layers.1"].numpy(), value))

    read_chunks(plan, address_of(buffer), arrivals=arrivals, on_progress=look, n_threads=3)
    assert seen and all(seen)
    assert copied == [400_000]


# --- faults at every place -------------------------------------------------------------------------------------------


class Scripted:
    """A source of the bytes in `stored` that does what `on_fetch` does first, and counts who is at work."""

    def __init__(self, files: list[bytes], on_fetch: Callable[[ChunkRead], None] = lambda _: None) -> None:
        self.files, self.on_fetch = files, on_fetch
        self.lock = threading.Lock()
        self.begun: list[ChunkRead] = []
        self.n_working = 0
        self.closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.n_working == 0
        self.closed = True

    def fetch(self, chunk: ChunkRead, address: int) -> None:
        with self.lock:
            self.begun.append(chunk)
            self.n_working += 1
        try:
            self.on_fetch(chunk)
            stored = np.frombuffer(self.files[chunk.file][chunk.offset : chunk.offset + chunk.wanted], np.uint8)
            libc.copy(address, address_of(stored), chunk.wanted)
        finally:
            with self.lock:
                self.n_working -= 1


@pytest.fixture
def scripted(fast: Written) -> tuple[ReadPlan, Callable[..., Scripted], np.ndarray]:
    index, data = fast
    stored = Path(index.path("0.bin")).read_bytes()
    return plan_reads(index, 1), lambda *args: Scripted([stored], *args), data


def test_bytes_may_come_from_anywhere(scripted, no_thread_is_left):
    plan, source_of, data = scripted
    buffer = BufferPool(2**30).lease(plan.nbytes)
    names = set()
    source = source_of(lambda _: names.add(threading.current_thread().name))
    read_chunks(plan, address_of(buffer), source=source, n_threads=3)
    assert np.array_equal(buffer, data)
    assert source.closed
    assert sorted(chunk.position for chunk in source.begun) == sorted(chunk.position for chunk in plan.chunks)
    assert names <= {threading.current_thread().name, "read-1", "read-2"}


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("number", range(10))
def test_a_source_that_fails_at_any_chunk_ends_the_read_with_its_error(scripted, number, n_threads, no_thread_is_left):
    plan, source_of, _ = scripted
    error = OSError(errno.ECONNRESET, "gone", "peer")

    def fail(chunk: ChunkRead) -> None:
        if chunk is plan.chunks[number]:
            raise error

    source, arrivals, seen = source_of(fail), Arrivals(plan), []
    buffer = BufferPool(2**30).lease(plan.nbytes)
    with pytest.raises(OSError, match="gone") as caught:
        read_chunks(plan, address_of(buffer), source=source, arrivals=arrivals, on_progress=seen.append, n_threads=n_threads)
    assert caught.value is error
    assert source.closed
    assert not arrivals.done
    assert seen == sorted(seen)
    if n_threads == 1:
        assert source.begun == list(plan.chunks[: number + 1])
    with pytest.raises(OSError, match="gone"):
        arrivals.wait(["layers.4"])


def test_who_waits_hears_of_a_failure_at_once_and_no_chunk_is_begun_after_it(scripted, no_thread_is_left):
    plan, source_of, _ = scripted
    heard, begun, arrivals, in_time = threading.Event(), threading.Barrier(2), Arrivals(plan), []

    def one_fails_while_the_other_reads(chunk: ChunkRead) -> None:
        begun.wait(60)
        if chunk is plan.chunks[0]:
            raise ValueError("broken")
        in_time.append(heard.wait(10))

    def wait() -> None:
        with pytest.raises(ValueError, match="broken"):
            arrivals.wait(["layers.4"])
        heard.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    source = source_of(one_fails_while_the_other_reads)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    with pytest.raises(ValueError, match="broken"):
        read_chunks(plan, address_of(buffer), source=source, arrivals=arrivals, n_threads=2)
    waiter.join()
    assert in_time == [True]
    assert sorted(chunk.offset for chunk in source.begun) == sorted(chunk.offset for chunk in plan.chunks[:2])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("number", range(9))
def test_a_read_can_be_called_off_at_every_chunk(scripted, number, n_threads, no_thread_is_left):
    plan, source_of, _ = scripted
    cancel, arrivals = threading.Event(), Arrivals(plan)
    source = source_of(lambda chunk: cancel.set() if chunk is plan.chunks[number] else None)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    try:
        read_chunks(plan, address_of(buffer), source=source, arrivals=arrivals, cancel=cancel, n_threads=n_threads)
    except Cancelled:
        assert len(source.begun) < len(plan.chunks)
        with pytest.raises(Cancelled):
            arrivals.wait(["layers.4"])
    else:
        assert n_threads > 1
        assert arrivals.done
    assert source.closed
    if n_threads == 1:
        assert len(source.begun) == number + 1


def test_a_read_that_is_called_off_when_all_is_begun_is_completed(scripted):
    plan, source_of, data = scripted
    cancel = threading.Event()
    source = source_of(lambda chunk: cancel.set() if chunk is plan.chunks[-1] else None)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), source=source, cancel=cancel, n_threads=1)
    assert np.array_equal(buffer, data)


def test_an_error_before_the_first_chunk_reaches_those_who_wait(checkpoint):
    plan = plan_reads(read_index(checkpoint), CHUNK)
    (checkpoint / "model.safetensors").unlink()
    arrivals = Arrivals(plan)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    with pytest.raises(FileNotFoundError):
        read_chunks(plan, address_of(buffer), arrivals=arrivals)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        arrivals.wait(["layers.0"])


def test_an_interrupt_is_raised_only_when_no_thread_is_at_work_any_more(scripted, monkeypatch, no_thread_is_left):
    plan, source_of, _ = scripted
    here, begun, gate, joins = threading.current_thread(), threading.Event(), threading.Event(), []
    join = threading.Thread.join

    def hold(chunk: ChunkRead) -> None:
        if threading.current_thread() is here:
            assert begun.wait(60)
        else:
            begun.set()
            gate.wait()

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        joins.append(thread)
        if len(joins) == 1:
            raise KeyboardInterrupt
        gate.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    source = source_of(hold)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    try:
        with pytest.raises(KeyboardInterrupt):
            read_chunks(plan, address_of(buffer), source=source, n_threads=2)
        assert source.closed
        assert len(joins) > 1
    finally:
        gate.set()


def test_a_system_without_another_thread_reads_with_those_that_there_are(scripted, monkeypatch):
    plan, source_of, data = scripted

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(buffer), source=source_of(), n_threads=4)
    assert np.array_equal(buffer, data)


# --- any layout ------------------------------------------------------------------------------------------------------

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 70), max_size=3)), max_size=8), min_size=1, max_size=4
    ),
    chunk_size=st.sampled_from([1, BLOCK, 3 * BLOCK, CHUNK, 2**24]),
    n_threads=st.integers(1, 5),
    padding=st.integers(0, 7),
    direct_target=st.booleans(),
)
def test_whatever_safetensors_writes_is_read_as_it_reads_it(shards, chunk_size, n_threads, padding, direct_target):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        expected = {}
        for number, shard in enumerate(shards):
            tensors = {}
            for i, (dtype, shape) in enumerate(shard):
                tensors[f"layers.{i}.{number}"] = tensor = torch.empty(shape, dtype=dtype)
                if tensor.numel():
                    data = rng.integers(0, 2 if dtype is torch.bool else 256, size=tensor.nbytes, dtype=np.uint8)
                    tensor.copy_(torch.from_numpy(data).view(dtype).reshape(shape))
            saved = safetensors.torch.save(tensors)
            n = int.from_bytes(saved[:8], "little")
            header = saved[8 : 8 + n].rstrip() + b" " * padding
            file = Path(directory, f"{number}.safetensors")
            file.write_bytes(len(header).to_bytes(8, "little") + header + saved[8 + n :])
            expected |= safetensors.torch.load_file(file)
        indexes = [read_index(Path(directory, f"{number}.safetensors")) for number in range(len(shards))]
        index = CheckpointIndex(
            indexes[0].directory,
            tuple(tensor for index in indexes for tensor in index.tensors),
            tuple(file for index in indexes for file in index.files),
        )
        plan = plan_reads(index, chunk_size)
        buffer = BufferPool(2**30).lease(plan.nbytes)
        arrivals = Arrivals(plan)
        read_chunks(plan, address_of(buffer), arrivals=arrivals, n_threads=n_threads, direct_target=direct_target)
        found = tensor_views(index, plan, buffer)
        assert arrivals.done and all(map(arrivals.has, found))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            if tensor.numel():
                assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


# --- what is there already, and what is checked by other threads -----------------------------------------------------


@pytest.mark.parametrize("compress", ["no", "yes"])
def test_only_what_is_not_resident_is_read_and_the_rest_is_said_to_be_there(tmp_path, compress, preads):
    generator = torch.Generator().manual_seed(3)
    tensors = {f"layers.{i}.w": (torch.randn(1024, 700, generator=generator) * 0.02).bfloat16() for i in range(6)}
    write_checkpoint(sources_of(tensors), tmp_path / "fast", compress=compress)
    index = read_index(tmp_path / "fast")
    plan = plan_reads(index, CHUNK)
    whole = BufferPool(2**30).lease(plan.nbytes)
    read_chunks(plan, address_of(whole))
    for n_resident in range(len(plan.chunks) + 1):
        resident_nbytes = sum(chunk.decoded for chunk in plan.chunks[:n_resident])
        buffer = BufferPool(2**30).lease(plan.nbytes)
        buffer[:] = 0xEE
        buffer[:resident_nbytes] = whole[:resident_nbytes]
        preads.clear()
        seen, arrivals = [], Arrivals(plan)
        read_chunks(plan, address_of(buffer), arrivals=arrivals, on_progress=seen.append, resident_nbytes=resident_nbytes)
        assert (buffer == whole).all()
        assert arrivals.done and seen[-1] == plan.payload and seen == sorted(seen)
        assert (not preads) == (n_resident == len(plan.chunks))
        wanted = sum(chunk.wanted for chunk in plan.chunks[n_resident:])
        assert wanted <= sum(nbytes for _, nbytes in preads) <= wanted + BLOCK * len(plan.chunks)


def test_a_flipped_bit_in_any_chunk_of_a_run_is_found_by_whoever_checks_it(tmp_path):
    tensors = {f"layers.{i}.w": torch.full((1024, 700), i, dtype=torch.bfloat16) for i in range(12)}
    write_checkpoint(sources_of(tensors), tmp_path / "fast")
    [data] = [tmp_path / "fast" / file.name for file in read_index(tmp_path / "fast").files]
    sound = data.read_bytes()
    plan = plan_reads(read_index(tmp_path / "fast"), CHUNK)
    assert len(plan.chunks) > reader.RUN_NBYTES // (2 * 1024**2), "several runs"
    for number, chunk in enumerate(plan.chunks):
        damaged = bytearray(sound)
        damaged[chunk.offset + chunk.wanted // 3] ^= 4
        data.write_bytes(damaged)
        buffer = BufferPool(2**30).lease(plan.nbytes)
        arrivals = Arrivals(plan)
        with pytest.raises(CheckpointCorrupt) as caught:
            read_chunks(plan, address_of(buffer), arrivals=arrivals)
        assert caught.value.tensor == plan.first_tensor(number)
        with pytest.raises(CheckpointCorrupt):
            arrivals.wait_chunk(number)
