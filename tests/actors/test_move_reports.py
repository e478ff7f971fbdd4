"""What a worker tells the scheduler of the moves of its requests: each begins once and is over once, however it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from sllmdask.actors.migration import _Crowd
from sllmdask.batching.precopy import Kind
from tests.actors.moving import workers
from tests.engine.models import TinyModel, make_model, prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.asyncio
async def test_every_move_is_reported_when_it_begins_and_when_it_is_over(model: TinyModel):
    reports: list[dict[str, Any]] = []
    async with workers(model) as there:
        for registry in there.registries.values():
            registry.report = reports.append
        for name, prompt in zip("abc", prompts(3, 20, 40, seed=1), strict=True):
            there.door.submit(name, "1", prompt, max_tokens=120)
        await there.door.until(lambda: all(len(asked.tokens) >= 3 for asked in there.door.asked.values()))
        records = await asyncio.gather(*(there.move(name, "2", kind) for name, kind in zip("ab", Kind, strict=True)))
        order = there.order("c", "1", "2")
        nowhere = replace(order, destination=replace(order.destination, instance="m/9"))
        stayed = await there.registries["1"].moves.move("m/1", nowhere)
        stats = there.engine("1").stats()
    assert [record.outcome for record in (*records, stayed)] == ["moved", "moved", "stayed"]
    began = {each["move"]["request"]: each["move"] for each in reports if each["kind"] == "moving"}
    over = {each["move"]["request"]: each["move"] for each in reports if each["kind"] == "moved"}
    assert len(reports) == 6 and began.keys() == over.keys() == set("abc")
    for name, record in zip("abc", (*records, stayed), strict=True):
        move = over[name]
        assert (move["record"], move["epoch"]) == (record.as_wire(), 1)
        assert (move["model"], move["instance"], move["destination"]) == ("m", "m/1", "2")
        assert (began[name]["to"], began[name]["cause"]) == ("2", "a test")
        assert all(began[name][fact] == move[fact] for fact in ("epoch", "model", "instance", "successor", "destination"))
        n_blocks = -(-record.n_tokens // stats["block_size"])
        assert move["kv_nbytes"] == n_blocks * stats["bytes_per_block"] > 0
    assert all(1.0 <= over[name]["n_at_once"] <= 2.0 for name in "ab")
    assert over["c"]["n_at_once"] == pytest.approx(1.0)


def test_how_many_moves_there_were_at_once_adds_up_to_the_time_in_which_there_were_any():
    crowd = _Crowd()
    began = {"a": crowd.enter(10.0), "b": crowd.enter(12.0)}
    assert crowd.leave(14.0, began["a"]) == pytest.approx((2 * 1 + 2 * 2) / 4)
    assert crowd.leave(20.0, began["b"]) == pytest.approx((2 * 2 + 6 * 1) / 8)
    lone = crowd.enter(30.0)
    assert crowd.leave(31.0, lone) == 1.0
    at_once = [crowd.enter(40.0) for _ in range(4)]
    n_at_once = [crowd.leave(44.0, each) for each in at_once]
    assert n_at_once == [4.0] * 4 and sum(4.0 / n for n in n_at_once) == 4.0
