"""The controller's answers, event by event; the cluster is imagined, the rules are the live ones."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sllmdask.errors import (
    InsufficientMemory,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    NoWorker,
    QueueFull,
    QueueTimeout,
)
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Chose, Dispatch, Load, Refuse, ReportLoaded, Unload, WakeAt
from sllmdask.policy.views import InstanceState, ModelView, RequestView, Tier, WorkerView
from sllmdask.sim.run import Costs, simulate

GiB = 1024**3
A = ModelView("a", nbytes=1 * GiB)
B = ModelView("b", nbytes=1 * GiB)
NODE = WorkerView(
    "tcp://one",
    "0",
    slots=1,
    host_capacity=8 * GiB,
    residency=dict.fromkeys(["big", *"abcdefgh"], Tier.DISK),
    bytes_per_s={Tier.DISK: 1.0 * GiB},
)


def controller_with(*models, workers=(NODE,), **settings) -> Controller:
    controller = Controller(ControllerSettings(**settings))
    for worker in workers:
        controller.handle(ev.WorkerJoined(0.0, worker))
    for model in models:
        controller.handle(ev.ModelDeployed(0.0, model))
    return controller


def ask(controller, request_id, model, at, deadline_s=100.0, priority=0, front_door="door"):
    request = RequestView(request_id, model, front_door, at, at + deadline_s, priority)
    return acts(controller.handle(ev.RequestArrived(at, request)))


def wish(controller, request_id, model, at, node="", deadline_s=100.0):
    """What an operator's load begins."""
    request = RequestView(request_id, model, "", at, at + deadline_s, load_only=True, node=node)
    return acts(controller.handle(ev.LoadRequested(at, request)))


def acts(decisions):
    """Decisions without the wake-up calls and the records."""
    return [decision for decision in decisions if not isinstance(decision, WakeAt | Chose)]


def wake(decisions):
    return [decision.at for decision in decisions if isinstance(decision, WakeAt)][-1]


def test_the_first_request_loads_the_model_and_is_sent_when_it_is_ready():
    controller = controller_with(A)
    (load,) = ask(controller, "r1", "a", 1.0)
    assert (load.model, load.worker, load.ready_in_s) == ("a", "tcp://one", 1.0)
    (dispatch,) = acts(controller.handle(ev.LoadFinished(2.5, load.instance, Tier.DISK)))
    assert dispatch == Dispatch("r1", "door", load.instance, "tcp://one", "0", queue_s=1.5, loaded_from=Tier.DISK)


def test_a_request_for_a_ready_model_is_sent_at_once_and_counts_as_a_hit():
    controller = controller_with(A)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (dispatch,) = ask(controller, "r2", "a", 3.0)
    assert (dispatch.queue_s, dispatch.loaded_from) == (0.0, None)


def test_a_second_request_while_the_model_loads_loads_nothing_more():
    controller = controller_with(A)
    ask(controller, "r1", "a", 1.0)
    assert ask(controller, "r2", "a", 1.1) == []


def test_an_idle_model_is_evicted_and_the_other_loads_only_after_it_left():
    controller = controller_with(A, B)
    (load_a,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load_a.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(3.0, "r1"))
    (unload,) = ask(controller, "r2", "b", 4.0)
    assert unload == Unload(load_a.instance, "a", "tcp://one", "evicted")
    assert ask(controller, "r3", "b", 4.1) == []
    (load_b,) = acts(controller.handle(ev.UnloadFinished(4.2, load_a.instance)))
    assert (load_b.model, load_b.worker) == ("b", "tcp://one")


def test_a_busy_model_is_never_evicted_the_other_waits_for_its_end():
    controller = controller_with(A, B)
    (load_a,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load_a.instance, Tier.DISK))
    assert ask(controller, "r2", "b", 3.0) == []
    assert acts(controller.handle(ev.TimerFired(4.0))) == []
    (unload,) = acts(controller.handle(ev.RequestEnded(9.0, "r1")))
    assert unload.model == "a"


def test_a_client_that_leaves_the_queue_causes_no_eviction():
    controller = controller_with(A, B)
    (load_a,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load_a.instance, Tier.DISK))
    ask(controller, "r2", "b", 3.0)
    controller.handle(ev.RequestEnded(3.5, "r2"))
    assert acts(controller.handle(ev.RequestEnded(9.0, "r1"))) == []


def test_an_idle_instance_leaves_when_its_keep_alive_is_over_and_not_before():
    controller = controller_with(replace(A, keep_alive_s=30.0))
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert wake(controller.handle(ev.RequestEnded(5.0, "r1"))) == 35.0
    assert acts(controller.handle(ev.TimerFired(34.9))) == []
    assert acts(controller.handle(ev.TimerFired(35.0))) == [Unload(load.instance, "a", "tcp://one", "keep-alive over")]


def test_keep_alive_zero_unloads_at_once_and_minus_one_never():
    for keep_alive_s, leaves in ((0.0, True), (-1.0, False)):
        controller = controller_with(replace(A, keep_alive_s=keep_alive_s))
        (load,) = ask(controller, "r1", "a", 1.0)
        controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
        assert bool(acts(controller.handle(ev.RequestEnded(5.0, "r1")))) is leaves
        assert bool(acts(controller.handle(ev.TimerFired(1e9)))) is False


def test_the_lowest_estimate_wins_and_ties_go_to_the_smaller_name():
    fast = replace(NODE, address="tcp://fast", name="9", residency={"a": Tier.HOST}, bytes_per_s={Tier.HOST: 20.0 * GiB})
    twin = replace(NODE, address="tcp://twin", name="1")
    (load,) = ask(controller_with(A, workers=(NODE, twin, fast)), "r", "a", 1.0)
    assert (load.worker, load.ready_in_s) == ("tcp://fast", 0.05)
    assert load.why["tcp://one"] == "ready in 1.0 s"
    (load,) = ask(controller_with(A, workers=(twin, NODE)), "r", "a", 1.0)
    assert load.worker == "tcp://one"


def test_a_free_slot_beats_an_eviction_that_is_no_faster_and_loses_to_one_that_is():
    for disk, where in ((1.0, "tcp://two"), (0.1, "tcp://one")):
        other = replace(NODE, address="tcp://two", name="1", bytes_per_s={Tier.DISK: disk * GiB, Tier.PEER: 0.1 * GiB})
        controller = controller_with(A, B, workers=(NODE, other))
        (load,) = ask(controller, "r1", "a", 1.0)
        controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
        controller.handle(ev.RequestEnded(3.0, "r1"))
        (begun,) = ask(controller, "r2", "b", 4.0)
        assert (type(begun), begun.worker) == ((Load if disk == 1.0 else Unload), where)


def test_target_nodes_are_the_only_ones_used():
    two = replace(NODE, address="tcp://two", name="1")
    controller = controller_with(replace(A, nodes=("1",)), workers=(NODE, two))
    (load,) = ask(controller, "r1", "a", 1.0)
    assert load.worker == "tcp://two"
    assert load.why["tcp://one"] == "not among the model's nodes 1"


def test_what_a_worker_pins_takes_memory_from_the_others_of_its_node_once_for_each_checkpoint():
    small = replace(NODE, host_capacity=3 * GiB, node="host")
    twin = replace(small, address="tcp://two", name="1")
    apart = replace(small, address="tcp://far", name="9", node="elsewhere", bytes_per_s={Tier.REMOTE: 10 * GiB})
    big = ModelView("big", nbytes=int(2.5 * GiB))
    for workers, where in (((small, twin), []), ((small, twin, apart), ["tcp://far"])):
        controller = controller_with(A, replace(A, name="same", checkpoint="a"), big, workers=workers)
        ask(controller, "r1", "a", at=1.0)
        [load] = [one for one in ask(controller, "r2", "big", at=1.0) if isinstance(one, Load)] or [None]
        assert ([load.worker] if load else []) == where
    controller = controller_with(A, replace(A, name="same", checkpoint="a"), workers=(replace(small, host_capacity=GiB), twin))
    ask(controller, "r1", "a", at=1.0)
    assert isinstance(ask(controller, "r2", "same", at=1.0)[0], Load), "the same checkpoint is there already"


def test_a_load_that_fails_after_its_request_came_back_is_not_begun_again_at_once():
    controller = controller_with(A)
    [load] = ask(controller, "r1", "a", at=1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    [unload] = acts(controller.handle(ev.RequestReturned(3.0, "r1")))
    assert unload.instance == load.instance
    [refuse] = acts(controller.handle(ev.LoadFailed(3.1, load.instance, "a bit had flipped")))
    assert isinstance(refuse.error, LoadFailed) and "a bit had flipped" in refuse.error.message
    assert acts(controller.handle(ev.UnloadFinished(3.2, load.instance))) == []


def test_an_idle_instance_gives_its_memory_to_another_worker_of_its_node_and_a_busy_one_does_not():
    one = replace(NODE, host_capacity=3 * GiB, node="host")
    two = replace(one, address="tcp://two", name="1", residency={})
    big = ModelView("big", nbytes=int(2.5 * GiB), nodes=("1",))
    controller = controller_with(A, big, workers=(one, two))
    [load] = ask(controller, "r1", "a", at=1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert ask(controller, "r2", "big", at=3.0) == [], "the memory is in use"
    [unload] = acts(controller.handle(ev.RequestEnded(4.0, "r1")))
    assert (unload.instance, unload.worker) == (load.instance, "tcp://one")
    [placed] = acts(controller.handle(ev.UnloadFinished(5.0, load.instance)))
    assert (placed.model, placed.worker) == ("big", "tcp://two")


def test_what_went_wrong_elsewhere_is_forgotten_once_the_model_has_served_and_may_be_tried_again():
    two = replace(NODE, address="tcp://two", name="1")
    controller = controller_with(A, workers=(NODE, two))
    [load] = ask(controller, "r1", "a", at=1.0)
    [again] = acts(controller.handle(ev.LoadFailed(2.0, load.instance, "damaged")))
    assert again.worker != load.worker
    controller.handle(ev.LoadFinished(2.5, again.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(2.6, "r1"))
    assert controller.last_failure("a") == "damaged", "it is not to be tried there yet"
    ask(controller, "r2", "a", at=9.0)
    controller.handle(ev.RequestEnded(9.5, "r2"))
    assert controller.last_failure("a") is None


def test_a_node_that_gets_more_memory_is_believed():
    controller = controller_with(replace(A, nbytes=9 * GiB))
    assert ask(controller, "r1", "a", at=1.0) == []
    report = ev.WorkerReported(2.0, NODE.address, 1, NODE.residency, NODE.bytes_per_s, {}, 16 * GiB)
    assert [type(decision) for decision in acts(controller.handle(report))] == [Load]


def test_a_load_that_fails_while_the_instance_serves_already_is_a_failed_load():
    controller = controller_with(A)
    [load] = ask(controller, "r1", "a", at=1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    controller.handle(ev.LoadFailed(3.0, load.instance, "a bit had flipped"))
    assert controller.instances == {}
    assert controller.last_failure("a") == "a bit had flipped"
    [refuse] = acts(controller.handle(ev.RequestReturned(3.0, "r1")))
    assert isinstance(refuse.error, LoadFailed)


def test_an_instance_of_two_slots_waits_for_both():
    wide = replace(NODE, slots=2)
    controller = controller_with(A, B, replace(A, name="big", n_slots=2), workers=(wide,))
    (load_a,) = ask(controller, "ra", "a", 1.0)
    (load_b,) = ask(controller, "rb", "b", 1.0)
    controller.handle(ev.LoadFinished(2.0, load_a.instance, Tier.DISK))
    controller.handle(ev.LoadFinished(2.0, load_b.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(3.0, "ra"))
    assert ask(controller, "rbig", "big", 4.0) == []
    unloads = acts(controller.handle(ev.RequestEnded(5.0, "rb")))
    assert {unload.model for unload in unloads} == {"a", "b"}
    assert acts(controller.handle(ev.UnloadFinished(6.0, load_a.instance))) == []
    (load,) = acts(controller.handle(ev.UnloadFinished(7.0, load_b.instance)))
    assert load.model == "big"


def test_a_burst_is_scaled_in_one_decision_over_free_slots_only():
    nodes = [replace(NODE, address=f"tcp://{name}", name=name) for name in "0123"]
    controller = controller_with(replace(A, target=2, max_instances=3), B, workers=nodes)
    (load_b,) = ask(controller, "rb", "b", 0.5)
    loads = []
    for i in range(8):
        loads += ask(controller, f"r{i}", "a", 1.0)
    assert len(loads) == 3
    assert load_b.worker not in {load.worker for load in loads}


def test_requests_go_to_the_instance_with_the_fewest():
    nodes = [replace(NODE, address=f"tcp://{name}", name=name) for name in "01"]
    controller = controller_with(replace(A, target=1), workers=nodes)
    (first,) = ask(controller, "r1", "a", 1.0)
    (second,) = ask(controller, "r2", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, first.instance, Tier.DISK))
    controller.handle(ev.LoadFinished(2.0, second.instance, Tier.DISK))
    (third,) = ask(controller, "r3", "a", 3.0)
    assert third.instance == second.instance


def test_a_lost_worker_takes_its_instances_along_and_waiting_requests_go_elsewhere():
    controller = controller_with(A)
    ask(controller, "r1", "a", 1.0)
    assert acts(controller.handle(ev.WorkerLeft(1.5, NODE.address))) == []
    assert controller.instances == {}
    again = replace(NODE, address="tcp://again")
    (load,) = acts(controller.handle(ev.WorkerJoined(2.0, again)))
    assert load.worker == "tcp://again"


def test_a_request_that_had_not_begun_when_its_worker_died_can_be_sent_back():
    controller = controller_with(A)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    controller.handle(ev.WorkerLeft(2.1, NODE.address))
    controller.handle(ev.RequestReturned(2.2, "r1"))
    (load,) = acts(controller.handle(ev.WorkerJoined(3.0, replace(NODE, address="tcp://again"))))
    (dispatch,) = acts(controller.handle(ev.LoadFinished(4.0, load.instance, Tier.DISK)))
    assert (dispatch.request, dispatch.worker) == ("r1", "tcp://again")


def test_without_any_worker_a_request_is_held_for_a_while_and_then_refused_with_what_to_do():
    controller = controller_with(A, workers=(), worker_wait_s=20.0)
    decisions = controller.handle(ev.RequestArrived(1.0, RequestView("r1", "a", "door", 1.0, 100.0)))
    assert acts(decisions) == []
    assert wake(decisions) == 21.0
    (refuse,) = acts(controller.handle(ev.TimerFired(21.0)))
    assert isinstance(refuse.error, NoWorker)
    assert "dask worker" in refuse.error.message


def test_a_model_larger_than_every_worker_is_refused_with_both_numbers_once_a_larger_one_has_not_come():
    controller = controller_with(replace(A, nbytes=9 * GiB), worker_wait_s=20.0)
    assert ask(controller, "r1", "a", 1.0) == []
    (refuse,) = acts(controller.handle(ev.TimerFired(21.0)))
    assert refuse.error.as_wire() == InsufficientMemory("a", 9 * GiB, 8 * GiB).as_wire()
    assert controller.feasible(replace(A, nbytes=9 * GiB)).as_wire() == refuse.error.as_wire()


def test_an_idle_model_leaves_a_free_slot_beside_it_when_its_memory_is_needed():
    wide = replace(NODE, slots=2)
    big_a, big_b = replace(A, nbytes=5 * GiB), replace(B, nbytes=5 * GiB)
    controller = controller_with(big_a, big_b, workers=(wide,))
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert ask(controller, "r2", "b", 3.0) == []
    (unload,) = acts(controller.handle(ev.RequestEnded(4.0, "r1")))
    assert (unload.model, unload.cause) == ("a", "evicted")


def test_two_models_on_one_checkpoint_pin_its_memory_once():
    wide = replace(NODE, slots=2)
    twins = [replace(A, name=name, checkpoint="same", nbytes=5 * GiB) for name in "ab"]
    controller = controller_with(*twins, workers=(wide,))
    assert len(ask(controller, "r1", "a", 1.0) + ask(controller, "r2", "b", 1.0)) == 2
    controller.handle(ev.LoadFinished(2.0, "a/1", Tier.DISK))
    controller.handle(ev.RequestEnded(3.0, "r1"))
    (unload,) = acts(controller.handle(ev.ModelDeleted(4.0, "a")))
    assert unload.forget is False


def test_a_failed_second_instance_does_not_refuse_those_who_wait_for_the_first():
    wide = replace(NODE, slots=2)
    controller = controller_with(replace(A, target=1), workers=(wide,), max_requests=1)
    (first,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, first.instance, Tier.DISK))
    (second,) = ask(controller, "r2", "a", 3.0)
    assert acts(controller.handle(ev.LoadFailed(4.0, second.instance, "no memory for the cache"))) == []
    (dispatch,) = acts(controller.handle(ev.RequestEnded(5.0, "r1")))
    assert dispatch.request == "r2"


def test_new_settings_reach_instances_that_are_loaded():
    two = replace(NODE, address="tcp://two", name="1")
    for changed in (replace(A, nodes=("1",)), replace(A, variant="bfloat16")):
        controller = controller_with(A, workers=(NODE, two))
        (load,) = ask(controller, "r1", "a", 1.0)
        controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
        assert acts(controller.handle(ev.ModelDeployed(3.0, changed))) == []
        (other,) = ask(controller, "r2", "a", 4.0)
        assert other.worker == "tcp://two"
        (unload,) = acts(controller.handle(ev.RequestEnded(5.0, "r1")))
        assert (unload.instance, unload.cause) == (load.instance, "replaced")


def test_a_full_queue_refuses_nobody_whose_model_is_ready():
    controller = controller_with(A, B, max_queue=1, workers=(replace(NODE, slots=1),))
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert ask(controller, "r2", "b", 3.0) == []
    (dispatch,) = ask(controller, "r3", "a", 4.0)
    assert isinstance(dispatch, Dispatch)


def test_the_minimum_of_a_model_never_evicts_the_model_itself():
    controller = controller_with()
    minimum = replace(A, min_instances=2)
    outcome = simulate(controller, [ev.ModelDeployed(0.0, minimum)], Costs(lambda _: 1.0))
    assert [type(decision) for _, decision in outcome.decisions if not isinstance(decision, WakeAt | Chose)] == [Load]


def test_a_steady_stream_of_small_models_does_not_keep_a_large_one_out_for_ever():
    big = replace(A, name="big", n_slots=2)
    controller = controller_with(A, B, big, workers=(replace(NODE, slots=2),), patience_s=5.0)
    arrivals = [
        ev.RequestArrived(0.5 * i, RequestView(f"{'ab'[i % 2]}{i}", "ab"[i % 2], "door", 0.5 * i, 1e6)) for i in range(200)
    ]
    large = ev.RequestArrived(3.0, RequestView("large", "big", "door", 3.0, 1e6))
    outcome = simulate(controller, [*arrivals, large], Costs(lambda _: 1.8), check=check_invariants)
    assert outcome.dispatched_at["large"] < 3.0 + 5.0 + 1.8 + 2.0
    assert len(outcome.ended_at) == 201


def test_a_failed_load_tells_the_reason_backs_off_and_tries_the_other_worker_first():
    two = replace(NODE, address="tcp://two", name="1")
    controller = controller_with(A, workers=(NODE, two))
    (load,) = ask(controller, "r1", "a", 1.0)
    (retry,) = acts(controller.handle(ev.LoadFailed(2.0, load.instance, "disk on fire")))
    assert retry.worker == "tcp://two"
    (refuse,) = acts(controller.handle(ev.LoadFailed(2.5, retry.instance, "no such file")))
    assert isinstance(refuse.error, LoadFailed)
    assert "no such file" in refuse.error.message
    (refuse,) = ask(controller, "r2", "a", 2.6)
    assert isinstance(refuse.error, LoadFailed)
    (again,) = ask(controller, "r3", "a", 4.0)
    assert isinstance(again, Load)


def test_a_request_past_its_deadline_is_refused_with_the_reason():
    controller = controller_with(A)
    ask(controller, "r1", "a", 1.0, deadline_s=10.0)
    (refuse,) = acts(controller.handle(ev.TimerFired(11.0)))
    assert isinstance(refuse.error, QueueTimeout)
    assert "still loading" in refuse.error.message


def test_an_unknown_model_and_a_full_queue_are_refused():
    controller = controller_with(A, max_queue=2)
    (refuse,) = ask(controller, "r0", "nobody", 1.0)
    assert isinstance(refuse.error, ModelNotFound)
    ask(controller, "r1", "a", 1.0)
    ask(controller, "r2", "a", 1.0)
    (refuse,) = ask(controller, "r3", "a", 1.0)
    assert isinstance(refuse.error, QueueFull)


def test_deleting_a_busy_model_drains_it_and_refuses_who_waits():
    controller = controller_with(A, B, max_requests=1)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    ask(controller, "r2", "a", 3.0)
    (refuse,) = acts(controller.handle(ev.ModelDeleted(4.0, "a")))
    assert (refuse.request, type(refuse.error)) == ("r2", ModelNotFound)
    (unload,) = acts(controller.handle(ev.RequestEnded(5.0, "r1")))
    assert unload == Unload(load.instance, "a", "tcp://one", "deleted", forget=True)


def test_a_load_is_called_off_when_its_model_is_deleted_and_the_slot_goes_to_the_next_one():
    controller = controller_with(A, B)
    (load,) = ask(controller, "r1", "a", 1.0)
    ask(controller, "r2", "b", 1.1)
    decisions = acts(controller.handle(ev.ModelDeleted(1.5, "a")))
    assert [type(decision) for decision in decisions] == [Refuse, Unload]
    assert acts(controller.handle(ev.LoadFailed(1.6, load.instance, "called off"))) == []
    (next_load,) = acts(controller.handle(ev.UnloadFinished(1.7, load.instance)))
    assert next_load.model == "b"


def test_who_waits_for_a_model_that_is_replaced_is_told_to_try_again():
    controller = controller_with(A)
    ask(controller, "r1", "a", 1.0)
    refuse = acts(controller.handle(ev.ModelDeleted(1.5, "a", replaced=True)))[0]
    assert (refuse.error.http_status, refuse.request) == (503, "r1")


def test_a_returned_request_takes_its_old_place_and_the_instance_that_did_not_answer_is_replaced():
    controller = controller_with(A, max_requests=1)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    ask(controller, "r2", "a", 3.0)
    (unload,) = acts(controller.handle(ev.RequestReturned(4.0, "r1")))
    assert (unload.instance, unload.cause, unload.forget) == (load.instance, "replaced", False)
    (load,) = acts(controller.handle(ev.UnloadFinished(5.0, load.instance)))
    (dispatch,) = acts(controller.handle(ev.LoadFinished(6.0, load.instance, Tier.DISK)))
    assert dispatch.request == "r1"


def test_a_returned_request_of_a_deleted_model_is_refused_and_its_slot_is_freed():
    controller = controller_with(A, B)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    controller.handle(ev.ModelDeleted(3.0, "a"))
    refuse, unload = acts(controller.handle(ev.RequestReturned(4.0, "r1")))
    assert (type(refuse.error), unload.instance) == (ModelNotFound, load.instance)
    ask(controller, "r2", "b", 4.5)
    (load,) = acts(controller.handle(ev.UnloadFinished(5.0, unload.instance)))
    assert load.model == "b"


def test_what_was_closed_for_a_waiting_model_opens_when_that_model_is_on_its_way():
    controller = controller_with(A, B, replace(A, name="c"), workers=(replace(NODE, slots=2),), patience_s=5.0)
    loads = ask(controller, "ra", "a", 1.0) + ask(controller, "rb", "b", 1.0)
    for load in loads:
        controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    ask(controller, "rc", "c", 3.0)
    controller.handle(ev.TimerFired(9.0))
    assert ask(controller, "rb2", "b", 9.5) == []
    decisions = acts(controller.handle(ev.RequestEnded(10.0, "ra")))
    assert {type(decision): decision.model if isinstance(decision, Unload) else decision.request for decision in decisions} == {
        Unload: "a",
        Dispatch: "rb2",
    }


def test_a_front_door_that_dies_frees_what_it_held():
    controller = controller_with(A, B)
    (load,) = ask(controller, "r1", "a", 1.0, front_door="dead")
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    ask(controller, "r2", "b", 3.0, front_door="alive")
    (unload,) = acts(controller.handle(ev.FrontDoorLeft(4.0, "dead")))
    assert unload.instance == load.instance


def test_a_steady_stream_for_one_model_does_not_keep_another_out_for_ever():
    controller = controller_with(A, B, patience_s=5.0)
    stream = [ev.RequestArrived(0.5 * i, RequestView(f"a{i}", "a", "door", 0.5 * i, 0.5 * i + 1000)) for i in range(200)]
    other = ev.RequestArrived(3.0, RequestView("b", "b", "door", 3.0, 1000.0))
    outcome = simulate(controller, [*stream, other], Costs(service_s=lambda _: 2.0))
    assert outcome.dispatched_at["b"] < 3.0 + 5.0 + 2.0 + 2.0
    assert len(outcome.ended_at) == 201


def test_an_instance_kept_as_another_models_minimum_is_not_evicted():
    controller = controller_with(replace(A, min_instances=1), B)
    (load,) = [instance for instance in controller.instances.values() if instance.model == "a"]
    controller.handle(ev.LoadFinished(1.0, load.id, Tier.DISK))
    assert ask(controller, "r", "b", 2.0) == []


def test_what_can_never_leave_is_not_closed_to_newcomers_for_it():
    controller = controller_with(replace(A, min_instances=1), B, patience_s=5.0)
    (instance,) = controller.instances.values()
    controller.handle(ev.LoadFinished(1.0, instance.id, Tier.DISK))
    ask(controller, "rb", "b", 2.0)
    controller.handle(ev.TimerFired(8.0))
    (dispatch,) = ask(controller, "ra", "a", 9.0)
    assert (dispatch.request, dispatch.instance) == ("ra", instance.id)


def test_the_minimum_of_a_model_is_restored_after_a_failed_load_and_takes_the_slot_of_an_idle_one():
    controller = controller_with(replace(A, min_instances=1))
    (instance,) = controller.instances.values()
    assert wake(controller.handle(ev.LoadFailed(1.0, instance.id, "disk on fire"))) == 2.0
    (load,) = acts(controller.handle(ev.TimerFired(2.0)))
    assert load.model == "a"

    controller = controller_with(B)
    (load,) = ask(controller, "r", "b", 0.0)
    controller.handle(ev.LoadFinished(1.0, load.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(2.0, "r"))
    (unload,) = acts(controller.handle(ev.ModelDeployed(3.0, replace(A, min_instances=1))))
    assert unload.model == "b"


def test_a_fresh_instance_is_safe_for_the_minimum_residency():
    controller = controller_with(A, B, min_residency_s=10.0)
    (load,) = ask(controller, "r1", "a", 0.0)
    controller.handle(ev.LoadFinished(1.0, load.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(2.0, "r1"))
    decisions = controller.handle(ev.RequestArrived(3.0, RequestView("r2", "b", "door", 3.0, 100.0)))
    assert acts(decisions) == []
    assert wake(decisions) == 11.0
    (unload,) = acts(controller.handle(ev.TimerFired(11.0)))
    assert unload.model == "a"


def test_higher_priority_is_served_first():
    controller = controller_with(A, max_requests=1)
    (load,) = ask(controller, "first", "a", 0.0)
    ask(controller, "low", "a", 1.0)
    ask(controller, "high", "a", 2.0, priority=1)
    controller.handle(ev.LoadFinished(3.0, load.instance, Tier.DISK))
    order = [
        decision.request for i in range(2) for decision in acts(controller.handle(ev.RequestEnded(4.0 + i, ["high", "first"][i])))
    ]
    assert order == ["first", "low"]


TWO = (NODE, replace(NODE, address="tcp://two", name="1"))


def test_a_wished_load_takes_the_way_of_a_request_and_leaves_the_instance_idle():
    controller = controller_with(replace(A, keep_alive_s=30.0))
    (load,) = wish(controller, "w1", "a", 1.0)
    assert (load.model, load.worker, load.ready_in_s) == ("a", "tcp://one", 1.0)
    decisions = controller.handle(ev.LoadFinished(2.5, load.instance, Tier.DISK))
    assert acts(decisions) == [ReportLoaded("w1", load.instance, "0", waited_s=1.5, loaded_from=Tier.DISK)]
    assert wake(decisions) == 32.5  # its keep-alive runs
    assert wish(controller, "w2", "a", 3.0) == [ReportLoaded("w2", load.instance, "0", waited_s=0.0)]
    (dispatch,) = ask(controller, "r1", "a", 4.0)
    assert (dispatch.instance, dispatch.loaded_from) == (load.instance, None)


def test_a_full_instance_is_ready_all_the_same():
    controller = controller_with(A, max_requests=1)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert wish(controller, "w", "a", 3.0) == [ReportLoaded("w", load.instance, "0", waited_s=0.0)]


def test_a_load_wished_for_on_a_node_goes_there_though_the_model_is_ready_elsewhere():
    controller = controller_with(A, B, workers=TWO)
    (load,) = wish(controller, "w1", "a", 1.0, node="1")
    assert load.worker == "tcp://two"
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (load_b,) = ask(controller, "rb", "b", 3.0)
    controller.handle(ev.LoadFinished(4.0, load_b.instance, Tier.DISK))
    assert load_b.worker == "tcp://one"
    assert wish(controller, "w2", "a", 5.0, node="0") == []  # busy with the other model
    (unload,) = acts(controller.handle(ev.RequestEnded(6.0, "rb")))
    assert (unload.model, unload.cause) == ("b", "evicted")
    (second,) = acts(controller.handle(ev.UnloadFinished(6.5, load_b.instance)))
    assert (second.model, second.worker) == ("a", "tcp://one")
    (report,) = acts(controller.handle(ev.LoadFinished(7.0, second.instance, Tier.HOST)))
    assert (report.request, report.node, report.loaded_from) == ("w2", "0", Tier.HOST)


def test_loads_wished_for_on_two_nodes_are_two_and_a_request_makes_no_third():
    controller = controller_with(A, workers=TWO)
    loads = wish(controller, "w1", "a", 1.0, node="0") + wish(controller, "w2", "a", 1.0, node="1")
    assert ask(controller, "r", "a", 1.1) == []
    assert [load.worker for load in loads] == ["tcp://one", "tcp://two"]
    assert wish(controller, "w3", "a", 1.2, node="1") == []
    first = acts(controller.handle(ev.LoadFinished(2.0, loads[0].instance, Tier.DISK)))
    assert {type(decision): decision.request for decision in first} == {ReportLoaded: "w1", Dispatch: "r"}
    both = acts(controller.handle(ev.LoadFinished(3.0, loads[1].instance, Tier.DISK)))
    assert [(decision.request, decision.node) for decision in both] == [("w2", "1"), ("w3", "1")]


@pytest.mark.parametrize(
    ("model", "node", "error", "reason"),
    [
        (replace(A, nodes=("0",)), "1", InvalidRequest, "only run on its nodes 0"),
        (replace(A, max_instances=1), "1", LoadFailed, "max_instances is 1, and it is loaded on node 0"),
    ],
)
def test_a_load_that_the_deployment_forbids_is_refused_with_the_reason(model, node, error, reason):
    controller = controller_with(model, workers=TWO)
    (load,) = wish(controller, "w0", "a", 1.0, node="0")
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (refuse,) = wish(controller, "w1", "a", 3.0, node=node)
    assert (refuse.request, type(refuse.error)) == ("w1", error)
    assert reason in refuse.error.message
    assert not controller.waiting


def test_a_wished_load_that_fails_is_answered_with_the_reason_and_tried_at_once_when_wished_for_again():
    controller = controller_with(A, workers=TWO)
    (load,) = wish(controller, "w1", "a", 1.0, node="0")
    (refuse,) = acts(controller.handle(ev.LoadFailed(2.0, load.instance, "disk on fire")))
    assert isinstance(refuse.error, LoadFailed) and "disk on fire" in refuse.error.message
    (again,) = wish(controller, "w2", "a", 2.1, node="0")
    assert (again.model, again.worker) == ("a", "tcp://one")


def test_a_wish_for_a_node_that_has_left_is_refused_after_a_while_and_one_for_an_unknown_model_at_once():
    controller = controller_with(A, B, workers=TWO, worker_wait_s=20.0)
    ask(controller, "rb", "b", 0.5)
    assert wish(controller, "w1", "a", 1.0, node="0") == []
    assert acts(controller.handle(ev.WorkerLeft(2.0, "tcp://one"))) != []  # the request for b goes to the other node
    (refuse,) = acts(controller.handle(ev.TimerFired(22.0)))
    assert (refuse.request, type(refuse.error)) == ("w1", NoWorker)
    assert "nodes 0 are not connected" in refuse.error.message
    (refuse,) = wish(controller, "w2", "nobody", 23.0)
    assert isinstance(refuse.error, ModelNotFound)


def test_a_wish_waits_for_its_turn_closes_what_is_in_its_way_and_has_a_deadline():
    controller = controller_with(A, B, patience_s=5.0)
    (load,) = ask(controller, "ra", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert wish(controller, "w", "b", 3.0, deadline_s=60.0) == []
    controller.handle(ev.TimerFired(8.0))
    assert ask(controller, "ra2", "a", 9.0) == []
    (refuse,) = acts(controller.handle(ev.TimerFired(63.0)))[:1]
    assert (refuse.request, type(refuse.error)) == ("w", QueueTimeout)


def test_a_wish_takes_no_place_in_the_queue_and_counts_for_no_further_instance():
    controller = controller_with(replace(A, target=1), B, max_queue=1, workers=(replace(NODE, slots=1), replace(TWO[1], slots=1)))
    assert len(wish(controller, "w1", "a", 1.0)) == 1
    assert wish(controller, "w2", "a", 1.0) == []
    assert [type(decision) for decision in ask(controller, "rb", "b", 1.1)] == [Load]


def test_an_idle_model_is_unloaded_when_asked_and_loads_again_on_its_next_request():
    controller = controller_with(A)
    (load,) = wish(controller, "w", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert acts(controller.handle(ev.UnloadRequested(3.0, "a"))) == [Unload(load.instance, "a", "tcp://one", "asked for")]
    assert ask(controller, "r", "a", 3.1) == []
    (again,) = acts(controller.handle(ev.UnloadFinished(3.2, load.instance)))
    assert again.model == "a"


def test_a_busy_model_gets_no_new_requests_and_is_unloaded_after_its_last_one():
    controller = controller_with(A, workers=TWO)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    assert acts(controller.handle(ev.UnloadRequested(3.0, "a"))) == []
    (other,) = ask(controller, "r2", "a", 3.5)
    assert (type(other), other.worker) == (Load, "tcp://two")
    (unload,) = acts(controller.handle(ev.RequestEnded(4.0, "r1")))
    assert (unload.instance, unload.cause, unload.forget) == (load.instance, "asked for", False)


def test_unloading_on_one_node_leaves_the_others_alone():
    controller = controller_with(A, workers=TWO)
    loads = wish(controller, "w0", "a", 1.0, node="0") + wish(controller, "w1", "a", 1.0, node="1")
    for load in loads:
        controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (unload,) = acts(controller.handle(ev.UnloadRequested(3.0, "a", "1")))
    assert (unload.instance, unload.worker) == (loads[1].instance, "tcp://two")
    assert acts(controller.handle(ev.UnloadRequested(4.0, "b"))) == []


def test_unloading_calls_off_a_load_and_the_wish_for_it():
    controller = controller_with(A)
    (load,) = wish(controller, "w", "a", 1.0)
    refuse, unload = acts(controller.handle(ev.UnloadRequested(1.5, "a")))
    assert (refuse.request, type(refuse.error)) == ("w", LoadFailed)
    assert (unload.instance, unload.cause) == (load.instance, "asked for")
    assert acts(controller.handle(ev.UnloadFinished(1.6, load.instance))) == []


def test_the_best_worker_is_where_a_request_would_go_and_of_busy_ones_the_fastest():
    fast = replace(TWO[1], bytes_per_s={Tier.DISK: 2.0 * GiB})
    controller = controller_with(A, B, workers=(NODE, fast))
    assert controller.best_worker(B, 0.0) == fast
    (load,) = ask(controller, "ra", "a", 1.0)
    assert load.worker == fast.address
    assert controller.best_worker(B, 1.0) == NODE
    ask(controller, "rb", "b", 1.0)
    assert controller.best_worker(replace(B, name="c"), 1.0) == fast
    assert controller.best_worker(replace(B, nbytes=9 * GiB), 1.0) is None


def check_invariants(controller: Controller) -> None:
    """Slots are never oversold, counts agree with the requests, nobody is in two places."""
    for worker in controller.workers.values():
        taken = sum(
            instance.n_slots
            for instance in controller.instances.values()
            if instance.worker == worker.address and instance.state is not InstanceState.PLANNED
        )
        assert taken <= worker.slots
        pinned = {
            instance.checkpoint: instance.nbytes
            for instance in controller.instances.values()
            if instance.worker == worker.address and instance.state is not InstanceState.PLANNED
        }
        assert sum(pinned.values()) <= worker.host_capacity
    for instance in controller.instances.values():
        n_running = sum(request.instance == instance.id for request in controller.running.values())
        assert n_running == instance.n_requests
        assert instance.state is InstanceState.READY or n_running == 0
    assert not set(controller.waiting) & set(controller.running)


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_is_all_answered_and_slots_are_never_oversold(seed):
    rng = Random(seed)
    workers = [replace(NODE, address=f"tcp://{i}", name=str(i), slots=rng.randint(1, 3)) for i in range(rng.randint(1, 4))]
    names = "abcdefgh"
    models = [
        ModelView(
            name,
            nbytes=rng.randint(1, 4) * GiB,
            n_slots=1,
            target=rng.randint(1, 4),
            keep_alive_s=rng.choice([0.0, 5.0, -1.0]),
        )
        for name in names
    ]
    controller = controller_with(
        *models, workers=workers, max_requests=rng.choice([1, 4, 64]), min_residency_s=rng.choice([0.0, 2.0])
    )
    arrivals, now = [], 0.0
    for i in range(300):
        now += rng.expovariate(2.0)
        name = names[min(7, int(rng.paretovariate(1.0)) - 1)]
        arrivals.append(ev.RequestArrived(now, RequestView(f"r{i}", name, "door", now, now + 1e6, rng.choice([0, 0, 1]))))
    outcome = simulate(controller, arrivals, Costs(service_s=lambda _: rng.expovariate(1.0)), check=check_invariants)
    assert len(outcome.ended_at) == 300
    assert not outcome.refused
    assert not controller.waiting
    assert not controller.running


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_with_an_operator_who_loads_and_unloads_is_all_answered(seed):
    rng = Random(seed)
    workers = [replace(NODE, address=f"tcp://{i}", name=str(i), slots=rng.randint(1, 3)) for i in range(rng.randint(1, 4))]
    models = [ModelView(name, nbytes=GiB, target=rng.randint(1, 4), keep_alive_s=rng.choice([0.0, 5.0])) for name in "abcd"]
    controller = controller_with(*models, workers=workers, max_requests=rng.choice([1, 64]), patience_s=3.0)
    events, wishes, now = [], set(), 0.0
    for i in range(300):
        now += rng.expovariate(2.0)
        name, node = rng.choice("abcd"), rng.choice(["", *(worker.name for worker in workers)])
        kind = rng.random()
        if kind < 0.7:
            events.append(ev.RequestArrived(now, RequestView(f"r{i}", name, "door", now, now + 1e6)))
        elif kind < 0.9:
            wishes.add(f"w{i}")
            events.append(ev.LoadRequested(now, RequestView(f"w{i}", name, "", now, now + 1e6, load_only=True, node=node)))
        else:
            events.append(ev.UnloadRequested(now, name, node))
    outcome = simulate(controller, events, Costs(service_s=lambda _: rng.expovariate(1.0)), check=check_invariants)
    n_requests = sum(isinstance(event, ev.RequestArrived) for event in events)
    assert len(outcome.ended_at) == n_requests
    reported = {decision.request for _, decision in outcome.decisions if isinstance(decision, ReportLoaded)}
    assert reported | set(outcome.refused) == wishes and not reported & set(outcome.refused)
    assert all("unloaded it" in refuse.error.message for refuse in outcome.refused.values())
    assert not controller.waiting and not controller.running


def test_the_same_events_give_the_same_decisions():
    def run():
        controller = controller_with(A, B)
        return [
            controller.handle(event)
            for event in (
                ev.RequestArrived(1.0, RequestView("r1", "a", "door", 1.0, 100.0)),
                ev.LoadFinished(2.0, "a/1", Tier.DISK),
                ev.RequestArrived(2.5, RequestView("r2", "b", "door", 2.5, 100.0)),
                ev.RequestEnded(3.0, "r1"),
                ev.UnloadFinished(3.1, "a/1"),
            )
        ]

    assert run() == run()
    assert any(isinstance(decision, Load | Refuse) for decisions in run() for decision in decisions)


# --- what has moved --------------------------------------------------------------------------------------------------


TWO_NODES = (NODE, replace(NODE, address="tcp://two", name="1"))


def test_a_request_that_has_moved_counts_where_it_is():
    controller = controller_with(A, workers=TWO_NODES)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (second,) = wish(controller, "w1", "a", 3.0, node="1")
    controller.handle(ev.LoadFinished(4.0, second.instance, Tier.DISK))
    controller.handle(ev.RequestMoved(5.0, "r1", second.instance))
    source, destination = controller.instances[load.instance], controller.instances[second.instance]
    assert (source.n_requests, source.idle_since) == (0, 5.0)
    assert (destination.n_requests, destination.idle_since) == (1, None)
    controller.handle(ev.RequestMoved(5.5, "r1", second.instance))
    assert controller.instances[second.instance].n_requests == 1
    controller.handle(ev.RequestEnded(6.0, "r1"))
    assert controller.instances[second.instance].idle_since == 6.0
    controller.handle(ev.RequestMoved(7.0, "r1", load.instance))
    assert controller.instances[load.instance].n_requests == 0


def test_a_request_that_has_lost_its_instance_goes_on_where_most_of_it_was_computed():
    nodes = [replace(NODE, address=f"tcp://{i}", name=str(i)) for i in range(3)]
    controller = controller_with(A, workers=nodes)
    (load,) = ask(controller, "r1", "a", 1.0)
    instances = {load.worker: load.instance}
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    for i, node in enumerate(each.name for each in nodes if each.address != load.worker):
        (more,) = wish(controller, f"w{i}", "a", 3.0 + i, node=node)
        instances[more.worker] = more.instance
        controller.handle(ev.LoadFinished(3.5 + i, more.instance, Tier.DISK))
    # The one that is near has more to do than the other one.
    near, other = (address for address in instances if address != load.worker)
    for i in range(2):
        (dispatch,) = ask(controller, f"x{i}", "a", 5.0 + i)
        controller.handle(ev.RequestMoved(5.5 + i, f"x{i}", instances[near]))
    controller.handle(ev.WorkerLeft(7.0, load.worker))
    (dispatch,) = acts(controller.handle(ev.RequestReturned(7.1, "r1", near=near)))
    assert (dispatch.request, dispatch.instance) == ("r1", instances[near])
    # Without a word of it, or when that is gone, it goes where there is least to do.
    controller.handle(ev.WorkerLeft(8.0, near))
    (dispatch,) = acts(controller.handle(ev.RequestReturned(8.1, "r1", near=near)))
    assert dispatch.instance == instances[other]


def test_an_instance_that_leaves_gets_no_requests_and_is_unloaded_when_the_last_one_is_elsewhere():
    controller = controller_with(A, workers=TWO_NODES)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (second,) = wish(controller, "w1", "a", 3.0, node="1")
    controller.handle(ev.LoadFinished(4.0, second.instance, Tier.DISK))
    assert acts(controller.handle(ev.InstanceLeaves(5.0, load.instance, "moved"))) == []
    (dispatch,) = ask(controller, "r2", "a", 5.5)
    assert dispatch.instance == second.instance
    (unload,) = acts(controller.handle(ev.RequestMoved(6.0, "r1", second.instance)))
    assert unload == Unload(load.instance, "a", "tcp://one", "moved")


def test_the_instance_that_a_new_one_replaces_does_not_count_for_max_instances():
    controller = controller_with(replace(A, max_instances=1), workers=TWO_NODES)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    (refuse,) = wish(controller, "w1", "a", 3.0, node="1")
    assert isinstance(refuse, Refuse)
    instead = RequestView("w2", "a", "", 3.0, 103.0, load_only=True, node="1", replaces=load.instance)
    (second,) = acts(controller.handle(ev.LoadRequested(3.0, instead)))
    assert isinstance(second, Load) and second.worker == "tcp://two"


def test_an_instance_that_something_is_about_to_move_to_does_not_leave_as_idle():
    controller = controller_with(replace(A, keep_alive_s=0.0), workers=TWO_NODES)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    holding = RequestView("w1", "a", "", 3.0, 103.0, load_only=True, node="1", holds=True)
    (second,) = acts(controller.handle(ev.LoadRequested(3.0, holding)))
    (report,) = acts(controller.handle(ev.LoadFinished(4.0, second.instance, Tier.DISK)))
    assert report == ReportLoaded("w1", second.instance, "1", waited_s=1.0, loaded_from=Tier.DISK)
    assert acts(controller.handle(ev.TimerFired(50.0))) == []
    (unload,) = acts(controller.handle(ev.RequestMoved(51.0, "r1", second.instance)))
    assert unload.instance == load.instance
    assert acts(controller.handle(ev.RequestEnded(52.0, "w1"))) == []
    (last,) = acts(controller.handle(ev.RequestEnded(53.0, "r1")))
    assert last.instance == second.instance


def test_where_a_model_is_being_read_no_second_instance_is_loaded_for_the_same_wish():
    worker = replace(NODE, slots=3)
    controller = controller_with(replace(A, max_instances=3), B, workers=(worker,))
    (other,) = wish(controller, "w1", "b", 1.0, node="0")
    controller.handle(ev.LoadFinished(2.0, other.instance, Tier.DISK))
    (load,) = wish(controller, "w2", "a", 3.0, node="0")
    # Its bytes are in host memory by now, from where another instance is predicted to be ready at once, and a slot comes free.
    seen = ev.WorkerReported(
        3.1, worker.address, 1, {**worker.residency, "a": Tier.HOST}, {Tier.DISK: 1.0 * GiB, Tier.HOST: 1000.0 * GiB}, {}
    )
    decisions = controller.handle(seen)
    decisions += controller.handle(ev.UnloadRequested(3.2, "b"))
    decisions += controller.handle(ev.UnloadFinished(3.3, other.instance))
    assert not [each for each in decisions if isinstance(each, Load)]
    (report,) = acts(controller.handle(ev.LoadFinished(4.0, load.instance, Tier.DISK)))
    assert (report.request, report.instance) == ("w2", load.instance)
