"""A front door goes on with a request whose worker has died, during a move too: the answer is that of one that stayed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sllmdask.actors import leaving, move_wire
from sllmdask.batching.params import SamplingParams, choice_seed
from sllmdask.batching.precopy import Kind
from sllmdask.cluster.journal import GenerateRequest
from sllmdask.engine.engine import EngineStats
from sllmdask.errors import WorkerLost
from tests.actors.doors import Answer, Town, town
from tests.engine.models import TinyModel, answer, make_model, prompts

pytestmark = pytest.mark.asyncio

SAMPLED = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def ask(
    there: Town, name: str, prompt: list[int], worker: str = "1", group: str = "", priority: int = 0, **params: Any
) -> Answer:
    """A request that begins at `worker`."""
    there.door.wishes = {**there.door.wishes, name: worker}
    sampling = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **params})
    return there.door.ask(GenerateRequest(name, "m", prompt, sampling, priority, group=group))


async def until_token(there: Town, asked: Answer, n: int) -> None:
    await there.door.until(lambda: asked.ended or len(asked.tokens) >= n)
    assert not asked.ended


def assert_same(asked: Answer, expected: list[int]) -> None:
    assert asked.error is None and asked.tokens == expected, asked.error
    assert asked.end is not None and asked.end.n_tokens == len(expected)


async def stats_of(there: Town, worker: str) -> EngineStats:
    [instance] = there.registries[worker]._instances.values()
    assert instance._engine is not None
    return await asyncio.wrap_future(instance._engine.call(lambda engine: engine.stats()))


async def priorities(there: Town, worker: str) -> list[int]:
    """Of all that a worker's engine has."""
    [instance] = there.registries[worker]._instances.values()
    assert instance._engine is not None
    return await asyncio.wrap_future(instance._engine.call(lambda engine: [each.priority for each in engine.sequences]))


@pytest.mark.parametrize("kind", Kind)
async def test_a_request_whose_source_dies_before_the_end_of_a_move_goes_on_where_it_was_going(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: Kind
):
    """What had been appended is not computed again, and nobody waits for a reservation that is too old."""
    real_send = move_wire.send
    before_the_stop, killed = threading.Event(), threading.Event()

    def send(wire: Any, message: Any, payload: bytes = b"") -> None:
        if message.get("op") == "extend":
            before_the_stop.set()
            killed.wait(20)
        real_send(wire, message, payload)

    monkeypatch.setattr(move_wire, "send", send)
    [prompt] = prompts(1, 100, 100)
    async with town(model, 3) as there:
        asked = ask(there, "a", prompt, **SAMPLED)
        await until_token(there, asked, 3)
        key = there.door.key_of("a")
        assert key is not None
        moving = asyncio.ensure_future(there.move("a", 1, kind))
        assert await asyncio.to_thread(before_the_stop.wait, 20)
        await there.door.until(lambda: there.door._active[key].following.going_to == "3")
        dying = asyncio.ensure_future(there.kill("1"))
        await asyncio.sleep(0)
        killed.set()
        await dying
        await there.door.all_ended()
        assert_same(asked, answer(model, prompt, 50, **SAMPLED))
        assert there.door.placed[key] == [("1", ""), ("3", "3")]
        assert (await stats_of(there, "3")).n_reused_tokens >= 96
        await there.all_free()
        await moving


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_request_whose_source_dies_with_its_last_words_after_a_move_goes_on(model: TinyModel, logprobs: int | None):
    """Without log probabilities, the destination knows what was not heard; with them, it is computed again."""
    [prompt] = prompts(1, 40, 40)
    async with town(model, 2) as there:
        asked = ask(there, "a", prompt, logprobs=logprobs)
        await until_token(there, asked, 3)
        link: Any = there.door._links["1"]
        link._back.pause()
        for _ in range(2):  # the word of where it goes must be heard
            link._back.step()
        moving = asyncio.ensure_future(there.move("a", 0, Kind.KV))
        while not moving.done():
            if any(message[0] == "moving" for message in link._back.waiting):
                link._back.step(len(link._back.waiting))
            await asyncio.sleep(0.001)
        record = moving.result()
        assert record is not None and record.outcome == "moved"
        await there.kill("1")
        await there.door.all_ended()
        assert_same(asked, model.generate(prompt, 50))
        assert len(asked.scores) == (0 if logprobs is None else 50)
        assert all(len(each.top_ids) == 2 for each in asked.scores)
        await there.all_free()


async def test_a_request_is_begun_anew_where_the_source_of_a_move_still_does_not_know_how_that_ended(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """The destination has it, and dies; the source, which heard nothing, has the front door's new word and its own old copy."""
    real_send, real_receive, real_dial = move_wire.send, move_wire.receive, leaving.dial
    deaf = threading.Event()

    def send(wire: Any, message: Any, payload: bytes = b"") -> None:
        if message.get("op") in ("query", "abort") and deaf.is_set():
            raise TimeoutError("nothing came")
        real_send(wire, message, payload)

    def receive(wire: Any) -> Any:
        message, payload = real_receive(wire)
        if message.get("answer") == "committed":
            deaf.set()
            raise TimeoutError("nothing came")
        return message, payload

    def dial(*address: Any, **limits: Any) -> Any:
        if deaf.is_set():
            raise TimeoutError("nothing came")
        return real_dial(*address, **limits)

    monkeypatch.setattr(move_wire, "send", send)
    monkeypatch.setattr(move_wire, "receive", receive)
    monkeypatch.setattr(leaving, "dial", dial)
    [prompt] = prompts(1, 40, 40)
    async with town(model, 2) as there:
        asked = ask(there, "a", prompt, max_tokens=80, **SAMPLED)
        await until_token(there, asked, 3)
        moving = asyncio.ensure_future(there.move("a", 0, Kind.KV))
        key = there.door.key_of("a")
        assert key is not None
        await there.door.until(lambda: there.door._active[key].journal.worker == "2")
        await until_token(there, asked, len(asked.tokens) + 3)
        await there.kill("2", tell=False)
        await there.door.all_ended()
        assert_same(asked, answer(model, prompt, 80, **SAMPLED))
        record = await moving
        assert record is not None and record.outcome == "ended"
        await there.all_free()


async def test_a_request_that_is_sent_again_to_the_instance_that_has_it_is_answered_once(model: TinyModel):
    """The front door had lost the connection for a moment, or had not heard of a move."""
    [prompt] = prompts(1, 40, 40)
    async with town(model, 1) as there:
        asked = ask(there, "a", prompt, **SAMPLED)
        for n in (1, 7, 20):
            await until_token(there, asked, n)
            key = there.door.key_of("a")
            assert key is not None
            there.door._fail(there.door._active[key], WorkerLost("1"))
            if n == 7:  # and a word that comes too late
                there.registries["1"]._receive(there.door.id, ["cancel", key, "m/0"])
        await there.door.all_ended()
        assert_same(asked, answer(model, prompt, 50, **SAMPLED))
        await there.all_free()


@pytest.mark.parametrize("n_tokens", [0, 4])
async def test_several_answers_to_a_prompt_that_is_told_of_go_on_after_a_death(model: TinyModel, n_tokens: int):
    [prompt] = prompts(1, 60, 60)
    seeds = [choice_seed(9, i) for i in range(3)]
    async with town(model, 1, {"1": {"max_batch_tokens": 16}}) as there:
        choices = [
            ask(there, f"a#{i}", prompt, group="a", temperature=1.0, seed=seed, logprobs=1, prompt_logprobs=0)
            for i, seed in enumerate(seeds)
        ]
        await there.door.until(lambda: choices[0].nodes and len(choices[0].tokens) >= n_tokens)
        await there.start("2")
        await there.kill("1")
        await there.door.all_ended()
        for asked, seed in zip(choices, seeds, strict=True):
            assert_same(asked, answer(model, prompt, 50, temperature=1.0, seed=seed))
            assert (len(asked.of_prompt), len(asked.scores)) == (59, 50)
            assert asked.nodes[-1] == "2"
        await there.all_free()


async def test_a_request_of_higher_priority_goes_first_where_it_begins_and_where_it_goes_on_after_a_move_and_a_death(
    model: TinyModel,
):
    [prompt, other] = prompts(2, 20, 40, seed=2)
    async with town(model, engines={"1": {"max_running": 1}}) as there:
        plain = ask(there, "plain", other, max_tokens=150)
        await until_token(there, plain, 2)
        urgent = ask(there, "urgent", prompt, priority=1)
        await until_token(there, urgent, 3)
        assert not plain.ended
        moved = await there.move("urgent", 0, Kind.KV)
        assert moved is not None and moved.outcome == "moved"
        assert await priorities(there, "2") == [1]
        await until_token(there, urgent, len(urgent.tokens) + 3)
        await there.kill("2")
        await there.door.until(lambda: urgent.ended)
        assert not plain.ended
        await there.door.all_ended()
        assert_same(urgent, answer(model, prompt, 50))
        assert_same(plain, answer(model, other, 150))
        assert urgent.nodes == ["1", "1"]
        await there.all_free()


async def test_a_request_that_waits_for_a_worker_is_begun_when_there_is_one(model: TinyModel):
    [prompt, other] = prompts(2, 20, 40)
    async with town(model, 1) as there:
        running = ask(there, "a", prompt)
        await until_token(there, running, 2)
        await there.kill("1")
        waiting = ask(there, "b", other)
        await there.start("1")
        await there.door.all_ended()
        assert_same(running, model.generate(prompt, 50))
        assert_same(waiting, model.generate(other, 50))
        assert waiting.nodes == ["1"] and there.door._active == {}
        await there.all_free()


async def test_a_move_that_nobody_ends_does_not_keep_its_request(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    """Both workers of a move die; the third one goes on."""
    monkeypatch.setattr(leaving, "DOOR_S", 0.5)
    [prompt] = prompts(1, 60, 60)
    async with town(model, 3) as there:
        asked = ask(there, "a", prompt, **SAMPLED)
        await until_token(there, asked, 3)
        moving = asyncio.ensure_future(there.move("a", 0, Kind.TOKENS))
        await until_token(there, asked, 5)
        await asyncio.gather(there.kill("1", tell=False), there.kill("2", tell=False))
        await there.door.all_ended()
        assert_same(asked, answer(model, prompt, 50, **SAMPLED))
        assert asked.nodes[-1] == "3"
        await there.all_free()
        await moving
