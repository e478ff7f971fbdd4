"""Operators' routes: deployments, and what the cluster is doing."""

from __future__ import annotations

from typing import Any, Protocol

from aiohttp import web

from sllmdask.config import Deployment, parse
from sllmdask.errors import InvalidRequest, Unavailable
from sllmdask.server import exchange


class Cluster(Protocol):
    """What operators ask of the gateway."""

    @property
    def ready(self) -> bool: ...

    @property
    def not_ready_reason(self) -> str: ...

    def models(self) -> list[dict[str, Any]]: ...

    def requests(self) -> list[dict[str, Any]]: ...

    async def cluster(self) -> dict[str, Any]: ...

    async def register(self, deployment: Deployment) -> dict[str, Any]: ...

    async def delete(self, model: str) -> None: ...


class Admin:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Cluster) -> None:
        self._gateway = gateway

    async def register(self, request: web.Request) -> web.Response:
        """Deploy a model, as ServerlessLLM's clients send it."""
        deployment = parse(Deployment, await exchange.read_json(request), "the deployment")
        registered = await self._gateway.register(deployment)
        return exchange.answer({"status": "ok", **registered})

    async def delete(self, request: web.Request) -> web.Response:
        body = await exchange.read_json(request)
        model = body.get("model") if isinstance(body, dict) else None
        if not isinstance(model, str) or not model:
            raise InvalidRequest("model must be the name of the model to delete.", "model")
        if unknown := sorted(body.keys() - {"model"}):
            raise InvalidRequest(f"Unknown field {unknown[0]!r}; a deletion has only 'model'.", unknown[0])
        await self._gateway.delete(model)
        return exchange.answer({"status": f"deleted model {model}"})

    async def cluster(self, _: web.Request) -> web.Response:
        return exchange.answer(await self._gateway.cluster())

    async def models(self, _: web.Request) -> web.Response:
        return exchange.answer({"models": self._gateway.models()})

    async def requests(self, _: web.Request) -> web.Response:
        return exchange.answer({"requests": self._gateway.requests()})

    async def health(self, _: web.Request) -> web.Response:
        """The process is up and its loop turns."""
        return exchange.answer({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        """Work can be placed."""
        if not self._gateway.ready:
            raise Unavailable(self._gateway.not_ready_reason)
        return exchange.answer({"status": "ready"})
