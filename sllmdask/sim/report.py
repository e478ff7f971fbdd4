"""What simulations come to: figures per policy with intervals over the seeds, as rows of a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from random import Random
from statistics import fmean
from typing import Any

from sllmdask import __version__
from sllmdask.policy.views import Tier
from sllmdask.sim.experiment import Run, Served
from sllmdask.sim.scenario import Scenario

#: Resamples of an interval, and the part of them that lies in it.
N_RESAMPLES, LEVEL = 2000, 0.95
#: Seconds of a request, by their stable names.
MEASURES = ("startup_s", "ttft_s", "stalled_s", "delay_s", "end_to_end_s")
STATISTICS = ("mean", "p50", "p95", "p99")
#: Where a request's model was when it came, and what became of it otherwise.
STARTS = ("hit", Tier.HOST.value, Tier.DISK.value, Tier.PEER.value, Tier.REMOTE.value, "refused")
#: Points of a distribution in JSON.
N_QUANTILES = 200


def percentile(ordered: Sequence[float], q: float) -> float:
    """The `q`-quantile of `ordered` values, by straight lines between them, as numpy's default."""
    place = q * (len(ordered) - 1)
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Figure:
    """The mean over the seeds of one statistic, with an interval for it. With one seed the interval is unknown."""

    by_seed: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def value(self) -> float:
        return fmean(self.by_seed)


def figure(by_seed: Sequence[float]) -> Figure:
    """`by_seed` with the bootstrap interval of its mean: percentiles of the means of resamples (Efron, 1979).

    With few seeds it is rough, and hardly wider than what they span.
    """
    if len(by_seed) < 2:
        return Figure(tuple(by_seed), None, None)
    rng = Random(0)
    means = sorted(fmean(rng.choices(by_seed, k=len(by_seed))) for _ in range(N_RESAMPLES))
    edge = (1 - LEVEL) / 2
    return Figure(tuple(by_seed), percentile(means, edge), percentile(means, 1 - edge))


@dataclass(frozen=True)
class Summary:
    """One policy over all seeds. Counts are sums over the seeds; `quantiles` are of all startup latencies together."""

    policy: str
    seeds: tuple[int, ...]
    n_requests: int
    #: By measure, then by statistic.
    figures: Mapping[str, Mapping[str, Figure]]
    starts: Mapping[str, int]
    counts: Mapping[str, int]
    #: Mean relative error of the predicted loading times; ``None``: nothing was loaded.
    estimate_error: float | None
    quantiles: tuple[float, ...]


def summary(runs: Sequence[Run]) -> Summary:
    """Of the runs of one policy, one for each seed."""
    startups = sorted(each.startup_s for run in runs for each in run.requests)
    errors = [error for run in runs for error in run.estimate_errors]
    starts: Counter[str] = Counter()
    for run in runs:
        starts.update(run.starts())
    return Summary(
        policy=runs[0].policy,
        seeds=tuple(run.seed for run in runs),
        n_requests=len(startups),
        figures={name: _statistics(runs, name) for name in MEASURES},
        starts={start: starts[start] for start in STARTS},
        counts={
            "loads": sum(sum(run.loads.values()) for run in runs),
            "evictions": sum(run.n_evictions for run in runs),
            "migrations": sum(run.n_migrations for run in runs),
            "failed_migrations": sum(run.n_failed_migrations for run in runs),
            "preemptions": sum(run.n_preemptions for run in runs),
        },
        estimate_error=fmean(errors) if errors else None,
        quantiles=tuple(percentile(startups, i / N_QUANTILES) for i in range(N_QUANTILES + 1)) if startups else (),
    )


def _statistics(runs: Sequence[Run], measure: str) -> dict[str, Figure]:
    ordered = [sorted(_seconds(each, measure) for each in run.requests) or [0.0] for run in runs]
    figures = {"mean": figure([fmean(values) for values in ordered])}
    for name in STATISTICS[1:]:
        figures[name] = figure([percentile(values, int(name[1:]) / 100) for values in ordered])
    return figures


def _seconds(request: Served, measure: str) -> float:
    seconds: float = getattr(request, measure)
    return seconds


def summaries(runs: Iterable[Run]) -> list[Summary]:
    """One for each policy, in the order in which they come."""
    by_policy: dict[str, list[Run]] = {}
    for run in runs:
        by_policy.setdefault(run.policy, []).append(run)
    return [summary(each) for each in by_policy.values()]


# --- as JSON ---------------------------------------------------------------------------------------------------------


def as_facts(each: Summary) -> dict[str, Any]:
    """A policy as plain data with stable keys."""
    return {
        "policy": each.policy,
        "seeds": list(each.seeds),
        "n_requests": each.n_requests,
        **{
            measure: {
                name: {"value": found.value, "low": found.low, "high": found.high, "by_seed": list(found.by_seed)}
                for name, found in statistics.items()
            }
            for measure, statistics in each.figures.items()
        },
        "starts": dict(each.starts),
        **each.counts,
        "estimate_error": each.estimate_error,
        "startup_quantiles_s": list(each.quantiles),
    }


def run_facts(scenario: Scenario, found: Sequence[Summary], source: str) -> dict[str, Any]:
    """A comparison with all that it needs to be made again."""
    return {
        "kind": "simulated",
        "sllmdask": __version__,
        "source": source,
        "scenario": scenario.model_dump(mode="json"),
        "policies": [as_facts(each) for each in found],
    }


def _without_quantiles(each: Summary) -> dict[str, Any]:
    """Of many points, distributions would be more than anybody reads."""
    return {key: value for key, value in as_facts(each).items() if key != "startup_quantiles_s"}


def sweep_facts(scenario: Scenario, key: str, points: Sequence[tuple[Any, Sequence[Summary]]], source: str) -> dict[str, Any]:
    """Comparisons that differ in one key."""
    return {
        "kind": "simulated",
        "sllmdask": __version__,
        "source": source,
        "scenario": scenario.model_dump(mode="json"),
        "over": key,
        "points": [{"value": value, "policies": [_without_quantiles(each) for each in found]} for value, found in points],
    }
