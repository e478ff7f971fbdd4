"""Server-sent events: frames, comments while there is nothing to show, and the events of a request turned into either.

Comments are the only thing sent beside the chunks: clients of OpenAI's skip them, while a named event would be parsed as a chunk.
A slow reader holds back only its own request: :meth:`Sse.send` waits until its socket takes more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Generic, Self, TypeVar

from aiohttp import web

from sllmdask.batching.sequence import FinishReason
from sllmdask.cluster.journal import Delta, Finished, GatewayEvent, Progress, Started
from sllmdask.errors import EngineError
from sllmdask.server import exchange, openai
from sllmdask.server.choices import ChoiceWriter

#: Seconds that a stream's headers wait for an instance, so that they can name it; a warm model needs a few milliseconds.
HEADER_GRACE_S = 0.05
#: Events of several prompts that may wait for a slow reader.
MERGE_DEPTH = 64

#: An event, and the index of the choice that it belongs to.
Indexed = tuple[int, GatewayEvent]
T = TypeVar("T")


def comment(text: str) -> bytes:
    """`text` as an SSE comment, on one line."""
    return b": " + " ".join(text.split()).encode("utf-8", "replace") + b"\n\n"


def frame(value: object) -> bytes:
    """`value` as the data of one SSE event."""
    return b"data: " + openai.dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def where_headers(started: Started) -> dict[str, str]:
    """Who serves the request, from which tier its model came, and how long it waited."""
    return {
        "x-sllmdask-cold-start": started.cold_start,
        "x-sllmdask-node": started.node,
        "x-sllmdask-queue-ms": str(round(started.queue_s * 1e3)),
    }


class Lookahead(Generic[T]):
    """The items of an async generator; the next one can be waited for with a limit and is not lost when the limit passes."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source
        self._next: asyncio.Task[T] | None = None

    async def within(self, timeout_s: float) -> T | None:
        """The next item, or ``None`` if there is none after `timeout_s` seconds, or ever."""
        if self._next is None:
            self._next = asyncio.create_task(_anext(self._source))
        await asyncio.wait({self._next}, timeout=timeout_s)
        if not self._next.done():
            return None
        task, self._next = self._next, None
        try:
            return task.result()
        except StopAsyncIteration:
            return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._next is None:
            return await anext(self._source)
        task, self._next = self._next, None
        return await task

    async def aclose(self) -> None:
        """End the generator, also in the middle of its work."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait({self._next})
            if not self._next.cancelled():
                self._next.exception()  # so that nobody reports it as never looked at
        await self._source.aclose()


async def _anext(source: AsyncGenerator[T, None]) -> T:
    return await anext(source)


async def without_answer(source: AsyncGenerator[GatewayEvent, None]) -> AsyncGenerator[GatewayEvent, None]:
    """The events of a request that is only about its prompt, whose one token nobody asked for."""
    async with aclosing(source):
        async for event in source:
            if isinstance(event, Delta):
                yield Delta("", (), (), event.prompt_logprobs)
            elif isinstance(event, Finished):
                yield Finished(FinishReason.LENGTH, event.n_prompt_tokens, 0)
            else:
                yield event


async def merge(sources: Sequence[AsyncGenerator[GatewayEvent, None]]) -> AsyncGenerator[Indexed, None]:
    """The events of all `sources` as they come; the first failure, or closing this, closes them all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for event in source:
                yield 0, event
        return
    queue: asyncio.Queue[Indexed | None] = asyncio.Queue(MERGE_DEPTH)

    async def pump(index: int, source: AsyncGenerator[GatewayEvent, None]) -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    await queue.put((index, event))
        finally:
            with suppress(asyncio.QueueFull):  # then the reader finds the end of the tasks without being woken
                queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        while True:
            for task in tasks:
                if task.done():
                    task.result()
            if queue.empty() and all(task.done() for task in tasks):
                return
            item = await queue.get()
            if item is not None:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Sse:
    """One response of server-sent events. While nothing else is sent, a comment goes out every `heartbeat_s` seconds."""

    def __init__(self, request: web.Request, heartbeat_s: float) -> None:
        self._request = request
        self._heartbeat_s = heartbeat_s
        self._last_s = 0.0
        self._beating: asyncio.Task[None] | None = None
        #: What the heartbeat says.
        self.status = "waiting"

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and the headers."""
        self._response = web.StreamResponse(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._response.content_type = "text/event-stream"
        self._response.charset = "utf-8"
        await self._response.prepare(self._request)
        self._last_s = asyncio.get_running_loop().time()
        self._beating = asyncio.create_task(self._beat())

    async def send(self, data: bytes) -> None:
        """Write whole frames; returns when the reader has kept up."""
        self._last_s = asyncio.get_running_loop().time()
        await self._response.write(data)

    async def say(self, status: str) -> None:
        """Send a comment now, and again while nothing else happens."""
        self.status = status
        await self.send(comment(status))

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):  # the reader left: aiohttp cancels the handler
            while True:
                idle_s = loop.time() - self._last_s
                if idle_s >= self._heartbeat_s:
                    await self.send(comment(self.status))
                else:
                    await asyncio.sleep(self._heartbeat_s - idle_s)

    async def close(self) -> web.StreamResponse:
        """Stop the heartbeat; the response to hand to aiohttp, which ends it."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating})
        return self._response


class _Tally:
    """What the frames of a stream have said so far."""

    def __init__(self, n_prompt_tokens: int, writers: Sequence[ChoiceWriter]) -> None:
        self.n_prompt_tokens = n_prompt_tokens
        self.writers = writers
        self.n_tokens = [0] * len(writers)
        self.opened = [False] * len(writers)
        self.n_open = len(writers)

    def usage(self) -> tuple[int, int]:
        return self.n_prompt_tokens, sum(self.n_tokens)


async def respond(
    request: web.Request,
    source: AsyncGenerator[Indexed, None],
    shape: openai.Shape,
    n_prompt_tokens: int,
    writers: Sequence[ChoiceWriter],
    *,
    continuous_usage: bool,
    heartbeat_s: float,
) -> web.StreamResponse:
    """Stream the answer, whose choices `writers` write.

    An error before the headers is raised; one after them becomes a frame, and the stream ends.
    """
    sse = Sse(request, heartbeat_s)
    async with aclosing(Lookahead(source)) as events:
        early = await _until_started(events, HEADER_GRACE_S)
        started = next((event for _, event in early if isinstance(event, Started)), None)
        await sse.open(where_headers(started) if started else {})
        tally = _Tally(n_prompt_tokens, writers)
        try:
            if not early:
                await sse.say("waiting")
            for index, event in early:
                if started is None or not isinstance(event, Progress):  # the wait is over: nobody needs to hear of it
                    await _show(sse, shape, tally, index, event, said=event is started, running=continuous_usage)
            async for index, event in events:
                await _show(sse, shape, tally, index, event, said=False, running=continuous_usage)
            if tally.n_open:
                raise EngineError("The answer ended before it was complete. Send the request again.")
            ending = frame(shape.total(*tally.usage())) if shape.with_usage else b""
            await sse.send(ending + DONE)
        except ConnectionError:  # the reader left; nobody is there to be told
            pass
        except Exception as error:  # noqa: BLE001 - logged in public(); the status is sent, so the middleware cannot answer
            with suppress(ConnectionError):
                await sse.send(frame(openai.envelope(exchange.public(error, request))))
        finally:
            response = await sse.close()
    return response


async def _until_started(events: Lookahead[Indexed], grace_s: float) -> list[Indexed]:
    """What happens within `grace_s` seconds, up to and including the first :class:`Started`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    early: list[Indexed] = []
    while (left_s := deadline - loop.time()) > 0 and (not early or isinstance(early[-1][1], Progress)):
        item = await events.within(left_s)
        if item is None:
            break
        early.append(item)
    return early


async def _show(
    sse: Sse, shape: openai.Shape, tally: _Tally, index: int, event: GatewayEvent, *, said: bool, running: bool
) -> None:
    """Turn one event into frames. `said`: the headers told already where the request runs."""
    if isinstance(event, Progress):
        await sse.say(event.detail or event.state)
        return
    frames = []
    if isinstance(event, Started):
        sse.status = "working"
        if not said:  # too late for headers: the same lines, as comments
            frames += [comment(f"{name}: {value}") for name, value in where_headers(event).items()]
    if not tally.opened[index]:
        tally.opened[index] = True
        if (opening := shape.opening(index)) is not None:
            frames.append(frame(opening))
    if isinstance(event, Delta):
        sse.status = "working"
        tally.n_tokens[index] += len(event.token_ids)
        if text := tally.writers[index].add(event):
            scores = tally.writers[index].scores()
            frames.append(frame(shape.piece(index, text, scores, openai.usage(*tally.usage()) if running else None)))
    elif isinstance(event, Finished):
        tally.n_tokens[index] = event.n_tokens
        tally.n_open -= 1
        reason = openai.finish_reason(event.reason)
        scores = tally.writers[index].scores()
        frames.append(frame(shape.end(index, reason, scores, openai.usage(*tally.usage()) if running else None)))
    if frames:
        await sse.send(b"".join(frames))


async def collect(source: AsyncIterator[Indexed], writers: Sequence[ChoiceWriter]) -> tuple[list[openai.Choice], Started | None]:
    """The whole answers of a request that is not streamed, and where the first of them ran in the end."""
    texts: list[list[str]] = [[] for _ in writers]
    choices: list[openai.Choice | None] = [None] * len(writers)
    started: Started | None = None
    async for index, event in source:
        if isinstance(event, Started):
            # Again, if the instance that it was sent to died before its first token.
            started = event if index == 0 else started
        elif isinstance(event, Delta):
            texts[index].append(writers[index].add(event))
        elif isinstance(event, Finished):
            reason = openai.finish_reason(event.reason)
            choices[index] = openai.Choice("".join(texts[index]), reason, event.n_tokens, writers[index].scores())
    done = [choice for choice in choices if choice is not None]
    if len(done) < len(writers):
        raise EngineError("The answer ended before it was complete. Send the request again.")
    return done, started
