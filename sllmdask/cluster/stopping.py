"""What SIGTERM does to a worker: its requests move to other nodes first, then it ends, with exit code 0.

Slurm, Kubernetes and service managers send it some time before they kill. Some send it to every process, some only to the first
one, which is Dask's nanny where there is one; both ways lead to the one :meth:`Stopping.begin` of the worker's process. A second
signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from distributed import Nanny, Worker
from distributed.core import Status
from distributed.diagnostics.plugin import NannyPlugin

from sllmdask.actors.model_actor import EXTENSION
from sllmdask.cluster.draining import STOPPING

logger = logging.getLogger(__name__)

#: Seconds in which a worker that has nothing to do any more must have ended.
END_S = 10.0
#: Seconds between two attempts to be drained.
AGAIN_S = 1.0


class Stopping:
    """The end of one worker within `grace_s` seconds, of which its requests have as many as they need. On its event loop."""

    def __init__(self, worker: Worker, grace_s: float) -> None:
        self._worker, self._grace_s = worker, grace_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        """Take SIGTERM from now on, here and by the nanny. Dask's handler, or the default, gets the next one."""
        before = signal.getsignal(signal.SIGTERM)
        in_a_program = self._worker.nanny is None and before in (signal.SIG_DFL, signal.SIG_IGN)
        if in_a_program or threading.current_thread() is not threading.main_thread():
            return  # what its signals do is for the program to decide that this worker is a part of

        def stop(number: int, _: FrameType | None) -> None:
            signal.signal(number, before)
            self._loop.call_soon_threadsafe(self.begin)

        signal.signal(signal.SIGTERM, stop)
        self._worker.handlers["sllm_stop"] = self.stop
        if self._worker.nanny:
            self._start(self._tell_nanny())

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tell_nanny(self) -> None:
        """It answers once this worker has started."""
        assert self._worker.nanny
        forward = pickle.dumps(ForwardSignal(self._grace_s + END_S))
        try:
            async with self._worker.rpc(self._worker.nanny) as nanny:
                await nanny.plugin_add(plugin=forward, name=ForwardSignal.name)
        except OSError as error:
            logger.warning("the nanny will not wait for requests that move when it is stopped: %s", error)

    # --- the end ---

    async def stop(self) -> dict[str, Any]:
        """The nanny has got the signal."""
        self.begin()
        return {"grace_s": self._grace_s}

    def begin(self) -> None:
        """Begin to end, unless that has begun."""
        if self._task is None:
            self._task = self._start(self._stop())

    async def _stop(self) -> None:
        worker = self._worker
        logger.info("stopping worker=%s grace_s=%.1f cause=SIGTERM", worker.address, self._grace_s)
        end_at = time.monotonic() + self._grace_s
        try:
            if worker.nanny:  # it is not to start another one in its place
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(END_S), worker.rpc(worker.nanny) as nanny:
                        await nanny.close_gracefully(reason="SIGTERM")
            async with asyncio.timeout(end_at - time.monotonic()):
                await self._empty()
        except TimeoutError:
            logger.warning("worker=%s ends before all requests have left: they are continued elsewhere", worker.address)
        finally:
            await self._end()

    async def _end(self) -> None:
        """By its nanny, which waits for it in good order, or else by itself."""
        if self._worker.nanny:
            with suppress(OSError, TimeoutError):  # the connection ends with this worker
                async with asyncio.timeout(END_S), self._worker.rpc(self._worker.nanny) as nanny:
                    await nanny.terminate(timeout=2 * END_S, reason="SIGTERM")
        await self._worker.close(reason="SIGTERM")

    async def _empty(self) -> None:
        """Until no request is left here: they move if there is a scheduler to see to it, and end otherwise."""
        worker = self._worker
        while worker.status in (Status.running, Status.paused):
            try:
                drained = await worker.scheduler.sllm_drain(node=str(worker.name), cause=STOPPING)
                if "error" not in drained:
                    return
                logger.warning("worker=%s is not drained: %s", worker.address, drained["error"])
            except OSError as error:
                logger.warning("worker=%s is not drained, as there is no scheduler: %s", worker.address, error)
            with suppress(TimeoutError):  # another scheduler may come
                async with asyncio.timeout(AGAIN_S):
                    await worker.extensions[EXTENSION].until_idle()
                    return


class ForwardSignal(NannyPlugin):
    """In the nanny: a SIGTERM that it gets becomes one for its worker, and it waits for the end of that."""

    name = "sllmdask-stop"

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def setup(self, nanny: Nanny) -> None:
        close = type(nanny).close

        async def forward_and_close(timeout: float = 5, reason: str = "nanny-close") -> Any:
            # A person who presses Ctrl-C wants it to end.
            if reason == f"signal-{signal.SIGTERM:d}" and nanny.status in (Status.running, Status.closing_gracefully):
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(self._limit_s):
                        await self._forward(nanny)
            return await close(nanny, timeout=timeout, reason=reason)

        nanny.close = forward_and_close

    async def _forward(self, nanny: Nanny) -> None:
        process = nanny.process
        if process is None or process.worker_address is None:
            return
        async with nanny.rpc(process.worker_address) as worker:
            await worker.sllm_stop()
        await process.stopped.wait()
