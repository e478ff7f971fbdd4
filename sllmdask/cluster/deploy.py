"""How a cluster is put together on this host: a scheduler here, workers as processes that a nanny restarts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dask.config
import psutil
from distributed import LocalCluster, Nanny
from distributed.system import MEMORY_LIMIT

from sllmdask.cluster.dask_settings import DISTRIBUTED
from sllmdask.config import Settings

SCHEDULER_PRELOAD = "sllmdask.cluster.scheduler_plugin"
WORKER_PRELOAD = "sllmdask.cluster.worker_plugin"


@asynccontextmanager
async def local_cluster(n_workers: int, settings: Settings) -> AsyncIterator[LocalCluster]:
    """A scheduler in this process and `n_workers` worker processes named ``0``, ``1``..., each with a nanny.

    Cores and memory of the host are divided between the workers where the settings leave them open.
    """
    shared = settings.model_copy(
        update={
            "worker": settings.worker.model_copy(
                update={
                    "host_memory": settings.worker.host_memory or MEMORY_LIMIT // 2 // n_workers,
                    "memory_fraction": settings.worker.memory_fraction / n_workers,
                    # They end with the service: nothing could take their requests.
                    "grace": 0.0,
                }
            ),
            "engine": settings.engine.model_copy(
                update={
                    "n_threads": settings.engine.n_threads
                    or max(1, (psutil.cpu_count() or 1) // (n_workers * settings.worker.slots))
                }
            ),
        }
    )
    # The workers are processes of their own, which say what this one would.
    level = logging.getLevelName(logging.getLogger("distributed").getEffectiveLevel()).lower()
    environment = {"DASK_LOGGING__DISTRIBUTED": level, "DASK_LOGGING__SLLMDASK": level}
    with dask.config.set({**DISTRIBUTED, "sllmdask": shared.model_dump(mode="json")}):
        async with LocalCluster(
            n_workers=n_workers,
            worker_class=Nanny,
            threads_per_worker=1,
            memory_limit=0,
            host="127.0.0.1",
            # Named, since Dask's HTTP server listens on every address where it is not, with pages or without.
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"preload": [SCHEDULER_PRELOAD]},
            preload=[WORKER_PRELOAD],
            env=environment,
            asynchronous=True,
            silence_logs=False,
        ) as cluster:
            yield cluster


def describe(cluster: LocalCluster) -> dict[str, Any]:
    """Addresses of a running cluster."""
    return {"scheduler": cluster.scheduler_address, "dashboard": cluster.dashboard_link, "workers": len(cluster.workers)}
