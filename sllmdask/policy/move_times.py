"""How long it takes to move requests, learnt from those that moved; until enough have, what the deployment assumes.

A move by tokens costs what the destination needs to compute them again, ``a * (t_in + t_out) + b`` by model and destination; one
by KV what its bytes take between these two workers. Source of the line: ServerlessLLM (OSDI '24), section 6.2; the copy is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapreplace
from math import inf

from sllmdask.policy.events import MoveEnded
from sllmdask.policy.learned import ResumeFit
from sllmdask.policy.views import ModelView

#: Moves from which a line is taken for true.
N_ENOUGH = 3
#: Requests of an instance that move at a time; the others follow, each when one has gone.
N_MOVES_AT_ONCE = 8
#: Of a copy, until there are measurements: seconds per byte (1 GB/s), and seconds.
_COPY_PRIOR = ResumeFit(1e-9, 0.01)
#: In the place of a worker: whichever it is.
_ANY = ""


class MoveTimes:
    """What moves took. Requests that moved at a time had a share of the link and of the engine each: told is what one would take
    alone, so that several take the sum."""

    def __init__(self) -> None:
        #: By (model, destination), and by (source, destination), where :data:`_ANY` stands for all.
        self._resumed: dict[tuple[str, str], ResumeFit] = {}
        self._copied: dict[tuple[str, str], ResumeFit] = {}
        #: Bytes of KV that a token of a model has.
        self._kv_nbytes: dict[str, float] = {}

    # --- what happened ---

    def observe(self, ended: MoveEnded, model: ModelView | None) -> None:
        """A move is over. One that did not come to its end tells nothing of how long that takes."""
        if ended.n_tokens > 0 and ended.kv_nbytes > 0:
            self._kv_nbytes[ended.model] = ended.kv_nbytes / ended.n_tokens
        if ended.outcome != "moved":
            return
        alone_s = ended.seconds / max(1.0, ended.n_at_once)
        if ended.kind == "kv":
            for key in ((ended.source, ended.destination), (_ANY, _ANY)):
                self._copied[key] = self._copied.get(key, _COPY_PRIOR).after(ended.nbytes, alone_s)
        elif ended.kind == "tokens":
            for key in ((ended.model, ended.destination), (ended.model, _ANY)):
                self._resumed[key] = self._resumed.get(key, _resume_prior(model)).after(ended.n_tokens, alone_s)

    def forget_worker(self, address: str) -> None:
        """It has left; another one at its address may be faster."""
        self._resumed = {key: fit for key, fit in self._resumed.items() if key[1] != address}
        self._copied = {key: fit for key, fit in self._copied.items() if address not in key}

    def forget_model(self, name: str) -> None:
        self._resumed = {key: fit for key, fit in self._resumed.items() if key[0] != name}
        self._kv_nbytes.pop(name, None)

    # --- what is to be expected ---

    def expected_s(self, ended: MoveEnded, model: ModelView | None) -> float:
        """Seconds that this move would have been expected to take, of its kind and beside the others of its time."""
        if ended.kind == "kv":
            fit = self._known(self._copied, (ended.source, ended.destination), (_ANY, _ANY)) or _COPY_PRIOR
            return fit.seconds(ended.nbytes) * max(1.0, ended.n_at_once)
        fit = self._known(self._resumed, (ended.model, ended.destination), (ended.model, _ANY)) or _resume_prior(model)
        return fit.seconds(ended.n_tokens) * max(1.0, ended.n_at_once)

    def seconds(self, model: ModelView, source: str, destination: str, n_tokens: Iterable[int]) -> float:
        """Seconds to move requests of so many tokens each between two workers, the cheaper way each.

        As the paper has it, each by itself, :data:`N_MOVES_AT_ONCE` at a time; those of which it is known what they take, one
        after the other.
        """
        resume = self._known(self._resumed, (model.name, destination), (model.name, _ANY))
        copy = self._known(self._copied, (source, destination), (_ANY, _ANY))
        kv_nbytes = self._kv_nbytes.get(model.name)
        in_turn_s, ends_s = 0.0, [0.0] * N_MOVES_AT_ONCE
        for n in n_tokens:
            copy_s = inf if copy is None or kv_nbytes is None else copy.seconds(round(n * kv_nbytes))
            resume_s = (resume or _resume_prior(model)).seconds(n)
            if resume is None and resume_s < copy_s:
                heapreplace(ends_s, ends_s[0] + resume_s)
            else:
                in_turn_s += min(copy_s, resume_s)
        return in_turn_s + max(ends_s)

    @staticmethod
    def _known(fits: dict[tuple[str, str], ResumeFit], *keys: tuple[str, str]) -> ResumeFit | None:
        """The first of these that enough is known of."""
        found: Sequence[ResumeFit] = [fits[key] for key in keys if key in fits and fits[key].n >= N_ENOUGH]
        return found[0] if found else None


def _resume_prior(model: ModelView | None) -> ResumeFit:
    return ResumeFit() if model is None else ResumeFit(model.alpha, model.beta)
