"""The simulator's cluster: what decisions lead to, and when. No controller; the decisions are written down here."""

from __future__ import annotations

from functools import partial
from random import Random
from statistics import fmean

import pytest

from sllmdask.policy import events as ev
from sllmdask.policy.decisions import Dispatch, Load, Migrate, Preempt, Unload
from sllmdask.policy.views import ModelView, Tier
from sllmdask.sim.clock import Clock
from sllmdask.sim.effects import Cluster, ClusterCosts, Lengths, NodeSpec, TierCosts, introductions

GiB = 1024**3
TIERS = {
    Tier.HOST: TierCosts(8.0 * GiB, lanes=2),
    Tier.DISK: TierCosts(1.0 * GiB, overhead_s=0.5),
    Tier.REMOTE: TierCosts(0.25 * GiB),
}
MODELS = {name: ModelView(name, nbytes=2 * GiB) for name in "abcd"}
ON_DISK = dict.fromkeys("abc", 2 * GiB)


class World:
    """A cluster, its clock, and what it tells."""

    def __init__(self, n_nodes=1, *, tiers=TIERS, host=5 * GiB, on_disk=ON_DISK, lengths=(100, 200), seed=0, **costs):
        self.clock, self.told = Clock(), []
        nodes = [NodeSpec(f"node-{i}", ((f"w{i}", str(i)),), 2, host, 100 * GiB, tiers, on_disk=on_disk) for i in range(n_nodes)]
        self.views = introductions(nodes)
        of_requests = {f"r{i}": Lengths(*lengths) for i in range(4)}
        self.cluster = Cluster(self.clock, self.tell, nodes, MODELS, of_requests, ClusterCosts(**costs), Random(seed))

    def tell(self, event):
        return self.clock.call_at(event.at, partial(self.told.append, event))

    def at(self, at, *decisions):
        for decision in decisions:
            self.clock.call_at(at, partial(self.cluster.enact, decision))
        return self

    def run(self):
        self.clock.run()
        return self

    def events(self, kind):
        return [event for event in self.told if isinstance(event, kind)]

    def times(self, kind):
        return [event.at for event in self.events(kind)]

    def residency(self, worker="w0"):
        return dict([event for event in self.events(ev.WorkerReported) if event.address == worker][-1].residency)


def load(model, worker="w0", n=1):
    return Load(f"{model}/{n}", model, worker, 1.0)


def dispatch(request, instance, worker="w0"):
    return Dispatch(request, "door", instance, worker, worker, 0.0)


def unload(model, worker="w0", n=1):
    return Unload(f"{model}/{n}", model, worker, "test")


def test_a_load_takes_its_overhead_and_bytes_over_bandwidth_and_leaves_a_copy_in_host_memory():
    world = World().at(1.0, load("a")).run()
    assert world.events(ev.LoadFinished) == [ev.LoadFinished(1.0 + 0.5 + 2.0, "a/1", Tier.DISK)]
    assert world.residency() == {"a": Tier.HOST, "b": Tier.DISK, "c": Tier.DISK}


def test_a_second_load_from_host_memory_is_as_fast_as_that_is():
    world = World().at(0.0, load("a")).at(10.0, unload("a")).at(20.0, load("a", n=2)).run()
    assert world.events(ev.LoadFinished)[1] == ev.LoadFinished(20.25, "a/2", Tier.HOST)


@pytest.mark.parametrize("sharing", ["turns", "shared"])
def test_two_loads_from_one_disk_take_as_long_as_the_sum(sharing):
    world = World(sharing=sharing).at(0.0, load("a"), load("b")).run()
    assert max(world.times(ev.LoadFinished)) == pytest.approx(5.0)


def test_two_loads_from_two_disks_do_not_know_of_each_other():
    world = World(2).at(0.0, load("a", "w0"), load("b", "w1")).run()
    assert world.times(ev.LoadFinished) == [2.5, 2.5]


def test_two_instances_of_one_model_on_a_node_read_its_bytes_once():
    world = World().at(0.0, load("a")).at(1.0, load("a", n=2), load("b")).run()
    assert [(each.instance, each.at) for each in world.events(ev.LoadFinished)] == [("a/1", 2.5), ("a/2", 2.5), ("b/1", 5.0)]


def test_a_copy_that_nobody_uses_leaves_host_memory_for_another_one_and_the_worker_says_so():
    world = World().at(0.0, load("a")).at(10.0, load("b")).at(20.0, unload("a")).at(30.0, load("c")).run()
    assert world.residency() == {"a": Tier.DISK, "b": Tier.HOST, "c": Tier.HOST}


def test_a_load_fails_where_all_of_host_memory_is_in_use():
    world = World().at(0.0, load("a"), load("b"), load("c")).run()
    assert [event.instance for event in world.events(ev.LoadFailed)] == ["c/1"]


def test_what_came_from_afar_is_on_disk_afterwards():
    world = World().at(0.0, load("d")).at(20.0, unload("d"), load("a"), load("b")).run()
    assert world.events(ev.LoadFinished)[0] == ev.LoadFinished(8.0, "d/1", Tier.REMOTE)
    assert world.residency()["d"] is Tier.DISK


def test_what_another_node_has_comes_from_there():
    tiers = {**TIERS, Tier.PEER: TierCosts(0.5 * GiB)}
    world = World(2, tiers=tiers).at(0.0, load("d", "w0")).at(20.0, load("d", "w1", 2)).run()
    assert [(each.at, each.loaded_from) for each in world.events(ev.LoadFinished)] == [(8.0, Tier.REMOTE), (24.0, Tier.PEER)]


def test_a_load_that_is_called_off_makes_way_and_leaves_no_copy():
    world = World().at(0.0, load("a"), load("b")).at(1.0, unload("a")).run()
    assert world.events(ev.LoadFinished) == [ev.LoadFinished(3.5, "b/1", Tier.DISK)]
    assert world.residency() == {"a": Tier.DISK, "b": Tier.HOST, "c": Tier.DISK}


def test_noise_spreads_loading_times_around_the_nominal_one_the_same_way_for_the_same_seed():
    def seconds(seed):
        world = World(tiers={**TIERS, Tier.HOST: TierCosts(1.0 * GiB)}, noise=0.3, seed=seed)
        for i in range(400):
            world.at(10.0 * i, load("a", n=i)).at(10.0 * i + 9.0, unload("a", n=i))
        return [each.seconds for each in world.run().cluster.loads[1:]]

    found = seconds(1)
    assert fmean(found) == pytest.approx(2.0, rel=0.05) and len(set(found)) == len(found)
    assert found == seconds(1) != seconds(2)


@pytest.mark.parametrize(("workers_measure", "error"), [(True, 0.15), (False, 3.0)])
def test_what_a_worker_says_of_its_disk_comes_near_to_what_it_is_if_it_measures(workers_measure, error):
    slow = {**TIERS, Tier.DISK: TierCosts(1.0 * GiB, expected_bytes_per_s=4.0 * GiB)}
    world = World(tiers=slow, host=2 * GiB, workers_measure=workers_measure)
    assert world.views[0].bytes_per_s[Tier.DISK] == 4.0 * GiB
    for i in range(10):
        model = "ab"[i % 2]
        world.at(10.0 * i, load(model, n=i)).at(10.0 * i + 9.0, unload(model, n=i))
    told = world.run().events(ev.WorkerReported)[-1].bytes_per_s[Tier.DISK]
    assert abs(told / GiB - 1.0) <= error and (workers_measure or told == 4.0 * GiB)


def test_a_preempted_request_comes_back_and_is_computed_again_with_what_it_had_said():
    world = World().at(0.0, load("a")).at(5.0, dispatch("r0", "a/1"))
    world.at(6.0, Preempt("a/1", "w0", ("r0",), "test")).at(10.0, dispatch("r0", "a/1")).run()
    (returned,) = world.events(ev.RequestReturned)
    steps = world.cluster._costs.steps
    assert 6.0 <= returned.at <= 6.0 + steps.decodes(1, 1, 300)
    n_done = 1 + round((returned.at - 5.0 - steps.prefill(100)) / steps.decodes(1, 1, 115))
    again_s = steps.prefill(100 + n_done)
    (ended,) = world.times(ev.RequestEnded)
    assert ended == pytest.approx(10.0 + again_s + steps.decodes(200 - n_done - 1, 1, 100 + n_done + 1))
    record = world.cluster.requests["r0"]
    assert record.stalled_s == pytest.approx(10.0 + again_s - returned.at)
    assert record.n_preemptions == 1 and record.first_token_at == pytest.approx(5.0 + steps.prefill(100))


def migration(**settings):
    world = World(2, **settings).at(0.0, load("a", "w0")).at(5.0, dispatch("r0", "a/1"))
    return world.at(6.0, Migrate("a/1", "a/2", "a", "w0", "w1", 3.0, "test"))


def test_a_request_that_moves_decodes_until_the_pause_and_ends_later_by_nothing_else():
    alone = World(2).at(0.0, load("a", "w0")).at(5.0, dispatch("r0", "a/1")).run()
    world = migration().run()
    (moved,) = world.events(ev.InstanceMigrated)
    assert (moved.instance, moved.successor, moved.loaded_from) == ("a/1", "a/2", Tier.DISK)
    # Loaded there at 8.5; then to copy, or to compute again, whichever is over sooner; then the pause.
    assert 8.5 < moved.at < 8.7
    record = world.cluster.requests["r0"]
    steps = world.cluster._costs.steps
    assert record.stalled_s == pytest.approx(min(0.02, steps.prefill(20))) and record.n_moves == 1
    (ended,), (ended_alone,) = world.times(ev.RequestEnded), alone.times(ev.RequestEnded)
    assert ended == pytest.approx(ended_alone + record.stalled_s)
    assert (world.cluster.n_slots_used("w0"), world.cluster.n_slots_used("w1")) == (0, 1)


def test_a_move_whose_source_is_gone_fails_and_the_destination_gives_its_memory_back():
    world = migration().at(7.0, unload("a")).run()
    (failed,) = world.events(ev.MigrationFailed)
    assert (failed.instance, failed.successor) == ("a/1", "a/2")
    assert not world.events(ev.InstanceMigrated) and world.cluster.n_slots_used("w1") == 0
    world.at(20.0, load("b", "w1"), load("c", "w1", 2)).run()
    assert not world.events(ev.LoadFailed)


def test_a_move_to_where_there_is_no_memory_fails_and_the_request_goes_on():
    world = World(2, host=2 * GiB).at(0.0, load("a", "w0"), load("b", "w1")).at(5.0, dispatch("r0", "a/1"))
    world.at(6.0, Migrate("a/1", "a/2", "a", "w0", "w1", 3.0, "test")).run()
    assert len(world.events(ev.MigrationFailed)) == len(world.events(ev.RequestEnded)) == 1


def test_a_request_that_is_sent_to_nobody_comes_back():
    world = World().at(0.0, dispatch("r0", "a/1")).run()
    assert world.events(ev.RequestReturned) == [ev.RequestReturned(0.0, "r0")]
