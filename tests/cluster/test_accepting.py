"""What a front door makes of a worker's tokens: each once, with what was told of it, up to a stop string."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import FinishReason
from sllmdask.cluster.gateway import MAX_RESUMES, MAX_RETURNS, Gateway, _Active
from sllmdask.cluster.journal import Delta, Finished, GenerateRequest, Progress
from sllmdask.config import Settings
from sllmdask.errors import EngineError, InstanceGone, ModelReplaced, WorkerLost
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


async def test_who_loses_his_worker_goes_on_in_a_new_epoch_with_the_tokens_that_were_accepted(gateway: Gateway):
    active = running()
    gateway._follow(active, message(0, "abc"))
    gateway._fail(active, WorkerLost("w"))
    journal = active.journal
    assert (journal.epoch > 0, journal.worker, journal.state) == (True, None, "queued")
    # What the old worker had sent and nobody had read is of an epoch that is over.
    assert gateway._follow(active, message(3, "d")) == []
    journal.instance = "m/2"
    kind, key, epoch, instance, prompt, output, *_ = journal.submission(active.key)
    assert (kind, key, epoch, instance) == ("submit", "key", journal.epoch, "m/2")
    assert (prompt, output) == (byte_tokenizer().encode("ab"), byte_tokenizer().encode("abc"))


@pytest.mark.parametrize(("begun", "times"), [("abc", MAX_RESUMES), ("", MAX_RETURNS)])
async def test_a_request_that_loses_instance_after_instance_ends_with_the_reason(gateway: Gateway, begun: str, times: int):
    active = running()
    if begun:
        gateway._follow(active, message(0, begun))
    for _ in range(times):
        gateway._fail(active, InstanceGone("m/1", "out of memory"))
        active.journal.worker = "w"
    with pytest.raises(InstanceGone, match="out of memory"):
        gateway._fail(active, InstanceGone("m/1", "out of memory"))
    assert active.journal.state == "failed"


async def test_another_checkpoint_does_not_go_on_with_an_answer(gateway: Gateway):
    active = running()
    gateway._follow(active, message(0, "abc"))
    gateway._rows["m"] = {"model": "m", "revision": active.revision + 1}
    with pytest.raises(ModelReplaced):
        gateway._fail(active, WorkerLost("w"))
    unbegun = running()
    gateway._fail(unbegun, WorkerLost("w"))
    assert unbegun.journal.state == "queued"


async def test_a_fault_of_the_request_itself_is_not_tried_again(gateway: Gateway):
    active = running()
    gateway._follow(active, message(0, "abc"))
    with pytest.raises(EngineError):
        gateway._fail(active, EngineError("a step failed"))


async def test_a_stop_string_in_what_was_held_during_a_move_ends_the_answer(gateway: Gateway):
    """What the destination has said beyond it is of no account, however much that is."""
    active = running(stop=("cd",))
    epochs = [["tokens", "key", 1, 1 + i, byte_tokenizer().encode(each), None] for i, each in enumerate("bcdefg")]
    held = [["moved", "key", 1, byte_tokenizer().encode("a"), "m/2", "w2", "1", {"epoch": 1, "outcome": ""}], *epochs]
    assert [event for each in held for event in gateway._follow(active, each)] == []
    *_, end = gateway._follow(active, message(0, "a"))
    assert end == Finished(FinishReason.STOP, 2, 4)
    assert active.journal.output_ids == byte_tokenizer().encode("abcd")


async def test_a_request_whose_move_was_recalled_goes_on_elsewhere(gateway: Gateway):
    active = running()
    gateway._follow(active, message(0, "abc"))
    gateway._follow(active, ["moving", "key", 0, "w2"])
    assert gateway._follow(active, ["recalled", "key", 7, "aborted"]) == []
    [waiting] = gateway._follow(active, ["recalled", "key", 1, "aborted"])
    assert waiting == Progress("queued", "waiting for m")
    assert (active.journal.worker, active.n_resumes) == (None, 1)
    # It is not recalled a second time.
    assert gateway._follow(active, ["recalled", "key", 1, "aborted"]) == []
    await gateway.close()
