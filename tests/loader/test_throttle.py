"""A bound on what loads read from the disk, by a clock that waits move."""

from __future__ import annotations

import threading

import pytest

from sllmdask.errors import Cancelled
from sllmdask.loader.throttle import Throttle


class Waits(threading.Event):
    """Moves the clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            self.now += timeout or 0.0
        return self.is_set()


def test_bytes_come_no_faster_than_the_limit_and_a_pause_is_not_made_up_for():
    clock = Waits()
    throttle = Throttle(1000.0, lambda: clock.now)
    for nbytes in (500, 1500):
        throttle.take(nbytes, clock)
    assert clock.now == pytest.approx(102.0)
    clock.now += 60
    throttle.take(1000, clock)
    assert clock.now == pytest.approx(163.0)


def test_without_a_limit_nobody_waits():
    clock = Waits()
    Throttle(0.0, lambda: clock.now).take(10**12, clock)
    assert clock.now == 100.0


def test_who_is_called_off_leaves_its_share_to_the_next():
    clock, called_off = Waits(), threading.Event()
    called_off.set()
    throttle = Throttle(1000.0, lambda: clock.now)
    with pytest.raises(Cancelled):
        throttle.take(10**9, called_off)
    throttle.take(1000, clock)
    assert clock.now == pytest.approx(101.0)


def test_many_threads_together_have_one_limit():
    throttle = Throttle(1e9)
    threads = [threading.Thread(target=throttle.take, args=(10_000,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
