"""The record of one decision: every way to serve a request, its predicted seconds, and why it lost.

The controller makes it, ``explain`` and the simulator read it; nothing else is known of why something was decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from sllmdask.policy.views import Tier


class Way(StrEnum):
    """How a waiting request can get an instance. Of equally fast ones the earlier is taken: it disturbs fewer."""

    #: A ready instance has room.
    LIVE = "live"
    #: An instance that is being loaded will be ready.
    COMING = "coming"
    #: Slots are free: load there.
    FREE = "free"
    #: Load where idle instances leave.
    EVICT = "evict"
    #: Running requests are predicted to end.
    WAIT = "wait"
    #: Running instances go to other workers.
    MIGRATE = "migrate"
    #: Requests of a lower class go back to the queue.
    PREEMPT = "preempt"


@dataclass(frozen=True)
class Option:
    """One way on one worker. Its `parts`, seconds by name, add up to `ready_in_s`, seconds from now to the first token's start.

    Names of parts: ``wait`` (for running requests or for a slot), ``queue`` (loads that were promised before), ``overhead``,
    ``read``, ``move`` (of running requests to elsewhere).
    """

    way: Way
    worker: str
    node: str
    ready_in_s: float
    #: Where the checkpoint comes from; ``None``: it is on the device.
    tier: Tier | None = None
    #: The instance that would serve, or whose end would be waited for.
    instance: str = ""
    #: Instances that would leave, and where to: an empty destination is the host tier.
    leaving: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    #: Why it was not taken; empty: it was.
    lost: str = ""


@dataclass(frozen=True)
class Choice:
    """What was decided for `request` at `at`, seconds of the controller's clock: `chosen`, or to wait, with the `reason`.

    `options` has the best ones, fastest first; `n_more` were left out. `unfit` has reasons by worker address, some of them.
    """

    at: float
    request: str
    model: str
    chosen: Option | None
    reason: str
    options: tuple[Option, ...] = ()
    n_more: int = 0
    unfit: Mapping[str, str] = field(default_factory=dict)
