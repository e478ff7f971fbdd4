from __future__ import annotations

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


def test_noise_makes_no_estimate_negative_or_infinite():
    rng = random.Random(0)
    for _ in range(200):
        meter = BandwidthMeter()
        for _ in range(rng.randint(1, 6)):
            meter.observe("disk", rng.randint(1, 10 * GB), rng.uniform(1e-4, 10))
        found = meter.snapshot()["disk"]
        assert found["overhead_s"] >= 0
        assert 0 < found["bytes_per_s"] < float("inf")
