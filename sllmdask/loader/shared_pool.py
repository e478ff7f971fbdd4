"""Host memory that the worker processes of a node share: one copy of a checkpoint serves all of them.

It is kept by a process of its own (:mod:`sllmdask.loader.keeper`), which the first worker starts. What is in it outlives the
worker that brought it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sllmdask.errors import Cancelled, ConfigError, HostPoolUnavailable, InsufficientMemory
from sllmdask.loader import libc
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.extents import Extent
from sllmdask.loader.hostpool import Leased, Progress, Segment, Subscribers, check_request
from sllmdask.loader.keeper import address_of_pool
from sllmdask.loader.ledger import MAX_MESSAGE, pack

logger = logging.getLogger(__name__)

#: Characters of a pool's name: the address of a socket is short.
_MAX_NAME = 64
#: How often a keeper is looked for that has just gone, and how long one may take to answer.
_ATTEMPTS, _ANSWER_S = 5, 20.0
#: Bytes whose pages are mapped in one go, which takes about 0.2 ms.
POPULATE_STEP = 4 * 1024**2


# --- the keeper, and a connection to it ------------------------------------------------------------------------------


class _Gone(Exception):
    """The keeper is not there any more."""


class _Mapped:
    """Mapped addresses; the end of this object unmaps them, which takes its time."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        weakref.finalize(self, libc.unmap_memory, address, nbytes).atexit = False


def _mapped(fd: int, extents: list[Extent]) -> _Mapped:
    """`extents` of a file side by side."""
    nbytes = sum(size for _, size in extents)
    address = libc.reserve_addresses(nbytes)
    mapped = _Mapped(address, nbytes)
    for offset, size in extents:
        libc.map_shared(fd, offset, size, address)
        address += size
    libc.advise_huge(mapped.address, nbytes)
    return mapped


def _start_keeper(name: str, log: str | None) -> None:
    """Return when a keeper listens, ours or another's."""
    # It needs nothing that is installed (-S) or in this directory (-P), only this package, wherever it was imported from.
    code = "import sys; sys.path.append(sys.argv.pop(1)); from sllmdask.loader.keeper import main; sys.exit(main())"
    root = str(Path(__file__).parents[2])
    started = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, root, name, *(["--log", log] if log else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        check=False,
        timeout=_ANSWER_S,
    )
    if started.returncode:
        lines = started.stderr.decode(errors="replace").strip().splitlines()
        raise HostPoolUnavailable(name, f"its keeper did not start ({lines[-1] if lines else started.returncode})")


def _connect(name: str) -> socket.socket | None:
    """A connection to the pool's keeper; ``None``: there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_ANSWER_S)
        connection.connect(address_of_pool(name, os.getuid()))
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except ConnectionRefusedError:
        connection.close()
        return None
    except OSError:
        connection.close()
        raise
    if uid != os.getuid():
        connection.close()
        raise HostPoolUnavailable(name, f"user {uid} has taken its name")
    return connection


def _join(name: str, hello: dict[str, Any], log: str | None) -> tuple[socket.socket, int, int, int]:
    """Blocking: (connection, descriptor of the memory, its bytes, the keeper's process) of pool `name`.

    The keeper is started if there is none.
    """
    for _ in range(_ATTEMPTS):
        connection = _connect(name)
        if connection is None:
            _start_keeper(name, log)
            continue
        try:
            connection.send(pack(hello))
            data, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
            if data and fds:
                connection.setblocking(False)
                welcome = json.loads(data)
                return connection, fds[0], welcome["nbytes"], welcome["pid"]
        except (BrokenPipeError, ConnectionResetError):
            # It was about to end.
            pass
        except BaseException:
            connection.close()
            raise
        connection.close()
    raise HostPoolUnavailable(name, "its keeper went away again and again")


class _Link:
    """One connection to a keeper, and the memory that came over it, which outlives the connection.

    Messages are whole packets, so any thread may send one, without a lock, even inside the end of an object.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        fd: int,
        nbytes: int,
        pid: int,
        changed: Callable[[], None],
    ) -> None:
        self.keys: dict[str, dict[str, Any]] = {}
        self.capacity = self.used = self.warm = 0
        self.pid = pid
        self._process = os.getpid()
        self.lost = False
        #: Segments whose pages this process has mapped.
        self.populated: set[int] = set()
        self.known: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._socket = connection
        self._fd = fd
        self._changed = changed
        self._leaving = False
        # In one piece, and kept: to adopt what was adopted before then costs neither a mapping nor page faults.
        self._window: _Mapped | None = _mapped(fd, [(0, nbytes)])
        self._leases: dict[int, None] = {}
        self._backlog: deque[bytes] = deque()
        self._unmapping: deque[_Mapped] = deque()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listeners: dict[int, Callable[[int], None]] = {}
        loop.add_reader(connection.fileno(), self._readable)

    # --- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, message: dict[str, Any], on_progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The keeper's answer. Raises :class:`_Gone`. Called off, it leaves nothing behind."""
        id_ = next(self._ids)
        answer = self._answers[id_] = self._loop.create_future()
        if on_progress is not None:
            self._listeners[id_] = on_progress
        try:
            if self.lost:
                raise _Gone
            self.post({**message, "id": id_})
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._unwanted(answer.result())
            else:
                self.post({"op": "cancel", "id": id_})
            raise
        finally:
            self._answers.pop(id_, None)
            self._listeners.pop(id_, None)

    def post(self, message: dict[str, Any]) -> None:
        """Send `message`, now or as soon as the keeper reads; on any thread. Without a keeper nothing needs to be said."""
        if os.getpid() != self._process:
            # A fork's copy of a segment has ended, not the segment.
            return
        data = pack(message)
        if not self._backlog:
            try:
                self._socket.send(data, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                pass
            except OSError:
                return
        self._backlog.append(data)
        # A closed loop has no one left to send it: the keeper sees this process end.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send_backlog)

    def _send_backlog(self) -> None:
        if self.lost:
            self._backlog.clear()
        try:
            while self._backlog:
                # Not taken out before it is sent: what is posted meanwhile must not overtake it.
                self._socket.send(self._backlog[0], socket.MSG_NOSIGNAL)
                self._backlog.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._send_backlog)
            return
        except OSError:
            self._backlog.clear()
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())

    # --- hearing -----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._lose()
                return
            self._hear(json.loads(data))

    def _hear(self, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "resident":
            for key, info in message["keys"].items():
                if key in self.keys:
                    self.populated.discard(self.keys[key]["segment"] if info is None else -1)
                    del self.keys[key]
                if info is not None:
                    self.keys[key] = info
            self.used, self.capacity, self.warm = message["used"], message["capacity"], message["warm"]
            if not message["more"] and not self.known.done():
                self.known.set_result(None)
            self._changed()
        elif op == "progress":
            listener = self._listeners.get(message["id"])
            if listener is not None:
                self._loop.call_soon(listener, message["done"])
        elif op == "malformed":
            logger.error("the keeper of host memory listens no more cause=%s", message["reason"])
            self._lose()
        else:
            answer = self._answers.get(message["id"])
            if answer is None or answer.done():
                self._unwanted(message)
            else:
                answer.set_result(message)

    def _unwanted(self, answer: dict[str, Any]) -> None:
        if answer["op"] == "granted":
            self.post({"op": "end", "lease": answer["lease"]})

    def _lose(self) -> None:
        """The keeper is gone, or deaf. Memory stays as long as it is looked at."""
        if not self._leaving:
            logger.warning("lost the keeper of this node's host memory; what is not in use is read again, by a new one")
        self.lost = True
        self._loop.remove_reader(self._socket.fileno())
        self._leave()
        self.keys.clear()
        self.capacity = self.used = self.warm = 0
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_Gone())
        if not self.known.done():
            self.known.set_result(None)
        self._unmap_window()
        self._changed()

    # --- memory ------------------------------------------------------------------------------------------------------

    def lease(self, lease: int, nbytes: int, extents: list[Extent]) -> Buffer:
        """The memory of a grant. Raises :class:`OSError` if it cannot be mapped; the lease has ended then."""
        if self._window is None:
            raise _Gone
        try:
            if len(extents) == 1:
                mapped, address = self._window, self._window.address + extents[0][0]
            else:
                mapped = _mapped(self._fd, extents)
                address = mapped.address
        except OSError:
            self.post({"op": "end", "lease": lease})
            raise
        leased = Leased(address, nbytes)
        self._leases[lease] = None
        # Not at exit: threads may still read weights while the interpreter ends.
        weakref.finalize(leased, self._ended, lease, mapped).atexit = False
        return np.asarray(leased)

    def _ended(self, lease: int, mapped: _Mapped) -> None:
        """On any thread, inside the end of an object: takes no lock, and leaves what takes long to others."""
        if os.getpid() != self._process:
            return
        self._leases.pop(lease, None)
        self.post({"op": "end", "lease": lease})
        if self._leaving and not self._leases:
            self._socket.close()
        if mapped is not self._window and not self._loop.is_closed():
            self._unmapping.append(mapped)
            self._loop.call_soon_threadsafe(self._unmap)

    def _unmap(self) -> None:
        if self._unmapping:
            # Left to a thread: 100 MB take 10 ms.
            mapped = deque([self._unmapping.popleft()])
            self._loop.run_in_executor(None, mapped.clear)

    def _unmap_window(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            self._unmapping.append(window)
            del window
            self._unmap()

    # --- ending ------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Hang up, or, while memory is looked at, with the last lease: until then a keeper must not give it to others."""
        self._loop.remove_writer(self._socket.fileno())
        os.close(self._fd)
        self._leaving = True
        if not self._leases:
            self._socket.close()

    async def close(self) -> None:
        """Leave. While memory is looked at the connection stays, silent, so that it is not given to others."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Cancelled("the pool of host memory is closed"))
        if not self.lost:
            self.post({"op": "leave"})
            self._loop.remove_reader(self._socket.fileno())
            self._leave()
        window, self._window = deque([self._window]), None
        await asyncio.to_thread(window.clear)


# --- the pool --------------------------------------------------------------------------------------------------------


class SharedPool:
    """Host memory that all processes of this user and node have in common that name the same pool.

    Each contributes `capacity` bytes. The pool, and what is in it, lasts until no process has been there for `grace_s` seconds.
    Free pages go back to the system after `trim_s` seconds. With `populate`, pages of what was adopted are mapped in the
    background. `log`: a file for the keeper to write to, if this process happens to start it. Raises :class:`ConfigError`.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        *,
        member: str = "",
        grace_s: float = 60.0,
        trim_s: float = 30.0,
        populate: bool = False,
        log: str | None = None,
    ) -> None:
        if not 0 < len(name.encode(errors="replace")) <= _MAX_NAME or "\0" in name:
            raise ConfigError(f"The name of a pool of host memory has 1 to {_MAX_NAME} bytes: {name!r}")
        self.name = name
        self._contribution = capacity
        self._hello = {"op": "hello", "name": member or str(os.getpid()), "grace_s": grace_s, "trim_s": trim_s}
        self._populate = populate
        self._populating: list[threading.Thread] = []
        self._stop = threading.Event()
        self._log = log
        self._prefault = 0
        self._link: _Link | None = None
        self._joining = asyncio.Lock()
        self._subscribers = Subscribers()
        self._closed = False

    @property
    def capacity(self) -> int:
        return self._link.capacity if self._link is not None and not self._link.lost else self._contribution

    @property
    def used(self) -> int:
        return self._link.used if self._link is not None else 0

    @property
    def prefaulted(self) -> int:
        """Free bytes with pages behind them."""
        return self._link.warm if self._link is not None else 0

    @property
    def keeper_pid(self) -> int | None:
        """The process that keeps the pool; ``None``: none is known."""
        return self._link.pid if self._link is not None and not self._link.lost else None

    def resident(self) -> dict[str, dict[str, Any]]:
        return {key: _told(info) for key, info in self._known().items() if info["resident"] == info["nbytes"]}

    def partly_resident(self) -> dict[str, dict[str, Any]]:
        """As :meth:`resident`, of segments that have lost their last bytes; ``resident_nbytes`` are left of each."""
        return {
            key: {**_told(info), "resident_nbytes": info["resident"]}
            for key, info in self._known().items()
            if info["resident"] < info["nbytes"]
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    async def start(self) -> None:
        """Join the pool, whose keeper is started if there is none. Raises :class:`HostPoolUnavailable`."""
        await self._linked()

    async def acquire(self, key: str, nbytes: int, meta: dict[str, Any], *, on_progress: Progress | None = None) -> Segment:
        check_request(key, nbytes, meta)
        listener = None if on_progress is None else (lambda done: on_progress(done, nbytes))
        for _ in range(_ATTEMPTS):
            link = await self._linked()
            try:
                answer = await link.ask({"op": "acquire", "key": key, "nbytes": nbytes, "meta": meta}, listener)
                if answer["op"] == "granted":
                    return self._segment(link, key, answer)
            except _Gone:
                continue
            raise InsufficientMemory(key, answer["needed"], answer["available"])
        raise HostPoolUnavailable(self.name, "its keeper went away again and again")

    async def evict(self, key: str) -> bool:
        link = await self._linked()
        try:
            return bool((await link.ask({"op": "evict", "key": key}))["done"])
        except _Gone:
            return False

    def prefault(self, nbytes: int) -> None:
        self._prefault = nbytes
        if self._link is not None and not self._link.lost:
            self._link.post({"op": "prefault", "nbytes": nbytes})

    async def close(self) -> None:
        self._closed = True
        self._stop.set()
        for thread in self._populating:
            await asyncio.to_thread(thread.join)
        async with self._joining:
            link, self._link = self._link, None
        if link is not None:
            await link.close()

    def _known(self) -> dict[str, dict[str, Any]]:
        return self._link.keys if self._link is not None else {}

    async def _linked(self) -> _Link:
        async with self._joining:
            if self._closed:
                raise Cancelled("the pool of host memory is closed")
            if self._link is None or self._link.lost:
                loop = asyncio.get_running_loop()
                hello = {**self._hello, "capacity": self._contribution}
                joining = loop.run_in_executor(None, _join, self.name, hello, self._log)
                try:
                    joined = await asyncio.shield(joining)
                except asyncio.CancelledError:
                    joining.add_done_callback(_never_mind)
                    raise
                except (OSError, subprocess.SubprocessError) as error:
                    raise HostPoolUnavailable(self.name, str(error)) from error
                try:
                    self._link = _Link(loop, *joined, partial(self._subscribers.changed, loop))
                except OSError as error:
                    joined[0].close()
                    os.close(joined[1])
                    raise HostPoolUnavailable(self.name, str(error)) from error
                if self._prefault:
                    self._link.post({"op": "prefault", "nbytes": self._prefault})
            await self._link.known
            return self._link

    def _segment(self, link: _Link, key: str, grant: dict[str, Any]) -> Segment:
        extents = [(offset, size) for offset, size in grant["extents"]]
        buffer = link.lease(grant["lease"], grant["nbytes"], extents)

        def tell(op: str, fields: dict[str, Any]) -> None:
            link.post({"op": op, "lease": grant["lease"], **fields})

        segment = Segment(
            key,
            buffer,
            owner=grant["resident"] < grant["nbytes"],
            resident_nbytes=grant["resident"],
            meta=grant["meta"],
            tell=tell,
        )
        if self._populate and segment.ready and len(extents) == 1 and grant["segment"] not in link.populated:
            link.populated.add(grant["segment"])
            held = deque([buffer])
            self._populating = [thread for thread in self._populating if thread.is_alive()]
            thread = threading.Thread(target=_populate, args=(held, self._stop), name="populate", daemon=True)
            self._populating.append(thread)
            thread.start()
        return segment


def _told(info: dict[str, Any]) -> dict[str, Any]:
    return {**info["meta"], "nbytes": info["nbytes"], "leases": info["leases"], "last_used": info["last_used"]}


def _never_mind(joining: asyncio.Future[tuple[socket.socket, int, int, int]]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        connection, fd, _, _ = joining.result()
        connection.close()
        os.close(fd)


def _populate(held: deque[Buffer], stop: threading.Event) -> None:
    """In a thread: map the pages of the buffer in `held`, which is empty afterwards: the executor forgets arguments late."""
    buffer = held.popleft()
    address, end = address_of(buffer), address_of(buffer) + len(buffer)
    # Behind everything else, the building of the model above all.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    while address < end and not stop.is_set():
        # In pieces: what else changes the mappings of this process waits for each.
        libc.populate(address, min(POPULATE_STEP, end - address), write=False)
        address += POPULATE_STEP
