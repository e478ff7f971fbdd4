"""Penalties, biases and log probabilities in the engine, against transformers' own generation and plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.batching.params import TokenLogprobs
from sllmdask.engine import logprobs
from sllmdask.engine.engine import LLMEngine, StepOutput
from sllmdask.engine.logprobs import PromptLogprobs, rows_at_once, token_logprobs
from sllmdask.errors import InvalidRequest
from tests.engine.models import (
    VOCAB,
    TinyModel,
    answer,
    assert_all_free,
    assert_goes_on_elsewhere,
    assert_the_same_in_a_crowd,
    drain,
    make_engine,
    make_model,
    prompts,
    request,
    tokens_of,
)

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.2, "frequency_penalty": 0.6},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.3, "logit_bias": ((11, 4.0), (12, -100.0))},
    {"repetition_penalty": 1.3, "temperature": 0.9, "seed": 5, "top_p": 0.9},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def penalised_by_hand(model: TinyModel, prompt: list[int], n_tokens: int, params: dict[str, Any]) -> list[int]:
    """Greedy tokens by OpenAI's and CTRL's formulas over plain forward passes, everything counted anew for each token."""
    tokens: list[int] = []
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model.reference(torch.tensor([prompt + tokens])).logits[0, -1].tolist()
        for token in {*prompt, *tokens}:
            penalty = params.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in set(tokens):
            logits[token] -= params.get("presence_penalty", 0.0) + params.get("frequency_penalty", 0.0) * tokens.count(token)
        for token, bias in params.get("logit_bias", ()):
            logits[token] += bias
        tokens.append(max(range(len(logits)), key=logits.__getitem__))
    return tokens


# --- penalties -------------------------------------------------------------------------------------------------------


def test_a_repetition_penalty_gives_the_tokens_that_generate_gives(model: TinyModel):
    for prompt in prompts(4, 5, 40):
        ids = torch.tensor([prompt])
        generated = model.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.4,
        )
        expected = generated[0, len(prompt) :].tolist()
        assert answer(model, prompt, repetition_penalty=1.4) == expected != answer(model, prompt)


@pytest.mark.parametrize("params", PENALTIES[:3], ids=str)
def test_penalties_and_bias_give_the_tokens_of_their_formulas(model: TinyModel, params: dict[str, Any]):
    for prompt in prompts(2, 5, 20, seed=3):
        expected = penalised_by_hand(model, prompt, 20, params)
        assert answer(model, prompt, 20, **params) == expected != answer(model, prompt, 20)


def test_penalties_are_the_same_alone_and_in_a_crowd_that_is_preempted(model: TinyModel):
    asked = prompts(8, 5, 60)
    assert_the_same_in_a_crowd(model, asked, [PENALTIES[i % len(PENALTIES)] for i in range(len(asked))])


def test_a_seeded_request_with_everything_is_the_same_alone_and_among_32(model: TinyModel):
    asked = prompts(32, 5, 40, seed=8)
    alone = answer(model, asked[0], **PENALTIES[3])
    engine = make_engine(model, max_running=32)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, **{**PENALTIES[3], "seed": 5 + i}))
    assert drain(engine)["0"] == alone


@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_a_penalised_request_goes_on_elsewhere_as_if_nothing_had_happened(model: TinyModel, params: dict[str, Any]):
    assert_goes_on_elsewhere(model, **params)


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused(model: TinyModel):
    engine = make_engine(model)
    with pytest.raises(InvalidRequest, match=f"token {VOCAB}") as caught:
        engine.add(request("a", [1, 2], logit_bias=((VOCAB, 1.0),)))
    assert caught.value.param == "logit_bias"
    assert not engine.has_work


def test_what_was_remembered_of_a_request_is_forgotten_with_it(model: TinyModel):
    engine = make_engine(model)
    engine.add(request("a", [1, 2, 3], 4, repetition_penalty=1.5))
    engine.add(request("b", [1, 2, 3], 40, repetition_penalty=1.5))
    engine.step()
    assert len(engine._choosers) == 2
    engine.abort("b")
    drain(engine)
    assert len(engine._choosers) == 0


# --- log probabilities -----------------------------------------------------------------------------------------------


def log_softmax(model: TinyModel, tokens: list[int]) -> torch.Tensor:
    """(len(tokens), vocab) of a plain forward pass; row i tells of token i + 1."""
    with torch.no_grad():
        return model.reference(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def assert_told(told: TokenLogprobs, expected: torch.Tensor, token: int, n_top: int) -> None:
    assert told.logprob == pytest.approx(float(expected[token]), abs=1e-4)
    values, ids = expected.topk(n_top)
    assert list(told.top_logprobs) == pytest.approx(values.tolist(), abs=1e-4)
    assert list(told.top_ids) == ids.tolist()


def run(engine: LLMEngine) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    drain(engine, outputs)
    assert_all_free(engine)
    return outputs


@pytest.mark.parametrize("n_top", [0, 1, 5, 20])
def test_log_probabilities_of_an_answer_are_those_of_a_plain_forward_pass(model: TinyModel, n_top: int):
    [prompt] = prompts(1, 20, 40)
    engine = make_engine(model)
    engine.add(request("a", prompt, 12, logprobs=n_top, temperature=1.3, seed=2, top_k=40, repetition_penalty=1.5))
    outputs = run(engine)
    tokens = tokens_of(outputs)["a"]
    expected = log_softmax(model, prompt + tokens)[len(prompt) - 1 :]
    for i, output in enumerate(outputs):
        assert output.logprobs is not None and output.token_id == tokens[i]
        assert_told(output.logprobs, expected[i], tokens[i], n_top)
    assert all(output.prompt_logprobs is None for output in outputs)


def test_who_did_not_ask_gets_none_beside_one_who_did(model: TinyModel):
    engine = make_engine(model)
    for i, (prompt, n_top) in enumerate(zip(prompts(3, 5, 30), (None, 2, 7), strict=True)):
        engine.add(request(str(i), prompt, 5, logprobs=n_top))
    for output in run(engine):
        n_top = (None, 2, 7)[int(output.request_id)]
        assert (output.logprobs and len(output.logprobs.top_ids)) == n_top


@pytest.mark.parametrize("chunk", [512, 16, 7])
def test_log_probabilities_of_a_prompt_are_those_of_a_plain_forward_pass(model: TinyModel, chunk: int):
    asked = prompts(4, 1, 60, seed=2)
    engine = make_engine(model, max_batch_tokens=chunk)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 3, logprobs=2, prompt_logprobs=i))
    outputs = run(engine)
    for i, prompt in enumerate(asked):
        first, *rest = [output for output in outputs if output.request_id == str(i)]
        expected = log_softmax(model, prompt)
        assert first.prompt_logprobs is not None
        assert all(output.prompt_logprobs is None for output in rest)
        assert len(first.prompt_logprobs) == len(prompt) - 1
        for position, told in enumerate(first.prompt_logprobs):
            assert_told(told, expected[position], prompt[position + 1], i)


def test_a_prompts_log_probabilities_do_not_change_the_answer(model: TinyModel):
    asked = prompts(5, 20, 60, seed=4)
    engine = make_engine(model, max_batch_tokens=24)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 12, prompt_logprobs=0 if i % 2 else None))
    assert drain(engine) == {str(i): model.generate(prompt, 12) for i, prompt in enumerate(asked)}


def test_a_step_makes_no_more_logits_than_its_memory_holds(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 9 * 4 * VOCAB)
    assert rows_at_once(VOCAB) == 9
    engine = make_engine(model)
    widths: list[int] = []
    forward = engine._runner.forward

    def watched(*given: Any) -> torch.Tensor:
        logits = forward(*given)
        widths.append(len(logits))
        return logits

    monkeypatch.setattr(engine._runner, "forward", watched)
    asked = [*prompts(3, 40, 60, seed=6), *prompts(2, 10, 30, seed=7)]
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 6, logprobs=1, prompt_logprobs=1 if i < 3 else None))
    outputs = run(engine)
    # Nine for prompts, and one for each answer.
    assert max(widths) <= 9 + len(asked)
    assert tokens_of(outputs) == {str(i): model.generate(prompt, 6) for i, prompt in enumerate(asked)}
    for i in range(3):
        [told] = [o.prompt_logprobs for o in outputs if o.request_id == str(i) and o.prompt_logprobs is not None]
        expected = log_softmax(model, asked[i])
        for position, each in enumerate(told):
            assert_told(each, expected[position], asked[i][position + 1], 1)


def test_a_prompt_that_is_preempted_in_its_middle_is_told_once_and_whole(model: TinyModel):
    first, second = prompts(2, 60, 60, seed=9)
    engine = make_engine(model, n_blocks=12, block_size=8, max_batch_tokens=16)
    engine.add(request("low", first, 4, prompt_logprobs=3, logprobs=0))
    outputs = [output for _ in range(2) for output in engine.step()]
    engine.add(request("high", second, 4, priority=1))
    drain(engine, outputs)
    assert engine.stats().n_preemptions > 0
    [told] = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    expected = log_softmax(model, first)
    assert len(told) == 59
    for position, each in enumerate(told):
        assert_told(each, expected[position], first[position + 1], 3)


def test_a_request_that_brings_tokens_is_not_told_of_its_prompt_again(model: TinyModel):
    [prompt] = prompts(1, 20, 30)
    whole = model.generate(prompt, 8)
    engine = make_engine(model)
    engine.add(request("a", prompt, 8, output_ids=whole[:3], logprobs=1, prompt_logprobs=1))
    outputs = run(engine)
    assert all(output.prompt_logprobs is None for output in outputs)
    expected = log_softmax(model, prompt + whole)[len(prompt) + 2 :]
    for i, output in enumerate(outputs):
        assert output.logprobs is not None
        assert_told(output.logprobs, expected[i], whole[3 + i], 1)


def test_tokens_of_a_prompt_whose_logits_nobody_made_are_missed_aloud():
    told = PromptLogprobs([1, 2, 3, 4], 0)
    assert told.n_rows(2, 4) == 2
    with pytest.raises(ValueError, match="tokens 1 to 2 are missing"):
        told.add(4, torch.zeros(2, 10))


def test_half_precision_logits_are_summed_in_full_precision():
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = list(range(40))
    for row, told in enumerate(token_logprobs(logits, tokens, 3)):
        expected = logits[row].double().log_softmax(-1)
        assert told.logprob == pytest.approx(float(expected[row]), abs=1e-4)
        assert list(told.top_logprobs) == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_a_small_vocabulary_tells_of_all_its_tokens(tmp_path: Path):
    small = make_model(tmp_path, vocab_size=12)
    engine = make_engine(small)
    engine.add(request("a", [1, 2, 3], 4, logprobs=20))
    assert all(output.logprobs is not None and len(output.logprobs.top_ids) == 12 for output in run(engine))
