"""Which instance serves this request."""

from __future__ import annotations

from collections.abc import Iterable

from sllmdask.policy.views import InstanceState, InstanceView


def least_requests(instances: Iterable[InstanceView], max_requests: int, closed: frozenset[str]) -> InstanceView | None:
    """The ready instance with the fewest requests, of those with room and not `closed` to newcomers; ties by id."""
    open_ones = [
        instance
        for instance in instances
        if instance.state is InstanceState.READY
        and not instance.draining
        and instance.id not in closed
        and instance.n_requests < max_requests
    ]
    return min(open_ones, key=lambda instance: (instance.n_requests, instance.id), default=None)
