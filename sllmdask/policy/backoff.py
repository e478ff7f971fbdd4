"""Loads that failed: where a model is not tried for a while, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Back-off after a failed load of one model on one worker: doubled from the first to the last, in seconds.
BACKOFF_S = (1.0, 60.0)


@dataclass(frozen=True)
class Failure:
    """The last failed load of a model on a worker."""

    reason: str
    until: float
    n_times: int


class BackOff:
    """The failures that have not been made up for, by model and worker."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Failure]] = {}

    def failed(self, model: str, worker: str, reason: str, at: float) -> None:
        """A load has failed: it is not tried there again for twice as long as after the last time."""
        old = self._of.get(model, {}).get(worker)
        n_times = old.n_times + 1 if old else 1
        pause_s = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(n_times - 1, 10))
        self._of.setdefault(model, {})[worker] = Failure(reason, at + pause_s, n_times)

    def loaded(self, model: str, worker: str) -> None:
        """A load has been good."""
        self._keep(model, {key: each for key, each in self._of.get(model, {}).items() if key != worker})

    def served(self, model: str, at: float) -> None:
        """The model serves: what went wrong, and may be tried again, is over."""
        if model in self._of:
            self._keep(model, {key: each for key, each in self._of[model].items() if each.until > at})

    def forget_model(self, model: str) -> None:
        self._of.pop(model, None)

    def forget_worker(self, worker: str) -> None:
        for model in list(self._of):
            self.loaded(model, worker)

    def _keep(self, model: str, failures: dict[str, Failure]) -> None:
        if failures:
            self._of[model] = failures
        else:
            self._of.pop(model, None)

    def of(self, model: str) -> Mapping[str, Failure]:
        """The last failed load of a model on each worker that has not had a good one since."""
        return self._of.get(model, {})

    def active(self, model: str, at: float) -> dict[str, str]:
        """Workers on which loading `model` failed a moment ago, with the reason."""
        return {worker: each.reason for worker, each in self._of.get(model, {}).items() if each.until > at}

    def ends_at(self, model: str, at: float) -> float | None:
        """When the first worker may be tried again; ``None``: none is kept out."""
        return min((each.until for each in self._of.get(model, {}).values() if each.until > at), default=None)

    def last_reason(self, model: str) -> str | None:
        """The reason of the newest failed load that has not been followed by a good one."""
        failures = self._of.get(model)
        return max(failures.values(), key=lambda failure: failure.until).reason if failures else None
