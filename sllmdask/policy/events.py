"""What happened. Every event carries ``at``, seconds of one monotonic clock: the controller has none of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sllmdask.policy.views import HeldInstance, ModelView, RequestView, Tier, WorkerView


@dataclass(frozen=True)
class WorkerJoined:
    """A worker has joined, with `instances` that it has from before: they are adopted."""

    at: float
    worker: WorkerView
    instances: tuple[HeldInstance, ...] = ()


@dataclass(frozen=True)
class WorkerReported:
    """The worker's own account of itself; an older `version` than the last one seen is ignored."""

    at: float
    address: str
    version: int
    residency: Mapping[str, Tier]
    bytes_per_s: Mapping[Tier, float] = field(default_factory=dict)
    overhead_s: Mapping[Tier, float] = field(default_factory=dict)
    #: ``None``: as before.
    host_capacity: int | None = None
    #: The instances that it has; ``None``: not told.
    instances: frozenset[str] | None = None


@dataclass(frozen=True)
class WorkerLeft:
    at: float
    address: str


@dataclass(frozen=True)
class WorkerDrains:
    """A worker is to be empty soon, and takes nothing new: its requests move, its instances leave."""

    at: float
    address: str
    cause: str


@dataclass(frozen=True)
class WorkerUndrained:
    """A worker stays after all."""

    at: float
    address: str


@dataclass(frozen=True)
class WorkersAwaited:
    """The scheduler is a new one, and the workers of these `names` were there before: nothing is loaded until all of them are
    back, or `until`, since what is wanted may be loaded where they are."""

    at: float
    names: frozenset[str]
    until: float


@dataclass(frozen=True)
class ModelDeployed:
    """A model was deployed, or deployed again with other settings."""

    at: float
    model: ModelView


@dataclass(frozen=True)
class ModelDeleted:
    """A model is not deployed any more; `replaced`: it comes back at once, from another checkpoint."""

    at: float
    model: str
    replaced: bool = False


@dataclass(frozen=True)
class RequestArrived:
    at: float
    request: RequestView


@dataclass(frozen=True)
class RequestEnded:
    """Finished, failed or cancelled; waiting or running. `n_tokens` of its answer, 0 where that is not told."""

    at: float
    request: str
    n_tokens: int = 0


@dataclass(frozen=True)
class RequestReturned:
    """The instance of the request is gone: it takes its old place in the queue again, to begin or to go on with what it has.

    It may wait there until `deadline_at`; ``None``: until its deadline of before. The worker `near` has most of what was computed
    for it.
    """

    at: float
    request: str
    deadline_at: float | None = None
    near: str = ""


@dataclass(frozen=True)
class RequestClaimed:
    """A front door says that `request` runs on its ``instance``, where another scheduler sent it; its worker may join later."""

    at: float
    request: RequestView


@dataclass(frozen=True)
class RequestMoved:
    """A running request is answered by another `instance` of its model from now on."""

    at: float
    request: str
    instance: str


@dataclass(frozen=True)
class RequestStayed:
    """A running request that was to move is still answered by the instance that has it; it may be tried again."""

    at: float
    request: str
    reason: str


@dataclass(frozen=True)
class MoveEnded:
    """A move of a running request is over, as the worker says that had it. `outcome`: ``moved``, it is answered by `successor`
    from now on; ``stayed``, by `instance` still; ``ended``, it was over first.

    `kind`: ``kv``, ``tokens``, or empty for one that was refused before that was chosen. `source` and `destination` are
    addresses of workers, `n_at_once` the moves that left the source meanwhile, on average, this one included.
    """

    at: float
    request: str
    model: str
    instance: str
    successor: str
    source: str
    destination: str
    outcome: str
    kind: str
    #: Prompt and answer, and bytes of the KV that they have.
    n_tokens: int
    kv_nbytes: int
    #: Sent in all.
    nbytes: int
    seconds: float
    n_at_once: float = 1.0


@dataclass(frozen=True)
class TokensCounted:
    """How many tokens running requests have made so far, as a front door says."""

    at: float
    n_tokens: Mapping[str, int]


@dataclass(frozen=True)
class InstanceLeaves:
    """An instance gets no more requests, and leaves when it is idle."""

    at: float
    instance: str
    cause: str


@dataclass(frozen=True)
class LoadRequested:
    """An operator wants an instance to be ready; `request` is `load_only`. The model's back-offs end: somebody has had a look."""

    at: float
    request: RequestView


@dataclass(frozen=True)
class UnloadRequested:
    """An operator wants the instances of a model to leave, on one node or (empty) on all: when they are idle, and soon."""

    at: float
    model: str
    node: str = ""


@dataclass(frozen=True)
class FrontDoorLeft:
    at: float
    front_door: str


@dataclass(frozen=True)
class LoadFinished:
    at: float
    instance: str
    loaded_from: Tier


@dataclass(frozen=True)
class LoadFailed:
    at: float
    instance: str
    reason: str


@dataclass(frozen=True)
class UnloadFinished:
    at: float
    instance: str


@dataclass(frozen=True)
class InstanceLost:
    """An instance died by itself on a living worker."""

    at: float
    instance: str
    reason: str


@dataclass(frozen=True)
class InstanceMigrated:
    """`successor` is ready on its worker and has the requests of `instance`, which takes no more and holds nothing."""

    at: float
    instance: str
    successor: str
    loaded_from: Tier


@dataclass(frozen=True)
class MigrationFailed:
    """`instance` goes on with all its requests, `successor` is gone."""

    at: float
    instance: str
    successor: str
    reason: str


@dataclass(frozen=True)
class TimerFired:
    at: float


Event = (
    WorkerJoined
    | WorkerReported
    | WorkerLeft
    | WorkerDrains
    | WorkerUndrained
    | WorkersAwaited
    | ModelDeployed
    | ModelDeleted
    | RequestArrived
    | RequestEnded
    | RequestReturned
    | RequestClaimed
    | RequestMoved
    | RequestStayed
    | MoveEnded
    | TokensCounted
    | InstanceLeaves
    | LoadRequested
    | UnloadRequested
    | FrontDoorLeft
    | LoadFinished
    | LoadFailed
    | UnloadFinished
    | InstanceLost
    | InstanceMigrated
    | MigrationFailed
    | TimerFired
)
