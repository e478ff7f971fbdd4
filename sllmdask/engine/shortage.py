"""Memory that a step asks for and does not get: how that is recognised, and how the step goes on with less.

A forward pass that fails of it has changed no sequence, so its chunks run again in passes of half as many tokens. Following steps
are cut in the same way for a while. A single token that does not fit is its request's failure.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from sllmdask.batching.scheduler import Chunk
from sllmdask.engine.sizing import device_memory
from sllmdask.errors import InsufficientMemory

#: Good passes after which they may have twice as many tokens again.
N_GOOD_PASSES = 64

#: How torch, its libraries and CUDA say it, in errors that have no class of their own.
_MESSAGES = re.compile(
    r"can't allocate|cannot allocate|not enough memory|failed to allocate|out of memory|ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?([KMGT]iB|bytes)|allocate (\d+) bytes", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that there was no memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


def asked_nbytes(error: BaseException) -> int | None:
    """Bytes that could not be had, if the error tells."""
    found = _ASKED.search(str(error))
    if found is None:
        return None
    number, unit, plain = found.groups()
    return int(plain) if plain else int(float(number) * _UNITS[unit.lower()])


def not_enough(model: str, error: BaseException, device: torch.device | None = None, advice: str = "") -> InsufficientMemory:
    """`error` in numbers: what `model` asked for in vain (0 where the error does not tell), and what `device` still has.

    No `device`: host memory.
    """
    return InsufficientMemory(model, asked_nbytes(error) or 0, device_memory(device or torch.device("cpu"))[0], advice)


def cut(chunks: Sequence[Chunk], n_tokens: int) -> list[tuple[Chunk, ...]]:
    """`chunks`, in their order, in passes of at most `n_tokens` tokens. A sequence is at most once in each pass.

    What was cut before, and follows one on the other, counts as one.
    """
    whole: list[Chunk] = []
    for chunk in chunks:
        if whole and whole[-1].sequence is chunk.sequence:
            assert whole[-1].stop == chunk.start
            whole[-1] = replace(whole[-1], n_tokens=whole[-1].n_tokens + chunk.n_tokens)
        else:
            whole.append(chunk)
    passes: list[list[Chunk]] = []
    room = 0
    for chunk in whole:
        start = chunk.start
        while start < chunk.stop:
            if not room:
                passes.append([])
                room = n_tokens
            piece = replace(chunk, start=start, n_tokens=min(room, chunk.stop - start))
            passes[-1].append(piece)
            start, room = piece.stop, room - piece.n_tokens
    return [tuple(some) for some in passes]


class PassBudget:
    """How many tokens one forward pass may have: all that a step has, and after a shortage fewer for a while."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._n_tokens = most
        self._n_good = 0
        #: Passes that found no memory.
        self.n_shortages = 0

    def cut(self, chunks: Sequence[Chunk]) -> list[tuple[Chunk, ...]]:
        """The passes of a step; one, as long as there was no shortage."""
        if not chunks:
            return []
        return [tuple(chunks)] if self._n_tokens >= self._most else cut(chunks, self._n_tokens)

    def short(self, n_tokens: int) -> bool:
        """A pass of `n_tokens` tokens found no memory; whether there is anything smaller to try."""
        self.n_shortages += 1
        self._n_good = 0
        if n_tokens > 1:
            self._n_tokens = min(self._n_tokens, -(-n_tokens // 2))
        return n_tokens > 1

    def passed(self) -> None:
        """A pass found its memory."""
        self._n_good += 1
        if self._n_good >= N_GOOD_PASSES and self._n_tokens < self._most:
            self._n_tokens = min(self._most, 2 * self._n_tokens)
            self._n_good = 0

    def forgive(self) -> None:
        """Who could not be helped is gone: the others may have full passes again."""
        self._n_tokens = self._most
        self._n_good = 0
