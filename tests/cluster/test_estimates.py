"""What estimates begin with and what they learn: without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sllmdask.cluster.estimates import Estimates
from sllmdask.config import NodeHardware, parse, read_hardware
from sllmdask.policy.decisions import Load
from sllmdask.policy.estimate import load_seconds
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, Tier, WorkerView
from tests.test_config import HARDWARE

GiB = 1024**3
OPT_2_7B, OPT_1_3B = 5_303_193_600, 2_631_516_160


def account(capacity: int = 64 * GiB, node: str = "n", **tiers: tuple[float, float, int]) -> dict[str, Any]:
    """What a worker says of itself: of each tier (bytes per second, seconds of overhead, loads)."""
    bandwidth = {
        tier: {"bytes_per_s": bytes_per_s, "overhead_s": overhead_s, "n_loads": n_loads}
        for tier, (bytes_per_s, overhead_s, n_loads) in tiers.items()
    }
    return {"bandwidth": bandwidth, "tiers": {"host": {"used": 0, "capacity": capacity}}, "node": node, "data": "10.0.0.1:1"}


@pytest.fixture
def of_serverlessllm(tmp_path: Path) -> Estimates:
    path = tmp_path / "hardware_config.json"
    path.write_text(HARDWARE)
    return Estimates(read_hardware(path))


def seconds(estimates: Estimates, node: str, nbytes: int, tier: Tier, told: dict[str, Any]) -> float:
    rates = estimates.rates(node, told)
    worker = WorkerView(node, node, 1, 64 * GiB, "", {"m": tier}, rates.bytes_per_s, rates.overhead_s)
    return load_seconds(ModelView("m", nbytes), worker)


@pytest.mark.parametrize(("node", "nbytes", "expected"), [("0", OPT_2_7B, "0.98780"), ("1", OPT_1_3B, "0.49016")])
def test_the_file_of_serverlessllm_gives_its_estimates_also_where_the_disk_was_probed(of_serverlessllm, node, nbytes, expected):
    assert f"{seconds(of_serverlessllm, node, nbytes, Tier.DISK, account()):.5f}" == expected
    assert f"{seconds(of_serverlessllm, node, nbytes, Tier.DISK, account(disk=(1e9, 0.0, 0))):.5f}" == expected


def test_where_the_file_says_nothing_the_probe_counts_and_loads_count_more_than_either(of_serverlessllm):
    probed, loaded = account(disk=(1e9, 0.0, 0)), account(disk=(1e9, 0.5, 20))
    assert seconds(of_serverlessllm, "unknown", 10**9, Tier.DISK, probed) == pytest.approx(1.0)
    assert seconds(of_serverlessllm, "0", 10**9, Tier.DISK, loaded) == pytest.approx(1.5, rel=1e-3)


def test_a_worker_that_takes_nothing_from_others_is_never_estimated_to_do_so(of_serverlessllm):
    told = account()
    assert of_serverlessllm.rates("0", told).bytes_per_s[Tier.PEER] == 10 * GiB / 8
    assert seconds(of_serverlessllm, "0", 10**9, Tier.PEER, told | {"data": None}) > 10**8


def test_the_controller_counts_on_no_more_memory_than_the_file_gives_the_workers_of_a_node_together():
    estimates = Estimates({name: NodeHardware(host_size=8 * GiB) for name in "01"})
    told = account(capacity=20 * GiB, node="n")
    assert estimates.host_capacity("0", told, []) == 8 * GiB
    neighbour, stranger = WorkerView("b", "1", 1, 0, node="n"), WorkerView("c", "2", 1, 0, node="n")
    assert estimates.host_capacity("0", told, [neighbour]) == 16 * GiB
    assert estimates.host_capacity("0", told, [neighbour, stranger]) == 20 * GiB, "it may bring any amount"
    assert estimates.host_capacity("0", account(capacity=GiB), []) == GiB
    assert estimates.host_capacity("elsewhere", told, []) == 20 * GiB
    assert (Estimates({"0": NodeHardware(disk_size=GiB)}).disk_size("0"), estimates.disk_size("7")) == (GiB, None)


def test_nodes_that_never_join_are_named():
    estimates = Estimates({"0": NodeHardware(), "7": NodeHardware()})
    (warning,) = estimates.missing([WorkerView("a", "0", 1, 0)])
    assert "'7'" in warning and "not connected" in warning


@pytest.mark.parametrize("key", ["host_size", "disk_bandwidth", "network_bandwidth"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_node_without_any_is_refused_by_name(key: str, value: int):
    with pytest.raises(Exception, match=rf"Node '3'.*{key}.*greater than 0"):
        parse(NodeHardware, {key: value}, "node '3' of hardware.json")


# --- outcomes --------------------------------------------------------------------------------------------------------


def ended(
    estimates: Estimates, instance: str, *, decided_at: float, ready_at: float, told_at: float, **times: float
) -> list[str]:
    """One load from disk on node 0, predicted to take 2 s."""
    estimates.decided(Load(instance, "m", "tcp://a", 2.0), "0", decided_at)
    view = InstanceView(instance, "m", "tcp://a", 1, InstanceState.LOADING, decided_at)
    assert estimates.settle({instance: view}) == []
    estimates.told(instance, times, told_at)
    assert estimates.settle({instance: view}) == [], "nobody knows yet that it takes requests"
    view = replace(view, state=InstanceState.READY, ready_at=ready_at, loaded_from=Tier.DISK)
    return estimates.settle({instance: view})


def test_a_load_is_over_when_it_takes_requests_and_its_last_byte_is_there():
    estimates = Estimates({})
    assert estimates.error_of("0") == {"n": 0, "error_ratio": None, "tiers": {}}
    assert ended(estimates, "m/1", decided_at=10, ready_at=11, told_at=14, queue_s=0.0, bytes_s=4.0) == ["0"]
    assert estimates.error_of("0")["error_ratio"] == pytest.approx(0.5), "2 s predicted, 4 s taken"
    assert ended(estimates, "m/2", decided_at=20, ready_at=22, told_at=21, queue_s=0.0, bytes_s=1.0) == ["0"]
    found = estimates.error_of("0")
    assert (found["n"], found["tiers"]["disk"]["n"]) == (2, 2) and found["error_ratio"] < 0.5
    json.dumps(found)


def test_what_a_load_takes_beside_its_bytes_is_learned_and_a_queue_is_no_part_of_it():
    estimates = Estimates({})
    told = account(disk=(1e9, 0.0, 1))
    for i in range(30):
        ended(estimates, f"m/{i}", decided_at=0, ready_at=3.0, told_at=4.5, queue_s=3.0, bytes_s=1.0)
    assert estimates.rates("0", told).overhead_s[Tier.DISK] == pytest.approx(0.5)
    assert estimates.rates("1", told).overhead_s == {}
    assert seconds(estimates, "0", 10**9, Tier.DISK, told) == pytest.approx(1.5, rel=0.2)


def test_a_load_that_has_just_ended_counts_though_its_instance_is_leaving():
    estimates = Estimates({})
    estimates.decided(Load("m/1", "m", "tcp://a", 2.0), "0", 0.0)
    view = InstanceView("m/1", "m", "tcp://a", 1, InstanceState.UNLOADING, 0.0, ready_at=1.0, loaded_from=Tier.DISK)
    assert estimates.settle({"m/1": view}) == []
    estimates.told("m/1", {"bytes_s": 1.0}, 2.0)
    assert estimates.settle({"m/1": view}) == ["0"]


def test_a_load_that_failed_or_was_called_off_tells_nothing():
    estimates = Estimates({})
    for i, state in enumerate((None, InstanceState.UNLOADING)):
        estimates.decided(Load(f"m/{i}", "m", "tcp://a", 2.0), "0", 0.0)
        estimates.told(f"m/{i}", {"bytes_s": 1.0}, 1.0)
        view = None if state is None else InstanceView(f"m/{i}", "m", "tcp://a", 1, state, 0.0)
        assert estimates.settle({} if view is None else {f"m/{i}": view}) == []
    estimates.told("nobody/1", {}, 1.0)
    assert estimates.error_of("0")["n"] == 0
