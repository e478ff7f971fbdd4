"""The instances of one worker: engines that outlive their actors, and the streams that feed them.

Everything here runs on the worker's event loop; engines have a thread each and hand over once per step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distributed.comm import Comm

from sllmdask.actors.adapters import AdapterUse, InstanceAdapters
from sllmdask.actors.backends import OWN, Backends, FilesLease, lease_files
from sllmdask.actors.embeddings import InputLedger
from sllmdask.actors.migration import Moves
from sllmdask.actors.movable import Movable
from sllmdask.actors.streams import Message, Outbox, messages
from sllmdask.batching.backend import Backend, ChecksAdapters, EngineSpec, ModelFacts, PreparesModels, Task
from sllmdask.batching.memory import Kind, MemoryAccount, MemoryLedger
from sllmdask.batching.params import Grammar, SamplingParams
from sllmdask.batching.protocol import StepOutput, TakesAdapters
from sllmdask.batching.sequence import Sequence as TokenSequence
from sllmdask.config import EngineSettings, WorkerSettings
from sllmdask.engine.embedding import EmbeddingEngine, EmbeddingOutput
from sllmdask.engine.engine import EngineThread, LLMEngine
from sllmdask.engine.runner import pick_device
from sllmdask.engine.shortage import is_shortage, not_enough
from sllmdask.engine.sizing import own_ledger, worker_capacity
from sllmdask.engine.warm import warm_up
from sllmdask.errors import (
    AdapterUnsupported,
    Cancelled,
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    EngineError,
    InstanceGone,
    InsufficientMemory,
    SllmError,
    Unavailable,
    WrongTask,
)
from sllmdask.loader.device import CudaDevice, DeviceCopy, lay_out
from sllmdask.loader.disk import named_now
from sllmdask.loader.format import read_index
from sllmdask.loader.records import HostLease
from sllmdask.loader.store import CheckpointStore
from sllmdask.policy.views import Tier
from sllmdask.units import format_bytes

logger = logging.getLogger(__name__)

#: Called with a message for the scheduler: progress of a load, or the loss of an instance.
Report = Callable[[dict[str, Any]], None]

#: How an instance of an embedding model makes its vectors: the arguments `pooling` and `normalize` of its engine.
EmbeddingChoice = dict[str, Any]

#: Seconds that requests may still run in an instance that is to be unloaded.
UNLOAD_GRACE_S = 600.0
#: Seconds without any word of a front door after which its requests are stopped; it pings every two.
SILENT_DOOR_S = 30.0
#: Seconds between two progress reports of one load.
REPORT_EVERY_S = 0.1


class Instance(Movable):
    """One model on this worker: its lease on the host copy, its engine, and who waits for which answer."""

    def __init__(
        self,
        instance_id: str,
        model: str,
        source: str,
        dtype: str,
        registry: InstanceRegistry,
        embedding: EmbeddingChoice | None = None,
        backend: str = OWN,
        n_slots: int = 1,
    ) -> None:
        super().__init__()
        self.id, self.model, self.source, self.dtype = instance_id, model, source, dtype
        #: ``None``: it generates text.
        self.embedding = embedding
        #: What builds its engine.
        self.backend = backend
        self.n_slots = n_slots
        #: Why the scheduler wants it to have no more requests; empty: it does not, as far as is known here.
        self.leaving = ""
        self._inputs = InputLedger()
        #: Reads the files of an adapter for the engine's model; ``None``: the engine takes none.
        self.read_adapter: Callable[..., Any] | None = None
        self._adapters: InstanceAdapters | None = None
        #: What a request has, by its id; and requests that wait for theirs.
        self._uses: dict[str, AdapterUse] = {}
        self._waiting_for_adapters: set[asyncio.Task[None]] = set()
        self._registry = registry
        self._lease: HostLease | FilesLease | None = None
        self._engine: EngineThread | None = None
        #: What brings the weights to a GPU.
        self.copying: DeviceCopy | None = None
        #: What it holds of the worker's memory.
        self.memory: MemoryAccount | None = None
        self._loading: asyncio.Task[dict[str, Any]] | None = None
        self._building = False
        #: Why the engine ended while it was still being loaded.
        self._failure: SllmError | None = None
        #: While the last bytes are on their way to an engine that takes requests already.
        self._arriving: asyncio.Task[None] | None = None
        #: Every byte of the weights has arrived.
        self._whole = False
        self._began_at = self._reported_at = 0.0
        #: Bytes of the load, so far and in all, and the report of them that is due.
        self._read = (0, 0)
        self._reporting: asyncio.TimerHandle | None = None
        #: Seconds of each phase of the load, since it began; overlapping ones overlap.
        self.times: dict[str, float] = {}
        self.closed = False
        #: What further requests are answered with, once an operator has ended those that ran.
        self._refusal: SllmError | None = None
        #: (front door, epoch) of each request by id.
        self._requests: dict[str, tuple[str, int]] = {}
        #: Who computes the prompt of a group, while it is here.
        self._leaders: dict[str, str] = {}
        #: Those of them that are on their way to another instance, because the load has failed.
        self._returning: set[asyncio.Task[None]] = set()
        #: Grammars of requests that the engine will get.
        self._compiling: set[asyncio.Task[None]] = set()
        #: Requests that go on here, and wait until the engine has dropped what it may have had of them.
        self._clearing: set[asyncio.Task[None]] = set()
        #: Set while there is none.
        self._idle = asyncio.Event()
        self._idle.set()

    # --- life ---

    async def load(self, peers: Sequence[str] = ()) -> dict[str, Any]:
        """Bring the checkpoint to the host tier and build the engine over it; asked again, the answer is the same.

        Returns ``loaded_from`` and ``nbytes`` as soon as requests may be sent: the last bytes may still be on their way, and
        the first pass goes behind them. `peers` (``host:port``) have the checkpoint, too.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(peers))
        try:
            return await asyncio.shield(self._loading)
        except SllmError:
            self._registry.discard(self)
            raise
        except asyncio.CancelledError:
            if self._loading.cancelled():
                raise InstanceGone(self.id) from None
            raise

    async def _load(self, peers: Sequence[str]) -> dict[str, Any]:
        registry = self._registry
        self._began_at = time.monotonic()
        source = registry.resolve(self.source)
        backend = await registry.backend(self.backend)
        whole = not registry.settings.execute_while_loading or self.embedding is not None
        lease: HostLease | FilesLease
        try:
            if backend.wants_tensors:
                lease = await registry.store.load(self.source, source, self._progress, whole=whole, peers=peers)
            else:
                lease = await lease_files(registry.store, self.source, source, self._progress, peers)
        except InsufficientMemory as error:
            raise InsufficientMemory(self.model, error.needed, error.available) from None
        self._building = True
        failure: SllmError | None = None
        try:
            self._engine = await registry.build(backend, lease, self)
        except SllmError as error:
            failure = type(error)(*error.args)
        except Exception as error:
            if is_shortage(error):
                failure = not_enough(self.model, error)
            else:
                logger.exception("build failed model=%s instance=%s", self.model, self.id)
                failure = EngineError(f"{self.model!r} could not be built: {error!r}")
        if failure is not None:  # raised here, since the traceback of the first one holds on to the tensors
            self._close_account()
            lease.release()
            raise failure
        assert self._engine is not None
        if self._failure is not None and not self.closed:
            failure = await _why(lease, self._failure)
        if failure is not None or self.closed:  # it ended, or was unloaded, while it was being built
            engine, self._engine = self._engine, None
            copying, self.copying = self.copying, None
            lease.release()
            if copying is not None:
                await asyncio.to_thread(copying.close)
            await asyncio.to_thread(engine.close)
            self._close_account()
            raise failure or InstanceGone(self.id)
        self._lease = lease
        if self.read_adapter is not None:
            capacity = registry.settings.max_adapters
            self._adapters = InstanceAdapters(registry.store, registry.resolve, self.read_adapter, self._engine.call, capacity)
        lease.on_damage(self._load_failed)
        self.times["ready_s"] = time.monotonic() - self._began_at
        if lease.arrivals is None and self.copying is None:
            self._loaded(lease)
        else:
            self._arriving = asyncio.create_task(self._arrive(lease))
        return {"loaded_from": str(lease.tier_from), "nbytes": lease.nbytes}

    async def _arrive(self, lease: HostLease | FilesLease) -> None:
        """Until the last byte is there, also on the device: only then is the instance loaded for good."""
        try:
            await lease.complete()
            if self.copying is not None:
                await asyncio.to_thread(self.copying.join)
        except SllmError as error:
            self._load_failed(error)
        else:
            self._arriving = None
            self._loaded(lease)

    def _loaded(self, lease: HostLease | FilesLease) -> None:
        self._whole = True
        took_s = time.monotonic() - self._began_at
        self.times["read_s"] = took_s if lease.arrivals is not None else lease.seconds
        queue_s, bytes_s = lease.times
        if lease.tier_from is Tier.HOST:
            # Nothing was read: all of it is what it takes to serve what is in memory.
            bytes_s = took_s - queue_s
            self._registry.store.observe_hit(lease.nbytes, bytes_s)
        self.times |= {"queue_s": queue_s, "bytes_s": bytes_s}
        self._registry.report({"kind": "loaded", "instance": self.id, "load": dict(self.times)})
        phases = " ".join(f"{phase}={seconds:.3f}" for phase, seconds in self.times.items())
        logger.info(
            "loaded model=%s instance=%s from=%s nbytes=%d %s", self.model, self.id, lease.tier_from, lease.nbytes, phases
        )

    def _load_failed(self, error: SllmError) -> None:
        """The load of an instance that serves already: who waits for it is sent elsewhere."""
        if not self.closed:
            self.closed = True
            self._registry.lost(self, error, while_loading=True)

    def _progress(self, done: int, total: int) -> None:
        """Told to the scheduler now and then, and always in the end: also of bytes after which none come for a while."""
        self._read = (done, total)
        wait_s = self._reported_at + REPORT_EVERY_S - time.monotonic()
        if done == total or wait_s <= 0:
            self._report_progress()
        elif self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(wait_s, self._report_progress)

    def _report_progress(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        if self.closed:
            return
        self._reported_at = time.monotonic()
        self._registry.report(self._how_far())

    def _how_far(self) -> dict[str, Any]:
        done, total = self._read
        seconds = time.monotonic() - self._began_at
        return {
            "kind": "progress",
            "instance": self.id,
            "done": done,
            "total": total,
            "tier": str(self._registry.store.tier_of_load(self.source)),
            "bytes_per_s": done / seconds if seconds > 0 else 0.0,
        }

    async def close(self, error: SllmError | None = None) -> None:
        """Stop the engine, or the load that would make one; answer who still waits; unpin the host copy."""
        self.closed = True
        if self._loading is not None and not self._loading.done():
            if not self._building:  # that is short, and its thread cannot be stopped
                self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            # First, so that an engine that waits for its weights hears of it.
            arriving.cancel()
            self._let_go()
        for task in list(self._waiting_for_adapters):
            task.cancel()
        await asyncio.gather(*self._waiting_for_adapters, return_exceptions=True)
        engine, self._engine = self._engine, None
        self.read_adapter = None
        if self.copying is not None:
            await asyncio.to_thread(self.copying.close)
            self.copying = None
        if engine is not None:
            await asyncio.to_thread(engine.close)
        adapters, self._adapters = self._adapters, None
        if adapters is not None:
            await adapters.close()
        self._close_account()
        for request_id in list(self._requests):
            if not self._hold_back(request_id, error or InstanceGone(self.id)):
                self._answer_error(request_id, error or InstanceGone(self.id))
        self._let_go()

    def _close_account(self) -> None:
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()

    def _let_go(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    async def until_idle(self) -> None:
        """Until the last request has ended."""
        await self._idle.wait()

    def facts(self) -> dict[str, Any]:
        """What a scheduler that did not load it must know to take it over."""
        return {
            "model": self.model,
            "source": self.source,
            "dtype": self.dtype,
            "embedding": self.embedding,
            "backend": self.backend,
            "n_slots": self.n_slots,
            "nbytes": 0 if self._lease is None else self._lease.nbytes,
            "state": "loading" if self._lease is None else "ready",
            "leaving": self.leaving,
            "progress": None if self._whole or self._read == (0, 0) else self._how_far(),
            "requests": {request_id: front_door for request_id, (front_door, _) in self._requests.items()},
        }

    def stats(self) -> dict[str, Any]:
        return {
            "instance": self.id,
            "model": self.model,
            "n_requests": len(self._requests),
            "load": self.times,
            **self._engine_stats(),
            "memory": {} if self.memory is None else self.memory.snapshot(),
            **({} if self._adapters is None else {"adapters": self._adapters.snapshot()}),
        }

    def _engine_stats(self) -> dict[str, Any]:
        return {} if self._engine is None else self._engine.stats()

    # --- requests ---

    def submit(
        self,
        front_door: str,
        request_id: str,
        epoch: int,
        prompt_ids: list[int],
        output_ids: list[int],
        params: dict[str, Any],
        adapter: tuple[str, str] | None = None,
        group: str = "",
        priority: int = 0,
    ) -> None:
        """Begin or continue a request; whatever is wrong with it is answered on the front door's stream.

        `adapter`: name and source of the LoRA adapter that it is to have; it waits until that is loaded. Of requests of one
        `group`, which answer one prompt, the first one computes it for all that come while it is here.
        """
        if self._engine is None or self.closed or self._refusal is not None:
            self._registry.send(front_door, ["error", request_id, epoch, (self._refusal or InstanceGone(self.id)).as_wire()])
            return
        if self.embedding is not None:
            self._registry.send(front_door, ["error", request_id, epoch, WrongTask(self.model, "embed").as_wire()])
            return
        sequence = TokenSequence(request_id, prompt_ids, SamplingParams.from_wire(params), priority, output_ids=output_ids)
        self._drop(request_id)
        if group and not output_ids:
            leader = self._leaders.setdefault(group, request_id)
            sequence.leader = None if leader == request_id else leader
        self._requests[request_id] = (front_door, epoch)
        if adapter is not None:
            self._adapter_of[request_id] = adapter
        self._idle.clear()
        if epoch:
            leaving = self._leaving.get(request_id)
            if leaving is not None:  # the copy from before, of which it is not known whether it has left
                leaving.unwanted()
            clearing = asyncio.create_task(self._submit_again(adapter, sequence, (front_door, epoch), self._engine))
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
        else:
            self._prepare(adapter, sequence, self._engine, (front_door, epoch))

    async def _submit_again(
        self, adapter: tuple[str, str] | None, sequence: TokenSequence, waiting: tuple[str, int], engine: EngineThread
    ) -> None:
        """Continue a request of which the engine may have another copy: one that a move has brought, or that is being cancelled.

        That one ends first: nothing is heard of it afterwards.
        """
        request_id = sequence.request_id
        failure: SllmError | None = None
        try:
            await asyncio.wrap_future(engine.call(lambda target: target.abort(request_id)))
        except SllmError as error:
            failure = error
        if self._requests.get(request_id) != waiting:
            return  # cancelled, or answered because the instance is gone
        if failure is None:
            self._prepare(adapter, sequence, engine, waiting)
        else:
            self._answer_error(request_id, failure)

    def _prepare(
        self, adapter: tuple[str, str] | None, sequence: TokenSequence, engine: EngineThread, waiting: tuple[str, int]
    ) -> None:
        if adapter is None:
            self._begin(sequence, engine, waiting)
        else:
            task = asyncio.create_task(self._submit_with(adapter, sequence, waiting))
            self._waiting_for_adapters.add(task)
            task.add_done_callback(self._waiting_for_adapters.discard)

    def _begin(self, sequence: TokenSequence, engine: EngineThread, waiting: tuple[str, int]) -> None:
        if sequence.params.grammar is None:
            self._hand_over(sequence, engine)
        else:
            compiling = asyncio.create_task(self._compile(sequence, sequence.params.grammar, engine, waiting))
            self._compiling.add(compiling)
            compiling.add_done_callback(self._compiling.discard)

    def _hand_over(self, sequence: TokenSequence, engine: EngineThread) -> None:
        try:
            engine.submit(sequence)
            self._handed_over.add(sequence.request_id)
        except InstanceGone as error:  # it died a moment ago; its loss is on its way here
            self._answer_error(sequence.request_id, error)

    async def _compile(self, sequence: TokenSequence, grammar: Grammar, engine: EngineThread, waiting: tuple[str, int]) -> None:
        """Hand a request over once its grammar is compiled, which may take longer than a step and is not done in its thread."""
        failure: SllmError | None = None
        path: Path | None = None
        # The tokenizer's files may be renamed meanwhile, because a fetch was completed.
        while self._lease is not None and (found := named_now(Path(self._lease.path))) != path:
            path = found
            try:
                await asyncio.to_thread(engine.prepare, grammar, path)
                failure = None
                break
            except SllmError as error:
                failure = error
            except Exception as error:
                logger.exception("grammar failed model=%s instance=%s", self.model, self.id)
                failure = EngineError(f"The grammar could not be prepared: {error}")
        if self._requests.get(sequence.request_id) != waiting:
            return  # cancelled, or answered because the instance is gone
        if failure is None:
            self._hand_over(sequence, engine)
        else:
            self._answer_error(sequence.request_id, failure)

    async def _submit_with(self, adapter: tuple[str, str], sequence: TokenSequence, waiting: tuple[str, int]) -> None:
        request_id = sequence.request_id
        try:
            if self._adapters is None:
                raise AdapterUnsupported(adapter[0], "this engine takes no adapters")
            use = await self._adapters.acquire(*adapter)
            if self._requests.get(request_id) != waiting or self._engine is None:
                self._adapters.release(use)
                return
            self._uses[request_id] = use
            sequence.salt = use.salt
            self._begin(sequence, self._engine, waiting)
        except SllmError as error:
            if self._requests.get(request_id) == waiting:
                self._answer_error(request_id, error)
        except Exception as error:
            # Nobody looks at this task: without an answer, the request would wait for ever.
            logger.exception("adapter failed adapter=%s instance=%s", adapter[0], self.id)
            if self._requests.get(request_id) == waiting:
                self._answer_error(request_id, EngineError(f"The adapter {adapter[0]!r} could not be loaded: {error!r}"))

    def embed(
        self,
        front_door: str,
        request_id: str,
        epoch: int,
        inputs: Sequence[tuple[int, Sequence[int]]],
        dimensions: int | None,
    ) -> None:
        """Make vectors of `inputs`, (index, token ids); whatever is wrong with one of them is the answer to the request."""
        if self._engine is None or self.closed or self._refusal is not None:
            self._registry.send(front_door, ["error", request_id, epoch, (self._refusal or InstanceGone(self.id)).as_wire()])
            return
        if self.embedding is None:
            self._registry.send(front_door, ["error", request_id, epoch, WrongTask(self.model, "generate").as_wire()])
            return
        self._requests[request_id] = (front_door, epoch)
        self._idle.clear()
        try:
            for sequence in self._inputs.begin(request_id, inputs, dimensions, epoch):
                self._engine.submit(sequence)
        except InstanceGone as error:  # it died a moment ago; its loss is on its way here
            self._stop_embedding(request_id, error)

    def cancel(self, request_id: str, epoch: int | None = None) -> None:
        """Nobody wants what is done for the request; with `epoch`, unless it was begun again since."""
        if epoch is not None and self._requests.get(request_id, ("", 0))[1] > epoch:
            return
        leaving = self._leaving.get(request_id)
        if leaving is not None:
            leaving.unwanted()
        if self._forget(request_id) and self._engine is not None:
            for each in (request_id, *self._inputs.end(request_id)):
                self._engine.drop(each)

    def abort(self, error: SllmError) -> int:
        """End all requests with `error`, and answer every further one so; returns how many there were."""
        self._refusal = error
        aborted = list(self._requests.items())
        for request_id, (front_door, epoch) in aborted:
            self.cancel(request_id)
            self._registry.send(front_door, ["error", request_id, epoch, error.as_wire()])
        return len(aborted)

    def give_back(self, requests: Sequence[str]) -> int:
        """End those of `requests` that are here, with :class:`InstanceGone`; returns how many there were."""
        mine = [(request_id, self._requests[request_id]) for request_id in requests if request_id in self._requests]
        for request_id, (front_door, epoch) in mine:
            self.cancel(request_id)
            self._registry.send(front_door, ["error", request_id, epoch, InstanceGone(self.id).as_wire()])
        return len(mine)

    def cancel_all_of(self, front_door: str) -> int:
        """Stop every request of a front door that is gone; returns how many there were."""
        mine = [request_id for request_id, (door, _) in self._requests.items() if door == front_door]
        for request_id in mine:
            self.cancel(request_id)
        return len(mine)

    def on_outputs(self, outputs: list[StepOutput]) -> None:
        """One step's tokens, on the loop: one message per token, one write per front door."""
        if self.embedding is not None:
            self._on_vectors(outputs)
            return
        for output in outputs:
            waiting = self._requests.get(output.request_id)
            if waiting is None or output.request_id not in self._handed_over:
                continue  # of nobody, or of a copy that was dropped
            if output.error is not None and self._hold_back(output.request_id, output.error):
                continue
            front_door, epoch = waiting
            if output.error is not None:
                # A load that failed is no fault of the request: it goes back to the queue, or hears why nobody can serve it.
                if not self._whole and isinstance(output.error, CheckpointError | Unavailable | Cancelled):
                    returning = asyncio.create_task(self._give_back(output.request_id, waiting))
                    self._returning.add(returning)
                    returning.add_done_callback(self._returning.discard)
                else:
                    self._answer_error(output.request_id, output.error)
                continue
            if output.finish_reason is not None:
                self._forget(output.request_id)
            ids = [] if output.token_id is None else [output.token_id]
            reason = None if output.finish_reason is None else str(output.finish_reason)
            self._registry.send(front_door, ["tokens", output.request_id, epoch, output.index, ids, reason, *_scores(output)])

    def _on_vectors(self, outputs: list[StepOutput]) -> None:
        """One step's vectors, on the loop: one message per request."""
        made: dict[str, list[tuple[int, bytes]]] = {}
        for output in outputs:
            request_id, index = self._inputs.take(output.request_id) or ("", 0)
            if request_id not in self._requests:
                continue
            if output.error is not None:
                made.pop(request_id, None)
                self._stop_embedding(request_id, output.error)
            elif isinstance(output, EmbeddingOutput):
                made.setdefault(request_id, []).append((index, output.vector))
        for request_id, vectors in made.items():
            front_door, epoch = self._requests[request_id]
            if self._inputs.is_done(request_id):
                self._inputs.end(request_id)
                self._forget(request_id)
            self._registry.send(front_door, ["embeddings", request_id, epoch, vectors])

    def _stop_embedding(self, request_id: str, error: SllmError) -> None:
        """One of its inputs failed: nobody waits for the others."""
        for input_id in self._inputs.end(request_id):
            if self._engine is not None:
                self._engine.drop(input_id)
        self._answer_error(request_id, error)

    async def _give_back(self, request_id: str, waiting: tuple[str, int]) -> None:
        """Send a request elsewhere, once the scheduler was told why: it would send it here again."""
        if self._lease is not None:
            with suppress(SllmError):
                await self._lease.complete()
        if self._requests.get(request_id) == waiting:
            self._answer_error(request_id, InstanceGone(self.id))

    def on_failed(self, error: SllmError) -> None:
        """The engine's thread died: the instance is lost, the worker is not."""
        if self._lease is None and not self.closed:
            self._failure = error  # told by its load, which has not ended
            return
        if not self._whole:
            self._load_failed(error)
            return
        logger.error("engine failed model=%s instance=%s cause=%s", self.model, self.id, error.message)
        self._registry.lost(self, error)

    def _forget(self, request_id: str) -> bool:
        known = self._drop(request_id)
        if not self._requests and not self._expected:
            self._idle.set()
        return known

    def _drop(self, request_id: str) -> bool:
        """Let go of what a request has here; whether it was here. Another one of its name may follow."""
        known = self._requests.pop(request_id, None) is not None
        use = self._uses.pop(request_id, None)
        if use is not None and self._adapters is not None:
            self._adapters.release(use)
        self._handed_over.discard(request_id)
        self._adapter_of.pop(request_id, None)
        for group in [group for group, leader in self._leaders.items() if leader == request_id]:
            del self._leaders[group]
        return known

    def _answer_error(self, request_id: str, error: SllmError) -> None:
        front_door, epoch = self._requests[request_id]
        self._forget(request_id)
        self._registry.send(front_door, ["error", request_id, epoch, error.as_wire()])


def _scores(output: StepOutput) -> list[Any]:
    """What a message of tokens has beyond them where log probabilities were asked for: those of its token, and of the prompt."""
    if output.logprobs is None and output.prompt_logprobs is None:
        return []
    of_token = [] if output.logprobs is None else [output.logprobs.as_wire()]
    of_prompt = output.prompt_logprobs
    return [of_token, None if of_prompt is None else [each.as_wire() for each in of_prompt]]


async def _why(lease: HostLease | FilesLease, failure: SllmError) -> SllmError:
    """Why an engine that waited for its weights has ended: what became of them says more than `failure`, which it ended with."""
    try:
        await lease.complete()
    except SllmError as error:
        return type(error)(*error.args)
    return failure


def open_ledger(device: str, settings: WorkerSettings, host_limit: int, host_pool: int) -> MemoryLedger:
    """The memory that the instances of a worker share.

    `host_limit`: bytes that the host lets it have; `host_pool`: those that checkpoints may take of them.

    Raises :class:`ConfigError` if there is no such device.
    """
    capacity = worker_capacity(pick_device(device), settings.memory_fraction, host_limit, host_pool)
    return MemoryLedger(capacity, settings.slots)


class InstanceRegistry:
    """What one worker runs. `report` reaches the scheduler; `resolve` turns a deployment's source into a directory or hub id.

    It owns the ledger of what its instances hold: by default, one of most of what is free now.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine_settings: EngineSettings,
        report: Report,
        resolve: Callable[[str], str],
        move_bytes_per_s: float = 0.0,
        memory: MemoryLedger | None = None,
        move_answer_s: float = 10.0,
        move_reservation_s: float = 15.0,
    ) -> None:
        self.store, self.report, self.resolve = store, report, resolve
        self.settings = engine_settings
        self.memory = own_ledger(pick_device(engine_settings.device)) if memory is None else memory
        self._backends = Backends()
        self._instances: dict[str, Instance] = {}
        self._outboxes: dict[str, Outbox] = {}
        self.moves = Moves(self, move_bytes_per_s, move_answer_s, move_reservation_s)
        #: Requests that front doors do not want to come any more.
        self._recalling: set[asyncio.Task[None]] = set()
        # Building is Python and holds the GIL: one at a time keeps the loop responsive.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="build")

    def adopt_or_create(
        self,
        instance_id: str,
        model: str,
        source: str,
        dtype: str,
        embedding: EmbeddingChoice | None = None,
        backend: str = OWN,
        n_slots: int = 1,
    ) -> Instance:
        """The instance of that id; an actor that is created again finds its engine running."""
        instance = self._instances.get(instance_id)
        if instance is None:
            instance = Instance(instance_id, model, source, dtype, self, embedding, backend, n_slots)
            self._instances[instance_id] = instance
        return instance

    def facts(self) -> dict[str, dict[str, Any]]:
        """What is here, and what for, by instance; plain msgpack types."""
        return {instance.id: instance.facts() for instance in self._instances.values() if not instance.closed}

    def instance(self, instance_id: str) -> Instance | None:
        """The instance of that id; in any thread."""
        return self._instances.get(instance_id)

    def has_door(self, front_door: str) -> bool:
        """Whether a front door is connected; in any thread."""
        return front_door in self._outboxes

    async def warm_up(self) -> None:
        """Import torch and the modelling code, and run it once, before the worker joins rather than in its first load."""
        await asyncio.get_running_loop().run_in_executor(self._builder, partial(warm_up, self.settings.device))

    async def backend(self, name: str) -> Backend:
        """What builds engines under that name. Raises :class:`ConfigError` if it is not installed here."""
        return await asyncio.to_thread(self._backends.find, name)

    async def inspect(self, backend: str, path: str, config: Mapping[str, Any], task: Task) -> ModelFacts:
        """What a backend says of the checkpoint in `path`. Raises what :meth:`Backend.inspect` does, and :class:`ConfigError`."""
        found = await self.backend(backend)
        facts = await asyncio.to_thread(found.inspect, Path(path), config, task)
        if task.kind == "embed" and facts.embedding is None:
            raise ConfigError(f"The backend {backend!r} makes no embeddings.", "backend")
        if isinstance(found, PreparesModels):
            known = Task("generate" if facts.embedding is None else "embed", task.pooling, task.normalize)
            self._builder.submit(found.prepare, Path(path), known)
        return facts

    async def check_adapter(self, name: str, path: str, base: str, backend: str = OWN) -> None:
        """Look whether the adapter in `path` is for the model in `base`; raises :class:`AdapterUnsupported` with the reason."""
        found = await self.backend(backend)

        def check() -> None:
            if not isinstance(found, ChecksAdapters):
                raise AdapterUnsupported(name, f"the backend {backend!r} takes no adapters")
            shapes = {tensor.name: tensor.shape for tensor in read_index(path).tensors}
            found.check_adapter(name, Path(path), shapes, Path(base), self.settings)

        await asyncio.get_running_loop().run_in_executor(self._builder, check)

    async def build(self, backend: Backend, lease: HostLease | FilesLease, instance: Instance) -> EngineThread:
        """An engine in its own thread over the tensors of `lease`, or over its files."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._builder, self._build, backend, lease, instance, loop)

    def _build(
        self, backend: Backend, lease: HostLease | FilesLease, instance: Instance, loop: asyncio.AbstractEventLoop
    ) -> EngineThread:
        settings = self.settings if instance.dtype == "auto" else self.settings.model_copy(update={"dtype": instance.dtype})
        wait = None if lease.arrivals is None else lease.arrivals.wait
        tensors: Mapping[str, Any] | None = lease.tensors
        path = named_now(Path(lease.path))
        device = pick_device(settings.device)
        copying: DeviceCopy | None = None
        memory = self.memory.account(instance.id, instance.model)
        task = Task("generate") if instance.embedding is None else Task("embed", **instance.embedding)
        try:
            if device.type == "cuda" and isinstance(lease, HostLease):
                memory.reserve(Kind.WEIGHTS, lay_out(lease.index, lease.plan).nbytes, "Unload another model of this worker.")
                copying = DeviceCopy(instance.model, lease.index, lease.plan, lease.buffer, CudaDevice(device), lease.arrivals)
                tensors, wait = copying.tensors, copying.arrived.wait
            engine = backend.build(EngineSpec(instance.model, path, settings, task, tensors, wait, memory))
            if isinstance(engine, LLMEngine):
                _log_kv(instance, engine)
        except BaseException as error:
            if copying is not None:
                copying.close()
            memory.close()
            if not isinstance(error, CheckpointNotFound):
                raise
            if path == named_now(Path(lease.path)):
                raise
            # The directory has its final name only now, because a fetch was completed.
            return self._build(backend, lease, instance, loop)
        instance.copying, instance.memory = copying, memory
        if isinstance(engine, TakesAdapters):
            instance.read_adapter = engine.read_adapter
        if isinstance(engine, LLMEngine | EmbeddingEngine):
            instance.times |= {phase: seconds for phase, seconds in asdict(engine.build_times).items() if seconds is not None}
        return EngineThread(engine, loop, instance.on_outputs, instance.on_failed, name=instance.id)

    def give_back(self, instance_id: str, requests: Sequence[str]) -> int:
        """End those of `requests` that an instance has, as if it were gone: a front door that wants one sends it elsewhere."""
        instance = self._instances.get(instance_id)
        return 0 if instance is None else instance.give_back(requests)

    def abort(self, instance_id: str, error: SllmError) -> int:
        """End all requests of an instance with `error`, and refuse those to come; returns how many there were."""
        instance = self._instances.get(instance_id)
        return 0 if instance is None else instance.abort(error)

    async def preload(self, source: str, peers: Sequence[str] = ()) -> Tier:
        """Bring a checkpoint to the host tier, and leave it there unpinned; returns where it was. Raises what the store does."""
        with await self.store.load(source, self.resolve(source), peers=peers) as lease:
            return lease.tier_from

    async def unload(self, instance_id: str, forget: bool, grace_s: float = UNLOAD_GRACE_S) -> None:
        """Close an instance and keep its checkpoint in the host tier, unless it is to be forgotten; idempotent.

        Who asks thinks that it is idle. Whether it is, is decided here: requests that still run may end first.
        """
        instance = self._instances.get(instance_id)
        if instance is None:
            return
        instance.leaving = instance.leaving or "unloaded"
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await instance.until_idle()
        if self._instances.pop(instance_id, None) is not instance:
            return  # somebody else is closing it
        await instance.close()
        logger.info("unloaded model=%s instance=%s", instance.model, instance_id)
        if forget:
            await self.store.evict(instance.source)

    def discard(self, instance: Instance) -> None:
        """Forget an instance that never came to be."""
        self._instances.pop(instance.id, None)

    def lost(self, instance: Instance, error: SllmError, *, while_loading: bool = False) -> None:
        """Tell the scheduler that an instance died by itself, or could not be loaded to the end, and free what it held."""
        self.discard(instance)
        kind = "failed" if while_loading else "lost"
        self.report({"kind": kind, "instance": instance.id, "model": instance.model, "reason": error.message})
        task = asyncio.create_task(instance.close(None if while_loading else InstanceGone(instance.id, error.message)))
        task.add_done_callback(lambda done: done.exception())

    async def until_idle(self) -> None:
        """Until no request runs here."""
        await asyncio.gather(*(instance.until_idle() for instance in self._instances.values()))

    async def drain(self, timeout_s: float) -> None:
        """Let running requests end, for `timeout_s` seconds at most, then unload everything to the host tier."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.until_idle()
        for instance in list(self._instances.values()):
            await self.unload(instance.id, forget=False, grace_s=0)

    async def close(self) -> None:
        """Stop everything."""
        await self.moves.close()
        await self.drain(0)
        for outbox in list(self._outboxes.values()):
            await outbox.close()
        self._builder.shutdown(wait=False, cancel_futures=True)
        await self.store.close()

    # --- streams ---

    def send(self, front_door: str, message: Message) -> None:
        outbox = self._outboxes.get(front_door)
        if outbox is not None:
            outbox.put(message)

    async def serve_stream(self, comm: Comm, front_door: str) -> None:
        """Read a front door's messages until it closes or dies; then stop what it had asked for."""
        outbox = Outbox(comm)
        self._outboxes[front_door] = outbox
        heard = asyncio.Event()
        watching = asyncio.create_task(_abort_when_silent(comm, heard, front_door))
        try:
            async for message in messages(comm):
                heard.set()
                self._receive(front_door, message)
        finally:
            watching.cancel()
            if self._outboxes.get(front_door) is outbox:
                del self._outboxes[front_door]
                n_stopped = sum(instance.cancel_all_of(front_door) for instance in self._instances.values())
                if n_stopped:
                    logger.info("front door left front_door=%s cancelled=%d", front_door, n_stopped)
            await outbox.close()

    def _receive(self, front_door: str, message: Message) -> None:
        match message:
            case ["submit", request_id, epoch, instance_id, prompt_ids, output_ids, params, adapter, group, priority]:
                instance = self._instances.get(instance_id)
                if instance is None:
                    self.send(front_door, ["error", request_id, epoch, InstanceGone(instance_id).as_wire()])
                else:
                    named = None if adapter is None else tuple(adapter)
                    tokens = list(prompt_ids), list(output_ids)
                    instance.submit(front_door, request_id, epoch, *tokens, params, named, group, priority)
            case ["embed", request_id, epoch, instance_id, inputs, dimensions]:
                instance = self._instances.get(instance_id)
                if instance is None:
                    self.send(front_door, ["error", request_id, epoch, InstanceGone(instance_id).as_wire()])
                else:
                    instance.embed(front_door, request_id, epoch, inputs, dimensions)
            case ["cancel", request_id, instance_id, epoch]:
                instance = self._instances.get(instance_id)
                if instance is not None:
                    instance.cancel(request_id, epoch)
            case ["recall", request_id, epoch]:
                recalling = asyncio.create_task(self._recall(front_door, request_id, epoch))
                self._recalling.add(recalling)
                recalling.add_done_callback(self._recalling.discard)
            case ["ping", number]:
                self.send(front_door, ["pong", number])
            case _:
                logger.warning("unknown message from front door %s: %r", front_door, message[:1])

    async def _recall(self, front_door: str, request_id: str, epoch: int) -> None:
        """See to it that a request does not come whose worker is gone. What has come by now was told of before this answer."""
        answer = await self.moves.recall(request_id, epoch)
        self.send(front_door, ["recalled", request_id, epoch, answer])

    # --- reports ---

    def snapshot(self) -> dict[str, Any]:
        """The worker's account of itself, plain msgpack types; rides on heartbeats and reports."""
        stats: dict[str, Any] = defaultdict(dict)
        for instance in self._instances.values():
            stats[instance.id] = instance.stats()
        snapshot = self.store.snapshot()
        tiers = {str(Tier.DEVICE): self.memory.snapshot(), **snapshot["tiers"]}
        return {**snapshot, "tiers": tiers, "instances": dict(stats)}


async def _abort_when_silent(comm: Comm, heard: asyncio.Event, front_door: str) -> None:
    """A front door whose host is gone closes no connection. It pings; one that does not is not there."""
    while True:
        heard.clear()
        try:
            await asyncio.wait_for(heard.wait(), SILENT_DOOR_S)
        except TimeoutError:
            logger.warning("front door is silent front_door=%s", front_door)
            comm.abort()
            return


def _log_kv(instance: Instance, engine: LLMEngine) -> None:
    stats = engine.stats()
    logger.info(
        "KV cache: %s blocks of %d tokens, %s model=%s instance=%s",
        f"{stats.blocks_total:,}",
        stats.block_size,
        format_bytes(stats.kv_nbytes),
        instance.model,
        instance.id,
    )
