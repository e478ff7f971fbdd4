"""Seconds to load from a tier."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sllmdask.policy.views import ModelView, Tier, WorkerView

#: Bytes per second assumed until a worker has measured its own: memory copies, a SATA disk, a 1 Gbit/s link.
PRIOR_BYTES_PER_S: Mapping[Tier, float] = MappingProxyType({Tier.HOST: 8e9, Tier.DISK: 5e8, Tier.REMOTE: 1e8})


def load_seconds(model: ModelView, worker: WorkerView) -> float:
    """Estimate the time until `model` is ready on `worker`: a fixed overhead, then bytes over bandwidth.

    Returns seconds from now. Source: ServerlessLLM (OSDI '24), loading-time estimate ``q + n / b``.
    """
    tier = worker.residency.get(model.checkpoint_key, Tier.REMOTE)
    if tier is Tier.DEVICE:
        return 0.0
    bytes_per_s = worker.bytes_per_s.get(tier) or PRIOR_BYTES_PER_S[tier]
    return worker.overhead_s.get(tier, 0.0) + model.nbytes / bytes_per_s
