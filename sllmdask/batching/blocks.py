"""Paged KV bookkeeping: which blocks are free, who holds the others, and which of them begin the same text. Ids only, no memory.

Source: PagedAttention (vLLM, SOSP '23): KV in fixed-size blocks, found through a table per sequence, shared by reference count.
Prefix reuse by a chain of hashes over full blocks: vLLM's automatic prefix caching; SGLang (NeurIPS '24) for keeping what ended.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that hold the KV of `n_tokens` tokens."""
    return -(-n_tokens // block_size)


def block_digest(parent: bytes, salt: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block's KV: of its tokens, of all before them (`parent`, empty for the first block), and of `salt`.

    Two blocks of one name have the same KV. `salt` keeps apart what is computed differently from the same tokens, by an adapter
    for instance. 16 bytes, blake2b: tokens that collide cannot be found on purpose.
    """
    digest = blake2b(parent, digest_size=16, salt=blake2b(salt, digest_size=16).digest())
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


class BlockPool:
    """`n_total` blocks with ids 1..n_total. Id 0 is never handed out, so that padded block tables may point at it.

    A block is in one of four states, and at any time ``n_total == n_empty + n_cached + n_used + n_reserved``:

    - *empty*: nobody's;
    - *cached*: nobody's, but it has a digest, by which :meth:`find` finds it until its memory is needed for something else;
    - *used*: held at least once, by block tables, exports that read it, imports that write it;
    - *reserved*: promised to an import, with no id yet.

    `n_free` counts what can be handed out: empty and cached. Empty blocks go first, the last released one before the others: it
    is the likeliest to be in a processor's cache. Then the cached one that was released longest ago is forgotten.
    """

    def __init__(self, n_total: int) -> None:
        assert n_total >= 1
        self.n_total = n_total
        self.n_reserved = 0
        #: Blocks that are not held, by how they can be got at. Each of the `n_reserved` is one of them without a name yet.
        self._empty = list(range(n_total, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._n_holders: dict[int, int] = {}
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def n_free(self) -> int:
        return len(self._empty) + len(self._cached) - self.n_reserved

    @property
    def n_cached(self) -> int:
        """Free blocks that can still be found by their digest. A promise takes empty blocks first."""
        return min(len(self._cached), self.n_free)

    @property
    def n_empty(self) -> int:
        return self.n_free - self.n_cached

    @property
    def n_used(self) -> int:
        return len(self._n_holders)

    def holders(self, block: int) -> int:
        """How many hold `block`; 0 if it is free."""
        return self._n_holders.get(block, 0)

    def allocate(self, n_blocks: int) -> list[int]:
        """`n_blocks` free blocks, held once each. Ask `n_free` first: too few is a defect of the caller, not an event."""
        assert 0 <= n_blocks <= self.n_free, f"{n_blocks} blocks asked for, {self.n_free} free"
        return self._take(n_blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, all of them in use or cached."""
        for block in blocks:
            if block in self._cached:
                assert self.n_free > 0, f"block {block} is promised to somebody"
                del self._cached[block]
                self._n_holders[block] = 1
            else:
                assert block in self._n_holders, f"block {block} is free: it cannot be shared"
                self._n_holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each of `blocks`; those that nobody holds any more are free, or cached if they have a digest.

        The later blocks of a sequence are forgotten before the earlier ones, without which they cannot be found.
        """
        for block in reversed(list(blocks)):
            assert block in self._n_holders, f"block {block} is free already"
            self._n_holders[block] -= 1
            if not self._n_holders[block]:
                del self._n_holders[block]
                if block in self._digests:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    # --- prefix reuse --------------------------------------------------------------------------------------------------

    def register(self, block: int, digest: bytes) -> None:
        """A used block is full, and its content has this digest. Nothing if another block of that content is known."""
        assert block in self._n_holders, f"block {block} is free: it has no content"
        if digest not in self._by_digest and block not in self._digests:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        """The block of that content, used or cached. It is nobody's until it is shared."""
        return self._by_digest.get(digest)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find `blocks` any more: their content cannot be trusted, or goes away."""
        for block in blocks:
            digest = self._digests.pop(block, None)
            if digest is not None:
                del self._by_digest[digest]
            if block in self._cached:
                del self._cached[block]
                self._empty.append(block)

    def forget_all(self) -> None:
        self.forget(list(self._digests))

    # --- promises ------------------------------------------------------------------------------------------------------

    def reserve(self, n_blocks: int) -> None:
        """Promise `n_blocks` free blocks to somebody who will :meth:`allocate_reserved` or :meth:`unreserve` them."""
        assert 0 <= n_blocks <= self.n_free, f"{n_blocks} blocks asked for, {self.n_free} free"
        self.n_reserved += n_blocks

    def unreserve(self, n_blocks: int) -> None:
        assert 0 <= n_blocks <= self.n_reserved, f"{n_blocks} blocks given back, {self.n_reserved} reserved"
        self.n_reserved -= n_blocks

    def allocate_reserved(self, n_blocks: int) -> list[int]:
        """`n_blocks` of those that are promised, held once each."""
        self.unreserve(n_blocks)
        return self._take(n_blocks)

    def _take(self, n_blocks: int) -> list[int]:
        blocks = []
        for _ in range(n_blocks):
            if not self._empty:
                self.forget([next(iter(self._cached))])
            blocks.append(self._empty.pop())
        self._n_holders.update(dict.fromkeys(blocks, 1))
        return blocks
