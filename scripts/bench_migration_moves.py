"""For ``bench_migration.py``: what runs in the processes of the workers. Moves that are noted, and moves that nobody can ask for.

The two that live moves are measured against are made of the same parts as those: the same messages, engines and connections.
Only the order differs: the request is stopped first, and then all of it is given away.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from sllmdask.actors import migration
from sllmdask.actors.leaving import Destination, Leaving, Order
from sllmdask.batching.handover import Do, Heard
from sllmdask.batching.precopy import Kind
from sllmdask.engine.engine import LLMEngine

#: Seconds after a move until the caller hears of it.
REPORT_AFTER_S = 0.25
#: Ways to move a request: what travels, and whether the request runs on meanwhile.
WAYS = {"kv": (Kind.KV, True), "tokens": (Kind.TOKENS, True), "blocking": (Kind.KV, False), "recompute": (Kind.TOKENS, False)}


@dataclass(frozen=True)
class Note:
    """One message and its answer, by ``time.monotonic()``; `n_before`: stages or rounds that had begun before it."""

    op: str
    began_at: float
    ended_at: float
    nbytes: int
    n_before: int


class Noted(Leaving):
    """A move as it is, with the times of its messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes: list[Note] = []

    def _ask(self, op: str, payload: bytes = b"", **fields: Any) -> Heard:
        n_before, began_at = len(self.record.steps), time.monotonic()
        heard = super()._ask(op, payload, **fields)
        self.notes.append(Note(op, began_at, time.monotonic(), len(payload), n_before))
        return heard


class StopFirst(Noted):
    """Stop the request, then give all of it away: KV in pieces, of which the last goes with the commit, or its tokens at once."""

    def _do(self, action: Do) -> Heard | None:
        if action is Do.PART:
            self._stage_stop = self._since
            # What the commit is to carry is the last token's.
            self._since = self.record.n_tokens - 2 if self._kind is Kind.KV else 0
            return self._stop(self.record.n_tokens)
        return super()._do(action)

    def _give_rest(self) -> Heard:
        return Heard.RESERVED

    def _commit(self) -> Heard:
        if self._kind is Kind.KV:
            last, self._since = self._since, self._stage_stop or 0
            self.record.steps.append(0)
            while self._since < last:
                read = self._call(self._read(whole=False))
                assert read is not None
                chunk, _, _ = read
                data = chunk.pop("data")
                heard = self._ask("append", data, chunk=chunk)
                if heard is not Heard.RESERVED:
                    return heard
                self._since = int(self._reply["n_tokens"])
                self._sent(len(data), len(data))
        return super()._commit()


def instance_of(dask_worker: Any) -> tuple[Any, Any]:
    """The worker's registry, and the only instance in it."""
    registry = dask_worker.plugins["sllmdask"].registry
    [instance] = registry._instances.values()
    return registry, instance


#: When the engine's newest steps with tokens began and ended, by ``time.monotonic()``.
_STEPS: deque[tuple[float, float]] = deque(maxlen=1000)


def note_steps() -> None:
    """From now on; once. The engine has no listener of that kind, and needs none but here."""
    step = LLMEngine.step

    def noted(self: LLMEngine) -> list[Any]:
        began_at = time.monotonic()
        outputs = step(self)
        if outputs:
            _STEPS.append((began_at, time.monotonic()))
        return outputs

    LLMEngine.step = noted  # type: ignore[method-assign]


def steps() -> list[tuple[float, float]]:
    return list(_STEPS)


def address(dask_worker: Any) -> dict[str, str]:
    """Where requests that come to the instance have to go."""
    registry, instance = instance_of(dask_worker)
    return {"instance": instance.id, "worker": dask_worker.address, "address": registry.moves.server_address}


def usage(dask_worker: Any) -> tuple[int, int, int]:
    """Requests of the instance, KV blocks that are not free, and sequences in the engine."""
    _, instance = instance_of(dask_worker)
    stats = instance.stats()
    n_sequences = stats["n_running"] + stats["n_waiting"] + stats["n_held"]
    return len(instance.request_ids), stats["blocks_total"] - stats["blocks_free"], n_sequences


async def move(number: int, source: str, to: dict[str, str], way: str, dask_worker: Any) -> dict[str, Any]:
    """Move request `number` of the instance, in the order in which they came. A ``MoveRecord``, and ``notes``."""
    registry, instance = instance_of(dask_worker)
    kind, live = WAYS[way]
    order = Order(instance.request_ids[number], source, Destination(**to), "a measurement", kind)
    made: list[Noted] = []

    def make(*args: Any, **kwargs: Any) -> Noted:
        made.append((Noted if live else StopFirst)(*args, **kwargs))
        return made[0]

    migration.Leaving = make
    try:
        ended = registry.moves._begin(instance.id, order)
    finally:
        migration.Leaving = Leaving
    record = await ended
    # What its report costs must not take a core from the destination's first step.
    await asyncio.sleep(REPORT_AFTER_S)
    return {**record.as_wire(), "notes": [asdict(note) for note in made[0].notes]}
