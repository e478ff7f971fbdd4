"""Which instances leave a worker, and how, so that slots and memory come free there at the least cost.

Source: ServerlessLLM (OSDI '24), section 6, chooses by dynamic programming over the slots to free, and the cost of a set is the
sum of its victims' costs. Here the destinations' room counts too, which makes it a knapsack with assignment: branch and bound
over the victims, where the dynamic program, without some of what binds, is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, isfinite

from sllmdask.policy.choice import Way

#: Nodes of the search, after which the best plan that was found is taken; about 5 us each.
MAX_NODES = 20_000
#: Nodes that are searched with the bound that costs least; most searches end before.
_EASY_NODES = 500
#: Parts into which missing bytes are divided for the bound.
_N_UNITS = 32
#: Costs are compared in whole nanoseconds: sums of them do not depend on their order.
_PER_S = 1_000_000_000

_RANK = {way: i for i, way in enumerate(Way)}


@dataclass(frozen=True)
class Leave:
    """One way in which an instance can leave, within `cost_s` seconds. With a `destination` it takes its slots there, and
    `nbytes` of its memory: none, where its checkpoint is pinned already."""

    way: Way
    cost_s: float
    destination: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class Candidate:
    """An instance that may leave, by any one of `leaves`: `n_slots` come free, and `nbytes` bytes of host memory.

    Where several have the same `checkpoint`, the bytes are free when all of them have left; 0 if others stay that pin it.
    """

    instance: str
    n_slots: int
    leaves: tuple[Leave, ...]
    nbytes: int = 0
    checkpoint: str = ""


@dataclass(frozen=True)
class VictimPlan:
    """Who leaves, and how. `cost_s` is the sum of their costs, `longest_s` the largest: they leave at the same time.

    `exact`: no other set costs less; otherwise the search was cut short, and this is the best that it had found.
    """

    leaving: tuple[tuple[str, Leave], ...]
    cost_s: float
    longest_s: float
    exact: bool


def cheapest_victims(
    candidates: Sequence[Candidate],
    n_slots: int,
    room: Mapping[str, int],
    *,
    nbytes: int = 0,
    room_nbytes: Mapping[str, int] | None = None,
    max_nodes: int = MAX_NODES,
) -> VictimPlan | None:
    """The cheapest of `candidates`, all of one worker, that free `n_slots` slots and `nbytes` bytes together.

    `room` has the free slots of each destination, `room_nbytes` its free bytes (``None``: there are enough everywhere); a
    destination that is not listed has none, and no two victims take the same. Of equally cheap sets a smaller one is taken,
    and of these one whose members come earlier in `candidates`. ``None``: there is no such set, or none that was found within
    `max_nodes` steps.
    """
    if n_slots <= 0 and nbytes <= 0:
        return VictimPlan((), 0.0, 0.0, True)
    problem = _Problem(candidates, max(0, n_slots), max(0, nbytes), room, room_nbytes)
    found = problem.search(problem.loose_bound(), min(_EASY_NODES, max_nodes), inf)
    if not found.exact and max_nodes > _EASY_NODES:
        better = problem.search(problem.tight_bound(), max_nodes - _EASY_NODES, found.cost)
        found = _Found(better.cost, better.chosen, better.exact) if better.chosen else _Found(found.cost, found.chosen, better.exact)
    if not found.chosen:
        return None
    leaving = tuple(sorted(found.chosen, key=lambda each: each[0]))
    costs_s = [leave.cost_s for _, leave in leaving]
    return VictimPlan(
        tuple((candidates[i].instance, leave) for i, leave in leaving), fsum(costs_s), max(costs_s), found.exact
    )


# --- the search ------------------------------------------------------------------------------------------------------

#: Slots and bytes that are missing, free slots by destination -> a cost that nothing undercuts, for candidates from the i-th on.
Bound = Callable[[int, int, int, tuple[int, ...]], float]
