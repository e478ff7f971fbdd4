"""What to do about it. A decision says why: the candidates, their predicted seconds, and why the others lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sllmdask.errors import SllmError
from sllmdask.policy.choice import Choice
from sllmdask.policy.views import Tier


@dataclass(frozen=True)
class Load:
    """Make `model` ready on `worker`. `ready_in_s` is predicted; ``why`` names each other worker and its reason."""

    instance: str
    model: str
    worker: str
    ready_in_s: float
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unload:
    """Demote an instance to the host tier; `forget`: free its host copy too, the model is not deployed any more."""

    instance: str
    model: str
    worker: str
    cause: str
    forget: bool = False


@dataclass(frozen=True)
class Dispatch:
    """Send a request to a ready instance. `loaded_from` is the tier it waited for, ``None`` when it was ready already."""

    request: str
    front_door: str
    instance: str
    worker: str
    node: str
    queue_s: float
    loaded_from: Tier | None = None


@dataclass(frozen=True)
class ReportLoaded:
    """Tell the operator that what `request` wished for is ready. `loaded_from` is the tier, ``None``: it was ready already."""

    request: str
    instance: str
    node: str
    waited_s: float
    loaded_from: Tier | None = None


@dataclass(frozen=True)
class Refuse:
    """Tell the front door, or the operator, that a request will not be served, and the error; ``why`` is by worker address."""

    request: str
    front_door: str
    error: SllmError
    why: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WakeAt:
    """Send a ``TimerFired`` at this time; replaces the wish before it. ``None``: none is needed."""

    at: float | None


@dataclass(frozen=True)
class Chose:
    """For the record: why a request is served the way it is. It comes before what it leads to, and asks for nothing."""

    choice: Choice


@dataclass(frozen=True)
class Migrate:
    """Make `instance` serve on `destination`, as `successor`: load there, move every request, then leave `worker`.

    Answered by ``InstanceMigrated`` or ``MigrationFailed``. `moved_in_s` is predicted.
    """

    instance: str
    successor: str
    model: str
    worker: str
    destination: str
    moved_in_s: float
    cause: str


@dataclass(frozen=True)
class Move:
    """Have a running request go on at `successor`, a ready instance of its model on another worker, or on the same one.

    Answered by ``RequestMoved`` or ``RequestStayed``.
    """

    request: str
    model: str
    instance: str
    worker: str
    successor: str
    destination: str
    cause: str


@dataclass(frozen=True)
class Preempt:
    """Stop `requests` of `instance`, which belong to a lower class; each comes back as ``RequestReturned``."""

    instance: str
    worker: str
    requests: tuple[str, ...]
    cause: str


Decision = Load | Unload | Dispatch | ReportLoaded | Refuse | WakeAt | Chose | Migrate | Move | Preempt
