"""What a worker tells the scheduler of the moves of its requests: each begins once and is over once, however it ends."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from sllmdask.actors import leaving
from sllmdask.actors.leaving import Leaving
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


@pytest.mark.asyncio
async def test_a_source_that_rests_counts_as_no_move_beside_the_next_one(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    reports: list[dict[str, Any]] = []
    resting, last = threading.Event(), threading.Event()

    def rest(leaving: Leaving) -> None:
        """That of a lasts until b has left."""
        if leaving.order.request == "a":
            resting.set()
            last.wait(30)
        else:
            last.set()

    monkeypatch.setattr(Leaving, "rest", rest)
    async with workers(model) as there:
        there.registries["1"].report = reports.append
        for name, prompt in zip("ab", prompts(2, 20, 40, seed=1), strict=True):
            there.door.submit(name, "1", prompt, max_tokens=120)
        await there.door.until(lambda: all(len(asked.tokens) >= 3 for asked in there.door.asked.values()))
        first = asyncio.create_task(there.move("a", "2"))
        assert await asyncio.to_thread(resting.wait, 30)
        records = [await there.move("b", "2"), await first]
    assert [record.outcome for record in records] == ["moved", "moved"]
    n_at_once = {each["move"]["request"]: each["move"]["n_at_once"] for each in reports if each["kind"] == "moved"}
    assert n_at_once == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}


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


@pytest.mark.asyncio
async def test_a_source_whose_engine_is_about_to_end_does_not_rest(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaving, "LONGEST_REST_S", 3600.0)
    monkeypatch.setattr(Leaving, "_step_s", 3600.0)
    began = threading.Event()
    rest = Leaving.rest

    def noted(one: Leaving) -> None:
        began.set()
        rest(one)

    monkeypatch.setattr(Leaving, "rest", noted)
    async with workers(model) as there, asyncio.timeout(60):
        there.door.submit("a", "1", prompts(1, 30, 30)[0], max_tokens=60)
        await there.door.until(lambda: len(there.door.asked["a"].tokens) >= 3)
        moving = asyncio.create_task(there.move("a", "2"))
        assert await asyncio.to_thread(began.wait, 30)
        await there.door.answers()
        assert not moving.done(), "the answer did not wait for the source"
        await there.registries["1"].moves.close()
        assert (await moving).outcome == "moved"
