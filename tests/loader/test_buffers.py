from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from sllmdask.loader import libc
from sllmdask.loader.buffers import BufferPool, address_of, lease_nbytes
from sllmdask.loader.plan import BLOCK

MB = 1024**2


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What is mapped: bytes by address."""
    live: dict[int, int] = {}
    map_memory, unmap_memory = libc.map_memory, libc.unmap_memory

    def mapping(nbytes: int) -> int:
        address = map_memory(nbytes)
        live[address] = nbytes
        return address

    def unmapping(address: int, nbytes: int) -> None:
        unmap_memory(address, nbytes)
        # What a new mapping trims itself to was never counted.
        for start, size in [(start, size) for start, size in live.items() if start <= address < start + size]:
            del live[start]
            for rest, end in ((start, address), (address + nbytes, start + size)):
                if rest < end:
                    live[rest] = end - rest

    monkeypatch.setattr(libc, "map_memory", mapping)
    monkeypatch.setattr(libc, "unmap_memory", unmapping)
    yield live
    assert not live


def test_memory_is_zero_aligned_and_writable():
    buffer = BufferPool(8 * MB).lease(3 * MB + 1)
    assert (buffer.dtype, buffer.shape) == (np.uint8, (3 * MB + 1,))
    assert address_of(buffer) % libc.HUGE_PAGE == 0
    assert not buffer.any()
    buffer[:] = 255
    assert buffer[-1] == 255


def test_bytes_are_counted_until_the_last_view_is_gone():
    pool = BufferPool(8 * MB)
    buffer = pool.lease(MB)
    assert (pool.used, pool.available) == (MB, 7 * MB)
    part = buffer[10:20]
    tensor = torch.frombuffer(buffer, dtype=torch.int32, count=2, offset=8)
    tensor += 7
    view = tensor[1:]
    gc.disable()
    try:
        del buffer, tensor
        assert pool.used == MB
        del part
        assert pool.used == MB
        assert view.item() == 7
        del view
        assert pool.used == 0
    finally:
        gc.enable()


def test_what_came_back_is_handed_out_again_and_the_rest_is_kept():
    pool = BufferPool(8 * MB)
    first = pool.lease(6 * MB)
    address = address_of(first)
    first[0] = 1
    del first
    second, third = pool.lease(2 * MB), pool.lease(4 * MB)
    assert {address_of(second), address_of(third)} == {address, address + 2 * MB}
    assert second[0] == 1, "the pages are the same, faulted in already"
    assert pool.used == 6 * MB


def test_trim_gives_back_only_what_no_lease_holds(mapped):
    pool = BufferPool(8 * MB)
    kept, dropped = pool.lease(2 * MB), pool.lease(4 * MB)
    del dropped
    pool.trim()
    assert mapped == {address_of(kept): 2 * MB}
    kept[:] = 3
    del kept
    pool.trim()


def test_a_lease_outlives_its_pool_and_nothing_is_left_mapped_after_both(mapped):
    buffer = BufferPool(2 * MB).lease(MB)
    gc.collect()
    buffer[:] = 9
    assert int(buffer.sum()) == 9 * MB
    del buffer


def test_the_owner_hears_when_a_lease_ends():
    heard = []
    pool = BufferPool(MB, on_return=lambda: heard.append("back"))
    buffer = pool.lease(1)
    assert heard == []
    del buffer
    assert heard == ["back"]


def test_sizes_are_whole_blocks_or_whole_huge_pages():
    assert [lease_nbytes(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [BLOCK, BLOCK, BLOCK, 2 * BLOCK]
    assert lease_nbytes(2 * MB + 1) == 4 * MB


def test_a_system_without_room_is_an_error_with_its_errno_and_counts_nothing():
    pool = BufferPool(2**62)
    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        pool.lease(2**60)
    assert caught.value.errno == 12
    assert pool.used == 0
