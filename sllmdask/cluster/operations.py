"""What operators do by hand: load, unload, pull, pin."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sllmdask.cluster.deployments import Deployed, Deployments
from sllmdask.cluster.effects import FETCH_S, Effects
from sllmdask.cluster.waiting import Departures, LoadProgress, Wishes
from sllmdask.errors import CheckpointNotFound, InvalidRequest, ModelNotFound, NodeDraining, NoWorker, from_wire
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView

logger = logging.getLogger(__name__)


class Operations:
    """The handlers behind ``POST /admin/...``. ``peers(source, worker)`` says where a worker may have files from."""

    def __init__(
        self,
        controller: Controller,
        deployments: Deployments,
        effects: Effects,
        on: Callable[[ev.Event], None],
        peers: Callable[[str, str], list[str]],
        wishes: Wishes,
        departures: Departures,
        progress: LoadProgress,
    ) -> None:
        self._controller, self._deployments, self._effects, self._on = controller, deployments, effects, on
        self._peers, self._wishes, self._departures, self._progress = peers, wishes, departures, progress

    async def load(self, model: str, node: str | None, tier: str, wait: bool) -> dict[str, Any]:
        """Make an instance of a model ready, or bring its checkpoint to host memory; on `node`, or where it is best placed."""
        deployed = self._deployments.find(model)
        where = self._open_node(node)
        view = self._controller.models[model]
        if where is not None and view.nodes and where.name not in view.nodes:
            raise InvalidRequest(f"{model!r} may only run on its nodes {', '.join(view.nodes)} (target_nodes).", "node")
        if where is not None:
            view = replace(view, nodes=(where.name,))
        misfit = self._controller.feasible(view)
        if misfit is not None:
            raise misfit
        said = dict.fromkeys(("model", "tier", "state", "node", "instance", "cold_start", "seconds", "progress"))
        said |= {"model": model, "tier": tier, "keep_alive": self._deployments.keep_alive(deployed.deployment)}
        if tier == Tier.HOST:
            return said | await self._load_to_host(deployed, view, wait)
        now = time.monotonic()
        name, report = self._wishes.make()
        wish = RequestView(name, model, "", now, now + FETCH_S, load_only=True, node=where.name if where else "")
        logger.info("load asked for model=%s node=%s load=%s", model, node, wish.id)
        self._on(ev.LoadRequested(now, wish))
        if not wait and not report.done():
            report.add_done_callback(lambda done: done.cancelled() or done.exception())
            return said | {"state": "loading", "node": node}
        loaded = await report
        if wait:
            await self._progress.until_read(loaded.instance)
        progress = self._progress.of(self._controller.instances.get(loaded.instance))
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
        holding = [worker for worker in self._open_to(view) if worker.residency.get(source) is Tier.HOST]
        worker = min(holding, key=lambda worker: worker.name, default=None)
        worker = worker or self._controller.best_worker(view, time.monotonic())
        if worker is None:
            raise NoWorker(view.name, "no worker is connected")
        tier_from = worker.residency.get(source, Tier.REMOTE)
        began_at = time.monotonic()
        if not wait:
            self._effects.start(self._deployments.preload_on(worker.address, deployed.deployment))
            return {"state": "loading", "node": worker.name}
        peers = self._peers(source, worker.address)
        reply = await self._deployments.ask(worker.address, "sllm_preload", FETCH_S, source=source, peers=peers)
        if "error" in reply:
            raise from_wire(reply)
        loaded_from = reply.get("loaded_from") or str(tier_from)
        # The worker knows sooner than we that it was there.
        cold_start = "hit" if Tier.HOST in (tier_from, loaded_from) else loaded_from
        return {"state": "host", "node": worker.name, "cold_start": cold_start, "seconds": time.monotonic() - began_at}

    async def unload(self, model: str, node: str | None, wait: bool) -> dict[str, Any]:
        """Take a model's instances from their devices, on `node` or everywhere; those that work finish first."""
        deployed = self._deployments.find(model)
        where = self.node(node)
        leaving = {
            instance.id: self._controller.workers[instance.worker].name
            for instance in self._controller.instances_of(model)
            if where is None or instance.worker == where.address
        }
        logger.info("unload asked for model=%s node=%s instances=%s", model, node, sorted(leaving))
        gone = self._departures.begin(leaving)
        self._on(ev.UnloadRequested(time.monotonic(), model, where.name if where else ""))
        n_kept = deployed.deployment.auto_scaling_config.min_instances
        warnings = [f"min_instances is {n_kept}: another instance is started at once"] if leaving and n_kept else []
        if wait:
            try:
                await gone
            finally:
                self._departures.forget(gone)
        return {
            "model": model,
            "state": "unloaded" if gone.done() else "unloading",
            "instances": [{"instance": instance, "node": name} for instance, name in leaving.items()],
            "warnings": warnings,
        }

    async def pull(self, model: str | None, source: str | None, node: str | None, wait: bool) -> dict[str, Any]:
        """Bring a checkpoint's files to the disk of `node`, or of one that may run it. `source` may name a deployed model too."""
        by_name = self._deployments.by_name
        deployed = self._deployments.find(model) if model is not None else by_name.get(source or "")
        where = self._open_node(node)
        view = ModelView(source or "", nbytes=0) if deployed is None else self._controller.models[deployed.deployment.model]
        source = (source or "") if deployed is None else deployed.deployment.source
        if where is None:
            where = self._controller.best_worker(view, time.monotonic())
            there = [worker for worker in self._open_to(view) if source in worker.residency]
            where = min(there, key=lambda worker: worker.name, default=where)
        if where is None:
            raise NoWorker(view.name, "no worker is connected that could hold it")
        began_at = time.monotonic()
        reply = await self._deployments.ask(where.address, "sllm_inspect", source=source, fetch=False)
        fetched = "error" in reply and isinstance(from_wire(reply), CheckpointNotFound)
        said = {"source": source, "node": where.name, "fetched": fetched}
        if fetched:
            logger.info("fetch source=%s worker=%s cause=an operator asked", source, where.address)
            peers = self._peers(source, where.address)
            fetching = self._deployments.ask(where.address, "sllm_pull", FETCH_S, source=source, peers=peers)
            if not wait:
                self._effects.start(_log_fetch(source, where.address, fetching))
                return said | {"state": "fetching", "nbytes": None, "seconds": None}
            reply = await fetching
        if "error" in reply:
            error = from_wire(reply)
            near = difflib.get_close_matches(source, by_name, n=1)
            if isinstance(error, CheckpointNotFound) and near:
                error = CheckpointNotFound(source, f"{error.reason}. Did you mean the deployed model {near[0]!r}?")
            raise error
        return said | {"state": "disk", "nbytes": reply["nbytes"], "seconds": time.monotonic() - began_at}

    async def pin(self, model: str, node: str | None, pinned: bool) -> dict[str, Any]:
        """Have a model's host copy on `node` and keep it; without a node, where it is in memory, or where it is best placed.

        Not `pinned`: let it be evicted again, there or everywhere.
        """
        deployed = self._deployments.find(model)
        view = self._controller.models[model]
        kept = self._deployments.pins.get(model, set())
        began_at = time.monotonic()
        if pinned:
            where = self._where_to_pin(view, node)
            logger.info("pin asked for model=%s nodes=%s", model, [worker.name for worker in where])
            await self._deployments.pin(model, where)
            nodes = [worker.name for worker in where]
        else:
            if node is not None and node not in kept:
                self.node(node)
            nodes = sorted(kept if node is None else kept & {node})
            logger.info("unpin asked for model=%s nodes=%s", model, nodes)
            await self._deployments.unpin(model, nodes)
        return {
            "model": model,
            "pinned": sorted(self._deployments.pins.get(model, ())),
            "nodes": nodes,
            "nbytes": deployed.nbytes,
            "seconds": time.monotonic() - began_at,
        }

    def _where_to_pin(self, view: ModelView, node: str | None) -> list[WorkerView]:
        where = self._open_node(node)
        if where is not None:
            return [where]
        holding = [worker for worker in self._open_to(view) if worker.residency.get(view.checkpoint_key) is Tier.HOST]
        best = self._controller.best_worker(view, time.monotonic())
        found = sorted(holding, key=lambda worker: worker.name) or ([] if best is None else [best])
        if not found:
            raise NoWorker(view.name, "no worker is connected that could hold it")
        return found

    @asynccontextmanager
    async def ready_there(self, model: str, where: WorkerView, replaces: str) -> AsyncIterator[str]:
        """An instance of `model` on a node, loaded there if none is, in the stead of the instance `replaces` if one is named.

        It does not leave as idle before the end of the block.
        """
        view = self._controller.models.get(model)
        if view is None:
            raise ModelNotFound(model)
        if where.draining:
            raise NodeDraining(where.name, where.draining)
        if view.nodes and where.name not in view.nodes:
            raise InvalidRequest(f"{model!r} may only run on its nodes {', '.join(view.nodes)} (target_nodes).", "to")
        misfit = self._controller.feasible(replace(view, nodes=(where.name,)))
        if misfit is not None:
            raise misfit
        now = time.monotonic()
        name, report = self._wishes.make()
        wish = RequestView(name, model, "", now, now + FETCH_S, load_only=True, node=where.name, replaces=replaces, holds=True)
        try:
            self._on(ev.LoadRequested(now, wish))
            loaded = await report
            await self._progress.until_read(loaded.instance)
            yield loaded.instance
        finally:
            self._wishes.forget(name)
            self._on(ev.RequestEnded(time.monotonic(), name))

    async def until_gone(self, instance: str) -> None:
        """Until an instance that is to leave has left."""
        if instance in self._controller.instances:
            gone = self._departures.begin([instance])
            try:
                await gone
            finally:
                self._departures.forget(gone)

    def _open_to(self, view: ModelView) -> list[WorkerView]:
        """The workers to which something of a model may be brought."""
        workers = [worker for worker in self._controller.workers.values() if not worker.draining]
        return [worker for worker in workers if not view.nodes or worker.name in view.nodes]

    def _open_node(self, name: str | None) -> WorkerView | None:
        """As :meth:`node`, for something that is to be brought there; raises :class:`NodeDraining`, too."""
        where = self.node(name)
        if where is not None and where.draining:
            raise NodeDraining(where.name, where.draining)
        return where

    def node(self, name: str | None, param: str = "node") -> WorkerView | None:
        """The worker of that name; raises :class:`InvalidRequest` with near ones."""
        if name is None:
            return None
        by_name = {worker.name: worker for worker in self._controller.workers.values()}
        if name in by_name:
            return by_name[name]
        near = difflib.get_close_matches(name, by_name, n=3) or sorted(by_name)[:10]
        known = f"Connected are {', '.join(map(repr, near))}." if near else "None is connected."
        raise InvalidRequest(f"There is no node {name!r}. {known}", param)


async def _log_fetch(source: str, worker: str, fetching: Awaitable[dict[str, Any]]) -> None:
    reply = await fetching
    if "error" in reply:
        logger.warning("fetch failed source=%s worker=%s cause=%s", source, worker, from_wire(reply).message)
