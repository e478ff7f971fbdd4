"""Which workers can run this model, and what they lack for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sllmdask.errors import InsufficientMemory, NoWorker, SllmError
from sllmdask.policy.eviction import pinned_bytes
from sllmdask.policy.views import InstanceView, ModelView, WorkerView
from sllmdask.units import format_bytes


def unfit(model: ModelView, worker: WorkerView) -> str | None:
    """Why `worker` can never run `model`, or not while it is drained, or ``None`` when it can."""
    if worker.draining:
        return f"it is being drained: {worker.draining}"
    if model.nodes and worker.name not in model.nodes:
        return f"not among the model's nodes {', '.join(model.nodes)}"
    if model.n_slots > worker.slots:
        return f"needs {model.n_slots} slots, has {worker.slots}"
    if model.nbytes > worker.host_capacity:
        return f"needs {format_bytes(model.nbytes)} of memory, has {format_bytes(worker.host_capacity)}"
    return None


def why_unplaceable(model: ModelView, workers: Iterable[WorkerView]) -> SllmError:
    """The error of a model that none of `workers` can ever run."""
    small = [worker for worker in workers if not model.nodes or worker.name in model.nodes]
    if not small:
        who = f"its nodes {', '.join(model.nodes)} are not connected" if model.nodes else "no worker is connected"
        return NoWorker(model.name, f"{who}. Start one: dask worker SCHEDULER --preload sllmdask.cluster.worker_plugin")
    if all(worker.draining for worker in small):
        nodes = ", ".join(sorted(worker.name for worker in small))
        return NoWorker(model.name, f"every node that may run it is being drained: {nodes}. sllmdask drain NODE --undo ends that")
    small = [worker for worker in small if not worker.draining]
    slots = max(worker.slots for worker in small)
    if model.n_slots > slots:
        return NoWorker(model.name, f"it needs {model.n_slots} slots (num_gpus) and the largest worker has {slots}")
    return InsufficientMemory(model.name, model.nbytes, max(worker.host_capacity for worker in small))


def missing_nbytes(nbytes: int, checkpoint: str, worker: WorkerView, instances: Sequence[InstanceView]) -> int:
    """Bytes of host memory that `worker` lacks for one more instance of a checkpoint; 0 or less: it has them.

    `instances` are all those of its node.
    """
    return pinned_bytes(instances, checkpoint) + nbytes - worker.host_capacity
