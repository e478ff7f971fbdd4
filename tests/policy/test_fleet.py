"""Instances become more and fewer, workers come and go, and everybody's turn comes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Dispatch, Load, Unload
from sllmdask.policy.views import InstanceState, RequestView, Tier
from sllmdask.sim.run import Costs, simulate
from tests.policy.imagined import check_invariants
from tests.policy.test_controller import NODE, A, B, acts, ask, controller_with, wake, wish

C = replace(A, name="c")
NODES = [replace(NODE, address=f"tcp://{name}", name=name) for name in "0123"]


def loaded(controller, loads, at):
    return [each for load in loads for each in acts(controller.handle(ev.LoadFinished(at, load.instance, Tier.DISK)))]


def running_on(controller, instance):
    return [request.id for request in controller.running.values() if request.instance == instance]


# --- more and fewer --------------------------------------------------------------------------------------------------


def test_all_instances_that_a_burst_needs_are_begun_by_one_event_on_different_workers():
    controller = controller_with(replace(A, target=2), workers=())
    for i in range(7):
        assert ask(controller, f"r{i}", "a", 1.0) == []
    wide = replace(NODE, slots=4)
    loads = acts(controller.handle(ev.WorkerJoined(2.0, wide)))
    assert [(type(load), load.worker) for load in loads] == [(Load, wide.address)] * 4
    assert [load.ready_in_s for load in loads] == [1.0] * 4  # the bytes are read once
    controller = controller_with(replace(A, target=2), workers=[replace(node, slots=2) for node in NODES])
    loads = [load for i in range(7) for load in ask(controller, f"r{i}", "a", 1.0)]
    assert sorted(load.worker for load in loads) == [node.address for node in NODES]


def scaled_up(keep_alive_s=30.0, **settings) -> tuple[Controller, list[Load]]:
    """Three instances with 3, 2 and 1 requests, of which each is worth an instance."""
    model = replace(A, target=1, max_instances=3, keep_alive_s=keep_alive_s)
    controller = controller_with(model, workers=NODES, **settings)
    loads = [load for i in range(3) for load in ask(controller, f"r{i}", "a", 1.0)]
    loaded(controller, loads, 2.0)
    for i in range(3, 9):
        ask(controller, f"r{i}", "a", 3.0)
    first, second, third = (load.instance for load in loads)
    assert [len(running_on(controller, load.instance)) for load in loads] == [3, 3, 3]
    for gone in (*running_on(controller, second)[:1], *running_on(controller, third)[:2]):
        controller.handle(ev.RequestEnded(4.0, gone))
    controller.handle(ev.ModelDeployed(5.0, replace(model, target=4)))
    assert [len(running_on(controller, each)) for each in (first, second, third)] == [3, 2, 1]
    return controller, loads


def test_after_the_keep_alive_the_instance_with_the_fewest_requests_is_closed_and_leaves_when_it_is_empty():
    controller, loads = scaled_up()
    third = loads[2].instance
    assert controller.timers.first() == 35.0
    assert acts(controller.handle(ev.TimerFired(34.9))) == [] and not controller.instances[third].draining
    controller.handle(ev.TimerFired(35.0))
    assert [controller.instances[load.instance].draining for load in loads] == ["", "", "scaled down"]
    (dispatch,) = ask(controller, "new", "a", 35.5)
    assert dispatch.instance == loads[1].instance
    (last,) = running_on(controller, third)
    (unload,) = acts(controller.handle(ev.RequestEnded(36.0, last)))
    assert unload == Unload(third, "a", loads[2].worker, "scaled down")


def test_an_instance_that_was_closed_opens_again_when_there_is_work_for_it():
    controller, loads = scaled_up()
    controller.handle(ev.TimerFired(35.0))
    more = [each for i in range(4) for each in ask(controller, f"new{i}", "a", 36.0)]
    assert {type(each) for each in more} == {Dispatch}
    assert loads[2].instance in {each.instance for each in more}
    assert not controller.instances[loads[2].instance].draining


def test_a_short_lull_closes_nothing():
    controller, loads = scaled_up()
    for i in range(3):
        ask(controller, f"more{i}", "a", 20.0)  # 9 requests want three instances of four
    for i in range(3):
        controller.handle(ev.RequestEnded(21.0, f"more{i}"))
    assert controller.timers.first() == 51.0
    controller.handle(ev.TimerFired(40.0))
    assert not any(controller.instances[load.instance].draining for load in loads)


def test_models_that_are_kept_for_ever_are_not_scaled_down():
    controller, _ = scaled_up(keep_alive_s=-1.0)
    controller.handle(ev.TimerFired(1e6 - 1))
    assert not any(each.draining for each in controller.instances.values())


def test_a_lower_maximum_acts_at_once_on_those_with_the_fewest_requests():
    controller, loads = scaled_up()
    decisions = acts(controller.handle(ev.ModelDeployed(6.0, replace(A, target=1, max_instances=1))))
    assert decisions == []
    assert [bool(controller.instances[load.instance].draining) for load in loads] == [False, True, True]
    (last,) = running_on(controller, loads[2].instance)
    (unload,) = acts(controller.handle(ev.RequestEnded(7.0, last)))
    assert (unload.instance, unload.cause) == (loads[2].instance, "max_instances")
    idle, _ = scaled_up()
    for request in list(idle.running):
        idle.handle(ev.RequestEnded(6.0, request))
    unloads = acts(idle.handle(ev.ModelDeployed(7.0, replace(A, max_instances=1, keep_alive_s=30.0))))
    assert [type(each) for each in unloads] == [Unload, Unload]


def test_a_lower_maximum_calls_off_loads_first():
    controller = controller_with(replace(A, target=1, max_instances=3), workers=NODES)
    loads = [load for i in range(3) for load in ask(controller, f"r{i}", "a", 1.0)]
    loaded(controller, loads[1:2], 2.0)
    unloads = acts(controller.handle(ev.ModelDeployed(2.5, replace(A, target=1, max_instances=1))))
    assert {each.instance for each in unloads} == {loads[0].instance, loads[2].instance}
    assert controller.instances[loads[1].instance].state is InstanceState.READY


def test_a_shorter_keep_alive_reaches_those_that_are_idle_already():
    controller = controller_with(replace(A, keep_alive_s=300.0))
    (load,) = ask(controller, "r", "a", 1.0)
    loaded(controller, [load], 2.0)
    assert wake(controller.handle(ev.RequestEnded(5.0, "r"))) == 305.0
    assert wake(controller.handle(ev.ModelDeployed(6.0, replace(A, keep_alive_s=10.0)))) == 15.0
    assert [type(each) for each in acts(controller.handle(ev.TimerFired(15.0)))] == [Unload]


def test_a_pinned_model_gives_way_to_nobody_until_it_is_unpinned():
    controller = controller_with(replace(A, pinned=True), B, patience_s=5.0)
    (load,) = ask(controller, "ra", "a", 0.0)
    loaded(controller, [load], 1.0)
    controller.handle(ev.RequestEnded(2.0, "ra"))
    assert ask(controller, "rb", "b", 3.0) == []
    assert acts(controller.handle(ev.TimerFired(9.0))) == []
    assert [each.request for each in ask(controller, "ra2", "a", 9.5)] == ["ra2"]  # nor is it closed for others
    controller.handle(ev.RequestEnded(10.0, "ra2"))
    (unload,) = acts(controller.handle(ev.ModelDeployed(11.0, A)))
    assert (unload.model, unload.cause) == ("a", "evicted")


# --- workers come and go ---------------------------------------------------------------------------------------------


def test_a_worker_that_joins_later_gets_what_was_promised_or_wished_for_on_it():
    promised = replace(A, min_instances=1, nodes=("3",))
    controller = controller_with(promised, B, workers=NODES[:1])
    assert not controller.instances
    assert wish(controller, "w", "b", 1.0, node="2") == []
    (load,) = acts(controller.handle(ev.WorkerJoined(2.0, NODES[3])))
    assert (load.model, load.worker) == ("a", "tcp://3")
    (load,) = acts(controller.handle(ev.WorkerJoined(3.0, NODES[2])))
    assert (load.model, load.worker) == ("b", "tcp://2")


def test_a_worker_that_joins_takes_what_waits_for_a_slot():
    controller = controller_with(A, B, C, workers=NODES[:1])
    (load,) = ask(controller, "ra", "a", 1.0)
    loaded(controller, [load], 2.0)
    ask(controller, "rb", "b", 3.0)
    ask(controller, "rc", "c", 4.0)
    (load,) = acts(controller.handle(ev.WorkerJoined(5.0, NODES[1])))
    assert (load.model, load.worker) == ("b", "tcp://1")
    (load,) = acts(controller.handle(ev.WorkerJoined(6.0, NODES[2])))
    assert (load.model, load.worker) == ("c", "tcp://2")


def test_what_was_planned_on_a_worker_that_leaves_is_placed_elsewhere():
    controller = controller_with(A, B, C, workers=NODES[:2])
    loads = ask(controller, "rb", "b", 0.0) + ask(controller, "rc", "c", 0.0)
    loaded(controller, loads, 1.0)
    controller.handle(ev.RequestEnded(2.0, "rb"))
    controller.handle(ev.RequestEnded(2.5, "rc"))
    (unload,) = ask(controller, "ra", "a", 3.0)
    assert unload.worker == loads[0].worker
    (other,) = acts(controller.handle(ev.WorkerLeft(3.1, unload.worker)))
    assert (type(other), other.instance) == (Unload, loads[1].instance)
    (load,) = acts(controller.handle(ev.UnloadFinished(3.2, other.instance)))
    assert (load.model, load.worker) == ("a", loads[1].worker)


def test_an_instance_that_its_workers_account_does_not_list_is_gone_unless_it_is_too_new_to_be_listed():
    def report(at, version, *instances):
        return ev.WorkerReported(at, NODE.address, version, NODE.residency, NODE.bytes_per_s, {}, None, frozenset(instances))

    controller = controller_with(A)
    (load,) = ask(controller, "r1", "a", 1.0)
    controller.handle(report(1.5, 1))
    loaded(controller, [load], 2.0)
    controller.handle(report(3.0, 2))
    assert load.instance in controller.instances
    controller.handle(report(3.5, 3, load.instance))
    assert acts(controller.handle(ev.TimerFired(7.0))) == [] and load.instance in controller.instances
    controller.handle(report(8.0, 4))
    assert controller.instances == {}
    (again,) = acts(controller.handle(ev.RequestReturned(8.1, "r1")))
    assert (type(again), again.model) == (Load, "a")
    loaded(controller, [again], 9.0)
    controller.handle(report(9.5, 5))
    controller.handle(ev.TimerFired(14.0))
    assert controller.instances == {}, "nothing has listed it since"


def test_a_report_without_a_list_of_instances_drops_none():
    controller = controller_with(A)
    (load,) = ask(controller, "r1", "a", 1.0)
    loaded(controller, [load], 2.0)
    controller.handle(ev.WorkerReported(99.0, NODE.address, 1, {}, {}))
    assert load.instance in controller.instances


# --- turns -----------------------------------------------------------------------------------------------------------


def test_slots_that_come_free_go_to_models_in_the_order_in_which_they_were_asked_for():
    models = [replace(A, name=name) for name in "abcdef"]
    controller = controller_with(*models)
    served, outcome = [], None
    order = "acfbed"
    arrivals = [
        ev.RequestArrived(0.01 * i, RequestView(f"{name}{i}", name, "door", 0.01 * i, 1e6)) for i, name in enumerate(order * 3)
    ]
    outcome = simulate(controller, arrivals, Costs(lambda _: 1.0), check=check_invariants)
    for request in sorted(outcome.dispatched_at, key=lambda each: outcome.dispatched_at[each]):
        if request[0] not in served:
            served.append(request[0])
    assert served == list(order)


def test_a_second_instance_waits_for_the_turn_of_the_one_who_needs_it():
    model = replace(A, target=1)
    controller = controller_with(model, B, C, workers=(), max_requests=1)
    for at, name in enumerate("abaca"):
        ask(controller, f"r{at}", name, float(at))
    begun = []
    for i, node in enumerate(NODES):
        begun += [load.model for load in acts(controller.handle(ev.WorkerJoined(10.0 + i, node)))]
    assert begun == ["a", "b", "a", "c"]


def test_a_higher_class_gets_the_slot_before_those_who_wait_longer():
    controller = controller_with(A, B, C)
    (load,) = ask(controller, "ra", "a", 0.0)
    loaded(controller, [load], 1.0)
    ask(controller, "rb", "b", 2.0)
    ask(controller, "rc", "c", 3.0, priority=1)
    (unload,) = acts(controller.handle(ev.RequestEnded(4.0, "ra")))
    (load,) = acts(controller.handle(ev.UnloadFinished(4.1, unload.instance)))
    assert load.model == "c"


@pytest.mark.parametrize("max_requests", [1, 2, 64])
def test_in_a_game_of_ping_pong_nobody_waits_for_longer_than_patience_and_the_turns_before(max_requests):
    service_s, patience_s, load_s = 1.5, 4.0, 1.0
    controller = controller_with(A, B, C, patience_s=patience_s, max_requests=max_requests)
    calls = "abaacab" * 12
    # No faster than one slot can serve them: what is late is late by the turns, not by the load.
    pause_s = 4.0 if max_requests == 1 else 1.0
    arrivals = [
        ev.RequestArrived(pause_s * i, RequestView(f"{name}{i}", name, "door", pause_s * i, 1e6)) for i, name in enumerate(calls)
    ]
    outcome = simulate(controller, arrivals, Costs(lambda _: service_s), check=check_invariants)
    waits = {each: outcome.dispatched_at[each] - pause_s * int(each[1:]) for each in outcome.dispatched_at}
    assert len(waits) == len(calls) == len(outcome.ended_at)
    # Two other models may have their turn before: each is loaded, is closed after the patience, and ends its last requests.
    turn_s = patience_s + load_s + 2 * service_s
    assert max(waits.values()) <= 3 * turn_s
    for model in "abc":
        assert max(wait for each, wait in waits.items() if each[0] == model) <= 3 * turn_s


def test_one_of_a_class_that_needs_two_slots_is_not_starved_by_those_that_need_one():
    big = replace(A, name="big", n_slots=2)
    controller = controller_with(B, C, big, workers=(replace(NODE, slots=2),), patience_s=3.0)
    arrivals = [
        ev.RequestArrived(0.7 * i, RequestView(f"{'bc'[i % 2]}{i}", "bc"[i % 2], "door", 0.7 * i, 1e6)) for i in range(80)
    ]
    arrivals += [ev.RequestArrived(at, RequestView(f"big{at}", "big", "door", at, 1e6)) for at in (5.0, 25.0)]
    outcome = simulate(controller, arrivals, Costs(lambda _: 2.0), check=check_invariants)
    for at in (5.0, 25.0):
        assert outcome.dispatched_at[f"big{at}"] <= at + 3.0 + 2.0 + 2.0
    assert len(outcome.ended_at) == 82


def test_more_models_wait_than_one_event_looks_at_and_all_are_served():
    models = [replace(A, name=f"m{i}") for i in range(60)]
    wide = replace(NODE, slots=60, host_capacity=100 * A.nbytes)
    controller = controller_with(*models, workers=())
    arrivals = [ev.RequestArrived(1.0, RequestView(f"r{i:02}", f"m{i}", "door", 1.0, 1e6)) for i in range(60)]
    outcome = simulate(controller, [*arrivals, ev.WorkerJoined(2.0, wide)], Costs(lambda _: 1.0), check=check_invariants)
    assert len(outcome.ended_at) == 60
    begun = [(at, decision.model) for at, decision in outcome.decisions if isinstance(decision, Load)]
    assert begun == [(2.0, f"m{i}") for i in range(60)], "in their turns, and at once"
