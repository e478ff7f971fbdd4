"""What a scheduler finds that it did not begin: instances of workers that join with them, and requests that nobody wants."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Coroutine, Mapping
from typing import Any

from sllmdask.actors.model_actor import InstanceFacts
from sllmdask.cluster.deployments import Deployed
from sllmdask.cluster.effects import Effects
from sllmdask.cluster.state_store import StateStore
from sllmdask.errors import StateUnwritable
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import HeldInstance, InstanceState

logger = logging.getLogger(__name__)

#: Seconds for which nothing is loaded after a restart, while workers that were there are not back.
RETURN_S = 10.0
#: Seconds for which a worker may have a request that its front door, which is connected, does not tell of.
ORPHAN_S = 10.0


class Adoption:
    """Takes over what workers have. `deployed` are the deployments by name, `doors` the front doors that are connected."""

    def __init__(self, controller: Controller, effects: Effects, deployed: Mapping[str, Deployed], doors: Container[str]) -> None:
        self._controller, self._effects, self._deployed, self._doors = controller, effects, deployed, doors
        #: Since when a worker has told of a request that nobody has claimed: by worker, instance and request.
        self._orphans: dict[tuple[str, str, str], float] = {}

    def adopt(self, worker: str, account: Mapping[str, Any]) -> tuple[HeldInstance, ...]:
        """A worker joins: what it has, which gets actors of ours."""
        found = []
        for instance, facts in account["facts"].items():
            what = InstanceFacts(
                facts["model"], facts["source"], facts["dtype"], facts["embedding"], facts["backend"], facts["n_slots"]
            )
            deployed = self._deployed.get(what.model)
            same = deployed is not None and _is_served_as(deployed, what)
            held = HeldInstance(
                instance,
                what.model,
                what.n_slots,
                what.source,
                deployed.nbytes if deployed is not None and same else facts["nbytes"],
                InstanceState(facts["state"]),
                len(facts["requests"]),
                facts["leaving"] or ("" if same or deployed is None else "replaced"),
            )
            found.append(held)
            self._effects.adopt(instance, worker, what, loading=held.state is InstanceState.LOADING)
        return tuple(found)

    def look_for_orphans(self, worker: str, account: Mapping[str, Any]) -> None:
        """Have requests ended that a front door has forgotten, by a worker's account of what it has."""
        now = time.monotonic()
        running, waiting = self._controller.running, self._controller.waiting
        orphans: dict[tuple[str, str, str], float] = {}
        late: dict[str, list[str]] = {}
        for instance, facts in account["facts"].items():
            for request, front_door in facts["requests"].items():
                if request in running or request in waiting or front_door not in self._doors:
                    continue
                key = worker, instance, request
                orphans[key] = self._orphans.get(key, now)
                if now >= orphans[key] + ORPHAN_S:
                    late.setdefault(instance, []).append(request)
        self.worker_left(worker)
        self._orphans |= orphans
        for instance, requests in late.items():
            logger.warning("end requests=%s instance=%s cause=their front door does not know them", ",".join(requests), instance)
            self._effects.start(self._give_back(worker, instance, requests))

    def worker_left(self, worker: str) -> None:
        self._orphans = {key: since for key, since in self._orphans.items() if key[0] != worker}

    async def _give_back(self, worker: str, instance: str, requests: list[str]) -> None:
        await self._effects.ask(worker, "sllm_give_back", instance=instance, requests=requests)


class WorkerNames:
    """The names of the workers that are there, kept for the next scheduler. `start` runs something in the background."""

    def __init__(self, store: StateStore | None, start: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._store, self._start = store, start

    def joined(self, name: str) -> None:
        if self._store is not None:
            self._start(_logged(self._store.worker_joined(name)))

    def left(self, name: str) -> None:
        if self._store is not None:
            self._start(_logged(self._store.worker_left(name)))

    async def close(self) -> None:
        """The scheduler ends in good order, and its workers with it."""
        store, self._store = self._store, None
        if store is not None:
            await _logged(store.all_workers_left())


async def _logged(writing: Coroutine[Any, Any, None]) -> None:
    try:
        await writing
    except StateUnwritable as error:
        logger.error("%s", error.message)


def _is_served_as(deployed: Deployed, what: InstanceFacts) -> bool:
    """Whether an instance is one of what its model's name stands for now."""
    deployment = deployed.deployment
    backend = deployment.backend_config
    now = (deployment.source, backend.torch_dtype, backend.embedding, deployment.backend)
    return now == (what.source, what.dtype, what.embedding, what.backend)
