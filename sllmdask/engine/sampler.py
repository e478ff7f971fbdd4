"""From logits to tokens, without any random state.

A token is the ``argmax`` of its logit (over the temperature) plus Gumbel noise, which draws from the softmax exactly. The noise
is a hash of (seed, position, token id): a request draws the same tokens alone, in any batch, after a preemption or on another
worker, and nothing has to be carried along. A small change of the logits rarely changes the winner.

In this order: penalties, bias, what a grammar or a length forbids, temperature, filters, noise.

Source: Gumbel-max trick (Gumbel 1954; Maddison et al. 2014); counter-based generators, Salmon et al., SC '11; the mixers are
Steele's splitmix64 and Appleby's murmur3 finalizer. Filters keep what transformers' ``TopK``, ``TopP`` and ``MinP`` warpers keep.
Repetition penalty: CTRL (Keskar et al. 2019); presence and frequency penalties: OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sllmdask.batching.params import SamplingParams

#: Tokens that are looked at first where top_k or top_p leave few: sorting a whole vocabulary costs 17 times as much.
_N_LIKELIEST = 1024
#: Below it, sampling is greedy in float32 anyway.
_MIN_TEMPERATURE = 1e-5
#: Logits of which the largest is looked for at once; and below how many in all it costs more calls than it saves.
_BLOCK, _LEAST_BLOCKWISE = 256, 1 << 17
#: Logits that are sampled from at once: the noise is made in many passes, which should stay in a processor's cache.
_N_AT_ONCE = 1 << 16
_MASK_64 = (1 << 64) - 1


class TokenCounts:
    """Which tokens a sequence has, and how often its answer has each: what penalties look at.

    It grows by one step per token, so that a long answer is not counted again for each of its tokens. It holds nothing that the
    tokens do not tell.
    """

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        """`prompt_ids` are counted as seen, not as part of the answer."""
        distinct = list(dict.fromkeys(prompt_ids))
        self._place = {token: place for place, token in enumerate(distinct)}
        self._ids = np.array(distinct or [0], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """One more token of the answer."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct tokens, those of the prompt first."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often the answer has each of :attr:`ids`."""
        return self._counts[: len(self._place)]


@dataclass(frozen=True, eq=False)
class Draw:
    """How to choose one token: the parameters, its index in the sequence, and the ids that may not come.

    `seen`: the tokens so far, where there are penalties. `allowed`: (vocab,) bool, what a grammar lets come.
    """

    params: SamplingParams
    position: int
    banned: frozenset[int] = frozenset()
    seen: TokenCounts | None = None
    allowed: NDArray[np.bool_] | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token id for each row of `logits` (n, vocab); ``None`` for a row with NaN or without any possible token."""
    logits = adjust(logits, draws)
    best, tokens = largest(logits)
    usable = torch.isfinite(best)
    n_rows = max(1, _N_AT_ONCE // logits.shape[1])
    sampled = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    for filtered, choose in ((False, _sample_all), (True, _sample_likeliest)):
        left = (row for row in sampled if _filtered(draws[row].params) == filtered)
        while some := list(islice(left, n_rows)):
            index = torch.tensor(some, device=logits.device)
            tokens[index] = choose(logits[index].float() - best[index, None], [draws[row] for row in some])
    return [token if ok else None for token, ok in zip(tokens.tolist(), usable.tolist(), strict=True)]


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` (n, vocab), as float32, and the first place where it is; NaN where there is one.

    The place is looked for in the block that has the maximum: torch computes maxima many at a time, places one by one.
    """
    logits = logits.float()  # torch is slower with maxima in half precision
    if logits.numel() < _LEAST_BLOCKWISE:
        return logits.max(dim=-1)
    n_vocab = logits.shape[1]
    n_whole = n_vocab - n_vocab % _BLOCK
    tops = logits[:, :n_whole].unflatten(1, (n_whole // _BLOCK, _BLOCK)).amax(dim=-1)
    if n_whole < n_vocab:
        tops = torch.cat((tops, logits[:, n_whole:].amax(dim=-1, keepdim=True)), dim=1)
    # A last block that is short is looked at with what is before it, where nothing is as large.
    first = (tops.argmax(dim=-1, keepdim=True) * _BLOCK).clamp(max=max(0, n_vocab - _BLOCK))
    block = logits.gather(1, first + torch.arange(min(_BLOCK, n_vocab), device=logits.device))
    best, place = block.max(dim=-1)
    return best, first[:, 0] + place


def adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """`logits` (n, vocab) with the penalties, biases and bans of their rows; a copy in float32 where anything changes.

    A penalty applies to the tokens that a row has seen only, so the work grows with those and not with the vocabulary.
    """
    penalised = [row for row, draw in enumerate(draws) if draw.seen is not None and len(draw.seen.ids)]
    biased = [(row, token, bias) for row, draw in enumerate(draws) for token, bias in draw.params.logit_bias]
    masked = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned if token < logits.shape[1]]
    if not (penalised or biased or masked or banned):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if penalised:
        _penalise(logits, penalised, draws)
    if biased:
        rows, ids, bias = zip(*biased, strict=True)
        at = (torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device))
        logits[at] += torch.tensor(bias, dtype=torch.float32, device=logits.device)
    if masked:
        allowed = torch.from_numpy(np.stack([draws[row].allowed for row in masked]))  # type: ignore[misc]
        index = torch.tensor(masked, device=logits.device)
        logits[index] = logits[index].masked_fill(~allowed.to(logits.device), -torch.inf)
    if banned:
        logits[tuple(torch.tensor(banned, device=logits.device).T)] = -torch.inf
    return logits


def _penalise(logits: Tensor, penalised: Sequence[int], draws: Sequence[Draw]) -> None:
    """Change the logits of tokens that the rows `penalised` have seen, in place."""
    seen = [(row, counts, draws[row].params) for row in penalised if (counts := draws[row].seen) is not None]
    lengths = [len(counts.ids) for _, counts, _ in seen]

    def repeated(values: Sequence[float], dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), lengths)).to(logits.device)

    rows = repeated([row for row, _, _ in seen], np.int64)
    ids = torch.from_numpy(np.concatenate([counts.ids for _, counts, _ in seen])).to(logits.device)
    times = torch.from_numpy(np.concatenate([counts.counts for _, counts, _ in seen])).to(logits.device)
    repetition = repeated([params.repetition_penalty for _, _, params in seen], np.float32)
    presence = repeated([params.presence_penalty for _, _, params in seen], np.float32)
    frequency = repeated([params.frequency_penalty for _, _, params in seen], np.float32)
    values = logits[rows, ids]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[rows, ids] = values - frequency * times - presence * (times > 0)


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _sample_all(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(n,) token ids of rows whose largest logit is 0, without top_k and top_p: noise for the whole vocabulary."""
    scores, floor = _scores(logits, draws)
    noise = gumbel(draws, torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device))
    return (scores + noise).masked_fill(scores < floor, -torch.inf).argmax(dim=-1)


def _sample_likeliest(logits: Tensor, draws: Sequence[Draw], n_likeliest: int = _N_LIKELIEST) -> Tensor:
    """(n,) token ids of rows whose largest logit is 0, from the likeliest tokens only, or from all where those do not do."""
    n_vocab = logits.shape[1]
    scores, floor = _scores(logits, draws)
    n_likeliest = min(max(n_likeliest, *(draw.params.top_k for draw in draws)), n_vocab)
    values, ids = scores.topk(n_likeliest, dim=-1)
    floor = torch.maximum(floor, _lowest_kept(scores, values, draws))
    chosen = (values + gumbel(draws, ids.to(torch.int32))).masked_fill(values < floor, -torch.inf)
    tokens = ids.gather(1, chosen.argmax(dim=-1, keepdim=True))[:, 0]
    if n_likeliest < n_vocab:
        # The next value might be as large as the lowest that is kept.
        unsure = torch.nonzero((values[:, -1:] >= floor) & (values[:, -1:] > -torch.inf))[:, 0]
        if len(unsure):
            tokens[unsure] = _sample_likeliest(logits[unsure], [draws[row] for row in unsure.tolist()], n_vocab)
    return tokens


def _scores(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Logits over the temperature (n, vocab), and the lowest that min_p keeps (n, 1)."""
    temperatures = _column([max(draw.params.temperature, _MIN_TEMPERATURE) for draw in draws], logits)
    return logits / temperatures, torch.log(_column([draw.params.min_p for draw in draws], logits))


def _lowest_kept(scores: Tensor, values: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(n, 1) the lowest score that top_k and then top_p keep; equal scores are kept or dropped together.

    `values` are the largest of `scores` in descending order, top_k of them at least. If they do not reach as far as top_p does,
    the answer is the last of them.
    """
    top_k = torch.tensor([[min(draw.params.top_k, values.shape[1])] for draw in draws], device=scores.device)
    by_k = values.gather(1, (top_k - 1).clamp(min=0)).masked_fill(top_k == 0, -torch.inf)
    top_p = _column([draw.params.top_p for draw in draws], scores)
    mass = torch.logsumexp(scores.masked_fill(scores < by_k, -torch.inf), dim=-1, keepdim=True)
    probability = torch.exp(values - mass)
    n_kept = (probability.cumsum(dim=-1) - probability < top_p).sum(dim=-1, keepdim=True)
    by_p = values.gather(1, n_kept.clamp(min=1) - 1).masked_fill(top_p >= 1, -torch.inf)
    return torch.maximum(by_k, by_p)


def gumbel(draws: Sequence[Draw], ids: Tensor) -> Tensor:
    """Standard Gumbel noise (n, m) for n draws' seeds and positions, and token `ids`, int32 (m,) or (n, m)."""
    words = [_mix64(_mix64(draw.params.seed) ^ draw.position) for draw in draws]
    low, high = (
        torch.tensor([[(word >> shift & 0xFFFFFFFF) - (1 << 31)] for word in words], dtype=torch.int32, device=ids.device)
        for shift in (0, 32)
    )
    bits = _mix32_(_mix32_(ids ^ low).bitwise_xor_(high)).bitwise_and_(0x7FFFFFFF)
    # In (0, 1), with its relative precision kept near 0: the smallest numbers become the largest noise, which decides.
    uniform = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix64(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK_64
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK_64
    return word ^ word >> 31


def _mix32_(words: Tensor) -> Tensor:
    # torch shifts int32 arithmetically, so the copies of the sign are masked away; products wrap.
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    words *= -2048144789
    words ^= (words >> 13).bitwise_and_(0x7FFFF)
    words *= -1028477387
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
