"""What the controller knows: the views, and indexes by which a decision looks at a few of them and not at the whole cluster."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from math import inf
from typing import Any

from sllmdask.policy.estimate import PRIOR_BYTES_PER_S, Supplier, suppliers
from sllmdask.policy.ioqueue import IoQueue
from sllmdask.policy.placement import unfit
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, Tier, WorkerView

#: Holders of a checkpoint that are looked at, of each tier: more of them differ by little.
MAX_HOLDERS = 64

#: (name, address): workers are taken in the order of their names.
Place = tuple[str, str]


@dataclass
class Cohort:
    """Workers to which a checkpoint that they do not have comes equally fast: one estimate serves them all."""

    #: The least seconds that a byte takes.
    s_per_byte: float
    workers: list[Place] = field(default_factory=list)
    #: Those with free slots.
    free: list[Place] = field(default_factory=list)
    #: Instances that may be evicted, least recently used first: (idle since, instance).
    idle: list[tuple[float, str]] = field(default_factory=list)


#: What :class:`Cohort` goes by: bytes per second from other workers, from afar and into the device, and the overheads.
_CohortKey = tuple[float, ...]


def _cohort_key(worker: WorkerView) -> _CohortKey:
    rates = (worker.bytes_per_s.get(tier) or PRIOR_BYTES_PER_S.get(tier, inf) for tier in (Tier.PEER, Tier.REMOTE, Tier.DEVICE))
    return (*rates, worker.overhead_s.get(Tier.PEER, 0.0), worker.overhead_s.get(Tier.REMOTE, 0.0))


class ClusterState:
    """Workers, models and instances. Whoever changes one does it here, so that the indexes are always right.

    All orders are those of events or of names, never of hashes: the same events give the same answers.
    """

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.models: dict[str, ModelView] = {}
        self.instances: dict[str, InstanceView] = {}
        #: Instances that are to leave, and those that wait for others to leave.
        self.draining: dict[str, None] = {}
        self.planned: dict[str, None] = {}
        #: Models about which something has changed, and workers that have more to offer, until :meth:`take_changed`.
        self._changed_models: dict[str, None] = {}
        self._gained_workers: dict[str, None] = {}
        #: What :meth:`has_room` compares with, by worker.
        self._room: dict[str, int] = {}
        #: Deployed models by checkpoint.
        self._served_from: dict[str, dict[str, None]] = {}
        self._of_model: dict[str, dict[str, None]] = {}
        self._on_worker: dict[str, dict[str, None]] = {}
        self._named: dict[str, dict[str, None]] = {}
        self._on_node: dict[str, dict[str, None]] = {}
        self._n_taken: dict[str, int] = {}
        self._holders: dict[str, dict[Tier, dict[str, None]]] = {}
        self._cohort_of: dict[str, _CohortKey] = {}
        self._cohorts: dict[_CohortKey, Cohort] = {}
        #: Keys of the cohorts, those first to which bytes come the fastest.
        self._fastest: list[tuple[float, _CohortKey]] = []
        self._is_free: set[str] = set()
        #: What is in ``Cohort.idle``, by instance, and slots of it by worker.
        self._idle_since: dict[str, float] = {}
        self._idle_slots: dict[str, int] = {}
        self._queues: dict[tuple[str, Tier], IoQueue] = {}
        #: Where each load that is under way, or planned, was promised.
        self._promises: dict[str, tuple[str, Tier]] = {}

    # --- workers ---

    def put_worker(self, worker: WorkerView) -> None:
        """A worker that is new, or that knows better of itself."""
        address = worker.address
        old = self.workers.get(address)
        self.workers[address] = worker
        if old is None:
            self._on_worker.setdefault(address, {})
            self._n_taken[address] = self._idle_slots[address] = 0
            self._room[address] = worker.slots
            self._gained_workers[address] = None
            self._named.setdefault(worker.name, {})[address] = None
            self._on_node.setdefault(node_of(worker), {})[address] = None
        self._hold({} if old is None else old.residency, worker.residency, address)
        key = _cohort_key(worker)
        if key != self._cohort_of.get(address):
            self._leave_cohort(address)
            self._join_cohort(worker, key)
        if old is not None and old.host_capacity < worker.host_capacity:
            self._gained_workers[address] = None

    def drop_worker(self, address: str) -> list[InstanceView]:
        """Forget a worker with its instances; returns these."""
        worker = self.workers[address]
        for mate in self.mates(address):  # it leaves memory to them
            self._gained_workers[mate.address] = None
        instances = self.on_worker(address)
        for instance in instances:
            self.drop_instance(instance.id)
        self._leave_cohort(address)
        del self.workers[address]
        del self._on_worker[address], self._n_taken[address], self._idle_slots[address], self._room[address]
        self._hold(worker.residency, {}, address)
        for index, key in ((self._named, worker.name), (self._on_node, node_of(worker))):
            index[key].pop(address)
            if not index[key]:
                del index[key]
        self._queues = {key: queue for key, queue in self._queues.items() if key[0] in self._on_node}
        self._gained_workers.pop(address, None)
        return instances

    def _hold(self, old: Mapping[str, Tier], new: Mapping[str, Tier], address: str) -> None:
        if old == new:
            return
        for checkpoint, tier in old.items():
            if new.get(checkpoint) is not tier:
                tiers = self._holders[checkpoint]
                del tiers[tier][address]
                if not tiers[tier]:
                    del tiers[tier]
                if not tiers:
                    del self._holders[checkpoint]
        for checkpoint, tier in new.items():
            if old.get(checkpoint) is not tier:
                self._holders.setdefault(checkpoint, {}).setdefault(tier, {})[address] = None
                self._changed_models.update(self._served_from.get(checkpoint, {}))

    def _join_cohort(self, worker: WorkerView, key: _CohortKey) -> None:
        cohort = self._cohorts.get(key)
        if cohort is None:
            cohort = self._cohorts[key] = Cohort(1 / max(min(key[0], key[2]), min(key[1], key[2])))
            insort(self._fastest, (cohort.s_per_byte, key))
        self._cohort_of[worker.address] = key
        insort(cohort.workers, (worker.name, worker.address))
        self._index_free(worker.address)
        for instance_id in self._on_worker[worker.address]:
            self._index_idle(instance_id)

    def _leave_cohort(self, address: str) -> None:
        key = self._cohort_of.get(address)
        if key is None:
            return
        worker, cohort = self.workers[address], self._cohorts[key]
        for instance_id in self._on_worker[address]:
            self._forget_idle(instance_id)
        if address in self._is_free:
            self._is_free.remove(address)
            _remove(cohort.free, (worker.name, address))
        _remove(cohort.workers, (worker.name, address))
        del self._cohort_of[address]
        if not cohort.workers:
            del self._cohorts[key]
            _remove(self._fastest, (cohort.s_per_byte, key))

    def _index_free(self, address: str) -> None:
        key = self._cohort_of.get(address)
        is_free = self.free_slots(address) > 0
        if key is None or is_free == (address in self._is_free):
            return
        cohort, place = self._cohorts[key], (self.workers[address].name, address)
        if is_free:
            self._is_free.add(address)
            insort(cohort.free, place)
        else:
            self._is_free.remove(address)
            _remove(cohort.free, place)

    # --- models ---

    def put_model(self, model: ModelView) -> None:
        self._forget_source(self.models.get(model.name))
        self._served_from.setdefault(model.checkpoint_key, {})[model.name] = None
        self.models[model.name] = model
        self._changed_models[model.name] = None
        self._index_kept(model.name)

    def drop_model(self, name: str) -> None:
        self._forget_source(self.models.pop(name, None))
        self._changed_models[name] = None
        self._index_kept(name)

    def _forget_source(self, model: ModelView | None) -> None:
        if model is not None:
            names = self._served_from[model.checkpoint_key]
            del names[model.name]
            if not names:
                del self._served_from[model.checkpoint_key]

    def is_deployed(self, checkpoint: str) -> bool:
        """Whether a model is served from it."""
        return checkpoint in self._served_from

    def _index_kept(self, name: str) -> None:
        """Which of a model's idle instances may be evicted has changed."""
        for instance_id in self._of_model.get(name, ()):
            self._forget_idle(instance_id)
            self._index_idle(instance_id)
            self._note_room(self.instances[instance_id].worker)

    def _note_room(self, address: str) -> None:
        """Whether a worker has more to offer than before."""
        room = self.free_slots(address) + self._idle_slots[address]
        if room > self._room[address]:
            self._gained_workers[address] = None
        self._room[address] = room

    # --- instances ---

    def put_instance(self, instance: InstanceView) -> None:
        """An instance that is new, or that has changed."""
        old = self.instances.get(instance.id)
        if old is not None:
            self._forget_idle(instance.id)
            self._n_taken[old.worker] -= old.n_slots
        self.instances[instance.id] = instance
        self._of_model.setdefault(instance.model, {})[instance.id] = None
        self._on_worker[instance.worker][instance.id] = None
        self._n_taken[instance.worker] += instance.n_slots
        self._mark(self.draining, instance.id, bool(instance.draining) and instance.state is not InstanceState.UNLOADING)
        self._mark(self.planned, instance.id, instance.state is InstanceState.PLANNED)
        self._index_instance(instance, old is None or old.state is not instance.state)

    def drop_instance(self, instance_id: str) -> InstanceView | None:
        instance = self.instances.get(instance_id)
        if instance is None:
            return None
        self._forget_idle(instance_id)
        del self.instances[instance_id]
        self._n_taken[instance.worker] -= instance.n_slots
        del self._on_worker[instance.worker][instance_id]
        del self._of_model[instance.model][instance_id]
        if not self._of_model[instance.model]:
            del self._of_model[instance.model]
        self._mark(self.draining, instance_id, False)
        self._mark(self.planned, instance_id, False)
        self._index_instance(instance, True)
        return instance

    @staticmethod
    def _mark(index: dict[str, None], key: str, belongs: bool) -> None:
        if belongs:
            index[key] = None
        else:
            index.pop(key, None)

    def _index_instance(self, instance: InstanceView, other_state: bool) -> None:
        self._changed_models[instance.model] = None
        self._index_free(instance.worker)
        model = self.models.get(instance.model)
        if other_state and model is not None and model.min_instances:
            self._index_kept(instance.model)
        elif instance.id in self.instances:
            self._index_idle(instance.id)
        self._note_room(instance.worker)

    def _index_idle(self, instance_id: str) -> None:
        instance = self.instances[instance_id]
        key = self._cohort_of.get(instance.worker)
        if key is None or not instance.idle or instance.draining or instance.successor or self.is_kept(instance):
            return
        since = instance.idle_since or 0.0
        insort(self._cohorts[key].idle, (since, instance_id))
        self._idle_since[instance_id] = since
        self._idle_slots[instance.worker] += instance.n_slots

    def _forget_idle(self, instance_id: str) -> None:
        since = self._idle_since.pop(instance_id, None)
        if since is not None:
            instance = self.instances[instance_id]
            _remove(self._cohorts[self._cohort_of[instance.worker]].idle, (since, instance_id))
            self._idle_slots[instance.worker] -= instance.n_slots

    # --- loads that were promised ---

    def promise(self, instance_id: str, worker: WorkerView, tier: Tier | None, seconds: float, at: float) -> None:
        """A load will read `tier` of the worker's node for `seconds`, after those that were promised before."""
        self.unpromise(instance_id, at)
        if tier is not None and tier is not Tier.DEVICE:
            key = node_of(worker), tier
            self._queues.setdefault(key, IoQueue()).promise(instance_id, at, seconds)
            self._promises[instance_id] = key

    def unpromise(self, instance_id: str, at: float) -> None:
        """The load of an instance has ended, well or badly, or was called off."""
        key = self._promises.pop(instance_id, None)
        queue = self._queues.get(key) if key else None
        if key and queue is not None:
            queue.done(instance_id, at)
            if not len(queue):
                del self._queues[key]

    def ready_in_s(self, instance: InstanceView, at: float) -> float:
        """Seconds until an instance that is loading, or planned, is predicted to be ready."""
        key = self._promises.get(instance.id)
        if key is not None and instance.state is InstanceState.LOADING and not instance.moved_from:
            reading_s = self._queues[key].ends_in_s(instance.id, at)
            if reading_s is not None:  # what was promised before may have ended sooner or later than was predicted
                return reading_s
        return max(0.0, (at if instance.ready_by is None else instance.ready_by) - at)

    def arriving(self, checkpoint: str) -> set[str]:
        """Nodes that read a checkpoint for an instance."""
        models = self._served_from.get(checkpoint, ())
        instances = (instance for model in models for instance in self.instances_of(model))
        return {node_of(self.workers[each.worker]) for each in instances if each.state is InstanceState.LOADING}

    def arrives_in_s(self, worker: WorkerView, checkpoint: str, at: float) -> float | None:
        """Seconds until a checkpoint that is being read to the worker's node is there; ``None``: it is not being read."""
        both = (*self.on_worker(worker.address), *self.neighbours(worker.address))
        reading = [each for each in both if each.state is InstanceState.LOADING and each.checkpoint == checkpoint]
        return min((self.ready_in_s(each, at) for each in reading), default=None)

    def queue_s(self, worker: WorkerView, at: float) -> Mapping[Tier, float]:
        """Seconds of the loads that were promised on each tier of the worker's node before."""
        if not self._queues:
            return {}
        node = node_of(worker)
        tiers = (Tier.HOST, Tier.DISK, Tier.PEER, Tier.REMOTE)
        return {tier: self._queues[node, tier].queue_s(at) for tier in tiers if (node, tier) in self._queues}

    # --- what the rules ask ---

    def take_changed(self) -> tuple[list[str], list[str]]:
        """Models about which something has changed, and workers that have more to offer, since it was asked last."""
        changed = list(self._changed_models), list(self._gained_workers)
        self._changed_models, self._gained_workers = {}, {}
        return changed

    def touch_worker(self, address: str) -> None:
        """It has more to offer, by what is not in the views."""
        if address in self.workers:
            self._gained_workers[address] = None

    def touch_model(self, name: str) -> None:
        self._changed_models[name] = None

    def touch_instance(self, instance_id: str) -> None:
        if instance_id in self.instances:
            self._gained_workers[self.instances[instance_id].worker] = None

    @property
    def any_gained(self) -> bool:
        """Whether :meth:`take_changed` would tell of workers."""
        return bool(self._gained_workers)

    @property
    def changed_models(self) -> list[str]:
        """What :meth:`take_changed` would tell of models."""
        return list(self._changed_models)

    def instances_of(self, model: str) -> list[InstanceView]:
        """In the order in which they came to be."""
        return [self.instances[each] for each in self._of_model.get(model, ())]

    def on_worker(self, address: str) -> list[InstanceView]:
        return [self.instances[each] for each in self._on_worker.get(address, ())]

    def mates(self, address: str) -> list[WorkerView]:
        """The workers that share host memory with a worker, itself included."""
        return [self.workers[each] for each in self._on_node[node_of(self.workers[address])]]

    def neighbours(self, address: str) -> list[InstanceView]:
        """The instances on the other workers that share host memory with a worker."""
        return [each for mate in self.mates(address) if mate.address != address for each in self.on_worker(mate.address)]

    def free_slots(self, address: str) -> int:
        """Slots that nothing takes or waits for. Negative while one leaves for another."""
        return self.workers[address].slots - self._n_taken[address]

    def has_room(self, address: str, n_slots: int) -> bool:
        """Whether `n_slots` slots are free, or would be without the instances that may be evicted."""
        return self._room[address] >= n_slots

    def cohort_key(self, address: str) -> _CohortKey:
        return self._cohort_of[address]

    def least_seconds(self, model: ModelView, address: str) -> float:
        """What a load from elsewhere takes at the least, whoever supplies it; 0 where the worker has the checkpoint itself."""
        if model.checkpoint_key in self.workers[address].residency:
            return 0.0
        return self._cohorts[self._cohort_of[address]].s_per_byte * model.nbytes

    def evictable(self, instance_id: str) -> bool:
        return instance_id in self._idle_since

    def is_kept(self, instance: InstanceView) -> bool:
        """Whether other models may not have its slots: its model is pinned, or has it for its minimum."""
        model = self.models.get(instance.model)
        if model is None:
            return False
        if model.pinned or not model.min_instances:
            return model.pinned
        ready = (each for each in self.instances_of(model.name) if each.state is InstanceState.READY)
        return any(each.id == instance.id for each in islice(ready, model.min_instances))

    def living(self, model: str) -> list[InstanceView]:
        """Instances that stay, or are on their way; of one that is being moved, the one that it becomes."""
        return [
            each
            for each in self.instances_of(model)
            if each.state is not InstanceState.UNLOADING and not each.draining and not each.successor
        ]

    def named(self, names: tuple[str, ...]) -> list[WorkerView]:
        return [self.workers[address] for name in names for address in self._named.get(name, ())]

    def holders(self, checkpoint: str) -> list[WorkerView]:
        """Workers that have a checkpoint, the nearest tiers first; not all of them, if there are very many."""
        tiers = self._holders.get(checkpoint, {})
        found = (islice(tiers[tier], MAX_HOLDERS) for tier in Tier if tier in tiers)
        return [self.workers[address] for address in chain.from_iterable(found)]

    def suppliers(self, checkpoint: str) -> tuple[Supplier, ...]:
        return suppliers(checkpoint, self.holders(checkpoint))

    def cohorts(self) -> Iterator[Cohort]:
        """Those first to which bytes come the fastest."""
        for _, key in self._fastest:
            yield self._cohorts[key]

    @property
    def any_free(self) -> bool:
        return bool(self._is_free)

    def fit(self, model: ModelView) -> list[WorkerView]:
        """All workers that could ever run `model`. It looks at every one."""
        return [worker for worker in self.workers.values() if unfit(model, worker) is None]


def node_of(worker: WorkerView) -> str:
    """What shares host memory, disk and links: a worker by itself, if it names no node."""
    return worker.node or worker.address


def _remove(items: list[Any], item: Any) -> None:
    """Take `item` out of a sorted list that has it."""
    i = bisect_left(items, item)
    assert items[i] == item
    del items[i]
