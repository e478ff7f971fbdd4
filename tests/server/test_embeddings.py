"""``POST /v1/embeddings``: what is taken, what is refused and how, and what answers look like."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from sllmdask.cluster.journal import EmbedRequest
from sllmdask.errors import ContextTooLong, InvalidRequest, LoadFailed, SllmError
from sllmdask.server.embeddings import MAX_INPUTS, EmbeddingsAsk, read_embeddings
from tests.fakes import FakeModel, byte_tokenizer
from tests.server.conftest import Door

OpenDoor = Callable[..., Awaitable[Door]]
INFO = {"dimensions": 3, "pooling": ["mean"], "normalize": True, "prompts": {}, "default_prompt": None, "lower_case": False}
#: What the fake model makes of a text: its bytes' number, its first byte, its last byte, as the byte tokenizer numbers them.


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def vector_of(text: str) -> list[float]:
    ids = ids_of(text)
    return [float(len(ids)), float(ids[0]), float(ids[-1])]


def read(**fields: Any) -> EmbeddingsAsk:
    return read_embeddings({"model": "m", "input": "Hi", **fields})


def tokenise(ask: EmbeddingsAsk, window: int = 100, **info: Any) -> list[list[int]]:
    return ask.tokenise(byte_tokenizer(), {**INFO, **info}, window)


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", [ids_of("Hi")]),
        (["Hi", "you"], [ids_of("Hi"), ids_of("you")]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_an_input_is_a_text_texts_token_ids_or_lists_of_them(given: Any, expected: list[list[int]]):
    assert tokenise(read(input=given)) == expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "a text, a list of texts"),
        ({"input": []}, "input", "a text, a list of texts"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input", "empty"),
        ({"input": ["a", [1]]}, "input", "a text, a list of texts"),
        ({"input": [[1], []]}, "input", "none empty"),
        ({"input": [1, -1]}, "input", "a text, a list of texts"),
        ({"input": [True]}, "input", "a text, a list of texts"),
        ({"input": {"text": "a"}}, "input", "a text, a list of texts"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "2049 inputs"),
        ({"model": ""}, "model", "model must be"),
        ({"encoding_format": "hex"}, "encoding_format", "'hex'"),
        ({"dimensions": 0}, "dimensions", "positive"),
        ({"dimensions": 2.5}, "dimensions", "positive"),
        ({"dimensions": True}, "dimensions", "positive"),
        ({"max_length": -1}, "max_length", "positive"),
        ({"inputs": "a"}, "inputs", "Did you mean 'input'?"),
        ({"temperature": 0}, "temperature", "Remove it"),
        ({"task_instruct": 5}, "task_instruct", "a text"),
        ({"task_instruct": "Find.", "input": [1, 2]}, "task_instruct", "token ids"),
        ({"task_instruct": "Find.", "prompt_name": "query"}, "task_instruct", "not both"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_its_field(fields: dict[str, Any], param: str, words: str):
    with pytest.raises(InvalidRequest, match=words) as caught:
        read(**fields)
    assert caught.value.param == param


def test_a_body_that_is_no_object_is_refused():
    with pytest.raises(InvalidRequest, match="JSON object"):
        read_embeddings(["Hi"])


def test_fields_that_change_nothing_and_nulls_are_accepted():
    ask = read(user="me", dimensions=None, encoding_format=None, task_instruct="")
    assert (ask.dimensions, ask.as_base64, ask.task_instruct) == (None, False, "")


def test_an_input_over_the_window_is_refused_with_both_numbers():
    with pytest.raises(ContextTooLong) as caught:
        tokenise(read(input=["Hi", "x" * 11]), window=10)
    assert (caught.value.n_tokens, caught.value.limit) == (11, 10)
    assert tokenise(read(input="x" * 10), window=10) == [ids_of("x" * 10)]


def test_max_length_cuts_the_end_of_what_is_longer():
    assert tokenise(read(input=["abcdef", "ab"], max_length=3)) == [ids_of("abc"), ids_of("ab")]
    assert tokenise(read(input=[[1, 2, 3, 4]], max_length=3)) == [[1, 2, 3]]


def test_ids_of_another_tokenizer_are_refused_with_a_hint():
    with pytest.raises(InvalidRequest, match="another model's tokenizer"):
        tokenise(read(input=[[1], [100_000]]))


def test_an_instruction_stands_in_front_as_in_serverlessllm():
    ask = read(input=["one", "two"], task_instruct="Find answers.")
    expected = [f"Instruct: Find answers.\nQuery: {text}" for text in ("one", "two")]
    assert tokenise(ask) == [ids_of(text) for text in expected]


def test_prompts_of_the_model_stand_in_front():
    prompts = {"query": "query: ", "passage": "passage: "}
    assert tokenise(read(), prompts=prompts) == [ids_of("Hi")]
    assert tokenise(read(), prompts=prompts, default_prompt="passage") == [ids_of("passage: Hi")]
    assert tokenise(read(prompt_name="query"), prompts=prompts, default_prompt="passage") == [ids_of("query: Hi")]
    with pytest.raises(InvalidRequest, match=r"'question'. Known are 'query', 'passage'"):
        tokenise(read(prompt_name="question"), prompts=prompts)
    with pytest.raises(InvalidRequest, match="It has none"):
        tokenise(read(prompt_name="query"))


def test_a_model_for_lower_case_gets_lower_case():
    assert tokenise(read(input="ÄBC"), lower_case=True) == [ids_of("äbc")]


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_embeddings_are_answered_in_openais_shape(open_door: OpenDoor):
    door = await open_door(m=FakeModel(embedding=INFO, cold_start="disk"))
    async with door.http.post("/v1/embeddings", json={"model": "m", "input": ["Hi", "you!"]}) as response:
        assert response.status == 200
        body = await response.json()
        assert response.headers["x-sllmdask-cold-start"] == "disk"
        assert response.headers["x-sllmdask-node"] == "0"
        assert response.headers["x-sllmdask-queue-ms"] == "250"
        assert response.headers["x-request-id"]
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": vector_of("Hi")},
            {"object": "embedding", "index": 1, "embedding": vector_of("you!")},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


@pytest.mark.asyncio
async def test_base64_is_little_endian_float32(open_door: OpenDoor):
    door = await open_door(m=FakeModel(embedding=INFO))
    asked = {"model": "m", "input": "Hi", "encoding_format": "base64", "dimensions": 2}
    async with door.http.post("/v1/embeddings", json=asked) as response:
        (item,) = (await response.json())["data"]
    assert struct.unpack("<2f", base64.b64decode(item["embedding"])) == tuple(vector_of("Hi")[:2])


@pytest.mark.asyncio
async def test_many_inputs_are_one_request(open_door: OpenDoor):
    door = await open_door(m=FakeModel(embedding=INFO))
    texts = [f"text {i}" for i in range(MAX_INPUTS)]
    async with door.http.post(
        "/v1/embeddings", json={"model": "m", "input": texts}, headers={"x-request-id": "mine"}
    ) as response:
        body = await response.json()
    assert [item["embedding"] for item in body["data"]] == [vector_of(text) for text in texts]
    (asked,) = door.gateway.asked
    assert isinstance(asked, EmbedRequest)
    assert (asked.id, len(asked.inputs)) == ("mine", MAX_INPUTS)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("/v1/embeddings", {"model": "text", "input": "Hi"}, 400, "wrong_task", "'text' generates text"),
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
            400,
            "wrong_task",
            "/v1/embeddings",
        ),
        ("/v1/completions", {"model": "m", "prompt": "Hi"}, 400, "wrong_task", "/v1/embeddings"),
        ("/v1/embeddings", {"model": "tex", "input": "Hi"}, 404, "model_not_found", "'text'"),
        ("/v1/embeddings", {"model": "m", "input": "Hi", "dimensions": 4}, 400, "invalid_request", "have 3 numbers"),
        ("/v1/embeddings", {"model": "m", "input": "x" * 1025}, 400, "context_length_exceeded", "1025"),
    ],
)
async def test_what_a_model_does_not_do_is_refused(
    open_door: OpenDoor, path: str, body: dict[str, Any], status: int, code: str, words: str
):
    door = await open_door(m=FakeModel(embedding=INFO), text=FakeModel())
    async with door.http.post(path, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (status, code)
    assert words in error["message"]
    assert not door.gateway.asked


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "fields", [{"refuse": LoadFailed("m", "the disk is on fire")}, {"fail": LoadFailed("m", "gone"), "fail_after": 1}]
)
async def test_a_failure_is_the_answer_and_nothing_is_sent_before_it(open_door: OpenDoor, fields: dict[str, SllmError]):
    door = await open_door(m=FakeModel(embedding=INFO, **fields))
    async with door.http.post("/v1/embeddings", json={"model": "m", "input": ["a", "b", "c"]}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (503, "load_failed")


@pytest.mark.asyncio
async def test_a_client_that_leaves_stops_its_request(open_door: OpenDoor):
    gate = asyncio.Event()
    door = await open_door(m=FakeModel(embedding=INFO, gate=gate))
    asking = asyncio.create_task(
        door.http.post("/v1/embeddings", json={"model": "m", "input": "Hi"}, headers={"x-request-id": "x"})
    )
    await door.gateway.until(lambda: bool(door.gateway.asked))
    asking.cancel()
    await door.gateway.until(lambda: door.gateway.closed == ["x"])


@pytest.mark.asyncio
async def test_models_that_generate_text_are_listed_first(open_door: OpenDoor):
    door = await open_door(a=FakeModel(embedding=INFO), b=FakeModel())
    async with door.http.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["b", "a"]


@pytest.mark.asyncio
@pytest.mark.parametrize("fields", [{}, {"encoding_format": "float"}])
async def test_the_official_client_gets_its_vectors(open_door: OpenDoor, fields: dict[str, Any]):
    door = await open_door(m=FakeModel(embedding=INFO))
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.embeddings.create(model="m", input=["Hi", "you!"], **fields)
    assert [list(item.embedding) for item in answer.data] == [vector_of("Hi"), vector_of("you!")]
    assert answer.usage.total_tokens == 6
