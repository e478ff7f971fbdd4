from __future__ import annotations

from collections import Counter

import numpy as np

from scripts.bench_many_models import Answer, make_trace, parse_arguments, summary, table


def test_arrivals_have_the_rate_and_the_spread_that_were_asked_for():
    trace = make_trace(12, 20_000, 2.0, 4.0, 1.0, seed=1)
    gaps = np.diff([0.0, *(arrival.at for arrival in trace)])
    assert abs(gaps.mean() / 0.5 - 1) < 0.1
    assert abs(gaps.std() / gaps.mean() / 4 - 1) < 0.1


def test_models_are_asked_for_by_zipfs_law():
    counts = Counter(arrival.model for arrival in make_trace(12, 50_000, 2.0, 1.0, 1.0, seed=2))
    ranked = [n for _, n in counts.most_common()]
    expected = np.array([1 / rank for rank in range(1, 13)])
    np.testing.assert_allclose(np.array(ranked) / sum(ranked), expected / expected.sum(), atol=0.006)


def test_a_seed_gives_one_trace_and_another_one_another():
    first, again, other = (make_trace(3, 50, 2.0, 4.0, 1.0, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_requests_that_failed_count_as_such_and_not_as_fast_ones():
    answers = [Answer(0.0, 0, 0.1, 0.5, 8), Answer(1.0, 1, 0.3, 0.9, 8), Answer(2.0, 1, None, None, 0, "503 no")]
    facts = summary(answers)
    assert (facts["n"], facts["n_failed"], facts["mean_s"], facts["max_s"]) == (3, 1, 0.2, 0.3)
    assert "200" in table({"sllmdask": [answers]})
    assert summary(answers[2:]) == {"n": 1, "n_failed": 1}


def test_a_quick_run_has_fewer_models_than_it_has_by_default():
    assert parse_arguments(["--quick"]).models < parse_arguments([]).models
