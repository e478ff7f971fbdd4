"""What an instance does with requests that leave it or come to it. On the worker's event loop, but for what says otherwise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sllmdask.actors.adapters import AdapterUse, InstanceAdapters
from sllmdask.actors.arriving import Arrived
from sllmdask.actors.backends import FilesLease
from sllmdask.actors.leaving import Leaving, MoveRecord, Ticket
from sllmdask.engine.engine import EngineThread
from sllmdask.errors import AdapterUnsupported, InstanceGone, SllmError, StateRefused
from sllmdask.loader.records import HostLease

#: Seconds that a move waits for weights that are still on their way.
WHOLE_S = 10.0


class Movable:
    """The part of an :class:`~sllmdask.actors.instances.Instance` that moves requests; it has what is only declared here."""

    id: str
    closed: bool
    embedding: dict[str, Any] | None
    _registry: Any
    _engine: EngineThread | None
    _lease: HostLease | FilesLease | None
    _whole: bool
    _adapters: InstanceAdapters | None
    _uses: dict[str, AdapterUse]
    _requests: dict[str, tuple[str, int]]
    _idle: asyncio.Event

    def __init__(self) -> None:
        #: Held while KV is read or written for a move, so that a step waits for one piece at most.
        self.bulk = threading.Lock()
        #: Requests that the engine has; others wait for an adapter or a grammar.
        self._handed_over: set[str] = set()
        #: Name and source of the adapter of each request that has one.
        self._adapter_of: dict[str, tuple[str, str]] = {}
        #: Requests that are about to leave, and the errors that may not be told of them before that is over.
        self._leaving: dict[str, Leaving] = {}
        self._held_back: dict[str, SllmError] = {}
        #: Requests that may come, with the epochs of their moves.
        self._expected: set[tuple[str, int]] = set()
        self._identified = threading.Lock()
        self._has_identity = False

    def _forget(self, request_id: str) -> bool:
        raise NotImplementedError

    def _drop(self, request_id: str) -> bool:
        raise NotImplementedError

    def _answer_error(self, request_id: str, error: SllmError) -> None:
        raise NotImplementedError

    # --- both ways, in any thread ---

    def moving_engine(self) -> EngineThread:
        """The engine, which knows what its weights are; waits a little for the last of them.

        Raises :class:`StateRefused` if requests cannot come or go now.
        """
        patience = time.monotonic() + WHOLE_S
        while not self._whole and not self.closed and time.monotonic() < patience:
            time.sleep(0.01)
        engine, lease = self._engine, self._lease
        if engine is None or lease is None or self.closed:
            raise StateRefused("", f"the instance {self.id!r} is not loaded")
        if self.embedding is not None:
            raise StateRefused("", "requests for embeddings do not move")
        if not self._whole:
            raise StateRefused("", f"the weights of {self.id!r} are still on their way")
        with self._identified:
            if not self._has_identity:
                tensors = lease.tensors

                def identify(target: Any) -> None:
                    if tensors is None or not hasattr(target, "import_tokens"):
                        raise StateRefused("", f"what runs {self.id!r} cannot give requests away, nor take them")
                    target.identify(tensors)

                engine.call(identify).result()
                self._has_identity = True
        return engine

    # --- requests that leave ---

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._requests)

    def begin_leaving(self, request_id: str, make: Callable[[Ticket, EngineThread], Leaving]) -> Leaving:
        """A move of a request that is here. Raises :class:`StateRefused` if it cannot leave now."""
        if request_id not in self._requests:
            raise StateRefused(request_id, "it is not here, or has ended")
        if request_id in self._leaving:
            raise StateRefused(request_id, "it is moving already")
        if self.embedding is not None:
            raise StateRefused(request_id, "requests for embeddings do not move")
        if request_id not in self._handed_over or self._engine is None:
            raise StateRefused(request_id, "what it needs is still being prepared")
        front_door, epoch = self._requests[request_id]
        ticket = Ticket(front_door, epoch, self._adapter_of.get(request_id), epoch + 1)
        leaving = self._leaving[request_id] = make(ticket, self._engine)
        return leaving

    def end_leaving(self, leaving: Leaving, record: MoveRecord) -> None:
        """The move is over: the request is elsewhere, or goes on here under an epoch that no answer from elsewhere can have."""
        request_id, ticket = leaving.order.request, leaving.ticket
        if self._leaving.get(request_id) is leaving:
            del self._leaving[request_id]
        error = self._held_back.pop(request_id, None)
        if self._requests.get(request_id) != (ticket.front_door, ticket.stream_epoch):
            return  # it was cancelled, or has ended
        if record.outcome == "moved":
            self._forget(request_id)
            to = leaving.order.destination.worker
            left = ["left", request_id, ticket.stream_epoch, ticket.epoch, to, record.as_wire()]
            self._registry.send(ticket.front_door, left)
            return
        if record.outcome == "stayed":
            epoch = ticket.epoch + 1
            self._requests[request_id] = (ticket.front_door, epoch)
            self._registry.send(
                ticket.front_door,
                ["stayed", request_id, ticket.stream_epoch, epoch, self.id, self._registry.moves.address, record.as_wire()],
            )
        if error is None and self.closed:
            error = InstanceGone(self.id)
        if error is not None:
            self._answer_error(request_id, error)

    def _hold_back(self, request_id: str, error: SllmError) -> bool:
        """Whether the request may be elsewhere by now, so that its end here must not be told yet."""
        leaving = self._leaving.get(request_id)
        if leaving is None or not leaving.stopped:
            return False
        if self._requests.get(request_id) != (leaving.ticket.front_door, leaving.ticket.stream_epoch):
            return False  # what is here now was begun anew, and has nothing to do with that move
        self._held_back[request_id] = error
        return True

    # --- requests that come ---

    @property
    def checkpoint_path(self) -> Path:
        """Where the files of the tokenizer are; in any thread."""
        lease = self._lease
        if lease is None:
            raise InstanceGone(self.id)
        return Path(lease.path)

    def expect(self, request_id: str, epoch: int) -> None:
        self._expected.add((request_id, epoch))
        self._idle.clear()

    def unexpect(self, request_id: str, epoch: int) -> None:
        self._expected.discard((request_id, epoch))
        if not self._requests and not self._expected:
            self._idle.set()

    async def acquire_adapter(self, adapter: tuple[str, str]) -> AdapterUse:
        if self._adapters is None:
            raise AdapterUnsupported(adapter[0], "this engine takes no adapters")
        return await self._adapters.acquire(*adapter)

    def release_adapter(self, use: AdapterUse) -> None:
        if self._adapters is not None:
            self._adapters.release(use)

    def arrived(self, arrived: Arrived) -> None:
        """A request runs here from now on."""
        request_id = arrived.request
        _, known = self._requests.get(request_id, ("", -1))
        if known > arrived.epoch or self._engine is None or self.closed or not self._registry.has_door(arrived.front_door):
            # Begun anew here, it drops what the engine has of it by itself.
            if self._engine is not None and known < arrived.epoch:
                self._engine.abort(request_id)
            if arrived.use is not None:
                self.release_adapter(arrived.use)
        else:
            self._drop(request_id)
            self._requests[request_id] = (arrived.front_door, arrived.epoch)
            self._handed_over.add(request_id)
            if arrived.use is not None and arrived.adapter is not None:
                self._uses[request_id], self._adapter_of[request_id] = arrived.use, arrived.adapter
            self._registry.send(arrived.front_door, arrived.told)
        self.unexpect(request_id, arrived.epoch)
