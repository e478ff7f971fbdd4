"""One request inside an instance: what it has, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from sllmdask.batching.params import SamplingParams, choice_seed
from sllmdask.errors import InvalidRequest


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False)
class Sequence:
    """A request that this instance works on. Owned by the engine's thread.

    `output_ids` may be non-empty at the start: a request that continues elsewhere brings what was already accepted, and
    goes on at index ``len(output_ids)``. `n_computed` counts the tokens of ``prompt_ids + output_ids`` whose KV is in
    `block_table`. Tokens are only ever added at the end.

    `salt` names what besides the tokens decides their KV, an adapter for instance: sequences share KV only under one salt.
    `leader` is another sequence here that begins with all tokens of this one, under the same salt: this one waits until the
    leader's are computed, and shares them (several answers to one prompt, see :meth:`choices`).
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival: int = 0
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    n_computed: int = 0
    n_preemptions: int = 0
    finish_reason: FinishReason | None = None
    salt: bytes = b""
    leader: str | None = None
    #: Compute every token here, although its KV may be at hand: somebody wants what comes out beside it, logprobs of the prompt.
    from_scratch: bool = False
    #: Tokens whose KV is in host memory while the sequence has no blocks.
    n_parked: int = 0
    #: Time that it has waited here so far, in the unit of the scheduler's clock, and when it began to wait now.
    waited: float = 0.0
    waiting_since: float | None = None
    #: Priority levels that it has gained by waiting, and keeps.
    level: int = 0
    #: Names of its first full blocks, see :func:`~sllmdask.batching.blocks.block_digest`.
    digests: list[bytes] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def n_uncomputed(self) -> int:
        return self.n_tokens - self.n_computed

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start`..`stop` of ``prompt_ids + output_ids``."""
        n_prompt = len(self.prompt_ids)
        if stop <= n_prompt:
            return self.prompt_ids[start:stop]
        if start >= n_prompt:
            return self.output_ids[start - n_prompt : stop - n_prompt]
        return self.prompt_ids[start:] + self.output_ids[: stop - n_prompt]

    def check(self, n_vocab: int) -> None:
        """Raise :class:`InvalidRequest` if a model of `n_vocab` tokens has nothing to answer, or cannot."""
        if not self.prompt_ids:
            raise InvalidRequest("The prompt is empty.", "prompt")
        strange = next((token for token in self.token_ids(0, self.n_tokens) if not 0 <= token < n_vocab), None)
        if strange is not None:
            raise InvalidRequest(f"Token id {strange} is not in the model's vocabulary of {n_vocab}.", "prompt")
        if len(self.output_ids) >= self.params.max_tokens:
            raise InvalidRequest("The request has all of its max_tokens tokens already.", "max_tokens")

    def choices(self, n: int) -> list[Sequence]:
        """`n` sequences that answer this prompt, each with a seed of its own; this is the first, and the leader of the others.

        The others are called ``ID#1``, ``ID#2``, and so on. Only a sequence without an answer so far has choices.
        """
        assert n >= 1
        assert not self.output_ids
        others = [
            Sequence(
                f"{self.request_id}#{index}",
                self.prompt_ids,
                replace(self.params, seed=choice_seed(self.params.seed, index)),
                priority=self.priority,
                arrival=self.arrival,
                salt=self.salt,
                leader=self.request_id,
            )
            for index in range(1, n)
        ]
        return [self, *others]
