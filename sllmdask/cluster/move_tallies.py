"""The counters and histograms of moves of single requests, and of what was lost and went on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sllmdask.cluster.tallies import Counter, Family, Histogram
from sllmdask.policy.learned import EstimateError

#: Upper bounds of buckets: seconds without a token because of a move, and because of a death.
MOVE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RESUME_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
ERROR_RATIO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
#: Words of the causes of moves, and what they are called in a label.
_REASONS = {
    "makes room": "placement",  # first, since the name of a model follows
    "drain": "drain",
    "operator": "operator",
    "asked for": "operator",
    "migration failed": "placement",
    "scaled": "scale-in",
    "max_instances": "scale-in",
    "replaced": "replaced",
    "deleted": "deleted",
}
#: Of a move that was refused before it was chosen how.
NO_KIND = "none"


def cause_class(cause: str) -> str:
    """What a cause is called in a label: one of a few words."""
    known = (reason for words, reason in _REASONS.items() if words in cause)
    return next(known, "other")


class MoveTallies:
    """Written by the :class:`~sllmdask.cluster.decision_log.DecisionLog`."""

    def __init__(self) -> None:
        self._moves = Counter(
            "sllmdask_migrations_total", "Moves of requests that are over, by how they ended.", "kind", "reason", "outcome"
        )
        self._downtime_s = Histogram(
            "sllmdask_migration_downtime_seconds",
            "Seconds between the last token of a request before a move and the first one after it, at its front door.",
            MOVE_S,
            "kind",
        )
        self._bytes = Counter("sllmdask_migration_bytes_total", "Bytes that moves have sent, of KV or of token ids.", "kind")
        self._errors = Histogram(
            "sllmdask_migration_estimate_error_ratio",
            "Difference between the expected and the real duration of a move, as a part of the real one.",
            ERROR_RATIO,
            "kind",
        )
        self._resumes = Counter(
            "sllmdask_resumes_total", "Requests that lost their worker or instance, and what became of them.", "reason", "outcome"
        )
        self._resumed_s = Histogram(
            "sllmdask_resume_downtime_seconds",
            "Seconds between the last token of a request before its worker or instance was lost, and the first one after it.",
            RESUME_S,
        )

    def move_ended(self, move: Mapping[str, Any]) -> None:
        kind = move["kind"] or NO_KIND
        self._moves.add(1, kind, cause_class(move["cause"]), move["outcome"])
        if move["nbytes"]:
            self._bytes.add(move["nbytes"], kind)
        error_ratio = estimate_error(move)
        if error_ratio is not None:
            self._errors.observe(error_ratio, kind)

    def paused(self, move: Mapping[str, Any], pause_ms: float) -> None:
        """What the client of a request noticed of its move."""
        if move["outcome"] == "moved":
            self._downtime_s.observe(pause_ms / 1e3, move["kind"] or NO_KIND)

    def resumed(self, resume: Mapping[str, Any]) -> None:
        self._resumes.add(1, resume["reason"], resume["outcome"])
        if resume["pause_ms"] is not None:
            self._resumed_s.observe(resume["pause_ms"] / 1e3)

    def families(self) -> list[Family]:
        each = (self._moves, self._downtime_s, self._bytes, self._errors, self._resumes, self._resumed_s)
        return [family.family() for family in each]


def estimate_error(move: Mapping[str, Any]) -> float | None:
    """How far the expected duration of a move was from the real one, as a part of that; ``None``: it did not come to its end."""
    if move["outcome"] != "moved" or move.get("expected_s") is None:
        return None
    return EstimateError().after(move["expected_s"], move["seconds"]).last
