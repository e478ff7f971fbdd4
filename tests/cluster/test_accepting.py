"""What a front door makes of a worker's tokens: each once, with what was told of it, up to a stop string."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import FinishReason
from sllmdask.cluster.gateway import Gateway, _Active
from sllmdask.cluster.journal import Delta, Finished, GenerateRequest
from sllmdask.config import Settings
from tests.fakes import byte_tokenizer, told_of

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def gateway() -> Gateway:
    return Gateway("tcp://127.0.0.1:1", Settings())


def running(stop: tuple[str, ...] = ()) -> _Active:
    params = SamplingParams(max_tokens=50, stop=stop, logprobs=2, prompt_logprobs=0)
    active = _Active("key", GenerateRequest("r", "m", byte_tokenizer().encode("ab"), params), byte_tokenizer().stream(stop))
    active.journal.worker = "w"
    return active


def message(index: int, text: str, reason: str | None = None, of_prompt: Any = None) -> list[Any]:
    tokens = byte_tokenizer().encode(text)
    return ["tokens", "key", 0, index, tokens, reason, [told_of(token, 2).as_wire() for token in tokens], of_prompt]


def told(text: str) -> tuple[Any, ...]:
    return tuple(told_of(token, 2) for token in byte_tokenizer().encode(text))


async def test_tokens_that_come_twice_are_told_of_once(gateway: Gateway):
    active = running()
    [first] = gateway._follow(active, message(0, "abc"))
    [second] = gateway._follow(active, message(1, "bcd"))
    assert gateway._follow(active, message(1, "bc")) == []
    assert isinstance(first, Delta) and isinstance(second, Delta)
    assert (first.text, first.logprobs) == ("abc", told("abc"))
    assert (second.text, second.logprobs) == ("d", told("d"))


async def test_what_comes_after_a_stop_string_is_not_told_of(gateway: Gateway):
    active = running(stop=("cd",))
    delta, end = gateway._follow(active, message(0, "abcdef"))
    assert isinstance(delta, Delta) and isinstance(end, Finished)
    assert (delta.text, end.reason, end.n_tokens) == ("ab", FinishReason.STOP, 4)
    # Those of the stop string count, and are told of, too.
    assert delta.logprobs == told("abcd")


async def test_a_prompt_is_told_of_with_the_first_token_and_never_again(gateway: Gateway):
    active = running()
    of_prompt = [told_of(65, 0)]
    wire = [each.as_wire() for each in of_prompt]
    [first] = gateway._follow(active, message(0, "a", of_prompt=wire))
    [again] = gateway._follow(active, message(0, "ab", of_prompt=wire))
    assert isinstance(first, Delta) and isinstance(again, Delta)
    assert first.prompt_logprobs == tuple(of_prompt)
    assert (again.text, again.prompt_logprobs) == ("b", None)


async def test_tokens_without_anything_told_are_taken_as_before(gateway: Gateway):
    active = running()
    [delta] = gateway._follow(active, message(0, "ab")[:6])
    assert delta == Delta("ab", tuple(byte_tokenizer().encode("ab")))
