"""What makes a Dask scheduler the head of sllmdask: ``dask scheduler --preload sllmdask.cluster.scheduler_plugin``.

Every hook of Dask ends in one event for the controller, every decision in one effect. The only place that decides anything is
``policy/``; this is its mechanism.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from math import inf
from pathlib import Path
from typing import Any

import click
from distributed import Scheduler
from distributed.comm import Comm
from distributed.comm.addressing import parse_host_port
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from sllmdask.actors.streams import Message, Outbox, messages
from sllmdask.cluster.adopting import RETURN_S, Adoption, WorkerNames
from sllmdask.cluster.dask_settings import log_as_dask_does, read_settings
from sllmdask.cluster.deployments import Deployments
from sllmdask.cluster.draining import Drains
from sllmdask.cluster.effects import UNLOAD_LIMIT_S, Effects
from sllmdask.cluster.estimates import Estimates
from sllmdask.cluster.event_log import Recorder
from sllmdask.cluster.moves_seen import MovesSeen
from sllmdask.cluster.moving import Moving
from sllmdask.cluster.observing import Observer
from sllmdask.cluster.operations import Operations
from sllmdask.cluster.rows import Rows
from sllmdask.cluster.state_store import Found, StateStore, default_path
from sllmdask.cluster.waiting import Departures, LoadProgress, Wishes
from sllmdask.cluster.worker_plugin import PROTOCOL
from sllmdask.config import Deployment, Settings, read_hardware
from sllmdask.errors import ConfigError, EngineError, SllmError
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Decision, Dispatch, Load, Move
from sllmdask.policy.views import InstanceState, InstanceView, RequestView, Tier, WorkerView

logger = logging.getLogger(__name__)

#: Events kept for replay and for `explain`.
N_EVENTS = 10_000
#: Seconds between two comparisons of the heartbeats' account with ours: a report that was lost is found here.
RECONCILE_S = 2.0
#: Seconds for which an account may still list an instance that has failed: that of a heartbeat is not the newest one.
FAILED_S = 10.0
#: Seconds that changes of models are gathered before the front doors hear of them.
GATHER_S = 0.02


def answer(handler: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Around a handler: our errors travel as plain data, since Dask would pickle them."""

    @functools.wraps(handler)
    async def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await handler(*args, **kwargs)
        except SllmError as error:
            return error.as_wire()
        except Exception as error:
            logger.exception("handler %s failed", handler.__name__)
            return EngineError(f"{handler.__name__} failed: {error!r}").as_wire()

    return call


class SllmSchedulerPlugin(SchedulerPlugin):
    """Hooks to events, decisions to effects, and the front doors' connection."""

    name = "sllmdask"

    def __init__(self, scheduler: Scheduler, settings: Settings, store: StateStore | None = None) -> None:
        """`store`: what is kept for the next scheduler, and what the one before has kept."""
        self.scheduler, self.settings, self._store = scheduler, settings, store
        found = Found(generation=_unique_generation(scheduler)) if store is None else store.found
        self.controller = Controller(
            ControllerSettings(
                worker_wait_s=settings.scheduler.worker_wait,
                max_queue=settings.scheduler.max_queue,
                min_residency_s=settings.scheduler.min_residency,
                patience_s=settings.scheduler.patience,
                can_migrate=settings.scheduler.migrate,
                max_requests=settings.engine.max_running,
                can_move=True,
                generation=found.generation,
            )
        )
        self._recorder = Recorder(settings.scheduler.event_log, self.controller.settings)
        self.events: deque[ev.Event] = deque(maxlen=N_EVENTS)
        self._doors: dict[str, Outbox] = {}
        #: What the front doors were told last.
        self._rows: dict[str, dict[str, Any]] = {}
        self._n_workers_told = 0
        #: Instances that nobody knows, being unloaded.
        self._strays: set[str] = set()
        #: When instances have failed, by instance, for `FAILED_S`.
        self._failed_at: dict[str, float] = {}
        #: The newest account of each worker, by address.
        self._accounts: dict[str, dict[str, Any]] = {}
        #: What the front doors were told last of how far instances are that take requests and are still read.
        self._told_reading: dict[str, dict[str, Any]] = {}
        self._telling: asyncio.TimerHandle | None = None
        self._reconciler: asyncio.Task[None] | None = None
        #: What workers prove to each other that they know.
        self._token = secrets.token_hex(16)
        path = settings.scheduler.hardware_config
        self._estimates = Estimates(read_hardware(path) if path else {})
        self.moving = Moving(self)
        self.effects = Effects(scheduler, self.on, self._doors, self.deployment, self.peers, self.moving.evacuate)
        self.deployments = Deployments(self.controller, settings, self.effects, self.on, self.peers, self._fold_account, store)
        self._names = WorkerNames(store, self.effects.start)
        self.deployed = self.deployments.by_name
        self._adoption = Adoption(self.controller, self.effects, self.deployed, self._doors)
        self._wishes, self._departures = Wishes(), Departures()
        self._progress = LoadProgress(self.controller, self._tell_soon)
        self.drains = Drains(self.controller, self.on, self._worker_named)
        self._made_rows = Rows(
            scheduler, self.controller, self.deployments, self._progress, self._accounts, self._estimates, self.drains
        )
        self._operations = Operations(
            self.controller,
            self.deployments,
            self.effects,
            self.on,
            self.peers,
            self._wishes,
            self._departures,
            self._progress,
        )
        self.observer = Observer(self.controller, self._doors, self._accounts)
        self.moves_seen = MovesSeen(self.controller, self.observer.log, self.on)
        if store is not None:
            self._return(store)
        for operation, handler in self.observer.handlers.items():
            scheduler.handlers[operation] = answer(handler)
        scheduler.handlers["sllm-front-door"] = self.front_door
        scheduler.handlers["sllm_register"] = self.register
        scheduler.handlers["sllm_delete"] = self.delete
        scheduler.handlers["sllm_files"] = answer(self.deployments.files)
        scheduler.handlers["sllm_cluster"] = self.cluster
        scheduler.handlers["sllm_load"] = answer(self._operations.load)
        scheduler.handlers["sllm_unload"] = answer(self._operations.unload)
        scheduler.handlers["sllm_pull"] = answer(self._operations.pull)
        scheduler.handlers["sllm_migrate"] = self.migrate
        scheduler.handlers["sllm_drain"] = answer(self.drains.drain)
        scheduler.handlers["retire_workers"] = self.drains.retiring(scheduler)
        scheduler.handlers["sllm_pin"] = self.pin
        scheduler.handlers["sllm_update"] = self.update
        scheduler.stream_handlers["sllm-report"] = self.worker_report

    def _return(self, store: StateStore) -> None:
        """What the scheduler before this one has kept."""
        found, now = store.found, time.monotonic()
        names = self.deployments.restore(found)
        if found.generation > 1:
            logger.info("%d deployments have returned from %s: %s", len(names), store.path, ", ".join(names) or "none")
        if found.workers:
            self.on(ev.WorkersAwaited(now, found.workers, now + RETURN_S))
            self.effects.start(self._forget_absent(found.workers))

    async def _forget_absent(self, names: frozenset[str]) -> None:
        """Workers that have not come back are not waited for the next time."""
        await asyncio.sleep(RETURN_S)
        for name in sorted(names - {worker.name for worker in self.controller.workers.values()}):
            logger.warning("worker %s was there before, and has not come back", name)
            self._names.left(name)

    def on(self, event: ev.Event) -> None:
        """The one way into the controller."""
        self.events.append(event)
        if isinstance(event, ev.LoadFailed | ev.InstanceLost):
            self._failed_at[event.instance] = event.at
        if isinstance(event, ev.LoadFinished):
            self._progress.takes_requests(event)
        self.drains.saw(event)
        try:
            decisions = self.controller.handle(event)
        except Exception:
            # Dask swallows what a hook raises; without the event nobody could find out why.
            logger.exception("the controller failed on %r", event)
            raise
        self._recorder.saw(event, decisions)
        self.observer.saw(event, decisions)
        for decision in decisions:
            if isinstance(decision, Load):
                self._estimates.decided(decision, self.controller.workers[decision.worker].name, event.at)
            try:
                self.enact(decision)
            except Exception:
                # The others were decided too, and the controller counts on all of them.
                logger.exception("cannot enact %r", decision)
        self._departures.settle(self.controller.instances)
        self._progress.settle()
        self.drains.settle()
        self._learn()
        self._tell_soon()

    def enact(self, decision: Decision) -> None:
        """Answer the operator who waits for it here; all else is for the cluster."""
        if isinstance(decision, Dispatch) and decision.instance not in self._told_reading:
            instance = self.controller.instances.get(decision.instance)
            if self._progress.of(instance) is not None:
                self._tell()  # how far the instance is, before a token can come from there
        if isinstance(decision, Move):
            self.effects.start(self._move(decision))
        elif not self._wishes.answer(decision):
            self.effects.enact(decision)

    # --- Dask's hooks ---

    async def start(self, scheduler: Scheduler) -> None:
        self.effects.start(self._look_for_missing())
        for address in scheduler.workers:
            self.add_worker(scheduler, address)

    async def before_close(self) -> None:
        if self._reconciler:
            self._reconciler.cancel()
        if self._telling:
            self._telling.cancel()
        await self.effects.close()
        for outbox in list(self._doors.values()):
            await outbox.close()
        self.moves_seen.close()
        self._recorder.close()
        await self._names.close()
        if self._store is not None:
            await self._store.close()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        state = scheduler.workers[worker]
        facts = state.extra.get("sllm")
        if not facts:
            logger.warning("worker %s has no sllmdask preload: no model will be placed on it", worker)
            return
        if facts["protocol"] != PROTOCOL:
            logger.warning("worker %s speaks protocol %s, not %s: upgrade it", worker, facts["protocol"], PROTOCOL)
            return
        name = str(state.name)
        rates = self._estimates.rates(name, facts)
        view = WorkerView(
            address=worker,
            name=name,
            slots=facts["slots"],
            host_capacity=self._estimates.host_capacity(name, facts, self.controller.workers.values()),
            node=facts["node"],
            residency=_residency(facts),
            bytes_per_s=rates.bytes_per_s,
            overhead_s=rates.overhead_s,
        )
        self._reconciler = self._reconciler or asyncio.create_task(self._reconcile())
        self.effects.prepare()
        self._accounts[worker] = facts
        held = self._adoption.adopt(worker, facts)
        self.on(ev.WorkerJoined(time.monotonic(), view, held))
        for instance in held:
            progress = facts["facts"][instance.id]["progress"]
            if progress is not None:
                self._progress.reported(progress)
            elif instance.state is InstanceState.READY:
                self._progress.is_read(instance.id)
        self.observer.saw_account(facts)
        self._names.joined(name)
        self.deployments.joined.set()
        self.effects.start(self._greet(worker, name))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002
        self._accounts.pop(worker, None)
        self.effects.worker_left(worker)
        self.moving.worker_left(worker)
        self.moves_seen.worker_left(worker)
        self._adoption.worker_left(worker)
        if worker in self.controller.workers:
            self._names.left(self.controller.workers[worker].name)
            self.on(ev.WorkerLeft(time.monotonic(), worker))

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[Any]) -> list[Any]:  # noqa: ARG002
        """Adaptive clusters may only retire workers that hold no instance."""
        busy = {instance.worker for instance in self.controller.instances.values()}
        return [worker for worker in workers if worker.address not in busy]

    # --- workers ---

    def worker_report(self, worker: str, message: dict[str, Any]) -> None:
        """A change on a worker, as it happened."""
        try:
            match message:
                case {"kind": "account", "account": account}:
                    self._fold_account(worker, account)
                case {"kind": "progress", "instance": _, "done": _, "total": _, "tier": _, "bytes_per_s": _}:
                    self._progress.reported(message)
                case {"kind": "loaded", "instance": instance, "load": times}:
                    self._estimates.told(instance, times, time.monotonic())
                    self.observer.log.read(instance, times, time.monotonic())
                    self._progress.is_read(instance)
                    self._learn()
                case {"kind": "moving", "move": move}:
                    self.moves_seen.began(worker, move)
                case {"kind": "moved", "move": move}:
                    self.moves_seen.ended(worker, move)
                case {"kind": "lost", "instance": instance, "reason": reason}:
                    self._progress.failed(instance, reason)
                    self.effects.instance_lost(instance)
                    self.on(ev.InstanceLost(time.monotonic(), instance, reason))
                case {"kind": "failed", "instance": instance, "reason": reason}:
                    self._progress.failed(instance, reason)
                    self.effects.instance_lost(instance)
                    self.on(ev.LoadFailed(time.monotonic(), instance, reason))
                case _:
                    logger.warning("unknown report from %s: %r", worker, message)
        except Exception:
            # A raising stream handler would make Dask drop the worker.
            logger.exception("bad report from %s: %r", worker, message)

    def _fold_account(self, address: str, account: dict[str, Any]) -> None:
        old = self._accounts.get(address)
        if old is None or account["version"] < old["version"] or address not in self.controller.workers:
            return
        self._accounts[address] = account
        self.observer.saw_account(account)
        self._adoption.look_for_orphans(address, account)
        for instance, stats in account["instances"].items():
            if "read_s" in stats.get("load", {}) or stats.get("n_output_tokens"):
                self._progress.is_read(instance)
        now = time.monotonic()
        self._failed_at = {instance: at for instance, at in self._failed_at.items() if now < at + FAILED_S}
        # What has just failed its worker has ended itself.
        known = self.controller.instances.keys() | self._strays | self._failed_at.keys()
        for instance in account["instances"].keys() - known:
            # It was called off while nobody could be told, or its unloading went unanswered.
            self._strays.add(instance)
            self.effects.start(self._unload_stray(address, instance))
        here = [instance for instance in self.controller.instances.values() if instance.worker == address]
        missing = any(instance.state is InstanceState.READY and instance.id not in account["instances"] for instance in here)
        if account["version"] > old["version"] or missing:
            self._report(address, frozenset(account["instances"]))

    def _report(self, address: str, instances: frozenset[str] | None = None) -> None:
        """Tell the controller what is believed of a worker now. Its reports are numbered here: we know more than the worker."""
        view, account = self.controller.workers[address], self._accounts[address]
        rates = self._estimates.rates(view.name, account)
        capacity = self._estimates.host_capacity(view.name, account, self.controller.workers.values())
        residency = _residency(account)
        self.on(
            ev.WorkerReported(
                time.monotonic(),
                address,
                view.version + 1,
                residency,
                rates.bytes_per_s,
                rates.overhead_s,
                capacity,
                instances=instances,
            )
        )

    def _learn(self) -> None:
        """Of loads that have come to an end."""
        learned = self._estimates.settle(self.controller.instances)
        for address in [view.address for view in self.controller.workers.values() if view.name in learned]:
            self._report(address)

    async def _unload_stray(self, worker: str, instance: str) -> None:
        logger.warning("unload instance=%s worker=%s cause=nobody asked for it", instance, worker)
        try:
            await self.effects.ask(worker, "sllm_unload", UNLOAD_LIMIT_S, instance=instance)
        finally:
            self._strays.discard(instance)

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(RECONCILE_S)
            for outbox in self._doors.values():
                outbox.put(["count"])
            for address, state in list(self.scheduler.workers.items()):
                account = state.metrics.get("sllm")
                if account:
                    self.worker_report(address, {"kind": "account", "account": account})

    async def _greet(self, worker: str, name: str) -> None:
        """Tell a worker what it shows to the others, so that they supply each other with checkpoints; then what it is to have."""
        await self.effects.ask(worker, "sllm_welcome", token=self._token, disk_size=self._estimates.disk_size(name))
        await self.deployments.worker_joined(worker)

    async def _look_for_missing(self) -> None:
        await asyncio.sleep(self.settings.scheduler.worker_wait)
        for warning in self._estimates.missing(self.controller.workers.values()):
            logger.warning("%s", warning)

    def peers(self, source: str, worker: str) -> list[str]:
        """Where `worker` may have the files of `source` from: the other nodes that hold them, those in memory first."""
        node = self._accounts.get(worker, {}).get("node")
        found = []
        for view in self.controller.workers.values():
            account = self._accounts.get(view.address, {})
            tier = view.residency.get(source)
            if view.address != worker and tier in (Tier.HOST, Tier.DISK) and account.get("data") and account["node"] != node:
                found.append((tier is Tier.DISK, view.name, account["data"]))
        return [address for *_, address in sorted(found)]

    # --- front doors ---

    async def front_door(self, comm: Comm, front_door: str) -> Status:
        """A front door's connection; when it ends, so do its requests."""
        old = self._doors.pop(front_door, None)
        if old is not None:  # it was quicker to connect again than we were to notice that it had gone
            self.on(ev.FrontDoorLeft(time.monotonic(), front_door))
            await old.close()
        self._tell()
        outbox = self._doors[front_door] = Outbox(comm)
        logger.info("front door joined front_door=%s", front_door)
        outbox.put(["mirror", list(self._rows.values()), self._n_workers_told])
        outbox.put(["reading", self._told_reading])
        try:
            async for message in messages(comm):
                self._receive(front_door, message)
        finally:
            if self._doors.get(front_door) is outbox:
                del self._doors[front_door]
                logger.info("front door left front_door=%s", front_door)
                self.on(ev.FrontDoorLeft(time.monotonic(), front_door))
            await outbox.close()
        return Status.dont_reply

    def _receive(self, front_door: str, message: Message) -> None:
        now = time.monotonic()
        match message:
            case ["request" | "returned" as what, request_id, model, priority, deadline_s, told]:
                self.observer.log.told(request_id, told)
                near = told.get("near", "")
                deadline_s = self.settings.scheduler.request_deadline if deadline_s is None else deadline_s
                if what == "returned" and (running := self.controller.running.get(request_id)) is not None:
                    lost = told["lost"]
                    if lost not in (None, running.instance):  # what it has left has done nothing wrong
                        self.on(ev.RequestMoved(now, request_id, lost))
                    self.moves_seen.no_more(request_id)
                    self.on(ev.RequestReturned(now, request_id, now + deadline_s, near))
                    return
                # One that was returned but is not known was dispatched by a scheduler before this one. One that has waited under
                # that one takes its old place, and may wait no longer than before.
                request = RequestView(
                    request_id,
                    model,
                    front_door,
                    now - told.get("seconds", 0.0),
                    now - told.get("waited_s", 0.0) + deadline_s,
                    priority,
                    n_tokens=told["n_prompt_tokens"],
                    max_new_tokens=told["max_new_tokens"],
                    near=near,
                )
                self.on(ev.RequestArrived(now, request))
            case ["running", request_id, model, priority, instance, told]:
                self.observer.log.told(request_id, told)
                request = RequestView(
                    request_id,
                    model,
                    front_door,
                    now - told["seconds"],
                    inf,
                    priority,
                    instance,
                    n_tokens=told["n_prompt_tokens"],
                    dispatched_at=now - told["running_s"],
                    max_new_tokens=told["max_new_tokens"],
                    n_output=told["n_tokens"],
                    counted_at=now,
                )
                self.on(ev.RequestClaimed(now, request))
            case ["ended", request_id, told]:
                self.moves_seen.no_more(request_id, told["moves"])
                self.observer.log.told(request_id, told)
                self.on(ev.RequestEnded(now, request_id, told["n_tokens"]))
            case ["paused", request_id, epoch, pause_ms]:
                self.moves_seen.paused(request_id, epoch, pause_ms)
            case ["resumed", request_id, resume]:
                self.observer.log.resumed(request_id, resume, now)
            case ["counted", counts]:
                known = self.controller.running
                grown = {key: n for key, n in counts.items() if key in known and n > known[key].n_output}
                if grown:
                    self.on(ev.TokensCounted(now, grown))
            case ["at", request_id, instance]:
                self.on(ev.RequestMoved(now, request_id, instance))
            case ["read", instance]:
                self._progress.is_read(instance)
            case ["rows", number, rows]:
                self.observer.answered(front_door, number, rows)
            case _:
                logger.warning("unknown message from front door %s: %r", front_door, message[:1])

    def _tell_soon(self) -> None:
        """Front doors mirror the models; changes of one moment go out together."""
        if self._telling is None and self._doors:
            self._telling = asyncio.get_running_loop().call_later(GATHER_S, self._tell)

    def _tell(self) -> None:
        """Send the front doors what changed since they were told last."""
        if self._telling:
            self._telling.cancel()
            self._telling = None
        self._progress.forget_gone()
        rows = self._made_rows.models()
        changed = [row for name, row in rows.items() if row != self._rows.get(name)]
        gone = [name for name in self._rows if name not in rows]
        n_workers = sum(not worker.draining for worker in self.controller.workers.values())
        if changed or gone or n_workers != self._n_workers_told:
            for outbox in self._doors.values():
                outbox.put(["models", changed, gone, n_workers])
        self._rows, self._n_workers_told = rows, n_workers
        reading = self._progress.reading()
        if reading != self._told_reading:
            for outbox in self._doors.values():
                outbox.put(["reading", reading])
        self._told_reading = reading

    # --- handlers that answer ---

    @answer
    async def register(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """Deploy a model; the answer has its row."""
        reply = await self.deployments.register(deployment)
        self._tell()
        return reply | {"row": self._rows[reply["model"]]}

    @answer
    async def update(self, model: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change a deployment; the answer has its row."""
        reply = await self.deployments.update(model, changes)
        self._tell()
        return reply | {"row": self._rows[model]}

    @answer
    async def pin(self, model: str, node: str | None, pinned: bool) -> dict[str, Any]:
        """Keep a host copy, or not; the answer has the model's row."""
        reply = await self._operations.pin(model, node, pinned)
        self._tell()
        return reply | {"row": self._rows[model]}

    @answer
    async def delete(self, model: str, adapters: list[str] | None = None, force: bool = False) -> dict[str, Any]:
        """Delete a model, or some of its adapters; then the answer has its row."""
        reply = await self.deployments.delete(model, adapters, force)
        self._tell()
        return reply if adapters is None else reply | {"row": self._rows[model]}

    # --- moves ---

    @answer
    async def migrate(
        self, requests: dict[str, str] | None, instance: str | None, to: str, kind: str | None, wait: bool
    ) -> dict[str, Any]:
        """Move running requests, of which the ids are told by their keys, or an instance with all that it has, to node `to`."""
        where = self._operations.node(to, "to")
        assert where is not None
        logger.info("migrate asked for requests=%s instance=%s to=%s kind=%s", [*(requests or ())], instance, to, kind)
        if instance is not None:
            return await self.moving.instance(instance, where, kind, wait)
        return await self.moving.requests(requests or {}, where, kind, wait)

    async def _move(self, move: Move) -> None:
        logger.info("move request=%s instance=%s to=%s cause=%s", move.request, move.instance, move.successor, move.cause)
        await self.moving.decided(move)

    def _worker_named(self, name: str) -> WorkerView:
        worker = self._operations.node(name)
        assert worker is not None
        return worker

    def deployment(self, model: str) -> Deployment:
        return self.deployments.find(model).deployment

    def move_address(self, worker: str) -> str | None:
        """``host:port`` where a worker takes requests."""
        address: str | None = self._accounts.get(worker, {}).get("moves")
        return address

    async def ask(self, worker: str, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        return await self.deployments.ask(worker, op, timeout_s, **arguments)

    def ready_there(self, model: str, where: WorkerView, replaces: str) -> AbstractAsyncContextManager[str]:
        return self._operations.ready_there(model, where, replaces)

    def awaiting(self, request: str, source: InstanceView, to: str, cause: str) -> AbstractContextManager[None]:
        return self.moves_seen.awaiting(request, source, to, cause)

    async def until_read(self, instance: str) -> None:
        await self._progress.until_read(instance)

    async def until_gone(self, instance: str) -> None:
        await self._operations.until_gone(instance)

    def in_background(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.effects.start(coroutine)

    @answer
    async def cluster(self) -> dict[str, Any]:
        """Workers with their slots, tiers and models, and what an operator should look at."""
        warnings = self._estimates.missing(self.controller.workers.values())
        return {"workers": self._made_rows.workers(), "moves": self.moves_seen.rows(), "warnings": warnings}


def _residency(account: dict[str, Any]) -> dict[str, Tier]:
    return {key: Tier(tier) for key, tier in account["residency"].items()}


def _given_port(scheduler: Scheduler) -> int | None:
    """The port that the scheduler was told to have; ``None``: any."""
    start: str = scheduler._start_address[0]  # its address does not tell whether the port was given
    if not start.startswith(("tcp://", "tls://")):
        return None
    _, port = parse_host_port(start, 0)
    return int(port) or None


def _unique_generation(scheduler: Scheduler) -> int:
    """Of a scheduler that keeps nothing: workers may come back to one that was started at a given port, and to no other."""
    return 1 if _given_port(scheduler) is None else int(time.time())


def open_store(scheduler: Scheduler, state: str) -> StateStore | None:
    """The store that ``scheduler.state`` names, if any; raises :class:`ConfigError`."""
    port = _given_port(scheduler)
    if not state or (state == "auto" and port is None):
        return None
    return StateStore.open(default_path(port or 0) if state == "auto" else Path(state).expanduser())


@click.command()
@click.option("--hardware-config", help="file with the hardware of nodes (scheduler.hardware_config)")
@click.option("--state", help="file that deployments are kept in, or auto (scheduler.state)")
@click.option("--enable-migration/--no-migration", default=None, help="whether running instances make room (scheduler.migrate)")
async def dask_setup(scheduler: Scheduler, hardware_config: str | None, state: str | None, enable_migration: bool | None) -> None:
    """Called by Dask for ``--preload sllmdask.cluster.scheduler_plugin``; the options are given after it."""
    log_as_dask_does()
    try:
        flags = {"scheduler": {"hardware_config": hardware_config, "state": state, "migrate": enable_migration}}
        settings = read_settings(flags)
        # Nothing is awaited before the handlers are there: workers may be about to register.
        plugin = SllmSchedulerPlugin(scheduler, settings, open_store(scheduler, settings.scheduler.state))
    except ConfigError as error:
        # Dask would log the failed preload and run a scheduler that knows no model.
        logger.error("%s", error.message)
        raise SystemExit(2) from None
    await plugin.effects.open()
    scheduler.add_plugin(plugin, name=SllmSchedulerPlugin.name)
