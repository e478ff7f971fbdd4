"""Everything that ``sllmdask up`` and ``sllmdask serve`` run: a cluster or the address of one, a gateway, the HTTP server."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

from sllmdask.cluster.dask_settings import read_settings
from sllmdask.cluster.deploy import describe, local_cluster
from sllmdask.cluster.gateway import Gateway
from sllmdask.config import Deployment, Settings, parse
from sllmdask.engine.text import preload
from sllmdask.errors import ConfigError
from sllmdask.server.app import make_app, start

logger = logging.getLogger(__name__)

#: Told once everything is up: ``url``, ``scheduler``, ``dashboard``, ``workers``, ``models``.
OnReady = Callable[[dict[str, Any]], None]


@asynccontextmanager
async def front_door(scheduler: str, settings: Settings) -> AsyncIterator[tuple[Gateway, str]]:
    """A front door on the Dask cluster at `scheduler`: its gateway and its URL.

    Raises :class:`SchedulerUnreachable` and :class:`PortInUse`.
    """
    gateway = Gateway(scheduler, settings)
    try:
        await gateway.start()
        runner, url = await start(make_app(gateway, settings.server), settings.server)
        try:
            yield gateway, url
        finally:
            await runner.cleanup()
    finally:
        await gateway.close()


@asynccontextmanager
async def everything(
    models: Sequence[Deployment], settings: Settings, n_workers: int
) -> AsyncIterator[tuple[Gateway, dict[str, Any]]]:
    """A local cluster, its front door, and `models` deployed: the gateway, and what :data:`OnReady` is told."""
    # While the workers start, this process has nothing else to do.
    asyncio.get_running_loop().run_in_executor(None, preload)
    async with local_cluster(n_workers, settings) as cluster, front_door(cluster.scheduler_address, settings) as (gateway, url):
        for deployment in models:
            await gateway.register(deployment)
        yield gateway, {"url": url, **describe(cluster), "models": [deployment.model for deployment in models]}


async def _until_stopped(stack: AsyncExitStack, begin: Callable[[AsyncExitStack], Any]) -> None:
    """Run `begin`, then wait for SIGINT, SIGTERM, or the end of its terminal; a signal while it starts stops it too."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    starting = True

    def stop() -> None:
        stopped.set()
        if starting:
            task.cancel()

    # Who started it with nohup wants it to outlive the terminal.
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        loop.add_signal_handler(number, stop)
    try:
        async with stack:
            await begin(stack)
            starting = False
            await stopped.wait()
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise


def run_up(models: Sequence[Deployment], settings: Settings, *, n_workers: int, on_ready: OnReady) -> None:
    """Scheduler, workers and front door on this host, until SIGINT or SIGTERM."""

    async def begin(stack: AsyncExitStack) -> None:
        _, facts = await stack.enter_async_context(everything(models, settings, n_workers))
        on_ready(facts)

    asyncio.run(_until_stopped(AsyncExitStack(), begin))


def run_serve(scheduler: str, settings: Settings, on_ready: OnReady) -> None:
    """A front door on the Dask cluster at `scheduler`, until SIGINT or SIGTERM."""

    async def begin(stack: AsyncExitStack) -> None:
        gateway, url = await stack.enter_async_context(front_door(scheduler, settings))
        workers = (await gateway.cluster())["workers"]
        names = [row["model"] for row in gateway.models()]
        on_ready({"url": url, "scheduler": scheduler, "dashboard": None, "workers": len(workers), "models": names})

    asyncio.run(_until_stopped(AsyncExitStack(), begin))


class Service:
    """A running front door in this process, on its own thread; see :func:`serve`."""

    def __init__(self, begin: Callable[[AsyncExitStack], Any]) -> None:
        self._begin = begin
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Event | None = None
        self._gateway: Gateway | None = None
        self.url = ""
        up: Future[None] = Future()
        executor = ThreadPoolExecutor(1, thread_name_prefix="sllmdask-service")
        self._running = executor.submit(lambda: asyncio.run(self._run(up)))
        executor.shutdown(wait=False)
        wait([up, self._running], return_when=FIRST_COMPLETED)
        if self._running.done():
            self._running.result()

    async def _run(self, up: Future[None]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        async with AsyncExitStack() as stack:
            self._gateway, self.url = await self._begin(stack)
            up.set_result(None)
            await self._stopped.wait()

    def deploy(self, model: str, source: str | None = None, **settings: Any) -> list[str]:
        """Deploy `model` from `source` (a directory, a hub id, ``demo:NAME``); `settings` are keys of a deployment file.

        Returns warnings about settings without effect. Raises :class:`ConfigError`, :class:`CheckpointError`.
        """
        backend = dict(settings.pop("backend_config", {}))
        if source is not None:
            backend["pretrained_model_name_or_path"] = source
        deployment = parse(Deployment, {"model": model, "backend_config": backend, **settings}, "the deployment")
        assert self._loop is not None
        assert self._gateway is not None
        reply = asyncio.run_coroutine_threadsafe(self._gateway.register(deployment), self._loop).result()
        return list(reply["warnings"])

    def close(self) -> None:
        """Stop the front door, and the cluster if it was started for it."""
        if self._loop is not None and self._stopped is not None and not self._running.done():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def serve(cluster: Any = None, *, n_workers: int = 2, **overrides: dict[str, Any]) -> Service:
    """Serve models from Python: on this host, or on the Dask cluster of `cluster`, a ``Client`` or a scheduler's address.

    `overrides` are sections of the settings, ``server={"port": 0}`` for instance. The scheduler and the workers of a `cluster`
    must have been started with our preloads. Use as a context manager, or call ``close()``.
    """
    settings = read_settings(overrides)
    if cluster is None:

        async def begin(stack: AsyncExitStack) -> tuple[Gateway, str]:
            gateway, facts = await stack.enter_async_context(everything([], settings, n_workers))
            return gateway, facts["url"]

    else:
        address = cluster if isinstance(cluster, str) else cluster.scheduler_info()["address"]
        if not isinstance(address, str):
            raise ConfigError("serve() takes a distributed.Client, or the address of a Dask scheduler")

        async def begin(stack: AsyncExitStack) -> tuple[Gateway, str]:
            return await stack.enter_async_context(front_door(address, settings))

    return Service(begin)
