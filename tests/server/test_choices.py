"""Several answers, echoes, log probabilities and grammars, as the official client and raw HTTP see them."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from sllmdask.batching.params import Grammar, TokenLogprobs
from sllmdask.cluster.journal import Delta
from sllmdask.engine.text import Tokenizer
from sllmdask.server.choices import make_writer
from tests.engine.test_text import byte_fallback, save
from tests.fakes import FakeModel, byte_tokenizer, told_of
from tests.server.conftest import Door

OpenDoor = Callable[..., Awaitable[Door]]
HI = [{"role": "user", "content": "Hi"}]
asynchronous = pytest.mark.asyncio


def client_of(door: Door) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


# --- several answers -------------------------------------------------------------------------------------------------


@asynchronous
async def test_n_answers_have_indexes_and_seeds_and_count_their_prompt_once(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=str.upper))
    async with client_of(door) as client:
        answer = await client.completions.create(model="m", prompt=["ab", "cde"], n=3, seed=5, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(["AB"] * 3 + ["CD"] * 3))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    asked = {request.id: request for request in door.gateway.asked}
    assert len(asked) == 6
    seeds = [request.params.seed for request in door.gateway.asked]
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3 and seeds[0] == 5
    assert [request.prompt_ids for request in door.gateway.asked] == [ids("ab")] * 3 + [ids("cde")] * 3


@asynchronous
async def test_n_answers_stream_side_by_side(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "Grüße"))
    async with client_of(door) as client:
        stream = await client.chat.completions.create(
            model="m", messages=HI, n=3, stream=True, stream_options={"include_usage": True}
        )
        *chunks, total = [chunk async for chunk in stream]
    texts = ["", "", ""]
    reasons: list[str | None] = [None] * 3
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == ["Grüße"] * 3 and reasons == ["stop"] * 3
    assert (total.usage.prompt_tokens, total.usage.completion_tokens) == (len("<|user|>Hi\n<|assistant|>"), 21)


# --- log probabilities -----------------------------------------------------------------------------------------------


@asynchronous
@pytest.mark.parametrize("n_top", [None, 0, 3])
async def test_a_chat_tells_of_each_token_with_its_bytes(open_door: OpenDoor, n_top: int | None):
    door = await open_door(m=FakeModel(answer=lambda _: "aü"))
    given = {} if n_top is None else {"top_logprobs": n_top}
    async with client_of(door) as client:
        answer = await client.chat.completions.create(model="m", messages=HI, logprobs=True, **given)
    told = answer.choices[0].logprobs
    a, first, second = ids("aü")
    assert [(entry.token, entry.bytes, entry.logprob) for entry in told.content] == [
        ("a", [0x61], -a / 100),
        ("\\xc3", [0xC3], -first / 100),
        ("\\xbc", [0xBC], -second / 100),
    ]
    expected = [(7, -0.001), (a, -a / 100), (9, -9.5)][: n_top or 0]
    tops = [(entry.token, entry.logprob) for entry in told.content[0].top_logprobs]
    assert tops == [(byte_tokenizer().decode([token]), logprob) for token, logprob in expected]


@asynchronous
async def test_a_streamed_chat_tells_of_the_same_tokens(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "one two thr"))
    asked: dict[str, Any] = {"model": "m", "messages": HI, "logprobs": True, "top_logprobs": 2, "stop": ["threes"]}
    async with client_of(door) as client:
        whole = await client.chat.completions.create(**asked)
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    streamed = [entry for chunk in chunks if (told := chunk.choices[0].logprobs) for entry in told.content]
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens == 11
    # What a stop string holds back is told with the text that it comes with.
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two thr"


@asynchronous
async def test_a_completion_tells_of_its_tokens_in_four_lists(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "aüb"))
    async with client_of(door) as client:
        answer = await client.completions.create(model="m", prompt="x", logprobs=1)
    told = answer.choices[0].logprobs
    tokens = ids("aüb")
    assert told.tokens == ["a", "\\xc3", "\\xbc", "b"]
    assert told.text_offset == [0, 1, 1, 2]
    assert told.token_logprobs == [-token / 100 for token in tokens]
    likeliest = byte_tokenizer().decode([7])
    assert told.top_logprobs == [
        {likeliest: -0.001, spelt: -token / 100} for spelt, token in zip(told.tokens, tokens, strict=True)
    ]


@asynchronous
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["aü", "q"], [ids("aü"), ids("q")]], ids=["texts", "token ids"])
async def test_an_echo_begins_with_the_prompt_and_tells_of_it(open_door: OpenDoor, stream: bool, prompt: Any):
    door = await open_door(m=FakeModel(answer=lambda _: "yz"))
    asked: dict[str, Any] = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 1}
    async with client_of(door) as client:
        texts, told = ["", ""], [{}, {}]
        answers = await client.completions.create(**asked, stream=stream)
        for answer in [each async for each in answers] if stream else [answers]:
            for choice in answer.choices:
                texts[choice.index] += choice.text
                for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                    told[choice.index].setdefault(name, []).extend(values)
    assert texts == ["aüy", "qy"]
    tokens = ids("aüy")
    assert told[0]["tokens"] == ["a", "\\xc3", "\\xbc", "y"]
    assert told[0]["text_offset"] == [0, 1, 1, 2]
    assert told[0]["token_logprobs"] == [None, *(-token / 100 for token in tokens[1:])]
    assert told[0]["top_logprobs"] == [
        None,
        *({spelt: value} for spelt, value in zip(told[0]["tokens"][1:], told[0]["token_logprobs"][1:], strict=True)),
    ]
    assert told[1]["tokens"] == ["q", "y"]


@asynchronous
@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_of_no_tokens_is_the_prompt_alone(open_door: OpenDoor, stream: bool):
    door = await open_door(m=FakeModel(answer=lambda _: "yz"))
    async with client_of(door) as client:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
        asked: dict[str, Any] = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream, **options}
        answers = await client.completions.create(model="m", **asked)
        answers = [each async for each in answers] if stream else [answers]
    choices = [choice for answer in answers for choice in answer.choices]
    assert "".join(choice.text for choice in choices) == "abc"
    assert choices[-1].finish_reason == "length"
    assert [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens] == ["a", "b", "c"]
    assert (answers[-1].usage.prompt_tokens, answers[-1].usage.completion_tokens) == (3, 0)


@asynchronous
async def test_an_echo_without_log_probabilities_is_only_text(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "yz"))
    async with client_of(door) as client:
        answer = await client.completions.create(model="m", prompt="ab ", echo=True, n=2)
    assert [(choice.text, choice.logprobs) for choice in answer.choices] == [("ab yz", None)] * 2
    assert all(request.params.prompt_logprobs is None for request in door.gateway.asked)


@asynchronous
async def test_what_was_not_asked_for_is_not_told(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with client_of(door) as client:
        chat = await client.chat.completions.create(model="m", messages=HI)
        completion = await client.completions.create(model="m", prompt="x")
    assert chat.choices[0].logprobs is completion.choices[0].logprobs is None


def test_offsets_are_those_of_the_text_however_the_tokenizer_spells_it(tmp_path: Path):
    tokenizer = Tokenizer.from_directory(save(byte_fallback(), tmp_path))
    tokens = [tokenizer._hf.convert_tokens_to_ids(token) for token in ("▁a", "<0xC3>", "<0xB6>", "ö", "b", "</s>")]
    writer = make_writer(tokenizer, (), is_chat=False, n_top=0, echo=None)
    writer.add(Delta("aööb", tuple(tokens), tuple(told_of(token, 0) for token in tokens)))
    told = writer.scores()
    assert told is not None
    assert told["tokens"] == [" a", "\\xc3", "\\xb6", "ö", "b", "</s>"]
    text = tokenizer.decode(tokens)
    assert text == "aööb"
    assert told["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert writer.scores() is None


def test_bytes_of_tokens_add_up_to_the_text():
    tokenizer = byte_tokenizer()
    text = "Grüße aus Köln, 日本語 😀"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(256) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_what_json_cannot_say_is_told_as_openais_lowest():
    writer = make_writer(byte_tokenizer(), (), is_chat=True, n_top=1, echo=None)
    writer.add(Delta("a", (64,), (TokenLogprobs(float("-inf"), (64,), (float("-inf"),)),)))
    told = writer.scores()
    assert told is not None
    assert told["content"][0]["logprob"] == told["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    json.dumps(told, allow_nan=False)


# --- grammars --------------------------------------------------------------------------------------------------------


@asynchronous
async def test_a_grammar_reaches_the_engine(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    async with client_of(door) as client:
        await client.chat.completions.create(model="m", messages=HI, response_format=format_)
        await client.completions.create(model="m", prompt="x", extra_body={"structured_outputs": {"regex": "a+"}})
    grammars = [request.params.grammar for request in door.gateway.asked]
    assert grammars == [Grammar("json_schema", json.dumps(schema)), Grammar("regex", "a+")]


@asynchronous
async def test_a_schema_that_cannot_be_compiled_is_refused_before_anything_is_asked(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    async with client_of(door) as client:
        with pytest.raises(openai.BadRequestError, match="nonsense") as caught:
            await client.chat.completions.create(model="m", messages=HI, response_format=format_, stream=True)
    assert caught.value.param == "response_format"
    assert door.gateway.asked == []


@asynchronous
async def test_without_the_package_the_field_is_refused_by_its_name(open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    door = await open_door(m=FakeModel())
    async with client_of(door) as client:
        with pytest.raises(openai.BadRequestError, match=r"pip install 'sllmdask\[json\]'") as caught:
            await client.completions.create(model="m", prompt="x", extra_body={"guided_choice": ["a"]})
    assert caught.value.param == "guided_choice"
