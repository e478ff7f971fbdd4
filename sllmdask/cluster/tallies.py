"""Counts that only grow, and durations by bucket, for ``GET /metrics``: plain numbers, which travel between processes.

A family is a dict of plain types: ``name``, ``kind`` (``counter``, ``gauge``, ``histogram``), ``help``, ``labels`` (their names)
and ``samples``: ``[values of the labels, number]``, or of a histogram ``[values, [[upper bound, cumulative count], ...], sum]``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

Family = dict[str, Any]
#: Values of labels, in the order of their names.
Labels = tuple[str, ...]


class Counter:
    """Totals by labels. `name` ends in ``_total``."""

    def __init__(self, name: str, help_text: str, *labels: str) -> None:
        self._name, self._help, self._labels = name, help_text, labels
        self._totals: dict[Labels, float] = {}

    def add(self, n: float, *labels: str) -> None:
        self._totals[labels] = self._totals.get(labels, 0) + n

    def forget(self, first_label: str) -> None:
        """Drop everything with this value of the first label."""
        self._totals = {labels: total for labels, total in self._totals.items() if labels[:1] != (first_label,)}

    def family(self, so_far: Mapping[Labels, float] | None = None) -> Family:
        """With what `so_far` adds to the totals: of what has not ended yet."""
        totals = dict(self._totals)
        for labels, more in (so_far or {}).items():
            totals[labels] = totals.get(labels, 0) + more
        samples = [[list(labels), total] for labels, total in sorted(totals.items())]
        return _family(self._name, "counter", self._help, self._labels, samples)


class Histogram:
    """Values by labels, counted by the bucket that they fall into: those not above an upper bound, and above the one before."""

    def __init__(self, name: str, help_text: str, bounds: Iterable[float], *labels: str) -> None:
        self._name, self._help, self._labels = name, help_text, labels
        self._bounds = (*sorted(bounds), inf)
        #: The counts of the buckets, then the sum of the values.
        self._rows: dict[Labels, list[float]] = {}

    def observe(self, value: float, *labels: str) -> None:
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = [0.0] * (len(self._bounds) + 1)
        row[bisect_left(self._bounds, value)] += 1
        row[-1] += value

    def forget(self, first_label: str) -> None:
        self._rows = {labels: row for labels, row in self._rows.items() if labels[:1] != (first_label,)}

    def family(self) -> Family:
        samples = []
        for labels, row in sorted(self._rows.items()):
            cumulative, n = [], 0.0
            for bound, count in zip(self._bounds, row, strict=False):
                n += count
                cumulative.append([bound, n])
            samples.append([list(labels), cumulative, row[-1]])
        return _family(self._name, "histogram", self._help, self._labels, samples)


def gauge(name: str, help_text: str, labels: tuple[str, ...], values: Mapping[Labels, float]) -> Family:
    """Numbers as they are now."""
    return _family(name, "gauge", help_text, labels, [[list(key), value] for key, value in sorted(values.items())])


def _family(name: str, kind: str, help_text: str, labels: tuple[str, ...], samples: list[Any]) -> Family:
    return {"name": name, "kind": kind, "help": help_text, "labels": list(labels), "samples": samples}
