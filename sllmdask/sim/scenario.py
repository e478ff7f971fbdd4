"""A simulation as a file describes it: the cluster, its models, who asks, what it costs, which policies are compared.

``configs/sim/*.yaml`` are examples with every key. An unknown key is refused, naming the nearest known one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sllmdask.config import MAX_COUNT, Bytes, BytesPerSecond, Frozen, Seconds, parse, read_file
from sllmdask.errors import ConfigError
from sllmdask.policy.views import ModelView, Tier
from sllmdask.sim.effects import ClusterCosts, Lengths, NodeSpec, TierCosts
from sllmdask.sim.links import Sharing
from sllmdask.sim.policies import POLICIES, unknown_policy
from sllmdask.sim.serving import StepCosts
from sllmdask.sim.workload import ArrivalProcess, LengthKind, Popularity, Request, lengths, trace

GB = 1024**3


class TierSpec(Frozen):
    """What it takes to load from one tier of a node."""

    #: Bytes per second of one lane.
    bandwidth: BytesPerSecond = Field(gt=0)
    #: What workers are told that it is; 0: what it is.
    expected_bandwidth: BytesPerSecond = Field(default=0.0, ge=0)
    #: Seconds that a load takes whatever its size.
    overhead: Seconds = Field(default=0.0, ge=0)
    #: Loads that a node does at once at full speed; further ones take turns, or share.
    lanes: int = Field(default=1, ge=1, le=MAX_COUNT)


class StoredTierSpec(TierSpec):
    """A tier that holds checkpoints."""

    #: Bytes that it holds.
    size: Bytes = Field(ge=1)


class WorkersSpec(Frozen):
    """The cluster: equal workers."""

    count: int = Field(ge=1, le=10_000)
    #: Instances' worth of compute of one worker.
    slots: int = Field(default=1, ge=1, le=MAX_COUNT)
    #: Workers that share a node: its memory, its disk, its links.
    per_node: int = Field(default=1, ge=1, le=MAX_COUNT)
    host: StoredTierSpec
    disk: StoredTierSpec
    #: What comes from other nodes; left out: nothing does.
    peer: TierSpec | None = None
    remote: TierSpec = TierSpec(bandwidth=GB / 8)
    #: What loads do that read the same tier of a node: one after another, or all at once at a share of the bandwidth.
    sharing: Sharing = "turns"
    #: Spread of real over nominal loading times: the standard deviation of the logarithm.
    noise: float = Field(default=0.0, ge=0, le=2)


class ModelSpec(Frozen):
    """Equal models: ``NAME-0``, ``NAME-1`` and so on; just ``NAME`` if there is one."""

    name: str = Field(min_length=1)
    count: int = Field(default=1, ge=1, le=100_000)
    size: Bytes = Field(ge=1)
    #: Slots that an instance takes.
    num_gpus: int = Field(default=1, ge=1, le=MAX_COUNT)
    #: Nodes that have it on disk from the beginning, in turn; nodes that have it in host memory as well.
    disk_copies: int = Field(default=1, ge=0)
    host_copies: int = Field(default=0, ge=0)
    #: As in a deployment.
    target: int = Field(default=8, ge=1, le=MAX_COUNT)
    min_instances: int = Field(default=0, ge=0, le=MAX_COUNT)
    max_instances: int = Field(default=10, ge=1, le=MAX_COUNT)
    keep_alive: Seconds = 300.0


class WorkloadSpec(Frozen):
    """Requests."""

    #: Requests per second, over all models.
    rps: float = Field(gt=0, le=1e5)
    duration: Seconds = Field(gt=0)
    #: Seconds of the beginning whose requests are served and not counted.
    warm_up: Seconds = Field(default=0.0, ge=0)
    arrivals: ArrivalProcess = "gamma"
    #: Coefficient of variation of the seconds between two arrivals for one model; 1 is Poisson, 8 is very bursty.
    cv: float = Field(default=8.0, gt=0, le=100)
    popularity: Popularity = "uniform"
    #: Exponent of Zipf's law.
    alpha: float = Field(default=1.0, ge=0, le=10)
    lengths: LengthKind = "sharegpt"
    #: Of ``fixed`` and ``lognormal``: the mean; `sigma` is the standard deviation of the logarithm.
    prompt_tokens: float = Field(default=128.0, ge=1)
    output_tokens: float = Field(default=128.0, ge=1)
    sigma: float = Field(default=0.8, ge=0, le=5)
    #: Tokens of the models' window: longer requests are cut.
    context: int = Field(default=2048, ge=2)

    @model_validator(mode="after")
    def _warm_up_is_a_part(self) -> Self:
        if self.warm_up >= self.duration:
            raise ValueError(f"warm_up ({self.warm_up:g} s) is not shorter than duration ({self.duration:g} s)")
        return self


class CostsSpec(Frozen):
    """What an engine's steps and a move cost. The defaults are LLaMA-7B on an A10, as Llumnix (OSDI '24) measured it."""

    prefill: Seconds = Field(default=0.002, ge=0)
    prefill_per_token: Seconds = Field(default=0.000235, ge=0)
    decode: Seconds = Field(default=0.026, gt=0)
    decode_per_sequence: Seconds = Field(default=0.00012, ge=0)
    decode_per_token: Seconds = Field(default=0.0000021, ge=0)
    #: Tokens whose keys and values one instance can hold.
    kv_tokens: int = Field(default=851 * 16, ge=1)
    unload: Seconds = Field(default=0.05, ge=0)
    #: A move by copying: seconds per token beside decoding, then those in which nobody decodes.
    copy_per_token: Seconds = Field(default=0.0002, ge=0)
    copy_pause: Seconds = Field(default=0.02, ge=0)
    #: Tokens that a move by computing again leaves for the pause.
    migration_delta: int = Field(default=20, ge=0)


class ControllerSpec(Frozen):
    """The controller's settings, by the names that they have under ``scheduler:`` and ``engine:``."""

    request_deadline: Seconds = Field(default=300.0, gt=0)
    max_queue: int = Field(default=100_000, ge=1)
    min_residency: Seconds = Field(default=0.0, ge=0)
    patience: Seconds = Field(default=10.0, ge=0)
    #: Requests that one instance works on at once.
    max_running: int = Field(default=64, ge=1)


class Scenario(Frozen):
    """One file of ``configs/sim/``."""

    workers: WorkersSpec
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    workload: WorkloadSpec
    costs: CostsSpec = CostsSpec()
    scheduler: ControllerSpec = ControllerSpec()
    policies: tuple[str, ...] = tuple(POLICIES)
    #: Each seed is a workload of its own, the same one for all policies.
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        """A number of seeds is those from 0 on."""
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("policies")
    @classmethod
    def _known(cls, value: tuple[str, ...], _: ValidationInfo) -> tuple[str, ...]:
        for name in value:
            if name not in POLICIES:
                raise ValueError(unknown_policy(name))
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [spec.name for spec in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: the names {', '.join(names)} are not all different")
        n_nodes = -(-self.workers.count // self.workers.per_node)
        for spec in self.models:
            if spec.num_gpus > self.workers.slots:
                raise ValueError(f"model {spec.name} needs {spec.num_gpus} slots, and a worker has {self.workers.slots}")
            if spec.size > self.workers.host.size:
                raise ValueError(f"model {spec.name} is larger than the host memory of a node")
            if max(spec.disk_copies, spec.host_copies) > n_nodes:
                raise ValueError(f"model {spec.name} has more copies than there are nodes ({n_nodes})")
        for tier, copies in (("host", "host_copies"), ("disk", "disk_copies")):
            nbytes = max(sum(each.values()) for each in self._resident(copies))
            if nbytes > getattr(self.workers, tier).size:
                raise ValueError(f"the {copies} of the models do not fit: a node's {tier} would have to hold {nbytes} bytes")
        return self

    # --- what the simulator needs ---

    def model_views(self) -> list[ModelView]:
        return [
            ModelView(
                name=name,
                nbytes=spec.size,
                n_slots=spec.num_gpus,
                target=spec.target,
                min_instances=spec.min_instances,
                max_instances=spec.max_instances,
                keep_alive_s=spec.keep_alive,
                alpha=self.costs.prefill_per_token,
                beta=self.costs.prefill + self.costs.prefill_per_token * self.costs.migration_delta,
            )
            for spec in self.models
            for name in _names(spec)
        ]

    def nodes(self) -> list[NodeSpec]:
        workers = self.workers
        n_nodes = -(-workers.count // workers.per_node)
        on_disk, in_host = self._resident("disk_copies"), self._resident("host_copies")
        tiers = self._tiers()
        return [
            NodeSpec(
                name=f"node-{node}",
                workers=tuple((f"sim://{i}", str(i)) for i in range(workers.count) if i // workers.per_node == node),
                slots=workers.slots,
                host_nbytes=workers.host.size,
                disk_nbytes=workers.disk.size,
                tiers=tiers,
                on_disk=on_disk[node],
                in_host=in_host[node],
            )
            for node in range(n_nodes)
        ]

    def cluster_costs(self, *, workers_measure: bool) -> ClusterCosts:
        costs = self.costs
        steps = StepCosts(
            prefill_s=costs.prefill,
            prefill_s_per_token=costs.prefill_per_token,
            decode_s=costs.decode,
            decode_s_per_sequence=costs.decode_per_sequence,
            decode_s_per_token=costs.decode_per_token,
            kv_tokens=costs.kv_tokens,
        )
        return ClusterCosts(
            steps=steps,
            unload_s=costs.unload,
            copy_s_per_token=costs.copy_per_token,
            copy_pause_s=costs.copy_pause,
            resume_tail_tokens=costs.migration_delta,
            sharing=self.workers.sharing,
            noise=self.workers.noise,
            workers_measure=workers_measure,
        )

    def requests(self, seed: int) -> list[Request]:
        spec = self.workload

        def draw(rng: Random) -> Lengths:
            return lengths(spec.lengths, spec.prompt_tokens, spec.output_tokens, spec.sigma, spec.context, rng)

        return trace(
            [view.name for view in self.model_views()],
            rps=spec.rps,
            duration_s=spec.duration,
            process=spec.arrivals,
            cv=spec.cv,
            popularity=spec.popularity,
            alpha=spec.alpha,
            draw_lengths=draw,
            seed=seed,
        )

    def _resident(self, copies: str) -> list[dict[str, int]]:
        """Bytes by checkpoint, for each node: the copies go to the nodes in turn."""
        n_nodes = -(-self.workers.count // self.workers.per_node)
        nodes: list[dict[str, int]] = [{} for _ in range(n_nodes)]
        n_placed = 0
        for spec in self.models:
            for name in _names(spec):
                for _ in range(getattr(spec, copies)):
                    nodes[n_placed % n_nodes][name] = spec.size
                    n_placed += 1
        return nodes

    def _tiers(self) -> dict[Tier, TierCosts]:
        """What comes from elsewhere goes through host memory to the device: the slower of the two counts."""
        workers = self.workers
        specs = {Tier.HOST: workers.host, Tier.DISK: workers.disk, Tier.PEER: workers.peer, Tier.REMOTE: workers.remote}
        return {
            tier: TierCosts(
                bytes_per_s=min(spec.bandwidth, workers.host.bandwidth),
                overhead_s=spec.overhead,
                lanes=spec.lanes,
                expected_bytes_per_s=spec.expected_bandwidth or None,
            )
            for tier, spec in specs.items()
            if spec is not None
        }


def _names(spec: ModelSpec) -> list[str]:
    return [spec.name] if spec.count == 1 else [f"{spec.name}-{i}" for i in range(spec.count)]


def read_scenario(path: str | os.PathLike[str]) -> Scenario:
    """The simulation that a file describes; raises :class:`ConfigError`."""
    return parse(Scenario, read_file(path), f"the simulation {path}")


# --- variations ------------------------------------------------------------------------------------------------------

#: Where ``rps`` and its like are looked for when no part is named.
_PARTS = ("workload", "workers", "costs", "scheduler")


def read_variation(text: str) -> tuple[str, list[int | float | str]]:
    """``rps=0.2,0.4`` as the key and its values; raises :class:`ConfigError`."""
    key, equals, values = text.partition("=")
    found = [_plain(value.strip()) for value in values.split(",") if value.strip()]
    if not equals or not key.strip() or not found:
        raise ConfigError(f"{text!r} is not a variation; write for example rps=0.2,0.4,0.8")
    return key.strip(), found


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def varied(scenario: Scenario, key: str, value: Any) -> Scenario:
    """`scenario` with another `value` of `key`: ``rps``, or with its part, ``workload.rps``; raises :class:`ConfigError`."""
    part, dot, name = key.rpartition(".")
    if not dot:
        part, name = next((each for each in _PARTS if key in _fields(scenario, each)), ""), key
    if part not in _PARTS or name not in _fields(scenario, part):
        known = [f"{each}.{field}" for each in _PARTS for field in _fields(scenario, each)]
        bare = {field.partition(".")[2]: field for field in known}
        near = difflib.get_close_matches(key, known, n=1) or [
            bare[each] for each in difflib.get_close_matches(name, list(bare), n=1)
        ]
        hint = f"did you mean {near[0]!r}?" if near else f"what can be varied: {', '.join(known)}."
        raise ConfigError(f"There is no {key!r} to vary; {hint}")
    data = scenario.model_dump(mode="json")
    data[part][name] = value
    return parse(Scenario, data, f"the simulation with {key} {value}")


def with_choices(scenario: Scenario, policies: Sequence[str], seeds: int | None) -> Scenario:
    """`scenario` with other policies, and another number of seeds, where they are given; raises :class:`ConfigError`."""
    changes: Mapping[str, Any] = {"policies": list(policies)} if policies else {}
    if seeds is not None:
        changes = {**changes, "seeds": seeds}
    return parse(Scenario, {**scenario.model_dump(mode="json"), **changes}, "the choice")


def _fields(scenario: Scenario, part: str) -> list[str]:
    return list(type(getattr(scenario, part)).model_fields)
