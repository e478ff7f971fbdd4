"""What the control plane did, one line each in words of users, numbered; the latest are kept for who looks later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sllmdask.units import format_bytes, format_seconds

#: Lines kept about nodes, models and instances, and about single requests: those come much faster.
N_OF_CLUSTER, N_OF_REQUESTS = 2000, 2000


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that was decided, or came of it. `at` is in seconds since the epoch; `facts` are plain types."""

    id: int
    at: float
    event: str
    facts: Mapping[str, Any]

    @property
    def text(self) -> str:
        return _TEXTS[self.event](self.facts)

    def as_row(self) -> dict[str, Any]:
        """One event of ``GET /admin/events``."""
        who = dict.fromkeys(("model", "instance", "node", "request"))
        return {"id": self.id, "time": self.at, "event": self.event, **who, **self.facts, "text": self.text}


class Feed:
    """The latest happenings. Their ids grow by one; requests have a place of their own, so that they do not push out the rest."""

    def __init__(
        self,
        first_id: int = 1,
        n_of_cluster: int = N_OF_CLUSTER,
        n_of_requests: int = N_OF_REQUESTS,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.latest, self._on_news = first_id - 1, on_news
        #: Everything up to here may have been dropped.
        self.dropped_to = 0
        self._of_cluster: deque[Happening] = deque(maxlen=n_of_cluster)
        self._of_requests: deque[Happening] = deque(maxlen=n_of_requests)

    def add(self, at: float, event: str, facts: Mapping[str, Any]) -> Happening:
        self.latest += 1
        happening = Happening(self.latest, at, event, facts)
        kept = self._of_requests if facts.get("request") is not None else self._of_cluster
        if len(kept) == kept.maxlen:
            self.dropped_to = max(self.dropped_to, kept[0].id)
        kept.append(happening)
        self._on_news()
        return happening

    def after(self, since: int, model: str | None = None) -> list[Happening]:
        """Those with a larger id, in order; of one `model`, those that name it."""
        found = []
        for kept in (self._of_cluster, self._of_requests):
            for happening in reversed(kept):
                if happening.id <= since:
                    break
                if model is None or happening.facts.get("model") == model:
                    found.append(happening)
        return sorted(found, key=lambda happening: happening.id)


# --- words -----------------------------------------------------------------------------------------------------------


def _predicted(facts: Mapping[str, Any]) -> str:
    seconds = facts.get("predicted_s")
    return "" if seconds is None else f", predicted to take {format_seconds(seconds)}"


def _source(facts: Mapping[str, Any]) -> str:
    return f" from {facts['tier']}" if facts.get("tier") else ""


def _cause(facts: Mapping[str, Any]) -> str:
    return f": {facts['cause']}" if facts.get("cause") else ""


def _request(facts: Mapping[str, Any]) -> str:
    return f"request {facts['request']} for {facts['model']}"


def _joined(facts: Mapping[str, Any]) -> str:
    slots = f"{facts['slots']} slot{'' if facts['slots'] == 1 else 's'}"
    return f"node {facts['node']} joined: {slots}, {format_bytes(facts['host_capacity'])} of host memory"


def _left(facts: Mapping[str, Any]) -> str:
    return f"node {facts['node']} left" + (f", and with it {', '.join(facts['instances'])}" if facts["instances"] else "")


def _loaded(facts: Mapping[str, Any]) -> str:
    predicted = "" if facts.get("predicted_s") is None else f" ({format_seconds(facts['predicted_s'])} predicted)"
    took = format_seconds(facts["seconds"])
    return f"{facts['instance']} takes requests on node {facts['node']} after {took}{predicted}, loaded{_source(facts)}"


def _migrated(facts: Mapping[str, Any]) -> str:
    predicted = "" if facts["predicted_s"] is None else f" ({format_seconds(facts['predicted_s'])} predicted)"
    where = f"{facts['instance']} has moved from node {facts['node']} to node {facts['to']}"
    return f"{where} after {format_seconds(facts['seconds'])}{predicted}, where it is {facts['successor']}"


def _adopted(facts: Mapping[str, Any]) -> str:
    n = facts["n_requests"]
    return f"{facts['instance']} was on node {facts['node']} before, with {n} request{'' if n == 1 else 's'}"


def _failed(facts: Mapping[str, Any]) -> str:
    what = {"load": "could not be loaded on", "run": "was lost on", "move": "could not be moved from"}[facts["what"]]
    return f"{facts['instance']} {what} node {facts['node']}{_cause(facts)}"


def _dispatched(facts: Mapping[str, Any]) -> str:
    waited = f" after {format_seconds(facts['seconds'])}" if facts["seconds"] >= 0.001 else ""
    loaded = f", loaded from {facts['tier']} meanwhile" if facts.get("tier") else ""
    return f"{_request(facts)} goes to {facts['instance']} on node {facts['node']}{waited}{loaded}"


def _ended(facts: Mapping[str, Any]) -> str:
    tokens = f", {facts['n_tokens']} tokens" if facts.get("n_tokens") is not None else ""
    return f"{_request(facts)} {facts['state']} after {format_seconds(facts['seconds'])}{tokens}{_cause(facts)}"


def _evicted(facts: Mapping[str, Any]) -> str:
    to = f" to {facts['room_for']}" if facts.get("room_for") else ""
    return f"{facts['instance']} gives up its place on node {facts['node']}{to}"


def _preempted(facts: Mapping[str, Any]) -> str:
    n = facts["n_requests"]
    return f"{n} request{'' if n == 1 else 's'} of {facts['instance']} on node {facts['node']} give way{_cause(facts)}"


def move_text(move: Mapping[str, Any]) -> str:
    """What became of a move: a ``MoveRecord`` as plain types, and what else is known of it."""
    where = f"from node {move['source']} to node {move['destination']}"
    if move["outcome"] != "moved":
        why = move["reason"] or ("it was over first" if move["outcome"] == "ended" else "it is not known why")
        return f"did not move {where}: {why} ({move['cause']})"
    steps = move["steps"]
    if move["kind"] == "kv":
        how, unit = f"{' + '.join(map(format_bytes, steps))} of KV", "stage"
    else:
        how, unit = f"{' + '.join(map(str, steps))} tokens computed again", "round"
    expected = "" if move.get("expected_s") is None else f" ({format_seconds(move['expected_s'])} expected)"
    stopped = "" if move["stop_ms"] is None else f", stopped for {move['stop_ms']:.1f} ms"
    pause = "" if move.get("pause_ms") is None else f", its client waited {move['pause_ms']:.1f} ms for the next token"
    took = f"in {len(steps)} {unit}{'' if len(steps) == 1 else 's'}, {format_seconds(move['seconds'])}{expected}"
    return f"moved {where}: {how} {took}{stopped}{pause} ({move['cause']})"


def resume_text(resume: Mapping[str, Any]) -> str:
    """What became of a request that lost its worker or instance."""
    did = {
        None: "is to go on elsewhere",
        "resumed": f"went on on node {resume['to']}",
        "cancelled": "was cancelled before it went on",
        "failed": "could not go on",
    }
    n = resume["n_tokens"]
    had = f"with {n} token{'' if n == 1 else 's'} of its answer" if n else "before its first token"
    pause = "" if resume["pause_ms"] is None else f"; its client waited {resume['pause_ms']:.0f} ms for the next token"
    return f"{did[resume['outcome']]}: its {resume['reason']} on node {resume['node']} was lost {had}{pause}"


_TEXTS = {
    "joined": _joined,
    "left": _left,
    "draining": lambda facts: f"node {facts['node']} takes nothing new, and is emptied{_cause(facts)}",
    "undrained": lambda facts: f"node {facts['node']} is not emptied any more: it takes requests again",
    "deployed": lambda facts: f"{facts['model']} is deployed, {format_bytes(facts['nbytes'])}",
    "deleted": lambda facts: f"{facts['model']} is not deployed any more{_cause(facts)}",
    "placed": lambda facts: f"{facts['instance']} is loaded{_source(facts)} on node {facts['node']}{_predicted(facts)}",
    "loaded": _loaded,
    "adopted": _adopted,
    "failed": _failed,
    "evicted": _evicted,
    "unloading": lambda facts: f"{facts['instance']} is to leave node {facts['node']}{_cause(facts)}",
    "unloaded": lambda facts: f"{facts['instance']} has left node {facts['node']}{_cause(facts)}",
    "moving": lambda facts: (
        f"{facts['instance']} is moved from node {facts['node']} to node {facts['to']}{_predicted(facts)}{_cause(facts)}"
    ),
    "migrated": _migrated,
    "preempted": _preempted,
    "waiting": lambda facts: f"{_request(facts)} waits{_cause(facts)}",
    "dispatched": _dispatched,
    "claimed": lambda facts: f"{_request(facts)} still runs on {facts['instance']}, under a new scheduler",
    "returned": lambda facts: f"{_request(facts)} is back in the queue: its instance was gone",
    "moved": lambda facts: f"{_request(facts)} {move_text(facts['move'])}",
    "stayed": lambda facts: f"{_request(facts)} {move_text(facts['move'])}",
    "resumed": lambda facts: f"{_request(facts)} {resume_text(facts)}",
    "refused": lambda facts: f"{_request(facts)} is refused{_cause(facts)}",
    "ended": _ended,
}
