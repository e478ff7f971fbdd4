"""The engine's greedy tokens are those of ``model.generate()``, whatever runs beside a request."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sllmdask.engine.engine import LLMEngine, StepOutput
from sllmdask.engine.families import TESTED
from tests.engine.models import CONFIGS, assert_all_free, drain, make_engine, make_model, prompts, request

N_TOKENS = 20


def run_staggered(engine: LLMEngine, all_prompts: list[list[int]], seed: int = 0) -> dict[str, list[int]]:
    """Requests arrive a few at a time while others run."""
    rng = random.Random(seed)
    left = [request(str(i), prompt, N_TOKENS) for i, prompt in enumerate(all_prompts)]
    outputs: list[StepOutput] = []
    while left:
        for _ in range(min(len(left), rng.randint(1, 3))):
            engine.add(left.pop(0))
        for _ in range(rng.randint(0, 4)):
            outputs += engine.step()
    return drain(engine, outputs)


def test_every_architecture_that_is_called_tested_is_compared_here():
    assert {architecture for architecture, _ in CONFIGS.values()} == set(TESTED)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_generate_in_a_staggered_batch_with_chunked_prefill(model_of, name: str):
    model = model_of(name)
    asked = prompts(5)
    expected = {str(i): model.generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    assert len({token for answer in expected.values() for token in answer}) > 10, "the model is too dull to tell right from wrong"
    engine = make_engine(model, max_batch_tokens=32)
    assert run_staggered(engine, asked) == expected
    assert_all_free(engine)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_generate_when_alone(model_of, name: str):
    model = model_of(name)
    [prompt] = prompts(1, 70, 90)
    engine = make_engine(model)
    engine.add(request("a", prompt, 40))
    assert drain(engine) == {"a": model.generate(prompt, 40)}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_generate_when_the_pool_is_so_small_that_sequences_are_preempted(model_of, name: str):
    model = model_of(name)
    asked = prompts(5, 20, 90)
    expected = {str(i): model.generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    engine = make_engine(model, n_blocks=17, block_size=8, max_batch_tokens=48)
    assert run_staggered(engine, asked) == expected
    assert engine.stats().n_preemptions > 0
    assert_all_free(engine)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_the_block_size_changes_nothing(model_of, block_size: int):
    model = model_of("llama")
    asked = prompts(4)
    expected = {str(i): model.generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    assert run_staggered(make_engine(model, block_size=block_size), asked) == expected


def test_a_request_that_continues_elsewhere_gets_the_tokens_it_would_have_got(model_of):
    model = model_of("llama")
    [prompt] = prompts(1, 30, 40)
    whole = model.generate(prompt, 30)
    engine = make_engine(model)
    outputs: list[StepOutput] = []
    engine.add(request("a", prompt, 30, output_ids=whole[:11]))
    drain(engine, outputs)
    assert [output.index for output in outputs] == list(range(11, 30))
    assert [output.token_id for output in outputs] == whole[11:]


def test_the_tokens_of_a_bfloat16_checkpoint_are_mostly_those_of_generate(tmp_path: Path):
    import torch

    model = make_model(tmp_path, "gemma", torch.bfloat16)
    asked = prompts(8, 10, 60)
    answers = run_staggered(make_engine(model), asked)
    # bfloat16 has near-ties, after which answers part; of the first four tokens, most agree.
    agree = sum(answers[str(i)][:4] == model.generate(prompt, 4) for i, prompt in enumerate(asked))
    assert agree >= 5
