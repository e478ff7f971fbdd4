"""What a rule may see. All frozen; what can be computed is a property, never a stored field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Tier(StrEnum):
    """Where the bytes of a checkpoint are; earlier is nearer to serving."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    PEER = "peer"
    REMOTE = "remote"


class InstanceState(StrEnum):
    """Life of an instance. Its slots are taken in every state but PLANNED, which waits for others to leave."""

    PLANNED = "planned"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True)
class ModelView:
    """A deployed model. `nodes` empty: any worker may run it."""

    name: str
    nbytes: int
    #: What the weights are called in the workers' residency; two models may share a checkpoint. Empty: the name.
    checkpoint: str = ""
    n_slots: int = 1
    target: int = 8
    min_instances: int = 0
    max_instances: int = 10
    #: Seconds an idle instance stays; negative: for ever.
    keep_alive_s: float = 300.0
    #: How the weights are served: an instance of another variant is not an instance of this model any more.
    variant: str = ""
    nodes: tuple[str, ...] = ()
    #: Whether its instances give way to no other model.
    pinned: bool = False
    #: Whether its requests can go on in another instance.
    moves: bool = True
    #: Priors of what a request costs that is computed again elsewhere: seconds per token, and seconds.
    alpha: float = 0.01
    beta: float = 0.1

    @property
    def checkpoint_key(self) -> str:
        return self.checkpoint or self.name


@dataclass(frozen=True)
class WorkerView:
    """A worker as it last reported itself: `residency` by checkpoint (not listed: remote), bytes, bytes per second by tier.

    Workers of one `node` have their host memory in common: `host_capacity` is that of the node, and what one of them pins takes
    room from all. An empty `node`: a worker by itself.
    """

    address: str
    name: str
    slots: int
    host_capacity: int
    node: str = ""
    residency: Mapping[str, Tier] = field(default_factory=dict)
    bytes_per_s: Mapping[Tier, float] = field(default_factory=dict)
    #: Seconds that a load from a tier takes whatever its size.
    overhead_s: Mapping[Tier, float] = field(default_factory=dict)
    version: int = 0
    #: Why it takes nothing new and what it has leaves: an operator asked, its process is about to end. Empty: it stays.
    draining: str = ""


@dataclass(frozen=True)
class HeldInstance:
    """An instance that a worker has when it joins: loaded for a scheduler that is gone, or before the worker was away.

    It is `state`, ready or loading, and has `n_requests` requests. `leaving`: why it is to get no more of them; empty: it stays,
    if its model may have it.
    """

    id: str
    model: str
    n_slots: int
    checkpoint: str
    nbytes: int
    state: InstanceState = InstanceState.READY
    n_requests: int = 0
    leaving: str = ""


@dataclass(frozen=True)
class InstanceView:
    """One copy of a model on one worker, with the requests that were dispatched to it and have not ended."""

    id: str
    model: str
    worker: str
    n_slots: int
    state: InstanceState
    since: float
    #: What it pins in the worker's host memory; instances of one checkpoint share it.
    checkpoint: str = ""
    nbytes: int = 0
    n_requests: int = 0
    #: Requests of other instances that are on their way to it: it keeps room for them, and is not idle.
    n_arriving: int = 0
    #: Requests that its worker has from before this controller, and that no front door has claimed yet.
    n_unclaimed: int = 0
    #: Why it gets no new requests and leaves when it is idle: its model was deleted, it was replaced, an operator asked.
    #: Empty: it stays.
    draining: str = ""
    ready_at: float | None = None
    idle_since: float | None = None
    loaded_from: Tier | None = None
    #: When it was predicted to be ready, while it is not yet.
    ready_by: float | None = None
    #: The instance that its requests are being moved to: it gets no new ones.
    successor: str = ""
    #: The instance whose requests it gets before it is ready.
    moved_from: str = ""
    #: Of one that was moved here: until when it does not move again.
    rests_until: float = 0.0

    @property
    def idle(self) -> bool:
        return self.state is InstanceState.READY and self.n_expected == 0

    @property
    def n_expected(self) -> int:
        """Requests that it has, by its worker's account too, or is about to have."""
        return self.n_requests + self.n_arriving + self.n_unclaimed


@dataclass(frozen=True)
class RequestView:
    """A request as the controller knows it: no prompt, only what placement needs. Higher `priority` goes first.

    An operator's wish that a model be loaded waits in the same queue: `load_only`, since nothing is dispatched when it is its
    turn, and with a `node` if it has to be there.
    """

    id: str
    model: str
    front_door: str
    arrived_at: float
    deadline_at: float
    priority: int = 0
    instance: str | None = None
    load_only: bool = False
    node: str = ""
    #: Tokens of its prompt, as far as they are known.
    n_tokens: int = 0
    dispatched_at: float | None = None
    #: Of a wish: the instance that leaves when it is fulfilled, which counts no more for ``max_instances``; and whether the one
    #: that fulfils it counts it as a request, until it ends, so that it does not leave as idle.
    replaces: str = ""
    holds: bool = False
    #: Tokens of its answer at most; 0: not known, or it has none.
    max_new_tokens: int = 0
    #: Tokens of its answer at `counted_at`, and how many of them it had before it was dispatched to where it is.
    n_output: int = 0
    counted_at: float | None = None
    n_output_before: int = 0
    #: The worker that has most of what was computed for it, where it goes on if it can. Empty: none.
    near: str = ""
