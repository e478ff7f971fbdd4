"""One request inside an instance: what it has, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sllmdask.batching.params import SamplingParams


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
    `block_table`.
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
