"""Each way to serve a request wins where it is the soonest; records say why; plans that move or preempt what is in the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sllmdask.errors import ConfigError
from sllmdask.policy import events as ev
from sllmdask.policy.choice import Way
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Chose, Dispatch, Load, Migrate, Preempt, Unload
from sllmdask.policy.options import NO_MIGRATION, NO_PREEMPTION
from sllmdask.policy.records import N_BEST
from sllmdask.policy.views import InstanceState, ModelView, RequestView, Tier, WorkerView
from tests.policy.test_controller import NODE, A, B, GiB, acts, ask, controller_with, wish

#: Host memory 8 GiB/s, disk 1 GiB/s, what comes from elsewhere 0.2 GiB/s; every model is 1 GiB.
RATES = {Tier.HOST: 8.0 * GiB, Tier.DISK: 1.0 * GiB, Tier.PEER: 0.2 * GiB, Tier.REMOTE: 0.2 * GiB}
C = replace(A, name="c")


def node(name: str, slots: int = 1, **residency: Tier) -> WorkerView:
    return WorkerView(f"tcp://{name}", name, slots, 64 * GiB, residency=residency, bytes_per_s=RATES)


def request(request_id: str, model: str, at: float, priority: int = 0) -> ev.RequestArrived:
    return ev.RequestArrived(at, RequestView(request_id, model, "door", at, at + 100.0, priority))


def records(decisions):
    return [decision.choice for decision in decisions if isinstance(decision, Chose)]


def loaded(controller, load, at, loaded_from=Tier.DISK):
    return controller.handle(ev.LoadFinished(at, load.instance, loaded_from))


def busy(controller, model, request_id, at):
    """An instance of `model` that works on one request, loaded wherever that is soonest."""
    (load,) = ask(controller, request_id, model, at)
    loaded(controller, load, at + 0.5)
    return load


def test_a_live_instance_with_room_wins_against_all():
    controller = controller_with(A, workers=(node("0", a=Tier.DISK), node("1", a=Tier.HOST)))
    load = busy(controller, "a", "r1", 0.0)
    (chose,) = records(decisions := controller.handle(request("r2", "a", 2.0)))
    assert (chose.chosen.way, chose.chosen.instance, chose.chosen.ready_in_s) == (Way.LIVE, load.instance, 0.0)
    assert [type(decision) for decision in acts(decisions)] == [Dispatch]


def test_an_instance_that_is_being_loaded_wins_against_beginning_anew():
    controller = controller_with(A, workers=(node("0", a=Tier.DISK), node("1", a=Tier.DISK)))
    ask(controller, "r1", "a", 0.0)
    (chose,) = records(decisions := controller.handle(request("r2", "a", 0.4)))
    assert acts(decisions) == []
    assert (chose.chosen.way, chose.chosen.ready_in_s, chose.chosen.node) == (Way.COMING, pytest.approx(0.6), "0")
    (other,) = [option for option in chose.options if option.way is Way.FREE]
    assert (other.node, other.ready_in_s, other.lost) == ("1", pytest.approx(1.0), "400 ms slower")


def test_a_free_slot_wins_and_its_parts_add_up():
    controller = controller_with(A, workers=(node("0", a=Tier.DISK), node("1", a=Tier.HOST)))
    decisions = controller.handle(request("r1", "a", 0.0))
    (chose,) = records(decisions)
    assert (chose.chosen.way, chose.chosen.node, chose.chosen.tier) == (Way.FREE, "1", Tier.HOST)
    assert all(sum(option.parts.values()) == pytest.approx(option.ready_in_s) for option in chose.options)
    assert [(option.node, option.ready_in_s) for option in chose.options] == [("1", 0.125), ("0", 1.0)]
    assert [type(decision) for decision in decisions[:2]] == [Chose, Load]


def test_an_idle_instance_is_evicted_where_that_is_the_soonest():
    controller = controller_with(A, B, workers=(node("0", a=Tier.HOST, b=Tier.HOST), node("1", a=Tier.DISK)))
    load = busy(controller, "b", "rb", 0.0)
    controller.handle(ev.RequestEnded(2.0, "rb"))
    (chose,) = records(decisions := controller.handle(request("ra", "a", 3.0)))
    assert (chose.chosen.way, chose.chosen.node, chose.chosen.leaving) == (Way.EVICT, "0", ((load.instance, ""),))
    assert acts(decisions) == [Unload(load.instance, "b", "tcp://0", "evicted")]


def test_of_equally_fast_evictions_that_of_the_model_that_was_not_used_for_longest_is_taken():
    controller = controller_with(A, B, C, workers=(node("0", b=Tier.HOST), node("1", c=Tier.HOST)))
    for i, model in enumerate("bc"):
        busy(controller, model, f"r{model}", float(i))
    controller.handle(ev.RequestEnded(4.0, "rc"))
    controller.handle(ev.RequestEnded(5.0, "rb"))
    (unload,) = ask(controller, "ra", "a", 6.0)
    assert unload.model == "c"


def test_a_full_instance_is_waited_for_when_its_requests_are_known_to_be_short():
    workers = (node("0", a=Tier.HOST), node("1"))
    controller = controller_with(replace(A, max_instances=4), workers=workers, max_requests=1)
    (load,) = ask(controller, "r", "a", 0.0)
    loaded(controller, load, 0.2)
    controller.handle(ev.RequestEnded(0.5, "r"))
    ask(controller, "r1", "a", 1.0)
    (chose,) = records(decisions := controller.handle(request("r2", "a", 1.1)))
    assert acts(decisions) == []
    assert (chose.chosen.way, chose.chosen.instance) == (Way.WAIT, load.instance)
    assert chose.chosen.ready_in_s == pytest.approx(0.2)  # requests take 0.3 s, and 0.1 s are over
    assert {(option.way, option.node) for option in chose.options} == {(Way.WAIT, "0"), (Way.FREE, "1")}
    (dispatch,) = acts(decisions := controller.handle(ev.RequestEnded(1.3, "r1")))
    assert (dispatch.request, records(decisions)) == ("r2", [])  # it is what it waited for


def test_a_request_that_waits_for_an_end_that_does_not_come_has_waited_for_no_longer_than_loading_takes():
    controller = controller_with(replace(A, max_instances=4), workers=(node("0", a=Tier.HOST), node("1")), max_requests=1)
    (load,) = ask(controller, "r", "a", 0.0)
    loaded(controller, load, 0.2)
    controller.handle(ev.RequestEnded(0.5, "r"))
    ask(controller, "r1", "a", 1.0)
    controller.handle(request("r2", "a", 1.1))
    at, begun = 1.1, []
    while not begun:
        at = controller.timers.first()
        assert at < 1000.0
        begun = acts(controller.handle(ev.TimerFired(at)))
    assert [(type(each), each.worker) for each in begun] == [(Load, "tcp://1")]
    assert at == pytest.approx(1.1 + 5.0)


#: Node 0 has model a in memory and works on b; node 1 is free, has b in memory, and a would come slowly.
CROWDED = (node("0", a=Tier.HOST, b=Tier.HOST), node("1", b=Tier.HOST))


def crowded(**settings) -> tuple[Controller, Load]:
    first = node("1")
    controller = controller_with(A, B, workers=(CROWDED[0],), **settings)
    load = busy(controller, "b", "rb", 0.0)
    assert load.worker != first.address
    controller.handle(ev.WorkerJoined(1.0, CROWDED[1]))
    return controller, load


def test_running_instances_move_away_where_that_is_the_soonest():
    controller, load = crowded(can_migrate=True)
    chose, migrate = controller.handle(request("ra", "a", 2.0))[:2]
    option = chose.choice.chosen
    # b is loaded on node 1 from memory in 0.125 s and its request is computed again in 0.1 s; then a is loaded in 0.125 s.
    assert (option.way, option.node, option.ready_in_s) == (Way.MIGRATE, "0", pytest.approx(0.35))
    assert option.leaving == ((load.instance, "tcp://1"),)
    assert (migrate.instance, migrate.worker, migrate.destination) == (load.instance, "tcp://0", "tcp://1")
    assert migrate.moved_in_s == pytest.approx(0.225)
    assert ask(controller, "rb2", "b", 2.1) == []  # what moves takes nobody new
    decisions = acts(controller.handle(ev.InstanceMigrated(2.3, load.instance, migrate.successor, Tier.HOST)))
    assert [(type(each), each.model) for each in decisions if isinstance(each, Load)] == [(Load, "a")]
    assert [each.instance for each in decisions if isinstance(each, Dispatch)] == [migrate.successor]
    moved = controller.instances[migrate.successor]
    assert (moved.worker, moved.n_requests, controller.running["rb"].instance) == ("tcp://1", 2, moved.id)
    controller.handle(ev.RequestEnded(3.0, "rb"))
    assert controller.instances[moved.id].n_requests == 1


def test_without_the_mechanism_moving_and_preempting_are_told_as_lost_and_never_decided():
    controller, _ = crowded()
    (chose,) = records(decisions := controller.handle(request("ra", "a", 2.0, priority=1)))
    assert {option.way: option.lost for option in chose.options if option.way in (Way.MIGRATE, Way.PREEMPT)} == {
        Way.MIGRATE: NO_MIGRATION,
        Way.PREEMPT: NO_PREEMPTION,
    }
    assert chose.chosen.way is Way.FREE
    assert [(type(each), each.worker) for each in acts(decisions)] == [(Load, "tcp://1")]


def test_a_move_that_fails_leaves_everything_as_it_was_and_another_way_is_found():
    controller, load = crowded(can_migrate=True)
    _, migrate = controller.handle(request("ra", "a", 2.0))[:2]
    decisions = controller.handle(ev.MigrationFailed(2.5, load.instance, migrate.successor, "no memory there"))
    (chose,) = records(decisions)
    assert (chose.request, chose.chosen.way, chose.chosen.node) == ("ra", Way.FREE, "1")
    assert [(type(each), each.model, each.worker) for each in acts(decisions)] == [(Load, "a", "tcp://1")]
    assert set(controller.instances) == {load.instance, acts(decisions)[0].instance}
    assert controller.instances[load.instance].n_requests == 1
    assert [each.request for each in ask(controller, "rb2", "b", 2.6)] == ["rb2"]


def test_when_the_destination_of_a_move_leaves_its_plan_is_dropped_and_the_request_waits_again():
    controller, load = crowded(can_migrate=True)
    controller.handle(request("ra", "a", 2.0))
    (chose,) = records(controller.handle(ev.WorkerLeft(2.1, "tcp://1")))
    assert (chose.request, chose.chosen.way) == ("ra", Way.WAIT)
    assert set(controller.instances) == {load.instance}
    (unload,) = acts(controller.handle(ev.RequestEnded(3.0, "rb")))
    assert unload.instance == load.instance


def test_when_those_have_left_for_whom_something_moves_nothing_is_loaded_in_its_place():
    controller, load = crowded(can_migrate=True)
    _, migrate = controller.handle(request("ra", "a", 2.0))[:2]
    controller.handle(ev.RequestEnded(2.1, "ra"))
    assert acts(controller.handle(ev.InstanceMigrated(2.3, load.instance, migrate.successor, Tier.HOST))) == []
    assert set(controller.instances) == {migrate.successor}


def test_an_instance_whose_worker_dies_on_the_way_takes_its_successor_along():
    controller, load = crowded(can_migrate=True)
    _, migrate = controller.handle(request("ra", "a", 2.0))[:2]
    decisions = acts(controller.handle(ev.WorkerLeft(2.1, "tcp://0")))
    assert [each.instance for each in decisions if isinstance(each, Unload)] == [migrate.successor]
    controller.handle(ev.MigrationFailed(2.2, load.instance, migrate.successor, "the source is gone"))
    controller.handle(ev.UnloadFinished(2.3, migrate.successor))
    assert [each.model for each in controller.instances.values()] == ["a"]


def test_two_slots_are_freed_by_the_cheapest_set_of_moves():
    big = replace(A, name="big", n_slots=2)
    crowd = [replace(A, name=name) for name in "bcd"]
    full = node("0", 3, big=Tier.HOST, **dict.fromkeys("bcd", Tier.HOST))
    controller = controller_with(big, *crowd, workers=(full,), can_migrate=True)
    loads = {name: busy(controller, name, f"r{name}", float(i)) for i, name in enumerate("bcd")}
    # b comes from disk there, c and d from memory: those two are cheaper to move.
    controller.handle(ev.WorkerJoined(5.0, node("1", 1, b=Tier.DISK, c=Tier.HOST, d=Tier.HOST)))
    controller.handle(ev.WorkerJoined(5.0, node("2", 1, b=Tier.DISK, c=Tier.HOST, d=Tier.HOST)))
    decisions = acts(controller.handle(request("rbig", "big", 6.0)))
    assert {(type(each), each.instance) for each in decisions} == {(Migrate, loads[name].instance) for name in "cd"}
    assert {each.destination for each in decisions} == {"tcp://1", "tcp://2"}
    first, second = decisions
    assert acts(controller.handle(ev.InstanceMigrated(6.3, first.instance, first.successor, Tier.HOST))) == []
    (load,) = acts(controller.handle(ev.InstanceMigrated(6.4, second.instance, second.successor, Tier.HOST)))
    assert (load.model, load.worker) == ("big", "tcp://0")


def test_a_lower_class_is_preempted_and_comes_back_in_its_turn():
    controller = controller_with(A, B, workers=(node("0", a=Tier.HOST, b=Tier.HOST),), can_preempt=True)
    load = busy(controller, "b", "rb", 0.0)
    assert acts(controller.handle(request("same", "a", 1.0))) == []  # one of the same class waits
    *told, preempt = controller.handle(request("ra", "a", 2.0, priority=1))[:3]
    # Who waits for the same is told, too.
    assert [(each.request, each.chosen.way) for each in records(told)] == [("ra", Way.PREEMPT), ("same", Way.PREEMPT)]
    assert preempt == Preempt(load.instance, "tcp://0", ("rb",), "makes room for a")
    (unload,) = acts(controller.handle(ev.RequestReturned(2.1, "rb")))
    assert unload.instance == load.instance
    (load_a,) = acts(controller.handle(ev.UnloadFinished(2.2, load.instance)))
    dispatched = [each.request for each in acts(loaded(controller, load_a, 2.4))]
    assert dispatched == ["ra", "same"]
    controller.handle(ev.RequestEnded(3.0, "ra"))
    (unload,) = acts(controller.handle(ev.RequestEnded(3.1, "same")))
    (load_b,) = acts(controller.handle(ev.UnloadFinished(3.2, unload.instance)))
    assert [each.request for each in acts(loaded(controller, load_b, 3.4))] == ["rb"]


def test_one_request_of_a_lower_class_gives_way_on_a_full_instance_of_the_same_model():
    controller = controller_with(replace(A, max_instances=1), workers=(node("0", a=Tier.HOST),), max_requests=2, can_preempt=True)
    load = busy(controller, "a", "r1", 0.0)
    ask(controller, "r2", "a", 1.0)
    assert ask(controller, "r3", "a", 1.5) == []
    (preempt,) = ask(controller, "high", "a", 2.0, priority=1)
    assert preempt == Preempt(load.instance, "tcp://0", ("r2",), "a request of class 1 waits")
    assert acts(controller.handle(ev.TimerFired(2.25))) == []  # it is asked for once
    assert [each.request for each in acts(controller.handle(ev.RequestReturned(2.3, "r2")))] == ["high"]
    assert controller.instances[load.instance].state is InstanceState.READY
    assert [each.request for each in acts(controller.handle(ev.RequestEnded(3.0, "high")))] == ["r2"]


def test_a_copy_in_memory_beats_one_on_disk_until_loads_that_were_promised_there_make_it_slower():
    others = [replace(A, name=f"m{i}", nodes=("1",)) for i in range(9)]
    host = node("1", 16, a=Tier.HOST, **{other.name: Tier.HOST for other in others})
    for n_before, where in ((0, "tcp://1"), (6, "tcp://1"), (8, "tcp://0")):
        controller = controller_with(A, *others, workers=(node("0", a=Tier.DISK), host))
        loads = [ask(controller, f"r{i}", f"m{i}", 0.0)[0] for i in range(n_before)]
        assert [load.ready_in_s for load in loads] == [pytest.approx(0.125 * (i + 1)) for i in range(n_before)]
        (load,) = ask(controller, "ra", "a", 0.0)
        assert load.worker == where, n_before
    controller = controller_with(A, *others, workers=(node("0", a=Tier.DISK), host))
    loads = [ask(controller, f"r{i}", f"m{i}", 0.0)[0] for i in range(8)]
    for load in loads[:2]:
        loaded(controller, load, 0.01, Tier.HOST)  # sooner than predicted: the queue is shorter
    (load,) = ask(controller, "ra", "a", 0.01)
    assert (load.worker, load.ready_in_s) == ("tcp://1", pytest.approx(7 * 0.125))
    assert len(controller.instances) == 9, "nobody's load is begun a second time because those before it were quick"


def test_loads_that_begin_at_once_spread_over_disks_instead_of_halving_one():
    workers = [node("0", 2, a=Tier.DISK, b=Tier.DISK), node("1", 2, a=Tier.DISK, b=Tier.DISK)]
    controller = controller_with(A, B, workers=workers)
    assert [ask(controller, "ra", "a", 0.0)[0].worker, ask(controller, "rb", "b", 0.0)[0].worker] == ["tcp://0", "tcp://1"]


def test_a_model_is_sent_by_a_worker_that_has_it_where_nothing_nearer_is():
    fast_link = {**RATES, Tier.PEER: 0.5 * GiB}
    holder = replace(node("0", a=Tier.DISK, b=Tier.DISK), bytes_per_s=fast_link)
    controller = controller_with(A, B, workers=(holder,))
    busy(controller, "b", "rb", 0.0)
    controller.handle(ev.WorkerJoined(1.0, replace(node("1"), bytes_per_s=fast_link)))
    (chose,) = records(controller.handle(request("ra", "a", 2.0)))
    assert (chose.chosen.node, chose.chosen.tier, chose.chosen.ready_in_s) == ("1", Tier.PEER, pytest.approx(2.0))


def test_everybody_who_waits_has_one_record_until_what_is_waited_for_changes():
    controller = controller_with(A, B, workers=(node("0", a=Tier.DISK, b=Tier.DISK),))
    decisions = controller.handle(request("r1", "a", 0.0))
    decisions += controller.handle(request("r2", "a", 0.1))
    assert [(each.request, each.chosen.way) for each in records(decisions)] == [("r1", Way.FREE), ("r2", Way.COMING)]
    (load,) = acts(decisions)
    assert records(controller.handle(ev.TimerFired(0.5))) == []
    assert records(loaded(controller, load, 1.0)) == []  # the instance that they were told of
    (waits,) = records(controller.handle(request("rb", "b", 1.1)))
    assert (waits.chosen.way, waits.chosen.instance) == (Way.WAIT, load.instance)
    assert records(controller.handle(request("r3", "a", 1.2)))[0].request == "r3"
    assert records(controller.handle(ev.RequestEnded(1.3, "r1"))) == []
    controller.handle(ev.RequestEnded(1.4, "r2"))
    (evicts,) = records(controller.handle(ev.RequestEnded(1.5, "r3")))
    assert (evicts.request, evicts.chosen.way) == ("rb", Way.EVICT)


def test_records_are_short_in_a_large_cluster_and_say_how_much_was_left_out():
    large = [node(f"{i:03}", a=Tier.DISK) for i in range(40)]
    small = [replace(node(f"x{i:03}", a=Tier.HOST), host_capacity=GiB // 2) for i in range(40)]
    controller = controller_with(A, workers=(*large, *small))
    (chose,) = records(controller.handle(request("r", "a", 0.0)))
    assert (len(chose.options), chose.n_more) == (N_BEST, 40 - N_BEST)
    assert chose.options[0] == chose.chosen and chose.chosen.node == "000"
    assert all(option.lost == "no faster" for option in chose.options[1:])
    assert len(chose.unfit) == N_BEST and all("memory" in reason for reason in chose.unfit.values())


def test_nobody_is_disturbed_for_a_model_that_is_coming():
    controller = controller_with(A, B, workers=(node("0", b=Tier.HOST, a=Tier.HOST), node("1", a=Tier.DISK)))
    busy(controller, "b", "rb", 0.0)
    ask(controller, "r1", "a", 1.0)
    controller.handle(ev.RequestEnded(1.1, "rb"))
    (chose,) = records(controller.handle(request("r2", "a", 1.2)))
    assert chose.chosen.way is Way.COMING
    (evict,) = [option for option in chose.options if option.way is Way.EVICT]
    assert evict.ready_in_s < chose.chosen.ready_in_s and "nobody is disturbed" in evict.lost


def test_a_wished_load_is_recorded_too():
    controller = controller_with(A, workers=(node("0", a=Tier.DISK),))
    (load,) = wish(controller, "w", "a", 0.0)
    assert load.model == "a"


def test_an_unknown_chooser_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'quickest' is not known; choose one of .*fastest"):
        Controller(ControllerSettings(chooser="quickest"))


def test_a_node_limited_model_tells_why_others_are_out():
    controller = controller_with(ModelView("a", GiB, nodes=("1",)), workers=(node("0"), node("1")))
    (chose,) = records(controller.handle(request("r", "a", 0.0)))
    assert dict(chose.unfit) == {"tcp://0": "not among the model's nodes 1"}
    assert NODE.address not in chose.unfit
