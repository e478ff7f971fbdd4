"""Which parts of a file of shared memory are free, and which of those have pages behind them already.

Pages cost far more than mappings do: a segment is put together from warm pieces before it takes cold ones in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sllmdask.loader import libc

#: Bytes. Memory is handed out in multiples of it.
GRANULE = libc.HUGE_PAGE

#: Warm pieces that a segment is put together from where no single place is large enough.
_MAX_FRAGMENTS = 128

#: (offset, bytes) in the pool's file.
Extent = tuple[int, int]


class _FreeList:
    """Disjoint extents; neighbours are one."""

    def __init__(self) -> None:
        self.total = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    def __iter__(self) -> Iterator[Extent]:
        return iter([(start, end - start) for start, end in self._end_of.items()])

    def add(self, start: int, nbytes: int) -> None:
        self.total += nbytes
        end = start + nbytes
        if end in self._end_of:
            end = self._end_of.pop(end)
        if start in self._start_of:
            start = self._start_of.pop(start)
        self._end_of[start], self._start_of[end] = end, start

    def remove(self, start: int, nbytes: int) -> int:
        """Take what is in the list of ``[start, start + nbytes)`` out of it; returns how many bytes that were."""
        end, removed = start + nbytes, 0
        for first, last in [each for each in self._end_of.items() if each[0] < end and each[1] > start]:
            del self._end_of[first], self._start_of[last]
            removed += min(last, end) - max(first, start)
            for rest, rest_end in ((first, min(last, start)), (max(first, end), last)):
                if rest < rest_end:
                    self._end_of[rest], self._start_of[rest_end] = rest_end, rest
        self.total -= removed
        return removed


class Extents:
    """Which parts of a file of `nbytes` bytes are free, and which of those have pages behind them already ("warm").

    All sizes are multiples of :data:`GRANULE`.
    """

    def __init__(self, nbytes: int) -> None:
        self._warm, self._cold = _FreeList(), _FreeList()
        self._cold.add(0, nbytes)

    @property
    def warm(self) -> int:
        return self._warm.total

    @property
    def free(self) -> int:
        return self._warm.total + self._cold.total

    def take(self, nbytes: int) -> list[Extent]:
        """`nbytes` of what is free: warm before cold, because pages cost far more than mapping several pieces; then in one piece,
        and then out of the smallest that is large enough.
        """
        assert 0 < nbytes <= self.free, "more than is free"
        reach = min(nbytes, self.warm)
        window = self._window(nbytes)
        if window is not None and window[0] >= reach - nbytes // 16:
            return self._cut([(window[1], nbytes)])
        pieces: list[Extent] = []
        for kind, limit in ((self._warm, _MAX_FRAGMENTS), (self._cold, None)):
            for start, size in sorted(kind, key=lambda extent: (-extent[1], extent[0]))[:limit]:
                missing = nbytes - sum(piece[1] for piece in pieces)
                if missing == 0:
                    break
                pieces.append((start, min(size, missing)))
        missing = nbytes - sum(piece[1] for piece in pieces)
        if missing:
            # Only where there are very many warm pieces: the small ones after all.
            taken = dict(pieces)
            for start, size in self._warm:
                if start not in taken and missing:
                    pieces.append((start, min(size, missing)))
                    missing -= pieces[-1][1]
        return self._cut(pieces)

    def take_warm(self, nbytes: int) -> Extent | None:
        """At most `nbytes` in one piece out of the smallest warm one."""
        return self._take_from(self._warm, nbytes)

    def take_cold(self, nbytes: int) -> Extent | None:
        """At most `nbytes` in one piece, cold, next to what is warm if there is such a place."""
        beside = {start + size for start, size in self._warm}
        for start, size in self._cold:
            if start in beside:
                piece = (start, min(size, nbytes))
                self._cold.remove(*piece)
                return piece
        return self._take_from(self._cold, nbytes)

    def give(self, extents: Iterable[Extent], *, warm: bool = True) -> None:
        for start, nbytes in extents:
            (self._warm if warm else self._cold).add(start, nbytes)

    def _take_from(self, kind: _FreeList, nbytes: int) -> Extent | None:
        extents = sorted(kind, key=lambda extent: (extent[1], extent[0]))
        if not extents:
            return None
        start, size = extents[0]
        kind.remove(start, min(size, nbytes))
        return start, min(size, nbytes)

    def _window(self, nbytes: int) -> tuple[int, int] | None:
        """(warm bytes, start) of the best free place for `nbytes` in one piece: most warm bytes, then tightest, then first."""
        runs = _FreeList()
        for extent in (*self._warm, *self._cold):
            runs.add(*extent)
        best: tuple[int, int, int] | None = None
        for run, size in runs:
            if size < nbytes:
                continue
            inside = [(start, length) for start, length in self._warm if run <= start < run + size]
            last = run + size - nbytes
            starts = {run, *(min(start, last) for start, _ in inside), *(max(start + n - nbytes, run) for start, n in inside)}
            for start in starts:
                warm = sum(max(0, min(first + n, start + nbytes) - max(first, start)) for first, n in inside)
                best = max(best or (-1, 0, 0), (warm, -size, -start))
        return best and (best[0], -best[2])

    def _cut(self, pieces: list[Extent]) -> list[Extent]:
        merged = _FreeList()
        for start, nbytes in pieces:
            found = self._warm.remove(start, nbytes) + self._cold.remove(start, nbytes)
            assert found == nbytes, "handed out twice"
            merged.add(start, nbytes)
        return sorted(merged)
