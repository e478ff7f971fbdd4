"""Which instances leave a worker, and how, so that slots and memory come free there at the least cost.

Source: ServerlessLLM (OSDI '24), section 6, chooses by dynamic programming over the slots to free, and the cost of a set is the
sum of its victims' costs. Here the destinations' room counts too, which makes it a knapsack with assignment: branch and bound
over the victims, where the dynamic program, without some of what binds, is the bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, isfinite
from typing import NamedTuple

from sllmdask.policy.choice import Way

#: Nodes of the search after which the best set that was found is taken.
MAX_NODES = 5_000
#: Nodes that are looked at with the bound that is quicker to compute; most searches end before.
_EASY_NODES = 500
#: Parts into which missing bytes are divided for the bound.
_N_UNITS = 32
#: Steps of a dynamic program that are worth a bound that is better.
_MAX_TABLE = 50_000
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
    search = _Search(candidates, max(0, n_slots), max(0, nbytes), room, room_nbytes)
    exact = search.run(max_nodes)
    if not search.chosen:
        return None
    leaving = sorted(search.chosen, key=lambda each: each[0])
    costs_s = [leave.cost_s for _, leave in leaving]
    return VictimPlan(tuple((candidates[i].instance, leave) for i, leave in leaving), fsum(costs_s), max(costs_s), exact)


# --- the search ------------------------------------------------------------------------------------------------------

#: Victims, as places in the list of candidates, and how each leaves.
_Chosen = list[tuple[int, Leave]]


@dataclass(frozen=True)
class _Exit:
    """A leave; its cost in whole nanoseconds times more than there are candidates, plus one: of equal costs fewer are less."""

    leave: Leave
    weight: int
    #: Number of the destination; -1: none.
    destination: int


@dataclass(frozen=True)
class _Member:
    """A candidate that may be among the victims: `index` is its place, `frees` the bytes that come free with it.

    Those of a shared checkpoint come free with the last of its members, if the others leave too; `group` is their bit.
    """

    index: int
    n_slots: int
    exits: tuple[_Exit, ...]
    frees: int = 0
    group: int = 0


class _Node(NamedTuple):
    """Part of a set: who leaves of the members before the i-th. The last of them that does is `victim`, after `parent`."""

    i: int
    missing_slots: int
    missing_nbytes: int
    #: Free slots and bytes by destination.
    slots: tuple[int, ...]
    spaces: tuple[float, ...]
    #: Bits of the checkpoints of which a member stays.
    kept: int
    cost: int
    victim: tuple[int, Leave] | None
    parent: _Node | None

    def chosen(self) -> _Chosen:
        found: _Chosen = []
        node: _Node | None = self
        while node is not None and node.victim is not None:
            found.append(node.victim)
            node = node.parent
        return found


#: What the members from the i-th of a node on cost at least, if they free what is missing.
_Bound = Callable[[_Node], float]


class _Search:
    """Depth first, the most promising branch before the others; what cannot undercut the best set so far is left out."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        n_slots: int,
        nbytes: int,
        room: Mapping[str, int],
        room_nbytes: Mapping[str, int] | None,
    ) -> None:
        self._n_slots, self._nbytes = n_slots, nbytes
        # A set without a needless member has no more of them than this: each frees slots, or bytes.
        most = len(candidates) if nbytes else n_slots
        leaves = [_worthwhile(each, most, room, room_nbytes) for each in candidates]
        names = sorted({leave.destination for each in leaves for leave in each if leave.destination})
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        per_ns = len(candidates) + 1
        exits = [
            tuple(_Exit(leave, _nanoseconds(leave) * per_ns + 1, number[leave.destination]) for leave in each) for each in leaves
        ]
        self._members = _sharing(candidates, exits) if nbytes else _undominated(candidates, exits, n_slots)
        self._slots = tuple(room.get(name, 0) for name in names)
        self._spaces = tuple(inf if room_nbytes is None else room_nbytes.get(name, 0) for name in names)
        self._best: float = inf
        self.chosen: _Chosen = []

    def run(self, max_nodes: int) -> bool:
        """Look for the best set, :attr:`chosen`; whether it is certain that no other one costs less."""
        easy = min(_EASY_NODES, max_nodes)
        return self._run(self._loose_bound(), easy) or self._run(self._tight_bound(), max_nodes - easy)

    def _run(self, bound: _Bound, max_nodes: int) -> bool:
        #: The least that it has cost to come to a state, which is all that what comes after depends on.
        least: dict[tuple[object, ...], int] = {}
        n_nodes = 0
        root = _Node(0, self._n_slots, self._nbytes, self._slots, self._spaces, 0, 0, None, None)
        stack = [(bound(root), root)]
        while stack:
            at_least, node = stack.pop()
            if at_least >= self._best:
                continue
            if node.missing_slots <= 0 and node.missing_nbytes <= 0:
                self._best, self.chosen = node.cost, node.chosen()
                continue
            state = node[:6]
            if least.get(state, inf) <= node.cost:
                continue
            if n_nodes >= max_nodes:
                return False
            n_nodes += 1
            least[state] = node.cost
            branches = [(each.cost + bound(each), each) for each in self._branches(node)]
            # The last one is looked at first; of equally promising ones, that where who comes earlier leaves.
            branches.reverse()
            branches.sort(key=lambda each: -each[0])
            stack += branches
        return True

    def _branches(self, node: _Node) -> Iterator[_Node]:
        """The next member leaves by one of its exits, or it stays."""
        i, missing_slots, missing_nbytes, slots, spaces, kept, cost, victim, parent = node
        if i == len(self._members):
            return
        member = self._members[i]
        frees = 0 if kept & member.group else member.frees
        slots_after, nbytes_after = max(0, missing_slots - member.n_slots), max(0, missing_nbytes - frees)
        for each in member.exits:
            to, chosen = each.destination, (member.index, each.leave)
            if to < 0:
                yield _Node(i + 1, slots_after, nbytes_after, slots, spaces, kept, cost + each.weight, chosen, node)
            elif slots[to] >= member.n_slots and spaces[to] >= each.leave.nbytes:
                fewer = (*slots[:to], slots[to] - member.n_slots, *slots[to + 1 :])
                less = (*spaces[:to], spaces[to] - each.leave.nbytes, *spaces[to + 1 :])
                yield _Node(i + 1, slots_after, nbytes_after, fewer, less, kept, cost + each.weight, chosen, node)
        yield _Node(i + 1, missing_slots, missing_nbytes, slots, spaces, kept | member.group, cost, victim, parent)

    # --- bounds ---

    def _loose_bound(self) -> _Bound:
        """As if every destination had room, and as if slots and bytes were to be freed apart from each other."""
        cheapest = [min(each.weight for each in member.exits) for member in self._members]
        by_slots = _cover(self._n_slots, [(w, member.n_slots) for w, member in zip(cheapest, self._members, strict=True)])
        if not self._nbytes:
            return lambda node: by_slots[node.i][node.missing_slots]
        by_units = _cover(_N_UNITS, [(w, self._units(member.frees)) for w, member in zip(cheapest, self._members, strict=True)])
        return lambda node: max(by_slots[node.i][node.missing_slots], by_units[node.i][self._units(node.missing_nbytes)])

    def _tight_bound(self) -> _Bound:
        """As if the destinations' slots were all in one place; the loose one where that is much to compute, or binds nothing."""
        loose, n_free = self._loose_bound(), sum(self._slots)
        if len(self._members) * (self._n_slots + 1) * (n_free + 1) > _MAX_TABLE:
            return loose
        table = _cover_with_room(self._n_slots, n_free, self._members)
        return lambda node: max(loose(node), table[node.i][node.missing_slots][sum(node.slots)])

    def _units(self, nbytes: int) -> int:
        """How many parts of the missing bytes `nbytes` are, rounded up: then a set never frees less than it does."""
        return -(-nbytes * _N_UNITS // self._nbytes)


def _cover(missing: int, members: Sequence[tuple[int, int]]) -> list[list[float]]:
    """The least weight of (weight, size) members from the i-th on whose sizes add up to j: by i, then by j up to `missing`.

    Source: the 0/1 knapsack by dynamic programming, Bellman 1957, as a covering problem.
    """
    row = [0.0, *[inf] * missing]
    table = [row]
    for weight, size in reversed(members):
        row = [min(least, weight + row[max(0, j - size)]) for j, least in enumerate(row)]
        table.append(row)
    return table[::-1]


def _cover_with_room(missing: int, n_free: int, members: Sequence[_Member]) -> list[list[list[float]]]:
    """As :func:`_cover` of slots, where those that leave for a destination take at most r of `n_free` slots: by i, j, then r."""
    rows = [[0.0] * (n_free + 1), *([inf] * (n_free + 1) for _ in range(missing))]
    table = [rows]
    for member in reversed(members):
        size = member.n_slots
        here = min((each.weight for each in member.exits if each.destination < 0), default=inf)
        away = min((each.weight for each in member.exits if each.destination >= 0), default=inf)
        rows_before, rows = rows, [rows[0]]
        for j in range(1, missing + 1):
            without = rows_before[max(0, j - size)]
            row = [min(least, here + rest) for least, rest in zip(rows_before[j], without, strict=True)]
            row[size:] = [min(least, away + rest) for least, rest in zip(row[size:], without, strict=False)]
            rows.append(row)
        table.append(rows)
    return table[::-1]


# --- who takes part --------------------------------------------------------------------------------------------------


def _nanoseconds(leave: Leave) -> int:
    return round(leave.cost_s * _PER_S)


def _worthwhile(candidate: Candidate, most: int, room: Mapping[str, int], room_nbytes: Mapping[str, int] | None) -> list[Leave]:
    """Of a candidate's ways those that a cheapest set of `most` members could use, cheapest first.

    None that is dearer than one which takes room nowhere; and the `most` cheapest destinations, of which the other members can
    take away all but one.
    """
    possible = [leave for leave in candidate.leaves if isfinite(leave.cost_s) and leave.cost_s >= 0]
    kept: list[Leave] = []
    for leave in sorted(possible, key=lambda leave: (_nanoseconds(leave), _RANK[leave.way], leave.destination)):
        if not leave.destination:
            return [*kept, leave]
        space = inf if room_nbytes is None else room_nbytes.get(leave.destination, 0)
        if len(kept) < most and room.get(leave.destination, 0) >= candidate.n_slots and space >= leave.nbytes:
            kept.append(leave)
    return kept


def _undominated(candidates: Sequence[Candidate], exits: Sequence[tuple[_Exit, ...]], n_slots: int) -> list[_Member]:
    """Where only slots are missing: candidates, without those that are undercut by others of their size, which take no room
    anywhere and are so many that they free all `n_slots`."""
    cheap: dict[int, list[tuple[int, int]]] = defaultdict(list)
    sizes = [min(candidate.n_slots, n_slots) for candidate in candidates]
    for i, size in enumerate(sizes):
        cheap[size] += [(each.weight, i) for each in exits[i] if each.destination < 0]
    enough = {size: sorted(found)[: -(-n_slots // size)] for size, found in cheap.items() if size > 0}
    return [
        _Member(i, candidates[i].n_slots, exits[i])
        for i, size in enumerate(sizes)
        if size > 0 and exits[i] and (len(enough[size]) * size < n_slots or (exits[i][0].weight, i) <= enough[size][-1])
    ]


def _sharing(candidates: Sequence[Candidate], exits: Sequence[tuple[_Exit, ...]]) -> list[_Member]:
    """Where bytes are missing: candidates with the bytes that come free; none do where one of a checkpoint's cannot leave."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, candidate in enumerate(candidates):
        if candidate.checkpoint:
            places[candidate.checkpoint].append(i)
    bits = {key: 1 << bit for bit, key in enumerate(key for key, found in places.items() if len(found) > 1)}
    members = []
    for i, candidate in enumerate(candidates):
        sharing = places.get(candidate.checkpoint, [i])
        comes_free = i == sharing[-1] and all(exits[place] for place in sharing)
        frees = candidate.nbytes if comes_free else 0
        if exits[i]:
            members.append(_Member(i, candidate.n_slots, exits[i], frees, bits.get(candidate.checkpoint, 0)))
    return members
