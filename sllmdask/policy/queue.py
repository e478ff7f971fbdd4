"""Requests: those that wait, by class and then in order of arrival, and those that run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import replace

from sllmdask.policy.views import RequestView

#: Sort key of the queue: higher classes first, then first come first served.
Turn = tuple[int, float, str]
#: What one instance would satisfy: a model, and the node if it has to be there.
Demand = tuple[str, str]


def turn_of(request: RequestView) -> Turn:
    return -request.priority, request.arrived_at, request.id


def demand_of(request: RequestView) -> Demand:
    return request.model, request.node


class RequestQueue:
    """All requests that were admitted and have not ended. An operator's wish waits like a request, and is never dispatched."""

    def __init__(self) -> None:
        #: Waiting requests by id, in order of arrival.
        self.waiting: dict[str, RequestView] = {}
        #: Dispatched requests by id.
        self.running: dict[str, RequestView] = {}
        #: Requests that wait; what operators wish for takes nobody's place.
        self.n_queued = 0
        #: Requests by model, without wishes, and running ones by class.
        self.load: Counter[str] = Counter()
        #: Wishes that wait, by model.
        self.wishes: dict[str, dict[str, None]] = {}
        self.n_running: Counter[int] = Counter()
        self._turns: dict[Demand, list[Turn]] = {}
        #: The first of each demand, in order.
        self._heads: list[tuple[Turn, Demand]] = []
        self._demands_of: dict[str, dict[Demand, None]] = {}
        self._on_instance: dict[str, dict[str, None]] = {}
        self._of_door: dict[str, dict[str, None]] = {}

    # --- life of a request ---

    def add(self, request: RequestView) -> None:
        """It waits. One that has waited before takes its old place."""
        last = next(reversed(self.waiting.values()), None)
        self.waiting[request.id] = request
        if last is not None and last.arrived_at > request.arrived_at:
            self.waiting = dict(sorted(self.waiting.items(), key=lambda item: item[1].arrived_at))
        self._of_door.setdefault(request.front_door, {})[request.id] = None
        self._count(request, 1)
        if request.load_only:
            self.wishes.setdefault(request.model, {})[request.id] = None
        else:
            self.n_queued += 1
        demand = demand_of(request)
        turns = self._turns.setdefault(demand, [])
        if turns:
            self._heads.pop(bisect_left(self._heads, (turns[0], demand)))
        insort(turns, turn_of(request))
        insort(self._heads, (turns[0], demand))
        self._demands_of.setdefault(request.model, {})[demand] = None

    def dispatch(self, request: RequestView, instance_id: str, at: float) -> None:
        """It waits no more, and runs."""
        self._take(request)
        self.running[request.id] = replace(request, instance=instance_id, dispatched_at=at)
        self._on_instance.setdefault(instance_id, {})[request.id] = None
        self.n_running[request.priority] += 1

    def end(self, request_id: str) -> RequestView | None:
        """It neither waits nor runs; returns it as it was."""
        request = self.waiting.get(request_id)
        if request is not None:
            self._take(request)
        else:
            request = self.running.pop(request_id, None)
            if request is None:
                return None
            self.n_running[request.priority] -= 1
            self._forget_place(request)
        self._count(request, -1)
        door = self._of_door[request.front_door]
        del door[request_id]
        if not door:
            del self._of_door[request.front_door]
        return request

    def move(self, instance_id: str, successor: str) -> None:
        """All that run on an instance run on another one."""
        for request in self.on_instance(instance_id):
            self.rebind(request, successor)

    def rebind(self, request: RequestView, instance_id: str) -> None:
        """A running request runs on another instance."""
        self._forget_place(request)
        self.running[request.id] = replace(request, instance=instance_id)
        self._on_instance.setdefault(instance_id, {})[request.id] = None

    def count(self, request_id: str, n_tokens: int, at: float) -> None:
        """A running request has made `n_tokens` by now."""
        request = self.running.get(request_id)
        if request is not None and n_tokens > request.n_output:
            self.running[request_id] = replace(request, n_output=n_tokens, counted_at=at)

    def _take(self, request: RequestView) -> None:
        del self.waiting[request.id]
        if request.load_only:
            self.wishes[request.model].pop(request.id)
            if not self.wishes[request.model]:
                del self.wishes[request.model]
        else:
            self.n_queued -= 1
        demand = demand_of(request)
        turns = self._turns[demand]
        self._heads.pop(bisect_left(self._heads, (turns[0], demand)))
        turns.pop(bisect_left(turns, turn_of(request)))
        if turns:
            insort(self._heads, (turns[0], demand))
            return
        del self._turns[demand]
        del self._demands_of[request.model][demand]
        if not self._demands_of[request.model]:
            del self._demands_of[request.model]

    def _forget_place(self, request: RequestView) -> None:
        here = self._on_instance[request.instance or ""]
        del here[request.id]
        if not here:
            del self._on_instance[request.instance or ""]

    def _count(self, request: RequestView, n: int) -> None:
        if not request.load_only:
            self.load[request.model] += n
            if not self.load[request.model]:
                del self.load[request.model]

    # --- what the rules ask ---

    def n_waiting(self, demand: Demand) -> int:
        """How many wait for the same."""
        return len(self._turns.get(demand, ()))

    def head(self, demand: Demand) -> RequestView | None:
        """Whose turn it is of those who wait for the same."""
        turns = self._turns.get(demand)
        return self.waiting[turns[0][2]] if turns else None

    def turn(self, demand: Demand, n_before: int = 0) -> Turn:
        """That of the first of those who wait for the same, or of the one who has `n_before` before, or of the last."""
        turns = self._turns[demand]
        return turns[min(n_before, len(turns) - 1)]

    def members(self, demand: Demand) -> list[RequestView]:
        """All who wait for the same, in their turns."""
        return [self.waiting[request_id] for *_, request_id in self._turns.get(demand, ())]

    def demands_of(self, model: str) -> list[Demand]:
        return list(self._demands_of.get(model, ()))

    def in_turn(self) -> list[Demand]:
        """All that is waited for, in the turns of those who wait for it first."""
        return [demand for _, demand in self._heads]

    def of_model(self, model: str) -> list[str]:
        """All who wait for a model, in their turns."""
        demands = self.demands_of(model)
        turns = [turn for demand in demands for turn in self._turns[demand]]
        return [request_id for *_, request_id in (sorted(turns) if len(demands) > 1 else turns)]

    def n_waiting_of(self, model: str) -> int:
        """How many wait for a model, wherever it has to be."""
        return sum(len(self._turns[demand]) for demand in self._demands_of.get(model, ()))

    def waits(self, model: str) -> bool:
        return model in self._demands_of

    def on_instance(self, instance_id: str) -> list[RequestView]:
        return [self.running[each] for each in self._on_instance.get(instance_id, ())]

    def first_and_newest(self, instance_id: str) -> list[RequestView]:
        """Of those that run on an instance the one that was dispatched first, and last."""
        here = self._on_instance.get(instance_id)
        return [self.running[next(iter(here))], self.running[next(reversed(here))]] if here else []

    def of_door(self, front_door: str) -> list[str]:
        return list(self._of_door.get(front_door, ()))
