"""What an instance holds: an engine, as the rest of the system knows it. No torch; the simulator's engine is one, too.

:class:`EngineProtocol` is required. What else an engine can do is a protocol each: :class:`FollowsWeights`,
:class:`TakesGrammars`, :class:`TakesAdapters`, :class:`ParksRequests`, :class:`MovesRequests`; an engine has it by having its
methods. :mod:`sllmdask.batching.conformance` examines an engine against all that is promised here.

**Threads.** One thread owns an engine: every method is called there, between two steps, but for those that say otherwise.

**Errors.** Only :class:`~sllmdask.errors.SllmError` is meant for a user. What :meth:`EngineProtocol.add` refuses was not taken.
What goes wrong with one request in a step ends that request by an output, and nobody else's. What :meth:`EngineProtocol.step`
raises ends the engine: every request of it gets that error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sllmdask.batching.params import Grammar, TokenLogprobs
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.config import EngineSettings
from sllmdask.errors import SllmError


@dataclass(frozen=True)
class StepOutput:
    """One token of one request, or its end.

    `index` counts the answer's tokens from 0, those that a continued request brought included. The token that ended the answer
    (EOS, a stop id) is given too, with its reason. `token_id` is ``None`` if there is none: the request was aborted, or failed
    with `error`, or its answer is not made of tokens; all of these are final.
    """

    request_id: str
    index: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    error: SllmError | None = None
    #: Where asked for, those of this token; and with the first token, those of the prompt's tokens after its first.
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def final(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What an engine has to do, and has done since it was built."""

    n_running: int
    n_waiting: int
    n_steps: int
    #: Seconds inside steps.
    step_s: float
    n_prompt_tokens: int
    #: Tokens of answers; of an engine whose answers are not made of tokens, answers.
    n_output_tokens: int
    #: Seconds of the first step with work, the wait for weights on their way included; ``None`` before it.
    first_step_s: float | None = None

    def as_wire(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class EngineStats(StepStats):
    """The same of an engine with a paged KV cache, and what it holds."""

    blocks_total: int
    #: What the next request may have: blocks that nobody holds, those that keep a prefix (`blocks_cached`) among them.
    blocks_free: int
    block_size: int
    bytes_per_block: int
    n_preemptions: int
    #: Bytes of weights that are packed for the matrix library, in whole or in part beside the plain ones.
    packed_nbytes: int = 0
    #: Bytes of weights of the engine's own, in place of those that it was lent: converted or fused ones.
    copied_nbytes: int = 0
    #: Bytes of the KV cache; 0 while it is given away.
    kv_nbytes: int = 0
    #: Forward passes that found no memory, and were made in smaller ones.
    n_shortages: int = 0
    #: What decides on the bits of its results: engines of one id give the same.
    numerics_id: str = ""
    #: ``blocks_total == blocks_free + blocks_used + blocks_reserved``, always.
    blocks_used: int = 0
    #: Promised to requests that come from elsewhere.
    blocks_reserved: int = 0
    blocks_cached: int = 0
    #: Tokens whose KV was not computed because a prefix was found.
    n_reused_tokens: int = 0
    #: Requests that are stopped: parked by somebody, or about to leave.
    n_held: int = 0
    #: Bytes of KV that are in host memory while their requests wait.
    parked_nbytes: int = 0


@runtime_checkable
class EngineProtocol(Protocol):
    """Answers many requests at a time, a step at a time.

    - The outputs of a request have indexes that grow by one, from ``len(sequence.output_ids)`` as it was added. The last one, and
      no other, is ``final``. Nothing comes after it, nor after :meth:`abort`.
    - While a request is here, its ``output_ids`` are all tokens that were given of it. After its last output it is not here.
    - What a request is answered depends on the request, not on what else is here, nor on the steps that it took.
    - Of those that wait, the one of the higher ``priority`` is begun first, then that of the lower ``arrival``, then the one
      that was added first; an engine may let waiting count for priority.
    - Where :meth:`stats` tells of blocks (:class:`EngineStats`), ``blocks_total == blocks_free + blocks_used + blocks_reserved``
      between any two calls, and nothing is used or reserved when no request is here.
    """

    #: What it was built with. ``n_threads`` is applied to the thread that runs it.
    settings: EngineSettings

    @property
    def has_work(self) -> bool:
        """Whether a step would do something. As long as it would, and the engine is not `stalled`, steps get requests to their
        ends."""
        ...

    @property
    def stalled(self) -> bool:
        """Whether the last step could do nothing, and the next one cannot either, until something is told from outside."""
        ...

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that run, wait or are held."""
        ...

    def find(self, request_id: str) -> Sequence | None:
        """The request's sequence while it is here."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Take a request in; the engine owns `sequence` from now on, and computes nothing before the next step.

        Raises :class:`~sllmdask.errors.InvalidRequest` for what makes no sense (an empty prompt, a token that the model does
        not have, an id that is here already, an answer that is complete, what the engine cannot do), and
        :class:`~sllmdask.errors.ContextTooLong` where the window leaves no room for an answer; after :meth:`close`,
        :class:`~sllmdask.errors.InstanceGone`.
        """
        ...

    def abort(self, request_id: str) -> bool:
        """Drop a request, wherever it is, and free what it has at once; ``False`` if it is not here. No output says so."""
        ...

    def step(self) -> list[StepOutput]:
        """Run one batch: at most one output for each request. Without work, nothing."""
        ...

    def stats(self) -> StepStats:
        """As of now; also after :meth:`close`."""
        ...

    def close(self) -> None:
        """Drop all requests, without outputs, and let go of the model and of all that it was lent. Again: nothing."""
        ...


@runtime_checkable
class FollowsWeights(Protocol):
    """An engine that is built, and takes requests, before all of its weights have arrived."""

    def settle(self) -> None:
        """Check what has arrived, if that was not done. Raises what the load has failed of: the engine is of no use then."""
        ...

    def on_arrival(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on any thread, when all weights are there, or have failed to come; never if none was missing."""
        ...

    def interrupt(self) -> None:
        """Make a step that waits for weights raise :class:`~sllmdask.errors.Cancelled`, if one does. From any thread."""
        ...


@runtime_checkable
class TakesGrammars(Protocol):
    """An engine whose answers can be kept to a grammar. Others refuse in ``add`` what has one."""

    def prepare(self, grammar: Grammar, checkpoint_dir: Path | None = None) -> None:
        """Compile a grammar before a request with it comes, which takes up to seconds. From any thread.

        `checkpoint_dir`: where the checkpoint is by now. Raises :class:`~sllmdask.errors.InvalidRequest`.
        """
        ...


@runtime_checkable
class TakesAdapters(Protocol):
    """An engine whose requests may have LoRA adapters, by ``sequence.salt``. ``add`` refuses a salt that is not here."""

    def read_adapter(self, name: str, directory: Path, tensors: Mapping[str, Any]) -> Any:
        """The adapter in `directory`, with `tensors` under their names in its file; it has a `salt`. On any thread.

        Raises :class:`~sllmdask.errors.AdapterUnsupported` and :class:`~sllmdask.errors.CheckpointNotFound`.
        """
        ...

    def add_adapter(self, adapter: Any) -> None:
        """From now on requests may have `adapter`; its tensors must stay until :meth:`remove_adapter`."""
        ...

    def remove_adapter(self, salt: bytes) -> None:
        """Let go of an adapter, and drop the requests that still have it: nothing says so."""
        ...


@runtime_checkable
class ParksRequests(Protocol):
    """An engine that can stop requests between two steps, and all of them at once. It changes no answer.

    Raises :class:`~sllmdask.errors.StateRefused` while a request is leaving for another engine.
    """

    @property
    def paused(self) -> bool:
        """Whether it has given its KV memory away, see :meth:`park_all`; it has no work then."""
        ...

    def park(self, request_id: str) -> bool:
        """Stop a request until :meth:`resume`, without blocks, its KV kept elsewhere; ``False`` if it is not here."""
        ...

    def resume(self, request_id: str) -> bool:
        """Let a request go on that was parked, exactly where it stopped; ``False`` if it is not here."""
        ...

    def recompute(self, request_id: str) -> bool:
        """Drop a request's KV, wherever it is; its tokens are computed again. ``False`` if it is not here."""
        ...

    def park_all(self) -> None:
        """Give all KV memory away until :meth:`resume_all`. Requests may come and end meanwhile; nothing runs."""
        ...

    def resume_all(self) -> None:
        """Take KV memory again, and let all go on that ran before :meth:`park_all`, exactly where they stopped."""
        ...


@runtime_checkable
class MovesRequests(Protocol):
    """An engine that gives and takes the state of a request as a value of plain msgpack types.

    The sender: :meth:`export_open`, :meth:`export_read` as often as there is something new, :meth:`export_freeze` for the rest,
    then :meth:`export_commit` or :meth:`export_abort`. The receiver: :meth:`import_open`, :meth:`import_write` for each piece of
    KV, or :meth:`import_tokens` to compute it here, then :meth:`import_commit` or :meth:`import_abort`.

    A move is told by (request id, epoch): the same call again has the same
    result, and one of an epoch that is over is refused. Up to :meth:`export_freeze` the sender answers on, and after
    :meth:`export_abort` again; from :meth:`import_commit` on the receiver does.

    All raise :class:`~sllmdask.errors.StateRefused` where the state cannot be given or taken: of another kind of engine, damaged,
    no room, no such move. Nothing has changed then. :meth:`EngineProtocol.stats` is an :class:`EngineStats`.
    """

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have here, prompt and answer."""
        ...

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast prompts are computed; ``None``: that is not known yet."""
        ...

    def identify(self, tensors: Mapping[str, Any] | None) -> None:
        """Know what the weights are, so that a state of others is refused; called once, before the first move.

        `tensors`: those of the checkpoint, all there; ``None`` where the backend has read them itself.
        """
        ...

    def export_open(self, request_id: str, epoch: int) -> dict[str, Any]:
        """A manifest: what is about to come, with the tokens so far as ``token_ids``."""
        ...

    def export_read(
        self, request_id: str, epoch: int, since: int = 0, max_tokens: int | None = None, *, whole: bool = True
    ) -> dict[str, Any]:
        """A chunk of the KV of tokens from `since` on, as far as blocks are full, and at most `max_tokens`: ``{"since",
        "n_tokens", ...}``. These blocks are kept until the end. Unless `whole`, also of a block that is not full yet."""
        ...

    def export_freeze(self, request_id: str, epoch: int, since: int = 0) -> dict[str, Any]:
        """Stop the request. ``{"state", "kv"}``: all but its KV, and a last chunk, of the KV from token `since` on."""
        ...

    def export_commit(self, request_id: str, epoch: int) -> bool:
        """The request is elsewhere now: nothing of it stays. ``False`` if that was so already."""
        ...

    def export_abort(self, request_id: str, epoch: int) -> bool:
        """The request stays, and goes on if it was stopped. ``False`` if nothing was under way."""
        ...

    def import_open(
        self, manifest: Mapping[str, Any], n_tokens: int | None = None, *, tokens_will_do: bool = False
    ) -> dict[str, Any]:
        """Reserve room for `n_tokens` tokens; ``{"request_id", "epoch", "n_tokens", "kv_refused"}``: how many tokens from the
        first on have their KV here, and, where `tokens_will_do`, why KV cannot be taken, only tokens; ``None``: it can."""
        ...

    def import_extend(self, request_id: str, epoch: int, n_tokens: int) -> None:
        """Reserve room for `n_tokens` tokens in all."""
        ...

    def import_tokens(self, request_id: str, epoch: int, since: int = 0, token_ids: Iterable[int] = ()) -> dict[str, Any]:
        """Compute KV here, beside what runs: that of the manifest's tokens, then of `token_ids`, which begin at token `since`.

        ``{"n_known", "n_tokens"}``: the tokens that are known, and of how many from the first on the KV is here; that of the last
        one is not computed. What is known already is not added again.
        """
        ...

    def import_write(self, request_id: str, epoch: int, chunk: Mapping[str, Any]) -> dict[str, Any]:
        """Take a chunk. ``{"n_tokens"}``: how many tokens from the first on have their KV here, now."""
        ...

    def import_commit(self, request_id: str, epoch: int, state: Mapping[str, Any], kv: Mapping[str, Any] | None = None) -> bool:
        """The request is this engine's from now on; `kv` is a last chunk. ``False`` if that was so already."""
        ...

    def import_abort(self, request_id: str, epoch: int) -> bool:
        """The request does not come. ``False`` if nothing was under way."""
        ...


class MovingEngine(EngineProtocol, MovesRequests, Protocol):
    """An engine whose requests can move: what both halves of a move need."""
