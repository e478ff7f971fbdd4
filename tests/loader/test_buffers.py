from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllmdask.loader import libc
from sllmdask.loader.buffers import PREFAULT_STEP, BufferPool, Staging, address_of, lease_nbytes
from sllmdask.loader.plan import BLOCK

MB = 1024**2


def track(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What is mapped from now on: bytes by address."""
    live: dict[int, int] = {}
    map_memory, unmap_memory = libc.map_memory, libc.unmap_memory

    def mapping(nbytes: int) -> int:
        address = map_memory(nbytes)
        live[address] = nbytes
        return address

    def unmapping(address: int, nbytes: int) -> None:
        unmap_memory(address, nbytes)
        forget(address, nbytes)

    def moving(source: int, nbytes: int, target: int) -> None:
        move_pages(source, nbytes, target)
        forget(source, nbytes)

    def forget(address: int, nbytes: int) -> None:
        # What a new mapping trims itself to was never counted.
        for start, size in [(start, size) for start, size in live.items() if start <= address < start + size]:
            del live[start]
            for rest, end in ((start, address), (address + nbytes, start + size)):
                if rest < end:
                    live[rest] = end - rest

    move_pages = libc.move_pages
    monkeypatch.setattr(libc, "map_memory", mapping)
    monkeypatch.setattr(libc, "unmap_memory", unmapping)
    monkeypatch.setattr(libc, "move_pages", moving)
    return live


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """What is mapped; nothing at the end."""
    live = track(monkeypatch)
    yield live
    assert not live


def resident(address: int, nbytes: int) -> float:
    """The part of the pages at `address` that are in memory, as the kernel counts them."""
    n_pages = nbytes // 4096
    found = (ctypes.c_ubyte * n_pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), found) == 0
    return sum(page & 1 for page in found) / n_pages


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


# --- touched ahead of need -------------------------------------------------------------------------------------------


def test_a_lease_after_prefaulting_has_its_pages_whatever_pieces_they_came_in():
    pool = BufferPool(256 * MB)
    assert pool.prefault(80 * MB) == pool.kept == 80 * MB
    assert pool.used == 0
    buffer = pool.lease(77 * MB)
    assert pool.kept == 2 * MB
    assert resident(address_of(buffer), 77 * MB) == 1
    more = pool.lease(4 * MB)
    assert resident(address_of(more), 4 * MB) == 0.5


def test_prefaulting_leaves_room_for_what_is_leased_and_what_is_kept_counts(mapped):
    pool = BufferPool(100 * MB)
    buffer = pool.lease(70 * MB)
    assert pool.prefault(80 * MB) == 30 * MB
    assert pool.prefault(20 * MB) == 30 * MB
    assert sum(mapped.values()) == 100 * MB
    del buffer
    assert pool.kept == 100 * MB
    pool.trim()
    assert pool.kept == 0


def test_prefaulting_ends_after_a_step_when_it_is_called_off():
    cancel = threading.Event()
    pool = BufferPool(2**40)
    cancel.set()
    assert pool.prefault(2**40, cancel) == 0

    def once(address: int, nbytes: int, populate=libc.populate) -> bool:
        cancel.set()
        return populate(address, nbytes)

    cancel.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libc, "populate", once)
        assert pool.prefault(2**40, cancel) == PREFAULT_STEP


def test_prefaulting_ends_quietly_where_the_system_has_no_memory(monkeypatch, mapped):
    def refuse(address: int, nbytes: int) -> bool:
        raise OSError(12, "no memory")

    pool = BufferPool(100 * MB)
    monkeypatch.setattr(libc, "populate", refuse)
    assert pool.prefault(80 * MB) == 0
    assert not mapped


def test_a_system_that_cannot_populate_is_made_to_by_writing(monkeypatch):
    monkeypatch.setattr(libc, "populate", lambda *_: False)
    pool = BufferPool(100 * MB)
    pool.prefault(8 * MB)
    assert resident(address_of(pool.lease(8 * MB)), 8 * MB) == 1


def test_pages_that_a_lease_left_untouched_are_touched_when_asked_for():
    pool = BufferPool(100 * MB, keep=100 * MB)
    del_me = pool.lease(40 * MB)
    del_me[: 2 * MB] = 1
    del del_me
    assert pool.kept == 40 * MB
    assert pool.prefault(40 * MB) == 40 * MB
    assert resident(address_of(pool.lease(40 * MB)), 40 * MB) == 1


# --- kept ------------------------------------------------------------------------------------------------------------


def test_trim_leaves_what_the_pool_is_to_keep(mapped):
    pool = BufferPool(100 * MB, keep=10 * MB)
    buffers = [pool.lease(6 * MB) for _ in range(5)]
    buffers.clear()
    assert pool.kept == 30 * MB
    pool.trim()
    assert pool.kept == sum(mapped.values()) == 10 * MB
    pool.keep = 0
    pool.trim()
    assert pool.kept == 0


def test_pieces_become_one_lease_with_their_pages_and_the_lease_before_them_is_not_hit():
    pool = BufferPool(12 * MB)
    leases = [pool.lease(2 * MB) for _ in range(6)]
    for number, lease in enumerate(leases):
        lease[:] = number
    kept = leases[1::2]
    del leases, lease
    assert pool.kept == 6 * MB
    whole = pool.lease(6 * MB)
    assert (pool.kept, pool.used) == (0, 12 * MB)
    assert sorted(whole[:: 2 * MB].tolist()) == [0, 2, 4], "the pages are the same, faulted in already"
    assert resident(address_of(whole), 6 * MB) == 1
    assert [set(lease.tolist()) for lease in kept] == [{1}, {3}, {5}]


def test_a_lease_of_more_than_was_kept_adds_only_what_is_missing(mapped):
    pool = BufferPool(20 * MB)
    first = pool.lease(4 * MB)
    first[:] = 7
    del first
    buffer = pool.lease(10 * MB)
    assert sum(mapped.values()) == 10 * MB
    assert (buffer[: 4 * MB] == 7).all()
    assert not buffer[4 * MB :].any()
    del buffer
    pool.trim()


def test_what_is_touched_is_leased_before_what_is_not():
    pool = BufferPool(100 * MB)
    untouched = pool.lease(8 * MB)
    pool.prefault(8 * MB)
    del untouched
    assert pool.kept == 16 * MB
    assert resident(address_of(pool.lease(8 * MB)), 8 * MB) == 1


def test_a_small_lease_costs_a_kept_huge_page_where_the_capacity_has_no_room_for_both(mapped):
    pool = BufferPool(6 * MB, keep=6 * MB)
    big = pool.lease(6 * MB)
    del big
    small = pool.lease(1)
    assert (pool.used, pool.kept) == (BLOCK, 4 * MB)
    assert sum(mapped.values()) == 4 * MB + BLOCK
    del small
    pool.keep = 0
    pool.trim()


def test_a_system_with_too_many_mappings_gives_new_memory(monkeypatch, mapped):
    def refuse(source: int, nbytes: int, target: int) -> None:
        raise OSError(12, "too many mappings")

    pool = BufferPool(20 * MB)
    parts = [pool.lease(2 * MB), pool.lease(2 * MB)]
    parts.clear()
    monkeypatch.setattr(libc, "move_pages", refuse)
    buffer = pool.lease(4 * MB)
    buffer[:] = 1
    assert pool.kept == 4 * MB
    del buffer
    pool.trim()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("lease"), st.sampled_from([1, BLOCK, MB, 2 * MB, 3 * MB, 5 * MB, 8 * MB])),
            st.tuples(st.just("drop"), st.integers(0, 9)),
            st.tuples(st.sampled_from(["trim", "prefault"]), st.integers(0, 20 * MB)),
        ),
        max_size=30,
    )
)
def test_any_use_keeps_to_the_capacity_and_every_lease_to_its_bytes(steps):
    capacity = 20 * MB
    live: dict[int, np.ndarray] = {}
    with pytest.MonkeyPatch.context() as patch:
        counts = track(patch)
        pool = BufferPool(capacity, keep=4 * MB)
        for number, (what, amount) in enumerate(steps, 1):
            if what == "lease" and lease_nbytes(amount) <= pool.available:
                live[number] = pool.lease(amount)
                live[number][:] = number
            elif what == "drop" and live:
                del live[list(live)[amount % len(live)]]
            elif what == "trim":
                pool.trim()
                assert pool.kept <= 4 * MB
            elif what == "prefault":
                pool.prefault(amount)
            assert pool.used == sum(lease_nbytes(lease.nbytes) for lease in live.values())
            assert pool.used + pool.kept <= capacity
            assert sum(counts.values()) == pool.used + pool.kept
            # Not in a loop, whose variable would keep a lease.
            assert all(lease.min() == lease.max() == name for name, lease in live.items())
        live.clear()
        pool.keep = 0
        pool.trim()
        assert not counts


# --- scratch ---------------------------------------------------------------------------------------------------------


def test_each_borrower_has_its_own_piece_and_the_next_has_it_again_with_its_pages():
    staging = Staging()
    with staging.borrow(3 * MB) as first, staging.borrow(3 * MB) as second:
        assert first % libc.HUGE_PAGE == second % libc.HUGE_PAGE == 0
        assert abs(first - second) >= 4 * MB
        assert resident(first, 3 * MB) == 1
    with staging.borrow(4 * MB) as third, staging.borrow(1) as fourth:
        assert {third, fourth} == {first, second}


def test_scratch_memory_beyond_the_limit_and_after_the_end_is_given_back(mapped):
    staging = Staging(keep=5 * MB)
    with staging.borrow(2 * MB), staging.borrow(2 * MB), staging.borrow(4 * MB):
        assert sum(mapped.values()) == 8 * MB
    assert sum(mapped.values()) == 4 * MB
    del staging
    gc.collect()


def test_scratch_memory_can_be_made_ready(mapped):
    staging = Staging()
    staging.prefault(3, 2 * MB)
    staging.prefault(2, 2 * MB)
    before = dict(mapped)
    assert len(before) == 3
    with staging.borrow(2 * MB), staging.borrow(2 * MB), staging.borrow(2 * MB):
        assert mapped == before
    del staging
    gc.collect()
