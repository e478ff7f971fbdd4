"""A controller that takes over from one that was killed: workers say what they have, front doors what they want."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sllmdask.errors import QueueTimeout
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Dispatch, Load, Refuse, Unload
from sllmdask.policy.fleet import CLAIM_S
from sllmdask.policy.views import HeldInstance, InstanceState, RequestView, Tier, WorkerView
from tests.policy.imagined import Imagined, check_invariants
from tests.policy.test_controller import NODE, A, B, acts, ask, controller_with, wake
from tests.policy.test_state import check_queue, check_state, random_cluster, random_events

OTHER = replace(NODE, address="tcp://two", name="1")


def held(instance, *, model=A, n_requests=0, state=InstanceState.READY, leaving="", n_slots=1):
    return HeldInstance(instance, model.name, n_slots, model.checkpoint_key, model.nbytes, state, n_requests, leaving)


def adopt(controller, instance, at, *, worker=NODE, **facts):
    """A worker joins, with this instance."""
    return acts(controller.handle(ev.WorkerJoined(at, worker, (held(instance, **facts),))))


def claim(controller, request_id, instance, at, model=A, front_door="door"):
    request = RequestView(request_id, model.name, front_door, at - 5.0, 1e9, instance=instance, dispatched_at=at - 4.0)
    return acts(controller.handle(ev.RequestClaimed(at, request)))


def test_an_adopted_instance_serves_at_once_and_nobody_has_waited_for_its_load():
    controller = controller_with(A)
    assert adopt(controller, "a/1", 1.0) == []
    assert ask(controller, "r", "a", 2.0) == [Dispatch("r", "door", "a/1", NODE.address, "0", 0.0)]
    # Also for whoever has waited since before.
    controller = controller_with(A, workers=())
    controller.handle(ev.WorkersAwaited(0.0, frozenset({"0"}), 10.0))
    assert ask(controller, "old", "a", 1.0) == []
    assert adopt(controller, "a/1", 2.0) == [Dispatch("old", "door", "a/1", NODE.address, "0", 1.0)]


@pytest.mark.parametrize("claimed_first", [True, False])
def test_requests_count_where_their_front_doors_say_whoever_comes_first(claimed_first):
    controller = controller_with(A, B)
    if claimed_first:
        claim(controller, "r", "a/1", 1.0)
        adopt(controller, "a/1", 1.1, n_requests=1)
    else:
        adopt(controller, "a/1", 1.0, n_requests=1)
        claim(controller, "r", "a/1", 1.1)
    assert (controller.instances["a/1"].n_requests, controller.instances["a/1"].idle) == (1, False)
    assert ask(controller, "b", "b", 2.0) == []
    # Its slot is free when it has ended.
    (unload,) = acts(controller.handle(ev.RequestEnded(3.0, "r")))
    assert unload == Unload("a/1", "a", NODE.address, "evicted")
    (load,) = acts(controller.handle(ev.UnloadFinished(3.1, "a/1")))
    assert (load.model, load.worker) == ("b", NODE.address)


def test_an_instance_with_requests_that_nobody_has_claimed_yet_does_not_leave_as_idle():
    controller = controller_with(replace(A, keep_alive_s=1.0), B)
    adopt(controller, "a/1", 0.0, n_requests=2)
    assert ask(controller, "b", "b", 1.0) == []
    claim(controller, "r", "a/1", 2.0)
    assert acts(controller.handle(ev.RequestEnded(3.0, "r"))) == []
    # The other one is nobody's.
    assert acts(controller.handle(ev.TimerFired(CLAIM_S - 0.1))) == []
    (unload,) = acts(controller.handle(ev.TimerFired(CLAIM_S)))
    assert unload.instance == "a/1"


def test_an_instance_of_a_model_that_is_not_deployed_any_more_leaves_with_its_last_request():
    controller = controller_with(B)
    assert adopt(controller, "a/1", 1.0) == [Unload("a/1", "a", NODE.address, "deleted", forget=True)]
    controller = controller_with(B)
    assert adopt(controller, "a/1", 1.0, n_requests=1) == []
    claim(controller, "r", "a/1", 1.5)
    assert acts(controller.handle(ev.RequestEnded(2.0, "r"))) == [Unload("a/1", "a", NODE.address, "deleted", forget=True)]


def test_an_instance_that_its_model_may_not_have_any_more_gets_no_new_requests():
    for model, leaving in ((replace(A, n_slots=2), ""), (replace(A, nodes=("1",)), ""), (A, "moved")):
        controller = controller_with(model)
        adopt(controller, "a/1", 1.0, n_requests=1, leaving=leaving)
        claim(controller, "r", "a/1", 1.1)
        assert controller.instances["a/1"].draining == (leaving or "replaced")
        assert not any(isinstance(decision, Dispatch) for decision in ask(controller, "new", "a", 2.0))


def test_of_more_instances_than_a_model_may_have_the_one_with_the_fewest_requests_is_closed():
    controller = controller_with(replace(A, max_instances=1), workers=(NODE, OTHER))
    adopt(controller, "a/1", 1.0, n_requests=2)
    adopt(controller, "a/2", 1.0, n_requests=1, worker=OTHER)
    for request, instance in (("r1", "a/1"), ("r2", "a/1")):
        claim(controller, request, instance, 1.1)
    assert acts(controller.handle(ev.TimerFired(1.0 + CLAIM_S))) == [Unload("a/2", "a", OTHER.address, "max_instances")]
    assert controller.instances["a/1"].draining == ""


def test_an_instance_that_is_still_loading_serves_who_has_waited_for_it_since_before():
    controller = controller_with(A)
    assert adopt(controller, "a/1", 1.0, state=InstanceState.LOADING) == []
    assert ask(controller, "r", "a", 1.5) == []
    (dispatch,) = acts(controller.handle(ev.LoadFinished(2.0, "a/1", Tier.DISK)))
    assert (dispatch.request, dispatch.instance, dispatch.loaded_from) == ("r", "a/1", Tier.DISK)


def test_a_load_for_a_model_that_was_deleted_is_called_off():
    controller = controller_with()
    (unload,) = adopt(controller, "a/1", 1.0, state=InstanceState.LOADING)
    assert (unload.instance, unload.cause) == ("a/1", "deleted")


def test_nothing_is_loaded_before_all_workers_are_back_since_one_of_them_may_have_it():
    controller = controller_with(A, replace(B, min_instances=1), workers=())
    decisions = controller.handle(ev.WorkersAwaited(0.0, frozenset({"0", "1"}), 10.0))
    assert wake(decisions) == 10.0
    controller.handle(ev.WorkerJoined(1.0, NODE))
    assert ask(controller, "r", "a", 1.5) == []
    decisions = acts(controller.handle(ev.WorkerJoined(2.0, OTHER)))
    assert [type(decision) for decision in decisions] == [Load, Load]
    assert {decision.model for decision in decisions} == {"a", "b"}


def test_a_request_goes_to_the_instance_of_the_worker_that_came_back_last():
    controller = controller_with(A, workers=())
    controller.handle(ev.WorkersAwaited(0.0, frozenset({"0", "1"}), 10.0))
    controller.handle(ev.WorkerJoined(1.0, NODE))
    ask(controller, "r", "a", 1.5)
    assert [decision.instance for decision in adopt(controller, "a/7", 2.0, worker=OTHER)] == ["a/7"]


def test_a_worker_that_does_not_come_back_is_not_waited_for_longer_than_that():
    controller = controller_with(A, workers=())
    controller.handle(ev.WorkersAwaited(0.0, frozenset({"0", "1"}), 10.0))
    controller.handle(ev.WorkerJoined(1.0, NODE))
    assert ask(controller, "r", "a", 1.5) == []
    (load,) = acts(controller.handle(ev.TimerFired(10.0)))
    assert isinstance(load, Load)


def test_who_has_waited_before_has_its_old_place_and_its_old_deadline():
    controller = controller_with(A, max_requests=1)
    adopt(controller, "a/1", 100.0, n_requests=1)
    claim(controller, "runs", "a/1", 100.0)
    ask(controller, "new", "a", 100.1)
    request = RequestView("old", "a", "door", 60.0, 110.0)
    controller.handle(ev.RequestArrived(100.2, request))
    late = RequestView("late", "a", "door", 30.0, 90.0)
    decisions = acts(controller.handle(ev.RequestArrived(100.3, late)))
    decisions += acts(controller.handle(ev.TimerFired(100.3)))
    (refuse,) = [decision for decision in decisions if isinstance(decision, Refuse)]
    assert refuse.request == "late" and isinstance(refuse.error, QueueTimeout)
    (dispatch,) = acts(controller.handle(ev.RequestEnded(101.0, "runs")))
    assert dispatch.request == "old"


def test_what_a_front_door_says_later_of_a_request_that_has_moved_is_believed():
    controller = controller_with(A, workers=(NODE, OTHER))
    adopt(controller, "a/1", 1.0, n_requests=1)
    adopt(controller, "a/2", 1.0, worker=OTHER)
    claim(controller, "r", "a/1", 1.1)
    controller.handle(ev.RequestMoved(1.2, "r", "a/2"))
    assert [controller.instances[each].n_requests for each in ("a/1", "a/2")] == [0, 1]
    claim(controller, "r", "a/1", 1.3)
    assert [controller.instances[each].n_requests for each in ("a/1", "a/2")] == [1, 0]


def test_instances_of_a_later_controller_are_called_otherwise_than_those_of_the_ones_before():
    names = set()
    for generation in (1, 2, 3, 21):
        controller = controller_with(A, generation=generation)
        (load,) = ask(controller, "r", "a", 1.0)
        names.add(load.instance)
    assert len(names) == 4 and "a/1" in names


def test_a_worker_that_was_away_and_has_its_requests_still_is_as_before():
    controller = controller_with(A)
    (load,) = ask(controller, "r", "a", 1.0)
    controller.handle(ev.LoadFinished(2.0, load.instance, Tier.DISK))
    controller.handle(ev.WorkerLeft(3.0, NODE.address))
    assert not controller.instances and "r" in controller.running
    adopt(controller, load.instance, 4.0, n_requests=1)
    assert controller.instances[load.instance].n_requests == 1


class TakenOver(Imagined):
    """The same cluster, under a controller that knows nothing but what is told again."""

    def take_over(self, rng: Random, now: float, workers: list[WorkerView]) -> None:
        old = self.controller
        self.controller = new = Controller(replace(old.settings, generation=old.settings.generation + 1))
        self._wake_at = None
        heap, self._heap = self._heap, []
        # What only the old one would have heard; loads go on, and are told again.
        lost = (ev.InstanceMigrated, ev.MigrationFailed, ev.TimerFired, ev.WorkerJoined)
        for _, _, event in sorted(heap, key=lambda item: item[:2]):
            if not isinstance(event, lost) and not (id(event) in self._ends and self._serving.get(event.request) is not event):
                moved = replace(event, at=event.at + 1.0)
                if id(event) in self._ends:
                    self._ends[id(moved)] = self._serving[event.request] = moved
                self.push(moved)
        back = [worker for worker in workers if rng.random() < 0.9]
        tell: list[ev.Event] = [ev.ModelDeployed(now, model) for model in old.models.values()]
        tell.append(ev.WorkersAwaited(now, frozenset(old.workers[each].name for each in old.workers), now + 5.0))
        groups: list[list[ev.Event]] = []
        for worker in back:
            has = []
            for each in old.instances.values():
                if each.worker == worker.address and each.state is not InstanceState.PLANNED:
                    moving = rng.choice(["", "moved"]) if each.successor else ""
                    leaving = "unloaded" if each.state is InstanceState.UNLOADING else moving
                    state = InstanceState.LOADING if each.state is InstanceState.LOADING else InstanceState.READY
                    n_requests = each.n_requests + rng.choice([0, 0, 1])
                    has.append(
                        HeldInstance(each.id, each.model, each.n_slots, each.checkpoint, each.nbytes, state, n_requests, leaving)
                    )
                    if each.moved_from:
                        self.push(ev.LoadFinished(now + 2.0, each.id, Tier.HOST))
            group: list[ev.Event] = [ev.WorkerJoined(now, replace(worker, version=0), tuple(has))]
            groups.append(group)
        addresses = {worker.address for worker in back}
        for door in ("one", "two", "door"):
            group = []
            for request in old.running.values():
                if request.front_door == door and request.id in self._serving:
                    if request.load_only:
                        continue
                    group.append(ev.RequestClaimed(now, request))
                    instance = old.instances.get(request.instance or "")
                    if instance is None or instance.worker not in addresses:  # the stream breaks
                        del self._serving[request.id]
                        self.push(ev.RequestReturned(now + 0.5, request.id))
            group += [ev.RequestArrived(now, request) for request in old.waiting.values() if request.front_door == door]
            groups.append(group)
        rng.shuffle(groups)
        tell += [event for group in groups for event in group]
        for event in tell:
            for decision in new.handle(event):
                self.outcome.decisions.append((now, decision))
                self._enact(decision, now)
            check_invariants(new)
            check_state(new.state)
            check_queue(new)
        for worker in workers:
            if worker not in back:
                self.push(ev.WorkerJoined(now + 3.0, replace(worker, version=0)))


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_under_controllers_that_are_killed_is_all_answered(seed):
    rng = Random(f"killed {seed}")
    workers, models = random_cluster(rng)
    settings = ControllerSettings(
        max_requests=rng.choice([1, 2, 64]), patience_s=2.0, can_migrate=rng.random() < 0.5, can_preempt=rng.random() < 0.5
    )
    cluster = TakenOver(Controller(settings), rng, p_fault=0.05)
    n_left = rng.randint(20, 100)
    n_takeovers = 0

    def check(controller: Controller, event: ev.Event) -> None:
        nonlocal n_left, n_takeovers
        check_invariants(controller)
        n_left -= 1
        if n_left == 0:
            n_left, n_takeovers = rng.randint(40, 200), n_takeovers + 1
            cluster.take_over(rng, event.at, [*controller.workers.values()])

    # Operators' wishes end with the controller that they were told to.
    events = [event for event in random_events(rng, workers, models, 150) if not isinstance(event, ev.LoadRequested)]
    asked = {event.request.id for event in events if isinstance(event, ev.RequestArrived)}
    outcome = cluster.run(events, check)
    assert n_takeovers > 1
    assert asked <= outcome.ended.keys() | outcome.refused.keys()
    controller = cluster.controller
    assert not controller.waiting and not controller.running and not controller._dirty
    assert all(instance.n_unclaimed == 0 for instance in controller.instances.values())
