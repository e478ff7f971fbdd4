"""Where the tokens of the running sequences are in the cache, kept from step to step.

A step needs the place of every token that its rows look at. Between two steps a sequence grows by a token, and by a block now
and then, so what was worked out for it stays and is added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sllmdask.batching.blocks import blocks_for

Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class _Table:
    #: What the arrays were made from.
    blocks: list[int]
    #: int32, with room behind for blocks to come.
    ids: Array
    #: int64, one for each token of each block.
    slots: Array


class SlotTables:
    """Tables of sequences, each kept as long as its `owner` lives."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._offsets = np.arange(block_size, dtype=np.int64)
        self._tables: WeakKeyDictionary[object, _Table] = WeakKeyDictionary()

    def find(self, owner: object, block_table: list[int], n_tokens: int) -> tuple[Array, Tensor]:
        """The blocks (int32) and the slots (int64, one for each token) of the first `n_tokens` tokens, in `block_table`.

        They are views that stay true while the sequence grows; a table whose blocks have changed is made anew.
        """
        n_blocks = blocks_for(n_tokens, self._block_size)
        table = self._tables.get(owner)
        if table is None or table.blocks != block_table[: len(table.blocks)]:
            table = self._tables[owner] = self._make([], n_blocks)
        n_known = len(table.blocks)
        if n_known < n_blocks:
            if n_blocks > len(table.ids):
                grown = self._make(table.blocks, 2 * n_blocks)
                grown.ids[:n_known] = table.ids[:n_known]
                grown.slots[: n_known * self._block_size] = table.slots[: n_known * self._block_size]
                table = self._tables[owner] = grown
            new = np.asarray(block_table[n_known:n_blocks], dtype=np.int64)
            table.ids[n_known:n_blocks] = new
            places = new[:, None] * self._block_size + self._offsets
            table.slots[n_known * self._block_size : n_blocks * self._block_size] = places.ravel()
            table.blocks.extend(block_table[n_known:n_blocks])
        return table.ids[:n_blocks], torch.from_numpy(table.slots[:n_tokens])

    def clear(self) -> None:
        self._tables.clear()

    def _make(self, blocks: list[int], n_blocks: int) -> _Table:
        n_blocks = max(n_blocks, 8)
        return _Table(list(blocks), np.zeros(n_blocks, np.int32), np.zeros(n_blocks * self._block_size, np.int64))
