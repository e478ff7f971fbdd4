"""Connections over which a checkpoint comes: how long they may take, and that none of them outlasts the load."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sllmdask.errors import Cancelled


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to connect, without a byte, and (``None``: any) in all; failures in a row before a source is given up.

    The pause after the n-th failure is ``backoff_s * 2 ** (n - 1)`` seconds, or what the server asks for, up to 30.
    """

    connect_s: float = 10.0
    idle_s: float = 30.0
    total_s: float | None = None
    attempts: int = 5
    backoff_s: float = 0.2
    redirects: int = 5


class Sockets:
    """The sockets of one load. In the ``with`` block they are shut down once `cancel` is set, so that no thread hangs."""

    def __init__(self, cancel: threading.Event | None) -> None:
        self.cancel = cancel or threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._watcher = threading.Thread(target=self._watch, name="cancel-watch", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._lock:
            sockets, self._open = self._open, set()
        for sock in sockets:
            sock.close()

    def add(self, sock: socket.socket) -> None:
        """`sock` is shut down and closed with the others."""
        with self._lock:
            self._open.add(sock)
        if self.cancel.is_set():
            _shut_down(sock)

    def drop(self, sock: socket.socket) -> None:
        """Close `sock`."""
        with self._lock:
            self._open.discard(sock)
        sock.close()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the load was called off."""
        if self.cancel.is_set():
            raise Cancelled("the fetch was called off")

    def _watch(self) -> None:
        while not self._closed.wait(0.1):
            if self.cancel.is_set():
                with self._lock:
                    for sock in self._open:
                        _shut_down(sock)
                return


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not TLS's: that one forgets its state, which another thread is using.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
