"""How fast each tier has been: bytes per second and a fixed overhead, learned from real loads.

A load of n bytes is taken to last ``overhead_s + n / bytes_per_s``. Both are fitted by least squares over past loads, of which
older ones count less (an exponentially weighted average), each by its relative error, so that small models count as much as
large ones. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``; the overhead is ours.
"""

from __future__ import annotations

from typing import Any

#: Share of the past that one more load leaves: the last ten loads make most of the estimate.
_DECAY = 0.8


class _Fit:
    """Weighted sums of a straight line through (nbytes, seconds); weights are ``1 / seconds**2``, decaying."""

    def __init__(self) -> None:
        self.n_loads = 0
        self._w = self._wn = self._wnn = self._wt = self._wnt = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        self.n_loads += 1
        w = 1 / seconds**2
        # Bytes in units of 1 MB keep the sums of like size.
        n = nbytes / 1e6
        self._w = _DECAY * self._w + w
        self._wn = _DECAY * self._wn + w * n
        self._wnn = _DECAY * self._wnn + w * n * n
        self._wt = _DECAY * self._wt + w * seconds
        self._wnt = _DECAY * self._wnt + w * n * seconds

    def line(self) -> tuple[float, float] | None:
        """(overhead_s, bytes_per_s), or ``None`` while nothing is known."""
        if not self.n_loads:
            return None
        spread = self._w * self._wnn - self._wn**2
        # Loads of one size cannot tell overhead from bytes.
        if spread > 1e-6 * self._w * self._wnn:
            s_per_mb = (self._w * self._wnt - self._wn * self._wt) / spread
            overhead_s = (self._wt - s_per_mb * self._wn) / self._w
            if s_per_mb > 0 and overhead_s >= 0:
                return overhead_s, 1e6 / s_per_mb
        return 0.0, 1e6 * self._wnn / self._wnt


class BandwidthMeter:
    """Speeds by tier. A tier that was never used is unknown: ``None``, not a guess."""

    def __init__(self) -> None:
        self._fits: dict[str, _Fit] = {}

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        """A load of `nbytes` from `tier`, alone on that tier, took `seconds`. Empty loads say nothing."""
        if nbytes > 0 and seconds > 0:
            self._fits.setdefault(tier, _Fit()).add(nbytes, seconds)

    def estimate(self, tier: str, nbytes: int) -> float | None:
        """Seconds to bring `nbytes` from `tier`; ``None`` if nothing is known."""
        fit = self._fits.get(tier)
        line = fit.line() if fit else None
        return None if line is None else line[0] + nbytes / line[1]

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """By tier: ``bytes_per_s``, ``overhead_s``, ``n_loads``; only tiers that were used. Plain msgpack types."""
        found = {}
        for tier, fit in self._fits.items():
            line = fit.line()
            if line is not None:
                found[tier] = {"overhead_s": line[0], "bytes_per_s": line[1], "n_loads": fit.n_loads}
        return found
