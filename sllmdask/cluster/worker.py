"""A Dask worker that outlives its scheduler: ``dask worker ... --worker-class sllmdask.cluster.worker.SllmWorker``.

Dask's own worker shuts down when it loses its scheduler. This one goes on, since front doors talk to it directly, and registers
anew when a scheduler answers there again, with its instances as they are: their engines run, and that scheduler adopts them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from distributed import Worker
from distributed.batched import BatchedSend
from distributed.comm import connect
from distributed.core import Status
from distributed.worker_state_machine import FreeKeysEvent

from sllmdask.actors.model_actor import EXTENSION

logger = logging.getLogger(__name__)

#: Why Dask closes a worker that has lost its scheduler. A scheduler that stops in good order says so; that still ends the worker.
_LOST = frozenset({"worker-handle-scheduler-connection-broken", "worker-heartbeat-missing"})
#: Seconds after which a scheduler that does not come back is given up.
GIVE_UP_S = 600.0
#: Seconds that one attempt to reach it may take, and between two of them.
REACH_S, AGAIN_S = 2.0, 0.2


class SllmWorker(Worker):
    """Instead of closing when the scheduler is lost, it waits for one and joins again with all that it has."""

    _rejoining: asyncio.Task[None] | None = None

    async def close(
        self, timeout: float = 30, executor_wait: bool = True, nanny: bool = True, reason: str = "worker-close"
    ) -> str | None:
        if reason in _LOST and self.status == Status.running and EXTENSION in self.extensions:
            if self._rejoining is None:
                logger.warning("lost the scheduler at %s (%s)", self.scheduler.address, reason)
                self._rejoining = asyncio.create_task(self._rejoin_or_close())
            return None
        if self._rejoining is not None and self._rejoining is not asyncio.current_task():
            self._rejoining.cancel()
        return await super().close(timeout=timeout, executor_wait=executor_wait, nanny=nanny, reason=reason)

    async def _rejoin_or_close(self) -> None:
        try:
            await self._rejoin()
        except Exception:
            # A process that neither serves nor ends would look healthy to its nanny.
            logger.exception("could not join again")
            await super().close(reason="could not join again")

    async def _rejoin(self) -> None:
        for name in ("keep-alive", "heartbeat"):
            self.periodic_callbacks[name].stop()
        give_up_at = time.monotonic() + GIVE_UP_S
        async with asyncio.timeout(GIVE_UP_S):
            await self._forget_tasks()
        self.rpc.remove(self.scheduler.address)
        while True:
            await self._until_reachable(give_up_at)
            # The old one has closed with its connection.
            self.batched_stream = BatchedSend(interval="2ms", loop=self.loop)
            try:
                await asyncio.wait_for(self._register_with_scheduler(), give_up_at - time.monotonic())
            except ValueError as error:
                # Our name may still be taken by the registration that broke, until its time to live is over.
                logger.info("not registered yet: %s", error)
                await asyncio.sleep(1)
            except TimeoutError:
                await super().close(reason="no scheduler came back")
                return
            else:
                self._rejoining = None
                return

    async def _until_reachable(self, give_up_at: float) -> None:
        """Until somebody listens where the scheduler was: Dask's own attempts become rare within seconds."""
        while time.monotonic() < give_up_at:
            try:
                comm = await connect(self.scheduler.address, timeout=REACH_S, **self.connection_args)
            except (OSError, TimeoutError):
                await asyncio.sleep(AGAIN_S)
            else:
                comm.abort()
                return

    async def _forget_tasks(self) -> None:
        """The tasks behind our actors belong to a scheduler that is gone; Dask registers a worker without tasks only."""
        event: Any = FreeKeysEvent(keys=list(self.state.tasks), stimulus_id=f"sllm-rejoin-{time.time()}")
        self.handle_stimulus(event)
        while self.state.tasks:  # noqa: ASYNC110 - Dask's state machine has no event for it
            await asyncio.sleep(0.05)
        # Dask takes for granted that a worker which registers has measured nothing: one that has would end at its next heartbeat.
        self.digests_total_since_heartbeat.clear()
        self.extensions["spans"].digests_total_since_heartbeat.clear()
