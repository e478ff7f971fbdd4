from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllmdask.batching.blocks import BlockPool, blocks_for
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.scheduler import BatchScheduler, StepPlan
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.errors import ContextTooLong, InvalidRequest


def sequence(name: str, n_prompt: int, max_tokens: int = 8, priority: int = 0, arrival: int = 0) -> Sequence:
    return Sequence(name, list(range(n_prompt)), SamplingParams(max_tokens=max_tokens), priority=priority, arrival=arrival)


def scheduler(n_blocks: int = 100, **changes: int | float) -> BatchScheduler:
    bounds = {"block_size": 4, "max_running": 8, "max_batch_tokens": 16, "max_model_len": 1000, "watermark": 0.0, **changes}
    return BatchScheduler(BlockPool(n_blocks), **bounds)  # type: ignore[arg-type]


def run(batch: BatchScheduler) -> StepPlan:
    """One step of a model that says 7 every time."""
    plan = batch.plan()
    for chunk in plan.chunks:
        samples = chunk.samples
        batch.advance(chunk)
        if samples:
            chunk.sequence.output_ids.append(7)
            window_is_full = chunk.sequence.n_tokens >= batch.max_model_len
            if window_is_full or len(chunk.sequence.output_ids) == chunk.sequence.params.max_tokens:
                batch.finish(chunk.sequence.request_id, FinishReason.LENGTH)
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.n_tokens) for chunk in plan.chunks]


def test_a_long_prompt_is_cut_into_chunks_and_only_the_last_one_samples():
    batch = scheduler()
    batch.add(sequence("a", 40))
    plans = [run(batch) for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[("a", 0, 16)], [("a", 16, 16)], [("a", 32, 8)]]
    assert shape(run(batch)) == [("a", 40, 1)]


def test_decodes_come_first_and_prefill_takes_what_they_leave():
    batch = scheduler()
    batch.add(sequence("short", 3))
    run(batch)
    batch.add(sequence("long", 40))
    assert shape(run(batch)) == [("short", 3, 1), ("long", 0, 15)]
    assert shape(run(batch)) == [("short", 4, 1), ("long", 15, 15)]


def test_prefill_beside_decodes_has_a_bound_of_its_own_and_none_without_them():
    batch = scheduler(prefill_beside_decode=3)
    batch.add(sequence("first", 14, max_tokens=3))
    assert shape(run(batch)) == [("first", 0, 14)]
    batch.add(sequence("long", 20))
    assert shape(run(batch)) == [("first", 14, 1), ("long", 0, 3)]
    assert shape(run(batch)) == [("first", 15, 1), ("long", 3, 3)]
    assert shape(run(batch)) == [("long", 6, 14)]


def test_what_arrives_from_elsewhere_is_computed_in_small_parts_beside_decodes_and_in_large_ones_without_them():
    batch = scheduler(prefill_beside_decode=12)
    batch.add(sequence("here", 4, max_tokens=3))
    run(batch)
    coming = [sequence(name, n) for name, n in (("a", 6), ("b", 20))]
    for each in coming:
        incoming = batch.expect(each, each.n_tokens)
        assert incoming is not None and batch.compute(incoming, each)
    batch.add(sequence("new", 30))
    # A quarter of the twelve for both of them; who waits for an answer has the rest.
    assert shape(run(batch)) == [("here", 4, 1), ("a", 0, 3), ("new", 0, 9)]
    assert shape(run(batch)) == [("here", 5, 1), ("new", 9, 12)]
    assert shape(run(batch)) == [("new", 21, 9), ("a", 3, 2), ("b", 0, 5)]


def test_several_prompts_share_a_step():
    batch = scheduler()
    for name in "abc":
        batch.add(sequence(name, 7))
    assert shape(run(batch)) == [("a", 0, 7), ("b", 0, 7), ("c", 0, 2)]


def test_admission_is_first_come_first_served_inside_a_priority():
    batch = scheduler(max_running=1)
    for name, priority, arrival in [("late", 0, 3), ("early", 0, 1), ("urgent", 5, 9), ("tie-1", 0, 2), ("tie-2", 0, 2)]:
        batch.add(sequence(name, 2, max_tokens=1, priority=priority, arrival=arrival))
    served = [shape(run(batch))[0][0] for _ in range(5)]
    assert served == ["urgent", "early", "tie-1", "tie-2", "late"]


def test_nobody_overtakes_the_head_of_the_queue_that_does_not_fit():
    batch = scheduler(n_blocks=10)
    batch.add(sequence("a", 23))  # 6 of 10 blocks
    run(batch)
    batch.add(sequence("big", 23))
    batch.add(sequence("small", 2))
    run(batch)
    assert [waiting.request_id for waiting in batch.waiting] == ["big", "small"]


def test_admission_leaves_the_watermark_free_unless_nothing_runs():
    batch = scheduler(n_blocks=10, watermark=0.2)
    batch.add(sequence("a", 36))  # 9 of 10 blocks
    assert shape(batch.plan()) == [("a", 0, 16)]
    batch = scheduler(n_blocks=10, watermark=0.2)
    batch.add(sequence("a", 3))
    run(batch)
    batch.add(sequence("b", 32))  # 8 blocks are free in 9, but 2 must stay
    assert shape(batch.plan()) == [("a", 3, 1)]


def test_when_decoding_runs_out_of_blocks_the_latest_gives_way_and_comes_back():
    batch = scheduler(n_blocks=4)
    for name in "ab":
        batch.add(sequence(name, 7, max_tokens=6))
    run(batch)
    run(batch)  # both are at 9 tokens and need a third block each
    plan = run(batch)
    assert [victim.request_id for victim in plan.preempted] == ["b"]
    assert shape(plan) == [("a", 8, 1)]
    [waiting] = batch.waiting
    assert (waiting.request_id, waiting.n_computed, waiting.block_table, waiting.n_preemptions) == ("b", 0, [], 1)
    steps = [shape(run(batch)) for _ in range(8)]
    assert ("b", 0, 9) in [chunk for step in steps for chunk in step], "its answer so far is computed again, as a prompt"
    assert not batch.has_work


def test_a_lower_priority_gives_way_to_a_waiting_higher_one_but_an_equal_one_does_not():
    batch = scheduler(n_blocks=5)
    batch.add(sequence("running", 15))
    run(batch)
    batch.add(sequence("equal", 7))
    assert not run(batch).preempted
    batch.add(sequence("urgent", 7, priority=1))
    plan = batch.plan()
    assert [victim.request_id for victim in plan.preempted] == ["running"]
    assert shape(plan)[0] == ("urgent", 0, 7)


def test_nobody_is_preempted_where_it_would_not_be_enough():
    batch = scheduler(n_blocks=6)
    batch.add(sequence("same", 15, priority=1))
    batch.add(sequence("lower", 3))
    run(batch)
    batch.add(sequence("big", 15, priority=1))
    assert not run(batch).preempted


def test_what_can_never_fit_is_refused_when_it_comes():
    batch = scheduler(n_blocks=4)  # 16 tokens
    assert batch.max_model_len == 16
    with pytest.raises(ContextTooLong) as refused:
        batch.add(sequence("a", 16))
    assert (refused.value.n_tokens, refused.value.limit) == (16, 16)
    batch.add(sequence("b", 15))
    while batch.has_work:
        run(batch)
    assert batch.pool.n_free == 4


def test_a_request_id_is_taken_once():
    batch = scheduler()
    batch.add(sequence("a", 3))
    with pytest.raises(InvalidRequest):
        batch.add(sequence("a", 3))


def test_finishing_what_is_not_here_says_so():
    assert scheduler().finish("a", FinishReason.ABORT) is None


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(1, 20), st.integers(-1, 1), st.none() | st.integers(0, 20)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(ARRIVALS, st.integers(9, 30), st.integers(1, 6), st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.5]))
def test_whatever_comes_every_block_has_one_owner_and_everybody_is_served(
    arrivals: list[tuple[int, int, int, int, int | None]],
    n_blocks: int,
    max_running: int,
    max_batch_tokens: int,
    watermark: float,
):
    batch = scheduler(n_blocks, max_running=max_running, max_batch_tokens=max_batch_tokens, watermark=watermark)
    pending = []
    aborts: dict[int, list[str]] = {}
    due = 0
    for i, (gap, n_prompt, max_tokens, priority, abort_after) in enumerate(arrivals):
        due += gap
        pending.append((due, sequence(str(i), n_prompt, max_tokens, priority, arrival=i)))
        if abort_after is not None:
            aborts.setdefault(due + abort_after, []).append(str(i))
    sequences = [added for _, added in pending]
    for step in range(3000):
        while pending and pending[0][0] <= step:
            batch.add(pending.pop(0)[1])
        for request_id in aborts.get(step, []):
            batch.finish(request_id, FinishReason.ABORT)
        if not batch.has_work and not pending:
            break
        plan = run(batch)
        assert plan.n_tokens <= max_batch_tokens
        assert bool(plan.chunks) == bool(batch.has_work or plan.chunks), "work left, but nothing planned"
        assert batch.n_running <= max_running
        assert batch.pool.n_free + batch.pool.n_used == n_blocks
        owned = [block for running in batch.running for block in running.block_table]
        assert len(owned) == len(set(owned)) == batch.pool.n_used and 0 not in owned
        for running in batch.running:
            assert len(running.block_table) >= blocks_for(running.n_computed, batch.block_size)
        assert all(not waiting.block_table and not waiting.n_computed for waiting in batch.waiting)
    assert batch.pool.n_free == n_blocks
    for served in sequences:
        assert served.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT)
        if served.finish_reason is FinishReason.LENGTH:
            assert len(served.output_ids) == served.params.max_tokens or served.n_tokens == batch.max_model_len
