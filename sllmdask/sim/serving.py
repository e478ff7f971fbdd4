"""One instance at work: continuous batching over a model of what a step costs.

Between two changes of the batch every decode step has the same sequences, and costs a little more than the one before. So the
clock goes from change to change, and the steps in between are summed up, not simulated one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Protocol

from sllmdask.sim.clock import Appointment, Clock


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step of the engine, and the room for KV. The defaults are LLaMA-7B on an A10 (Llumnix, OSDI '24)."""

    prefill_s: float = 0.002
    prefill_s_per_token: float = 0.000235
    decode_s: float = 0.026
    decode_s_per_sequence: float = 0.00012
    #: For each token that a sequence of the batch has.
    decode_s_per_token: float = 0.0000021
    #: Tokens whose keys and values an instance can hold.
    kv_tokens: int = 851 * 16

    def prefill(self, n_tokens: int) -> float:
        return self.prefill_s + self.prefill_s_per_token * n_tokens

    def decodes(self, n_steps: int, n_sequences: int, n_tokens: int) -> float:
        """Seconds of `n_steps` steps of a batch that has `n_tokens` tokens before the first; each step adds one per sequence."""
        more = n_sequences * n_steps * (n_steps - 1) // 2
        return n_steps * self._first_step(n_sequences, n_tokens) + self.decode_s_per_token * more

    def steps_begun(self, seconds: float, n_sequences: int, n_tokens: int) -> int:
        """The fewest steps of such a batch that last at least `seconds`: those that began before that are over."""
        first, growth = self._first_step(n_sequences, n_tokens), self.decode_s_per_token * n_sequences
        # The positive root of growth / 2 * n ** 2 + (first - growth / 2) * n = seconds.
        half = first - growth / 2
        guess = seconds / first if growth == 0 else (sqrt(half * half + 2 * growth * seconds) - half) / growth
        n_steps = max(1, ceil(guess) - 1)
        while self.decodes(n_steps, n_sequences, n_tokens) < seconds:
            n_steps += 1
        return n_steps

    def _first_step(self, n_sequences: int, n_tokens: int) -> float:
        return self.decode_s + self.decode_s_per_sequence * n_sequences + self.decode_s_per_token * n_tokens


@dataclass(eq=False)
class Sequence:
    """A request on its way: `n_done` of `n_output` tokens were made. Without its keys and values it is computed again first."""

    request: str
    n_prompt: int
    n_output: int
    n_done: int = 0
    has_kv: bool = False
    #: Since when it does not go on, although it had begun; ``None``: it goes on, or has not begun.
    stalled_since: float | None = None
    stalled_s: float = 0.0

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_done


class Listener(Protocol):
    def made_token(self, sequence: Sequence) -> None:
        """The last prefill of `sequence` is over, and gave it a token."""

    def ended(self, sequence: Sequence) -> None:
        """`sequence` has all its tokens."""


class Serving:
    """The engine of one instance. Whole prefills go before decode steps, and nothing stops in the middle of a step.

    A sequence is admitted when the room for its longest self is free; those behind it wait.
    """

    def __init__(self, clock: Clock, costs: StepCosts, listener: Listener) -> None:
        self._clock, self._costs, self._listener = clock, costs, listener
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        #: What is under way: the end of the step or the row of steps, when it began, and what to do then.
        self._until: Appointment | None = None
        self._since = 0.0
        self._prefilling: Sequence | None = None
        #: Decode steps that are under way.
        self._n_steps = 0
        #: What waits for the end of the step.
        self._at_boundary: list[Callable[[], None]] = []

    def sequences(self) -> list[Sequence]:
        return [*self._running, *([self._prefilling] if self._prefilling else []), *self._waiting]

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._interrupt()

    def take(self, requests: Collection[str] | None, then: Callable[[list[Sequence]], None]) -> None:
        """At the end of the step, give `requests`, or all there are, to `then`. What has ended by then is not among them."""

        def leave() -> None:
            taken = [each for each in self.sequences() if requests is None or each.request in requests]
            self._running = [each for each in self._running if each not in taken]
            self._waiting = deque(each for each in self._waiting if each not in taken)
            then(taken)

        self._at_boundary.append(leave)
        self._interrupt()

    def give(self, sequences: Iterable[Sequence]) -> None:
        """Go on with what came from another instance: with keys and values it decodes at once, in spite of the room."""
        for each in sequences:
            (self._running if each.has_kv else self._waiting).append(each)
        self._interrupt()

    def tokens_now(self) -> dict[str, int]:
        """Tokens of each sequence, those of finished steps of the row that is under way included."""
        n_over = 0
        if self._n_steps:
            passed_s = self._clock.now - self._since
            n_over = self._costs.steps_begun(passed_s, len(self._running), self._n_kv()) - 1 if passed_s > 0 else 0
        return {each.request: each.n_tokens + (n_over if each in self._running else 0) for each in self.sequences()}

    # --- steps ---

    def _is_busy(self) -> bool:
        return self._until is not None

    def _n_kv(self) -> int:
        return sum(each.n_tokens for each in self._running)

    def _interrupt(self) -> None:
        """Something changes the batch at the end of the step that is under way, or now if there is none."""
        if self._until is None:
            self._boundary()
        elif self._n_steps:
            passed_s = self._clock.now - self._since
            n_steps = self._costs.steps_begun(passed_s, len(self._running), self._n_kv())
            if n_steps < self._n_steps:
                self._until.call_off()
                self._row_of(n_steps)

    def _row_of(self, n_steps: int) -> None:
        """`n_steps` decode steps, which began at `_since`."""
        self._n_steps = n_steps
        ends_at = self._since + self._costs.decodes(n_steps, len(self._running), self._n_kv())
        self._until = self._clock.call_at(ends_at, self._decoded)

    def _decoded(self) -> None:
        for each in self._running:
            each.n_done += self._n_steps
        self._n_steps = 0
        ended = [each for each in self._running if each.n_done >= each.n_output]
        self._running = [each for each in self._running if each.n_done < each.n_output]
        for each in ended:
            self._listener.ended(each)
        self._boundary()

    def _prefilled(self) -> None:
        sequence = self._prefilling
        assert sequence is not None
        self._prefilling = None
        sequence.n_done, sequence.has_kv = sequence.n_done + 1, True
        self._listener.made_token(sequence)
        if sequence.n_done < sequence.n_output:
            self._running.append(sequence)
        else:
            self._listener.ended(sequence)
        self._boundary()

    def _boundary(self) -> None:
        self._until = None
        while self._at_boundary:
            self._at_boundary.pop(0)()
        if self._is_busy():  # one of those who waited has begun something
            return
        self._since = self._clock.now
        if self._waiting and self._has_room(self._waiting[0]):
            self._prefilling = self._waiting.popleft()
            self._until = self._clock.call_later(self._costs.prefill(self._prefilling.n_tokens), self._prefilled)
        elif self._running:
            self._row_of(min(each.n_output - each.n_done for each in self._running))

    def _has_room(self, sequence: Sequence) -> bool:
        """One alone always has: it could never run otherwise."""
        reserved = sum(each.n_prompt + each.n_output for each in self._running)
        return not self._running or reserved + sequence.n_prompt + sequence.n_output <= self._costs.kv_tokens
