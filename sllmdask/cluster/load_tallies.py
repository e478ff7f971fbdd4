"""The counters and histograms of the control plane: what loads cost, what was evicted and refused, who held the devices."""

from __future__ import annotations

from collections.abc import Mapping

from sllmdask.cluster.records import LoadRecord
from sllmdask.cluster.tallies import Counter, Family, Histogram

#: Upper bounds of buckets: seconds of a load, and parts of what an estimate turned out to be.
LOAD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
ERROR_RATIO = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
#: Phases of a load, as workers tell of them in ``NAME_s``: the wait for other loads, the reading; the module built, its tensors
#: put in their places, its first layers checked; until it took requests; until the last byte was there.
PHASES = ("queue", "bytes", "construct", "assign", "check", "ready", "read")
#: Beginnings of the controller's causes, and what they are called in a label.
_REASONS = {
    "evict": "room",
    "preempt": "room",
    "keep-alive": "idle",
    "scaled": "idle",
    "max_instances": "idle",
    "asked": "asked",
    "deleted": "deleted",
    "replaced": "replaced",
}


class LoadTallies:
    """Written by the :class:`~sllmdask.cluster.decision_log.DecisionLog`."""

    def __init__(self) -> None:
        self._cold_starts = Counter(
            "sllmdask_cold_starts_total", "Loads of an instance, by how they ended.", "model", "tier", "outcome"
        )
        self._durations = Histogram(
            "sllmdask_load_duration_seconds",
            "Seconds from the decision to load (phase total), or of one phase on the worker.",
            LOAD_S,
            "model",
            "tier",
            "phase",
        )
        self._bytes = Counter("sllmdask_load_bytes_total", "Bytes of loaded weights, by the tier that they came from.", "tier")
        self._errors = Histogram(
            "sllmdask_load_estimate_error_ratio",
            "Difference between the estimated and the real duration of a load, as a part of the real one.",
            ERROR_RATIO,
        )
        self._evictions = Counter("sllmdask_evictions_total", "Instances that left a tier, by the reason.", "tier", "reason")
        self._refused = Counter(
            "sllmdask_admission_rejected_total", "Requests that were refused a place, by the error's code.", "reason"
        )
        self._held_s = Counter(
            "sllmdask_device_seconds_total", "Seconds times slots that instances of a model held, loading included.", "model"
        )

    def load_ended(self, load: LoadRecord) -> None:
        self._cold_starts.add(1, load.model, load.tier, load.outcome)
        if load.outcome != "loaded":
            return
        self._bytes.add(load.nbytes, load.tier)
        for phase in PHASES:
            seconds = load.phases.get(f"{phase}_s")
            if seconds is not None:
                self._durations.observe(seconds, load.model, load.tier, phase)
        if load.took_s is not None:
            self._durations.observe(load.took_s, load.model, load.tier, "total")
        if load.error_ratio is not None:
            self._errors.observe(load.error_ratio)

    def left(self, tier: str, cause: str) -> None:
        known = (reason for words, reason in _REASONS.items() if cause.startswith(words))
        self._evictions.add(1, tier, next(known, "other"))

    def refused(self, code: str) -> None:
        self._refused.add(1, code)

    def held(self, model: str, slot_s: float) -> None:
        self._held_s.add(slot_s, model)

    def forget(self, model: str) -> None:
        each: Counter | Histogram
        for each in (self._cold_starts, self._durations, self._held_s):
            each.forget(model)

    def families(self, holding: Mapping[tuple[str, ...], float]) -> list[Family]:
        """All of them; `holding` has the seconds times slots of instances that are still there, by model."""
        counted: list[Counter | Histogram] = [
            self._cold_starts,
            self._durations,
            self._bytes,
            self._errors,
            self._evictions,
            self._refused,
        ]
        return [*(each.family() for each in counted), self._held_s.family(holding)]
