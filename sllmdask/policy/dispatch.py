"""Which instance serves this request."""

from __future__ import annotations

from collections.abc import Iterable

from sllmdask.policy.views import InstanceState, InstanceView


def takes_requests(instance: InstanceView, max_requests: int) -> bool:
    """Whether it is ready, stays where it is, and has room."""
    ready = instance.state is InstanceState.READY and not instance.draining and not instance.successor
    return ready and instance.n_expected < max_requests


def nearest(worker: str, instances: Iterable[InstanceView]) -> InstanceView | None:
    """The instance on `worker`, which has most of what was computed for the request; without one, :func:`least_requests`."""
    there = list(instances)
    return least_requests(each for each in there if each.worker == worker) or least_requests(there)


def least_requests(instances: Iterable[InstanceView]) -> InstanceView | None:
    """The instance with the fewest requests; ties by id."""
    return min(instances, key=lambda instance: (instance.n_expected, instance.id), default=None)
