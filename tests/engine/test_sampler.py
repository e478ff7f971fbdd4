from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sllmdask.batching.params import SamplingParams
from sllmdask.engine import sampler
from sllmdask.engine.sampler import Draw, gumbel, sample


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
