from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sllmdask.batching.blocks import BlockPool, blocks_for


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
