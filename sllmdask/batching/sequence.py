"""One request inside an instance: how to sample, what it has, how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from sllmdask.errors import InvalidRequest

_MASK_64 = (1 << 64) - 1


class FinishReason(StrEnum):
    """Why a sequence ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Plain values only: it crosses processes as a msgpack map.

    `seed` is never ``None`` here: it is drawn once, at admission, so that every copy and continuation of the request
    draws the same tokens. `stop` strings are watched where text is made (see ``engine/text.py``), not by the engine.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise :class:`InvalidRequest` naming the field that is out of bounds."""

        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{param} must be {rule}, not {getattr(self, param)!r}.", param)

        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(math.isfinite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "between 0 and 2")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(0 <= self.top_k < 2**31, "top_k", "0 (off) or a positive number")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(0 <= self.seed < 2**64, "seed", "an unsigned 64-bit integer")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def as_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> SamplingParams:
        return cls(**{**data, "stop": tuple(data["stop"]), "stop_token_ids": tuple(data["stop_token_ids"])})


def choice_seed(seed: int, index: int) -> int:
    """The seed of the answer with that index, of several to one request: the request's own for the first.

    Source: the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA '14) over the counter `index`.
    """
    if not index:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)


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
