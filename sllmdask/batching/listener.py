"""What listens to an engine that is examined, and compares what it says with what it may say; see
:mod:`sllmdask.batching.conformance`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.protocol import EngineProtocol, EngineStats, StepOutput
from sllmdask.batching.sequence import FinishReason, Sequence

#: Steps after which a request that has not ended never will.
_MAX_STEPS = 2000


@dataclass(frozen=True)
class Subject:
    """An engine to examine.

    `make` gives a new one, with room for eight requests of 100 tokens at once and a window of at least 160 tokens. `make_tight`
    gives one whose KV memory holds two requests of 100 tokens, but not three; ``None``: it has none. Neither model has a token
    that ends an answer by itself.
    """

    make: Callable[[], EngineProtocol]
    n_vocab: int
    make_tight: Callable[[], EngineProtocol] | None = None
    #: Makes a request of its id, prompt and parameters, as the engine takes them.
    sequence: Callable[[str, list[int], SamplingParams], Sequence] = Sequence
    #: Whether answers are made of tokens.
    generates: bool = True
    #: A token that makes the step of its sequence fail; the model does not say it. ``None``: nothing fails.
    poison: int | None = None

    def ask(self, request_id: str, n_prompt: int = 20, max_tokens: int = 12, **params: Any) -> Sequence:
        """A request with a random prompt of `n_prompt` tokens that its id decides on; greedy unless told otherwise."""
        rng = random.Random(request_id)
        prompt = [rng.randrange(self.n_vocab - 1) for _ in range(n_prompt)]
        if self.poison is not None:
            prompt = [token + (token >= self.poison) for token in prompt]
        return self.sequence(request_id, prompt, SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params}))

    def crowd(self) -> list[Sequence]:
        """Five requests, ``r0`` to ``r4``, of different lengths, every other one sampled."""
        return [self.ask(f"r{i}", 5 + 17 * i % 60, 8 + 5 * i % 14, temperature=float(i % 2), seed=i) for i in range(5)]

    def long_ones(self, n: int, **params: Any) -> list[Sequence]:
        """`n` requests, ``l0`` and so on, that will have 100 tokens each."""
        return [self.ask(f"l{i}", 60, 40, **params) for i in range(n)]


class Listener:
    """Steps an engine, and compares what it says with what is promised, after each step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        #: Tokens that came of each request, here and where it was before, and its last output.
        self.answers: dict[str, list[int]] = {}
        self.ends: dict[str, StepOutput] = {}
        #: Number of the step that a request's first output came in.
        self.first_step: dict[str, int] = {}
        #: Requests that are stopped: nothing is to be heard of them.
        self.quiet: set[str] = set()
        self._due: dict[str, int] = {}
        self._gone: dict[str, str] = {}
        self._n_steps = 0

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self._due[sequence.request_id] = len(sequence.output_ids)
            self.answers[sequence.request_id] = []
            self.engine.add(sequence)
            self._look()

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self._n_steps += 1
            for output in self.engine.step():
                self._hear(output)
            self._look()

    def drain(self) -> None:
        """Step until there is nothing to do; everybody must have ended by then, and nothing may be left."""
        for _ in range(_MAX_STEPS):
            if not self._waiting or not self.engine.has_work:
                break
            self.step()
        why = f"after {_MAX_STEPS} steps" if self.engine.has_work else "but the engine says that there is nothing to do"
        require(not self._waiting, f"{', '.join(self._waiting)} has not ended, {why}")
        require(not self.engine.has_work, "all requests have ended, but the engine says that there is still work")
        at_rest(self.engine)

    @property
    def _waiting(self) -> list[str]:
        return sorted(self._due.keys() - self.ends.keys() - self._gone.keys())

    def abort(self, request_id: str) -> None:
        require(self.engine.abort(request_id) is True, f"{request_id} was here, and abort says that it was not")
        self._gone[request_id] = "was aborted"
        self._look()
        require(self.engine.abort(request_id) is False, f"{request_id} was aborted, and abort says that it was still here")

    def adopt(self, source: Listener, request_id: str) -> None:
        """A request has moved here from `source`."""
        source._gone[request_id] = "has moved to another engine"
        self._due[request_id] = source._due[request_id]
        self.answers[request_id] = source.answers[request_id]
        source._look()
        self._look()

    def _hear(self, output: StepOutput) -> None:
        name, due = output.request_id, self._due.get(output.request_id)
        require(due is not None, f"there is an output of {name}, which was never asked")
        require(name not in self._gone, f"{name} {self._gone.get(name)}, and was answered after that")
        require(name not in self.ends, f"{name} had its last output, and was answered after that")
        require(name not in self.quiet, f"{name} is stopped, and was answered")
        require(output.index == due, f"{name}: an output of index {output.index} came where {due} was due")
        require(
            output.token_id is not None or output.final, f"{name}: output {output.index} has neither a token nor a reason to end"
        )
        require(
            (output.error is not None) == (output.finish_reason is FinishReason.ERROR),
            f"{name}: an error and the reason {output.finish_reason} do not go together",
        )
        self.first_step.setdefault(name, self._n_steps)
        if output.token_id is not None:
            self._due[name] = output.index + 1
            self.answers[name].append(output.token_id)
        if output.final:
            self.ends[name] = output

    def _look(self) -> None:
        here = {sequence.request_id: sequence for sequence in self.engine.sequences}
        for name in self._due:
            sequence = self.engine.find(name)
            if name in self.ends or name in self._gone:
                require(sequence is None and name not in here, f"{name} {self._gone.get(name, 'has ended')}, and is still here")
                continue
            require(sequence is not None, f"{name} has not ended, and is not here any more")
            assert sequence is not None
            require(here.get(name) is sequence, f"{name} is not among the engine's sequences")
            n = len(self.answers[name])
            told = sequence.output_ids[len(sequence.output_ids) - n :] if n else []
            require(
                told == self.answers[name] and len(sequence.output_ids) == self._due[name],
                f"{name}: its output_ids are not the tokens that were given",
            )
        accounts_add_up(self.engine)


def accounts_add_up(engine: EngineProtocol) -> None:
    """Compare the parts of an engine's account with their sums."""
    stats, n_here = engine.stats(), len(engine.sequences)
    n_counted = stats.n_running + stats.n_waiting
    if isinstance(stats, EngineStats):
        n_counted += stats.n_held
        parts = (stats.blocks_free, stats.blocks_used, stats.blocks_reserved)
        require(
            stats.blocks_total == sum(parts) and min(parts) >= 0,
            f"blocks do not add up: {stats.blocks_total} in all, but {parts[0]} free, {parts[1]} used and {parts[2]} reserved",
        )
        require(
            0 <= stats.blocks_cached <= stats.blocks_free,
            f"{stats.blocks_cached} blocks are cached, of {stats.blocks_free} that are free",
        )
    require(n_counted == n_here, f"{n_here} requests are here, but {n_counted} run, wait or are held")


def at_rest(engine: EngineProtocol) -> None:
    """Nobody is here: nothing may be held."""
    require(not engine.sequences, "there is nothing to do, but requests are here")
    accounts_add_up(engine)
    stats = engine.stats()
    if isinstance(stats, EngineStats):
        left = f"{stats.blocks_used} of {stats.blocks_total} blocks are used and {stats.blocks_reserved} reserved"
        require(stats.blocks_free == stats.blocks_total, f"no request is here, but {left}")
        require(stats.parked_nbytes == 0, f"no request is here, but {stats.parked_nbytes} bytes of KV are parked")


def answers_alone(subject: Subject, sequences: list[Sequence]) -> dict[str, list[int]]:
    """What each of `sequences` is answered, one after the other in one engine."""
    with made(subject) as engine:
        heard = Listener(engine)
        for sequence in sequences:
            heard.add(sequence)
            heard.drain()
        return heard.answers


def same(expected: Mapping[str, list[int]], found: Mapping[str, list[int]], where: str) -> None:
    """Compare answers with those that were expected."""
    for name, answer in expected.items():
        other = found.get(name, [])
        at = next((i for i, pair in enumerate(zip(answer, other, strict=False)) if pair[0] != pair[1]), len(other))
        require(other == answer, f"{name} is answered differently {where}, from token {at} on")


def require(ok: bool, sentence: str) -> None:
    """Raise :class:`AssertionError` with `sentence` unless `ok`. Not an assert: promises are examined under -O, too."""
    if not ok:
        raise AssertionError(sentence[0].upper() + sentence[1:] + ".")


@contextmanager
def refused(otherwise: str, *errors: type[Exception]) -> Iterator[None]:
    """What is done inside must raise one of `errors`."""
    try:
        yield
    except errors:
        return
    require(False, otherwise)


@contextmanager
def closing(engine: EngineProtocol) -> Iterator[EngineProtocol]:
    try:
        yield engine
    finally:
        engine.close()


def made(subject: Subject) -> AbstractContextManager[EngineProtocol]:
    """A new engine, closed in the end."""
    return closing(subject.make())


def made_tight(subject: Subject) -> AbstractContextManager[EngineProtocol]:
    """A new engine with little memory, closed in the end."""
    assert subject.make_tight is not None
    return closing(subject.make_tight())


@contextmanager
def pair(subject: Subject) -> Iterator[tuple[Listener, Listener]]:
    """Two new engines, and who listens to them; closed in the end."""
    with made(subject) as sender, made(subject) as receiver:
        yield Listener(sender), Listener(receiver)
