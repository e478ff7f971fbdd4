"""Which worker loads this model, and what must leave for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sllmdask.policy.choice import Option, Way
from sllmdask.policy.estimate import load_seconds
from sllmdask.policy.eviction import victims
from sllmdask.policy.views import InstanceView, ModelView, Tier, WorkerView
from sllmdask.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Placement:
    """Load on `worker` once the instances in `evict` have left; `ready_in_s` is the estimate, ``why`` the losers' reasons."""

    worker: str
    ready_in_s: float
    evict: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)


def unfit(model: ModelView, worker: WorkerView) -> str | None:
    """Why `worker` can never run `model`, or ``None`` when it can."""
    if model.nodes and worker.name not in model.nodes:
        return f"not among the model's nodes {', '.join(model.nodes)}"
    if model.n_slots > worker.slots:
        return f"needs {model.n_slots} slots, has {worker.slots}"
    if model.nbytes > worker.host_capacity:
        return f"needs {format_bytes(model.nbytes)} of memory, has {format_bytes(worker.host_capacity)}"
    return None


def free_slots(worker: WorkerView, instances: Iterable[InstanceView]) -> int:
    """Slots of `worker` that nothing takes or waits for; `instances` are those on this worker. Negative while one leaves
    for another."""
    return worker.slots - sum(instance.n_slots for instance in instances)


def neighbours(
    worker: WorkerView, workers: Iterable[WorkerView], on_worker: Mapping[str, Sequence[InstanceView]]
) -> list[InstanceView]:
    """The instances on the other workers that share host memory with `worker`."""
    return [
        instance
        for other in workers
        if other.node and other.node == worker.node and other.address != worker.address
        for instance in on_worker.get(other.address, ())
    ]


def place(
    model: ModelView,
    workers: Iterable[WorkerView],
    on_worker: Mapping[str, Sequence[InstanceView]],
    *,
    now: float,
    may_evict: bool,
    refused: Mapping[str, str],
    protected: frozenset[str],
    min_residency_s: float,
) -> tuple[Placement | None, dict[str, str], list[Option]]:
    """The worker on which `model` is ready first: free slots before idle instances, then the estimate, then the name.

    `on_worker` has the instances by worker address, `refused` workers that are out for now with the reason (back-off),
    `protected` instances that may not be evicted. Returns the placement or ``None``, every worker's reason, and the ways
    that there are, the best one first.
    """
    workers = list(workers)
    best: tuple[tuple[bool, float, float, str], Placement] | None = None
    why: dict[str, str] = {}
    ranked: list[tuple[tuple[bool, float, float, str], Option]] = []
    for worker in workers:
        reason = unfit(model, worker) or refused.get(worker.address)
        evict: tuple[str, ...] = ()
        used_s = 0.0
        if reason is None:
            leaving = victims(
                on_worker.get(worker.address, ()),
                n_slots=worker.slots - model.n_slots,
                nbytes=worker.host_capacity - model.nbytes,
                checkpoint=model.checkpoint_key,
                now=now,
                protected=protected,
                min_residency_s=min_residency_s,
                neighbours=neighbours(worker, workers, on_worker),
            )
            if leaving is None:
                reason = f"its {worker.slots} slots or its memory are taken by instances that stay"
            elif leaving and not may_evict:
                reason = "no free slot, or no free memory"
            elif leaving:
                evict = tuple(instance.id for instance in leaving)
                used_s = max(instance.idle_since or 0.0 for instance in leaving)
        if reason is not None:
            why[worker.address] = reason
            continue
        ready_in_s = load_seconds(model, worker)
        why[worker.address] = f"ready in {format_seconds(ready_in_s)}"
        if evict:
            why[worker.address] += f" after {', '.join(evict)} left"
        rank = (bool(evict), ready_in_s, used_s, worker.name)
        tier = worker.residency.get(model.checkpoint_key, Tier.REMOTE)
        way = Way.EVICT if evict else Way.FREE
        gone = tuple((instance, "") for instance in evict)
        parts = {"read": ready_in_s}
        ranked.append((rank, Option(way, worker.address, worker.name, ready_in_s, tier, leaving=gone, parts=parts)))
        if best is None or rank < best[0]:
            best = rank, Placement(worker.address, ready_in_s, evict, why)
    return (best[1] if best else None), why, [option for _, option in sorted(ranked, key=lambda each: each[0])]
