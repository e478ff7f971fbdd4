"""What makes a Dask worker a node of sllmdask: ``dask worker ADDRESS --preload sllmdask.cluster.worker_plugin --slots 1``.

The plugin opens the checkpoint store and the registry of instances, and answers the scheduler and the front doors. The worker is
the truth about itself: it reports at every change, and the same account rides on each heartbeat.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import secrets
import signal
import socket
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
from distributed import Worker
from distributed.comm import Comm, get_address_host
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.system import MEMORY_LIMIT

from sllmdask.actors.model_actor import EXTENSION
from sllmdask.batching.backend import Task
from sllmdask.cluster.dask_settings import log_as_dask_does, read_settings
from sllmdask.cluster.stopping import Stopping
from sllmdask.config import Settings
from sllmdask.errors import CheckpointNotFound, ConfigError, EngineError, HostPoolUnavailable, SllmError, from_wire
from sllmdask.policy.views import Tier

if TYPE_CHECKING:  # torch is imported after the threads' environment is set, see `setup`
    from sllmdask.actors.instances import InstanceRegistry
    from sllmdask.loader.store import CheckpointStore

logger = logging.getLogger(__name__)

#: Version of what workers and the scheduler say to each other; the scheduler refuses a worker of another one.
PROTOCOL = 5
DEMO = "demo:"
#: Seconds that a thread that runs Python keeps the others waiting: a tenth of Python's own.
SWITCH_INTERVAL_S = 0.0005
#: Files of a checkpoint that a front door needs: all that is neither weights nor code.
_FRONT_DOOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_MAX_FILE_BYTES = 64 * 1024**2


def resolve_source(source: str) -> str:
    """The directory or hub id behind a deployment's source; ``demo:NAME`` is a checkpoint that ships with the package."""
    if not source.startswith(DEMO):
        return source
    name = source.removeprefix(DEMO)
    root = resources.files("sllmdask") / "demo"
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("_"))
    if name not in names:
        raise CheckpointNotFound(source, f"the demo models are {', '.join(names)}")
    return str(root / name)


class SllmWorkerPlugin(WorkerPlugin):
    """Holds a worker's store and instances."""

    name = "sllmdask"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry: InstanceRegistry | None = None
        #: Which workers share memory and disk with this one.
        self.node = secrets.token_hex(8)
        #: Sources whose files were seen here, and how often that has changed, which the account's version counts.
        self._on_disk: set[str] = set()
        self._n_changes = 0

    async def setup(self, worker: Worker) -> None:
        self._worker = worker
        # A worker that waits in a spinning OpenMP barrier takes the core of its neighbour: 8-30x slower when oversubscribed.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Engine, event loop and moves are threads: none waits for long behind another one's Python.
        sys.setswitchinterval(min(SWITCH_INTERVAL_S, sys.getswitchinterval()))
        from sllmdask.actors.instances import InstanceRegistry, open_ledger

        self.host_capacity = self.settings.worker.host_memory or MEMORY_LIMIT // 2
        slots = self.settings.worker.slots
        n_threads = self.settings.engine.n_threads or max(1, (psutil.cpu_count() or 1) // slots)
        engine_settings = self.settings.engine.model_copy(update={"n_threads": n_threads})
        store = await self._open_store(worker)
        memory = open_ledger(engine_settings.device, self.settings.worker, MEMORY_LIMIT, self.host_capacity)
        self.registry = InstanceRegistry(
            store,
            engine_settings,
            self.report,
            resolve_source,
            self.settings.worker.migration_bandwidth,
            memory,
            self.settings.worker.migration_answer,
            self.settings.worker.migration_reservation,
        )
        worker.extensions[EXTENSION] = self.registry
        worker.handlers["sllm-stream"] = self.stream
        worker.handlers["sllm_inspect"] = self.inspect
        worker.handlers["sllm_inspect_adapter"] = self.inspect_adapter
        worker.handlers["sllm_files"] = self.files
        worker.handlers["sllm_welcome"] = self.welcome
        worker.handlers["sllm_preload"] = self.preload
        worker.handlers["sllm_pull"] = self.pull
        worker.handlers["sllm_forget"] = self.forget
        worker.handlers["sllm_unload"] = self.unload
        worker.handlers["sllm_move"] = self.move
        worker.handlers["sllm_evacuate"] = self.evacuate
        worker.handlers["sllm_gone"] = self.gone
        worker.handlers["sllm_abort"] = self.abort
        worker.handlers["sllm_give_back"] = self.give_back
        worker.handlers["sllm_pin"] = self.pin
        worker.startup_information["sllm"] = self.static_facts
        worker.metrics["sllm"] = self.account
        store.subscribe(lambda: self.report({"kind": "account", "account": self.account()}))
        await self.registry.warm_up()
        # The modules that stay are half a million objects: who looks for cycles among them stops every thread for 0.2 s.
        gc.freeze()

    async def _open_store(self, worker: Worker) -> CheckpointStore:
        """The store over memory that this worker shares with the others of its node, or, where that cannot be had, its own."""
        from sllmdask.loader.hostpool import HostPool
        from sllmdask.loader.private_pool import PrivatePool
        from sllmdask.loader.shared_pool import SharedPool
        from sllmdask.loader.store import CheckpointStore

        settings = self.settings.worker
        name = _pool_name(settings.store_dir)
        if settings.shared_memory:
            pool: HostPool = SharedPool(
                name, self.host_capacity, member=str(worker.name), grace_s=settings.memory_grace, populate=True
            )
            try:
                await pool.start()
                self.node = f"{socket.gethostname()}/{name}"
            except HostPoolUnavailable as error:
                logger.warning("%s; this worker uses memory of its own", error.message)
                await pool.close()
                pool = PrivatePool(self.host_capacity)
        else:
            pool = PrivatePool(self.host_capacity)
        store = CheckpointStore(settings, pool)
        await store.start()
        await store.measure()
        return store

    async def teardown(self, worker: Worker) -> None:
        worker.extensions.pop(EXTENSION, None)
        if self.registry is not None:
            await self.registry.close()

    # --- told to the scheduler ---

    async def static_facts(self, _worker: Worker) -> dict[str, Any]:
        """What does not change while the process lives; travels with its registration."""
        return {
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "slots": self.settings.worker.slots,
            **self.account(),
        }

    def account(self, _worker: Worker | None = None) -> dict[str, Any]:
        """Residency, speeds and instances now; ``version`` grows with every change."""
        assert self.registry is not None
        snapshot = self.registry.snapshot()
        residency = dict.fromkeys(self._on_disk, str(Tier.DISK))
        residency |= {key: str(tier) for key, facts in snapshot["keys"].items() if (tier := _tier_of(facts["state"]))}
        return {
            "version": snapshot["version"] + self._n_changes,
            "residency": residency,
            "tiers": snapshot["tiers"],
            "bandwidth": snapshot["bandwidth"],
            "instances": snapshot["instances"],
            "facts": self.registry.facts(),
            "pinned": [key for key, facts in snapshot["keys"].items() if facts["pinned"]],
            "node": self.node,
            "data": self.registry.store.data_address,
            "moves": self.registry.moves.server_address,
        }

    def report(self, message: dict[str, Any]) -> None:
        """Tell the scheduler at once; what cannot be sent now is in the next heartbeat."""
        if self._worker.status in (Status.running, Status.paused, Status.closing_gracefully):
            self._worker.batched_send({"op": "sllm-report", "message": message})

    # --- asked ---

    async def stream(self, comm: Comm, front_door: str) -> Status:
        """A front door's connection, for as long as it lasts."""
        assert self.registry is not None
        await self.registry.serve_stream(comm, front_door)
        return Status.dont_reply

    async def inspect(
        self,
        source: str,
        fetch: bool,
        task: str = "auto",
        pooling: str | None = None,
        normalize: bool | None = None,
        backend: str = "transformers",
    ) -> dict[str, Any]:
        """What a deployment of `source` would be, or ``{"error": ...}``; without `fetch`, only of what is on this disk.

        ``embedding`` in the answer is ``None`` for a model that generates text; the other arguments: as deployed.
        """
        assert self.registry is not None
        try:
            await self.registry.backend(backend)  # first, since it needs no file
            on_disk = await self.registry.store.on_disk(resolve_source(source))
            if not on_disk:
                self._see_on_disk(source, False)
            if not fetch and not on_disk:
                raise CheckpointNotFound(source, "it is not on this node's disk")
            info = await self.registry.store.inspect(source, resolve_source(source))
            facts = await self.registry.inspect(backend, info.path, info.config, Task(task, pooling, normalize))
            await asyncio.to_thread(_check_tokenizer, source, info.path)
            if on_disk:
                self._see_on_disk(source, True)
        except SllmError as error:
            return error.as_wire()
        except Exception as error:
            logger.exception("inspection failed source=%s", source)
            return EngineError(f"inspecting {source!r} failed: {error!r}").as_wire()
        return {
            "nbytes": info.nbytes,
            "architecture": facts.architecture,
            "max_model_len": facts.max_model_len,
            "embedding": None if facts.embedding is None else dict(facts.embedding),
            "account": self.account(),
        }

    async def inspect_adapter(self, name: str, source: str, base: str, backend: str = "transformers") -> dict[str, Any]:
        """Whether the LoRA adapter at `source` is for the model at `base`; ``{"error": ...}`` with the reason if not."""
        assert self.registry is not None
        store = self.registry.store
        try:
            adapter = await store.inspect(source, resolve_source(source))
            model = await store.inspect(base, resolve_source(base))
            await self.registry.check_adapter(name, adapter.path, model.path, backend)
        except SllmError as error:
            return error.as_wire()
        except Exception as error:
            logger.exception("inspection failed adapter=%s source=%s", name, source)
            return EngineError(f"inspecting the adapter {source!r} failed: {error!r}").as_wire()
        return {"nbytes": adapter.nbytes}

    def _see_on_disk(self, source: str, there: bool) -> None:
        if there != (source in self._on_disk):
            self._on_disk ^= {source}
            self._n_changes += 1
            self.report({"kind": "account", "account": self.account()})

    async def files(self, source: str) -> dict[str, Any]:
        """Contents by name of the small files of a checkpoint: configuration, tokenizer, chat template."""
        assert self.registry is not None
        try:
            for _ in range(2):  # a directory that was being fetched may get its final name meanwhile
                info = await self.registry.store.inspect(source, resolve_source(source))
                if files := await asyncio.to_thread(_read_small_files, Path(info.path)):
                    break
            return {"files": files}
        except SllmError as error:
            return error.as_wire()

    async def welcome(self, token: str, disk_size: int | None = None) -> dict[str, Any]:
        """Take requests from the other workers, and supply them with checkpoints, and be supplied: all who know `token`.

        `disk_size`: bytes of the disk that copies of checkpoints may take, by the hardware file.
        """
        assert self.registry is not None
        if disk_size is not None:
            self.registry.store.bound_disk(disk_size)
        host = get_address_host(self._worker.address)
        security = self._worker.security
        listen_tls = security.get_listen_args("worker").get("ssl_context")
        connect_tls = security.get_connection_args("worker").get("ssl_context")
        if self.settings.worker.peers:
            await self.registry.store.serve(host, token, listen_tls=listen_tls, connect_tls=connect_tls)
        await self.registry.moves.serve(host, self._worker.address, token, listen_tls, connect_tls)
        self.report({"kind": "account", "account": self.account()})
        return {}

    async def preload(self, source: str, peers: list[str] | None = None) -> dict[str, Any]:
        """Bring a checkpoint to host memory before anybody asks for it."""
        assert self.registry is not None
        try:
            loaded_from = await self.registry.preload(source, peers or ())
        except SllmError as error:
            return error.as_wire()
        return {"loaded_from": str(loaded_from), "account": self.account()}

    async def pin(self, source: str, pinned: bool, peers: list[str] | None = None) -> dict[str, Any]:
        """Bring a checkpoint to host memory for good; or, not `pinned`, let it be evicted again."""
        assert self.registry is not None
        store = self.registry.store
        try:
            if pinned:
                loaded_from = str(await store.pin(source, resolve_source(source), peers or ()))
            else:
                loaded_from = None
                store.unpin(source)
        except SllmError as error:
            return error.as_wire()
        return {"loaded_from": loaded_from, "account": self.account()}

    async def pull(self, source: str, peers: list[str] | None = None) -> dict[str, Any]:
        """Bring the files of a checkpoint to this node's disk."""
        assert self.registry is not None
        try:
            path = await self.registry.store.pull(source, resolve_source(source), peers=peers or ())
            info = await self.registry.store.inspect(source, resolve_source(source))
        except SllmError as error:
            return error.as_wire()
        self._see_on_disk(source, True)
        return {"path": path, "nbytes": info.nbytes, "account": self.account()}

    async def unload(self, instance: str, forget: bool = False) -> dict[str, Any]:
        """Close an instance that the scheduler does not know, or has no actor of."""
        assert self.registry is not None
        await self.registry.unload(instance, forget)
        return {}

    async def move(self, instance: str, order: dict[str, Any]) -> dict[str, Any]:
        """Move a request of `instance`; what became of it, a ``MoveRecord``, or ``{"error": ...}`` if it could not begin."""
        from sllmdask.actors.migration import order_from_wire

        assert self.registry is not None
        try:
            record = await self.registry.moves.move(instance, order_from_wire(order))
        except SllmError as error:
            return error.as_wire()
        return record.as_wire()

    async def evacuate(self, instance: str, order: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Move all requests of `instance`: ``{"moves": {request: record}, "left": n}``."""
        from sllmdask.actors.migration import order_from_wire

        assert self.registry is not None
        try:
            return await self.registry.moves.evacuate(instance, order_from_wire(order), limit_s)
        except SllmError as error:
            return error.as_wire()

    async def gone(self, address: str) -> dict[str, Any]:
        """The scheduler has lost the worker at that address: moves to it that can still be called off are."""
        assert self.registry is not None
        self.registry.moves.worker_gone(address)
        return {}

    async def abort(self, instance: str, error: dict[str, Any]) -> dict[str, Any]:
        """End all requests of an instance with `error`, at once."""
        assert self.registry is not None
        return {"n_aborted": self.registry.abort(instance, from_wire(error))}

    async def give_back(self, instance: str, requests: list[str]) -> dict[str, Any]:
        """End requests of an instance that no front door seems to have any more; one that has them sends them elsewhere."""
        assert self.registry is not None
        return {"n_ended": self.registry.give_back(instance, requests)}

    async def forget(self, source: str) -> dict[str, Any]:
        """Drop the host copy of a checkpoint that is not deployed any more; a disk copy that was fetched is the next to leave."""
        assert self.registry is not None
        return {"forgotten": await self.registry.store.forget(source), "account": self.account()}


def _pool_name(store_dir: str) -> str:
    """Those that keep their files in one place have their memory in one place, too."""
    where = os.path.realpath(Path(store_dir).expanduser())
    return f"sllmdask-{hashlib.sha256(where.encode()).hexdigest()[:12]}"


def _check_tokenizer(source: str, path: str) -> None:
    """Raise :class:`CheckpointNotFound`, naming `source`, if a front door could make no tokenizer of the files."""
    from sllmdask.engine.text import Tokenizer

    try:
        Tokenizer.from_directory(path)
    except CheckpointNotFound as error:
        raise CheckpointNotFound(source, error.reason) from None


def _tier_of(state: str) -> Tier | None:
    return {"host": Tier.HOST, "disk": Tier.DISK, "reading": Tier.DISK, "fetching": Tier.REMOTE}.get(state)


def _read_small_files(directory: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for pattern in _FRONT_DOOR_FILES:
        for path in sorted(directory.glob(pattern)):
            if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES and not path.name.endswith(".index.json"):
                found[path.name] = path.read_bytes()
    return found


@click.command()
@click.option("--slots", type=int, help="instances' worth of compute on this worker (worker.slots)")
@click.option("--host-memory", help="host memory for checkpoints, for example 16GiB (worker.host_memory)")
@click.option("--memory-fraction", type=float, help="part of the memory that this worker may take (worker.memory_fraction)")
@click.option("--store-dir", help="where downloaded checkpoints are kept (worker.store_dir)")
@click.option("--threads-per-instance", type=int, help="threads of one engine (engine.n_threads)")
@click.option("--kv-memory", help="KV cache of one instance, for example 1GiB (engine.kv_memory)")
async def dask_setup(
    worker: Worker,
    slots: int | None,
    host_memory: str | None,
    memory_fraction: float | None,
    store_dir: str | None,
    threads_per_instance: int | None,
    kv_memory: str | None,
) -> None:
    """Called by Dask for ``--preload sllmdask.cluster.worker_plugin``; the options are given after it."""
    log_as_dask_does()
    if worker.nanny:
        # A terminal sends Ctrl-C to every process; this one is stopped by its nanny, in good order.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        settings = read_settings(
            {
                "worker": {
                    "slots": slots,
                    "host_memory": host_memory,
                    "memory_fraction": memory_fraction,
                    "store_dir": store_dir,
                },
                "engine": {"n_threads": threads_per_instance, "kv_memory": kv_memory},
            }
        )
    except ConfigError as error:
        # Dask would log the failed preload and run a worker that can hold no model.
        logger.error("%s", error.message)
        raise SystemExit(2) from None
    await worker.plugin_add(SllmWorkerPlugin(settings), name=SllmWorkerPlugin.name, catch_errors=False)
    if settings.worker.grace > 0:
        Stopping(worker, settings.worker.grace).listen()
