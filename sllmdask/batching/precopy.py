"""How the state of a request is given away while it goes on: its KV or its tokens, in how many goes, and when it is stopped.

Source: pre-copy of virtual machines, Clark et al. (NSDI '05), whose rounds end when what is left is sent in no time; KV blocks
that are append-only, Llumnix (OSDI '24); rounds over tokens, of which each is shorter than the one before by what computing a
prompt is faster than decoding, ServerlessLLM (OSDI '24), section 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: Goes over the full blocks while the request decodes on; after them it is stopped.
MAX_STAGES = 3
#: Of a decode step: what sending the rest of the KV may take while the request is stopped.
STOP_SHARE = 0.1
#: Times that the destination is told what was decoded meanwhile; after them the request is stopped.
MAX_ROUNDS = 6


class Kind(StrEnum):
    """What travels."""

    #: The KV itself.
    KV = "kv"
    #: The token ids, of which the destination computes the KV again.
    TOKENS = "tokens"


@dataclass(frozen=True)
class MoveCosts:
    """What is known, or assumed, of the ways to move one request."""

    kv_nbytes: int
    #: From one worker to the other.
    bytes_per_s: float
    n_tokens: int
    #: Of the destination, as measured; ``None``: `alpha` and `beta` are all that is known.
    prefill_tokens_per_s: float | None
    #: Seconds per token and in all to compute the KV again, as a deployment assumes them (``scheduler_config``).
    alpha: float = 0.01
    beta: float = 0.1

    @property
    def copy_s(self) -> float:
        return self.kv_nbytes / self.bytes_per_s

    @property
    def resume_s(self) -> float:
        """Source: ServerlessLLM (OSDI '24), section 5.2: ``a * n_tokens + b``."""
        if self.prefill_tokens_per_s is not None:
            return self.n_tokens / self.prefill_tokens_per_s
        return self.alpha * self.n_tokens + self.beta

    @property
    def cheaper(self) -> Kind:
        return Kind.KV if self.copy_s <= self.resume_s else Kind.TOKENS


def is_last_stage(left_nbytes: int, bytes_per_s: float, step_s: float, n_stages: int) -> bool:
    """Whether to stop the request and send the rest, `left_nbytes`, after `n_stages` stages: it takes a small part of a step, or
    there were enough."""
    return left_nbytes <= bytes_per_s * step_s * STOP_SHARE or n_stages >= MAX_STAGES


def is_last_round(n_tail: int, delta: int, n_rounds: int, n_tail_before: int | None) -> bool:
    """Whether to stop the request and send the rest, `n_tail` tokens, after `n_rounds` rounds: they are few, or do not get fewer.

    `n_tail_before`: how many there were after the round before.
    """
    stuck = n_tail_before is not None and n_tail >= n_tail_before
    return n_tail <= delta or n_rounds >= MAX_ROUNDS or stuck
