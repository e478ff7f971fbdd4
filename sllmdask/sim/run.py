"""The live :class:`Controller` under a virtual clock.

Every decision is the controller's. What enacts it is a mechanism (``sim/effects.py``): decisions go in, and what comes of
them goes back to the controller as events, later. The scheduler plugin is the live mechanism around the same controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision, Dispatch, Refuse, WakeAt
from sllmdask.sim.clock import Appointment, Clock
from sllmdask.sim.effects import Costs, Estimated, Tell


class Effects(Protocol):
    """A mechanism: what follows from `decision` is told to the controller by events, at their time."""

    def enact(self, decision: Decision) -> None: ...


@dataclass
class Outcome:
    """What happened to each request, in virtual seconds, and every decision with its time.

    A request that is dispatched again, since it was preempted, keeps the time of the first dispatch.
    """

    dispatched_at: dict[str, float] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refuse] = field(default_factory=dict)
    refused_at: dict[str, float] = field(default_factory=dict)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


def simulate(
    controller: Controller,
    arrivals: Iterable[ev.Event],
    costs: Costs,
    *,
    check: Callable[[Controller], None] | None = None,
) -> Outcome:
    """:func:`run` with a mechanism whose loads and moves last exactly as long as the controller predicts."""
    return run(controller, arrivals, partial(Estimated, controller, costs), check=check)


def run(
    controller: Controller,
    arrivals: Iterable[ev.Event],
    mechanism: Callable[[Clock, Tell], Effects],
    *,
    check: Callable[[Controller], None] | None = None,
) -> Outcome:
    """Feed `arrivals`, and all that follows from them, to `controller` until nothing is left to happen.

    `mechanism` gets the clock and what it tells the controller with, which is for the time of the event, not sooner. `check`
    is called after every event, for invariants.
    """
    clock, outcome = Clock(), Outcome()
    timer: list[Appointment] = []

    def tell(event: ev.Event) -> Appointment:
        return clock.call_at(event.at, partial(handle, event))

    def handle(event: ev.Event) -> None:
        if isinstance(event, ev.RequestEnded):
            outcome.ended_at[event.request] = event.at
        for decision in controller.handle(event):
            outcome.decisions.append((event.at, decision))
            match decision:
                case WakeAt(at=at):
                    wake(at)
                case Dispatch(request=request):
                    outcome.dispatched_at.setdefault(request, event.at)
                case Refuse(request=request):
                    outcome.refused[request], outcome.refused_at[request] = decision, event.at
            effects.enact(decision)
        if check:
            check(controller)

    def wake(at: float | None) -> None:
        for old in timer:
            old.call_off()
        timer[:] = [] if at is None else [clock.call_at(at, lambda: handle(ev.TimerFired(at)))]

    effects = mechanism(clock, tell)
    for event in arrivals:
        tell(event)
    clock.run()
    return outcome
