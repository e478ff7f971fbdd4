"""How fast each tier has been: bytes per second and a fixed overhead, learned from real loads.

A load of n bytes is taken to last ``overhead_s + n / bytes_per_s``. Both are fitted by least squares over past loads, of which
older ones count less (an exponentially weighted average), each by its relative error, so that small models count as much as
large ones. Loads of one size cannot tell overhead from bytes: there, what goes beyond the time that was expected before is
overhead as far as that is likely, so that small models do not make a disk slow. Source: ServerlessLLM (OSDI '24), loading-time
estimate ``q + n / b``; the overhead is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from sllmdask.policy.estimate import PRIOR_BYTES_PER_S
from sllmdask.policy.views import Tier

#: Share of the past that one more load leaves: the last ten loads make most of the estimate.
_DECAY = 0.8
#: Variance of sizes, as a share of their mean square, from which on a line is drawn through them.
_SPREAD = 0.01
#: Seconds of one load that may be overhead where its size alone does not tell: opening files, or asking a server.
_OVERHEAD_S = {Tier.REMOTE: 0.5, Tier.PEER: 0.2}
_LOCAL_OVERHEAD_S = 0.05


class _Fit:
    """Weighted sums of a straight line through (nbytes, seconds); weights are ``1 / seconds**2``, decaying."""

    #: n_loads, and the sums of w, wn, wnn, wt, wnt; bytes in units of 1 MB keep them of like size.
    def __init__(self, n_loads: int = 0, sums: tuple[float, ...] = (0.0,) * 5) -> None:
        self.n_loads = n_loads
        self.sums = sums

    def add(self, nbytes: int, seconds: float) -> None:
        self.n_loads += 1
        w, n = 1 / seconds**2, nbytes / 1e6
        more = (w, w * n, w * n * n, w * seconds, w * n * seconds)
        self.sums = tuple(_DECAY * old + new for old, new in zip(self.sums, more, strict=True))

    def line(self, expected_bytes_per_s: float, likely_overhead_s: float) -> tuple[float, float] | None:
        """(overhead_s, bytes_per_s), or ``None`` while nothing is known."""
        if not self.n_loads:
            return None
        w, wn, wnn, wt, wnt = self.sums
        spread = w * wnn - wn**2
        if spread > _SPREAD * w * wnn:
            s_per_mb = (w * wnt - wn * wt) / spread
            overhead_s = (wt - s_per_mb * wn) / w
            if s_per_mb > 0 and overhead_s >= 0:
                return overhead_s, 1e6 / s_per_mb
        # Of a load of the mean size: what is over the time that was expected is overhead first, then a lower rate.
        nbytes, seconds = 1e6 * wnn / wn, wnt / wn
        overhead_s = min(max(0.0, seconds - nbytes / expected_bytes_per_s), likely_overhead_s, 0.9 * seconds)
        return overhead_s, nbytes / (seconds - overhead_s)


@dataclass(eq=False)
class Turn:
    """One load that is under way; `seconds` that it would have taken alone on its tier, so far."""

    tier: str
    seconds: float = 0.0


class BandwidthMeter:
    """Speeds by tier, or kind of tier (``disk/split16``). A tier that was never used is unknown: ``None``, not a guess."""

    def __init__(self) -> None:
        self._fits: dict[str, _Fit] = {}
        #: Bytes per second by tier, measured by a short read and not by loads.
        self._probed: dict[str, float] = {}
        self._under_way: dict[str, set[Turn]] = {}
        self._looked_at: dict[str, float] = {}

    # --- hearing ---

    def observe(self, tier: str, nbytes: int, seconds: float) -> None:
        """A load of `nbytes` from `tier`, alone on that tier, took `seconds`. Empty loads say nothing."""
        if nbytes > 0 and seconds > 0:
            self._fits.setdefault(tier, _Fit()).add(nbytes, seconds)

    def probed(self, tier: str, bytes_per_s: float) -> None:
        """A short read found this; loads say more, once there are some."""
        if isfinite(bytes_per_s) and bytes_per_s > 0:
            self._probed[tier] = bytes_per_s

    def begin(self, tier: str, at: float) -> Turn:
        """A load begins `at`, in seconds of any clock. Loads that are under way at the same time share the tier evenly."""
        self._advance(tier, at)
        turn = Turn(tier)
        self._under_way.setdefault(tier, set()).add(turn)
        return turn

    def end(self, turn: Turn, at: float) -> float:
        """It ends. Returns the seconds that it would have taken alone."""
        self._advance(turn.tier, at)
        self._under_way[turn.tier].discard(turn)
        return turn.seconds

    def _advance(self, tier: str, at: float) -> None:
        turns = self._under_way.get(tier, ())
        for turn in turns:
            turn.seconds += max(0.0, at - self._looked_at[tier]) / len(turns)
        self._looked_at[tier] = at

    # --- telling ---

    def estimate(self, tier: str, nbytes: int) -> float | None:
        """Seconds to bring `nbytes` from `tier`; ``None`` if nothing is known."""
        line = self._line(tier)
        return None if line is None else line[0] + nbytes / line[1]

    def _line(self, tier: str) -> tuple[float, float] | None:
        fit = self._fits.get(tier)
        if fit is None:
            return (0.0, self._probed[tier]) if tier in self._probed else None
        base = Tier(tier.partition("/")[0])
        expected = self._probed.get(tier) or self._probed.get(base) or PRIOR_BYTES_PER_S[base]
        return fit.line(expected, _OVERHEAD_S.get(base, _LOCAL_OVERHEAD_S))

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """By tier: ``bytes_per_s``, ``overhead_s``, ``n_loads`` (0: it was only probed). Plain msgpack types."""
        found = {}
        for tier in self._fits.keys() | self._probed.keys():
            line = self._line(tier)
            if line is not None:
                n_loads = self._fits[tier].n_loads if tier in self._fits else 0
                found[tier] = {"overhead_s": line[0], "bytes_per_s": line[1], "n_loads": n_loads}
        return found

    # --- keeping ---

    def kept(self) -> dict[str, Any]:
        """All that is known, as plain JSON types, for :meth:`take_over`."""
        loads = {tier: [fit.n_loads, *fit.sums] for tier, fit in self._fits.items()}
        return {"loads": loads, "probed": dict(self._probed)}

    def take_over(self, kept: Mapping[str, Any]) -> None:
        """Know what another meter knew. What does not read as such is left out: it is learned again."""
        for tier, numbers in _items(kept.get("loads")):
            if _is_tier(tier) and isinstance(numbers, list) and len(numbers) == 6 and all(map(_is_positive, numbers)):
                self._fits.setdefault(tier, _Fit(int(numbers[0]), tuple(map(float, numbers[1:]))))
        for tier, bytes_per_s in _items(kept.get("probed")):
            if _is_tier(tier) and _is_positive(bytes_per_s):
                self._probed.setdefault(tier, float(bytes_per_s))


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _is_tier(name: Any) -> bool:
    return isinstance(name, str) and name.partition("/")[0] in PRIOR_BYTES_PER_S


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and isfinite(number) and number > 0
