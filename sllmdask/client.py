"""The Python client: HTTP only, neither Dask nor torch.

A request is always streamed, so a :class:`GenerateFuture` has pieces of text to iterate over while it runs, knows how far the
loading of its model is (:attr:`GenerateFuture.progress`), and frees its place in the cluster the moment it is cancelled.

    client = Client("http://127.0.0.1:8343")
    future = client.submit("qwen", "Hello", max_tokens=32)
    for piece in future: print(piece, end="")         # or: async for piece in future
    future.result()                                   # the whole text
    client.gather(client.map("qwen", prompts))        # in order, at most `max_in_flight` at once

An error of the server is raised as the class of :mod:`sllmdask.errors` that its code names, and is a :class:`ServerError` too.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import urllib.parse
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import aiohttp

from sllmdask import errors
from sllmdask.errors import SllmError, Unavailable
from sllmdask.units import float32s

DEFAULT_URL = "http://127.0.0.1:8343"
#: Seconds that loading a model, or fetching it, may take: somewhat more than the server's own limit.
WORK_LIMIT_S = 7500.0

#: Inputs of one request for embeddings, and requests of one call that are under way at once.
EMBED_AT_ONCE, EMBED_IN_FLIGHT = 256, 4

#: A text, or the messages of a chat.
Prompt = str | Sequence[Mapping[str, Any]]
OnProgress = Callable[[str], None] | None
T = TypeVar("T")


# --- errors ----------------------------------------------------------------------------------------------------------


class ServerUnreachable(Unavailable):
    """``ServerUnreachable(url, reason)``: nothing answered there."""

    code = "server_unreachable"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    @property
    def message(self) -> str:
        return f"No sllmdask server answers at {self.url} ({self.reason}). Start one with `sllmdask up`, or set LLM_SERVER_URL."


class ServerError(SllmError):
    """``ServerError(http_status, envelope, request_id)``: the server's answer was an error; see the fields of the envelope."""

    def __init__(self, http_status: int, envelope: Mapping[str, Any], request_id: str | None = None) -> None:
        SllmError.__init__(self, http_status, dict(envelope), request_id)
        self.http_status = http_status
        self.type = envelope.get("type") or "server_error"
        self.code = envelope.get("code")
        self.param = envelope.get("param")
        self.request_id = request_id

    @property
    def message(self) -> str:
        return str(self.args[1].get("message") or f"The server answered with status {self.http_status}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return server_error, self.args


#: The classes that a caller may want to catch, by the code in the envelope.
_BY_CODE: dict[str | None, type[SllmError]] = {
    cls.code: cls
    for cls in (
        errors.ConfigError,
        errors.CheckpointError,
        errors.CheckpointNotFound,
        errors.CheckpointCorrupt,
        errors.CheckpointTooNew,
        errors.CheckpointExists,
        errors.TensorUnsupported,
        errors.DiskFull,
        errors.UnsupportedArchitecture,
        errors.AdapterUnsupported,
        errors.InvalidRequest,
        errors.ContextTooLong,
        errors.ModelNotFound,
        errors.ModelDeleted,
        errors.AdapterNotFound,
        errors.RecordNotFound,
        errors.WrongTask,
        errors.RouteNotFound,
        errors.MethodNotAllowed,
        errors.UnsupportedMediaType,
        errors.BodyTooLarge,
        errors.Unavailable,
        errors.QueueFull,
        errors.QueueTimeout,
        errors.NoWorker,
        errors.InsufficientMemory,
        errors.LoadFailed,
        errors.SchedulerUnreachable,
        errors.StateUnwritable,
        errors.WorkerLost,
        errors.MoveFailed,
        errors.InstanceGone,
        errors.ModelReplaced,
        errors.Cancelled,
        errors.EngineError,
    )
}
#: Each of them as a :class:`ServerError`. Under another name than its class, which :func:`sllmdask.errors.from_wire` looks up.
_SERVER_ERRORS = {code: type(f"Server{cls.__name__}", (ServerError, cls), {}) for code, cls in _BY_CODE.items()}


def server_error(http_status: int, envelope: Mapping[str, Any], request_id: str | None = None) -> ServerError:
    """The error that an envelope tells of, of the class that its code names."""
    error: ServerError = _SERVER_ERRORS.get(envelope.get("code"), ServerError)(http_status, envelope, request_id)
    return error


# --- one request -----------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """A whole answer. `usage` has OpenAI's keys; the three after it are the server's account of where and how it ran.

    `text`, `finish_reason` and `logprobs` are those of the first choice. `choices` has them all, with their ``index``; `logprobs`
    is ``None`` unless asked for, and otherwise in the shape that OpenAI gives it in a chat, or in a completion.
    """

    id: str
    model: str
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    cold_start: str | None = None
    node: str | None = None
    queue_ms: int | None = None
    logprobs: dict[str, Any] | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)


class GenerateFuture:
    """One request under way. Its blocking methods work from any thread, ``await`` and ``async for`` from any event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: str, on_progress: OnProgress) -> None:
        self._loop = loop
        self._on_progress = on_progress
        self._pieces: list[str] = []
        self._choices: dict[int, dict[str, Any]] = {}
        self._response = Response(id="", model=model)
        self._changed = asyncio.Event()
        self._outcome: Future[None] = Future()
        self._task: asyncio.Task[None] | None = None
        #: What the server last said while there was nothing to show: ``loading qwen 61% disk 2.9 GiB/s``.
        self.progress = ""

    def done(self) -> bool:
        """Whether there is a result, an error, or a cancellation."""
        return self._outcome.done()

    def cancel(self) -> bool:
        """Stop the request and free its place in the cluster; ``False`` if it had ended already."""
        if self.done():
            return False
        self._loop.call_soon_threadsafe(self._stop)
        return True

    def result(self, timeout: float | None = None) -> str:
        """The whole text; waits for at most `timeout` seconds, then raises :class:`TimeoutError`."""
        return self.response(timeout).text

    def response(self, timeout: float | None = None) -> Response:
        """The text with its usage and how it ended; see :meth:`result`."""
        self._refuse_own_thread()
        self._outcome.result(timeout)
        return self._response

    def __await__(self) -> Any:
        return self._whole().__await__()

    def __iter__(self) -> Iterator[str]:
        self._refuse_own_thread()
        n_seen = 0
        while pieces := asyncio.run_coroutine_threadsafe(self._after(n_seen), self._loop).result():
            n_seen += len(pieces)
            yield from pieces
        self._outcome.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        n_seen = 0
        while pieces := await self._anywhere(self._after(n_seen)):
            n_seen += len(pieces)
            for piece in pieces:
                yield piece
        self._outcome.result()

    async def _whole(self) -> str:
        # Shielded: who gives up waiting does not thereby cancel the outcome that others wait for.
        await asyncio.shield(asyncio.wrap_future(self._outcome))
        return self._response.text

    async def _anywhere(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if asyncio.get_running_loop() is self._loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _refuse_own_thread(self) -> None:
        try:
            own = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            own = False
        if own and not self.done():
            raise RuntimeError("This would block the loop that the request runs on: use `await future` or `async for`.")

    # Below: only on the client's loop.

    async def _after(self, n_seen: int) -> list[str]:
        """The pieces after the first `n_seen`, when there are any; none at the end."""
        while len(self._pieces) <= n_seen and not self.done():
            self._changed.clear()
            await self._changed.wait()
        return self._pieces[n_seen:]

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _take(self, part: Mapping[str, Any]) -> None:
        """What one chunk says of one choice."""
        fresh: dict[str, Any] = {"index": part["index"], "text": [], "finish_reason": None, "logprobs": None}
        choice = self._choices.setdefault(part["index"], fresh)
        choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
        if told := part.get("logprobs"):
            choice["logprobs"] = choice["logprobs"] or {}
            for name, values in told.items():
                if values is None:
                    choice["logprobs"].setdefault(name, None)
                else:
                    choice["logprobs"].setdefault(name, []).extend(values)
        if text := part.get("text") or part.get("delta", {}).get("content"):
            choice["text"].append(text)
            if part["index"] == 0:
                self._pieces.append(text)
                self._changed.set()

    def _say(self, progress: str) -> None:
        self.progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._response.text = "".join(self._pieces)
        self._response.choices = [choice | {"text": "".join(choice["text"])} for _, choice in sorted(self._choices.items())]
        if 0 in self._choices:
            self._response.finish_reason = self._choices[0]["finish_reason"]
            self._response.logprobs = self._choices[0]["logprobs"]
        if task.cancelled():
            self._outcome.set_exception(errors.Cancelled("The request was cancelled by its client."))
        elif (error := task.exception()) is not None:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(None)
        self._changed.set()


# --- clients ---------------------------------------------------------------------------------------------------------


class AsyncClient:
    """A client for one event loop. :meth:`submit` and :meth:`map` return futures at once; the rest are coroutines.

    `url` defaults to ``LLM_SERVER_URL``; `timeout` is in seconds between two signs of life of the server, heartbeats included.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.url = (url or os.environ.get("LLM_SERVER_URL") or DEFAULT_URL).rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._futures: set[GenerateFuture] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is still running, and close the connections."""
        running = [future._task for future in self._futures if future._task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def submit(
        self, model: str, prompt: Prompt, *, chat: bool = True, on_progress: OnProgress = None, **params: Any
    ) -> GenerateFuture:
        """Ask `model`. A text is one turn of a chat, or with ``chat=False`` the beginning of a text to go on with; a list holds
        a chat's messages. `params` are the fields of the body: ``max_tokens``, ``temperature``, ``seed``, ``stop``,
        ``response_format``...; ``logprobs=3`` asks for the three likeliest tokens beside each one, in a chat too. With ``n=2``
        the pieces and the text are those of the first choice, and :attr:`Response.choices` has both. `on_progress` is called on
        the client's thread with what :attr:`GenerateFuture.progress` becomes."""
        return self._submit(model, prompt, chat, params, None, on_progress)

    def map(
        self, model: str, prompts: Iterable[Prompt], *, max_in_flight: int = 32, chat: bool = True, **params: Any
    ) -> list[GenerateFuture]:
        """Ask `model` each of `prompts`, at most `max_in_flight` at once; the futures are in the order of the prompts."""
        if max_in_flight < 1:
            raise errors.ConfigError(f"max_in_flight must be at least 1, not {max_in_flight}.", "max_in_flight")
        turn = asyncio.Semaphore(max_in_flight)
        return [self._submit(model, prompt, chat, params, turn) for prompt in prompts]

    async def gather(self, futures: Iterable[GenerateFuture]) -> list[str]:
        """The texts of `futures`, in order; the first failure cancels the others and is raised."""
        futures = list(futures)
        try:
            return list(await asyncio.gather(*(future._whole() for future in futures)))
        finally:
            for future in futures:
                future.cancel()

    async def stream(self, model: str, prompt: Prompt, *, chat: bool = True, **params: Any) -> AsyncIterator[str]:
        """The answer piece by piece; leaving the loop early cancels the request."""
        future = self.submit(model, prompt, chat=chat, **params)
        try:
            async for piece in future:
                yield piece
        finally:
            future.cancel()

    async def embed(
        self, model: str, inputs: str | Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None, **params: Any
    ) -> list[list[float]]:
        """The vectors of `inputs`, a text, texts, or lists of token ids, in their order; of a text, a list of one.

        As many inputs as there are: they are sent :data:`EMBED_AT_ONCE` at a time. `params` are other fields of the request:
        ``prompt_name``, ``max_length``...
        """
        asked = [inputs] if isinstance(inputs, str) else list(inputs)
        body = {"model": model, "encoding_format": "base64", "dimensions": dimensions, **params}
        turn = asyncio.Semaphore(EMBED_IN_FLIGHT)

        async def ask(part: list[Any]) -> list[list[float]]:
            async with turn:
                answered = await self.call("POST", "/v1/embeddings", {**body, "input": part})
            return [_floats(item["embedding"]) for item in sorted(answered["data"], key=lambda item: item["index"])]

        tasks = [asyncio.create_task(ask(asked[i : i + EMBED_AT_ONCE])) for i in range(0, len(asked), EMBED_AT_ONCE)]
        try:
            return [vector for part in await asyncio.gather(*tasks) for vector in part]
        finally:
            for task in tasks:
                task.cancel()

    async def models(self) -> list[dict[str, Any]]:
        """The objects of ``GET /v1/models``."""
        listed = await self.call("GET", "/v1/models")
        return list(listed["data"])

    async def register(self, deployment: Mapping[str, Any]) -> dict[str, Any]:
        """Deploy a model from the contents of a deployment file; the answer's ``warnings`` tell what has no effect."""
        return dict(await self.call("POST", "/register", dict(deployment)))

    async def deploy(self, model: str, source: str | None = None, **fields: Any) -> dict[str, Any]:
        """Deploy `model` from `source` (a directory on the workers, a hub id); `fields` are those of a deployment file."""
        deployment = {"model": model, **fields}
        if source is not None:
            backend = {**fields.get("backend_config", {}), "pretrained_model_name_or_path": source}
            deployment["backend_config"] = backend
        return await self.register(deployment)

    async def update(self, model: str, **changes: Any) -> dict[str, Any]:
        """Change fields of a deployment, those that are given: ``auto_scaling_config={"max_instances": 2}`` for instance."""
        return dict(await self.call("POST", "/update", {"model": model, **changes}))

    async def delete(self, model: str, lora_adapters: Sequence[str] | None = None, *, force: bool = False) -> dict[str, Any]:
        """Take the deployment away, or only these of its LoRA adapters.

        Requests that run may finish, unless by `force`, or if it is deleted once more: ``n_running`` and ``n_aborted`` tell.
        """
        adapters = None if lora_adapters is None else list(lora_adapters)
        return dict(await self.call("POST", "/delete", {"model": model, "lora_adapters": adapters, "force": force}))

    async def load(self, model: str, node: str | None = None, tier: str = "device", *, wait: bool = True) -> dict[str, Any]:
        """Make a deployed model ready before anybody asks for it, or (`tier` ``"host"``) bring it to a node's host memory.

        Returns when that is done, or at once with ``wait=False``: ``model``, ``tier``, ``state``, ``node``, ``instance``,
        ``cold_start`` (``"hit"``: it was there), ``seconds``, ``keep_alive``. It goes on if the caller stops waiting. Raises
        what a request for the model would raise, and :class:`InvalidRequest` where there is no such node.
        """
        return dict(await self._work("/admin/load", {"model": model, "node": node, "tier": tier, "wait": wait}))

    async def unload(self, model: str, node: str | None = None, *, wait: bool = True) -> dict[str, Any]:
        """Take a model from the devices of `node`, or of all; what runs may end first. The host copy stays.

        Returns ``model``, ``state``, ``instances`` (those that left) and ``warnings``.
        """
        return dict(await self._work("/admin/unload", {"model": model, "node": node, "wait": wait}))

    async def pin(self, model: str, node: str | None = None, pinned: bool = True) -> dict[str, Any]:
        """Bring a model to the host memory of `node`, or of one that may run it, and keep it there until ``pinned=False``.

        Returns ``model``, ``pinned`` (all nodes that keep it), ``nodes`` (those that this was about), ``nbytes``, ``seconds``.
        """
        return dict(await self._work("/admin/pin", {"model": model, "node": node, "pinned": pinned}))

    async def pull(self, source: str, node: str | None = None, *, wait: bool = True) -> dict[str, Any]:
        """Bring the files of `source`, a deployed model's name, a directory or an id, to the disk of `node`, or of any.

        Returns ``source``, ``state``, ``node``, ``fetched``, ``nbytes``, ``seconds``.
        """
        return dict(await self._work("/admin/pull", {"source": source, "node": node, "wait": wait}))

    async def migrate(
        self,
        to: str,
        *,
        request: str | None = None,
        instance: str | None = None,
        kind: str = "auto",
        wait: bool = True,
    ) -> dict[str, Any]:
        """Move a running `request`, by its id, or an `instance` with all of its requests, to node `to`, while they are answered.

        `kind`: ``"kv"``, ``"tokens"``, or what is cheaper. Returns when that is done, or at once with ``wait=False``: ``state``,
        ``to`` and ``moves``, what became of each request. Raises :class:`InvalidRequest` for what is not there, and
        :class:`MoveFailed` if the request stays where it was.
        """
        body = {"request": request, "instance": instance, "to": to, "kind": kind, "wait": wait}
        return dict(await self._work("/admin/migrate", body))

    async def drain(self, node: str, *, wait: bool = True, undo: bool = False) -> dict[str, Any]:
        """Empty `node`: it takes nothing new, its requests move to other nodes, and what cannot move ends there.

        Returns when nothing is left on it, or at once with ``wait=False``: ``state``, ``requests`` and ``instances`` that are
        left, ``moved``, ``ended``, and ``stuck``, what cannot move and why. ``undo=True`` ends it: the node takes requests again.
        """
        return dict(await self._work("/admin/drain", {"node": node, "wait": wait, "undo": undo}))

    async def status(self) -> dict[str, Any]:
        """``url``, ``ready``, ``reason`` (why not ready), ``workers``, ``models`` and ``requests``, as operators see them."""
        reason = None
        try:
            await self.call("GET", "/ready")
        except ServerError as error:
            reason = error.message
        cluster, models, requests = await asyncio.gather(
            self.call("GET", "/admin/cluster"), self.call("GET", "/admin/models"), self.call("GET", "/admin/requests")
        )
        return {"url": self.url, "ready": reason is None, "reason": reason, **cluster, **models, **requests}

    async def requests(self) -> list[dict[str, Any]]:
        """Requests under way, then those that ended lately: ``id``, ``model``, ``state``, ``node``, ``n_tokens``..."""
        return list((await self.call("GET", "/admin/requests"))["requests"])

    async def explain(self, name: str) -> dict[str, Any]:
        """Why a request (the ``id`` of its :class:`Response`), or a model, is served as it is, and what really happened."""
        return dict(await self.call("GET", f"/admin/explain/{urllib.parse.quote(name)}"))

    async def cancel(self, request: str) -> dict[str, Any]:
        """End a request, whoever asked for it; ``cancelled`` in the answer is false if it had ended already."""
        return dict(await self.call("POST", "/admin/cancel", {"request": request}))

    async def events(
        self, since: int | None = None, *, last: int | None = None, model: str | None = None, follow: bool = True
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What the control plane does: what it did lately (after the event `since`, or the `last` few), then what comes, unless
        `follow` is false. Each has ``id``, ``time``, ``event``, ``model``, ``instance``, ``node``, ``request``, ``text``."""
        asked = {"since": since, "last": last, "model": model, "follow": str(follow).lower()}
        params = {name: str(value) for name, value in asked.items() if value is not None}
        async with _reaching(self.url), self._http().get(f"{self.url}/admin/events", params=params) as response:
            if response.status != 200:
                await _json_or_raise(response)
            async for raw in response.content:
                line = raw.decode().rstrip("\r\n")
                if line.startswith("data: "):
                    row = json.loads(line[6:])
                    if "error" in row:
                        raise server_error(200, row["error"], response.headers.get("x-request-id"))
                    yield row

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Any route by name: the JSON of its answer; raises :class:`ServerError` or :class:`ServerUnreachable`."""
        async with _reaching(self.url), self._http().request(method, self.url + path, json=body) as response:
            return await _json_or_raise(response)

    async def _work(self, path: str, body: dict[str, Any]) -> Any:
        """Post what may take long, with nothing to be heard until it is done."""
        body = {key: value for key, value in body.items() if value is not None}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout.sock_connect, sock_read=WORK_LIMIT_S)
        async with _reaching(self.url), self._http().post(self.url + path, json=body, timeout=timeout) as response:
            return await _json_or_raise(response)

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                timeout=self._timeout,
                headers=self._headers,
                connector=connector,
                read_bufsize=2**20,  # also the longest line of a stream
            )
        return self._session

    def _submit(
        self,
        model: str,
        prompt: Prompt,
        chat: bool,
        params: Mapping[str, Any],
        turn: asyncio.Semaphore | None = None,
        on_progress: OnProgress = None,
    ) -> GenerateFuture:
        future = GenerateFuture(asyncio.get_running_loop(), model, on_progress)
        body: dict[str, Any] = {"model": model, **params, "stream": True, "stream_options": {"include_usage": True}}
        path = "/v1/chat/completions"
        if not isinstance(prompt, str):
            body["messages"] = [dict(message) for message in prompt]
        elif chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/v1/completions", prompt
        wanted = body.get("logprobs")
        if "messages" in body and isinstance(wanted, int) and not isinstance(wanted, bool):
            body = {**body, "logprobs": True, "top_logprobs": wanted}
        future._begin(self._run(future, path, body, turn))
        self._futures.add(future)
        future._outcome.add_done_callback(lambda _: self._futures.discard(future))
        return future

    async def _run(self, future: GenerateFuture, path: str, body: dict[str, Any], turn: asyncio.Semaphore | None) -> None:
        if turn is not None:
            async with turn:
                return await self._run(future, path, body, None)
        async with _reaching(self.url), self._http().post(self.url + path, json=body) as response:
            if response.status != 200:
                await _json_or_raise(response)
            _note_headers(future._response, response.headers)
            future._response.id = response.headers.get("x-request-id", "")
            async for raw in response.content:
                line = raw.decode().rstrip("\r\n")
                if line.startswith(": "):
                    name, _, value = line[2:].partition(": ")
                    if name.startswith("x-sllmdask-"):
                        _note_headers(future._response, {name: value})
                    else:
                        future._say(line[2:])
                elif line == "data: [DONE]":
                    return None
                elif line.startswith("data: "):
                    _take_chunk(future, json.loads(line[6:]))
        raise _cut_short()


def _note_headers(response: Response, headers: Mapping[str, str]) -> None:
    """``x-sllmdask-*``, from the headers or, where they were known too late for those, from comments."""
    response.cold_start = headers.get("x-sllmdask-cold-start", response.cold_start)
    response.node = headers.get("x-sllmdask-node", response.node)
    if "x-sllmdask-queue-ms" in headers:
        response.queue_ms = int(headers["x-sllmdask-queue-ms"])


def _take_chunk(future: GenerateFuture, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise server_error(200, chunk["error"], future._response.id)
    if chunk.get("usage"):
        future._response.usage = chunk["usage"]
    for choice in chunk["choices"]:
        future._take(choice)


def _floats(data: str | list[float]) -> list[float]:
    """A vector as numbers, from base64 of little-endian float32, or as a server that does not know that sends it."""
    return float32s(base64.b64decode(data)) if isinstance(data, str) else data


async def _json_or_raise(response: aiohttp.ClientResponse) -> Any:
    """The JSON of a good answer; any other becomes an error, also one that is no answer of ours."""
    text = await response.text(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if response.status < 400 and body is not None:
        return body
    envelope = body.get("error") if isinstance(body, dict) else None
    if not isinstance(envelope, dict):
        envelope = {"message": f"{response.url} answered with status {response.status} and no JSON. Is it an sllmdask server?"}
    raise server_error(response.status, envelope, response.headers.get("x-request-id"))


@asynccontextmanager
async def _reaching(url: str) -> AsyncIterator[None]:
    """Tell a server that cannot be reached, falls silent or dies from one that answers with an error."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise errors.ConfigError(f"{url!r} is not a server's URL; write for example {DEFAULT_URL}.", "url")
    try:
        yield
    except aiohttp.SocketTimeoutError:
        raise TimeoutError(f"The server at {url} gave no sign of life for too long.") from None
    except aiohttp.ClientPayloadError:
        raise _cut_short() from None
    except (aiohttp.ClientError, OSError) as error:
        number = getattr(error, "errno", None) or 0
        raise ServerUnreachable(url, os.strerror(number) if number > 0 else str(error) or type(error).__name__) from None


def _cut_short() -> ServerError:
    return ServerError(502, {"message": "The server ended the stream before the answer was complete. Send the request again."})


class Client:
    """The client for ordinary code: the methods of :class:`AsyncClient`, blocking. Its connections live on their own thread."""

    def __init__(self, url: str | None = None, api_key: str | None = None, timeout: float = 600.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(url, api_key, timeout)
        self._thread = threading.Thread(target=self._loop.run_forever, name="sllmdask-client", daemon=True)
        self._thread.start()
        # Runs once: on close(), when nobody holds the client any more, or when the program ends.
        self._finalizer = weakref.finalize(self, _shut_down, self._client, self._loop, self._thread)

    @property
    def url(self) -> str:
        return self._client.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is still running, close the connections, and end the thread."""
        self._finalizer()

    def submit(
        self, model: str, prompt: Prompt, *, chat: bool = True, on_progress: OnProgress = None, **params: Any
    ) -> GenerateFuture:
        """See :meth:`AsyncClient.submit`."""
        return self._there(lambda: self._client.submit(model, prompt, chat=chat, on_progress=on_progress, **params))

    def map(
        self, model: str, prompts: Iterable[Prompt], *, max_in_flight: int = 32, chat: bool = True, **params: Any
    ) -> list[GenerateFuture]:
        """See :meth:`AsyncClient.map`."""
        asked = list(prompts)
        return self._there(lambda: self._client.map(model, asked, max_in_flight=max_in_flight, chat=chat, **params))

    def gather(self, futures: Iterable[GenerateFuture]) -> list[str]:
        """The texts of `futures`, in order; the first failure cancels the others and is raised."""
        return self._wait(self._client.gather(futures))

    def stream(self, model: str, prompt: Prompt, *, chat: bool = True, **params: Any) -> Iterator[str]:
        """The answer piece by piece; leaving the loop early cancels the request."""
        future = self.submit(model, prompt, chat=chat, **params)
        try:
            yield from future
        finally:
            future.cancel()

    def embed(
        self, model: str, inputs: str | Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None, **params: Any
    ) -> list[list[float]]:
        """See :meth:`AsyncClient.embed`."""
        return self._wait(self._client.embed(model, inputs, dimensions=dimensions, **params))

    def models(self) -> list[dict[str, Any]]:
        """The objects of ``GET /v1/models``."""
        return self._wait(self._client.models())

    def register(self, deployment: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`AsyncClient.register`."""
        return self._wait(self._client.register(deployment))

    def deploy(self, model: str, source: str | None = None, **fields: Any) -> dict[str, Any]:
        """See :meth:`AsyncClient.deploy`."""
        return self._wait(self._client.deploy(model, source, **fields))

    def update(self, model: str, **changes: Any) -> dict[str, Any]:
        """See :meth:`AsyncClient.update`."""
        return self._wait(self._client.update(model, **changes))

    def delete(self, model: str, lora_adapters: Sequence[str] | None = None, *, force: bool = False) -> dict[str, Any]:
        """See :meth:`AsyncClient.delete`."""
        return self._wait(self._client.delete(model, lora_adapters, force=force))

    def load(self, model: str, node: str | None = None, tier: str = "device", *, wait: bool = True) -> dict[str, Any]:
        """See :meth:`AsyncClient.load`."""
        return self._wait(self._client.load(model, node, tier, wait=wait))

    def unload(self, model: str, node: str | None = None, *, wait: bool = True) -> dict[str, Any]:
        """See :meth:`AsyncClient.unload`."""
        return self._wait(self._client.unload(model, node, wait=wait))

    def pin(self, model: str, node: str | None = None, pinned: bool = True) -> dict[str, Any]:
        """See :meth:`AsyncClient.pin`."""
        return self._wait(self._client.pin(model, node, pinned))

    def pull(self, source: str, node: str | None = None, *, wait: bool = True) -> dict[str, Any]:
        """See :meth:`AsyncClient.pull`."""
        return self._wait(self._client.pull(source, node, wait=wait))

    def migrate(
        self,
        to: str,
        *,
        request: str | None = None,
        instance: str | None = None,
        kind: str = "auto",
        wait: bool = True,
    ) -> dict[str, Any]:
        """See :meth:`AsyncClient.migrate`."""
        return self._wait(self._client.migrate(to, request=request, instance=instance, kind=kind, wait=wait))

    def drain(self, node: str, *, wait: bool = True, undo: bool = False) -> dict[str, Any]:
        """See :meth:`AsyncClient.drain`."""
        return self._wait(self._client.drain(node, wait=wait, undo=undo))

    def status(self) -> dict[str, Any]:
        """See :meth:`AsyncClient.status`."""
        return self._wait(self._client.status())

    def requests(self) -> list[dict[str, Any]]:
        """See :meth:`AsyncClient.requests`."""
        return self._wait(self._client.requests())

    def explain(self, name: str) -> dict[str, Any]:
        """See :meth:`AsyncClient.explain`."""
        return self._wait(self._client.explain(name))

    def cancel(self, request: str) -> dict[str, Any]:
        """See :meth:`AsyncClient.cancel`."""
        return self._wait(self._client.cancel(request))

    def events(
        self, since: int | None = None, *, last: int | None = None, model: str | None = None, follow: bool = True
    ) -> Iterator[dict[str, Any]]:
        """See :meth:`AsyncClient.events`."""
        source = self._client.events(since, last=last, model=model, follow=follow)
        reading: asyncio.Future[dict[str, Any] | None] | None = None

        async def step() -> dict[str, Any] | None:
            nonlocal reading
            reading = asyncio.ensure_future(anext(source, None))
            return await reading

        async def close() -> None:
            if reading is not None:
                reading.cancel()
                await asyncio.wait({reading})
            await source.aclose()

        try:
            while (row := self._wait(step())) is not None:
                yield row
        finally:
            self._wait(close())

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """See :meth:`AsyncClient.call`."""
        return self._wait(self._client.call(method, path, body))

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _there(self, make: Callable[[], T]) -> T:
        """What `make` returns when called on the client's loop."""

        async def call() -> T:
            return make()

        return self._wait(call())


def _shut_down(client: AsyncClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def close() -> None:
        try:
            await client.close()
            await asyncio.sleep(0)  # transports end one turn after they are closed
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
    if threading.current_thread() is not thread:  # a garbage collection may come by on any thread
        thread.join()
        loop.close()
