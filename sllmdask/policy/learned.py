"""What is learnt from what happened: how long it takes to resume, how long requests run, how good the estimates were.

All are values: ``after`` tells what is known with one more observation. One of each kind is kept per key, a model with a kind of
device for instance, by whoever observes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, isfinite, log
from typing import Self

from sllmdask.policy.estimate import resume_seconds

#: Share of the past that one more resumed request leaves: the last ten make most of the fit.
_DECAY = 0.9
#: Weight of the prior beside observations of weight 1: of how long it takes in all, and of how that divides into tokens and rest.
_SCALE_WEIGHT, _SHAPE_WEIGHT = 0.2, 0.1
#: The latter fades to this, so that requests of one length go on to be divided somehow.
_LEAST_SHAPE_WEIGHT = 0.002

#: Priors of seconds per token and of seconds per request, as in ServerlessLLM's ``scheduler_config``.
PRIOR_ALPHA, PRIOR_BETA = 0.01, 0.1


@dataclass(frozen=True)
class ResumeFit:
    """Seconds to compute the KV of n tokens again, ``alpha * n_tokens + beta``, from those that were resumed before.

    Recursive least squares with forgetting, of errors relative to the prior, so that short requests count too. Until there
    are observations the line is the prior, a deployment's ``scheduler_config``; after them, ridge regression draws it to the
    prior made longer or shorter as a whole, which a single request can tell for a device that is a hundred times as fast. Neither
    number is ever negative. Source of the line: ServerlessLLM (OSDI '24), section 6.2.
    """

    prior_alpha: float = PRIOR_ALPHA
    prior_beta: float = PRIOR_BETA
    n: int = 0
    #: Decayed sums over observations, of 1, ln r, xx, xy, yy, xr, yr: x and y are the shares of tokens and rest in what the prior
    #: predicted, r is what it took over that.
    sums: tuple[float, float, float, float, float, float, float] = (0.0,) * 7

    def after(self, n_tokens: int, seconds: float) -> Self:
        """A request of `n_tokens` was resumed within `seconds`. A time that no clock shows says nothing."""
        if n_tokens < 0 or not isfinite(seconds) or seconds <= 0:
            return self
        alpha, beta = self._unit
        expected_s = alpha * n_tokens + beta
        x, y, r = alpha * n_tokens / expected_s, beta / expected_s, seconds / expected_s
        more = (1.0, log(r), x * x, x * y, y * y, x * r, y * r)
        w, log_r, xx, xy, yy, xr, yr = (_DECAY * each + new for each, new in zip(self.sums, more, strict=True))
        return replace(self, n=self.n + 1, sums=(w, log_r, xx, xy, yy, xr, yr))

    @property
    def _unit(self) -> tuple[float, float]:
        """The prior; where it is 0 it could be made neither longer nor shorter, and the usual one stands in for it."""
        return self.prior_alpha or PRIOR_ALPHA, self.prior_beta or PRIOR_BETA

    @property
    def line(self) -> tuple[float, float]:
        """(alpha, beta), seconds per token and seconds per request."""
        if not self.n:
            return self.prior_alpha, self.prior_beta
        w, log_r, xx, xy, yy, xr, yr = self.sums
        faded = _DECAY**self.n
        scale = exp(log_r / (w + _SCALE_WEIGHT * faded))
        ridge = _LEAST_SHAPE_WEIGHT + _SHAPE_WEIGHT * faded
        # Normal equations of: x a + y b = r / scale for each observation, a = 1 and b = 1 by the ridge.
        xx, yy, xr, yr = xx + ridge, yy + ridge, xr / scale + ridge, yr / scale + ridge
        determinant = xx * yy - xy * xy
        a, b = (xr * yy - yr * xy) / determinant, (yr * xx - xr * xy) / determinant
        if a < 0:
            a, b = 0.0, yr / yy
        elif b < 0:
            a, b = xr / xx, 0.0
        alpha, beta = self._unit
        return a * scale * alpha, b * scale * beta

    def seconds(self, n_tokens: int) -> float:
        """Predicted seconds to resume a request of `n_tokens`."""
        return resume_seconds(n_tokens, *self.line)


#: Seconds of a request of a model that has ended none yet.
PRIOR_SERVICE_S = 10.0
#: Weight of one more request in the averages, once there are as many as make it the mean of all.
_SERVICE_WEIGHT = 0.1
#: Of its time until now: what a request that is past its time is expected to need still. Of answers whose lengths have a heavy
#: tail those that are long already have the most to come.
_OVERDUE = 0.1
#: Requests whose seconds are remembered one by one.
_N_LAST = 16
#: Nothing is predicted to end sooner: a step has to be made, and be told.
LEAST_REMAINING_S = 0.01


@dataclass(frozen=True)
class ServiceTime:
    """How long the requests of a model run once they are dispatched: exponentially weighted averages of seconds and of tokens."""

    n: int = 0
    mean_s: float = PRIOR_SERVICE_S
    #: Tokens of an answer; 0: not known.
    mean_tokens: float = 0.0
    #: Seconds of the last requests.
    last_s: tuple[float, ...] = ()

    def after(self, seconds: float, n_tokens: int = 0) -> Self:
        """A request that made `n_tokens` (0: not known) has ended, `seconds` after its dispatch."""
        if not isfinite(seconds) or seconds < 0:
            return self
        weight = max(1 / (self.n + 1), _SERVICE_WEIGHT)
        mean_tokens = self.mean_tokens
        if n_tokens > 0:
            mean_tokens += (weight if mean_tokens else 1.0) * (n_tokens - mean_tokens)
        mean_s = self.mean_s + weight * (seconds - self.mean_s)
        last_s = (*self.last_s, seconds)[-_N_LAST:]
        return replace(self, n=self.n + 1, mean_s=mean_s, mean_tokens=mean_tokens, last_s=last_s)

    def remaining_s(self, running_s: float, n_tokens: int = 0, max_tokens: int | None = None) -> float:
        """Seconds until a request ends that has run for `running_s` and made `n_tokens` of at most `max_tokens`.

        Without `n_tokens`, or as long as no answer's length is known, the seconds of other requests tell, and no more than it
        takes to make `max_tokens` at their pace; otherwise the tokens that are to come, at the pace that this one has had. At
        least :data:`LEAST_REMAINING_S`.
        """
        if n_tokens > 0 and running_s > 0 and self.mean_tokens > 0:
            tokens = max(self.mean_tokens - n_tokens, _OVERDUE * n_tokens)
            if max_tokens is not None:
                tokens = min(tokens, max_tokens - n_tokens)
            return max(tokens * running_s / n_tokens, LEAST_REMAINING_S)
        # The mean residual life of those that ran for longer: of lengths with a heavy tail it does not fall with time.
        longer = [seconds for seconds in self.last_s if seconds > running_s] or [self.mean_s]
        total_s = sum(longer) / len(longer)
        if max_tokens is not None and self.mean_tokens > 0:  # all that it may make, at the pace of the others
            total_s = min(total_s, max_tokens * self.mean_s / self.mean_tokens)
        return max(total_s - running_s, _OVERDUE * running_s, LEAST_REMAINING_S)


#: Weight of the last load in the moving average of errors.
_ERROR_WEIGHT = 0.2
#: Seconds: what is sooner is not told apart, and no error is taken relative to less.
_RESOLUTION_S = 1e-3


@dataclass(frozen=True)
class EstimateError:
    """How far the estimates of one (node, tier) were off, as shares of the time that it took: 0.1 is ten per cent.

    Each is an absolute value: of all loads (`mean`), of the last ones more than of those before (`ewma`), of the `last`.
    """

    n: int = 0
    mean: float = 0.0
    ewma: float = 0.0
    last: float = 0.0

    def after(self, predicted_s: float, actual_s: float) -> Self:
        """A load that was predicted to take `predicted_s` took `actual_s`. Times that no clock shows say nothing."""
        if not (isfinite(predicted_s) and isfinite(actual_s)) or predicted_s < 0 or actual_s < 0:
            return self
        error = abs(predicted_s - actual_s) / max(actual_s, _RESOLUTION_S)
        n = self.n + 1
        weight = max(1 / n, _ERROR_WEIGHT)
        return replace(
            self, n=n, mean=self.mean + (error - self.mean) / n, ewma=self.ewma + weight * (error - self.ewma), last=error
        )
