"""The half of a move that the request comes to: it answers the worker that the request leaves.

What it does at each message is :data:`sllmdask.batching.handover.TARGET`; here it is done. Messages are answered in the threads
of their connections. What is known of a move is kept, so that a message that comes again, or late, is answered as it was before.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sllmdask.actors.adapters import AdapterUse
from sllmdask.actors.streams import Message
from sllmdask.batching.handover import FAILED, TARGET, TRIED, Asked, Reply, Target
from sllmdask.batching.params import Grammar
from sllmdask.batching.protocol import MovingEngine
from sllmdask.engine.engine import EngineThread
from sllmdask.errors import InstanceGone, SllmError, StateRefused

logger = logging.getLogger(__name__)

#: Seconds that an answer may wait for tokens to be computed, and between two looks at them.
COMPUTE_S, LOOK_S = 0.5, 0.002
#: Seconds that an adapter, or a grammar, may take to be ready.
PREPARE_S = 55.0
#: What a source may say.
_OPS = {str(op): op for op in (Asked.RESERVE, Asked.APPEND, Asked.EXTEND, Asked.COMMIT, Asked.QUERY, Asked.ABORT)}
#: Moves that are over, and still known.
N_REMEMBERED = 16384


@dataclass(frozen=True)
class Arrived:
    """A request that is here now: what the instance and the front door must know of it."""

    request: str
    front_door: str
    epoch: int
    use: AdapterUse | None
    adapter: tuple[str, str] | None
    told: Message


class Host(Protocol):
    """The instance that a request comes to. All but `engine` and `bulk` are called on the worker's event loop."""

    id: str
    #: Held while KV is written, so that a step waits for one piece at most.
    bulk: threading.Lock

    def moving_engine(self) -> EngineThread:
        """The engine. Raises :class:`StateRefused` with the reason if requests cannot come."""
        ...

    @property
    def checkpoint_path(self) -> Path: ...

    def expect(self, request: str, epoch: int) -> None:
        """A request may come: the instance is not idle."""
        ...

    def unexpect(self, request: str, epoch: int) -> None: ...

    async def acquire_adapter(self, adapter: tuple[str, str]) -> AdapterUse: ...

    def release_adapter(self, use: AdapterUse) -> None: ...

    def arrived(self, arrived: Arrived) -> None: ...


class Worker(Protocol):
    """What is asked of the worker, in any thread."""

    #: Dask's address of it.
    address: str

    def instance(self, instance: str) -> Host | None: ...

    def has_door(self, front_door: str) -> bool: ...


@dataclass(eq=False)
class _Move:
    """What is known of one move."""

    epoch: int
    state: Target = Target.NOTHING
    lock: threading.Lock = field(default_factory=threading.Lock)
    host: Host | None = None
    front_door: str = ""
    adapter: tuple[str, str] | None = None
    use: AdapterUse | None = None
    heard_at: float = 0.0
    reason: str | None = None
    #: What the source needs to go on: how much is here.
    facts: dict[str, Any] = field(default_factory=dict)


class Arriving:
    """All moves to one worker. `incarnation` names its process.

    `reservation_s`: seconds without a message after which a reservation is given up: the source has died, or cannot reach us.
    """

    def __init__(self, worker: Worker, incarnation: str, loop: asyncio.AbstractEventLoop, reservation_s: float) -> None:
        self._worker, self.incarnation, self._loop = worker, incarnation, loop
        self.reservation_s = reservation_s
        #: The newest move of each request.
        self._moves: OrderedDict[str, _Move] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def n_reserved(self) -> int:
        """Moves under way."""
        with self._lock:
            return sum(move.state is Target.RESERVED for move in self._moves.values())

    def answer(self, message: Mapping[str, Any], payload: bytes | bytearray) -> dict[str, Any]:
        """The answer to one message, in its connection's thread."""
        try:
            asked = _OPS[message["op"]]
            request, epoch, to = str(message["request"]), int(message["epoch"]), message.get("to")
        except (KeyError, TypeError, ValueError) as error:
            return {"answer": "unknown", "incarnation": self.incarnation, "reason": f"this is no message of ours: {error!r}"}
        if to not in (None, self.incarnation):
            # Meant for the process that was here before.
            return {"answer": "unknown", "incarnation": self.incarnation}
        move, older = self._find(request, epoch)
        if older is not None:
            with older.lock:
                self._happens(request, older, Asked.NEWER)
        if move is None:
            return {"answer": "aborted", "incarnation": self.incarnation, "reason": "another move of it has followed"}
        with move.lock:
            reply = self._happens(request, move, asked, message, payload)
            assert reply.answer is not None
            said = {"answer": str(reply.answer), "incarnation": self.incarnation, "reason": move.reason, **move.facts}
            return {**said, "door": self._worker.has_door(move.front_door)}

    def _find(self, request: str, epoch: int) -> tuple[_Move | None, _Move | None]:
        """What is known of the move; ``None`` if a newer one is. And an older one, which is over by that."""
        with self._lock:
            known = self._moves.get(request)
            if known is not None and known.epoch > epoch:
                return None, None
            if known is not None and known.epoch == epoch:
                return known, None
            move = self._moves[request] = _Move(epoch)
            self._moves.move_to_end(request)
            while len(self._moves) > N_REMEMBERED and next(iter(self._moves.values())).state is not Target.RESERVED:
                self._moves.popitem(last=False)
            return move, known if known is not None and known.state is Target.RESERVED else None

    def _happens(
        self, request: str, move: _Move, asked: Asked, message: Mapping[str, Any] | None = None, payload: bytes | bytearray = b""
    ) -> Reply:
        """One row of the table. `move.lock` is held."""
        move.heard_at = time.monotonic()
        if message is not None and asked in TRIED[move.state]:
            try:
                self._try(asked, request, move, message, payload)
            except SllmError as error:
                move.reason = error.reason if isinstance(error, StateRefused) else error.message
                asked = FAILED[asked]
            except Exception as error:
                logger.exception("%s failed request=%s", asked, request)
                move.reason = f"internal error: {error!r}"
                asked = FAILED[asked]
        if asked is Asked.ABORT and message is not None and move.state is Target.RESERVED:
            move.reason = str(message.get("cause"))
        reply = TARGET.get((move.state, asked), Reply(move.state, None))
        move.state = reply.state
        if reply.frees or asked is Asked.RESERVE_FAILED:
            self._free(request, move)
        return reply

    def _try(self, asked: Asked, request: str, move: _Move, message: Mapping[str, Any], payload: bytes | bytearray) -> None:
        """Do what the message says. Raises :class:`SllmError` if that cannot be done."""
        match asked:
            case Asked.RESERVE:
                self._reserve(request, move, message)
            case Asked.APPEND:
                self._append(request, move, message, payload)
            case Asked.EXTEND:
                n_tokens = int(message["n_tokens"])
                self._call(move, lambda engine: engine.import_extend(request, move.epoch, n_tokens))
            case Asked.COMMIT:
                self._commit(request, move, message, payload)

    def _reserve(self, request: str, move: _Move, message: Mapping[str, Any]) -> None:
        host = self._worker.instance(message["instance"])
        if host is None:
            raise InstanceGone(message["instance"])
        engine = host.moving_engine()
        move.front_door = message["front_door"]
        self._on_loop(host.expect, request, move.epoch)
        move.host = host
        if message["adapter"] is not None:
            name, source = message["adapter"]
            move.adapter = (name, source)
            acquiring = asyncio.run_coroutine_threadsafe(host.acquire_adapter(move.adapter), self._loop)
            move.use = acquiring.result(PREPARE_S)
        if message["grammar"] is not None:
            engine.prepare(Grammar(**message["grammar"]), host.checkpoint_path)
        manifest, n_tokens, longest = message["manifest"], int(message["n_tokens"]), int(message["longest"])

        def open_import(target: MovingEngine) -> dict[str, Any]:
            if longest > target.max_model_len:
                reason = f"it may grow to {longest} tokens, and there is room for {target.max_model_len}"
                raise StateRefused(request, reason)
            ticket = target.import_open(manifest, n_tokens, tokens_will_do=True)
            return {**ticket, "prefill_tokens_per_s": target.prefill_tokens_per_s}

        ticket = engine.call(open_import).result()
        move.facts = {key: ticket[key] for key in ("n_tokens", "kv_refused", "prefill_tokens_per_s")}
        asyncio.run_coroutine_threadsafe(self._expire(request, move), self._loop)

    def _append(self, request: str, move: _Move, message: Mapping[str, Any], payload: bytes | bytearray) -> None:
        if "chunk" in message:
            chunk = {**message["chunk"], "data": payload}
            assert move.host is not None
            with move.host.bulk:
                move.facts |= self._call(move, lambda engine: engine.import_write(request, move.epoch, chunk))
            return
        since, tokens = int(message["since"]), message["tokens"]
        known = self._call(move, lambda engine: engine.import_tokens(request, move.epoch, since, tokens))
        patience = time.monotonic() + COMPUTE_S
        while known["n_tokens"] < known["n_known"] - 1 and time.monotonic() < patience:
            # The next look is answered after the engine's next step.
            time.sleep(LOOK_S)
            known = self._call(move, lambda engine: engine.import_tokens(request, move.epoch))
        move.facts |= known

    def _commit(self, request: str, move: _Move, message: Mapping[str, Any], payload: bytes | bytearray) -> None:
        if not self._worker.has_door(move.front_door):
            raise StateRefused(request, "its front door has no connection to this worker")
        host, state = move.host, message["state"]
        assert host is not None
        kv = None if message["chunk"] is None else {**message["chunk"], "data": payload}
        output_ids = list(state["output_ids"])
        told = ["moved", request, move.epoch, output_ids, host.id, self._worker.address, message["node"], message["record"]]
        arrived = Arrived(request, move.front_door, move.epoch, move.use, move.adapter, told)

        def commit(engine: MovingEngine) -> None:
            engine.import_commit(request, move.epoch, state, kv)
            # Before the outputs of its first step, which come to the loop after this.
            self._loop.call_soon_threadsafe(host.arrived, arrived)

        self._call(move, commit)
        move.use = None

    def _free(self, request: str, move: _Move) -> None:
        host, use = move.host, move.use
        move.host = move.use = None
        if host is None:
            return
        try:
            host.moving_engine().call(lambda engine: engine.import_abort(request, move.epoch)).result()
        except SllmError as error:
            logger.debug("nothing to free request=%s cause=%s", request, error.message)
        if use is not None:
            self._loop.call_soon_threadsafe(host.release_adapter, use)
        self._loop.call_soon_threadsafe(host.unexpect, request, move.epoch)

    def _call(self, move: _Move, run: Any) -> Any:
        assert move.host is not None
        return move.host.moving_engine().call(run).result()

    def _on_loop(self, run: Any, *args: Any) -> None:
        async def call() -> None:
            run(*args)

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(PREPARE_S)

    async def _expire(self, request: str, move: _Move) -> None:
        """Give the reservation up when its source has been silent for too long."""
        while move.state in (Target.NOTHING, Target.RESERVED):
            wait_s = move.heard_at + self.reservation_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await asyncio.to_thread(self._late, request, move)

    def _late(self, request: str, move: _Move) -> None:
        with move.lock:
            if move.state is Target.RESERVED and time.monotonic() >= move.heard_at + self.reservation_s:
                logger.warning("reservation given up request=%s epoch=%d cause=nothing was heard of it", request, move.epoch)
                move.reason = "nothing was heard of the move for too long"
                self._happens(request, move, Asked.LATE)
