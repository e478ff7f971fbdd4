"""Who leaves for k slots, against trying every set in every way."""

from __future__ import annotations

import random
from collections import Counter
from math import inf, nan

import pytest

from sllmdask.policy.choice import Way
from sllmdask.policy.victims import Candidate, Leave, VictimPlan, cheapest_victims


def evict(cost_s: float = 1.0) -> Leave:
    return Leave(Way.EVICT, cost_s)


def move(cost_s: float, destination: str, nbytes: int = 0) -> Leave:
    return Leave(Way.MIGRATE, cost_s, destination, nbytes)


def preempt(cost_s: float) -> Leave:
    return Leave(Way.PREEMPT, cost_s)


def one(name: str, *leaves: Leave, n_slots: int = 1, nbytes: int = 0, checkpoint: str = "") -> Candidate:
    return Candidate(name, n_slots, leaves, nbytes, checkpoint)


def who(plan: VictimPlan | None) -> list[tuple[str, str]]:
    assert plan is not None
    return [(instance, leave.destination or str(leave.way)) for instance, leave in plan.leaving]


# --- the oracle ---


def is_feasible(candidates, chosen, n_slots, room, nbytes, room_nbytes) -> bool:
    """`chosen` has a leave or ``None`` for each candidate."""
    freed_slots, freed_nbytes, groups = 0, 0, {}
    slots, taken = Counter(), Counter()
    for each, leave in zip(candidates, chosen, strict=True):
        groups.setdefault(each.checkpoint or each.instance, []).append((each.nbytes, leave))
        if leave is not None:
            freed_slots += each.n_slots
            if leave.destination:
                slots[leave.destination] += each.n_slots
                taken[leave.destination] += leave.nbytes
    freed_nbytes = sum(members[-1][0] for members in groups.values() if all(leave is not None for _, leave in members))
    if freed_slots < n_slots or freed_nbytes < nbytes:
        return False
    enough = room_nbytes is None or all(taken[name] <= room_nbytes.get(name, 0) for name in slots)
    return enough and all(slots[name] <= room.get(name, 0) for name in slots)


def brute_force(candidates, n_slots, room, nbytes, room_nbytes) -> tuple[float, int] | None:
    """The least (cost, number of victims) of all sets in all ways; ``None``: none is feasible."""
    best = None

    def go(chosen):
        nonlocal best
        if len(chosen) < len(candidates):
            for leave in (None, *candidates[len(chosen)].leaves):
                go([*chosen, leave])
        elif is_feasible(candidates, chosen, n_slots, room, nbytes, room_nbytes):
            costs_s = [leave.cost_s for leave in chosen if leave]
            found = round(sum(costs_s), 6), len(costs_s)
            best = found if best is None else min(best, found)

    go([])
    return best


def a_case(rng: random.Random, n_candidates: int, n_destinations: int, *, bytes_count: bool):
    """A worker with candidates of one to four slots; costs are from few values, so that ties are frequent."""
    names = [f"tcp://{i}" for i in range(n_destinations)]
    cost = lambda: rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, round(rng.uniform(0, 4), 3)])  # noqa: E731
    candidates = []
    for i in range(n_candidates):
        leaves = [move(cost(), name, rng.randint(0, 3)) for name in names if rng.random() < 0.5]
        leaves += [evict(cost())] if rng.random() < 0.3 else []
        leaves += [preempt(4 * cost())] if rng.random() < 0.2 else []
        rng.shuffle(leaves)
        checkpoint = rng.choice(["", "", "x", "y"])
        nbytes = {"x": 2, "y": 3}.get(checkpoint, rng.randint(0, 4))
        candidates.append(Candidate(f"i{i}", rng.randint(1, 4), tuple(leaves), nbytes, checkpoint))
    room = {name: rng.randint(0, 5) for name in names if rng.random() < 0.9}
    n_slots = rng.randint(1, 6)
    if not bytes_count:
        return candidates, n_slots, room, 0, None
    room_nbytes = {name: rng.randint(0, 4) for name in names} if rng.random() < 0.8 else None
    return candidates, rng.randint(0, 6), room, rng.randint(0, 8), room_nbytes


def check(case, plan) -> None:
    candidates, n_slots, room, nbytes, room_nbytes = case
    leaves = dict(plan.leaving)
    assert len(leaves) == len(plan.leaving)
    chosen = [leaves.get(each.instance) for each in candidates]
    assert all(leave is None or leave in each.leaves for each, leave in zip(candidates, chosen, strict=True))
    assert is_feasible(candidates, chosen, n_slots, room, nbytes, room_nbytes)
    assert plan.cost_s == pytest.approx(sum(leave.cost_s for leave in leaves.values()))
    assert plan.longest_s == max((leave.cost_s for leave in leaves.values()), default=0.0)


def solve(case, **options) -> VictimPlan | None:
    candidates, n_slots, room, nbytes, room_nbytes = case
    return cheapest_victims(candidates, n_slots, room, nbytes=nbytes, room_nbytes=room_nbytes, **options)


@pytest.mark.parametrize("bytes_count", [False, True], ids=["slots", "slots and bytes"])
@pytest.mark.parametrize("block", range(10))
def test_no_other_set_of_victims_costs_less_and_none_is_named_where_none_is_feasible(block, bytes_count):
    n_plans = 0
    for seed in range(40 * block, 40 * block + 40):
        rng = random.Random(seed)
        case = a_case(rng, rng.randint(1, 5), rng.randint(0, 3), bytes_count=bytes_count)
        wanted, plan = brute_force(*case), solve(case)
        if wanted is None:
            assert plan is None, seed
            continue
        assert plan is not None, seed
        assert plan.exact
        check(case, plan)
        assert (plan.cost_s, len(plan.leaving)) == (pytest.approx(wanted[0], abs=1e-6), wanted[1]), seed
        n_plans += bool(plan.leaving)
    assert n_plans > 5


@pytest.mark.parametrize("seed", range(10))
def test_of_64_candidates_the_cheapest_are_found_where_one_destination_is_short_of_room(seed):
    """The oracle is a table of slots that are free and of slots that are taken at the destination."""
    rng = random.Random(seed)
    n_slots, n_room = rng.randint(4, 12), rng.randint(1, 6)
    candidates = [
        Candidate(
            f"i{i}",
            rng.randint(1, 3),
            (move(rng.uniform(0.5, 3.0), "b"), *([preempt(rng.uniform(3.0, 30.0))] if rng.random() < 0.5 else [])),
        )
        for i in range(64)
    ]
    table = {(0, 0): 0.0}
    for each in candidates:
        for (freed, taken), cost_s in list(table.items()):
            for leave in each.leaves:
                state = min(n_slots, freed + each.n_slots), taken + (each.n_slots if leave.destination else 0)
                if state[1] <= n_room:
                    table[state] = min(table.get(state, inf), cost_s + leave.cost_s)
    plan = cheapest_victims(candidates, n_slots, {"b": n_room})
    assert plan is not None
    assert plan.exact
    check((candidates, n_slots, {"b": n_room}, 0, None), plan)
    assert plan.cost_s == pytest.approx(min(cost_s for (freed, _), cost_s in table.items() if freed >= n_slots))


# --- cases that ServerlessLLM's own search fails, or leaves open ---


def test_two_slots_come_from_two_small_victims_from_one_of_two_or_from_a_larger_one_whichever_is_cheapest():
    small = [one("a", evict(1.0)), one("b", evict(1.2))]
    two, four = one("c", evict(2.5), n_slots=2), one("d", evict(2.4), n_slots=4)
    assert who(cheapest_victims([*small, two, four], 2, {})) == [("a", "evict"), ("b", "evict")]
    assert who(cheapest_victims([small[0], two, four], 2, {})) == [("d", "evict")]
    assert who(cheapest_victims([four], 2, {})) == [("d", "evict")]


def test_nothing_short_is_nobody_leaving():
    assert cheapest_victims([one("a", evict())], 0, {}) == VictimPlan((), 0.0, 0.0, True)


def test_two_victims_do_not_take_the_same_slots():
    pair = [one("a", move(1.0, "x"), move(5.0, "y")), one("b", move(1.1, "x"), move(9.0, "y"))]
    plan = cheapest_victims(pair, 2, {"x": 1, "y": 1})
    assert who(plan) == [("a", "y"), ("b", "x")]
    assert (plan.cost_s, plan.longest_s) == (pytest.approx(6.1), 5.0)
    assert cheapest_victims(pair, 2, {"x": 1}) is None
    assert who(cheapest_victims(pair, 2, {"x": 2})) == [("a", "x"), ("b", "x")]


def test_a_destination_needs_the_slots_of_the_victim_and_not_those_that_are_missing():
    large = one("a", move(1.0, "x"), n_slots=4)
    assert cheapest_victims([large], 1, {"x": 3}) is None
    assert who(cheapest_victims([large], 1, {"x": 4})) == [("a", "x")]


def test_a_destination_without_memory_is_none():
    case = [one("a", move(1.0, "x", nbytes=5), move(2.0, "y", nbytes=5))]
    assert who(cheapest_victims(case, 1, {"x": 1, "y": 1}, room_nbytes={"x": 4, "y": 5})) == [("a", "y")]
    assert cheapest_victims(case, 1, {"x": 1, "y": 1}, room_nbytes={"x": 4}) is None


def test_two_victims_do_not_take_the_same_memory():
    pair = [one(name, move(1.0, "x", nbytes=3), preempt(9.0)) for name in "ab"]
    assert who(cheapest_victims(pair, 2, {"x": 2}, room_nbytes={"x": 6})) == [("a", "x"), ("b", "x")]
    assert who(cheapest_victims(pair, 2, {"x": 2}, room_nbytes={"x": 5})) == [("a", "x"), ("b", "preempt")]


def test_the_bytes_of_a_checkpoint_come_free_with_the_last_instance_of_it():
    shared = [one(name, evict(1.0), nbytes=10, checkpoint="c") for name in "ab"]
    alone = one("d", evict(1.5), nbytes=10, checkpoint="d")
    assert who(cheapest_victims([*shared, alone], 1, {}, nbytes=10)) == [("d", "evict")]
    assert who(cheapest_victims(shared, 1, {}, nbytes=10)) == [("a", "evict"), ("b", "evict")]
    assert cheapest_victims([shared[0], one("b", nbytes=10, checkpoint="c")], 1, {}, nbytes=10) is None


def test_a_victim_that_costs_nothing_still_stays_where_it_is_not_needed():
    free = [one(name, evict(0.0)) for name in "abc"]
    assert who(cheapest_victims([*free, one("d", evict(0.0), n_slots=2)], 2, {})) == [("d", "evict")]


def test_of_equally_cheap_victims_those_named_first_leave():
    equal = [one(name, evict(1.0)) for name in "cab"]
    assert who(cheapest_victims(equal, 2, {})) == [("c", "evict"), ("a", "evict")]
    assert who(cheapest_victims(equal[::-1], 2, {})) == [("b", "evict"), ("a", "evict")]


def test_of_equally_cheap_ways_the_one_that_disturbs_fewer_is_taken():
    assert who(cheapest_victims([one("a", preempt(1.0), move(1.0, "y"), move(1.0, "x"))], 1, {"x": 1, "y": 1})) == [("a", "x")]
    assert who(cheapest_victims([one("a", preempt(1.0), move(1.0, "x"), evict(1.0))], 1, {"x": 1})) == [("a", "evict")]


@pytest.mark.parametrize("cost_s", [inf, nan, -1.0])
def test_a_way_without_a_cost_is_no_way(cost_s):
    assert cheapest_victims([one("a", evict(cost_s))], 1, {}) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_ways_and_of_destinations_makes_no_difference(seed):
    rng = random.Random(seed)
    candidates, n_slots, room, nbytes, room_nbytes = a_case(rng, 12, 4, bytes_count=seed % 2 == 0)
    shuffled = [
        Candidate(each.instance, each.n_slots, tuple(rng.sample(each.leaves, len(each.leaves))), each.nbytes, each.checkpoint)
        for each in candidates
    ]
    other_room = dict(rng.sample(sorted(room.items()), len(room)))
    assert solve((candidates, n_slots, room, nbytes, room_nbytes)) == solve((shuffled, n_slots, other_room, nbytes, room_nbytes))


def test_a_search_that_is_cut_short_tells_so_and_what_it_found_is_feasible():
    n_cut = 0
    for seed in range(8):
        rng = random.Random(seed)
        candidates, _, room, _, room_nbytes = a_case(rng, 24, 5, bytes_count=True)
        case = candidates, 8, room, 20, room_nbytes
        whole = solve(case)
        for max_nodes in (0, 5, 30, 100, 400):
            plan = solve(case, max_nodes=max_nodes)
            if plan is None:
                continue
            check(case, plan)
            n_cut += not plan.exact
            if whole is not None and plan.exact:
                assert plan.cost_s == pytest.approx(whole.cost_s)
            elif whole is not None and whole.exact:
                assert plan.cost_s >= whole.cost_s - 1e-6
    assert n_cut > 0
