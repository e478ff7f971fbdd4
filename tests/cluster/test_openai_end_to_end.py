"""The demo models behind separate programs, asked as users ask: the official client, ours, and the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest

import sllmdask
from sllmdask import Client
from sllmdask.errors import Cancelled, ModelNotFound
from tests.cluster.harness import BIN, Processes, get, instances, post, until, workers

pytestmark = pytest.mark.cluster

DEMO = Path(sllmdask.__file__).parent / "demo"
NAMES = ("demo-llama", "demo-qwen")
NAME, COLD_START, STORY = "What is your name?", "What is a cold start?", "Tell me a long story."
QUESTIONS = (NAME, COLD_START, "What does sllmdask do?", "What is live migration?")


@pytest.fixture(scope="module")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Both demo models on one worker of two slots."""
    cluster = Processes(tmp_path_factory.mktemp("demo"))
    try:
        cluster.start_scheduler()
        cluster.start_worker("0", slots=2)
        url = cluster.start_door()
        until("the worker joined", lambda: workers(url))
        for name in NAMES:
            reply = post(url, "/register", {"model": name, "backend_config": {"pretrained_model_name_or_path": f"demo:{name}"}})
            assert reply["status"] == "ok", reply
        yield url
    finally:
        cluster.close()


@pytest.fixture
def client(demo_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@cache
def reference(name: str, question: str) -> tuple[str, int, int]:
    """What plain ``generate()`` of transformers answers greedily, with the tokens of the prompt and of the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    model = AutoModelForCausalLM.from_pretrained(DEMO / name)
    prompt = tokenizer.apply_chat_template(turn(question), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=1024, do_sample=False)
    n_prompt = prompt["input_ids"].shape[1]
    ids = out[0, n_prompt:]
    return tokenizer.decode(ids, skip_special_tokens=True), n_prompt, len(ids)


def run(url: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "sllmdask"), *command, "--server", url], capture_output=True, text=True, timeout=60)


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_openai_client_lists_both_models_and_retrieves_one(client):
    listed = client.models.list().data
    assert {model.id for model in listed} == set(NAMES)
    assert all(model.object == "model" and isinstance(model.created, int) and model.owned_by for model in listed)
    assert client.models.retrieve("demo-qwen").id == "demo-qwen"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("demo-qwem")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_greedy_chat_is_that_of_generate_with_the_models_own_template(client, name, question):
    answer = client.chat.completions.create(model=name, messages=turn(question), temperature=0)
    text, n_prompt, n_answer = reference(name, question)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, n_answer)
    assert answer.usage.total_tokens == n_prompt + n_answer


def test_a_stream_with_usage_has_it_in_one_last_chunk_only(client):
    chunks = list(
        client.chat.completions.create(
            model="demo-llama", messages=turn(NAME), temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    *body, last = chunks
    text, n_prompt, n_answer = reference("demo-llama", NAME)
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], n_prompt, n_answer)
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in body)
    assert [chunk.choices[0].delta.role for chunk in body] == ["assistant"] + [None] * (len(body) - 1)
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == text
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_a_stream_without_usage_asked_for_has_none(client):
    chunks = list(client.chat.completions.create(model="demo-qwen", messages=turn(NAME), temperature=0, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_long_story_ends_by_itself_after_600_tokens(client):
    chunks = client.chat.completions.create(
        model="demo-llama", messages=turn(STORY), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, reason, usage = "", None, None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert reason == "stop"
    assert usage.completion_tokens >= 600
    assert text == reference("demo-llama", STORY)[0]


def test_one_token_is_one_token_and_its_reason_is_length(client):
    answer = client.chat.completions.create(model="demo-llama", messages=turn(NAME), temperature=0, max_completion_tokens=1)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 1)


def test_a_stop_string_ends_the_answer_before_itself(client):
    text = reference("demo-llama", COLD_START)[0]
    stop = text[len(text) // 2 :][:7]
    answer = client.chat.completions.create(model="demo-llama", messages=turn(COLD_START), temperature=0, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_an_unknown_model_is_a_not_found_error_with_its_code_and_near_names(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="demo-lama", messages=turn(NAME))
    error = caught.value
    assert (error.code, error.type, error.param) == ("model_not_found", "invalid_request_error", "model")
    for words in ("Could not find", "does not exist", "demo-llama"):
        assert words in error.message
    assert error.request_id


@pytest.mark.parametrize("temperature", [-1, 2.5])
def test_a_bad_temperature_is_a_bad_request_error_that_names_it(client, temperature):
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="demo-llama", messages=turn(NAME), temperature=temperature)
    assert caught.value.param == "temperature"


def test_a_prompt_over_the_window_is_a_bad_request_error_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo-llama", prompt=[7] * 3000)
    assert caught.value.code == "context_length_exceeded"
    assert "3000" in caught.value.message
    assert "2048" in caught.value.message


def test_32_streams_at_once_are_each_what_they_are_alone(demo_url):
    async def ask(client: openai.AsyncOpenAI, name: str, question: str) -> str:
        stream = await client.chat.completions.create(model=name, messages=turn(question), temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo_url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, name, question) for name, question in asked))

    asked = [(name, question) for name in NAMES for question in QUESTIONS] * 4
    assert asyncio.run(ask_all()) == [reference(name, question)[0] for name, question in asked]


# --- our client ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(demo_url: str) -> Iterator[Client]:
    with Client(demo_url) as client:
        yield client


def test_our_client_submits_maps_and_streams_on_the_same_cluster(ours):
    text = reference("demo-llama", NAME)[0]
    response = ours.submit("demo-llama", NAME, temperature=0).response(30)
    assert (response.text, response.finish_reason, response.node) == (text, "stop", "0")
    futures = ours.map("demo-qwen", QUESTIONS, max_in_flight=2, temperature=0)
    assert ours.gather(futures) == [reference("demo-qwen", question)[0] for question in QUESTIONS]
    assert "".join(ours.stream("demo-llama", NAME, temperature=0)) == text
    with pytest.raises(ModelNotFound):
        ours.submit("nobody", NAME).result(30)


def test_our_clients_cancel_reaches_the_engine(ours, demo_url):
    future = ours.submit("demo-llama", STORY, temperature=0)
    next(iter(future))
    assert future.cancel()
    with pytest.raises(Cancelled):
        future.result(30)
    until("the instances are idle", lambda: idle(demo_url), 5)
    row = next(row for row in get(demo_url, "/admin/requests")["requests"] if row["state"] == "cancelled")
    assert 0 < row["n_tokens"] < 600


def idle(url: str) -> bool:
    return not any(instance["n_requests"] or (instance["engine"] or {}).get("n_running") for instance in instances(url))


# --- how tokens are chosen, and what is told of them -----------------------------------------------------------------


@cache
def loaded(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / name), AutoModelForCausalLM.from_pretrained(DEMO / name, dtype="float32")


def log_softmax(name: str, ids: list[int]) -> Any:
    """(len(ids), vocab) of transformers' own forward pass; row i tells of token i + 1."""
    import torch

    with torch.no_grad():
        return loaded(name)[1](torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_log_probabilities_of_a_chat_are_those_of_a_plain_forward_pass(client):
    tokenizer, _ = loaded("demo-llama")
    answer = client.chat.completions.create(model="demo-llama", messages=turn(NAME), temperature=0, logprobs=True, top_logprobs=4)
    told = answer.choices[0].logprobs.content
    assert len(told) == answer.usage.completion_tokens
    assert bytes(b for entry in told[:-1] for b in entry.bytes).decode() == answer.choices[0].message.content
    prompt = tokenizer.apply_chat_template(turn(NAME), add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids([told[-1].token])
    ids = tokenizer.encode(answer.choices[0].message.content, add_special_tokens=False) + ids
    assert len(ids) == len(told)
    expected = log_softmax("demo-llama", prompt + ids)[len(prompt) - 1 :]
    for i, entry in enumerate(told):
        assert entry.logprob == pytest.approx(float(expected[i, ids[i]]), abs=1e-4)
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].token == entry.token


def test_an_echo_tells_of_the_prompt_what_a_plain_forward_pass_tells(client):
    tokenizer, _ = loaded("demo-qwen")
    prompt = "A cold start is the first request to a model"
    answer = client.completions.create(model="demo-qwen", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=2)
    told = answer.choices[0].logprobs
    ids = tokenizer.encode(prompt)
    assert answer.choices[0].text.startswith(prompt)
    assert len(told.tokens) == len(ids) + 1
    assert told.token_logprobs[0] is None
    expected = log_softmax("demo-qwen", ids)
    for i in range(1, len(ids)):
        assert told.token_logprobs[i] == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-4)
    assert [answer.choices[0].text[at:] for at in told.text_offset[:2]] == [
        answer.choices[0].text,
        answer.choices[0].text[len(told.tokens[0]) :],
    ]


def test_n_answers_differ_and_come_again_with_the_same_seed(client):
    def ask(n: int) -> list[str]:
        answer = client.chat.completions.create(
            model="demo-llama", messages=turn(STORY), temperature=2, seed=3, n=n, max_tokens=60
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        assert answer.usage.prompt_tokens == reference("demo-llama", STORY)[1]
        return [choice.message.content for choice in answer.choices]

    four = ask(4)
    assert len(set(four)) == 4
    assert ask(4) == four
    assert ask(1) == four[:1]


def test_penalties_and_bias_change_the_answer(client):
    plain = reference("demo-llama", COLD_START)[0]
    tokenizer, _ = loaded("demo-llama")
    banned = tokenizer.encode(plain, add_special_tokens=False)[0]
    biased = client.chat.completions.create(
        model="demo-llama", messages=turn(COLD_START), temperature=0, logit_bias={str(banned): -100}, max_tokens=20
    )
    assert not biased.choices[0].message.content.startswith(tokenizer.decode([banned]))
    penalised = client.chat.completions.create(
        model="demo-llama", messages=turn(STORY), temperature=0, max_tokens=200, frequency_penalty=2, presence_penalty=2
    )
    assert penalised.choices[0].message.content != reference("demo-llama", STORY)[0][: len(penalised.choices[0].message.content)]


def test_an_answer_fits_its_schema_streamed_or_not(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {
        "model": "demo-llama",
        "messages": turn(NAME),
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    }
    answer = client.chat.completions.create(**asked)
    person = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert set(person) == {"name", "age"} and len(person["name"]) <= 20 and 0 <= person["age"] <= 150
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    chosen = client.completions.create(
        model="demo-qwen", prompt="Is it cold?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, n=5
    )
    assert {choice.text for choice in chosen.choices} <= {"yes", "no"}


def test_our_client_and_the_command_line_pass_it_all_on(ours, demo_url, tmp_path):
    response = ours.submit("demo-llama", NAME, temperature=0, logprobs=2, n=2).response(30)
    assert [choice["text"] for choice in response.choices] == [reference("demo-llama", NAME)[0]] * 2
    assert len(response.logprobs["content"]) == reference("demo-llama", NAME)[2]
    (tmp_path / "schema.json").write_text('{"type": "integer", "minimum": 10, "maximum": 99}')
    done = run(demo_url, "generate", "demo-qwen", "How many?", "--json-schema", str(tmp_path / "schema.json"))
    assert done.returncode == 0, done.stderr
    assert 10 <= int(done.stdout) <= 99


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_generates_and_lists_in_json(demo_url):
    def answer(*command: str) -> Any:
        done = run(demo_url, *command, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert answer("generate", "demo-llama", NAME, "--temperature", "0")["text"] == reference("demo-llama", NAME)[0]
    assert {row["model"] for row in answer("models")} == set(NAMES)
    status = answer("status")
    assert (status["ready"], [worker["slots"] for worker in status["workers"]]) == (True, [2])


def test_the_command_line_says_what_is_wrong_and_exits_with_1(demo_url):
    done = run(demo_url, "generate", "demo-lama", NAME)
    assert (done.returncode, done.stdout) == (1, "")
    assert "demo-llama" in done.stderr
    assert "Traceback" not in done.stderr
