"""The front door's HTTP application: routes, the life of a request, starting and stopping."""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from aiohttp import web

from sllmdask.cluster.journal import Embedded, EmbedRequest, GatewayEvent, GenerateRequest, Started
from sllmdask.config import ServerSettings
from sllmdask.engine.grammar import check_grammar
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import ConfigError, EngineError, PortInUse, Unavailable, WrongTask
from sllmdask.server import adapters, embeddings, exchange, openai, stream
from sllmdask.server.admin import Admin, Cluster
from sllmdask.server.choices import make_writer
from sllmdask.server.lookout import Lookout, Watched
from sllmdask.server.metrics import FrontDoorMetrics, Watch

#: Characters from which on tokenising has a thread of its own: below, it holds the loop for less than a token's time.
LONG_PROMPT_CHARS = 20_000
#: Bytes of vectors from which on writing them as JSON has a thread of its own.
LONG_ANSWER_BYTES = 100_000
#: Seconds that running requests have to end when the server stops.
STOP_GRACE_S = 5.0
#: A slash between two parts of a route, and not one in the pattern of a part.
_SLASH = re.compile(r"/(?![^{]*\})")


class Gateway(Cluster, Watched, Protocol):
    """What the front door needs of ``cluster.gateway.Gateway``; a test may bring another one."""

    async def tokenizer(self, model: str) -> Tokenizer: ...

    def max_model_len(self, model: str) -> int: ...

    def resolve(self, model: str, adapter: str | None) -> tuple[str, tuple[str, str] | None]:
        """The deployment that a request names, and name and source of its adapter; see ``Gateway.resolve``."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GatewayEvent, None]:
        """Closing the generator cancels the request, wherever it is."""
        ...

    def embedding(self, model: str) -> dict[str, Any] | None:
        """How the model makes embeddings, an ``EmbeddingInfo`` as plain types; ``None``: it generates text."""
        ...

    def embed(self, request: EmbedRequest) -> AsyncGenerator[GatewayEvent, None]: ...


class FrontDoor:
    """The OpenAI routes over one gateway. A request lives exactly as long as its handler: when the client leaves, aiohttp
    cancels the handler, which closes the gateway's generator, which stops the engine's work."""

    def __init__(self, gateway: Gateway, settings: ServerSettings, metrics: FrontDoorMetrics) -> None:
        self._gateway = gateway
        self._settings = settings
        self._metrics = metrics
        #: Handlers of running requests, by the ids that the gateway knows them by.
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._stopping = False

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, openai.read_chat)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, openai.read_completion)

    async def embeddings(self, request: web.Request) -> web.Response:
        """One vector for each input. Nothing is sent before all are there."""
        began_s = time.monotonic()
        ask = embeddings.read_embeddings(await exchange.read_json(request))
        info = self._gateway.embedding(ask.model)
        if info is None:
            raise WrongTask(ask.model, "generate")
        ask.check_dimensions(info)
        tokenizer = await self._gateway.tokenizer(ask.model)
        window = self._gateway.max_model_len(ask.model)
        if ask.n_chars > LONG_PROMPT_CHARS:
            inputs = await asyncio.to_thread(ask.tokenise, tokenizer, info, window)
        else:
            inputs = ask.tokenise(tokenizer, info, window)
        (request_id,) = ids = self._free_ids(exchange.request_id(request), 1)
        asked = EmbedRequest(request_id, ask.model, inputs, ask.dimensions)
        vectors: list[bytes] = [b""] * len(inputs)
        started: Started | None = None
        with self._listed(ids):
            watch = self._metrics.watch(ask.model, [asked.n_prompt_tokens], began_s)
            async with aclosing(self._events([self._gateway.embed(asked)], watch)) as events:
                async for _, event in events:
                    if isinstance(event, Embedded):
                        vectors[event.index] = event.vector
                    elif isinstance(event, Started):
                        started = event
        if not all(vectors):
            raise EngineError("The answer ended before it was complete. Send the request again.")
        headers = stream.where_headers(started) if started else None

        def made() -> web.Response:
            return exchange.answer(embeddings.answer(ask, vectors, asked.n_prompt_tokens), headers)

        return await asyncio.to_thread(made) if sum(map(len, vectors)) > LONG_ANSWER_BYTES else made()

    async def models(self, _: web.Request) -> web.Response:
        # Clients that are told no model take the first: one that generates text.
        rows = sorted(adapters.with_adapters(self._gateway.models()), key=lambda row: row.get("task") == "embed")
        return exchange.answer({"object": "list", "data": [openai.model_object(row) for row in rows]})

    async def model(self, request: web.Request) -> web.Response:
        return exchange.answer(
            openai.model_object(openai.find_model(adapters.with_adapters(self._gateway.models()), request.match_info["model"]))
        )

    async def _generate(self, request: web.Request, read: Callable[[Any], openai.Ask]) -> web.StreamResponse:
        """Everything that can be wrong with the request itself is found before the first byte of an answer."""
        began_s = time.monotonic()
        body, named = adapters.split(await exchange.read_json(request))
        ask = read(body)
        base, adapter = self._gateway.resolve(ask.model, named)
        if self._gateway.embedding(base) is not None:
            raise WrongTask(base, "embed")
        tokenizer = await self._gateway.tokenizer(base)
        ask = ask.with_defaults(tokenizer.sampling_defaults)
        if ask.sampling.grammar is not None:
            await asyncio.to_thread(check_grammar, ask.sampling.grammar, ask.grammar_field or "grammar")
        if ask.n_chars > LONG_PROMPT_CHARS:
            prompts = await asyncio.to_thread(ask.tokenise, tokenizer)
        else:
            prompts = ask.tokenise(tokenizer)
        window = self._gateway.max_model_len(base)
        # The answers to one prompt are requests of their own, which have their prompt in common.
        params = [each for prompt in prompts for each in ask.choices(len(prompt), window)]
        ids = self._free_ids(exchange.request_id(request), len(params))
        groups = [secrets.token_hex(8) if ask.n > 1 else "" for _ in prompts]
        asked = [
            GenerateRequest(each, base, prompts[i // ask.n], params[i], adapter=adapter, group=groups[i // ask.n])
            for i, each in enumerate(ids)
        ]
        writers = [
            make_writer(tokenizer, prompt, is_chat=ask.is_chat, n_top=ask.sampling.logprobs, echo=ask.echoed(i, tokenizer))
            for i, prompt in enumerate(prompts)
            for _ in range(ask.n)
        ]
        n_prompt_tokens = sum(map(len, prompts))
        shape = openai.Shape(
            is_chat=ask.is_chat,
            id=f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{exchange.fresh_id()[4:]}",
            created=int(time.time()),
            model=ask.model,
            with_usage=ask.include_usage,
        )
        with self._listed(ids):
            sources = [self._gateway.generate(each) for each in asked]
            if ask.prompt_only:
                sources = [stream.without_answer(source) for source in sources]
            # A prompt counts once, however many answers it has.
            new = [0 if i % ask.n else each.n_prompt_tokens for i, each in enumerate(asked)]
            events = self._events(sources, self._metrics.watch(base, new, began_s))
            if ask.stream:
                return await stream.respond(
                    request,
                    events,
                    shape,
                    n_prompt_tokens,
                    writers,
                    continuous_usage=ask.continuous_usage,
                    heartbeat_s=self._settings.heartbeat,
                )
            async with aclosing(events):
                choices, started = await stream.collect(events, writers)
            return exchange.answer(shape.answer(choices, n_prompt_tokens), stream.where_headers(started) if started else None)

    async def _events(
        self, sources: list[AsyncGenerator[GatewayEvent, None]], watch: Watch
    ) -> AsyncGenerator[stream.Indexed, None]:
        try:
            with watch:
                async with aclosing(stream.merge(sources)) as events:
                    async for item in events:
                        watch.saw(*item)
                        yield item
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            raise Unavailable("The front door is stopping. Send the request again.") from None

    def _free_ids(self, wanted: str, n: int) -> list[str]:
        """`n` ids that no running request has: `wanted` and its numbered kin, unless one of them is taken."""
        ids = [wanted, *(f"{wanted}-{i}" for i in range(1, n))]
        return ids if self._running.keys().isdisjoint(ids) else self._free_ids(exchange.fresh_id(), n)

    @contextmanager
    def _listed(self, ids: list[str]) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._running.update(dict.fromkeys(ids, task))
        try:
            yield
        finally:
            for request_id in ids:
                del self._running[request_id]

    async def stop(self, _: web.Application) -> None:
        """Let running requests end for a while; then end them, each with an error that says so."""
        if tasks := set(self._running.values()):
            late = (await asyncio.wait(tasks, timeout=STOP_GRACE_S))[1]
            self._stopping = True
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=STOP_GRACE_S)


def make_app(gateway: Gateway, settings: ServerSettings) -> web.Application:
    """The application; serve it with :func:`start`, which also makes disconnects cancel."""
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[exchange.answer_errors])
    app[exchange.BODY_LIMIT] = settings.max_body_bytes
    app.on_response_prepare.append(exchange.name_response)
    metrics = FrontDoorMetrics()
    door, admin, lookout = FrontDoor(gateway, settings, metrics), Admin(gateway), Lookout(gateway, settings, metrics)
    app.on_shutdown.append(door.stop)
    app.on_shutdown.append(lookout.stop)
    app.add_routes(
        [
            web.post(tolerant("/v1/chat/completions"), door.chat),
            web.post(tolerant("/v1/completions"), door.completions),
            web.post(tolerant("/v1/embeddings"), door.embeddings),
            web.get(tolerant("/v1/models"), door.models),
            web.get(tolerant("/v1/models/{model:.*[^/]}"), door.model),
            web.post(tolerant("/register"), admin.register),
            web.post(tolerant("/update"), admin.update),
            web.post(tolerant("/delete"), admin.delete),
            web.get(tolerant("/health"), admin.health),
            web.get(tolerant("/ready"), admin.ready),
            web.get(tolerant("/admin/cluster"), admin.cluster),
            web.get(tolerant("/admin/models"), admin.models),
            web.get(tolerant("/admin/requests"), lookout.requests),
            web.get(tolerant("/admin/instances"), lookout.instances),
            web.get(tolerant("/admin/explain/{name:.*[^/]}"), lookout.explain),
            web.get(tolerant("/admin/events"), lookout.events),
            web.post(tolerant("/admin/cancel"), lookout.cancel),
            web.get(tolerant("/metrics"), lookout.metrics),
            web.post(tolerant("/admin/load"), admin.load),
            web.post(tolerant("/admin/unload"), admin.unload),
            web.post(tolerant("/admin/pin"), admin.pin),
            web.post(tolerant("/admin/pull"), admin.pull),
            web.post(tolerant("/admin/migrate"), admin.migrate),
            web.post(tolerant("/admin/drain"), admin.drain),
        ]
    )
    return app


def tolerant(path: str) -> str:
    """A route like `path` that also takes doubled and trailing slashes, as clients make them by joining URLs."""
    parts = [f"{{_{i}:/+}}{part}" for i, part in enumerate(_SLASH.split(path)[1:])]
    return "/{_:/*}" + "".join(parts).removeprefix("{_0:/+}") + "{__:/*}"


async def start(app: web.Application, settings: ServerSettings) -> tuple[web.AppRunner, str]:
    """Listen; returns the runner, whose ``cleanup()`` stops it, and the URL. Port 0 takes any free port.

    Raises :class:`PortInUse`, or :class:`ConfigError` if the address cannot be listened on for another reason.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
    except OSError as error:
        await runner.cleanup()
        raise _cannot_listen(error, settings) from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return runner, f"http://{host}:{runner.addresses[0][1]}"


def check_address(settings: ServerSettings) -> None:
    """Raise what :func:`start` would raise for this address, without the time that what comes before it takes."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise _cannot_listen(error, settings) from None


def _cannot_listen(error: OSError, settings: ServerSettings) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(settings.host, settings.port)
    return ConfigError(f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}", "server.host")
