"""An engine without a model: the live scheduler and the live accounts of KV blocks, over virtual time.

A step lasts what a cost model says. Tokens come from a hash of the seed, the position and the token before, so that an answer is
the same alone, in a crowd, after a preemption and after a move, as it is with a model. The KV of a token, where it has to travel,
is the token's id. All the rest is what runs live: :class:`~sllmdask.batching.scheduler.BatchScheduler` and
:class:`~sllmdask.batching.blocks.BlockPool`.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeVar

from sllmdask.batching.blocks import BlockPool, blocks_for
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.protocol import EngineStats, StepOutput
from sllmdask.batching.scheduler import BatchScheduler, Chunk, Copy, Incoming, Move, ParkingCosts, StepPlan
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.config import EngineSettings
from sllmdask.errors import InstanceGone, InvalidRequest, SllmError, StateRefused

#: Of the state of a request. Another one is refused.
_FORMAT = "cost-model-2"

T = TypeVar("T")


@dataclass(frozen=True)
class BatchCosts:
    """Seconds of a step. By default, LLaMA-7B in half precision on an A10.

    Source: fitted to figures 3 and 10 of Llumnix (OSDI '24); keys and values of 32 layers of 4096 in 2 bytes.
    """

    prefill_s: float = 2e-3
    prefill_s_per_token: float = 0.235e-3
    decode_s: float = 26e-3
    decode_s_per_sequence: float = 0.12e-3
    #: For each token of the context of a decoding sequence.
    decode_s_per_token: float = 0.0021e-3
    kv_nbytes_per_token: int = 2 * 32 * 4096 * 2
    #: Between the device and host memory.
    parking_bytes_per_s: float = 12e9

    def step_s(self, chunks: Iterable[Chunk]) -> float:
        """Chunks of one token are decodes, the others prefill; in a step with both, the one follows the other."""
        n_prefill = n_decodes = n_context = 0
        for chunk in chunks:
            if chunk.n_tokens == 1:
                n_decodes += 1
                n_context += chunk.stop
            else:
                n_prefill += chunk.n_tokens
        seconds = 0.0
        if n_prefill:
            seconds += self.prefill_s + self.prefill_s_per_token * n_prefill
        if n_decodes:
            seconds += self.decode_s + self.decode_s_per_sequence * n_decodes + self.decode_s_per_token * n_context
        return seconds

    def moves_s(self, moves: Iterable[Move], block_size: int) -> float:
        """To bring KV to host memory and back; a copy on the device takes no time."""
        n_blocks = sum(len(move.blocks) for move in moves if not isinstance(move, Copy))
        return n_blocks * block_size * self.kv_nbytes_per_token / self.parking_bytes_per_s


@dataclass(eq=False)
class _Leaving:
    epoch: int
    sequence: Sequence
    #: Blocks that were read, held so that they can be read again.
    pinned: list[int] = field(default_factory=list)
    frozen: bool = False
    #: Whether somebody held it before, who will let it go.
    was_held: bool = False


@dataclass(eq=False)
class _Entering:
    epoch: int
    token_ids: list[int]
    incoming: Incoming
    #: Tokens from the first one on whose KV is here, and that KV.
    kv: list[int]


class CostModelEngine:
    """An engine by :class:`~sllmdask.batching.protocol.EngineProtocol` that parks and moves requests, too.

    `now` is its time in seconds: a step begins then, and ends with `now` later by what it took. Whoever simulates several of them
    lets it wait by :meth:`advance_to`. `n_blocks`: by default, what that model leaves of that GPU, in blocks of 16.
    """

    def __init__(
        self,
        settings: EngineSettings,
        costs: BatchCosts | None = None,
        *,
        n_blocks: int = 851,
        max_model_len: int = 2048,
        n_vocab: int = 32000,
        eos_token_ids: frozenset[int] = frozenset(),
        now: float = 0.0,
    ) -> None:
        self.settings = settings
        self.costs = costs or BatchCosts()
        self.n_vocab = n_vocab
        self.eos_token_ids = eos_token_ids
        self.now = now
        #: States of another id are refused.
        self.model_id = ""
        self._bytes_per_block = settings.block_size * self.costs.kv_nbytes_per_token
        self._pool = BlockPool(n_blocks)
        self._scheduler = BatchScheduler(
            self._pool,
            block_size=settings.block_size,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            max_model_len=max_model_len,
            prefix_reuse=settings.prefix_reuse,
            ageing=settings.ageing,
            costs=ParkingCosts(
                self.costs.kv_nbytes_per_token, self.costs.parking_bytes_per_s, 1 / self.costs.prefill_s_per_token
            ),
            n_parking_blocks=settings.parking_memory // self._bytes_per_block,
        )
        self._leaving: dict[str, _Leaving] = {}
        self._entering: dict[str, _Entering] = {}
        #: (whether it came, request id) -> epoch of the last move that is over, and whether it was committed.
        self._over: dict[tuple[bool, str], tuple[int, bool]] = {}
        self._paused = self._stalled = self._closed = False
        self._n_steps = 0
        self._step_s = 0.0
        self._first_step_s: float | None = None
        self._n_prompt_tokens = self._n_output_tokens = 0

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    @property
    def prefill_tokens_per_s(self) -> float:
        return 1 / self.costs.prefill_s_per_token

    def identify(self, tensors: Mapping[str, Any] | None) -> None:
        """Its weights are its numbers: :attr:`model_id` is what it was set to."""

    @property
    def has_work(self) -> bool:
        return not self._paused and self._scheduler.has_work

    @property
    def stalled(self) -> bool:
        return self._stalled

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._scheduler)

    def find(self, request_id: str) -> Sequence | None:
        return self._scheduler.find(request_id)

    def advance_to(self, now: float) -> None:
        """Wait until `now`; nothing if a step has lasted longer."""
        self.now = max(self.now, now)

    def add(self, sequence: Sequence) -> None:
        """Raises :class:`InvalidRequest` also for what needs probabilities, which there are none of."""
        self._check(sequence)
        self._scheduler.add(sequence)
        self._stalled = False
        if sequence.leader is None:
            self._n_prompt_tokens += len(sequence.prompt_ids)

    def _check(self, sequence: Sequence) -> None:
        if self._closed:
            raise InstanceGone("of this engine")
        sequence.check(self.n_vocab)
        if sequence.salt:
            raise InvalidRequest("The request's adapter is not loaded here.", "model")
        for param in ("logprobs", "prompt_logprobs", "grammar"):
            if getattr(sequence.params, param) is not None:
                raise InvalidRequest(f"{param} needs a model, and this engine has none.", param)

    def abort(self, request_id: str) -> bool:
        self._stalled = False
        return self._scheduler.finish(request_id, FinishReason.ABORT) is not None

    def step(self) -> list[StepOutput]:
        if self._closed or self._paused:
            return []
        plan = self._plan()
        seconds = self.costs.step_s(plan.chunks) + self.costs.moves_s(plan.moves, self.settings.block_size)
        self.now += seconds
        self._n_steps += 1
        self._step_s += seconds
        if plan.chunks and self._first_step_s is None:
            self._first_step_s = seconds
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        for chunk in plan.chunks:
            self._scheduler.advance(chunk)
        return [self._accept(sequence) for sequence in sampling]

    def stats(self) -> EngineStats:
        """Seconds are virtual."""
        return EngineStats(
            n_running=self._scheduler.n_running,
            n_waiting=self._scheduler.n_waiting,
            n_steps=self._n_steps,
            step_s=self._step_s,
            n_prompt_tokens=self._n_prompt_tokens,
            n_output_tokens=self._n_output_tokens,
            first_step_s=self._first_step_s,
            blocks_total=self._pool.n_total,
            blocks_free=self._pool.n_free,
            block_size=self.settings.block_size,
            bytes_per_block=self._bytes_per_block,
            n_preemptions=self._scheduler.n_preemptions,
            numerics_id=_FORMAT,
            blocks_used=self._pool.n_used,
            blocks_reserved=self._pool.n_reserved,
            blocks_cached=self._pool.n_cached,
            n_reused_tokens=self._scheduler.n_reused_tokens,
            n_held=len(self._scheduler.held),
            parked_nbytes=self._scheduler.n_parked_blocks * self._bytes_per_block,
        )

    def close(self) -> None:
        self._closed = True
        for sequence in self.sequences:
            self.abort(sequence.request_id)
        for request_id, leaving in list(self._leaving.items()):
            self.export_abort(request_id, leaving.epoch)
        for request_id, entering in list(self._entering.items()):
            self.import_abort(request_id, entering.epoch)

    # --- one step ------------------------------------------------------------------------------------------------------

    def _plan(self) -> StepPlan:
        plan = self._scheduler.plan(self.now)
        idle = not plan.chunks and not plan.preempted
        if idle and self._scheduler.has_work and self._relieve():
            plan = self._scheduler.plan(self.now)
            idle = not plan.chunks and not plan.preempted
        self._stalled = idle and self._scheduler.has_work
        return plan

    def _accept(self, sequence: Sequence) -> StepOutput:
        index, token = len(sequence.output_ids), self._token(sequence)
        sequence.output_ids.append(token)
        self._n_output_tokens += 1
        reason = None
        if token in self._stop_ids(sequence):
            reason = FinishReason.STOP
        elif index + 1 >= sequence.params.max_tokens or sequence.n_tokens >= self.max_model_len:
            reason = FinishReason.LENGTH
        if reason:
            self._scheduler.finish(sequence.request_id, reason)
        return StepOutput(sequence.request_id, index, token, reason)

    def _token(self, sequence: Sequence) -> int:
        """The next token: a hash of seed, position and the last token; before ``min_tokens``, none that would end the answer."""
        params = sequence.params
        banned = self._stop_ids(sequence) if len(sequence.output_ids) < params.min_tokens else frozenset()
        [last] = sequence.token_ids(sequence.n_tokens - 1, sequence.n_tokens)
        drawn = array("Q", (0 if params.greedy else params.seed, sequence.n_tokens, last)).tobytes()
        token = int.from_bytes(blake2b(drawn, digest_size=8).digest(), "little") % self.n_vocab
        # The next one that is allowed, if there is any: what was not banned stays as it was.
        return next(
            (each % self.n_vocab for each in range(token, token + self.n_vocab) if each % self.n_vocab not in banned), token
        )

    def _stop_ids(self, sequence: Sequence) -> frozenset[int]:
        eos = frozenset() if sequence.params.ignore_eos else self.eos_token_ids
        return eos.union(sequence.params.stop_token_ids)

    # --- requests that stop --------------------------------------------------------------------------------------------

    def park(self, request_id: str) -> bool:
        self._refuse_frozen(request_id)
        move = self._scheduler.park(request_id)
        if move is not None:
            self.now += self.costs.moves_s([move], self.settings.block_size)
        return self.find(request_id) is not None

    def resume(self, request_id: str) -> bool:
        self._refuse_frozen(request_id)
        self._scheduler.resume(request_id)
        self._stalled = False
        return self.find(request_id) is not None

    def recompute(self, request_id: str) -> bool:
        self._refuse_frozen(request_id)
        self._scheduler.recompute(request_id)
        self._stalled = False
        return self.find(request_id) is not None

    def park_all(self) -> None:
        under_way = [*self._leaving, *self._entering]
        if under_way:
            raise StateRefused(under_way[0], "its move must end before the engine stops")
        if not self._paused:
            self.now += self.costs.moves_s(self._scheduler.yield_all(), self.settings.block_size)
            self._paused = True

    def resume_all(self) -> None:
        self._paused = self._stalled = False

    def _refuse_frozen(self, request_id: str) -> None:
        leaving = self._leaving.get(request_id)
        if leaving is not None and leaving.frozen:
            raise StateRefused(request_id, "it is leaving for another engine")

    # --- requests that leave -------------------------------------------------------------------------------------------

    def export_open(self, request_id: str, epoch: int) -> dict[str, Any]:
        self._refuse_stopped(request_id)
        self._refuse_old(False, request_id, epoch, self._leaving.get(request_id))
        leaving = self._leaving.get(request_id)
        if leaving is not None and epoch > leaving.epoch:
            self.export_abort(request_id, leaving.epoch)
            leaving = None
        sequence = self.find(request_id)
        if sequence is None:
            raise StateRefused(request_id, "it is not here, or has ended")
        if leaving is None:
            self._leaving[request_id] = _Leaving(epoch, sequence)
        return {
            "format": _FORMAT,
            "request_id": request_id,
            "epoch": epoch,
            "model_id": self.model_id,
            "token_ids": sequence.token_ids(0, sequence.n_tokens),
        }

    def export_read(
        self, request_id: str, epoch: int, since: int = 0, max_tokens: int | None = None, *, whole: bool = True
    ) -> dict[str, Any]:
        leaving = self._leaving_in(request_id, epoch)
        sequence, block_size = leaving.sequence, self.settings.block_size
        n_tokens = max(len(leaving.pinned) * block_size, sequence.n_computed, sequence.n_parked)
        if whole:
            n_tokens -= n_tokens % block_size
        stop = n_tokens if max_tokens is None else min(n_tokens, since + max_tokens)
        n_kept = min(blocks_for(stop, block_size), sequence.n_computed // block_size)
        fresh = sequence.block_table[len(leaving.pinned) : n_kept]
        self._pool.share(fresh)
        leaving.pinned += fresh
        return _piece(sequence, since, stop)

    def export_freeze(self, request_id: str, epoch: int, since: int = 0) -> dict[str, Any]:
        leaving = self._leaving_in(request_id, epoch)
        sequence, block_size = leaving.sequence, self.settings.block_size
        if sequence.finish_reason is not None:
            raise StateRefused(request_id, "it has ended meanwhile")
        if since > sequence.n_tokens - 1:
            raise StateRefused(request_id, f"token {since} is beyond its {sequence.n_tokens} tokens")
        if not leaving.frozen:
            leaving.was_held = sequence in self._scheduler.held
            self._scheduler.hold(request_id)
            leaving.frozen = True
        n_computed = max(sequence.n_computed, sequence.n_parked, len(leaving.pinned) * block_size, since)
        state = {
            "format": _FORMAT,
            "request_id": request_id,
            "prompt_ids": list(sequence.prompt_ids),
            "output_ids": list(sequence.output_ids),
            "params": sequence.params.as_wire(),
            "priority": sequence.priority,
            "arrival": sequence.arrival,
            "level": sequence.level,
            "waited": sequence.waited,
            "n_preemptions": sequence.n_preemptions,
        }
        return {"state": state, "kv": _piece(sequence, since, n_computed)}

    def export_commit(self, request_id: str, epoch: int) -> bool:
        if self._was_ended(False, request_id, epoch, committed=True):
            return False
        leaving = self._leaving_in(request_id, epoch)
        if not leaving.frozen:
            raise StateRefused(request_id, "it still runs here, and its last tokens were not given away")
        self._end_leaving(request_id, leaving, committed=True)
        if self.find(request_id) is leaving.sequence:
            self._scheduler.finish(request_id, FinishReason.ABORT)
        self._stalled = False
        return True

    def export_abort(self, request_id: str, epoch: int) -> bool:
        if self._was_ended(False, request_id, epoch, committed=False):
            return False
        leaving = self._leaving.get(request_id)
        if leaving is None or leaving.epoch != epoch:
            return False
        self._end_leaving(request_id, leaving, committed=False)
        if leaving.frozen and not leaving.was_held and self.find(request_id) is leaving.sequence:
            self._scheduler.resume(request_id)
        self._stalled = False
        return True

    def _leaving_in(self, request_id: str, epoch: int) -> _Leaving:
        leaving = self._leaving.get(request_id)
        if leaving is None or leaving.epoch != epoch:
            raise StateRefused(request_id, f"move {epoch} is not under way here")
        return leaving

    def _end_leaving(self, request_id: str, leaving: _Leaving, *, committed: bool) -> None:
        del self._leaving[request_id]
        self._unpin(leaving)
        self._over[False, request_id] = (leaving.epoch, committed)

    def _unpin(self, leaving: _Leaving) -> None:
        self._pool.release(leaving.pinned)
        leaving.pinned = []

    def _relieve(self) -> bool:
        """Let go of the blocks that are only kept to be read again; whether there were any."""
        pinned = [leaving for leaving in self._leaving.values() if leaving.pinned and not leaving.frozen]
        for leaving in pinned:
            self._unpin(leaving)
        return bool(pinned)

    # --- requests that enter -------------------------------------------------------------------------------------------

    def import_open(
        self,
        manifest: Mapping[str, Any],
        n_tokens: int | None = None,
        *,
        tokens_will_do: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        request_id = str(manifest.get("request_id", ""))
        self._refuse_stopped(request_id)
        _refuse_format(request_id, manifest)
        epoch = _read(request_id, lambda: int(manifest["epoch"]))
        token_ids = _read(request_id, lambda: [int(token) for token in manifest["token_ids"]])
        if manifest.get("model_id") != self.model_id:
            raise StateRefused(request_id, f"it is of model {manifest.get('model_id')!r}, and here is {self.model_id!r}")
        self._refuse_old(True, request_id, epoch, self._entering.get(request_id))
        entering = self._entering.get(request_id)
        if entering is not None and epoch > entering.epoch:
            self.import_abort(request_id, entering.epoch)
            entering = None
        if entering is None:
            known = Sequence(request_id, token_ids, SamplingParams())
            incoming = self._scheduler.expect(known, n_tokens or len(token_ids) + self.settings.block_size)
            if incoming is None:
                n_free = self._pool.n_free
                raise StateRefused(request_id, f"there is no room for {len(token_ids)} tokens: {n_free} blocks are free")
            shared = token_ids[: incoming.n_shared * self.settings.block_size]
            entering = self._entering[request_id] = _Entering(epoch, token_ids, incoming, shared)
        return {
            "request_id": request_id,
            "epoch": epoch,
            "n_tokens": len(entering.kv),
            "same_numerics": True,
            "kv_refused": None,
        }

    def import_write(self, request_id: str, epoch: int, chunk: Mapping[str, Any]) -> dict[str, Any]:
        entering = self._entering_in(request_id, epoch)
        data = _read(request_id, lambda: bytes(chunk["data"]))
        first = _read(request_id, lambda: int(chunk["since"]))
        n_tokens = _read(request_id, lambda: int(chunk["n_tokens"]))
        if zlib.crc32(data) != chunk.get("crc32") or len(data) != 8 * n_tokens:
            raise StateRefused(request_id, f"the KV from token {first} on was changed on its way")
        if first > len(entering.kv):
            raise StateRefused(request_id, f"the KV of tokens {len(entering.kv)} to {first} is missing")
        if not self._scheduler.extend(entering.incoming, first + n_tokens):
            raise StateRefused(request_id, f"there is no room for the KV of {first + n_tokens} tokens")
        kv = array("q", data).tolist()
        entering.kv += kv[len(entering.kv) - first :]
        return {"n_tokens": len(entering.kv)}

    def import_extend(self, request_id: str, epoch: int, n_tokens: int) -> None:
        if not self._scheduler.extend(self._entering_in(request_id, epoch).incoming, n_tokens):
            raise StateRefused(request_id, f"there is no room for {n_tokens} tokens")

    def import_tokens(self, request_id: str, epoch: int, since: int = 0, token_ids: Iterable[int] = ()) -> dict[str, Any]:
        entering = self._entering_in(request_id, epoch)
        sequence = entering.incoming.sequence
        if sequence is None:
            sequence = Sequence(request_id, entering.token_ids, SamplingParams())
            sequence.n_computed = min(len(entering.kv), sequence.n_tokens - 1)
        if since > sequence.n_tokens:
            raise StateRefused(request_id, f"its tokens {sequence.n_tokens} to {since} are missing")
        fresh = list(token_ids)[sequence.n_tokens - since :]
        sequence.output_ids += fresh
        if not self._scheduler.compute(entering.incoming, sequence):
            del sequence.output_ids[len(sequence.output_ids) - len(fresh) :]
            raise StateRefused(request_id, f"there is no room for the KV of {sequence.n_tokens + len(fresh)} tokens")
        self._stalled = False
        entering.kv += sequence.token_ids(len(entering.kv), sequence.n_computed)
        return {"n_known": sequence.n_tokens, "n_tokens": len(entering.kv)}

    def import_commit(self, request_id: str, epoch: int, state: Mapping[str, Any], kv: Mapping[str, Any] | None = None) -> bool:
        if self._was_ended(True, request_id, epoch, committed=True):
            return False
        entering = self._entering_in(request_id, epoch)
        _refuse_format(request_id, state)
        sequence = _read(request_id, lambda: _sequence(state))
        computing = entering.incoming.sequence
        known = entering.token_ids if computing is None else computing.token_ids(0, computing.n_tokens)
        if sequence.request_id != request_id or sequence.token_ids(0, len(known)) != known:
            raise StateRefused(request_id, "its tokens are not those that were told before")
        self._check(sequence)
        if kv is not None:
            self.import_write(request_id, epoch, kv)
        if computing is not None:
            entering.kv += computing.token_ids(len(entering.kv), computing.n_computed)
        n_computed = min(len(entering.kv), sequence.n_tokens - 1)
        if entering.kv[:n_computed] != sequence.token_ids(0, n_computed):
            raise StateRefused(request_id, "its KV is not that of its tokens")
        if not self._scheduler.accept(entering.incoming, sequence, n_computed):
            raise StateRefused(request_id, f"there is no room for its {sequence.n_tokens} tokens")
        del self._entering[request_id]
        self._over[True, request_id] = (epoch, True)
        self._stalled = False
        return True

    def import_abort(self, request_id: str, epoch: int) -> bool:
        if self._was_ended(True, request_id, epoch, committed=False):
            return False
        entering = self._entering.get(request_id)
        if entering is None or entering.epoch != epoch:
            return False
        del self._entering[request_id]
        self._scheduler.refuse(entering.incoming)
        self._over[True, request_id] = (epoch, False)
        self._stalled = False
        return True

    def _entering_in(self, request_id: str, epoch: int) -> _Entering:
        entering = self._entering.get(request_id)
        if entering is None or entering.epoch != epoch:
            raise StateRefused(request_id, f"move {epoch} is not under way here")
        return entering

    # --- moves ---------------------------------------------------------------------------------------------------------

    def _refuse_stopped(self, request_id: str) -> None:
        if self._paused or self._closed:
            raise StateRefused(request_id, "the engine has stopped")

    def _refuse_old(self, came: bool, request_id: str, epoch: int, known: _Leaving | _Entering | None) -> None:
        over, _ = self._over.get((came, request_id), (-1, False))
        if epoch <= over:
            raise StateRefused(request_id, f"move {epoch} is over")
        if known is not None and epoch < known.epoch:
            raise StateRefused(request_id, f"move {epoch} was followed by move {known.epoch}")

    def _was_ended(self, came: bool, request_id: str, epoch: int, *, committed: bool) -> bool:
        """Whether the move has ended in that way; :class:`StateRefused` if it has ended in the other one."""
        over, how = self._over.get((came, request_id), (-1, False))
        if epoch == over and how != committed:
            raise StateRefused(request_id, f"move {epoch} was {'committed' if how else 'aborted'} already")
        return epoch == over


def _refuse_format(request_id: str, data: Mapping[str, Any]) -> None:
    if data.get("format") != _FORMAT:
        raise StateRefused(request_id, f"it is in format {data.get('format')!r}, and here {_FORMAT!r} is read")


def _read(request_id: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (LookupError, OverflowError, TypeError, ValueError, SllmError) as error:
        raise StateRefused(request_id, f"it cannot be read ({type(error).__name__}: {error})") from error


def _piece(sequence: Sequence, since: int, stop: int) -> dict[str, Any]:
    """Tokens `since` to `stop`, as their KV."""
    tokens = sequence.token_ids(min(since, stop), stop)
    data = array("q", tokens).tobytes()
    return {"since": since, "n_tokens": len(tokens), "data": data, "crc32": zlib.crc32(data)}


def _sequence(state: Mapping[str, Any]) -> Sequence:
    return Sequence(
        str(state["request_id"]),
        [int(token) for token in state["prompt_ids"]],
        SamplingParams.from_wire(state["params"]),
        priority=int(state["priority"]),
        arrival=int(state["arrival"]),
        output_ids=[int(token) for token in state["output_ids"]],
        n_preemptions=int(state["n_preemptions"]),
        waited=float(state["waited"]),
        level=int(state["level"]),
    )
