"""How the tokens of one request are chosen, and what is told of them: plain values that cross processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from sllmdask.errors import InvalidRequest

#: Alternatives of one token whose log probabilities are told: OpenAI's bound for chats, and vLLM's.
MAX_LOGPROBS = 20
#: Tokens whose logits one request may change.
MAX_BIASES = 1024
GRAMMAR_KINDS = ("json_schema", "regex", "lark")
_MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. `kind` is one of :data:`GRAMMAR_KINDS`; `text` is the schema's JSON, the regular
    expression, or the grammar in llguidance's dialect of Lark."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise InvalidRequest(f"A grammar is one of {', '.join(GRAMMAR_KINDS)}, not {self.kind!r}.", "grammar")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Plain values only: it crosses processes as a msgpack map.

    `seed` is never ``None`` here: it is drawn once, at admission, so that every copy and continuation of the request
    draws the same tokens. `stop` strings are watched where text is made (see ``engine/text.py``), not by the engine.

    Penalties are those of transformers and OpenAI: `repetition_penalty` divides (or multiplies, below 0) the logits of tokens
    that the prompt or the answer has; `presence_penalty` is taken once from those that the answer has, `frequency_penalty`
    once for each time that it has them. `logit_bias` holds (token id, what is added to its logit).

    `logprobs`: how many of the likeliest tokens are told beside each token of the answer, ``None``: not even its own
    probability. `prompt_logprobs`: the same for the tokens of the prompt after the first.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

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
        # Beyond, a logit may leave the range of its type.
        check(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "between 0.01 and 100")
        for name in ("presence_penalty", "frequency_penalty"):
            check(-2 <= getattr(self, name) <= 2, name, "between -2 and 2")
        for name in ("logprobs", "prompt_logprobs"):
            n_told = getattr(self, name)
            check(n_told is None or 0 <= n_told <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")
        self._check_bias()
        if self.grammar is not None:
            # Both would let the answer go on where the grammar lets it only end.
            check(self.min_tokens == 0, "min_tokens", "0 where the answer has to fit a grammar")
            check(not self.ignore_eos, "ignore_eos", "false where the answer has to fit a grammar")

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(f"logit_bias has {len(self.logit_bias)} tokens; it may have {MAX_BIASES}.", "logit_bias")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest("logit_bias names a token twice.", "logit_bias")
        for token, bias in self.logit_bias:
            if not 0 <= token <= _MAX_TOKEN_ID:
                raise InvalidRequest(f"logit_bias must be for token ids, and {token} is none.", "logit_bias")
            if not -100 <= bias <= 100:
                raise InvalidRequest(f"logit_bias must be between -100 and 100, not {bias!r} for token {token}.", "logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def as_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> SamplingParams:
        grammar = data["grammar"]
        return cls(
            **{
                **data,
                "stop": tuple(data["stop"]),
                "stop_token_ids": tuple(data["stop_token_ids"]),
                "logit_bias": tuple((token, bias) for token, bias in data["logit_bias"]),
                "grammar": None if grammar is None else Grammar(**grammar),
            }
        )


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the probabilities that the model gave before one token, unchanged by how it was then chosen:
    its own, and the likeliest tokens with theirs, in descending order."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def likeliest(self, n: int) -> TokenLogprobs:
        """The same with the first `n` of the likeliest only."""
        return self._replace(top_ids=self.top_ids[:n], top_logprobs=self.top_logprobs[:n])

    def as_wire(self) -> list[Any]:
        return [self.logprob, list(self.top_ids), list(self.top_logprobs)]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> TokenLogprobs:
        logprob, top_ids, top_logprobs = data
        return cls(logprob, tuple(top_ids), tuple(top_logprobs))


def choice_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of several to one prompt. The first one draws what it would draw alone."""
    if index == 0:
        return seed
    digest = blake2b(index.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")
