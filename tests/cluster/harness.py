"""Real processes: ``dask scheduler``, ``dask worker`` and ``sllmdask serve``, as the documentation starts them by hand."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.cluster.forking import Forked, Forks

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody holds, from below those that the kernel gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def until(what: str, check: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Ask `check` until it answers something true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s} s")


@cache
def forks() -> Forks:
    """The process that the others are forks of; it ends with the tests."""
    started = Forks()
    atexit.register(started.close)
    return started


class Processes:
    """A cluster of separate processes; everything that was started is stopped by :meth:`close`.

    They are forks of a process that has imported what they need (:mod:`tests.cluster.forking`); `from_scratch`, or with another
    environment than the tests have, new interpreters, as users start them.
    """

    def __init__(self, directory: Path, *, from_scratch: bool = False) -> None:
        self.directory = directory
        self.from_scratch = from_scratch
        self.port = free_port()
        self.scheduler = f"tcp://127.0.0.1:{self.port}"
        self.running: dict[str, subprocess.Popen[bytes] | Forked] = {}
        # A scheduler finds nothing that another test has deployed at the same port.
        self.environment = {"XDG_STATE_HOME": str(directory / "state")}

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes] | Forked:
        # A LocalCluster of another test leaves the level of its logs in this process's environment.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("DASK_LOGGING__")}
        env = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.environment, **environment}
        line = [str(BIN / command[0]), *command[1:]]
        process: subprocess.Popen[bytes] | Forked
        with (self.directory / f"{name}.log").open("ab") as log:
            if not self.from_scratch and command[0] in ("dask", "sllmdask") and forks().can(env):
                process = forks().start(line, log.fileno(), self.directory, env)
            else:
                process = subprocess.Popen(line, stdout=log, stderr=log, cwd=self.directory, env=env, start_new_session=True)
        self.running[name] = process
        return process

    def start_scheduler(self, *options: str, **environment: str) -> None:
        preload = ("--preload", "sllmdask.cluster.scheduler_plugin")
        self.start(
            "scheduler",
            "dask",
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dashboard-address",
            "127.0.0.1:0",
            *preload,
            *options,
            # A machine that tests is busy with other things, too, when a worker starts again.
            **{"DASK_SLLMDASK__SCHEDULER__WORKER_WAIT": "60", **environment},
        )

    def start_worker(self, name: str, *options: str, slots: int = 1, **environment: str) -> None:
        self.start(
            f"worker-{name}",
            "dask",
            "worker",
            self.scheduler,
            "--name",
            name,
            "--nworkers",
            "1",
            "--nthreads",
            "1",
            "--memory-limit",
            "0",
            "--dashboard-address",
            "127.0.0.1:0",
            "--worker-class",
            "sllmdask.cluster.worker.SllmWorker",
            "--preload",
            "sllmdask.cluster.worker_plugin",
            "--slots",
            str(slots),
            "--host-memory",
            "1GiB",
            "--threads-per-instance",
            "1",
            # Host memory is shared by those that keep their files in one place: a place for each test.
            "--store-dir",
            str(self.directory / "store"),
            *options,
            **{"DASK_SLLMDASK__WORKER__MEMORY_GRACE": "5", **environment},
        )

    def start_door(self, name: str = "door", **environment: str) -> str:
        """A front door; returns its URL once it answers."""
        port = free_port()
        self.start(name, "sllmdask", "serve", "--scheduler", self.scheduler, "--port", str(port), **environment)
        url = f"http://127.0.0.1:{port}"
        until(f"{name} answers", lambda: self.answers(name, url))
        return url

    def answers(self, name: str, url: str) -> bool:
        assert self.running[name].poll() is None, self.log(name)
        try:
            return get(url, "/health")["status"] == "ok"
        except urllib.error.URLError:
            return False

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.running.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, number)
        process.wait(20)

    def signal_workers(self, number: int) -> None:
        """To each worker, and to its nanny."""
        for name, process in self.running.items():
            if name.startswith("worker"):
                os.killpg(process.pid, number)

    def close(self) -> None:
        for name in list(self.running):
            self.stop(name, signal.SIGKILL)


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=30) as response:
        return json.load(response)


def post(url: str, path: str, body: Any, timeout_s: float = 60.0) -> Any:
    """The answer's JSON; of an error answer too, with its status under ``"status"``."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return {"status": error.code, **json.load(error)}


class Stream:
    """A streamed completion, read line by line from the socket."""

    def __init__(self, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps({"stream": True, **body}).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"{url}/v1/completions", data, headers)
        self.response = urllib.request.urlopen(request, timeout=60)

    def lines(self) -> Iterator[str]:
        """Everything that was sent, comments included, without the empty lines between events."""
        for line in self.response:
            text = line.decode().rstrip("\n")
            if text:
                yield text

    def chunks(self) -> Iterator[dict[str, Any]]:
        for line in self.lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))

    def close(self) -> None:
        self.response.close()


def workers(url: str) -> list[dict[str, Any]]:
    return get(url, "/admin/cluster")["workers"]


def instances(url: str) -> list[dict[str, Any]]:
    return [instance for worker in workers(url) for instance in worker["instances"]]


@contextmanager
def two_workers(directory: Path, *, apart: bool = False) -> Iterator[str]:
    """The URL of a front door with two workers, ``0`` and ``1``: of one node, or, `apart`, each with files of its own."""
    cluster = Processes(directory)
    try:
        cluster.start_scheduler()
        for name in ("0", "1"):
            cluster.start_worker(name, *(["--store-dir", str(directory / f"store-{name}")] if apart else []))
        url = cluster.start_door()
        until("both workers joined", lambda: len(workers(url)) == 2)
        yield url
    finally:
        cluster.close()
