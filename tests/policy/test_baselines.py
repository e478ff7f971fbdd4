"""What the baselines of the simulator take from the options that the controller gives them."""

from __future__ import annotations

from collections import Counter

from sllmdask.policy.baselines import locality, serverlessllm, shepherd, uniform
from sllmdask.policy.choice import Option, Way
from sllmdask.policy.views import Tier


def option(way, worker, tier=None, **parts):
    return Option(way, worker, worker, sum(parts.values()), tier, parts=parts)


LIVE = option(Way.LIVE, "z", wait=9.0)
NEAR_BUSY = option(Way.WAIT, "near", Tier.HOST, wait=30.0, read=1.0)
FAR_FREE = option(Way.FREE, "far", Tier.REMOTE, read=20.0)
DISK_FREE = option(Way.FREE, "disk", Tier.DISK, queue=4.0, read=5.0)
MOVE = option(Way.MIGRATE, "near", Tier.HOST, move=3.0, read=1.0)
STOP = option(Way.PREEMPT, "near", Tier.HOST, read=1.0)
ALL = [NEAR_BUSY, FAR_FREE, DISK_FREE, MOVE, STOP]


def test_all_of_them_use_an_instance_that_is_there():
    for baseline in (uniform, locality, serverlessllm, shepherd):
        assert baseline(0)([*ALL, LIVE]) == LIVE


def test_uniform_takes_any_load_that_can_begin_equally_often_and_the_same_ones_for_the_same_seed():
    choose, again = uniform(1), uniform(1)
    taken = [choose(ALL) for _ in range(2000)]
    assert taken == [again(ALL) for _ in range(2000)]
    counts = Counter(each.worker for each in taken)
    assert set(counts) == {"far", "disk"} and abs(counts["far"] - 1000) < 5 * 2000**0.5 / 2


def test_locality_waits_for_the_nearest_copy_whatever_it_takes():
    assert locality(0)(ALL) == NEAR_BUSY
    assert locality(0)([FAR_FREE, DISK_FREE]) == DISK_FREE


def test_serverlessllm_moves_what_is_in_the_way_if_that_is_sooner_and_never_waits_or_preempts():
    assert serverlessllm(0)(ALL) == MOVE
    slow = option(Way.MIGRATE, "near", Tier.HOST, move=12.0, read=1.0)
    assert serverlessllm(0)([NEAR_BUSY, FAR_FREE, DISK_FREE, slow, STOP]) == DISK_FREE
    assert serverlessllm(0)([NEAR_BUSY, STOP]) is None


def test_serverlessllm_counts_no_overhead():
    dear = option(Way.FREE, "a", Tier.HOST, overhead=5.0, read=1.0)
    assert serverlessllm(0)([dear, option(Way.FREE, "b", Tier.DISK, read=2.0)]) == dear


def test_shepherd_preempts_where_serverlessllm_moves():
    assert shepherd(0)(ALL) == STOP
    assert shepherd(0)([NEAR_BUSY, FAR_FREE, DISK_FREE, MOVE]) == DISK_FREE


def test_without_a_way_that_they_know_they_wait():
    for baseline in (uniform, serverlessllm, shepherd):
        assert baseline(0)([NEAR_BUSY]) is None
