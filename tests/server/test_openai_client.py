"""The official ``openai`` client, unmodified, against the front door."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import openai
import pytest

from sllmdask.cluster.journal import Progress
from sllmdask.errors import QueueFull, WorkerLost
from tests.fakes import FakeModel
from tests.server.conftest import Door

pytestmark = pytest.mark.asyncio

OpenDoor = Callable[..., Awaitable[Door]]
HI = [{"role": "user", "content": "Hi"}]


def client_of(door: Door) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)


async def test_it_lists_and_retrieves_models(open_door: OpenDoor):
    door = await open_door(**{"org/qwen": FakeModel(created=5)})
    async with client_of(door) as client:
        models = [model async for model in client.models.list()]
        assert [(model.id, model.created, model.owned_by) for model in models] == [("org/qwen", 5, "sllmdask")]
        assert (await client.models.retrieve("org/qwen")).id == "org/qwen"


async def test_it_chats(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "Fine."))
    async with client_of(door) as client:
        answer = await client.chat.completions.create(model="m", messages=HI, max_tokens=50, temperature=0, stop=["!"])
    assert answer.choices[0].message.content == "Fine."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


async def test_one_token_is_a_full_answer_cut_by_length(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with client_of(door) as client:
        answer = await client.chat.completions.create(model="m", messages=HI, max_completion_tokens=1)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 1)


async def test_it_streams_with_usage_while_a_model_loads(open_door: OpenDoor, headers_wait: Callable[[float], None]):
    headers_wait(0.01)
    gate = asyncio.Event()
    loading = [Progress("loading", "loading m 50% disk 1.0 GiB/s", 1, 2)]
    door = await open_door(m=FakeModel(answer=lambda _: "Fine.", loading=loading, gate=gate), heartbeat=0.01)
    async with client_of(door) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True, stream_options={"include_usage": True})
        gate.set()
        chunks = [chunk async for chunk in stream]
    *texts, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == "Fine."
    assert texts[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


async def test_it_completes_several_prompts(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=str.upper))
    async with client_of(door) as client:
        answer = await client.completions.create(model="m", prompt=["ab", "cd"], max_tokens=1)
    assert [choice.text for choice in answer.choices] == ["A", "C"]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}


async def test_a_stop_string_across_tokens_is_never_shown(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "one two three"))
    async with client_of(door) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True, stop=[" thr", "xyz"])
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_its_errors_are_typed(open_door: OpenDoor):
    door = await open_door(m=FakeModel(max_model_len=50), full=FakeModel(refuse=QueueFull("full", 3)))
    async with client_of(door) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="mm", messages=HI)
        assert unknown.value.code == "model_not_found" and unknown.value.param == "model" and unknown.value.request_id
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("mm")
        with pytest.raises(openai.BadRequestError, match="temperature") as hot:
            await client.chat.completions.create(model="m", messages=HI, temperature=-1)
        assert hot.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 60}], stream=True)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as format_:
            await client.chat.completions.create(model="m", messages=HI, response_format={"type": "grammar"})
        assert format_.value.param == "response_format"
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(model="full", messages=HI)
        assert full.value.code == "queue_full"


async def test_a_broken_stream_raises_instead_of_ending(open_door: OpenDoor):
    door = await open_door(m=FakeModel(fail=WorkerLost("0"), fail_after=3))
    async with client_of(door) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="worker 0 was lost"):
            async for _ in stream:
                pass


async def test_closing_a_stream_cancels_the_request(open_door: OpenDoor):
    door = await open_door(m=FakeModel(pause=asyncio.Event(), pause_after=2))
    async with client_of(door) as client:
        stream = await client.chat.completions.create(model="m", messages=HI, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await door.gateway.until(lambda: len(door.gateway.closed) == 1)
