"""What runs in the next step of one instance, and who gives way when the KV blocks run out.

Source: iteration-level scheduling, Orca (OSDI '22); chunked prefill beside decodes, Sarathi-Serve (OSDI '24); preemption by
recompute, PagedAttention (vLLM, SOSP '23).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from sllmdask.batching.blocks import BlockPool, blocks_for
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.errors import ContextTooLong, InvalidRequest


@dataclass(frozen=True, eq=False)
class Chunk:
    """`n_tokens` tokens of one sequence that run in one step, the first of them at position `start`."""

    sequence: Sequence
    start: int
    n_tokens: int

    @property
    def stop(self) -> int:
        return self.start + self.n_tokens

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a next one is drawn."""
        return self.stop == self.sequence.n_tokens


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step: decodes first, then prefill chunks. `preempted` lost their blocks and wait again."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)


class BatchScheduler:
    """Sequences of one instance, waiting or running, and the blocks that the running ones hold.

    Call :meth:`plan`, run its chunks, then :meth:`advance` each of them. A sequence gets all blocks of its known tokens when
    it is admitted, so only decoding can run out of blocks. The least urgent running sequence then loses its blocks and
    computes its tokens again later. A waiting sequence takes blocks from strictly lower priorities, never from its own.

    `max_running` is bounded by `max_batch_tokens`, so that every decoding sequence advances in every step.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        max_batch_tokens: int,
        max_model_len: int,
        watermark: float = 0.01,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_running = min(max_running, max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        #: Tokens of one sequence, prompt and answer: the model's window or what the whole pool holds.
        self.max_model_len = min(max_model_len, pool.n_total * block_size)
        #: Blocks that admission leaves free, so that what is running does not at once run out.
        self.n_watermark = int(watermark * pool.n_total)
        self.n_preemptions = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._n_added = 0
        self._rank: dict[str, int] = {}

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """In the order in which they will be admitted."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The most urgent first."""
        return tuple(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._by_id.values()))

    def find(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`. Raises :class:`ContextTooLong` if the window, or the whole pool, leaves no room for an answer."""
        if sequence.request_id in self._by_id:
            raise InvalidRequest(f"Request {sequence.request_id!r} is here already.")
        if sequence.n_tokens >= self.max_model_len:
            raise ContextTooLong(sequence.n_tokens, self.max_model_len)
        self._by_id[sequence.request_id] = sequence
        self._rank[sequence.request_id] = self._n_added
        self._n_added += 1
        bisect.insort(self._waiting, sequence, key=self._urgency)

    def finish(self, request_id: str, reason: FinishReason) -> Sequence | None:
        """Take the sequence out, wherever it is, and free its blocks; ``None`` if it is not here."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        del self._rank[request_id]
        self._free(sequence)
        sequence.finish_reason = reason
        return sequence

    def plan(self) -> StepPlan:
        """The next step. Blocks for its tokens are in the tables; empty only if there is no sequence at all."""
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        for sequence in self.running:
            # Victims come from the end, past what is planned already; one that this loop reaches has no blocks any more.
            if sequence.n_uncomputed == 1 and sequence.block_table and self._grow(sequence, preempted):
                chunks.append(Chunk(sequence, sequence.n_computed, 1))
        budget = self.max_batch_tokens - len(chunks)
        for sequence in self.running:
            n_tokens = min(sequence.n_uncomputed, budget)
            if sequence.n_uncomputed > 1 and n_tokens:
                chunks.append(Chunk(sequence, sequence.n_computed, n_tokens))
                budget -= n_tokens
        while budget and self._waiting:
            sequence = self._waiting[0]
            victims = self._make_room(sequence)
            if victims is None:
                break
            for victim in victims:
                self._preempt(victim, preempted)
                budget += sum(chunk.n_tokens for chunk in chunks if chunk.sequence is victim)
                chunks = [chunk for chunk in chunks if chunk.sequence is not victim]
            self._waiting.remove(sequence)
            sequence.block_table = self.pool.allocate(blocks_for(sequence.n_tokens, self.block_size))
            bisect.insort(self._running, sequence, key=self._urgency)
            n_tokens = min(sequence.n_uncomputed, budget)
            chunks.append(Chunk(sequence, sequence.n_computed, n_tokens))
            budget -= n_tokens
        return StepPlan(tuple(chunks), tuple(preempted))

    def advance(self, chunk: Chunk) -> None:
        """The KV of the chunk's tokens is in the cache now."""
        assert chunk.sequence.n_computed == chunk.start
        chunk.sequence.n_computed = chunk.stop

    def _urgency(self, sequence: Sequence) -> tuple[int, int, int]:
        """Sort key, the most urgent first: higher priority, then earlier arrival, then the order in which they were added."""
        return (-sequence.priority, sequence.arrival, self._rank[sequence.request_id])

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give a decoding sequence the block of its next token; ``False`` if it was itself the one to give way."""
        n_missing = blocks_for(sequence.n_tokens, self.block_size) - len(sequence.block_table)
        while n_missing > self.pool.n_free:
            victim = self._running[-1]
            self._preempt(victim, preempted)
            if victim is sequence:
                return False
        if n_missing > 0:
            sequence.block_table += self.pool.allocate(n_missing)
        return True

    def _make_room(self, sequence: Sequence) -> list[Sequence] | None:
        """Running sequences of lower priority that must leave so that `sequence` can start; ``None``: it must wait."""
        n_blocks = blocks_for(sequence.n_tokens, self.block_size)
        n_free, n_running = self.pool.n_free, self.n_running

        def fits() -> bool:
            return n_running < self.max_running and n_free - n_blocks >= (self.n_watermark if n_running else 0)

        victims: list[Sequence] = []
        for victim in reversed(self._running):
            if fits() or victim.priority >= sequence.priority:
                break
            victims.append(victim)
            n_running -= 1
            n_free += sum(self.pool.holders(block) == 1 for block in victim.block_table)
        return victims if fits() else None

    def _preempt(self, sequence: Sequence, preempted: list[Sequence]) -> None:
        self._running.remove(sequence)
        self._free(sequence)
        sequence.n_preemptions += 1
        self.n_preemptions += 1
        bisect.insort(self._waiting, sequence, key=self._urgency)
        preempted.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.n_computed = 0
