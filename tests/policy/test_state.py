"""The indexes against a look at everything, after each of many random events; and what random traffic with faults comes to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from random import Random

import pytest

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Migrate, Preempt
from sllmdask.policy.estimate import load_parts, suppliers
from sllmdask.policy.eviction import victims
from sllmdask.policy.placement import unfit
from sllmdask.policy.queue import demand_of, turn_of
from sllmdask.policy.state import ClusterState
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView
from tests.policy.imagined import Imagined, check_invariants

GiB = 1024**3
TIERS = (Tier.HOST, Tier.DISK)


def is_kept(state: ClusterState, instance: InstanceView) -> bool:
    model = state.models.get(instance.model)
    ready = [each for each in state.instances.values() if each.model == instance.model and each.state is InstanceState.READY]
    return model is not None and (model.pinned or instance.id in [each.id for each in ready][: model.min_instances])


def may_be_evicted(state: ClusterState, instance: InstanceView) -> bool:
    return instance.idle and not instance.draining and not instance.successor and not is_kept(state, instance)


def check_state(state: ClusterState) -> None:
    instances = list(state.instances.values())
    assert list(state.draining) == [] or all(state.instances[each].draining for each in state.draining)
    assert set(state.draining) == {each.id for each in instances if each.draining and each.state is not InstanceState.UNLOADING}
    assert set(state.planned) == {each.id for each in instances if each.state is InstanceState.PLANNED}
    for name in {*state.models, *(each.model for each in instances)}:
        assert state.instances_of(name) == [each for each in instances if each.model == name]
    for address, worker in state.workers.items():
        here = [each for each in instances if each.worker == address]
        assert sorted(each.id for each in state.on_worker(address)) == sorted(each.id for each in here)
        free = worker.slots - sum(each.n_slots for each in here)
        idle = sum(each.n_slots for each in here if may_be_evicted(state, each))
        assert state.free_slots(address) == free
        assert [state.has_room(address, n) for n in range(6)] == [free + idle >= n for n in range(6)]
        mates = {each.address for each in state.workers.values() if each.node and each.node == worker.node} | {address}
        assert {each.address for each in state.mates(address)} == mates
        neighbours = {each.id for each in instances if each.worker in mates - {address}}
        assert {each.id for each in state.neighbours(address)} == neighbours
    checkpoints = {key for worker in state.workers.values() for key in worker.residency}
    for checkpoint in checkpoints:
        holders = {each.address for each in state.workers.values() if checkpoint in each.residency}
        assert {each.address for each in state.holders(checkpoint)} == holders
    cohorts = list(state.cohorts())
    assert sorted(each.s_per_byte for each in cohorts) == [each.s_per_byte for each in cohorts]
    members = [place for cohort in cohorts for place in cohort.workers]
    assert sorted(members) == sorted((worker.name, worker.address) for worker in state.workers.values())
    for cohort in cohorts:
        here = {address for _, address in cohort.workers}
        assert cohort.free == [place for place in sorted(cohort.workers) if state.free_slots(place[1]) > 0]
        idle = [(each.idle_since, each.id) for each in instances if each.worker in here and may_be_evicted(state, each)]
        assert cohort.idle == sorted(idle)
    assert state.any_free == any(state.free_slots(address) > 0 for address in state.workers)


def check_queue(controller: Controller) -> None:
    queue = controller.queue
    waiting, running = list(queue.waiting.values()), list(queue.running.values())
    assert [each.arrived_at for each in waiting] == sorted(each.arrived_at for each in waiting)
    in_turn = sorted(waiting, key=turn_of)
    assert queue.in_turn() == list(dict.fromkeys(demand_of(each) for each in in_turn))
    for demand in queue.in_turn():
        assert queue.members(demand) == [each for each in in_turn if demand_of(each) == demand]
    for model in {each.model for each in waiting}:
        assert queue.of_model(model) == [each.id for each in in_turn if each.model == model]
    assert queue.n_queued == sum(not each.load_only for each in waiting)
    assert queue.load == Counter(each.model for each in (*waiting, *running) if not each.load_only)
    assert +queue.n_running == Counter(each.priority for each in running)
    for instance in controller.instances:
        here = {each.id for each in running if each.instance == instance}
        assert {each.id for each in queue.on_instance(instance)} == here
    for request in controller.claims.claimants():
        assert request.id in queue.waiting


def brute_force_s(controller: Controller, model: ModelView, at: float) -> float | None:
    """The least seconds to load `model`, by trying every worker."""
    state = controller.state
    own = {each.id for each in state.living(model.name)}
    sources = suppliers(model.checkpoint_key, state.workers.values())
    found = []
    for worker in state.workers.values():
        if unfit(model, worker) or worker.address in controller.back_off.active(model.name, at):
            continue
        if controller.claims.held(worker.address, None):
            continue
        here = [each for each in state.instances.values() if each.worker == worker.address]
        node = [mate.address for mate in state.workers.values() if mate.node and mate.node == worker.node]
        beside = [each for each in state.instances.values() if each.worker in node and each.worker != worker.address]
        stay = [each.id for each in (*here, *beside) if each.id in own or not may_be_evicted(state, each)]
        leaving = victims(
            here,
            n_slots=worker.slots - model.n_slots,
            nbytes=worker.host_capacity - model.nbytes,
            checkpoint=model.checkpoint_key,
            now=at,
            protected=frozenset(stay),
            min_residency_s=controller.settings.min_residency_s,
            neighbours=beside,
        )
        if leaving is not None:
            tier, parts = load_parts(model, worker, queue_s=state.queue_s(worker, at), peers=sources)
            reading = [each for each in (*here, *beside) if each.state is InstanceState.LOADING]
            arrives_s = [state.ready_in_s(each, at) for each in reading if each.checkpoint == model.checkpoint_key]
            found.append(min(sum(parts.values()), *arrives_s, inf) if tier is not Tier.HOST else sum(parts.values()))
    return min(found, default=None)


def random_cluster(rng: Random) -> tuple[list[WorkerView], list[ModelView]]:
    models = [
        ModelView(
            name,
            nbytes=rng.randint(1, 4) * GiB,
            checkpoint=rng.choice(["", "", "shared"]),
            n_slots=rng.choice([1, 1, 1, 2]),
            target=rng.randint(1, 4),
            min_instances=rng.choice([0, 0, 0, 1]),
            max_instances=rng.randint(1, 4),
            keep_alive_s=rng.choice([0.0, 3.0, -1.0]),
            pinned=rng.random() < 0.1,
        )
        for name in "abcdefgh"
    ]
    # Of one checkpoint there is one size.
    models = [replace(each, nbytes=2 * GiB) if each.checkpoint else each for each in models]
    names = [each.checkpoint_key for each in models]
    workers = []
    for i in range(rng.randint(2, 6)):
        rates = {Tier.HOST: 8.0 * GiB, Tier.DISK: rng.choice([1.0, 2.0]) * GiB}
        if rng.random() < 0.5:
            rates |= {Tier.PEER: rng.choice([0.5, 1.0]) * GiB, Tier.REMOTE: rng.choice([0.1, 0.2]) * GiB}
        workers.append(
            WorkerView(
                f"tcp://{i}",
                str(i),
                slots=rng.randint(2, 4),
                host_capacity=12 * GiB,
                node=rng.choice(["", "", "host"]),
                residency={name: rng.choice(TIERS) for name in names if rng.random() < 0.4},
                bytes_per_s=rates,
                overhead_s={Tier.REMOTE: rng.choice([0.0, 0.2])},
            )
        )
    return workers, models


def random_events(rng: Random, workers: list[WorkerView], models: list[ModelView], n: int) -> list[ev.Event]:
    events: list[ev.Event] = [ev.WorkerJoined(0.0, worker) for worker in workers]
    events += [ev.ModelDeployed(0.0, model) for model in models]
    now, versions = 0.0, Counter()
    for i in range(n):
        now += rng.expovariate(4.0)
        model, worker = rng.choice(models), rng.choice(workers)
        kind = rng.random()
        if kind < 0.75:
            priority = rng.choice([0, 0, 0, 1])
            door = rng.choice(["one", "two"])
            events.append(ev.RequestArrived(now, RequestView(f"r{i}", model.name, door, now, now + 200.0, priority)))
        elif kind < 0.82:
            node = rng.choice(["", worker.name])
            wish = RequestView(f"w{i}", model.name, "", now, now + 200.0, load_only=True, node=node)
            events.append(ev.LoadRequested(now, wish))
        elif kind < 0.85:
            events.append(ev.UnloadRequested(now, model.name))
        elif kind < 0.93:
            versions[worker.address] += 1
            residency = {each.checkpoint_key: rng.choice(TIERS) for each in models if rng.random() < 0.4}
            rates = {**worker.bytes_per_s, Tier.DISK: rng.uniform(0.5, 3.0) * GiB}
            events.append(ev.WorkerReported(now, worker.address, versions[worker.address], residency, rates))
        elif kind < 0.96:
            changed = replace(model, max_instances=rng.randint(1, 4), pinned=rng.random() < 0.1, target=rng.randint(1, 4))
            events.append(ev.ModelDeployed(now, changed))
        elif kind < 0.98:
            events.append(ev.WorkerLeft(now, worker.address))
        else:
            events.append(ev.RequestEnded(now, f"r{rng.randrange(i + 1)}"))
    return events


@pytest.mark.parametrize("seed", range(6))
def test_after_each_event_the_indexes_are_those_of_a_look_at_everything_and_the_soonest_place_is_found(seed):
    rng = Random(seed)
    workers, models = random_cluster(rng)
    settings = ControllerSettings(
        max_requests=rng.choice([1, 2, 64]),
        patience_s=2.0,
        min_residency_s=rng.choice([0.0, 1.0]),
        can_migrate=rng.random() < 0.7,
        can_preempt=rng.random() < 0.7,
    )
    controller = Controller(settings)

    def check(controller: Controller, event: ev.Event) -> None:
        check_state(controller.state)
        check_queue(controller)
        check_invariants(controller)
        model = rng.choice(models)
        model = controller.models.get(model.name, model)
        found = controller.finder.of_nobody(model, event.at, may_evict=True).options
        assert (found[0].ready_in_s if found else None) == brute_force_s(controller, model, event.at)

    cluster = Imagined(controller, rng, p_fault=0.1)
    cluster.run(random_events(rng, workers, models, 150), check)
    assert not controller.waiting and not controller.running
    assert controller.timers.first() is None or controller.instances


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_with_faults_moves_and_preemptions_loses_nobody(seed):
    rng = Random(f"traffic {seed}")
    workers, models = random_cluster(rng)
    models = [replace(each, pinned=False, min_instances=0, n_slots=1, max_instances=4) for each in models]
    controller = Controller(
        ControllerSettings(max_requests=rng.choice([1, 2]), patience_s=3.0, can_migrate=True, can_preempt=True)
    )
    events, now = [], 0.0
    events += [ev.WorkerJoined(0.0, worker) for worker in workers]
    events += [ev.ModelDeployed(0.0, model) for model in models]
    for i in range(200):
        now += rng.expovariate(3.0)
        name = models[min(7, int(rng.paretovariate(1.0)) - 1)].name
        events.append(ev.RequestArrived(now, RequestView(f"r{i}", name, "door", now, now + 1e6, rng.choice([0, 0, 1]))))
        if rng.random() < 0.01:
            events.append(ev.WorkerLeft(now, rng.choice(workers).address))
    cluster = Imagined(controller, rng, p_fault=0.02, service_s=1.5)
    outcome = cluster.run(events, lambda controller, _: check_invariants(controller))
    assert len(outcome.ended) + len(outcome.refused) == 200
    assert {refuse.error.code for refuse in outcome.refused.values()} <= {"load_failed"}
    assert not controller.waiting and not controller.running and not controller.records._expects and not controller._dirty
    assert all(instance.state is InstanceState.READY for instance in controller.instances.values())


def test_random_traffic_does_move_and_preempt():
    kinds = set()
    for seed in range(3):
        rng = Random(f"traffic {seed}")
        workers, models = random_cluster(rng)
        controller = Controller(ControllerSettings(max_requests=1, can_migrate=True, can_preempt=True))
        events = random_events(rng, workers, models, 150)
        outcome = Imagined(controller, rng, service_s=4.0).run(events, lambda *_: None)
        kinds |= {type(decision) for _, decision in outcome.decisions}
    assert {Migrate, Preempt} <= kinds
