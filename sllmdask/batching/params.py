"""How the tokens of one request are chosen: plain values that cross processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sllmdask.errors import InvalidRequest


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
