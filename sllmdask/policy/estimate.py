"""Seconds to load from a tier."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sllmdask.policy.views import ModelView, Tier, WorkerView

#: Bytes per second assumed until a worker has measured its own: memory copies, a SATA disk, a 10 Gbit/s and a 1 Gbit/s link.
PRIOR_BYTES_PER_S: Mapping[Tier, float] = MappingProxyType({Tier.HOST: 8e9, Tier.DISK: 5e8, Tier.PEER: 1e9, Tier.REMOTE: 1e8})


def load_seconds(model: ModelView, worker: WorkerView) -> float:
    """Estimate the time until `model` is ready on `worker`: a fixed overhead, then bytes over bandwidth.

    Returns seconds from now. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``.
    """
    tier = worker.residency.get(model.checkpoint_key, Tier.REMOTE)
    if tier is Tier.DEVICE:
        return 0.0
    bytes_per_s = worker.bytes_per_s.get(tier) or PRIOR_BYTES_PER_S[tier]
    return worker.overhead_s.get(tier, 0.0) + model.nbytes / bytes_per_s


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
