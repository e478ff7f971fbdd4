"""The protocol of a move, explored: every order of events, with messages that are lost, come late, or come again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sllmdask.batching.handover import (
    BEGIN,
    FAILED,
    SOURCE,
    TARGET,
    TRIED,
    Asked,
    Do,
    Heard,
    Reply,
    Source,
    Target,
    Turn,
    as_markdown,
)

#: What each thing that the source does puts on the network.
SENDS = {
    Do.RESERVE: (Asked.RESERVE,),
    Do.PART: (Asked.APPEND, Asked.EXTEND),
    Do.COMMIT: (Asked.COMMIT,),
    Do.QUERY: (Asked.QUERY,),
    Do.ABORT: (Asked.ABORT,),
}


class Message(NamedTuple):
    """To the destination (`asked`) or from it (`heard`); `process`: whom it is meant for, 0: anybody, or who has sent it."""

    epoch: int
    process: int
    asked: Asked | None = None
    heard: Heard | None = None


@dataclass(frozen=True)
class World:
    """Both sides, and all messages that were ever sent: any of them may arrive at any time, any number of times, or never."""

    source: Source = BEGIN.state
    epoch: int = 1
    source_alive: bool = True
    #: The destination's process as the source knows it; 0: it has not answered yet.
    peer: int = 0
    target: Target = Target.NOTHING
    target_epoch: int = 0
    target_alive: bool = True
    #: Which process of the destination this is.
    process: int = 1
    #: Whether the destination runs the request.
    arrived: bool = False
    #: Whether the request has ended, or its client has left.
    over: bool = False
    #: Whether the side that had the request has died with it.
    lost: bool = False
    network: frozenset[Message] = frozenset({Message(1, 0, asked=Asked.RESERVE)})

    @property
    def runs_at_source(self) -> bool:
        return self.source_alive and not self.over and self.source not in (Source.MOVED, Source.ENDED) and not self.stopped

    @property
    def stopped(self) -> bool:
        return self.source.stopped

    @property
    def settled(self) -> bool:
        source_done = self.source.final or not self.source_alive
        return source_done and self.target is not Target.RESERVED and not (self.over and self.arrived)


@dataclass(frozen=True)
class Limits:
    """What may happen besides messages."""

    n_epochs: int = 1
    source_dies: bool = False
    target_dies: bool = False
    ends: bool = False
    refuses: bool = True


def successors(world: World, limits: Limits) -> Iterator[World]:
    for message in world.network:
        if message.asked is not None:
            yield from to_target(world, message, limits)
        elif message.heard is not None:
            yield from to_source(world, message)
    if world.source_alive and not world.source.final:
        yield from happens(world, Heard.LOST)
        if not world.stopped:
            yield from happens(world, Heard.FAILED)
        if world.over:
            yield from happens(world, Heard.OVER)
        if world.source is Source.COPYING and not world.over:
            yield from happens(world, Heard.STOPPED)
        if world.peer and (world.peer != world.process or not world.target_alive):
            yield from happens(world, Heard.GONE)
    if world.source is Source.STAYED and world.source_alive and world.epoch < limits.n_epochs and not world.over:
        again = replace(world, source=BEGIN.state, epoch=world.epoch + 1, peer=0)
        yield send(again, BEGIN.actions)
    if world.target is Target.RESERVED:
        yield replace(world, target=TARGET[world.target, Asked.LATE].state)
    if limits.ends and not world.over and (world.runs_at_source or world.stopped or world.arrived):
        yield replace(world, over=True)
    if world.over and world.arrived:  # its last token, or the front door that says so
        yield replace(world, arrived=False)
    if limits.source_dies and world.source_alive:
        owned = (not world.arrived and not world.source.final) or world.source is Source.STAYED
        yield replace(world, source_alive=False, lost=world.lost or owned)
    if limits.target_dies and world.target_alive and world.process == 1:
        yield replace(
            world, target_alive=False, target=Target.NOTHING, target_epoch=0, arrived=False, lost=world.lost or world.arrived
        )
    if not world.target_alive:
        yield replace(world, target_alive=True, process=2)


def send(world: World, actions: tuple[Do, ...]) -> World:
    sent = {Message(world.epoch, world.peer, asked=asked) for action in actions for asked in SENDS.get(action, ())}
    return replace(world, network=world.network | sent)


def happens(world: World, heard: Heard) -> Iterator[World]:
    turn = SOURCE[world.source, heard]
    yield send(replace(world, source=turn.state), turn.actions)


def to_source(world: World, message: Message) -> Iterator[World]:
    if not world.source_alive or world.source.final or message.epoch != world.epoch or message.process < world.peer:
        return
    assert message.heard is not None
    if world.peer and message.process != world.peer:
        yield from happens(world, Heard.GONE)
    else:
        yield from happens(replace(world, peer=message.process), message.heard)


def to_target(world: World, message: Message, limits: Limits) -> Iterator[World]:
    def answered(after: World, heard: Heard) -> World:
        return replace(after, network=after.network | {Message(message.epoch, world.process, heard=heard)})

    if not world.target_alive:
        return
    if message.process not in (0, world.process):
        yield answered(world, Heard.UNKNOWN)
    elif message.epoch < world.target_epoch:
        yield answered(world, Heard.ABORTED)
    else:
        newer = message.epoch > world.target_epoch
        state = Target.NOTHING if newer else world.target
        assert message.asked is not None
        outcomes = [message.asked]
        if message.asked in TRIED[state]:
            here_already = message.asked is Asked.RESERVE and world.arrived
            failed = FAILED[message.asked]
            outcomes = [failed] if here_already else [message.asked, failed] if limits.refuses else [message.asked]
        for asked in outcomes:
            reply = TARGET[state, asked]
            assert reply.answer is not None
            arrived = world.arrived or (asked is Asked.COMMIT and state is Target.RESERVED)
            yield answered(replace(world, target=reply.state, target_epoch=message.epoch, arrived=arrived), reply.answer)


def explore(limits: Limits) -> dict[World, list[World]]:
    """All worlds that can come about, with those from which they come."""
    first = World()
    before: dict[World, list[World]] = {first: []}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        for after in successors(world, limits):
            if after not in before:
                before[after] = []
                queue.append(after)
            before[after].append(world)
    return before


CASES = {
    "whatever happens to one attempt": Limits(source_dies=True, target_dies=True, ends=True),
    "it is tried twice": Limits(n_epochs=2, source_dies=True, ends=True),
}


def examine(limits: Limits) -> None:
    """What must hold in every world, and that each of them can come to an end."""
    before = explore(limits)
    for world in before:
        assert not (world.runs_at_source and world.arrived), f"it runs twice: {world}"
        somewhere = world.runs_at_source or world.arrived or (world.source_alive and world.stopped)
        assert somewhere or world.over or world.lost, f"it runs nowhere: {world}"
    # Backwards from where nothing is left to do.
    ends = deque(world for world in before if world.settled)
    reached = set(ends)
    while ends:
        for world in before[ends.popleft()]:
            if world not in reached:
                reached.add(world)
                ends.append(world)
    stuck = before.keys() - reached
    assert not stuck, f"it cannot end: {next(iter(stuck))}"


@pytest.mark.parametrize("limits", CASES.values(), ids=CASES.keys())
def test_one_side_runs_the_request_whatever_happens_and_every_move_can_end(limits: Limits):
    examine(limits)


@pytest.mark.parametrize(
    ("table", "row", "changed", "found"),
    [
        # As in Llumnix: no answer to the commit is taken for a refusal.
        (SOURCE, (Source.COMMITTING, Heard.LOST), Turn(Source.STAYED, (Do.KEEP,)), "twice"),
        # The commit is still on its way.
        (SOURCE, (Source.DOUBTING, Heard.RESERVED), Turn(Source.STAYED, (Do.ABORT, Do.KEEP)), "twice"),
        (TARGET, (Target.RESERVED, Asked.ABORT), Reply(Target.RESERVED, Heard.ABORTED), "twice"),
        (TARGET, (Target.RESERVED, Asked.LATE), Reply(Target.RESERVED, None), "cannot end"),
    ],
)
def test_a_wrong_row_is_found(table: Any, row: Any, changed: Any, found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(table, row, changed)
    with pytest.raises(AssertionError, match=found):
        examine(Limits(source_dies=True, target_dies=True))


def test_what_was_committed_and_what_was_aborted_stays_so():
    for (state, asked), reply in TARGET.items():
        if state in (Target.COMMITTED, Target.ABORTED):
            assert reply.state is state and not reply.frees, (state, asked)


def test_the_source_goes_on_after_a_stop_only_when_it_knows_that_nobody_else_will():
    for (state, heard), turn in SOURCE.items():
        if state.stopped and Do.KEEP in turn.actions:
            assert heard in (Heard.ABORTED, Heard.GONE), (state, heard)
        if Do.LEAVE in turn.actions:
            assert heard in (Heard.COMMITTED, Heard.OVER), (state, heard)


def test_every_message_is_answered_in_every_state():
    messages = (Asked.RESERVE, Asked.APPEND, Asked.EXTEND, Asked.COMMIT, Asked.QUERY, Asked.ABORT)
    for state in Target:
        for asked in messages:
            assert TARGET[state, asked].answer is not None
        for asked in TRIED[state]:
            assert TARGET[state, FAILED[asked]].answer is not None
    for state in Source:
        if not state.final:
            assert {heard for each, heard in SOURCE if each is state} >= {Heard.LOST, Heard.GONE, Heard.ABORTED}


def test_the_tables_are_those_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "print(as_markdown()) between the two marks of docs/migration.md"
