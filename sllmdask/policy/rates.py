"""Which bandwidth is believed, per (node, tier): the measured one, which takes over from a prior load by load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, isfinite

from sllmdask.policy.estimate import PRIOR_BYTES_PER_S
from sllmdask.policy.views import Tier

#: Weight of a prior after one real load; it halves with each further one, so that after five it moves an estimate by 1/32 of
#: how far it was off, taken as a ratio.
_PRIOR_WEIGHT = 0.5


class RateSource(StrEnum):
    """Where a bandwidth is known from."""

    #: Real loads.
    MEASURED = "measured"
    #: Direct reads of the store's own path.
    PROBE = "probe"
    #: The hardware file.
    HARDWARE = "hardware"
    #: Nobody said anything: :data:`~sllmdask.policy.estimate.PRIOR_BYTES_PER_S`.
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Measured:
    """What `n_loads` real loads from one tier say: each took ``overhead_s + nbytes / bytes_per_s`` seconds."""

    bytes_per_s: float
    overhead_s: float = 0.0
    n_loads: int = 1


@dataclass(frozen=True)
class Rates:
    """What is believed of one worker, by tier. The first two are those of a ``WorkerView``."""

    bytes_per_s: Mapping[Tier, float] = field(default_factory=dict)
    overhead_s: Mapping[Tier, float] = field(default_factory=dict)
    source: Mapping[Tier, RateSource] = field(default_factory=dict)


def hardware_rates(
    *,
    host_bandwidth: float | None = None,
    disk_bandwidth: float | None = None,
    network_bandwidth: float | None = None,
    pcie_bandwidth: float | None = None,
) -> dict[Tier, float]:
    """Bytes per second by tier, as a node's entry of the hardware file gives them; what it leaves out is left out.

    The network brings what peers and remote servers send; `pcie_bandwidth` is that of the copy into the device.
    """
    given = {
        Tier.DEVICE: pcie_bandwidth,
        Tier.HOST: host_bandwidth,
        Tier.DISK: disk_bandwidth,
        Tier.PEER: network_bandwidth,
        Tier.REMOTE: network_bandwidth,
    }
    return {tier: each for tier, each in given.items() if each is not None and _usable(each)}


def known_rates(measured: Mapping[Tier, Measured], hardware: Mapping[Tier, float], probe: Mapping[Tier, float]) -> Rates:
    """What to believe of each tier: what real loads measured, else the `probe`, else the `hardware` file, else a constant.

    A prior that somebody gave or measured is not dropped at the first load, which may have been a lucky one: its weight halves
    with each load, in the logarithm of the rate, so that it makes no difference whether it was too high or too low. A path
    through host memory is never faster than the file says that this is. Of :attr:`Tier.DEVICE` only what is known is told; the
    loads from host memory measure it.
    """
    bytes_per_s: dict[Tier, float] = {}
    source: dict[Tier, RateSource] = {}
    through_host = hardware.get(Tier.HOST) or inf
    for tier in Tier:
        seen = measured.get(tier)
        if tier is Tier.DEVICE and seen is None:
            seen = measured.get(Tier.HOST)
        if prior := probe.get(tier):
            source[tier] = RateSource.PROBE
        elif prior := hardware.get(tier):
            source[tier] = RateSource.HARDWARE
        elif prior := PRIOR_BYTES_PER_S.get(tier):
            source[tier] = RateSource.ASSUMED
        else:
            continue
        if tier not in (Tier.DEVICE, Tier.HOST):
            prior = min(prior, through_host)
        bytes_per_s[tier] = prior
        if seen is not None and seen.n_loads > 0 and _usable(seen.bytes_per_s):
            weight = 0.0 if source[tier] is RateSource.ASSUMED else _PRIOR_WEIGHT**seen.n_loads
            bytes_per_s[tier] = prior**weight * seen.bytes_per_s ** (1 - weight)
            source[tier] = RateSource.MEASURED
    overhead_s = {tier: seen.overhead_s for tier, seen in measured.items() if seen.n_loads > 0 and seen.overhead_s > 0}
    return Rates(bytes_per_s, overhead_s, source)


def _usable(bytes_per_s: float) -> bool:
    return isfinite(bytes_per_s) and bytes_per_s > 0
