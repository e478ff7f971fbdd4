"""Reads one checkpoint to private memory, with neither a store nor an event loop."""

from __future__ import annotations

import os

from sllmdask.loader.buffers import BufferPool, Staging, address_of, lease_nbytes
from sllmdask.loader.format import read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.reader import FileSystems, LocalFiles, read_chunks
from sllmdask.loader.tiers import StateDict, tensor_views


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    chunk_size: int = 16 * 1024**2,
    n_readers: int = 4,
    variant: str | None = None,
    pool: BufferPool | None = None,
    staging: Staging | None = None,
    file_systems: FileSystems | None = None,
) -> StateDict:
    """The tensors of the checkpoint at `path`, a directory or one safetensors file, in private memory.

    Reads with `n_readers` threads, safetensors `chunk_size` bytes at a time. All tensors lie over one buffer, which is given back
    when the last of them is gone: to `pool`, whose pages are used again, or to the system. Who loads often keeps `staging`
    (scratch memory) and `file_systems` (what was learnt of them), too. `variant` is one of our own format's. Raises
    :class:`CheckpointError` and :class:`OSError`.
    """
    index = read_index(path, variant)
    plan = plan_reads(index, chunk_size)
    buffer = (pool or BufferPool(lease_nbytes(plan.nbytes))).lease(plan.nbytes)
    source = LocalFiles(plan, file_systems)
    read_chunks(plan, address_of(buffer), source=source, n_threads=n_readers, staging=staging)
    return tensor_views(index, plan, buffer)
