"""How long it takes to read a checkpoint from one tier of one node, and what loads that read at once do to each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

from sllmdask.sim.clock import Appointment, Clock

#: ``turns``: one load after another; ``shared``: all at once, each at its share of the bandwidth.
Sharing = Literal["turns", "shared"]


class Transfer:
    """One load on a link."""

    __slots__ = ("began_at", "done", "left_s", "seconds", "timer")

    def __init__(self, seconds: float, done: Callable[[float], None]) -> None:
        #: What it takes when it has a lane for itself, and how much of that is left.
        self.seconds = self.left_s = seconds
        self.done = done
        self.began_at: float | None = None
        self.timer: Appointment | None = None


class Link(Protocol):
    """The way from one tier of a node to its devices."""

    def read(self, seconds: float, done: Callable[[float], None]) -> Transfer:
        """Begin, or wait for one's turn; `seconds` is what it takes alone. `done` hears how long it took since it began."""

    def call_off(self, transfer: Transfer) -> None:
        """End a transfer that is not done; `done` is not called."""


class Turns:
    """`lanes` loads at once, each at full speed; the others wait, first come first served."""

    def __init__(self, clock: Clock, lanes: int = 1) -> None:
        self._clock, self._lanes = clock, lanes
        self._reading: list[Transfer] = []
        self._waiting: deque[Transfer] = deque()

    def read(self, seconds: float, done: Callable[[float], None]) -> Transfer:
        transfer = Transfer(seconds, done)
        self._waiting.append(transfer)
        self._begin()
        return transfer

    def call_off(self, transfer: Transfer) -> None:
        if transfer in self._waiting:
            self._waiting.remove(transfer)
        elif transfer in self._reading:
            assert transfer.timer is not None
            transfer.timer.call_off()
            self._reading.remove(transfer)
            self._begin()

    def _begin(self) -> None:
        while self._waiting and len(self._reading) < self._lanes:
            transfer = self._waiting.popleft()
            self._reading.append(transfer)
            transfer.began_at = self._clock.now
            transfer.timer = self._clock.call_later(transfer.seconds, partial(self._end, transfer))

    def _end(self, transfer: Transfer) -> None:
        self._reading.remove(transfer)
        self._begin()
        transfer.done(transfer.seconds)


class Shared:
    """All loads at once: beyond `lanes` of them, each gets an equal share of the bandwidth of the lanes."""

    def __init__(self, clock: Clock, lanes: int = 1) -> None:
        self._clock, self._lanes = clock, lanes
        self._reading: list[Transfer] = []
        self._since = 0.0
        self._timer: Appointment | None = None

    def read(self, seconds: float, done: Callable[[float], None]) -> Transfer:
        self._catch_up()
        transfer = Transfer(seconds, done)
        transfer.began_at = self._clock.now
        self._reading.append(transfer)
        self._look_ahead()
        return transfer

    def call_off(self, transfer: Transfer) -> None:
        if transfer in self._reading:
            self._catch_up()
            self._reading.remove(transfer)
            self._look_ahead()

    def _pace(self) -> float:
        """Seconds of a load's own time that pass in one second."""
        return min(1.0, self._lanes / len(self._reading)) if self._reading else 1.0

    def _catch_up(self) -> None:
        passed_s = (self._clock.now - self._since) * self._pace()
        for transfer in self._reading:
            transfer.left_s -= passed_s
        self._since = self._clock.now

    def _look_ahead(self) -> None:
        if self._timer is not None:
            self._timer.call_off()
            self._timer = None
        if self._reading:
            first = min(self._reading, key=lambda transfer: transfer.left_s)
            self._timer = self._clock.call_later(max(0.0, first.left_s) / self._pace(), partial(self._end, first))

    def _end(self, transfer: Transfer) -> None:
        self._catch_up()
        self._reading.remove(transfer)
        self._look_ahead()
        assert transfer.began_at is not None
        transfer.done(self._clock.now - transfer.began_at)


def link(clock: Clock, sharing: Sharing, lanes: int = 1) -> Link:
    return Turns(clock, lanes) if sharing == "turns" else Shared(clock, lanes)
