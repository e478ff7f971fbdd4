"""The event heap and the virtual clock around the live controller.

Every decision is the live :class:`Controller`'s. "Load bytes" and "serve a request" are cost models: a load takes what the
controller estimates, and leaves the checkpoint in host memory, which is never full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision, Dispatch, Load, Refuse, Unload, WakeAt
from sllmdask.policy.estimate import load_seconds
from sllmdask.policy.views import Tier


@dataclass(frozen=True)
class Costs:
    """Seconds that the real mechanisms would take."""

    #: Seconds of one request once it runs, by request id.
    service_s: Callable[[str], float]
    unload_s: float = 0.01


@dataclass
class Outcome:
    """What happened to each request, in virtual seconds, and every decision with its time."""

    dispatched_at: dict[str, float] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refuse] = field(default_factory=dict)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


def simulate(
    controller: Controller,
    arrivals: Iterable[ev.Event],
    costs: Costs,
    *,
    check: Callable[[Controller], None] | None = None,
) -> Outcome:
    """Feed `arrivals` and all that follows from them to `controller` until nothing is left to happen.

    `check` is called after every event, for invariants.
    """
    order = count()
    heap: list[tuple[float, int, ev.Event]] = []
    outcome = Outcome()
    wake_at: float | None = None

    def push(event: ev.Event) -> None:
        heappush(heap, (event.at, next(order), event))

    n_reports: Counter[str] = Counter()
    resident: dict[str, Mapping[str, Tier]] = {}
    for event in arrivals:
        push(event)
    while heap:
        now, _, event = heappop(heap)
        if isinstance(event, ev.TimerFired) and event.at != wake_at:
            continue
        if isinstance(event, ev.RequestEnded):
            outcome.ended_at[event.request] = now
        for decision in controller.handle(event):
            outcome.decisions.append((now, decision))
            match decision:
                case Load(instance=instance, model=model, worker=worker):
                    view = controller.workers[worker]
                    seconds = load_seconds(controller.models[model], view)
                    checkpoint = controller.models[model].checkpoint_key
                    push(ev.LoadFinished(now + seconds, instance, view.residency.get(checkpoint, Tier.REMOTE)))
                    n_reports[worker] += 1
                    resident[worker] = {**resident.get(worker, view.residency), checkpoint: Tier.HOST}
                    account = resident[worker], view.bytes_per_s, view.overhead_s
                    push(ev.WorkerReported(now + seconds, worker, n_reports[worker], *account))
                case Unload(instance=instance):
                    push(ev.UnloadFinished(now + costs.unload_s, instance))
                case Dispatch(request=request):
                    outcome.dispatched_at[request] = now
                    push(ev.RequestEnded(now + costs.service_s(request), request))
                case Refuse(request=request):
                    outcome.refused[request] = decision
                case WakeAt(at=at):
                    wake_at = at
                    if at is not None:
                        push(ev.TimerFired(at))
        if check:
            check(controller)
    return outcome
