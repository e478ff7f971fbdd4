"""A request that comes to an engine by its tokens: their KV is computed beside what runs, and nothing is drawn meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from sllmdask.errors import StateRefused
from tests.engine.models import TinyModel, assert_all_free, drain, make_engine, make_model, prompts, request, tokens_of
from tests.engine.test_state import alone, move, wire


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def hand_over(source: Any, target: Any, name: str, outputs: list[Any], epoch: int = 1, delta: int = 3) -> int:
    """Rounds of tokens until the tail is short; both engines step meanwhile. Returns how many rounds it took."""
    target.import_open(wire(source.export_open(name, epoch)), tokens_will_do=True)
    n_told = n_rounds = 0
    while True:
        sequence = source.find(name)
        tail = sequence.token_ids(n_told, sequence.n_tokens)
        if n_rounds and len(tail) <= delta:
            break
        n_rounds += 1
        n_told = target.import_tokens(name, epoch, n_told, tail)["n_known"]
        while (here := target.import_tokens(name, epoch))["n_tokens"] < here["n_known"] - 1:
            assert target.has_work
            outputs += source.step() + target.step()
    last = source.export_freeze(name, epoch, (sequence.n_tokens - 1) // 16)
    assert target.import_commit(name, epoch, wire(last["state"]))
    assert source.export_commit(name, epoch)
    return n_rounds


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("to_dtype", ["float32"])
def test_a_request_that_comes_by_its_tokens_gives_the_answer_of_one_that_stayed(
    model: TinyModel, params: dict[str, Any], to_dtype: str
):
    [prompt, other] = prompts(2, 60, 90, seed=4)
    expected = {"a": alone(model, prompt, 60, **params), "b": alone(model, other, 50)}
    source = make_engine(model, max_batch_tokens=24)
    target = make_engine(model, block_size=8, max_batch_tokens=24, dtype=to_dtype)
    source.add(request("a", prompt, 60, **params))
    target.add(request("b", other, 50))
    outputs = [output for _ in range(9) for output in source.step() + target.step()]
    n_rounds = hand_over(source, target, "a", outputs)
    assert n_rounds >= 2
    arrived = target.find("a")
    assert arrived is not None and arrived.n_uncomputed <= 3 + 1
    while source.has_work or target.has_work:
        outputs += source.step() + target.step()
    assert tokens_of(outputs) == expected
    assert_all_free(source)
    assert_all_free(target)


def test_computing_the_tokens_of_one_that_comes_draws_nothing_and_ends(model: TinyModel):
    [prompt] = prompts(1, 50, 50)
    source, target = make_engine(model), make_engine(model, max_batch_tokens=16)
    source.add(request("a", prompt))
    target.import_open(source.export_open("a", 1), tokens_will_do=True)
    target.import_tokens("a", 1)
    n_steps = 0
    while target.has_work:
        assert target.step() == []
        n_steps += 1
    assert n_steps == 4, "49 tokens, 16 in a step"
    assert target.import_tokens("a", 1) == {"n_known": 50, "n_tokens": 49}
    assert target.import_abort("a", 1)
    source.export_abort("a", 1)
    assert drain(source)["a"] == model.generate(prompt, 24)
    assert_all_free(target)


def test_tokens_may_be_told_twice_and_not_with_a_gap(model: TinyModel):
    [prompt] = prompts(1, 20, 20)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt))
    target.import_open(source.export_open("a", 1), tokens_will_do=True)
    assert target.import_tokens("a", 1, 18, [*prompt[18:], 7, 8])["n_known"] == 22
    assert target.import_tokens("a", 1, 20, [7, 8])["n_known"] == 22
    with pytest.raises(StateRefused, match="missing"):
        target.import_tokens("a", 1, 25, [9])
    with pytest.raises(StateRefused, match="not those"):
        target.import_commit("a", 1, source.export_freeze("a", 1)["state"])
    target.import_abort("a", 1)
    assert_all_free(target)


def test_what_has_another_layout_comes_by_its_tokens_only(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model), make_engine(model, dtype="bfloat16")
    source.add(request("a", prompt))
    source.step()
    with pytest.raises(StateRefused, match="float32"):
        target.import_open(source.export_open("a", 1))
    ticket = target.import_open(source.export_open("a", 1), tokens_will_do=True)
    assert "float32" in ticket["kv_refused"]
    with pytest.raises(StateRefused, match="float32"):
        target.import_write("a", 1, source.export_read("a", 1))
    assert target.import_tokens("a", 1)["n_known"] == 41
    target.import_abort("a", 1)
    assert_all_free(target)


def test_room_that_is_asked_for_beyond_what_was_reserved_is_there_or_refused(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model), make_engine(model, n_blocks=6)
    source.add(request("a", prompt))
    target.import_open(source.export_open("a", 1), 40)
    assert target.stats().blocks_free == 3
    target.import_extend("a", 1, 90)
    assert target.stats().blocks_free == 0
    with pytest.raises(StateRefused, match="no room"):
        target.import_extend("a", 1, 97)
    target.import_abort("a", 1)
    assert_all_free(target)


def test_weights_of_one_model_have_one_name_and_those_of_another_another(model: TinyModel, tmp_path: Any):
    engines = [make_engine(model), make_engine(model, block_size=8), make_engine(model, dtype="bfloat16")]
    for engine in engines:
        engine.identify(model.tensors)
    other = make_model(tmp_path, seed=1)
    engines.append(make_engine(other))
    engines[-1].identify(other.tensors)
    names = [engine.model_id for engine in engines]
    assert names[0] == names[1] and len(set(names)) == 3
    engines[0].add(request("a", prompts(1, 9, 9)[0]))
    engines[0].step()
    with pytest.raises(StateRefused, match="model"):
        move(engines[0], engines[3], "a")
