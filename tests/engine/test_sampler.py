from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sllmdask.batching.params import SamplingParams
from sllmdask.engine import sampler
from sllmdask.engine.sampler import Draw, TokenCounts, adjust, gumbel, largest, sample


def draw(seed: int = 0, position: int = 0, banned: frozenset[int] = frozenset(), **params: float) -> Draw:
    return Draw(SamplingParams(seed=seed, **params), position, banned)  # type: ignore[arg-type]


def random_logits(n_vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(n_vocab, generator=torch.Generator().manual_seed(seed)) * spread


def kept_by_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities after transformers' warpers, in the order in which ``generate`` applies them."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return scores[0].softmax(-1)


def p_value(chi_square: float, degrees: int) -> float:
    """Wilson and Hilferty's normal approximation of the chi-square distribution's upper tail."""
    z = ((chi_square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_are_distributed_as_transformers_would_draw_them(filters: dict[str, float], vary: str):
    n_draws, logits = 8000, random_logits(24)
    draws = [draw(**{vary: i}, **filters) for i in range(n_draws)]
    tokens = sample(logits.expand(n_draws, -1), draws)
    expected = kept_by_transformers(logits, draws[0].params) * n_draws
    seen = torch.bincount(torch.tensor(tokens), minlength=len(logits)).double()
    assert not seen[expected == 0].any()
    likely, rare = expected >= 5, (expected > 0) & (expected < 5)
    chi_square = float(((seen - expected) ** 2 / expected)[likely].sum())
    degrees = int(likely.sum()) - 1
    if expected[rare].sum() >= 1:
        chi_square += float((seen[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum())
        degrees += 1
    assert p_value(chi_square, degrees) > 1e-3


@pytest.mark.parametrize("filters", [f for f in FILTERS if f], ids=str)
@pytest.mark.parametrize("n_vocab", [50, 3000])
def test_filters_keep_what_the_warpers_of_transformers_keep(
    filters: dict[str, float], n_vocab: int, monkeypatch: pytest.MonkeyPatch
):
    logits = random_logits(n_vocab, seed=3, spread=4.0)
    allowed = kept_by_transformers(logits, draw(**filters).params) > 0
    kept = torch.zeros(n_vocab, dtype=torch.bool)
    # Noise that lifts one token after the other over all others shows which of them can come at all.
    for first in range(0, n_vocab, 500):
        lifted = torch.arange(first, min(first + 500, n_vocab))
        monkeypatch.setattr(sampler, "gumbel", lambda draws, ids: 1e4 * (ids == next_tokens(draws)).float())

        def next_tokens(draws: list[Draw]) -> torch.Tensor:
            return torch.tensor([[d.position] for d in draws], dtype=torch.int32)

        tokens = sample(logits.expand(len(lifted), -1), [draw(position=int(token), **filters) for token in lifted])
        kept[lifted] = torch.tensor(tokens) == lifted
    assert kept.equal(allowed)


def test_a_nucleus_wider_than_the_first_look_is_found_too():
    flat = torch.zeros(5000)
    flat[7] = 0.01
    n_draws = 400
    tokens = sample(flat.expand(n_draws, -1), [draw(seed=i, top_p=0.9) for i in range(n_draws)])
    assert len(set(tokens)) > 350
    assert max(tokens) > 4000


def test_equal_logits_at_the_border_are_kept_together():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    tokens = sample(logits.expand(500, -1), [draw(seed=i, top_k=2) for i in range(500)])
    assert set(tokens) == {0, 1, 2, 3}


def test_temperature_0_takes_the_likeliest_token_and_needs_no_seed():
    logits = random_logits(100).expand(3, -1)
    assert sample(logits, [draw(seed=i, temperature=0.0) for i in range(3)]) == [int(logits[0].argmax())] * 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = random_logits(100)
    assert sample(logits[None], [draw(temperature=temperature)]) == [int(logits.argmax())]


def test_a_draw_depends_on_its_own_row_only():
    logits = torch.stack([random_logits(2000, seed=i) for i in range(40)])
    draws = [draw(seed=i, position=3 * i, **FILTERS[i % len(FILTERS)]) for i in range(40)]
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], draws[i : i + 1])[0] for i in range(40)]
    assert together[::-1] == sample(logits.flip(0), draws[::-1])


def test_the_seed_and_the_position_both_change_the_draw():
    logits = torch.zeros(1, 1000)
    tokens = {sample(logits, [draw(seed=seed, position=position)])[0] for seed in range(6) for position in range(6)}
    assert len(tokens) > 30


def test_seeds_use_all_of_their_64_bits():
    logits = torch.zeros(1, 1000)
    assert len({sample(logits, [draw(seed=7 + (high << 32))])[0] for high in range(20)}) > 15


def test_successive_draws_are_independent():
    n = 20000
    tokens = torch.tensor(sample(torch.zeros(n, 4), [draw(seed=5, position=i) for i in range(n)]))
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
    assert p_value(float(((pairs - pairs.sum() / 16) ** 2 / (pairs.sum() / 16)).sum()), 15) > 1e-3


def test_banned_tokens_do_not_come():
    logits = random_logits(10)
    best = int(logits.argmax())
    assert sample(logits[None], [draw(temperature=0.0, banned=frozenset([best, 10**6]))]) == [int(logits.topk(2).indices[1])]
    assert best not in sample(logits.expand(300, -1), [draw(seed=i, banned=frozenset([best])) for i in range(300)])


def test_a_row_that_is_not_a_number_gets_no_token_and_spoils_no_other():
    logits = torch.stack([random_logits(10)] * 3)
    logits[1, 4] = torch.nan
    for params in ({"temperature": 0.0}, {}, {"top_p": 0.5}):
        tokens = sample(logits, [draw(**params)] * 3)
        assert tokens[1] is None
        assert tokens[0] == tokens[2] is not None
    assert sample(torch.full((1, 4), -torch.inf), [draw()]) == [None]


def test_the_noise_has_the_moments_of_a_gumbel_distribution_and_no_infinity():
    noise = gumbel([draw(seed=i) for i in range(100)], torch.arange(5000, dtype=torch.int32))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


@pytest.mark.parametrize("n_vocab", [1, 255, 256, 257, 700, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logit_is_the_first_of_equal_ones_wherever_it_is(
    n_vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampler, "_LEAST_BLOCKWISE", 0)
    generator = torch.Generator().manual_seed(n_vocab)
    # Few values, so that many are equal.
    logits = torch.randint(-4, 4, (40, n_vocab), generator=generator).to(dtype)
    logits[1] = -torch.inf
    logits[2, n_vocab - 1] = 9
    logits[3, n_vocab // 2] = torch.nan
    best, places = largest(logits)
    for row, value, place in zip(logits.float().numpy(), best.tolist(), places.tolist(), strict=True):
        assert place == row.argmax()
        np.testing.assert_equal(value, row.max())


# --- penalties, bias, masks ------------------------------------------------------------------------------------------


def seen(prompt: list[int], answer: list[int]) -> TokenCounts:
    counts = TokenCounts(prompt)
    for token in answer:
        counts.add(token)
    return counts


def adjusted(logits: torch.Tensor, *draws: Draw) -> torch.Tensor:
    return adjust(logits.expand(len(draws), -1).clone(), draws)


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30), max_size=200))
def test_counts_are_those_of_counting_all_tokens_anew(prompt: list[int], answer: list[int]):
    counts = seen(prompt, answer)
    expected = {token: answer.count(token) for token in {*prompt, *answer}}
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float):
    logits = random_logits(200)
    prompt, answer = [3, 7, 7, 150], [7, 8, 199, 8]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), logits[None])
    found = adjusted(logits, Draw(SamplingParams(repetition_penalty=penalty), 8, seen=seen(prompt, answer)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.75), (-2.0, 0.5)])
def test_presence_and_frequency_penalties_are_those_of_openais_formula(presence: float, frequency: float):
    logits = random_logits(50)
    answer = [4, 4, 4, 9, 30]
    expected = logits.clone()
    for token in range(50):
        count = answer.count(token)
        expected[token] -= count * frequency + float(count > 0) * presence
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    found = adjusted(logits, Draw(params, 5, seen=seen([], answer)))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)


def test_presence_and_frequency_look_at_the_answer_and_repetition_at_the_prompt_too():
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=2.0)
    found = adjusted(torch.tensor([4.0, 4.0, 4.0]), Draw(params, 2, seen=seen([0], [1])))
    assert found.tolist() == [[2.0, 0.0, 4.0]]


def test_a_bias_is_that_of_transformers():
    logits = random_logits(60)
    bias = ((3, 5.0), (4, -100.0), (59, 0.25))
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])
    expected = processor(torch.tensor([[0, 1]]), logits[None].clone())
    found = adjusted(logits, Draw(SamplingParams(logit_bias=bias), 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_mask_and_a_ban_are_those_of_transformers():
    logits = random_logits(40)
    allowed = np.zeros(40, dtype=np.bool_)
    allowed[[1, 5, 7]] = True
    constrained = PrefixConstrainedLogitsProcessor(lambda _batch, _ids: [1, 5, 7], 1)(torch.tensor([[0]]), logits[None].clone())
    expected = SuppressTokensLogitsProcessor([5])(torch.tensor([[0]]), constrained)
    found = adjusted(logits, Draw(SamplingParams(), 1, banned=frozenset([5]), allowed=allowed))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def everything(i: int, n_vocab: int) -> Draw:
    """A draw with some of everything, different for each `i`."""
    rng = random.Random(i)
    filters = {"temperature": 0.8, **FILTERS[i % len(FILTERS)]}
    params = SamplingParams(
        seed=i,
        repetition_penalty=(1.0, 1.4)[i % 2],
        presence_penalty=(0.0, 0.5)[i // 2 % 2],
        frequency_penalty=(0.0, 0.3)[i // 4 % 2],
        logit_bias=((i % n_vocab, 2.0),) if i % 3 else (),
        **filters,  # type: ignore[arg-type]
    )
    allowed = np.array([rng.random() < 0.5 for _ in range(n_vocab)]) if i % 5 == 0 else None
    tokens = [rng.randrange(n_vocab) for _ in range(rng.randint(0, 40))]
    return Draw(params, 3 * i, frozenset([2]), seen(tokens[:10], tokens[10:]) if params.penalised else None, allowed)


def test_what_changes_one_row_changes_no_other():
    n_vocab = 300
    logits = torch.stack([random_logits(n_vocab, seed=i) for i in range(40)])
    draws = [everything(i, n_vocab) for i in range(40)]
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], draws[i : i + 1])[0] for i in range(40)]
    assert together[::-1] == sample(logits.flip(0), draws[::-1])
    for i, row in enumerate(adjust(logits, draws)):
        assert torch.equal(row, adjust(logits[i : i + 1], draws[i : i + 1])[0])


def test_the_models_logits_are_left_as_they_are():
    logits = torch.stack([random_logits(300, seed=i) for i in range(10)])
    before = logits.clone()
    sample(logits, [everything(i, 300) for i in range(10)])
    assert torch.equal(logits, before)


def test_tokens_with_penalties_bias_and_mask_are_distributed_as_transformers_would_draw_them():
    n_draws, logits = 8000, random_logits(24)
    prompt, answer = [1, 2, 3, 3], [4, 5, 5]
    allowed = np.ones(24, dtype=np.bool_)
    allowed[[0, 6, 7, 20]] = False
    params = {"temperature": 0.9, "repetition_penalty": 1.5, "logit_bias": ((8, 1.5), (9, -3.0)), "top_k": 12}
    scores = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + answer]), logits[None])
    scores = SequenceBiasLogitsProcessor([[[8], 1.5], [[9], -3.0]])(torch.tensor([[0, 0]]), scores)
    scores = scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)
    expected = TopKLogitsWarper(12)(torch.tensor([[0]]), TemperatureLogitsWarper(0.9)(torch.tensor([[0]]), scores))[0].softmax(-1)
    counts = seen(prompt, answer)
    draws = [Draw(SamplingParams(seed=i, **params), 7, seen=counts, allowed=allowed) for i in range(n_draws)]  # type: ignore[arg-type]
    drawn = torch.bincount(torch.tensor(sample(logits.expand(n_draws, -1), draws)), minlength=24).double()
    expected = expected.double() * n_draws
    assert not drawn[expected == 0].any()
    common = expected >= 5
    assert int(common.sum()) >= 8
    chi_square = float(((drawn - expected) ** 2 / expected)[common].sum())
    # Falsely below once in a thousand seeds, and these are fixed.
    assert p_value(chi_square, int(common.sum()) - 1) > 1e-3


def test_a_mask_that_leaves_fewer_tokens_than_top_k_is_kept():
    logits = random_logits(5000)
    allowed = np.zeros(5000, dtype=np.bool_)
    allowed[[10, 4000]] = True
    draws = [Draw(SamplingParams(seed=i, top_k=50), 0, allowed=allowed) for i in range(200)]
    assert set(sample(logits.expand(200, -1), draws)) == {10, 4000}


def test_a_mask_that_leaves_nothing_gives_no_token():
    assert sample(random_logits(20)[None], [Draw(SamplingParams(), 0, allowed=np.zeros(20, dtype=np.bool_))]) == [None]
