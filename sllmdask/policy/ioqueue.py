"""What one tier of one node has promised to read, and how long that takes."""

from __future__ import annotations


class IoQueue:
    """Loads of one (node, tier), one after another, in the order in which they were promised.

    Source: ServerlessLLM (OSDI '24), section 6.1: the ``q`` of the loading-time estimate. A load that ends early or late
    moves what follows it, since that begins when the load ends and not when it was predicted to. Times are those of one clock,
    in seconds, and do not run backwards.
    """

    def __init__(self) -> None:
        #: Predicted seconds by load, in their order; the first one is being read, `_began_at` since when.
        self._seconds: dict[str, float] = {}
        self._began_at = 0.0
        #: Seconds of all but the first.
        self._behind_s = 0.0

    def __len__(self) -> int:
        return len(self._seconds)

    def queue_s(self, at: float) -> float:
        """Seconds until a load that is promised now would begin. One that is overdue is taken to end at any moment."""
        return self._first_s(at) + self._behind_s

    def promise(self, load_id: str, at: float, seconds: float) -> float:
        """A load will be read, in `seconds` once it begins. Returns the seconds until then: its queue.

        To promise it again corrects its `seconds`; it keeps its place.
        """
        if not self._seconds:
            self._began_at = at
        self._seconds[load_id] = max(0.0, seconds)
        self._count()
        before_s = 0.0
        for i, (other, other_s) in enumerate(self._seconds.items()):
            if other == load_id:
                break
            before_s += other_s if i else self._first_s(at)
        return before_s

    def done(self, load_id: str, at: float) -> None:
        """A load has ended, well or badly, or was called off; one that was not promised, or has ended before, changes nothing."""
        if load_id not in self._seconds:
            return
        first = next(iter(self._seconds))
        seconds = self._seconds.pop(load_id)
        # Of two that overlap, the time of the one that ended was not the other's.
        self._began_at = at if load_id == first else min(at, self._began_at + seconds)
        self._count()

    def ends_in_s(self, load_id: str, at: float) -> float | None:
        """Seconds until a load that was promised is predicted to end; ``None``: it was not, or has ended."""
        if load_id not in self._seconds:
            return None
        seconds = 0.0
        for i, (other, other_s) in enumerate(self._seconds.items()):
            seconds += other_s if i else self._first_s(at)
            if other == load_id:
                break
        return seconds

    def _first_s(self, at: float) -> float:
        """Seconds that are left of the load that is being read."""
        first_s = next(iter(self._seconds.values()), 0.0)
        return max(0.0, min(first_s, self._began_at + first_s - at))

    def _count(self) -> None:
        self._behind_s = sum(list(self._seconds.values())[1:])
