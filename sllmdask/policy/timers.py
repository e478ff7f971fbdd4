"""What only time changes: at most one moment for each thing, the earliest first."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf

#: What is to be looked at, and of which: ("deadline", request) for instance.
Key = tuple[str, ...]


class Timers:
    """Moments by key. Of equally early ones the smaller key comes first."""

    def __init__(self) -> None:
        self._at: dict[Key, float] = {}
        #: All that were set; what is not in `_at` any more, or at another time, is skipped.
        self._heap: list[tuple[float, Key]] = []

    def set(self, at: float, *key: str) -> None:
        """Replaces what was set for `key` before; ``inf`` never comes."""
        if at == inf:
            self._at.pop(key, None)
        if at == inf or self._at.get(key) == at:
            return
        self._at[key] = at
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [(when, each) for each, when in self._at.items()]
            heapify(self._heap)
        else:
            heappush(self._heap, (at, key))

    def cancel(self, *key: str) -> None:
        self._at.pop(key, None)

    def due(self, at: float) -> list[Key]:
        """All whose moment has come, in its order; they are not set any more."""
        found = []
        while (first := self.first()) is not None and first <= at:
            _, key = heappop(self._heap)
            del self._at[key]
            found.append(key)
        return found

    def first(self) -> float | None:
        """The earliest moment."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
