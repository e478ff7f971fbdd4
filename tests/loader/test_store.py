"""One store over either pool, from directories on this disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import os
import random
import shutil
import threading

import msgpack
import pytest
import safetensors.torch
import torch

from sllmdask.config import WorkerSettings
from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointNotFound, InsufficientMemory, LoadFailed
from sllmdask.loader import libc, loads
from sllmdask.loader.buffers import lease_nbytes
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.convert import convert
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.store import CheckpointStore
from sllmdask.loader.throttle import Throttle
from tests.loader.stores import CHUNK, N, entry, flights_ended, reached, state, until, used

# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_load_reads_once_and_the_next_finds_the_copy(new_store, models, size, preads, assert_equal):
    store = await new_store(10 * size)
    lease = await store.load("m/a", str(models["a"]))
    assert_equal(lease.tensors, safetensors.torch.load_file(models["a"] / "model.safetensors"))
    assert (lease.key, lease.path, lease.nbytes, lease.tier_from) == ("m/a", str(models["a"]), 4 * N, "disk")
    assert lease.seconds > 0
    n_reads = len(preads)
    again = await store.load("m/a", str(models["a"]))
    assert again.tier_from == "host"
    assert again.tensors["w"].data_ptr() == lease.tensors["w"].data_ptr()
    assert len(preads) == n_reads
    await until(store, lambda: state(store, "m/a") == "host")
    assert entry(store, "m/a") == {
        "source": str(models["a"]),
        "state": "host",
        "nbytes": 4 * N,
        "done": 4 * N,
        "leases": 2,
        "pinned": False,
        "reason": None,
    }
    assert store.snapshot()["tiers"]["host"] == {"used": size, "capacity": 10 * size}
    assert msgpack.unpackb(msgpack.packb(store.snapshot())) == store.snapshot()
    lease.release()
    again.release()


@pytest.mark.asyncio
async def test_a_released_copy_stays_until_it_is_evicted(new_store, models, size):
    store = await new_store(10 * size)
    with await store.load("a", str(models["a"])) as lease:
        assert not await store.evict("a"), "a lease pins"
    assert lease.tensors == {}
    lease.release()
    await until(store, lambda: (state(store, "a"), used(store), entry(store, "a")["leases"]) == ("host", size, 0))
    assert await store.evict("a")
    await until(store, lambda: (state(store, "a"), used(store)) == ("disk", 0))
    assert not await store.evict("a")
    assert not await store.evict("unheard of")
    assert (await store.load("a", str(models["a"]))).tier_from == "disk"


@pytest.mark.asyncio
async def test_callers_at_once_share_one_read(new_store, models, size, preads):
    store = await new_store(10 * size)
    leases = await asyncio.gather(*(store.load("a", str(models["a"])) for _ in range(10)))
    assert len({lease.tensors["w"].data_ptr() for lease in leases}) == 1
    assert len(preads) == len(plan_reads(read_index(models["a"]), CHUNK).chunks)
    assert {lease.tier_from for lease in leases} == {"disk"}
    assert entry(store, "a")["leases"] == 10
    assert used(store) == size


@pytest.mark.asyncio
async def test_two_keys_of_one_directory_share_its_bytes(new_store, models, size, preads):
    store = await new_store(10 * size)
    x, y = await asyncio.gather(*(store.load(key, str(models["a"])) for key in "xy"))
    assert x.tensors["w"].data_ptr() == y.tensors["w"].data_ptr()
    assert sorted([x.tier_from, y.tier_from]) == ["disk", "host"]
    assert len(preads) == len(plan_reads(read_index(models["a"]), CHUNK).chunks)
    assert used(store) == size


@pytest.mark.asyncio
async def test_progress_begins_at_zero_never_falls_and_is_complete_before_the_lease(new_store, models, size):
    store = await new_store(10 * size)
    seen: list[tuple[int, int]] = []
    await store.load("a", str(models["a"]), lambda *progress: seen.append(progress))
    assert seen == sorted(seen)
    assert seen[0] == (0, 4 * N)
    assert seen[-1] == (4 * N, 4 * N)
    hit: list[tuple[int, int]] = []
    await store.load("a", str(models["a"]), lambda *progress: hit.append(progress))
    assert hit == [(4 * N, 4 * N)]


@pytest.mark.asyncio
async def test_what_another_key_had_brought_is_told_as_complete_progress(new_store, models, size):
    store = await new_store(10 * size)
    (await store.load("x", str(models["a"]))).release()
    seen: list[tuple[int, int]] = []
    lease = await store.load("y", str(models["a"]), lambda *progress: seen.append(progress))
    assert lease.tier_from == "host"
    assert seen == [(4 * N, 4 * N)]


@pytest.mark.asyncio
async def test_residency_is_declared_after_the_last_byte(new_store, models, size, gate):
    store = await new_store(10 * size)
    load = asyncio.create_task(store.load("a", str(models["a"])))
    await reached(gate.reached)
    assert (state(store, "a"), used(store)) == ("reading", size)
    late: list[tuple[int, int]] = []
    other = asyncio.create_task(store.load("a", str(models["a"]), lambda *progress: late.append(progress)))
    await asyncio.sleep(0)
    assert late == [(0, 4 * N)]
    gate.open()
    await asyncio.gather(load, other)
    assert state(store, "a") == "host"
    assert late[-1] == (4 * N, 4 * N)


@pytest.mark.asyncio
async def test_every_change_is_told_and_grows_the_version(new_store, models, size):
    store = await new_store(10 * size)
    seen: list[tuple[int, str, int]] = []

    def note() -> None:
        snapshot = store.snapshot()
        if "a" in snapshot["keys"]:
            seen.append((snapshot["version"], snapshot["keys"]["a"]["state"], snapshot["keys"]["a"]["leases"]))

    end = store.subscribe(note)
    lease = await store.load("a", str(models["a"]))
    lease.release()
    await until(store, lambda: (state(store, "a"), entry(store, "a")["leases"]) == ("host", 0))
    await asyncio.sleep(0)
    assert seen[-1][1:] == ("host", 0)
    await store.evict("a")
    await until(store, lambda: state(store, "a") == "disk")
    await asyncio.sleep(0)
    assert seen[-1][1:] == ("disk", 0)
    versions = [version for version, _, _ in seen]
    assert versions == sorted(versions)
    states = [s for s, _ in itertools.groupby(s for _, s, _ in seen)]
    assert states[0] in ("absent", "disk", "reading") and states[-2:] == ["host", "disk"]
    assert states.index("reading") < states.index("host")
    end()
    n_seen = len(seen)
    (await store.load("a", str(models["a"]))).release()
    await asyncio.sleep(0)
    assert len(seen) == n_seen


@pytest.mark.asyncio
async def test_only_what_came_from_the_disk_tells_how_fast_it_is(new_store, models, size, cold):
    store = await new_store(10 * size)
    for key in "ab":
        os.sync()
        (models[key] / "model.safetensors").read_bytes()
    (await store.load("a", str(models["a"]))).release()
    assert store.snapshot()["bandwidth"] == {}, "it came from the page cache"
    (await store.load("b", str(cold(models["b"])))).release()
    assert store.snapshot()["bandwidth"]["disk"]["n_loads"] == 1
    assert store.snapshot()["bandwidth"]["disk"]["bytes_per_s"] > 0
    (await store.load("b", str(models["b"]))).release()
    assert store.snapshot()["bandwidth"]["disk"]["n_loads"] == 1, "the second came from memory"


@pytest.mark.asyncio
async def test_no_more_than_the_limit_is_read_from_the_disk(new_store, models, size, cold, monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(Throttle, "take", lambda _self, nbytes, _cancel: taken.append(nbytes))
    store = await new_store(10 * size, read_limit=1e6)
    (models["a"] / "model.safetensors").read_bytes()
    (await store.load("a", str(models["a"]))).release()
    assert not taken, "it came from the page cache"
    (await store.load("b", str(cold(models["b"])))).release()
    assert sum(taken) >= 4 * N


@pytest.mark.asyncio
async def test_a_load_that_waits_for_its_share_of_the_disk_can_be_called_off(new_store, models, size, cold):
    store = await new_store(10 * size, read_limit=1e3)
    loading = asyncio.create_task(store.load("a", str(cold(models["a"]))))
    await until(store, lambda: state(store, "a") == "reading")
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await flights_ended(store)
    await until(store, lambda: used(store) == 0)


@pytest.mark.asyncio
async def test_what_a_store_learns_is_known_to_the_next_one_of_its_directory(new_store, models, size, cold):
    store = await new_store(10 * size)
    (await store.load("a", str(cold(models["a"])))).release()
    other = await new_store(10 * size)
    await other.measure()
    assert other.snapshot()["bandwidth"].get("disk", {"n_loads": 0})["n_loads"] == 0, "nothing is kept before it is asked for"
    await store.measure()
    await asyncio.gather(*store._background.tasks)  # the probe of the disk counts, too
    learned = store.snapshot()["bandwidth"]["disk"]
    assert learned["n_loads"] == 1
    store.observe_hit(10**9, 0.02)
    await asyncio.gather(*store._background.tasks)
    heir = await new_store(10 * size)
    await heir.measure()
    known = heir.snapshot()["bandwidth"]
    assert known["disk"] == learned
    assert known["host"] == {"overhead_s": 0.0, "bytes_per_s": pytest.approx(5e10), "n_loads": 1}


@pytest.mark.asyncio
async def test_copies_take_no_more_of_the_disk_than_the_hardware_file_and_the_quota_allow(new_store, size):
    for quota, given, bound in ((0, 10**9, 10**9), (10**8, 10**9, 10**8), (10**9, 10**8, 10**8)):
        store = await new_store(size, disk_quota=quota)
        store.bound_disk(given)
        await until(store, lambda: store.snapshot()["tiers"]["disk"]["capacity"] == bound)  # noqa: B023


# --- pinned ----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_is_pinned_stays_whatever_else_wants_the_room(new_store, models, size):
    store = await new_store(2 * size)
    assert await store.pin("a", str(models["a"])) == "disk"
    assert await store.pin("a", str(models["a"])) == "host", "again: it is there"
    assert entry(store, "a")["pinned"] and entry(store, "a")["leases"] == 1
    for key in "bcb":
        (await store.load(key, str(models[key]))).release()
    assert state(store, "a") == "host" and not await store.evict("a")
    blocking = await store.load("b", str(models["b"]))
    with pytest.raises(InsufficientMemory):
        await store.load("c", str(models["c"]))
    blocking.release()

    assert store.unpin("a") and not store.unpin("a")
    assert not entry(store, "a")["pinned"]
    both = [await store.load(key, str(models[key])) for key in "bc"]
    assert state(store, "a") == "disk"
    for lease in both:
        lease.release()


@pytest.mark.asyncio
async def test_what_is_forgotten_is_pinned_no_more_and_gone(new_store, models, size):
    store = await new_store(2 * size)
    await store.pin("a", str(models["a"]))
    assert await store.forget("a")
    await until(store, lambda: used(store) == 0)
    assert not entry(store, "a")["pinned"] and models["a"].is_dir()


@pytest.mark.asyncio
async def test_a_pin_that_cannot_be_had_changes_nothing(new_store, models, size):
    store = await new_store(size)
    await store.pin("a", str(models["a"]))
    with pytest.raises(InsufficientMemory):
        await store.pin("b", str(models["b"]))
    with pytest.raises(CheckpointNotFound):
        await store.pin("none", "/no/such/model")
    assert entry(store, "a")["pinned"] and state(store, "a") == "host"


# --- of our own format -----------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_checkpoint_of_our_own_format_is_loaded_raw_or_compressed(new_store, tmp_path, write_single, assert_equal, size):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.w": torch.randn(200, 333, generator=generator).bfloat16() for i in range(12)}
    source = write_single(tmp_path / "source", tensors)
    store = await new_store(20 * size)
    for compress in ("no", "yes", "both"):
        target = tmp_path / compress
        convert(source, target, compress)
        with await store.load(target.name, str(target)) as lease:
            assert_equal(lease.tensors, tensors)
            assert lease.tier_from == "disk"


# --- before the bytes ------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_lease_may_come_before_the_bytes_and_tells_which_are_there(new_store, size, gate, tmp_path, write_single):
    tensors = {f"model.layers.{i}.w": torch.full((N // 10,), float(i)) for i in range(10)}
    many = write_single(tmp_path / "many", tensors)
    store = await new_store(10 * size)
    plan = plan_reads(read_index(many), CHUNK)
    gate.free_below = max(plan.chunks[number].offset for number in plan.chunks_of["model.layers.0.w"]) + 1
    lease = await store.load("m", str(many), whole=False)
    assert state(store, "m") != "host"
    await asyncio.to_thread(lease.arrivals.wait, ["model.layers.0.w"], 30)
    assert torch.equal(lease.tensors["model.layers.0.w"], tensors["model.layers.0.w"])
    assert not lease.arrivals.has("model.layers.9.w")
    with pytest.raises(TimeoutError):
        lease.arrivals.wait(["model.layers.9.w"], 0)
    completing = asyncio.create_task(lease.complete())
    await asyncio.sleep(0)
    assert not completing.done()
    gate.open()
    await completing
    lease.arrivals.wait(tensors, 0)
    assert all(torch.equal(lease.tensors[name], tensor) for name, tensor in tensors.items())
    assert state(store, "m") == "host"
    lease.release()
    await lease.complete()


@pytest.mark.asyncio
async def test_who_wants_all_and_who_wants_the_places_share_one_read_and_both_hear_how_far_it_is(
    new_store, models, size, gate, preads
):
    store = await new_store(10 * size)
    heard: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    first = await store.load("a", str(models["a"]), lambda *progress: heard[0].append(progress), whole=False)
    second = await store.load("a", str(models["a"]), lambda *progress: heard[1].append(progress), whole=False)
    whole = asyncio.create_task(store.load("a", str(models["a"]), lambda *progress: heard[2].append(progress)))
    await reached(gate.reached)
    assert not whole.done()
    gate.open()
    third = await whole
    assert len({lease.tensors["w"].data_ptr() for lease in (first, second, third)}) == 1
    assert len(preads) == len(plan_reads(read_index(models["a"]), CHUNK).chunks)
    assert [lease.arrivals is None for lease in (first, second, third)] == [False, False, True]
    assert [told[-1] for told in heard.values()] == [(4 * N, 4 * N)] * 3
    assert entry(store, "a")["leases"] == 3
    hit = await store.load("a", str(models["a"]), whole=False)
    assert (hit.tier_from, hit.arrivals) == ("host", None)


@pytest.mark.asyncio
async def test_a_lease_that_is_released_before_its_bytes_are_there_calls_the_load_off(new_store, models, size, gate):
    store = await new_store(size)
    lease = await store.load("a", str(models["a"]), whole=False)
    arrivals = lease.arrivals
    await reached(gate.reached)
    lease.release()
    assert state(store, "a") == "disk"
    with pytest.raises(Cancelled):
        arrivals.wait(["w"], 30)
    gate.open()
    # There is room for one: the memory has come back.
    with await store.load("b", str(models["b"])) as other:
        assert other.tensors["w"].eq(1).all()
    assert gate.n_reads <= 2 + len(plan_reads(read_index(models["a"]), CHUNK).chunks)


@pytest.mark.asyncio
async def test_a_lease_that_is_released_early_takes_nothing_from_others(new_store, models, size, gate):
    store = await new_store(size)
    leaving = await store.load("a", str(models["a"]), whole=False)
    staying = await store.load("a", str(models["a"]), whole=False)
    whole = asyncio.create_task(store.load("a", str(models["a"])))
    await reached(gate.reached)
    leaving.release()
    staying.release()
    assert state(store, "a") == "reading"
    gate.open()
    assert (await whole).tensors["w"].eq(0).all()
    assert entry(store, "a")["leases"] == 1


@pytest.mark.asyncio
async def test_a_load_that_is_called_off_while_it_waits_for_the_disk_gives_its_memory_back_at_once(new_store, models, size, gate):
    store = await new_store(2 * size)
    reading = asyncio.create_task(store.load("a", str(models["a"])))
    await reached(gate.reached)
    waiting = await store.load("b", str(models["b"]), whole=False)
    assert used(store) == 2 * size
    waiting.release()
    # While the disk is still busy.
    lease = await store.load("c", str(models["c"]), whole=False)
    gate.open()
    await lease.complete()
    assert lease.tensors["w"].eq(2).all()
    assert (await reading).tensors["w"].eq(0).all()


@pytest.mark.asyncio
async def test_a_read_that_fails_reaches_everyone_who_waits_and_frees_the_memory(new_store, models, size, monkeypatch):
    store, pread = await new_store(size), libc.pread
    may = threading.Event()

    def broken(fd, address, nbytes, offset):
        assert may.wait(30)
        if offset >= 10 * CHUNK:
            raise OSError(errno.EIO, "broken")
        return pread(fd, address, nbytes, offset)

    with monkeypatch.context() as patched:
        patched.setattr(libc, "pread", broken)
        early = await store.load("a", str(models["a"]), whole=False)
        whole = asyncio.create_task(store.load("a", str(models["a"])))
        completing = asyncio.create_task(early.complete())
        waiting = asyncio.create_task(asyncio.to_thread(early.arrivals.wait, ["w"], 30))
        await asyncio.sleep(0)
        may.set()
        errors = await asyncio.gather(whole, completing, waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [LoadFailed, LoadFailed, OSError]
    assert all("model.safetensors" in str(error) for error in errors)
    with pytest.raises(LoadFailed, match="safetensors"):
        await early.complete()
    assert (state(store, "a"), entry(store, "a")["leases"]) == ("failed", 0)
    early.release()
    with await store.load("b", str(models["b"])) as lease:
        assert lease.tensors["w"].eq(1).all()


@pytest.mark.asyncio
async def test_memory_of_a_failed_load_is_not_used_again_while_somebody_looks_at_it(new_store, models, size, monkeypatch):
    store, pread = await new_store(size), libc.pread

    def broken(fd, address, nbytes, offset):
        if offset >= 10 * CHUNK:
            raise OSError(errno.EIO, "broken")
        return pread(fd, address, nbytes, offset)

    with monkeypatch.context() as patched:
        patched.setattr(libc, "pread", broken)
        lease = await store.load("b", str(models["b"]), whole=False)
        with pytest.raises(LoadFailed):
            await lease.complete()
    with pytest.raises(InsufficientMemory):
        await store.load("a", str(models["a"]))
    lease.release()
    with await store.load("a", str(models["a"])) as lease:
        assert lease.tensors["w"].eq(0).all()


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_caller_that_leaves_does_not_break_the_others(new_store, models, size, gate):
    store = await new_store(10 * size)
    leaving, staying = (asyncio.create_task(store.load("a", str(models["a"]))) for _ in range(2))
    await reached(gate.reached)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.open()
    lease = await staying
    assert lease.tensors["w"].sum() == 0
    assert entry(store, "a")["leases"] == 1


@pytest.mark.asyncio
async def test_the_read_stops_when_the_last_caller_has_left(new_store, models, size, gate):
    store = await new_store(size)
    loads = [asyncio.create_task(store.load("a", str(models["a"]))) for _ in range(2)]
    await reached(gate.reached)
    for load in loads:
        load.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    assert state(store, "a") == "disk"
    assert used(store) == size, "the threads still write to it"
    again = asyncio.create_task(store.load("a", str(models["a"])))
    await asyncio.sleep(0)
    gate.open()
    lease = await again
    assert lease.tensors["w"].sum() == 0
    # Two chunks, one per thread, of the read that was called off.
    assert gate.n_reads <= 2 + len(plan_reads(read_index(models["a"]), CHUNK).chunks)


@pytest.mark.asyncio
async def test_a_caller_that_leaves_as_its_lease_arrives_pins_nothing(new_store, models, size):
    store = await new_store(10 * size)
    load = asyncio.create_task(store.load("a", str(models["a"])))
    land = store._loads._land

    def land_and_leave(*args):
        land(*args)
        load.cancel()

    store._loads._land = land_and_leave
    with pytest.raises(asyncio.CancelledError):
        await load
    await until(store, lambda: (state(store, "a"), entry(store, "a")["leases"]) == ("host", 0))


@pytest.mark.asyncio
async def test_closing_ends_loads_and_gives_everything_back(new_store, models, size, gate):
    store = await new_store(10 * size)
    load, queued = (asyncio.create_task(store.load(key, str(models[key]))) for key in "ab")
    await reached(gate.reached)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    gate.open()
    await closing
    for task in (load, queued):
        with pytest.raises(LoadFailed, match="closed"):
            await task
    assert used(store) == 0
    with pytest.raises(LoadFailed, match="closed"):
        await store.load("a", str(models["a"]))


@pytest.mark.asyncio
async def test_tensors_outlive_their_store(new_store, models, size):
    store = await new_store(10 * size)
    lease = await store.load("a", str(models["a"]))
    early = await store.load("b", str(models["b"]), whole=False)
    await early.complete()
    await store.close()
    assert lease.tensors["w"].eq(0).all() and early.tensors["w"].eq(1).all()
    lease.release()
    early.release()


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_copy_that_was_used_longest_ago_makes_room(new_store, models, size):
    store = await new_store(2 * size)
    for key in ("a", "b", "a"):
        (await store.load(key, str(models[key]))).release()
    (await store.load("c", str(models["c"]))).release()
    await until(store, lambda: state(store, "c") == "host")
    assert {key: state(store, key) for key in "abc"} == {"a": "host", "b": "disk", "c": "host"}
    assert used(store) == 2 * size


@pytest.mark.asyncio
async def test_a_pinned_copy_never_makes_room(new_store, models, size):
    store = await new_store(2 * size)
    pinned = await store.load("a", str(models["a"]))
    (await store.load("b", str(models["b"]))).release()
    lease = await store.load("c", str(models["c"]))
    assert {key: state(store, key) for key in "abc"} == {"a": "host", "b": "disk", "c": "host"}
    assert (pinned.tensors["w"].sum(), lease.tensors["w"].sum()) == (0, 2 * N)
    with pytest.raises(InsufficientMemory) as caught:
        await store.load("b", str(models["b"]))
    assert (caught.value.model, caught.value.needed, caught.value.available) == ("b", size, 0)
    assert state(store, "b") == "disk"
    assert entry(store, "b")["reason"] == caught.value.message
    lease.release()
    assert (await store.load("b", str(models["b"]))).tensors["w"].sum() == N


@pytest.mark.asyncio
async def test_a_model_that_can_never_fit_is_refused_with_numbers_and_evicts_nobody(
    new_store, models, size, write_single, tmp_path
):
    store = await new_store(2 * size)
    (await store.load("a", str(models["a"]))).release()
    large = write_single(tmp_path / "large", {"w": torch.zeros(5 * N)})
    with pytest.raises(InsufficientMemory) as caught:
        await store.load("large", str(large))
    needed = lease_nbytes(plan_reads(read_index(large), CHUNK).nbytes)
    assert (caught.value.needed, caught.value.available) == (needed, 2 * size)
    assert state(store, "a") == "host"


@pytest.mark.asyncio
async def test_tensors_that_outlive_their_lease_stay_valid_and_counted(new_store, models, size):
    store = await new_store(size)
    lease = await store.load("a", str(models["a"]))
    tensor = lease.tensors["w"]
    lease.release()
    with pytest.raises(InsufficientMemory):
        await store.load("b", str(models["b"]))
    assert used(store) == size
    assert tensor.sum() == 0
    del tensor
    (await store.load("b", str(models["b"]))).release()


# --- failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_failed_read_frees_its_bytes_tells_all_who_wait_and_the_next_load_tries_afresh(
    new_store, models, size, monkeypatch, n_fds
):
    store, pread = await new_store(size), libc.pread
    (await store.load("b", str(models["b"]))).release()
    await store.evict("b")
    before = n_fds()

    def broken(fd, address, nbytes, offset):
        if offset >= CHUNK:
            raise OSError(errno.EIO, "broken")
        return pread(fd, address, nbytes, offset)

    gc.disable()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(libc, "pread", broken)
            errors = await asyncio.gather(*(store.load("a", str(models["a"])) for _ in range(2)), return_exceptions=True)
        await until(store, lambda: used(store) == 0)
    finally:
        gc.enable()
    assert [type(error) for error in errors] == [LoadFailed, LoadFailed]
    assert errors[0] is not errors[1]
    assert "Input/output error at byte" in errors[0].reason
    assert "model.safetensors" in errors[0].reason
    found = entry(store, "a")
    assert (found["state"], found["done"], found["reason"]) == ("failed", 0, errors[0].message)
    lease = await store.load("a", str(models["a"]))
    assert entry(store, "a")["reason"] is None
    assert lease.tensors["w"].sum() == 0
    assert n_fds() <= before


@pytest.mark.asyncio
async def test_a_damaged_checkpoint_is_told_as_what_it_is_and_stays_where_it_is(new_store, models, size, tmp_path):
    store = await new_store(size)
    damaged = shutil.copytree(models["a"], tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt) as caught:
        await store.load("d", str(damaged))
    assert caught.value.file == str(file)
    assert (state(store, "d"), used(store)) == ("failed", 0)
    assert sorted(path.name for path in tmp_path.iterdir() if "damaged" in path.name) == ["damaged"]


@pytest.mark.asyncio
async def test_a_damaged_chunk_of_a_users_directory_names_file_and_tensor(new_store, models, size, tmp_path):
    store = await new_store(2 * size)
    convert(models["a"], tmp_path / "fast")
    (data,) = (tmp_path / "fast").glob("*.bin")
    with data.open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"\xff")
    early = await store.load("d", str(tmp_path / "fast"), whole=False)
    with pytest.raises(CheckpointCorrupt) as caught:
        await early.complete()
    assert (caught.value.file, caught.value.tensor) == (str(data), "w")
    with pytest.raises(CheckpointCorrupt):
        await store.load("d", str(tmp_path / "fast"))
    assert data.exists()
    early.release()


@pytest.mark.asyncio
async def test_an_unforeseen_failure_reaches_the_caller_and_leaves_nothing_behind(new_store, models, size, monkeypatch):
    def stumble(*args, **options):
        raise ZeroDivisionError("unforeseen")

    store = await new_store(size)
    with monkeypatch.context() as patched:
        patched.setattr(loads, "read_chunks", stumble)
        with pytest.raises(LoadFailed, match="ZeroDivisionError: unforeseen"):
            await store.load("a", str(models["a"]))
    await until(store, lambda: used(store) == 0)
    (await store.load("a", str(models["a"]))).release()


@pytest.mark.asyncio
async def test_a_key_may_change_its_source_only_while_nobody_uses_it(new_store, models, size):
    store = await new_store(10 * size)
    lease = await store.load("m", str(models["a"]))
    with pytest.raises(LoadFailed, match="in use from"):
        await store.load("m", str(models["b"]))
    lease.release()
    lease = await store.load("m", str(models["b"]))
    assert lease.tensors["w"].sum() == N
    await until(store, lambda: used(store) == size)


@pytest.mark.asyncio
async def test_files_that_were_replaced_are_read_again_and_not_adopted(new_store, models, size, write_single):
    store = await new_store(10 * size)
    (await store.load("m", str(models["a"]))).release()
    write_single(models["a"], {"w": torch.full((N,), 7.0)})
    lease = await store.load("m", str(models["a"]))
    assert lease.tier_from == "disk"
    assert lease.tensors["w"].eq(7).all()
    # What is in use is not taken away.
    write_single(models["a"], {"w": torch.full((N,), 8.0)})
    again = await store.load("m", str(models["a"]))
    assert again.tier_from == "host" and again.tensors["w"].eq(7).all()
    lease.release()
    again.release()
    assert (await store.load("m", str(models["a"]))).tensors["w"].eq(8).all()
    assert await store.evict("m") is False, "the last one is in use"


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_inspect_says_where_and_how_large_a_local_checkpoint_is_and_has_memory_made_ready(new_store, models, monkeypatch):
    store = await new_store(1024**3)
    monkeypatch.chdir(models["a"].parent)
    info = await store.inspect("m", "a")
    assert (info.source, info.path, info.nbytes, info.config) == ("a", str(models["a"]), 4 * N, {"model_type": "test"})
    await until(store, lambda: store._pool.prefaulted >= 4 * N)


@pytest.mark.asyncio
async def test_memory_is_not_made_ready_where_it_shall_not_be(new_store, models):
    store = await new_store(1024**3, prefault=False)
    asked = []
    store._pool.prefault = asked.append
    await store.inspect("m", str(models["a"]))
    assert asked == []


@pytest.mark.asyncio
@pytest.mark.parametrize("source", ["/nowhere/at/all", "../nowhere", "a/b/c", "a..b/c", "demo:tiny", "", "a/../../b", "-x/y"])
async def test_what_is_neither_a_directory_nor_a_hub_id_is_not_found(new_store, source, hub):
    store = await new_store(0)
    with pytest.raises(CheckpointNotFound, match="there is no such directory, and it is not the id"):
        await store.inspect("m", source)
    with pytest.raises(CheckpointNotFound):
        await store.load("m", source)
    assert not await store.on_disk(source)
    assert hub.listed == []


@pytest.mark.asyncio
async def test_a_hub_that_cannot_be_reached_is_told(new_store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    store = await new_store(0)
    with pytest.raises(CheckpointNotFound, match="the hub did not supply it") as caught:
        await store.inspect("m", "org/model")
    assert caught.value.source == "org/model"


# --- all together ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(3))
async def test_random_loads_cancels_and_evictions_leak_nothing_and_mix_nothing_up(new_store, models, size, seed, n_fds):
    rng = random.Random(seed)
    store = await new_store(2 * size)
    broken: list[str] = []

    def check() -> None:
        snapshot = store.snapshot()
        for key, found in snapshot["keys"].items():
            if found["leases"] and found["state"] not in ("host", "reading", "disk"):
                broken.append(f"{key} is in use and {found['state']}")
        if not 0 <= snapshot["tiers"]["host"]["used"] <= 2 * size:
            broken.append(f"{snapshot['tiers']} is out of bounds")

    store.subscribe(check)

    async def use(key: str, whole: bool) -> None:
        with contextlib.suppress(InsufficientMemory), await store.load(key, str(models[key]), whole=whole) as lease:
            if rng.random() < 0.8:
                await lease.complete()
                assert lease.tensors["w"].eq("abc".index(key)).all()

    before, tasks = n_fds(), []
    for _ in range(60):
        match rng.choice(["load", "load", "cancel", "evict", "pass"]):
            case "load":
                tasks.append(asyncio.create_task(use(rng.choice("abc"), rng.random() < 0.5)))
            case "cancel" if tasks:
                rng.choice(tasks).cancel()
            case "evict":
                await store.evict(rng.choice("abc"))
            case _:
                await asyncio.sleep(rng.random() / 500)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    await flights_ended(store)
    for key in "abc":
        await store.evict(key)
    await until(store, lambda: used(store) == 0)
    assert broken == []
    assert n_fds() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_a_loop_that_ends_during_a_read_leaves_no_memory_behind_and_takes_none_from_the_read(models, size, gate):
    store = CheckpointStore(WorkerSettings(chunk_size=CHUNK, n_readers=2), PrivatePool(size))

    async def walk_out() -> None:
        load = asyncio.create_task(store.load("a", str(models["a"])))
        await reached(gate.reached)
        del load

    asyncio.run(walk_out())
    gc.collect()
    assert store._pool.used == size, "threads write to it"
    gate.open()
    store._background._threads.shutdown()
    gc.collect()
    assert store._pool.used == 0


@pytest.mark.asyncio
async def test_a_checkpoint_of_nothing_but_empty_tensors_is_loaded(new_store, write_single, tmp_path):
    store, seen = await new_store(10 * 1024**2), []
    empty = write_single(tmp_path / "empty", {"w": torch.empty(0, 3)})
    lease = await store.load("e", str(empty), lambda *progress: seen.append(progress))
    assert lease.tensors["w"].shape == (0, 3)
    assert seen == [(0, 0)]
    assert state(store, "e") == "host"


@pytest.mark.asyncio
async def test_a_progress_callback_that_raises_harms_only_itself(new_store, models, size):
    def broken(done: int, nbytes: int) -> None:
        raise ValueError("broken")

    raised, heard = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(type(context["exception"])))
    store = await new_store(size)
    bad, good = (store.load("a", str(models["a"]), listener) for listener in (broken, lambda *progress: heard.append(progress)))
    await asyncio.gather(bad, good)
    assert set(raised) == {ValueError}
    assert heard[-1] == (4 * N, 4 * N)


def test_a_checkpoint_can_be_read_without_a_store(models):
    assert read_checkpoint(models["b"])["w"].sum() == N
    with pytest.raises(CheckpointNotFound):
        read_checkpoint(models["b"] / "nothing")
