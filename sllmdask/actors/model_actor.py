"""The Dask actor of one instance. It is thin on purpose: the engine lives in the worker's registry, so that losing the actor's
client or the scheduler does not unload weights; an actor created again adopts the engine that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed import get_worker

from sllmdask.actors.handle import only_ours
from sllmdask.errors import InstanceGone

if TYPE_CHECKING:  # the scheduler imports this module to create actors, and has no use for torch
    from sllmdask.actors.instances import Instance, InstanceRegistry

#: Where a worker keeps its registry: ``worker.extensions[EXTENSION]``.
EXTENSION = "sllmdask"


@dataclass(frozen=True)
class InstanceFacts:
    """What an instance is an instance of: a model, its source, how it is served, and the slots that it takes."""

    model: str
    source: str
    dtype: str
    #: How it makes its vectors; ``None``: it generates text.
    embedding: dict[str, Any] | None
    backend: str
    n_slots: int = 1


class ModelActor:
    """Every method is ``async`` and returns to the loop soon: Dask runs the plain methods of all actors on one thread."""

    def __init__(self, instance: str, what: InstanceFacts, adopt: bool = False) -> None:
        """To `adopt` is not to create: raises :class:`InstanceGone` if the worker does not have it any more."""
        registry: InstanceRegistry = get_worker().extensions[EXTENSION]
        if adopt and registry.instance(instance) is None:
            raise InstanceGone(instance)
        self._registry = registry
        self._instance: Instance = registry.adopt_or_create(
            instance, what.model, what.source, what.dtype, what.embedding, what.backend, what.n_slots
        )

    @only_ours
    async def load(self, peers: list[str]) -> dict[str, Any]:
        return await self._instance.load(peers)

    @only_ours
    async def unload(self, forget: bool) -> None:
        await self._registry.unload(self._instance.id, forget)
