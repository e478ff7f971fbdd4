"""Seconds until a checkpoint is ready on a worker, from the tier that is fastest; seconds to resume a request elsewhere.

Source: ServerlessLLM (OSDI '24), section 6: the loading time ``q + n / b``, where the slowest stage of a pipelined path counts,
and the time to resume, ``a * n_tokens + b``. The fixed overhead is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from types import MappingProxyType

from sllmdask.policy.views import ModelView, Tier, WorkerView

#: Bytes per second assumed until a worker has measured its own: memory copies, a SATA disk, a 10 Gbit/s and a 1 Gbit/s link.
PRIOR_BYTES_PER_S: Mapping[Tier, float] = MappingProxyType({Tier.HOST: 8e9, Tier.DISK: 5e8, Tier.PEER: 1e9, Tier.REMOTE: 1e8})


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Supplier:
    """A worker that can send a checkpoint to others, out of its `tier`, at up to `bytes_per_s`."""

    address: str
    tier: Tier
    bytes_per_s: float


def suppliers(checkpoint: str, workers: Iterable[WorkerView]) -> tuple[Supplier, ...]:
    """The two of `workers` that can send `checkpoint` the fastest, from memory or disk. Two, since none supplies itself."""
    able = [
        Supplier(worker.address, tier, _rate(worker, tier))
        for worker in workers
        if (tier := worker.residency.get(checkpoint)) in (Tier.HOST, Tier.DISK)
    ]
    return tuple(nsmallest(2, able, key=lambda each: (-each.bytes_per_s, each.address)))


def load_parts(
    model: ModelView,
    worker: WorkerView,
    *,
    queue_s: float | Mapping[Tier, float] = 0.0,
    peers: Sequence[Supplier] = (),
) -> tuple[Tier | None, dict[str, float]]:
    """The tier that supplies `model` to `worker` the soonest, and seconds by name that add up to the time until it is ready.

    The names are ``queue`` (loads that were promised before), ``overhead`` and ``read``. The tier is ``None``, and all are 0,
    for a checkpoint that is on the device. `queue_s` is by tier, or one figure for whichever it is; `peers` are the model's
    :func:`suppliers`. Of equally fast tiers the nearer one is told.

    A worker's ``bytes_per_s`` of :attr:`Tier.DEVICE`, where it has one, is that of the copy into the device, with which every
    path ends. What comes from elsewhere goes through host memory; the disk's copy of it is written beside, and is no stage.
    """
    own = worker.residency.get(model.checkpoint_key, Tier.REMOTE)
    if own is Tier.DEVICE:
        return None, {"queue": 0.0, "overhead": 0.0, "read": 0.0}
    limits = {own: inf}
    peer = next((each for each in peers if each.address != worker.address), None)
    # What is on its own disk, a worker reads from there.
    if peer is not None and own is Tier.REMOTE:
        limits[Tier.PEER] = peer.bytes_per_s
    best: tuple[float, int, Tier, dict[str, float]] | None = None
    for tier, bytes_per_s in limits.items():
        parts = {
            "queue": queue_s.get(tier, 0.0) if isinstance(queue_s, Mapping) else queue_s,
            "overhead": worker.overhead_s.get(tier, 0.0),
            "read": model.nbytes / min(bytes_per_s, _rate(worker, tier)),
        }
        found = sum(parts.values()), _NEARNESS[tier], tier, parts
        if best is None or found[:2] < best[:2]:
            best = found
    assert best is not None
    return best[2], best[3]


def load_seconds(
    model: ModelView,
    worker: WorkerView,
    *,
    queue_s: float | Mapping[Tier, float] = 0.0,
    peers: Sequence[Supplier] = (),
) -> float:
    """The time until `model` is ready on `worker`, in seconds from now: the sum of :func:`load_parts`."""
    return sum(load_parts(model, worker, queue_s=queue_s, peers=peers)[1].values())


_NEARNESS: Mapping[Tier, int] = MappingProxyType({tier: i for i, tier in enumerate(Tier)})


def _rate(worker: WorkerView, tier: Tier) -> float:
    """Bytes per second from `tier` to where the model is served."""
    bytes_per_s = worker.bytes_per_s.get(tier) or PRIOR_BYTES_PER_S[tier]
    return min(bytes_per_s, worker.bytes_per_s.get(Tier.DEVICE) or inf)


# --- moving ----------------------------------------------------------------------------------------------------------


def resume_seconds(n_tokens: int, alpha: float, beta: float) -> float:
    """Seconds until the KV of `n_tokens` is computed again at the destination: `alpha` for each token, and `beta`."""
    return alpha * n_tokens + beta


# --- forms of a checkpoint -------------------------------------------------------------------------------------------

#: Bytes of weights per second that all threads of a worker decompress together, assumed until it has done so: two cores' worth.
PRIOR_DECODE_BYTES_PER_S = 12e9


def smaller_is_faster(
    nbytes: int, stored_nbytes: int, bytes_per_s: float | None, smaller_bytes_per_s: float | None, tier: Tier = Tier.DISK
) -> bool:
    """Whether `nbytes` of weights come sooner from their compressed form, of `stored_nbytes`, than as they are.

    `bytes_per_s` and `smaller_bytes_per_s` were measured with either form, in bytes of weights; ``None``: not yet. What was not
    measured is assumed: stages that overlap last as long as the slowest of them, here the tier or the decompression.
    """
    link = bytes_per_s or PRIOR_BYTES_PER_S[tier]
    as_is_s = nbytes / link
    smaller_s = (
        nbytes / smaller_bytes_per_s if smaller_bytes_per_s else max(stored_nbytes / link, nbytes / PRIOR_DECODE_BYTES_PER_S)
    )
    return smaller_s < as_is_s
