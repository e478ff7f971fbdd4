"""The protocol of a move, explored further: there and back again, and a front door that begins the request anew meanwhile.

Two workers, each with both halves. Messages that were ever sent may arrive at any time, any number of times, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from sllmdask.batching.handover import BEGIN, FAILED, SOURCE, TARGET, TRIED, Asked, Do, Heard, Source, Target, Turn
from tests.batching.test_handover import SENDS

#: Epochs from one dispatch to its next.
PER_DISPATCH = 10


class Message(NamedTuple):
    """To worker `to` of the move `epoch`; `process`: whom it is meant for, 0: anybody, or who has sent it."""

    to: int
    epoch: int
    process: int
    asked: Asked | None = None
    heard: Heard | None = None


class Worker(NamedTuple):
    """`copy`: the dispatch of the request that it has, 0: none; `held`: that does not run. Its last move as a source (0: none),
    with the process that it talks to; the last one that it heard of as a destination."""

    copy: int = 0
    held: bool = False
    source: Source = Source.ENDED
    source_epoch: int = 0
    #: Whether the move is about the copy that is here, and not about one of before.
    own: bool = False
    peer: int = 0
    target: Target = Target.NOTHING
    target_epoch: int = 0
    process: int = 1

    @property
    def moves(self) -> bool:
        return not self.source.final


@dataclass(frozen=True)
class World:
    """It moves from worker 0, then back from worker 1. Dispatches: 1, and 2 when the front door has begun it anew."""

    workers: tuple[Worker, Worker] = (Worker(copy=1), Worker())
    n_moves: int = 0
    dispatch: int = 1
    #: Whether the current dispatch was lost with a worker that has died.
    lost: bool = False
    network: frozenset[Message] = frozenset()

    def put(self, number: int, worker: Worker) -> World:
        both = (worker, self.workers[1]) if number == 0 else (self.workers[0], worker)
        return replace(self, workers=both)

    @property
    def settled(self) -> bool:
        done = all(not each.moves and each.target is not Target.RESERVED and not each.held for each in self.workers)
        return done and all(each.copy in (0, self.dispatch) for each in self.workers)


@dataclass(frozen=True)
class Limits:
    n_moves: int = 1
    refuses: bool = False
    begins_anew: bool = False
    #: Worker 1 dies, and another process follows at its address.
    dies: bool = False


def successors(world: World, limits: Limits) -> Iterator[World]:
    for message in world.network:
        if message.asked is not None:
            yield from to_target(world, message, message.asked, limits)
        elif message.heard is not None:
            yield from to_source(world, message, message.heard)
    for number, worker in enumerate(world.workers):
        other = world.workers[1 - number]
        if worker.moves:
            yield from happens(world, number, Heard.LOST)
            if not worker.own and not worker.source.stopped:
                yield from happens(world, number, Heard.OVER)
            if worker.source is Source.COPYING and worker.own:
                yield from happens(world.put(number, worker._replace(held=True)), number, Heard.STOPPED)
            if worker.peer and worker.peer != other.process:
                yield from happens(world, number, Heard.GONE)
        elif worker.copy and not worker.held and world.n_moves < limits.n_moves and number == world.n_moves % 2:
            epoch = PER_DISPATCH * worker.copy + world.n_moves + 1
            fresh = worker._replace(source=BEGIN.state, source_epoch=epoch, own=True, peer=0)
            yield send(replace(world.put(number, fresh), n_moves=world.n_moves + 1), number, BEGIN.actions)
        if worker.target is Target.RESERVED:
            yield world.put(number, worker._replace(target=TARGET[worker.target, Asked.LATE].state))
        if worker.copy and worker.copy < world.dispatch:  # the front door stops what speaks under an epoch that is over
            yield world.put(number, worker._replace(copy=0, held=False, own=False))
        if limits.begins_anew and world.dispatch == 1:
            # It believes that the request is lost, for whatever reason. What this worker has of it, it drops.
            yield replace(world.put(number, worker._replace(copy=2, held=False, own=False)), dispatch=2, lost=False)
    worker = world.workers[1]
    if limits.dies and worker.process == 1:
        lost = world.lost or worker.copy == world.dispatch
        yield replace(world.put(1, Worker(process=2)), lost=lost)


def send(world: World, number: int, actions: tuple[Do, ...]) -> World:
    worker = world.workers[number]
    sent = {
        Message(1 - number, worker.source_epoch, worker.peer, asked=asked)
        for action in actions
        for asked in SENDS.get(action, ())
    }
    return replace(world, network=world.network | sent)


def happens(world: World, number: int, heard: Heard) -> Iterator[World]:
    worker = world.workers[number]
    turn = SOURCE[worker.source, heard]
    after = worker._replace(source=turn.state)
    if Do.KEEP in turn.actions and worker.own:
        after = after._replace(held=False)
    if Do.LEAVE in turn.actions and worker.own:
        after = after._replace(copy=0, held=False, own=False)
    yield send(world.put(number, after), number, turn.actions)


def to_source(world: World, message: Message, heard: Heard) -> Iterator[World]:
    worker = world.workers[message.to]
    if not worker.moves or message.epoch != worker.source_epoch or message.process < worker.peer:
        return
    if worker.peer and message.process != worker.peer:
        yield from happens(world, message.to, Heard.GONE)
    else:
        yield from happens(world.put(message.to, worker._replace(peer=message.process)), message.to, heard)


def to_target(world: World, message: Message, asked: Asked, limits: Limits) -> Iterator[World]:
    worker = world.workers[message.to]

    def answered(after: Worker, heard: Heard) -> World:
        answer = Message(1 - message.to, message.epoch, worker.process, heard=heard)
        return replace(world.put(message.to, after), network=world.network | {answer})

    if message.process not in (0, worker.process):
        yield answered(worker, Heard.UNKNOWN)
    elif message.epoch < worker.target_epoch:
        yield answered(worker, Heard.ABORTED)
    else:
        state = Target.NOTHING if message.epoch > worker.target_epoch else worker.target
        # What is here already cannot come: neither is there room for it, nor does it begin a second time.
        taken = bool(worker.copy) and asked in (Asked.RESERVE, Asked.COMMIT) and asked in TRIED[state]
        outcomes = [FAILED[asked]] if taken else [asked]
        if limits.refuses and not taken and asked in TRIED[state]:
            outcomes.append(FAILED[asked])
        for outcome in outcomes:
            reply = TARGET[state, outcome]
            assert reply.answer is not None
            after = worker._replace(target=reply.state, target_epoch=message.epoch)
            if outcome is Asked.COMMIT and state is Target.RESERVED:
                after = after._replace(copy=message.epoch // PER_DISPATCH, held=False)
            yield answered(after, reply.answer)


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


def examine(limits: Limits) -> int:
    before = explore(limits)
    for world in before:
        running = [each.copy for each in world.workers if each.copy and not each.held]
        assert len(set(running)) == len(running), f"one dispatch of it runs twice: {world}"
        here = any(each.copy == world.dispatch for each in world.workers)
        assert here or world.lost, f"it is nowhere: {world}"
    ends = deque(world for world in before if world.settled)
    reached = set(ends)
    while ends:
        for world in before[ends.popleft()]:
            if world not in reached:
                reached.add(world)
                ends.append(world)
    stuck = before.keys() - reached
    assert not stuck, f"it cannot end: {next(iter(stuck))}"
    return len(before)


CASES = {
    "there and back, and every word of the first move comes late": Limits(n_moves=2, refuses=True),
    "it is begun anew at either side while it moves": Limits(begins_anew=True, refuses=True),
    "there and back, and begun anew": Limits(n_moves=2, begins_anew=True),
    "it is begun anew while it moves to one that dies and comes again at the same address": Limits(begins_anew=True, dies=True),
}


@pytest.mark.parametrize("limits", CASES.values(), ids=CASES.keys())
def test_each_dispatch_runs_once_and_what_is_left_of_others_ends(limits: Limits):
    assert examine(limits) > 100


def test_a_source_that_takes_silence_for_a_refusal_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SOURCE, (Source.COMMITTING, Heard.LOST), Turn(Source.STAYED, (Do.KEEP,)))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="runs twice"):
        examine(Limits(n_moves=2))
