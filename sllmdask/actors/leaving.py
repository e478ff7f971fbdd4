"""The half of a move that has the request: it gives it away while it runs on, stops it for the rest, sees the move to its end.

What it does at each event is :data:`sllmdask.batching.handover.SOURCE`; here it is done. It runs in a thread of its own, over a
connection of its own, and talks to the engine between two steps. The worker's event loop hears of it only what front doors must
know.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, TypeVar

from sllmdask.actors import move_wire
from sllmdask.actors.streams import Message
from sllmdask.batching.blocks import blocks_for
from sllmdask.batching.handover import BEGIN, SOURCE, Do, Heard, Source, Turn
from sllmdask.batching.precopy import Kind, MoveCosts, is_last_round, is_last_stage
from sllmdask.batching.protocol import MovingEngine
from sllmdask.batching.sequence import Sequence
from sllmdask.engine.engine import EngineThread
from sllmdask.errors import SllmError, StateRefused
from sllmdask.loader.peer_wire import PeerBusy, Refused, Wire, dial

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to connect; for the answer to `reserve`, before which an adapter may be loaded or a grammar compiled.
CONNECT_S, RESERVE_S = 3.0, 60.0
#: The same where nothing depends on the answer.
CALL_OFF_S = 2.0
#: Seconds for which a request that cannot be stopped yet is waited for, and for which a front door may take to connect.
NOT_YET_S, DOOR_S = 60.0, 5.0
#: Seconds between two questions to a destination that does not answer, from the first to the longest.
AGAIN_S = (0.05, 1.0)
#: Seconds after a move in which its source leaves the processor to others, at most.
LONGEST_REST_S = 0.05
#: Bytes of KV that are read or written between two steps: what one step is late by.
CHUNK_NBYTES = 2 * 1024**2
#: Bytes per second to a worker to which nothing has been sent yet.
PRIOR_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Destination:
    """Where a request goes: an instance, its worker (Dask's address, and name), and ``host:port`` where it takes requests."""

    instance: str
    worker: str
    node: str
    address: str


@dataclass(frozen=True)
class Order:
    """Move `request` away from node `source`. `kind` ``None``: what is cheaper; `delta`, `alpha`, `beta`: as deployed."""

    request: str
    source: str
    destination: Destination
    cause: str
    kind: Kind | None = None
    delta: int = 20
    alpha: float = 0.01
    beta: float = 0.1


@dataclass(frozen=True)
class Ticket:
    """What the instance knows of a request that leaves: who is answered, the epoch of that stream, name and source of its
    adapter, and the epoch of the move."""

    front_door: str
    stream_epoch: int
    adapter: tuple[str, str] | None
    epoch: int


@dataclass
class MoveRecord:
    """What became of a move, for people: ``GET /admin/requests`` and ``POST /admin/migrate`` show it."""

    epoch: int
    source: str
    destination: str
    cause: str
    #: ``moved``, ``stayed`` (with the `reason`) or ``ended``: the request was over first.
    outcome: str = ""
    reason: str | None = None
    kind: str | None = None
    #: For KV, bytes of each go over the full blocks; for tokens, how many were told in each round. The last one is what was left
    #: when the request was stopped.
    steps: list[int] = field(default_factory=list)
    #: Of KV, or of token ids as they are sent, 4 each.
    nbytes: int = 0
    #: Prompt and answer, when the request was stopped.
    n_tokens: int = 0
    #: From the first message to the last answer, and of that the time in which the request stood still.
    seconds: float = 0.0
    stop_ms: float | None = None
    #: Whether that is because the destination did not answer.
    unreachable: bool = False

    def as_wire(self) -> dict[str, Any]:
        said = asdict(self)
        del said["unreachable"]
        return said


class Pace:
    """Holds what several threads send together to `bytes_per_s`; 0: to nothing."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s or inf
        #: Of a piece: not so much that others wait for long, or the destination gives the move up.
        self.piece_nbytes = int(min(CHUNK_NBYTES, self.bytes_per_s / 8))
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, nbytes: int, stop: threading.Event) -> None:
        """Until `nbytes` may be sent, or `stop` is set."""
        if self.bytes_per_s == inf:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + nbytes / self.bytes_per_s
        stop.wait(begin - now)


class Link:
    """How fast KV has gone to one worker."""

    def __init__(self) -> None:
        self.bytes_per_s = PRIOR_BYTES_PER_S
        self._measured = False

    def observe(self, nbytes: int, seconds: float) -> None:
        """Of a piece that is too small, the time is that of its answer."""
        if nbytes >= CHUNK_NBYTES // 8 and seconds > 0:
            rate = nbytes / seconds
            self.bytes_per_s = (self.bytes_per_s + rate) / 2 if self._measured else rate
            self._measured = True


class Leaving:
    """One move, from its first message to its end: :meth:`run`, in a thread.

    `token` is what workers know at the time. `answer_s`: seconds that the destination may take for an answer. `prepare` sees to
    it that the engine can give requests away, or raises :class:`StateRefused`; `bulk` is held while KV is read. `tell` sends a
    message to the request's front door, from any thread.
    """

    def __init__(
        self,
        order: Order,
        ticket: Ticket,
        engine: EngineThread,
        *,
        token: Callable[[], bytes],
        tls: ssl.SSLContext | None,
        link: Link,
        pace: Pace,
        answer_s: float,
        prepare: Callable[[], object],
        bulk: threading.Lock,
        tell: Callable[[Message], None],
    ) -> None:
        self.order, self.ticket = order, ticket
        self.record = MoveRecord(ticket.epoch, order.source, order.destination.node, order.cause)
        self.state = Source.ASKING
        self._engine = engine
        self._token, self._tls, self._link, self._pace = token, tls, link, pace
        self._answer_s = answer_s
        self._prepare, self._bulk, self._tell = prepare, bulk, tell
        self._wire: Wire | None = None
        #: The incarnation of the destination, once it has answered, and its newest answer.
        self._peer: str | None = None
        self._reply: dict[str, Any] = {}
        self._n_lost = 0
        #: Set when the destination is said to have left, when this process is about to, and when nobody wants the request.
        self._gone, self._closing, self._over = threading.Event(), threading.Event(), threading.Event()
        self._stopping = False
        self._kind = Kind.KV
        self._sequence: Sequence | None = None
        self._manifest: dict[str, Any] = {}
        self._frozen: dict[str, Any] = {}
        self._began_at = self._stopped_at = 0.0
        self._since = 0
        self._stage_stop: int | None = None
        self._n_rounds = 0
        self._n_told: int | None = None
        self._n_tail: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether nothing may be said of the request, because it may run at the destination."""
        return self._stopping or self.state.stopped

    def destination_gone(self) -> None:
        """The scheduler has lost the destination; from any thread.

        That may be a connection that broke: a request that was stopped may run there all the same, and waits for a proof.
        """
        self._gone.set()
        if not self.stopped:
            self._cut()

    def unwanted(self) -> None:
        """The request has ended, or is continued elsewhere: there is no need to learn what became of it. From any thread."""
        self._over.set()

    def close(self) -> None:
        """The engine is about to end, and with it what is left of the request here; from any thread."""
        self._closing.set()
        self._cut()

    def rest(self) -> None:
        """Do nothing for two steps; in the thread of :meth:`run`.

        Reporting that the request has left is in no hurry, while the destination's first step is, which may want the same core.
        """
        self._closing.wait(min(LONGEST_REST_S, 2 * self._step_s))

    def run(self) -> MoveRecord:
        """See the move to its end. Returns what became of it; raises nothing."""
        self._began_at = time.perf_counter()
        turn = BEGIN
        while not self._closing.is_set():
            if turn.state is Source.DOUBTING is not self.state:
                # Not for ever: its client waits.
                to, ticket = self.order.destination, self.ticket
                self._tell(["doubting", self.order.request, ticket.stream_epoch, ticket.epoch, to.worker, to.instance])
            self.state = turn.state
            heard: Heard | None = None
            for action in turn.actions:
                heard = self._try(action) or heard
            if self.state.final:
                break
            turn = self._next(heard or Heard.LOST)
        self._hang_up()
        self._stopping = False
        record = self.record
        record.outcome = str(self.state) if self.state.final else str(Source.ENDED)
        record.seconds = time.perf_counter() - self._began_at
        if self.state is Source.MOVED:
            record.reason = None
        return record

    def _next(self, heard: Heard) -> Turn:
        self.record.unreachable = heard in (Heard.LOST, Heard.GONE)
        if heard is Heard.LOST and self.state.stopped and self._over.is_set():
            heard = Heard.OVER
        turn = SOURCE.get((self.state, heard))
        if turn is None:
            self.record.reason = f"the destination answered {heard} while the source was {self.state}"
            logger.error("move of request=%s: %s", self.order.request, self.record.reason)
            turn = SOURCE[self.state, Heard.LOST if self.state.stopped else Heard.FAILED]
        return turn

    def _try(self, action: Do) -> Heard | None:
        try:
            return self._do(action)
        except StateRefused as error:
            self.record.reason = error.reason
        except SllmError as error:
            self.record.reason = error.message
        except Exception as error:
            # Whatever it was, the request must not be lost by it, nor run twice.
            logger.exception("move of request=%s failed in %s", self.order.request, action)
            self.record.reason = f"internal error: {error!r}"
        return Heard.LOST if self.state.stopped else Heard.FAILED

    def _do(self, action: Do) -> Heard | None:
        match action:
            case Do.RESERVE:
                return self._reserve()
            case Do.PART:
                return self._give_kv() if self._kind is Kind.KV else self._give_tokens()
            case Do.COMMIT:
                return self._commit()
            case Do.QUERY:
                return self._ask("query")
            case Do.ABORT:
                # Where nothing depends on the answer, its reservation ends by itself if this does not arrive.
                answer_s = min(CALL_OFF_S, self._answer_s) if self.state.final else self._answer_s
                return self._ask("abort", answer_s=answer_s, cause=self.record.reason or self.order.cause)
            case Do.KEEP:
                self._call(lambda engine: engine.export_abort(self.order.request, self.ticket.epoch))
            case Do.LEAVE:
                self._call(lambda engine: engine.export_commit(self.order.request, self.ticket.epoch))
        return None

    def _call(self, run: Callable[[MovingEngine], T]) -> T:
        return self._engine.call(run).result()

    def _find(self, engine: MovingEngine) -> Sequence | None:
        """The request, if it is still here. One of its name that was begun anew is another one."""
        sequence = engine.find(self.order.request)
        return sequence if sequence is self._sequence else None

    # --- messages ---

    def _reserve(self) -> Heard:
        request, epoch = self.order.request, self.ticket.epoch

        def open_export(engine: MovingEngine) -> tuple[dict[str, Any], dict[str, Any]] | None:
            sequence = self._sequence = engine.find(request)
            if sequence is None:
                return None
            params = sequence.params
            grammar = None if params.grammar is None else {"kind": params.grammar.kind, "text": params.grammar.text}
            longest = min(len(sequence.prompt_ids) + params.max_tokens, engine.max_model_len)
            expected = min(sequence.n_tokens + 2 * engine.settings.block_size, longest)
            return engine.export_open(request, epoch), {"grammar": grammar, "n_tokens": expected, "longest": longest}

        self._prepare()
        opened = self._call(open_export)
        if opened is None:
            return Heard.OVER
        self._manifest, facts = opened
        self.record.n_tokens = len(self._manifest["token_ids"])
        ticket, to = self.ticket, self.order.destination
        adapter = None if ticket.adapter is None else list(ticket.adapter)
        fields = {**facts, "instance": to.instance, "manifest": self._manifest, "front_door": ticket.front_door}
        heard = self._ask("reserve", b"", answer_s=RESERVE_S, adapter=adapter, **fields)
        if heard is Heard.RESERVED:
            self._choose()
            self._tell(["moving", request, ticket.stream_epoch, to.worker])
        return heard

    def _choose(self) -> None:
        kv_refused = self._reply.get("kv_refused")
        costs = MoveCosts(
            kv_nbytes=self.kv_nbytes,
            bytes_per_s=min(self._link.bytes_per_s, self._pace.bytes_per_s),
            n_tokens=self.record.n_tokens,
            prefill_tokens_per_s=self._reply.get("prefill_tokens_per_s"),
            alpha=self.order.alpha,
            beta=self.order.beta,
        )
        if kv_refused and self.order.kind is Kind.KV:
            raise StateRefused(self.order.request, kv_refused)
        self._kind = Kind.TOKENS if kv_refused else (self.order.kind or costs.cheaper)
        self.record.kind = str(self._kind)
        self._since = int(self._reply.get("n_tokens", 0)) if self._kind is Kind.KV else 0

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the blocks that the request's KV takes here."""
        stats = self._engine.stats()
        return blocks_for(self.record.n_tokens, stats.get("block_size", 1)) * int(stats.get("bytes_per_block", 0))

    @property
    def _step_s(self) -> float:
        """What a step takes here, on average."""
        stats = self._engine.stats()
        return float(stats["step_s"]) / max(1, stats["n_steps"])

    @property
    def _token_nbytes(self) -> int:
        """Bytes of the KV of a token."""
        stats = self._engine.stats()
        return int(stats["bytes_per_block"]) // int(stats["block_size"])

    def _give_kv(self) -> Heard:
        """A chunk of full blocks; or, when a stage is over and little is left, the stop."""
        with self._bulk:
            read = self._call(self._read())
        if read is None:
            return Heard.OVER
        chunk, n_tokens, n_full = read
        self.record.n_tokens = n_tokens
        if self._stage_stop is None:
            self._stage_stop = n_full
            self.record.steps.append(0)
        if self._since >= self._stage_stop or not chunk["n_tokens"]:
            left_nbytes = (n_tokens - self._since) * self._token_nbytes
            n_stages = len(self.record.steps)
            if not chunk["n_tokens"] or is_last_stage(left_nbytes, self._link.bytes_per_s, self._step_s, n_stages):
                return self._stop(n_tokens)
            self._stage_stop = n_full
            self.record.steps.append(0)
        return self._append(chunk)

    def _read(self, *, whole: bool = True) -> Callable[[MovingEngine], tuple[dict[str, Any], int, int] | None]:
        """Reads a chunk: it, the tokens that there are, and how many of them are in full blocks."""
        request, epoch, since = self.order.request, self.ticket.epoch, self._since
        max_tokens = max(1, self._pace.piece_nbytes // self._token_nbytes)

        def read(engine: MovingEngine) -> tuple[dict[str, Any], int, int] | None:
            sequence = self._find(engine)
            if sequence is None:
                return None
            n_computed = max(sequence.n_computed, sequence.n_parked)
            chunk = engine.export_read(request, epoch, since, max_tokens, whole=whole)
            return chunk, sequence.n_tokens, n_computed - n_computed % engine.settings.block_size

        return read

    def _append(self, chunk: dict[str, Any]) -> Heard:
        data = chunk.pop("data")
        self._pace.wait(len(data), self._gone)
        started = time.perf_counter()
        heard = self._ask("append", data, chunk=chunk)
        if heard is Heard.RESERVED:
            self._link.observe(len(data), time.perf_counter() - started)
            self._since = int(self._reply["n_tokens"])
            self._sent(len(data), len(data))
        return heard

    def _give_rest(self) -> Heard:
        """What is in a block that is not full: so that the KV of a step or two is all that is left for the stop."""
        with self._bulk:
            read = self._call(self._read(whole=False))
        if read is None:
            return Heard.OVER
        return self._append(read[0]) if read[0]["n_tokens"] else Heard.RESERVED

    def _give_tokens(self) -> Heard:
        """What the destination has not been told, once it has computed what it was; or, when that is little, the stop."""
        told, n_computed = self._n_told, int(self._reply.get("n_tokens", 0))
        if told is not None and n_computed < told - 1:
            return self._ask("append", tokens=[], since=told)

        def look(engine: MovingEngine) -> list[int] | None:
            sequence = self._find(engine)
            return None if sequence is None else sequence.token_ids(told or 0, sequence.n_tokens)

        tail = self._call(look)
        if tail is None:
            return Heard.OVER
        n_tokens = (told or 0) + len(tail)
        self.record.n_tokens = n_tokens
        if told is not None:
            if is_last_round(len(tail), self.order.delta, self._n_rounds, self._n_tail):
                return self._stop(n_tokens)
            self._n_tail = len(tail)
        self._n_rounds += 1
        self.record.steps.append(0)
        self._sent(len(tail), 4 * len(tail))
        heard = self._ask("append", tokens=tail, since=told or 0)
        if heard is Heard.RESERVED:
            self._n_told = int(self._reply["n_known"])
        return heard

    def _sent(self, n: int, nbytes: int) -> None:
        self.record.steps[-1] += n
        self.record.nbytes += nbytes

    def _stop(self, n_tokens: int) -> Heard:
        """Make sure that the destination has room and the front door's ear, then stop the request."""
        request, epoch = self.order.request, self.ticket.epoch
        room = n_tokens + self._engine.stats()["block_size"]
        heard = self._ask("extend", n_tokens=room)
        patience = time.monotonic() + DOOR_S
        while heard is Heard.RESERVED and not self._reply["door"]:
            if time.monotonic() > patience:
                self.record.reason = "the request's front door has no connection to the destination"
                return Heard.FAILED
            self._gone.wait(0.01)
            heard = self._ask("query")
        if heard is not Heard.RESERVED:
            return heard
        in_tokens = self._kind is Kind.TOKENS
        if not in_tokens:
            heard = self._give_rest()
            if heard is not Heard.RESERVED:
                return heard

        def freeze(engine: MovingEngine) -> tuple[dict[str, Any], float] | None:
            sequence = self._find(engine)
            if sequence is None:
                return None
            since = sequence.n_tokens - 1 if in_tokens else self._since
            stopped_at = time.perf_counter()
            return engine.export_freeze(request, epoch, since), stopped_at

        self._stopping = True
        try:
            frozen = self._call(freeze)
        except StateRefused as error:
            self._stopping = False
            if time.perf_counter() > self._began_at + NOT_YET_S:
                raise
            # What its prompt's tokens were like comes with its first token, for instance.
            logger.debug("cannot stop yet request=%s cause=%s", request, error.reason)
            self._gone.wait(0.01)
            return Heard.RESERVED
        if frozen is None:
            self._stopping = False
            return Heard.OVER
        self._frozen, self._stopped_at = frozen
        return Heard.STOPPED

    def _commit(self) -> Heard:
        state, kv = self._frozen["state"], self._frozen["kv"]
        self.record.n_tokens = len(state["prompt_ids"]) + len(state["output_ids"])
        if self._kind is Kind.TOKENS:
            n_left, data, chunk = self.record.n_tokens - (self._n_told or 0), b"", None
            self.record.nbytes += 4 * n_left
        else:
            data = kv["data"]
            n_left, chunk = len(data), {key: value for key, value in kv.items() if key != "data"}
            self.record.nbytes += n_left
        self.record.steps.append(n_left)
        self.record.seconds = time.perf_counter() - self._began_at
        heard = self._ask(
            "commit", data, state=state, chunk=chunk, record=self.record.as_wire(), node=self.order.destination.node
        )
        if heard is Heard.COMMITTED:
            self.record.stop_ms = 1e3 * (time.perf_counter() - self._stopped_at)
        return heard

    # --- the connection ---

    def _ask(self, op: str, payload: bytes = b"", *, answer_s: float | None = None, **fields: Any) -> Heard:
        """Send a message, and hear what comes back; nothing that comes in time is :attr:`Heard.LOST`."""
        if self._n_lost:
            first, longest = AGAIN_S
            wake = self._closing if self.state.stopped else self._gone
            wake.wait(min(longest, first * 2 ** min(self._n_lost - 1, 10)))
        if self._gone.is_set() and not self.state.stopped:
            return Heard.GONE
        message = {"op": op, "request": self.order.request, "epoch": self.ticket.epoch, "to": self._peer, **fields}
        to = self.order.destination
        try:
            if self._wire is None:
                connect_s = min(CONNECT_S, self._answer_s)
                self._wire = dial(to.address, self._token(), self._tls, connect_s=connect_s, idle_s=self._answer_s)
            self._wire.limit(self._answer_s if answer_s is None else answer_s)
            move_wire.send(self._wire, message, payload)
            reply, _ = move_wire.receive(self._wire)
            heard = Heard(reply["answer"])
        except (OSError, PeerBusy, Refused, KeyError, ValueError) as error:
            self._hang_up()
            self._n_lost += 1
            self.record.reason = f"node {to.node} does not answer: {error or type(error).__name__}"
            # Whoever was there has closed his port, and his engines with it.
            ended = isinstance(error, ConnectionRefusedError) and self._peer is not None
            return Heard.GONE if ended or (self._gone.is_set() and not self.state.stopped) else Heard.LOST
        self._n_lost = 0
        if self._peer is not None and reply["incarnation"] != self._peer:
            self.record.reason = f"the worker of node {to.node} was started anew"
            return Heard.GONE
        self._peer = reply["incarnation"]
        self._reply = {**self._reply, **reply}
        if reply.get("reason"):
            self.record.reason = reply["reason"]
        return heard

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.sock.close()

    def _cut(self) -> None:
        wire = self._wire
        if wire is not None:
            with suppress(OSError):
                # Not TLS's: that one forgets its state, which another thread is using.
                socket.socket.shutdown(wire.sock, socket.SHUT_RDWR)
