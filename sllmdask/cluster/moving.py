"""What an operator's wish to move something becomes: an instance to go to, an order to a worker, what the controller hears.

The workers do the moving themselves (:mod:`sllmdask.actors.migration`). Here is decided whether it can be: there must be an
instance of the model on the node, or one must be able to be loaded there.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from typing import Any, Protocol

from sllmdask.config import Deployment
from sllmdask.errors import InvalidRequest, MoveFailed, SllmError, from_wire
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Migrate, Move
from sllmdask.policy.views import InstanceState, InstanceView, WorkerView

logger = logging.getLogger(__name__)

#: Seconds after which a move that has not ended is not waited for any more; the worker ends it sooner, if it can.
MOVE_LIMIT_S = 900.0
#: Seconds for which requests that cannot leave yet are tried again, where an operator asked.
EVACUATE_S = 600.0
#: The same where the controller decided: so many times as long as was predicted, and no less than the latter. Meanwhile another
#: model's request waits for the place, and those of this model for the new one.
DECIDED, DECIDED_S = 5.0, 20.0


class Head(Protocol):
    """What is needed of the scheduler plugin."""

    @property
    def controller(self) -> Controller: ...

    def on(self, event: ev.Event) -> None: ...

    def deployment(self, model: str) -> Deployment: ...

    def move_address(self, worker: str) -> str | None:
        """``host:port`` where a worker takes requests."""
        ...

    async def ask(self, worker: str, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """A worker's answer, or an error as plain data."""
        ...

    def ready_there(self, model: str, where: WorkerView, replaces: str) -> AbstractAsyncContextManager[str]:
        """An instance of `model` on `where` with all of its bytes, other than `replaces`, in whose stead it may be loaded."""
        ...

    def awaiting(self, request: str, source: InstanceView, to: str, cause: str) -> AbstractContextManager[None]:
        """Show that a request is to move to node `to` as soon as its model is ready there."""
        ...

    async def until_read(self, instance: str) -> None:
        """Until the last byte of an instance is there; raises :class:`LoadFailed`."""
        ...

    async def until_gone(self, instance: str) -> None: ...

    def in_background(self, coroutine: Coroutine[Any, Any, None]) -> Any: ...


class Moving:
    """Moves that an operator asks for, and the orders of those that the controller decides on."""

    def __init__(self, head: Head) -> None:
        self._head = head
        #: Workers between which something is on its way: (source, destination).
        self._under_way: list[tuple[str, str]] = []

    def worker_left(self, worker: str) -> None:
        """Tell those who wait for an answer of that worker."""
        for source in {source for source, destination in self._under_way if destination == worker}:
            self._head.in_background(self._say_gone(source, worker))

    async def _say_gone(self, source: str, worker: str) -> None:
        await self._head.ask(source, "sllm_gone", 10.0, address=worker)

    # --- one request ---

    async def requests(self, ids: Mapping[str, str], to: WorkerView, kind: str | None, wait: bool) -> dict[str, Any]:
        """Move running requests to node `to`; `ids` are those that people know, by key.

        Raises :class:`InvalidRequest` if one is not running, or runs there, :class:`MoveFailed` if none moved, and what loading
        the model there raises.
        """
        sources = {key: self._source_of(key, shown, to) for key, shown in ids.items()}
        if not wait:
            self._head.in_background(self._in_background(sources, to, kind))
            return {"state": "moving", "to": to.name, "moves": {}}
        moves = await self._move_all(sources, to, kind)
        outcomes = {record["outcome"] for record in moves.values()}
        if outcomes == {"stayed"}:
            reason = next(iter(moves.values()))["reason"] or "it is not known why"
            raise MoveFailed(f"The request {next(iter(ids.values()))!r}", to.name, reason)
        return {"state": "moved" if "moved" in outcomes else "ended", "to": to.name, "moves": moves}

    def _source_of(self, key: str, shown: str, to: WorkerView) -> InstanceView:
        controller = self._head.controller
        request = controller.running.get(key)
        if request is None:
            if key in controller.waiting:
                raise InvalidRequest(f"The request {shown!r} still waits for an instance: nothing of it could move.", "request")
            raise InvalidRequest(f"No request {shown!r} is running. GET /admin/requests lists those that are.", "request")
        instance = controller.instances.get(request.instance or "")
        if instance is None:
            raise InvalidRequest(f"The instance of the request {shown!r} has just gone.", "request")
        if instance.worker == to.address:
            raise InvalidRequest(f"The request runs on node {to.name} already.", "to")
        return instance

    async def _in_background(self, sources: Mapping[str, InstanceView], to: WorkerView, kind: str | None) -> None:
        try:
            await self._move_all(sources, to, kind)
        except Exception as error:  # noqa: BLE001 - nobody waits for it
            logger.warning("not moved requests=%s to=%s cause=%s", ",".join(sources), to.name, error)

    async def _move_all(self, sources: Mapping[str, InstanceView], to: WorkerView, kind: str | None) -> dict[str, Any]:
        records = await asyncio.gather(*(self._move_one(key, source, to, kind) for key, source in sources.items()))
        return dict(zip(sources, records, strict=True))

    async def _move_one(self, key: str, source: InstanceView, to: WorkerView, kind: str | None) -> dict[str, Any]:
        cause = "an operator asked"
        async with AsyncExitStack() as there:
            with self._head.awaiting(key, source, to.name, cause):
                successor = await there.enter_async_context(self._head.ready_there(source.model, to, ""))
            order = {**self._order(source, successor, to, kind, cause), "request": key}
            with _Noted(self._under_way, (source.worker, to.address)):
                reply = await self._head.ask(source.worker, "sllm_move", MOVE_LIMIT_S, instance=source.id, order=order)
            if "error" in reply:
                raise from_wire(reply)
            if reply["outcome"] == "moved":
                self._head.on(ev.RequestMoved(time.monotonic(), key, successor))
            return reply

    async def decided(self, move: Move) -> None:
        """Move one request as the controller decided, and tell it what came of that."""
        reason = None
        try:
            to = self._head.controller.workers.get(move.destination)
            if to is None:
                raise MoveFailed(f"The request {move.request!r}", move.destination, "that worker has left")
            await self._head.until_read(move.successor)
            source = InstanceView(move.instance, move.model, move.worker, 1, InstanceState.READY, 0.0)
            order = {**self._order(source, move.successor, to, None, move.cause), "request": move.request}
            with _Noted(self._under_way, (move.worker, move.destination)):
                reply = await self._head.ask(move.worker, "sllm_move", MOVE_LIMIT_S, instance=move.instance, order=order)
            if "error" in reply:
                raise from_wire(reply)
            if reply["outcome"] != "moved":
                reason = str(reply["reason"] or f"it has {reply['outcome']}")
        except SllmError as error:
            reason = error.message
        except Exception as error:
            # The controller keeps a place for it until it hears of its move.
            logger.exception("move failed request=%s", move.request)
            reason = f"internal error: {error!r}"
        now = time.monotonic()
        if reason is None:
            self._head.on(ev.RequestMoved(now, move.request, move.successor))
        else:
            logger.info("not moved request=%s to=%s cause=%s", move.request, move.successor, reason)
            self._head.on(ev.RequestStayed(now, move.request, reason))

    # --- an instance ---

    async def instance(self, instance_id: str, to: WorkerView, kind: str | None, wait: bool) -> dict[str, Any]:
        """Load the instance's model on node `to`, move all of its requests there, and unload it.

        Raises :class:`InvalidRequest` if there is no such instance, or it cannot be moved there, and what loading raises.
        """
        source = self._ready_instance(instance_id, to)
        if not wait:
            self._head.in_background(self._instance_in_background(source, to, kind))
            return {"state": "moving", "to": to.name, "instance": None, "left": None, "moves": {}}
        return await self._move_instance(source, to, kind)

    def _ready_instance(self, instance_id: str, to: WorkerView) -> InstanceView:
        instances = self._head.controller.instances
        source = instances.get(instance_id)
        if source is None:
            near = difflib.get_close_matches(instance_id, instances, n=3) or sorted(instances)[:10]
            known = f"There are {', '.join(map(repr, near))}." if near else "None is loaded."
            raise InvalidRequest(f"There is no instance {instance_id!r}. {known}", "instance")
        if source.state is not InstanceState.READY:
            raise InvalidRequest(f"The instance {instance_id!r} is {source.state}: wait until it is ready.", "instance")
        if source.worker == to.address:
            raise InvalidRequest(f"The instance {instance_id!r} is on node {to.name} already.", "to")
        return source

    async def _instance_in_background(self, source: InstanceView, to: WorkerView, kind: str | None) -> None:
        try:
            await self._move_instance(source, to, kind)
        except Exception as error:  # noqa: BLE001 - nobody waits for it
            logger.warning("not moved instance=%s to=%s cause=%s", source.id, to.name, error)

    async def _move_instance(self, source: InstanceView, to: WorkerView, kind: str | None) -> dict[str, Any]:
        async with self._head.ready_there(source.model, to, source.id) as successor:
            # From here on its requests go to others, and it leaves when it has none.
            self._head.on(ev.InstanceLeaves(time.monotonic(), source.id, "moved"))
            order = self._order(source, successor, to, kind, "an operator asked")
            moves, left = await self._evacuate(source.id, source.worker, to.address, order)
            for key, record in moves.items():
                if record["outcome"] == "moved":
                    self._head.on(ev.RequestMoved(time.monotonic(), key, successor))
        if left:
            reasons = {record["reason"] for record in moves.values() if record["reason"]}
            reason = "; ".join(sorted(reasons)) or "they could not leave"
            logger.warning("instance=%s keeps %d requests, which end there cause=%s", source.id, left, reason)
        else:
            await self._head.until_gone(source.id)
        return {"state": "moved" if not left else "leaving", "to": to.name, "instance": successor, "left": left, "moves": moves}

    async def evacuate(self, migrate: Migrate) -> str | None:
        """Move every request of an instance to its successor, which is ready; why some stayed, if they did."""
        workers = self._head.controller.workers
        source = InstanceView(migrate.instance, migrate.model, migrate.worker, 1, InstanceState.READY, 0.0)
        to = workers.get(migrate.destination)
        if to is None:
            return "its destination has left"
        order = self._order(source, migrate.successor, to, None, migrate.cause)
        limit_s = max(DECIDED_S, DECIDED * migrate.moved_in_s)
        moves, left = await self._evacuate(migrate.instance, migrate.worker, migrate.destination, order, limit_s)
        reasons = sorted({str(record["reason"]) for record in moves.values() if record["outcome"] == "stayed"})
        return ("; ".join(reasons) or f"{left} requests could not leave") if left else None

    async def _evacuate(
        self, instance: str, worker: str, destination: str, order: dict[str, Any], limit_s: float = EVACUATE_S
    ) -> tuple[dict[str, dict[str, Any]], int]:
        with _Noted(self._under_way, (worker, destination)):
            reply = await self._head.ask(worker, "sllm_evacuate", MOVE_LIMIT_S, instance=instance, order=order, limit_s=limit_s)
        if "error" in reply:
            raise from_wire(reply)
        return reply["moves"], int(reply["left"])

    def _order(self, source: InstanceView, successor: str, to: WorkerView, kind: str | None, cause: str) -> dict[str, Any]:
        """An :class:`~sllmdask.actors.leaving.Order` for the worker that has the instance."""
        address = self._head.move_address(to.address)
        if address is None:
            raise MoveFailed(f"The instance {source.id!r}", to.name, "that worker does not take requests yet")
        deployment = self._head.deployment(source.model)
        worker = self._head.controller.workers.get(source.worker)
        return {
            "request": "",
            "source": worker.name if worker is not None else source.worker,
            "destination": {"instance": successor, "worker": to.address, "node": to.name, "address": address},
            "cause": cause,
            "kind": kind,
            "delta": deployment.router_config.migration_delta,
            "alpha": deployment.scheduler_config.alpha,
            "beta": deployment.scheduler_config.beta,
        }


class _Noted:
    """Something is in a list while the block runs."""

    def __init__(self, items: list[tuple[str, str]], item: tuple[str, str]) -> None:
        self._items, self._item = items, item

    def __enter__(self) -> None:
        self._items.append(self._item)

    def __exit__(self, *_: object) -> None:
        self._items.remove(self._item)
