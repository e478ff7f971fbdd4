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
from sllmdask.sim.effects import Costs, Estimated


class Effects(Protocol):
    """A mechanism: what follows from `decision` is told to the controller by events, at their time."""

    def enact(self, decision: Decision) -> None: ...


@dataclass
class Outcome:
    """What happened to each request, in virtual seconds, and every decision with its time.

    A request that is dispatched again, since it was preempted, keeps its first dispatch.
    """

    dispatched_at: dict[str, float] = field(default_factory=dict)
    dispatches: dict[str, Dispatch] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Refuse] = field(default_factory=dict)
    refused_at: dict[str, float] = field(default_factory=dict)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


class Simulation:
    """The clock, and the controller that is told of every event at its time."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.clock = Clock()
        self.outcome = Outcome()
        self._effects: Effects | None = None
        self._check: Callable[[Controller], None] | None = None
        self._timer: Appointment | None = None

    def tell(self, event: ev.Event) -> Appointment:
        """The controller hears of `event` when it happens."""
        return self.clock.call_at(event.at, partial(self._handle, event))

    def run(
        self, arrivals: Iterable[ev.Event], effects: Effects, *, check: Callable[[Controller], None] | None = None
    ) -> Outcome:
        """Tell of `arrivals`, and let happen all that follows from them, until nothing is left.

        `check` is called after every event, for invariants and for progress.
        """
        self._effects, self._check = effects, check
        for event in arrivals:
            self.tell(event)
        self.clock.run()
        return self.outcome

    def _handle(self, event: ev.Event) -> None:
        assert self._effects is not None
        if isinstance(event, ev.RequestEnded):
            self.outcome.ended_at[event.request] = event.at
        for decision in self.controller.handle(event):
            self.outcome.decisions.append((event.at, decision))
            match decision:
                case WakeAt(at=at):
                    self._wake(at)
                case Dispatch(request=request):
                    self.outcome.dispatched_at.setdefault(request, event.at)
                    self.outcome.dispatches.setdefault(request, decision)
                case Refuse(request=request):
                    self.outcome.refused[request], self.outcome.refused_at[request] = decision, event.at
            self._effects.enact(decision)
        if self._check:
            self._check(self.controller)

    def _wake(self, at: float | None) -> None:
        if self._timer is not None:
            self._timer.call_off()
        self._timer = None if at is None else self.tell(ev.TimerFired(at))


def simulate(
    controller: Controller,
    arrivals: Iterable[ev.Event],
    costs: Costs,
    *,
    check: Callable[[Controller], None] | None = None,
) -> Outcome:
    """A simulation in which loads and moves last exactly as long as the controller predicts; `check` after every event."""
    simulation = Simulation(controller)
    effects = Estimated(controller, costs, simulation.clock, simulation.tell)
    return simulation.run(arrivals, effects, check=check)
