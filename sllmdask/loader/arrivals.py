"""Which chunks of a plan have arrived, for threads that want to use the first tensors while the last are on their way."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Iterable

from sllmdask.loader.plan import ReadPlan


class Arrivals:
    """The chunks of `plan` that have arrived. All methods belong to any thread.

    One side tells of chunks, in any order, or once of a failure. The other waits for tensors: it hears of the failure whatever
    it waits for, since a checkpoint of which a part is damaged is not to be used.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._there = bytearray(len(plan.chunks))
        self._n_missing = len(plan.chunks)
        self._nbytes = 0
        self._error: BaseException | None = None
        #: How many threads wait for a chunk: a chunk for which none waits wakes none.
        self._awaited: Counter[int] = Counter()
        self._changed = threading.Condition()

    def arrived(self, chunk: int) -> None:
        """Chunk number `chunk` is in the buffer, checked and decoded. To say it twice does nothing."""
        with self._changed:
            if self._there[chunk]:
                return
            self._there[chunk] = True
            self._n_missing -= 1
            self._nbytes += self._plan.chunks[chunk].payload
            if self._awaited[chunk]:
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """What is missing will not come, for this reason. The first failure counts."""
        with self._changed:
            # A copy: the traceback of the error itself would keep the frames of the read, and their memory, alive.
            self._error = self._error or fresh(error)
            self._changed.notify_all()

    def wait(self, tensors: Iterable[str], timeout_s: float | None = None) -> None:
        """Return when all of `tensors` are in the buffer.

        Raises what :meth:`fail` was told, each time anew (:class:`Cancelled` where the read was called off), or
        :class:`TimeoutError` after `timeout_s` seconds.
        """
        self._wait((chunk for name in tensors for chunk in self._plan.chunks_of[name]), timeout_s)

    def wait_chunk(self, chunk: int, timeout_s: float | None = None) -> None:
        """Return when chunk number `chunk` is in the buffer; raises as :meth:`wait`."""
        self._wait((chunk,), timeout_s)

    def has(self, tensor: str) -> bool:
        """Whether `tensor` is in the buffer."""
        with self._changed:
            return all(self._there[chunk] for chunk in self._plan.chunks_of[tensor])

    def has_chunk(self, chunk: int) -> bool:
        """Whether chunk number `chunk` is in the buffer."""
        with self._changed:
            return bool(self._there[chunk])

    @property
    def done(self) -> bool:
        """Whether every chunk has arrived."""
        with self._changed:
            return not self._n_missing

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that have arrived."""
        with self._changed:
            return self._nbytes

    def _wait(self, chunks: Iterable[int], timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._check()
            for chunk in chunks:
                while not self._there[chunk]:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"chunk {chunk} of {len(self._there)} has not arrived in {timeout_s} s")
                    self._awaited[chunk] += 1
                    try:
                        self._changed.wait(left)
                    finally:
                        self._awaited[chunk] -= 1
                    self._check()

    def _check(self) -> None:
        if self._error is not None:
            # Made anew: several threads must not add their frames to one traceback.
            raise fresh(self._error)


def fresh(error: BaseException) -> BaseException:
    """`error` again, without its traceback and its causes."""
    try:
        fresh = copy.copy(error)
    except TypeError:
        # Its class wants other arguments than it keeps.
        return RuntimeError(f"{type(error).__name__}: {error}")
    # Dask has exceptions copied with their tracebacks.
    fresh.__traceback__ = fresh.__cause__ = fresh.__context__ = None
    return fresh
