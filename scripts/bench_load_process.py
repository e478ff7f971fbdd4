"""The process in which ``bench_load.py`` runs one contender, and what is seen of it from outside and inside."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_START_TIMEOUT_S = 180.0


class NotInstalled(Exception):
    """What the contender needs cannot be imported."""


class ContenderFailed(Exception):
    """The contender raised, died, or did not come to an end."""


class ContenderProcess:
    """An object in a process of its own, whose methods are called from here one at a time.

    `make(*arguments)` makes it there. Raises :class:`NotInstalled` where that ends in an :class:`ImportError`, else
    :class:`ContenderFailed`. `env` is added to the environment before anything is imported; what the process prints goes to
    `log`.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, env: dict[str, str], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, env, log, make, arguments), daemon=False)
        self._process.start()
        theirs.close()
        try:
            self._receive(_START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What ``object.method(*arguments)`` returns. Raises :class:`ContenderFailed`."""
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise ContenderFailed(f"its process has ended: {error}") from None
        return self._receive(timeout_s)

    def close(self) -> None:
        """End the process: politely first."""
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                self._process.kill()
                raise ContenderFailed(f"it gave no answer for {timeout_s:.0f} s")
            kind, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ContenderFailed(f"its process ended with exit code {self._process.exitcode}") from None
        if kind == "missing":
            raise NotInstalled(answer)
        if kind == "failed":
            raise ContenderFailed(answer)
        return answer


def _serve(pipe: Connection, env: dict[str, str], log: Path, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The body of the process: answers calls until the pipe closes."""
    os.environ.update(env)
    # Libraries print what they like; the terminal is the report's.
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    try:
        contender = make(*arguments)
    except ImportError as error:
        pipe.send(("missing", _one_line(error)))
        return
    except Exception as error:  # noqa: BLE001 - another's library may raise anything; the report names it
        traceback.print_exc(file=sys.stderr)
        pipe.send(("failed", _one_line(error)))
        return
    pipe.send(("done", None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer: tuple[str, Any] = ("done", getattr(contender, method)(*arguments))
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc(file=sys.stderr)
            answer = ("failed", _one_line(error))
        pipe.send(answer)
    close = getattr(contender, "close", None)
    if close is not None:
        close()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- from inside -------------------------------------------------------------------------------------------------------------


def memory_of_self(*names: str) -> list[int]:
    """Fields of ``/proc/self/status``, in bytes."""
    text = Path("/proc/self/status").read_text()
    fields = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return [fields[name] for name in names]


def reset_peak() -> None:
    """``VmHWM`` of this process counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds() -> float:
    """User and system time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def give_back_memory() -> None:
    """Collect garbage, and give the heap's free memory back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


# --- from outside ------------------------------------------------------------------------------------------------------------


def proportional_memory(pid: int) -> int:
    """PSS of a process, bytes: its own pages, and of each shared page its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (kilobytes,) = re.findall(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    return int(kilobytes) * 1024
