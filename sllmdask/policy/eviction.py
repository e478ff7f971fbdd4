"""Which instances leave when slots are short, and which checkpoints leave host memory when that is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sllmdask.policy.views import InstanceView


def pinned_bytes(instances: Sequence[InstanceView], checkpoint: str) -> int:
    """Bytes of host memory that `instances` of one node pin beside `checkpoint`; a shared checkpoint counts once."""
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
    neighbours: Sequence[InstanceView] = (),
) -> list[InstanceView] | None:
    """Idle instances, least recently used first, without which the others of a worker take at most `n_slots` slots, and those
    of its node at most `nbytes` bytes of host memory beside `checkpoint`; ``None``: not to be had.

    `instances` are the worker's, `neighbours` those of other workers of its node, which take no slot of it. A busy instance is
    never a victim, nor one that became ready less than `min_residency_s` ago.
    """

    def may_leave(instance: InstanceView) -> bool:
        settled = now >= (instance.ready_at or 0.0) + min_residency_s
        return instance.idle and instance.id not in protected and settled

    chosen: list[InstanceView] = []
    staying, beside = list(instances), list(neighbours)
    while True:
        n_missing = sum(each.n_slots for each in staying) - n_slots
        if n_missing <= 0 and pinned_bytes([*staying, *beside], checkpoint) <= nbytes:
            return chosen
        # Slots are the worker's own, memory is the node's.
        idle = [each for each in (staying if n_missing > 0 else [*staying, *beside]) if may_leave(each)]
        if not idle:
            return None
        leaving = min(idle, key=lambda instance: (instance.idle_since or 0.0, instance.id))
        chosen.append(leaving)
        (staying if leaving in staying else beside).remove(leaving)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A checkpoint in host memory that nobody uses; what is pinned is in use.

    `nbytes` of its `total_nbytes` are resident; to read all of it again takes `reload_s`. `floor` is the worth of the dearest
    copy that had left when this one was last used, `last_used` grows with every use of any copy.
    """

    key: str
    nbytes: int
    total_nbytes: int
    reload_s: float
    uses: int
    floor: float
    last_used: int

    @property
    def worth(self) -> float:
        """Seconds of reading that a byte is expected to save: more is kept longer.

        Source: GreedyDual-Size with frequency (Cherkasova 1998; Cao and Irani, USITS '97), whose floor lets a copy that was
        popular long ago age.
        """
        return self.floor + self.uses * self.reload_s / self.total_nbytes


@dataclass(frozen=True, slots=True)
class Departure:
    """`key` gives up its last `nbytes` bytes, each of which was worth `worth`."""

    key: str
    nbytes: int
    worth: float


def departures(copies: Sequence[HostCopy], nbytes: int, *, granule: int | None = None) -> list[Departure] | None:
    """What leaves so that at least `nbytes` bytes come free; ``None``: there is not that much.

    The cheapest bytes leave first, of equal ones those that were used longest ago. With a `granule`, of
    which every copy is a multiple, the last copy loses only as many granules as it must: then no choice of bytes is worth less
    (the fractional knapsack, Dantzig 1957). Without, whole copies leave, and one that turns out not to be needed stays.
    """
    chosen: list[Departure] = []
    missing = nbytes
    for copy in sorted(copies, key=lambda copy: (copy.worth, copy.last_used, copy.key)):
        if missing <= 0:
            break
        lost = copy.nbytes if granule is None else min(copy.nbytes, -(-missing // granule) * granule)
        chosen.append(Departure(copy.key, lost, copy.worth))
        missing -= lost
    if missing > 0:
        return None
    if granule is None:
        for each in reversed(chosen[:]):
            if missing + each.nbytes <= 0:
                chosen.remove(each)
                missing += each.nbytes
    return chosen
