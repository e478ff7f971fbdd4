from __future__ import annotations

import pytest

from sllmdask.batching.blocks import BlockPool
from sllmdask.batching.params import SamplingParams, choice_seed
from sllmdask.batching.scheduler import BatchScheduler, Copy, Park, ParkingCosts, Unpark
from sllmdask.batching.sequence import FinishReason, Sequence
from tests.batching.test_scheduler import run, shape

MOVES_QUICKLY = ParkingCosts(bytes_per_token=1000, bytes_per_s=1e9, prefill_tokens_per_s=1000)
COMPUTES_QUICKLY = ParkingCosts(bytes_per_token=1000, bytes_per_s=1e6, prefill_tokens_per_s=1e6)


def sequence(name: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> Sequence:
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens), **fields)  # type: ignore[arg-type]


def scheduler(n_blocks: int = 100, **changes: object) -> BatchScheduler:
    bounds = {"block_size": 4, "max_running": 8, "max_batch_tokens": 16, "max_model_len": 1000, "watermark": 0.0, **changes}
    return BatchScheduler(BlockPool(n_blocks), **{"prefix_reuse": True, **bounds})  # type: ignore[arg-type]


def served(batch: BatchScheduler, *sequences: Sequence) -> None:
    for added in sequences:
        batch.add(added)
    while batch.has_work:
        run(batch)


# --- prefix reuse ------------------------------------------------------------------------------------------------------


def test_a_prompt_begins_where_an_earlier_one_was_computed():
    batch = scheduler()
    served(batch, sequence("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    batch.add(sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 90, 100, 110]))
    assert shape(run(batch)) == [("b", 8, 3)]
    assert batch.n_reused_tokens == 8


def test_the_answer_is_found_too_when_it_comes_back_as_a_prompt():
    batch = scheduler()
    first = sequence("a", [1, 2, 3], max_tokens=6)
    served(batch, first)
    batch.add(sequence("b", [1, 2, 3, *first.output_ids, 50]))
    assert shape(run(batch)) == [("b", 8, 2)]


def test_the_last_token_of_a_prompt_is_always_computed():
    batch = scheduler()
    served(batch, sequence("a", [1, 2, 3, 4, 5, 6, 7, 8]))
    batch.add(sequence("b", [1, 2, 3, 4, 5, 6, 7, 8]))
    assert shape(run(batch)) == [("b", 4, 4)]


def test_a_prefix_is_shared_with_one_who_still_runs_and_outlives_him():
    batch = scheduler()
    first, second = sequence("a", [1, 2, 3, 4, 5]), sequence("b", [1, 2, 3, 4, 6])
    batch.add(first)
    run(batch)
    batch.add(second)
    run(batch)
    assert first.block_table[0] == second.block_table[0]
    assert batch.pool.holders(first.block_table[0]) == 2
    batch.finish("a", FinishReason.ABORT)
    assert batch.pool.holders(second.block_table[0]) == 1


@pytest.mark.parametrize(
    "fields", [{"salt": b"adapter"}, {"from_scratch": True}], ids=["under another adapter", "when all is to be computed"]
)
def test_nothing_is_reused(fields: dict[str, object]):
    batch = scheduler()
    served(batch, sequence("a", [1, 2, 3, 4, 5]))
    batch.add(sequence("b", [1, 2, 3, 4, 5], **fields))
    assert shape(run(batch)) == [("b", 0, 5)]


def test_what_a_failed_sequence_computed_is_not_found():
    batch = scheduler()
    batch.add(sequence("a", [1, 2, 3, 4, 5]))
    run(batch)
    batch.finish("a", FinishReason.ERROR)
    batch.add(sequence("b", [1, 2, 3, 4, 5]))
    assert shape(run(batch)) == [("b", 0, 5)]


def test_cached_blocks_give_way_to_who_needs_memory():
    batch = scheduler(n_blocks=4)
    served(batch, sequence("a", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1))
    assert batch.pool.n_cached == 2
    served(batch, sequence("b", list(range(50, 62)), max_tokens=4))
    assert batch.pool.n_free == 4
    batch.add(sequence("c", [1, 2, 3, 4, 5, 6, 7, 8]))
    assert shape(run(batch))[0][1] == 0


def test_what_is_found_counts_as_room():
    batch = scheduler(n_blocks=6)
    text = list(range(16))
    batch.add(sequence("a", [*text, 100]))  # 5 of 6 blocks
    run(batch)
    run(batch)
    batch.add(sequence("b", [*text, 200]))  # 4 of its 5 are here
    assert ("b", 16, 1) in shape(run(batch))


def test_who_gave_way_finds_his_own_blocks_if_nobody_took_them():
    batch = scheduler(n_blocks=6)
    batch.add(sequence("low", list(range(14))))
    run(batch)
    batch.add(sequence("high", list(range(50, 59)), max_tokens=1, priority=1))
    assert [victim.request_id for victim in run(batch).preempted] == ["low"]
    # Three of its four blocks were full. The newcomer took three blocks, empty ones.
    assert shape(run(batch)) == [("low", 12, 3)]


# --- several answers to one prompt -------------------------------------------------------------------------------------


def test_the_prompt_of_several_answers_is_computed_once_and_its_last_block_is_copied():
    batch = scheduler(prefix_reuse=False)
    choices = sequence("a", list(range(10))).choices(3)
    for choice in choices:
        batch.add(choice)
    assert shape(batch.plan()) == [("a", 0, 10)]
    assert (batch.n_running, batch.n_waiting) == (1, 2)
    batch = scheduler(prefix_reuse=False)
    choices = sequence("a", list(range(10))).choices(3)
    for choice in choices:
        batch.add(choice)
    run(batch)
    tail = choices[0].block_table[2]
    plan = run(batch)
    assert shape(plan) == [("a", 10, 1), ("a#1", 9, 1), ("a#2", 9, 1)]
    assert [move.source for move in plan.moves if isinstance(move, Copy)] == [tail, tail]
    assert {move.target for move in plan.moves if isinstance(move, Copy)} == {choice.block_table[2] for choice in choices[1:]}
    assert batch.pool.holders(choices[0].block_table[0]) == 3
    assert batch.pool.n_used == 2 + 3
    while batch.has_work:
        run(batch)
    assert batch.pool.n_free == 100


def test_where_the_prompt_fills_its_blocks_but_for_one_token_nothing_is_copied():
    batch = scheduler(prefix_reuse=False)
    for choice in sequence("a", list(range(9))).choices(2):
        batch.add(choice)
    run(batch)
    plan = run(batch)
    assert shape(plan) == [("a", 9, 1), ("a#1", 8, 1)]
    assert not plan.moves


@pytest.mark.parametrize("how", ["aborted", "held", "recomputed"])
def test_the_next_answer_leads_when_the_first_is(how: str):
    batch = scheduler(prefix_reuse=False)
    for choice in sequence("a", list(range(30))).choices(3):
        batch.add(choice)
    run(batch)  # 16 of 30
    if how == "aborted":
        batch.finish("a", FinishReason.ABORT)
    elif how == "held":
        batch.hold("a")
    else:
        batch.recompute("a")
    shapes = [shape(run(batch)) for _ in range(10)]
    computed = [chunk for step in shapes for chunk in step]
    assert sum(n for name, _, n in computed if name == "a#1") >= 30
    assert ("a#2", 29, 1) in computed, "it shares what the second has computed"


def test_who_follows_a_follower_is_served_too_when_the_first_leader_leaves():
    batch = scheduler(prefix_reuse=False)
    choices = sequence("a", list(range(30))).choices(3)
    fork = sequence("fork", list(range(30)), leader="a#1")
    for added in (*choices, fork):
        batch.add(added)
    run(batch)
    batch.finish("a", FinishReason.ABORT)
    while batch.has_work:
        run(batch)
    assert not list(batch)
    assert [served.finish_reason for served in (*choices[1:], fork)] == [FinishReason.LENGTH] * 3


def test_each_answer_has_a_seed_of_its_own_and_the_first_that_of_the_request():
    choices = Sequence("a", [1], SamplingParams(seed=2**64 - 1)).choices(50)
    seeds = [choice.params.seed for choice in choices]
    assert seeds[0] == 2**64 - 1 and len(set(seeds)) == 50
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert [choice_seed(2**64 - 1, i) for i in range(50)] == seeds
    assert len({choice_seed(seed, i) for seed in range(30) for i in range(30)}) == 900


# --- giving way --------------------------------------------------------------------------------------------------------


def pressed(costs: ParkingCosts | None, n_parking_blocks: int = 100) -> tuple[BatchScheduler, Sequence]:
    """A batch in which the second of two sequences, with 8 tokens computed, gives way in the next step."""
    batch = scheduler(n_blocks=4, prefix_reuse=False, costs=costs, n_parking_blocks=n_parking_blocks)
    first, second = sequence("a", [1] * 7, max_tokens=6), sequence("b", [2] * 7, max_tokens=6)
    batch.add(first)
    batch.add(second)
    run(batch)
    run(batch)
    return batch, second


def test_kv_is_parked_where_moving_is_quicker_and_comes_back_as_it_was():
    batch, second = pressed(MOVES_QUICKLY)
    blocks = tuple(second.block_table)
    plan = run(batch)
    assert plan.preempted == (second,)
    [move] = plan.moves
    assert isinstance(move, Park) and (move.sequence, move.blocks) == (second, blocks)
    assert (second.n_parked, second.n_computed, second.block_table, batch.n_parked_blocks) == (8, 0, [], 2)
    while not (plan := run(batch)).moves:
        pass
    [back] = plan.moves
    assert isinstance(back, Unpark) and (back.first, back.blocks) == (0, tuple(second.block_table[:2]))
    assert shape(plan) == [("b", 8, 1)]
    assert (second.n_parked, batch.n_parked_blocks) == (0, 0)


@pytest.mark.parametrize(
    ("costs", "n_parking_blocks"),
    [(COMPUTES_QUICKLY, 100), (MOVES_QUICKLY, 1), (None, 100)],
    ids=["computing is quicker", "there is no room for it", "nothing is known"],
)
def test_kv_is_not_parked_where(costs: ParkingCosts | None, n_parking_blocks: int):
    batch, second = pressed(costs, n_parking_blocks)
    plan = run(batch)
    assert plan.preempted == (second,)
    assert not plan.moves and second.n_parked == 0


def test_moving_is_quicker_exactly_where_the_bytes_there_and_back_take_less_than_the_tokens():
    costs = ParkingCosts(bytes_per_token=1000, bytes_per_s=1e6, prefill_tokens_per_s=500)
    assert (costs.park_s(10), costs.recompute_s(10)) == (0.02, 0.02)


def test_what_is_parked_and_was_found_meanwhile_is_not_moved():
    batch = scheduler(n_blocks=100, costs=MOVES_QUICKLY, n_parking_blocks=100)
    first = sequence("a", list(range(12)))
    batch.add(first)
    run(batch)
    move = batch.park("a")
    assert move is not None and len(move.blocks) == 3
    batch.resume("a")
    plan = run(batch)
    [back] = plan.moves
    assert isinstance(back, Unpark) and back.blocks == ()
    assert shape(plan) == [("a", 12, 1)]


# --- waiting -----------------------------------------------------------------------------------------------------------


def test_who_has_waited_long_enough_passes_a_newcomer_of_a_higher_class():
    batch = scheduler(max_running=1, ageing=10.0)
    batch.add(sequence("running", [1], max_tokens=4, priority=5))
    batch.plan(0.0)
    batch.add(sequence("patient", [2], priority=0, arrival=1))
    batch.plan(1.0)
    batch.add(sequence("newcomer", [3], priority=2, arrival=2))
    batch.plan(20.0)
    assert [waiting.request_id for waiting in batch.waiting] == ["newcomer", "patient"]
    batch.plan(31.0)
    assert [waiting.request_id for waiting in batch.waiting] == ["patient", "newcomer"]


def test_age_protects_the_one_who_runs_but_takes_nothing_from_anybody():
    batch = scheduler(max_running=1, ageing=10.0)
    old = sequence("old", [1], priority=0)
    first = sequence("first", [1], max_tokens=100, priority=1)
    batch.add(first)
    batch.plan(0.0)
    batch.add(old)
    assert not batch.plan(100.0).preempted
    batch.plan(300.0)
    assert old.level == 20
    batch.finish("first", FinishReason.ABORT)
    batch.plan(301.0)
    assert batch.running == (old,)
    batch.add(sequence("urgent", [3], priority=19))
    assert not batch.plan(302.0).preempted
    batch.add(sequence("more urgent", [3], priority=21))
    assert batch.plan(303.0).preempted == (old,)


def test_without_ageing_the_classes_are_strict():
    batch = scheduler(max_running=1)
    batch.add(sequence("running", [1], priority=5))
    batch.plan(0.0)
    batch.add(sequence("patient", [2], priority=0))
    batch.plan(1e9)
    batch.add(sequence("newcomer", [3], priority=1))
    batch.plan(2e9)
    assert [waiting.request_id for waiting in batch.waiting] == ["newcomer", "patient"]


# --- held, and on the way ----------------------------------------------------------------------------------------------


def test_who_is_held_keeps_his_blocks_and_his_place():
    batch = scheduler(max_running=1)
    first = sequence("a", [1, 2, 3, 4, 5])
    batch.add(first)
    batch.add(sequence("b", [6]))
    run(batch)
    blocks = list(first.block_table)
    batch.hold("a")
    assert not run(batch).chunks and first.block_table == blocks
    batch.resume("a")
    assert shape(run(batch)) == [("a", 5, 1)]


def test_who_arrives_has_what_was_promised_to_him():
    batch = scheduler(n_blocks=5)
    coming = sequence("a", list(range(10)))
    incoming = batch.expect(coming, 16)
    assert incoming is not None and batch.pool.n_reserved == 4
    batch.add(sequence("b", list(range(50, 58))))
    assert not run(batch).chunks, "one block is left, and two are needed"
    assert batch.extend(incoming, 9)
    assert (batch.pool.n_reserved, len(incoming.blocks)) == (1, 3)
    assert batch.accept(incoming, coming, 9)
    assert (coming.n_computed, coming.block_table, batch.pool.n_reserved) == (9, incoming.blocks[:3], 0)
    assert ("a", 9, 1) in shape(run(batch))


def test_nothing_is_promised_that_is_not_there():
    batch = scheduler(n_blocks=5)
    assert batch.expect(sequence("a", [1] * 10), 24) is None
    assert batch.expect(sequence("a", [1] * 10), 20) is not None
    assert batch.expect(sequence("b", [1]), 1) is None
    assert scheduler(max_running=1).expect(sequence("a", [1]), 1) is not None


def test_a_promise_that_is_given_back_leaves_nothing():
    batch = scheduler(n_blocks=5)
    incoming = batch.expect(sequence("a", [1] * 10), 16)
    assert incoming is not None and batch.extend(incoming, 5)
    batch.refuse(incoming)
    assert (batch.pool.n_free, batch.pool.n_reserved) == (5, 0)
    assert not batch.incoming


def test_who_arrives_finds_what_is_here_of_his_tokens():
    batch = scheduler()
    text = list(range(12))
    served(batch, sequence("a", text))
    incoming = batch.expect(sequence("b", [*text, 50]), 14)
    assert incoming is not None and incoming.n_shared == 3
    assert batch.accept(incoming, sequence("b", [*text, 50]), 12)
    assert shape(run(batch)) == [("b", 12, 1)]


def test_who_has_blocks_but_no_kv_yet_has_nothing_to_park():
    batch = scheduler()
    coming = sequence("a", list(range(10)))
    incoming = batch.expect(coming, 10)
    assert incoming is not None and batch.accept(incoming, coming, 0)
    assert batch.park("a") is None
    assert (coming.block_table, coming.n_parked, batch.pool.n_free) == ([], 0, 100)
    batch.resume("a")
    assert shape(run(batch)) == [("a", 0, 10)]


def test_all_memory_is_given_away_and_everybody_comes_back_as_he_was():
    batch = scheduler()
    one, two = sequence("a", list(range(10))), sequence("b", list(range(50, 80)))
    batch.add(one)
    batch.add(two)
    run(batch)
    computed = (one.n_computed, two.n_computed)
    assert computed == (10, 6)
    moves = batch.yield_all()
    assert [(move.sequence, len(move.blocks)) for move in moves] == [(one, 3), (two, 2)]
    assert (batch.pool.n_empty, batch.pool.n_cached, batch.n_running) == (100, 0, 0)
    plan = run(batch)
    assert shape(plan) == [("a", 10, 1), ("b", 6, 15)]
    assert [type(move) for move in plan.moves] == [Unpark, Unpark]


def test_blocks_that_a_newcomer_shares_with_its_victim_are_no_room_for_it():
    batch = scheduler(n_blocks=5)
    text = list(range(12))
    batch.add(sequence("low", [*text, 50, 51]))  # 4 of 5 blocks
    batch.add(sequence("other", [60, 61], priority=1))
    run(batch)
    assert batch.pool.n_free == 0
    batch.add(sequence("high", [*text, 70, 71, 72, 73, 74, 75, 76], priority=1))  # 3 are shared, 2 are not
    assert not run(batch).preempted


def test_who_is_on_his_way_has_a_place():
    batch = scheduler(max_running=1)
    incoming = batch.expect(sequence("a", [1, 2, 3]), 3)
    assert incoming is not None
    batch.add(sequence("b", [4, 5, 6]))
    assert not run(batch).chunks
    batch.refuse(incoming)
    assert shape(run(batch)) == [("b", 0, 3)]


def test_who_arrives_with_fewer_tokens_than_were_awaited_gives_blocks_back():
    batch = scheduler()
    coming = sequence("a", list(range(10)))
    incoming = batch.expect(coming, 16)
    assert incoming is not None and batch.extend(incoming, 16)
    assert batch.accept(incoming, coming, 9)
    assert (len(coming.block_table), batch.pool.n_used, batch.pool.n_free) == (3, 3, 97)


def test_what_was_there_of_a_sequence_that_does_not_come_is_found_by_the_next_one_that_begins_so():
    batch = scheduler(n_blocks=10)
    known = sequence("a", list(range(1, 13)))
    incoming = batch.expect(known, 12)
    assert incoming is not None and batch.extend(incoming, 12)
    known.n_computed = 9  # of three blocks, two are full
    batch.refuse(incoming, known)
    assert (batch.pool.n_free, batch.pool.n_cached, batch.pool.n_reserved) == (10, 2, 0)
    batch.add(sequence("a", [*range(1, 13), 50]))
    assert shape(run(batch)) == [("a", 8, 5)]
    unknown = batch.expect(sequence("b", [9] * 8), 8)
    assert unknown is not None and batch.extend(unknown, 8)
    batch.refuse(unknown)
    assert batch.pool.n_cached == 0
