"""Keeps the host memory that the workers of a node share, in a small process of its own that outlives each of them.

The memory is one ``memfd``: it dies with the last process that holds it, whatever became of the others, so nothing is left
behind even if all of them are killed, and no limit of ``/dev/shm`` applies. The keeper hands it to its members, the workers,
over a Unix socket, and knows who uses which part of it (:mod:`sllmdask.loader.ledger`, which says what the messages are). It
reads and writes none of it. The socket hangs up when the last thread of a process is gone, so nobody writes to memory that came
free. A member that does not read is not read from: the keeper neither blocks nor grows.

This process imports nothing but the standard library and small modules of ours: no numpy, no asyncio.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import queue
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

from sllmdask.loader import libc
from sllmdask.loader.extents import GRANULE
from sllmdask.loader.ledger import MAX_MESSAGE, STEP, Job, Ledger, Malformed, Member, pack

logger = logging.getLogger(__name__)

#: Part of the socket's name: members and a keeper that would not understand each other do not meet.
_VERSION = 1
_MAX_MEMBERS = 512
#: Messages that may wait for a member that does not read.
_MAX_OUTBOX = 256


def address_of_pool(name: str, uid: int) -> str:
    """The abstract Unix socket of pool `name` of user `uid`: binding it is atomic, and no file is left behind."""
    return f"\0sllmdask-host-v{_VERSION}-{uid}-{name}"


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total_memory()


def _wants_advice() -> bool:
    """Whether this kernel gives shared memory huge pages where it is asked for them."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", encoding="ascii") as file:
            return "[advise]" in file.read()
    except OSError:
        return False


class _Pager(threading.Thread):
    """Does jobs one after the other, after everything else that this machine has to do; `fd` is readable when one is done."""

    def __init__(self, memory: int) -> None:
        super().__init__(name="pager", daemon=True)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.done: deque[tuple[Job, bool]] = deque()
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._memory = memory
        self._advise = _wants_advice()

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            job = self.jobs.get()
            self.done.append((job, self._do(job)))
            os.eventfd_write(self.fd, 1)

    def _do(self, job: Job) -> bool:
        try:
            if not job.fault:
                libc.punch_hole(self._memory, job.offset, job.nbytes)
                return True
            # The last sixteenth of the machine's memory is not for pages that nobody needs yet.
            if _available_memory() - job.nbytes < total_memory() // 16:
                return False
            if self._advise:
                self._fault_huge(job)
            libc.allocate(self._memory, job.offset, job.nbytes)
        except OSError as error:
            logger.warning("pages cause=%s", error)
            return False
        return True

    def _fault_huge(self, job: Job) -> None:
        """Huge pages are given for the asking to a mapping, not to a file."""
        address = libc.reserve_addresses(job.nbytes)
        try:
            libc.map_shared(self._memory, job.offset, job.nbytes, address)
            libc.advise_huge(address, job.nbytes)
            libc.populate(address, job.nbytes)
        finally:
            libc.unmap_memory(address, job.nbytes)


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    member: Member
    mask: int = select.EPOLLIN
    muted: bool = False
    unsent: bytes | None = None


class Keeper:
    """Serves one pool on a listening socket until nobody has been there for the grace time."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._memory = os.memfd_create("sllmdask-host-memory", os.MFD_CLOEXEC)
        limit = total_memory() // GRANULE * GRANULE
        # Twice the memory, so that free places are long; only what is used takes pages.
        self._file_nbytes = 2 * limit + STEP
        os.ftruncate(self._memory, self._file_nbytes)
        self._ledger = Ledger(self._file_nbytes, limit)
        self._pager = _Pager(self._memory)
        self._connections: dict[int, _Connection] = {}
        self._epoll = select.epoll()
        self._deaf = False

    def run(self) -> None:
        self._pager.start()
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._pager.fd, select.EPOLLIN)
        alone_since: float | None = time.monotonic()
        while True:
            now = time.monotonic()
            job = self._ledger.next_job(now)
            if job is not None:
                self._pager.jobs.put(job)
            self._flush_all()
            wake_at = self._ledger.wake_at(now)
            if alone_since is not None:
                if now >= alone_since + self._ledger.grace_s:
                    return
                wake_at = min(wake_at, alone_since + self._ledger.grace_s)
            # epoll counts milliseconds, and must not wake up just too early.
            timeout = -1.0 if wake_at == math.inf else max(0.0, wake_at - now) + 0.001
            for fd, events in self._epoll.poll(timeout):
                self._on_event(fd, events)
            if self._ledger.present:
                alone_since = None
            elif alone_since is None:
                alone_since = time.monotonic()

    def _on_event(self, fd: int, events: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd == self._pager.fd:
            os.eventfd_read(fd)
            while self._pager.done:
                job, done = self._pager.done.popleft()
                self._ledger.finished(job, done=done, now=time.monotonic())
        elif fd in self._connections:
            connection = self._connections[fd]
            gone = bool(events & (select.EPOLLHUP | select.EPOLLERR))
            if events & select.EPOLLIN:
                self._receive(connection, to_the_end=gone)
            # Not at the end of what a member sends, but when its side is closed: until then it may look at its leases.
            if gone:
                self._hang_up(connection)
            else:
                self._flush(connection)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptor left, most likely: one comes free when a member goes.
            logger.warning("accept cause=%s", error)
            self._epoll.unregister(self._listener)
            self._deaf = True
            return
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid() or len(self._connections) >= _MAX_MEMBERS:
            logger.warning("refused uid=%d", uid)
            peer.close()
            return
        peer.setblocking(False)
        self._connections[peer.fileno()] = _Connection(peer, Member())
        self._epoll.register(peer, select.EPOLLIN)

    def _receive(self, connection: _Connection, *, to_the_end: bool) -> None:
        while not connection.muted and (to_the_end or len(connection.member.outbox) < _MAX_OUTBOX):
            try:
                # What comes with a packet, descriptors for instance, is thrown away by the kernel.
                data = connection.socket.recv(MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It went without having read everything; what it had sent before still comes.
                continue
            if not data:
                connection.muted = True
                return
            try:
                self._take(connection, data)
            except Malformed as error:
                logger.warning("malformed member=%s cause=%s", connection.member.name, error)
                connection.muted = True
                self._ledger.mute(connection.member, time.monotonic())
                connection.member.outbox.append(pack({"op": "malformed", "reason": str(error)[:1000]}))

    def _take(self, connection: _Connection, data: bytes) -> None:
        if len(data) > MAX_MESSAGE:
            raise Malformed(f"more than {MAX_MESSAGE} bytes")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Malformed("no JSON") from error
        if not isinstance(message, dict):
            raise Malformed("no object")
        member = connection.member
        self._ledger.handle(member, message, time.monotonic())
        if message["op"] == "hello":
            welcome = pack({"op": "welcome", "nbytes": self._file_nbytes, "pid": os.getpid()})
            logger.info("joined member=%s capacity=%d", member.name, member.capacity)
            try:
                socket.send_fds(connection.socket, [welcome], [self._memory])
            except OSError as error:
                raise Malformed("not there any more") from error

    def _flush_all(self) -> None:
        for connection in [each for each in self._connections.values() if each.member in self._ledger.unsent]:
            self._flush(connection)
        self._ledger.unsent.clear()

    def _flush(self, connection: _Connection) -> None:
        member = connection.member
        blocked = False
        try:
            while True:
                if connection.unsent is None:
                    # What has changed before the answers: who hears that it was done also knows what is resident now.
                    connection.unsent = self._ledger.merged(member) or (member.outbox.popleft() if member.outbox else None)
                if connection.unsent is None:
                    break
                connection.socket.send(connection.unsent, socket.MSG_NOSIGNAL)
                connection.unsent = None
        except BlockingIOError:
            blocked = True
        except OSError:
            # It is not there any more. What it said last is read when the event of its hanging up comes.
            member.outbox.clear()
            connection.unsent = None
        reading = not connection.muted and len(member.outbox) < _MAX_OUTBOX
        mask = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if blocked else 0)
        if mask != connection.mask:
            connection.mask = mask
            self._epoll.modify(connection.socket, mask)

    def _hang_up(self, connection: _Connection) -> None:
        logger.info("left member=%s leases=%d", connection.member.name, len(connection.member.leases))
        del self._connections[connection.socket.fileno()]
        self._epoll.unregister(connection.socket)
        connection.socket.close()
        self._ledger.leave(connection.member, time.monotonic())
        if self._deaf:
            self._epoll.register(self._listener, select.EPOLLIN)
            self._deaf = False


def _listen(name: str) -> socket.socket | None:
    """The pool's listening socket; ``None``: another keeper has it and answers."""
    address = address_of_pool(name, os.getuid())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    listener.listen(_MAX_MEMBERS)
    return listener


def _go_away(log: str | None) -> None:
    """Leave the starter's terminal, session, directory and open files."""
    # The files are unbuffered descriptors of the starter: closing them tells it that the socket is there.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_MEMBERS
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))
    if log is not None:
        logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")


def main(arguments: list[str] | None = None) -> int:
    """``python -m sllmdask.loader.keeper NAME``: returns when a keeper of pool NAME listens, this one or an earlier one."""
    parser = argparse.ArgumentParser(description="Keeps the host memory that the workers of a node share.")
    parser.add_argument("name", help="of the pool; one per user")
    parser.add_argument("--log", help="a file to append to; else nothing is logged")
    options = parser.parse_args(arguments)
    try:
        log = os.path.abspath(options.log) if options.log else None
        listener = _listen(options.name)
        if listener is None:
            return 0
        keeper = Keeper(listener)
        if os.fork():
            # Not the listening socket's last holder.
            os._exit(0)
        os.setsid()
        _go_away(log)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
