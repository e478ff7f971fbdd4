"""Decode steps as recorded CUDA graphs: one launch instead of hundreds.

When every sequence of a step adds one token, the step's kernels differ only in what they read. They are recorded once for a
number of sequences and a length of block tables, over buffers that stay in place, and replayed from then on. Without a recording
the processor spends more time on launching a small model's kernels than the GPU on running them.

Source: CUDA graphs through ``torch.cuda.CUDAGraph``; a graph per padded batch size as in vLLM.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: Blocks of the narrowest kind of graph, and how much wider each next one is. Width decides only how far a walk is split.
_NARROWEST, _WIDENING = 64, 4
#: Passes before a recording: libraries make their plans and kernels are compiled in the first, which cannot be recorded.
_N_WARM_UPS = 2


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """What a decode step of `b` sequences reads: views of buffers that stay in place, so that it can be recorded.

    Rows beyond the sequences that there are belong to nobody: they write to slot 0, in block 0, and see only that.
    """

    #: (1, b), int64.
    ids: Tensor
    #: (1, b), int64.
    positions: Tensor
    #: (b,), int64: all rows; each gives logits.
    rows: Tensor
    #: (b,), int64.
    new_slots: Tensor
    #: (b + 1,), int32: 0, 1, 2, ...
    cu_seqlens: Tensor
    #: (b,), int32.
    context_lens: Tensor
    #: (b, most blocks of a sequence), int32.
    block_tables: Tensor
    #: At least the tokens of the longest sequence.
    max_context: int
    max_rows: int = 1


class DecodeStep(Protocol):
    """The tensors of a step in which every sequence adds one token; on the host or on the device."""

    new_slots: Tensor
    context_lens: Tensor
    block_tables: Tensor


class Recorder(Protocol):
    """Records what a function does on the device."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Something that does again what `run` does, over the same memory, and returns the same tensor."""

    def close(self) -> None:
        """Let go of every recording."""


#: Instances of a process record one after the other, on one stream of the device: what its matrix library keeps for a stream, it
#: keeps for good.
_one_at_a_time = threading.Lock()


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        here, aside = torch.cuda.current_stream(self._device), _stream_of(self._device)
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_N_WARM_UPS):
                    run()
            here.wait_stream(aside)
            # Other threads may allocate meanwhile: they load other models.
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                output = run()
        self._graphs.append(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class NoRecorder:
    """Records nothing: what was to be recorded is run each time."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return run

    def close(self) -> None:
        pass


class DecodeGraphs:
    """Decode steps over buffers of their own, padded to few batch sizes, each recorded when it is first needed.

    A recording costs about three steps, once, and reads the weights where they are: none may be made before all are in place.
    After one that fails no other is tried, and what has none is left to the caller; the log says why, once.

    :param run: the forward pass; returns logits (b, vocab)
    :param max_running: sequences of the largest step
    :param max_blocks: blocks of the longest sequence
    """

    def __init__(
        self,
        run: Callable[[DecodeInputs], Tensor],
        *,
        max_running: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self.batch_sizes = _powers(1, 2, max_running)
        #: Blocks.
        self.widths = _powers(_NARROWEST, _WIDENING, max_blocks)
        self._run = run
        self._block_size = block_size
        self._recorder: Recorder = recorder or (CudaRecorder(device) if device.type == "cuda" else NoRecorder())
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._may_record = True
        # Token 0 at position 0 in slot 0: what a row does that belongs to nobody.
        self._ids = torch.zeros(1, max_running, dtype=torch.int64, device=device)
        self._positions = torch.zeros(1, max_running, dtype=torch.int64, device=device)
        self._rows = torch.arange(max_running, device=device)
        self._new_slots = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.arange(max_running + 1, dtype=torch.int32, device=device)
        self._context_lens = torch.ones(max_running, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_running, max_blocks, dtype=torch.int32, device=device)

    @property
    def recorded(self) -> frozenset[tuple[int, int]]:
        """Batch size and blocks of each recording."""
        return frozenset(self._replays)

    def run(self, ids: Iterable[int], positions: Iterable[int], step: DecodeStep) -> Tensor | None:
        """Logits (n, vocab) of a step in which each of `n` sequences adds one token; ``None``: run it without a graph.

        The logits stay true until the next call.
        """
        n_sequences, n_blocks = step.block_tables.shape
        shape = self._shape(n_sequences, n_blocks)
        if shape is None or not (shape in self._replays or self._may_record):
            return None
        self._fill(list(ids), list(positions), step, shape[0])
        if shape not in self._replays:
            inputs = self._inputs(*shape)
            try:
                self._replays[shape] = self._recorder.record(lambda: self._run(inputs))
            except RuntimeError as error:
                self._may_record = False
                text = "decode steps of other sizes run without CUDA graphs: sequences=%d blocks=%d cause=%r"
                log.warning(text, *shape, error)
                return None
        return self._replays[shape]()[:n_sequences]

    def close(self) -> None:
        """Let go of the recordings and of their memory; every step is left to the caller from now on."""
        self._may_record = False
        self._replays.clear()
        self._recorder.close()

    def _shape(self, n_sequences: int, n_blocks: int) -> tuple[int, int] | None:
        """The smallest batch size and width that hold the step."""
        if n_sequences > self.batch_sizes[-1] or n_blocks > self.widths[-1]:
            return None
        batch_size = self.batch_sizes[bisect.bisect_left(self.batch_sizes, n_sequences)]
        return batch_size, self.widths[bisect.bisect_left(self.widths, n_blocks)]

    def _fill(self, ids: list[int], positions: list[int], step: DecodeStep, batch_size: int) -> None:
        n_sequences, n_blocks = step.block_tables.shape
        given = torch.tensor([ids, positions])
        for buffer, values in ((self._ids[0], given[0]), (self._positions[0], given[1]), (self._new_slots, step.new_slots)):
            buffer[:n_sequences].copy_(values, non_blocking=True)
            buffer[n_sequences:batch_size].zero_()
        self._context_lens[:n_sequences].copy_(step.context_lens, non_blocking=True)
        self._context_lens[n_sequences:batch_size].fill_(1)
        # What lies behind a sequence's last block is never read, so what was there before may stay.
        self._block_tables[:n_sequences, :n_blocks].copy_(step.block_tables, non_blocking=True)
        self._block_tables[n_sequences:batch_size, :1].zero_()

    def _inputs(self, batch_size: int, width: int) -> DecodeInputs:
        return DecodeInputs(
            ids=self._ids[:, :batch_size],
            positions=self._positions[:, :batch_size],
            rows=self._rows[:batch_size],
            new_slots=self._new_slots[:batch_size],
            cu_seqlens=self._cu_seqlens[: batch_size + 1],
            context_lens=self._context_lens[:batch_size],
            block_tables=self._block_tables[:batch_size],
            max_context=width * self._block_size,
        )


def _powers(first: int, factor: int, last: int) -> tuple[int, ...]:
    """`first`, `first * factor`, ... below `last`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
