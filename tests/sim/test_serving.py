"""The engine of one instance under the virtual clock, against a plain loop over its steps."""

from __future__ import annotations

from random import Random

import pytest

from sllmdask.sim.clock import Clock
from sllmdask.sim.serving import Sequence, Serving, StepCosts

COSTS = StepCosts()


class Heard:
    def __init__(self, clock):
        self.clock, self.first_token_at, self.ended_at = clock, {}, {}

    def made_token(self, sequence):
        self.first_token_at.setdefault(sequence.request, self.clock.now)

    def ended(self, sequence):
        self.ended_at[sequence.request] = self.clock.now


def serve(requests, costs=COSTS):
    """First tokens and ends of `requests`, (arrives at, prompt, output), by the simulator."""
    clock = Clock()
    heard = Heard(clock)
    serving = Serving(clock, costs, heard)
    for i, (at, prompt, output) in enumerate(requests):
        clock.call_at(at, lambda i=i, prompt=prompt, output=output: serving.add(Sequence(i, prompt, output)))
    clock.run()
    return heard.first_token_at, heard.ended_at


def serve_step_by_step(requests, costs=COSTS):
    """The same, one step after the other: a whole prefill if one is due and fits, otherwise one decode step of the batch."""
    now, batch, first, ended = 0.0, [], {}, {}
    left = list(enumerate(requests))
    while left or batch:
        due = [each for each in left if each[1][0] <= now]
        room = costs.kv_tokens - sum(requests[i][1] + requests[i][2] for i, _ in batch)
        if due and (not batch or due[0][1][1] + due[0][1][2] <= room):
            i, (_, prompt, _) = left.pop(0)
            now += costs.prefill_s + costs.prefill_s_per_token * prompt
            first[i] = now
            batch.append((i, 1))
        elif batch:
            n_tokens = sum(requests[i][1] + n_done for i, n_done in batch)
            now += costs.decode_s + costs.decode_s_per_sequence * len(batch) + costs.decode_s_per_token * n_tokens
            batch = [(i, n_done + 1) for i, n_done in batch]
        else:
            now = left[0][1][0]
        for i, n_done in batch:
            if n_done >= requests[i][2]:
                ended[i] = now
        batch = [(i, n_done) for i, n_done in batch if n_done < requests[i][2]]
    return first, ended


def test_one_request_alone_takes_its_prefill_and_its_decode_steps():
    first, ended = serve([(0.0, 100, 3)])
    prefill_s = 0.002 + 100 * 0.000235
    assert first[0] == pytest.approx(prefill_s)
    decode_s = sum(0.026 + 0.00012 + 0.0000021 * n for n in (101, 102))
    assert ended[0] == pytest.approx(prefill_s + decode_s)


@pytest.mark.parametrize("seed", range(20))
def test_summed_up_steps_end_when_single_steps_do(seed):
    rng = Random(seed)
    at, requests = 0.0, []
    for _ in range(30):
        at += rng.expovariate(2.0)
        requests.append((at, rng.randrange(1, 400), rng.randrange(1, 200)))
    costs = StepCosts(kv_tokens=rng.choice([600, 2000, 10**6]))
    found, expected = serve(requests, costs), serve_step_by_step(requests, costs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert [ours[i] for i in sorted(ours)] == pytest.approx([theirs[i] for i in sorted(theirs)], abs=1e-6)


def test_what_leaves_at_a_step_goes_on_elsewhere_and_makes_as_many_tokens():
    clock = Clock()
    heard = Heard(clock)
    here, there = Serving(clock, COSTS, heard), Serving(clock, COSTS, heard)
    sequences = [Sequence("a", 50, 100), Sequence("b", 50, 40)]
    for each in sequences:
        here.add(each)
    moved_at = []

    def move(taken):
        moved_at.append((clock.now, [(each.request, each.n_done) for each in taken]))
        clock.call_later(0.5, lambda: there.give(taken))

    clock.call_at(1.0, lambda: here.take(None, move))
    clock.run()
    ((at, taken),) = moved_at
    assert 1.0 <= at < 1.0 + COSTS.decodes(1, 2, 300)
    assert not here.sequences() and not there.sequences()
    assert [each.n_done for each in sequences] == [100, 40]
    # Both go on after the pause, without another prefill.
    left = dict(taken)
    n_tokens = 50 + left["a"] + 50 + left["b"]
    assert heard.ended_at["b"] == pytest.approx(at + 0.5 + COSTS.decodes(40 - left["b"], 2, n_tokens))


def test_tokens_are_known_in_the_middle_of_a_row_of_steps():
    clock = Clock()
    serving = Serving(clock, COSTS, Heard(clock))
    serving.add(Sequence("a", 10, 1000))
    known = []
    clock.call_at(5.0, lambda: known.append(serving.tokens_now()["a"]))
    clock.run()
    n_done = known[0] - 10
    began_s = COSTS.prefill(10)
    # The prefill made one; so many whole steps are over, and not one more.
    assert began_s + COSTS.decodes(n_done - 1, 1, 11) <= 5.0 < began_s + COSTS.decodes(n_done, 1, 11)
