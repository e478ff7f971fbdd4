"""Routes that let operators see what the control plane does: why, what, how much. And the one that ends a request."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Protocol

from aiohttp import web

from sllmdask.config import ServerSettings
from sllmdask.errors import InvalidRequest, SllmError, Unavailable
from sllmdask.server import exchange, openai, stream
from sllmdask.server.metrics import ClusterFamilies, FrontDoorMetrics, render

#: Seconds that the scheduler may hold a question for events back when there are none.
WAIT_S = 10.0
#: Largest value of `last`.
MAX_LAST = 100_000


class Watched(Protocol):
    """What the routes ask of the gateway; see :class:`sllmdask.cluster.lookout.Lookout`."""

    def models(self) -> list[dict[str, Any]]: ...

    async def cluster(self) -> dict[str, Any]: ...

    async def all_requests(self) -> list[dict[str, Any]]: ...

    async def explain(self, name: str) -> dict[str, Any]: ...

    async def events(self, since: int, model: str | None, last: int | None, wait_s: float) -> dict[str, Any]: ...

    async def families(self) -> list[dict[str, Any]]: ...

    async def cancel(self, request: str) -> dict[str, Any]: ...


class Lookout:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Watched, settings: ServerSettings, metrics: FrontDoorMetrics) -> None:
        self._gateway, self._settings, self._metrics = gateway, settings, metrics
        self._cluster = ClusterFamilies(gateway.families)
        #: Handlers of those who follow events.
        self._followers: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def requests(self, _: web.Request) -> web.Response:
        """Requests of all front doors: under way, then ended."""
        return exchange.answer({"requests": await self._gateway.all_requests()})

    async def instances(self, _: web.Request) -> web.Response:
        """Instances of all models, with the node of each."""
        workers = (await self._gateway.cluster())["workers"]
        rows = [{**instance, "node": worker["name"]} for worker in workers for instance in worker["instances"]]
        return exchange.answer({"instances": sorted(rows, key=lambda row: (row["model"], row["instance"]))})

    async def explain(self, request: web.Request) -> web.Response:
        """Why a request or a model is served as it is, and what really happened."""
        return exchange.answer(await self._gateway.explain(request.match_info["name"]))

    async def cancel(self, request: web.Request) -> web.Response:
        """End a request; its client is told so."""
        body = await exchange.read_json(request)
        if not isinstance(body, dict) or set(body) != {"request"} or not isinstance(body["request"], str) or not body["request"]:
            raise InvalidRequest('The body must be {"request": ID}, with the x-request-id of the request.', "request")
        return exchange.answer(await self._gateway.cancel(body["request"]))

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        own = self._metrics.families(row["model"] for row in self._gateway.models())
        cluster = await self._cluster.families()
        return render([*own, *cluster])

    async def events(self, request: web.Request) -> web.StreamResponse:
        """What the control plane does, as server-sent events: the recent ones, then each as it comes."""
        since = _number(request, "since")
        if since is None:
            since = _last_seen(request)
        last = _number(request, "last", MAX_LAST)
        model = request.query.get("model") or None
        follow = _flag(request, "follow", default=True)
        for name in request.query:
            if name not in ("since", "last", "model", "follow"):
                raise InvalidRequest(f"Unknown parameter {name!r}. Known are since, last, model and follow.", name)
        # What can be refused is refused before the status is sent.
        page = await self._gateway.events(since or 0, model, last, 0.0)
        sse = stream.Sse(request, self._settings.heartbeat)
        await sse.open({})
        task = asyncio.current_task()
        assert task is not None
        self._followers.add(task)
        try:
            if since and not page["complete"]:
                await sse.send(stream.comment("some events after the one that you saw last are not kept any more"))
            await self._send(sse, page["events"])
            while follow or page["events"]:
                wait_s = WAIT_S if follow else 0.0
                page = await self._gateway.events(page["next"], model, None, wait_s)
                if not page["complete"]:
                    raise Unavailable("You read too slowly: events were dropped. Connect again for those that are kept.")
                await self._send(sse, page["events"])
        except ConnectionError:  # the reader left
            pass
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            task.uncancel()
            with suppress(ConnectionError):
                await sse.send(stream.frame(openai.envelope(Unavailable("The front door is stopping."))))
        except SllmError as error:
            with suppress(ConnectionError):
                await sse.send(stream.frame(openai.envelope(error)))
        finally:
            self._followers.discard(task)
            response = await sse.close()
        return response

    async def _send(self, sse: stream.Sse, rows: list[dict[str, Any]]) -> None:
        if rows:
            sse.status = "no events"
            await sse.send(b"".join(b"id: %d\n" % row["id"] + stream.frame(row) for row in rows))

    async def stop(self, _: web.Application) -> None:
        """Tell those who follow that there will be no more."""
        self._stopping = True
        for task in self._followers:
            task.cancel()


def _number(request: web.Request, name: str, most: int = 2**62) -> int | None:
    """A query parameter that counts; ``None``: it is not given."""
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 19 or int(text) > most:
        raise InvalidRequest(f"{name} must be a whole number of at most {most}, not {text[:40]!r}.", name)
    return int(text)


def _last_seen(request: web.Request) -> int | None:
    """What a browser's EventSource sends when it connects again."""
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _flag(request: web.Request, name: str, *, default: bool) -> bool:
    text = request.query.get(name, str(default)).lower()
    if text not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name} must be true or false, not {text[:40]!r}.", name)
    return text in ("true", "1")
