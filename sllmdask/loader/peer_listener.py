"""Listens for other workers: a port, a thread for each connection, and nobody who does not prove that he knows the token."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Self

from sllmdask.loader.peer_wire import BUSY_GREETING, Wire, checked_token, greet

logger = logging.getLogger(__name__)

#: Seconds within which a caller must prove itself: until then anybody holds a connection.
_GREETING_S = 10.0


class PeerListener:
    """Takes connections at `host` and `port` (0: any free one; see :attr:`address`) of those who know `token`.

    At most `max_connections` are served at a time; the next hear that it is busy. One that is silent for `idle_s` seconds is
    closed. `advertise` is the host that others reach this one by.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str | bytes,
        *,
        advertise: str | None = None,
        tls: ssl.SSLContext | None = None,
        max_connections: int = 64,
        idle_s: float = 60.0,
    ) -> None:
        self._token, self._tls, self._idle_s = checked_token(token), tls, idle_s
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._sockets: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
        self.port: int = self._listener.getsockname()[1]
        name = advertise or host
        #: ``host:port``
        self.address = f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"
        self._acceptor = threading.Thread(target=self._accept, name="peer-accept", daemon=True)
        self._acceptor.start()

    def serve(self, wire: Wire) -> None:
        """Talk to a caller that has proved itself, in a thread of its own, until it is gone; ``OSError`` is no error here."""
        raise NotImplementedError

    def renew(self, token: str | bytes) -> None:
        """From now on, callers have to know `token`; whoever is connected already stays."""
        self._token = checked_token(token)

    def close(self) -> None:
        """Cut everybody off; returns when all threads have ended."""
        with self._lock:
            self._closed = True
            sockets = list(self._sockets.items())
        for sock in (self._listener, *(sock for _, sock in sockets)):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for thread, _ in sockets:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                # Out of descriptors, or a connection that was gone already.
                time.sleep(0.05)
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="peer-serve", daemon=True)
            with self._lock:
                if not self._closed and len(self._sockets) < self._max_connections:
                    self._sockets[thread] = sock
                    thread.start()
                    continue
            with contextlib.suppress(OSError), sock:
                sock.setblocking(False)
                if self._tls is None:
                    sock.send(BUSY_GREETING)

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock.settimeout(min(_GREETING_S, self._idle_s))
                sock = self._tls.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._sockets[threading.current_thread()] = sock
            wire = Wire(sock, min(_GREETING_S, self._idle_s))
            if greet(wire, self._token):
                wire.limit(self._idle_s)
                self.serve(wire)
        except OSError as error:
            # It went away, fell silent, or does not speak TLS.
            logger.debug("peer connection ended cause=%s", error)
        finally:
            with self._lock:
                self._sockets.pop(threading.current_thread(), None)
            sock.close()
