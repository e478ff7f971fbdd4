"""One model that answers many requests at a time: add, step, abort; and a thread that does nothing else.

A step plans, runs one packed forward pass, draws one token for each sequence that is up to date, and says what came out.
Source: iteration-level scheduling, Orca (OSDI '22).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sllmdask.batching.blocks import BlockPool
from sllmdask.batching.memory import Kind, MemoryAccount
from sllmdask.batching.params import Grammar, TokenLogprobs
from sllmdask.batching.protocol import EngineProtocol, EngineStats, FollowsWeights, StepOutput, TakesGrammars
from sllmdask.batching.scheduler import BatchScheduler, Chunk, Copy, Move, Park, ParkingCosts, StepPlan, Unpark
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.config import EngineSettings
from sllmdask.engine.choosing import Chooser
from sllmdask.engine.compat import make_runner
from sllmdask.engine.construct import BuildTimes, Skeleton, build_skeleton
from sllmdask.engine.families import read_config, read_eos_token_ids
from sllmdask.engine.gating import Wait
from sllmdask.engine.grammar import GrammarCompiler
from sllmdask.engine.identity import weights_id
from sllmdask.engine.linears import Packing
from sllmdask.engine.logprobs import rows_at_once, token_logprobs
from sllmdask.engine.lora import LoraAdapter, read_adapter
from sllmdask.engine.parking import ParkedKV
from sllmdask.engine.runner import ModelRunner, pick_device
from sllmdask.engine.sampler import Draw, sample
from sllmdask.engine.shortage import PassBudget, is_shortage, not_enough
from sllmdask.engine.transfer import Transfer
from sllmdask.errors import (
    Cancelled,
    EngineError,
    InstanceGone,
    InsufficientMemory,
    InvalidRequest,
    SllmError,
    StateRefused,
)
from sllmdask.units import format_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What a forward pass raises over one batch: shapes, indexes, numbers, memory. Anything else ends the engine.
_STEP_FAILURES = (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError)

#: Tokens of prefill beside requests that decode, on a CPU: four times as many bring a long prompt's first token a tenth sooner,
#: and make everybody else's next token take four times as long (0.12 B parameters, one core).
_CPU_PREFILL_BESIDE_DECODE = 128
#: Bytes per second between a device's memory and the host's, until some were moved.
_PARKING_BYTES_PER_S = 4e9
#: Moves of less than that tell nothing about the speed.
_MIN_MEASURED_NBYTES = 1 << 20


def build_engine(
    checkpoint_dir: Path,
    tensors: Mapping[str, Tensor],
    settings: EngineSettings,
    *,
    skeleton: Skeleton | None = None,
    wait: Wait | None = None,
    memory: MemoryAccount | None = None,
) -> LLMEngine:
    """The engine of the model in `checkpoint_dir` (HF ``config.json``), with `tensors` under their names in the checkpoint.

    On the CPU the parameters are `tensors` themselves where the dtype agrees: their memory must stay until
    :meth:`LLMEngine.close`. float16 becomes bfloat16 there (float32 where the processor cannot).

    `skeleton`: made before, by :func:`build_skeleton` from the same configuration; the engine's own until it is closed.
    `wait`: the bytes behind `tensors` are still arriving, and ``wait(names)`` blocks until those of these names are there, or
    raises what the load has failed of. It is called on another thread, for some tensors at a time, in the order in which a
    forward pass needs them; who closes the engine ends the load, too, so that it returns. The engine takes requests at once; its
    first pass follows the bytes layer by layer. Tensors of another dtype are converted as they come. A load that fails makes
    :meth:`LLMEngine.step` raise its error.
    `memory`: where everything is asked for that the engine takes, the caller's to close; by default, of most of what is free now.

    Raises :class:`CheckpointNotFound`, :class:`CheckpointCorrupt`, :class:`UnsupportedArchitecture` or :class:`ConfigError`
    (:class:`DeterminismUnavailable` where ``settings.deterministic`` cannot be promised), :class:`InsufficientMemory`;
    with `wait` given, what only shows when the first layers run is raised by the first step.
    """
    config = read_config(checkpoint_dir)
    started = time.perf_counter()
    made = skeleton or build_skeleton(checkpoint_dir, config)
    device = pick_device(settings.device)
    failure: InsufficientMemory | None = None
    try:
        runner = make_runner(
            made,
            checkpoint_dir,
            tensors,
            device=device,
            dtype=settings.dtype,
            block_size=settings.block_size,
            kv_memory=settings.kv_memory,
            wait=wait,
            construct_s=time.perf_counter() - started if skeleton is None else 0.0,
            attention=settings.attention,
            max_graph_batch=min(settings.max_running, settings.max_batch_tokens) if settings.cuda_graphs else 0,
            packing=Packing(settings.pack_weights, settings.pack_after, settings.pack_memory),
            deterministic=settings.deterministic,
            max_running=min(settings.max_running, settings.max_batch_tokens),
            max_batch_tokens=settings.max_batch_tokens,
            memory=memory,
        )
    except _STEP_FAILURES as error:
        if not is_shortage(error):
            raise
        failure = not_enough(checkpoint_dir.name if memory is None else memory.model, error, device)
    if failure is not None:  # raised here, since the traceback of the first one holds on to the tensors
        raise failure
    eos_token_ids = read_eos_token_ids(checkpoint_dir, config)
    grammars = GrammarCompiler(checkpoint_dir, runner.vocab_size, eos_token_ids)
    return LLMEngine(runner, settings, eos_token_ids, grammars)


class LLMEngine:
    """Continuous batching over one :class:`ModelRunner`: an engine with all that :mod:`sllmdask.batching.protocol` describes."""

    def __init__(
        self, runner: ModelRunner, settings: EngineSettings, eos_token_ids: frozenset[int], grammars: GrammarCompiler
    ) -> None:
        self.settings = settings
        self.eos_token_ids = eos_token_ids
        self._grammars = grammars
        #: They follow from the sequences' tokens alone, so one that is missing is made again.
        self._choosers: WeakKeyDictionary[Sequence, Chooser] = WeakKeyDictionary()
        self._runner = runner
        self._pool = BlockPool(runner.n_blocks)
        self._scheduler = BatchScheduler(
            self._pool,
            block_size=settings.block_size,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            prefill_beside_decode=settings.prefill_beside_decode or _prefill_beside_decode(runner.device),
            max_model_len=runner.family.max_model_len,
            # A sequence that grows beyond such a length is computed again from its first token, in its blocks.
            prefix_reuse=settings.prefix_reuse and runner.family.long_after is None,
            ageing=settings.ageing,
            n_parking_blocks=settings.parking_memory // runner.bytes_per_block,
        )
        self._parked = ParkedKV(runner.memory, counted=runner.device.type == "cpu")
        self._budget = PassBudget(settings.max_batch_tokens)
        self._transfer = Transfer(self._scheduler, runner, self._parked, self._check)
        self._paused = False
        self._stalled = False
        self._closed = False
        #: Called at the end of :meth:`close`.
        self._on_closed: list[Callable[[], None]] = []
        self._parking_bytes_per_s = _PARKING_BYTES_PER_S
        self._prefill_tokens_per_s: float | None = None
        self._n_steps = 0
        self._step_s = 0.0
        self._first_step_s: float | None = None
        self._n_prompt_tokens = 0
        self._n_output_tokens = 0

    @property
    def max_model_len(self) -> int:
        """Tokens of one request, prompt and answer: the model's window, or what the KV memory holds."""
        return self._scheduler.max_model_len

    @property
    def has_work(self) -> bool:
        """Whether a step would do something; never while :attr:`paused`."""
        return not self._paused and self._scheduler.has_work

    @property
    def stalled(self) -> bool:
        """Whether the last step could do nothing, and the next one cannot either, until something is told from outside.

        All blocks are with requests that leave, enter or are held."""
        return self._stalled

    @property
    def paused(self) -> bool:
        """Whether the engine has given its KV memory away, see :meth:`park_all`."""
        return self._paused

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that run or wait."""
        return tuple(self._scheduler)

    def find(self, request_id: str) -> Sequence | None:
        """The request's sequence while it runs or waits."""
        return self._scheduler.find(request_id)

    def add(self, sequence: Sequence) -> None:
        """Take a request in, or raise :class:`InvalidRequest`, :class:`ContextTooLong` or :class:`InstanceGone`.

        For several answers to one prompt, add all of :meth:`Sequence.choices`: the prompt is computed once.
        """
        self._check(sequence)
        # What is told of a prompt's tokens comes out when they are computed, and KV that is at hand does not have it.
        sequence.from_scratch |= sequence.params.prompt_logprobs is not None
        self._chooser(sequence)
        self._scheduler.add(sequence)
        self._stalled = False
        if sequence.leader is None:
            self._n_prompt_tokens += len(sequence.prompt_ids)

    def _check(self, sequence: Sequence) -> None:
        if self._closed:
            raise InstanceGone("of this engine")
        sequence.check(self._runner.vocab_size)
        if sequence.salt and sequence.salt not in self._runner.adapters:
            raise InvalidRequest("The request's adapter is not loaded here.", "model")

    def prepare(self, grammar: Grammar, checkpoint_dir: Path | None = None) -> None:
        """Compile a grammar before a request with it comes, which takes up to seconds. From any thread.

        `checkpoint_dir`: where the checkpoint is by now. Raises :class:`InvalidRequest`.
        """
        self._grammars.prepare(grammar, checkpoint_dir)

    def read_adapter(self, name: str, directory: Path, tensors: Mapping[str, Tensor]) -> LoraAdapter:
        """The LoRA adapter in `directory`, with `tensors` under their names in its file, for this model. On any thread.

        Raises :class:`AdapterUnsupported`, also where the engine takes no adapters, or :class:`CheckpointNotFound`.
        """
        runner = self._runner
        runner.adapters.refuse(name)
        return read_adapter(name, directory, tensors, runner.model, runner.dtype, runner.device)

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """From now on requests may have `adapter`, by its salt; its tensors must stay until :meth:`remove_adapter`.

        Raises :class:`AdapterUnsupported` where the engine takes none, or :class:`InsufficientMemory`.
        """
        runner = self._runner
        runner.adapters.refuse(adapter.name)
        runner.memory.reserve(Kind.ADAPTERS, adapter.copied_nbytes, "Lower engine.max_adapters, so that others leave first.")
        replaced = runner.adapters.add(adapter)
        if replaced is not None:
            runner.memory.release(Kind.ADAPTERS, replaced.copied_nbytes)

    def remove_adapter(self, salt: bytes) -> None:
        """Let go of an adapter, and drop the requests that still have it: nothing says so."""
        for sequence in self.sequences:
            if sequence.salt == salt:
                self.abort(sequence.request_id)
        removed = self._runner.adapters.remove(salt)
        if removed is not None:
            self._runner.memory.release(Kind.ADAPTERS, removed.copied_nbytes)

    def abort(self, request_id: str) -> bool:
        """Drop a request, wherever it is; ``False`` if it is not here. No output says so."""
        return self._finish(request_id, FinishReason.ABORT)

    @property
    def build_times(self) -> BuildTimes:
        return self._runner.build_times

    def settle(self) -> None:
        """Check what has arrived, if it has not been checked, and stop waiting for weights that are all there.

        Raises what the load has failed of, :class:`UnsupportedArchitecture`, or :class:`InsufficientMemory`: the engine is of no
        use then.
        """
        if self._runner.settled or self._paused:
            return
        short: InsufficientMemory | None = None
        try:
            self._runner.settle()
        except _STEP_FAILURES as error:
            if not is_shortage(error):
                raise
            short = self._not_enough(error)
        if short is not None:
            raise short

    def on_arrival(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on any thread, when weights that were on their way are there, or have failed to come."""
        self._runner.on_arrival(callback)

    def interrupt(self) -> None:
        """Make a step that waits for weights raise :class:`Cancelled`; nothing if it does not wait. From any thread."""
        self._runner.interrupt()

    def step(self) -> list[StepOutput]:
        """Run one batch. A request that fails ends with an error, and the others go on.

        Raises what :meth:`settle` raises, while weights are on their way.
        """
        if self._closed:
            return []
        self.settle()
        if self._paused:
            return []
        started = time.perf_counter()
        plan = self._plan(started)
        chunks = self._within_rows(plan.chunks)
        if self._make_moves(plan.moves):
            # Who has lost his blocks is computed again in a later step.
            chunks = tuple(chunk for chunk in chunks if chunk.sequence.block_table)
        outputs = self._run_passes(chunks)
        seconds = time.perf_counter() - started
        self._n_steps += 1
        self._step_s += seconds
        if chunks and self._first_step_s is None:
            self._first_step_s = seconds
        self._learn(plan, seconds)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            n_running=self._scheduler.n_running,
            n_waiting=self._scheduler.n_waiting,
            blocks_total=self._pool.n_total,
            blocks_free=self._pool.n_free,
            block_size=self.settings.block_size,
            bytes_per_block=self._runner.bytes_per_block,
            n_steps=self._n_steps,
            step_s=self._step_s,
            n_prompt_tokens=self._n_prompt_tokens,
            n_output_tokens=self._n_output_tokens,
            n_preemptions=self._scheduler.n_preemptions,
            first_step_s=self._first_step_s,
            packed_nbytes=self._runner.packed_nbytes,
            copied_nbytes=self._runner.copied_nbytes,
            numerics_id=self._runner.numerics_id,
            blocks_used=self._pool.n_used,
            blocks_reserved=self._pool.n_reserved,
            blocks_cached=self._pool.n_cached,
            n_reused_tokens=self._scheduler.n_reused_tokens,
            n_held=len(self._scheduler.held),
            parked_nbytes=self._parked.nbytes,
            kv_nbytes=self._runner.kv_nbytes,
            n_shortages=self._budget.n_shortages,
        )

    def close(self) -> None:
        """Drop all requests and let go of the model, the cache and the tensors that were lent to :func:`build_engine`."""
        if self._closed:
            return
        self._closed = True
        for sequence in self.sequences:
            self.abort(sequence.request_id)
        self._transfer.close()
        self._parked.clear()
        self._runner.close()
        for callback in self._on_closed:
            callback()

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the engine is closed and holds nothing any more, in the thread that closes it."""
        self._on_closed.append(callback)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast prompts were computed so far; ``None``: none was."""
        return self._prefill_tokens_per_s

    # --- requests that stop, leave or enter -----------------------------------------------------------------------------

    @property
    def model_id(self) -> str:
        """Tells these weights from another model's: states of another id are refused. Whoever moves requests sets it."""
        return self._transfer.model_id

    @model_id.setter
    def model_id(self, model_id: str) -> None:
        self._transfer.model_id = model_id

    def identify(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Set :attr:`model_id` by the weights, of which `tensors` are those of the checkpoint, all of them arrived."""
        if tensors is None:
            raise StateRefused("", "its weights cannot be told from others")
        self.model_id = weights_id(tensors, str(self._runner.dtype))

    def park(self, request_id: str) -> bool:
        """Stop a request until :meth:`resume`, with its KV in host memory; ``False`` if it is not here.

        Raises :class:`StateRefused` while it leaves for another engine.
        """
        self._refuse_frozen(request_id)
        move = self._scheduler.park(request_id)
        if move is not None:
            self._make_moves((move,))
        return self.find(request_id) is not None

    def resume(self, request_id: str) -> bool:
        """Let a request go on that was parked, exactly where it stopped; ``False`` if it is not here."""
        self._refuse_frozen(request_id)
        self._scheduler.resume(request_id)
        self._stalled = False
        return self.find(request_id) is not None

    def recompute(self, request_id: str) -> bool:
        """Drop a request's KV, wherever it is; its tokens are computed again. ``False`` if it is not here."""
        self._refuse_frozen(request_id)
        self._scheduler.recompute(request_id)
        self._parked.drop(request_id)
        self._stalled = False
        return self.find(request_id) is not None

    def park_all(self) -> None:
        """Stop between two steps and give the KV memory away: that of all requests is in host memory until :meth:`resume_all`.

        Whoever shares the ledger may have it, but for what is parked where host memory is the device's own. Requests may come
        and end meanwhile; nothing runs. Raises :class:`StateRefused` while a request leaves or enters.
        """
        if self._transfer.under_way:
            raise StateRefused(self._transfer.under_way[0], "its move must end before the engine stops")
        if not self._paused:
            self._make_moves(self._scheduler.yield_all(), instead_of=Kind.KV)
            self._runner.drop_cache()
            self._paused = True

    def resume_all(self) -> None:
        """Take KV memory again, and let all requests that ran before :meth:`park_all` go on, exactly where they stopped.

        Raises :class:`InsufficientMemory` while somebody else has it; the engine waits on, and may be asked again.
        """
        if self._paused:
            self._runner.make_cache()
            self._paused = self._stalled = False

    def export_open(self, request_id: str, epoch: int) -> dict[str, Any]:
        """See :class:`Transfer`, for this and all that follow."""
        self._refuse_paused(request_id)
        return self._transfer.export_open(request_id, epoch)

    def export_read(
        self, request_id: str, epoch: int, since: int = 0, max_tokens: int | None = None, *, whole: bool = True
    ) -> dict[str, Any]:
        with self._refusing_for_memory(request_id):
            return self._transfer.export_read(request_id, epoch, since, max_tokens, whole=whole)

    def export_freeze(self, request_id: str, epoch: int, since: int = 0) -> dict[str, Any]:
        sequence = self.find(request_id)
        if sequence is not None and self._chooser(sequence).prompt is not None:
            raise StateRefused(request_id, "log probabilities of its prompt come with its first token; move it after that")
        with self._refusing_for_memory(request_id):
            return self._transfer.export_freeze(request_id, epoch, since)

    def export_commit(self, request_id: str, epoch: int) -> bool:
        committed = self._transfer.export_commit(request_id, epoch)
        if self.find(request_id) is None:
            self._parked.drop(request_id)
        self._stalled = False
        return committed

    def export_abort(self, request_id: str, epoch: int) -> bool:
        self._stalled = False
        return self._transfer.export_abort(request_id, epoch)

    def import_open(
        self, manifest: Mapping[str, Any], n_tokens: int | None = None, *, tokens_will_do: bool = False
    ) -> dict[str, Any]:
        self._refuse_paused(str(manifest.get("request_id", "")))
        return self._transfer.import_open(manifest, n_tokens, tokens_will_do=tokens_will_do)

    def import_write(self, request_id: str, epoch: int, chunk: Mapping[str, Any]) -> dict[str, Any]:
        with self._refusing_for_memory(request_id):
            return self._transfer.import_write(request_id, epoch, chunk)

    def import_extend(self, request_id: str, epoch: int, n_tokens: int) -> None:
        self._transfer.import_extend(request_id, epoch, n_tokens)

    def import_tokens(self, request_id: str, epoch: int, since: int = 0, token_ids: Iterable[int] = ()) -> dict[str, Any]:
        self._stalled = False
        return self._transfer.import_tokens(request_id, epoch, since, token_ids)

    def import_commit(self, request_id: str, epoch: int, state: Mapping[str, Any], kv: Mapping[str, Any] | None = None) -> bool:
        self._stalled = False
        with self._refusing_for_memory(request_id):
            return self._transfer.import_commit(request_id, epoch, state, kv)

    def import_abort(self, request_id: str, epoch: int) -> bool:
        self._stalled = False
        return self._transfer.import_abort(request_id, epoch)

    def _refuse_frozen(self, request_id: str) -> None:
        if self._transfer.frozen(request_id):
            raise StateRefused(request_id, "it is leaving for another engine")

    def _refuse_paused(self, request_id: str) -> None:
        if self._paused:
            raise StateRefused(request_id, "the engine has given its memory away")
        if self._closed:
            raise StateRefused(request_id, "the engine is closed")

    @contextmanager
    def _refusing_for_memory(self, request_id: str) -> Iterator[None]:
        """Inside the block, want of memory is a refusal: the engine goes on, and the move may be tried again."""
        short: InsufficientMemory | None = None
        try:
            yield
        except _STEP_FAILURES as error:
            if not is_shortage(error):
                raise
            short = self._not_enough(error)
        if short is not None:
            needed = f"it needs {format_bytes(short.needed)}, and " if short.needed else ""
            raise StateRefused(request_id, f"no memory: {needed}{format_bytes(short.available)} are free")

    def _not_enough(self, error: BaseException, advice: str = "") -> InsufficientMemory:
        return not_enough(self._runner.memory.model, error, self._runner.device, advice)

    def _finish(self, request_id: str, reason: FinishReason) -> bool:
        self._parked.drop(request_id)
        self._stalled = False
        return self._scheduler.finish(request_id, reason) is not None

    # --- one step ----------------------------------------------------------------------------------------------------------

    def _plan(self, now: float) -> StepPlan:
        plan = self._scheduler.plan(now)
        idle = not plan.chunks and not plan.preempted
        if idle and self._scheduler.has_work and self._transfer.relieve():
            # Blocks that were only kept to be sent again: requests come first.
            plan = self._scheduler.plan(now)
            idle = not plan.chunks and not plan.preempted
        self._stalled = idle and self._scheduler.has_work
        return plan

    def _make_moves(self, moves: Iterable[Move], instead_of: Kind | None = None) -> bool:
        """Whether there was no memory for one of them: who was to have that KV has lost his blocks, and waits.

        `instead_of`: what the memory that is parked was held for until now.
        """
        lost: set[int] = set()
        for move in moves:
            match move:
                case Copy(source, target):
                    if source in lost or not self._moved(partial(self._runner.copy_blocks, [source], [target])):
                        lost.add(target)
                case Park(sequence, blocks):
                    if not self._park(sequence, blocks, instead_of):
                        sequence.n_parked = 0
                case Unpark(sequence, first, blocks):
                    rows = self._parked[sequence.request_id][first : first + len(blocks)]
                    if blocks and not self._moved(partial(self._runner.write_blocks, blocks, rows)):
                        lost.update(blocks)
                    self._parked.drop(sequence.request_id)
        if lost:
            # Others may have begun with these blocks already.
            self._pool.forget(lost)
            for sequence in self._scheduler.running:
                if not lost.isdisjoint(sequence.block_table):
                    self._scheduler.recompute(sequence.request_id)
        return bool(lost)

    def _moved(self, move: Callable[[], None]) -> bool:
        """Make `move`; ``False`` if there was no memory for it."""
        try:
            move()
        except _STEP_FAILURES as error:
            if not is_shortage(error):
                raise
            log.warning("no memory to move KV, to be computed again: instance=%s cause=%s", self._runner.memory.holder, error)
            return False
        return True

    def _park(self, sequence: Sequence, blocks: tuple[int, ...], instead_of: Kind | None) -> bool:
        """Whether the KV in `blocks` is in host memory now; otherwise it is to be computed again."""
        started = time.perf_counter()
        nbytes = len(blocks) * self._runner.bytes_per_block
        read = partial(self._runner.read_blocks, blocks)
        try:
            parked = self._parked.put(sequence.request_id, nbytes, read, instead_of=instead_of)
        except _STEP_FAILURES as error:
            log.warning("not parked, to be computed again: request=%s cause=%r", sequence.request_id, error)
            return False
        if parked:
            self._learn_parking(nbytes, time.perf_counter() - started)
        return parked

    def _learn_parking(self, nbytes: int, seconds: float) -> None:
        if nbytes >= _MIN_MEASURED_NBYTES:
            self._parking_bytes_per_s = (self._parking_bytes_per_s + nbytes / seconds) / 2

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        """Note how fast prompts are computed, from steps that are mostly that, and tell the scheduler what giving way costs."""
        if plan.n_tokens > 2 * len(plan.chunks):
            rate, known = plan.n_tokens / seconds, self._prefill_tokens_per_s
            self._prefill_tokens_per_s = rate if known is None else (known + rate) / 2
            bytes_per_token = self._runner.bytes_per_block // self._runner.block_size
            self._scheduler.costs = ParkingCosts(bytes_per_token, self._parking_bytes_per_s, self._prefill_tokens_per_s)

    def _run(self, chunks: tuple[Chunk, ...]) -> list[StepOutput]:
        """One forward pass. If it raises, no sequence has changed: its tokens may be computed again."""
        choosers = [self._chooser(chunk.sequence) for chunk in chunks]
        n_rows = [max(chooser.n_rows(chunk), int(chunk.samples)) for chunk, chooser in zip(chunks, choosers, strict=True)]
        logits = self._runner.forward(chunks, n_rows)
        for chunk, chooser, stop, n in zip(chunks, choosers, accumulate(n_rows), n_rows, strict=True):
            if chooser.prompt is not None:
                chooser.prompt.add(chunk.stop, logits[stop - n : stop])
        sampling = [chunk for chunk in chunks if chunk.samples]
        if len(sampling) < len(logits):
            logits = logits[[stop - 1 for stop, chunk in zip(accumulate(n_rows), chunks, strict=True) if chunk.samples]]
        tokens = sample(logits, [self._draw(chunk.sequence) for chunk in sampling])
        logprobs = self._logprobs(logits, sampling, tokens)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        drawn = zip(sampling, tokens, logprobs, strict=True)
        return [self._accept(chunk.sequence, token, told) for chunk, token, told in drawn]

    def _within_rows(self, chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        """`chunks`, cut where the log probabilities of prompts need more logits than one step may make; the rest comes later."""
        left = rows_at_once(self._runner.vocab_size)
        kept = []
        for chunk in chunks:
            n_rows = self._chooser(chunk.sequence).n_rows(chunk)
            n_later = max(0, n_rows - left)
            left -= n_rows - n_later
            if chunk.n_tokens > n_later:
                kept.append(replace(chunk, n_tokens=chunk.n_tokens - n_later) if n_later else chunk)
        return tuple(kept)

    def _logprobs(self, logits: Tensor, chunks: list[Chunk], tokens: list[int | None]) -> list[TokenLogprobs | None]:
        """What is told of each token that was drawn from a row of `logits`, where it is asked for."""
        asked = {row: n for row, chunk in enumerate(chunks) if (n := chunk.sequence.params.logprobs) is not None}
        rows = [row for row in asked if tokens[row] is not None]
        told: list[TokenLogprobs | None] = [None] * len(tokens)
        if rows:
            found = token_logprobs(logits[rows], [tokens[row] or 0 for row in rows], max(asked.values()))
            for row, each in zip(rows, found, strict=True):
                told[row] = each.likeliest(asked[row])
        return told

    def _run_passes(self, chunks: tuple[Chunk, ...]) -> list[StepOutput]:
        """Run `chunks` in one forward pass, or in as many as it takes."""
        outputs: list[StepOutput] = []
        passes = deque(self._budget.cut(chunks))
        while passes:
            # What is left of a request that has failed in an earlier pass does not run.
            left = (chunk for chunk in passes.popleft() if chunk.sequence.finish_reason is None)
            some = tuple(chunk for chunk in left if chunk.start == chunk.sequence.n_computed)
            if not some:
                continue
            short = False
            try:
                outputs += self._run(some)
                self._budget.passed()
            except _STEP_FAILURES as error:
                short = is_shortage(error) and self._has_less_to_try(some, error)
                if not short and len(some) > 1:
                    # Each alone, to find out whose fault it was.
                    passes.extendleft((chunk,) for chunk in reversed(some))
                elif not short:
                    outputs.append(self._fail(some[0].sequence, error))
            if short:  # only here, behind the error, are the tensors of the failed pass gone
                self._runner.give_back()
                passes = deque(self._budget.cut([*some, *(chunk for later in passes for chunk in later)]))
        return outputs

    def _has_less_to_try(self, chunks: tuple[Chunk, ...], error: Exception) -> bool:
        """Whether `chunks`, which found no memory, may find it in smaller passes, or with KV dropped that is parked."""
        n_tokens = sum(chunk.n_tokens for chunk in chunks)
        log.warning("no memory for a pass: instance=%s tokens=%d cause=%r", self._runner.memory.holder, n_tokens, error)
        if self._budget.short(n_tokens) or self._drop_parked():
            return True
        self._budget.forgive()
        return False

    def _drop_parked(self) -> bool:
        """Drop the parked KV of requests that wait to go on: they are computed again. Whether that gave memory back."""
        if self._runner.device.type != "cpu":
            return False
        waiting = [sequence for sequence in self._scheduler.waiting if sequence.n_parked]
        for sequence in waiting:
            self.recompute(sequence.request_id)
        return bool(waiting)

    def _draw(self, sequence: Sequence) -> Draw:
        early = len(sequence.output_ids) < sequence.params.min_tokens
        return self._chooser(sequence).draw(sequence, self._stop_ids(sequence) if early else frozenset())

    def _chooser(self, sequence: Sequence) -> Chooser:
        chooser = self._choosers.get(sequence)
        if chooser is None:
            chooser = self._choosers[sequence] = Chooser(sequence, self._runner.vocab_size, self._grammars)
        return chooser

    def _stop_ids(self, sequence: Sequence) -> frozenset[int]:
        eos = frozenset() if sequence.params.ignore_eos else self.eos_token_ids
        return eos.union(sequence.params.stop_token_ids)

    def _accept(self, sequence: Sequence, token: int | None, logprobs: TokenLogprobs | None) -> StepOutput:
        if token is None:
            return self._fail(sequence, ArithmeticError("the model's output is not a number"))
        index = len(sequence.output_ids)
        sequence.output_ids.append(token)
        self._n_output_tokens += 1
        reason = None
        if token in self._stop_ids(sequence) or self._chooser(sequence).ended(sequence):
            reason = FinishReason.STOP
        elif index + 1 >= sequence.params.max_tokens or sequence.n_tokens >= self.max_model_len:
            reason = FinishReason.LENGTH
        if reason:
            self._finish(sequence.request_id, reason)
        prompt_logprobs = self._chooser(sequence).take_prompt()
        return StepOutput(sequence.request_id, index, token, reason, None, logprobs, prompt_logprobs)

    def _fail(self, sequence: Sequence, cause: Exception) -> StepOutput:
        log.error("request failed: request=%s cause=%r", sequence.request_id, cause, exc_info=cause)
        self._transfer.import_failed(sequence)
        self._finish(sequence.request_id, FinishReason.ERROR)
        error: SllmError = EngineError(f"The engine could not go on with this request: {cause}")
        if is_shortage(cause):
            advice = (
                f"A step of this request of {sequence.n_tokens} tokens does not fit: send less, or give the worker more memory."
            )
            error = self._not_enough(cause, advice)
        return _failure(sequence, error)


# --- the engine in a thread of its own -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, eq=False)
class _Call:
    run: Callable[[Any], Any]
    future: Future[Any]


class _Arrived:
    """The weights that were on their way are there, or will not come."""


class _Close:
    """Ends the thread."""


_Command = _Submit | _Abort | _Call | _Arrived | _Close


class EngineThread:
    """Runs an engine and owns it from now on; every method may be called from any thread, and none waits but :meth:`close`.

    `on_outputs` and `on_failed` are called in `loop`: the first once per step with everything that the step gave, the second
    once, if the engine itself has died, or its weights did not arrive; every request has had its error by then. A refused
    request, too, ends by an output.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        loop: asyncio.AbstractEventLoop,
        on_outputs: Callable[[list[StepOutput]], None],
        on_failed: Callable[[SllmError], None],
        name: str = "engine",
    ) -> None:
        self.name = name
        self._engine = engine
        self._weights = engine if isinstance(engine, FollowsWeights) else None
        self._loop = loop
        self._on_outputs = on_outputs
        self._on_failed = on_failed
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        # Guards the one thing that two threads decide on: whether a command still finds somebody who answers it.
        self._gate = threading.Lock()
        self._closed = False
        self._closing = False
        #: Replaced as a whole by the engine's thread after each step, so that readers never wait.
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._main, name=f"sllmdask-{name}", daemon=True)
        self._thread.start()
        if self._weights is not None:
            self._weights.on_arrival(self._on_arrival)

    @property
    def alive(self) -> bool:
        return not self._closed

    def submit(self, sequence: Sequence) -> None:
        """Add a request. The thread owns `sequence` from now on. Raises :class:`InstanceGone` after the end."""
        self._send(_Submit(sequence))

    def abort(self, request_id: str) -> None:
        """Drop a request; its last output has the reason ``abort``. One that has ended already is left alone."""
        with suppress(InstanceGone):
            self._send(_Abort(request_id))

    def drop(self, request_id: str) -> None:
        """As :meth:`abort`, without a last output, which could be taken for that of another request of the same name."""
        with suppress(InstanceGone):
            self.call(lambda engine: engine.abort(request_id))

    def call(self, run: Callable[[Any], T]) -> Future[T]:
        """Run something between two steps, in the engine's thread; ``call(LLMEngine.stats)`` for instance."""
        future: Future[T] = Future()
        self._send(_Call(run, future))
        return future

    def prepare(self, grammar: Grammar, checkpoint_dir: Path | None = None) -> None:
        """See :class:`TakesGrammars`. Waits, in the caller's thread. Raises :class:`InvalidRequest`."""
        if not isinstance(self._engine, TakesGrammars):
            raise InvalidRequest("What runs this model cannot keep an answer to a grammar.", "grammar")
        self._engine.prepare(grammar, checkpoint_dir)

    def stats(self) -> dict[str, Any]:
        """What the engine tells of itself after the last step, as plain types."""
        return self._stats.as_wire()

    def close(self, timeout_s: float | None = None) -> None:
        """End after the running step: requests end with :class:`InstanceGone`, the engine is closed, the thread is joined.

        A step that waits for weights ends at once.
        """
        self._closing = True
        with suppress(InstanceGone):
            self._send(_Close())
        if self._weights is not None:
            self._weights.interrupt()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _send(self, command: _Command) -> None:
        with self._gate:
            if self._closed:
                raise InstanceGone(self.name)
            self._commands.put(command)

    def _on_arrival(self) -> None:
        with suppress(InstanceGone):
            self._send(_Arrived())

    def _main(self) -> None:
        try:
            if self._engine.settings.n_threads:
                torch.set_num_threads(self._engine.settings.n_threads)
            self._serve()
        except SllmError as error:
            if self._closing and isinstance(error, Cancelled):
                self._end(InstanceGone(self.name))
            else:
                log.error("engine ended: instance=%s cause=%s", self.name, error.message)
                # Made anew: the traceback of this one holds the tensors.
                self._fail(type(error)(*error.args))
        except Exception as error:
            log.exception("engine died: instance=%s", self.name)
            self._fail(EngineError(f"The engine stopped: {error}"))
        else:
            self._end(InstanceGone(self.name))

    def _serve(self) -> None:
        while True:
            outputs: list[StepOutput] = []
            try:
                for command in self._next_commands():
                    if isinstance(command, _Close):
                        return
                    # At once: who waits for the result of a later call has heard all from before it.
                    self._deliver_outputs(self._obey(command))
                if self._engine.has_work:
                    outputs += self._engine.step()
                self._stats = self._engine.stats()
            finally:
                self._deliver_outputs(outputs)

    def _next_commands(self) -> Iterator[_Command]:
        """All that wait; blocks for one if the engine has nothing to do. What is not asked for stays in the queue."""
        if not self._engine.has_work or self._engine.stalled:
            yield self._commands.get()
        with suppress(Empty):
            while True:
                yield self._commands.get_nowait()

    def _obey(self, command: _Submit | _Abort | _Call | _Arrived) -> list[StepOutput]:
        match command:
            case _Submit(sequence):
                try:
                    self._engine.add(sequence)
                except SllmError as error:
                    return [_failure(sequence, error)]
                except _STEP_FAILURES as error:
                    return [_failure(sequence, EngineError(f"The request makes no sense: {error}"))]
            case _Abort(request_id):
                aborted = self._engine.find(request_id)
                if aborted and self._engine.abort(request_id):
                    return [StepOutput(request_id, len(aborted.output_ids), None, FinishReason.ABORT)]
            case _Call(run, future):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(run(self._engine))
                    except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
                        future.set_exception(error)
            case _Arrived() if self._weights is not None:
                self._weights.settle()
        return []

    def _fail(self, error: SllmError) -> None:
        self._end(error)
        self._deliver(self._on_failed, error)

    def _end(self, error: SllmError) -> None:
        """Answer everybody who still waits, once and for all."""
        with self._gate:
            self._closed = True
        outputs = [_failure(sequence, error) for sequence in self._engine.sequences]
        with suppress(Empty):
            while True:
                match self._commands.get_nowait():
                    case _Submit(sequence):
                        outputs.append(_failure(sequence, error))
                    case _Call(_, future) if future.set_running_or_notify_cancel():
                        future.set_exception(error)
        self._deliver_outputs(outputs)
        self._engine.close()
        self._stats = self._engine.stats()

    def _deliver_outputs(self, outputs: list[StepOutput]) -> None:
        if outputs:
            self._deliver(self._on_outputs, outputs)

    def _deliver(self, callback: Callable[[T], None], value: T) -> None:
        # A loop that is closed has nobody left who listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, value)


def _prefill_beside_decode(device: torch.device) -> int | None:
    return _CPU_PREFILL_BESIDE_DECODE if device.type == "cpu" else None


def _failure(sequence: Sequence, error: SllmError) -> StepOutput:
    return StepOutput(sequence.request_id, len(sequence.output_ids), None, FinishReason.ERROR, error)
