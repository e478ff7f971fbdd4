"""The virtual clock: what happens next, by time, and by the order in which it was asked for where times are equal."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Appointment:
    """Something that happens at `at`, unless it is called off before."""

    __slots__ = ("action", "at")

    def __init__(self, at: float, action: Callable[[], None]) -> None:
        self.at = at
        self.action: Callable[[], None] | None = action

    def call_off(self) -> None:
        self.action = None


class Clock:
    """The event heap. Nothing happens between two appointments, so the clock jumps from one to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._heap: list[tuple[float, int, Appointment]] = []

    def call_at(self, at: float, action: Callable[[], None]) -> Appointment:
        """`action` happens at `at`; what is asked for in the past happens now."""
        appointment = Appointment(at, action)
        heappush(self._heap, (at, next(self._order), appointment))
        return appointment

    def call_later(self, seconds: float, action: Callable[[], None]) -> Appointment:
        return self.call_at(self.now + seconds, action)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._heap:
            at, _, appointment = heappop(self._heap)
            if appointment.action is not None:
                self.now = max(self.now, at)
                appointment.action()
