"""Which checkpoints the tiers of one node hold, and which of them leave when there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sllmdask.policy.eviction import HostCopy, departures


@dataclass
class _Copy:
    nbytes: int
    reload_s: float
    n_pins: int = 0
    uses: int = 0
    floor: float = 0.0
    last_used: int = 0


class TierMemory:
    """A tier of `capacity` bytes. What leaves for others is what the live store would let go: the cheapest bytes to read again.

    A copy that is pinned, because an instance uses it or it is still arriving, stays.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._copies: dict[str, _Copy] = {}
        self._floor = 0.0
        self._n_uses = 0

    def __contains__(self, key: str) -> bool:
        return key in self._copies

    def __iter__(self) -> Iterator[str]:
        return iter(self._copies)

    @property
    def used(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def take(self, key: str, nbytes: int, reload_s: float) -> bool:
        """Hold `key`, and count one use of it; others leave where that makes room. ``False``: there is none."""
        if key not in self._copies and not self._make_room(nbytes):
            return False
        copy = self._copies.setdefault(key, _Copy(nbytes, reload_s))
        self._n_uses += 1
        copy.uses += 1
        copy.last_used, copy.floor = self._n_uses, self._floor
        return True

    def pin(self, key: str) -> None:
        self._copies[key].n_pins += 1

    def unpin(self, key: str) -> None:
        if key in self._copies:
            self._copies[key].n_pins -= 1

    def drop(self, key: str) -> None:
        """Forget a copy, unless it is pinned."""
        if key in self._copies and self._copies[key].n_pins <= 0:
            del self._copies[key]

    def _make_room(self, nbytes: int) -> bool:
        idle = [
            HostCopy(key, copy.nbytes, copy.nbytes, copy.reload_s, copy.uses, copy.floor, copy.last_used)
            for key, copy in self._copies.items()
            if copy.n_pins <= 0
        ]
        leaving = departures(idle, nbytes - (self.capacity - self.used))
        for departure in leaving or ():
            self._floor = max(self._floor, departure.worth)
            del self._copies[departure.key]
        return leaving is not None
