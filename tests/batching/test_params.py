"""What a request may ask for, and its way through a message."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest

from sllmdask.batching.params import MAX_BIASES, Grammar, SamplingParams, TokenLogprobs, choice_seed
from sllmdask.errors import InvalidRequest

EVERYTHING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    min_p=0.1,
    seed=2**64 - 1,
    stop=("a", "b"),
    stop_token_ids=(1, 2),
    repetition_penalty=1.1,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    logit_bias=((5, -100.0), (6, 3.5)),
    logprobs=0,
    prompt_logprobs=20,
    grammar=Grammar("regex", "a+"),
)


@pytest.mark.parametrize("params", [SamplingParams(), EVERYTHING, SamplingParams(min_tokens=3, ignore_eos=True)])
def test_params_come_through_a_message_unchanged(params: SamplingParams):
    assert SamplingParams.from_wire(msgpack.unpackb(msgpack.packb(params.as_wire()))) == params


@pytest.mark.parametrize("told", [TokenLogprobs(-0.5), TokenLogprobs(-3.25, (7, 1), (-0.25, -1.5))])
def test_log_probabilities_come_through_a_message_unchanged(told: TokenLogprobs):
    assert TokenLogprobs.from_wire(msgpack.unpackb(msgpack.packb(told.as_wire()))) == told


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"repetition_penalty": 1e9}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((3, math.nan),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias"),
        ({"logit_bias": tuple((i, 1.0) for i in range(MAX_BIASES + 1))}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"grammar": Grammar("regex", "a"), "ignore_eos": True}, "ignore_eos"),
        ({"grammar": Grammar("regex", "a"), "min_tokens": 1}, "min_tokens"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_name(fields: dict[str, Any], param: str):
    with pytest.raises(InvalidRequest, match=param) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param


def test_a_grammar_of_an_unknown_kind_is_refused():
    with pytest.raises(InvalidRequest, match="json_schema, regex, lark"):
        Grammar("xml", "<a/>")


def test_each_answer_to_a_prompt_has_a_seed_of_its_own_and_the_first_has_the_requests():
    seeds = {choice_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(128)}
    assert len(seeds) == 3 * 128
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(17, 0) == 17
    assert choice_seed(17, 5) == choice_seed(17, 5)
