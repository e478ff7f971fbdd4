"""A real front door's :class:`Gateway` over workers of this process, which can die and come again: connections without sockets.

Engines, moves between them and their connections are real; what the Dask scheduler does for a request is :class:`Door`'s.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgpack

from sllmdask.actors.instances import InstanceRegistry
from sllmdask.actors.leaving import Destination, MoveRecord, Order
from sllmdask.actors.streams import Message
from sllmdask.batching.precopy import Kind
from sllmdask.cluster.gateway import Gateway
from sllmdask.cluster.journal import Delta, Finished, GatewayEvent, GenerateRequest, Started
from sllmdask.config import Settings
from sllmdask.engine.engine import EngineThread
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import SllmError, WorkerLost
from tests.actors.moving import TOKEN, Lease, _slow_step
from tests.engine.models import TinyModel, make_engine, settings
from tests.fakes import byte_tokenizer


class Line:
    """One direction of a connection: messages arrive in their order, as msgpack makes them, now and then late."""

    def __init__(self, rng: random.Random, deliver: Callable[[Message], None]) -> None:
        self._rng, self._deliver = rng, deliver
        self._under_way: deque[bytes] = deque()
        self._paused = False
        self.cut = False

    def pause(self) -> None:
        """From now on, only :meth:`step` lets messages arrive."""
        self._paused = True

    def step(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._under_way))):
            self._deliver(msgpack.unpackb(self._under_way.popleft()))

    @property
    def waiting(self) -> list[Message]:
        return [msgpack.unpackb(each) for each in self._under_way]

    def put(self, message: Message) -> None:
        self._under_way.append(msgpack.packb(message))
        if len(self._under_way) == 1:
            self._wait()

    def _wait(self) -> None:
        late_s = self._rng.choice((0.0, 0.0, 0.0, 0.002, 0.01))
        asyncio.get_running_loop().call_later(late_s, self._arrive)

    def _arrive(self) -> None:
        if self.cut or self._paused:
            return
        self._deliver(msgpack.unpackb(self._under_way.popleft()))
        if self._under_way:
            self._wait()


class Link:
    """What a :class:`~sllmdask.cluster.gateway.WorkerLink` is to a gateway, and an outbox to a worker."""

    def __init__(self, door: Door, worker: str) -> None:
        self.worker = worker
        self._door, self._registry = door, door.registries.get(worker)
        self._there = Line(door.rng, self._to_worker)
        self._back = Line(door.rng, door.from_worker)
        if self._registry is None:
            asyncio.get_running_loop().call_soon(self.lose)
        else:
            outboxes: Any = self._registry._outboxes
            outboxes[door.id] = self

    def send(self, message: Message) -> None:
        self._there.put(message)

    def _to_worker(self, message: Message) -> None:
        assert self._registry is not None
        self._registry._receive(self._door.id, message)

    def put(self, message: Message) -> None:
        self._back.put(message)

    def cut(self) -> None:
        """Nothing comes through any more."""
        self._there.cut = self._back.cut = True

    def lose(self) -> None:
        self.cut()
        self._door.worker_lost(self)  # type: ignore[arg-type]

    async def close(self) -> None:
        self.cut()


@dataclass
class Answer:
    """What the client of one request was given."""

    request: GenerateRequest
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    of_prompt: list[Any] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    end: Finished | None = None
    error: Exception | None = None
    left: bool = False

    @property
    def ended(self) -> bool:
        return self.end is not None or self.error is not None or self.left

    def take(self, event: GatewayEvent) -> None:
        match event:
            case Started(node=node):
                self.nodes.append(node)
            case Delta(text, ids, scores, of_prompt):
                self.text += text
                self.tokens += ids
                self.scores += scores
                self.of_prompt += of_prompt or ()
            case Finished():
                self.end = event


class Door(Gateway):
    """The gateway, and for each request what the scheduler does: name a worker that is alive."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        super().__init__("tcp://nobody", Settings())
        self.rng = rng
        self.registries: dict[str, InstanceRegistry] = {}
        self._rows["m"] = {"model": "m", "revision": 0, "max_model_len": 512}
        self._bytes = tokenizer
        scheduler: Any = self
        self._outbox = scheduler
        self.answers: dict[str, Answer] = {}
        self.changed = asyncio.Event()
        self._homeless: list[tuple[str, str]] = []
        #: Where each request was placed, and the worker that was asked for, in order.
        self.placed: dict[str, list[tuple[str, str]]] = {}
        #: Where front doors said that requests are.
        self.said_at: list[tuple[str, str]] = []
        self._asking: set[asyncio.Task[None]] = set()

    async def _fetch_tokenizer(self, _model: str) -> Tokenizer:
        return self._bytes

    def _link(self, worker: str) -> Any:
        link: Any = self._links.get(worker)
        if link is None:
            link = self._links[worker] = Link(self, worker)  # type: ignore[assignment]
        return link

    def _follow(self, active: Any, message: Message) -> list[GatewayEvent]:
        journal = active.journal
        if message[0] == "tokens" and message[2] == journal.epoch:
            # Who had the request may have it again, and say again what the other one had said by then.
            again = journal.moves and journal.moves[-1]["outcome"] == "stayed" and message[3] < len(journal.output_ids)
            assert again or message[3] == len(journal.output_ids), f"each token comes once, and in its turn: {message[:4]}"
        self.changed.set()
        return super()._follow(active, message)

    # --- the scheduler ---

    def put(self, message: Message) -> None:
        match message:
            case ["request" | "returned", key, _, _, _, told]:
                self._homeless.append((key, told.get("near", "")))
                asyncio.get_running_loop().call_later(self.rng.choice((0.0, 0.005)), self.place)
            case ["at", key, instance]:
                self.said_at.append((key, instance))

    def place(self) -> None:
        """Send those who wait to workers that are alive."""
        waiting, self._homeless = self._homeless, []
        for key, near in waiting:
            if not self.registries:
                self._homeless.append((key, near))
                continue
            active = self._active.get(key)
            wished = "" if active is None or active.journal.output_ids else self.wishes.get(active.journal.request.id, "")
            choice = next((each for each in (near, wished) if each in self.registries), self.rng.choice(sorted(self.registries)))
            self.placed.setdefault(key, []).append((choice, near))
            [instance] = self.registries[choice]._instances
            self._from_scheduler(["dispatch", key, instance, choice, choice, None, 0.0])

    #: Where requests begin, by id.
    wishes: Mapping[str, str] = {}

    # --- clients ---

    def ask(self, request: GenerateRequest, leave_after: int | None = None) -> Answer:
        """Begin a request, whose client leaves after that many tokens."""
        answer = self.answers[request.id] = Answer(request)
        task = asyncio.create_task(self._ask_for(answer, leave_after))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return answer

    async def _ask_for(self, answer: Answer, leave_after: int | None) -> None:
        try:
            async with aclosing(self.generate(answer.request)) as events:
                async for event in events:
                    answer.take(event)
                    self.changed.set()
                    if leave_after is not None and len(answer.tokens) >= leave_after and answer.end is None:
                        answer.left = True
                        break
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answer.error = error
        self.changed.set()

    def key_of(self, name: str) -> str | None:
        return next((key for key, active in self._active.items() if active.journal.request.id == name), None)

    async def until(self, enough: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not enough():
                self.changed.clear()
                await self.changed.wait()

    async def all_ended(self) -> None:
        await self.until(lambda: all(answer.ended for answer in self.answers.values()))


class Town:
    """Workers ``1``, ``2``... of one instance each, and their front door."""

    def __init__(self, model: TinyModel, engines: Mapping[str, Mapping[str, Any]], seed: int, tokenizer: Tokenizer) -> None:
        self._model, self._engines = model, engines
        self.door = Door(tokenizer, random.Random(seed))
        self._n_started = 0

    @property
    def registries(self) -> dict[str, InstanceRegistry]:
        return self.door.registries

    async def start(self, name: str) -> None:
        """A worker of that name, in a new process as far as anybody can see."""
        store: Any = None
        registry = InstanceRegistry(store, settings(), lambda _: None, lambda source: source, move_reservation_s=2.0)
        self._n_started += 1
        instance = registry.adopt_or_create(f"m/{self._n_started}", "m", "m", "auto")
        engine = make_engine(self._model, **{"max_batch_tokens": 32, **self._engines.get(name, {})})
        engine.step = partial(_slow_step, engine.step)  # type: ignore[method-assign]
        loop = asyncio.get_running_loop()
        instance._engine = EngineThread(engine, loop, instance.on_outputs, instance.on_failed, name=instance.id)
        lease: Any = Lease(str(self._model.directory), self._model.tensors)
        instance._lease, instance._whole = lease, True
        await registry.moves.serve("127.0.0.1", name, TOKEN)
        self.registries[name] = registry
        self.door.place()

    async def kill(self, name: str, tell: bool = True) -> None:
        """The process of a worker ends without a word. `tell`: the scheduler says so to the others."""
        registry = self.registries.pop(name)
        link: Any = self.door._links.get(name)
        if link is not None:
            link.lose()
        await self._end(registry)
        if tell:
            for other in self.registries.values():
                other.moves.worker_gone(name)

    async def _end(self, registry: InstanceRegistry) -> None:
        await registry.moves.close()
        for instance in registry._instances.values():
            if instance._engine is not None:
                await asyncio.to_thread(instance._engine.close)
        registry._builder.shutdown()

    async def end(self) -> None:
        for registry in list(self.registries.values()):
            await self._end(registry)
        await self.door.close()

    async def move(self, name: str, turn: int, kind: Kind | None, delta: int = 3) -> MoveRecord | None:
        """Move a request from where its front door believes it to be, to the `turn`-th of the other workers.

        ``None``: it is not there, or cannot go now.
        """
        key = self.door.key_of(name)
        if key is None:
            return None
        journal = self.door._active[key].journal
        source = self.registries.get(journal.worker or "")
        others = sorted(self.registries.keys() - {journal.worker})
        if source is None or not others or journal.instance is None:
            return None
        to = others[turn % len(others)]
        target = self.registries[to]
        assert target.moves.server_address is not None
        [instance] = target._instances
        destination = Destination(instance, to, to, target.moves.server_address)
        try:
            order = Order(key, str(journal.worker), destination, "a test", kind, delta)
            return await source.moves.move(journal.instance, order)
        except SllmError:
            return None

    async def all_free(self) -> None:
        """Until no engine that lives holds anything any more."""
        async with asyncio.timeout(30):
            for registry in self.registries.values():
                for instance in registry._instances.values():
                    assert instance._engine is not None
                    await instance.until_idle()
                    while True:
                        stats = await asyncio.wrap_future(instance._engine.call(lambda engine: engine.stats()))
                        held = (stats.blocks_used, stats.blocks_reserved, stats.n_held, stats.n_running, stats.n_waiting)
                        if held == (0, 0, 0, 0, 0) and not instance._leaving:
                            break
                        await asyncio.sleep(0.005)
                    assert stats.blocks_free == stats.blocks_total and stats.parked_nbytes == 0
                    assert instance.request_ids == () and not (instance._uses or instance._held_back or instance._handed_over)
                arriving = registry.moves._arriving
                assert arriving is not None and arriving.n_reserved == 0


@asynccontextmanager
async def town(
    model: TinyModel,
    n: int = 2,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> AsyncIterator[Town]:
    there = Town(model, engines or {}, seed, tokenizer or byte_tokenizer())
    try:
        for number in range(1, n + 1):
            await there.start(str(number))
        yield there
    finally:
        await there.end()


__all__ = ["Answer", "Door", "Town", "WorkerLost", "town"]
