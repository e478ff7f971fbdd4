"""What a store gives to other workers of the cluster, and what it needs to take theirs: one token, that all of them know."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Collection, Sequence

from sllmdask.errors import CheckpointError
from sllmdask.loader.disk import PARTIAL
from sllmdask.loader.format import read_index
from sllmdask.loader.peer_origin import PeerOrigin
from sllmdask.loader.peer_server import DataServer, Served
from sllmdask.loader.records import Copy

logger = logging.getLogger(__name__)


class Sharing:
    """Gives checkpoints away, from memory while they are in use here, else from disk.

    ``find(key)``, called in any thread, says what there is of a key: its copy in memory, and its directory on disk.
    """

    def __init__(self, find: Callable[[str], tuple[Copy | None, str | None]]) -> None:
        self._find = find
        self._server: DataServer | None = None
        self._token = ""
        self._connect_tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._from_disk: dict[str, Served] = {}

    @property
    def address(self) -> str | None:
        """``host:port`` at which other workers may have what is here; ``None`` while nothing is given away."""
        return None if self._server is None else self._server.address

    def knows(self, token: str) -> bool:
        """Whether what is here is given to those who know `token`."""
        return self._server is not None and token == self._token

    def begin(
        self, host: str, token: str, listen_tls: ssl.SSLContext | None, connect_tls: ssl.SSLContext | None
    ) -> DataServer | None:
        """Give to those who know `token`, and ask with it. Returns the server in whose place it is: to be closed, in a thread."""
        old = self._server
        self._token, self._connect_tls = token, connect_tls
        self._server = DataServer(host, 0, token, self.lookup, tls=listen_tls)
        return old

    def end(self) -> DataServer | None:
        """Give nothing any more. Returns the server: to be closed, in a thread."""
        server, self._server = self._server, None
        return server

    def origin(self, peers: Sequence[str], key: str) -> PeerOrigin | None:
        """Where the checkpoint `key` of `peers` (``host:port``) is fetched from; ``None``: we do not know their token."""
        if not peers or self._server is None:
            return None
        return PeerOrigin(peers, self._token, key, server=self._server, tls=self._connect_tls)

    def lookup(self, key: str) -> Served | None:
        """In a thread of the server: what is here of `key`."""
        with self._lock:
            copy, path = self._find(key)
            found = None if copy is None else self._from_memory(copy)
            return found if found is not None else self._on_disk(key, path)

    def forget(self, keys: Collection[str]) -> None:
        """The files of `keys` are removed: open ones would keep their room on the disk."""
        with self._lock:
            for key in keys:
                self._on_disk(key, None)

    def close(self) -> None:
        """Close the files; the server has ended."""
        while self._from_disk:
            self._from_disk.popitem()[1].close()

    def _from_memory(self, copy: Copy) -> Served | None:
        buffer, index = copy.buffer, copy.index
        if copy.served is not None or buffer is None:
            return copy.served
        complete = not index.directory.endswith(PARTIAL)
        try:
            served = copy.served = Served(index, plan=copy.plan, buffer=buffer, arrivals=copy.arrivals, on_disk=complete)
        except OSError as error:
            if copy.index is not index:
                # The directory has its final name only now.
                return self._from_memory(copy)
            logger.info("cannot be given away path=%s cause=%s", index.directory, str(error))
            return None
        if copy.buffer is None:
            # It was given up meanwhile, by the event loop, which has not seen this.
            copy.served = None
            served.close()
            return None
        return served

    def _on_disk(self, key: str, path: str | None) -> Served | None:
        old = self._from_disk.pop(key, None)
        served = None
        try:
            index = None if path is None else read_index(path)
            if index is not None:
                served = old if old is not None and old.fingerprint == index.fingerprint else Served(index)
                self._from_disk[key] = served
        except (CheckpointError, OSError) as error:
            logger.info("cannot be given away any more key=%s cause=%s", key, str(error))
        if old is not None and old is not served:
            old.close()
        return served
