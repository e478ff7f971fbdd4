"""``Controller.handle(event) -> list[Decision]``: folds events into views, then asks the rules.

The live scheduler plugin and the simulator run this same object. It owns the queue and the account of what runs where; the
workers' reports correct its view. It has no clock (time arrives in events), does no I/O and never raises for what a user did.

What an event has changed is looked at, and no more: a decision costs the same in a large cluster as in a small one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from sllmdask.errors import (
    ConfigError,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    NodeDraining,
    QueueFull,
    QueueTimeout,
    SllmError,
)
from sllmdask.policy import events as ev
from sllmdask.policy.autoscaler import Autoscaler
from sllmdask.policy.backoff import BackOff
from sllmdask.policy.choice import Option, Way
from sllmdask.policy.choosers import CHOOSERS
from sllmdask.policy.claims import Awaited, Claims
from sllmdask.policy.decisions import Chose, Decision, Dispatch, Refuse, ReportLoaded, WakeAt
from sllmdask.policy.dispatch import nearest, takes_requests
from sllmdask.policy.draining import Drainer
from sllmdask.policy.fleet import Fleet
from sllmdask.policy.learned import ServiceTime
from sllmdask.policy.move_times import MoveTimes
from sllmdask.policy.options import WayFinder
from sllmdask.policy.placement import unfit, why_unplaceable
from sllmdask.policy.queue import Demand, RequestQueue, Turn, demand_of
from sllmdask.policy.records import N_BEST, REASONS, Records, Ways, choice
from sllmdask.policy.state import ClusterState
from sllmdask.policy.timers import Timers
from sllmdask.policy.views import HeldInstance, InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView

#: Demands that one event looks at; the others follow at once, with a wake-up call in between, so that no event takes long.
_MAX_LOOKS = 2
#: Seconds before a request that waits for a predicted end looks again, at the least.
_LOOK_AGAIN_S = 0.25


@dataclass(frozen=True)
class ControllerSettings:
    """Seconds, counts and names that the rules need."""

    worker_wait_s: float = 20.0
    max_queue: int = 1024
    min_residency_s: float = 0.0
    #: A request that has waited this long for a slot closes the instances that hold it to newcomers, so that a steady
    #: stream for one model cannot keep another out for ever.
    patience_s: float = 10.0
    #: Requests that one instance works on at once.
    max_requests: int = 64
    #: Whether a running instance can move to another worker, and requests be sent back to the queue.
    can_migrate: bool = False
    can_preempt: bool = False
    #: Whether single requests can move to another instance of their model: off drained nodes, and off instances that leave.
    can_move: bool = False
    #: Whether the place of a request of another model may be taken by a newer one of the same class, as Shepherd does.
    preempts_older: bool = False
    #: The rule that picks one of the ways to serve a request: a name of :data:`~sllmdask.policy.choosers.CHOOSERS`.
    chooser: str = "fastest"
    #: Of a chooser that needs chance.
    seed: int = 0
    #: Which controller of its cluster this is: instances of the ones before may still be there, and are called otherwise.
    generation: int = 1


class Controller:
    """The cluster's one decider. Single writer: call :meth:`handle` from one thread, one event after another."""

    def __init__(self, settings: ControllerSettings) -> None:
        if settings.chooser not in CHOOSERS:
            raise ConfigError(f"chooser {settings.chooser!r} is not known; choose one of {', '.join(sorted(CHOOSERS))}.")
        self.settings = settings
        self.state = ClusterState()
        self.queue = RequestQueue()
        self.claims = Claims(self.queue, self.state)
        self.awaited = Awaited(self.queue)
        self.back_off = BackOff()
        #: How long requests run, by model.
        self.service: dict[str, ServiceTime] = {}
        self.move_times = MoveTimes()
        self.timers = Timers()
        self.finder = WayFinder(
            self.state,
            self.queue,
            self.claims,
            self.awaited,
            self.back_off,
            self.service,
            self.move_times,
            max_requests=settings.max_requests,
            min_residency_s=settings.min_residency_s,
            can_migrate=settings.can_migrate,
            can_preempt=settings.can_preempt,
            preempts_older=settings.preempts_older,
        )
        self.fleet = Fleet(self.state, self.queue, self.claims, self.back_off, self.finder, self.timers, settings.generation)
        self._choose = CHOOSERS[settings.chooser](settings.seed)
        self.autoscaler = Autoscaler(
            self.state, self.queue, self.back_off, self.finder, self.fleet, self.timers, self._choose, settings.min_residency_s
        )
        self.drainer = Drainer(
            self.state,
            self.queue,
            self.claims,
            self.back_off,
            self.finder,
            self.fleet,
            self.autoscaler,
            self.timers,
            self._choose,
            max_requests=settings.max_requests,
            can_move=settings.can_move,
        )
        self.records = Records(self.queue)
        #: When what is waited for is predicted to be had: what comes sooner is of interest.
        self._until: dict[Demand, float] = {}
        #: Those of it that an instance is on its way for.
        self._coming: dict[Demand, None] = {}
        #: What has to be looked at.
        self._dirty: dict[Demand, None] = {}
        #: Since when no connected worker may run the model, or not where it is wished for.
        self._unplaceable_since: dict[Demand, float] = {}
        #: Names of workers that were there under the scheduler before this one, and are about to come back.
        self._not_back: set[str] = set()
        self._wake_at: float | None = None

    def handle(self, event: ev.Event) -> list[Decision]:
        """Everything that follows from `event`, in the order in which it must be enacted."""
        decisions = self._fold(event)
        decisions += self._settle(event.at)
        if isinstance(event, ev.RequestArrived) and self.queue.n_queued > self.settings.max_queue:
            late = self.waiting.get(event.request.id)
            decisions += [self._refuse(late, QueueFull(late.model, self.settings.max_queue))] if late else []
        wake_at = event.at if self._dirty and not self._not_back else self.timers.first()
        if wake_at != self._wake_at or isinstance(event, ev.TimerFired):
            self._wake_at = wake_at
            decisions.append(WakeAt(wake_at))
        return decisions

    # --- what others may ask ---

    @property
    def workers(self) -> dict[str, WorkerView]:
        return self.state.workers

    @property
    def models(self) -> dict[str, ModelView]:
        return self.state.models

    @property
    def instances(self) -> dict[str, InstanceView]:
        return self.state.instances

    @property
    def waiting(self) -> dict[str, RequestView]:
        """Waiting requests by id, in order of arrival."""
        return self.queue.waiting

    @property
    def running(self) -> dict[str, RequestView]:
        """Dispatched requests by id."""
        return self.queue.running

    def instances_of(self, model: str) -> list[InstanceView]:
        return self.state.instances_of(model)

    def last_failure(self, model: str) -> str | None:
        """The reason of the model's newest failed load that has not been followed by a good one."""
        return self.back_off.last_reason(model)

    def feasible(self, model: ModelView) -> SllmError | None:
        """Why no worker that is connected now could ever run `model`, or ``None``: some could, or none is connected."""
        workers = [_undrained(worker) for worker in self.workers.values()]
        if not workers or any(unfit(model, worker) is None for worker in workers):
            return None
        return why_unplaceable(model, workers)

    def best_worker(self, model: ModelView, at: float) -> WorkerView | None:
        """Where a request for `model` would be placed now, or if every slot is taken, where it would load the fastest."""
        option = self._choose(self.finder.of_nobody(model, at, may_evict=True).open)
        if option is not None:
            return self.workers[option.worker]
        seconds = self.finder.load_seconds
        return min(self.state.fit(model), key=lambda worker: (seconds(model, worker, at), worker.name), default=None)

    # --- events into views ---

    def _fold(self, event: ev.Event) -> list[Decision]:
        at = event.at
        match event:
            case ev.WorkerJoined(worker=worker, instances=held):
                self._drop_worker(worker.address, at)
                self.state.put_worker(worker)
                self._adopt(worker, held, at)
                self._dirty.update(dict.fromkeys(self._unplaceable_since))
                self._is_back(worker.name)
            case ev.WorkersAwaited(names=names, until=until):
                self._not_back = set(names) - {worker.name for worker in self.workers.values()}
                if self._not_back:
                    self.timers.set(until, "back")
            case ev.WorkerReported():
                self._report(event)
            case ev.WorkerLeft(address=address):
                self._drop_worker(address, at)
            case ev.WorkerDrains(address=address, cause=cause):
                self.drainer.drain(address, cause, at)
                self._dirty.update(dict.fromkeys(self.queue.in_turn()))
            case ev.WorkerUndrained(address=address):
                self.drainer.undrain(address, at)
                self._dirty.update(dict.fromkeys(self.queue.in_turn()))
            case ev.ModelDeployed(model=model):
                self._deploy(model, at)
            case ev.ModelDeleted(model=name, replaced=replaced):
                return self._delete(name, replaced, at)
            case ev.RequestArrived(request=request):
                return self._admit(request)
            case ev.RequestEnded(request=request_id, n_tokens=n_tokens):
                self._end(request_id, at, served=True, n_tokens=n_tokens)
            case ev.RequestReturned(request=request_id, deadline_at=deadline_at, near=near):
                return self._return(request_id, at, deadline_at, near)
            case ev.LoadRequested(request=request):
                self.back_off.forget_model(request.model)
                return self._admit(request)
            case ev.RequestClaimed(request=request):
                self._claim(request, at)
            case ev.RequestMoved(request=request_id, instance=instance):
                self._rebind(request_id, instance, at)
            case ev.RequestStayed(request=request_id, reason=reason):
                self.drainer.stayed(request_id, reason, at)
            case ev.MoveEnded():
                self.move_times.observe(event, self.models.get(event.model))
                mover = self.running.get(event.request)
                # It may have been lost there, and be elsewhere, before its old worker tells of the move.
                if event.outcome == "moved" and mover is not None and mover.instance == event.instance:
                    self._rebind(event.request, event.successor, at)
            case ev.TokensCounted(n_tokens=counts):
                for request_id, n_tokens in counts.items():
                    self.queue.count(request_id, n_tokens, at)
            case ev.InstanceLeaves(instance=instance, cause=cause):
                if instance in self.instances:
                    self.fleet.drain(self.instances[instance], cause, at)
            case ev.UnloadRequested(model=name, node=node):
                return self._ask_to_leave(name, node, at)
            case ev.FrontDoorLeft(front_door=front_door):
                for request_id in self.queue.of_door(front_door):
                    self._end(request_id, at)
            case ev.LoadFinished(instance=instance, loaded_from=loaded_from):
                self.fleet.loaded(instance, loaded_from, at)
            case ev.LoadFailed(instance=instance, reason=reason):
                self.fleet.load_failed(instance, reason, at)
            case ev.UnloadFinished(instance=instance) | ev.InstanceLost(instance=instance):
                self.fleet.drop(instance, at)
            case ev.InstanceMigrated(instance=instance, successor=successor, loaded_from=loaded_from):
                self.fleet.migrated(instance, successor, loaded_from, at)
            case ev.MigrationFailed(instance=instance, successor=successor, reason=reason):
                self.fleet.migration_failed(instance, successor, reason, at)
            case ev.TimerFired():
                pass
        return []

    def _report(self, event: ev.WorkerReported) -> None:
        worker = self.workers.get(event.address)
        if worker is None or event.version <= worker.version:
            return
        known = replace(
            worker,
            version=event.version,
            residency=event.residency,
            bytes_per_s=event.bytes_per_s,
            overhead_s=event.overhead_s,
            host_capacity=worker.host_capacity if event.host_capacity is None else event.host_capacity,
        )
        self.state.put_worker(known)
        if known.host_capacity != worker.host_capacity:
            self._dirty.update(dict.fromkeys(self.queue.in_turn()))
        if event.instances is not None:
            self.fleet.account(event.address, event.instances, event.at)

    def _drop_worker(self, address: str, at: float) -> None:
        """Forget a worker with its instances; who waited for them is placed anew."""
        if address in self.workers:
            for instance in self.state.drop_worker(address):
                self.fleet.dropped(instance, at)
            self.back_off.forget_worker(address)
            self.move_times.forget_worker(address)
            self._dirty.update(dict.fromkeys(self.queue.in_turn()))

    def _adopt(self, worker: WorkerView, held: Iterable[HeldInstance], at: float) -> None:
        """Nothing is loaded in the slots of what a worker has, nor sent there before that is known."""
        for each in held:
            if each.id not in self.instances:
                instance = self.fleet.adopt(worker, each, at)
                if not instance.n_unclaimed:
                    self._all_claimed(instance.model, at)

    def _is_back(self, name: str) -> None:
        """A worker of that name is there; once none is missing, what waits is looked at."""
        if name in self._not_back:
            self._not_back.remove(name)
            if not self._not_back:
                self._all_are_back()

    def _all_are_back(self) -> None:
        """Or are not waited for any more."""
        self._not_back.clear()
        self.timers.cancel("back")
        for worker in self.workers:
            self.state.touch_worker(worker)
        for model in self.models:
            self.state.touch_model(model)
        self._dirty.update(dict.fromkeys(self.queue.in_turn()))

    def _claim(self, request: RequestView, at: float) -> None:
        """It runs where its front door says; an instance that is not here yet counts it when it comes."""
        if request.id in self.waiting or request.instance is None:
            return
        if request.id in self.running:
            self._rebind(request.id, request.instance, at)
            return
        self.queue.add(request)
        self.queue.dispatch(request, request.instance, at if request.dispatched_at is None else request.dispatched_at)
        instance = self.fleet.claimed(request.instance, at)
        if instance is not None and not instance.n_unclaimed:
            self._all_claimed(instance.model, at)

    def _all_claimed(self, name: str, at: float) -> None:
        """What an instance has to do is known: there may be too many of its model."""
        model = self.models.get(name)
        if model is not None:
            self.autoscaler.limit(model, at)

    def _deploy(self, model: ModelView, at: float) -> None:
        """New settings take effect at once: instances that they do not allow get no more requests."""
        old = self.models.get(model.name)
        self.state.put_model(model)
        self.back_off.forget_model(model.name)
        for instance in self.instances_of(model.name):
            same = old is None or (old.variant, old.n_slots) == (model.variant, model.n_slots)
            if not same or unfit(model, _undrained(self.workers[instance.worker])) is not None:
                self.fleet.drain(instance, "replaced", at)
        self.autoscaler.limit(model, at)

    def _ask_to_leave(self, name: str, node: str, at: float) -> list[Decision]:
        """What is loaded leaves, and what was wished for before is not wanted any more; requests may load it again."""
        for instance in self.instances_of(name):
            if not node or self.workers[instance.worker].name == node:
                self.fleet.drain(instance, "asked for", at)
        error = LoadFailed(name, "an operator unloaded it")
        wishes = [self.waiting[each] for each in self.queue.wishes.get(name, ())]
        return [self._refuse(wish, error) for wish in wishes if not node or wish.node == node]

    def _delete(self, name: str, replaced: bool, at: float) -> list[Decision]:
        self.state.drop_model(name)
        self.back_off.forget_model(name)
        self.service.pop(name, None)
        self.move_times.forget_model(name)
        for instance in self.instances_of(name):
            self.fleet.drain(instance, "replaced" if replaced else "deleted", at)
        error = LoadFailed(name, "it was just deployed from another checkpoint; send the request again") if replaced else None
        return [self._refuse(self.waiting[each], error or ModelNotFound(name)) for each in self.queue.of_model(name)]

    # --- life of a request ---

    def _admit(self, request: RequestView) -> list[Decision]:
        if request.id in self.waiting or request.id in self.running:
            return []
        self._enqueue(request)
        if request.model not in self.models:
            return [self._refuse(request, ModelNotFound(request.model))]
        return []

    def _enqueue(self, request: RequestView) -> None:
        self.queue.add(request)
        self.timers.set(request.deadline_at, "deadline", request.id)
        self.state.touch_model(request.model)

    def _forget(self, request: RequestView) -> None:
        """It waits no more: what was kept for it is given up."""
        self.timers.cancel("deadline", request.id)
        self.records.forget(request.id)
        self._open(request.id)
        demand = demand_of(request)
        if self.queue.head(demand) is None:
            self.timers.cancel("look", *demand)
            self._until.pop(demand, None)
            self._coming.pop(demand, None)
            self.awaited.set(demand, ())
            self._dirty.pop(demand, None)
            self._unplaceable_since.pop(demand, None)

    def _open(self, request_id: str) -> None:
        """What was closed for a request is open again."""
        for instance in self.claims.release(request_id):
            self.state.touch_model(instance.model)
            self.state.touch_worker(instance.worker)

    def _end(self, request_id: str, at: float, *, served: bool = False, n_tokens: int = 0) -> RequestView | None:
        """It has ended, or left: waiting or running. Returns it as it was; what was `served` tells how long that takes."""
        request = self.queue.end(request_id)
        if request is None:
            return None
        self.fleet.request_gone(request_id)
        self.drainer.gone(request_id, at)
        self.state.touch_model(request.model)
        if request.instance is None:
            self._forget(request)
            return request
        if served and not request.load_only and request.dispatched_at is not None:
            known = self.service.get(request.model, ServiceTime())
            self.service[request.model] = known.after(at - request.dispatched_at, n_tokens)
        instance = self.instances.get(request.instance)
        if instance is not None:
            n_requests = instance.n_requests - 1
            instance = replace(instance, n_requests=n_requests, idle_since=at if n_requests == 0 else None)
            self.state.put_instance(instance)
            self.fleet.may_settle(instance, at)
            if instance.successor and instance.idle:
                self.fleet.has_nothing_to_move(instance, at)
            # It serves: what went wrong elsewhere, and may be tried again, is over.
            self.back_off.served(instance.model, at)
        return request

    def _rebind(self, request_id: str, instance_id: str, at: float) -> None:
        """A running request has moved to another instance."""
        self.drainer.gone(request_id, at)
        request = self.running.get(request_id)
        if request is None or request.instance == instance_id:
            return
        self.queue.rebind(request, instance_id)
        self.state.touch_model(request.model)
        for each, change in ((request.instance or "", -1), (instance_id, 1)):
            instance = self.instances.get(each)
            if instance is not None:
                n_requests = instance.n_requests + change
                self.state.put_instance(replace(instance, n_requests=n_requests, idle_since=at if n_requests == 0 else None))

    def _return(self, request_id: str, at: float, deadline_at: float | None, near: str) -> list[Decision]:
        """The request waits again. Its instance gets no other one and is unloaded, should the worker be alive after all; if it
        was preempted, its instance has done nothing wrong."""
        if request_id not in self.running:
            return []
        preempted = self.fleet.was_preempted(request_id)
        request = self._end(request_id, at)
        assert request is not None
        instance = self.instances.get(request.instance or "")
        if instance is not None and not preempted:
            self.fleet.drain(instance, "replaced", at)
        deadline_at = request.deadline_at if deadline_at is None else deadline_at
        request = replace(
            request,
            instance=None,
            dispatched_at=None,
            deadline_at=deadline_at,
            n_output_before=request.n_output,
            counted_at=None,
            near=near,
        )
        self._enqueue(request)
        if request.model not in self.models:
            return [self._refuse(request, ModelNotFound(request.model))]
        return []

    def _refuse(self, request: RequestView, error: SllmError, why: dict[str, str] | None = None) -> Refuse:
        self._end(request.id, 0.0)
        return Refuse(request.id, request.front_door, error, why or {})

    # --- views into decisions ---

    def _settle(self, at: float) -> list[Decision]:
        """Ask every rule about what has changed.

        Dispatching goes before placing so that a model that has just been loaded serves somebody before it can be evicted again:
        without that, two waiting models can evict each other for ever.
        """
        decisions = self._on_time(at)
        decisions += self.drainer.load_elsewhere(at)
        decisions += self.fleet.unload_drained(at)
        models, workers = self.state.take_changed()
        if self._not_back:
            self.autoscaler.look_at(models)
            return decisions + self._dispatch(models, at)
        decisions += self.fleet.begin_planned(workers, at)
        for model in models:
            self._dirty.update(dict.fromkeys(self.queue.demands_of(model)))
        # What was closed for somebody may open when that one is placed: a second round serves those behind.
        for _ in range(2):
            decisions += self._dispatch(models, at)
            self.autoscaler.look_at(models)
            decisions += self._obtain_all(workers, at)
            models, workers = self.state.take_changed()
        decisions += self._dispatch(models, at)
        self.autoscaler.look_at(models)
        decisions += self.autoscaler.scale(at)
        decisions += self._dispatch(self.state.changed_models, at)
        return decisions + self.drainer.move(at)

    def _on_time(self, at: float) -> list[Decision]:
        decisions: list[Decision] = []
        for kind, *key in self.timers.due(at):
            match kind:
                case "deadline":
                    late = self.waiting[key[0]]
                    reason = self._why_waiting(late.model)
                    decisions.append(self._refuse(late, QueueTimeout(late.model, at - late.arrived_at, reason)))
                case "look" if self.queue.head((key[0], key[1])) is not None:
                    self._dirty[key[0], key[1]] = None
                case "scale":
                    self.autoscaler.look_at(key)
                case "settled":
                    self.state.touch_instance(key[0])
                case "missing":
                    self.fleet.drop(key[0], at)
                case "drain":
                    self.state.touch_model(key[0])
                case "unclaimed":
                    self.fleet.none_claimed(key[0], at)
                    self._all_claimed(self.instances[key[0]].model, at)
                case "back":
                    self._all_are_back()
        return decisions

    def _why_waiting(self, model: str) -> str:
        states = {instance.state for instance in self.instances_of(model)}
        if InstanceState.LOADING in states:
            return "it is still loading"
        if InstanceState.READY in states:
            return "its instances are full"
        return self.last_failure(model) or "every slot was busy with other models"

    # --- dispatching ---

    def _dispatch(self, models: Iterable[str], at: float) -> list[Decision]:
        """Dispatch what instances of `models` can take; higher classes first, then first come first served."""
        decisions: list[Decision] = []
        for model in models:
            for request_id in list(self.queue.wishes.get(model, ())):
                decisions += self._report_loaded(self.waiting[request_id], at)
            for request_id in self.queue.of_model(model):
                request = self.waiting[request_id]
                if request.load_only:
                    continue
                instance = nearest(
                    request.near,
                    (
                        each
                        for each in self.instances_of(model)
                        if takes_requests(each, self.settings.max_requests) and not self.claims.closed(each.id, request)
                    ),
                )
                if instance is None:  # more is closed to those behind it, never less
                    break
                decisions += self._dispatch_to(request, instance, at)
        return decisions

    def _dispatch_to(self, request: RequestView, instance: InstanceView, at: float) -> list[Decision]:
        told: list[Decision] = []
        if not self.records.says(request.id, instance.id):
            ways = self.finder.live(request, at)
            chosen = next(option for option in ways.options if option.instance == instance.id)
            told.append(Chose(choice(request.id, request.model, chosen, ways, REASONS[Way.LIVE], at)))
        self._start(request, instance, at)
        dispatch = Dispatch(
            request=request.id,
            front_door=request.front_door,
            instance=instance.id,
            worker=instance.worker,
            node=self.workers[instance.worker].name,
            queue_s=at - request.arrived_at,
            loaded_from=_waited_for(instance, request),
        )
        return [*told, dispatch]

    def _start(self, request: RequestView, instance: InstanceView, at: float) -> None:
        """It waits no more, and counts where it is."""
        self.queue.dispatch(request, instance.id, at)
        self.timers.cancel("settled", instance.id)
        self._forget(request)
        self.state.put_instance(replace(instance, n_requests=instance.n_requests + 1, idle_since=None))

    def _report_loaded(self, wish: RequestView, at: float) -> list[Decision]:
        """The answer to a wish, when an instance is ready where it has to be."""
        ready = [
            instance
            for instance in self.instances_of(wish.model)
            if instance.state is InstanceState.READY
            and not instance.draining
            and (not wish.node or self.workers[instance.worker].name == wish.node)
        ]
        if not ready:
            return []
        instance = min(ready, key=lambda instance: instance.id)
        if wish.holds:
            self._start(wish, instance, at)
        else:
            self._end(wish.id, at)
        return [
            ReportLoaded(
                request=wish.id,
                instance=instance.id,
                node=self.workers[instance.worker].name,
                waited_s=at - wish.arrived_at,
                loaded_from=_waited_for(instance, wish),
            )
        ]

    # --- placing ---

    def _obtain_all(self, workers: Iterable[str], at: float) -> list[Decision]:
        """Look for a way for what has changed, and for those to whom what `workers` have got comes sooner than what they wait
        for; in their turns."""
        mates = {mate.address: None for each in workers if each in self.workers for mate in self.state.mates(each)}
        roomy = [address for address in mates if self.state.has_room(address, 1)]
        free = [address for address in roomy if self.state.free_slots(address) > 0]

        def gains(demand: Demand) -> bool:
            offered = free if demand in self._coming else roomy  # nobody is disturbed for what is coming
            return bool(offered) and self._gains(demand, offered, at)

        demands = [demand for demand in self._dirty if self.queue.head(demand) is not None]
        if roomy:
            self.autoscaler.there_is_room()
            demands += [demand for demand in self.queue.in_turn() if demand not in self._dirty and gains(demand)]
        decisions: list[Decision] = []
        n_looks = 0
        for demand in sorted(demands, key=self._turn):
            # Those before may have taken what there was.
            if demand in self._dirty or gains(demand):
                if n_looks == _MAX_LOOKS:
                    self._dirty[demand] = None
                    continue
                n_looks += 1
                self._dirty.pop(demand, None)
                decisions += self._obtain(demand, at)
        return decisions

    def _turn(self, demand: Demand) -> Turn:
        """That of the first who has no place in an instance that is on its way."""
        request = self.queue.head(demand)
        many = request is not None and self.queue.n_waiting(demand) > 1
        return self.queue.turn(demand, self.finder.n_places(request) if many and request is not None else 0)

    def _gains(self, demand: Demand, offered: list[str], at: float) -> bool:
        """Whether one of the workers with room would serve it sooner than what it waits for."""
        request, until = self.queue.head(demand), self._until.get(demand, inf)
        if request is None or until <= at:
            return False
        model = self._wanted(request)
        worth_s = (until - at) / 2 if demand in self._coming else until - at
        for address in offered:
            if not self.state.has_room(address, model.n_slots) or self.state.least_seconds(model, address) >= worth_s:
                continue
            worker = self.workers[address]
            if unfit(model, worker) is None and self.finder.load_seconds(model, worker, at) < worth_s:
                return True
        if self._may_leave(demand, offered, worth_s, at):
            return True
        return until == inf and self._is_impatient(request, at)

    def _may_leave(self, demand: Demand, offered: list[str], worth_s: float, at: float) -> bool:
        """Whether what `demand` waits for the end of could go to one of the workers with free slots in the meantime."""
        for instance in [self.instances[each] for each in self.awaited.of(demand) if each in self.instances]:
            model = self.models.get(instance.model)
            if model is None or self.finder.migration_lost:
                continue
            for worker in [self.workers[address] for address in offered if address != instance.worker]:
                if self.state.free_slots(worker.address) < instance.n_slots or unfit(model, worker) is not None:
                    continue
                if self.finder.load_seconds(model, worker, at) < worth_s:
                    return True
        return False

    def _wanted(self, request: RequestView) -> ModelView:
        """The request's model, where it has to be."""
        model = self.models[request.model]
        return replace(model, nodes=(request.node,)) if request.node else model

    def _obtain(self, demand: Demand, at: float) -> list[Decision]:
        """No instance can take the oldest request of its kind: place one, or refuse, or wait."""
        request = self.queue.head(demand)
        if request is None:
            return []
        model = self.models[request.model]
        if request.node and (there := self.state.named((request.node,))) and all(each.draining for each in there):
            return self._refuse_all(demand, NodeDraining(request.node, there[0].draining))
        if request.node and model.nodes and request.node not in model.nodes:
            error = InvalidRequest(f"{model.name} may only run on its nodes {', '.join(model.nodes)} (target_nodes).", "node")
            return self._refuse_all(demand, error)
        mine = [
            instance
            for instance in self.instances_of(model.name)
            if not request.node or self.workers[instance.worker].name == request.node
        ]
        living = [instance for instance in mine if not instance.draining]
        coming = any(instance.state in (InstanceState.PLANNED, InstanceState.LOADING) for instance in living)
        staying = any(instance.state is not InstanceState.UNLOADING for instance in living)
        others = [each for each in self.instances_of(model.name) if each.id != request.replaces]
        at_most = sum(not each.draining and not each.successor for each in others) >= model.max_instances
        elsewhere = [each for each in self.state.living(model.name) if each.id != request.replaces]
        if at_most and request.load_only and not coming and len(elsewhere) >= model.max_instances:
            nodes = ", ".join(sorted({self.workers[each.worker].name for each in elsewhere}))
            reason = f"max_instances is {model.max_instances}, and it is loaded on node {nodes}. Unload it there first"
            return self._refuse_all(demand, LoadFailed(model.name, reason))
        model = self._wanted(request)
        # An operator who wants it on that node wants one of it, even if another is predicted to be sooner by now.
        is_read = request.load_only and bool(request.node) and any(each.state is InstanceState.LOADING for each in living)
        ways = self.finder.of_request(request, model, at, may_load=not at_most and not is_read)
        if not coming and not ways.any_allowed:
            if not ways.any_fit and not self.state.fit(model):
                return self._refuse_unplaceable(demand, model, at)
            refused = self.back_off.active(model.name, at)
            if not living and all(worker.address in refused for worker in self.state.fit(model)):
                return self._refuse_all(demand, LoadFailed(model.name, self.last_failure(model.name) or "unknown"), refused)
        self._unplaceable_since.pop(demand, None)
        chosen = self._choose(ways.open)
        self._coming.pop(demand, None)
        waits_for = chosen.leaving if chosen is not None and chosen.way is Way.WAIT else ()
        self.awaited.set(demand, tuple(instance for instance, _ in waits_for))
        if chosen is None or chosen.way is Way.WAIT:
            decisions = self.records.tell(demand, chosen, ways, chosen.instance if chosen else "", at)
            may_claim = not staying and not at_most
            if may_claim and self._is_impatient(request, at):
                waits = [option.worker for option in ways.options if option.way is Way.WAIT]
                self.claims.claim(request, model, waits)
            # Those at their most instances have nothing to gain from other workers.
            self._until[demand] = at if at_most else at + chosen.ready_in_s + _LOOK_AGAIN_S if chosen else inf
            self._look_again(demand, request, ways, chosen, may_claim=may_claim, at=at)
            return decisions
        return self._take(demand, request, chosen, ways, at)

    def _take(self, demand: Demand, request: RequestView, chosen: Option, ways: Ways, at: float) -> list[Decision]:
        """An instance is on its way, or one that is there gets room."""
        self.timers.cancel("look", *demand)
        self._until[demand] = at + chosen.ready_in_s
        if chosen.way is Way.PREEMPT and not chosen.leaving:
            instance = self.instances[chosen.instance]
            lower = [each for each in self.queue.on_instance(instance.id) if each.priority < request.priority]
            newest = min(lower, key=lambda each: (each.priority, -(each.dispatched_at or 0.0), each.id))
            begun = self.fleet.preempt(instance, [newest], f"a request of class {request.priority} waits")
            self.timers.set(at + _LOOK_AGAIN_S, "look", *demand)
            return [*self.records.tell(demand, chosen, ways, instance.id, at), *begun]
        for other in self.claims.claimants():
            if demand_of(other) == demand:
                self._open(other.id)
        self._coming[demand] = None
        if chosen.way is Way.LIVE:
            self.state.touch_model(request.model)
        if chosen.way in (Way.LIVE, Way.COMING):
            return self.records.tell(demand, chosen, ways, chosen.instance, at)
        begun_instance, begun = self.fleet.begin(self.models[request.model], chosen, ways, at)
        if self.finder.n_without_place(request) > 0:
            self._dirty[demand] = None
        return [*self.records.tell(demand, chosen, ways, begun_instance.id, at), *begun]

    def _is_impatient(self, request: RequestView, at: float) -> bool:
        return at >= request.arrived_at + self.settings.patience_s and not self.claims.has(request.id)

    def _look_again(
        self, demand: Demand, request: RequestView, ways: Ways, chosen: Option | None, *, may_claim: bool, at: float
    ) -> None:
        """When time alone may have changed the answer."""
        moments = [ways.again_at] if ways.again_at < inf else []
        if chosen is not None:
            moments.append(at + max(chosen.parts.get("wait", 0.0), _LOOK_AGAIN_S))
            load = ways.soonest(Way.FREE, Way.EVICT, Way.MIGRATE)
            moments += [request.arrived_at + load.ready_in_s] if load is not None else []
        if may_claim and not self.claims.has(request.id):
            moments.append(request.arrived_at + self.settings.patience_s)
        tried_again_at = self.back_off.ends_at(request.model, at)
        if tried_again_at is not None:
            moments.append(tried_again_at)
        self._wake(demand, moments, at)

    def _wake(self, demand: Demand, moments: Iterable[float], at: float) -> None:
        earliest = min((moment for moment in moments if moment > at), default=None)
        if earliest is None:
            self.timers.cancel("look", *demand)
        else:
            self.timers.set(earliest, "look", *demand)

    # --- refusing ---

    def _refuse_unplaceable(self, demand: Demand, model: ModelView, at: float) -> list[Decision]:
        """The worker that could run it may be restarting, so that is waited out."""
        since = self._unplaceable_since.setdefault(demand, at)
        self._until[demand] = inf
        error = why_unplaceable(model, self.workers.values())
        some = [*self.workers.values()][:N_BEST]
        why = {worker.address: unfit(model, worker) or "" for worker in some}
        until = {each.id: max(since, each.arrived_at) + self.settings.worker_wait_s for each in self.queue.members(demand)}
        self._wake(demand, until.values(), at)
        return [self._refuse(request, error, why) for request in self.queue.members(demand) if until[request.id] <= at]

    def _refuse_all(self, demand: Demand, error: SllmError, why: dict[str, str] | None = None) -> list[Decision]:
        """Refuse all that wait for the same."""
        return [self._refuse(request, error, why) for request in self.queue.members(demand)]


def _undrained(worker: WorkerView) -> WorkerView:
    """As it is when it is not drained."""
    return replace(worker, draining="") if worker.draining else worker


def _waited_for(instance: InstanceView, request: RequestView) -> Tier | None:
    """The tier that `instance` was loaded from while `request` waited; ``None`` when it was ready already."""
    return instance.loaded_from if instance.ready_at is not None and request.arrived_at < instance.ready_at else None
