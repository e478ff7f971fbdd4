"""Host memory for checkpoints: of this process alone, or shared by all worker processes of the node.

Both pools have one interface. A key is brought by one owner at a time, who fills a :class:`Segment` and publishes it; all others
adopt what is there, or wait for it, and take over where the owner fails. What is ready stays until its room is needed.

The shared pool is kept by a process of its own (:mod:`sllmdask.loader.keeper`), which the first worker starts. What is in it
outlives the worker that brought it.
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
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sllmdask.errors import Cancelled, ConfigError, HostPoolUnavailable, InsufficientMemory
from sllmdask.loader import libc
from sllmdask.loader.buffers import Buffer, BufferPool, address_of, lease_nbytes
from sllmdask.loader.keeper import MAX_KEY, MAX_MESSAGE, MAX_META, Extent, address_of_pool, pack, reload_seconds
from sllmdask.policy.eviction import HostCopy, departures

logger = logging.getLogger(__name__)

#: (bytes so far, bytes in all).
Progress = Callable[[int, int], None]

#: Characters of a pool's name: the address of a socket is short.
_MAX_NAME = 64
#: How often a keeper is looked for that has just gone, and how long one may take to answer.
_ATTEMPTS, _ANSWER_S = 5, 20.0
#: Bytes whose pages are mapped in one go, which takes about 0.2 ms.
POPULATE_STEP = 4 * 1024**2
#: Progress is told to other processes so often.
_PROGRESS_S = 0.05


class Segment:
    """A lease on `nbytes` of host memory that holds, or will hold, one checkpoint.

    `buffer` is uint8 of shape ``(nbytes,)``. It may be read; only the owner may write to it, until it publishes, from byte
    `resident_nbytes` on: what is before is what it shall be already. It keeps the lease alive, and so does every slice of it
    and every tensor over it: the memory is handed out again only when the last is gone, whatever was released before.

    All methods may be called on any thread, and again.
    """

    def __init__(
        self,
        key: str,
        buffer: Buffer,
        *,
        owner: bool,
        resident_nbytes: int,
        meta: dict[str, Any],
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.key = key
        self.nbytes = len(buffer)
        self.resident_nbytes = resident_nbytes
        #: This process fills it.
        self.owner = owner
        #: Every byte is there.
        self.ready = not owner
        #: What is said about it to all who ask, as plain JSON types. The owner may change it until it publishes.
        self.meta = meta
        self._buffer: Buffer | None = buffer
        self._tell: Callable[[str, dict[str, Any]], None] | None = tell
        self._told_at = 0.0
        # A release may run inside the end of some object, and so inside another method of this one.
        self._lock = threading.RLock()

    @property
    def buffer(self) -> Buffer:
        assert self._buffer is not None, "released"
        return self._buffer

    def progress(self, done: int) -> None:
        """`done` bytes are there: told to those who wait, now and then."""
        now = time.monotonic()
        with self._lock:
            if self._tell is None or self.ready or now < self._told_at + _PROGRESS_S:
                return
            self._told_at = now
            self._tell("progress", {"done": done})

    def publish(self) -> None:
        """Every byte is there: whoever asks may have it."""
        with self._lock:
            if self._tell is not None and not self.ready:
                assert len(pack(self.meta)) <= MAX_META, "metadata too long"
                self.ready, self.resident_nbytes = True, self.nbytes
                self._tell("publish", {"meta": self.meta})

    def discard(self) -> None:
        """It will not be filled. Who waits for it takes over."""
        with self._lock:
            if not self.ready:
                self._leave("discard")

    def release(self) -> None:
        """Unpin it, or discard it if it was not published. What was ready stays until its room is needed."""
        with self._lock:
            self._leave("release" if self.ready else "discard")

    def _leave(self, op: str) -> None:
        # The buffer first: if nothing else refers to it, that is the end of the lease, and memory that nobody looks at can be
        # given to the next as it is.
        tell, self._tell, self._buffer = self._tell, None, None
        if tell is not None:
            tell(op, {})


class HostPool(Protocol):
    """Where checkpoints are in host memory. All methods belong to one event loop."""

    async def start(self) -> None:
        """Get ready: what is resident is known afterwards. Done by the first :meth:`acquire` at the latest."""

    @property
    def capacity(self) -> int:
        """Bytes that may be in use."""

    @property
    def used(self) -> int:
        """Bytes in use: resident, being filled, or still looked at."""

    async def acquire(self, key: str, nbytes: int, meta: dict[str, Any], *, on_progress: Progress | None = None) -> Segment:
        """A lease of `key`: adopted if it is ready, else ours to fill; if another fills it, waits for that.

        `meta` (plain JSON types) says what is known of it; ``reload_s``, the seconds that reading it takes, decides with the
        number of uses what is evicted. A ready copy of another size is given up. Raises :class:`InsufficientMemory`.
        """

    def resident(self) -> dict[str, dict[str, Any]]:
        """Of each ready segment its `meta` and ``nbytes``, ``leases`` (that pin it) and ``last_used`` (seconds since 1970)."""

    async def evict(self, key: str) -> bool:
        """Give `key` up; false if it is not resident or a lease pins it. Its memory is free when nobody looks at it."""

    def prefault(self, nbytes: int) -> None:
        """From now on keep so many free bytes with pages behind them, so that a load does not wait for pages."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` soon after :meth:`resident`, `used` or `capacity` changed; returns what ends that."""

    async def close(self) -> None:
        """End. Segments that live stay valid; an :meth:`acquire` that waits raises :class:`Cancelled`."""


class _Leased:
    """What every view of a segment holds on to: the end of this object is the end of the lease."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class _Subscribers:
    """Callbacks, called once for changes made together."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []
        self._announced = False

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return partial(self._callbacks.remove, callback)

    def changed(self, loop: asyncio.AbstractEventLoop) -> None:
        # Memory may come back when the loop, and who listened on it, is gone.
        if self._callbacks and not self._announced and not loop.is_closed():
            self._announced = True
            loop.call_soon(self._announce, loop)

    def _announce(self, loop: asyncio.AbstractEventLoop) -> None:
        self._announced = False
        # Each by itself: one that raises must not keep the others from hearing.
        for callback in self._callbacks:
            loop.call_soon(callback)


def _checked(key: str, nbytes: int, meta: dict[str, Any]) -> None:
    assert 0 < len(key) <= MAX_KEY
    assert nbytes > 0
    assert len(pack(meta)) <= MAX_META, "metadata too long"


# --- shared by the node ----------------------------------------------------------------------------------------------


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
        leased = _Leased(address, nbytes)
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
        self._subscribers = _Subscribers()
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
        _checked(key, nbytes, meta)
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


# --- of this process -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Waiter:
    grant: asyncio.Future[Segment]
    nbytes: int
    meta: dict[str, Any]
    on_progress: Progress | None


@dataclass(eq=False)
class _Entry:
    key: str
    nbytes: int
    meta: dict[str, Any]
    #: Kept from the moment of publishing; before, the owner alone keeps it.
    buffer: Buffer | None = None
    owner: int | None = None
    #: Whether it pins, by number of the lease.
    leases: dict[int, bool] = field(default_factory=dict)
    waiters: list[_Waiter] = field(default_factory=list)
    done: int = 0
    uses: int = 0
    floor: float = 0.0
    used_at: float = 0.0
    last_used: int = 0


class PrivatePool:
    """Host memory of this process: `capacity` bytes, gone with it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pool = BufferPool(capacity, on_return=self._memory_came_back)
        self._entries: dict[str, _Entry] = {}
        self._leased: dict[int, _Entry] = {}
        # What segments say on other threads, in order: the end of an object may take no lock.
        self._said: deque[tuple[int, str, dict[str, Any]]] = deque()
        self._ids = itertools.count(1)
        self._clock = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscribers = _Subscribers()
        self._cancel = threading.Event()

    @property
    def used(self) -> int:
        self._settle()
        return self._pool.used

    @property
    def prefaulted(self) -> int:
        """Free bytes that are kept; with pages behind them as far as they were touched."""
        return self._pool.kept

    def resident(self) -> dict[str, dict[str, Any]]:
        self._settle()
        return {
            key: {
                **entry.meta,
                "nbytes": entry.nbytes,
                "leases": sum(entry.leases.values()),
                "last_used": entry.used_at,
            }
            for key, entry in self._entries.items()
            if entry.buffer is not None
        }

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    async def start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._touch()

    async def acquire(self, key: str, nbytes: int, meta: dict[str, Any], *, on_progress: Progress | None = None) -> Segment:
        _checked(key, nbytes, meta)
        await self.start()
        if self._cancel.is_set():
            raise Cancelled("the pool of host memory is closed")
        self._settle()
        waiter = _Waiter(asyncio.get_running_loop().create_future(), nbytes, meta, on_progress)
        self._serve(key, waiter)
        try:
            return await waiter.grant
        except asyncio.CancelledError:
            if waiter.grant.done() and not waiter.grant.cancelled() and waiter.grant.exception() is None:
                # It was granted in the moment in which its caller left; never filled, it goes to the next.
                waiter.grant.result().release()
            entry = self._entries.get(key)
            if entry is not None and waiter in entry.waiters:
                entry.waiters.remove(waiter)
            raise

    async def evict(self, key: str) -> bool:
        self._settle()
        entry = self._entries.get(key)
        if entry is None or entry.buffer is None or any(entry.leases.values()):
            return False
        self._drop(entry)
        self._changed()
        return True

    def prefault(self, nbytes: int) -> None:
        self._pool.keep = nbytes
        self._touch()

    async def close(self) -> None:
        self._settle()
        self._cancel.set()
        for entry in list(self._entries.values()):
            for waiter in entry.waiters:
                if not waiter.grant.done():
                    waiter.grant.set_exception(Cancelled("the pool of host memory is closed"))
            self._drop(entry)
        self._pool.keep = 0
        await asyncio.to_thread(self._pool.trim)

    # --- granting ----------------------------------------------------------------------------------------------------

    def _serve(self, key: str, waiter: _Waiter) -> None:
        if waiter.grant.done():
            return
        entry = self._entries.get(key)
        if entry is not None and entry.owner is not None:
            entry.waiters.append(waiter)
            self._hear(entry, waiter)
            return
        if entry is not None and entry.nbytes != waiter.nbytes:
            self._drop(entry)
            entry = None
        try:
            buffer = self._room(key, waiter.nbytes) if entry is None else entry.buffer
        except (InsufficientMemory, OSError) as error:
            waiter.grant.set_exception(error)
            return
        assert buffer is not None
        if entry is None:
            entry = self._entries[key] = _Entry(key, waiter.nbytes, waiter.meta)
        waiter.grant.set_result(self._lease(entry, buffer))
        self._changed()

    def _room(self, key: str, nbytes: int) -> Buffer:
        size = lease_nbytes(nbytes)
        idle = {key: entry for key, entry in self._entries.items() if entry.buffer is not None and not entry.leases}
        leaving = departures([_copy_of(entry) for entry in idle.values()], size - self._pool.available)
        for departure in leaving or ():
            self._clock = max(self._clock, departure.worth)
            self._drop(idle[departure.key])
        if leaving is None or self._pool.available < size:
            available = self._pool.available + sum(lease_nbytes(each.nbytes) for each in idle.values() if each.buffer is not None)
            raise InsufficientMemory(key, size, available)
        return self._pool.lease(nbytes)

    def _lease(self, entry: _Entry, buffer: Buffer) -> Segment:
        number = next(self._ids)
        leased = _Leased(address_of(buffer), entry.nbytes)
        # Emptied on the event loop when the lease has ended: memory comes back before the next waiter needs it.
        held = [buffer]
        weakref.finalize(leased, self._say, number, "end", {"held": held}).atexit = False
        if entry.buffer is None:
            entry.owner, entry.done = number, 0
        entry.leases[number] = True
        self._leased[number] = entry
        entry.uses += 1
        entry.last_used, entry.used_at, entry.floor = number, time.time(), self._clock
        owner = entry.buffer is None

        def tell(op: str, fields: dict[str, Any]) -> None:
            self._say(number, op, {**fields, "held": held})

        return Segment(
            entry.key,
            np.asarray(leased),
            owner=owner,
            resident_nbytes=0 if owner else entry.nbytes,
            meta=dict(entry.meta),
            tell=tell,
        )

    # --- hearing from segments ---------------------------------------------------------------------------------------

    def _say(self, number: int, op: str, fields: dict[str, Any]) -> None:
        """On any thread, perhaps inside the end of an object."""
        self._said.append((number, op, fields))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        while self._said:
            self._heed(*self._said.popleft())

    def _heed(self, number: int, op: str, fields: dict[str, Any]) -> None:
        entry = self._leased.get(number)
        if entry is None:
            return
        filling = entry.owner == number
        if op == "end":
            del entry.leases[number], self._leased[number]
            fields["held"].clear()
        if op == "progress":
            if filling:
                entry.done = min(fields["done"], entry.nbytes)
                for waiter in entry.waiters:
                    self._hear(entry, waiter)
            return
        if op == "publish" and filling:
            entry.owner, entry.buffer, entry.meta = None, fields["held"][0], fields["meta"]
            self._again(entry)
            self._touch()
        elif op == "release" and not filling:
            entry.leases[number] = False
        elif op in ("release", "discard", "end") and filling:
            self._drop(entry)
        self._changed()

    def _hear(self, entry: _Entry, waiter: _Waiter) -> None:
        if waiter.on_progress is not None:
            asyncio.get_running_loop().call_soon(waiter.on_progress, entry.done, entry.nbytes)

    def _drop(self, entry: _Entry) -> None:
        """Nobody gets `entry` any more; its memory is free when nobody looks at it."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.owner = entry.buffer = None
        self._again(entry)

    def _again(self, entry: _Entry) -> None:
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            self._serve(entry.key, waiter)

    # --- pages -------------------------------------------------------------------------------------------------------

    def _memory_came_back(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_back)

    def _give_back(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._pool.trim)
        self._changed()

    def _touch(self) -> None:
        """Make pages in the background, unless a load is under way: it has more need of the processors."""
        filling = any(entry.owner is not None for entry in self._entries.values())
        if self._pool.keep and not filling and not self._cancel.is_set() and self._loop is not None:
            touching = self._loop.run_in_executor(None, self._pool.prefault, self._pool.keep, self._cancel)
            touching.add_done_callback(lambda _: self._changed())

    def _changed(self) -> None:
        if self._loop is not None:
            self._subscribers.changed(self._loop)


def _copy_of(entry: _Entry) -> HostCopy:
    return HostCopy(
        key=entry.key,
        nbytes=lease_nbytes(entry.nbytes),
        total_nbytes=entry.nbytes,
        reload_s=reload_seconds(entry.meta, entry.nbytes),
        uses=entry.uses,
        floor=entry.floor,
        last_used=entry.last_used,
    )
