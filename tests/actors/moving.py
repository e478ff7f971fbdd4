"""Workers with real engines and real sockets in one process, and a front door that follows its requests between them."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sllmdask.actors.instances import Instance, InstanceRegistry
from sllmdask.actors.leaving import Destination, MoveRecord, Order
from sllmdask.actors.streams import Message
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.precopy import Kind
from sllmdask.cluster.following import Following
from sllmdask.cluster.journal import GenerateRequest, Journal
from sllmdask.engine.engine import EngineThread
from tests.engine.models import TinyModel, make_engine, settings

TOKEN = "a token of the tests"


@dataclass
class Lease:
    """What an instance asks of its lease here."""

    path: str
    tensors: dict[str, Any]


@dataclass
class _Outbox:
    """A worker's side of the connection to the front door."""

    door: Door
    worker: str

    def put(self, message: Message) -> None:
        self.door.receive(self.worker, message)

    async def close(self) -> None:
        pass


@dataclass
class Asked:
    """One request of the front door."""

    journal: Journal
    following: Following
    #: Of every token that was accepted, the log probability that came with it.
    scores: list[Any] = field(default_factory=list)
    reason: str | None = None
    error: dict[str, Any] | None = None
    n_stopped: int = 0
    #: Whether a source has said that it does not know where the request is.
    doubted: bool = False

    @property
    def ended(self) -> bool:
        return self.reason is not None or self.error is not None

    @property
    def tokens(self) -> list[int]:
        return self.journal.output_ids


class Door:
    """A front door's part in moves, as :class:`~sllmdask.cluster.gateway.Gateway` plays it, without text and HTTP."""

    def __init__(self, workers: dict[str, InstanceRegistry], connect_at_once: bool = True) -> None:
        self.workers, self.connect_at_once = workers, connect_at_once
        self.asked: dict[str, Asked] = {}
        self.changed = asyncio.Event()

    def connect(self, worker: str) -> None:
        outboxes: Any = self.workers[worker]._outboxes
        outboxes.setdefault("door", _Outbox(self, worker))

    def submit(self, name: str, worker: str, prompt: list[int], adapter: tuple[str, str] | None = None, **params: Any) -> Asked:
        self.connect(worker)
        sampling = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, **params})
        instance = f"m/{worker}"
        asked = GenerateRequest(name, "m", prompt, sampling, adapter=adapter)
        journal = Journal(asked, worker=worker, instance=instance, node=worker)
        journal.path.append(worker)
        self.asked[name] = Asked(journal, Following(journal))
        self.workers[worker]._receive("door", journal.submission(name))
        return self.asked[name]

    def cancel(self, name: str) -> None:
        asked = self.asked.pop(name)
        self._cancel(str(asked.journal.worker), name, str(asked.journal.instance))
        for stop in asked.following.elsewhere():
            self._cancel(stop.worker, name, stop.instance)
        self.changed.set()

    def _cancel(self, worker: str, name: str, instance: str, epoch: int | None = None) -> None:
        self.workers[worker]._receive("door", ["cancel", name, instance, epoch])

    def receive(self, worker: str, message: Message) -> None:
        asked = self.asked.get(message[1])
        if asked is None:
            if message[0] == "moved":
                self._cancel(worker, message[1], message[4])
        else:
            self._follow(asked, message)
        self.changed.set()

    def _follow(self, asked: Asked, message: Message) -> None:
        journal, following = asked.journal, asked.following
        stops = []
        match message:
            case ["tokens", _, epoch, index, ids, reason, *scores] if epoch == journal.epoch:
                assert index == len(journal.output_ids), "each token comes once, and in its turn"
                journal.accept(epoch, index, ids)
                asked.scores += scores[0] if scores else []
                asked.reason = reason
            case ["moving", _, _, to]:
                if self.connect_at_once:
                    self.connect(to)
            case ["tokens" | "error" | "stayed" | "left", *_] if following.hold(message):
                return
            case ["moved", *_]:
                stops = following.moved(message)
            case ["stayed", *_]:
                stops = following.stayed(message)
            case ["doubting", _, epoch, *_] if epoch == journal.epoch:
                asked.doubted = True
            case ["error", _, epoch, error] if epoch == journal.epoch:
                asked.error = error
        for stop in stops:
            asked.n_stopped += 1
            self._cancel(stop.worker, asked.journal.request.id, stop.instance, stop.epoch)
        for held in following.settled():
            self._follow(asked, held)

    async def until(self, enough: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not enough():
                self.changed.clear()
                await self.changed.wait()

    async def answers(self) -> dict[str, list[int]]:
        await self.until(lambda: all(asked.ended for asked in self.asked.values()))
        assert all(asked.error is None for asked in self.asked.values()), [asked.error for asked in self.asked.values()]
        return {name: asked.tokens for name, asked in self.asked.items()}


class Workers:
    """Workers ``1``, ``2``... with one instance each of one model, ``m/1``, ``m/2``..."""

    def __init__(self, registries: dict[str, InstanceRegistry]) -> None:
        self.registries = registries
        self.door = Door(registries)

    def instance(self, worker: str) -> Instance:
        found = self.registries[worker].instance(f"m/{worker}")
        assert found is not None
        return found

    def engine(self, worker: str) -> EngineThread:
        engine = self.instance(worker)._engine
        assert engine is not None
        return engine

    def order(self, name: str, source: str, to: str, kind: Kind | None = Kind.KV, delta: int = 3) -> Order:
        moves = self.registries[to].moves
        assert moves.server_address is not None
        destination = Destination(f"m/{to}", to, to, moves.server_address)
        return Order(name, source, destination, "a test", kind, delta)

    async def move(self, name: str, to: str, kind: Kind | None = Kind.KV, delta: int = 3) -> MoveRecord:
        """Move a request from where its front door believes it to be."""
        source = str(self.door.asked[name].journal.worker)
        return await self.registries[source].moves.move(f"m/{source}", self.order(name, source, to, kind, delta))

    async def all_free(self) -> None:
        """Until no engine holds anything any more."""
        async with asyncio.timeout(30):
            for worker in self.registries:
                await self.instance(worker).until_idle()
                while True:
                    stats = await asyncio.wrap_future(self.engine(worker).call(lambda engine: engine.stats()))
                    if (stats.blocks_used, stats.blocks_reserved, stats.n_held) == (0, 0, 0):
                        break
                    await asyncio.sleep(0.005)
                assert self.instance(worker).request_ids == ()


#: Seconds that a step lasts at least: a tiny model would be at its answer's end before anything is sent.
STEP_S = 0.002


def _slow_step(step: Callable[[], list[Any]]) -> list[Any]:
    time.sleep(STEP_S)
    return step()


@asynccontextmanager
async def workers(
    model: TinyModel,
    n: int = 2,
    engines: dict[str, dict[str, Any]] | None = None,
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None] = (None, None),
) -> AsyncIterator[Workers]:
    """`engines`: what differs in a worker's engine, by its name; `tls`: who listens, who connects."""
    registries: dict[str, InstanceRegistry] = {}
    loop = asyncio.get_running_loop()
    for number in range(1, n + 1):
        name = str(number)
        store: Any = None
        registry = registries[name] = InstanceRegistry(store, settings(), lambda _: None, lambda source: source)
        instance = registry.adopt_or_create(f"m/{name}", "m", "m", "auto")
        engine = make_engine(model, **{"max_batch_tokens": 32, **(engines or {}).get(name, {})})
        engine.step = partial(_slow_step, engine.step)  # type: ignore[method-assign]
        instance._engine = EngineThread(engine, loop, instance.on_outputs, instance.on_failed, name=instance.id)
        lease: Any = Lease(str(model.directory), model.tensors)
        instance._lease, instance._whole = lease, True
        await registry.moves.serve("127.0.0.1", name, TOKEN, *tls)
    try:
        yield Workers(registries)
    finally:
        for registry in registries.values():
            await registry.moves.close()
            for found in registry._instances.values():
                if found._engine is not None:
                    await asyncio.to_thread(found._engine.close)
            registry._builder.shutdown()
