"""What is kept of each request, each load and each model, for who asks why. Times are seconds since the epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sllmdask.cluster.happenings import Happening
from sllmdask.policy.choice import Choice, Option, Way
from sllmdask.policy.learned import EstimateError

#: Choices, happenings and loads kept of one request or model.
N_CHOICES, N_HAPPENED, N_LOADS = 8, 48, 8


@dataclass
class ChoiceRecord:
    """A choice, as it was made the last of `n_times` one after the other; the first time at `first_at`."""

    choice: Choice
    first_at: float
    at: float
    n_times: int = 1

    @property
    def decided(self) -> tuple[str, ...]:
        """What tells two choices of a request apart."""
        chosen = self.choice.chosen
        return ("", self.choice.reason) if chosen is None else (chosen.way, chosen.worker, chosen.instance)

    @property
    def waits(self) -> bool:
        """Nothing was begun for it."""
        return self.choice.chosen is None or self.choice.chosen.way in (Way.WAIT, Way.COMING)

    @property
    def begins(self) -> bool:
        """It leads to a load."""
        return not self.waits and self.choice.chosen is not None and self.choice.chosen.way is not Way.LIVE


@dataclass
class LoadRecord:
    """One instance, from the decision to load it to its end. `predicted_s` is from then until it serves."""

    instance: str
    model: str
    worker: str
    node: str
    n_slots: int
    nbytes: int
    begun_at: float
    predicted_s: float
    #: Why it is there: the choice that led to it, or ``None``: nobody waited for it.
    choice: Choice | None = None
    option: Option | None = None
    #: Reasons by node, of an instance for which nobody waited.
    why: dict[str, str] = field(default_factory=dict)
    #: It takes over from this instance, whose requests move to it.
    moved_from: str = ""
    loaded_from: str | None = None
    ready_at: float | None = None
    #: Seconds of each phase by the worker's clock; empty until its last byte was there, and when we heard of that, if at once.
    phases: dict[str, Any] = field(default_factory=dict)
    read_at: float | None = None
    #: Why it leaves or has left.
    leaving: str = ""
    failed: str = ""
    ended_at: float | None = None
    #: Its outcome is in the tallies.
    counted: bool = False

    @property
    def tier(self) -> str:
        """Where its bytes came from, or, until that is known, where they were to come from."""
        planned = None if self.option is None or self.option.tier is None else str(self.option.tier)
        return self.loaded_from or planned or "unknown"

    @property
    def ready_s(self) -> float | None:
        return None if self.ready_at is None else self.ready_at - self.begun_at

    @property
    def took_s(self) -> float | None:
        """Seconds until it took requests and its last byte was there: a first token waits for both. ``None``: not known yet."""
        if self.ready_s is None or "read_s" not in self.phases:
            return None
        read_s: float = self.phases["read_s"] if self.read_at is None else self.read_at - self.begun_at
        return max(self.ready_s, read_s)

    @property
    def error_ratio(self) -> float | None:
        """How far the estimate was from what it turned out to be, as a part of that."""
        if self.took_s is None or self.moved_from or not isfinite(self.predicted_s):
            return None
        return EstimateError().after(self.predicted_s, self.took_s).last

    @property
    def outcome(self) -> str:
        if self.failed:
            return "failed"
        if self.ready_at is not None:
            return "loaded"
        return "loading" if self.ended_at is None else "cancelled"


@dataclass
class RequestRecord:
    """One request. `key` is the cluster's name for it, `id` its client's."""

    key: str
    id: str
    model: str
    front_door: str
    priority: int
    arrived_at: float
    n_prompt_tokens: int | None = None
    load_only: bool = False
    state: str = "queued"
    instance: str | None = None
    #: Nodes that it ran on, in order.
    path: list[str] = field(default_factory=list)
    #: What became of each of its moves, as in :class:`~sllmdask.cluster.journal.Journal`, with ``expected_s``, what a move of
    #: its kind was expected to take; and of each loss of its worker or instance.
    moves: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    queue_s: float | None = None
    #: When its instance was gone after its first token, while it waits for another one.
    returned_at: float | None = None
    #: ``hit``, or the tier that its model was loaded from while it waited.
    cold_start: str | None = None
    load: LoadRecord | None = None
    first_token_s: float | None = None
    n_tokens: int | None = None
    error: str | None = None
    ended_at: float | None = None
    choices: deque[ChoiceRecord] = field(default_factory=lambda: deque(maxlen=N_CHOICES))
    n_choices: int = 0
    happened: deque[Happening] = field(default_factory=lambda: deque(maxlen=N_HAPPENED))


def merged_moves(known: Iterable[Mapping[str, Any]], told: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Moves of a request as two know them, each by its epoch, in order; the first tells what the second does not know."""
    moves: dict[int, dict[str, Any]] = {}
    for move in (*known, *told):
        merged = moves.setdefault(move["epoch"], {})
        merged |= {name: value for name, value in move.items() if value is not None or name not in merged}
    return [moves[epoch] for epoch in sorted(moves)]


@dataclass
class ModelRecord:
    """One model, which may not be deployed any more."""

    name: str
    nbytes: int = 0
    n_slots: int = 1
    deployed: bool = False
    #: What was decided for it, by worker, and has not been begun yet.
    planned: dict[str, Choice] = field(default_factory=dict)
    #: Of requests for it, and of those for nobody in particular; not those that found a ready instance.
    choices: deque[ChoiceRecord] = field(default_factory=lambda: deque(maxlen=N_CHOICES))
    #: Loads that have ended, the latest last.
    loads: deque[LoadRecord] = field(default_factory=lambda: deque(maxlen=N_LOADS))
    #: What happened to it and its instances, not to single requests.
    happened: deque[Happening] = field(default_factory=lambda: deque(maxlen=N_HAPPENED))
    failure: LoadRecord | None = None
