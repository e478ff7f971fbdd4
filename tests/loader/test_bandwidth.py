from __future__ import annotations

import json
import random

import msgpack
import pytest

from sllmdask.loader.bandwidth import BandwidthMeter

GB = 10**9


def test_a_tier_that_was_never_used_is_unknown():
    meter = BandwidthMeter()
    assert meter.estimate("disk", GB) is None
    assert meter.snapshot() == {}
    meter.observe("disk", 0, 1.0)
    assert meter.estimate("disk", GB) is None


def test_one_load_predicts_by_proportion():
    meter = BandwidthMeter()
    meter.observe("disk", 2 * GB, 1.0)
    assert meter.estimate("disk", 4 * GB) == pytest.approx(2.0)
    assert meter.estimate("remote", GB) is None


def test_loads_of_several_sizes_tell_overhead_from_bandwidth():
    meter = BandwidthMeter()
    for nbytes in (GB // 10, GB, 3 * GB):
        meter.observe("disk", nbytes, 0.05 + nbytes / (2.5 * GB))
    found = meter.snapshot()["disk"]
    assert found["overhead_s"] == pytest.approx(0.05)
    assert found["bytes_per_s"] == pytest.approx(2.5 * GB)
    assert found["n_loads"] == 3
    assert meter.estimate("disk", 10 * GB) == pytest.approx(4.05)
    assert msgpack.unpackb(msgpack.packb(meter.snapshot())) == meter.snapshot()


def test_a_faster_disk_is_believed_after_some_loads():
    meter = BandwidthMeter()
    for _ in range(50):
        meter.observe("disk", GB, 10.0)
    for _ in range(10):
        meter.observe("disk", GB, 1.0)
    assert meter.estimate("disk", GB) == pytest.approx(1.0, rel=0.1)


def test_small_loads_do_not_make_a_probed_disk_slow_for_large_ones():
    meter = BandwidthMeter()
    meter.probed("disk", 3.6 * GB)
    assert meter.snapshot()["disk"] == {"bytes_per_s": 3.6 * GB, "overhead_s": 0.0, "n_loads": 0}
    for _ in range(20):
        meter.observe("disk", 4_500_000, 0.008)
    assert meter.estimate("disk", 4_500_000) == pytest.approx(0.008)
    assert meter.estimate("disk", 5 * GB) == pytest.approx(5 / 3.6, rel=0.05)


def test_a_disk_that_is_slower_than_its_probe_is_slow_after_one_load():
    meter = BandwidthMeter()
    meter.probed("disk", 3.6 * GB)
    meter.observe("disk", 64_000_000, 1.28)
    assert meter.estimate("disk", 64_000_000) == pytest.approx(1.28)
    assert meter.estimate("disk", 6_400_000_000) == pytest.approx(128, rel=0.05)


def test_sizes_that_are_nearly_the_same_draw_no_line():
    rng = random.Random(1)
    meter = BandwidthMeter()
    for _ in range(10):
        meter.observe("disk", rng.randint(95_000_000, 105_000_000), rng.uniform(0.095, 0.105))
    assert meter.estimate("disk", 10 * GB) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_loads_side_by_side_are_each_told_the_time_that_they_would_have_taken_alone(seed: int):
    """Against a simulated link of 1 byte per second that serves all who are there evenly, in steps of 1 ms."""
    rng = random.Random(seed)
    begins = {i: rng.randint(0, 3000) for i in range(6)}
    left = {i: float(rng.randint(1, 3000)) for i in range(6)}
    nbytes = dict(left)
    meter, turns, alone = BandwidthMeter(), {}, {}
    for ms in range(30_000):
        for i in [i for i, at in begins.items() if at == ms]:
            turns[i] = meter.begin("remote", ms / 1000)
        there = [i for i in turns if i not in alone]
        for i in there:
            left[i] -= 1 / len(there)
        for i in [i for i in there if left[i] <= 0]:
            alone[i] = meter.end(turns[i], (ms + 1) / 1000)
    assert {i: 1000 * seconds for i, seconds in alone.items()} == pytest.approx(nbytes, abs=12)


def test_what_was_learned_is_taken_over_by_the_next_and_what_does_not_read_as_such_is_not():
    meter = BandwidthMeter()
    meter.probed("disk", 2.0 * GB)
    for nbytes in (GB // 10, GB, 3 * GB):
        meter.observe("peer", nbytes, 0.05 + nbytes / (0.5 * GB))
    kept = json.loads(json.dumps(meter.kept()))
    other = BandwidthMeter()
    other.take_over(kept)
    assert other.snapshot() == meter.snapshot()
    other.observe("peer", GB, 2.05)
    assert other.snapshot()["peer"]["n_loads"] == 4
    for broken in ({}, {"loads": 1, "probed": []}, {"loads": {"disk": [1], "x": [1] * 6}, "probed": {"disk": -1, "tape": 5}}):
        fresh = BandwidthMeter()
        fresh.take_over(broken)
        assert fresh.snapshot() == {}


def test_noise_makes_no_estimate_negative_or_infinite():
    rng = random.Random(0)
    for _ in range(200):
        meter = BandwidthMeter()
        for _ in range(rng.randint(1, 6)):
            meter.observe("disk", rng.randint(1, 10 * GB), rng.uniform(1e-4, 10))
        found = meter.snapshot()["disk"]
        assert found["overhead_s"] >= 0
        assert 0 < found["bytes_per_s"] < float("inf")
