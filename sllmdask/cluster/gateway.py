"""Request to token stream. One per front door.

It asks the scheduler where a request goes, sends it there, and turns accepted tokens into text. Tokens come from the worker
over one persistent connection; they never pass through the scheduler. It holds nothing that another front door could not rebuild
or that does not die with its own requests.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from distributed.core import ConnectionPool
from distributed.security import Security

from sllmdask.actors.streams import Message, Outbox, messages, open_stream
from sllmdask.batching.params import TokenLogprobs
from sllmdask.batching.sequence import FinishReason
from sllmdask.cluster.following import Following, Stop
from sllmdask.cluster.journal import (
    Delta,
    EmbedRequest,
    Finished,
    GatewayEvent,
    GenerateRequest,
    Journal,
    Progress,
    Started,
)
from sllmdask.cluster.lookout import Lookout
from sllmdask.config import Deployment, Settings
from sllmdask.engine.text import TextStream, Tokenizer, preload
from sllmdask.errors import (
    AdapterNotFound,
    Cancelled,
    InstanceGone,
    InvalidRequest,
    ModelNotFound,
    ModelReplaced,
    QueueFull,
    QueueTimeout,
    SchedulerUnreachable,
    SllmError,
    WorkerLost,
    from_wire,
)
from sllmdask.units import format_bytes

logger = logging.getLogger(__name__)

#: Ended requests that ``GET /admin/requests`` still shows.
N_RECENT = 256
#: Times that a request goes back to the queue because its instance was gone before its first token.
MAX_RETURNS = 5
#: Times that an answer is continued elsewhere because its instance died: a request that kills who serves it does not kill all.
MAX_RESUMES = 3
#: Pings in a row that a worker may leave without an answer, before it counts as lost.
N_PINGS = 10
#: Seconds beyond a request's deadline, or beyond the last news of it, after which it is given up without the scheduler.
DEADLINE_MARGIN_S = 30.0
#: Seconds between attempts to reach a scheduler that went away, from the first to the longest, and for one of them.
RECONNECT_S = (0.2, 1.0)
REACH_S = 2.0


class _Active:
    """A request under way: its journal, its text so far, and what has arrived for it."""

    def __init__(self, key: str, request: GenerateRequest | EmbedRequest, text: TextStream, revision: int = 0) -> None:
        #: What the cluster calls the request. Clients repeat their ids, at once and at several front doors; this one is unique.
        self.key = key
        self.journal = Journal(request)
        self.following = Following(self.journal)
        self.text = text
        self.inbox: asyncio.Queue[Message | SllmError] = asyncio.Queue()
        self.n_returns = 0
        self.n_resumes = 0
        #: Which checkpoint of the model it was begun with: only the same one can continue it.
        self.revision = revision
        self.began_at = self.waits_since = time.monotonic()
        self.runs_since = 0.0
        self.first_token_s: float | None = None
        #: When its last token was accepted.
        self.last_token_at: float | None = None
        self.error: str | None = None
        #: Whether it was told last that its instance is being read.
        self.reading = False

    def as_row(self) -> dict[str, Any]:
        """One row of ``GET /admin/requests``."""
        return self.journal.as_row() | {"seconds": time.monotonic() - self.began_at}

    def outcome(self) -> dict[str, Any]:
        """What the scheduler, which sees no token, is told of its end."""
        journal = self.journal
        told = {"state": journal.state, "n_tokens": len(journal.output_ids), "path": journal.path, "error": self.error}
        return told | {"first_token_s": self.first_token_s, "moves": [dict(move) for move in journal.moves]}


class WorkerLink:
    """The connection to one worker, for all requests that run there."""

    def __init__(self, gateway: Gateway, worker: str) -> None:
        self._gateway, self.worker = gateway, worker
        self._ping_every_s = gateway.settings.server.worker_silence / N_PINGS
        self._n_unheard = 0
        self._unsent: list[Message] = []
        self._outbox: Outbox | None = None
        self._task = asyncio.create_task(self._run())

    def send(self, message: Message) -> None:
        if self._outbox is None:
            self._unsent.append(message)
        else:
            self._outbox.put(message)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._talk()
        except OSError as error:
            logger.warning("worker %s cannot be reached: %s", self.worker, error)
        except Exception:
            logger.exception("the connection to worker %s failed", self.worker)
        finally:
            self._gateway.worker_lost(self)

    async def _talk(self) -> None:
        comm = await open_stream(self.worker, "sllm-stream", timeout_s=5, front_door=self._gateway.id)
        self._outbox = Outbox(comm)
        pinger = asyncio.create_task(self._ping(self._outbox, comm))
        try:
            for message in self._unsent:
                self._outbox.put(message)
            self._unsent.clear()
            async for message in messages(comm):
                self._n_unheard = 0
                self._gateway.from_worker(message)
        finally:
            pinger.cancel()
            await self._outbox.close()

    async def _ping(self, outbox: Outbox, comm: Any) -> None:
        """A worker that hangs or is cut off closes no connection; Dask would notice after half a minute.

        Pings are counted, not seconds: a front door that stood still itself has to read first what came meanwhile.
        """
        number = 0
        while True:
            await asyncio.sleep(self._ping_every_s)
            number += 1
            self._n_unheard += 1
            outbox.put(["ping", number])
            if self._n_unheard > N_PINGS:
                comm.abort()


class Gateway(Lookout):
    """Where the HTTP server hands its requests in. Belongs to one event loop; :meth:`start` before use."""

    def __init__(self, scheduler: str, settings: Settings) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._scheduler, self.settings = scheduler, settings
        self._move_patience_s = settings.server.move_patience
        self._pool = ConnectionPool(deserialize=True, connection_args=Security().get_connection_args("client"), timeout=10)
        self._outbox: Outbox | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._rows: dict[str, dict[str, Any]] = {}
        #: How far instances are that take requests and are still being read, and which of those have given a token since.
        self._reading: dict[str, dict[str, Any]] = {}
        self._answering: set[str] = set()
        self._n_workers = 0
        #: Set while there is a connection.
        self._connected = asyncio.Event()
        self._mirrored = asyncio.Event()
        #: Requests under way, by the cluster's name for them.
        self._active: dict[str, _Active] = {}
        self._numbers = itertools.count(1)
        self._recent: deque[dict[str, Any]] = deque(maxlen=N_RECENT)
        self._links: dict[str, WorkerLink] = {}
        self._tokenizers: dict[tuple[str, int], asyncio.Task[Tokenizer]] = {}

    # --- life ---

    async def start(self) -> None:
        """Connect to the scheduler; raises :class:`SchedulerUnreachable`."""
        await self._pool.start()
        preloading = asyncio.get_running_loop().run_in_executor(None, preload)
        comm = await self._connect(10)
        await preloading
        self._supervisor = asyncio.create_task(self._supervise(comm))
        try:
            await asyncio.wait_for(self._mirrored.wait(), 10)
        except TimeoutError:
            raise SchedulerUnreachable(self._scheduler, "it does not answer as sllmdask") from None

    async def close(self) -> None:
        """End every request, and let go of the cluster."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for link in list(self._links.values()):
            await link.close()
        for task in self._tokenizers.values():
            task.cancel()
        await asyncio.gather(*self._tokenizers.values(), return_exceptions=True)
        await self._pool.close()

    async def _connect(self, timeout_s: float) -> Any:
        try:
            return await open_stream(self._scheduler, "sllm-front-door", timeout_s=timeout_s, front_door=self.id)
        except (OSError, ValueError, MemoryError) as error:  # MemoryError: a server of another kind, whose words read as lengths
            raise SchedulerUnreachable(self._scheduler, " ".join(str(error).split())) from None

    async def _supervise(self, comm: Any) -> None:
        """Follow the scheduler; when it goes away, streams that run go on, and what waits is asked again on its return."""
        while True:
            self._outbox = Outbox(comm)
            self._connected.set()
            self._announce()
            try:
                async for message in messages(comm):
                    self._from_scheduler(message)
            except Exception:
                # The connection is begun anew, as if it had been lost: without it, every request would wait for ever.
                logger.exception("a message from the scheduler could not be understood")
            outbox, self._outbox = self._outbox, None
            self._connected.clear()
            await outbox.close()
            self._n_workers = 0
            for active in self._active.values():
                self._time_out(active)
            self._show_reading({})
            logger.warning("lost the scheduler at %s; trying again", self._scheduler)
            pause_s = RECONNECT_S[0]
            while True:
                await asyncio.sleep(pause_s)
                try:
                    comm = await self._connect(REACH_S)
                    break
                except SchedulerUnreachable:
                    pause_s = min(RECONNECT_S[1], pause_s * 2)

    def _announce(self) -> None:
        """Tell a scheduler that may be another one which requests run, and where, and then which wait, the oldest first."""
        for active in self._active.values():
            journal = active.journal
            if journal.worker is not None:
                told = {**self._facts(active), "n_tokens": len(journal.output_ids), "node": journal.node}
                told["running_s"] = time.monotonic() - active.runs_since
                self._tell(["running", active.key, journal.request.model, journal.request.priority, journal.instance, told])
        for active in self._active.values():
            if active.journal.worker is None:
                self._ask_for_place(active)

    def _time_out(self, active: _Active) -> None:
        """While there is no scheduler, nobody else tells a request that waits that its time is over."""
        if active.journal.worker is None:
            late_in_s = active.waits_since + self._deadline_s(active) - time.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, late_in_s), self._say_late, active, active.waits_since)

    def _say_late(self, active: _Active, waits_since: float) -> None:
        if not self.connected and active.journal.worker is None and active.waits_since == waits_since:
            reason = f"the scheduler at {self._scheduler} is not connected"
            active.inbox.put_nowait(QueueTimeout(active.journal.request.model, self._deadline_s(active), reason))

    def _deadline_s(self, active: _Active) -> float:
        """Seconds that a request may wait for a place."""
        given = active.journal.request.deadline_s
        return self.settings.scheduler.request_deadline if given is None else given

    # --- what is there ---

    @property
    def ready(self) -> bool:
        """Whether a request could be placed."""
        return self._outbox is not None and self._n_workers > 0

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    @property
    def not_ready_reason(self) -> str:
        if self._outbox is None:
            return f"The scheduler at {self._scheduler} is not connected."
        start_one = "Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin"
        return f"No worker is connected, or all are being drained. {start_one}"

    def models(self) -> list[dict[str, Any]]:
        """The deployed models as the scheduler last told; never waits."""
        return list(self._rows.values())

    def max_model_len(self, model: str) -> int:
        return int(self._row(model)["max_model_len"])

    def resolve(self, model: str, adapter: str | None = None) -> tuple[str, tuple[str, str] | None]:
        """The deployment that `model` names, and the name and source of its LoRA adapter that was asked for, if one was.

        ``BASE:ADAPTER`` names both. Raises :class:`ModelNotFound` and :class:`AdapterNotFound`.
        """
        base, _, named = model.rpartition(":")
        if model not in self._rows and not adapter and base in self._rows:
            model, adapter = base, named
        row = self._row(model)
        if not adapter:
            return model, None
        adapters = row.get("adapters") or {}
        if adapter not in adapters:
            raise AdapterNotFound(model, adapter, difflib.get_close_matches(adapter, adapters, n=3))
        return model, (adapter, adapters[adapter])

    def embedding(self, model: str) -> dict[str, Any] | None:
        """How the model makes embeddings, an ``EmbeddingInfo`` as plain types; ``None``: it generates text."""
        embedding: dict[str, Any] | None = self._row(model).get("embedding")
        return embedding

    def requests(self) -> list[dict[str, Any]]:
        """Requests under way, then those that ended lately, newest first."""
        return [active.as_row() for active in self._active.values()] + list(self._recent)

    def end_here(self, request: str, error: SllmError) -> bool:
        """End the requests of this id, or this key, with `error`; whether there were any."""
        found = [active for active in self._active.values() if request in (active.key, active.journal.request.id)]
        for active in found:
            active.inbox.put_nowait(error)
        return bool(found)

    async def cluster(self) -> dict[str, Any]:
        """The workers, their slots, tiers and models."""
        return await self._ask("sllm_cluster")

    async def register(self, deployment: Deployment) -> dict[str, Any]:
        """Deploy a model, or deploy it again with other settings; returns ``model`` and ``warnings``."""
        reply = await self._ask("sllm_register", deployment=deployment.model_dump(mode="json", exclude_unset=True))
        # The mirror's own news comes on another connection, maybe later than the first request for the model.
        self._rows[deployment.model] = reply.pop("row")
        # The first request need not wait for it then.
        await self.tokenizer(deployment.model)
        return reply

    async def update(self, model: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change some settings of a deployment; returns ``model`` and ``warnings``."""
        reply = await self._ask("sllm_update", model=model, changes=changes)
        self._rows[model] = reply.pop("row")
        await self.tokenizer(model)
        return reply

    async def delete(self, model: str, adapters: list[str] | None = None, force: bool = False) -> dict[str, Any]:
        """Forget a model, or only these of its LoRA adapters; raises :class:`ModelNotFound` or :class:`AdapterNotFound`.

        Requests that run may finish, unless by `force`; the answer has ``n_running`` and ``n_aborted``.
        """
        reply = await self._ask("sllm_delete", model=model, adapters=adapters, force=force)
        if adapters is not None:
            self._rows[model] = reply.pop("row")
            return reply
        self._rows.pop(model, None)
        for old in [old for old in self._tokenizers if old[0] == model]:
            del self._tokenizers[old]
        return reply

    async def load(self, model: str, node: str | None, tier: str, wait: bool) -> dict[str, Any]:
        """Make a model ready on a node (`tier` ``device``), or bring it to a node's host memory (``host``).

        Raises :class:`ModelNotFound`, :class:`InvalidRequest` (no such node), :class:`LoadFailed`, :class:`NoWorker`...
        """
        return await self._ask("sllm_load", model=model, node=node, tier=tier, wait=wait)

    async def unload(self, model: str, node: str | None, wait: bool) -> dict[str, Any]:
        """Take a model from the devices; what runs may end first."""
        return await self._ask("sllm_unload", model=model, node=node, wait=wait)

    async def pin(self, model: str, node: str | None, pinned: bool) -> dict[str, Any]:
        """Keep a model's host copy on a node, or let it be evicted again."""
        reply = await self._ask("sllm_pin", model=model, node=node, pinned=pinned)
        self._rows[model] = reply.pop("row")
        return reply

    async def pull(self, model: str | None, source: str | None, node: str | None, wait: bool) -> dict[str, Any]:
        """Bring the files of a model, or of a source that is not deployed, to a node's disk."""
        return await self._ask("sllm_pull", model=model, source=source, node=node, wait=wait)

    async def migrate(self, request: str | None, instance: str | None, to: str, kind: str | None, wait: bool) -> dict[str, Any]:
        """Move a request, by its id, or all requests of an instance, to node `to`; see ``POST /admin/migrate``.

        Raises :class:`InvalidRequest` if there is no such request, instance or node, :class:`LoadFailed`, :class:`NoWorker`...
        """
        ids = {key: active.journal.request.id for key, active in self._active.items()}
        keys = None
        if request is not None:
            keys = [key for key, known in ids.items() if request in (key, known)]
            if not keys and any(row["id"] == request for row in self._recent):
                raise InvalidRequest(f"The request {request!r} has ended.", "request")
            keys = keys or [request]
        named = None if keys is None else {key: ids.get(key, key) for key in keys}
        reply = await self._ask("sllm_migrate", requests=named, instance=instance, to=to, kind=kind, wait=wait)
        moves = [{**move, "request": ids.get(key, key)} for key, move in reply["moves"].items()]
        return {**reply, "moves": moves}

    async def drain(self, node: str, wait: bool, undo: bool) -> dict[str, Any]:
        """Empty a node, or let it be; see ``POST /admin/drain``. Raises :class:`InvalidRequest` if there is no such node."""
        return await self._ask("sllm_drain", node=node, wait=wait, undo=undo)

    async def tokenizer(self, model: str) -> Tokenizer:
        """The model's tokenizer, fetched once; raises :class:`ModelNotFound`."""
        key = (model, int(self._row(model)["revision"]))
        task = self._tokenizers.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            for old in [old for old in self._tokenizers if old[0] == model]:
                del self._tokenizers[old]  # not cancelled: others may wait for it
            task = self._tokenizers[key] = asyncio.create_task(self._fetch_tokenizer(model))
        return await asyncio.shield(task)

    async def _fetch_tokenizer(self, model: str) -> Tokenizer:
        reply = await self._ask_again("sllm_files", model=model)
        directory = Path(tempfile.mkdtemp(prefix="sllmdask-tokenizer-"))
        try:
            for name, content in reply["files"].items():
                (directory / Path(name).name).write_bytes(content)
            return await asyncio.to_thread(Tokenizer.from_directory, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _row(self, model: str) -> dict[str, Any]:
        row = self._rows.get(model)
        if row is None:
            raise ModelNotFound(model, difflib.get_close_matches(model, self._rows, n=3))
        return row

    async def _ask_again(self, op: str, **arguments: Any) -> dict[str, Any]:
        """An answer that a request waits for: it waits for a scheduler that is away, too, as long as a request may."""
        unreachable = SchedulerUnreachable(self._scheduler, "it does not answer")
        try:
            async with asyncio.timeout(self.settings.scheduler.request_deadline):
                while True:
                    try:
                        return await self._ask(op, **arguments)
                    except SchedulerUnreachable as error:
                        unreachable = error
                    await asyncio.sleep(RECONNECT_S[0])  # it is a moment before the loss of the connection is known
                    await self._connected.wait()
        except TimeoutError:
            raise unreachable from None

    async def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if not self.connected:  # Dask would try to reach it for a while
            raise SchedulerUnreachable(self._scheduler, "it is not connected")
        try:
            reply: dict[str, Any] = await getattr(self._pool(self._scheduler), op)(**arguments)
        except (UnicodeEncodeError, OverflowError) as error:
            raise InvalidRequest(f"The request holds what cannot be sent: {error}") from None
        except (OSError, ValueError) as error:
            raise SchedulerUnreachable(self._scheduler, " ".join(str(error).split())) from None
        if "error" in reply:
            raise from_wire(reply)
        return reply

    # --- one request ---

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GatewayEvent]:
        """What happens to `request`, up to :class:`Finished`; closing the generator cancels it wherever it is.

        Raises what the cluster answered: :class:`QueueTimeout`, :class:`NoWorker`, :class:`LoadFailed`, :class:`WorkerLost`...
        """
        tokenizer = await self.tokenizer(request.model)
        async with aclosing(self._serve(request, tokenizer.stream(request.params.stop))) as events:
            async for event in events:
                yield event

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[GatewayEvent]:
        """As :meth:`generate`; the answer comes as one :class:`~sllmdask.cluster.journal.Embedded` for each input, in any order.

        Nobody has seen a part of it before the end, so a request whose worker dies begins again elsewhere, with what is missing.
        """
        self._row(request.model)
        nothing = TextStream(lambda _: "")
        async with aclosing(self._serve(request, nothing)) as events:
            async for event in events:
                yield event

    async def _serve(self, request: GenerateRequest | EmbedRequest, text: TextStream) -> AsyncGenerator[GatewayEvent]:
        if not self.connected:
            # A scheduler would refuse them.
            n_waiting = sum(active.journal.worker is None for active in self._active.values())
            if n_waiting >= self.settings.scheduler.max_queue:
                raise QueueFull(request.model, self.settings.scheduler.max_queue)
        active = _Active(f"{self.id}:{next(self._numbers)}", request, text, int(self._row(request.model)["revision"]))
        self._active[active.key] = active
        try:
            self._ask_for_place(active)
            if not self.connected:
                self._time_out(active)
            yield Progress("queued", f"waiting for {request.model}")
            while True:
                message = await self._next(active)
                if isinstance(message, SllmError):
                    self._fail(active, message)
                    continue
                for event in self._follow(active, message):
                    yield event
                    if isinstance(event, Finished):
                        return
        finally:
            self._close(active)

    async def _next(self, active: _Active) -> Message | SllmError:
        """The next message; while the request waits for a place, not for much longer than the scheduler would let it."""
        if active.journal.worker is not None:
            return await active.inbox.get()
        limit_s = self._deadline_s(active) + DEADLINE_MARGIN_S
        try:
            return await asyncio.wait_for(active.inbox.get(), limit_s)
        except TimeoutError:
            return QueueTimeout(active.journal.request.model, limit_s, "the scheduler did not answer")

    def _follow(self, active: _Active, message: Message) -> list[GatewayEvent]:
        """What one message means for its request."""
        journal = active.journal
        match message:
            case ["progress", state, detail, done, total] if journal.worker is None:
                return [Progress(state, detail, done, total)]
            case ["dispatch", *_] if journal.worker is not None:
                # The scheduler before this one had sent it elsewhere, which was not known yet when it was asked again.
                self._tell(["at", active.key, journal.instance])
            case ["dispatch", _, instance, worker, node, loaded_from, queue_s]:
                self._check_revision(active)
                active.runs_since = time.monotonic()
                journal.instance, journal.worker, journal.node, journal.state = instance, worker, node, "running"
                journal.path.append(node)
                active.reading = False
                self._link(worker).send(journal.submission(active.key))
                return [Started(node, loaded_from or "hit", queue_s), *self._tell_reading(active)]
            case ["reading", instance] if instance == journal.instance:
                return self._tell_reading(active)
            case ["refuse", _, error]:
                journal.state = "refused"
                raise from_wire(error)
            case ["tokens", _, epoch, index, token_ids, reason, *scores] if epoch == journal.epoch:
                return [*self._accept(active, index, list(token_ids), reason, *scores), *self._go_over(active)]
            case ["moving", _, epoch, worker]:
                self._link(worker)
                active.following.moving(epoch, worker)
            case ["tokens" | "error" | "stayed" | "left", *_] if active.following.hold(message):
                return []
            case ["moved", *_]:
                self._stop(active.key, active.following.moved(message))
                if active.following.waits:
                    self._look_after(active)
                return self._go_over(active)
            case ["stayed", *_]:
                instance = journal.instance
                self._stop(active.key, active.following.stayed(message))
                if journal.instance != instance:
                    self._tell(["at", active.key, journal.instance])
                self._look_after(active)
            case ["left", _, _, epoch, worker, record] if not active.following.left(epoch, record):
                # If it cannot speak to us, nobody does.
                loop, lost = asyncio.get_running_loop(), ["missing", active.key, epoch, worker]
                loop.call_later(self._move_patience_s if worker in self._links else 0, active.inbox.put_nowait, lost)
            case ["doubting", _, epoch, *to] if epoch == journal.epoch:
                # The source does not know whether the request is here or there, and nobody runs it until somebody does.
                lost = ["missing", active.key, *to]
                asyncio.get_running_loop().call_later(self._move_patience_s, active.inbox.put_nowait, lost)
            case ["missing", _, epoch, worker, *instance] if epoch > journal.epoch and not active.following.waits:
                if journal.worker in self._links and journal.instance is not None:
                    self._stop(active.key, [Stop(journal.worker, journal.instance, journal.epoch)])
                self._fail(active, WorkerLost(worker), *instance)
                return [Progress("queued", f"waiting for {journal.request.model}")]
            case ["recalled", _, epoch, _] if epoch == journal.epoch + 1 and not active.following.waits:
                # It is not where it was going to, and will not come there.
                self._fail(active, WorkerLost(str(journal.worker)))
                return [Progress("queued", f"waiting for {journal.request.model}")]
            case ["embeddings", _, epoch, vectors]:
                return self._accept_vectors(active, epoch, vectors)
            case ["error", _, epoch, error] if epoch == journal.epoch:
                if active.following.waits and not _wants_logprobs(journal):
                    # The instance that it came from has died with its last words, which are known.
                    rest = self._accept(active, len(journal.output_ids), active.following.rest(), None)
                    return [*rest, *self._go_over(active)]
                self._fail(active, from_wire(error))
                return [Progress("queued", f"waiting for {journal.request.model}")]
        return []

    def _go_over(self, active: _Active) -> list[GatewayEvent]:
        """Follow what the instance has said that the request went to, once nothing is missing from the one before."""
        journal = active.journal
        if journal.state == "finished":
            return []
        epoch = journal.epoch
        held = active.following.settled()
        if journal.epoch != epoch:
            # Who moved it may have died before it could say so.
            self._tell(["at", active.key, journal.instance])
            self._look_after(active)
        events: list[GatewayEvent] = []
        for message in held:
            events += self._follow(active, message)
            if journal.state == "finished":  # by a stop string: what comes after it is not of the answer
                break
        return events

    def _look_after(self, active: _Active) -> None:
        """Say so if the instance that is followed was lost before it was followed."""
        journal = active.journal
        if active.following.lost or journal.worker not in self._links:
            self._say_lost(active, journal.worker, journal.epoch)

    def _stop(self, key: str, stops: list[Stop]) -> None:
        for stop in stops:
            self._link(stop.worker).send(["cancel", key, stop.instance, stop.epoch])

    def _tell_reading(self, active: _Active) -> list[GatewayEvent]:
        """How far the instance is that will give the first token, and once that it is all there."""
        journal = active.journal
        told = None if journal.output_ids else self._reading.get(journal.instance or "")
        if told is None and not active.reading:
            return []
        active.reading = told is not None
        if told is None:
            return [] if journal.output_ids else [Progress("working", "working")]
        return [_loading(journal.request.model, told)]

    def _accept(
        self,
        active: _Active,
        index: int,
        token_ids: list[int],
        reason: str | None,
        logprobs: Sequence[Any] = (),
        prompt_logprobs: Sequence[Any] | None = None,
    ) -> list[GatewayEvent]:
        """The next tokens as text. A stop string ends the answer here; what the engine made beyond it is not counted."""
        journal = active.journal
        n_before = len(journal.output_ids)
        accepted = journal.accept(journal.epoch, index, token_ids)
        if accepted:
            self._tell_pauses(active)
        text = active.text.push(accepted)
        if active.text.stopped:
            del journal.output_ids[active.text.n_accepted :]
            reason = FinishReason.STOP
        fresh = tuple(journal.output_ids[n_before:])
        if fresh and active.first_token_s is None:
            active.first_token_s = time.monotonic() - active.began_at
        told = tuple(map(TokenLogprobs.from_wire, logprobs[len(logprobs) - len(accepted) :][: len(fresh)])) if logprobs else ()
        of_prompt = None if prompt_logprobs is None or n_before else tuple(map(TokenLogprobs.from_wire, prompt_logprobs))
        if reason is None:
            return [Delta(text, fresh, told, of_prompt)] if fresh else []
        text += active.text.flush()
        if active.text.stopped:  # a stop string that ends in half a character is only seen at the end
            reason = FinishReason.STOP
        journal.state = "finished"
        end = Finished(FinishReason(reason), journal.request.n_prompt_tokens, len(journal.output_ids))
        return [Delta(text, fresh, told, of_prompt), end] if fresh or text else [end]

    def _tell_pauses(self, active: _Active) -> None:
        """A token was accepted: what its client waited for it, after a move or a loss, is for the scheduler's records."""
        now, last_at = time.monotonic(), active.last_token_at
        active.last_token_at = now
        move = active.following.told()
        if move is not None:
            self._tell(["paused", active.key, move["epoch"], move["pause_ms"]])
        resume = active.journal.resume_over("resumed", None if last_at is None else 1e3 * (now - last_at))
        if resume is not None:
            self._tell(["resumed", active.key, resume])

    def _accept_vectors(self, active: _Active, epoch: int, vectors: list[Any]) -> list[GatewayEvent]:
        journal = active.journal
        events: list[GatewayEvent] = [*journal.accept_vectors(epoch, [(index, bytes(data)) for index, data in vectors])]
        assert isinstance(journal.request, EmbedRequest)
        if len(journal.embedded) == len(journal.request.inputs):
            journal.state = "finished"
            events.append(Finished(FinishReason.STOP, journal.request.n_prompt_tokens, 0))
        return events

    def _fail(self, active: _Active, error: SllmError, lost: str | None = None) -> None:
        """What lost its instance or its worker goes back to its place in the queue, to be continued elsewhere with its tokens.

        All else is raised, and so is the loss of one instance too many. `lost` is the instance, if it is another than where the
        request was last.
        """
        journal = active.journal
        began = bool(journal.output_ids)
        spent = active.n_resumes >= MAX_RESUMES if began else active.n_returns >= MAX_RETURNS
        if isinstance(error, InstanceGone | WorkerLost):
            journal.lost("worker" if isinstance(error, WorkerLost) else "instance")
        if not isinstance(error, InstanceGone | WorkerLost) or spent:
            journal.state = "cancelled" if isinstance(error, Cancelled) else "failed"
            active.error = error.message
            raise error
        self._check_revision(active)
        active.n_resumes += began
        active.n_returns += not began
        if began:
            logger.info(
                "continue request=%s model=%s n_tokens=%d node=%s cause=%s",
                journal.request.id,
                journal.request.model,
                len(journal.output_ids),
                journal.node,
                error.code,
            )
        self._stop(active.key, active.following.elsewhere())
        near = active.following.nearest if lost is None else None  # what does not answer is near, too
        active.following = Following(journal)
        lost = lost or journal.instance
        journal.begin_anew()
        active.waits_since = time.monotonic()
        self._ask_for_place(active, "returned", lost, near)
        if not self.connected:
            self._time_out(active)

    def _check_revision(self, active: _Active) -> None:
        """Raise :class:`ModelReplaced` if the answer has begun and the model's name stands for another checkpoint by now."""
        journal = active.journal
        row = self._rows.get(journal.request.model)
        if journal.output_ids and row is not None and int(row["revision"]) != active.revision:
            journal.state = "failed"
            raise ModelReplaced(journal.request.model)

    def _close(self, active: _Active) -> None:
        """Forget a request, and stop it where it still runs."""
        journal = active.journal
        del self._active[active.key]
        if journal.state in ("queued", "running"):
            journal.state = "cancelled"
        link = self._links.get(journal.worker) if journal.worker else None
        if link is not None and (journal.state != "finished" or active.text.stopped):
            link.send(["cancel", active.key, journal.instance, None])
        self._stop(active.key, active.following.elsewhere())
        outcome = {"finished": "resumed", "cancelled": "cancelled"}.get(journal.state, "failed")
        resume = journal.resume_over(outcome)
        if resume is not None:
            self._tell(["resumed", active.key, resume])
        self._tell(["ended", active.key, active.outcome()])
        self._recent.appendleft(active.as_row())

    def _ask_for_place(self, active: _Active, what: str = "request", lost: str | None = None, near: str | None = None) -> None:
        """Have the request wait. `lost`: the instance that it ran on, which the scheduler may not know yet if it has moved, or
        one that does not answer. `near`: the worker that has most of what was computed for it."""
        request = active.journal.request
        told = {**self._facts(active), "waited_s": time.monotonic() - active.waits_since, "lost": lost}
        told["n_output"] = len(active.journal.output_ids)
        if near is not None:
            told["near"] = near
        self._tell([what, active.key, request.model, request.priority, request.deadline_s, told])

    @staticmethod
    def _facts(active: _Active) -> dict[str, Any]:
        """What the scheduler is told of a request; ``seconds`` since it came."""
        request = active.journal.request
        max_new_tokens = request.params.max_tokens if isinstance(request, GenerateRequest) else 0
        facts = {"id": request.id, "n_prompt_tokens": request.n_prompt_tokens, "max_new_tokens": max_new_tokens}
        return {**facts, "seconds": time.monotonic() - active.began_at}

    def _tell(self, message: Message) -> None:
        if self._outbox is not None:
            self._outbox.put(message)

    # --- messages ---

    def _from_scheduler(self, message: Message) -> None:
        match message:
            case ["mirror", rows, n_workers]:
                self._n_workers = n_workers
                self._rows = {row["model"]: row for row in rows}
                self._mirrored.set()
            case ["models", changed, gone, n_workers]:
                self._n_workers = n_workers
                for name in gone:
                    self._rows.pop(name, None)
                for row in changed:
                    self._rows[row["model"]] = row
                self._show_progress([row for row in changed if row["state"] == "loading"])
            case ["reading", reading]:
                self._show_reading(reading)
            case ["count"]:
                counts = {key: len(active.journal.output_ids) for key, active in self._active.items()}
                self._tell(["counted", {key: n for key, n in counts.items() if n}])
            case ["rows", number]:
                self._tell(["rows", number, self.requests()])
            case ["cancel", key]:
                self.end_here(key, Cancelled("An operator cancelled the request."))
            case ["dispatch" | "refuse", key, *_]:
                active = self._active.get(key)
                if active is not None:
                    active.inbox.put_nowait(message)
            case _:
                logger.warning("unknown message from the scheduler: %r", message[:1])

    def _show_progress(self, rows: list[dict[str, Any]]) -> None:
        """Tell who waits for a loading model how far it is."""
        loading = {row["model"]: row for row in rows}
        for active in self._active.values():
            row = loading.get(active.journal.request.model)
            if row is not None and active.journal.worker is None:
                told = {**row, "done": row["done"] or 0, "total": row["nbytes"]}
                event = _loading(row["model"], told)
                active.inbox.put_nowait(["progress", event.state, event.detail, event.done, event.total])

    def _show_reading(self, reading: dict[str, dict[str, Any]]) -> None:
        """Tell who was dispatched to an instance and has no token yet how far it is."""
        self._answering &= reading.keys()
        before, self._reading = self._reading, {key: told for key, told in reading.items() if key not in self._answering}
        changed = {key for key in before.keys() | self._reading.keys() if before.get(key) != self._reading.get(key)}
        for active in self._active.values():
            if active.journal.instance in changed and not active.journal.output_ids:
                active.inbox.put_nowait(["reading", active.journal.instance])

    def _answers(self, instance: str | None) -> None:
        """A token came: all bytes of its instance are there, whatever was told of it last."""
        if instance in self._reading:
            self._answering.add(instance)
            self._show_reading(self._reading)
            self._tell(["read", instance])

    def from_worker(self, message: Message) -> None:
        """One message of a worker's stream."""
        match message:
            case ["tokens" | "embeddings" | "error", key, *_]:
                active = self._active.get(key)
                if active is not None:
                    active.inbox.put_nowait(message)
                    if message[0] == "tokens":
                        active.following.heard(message[2], asyncio.get_running_loop().time())
                    if message[0] != "error" and message[2] == active.journal.epoch:
                        self._answers(active.journal.instance)
            case ["moving" | "doubting" | "moved" | "stayed" | "left" | "recalled", key, *_]:
                active = self._active.get(key)
                if active is not None:
                    active.following.announced(message)
                    active.inbox.put_nowait(message)
                elif message[0] == "moved":
                    # Its client left while it was on its way.
                    self._stop(key, [Stop(message[5], message[4], message[2])])
            case ["pong", _]:
                pass
            case _:
                logger.warning("unknown message from a worker: %r", message[:1])

    def worker_lost(self, link: WorkerLink) -> None:
        """A worker's connection ended: so do the requests that ran there."""
        if self._links.get(link.worker) is link:
            del self._links[link.worker]
        for active in self._active.values():
            journal, following = active.journal, active.following
            following.lose(link.worker)
            if journal.worker == link.worker and (following.going_to in (None, link.worker) or following.waits):
                self._say_lost(active, link.worker, journal.epoch)
            elif journal.worker == link.worker:
                # The request may be elsewhere already, and is about to say so. If it is not, it is not to come there any more.
                going_to = self._links.get(following.going_to or "")
                if going_to is not None:
                    going_to.send(["recall", active.key, journal.epoch + 1])
                asyncio.get_running_loop().call_later(self._move_patience_s, self._say_lost, active, link.worker, journal.epoch)

    def _say_lost(self, active: _Active, worker: str | None, epoch: int) -> None:
        if worker is not None and active.journal.epoch == epoch:
            active.inbox.put_nowait(["error", active.key, epoch, WorkerLost(worker).as_wire()])

    def _link(self, worker: str) -> WorkerLink:
        link = self._links.get(worker)
        if link is None:
            link = self._links[worker] = WorkerLink(self, worker)
        return link


def _loading(model: str, told: dict[str, Any]) -> Progress:
    """``loading qwen 61% disk 2.9 GiB/s``, from what was told of the load."""
    done, total = told["done"], told["total"]
    percent = f" {100 * done // total}%" if total else ""
    rate = f" {told['tier']} {format_bytes(told['bytes_per_s'])}/s" if told["bytes_per_s"] else ""
    return Progress("loading", f"loading {model}{percent}{rate}", done, total)


def _wants_logprobs(journal: Journal) -> bool:
    return isinstance(journal.request, GenerateRequest) and journal.request.params.logprobs is not None
