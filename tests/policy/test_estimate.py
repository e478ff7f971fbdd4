"""Seconds until a checkpoint is ready, and until a request or an instance has moved, by the formulas of ServerlessLLM's paper."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest

from sllmdask.config import read_hardware
from sllmdask.policy.estimate import (
    PRIOR_BYTES_PER_S,
    Supplier,
    load_parts,
    load_seconds,
    suppliers,
)
from sllmdask.policy.rates import Measured, RateSource, hardware_rates, known_rates
from sllmdask.policy.views import ModelView, Tier, WorkerView

GB = 10**9
MODEL = ModelView("m", nbytes=12 * GB, checkpoint="c")
BARE = WorkerView("tcp://a", "0", slots=1, host_capacity=100 * GB)
#: 4, 2, 1.5 and 0.5 GB/s.
WORKER = replace(BARE, bytes_per_s={Tier.HOST: 4.0 * GB, Tier.DISK: 2.0 * GB, Tier.PEER: 1.5 * GB, Tier.REMOTE: 0.5 * GB})


def holding(tier: Tier, worker: WorkerView = WORKER) -> WorkerView:
    return replace(worker, residency={"c": tier})


# --- loading ---


@pytest.mark.parametrize(("tier", "seconds"), [(Tier.HOST, 3.0), (Tier.DISK, 6.0), (Tier.PEER, 8.0), (Tier.REMOTE, 24.0)])
def test_a_load_is_bytes_over_the_bandwidth_of_the_tier_that_has_them(tier, seconds):
    assert load_parts(MODEL, holding(tier)) == (tier, {"queue": 0.0, "overhead": 0.0, "read": seconds})
    assert load_seconds(MODEL, holding(tier)) == seconds


def test_what_is_on_the_device_is_ready_at_once_whatever_waits():
    tier, parts = load_parts(MODEL, holding(Tier.DEVICE), queue_s=9.0)
    assert tier is None
    assert sum(parts.values()) == 0.0


def test_a_checkpoint_that_a_worker_does_not_list_is_remote():
    assert load_parts(MODEL, WORKER)[0] is Tier.REMOTE


def test_the_parts_add_up_to_the_estimate():
    worker = replace(holding(Tier.DISK), overhead_s={Tier.DISK: 0.25, Tier.HOST: 7.0})
    assert load_parts(MODEL, worker, queue_s=1.5)[1] == {"queue": 1.5, "overhead": 0.25, "read": 6.0}
    assert load_seconds(MODEL, worker, queue_s=1.5) == 7.75
    assert load_seconds(MODEL, worker, queue_s={Tier.DISK: 2.0, Tier.HOST: 50.0}) == 8.25


def test_a_worker_that_has_measured_nothing_is_assumed_to_be_like_others():
    for tier, bytes_per_s in PRIOR_BYTES_PER_S.items():
        assert load_seconds(MODEL, holding(tier, BARE)) == 12 * GB / bytes_per_s


def test_of_a_pipelined_path_the_slowest_stage_counts():
    slow_copy = replace(WORKER, bytes_per_s={**WORKER.bytes_per_s, Tier.DEVICE: 1.0 * GB})
    seconds = {tier: load_seconds(MODEL, holding(tier, slow_copy)) for tier in (Tier.HOST, Tier.DISK, Tier.REMOTE)}
    assert seconds == {Tier.HOST: 12.0, Tier.DISK: 12.0, Tier.REMOTE: 24.0}


def test_a_peer_is_as_slow_as_the_slower_of_the_link_and_its_own_tier():
    slow_disk, fast_memory = Supplier("tcp://b", Tier.DISK, 1.0 * GB), Supplier("tcp://b", Tier.HOST, 4.0 * GB)
    assert load_parts(MODEL, WORKER, peers=[slow_disk]) == (Tier.PEER, {"queue": 0.0, "overhead": 0.0, "read": 12.0})
    assert load_parts(MODEL, WORKER, peers=[fast_memory]) == (Tier.PEER, {"queue": 0.0, "overhead": 0.0, "read": 8.0})


def test_what_is_on_its_own_disk_a_worker_does_not_ask_others_for():
    peers = [Supplier("tcp://b", Tier.HOST, 8.0 * GB)]
    fast_link = replace(WORKER, bytes_per_s={**WORKER.bytes_per_s, Tier.PEER: 300.0 * GB})
    for tier in (Tier.HOST, Tier.DISK):
        assert load_parts(MODEL, holding(tier, fast_link), peers=peers)[0] is tier
    assert load_parts(MODEL, fast_link, peers=peers)[0] is Tier.PEER


def test_of_equally_fast_tiers_the_nearer_one_supplies():
    peers = [Supplier("tcp://b", Tier.HOST, 8.0 * GB)]
    even = replace(WORKER, bytes_per_s=dict.fromkeys(Tier, 1.0 * GB))
    assert load_parts(MODEL, even, peers=peers)[0] is Tier.PEER


def test_no_worker_is_its_own_supplier_and_the_next_fastest_stands_in():
    memory = replace(holding(Tier.HOST), address="tcp://memory")
    disk = replace(holding(Tier.DISK), address="tcp://disk")
    slow = replace(holding(Tier.DISK), address="tcp://slow", bytes_per_s={Tier.DISK: 1.0})
    far = replace(holding(Tier.REMOTE), address="tcp://far")
    peers = suppliers("c", [slow, far, disk, WORKER, memory])
    assert peers == (Supplier("tcp://memory", Tier.HOST, 4.0 * GB), Supplier("tcp://disk", Tier.DISK, 2.0 * GB))
    assert load_parts(MODEL, replace(memory, residency={}), peers=peers)[1]["read"] == 8.0  # the link, 1.5 GB/s
    assert suppliers("other", [memory]) == ()


def test_a_host_copy_beats_a_disk_copy_until_its_queue_is_longer():
    host, disk = holding(Tier.HOST), holding(Tier.DISK)
    assert load_seconds(MODEL, host) < load_seconds(MODEL, disk)
    assert load_seconds(MODEL, host, queue_s=2.9) < load_seconds(MODEL, disk) < load_seconds(MODEL, host, queue_s=3.1)


# --- the hardware file, and what replaces it ---

NODE = {
    "host_size": "32GB",
    "host_bandwidth": "24GB/s",
    "disk_size": "128GB",
    "disk_bandwidth": "5GB/s",
    "network_bandwidth": "10Gbps",
}


def rates_of(node, **changes):
    return known_rates(
        {},
        hardware_rates(
            host_bandwidth=node.host_bandwidth,
            disk_bandwidth=node.disk_bandwidth,
            network_bandwidth=node.network_bandwidth,
            pcie_bandwidth=node.pcie_bandwidth,
            **changes,
        ),
        {},
    )


@pytest.mark.parametrize(
    ("node", "nbytes", "logged"), [("0", 5_303_193_600, 0.9877967834472656), ("1", 2_631_516_160, 0.4901580810546875)]
)
def test_the_hardware_file_of_serverlessllms_guide_gives_the_estimates_that_its_log_shows(tmp_path, node, nbytes, logged):
    path = tmp_path / "hardware_config.json"
    path.write_text(json.dumps({"0": NODE, "1": NODE}))
    rates = rates_of(read_hardware(path)[node])
    worker = replace(BARE, residency={"c": Tier.DISK}, bytes_per_s=rates.bytes_per_s, overhead_s=rates.overhead_s)
    seconds = load_seconds(replace(MODEL, nbytes=nbytes), worker)
    assert seconds == pytest.approx(logged, abs=1e-12)
    assert f"{seconds:.5f}" in ("0.98780", "0.49016")
    assert rates.source[Tier.DISK] is RateSource.HARDWARE


def test_a_hardware_file_says_how_fast_memory_the_network_and_the_copy_to_the_device_are(tmp_path):
    path = tmp_path / "hardware_config.json"
    path.write_text(json.dumps({"0": {"host_bandwidth": "24GB/s", "network_bandwidth": "10Gbps", "pcie_bandwidth": "16GB/s"}}))
    rates = rates_of(read_hardware(path)["0"])
    gib = 1024**3
    assert rates.bytes_per_s[Tier.PEER] == rates.bytes_per_s[Tier.REMOTE] == 1.25 * gib
    worker = replace(BARE, bytes_per_s=rates.bytes_per_s)
    assert load_seconds(MODEL, holding(Tier.HOST, worker)) == pytest.approx(12 * GB / (16 * gib))
    assert rates.source[Tier.DISK] is RateSource.ASSUMED
    assert Tier.DEVICE not in known_rates({}, {}, {}).bytes_per_s


def test_a_prior_of_a_fast_disk_is_limited_by_slow_memory():
    hardware = hardware_rates(host_bandwidth=2.0 * GB, disk_bandwidth=5.0 * GB, network_bandwidth=1.0 * GB)
    assert known_rates({}, hardware, {}).bytes_per_s == {
        Tier.HOST: 2.0 * GB,
        Tier.DISK: 2.0 * GB,
        Tier.PEER: 1.0 * GB,
        Tier.REMOTE: 1.0 * GB,
    }


def test_real_loads_go_before_a_probe_and_a_probe_before_the_hardware_file_and_that_before_a_constant():
    hardware, probe = {Tier.DISK: 5.0 * GB, Tier.HOST: 8.0 * GB}, {Tier.DISK: 2.0 * GB}
    many = {Tier.DISK: Measured(1.0 * GB, 0.2, n_loads=40)}
    said = {
        RateSource.ASSUMED: known_rates({}, {}, {}),
        RateSource.HARDWARE: known_rates({}, hardware, {}),
        RateSource.PROBE: known_rates({}, hardware, probe),
        RateSource.MEASURED: known_rates(many, hardware, probe),
    }
    assert {source: rates.source[Tier.DISK] for source, rates in said.items()} == {source: source for source in RateSource}
    disk = [rates.bytes_per_s[Tier.DISK] for rates in said.values()]
    assert disk == pytest.approx([PRIOR_BYTES_PER_S[Tier.DISK], 5.0 * GB, 2.0 * GB, 1.0 * GB])
    assert said[RateSource.MEASURED].overhead_s == {Tier.DISK: 0.2}


def test_a_constant_gives_way_at_the_first_load_and_a_prior_that_was_given_bit_by_bit():
    assert known_rates({Tier.DISK: Measured(3.0 * GB)}, {}, {}).bytes_per_s[Tier.DISK] == 3.0 * GB
    after = [known_rates({Tier.DISK: Measured(1.0 * GB, n_loads=n)}, {Tier.DISK: 4.0 * GB}, {}) for n in range(1, 6)]
    rates = [each.bytes_per_s[Tier.DISK] for each in after]
    assert rates[0] == pytest.approx(2.0 * GB)
    assert all(before > later > 1.0 * GB for before, later in pairwise(rates))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, inf, float("nan")])
def test_a_measurement_that_cannot_be_is_passed_over(bandwidth):
    rates = known_rates({Tier.DISK: Measured(bandwidth)}, {Tier.DISK: 4.0 * GB}, {})
    assert rates.bytes_per_s[Tier.DISK] == 4.0 * GB
    assert rates.source[Tier.DISK] is RateSource.HARDWARE


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_after_five_loads_of_a_disk_that_is_not_as_said_the_estimate_is_right_and_another_worker_is_chosen(factor):
    """The disk is throttled to a quarter of what the hardware file says, or is four times as fast."""
    said, other = 2.0 * GB, 2.0 * GB * factor**0.5
    true_s = MODEL.nbytes / (said * factor)
    rival = replace(holding(Tier.DISK), bytes_per_s={Tier.DISK: other})

    def here(n_loads):
        measured = {Tier.DISK: Measured(said * factor, n_loads=n_loads)} if n_loads else {}
        rates = known_rates(measured, {Tier.DISK: said}, {})
        return load_seconds(MODEL, replace(holding(Tier.DISK), bytes_per_s=rates.bytes_per_s))

    assert abs(here(5) - true_s) / true_s < 0.15
    assert (here(0) < load_seconds(MODEL, rival)) is (factor < 1)
    assert (here(5) < load_seconds(MODEL, rival)) is (factor > 1)
