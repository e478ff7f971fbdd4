"""Who asks for what, and when: arrivals, popularity of models, lengths of prompts and answers.

All chance is in a seeded ``random.Random``: the same seed gives the same requests, whatever policy serves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from sllmdask.sim.effects import Lengths

ArrivalProcess = Literal["gamma", "poisson"]
Popularity = Literal["uniform", "zipf"]
LengthKind = Literal["fixed", "lognormal", "sharegpt", "gsm8k"]

#: Tokens at quantiles of the prompts and answers of ShareGPT. Source: Llumnix (OSDI '24), table 1; the ends are ours.
SHAREGPT_PROMPT = ((0.0, 4), (0.5, 74), (0.8, 348), (0.95, 1484), (0.99, 3388), (1.0, 4096))
SHAREGPT_OUTPUT = ((0.0, 2), (0.5, 487), (0.8, 781), (0.95, 988), (0.99, 1234), (1.0, 2048))
#: An imitation of GSM8K, not its rows: log-normal lengths with these means and this sigma. Its answers are as long as
#: ServerlessLLM (OSDI '24) says, 1 / 3.7 of those of ShareGPT.
GSM8K_PROMPT, GSM8K_OUTPUT, GSM8K_SIGMA = 60.0, 135.0, 0.45


@dataclass(frozen=True)
class Request:
    """One request; `at` is in seconds from the beginning."""

    id: str
    at: float
    model: str
    lengths: Lengths


def gaps(process: ArrivalProcess, rate: float, cv: float, rng: Random) -> Callable[[], float]:
    """Seconds between two arrivals, drawn anew with each call: `rate` per second, with the coefficient of variation `cv`.

    Gamma gaps have the shape ``1 / cv**2``; with ``cv`` 1 they are those of a Poisson process. Source of the shape for bursts of
    serverless functions, ``cv`` 8: ServerlessLLM (OSDI '24), section 7.1.
    """
    if process == "poisson":
        return lambda: rng.expovariate(rate)
    shape = 1.0 / cv**2
    return lambda: rng.gammavariate(shape, 1.0 / (shape * rate))


def _first_gap(process: ArrivalProcess, rate: float, cv: float, rng: Random) -> float:
    """Seconds to the first arrival of a process that has run for ever: else all models would begin with a burst.

    The gap around a given moment is longer than others, by the shape ``k + 1`` instead of ``k``; what is left of it is uniform.
    """
    if process == "poisson":
        return rng.expovariate(rate)
    shape = 1.0 / cv**2
    return rng.random() * rng.gammavariate(shape + 1.0, 1.0 / (shape * rate))


def arrivals(process: ArrivalProcess, rate: float, cv: float, duration_s: float, rng: Random) -> list[float]:
    """Times of arrival between 0 and `duration_s`, in order."""
    gap = gaps(process, rate, cv, rng)
    times: list[float] = []
    at = _first_gap(process, rate, cv, rng)
    while at < duration_s:
        times.append(at)
        at += gap()
    return times


def shares(popularity: Popularity, n_models: int, alpha: float) -> list[float]:
    """The part of all requests that each model gets: equal ones, or Zipf's, which falls with the rank to the power of `alpha`."""
    weights = [1.0 if popularity == "uniform" else rank**-alpha for rank in range(1, n_models + 1)]
    return [weight / sum(weights) for weight in weights]


def at_quantile(table: Sequence[tuple[float, float]], q: float) -> int:
    """Tokens at the quantile `q`, by straight lines between the logarithms of the known ones; at least 1."""
    for (low_q, low), (high_q, high) in pairwise(table):
        if q <= high_q:
            part = (q - low_q) / (high_q - low_q)
            return max(1, round(math.exp(math.log(low) + part * (math.log(high) - math.log(low)))))
    return round(table[-1][1])


def _lognormal(mean: float, sigma: float, rng: Random) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)))


def lengths(kind: LengthKind, prompt_tokens: float, output_tokens: float, sigma: float, context: int, rng: Random) -> Lengths:
    """Tokens of one request, cut so that both fit into `context`, the answer first."""
    match kind:
        case "fixed":
            prompt, output = round(prompt_tokens), round(output_tokens)
        case "lognormal":
            prompt, output = _lognormal(prompt_tokens, sigma, rng), _lognormal(output_tokens, sigma, rng)
        case "gsm8k":
            prompt, output = _lognormal(GSM8K_PROMPT, GSM8K_SIGMA, rng), _lognormal(GSM8K_OUTPUT, GSM8K_SIGMA, rng)
        case "sharegpt":
            prompt, output = at_quantile(SHAREGPT_PROMPT, rng.random()), at_quantile(SHAREGPT_OUTPUT, rng.random())
    output = max(1, min(output, context - 1))
    return Lengths(max(1, min(prompt, context - output)), output)


def trace(
    models: Sequence[str],
    *,
    rps: float,
    duration_s: float,
    process: ArrivalProcess,
    cv: float,
    popularity: Popularity,
    alpha: float,
    draw_lengths: Callable[[Random], Lengths],
    seed: int,
) -> list[Request]:
    """Requests for all `models` in order of arrival; each model has a process of its own, at its share of `rps`.

    Bursts are so long that a trace of minutes may have half or twice its rate. So time is stretched until there are
    ``rps * duration_s`` requests in `duration_s`, which leaves the shape as it is.
    """
    rng = Random(f"arrivals {seed}")
    parts = shares(popularity, len(models), alpha)
    ranked = list(models)
    rng.shuffle(ranked)
    n_wanted = max(1, round(rps * duration_s))
    horizon_s = duration_s
    while True:
        # The same generators again, only longer: what is drawn does not depend on how often it was too short.
        streams = [Random(f"arrivals {seed} {model}") for model in ranked]
        times = sorted(
            (at, model)
            for model, part, stream in zip(ranked, parts, streams, strict=True)
            for at in arrivals(process, rps * part, cv, horizon_s, stream)
        )
        if len(times) > n_wanted:
            break
        horizon_s *= 2
    stretch = duration_s / times[n_wanted][0]
    words = Random(f"lengths {seed}")
    return [Request(f"r{i}", at * stretch, model, draw_lengths(words)) for i, (at, model) in enumerate(times[:n_wanted])]
