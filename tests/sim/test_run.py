"""The virtual clock around the live controller."""

from __future__ import annotations

from dataclasses import replace

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Load, Unload
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView
from sllmdask.sim.run import Costs, simulate

GiB = 1024**3
MODEL = ModelView("a", nbytes=2 * GiB, keep_alive_s=30.0)
NODE = WorkerView(
    "tcp://one",
    "0",
    slots=1,
    host_capacity=8 * GiB,
    residency={"a": Tier.DISK},
    bytes_per_s={Tier.DISK: 1.0 * GiB, Tier.HOST: 8.0 * GiB},
)


def run(worker: WorkerView, *arrivals: float):
    controller = Controller(ControllerSettings())
    requests = [RequestView(f"r{i}", "a", "door", at, at + 100) for i, at in enumerate(arrivals)]
    events = [ev.WorkerJoined(0.0, worker), ev.ModelDeployed(0.0, MODEL)]
    return simulate(controller, [*events, *(ev.RequestArrived(each.arrived_at, each) for each in requests)], Costs(lambda _: 3.0))


def test_a_cold_request_starts_after_bytes_over_bandwidth_and_a_warm_one_at_once():
    outcome = run(NODE, 1.0, 10.0)
    assert outcome.dispatched_at == {"r0": 3.0, "r1": 10.0}
    assert outcome.ended_at == {"r0": 6.0, "r1": 13.0}


def test_a_checkpoint_in_host_memory_starts_at_the_speed_of_memory():
    assert run(replace(NODE, residency={"a": Tier.HOST}), 1.0).dispatched_at == {"r0": 1.25}


def test_after_the_last_request_the_clock_runs_until_the_keep_alive_is_over():
    outcome = run(NODE, 1.0)
    (loaded_at,) = [at for at, decision in outcome.decisions if isinstance(decision, Load)]
    (unloaded_at,) = [at for at, decision in outcome.decisions if isinstance(decision, Unload)]
    assert (loaded_at, unloaded_at) == (1.0, 36.0)
