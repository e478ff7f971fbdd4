"""Instances move to make room where that pays, when it pays, and do not chase each other."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sllmdask.policy import events as ev
from sllmdask.policy.choice import Way
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Dispatch, Load, Migrate, Unload
from sllmdask.policy.fleet import REST
from sllmdask.policy.views import RequestView, Tier
from tests.policy.imagined import Imagined, check_invariants
from tests.policy.test_controller import A, B, acts, ask, controller_with
from tests.policy.test_ways import busy, loaded, node, records, request

#: b works on node 0, and could work on node 1; a can only be on node 0, c only on node 1.
HERE, THERE = node("0", a=Tier.HOST, b=Tier.HOST), node("1", b=Tier.HOST, c=Tier.HOST)
SHORT = replace(A, nodes=("0",), keep_alive_s=0.0)
OTHER = replace(A, name="c", nodes=("1",))
#: Seconds to load from memory, and to compute a request's KV again, by the priors.
LOAD_S, MOVE_S = 0.125, 0.1


def crowded(*models, workers=(HERE, THERE), **settings) -> tuple[Controller, Load]:
    """A request for b runs on node 0 since 0.5 s."""
    settings = {"can_migrate": True, **settings}
    controller = controller_with(*(models or (SHORT, B)), workers=workers, **settings)
    load = busy(controller, "b", "rb", 0.0)
    assert load.worker == "tcp://0"
    return controller, load


def next_act(controller, limit_s=100.0):
    """When something is done by time alone, and what."""
    while (at := controller.timers.first()) is not None and at < limit_s:
        found = acts(controller.handle(ev.TimerFired(at)))
        if found:
            return at, found
    return None, []


def move(controller, migrate, at):
    """The move ends well."""
    return acts(controller.handle(ev.InstanceMigrated(at, migrate.instance, migrate.successor, Tier.HOST)))


def test_what_has_few_tokens_to_make_is_waited_for_and_what_has_many_moves():
    for max_tokens, way in ((200, Way.WAIT), (2000, Way.MIGRATE)):
        controller = controller_with(SHORT, B, workers=(HERE, THERE), can_migrate=True)
        (load,) = ask(controller, "r", "b", 0.0)
        loaded(controller, load, 0.5)
        controller.handle(ev.RequestEnded(1.5, "r", n_tokens=1000))  # a token takes 1 ms
        controller.handle(ev.RequestArrived(2.0, RequestView("rb", "b", "door", 2.0, 99.0, max_new_tokens=max_tokens)))
        (chose,) = records(controller.handle(request("ra", "a", 2.1)))
        assert chose.chosen.way is way, max_tokens
        waits = {option.way: option.parts["wait"] for option in chose.options if option.way is Way.WAIT}
        assert waits[Way.WAIT] == pytest.approx(max_tokens / 1000 - 0.1 if max_tokens == 200 else 0.9)


def test_more_requests_than_leave_at_a_time_take_turns():
    controller, _ = crowded(SHORT, replace(B, target=100))
    for i in range(15):
        ask(controller, f"rb{i}", "b", 0.6)
    (migrate,) = ask(controller, "ra", "a", 1.0)
    assert migrate.moved_in_s == pytest.approx(LOAD_S + 2 * MOVE_S)


def test_an_instance_that_has_moved_is_not_moved_back_before_it_has_rested():
    controller, _ = crowded(SHORT, B, OTHER)
    (migrate,) = ask(controller, "ra", "a", 1.0)
    (load,) = move(controller, migrate, 1.3)
    loaded(controller, load, 1.5)
    (unload,) = acts(controller.handle(ev.RequestEnded(1.6, "ra")))
    controller.handle(ev.UnloadFinished(1.7, unload.instance))
    (chose,) = records(decisions := controller.handle(request("rc", "c", 1.8)))
    assert (chose.chosen.way, acts(decisions)) == (Way.WAIT, [])
    at, (back,) = next_act(controller)
    assert at == pytest.approx(1.3 + REST * 0.3)
    assert (back.instance, back.destination) == (migrate.successor, "tcp://0")


def test_an_instance_stays_for_its_minimum_residency_and_moves_after_it():
    controller, load = crowded(min_residency_s=5.0)
    assert ask(controller, "ra", "a", 1.0) == []
    at, (migrate,) = next_act(controller)
    assert (at, migrate.instance) == (pytest.approx(0.5 + 5.0), load.instance)


def test_a_slot_that_becomes_free_elsewhere_is_taken_by_what_is_in_the_way():
    controller, load = crowded(workers=(HERE,))
    assert ask(controller, "ra", "a", 1.0) == []
    (migrate,) = acts(controller.handle(ev.WorkerJoined(2.0, THERE)))
    assert (type(migrate), migrate.instance, migrate.destination) == (Migrate, load.instance, "tcp://1")


def test_after_a_move_that_failed_who_waits_waits_and_it_is_tried_again_more_and_more_seldom():
    controller, load = crowded()
    (migrate,) = ask(controller, "ra", "a", 1.0)
    tried_at = []
    for _ in range(4):
        failed_at = (tried_at or [1.0])[-1] + 0.1
        decisions = controller.handle(ev.MigrationFailed(failed_at, load.instance, migrate.successor, "no room"))
        assert (acts(decisions), records(decisions)[0].chosen.way) == ([], Way.WAIT)
        assert [each.request for each in ask(controller, f"rb{failed_at}", "b", failed_at)] == [f"rb{failed_at}"]
        at, (migrate,) = next_act(controller)
        assert at is not None
        tried_at.append(at)
    assert tried_at == [pytest.approx(at) for at in (1.1 + 1, 2.2 + 2, 4.3 + 4, 8.4 + 8)]
    controller.handle(ev.MigrationFailed(17.0, load.instance, migrate.successor, "no room"))
    for each in list(controller.running):
        decisions = acts(controller.handle(ev.RequestEnded(17.1, each)))
    assert [(type(each), each.instance) for each in decisions] == [(Unload, load.instance)]


def test_what_has_ended_before_it_could_move_leaves_at_once():
    controller, load = crowded()
    (migrate,) = ask(controller, "ra", "a", 1.0)
    called_off, unload = acts(controller.handle(ev.RequestEnded(1.05, "rb")))
    assert (type(called_off), called_off.instance) == (Unload, migrate.successor)
    assert (type(unload), unload.instance) == (Unload, load.instance)
    (load,) = acts(controller.handle(ev.UnloadFinished(1.06, unload.instance)))
    assert (type(load), load.model, load.worker) == (Load, "a", "tcp://0")
    assert acts(controller.handle(ev.MigrationFailed(1.1, migrate.instance, migrate.successor, "it is gone"))) == []
    assert [each.request for each in acts(loaded(controller, load, 1.2))] == ["ra"]
    assert controller.back_off.ends_at("b", 1.2) is None


def test_what_has_ended_before_it_could_move_is_loaded_there_for_those_who_wait_for_it():
    controller, _ = crowded()
    (migrate,) = ask(controller, "ra", "a", 1.0)
    ask(controller, "rb2", "b", 1.02)
    assert acts(controller.handle(ev.RequestEnded(1.05, "rb"))) == []
    load, dispatch = move(controller, migrate, 1.2)
    assert (load.model, dispatch.request, dispatch.instance) == ("a", "rb2", migrate.successor)


def test_what_cannot_go_on_elsewhere_is_waited_for():
    controller, _ = crowded(SHORT, replace(B, moves=False))
    (chose,) = records(decisions := controller.handle(request("ra", "a", 1.0)))
    assert acts(decisions) == []
    assert [option.way for option in chose.options] == [Way.WAIT]


def test_who_has_waited_for_as_long_as_a_move_takes_waits_for_no_end_that_does_not_come():
    controller = controller_with(SHORT, B, workers=(HERE, THERE), can_migrate=True)
    (load,) = ask(controller, "r", "b", 0.0)
    loaded(controller, load, 0.5)
    controller.handle(ev.RequestEnded(0.6, "r"))
    ask(controller, "rb", "b", 1.0)  # requests are known to take 0.1 s
    (chose,) = records(controller.handle(request("ra", "a", 1.05)))
    assert chose.chosen.way is Way.WAIT
    at, (migrate,) = next_act(controller)
    assert type(migrate) is Migrate
    assert at == pytest.approx(1.05 + 2 * LOAD_S + MOVE_S)


def test_a_request_that_was_lost_after_it_had_moved_does_not_close_what_it_has_left():
    controller, load = crowded()
    ask(controller, "rb2", "b", 0.6)
    (migrate,) = ask(controller, "ra", "a", 1.0)
    controller.handle(ev.WorkerLeft(1.1, "tcp://1"))
    controller.handle(ev.RequestMoved(1.2, "rb", migrate.successor))
    (dispatch,) = acts(controller.handle(ev.RequestReturned(1.2, "rb")))
    assert (type(dispatch), dispatch.instance) == (Dispatch, load.instance)
    assert controller.instances[load.instance].n_requests == 2


@pytest.mark.parametrize("seed", range(4))
def test_moves_take_a_small_share_of_an_instances_time_whatever_comes(seed: int):
    """Two models want node 0 and node 1 by turns, between which a third one is driven."""
    rng = Random(seed)
    controller = Controller(ControllerSettings(can_migrate=True, max_requests=4))
    models = (SHORT, B, replace(OTHER, keep_alive_s=0.0))
    events: list[ev.Event] = [ev.WorkerJoined(0.0, each) for each in (HERE, THERE)]
    events += [ev.ModelDeployed(0.0, model) for model in models]
    at = 0.0
    for i in range(300):
        at += rng.expovariate(2.0)
        events.append(ev.RequestArrived(at, RequestView(f"r{i}", rng.choice("abbc"), "door", at, at + 1e3)))
    outcome = Imagined(controller, rng, service_s=2.0).run(events, lambda controller, _: check_invariants(controller))
    assert len(outcome.ended) == 300
    moves = [(at, each) for at, each in outcome.decisions if isinstance(each, Migrate)]
    came = {each.successor: (at, each.moved_in_s) for at, each in moves}
    again = [(at, *came[each.instance]) for at, each in moves if each.instance in came]
    assert len(moves) > 3 and again
    assert all(at - began_at - seconds >= REST * seconds - 1e-9 for at, began_at, seconds in again)
