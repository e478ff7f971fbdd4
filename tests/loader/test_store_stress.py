"""Many loads, departures, evictions and deaths at once: nothing hangs, nothing leaks, and no byte is another model's."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
import uuid
from collections import Counter

import pytest
import torch

from sllmdask.config import WorkerSettings
from sllmdask.errors import InsufficientMemory, LoadFailed
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.shared_pool import SharedPool
from sllmdask.loader.store import CheckpointStore
from tests.loader.memfd import holders
from tests.loader.store_process import StoreProcess, n_mappings
from tests.loader.stores import CHUNK, flights_ended, until, used

N_OPERATIONS = 200


@pytest.fixture
def five(tmp_path, write_single):
    """Models of different sizes; the tensor of each says which it is."""
    return [write_single(tmp_path / f"m{i}", {"w": torch.full((200_000 * (i + 1),), float(i))}) for i in range(5)]


async def use(store, rng, models, number, whole):
    """One user of a model, who looks at it, or leaves before."""
    try:
        with await store.load(f"m{number}", str(models[number]), whole=whole) as lease:
            if rng.random() < 0.3:
                return "left"
            if lease.arrivals is not None and rng.random() < 0.5:
                await asyncio.to_thread(lease.arrivals.wait, ["w"], 30)
            else:
                await lease.complete()
            assert lease.tensors["w"].eq(number).all(), "bytes of another model"
            return "used"
    except InsufficientMemory:
        return "no room"


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["private", "shared"])
@pytest.mark.parametrize("seed", [0, 1])
async def test_one_process(tmp_path, five, kind, seed, n_fds):
    rng, capacity = random.Random(seed), 8 * 1024**2
    name = f"test-{uuid.uuid4()}"
    pool = PrivatePool(capacity) if kind == "private" else SharedPool(name, capacity, grace_s=0.0, trim_s=0.0)
    before, maps_before = n_fds(), n_mappings()
    settings = WorkerSettings(chunk_size=CHUNK, n_readers=2, store_dir=str(tmp_path / "store"))
    store = CheckpointStore(settings, pool)
    await store.start()
    tasks = []
    for _ in range(N_OPERATIONS):
        match rng.choices(["load", "cancel", "evict", "inspect", "pass"], [5, 2, 1, 1, 3])[0]:
            case "load":
                tasks.append(asyncio.create_task(use(store, rng, five, rng.randrange(5), rng.random() < 0.5)))
            case "cancel" if tasks:
                rng.choice(tasks).cancel()
            case "evict":
                await store.evict(f"m{rng.randrange(5)}")
            case "inspect":
                number = rng.randrange(5)
                tasks.append(asyncio.create_task(store.inspect(f"m{number}", str(five[number]))))
            case _:
                await asyncio.sleep(rng.random() / 1000)
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    unforeseen = [each for each in outcomes if isinstance(each, Exception)]
    assert unforeseen == []
    assert Counter(map(str, outcomes))["used"] > 5
    await flights_ended(store)
    for number in range(5):
        await store.evict(f"m{number}")
    await until(store, lambda: used(store) == 0)
    assert all(found["leases"] == 0 for found in store.snapshot()["keys"].values())
    await store.close()
    gc.collect()
    # The event loop's own threads may have come since.
    assert n_fds() <= before
    assert n_mappings() <= maps_before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-")]


@pytest.mark.parametrize("seed", [0, 1])
def test_several_processes_of_which_some_are_killed(tmp_path, five, seed):
    rng, name = random.Random(seed), f"test-{uuid.uuid4()}"

    def start() -> StoreProcess:
        process = StoreProcess(name, 4 * 1024**2, tmp_path / "store", delay_s=0.0005)
        assert process.hear()["op"] == "ready"
        return process

    alive = [start() for _ in range(3)]
    keeper = alive[0].do("snapshot")["keeper"]
    inode = _inode_of(keeper)
    open_orders: Counter[int] = Counter()
    outcomes: Counter[str] = Counter()
    n_killed = 0

    def note(process: StoreProcess) -> None:
        answer = process.hear()
        if answer["op"] == "placed":
            return
        open_orders[process.pid] -= 1
        if answer["op"] != "load":
            return
        outcomes[answer.get("error", "used")] += 1
        if "error" not in answer:
            assert answer["low"] == answer["high"] == int(answer["key"][1:]), "bytes of another model"
        else:
            assert answer["error"] in {"InsufficientMemory", "Cancelled", "CancelledError", "released"}, answer

    for _ in range(N_OPERATIONS):
        process, number = rng.choice(alive), rng.randrange(5)
        match rng.choices(["load", "cancel", "release", "evict", "kill"], [5, 2, 4, 1, 0.3])[0]:
            case "load":
                process.tell("load", key=f"m{number}", source=str(five[number]), whole=rng.random() < 0.5)
                open_orders[process.pid] += 1
            case "kill" if n_killed < 4:
                n_killed += 1
                process.kill()
                process.wire.close()
                alive.remove(process)
                del open_orders[process.pid]
                alive.append(start())
            case "cancel" | "release" | "evict" as op:
                process.tell(op, key=f"m{number}")
                open_orders[process.pid] += 1
            case _:
                continue
        for each in alive:
            while each.wire.poll(0):
                note(each)
    for process in alive:
        while open_orders[process.pid]:
            note(process)
    assert n_killed > 0 and outcomes["used"] > 5, outcomes
    # Whatever somebody still holds goes, and then there is room for everything again.
    for process in alive:
        for number in range(5):
            process.do("release", key=f"m{number}")
        assert process.do("leaks") | {"fds": 0, "maps": 0} == {
            "op": "leaks",
            "key": None,
            "busy": [],
            "leases": 0,
            "fds": 0,
            "maps": 0,
        }
    for number in range(5):
        for process in alive:
            process.do("evict", key=f"m{number}")
    deadline = time.monotonic() + 10
    while alive[0].do("snapshot")["tiers"]["host"]["used"]:
        assert time.monotonic() < deadline, "memory of nobody"
    for process in alive:
        with process:
            pass
    while holders(inode):
        assert time.monotonic() < deadline + 10, "the keeper, or somebody, is still there"
        time.sleep(0.01)


def _inode_of(keeper: int) -> int:
    for fd in os.listdir(f"/proc/{keeper}/fd"):
        path = f"/proc/{keeper}/fd/{fd}"
        if "sllmdask-host-memory" in os.readlink(path):
            return os.stat(path).st_ino
    raise AssertionError("it has no memory")


@pytest.mark.asyncio
async def test_failures_of_the_disk_at_random_harm_only_who_meets_them(tmp_path, five, monkeypatch):
    from sllmdask.loader import libc

    rng, pread = random.Random(0), libc.pread

    def shaky(fd, address, nbytes, offset):
        if rng.random() < 0.01:
            raise OSError(5, os.strerror(5))
        return pread(fd, address, nbytes, offset)

    store = CheckpointStore(WorkerSettings(chunk_size=CHUNK, n_readers=2, store_dir=str(tmp_path)), PrivatePool(16 * 1024**2))
    await store.start()
    failed, used_ = 0, 0
    with monkeypatch.context() as patched:
        patched.setattr(libc, "pread", shaky)
        for _ in range(20):
            users = [use(store, rng, five, rng.randrange(5), rng.random() < 0.5) for _ in range(5)]
            outcomes = await asyncio.gather(*users, return_exceptions=True)
            failed += sum(isinstance(each, LoadFailed | OSError) for each in outcomes)
            used_ += outcomes.count("used")
            assert all(isinstance(each, LoadFailed | OSError | str) for each in outcomes), outcomes
            for number in range(5):
                await store.evict(f"m{number}")
    assert failed > 5 and used_ > 5
    await flights_ended(store)
    for number in range(5):
        await store.evict(f"m{number}")
    await until(store, lambda: used(store) == 0)
    await store.close()
