"""Deployments: what the operators gave, what its checkpoint turned out to be, and what is done about it on the workers."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sllmdask.cluster.effects import ASK_S, FETCH_S, Effects
from sllmdask.cluster.state_store import Found, StateStore, StoredDeployment
from sllmdask.config import Deployment, Settings, parse
from sllmdask.errors import (
    AdapterNotFound,
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    InvalidRequest,
    ModelDeleted,
    ModelNotFound,
    NoWorker,
    SllmError,
    WorkerLost,
    from_wire,
)
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import InstanceView, ModelView, Tier, WorkerView

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    """A deployment and what its checkpoint turned out to be."""

    deployment: Deployment
    #: What was given, without defaults: an update changes that.
    given: dict[str, Any]
    created: int
    revision: int
    nbytes: int
    max_model_len: int
    architecture: str
    #: ``None``: it generates text. Otherwise an ``EmbeddingInfo`` as plain types.
    embedding: dict[str, Any] | None = None

    def as_stored(self) -> StoredDeployment:
        facts = {name: getattr(self, name) for name in _FACTS}
        return StoredDeployment(self.deployment.model, self.given, facts)

    @classmethod
    def of_stored(cls, stored: StoredDeployment) -> Deployed:
        """Raises :class:`ConfigError` if this version does not take what was given."""
        deployment = parse(Deployment, stored.given, f"the stored deployment of {stored.model!r}")
        return cls(_for_its_task(deployment, stored.facts["embedding"]), stored.given, **{n: stored.facts[n] for n in _FACTS})


#: Fields of :class:`Deployed` that are kept beside what was given.
_FACTS = ("created", "revision", "nbytes", "max_model_len", "architecture", "embedding")


class Deployments:
    """The deployed models by name.

    ``peers(source, worker)`` says where a worker may have files from, ``told(worker, account)`` hears what a worker says of
    itself in its answers: sooner than from its reports.
    """

    def __init__(
        self,
        controller: Controller,
        settings: Settings,
        effects: Effects,
        on: Callable[[ev.Event], None],
        peers: Callable[[str, str], list[str]],
        told: Callable[[str, dict[str, Any]], None],
        store: StateStore | None = None,
    ) -> None:
        self._controller, self._settings, self._effects, self._on = controller, settings, effects, on
        self._peers, self._told, self._store = peers, told, store
        self.by_name: dict[str, Deployed] = {}
        #: Why no worker that has joined can serve a model that was deployed under another scheduler, by model.
        self.unserved: dict[str, str] = {}
        #: Held while a change is written and then made: changes are made in the order in which they were written.
        self._changing = asyncio.Lock()
        #: Names of the nodes that keep a model's host copy, by model.
        self.pins: dict[str, set[str]] = {}
        #: Set when a worker joins.
        self.joined = asyncio.Event()
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

    async def ask(self, worker: str, op: str, timeout_s: float = ASK_S, **arguments: Any) -> dict[str, Any]:
        """A worker's answer, whose account of itself is believed at once."""
        reply = await self._effects.ask(worker, op, timeout_s, **arguments)
        if (account := reply.pop("account", None)) is not None:
            self._told(worker, account)
        return reply

    # --- returning ---

    def restore(self, found: Found) -> list[str]:
        """Deploy what was kept, as it was; returns the names. One that this version does not take stays in the store."""
        self.pins = {model: set(nodes) for model, nodes in found.pins.items()}
        for stored in found.deployments:
            try:
                deployed = Deployed.of_stored(stored)
            except (ConfigError, LookupError) as error:
                reason = error.message if isinstance(error, ConfigError) else f"{error} is missing"
                logger.error("model=%s does not return, and stays in the store cause=%s", stored.model, reason)
                continue
            self.by_name[stored.model] = deployed
            self._on(ev.ModelDeployed(time.monotonic(), self._view(deployed)))
        self.pins = {model: nodes for model, nodes in self.pins.items() if model in self.by_name}
        return list(self.by_name)

    async def _look_for(self, worker: str) -> None:
        """Ask a worker that has joined which checkpoints are on its disk; why, if a directory that nobody has is not there."""
        models = list(self.by_name.values())
        sources = {deployed.deployment.source for deployed in models}
        asked = [self.ask(worker, "sllm_inspect", source=source, fetch=False) for source in sources]
        replies = dict(zip(sources, await asyncio.gather(*asked), strict=True))
        for deployed in models:
            source, name = deployed.deployment.source, deployed.deployment.model
            allowed = {each.address for each in self.allowed(deployed.deployment)}
            if self.by_name.get(name) is not deployed or worker not in allowed:
                continue
            if "error" not in replies[source]:
                self._serves(name, None)
            elif isinstance(error := from_wire(replies[source]), CheckpointNotFound):
                if not source.startswith(("/", ".", "~")):  # it may come from elsewhere when it is needed
                    continue
                reply = await self.ask(worker, "sllm_inspect", FETCH_S, source=source, fetch=True)
                reason = from_wire(reply).message if "error" in reply else None
                self._serves(name, None if self._is_elsewhere(source, worker) else reason)
            elif isinstance(error, CheckpointError) and not self._is_elsewhere(source, worker):
                self._serves(name, error.message)

    def _is_elsewhere(self, source: str, worker: str) -> bool:
        """Whether it can be had though `worker` does not have its files: from its own memory, or from another one."""
        tiers = {each.address: each.residency.get(source) for each in self._controller.workers.values()}
        return tiers.pop(worker, None) is Tier.HOST or bool({Tier.HOST, Tier.DISK} & set(tiers.values()))

    def _serves(self, model: str, reason: str | None) -> None:
        """Whether a model can be served, and if not, why."""
        if reason is None:
            self.unserved.pop(model, None)
        elif self.unserved.get(model) != reason:
            self.unserved[model] = reason
            logger.warning("model=%s cannot be served now cause=%s", model, reason)

    # --- deploying ---

    async def register(self, deployment: dict[str, Any]) -> dict[str, Any]:
        """Deploy a model, or deploy it anew with other settings."""
        return await self._deploy(parse(Deployment, deployment, "the deployment"))

    async def update(self, model: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change some settings of a deployment: those in `changes`, which may be nested, over what it has.

        They act at once; instances stay unless they may not be where they are, or as they are, any more.
        """
        given = _merged(self.find(model).given, changes)
        if given.get("model") != model:
            raise InvalidRequest("A deployment cannot be renamed: deploy it under the other name.", "model")
        return await self._deploy(parse(Deployment, given, "the deployment"))

    async def _deploy(self, asked: Deployment) -> dict[str, Any]:
        given = asked.model_dump(mode="json", exclude_unset=True)
        facts = await self._inspect(asked)
        max_model_len = min(asked.backend_config.max_model_len or facts["max_model_len"], facts["max_model_len"])
        asked = _for_its_task(asked, facts.get("embedding"))
        deployed = Deployed(
            deployment=asked,
            given=given,
            created=int(time.time()),
            revision=next(self._revisions),
            nbytes=facts["nbytes"],
            max_model_len=max_model_len,
            architecture=facts["architecture"],
            embedding=facts.get("embedding"),
        )
        misfit = self._controller.feasible(self._view(deployed))
        if misfit is not None:
            raise misfit
        await self._inspect_adapters(asked)
        async with self._changing:
            old = self.by_name.get(asked.model)
            same = old is not None and old.deployment.source == asked.source
            if old is not None and same:
                deployed = replace(deployed, created=old.created, revision=old.revision)
            if self._store is not None:
                await self._store.put(deployed.as_stored())
            if old is not None and not same:
                self._forget(asked.model, replaced=True)
            self.by_name[asked.model] = deployed
            self.unserved.pop(asked.model, None)
            logger.info("deployed model=%s source=%s nbytes=%d", asked.model, asked.source, facts["nbytes"])
            self._on(ev.ModelDeployed(time.monotonic(), self._view(deployed)))
        return {"model": asked.model, "warnings": asked.warnings() + self._bring_to_nodes(asked)}

    def _view(self, deployed: Deployed) -> ModelView:
        """What the controller sees of a deployment."""
        asked = deployed.deployment
        scaling = asked.auto_scaling_config
        return ModelView(
            name=asked.model,
            nbytes=deployed.nbytes,
            checkpoint=asked.source,
            n_slots=asked.num_gpus,
            target=scaling.target,
            min_instances=scaling.min_instances,
            max_instances=scaling.max_instances,
            keep_alive_s=self.keep_alive(asked),
            variant=asked.variant,
            nodes=asked.placement_config.nodes,
            pinned=bool(self.pins.get(asked.model)),
            moves=not deployed.embedding,
            alpha=asked.scheduler_config.alpha,
            beta=asked.scheduler_config.beta,
        )

    async def delete(self, model: str, adapters: list[str] | None = None, force: bool = False) -> dict[str, Any]:
        """Forget a model: who waits is refused, who runs may finish, then its memory is freed unless another model shares it.

        By `force`, or where the model was deleted before and still answers, those that run end with :class:`ModelDeleted`. The
        answer has ``n_running``, requests that may finish, and ``n_aborted``.

        Or forget some of its `adapters`: no request gets them any more, and instances let go of them when others are needed.
        """
        if adapters is None and model not in self.by_name and self._leaving(model):
            return {"model": model, "n_running": 0, "n_aborted": await self._abort(model)}
        deployed = self.find(model)
        if adapters is not None:
            backend = deployed.deployment.backend_config
            left = dict(backend.lora_adapters or {})
            for name in adapters:
                if left.pop(name, None) is None:
                    raise AdapterNotFound(model, name, difflib.get_close_matches(name, left, n=3))
            changed = deployed.deployment.model_copy(
                update={"backend_config": backend.model_copy(update={"lora_adapters": left})}
            )
            # An update, which begins with what was given, must not bring them back.
            given = _merged(deployed.given, {"backend_config": {"lora_adapters": left}})
            async with self._changing:
                if self.find(model) is not deployed:
                    raise InvalidRequest(f"{model!r} was changed at the same time. Send the request again.", "model")
                deployed = replace(deployed, deployment=changed, given=given)
                if self._store is not None:
                    await self._store.put(deployed.as_stored())
                self.by_name[model] = deployed
            logger.info("deleted adapters=%s model=%s", ",".join(adapters), model)
            return {"model": model}
        async with self._changing:
            self.find(model)
            if self._store is not None:
                await self._store.delete(model)
            self._forget(model)
        n_aborted = await self._abort(model) if force else 0
        n_running = 0 if force else sum(instance.n_requests for instance in self._leaving(model))
        return {"model": model, "n_running": n_running, "n_aborted": n_aborted}

    def _leaving(self, model: str) -> list[InstanceView]:
        """Instances of a model that is not deployed any more, with requests that may finish."""
        return [instance for instance in self._controller.instances_of(model) if instance.n_requests]

    async def _abort(self, model: str) -> int:
        """End the requests of a model that is not deployed any more; returns how many there were."""
        logger.info("aborted requests of deleted model=%s", model)
        error = ModelDeleted(model).as_wire()
        asked = [self.ask(instance.worker, "sllm_abort", instance=instance.id, error=error) for instance in self._leaving(model)]
        return sum(reply.get("n_aborted", 0) for reply in await asyncio.gather(*asked))

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

    async def worker_joined(self, worker: str) -> None:
        """A worker looks which of the deployed checkpoints are on its own disk, and gets those that it is to have."""
        await self._look_for(worker)
        view = self._controller.workers.get(worker)
        if view is not None:
            await asyncio.gather(
                *(self._bring(worker, view.name, deployed.deployment) for deployed in list(self.by_name.values()))
            )

    # --- on the workers ---

    async def _inspect(self, deployment: Deployment) -> dict[str, Any]:
        """What the workers that may run the model say of its checkpoint; the first error, if none of them can serve it.

        All are asked, since each tells by it whether the files are on its own disk. If they are on nobody's, one fetches them.
        """
        deadline = time.monotonic() + self._settings.scheduler.worker_wait
        while not self.allowed(deployment):
            self.joined.clear()
            try:
                await asyncio.wait_for(self.joined.wait(), deadline - time.monotonic())
            except TimeoutError:
                nodes = deployment.placement_config.nodes
                who = f"its nodes {', '.join(nodes)} are not connected" if nodes else "no worker is connected"
                hint = "Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin"
                raise NoWorker(deployment.model, f"{who}. {hint}") from None
        allowed = [worker.address for worker in self.allowed(deployment)]
        backend = deployment.backend_config
        choice: dict[str, Any] = {
            "task": backend.wanted_task,
            "pooling": backend.pooling,
            "normalize": backend.normalize,
            "backend": deployment.backend,
        }
        asked = [self.ask(worker, "sllm_inspect", source=deployment.source, fetch=False, **choice) for worker in allowed]
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
                reply = await self.ask(worker, "sllm_inspect", FETCH_S, source=deployment.source, fetch=True, **choice)
                if "error" not in reply:
                    return reply
                raise from_wire(reply)
        raise reasons[0]

    async def _inspect_adapters(self, deployment: Deployment) -> None:
        """Raise what is wrong with one of the deployment's adapters, as a worker that may run its model sees it."""
        for name, source in (deployment.backend_config.lora_adapters or {}).items():
            reply: dict[str, Any] = {}
            for worker in self.allowed(deployment):
                arguments = {"name": name, "source": source, "base": deployment.source, "backend": deployment.backend}
                reply = await self.ask(worker.address, "sllm_inspect_adapter", FETCH_S, **arguments)
                if "error" not in reply:
                    break
            if "error" in reply:
                raise from_wire(reply)

    def _forget(self, model: str, *, replaced: bool = False) -> None:
        deployed = self.by_name.pop(model)
        self.unserved.pop(model, None)
        if not replaced:
            self.pins.pop(model, None)
        source = deployed.deployment.source
        logger.info("deleted model=%s", model)
        self._on(ev.ModelDeleted(time.monotonic(), model, replaced))
        if self._is_wanted(source):
            return
        for worker in self._controller.workers.values():
            if worker.residency.get(source) in (Tier.HOST, Tier.DISK):
                self._effects.start(self._forget_on(worker.address, source))

    # --- where the operator wants it ---

    def _bring_to_nodes(self, deployment: Deployment) -> list[str]:
        """Begin to bring the checkpoint where `local_disk` and `memory_pool` say; returns what has to wait."""
        by_name = {worker.name: worker.address for worker in self._controller.workers.values()}
        spec = deployment.placement_config
        for name in {*spec.local_disk, *spec.memory_pool, *self.pins.get(deployment.model, ())} & by_name.keys():
            self._effects.start(self._bring(by_name[name], name, deployment))
        return [
            f"placement_config.{field}: node {node!r} is not connected; it gets the checkpoint when it joins"
            for field, nodes in (("local_disk", spec.local_disk), ("memory_pool", spec.memory_pool))
            for node in nodes
            if node not in by_name
        ]

    async def _bring(self, worker: str, name: str, deployment: Deployment) -> None:
        """Bring a checkpoint to the disk of a worker, or to its memory, or pin it there, as the operators want it."""
        spec = deployment.placement_config
        if name in spec.local_disk:
            await self._bring_by("sllm_pull", worker, deployment)
        if name in self.pins.get(deployment.model, ()):
            await self._bring_by("sllm_pin", worker, deployment, pinned=True)
        elif name in spec.memory_pool:
            await self.preload_on(worker, deployment)

    async def preload_on(self, worker: str, deployment: Deployment) -> None:
        """Bring the checkpoint to host memory there."""
        await self._bring_by("sllm_preload", worker, deployment)

    async def _bring_by(self, op: str, worker: str, deployment: Deployment, **arguments: Any) -> None:
        peers = self._peers(deployment.source, worker)
        reply = await self.ask(worker, op, FETCH_S, source=deployment.source, peers=peers, **arguments)
        what = op.removeprefix("sllm_")
        if "error" in reply:
            logger.warning("%s failed model=%s worker=%s cause=%s", what, deployment.model, worker, from_wire(reply).message)
        if not self._is_wanted(deployment.source):  # it was deleted meanwhile
            await self._forget_on(worker, deployment.source)

    async def pin(self, model: str, workers: Sequence[WorkerView]) -> None:
        """Have the model's host copy on `workers`, and keep it; raises what the first that cannot says, and pins nothing more."""
        deployment = self.find(model).deployment
        for worker in workers:
            peers = self._peers(deployment.source, worker.address)
            reply = await self.ask(worker.address, "sllm_pin", FETCH_S, source=deployment.source, pinned=True, peers=peers)
            if "error" in reply:
                raise from_wire(reply)
            if not self._is_wanted(deployment.source):
                await self._forget_on(worker.address, deployment.source)
                raise ModelNotFound(model)
            try:
                await self._keep_pins(model, self.pins.get(model, set()) | {worker.name})
            except SllmError:
                await self._unpin_on(worker, deployment.source)
                raise

    async def unpin(self, model: str, names: Collection[str]) -> None:
        """Let the host copy on the nodes of those `names` be evicted again, unless another model keeps it there."""
        deployment = self.find(model).deployment
        await self._keep_pins(model, self.pins.get(model, set()) - set(names))
        for worker in [worker for worker in self._controller.workers.values() if worker.name in names]:
            await self._unpin_on(worker, deployment.source)

    async def _unpin_on(self, worker: WorkerView, source: str) -> None:
        others = [other for other, nodes in self.pins.items() if worker.name in nodes]
        if all(self.by_name[other].deployment.source != source for other in others):
            await self.ask(worker.address, "sllm_pin", source=source, pinned=False)

    async def _keep_pins(self, model: str, nodes: set[str]) -> None:
        async with self._changing:
            self.find(model)
            if self._store is not None:
                await self._store.pin(model, nodes)
            self.pins[model] = nodes
            self._tell_of_pins(model)

    def _tell_of_pins(self, model: str) -> None:
        """Front doors are told of it, and the controller if it makes a difference there."""
        view = self._controller.models.get(model)
        if view is not None:
            self._on(ev.ModelDeployed(time.monotonic(), replace(view, pinned=bool(self.pins.get(model)))))

    def _is_wanted(self, source: str) -> bool:
        return any(deployed.deployment.source == source for deployed in self.by_name.values())

    async def _forget_on(self, worker: str, source: str) -> None:
        await self.ask(worker, "sllm_forget", source=source)


def _for_its_task(asked: Deployment, embedding: Any) -> Deployment:
    """What a deployment is for is known once its checkpoint was seen, also to who loads it."""
    backend = asked.backend_config.model_copy(update={"task": "embed" if embedding else "generate"})
    return asked.model_copy(update={"backend_config": backend})


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `given`, section by section; LoRA adapters are one value, not a section."""
    merged = dict(given)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and key != "lora_adapters":
            value = _merged(old, value)
        merged[key] = value
    return merged
