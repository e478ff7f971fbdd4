"""Decisions to later events: two mechanisms around which the controller may be run.

:class:`Estimated` takes the controller at its word. :class:`Cluster` is a cluster of its own, of which the controller knows
what it is told: loads that wait for each other, bandwidths that are not what was promised, host memory that fills, engines that
slow down with their batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random

from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision, Dispatch, Load, Migrate, Preempt, Unload
from sllmdask.policy.estimate import load_seconds
from sllmdask.policy.views import ModelView, Tier, WorkerView
from sllmdask.sim.clock import Appointment, Clock
from sllmdask.sim.links import Link, Sharing, Transfer, link
from sllmdask.sim.residency import TierMemory
from sllmdask.sim.serving import Sequence, Serving, StepCosts

#: Tells the controller of an event, at the time of the event.
Tell = Callable[[ev.Event], Appointment]

# --- as the controller predicts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds that the real mechanisms would take."""

    #: Seconds of one request once it runs, by request id.
    service_s: Callable[[str], float]
    unload_s: float = 0.01


class Estimated:
    """A load and a move take what the controller estimates, and leave the checkpoint in host memory, which is never full.

    A request takes its time whoever else is served, and all of it again when it was preempted.
    """

    def __init__(self, controller: Controller, costs: Costs, clock: Clock, tell: Tell) -> None:
        self._controller, self._costs, self._clock, self._tell = controller, costs, clock, tell
        self._n_reports: Counter[str] = Counter()
        self._resident: dict[str, Mapping[str, Tier]] = {}
        self._ends: dict[str, Appointment] = {}

    def enact(self, decision: Decision) -> None:
        now = self._clock.now
        match decision:
            case Load(instance=instance, model=model, worker=worker):
                seconds = load_seconds(self._controller.models[model], self._controller.workers[worker])
                self._tell(ev.LoadFinished(now + seconds, instance, self._tier(model, worker)))
                self._keep(model, worker, now + seconds)
            case Unload(instance=instance):
                self._tell(ev.UnloadFinished(now + self._costs.unload_s, instance))
            case Migrate(instance=instance, successor=successor, model=model, destination=worker, moved_in_s=seconds):
                self._tell(ev.InstanceMigrated(now + seconds, instance, successor, self._tier(model, worker)))
                self._keep(model, worker, now + seconds)
            case Dispatch(request=request):
                self._ends[request] = self._tell(ev.RequestEnded(now + self._costs.service_s(request), request))
            case Preempt(requests=requests):
                for each in requests:
                    self._ends[each].call_off()
                    self._tell(ev.RequestReturned(now, each))

    def _tier(self, model: str, worker: str) -> Tier:
        return self._controller.workers[worker].residency.get(self._controller.models[model].checkpoint_key, Tier.REMOTE)

    def _keep(self, model: str, worker: str, at: float) -> None:
        """The worker reports at `at` that it has the checkpoint in host memory."""
        view = self._controller.workers[worker]
        checkpoint = self._controller.models[model].checkpoint_key
        self._n_reports[worker] += 1
        self._resident[worker] = {**self._resident.get(worker, view.residency), checkpoint: Tier.HOST}
        account = self._resident[worker], view.bytes_per_s, view.overhead_s
        self._tell(ev.WorkerReported(at, worker, self._n_reports[worker], *account))


# --- a cluster of its own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierCosts:
    """What it really costs to load from a tier, to the device. `expected_bytes_per_s` is what the controller is told at first."""

    bytes_per_s: float
    overhead_s: float = 0.0
    #: Loads that one node does at once at full speed.
    lanes: int = 1
    expected_bytes_per_s: float | None = None

    @property
    def told_bytes_per_s(self) -> float:
        return self.expected_bytes_per_s or self.bytes_per_s


@dataclass(frozen=True)
class NodeSpec:
    """One node: the addresses and names of its workers, the slots of each, its memory, and the tiers that it loads from.

    `on_disk` and `in_host` are there from the beginning, by checkpoint, in bytes.
    """

    name: str
    workers: tuple[tuple[str, str], ...]
    slots: int
    host_nbytes: int
    disk_nbytes: int
    tiers: Mapping[Tier, TierCosts]
    on_disk: Mapping[str, int] = field(default_factory=dict)
    in_host: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterCosts:
    """What everything but reading costs, and how far reality is from what is nominal."""

    steps: StepCosts = field(default_factory=StepCosts)
    unload_s: float = 0.05
    #: A move by copying keys and values: seconds per token beside decoding, and seconds in which nobody decodes.
    copy_s_per_token: float = 0.0002
    copy_pause_s: float = 0.02
    #: Tokens that a move by computing the keys and values again leaves for the pause.
    resume_tail_tokens: int = 20
    sharing: Sharing = "turns"
    #: Standard deviation of the logarithm of a load's real over its nominal time, whose mean is 1.
    noise: float = 0.0
    #: Whether workers report the bandwidth that they see, or for ever the expected one.
    workers_measure: bool = True


@dataclass(frozen=True)
class Lengths:
    """Tokens of a request's prompt and of its answer."""

    n_prompt: int
    n_output: int


@dataclass(frozen=True)
class LoadRecord:
    """One load: from where, and the seconds since it was decided, those of waiting included. ``predicted_s`` is the decision's,
    and ``None`` for the load of a move."""

    model: str
    worker: str
    tier: Tier
    seconds: float
    predicted_s: float | None


@dataclass
class RequestRecord:
    """What a request went through. `stalled_s`: seconds in which it stood still after it had begun."""

    first_token_at: float | None = None
    stalled_s: float = 0.0
    n_moves: int = 0
    n_preemptions: int = 0


def introductions(nodes: Iterable[NodeSpec]) -> list[WorkerView]:
    """The workers of `nodes`, as they introduce themselves to the controller."""
    return [
        WorkerView(
            address=address,
            name=name,
            slots=node.slots,
            host_capacity=node.host_nbytes,
            node=node.name if len(node.workers) > 1 else "",
            residency={**dict.fromkeys(node.on_disk, Tier.DISK), **dict.fromkeys(node.in_host, Tier.HOST)},
            bytes_per_s={tier: each.told_bytes_per_s for tier, each in node.tiers.items()},
            overhead_s={tier: each.overhead_s for tier, each in node.tiers.items()},
        )
        for node in nodes
        for address, name in node.workers
    ]


class _Node:
    """A node at work."""

    #: What the newest measurement counts in what a worker says of a tier.
    NEWEST = 0.3

    def __init__(self, spec: NodeSpec, costs: ClusterCosts, clock: Clock) -> None:
        self.spec = spec
        self.links: dict[Tier, Link] = {tier: link(clock, costs.sharing, each.lanes) for tier, each in spec.tiers.items()}
        self.host, self.disk = TierMemory(spec.host_nbytes), TierMemory(spec.disk_nbytes)
        self.told = {tier: each.told_bytes_per_s for tier, each in spec.tiers.items()}
        self.overhead_s = {tier: each.overhead_s for tier, each in spec.tiers.items()}
        self.version = 0
        #: Checkpoints that are being read to host memory, with the loads that wait for the same bytes.
        self.arriving: dict[str, list[Callable[[], None]]] = {}
        for key, nbytes in spec.on_disk.items():
            self.disk.take(key, nbytes, self.seconds(Tier.REMOTE, nbytes))
        for key, nbytes in spec.in_host.items():
            self.host.take(key, nbytes, self.seconds(Tier.DISK, nbytes))

    def seconds(self, tier: Tier, nbytes: float) -> float:
        """What `nbytes` take from `tier`, beside the overhead, without noise and without others."""
        return nbytes / self.spec.tiers[tier].bytes_per_s

    def residency(self) -> dict[str, Tier]:
        complete = (key for key in self.host if key not in self.arriving)
        return {**dict.fromkeys(self.disk, Tier.DISK), **dict.fromkeys(complete, Tier.HOST)}

    def measured(self, tier: Tier, nbytes: int, seconds: float) -> None:
        seconds -= self.overhead_s[tier]
        if seconds > 0:
            self.told[tier] += self.NEWEST * (nbytes / seconds - self.told[tier])


@dataclass(eq=False)
class _Instance:
    """An instance in the cluster: being read while it has a `transfer`, or waits for that of another, then serving."""

    id: str
    model: ModelView
    worker: str
    node: _Node
    tier: Tier
    asked_at: float
    serving: Serving
    #: What follows if it leaves before it is loaded.
    lost: Callable[[], None] | None = None
    transfer: Transfer | None = None
    loaded: bool = False
    #: It takes no more requests.
    closed: bool = False


class Cluster:
    """Nodes, links, memory and engines under the virtual clock."""

    def __init__(
        self,
        clock: Clock,
        tell: Tell,
        nodes: Iterable[NodeSpec],
        models: Mapping[str, ModelView],
        lengths: Mapping[str, Lengths],
        costs: ClusterCosts,
        rng: Random,
    ) -> None:
        self._clock, self._tell, self._models, self._lengths, self._costs, self._rng = clock, tell, models, lengths, costs, rng
        self._nodes = [_Node(spec, costs, clock) for spec in nodes]
        self._node_of = {address: node for node in self._nodes for address, _ in node.spec.workers}
        self._instances: dict[str, _Instance] = {}
        self._sequences: dict[str, Sequence] = {}
        self.requests: dict[str, RequestRecord] = {}
        self.loads: list[LoadRecord] = []
        self.n_migrations = 0
        self.n_failed_migrations = 0

    def n_slots_used(self, worker: str) -> int:
        """Slots of `worker` that instances have, loading ones included."""
        return sum(each.model.n_slots for each in self._instances.values() if each.worker == worker)

    def enact(self, decision: Decision) -> None:
        match decision:
            case Load():
                self._load(decision)
            case Unload():
                self._unload(decision)
            case Dispatch():
                self._dispatch(decision)
            case Migrate():
                self._migrate(decision)
            case Preempt():
                self._preempt(decision)

    # --- loads -------------------------------------------------------------------------------------------------------

    def _load(self, load: Load) -> None:
        def loaded(instance: _Instance) -> None:
            self._record(instance, load.ready_in_s)
            self._tell(ev.LoadFinished(self._clock.now, instance.id, instance.tier))
            self._report(instance.node)

        if not self._begin(load.instance, load.model, load.worker, loaded):
            self._tell(ev.LoadFailed(self._clock.now, load.instance, "the node's host memory is full of loaded models"))

    def _record(self, instance: _Instance, predicted_s: float | None) -> None:
        seconds = self._clock.now - instance.asked_at
        self.loads.append(LoadRecord(instance.model.name, instance.worker, instance.tier, seconds, predicted_s))

    def _begin(
        self,
        instance_id: str,
        model: str,
        worker: str,
        loaded: Callable[[_Instance], None],
        lost: Callable[[], None] | None = None,
    ) -> bool:
        """Read `model` to `worker`; ``False``: its node has no memory for it."""
        view, node = self._models[model], self._node_of[worker]
        key = view.checkpoint_key
        tier = self._source(node, key)
        if not node.host.take(key, view.nbytes, node.seconds(Tier.DISK, view.nbytes)):
            return False
        node.host.pin(key)
        serving = Serving(self._clock, self._costs.steps, self)
        instance = _Instance(instance_id, view, worker, node, tier, self._clock.now, serving, lost)
        self._instances[instance_id] = instance
        ready = partial(self._ready, instance, loaded)
        if key in node.arriving:
            node.arriving[key].append(ready)
        else:
            if tier is not Tier.HOST:
                node.arriving[key] = []
            self._start(instance, ready)
        return True

    def _source(self, node: _Node, key: str) -> Tier:
        """The nearest tier that has all of `key`."""
        tier = node.residency().get(key)
        if tier is not None:
            return tier
        elsewhere = any(key in other.residency() for other in self._nodes if other is not node)
        return Tier.PEER if elsewhere and Tier.PEER in node.spec.tiers else Tier.REMOTE

    def _start(self, instance: _Instance, ready: Callable[[], None]) -> None:
        node, sigma = instance.node, self._costs.noise
        factor = self._rng.lognormvariate(-sigma * sigma / 2, sigma) if sigma else 1.0
        seconds = node.overhead_s[instance.tier] + node.seconds(instance.tier, instance.model.nbytes) * factor
        instance.transfer = node.links[instance.tier].read(seconds, partial(self._arrived, instance, ready))

    def _arrived(self, instance: _Instance, ready: Callable[[], None], seconds: float) -> None:
        """All bytes are there: for `instance`, and for whoever waited for the same ones."""
        node, tier, key = instance.node, instance.tier, instance.model.checkpoint_key
        if self._costs.workers_measure:
            node.measured(tier, instance.model.nbytes, seconds)
        if tier in (Tier.REMOTE, Tier.PEER):
            node.disk.take(key, instance.model.nbytes, node.seconds(tier, instance.model.nbytes))
        waiting = node.arriving.pop(key, []) if tier is not Tier.HOST else []
        for each in [ready, *waiting]:
            each()

    def _ready(self, instance: _Instance, loaded: Callable[[_Instance], None]) -> None:
        instance.transfer = None
        if instance.id in self._instances:
            instance.loaded = True
            loaded(instance)

    def _unload(self, unload: Unload) -> None:
        instance = self._instances.get(unload.instance)
        if instance is not None:
            self._leave(instance)
            if unload.forget:
                instance.node.host.drop(instance.model.checkpoint_key)
        self._tell(ev.UnloadFinished(self._clock.now + self._costs.unload_s, unload.instance))

    def _leave(self, instance: _Instance) -> None:
        """It gives up its memory. Its bytes stay, unless they were still on their way and nobody else waits for them."""
        del self._instances[instance.id]
        instance.closed = True
        node, key = instance.node, instance.model.checkpoint_key
        node.host.unpin(key)
        if instance.transfer is not None and not node.arriving.get(key):
            node.links[instance.tier].call_off(instance.transfer)
            if instance.tier is not Tier.HOST:
                del node.arriving[key]
                node.host.drop(key)
        if not instance.loaded and instance.lost is not None:
            instance.lost()

    def _report(self, node: _Node) -> None:
        node.version += 1
        for address, _ in node.spec.workers:
            account = node.residency(), dict(node.told), node.overhead_s
            self._tell(ev.WorkerReported(self._clock.now, address, node.version, *account))

    # --- requests ----------------------------------------------------------------------------------------------------

    def _dispatch(self, dispatch: Dispatch) -> None:
        instance = self._instances.get(dispatch.instance)
        if instance is None or instance.closed:
            self._tell(ev.RequestReturned(self._clock.now, dispatch.request))
            return
        lengths = self._lengths[dispatch.request]
        fresh = Sequence(dispatch.request, lengths.n_prompt, lengths.n_output)
        self.requests.setdefault(dispatch.request, RequestRecord())
        instance.serving.add(self._sequences.setdefault(dispatch.request, fresh))

    def made_token(self, sequence: Sequence) -> None:
        self._goes_on(sequence)
        record = self.requests[sequence.request]
        if record.first_token_at is None:
            record.first_token_at = self._clock.now

    def ended(self, sequence: Sequence) -> None:
        self._tell(ev.RequestEnded(self._clock.now, sequence.request))

    def _stops(self, sequence: Sequence) -> None:
        if sequence.n_done and sequence.stalled_since is None:
            sequence.stalled_since = self._clock.now

    def _goes_on(self, sequence: Sequence) -> None:
        if sequence.stalled_since is not None:
            self.requests[sequence.request].stalled_s += self._clock.now - sequence.stalled_since
            sequence.stalled_since = None

    def _preempt(self, preempt: Preempt) -> None:
        """They go at the end of the step, without their keys and values; what was said already is not said again."""

        def gone(sequences: list[Sequence]) -> None:
            for each in sequences:
                self._stops(each)
                each.has_kv = False
                self.requests[each.request].n_preemptions += 1
                self._tell(ev.RequestReturned(self._clock.now, each.request))

        instance = self._instances.get(preempt.instance)
        if instance is not None:
            instance.serving.take(frozenset(preempt.requests), gone)

    # --- moves -------------------------------------------------------------------------------------------------------

    def _migrate(self, migrate: Migrate) -> None:
        """Load at the destination and bring over what there is, while the source decodes; stop there, and go on here."""

        def failed(reason: str) -> None:
            self.n_failed_migrations += 1
            self._tell(ev.MigrationFailed(self._clock.now, migrate.instance, migrate.successor, reason))

        def source(successor: _Instance) -> _Instance | None:
            """The instance that moves; ``None``: it is not there any more, which the controller is told."""
            found = self._instances.get(migrate.instance)
            if found is not None and successor.id in self._instances:
                return found
            if successor.id in self._instances:
                self._leave(successor)
            failed("one of the two instances is gone")
            return None

        def loaded(successor: _Instance) -> None:
            self._record(successor, None)
            self._report(successor.node)
            moving = source(successor)
            if moving is not None:
                beside_s, pause_s = self._moving_costs(moving.serving.tokens_now().values())
                self._clock.call_later(beside_s, partial(stop, successor, pause_s))

        def stop(successor: _Instance, pause_s: float) -> None:
            moving = source(successor)
            if moving is not None:
                moving.serving.take(None, partial(stopped, moving, successor, pause_s))

        def stopped(moving: _Instance, successor: _Instance, pause_s: float, sequences: list[Sequence]) -> None:
            moving.closed = True
            for each in sequences:
                self._stops(each)
            self._clock.call_later(pause_s if sequences else 0.0, partial(moved, moving, successor, sequences))

        def moved(moving: _Instance, successor: _Instance, sequences: list[Sequence]) -> None:
            for each in sequences:
                self.requests[each.request].n_moves += 1
                if each.has_kv:
                    self._goes_on(each)
            self.n_migrations += 1
            if moving.id in self._instances:
                self._leave(moving)
            successor.serving.give(sequences)
            self._tell(ev.InstanceMigrated(self._clock.now, moving.id, successor.id, successor.tier))

        lost = partial(failed, "the instance at the destination was unloaded before it was ready")
        if not self._begin(migrate.successor, migrate.model, migrate.destination, loaded, lost):
            failed("the host memory of the destination is full of loaded models")

    def _moving_costs(self, n_tokens: Iterable[int]) -> tuple[float, float]:
        """Seconds beside decoding, and of the pause, of requests that move at once, each in the quicker way."""
        costs = self._costs
        tail_s = costs.steps.prefill(costs.resume_tail_tokens)
        beside_s = pause_s = 0.0
        for n in n_tokens:
            copy, resume = (costs.copy_s_per_token * n, costs.copy_pause_s), (costs.steps.prefill(n), tail_s)
            quicker = min(copy, resume, key=sum)
            beside_s, pause_s = max(beside_s, quicker[0]), max(pause_s, quicker[1])
        return beside_s, pause_s
