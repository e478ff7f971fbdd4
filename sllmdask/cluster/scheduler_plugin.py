"""What makes a Dask scheduler the head of sllmdask: ``dask scheduler --preload sllmdask.cluster.scheduler_plugin``.

Every hook of Dask ends in one event for the controller, every decision in one effect. The only place that decides anything is
``policy/``; this is its mechanism.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from distributed import Scheduler
from distributed.comm import Comm
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from sllmdask.actors.streams import Message, Outbox, messages
from sllmdask.cluster.dask_settings import log_as_dask_does, read_settings
from sllmdask.cluster.effects import UNLOAD_LIMIT_S, Effects
from sllmdask.cluster.worker_plugin import PROTOCOL
from sllmdask.config import Deployment, Settings, parse
from sllmdask.errors import (
    AdapterNotFound,
    CheckpointNotFound,
    ConfigError,
    EngineError,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    NoWorker,
    SllmError,
    WorkerLost,
    from_wire,
)
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Decision, Dispatch, Refuse, ReportLoaded
from sllmdask.policy.views import InstanceState, InstanceView, ModelView, RequestView, Tier, WorkerView

logger = logging.getLogger(__name__)

#: Events kept for replay and for `explain`.
N_EVENTS = 10_000
#: Seconds between two comparisons of the heartbeats' account with ours: a report that was lost is found here.
RECONCILE_S = 2.0
#: Seconds for which an account may still list an instance that has failed: that of a heartbeat is not the newest one.
FAILED_S = 10.0
#: Seconds that a worker may take for a short answer, and for one before which it may have to fetch a checkpoint.
ASK_S, FETCH_S = 30.0, 7200.0
#: Seconds that changes of models are gathered before the front doors hear of them.
GATHER_S = 0.02


@dataclass(frozen=True)
class Deployed:
    """A deployment and what its checkpoint turned out to be."""

    deployment: Deployment
    created: int
    revision: int
    nbytes: int
    max_model_len: int
    architecture: str
    #: ``None``: it generates text. Otherwise an ``EmbeddingInfo`` as plain types.
    embedding: dict[str, Any] | None = None


def answer(method: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Around a handler: our errors travel as plain data, since Dask would pickle them."""

    @functools.wraps(method)
    async def call(self: SllmSchedulerPlugin, **kwargs: Any) -> dict[str, Any]:
        try:
            return await method(self, **kwargs)
        except SllmError as error:
            return error.as_wire()
        except Exception as error:
            logger.exception("handler %s failed", method.__name__)
            return EngineError(f"{method.__name__} failed: {error!r}").as_wire()

    return call


class SllmSchedulerPlugin(SchedulerPlugin):
    """Hooks to events, decisions to effects, and the front doors' connection."""

    name = "sllmdask"

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings = scheduler, settings
        self.controller = Controller(
            ControllerSettings(
                worker_wait_s=settings.scheduler.worker_wait,
                max_queue=settings.scheduler.max_queue,
                min_residency_s=settings.scheduler.min_residency,
                patience_s=settings.scheduler.patience,
                max_requests=settings.engine.max_running,
            )
        )
        self.events: deque[ev.Event] = deque(maxlen=N_EVENTS)
        self.deployed: dict[str, Deployed] = {}
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
        #: The last report of each load, by instance: one that takes requests may still be read.
        self._progress: dict[str, dict[str, Any]] = {}
        #: What the front doors were told last of how far those are.
        self._told_reading: dict[str, dict[str, Any]] = {}
        self._telling: asyncio.TimerHandle | None = None
        #: What operators wait for: loads by wish, and instances that are to leave.
        self._wishes: dict[str, asyncio.Future[ReportLoaded]] = {}
        self._wish_numbers = itertools.count(1)
        self._departures: dict[asyncio.Future[None], set[str]] = {}
        #: Those who wait for the last byte of an instance, by instance.
        self._readings: dict[str, asyncio.Future[None]] = {}
        self._worker_joined = asyncio.Event()
        self._reconciler: asyncio.Task[None] | None = None
        # Front doors keep tokenizers by revision, and may have known the scheduler that was here before.
        self._revisions = itertools.count(int(1e3 * time.time()))
        #: What workers prove to each other that they know.
        self._token = secrets.token_hex(16)
        self.effects = Effects(scheduler, self.on, self._doors, lambda model: self.deployed[model].deployment, self.peers)
        scheduler.handlers["sllm-front-door"] = self.front_door
        scheduler.handlers["sllm_register"] = self.register
        scheduler.handlers["sllm_delete"] = self.delete
        scheduler.handlers["sllm_files"] = self.files
        scheduler.handlers["sllm_cluster"] = self.cluster
        scheduler.handlers["sllm_load"] = self.load
        scheduler.handlers["sllm_unload"] = self.unload
        scheduler.handlers["sllm_pull"] = self.pull
        scheduler.stream_handlers["sllm-report"] = self.worker_report

    def on(self, event: ev.Event) -> None:
        """The one way into the controller."""
        self.events.append(event)
        if isinstance(event, ev.LoadFailed | ev.InstanceLost):
            self._failed_at[event.instance] = event.at
        if isinstance(event, ev.LoadFinished):
            self._takes_requests(event)
        try:
            decisions = self.controller.handle(event)
        except Exception:
            # Dask swallows what a hook raises; without the event nobody could find out why.
            logger.exception("the controller failed on %r", event)
            raise
        for decision in decisions:
            try:
                self.enact(decision)
            except Exception:
                # The others were decided too, and the controller counts on all of them.
                logger.exception("cannot enact %r", decision)
        for gone, instances in list(self._departures.items()):
            if self.controller.instances.keys().isdisjoint(instances):
                del self._departures[gone]
                if not gone.done():
                    gone.set_result(None)
        self._end_readings()
        self._tell_soon()

    def enact(self, decision: Decision) -> None:
        """Answer the operator who waits for it here; all else is for the cluster."""
        wish = self._wishes.pop(decision.request, None) if isinstance(decision, ReportLoaded | Refuse) else None
        if isinstance(decision, Dispatch) and decision.instance not in self._told_reading:
            instance = self.controller.instances.get(decision.instance)
            if self._progress_of(instance) is not None:
                self._tell()  # how far the instance is, before a token can come from there
        if wish is None:
            self.effects.enact(decision)
        elif isinstance(decision, Refuse):
            logger.info("refuse load=%s cause=%s why=%s", decision.request, decision.error.message, dict(decision.why))
            if not wish.done():
                wish.set_exception(decision.error)
        elif isinstance(decision, ReportLoaded):
            logger.info("loaded load=%s instance=%s waited_s=%.3f", decision.request, decision.instance, decision.waited_s)
            if not wish.done():
                wish.set_result(decision)

    # --- Dask's hooks ---

    async def start(self, scheduler: Scheduler) -> None:
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

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        state = scheduler.workers[worker]
        facts = state.extra.get("sllm")
        if not facts:
            logger.warning("worker %s has no sllmdask preload: no model will be placed on it", worker)
            return
        if facts["protocol"] != PROTOCOL:
            logger.warning("worker %s speaks protocol %s, not %s: upgrade it", worker, facts["protocol"], PROTOCOL)
            return
        residency, bytes_per_s, overhead_s = _account(facts)
        view = WorkerView(
            address=worker,
            name=str(state.name),
            slots=facts["slots"],
            host_capacity=facts["tiers"]["host"]["capacity"],
            node=facts["node"],
            residency=residency,
            bytes_per_s=bytes_per_s,
            overhead_s=overhead_s,
            version=facts["version"],
        )
        self._reconciler = self._reconciler or asyncio.create_task(self._reconcile())
        self._worker_joined.set()
        self.on(ev.WorkerJoined(time.monotonic(), view))
        self.effects.start(self._welcome(worker))
        # It tells by its next account which of them are on its own disk.
        for source in {deployed.deployment.source for deployed in self.deployed.values()}:
            self.effects.start(self._look_for(worker, source))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:  # noqa: ARG002
        self._accounts.pop(worker, None)
        self.effects.worker_left(worker)
        if worker in self.controller.workers:
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
                case {"kind": "progress", "instance": instance, "done": _, "total": _, "tier": _, "bytes_per_s": _}:
                    if not _is_read(self._progress.get(instance)):
                        self._progress[instance] = message
                        self._end_readings()
                        self._tell_soon()
                case {"kind": "lost", "instance": instance, "reason": reason}:
                    self._reading_failed(instance, reason)
                    self.effects.instance_lost(instance)
                    self.on(ev.InstanceLost(time.monotonic(), instance, reason))
                case {"kind": "failed", "instance": instance, "reason": reason}:
                    self._reading_failed(instance, reason)
                    self.effects.instance_lost(instance)
                    self.on(ev.LoadFailed(time.monotonic(), instance, reason))
                case _:
                    logger.warning("unknown report from %s: %r", worker, message)
        except Exception:
            # A raising stream handler would make Dask drop the worker.
            logger.exception("bad report from %s: %r", worker, message)

    def _fold_account(self, address: str, account: dict[str, Any]) -> None:
        view = self.controller.workers.get(address)
        if view is None or account["version"] < view.version:
            return
        self._accounts[address] = account
        for instance, stats in account["instances"].items():
            if "read_s" in stats.get("load", {}) or stats.get("n_output_tokens"):
                self._read(instance)
        now = time.monotonic()
        self._failed_at = {instance: at for instance, at in self._failed_at.items() if now < at + FAILED_S}
        # What has just failed its worker has ended itself.
        known = self.controller.instances.keys() | self._strays | self._failed_at.keys()
        for instance in account["instances"].keys() - known:
            # It was called off while nobody could be told, or its unloading went unanswered.
            self._strays.add(instance)
            self.effects.start(self._unload_stray(address, instance))
        if account["version"] > view.version:
            capacity = account["tiers"]["host"]["capacity"]
            self.on(ev.WorkerReported(time.monotonic(), address, account["version"], *_account(account), capacity))

    def _takes_requests(self, event: ev.LoadFinished) -> None:
        """Until a report or an account says more, an instance that was not in memory is one of which nothing is there yet."""
        instance = self.controller.instances.get(event.instance)
        if instance is not None and event.loaded_from in (Tier.DISK, Tier.PEER, Tier.REMOTE):
            told = {"done": 0, "total": instance.nbytes, "tier": str(event.loaded_from), "bytes_per_s": 0.0}
            self._progress.setdefault(instance.id, told)

    def _read(self, instance: str) -> None:
        """All bytes of an instance are there: its last report may have been lost, or be late."""
        told = self._progress.get(instance, {"total": 0, "tier": None, "bytes_per_s": 0.0})
        if instance in self.controller.instances and not _is_read(told):
            self._progress[instance] = {**told, "done": told["total"]}
            self._end_readings()
            self._tell_soon()

    async def _until_read(self, instance: str) -> None:
        """Until the last byte of an instance is there, or it is gone; raises :class:`LoadFailed`."""
        view = self.controller.instances.get(instance)
        if self._progress_of(view) is not None:
            read = self._readings.setdefault(instance, asyncio.get_running_loop().create_future())
            await asyncio.shield(read)

    def _end_readings(self) -> None:
        for instance, read in list(self._readings.items()):
            if self._progress_of(self.controller.instances.get(instance)) is None:
                del self._readings[instance]
                read.set_result(None)

    def _reading_failed(self, instance: str, reason: str) -> None:
        view, read = self.controller.instances.get(instance), self._readings.pop(instance, None)
        if read is not None:
            read.set_exception(LoadFailed(view.model if view is not None else instance, reason))
            read.exception()  # whoever waited may have gone

    async def _unload_stray(self, worker: str, instance: str) -> None:
        logger.warning("unload instance=%s worker=%s cause=nobody asked for it", instance, worker)
        try:
            await self._ask(worker, "sllm_unload", UNLOAD_LIMIT_S, instance=instance)
        finally:
            self._strays.discard(instance)

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(RECONCILE_S)
            for address, state in list(self.scheduler.workers.items()):
                account = state.metrics.get("sllm")
                if account:
                    self.worker_report(address, {"kind": "account", "account": account})

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
            case ["request" | "returned" as what, request_id, model, priority, deadline_s]:
                if what == "returned" and request_id in self.controller.running:
                    self.on(ev.RequestReturned(now, request_id))
                    return
                # One that was returned but is not known was dispatched by a scheduler before this one.
                deadline_s = self.settings.scheduler.request_deadline if deadline_s is None else deadline_s
                request = RequestView(request_id, model, front_door, now, now + deadline_s, priority)
                self.on(ev.RequestArrived(now, request))
            case ["ended", request_id]:
                self.on(ev.RequestEnded(now, request_id))
            case ["read", instance]:
                self._read(instance)
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
        rows = self._current_rows()
        changed = [row for name, row in rows.items() if row != self._rows.get(name)]
        gone = [name for name in self._rows if name not in rows]
        n_workers = len(self.controller.workers)
        if changed or gone or n_workers != self._n_workers_told:
            for outbox in self._doors.values():
                outbox.put(["models", changed, gone, n_workers])
        self._rows, self._n_workers_told = rows, n_workers
        reading = {
            instance.id: told
            for instance in self.controller.instances.values()
            if instance.state is InstanceState.READY and (told := self._progress_of(instance))
        }
        if reading != self._told_reading:
            for outbox in self._doors.values():
                outbox.put(["reading", reading])
        self._told_reading = reading

    def _current_rows(self) -> dict[str, dict[str, Any]]:
        self._progress = {key: done for key, done in self._progress.items() if key in self.controller.instances}
        return {name: self._row(name, deployed) for name, deployed in self.deployed.items()}

    def _row(self, name: str, deployed: Deployed) -> dict[str, Any]:
        """One model as front doors and users see it."""
        instances = self.controller.instances_of(name)
        loading = [instance for instance in instances if instance.state in (InstanceState.LOADING, InstanceState.PLANNED)]
        dispatchable = [instance for instance in instances if instance.state is InstanceState.READY]
        ready = [instance for instance in dispatchable if self._progress_of(instance) is None]
        # Requests are dispatched to an instance whose last bytes are on their way, but nobody is answered yet.
        loading = [instance for instance in dispatchable if instance not in ready] + loading
        progress = next((told for instance in loading if (told := self._progress_of(instance))), {})
        done, total = progress.get("done", 0), progress.get("total", deployed.nbytes)
        reason = self.controller.last_failure(name)
        if ready:
            state = "ready"
        elif loading:
            state = "loading"
        elif reason:
            state = "failed"
        else:
            tiers = {worker.residency.get(deployed.deployment.source) for worker in self.controller.workers.values()}
            state = next((str(tier) for tier in (Tier.HOST, Tier.DISK) if tier in tiers), "absent")
        return {
            "model": name,
            "state": state,
            "created": deployed.created,
            "revision": deployed.revision,
            "max_model_len": deployed.max_model_len,
            "nbytes": deployed.nbytes,
            "instances": len(ready),
            "reason": reason,
            "keep_alive": self._keep_alive(deployed.deployment),
            "progress": done / total if loading and total else None,
            "done": done if loading else None,
            "tier": progress.get("tier"),
            "bytes_per_s": progress.get("bytes_per_s"),
            "source": deployed.deployment.source,
            "task": "embed" if deployed.embedding else "generate",
            "embedding": deployed.embedding,
            "adapters": deployed.deployment.backend_config.lora_adapters or {},
        }

    # --- handlers that answer ---

    @answer
    async def register(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """Deploy a model, or deploy it anew with other settings."""
        asked = parse(Deployment, deployment, "the deployment")
        facts = await self._inspect(asked)
        old = self.deployed.get(asked.model)
        same = old is not None and old.deployment.source == asked.source
        max_model_len = min(asked.backend_config.max_model_len or facts["max_model_len"], facts["max_model_len"])
        # What it is for is known from now on, also to who loads it.
        backend = asked.backend_config.model_copy(update={"task": "embed" if facts.get("embedding") else "generate"})
        asked = asked.model_copy(update={"backend_config": backend})
        scaling = asked.auto_scaling_config
        view = ModelView(
            name=asked.model,
            nbytes=facts["nbytes"],
            checkpoint=asked.source,
            n_slots=asked.num_gpus,
            target=scaling.target,
            min_instances=scaling.min_instances,
            max_instances=scaling.max_instances,
            keep_alive_s=self._keep_alive(asked),
            variant=asked.variant,
            nodes=asked.placement_config.nodes,
        )
        misfit = self.controller.feasible(view)
        if misfit is not None:
            raise misfit
        await self._inspect_adapters(asked)
        if old is not None and not same:
            self._forget(asked.model, replaced=True)
        self.deployed[asked.model] = Deployed(
            deployment=asked,
            created=old.created if old and same else int(time.time()),
            revision=old.revision if old and same else next(self._revisions),
            nbytes=facts["nbytes"],
            max_model_len=max_model_len,
            architecture=facts["architecture"],
            embedding=facts.get("embedding"),
        )
        logger.info("deployed model=%s source=%s nbytes=%d", asked.model, asked.source, facts["nbytes"])
        self.on(ev.ModelDeployed(time.monotonic(), view))
        self._tell()
        warnings = asked.warnings() + self._preload(asked)
        return {"model": asked.model, "warnings": warnings, "row": self._rows[asked.model]}

    @answer
    async def delete(self, model: str, adapters: list[str] | None = None) -> dict[str, Any]:
        """Forget a model: who waits is refused, who runs may finish, then its memory is freed unless another model shares it.

        Or forget some of its `adapters`: no request gets them any more, and instances let go of them when others are needed.
        """
        deployed = self._deployed(model)
        if adapters is not None:
            backend = deployed.deployment.backend_config
            left = dict(backend.lora_adapters or {})
            for name in adapters:
                if left.pop(name, None) is None:
                    raise AdapterNotFound(model, name, difflib.get_close_matches(name, left, n=3))
            changed = {"backend_config": backend.model_copy(update={"lora_adapters": left})}
            self.deployed[model] = replace(deployed, deployment=deployed.deployment.model_copy(update=changed))
            logger.info("deleted adapters=%s model=%s", ",".join(adapters), model)
            self._tell()
            return {"model": model, "row": self._rows[model]}
        self._forget(model)
        self._tell()
        return {"model": model}

    @answer
    async def files(self, model: str) -> dict[str, Any]:
        """The small files of a model's checkpoint, from a worker that has them."""
        deployment = self._deployed(model).deployment
        error: SllmError = NoWorker(model, "no worker is connected that could supply its tokenizer")
        for worker in self._allowed(deployment):
            reply = await self._ask(worker.address, "sllm_files", source=deployment.source)
            if "error" not in reply:
                return {"files": reply["files"]}
            error = from_wire(reply)
        raise error

    @answer
    async def load(self, model: str, node: str | None, tier: str, wait: bool) -> dict[str, Any]:
        """Make an instance of a model ready, or bring its checkpoint to host memory; on `node`, or where it is best placed."""
        deployed = self._deployed(model)
        where = self._node(node)
        view = self.controller.models[model]
        if where is not None and view.nodes and where.name not in view.nodes:
            raise InvalidRequest(f"{model!r} may only run on its nodes {', '.join(view.nodes)} (target_nodes).", "node")
        if where is not None:
            view = replace(view, nodes=(where.name,))
        misfit = self.controller.feasible(view)
        if misfit is not None:
            raise misfit
        said = dict.fromkeys(("model", "tier", "state", "node", "instance", "cold_start", "seconds", "progress"))
        said |= {"model": model, "tier": tier, "keep_alive": self._keep_alive(deployed.deployment)}
        if tier == Tier.HOST:
            return said | await self._load_to_host(deployed, view, wait)
        now = time.monotonic()
        wish = RequestView(
            f"load-{next(self._wish_numbers)}", model, "", now, now + FETCH_S, load_only=True, node=where.name if where else ""
        )
        logger.info("load asked for model=%s node=%s load=%s", model, node, wish.id)
        report = self._wishes[wish.id] = asyncio.get_running_loop().create_future()
        self.on(ev.LoadRequested(now, wish))
        if not wait and not report.done():
            report.add_done_callback(lambda done: done.cancelled() or done.exception())
            return said | {"state": "loading", "node": node}
        loaded = await report
        if wait:
            await self._until_read(loaded.instance)
        progress = self._progress_of(self.controller.instances.get(loaded.instance))
        return said | {
            "state": "loading" if progress else "ready",
            "node": loaded.node,
            "instance": loaded.instance,
            "cold_start": str(loaded.loaded_from or "hit"),
            "seconds": time.monotonic() - now,
            "progress": progress,
        }

    async def _load_to_host(self, deployed: Deployed, view: ModelView, wait: bool) -> dict[str, Any]:
        source = deployed.deployment.source
        allowed = [worker for worker in self.controller.workers.values() if not view.nodes or worker.name in view.nodes]
        holding = [worker for worker in allowed if worker.residency.get(source) is Tier.HOST]
        worker = min(holding, key=lambda worker: worker.name, default=None) or self.controller.best_worker(view, time.monotonic())
        if worker is None:
            raise NoWorker(view.name, "no worker is connected")
        tier_from = worker.residency.get(source, Tier.REMOTE)
        began_at = time.monotonic()
        if not wait:
            self.effects.start(self._preload_on(worker.address, deployed.deployment))
            return {"state": "loading", "node": worker.name}
        peers = self.peers(source, worker.address)
        reply = await self._ask(worker.address, "sllm_preload", FETCH_S, source=source, peers=peers)
        if "error" in reply:
            raise from_wire(reply)
        loaded_from = reply.get("loaded_from") or str(tier_from)
        # The worker knows sooner than we that it was there.
        cold_start = "hit" if Tier.HOST in (tier_from, loaded_from) else loaded_from
        return {"state": "host", "node": worker.name, "cold_start": cold_start, "seconds": time.monotonic() - began_at}

    @answer
    async def unload(self, model: str, node: str | None, wait: bool) -> dict[str, Any]:
        """Take a model's instances from their devices, on `node` or everywhere; those that work finish first."""
        deployed = self._deployed(model)
        where = self._node(node)
        leaving = {
            instance.id: self.controller.workers[instance.worker].name
            for instance in self.controller.instances_of(model)
            if where is None or instance.worker == where.address
        }
        logger.info("unload asked for model=%s node=%s instances=%s", model, node, sorted(leaving))
        gone = asyncio.get_running_loop().create_future()
        self._departures[gone] = set(leaving)
        self.on(ev.UnloadRequested(time.monotonic(), model, where.name if where else ""))
        n_kept = deployed.deployment.auto_scaling_config.min_instances
        warnings = [f"min_instances is {n_kept}: another instance is started at once"] if leaving and n_kept else []
        if wait:
            try:
                await gone
            finally:
                self._departures.pop(gone, None)
        return {
            "model": model,
            "state": "unloaded" if gone.done() else "unloading",
            "instances": [{"instance": instance, "node": name} for instance, name in leaving.items()],
            "warnings": warnings,
        }

    @answer
    async def pull(self, model: str | None, source: str | None, node: str | None, wait: bool) -> dict[str, Any]:
        """Bring a checkpoint's files to the disk of `node`, or of one that may run it. `source` may name a deployed model too."""
        deployed = self._deployed(model) if model is not None else self.deployed.get(source or "")
        where = self._node(node)
        view = ModelView(source or "", nbytes=0) if deployed is None else self.controller.models[deployed.deployment.model]
        source = (source or "") if deployed is None else deployed.deployment.source
        if where is None:
            where = self.controller.best_worker(view, time.monotonic())
            there = [worker for worker in self.controller.workers.values() if source in worker.residency]
            allowed = [worker for worker in there if not view.nodes or worker.name in view.nodes]
            where = min(allowed, key=lambda worker: worker.name, default=where)
        if where is None:
            raise NoWorker(view.name, "no worker is connected that could hold it")
        began_at = time.monotonic()
        reply = await self._ask(where.address, "sllm_inspect", source=source, fetch=False)
        fetched = "error" in reply and isinstance(from_wire(reply), CheckpointNotFound)
        said = {"source": source, "node": where.name, "fetched": fetched}
        if fetched:
            logger.info("fetch source=%s worker=%s cause=an operator asked", source, where.address)
            peers = self.peers(source, where.address)
            fetching = self._ask(where.address, "sllm_pull", FETCH_S, source=source, peers=peers)
            if not wait:
                self.effects.start(self._log_fetch(source, where.address, fetching))
                return said | {"state": "fetching", "nbytes": None, "seconds": None}
            reply = await fetching
        if "error" in reply:
            error = from_wire(reply)
            near = difflib.get_close_matches(source, self.deployed, n=1)
            if isinstance(error, CheckpointNotFound) and near:
                error = CheckpointNotFound(source, f"{error.reason}. Did you mean the deployed model {near[0]!r}?")
            raise error
        return said | {"state": "disk", "nbytes": reply["nbytes"], "seconds": time.monotonic() - began_at}

    async def _log_fetch(self, source: str, worker: str, fetching: Awaitable[dict[str, Any]]) -> None:
        reply = await fetching
        if "error" in reply:
            logger.warning("fetch failed source=%s worker=%s cause=%s", source, worker, from_wire(reply).message)

    @answer
    async def cluster(self) -> dict[str, Any]:
        """Workers with their slots, tiers and models."""
        return {"workers": [self._worker_row(view) for view in self.controller.workers.values()]}

    def _worker_row(self, view: WorkerView) -> dict[str, Any]:
        state = self.scheduler.workers[view.address]
        facts = state.extra["sllm"]
        account = self._accounts.get(view.address, facts)
        here = [instance for instance in self.controller.instances.values() if instance.worker == view.address]
        taken = [instance for instance in here if instance.state is not InstanceState.PLANNED]
        models = []
        for name, deployed in self.deployed.items():
            states = [self._shown_state(instance) for instance in here if instance.model == name]
            tier = view.residency.get(deployed.deployment.source)
            if states:
                shown = "device" if InstanceState.READY in states else str(tier or Tier.DISK)
                state = InstanceState.READY if InstanceState.READY in states else states[0]
                models.append({"model": name, "state": str(state), "tier": shown, "nbytes": deployed.nbytes})
            elif tier is not None:
                models.append({"model": name, "state": str(tier), "tier": str(tier), "nbytes": deployed.nbytes})
        return {
            "name": view.name,
            "address": view.address,
            "pid": facts["pid"],
            "slots": view.slots,
            "slots_used": sum(instance.n_slots for instance in taken),
            "tiers": account["tiers"],
            "bandwidth": account["bandwidth"],
            "instances": [
                {
                    "instance": instance.id,
                    "model": instance.model,
                    "state": str(instance.state),
                    "n_requests": instance.n_requests,
                    "progress": self._progress_of(instance),
                    "engine": account["instances"].get(instance.id),
                }
                for instance in here
            ],
            "models": models,
        }

    def _shown_state(self, instance: InstanceView) -> InstanceState:
        """Its state; one that is still being read is loading for who looks at it, whatever may be dispatched to it."""
        reading = instance.state is InstanceState.READY and self._progress_of(instance) is not None
        return InstanceState.LOADING if reading else instance.state

    def _progress_of(self, instance: InstanceView | None) -> dict[str, Any] | None:
        """How far a load is, ``done``, ``total`` in bytes, ``tier``, ``bytes_per_s``, until its last byte is there."""
        told = None if instance is None else self._progress.get(instance.id)
        if instance is None or told is None or instance.state not in (InstanceState.LOADING, InstanceState.READY):
            return None
        if instance.state is InstanceState.READY and _is_read(told):
            return None
        return {key: told[key] for key in ("done", "total", "tier", "bytes_per_s")}

    def _node(self, name: str | None) -> WorkerView | None:
        """The worker of that name; raises :class:`InvalidRequest` with near ones."""
        if name is None:
            return None
        by_name = {worker.name: worker for worker in self.controller.workers.values()}
        if name in by_name:
            return by_name[name]
        near = difflib.get_close_matches(name, by_name, n=3) or sorted(by_name)[:10]
        known = f"Connected are {', '.join(map(repr, near))}." if near else "None is connected."
        raise InvalidRequest(f"There is no node {name!r}. {known}", "node")

    def _deployed(self, model: str) -> Deployed:
        deployed = self.deployed.get(model)
        if deployed is None:
            raise ModelNotFound(model, difflib.get_close_matches(model, self.deployed, n=3))
        return deployed

    def _keep_alive(self, deployment: Deployment) -> float:
        given = deployment.auto_scaling_config.keep_alive
        return self.settings.scheduler.keep_alive if given is None else given

    def _allowed(self, deployment: Deployment) -> list[WorkerView]:
        nodes = deployment.placement_config.nodes
        return [worker for worker in self.controller.workers.values() if not nodes or worker.name in nodes]

    async def _inspect(self, deployment: Deployment) -> dict[str, Any]:
        """What the workers that may run the model say of its checkpoint; the first error, if none of them can serve it.

        All are asked, since each tells by it whether the files are on its own disk. If they are on nobody's, one fetches them.
        """
        deadline = time.monotonic() + self.settings.scheduler.worker_wait
        while not self._allowed(deployment):
            self._worker_joined.clear()
            try:
                await asyncio.wait_for(self._worker_joined.wait(), deadline - time.monotonic())
            except TimeoutError:
                nodes = deployment.placement_config.nodes
                who = f"its nodes {', '.join(nodes)} are not connected" if nodes else "no worker is connected"
                hint = "Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin"
                raise NoWorker(deployment.model, f"{who}. {hint}") from None
        allowed = [worker.address for worker in self._allowed(deployment)]
        backend = deployment.backend_config
        choice: dict[str, Any] = {
            "task": backend.wanted_task,
            "pooling": backend.pooling,
            "normalize": backend.normalize,
            "backend": deployment.backend,
        }
        asked = [self._ask(worker, "sllm_inspect", source=deployment.source, fetch=False, **choice) for worker in allowed]
        replies = await asyncio.gather(*asked)
        good = next((reply for reply in replies if "error" not in reply), None)
        if good is not None:
            return good
        reasons = [from_wire(reply) for reply in replies]
        for reason in reasons:
            if not isinstance(reason, CheckpointNotFound | WorkerLost):
                raise reason
        for worker, reason in zip(allowed, reasons, strict=True):
            if isinstance(reason, CheckpointNotFound):
                reply = await self._ask(worker, "sllm_inspect", FETCH_S, source=deployment.source, fetch=True, **choice)
                if "error" not in reply:
                    return reply
                raise from_wire(reply)
        raise reasons[0]

    async def _inspect_adapters(self, deployment: Deployment) -> None:
        """Raise what is wrong with one of the deployment's adapters, as a worker that may run its model sees it."""
        for name, source in (deployment.backend_config.lora_adapters or {}).items():
            reply: dict[str, Any] = {}
            for worker in self._allowed(deployment):
                arguments = {"name": name, "source": source, "base": deployment.source, "backend": deployment.backend}
                reply = await self._ask(worker.address, "sllm_inspect_adapter", FETCH_S, **arguments)
                if "error" not in reply:
                    break
            if "error" in reply:
                raise from_wire(reply)

    async def _welcome(self, worker: str) -> None:
        """Tell a worker what it shows to the others, so that they supply each other with checkpoints."""
        await self._ask(worker, "sllm_welcome", token=self._token)

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

    async def _look_for(self, worker: str, source: str) -> None:
        await self._ask(worker, "sllm_inspect", source=source, fetch=False)

    async def _ask(self, worker: str, op: str, timeout_s: float = ASK_S, **arguments: Any) -> dict[str, Any]:
        """A worker's answer; one that cannot be had in time is an error like those that it would answer."""
        try:
            return await asyncio.wait_for(getattr(self.effects.pool(worker), op)(**arguments), timeout_s)
        except (OSError, TimeoutError):
            return WorkerLost(worker).as_wire()

    def _forget(self, model: str, *, replaced: bool = False) -> None:
        deployed = self.deployed.pop(model)
        source = deployed.deployment.source
        logger.info("deleted model=%s", model)
        self.on(ev.ModelDeleted(time.monotonic(), model, replaced))
        if any(other.deployment.source == source for other in self.deployed.values()):
            return
        for worker in self.controller.workers.values():
            if worker.residency.get(source) is Tier.HOST:
                self.effects.start(self._forget_on(worker.address, source))

    def _preload(self, deployment: Deployment) -> list[str]:
        """Begin to bring the checkpoint to the host memory of the nodes in `memory_pool`; returns what cannot be done."""
        by_name = {worker.name: worker.address for worker in self.controller.workers.values()}
        warnings = []
        for node in deployment.placement_config.memory_pool:
            if node in by_name:
                self.effects.start(self._preload_on(by_name[node], deployment))
            else:
                warnings.append(f"placement_config.memory_pool: node {node!r} is not connected, so nothing was preloaded there")
        return warnings

    async def _preload_on(self, worker: str, deployment: Deployment) -> None:
        peers = self.peers(deployment.source, worker)
        reply = await self._ask(worker, "sllm_preload", FETCH_S, source=deployment.source, peers=peers)
        if "error" in reply:
            logger.warning("preload failed model=%s worker=%s cause=%s", deployment.model, worker, from_wire(reply).message)

    async def _forget_on(self, worker: str, source: str) -> None:
        await self._ask(worker, "sllm_forget", source=source)


def _is_read(told: dict[str, Any] | None) -> bool:
    """Whether a report of a load is its last one."""
    return told is not None and bool(told.get("done", -1) >= told["total"])


def _account(facts: dict[str, Any]) -> tuple[dict[str, Tier], dict[Tier, float], dict[Tier, float]]:
    """A worker's report as views: residency, bytes per second, fixed seconds."""
    residency = {key: Tier(tier) for key, tier in facts["residency"].items()}
    bytes_per_s = {Tier(tier): speed["bytes_per_s"] for tier, speed in facts["bandwidth"].items()}
    overhead_s = {Tier(tier): speed["overhead_s"] for tier, speed in facts["bandwidth"].items()}
    return residency, bytes_per_s, overhead_s


async def dask_setup(scheduler: Scheduler) -> None:
    """Called by Dask for ``--preload sllmdask.cluster.scheduler_plugin``."""
    log_as_dask_does()
    try:
        settings = read_settings()
    except ConfigError as error:
        # Dask would log the failed preload and run a scheduler that knows no model.
        logger.error("%s", error.message)
        raise SystemExit(2) from None
    plugin = SllmSchedulerPlugin(scheduler, settings)
    await plugin.effects.open()
    scheduler.add_plugin(plugin, name=SllmSchedulerPlugin.name)
