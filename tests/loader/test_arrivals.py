from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import distributed.protocol.pickle
import pytest

from sllmdask.errors import Cancelled, CheckpointCorrupt
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.format import CheckpointIndex, FileEntry, TensorEntry
from sllmdask.loader.plan import BLOCK, ReadPlan, plan_reads


@pytest.fixture
def plan() -> ReadPlan:
    """Chunks of one block: `a` lies in the first, `b` in the first two, `c` in the last two of four; `none` is empty."""
    sizes = {"a": 1000, "b": BLOCK, "c": 2 * BLOCK, "none": 0}
    tensors, offset = [], BLOCK
    for name, nbytes in sizes.items():
        tensors.append(TensorEntry(name, "U8", (nbytes,), "m.safetensors", offset, nbytes))
        offset += nbytes
    return plan_reads(CheckpointIndex("/m", tuple(tensors), (FileEntry("m.safetensors", offset, BLOCK),)), BLOCK)


@pytest.fixture
def arrivals(plan: ReadPlan) -> Arrivals:
    return Arrivals(plan)


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def test_a_tensor_is_there_when_its_last_chunk_is_whatever_the_order(plan, arrivals):
    assert plan.chunks_of["b"] == (0, 1)
    arrivals.arrived(1)
    assert not arrivals.has("a")
    assert not arrivals.has("b")
    arrivals.arrived(0)
    assert arrivals.has("a")
    assert arrivals.has("b")
    assert not arrivals.has("c")
    arrivals.wait(["a", "b"])
    arrivals.wait_chunk(1)


def test_an_empty_tensor_is_there_from_the_start(arrivals):
    assert arrivals.has("none")
    arrivals.wait(["none"])


def test_bytes_are_counted_once_however_often_a_chunk_is_told_of(plan, arrivals):
    assert (arrivals.nbytes, arrivals.done) == (0, False)
    arrivals.arrived(0)
    arrivals.arrived(0)
    assert arrivals.nbytes == plan.chunks[0].payload == BLOCK
    for chunk in range(len(plan.chunks)):
        arrivals.arrived(chunk)
    assert (arrivals.nbytes, arrivals.done) == (3 * BLOCK + 1000, True)


def test_waiters_return_each_when_its_tensors_are_there(plan, arrivals, pool):
    a, c, everything = (pool.submit(arrivals.wait, names) for names in (["a"], ["c"], list(plan.chunks_of)))
    for chunk in plan.chunks_of["c"]:
        arrivals.arrived(chunk)
    c.result(60)
    assert not everything.done()
    arrivals.arrived(0)
    a.result(60)
    everything.result(60)
    assert arrivals.done


def test_a_wait_gives_up_after_its_time(arrivals):
    with pytest.raises(TimeoutError, match="chunk 0 of 4"):
        arrivals.wait(["a"], timeout_s=0)
    with pytest.raises(TimeoutError):
        arrivals.wait_chunk(3, timeout_s=0.01)


def test_all_who_wait_hear_of_a_failure_each_of_an_error_of_its_own(arrivals, pool):
    error = CheckpointCorrupt("f", "t", "broken")
    waiters = [pool.submit(arrivals.wait, ["c"]) for _ in range(3)]
    arrivals.fail(error)
    wait_for(waiters, 60)
    heard = [waiter.exception() for waiter in waiters]
    assert {type(other) for other in heard} == {CheckpointCorrupt}
    assert all((other.file, other.tensor, other.reason) == ("f", "t", "broken") for other in heard)
    assert len({id(other) for other in (error, *heard)}) == 4


def test_after_a_failure_what_is_there_is_not_to_be_used_either_and_the_first_reason_counts(arrivals):
    arrivals.arrived(0)
    arrivals.fail(Cancelled("called off"))
    arrivals.fail(ValueError("later"))
    for wait in (lambda: arrivals.wait(["a"]), lambda: arrivals.wait_chunk(0), lambda: arrivals.wait(["none"])):
        with pytest.raises(Cancelled, match="called off"):
            wait()


def test_an_error_of_the_system_keeps_its_file(arrivals):
    arrivals.fail(OSError(errno.EIO, "broken at byte 7", "/m/f"))
    with pytest.raises(OSError, match="broken at byte 7: '/m/f'") as caught:
        arrivals.wait(["a"])
    assert caught.value.errno == errno.EIO


def test_an_error_that_cannot_be_made_again_is_told_in_words(arrivals):
    class Odd(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")

    arrivals.fail(Odd(1, 2))
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        arrivals.wait(["a"])


def test_a_failure_does_not_keep_the_frames_that_it_came_through(arrivals):
    # As every worker process does; it changes how exceptions are copied.
    distributed.protocol.pickle.dumps(1)
    try:
        raise ValueError("broken")
    except ValueError as error:
        arrivals.fail(error)
    with pytest.raises(ValueError, match="broken") as caught:
        arrivals.wait(["a"])
    assert [frame.name for frame in caught.traceback][1:] == ["wait", "_wait", "_check"]


def test_threads_that_bring_and_threads_that_wait_miss_nothing(pool):
    n = 2000
    tensors = tuple(TensorEntry(f"t{i}", "U8", (BLOCK,), "m.safetensors", i * BLOCK, BLOCK) for i in range(n))
    plan = plan_reads(CheckpointIndex("/m", tensors, (FileEntry("m.safetensors", n * BLOCK, 0),)), BLOCK)
    arrivals, start = Arrivals(plan), threading.Barrier(4)

    def bring(first: int) -> None:
        start.wait()
        for chunk in range(first, n, 2):
            arrivals.arrived(chunk)

    def use(names: list[str]) -> int:
        start.wait()
        for name in names:
            arrivals.wait([name], timeout_s=60)
            assert arrivals.has(name)
        return len(names)

    names = [tensor.name for tensor in tensors]
    jobs = [pool.submit(bring, 0), pool.submit(bring, 1), pool.submit(use, names), pool.submit(use, names[::-1])]
    assert [job.result(60) for job in jobs] == [None, None, n, n]
    assert arrivals.done
