"""The life of instances: they are begun, become ready, move to other workers, and leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sllmdask.policy.backoff import BackOff
from sllmdask.policy.choice import Option, Way
from sllmdask.policy.claims import Claims
from sllmdask.policy.decisions import Decision, Load, Migrate, Preempt, Unload
from sllmdask.policy.options import WayFinder
from sllmdask.policy.placement import missing_nbytes, unfit
from sllmdask.policy.queue import RequestQueue
from sllmdask.policy.records import Ways
from sllmdask.policy.state import ClusterState
from sllmdask.policy.timers import Timers
from sllmdask.policy.views import HeldInstance, InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView
from sllmdask.units import format_seconds

#: An instance that has moved stays for so many times as long as that took: moves take no more than a small share of its time,
#: and two models that want the same node do not chase each other.
REST = 10.0
#: Seconds that front doors have to claim the requests of an instance that is adopted; until then it does not leave as idle.
CLAIM_S = 10.0
#: Seconds after it became ready for which a worker's account may be older than an instance.
ACCOUNT_LAG_S = 5.0
#: Why the instances of a worker that is drained leave.
NODE_DRAINED = "its node is drained"


class Fleet:
    """All changes of instances, with the decisions that bring them about."""

    def __init__(
        self,
        state: ClusterState,
        queue: RequestQueue,
        claims: Claims,
        back_off: BackOff,
        ways: WayFinder,
        timers: Timers,
        generation: int = 1,
    ) -> None:
        self._state, self._queue, self._claims = state, queue, claims
        self._back_off, self._ways, self._timers = back_off, ways, timers
        self._n_instances, self._generation = 0, generation
        #: When the newest instance became ready.
        self.last_ready_at = 0.0
        #: Who has to leave by a move or a preemption for an instance that is planned.
        self._victims: dict[str, tuple[str, ...]] = {}
        #: What is being moved, by its successor.
        self._moving: dict[str, str] = {}
        #: Requests that were asked to come back.
        self._preempted: dict[str, None] = {}

    # --- they begin ---

    def begin(self, model: ModelView, option: Option, ways: Ways, at: float) -> tuple[InstanceView, list[Decision]]:
        """An instance of `model` by one of the ways that load one: at once, or when those that have to leave have left."""
        worker = self._state.workers[option.worker]
        decisions: list[Decision] = []
        for victim, destination in option.leaving:
            decisions += self._make_leave(self._state.instances[victim], destination, option.way, model.name, at)
        instance = InstanceView(
            id=self._next_id(model.name),
            model=model.name,
            worker=worker.address,
            n_slots=model.n_slots,
            checkpoint=model.checkpoint_key,
            nbytes=model.nbytes,
            state=InstanceState.PLANNED if option.leaving else InstanceState.LOADING,
            since=at,
            ready_by=at + option.ready_in_s,
        )
        self._state.put_instance(instance)
        self._state.promise(instance.id, worker, option.tier, _reading_s(option), at)
        if option.way in (Way.MIGRATE, Way.PREEMPT):
            self._victims[instance.id] = tuple(victim for victim, _ in option.leaving)
        if not option.leaving:
            decisions.append(Load(instance.id, model.name, worker.address, option.ready_in_s, _why(ways)))
        return instance, decisions

    def begin_planned(self, workers: Sequence[str], at: float) -> list[Decision]:
        """Load what waited for slots and memory that are free by now; `workers` are those on which something has changed."""
        state = self._state
        near = {mate.address for address in workers if address in state.workers for mate in state.mates(address)}
        decisions: list[Decision] = []
        for instance in [state.instances[each] for each in state.planned]:
            if instance.worker not in near:
                continue
            model = state.models.get(instance.model)
            wanted = model is not None and (self._queue.waits(model.name) or len(state.living(model.name)) <= model.min_instances)
            if instance.id in self._victims and not wanted:
                self.drop(instance.id, at)  # those for whom others were moved have gone
                continue
            worker = state.workers[instance.worker]
            others = [each for each in state.on_worker(worker.address) if each.state is not InstanceState.PLANNED]
            beside = state.neighbours(worker.address)
            n_free = worker.slots - sum(each.n_slots for each in others)
            lacks = missing_nbytes(instance.nbytes, instance.checkpoint, worker, [*others, *beside])
            if model is not None and n_free >= instance.n_slots and lacks <= 0:
                self._victims.pop(instance.id, None)
                state.unpromise(instance.id, at)
                tier, parts = self._ways.load_parts(model, worker, at)
                ready_in_s = sum(parts.values())
                state.promise(instance.id, worker, tier, ready_in_s - parts["queue"], at)
                state.put_instance(replace(instance, state=InstanceState.LOADING, since=at, ready_by=at + ready_in_s))
                decisions.append(Load(instance.id, instance.model, worker.address, ready_in_s))
        return decisions

    def _next_id(self, model: str) -> str:
        self._n_instances += 1
        # No instance is called like one that a controller before this one has loaded: it may be adopted.
        return f"{model}/{self._n_instances}" if self._generation == 1 else f"{model}/{self._generation}.{self._n_instances}"

    # --- they were there before ---

    def adopt(self, worker: WorkerView, held: HeldInstance, at: float) -> InstanceView:
        """An instance that a worker has: it counts from now on."""
        state = self._state
        model, leaving = state.models.get(held.model), held.leaving
        if model is None:
            leaving = leaving or "deleted"
        elif model.n_slots != held.n_slots or unfit(model, worker) is not None:
            leaving = leaving or "replaced"
        n_requests = len(self._queue.on_instance(held.id))
        is_ready = held.state is InstanceState.READY
        load_s = 0.0 if is_ready or model is None else sum(self._ways.load_parts(model, worker, at)[1].values())
        instance = InstanceView(
            id=held.id,
            model=held.model,
            worker=worker.address,
            n_slots=held.n_slots,
            state=held.state,
            since=at,
            checkpoint=held.checkpoint,
            nbytes=held.nbytes,
            n_requests=n_requests,
            n_unclaimed=max(0, held.n_requests - n_requests),
            draining=leaving,
            idle_since=None if n_requests or not is_ready else at,
            ready_by=None if is_ready else at + load_s,
        )
        state.put_instance(instance)
        if instance.n_unclaimed:
            self._timers.set(at + CLAIM_S, "unclaimed", instance.id)
        return instance

    def claimed(self, instance_id: str, at: float) -> InstanceView | None:
        """A front door has said that it has a request there, which is on the list already."""
        instance = self._state.instances.get(instance_id)
        if instance is None:
            return None
        if instance.state is InstanceState.LOADING:  # it serves: the news of that was lost with the scheduler before
            self.loaded(instance_id, Tier.HOST, at)
            instance = self._state.instances[instance_id]
        n_unclaimed = max(0, instance.n_unclaimed - 1)
        instance = replace(instance, n_requests=instance.n_requests + 1, idle_since=None, n_unclaimed=n_unclaimed)
        self._state.put_instance(instance)
        if not n_unclaimed:
            self._timers.cancel("unclaimed", instance_id)
        return instance

    def none_claimed(self, instance_id: str, at: float) -> None:
        """Nobody has said that the rest of what an adopted instance has is wanted: it counts no more."""
        instance = self._state.instances.get(instance_id)
        if instance is not None:
            idle_since = None if instance.n_requests or instance.state is not InstanceState.READY else at
            self._state.put_instance(replace(instance, n_unclaimed=0, idle_since=idle_since))

    # --- they become ready ---

    def loaded(self, instance_id: str, loaded_from: Tier, at: float) -> None:
        instance = self._state.instances.get(instance_id)
        self._state.unpromise(instance_id, at)
        if instance is not None and instance.state is InstanceState.LOADING and instance_id not in self._moving:
            self._back_off.loaded(instance.model, instance.worker)
            self._ready(instance, loaded_from, at)

    def _ready(self, instance: InstanceView, loaded_from: Tier, at: float) -> None:
        ready = replace(
            instance,
            state=InstanceState.READY,
            since=at,
            ready_at=at,
            idle_since=None if instance.n_requests else at,
            loaded_from=loaded_from,
            ready_by=None,
            moved_from="",
        )
        self._state.put_instance(ready)
        self.last_ready_at = at
        self.may_settle(ready, at)

    def may_settle(self, instance: InstanceView, at: float) -> None:
        """An idle instance may be evicted from a moment on that nothing else tells those who wait."""
        settles_in_s = self._ways.settles_in(instance, at)
        if instance.idle and settles_in_s > 0 and self._queue.waiting:
            self._timers.set(at + settles_in_s, "settled", instance.id)

    def load_failed(self, instance_id: str, reason: str, at: float) -> None:
        instance = self._state.instances.get(instance_id)
        if instance is None:
            return
        # An instance may serve, and be on its way out, while its last bytes are still read. A load that was called off ends as a
        # failed one, too, and tells nothing of the model.
        if instance.state is InstanceState.UNLOADING and instance.ready_at is None:
            return
        if instance.state is not InstanceState.UNLOADING:
            self.drop(instance_id, at)
        self._back_off.failed(instance.model, instance.worker, reason, at)
        self._state.touch_model(instance.model)

    def account(self, address: str, instances: frozenset[str], at: float) -> None:
        """A worker's own account of what it has: an instance that it does not list has gone, unless it is very new."""
        for instance in self._state.on_worker(address):
            if instance.state is not InstanceState.READY or instance.id in instances:
                self._timers.cancel("missing", instance.id)
            elif instance.ready_at is None or at >= instance.ready_at + ACCOUNT_LAG_S:
                self.drop(instance.id, at)
            else:
                self._timers.set(instance.ready_at + ACCOUNT_LAG_S, "missing", instance.id)

    # --- they move ---

    def _make_leave(self, victim: InstanceView, destination: str, way: Way, for_model: str, at: float) -> list[Decision]:
        """One of those that make room for an instance of another model."""
        if victim.idle and not destination:
            return [self.unload(victim, "evicted", at)]
        cause = f"makes room for {for_model}"
        if way is Way.PREEMPT:
            self.drain(victim, "preempted", at)
            return self.preempt(victim, self._queue.on_instance(victim.id), cause)
        model, target = self._state.models[victim.model], self._state.workers[destination]
        tier, parts = self._ways.load_parts(model, target, at)
        load_s = sum(parts.values())
        moved_in_s = load_s + self._ways.move_seconds(victim, target.address)
        successor = InstanceView(
            id=self._next_id(victim.model),
            model=victim.model,
            worker=destination,
            n_slots=victim.n_slots,
            checkpoint=victim.checkpoint,
            nbytes=victim.nbytes,
            state=InstanceState.LOADING,
            since=at,
            ready_by=at + moved_in_s,
            moved_from=victim.id,
        )
        self._state.put_instance(successor)
        self._state.promise(successor.id, target, tier, load_s - parts["queue"], at)
        self._state.put_instance(replace(victim, successor=successor.id))
        self._moving[successor.id] = victim.id
        self._claims.drop(victim.id)
        return [Migrate(victim.id, successor.id, victim.model, victim.worker, destination, moved_in_s, cause)]

    def preempt(self, instance: InstanceView, requests: Sequence[RequestView], cause: str) -> list[Decision]:
        """`requests` are to come back, those that were not asked to before."""
        asked = tuple(request.id for request in requests if request.id not in self._preempted)
        self._preempted.update(dict.fromkeys(asked))
        return [Preempt(instance.id, instance.worker, asked, cause)] if asked else []

    def was_preempted(self, request_id: str) -> bool:
        return request_id in self._preempted

    def request_gone(self, request_id: str) -> None:
        """It has ended, or come back."""
        self._preempted.pop(request_id, None)

    def migrated(self, instance_id: str, successor_id: str, loaded_from: Tier, at: float) -> None:
        """The requests are on the successor; where they were, nothing is left."""
        state = self._state
        old, new = state.instances.get(instance_id), state.instances.get(successor_id)
        self._moving.pop(successor_id, None)
        state.unpromise(successor_id, at)
        if new is not None:
            self._queue.move(instance_id, successor_id)
            n_requests = len(self._queue.on_instance(successor_id))  # of some, the worker has told before
            draining = (old.draining if old else "") or new.draining
            new = replace(new, n_requests=n_requests, draining=draining, rests_until=at + REST * (at - new.since))
            if new.state is InstanceState.LOADING:
                self._back_off.loaded(new.model, new.worker)
                self._ready(new, loaded_from, at)
            else:  # it was called off too late
                state.put_instance(new)
        if old is not None:
            state.put_instance(replace(old, successor=""))
            self.drop(instance_id, at)

    def migration_failed(self, instance_id: str, successor_id: str, reason: str, at: float) -> None:
        """The instance goes on; what was to take its place is planned anew."""
        successor = self._state.instances.get(successor_id)
        if successor is not None:
            if successor.state is not InstanceState.UNLOADING:  # it was not called off
                self._back_off.failed(successor.model, successor.worker, reason, at)
            self.drop(successor_id, at)
        self._stays(instance_id, at)

    def has_nothing_to_move(self, instance: InstanceView, at: float) -> None:
        """Its last request has ended while its successor was loaded: it can leave at once, and nobody waits for the other."""
        successor = self._state.instances.get(instance.successor)
        if successor is not None and successor.state is InstanceState.LOADING and not self._queue.waits(instance.model):
            self.drain(successor, "nothing is left to move", at)

    def _stays(self, instance_id: str, at: float) -> None:
        """An instance does not move after all: nothing that waits for its slots is planned any more."""
        instance = self._state.instances.get(instance_id)
        if instance is not None and instance.successor:
            self._moving.pop(instance.successor, None)
            self._state.put_instance(replace(instance, successor=""))
        for planned in [planned for planned, victims in self._victims.items() if instance_id in victims]:
            self.drop(planned, at)

    # --- they leave ---

    def drain(self, instance: InstanceView, cause: str, at: float) -> None:
        """It gets no more requests, and leaves when it has none."""
        if instance.state is InstanceState.PLANNED:
            self.drop(instance.id, at)
        elif instance.state is not InstanceState.UNLOADING or not instance.draining:
            self._state.put_instance(replace(instance, draining=cause))

    def reopen(self, instance: InstanceView) -> None:
        """It stays after all."""
        self._state.put_instance(replace(instance, draining=""))

    def unload_drained(self, at: float) -> list[Decision]:
        """What nobody will be sent to any more leaves when its last request has ended; a load is called off."""
        decisions: list[Decision] = []
        for instance in [self._state.instances[each] for each in self._state.draining]:
            if instance.state is InstanceState.LOADING or (
                instance.idle and not instance.successor and not self._awaits_another(instance)
            ):
                decisions.append(self.unload(instance, instance.draining, at))
        return decisions

    def _awaits_another(self, instance: InstanceView) -> bool:
        """Whether one of a model's minimum stays on its drained node until the one that is on its way elsewhere is ready."""
        model = self._state.models.get(instance.model)
        if model is None or instance.draining != NODE_DRAINED or not model.min_instances:
            return False
        n_ready = sum(each.state is InstanceState.READY for each in self._state.living(model.name))
        return n_ready < min(model.min_instances, len(self._state.living(model.name)))

    def unload(self, instance: InstanceView, cause: str, at: float) -> Unload:
        self._state.put_instance(
            replace(instance, state=InstanceState.UNLOADING, since=at, idle_since=None, successor="", ready_by=None)
        )
        self._claims.drop(instance.id)
        self._state.unpromise(instance.id, at)
        if instance.id in self._moving:
            self._stays(self._moving[instance.id], at)
        forget = not self._state.is_deployed(instance.checkpoint)
        return Unload(instance.id, instance.model, instance.worker, cause, forget)

    def drop(self, instance_id: str, at: float) -> None:
        """It is gone. Its requests stay on the list: their front doors see the stream break, and end them or send them back."""
        instance = self._state.drop_instance(instance_id)
        if instance is not None:
            self.dropped(instance, at)

    def dropped(self, instance: InstanceView, at: float) -> None:
        """An instance is not known any more: what depended on it is put right."""
        self._claims.drop(instance.id)
        self._state.unpromise(instance.id, at)
        self._victims.pop(instance.id, None)
        for kind in ("missing", "settled", "unclaimed"):
            self._timers.cancel(kind, instance.id)
        source = self._moving.pop(instance.id, None)
        if source is not None:
            self._stays(source, at)
        successor = self._state.instances.get(instance.successor)
        if successor is not None:
            self._moving.pop(successor.id, None)
            self.drain(successor, "replaced", at)


def _reading_s(option: Option) -> float:
    """Seconds for which a load keeps its tier busy."""
    return option.parts.get("overhead", 0.0) + option.parts.get("read", 0.0)


def _why(ways: Ways) -> dict[str, str]:
    """For the log line of a load: each worker that was looked at."""
    why = dict(ways.unfit)
    for option in ways.options:
        if option.way in (Way.FREE, Way.EVICT):
            why[option.worker] = f"ready in {format_seconds(option.ready_in_s)}"
            if option.leaving:
                why[option.worker] += f" after {', '.join(victim for victim, _ in option.leaving)} left"
    return why
