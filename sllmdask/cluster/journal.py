"""One request as its front door knows it: what was asked, what was accepted so far, what is still to come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sllmdask.batching.params import SamplingParams, TokenLogprobs
from sllmdask.batching.sequence import FinishReason
from sllmdask.errors import EngineError


@dataclass(frozen=True)
class GenerateRequest:
    """What the front door wants done: already tokenised, already checked."""

    id: str
    model: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    #: Seconds the request may wait for an instance; ``None``: the cluster's default.
    deadline_s: float | None = None
    #: Name and source of the LoRA adapter that it is to have.
    adapter: tuple[str, str] | None = None
    #: A name that all answers to one prompt have in common, and nobody else: they share the prompt's KV where they meet.
    #: Empty: there is only one.
    group: str = ""

    @property
    def n_prompt_tokens(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class EmbedRequest:
    """Inputs of which one vector each is to be made: tokenised and checked, as in :class:`GenerateRequest`."""

    id: str
    model: str
    inputs: list[list[int]]
    #: Numbers of each vector; ``None``: all that the model makes.
    dimensions: int | None = None
    priority: int = 0
    deadline_s: float | None = None

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.inputs))


@dataclass(frozen=True)
class Progress:
    """Nothing to show yet, and why. `detail` is for people: ``loading qwen 61% disk 2.9 GiB/s``.

    It may follow :class:`Started`, too: an instance takes requests while it is being read, and one that dies before its first
    token leaves the request to another.
    """

    state: str
    detail: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Started:
    """An instance took the request. `cold_start`: ``hit`` or the tier that the model was loaded from for it.

    It comes again when that instance is gone before the first token, and another one took the request.
    """

    node: str
    cold_start: str
    queue_s: float


@dataclass(frozen=True)
class Delta:
    """Text that may be shown, and the accepted tokens behind it; `text` is empty while a stop string may still begin.

    Where asked for, `logprobs` has one item for each of them, and the first delta those of the prompt's tokens after its first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """The last event. `n_tokens` counts every accepted token, the end-of-sequence token included."""

    reason: FinishReason
    n_prompt_tokens: int
    n_tokens: int


@dataclass(frozen=True)
class Embedded:
    """The vector of one input, as little-endian float32 bytes."""

    index: int
    vector: bytes


#: Epochs from one dispatch of a request to its next: moves in between take the next one each.
EPOCHS_PER_DISPATCH = 1 << 32

GatewayEvent = Progress | Started | Delta | Embedded | Finished


@dataclass
class Journal:
    """The record from which a request could be begun again, anywhere: its tokens so far, by index, and its epoch.

    A token is accepted only if it is the next one of the current epoch, so none is lost, doubled or interleaved.
    """

    request: GenerateRequest | EmbedRequest
    epoch: int = 0
    output_ids: list[int] = field(default_factory=list)
    #: Indexes of the inputs whose vectors are there.
    embedded: set[int] = field(default_factory=set)
    node: str | None = None
    worker: str | None = None
    instance: str | None = None
    state: str = "queued"
    #: Nodes the request ran on, in order.
    path: list[str] = field(default_factory=list)
    #: What became of each of its moves, in order: a ``MoveRecord`` and ``pause_ms``, what its client waited for the next token.
    moves: list[dict[str, Any]] = field(default_factory=list)
    #: Each loss of its worker or instance: ``node``, ``reason`` (``worker`` or ``instance``), ``n_tokens`` that were there, and,
    #: once known, ``outcome`` (``resumed``, ``failed``, ``cancelled``), the node that it went on on (``to``), and ``pause_ms``.
    resumes: list[dict[str, Any]] = field(default_factory=list)

    def lost(self, reason: str) -> None:
        """Its worker or instance is gone."""
        known = {"node": self.node, "reason": reason, "n_tokens": len(self.output_ids)}
        self.resumes.append({**known, "outcome": None, "to": None, "pause_ms": None})

    def resume_over(self, outcome: str, pause_ms: float | None = None) -> dict[str, Any] | None:
        """What became of the last loss, if that was not known; it is returned then."""
        if not self.resumes or self.resumes[-1]["outcome"] is not None:
            return None
        self.resumes[-1] |= {"outcome": outcome, "to": self.node if outcome == "resumed" else None, "pause_ms": pause_ms}
        return self.resumes[-1]

    def begin_anew(self) -> None:
        """The request goes back to the queue: nothing that anybody says of it from before counts any more."""
        self.epoch = (self.epoch // EPOCHS_PER_DISPATCH + 1) * EPOCHS_PER_DISPATCH
        self.worker = self.instance = self.node = None
        self.state = "queued"

    def accept(self, epoch: int, index: int, token_ids: list[int]) -> list[int]:
        """Accept what of `token_ids`, which begin at `index`, comes next; returns that part (empty for a stale epoch).

        Raises :class:`EngineError` if tokens are missing before them: the stream is in order, so they will not come.
        """
        if epoch != self.epoch:
            return []
        if index > len(self.output_ids):
            raise EngineError(f"tokens {len(self.output_ids)} to {index - 1} were lost on the way")
        fresh = token_ids[len(self.output_ids) - index :]
        self.output_ids.extend(fresh)
        return fresh

    def accept_vectors(self, epoch: int, vectors: list[tuple[int, bytes]]) -> list[Embedded]:
        """Those of `vectors`, by index of the input, that were not there yet; none for a stale epoch."""
        fresh = [] if epoch != self.epoch else [Embedded(index, data) for index, data in vectors if index not in self.embedded]
        self.embedded.update(event.index for event in fresh)
        return fresh

    def submission(self, key: str) -> list[Any]:
        """The message that begins the request on its instance, or goes on with what is missing."""
        request = self.request
        if isinstance(request, EmbedRequest):
            missing = [[index, ids] for index, ids in enumerate(request.inputs) if index not in self.embedded]
            return ["embed", key, self.epoch, self.instance, missing, request.dimensions]
        params = request.params.as_wire()
        tokens = [request.prompt_ids, self.output_ids]
        return ["submit", key, self.epoch, self.instance, *tokens, params, request.adapter, request.group, request.priority]

    def as_row(self) -> dict[str, Any]:
        """One row of ``GET /admin/requests``."""
        return {
            "id": self.request.id,
            "model": self.request.model,
            "state": self.state,
            "node": self.node,
            "n_prompt_tokens": self.request.n_prompt_tokens,
            "n_tokens": len(self.output_ids),
            "path": list(self.path),
            "moves": [dict(move) for move in self.moves],
            "resumes": [dict(resume) for resume in self.resumes],
        }
