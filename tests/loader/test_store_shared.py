"""Stores of several processes over one pool: what one of them has read, the others have, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sllmdask.config import WorkerSettings
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.shared_pool import SharedPool
from sllmdask.loader.store import CheckpointStore
from tests.loader.store_process import StoreProcess
from tests.loader.stores import CHUNK, N, eventually, state, until

#: Seconds that a read takes longer where somebody shall be met in the middle of it: 37 chunks, two at a time.
SLOW_S = 0.02


@pytest.fixture
def start(name, size, tmp_path):
    """``start()``: another process's store, ready; ``start(delay_s=...)``: one that reads slowly."""
    with contextlib.ExitStack() as stack:

        def new(capacity: int = 10 * size, delay_s: float = 0.0) -> StoreProcess:
            process = stack.enter_context(StoreProcess(name, capacity, tmp_path / "store", delay_s))
            assert process.hear()["op"] == "ready"
            return process

        yield new


def held_by(keys: dict[str, dict], key: str) -> tuple[str, int]:
    return keys[key]["state"], keys[key]["leases"]


def n_chunks(directory: Path) -> int:
    return len(plan_reads(read_index(directory), CHUNK).chunks)


def load(process: StoreProcess, models, key: str) -> dict:
    answer = process.do("load", key=key, source=str(models[key]))
    assert "error" not in answer, answer
    assert answer["low"] == answer["high"] == "abc".index(key)
    return answer


def test_what_one_process_has_read_another_one_has_without_reading_and_without_memory_of_its_own(start, models):
    first, second = start(), start()
    assert load(first, models, "b")["tier"] == "disk"
    assert first.do("reads")["n"] == n_chunks(models["b"])
    eventually(lambda: "b" in second.do("snapshot")["keys"])
    assert held_by(second.do("snapshot")["keys"], "b") == ("host", 0)
    assert load(second, models, "b")["tier"] == "host"
    assert second.do("reads")["n"] == 0
    one, other = (process.do("pss")["pss"] for process in (first, second))
    assert one + other < 1.2 * 4 * N, "both have looked at every byte, and it is there once"


def test_who_asks_while_another_one_reads_waits_for_that(start, models):
    first, second = start(delay_s=SLOW_S), start()
    first.tell("load", key="a", source=str(models["a"]), whole=False)
    assert first.hear()["op"] == "placed"
    assert load(second, models, "a")["tier"] == "host"
    assert second.do("reads")["n"] == 0
    assert first.hear()["tier"] == "disk"


def test_who_waits_for_a_process_that_is_killed_while_it_reads_takes_over(start, models):
    first, second = start(delay_s=SLOW_S), start()
    first.tell("load", key="c", source=str(models["c"]), whole=False)
    assert first.hear()["op"] == "placed"
    second.tell("load", key="c", source=str(models["c"]))
    first.kill()
    answer = second.hear()
    assert (answer["tier"], answer["low"], answer["high"]) == ("disk", 2, 2)
    assert second.do("reads")["n"] == n_chunks(models["c"]), "every byte anew: nobody knows which were there"


def test_what_a_killed_process_held_is_there_for_its_successor(start, models):
    first, witness = start(), start()
    load(first, models, "b")
    first.kill()
    successor = start()
    assert held_by(successor.do("snapshot")["keys"], "b") == ("host", 0)
    assert load(successor, models, "b")["tier"] == "host"
    assert successor.do("reads")["n"] == 0
    assert successor.do("evict", key="b")["evicted"] is False, "it is in use"
    successor.do("release", key="b")
    assert witness.do("evict", key="b")["evicted"] is True, "the killed one pins nothing"


def test_a_lease_of_one_process_keeps_the_copy_from_another_ones_eviction(start, models, size):
    first, second = start(capacity=size), start(capacity=0)
    load(first, models, "a")
    assert second.do("evict", key="a")["evicted"] is False
    assert second.do("load", key="b", source=str(models["b"]))["error"] == "InsufficientMemory"
    first.do("release", key="a")
    assert load(second, models, "b")["tier"] == "disk"
    assert held_by(first.do("snapshot")["keys"], "a") == ("disk", 0)


def test_a_process_that_ends_does_not_wait_for_one_that_reads(start, models):
    first, second = start(delay_s=SLOW_S), start()
    first.tell("load", key="a", source=str(models["a"]), whole=False)
    assert first.hear()["op"] == "placed"
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second.tell("load", key="a", source=str(models["a"]))
        second.tell("end")
        answer = second.hear()
        assert (answer["error"], "closed" in answer["message"]) == ("LoadFailed", True)
        assert second.end() == 0
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.hear()["low"] == 0


def test_a_load_that_is_called_off_does_not_wait_for_another_process_that_reads(start, models):
    first, second = start(delay_s=SLOW_S), start()
    first.tell("load", key="a", source=str(models["a"]), whole=False)
    assert first.hear()["op"] == "placed"
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second.tell("load", key="a", source=str(models["a"]))
        second.tell("cancel", key="a")
        assert sorted(second.hear()["op"] for _ in range(2)) == ["cancel", "load"]
        assert second.do("leaks")["busy"] == [], "it ends, too"
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.hear()["low"] == 0


@pytest.fixture
def shared_store(name, tmp_path) -> Iterator:
    """``async with shared_store(capacity) as store``: of this process."""

    @contextlib.asynccontextmanager
    async def new(capacity: int):
        settings = WorkerSettings(chunk_size=CHUNK, n_readers=2, store_dir=str(tmp_path / "store"))
        store = CheckpointStore(settings, SharedPool(name, capacity, grace_s=0.0, trim_s=0.0))
        await store.start()
        yield store
        await store.close()

    return new


@pytest.mark.asyncio
async def test_a_victim_loses_no_more_than_is_needed_and_only_that_is_read_again(shared_store, models, size, preads):
    async with shared_store(size + size // 2) as store:
        (await store.load("a", str(models["a"]))).release()
        (await store.load("b", str(models["b"]))).release()
        await until(store, lambda: state(store, "b") == "host")
        assert state(store, "a") == "disk"
        (part,) = store._pool.partly_resident().values()
        assert (part["key"], part["resident_nbytes"]) == ("a", size // 2)
        preads.clear()
        heard = []
        lease = await store.load("a", str(models["a"]), lambda *progress: heard.append(progress))
        assert lease.tensors["w"].eq(0).all()
        plan = plan_reads(read_index(models["a"]), CHUNK)
        missing = [chunk for chunk in plan.chunks if chunk.position + chunk.decoded > size // 2]
        assert sorted(offset for offset, _ in preads) == sorted(chunk.offset for chunk in missing)
        assert heard == sorted(heard) and heard[-1] == (4 * N, 4 * N)
        n_before = store.snapshot()["bandwidth"].get("disk", {"n_loads": 0})["n_loads"]
        assert n_before <= 2, "half of it tells nothing of the disk"
        lease.release()


@pytest.mark.asyncio
async def test_progress_never_falls_where_the_reader_dies(shared_store, start, models, size):
    other = start(delay_s=SLOW_S)
    async with shared_store(size) as store:
        other.tell("load", key="a", source=str(models["a"]), whole=False)
        await asyncio.to_thread(other.hear)
        heard: list[tuple[int, int]] = []
        moved = asyncio.Event()

        def note(done: int, total: int) -> None:
            heard.append((done, total))
            if done:
                moved.set()

        load = asyncio.create_task(store.load("a", str(models["a"]), note))
        await asyncio.wait_for(moved.wait(), 30)
        await asyncio.to_thread(other.kill)
        lease = await load
        assert lease.tensors["w"].eq(0).all()
        assert heard == sorted(heard) and heard[-1] == (4 * N, 4 * N)
        lease.release()


@pytest.mark.asyncio
async def test_without_its_keeper_what_is_in_use_stays_and_loads_go_on_with_the_next_one(shared_store, models, size):
    async with shared_store(4 * size) as store:
        lease = await store.load("a", str(models["a"]))
        keeper = store._pool.keeper_pid
        os.kill(keeper, signal.SIGKILL)
        await until(store, lambda: store._pool.keeper_pid is None)
        assert lease.tensors["w"].eq(0).all()
        assert state(store, "a") == "host"
        other = await store.load("b", str(models["b"]))
        assert other.tensors["w"].eq(1).all()
        assert store._pool.keeper_pid not in (None, keeper)
        lease.release()
        other.release()


def test_the_keeper_goes_with_the_last_process(start, models):
    process = start()
    load(process, models, "a")
    keeper = process.do("snapshot")["keeper"]
    os.kill(keeper, 0)
    process.kill()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(keeper, 0)
            time.sleep(0.01)
        raise AssertionError("it is still there")
