"""How a front door follows one request from instance to instance: whose tokens count, and whose do not.

The instance that a request comes to speaks on another connection than the one that it leaves, so the first words of the one may
come before the last words of the other. Tokens of the old epoch count until all are there that the request had when it was
stopped; those of the new one wait for that. An instance that speaks under an epoch that is over has a copy that nobody wants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sllmdask.actors.streams import Message
from sllmdask.cluster.journal import Journal


@dataclass(frozen=True)
class Stop:
    """Nobody wants what this instance does for the request under this epoch, or one before."""

    worker: str
    instance: str
    epoch: int


@dataclass
class Following:
    """What is known of a request's moves; the journal's epoch, worker, instance, node, path and moves are changed here.

    Messages are those of :mod:`sllmdask.actors`. Of the source: ``["moving", key, epoch, worker]``, ``["left", key, epoch, new
    epoch, worker, record]``, or ``["stayed", key, epoch, new epoch, instance, worker, record]``, if it keeps the request. Of the
    destination: ``["moved", key, new epoch, output ids, instance, worker, node, record]``.
    """

    journal: Journal
    #: The worker that the request may be on its way to.
    going_to: str | None = None
    #: What instances have said that the request has come to, and their tokens, by epoch.
    _arrivals: list[tuple[Message, list[Message]]] = field(default_factory=list)
    #: What sources have said of moves whose destinations were not followed to yet.
    _records: dict[int, dict[str, Any]] = field(default_factory=dict)
    #: When a token came last, and of which epoch; pauses between epochs by the epoch that they ended in.
    _heard: tuple[float, int] | None = None
    _pauses_ms: dict[int, float] = field(default_factory=dict)
    #: Which worker speaks under which epoch, by what was heard, followed to or not; and the epochs whose worker was lost since.
    _speakers: dict[int, str] = field(default_factory=dict)
    _lost: set[int] = field(default_factory=set)

    @property
    def waits(self) -> bool:
        """Whether the request is elsewhere already, and tokens of the instance before are still to come."""
        return bool(self._arrivals)

    @property
    def lost(self) -> bool:
        """Whether the instance that is followed was lost. Another process may be at the address of its worker by now."""
        return self.journal.epoch in self._lost

    def announced(self, message: Message) -> None:
        """A message of a move came in; it may be followed much later, when the client has read what is before it."""
        match message:
            case ["moved", _, epoch, _, _, worker, *_] | ["stayed", _, _, epoch, _, worker, *_]:
                self._speakers[epoch] = worker

    def lose(self, worker: str) -> None:
        """The connection to `worker` has ended, and with it what it does for the request."""
        self._lost |= {epoch for epoch, speaker in self._speakers.items() if speaker == worker}
        if self.journal.worker == worker:
            self._lost.add(self.journal.epoch)

    def heard(self, epoch: int, at: float) -> None:
        """A message with tokens of `epoch` came in at `at` seconds."""
        if self._heard is not None and epoch > self._heard[1]:
            self._pauses_ms[epoch] = 1e3 * (at - self._heard[0])
        if self._heard is None or epoch >= self._heard[1]:
            self._heard = at, epoch

    def moving(self, epoch: int, worker: str) -> None:
        """The request may go to `worker`."""
        if epoch == self.journal.epoch:
            self.going_to = worker

    def moved(self, message: Message) -> list[Stop]:
        """The request is elsewhere, see :meth:`settled`; whom to stop."""
        _, _, epoch, _, instance, worker, _, _ = message
        if epoch <= self.journal.epoch:
            return [Stop(worker, instance, epoch)]
        # It may go on before the words of the instance in between are here.
        self._arrivals.append((message, []))
        self._arrivals.sort(key=lambda arrival: arrival[0][2])
        return []

    def hold(self, message: Message) -> bool:
        """Whether it is the word of an instance that the request is not followed to yet; it is kept here then."""
        for arrived, held in self._arrivals:
            if message[2] == arrived[2]:
                held.append(message)
                return True
        return False

    def settled(self) -> list[Message]:
        """Once all tokens of before are there: go over to the new instance. What it has said meanwhile can be followed now."""
        if not self._arrivals or len(self.journal.output_ids) < len(self._arrivals[0][0][3]):
            return []
        (_, _, epoch, _, instance, worker, node, record), held = self._arrivals.pop(0)
        self.going_to = None
        record = {**record, "outcome": "moved", "reason": None, **self._records.pop(epoch, {})}
        self._go_to(epoch, worker, instance, node, record)
        return held

    def rest(self) -> list[int]:
        """The tokens that the old instance owes, as the new one knows them."""
        return list(self._arrivals[0][0][3][len(self.journal.output_ids) :]) if self._arrivals else []

    def left(self, epoch: int, record: dict[str, Any]) -> bool:
        """The source has let go of the request, and knows all of the move; whether the destination has been heard already."""
        self._records[epoch] = {**record, "outcome": "moved"}
        for move in self.journal.moves:
            if move["epoch"] == epoch:
                move |= self._records.pop(epoch, {})
        return epoch <= self.journal.epoch or any(message[2] == epoch for message, _ in self._arrivals)

    def stayed(self, message: Message) -> list[Stop]:
        """The request has not moved; whom to stop."""
        _, _, _, epoch, instance, worker, record = message
        journal = self.journal
        if epoch <= journal.epoch:
            return [Stop(worker, instance, epoch)]
        unwanted = self.elsewhere()
        if (journal.worker, journal.instance) != (worker, instance) and journal.worker and journal.instance:
            unwanted.append(Stop(journal.worker, journal.instance, journal.epoch))
        self._arrivals, self.going_to = [], None
        self._go_to(epoch, worker, instance, record["source"], record)
        return unwanted

    @property
    def nearest(self) -> str | None:
        """The worker, besides the journal's, that has most of what was computed for the request."""
        return str(self._arrivals[-1][0][5]) if self._arrivals else self.going_to

    def elsewhere(self) -> list[Stop]:
        """Instances besides the journal's that have the request."""
        return [Stop(message[5], message[4], message[2]) for message, _ in self._arrivals]

    def told(self) -> dict[str, Any] | None:
        """A token of the journal's epoch was accepted: what its client waited for it belongs to the last move, which is returned
        once that is known."""
        pause_ms = self._pauses_ms.pop(self.journal.epoch, None)
        if pause_ms is None or not self.journal.moves:
            return None
        self.journal.moves[-1]["pause_ms"] = pause_ms
        return self.journal.moves[-1]

    def _go_to(self, epoch: int, worker: str, instance: str, node: str, record: dict[str, Any]) -> None:
        journal = self.journal
        journal.epoch = epoch
        if (journal.worker, journal.instance) != (worker, instance):
            journal.worker, journal.instance, journal.node = worker, instance, node
            journal.path.append(node)
        journal.moves.append({**record, "pause_ms": None})
