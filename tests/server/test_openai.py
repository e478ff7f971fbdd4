"""OpenAI's schema: what is taken, what is refused and how, and what answers look like."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllmdask.batching.params import Grammar
from sllmdask.batching.sequence import FinishReason
from sllmdask.errors import Cancelled, ContextTooLong, EngineError, InvalidRequest, ModelNotFound, SllmError
from sllmdask.server import openai
from tests.fakes import byte_tokenizer, every_error

USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> openai.Ask:
    return openai.read_chat({"model": "m", "messages": [USER], **fields})


def completion(**fields: Any) -> openai.Ask:
    return openai.read_completion({"model": "m", "prompt": "Hi", **fields})


def test_a_bare_chat_gets_openais_defaults_and_the_whole_window():
    ask = chat()
    params = ask.params(n_prompt_tokens=10, max_model_len=100)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.max_tokens == 90
    assert not ask.stream and ask.is_chat


def test_what_the_body_does_not_say_is_as_the_model_has_it():
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}

    def chosen(**body: Any) -> tuple[float, float, int, float]:
        params = chat(**body).with_defaults(defaults).params(1, 100)
        return params.temperature, params.top_p, params.top_k, params.min_p

    assert chosen() == chosen(temperature=None) == (0.6, 0.9, 20, 0.0)
    assert chosen(top_p=0.5, min_p=0.1) == (0.6, 0.5, 20, 0.1)
    assert chosen(temperature=1, top_p=1, top_k=-1) == (1.0, 1.0, 0, 0.0)


def test_an_unseeded_request_draws_its_seed_once_per_prompt():
    ask = chat()
    seeds = {ask.params(1, 100).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(("seed", "expected"), [(0, 0), (7, 7), (-1, 2**64 - 1), (2**64, 0), (2**70 + 3, 3)])
def test_any_integer_is_a_seed(seed: int, expected: int):
    assert chat(seed=seed).params(1, 100).seed == expected


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 40}, "top_k", 40),
        ({"stop": "\n"}, "stop", ("\n",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": None}, "stop", ()),
        ({"stop_token_ids": [1, 2]}, "stop_token_ids", (1, 2)),
        ({"ignore_eos": True, "min_tokens": 5}, "min_tokens", 5),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 6}, "max_tokens", 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", 6),
        ({"max_tokens": 500}, "max_tokens", 90),
        ({"max_tokens": 500, "min_tokens": 400}, "min_tokens", 90),
    ],
)
def test_sampling_fields_are_read(fields: dict[str, Any], field: str, expected: Any):
    for read in (chat, completion):
        assert getattr(read(**fields).params(10, 100), field) == expected


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"presence_penalty": -2}, "presence_penalty", -2.0),
        ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
        ({"logit_bias": {"3": -100, "17": 2.5}}, "logit_bias", ((3, -100.0), (17, 2.5))),
        ({"logit_bias": {}}, "logit_bias", ()),
        ({"response_format": {"type": "text"}}, "grammar", None),
        ({"response_format": {"type": "json_object"}}, "grammar", Grammar("json_schema", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"a": 1}}}},
            "grammar",
            Grammar("json_schema", '{"a": 1}'),
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, "grammar", Grammar("json_schema", '{"a": 1}')),
        ({"structured_outputs": {"json": '{"a":1}', "regex": None}}, "grammar", Grammar("json_schema", '{"a": 1}')),
        ({"structured_outputs": {"json_object": True}}, "grammar", Grammar("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"regex": "a+"}}, "grammar", Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, "grammar", Grammar("regex", r"a\.b|c")),
        ({"structured_outputs": {"grammar": "start: A"}}, "grammar", Grammar("lark", "start: A")),
        ({"guided_json": {"a": 1}}, "grammar", Grammar("json_schema", '{"a": 1}')),
        ({"guided_regex": "a+"}, "grammar", Grammar("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, "grammar", Grammar("regex", "yes|no")),
        ({"guided_grammar": "start: A"}, "grammar", Grammar("lark", "start: A")),
        ({"guided_regex": "a", "response_format": {"type": "text"}}, "grammar", Grammar("regex", "a")),
    ],
)
def test_what_bends_the_choice_of_tokens_is_read(fields: dict[str, Any], field: str, expected: Any):
    for read in (chat, completion):
        assert getattr(read(**fields).params(10, 100), field) == expected


@pytest.mark.parametrize("text", ["", "a.b", "x|y", "(1+1)*[2]{3}^$\\", "a b-c\n#&~"])
def test_a_choice_is_taken_literally(text: str):
    read = completion(guided_choice=[text or "x", "other"]).sampling.grammar
    assert read is not None
    assert re.fullmatch(read.text, text or "x") and re.fullmatch(read.text, "other")
    assert not re.fullmatch(read.text, "anything")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_a_chat_asks_for_log_probabilities_by_a_flag_and_a_number(fields: dict[str, Any], expected: int | None):
    assert chat(**fields).sampling.logprobs == expected


@pytest.mark.parametrize(("fields", "expected"), [({}, None), ({"logprobs": 0}, 0), ({"logprobs": 20}, 20)])
def test_a_completion_asks_for_log_probabilities_by_a_number(fields: dict[str, Any], expected: int | None):
    assert completion(**fields).sampling.logprobs == expected
    assert completion(**fields).sampling.prompt_logprobs is None
    assert completion(echo=True, **fields).sampling.prompt_logprobs == expected


@pytest.mark.parametrize(
    ("read", "fields", "param"),
    [
        (chat, {"logprobs": 3}, "logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        (chat, {"echo": True}, "echo"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": -1}, "logprobs"),
        (completion, {"best_of": 3, "n": 2}, "best_of"),
        (completion, {"echo": "yes"}, "echo"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (chat, {"max_tokens": 0, "echo": True}, "echo"),
        (completion, {"prompt": ["a"] * 65, "n": 2}, "n"),
    ],
)
def test_what_only_one_of_the_routes_takes_is_refused_by_the_other(read: Any, fields: dict[str, Any], param: str):
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param == param


def test_each_of_n_answers_has_its_own_seed_and_the_first_has_that_of_the_body():
    ask = completion(n=4, best_of=4, seed=9)
    seeds = [params.seed for params in ask.choices(3, 100)]
    assert seeds[0] == 9 and len(set(seeds)) == 4
    assert seeds == [params.seed for params in ask.choices(3, 100)]
    assert len({params.seed for params in completion(n=4).choices(3, 100)}) == 4


def test_a_bias_for_an_id_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(InvalidRequest, match="257") as caught:
        completion(logit_bias={"257": 1}).tokenise(byte_tokenizer())
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": [1]}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"n": True}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"a": 2}}, "logit_bias"),
        ({"logit_bias": {"-1": 2}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias"),
        ({"logit_bias": {"1": 2, "01": 3}}, "logit_bias"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}], "function_call": "auto"}, "functions"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": ["text"]}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_json": "not json"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"temprature": 0.5}, "temprature"),
        ({"anything": 1}, "anything"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str):
    for read in (chat, completion):
        with pytest.raises(InvalidRequest) as caught:
            read(**fields)
        assert caught.value.param == param
        assert param.split(".")[-1] in caught.value.message


def test_a_misspelt_field_names_the_nearest():
    with pytest.raises(InvalidRequest, match="'temperature'"):
        chat(temprature=0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "safety_identifier": "x"},
        {"prompt_cache_key": "k", "verbosity": "low", "parallel_tool_calls": False},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0, "best_of": 1, "echo": False, "suffix": None},
        {"logprobs": None, "response_format": None, "tools": None, "anything_at_all": None},
        {"skip_special_tokens": True, "add_generation_prompt": True},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]):
    assert chat(**fields) == chat()
    assert completion(**fields) == completion()


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (None, "messages[0]"),
        ("string", "messages[0]"),
        (123, "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": 123, "content": "a"}, "messages[0].role"),
        ({"role": "king", "content": "a"}, "messages[0].role"),
        ({"role": ["user"], "content": "a"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 123}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}, "messages[0].content[1]"),
        ({"role": "user", "content": "a", "name": 3}, "messages[0].name"),
        ({"role": "user", "content": "a", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
    ],
)
def test_a_message_of_a_bad_shape_is_refused_by_its_place(message: Any, where: str):
    with pytest.raises(InvalidRequest) as caught:
        openai.read_chat({"model": "m", "messages": [message]})
    assert caught.value.param == where


@pytest.mark.parametrize("messages", [None, "string", [], {}, 1])
def test_messages_must_be_a_list_of_some(messages: Any):
    with pytest.raises(InvalidRequest) as caught:
        openai.read_chat({"model": "m", "messages": messages})
    assert caught.value.param == "messages"


def test_every_role_and_text_part_reaches_the_template():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    ask = openai.read_chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
                {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
                {"role": "tool", "content": "42", "tool_call_id": "1"},
            ],
        }
    )
    assert ask.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97 - 33, 98 - 33]]),
        (["a", "b"], [[64], [65]]),
        ([3, 4], [[3, 4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
    ],
)
def test_prompts_come_as_texts_or_ids_one_or_many(prompt: Any, expected: list[list[int]]):
    assert completion(prompt=prompt).tokenise(byte_tokenizer()) == expected


@pytest.mark.parametrize("prompt", [None, [], [[]], 3, {}, ["a", 3], [["a"]], [[1], "a"], [-1], [True], [1.5], ["a"] * 129])
def test_what_is_no_prompt_is_refused(prompt: Any):
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["", ["a", ""], [257], "\ud800"])
def test_what_this_tokenizer_cannot_mean_is_refused(prompt: Any):
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt).tokenise(byte_tokenizer())
    assert caught.value.param == "prompt"


def test_half_a_surrogate_pair_in_a_chat_is_refused():
    ask = openai.read_chat({"model": "m", "messages": [{"role": "user", "content": "\ud800"}]})
    with pytest.raises(InvalidRequest):
        ask.tokenise(byte_tokenizer())


@pytest.mark.parametrize("n_prompt_tokens", [100, 101, 18_000])
def test_a_prompt_that_leaves_no_room_names_both_numbers(n_prompt_tokens: int):
    with pytest.raises(ContextTooLong) as caught:
        chat().params(n_prompt_tokens, 100)
    assert (caught.value.n_tokens, caught.value.limit) == (n_prompt_tokens, 100)


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "stop", "stream", "stream_options", "max_tokens", "seed", "n", "tools"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type"]), inner),
            max_leaves=6,
        ),
    )
)
def test_any_json_is_read_or_refused_as_ours(body: Any):
    for read in (openai.read_chat, openai.read_completion):
        with suppress(InvalidRequest):
            read(body)


def test_an_end_that_is_no_answer_is_an_error():
    assert [openai.finish_reason(FinishReason(reason)) for reason in ("stop", "length")] == ["stop", "length"]
    with pytest.raises(Cancelled):
        openai.finish_reason(FinishReason.ABORT)
    with pytest.raises(EngineError):
        openai.finish_reason(FinishReason.ERROR)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("absent", "unloaded"),
        ("disk", "unloaded"),
        ("host", "sleeping"),
        ("loading", "loading"),
        ("ready", "loaded"),
        ("draining", "loaded"),
        ("failed", "failed"),
        ("something new", "unloaded"),
    ],
)
def test_states_have_the_words_that_dashboards_read(state: str, status: str):
    row = {"model": "m", "created": 1.5, "max_model_len": 10, "state": state}
    assert openai.model_object(row) == {
        "id": "m",
        "object": "model",
        "created": 1,
        "owned_by": "sllmdask",
        "max_model_len": 10,
        "status": {"value": status},
    }


def test_a_missing_model_is_told_with_its_neighbours():
    with pytest.raises(ModelNotFound, match="Did you mean 'qwen-0"):
        openai.find_model([{"model": "qwen-0.5b"}], "qwen-0.5")


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_every_error_fits_the_envelope(error: SllmError):
    body = json.loads(openai.dumps(openai.envelope(error)))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert isinstance(body["message"], str) and isinstance(body["type"], str)
    assert body["param"] is None or isinstance(body["param"], str)


def test_json_out_is_utf8_and_never_fails_on_text():
    assert openai.dumps({"a": "ü"}) == '{"a":"ü"}'.encode()
    assert openai.dumps("\ud800") == b'"?"'
