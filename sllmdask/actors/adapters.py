"""The LoRA adapters of one instance: small checkpoints, loaded when a request needs one, and evicted by least recent use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from sllmdask.engine.lora import LoraAdapter
from sllmdask.errors import EngineError, InstanceGone, SllmError
from sllmdask.loader.records import HostLease
from sllmdask.loader.store import CheckpointStore

logger = logging.getLogger(__name__)


class AdapterEngine(Protocol):
    """What is needed of an ``LLMEngine``; both but the first between two steps."""

    def read_adapter(self, name: str, directory: Path, tensors: Any) -> LoraAdapter: ...

    def add_adapter(self, adapter: LoraAdapter) -> None: ...

    def remove_adapter(self, salt: bytes) -> None: ...


#: Runs something between two steps, in the engine's thread.
Call = Callable[[Callable[[Any], Any]], "Future[Any]"]


@dataclass(eq=False)
class _Loaded:
    """An adapter that is in the engine, or on its way there."""

    name: str
    source: str
    loading: asyncio.Task[LoraAdapter]
    lease: HostLease | None = None
    #: Requests that have it or wait for it.
    n_users: int = 0

    @property
    def adapter(self) -> LoraAdapter | None:
        done = self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None
        return self.loading.result() if done else None


@dataclass(frozen=True)
class AdapterUse:
    """That a request has an adapter; :meth:`InstanceAdapters.release` ends it."""

    salt: bytes
    loaded: _Loaded = field(repr=False)


class InstanceAdapters:
    """At most `capacity` adapters of one instance. Everything here runs on the worker's event loop.

    An adapter that requests have stays. One that must be loaded while all places are in use waits until one is free.
    """

    def __init__(
        self, store: CheckpointStore, resolve: Callable[[str], str], read: Callable[..., LoraAdapter], call: Call, capacity: int
    ) -> None:
        self._store, self._resolve, self._read, self._call = store, resolve, read, call
        self._capacity = capacity
        #: By name and source; used longest ago first.
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._changed = asyncio.Condition()
        self._closed = False
        #: Held until they are done, since the loop holds tasks weakly.
        self._telling: set[asyncio.Task[None]] = set()

    async def acquire(self, name: str, source: str) -> AdapterUse:
        """The adapter `name`, loaded from `source` unless it is here. Raises what loading it failed of."""
        key = (name, source)
        async with self._changed:
            while key not in self._loaded and len(self._loaded) >= self._capacity and not await self._evict_one():
                await self._changed.wait()
                self._refuse_closed(name)
            self._refuse_closed(name)
            loaded = self._loaded.pop(key, None)
            if loaded is None:
                loaded = _Loaded(name, source, asyncio.create_task(self._load(name, source)))
            self._loaded[key] = loaded  # at the end: used last
            loaded.n_users += 1
        try:
            adapter = await asyncio.shield(loaded.loading)
        except BaseException as error:
            await self._leave(loaded, failed=loaded.loading.done())
            if isinstance(error, SllmError):
                raise type(error)(*error.args) from None
            if isinstance(error, asyncio.CancelledError) and loaded.loading.cancelled():
                raise InstanceGone(name) from None
            raise
        return AdapterUse(adapter.salt, loaded)

    def release(self, use: AdapterUse) -> None:
        """The request has ended, or the engine was told so."""
        use.loaded.n_users -= 1
        if not use.loaded.n_users:
            task = asyncio.create_task(self._tell())
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def close(self) -> None:
        """Let go of everything, once the engine is closed."""
        self._closed = True
        leaving = list(self._loaded.values())
        self._loaded.clear()
        for loaded in leaving:
            loaded.loading.cancel()
        await asyncio.gather(*(loaded.loading for loaded in leaving), return_exceptions=True)
        for loaded in leaving:
            self._let_go(loaded)
        await self._tell()

    def snapshot(self) -> list[dict[str, Any]]:
        """What is in the engine, used longest ago first; plain msgpack types."""
        return [
            {"name": loaded.name, "source": loaded.source, "nbytes": loaded.adapter.nbytes, "n_requests": loaded.n_users}
            for loaded in self._loaded.values()
            if loaded.adapter is not None
        ]

    async def _load(self, name: str, source: str) -> LoraAdapter:
        lease = await self._store.load(source, self._resolve(source))
        try:
            adapter = await asyncio.to_thread(self._read, name, Path(lease.path), lease.tensors)
            await asyncio.wrap_future(self._call(methodcaller("add_adapter", adapter)))
        except SllmError as error:
            lease.release()
            raise type(error)(*error.args) from None
        except Exception as error:
            logger.exception("adapter could not be read adapter=%s source=%s", name, source)
            lease.release()
            raise EngineError(f"The adapter {name!r} could not be read: {error!r}") from None
        except BaseException:
            lease.release()
            raise
        loaded = self._loaded.get((name, source))
        if loaded is None:  # closed meanwhile
            lease.release()
            raise InstanceGone(name)
        loaded.lease = lease
        logger.info("adapter loaded adapter=%s source=%s from=%s nbytes=%d", name, source, lease.tier_from, adapter.nbytes)
        return adapter

    async def _leave(self, loaded: _Loaded, *, failed: bool) -> None:
        loaded.n_users -= 1
        if failed and self._loaded.get((loaded.name, loaded.source)) is loaded and loaded.adapter is None:
            del self._loaded[loaded.name, loaded.source]
        await self._tell()

    async def _evict_one(self) -> bool:
        """Take the adapter that was used longest ago, and that nobody has, out of the engine; ``False`` if there is none."""
        for key, loaded in self._loaded.items():
            adapter = loaded.adapter
            if not loaded.n_users and adapter is not None:
                del self._loaded[key]
                try:
                    await asyncio.wrap_future(self._call(methodcaller("remove_adapter", adapter.salt)))
                finally:
                    self._let_go(loaded)
                logger.info("adapter evicted adapter=%s source=%s cause=least recently used", loaded.name, loaded.source)
                return True
        return False

    def _let_go(self, loaded: _Loaded) -> None:
        lease, loaded.lease = loaded.lease, None
        if lease is not None:
            lease.release()

    def _refuse_closed(self, name: str) -> None:
        if self._closed:
            raise InstanceGone(name)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
