"""What the estimates begin with, and how good they were: the hardware file, what workers measured, what each load came to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sllmdask.config import NodeHardware
from sllmdask.policy.decisions import Load
from sllmdask.policy.learned import EstimateError
from sllmdask.policy.rates import Measured, Rates, hardware_rates, known_rates
from sllmdask.policy.views import InstanceState, InstanceView, Tier, WorkerView

logger = logging.getLogger(__name__)

#: Bytes per second of what is not there: no load comes that way.
_NEVER_BYTES_PER_S = 1.0
#: Weight of one more load in the average of what loads take beside their bytes.
_REST_WEIGHT = 0.3


@dataclass
class _Outcome:
    """A load that was decided at `decided_at` to be ready on `node` after `predicted_s`."""

    node: str
    decided_at: float
    predicted_s: float
    #: Seconds of its phases, by the worker's clock, once every byte is there, and when we heard.
    times: Mapping[str, float] | None = None
    told_at: float = 0.0


@dataclass
class _Node:
    """What was learned of one node, by its name: it stays when the worker is restarted."""

    #: Of all its loads, and by tier.
    error: EstimateError = field(default_factory=EstimateError)
    errors: dict[Tier, EstimateError] = field(default_factory=dict)
    #: Seconds that a load takes beside its queue and its bytes: to tell the worker, to build the model.
    rest_s: dict[Tier, float] = field(default_factory=dict)


class Estimates:
    """Estimates and outcomes of all loads. `hardware` is by the name of a node; it may name some that never join."""

    def __init__(self, hardware: Mapping[str, NodeHardware]) -> None:
        self._hardware = hardware
        self._nodes: dict[str, _Node] = {}
        self._under_way: dict[str, _Outcome] = {}

    # --- what is known before ---

    def rates(self, node: str, account: Mapping[str, Any]) -> Rates:
        """What to believe of the tiers of `node`, whose worker says `account`."""
        spoken = {Tier(tier): speed for tier, speed in account["bandwidth"].items()}
        measured = {
            tier: Measured(speed["bytes_per_s"], speed["overhead_s"], speed["n_loads"])
            for tier, speed in spoken.items()
            if speed["n_loads"]
        }
        given = self._hardware.get(node, NodeHardware())
        hardware = hardware_rates(
            host_bandwidth=given.host_bandwidth,
            disk_bandwidth=given.disk_bandwidth,
            network_bandwidth=given.network_bandwidth,
            pcie_bandwidth=given.pcie_bandwidth,
        )
        # What the operator wrote goes before what a short read found.
        probed = {tier: speed["bytes_per_s"] for tier, speed in spoken.items() if not speed["n_loads"] and tier not in hardware}
        known = known_rates(measured, hardware, probed)
        rest_s = self._nodes[node].rest_s if node in self._nodes else {}
        bytes_per_s = dict(known.bytes_per_s)
        if not account.get("data"):
            # It takes nothing from others, nor gives them anything.
            bytes_per_s[Tier.PEER] = _NEVER_BYTES_PER_S
        return replace(
            known,
            bytes_per_s=bytes_per_s,
            overhead_s={tier: known.overhead_s.get(tier, 0.0) + rest_s.get(tier, 0.0) for tier in {*known.overhead_s, *rest_s}},
        )

    def host_capacity(self, node: str, account: Mapping[str, Any], workers: Iterable[WorkerView]) -> int:
        """Bytes of host memory that the controller may count on: what there is, and no more than the file gives.

        Workers that share their memory may use what the file gives them together.
        """
        there: int = account["tiers"]["host"]["capacity"]
        together = {node, *(worker.name for worker in workers if worker.node == account["node"])}
        sizes = [self._hardware[name].host_size if name in self._hardware else None for name in together]
        given = [size for size in sizes if size is not None]
        return min(there, sum(given)) if len(given) == len(sizes) else there

    def disk_size(self, node: str) -> int | None:
        """Bytes of the disk that copies may take there; ``None``: the file says nothing."""
        return self._hardware[node].disk_size if node in self._hardware else None

    def missing(self, workers: Iterable[WorkerView]) -> list[str]:
        """A warning for each node of the file that is not connected."""
        there = {worker.name for worker in workers}
        return [
            f"the hardware file names node {node!r}, which is not connected" for node in sorted(self._hardware.keys() - there)
        ]

    # --- what came of it ---

    def decided(self, load: Load, node: str, at: float) -> None:
        """A load begins on `node`."""
        self._under_way[load.instance] = _Outcome(node, at, load.ready_in_s)

    def told(self, instance: str, times: Mapping[str, float], at: float) -> None:
        """A worker says that every byte of an instance is there, and how long that took."""
        outcome = self._under_way.get(instance)
        if outcome is not None and outcome.times is None:
            outcome.times, outcome.told_at = times, at

    def settle(self, instances: Mapping[str, InstanceView]) -> list[str]:
        """Record the loads that have come to an end; returns the nodes of which something was learned."""
        learned = []
        for instance_id, outcome in list(self._under_way.items()):
            view = instances.get(instance_id)
            if view is None or (view.state is InstanceState.UNLOADING and view.ready_at is None):
                del self._under_way[instance_id]  # it failed, was called off, or left before its last byte was there
            elif outcome.times is not None and view.ready_at is not None and view.loaded_from is not None:
                del self._under_way[instance_id]
                self._learn(view, view.loaded_from, outcome, outcome.times)
                learned.append(outcome.node)
        return learned

    def _learn(self, view: InstanceView, tier: Tier, outcome: _Outcome, times: Mapping[str, float]) -> None:
        actual_s = max(outcome.told_at, view.ready_at or 0.0) - outcome.decided_at
        known = self._nodes.setdefault(outcome.node, _Node())
        known.error = known.error.after(outcome.predicted_s, actual_s)
        known.errors[tier] = known.errors.get(tier, EstimateError()).after(outcome.predicted_s, actual_s)
        rest_s = max(0.0, actual_s - times.get("queue_s", 0.0) - times.get("bytes_s", 0.0))
        known.rest_s[tier] = known.rest_s.get(tier, rest_s) * (1 - _REST_WEIGHT) + rest_s * _REST_WEIGHT
        logger.info(
            "loaded model=%s worker=%s instance=%s from=%s predicted_s=%.5f actual_s=%.5f",
            view.model,
            view.worker,
            view.id,
            tier,
            outcome.predicted_s,
            actual_s,
        )

    def error_of(self, node: str) -> dict[str, Any]:
        """``n`` loads on `node`, and ``error_ratio``: by how much the last estimates were off, as a share of what it took."""
        known = self._nodes.get(node, _Node())
        return {**_as_row(known.error), "tiers": {str(tier): _as_row(error) for tier, error in known.errors.items()}}


def _as_row(error: EstimateError) -> dict[str, Any]:
    return {"n": error.n, "error_ratio": error.ewma if error.n else None}
