from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import random
import shutil
import threading

import msgpack
import pytest
import safetensors.torch
import torch

from sllmdask.config import WorkerSettings
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, InsufficientMemory, LoadFailed
from sllmdask.loader import libc
from sllmdask.loader import store as store_module
from sllmdask.loader.buffers import lease_nbytes
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.store import CheckpointStore, read_checkpoint

CHUNK = 64 * 1024
#: Elements of the test models' one tensor; a few chunks.
N = 100_000


@pytest.fixture
def models(tmp_path, write_single):
    """Directories of three models of one size, by name; the tensor of each says which it is."""
    return {name: write_single(tmp_path / name, {"w": torch.full((N,), float(i))}) for i, name in enumerate("abc")}


@pytest.fixture
def size(models):
    """Bytes of the pool that each of the models takes."""
    return lease_nbytes(plan_reads(read_index(models["a"]), CHUNK).nbytes)


@pytest.fixture
def new_store(tmp_path):
    def new(capacity: int, **settings: object) -> CheckpointStore:
        return CheckpointStore(
            WorkerSettings(chunk_size=CHUNK, n_readers=2, store_dir=str(tmp_path / "store"), **settings), capacity
        )

    return new


@pytest.fixture
def gate(monkeypatch):
    """Holds every read at its first byte until ``open()``; ``reached`` is set when one has come."""

    class Gate:
        def __init__(self) -> None:
            self.reached = threading.Event()
            self._may = threading.Event()
            self.open = self._may.set
            self.n_reads = 0

    gate, pread = Gate(), libc.pread

    def held(fd, address, nbytes, offset):
        gate.n_reads += 1
        gate.reached.set()
        assert gate._may.wait(30)
        return pread(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "pread", held)
    yield gate
    gate.open()


def state(store, key):
    return store.snapshot()["keys"].get(key, {"state": "absent"})["state"]


def used(store):
    return store.snapshot()["tiers"]["host"]["used"]


async def until(store, condition):
    """Return when `condition` holds, which is asked after each change."""
    changed = asyncio.Event()
    end = store.subscribe(changed.set)
    try:
        while not condition():
            changed.clear()
            await asyncio.wait_for(changed.wait(), 30)
    finally:
        end()


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_load_reads_once_and_the_next_finds_the_copy(new_store, models, size, preads, assert_equal):
    store = new_store(10 * size)
    lease = await store.load("m/a", str(models["a"]))
    assert_equal(lease.tensors, safetensors.torch.load_file(models["a"] / "model.safetensors"))
    assert (lease.key, lease.path, lease.nbytes, lease.tier_from) == ("m/a", str(models["a"]), 4 * N, "disk")
    assert lease.seconds > 0
    n_reads = len(preads)
    again = await store.load("m/a", str(models["a"]))
    assert again.tier_from == "host"
    assert again.tensors["w"].data_ptr() == lease.tensors["w"].data_ptr()
    assert len(preads) == n_reads
    assert store.snapshot()["keys"]["m/a"] == {
        "source": str(models["a"]),
        "state": "host",
        "nbytes": 4 * N,
        "done": 4 * N,
        "leases": 2,
        "reason": None,
    }
    assert store.snapshot()["tiers"] == {"host": {"used": size, "capacity": 10 * size}}
    assert store.snapshot()["bandwidth"]["disk"]["n_loads"] == 1
    assert msgpack.unpackb(msgpack.packb(store.snapshot())) == store.snapshot()
    lease.release()
    again.release()


@pytest.mark.asyncio
async def test_a_released_copy_stays_until_it_is_evicted(new_store, models, size):
    store = new_store(10 * size)
    with await store.load("a", str(models["a"])) as lease:
        assert not store.evict("a"), "a lease pins"
    assert lease.tensors == {}
    lease.release()
    assert (state(store, "a"), used(store), store.snapshot()["keys"]["a"]["leases"]) == ("host", size, 0)
    assert store.evict("a")
    assert (state(store, "a"), used(store)) == ("disk", 0)
    assert not store.evict("a")
    assert not store.evict("unheard of")
    assert (await store.load("a", str(models["a"]))).tier_from == "disk"


@pytest.mark.asyncio
async def test_callers_at_once_share_one_read(new_store, models, size, preads):
    store = new_store(10 * size)
    leases = await asyncio.gather(*(store.load("a", str(models["a"])) for _ in range(10)))
    assert len({lease.tensors["w"].data_ptr() for lease in leases}) == 1
    assert len(preads) == len(plan_reads(read_index(models["a"]), CHUNK).chunks)
    assert {lease.tier_from for lease in leases} == {"disk"}
    assert store.snapshot()["keys"]["a"]["leases"] == 10
    assert used(store) == size


@pytest.mark.asyncio
async def test_progress_begins_at_zero_never_falls_and_is_complete_before_the_lease(new_store, models, size):
    store = new_store(10 * size)
    seen: list[tuple[int, int]] = []
    await store.load("a", str(models["a"]), lambda *progress: seen.append(progress))
    assert seen == sorted(seen)
    assert seen[0] == (0, 4 * N)
    assert seen[-1] == (4 * N, 4 * N)
    hit: list[tuple[int, int]] = []
    await store.load("a", str(models["a"]), lambda *progress: hit.append(progress))
    assert hit == [(4 * N, 4 * N)]


@pytest.mark.asyncio
async def test_residency_is_declared_after_the_last_byte(new_store, models, size, gate):
    store = new_store(10 * size)
    load = asyncio.create_task(store.load("a", str(models["a"])))
    await asyncio.to_thread(gate.reached.wait, 30)
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
    store = new_store(10 * size)
    seen: list[tuple[int, str, int]] = []

    def note() -> None:
        snapshot = store.snapshot()
        seen.append((snapshot["version"], snapshot["keys"]["a"]["state"], snapshot["keys"]["a"]["leases"]))

    end = store.subscribe(note)
    lease = await store.load("a", str(models["a"]))
    lease.release()
    await asyncio.sleep(0)
    assert seen[-1][1:] == ("host", 0)
    store.evict("a")
    await asyncio.sleep(0)
    assert seen[-1][1:] == ("disk", 0)
    versions = [version for version, _, _ in seen]
    assert versions == sorted(set(versions))
    assert [s for s, _ in itertools.groupby(s for _, s, _ in seen)] == ["reading", "host", "disk"]
    end()
    n_seen = len(seen)
    (await store.load("a", str(models["a"]))).release()
    await asyncio.sleep(0)
    assert len(seen) == n_seen


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_caller_that_leaves_does_not_break_the_others(new_store, models, size, gate):
    store = new_store(10 * size)
    leaving, staying = (asyncio.create_task(store.load("a", str(models["a"]))) for _ in range(2))
    await asyncio.to_thread(gate.reached.wait, 30)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.open()
    lease = await staying
    assert lease.tensors["w"].sum() == 0
    assert store.snapshot()["keys"]["a"]["leases"] == 1


@pytest.mark.asyncio
async def test_the_read_stops_when_the_last_caller_has_left(new_store, models, size, gate, n_fds):
    before = n_fds()
    store = new_store(size)
    loads = [asyncio.create_task(store.load("a", str(models["a"]))) for _ in range(2)]
    await asyncio.to_thread(gate.reached.wait, 30)
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
    await store.close()
    gc.collect()
    assert n_fds() <= before + 1, "nothing open but what the executor's threads may need"


@pytest.mark.asyncio
async def test_a_caller_that_leaves_as_its_lease_arrives_pins_nothing(new_store, models, size):
    store = new_store(10 * size)
    load = asyncio.create_task(store.load("a", str(models["a"])))
    land = store._land

    def land_and_leave(*args):
        land(*args)
        load.cancel()

    store._land = land_and_leave
    with pytest.raises(asyncio.CancelledError):
        await load
    assert (state(store, "a"), store.snapshot()["keys"]["a"]["leases"]) == ("host", 0)


@pytest.mark.asyncio
async def test_closing_ends_loads_and_gives_everything_back(new_store, models, size, gate):
    store = new_store(10 * size)
    load, queued = (asyncio.create_task(store.load(key, str(models[key]))) for key in "ab")
    await asyncio.to_thread(gate.reached.wait, 30)
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


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_copy_that_was_used_longest_ago_makes_room(new_store, models, size):
    store = new_store(2 * size)
    for key in ("a", "b", "a"):
        (await store.load(key, str(models[key]))).release()
    (await store.load("c", str(models["c"]))).release()
    assert {key: state(store, key) for key in "abc"} == {"a": "host", "b": "disk", "c": "host"}
    assert used(store) == 2 * size


@pytest.mark.asyncio
async def test_a_pinned_copy_never_makes_room(new_store, models, size):
    store = new_store(2 * size)
    pinned = await store.load("a", str(models["a"]))
    (await store.load("b", str(models["b"]))).release()
    lease = await store.load("c", str(models["c"]))
    assert {key: state(store, key) for key in "abc"} == {"a": "host", "b": "disk", "c": "host"}
    assert (pinned.tensors["w"].sum(), lease.tensors["w"].sum()) == (0, 2 * N)
    with pytest.raises(InsufficientMemory) as caught:
        await store.load("b", str(models["b"]))
    assert (caught.value.model, caught.value.needed, caught.value.available) == ("b", size, 0)
    assert state(store, "b") == "disk"
    assert store.snapshot()["keys"]["b"]["reason"] == caught.value.message
    lease.release()
    assert (await store.load("b", str(models["b"]))).tensors["w"].sum() == N


@pytest.mark.asyncio
async def test_a_model_that_can_never_fit_is_refused_with_numbers_and_evicts_nobody(
    new_store, models, size, write_single, tmp_path
):
    store = new_store(2 * size)
    (await store.load("a", str(models["a"]))).release()
    large = write_single(tmp_path / "large", {"w": torch.zeros(3 * N)})
    with pytest.raises(InsufficientMemory) as caught:
        await store.load("large", str(large))
    needed = lease_nbytes(plan_reads(read_index(large), CHUNK).nbytes)
    assert (caught.value.needed, caught.value.available) == (needed, 2 * size)
    assert state(store, "a") == "host"


@pytest.mark.asyncio
async def test_tensors_that_outlive_their_lease_stay_valid_and_counted(new_store, models, size):
    store = new_store(size)
    lease = await store.load("a", str(models["a"]))
    tensor = lease.tensors["w"]
    lease.release()
    with pytest.raises(InsufficientMemory):
        await store.load("b", str(models["b"]))
    assert (state(store, "a"), used(store)) == ("disk", size)
    assert tensor.sum() == 0
    del tensor
    assert used(store) == 0
    (await store.load("b", str(models["b"]))).release()


# --- failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_failed_read_frees_its_bytes_tells_all_who_wait_and_the_next_load_tries_afresh(
    new_store, models, size, monkeypatch, n_fds
):
    store, pread, before = new_store(size), libc.pread, n_fds()

    def broken(fd, address, nbytes, offset):
        if offset >= CHUNK:
            raise OSError(errno.EIO, "broken")
        return pread(fd, address, nbytes, offset)

    gc.disable()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(libc, "pread", broken)
            errors = await asyncio.gather(*(store.load("a", str(models["a"])) for _ in range(2)), return_exceptions=True)
        assert used(store) == 0
    finally:
        gc.enable()
    assert [type(error) for error in errors] == [LoadFailed, LoadFailed]
    assert errors[0] is not errors[1]
    assert "Input/output error at byte" in errors[0].reason
    assert "model.safetensors" in errors[0].reason
    found = store.snapshot()["keys"]["a"]
    assert (found["state"], found["done"], found["reason"]) == ("failed", 0, errors[0].message)
    lease = await store.load("a", str(models["a"]))
    assert store.snapshot()["keys"]["a"]["reason"] is None
    assert lease.tensors["w"].sum() == 0
    assert n_fds() <= before + 1


@pytest.mark.asyncio
async def test_a_damaged_checkpoint_is_told_as_what_it_is(new_store, models, size, tmp_path):
    store = new_store(size)
    damaged = shutil.copytree(models["a"], tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointCorrupt) as caught:
        await store.load("d", str(damaged))
    assert caught.value.file == str(file)
    assert (state(store, "d"), used(store)) == ("failed", 0)


@pytest.mark.asyncio
async def test_an_unforeseen_failure_reaches_the_caller_and_leaves_nothing_behind(new_store, models, size, monkeypatch):
    def stumble(*args, **options):
        raise ZeroDivisionError("unforeseen")

    store = new_store(size)
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "read_chunks", stumble)
        with pytest.raises(LoadFailed, match="ZeroDivisionError: unforeseen"):
            await store.load("a", str(models["a"]))
    assert used(store) == 0
    (await store.load("a", str(models["a"]))).release()


@pytest.mark.asyncio
async def test_a_key_may_change_its_source_only_while_nobody_uses_it(new_store, models, size):
    store = new_store(10 * size)
    lease = await store.load("m", str(models["a"]))
    with pytest.raises(LoadFailed, match="in use from"):
        await store.load("m", str(models["b"]))
    lease.release()
    lease = await store.load("m", str(models["b"]))
    assert lease.tensors["w"].sum() == N
    assert used(store) == size


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_inspect_says_where_and_how_large_a_local_checkpoint_is(new_store, models, monkeypatch):
    store = new_store(0)
    monkeypatch.chdir(models["a"].parent)
    info = await store.inspect("a")
    assert (info.source, info.path, info.nbytes, info.config) == ("a", str(models["a"]), 4 * N, {"model_type": "test"})


@pytest.mark.asyncio
@pytest.mark.parametrize("source", ["/nowhere/at/all", "../nowhere", "a/b/c", "a..b/c", "demo:tiny", "", "a/../../b", "-x/y"])
async def test_what_is_neither_a_directory_nor_a_hub_id_is_not_found(new_store, source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    store = new_store(0)
    with pytest.raises(CheckpointNotFound, match="there is no such directory, and it is not the id"):
        await store.inspect(source)
    with pytest.raises(CheckpointNotFound):
        await store.load("m", source)


@pytest.mark.asyncio
async def test_a_hub_that_cannot_be_reached_is_told(new_store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    store = new_store(0)
    with pytest.raises(CheckpointNotFound, match="the hub did not supply it") as caught:
        await store.inspect("org/model")
    assert caught.value.source == "org/model"


@pytest.fixture
def hub(monkeypatch, models):
    """A hub with ``org/a``; ``calls`` grows with each download, ``fail`` makes them fail half way."""

    class Hub:
        def __init__(self) -> None:
            self.calls: list[str] = []
            self.fail = False
            self.may = threading.Event()
            self.may.set()

        def snapshot_download(self, source, *, local_dir, allow_patterns, ignore_patterns):
            self.calls.append(source)
            assert self.may.wait(30)
            assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
            assert ignore_patterns == ["consolidated*.safetensors"]
            shutil.copytree(models[source[-1]], local_dir, dirs_exist_ok=True)
            if self.fail:
                (local_dir / "model.safetensors").unlink()
                raise ConnectionError("the line went dead")

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    yield hub
    hub.may.set()


@pytest.mark.asyncio
async def test_a_hub_model_is_fetched_once_for_all_and_then_read_from_disk(new_store, size, hub, tmp_path):
    store = new_store(10 * size)
    hub.may.clear()
    loads = [asyncio.create_task(store.load(key, "org/a")) for key in ("x", "y")]
    inspecting = asyncio.create_task(store.inspect("org/a"))
    await until(store, lambda: {entry["state"] for entry in store.snapshot()["keys"].values()} == {"fetching"})
    hub.may.set()
    leases = await asyncio.gather(*loads)
    assert (await inspecting).path == leases[0].path == str(tmp_path / "store" / "org--a")
    assert hub.calls == ["org/a"]
    assert {lease.tier_from for lease in leases} == {"remote"}
    assert set(store.snapshot()["bandwidth"]) == {"remote", "disk"}
    fresh = new_store(10 * size)
    assert (await fresh.load("x", "org/a")).tier_from == "disk"
    assert hub.calls == ["org/a"]


@pytest.mark.asyncio
async def test_an_interrupted_download_is_never_taken_for_a_checkpoint(new_store, size, hub, tmp_path):
    store = new_store(10 * size)
    hub.fail = True
    with pytest.raises(CheckpointNotFound, match="the line went dead"):
        await store.load("x", "org/a")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["org--a.partial"]
    hub.fail = False
    assert (await store.load("x", "org/a")).tier_from == "remote"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["org--a"]


@pytest.mark.asyncio
async def test_a_download_that_nobody_waits_for_any_more_is_there_for_the_next(new_store, size, hub):
    store = new_store(10 * size)
    hub.may.clear()
    load = asyncio.create_task(store.load("x", "org/a"))
    await until(store, lambda: state(store, "x") == "fetching")
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert state(store, "x") == "absent"
    again = asyncio.create_task(store.load("x", "org/a"))
    await until(store, lambda: state(store, "x") == "fetching")
    hub.may.set()
    await again
    assert hub.calls == ["org/a"]


# --- all together ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(5))
async def test_random_loads_cancels_and_evictions_leak_nothing_and_mix_nothing_up(new_store, models, size, seed, n_fds):
    rng, before = random.Random(seed), n_fds()
    store = new_store(2 * size)
    broken: list[str] = []

    def check() -> None:
        snapshot = store.snapshot()
        for key, entry in snapshot["keys"].items():
            if entry["leases"] and entry["state"] != "host":
                broken.append(f"{key} is in use and {entry['state']}")
        if not 0 <= snapshot["tiers"]["host"]["used"] <= 2 * size:
            broken.append(f"{snapshot['tiers']} is out of bounds")

    store.subscribe(check)

    async def use(key: str) -> None:
        with contextlib.suppress(InsufficientMemory), await store.load(key, str(models[key])) as lease:
            await asyncio.sleep(rng.random() / 500)
            assert torch.equal(lease.tensors["w"], torch.full((N,), float("abc".index(key))))

    tasks = []
    for _ in range(60):
        match rng.choice(["load", "load", "cancel", "evict", "pass"]):
            case "load":
                tasks.append(asyncio.create_task(use(rng.choice("abc"))))
            case "cancel" if tasks:
                rng.choice(tasks).cancel()
            case "evict":
                store.evict(rng.choice("abc"))
            case _:
                await asyncio.sleep(rng.random() / 500)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome is not None] in (
        [],
        [asyncio.CancelledError] * sum(outcome is not None for outcome in outcomes),
    )
    await store.close()
    assert broken == []
    assert used(store) == 0
    assert n_fds() <= before + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_a_loop_that_ends_during_a_read_leaves_no_memory_behind(new_store, models, size, gate):
    store = new_store(size)

    async def walk_out() -> None:
        load = asyncio.create_task(store.load("a", str(models["a"])))
        await asyncio.to_thread(gate.reached.wait, 30)
        asyncio.get_running_loop().call_later(0, gate.open)
        del load

    asyncio.run(walk_out())
    gc.collect()
    assert store._pool.used == 0


@pytest.mark.asyncio
async def test_a_checkpoint_of_nothing_but_empty_tensors_is_loaded(new_store, write_single, tmp_path):
    store, seen = new_store(10_000), []
    empty = write_single(tmp_path / "empty", {"w": torch.empty(0, 3)})
    lease = await store.load("e", str(empty), lambda *progress: seen.append(progress))
    assert lease.tensors["w"].shape == (0, 3)
    assert seen == [(0, 0)]
    assert state(store, "e") == "host"


@pytest.mark.asyncio
async def test_a_load_that_is_called_off_at_once_starts_no_download(new_store, hub):
    store = new_store(0)
    load = asyncio.create_task(store.load("x", "org/a"))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await store.close()
    assert hub.calls == []
    assert state(store, "x") == "absent"


@pytest.mark.asyncio
async def test_a_progress_callback_that_raises_harms_only_itself(new_store, models, size):
    def broken(done: int, nbytes: int) -> None:
        raise ValueError("broken")

    raised, heard = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(type(context["exception"])))
    store = new_store(size)
    bad, good = (store.load("a", str(models["a"]), listener) for listener in (broken, lambda *progress: heard.append(progress)))
    await asyncio.gather(bad, good)
    assert set(raised) == {ValueError}
    assert heard[-1] == (4 * N, 4 * N)


def test_a_checkpoint_can_be_read_without_a_store(models):
    assert read_checkpoint(models["b"])["w"].sum() == N
    with pytest.raises(CheckpointNotFound):
        read_checkpoint(models["b"] / "nothing")
