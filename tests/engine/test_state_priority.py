"""A request that comes from another engine keeps its place among others: by its priority, and by what it has waited."""

from __future__ import annotations

import pytest

from sllmdask.batching.sequence import Sequence
from sllmdask.engine.engine import LLMEngine, StepOutput
from tests.engine.models import TinyModel, drain, make_engine, make_model, prompts, request, tokens_of
from tests.engine.test_state import move, nothing_left, wire
from tests.engine.test_state_tokens import hand_over


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def found(engine: LLMEngine, name: str) -> Sequence:
    sequence = engine.find(name)
    assert sequence is not None
    return sequence


@pytest.mark.parametrize("kind", ["kv", "tokens"])
@pytest.mark.parametrize("priority", [0, 1])
def test_where_memory_runs_out_the_lower_priority_gives_way_wherever_it_came_from(model: TinyModel, kind: str, priority: int):
    [prompt, other] = prompts(2, 40, 40, seed=6)
    source, target = make_engine(model), make_engine(model, n_blocks=9, prefix_reuse=False)
    target.add(request("here", other, 60))
    source.add(request("came", prompt, 60, priority=priority))
    outputs = [output for _ in range(4) for output in source.step() + target.step()]
    if kind == "kv":
        move(source, target, "came")
    else:
        hand_over(source, target, "came", outputs)
    came, here = found(target, "came"), found(target, "here")
    drain(target, outputs)
    gave_way = {"came": came.n_preemptions > 0, "here": here.n_preemptions > 0}
    # Of one priority, the one that came later.
    assert gave_way == {"came": priority == 0, "here": priority == 1}
    assert tokens_of(outputs) == {"came": model.generate(prompt, 60), "here": model.generate(other, 60)}
    nothing_left(source, target)


@pytest.mark.parametrize(("priority", "level", "gives_way"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_request_that_came_is_safe_from_newcomers_by_its_priority_and_by_what_it_had_waited(
    model: TinyModel, priority: int, level: int, gives_way: bool
):
    [prompt, other] = prompts(2, 60, 60, seed=7)
    source, target = make_engine(model), make_engine(model, n_blocks=7, prefix_reuse=False)
    source.add(request("came", prompt, priority=priority))
    outputs = [output for _ in range(4) for output in source.step()]
    found(source, "came").level = level
    move(source, target, "came")
    came = found(target, "came")
    target.add(request("new", other, 4, priority=1))
    drain(target, outputs)
    assert (came.n_preemptions > 0) == gives_way
    assert tokens_of(outputs) == {"came": model.generate(prompt, 24), "new": model.generate(other, 4)}
    nothing_left(source, target)


@pytest.mark.parametrize("priority", [0, 1])
def test_a_request_that_came_and_waits_is_begun_before_those_of_lower_priority_that_came_before(model: TinyModel, priority: int):
    [prompt, waiting, urgent] = prompts(3, 30, 40, seed=8)
    source, target = make_engine(model), make_engine(model, max_running=1)
    source.add(request("came", prompt, priority=priority))
    outputs: list[StepOutput] = [output for _ in range(4) for output in source.step()]
    # It has the one place, so that the other one waits, but comes later.
    since = target.import_open(wire(source.export_open("came", 1)))["n_tokens"]
    target.add(request("waits", waiting, 4))
    last = wire(source.export_freeze("came", 1, since))
    assert target.import_commit("came", 1, last["state"], last["kv"]) and source.export_commit("came", 1)
    target.add(request("urgent", urgent, 4, priority=2))
    drain(target, outputs)
    order = [output.request_id for output in outputs]
    after = order[max(index for index, name in enumerate(order) if name == "urgent") + 1]
    assert after == ("came" if priority else "waits")
    answers = {"came": model.generate(prompt, 24), "waits": model.generate(waiting, 4), "urgent": model.generate(urgent, 4)}
    assert tokens_of(outputs) == answers
    nothing_left(source, target)
