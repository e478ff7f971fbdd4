"""Deployments: what the operators gave, what its checkpoint turned out to be, and what is done about it on the workers."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sllmdask.cluster.effects import ASK_S, FETCH_S, Effects
from sllmdask.config import Deployment, Settings, parse
from sllmdask.errors import AdapterNotFound, CheckpointNotFound, ModelNotFound, NoWorker, SllmError, WorkerLost, from_wire
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import ModelView, Tier, WorkerView

logger = logging.getLogger(__name__)


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


class Deployments:
    """The deployed models by name. ``peers(source, worker)`` says where a worker may have files from."""

    def __init__(
        self,
        controller: Controller,
        settings: Settings,
        effects: Effects,
        on: Callable[[ev.Event], None],
        peers: Callable[[str, str], list[str]],
    ) -> None:
        self._controller, self._settings, self._effects, self._on, self._peers = controller, settings, effects, on, peers
        self.by_name: dict[str, Deployed] = {}
        self._worker_joined = asyncio.Event()
        # Front doors keep tokenizers by revision, and may have known the scheduler that was here before.
        self._revisions = itertools.count(int(1e3 * time.time()))

    # --- asking ---

    def find(self, model: str) -> Deployed:
        """Raises :class:`ModelNotFound` with near names."""
        deployed = self.by_name.get(model)
        if deployed is None:
            raise ModelNotFound(model, difflib.get_close_matches(model, self.by_name, n=3))
        return deployed

    def keep_alive(self, deployment: Deployment) -> float:
        """Seconds that an idle instance stays; negative: for ever."""
        given = deployment.auto_scaling_config.keep_alive
        return self._settings.scheduler.keep_alive if given is None else given

    def allowed(self, deployment: Deployment) -> list[WorkerView]:
        """Connected workers that may run it."""
        nodes = deployment.placement_config.nodes
        return [worker for worker in self._controller.workers.values() if not nodes or worker.name in nodes]

    # --- deploying ---

    async def register(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """Deploy a model, or deploy it anew with other settings."""
        asked = parse(Deployment, deployment, "the deployment")
        facts = await self._inspect(asked)
        old = self.by_name.get(asked.model)
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
            keep_alive_s=self.keep_alive(asked),
            variant=backend.variant,
            nodes=asked.placement_config.nodes,
        )
        misfit = self._controller.feasible(view)
        if misfit is not None:
            raise misfit
        await self._inspect_adapters(asked)
        if old is not None and not same:
            self._forget(asked.model, replaced=True)
        self.by_name[asked.model] = Deployed(
            deployment=asked,
            created=old.created if old and same else int(time.time()),
            revision=old.revision if old and same else next(self._revisions),
            nbytes=facts["nbytes"],
            max_model_len=max_model_len,
            architecture=facts["architecture"],
            embedding=facts.get("embedding"),
        )
        logger.info("deployed model=%s source=%s nbytes=%d", asked.model, asked.source, facts["nbytes"])
        self._on(ev.ModelDeployed(time.monotonic(), view))
        return {"model": asked.model, "warnings": asked.warnings() + self._preload(asked)}

    async def delete(self, model: str, adapters: list[str] | None = None) -> dict[str, Any]:
        """Forget a model: who waits is refused, who runs may finish, then its memory is freed unless another model shares it.

        Or forget some of its `adapters`: no request gets them any more, and instances let go of them when others are needed.
        """
        deployed = self.find(model)
        if adapters is not None:
            backend = deployed.deployment.backend_config
            left = dict(backend.lora_adapters or {})
            for name in adapters:
                if left.pop(name, None) is None:
                    raise AdapterNotFound(model, name, difflib.get_close_matches(name, left, n=3))
            changed = {"backend_config": backend.model_copy(update={"lora_adapters": left})}
            self.by_name[model] = replace(deployed, deployment=deployed.deployment.model_copy(update=changed))
            logger.info("deleted adapters=%s model=%s", ",".join(adapters), model)
        else:
            self._forget(model)
        return {"model": model}

    async def files(self, model: str) -> dict[str, Any]:
        """The small files of a model's checkpoint, from a worker that has them."""
        deployment = self.find(model).deployment
        error: SllmError = NoWorker(model, "no worker is connected that could supply its tokenizer")
        for worker in self.allowed(deployment):
            reply = await self._effects.ask(worker.address, "sllm_files", source=deployment.source)
            if "error" not in reply:
                return {"files": reply["files"]}
            error = from_wire(reply)
        raise error

    def worker_joined(self, worker: str) -> None:
        """A worker is there, and it tells by its next account which of the deployed checkpoints are on its own disk."""
        self._worker_joined.set()
        for source in {deployed.deployment.source for deployed in self.by_name.values()}:
            self._effects.start(self._look_for(worker, source))

    # --- on the workers ---

    async def _inspect(self, deployment: Deployment) -> dict[str, Any]:
        """What the workers that may run the model say of its checkpoint; the first error, if none of them can serve it.

        All are asked, since each tells by it whether the files are on its own disk. If they are on nobody's, one fetches them.
        """
        deadline = time.monotonic() + self._settings.scheduler.worker_wait
        while not self.allowed(deployment):
            self._worker_joined.clear()
            try:
                await asyncio.wait_for(self._worker_joined.wait(), deadline - time.monotonic())
            except TimeoutError:
                nodes = deployment.placement_config.nodes
                who = f"its nodes {', '.join(nodes)} are not connected" if nodes else "no worker is connected"
                hint = "Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin"
                raise NoWorker(deployment.model, f"{who}. {hint}") from None
        allowed = [worker.address for worker in self.allowed(deployment)]
        backend = deployment.backend_config
        choice: dict[str, Any] = {"task": backend.wanted_task, "pooling": backend.pooling, "normalize": backend.normalize}
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
            for worker in self.allowed(deployment):
                arguments = {"name": name, "source": source, "base": deployment.source}
                reply = await self._ask(worker.address, "sllm_inspect_adapter", FETCH_S, **arguments)
                if "error" not in reply:
                    break
            if "error" in reply:
                raise from_wire(reply)

    async def _look_for(self, worker: str, source: str) -> None:
        await self._ask(worker, "sllm_inspect", source=source, fetch=False)

    async def _ask(self, worker: str, op: str, timeout_s: float = ASK_S, **arguments: Any) -> dict[str, Any]:
        return await self._effects.ask(worker, op, timeout_s, **arguments)

    def _forget(self, model: str, *, replaced: bool = False) -> None:
        deployed = self.by_name.pop(model)
        source = deployed.deployment.source
        logger.info("deleted model=%s", model)
        self._on(ev.ModelDeleted(time.monotonic(), model, replaced))
        if any(other.deployment.source == source for other in self.by_name.values()):
            return
        for worker in self._controller.workers.values():
            if worker.residency.get(source) is Tier.HOST:
                self._effects.start(self._forget_on(worker.address, source))

    def _preload(self, deployment: Deployment) -> list[str]:
        """Begin to bring the checkpoint to the host memory of the nodes in `memory_pool`; returns what cannot be done."""
        by_name = {worker.name: worker.address for worker in self._controller.workers.values()}
        warnings = []
        for node in deployment.placement_config.memory_pool:
            if node in by_name:
                self._effects.start(self.preload_on(by_name[node], deployment))
            else:
                warnings.append(f"placement_config.memory_pool: node {node!r} is not connected, so nothing was preloaded there")
        return warnings

    async def preload_on(self, worker: str, deployment: Deployment) -> None:
        """Bring the checkpoint to host memory there."""
        peers = self._peers(deployment.source, worker)
        reply = await self._ask(worker, "sllm_preload", FETCH_S, source=deployment.source, peers=peers)
        if "error" in reply:
            logger.warning("preload failed model=%s worker=%s cause=%s", deployment.model, worker, from_wire(reply).message)

    async def _forget_on(self, worker: str, source: str) -> None:
        await self._ask(worker, "sllm_forget", source=source)
