"""Requests that leave where they run: of a node that is drained, and of an instance that its model does not need any more.

They go to other instances of their model that have room. A drained node's models get an instance elsewhere if they have none;
what can go nowhere ends where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sllmdask.policy.autoscaler import LIMITED, SCALED_DOWN, Autoscaler
from sllmdask.policy.backoff import BackOff
from sllmdask.policy.choosers import Chooser
from sllmdask.policy.claims import Claims
from sllmdask.policy.decisions import Chose, Decision, Move
from sllmdask.policy.dispatch import least_requests, takes_requests
from sllmdask.policy.fleet import NODE_DRAINED, Fleet
from sllmdask.policy.move_times import N_MOVES_AT_ONCE
from sllmdask.policy.options import WayFinder
from sllmdask.policy.queue import RequestQueue
from sllmdask.policy.records import Ways, choice
from sllmdask.policy.state import ClusterState
from sllmdask.policy.timers import Timers
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView

#: Seconds before a request that stayed is tried again, from the first time to the longest.
RETRY_S = (0.25, 8.0)
#: Why instances take no more requests that are moved away from them. Others end where they are: the weights of their model are
#: not the same any more, an operator moves them himself, or is content to wait.
_MOVES = frozenset({NODE_DRAINED, SCALED_DOWN, LIMITED})
#: Nodes that are named where nothing could be loaded.
_N_NAMED = 4


@dataclass(frozen=True)
class _Stayed:
    """A request that could not move the last time."""

    n_times: int
    again_at: float
    reason: str


class Drainer:
    """What becomes of nodes that are drained, and the moves of requests off them and off instances that leave."""

    def __init__(
        self,
        state: ClusterState,
        queue: RequestQueue,
        claims: Claims,
        back_off: BackOff,
        finder: WayFinder,
        fleet: Fleet,
        autoscaler: Autoscaler,
        timers: Timers,
        choose: Chooser,
        *,
        max_requests: int,
        can_move: bool,
    ) -> None:
        self._state, self._queue, self._claims, self._back_off = state, queue, claims, back_off
        self._finder, self._fleet, self._autoscaler, self._timers = finder, fleet, autoscaler, timers
        self._choose = choose
        self._max_requests, self._can_move = max_requests, can_move
        #: Where requests are on their way to, by request.
        self._moving: dict[str, str] = {}
        self._stayed: dict[str, _Stayed] = {}
        #: Why a model of drained nodes gets no instance elsewhere; empty: it has one, or one is on its way.
        self._why: dict[str, str] = {}

    # --- nodes ---

    def drain(self, address: str, cause: str, at: float) -> None:
        """The worker takes nothing new, and what it has leaves."""
        worker = self._state.workers.get(address)
        if worker is None:
            return
        self._state.put_worker(replace(worker, draining=cause))
        for instance in self._state.on_worker(address):
            # What leaves for another reason has others to see to it.
            if instance.draining in ("", SCALED_DOWN):
                self._fleet.drain(instance, NODE_DRAINED, at)

    def undrain(self, address: str, at: float) -> None:
        """The worker stays, with what it still has."""
        worker = self._state.workers.get(address)
        if worker is None or not worker.draining:
            return
        self._state.put_worker(replace(worker, draining=""))
        self._state.touch_worker(address)
        for instance in self._state.on_worker(address):
            model = self._state.models.get(instance.model)
            if instance.draining == NODE_DRAINED and instance.state is InstanceState.READY and model is not None:
                self._fleet.reopen(instance)
                self._autoscaler.limit(model, at)

    def why(self, instance: InstanceView) -> str:
        """Why requests of an instance on a drained node do not move now; empty: they do, or are about to."""
        if instance.model in self._why:
            return self._why[instance.model]
        stayed = (self._stayed.get(each.id) for each in self._queue.on_instance(instance.id))
        return next((each.reason for each in stayed if each is not None), "")

    # --- instances elsewhere ---

    def load_elsewhere(self, at: float) -> list[Decision]:
        """Begin instances for what drained nodes give away, before their idle ones leave and what waits is placed."""
        leaving: dict[str, list[InstanceView]] = {}
        for instance in [self._state.instances[each] for each in self._state.draining]:
            if instance.draining == NODE_DRAINED and instance.state is InstanceState.READY:
                leaving.setdefault(instance.model, []).append(instance)
        for name in self._why.keys() - leaving.keys():
            del self._why[name]
        decisions: list[Decision] = []
        for name, instances in leaving.items():
            # Of what nothing has changed, nothing new would be found.
            if name in self._why and name not in self._state.changed_models and not self._state.any_gained:
                continue
            model = self._state.models.get(name)
            if model is not None:
                decisions += self._load_elsewhere(model, instances, at)
        return decisions

    def _load_elsewhere(self, model: ModelView, leaving: Sequence[InstanceView], at: float) -> list[Decision]:
        n_leaving = sum(self._may_go(each) for instance in leaving for each in self._queue.on_instance(instance.id))
        n_leaving = n_leaving if self._can_move else 0
        needed = max(model.min_instances, int(n_leaving > 0))
        decisions: list[Decision] = []
        self._why.pop(model.name, None)
        while True:
            living = self._state.living(model.name)
            n_places = sum(max(0, self._max_requests - each.n_expected) for each in living)
            if len(living) >= needed and n_places >= n_leaving:
                return decisions
            if len(living) >= model.max_instances:
                self._why[model.name] = f"its other instances are full, and max_instances is {model.max_instances}"
                return decisions
            ways = self._finder.of_nobody(model, at, may_evict=True)
            chosen = self._choose(ways.open)
            if chosen is None:
                self._why[model.name] = self._nowhere(ways)
                again_at = self._back_off.ends_at(model.name, at)
                if again_at is not None:
                    self._timers.set(again_at, "drain", model.name)
                return decisions
            nodes = sorted({self._state.workers[each.worker].name for each in leaving})
            record = choice("", model.name, chosen, ways, f"node {', '.join(nodes)} is drained", at)
            decisions += [Chose(record), *self._fleet.begin(model, chosen, ways, at)[1]]

    def _nowhere(self, ways: Ways) -> str:
        """Why a model cannot be loaded on another node, in a few words."""
        reasons = {
            self._state.workers[address].name: reason
            for address, reason in ways.unfit.items()
            if address in self._state.workers and not self._state.workers[address].draining
        }
        named = [f"node {name}: {reasons[name]}" for name in sorted(reasons)[:_N_NAMED]]
        if not named:
            return "no other node is connected, or all are being drained"
        return f"no other node has room ({'; '.join(named)})"

    # --- requests ---

    def move(self, at: float) -> list[Decision]:
        """Begin the moves for which there is room now."""
        decisions: list[Decision] = []
        for instance_id in list(self._state.draining) if self._can_move else ():
            instance = self._state.instances[instance_id]
            ready = instance.state is InstanceState.READY and not instance.successor
            if instance.draining in _MOVES and ready and instance.n_requests:
                decisions += self._move_off(instance, at)
        return decisions

    def _move_off(self, instance: InstanceView, at: float) -> list[Decision]:
        mine = self._queue.on_instance(instance.id)
        n_places = N_MOVES_AT_ONCE - sum(each.id in self._moving for each in mine)
        decisions: list[Decision] = []
        for request in mine:
            if n_places <= len(decisions):
                break
            stayed = self._stayed.get(request.id)
            if request.id in self._moving or not self._may_go(request) or (stayed is not None and at < stayed.again_at):
                continue
            target = least_requests(
                each
                for each in self._state.living(instance.model)
                if takes_requests(each, self._max_requests) and not self._claims.closed(each.id, request)
            )
            if target is None:
                break
            self._moving[request.id] = target.id
            self._state.put_instance(replace(target, n_arriving=target.n_arriving + 1, idle_since=None))
            ends = (instance.id, instance.worker, target.id, target.worker)
            decisions.append(Move(request.id, request.model, *ends, instance.draining))
        return decisions

    @staticmethod
    def _may_go(request: RequestView) -> bool:
        return not request.load_only

    def stayed(self, request_id: str, reason: str, at: float) -> None:
        """It could not move: it is tried again, later each time."""
        if request_id not in self._moving:
            return
        self._arrives_no_more(request_id, at)
        n_times = self._stayed[request_id].n_times + 1 if request_id in self._stayed else 1
        first_s, longest_s = RETRY_S
        again_at = at + min(longest_s, first_s * 2 ** (n_times - 1))
        self._stayed[request_id] = _Stayed(n_times, again_at, reason)
        self._timers.set(again_at, "move", request_id)

    def gone(self, request_id: str, at: float) -> None:
        """A request has moved, has ended, or waits again."""
        self._arrives_no_more(request_id, at)
        if self._stayed.pop(request_id, None) is not None:
            self._timers.cancel("move", request_id)

    def _arrives_no_more(self, request_id: str, at: float) -> None:
        target = self._state.instances.get(self._moving.pop(request_id, ""))
        if target is not None:
            n_arriving = target.n_arriving - 1
            idle_since = at if not n_arriving and not target.n_requests else target.idle_since
            self._state.put_instance(replace(target, n_arriving=n_arriving, idle_since=idle_since))
