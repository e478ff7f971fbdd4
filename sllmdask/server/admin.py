"""Operators' routes: deployments, and what the cluster is doing."""

from __future__ import annotations

import difflib
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

    async def cluster(self) -> dict[str, Any]: ...

    async def register(self, deployment: Deployment) -> dict[str, Any]: ...

    async def update(self, model: str, changes: dict[str, Any]) -> dict[str, Any]: ...

    async def delete(self, model: str, adapters: list[str] | None = None, force: bool = False) -> dict[str, Any]: ...

    async def load(self, model: str, node: str | None, tier: str, wait: bool) -> dict[str, Any]: ...

    async def unload(self, model: str, node: str | None, wait: bool) -> dict[str, Any]: ...

    async def pin(self, model: str, node: str | None, pinned: bool) -> dict[str, Any]: ...

    async def pull(self, model: str | None, source: str | None, node: str | None, wait: bool) -> dict[str, Any]: ...

    async def migrate(
        self, request: str | None, instance: str | None, to: str, kind: str | None, wait: bool
    ) -> dict[str, Any]: ...

    async def drain(self, node: str, wait: bool, undo: bool) -> dict[str, Any]: ...


class Admin:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Cluster) -> None:
        self._gateway = gateway

    async def register(self, request: web.Request) -> web.Response:
        """Deploy a model, as ServerlessLLM's clients send it."""
        deployment = parse(Deployment, await exchange.read_json(request), "the deployment")
        registered = await self._gateway.register(deployment)
        return exchange.answer({"status": "ok", **registered})

    async def update(self, request: web.Request) -> web.Response:
        """Change some settings of a model, as ServerlessLLM's clients send it: those that are given."""
        body = await exchange.read_json(request)
        if not isinstance(body, dict):
            raise InvalidRequest("The body must be a JSON object.")
        updated = await self._gateway.update(_name(body.get("model"), "model"), body)
        return exchange.answer({"status": "ok", **updated})

    async def delete(self, request: web.Request) -> web.Response:
        """Take a model away, or only some of its LoRA adapters, as ServerlessLLM's clients send it."""
        model, adapters, force = _read(await exchange.read_json(request), ("model", "lora_adapters", "force"))
        force = force is not None and _flag(force, "force")
        if adapters is None:
            deleted = await self._gateway.delete(_name(model, "model"), force=force)
            return exchange.answer({"status": f"deleted model {model}", **deleted})
        if not isinstance(adapters, list | dict) or not adapters or not all(isinstance(name, str) for name in adapters):
            raise InvalidRequest("lora_adapters must be a list of names of adapters.", "lora_adapters")
        await self._gateway.delete(_name(model, "model"), list(adapters))
        return exchange.answer({"status": f"deleted adapters {', '.join(adapters)} of model {model}"})

    async def load(self, request: web.Request) -> web.Response:
        """Make a model ready, or bring it to host memory, before anybody asks for it."""
        model, node, tier, wait = _read(await exchange.read_json(request), ("model", "node", "tier", "wait"))
        if tier not in (None, "device", "host"):
            raise InvalidRequest(f"tier must be 'device' or 'host', not {tier!r}.", "tier")
        loaded = await self._gateway.load(_name(model, "model"), _node(node), tier or "device", _flag(wait))
        return exchange.answer(loaded, status=202 if loaded["state"] == "loading" else 200)

    async def unload(self, request: web.Request) -> web.Response:
        """Take a model from the devices."""
        model, node, wait = _read(await exchange.read_json(request), ("model", "node", "wait"))
        unloaded = await self._gateway.unload(_name(model, "model"), _node(node), _flag(wait))
        return exchange.answer(unloaded, status=202 if unloaded["state"] == "unloading" else 200)

    async def pin(self, request: web.Request) -> web.Response:
        """Keep a model's host copy on a node, or, ``"pinned": false``, let it be evicted again."""
        model, node, pinned = _read(await exchange.read_json(request), ("model", "node", "pinned"))
        return exchange.answer(await self._gateway.pin(_name(model, "model"), _node(node), _flag(pinned, "pinned")))

    async def pull(self, request: web.Request) -> web.Response:
        """Bring a checkpoint's files to a node's disk."""
        model, source, node, wait = _read(await exchange.read_json(request), ("model", "source", "node", "wait"))
        if (model is None) == (source is None):
            raise InvalidRequest("Give either 'model', the name of a deployed model, or 'source', a directory or an id.", "model")
        model = None if model is None else _name(model, "model")
        source = None if source is None else _name(source, "source")
        pulled = await self._gateway.pull(model, source, _node(node), _flag(wait))
        return exchange.answer(pulled, status=202 if pulled["state"] == "fetching" else 200)

    async def migrate(self, request: web.Request) -> web.Response:
        """Move a running request, or an instance with all of its requests, to another node."""
        fields = ("request", "instance", "to", "kind", "wait")
        one, instance, to, kind, wait = _read(await exchange.read_json(request), fields)
        if (one is None) == (instance is None):
            raise InvalidRequest("Give either 'request', the id of a running request, or 'instance'.", "request")
        if kind not in (None, "auto", "kv", "tokens"):
            raise InvalidRequest(f"kind must be 'auto', 'kv' or 'tokens', not {kind!r}.", "kind")
        node = _node(to)
        if node is None:
            raise InvalidRequest("to must name the node to move to.", "to")
        moved = await self._gateway.migrate(
            None if one is None else _name(one, "request"),
            None if instance is None else _name(instance, "instance"),
            node,
            None if kind == "auto" else kind,
            _flag(wait),
        )
        return exchange.answer(moved, status=202 if moved["state"] == "moving" else 200)

    async def drain(self, request: web.Request) -> web.Response:
        """Empty a node: it takes nothing new, and what it has goes elsewhere; or, ``"undo": true``, let it be."""
        node, wait, undo = _read(await exchange.read_json(request), ("node", "wait", "undo"))
        where = _node(node)
        if where is None:
            raise InvalidRequest("node must name the node to drain.", "node")
        drained = await self._gateway.drain(where, _flag(wait), undo is not None and _flag(undo, "undo"))
        return exchange.answer(drained, status=202 if drained["state"] == "draining" else 200)

    async def cluster(self, _: web.Request) -> web.Response:
        return exchange.answer(await self._gateway.cluster())

    async def models(self, _: web.Request) -> web.Response:
        return exchange.answer({"models": self._gateway.models()})

    async def health(self, _: web.Request) -> web.Response:
        """The process is up and its loop turns."""
        return exchange.answer({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        """Work can be placed."""
        if not self._gateway.ready:
            raise Unavailable(self._gateway.not_ready_reason)
        return exchange.answer({"status": "ready"})


def _read(body: Any, fields: tuple[str, ...]) -> list[Any]:
    """The values of `fields`, ``None`` where one is not given; nothing else may be."""
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    for unknown in sorted(body.keys() - set(fields)):
        near = difflib.get_close_matches(unknown, fields, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(map(repr, fields))}."
        raise InvalidRequest(f"Unknown field {unknown!r}. {hint}", unknown)
    return [body.get(field) for field in fields]


def _name(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field} must be a name, as a text that is not empty.", field)
    return value


def _node(value: Any) -> str | None:
    """Workers are named by texts that often are numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else _name(value, "node")


def _flag(value: Any, field: str = "wait") -> bool:
    """True unless it says false."""
    if value not in (None, True, False):
        raise InvalidRequest(f"{field} must be true or false.", field)
    return value is not False
