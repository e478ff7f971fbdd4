"""A node that is drained takes nothing new, and what it has goes elsewhere; so does what runs on an instance too many."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sllmdask.errors import NodeDraining, NoWorker
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Load, Move, Refuse, Unload
from sllmdask.policy.views import InstanceState, ModelView, RequestView, Tier
from tests.policy.imagined import Imagined, check_invariants
from tests.policy.test_controller import NODE, A, B, GiB, acts, ask, controller_with, wish
from tests.policy.test_fleet import loaded, running_on

NODES = [replace(NODE, address=f"tcp://{name}", name=name) for name in "0123"]
CAUSE = "an operator asked"


def drain(controller, node, at):
    return acts(controller.handle(ev.WorkerDrains(at, f"tcp://{node}", CAUSE)))


def serving(*requests, workers=NODES[:2], model=A, **settings) -> tuple[Controller, str]:
    """A model's instance on node 0 with `requests`."""
    controller = controller_with(model, workers=workers, can_move=True, **settings)
    (load,) = ask(controller, requests[0], "a", 1.0)
    assert load.worker == "tcp://0"
    loaded(controller, [load], 2.0)
    for request in requests[1:]:
        ask(controller, request, "a", 2.5)
    assert running_on(controller, load.instance) == list(requests)
    return controller, load.instance


def test_a_drained_node_loads_its_model_elsewhere_moves_all_requests_there_and_is_empty():
    controller, old = serving("r1", "r2")
    (load,) = drain(controller, "0", 3.0)
    assert (type(load), load.worker) == (Load, "tcp://1")
    moves = loaded(controller, [load], 4.0)
    assert [(type(each), each.request, each.instance, each.successor) for each in moves] == [
        (Move, "r1", old, load.instance),
        (Move, "r2", old, load.instance),
    ]
    assert controller.instances[load.instance].n_arriving == 2
    assert acts(controller.handle(ev.RequestMoved(4.1, "r1", load.instance))) == []
    (unload,) = acts(controller.handle(ev.RequestMoved(4.2, "r2", load.instance)))
    assert unload == Unload(old, "a", "tcp://0", "its node is drained")
    controller.handle(ev.UnloadFinished(4.3, old))
    assert [each.worker for each in controller.instances.values()] == ["tcp://1"]
    assert running_on(controller, load.instance) == ["r1", "r2"]
    assert controller.instances[load.instance].n_arriving == 0


def test_new_requests_go_to_the_instance_elsewhere_and_wait_for_it_if_it_is_not_ready():
    controller, _ = serving("r1")
    (load,) = drain(controller, "0", 3.0)
    assert ask(controller, "new", "a", 3.5) == []
    dispatch, move = loaded(controller, [load], 4.0)
    assert (dispatch.request, dispatch.worker) == ("new", "tcp://1")
    assert (move.request, move.destination) == ("r1", "tcp://1")


def test_requests_go_to_instances_that_are_there_and_no_more_than_have_a_place():
    controller, _ = serving("r1", "r2", "r3", workers=NODES[:3], max_requests=3)
    wish(controller, "w", "a", 3.0, node="1")
    (elsewhere,) = [each for each in controller.instances.values() if each.worker == "tcp://1"]
    controller.handle(ev.LoadFinished(4.0, elsewhere.id, Tier.DISK))
    (dispatch,) = ask(controller, "r4", "a", 4.5)
    assert dispatch.instance == elsewhere.id
    load, *moves = drain(controller, "0", 5.0)
    assert (type(load), load.worker) == (Load, "tcp://2")  # two places are one too few
    assert [each.successor for each in moves] == [elsewhere.id] * 2
    assert ask(controller, "r5", "a", 5.5) == []  # the places are kept for those that are on their way


def test_where_there_is_no_room_the_requests_end_and_the_reason_is_told():
    controller, old = serving("r1", "r2", workers=NODES[:1])
    assert drain(controller, "0", 3.0) == []
    assert "no other node is connected" in controller.drainer.why(controller.instances[old])
    assert acts(controller.handle(ev.RequestEnded(4.0, "r1"))) == []
    (unload,) = acts(controller.handle(ev.RequestEnded(5.0, "r2")))
    assert unload.instance == old


def test_a_node_whose_slots_are_taken_is_named_and_is_used_when_they_are_free():
    controller, old = serving("r1")
    controller.handle(ev.ModelDeployed(2.6, B))
    (other,) = ask(controller, "b1", "b", 2.7)
    loaded(controller, [other], 2.8)
    assert drain(controller, "0", 3.0) == []
    assert "node 1: its 1 slots" in controller.drainer.why(controller.instances[old])
    # An idle instance is worth less than what runs: it gives way, and then the move begins.
    (unload,) = acts(controller.handle(ev.RequestEnded(4.0, "b1")))
    assert (unload.instance, unload.cause) == (other.instance, "evicted")
    (load,) = acts(controller.handle(ev.UnloadFinished(4.1, other.instance)))
    (move,) = loaded(controller, [load], 5.0)
    assert (move.request, move.destination) == ("r1", "tcp://1")
    assert controller.drainer.why(controller.instances[old]) == ""


def test_idle_instances_are_unloaded_at_once_and_loads_are_called_off():
    controller, old = serving("r1", workers=NODES[:1])
    controller.handle(ev.RequestEnded(3.0, "r1"))
    (unload,) = drain(controller, "0", 4.0)
    assert (type(unload), unload.instance) == (Unload, old)
    controller = controller_with(A, workers=NODES[:2], can_move=True)
    ask(controller, "r1", "a", 1.0)
    decisions = drain(controller, "0", 1.5)
    assert [(type(each), each.worker) for each in decisions] == [(Unload, "tcp://0"), (Load, "tcp://1")]
    (dispatch,) = loaded(controller, decisions[1:], 2.0)
    assert dispatch.request == "r1"


def test_an_idle_instance_of_a_models_minimum_leaves_when_another_one_is_ready_elsewhere():
    model = replace(A, min_instances=1)
    controller = controller_with(model, workers=NODES[:1], can_move=True)
    (old,) = [each.id for each in controller.instances.values()]
    controller.handle(ev.LoadFinished(1.0, old, Tier.DISK))
    controller.handle(ev.WorkerJoined(1.5, NODES[1]))
    (load,) = drain(controller, "0", 2.0)
    assert (type(load), load.worker) == (Load, "tcp://1")
    (unload,) = loaded(controller, [load], 3.0)
    assert (type(unload), unload.instance) == (Unload, old)


def test_an_idle_instance_of_a_minimum_leaves_a_node_also_where_no_other_has_room():
    controller = controller_with(replace(A, min_instances=1), workers=NODES[:1], can_move=True)
    (old,) = [each.id for each in controller.instances.values()]
    controller.handle(ev.LoadFinished(1.0, old, Tier.DISK))
    (unload,) = drain(controller, "0", 2.0)
    assert unload.instance == old


def test_a_drained_node_that_stays_after_all_keeps_what_has_not_left():
    controller, old = serving("r1", workers=NODES[:1])
    drain(controller, "0", 3.0)
    assert ask(controller, "r2", "a", 3.5) == []
    (dispatch,) = acts(controller.handle(ev.WorkerUndrained(4.0, "tcp://0")))
    assert (dispatch.request, dispatch.instance) == ("r2", old)
    assert not controller.workers["tcp://0"].draining


def test_what_had_moved_stays_where_it_is_and_the_old_instance_counts_for_the_most():
    controller, _ = serving("r1", "r2", model=replace(A, max_instances=1))
    (load,) = drain(controller, "0", 3.0)
    loaded(controller, [load], 4.0)
    controller.handle(ev.RequestMoved(4.1, "r1", load.instance))
    controller.handle(ev.WorkerUndrained(4.2, "tcp://0"))
    draining = [each.id for each in controller.instances.values() if each.draining]
    assert len(draining) == 1


def test_a_request_that_stays_is_tried_again_later_each_time_and_never_twice_at_once():
    controller, old = serving("r1")
    (load,) = drain(controller, "0", 3.0)
    (move,) = loaded(controller, [load], 4.0)
    assert acts(controller.handle(ev.TimerFired(4.05))) == []
    assert acts(controller.handle(ev.RequestStayed(4.1, "r1", "it is prepared"))) == []
    assert "it is prepared" in controller.drainer.why(controller.instances[old])
    assert controller.instances[load.instance].n_arriving == 0
    assert controller.timers.first() == pytest.approx(4.35)
    assert acts(controller.handle(ev.TimerFired(4.36))) == [move]
    controller.handle(ev.RequestStayed(5.0, "r1", "it is prepared"))
    assert controller.timers.first() == pytest.approx(5.5)
    assert [each.instance for each in acts(controller.handle(ev.RequestEnded(5.1, "r1")))] == [old]


def test_a_load_that_fails_elsewhere_is_tried_on_the_next_node():
    controller, _ = serving("r1", workers=NODES[:3])
    (load,) = drain(controller, "0", 3.0)
    (again,) = acts(controller.handle(ev.LoadFailed(3.5, load.instance, "no")))
    assert {load.worker, again.worker} == {"tcp://1", "tcp://2"}


def test_a_worker_that_leaves_takes_the_places_that_were_kept_on_it():
    controller, _ = serving("r1", workers=NODES[:3])
    (load,) = drain(controller, "0", 3.0)
    loaded(controller, [load], 4.0)
    (again,) = acts(controller.handle(ev.WorkerLeft(4.5, load.worker)))
    assert type(again) is Load
    assert acts(controller.handle(ev.LoadFinished(5.0, again.instance, Tier.DISK))) == []  # it is not known yet that it stayed
    (move,) = acts(controller.handle(ev.RequestStayed(5.1, "r1", "gone"))) or acts(controller.handle(ev.TimerFired(5.4)))
    assert move.successor == again.instance


def test_without_any_other_node_new_requests_are_refused_after_a_while_with_the_reason():
    controller, _ = serving("r1", workers=NODES[:1])
    drain(controller, "0", 3.0)
    assert ask(controller, "r2", "a", 4.0) == []
    (refuse,) = acts(controller.handle(ev.TimerFired(24.0)))
    assert isinstance(refuse.error, NoWorker) and "being drained: 0" in refuse.error.message


def test_a_load_wished_for_on_a_drained_node_is_refused_also_one_that_waited_for_a_slot():
    controller, _ = serving("r1", workers=NODES[:2])
    controller.handle(ev.ModelDeployed(2.6, B))
    wish(controller, "w1", "b", 2.7, node="0")
    refusals = [each for each in drain(controller, "0", 3.0) if isinstance(each, Refuse)]
    (again,) = wish(controller, "w2", "b", 4.0, node="0")
    for refuse, name in zip([*refusals, again], ("w1", "w2"), strict=True):
        assert refuse.request == name and isinstance(refuse.error, NodeDraining)


def test_without_the_means_to_move_them_requests_end_on_the_drained_node():
    controller = controller_with(A, workers=NODES[:2])
    (load,) = ask(controller, "r1", "a", 1.0)
    loaded(controller, [load], 2.0)
    assert drain(controller, "0", 3.0) == []
    (unload,) = acts(controller.handle(ev.RequestEnded(4.0, "r1")))
    assert unload.instance == load.instance


def test_an_instance_of_other_settings_gives_its_requests_to_nobody():
    controller, old = serving("r1")
    controller.handle(ev.ModelDeployed(2.6, replace(A, variant="bfloat16")))
    decisions = drain(controller, "0", 3.0)
    assert not [each for each in decisions if isinstance(each, Move)]
    assert controller.instances[old].draining == "replaced"


# --- one too many ----------------------------------------------------------------------------------------------------


def two_at_work(**settings) -> tuple[Controller, list[str]]:
    """Two instances with two requests and one, of which each was worth an instance."""
    model = replace(A, target=1, max_instances=2, keep_alive_s=30.0)
    controller = controller_with(model, workers=NODES[:2], can_move=True, **settings)
    loads = [load for i in range(2) for load in ask(controller, f"r{i}", "a", 1.0)]
    loaded(controller, loads, 2.0)
    ask(controller, "r2", "a", 3.0)
    controller.handle(ev.ModelDeployed(5.0, replace(model, target=4)))
    return controller, [load.instance for load in loads]


def test_an_instance_too_many_gives_its_requests_to_the_others_and_leaves():
    controller, (first, second) = two_at_work()
    moves = acts(controller.handle(ev.TimerFired(35.0)))
    (leaving,) = [each.id for each in controller.instances.values() if each.draining]
    staying = {first: second, second: first}[leaving]
    assert [(type(each), each.instance, each.successor, each.cause) for each in moves] == [
        (Move, leaving, staying, "scaled down")
    ]
    (unload,) = acts(controller.handle(ev.RequestMoved(35.1, moves[0].request, staying)))
    assert (unload.instance, unload.cause) == (leaving, "scaled down")
    assert len(running_on(controller, staying)) == 3


def test_an_instance_too_many_keeps_what_has_no_place_elsewhere():
    controller, _ = two_at_work(max_requests=2)
    assert acts(controller.handle(ev.TimerFired(35.0))) == []
    (leaving,) = [each for each in controller.instances.values() if each.draining]
    assert leaving.n_requests == 1
    (other,) = [each for each in controller.instances.values() if not each.draining]
    (move,) = acts(controller.handle(ev.RequestEnded(36.0, running_on(controller, other.id)[0])))
    assert (move.instance, move.successor) == (leaving.id, other.id)


def test_a_lower_maximum_moves_the_requests_of_those_that_leave():
    controller, _ = two_at_work()
    (move,) = acts(controller.handle(ev.ModelDeployed(6.0, replace(A, max_instances=1))))
    assert (type(move), move.cause) == (Move, "max_instances")


# --- at random -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_over_nodes_that_are_drained_and_undrained_is_all_answered(seed):
    rng = Random(seed)
    workers = [replace(node, slots=rng.randint(1, 2)) for node in NODES]
    controller = Controller(ControllerSettings(max_requests=3, can_move=True))
    models = [ModelView(name, nbytes=GiB, target=2, max_instances=3, keep_alive_s=rng.choice([0.0, 2.0])) for name in "abc"]
    models[0] = replace(models[0], min_instances=1)
    events: list[ev.Event] = [ev.WorkerJoined(0.0, worker) for worker in workers]
    events += [ev.ModelDeployed(0.0, model) for model in models]
    for i in range(300):
        at = rng.uniform(0.0, 60.0)
        events.append(ev.RequestArrived(at, RequestView(f"r{i}", rng.choice("abc"), "door", at, at + 500.0)))
    for _ in range(12):
        at, node = rng.uniform(0.0, 50.0), rng.choice(NODES[1:]).address
        events += [ev.WorkerDrains(at, node, CAUSE), ev.WorkerUndrained(at + rng.uniform(1.0, 10.0), node)]
    moved = 0

    def check(controller: Controller, event: ev.Event) -> None:
        nonlocal moved
        check_invariants(controller)
        moved += isinstance(event, ev.RequestMoved)
        for instance in controller.instances.values():
            if controller.workers[instance.worker].draining:
                assert instance.draining or instance.state is InstanceState.UNLOADING

    outcome = Imagined(controller, rng, p_fault=0.1).run(events, check)
    assert not outcome.refused
    assert outcome.ended.keys() == {f"r{i}" for i in range(300)}
    assert moved > 0
