"""Everything that may happen to sequences, in any order, beside a model of what is in the memory of each block.

What the model writes for a token is a function of all tokens up to it, as KV is. So a sequence that reads a block of another
text, of another adapter, of somebody who wrote on after sharing, or one that was handed out anew, reads something wrong.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllmdask.batching.blocks import BlockPool, blocks_for
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.scheduler import BatchScheduler, Copy, Incoming, Move, Park, ParkingCosts, Unpark
from sllmdask.batching.sequence import FinishReason, Sequence

#: Beginnings that many prompts have.
TEXTS = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1], [7] * 16)


def kv_of(sequence: Sequence, position: int) -> int:
    """What a model writes for the token at `position`."""
    return hash((sequence.salt, *sequence.token_ids(0, position + 1)))


class Instance:
    """A scheduler, the memory of its blocks, and a model that writes into them."""

    def __init__(self, n_blocks: int, block_size: int, **bounds: object) -> None:
        self.pool = BlockPool(n_blocks)
        self.batch = BatchScheduler(
            self.pool,
            block_size=block_size,
            max_model_len=1000,
            prefix_reuse=True,
            **bounds,  # type: ignore[arg-type]
        )
        self.memory: dict[int, list[int | None]] = {block: [None] * block_size for block in range(1, n_blocks + 1)}
        self.host: dict[str, list[list[int | None]]] = {}
        self.now = 0.0

    def read(self, blocks: Iterable[int], n_tokens: int) -> list[int | None]:
        return [value for block in blocks for value in self.memory[block]][:n_tokens]

    def write(self, blocks: list[int], first: int, values: list[int | None]) -> None:
        size = self.batch.block_size
        for position, value in enumerate(values, first):
            block = blocks[position // size]
            assert self.pool.holders(block) == 1, "somebody else reads this block"
            self.memory[block][position % size] = value

    def make(self, moves: Iterable[Move]) -> None:
        for move in moves:
            match move:
                case Copy(source, target):
                    assert source != target and self.pool.holders(target) == 1
                    self.memory[target] = list(self.memory[source])
                case Park(sequence, blocks):
                    self.host[sequence.request_id] = [list(self.memory[block]) for block in blocks]
                case Unpark(sequence, first, blocks):
                    rows = self.host.pop(sequence.request_id)
                    # Somebody who was admitted after it may share them already: he reads after all moves.
                    for block, row in zip(blocks, rows[first:], strict=False):
                        self.memory[block] = list(row)

    def step(self) -> int:
        """One step; how many tokens it computed."""
        self.now += 1.0
        plan = self.batch.plan(self.now)
        self.make(plan.moves)
        assert plan.n_tokens <= self.batch.max_batch_tokens
        assert len({chunk.sequence.request_id for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            values = [kv_of(chunk.sequence, position) for position in range(chunk.start, chunk.stop)]
            self.write(chunk.sequence.block_table, chunk.start, list(values))
        for chunk in plan.chunks:
            seen = self.read(chunk.sequence.block_table, chunk.stop)
            assert seen == [kv_of(chunk.sequence, position) for position in range(chunk.stop)], "this is another text"
        for chunk in plan.chunks:
            samples = chunk.samples
            self.batch.advance(chunk)
            if samples:
                sequence = chunk.sequence
                sequence.output_ids.append(zlib.crc32(f"{sequence.request_id} {sequence.n_tokens}".encode()) % 3)
                if len(sequence.output_ids) >= sequence.params.max_tokens or sequence.n_tokens >= self.batch.max_model_len:
                    self.finish(sequence, FinishReason.LENGTH)
        return plan.n_tokens

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.host.pop(sequence.request_id, None)
        assert self.batch.finish(sequence.request_id, reason) is sequence

    def check(self, pins: list[int]) -> None:
        pool, batch = self.pool, self.batch
        assert pool.n_empty + pool.n_cached + pool.n_used + pool.n_reserved == pool.n_total
        assert min(pool.n_empty, pool.n_cached, pool.n_used, pool.n_reserved, pool.n_free) >= 0
        assert pool.n_reserved == sum(incoming.n_reserved for incoming in batch.incoming)
        having = [sequence for sequence in batch if sequence.block_table]
        held = Counter(block for sequence in having for block in sequence.block_table)
        held.update(pins)
        held.update(block for incoming in batch.incoming for block in incoming.blocks)
        assert {block: pool.holders(block) for block in self.memory if pool.holders(block)} == dict(held) and 0 not in held
        assert len(having) + len(batch.incoming) <= batch.max_running
        assert set(batch.running) <= set(having)
        assert not {*batch.running} & {*batch.waiting, *batch.held} and not {*batch.waiting} & {*batch.held}
        for sequence in batch:
            assert sequence.n_uncomputed >= 1
            truth = [kv_of(sequence, position) for position in range(max(sequence.n_computed, sequence.n_parked))]
            if sequence.block_table:
                assert sequence.n_parked == 0
                assert self.read(sequence.block_table, sequence.n_computed) == truth
                if sequence in batch.running:
                    assert len(sequence.block_table) >= blocks_for(sequence.n_computed, batch.block_size)
                for block in sequence.block_table[sequence.n_computed // batch.block_size :]:
                    assert pool.holders(block) == 1, "a block that is not full is shared"
            else:
                assert sequence.n_computed == 0
                rows = self.host.get(sequence.request_id, [])
                assert [value for row in rows for value in row][: sequence.n_parked] == truth
        assert set(self.host) == {sequence.request_id for sequence in batch if sequence.n_parked}
        assert batch.n_running + batch.n_waiting + len(batch.held) == len(list(batch))


@dataclass(eq=False)
class Moving:
    """A sequence on its way from one instance to the other."""

    sequence: Sequence
    source: Instance
    target: Instance
    incoming: Incoming
    n_written: int
    pins: list[int] = field(default_factory=list)
    frozen: bool = False


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        parks = ParkingCosts(bytes_per_token=1, bytes_per_s=1e9, prefill_tokens_per_s=10)
        self.instances = [
            Instance(14, 4, max_running=5, max_batch_tokens=9, watermark=0.1, ageing=7.0, costs=parks, n_parking_blocks=5),
            Instance(17, 3, max_running=4, max_batch_tokens=6, watermark=0.0),
        ]
        self.moves: list[Moving] = []
        self.n_named = 0
        #: How many answers each request may have, and all tokens of those that are complete.
        self.sequences: list[Sequence] = []

    def name(self) -> str:
        self.n_named += 1
        return f"r{self.n_named}"

    def pick(self, at: int, index: int) -> tuple[Instance, Sequence] | None:
        instance = self.instances[at]
        present = list(instance.batch)
        return (instance, present[index % len(present)]) if present else None

    def moving(self, sequence: Sequence) -> bool:
        return any(move.sequence is sequence for move in self.moves)

    @rule(
        at=st.integers(0, 1),
        text=st.sampled_from(TEXTS),
        n_shared=st.integers(0, 16),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        max_tokens=st.integers(1, 9),
        priority=st.integers(0, 2),
        salt=st.sampled_from([b"", b"", b"adapter"]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        from_scratch=st.sampled_from([False, False, False, True]),
    )
    def add(
        self,
        at: int,
        text: list[int],
        n_shared: int,
        own: list[int],
        max_tokens: int,
        priority: int,
        salt: bytes,
        n: int,
        from_scratch: bool,
    ) -> None:
        first = Sequence(
            self.name(),
            text[:n_shared] + own,
            SamplingParams(max_tokens=max_tokens),
            priority=priority,
            arrival=self.n_named,
            salt=salt,
            from_scratch=from_scratch,
        )
        for sequence in first.choices(n):
            self.instances[at].batch.add(sequence)
            self.sequences.append(sequence)

    @rule(at=st.integers(0, 1), n_steps=st.integers(1, 5))
    def step(self, at: int, n_steps: int) -> None:
        for _ in range(n_steps):
            self.instances[at].step()
            self.everything_adds_up()

    @rule(at=st.integers(0, 1), index=st.integers(0, 20), max_tokens=st.integers(1, 6))
    def fork(self, at: int, index: int, max_tokens: int) -> None:
        """Another one goes on from all tokens that somebody has by now."""
        found = self.pick(at, index)
        if found:
            instance, parent = found
            tokens = parent.token_ids(0, parent.n_tokens)
            params = SamplingParams(max_tokens=max_tokens)
            child = Sequence(self.name(), tokens, params, arrival=self.n_named, salt=parent.salt, leader=parent.request_id)
            instance.batch.add(child)
            self.sequences.append(child)

    @rule(at=st.integers(0, 1), index=st.integers(0, 20), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR]))
    def abort(self, at: int, index: int, reason: FinishReason) -> None:
        found = self.pick(at, index)
        if found:
            found[0].finish(found[1], reason)

    @rule(at=st.integers(0, 1), index=st.integers(0, 20))
    def park(self, at: int, index: int) -> None:
        found = self.pick(at, index)
        if found and not self.moving(found[1]):
            move = found[0].batch.park(found[1].request_id)
            found[0].make([move] if move else [])

    @rule(at=st.integers(0, 1), index=st.integers(0, 20))
    def resume(self, at: int, index: int) -> None:
        found = self.pick(at, index)
        if found and not self.moving(found[1]):
            found[0].batch.resume(found[1].request_id)

    @rule(at=st.integers(0, 1), index=st.integers(0, 20))
    def recompute(self, at: int, index: int) -> None:
        found = self.pick(at, index)
        if found and not self.moving(found[1]):
            found[0].batch.recompute(found[1].request_id)
            found[0].host.pop(found[1].request_id, None)

    @rule(at=st.integers(0, 1))
    def yield_all(self, at: int) -> None:
        """The memory is used for something else, and comes back."""
        instance = self.instances[at]
        if not any(instance in (move.source, move.target) for move in self.moves):
            instance.make(instance.batch.yield_all())
            for row in instance.memory.values():
                row[:] = [None] * len(row)

    # --- from one instance to the other ----------------------------------------------------------------------------

    @rule(at=st.integers(0, 1), index=st.integers(0, 20), n_more=st.integers(0, 8))
    def open(self, at: int, index: int, n_more: int) -> None:
        found = self.pick(at, index)
        if not found or self.moving(found[1]) or found[1] in found[0].batch.held:
            return
        source, sequence = found
        target = self.instances[1 - at]
        known = Sequence(
            sequence.request_id, sequence.token_ids(0, sequence.n_tokens), SamplingParams(), salt=sequence.salt, leader=None
        )
        if target.batch.find(sequence.request_id) is None and sequence.n_tokens < target.batch.max_model_len:
            incoming = target.batch.expect(known, sequence.n_tokens + n_more)
            if incoming:
                n_here = incoming.n_shared * target.batch.block_size
                assert target.read(incoming.blocks, n_here) == [kv_of(sequence, position) for position in range(n_here)]
                self.moves.append(Moving(sequence, source, target, incoming, n_here))

    @precondition(lambda self: self.moves)
    @rule(index=st.integers(0, 20))
    def read(self, index: int) -> None:
        move = self.moves[index % len(self.moves)]
        size = move.source.batch.block_size
        fresh = move.sequence.block_table[len(move.pins) : move.sequence.n_computed // size]
        move.source.pool.share(fresh)
        move.pins += fresh
        self.send(move, move.source.read(move.pins, len(move.pins) * size))

    def send(self, move: Moving, values: list[int | None]) -> None:
        """`values` of the first tokens arrive, as many as there is room for."""
        if len(values) > move.n_written and move.target.batch.extend(move.incoming, len(values)):
            move.target.write(move.incoming.blocks, move.n_written, values[move.n_written :])
            move.n_written = len(values)

    @precondition(lambda self: self.moves)
    @rule(index=st.integers(0, 20))
    def freeze(self, index: int) -> None:
        move = self.moves[index % len(self.moves)]
        if move.sequence.finish_reason is None:
            move.source.batch.hold(move.sequence.request_id)
            move.frozen = True
            n_here = move.sequence.n_computed
            if n_here > move.n_written:
                self.send(move, move.source.read(move.sequence.block_table, n_here))

    @precondition(lambda self: self.moves)
    @rule(index=st.integers(0, 20))
    def commit(self, index: int) -> None:
        move = self.moves[index % len(self.moves)]
        sequence = move.sequence
        if not move.frozen or sequence.finish_reason is not None or sequence.n_tokens >= move.target.batch.max_model_len:
            return
        arrived = Sequence(
            sequence.request_id,
            list(sequence.prompt_ids),
            sequence.params,
            sequence.priority,
            sequence.arrival,
            list(sequence.output_ids),
            salt=sequence.salt,
        )
        if move.target.batch.accept(move.incoming, arrived, min(move.n_written, sequence.n_tokens - 1)):
            self.moves.remove(move)
            move.source.pool.release(move.pins)
            move.source.finish(sequence, FinishReason.ABORT)
            self.sequences.append(arrived)

    @precondition(lambda self: self.moves)
    @rule(index=st.integers(0, 20))
    def abort_move(self, index: int) -> None:
        self.end(self.moves[index % len(self.moves)])

    def end(self, move: Moving) -> None:
        self.moves.remove(move)
        move.target.batch.refuse(move.incoming)
        move.source.pool.release(move.pins)
        if move.frozen:
            move.source.batch.resume(move.sequence.request_id)

    # --- what holds at any time -----------------------------------------------------------------------------------

    @invariant()
    def everything_adds_up(self) -> None:
        for instance in self.instances:
            instance.check([block for move in self.moves if move.source is instance for block in move.pins])

    @invariant()
    def what_was_read_stays_as_it_was(self) -> None:
        for move in self.moves:
            n_tokens = len(move.pins) * move.source.batch.block_size
            truth = [kv_of(move.sequence, position) for position in range(n_tokens)]
            assert move.source.read(move.pins, n_tokens) == truth

    def teardown(self) -> None:
        """Let alone, everybody is served, and nothing is left behind."""
        for move in list(self.moves):
            self.end(move)
        for instance in self.instances:
            for sequence in instance.batch.held:
                instance.batch.resume(sequence.request_id)
            for _ in range(2000):
                if not list(instance.batch):
                    break
                before = instance.batch.n_preemptions
                assert instance.step() or instance.batch.n_preemptions > before, "there is work, but nothing is done"
                instance.check([])
            assert not list(instance.batch) and not instance.host
            assert instance.pool.n_free == instance.pool.n_total
        assert all(sequence.finish_reason is not None for sequence in self.sequences)


TestLife = Life.TestCase
# A machine that is busy otherwise is slow, and that is no fault.
TestLife.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
