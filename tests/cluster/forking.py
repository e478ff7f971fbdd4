"""Real processes that need not import everything first: each is a fork of one that has.

A worker spends three seconds of CPU on importing torch, transformers and Dask, and tests start many. A :class:`Forks` is a
process that has imported them, and has no thread. It forks, and the child becomes what a console script would be: a session of
its own, its directory, environment, arguments and log, Dask's configuration read from that environment, and the script's own
``main()``. From there on nothing is different: sockets, signals, exit status, and what Python does at its end.

A nanny starts its worker by ``multiprocessing``, as a new interpreter. One that is started here has a child beside it that forks
those, with the same pipes and the same arguments (:func:`_serve_spawns`); they are the nanny's children, as ever. A nanny in the
process of the tests asks the :class:`Forks` (:meth:`~Forks.spawning`).
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from multiprocessing import util
from pathlib import Path
from typing import Any

#: What programs of a cluster import; that any of it is missing here costs time, nothing else.
MODULES = (
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_worker",
    "distributed.dashboard.scheduler",
    "distributed.dashboard.worker",
    "sllmdask.actors.instances",
    "sllmdask.cli",
    "sllmdask.cluster.scheduler_plugin",
    "sllmdask.cluster.worker",
    "sllmdask.cluster.worker_plugin",
    "sllmdask.loader.shared_pool",
    "sllmdask.server.service",
)
#: Variables that are read when a process runs; all others are read, or may be, by what is imported.
READ_LATE = ("DASK_", "XDG_STATE_HOME", "SLLMDASK_", "LLM_SERVER_URL", "PYTEST_CURRENT_TEST")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
_MAX_MESSAGE, _MAX_FDS = 128 * 1024, 16


class Forked:
    """A process of :class:`Forks`, to be handled as a :class:`subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks = forks
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self._forks.ended.get(self.pid)

    def poll(self) -> int | None:
        self._forks.hear(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self._forks.hear(left)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that has imported everything, from the side of the tests."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # As the programs of the tests have them; those that run torch have one thread each.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.forking", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._lock = threading.Lock()
        self._started: list[int] = []
        self.ended: dict[int, int] = {}

    def can(self, environment: Mapping[str, str]) -> bool:
        """Whether a process of this environment is the same when what it imports was imported in that of the tests."""
        names = environment.keys() | self._environment.keys()
        differing = (name for name in names if environment.get(name) != self._environment.get(name))
        return all(name.startswith(READ_LATE) or name == "OMP_WAIT_POLICY" for name in differing)

    def start(self, command: Sequence[str], log: int, cwd: Path, environment: Mapping[str, str]) -> Forked:
        """Run a console script of this Python's environment with its arguments; `log`: the file for what it prints."""
        request = {"command": list(command), "cwd": str(cwd), "environment": dict(environment)}
        return Forked(self, self._fork(request, [log]))

    @contextmanager
    def spawning(self) -> Iterator[None]:
        """While this lasts, ``multiprocessing`` gets forks where this process asks it for interpreters."""
        spawn = util.spawnv_passfds
        _look_after_orphans(True)
        util.spawnv_passfds = _by(self._fork, spawn)
        try:
            yield
        finally:
            util.spawnv_passfds = spawn
            _look_after_orphans(False)

    def _fork(self, request: Mapping[str, Any], fds: Sequence[int]) -> int:
        with self._lock:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
            while not self._started:
                self._hear(None)
            return self._started.pop()

    def hear(self, timeout_s: float | None) -> None:
        """Wait for news of the processes; ``None``: for as long as it takes."""
        with self._lock:
            self._hear(timeout_s)

    def _hear(self, timeout_s: float | None) -> None:
        while select.select([self._control], [], [], timeout_s)[0]:
            data = self._control.recv(_MAX_MESSAGE)
            if not data:
                raise RuntimeError("the process that forks the others has died")
            message = json.loads(data)
            if "started" in message:
                self._started.append(message["started"])
            else:
                self.ended[message["ended"]] = message["status"]
            timeout_s = 0

    def close(self) -> None:
        self._control.close()
        self._process.wait(20)


# --- in the process that forks -------------------------------------------------------------------------------------------


def main() -> None:
    """Import everything, fork on request, and, in a child, be what was asked for."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    for name in MODULES:
        importlib.import_module(name)
    from sllmdask.engine.warm import warm_up

    warm_up("cpu")
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no thread but the one that forked"
    run = _serve(control)
    if run is not None:
        run()


def _serve(control: socket.socket) -> Callable[[], object] | None:
    """Fork until the tests have gone. In a child: what to run."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        select.select([control, woken], [], [])
        with suppress(BlockingIOError):
            os.read(woken, 4096)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = os.waitstatus_to_exitcode(ended[1])
                control.send(json.dumps({"ended": ended[0], "status": status}).encode())
        if not select.select([control], [], [], 0)[0]:
            continue
        data, fds, _, _ = socket.recv_fds(control, _MAX_MESSAGE, _MAX_FDS)
        if not data:
            return None
        request = json.loads(data)
        pid = _fork_session() if "command" in request else _fork_for_parent()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            os.close(woken)
            os.close(wake)
            return _become(request, *fds) if "command" in request else _spawned(request, fds)
        for fd in fds:
            os.close(fd)
        control.send(json.dumps({"started": pid}).encode())


def _become(request: Mapping[str, Any], log: int) -> Callable[[], object]:
    """Make this process what a shell would have started; returns its ``main()``."""
    os.chdir(request["cwd"])
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    path, *arguments = request["command"]
    _enter(request["environment"], path, [path, *arguments])
    if arguments[:1] == ["worker"] and "--no-nanny" not in arguments:
        spawned = _spawn_by_forks()
        if spawned is not None:
            return spawned
    (script,) = entry_points(group="console_scripts", name=Path(path).name)
    script_main: Callable[[], object] = script.load()
    return lambda: sys.exit(script_main())


def _enter(environment: Mapping[str, str], path: str | None, argv: list[str]) -> None:
    """Environment, arguments and main module of a new interpreter, and what Dask reads when it is imported."""
    import dask.config
    from distributed.config import initialize_logging

    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = argv
    sys.modules["__main__"] = types.ModuleType("__main__")
    if path is not None:
        sys.modules["__main__"].__file__ = path
    dask.config.refresh()
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
    initialize_logging(dask.config.config)


def _spawn_by_forks() -> Callable[[], object] | None:
    """From here on ``multiprocessing`` gets forks where it asks for interpreters. In such a fork: what to run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _look_after_orphans(True)
    if os.fork() == 0:
        ours.close()
        return _serve_spawns(theirs)
    theirs.close()
    lock = threading.Lock()

    def fork(request: Mapping[str, Any], fds: Sequence[int]) -> int:
        with lock:
            socket.send_fds(ours, [json.dumps(request).encode()], fds)
            return int(ours.recv(_MAX_MESSAGE))

    util.spawnv_passfds = _by(fork, util.spawnv_passfds)
    return None


def _by(fork: Callable[[Mapping[str, Any], Sequence[int]], int], spawn: Callable[..., int]) -> Callable[..., int]:
    """``multiprocessing``'s way to start an interpreter, replaced by a `fork`; by `spawn` where there is nobody to fork."""

    def start(path: bytes, args: Sequence[Any], fds: Sequence[int]) -> int:
        if any("spawn_main" in str(arg) for arg in args):
            request = {"args": [str(arg) for arg in args], "fds": list(fds), "environment": dict(os.environ)}
            with suppress(OSError, ValueError):  # who forks was killed, as a test may
                return fork(request, list(fds))
        return spawn(path, args, fds)

    return start


def _look_after_orphans(on: bool) -> None:
    """Whether this process is the next parent of its descendants whose parent has ended."""
    ctypes.CDLL(None).prctl(_SUBREAPER, int(on), 0, 0, 0)


def _fork_session() -> int:
    """Fork a child that leads a session by the time it is told of: it may be signalled as a group at once."""
    waiting, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(waiting)
    os.close(begun)
    if pid:
        os.read(waiting, 1)  # until the child has closed its end
        os.close(waiting)
    return pid


def _fork_for_parent() -> int:
    """Fork a child of the process above this one, which looks after orphans. As ``os.fork``: 0 in the child, or its id."""
    told, tell = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(tell, str(child).encode())
            os._exit(0)
        os.close(told)
        os.close(tell)
        return 0
    os.close(tell)
    os.waitpid(between, 0)
    child = int(os.read(told, 32))
    os.close(told)
    return child


def _serve_spawns(control: socket.socket) -> Callable[[], object]:
    """Fork until the nanny has gone. Returns in a fork only, with what to run."""
    # Signals are for the nanny; where its group gets them, this process would otherwise leave before it, and with a word.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    while True:
        data, fds, _, _ = socket.recv_fds(control, _MAX_MESSAGE, _MAX_FDS)
        if not data:
            os._exit(0)
        pid = _fork_for_parent()
        if pid == 0:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            control.close()
            return _spawned(json.loads(data), fds)
        for fd in fds:
            os.close(fd)
        control.send(str(pid).encode())


def _spawned(request: Mapping[str, Any], fds: Sequence[int]) -> Callable[[], object]:
    """What the interpreter that ``multiprocessing`` asked for was to run, with its files."""
    _put(fds, request["fds"])
    args = request["args"]
    code = args[args.index("-c") + 1]
    _enter(request["environment"], None, ["-c", *args[args.index("-c") + 2 :]])
    return lambda: exec(code, {"__name__": "__main__"})


def _put(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Give these files the numbers that the arguments call them by."""
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 512) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(aside, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    main()
