"""Models that the paged attention cannot serve as it stands, run all the same, and exactly.

:class:`CompatRunner` is for architectures whose attention does not go through transformers' interface: GPT-J, Bloom, Falcon, MPT.
The model runs as transformers wrote it, over a cache that looks like transformers' ``DynamicCache`` and whose tokens lie in the
blocks of the paged cache: each layer puts its new keys and values there and is given those of all sequences, padded on the left.
Scheduling, preemption and everything that moves blocks are the same. It is slower than the paged attention, for what is padded
and gathered; sequences share a pass where that costs less than reading the weights once more.

:class:`LongRopeRunner` is for models whose rotary frequencies depend on the length of the longest sequence in a forward pass:
those on either side of the switch run in passes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from sllmdask.batching.blocks import blocks_for
from sllmdask.batching.scheduler import Chunk
from sllmdask.engine.construct import Skeleton
from sllmdask.engine.runner import ModelRunner, first_outputs
from sllmdask.errors import UnsupportedArchitecture

#: Bytes that a byte of padding costs: it is gathered, written, made contiguous and attended to.
_PADDING_COST = 4

_N_CHECKED_TOKENS, _N_CHECKED_KINDS = 8, 2


def make_runner(skeleton: Skeleton, *args: Any, **kwargs: Any) -> ModelRunner:
    """The runner that the model in `skeleton` needs; the other arguments are those of :class:`ModelRunner`.

    Raises :class:`UnsupportedArchitecture` for a deterministic mode that it does not have.
    """
    if not skeleton.paged:
        if kwargs.get("deterministic"):
            raise UnsupportedArchitecture(
                skeleton.family.architecture,
                "with engine.deterministic, it is not served: its attention is its own, and what it gives depends on the batch",
            )
        return CompatRunner(skeleton, *args, **kwargs)
    return (ModelRunner if skeleton.family.long_after is None else LongRopeRunner)(skeleton, *args, **kwargs)


@dataclass(frozen=True)
class Row:
    """One sequence's part of a pass: the tokens `ids`, with `n_past` tokens in the cache before them."""

    ids: Sequence[int]
    n_past: int
    #: Holds all of them.
    block_table: Sequence[int]


class CompatRunner(ModelRunner):
    """Runs a model's own forward pass, several sequences at a time, over KV that is in blocks."""

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], n_rows: Sequence[int] | None = None) -> Tensor:
        """Compute the chunks' tokens into the cache; returns logits (n, vocab), one row for each chunk that samples, in order.

        `n_rows`: of how many of its last tokens each chunk gives a row, where it is not that.
        """
        self._pack_when_hot()
        wanted = [int(chunk.samples) for chunk in chunks] if n_rows is None else list(n_rows)
        logits: list[Tensor] = [torch.empty(0)] * len(chunks)
        shapes = [(chunk.n_tokens, chunk.start) for chunk in chunks]
        for numbers in share_passes(shapes, self._max_padding):
            rows = [
                Row(chunk.sequence.token_ids(chunk.start, chunk.stop), chunk.start, chunk.sequence.block_table)
                for chunk in (chunks[number] for number in numbers)
            ]
            last = self._pass(rows, max(1, *(wanted[number] for number in numbers)))
            for number, row in zip(numbers, last, strict=True):
                logits[number] = row[len(row) - wanted[number] :]
        return torch.cat(logits)

    @cached_property
    def _max_padding(self) -> int:
        """Tokens of padding that cost as much as reading the weights once more."""
        weight_nbytes = sum(parameter.nbytes for parameter in self.model.parameters())
        return weight_nbytes * self.block_size // (_PADDING_COST * self.bytes_per_block)

    def _pass(self, rows: Sequence[Row], n_last: int) -> Tensor:
        """Run `rows`, all of the same number of tokens; returns logits (len(rows), n_last, vocab) of their last tokens."""
        n_tokens = len(rows[0].ids)
        n_past = max(row.n_past for row in rows)
        slots = torch.zeros((len(rows), n_past + n_tokens), dtype=torch.long)
        mask = torch.zeros_like(slots)
        for number, row in enumerate(rows):
            # Block 0 is nobody's, and holds zeros: what is padded on the left is read there.
            length = row.n_past + n_tokens
            slots[number, -length:] = self._slots_of(row.block_table, length)
            mask[number, -length:] = 1
        positions = torch.tensor([list(range(row.n_past, row.n_past + n_tokens)) for row in rows])
        slots = slots.to(self.device)
        cache = transformers.DynamicCache()
        cache.layers = [_BlocksLayer(keys, values, slots, n_tokens) for keys, values in self.caches]
        arguments = self._skeleton.accepted(
            attention_mask=mask.to(self.device), position_ids=positions.to(self.device), logits_to_keep=n_last
        )
        ids = torch.tensor([list(row.ids) for row in rows], device=self.device)
        logits: Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **arguments).logits
        return logits[:, -n_last:]

    def _slots_of(self, block_table: Sequence[int], n_tokens: int) -> Tensor:
        """(n_tokens,) cache slots of a sequence's tokens, in host memory."""
        blocks = torch.tensor(block_table[: blocks_for(n_tokens, self.block_size)])
        return (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()[:n_tokens]

    def _check_first_layers(self) -> None:
        """Compare the first layer of each kind over the cache with the same without one: a prompt, then one token, padded.

        Finds an architecture that looks at tokens to come, keeps more than keys and values, or takes padding for tokens.
        """
        started, waited_s = time.perf_counter(), self._gate.waited_s if self._gate else 0.0
        modules = self._skeleton.checked[:_N_CHECKED_KINDS]
        n_tokens = min(_N_CHECKED_TOKENS, self.n_blocks * self.block_size, self.family.max_model_len)
        ids = [(7 * i + 1) % self.vocab_size for i in range(n_tokens)]
        table = list(range(blocks_for(n_tokens, self.block_size), 0, -1))
        rows = [Row(ids[-1:], n_tokens - 1, table)]
        n_short = max(1, n_tokens // 2)
        n_blocks = blocks_for(n_short, self.block_size)
        if len(table) + n_blocks <= self.n_blocks and n_short < n_tokens:
            # A shorter one beside it, so that there is padding.
            rows.append(Row(ids[n_short - 1 : n_short], n_short - 1, [block + len(table) for block in range(1, n_blocks + 1)]))
        with torch.inference_mode(), self._skeleton.one_of_each_kind():
            for row in rows:
                if row.n_past:
                    with first_outputs(modules):
                        self._pass([replace(row, ids=ids[: row.n_past], n_past=0)], 1)
            with first_outputs(modules) as found:
                self._pass(rows, 1)
            with first_outputs(modules) as plain:
                self._model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.15
        for layer, ours, theirs in zip(self._skeleton.kinds, found, plain, strict=False):
            expected = torch.stack([theirs[0, row.n_past] for row in rows]).float()
            error = float(torch.linalg.vector_norm(ours[:, 0].float() - expected) / torch.linalg.vector_norm(expected))
            if not error <= tolerance:  # so that NaN fails
                reason = f"with this config.json, layer {layer} over a KV cache differs from the same without one by {error:.2g}"
                raise UnsupportedArchitecture(self.family.architecture, reason)
        waited_s = (self._gate.waited_s if self._gate else 0.0) - waited_s
        self.build_times = replace(self.build_times, check_s=time.perf_counter() - started - waited_s)


class _BlocksLayer(DynamicLayer):
    """A layer of transformers' cache whose tokens lie in blocks.

    :param keys: (n_blocks, block_size, H, D), as `values`
    :param slots: (n, L), where the tokens of n sequences are, those that are about to come at the end
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, n_new: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._blocks = keys.flatten(0, 1), values.flatten(0, 1)
        self._slots = slots
        self._new_slots = slots[:, -n_new:].flatten()
        self._n_tokens = slots.shape[1] - n_new

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put the new (n, H, n_new, D) into their slots; returns (n, H, L, D), keys and values of all tokens."""
        found = []
        for blocks, states in zip(self._blocks, (key_states, value_states), strict=True):
            blocks.index_copy_(0, self._new_slots, states.transpose(1, 2).flatten(0, 1).to(blocks.dtype))
            found.append(blocks[self._slots].transpose(1, 2).contiguous())
        self._n_tokens = self._slots.shape[1]
        return found[0], found[1]

    def get_seq_length(self, *_: Any) -> int:
        """Tokens of the longest sequence, padding included."""
        return self._n_tokens


def share_passes(shapes: Sequence[tuple[int, int]], max_padding: int) -> list[list[int]]:
    """Which chunks run together, by their numbers; each of `shapes` is a chunk's tokens, and those before them.

    Chunks of one pass have the same number of tokens, so that padding is only before a sequence's first token, never inside it.
    The longest go first, and others join them as long as all padding of the pass stays within `max_padding` tokens.
    """
    passes: list[list[int]] = []
    n_padded = 0
    for number in sorted(range(len(shapes)), key=lambda number: shapes[number], reverse=True):
        n_tokens, n_past = shapes[number]
        if passes:
            n_first, most_past = shapes[passes[-1][0]]
            if n_first == n_tokens and n_padded + most_past - n_past <= max_padding:
                n_padded += most_past - n_past
                passes[-1].append(number)
                continue
        passes.append([number])
        n_padded = 0
    return passes


class LongRopeRunner(ModelRunner):
    """Paged attention for models with two sets of rotary frequencies, for sequences up to a length and for longer ones.

    A pass uses the long set if any position in it is beyond; so there are two passes in a step where both kinds are. A sequence
    that grows beyond is computed again from its first token, as transformers' ``generate()`` does.
    """

    def forward(self, chunks: Sequence[Chunk], *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`ModelRunner.forward`."""
        limit = self.family.long_after
        assert limit is not None
        if all(chunk.stop <= limit for chunk in chunks):
            return super().forward(chunks, *args, **kwargs)
        wanted = args[0] if args else kwargs.get("n_rows")
        n_rows = [int(chunk.samples) for chunk in chunks] if wanted is None else list(wanted)
        logits: list[Tensor] = [torch.empty(0)] * len(chunks)
        for beyond in (False, True):
            numbers = [number for number, chunk in enumerate(chunks) if (chunk.stop > limit) == beyond]
            if not numbers:
                continue
            some = [chunks[number] for number in numbers]
            # What is in the cache up to the switch was computed with the short set.
            some = [Chunk(chunk.sequence, 0, chunk.stop) if beyond and chunk.start <= limit else chunk for chunk in some]
            found = super().forward(some, *([[n_rows[number] for number in numbers]] if wanted is not None else []))
            for number, rows in zip(numbers, found.split([n_rows[number] for number in numbers]), strict=True):
                logits[number] = rows
        return torch.cat(logits)
