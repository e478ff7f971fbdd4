"""Requests that move between the instances of two workers while they are answered: both halves, on one worker.

:class:`Moves` belongs to the worker's :class:`~sllmdask.actors.instances.InstanceRegistry`. Which request goes where is decided
elsewhere, and so is when. What they say to each other is in :mod:`sllmdask.actors.move_wire`, when
:mod:`sllmdask.actors.leaving`, and :mod:`sllmdask.actors.arriving`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from sllmdask.actors.arriving import Arriving, Host
from sllmdask.actors.leaving import Destination, Leaving, Link, MoveRecord, Order, Pace, Ticket
from sllmdask.actors.move_wire import MoveServer
from sllmdask.actors.streams import Message
from sllmdask.batching.precopy import Kind
from sllmdask.engine.engine import EngineThread
from sllmdask.errors import InstanceGone, SllmError, StateRefused
from sllmdask.loader.peer_wire import checked_token
from sllmdask.policy.move_times import N_MOVES_AT_ONCE

logger = logging.getLogger(__name__)

#: Seconds before a request that could not leave is tried again, and for which it is.
RETRY_S, EVACUATE_S = 0.25, 600.0


class Departing(Host, Protocol):
    """An instance that requests leave, too. All but `engine` and `bulk` are called on the worker's event loop."""

    model: str
    #: Why it is to have no more requests, for a scheduler that takes it over.
    leaving: str

    @property
    def request_ids(self) -> tuple[str, ...]: ...

    def begin_leaving(self, request: str, make: Callable[[Ticket, EngineThread], Leaving]) -> Leaving:
        """A move of `request`, which is here. Raises :class:`StateRefused` if it cannot leave."""
        ...

    def end_leaving(self, leaving: Leaving, record: MoveRecord) -> None: ...


class Registry(Protocol):
    """The worker's instances, and the connections of its front doors. `report` reaches the scheduler."""

    report: Callable[[dict[str, Any]], None]

    def instance(self, instance: str) -> Departing | None: ...

    def has_door(self, front_door: str) -> bool: ...

    def send(self, front_door: str, message: Message) -> None: ...


class _Crowd:
    """How many moves are under way, on average, while one is. In any thread."""

    def __init__(self) -> None:
        # A move is over in its own thread, before the worker's loop hears of it.
        self._lock = threading.Lock()
        self._n = 0
        #: Moves times seconds, up to `_at`.
        self._sum_s = self._at = 0.0

    def _go_on(self, now: float) -> None:
        self._sum_s += self._n * (now - self._at)
        self._at = now

    def enter(self, now: float) -> tuple[float, float]:
        """One begins; what :meth:`leave` needs of it."""
        with self._lock:
            self._go_on(now)
            self._n += 1
            return now, self._sum_s

    def leave(self, now: float, entered: tuple[float, float]) -> float:
        """One is over: the mean number of moves that there were meanwhile, it included."""
        began_at, sum_s = entered
        with self._lock:
            self._go_on(now)
            self._n -= 1
            return (self._sum_s - sum_s) / (now - began_at) if now > began_at else 1.0 + self._n


class Moves:
    """All moves from and to one worker. On its event loop, but for what says otherwise.

    `bytes_per_s`: what all requests that leave together may send; 0: any. `answer_s`: what a destination may take for an answer;
    `reservation_s`: for how long room is kept for a request of which nothing more is heard.
    """

    def __init__(self, registry: Registry, bytes_per_s: float = 0.0, answer_s: float = 10.0, reservation_s: float = 15.0) -> None:
        self._registry = registry
        self._answer_s, self._reservation_s = answer_s, reservation_s
        #: Of this process, for those who talk to it.
        self.incarnation = secrets.token_hex(8)
        #: Dask's address of this worker.
        self.address = ""
        self._pace = Pace(bytes_per_s)
        self._links: defaultdict[str, Link] = defaultdict(Link)
        self._token = b""
        self._tls: ssl.SSLContext | None = None
        self._server: MoveServer | None = None
        self._arriving: Arriving | None = None
        self._leaving: set[Leaving] = set()
        self._crowd = _Crowd()

    # --- life ---

    @property
    def server_address(self) -> str | None:
        """``host:port`` where requests come in; ``None`` before :meth:`serve`."""
        return None if self._server is None else self._server.address

    async def serve(
        self,
        host: str,
        address: str,
        token: str,
        listen_tls: ssl.SSLContext | None = None,
        connect_tls: ssl.SSLContext | None = None,
    ) -> None:
        """Give requests to workers that know `token`, and take theirs; again, with another token, in its place.

        `address` is what Dask calls this worker, `host` where it listens. The port stays the same for as long as the process
        lives: that nobody listens there means that it has ended.
        """
        self._token, self._tls, self.address = checked_token(token), connect_tls, address
        if self._server is None:
            self._arriving = Arriving(self, self.incarnation, asyncio.get_running_loop(), self._reservation_s)
            self._server = MoveServer(host, token, self._arriving.answer, tls=listen_tls)
        else:
            self._server.renew(token)

    async def close(self) -> None:
        """The engines are about to end."""
        server, self._server = self._server, None
        for leaving in list(self._leaving):
            leaving.close()
        if server is not None:
            await asyncio.to_thread(server.close)

    # --- what the arriving half asks, in any thread ---

    def instance(self, instance: str) -> Departing | None:
        return self._registry.instance(instance)

    def has_door(self, front_door: str) -> bool:
        return self._registry.has_door(front_door)

    # --- requests that come ---

    async def recall(self, request: str, epoch: int) -> str:
        """Give a move up that has not come to its end, as its source would; the answer that it would have.

        Once that is ``aborted``, nothing that still comes of the move makes the request run here.
        """
        if self._arriving is None:
            return "unknown"
        cause = "its front door has lost the worker that it was to come from"
        message = {"op": "abort", "request": request, "epoch": epoch, "to": None, "cause": cause}
        reply = await asyncio.to_thread(self._arriving.answer, message, b"")
        return str(reply["answer"])

    # --- requests that leave ---

    async def move(self, instance: str, order: Order) -> MoveRecord:
        """Move one request; returns when that has ended, one way or the other. It goes on if the caller stops waiting.

        Raises :class:`StateRefused` or :class:`InstanceGone` if it could not even begin.
        """
        return await asyncio.shield(self._begin(instance, order))

    def _begin(self, instance: str, order: Order) -> asyncio.Future[MoveRecord]:
        if self._server is None:
            raise StateRefused(order.request, "this worker does not know the others yet")
        host = self._registry.instance(instance)
        if host is None:
            raise InstanceGone(instance)
        loop = asyncio.get_running_loop()

        def make(ticket: Ticket, engine: EngineThread) -> Leaving:
            def tell(message: Message) -> None:
                loop.call_soon_threadsafe(self._registry.send, ticket.front_door, message)

            link = self._links[order.destination.address]
            return Leaving(
                order,
                ticket,
                engine,
                token=lambda: self._token,
                tls=self._tls,
                link=link,
                pace=self._pace,
                answer_s=self._answer_s,
                prepare=host.moving_engine,
                bulk=host.bulk,
                tell=tell,
            )

        leaving = host.begin_leaving(order.request, make)
        self._leaving.add(leaving)
        entered = self._crowd.enter(time.monotonic())
        to = order.destination
        about = {
            "request": order.request,
            "epoch": leaving.ticket.epoch,
            "model": host.model,
            "instance": instance,
            "successor": to.instance,
            "destination": to.worker,
        }
        self._registry.report({"kind": "moving", "move": {**about, "to": to.node, "cause": order.cause}})
        ended: asyncio.Future[MoveRecord] = loop.create_future()

        def finish(record: MoveRecord, n_at_once: float) -> None:
            self._leaving.discard(leaving)
            host.end_leaving(leaving, record)
            facts = {**about, "kv_nbytes": leaving.kv_nbytes, "n_at_once": n_at_once, "record": record.as_wire()}
            self._registry.report({"kind": "moved", "move": facts})
            if not ended.done():
                ended.set_result(record)
            logger.info(
                "move request=%s from=%s to=%s outcome=%s kind=%s n_tokens=%d nbytes=%d stop_ms=%s cause=%s reason=%s",
                order.request,
                order.source,
                order.destination.node,
                record.outcome,
                record.kind,
                record.n_tokens,
                record.nbytes,
                record.stop_ms,
                order.cause,
                record.reason,
            )

        def run() -> None:
            record = leaving.run()
            # Before the rest, in which it takes nothing from the others.
            n_at_once = self._crowd.leave(time.monotonic(), entered)
            if record.outcome == "moved":
                leaving.rest()
            try:
                loop.call_soon_threadsafe(finish, record, n_at_once)
            except RuntimeError:
                logger.debug("the worker ended before a move did request=%s", order.request)

        # Not a pool's thread: one that is in doubt must not keep the process from ending.
        threading.Thread(target=run, name="move", daemon=True).start()
        return ended

    async def evacuate(self, instance: str, order: Order, limit_s: float = EVACUATE_S) -> dict[str, Any]:
        """Move every request of an instance as `order` says (whose `request` is of no account), those that come meanwhile too.

        Returns ``{"moves": {request: record}, "left": n}``: what became of each, and how many requests are still here. One that
        cannot leave is tried again until it has ended, or for `limit_s` seconds. It ends early if the destination is gone.
        """
        host = self._registry.instance(instance)
        if host is None:
            raise InstanceGone(instance)
        host.leaving = "moved"
        newest: dict[str, MoveRecord] = {}
        places = asyncio.Semaphore(N_MOVES_AT_ONCE)

        async def one(request: str) -> MoveRecord | None:
            async with places:
                try:
                    newest[request] = await self.move(instance, replace(order, request=request))
                except SllmError as error:
                    logger.debug("cannot leave yet request=%s cause=%s", request, error.message)
                    return None
                return newest[request]

        try:
            async with asyncio.timeout(limit_s):
                while host.request_ids:
                    ended = await asyncio.gather(*map(one, host.request_ids))
                    if any(record is not None and record.outcome == "stayed" and record.unreachable for record in ended):
                        break
                    if any(record is None or record.outcome == "stayed" for record in ended):
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            logger.warning("instance=%s still has %d requests", instance, len(host.request_ids))
        if host.request_ids:
            host.leaving = ""
        moves = {request: record.as_wire() for request, record in newest.items()}
        return {"moves": moves, "left": len(host.request_ids)}

    def worker_gone(self, worker: str) -> None:
        """The scheduler has lost the worker at `worker` (Dask's address): nobody need begin to move there."""
        for leaving in self._leaving:
            if leaving.order.destination.worker == worker:
                leaving.destination_gone()


def order_from_wire(data: Mapping[str, Any]) -> Order:
    """What the scheduler asks for."""
    kind = data.get("kind")
    return Order(
        request=data["request"],
        source=data["source"],
        destination=Destination(**data["destination"]),
        cause=data["cause"],
        kind=None if kind is None else Kind(kind),
        delta=data["delta"],
        alpha=data["alpha"],
        beta=data["beta"],
    )
