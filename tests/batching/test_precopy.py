"""Which kind of move is chosen, and when a request is stopped."""

from __future__ import annotations

import pytest

from sllmdask.batching.precopy import MAX_ROUNDS, MAX_STAGES, Kind, MoveCosts, is_last_round, is_last_stage

MIB = 1024**2


@pytest.mark.parametrize(
    ("bytes_per_s", "prefill_tokens_per_s", "kind"),
    [
        (1e9, 2000, Kind.KV),  # 0.1 s against 0.5
        (1e8, 2000, Kind.TOKENS),  # 1 s against 0.5
        (1e8, None, Kind.KV),  # 1 s against 0.01 * 1000 + 0.1
        (5e6, None, Kind.TOKENS),  # 20 s against 10.1
    ],
)
def test_the_kind_is_that_of_the_smaller_time(bytes_per_s: float, prefill_tokens_per_s: float | None, kind: Kind):
    costs = MoveCosts(int(1e8), bytes_per_s, n_tokens=1000, prefill_tokens_per_s=prefill_tokens_per_s)
    assert costs.cheaper is kind


def test_the_rest_is_sent_when_it_takes_no_longer_than_a_tenth_of_a_step():
    assert is_last_stage(1 * MIB, 100 * MIB, 0.1, 1)
    assert not is_last_stage(2 * MIB, 100 * MIB, 0.1, 1)
    assert not is_last_stage(2 * MIB, 100 * MIB, 0.1, MAX_STAGES - 1)
    assert is_last_stage(2 * MIB, 100 * MIB, 0.1, MAX_STAGES)


def test_rounds_end_when_the_tail_is_short_or_does_not_get_shorter():
    assert not is_last_round(100, 20, 1, None)
    assert is_last_round(20, 20, 1, None)
    assert not is_last_round(50, 20, 2, 100)
    assert is_last_round(100, 20, 2, 100)
    assert is_last_round(50, 20, MAX_ROUNDS, 100)
