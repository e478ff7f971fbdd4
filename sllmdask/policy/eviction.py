"""Which instances leave when slots are short."""

from __future__ import annotations

from collections.abc import Iterable

from sllmdask.policy.views import InstanceView


def victims(
    instances: Iterable[InstanceView], shortage: int, *, now: float, protected: frozenset[str], min_residency_s: float
) -> list[InstanceView] | None:
    """Idle instances of one worker, least recently used first, that free at least `shortage` slots; ``None``: not enough.

    A busy instance is never a victim, nor one that became ready less than `min_residency_s` ago.
    """
    idle = [
        instance
        for instance in instances
        if instance.idle and instance.id not in protected and now >= (instance.ready_at or 0.0) + min_residency_s
    ]
    idle.sort(key=lambda instance: (instance.idle_since or 0.0, instance.id))
    chosen: list[InstanceView] = []
    for instance in idle:
        if shortage <= 0:
            break
        chosen.append(instance)
        shortage -= instance.n_slots
    return chosen if shortage <= 0 else None
