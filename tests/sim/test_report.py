"""What is made of the seconds of many requests."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from sllmdask.policy.views import Tier
from sllmdask.sim.experiment import Run, Served
from sllmdask.sim.report import as_facts, figure, percentile, summaries


def served(i, startup_s, start="disk", stalled_s=0.0):
    return Served(f"r{i}", startup_s, startup_s + 0.1, stalled_s, startup_s + 5.0, start)


def test_percentiles_are_numpys():
    rng = Random(4)
    for n in (1, 2, 3, 10, 101, 1000):
        values = sorted(rng.expovariate(1.0) for _ in range(n))
        for q in (0.0, 0.01, 0.5, 0.95, 0.99, 1.0):
            assert percentile(values, q) == pytest.approx(np.quantile(values, q))


def test_an_interval_of_one_seed_is_unknown_and_one_of_many_is_as_wide_as_theory_says():
    assert (figure([3.0]).value, figure([3.0]).low) == (3.0, None)
    rng = Random(1)
    values = [rng.gauss(10.0, 2.0) for _ in range(100)]
    found = figure(values)
    half = 1.96 * float(np.std(values)) / 100**0.5
    assert found.value == pytest.approx(np.mean(values))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.low < found.value < found.high and figure(values) == found


def test_a_summary_has_the_figures_of_all_seeds_and_sums_of_what_is_counted():
    runs = [
        Run("ours", 0, (served(0, 1.0), served(1, 3.0, "hit")), {"disk": 1}, (0.1,), n_evictions=2, n_migrations=1),
        Run("other", 0, (served(0, 9.0),)),
        Run("ours", 1, (served(0, 5.0, "refused"), served(1, 7.0, stalled_s=2.0)), {"host": 2}, (0.3,), n_preemptions=4),
    ]
    ours, other = summaries(runs)
    facts = as_facts(ours)
    assert (ours.policy, other.policy, facts["seeds"], facts["n_requests"]) == ("ours", "other", [0, 1], 4)
    assert facts["startup_s"]["mean"]["by_seed"] == [2.0, 6.0] and facts["startup_s"]["mean"]["value"] == 4.0
    assert facts["startup_s"]["p50"]["by_seed"] == [2.0, 6.0]
    assert facts["delay_s"]["mean"]["by_seed"] == [2.0, 7.0] and facts["stalled_s"]["mean"]["by_seed"] == [0.0, 1.0]
    assert facts["starts"] == {"hit": 1, "host": 0, Tier.DISK: 2, "peer": 0, "remote": 0, "refused": 1}
    assert [facts[key] for key in ("loads", "evictions", "migrations", "preemptions")] == [3, 2, 1, 4]
    assert facts["estimate_error"] == pytest.approx(0.2) and other.estimate_error is None
    assert (facts["startup_quantiles_s"][0], facts["startup_quantiles_s"][-1]) == (1.0, 7.0)
