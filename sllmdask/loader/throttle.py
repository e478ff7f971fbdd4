"""Bounds how many bytes per second a worker's loads read from its disk, so that they leave bandwidth to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sllmdask.errors import Cancelled


class Throttle:
    """At most `bytes_per_s` over all threads that ask, one after the other and without a burst; 0: as fast as it goes."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        #: When all bytes that were asked for so far may have been read.
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, nbytes: int, cancel: threading.Event | None = None) -> None:
        """Return when `nbytes` more may have been read; raises :class:`Cancelled` once `cancel` is set."""
        if not self.bytes_per_s:
            return
        seconds = nbytes / self.bytes_per_s
        with self._lock:
            free_at = self._free_at = max(self._clock(), self._free_at) + seconds
        cancel = cancel or threading.Event()
        while (left_s := free_at - self._clock()) > 0:
            if cancel.wait(left_s):
                with self._lock:
                    self._free_at -= seconds
                raise Cancelled("the read was called off")
