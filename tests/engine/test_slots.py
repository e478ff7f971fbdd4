from __future__ import annotations

import gc
import random

import pytest

from sllmdask.engine.slots import SlotTables
from tests.engine.models import request


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_slots_are_those_of_the_block_table_however_it_has_changed(block_size: int):
    rng = random.Random(block_size)
    tables = SlotTables(block_size)
    sequences = [request(str(i), [1]) for i in range(5)]
    for _ in range(400):
        sequence = rng.choice(sequences)
        change = rng.random()
        if change < 0.6:
            sequence.block_table.append(rng.randint(1, 10_000))
        elif change < 0.7:
            sequence.block_table = []  # preempted
        elif change < 0.8 and sequence.block_table:
            sequence.block_table[rng.randrange(len(sequence.block_table))] = rng.randint(1, 10_000)  # copied on write
        if not sequence.block_table:
            sequence.block_table.append(rng.randint(1, 10_000))
        n_tokens = rng.randint(1, len(sequence.block_table) * block_size)
        blocks, slots = tables.find(sequence, sequence.block_table, n_tokens)
        assert slots.tolist() == [sequence.block_table[i // block_size] * block_size + i % block_size for i in range(n_tokens)]
        assert blocks.tolist() == sequence.block_table[: -(-n_tokens // block_size)]


def test_what_a_step_was_given_stays_as_it_was_when_the_sequence_grows():
    tables = SlotTables(4)
    sequence = request("a", [1])
    sequence.block_table = [9]
    _, first = tables.find(sequence, sequence.block_table, 3)
    sequence.block_table += range(20, 60)
    tables.find(sequence, sequence.block_table, 150)
    assert first.tolist() == [36, 37, 38]


def test_a_sequence_that_is_gone_leaves_nothing():
    tables = SlotTables(4)
    sequence = request("a", [1])
    sequence.block_table = [9]
    tables.find(sequence, sequence.block_table, 3)
    assert len(tables._tables) == 1
    del sequence
    gc.collect()
    assert not tables._tables
