"""What a store does beside its event loop: work in threads of its own, and tasks that it waits for at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

#: Threads of one store. Most of them wait: for a network, or for another thread or process that fetches the same. The event
#: loop's own few would all wait one day, and those that they wait for would find no thread.
_MAX_THREADS = 256

T = TypeVar("T")


class Background:
    """Threads and tasks of one store; all methods belong to its event loop."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Future[None]] = set()
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="store")

    def in_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """What ``function(*arguments)`` returns, or raises, in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def later(self, work: Awaitable[None]) -> None:
        """Do something that the end of the store waits for: it is one of `tasks` until it is done."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def close(self) -> None:
        """Begin nothing more; returns at once."""
        self._threads.shutdown(wait=False)
