"""What it takes to move requests, learnt from moves of which the truth is known."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sllmdask.policy.events import MoveEnded
from sllmdask.policy.move_times import N_ENOUGH, MoveTimes
from sllmdask.policy.views import ModelView

#: As in ServerlessLLM's formula: 10 ms for each token, and 100 ms.
MODEL = ModelView("m", nbytes=1, alpha=0.01, beta=0.1)
MiB = 1024**2
#: Bytes of KV of a token.
KV = 32 * 1024


def kv_move(n_tokens: int, seconds: float, source: str = "one", destination: str = "two", **more) -> MoveEnded:
    nbytes = n_tokens * KV
    return MoveEnded(0.0, "r", "m", "m/1", "m/2", source, destination, "moved", "kv", n_tokens, nbytes, nbytes, seconds, **more)


def token_move(n_tokens: int, seconds: float, **more) -> MoveEnded:
    return replace(kv_move(n_tokens, seconds), kind="tokens", nbytes=4 * n_tokens, **more)


def test_before_anything_has_moved_the_deployment_tells_and_eight_move_at_a_time():
    times = MoveTimes()
    assert times.seconds(MODEL, "one", "two", [353]) == pytest.approx(3.63)
    assert times.seconds(MODEL, "one", "two", [10, 353, 80]) == pytest.approx(3.63)
    assert times.seconds(MODEL, "one", "two", []) == 0.0
    # Eight leave at a time, and the ninth when the first has gone.
    assert times.seconds(MODEL, "one", "two", [90] * 8) == pytest.approx(1.0)
    assert times.seconds(MODEL, "one", "two", [90] * 9) == pytest.approx(2.0)
    assert times.seconds(MODEL, "one", "two", [290, *[90] * 8]) == pytest.approx(3.0)


def test_a_line_is_believed_once_it_rests_on_enough_moves():
    times = MoveTimes()
    for n in range(N_ENOUGH):
        assert times.seconds(MODEL, "one", "two", [100]) == pytest.approx(1.1), n
        times.observe(token_move(100 * (n + 1), 1e-4 * 100 * (n + 1) + 1e-3), MODEL)
    assert times.seconds(MODEL, "one", "two", [200]) == pytest.approx(1e-4 * 200 + 1e-3, rel=0.2)


@pytest.mark.parametrize("true_bytes_per_s", [50e6, 1e9, 20e9])
def test_copies_are_predicted_from_the_speed_between_these_two_workers(true_bytes_per_s: float):
    rng, times = Random(0), MoveTimes()

    def takes_s(n_tokens: int) -> float:
        return 0.002 + n_tokens * KV / true_bytes_per_s

    for _ in range(12):
        n = rng.randrange(64, 4096)
        times.observe(kv_move(n, takes_s(n) * rng.uniform(0.95, 1.05)), MODEL)
        # Another pair is ten times as slow.
        times.observe(kv_move(n, 10 * takes_s(n), "three", "four"), MODEL)
    truth = sum(takes_s(n) for n in (1000, 2000))
    assert times.seconds(MODEL, "one", "two", [1000, 2000]) == pytest.approx(min(truth, 20.1), rel=0.15), "in turn"
    assert times.seconds(MODEL, "three", "four", [2000]) == pytest.approx(min(10 * takes_s(2000), 20.1), rel=0.15)


def test_the_cheaper_way_counts_and_what_never_copied_is_computed_again():
    times = MoveTimes()
    for n in (100, 200, 300, 400):
        times.observe(token_move(n, 1e-3 * n), MODEL)
    recompute_s = times.seconds(MODEL, "one", "two", [1000])
    assert recompute_s == pytest.approx(1.0, rel=0.2)
    for n in (100, 200, 300, 400):
        times.observe(kv_move(n, 1e-5 * n), MODEL)
    assert times.seconds(MODEL, "one", "two", [1000]) == pytest.approx(0.01, rel=0.3)
    other = ModelView("other", nbytes=1)
    assert times.seconds(other, "one", "two", [1000]) == pytest.approx(10.1), "nobody knows the size of its KV"


def test_what_moves_beside_others_counts_as_much_as_it_would_take_alone():
    alone, together = MoveTimes(), MoveTimes()
    for n in (100, 200, 300, 400):
        alone.observe(kv_move(n, 1e-4 * n), MODEL)
        together.observe(kv_move(n, 4e-4 * n, n_at_once=4.0), MODEL)
    one_s, four_s = (times.seconds(MODEL, "one", "two", [250]) for times in (alone, together))
    assert four_s == pytest.approx(one_s)
    move = kv_move(250, 0.0, n_at_once=4.0)
    assert together.expected_s(move, MODEL) == pytest.approx(4 * one_s)


@pytest.mark.parametrize("outcome", ["stayed", "ended"])
def test_a_move_that_did_not_come_to_its_end_tells_nothing_of_how_long_that_takes(outcome: str):
    times = MoveTimes()
    for _ in range(2 * N_ENOUGH):
        times.observe(replace(kv_move(100, 9.0), outcome=outcome), MODEL)
        times.observe(replace(token_move(100, 9.0), outcome=outcome), MODEL)
    assert times.seconds(MODEL, "one", "two", [100]) == pytest.approx(1.1)


def test_a_worker_that_left_and_a_model_that_was_deleted_are_forgotten():
    times = MoveTimes()
    for n in (100, 200, 300):
        times.observe(token_move(n, 1e-3 * n), MODEL)
    anywhere_s = times.seconds(MODEL, "one", "three", [200])
    assert anywhere_s == pytest.approx(0.2, rel=0.2)
    times.forget_worker("two")
    assert times.seconds(MODEL, "one", "two", [200]) == anywhere_s, "what it takes elsewhere is known still"
    times.forget_model("m")
    assert times.seconds(MODEL, "one", "two", [200]) == pytest.approx(2.1)
