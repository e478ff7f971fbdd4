from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sllmdask.batching.blocks import BlockPool, block_digest, blocks_for


@pytest.mark.parametrize(("n_tokens", "n_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_started_block_counts_as_a_whole_one(n_tokens: int, n_blocks: int):
    assert blocks_for(n_tokens, 16) == n_blocks


def test_block_0_is_never_handed_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.n_free == 0


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.release(blocks)
    assert (pool.n_free, pool.holders(blocks[0]), pool.holders(blocks[1])) == (2, 1, 0)
    pool.release(blocks[:1])
    assert pool.n_free == 3


@pytest.mark.parametrize("misuse", [lambda pool: pool.allocate(4), lambda pool: pool.release([1]), lambda pool: pool.share([1])])
def test_misuse_is_a_defect_of_the_caller(misuse):
    with pytest.raises(AssertionError):
        misuse(BlockPool(3))


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, beside a plain dictionary of who holds what."""

    N_BLOCKS = 12
    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.N_BLOCKS)
        self.held: list[int] = []

    @rule(target=holdings, n=st.integers(0, N_BLOCKS))
    def allocate(self, n: int):
        if n > self.pool.n_free:
            return multiple()
        blocks = self.pool.allocate(n)
        assert not set(blocks) & set(self.held)
        self.held += blocks
        return blocks

    @rule(target=holdings, blocks=holdings)
    def share(self, blocks: list[int]):
        self.pool.share(blocks)
        self.held += blocks
        return blocks

    @rule(blocks=consumes(holdings))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.held.remove(block)

    @invariant()
    def every_block_is_free_or_held_as_often_as_the_model_says(self) -> None:
        assert self.pool.n_free + self.pool.n_used == self.pool.n_total == self.N_BLOCKS
        assert self.pool.n_used == len(set(self.held))
        assert all(self.pool.holders(block) == self.held.count(block) for block in range(self.N_BLOCKS + 1))


TestPoolMachine = PoolMachine.TestCase


@given(st.integers(1, 40), st.integers(0, 40))
def test_what_was_released_can_be_allocated_again(n_total: int, n: int):
    pool = BlockPool(n_total)
    n = min(n, n_total)
    blocks = pool.allocate(n)
    pool.release(blocks)
    assert pool.allocate(n) == blocks


# --- blocks that are found again ---------------------------------------------------------------------------------------


def named(pool: BlockPool, n: int) -> tuple[list[int], list[bytes]]:
    """`n` blocks with digests, held."""
    blocks = pool.allocate(n)
    digests = [block_digest(b"", b"", [block]) for block in blocks]
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, digest)
    return blocks, digests


def test_a_digest_tells_tokens_their_order_what_was_before_and_the_salt():
    texts = ([1, 2], [2, 1], [258, 0])
    cases = [(parent, salt, tokens) for parent in (b"", b"p" * 16) for salt in (b"", b"adapter") for tokens in texts]
    digests = {block_digest(*case) for case in cases}
    assert len(digests) == len(cases) and {len(digest) for digest in digests} == {16}
    assert all(block_digest(*case) in digests for case in cases)


def test_a_block_that_nobody_holds_is_found_until_its_memory_is_needed():
    pool = BlockPool(4)
    blocks, digests = named(pool, 2)
    pool.release(blocks)
    assert (pool.n_free, pool.n_empty, pool.n_cached, pool.n_used) == (4, 2, 2, 0)
    assert [pool.find(digest) for digest in digests] == blocks
    assert not set(pool.allocate(2)) & set(blocks)
    assert [pool.find(digest) for digest in digests] == blocks
    assert set(pool.allocate(2)) == set(blocks)
    assert [pool.find(digest) for digest in digests] == [None, None]


def test_the_cached_block_that_was_used_longest_ago_goes_first_and_of_one_sequence_the_last():
    pool = BlockPool(6)
    (a, b, c), (of_a, of_b, of_c) = named(pool, 3)
    other, [of_other] = named(pool, 1)
    pool.release([a, b, c])
    pool.release(other)
    pool.share([a])
    pool.release([a])  # used last
    pool.allocate(2)
    lost = []
    for _ in range(4):
        pool.allocate(1)
        lost += [name for name, digest in zip("abco", (of_a, of_b, of_c, of_other), strict=True) if pool.find(digest) is None]
    assert lost == [*"c", *"bc", *"bco", *"abco"]


def test_a_cached_block_that_is_shared_is_used_again_and_keeps_its_name():
    pool = BlockPool(2)
    [block], [digest] = named(pool, 1)
    pool.release([block])
    pool.share([block])
    assert (pool.holders(block), pool.n_cached, pool.n_used) == (1, 0, 1)
    assert pool.allocate(1) != [block]
    assert pool.find(digest) == block


def test_of_two_blocks_of_one_content_the_first_is_found():
    pool = BlockPool(2)
    [first], [digest] = named(pool, 1)
    [second] = pool.allocate(1)
    pool.register(second, digest)
    assert pool.find(digest) == first
    pool.release([second])
    assert (pool.n_cached, pool.n_empty) == (0, 1)
    pool.release([first])
    assert (pool.n_cached, pool.n_empty) == (1, 1)


def test_what_is_forgotten_is_not_found_whether_it_is_held_or_not():
    pool = BlockPool(3)
    (held, cached), digests = named(pool, 2)
    pool.release([cached])
    pool.forget([held, cached])
    assert [pool.find(digest) for digest in digests] == [None, None]
    assert (pool.n_empty, pool.n_cached, pool.n_used) == (2, 0, 1)
    pool.release([held])
    assert (pool.n_empty, pool.n_cached) == (3, 0)


def test_a_promise_takes_blocks_from_the_others_until_it_is_kept_or_given_back():
    pool = BlockPool(4)
    pool.reserve(3)
    assert (pool.n_free, pool.n_reserved, pool.n_used) == (1, 3, 0)
    with pytest.raises(AssertionError):
        pool.allocate(2)
    blocks = pool.allocate_reserved(2)
    assert (pool.n_free, pool.n_reserved, pool.n_used) == (1, 1, 2)
    pool.unreserve(1)
    assert pool.n_free == 2
    pool.release(blocks)
    assert pool.n_free == 4


def test_a_cached_block_that_is_promised_to_somebody_cannot_be_taken_by_its_name():
    pool = BlockPool(1)
    [block], _ = named(pool, 1)
    pool.release([block])
    pool.reserve(1)
    assert (pool.n_free, pool.n_cached, pool.n_empty, pool.n_reserved) == (0, 0, 0, 1)
    with pytest.raises(AssertionError):
        pool.share([block])
    assert pool.allocate_reserved(1) == [block]
