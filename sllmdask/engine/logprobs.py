"""Log probabilities of tokens: ``log_softmax`` of the model's own logits, before temperature, penalties and masks (as OpenAI).

Those of a prompt need the logits of all its tokens, which is the vocabulary's width for each. They are made chunk by chunk, and
a step computes no more of them than :func:`rows_at_once` says; what is kept is a few numbers per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sllmdask.batching.params import TokenLogprobs

#: Bytes of logits, in float32, that prompts may ask for in one step beside those that tokens are drawn from.
LOGITS_BYTES = 64 * 1024**2
#: Rows that are summed at once: the sum makes a copy of them.
_ROWS_PER_SUM = 16


def rows_at_once(n_vocab: int) -> int:
    """Tokens of prompts whose logits one step may compute."""
    return max(1, LOGITS_BYTES // (4 * n_vocab))


def token_logprobs(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Of the token chosen after each row of `logits` (n, vocab), and of the `n_top` likeliest ones."""
    told: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS_PER_SUM):
        chosen = tokens[start : start + _ROWS_PER_SUM]
        rows = logits[start : start + len(chosen)].float()
        total = torch.logsumexp(rows, dim=-1, keepdim=True)
        own = (rows.gather(1, torch.tensor(chosen, device=rows.device)[:, None]) - total)[:, 0].tolist()
        values, ids = rows.topk(min(n_top, rows.shape[1]), dim=-1)
        tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
        told += [TokenLogprobs(value, tuple(a), tuple(b)) for value, (a, b) in zip(own, tops, strict=True)]
    return told


class PromptLogprobs:
    """Those of one prompt's tokens after the first, as its chunks are computed.

    A chunk that is computed again, after a preemption, adds what is not there yet.
    """

    def __init__(self, prompt_ids: Sequence[int], n_top: int) -> None:
        self._prompt_ids = prompt_ids
        self._n_top = n_top
        self.told: list[TokenLogprobs] = []

    @property
    def complete(self) -> bool:
        return len(self.told) == len(self._prompt_ids) - 1

    def n_rows(self, start: int, stop: int) -> int:
        """How many of the last tokens of a chunk `start`..`stop` must give their logits: the one at ``i`` tells of ``i + 1``."""
        return 0 if self.complete else max(0, stop - max(start, len(self.told)))

    def add(self, stop: int, logits: Tensor) -> None:
        """`logits` (n, vocab) of the n tokens before `stop`."""
        first = stop - len(logits)
        n_used = min(stop, len(self._prompt_ids) - 1) - first
        if n_used <= 0:
            return
        # Where a chunk began behind what was told last, tokens were taken over from elsewhere without their logits.
        if first != len(self.told):
            raise ValueError(f"the log probabilities of the prompt's tokens {len(self.told) + 1} to {first} are missing")
        self.told += token_logprobs(logits[:n_used], self._prompt_ids[first + 1 : first + 1 + n_used], self._n_top)
