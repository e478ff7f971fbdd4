"""Both pools keep the same promises to one process; what only several processes can show is tested with several processes."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio
import torch

from sllmdask.errors import Cancelled, ConfigError, HostPoolUnavailable, InsufficientMemory
from sllmdask.loader import libc
from sllmdask.loader.buffers import address_of
from sllmdask.loader.extents import GRANULE
from sllmdask.loader.keeper import address_of_pool
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.shared_pool import SharedPool
from tests.loader.memfd import ended, holders
from tests.loader.stores import until

G = GRANULE


async def fill(pool, key, nbytes=G, value=1, **meta):
    """Bring `key`, each of whose bytes is `value`; returns the lease."""
    segment = await pool.acquire(key, nbytes, meta)
    assert segment.owner and not segment.ready
    segment.buffer[segment.resident_nbytes :] = value
    segment.publish()
    return segment


async def put(pool, key, nbytes=G, value=1, **meta):
    (await fill(pool, key, nbytes, value, **meta)).release()


@pytest.fixture(params=["private", "shared"])
def new_pool(request):
    """``new_pool(capacity)``: a pool of which nothing is left after the test."""
    name = f"test-{uuid.uuid4()}"

    def new(capacity=10 * G):
        return PrivatePool(capacity) if request.param == "private" else SharedPool(name, capacity, grace_s=0.0, trim_s=0.0)

    return new


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_asks_first_fills_and_the_next_finds_it(new_pool):
    pool = new_pool()
    await pool.start()
    assert pool.capacity == 10 * G
    first = await pool.acquire("m", 3 * G - 5, {"reload_s": 2.0})
    assert (first.key, first.nbytes, first.owner, first.ready, first.resident_nbytes) == ("m", 3 * G - 5, True, False, 0)
    assert (first.buffer.dtype, first.buffer.shape) == (np.uint8, (3 * G - 5,))
    assert address_of(first.buffer) % libc.HUGE_PAGE == 0
    assert pool.resident() == {}
    first.buffer[:] = np.arange(3 * G - 5) % 251
    first.meta["note"] = "filled"
    first.publish()
    assert first.ready
    second = await pool.acquire("m", 3 * G - 5, {})
    assert (second.owner, second.ready, second.resident_nbytes) == (False, True, 3 * G - 5)
    assert second.meta == {"reload_s": 2.0, "note": "filled"}
    assert np.array_equal(second.buffer, np.arange(3 * G - 5) % 251)
    await until(pool, lambda: pool.resident().get("m", {}).get("leases") == 2)
    told = pool.resident()["m"]
    assert (told["nbytes"], told["note"]) == (3 * G - 5, "filled")
    assert pool.used == 3 * G
    first.release()
    second.release()
    await until(pool, lambda: pool.resident()["m"]["leases"] == 0)
    assert pool.used == 3 * G, "it stays for the next"
    await pool.close()


@pytest.mark.asyncio
async def test_who_asks_meanwhile_waits_hears_how_far_it_is_and_finds_it(new_pool):
    pool = new_pool()
    filler = await pool.acquire("m", 2 * G, {})
    heard = []
    arrived = asyncio.Event()

    def on_progress(done, total):
        heard.append((done, total))
        if done == G:
            arrived.set()

    waiting = [asyncio.create_task(pool.acquire("m", 2 * G, {}, on_progress=on_progress)) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.to_thread(filler.progress, G)
    await asyncio.wait_for(arrived.wait(), 30)
    assert (G, 2 * G) in heard
    assert not any(task.done() for task in waiting)
    filler.buffer[:] = 5
    await asyncio.to_thread(filler.publish)
    for segment in await asyncio.gather(*waiting):
        assert segment.ready and not segment.owner and segment.buffer.min() == 5
    await pool.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["discard", "release", "drop"])
async def test_who_waits_takes_over_where_the_filler_fails_however_it_does(new_pool, way):
    pool = new_pool(3 * G)
    filler = await pool.acquire("m", 2 * G, {})
    waiting = asyncio.create_task(pool.acquire("m", 2 * G, {}))
    await asyncio.sleep(0)
    if way == "drop":
        del filler
    else:
        await asyncio.to_thread(getattr(filler, way))
    # There is room for one of them: the memory has come back.
    taken = await asyncio.wait_for(waiting, 30)
    assert taken.owner and not taken.ready
    taken.publish()
    await until(pool, lambda: "m" in pool.resident())
    await pool.close()


@pytest.mark.asyncio
async def test_memory_is_given_to_another_only_when_nothing_looks_at_it(new_pool):
    pool = new_pool(4 * G)
    segment = await fill(pool, "old", 4 * G, value=7)
    tensor = torch.frombuffer(segment.buffer, dtype=torch.uint8)[100:200]
    part = segment.buffer[:10]
    segment.release()
    with pytest.raises(InsufficientMemory) as caught:
        await pool.acquire("new", G, {})
    assert (caught.value.model, caught.value.needed, caught.value.available) == ("new", G, 0)
    assert await pool.evict("old")
    assert pool.resident() == {}
    gc.disable()
    try:
        for last in ("tensor", "part"):
            assert pool.used == 4 * G, last
            assert int(tensor.sum()) == 700 if last == "tensor" else int(part.sum()) == 70
            if last == "tensor":
                del tensor
            else:
                del part
            await asyncio.sleep(0)
        await until(pool, lambda: pool.used == 0)
    finally:
        gc.enable()
    await put(pool, "new", 4 * G, value=9)
    await pool.close()


@pytest.mark.asyncio
async def test_a_segment_that_is_forgotten_without_a_word_stays_pinned_by_its_views(new_pool):
    pool = new_pool()
    segment = await fill(pool, "m", value=3)
    view = segment.buffer[5:]
    del segment
    assert not await pool.evict("m")
    del view
    await until(pool, lambda: pool.resident()["m"]["leases"] == 0)
    assert await pool.evict("m")
    await pool.close()


@pytest.mark.asyncio
async def test_the_copy_that_saves_the_least_reading_leaves(new_pool):
    pool = new_pool(6 * G)
    await put(pool, "slow", 2 * G, reload_s=9.0)
    await put(pool, "fast", 2 * G, reload_s=1.0)
    await put(pool, "popular", 2 * G, reload_s=1.0)
    for _ in range(3):
        (await pool.acquire("popular", 2 * G, {})).release()
    await put(pool, "new", 2 * G, reload_s=1.0)
    await until(pool, lambda: "new" in pool.resident())
    assert set(pool.resident()) == {"slow", "popular", "new"}
    await pool.close()


@pytest.mark.asyncio
async def test_what_pins_is_not_evicted_and_what_is_not_there_neither(new_pool):
    pool = new_pool()
    segment = await fill(pool, "m")
    filling = await pool.acquire("f", G, {})
    assert not await pool.evict("m")
    assert not await pool.evict("f")
    assert not await pool.evict("unheard of")
    segment.release()
    assert await pool.evict("m")
    filling.discard()
    await until(pool, lambda: pool.used == 0)
    await pool.close()


@pytest.mark.asyncio
async def test_more_than_there_is_is_refused_with_both_numbers_and_evicts_nothing(new_pool):
    pool = new_pool(4 * G)
    await put(pool, "m", 2 * G)
    with pytest.raises(InsufficientMemory) as caught:
        await pool.acquire("large", 5 * G - 1, {})
    assert (caught.value.needed, caught.value.available) == (5 * G, 4 * G)
    assert set(pool.resident()) == {"m"}
    await pool.close()


@pytest.mark.asyncio
async def test_who_stops_waiting_leaves_nothing_behind(new_pool):
    pool = new_pool(2 * G)
    filler = await pool.acquire("m", G, {})
    waiting = [asyncio.create_task(pool.acquire("m", G, {})) for _ in range(3)]
    await asyncio.sleep(0)
    for task in waiting[:2]:
        task.cancel()
    filler.publish()
    (await waiting[2]).release()
    filler.release()
    # Called off in the moment in which it is granted, and before it was asked for.
    late, early = (asyncio.create_task(pool.acquire("n", G, {})) for _ in range(2))
    early.cancel()
    await asyncio.sleep(0)
    late.cancel()
    for outcome in await asyncio.gather(late, early, return_exceptions=True):
        if not isinstance(outcome, asyncio.CancelledError):
            outcome.release()
    await until(pool, lambda: pool.used == G and pool.resident()["m"]["leases"] == 0)
    await put(pool, "n", 2 * G)
    await pool.close()


@pytest.mark.asyncio
async def test_every_word_may_be_said_twice_and_on_any_thread(new_pool):
    pool = new_pool()
    segment = await pool.acquire("m", G, {})
    for _ in range(2):
        for word in (segment.publish, segment.discard, segment.release, segment.release, segment.discard, segment.publish):
            thread = threading.Thread(target=word)
            thread.start()
            thread.join()
        segment.progress(1)
    await until(pool, lambda: pool.resident().get("m", {"leases": 1})["leases"] == 0)
    with pytest.raises(AssertionError, match="released"):
        _ = segment.buffer
    await pool.close()


@pytest.mark.asyncio
async def test_a_checkpoint_that_has_another_size_now_is_brought_anew(new_pool):
    pool = new_pool()
    old = await fill(pool, "m", G, value=1)
    new = await fill(pool, "m", 2 * G, value=2)
    assert (int(old.buffer[0]), int(new.buffer[0])) == (1, 2)
    assert (await pool.acquire("m", 2 * G, {})).ready
    old.release()
    new.release()
    await pool.close()


@pytest.mark.asyncio
async def test_after_the_end_nobody_waits_and_what_is_looked_at_stays(new_pool):
    pool = new_pool(4 * G)
    held = await fill(pool, "held", G, value=6)
    filling = await pool.acquire("m", G, {})
    waiting = asyncio.create_task(pool.acquire("m", G, {}))
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(waiting, 30)
    with pytest.raises(Cancelled):
        await pool.acquire("n", G, {})
    assert held.buffer.min() == 6
    filling.publish()
    filling.release()
    held.release()


@pytest.mark.asyncio
async def test_pages_are_made_ahead(new_pool):
    pool = new_pool(40 * G)
    await pool.start()
    pool.prefault(30 * G)
    await until(pool, lambda: pool.prefaulted == 30 * G)
    segment = await pool.acquire("m", 20 * G, {})
    before = faults()
    segment.buffer[::4096] = 1
    # Shared pages are there, but not yet in this process's tables, which are filled sixteen at a time.
    assert faults() - before < (20 * G // 4096 + 64 if isinstance(pool, SharedPool) else 64)
    segment.publish()
    segment.release()
    await pool.close()


def faults():
    with open(f"/proc/self/task/{threading.get_native_id()}/stat", encoding="ascii") as file:
        return int(file.read().rsplit(")", 1)[1].split()[7])


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_many_who_load_leave_and_evict_at_once_never_see_another_models_bytes(new_pool, seed):
    rng = random.Random(seed)
    pool = new_pool(12 * G)
    sizes = {f"m{i}": (i % 5 + 1) * G for i in range(8)}

    async def use(number):
        key = rng.choice(list(sizes))
        value = int(key[1:]) + 1
        await asyncio.sleep(rng.random() * 0.05)
        try:
            segment = await pool.acquire(key, sizes[key], {"reload_s": rng.random()})
        except InsufficientMemory:
            return
        try:
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            if segment.owner:
                assert segment.resident_nbytes == 0 or segment.buffer[segment.resident_nbytes - 1] == value
                segment.buffer[segment.resident_nbytes :] = value
                if rng.random() < 0.2:
                    return
                segment.publish()
            step = segment.buffer[:: G // 2]
        finally:
            segment.release()
        assert (step == value).all(), (number, key)
        await asyncio.sleep(rng.random() * 0.02)
        assert (step == value).all(), "looked at, though released"
        if rng.random() < 0.2:
            await pool.evict(key)

    tasks = [asyncio.create_task(use(number)) for number in range(60)]
    for task in rng.sample(tasks, 12):
        asyncio.get_running_loop().call_later(rng.random() * 0.05, task.cancel)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in outcomes if each is not None and not isinstance(each, asyncio.CancelledError)] == []
    # The traceback of who was cancelled holds his view.
    del outcomes, tasks, task
    gc.collect()
    await until(pool, lambda: not any(each["leases"] for each in pool.resident().values()))
    for key in sizes:
        await pool.evict(key)
    partly = pool.partly_resident() if isinstance(pool, SharedPool) else {}
    assert partly == {}
    await until(pool, lambda: pool.used == 0)
    await pool.close()


# --- several processes -----------------------------------------------------------------------------------------------

#: Does what it is told, a line of JSON at a time.
WORKER = """
import asyncio, gc, json, os, sys
from sllmdask.errors import SllmError
from sllmdask.loader.shared_pool import SharedPool

async def main():
    pool = SharedPool(sys.argv[1], int(sys.argv[2]), grace_s=float(sys.argv[3]), trim_s=0.0)
    held = {}
    async def do(order):
        op, key = order["op"], order.get("key")
        segment = None
        if op == "start":
            await pool.start()
        elif op == "acquire":
            segment = held[key] = await pool.acquire(key, order["nbytes"], order.get("meta", {}))
            return {"owner": segment.owner, "resident": segment.resident_nbytes, "meta": segment.meta}
        elif op == "fill":
            segment = held[key]
            segment.buffer[segment.resident_nbytes:] = order["value"]
        elif op in ("publish", "discard", "release"):
            getattr(held[key], op)()
        elif op == "read":
            return {"values": sorted(set(held[key].buffer[::4096].tolist()))}
        elif op == "fork":
            child = os.fork()
            if child == 0:
                held.clear()
                del segment
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
        elif op == "pool":
            return {"resident": pool.resident(), "used": pool.used, "capacity": pool.capacity}
        return {}
    loop = asyncio.get_running_loop()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        try:
            answer = await do(order)
        except SllmError as error:
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), flush=True)
asyncio.run(main())
"""


class Worker:
    """Another process that is a member of a pool."""

    def __init__(self, name, capacity=64 * G, grace_s=0.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, name, str(capacity), str(grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, op, key=None, **fields):
        self.process.stdin.write(json.dumps({"op": op, "key": key, **fields}) + "\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def do(self, op, key=None, **fields):
        self.tell(op, key, **fields)
        return self.hear()

    async def ado(self, op, key=None, **fields):
        return await asyncio.to_thread(self.do, op, key, **fields)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def new_worker(name):
    workers = []

    def new(**options):
        workers.append(Worker(name, **options))
        return workers[-1]

    yield new
    for worker in workers:
        worker.close()


@pytest_asyncio.fixture
async def pool(name):
    pool = SharedPool(name, 64 * G, grace_s=0.0, trim_s=0.0)
    await pool.start()
    yield pool
    await pool.close()


def keeper_of(pool):
    """A descriptor of the process that keeps `pool`: readable when it has ended."""
    return os.pidfd_open(pool.keeper_pid)


def one_thread():
    """The loop leaves what it leaves to threads to one."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


async def unmapped():
    """Return when that thread has done everything."""
    await asyncio.sleep(0)
    await asyncio.to_thread(int)


cluster = pytest.mark.cluster


@cluster
@pytest.mark.asyncio
async def test_two_workers_have_one_copy(pool, new_worker):
    await put(pool, "m", 4 * G, value=8, note="from the first")
    worker = new_worker()
    assert await worker.ado("acquire", "m", nbytes=4 * G) == {
        "owner": False,
        "resident": 4 * G,
        "meta": {"note": "from the first"},
    }
    assert await worker.ado("read", "m") == {"values": [8]}
    await until(pool, lambda: pool.resident()["m"]["leases"] == 1)
    assert (pool.used, pool.capacity) == (4 * G, 128 * G)
    assert (await worker.ado("pool"))["used"] == 4 * G


@cluster
@pytest.mark.asyncio
async def test_a_forks_copies_of_segments_end_no_lease(pool, new_worker):
    worker = new_worker()
    await worker.ado("acquire", "m", nbytes=4 * G)
    await worker.ado("publish", "m")
    await worker.ado("acquire", "n", nbytes=4 * G)
    await worker.ado("fork")
    await until(pool, lambda: pool.used == 8 * G and pool.resident()["m"]["leases"] == 1)
    assert not await pool.evict("m")
    await worker.ado("publish", "n")
    await until(pool, lambda: "n" in pool.resident())


@cluster
@pytest.mark.asyncio
async def test_a_killed_worker_pins_nothing_and_its_successor_finds_what_was_ready(pool, new_worker):
    worker = new_worker(capacity=8 * G)
    await worker.ado("acquire", "m", nbytes=4 * G)
    await worker.ado("fill", "m", value=4)
    await worker.ado("publish", "m")
    await until(pool, lambda: pool.resident().get("m", {}).get("leases") == 1)
    assert not await pool.evict("m")
    worker.kill()
    await until(pool, lambda: pool.resident()["m"]["leases"] == 0)
    successor = new_worker(capacity=8 * G)
    assert (await successor.ado("acquire", "m", nbytes=4 * G))["owner"] is False
    assert await successor.ado("read", "m") == {"values": [4]}
    successor.kill()
    await until(pool, lambda: pool.resident()["m"]["leases"] == 0)
    assert await pool.evict("m")
    await until(pool, lambda: pool.used == 0)


@cluster
@pytest.mark.asyncio
async def test_what_a_killed_worker_was_filling_is_filled_by_who_waits(pool, new_worker):
    filler, waiter = new_worker(), new_worker()
    await filler.ado("acquire", "m", nbytes=4 * G)
    await filler.ado("fill", "m", value=1)
    waiter.tell("acquire", "m", nbytes=4 * G)
    mine = asyncio.create_task(pool.acquire("m", 4 * G, {}))
    await asyncio.sleep(0)
    filler.kill()
    answer = asyncio.create_task(asyncio.to_thread(waiter.hear))
    _, pending = await asyncio.wait([mine, answer], return_when=asyncio.FIRST_COMPLETED)
    assert len(pending) == 1, "one of the two fills it, the other waits"
    if mine in pending:
        assert answer.result()["owner"]
        await waiter.ado("fill", "m", value=2)
        await waiter.ado("publish", "m")
    else:
        assert mine.result().owner
        mine.result().buffer[:] = 2
        mine.result().publish()
    assert (await mine).buffer.min() == 2
    await answer
    assert await waiter.ado("read", "m") == {"values": [2]}


@cluster
@pytest.mark.asyncio
async def test_what_a_killed_worker_was_filling_is_free_if_nobody_waits(pool, new_worker):
    worker = new_worker()
    await worker.ado("acquire", "m", nbytes=4 * G)
    await until(pool, lambda: pool.used == 4 * G)
    worker.kill()
    await until(pool, lambda: pool.used == 0)
    assert pool.resident() == {}


@cluster
@pytest.mark.asyncio
async def test_workers_that_start_together_share_one_keeper_and_the_memory_dies_with_the_last(name, new_worker):
    workers = [new_worker(capacity=4 * G) for _ in range(4)]
    for worker in workers:
        worker.tell("start")
    for worker in workers:
        assert await asyncio.to_thread(worker.hear) == {}
    pool = SharedPool(name, 4 * G, grace_s=0.0)
    await pool.start()
    await until(pool, lambda: pool.capacity == 20 * G)
    await put(pool, "m", 12 * G, value=1)
    assert (await workers[3].ado("acquire", "m", nbytes=12 * G))["owner"] is False
    inode = os.fstat(pool._link._fd).st_ino
    pidfd = keeper_of(pool)
    assert len(holders(inode)) == 6
    for worker in workers:
        worker.kill()
    assert not select.select([pidfd], [], [], 0)[0]
    await pool.close()
    assert ended(pidfd)
    os.close(pidfd)
    assert not holders(inode)


@cluster
@pytest.mark.asyncio
async def test_the_memory_waits_for_a_successor_for_the_grace_time(name, new_worker):
    first = new_worker(grace_s=30.0)
    await first.ado("acquire", "m", nbytes=G)
    await first.ado("fill", "m", value=3)
    await first.ado("publish", "m")
    first.kill()
    pool = SharedPool(name, 4 * G, grace_s=0.0)
    await pool.start()
    assert set(pool.resident()) == {"m"}
    segment = await pool.acquire("m", G, {})
    assert segment.ready and segment.buffer.min() == 3
    pidfd = keeper_of(pool)
    segment.release()
    await pool.close()
    assert ended(pidfd)
    os.close(pidfd)


@cluster
@pytest.mark.asyncio
async def test_a_killed_keeper_costs_nobody_his_memory_and_has_a_successor(pool, new_worker):
    one_thread()
    worker = new_worker()
    held = await fill(pool, "held", 4 * G, value=5)
    await worker.ado("acquire", "held", nbytes=4 * G)
    filling = await pool.acquire("filling", G, {})
    waiting = asyncio.create_task(pool.acquire("filling", G, {}))
    inode, pidfd = os.fstat(pool._link._fd).st_ino, keeper_of(pool)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert ended(pidfd)
    os.close(pidfd)
    # Who waited asks the successor, which knows nothing.
    again = await asyncio.wait_for(waiting, 30)
    assert again.owner
    filling.buffer[:] = 1
    filling.publish()
    again.buffer[:] = 2
    again.publish()
    assert await worker.ado("read", "held") == {"values": [5]}
    assert (await worker.ado("acquire", "filling", nbytes=G))["owner"] is False
    assert await worker.ado("read", "filling") == {"values": [2]}
    assert (held.buffer.min(), filling.buffer.max()) == (5, 1)
    worker.close()
    held.release()
    assert os.getpid() in holders(inode)
    filling.release()
    await unmapped()
    assert not holders(inode)
    again.release()


@cluster
@pytest.mark.asyncio
async def test_a_copy_that_lost_its_end_needs_only_that_again(pool, new_worker):
    await put(pool, "m", 60 * G, value=7)
    worker = new_worker(capacity=0)
    await worker.ado("acquire", "n", nbytes=10 * G)
    await until(pool, lambda: "m" in pool.partly_resident())
    assert "m" not in pool.resident()
    assert pool.partly_resident()["m"]["resident_nbytes"] == 54 * G
    worker.kill()
    segment = await pool.acquire("m", 60 * G, {})
    assert segment.owner and segment.resident_nbytes == 54 * G
    assert (segment.buffer[: 54 * G : 4096] == 7).all()
    segment.buffer[54 * G :] = 7
    segment.publish()
    segment.release()
    await until(pool, lambda: "m" in pool.resident())


@cluster
@pytest.mark.asyncio
async def test_memory_in_pieces_looks_like_memory_in_one(name, new_worker):
    pool = SharedPool(name, 16 * G, grace_s=0.0, trim_s=60.0)
    kept = [await fill(pool, f"k{i}", 2 * G, value=i) for i in range(8)]
    for segment in kept[::2]:
        segment.release()
        await pool.evict(segment.key)
    whole = await pool.acquire("m", 8 * G, {})
    whole.buffer[:] = np.arange(8 * G // 8).view(np.uint8)
    whole.publish()
    worker = new_worker(capacity=0)
    assert (await worker.ado("acquire", "m", nbytes=8 * G))["resident"] == 8 * G
    again = await pool.acquire("m", 8 * G, {})
    assert np.array_equal(again.buffer, np.arange(8 * G // 8).view(np.uint8))
    assert [int(segment.buffer.max()) for segment in kept[1::2]] == [1, 3, 5, 7]
    await pool.close()


@cluster
@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(2))
async def test_random_kills_leave_no_wrong_byte_and_no_byte_behind(pool, new_worker, seed):
    rng = random.Random(seed)
    workers = [new_worker(capacity=0, grace_s=0.0) for _ in range(3)]
    sizes = {f"m{i}": (4 + 6 * i) * G for i in range(5)}

    async def order(number):
        worker, key = rng.choice(workers), rng.choice(list(sizes))
        value = int(key[1:]) + 1
        answer = await worker.ado("acquire", key, nbytes=sizes[key], meta={"reload_s": rng.random()})
        if "error" in answer:
            return
        if rng.random() < 0.15:
            workers.remove(worker)
            worker.kill()
            workers.append(new_worker(capacity=0, grace_s=0.0))
            return
        if answer["owner"]:
            await worker.ado("fill", key, value=value)
            await worker.ado("publish", key)
        assert await worker.ado("read", key) == {"values": [value]}, number
        if rng.random() < 0.9:
            await worker.ado("release", key)

    for number in range(40):
        await asyncio.wait_for(order(number), 60)
    for worker in workers:
        worker.kill()
    await until(pool, lambda: not any(each["leases"] for each in pool.resident().values()))
    for key in sizes:
        await pool.evict(key)
    await until(pool, lambda: pool.used == 0 and pool.prefaulted == 0)
    assert os.fstat(pool._link._fd).st_blocks == 0


@cluster
@pytest.mark.asyncio
async def test_nothing_is_left_in_this_process(name):
    def left():
        gc.collect()
        with open("/proc/self/maps", encoding="utf-8") as file:
            mappings = sum("sllmdask-host-memory" in line for line in file)
        return mappings, len(os.listdir("/proc/self/fd")), {each.name for each in threading.enumerate()}

    one_thread()
    await asyncio.to_thread(int)
    before = left()
    for _ in range(3):
        pool = SharedPool(name, 16 * G, grace_s=0.0, populate=True)
        await put(pool, "m", 4 * G)
        segment = await pool.acquire("m", 4 * G, {})
        view = segment.buffer[4:]
        segment.release()
        await pool.close()
        assert view.max() == 1
        del view, segment
    await unmapped()
    mappings, n_fds, threads = left()
    assert (mappings, n_fds) == before[:2]
    assert threads <= before[2]


@pytest.mark.parametrize("bad", ["", "x" * 65, "a\0b", "é" * 40])
def test_a_name_that_no_socket_can_have_is_refused(bad):
    with pytest.raises(ConfigError, match="1 to 64 bytes"):
        SharedPool(bad, G)


@pytest.mark.asyncio
async def test_a_keeper_that_does_not_start_is_an_error_that_says_why(name, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HostPoolUnavailable, match="did not start"):
        await SharedPool(name, G).start()
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(HostPoolUnavailable, match="No such file"):
        await SharedPool(name, G).start()


@cluster
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_another_users_process_that_took_the_name_is_not_trusted(name):
    code = f"""
import os, socket, sys
os.setuid(65534)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind({address_of_pool(name, 0)!r})
listener.listen()
print("listening", flush=True)
sys.stdin.read()
"""
    impostor = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert impostor.stdout.readline() == b"listening\n"
        with pytest.raises(HostPoolUnavailable, match="user 65534"):
            asyncio.run(SharedPool(name, G).start())
    finally:
        impostor.communicate()


@cluster
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_another_user_is_given_nothing(name):
    async def main():
        pool = SharedPool(name, G, grace_s=0.0)
        await pool.start()
        code = f"""
import os, socket
os.setuid(65534)
member = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
member.connect({address_of_pool(name, 0)!r})
try:
    member.send(b'{{"op":"hello","capacity":0,"grace_s":0,"trim_s":0}}')
    print(len(member.recv(1000)))
except (BrokenPipeError, ConnectionResetError):
    print(0)
"""
        command = [sys.executable, "-S", "-c", code]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        await pool.close()
        return output

    assert asyncio.run(main()) == b"0\n"
