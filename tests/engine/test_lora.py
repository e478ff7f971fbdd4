"""Requests with LoRA adapters get the tokens of models into which the adapters were merged, whatever runs beside them."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.engine import linears
from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import LLMEngine, StepOutput, build_engine
from sllmdask.engine.lora import read_adapter
from sllmdask.errors import AdapterUnsupported, CheckpointNotFound, DeterminismUnavailable, InvalidRequest
from tests.engine.adapters import TARGETS, Adapter, make_adapter, write_adapter
from tests.engine.models import (
    TinyModel,
    assert_all_free,
    drain,
    make_engine,
    make_model,
    prompts,
    request,
    settings,
    until_packed,
    write_json,
)

N_TOKENS = 12


def take(engine: LLMEngine, name: str, adapter: Adapter) -> bytes:
    found = engine.read_adapter(name, adapter.directory, adapter.tensors)
    engine.add_adapter(found)
    return found.salt


def ask(engine: LLMEngine, name: str, prompt: list[int], salt: bytes = b"", **params: Any) -> None:
    sequence = request(name, prompt, N_TOKENS, **params)
    sequence.salt = salt
    engine.add(sequence)


@pytest.mark.parametrize("family", TARGETS)
def test_a_mixed_batch_of_the_base_and_two_adapters_has_the_tokens_of_merged_models(tmp_path: Path, family: str):
    model = make_model(tmp_path / "base", family)
    adapters = [make_adapter(tmp_path / str(seed), model, TARGETS[family], rank=3 + seed, seed=seed) for seed in (1, 2)]
    engine = make_engine(model, max_batch_tokens=48)
    salts = [b"", *(take(engine, str(i), adapter) for i, adapter in enumerate(adapters))]
    models = [model, *(adapter.merged_into(model) for adapter in adapters)]
    asked = prompts(9, 1, 60)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        ask(engine, str(i), prompt, salts[i % 3])
        if i % 2:
            outputs += engine.step()
    expected = {str(i): models[i % 3].generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    assert drain(engine, outputs) == expected
    assert any(models[0].generate(prompt, N_TOKENS) != expected[str(i)] for i, prompt in enumerate(asked) if i % 3 == 1)
    assert any(models[0].generate(prompt, N_TOKENS) != expected[str(i)] for i, prompt in enumerate(asked) if i % 3 == 2)
    assert_all_free(engine)


def test_a_preempted_request_goes_on_with_its_adapter(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    engine = make_engine(model, n_blocks=20, block_size=8, max_batch_tokens=48)
    salt = take(engine, "a", adapter)
    merged = adapter.merged_into(model)
    asked = prompts(8, 20, 60)
    for i, prompt in enumerate(asked):
        ask(engine, str(i), prompt, salt if i % 2 else b"")
    assert drain(engine) == {str(i): (merged if i % 2 else model).generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    assert engine.stats().n_preemptions > 0


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
        {"alpha_pattern": {"v_proj": 1, "layers.2.self_attn.q_proj": 32}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
    ],
    ids=str,
)
def test_scaling_and_patterns_of_ranks_are_kept(tmp_path: Path, config: dict[str, Any]):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"], **config)
    engine = make_engine(model)
    salt = take(engine, "a", adapter)
    [prompt] = prompts(1, 30, 40)
    ask(engine, "x", prompt, salt)
    assert drain(engine)["x"] == adapter.merged_into(model).generate(prompt, N_TOKENS)


def test_an_adapter_of_the_head_changes_the_rows_that_are_sampled(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, ("lm_head", "q_proj"))
    engine = make_engine(model, max_batch_tokens=20)
    salt = take(engine, "a", adapter)
    merged = adapter.merged_into(model)
    asked = prompts(6, 5, 50)
    for i, prompt in enumerate(asked):
        ask(engine, str(i), prompt, salt if i % 2 else b"")
    assert drain(engine) == {str(i): (merged if i % 2 else model).generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}


def test_names_of_the_base_model_alone_are_found(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    [prompt] = prompts(1, 20, 30)
    expected = adapter.merged_into(model).generate(prompt, N_TOKENS)
    short = {name.removeprefix("base_model.model.").removeprefix("model."): tensor for name, tensor in adapter.tensors.items()}
    config = json.loads((adapter.directory / "adapter_config.json").read_text())
    engine = make_engine(model)
    ask(engine, "x", prompt, take(engine, "a", write_adapter(tmp_path / "short", short, **config)))
    assert drain(engine)["x"] == expected


def test_an_adapter_that_left_changes_nothing_any_more_and_lets_go_of_its_tensors(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    engine = make_engine(model)
    tensors = adapter.tensors
    found = engine.read_adapter("a", adapter.directory, tensors)
    salt = found.salt
    engine.add_adapter(found)
    alive = [weakref.ref(tensor) for tensor in tensors.values()]
    [prompt] = prompts(1, 20, 30)
    ask(engine, "with", prompt, salt)
    engine.step()
    engine.remove_adapter(salt)
    del tensors, found
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert not engine.has_work
    assert not any(module._forward_hooks for module in engine._runner.model.modules())
    with pytest.raises(InvalidRequest, match="adapter"):
        ask(engine, "late", prompt, salt)
    ask(engine, "without", prompt)
    assert drain(engine)["without"] == model.generate(prompt, N_TOKENS)
    assert_all_free(engine)


def test_closing_the_engine_takes_the_hooks_off_a_model_that_is_used_again(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    skeleton = build_skeleton(model.directory)
    engine = build_engine(model.directory, model.tensors, settings(), skeleton=skeleton)
    take(engine, "a", adapter)
    assert any(module._forward_hooks for module in skeleton.model.modules())
    engine.close()
    assert not any(module._forward_hooks for module in skeleton.model.modules())


def test_a_layer_that_is_exchanged_for_another_module_keeps_its_adapter(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    engine = make_engine(model)
    salt = take(engine, "a", adapter)

    class Packed(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.inner = inner.in_features, inner.out_features, [inner]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.inner[0].weight)

    for layer in engine._runner.model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    [prompt] = prompts(1, 20, 30)
    ask(engine, "x", prompt, salt)
    assert drain(engine)["x"] == adapter.merged_into(model).generate(prompt, N_TOKENS)


@pytest.mark.parametrize("mode", ["never", "auto", "always"])
def test_layers_that_run_over_packed_weights_keep_their_adapters(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linears, "LEAST_NUMEL", {torch.float32: 0})
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, (*TARGETS["llama"], "lm_head"))
    engine = make_engine(model, pack_weights=mode, pack_after=2)
    salt = take(engine, "a", adapter)
    merged = adapter.merged_into(model)
    asked = prompts(6, 5, 50)
    for round_ in range(3):
        if mode == "auto" and round_ == 2:
            until_packed(engine)
        for i, prompt in enumerate(asked):
            ask(engine, f"{round_} {i}", prompt, salt if i % 2 else b"")
        found = drain(engine)
        for i, prompt in enumerate(asked):
            assert found[f"{round_} {i}"] == (merged if i % 2 else model).generate(prompt, N_TOKENS)
    assert (engine.stats().packed_nbytes > 0) == (mode != "never")


def test_requests_with_different_adapters_share_no_prefix_and_those_with_one_do(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    engine = make_engine(model)
    salt = take(engine, "a", adapter)
    [prompt] = prompts(1, 60, 60)
    expected = {b"": model.generate(prompt, N_TOKENS), salt: adapter.merged_into(model).generate(prompt, N_TOKENS)}
    for number, (which, shared) in enumerate([(b"", False), (salt, False), (b"", True), (salt, True)]):
        before = engine.stats().n_reused_tokens
        ask(engine, str(number), prompt, which)
        assert drain(engine)[str(number)] == expected[which]
        assert (engine.stats().n_reused_tokens > before) == shared


def test_log_probabilities_of_a_prompt_come_from_a_head_with_its_adapter(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, ("lm_head", "q_proj"))
    engine = make_engine(model, max_batch_tokens=24)
    salt = take(engine, "a", adapter)
    merged = adapter.merged_into(model)
    asked = prompts(4, 20, 40)
    for i, prompt in enumerate(asked):
        ask(engine, str(i), prompt, salt if i % 2 else b"", prompt_logprobs=0)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    found = {output.request_id: output.prompt_logprobs for output in outputs if output.prompt_logprobs}
    for i, prompt in enumerate(asked):
        logits = (merged if i % 2 else model).reference(torch.tensor([prompt])).logits[0].detach().log_softmax(-1)
        right = [float(logits[at, token]) for at, token in enumerate(prompt[1:])]
        assert [each.logprob for each in found[str(i)] or ()] == pytest.approx(right, abs=1e-4)


def test_the_attention_of_a_mixture_of_experts_can_have_an_adapter_and_its_experts_cannot(tmp_path: Path):
    model = make_model(tmp_path / "base", "qwen3_moe")
    adapter = make_adapter(tmp_path / "a", model, ("q_proj", "v_proj"))
    engine = make_engine(model)
    salt = take(engine, "a", adapter)
    asked = prompts(4, 5, 50)
    for i, prompt in enumerate(asked):
        ask(engine, str(i), prompt, salt if i % 2 else b"")
    merged = adapter.merged_into(model)
    assert drain(engine) == {str(i): (merged if i % 2 else model).generate(prompt, N_TOKENS) for i, prompt in enumerate(asked)}
    path = "model.layers.0.mlp.experts.3.gate_proj"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 64), f"{path}.lora_B.weight": torch.ones(48, 4)}
    assert path in refusal(model, write_adapter(tmp_path / "b", tensors))


def test_a_batch_with_an_adapter_goes_without_recorded_graphs(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    engine = make_engine(model)
    salt = take(engine, "a", adapter)
    tried: list[int] = []

    class Graphs:
        def run(self, ids: list[int], *_: Any) -> None:
            tried.append(len(ids))

        def close(self) -> None:
            pass

    engine._runner.graphs = Graphs()
    [prompt] = prompts(1, 20, 20)
    ask(engine, "with", prompt, salt)
    ask(engine, "without", prompt)
    drain(engine)
    assert tried == []
    ask(engine, "without", prompt)
    drain(engine)
    assert tried == [1] * len(tried) and len(tried) >= N_TOKENS - 1


def test_a_moved_request_needs_its_adapter_at_the_other_end(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, TARGETS["llama"])
    [prompt] = prompts(1, 40, 40)
    source, without, target = (make_engine(model) for _ in range(3))
    salt = take(source, "a", adapter)
    ask(source, "x", prompt, salt)
    outputs = [*source.step(), *source.step()]
    manifest = source.export_open("x", 1)
    without.import_open(manifest)
    target.import_open(manifest)
    last = source.export_freeze("x", 1)
    with pytest.raises(InvalidRequest, match="adapter"):
        without.import_commit("x", 1, last["state"], last["kv"])
    without.import_abort("x", 1)
    assert_all_free(without)
    assert take(target, "a", adapter) == salt
    assert target.import_commit("x", 1, last["state"], last["kv"])
    assert source.export_commit("x", 1)
    assert drain(target, outputs)["x"] == adapter.merged_into(model).generate(prompt, N_TOKENS)


def test_adapters_have_salts_of_their_own_and_the_same_ones_everywhere(tmp_path: Path):
    model = make_model(tmp_path / "base")
    one, other = (make_adapter(tmp_path / str(seed), model, ("q_proj",), seed=seed) for seed in (1, 2))
    first, second = make_engine(model), make_engine(model)
    salts = {take(first, "a", one), take(first, "a", other), take(first, "b", one), b""}
    assert len(salts) == 4
    assert take(second, "a", one) in salts
    louder = write_adapter(
        tmp_path / "louder", {k.removeprefix("base_model.model."): v for k, v in one.tensors.items()}, lora_alpha=9
    )
    assert take(second, "a", louder) not in salts


def test_on_the_cpu_matrices_are_the_given_tensors_not_copies(tmp_path: Path):
    model = make_model(tmp_path / "base")
    tensors = make_adapter(tmp_path / "a", model, ("q_proj",)).tensors
    adapter = read_adapter("a", tmp_path / "a", tensors, model.reference, torch.float32, torch.device("cpu"))
    given = {tensor.data_ptr() for tensor in tensors.values()}
    assert {part.data_ptr() for pair in adapter.pairs.values() for part in (pair.a, pair.b)} == given
    assert adapter.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert adapter.rank == 4


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(model: TinyModel, adapter: Adapter) -> str:
    engine = make_engine(model)
    with pytest.raises(AdapterUnsupported) as caught:
        take(engine, "polite", adapter)
    assert caught.value.adapter == "polite"
    assert not any(module._forward_hooks for module in engine._runner.model.modules())
    return caught.value.message


def test_an_engine_that_promises_bits_takes_no_adapters(tmp_path: Path):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, ("q_proj",))
    try:
        engine = make_engine(model, deterministic=True)
    except DeterminismUnavailable as error:
        pytest.skip(error.message)
    with pytest.raises(AdapterUnsupported, match=r"engine\.deterministic"):
        take(engine, "a", adapter)
    with pytest.raises(AdapterUnsupported, match=r"engine\.deterministic"):
        engine.add_adapter(make_engine(model).read_adapter("a", adapter.directory, adapter.tensors))


def test_a_model_with_an_attention_of_its_own_takes_no_adapters(tmp_path: Path):
    model = make_model(tmp_path / "base", "gptj")
    assert "attention of its own" in refusal(model, make_adapter(tmp_path / "a", model, ("q_proj",)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases of the base"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "convert it"),
        ({"init_lora_weights": "olora"}, "convert it"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 5}, "rank 5"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str):
    model = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", model, ("q_proj",))
    write_json(tmp_path / "a" / "adapter_config.json", **config)
    assert words in refusal(model, adapter)


def test_an_adapter_for_another_model_is_refused_with_the_layer_and_both_shapes(tmp_path: Path):
    model = make_model(tmp_path / "base")
    wider = make_adapter(tmp_path / "wide", make_model(tmp_path / "wider", hidden_size=128), ("q_proj",))
    message = refusal(model, wider)
    assert "model.layers.0.self_attn.q_proj" in message
    assert "[4, 128]" in message and "takes 64" in message
    other = make_adapter(tmp_path / "other", make_model(tmp_path / "gpt2", "gpt2"), ("c_attn",))
    assert "transformer.h.0.attn.c_attn" in refusal(model, other)
    deeper = make_adapter(tmp_path / "deep", make_model(tmp_path / "deeper", num_hidden_layers=5), ("q_proj",))
    assert "model.layers.3.self_attn.q_proj" in refusal(model, deeper)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "lora_magnitude_vector"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.norm.lora_A.weight", "lora_A alone"),
    ],
)
def test_tensors_that_are_no_pair_for_a_linear_layer_are_refused(tmp_path: Path, name: str, words: str):
    model = make_model(tmp_path / "base")
    assert words in refusal(model, write_adapter(tmp_path / "a", {name: torch.ones(4, 64)}))


def test_a_norm_cannot_have_an_adapter(tmp_path: Path):
    model = make_model(tmp_path / "base")
    tensors = {"model.norm.lora_A.weight": torch.ones(4, 64), "model.norm.lora_B.weight": torch.ones(64, 4)}
    assert "LlamaRMSNorm; only linear layers" in refusal(model, write_adapter(tmp_path / "a", tensors))


def test_a_directory_that_holds_no_adapter_is_told(tmp_path: Path):
    model = make_model(tmp_path / "base")
    with pytest.raises(CheckpointNotFound, match=r"adapter_config\.json"):
        make_engine(model).read_adapter("a", tmp_path / "base", model.tensors)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterUnsupported, match="JSON"):
        make_engine(model).read_adapter("a", tmp_path, {})
