from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.batching.params import SamplingParams
from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.engine import LLMEngine, StepOutput
from sllmdask.engine.sampler import Draw, sample
from sllmdask.errors import ContextTooLong, EngineError, InvalidRequest
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
    write_json,
)

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_a_crowd(model: TinyModel):
    asked = prompts(7, 5, 60)
    assert_the_same_in_a_crowd(model, asked, [{**SAMPLED, "seed": i, "top_k": i % 3 * 10} for i in range(len(asked))])


def test_a_sampled_request_goes_on_elsewhere_as_if_nothing_had_happened(model: TinyModel):
    assert_goes_on_elsewhere(model, **SAMPLED)


def test_the_noise_is_that_of_the_tokens_place_in_the_sequence(model: TinyModel):
    [prompt] = prompts(1, 20, 30)
    tokens = answer(model, prompt, 6, temperature=1.0, seed=3)
    with torch.no_grad():
        logits = model.reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    draws = [Draw(SamplingParams(seed=3), len(prompt) + i) for i in range(6)]
    assert sample(logits, draws) == tokens


def test_another_seed_gives_another_answer(model: TinyModel):
    [prompt] = prompts(1)
    assert answer(model, prompt, **SAMPLED) != answer(model, prompt, **{**SAMPLED, "seed": 12})


# --- how an answer ends ----------------------------------------------------------------------------------------------


def ended_by(model: TinyModel, prompt: list[int], eos: object = None, **params: Any) -> tuple[list[int], FinishReason | None]:
    engine = make_engine(model)
    engine.eos_token_ids = frozenset([eos]) if isinstance(eos, int) else frozenset()
    outputs: list[StepOutput] = []
    engine.add(request("a", prompt, **params))
    drain(engine, outputs)
    assert_all_free(engine)
    assert [output.final for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return tokens_of(outputs)["a"], outputs[-1].finish_reason


@pytest.fixture(scope="module")
def known(model: TinyModel) -> tuple[list[int], list[int], int]:
    """A prompt, its answer of 24 tokens, and a token that comes first at index 5 or later."""
    for prompt in prompts(20, 10, 20):
        whole = model.generate(prompt, 24)
        late = [token for i, token in enumerate(whole) if i >= 5 and token not in whole[:i]]
        if late:
            return prompt, whole, late[0]
    raise AssertionError("no prompt does")


def test_max_tokens_ends_an_answer(model: TinyModel, known: tuple[list[int], list[int], int]):
    prompt, whole, _ = known
    assert ended_by(model, prompt, max_tokens=7) == (whole[:7], FinishReason.LENGTH)
    assert ended_by(model, prompt, max_tokens=1) == (whole[:1], FinishReason.LENGTH)


def test_eos_ends_an_answer_and_is_its_last_token(model: TinyModel, known: tuple[list[int], list[int], int]):
    prompt, whole, eos = known
    assert ended_by(model, prompt, eos) == (whole[: whole.index(eos) + 1], FinishReason.STOP)


def test_a_stop_token_id_ends_an_answer(model: TinyModel, known: tuple[list[int], list[int], int]):
    prompt, whole, stop = known
    assert ended_by(model, prompt, stop_token_ids=(stop,)) == (whole[: whole.index(stop) + 1], FinishReason.STOP)


def test_ignore_eos_goes_on_past_eos_but_not_past_stop_ids(model: TinyModel, known: tuple[list[int], list[int], int]):
    prompt, whole, eos = known
    assert ended_by(model, prompt, eos, ignore_eos=True) == (whole, FinishReason.LENGTH)
    assert ended_by(model, prompt, eos, ignore_eos=True, stop_token_ids=(eos,))[1] is FinishReason.STOP


def test_before_min_tokens_eos_does_not_come(model: TinyModel, known: tuple[list[int], list[int], int]):
    prompt, whole, eos = known
    at = whole.index(eos)
    tokens, _ = ended_by(model, prompt, eos, min_tokens=at + 4)
    assert tokens[:at] == whole[:at]
    assert eos not in tokens[: at + 4]
    assert len(tokens) >= at + 4
    # At min_tokens exactly, it may come.
    assert ended_by(model, prompt, eos, min_tokens=at) == (whole[: at + 1], FinishReason.STOP)


def test_the_end_of_the_window_ends_an_answer(tmp_path: Path):
    model = make_model(tmp_path, max_position_embeddings=40)
    [prompt] = prompts(1, 30, 30)
    assert ended_by(model, prompt, max_tokens=100) == (model.generate(prompt, 10), FinishReason.LENGTH)


def test_the_end_of_the_kv_memory_is_the_end_of_the_window(model: TinyModel):
    engine = make_engine(model, n_blocks=3, block_size=16)
    assert engine.max_model_len == 48
    [prompt] = prompts(1, 30, 30)
    engine.add(request("a", prompt, 100))
    assert drain(engine) == {"a": model.generate(prompt, 18)}


def test_eos_ids_come_from_both_json_files_one_or_several(tmp_path: Path):
    model = make_model(tmp_path, eos_token_id=5)
    assert make_engine(model).eos_token_ids == {5}
    write_json(tmp_path / "generation_config.json", eos_token_id=[5, 7, 9])
    assert make_engine(model).eos_token_ids == {5, 7, 9}


# --- refusals and failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "changes", "error"),
    [
        ([], {}, InvalidRequest),
        ([1, VOCAB], {}, InvalidRequest),
        ([-1], {}, InvalidRequest),
        ([1] * 512, {}, ContextTooLong),
        ([1], {"output_ids": [2, 3], "max_tokens": 2}, InvalidRequest),
    ],
    ids=["empty", "beyond the vocabulary", "negative", "as long as the window", "already complete"],
)
def test_what_cannot_be_answered_is_refused_when_it_comes(
    model: TinyModel, prompt: list[int], changes: dict[str, Any], error: type[Exception]
):
    engine = make_engine(model)
    with pytest.raises(error):
        engine.add(request("a", prompt, **changes))
    assert not engine.has_work
    assert engine.step() == []


def test_a_request_whose_forward_pass_fails_fails_alone(model: TinyModel):
    asked = prompts(3, 10, 30)
    poison = next(token for token in range(VOCAB) if not any(token in prompt + model.generate(prompt, 24) for prompt in asked))
    engine = make_engine(model)

    def explode(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0] == poison).any():
            raise RuntimeError("boom")

    engine._runner.model.get_input_embeddings().register_forward_pre_hook(explode)  # type: ignore[operator]
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt))
        engine.add(request(f"bad-{i}", [*prompt, poison]))
        outputs += engine.step()
    while engine.has_work:
        outputs += engine.step()
    failed = [output for output in outputs if output.error]
    assert {output.request_id for output in failed} == {"bad-0", "bad-1", "bad-2"}
    assert all(isinstance(output.error, EngineError) and output.finish_reason is FinishReason.ERROR for output in failed)
    assert "boom" in str(failed[0].error)
    good = [output for output in outputs if not output.error]
    assert tokens_of(good) == {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    assert_all_free(engine)


def test_a_request_whose_logits_are_not_numbers_fails_alone(tmp_path: Path):
    model = make_model(tmp_path, tie_word_embeddings=False)
    bad = 17
    asked = [prompt for prompt in prompts(4, 10, 30) if bad not in prompt + model.generate(prompt, 24)][:2]
    expected = {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    model.tensors["model.embed_tokens.weight"][bad] = torch.nan
    engine = make_engine(model)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt))
    engine.add(request("bad", [3, bad]))
    while engine.has_work:
        outputs += engine.step()
    assert [output.request_id for output in outputs if output.error] == ["bad"]
    assert tokens_of([output for output in outputs if not output.error]) == expected


# --- abort and accounts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", range(8))
def test_an_abort_in_any_phase_frees_the_blocks_and_leaves_the_others_alone(model: TinyModel, n_steps: int):
    asked = prompts(4, 20, 70)
    expected = {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    for victim in range(len(asked)):
        # Waiting, in the middle of its prefill, decoding, or preempted.
        engine = make_engine(model, n_blocks=22, block_size=8, max_batch_tokens=24, max_running=3)
        outputs: list[StepOutput] = []
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt))
        for _ in range(n_steps):
            outputs += engine.step()
        before = tokens_of(outputs).get(str(victim), [])
        assert engine.abort(str(victim))
        assert not engine.abort(str(victim))
        assert drain(engine, outputs).get(str(victim), []) == before == expected[str(victim)][: len(before)]
        answers = tokens_of(outputs)
        assert all(answers[key] == value for key, value in expected.items() if key != str(victim))
        assert_all_free(engine)


def test_blocks_add_up_after_every_step_of_a_random_life(model: TinyModel):
    rng = random.Random(4)
    engine = make_engine(model, n_blocks=20, block_size=8, max_batch_tokens=32)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(prompts(25, 5, 80, seed=9)):
        engine.add(request(str(i), prompt, rng.randint(1, 30), priority=rng.randint(0, 2)))
        for _ in range(rng.randint(0, 5)):
            outputs += engine.step()
            if rng.random() < 0.1 and engine.has_work:
                assert engine.abort(rng.choice(engine.sequences).request_id)
            held = {block for sequence in engine.sequences for block in sequence.block_table}
            assert engine.stats().blocks_total - engine.stats().blocks_free == len(held)
    drain(engine, outputs)
    assert_all_free(engine)


def test_stats_count_what_was_done(model: TinyModel):
    engine = make_engine(model)
    engine.add(request("a", [1, 2, 3], 4))
    assert (engine.stats().n_waiting, engine.stats().n_running) == (1, 0)
    engine.step()
    stats = engine.stats()
    assert (stats.n_waiting, stats.n_running, stats.blocks_total - stats.blocks_free) == (0, 1, 1)
    drain(engine)
    stats = engine.stats()
    assert (stats.n_steps, stats.n_prompt_tokens, stats.n_output_tokens) == (4, 3, 4)
    assert stats.step_s > 0
    # 3 layers, keys and values, 2 KV heads of 16, float32.
    assert stats.bytes_per_block == 16 * 3 * 2 * 2 * 16 * 4
    assert stats.blocks_total == 8 * 1024**2 // stats.bytes_per_block - 1


def test_a_closed_engine_holds_nothing(model: TinyModel):
    engine = make_engine(model)
    parameters = list(engine._runner.model.parameters())
    assert parameters
    engine.add(request("a", [1, 2, 3]))
    engine.step()
    engine.close()
    assert not engine.has_work
    assert all(parameter.is_meta for parameter in engine._runner.model.parameters())
    assert not engine._runner.caches


def test_defaults_of_the_request_are_sampled_not_greedy(model: TinyModel):
    engine: LLMEngine = make_engine(model)
    sequence = request("a", [1, 2, 3], 8)
    sequence.params = SamplingParams(max_tokens=8, seed=1)
    engine.add(sequence)
    assert drain(engine)["a"] != model.generate([1, 2, 3], 8)
