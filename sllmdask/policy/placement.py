"""Which worker may load this model, and which of those that leave make room for it."""

from __future__ import annotations

from collections.abc import Sequence

from sllmdask.policy.eviction import pinned_bytes
from sllmdask.policy.views import InstanceView, ModelView, WorkerView
from sllmdask.units import format_bytes


def unfit(model: ModelView, worker: WorkerView) -> str | None:
    """Why `worker` can never run `model`, or ``None`` when it can."""
    if model.nodes and worker.name not in model.nodes:
        return f"not among the model's nodes {', '.join(model.nodes)}"
    if model.n_slots > worker.slots:
        return f"needs {model.n_slots} slots, has {worker.slots}"
    if model.nbytes > worker.host_capacity:
        return f"needs {format_bytes(model.nbytes)} of memory, has {format_bytes(worker.host_capacity)}"
    return None


def missing_nbytes(nbytes: int, checkpoint: str, worker: WorkerView, instances: Sequence[InstanceView]) -> int:
    """Bytes of host memory that `worker` lacks for one more instance of a checkpoint; 0 or less: it has them.

    `instances` are all those of its node.
    """
    return pinned_bytes(instances, checkpoint) + nbytes - worker.host_capacity
