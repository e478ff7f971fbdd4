"""Paged KV bookkeeping: which blocks are free, and how many hold on to each of the others. Ids only, no memory.

Source: PagedAttention (vLLM, SOSP '23): KV in fixed-size blocks, found through a table per sequence, shared by reference count.
"""

from __future__ import annotations

from collections.abc import Iterable


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that hold the KV of `n_tokens` tokens."""
    return -(-n_tokens // block_size)


class BlockPool:
    """`n_total` blocks with ids 1..n_total. Id 0 is never handed out, so that padded block tables may point at it.

    At any time ``n_free + n_used == n_total``, whatever is shared. The last released block is handed out first: it is the
    likeliest to be in a processor's cache.
    """

    def __init__(self, n_total: int) -> None:
        assert n_total >= 1
        self.n_total = n_total
        self._free = list(range(n_total, 0, -1))
        self._n_holders: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        return len(self._n_holders)

    def holders(self, block: int) -> int:
        """How many hold `block`; 0 if it is free."""
        return self._n_holders.get(block, 0)

    def allocate(self, n_blocks: int) -> list[int]:
        """`n_blocks` free blocks, held once each. Ask `n_free` first: too few is a defect of the caller, not an event."""
        assert 0 <= n_blocks <= self.n_free, f"{n_blocks} blocks asked for, {self.n_free} free"
        blocks = [self._free.pop() for _ in range(n_blocks)]
        self._n_holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, all of them in use."""
        for block in blocks:
            assert block in self._n_holders, f"block {block} is free: it cannot be shared"
            self._n_holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each of `blocks`; those that nobody holds any more are free."""
        for block in reversed(list(blocks)):
            assert block in self._n_holders, f"block {block} is free already"
            self._n_holders[block] -= 1
            if not self._n_holders[block]:
                del self._n_holders[block]
                self._free.append(block)
