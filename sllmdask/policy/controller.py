"""``Controller.handle(event) -> list[Decision]``: folds events into views, then asks the rules.

The live scheduler plugin and the simulator run this same object. It owns the queue and the account of what runs where; the
workers' reports correct its view. It has no clock (time arrives in events), does no I/O and never raises for what a user did.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from math import inf

from sllmdask.errors import (
    InsufficientMemory,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    NoWorker,
    QueueFull,
    QueueTimeout,
    SllmError,
)
from sllmdask.policy import events as ev
from sllmdask.policy.decisions import Decision, Dispatch, Load, Refuse, ReportLoaded, Unload, WakeAt
from sllmdask.policy.dispatch import least_requests
from sllmdask.policy.estimate import load_seconds
from sllmdask.policy.eviction import pinned_bytes
from sllmdask.policy.placement import free_slots, neighbours, place, unfit
from sllmdask.policy.scaling import desired_instances, leaves_at
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView

#: Back-off after a failed load of one model on one worker: doubled from the first to the last, in seconds.
BACKOFF_S = (1.0, 60.0)


@dataclass(frozen=True)
class ControllerSettings:
    """Seconds and counts that the rules need."""

    worker_wait_s: float = 20.0
    max_queue: int = 1024
    min_residency_s: float = 0.0
    #: A request that has waited this long for a slot closes the instances that hold it to newcomers, so that a steady
    #: stream for one model cannot keep another out for ever.
    patience_s: float = 10.0
    #: Requests that one instance works on at once.
    max_requests: int = 64


@dataclass(frozen=True)
class Failure:
    """The last failed load of a model on a worker."""

    reason: str
    until: float
    n_times: int


def _turn(request: RequestView) -> tuple[int, float, str]:
    """Sort key of the queue."""
    return -request.priority, request.arrived_at, request.id


def _demand(request: RequestView) -> tuple[str, str]:
    """What one instance would satisfy: a model, and the node if it has to be there."""
    return request.model, request.node


class Controller:
    """The cluster's one decider. Single writer: call :meth:`handle` from one thread, one event after another."""

    def __init__(self, settings: ControllerSettings) -> None:
        self.settings = settings
        self.workers: dict[str, WorkerView] = {}
        self.models: dict[str, ModelView] = {}
        self.instances: dict[str, InstanceView] = {}
        #: Waiting requests by id, in order of arrival.
        self.waiting: dict[str, RequestView] = {}
        #: Dispatched requests by id.
        self.running: dict[str, RequestView] = {}
        self.failures: dict[tuple[str, str], Failure] = {}
        #: Instances that a long-waiting request has closed to newcomers: instance -> that request.
        self._claims: dict[str, str] = {}
        #: Since when no connected worker may run the model, or not where it is wished for.
        self._unplaceable_since: dict[tuple[str, str], float] = {}
        self._n_instances = 0
        self._wake_at: float | None = None

    def handle(self, event: ev.Event) -> list[Decision]:
        """Everything that follows from `event`, in the order in which it must be enacted."""
        decisions = self._fold(event)
        decisions += self._settle(event.at)
        if isinstance(event, ev.RequestArrived) and self._n_queued() > self.settings.max_queue:
            late = self.waiting.get(event.request.id)
            decisions += [self._refuse(late, QueueFull(late.model, self.settings.max_queue))] if late else []
        wake_at = self._next_wake(event.at)
        if wake_at != self._wake_at or isinstance(event, ev.TimerFired):
            self._wake_at = wake_at
            decisions.append(WakeAt(wake_at))
        return decisions

    # --- what others may ask ---

    def instances_of(self, model: str) -> list[InstanceView]:
        return [instance for instance in self.instances.values() if instance.model == model]

    def last_failure(self, model: str) -> str | None:
        """The reason of the model's newest failed load that has not been followed by a good one."""
        failures = [failure for (name, _), failure in self.failures.items() if name == model]
        return max(failures, key=lambda failure: failure.until).reason if failures else None

    def feasible(self, model: ModelView) -> SllmError | None:
        """Why no worker that is connected now could ever run `model`, or ``None``: some could, or none is connected."""
        if not self.workers or any(unfit(model, worker) is None for worker in self.workers.values()):
            return None
        return self._unplaceable(model)

    def best_worker(self, model: ModelView, at: float) -> WorkerView | None:
        """Where a request for `model` would be placed now, or if every slot is taken, where it would load the fastest."""
        placement, _ = place(
            model,
            self.workers.values(),
            self._on_worker(),
            now=at,
            may_evict=True,
            refused={},
            protected=self._protected(model),
            min_residency_s=self.settings.min_residency_s,
        )
        if placement is not None:
            return self.workers[placement.worker]
        fit = [worker for worker in self.workers.values() if unfit(model, worker) is None]
        return min(fit, key=lambda worker: (load_seconds(model, worker), worker.name), default=None)

    # --- events into views ---

    def _fold(self, event: ev.Event) -> list[Decision]:
        match event:
            case ev.WorkerJoined(worker=worker):
                decisions = self._drop_worker(worker.address)
                self.workers[worker.address] = worker
                return decisions
            case ev.WorkerReported():
                self._report(event)
            case ev.WorkerLeft(address=address):
                return self._drop_worker(address)
            case ev.ModelDeployed(model=model):
                self._deploy(model)
            case ev.ModelDeleted(model=name, replaced=replaced):
                return self._delete(name, replaced)
            case ev.RequestArrived(request=request):
                return self._admit(request)
            case ev.RequestEnded(request=request_id):
                self._end(request_id, event.at)
            case ev.RequestReturned(request=request_id):
                return self._return(request_id, event.at)
            case ev.LoadRequested(request=request):
                self._forget_failures(request.model)
                return self._admit(request)
            case ev.RequestMoved(request=request_id, instance=instance_id):
                self._rebind(request_id, instance_id, event.at)
            case ev.InstanceLeaves(instance=instance_id, cause=cause):
                if instance_id in self.instances:
                    self._drain(self.instances[instance_id], cause)
            case ev.UnloadRequested(model=name, node=node):
                return self._ask_to_leave(name, node)
            case ev.FrontDoorLeft(front_door=front_door):
                for request in [*self.waiting.values(), *self.running.values()]:
                    if request.front_door == front_door:
                        self._end(request.id, event.at)
            case ev.LoadFinished():
                self._loaded(event)
            case ev.LoadFailed(instance=instance_id, reason=reason):
                self._load_failed(instance_id, reason, event.at)
            case ev.UnloadFinished(instance=instance_id):
                self._drop_instance(instance_id)
            case ev.InstanceLost(instance=instance_id):
                self._drop_instance(instance_id)
            case ev.TimerFired():
                pass
        return []

    def _report(self, event: ev.WorkerReported) -> None:
        worker = self.workers.get(event.address)
        if worker and event.version > worker.version:
            self.workers[event.address] = replace(
                worker,
                version=event.version,
                residency=event.residency,
                bytes_per_s=event.bytes_per_s,
                overhead_s=event.overhead_s,
                host_capacity=worker.host_capacity if event.host_capacity is None else event.host_capacity,
            )

    def _drop_worker(self, address: str) -> list[Decision]:
        """Forget a worker with its instances."""
        if self.workers.pop(address, None):
            for instance in [instance for instance in self.instances.values() if instance.worker == address]:
                self._drop_instance(instance.id)
            for key in [key for key in self.failures if key[1] == address]:
                del self.failures[key]
        return []

    def _drop_instance(self, instance_id: str) -> None:
        """Its requests stay on the list: their front doors see the stream break, and end them or send them back."""
        self.instances.pop(instance_id, None)
        self._claims.pop(instance_id, None)

    def _forget_failures(self, model: str) -> None:
        for key in [key for key in self.failures if key[0] == model]:
            del self.failures[key]

    def _deploy(self, model: ModelView) -> None:
        """New settings take effect at once: instances that they do not allow get no more requests."""
        old = self.models.get(model.name)
        self.models[model.name] = model
        self._forget_failures(model.name)
        for instance in self.instances_of(model.name):
            same = old is None or (old.variant, old.n_slots) == (model.variant, model.n_slots)
            if not same or unfit(model, self.workers[instance.worker]) is not None:
                self._drain(instance, "replaced")

    def _drain(self, instance: InstanceView, cause: str) -> None:
        if instance.state is InstanceState.PLANNED:
            self._drop_instance(instance.id)
        else:
            self.instances[instance.id] = replace(instance, draining=cause)

    def _ask_to_leave(self, name: str, node: str) -> list[Decision]:
        """What is loaded leaves, and what was wished for before is not wanted any more; requests may load it again."""
        for instance in self.instances_of(name):
            if not node or self.workers[instance.worker].name == node:
                self._drain(instance, "asked for")
        error = LoadFailed(name, "an operator unloaded it")
        wishes = [each for each in self.waiting.values() if each.load_only and each.model == name]
        return [self._refuse(wish, error) for wish in wishes if not node or wish.node == node]

    def _delete(self, name: str, replaced: bool) -> list[Decision]:
        self.models.pop(name, None)
        self._forget_failures(name)
        self._unplaceable_since = {key: since for key, since in self._unplaceable_since.items() if key[0] != name}
        for instance in self.instances_of(name):
            self._drain(instance, "replaced" if replaced else "deleted")
        error = LoadFailed(name, "it was just deployed from another checkpoint; send the request again") if replaced else None
        return [
            self._refuse(request, error or ModelNotFound(name)) for request in [*self.waiting.values()] if request.model == name
        ]

    def _admit(self, request: RequestView) -> list[Decision]:
        if request.id in self.waiting or request.id in self.running:
            return []
        self.waiting[request.id] = request
        if request.model not in self.models:
            return [self._refuse(request, ModelNotFound(request.model))]
        return []

    def _n_queued(self) -> int:
        """Requests that wait; what operators wish for takes nobody's place."""
        return sum(not request.load_only for request in self.waiting.values())

    def _end(self, request_id: str, at: float) -> None:
        self.waiting.pop(request_id, None)
        for instance_id in [key for key, claimant in self._claims.items() if claimant == request_id]:
            del self._claims[instance_id]
        request = self.running.pop(request_id, None)
        instance = self.instances.get(request.instance or "") if request else None
        if instance:
            n_requests = instance.n_requests - 1
            idle_since = at if n_requests == 0 else None
            self.instances[instance.id] = replace(instance, n_requests=n_requests, idle_since=idle_since)
            # It serves: what went wrong elsewhere, and may be tried again, is over.
            for key in [key for key, failure in self.failures.items() if key[0] == instance.model and failure.until <= at]:
                del self.failures[key]

    def _rebind(self, request_id: str, instance_id: str, at: float) -> None:
        """A running request has moved to another instance."""
        request = self.running.get(request_id)
        if request is None or request.instance == instance_id:
            return
        self.running[request_id] = replace(request, instance=instance_id)
        for each, change in ((request.instance or "", -1), (instance_id, 1)):
            instance = self.instances.get(each)
            if instance is not None:
                n_requests = instance.n_requests + change
                self.instances[each] = replace(instance, n_requests=n_requests, idle_since=at if n_requests == 0 else None)

    def _return(self, request_id: str, at: float) -> list[Decision]:
        """The request waits again; its instance gets no other one and is unloaded, should the worker be alive after all."""
        request = self.running.get(request_id)
        if request:
            self._end(request_id, at)
            instance = self.instances.get(request.instance or "")
            if instance:
                self.instances[instance.id] = replace(instance, draining="replaced")
            self.waiting[request_id] = replace(request, instance=None)
            self.waiting = dict(sorted(self.waiting.items(), key=lambda item: item[1].arrived_at))
            if request.model not in self.models:
                return [self._refuse(request, ModelNotFound(request.model))]
        return []

    def _loaded(self, event: ev.LoadFinished) -> None:
        instance = self.instances.get(event.instance)
        if instance and instance.state is InstanceState.LOADING:
            self.failures.pop((instance.model, instance.worker), None)
            self.instances[instance.id] = replace(
                instance,
                state=InstanceState.READY,
                since=event.at,
                ready_at=event.at,
                idle_since=event.at,
                loaded_from=event.loaded_from,
            )

    def _load_failed(self, instance_id: str, reason: str, at: float) -> None:
        instance = self.instances.get(instance_id)
        if instance is None:
            return
        # An instance may serve, and be on its way out, while its last bytes are still read. A load that was called off ends as a
        # failed one, too, and tells nothing of the model.
        if instance.state is InstanceState.UNLOADING and instance.ready_at is None:
            return
        if instance.state is not InstanceState.UNLOADING:
            self._drop_instance(instance_id)
        n_times = self.failures[instance.model, instance.worker].n_times + 1 if self._failed(instance) else 1
        pause_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** (n_times - 1))
        self.failures[instance.model, instance.worker] = Failure(reason, at + pause_s, n_times)

    def _failed(self, instance: InstanceView) -> bool:
        return (instance.model, instance.worker) in self.failures

    # --- views into decisions ---

    def _settle(self, at: float) -> list[Decision]:
        """Ask every rule what to do now."""
        decisions: list[Decision] = []
        decisions += self._expire(at)
        decisions += self._unload_drained(at)
        decisions += self._begin_planned(at)
        decisions += self._serve_queue(at)
        decisions += self._scale(at)
        return decisions

    def _expire(self, at: float) -> list[Decision]:
        late = [request for request in self.waiting.values() if request.deadline_at <= at]
        return [
            self._refuse(request, QueueTimeout(request.model, at - request.arrived_at, self._why_waiting(request.model)))
            for request in late
        ]

    def _unload_drained(self, at: float) -> list[Decision]:
        """What nobody will be sent to any more leaves when its last request has ended; a load is called off."""
        drained = [
            instance
            for instance in self.instances.values()
            if instance.draining and (instance.idle or instance.state is InstanceState.LOADING)
        ]
        return [self._unload(instance, instance.draining, at) for instance in drained]

    def _why_waiting(self, model: str) -> str:
        states = {instance.state for instance in self.instances_of(model)}
        if InstanceState.LOADING in states:
            return "it is still loading"
        if InstanceState.READY in states:
            return "its instances are full"
        return self.last_failure(model) or "every slot was busy with other models"

    def _begin_planned(self, at: float) -> list[Decision]:
        """Load what waited for slots and memory that are free by now."""
        decisions: list[Decision] = []
        on_worker = self._on_worker()
        for instance in [instance for instance in self.instances.values() if instance.state is InstanceState.PLANNED]:
            worker = self.workers[instance.worker]
            others = [other for other in on_worker[worker.address] if other.state is not InstanceState.PLANNED]
            beside = neighbours(worker, self.workers.values(), on_worker)
            fits = pinned_bytes([*others, *beside], instance.checkpoint) + instance.nbytes <= worker.host_capacity
            if fits and free_slots(worker, others) >= instance.n_slots:
                self.instances[instance.id] = replace(instance, state=InstanceState.LOADING, since=at)
                on_worker = self._on_worker()
                ready_in_s = load_seconds(self.models[instance.model], worker)
                decisions.append(Load(instance.id, instance.model, worker.address, ready_in_s))
        return decisions

    def _serve_queue(self, at: float) -> list[Decision]:
        """Dispatch what an instance can take, then place what needs one; higher classes first, then first come first served.

        Dispatching goes first so that a model that has just been loaded serves somebody before it can be evicted again:
        without that, two waiting models can evict each other for ever.
        """
        decisions: list[Decision] = self._dispatch_waiting(at)
        n_claims = len(self._claims)
        asked: set[tuple[str, str]] = set()
        for request in sorted(self.waiting.values(), key=_turn):
            if _demand(request) not in asked:
                asked.add(_demand(request))
                decisions += self._obtain(request, at)
        if len(self._claims) < n_claims:
            decisions += self._dispatch_waiting(at)
        return decisions

    def _dispatch_waiting(self, at: float) -> list[Decision]:
        decisions: list[Decision] = []
        full: set[str] = set()
        for request in sorted(self.waiting.values(), key=_turn):
            if request.load_only:
                decisions += self._report_loaded(request, at)
                continue
            if request.model in full:
                continue
            closed = frozenset(key for key, claimant in self._claims.items() if self._goes_before(claimant, request))
            chosen = least_requests(self.instances_of(request.model), self.settings.max_requests, closed)
            if chosen:
                decisions.append(self._dispatch(request, chosen, at))
            else:  # more is closed to those behind it, never less
                full.add(request.model)
        return decisions

    def _report_loaded(self, request: RequestView, at: float) -> list[Decision]:
        """The answer to a wish, when an instance is ready where it has to be."""
        instances = [
            instance
            for instance in self._instances_for(request)
            if instance.state is InstanceState.READY and not instance.draining
        ]
        if not instances:
            return []
        instance = min(instances, key=lambda instance: instance.id)
        if request.holds:
            del self.waiting[request.id]
            self.running[request.id] = replace(request, instance=instance.id)
            self.instances[instance.id] = replace(instance, n_requests=instance.n_requests + 1, idle_since=None)
        else:
            self._end(request.id, at)
        return [
            ReportLoaded(
                request=request.id,
                instance=instance.id,
                node=self.workers[instance.worker].name,
                waited_s=at - request.arrived_at,
                loaded_from=_waited_for(instance, request),
            )
        ]

    def _instances_for(self, request: RequestView) -> list[InstanceView]:
        return [
            instance
            for instance in self.instances_of(request.model)
            if not request.node or self.workers[instance.worker].name == request.node
        ]

    def _goes_before(self, claimant: str, request: RequestView) -> bool:
        other = self.waiting.get(claimant)
        return other is not None and other.model != request.model and _turn(other) < _turn(request)

    def _dispatch(self, request: RequestView, instance: InstanceView, at: float) -> Dispatch:
        del self.waiting[request.id]
        self.running[request.id] = replace(request, instance=instance.id)
        self.instances[instance.id] = replace(instance, n_requests=instance.n_requests + 1, idle_since=None)
        for key in [key for key, claimant in self._claims.items() if claimant == request.id]:
            del self._claims[key]
        return Dispatch(
            request=request.id,
            front_door=request.front_door,
            instance=instance.id,
            worker=instance.worker,
            node=self.workers[instance.worker].name,
            queue_s=at - request.arrived_at,
            loaded_from=_waited_for(instance, request),
        )

    def _obtain(self, request: RequestView, at: float) -> list[Decision]:
        """No instance can take the oldest request of its kind: place one, or refuse, or wait."""
        model = self.models[request.model]
        if request.node:
            if model.nodes and request.node not in model.nodes:
                error = InvalidRequest(f"{model.name} may only run on its nodes {', '.join(model.nodes)} (target_nodes).", "node")
                return self._refuse_all(request, error)
            model = replace(model, nodes=(request.node,))
        living = [instance for instance in self._instances_for(request) if not instance.draining]
        coming = [instance for instance in living if instance.state in (InstanceState.PLANNED, InstanceState.LOADING)]
        if coming:
            self._unclaim(request)
            return []
        counted = [each for each in self.instances_of(model.name) if not each.draining and each.id != request.replaces]
        if len(counted) >= model.max_instances:
            elsewhere = [each for each in self._living(model) if each.id != request.replaces]
            if request.load_only and len(elsewhere) >= model.max_instances:
                nodes = ", ".join(sorted({self.workers[instance.worker].name for instance in elsewhere}))
                reason = f"max_instances is {model.max_instances}, and it is loaded on node {nodes}. Unload it there first"
                return self._refuse_all(request, LoadFailed(model.name, reason))
            return []
        fit = [worker for worker in self.workers.values() if unfit(model, worker) is None]
        if not fit:
            return self._refuse_unplaceable(model, request, at)
        self._unplaceable_since.pop(_demand(request), None)
        refused = self._backing_off(model, at)
        if all(worker.address in refused for worker in fit):
            if living:
                return []
            reason = self.last_failure(model.name) or "unknown"
            return self._refuse_all(request, LoadFailed(model.name, reason), refused)
        staying = any(instance.state is not InstanceState.UNLOADING for instance in living)
        decisions = self._place(model, at, may_evict=not staying, request=request)
        if decisions:
            self._unclaim(request)
        if not decisions and not staying and at >= request.arrived_at + self.settings.patience_s:
            self._claim(request, model)
        return decisions

    def _place(self, model: ModelView, at: float, *, may_evict: bool, request: RequestView | None = None) -> list[Decision]:
        """Begin an instance for `request`, or for nobody in particular; nothing if there is no place."""
        own = frozenset(instance.id for instance in self._living(model))
        placement, _ = place(
            model,
            self.workers.values(),
            self._on_worker(),
            now=at,
            may_evict=may_evict,
            refused={**self._backing_off(model, at), **self._held(request)},
            protected=self._protected(model) | own,
            min_residency_s=self.settings.min_residency_s,
        )
        if placement is None:
            return []
        decisions: list[Decision] = [self._unload(self.instances[victim], "evicted", at) for victim in placement.evict]
        self._n_instances += 1
        instance = InstanceView(
            id=f"{model.name}/{self._n_instances}",
            model=model.name,
            worker=placement.worker,
            n_slots=model.n_slots,
            checkpoint=model.checkpoint_key,
            nbytes=model.nbytes,
            state=InstanceState.PLANNED if placement.evict else InstanceState.LOADING,
            since=at,
        )
        self.instances[instance.id] = instance
        if not placement.evict:
            decisions.append(Load(instance.id, model.name, placement.worker, placement.ready_in_s, placement.why))
        return decisions

    def _unload(self, instance: InstanceView, cause: str, at: float) -> Unload:
        self.instances[instance.id] = replace(instance, state=InstanceState.UNLOADING, since=at, idle_since=None)
        self._claims.pop(instance.id, None)
        forget = all(model.checkpoint_key != instance.checkpoint for model in self.models.values())
        return Unload(instance.id, instance.model, instance.worker, cause, forget)

    def _claim(self, request: RequestView, model: ModelView) -> None:
        """Close the instances that would free a slot soonest, so that they can become idle and leave."""
        if request.id in self._claims.values():
            return
        on_worker = self._on_worker()
        protected = self._protected(model)
        best: tuple[int, str] | None = None
        closable: dict[str, list[InstanceView]] = {}
        for worker in self.workers.values():
            instances = on_worker[worker.address]
            if unfit(model, worker) is not None or any(instance.id in self._claims for instance in instances):
                continue
            closable[worker.address] = [
                instance for instance in instances if instance.state is InstanceState.READY and instance.id not in protected
            ]
            staying = [instance for instance in instances if instance not in closable[worker.address]]
            n_slots = sum(instance.n_slots for instance in closable[worker.address])
            staying += neighbours(worker, self.workers.values(), on_worker)
            fits = pinned_bytes(staying, model.checkpoint_key) + model.nbytes <= worker.host_capacity
            if fits and n_slots and free_slots(worker, instances) + n_slots >= model.n_slots:
                rank = (sum(instance.n_requests for instance in closable[worker.address]), worker.address)
                best = min(best, rank) if best else rank
        if best:
            for instance in closable[best[1]]:
                self._claims[instance.id] = request.id

    def _unclaim(self, request: RequestView) -> None:
        """Its instance is on its way, and the slots for it are reserved: what was closed for it opens again."""
        for key in [key for key, claimant in self._claims.items() if claimant in self.waiting]:
            if _demand(self.waiting[self._claims[key]]) == _demand(request):
                del self._claims[key]

    def _scale(self, at: float) -> list[Decision]:
        """Instances beyond the first go to free slots only; idle ones leave when their time is over."""
        decisions: list[Decision] = []
        load: dict[str, int] = defaultdict(int)
        for request in [*self.waiting.values(), *self.running.values()]:
            load[request.model] += not request.load_only
        for model in self.models.values():
            living = self._living(model)
            wanted = desired_instances(model, load[model.name])
            if living or model.min_instances:
                for _ in range(wanted - len(living)):
                    # Only what a model is promised is worth another one's idle instance.
                    n_living = len(self._living(model))
                    more = self._place(model, at, may_evict=n_living < model.min_instances)
                    if not more:
                        break
                    decisions += more
            surplus = len(living) - max(wanted, model.min_instances)
            for instance in sorted(living, key=lambda instance: leaves_at(model, instance)):
                if surplus > 0 and leaves_at(model, instance) <= at:
                    decisions.append(self._unload(instance, "keep-alive over", at))
                    surplus -= 1
        return decisions

    def _living(self, model: ModelView) -> list[InstanceView]:
        """Instances that stay, or are on their way."""
        return [
            instance
            for instance in self.instances_of(model.name)
            if instance.state is not InstanceState.UNLOADING and not instance.draining
        ]

    def _held(self, request: RequestView | None) -> dict[str, str]:
        """Workers that are being emptied for somebody whose turn is earlier than that of `request`, with the reason."""
        held: dict[str, str] = {}
        for instance_id, claimant in self._claims.items():
            other = self.waiting.get(claimant)
            if other and instance_id in self.instances and (request is None or _turn(other) < _turn(request)):
                held[self.instances[instance_id].worker] = f"kept for a request for {other.model} that waits longer"
        return held

    def _protected(self, model: ModelView) -> frozenset[str]:
        """Instances that other models keep as their minimum."""
        kept: set[str] = set()
        for other in self.models.values():
            if other.min_instances and other.name != model.name:
                ready = [instance for instance in self.instances_of(other.name) if instance.state is InstanceState.READY]
                kept.update(instance.id for instance in ready[: other.min_instances])
        return frozenset(kept)

    def _on_worker(self) -> dict[str, list[InstanceView]]:
        on_worker: dict[str, list[InstanceView]] = defaultdict(list)
        for instance in self.instances.values():
            on_worker[instance.worker].append(instance)
        return on_worker

    def _backing_off(self, model: ModelView, at: float) -> dict[str, str]:
        """Workers on which loading `model` failed a moment ago, with the reason."""
        return {
            address: failure.reason
            for (name, address), failure in self.failures.items()
            if name == model.name and failure.until > at
        }

    def _unplaceable(self, model: ModelView) -> SllmError:
        small = [worker for worker in self.workers.values() if not model.nodes or worker.name in model.nodes]
        if not small:
            who = f"its nodes {', '.join(model.nodes)} are not connected" if model.nodes else "no worker is connected"
            return NoWorker(model.name, f"{who}. Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin")
        slots = max(worker.slots for worker in small)
        if model.n_slots > slots:
            return NoWorker(model.name, f"it needs {model.n_slots} slots (num_gpus) and the largest worker has {slots}")
        return InsufficientMemory(model.name, model.nbytes, max(worker.host_capacity for worker in small))

    def _refuse_unplaceable(self, model: ModelView, request: RequestView, at: float) -> list[Decision]:
        """The worker that could run it may be restarting, so that is waited out."""
        since = self._unplaceable_since.setdefault(_demand(request), at)
        error = self._unplaceable(model)
        why = {worker.address: unfit(model, worker) or "" for worker in self.workers.values()}
        return [
            self._refuse(waiting, error, why)
            for waiting in [*self.waiting.values()]
            if _demand(waiting) == _demand(request) and at >= max(since, waiting.arrived_at) + self.settings.worker_wait_s
        ]

    def _refuse_all(self, request: RequestView, error: SllmError, why: dict[str, str] | None = None) -> list[Decision]:
        """Refuse `request` and all that wait for the same."""
        return [self._refuse(each, error, why) for each in [*self.waiting.values()] if _demand(each) == _demand(request)]

    def _refuse(self, request: RequestView, error: SllmError, why: dict[str, str] | None = None) -> Refuse:
        self._end(request.id, 0.0)
        return Refuse(request.id, request.front_door, error, why or {})

    def _next_wake(self, at: float) -> float | None:
        """The earliest moment after `at` at which time alone changes an answer."""
        times = [inf]
        for request in self.waiting.values():
            times.append(request.deadline_at)
            since = self._unplaceable_since.get(_demand(request))
            if since is not None:
                times.append(max(since, request.arrived_at) + self.settings.worker_wait_s)
            elif request.id not in self._claims.values():
                times.append(request.arrived_at + self.settings.patience_s)
        waiting_models = {request.model for request in self.waiting.values()}
        wanted_models = waiting_models | {model.name for model in self.models.values() if model.min_instances}
        for (name, _), failure in self.failures.items():
            if name in wanted_models:
                times.append(failure.until)
        n_instances = Counter(instance.model for instance in self.instances.values())
        for instance in self.instances.values():
            model = self.models.get(instance.model)
            if model and n_instances[model.name] > model.min_instances:
                times.append(leaves_at(model, instance))
            if wanted_models and instance.idle and instance.ready_at is not None:
                times.append(instance.ready_at + self.settings.min_residency_s)
        earliest = min(time for time in times if time > at)
        return None if earliest == inf else earliest


def _waited_for(instance: InstanceView, request: RequestView) -> Tier | None:
    """The tier that `instance` was loaded from while `request` waited; ``None`` when it was ready already."""
    return instance.loaded_from if instance.ready_at is not None and request.arrived_at < instance.ready_at else None
