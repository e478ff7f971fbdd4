"""Typed calls to a model's actor: the one place that knows how Dask says that a worker is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from distributed.core import ConnectionPool

from sllmdask.errors import EngineError, SllmError, WorkerLost

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def only_ours(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Around a public actor method: only :class:`SllmError` leaves. Raw, a fault of torch and a lost worker look alike."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except SllmError:
            raise
        except Exception as error:
            raise EngineError(f"{type(self).__name__}.{method.__name__}: {error!r}") from error

    functools.update_wrapper(call, method)
    return call


def actor_key(instance: str) -> str:
    """The Dask key of an instance's actor: deterministic, so that creating it twice gives one actor."""
    return f"sllm/{instance}"


def adopted_key(instance: str, n: int) -> str:
    """The key of the actor of an instance that was there before: the one of its first actor may be known as lost."""
    return f"{actor_key(instance)}#{n}"


class ModelHandle:
    """Calls to the :class:`~sllmdask.actors.model_actor.ModelActor` of one instance, by its Dask key.

    It speaks Dask's own actor protocol over `pool` instead of through an ``Actor`` proxy: a proxy needs a default client in
    the process, and its futures never resolve when a reply cannot be read.
    """

    def __init__(self, key: str, worker: str, pool: ConnectionPool) -> None:
        self.key, self.worker = key, worker
        self._pool = pool

    async def load(self, peers: list[str]) -> dict[str, Any]:
        """Make the model ready, from `peers` (``host:port``) if it is not on its node; returns ``loaded_from`` and ``nbytes``."""
        return await self._call("load", peers)

    async def unload(self, forget: bool) -> None:
        """Stop the engine and free the device; `forget` also drops the host copy."""
        await self._call("unload", forget)

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            reply = await self._pool(self.worker).actor_execute(actor=self.key, function=method, args=list(args), kwargs={})
        except (OSError, KeyError, RuntimeError) as error:  # KeyError: the worker restarted and knows the actor no more
            raise WorkerLost(self.worker) from error
        if reply["status"] == "OK":
            return reply["result"]
        failure = reply["exception"]
        raise failure if isinstance(failure, SllmError) else WorkerLost(self.worker)
