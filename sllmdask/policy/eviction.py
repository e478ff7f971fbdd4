"""Which instances leave when slots are short."""

from __future__ import annotations

from collections.abc import Sequence

from sllmdask.policy.views import InstanceView


def pinned_bytes(instances: Sequence[InstanceView], checkpoint: str) -> int:
    """Bytes of host memory that `instances` of one worker pin beside `checkpoint`; a shared checkpoint counts once."""
    return sum({each.checkpoint: each.nbytes for each in instances if each.checkpoint != checkpoint}.values())


def victims(
    instances: Sequence[InstanceView],
    *,
    n_slots: int,
    nbytes: int,
    checkpoint: str,
    now: float,
    protected: frozenset[str],
    min_residency_s: float,
) -> list[InstanceView] | None:
    """Idle instances of one worker, least recently used first, without which the others take at most `n_slots` slots, and
    at most `nbytes` bytes of host memory beside `checkpoint`; ``None``: not to be had.

    A busy instance is never a victim, nor one that became ready less than `min_residency_s` ago.
    """
    idle = [
        instance
        for instance in instances
        if instance.idle and instance.id not in protected and now >= (instance.ready_at or 0.0) + min_residency_s
    ]
    idle.sort(key=lambda instance: (instance.idle_since or 0.0, instance.id))
    chosen: list[InstanceView] = []
    staying = list(instances)
    while sum(each.n_slots for each in staying) > n_slots or pinned_bytes(staying, checkpoint) > nbytes:
        if not idle:
            return None
        chosen.append(idle.pop(0))
        staying.remove(chosen[-1])
    return chosen
