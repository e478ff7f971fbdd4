"""What is told of a choice: the ways that there were, which was taken, and why the others lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from types import MappingProxyType

from sllmdask.policy.choice import Choice, Option, Way
from sllmdask.policy.decisions import Chose, Decision
from sllmdask.policy.queue import Demand, RequestQueue
from sllmdask.units import format_seconds

#: Options that a record has at the most, and workers that are none.
N_BEST = 16

#: Why a way is taken.
REASONS: Mapping[Way, str] = MappingProxyType(
    {
        Way.LIVE: "a ready instance has room",
        Way.COMING: "an instance that is being loaded is ready the soonest",
        Way.FREE: "loading where slots are free is the soonest",
        Way.EVICT: "loading in the place of what is idle is the soonest",
        Way.WAIT: "to wait for a predicted end is the soonest",
        Way.MIGRATE: "loading where running instances make room is the soonest",
        Way.PREEMPT: "to send requests of a lower class back to the queue is the soonest",
    }
)
_NO_WAY = "there is no way now: every slot is kept, or taken for longer than can be told"


@dataclass
class Ways:
    """What there is for a request, the best first, and why some workers are none of it, by address."""

    options: list[Option] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    #: Whether a worker was seen that can run the model, and of these one that may be asked to load it now.
    any_fit: bool = False
    any_allowed: bool = False
    #: When there may be more of them, by time alone; ``inf``: never.
    again_at: float = inf

    @property
    def open(self) -> list[Option]:
        """Those that can be taken."""
        return [option for option in self.options if not option.lost]

    def soonest(self, *ways: Way) -> Option | None:
        return next((option for option in self.options if option.way in ways and not option.lost), None)


def choice(request: str, model: str, chosen: Option | None, ways: Ways, reason: str, at: float) -> Choice:
    """The record of a decision: the best options, each with why it lost."""
    best = list(islice((option for option in ways.options if option is not chosen), N_BEST - (chosen is not None)))
    told = [option if option.lost else replace(option, lost=_why_lost(option, chosen)) for option in best]
    if chosen is not None:
        told = sorted([chosen, *told], key=lambda option: option.ready_in_s)
    return Choice(at, request, model, chosen, reason, tuple(told), len(ways.options) - len(told), dict(ways.unfit))


def _why_lost(option: Option, chosen: Option | None) -> str:
    if chosen is None:
        return "not taken"
    more_s = option.ready_in_s - chosen.ready_in_s
    if more_s > 0:
        return f"{format_seconds(more_s)} slower"
    return "passed over" if more_s < 0 else "no faster"


class Records:
    """What those who wait were told that they wait for."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        #: An instance, or nothing in particular, by request.
        self._expects: dict[str, str] = {}

    def tell(self, demand: Demand, chosen: Option | None, ways: Ways, expected: str, at: float) -> list[Decision]:
        """Records for those who wait for the same and have none that says so; what it says while they only wait may change, and
        is told of the first one alone."""
        only_waits = chosen is None or chosen.way is Way.WAIT
        decisions: list[Decision] = []
        record = None
        for i, member in enumerate(self._queue.members(demand)):
            known = self._expects.get(member.id)
            if known is None or (known != expected and (i == 0 or not only_waits)):
                reason = REASONS[chosen.way] if chosen is not None else _NO_WAY
                record = record or choice(member.id, member.model, chosen, ways, reason, at)
                decisions.append(Chose(replace(record, request=member.id)))
            self._expects[member.id] = expected
        return decisions

    def says(self, request_id: str, instance_id: str) -> bool:
        """Whether the last record of a request says that it waits for this instance."""
        return self._expects.get(request_id) == instance_id

    def forget(self, request_id: str) -> None:
        """It does not wait any more."""
        self._expects.pop(request_id, None)
