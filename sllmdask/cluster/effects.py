"""Decisions to Dask calls. :meth:`Effects.enact` returns at once; what came of it comes back as an event."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distributed import Client, Scheduler, wait
from distributed.core import ConnectionPool
from distributed.security import Security

from sllmdask.actors.handle import ModelHandle, actor_key, adopted_key
from sllmdask.actors.model_actor import InstanceFacts, ModelActor
from sllmdask.actors.streams import Outbox
from sllmdask.config import Deployment
from sllmdask.errors import InstanceGone, SllmError, WorkerLost
from sllmdask.policy import events as ev
from sllmdask.policy.decisions import Chose, Decision, Dispatch, Load, Migrate, Preempt, Refuse, Unload, WakeAt
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: Seconds that a worker may take for a short answer, and for one before which it may have to fetch a checkpoint.
ASK_S, FETCH_S = 30.0, 7200.0
#: Seconds within which Dask notices that a worker's process has ended.
NOTICE_S = 2.0
#: Seconds after which a load, fetching included, has failed, and an unloading, requests that still run included.
LOAD_LIMIT_S, UNLOAD_LIMIT_S = 7200.0, 900.0


class Effects:
    """The hands of the controller on one scheduler.

    The actors belong to a Dask client inside the scheduler's process: they live as long as the scheduler, whatever happens to
    the front doors.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on: Callable[[ev.Event], None],
        doors: Mapping[str, Outbox],
        deployment_of: Callable[[str], Deployment],
        peers_of: Callable[[str, str], list[str]],
        evacuate: Callable[[Migrate], Awaitable[str | None]],
    ) -> None:
        self._scheduler, self._on, self._doors = scheduler, on, doors
        self._deployment_of, self._peers_of = deployment_of, peers_of
        self._evacuate = evacuate
        self._client: Client | None = None
        self._client_lock = asyncio.Lock()
        #: Dask's future of each instance's actor, and the load under way for it, with the worker's address.
        self._futures: dict[str, tuple[str, Any]] = {}
        self._loads: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._migrations: dict[str, tuple[Migrate, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_adopted = 0
        self._timer: asyncio.TimerHandle | None = None
        #: Calls to workers: replies are ours to decode, unlike on the scheduler's own pool.
        self.pool = ConnectionPool(
            limit=512, deserialize=True, connection_args=Security().get_connection_args("scheduler"), timeout=10
        )

    def enact(self, decision: Decision) -> None:
        """Begin to do what was decided."""
        match decision:
            case Load():
                logger.info(
                    "load model=%s worker=%s instance=%s ready_in_s=%.5f cause=%s",
                    decision.model,
                    decision.worker,
                    decision.instance,
                    decision.ready_in_s,
                    dict(decision.why) or "its slots are free now",
                )
                work = self._load(decision, self._deployment_of(decision.model))
                self._loads[decision.instance] = decision.worker, self.start(work)
            case Unload():
                logger.info(
                    "unload model=%s worker=%s instance=%s cause=%s",
                    decision.model,
                    decision.worker,
                    decision.instance,
                    decision.cause,
                )
                self.start(self._unload(decision))
            case Dispatch():
                logger.info(
                    "dispatch request=%s instance=%s worker=%s queue_s=%.3f",
                    decision.request,
                    decision.instance,
                    decision.worker,
                    decision.queue_s,
                )
                loaded_from = None if decision.loaded_from is None else str(decision.loaded_from)
                self._tell(
                    decision.front_door,
                    [
                        "dispatch",
                        decision.request,
                        decision.instance,
                        decision.worker,
                        decision.node,
                        loaded_from,
                        decision.queue_s,
                    ],
                )
            case Refuse():
                cause = decision.error.code
                logger.info("refuse request=%s cause=%s why=%s", decision.request, cause, dict(decision.why))
                self._tell(decision.front_door, ["refuse", decision.request, decision.error.as_wire()])
            case Chose():
                pass
            case Migrate():
                logger.info(
                    "migrate model=%s instance=%s from=%s to=%s successor=%s moved_in_s=%.3f cause=%s",
                    decision.model,
                    decision.instance,
                    decision.worker,
                    decision.destination,
                    decision.successor,
                    decision.moved_in_s,
                    decision.cause,
                )
                work = self._migrate(decision, self._deployment_of(decision.model))
                self._migrations[decision.successor] = decision, self.start(work)
            case Preempt():
                raise NotImplementedError(f"no worker can do that yet: {decision!r}")
            case WakeAt(at=at):
                if self._timer:
                    self._timer.cancel()
                    self._timer = None
                if at is not None:
                    delay = max(0.0, at - time.monotonic())
                    self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    async def open(self) -> None:
        """Before the first decision."""
        await self.pool.start()

    async def close(self) -> None:
        """Stop what is under way and let go of the actors."""
        if self._timer:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        await self.pool.close()

    def prepare(self) -> None:
        """Have a client before the first load needs one."""
        if self._client is None:
            self.start(self._prepare())

    async def _prepare(self) -> None:
        await self._own_client()

    async def ask(self, worker: str, op: str, timeout_s: float = ASK_S, **arguments: Any) -> dict[str, Any]:
        """A worker's answer; one that cannot be had in time is an error like those that it would answer."""
        try:
            return await asyncio.wait_for(getattr(self.pool(worker), op)(**arguments), timeout_s)
        except (OSError, TimeoutError):
            return WorkerLost(worker).as_wire()

    def _wake(self) -> None:
        self._timer = None
        self._on(ev.TimerFired(time.monotonic()))

    def _tell(self, front_door: str, message: list[Any]) -> None:
        outbox = self._doors.get(front_door)
        if outbox is not None:
            outbox.put(message)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something in the background, until :meth:`close`."""
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def instance_lost(self, instance: str) -> None:
        """Its engine died: Dask need not keep the actor."""
        self._release(instance)

    def worker_left(self, worker: str) -> None:
        """Let go of what was on it: its actors, connections, and loads whose answer will never come."""
        self.pool.remove(worker)
        for instance in [instance for instance, (where, _) in self._futures.items() if where == worker]:
            self._release(instance)
        for where, task in list(self._loads.values()):
            if where == worker:
                task.cancel()
        for migrate, task in list(self._migrations.values()):
            if migrate.destination == worker:
                task.cancel()
                reason = f"the worker {worker} has left"
                logger.warning("migration failed instance=%s to=%s cause=%s", migrate.instance, worker, reason)
                self._on(ev.MigrationFailed(time.monotonic(), migrate.instance, migrate.successor, reason))

    async def _own_client(self) -> Client:
        async with self._client_lock:
            if self._client is None:
                self._client = await Client(
                    self._scheduler.address,
                    asynchronous=True,
                    set_as_default=False,
                    direct_to_workers=True,
                    name="sllmdask-controller",
                    heartbeat_interval="10s",
                )
            return self._client

    async def _make_ready(self, instance: str, model: str, worker: str, deployment: Deployment) -> Tier:
        """Create an instance's actor and load it; returns the tier that it was loaded from."""
        backend = deployment.backend_config
        what = InstanceFacts(
            model, deployment.source, backend.torch_dtype, backend.embedding, deployment.backend, deployment.num_gpus
        )
        return await self._actor_ready(instance, worker, what, actor_key(instance))

    async def _actor_ready(self, instance: str, worker: str, what: InstanceFacts, key: str, *, adopt: bool = False) -> Tier:
        client = await self._own_client()
        future = client.submit(ModelActor, instance, what, adopt, key=key, workers=[worker], actor=True)
        self._futures[instance] = worker, future
        with client.as_current():
            await wait(future)
        if future.status != "finished":
            raise InstanceGone(instance) if adopt and future.status == "error" else WorkerLost(worker)
        async with asyncio.timeout(LOAD_LIMIT_S):
            done = await ModelHandle(key, worker, self.pool).load(self._peers_of(what.source, worker))
        return Tier(done["loaded_from"])

    def adopt(self, instance: str, worker: str, what: InstanceFacts, *, loading: bool) -> None:
        """Have an actor over an instance that its worker has; what comes of a load is told, and that it is gone after all."""
        logger.info("adopt model=%s worker=%s instance=%s", what.model, worker, instance)
        self._n_adopted += 1
        key = adopted_key(instance, self._n_adopted)
        ready = self._actor_ready(instance, worker, what, key, adopt=True)
        self._loads[instance] = worker, self.start(self._see_loaded(instance, what.model, worker, ready, news=loading))

    async def _load(self, load: Load, deployment: Deployment) -> None:
        ready = self._make_ready(load.instance, load.model, load.worker, deployment)
        await self._see_loaded(load.instance, load.model, load.worker, ready)

    async def _see_loaded(
        self, instance: str, model: str, worker: str, ready: Coroutine[Any, Any, Tier], *, news: bool = True
    ) -> None:
        """Tell what comes of a load; that it went well, only if that is `news`."""
        try:
            loaded_from = await ready
        except WorkerLost:
            # Most likely it has died, and Dask is about to say so, which ends this task: a load has not failed by that.
            await asyncio.sleep(NOTICE_S)
            self._release(instance)
            self._on(ev.LoadFailed(time.monotonic(), instance, f"the worker {worker} did not answer"))
        except SllmError as error:
            logger.warning("load failed model=%s worker=%s cause=%s", model, worker, error.message)
            self._release(instance)
            self._on(ev.LoadFailed(time.monotonic(), instance, error.message))
        except Exception as error:
            # An instance that never left "loading" would hold its slots for ever.
            logger.exception("load failed model=%s worker=%s", model, worker)
            self._release(instance)
            self._on(ev.LoadFailed(time.monotonic(), instance, f"internal error: {error!r}"))
        else:
            if news:
                self._on(ev.LoadFinished(time.monotonic(), instance, loaded_from))
        finally:
            self._loads.pop(instance, None)

    async def _unload(self, unload: Unload) -> None:
        _, loading = self._loads.get(unload.instance, (None, None))
        if loading is not None:  # called off
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        await self._close_instance(unload.instance, unload.worker, unload.forget)
        self._on(ev.UnloadFinished(time.monotonic(), unload.instance))

    async def _close_instance(self, instance: str, worker: str, forget: bool) -> None:
        try:
            _, future = self._futures.get(instance, (None, None))
            if future is not None:
                client = await self._own_client()
                with client.as_current():
                    await wait(future)  # an actor that is being created cannot be told anything yet
                async with asyncio.timeout(UNLOAD_LIMIT_S):
                    await ModelHandle(future.key, worker, self.pool).unload(forget)
            else:  # it was adopted a moment ago, or its load was called off as soon as it began
                await self.ask(worker, "sllm_unload", UNLOAD_LIMIT_S, instance=instance, forget=forget)
        except WorkerLost:
            logger.info("unload instance=%s: its worker or its actor is gone", instance)
        except Exception:
            # An instance that never left "unloading" would hold its slots for ever; what stays is found by the reconciliation.
            logger.exception("unload failed instance=%s", instance)
        self._release(instance)

    async def _migrate(self, migrate: Migrate, deployment: Deployment) -> None:
        """Load there, move every request, leave here; or stay, with whatever had gone already brought back."""
        reason: str | None = "internal error"
        loaded_from: Tier | None = None
        try:
            loaded_from = await self._make_ready(migrate.successor, migrate.model, migrate.destination, deployment)
            reason = await self._evacuate(migrate)
        except SllmError as error:
            reason = error.message
        except Exception as error:
            # A migration that never ended would hold the slots of both ends for ever.
            logger.exception("migration failed instance=%s", migrate.instance)
            reason = f"internal error: {error!r}"
        finally:
            self._migrations.pop(migrate.successor, None)
        if reason is None and loaded_from is not None:
            await self._close_instance(migrate.instance, migrate.worker, False)
            self._on(ev.InstanceMigrated(time.monotonic(), migrate.instance, migrate.successor, loaded_from))
            return
        logger.warning("migration failed instance=%s to=%s cause=%s", migrate.instance, migrate.destination, reason)
        if loaded_from is not None:
            back = replace(
                migrate,
                instance=migrate.successor,
                successor=migrate.instance,
                worker=migrate.destination,
                destination=migrate.worker,
                cause="migration failed",
            )
            with suppress(SllmError):
                await self._evacuate(back)
        await self._close_instance(migrate.successor, migrate.destination, False)
        self._on(ev.MigrationFailed(time.monotonic(), migrate.instance, migrate.successor, reason or "unknown"))

    def _release(self, instance: str) -> None:
        _, future = self._futures.pop(instance, (None, None))
        if future is not None:
            future.release()
