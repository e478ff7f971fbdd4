"""Folds the controller's events and decisions into bounded records: what was decided, why, and what came of it.

No I/O and no clock: time is in the events. The scheduler plugin hands in everything that goes into the controller and comes out
of it; what only others know (the client's id of a request, how it ended, when the last byte of a load was there) is told beside.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from math import inf, isfinite
from typing import Any

from sllmdask.cluster.happenings import Feed, Happening
from sllmdask.cluster.load_tallies import LoadTallies
from sllmdask.cluster.move_tallies import MoveTallies, cause_class
from sllmdask.cluster.records import ChoiceRecord, LoadRecord, ModelRecord, RequestRecord, merged_moves
from sllmdask.policy import decisions as do
from sllmdask.policy import events as ev
from sllmdask.policy.choice import Choice, Way
from sllmdask.policy.views import HeldInstance, InstanceState, RequestView

#: Requests that have ended, models that are not deployed any more, and nodes that have left, of which something is kept.
N_ENDED, N_DELETED, N_GONE = 2048, 256, 4096
#: Characters of an error that are kept.
N_ERROR_CHARS = 1000
#: Moves kept of one request.
N_MOVES = 256


class DecisionLog:
    """The records, a feed of what happened, and the tallies. `wall_s` turns the events' times into seconds since the epoch."""

    def __init__(
        self,
        wall_s: Callable[[float], float] = float,
        first_id: int = 1,
        n_ended: int = N_ENDED,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._wall_s, self._n_ended = wall_s, n_ended
        self.feed = Feed(first_id, on_news=on_news)
        self.tallies, self.move_tallies = LoadTallies(), MoveTallies()
        self.requests: dict[str, RequestRecord] = {}
        self.models: dict[str, ModelRecord] = {}
        #: Of the instances that are there.
        self.loads: dict[str, LoadRecord] = {}
        #: Names of nodes by address.
        self._nodes: dict[str, str] = {}
        #: Keys of requests by their clients' ids, which need not be unique, and in the order in which they have ended.
        self._keys: dict[str, list[str]] = {}
        self._ended: dict[str, None] = {}
        #: Models for which instances are about to leave, by instance.
        self._room_for: dict[str, str] = {}
        #: What front doors said of requests that are about to arrive or to end.
        self._told: dict[str, Mapping[str, Any]] = {}
        #: Pauses of moves that are about to be told of, and moves of requests that are not known here, by key and epoch.
        self._pauses_ms: dict[tuple[str, int], float] = {}
        self._strange_moves: dict[tuple[str, int], Mapping[str, Any]] = {}
        #: Causes of the moves that the controller has decided on, by instance.
        self._moving_because: dict[str, str] = {}

    # --- what is there ---

    def find(self, request: str) -> list[RequestRecord]:
        """Those of that id, or of that key, the newest last."""
        keys = self._keys.get(request) or ([request] if request in self.requests else [])
        return [self.requests[key] for key in keys]

    @property
    def n_kept(self) -> int:
        return len(self._ended)

    @property
    def kept_since(self) -> float | None:
        """When the oldest of the requests that have ended, and are still kept, did so."""
        return next((self.requests[key].ended_at for key in self._ended), None)

    def live(self) -> Iterator[RequestRecord]:
        return (record for record in self.requests.values() if record.ended_at is None)

    def node(self, address: str) -> str:
        """The name of a worker, also of one that has left."""
        return self._nodes.get(address, address)

    # --- what others know ---

    def told(self, key: str, facts: Mapping[str, Any]) -> None:
        """What a front door says of a request whose arrival, return or end is the next event about it."""
        self._told[key] = facts

    def read(self, instance: str, phases: Mapping[str, Any], at: float | None = None) -> None:
        """A worker says that every byte of a load is there, and its seconds by phase. `at`: just now; ``None``: some time ago."""
        load = self.loads.get(instance)
        if load is not None and not load.phases and "read_s" in phases:
            load.phases = dict(phases)
            load.read_at = None if at is None else self._wall_s(at)
            if load.ready_at is not None:
                self._count(load)

    def move_ended(self, key: str, move: Mapping[str, Any]) -> None:
        """A worker says what became of a move: a ``MoveRecord`` as plain types, with the ``model``, the ``instance`` that had the
        request, its ``successor``, and ``expected_s``. It is counted here; :meth:`tell_move` puts it among the events."""
        self.move_tallies.move_ended(move)
        record = self.requests.get(key)
        if record is None:  # of a scheduler before this one
            self._strange_moves[key, move["epoch"]] = move
            return
        record.moves = merged_moves(record.moves, [move])[-N_MOVES:]
        known_ms = next((each.get("pause_ms") for each in record.moves if each["epoch"] == move["epoch"]), None)
        if known_ms is not None:  # told with the request's end
            self.move_tallies.paused(move, known_ms)
        # It may have been lost there, and be elsewhere, before its old worker tells of the move.
        if move["outcome"] == "moved" and record.ended_at is None and record.instance == move["instance"]:
            record.instance = move["successor"]
            record.path.append(move["destination"])
        pause_ms = self._pauses_ms.pop((key, move["epoch"]), None)
        if pause_ms is not None:
            self.paused(key, move["epoch"], pause_ms)

    def paused(self, key: str, epoch: int, pause_ms: float) -> None:
        """A front door says how long a client waited for the first token after a move; it may know of it before."""
        record = self.requests.get(key)
        if record is None:
            return
        move = next((move for move in record.moves if move["epoch"] == epoch), None)
        if move is None:
            if record.ended_at is None:
                self._pauses_ms[key, epoch] = pause_ms
        elif move.get("pause_ms") is None:
            move["pause_ms"] = pause_ms
            self.move_tallies.paused(move, pause_ms)

    def tell_move(self, key: str, epoch: int, at: float) -> None:
        """A move is over, and all is known of it that will be."""
        record = self.requests.get(key)
        known = self._strange_moves.pop((key, epoch), None)
        if record is not None:
            known = next((move for move in record.moves if move["epoch"] == epoch), known)
        if known is None:
            return
        facts = {name: known.get(name) for name in ("kind", "outcome", "instance", "successor", "cause", "pause_ms")}
        facts |= {"node": known["source"], "to": known["destination"], "reason": cause_class(known["cause"]), "move": dict(known)}
        event = "moved" if known["outcome"] == "moved" else "stayed"
        happening = self._note(self._wall_s(at), event, request=self.shown(key), model=known["model"], **facts)
        self._model(known["model"]).happened.append(happening)
        if record is not None:
            record.happened.append(happening)

    def resumed(self, key: str, resume: Mapping[str, Any], at: float) -> None:
        """A front door says what became of a request that had lost its worker or instance."""
        self.move_tallies.resumed(resume)
        record = self.requests.get(key)
        if record is None:
            return
        record.resumes.append(dict(resume))
        if resume["outcome"] == "resumed":
            self._note_request(record, self._wall_s(at), "resumed", **resume, instance=record.instance)

    def is_running(self, key: str) -> bool:
        record = self.requests.get(key)
        return record is not None and record.ended_at is None

    def knows_pause(self, key: str, epoch: int) -> bool:
        """Whether it was told what the client noticed of a move."""
        record = self.requests.get(key)
        moves = [] if record is None else record.moves
        return any(move["epoch"] == epoch and move.get("pause_ms") is not None for move in moves)

    def shown(self, key: str) -> str:
        """What its client calls a request."""
        record = self.requests.get(key)
        return key if record is None else record.id

    def moving_because(self, instance: str) -> str:
        """Why an instance is being moved."""
        return self._moving_because.get(instance, "")

    def reconcile(self, there: Container[str], at: float) -> None:
        """Only the instances in `there` are left: a worker's report may say that it does not have one any more."""
        for load in [load for load in self.loads.values() if load.instance not in there]:
            load.leaving = load.leaving or "its worker does not have it any more"
            self._note_instance(load, self._wall_s(at), "unloaded", cause=load.leaving)
            self._close(load, self._wall_s(at))

    # --- the fold ---

    def saw(self, event: ev.Event, decisions: Iterable[do.Decision]) -> None:
        """`event` has led to `decisions`."""
        at = self._wall_s(event.at)
        self._happened(event, at)
        for decision in decisions:
            self._decided(decision, at)

    def _happened(self, event: ev.Event, at: float) -> None:
        match event:
            case ev.RequestArrived(request=request) | ev.LoadRequested(request=request):
                self._arrived(request, at)
            case ev.RequestClaimed(request=request):
                self._claimed(request, at)
            case ev.RequestEnded(request=key):
                self._end(self.requests.get(key), at, self._told.pop(key, {}))
            case ev.RequestReturned(request=key):
                began = bool(self._told.pop(key, {}).get("n_output"))
                record = self.requests.get(key)
                if record is not None and record.ended_at is None:
                    record.state, record.instance, record.returned_at = "queued", None, at if began else None
                    self._note_request(record, at, "returned")
            case ev.FrontDoorLeft(front_door=front_door):
                for record in [record for record in self.live() if record.front_door == front_door]:
                    self._end(record, at, {"state": "cancelled", "error": "its front door has left"})
            case ev.WorkerJoined(worker=worker, instances=held):
                self._forget_gone()
                self._nodes[worker.address] = worker.name
                self._lose_all_of(worker.address, at)
                self._note(at, "joined", node=worker.name, slots=worker.slots, host_capacity=worker.host_capacity)
                for each in held:
                    self._adopted(each, worker.address, at)
            case ev.WorkerLeft(address=address):
                lost = self._lose_all_of(address, at)
                self._note(at, "left", node=self.node(address), instances=lost)
            case ev.WorkerDrains(address=address, cause=cause):
                self._note(at, "draining", node=self.node(address), cause=cause)
            case ev.WorkerUndrained(address=address):
                self._note(at, "undrained", node=self.node(address))
            case ev.ModelDeployed(model=view):
                model = self._model(view.name)
                model.nbytes, model.n_slots, model.deployed = view.nbytes, view.n_slots, True
                self._note(at, "deployed", model=view.name, nbytes=view.nbytes)
            case ev.ModelDeleted(model=name, replaced=replaced):
                self._model(name).deployed = False
                self._note(at, "deleted", model=name, cause="it is deployed from another checkpoint" if replaced else "")
                self._forget_deleted()
            case ev.LoadFinished(instance=instance, loaded_from=tier):
                self._loaded(instance, str(tier), at)
            case ev.LoadFailed(instance=instance, reason=reason):
                self._failed(instance, reason, "load", at)
            case ev.InstanceLost(instance=instance, reason=reason):
                self._failed(instance, reason, "run", at)
            case ev.UnloadFinished(instance=instance):
                self._left(instance, at)
            case ev.InstanceMigrated():
                self._migrated(event, at)
            case ev.MigrationFailed(instance=instance, successor=successor, reason=reason):
                self._moving_because.pop(instance, None)
                self._close(self.loads.get(successor), at, failed=reason)
                self._note_instance(self.loads.get(instance), at, "failed", what="move", cause=reason)
            case ev.WorkerReported() | ev.UnloadRequested() | ev.WorkersAwaited() | ev.TimerFired():
                pass

    def _decided(self, decision: do.Decision, at: float) -> None:
        match decision:
            case do.Chose(choice=choice):
                self._chose(choice, at)
            case do.Load():
                self._load(decision, at)
            case do.Unload():
                self._unload(decision, at)
            case do.Dispatch():
                self._dispatched(decision, at)
            case do.ReportLoaded(request=key, instance=instance, node=node, waited_s=waited_s, loaded_from=tier):
                record = self.requests.get(key)
                if record is not None:
                    self._take(record, instance, node, waited_s, tier)
                    self._end(record, at, {"state": "finished"})
            case do.Refuse(request=key, error=error):
                record = self.requests.get(key)
                if record is not None and record.ended_at is None:
                    record.state, record.error, record.ended_at = "refused", error.message[:N_ERROR_CHARS], at
                    if not record.load_only:
                        self.tallies.refused(error.code or "internal_error")
                    self._copy_happenings(record)
                    self._note_request(record, at, "refused", cause=record.error)
                    self._keep_ended(record)
            case do.Migrate():
                self._migrate(decision, at)
            case do.Preempt(instance=instance, requests=requests, cause=cause):
                self._note_instance(self.loads.get(instance), at, "preempted", n_requests=len(requests), cause=cause)
            case do.WakeAt():
                pass

    # --- requests ---

    def _arrived(self, request: RequestView, at: float) -> None:
        told = self._told.pop(request.id, {})
        known = self.requests.get(request.id)
        if known is not None and known.ended_at is None:
            return
        if known is not None:
            self._forget(known)
        record = RequestRecord(
            key=request.id,
            id=str(told.get("id") or request.id),
            model=request.model,
            front_door=request.front_door,
            priority=request.priority,
            arrived_at=at,
            n_prompt_tokens=told.get("n_prompt_tokens"),
            load_only=request.load_only,
        )
        self.requests[record.key] = record
        self._keys.setdefault(record.id, []).append(record.key)

    def _claimed(self, request: RequestView, at: float) -> None:
        """A request that a scheduler before this one has dispatched."""
        told = dict(self._told.get(request.id, {}))
        self._arrived(request, at)
        record = self.requests[request.id]
        if record.ended_at is not None:
            return
        record.arrived_at = self._wall_s(request.arrived_at)
        record.state, record.instance = "running", request.instance
        if not record.path and told.get("node"):
            record.path.append(str(told["node"]))
        self._note_request(record, at, "claimed", instance=request.instance, node=told.get("node"))

    def _end(self, record: RequestRecord | None, at: float, told: Mapping[str, Any]) -> None:
        if record is None:
            return
        record.n_tokens = told.get("n_tokens", record.n_tokens)
        record.path = list(told.get("path") or record.path)  # it may have moved meanwhile
        record.moves = merged_moves(record.moves, told.get("moves") or ())[-N_MOVES:]
        for pause in [pause for pause in self._pauses_ms if pause[0] == record.key]:
            del self._pauses_ms[pause]
        record.first_token_s = told.get("first_token_s", record.first_token_s)
        if record.ended_at is not None:
            return
        # What was still waiting, and is not any more, was given up by its client.
        record.state = told.get("state") or ("cancelled" if record.state == "queued" else "ended")
        error = told.get("error")
        record.error = None if error is None else str(error)[:N_ERROR_CHARS]
        record.ended_at = at
        self._copy_happenings(record)
        if not record.load_only:
            facts = {"node": record.path[-1] if record.path else None, "instance": record.instance}
            seconds = at - record.arrived_at
            told_of = {"state": record.state, "seconds": seconds, "n_tokens": record.n_tokens, "cause": record.error}
            self._note_request(record, at, "ended", **facts, **told_of)
        self._keep_ended(record)

    def _keep_ended(self, record: RequestRecord) -> None:
        self._told.pop(record.key, None)
        self._ended[record.key] = None
        while len(self._ended) > self._n_ended:
            self._forget(self.requests[next(iter(self._ended))])

    def _forget(self, record: RequestRecord) -> None:
        self._ended.pop(record.key, None)
        del self.requests[record.key]
        keys = self._keys[record.id]
        keys.remove(record.key)
        if not keys:
            del self._keys[record.id]

    def _dispatched(self, dispatch: do.Dispatch, at: float) -> None:
        record = self.requests.get(dispatch.request)
        if record is None:
            return
        record.state = "running"
        queue_s, tier, returned_at = dispatch.queue_s, dispatch.loaded_from, record.returned_at
        if returned_at is None:
            self._take(record, dispatch.instance, dispatch.node, queue_s, tier)
        else:  # it has not waited while it ran; what it waited for at first is kept
            load = self.loads.get(dispatch.instance)
            tier = tier if load is None or (load.ready_at or 0.0) > returned_at else None
            queue_s = at - returned_at
            record.instance, record.returned_at = dispatch.instance, None
            record.path.append(dispatch.node)
        self._copy_happenings(record)
        self._note_request(
            record,
            at,
            "dispatched",
            node=dispatch.node,
            instance=dispatch.instance,
            seconds=queue_s,
            tier=None if tier is None else str(tier),
        )

    def _take(self, record: RequestRecord, instance: str, node: str, queue_s: float, tier: object) -> None:
        record.instance, record.queue_s = instance, queue_s
        record.path.append(node)
        record.cold_start = "hit" if tier is None else str(tier)
        record.load = None if tier is None else self.loads.get(instance)

    def _copy_happenings(self, record: RequestRecord) -> None:
        """What happened to its model while it waited is a part of its story, and is kept with it."""
        model = self.models.get(record.model)
        known = {happening.id for happening in record.happened}
        for happening in reversed(model.happened) if model is not None else ():
            if happening.at < record.arrived_at:
                break
            if happening.id not in known:
                record.happened.append(happening)

    def _chose(self, choice: Choice, at: float) -> None:
        record, model = self.requests.get(choice.request), self._model(choice.model)
        made = ChoiceRecord(choice, at, at)
        chosen = choice.chosen
        if chosen is not None and made.begins:
            self._room_for = {instance: choice.model for instance, _ in chosen.leaving}
            known = model.planned.get(chosen.worker)
            # One load serves all who wait for the same; it is told of the first of them.
            if known is None or known.at != choice.at or known.chosen != chosen:
                model.planned[chosen.worker] = choice
        if chosen is None or chosen.way is not Way.LIVE:
            last = model.choices[-1] if model.choices else None
            if last is None or last.decided != made.decided:
                model.choices.append(made)
            elif last.at != at:
                last.choice, last.at, last.n_times = choice, at, last.n_times + 1
        if record is not None:
            last = record.choices[-1] if record.choices else None
            if last is not None and last.decided == made.decided:
                last.choice, last.at, last.n_times = choice, at, last.n_times + 1
                return
            record.choices.append(ChoiceRecord(choice, at, at))
            record.n_choices += 1
            if made.waits:
                self._note_request(record, at, "waiting", cause=choice.reason)

    # --- instances ---

    def _load(self, decision: do.Load, at: float) -> None:
        load = self._new_load(decision.instance, decision.model, decision.worker, decision.ready_in_s, at)
        load.choice = self._model(decision.model).planned.pop(decision.worker, None)
        load.option = None if load.choice is None else load.choice.chosen
        load.why = {self.node(address): reason for address, reason in decision.why.items()}
        tier = None if load.option is None or load.option.tier is None else str(load.option.tier)
        self._note_instance(load, at, "placed", tier=tier, predicted_s=_finite(decision.ready_in_s))

    def _new_load(self, instance: str, model: str, worker: str, predicted_s: float, at: float) -> LoadRecord:
        known = self._model(model)
        load = self.loads[instance] = LoadRecord(
            instance, model, worker, self.node(worker), known.n_slots, known.nbytes, at, predicted_s
        )
        return load

    def _adopted(self, held: HeldInstance, worker: str, at: float) -> None:
        """An instance that was loaded before: what that took is not known here, and was counted then."""
        if held.id in self.loads:
            return
        load = self._new_load(held.id, held.model, worker, inf, at)
        load.n_slots, load.nbytes, load.counted = held.n_slots, held.nbytes, True
        load.ready_at = at if held.state is InstanceState.READY else None
        self._note_instance(load, at, "adopted", n_requests=held.n_requests)

    def _loaded(self, instance: str, tier: str, at: float) -> None:
        load = self.loads.get(instance)
        if load is None or load.ready_at is not None or load.leaving:
            return
        load.ready_at, load.loaded_from = at, tier
        if load.phases:
            self._count(load)
        seconds = at - load.begun_at
        self._note_instance(load, at, "loaded", tier=tier, seconds=seconds, predicted_s=_finite(load.predicted_s))

    def _unload(self, decision: do.Unload, at: float) -> None:
        load = self.loads.get(decision.instance)
        if load is None:
            return
        room_for = self._room_for.pop(decision.instance, None) if decision.cause == "evicted" else None
        load.leaving = decision.cause if room_for is None else f"evicted for {room_for}"
        # One that is called off gives up nothing that it had.
        if load.ready_at is not None:
            self.tallies.left("device", decision.cause)
        kind = "evicted" if decision.cause.startswith("evict") else "unloading"
        self._note_instance(load, at, kind, cause=decision.cause, room_for=room_for)

    def _left(self, instance: str, at: float) -> None:
        load = self.loads.get(instance)
        self._note_instance(load, at, "unloaded", cause=load.leaving if load else "")
        self._close(load, at)

    def _failed(self, instance: str, reason: str, what: str, at: float) -> None:
        load = self.loads.get(instance)
        if load is None or (load.leaving and load.ready_at is None):
            return  # a load that was called off
        reason = reason[:N_ERROR_CHARS]
        self._note_instance(load, at, "failed", what=what, cause=reason)
        self._model(load.model).failure = load
        if load.leaving:
            load.failed = reason  # it stays until it is unloaded
        else:
            self._close(load, at, failed=reason)

    def _lose_all_of(self, worker: str, at: float) -> list[str]:
        lost = [load for load in self.loads.values() if load.worker == worker]
        for load in lost:
            load.leaving = load.leaving or "its node left"
            self._close(load, at)
        return [load.instance for load in lost]

    def _close(self, load: LoadRecord | None, at: float, *, failed: str = "") -> None:
        if load is None:
            return
        del self.loads[load.instance]
        self._moving_because.pop(load.instance, None)
        load.ended_at, load.failed = at, failed or load.failed
        self.tallies.held(load.model, (at - load.begun_at) * load.n_slots)
        self._count(load)
        self._model(load.model).loads.append(load)

    def _count(self, load: LoadRecord) -> None:
        if not load.counted and not load.moved_from:
            load.counted = True
            self.tallies.load_ended(load)

    def _migrate(self, decision: do.Migrate, at: float) -> None:
        source = self.loads.get(decision.instance)
        load = self._new_load(decision.successor, decision.model, decision.destination, decision.moved_in_s, at)
        load.moved_from = decision.instance
        if source is not None:
            load.choice = source.choice
        predicted_s, cause = _finite(decision.moved_in_s), decision.cause
        self._moving_because[decision.instance] = cause
        self._note_instance(source, at, "moving", to=load.node, predicted_s=predicted_s, cause=cause)

    def _migrated(self, event: ev.InstanceMigrated, at: float) -> None:
        source, load = self.loads.get(event.instance), self.loads.get(event.successor)
        if load is None:
            return
        load.ready_at, load.loaded_from = at, str(event.loaded_from)
        for record in self.live():
            if record.instance == event.instance:
                record.instance = event.successor
                record.path.append(load.node)
        took = {"seconds": at - load.begun_at, "predicted_s": _finite(load.predicted_s)}
        self._note_instance(source, at, "migrated", to=load.node, successor=load.instance, **took)
        if source is not None:
            source.leaving = f"moved to node {load.node}"
            self._close(source, at)

    # --- notes ---

    def _note(self, at: float, event: str, **facts: Any) -> Happening:
        happening = self.feed.add(at, event, facts)
        name = facts.get("model")
        if name is not None and facts.get("request") is None:
            self._model(name).happened.append(happening)
        return happening

    def _note_instance(self, load: LoadRecord | None, at: float, event: str, **facts: Any) -> None:
        if load is not None:
            self._note(at, event, model=load.model, instance=load.instance, node=load.node, **facts)

    def _note_request(self, record: RequestRecord, at: float, event: str, **facts: Any) -> None:
        record.happened.append(self._note(at, event, request=record.id, model=record.model, **facts))

    # --- bounds ---

    def _model(self, name: str) -> ModelRecord:
        model = self.models.get(name)
        if model is None:
            model = self.models[name] = ModelRecord(name)
        return model

    def _forget_deleted(self) -> None:
        """Of models that are gone, the oldest goes first; what still has an instance stays."""
        there = {load.model for load in self.loads.values()}
        gone = [name for name, model in self.models.items() if not model.deployed and name not in there]
        for name in gone[: max(0, len(gone) - N_DELETED)]:
            del self.models[name]
            self.tallies.forget(name)

    def _forget_gone(self) -> None:
        """Names of nodes that left long ago."""
        while len(self._nodes) >= N_GONE:
            del self._nodes[next(iter(self._nodes))]


def _finite(seconds: float) -> float | None:
    return seconds if isfinite(seconds) else None
