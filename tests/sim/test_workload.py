"""Arrivals, popularity and lengths of the simulator's workloads."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from random import Random
from statistics import fmean, pstdev

import pytest

from sllmdask.sim.effects import Lengths
from sllmdask.sim.workload import (
    GSM8K_OUTPUT,
    SHAREGPT_OUTPUT,
    SHAREGPT_PROMPT,
    arrivals,
    at_quantile,
    gaps,
    lengths,
    shares,
    trace,
)


def make(seed=0, *, n_models=4, rps=2.0, duration_s=500.0, process="gamma", cv=8.0, popularity="uniform", alpha=1.0):
    return trace(
        [f"m{i}" for i in range(n_models)],
        rps=rps,
        duration_s=duration_s,
        process=process,
        cv=cv,
        popularity=popularity,
        alpha=alpha,
        draw_lengths=lambda rng: Lengths(rng.randrange(1, 100), rng.randrange(1, 100)),
        seed=seed,
    )


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 8.0])
def test_gaps_have_the_mean_and_the_coefficient_of_variation_that_were_asked_for(cv):
    gap = gaps("gamma", 4.0, cv, Random(1))
    values = [gap() for _ in range(200_000)]
    # The standard error of the mean is cv / sqrt(n); that of the cv is larger the heavier the tail.
    assert fmean(values) == pytest.approx(0.25, rel=5 * cv / sqrt(len(values)))
    assert pstdev(values) / fmean(values) == pytest.approx(cv, rel=0.05)


def test_a_gamma_process_of_cv_1_is_a_poisson_process():
    """Its counts per second have as much variance as mean, as those of an exponential one have."""
    for process in ("gamma", "poisson"):
        times = arrivals(process, 3.0, 1.0, 20_000.0, Random(5))
        counts = Counter(int(at) for at in times)
        per_s = [counts[second] for second in range(20_000)]
        assert fmean(per_s) == pytest.approx(3.0, rel=0.03)
        assert pstdev(per_s) ** 2 == pytest.approx(3.0, rel=0.05)


def test_a_process_has_no_burst_at_its_beginning():
    """It looks as if it had run for ever: the first tenth of the time has a tenth of the arrivals."""
    rng = Random(3)
    times = [at for _ in range(4000) for at in arrivals("gamma", 0.05, 8.0, 1000.0, rng)]
    assert sum(at < 100.0 for at in times) / len(times) == pytest.approx(0.1, rel=0.2)


def test_a_trace_has_its_rate_exactly_is_in_order_and_is_the_same_for_the_same_seed():
    requests = make(seed=3)
    assert len(requests) == 1000
    assert [each.at for each in requests] == sorted(each.at for each in requests)
    assert requests[0].at >= 0 and requests[-1].at <= 500.0
    assert requests == make(seed=3) != make(seed=4)
    assert [each.id for each in requests] == [f"r{i}" for i in range(1000)]


def test_models_are_asked_for_as_zipf_says():
    requests = make(popularity="zipf", n_models=8, process="poisson", cv=1.0, rps=100.0, duration_s=1000.0)
    counts = sorted(Counter(each.model for each in requests).values(), reverse=True)
    harmonic = sum(1 / rank for rank in range(1, 9))
    expected = [100_000 / rank / harmonic for rank in range(1, 9)]
    # Five standard deviations of a Poisson count.
    assert all(abs(count - mean) < 5 * sqrt(mean) for count, mean in zip(counts, expected, strict=True))


def test_equal_shares_add_up_to_one():
    assert shares("uniform", 4, 1.0) == [0.25] * 4
    assert sum(shares("zipf", 1000, 1.3)) == pytest.approx(1.0)


@pytest.mark.parametrize("table", [SHAREGPT_PROMPT, SHAREGPT_OUTPUT])
def test_lengths_of_sharegpt_have_the_published_quantiles(table):
    rng = Random(2)
    drawn = sorted(at_quantile(table, rng.random()) for _ in range(50_000))
    for q, n_tokens in table[1:-1]:
        assert drawn[int(q * len(drawn))] == pytest.approx(n_tokens, rel=0.05)


def test_lengths_fit_into_the_window_and_are_as_fixed_or_as_long_on_average_as_was_asked():
    rng = Random(0)
    assert lengths("fixed", 100, 50, 0.0, 2048, rng) == Lengths(100, 50)
    assert lengths("fixed", 3000, 50, 0.0, 2048, rng) == Lengths(1998, 50)
    assert lengths("fixed", 3000, 4000, 0.0, 2048, rng) == Lengths(1, 2047)
    drawn = [lengths("lognormal", 200, 100, 0.6, 10**6, rng) for _ in range(20_000)]
    assert fmean(each.n_prompt for each in drawn) == pytest.approx(200, rel=0.03)
    assert fmean(each.n_output for each in drawn) == pytest.approx(100, rel=0.03)
    answers = [lengths("gsm8k", 0, 0, 0.0, 2048, rng).n_output for _ in range(20_000)]
    assert fmean(answers) == pytest.approx(GSM8K_OUTPUT, rel=0.03)
