"""A Dask worker that outlives its scheduler: ``dask worker ... --worker-class sllmdask.cluster.worker.SllmWorker``.

Dask's own worker shuts down when it loses its scheduler. This one lets its running requests end, since front doors talk to it
directly, gives the devices back, keeps the checkpoints in host memory, and registers anew when a scheduler answers there again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from distributed import Worker
from distributed.batched import BatchedSend
from distributed.core import Status
from distributed.worker_state_machine import FreeKeysEvent

from sllmdask.actors.model_actor import EXTENSION

if TYPE_CHECKING:  # as in `worker_plugin`: torch is imported after the threads' environment is set
    from sllmdask.actors.instances import InstanceRegistry

logger = logging.getLogger(__name__)

#: Why Dask closes a worker that has lost its scheduler. A scheduler that stops in good order says so; that still ends the worker.
_LOST = frozenset({"worker-handle-scheduler-connection-broken", "worker-heartbeat-missing"})
#: Seconds that running requests may take to end, and seconds after which a scheduler that does not come back is given up.
DRAIN_S, GIVE_UP_S = 600.0, 600.0


class SllmWorker(Worker):
    """Instead of closing when the scheduler is lost, it waits for one and joins again with empty slots and a warm host tier."""

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
        registry: InstanceRegistry = self.extensions[EXTENSION]
        await registry.drain(DRAIN_S)
        give_up_at = time.monotonic() + GIVE_UP_S
        async with asyncio.timeout(GIVE_UP_S):
            await self._forget_tasks()
        self.rpc.remove(self.scheduler.address)
        while True:
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

    async def _forget_tasks(self) -> None:
        """The tasks behind our actors belong to a scheduler that is gone; Dask registers a worker without tasks only."""
        event: Any = FreeKeysEvent(keys=list(self.state.tasks), stimulus_id=f"sllm-rejoin-{time.time()}")
        self.handle_stimulus(event)
        while self.state.tasks:  # noqa: ASYNC110 - Dask's state machine has no event for it
            await asyncio.sleep(0.05)
        # Dask takes for granted that a worker which registers has measured nothing: one that has would end at its next heartbeat.
        self.digests_total_since_heartbeat.clear()
        self.extensions["spans"].digests_total_since_heartbeat.clear()
