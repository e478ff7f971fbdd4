"""The Dask actor of one instance. It is thin on purpose: the engine lives in the worker's registry, so that losing the actor's
client or the scheduler does not unload weights; an actor created again adopts the engine that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import get_worker

from sllmdask.actors.handle import only_ours

if TYPE_CHECKING:  # the scheduler imports this module to create actors, and has no use for torch
    from sllmdask.actors.instances import Instance, InstanceRegistry

#: Where a worker keeps its registry: ``worker.extensions[EXTENSION]``.
EXTENSION = "sllmdask"


class ModelActor:
    """Every method is ``async`` and returns to the loop soon: Dask runs the plain methods of all actors on one thread."""

    def __init__(
        self, instance: str, model: str, source: str, dtype: str, embedding: dict[str, Any] | None, backend: str
    ) -> None:
        registry: InstanceRegistry = get_worker().extensions[EXTENSION]
        self._registry = registry
        self._instance: Instance = registry.adopt_or_create(instance, model, source, dtype, embedding, backend)

    @only_ours
    async def load(self, peers: list[str]) -> dict[str, Any]:
        return await self._instance.load(peers)

    @only_ours
    async def unload(self, forget: bool) -> None:
        await self._registry.unload(self._instance.id, forget)
