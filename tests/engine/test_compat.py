"""Models off transformers' attention interface, those whose rotary frequencies change, and those that nobody has tested."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sllmdask.engine.compat import CompatRunner, LongRopeRunner, share_passes
from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import StepOutput
from sllmdask.engine.runner import ModelRunner
from sllmdask.errors import UnsupportedArchitecture
from tests.engine.models import (
    CONFIGS,
    TinyModel,
    assert_all_free,
    drain,
    make_engine,
    make_model,
    prompts,
    request,
    save_model,
    write_json,
)

#: Those of the tested models whose attention the paged cache cannot be plugged into.
OFF_THE_INTERFACE = {
    "bloom",
    "codegen",
    "falcon",
    "falcon-alibi",
    "falcon-grouped",
    "gpt_neo",
    "gptj",
    "mpt",
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_paged_cache_serves_whatever_goes_through_the_interface(model_of, name: str):
    runner = make_engine(model_of(name))._runner
    assert type(runner) is (CompatRunner if name in OFF_THE_INTERFACE else ModelRunner)


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_the_blocks_hold_what_transformers_would_have_in_its_cache(tmp_path: Path, name: str):
    model = make_model(tmp_path, name)
    engine = make_engine(model, block_size=8, max_batch_tokens=16)
    asked = prompts(3, 20, 40)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 12))
    for _ in range(10):
        engine.step()
    for sequence in engine.sequences:
        cache = transformers.DynamicCache()
        ids = torch.tensor([sequence.token_ids(0, sequence.n_computed)])
        with torch.no_grad():
            model.reference(ids, past_key_values=cache, use_cache=True)
        for (keys, values), layer in zip(engine._runner.caches, cache.layers, strict=True):
            for blocks, expected in ((keys, layer.keys), (values, layer.values)):
                found = blocks[sequence.block_table].flatten(0, 1)[: sequence.n_computed]
                torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-3, atol=1e-4)
    assert not any(blocks[0].any() for layer in engine._runner.caches for blocks in layer), "block 0 is nobody's"


def test_sequences_of_one_step_share_passes(tmp_path: Path):
    engine = make_engine(make_model(tmp_path, "gptj"))
    for i, prompt in enumerate(prompts(6, 20, 40)):
        engine.add(request(str(i), prompt, 12))
    engine.step()
    n_passes = 0

    def count(*_: Any) -> None:
        nonlocal n_passes
        n_passes += 1

    engine._runner.model.register_forward_pre_hook(count)
    engine.step()
    assert n_passes == 1


# --- who shares a pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_every_chunk_runs_once_with_others_of_its_length_and_little_padding(seed: int):
    rng = random.Random(seed)
    shapes = [(rng.choice([1, 1, 1, 7]), rng.randint(0, 200)) for _ in range(rng.randint(1, 20))]
    most = rng.choice([0, 10, 300, 10**6])
    passes = share_passes(shapes, most)
    assert sorted(itertools.chain.from_iterable(passes)) == list(range(len(shapes)))
    for numbers in passes:
        assert len({shapes[number][0] for number in numbers}) == 1
        longest = max(shapes[number][1] for number in numbers)
        assert sum(longest - shapes[number][1] for number in numbers) <= most


def test_with_room_for_padding_all_decodes_share_a_pass_and_without_only_those_of_one_length():
    shapes = [(1, 5), (1, 90), (1, 5), (4, 0), (1, 90)]
    assert sorted(map(sorted, share_passes(shapes, 10**6))) == [[0, 1, 2, 4], [3]]
    assert sorted(map(sorted, share_passes(shapes, 0))) == [[0, 2], [1, 4], [3]]


# --- rotary frequencies that depend on the length --------------------------------------------------------------------

_LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 48,
    "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.6 * i for i in range(8)],
        "original_max_position_embeddings": 48,
    },
}


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("longrope"), "phi3", **_LONGROPE)


def greedy(model: TinyModel, prompt: list[int], n_tokens: int) -> list[int]:
    """The likeliest tokens, each by a forward pass over all before it: no cache that could be of the other set of frequencies."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(model.reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_sequences_on_both_sides_of_the_switch_and_across_it_give_the_tokens_of_a_model_without_a_cache(longrope: TinyModel):
    # Well below, just below and growing beyond, just beyond, far beyond; whole prompts, so that each is on one side.
    asked = [prompt for n in (10, 40, 47, 48, 49, 90, 150) for prompt in prompts(1, n, n, seed=n)]
    expected = {str(i): greedy(longrope, prompt, 24) for i, prompt in enumerate(asked)}
    for sizes in (
        {"max_batch_tokens": 1024},
        {"max_batch_tokens": 32},
        {"n_blocks": 40, "block_size": 8, "max_batch_tokens": 64},
    ):
        engine = make_engine(longrope, **sizes)
        assert type(engine._runner) is LongRopeRunner
        outputs: list[StepOutput] = []
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, 24))
            outputs += engine.step()
        assert drain(engine, outputs) == expected
        assert_all_free(engine)


def test_the_two_sets_of_frequencies_matter_here(longrope: TinyModel, tmp_path: Path):
    rope = {**_LONGROPE["rope_parameters"], "long_factor": _LONGROPE["rope_parameters"]["short_factor"]}
    other = make_model(tmp_path, "phi3", **{**_LONGROPE, "rope_parameters": rope})
    [short], [long] = prompts(1, 10, 10), prompts(1, 90, 90)
    assert other.generate(short, 24) == longrope.generate(short, 24)
    assert other.generate(long, 24) != longrope.generate(long, 24)


def test_a_dynamic_rotary_embedding_is_served_inside_its_window(tmp_path: Path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make_model(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=64)
    engine = make_engine(model)
    assert engine.max_model_len == 64
    asked = prompts(4, 10, 40)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 20))
    assert drain(engine) == {str(i): model.generate(prompt, 20) for i, prompt in enumerate(asked)}


# --- architectures that are not listed -------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: Class -> (its configuration, the runner that is to serve it). None of them is listed as tested.
UNLISTED: dict[str, tuple[dict[str, Any], type[ModelRunner]]] = {
    "ArceeForCausalLM": (_SMALL, ModelRunner),
    "Ernie4_5ForCausalLM": (_SMALL, ModelRunner),
    "SeedOssForCausalLM": ({**_SMALL, "head_dim": 16}, ModelRunner),
    # Its chunks are in the mask alone.
    "Llama4ForCausalLM": (
        {
            **_SMALL,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 24,
            "no_rope_layers": [1, 1, 0],
        },
        CompatRunner,
    ),
}


@pytest.mark.parametrize("architecture", UNLISTED)
def test_an_architecture_that_nobody_has_tested_is_run_as_far_as_it_can_be(tmp_path: Path, architecture: str):
    config, runner = UNLISTED[architecture]
    model = save_model(tmp_path, architecture, config)
    engine = make_engine(model, max_batch_tokens=32)
    assert type(engine._runner) is runner
    assert not engine._runner.family.tested
    asked = prompts(4, 20, 60)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 12))
    assert drain(engine) == {str(i): model.generate(prompt, 12) for i, prompt in enumerate(asked)}


def test_a_window_that_only_a_forgetful_cache_knows_of_is_where_the_model_ends(tmp_path: Path):
    config = {**_SMALL, "ffn_dim": 96, "sliding_window": 24, "num_codebooks": 2}
    del config["intermediate_size"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]
    model = save_model(tmp_path, "MoshiForCausalLM", config)
    engine = make_engine(model, max_batch_tokens=8)
    assert engine.max_model_len == 24
    asked = prompts(3, 5, 12)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 10))
    assert drain(engine) == {str(i): model.generate(prompt, 10) for i, prompt in enumerate(asked)}


def test_a_model_whose_forward_pass_fails_is_refused_and_not_served(tmp_path: Path):
    config = {**_SMALL, "is_decoder": True}
    del config["num_key_value_heads"]
    # It counts positions from its padding token, and has none.
    model = save_model(tmp_path, "RobertaForCausalLM", config)
    with pytest.raises(UnsupportedArchitecture, match="fails"):
        make_engine(model)


@pytest.mark.parametrize(
    ("architecture", "model_type", "config", "reason"),
    [
        ("Qwen3NextForCausalLM", "qwen3_next", {}, "recurrent state"),
        ("OpenAIGPTLMHeadModel", "openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}, "no KV cache"),
        ("NoSuchForCausalLM", "llama", {}, "no such class"),
    ],
)
def test_what_neither_runner_can_run_is_refused_with_the_reason(
    tmp_path: Path, architecture: str, model_type: str, config: dict[str, Any], reason: str
):
    write_json(tmp_path / "config.json", architectures=[architecture], model_type=model_type, **config)
    with pytest.raises(UnsupportedArchitecture, match=reason) as refused:
        build_skeleton(tmp_path)
    assert refused.value.architecture == architecture


def test_a_model_that_looks_at_tokens_to_come_is_found_before_it_answers(tmp_path: Path):
    config = {**_SMALL, "is_decoder": False}
    del config["num_key_value_heads"]
    model = save_model(tmp_path, "BertLMHeadModel", config)
    with pytest.raises(UnsupportedArchitecture):
        make_engine(model)
