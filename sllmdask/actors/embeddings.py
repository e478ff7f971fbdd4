"""Embedding requests of one instance: front doors send many inputs at once, an engine knows one at a time."""

from __future__ import annotations

from collections.abc import Iterable

from sllmdask.engine.embedding import EmbeddingSequence, embedding_sequence


class InputLedger:
    """Which inputs of which requests are still with the engine."""

    def __init__(self) -> None:
        #: (request, index of the input in it) by the id that the engine knows the input by.
        self._inputs: dict[str, tuple[str, int]] = {}
        #: Those ids, by request.
        self._open: dict[str, set[str]] = {}

    def begin(
        self, request_id: str, inputs: Iterable[tuple[int, Iterable[int]]], dimensions: int | None, epoch: int = 0
    ) -> list[EmbeddingSequence]:
        """What to give to the engine: one sequence for each of `inputs`, (index, token ids). `epoch`: of the dispatch."""
        sequences = []
        for index, token_ids in inputs:
            sequence = embedding_sequence(f"{request_id}#{epoch}#{index}", list(token_ids), dimensions)
            self._inputs[sequence.request_id] = request_id, index
            self._open.setdefault(request_id, set()).add(sequence.request_id)
            sequences.append(sequence)
        return sequences

    def take(self, input_id: str) -> tuple[str, int] | None:
        """The engine is done with an input: its request and its index there; ``None`` if nobody waits for it any more."""
        found = self._inputs.pop(input_id, None)
        if found is not None:
            self._open[found[0]].discard(input_id)
        return found

    def is_done(self, request_id: str) -> bool:
        """Whether the engine is done with all inputs of a request."""
        return not self._open.get(request_id)

    def end(self, request_id: str) -> list[str]:
        """Forget a request; what the engine still has of it."""
        left = sorted(self._open.pop(request_id, ()))
        for input_id in left:
            del self._inputs[input_id]
        return left
