"""Nodes that are drained: who asked for it, how far it is, and who waits for its end.

What becomes of their instances and requests the controller decides (:mod:`sllmdask.policy.draining`). Here are the ways in: an
operator, a worker whose process was told to end, and Dask, which retires workers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler
from distributed.core import Status

from sllmdask.errors import InvalidRequest
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import InstanceView, WorkerView

logger = logging.getLogger(__name__)

#: Why a node is drained.
ASKED, STOPPING, RETIRED = "an operator asked", "its process is about to end", "Dask retires it"
#: Seconds for which Dask's retiring waits for requests that cannot move, and for the actors of instances that have left.
RETIRE_S, ACTORS_S = 600.0, 5.0
#: Seconds between two looks for these.
LOOK_S = 0.02


@dataclass
class _Drain:
    """One node that is drained."""

    began_at: float
    n_at_first: int
    n_moved: int = 0
    over: list[asyncio.Future[str]] = field(default_factory=list)

    def end(self, state: str) -> None:
        """Tell those who wait what it has come to."""
        for future in self.over:
            if not future.done():
                future.set_result(state)
        self.over.clear()


class Drains:
    """The nodes that are drained. `find`: a worker by its name; it raises :class:`InvalidRequest` with those that there are."""

    def __init__(self, controller: Controller, on: Callable[[ev.Event], None], find: Callable[[str], WorkerView]) -> None:
        self._controller, self._on, self._find = controller, on, find
        self._drains: dict[str, _Drain] = {}

    # --- asked for ---

    async def drain(self, node: str, wait: bool = True, undo: bool = False, cause: str = ASKED) -> dict[str, Any]:
        """Take nothing new on a node, and have what it has leave: until nothing is left if `wait`. `undo`: it stays after all.

        Raises :class:`InvalidRequest` for a node that is not there, or whose process is about to end and cannot be kept.
        """
        worker = self._find(node)
        if undo:
            return self._undo(worker)
        drain = self._begin(worker, cause)
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        drain.over.append(over)
        self.settle()
        state = await over if wait else ("drained" if over.done() else "draining")
        return {"node": worker.name, "state": state, **self._told(worker.address, drain)}

    def _begin(self, worker: WorkerView, cause: str) -> _Drain:
        drain = self._drains.get(worker.address)
        if drain is None:
            drain = self._drains[worker.address] = _Drain(time.monotonic(), self._n_requests(worker.address))
        # Of a node that an operator has drained, the end of its process is still news.
        if not worker.draining or (cause == STOPPING and worker.draining != STOPPING):
            logger.info("drain node=%s requests=%d cause=%s", worker.name, drain.n_at_first, cause)
            self._on(ev.WorkerDrains(time.monotonic(), worker.address, cause))
        return drain

    def _undo(self, worker: WorkerView) -> dict[str, Any]:
        if worker.draining == STOPPING:
            raise InvalidRequest(f"Node {worker.name} was told to end (SIGTERM), and will: start it anew.", "node")
        drain = self._drains.pop(worker.address, None)
        if drain is not None:
            logger.info("undrain node=%s cause=an operator asked", worker.name)
            self._on(ev.WorkerUndrained(time.monotonic(), worker.address))
            drain.end("ready")
        return {"node": worker.name, "state": "ready"}

    # --- how far they are ---

    def saw(self, event: ev.Event) -> None:
        """Before the controller: count what moves off a node, whoever tells of it first."""
        match event:
            case ev.RequestMoved(request=key, instance=successor):
                pass
            case ev.MoveEnded(request=key, successor=successor, outcome="moved"):
                pass
            case _:
                return
        controller = self._controller
        request = controller.running.get(key)
        source = controller.instances.get((request.instance if request else None) or "")
        target = controller.instances.get(successor)
        if source is not None and target is not None and source.worker != target.worker and source.worker in self._drains:
            self._drains[source.worker].n_moved += 1

    def settle(self) -> None:
        """Tell those whose node is empty, or gone."""
        for address, drain in list(self._drains.items()):
            if address not in self._controller.workers:
                del self._drains[address]
                drain.end("left")
            elif drain.over and not self._instances(address):
                drain.end("drained")

    def row(self, worker: WorkerView) -> dict[str, Any] | None:
        """How far the draining of a worker is, for people; ``None``: it is not drained."""
        drain = self._drains.get(worker.address)
        if drain is None or not worker.draining:
            return None
        state = "draining" if self._instances(worker.address) else "drained"
        return {"cause": worker.draining, "state": state, **self._told(worker.address, drain)}

    def _told(self, address: str, drain: _Drain) -> dict[str, Any]:
        n_left = self._n_requests(address)
        return {
            "requests": n_left,
            "instances": len(self._instances(address)),
            "moved": drain.n_moved,
            "ended": max(0, drain.n_at_first - drain.n_moved - n_left),
            "seconds": time.monotonic() - drain.began_at,
            "stuck": self._stuck(address),
        }

    def _instances(self, address: str) -> list[InstanceView]:
        state = self._controller.state
        return state.on_worker(address) if address in state.workers else []

    def _n_requests(self, address: str) -> int:
        return sum(self._n_on(instance) for instance in self._instances(address))

    def _n_on(self, instance: InstanceView) -> int:
        return sum(not request.load_only for request in self._controller.queue.on_instance(instance.id))

    def _stuck(self, address: str) -> list[dict[str, Any]]:
        """Instances whose requests end where they are, as far as can be told now, and why."""
        found = []
        for instance in self._instances(address):
            n, why = self._n_on(instance), self._controller.drainer.why(instance)
            if n and why:
                found.append({"instance": instance.id, "model": instance.model, "requests": n, "why": why})
        return found

    # --- Dask's way ---

    def retiring(self, scheduler: Scheduler) -> Callable[..., Awaitable[Any]]:
        """Dask's handler ``retire_workers``, which refuses workers that hold instances: here they are drained before.

        ``Client.retire_workers``, clusters that scale down and ``dask worker --lifetime`` come this way.
        """
        retire: Callable[..., Awaitable[Any]] = scheduler.handlers["retire_workers"]

        async def retire_workers(workers: Any = None, names: Any = None, **arguments: Any) -> Any:
            named = {str(name) for name in names or ()}
            drained = [
                view for view in self._controller.workers.values() if view.address in (workers or ()) or view.name in named
            ]
            await asyncio.gather(*(self._empty(scheduler, view) for view in drained))
            retired = await retire(workers=workers, names=names, **arguments)
            self._keep(scheduler, (view.address for view in drained))
            return retired

        return retire_workers

    async def _empty(self, scheduler: Scheduler, worker: WorkerView) -> None:
        try:
            async with asyncio.timeout(RETIRE_S):
                await self.drain(worker.name, cause=RETIRED)
        except TimeoutError:
            logger.warning("node=%s still has %d requests: Dask may not retire it", worker.name, self._n_requests(worker.address))
        # Instances that have left are still actors until Dask's messages about them have arrived.
        for _ in range(round(ACTORS_S / LOOK_S)):
            state = scheduler.workers.get(worker.address)
            if state is None or not state.actors:
                break
            await asyncio.sleep(LOOK_S)

    def _keep(self, scheduler: Scheduler, addresses: Iterable[str]) -> None:
        """Workers that Dask could not retire go on."""
        for address in addresses:
            view, state = self._controller.workers.get(address), scheduler.workers.get(address)
            if view is not None and view.draining == RETIRED and state is not None and state.status == Status.running:
                self._undo(view)
