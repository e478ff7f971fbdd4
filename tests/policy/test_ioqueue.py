"""What a tier has promised, against a disk that reads one load after the other."""

from __future__ import annotations

import random

import pytest

from sllmdask.policy.ioqueue import IoQueue


def test_a_load_that_is_alone_waits_for_nothing_and_two_add_up():
    queue = IoQueue()
    assert queue.promise("a", 10.0, 4.0) == 0.0
    assert queue.promise("b", 11.0, 2.0) == 3.0
    assert queue.queue_s(11.0) == 5.0
    assert queue.queue_s(12.0) == 4.0


def test_loads_of_other_tiers_are_in_other_queues():
    disk, host = IoQueue(), IoQueue()
    disk.promise("a", 0.0, 4.0)
    assert host.queue_s(0.0) == 0.0


def test_what_follows_begins_when_a_load_has_ended_be_it_early_or_late():
    queue = IoQueue()
    queue.promise("a", 0.0, 4.0)
    queue.promise("b", 0.0, 2.0)
    queue.done("a", 1.0)
    assert queue.queue_s(1.0) == 2.0
    queue.promise("c", 1.0, 5.0)
    assert queue.queue_s(3.0) == 5.0  # b should be done
    assert queue.queue_s(8.0) == 5.0  # and is overdue: c has not begun
    queue.done("b", 9.0)
    assert queue.queue_s(9.0) == 5.0
    assert queue.queue_s(10.5) == 3.5
    queue.done("c", 14.0)
    assert queue.queue_s(14.0) == 0.0
    assert len(queue) == 0


def test_a_load_that_ends_before_the_one_ahead_of_it_has_had_its_share_of_the_time():
    queue = IoQueue()
    queue.promise("a", 0.0, 4.0)
    queue.promise("b", 0.0, 2.0)
    queue.done("b", 3.0)
    assert queue.queue_s(3.0) == 3.0  # of the 3 seconds 2 were spent on b


def test_a_load_that_is_called_off_while_it_waits_leaves_its_place():
    queue = IoQueue()
    for name in "abc":
        queue.promise(name, 0.0, 2.0)
    queue.done("b", 0.0)
    assert queue.queue_s(0.0) == 4.0


def test_promising_again_corrects_the_seconds_and_keeps_the_place():
    queue = IoQueue()
    for name in "abc":
        queue.promise(name, 0.0, 2.0)
    assert queue.promise("b", 1.0, 5.0) == 1.0
    assert queue.queue_s(1.0) == 8.0
    assert queue.promise("a", 1.0, 3.0) == 0.0
    assert queue.queue_s(1.0) == 9.0


def test_an_end_that_was_told_before_or_never_promised_changes_nothing():
    queue = IoQueue()
    queue.promise("a", 0.0, 4.0)
    queue.done("b", 1.0)
    assert queue.queue_s(1.0) == 3.0
    queue.done("a", 4.0)
    queue.done("a", 5.0)
    assert queue.queue_s(5.0) == 0.0


@pytest.mark.parametrize("off_by", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_a_load_begins_when_it_was_told_but_for_what_those_ahead_of_it_are_off_by(seed, off_by):
    """A disk that reads one load after the other; each lasts up to `off_by` longer or shorter than predicted."""
    rng = random.Random(seed)
    queue, at, free_at = IoQueue(), 0.0, 0.0
    #: Of loads that have not ended: name, end, and by how much the prediction is wrong.
    reading: list[tuple[str, float, float]] = []
    waits = []
    for i in range(300):
        at += rng.expovariate(0.6)
        while reading and reading[0][1] <= at:
            name, ended_at, _ = reading.pop(0)
            queue.done(name, ended_at)
        predicted_s = rng.uniform(0.1, 3.0)
        seconds = predicted_s * rng.uniform(1 - off_by, 1 + off_by)
        wait_s = max(0.0, free_at - at)
        waits.append(wait_s)
        assert queue.promise(str(i), at, predicted_s) == pytest.approx(wait_s, abs=sum(off for *_, off in reading) + 1e-9)
        free_at = at + wait_s + seconds
        reading.append((str(i), free_at, abs(seconds - predicted_s)))
    assert max(waits) > 5.0
