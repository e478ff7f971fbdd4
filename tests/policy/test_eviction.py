from __future__ import annotations

import itertools
import random

import pytest

from sllmdask.policy.eviction import Departure, HostCopy, departures


def copy(key: str, nbytes: int = 8, *, reload_s: float = 8.0, uses: int = 1, floor: float = 0.0, last_used: int = 0) -> HostCopy:
    return HostCopy(key, nbytes, nbytes, reload_s, uses, floor, last_used)


def test_the_bytes_that_save_the_least_reading_leave_first():
    slow = copy("slow", reload_s=16.0)
    popular = copy("popular", uses=3)
    plain = copy("plain")
    assert [each.key for each in departures([slow, popular, plain], 24)] == ["plain", "slow", "popular"]


def test_of_equal_bytes_those_leave_that_were_used_longest_ago():
    copies = [copy("new", last_used=9), copy("old", last_used=1), copy("middle", last_used=5)]
    assert [each.key for each in departures(copies, 16)] == ["old", "middle"]


def test_a_copy_that_was_popular_before_dearer_ones_left_ages():
    once_popular = copy("once popular", uses=3, floor=0.0)
    fresh = copy("fresh", uses=1, floor=4.0)
    assert [each.key for each in departures([once_popular, fresh], 8)] == ["once popular"]


def test_the_last_copy_loses_only_its_end():
    copies = [copy("a", 8, reload_s=1.0), copy("b", 16, reload_s=16.0)]
    assert departures(copies, 11, granule=2) == [Departure("a", 8, 1 / 8), Departure("b", 4, 1.0)]


def test_a_whole_copy_that_is_not_needed_after_all_stays():
    copies = [copy("small", 2, reload_s=1.0), copy("large", 10, reload_s=10.0)]
    assert [each.key for each in departures(copies, 10)] == ["large"]
    assert [each.key for each in departures(copies, 11)] == ["small", "large"]


def test_what_is_not_there_cannot_leave():
    assert departures([copy("a", 8)], 9) is None
    assert departures([copy("a", 8)], 8, granule=2) == [Departure("a", 8, 1.0)]
    assert departures([], 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_of_granules_is_worth_less(seed):
    rng = random.Random(seed)
    copies = [
        copy(f"m{i}", rng.randint(1, 4), reload_s=rng.choice([1.0, 2.0, 5.0]), uses=rng.randint(1, 3), last_used=i)
        for i in range(rng.randint(1, 4))
    ]
    worth = {each.key: each.floor + each.uses * each.reload_s / each.total_nbytes for each in copies}
    total = sum(each.nbytes for each in copies)
    for nbytes in range(1, total + 1):
        choices = [each for each in itertools.product(*(range(each.nbytes + 1) for each in copies)) if sum(each) >= nbytes]
        least = min(sum(n * worth[each.key] for n, each in zip(choice, copies, strict=True)) for choice in choices)
        found = departures(copies, nbytes, granule=1)
        assert sum(each.nbytes for each in found) == nbytes
        assert sum(each.nbytes * worth[each.key] for each in found) == pytest.approx(least)
