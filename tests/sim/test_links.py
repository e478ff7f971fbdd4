"""Loads that read one tier of one node at once."""

from __future__ import annotations

from random import Random

import pytest

from sllmdask.sim.clock import Clock
from sllmdask.sim.links import link


def ends(sharing, lanes, loads):
    """When each of `loads`, (begins at, seconds), is over."""
    clock, over = Clock(), {}
    way = link(clock, sharing, lanes)
    for i, (at, seconds) in enumerate(loads):

        def begin(i=i, seconds=seconds):
            way.read(seconds, lambda _: over.update({i: clock.now}))

        clock.call_at(at, begin)
    clock.run()
    return [over[i] for i in range(len(loads))]


def test_two_loads_from_one_disk_take_as_long_as_the_sum_whether_they_take_turns_or_share():
    assert ends("turns", 1, [(0.0, 2.0), (0.0, 3.0)]) == [2.0, 5.0]
    assert ends("shared", 1, [(0.0, 2.0), (0.0, 3.0)]) == pytest.approx([4.0, 5.0])


def test_a_second_lane_is_a_second_load_at_full_speed():
    for sharing in ("turns", "shared"):
        assert ends(sharing, 2, [(0.0, 2.0), (0.0, 3.0)]) == pytest.approx([2.0, 3.0])


def test_one_who_comes_later_slows_the_first_down_only_where_they_share():
    # Alone until 1; then half of the speed each until the first is over at 3; then the second has it alone.
    assert ends("shared", 1, [(0.0, 2.0), (1.0, 3.0)]) == pytest.approx([3.0, 5.0])
    assert ends("turns", 1, [(0.0, 2.0), (1.0, 3.0)]) == [2.0, 5.0]


@pytest.mark.parametrize("sharing", ["turns", "shared"])
def test_a_busy_link_does_the_work_of_all_loads_without_a_pause(sharing):
    rng = Random(7)
    for _ in range(50):
        loads = [(0.0, rng.uniform(0.1, 5.0)) for _ in range(rng.randrange(1, 8))]
        assert max(ends(sharing, 1, loads)) == pytest.approx(sum(seconds for _, seconds in loads))


def test_sharing_is_what_small_slices_in_turn_come_to():
    loads = [(0.0, 1.0), (0.35, 2.0), (0.5, 0.4), (4.0, 1.0)]
    slice_s, at, left, over = 1e-3, 0.0, [seconds for _, seconds in loads], {}
    while len(over) < len(loads):
        active = [i for i, (begins_at, _) in enumerate(loads) if begins_at <= at and i not in over]
        for i in active:
            left[i] -= slice_s / len(active)
            if left[i] <= 0:
                over[i] = at
        at += slice_s
    assert ends("shared", 1, loads) == pytest.approx([over[i] for i in range(len(loads))], abs=5 * slice_s)


@pytest.mark.parametrize("sharing", ["turns", "shared"])
def test_a_load_that_is_called_off_leaves_the_link_to_the_others(sharing):
    clock, over = Clock(), []
    way = link(clock, sharing)
    first = way.read(10.0, lambda _: over.append("first"))
    way.read(2.0, lambda _: over.append(clock.now))
    clock.call_at(1.0, lambda: way.call_off(first))
    clock.run()
    # It had the link for one second: all of it, or half of it.
    assert over == pytest.approx([3.0 if sharing == "turns" else 2.5])
