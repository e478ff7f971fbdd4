"""A cluster that does what the controller decides, in virtual time, and in which things go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from random import Random

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision, Dispatch, Load, Migrate, Move, Preempt, Refuse, ReportLoaded, Unload, WakeAt
from sllmdask.policy.views import InstanceState, Tier, WorkerView


@dataclass
class Outcome:
    ended: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refuse] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)
    dispatched: dict[str, float] = field(default_factory=dict)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


class Imagined:
    """`p_fault`: the share of loads, and of moves, that fail. Workers that leave come back after a while, empty."""

    def __init__(self, controller: Controller, rng: Random, *, p_fault: float = 0.0, service_s: float = 1.0) -> None:
        self.controller, self.rng, self.p_fault, self.service_s = controller, rng, p_fault, service_s
        self.outcome = Outcome()
        self._order = count()
        self._heap: list[tuple[float, int, ev.Event]] = []
        self._serving: dict[str, ev.RequestEnded] = {}
        #: All ends that follow from a dispatch, by identity; others are clients who leave.
        self._ends: dict[int, ev.RequestEnded] = {}
        self._wake_at: float | None = None

    def push(self, event: ev.Event) -> None:
        heappush(self._heap, (event.at, next(self._order), event))

    def run(self, events: Iterable[ev.Event], check: Callable[[Controller, ev.Event], None]) -> Outcome:
        for event in events:
            self.push(event)
        while self._heap:
            now, _, event = heappop(self._heap)
            if isinstance(event, ev.TimerFired) and event.at != self._wake_at:
                continue
            if id(event) in self._ends and self._serving.get(event.request) is not event:
                continue  # it was sent back, or cut off, before
            if isinstance(event, ev.WorkerLeft):
                view = self.controller.workers.get(event.address)
                if view is None:
                    continue
                self.push(ev.WorkerJoined(now + self.rng.uniform(0.1, 5.0), replace(view, version=0)))
                gone = [each for each in self.controller.instances.values() if each.worker == event.address]
                self._cut({each.id for each in gone}, now)
            if isinstance(event, ev.RequestMoved):
                there = self.controller.instances.get(event.instance)
                if there is None or there.state is not InstanceState.READY or event.request not in self._serving:
                    event = ev.RequestStayed(now, event.request, "nobody takes it there")
            if isinstance(event, ev.LoadFailed | ev.InstanceLost):
                self._cut({event.instance}, now)
            if isinstance(event, ev.RequestEnded):
                self._serving.pop(event.request, None)
                self.outcome.ended[event.request] = now
            for decision in self.controller.handle(event):
                self.outcome.decisions.append((now, decision))
                self._enact(decision, now)
            check(self.controller, event)
        return self.outcome

    def _cut(self, instances: set[str], now: float) -> None:
        """The streams of their requests break; the front doors send them back."""
        for request in list(self.controller.running.values()):
            if request.instance in instances and self._serving.pop(request.id, None):
                self.push(ev.RequestReturned(now + 0.01, request.id))

    def _enact(self, decision: Decision, now: float) -> None:
        fails = self.rng.random() < self.p_fault
        match decision:
            case Load(instance=instance, worker=worker, ready_in_s=ready_in_s):
                assert not self.controller.workers[worker].draining
                done_at = now + max(0.01, ready_in_s * self.rng.uniform(0.8, 1.3))
                self.push(ev.LoadFailed(done_at, instance, "no") if fails else ev.LoadFinished(done_at, instance, Tier.DISK))
            case Unload(instance=instance):
                self.push(ev.UnloadFinished(now + 0.01, instance))
            case Migrate(instance=instance, successor=successor, moved_in_s=moved_in_s):
                done_at = now + moved_in_s
                failed = ev.MigrationFailed(done_at, instance, successor, "no")
                self.push(failed if fails else ev.InstanceMigrated(done_at, instance, successor, Tier.HOST))
            case Move(request=request, instance=source, successor=successor, destination=destination):
                assert self.controller.running[request].instance == source != successor
                assert not self.controller.workers[destination].draining
                moved = ev.RequestMoved(now + 0.02, request, successor)
                self.push(ev.RequestStayed(now + 0.02, request, "no") if fails else moved)
            case Preempt(requests=requests):
                assert requests
                for request in requests:
                    assert self._serving.pop(request, None), f"{request} does not run"
                    self.push(ev.RequestReturned(now + 0.01, request))
            case Dispatch(request=request, instance=instance, worker=worker):
                assert not self.controller.workers[worker].draining
                assert self.controller.instances[instance].state is InstanceState.READY
                self.outcome.dispatched.setdefault(request, now)
                end = ev.RequestEnded(now + self.rng.expovariate(1 / self.service_s), request)
                self._serving[request] = end
                self._ends[id(end)] = end
                self.push(end)
            case ReportLoaded(request=request):
                self.outcome.reported.add(request)
            case Refuse(request=request):
                self.outcome.refused[request] = decision
            case WakeAt(at=at):
                self._wake_at = at
                if at is not None:
                    self.push(ev.TimerFired(at))
            case _:
                pass


def check_invariants(controller: Controller) -> None:
    """Slots and memory are never oversold, counts agree with the requests, nobody is in two places."""
    by_node: dict[str, list[WorkerView]] = {}
    for worker in controller.workers.values():
        by_node.setdefault(worker.node or worker.address, []).append(worker)
        there = [
            each
            for each in controller.instances.values()
            if each.worker == worker.address and each.state is not InstanceState.PLANNED
        ]
        assert sum(each.n_slots for each in there) <= worker.slots
    for mates in by_node.values():
        addresses = {worker.address for worker in mates}
        pinned = {
            each.checkpoint: each.nbytes
            for each in controller.instances.values()
            if each.worker in addresses and each.state is not InstanceState.PLANNED
        }
        assert sum(pinned.values()) <= max(worker.host_capacity for worker in mates)
    for instance in controller.instances.values():
        n_running = sum(request.instance == instance.id for request in controller.running.values())
        assert n_running == instance.n_requests
        assert instance.state is InstanceState.READY or n_running == 0
        assert n_running + instance.n_arriving <= controller.settings.max_requests
        assert instance.n_arriving >= 0
    assert not set(controller.waiting) & set(controller.running)
