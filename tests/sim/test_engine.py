"""The engine without a model: what steps cost, and that it is an engine (see tests/batching/test_conformance.py for the rest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sllmdask.batching.conformance import Check, at_rest, checks_of
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.config import EngineSettings
from sllmdask.errors import InvalidRequest, StateRefused
from sllmdask.sim.engine import BatchCosts, CostModelEngine
from tests.cost_model import COST_MODEL

SETTINGS = EngineSettings(prefix_reuse=False, parking_memory=0)


@pytest.mark.parametrize("check", checks_of(COST_MODEL), ids=lambda check: check.__name__)
def test_it_is_an_engine(check: Check):
    check(COST_MODEL)


def ask(name: str, n_prompt: int, n_output: int, **params: Any) -> Sequence:
    return Sequence(name, [i % 8 for i in range(n_prompt)], SamplingParams(max_tokens=n_output, temperature=0.0, **params))


def test_one_answer_takes_its_prefill_and_its_decode_steps():
    engine = CostModelEngine(SETTINGS, now=10.0)
    engine.add(ask("a", 100, 5))
    outputs = []
    times = []
    while engine.has_work:
        outputs += engine.step()
        times.append(engine.now)
    # The first token comes of the prefill; the next four see 101 to 104 tokens.
    expected = [10 + 0.002 + 0.000235 * 100]
    for n_context in (101, 102, 103, 104):
        expected.append(expected[-1] + 0.026 + 0.00012 + 0.0000021 * n_context)
    assert times == pytest.approx(expected)
    assert [output.index for output in outputs] == [0, 1, 2, 3, 4]
    assert engine.stats().step_s == pytest.approx(expected[-1] - 10)
    assert engine.stats().first_step_s == pytest.approx(0.0255)


def test_a_step_of_decodes_and_prefill_takes_both():
    engine = CostModelEngine(SETTINGS)
    engine.add(ask("a", 40, 9))
    engine.step()
    engine.add(ask("b", 200, 9))
    before = engine.now
    engine.step()
    assert engine.now - before == pytest.approx(0.002 + 0.000235 * 200 + 0.026 + 0.00012 + 0.0000021 * 41)


def test_a_long_prompt_is_cut_into_chunks_and_each_has_its_price():
    engine = CostModelEngine(SETTINGS.model_copy(update={"max_batch_tokens": 64}))
    engine.add(ask("a", 150, 1))
    while engine.has_work:
        engine.step()
    assert engine.stats().n_steps == 3
    assert engine.now == pytest.approx(3 * 0.002 + 0.000235 * 150)


def test_what_is_found_by_its_prefix_costs_nothing():
    engine = CostModelEngine(SETTINGS.model_copy(update={"prefix_reuse": True}))
    for name in ("a", "b"):
        before = engine.now
        engine.add(ask(name, 161, 1))
        engine.step()
    # All but the last token, which is always computed: one token is a decode.
    assert engine.now - before == pytest.approx(0.026 + 0.00012 + 0.0000021 * 161)
    assert engine.stats().n_reused_tokens == 160


def test_parking_takes_the_time_of_its_bytes():
    engine = CostModelEngine(SETTINGS, BatchCosts(kv_nbytes_per_token=1000, parking_bytes_per_s=1e6), n_blocks=20)
    engine.add(ask("a", 33, 4))
    engine.step()
    before = engine.now
    engine.park("a")
    # Three blocks of 16 tokens.
    assert engine.now - before == pytest.approx(0.048)
    engine.resume("a")
    before = engine.now
    engine.step()
    assert engine.now - before == pytest.approx(0.048 + 0.026 + 0.00012 + 0.0000021 * 34)


def test_waiting_brings_it_to_a_later_time_and_never_to_an_earlier_one():
    engine = CostModelEngine(SETTINGS, now=5.0)
    engine.advance_to(7.5)
    assert engine.now == 7.5
    engine.advance_to(6.0)
    assert engine.now == 7.5
    assert engine.stats().step_s == 0


def test_requests_age_by_virtual_time():
    def first(gap_s: float) -> str:
        engine = CostModelEngine(EngineSettings(ageing=10.0, max_running=1), n_blocks=64)
        engine.add(ask("running", 20, 3))
        engine.step()
        engine.add(ask("old", 20, 1))
        engine.step()
        engine.advance_to(engine.now + gap_s)
        young = ask("young", 20, 1)
        young.priority = 1
        engine.add(young)
        heard = []
        while engine.has_work:
            heard += [output.request_id for output in engine.step()]
        return next(name for name in heard if name != "running")

    assert (first(0.0), first(25.0)) == ("young", "old")


def test_eos_ends_an_answer_unless_it_is_ignored():
    engine = CostModelEngine(SETTINGS, n_vocab=10, eos_token_ids=frozenset({3}))
    engine.add(ask("a", 20, 500, seed=1))
    engine.add(ask("b", 20, 60, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    of_a = [output for output in outputs if output.request_id == "a"]
    assert (of_a[-1].token_id, of_a[-1].finish_reason) == (3, FinishReason.STOP)
    assert all(output.token_id != 3 for output in of_a[:-1])
    assert sum(output.request_id == "b" for output in outputs) == 60
    at_rest(engine)


def test_tokens_are_spread_over_the_vocabulary():
    engine = CostModelEngine(SETTINGS, n_vocab=8)
    engine.add(ask("a", 20, 1600))
    counts = [0] * 8
    while engine.has_work:
        for output in engine.step():
            assert output.token_id is not None
            counts[output.token_id] += 1
    # 200 each; a deviation of 5 sigma would be 66.
    assert all(134 < count < 266 for count in counts)


@pytest.mark.parametrize("params", [{"logprobs": 1}, {"prompt_logprobs": 0}])
def test_what_needs_probabilities_is_refused(params: dict[str, Any]):
    engine = CostModelEngine(SETTINGS)
    with pytest.raises(InvalidRequest, match="needs a model") as caught:
        engine.add(ask("a", 20, 5, **params))
    assert caught.value.param == next(iter(params))


def test_a_state_of_another_model_or_kind_is_refused():
    source, target = CostModelEngine(SETTINGS), CostModelEngine(SETTINGS)
    source.add(ask("a", 40, 5))
    source.step()
    manifest = source.export_open("a", 1)
    changes: list[Callable[[dict[str, Any]], None]] = [
        lambda data: data.update(model_id="another"),
        lambda data: data.update(format=1),
        lambda data: data.update(token_ids="abc"),
        lambda data: data.pop("epoch"),
    ]
    for change in changes:
        data = dict(manifest)
        change(data)
        with pytest.raises(StateRefused):
            target.import_open(data)
    assert target.stats().blocks_free == target.stats().blocks_total


def test_a_state_moves_between_blocks_of_different_sizes():
    whole = CostModelEngine(SETTINGS)
    whole.add(ask("a", 75, 20))
    expected = []
    while whole.has_work:
        expected += [output.token_id for output in whole.step()]
    source = CostModelEngine(SETTINGS)
    target = CostModelEngine(SETTINGS.model_copy(update={"block_size": 6}))
    source.add(ask("a", 75, 20))
    found = [output.token_id for _ in range(6) for output in source.step()]
    since = target.import_open(source.export_open("a", 1))["n_tokens"]
    since = target.import_write("a", 1, source.export_read("a", 1, since))["n_tokens"]
    frozen = source.export_freeze("a", 1, since)
    n_computed = target.stats().n_steps
    target.import_commit("a", 1, frozen["state"], frozen["kv"])
    source.export_commit("a", 1)
    before = target.now
    found += [output.token_id for output in target.step()]
    # Nothing is computed again: the next step is a decode.
    assert target.now - before == pytest.approx(0.026 + 0.00012 + 0.0000021 * 81)
    while target.has_work:
        found += [output.token_id for output in target.step()]
    assert (found, n_computed) == (expected, 0)
