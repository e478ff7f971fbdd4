"""Embeddings are those of plain transformers, one input at a time, pooled by the definitions of sentence-transformers."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.construct import SkeletonShelf
from sllmdask.engine.embedding import build_embedding_engine, build_embedding_skeleton, embedding_sequence
from sllmdask.engine.families import read_config
from sllmdask.engine.pooling import ENCODERS, UNPACKED, inspect_embedding, makes_embeddings
from sllmdask.errors import CheckpointCorrupt, ContextTooLong, InvalidRequest, SllmError, UnsupportedArchitecture
from tests.engine.encoders import CONFIGS, DECODERS, add_sentence_transformers_files, embed, make_embedder, make_encoder, pooled
from tests.engine.models import make_model, prompts, request, settings, write_json

EXACT = {"rtol": 0, "atol": 2e-6}


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected.double()).abs().max() <= 2e-6)


def test_every_encoder_is_compared_here(tmp_path: Path):
    compared = {make_encoder(tmp_path / name, name).reference.config.model_type for name in CONFIGS if name not in DECODERS}
    assert compared == set(ENCODERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_of_a_mixed_batch_are_those_of_each_input_alone(tmp_path: Path, name: str):
    model = make_encoder(tmp_path, name)
    engine = make_embedder(model, max_batch_tokens=160)
    inputs = prompts(12, 1, 100)
    mode = "lasttoken" if name in DECODERS else "mean_tokens"
    expected = [unit(pooled(model.states(ids), mode)) for ids in inputs]
    assert torch.pdist(torch.stack(expected)).min() > 1e-3, "the model is too dull to tell right from wrong"
    for found, right in zip(embed(engine, inputs), expected, strict=True):
        assert near(found, right)


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_a_padding_token_among_the_ids_has_the_position_that_transformers_gives_it(tmp_path: Path, name: str):
    model = make_encoder(tmp_path, name)
    inputs = [[5, 1, 7, 9], [1, 1, 3]]
    found = embed(make_embedder(model), inputs)
    assert all(near(vector, unit(pooled(model.states(ids), "mean_tokens"))) for vector, ids in zip(found, inputs, strict=True))


@pytest.mark.parametrize(
    "modes",
    [
        ["cls_token"],
        ["mean_tokens"],
        ["max_tokens"],
        ["mean_sqrt_len_tokens"],
        ["weightedmean_tokens"],
        ["lasttoken"],
        ["cls_token", "max_tokens", "mean_tokens", "lasttoken"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation_are_read_from_sentence_transformers_files(tmp_path: Path, modes: list[str], normalize: bool):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, *modes, normalize=normalize)
    engine = make_embedder(model)
    inputs = prompts(4, 1, 40)
    expected = [torch.cat([pooled(model.states(ids), mode) for mode in modes]) for ids in inputs]
    assert engine.info.dimensions == 64 * len(modes)
    for found, right in zip(embed(engine, inputs), expected, strict=True):
        right = unit(right) if normalize else right
        assert (found.double() - right).abs().max() <= 2e-6 * max(1.0, float(right.abs().max()))


def test_newer_files_name_the_mode_by_one_word(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, pooling_mode="cls")
    assert make_embedder(model).info.pooling == ("cls",)
    add_sentence_transformers_files(tmp_path, pooling_mode="lasttoken")
    assert make_embedder(model).info.pooling == ("last",)


def test_the_deployment_goes_before_the_files_and_the_files_before_the_defaults(tmp_path: Path):
    config = read_config(make_encoder(tmp_path, "bert").directory)
    decoder = make_encoder(tmp_path / "decoder", "qwen2").directory
    assert inspect_embedding(tmp_path, config).pooling == ("mean",)
    assert inspect_embedding(decoder, read_config(decoder)).pooling == ("last",)
    assert inspect_embedding(tmp_path, config).normalize
    add_sentence_transformers_files(tmp_path, "cls_token", normalize=False)
    assert inspect_embedding(tmp_path, config).pooling == ("cls",)
    assert not inspect_embedding(tmp_path, config).normalize
    chosen = inspect_embedding(tmp_path, config, "max", normalize=True)
    assert (chosen.pooling, chosen.normalize) == (("max",), True)


@pytest.mark.parametrize("dimensions", [1, 7, 64])
def test_a_shortened_vector_is_the_beginning_of_the_whole_one_at_length_1(tmp_path: Path, dimensions: int):
    model = make_encoder(tmp_path, "bert")
    [ids] = prompts(1, 20, 30)
    whole = pooled(model.states(ids), "mean_tokens")
    assert near(embed(make_embedder(model), [ids], dimensions)[0], unit(whole[:dimensions]))
    plain = embed(make_embedder(model, normalize=False), [ids], dimensions)[0]
    assert near(plain / 4, whole[:dimensions] / 4)


def test_bfloat16_is_near(tmp_path: Path):
    model = make_encoder(tmp_path, "bert", torch.bfloat16)
    inputs = prompts(6, 5, 60)
    for found, ids in zip(embed(make_embedder(model), inputs), inputs, strict=True):
        assert torch.cosine_similarity(found.double(), pooled(model.states(ids), "mean_tokens"), dim=0) > 0.999


def test_on_the_cpu_parameters_are_the_given_tensors_and_closing_lets_go_of_them(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    engine = make_embedder(model)
    given = {tensor.data_ptr() for tensor in model.tensors.values()}
    assert {parameter.data_ptr() for parameter in engine._runner.model.parameters()} <= given
    tensors = dict(model.tensors)
    model.tensors.clear()
    alive = [weakref.ref(tensor) for tensor in tensors.values()]
    del tensors
    engine.close()
    gc.collect()
    assert not any(ref() is not None for ref in alive)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_oldest_input_and_those_that_fit_beside_it(tmp_path: Path):
    engine = make_embedder(make_encoder(tmp_path, "bert"), max_batch_tokens=50)
    for name, length in (("a", 30), ("b", 40), ("c", 15), ("d", 5), ("e", 1)):
        engine.add(embedding_sequence(name, [3] * length))
    batches = []
    while engine.has_work:
        batches.append([output.request_id for output in engine.step()])
    assert batches == [["a", "c", "d"], ["b", "e"]]


def test_an_input_of_more_tokens_than_a_batch_runs_alone(tmp_path: Path):
    engine = make_embedder(make_encoder(tmp_path, "bert"), max_batch_tokens=20)
    engine.add(embedding_sequence("long", [3] * 100))
    engine.add(embedding_sequence("short", [3]))
    assert [output.request_id for output in engine.step()] == ["long"]
    assert [output.request_id for output in engine.step()] == ["short"]


def test_what_cannot_be_packed_is_batched_by_length(tmp_path: Path):
    engine = make_embedder(make_encoder(tmp_path, "mpnet"), max_batch_tokens=100)
    for name, length in (("a", 30), ("b", 40), ("c", 30), ("d", 40), ("e", 30), ("f", 30)):
        engine.add(embedding_sequence(name, [3] * length))
    batches = []
    while engine.has_work:
        batches.append([output.request_id for output in engine.step()])
    assert batches == [["a", "c", "e"], ["b", "d"], ["f"]]
    assert {"mpnet"} == UNPACKED


def test_an_aborted_input_gives_no_vector(tmp_path: Path):
    engine = make_embedder(make_encoder(tmp_path, "bert"))
    for name in ("a", "b"):
        engine.add(embedding_sequence(name, [1, 2, 3]))
    assert engine.abort("a")
    assert not engine.abort("a")
    assert [output.request_id for output in engine.step()] == ["b"]
    assert not engine.has_work


def test_one_input_that_fails_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_encoder(tmp_path, "bert")
    engine = make_embedder(model)
    embed_rows = engine._runner.embed

    def fail(inputs: Any) -> torch.Tensor:
        if any(ids[0] == 13 for ids in inputs):
            raise RuntimeError("no memory")
        return embed_rows(inputs)

    monkeypatch.setattr(engine._runner, "embed", fail)
    for name, ids in (("a", [1, 2]), ("b", [13, 2]), ("c", [5])):
        engine.add(embedding_sequence(name, ids))
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["b"].finish_reason is FinishReason.ERROR
    assert "no memory" in str(outputs["b"].error)
    assert near(
        torch.frombuffer(bytearray(outputs["a"].vector), dtype=torch.float32), unit(pooled(model.states([1, 2]), "mean_tokens"))
    )
    assert outputs["c"].error is None
    assert engine.stats().n_output_tokens == 2


@pytest.mark.parametrize(
    ("ids", "dimensions", "words"),
    [
        ([], None, "empty"),
        ([0, 300], None, "300 is not in the model's vocabulary of 300"),
        ([-1], None, "-1 is not in"),
        ([1], 65, "between 1 and 64"),
        ([1], 0, "between 1 and 64"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, ids: list[int], dimensions: int | None, words: str):
    engine = make_embedder(make_encoder(tmp_path, "bert"))
    with pytest.raises(InvalidRequest, match=words):
        engine.add(embedding_sequence("a", ids, dimensions))
    assert not engine.has_work


def test_a_request_for_text_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="/v1/embeddings"):
        make_embedder(make_encoder(tmp_path, "bert")).add(request("a", [1, 2, 3]))


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "window"), [("bert", 130), ("roberta", 128), ("mpnet", 128), ("qwen2", 130)])
def test_the_window_is_what_the_positions_allow(tmp_path: Path, name: str, window: int):
    model = make_encoder(tmp_path, name)
    engine = make_embedder(model)
    assert engine.info.max_model_len == window
    [vector] = embed(engine, [[3] * window])
    assert near(vector, unit(pooled(model.states([3] * window), "lasttoken" if name == "qwen2" else "mean_tokens")))
    with pytest.raises(ContextTooLong) as caught:
        engine.add(embedding_sequence("a", [3] * (window + 1)))
    assert (caught.value.n_tokens, caught.value.limit) == (window + 1, window)


def test_the_window_of_sentence_transformers_is_kept(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, "mean_tokens", max_seq_length=32)
    assert make_embedder(model).info.max_model_len == 32


# --- what is refused, and what is told apart -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "deberta-v2", "architectures": ["DebertaV2Model"]}, "does not know it"),
        ({"model_type": "xglm", "architectures": ["XGLMForCausalLM"]}, "does not know it"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_with_the_reason(tmp_path: Path, config: dict[str, Any], reason: str):
    given = {**read_config(make_encoder(tmp_path, "bert").directory), **config}
    with pytest.raises(UnsupportedArchitecture, match=reason):
        inspect_embedding(tmp_path, given)


@pytest.mark.parametrize(("name", "reason"), [("bloom", "0 of its 3 layers"), ("gpt_oss", "attention sinks")])
def test_a_decoder_with_an_attention_of_its_own_is_refused_when_its_structure_is_built(tmp_path: Path, name: str, reason: str):
    directory = make_model(tmp_path, name).directory
    with pytest.raises(UnsupportedArchitecture, match=reason):
        build_embedding_skeleton(directory)


def test_a_mixture_of_experts_makes_embeddings(tmp_path: Path):
    model = make_model(tmp_path, "qwen3_moe")
    engine = build_embedding_engine(model.directory, model.tensors, settings())
    inputs = prompts(5, 1, 60)
    for ids, found in zip(inputs, embed(engine, inputs), strict=True):
        states = model.reference.model(torch.tensor([ids])).last_hidden_state[0]
        assert near(found, unit(states[-1]))


def test_rotary_embeddings_that_depend_on_the_length_are_served_up_to_where_they_do(tmp_path: Path):
    config = {**read_config(make_model(tmp_path, "phi3").directory), "max_position_embeddings": 512}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config["rope_parameters"] = {**rope, "original_max_position_embeddings": 64}
    assert inspect_embedding(tmp_path, config).max_model_len == 64


@pytest.mark.parametrize("kind", ["Dense", "LSTM", "WordEmbeddings"])
def test_a_module_behind_the_model_that_is_unknown_is_refused_by_name(tmp_path: Path, kind: str):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, "mean_tokens")
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed.insert(2, {"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"sentence_transformers.models.{kind}"})
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UnsupportedArchitecture, match=kind):
        make_embedder(model)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("modules.json", "{"),
        ("modules.json", "{}"),
        ("modules.json", '[{"path": "1_Pooling"}]'),
        ("modules.json", '[{"type": "a.Pooling", "path": "../1_Pooling"}]'),
        ("1_Pooling/config.json", "{}"),
        ("1_Pooling/config.json", '{"pooling_mode": "magic"}'),
        ("1_Pooling/config.json", "[]"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, file: str, text: str):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, "mean_tokens")
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointCorrupt, match=file):
        make_embedder(model)


def test_prompts_that_are_left_out_of_the_mean_are_refused(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    add_sentence_transformers_files(tmp_path, "mean_tokens", include_prompt=False)
    assert make_embedder(model).info.prompts == {}
    write_json(tmp_path / "config_sentence_transformers.json", prompts={"query": "query: "})
    with pytest.raises(UnsupportedArchitecture, match="include_prompt"):
        make_embedder(model)


def test_prompts_are_read(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    prompts_of = {"query": "query: ", "document": ""}
    write_json(tmp_path / "config_sentence_transformers.json", prompts=prompts_of, default_prompt_name="query")
    info = make_embedder(model).info
    assert (info.prompts, info.default_prompt) == ({"query": "query: "}, "query")


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, False, True),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, False, True),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, False, False),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, False, False),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, False, False),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, True, True),
        ({"model_type": "mistral", "architectures": ["MistralModel"]}, False, True),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, False, False),
    ],
    ids=str,
)
def test_models_that_make_embeddings_are_told_from_those_that_generate_text(
    tmp_path: Path, config: dict[str, Any], files: bool, expected: bool
):
    if files:
        add_sentence_transformers_files(tmp_path, "lasttoken")
    assert makes_embeddings(tmp_path, config) is expected


# --- building --------------------------------------------------------------------------------------------------------


def test_old_names_of_norms_are_found(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.tensors.items()
    }
    assert old.keys() != model.tensors.keys()
    engine = build_embedding_engine(model.directory, old, settings())
    [vector] = embed(engine, [[1, 2, 3]])
    assert near(vector, unit(pooled(model.states([1, 2, 3]), "mean_tokens")))


def test_a_missing_tensor_is_named(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    del model.tensors["encoder.layer.1.output.dense.weight"]
    with pytest.raises(CheckpointCorrupt, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        make_embedder(model)


def test_weights_that_are_no_numbers_are_found_before_the_model_answers(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    model.tensors["encoder.layer.0.output.dense.weight"].fill_(torch.nan)
    with pytest.raises(UnsupportedArchitecture, match="nan"):
        make_embedder(model)


def test_a_model_that_differs_from_what_we_think_is_found_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sllmdask.engine import embedding

    model = make_encoder(tmp_path, "qwen2")
    make_embedder(model)
    monkeypatch.setattr(embedding, "_is_causal", lambda _module: False)
    with pytest.raises(UnsupportedArchitecture, match="packed inputs differ"):
        make_embedder(model)


def test_a_skeleton_serves_again_from_the_shelf_for_the_same_pooling_only(tmp_path: Path):
    model = make_encoder(tmp_path, "bert")
    shelf = SkeletonShelf()
    skeleton = build_embedding_skeleton(tmp_path)
    [before] = embed(build_embedding_engine(tmp_path, model.tensors, settings(), skeleton=skeleton), [[1, 2, 3]])
    shelf.put(skeleton)
    assert build_embedding_skeleton(tmp_path, "cls", shelf=shelf) is not skeleton
    assert build_embedding_skeleton(tmp_path, shelf=shelf) is skeleton
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())
    [again] = embed(build_embedding_engine(tmp_path, model.tensors, settings(), skeleton=skeleton), [[1, 2, 3]])
    assert torch.equal(before, again)


def test_building_leaves_torch_as_it_was(tmp_path: Path):
    model = make_encoder(tmp_path, "modernbert")

    def state() -> tuple[Any, ...]:
        return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state().tolist()

    before = state()
    embed(make_embedder(model), [[1, 2, 3]])
    assert state() == before


def test_an_engine_thread_runs_it_and_answers_everybody(tmp_path: Path):
    import asyncio

    from sllmdask.engine.engine import EngineThread, StepOutput

    model = make_encoder(tmp_path, "bert")
    inputs = prompts(20, 1, 60)

    async def run() -> dict[str, Any]:
        answers: dict[str, Any] = {}
        done = asyncio.Event()
        failures: list[SllmError] = []

        def on_outputs(outputs: list[StepOutput]) -> None:
            answers.update({output.request_id: output for output in outputs})
            if len(answers) == len(inputs):
                done.set()

        thread = EngineThread(make_embedder(model), asyncio.get_running_loop(), on_outputs, failures.append)
        for i, ids in enumerate(inputs):
            thread.submit(embedding_sequence(str(i), ids))
        await asyncio.wait_for(done.wait(), 30)
        thread.close()
        assert not failures
        return answers

    answers = asyncio.run(run())
    for i, ids in enumerate(inputs):
        vector = torch.frombuffer(bytearray(answers[str(i)].vector), dtype=torch.float32)
        assert near(vector, unit(pooled(model.states(ids), "mean_tokens")))
