"""What is learnt of resuming, of running and of the estimates, against least squares by numpy and plain averages."""

from __future__ import annotations

import random
from math import exp, inf, log, nan
from statistics import fmean

import numpy as np
import pytest

from sllmdask.policy.learned import LEAST_REMAINING_S, PRIOR_SERVICE_S, EstimateError, ResumeFit, ServiceTime

# --- resuming ---


def fitted(pairs, **prior) -> ResumeFit:
    fit = ResumeFit(**prior)
    for n_tokens, seconds in pairs:
        fit = fit.after(n_tokens, seconds)
    return fit


def line_by_numpy(pairs, alpha, beta):
    """All observations at once: weighted least squares with two rows for the ridge; no coefficient gets negative here."""
    age = np.arange(len(pairs))[::-1]
    weight, faded = 0.9**age, 0.9 ** len(pairs)
    expected = np.array([alpha * n + beta for n, _ in pairs])
    ratio = np.array([seconds for _, seconds in pairs]) / expected
    scale = exp(float(weight @ np.log(ratio)) / (weight.sum() + 0.2 * faded))
    shares = np.array([[alpha * n, beta] for n, _ in pairs]) / expected[:, None]
    ridge = (0.002 + 0.1 * faded) ** 0.5
    rows = np.vstack([shares * weight[:, None] ** 0.5, ridge * np.eye(2)])
    wanted = np.concatenate([ratio / scale * weight**0.5, [ridge, ridge]])
    a, b = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return a * scale * alpha, b * scale * beta


@pytest.mark.parametrize("seed", range(20))
def test_one_request_at_a_time_gives_the_line_of_all_at_once(seed):
    rng = random.Random(seed)
    alpha, beta = rng.uniform(0.005, 0.02), rng.uniform(0.05, 0.2)
    pairs = [(n, (alpha * n + beta) * rng.uniform(0.9, 1.1)) for n in rng.choices(range(5, 400), k=rng.randint(1, 40))]
    assert fitted(pairs).line == pytest.approx(line_by_numpy(pairs, 0.01, 0.1))


def test_until_a_request_was_resumed_the_deployments_numbers_hold():
    assert ResumeFit().line == (0.01, 0.1)
    assert ResumeFit(0.0, 0.0).line == (0.0, 0.0)
    assert ResumeFit(0.002, 0.3).seconds(100) == pytest.approx(0.5)


@pytest.mark.parametrize("speed", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_device_is_known_after_some_requests_however_wrong_the_prior_was(seed, speed):
    rng = random.Random(seed)
    alpha, beta = 0.004 / speed, 0.4 / speed
    lengths = [int(exp(rng.uniform(log(10), log(4000)))) for _ in range(30)]
    fit = fitted([(n, (alpha * n + beta) * rng.uniform(0.95, 1.05)) for n in lengths])
    for n_tokens in (20, 200, 4000):
        assert fit.seconds(n_tokens) == pytest.approx(alpha * n_tokens + beta, rel=0.15)


def test_a_single_request_tells_how_fast_the_device_is_as_a_whole():
    fit = fitted([(1000, 0.101)])  # the prior says 10.1 s
    assert 0.101 < fit.seconds(1000) < 0.15
    assert fit.seconds(2000) == pytest.approx(2 * fit.seconds(1000), rel=0.1)


@pytest.mark.parametrize("seed", range(50))
def test_no_line_falls_or_begins_below_nothing(seed):
    rng = random.Random(seed)
    fit = fitted([(rng.randint(0, 3000), rng.uniform(1e-4, 20.0)) for _ in range(rng.randint(1, 30))])
    alpha, beta = fit.line
    assert alpha >= 0.0
    assert beta >= 0.0
    assert fit.seconds(100) > 0.0


def test_a_line_that_would_fall_is_flat():
    alpha, beta = fitted([(10, 4.0), (2000, 0.1)] * 20).line
    assert alpha == 0.0
    assert 0.1 < beta < 4.0


def test_a_prior_of_zero_is_learnt_from_all_the_same():
    fit = fitted([(n, 0.002 * n + 0.3) for n in (50, 400, 1000, 3000) * 10], prior_alpha=0.0, prior_beta=0.0)
    assert fit.seconds(1500) == pytest.approx(3.3, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, inf, nan])
def test_a_time_that_no_clock_shows_teaches_nothing(seconds):
    assert ResumeFit().after(10, seconds) == ResumeFit()
    if seconds != 0.0:
        assert ServiceTime().after(seconds) == ServiceTime()
        assert EstimateError().after(seconds, 1.0) == EstimateError().after(1.0, seconds) == EstimateError()


# --- running ---


def test_a_model_that_has_ended_no_request_is_assumed_to_be_like_others():
    assert ServiceTime().remaining_s(4.0) == PRIOR_SERVICE_S - 4.0


def test_the_first_requests_are_averaged_and_later_ones_count_more_than_those_before():
    service = ServiceTime()
    for seconds in (2.0, 4.0, 6.0):
        service = service.after(seconds)
    assert service.mean_s == pytest.approx(4.0)
    for _ in range(60):
        service = service.after(20.0)
    assert service.mean_s == pytest.approx(20.0, rel=0.05)


def test_what_is_left_is_never_nothing_and_more_for_what_is_long_overdue():
    service = ServiceTime().after(2.0)
    assert service.remaining_s(0.5) == 1.5
    assert service.remaining_s(2.0) == pytest.approx(0.2)
    assert service.remaining_s(30.0) == pytest.approx(3.0)
    assert ServiceTime().after(0.0).remaining_s(0.0) == LEAST_REMAINING_S
    at_100_ms = ServiceTime().after(10.0, n_tokens=100)
    assert at_100_ms.remaining_s(1.0, max_tokens=30) == pytest.approx(2.0)
    assert at_100_ms.remaining_s(1.0, max_tokens=300) == at_100_ms.remaining_s(1.0) == 9.0
    assert at_100_ms.remaining_s(5.0, max_tokens=30) == pytest.approx(0.5)


def test_where_tokens_are_told_those_that_are_to_come_count_at_the_requests_own_pace():
    service = ServiceTime().after(10.0, 100)
    assert service.remaining_s(2.0, n_tokens=40) == pytest.approx(3.0)
    assert service.remaining_s(2.0, n_tokens=40, max_tokens=50) == pytest.approx(0.5)
    assert service.remaining_s(2.0, n_tokens=40, max_tokens=40) == LEAST_REMAINING_S
    assert service.remaining_s(5.0, n_tokens=200) == pytest.approx(0.5)
    assert service.remaining_s(2.0) == 8.0
    assert ServiceTime().after(10.0).remaining_s(2.0, n_tokens=40) == 8.0


def test_tokens_are_averaged_over_the_requests_that_told_them():
    service = ServiceTime().after(1.0).after(1.0, 100).after(1.0)
    assert service.mean_tokens == 100
    assert service.n == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_ends_of_exponential_requests_are_right_on_average_at_the_start(seed):
    rng = random.Random(seed)
    service, off = ServiceTime(), []
    for i in range(2000):
        seconds = rng.expovariate(1 / 5.0)
        if i > 100:
            off.append(seconds - service.remaining_s(0.0))
        service = service.after(seconds)
    assert abs(fmean(off)) < 0.5


# --- estimates ---


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_estimates_is_the_mean_of_absolute_shares(seed):
    rng = random.Random(seed)
    pairs = [(rng.uniform(0.1, 5.0), rng.uniform(0.1, 5.0)) for _ in range(40)]
    error = EstimateError()
    for predicted_s, actual_s in pairs:
        error = error.after(predicted_s, actual_s)
    shares = [abs(predicted_s - actual_s) / actual_s for predicted_s, actual_s in pairs]
    assert (error.n, error.last) == (40, shares[-1])
    assert error.mean == pytest.approx(fmean(shares))


def test_the_moving_average_forgets_what_the_mean_does_not():
    error = EstimateError()
    for predicted_s in [3.0] * 10 + [1.0] * 20:
        error = error.after(predicted_s, 1.0)
    assert error.mean == pytest.approx(2 / 3)
    assert error.ewma < 0.05
    assert error.last == 0.0


def test_what_is_too_quick_for_a_clock_is_not_a_thousandfold_error():
    assert EstimateError().after(0.0015, 1e-7).last == pytest.approx(1.5, rel=0.01)
    assert EstimateError().after(2.0, 1.0).last == 1.0
