"""What the controller makes of moves that workers tell of, and of the tokens that front doors count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Dispatch, Migrate
from sllmdask.policy.learned import LEAST_REMAINING_S
from sllmdask.policy.views import RequestView
from sllmdask.sim.replay import EventLog, replay
from tests.policy.test_controller import A, B, Tier, acts, ask, controller_with, wish
from tests.policy.test_ways import CROWDED, crowded, node, request

KV = 32 * 1024


def ended(at: float, key: str, there: tuple[str, str], seconds: float = 0.02, n_tokens: int = 100, kind: str = "kv"):
    """A request of model b has moved from node 0 to node 1."""
    nbytes = n_tokens * KV
    where = "tcp://0", "tcp://1"
    return ev.MoveEnded(at, key, "b", *there, *where, "moved", kind, n_tokens, nbytes, nbytes, seconds)


def test_requests_that_arrive_one_by_one_are_all_there_when_their_instance_has_moved():
    controller, load = crowded(can_migrate=True)
    ask(controller, "rb2", "b", 1.5)
    _, migrate = controller.handle(request("ra", "a", 2.0))[:2]
    for key in ("rb", "rb2"):
        assert acts(controller.handle(ended(2.2, key, (load.instance, migrate.successor)))) == []
    assert (controller.instances[load.instance].n_requests, controller.instances[migrate.successor].n_requests) == (0, 2)
    controller.handle(ev.InstanceMigrated(2.3, load.instance, migrate.successor, Tier.HOST))
    assert controller.instances[migrate.successor].n_requests == 2
    for key in ("rb", "rb2"):
        controller.handle(ev.RequestEnded(3.0, key))
    assert controller.instances[migrate.successor].idle


def test_a_move_that_is_told_after_the_request_was_lost_where_it_went_changes_nothing():
    controller, load = crowded()
    (second,) = wish(controller, "w", "b", 1.5, node="1")
    controller.handle(ev.LoadFinished(1.6, second.instance, Tier.HOST))
    controller.handle(ev.RequestMoved(2.0, "rb", second.instance))
    controller.handle(ev.RequestReturned(2.1, "rb"))  # to where it was before
    late = ended(2.2, "rb", ("b/9", second.instance))
    assert controller.running["rb"].instance == load.instance
    controller.handle(late)
    assert controller.running["rb"].instance == load.instance


def test_a_move_is_predicted_by_what_those_before_it_took():
    def moved_in_s(*before: ev.Event) -> float:
        controller, _ = crowded(can_migrate=True)
        for event in before:
            controller.handle(event)
        (migrate,) = (each for each in controller.handle(request("ra", "a", 2.0)) if isinstance(each, Migrate))
        return migrate.moved_in_s

    # b is loaded there in 0.125 s; its request has no tokens, which cost beta, 0.1 s.
    assert moved_in_s() == pytest.approx(0.225)
    resumed = [ended(1.1, "gone", ("b/8", "b/9"), 1e-4 * n, n, "tokens") for n in (100, 200, 300, 400)]
    assert moved_in_s(*resumed) == pytest.approx(0.125, abs=0.01)
    stayed = [replace(each, outcome="stayed") for each in resumed]
    assert moved_in_s(*stayed) == pytest.approx(0.225)


def test_of_two_destinations_that_load_alike_the_one_with_the_faster_link_is_chosen():
    def destination(slow: str) -> str:
        controller = controller_with(A, B, workers=(CROWDED[0],), can_migrate=True)
        (load,) = ask(controller, "rb", "b", 0.0)
        controller.handle(ev.LoadFinished(0.5, load.instance, Tier.HOST))
        controller.handle(ev.TokensCounted(0.9, {"rb": 2000}))
        for name in ("1", "2"):
            controller.handle(ev.WorkerJoined(1.0, node(name, b=Tier.HOST)))
            for n in (500, 1000, 2000, 4000):
                seconds = n * KV / (1e8 if name == slow else 1e10)
                there = ended(1.1, "gone", ("b/8", "b/9"), seconds, n)
                controller.handle(replace(there, destination=f"tcp://{name}"))
        (migrate,) = (each for each in controller.handle(request("ra", "a", 2.0)) if isinstance(each, Migrate))
        return migrate.destination

    assert (destination(slow="1"), destination(slow="2")) == ("tcp://2", "tcp://1")


def test_what_a_running_request_still_needs_is_told_by_its_tokens():
    controller = controller_with(A)
    (load,) = ask(controller, "before", "a", 0.0)
    controller.handle(ev.LoadFinished(1.0, load.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(11.0, "before", 100))  # 10 s for 100 tokens
    ask(controller, "slow", "a", 20.0)

    def left_s(at: float) -> float:
        return controller.finder.remaining_s(controller.running["slow"], at)

    assert left_s(24.0) == pytest.approx(6.0), "by the seconds of the one before it"
    controller.handle(ev.TokensCounted(24.0, {"slow": 10, "nobody": 5}))
    assert left_s(24.0) == pytest.approx(36.0), "90 more tokens at 0.4 s each"
    assert left_s(25.0) == pytest.approx(35.0)
    controller.handle(ev.TokensCounted(25.0, {"slow": 9}))
    assert controller.running["slow"].n_output == 10, "no request loses tokens"
    controller.handle(ev.RequestReturned(30.0, "slow"))
    (load,) = acts(controller.handle(ev.UnloadFinished(30.0, load.instance)))
    decisions = controller.handle(ev.LoadFinished(31.0, load.instance, Tier.DISK))
    assert any(isinstance(each, Dispatch) for each in decisions)
    controller.handle(ev.TokensCounted(33.0, {"slow": 30}))
    assert left_s(33.0) == pytest.approx(7.0), "20 in 2 s here; the 10 that it came with were made elsewhere"
    controller.handle(ev.TokensCounted(34.0, {"slow": 99}))
    assert left_s(90.0) == LEAST_REMAINING_S


def test_a_request_needs_no_more_tokens_than_it_may_have():
    controller = controller_with(A)
    (load,) = ask(controller, "before", "a", 0.0)
    controller.handle(ev.LoadFinished(1.0, load.instance, Tier.DISK))
    controller.handle(ev.RequestEnded(11.0, "before", 100))
    short = RequestView("short", "a", "door", 20.0, 99.0, max_new_tokens=20)
    controller.handle(ev.RequestArrived(20.0, short))
    controller.handle(ev.TokensCounted(21.0, {"short": 10}))
    assert controller.finder.remaining_s(controller.running["short"], 21.0) == pytest.approx(1.0)


def test_decisions_that_rest_on_moves_and_counts_follow_from_the_log_alone(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    settings = ControllerSettings(can_migrate=True)
    controller = Controller(settings)
    rows = [
        ev.WorkerJoined(0.0, CROWDED[0]),
        ev.ModelDeployed(0.0, A),
        ev.ModelDeployed(0.0, B),
        request("rb", "b", 0.0),
        ev.LoadFinished(0.5, "b/1", Tier.HOST),
        ev.TokensCounted(0.9, {"rb": 700}),
        ev.WorkerJoined(1.0, CROWDED[1]),
        *(ended(1.1, "gone", ("b/8", "b/9"), 1e-5 * n, n) for n in (100, 200, 300, 400)),
        request("ra", "a", 2.0),
        ev.RequestEnded(3.0, "rb", 900),
    ]
    with path.open("w") as file:
        writer = EventLog(file, settings)
        for event in rows:
            writer.event(event)
            for decision in controller.handle(event):
                writer.decision(decision)
    steps = list(replay(path))
    assert [step.event for step in steps] == rows and all(step.then == step.now for step in steps)
    (migrate,) = (each for step in steps for each in step.now if each["decision"] == "Migrate")
    assert migrate["moved_in_s"] == pytest.approx(0.125 + 1e-5 * 700, rel=0.1), "7 s by the deployment's alpha"
