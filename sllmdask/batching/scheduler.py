"""What runs in the next step of one instance, and who gives way when the KV blocks run out.

Source: iteration-level scheduling, Orca (OSDI '22); chunked prefill beside decodes, Sarathi-Serve (OSDI '24); preemption by
recompute or by swapping, PagedAttention (vLLM, SOSP '23); ageing, as in any textbook's multilevel queues.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from sllmdask.batching.blocks import BlockPool, block_digest, blocks_for
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.errors import ContextTooLong, InvalidRequest

#: Of the tokens of prefill beside decodes, the part that sequences which arrive may have: one in so many.
ARRIVING_SHARE = 4


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


@dataclass(frozen=True)
class Copy:
    """Block `target` gets the content of block `source`."""

    source: int
    target: int


@dataclass(frozen=True, eq=False)
class Park:
    """The content of `blocks`, the first of the sequence, goes to host memory. They are somebody else's after that."""

    sequence: Sequence
    blocks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Unpark:
    """What was parked of the sequence, from its block `first` on, comes into `blocks`; after that, host memory is free of it.

    No `blocks`: the KV was found elsewhere.
    """

    sequence: Sequence
    first: int
    blocks: tuple[int, ...]


Move = Copy | Park | Unpark


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step: `moves` in their order, then all chunks together: decodes first, then prefill. `preempted` lost their blocks."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...] = ()
    moves: tuple[Move, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(chunk.n_tokens for chunk in self.chunks)


@dataclass(frozen=True)
class ParkingCosts:
    """What it takes to bring a preempted sequence back, in either way: plain numbers, measured by whoever runs the steps."""

    bytes_per_token: int
    #: Between the device and host memory.
    bytes_per_s: float
    prefill_tokens_per_s: float

    def park_s(self, n_tokens: int) -> float:
        """Seconds to take the KV of `n_tokens` tokens away and to bring it back."""
        return 2 * n_tokens * self.bytes_per_token / self.bytes_per_s

    def recompute_s(self, n_tokens: int) -> float:
        return n_tokens / self.prefill_tokens_per_s


@dataclass(eq=False)
class Incoming:
    """A sequence that arrives from elsewhere, block by block: what it holds and what it was promised."""

    request_id: str
    #: Blocks of its first tokens. The first `n_shared` were here already, and are not written.
    blocks: list[int]
    n_shared: int
    n_reserved: int
    #: Tokens whose KV is computed here, but for the last: nothing is drawn. Its block table is `blocks`.
    sequence: Sequence | None = None

    @property
    def n_to_compute(self) -> int:
        return 0 if self.sequence is None else max(0, self.sequence.n_uncomputed - 1)


@dataclass(frozen=True)
class _Start:
    """Where a waiting sequence can begin: KV that is here already, in `blocks` and in the block to copy, if there is one."""

    blocks: tuple[int, ...] = ()
    n_tokens: int = 0
    copied: int | None = None

    @property
    def held(self) -> tuple[int, ...]:
        return self.blocks if self.copied is None else (*self.blocks, self.copied)


@dataclass(eq=False)
class _Draft:
    """A plan that is being made."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)


class BatchScheduler:
    """Sequences of one instance, waiting, running or held, and the blocks that they have.

    Call :meth:`plan`, make its moves, run its chunks, then :meth:`advance` each of them. A sequence gets all blocks of its known
    tokens when it is admitted, so only decoding can run out of blocks. The least urgent running sequence then loses its blocks:
    its KV is parked in host memory where `costs` say that this is the quicker way and `n_parking_blocks` has room, or its tokens
    are computed again later. A waiting sequence takes blocks from strictly lower priorities, never from its own.

    With `prefix_reuse`, a sequence begins with the full blocks that are here already of its tokens, but for the last token, which
    is always computed. Only full blocks are shared, and those are never written again, so nobody asks before he writes: who
    shares a block that is not full yet gets a copy of it.

    With `ageing`, a waiting sequence gains one level of priority for each `ageing` units of time, and keeps it. It passes
    newcomers by that, and is safe from them; but nobody loses his blocks to a sequence that is only older.

    A step in which others decode has at most `prefill_beside_decode` tokens of prefill (``None``: as many as fit), so that the
    time between their tokens does not jump. What is computed of sequences that arrive has only a part of these: they are answered
    elsewhere meanwhile, and nobody waits for them.

    `max_running` is bounded by `max_batch_tokens`, so that every decoding sequence advances in every step. A sequence that is
    held, with its blocks, and one that arrives count as running, so that they can go on at once.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_running: int,
        max_batch_tokens: int,
        max_model_len: int,
        prefill_beside_decode: int | None = None,
        watermark: float = 0.01,
        prefix_reuse: bool = False,
        ageing: float = 0.0,
        costs: ParkingCosts | None = None,
        n_parking_blocks: int = 0,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_running = min(max_running, max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        #: Tokens of prefill in a step in which others decode.
        self.prefill_beside_decode = max_batch_tokens if prefill_beside_decode is None else prefill_beside_decode
        #: Tokens of one sequence, prompt and answer: the model's window or what the whole pool holds.
        self.max_model_len = min(max_model_len, pool.n_total * block_size)
        #: Blocks that admission leaves free, so that what is running does not at once run out.
        self.n_watermark = int(watermark * pool.n_total)
        self.prefix_reuse = prefix_reuse
        self.ageing = ageing
        #: ``None``: nothing is known, so nothing is parked.
        self.costs = costs
        self.n_parking_blocks = n_parking_blocks
        self.n_preemptions = 0
        #: Tokens that were not computed because their KV was found.
        self.n_reused_tokens = 0
        self._n_plans = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._held: list[Sequence] = []
        #: Sequences by the leader whose tokens they wait for.
        self._followers: dict[str, list[Sequence]] = {}
        self._incoming: dict[str, Incoming] = {}
        self._by_id: dict[str, Sequence] = {}
        self._n_added = 0
        self._rank: dict[str, int] = {}

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """In the order in which they will be admitted; those that follow a leader are not among them yet."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The most urgent first."""
        return tuple(self._running)

    @property
    def held(self) -> tuple[Sequence, ...]:
        return tuple(self._held)

    @property
    def incoming(self) -> tuple[Incoming, ...]:
        return tuple(self._incoming.values())

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._followers.values()))

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_parked_blocks(self) -> int:
        """Blocks' worth of KV in host memory."""
        return sum(blocks_for(sequence.n_parked, self.block_size) for sequence in self._by_id.values() if sequence.n_parked)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting) or any(incoming.n_to_compute for incoming in self._incoming.values())

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._by_id.values()))

    def find(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`. Raises :class:`ContextTooLong` if the window, or the whole pool, leaves no room for an answer."""
        self._enter(sequence)
        leader = self._by_id.get(sequence.leader) if sequence.leader else None
        if leader is None or leader in self._held or leader.n_computed >= sequence.n_tokens - 1:
            self._queue(sequence)
        else:
            self._followers.setdefault(leader.request_id, []).append(sequence)

    def finish(self, request_id: str, reason: FinishReason) -> Sequence | None:
        """Take the sequence out, wherever it is, and free its blocks; ``None`` if it is not here."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        self._leave(sequence)
        del self._rank[request_id]
        if reason is FinishReason.ERROR:
            # What went wrong may be in them.
            self.pool.forget(sequence.block_table)
        self._free(sequence)
        sequence.n_parked = 0
        sequence.finish_reason = reason
        return sequence

    def plan(self, now: float | None = None) -> StepPlan:
        """The next step. Blocks for its tokens are in the tables. `now` is the time that ages are told by; by default, the step's
        number.

        Empty only if nothing waits or runs, or if nothing runs and the blocks are with sequences that are held, read or arriving.
        """
        now = float(self._n_plans) if now is None else now
        self._n_plans += 1
        self._age(now)
        draft = _Draft()
        for sequence in self.running:
            # Victims come from the end, past what is planned already; one that this loop reaches has no blocks any more.
            if sequence.n_uncomputed == 1 and sequence.block_table and self._grow(sequence, draft):
                draft.chunks.append(Chunk(sequence, sequence.n_computed, 1))
        n_decodes = len(draft.chunks)
        budget = self.max_batch_tokens - n_decodes
        if n_decodes:
            budget = min(budget, self.prefill_beside_decode)
        for sequence in self.running:
            n_tokens = min(sequence.n_uncomputed, budget)
            if sequence.n_uncomputed > 1 and n_tokens:
                draft.chunks.append(Chunk(sequence, sequence.n_computed, n_tokens))
                budget -= n_tokens
        n_arriving = min(budget, max(1, self.prefill_beside_decode // ARRIVING_SHARE)) if n_decodes else budget
        for incoming in self._incoming.values():
            n_tokens = min(incoming.n_to_compute, n_arriving)
            if n_tokens and incoming.sequence is not None:
                draft.chunks.append(Chunk(incoming.sequence, incoming.sequence.n_computed, n_tokens))
                n_arriving -= n_tokens
                budget -= n_tokens
        while budget and self._waiting:
            sequence = self._waiting[0]
            start = self._start(sequence)
            victims = self._make_room(sequence, start)
            # Who has just given way does not come back in the same step: what is moved goes one way.
            if victims is None or sequence in draft.preempted:
                break
            # So that they survive, whoever leaves.
            used = [block for block in start.held if self.pool.holders(block)]
            self.pool.share(used)
            for victim in victims:
                self._preempt(victim, draft)
                budget += sum(chunk.n_tokens for chunk in draft.chunks if chunk.sequence is victim)
                draft.chunks = [chunk for chunk in draft.chunks if chunk.sequence is not victim]
            self.pool.share(block for block in start.held if block not in used)
            self._admit(sequence, start, draft, now)
            n_tokens = min(sequence.n_uncomputed, budget)
            draft.chunks.append(Chunk(sequence, sequence.n_computed, n_tokens))
            budget -= n_tokens
        return StepPlan(tuple(draft.chunks), tuple(draft.preempted), tuple(draft.moves))

    def advance(self, chunk: Chunk) -> None:
        """The KV of the chunk's tokens is in the cache now."""
        sequence = chunk.sequence
        assert sequence.n_computed == chunk.start
        sequence.n_computed = chunk.stop
        self._register(sequence, chunk.start // self.block_size)
        self._lead(sequence)

    # --- a sequence out of the batch -----------------------------------------------------------------------------------

    def hold(self, request_id: str) -> Sequence | None:
        """Let a sequence wait until :meth:`resume`, with the blocks that it has; ``None`` if it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is not None and sequence not in self._held:
            self._leave(sequence)
            self._held.append(sequence)
        return sequence

    def park(self, request_id: str) -> Park | None:
        """Hold a sequence, and free its blocks; their content is to be moved to host memory now, however much is there already.

        ``None``: there is nothing to move, or no such sequence.
        """
        sequence = self.hold(request_id)
        if sequence is None or not sequence.block_table:
            return None
        return self._take_blocks(sequence)

    def resume(self, request_id: str) -> None:
        """End what :meth:`hold` or :meth:`park` began: run on with the blocks, or wait for some."""
        sequence = self._by_id.get(request_id)
        if sequence is None or sequence not in self._held:
            return
        self._held.remove(sequence)
        if sequence.block_table:
            bisect.insort(self._running, sequence, key=self._urgency)
            self._lead(sequence)
        else:
            self._queue(sequence)

    def recompute(self, request_id: str) -> None:
        """Drop the KV of a sequence, in blocks or parked; it waits, and computes its tokens again. Whoever keeps what was parked
        may drop it."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return
        self._leave(sequence)
        self._free(sequence)
        sequence.n_parked = 0
        self._queue(sequence)

    def yield_all(self) -> list[Park]:
        """Take all blocks from all that run; they wait, with their KV parked, in the order of before. Nothing can be found by its
        digest any more: the memory of the blocks may be used for something else when the moves are made."""
        moves = []
        for sequence in self.running:
            self._running.remove(sequence)
            move = self._take_blocks(sequence)
            if move is not None:
                moves.append(move)
            bisect.insort(self._waiting, sequence, key=self._urgency)
        self.pool.forget_all()
        return moves

    # --- a sequence from elsewhere -------------------------------------------------------------------------------------

    def expect(self, sequence: Sequence, n_tokens: int) -> Incoming | None:
        """Reserve blocks and a place for a sequence that will come with up to `n_tokens` tokens, all of which need not be known.

        Blocks of its known tokens that are here are taken at once. ``None``: there is no room. Raises what :meth:`add` raises.
        """
        if sequence.request_id in self._incoming:
            raise InvalidRequest(f"Request {sequence.request_id!r} is on its way here already.")
        self._check(sequence)
        shared = self._cached_prefix(sequence)
        n_missing = max(0, blocks_for(n_tokens, self.block_size) - len(shared))
        n_left = self.pool.n_free - n_missing - sum(not self.pool.holders(block) for block in shared)
        if self._n_places == self.max_running or n_left < (self.n_watermark if self._n_places else 0):
            return None
        self.pool.share(shared)
        self.pool.reserve(n_missing)
        incoming = Incoming(sequence.request_id, list(shared), len(shared), n_missing)
        self._incoming[sequence.request_id] = incoming
        return incoming

    def extend(self, incoming: Incoming, n_tokens: int) -> bool:
        """Give `incoming` the blocks of its first `n_tokens` tokens: those that were promised, then free ones.

        ``False``: there are too few, and nothing has changed.
        """
        n_missing = max(0, blocks_for(n_tokens, self.block_size) - len(incoming.blocks))
        n_promised = min(n_missing, incoming.n_reserved)
        if n_missing - n_promised > self.pool.n_free:
            return False
        incoming.blocks += self.pool.allocate_reserved(n_promised)
        incoming.n_reserved -= n_promised
        incoming.blocks += self.pool.allocate(n_missing - n_promised)
        return True

    def compute(self, incoming: Incoming, sequence: Sequence) -> bool:
        """Compute the KV of the tokens of `sequence`, but for the last, in the blocks of `incoming`, beside what runs.

        ``sequence.n_computed`` says how many of the first tokens' KV is there. More tokens may be added to it later, and this be
        called again. ``False``: there are too few blocks, and nothing has changed.
        """
        if not self.extend(incoming, sequence.n_tokens):
            return False
        sequence.block_table = incoming.blocks
        incoming.sequence = sequence
        return True

    def accept(self, incoming: Incoming, sequence: Sequence, n_computed: int) -> bool:
        """`sequence` is here, with the KV of its first `n_computed` tokens in the blocks of `incoming`, and runs from now on.

        ``False``: its tokens have too few blocks, and nothing has changed. Raises what :meth:`add` raises.
        """
        self._check(sequence)
        assert 0 <= n_computed < sequence.n_tokens
        if not self.extend(incoming, sequence.n_tokens):
            return False
        self._enter(sequence)
        self._drop(incoming)
        n_blocks = blocks_for(sequence.n_tokens, self.block_size)
        self.pool.release(incoming.blocks[n_blocks:])
        sequence.block_table = incoming.blocks[:n_blocks]
        sequence.n_computed = n_computed
        self._register(sequence, 0)
        bisect.insort(self._running, sequence, key=self._urgency)
        return True

    def refuse(self, incoming: Incoming) -> None:
        """The sequence does not come: what it had here is free again."""
        self._drop(incoming)
        self.pool.release(incoming.blocks)

    def _drop(self, incoming: Incoming) -> None:
        del self._incoming[incoming.request_id]
        self.pool.unreserve(incoming.n_reserved)
        incoming.n_reserved = 0

    # --- queues --------------------------------------------------------------------------------------------------------

    @property
    def _n_places(self) -> int:
        """How many run, or will run on at once when they are let."""
        return len(self._running) + sum(bool(sequence.block_table) for sequence in self._held) + len(self._incoming)

    def _check(self, sequence: Sequence) -> None:
        if sequence.request_id in self._by_id:
            raise InvalidRequest(f"Request {sequence.request_id!r} is here already.")
        if sequence.n_tokens >= self.max_model_len:
            raise ContextTooLong(sequence.n_tokens, self.max_model_len)

    def _enter(self, sequence: Sequence) -> None:
        self._check(sequence)
        self._by_id[sequence.request_id] = sequence
        self._rank[sequence.request_id] = self._n_added
        self._n_added += 1

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=self._urgency)

    def _leave(self, sequence: Sequence) -> None:
        """Take the sequence out of the queue that it is in. Who waited for its tokens waits no more."""
        for queue in (self._running, self._waiting, self._held, self._followers.get(sequence.leader or "", [])):
            if sequence in queue:
                queue.remove(sequence)
                break
        sequence.waiting_since = None
        followers = self._followers.pop(sequence.request_id, [])
        if followers:
            # The first of them leads the others, so that the prompt is still computed once.
            first, *others = followers
            first.leader = None
            self._queue(first)
            for follower in others:
                follower.leader = first.request_id
            if others:
                # It may have some of its own.
                self._followers.setdefault(first.request_id, []).extend(others)

    def _lead(self, sequence: Sequence) -> None:
        """Queue the sequences whose tokens, but for the last, `sequence` has computed."""
        followers = self._followers.pop(sequence.request_id, [])
        late = [follower for follower in followers if sequence.n_computed < follower.n_tokens - 1]
        for follower in followers:
            if follower not in late:
                self._queue(follower)
        if late:
            self._followers[sequence.request_id] = late

    def _age(self, now: float) -> None:
        older = False
        for sequence in self._waiting:
            if sequence.waiting_since is None:
                sequence.waiting_since = now
            if self.ageing:
                level = int((sequence.waited + now - sequence.waiting_since) / self.ageing)
                older |= level != sequence.level
                sequence.level = level
        if older:
            self._waiting.sort(key=self._urgency)

    def _urgency(self, sequence: Sequence) -> tuple[int, int, int]:
        """Sort key, the most urgent first: higher priority, then earlier arrival, then the order in which they were added."""
        return (-sequence.priority - sequence.level, sequence.arrival, self._rank[sequence.request_id])

    # --- blocks --------------------------------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence, draft: _Draft) -> bool:
        """Give a decoding sequence the block of its next token; ``False`` if it was itself the one to give way."""
        n_missing = blocks_for(sequence.n_tokens, self.block_size) - len(sequence.block_table)
        while n_missing > self.pool.n_free:
            victim = self._running[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        if n_missing > 0:
            sequence.block_table += self.pool.allocate(n_missing)
        return True

    def _start(self, sequence: Sequence) -> _Start:
        """Where `sequence` finds most of its tokens: in blocks of their digest, or with its leader."""
        shared = self._cached_prefix(sequence)
        start = _Start(shared, len(shared) * self.block_size)
        leader = self._by_id.get(sequence.leader) if sequence.leader else None
        if leader is not None and leader.block_table and leader.salt == sequence.salt and not sequence.from_scratch:
            n_tokens = min(leader.n_computed, sequence.n_tokens - 1)
            # Under the leader's name, there might be another one by now.
            same = leader.token_ids(0, n_tokens) == sequence.token_ids(0, n_tokens)
            if same and n_tokens > max(start.n_tokens, sequence.n_parked):
                n_full = n_tokens // self.block_size
                tail = leader.block_table[n_full] if n_tokens % self.block_size else None
                return _Start(tuple(leader.block_table[:n_full]), n_tokens, tail)
        return start

    def _cached_prefix(self, sequence: Sequence) -> tuple[int, ...]:
        """The blocks that are here of the sequence's first tokens. The last token's is not among them: it is always computed."""
        blocks: list[int] = []
        if self.prefix_reuse and not sequence.from_scratch:
            for index in range((sequence.n_tokens - 1) // self.block_size):
                block = self.pool.find(self._digest(sequence, index))
                if block is None:
                    break
                blocks.append(block)
        return tuple(blocks)

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """The name of the sequence's block `index`, which its tokens fill."""
        for i in range(len(sequence.digests), index + 1):
            parent = sequence.digests[-1] if sequence.digests else b""
            tokens = sequence.token_ids(i * self.block_size, (i + 1) * self.block_size)
            sequence.digests.append(block_digest(parent, sequence.salt, tokens))
        return sequence.digests[index]

    def name_blocks(self, sequence: Sequence) -> None:
        """Make the names by which the full blocks of the sequence's tokens can be found, so that it is done when they are."""
        if self.prefix_reuse and sequence.n_tokens >= self.block_size:
            self._digest(sequence, sequence.n_tokens // self.block_size - 1)

    def _register(self, sequence: Sequence, first: int) -> None:
        """Let others find the sequence's full blocks from `first` on."""
        if self.prefix_reuse:
            for index in range(first, sequence.n_computed // self.block_size):
                self.pool.register(sequence.block_table[index], self._digest(sequence, index))

    def _make_room(self, sequence: Sequence, start: _Start) -> list[Sequence] | None:
        """Running sequences of lower priority that must leave so that `sequence` can start; ``None``: it must wait."""
        n_blocks = blocks_for(sequence.n_tokens, self.block_size) - len(start.blocks)
        n_free = self.pool.n_free - sum(not self.pool.holders(block) for block in start.held)
        n_running = self._n_places
        # How many of its holders leave; never all of them where `sequence` itself holds on to a block.
        given: Counter[int] = Counter(dict.fromkeys(start.held, -1))

        def fits() -> bool:
            return n_running < self.max_running and n_free - n_blocks >= (self.n_watermark if n_running else 0)

        victims: list[Sequence] = []
        for victim in reversed(self._running):
            if fits() or victim.priority + victim.level >= sequence.priority:
                break
            victims.append(victim)
            n_running -= 1
            given.update(victim.block_table)
            n_free += sum(self.pool.holders(block) == given[block] for block in victim.block_table)
        return victims if fits() else None

    def _admit(self, sequence: Sequence, start: _Start, draft: _Draft, now: float) -> None:
        """Let a waiting sequence run, from `start`, whose blocks it holds already."""
        self._waiting.remove(sequence)
        if sequence.waiting_since is not None:
            sequence.waited += now - sequence.waiting_since
            sequence.waiting_since = None
        n_shared = len(start.blocks)
        own = self.pool.allocate(blocks_for(sequence.n_tokens, self.block_size) - n_shared)
        sequence.block_table = [*start.blocks, *own]
        sequence.n_computed = start.n_tokens
        if start.copied is not None:
            draft.moves.append(Copy(start.copied, own[0]))
            self.pool.release([start.copied])
        if sequence.n_parked:
            stop = blocks_for(sequence.n_parked, self.block_size) if sequence.n_parked > start.n_tokens else 0
            draft.moves.append(Unpark(sequence, n_shared, tuple(sequence.block_table[n_shared:stop])))
            sequence.n_computed = max(start.n_tokens, sequence.n_parked)
            sequence.n_parked = 0
        self.n_reused_tokens += start.n_tokens
        self._register(sequence, n_shared)
        bisect.insort(self._running, sequence, key=self._urgency)
        self._lead(sequence)

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        self._running.remove(sequence)
        if self._parks(sequence):
            draft.moves.append(self._park(sequence))
        else:
            self._free(sequence)
        sequence.n_preemptions += 1
        self.n_preemptions += 1
        self._queue(sequence)
        draft.preempted.append(sequence)

    def _parks(self, sequence: Sequence) -> bool:
        n_blocks = blocks_for(sequence.n_computed, self.block_size)
        if self.costs is None or not 0 < n_blocks <= self.n_parking_blocks - self.n_parked_blocks:
            return False
        return self.costs.park_s(sequence.n_computed) < self.costs.recompute_s(sequence.n_computed)

    def _take_blocks(self, sequence: Sequence) -> Park | None:
        """Park the sequence's KV, if there is some in its blocks."""
        if sequence.n_computed:
            return self._park(sequence)
        self._free(sequence)
        return None

    def _park(self, sequence: Sequence) -> Park:
        blocks = tuple(sequence.block_table[: blocks_for(sequence.n_computed, self.block_size)])
        n_parked = sequence.n_computed
        self._free(sequence)
        sequence.n_parked = n_parked
        return Park(sequence, blocks)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.n_computed = 0
