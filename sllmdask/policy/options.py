"""The ways of a request: how it could get an instance, where, and the predicted seconds until it does.

It looks at the model's own instances, at workers that have the checkpoint, and of the others at those to which it comes the
fastest: what it takes does not grow with the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from math import ceil, inf

from sllmdask.policy.backoff import BackOff
from sllmdask.policy.choice import Option, Way
from sllmdask.policy.choosers import rank
from sllmdask.policy.claims import Awaited, Claims
from sllmdask.policy.dispatch import takes_requests
from sllmdask.policy.estimate import Supplier, load_parts, migration_seconds, move_seconds
from sllmdask.policy.eviction import victims
from sllmdask.policy.learned import LEAST_REMAINING_S, ServiceTime
from sllmdask.policy.placement import missing_nbytes, unfit
from sllmdask.policy.queue import RequestQueue, demand_of
from sllmdask.policy.records import N_BEST, Ways
from sllmdask.policy.state import ClusterState, Cohort, node_of
from sllmdask.policy.victims import Candidate, Leave, VictimPlan, cheapest_victims
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView

#: Workers without the checkpoint that are offered: more are no better.
N_OFFERED = 8
#: Full workers whose instances are looked at, and of these those from which instances could move: the fastest ones; one of them
#: where they cannot move yet, for the record.
N_BUSY, N_MOVING, N_NOT_MOVING = 8, 2, 1
#: Destinations that are looked at for an instance that could move.
N_DESTINATIONS = 4
#: Workers, and idle instances, of one cohort that are looked at until enough are found.
_MAX_WORKERS, _MAX_IDLE = 128, 48
#: Steps of the search for victims: some milliseconds at the very most.
_MAX_NODES = 200

#: No worker can be asked to do it yet.
NO_MIGRATION = "running requests cannot move between workers here"
NO_PREEMPTION = "running requests cannot be sent back to the queue here"
_COMING = "an instance is on its way: nobody is disturbed for another one"
#: Who waits for ends that are predicted too early waits in vain. Source of the bound: to rent skis until they have cost as much
#: as to buy them costs at most twice what would have been best (Karlin, Manasse, Rudolph, Sleator 1988).
_WAITED = "the request has waited for as long as it takes to load"
_NO_GAIN = "an instance is on its way: another one would not halve the time"


class WayFinder:
    """Finds the ways; decides nothing, and changes nothing."""

    def __init__(
        self,
        state: ClusterState,
        queue: RequestQueue,
        claims: Claims,
        awaited: Awaited,
        back_off: BackOff,
        service: Mapping[str, ServiceTime],
        *,
        max_requests: int,
        min_residency_s: float,
        can_migrate: bool,
        can_preempt: bool,
        preempts_older: bool = False,
    ) -> None:
        self.state, self.queue, self.claims, self.awaited = state, queue, claims, awaited
        self.back_off, self._service = back_off, service
        self.max_requests, self.min_residency_s = max_requests, min_residency_s
        #: Why nobody can be moved, or preempted; empty: they can.
        self.migration_lost = "" if can_migrate else NO_MIGRATION
        self.preemption_lost = "" if can_preempt else NO_PREEMPTION
        self._preempts_older = preempts_older

    # --- seconds ---

    def load_seconds(self, model: ModelView, worker: WorkerView, at: float) -> float:
        return sum(self.load_parts(model, worker, at)[1].values())

    def load_parts(
        self, model: ModelView, worker: WorkerView, at: float, peers: Sequence[Supplier] | None = None
    ) -> tuple[Tier | None, dict[str, float]]:
        """The tier, and seconds by name. Bytes that the node reads already for another instance are read once: then it is ready
        when that one is."""
        peers = self.state.suppliers(model.checkpoint_key) if peers is None else peers
        tier, parts = load_parts(model, worker, queue_s=self.state.queue_s(worker, at), peers=peers)
        if tier is not Tier.HOST:
            arriving_s = self.state.arrives_in_s(worker, model.checkpoint_key, at)
            if arriving_s is not None and arriving_s < sum(parts.values()):
                parts = {"queue": arriving_s, "overhead": 0.0, "read": 0.0}
        return tier, parts

    def remaining_s(self, request: RequestView, at: float) -> float:
        """Until a running request is predicted to end."""
        service = self._service.get(request.model, _UNKNOWN)
        return service.remaining_s(at - (at if request.dispatched_at is None else request.dispatched_at))

    def settles_in(self, instance: InstanceView, at: float) -> float:
        """Seconds for which an instance may not be taken away yet."""
        return max(0.0, (instance.ready_at or 0.0) + self.min_residency_s - at) if self.min_residency_s else 0.0

    def frees_in(self, instance: InstanceView, request: RequestView | None, at: float) -> float:
        """Seconds until the slots of an instance of another model are predicted to be those of `request`; ``inf`` if others keep
        it. Who waits for them before has them for as long as its requests run."""
        before = self.awaited.before(instance.id, request) if request is not None else []
        turns_s = sum(self._service.get(model, _UNKNOWN).mean_s for model in before)
        return self.ends_in(instance, at) + turns_s

    def ends_in(self, instance: InstanceView, at: float) -> float:
        """Seconds until an instance is predicted to be gone, or idle: those who wait for it are served before; ``inf`` if others
        keep it."""
        if instance.state is InstanceState.UNLOADING:
            return 0.0
        if self.state.is_kept(instance):
            return inf
        if instance.successor in self.state.instances:
            return self.state.ready_in_s(self.state.instances[instance.successor], at)
        if instance.state is not InstanceState.READY:
            return self.state.ready_in_s(instance, at) + self._service.get(instance.model, _UNKNOWN).mean_s
        # What is predicted of a request falls with its time until it is overdue and rises then: the last one to end is the first
        # or the newest.
        running = self.queue.first_and_newest(instance.id)
        ends_in_s = max(*(self.remaining_s(each, at) for each in running), self.settles_in(instance, at), 0.0)
        if instance.draining or not self.queue.waits(instance.model):
            return ends_in_s
        n_instances = max(1, len(self.state.living(instance.model)))
        n_turns = ceil(self.queue.n_waiting_of(instance.model) / (self.max_requests * n_instances))
        return ends_in_s + n_turns * self._service.get(instance.model, _UNKNOWN).mean_s

    def move_seconds(self, instance: InstanceView) -> list[float]:
        """Seconds to move each request of an instance: its KV is computed again."""
        model = self.state.models.get(instance.model)
        alpha, beta = (model.alpha, model.beta) if model is not None else (0.0, 0.0)
        return [move_seconds(each.n_tokens, 0, alpha=alpha, beta=beta) for each in self.queue.on_instance(instance.id)]

    # --- ways ---

    def live(self, request: RequestView, at: float) -> Ways:
        """The model's instances that take requests, and no other way: none could be sooner than one of them."""
        ready = [each for each in self._own(request) if takes_requests(each, self.max_requests)]
        return Ways([option for instance in ready for option in self._on_own(request, instance, at)])

    def of_request(self, request: RequestView, model: ModelView, at: float, *, may_load: bool) -> Ways:
        """All ways of the waiting `request` and those who wait for the same, or rather of the last of them; without `may_load`
        only those to instances that the model has already."""
        mine = self._own(request)
        own = [option for instance in mine for option in self._on_own(request, instance, at)]
        n_without = self.n_without_place(request)
        if n_without > 0:
            own = self._for_the_last(own, mine, n_without)
        if not may_load:
            return Ways(sorted(own, key=rank), any_fit=True, any_allowed=True)
        search = _Search(self, model, request, at)
        search.run()
        ways = search.ways()
        found = chain(own, ways.options)
        enough_s = min((option.ready_in_s for option in found if not option.lost), default=inf)
        later = search.disturbing(enough_s)
        ways.options = sorted([*own, *ways.options, *later], key=rank)
        coming_s = min((option.ready_in_s for option in own if option.way is Way.COMING), default=inf)
        if coming_s < inf and n_without <= 0:
            ways.options = [self._beside(option, coming_s) for option in ways.options]
        load = ways.soonest(Way.FREE, Way.EVICT)
        if load is not None and at >= request.arrived_at + load.ready_in_s:
            ways.options = [
                replace(option, lost=_WAITED) if option.way is Way.WAIT and not option.lost else option for option in ways.options
            ]
        return ways

    def n_without_place(self, request: RequestView) -> int:
        """How many wait for the same as `request` beyond those whom the instances that are on their way will take at once."""
        return 0 if request.load_only else self.queue.n_waiting(demand_of(request)) - self.n_places(request)

    def n_places(self, request: RequestView) -> int:
        """Requests that the instances which are on their way will take at once."""
        coming = (InstanceState.PLANNED, InstanceState.LOADING)
        return self.max_requests * sum(each.state in coming for each in self._own(request))

    def _for_the_last(self, own: Sequence[Option], instances: Sequence[InstanceView], n_without: int) -> list[Option]:
        """The ways to one's own instances, if there are not enough: the last waits for the ends of those before it."""
        if not instances:
            return list(own)
        service = self._service.get(instances[0].model, _UNKNOWN)
        later_s = (n_without - 1) / (self.max_requests * len(instances)) * service.mean_s
        found = []
        for option in own:
            if option.way is Way.COMING:  # it is promised to those before
                option = replace(option, way=Way.WAIT, ready_in_s=option.ready_in_s + service.mean_s)
            if option.way is Way.WAIT:
                wait_s = option.ready_in_s + later_s
                option = replace(option, ready_in_s=wait_s, parts={"wait": wait_s})
            found.append(option)
        return found

    @staticmethod
    def _beside(option: Option, coming_s: float) -> Option:
        """An option while an instance is on its way: estimates are not so good that a second one is begun lightly."""
        if option.lost or option.way not in (Way.FREE, Way.EVICT, Way.MIGRATE, Way.PREEMPT):
            return option
        if option.leaving:
            return replace(option, lost=_COMING)
        return replace(option, lost=_NO_GAIN) if coming_s / 2 < option.ready_in_s < coming_s else option

    def of_nobody(self, model: ModelView, at: float, *, may_evict: bool) -> Ways:
        """Free slots, and if `may_evict` idle instances, for an instance that no request waits for."""
        search = _Search(self, model, None, at)
        search.run(may_evict=may_evict)
        ways = search.ways()
        ways.options.sort(key=rank)
        return ways

    def destinations(self, instance: InstanceView, at: float) -> list[tuple[WorkerView, float]]:
        """Workers with room where an instance could go on, with the seconds to load it there, the soonest first."""
        model = self.state.models.get(instance.model)
        if model is None:
            return []
        search = _Search(self, model, None, at, without=instance.worker)
        n = 1 if self.migration_lost else N_DESTINATIONS
        search.run(n, may_evict=False)
        found = sorted((option for _, option in search.found), key=lambda option: (option.ready_in_s, option.node))
        return [(self.state.workers[option.worker], option.ready_in_s) for option in found[:n]]

    def _own(self, request: RequestView) -> list[InstanceView]:
        return [
            instance
            for instance in self.state.instances_of(request.model)
            if not instance.draining and (not request.node or self.state.workers[instance.worker].name == request.node)
        ]

    def _on_own(self, request: RequestView, instance: InstanceView, at: float) -> list[Option]:
        """An instance of the request's model: it is ready, will be, or one of its requests ends or gives way."""
        worker = self.state.workers[instance.worker]

        def option(way: Way, ready_in_s: float, part: str = "wait", lost: str = "") -> Option:
            parts = {part: ready_in_s} if ready_in_s else {}
            return Option(way, worker.address, worker.name, ready_in_s, instance=instance.id, parts=parts, lost=lost)

        if instance.state in (InstanceState.PLANNED, InstanceState.LOADING):
            return [option(Way.COMING, self.state.ready_in_s(instance, at))]
        if instance.state is not InstanceState.READY or instance.successor:
            return []
        if request.load_only or takes_requests(instance, self.max_requests):
            closed = not request.load_only and self.claims.closed(instance.id, request)
            return [option(Way.LIVE, 0.0, lost="kept for a request that waits longer" if closed else "")]
        running = self.queue.on_instance(instance.id)
        found = [option(Way.WAIT, min((self.remaining_s(each, at) for each in running), default=LEAST_REMAINING_S))]
        if any(each.priority < request.priority for each in running):
            found.append(option(Way.PREEMPT, LEAST_REMAINING_S, "move", self.preemption_lost))
        return found

    def gives_way(self, running: RequestView, request: RequestView) -> bool:
        """Whether a request may be sent back to the queue for one for another model."""
        if running.priority != request.priority:
            return running.priority < request.priority
        return self._preempts_older and running.arrived_at < request.arrived_at

    def may_preempt(self, request: RequestView) -> bool:
        """Whether anything runs that could give way."""
        lowest = min((priority for priority, n in self.queue.n_running.items() if n), default=inf)
        return lowest < request.priority or (self._preempts_older and lowest == request.priority)


_UNKNOWN = ServiceTime()


class _Search:
    """One look for workers that could load a model."""

    def __init__(self, finder: WayFinder, model: ModelView, request: RequestView | None, at: float, *, without: str = "") -> None:
        self._finder, self._state = finder, finder.state
        self._model, self._request, self._at = model, request, at
        self._peers = self._state.suppliers(model.checkpoint_key)
        self._arriving = self._state.arriving(model.checkpoint_key)
        self._own = {instance.id for instance in self._state.living(model.name)}
        self._back_off = finder.back_off.active(model.name, at)
        self._seen = {without}
        self._alike: dict[tuple[float, ...], tuple[Tier | None, dict[str, float]]] = {}
        self._unfit: dict[str, str] = {}
        self._any_fit = self._any_allowed = False
        #: Free slots and idle instances: which of equally fast ones comes first, and the option.
        self.found: list[tuple[float, Option]] = []
        #: Workers where something that works would have to leave: seconds to load, name, and how the seconds divide.
        self._full: list[tuple[float, str, WorkerView, Tier | None, dict[str, float]]] = []

    def ways(self) -> Ways:
        """What was found, the best first."""
        ordered = sorted(self.found, key=lambda each: (*rank(each[1]), each[0], each[1].node))
        return Ways([option for _, option in ordered], self._unfit, self._any_fit, self._any_allowed)

    def run(self, n: int = N_OFFERED, *, may_evict: bool = True) -> None:
        """Look at the workers that have the checkpoint, or that the model is limited to, and at `n` others."""
        state, model = self._state, self._model
        for worker in state.named(model.nodes) if model.nodes else state.holders(model.checkpoint_key):
            self._consider(worker, may_evict)
        if model.nodes:
            self._note_others()
            return
        for cohort in state.cohorts():
            if len(self.found) >= n:
                worst_s = sorted(option.ready_in_s for _, option in self.found)[n - 1]
                if cohort.s_per_byte * model.nbytes > worst_s:
                    break
            self._walk(cohort, n, may_evict)

    def _walk(self, cohort: Cohort, n: int, may_evict: bool) -> None:
        """Workers of a cohort: those with free slots, those with idle instances, and if there are none the full ones."""
        state = self._state
        n_left = n
        for _, address in islice(cohort.free, _MAX_WORKERS):
            option = self._consider(state.workers[address], may_evict)
            n_left -= option is not None and not option.parts["queue"]
            if not n_left:
                break
        if may_evict and n_left > 0:  # none of them could be sooner than what is free
            for _, instance_id in islice(cohort.idle, _MAX_IDLE):
                for worker in state.mates(state.instances[instance_id].worker):
                    n_left -= self._consider(worker, may_evict) is not None
                if n_left <= 0:
                    break
        if not self.found and may_evict:
            for _, address in islice(cohort.workers, _MAX_WORKERS):
                if len(self._full) >= N_BUSY:
                    break
                self._consider(state.workers[address], may_evict)

    def _note_others(self) -> None:
        """Some of the workers that the model is not limited to, for the record."""
        for worker in islice(self._state.workers.values(), 4 * N_BEST):
            if worker.address not in self._seen and len(self._unfit) < N_BEST:
                self._unfit[worker.address] = unfit(self._model, worker) or ""

    def _consider(self, worker: WorkerView, may_evict: bool) -> Option | None:
        """The option of loading there, if slots and memory are free or idle instances have them."""
        if worker.address in self._seen:
            return None
        self._seen.add(worker.address)
        reason = unfit(self._model, worker)
        if reason is None:
            self._any_fit = True
            held = self._finder.claims.held(worker.address, self._request)
            reason = self._back_off.get(worker.address)
            self._any_allowed |= reason is None
            if reason is None and held is not None:
                reason = f"kept for a request for {held.model} that waits longer"
        if reason is not None:
            if len(self._unfit) < N_BEST:
                self._unfit[worker.address] = reason
            return None
        tier, parts = self._load_parts(worker)
        ready_in_s = sum(parts.values())
        leaving = self._leaving(worker)
        if leaving is None:
            self._full.append((ready_in_s, worker.name, worker, tier, parts))
            if len(self._unfit) < N_BEST:
                self._unfit[worker.address] = f"its {worker.slots} slots or its memory are taken by instances that stay"
            return None
        if leaving and not may_evict:
            return None
        option = Option(
            Way.EVICT if leaving else Way.FREE,
            worker.address,
            worker.name,
            ready_in_s,
            tier,
            leaving=tuple((instance.id, "") for instance in leaving),
            parts=parts,
        )
        # Of equally fast ones: what was not used for longest leaves, and instances of a model are on different workers.
        n_own = sum(instance.model == self._model.name for instance in self._state.on_worker(worker.address))
        used_at = max((instance.idle_since or 0.0 for instance in leaving), default=0.0)
        self.found.append((used_at if leaving else float(n_own), option))
        return option

    def _load_parts(self, worker: WorkerView) -> tuple[Tier | None, dict[str, float]]:
        """The same for all workers of a cohort that have neither the checkpoint nor anything to read."""
        known = self._model.checkpoint_key in worker.residency or node_of(worker) in self._arriving
        if known or self._state.queue_s(worker, self._at):
            return self._finder.load_parts(self._model, worker, self._at, self._peers)
        key = self._state.cohort_key(worker.address)
        if key not in self._alike:
            self._alike[key] = load_parts(self._model, worker, peers=self._peers)
        return self._alike[key]

    def _leaving(self, worker: WorkerView) -> list[InstanceView] | None:
        """The idle instances that would leave, if any have to; ``None``: those are not enough."""
        state, model = self._state, self._model
        if not state.has_room(worker.address, model.n_slots):
            return None
        here, beside = state.on_worker(worker.address), state.neighbours(worker.address)
        if not here and not beside:
            return []
        both = [*here, *beside]
        protected = frozenset(each.id for each in both if each.id in self._own or not state.evictable(each.id))
        return victims(
            here,
            n_slots=worker.slots - model.n_slots,
            nbytes=worker.host_capacity - model.nbytes,
            checkpoint=model.checkpoint_key,
            now=self._at,
            protected=protected,
            min_residency_s=self._finder.min_residency_s,
            neighbours=beside,
        )

    # --- where something works ---

    def disturbing(self, enough_s: float) -> list[Option]:
        """Ways on the full workers that load the fastest: to wait, to move instances away, to preempt.

        An instance moves only where that could be sooner than `enough_s`.
        """
        found: list[Option] = []
        full = sorted(self._full, key=lambda each: each[:2])[:N_BUSY]
        for i, (ready_in_s, _, worker, tier, parts) in enumerate(full):
            options = [self._wait(worker, tier, parts)]
            if i < (N_NOT_MOVING if self._finder.migration_lost else N_MOVING) and ready_in_s < enough_s and self._state.any_free:
                options.append(self._migrate(worker, tier, parts))
            if self._request is not None and self._finder.may_preempt(self._request):
                options.append(self._preempt(worker, tier, parts))
            found += [option for option in options if option is not None]
        return found

    def _after(self, seconds: float, part: str, parts: Mapping[str, float]) -> dict[str, float]:
        """The parts of a load that begins after `seconds`, during which the queue goes on."""
        return {part: seconds, **parts, "queue": max(0.0, parts["queue"] - seconds)}

    def _others(self, worker: WorkerView, leaving: Iterable[InstanceView]) -> list[InstanceView]:
        """What stays on the worker's node."""
        gone = {instance.id for instance in leaving}
        both = [*self._state.on_worker(worker.address), *self._state.neighbours(worker.address)]
        return [instance for instance in both if instance.id not in gone]

    def _lacks_memory(self, worker: WorkerView, leaving: Iterable[InstanceView]) -> int:
        return missing_nbytes(self._model.nbytes, self._model.checkpoint_key, worker, self._others(worker, leaving))

    def _wait(self, worker: WorkerView, tier: Tier | None, parts: Mapping[str, float]) -> Option | None:
        """Those leave whose end is predicted first, until there are slots, and then until there is memory."""
        here, beside = self._state.on_worker(worker.address), self._state.neighbours(worker.address)
        ends_in_s = {
            each.id: inf if each.id in self._own else self._finder.frees_in(each, self._request, self._at)
            for each in (*here, *beside)
        }
        staying = sorted(here, key=lambda each: (ends_in_s[each.id], each.id))
        leaving: list[InstanceView] = []
        free = self._state.free_slots(worker.address)
        while free < self._model.n_slots and staying:
            leaving.append(staying.pop(0))
            free += leaving[-1].n_slots
        staying = sorted([*staying, *beside], key=lambda each: (ends_in_s[each.id], each.id))
        while self._lacks_memory(worker, leaving) > 0 and staying:
            leaving.append(staying.pop(0))
        wait_s, last = max(((ends_in_s[each.id], each.id) for each in leaving), default=(0.0, ""))
        if wait_s == inf or free < self._model.n_slots or self._lacks_memory(worker, leaving) > 0:
            return None
        parts = self._after(wait_s, "wait", parts)
        gone = tuple((each.id, "") for each in leaving)
        return Option(Way.WAIT, worker.address, worker.name, sum(parts.values()), tier, instance=last, leaving=gone, parts=parts)

    def _migrate(self, worker: WorkerView, tier: Tier | None, parts: Mapping[str, float]) -> Option | None:
        """Running instances go to where there is room, the cheapest ones."""
        room: dict[str, int] = {}
        room_nbytes: dict[str, int] = {}

        def leaves(instance: InstanceView) -> list[Leave]:
            found = []
            for target, load_s in self._finder.destinations(instance, self._at):
                lacks = missing_nbytes(0, "", target, self._others(target, ()))
                room[target.address], room_nbytes[target.address] = self._state.free_slots(target.address), -lacks
                pinned = any(each.checkpoint == instance.checkpoint for each in self._others(target, ()))
                cost_s = migration_seconds(load_s, self._finder.move_seconds(instance))
                found.append(Leave(Way.MIGRATE, cost_s, target.address, 0 if pinned else instance.nbytes))
            return found

        plan = self._plan(worker, leaves, room, room_nbytes)
        if plan is None:
            return None
        parts = self._after(plan.longest_s, "move", parts)
        leaving = tuple((instance_id, leave.destination) for instance_id, leave in plan.leaving)
        lost = self._finder.migration_lost
        return Option(
            Way.MIGRATE, worker.address, worker.name, sum(parts.values()), tier, leaving=leaving, parts=parts, lost=lost
        )

    def _preempt(self, worker: WorkerView, tier: Tier | None, parts: Mapping[str, float]) -> Option | None:
        """Instances whose requests are all of lower classes leave, those first that lose the least work."""
        request = self._request

        def leaves(instance: InstanceView) -> list[Leave]:
            running = self._finder.queue.on_instance(instance.id)
            if request is None or not all(self._finder.gives_way(each, request) for each in running):
                return []
            return [Leave(Way.PREEMPT, sum(self._finder.move_seconds(instance)))]

        plan = self._plan(worker, leaves, {}, {})
        if plan is None:
            return None
        parts = self._after(LEAST_REMAINING_S, "move", parts)
        leaving = tuple((instance_id, "") for instance_id, _ in plan.leaving)
        lost = self._finder.preemption_lost
        return Option(
            Way.PREEMPT, worker.address, worker.name, sum(parts.values()), tier, leaving=leaving, parts=parts, lost=lost
        )

    def _plan(
        self,
        worker: WorkerView,
        leaves: Callable[[InstanceView], list[Leave]],
        room: Mapping[str, int],
        room_nbytes: Mapping[str, int],
    ) -> VictimPlan | None:
        """The cheapest set of victims; idle ones cost nothing."""
        state, model = self._state, self._model
        candidates = []
        beside = {each.checkpoint for each in state.neighbours(worker.address)} | {model.checkpoint_key}
        for instance in state.on_worker(worker.address):
            movable = instance.state is InstanceState.READY and not instance.draining and not instance.successor
            if not movable or instance.id in self._own or state.is_kept(instance):
                continue
            if self._finder.settles_in(instance, self._at):
                continue
            ways = [Leave(Way.EVICT, 0.0)] if instance.idle else leaves(instance)
            nbytes = 0 if instance.checkpoint in beside else instance.nbytes
            candidates.append(Candidate(instance.id, instance.n_slots, tuple(ways), nbytes, instance.checkpoint))
        n_slots = model.n_slots - state.free_slots(worker.address)
        return cheapest_victims(
            candidates,
            n_slots,
            room,
            nbytes=max(0, self._lacks_memory(worker, ())),
            room_nbytes=room_nbytes,
            max_nodes=_MAX_NODES,
        )
