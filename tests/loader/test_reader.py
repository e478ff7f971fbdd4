from __future__ import annotations

import errno
import os
import threading
import uuid
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader import libc
from sllmdask.loader.buffers import BufferPool, address_of
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import BLOCK, plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.store import read_checkpoint

CHUNK = 64 * 1024


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}": torch.randn(100 + 37 * i, 33, generator=generator) for i in range(20)}


@pytest.fixture
def checkpoint(tmp_path, write_single, tensors):
    return write_single(tmp_path / "m", tensors)


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
    assert all(nbytes % BLOCK == 0 for _, nbytes in preads)
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
    checkpoint, tensors, assert_equal, monkeypatch, n_fds
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


def test_short_reads_and_interruptions_lose_nothing(checkpoint, tensors, assert_equal, monkeypatch):
    pread, calls = libc.pread, []

    def hesitant(fd, address, nbytes, offset):
        calls.append(offset)
        if len(calls) % 3 == 0:
            raise OSError(errno.EINTR, "interrupted")
        # Not a multiple of a block: a direct read cannot go on just there.
        return pread(fd, address, nbytes, offset) if len(calls) % 2 else min(pread(fd, address, nbytes, offset), 2 * BLOCK + 100)

    monkeypatch.setattr(libc, "pread", hesitant)
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK, n_readers=2), tensors)


def test_less_than_a_block_at_a_time_still_arrives(checkpoint, tensors, assert_equal, monkeypatch):
    pread = libc.pread
    monkeypatch.setattr(libc, "pread", lambda fd, address, nbytes, offset: min(pread(fd, address, nbytes, offset), 3000))
    assert_equal(read_checkpoint(checkpoint, chunk_size=CHUNK), tensors)


def test_the_first_error_stops_all_and_names_file_and_offset(checkpoint, monkeypatch, n_fds):
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
    assert calls == [0, CHUNK, 2 * CHUNK]
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
def test_a_file_that_shrinks_while_it_is_read_is_corrupt(checkpoint, cut):
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size

    def shrink(done: int) -> None:
        if file.stat().st_size == size:
            os.truncate(file, size - cut)

    with pytest.raises(CheckpointCorrupt, match=f"ends at byte .*{size - cut}") as caught:
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
