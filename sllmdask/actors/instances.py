"""The instances of one worker: engines that outlive their actors, and the streams that feed them.

Everything here runs on the worker's event loop; engines have a thread each and hand over once per step.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed.comm import Comm

from sllmdask.actors.streams import Message, Outbox, messages
from sllmdask.batching.sequence import SamplingParams, Sequence
from sllmdask.config import EngineSettings
from sllmdask.engine.engine import EngineThread, StepOutput, build_engine
from sllmdask.errors import EngineError, InstanceGone, SllmError
from sllmdask.loader.store import CheckpointStore, HostLease
from sllmdask.policy.views import Tier

logger = logging.getLogger(__name__)

#: Called with a message for the scheduler: progress of a load, or the loss of an instance.
Report = Callable[[dict[str, Any]], None]

#: What the first load would otherwise import.
_WARM = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)

#: Seconds that requests may still run in an instance that is to be unloaded.
UNLOAD_GRACE_S = 600.0
#: Seconds between two progress reports of one load.
REPORT_EVERY_S = 0.1


class Instance:
    """One model on this worker: its lease on the host copy, its engine, and who waits for which answer."""

    def __init__(self, instance_id: str, model: str, source: str, dtype: str, registry: InstanceRegistry) -> None:
        self.id, self.model, self.source, self.dtype = instance_id, model, source, dtype
        self._registry = registry
        self._lease: HostLease | None = None
        self._engine: EngineThread | None = None
        self._loading: asyncio.Task[dict[str, Any]] | None = None
        self._building = False
        self.closed = False
        #: (front door, epoch) of each request by id.
        self._requests: dict[str, tuple[str, int]] = {}
        #: Set while there is none.
        self._idle = asyncio.Event()
        self._idle.set()

    # --- life ---

    async def load(self) -> dict[str, Any]:
        """Bring the checkpoint to the host tier and build the engine over it; asked again, the answer is the same.

        Returns ``loaded_from``, ``nbytes``, and the seconds of ``read`` and ``build``.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        try:
            return await asyncio.shield(self._loading)
        except SllmError:
            self._registry.discard(self)
            raise
        except asyncio.CancelledError:
            if self._loading.cancelled():
                raise InstanceGone(self.id) from None
            raise

    async def _load(self) -> dict[str, Any]:
        registry = self._registry
        began_at = time.monotonic()
        reported_at = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal reported_at
            now = time.monotonic()
            if done == total or now - reported_at >= REPORT_EVERY_S:
                reported_at = now
                registry.report(
                    {
                        "kind": "progress",
                        "instance": self.id,
                        "done": done,
                        "total": total,
                        "tier": str(Tier.DISK),
                        "bytes_per_s": done / (now - began_at) if now > began_at else 0.0,
                    }
                )

        lease = await registry.store.load(self.source, registry.resolve(self.source), progress)
        started = time.perf_counter()
        self._building = True
        failure: SllmError | None = None
        try:
            self._engine = await registry.build(lease, self)
        except SllmError as error:
            failure = type(error)(*error.args)
        except Exception as error:
            logger.exception("build failed model=%s instance=%s", self.model, self.id)
            failure = EngineError(f"{self.model!r} could not be built: {error!r}")
        if failure is not None:  # raised here, since the traceback of the first one holds on to the tensors
            lease.release()
            raise failure
        assert self._engine is not None
        if self.closed:  # unloaded while it was being built
            await asyncio.to_thread(self._engine.close)
            lease.release()
            raise InstanceGone(self.id)
        self._lease = lease
        build_s = time.perf_counter() - started
        logger.info(
            "loaded model=%s instance=%s from=%s nbytes=%d read_s=%.3f build_s=%.3f",
            self.model,
            self.id,
            lease.tier_from,
            lease.nbytes,
            lease.seconds,
            build_s,
        )
        return {"loaded_from": str(lease.tier_from), "nbytes": lease.nbytes, "read_s": lease.seconds, "build_s": build_s}

    async def close(self, error: SllmError | None = None) -> None:
        """Stop the engine, or the load that would make one; answer who still waits; unpin the host copy."""
        self.closed = True
        if self._loading is not None and not self._loading.done():
            if not self._building:  # that is short, and its thread cannot be stopped
                self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)
        for request_id in list(self._requests):
            self._answer_error(request_id, error or InstanceGone(self.id))
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    async def until_idle(self) -> None:
        """Until the last request has ended."""
        await self._idle.wait()

    def stats(self) -> dict[str, Any]:
        return {"instance": self.id, "model": self.model, "n_requests": len(self._requests), **self._engine_stats()}

    def _engine_stats(self) -> dict[str, Any]:
        return {} if self._engine is None else self._engine.stats()

    # --- requests ---

    def submit(
        self, front_door: str, request_id: str, epoch: int, prompt_ids: list[int], output_ids: list[int], params: dict[str, Any]
    ) -> None:
        """Begin or continue a request; whatever is wrong with it is answered on the front door's stream."""
        if self._engine is None or self.closed:
            self._registry.send(front_door, ["error", request_id, epoch, InstanceGone(self.id).as_wire()])
            return
        sequence = Sequence(request_id, prompt_ids, SamplingParams.from_wire(params), output_ids=output_ids)
        self._requests[request_id] = (front_door, epoch)
        self._idle.clear()
        try:
            self._engine.submit(sequence)
        except InstanceGone as error:  # it died a moment ago; its loss is on its way here
            self._answer_error(request_id, error)

    def cancel(self, request_id: str) -> None:
        if self._forget(request_id) and self._engine is not None:
            self._engine.abort(request_id)

    def cancel_all_of(self, front_door: str) -> int:
        """Stop every request of a front door that is gone; returns how many there were."""
        mine = [request_id for request_id, (door, _) in self._requests.items() if door == front_door]
        for request_id in mine:
            self.cancel(request_id)
        return len(mine)

    def on_outputs(self, outputs: list[StepOutput]) -> None:
        """One step's tokens, on the loop: one message per token, one write per front door."""
        for output in outputs:
            waiting = self._requests.get(output.request_id)
            if waiting is None:
                continue
            front_door, epoch = waiting
            if output.error is not None:
                self._answer_error(output.request_id, output.error)
                continue
            if output.finish_reason is not None:
                self._forget(output.request_id)
            ids = [] if output.token_id is None else [output.token_id]
            reason = None if output.finish_reason is None else str(output.finish_reason)
            self._registry.send(front_door, ["tokens", output.request_id, epoch, output.index, ids, reason])

    def on_failed(self, error: SllmError) -> None:
        """The engine's thread died: the instance is lost, the worker is not."""
        logger.error("engine failed model=%s instance=%s cause=%s", self.model, self.id, error.message)
        self._registry.lost(self, error)

    def _forget(self, request_id: str) -> bool:
        known = self._requests.pop(request_id, None) is not None
        if not self._requests:
            self._idle.set()
        return known

    def _answer_error(self, request_id: str, error: SllmError) -> None:
        front_door, epoch = self._requests[request_id]
        self._forget(request_id)
        self._registry.send(front_door, ["error", request_id, epoch, error.as_wire()])


class InstanceRegistry:
    """What one worker runs. `report` reaches the scheduler; `resolve` turns a deployment's source into a directory or hub id."""

    def __init__(
        self, store: CheckpointStore, engine_settings: EngineSettings, report: Report, resolve: Callable[[str], str]
    ) -> None:
        self.store, self.report, self.resolve = store, report, resolve
        self._settings = engine_settings
        self._instances: dict[str, Instance] = {}
        self._outboxes: dict[str, Outbox] = {}
        # Building is Python and holds the GIL: one at a time keeps the loop responsive.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="build")

    def adopt_or_create(self, instance_id: str, model: str, source: str, dtype: str) -> Instance:
        """The instance of that id; an actor that is created again finds its engine running."""
        instance = self._instances.get(instance_id)
        if instance is None:
            instance = self._instances[instance_id] = Instance(instance_id, model, source, dtype, self)
        return instance

    async def warm_up(self) -> None:
        """Import torch and the modelling code before the worker joins, rather than in its first load."""
        await asyncio.get_running_loop().run_in_executor(self._builder, _import_engine)

    async def build(self, lease: HostLease, instance: Instance) -> EngineThread:
        """An engine in its own thread over the tensors of `lease`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._builder, self._build, lease, instance, loop)

    def _build(self, lease: HostLease, instance: Instance, loop: asyncio.AbstractEventLoop) -> EngineThread:
        settings = self._settings if instance.dtype == "auto" else self._settings.model_copy(update={"dtype": instance.dtype})
        engine = build_engine(Path(lease.path), lease.tensors, settings)
        return EngineThread(engine, loop, instance.on_outputs, instance.on_failed, name=instance.id)

    async def preload(self, source: str) -> None:
        """Bring a checkpoint to the host tier and leave it there, unpinned. Raises what the store raises."""
        (await self.store.load(source, self.resolve(source))).release()

    async def unload(self, instance_id: str, forget: bool, grace_s: float = UNLOAD_GRACE_S) -> None:
        """Close an instance and keep its checkpoint in the host tier, unless it is to be forgotten; idempotent.

        Who asks thinks that it is idle. Whether it is, is decided here: requests that still run may end first.
        """
        instance = self._instances.get(instance_id)
        if instance is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await instance.until_idle()
        if self._instances.pop(instance_id, None) is not instance:
            return  # somebody else is closing it
        await instance.close()
        logger.info("unloaded model=%s instance=%s", instance.model, instance_id)
        if forget:
            self.store.evict(instance.source)

    def discard(self, instance: Instance) -> None:
        """Forget an instance that never came to be."""
        self._instances.pop(instance.id, None)

    def lost(self, instance: Instance, error: SllmError) -> None:
        """Tell the scheduler that an instance died by itself, and free what it held."""
        self.discard(instance)
        self.report({"kind": "lost", "instance": instance.id, "model": instance.model, "reason": error.message})
        task = asyncio.create_task(instance.close(error))
        task.add_done_callback(lambda done: done.exception())

    async def drain(self, timeout_s: float) -> None:
        """Let running requests end, for `timeout_s` seconds at most, then unload everything to the host tier."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(instance.until_idle() for instance in self._instances.values()))
        for instance in list(self._instances.values()):
            await self.unload(instance.id, forget=False, grace_s=0)

    async def close(self) -> None:
        """Stop everything."""
        await self.drain(0)
        for outbox in list(self._outboxes.values()):
            await outbox.close()
        self._builder.shutdown(wait=False, cancel_futures=True)
        await self.store.close()

    # --- streams ---

    def send(self, front_door: str, message: Message) -> None:
        outbox = self._outboxes.get(front_door)
        if outbox is not None:
            outbox.put(message)

    async def serve_stream(self, comm: Comm, front_door: str) -> None:
        """Read a front door's messages until it closes or dies; then stop what it had asked for."""
        outbox = Outbox(comm)
        self._outboxes[front_door] = outbox
        try:
            async for message in messages(comm):
                self._receive(front_door, message)
        finally:
            if self._outboxes.get(front_door) is outbox:
                del self._outboxes[front_door]
                n_stopped = sum(instance.cancel_all_of(front_door) for instance in self._instances.values())
                if n_stopped:
                    logger.info("front door left front_door=%s cancelled=%d", front_door, n_stopped)
            await outbox.close()

    def _receive(self, front_door: str, message: Message) -> None:
        match message:
            case ["submit", request_id, epoch, instance_id, prompt_ids, output_ids, params]:
                instance = self._instances.get(instance_id)
                if instance is None:
                    self.send(front_door, ["error", request_id, epoch, InstanceGone(instance_id).as_wire()])
                else:
                    instance.submit(front_door, request_id, epoch, list(prompt_ids), list(output_ids), params)
            case ["cancel", request_id, instance_id]:
                instance = self._instances.get(instance_id)
                if instance is not None:
                    instance.cancel(request_id)
            case ["ping", number]:
                self.send(front_door, ["pong", number])
            case _:
                logger.warning("unknown message from front door %s: %r", front_door, message[:1])

    # --- reports ---

    def snapshot(self) -> dict[str, Any]:
        """The worker's account of itself, plain msgpack types; rides on heartbeats and reports."""
        stats: dict[str, Any] = defaultdict(dict)
        for instance in self._instances.values():
            stats[instance.id] = instance.stats()
        return {**self.store.snapshot(), "instances": dict(stats)}


def _import_engine() -> None:
    """Everything that the first load would import: seconds of Python."""
    for name in _WARM:
        importlib.import_module(name)
