"""Building an engine: zero copy, names, dtypes, damaged checkpoints, what is refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.engine.construct import SkeletonShelf, build_skeleton
from sllmdask.engine.engine import build_engine
from sllmdask.engine.families import inspect_config, read_config
from sllmdask.engine.warm import warm_up
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, ConfigError, UnsupportedArchitecture
from tests.engine.models import CONFIGS, VOCAB, TinyModel, drain, make_engine, make_model, prompts, request, settings, write_json

FOUR = ["llama", "qwen2", "opt", "gpt2"]


@pytest.fixture
def llama(tmp_path: Path) -> TinyModel:
    return make_model(tmp_path)


def answers_match(model: TinyModel, **changes: Any) -> bool:
    [prompt] = prompts(1, 20, 30)
    engine = make_engine(model, **changes)
    engine.add(request("a", prompt, 12))
    return drain(engine)["a"] == model.generate(prompt, 12)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_parameters_are_the_given_tensors_not_copies(tmp_path: Path, name: str, dtype: torch.dtype):
    model = make_model(tmp_path, name, dtype)
    engine = make_engine(model)
    given = {tensor.data_ptr() for tensor in model.tensors.values()}
    parameters = list(engine._runner.model.parameters())
    assert {parameter.data_ptr() for parameter in parameters} == given
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in parameters)
    assert engine._runner.dtype == dtype


def test_float16_is_served_as_bfloat16_or_float32_on_the_cpu(tmp_path: Path):
    model = make_model(tmp_path, dtype=torch.float16)
    engine = make_engine(model)
    assert engine._runner.dtype in (torch.bfloat16, torch.float32)
    engine.add(request("a", [1, 2, 3], 5))
    assert len(drain(engine)["a"]) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_that_the_operator_asks_for_is_served(llama: TinyModel, dtype: str):
    engine = make_engine(llama, dtype=dtype)
    assert engine._runner.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in engine._runner.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_padding_token_in_the_config_changes_nothing(tmp_path: Path, name: str):
    assert answers_match(make_model(tmp_path, name, pad_token_id=7))


def test_a_few_tensors_of_another_dtype_are_converted(tmp_path: Path):
    model = make_model(tmp_path, dtype=torch.bfloat16)
    model.tensors["model.norm.weight"] = model.tensors["model.norm.weight"].float()
    engine = make_engine(model)
    assert {parameter.dtype for parameter in engine._runner.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model."), ("qwen2", "model.")]
)
def test_names_with_and_without_the_prefix_of_the_base_model_are_found(tmp_path: Path, name: str, prefix: str):
    model = make_model(tmp_path, name)
    short = {key.removeprefix(prefix): tensor for key, tensor in model.tensors.items()}
    assert short.keys() != model.tensors.keys()
    assert answers_match(replace(model, tensors=short))


def test_a_tied_head_may_be_in_the_file_as_well_or_alone(tmp_path: Path):
    model = make_model(tmp_path, "qwen2")
    embedding = model.tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in model.tensors
    assert answers_match(replace(model, tensors={**model.tensors, "lm_head.weight": embedding.clone()}))
    alone = {name: tensor for name, tensor in model.tensors.items() if name != "model.embed_tokens.weight"}
    assert answers_match(replace(model, tensors={**alone, "lm_head.weight": embedding}))


def test_an_untied_head_is_a_parameter_of_its_own(llama: TinyModel):
    assert "lm_head.weight" in llama.tensors
    assert answers_match(llama)


def test_old_names_and_left_over_buffers_do_no_harm(tmp_path: Path):
    model = make_model(tmp_path, "gpt_neox")
    renamed = {{"lm_head.weight": "embed_out.weight"}.get(name, name): tensor for name, tensor in model.tensors.items()}
    left_over = {
        "gpt_neox.layers.0.attention.bias": torch.ones(4, 4),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    assert answers_match(replace(model, tensors={**renamed, **left_over}))


@pytest.mark.parametrize("name", FOUR)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str):
    model = make_model(tmp_path, name)
    gone = sorted(key for key in model.tensors if ".1." in key)[0]
    del model.tensors[gone]
    with pytest.raises(CheckpointCorrupt) as refused:
        make_engine(model)
    assert refused.value.tensor == gone


def test_a_tensor_of_another_shape_is_named(llama: TinyModel):
    llama.tensors["model.norm.weight"] = torch.ones(3)
    with pytest.raises(CheckpointCorrupt, match=r"model.norm.weight.*\[3\].*\[64\]"):
        make_engine(llama)


def test_a_directory_without_config_json_is_no_checkpoint(llama: TinyModel):
    (llama.directory / "config.json").unlink()
    with pytest.raises(CheckpointNotFound):
        make_engine(llama)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_json_that_is_none_is_damaged(llama: TinyModel, text: str):
    (llama.directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
        make_engine(llama)


def test_no_tensors_at_all_is_a_damaged_checkpoint(llama: TinyModel):
    with pytest.raises(CheckpointCorrupt):
        make_engine(replace(llama, tensors={}))


def test_8_bit_weights_are_refused(llama: TinyModel):
    with pytest.raises(CheckpointCorrupt, match="float8"):
        make_engine(replace(llama, tensors={name: tensor.to(torch.float8_e4m3fn) for name, tensor in llama.tensors.items()}))


def test_a_kv_memory_that_holds_no_block_is_a_wrong_setting(llama: TinyModel):
    with pytest.raises(ConfigError, match="kv_memory"):
        make_engine(llama, kv_memory=1000)


def test_a_gpu_that_is_not_there_is_a_wrong_setting(llama: TinyModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="cuda"):
        make_engine(llama, device="cuda")


def test_building_an_engine_leaves_torch_as_it_was(llama: TinyModel):
    def state() -> tuple[Any, ...]:
        return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_rng_state().tolist()

    before = state()
    engine = make_engine(llama)
    engine.add(request("a", [1, 2, 3], 3, temperature=1.0))
    drain(engine)
    assert state() == before


def test_a_model_that_differs_from_what_we_think_is_found_before_it_answers(llama: TinyModel, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    from sllmdask.engine import attention

    make_engine(llama, attention="sdpa")
    original = attention.dot_product_attention
    monkeypatch.setattr(
        attention, "dot_product_attention", lambda q, k, v, options, mask: original(q, k, v, replace(options, scaling=1.0), mask)
    )
    with pytest.raises(UnsupportedArchitecture, match="layer 0"):
        make_engine(llama, attention="sdpa")
    monkeypatch.undo()
    monkeypatch.setattr(LlamaAttention, "forward", lambda _, hidden_states, **__: (hidden_states, None))
    with pytest.raises(UnsupportedArchitecture, match="0 of its 3 layers"):
        make_engine(llama)


# --- skeletons -------------------------------------------------------------------------------------------------------


def test_a_skeleton_serves_one_engine_after_another_with_other_weights(tmp_path: Path):
    first, second = (make_model(tmp_path / str(seed), "gemma3", seed=seed) for seed in (0, 1))
    skeleton = build_skeleton(first.directory)
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())
    for model in (first, second, first):
        engine = build_engine(model.directory, model.tensors, settings(), skeleton=skeleton)
        assert engine._runner.model is skeleton.model
        assert engine.build_times.construct_s == 0
        engine.add(request("a", [1, 2, 3], 8))
        assert drain(engine) == {"a": model.generate([1, 2, 3], 8)}
        engine.close()
        assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())


@pytest.mark.parametrize("wrong", ["shape", "missing", "kv_memory"])
def test_a_skeleton_that_could_not_be_used_lets_go_of_the_tensors(llama: TinyModel, wrong: str):
    skeleton = build_skeleton(llama.directory)
    tensors = dict(llama.tensors)
    if wrong == "shape":
        tensors["model.norm.weight"] = torch.ones(3)
    elif wrong == "missing":
        del tensors["model.norm.weight"]
    with pytest.raises((CheckpointCorrupt, ConfigError)):
        build_engine(llama.directory, tensors, settings(kv_memory=1000 if wrong == "kv_memory" else 2**20), skeleton=skeleton)
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())
    engine = build_engine(llama.directory, llama.tensors, settings(), skeleton=skeleton)
    engine.add(request("a", [1, 2, 3], 4))
    assert drain(engine) == {"a": llama.generate([1, 2, 3], 4)}


def test_the_shelf_gives_out_what_was_put_there_for_the_same_configuration_only(tmp_path: Path):
    shelf = SkeletonShelf(capacity=2)
    llama, qwen, opt = (make_model(tmp_path / name, name) for name in ("llama", "qwen2", "opt"))
    skeleton = shelf.take(llama.directory)
    assert shelf.take(llama.directory) is not skeleton
    shelf.put(skeleton)
    assert shelf.take(qwen.directory) is not skeleton
    assert shelf.take(llama.directory) is skeleton
    shelf.put(skeleton)
    write_json(llama.directory / "config.json", rope_theta=77.0)
    assert shelf.take(llama.directory) is not skeleton
    write_json(llama.directory / "config.json", rope_theta=None)
    others = [shelf.take(model.directory) for model in (qwen, opt)]
    for other in others:
        shelf.put(other)
    assert shelf.take(llama.directory) is not skeleton, "three were kept"
    assert [shelf.take(model.directory) for model in (qwen, opt)] == others


def test_what_is_put_on_the_shelf_holds_no_weights(llama: TinyModel):
    shelf = SkeletonShelf()
    skeleton = shelf.take(llama.directory)
    build_engine(llama.directory, llama.tensors, settings(), skeleton=skeleton)
    shelf.put(skeleton)
    assert all(tensor.is_meta for tensor in skeleton.model.state_dict().values())


@pytest.mark.parametrize(
    ("name", "kinds"), [("llama", [0]), ("gpt2", [0]), ("opt", [0]), ("gemma2", [0, 1]), ("gemma3", [0, 5]), ("smollm3", [0, 3])]
)
def test_only_layers_that_differ_are_looked_through(tmp_path: Path, name: str, kinds: list[int]):
    model = make_model(tmp_path, name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 8})
    skeleton = build_skeleton(model.directory)
    assert skeleton.kinds == kinds
    assert len(skeleton.layers) == 8
    assert answers_match(model)


def test_the_check_touches_no_weights_behind_the_attention_that_it_looks_at(llama: TinyModel):
    for name in llama.tensors:
        if not name.startswith(("model.embed_tokens", "model.layers.0.self_attn", "model.layers.0.input_layernorm")):
            llama.tensors[name].fill_(torch.nan)
    make_engine(llama)
    llama.tensors["model.layers.0.self_attn.v_proj.weight"].fill_(torch.nan)
    with pytest.raises(UnsupportedArchitecture, match="layer 0"):
        make_engine(llama)


def test_the_check_leaves_out_layers_of_a_kind_that_it_has_seen(tmp_path: Path):
    model = make_model(tmp_path, "gemma3", num_hidden_layers=8)
    for name in model.tensors:
        if name.startswith(tuple(f"model.layers.{layer}." for layer in (1, 2, 3, 4, 6, 7))):
            model.tensors[name].fill_(torch.nan)
    make_engine(model)
    model.tensors["model.layers.5.self_attn.v_proj.weight"].fill_(torch.nan)
    with pytest.raises(UnsupportedArchitecture, match="layer 5"):
        make_engine(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_weight_that_is_in_the_file_twice_as_one_memory_is_converted_once(tmp_path: Path, dtype: str):
    model = make_model(tmp_path, "qwen2")
    tensors = {**model.tensors, "lm_head.weight": model.tensors["model.embed_tokens.weight"].view(VOCAB, -1)}
    engine = make_engine(replace(model, tensors=tensors), dtype=dtype)
    found = engine._runner.model
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_heads_that_a_file_says_are_tied_but_differ_stay_two(tmp_path: Path):
    model = make_model(tmp_path, "qwen2")
    other = torch.randn(model.tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
    engine = make_engine(replace(model, tensors={**model.tensors, "lm_head.weight": other}))
    assert torch.equal(engine._runner.model.lm_head.weight, other)
    with torch.no_grad():
        model.reference.lm_head.weight = torch.nn.Parameter(other)
    engine.add(request("a", [1, 2, 3], 8))
    assert drain(engine) == {"a": model.generate([1, 2, 3], 8)}


def test_the_times_of_building_are_told(llama: TinyModel):
    times = make_engine(llama).build_times
    assert times.construct_s > 0 and times.assign_s > 0 and times.check_s is not None and times.check_s > 0


def test_warming_up_leaves_torch_as_it_was_and_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    warm_up("cpu", architectures=(("OPTForCausalLM", "opt"), ("LlamaForCausalLM", "llama")))
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not list(tmp_path.iterdir())


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_config_json_says_is_read(tmp_path_factory: pytest.TempPathFactory, name: str):
    model = make_model(tmp_path_factory.mktemp(name), name)
    info = inspect_config(read_config(model.directory))
    assert info.architecture == CONFIGS[name][0]
    assert info.model_type == model.reference.config.model_type
    assert (info.max_model_len, info.vocab_size, info.dtype) == (512, 300, "float32")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "recurrent state"),
        ({"architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "only text"),
        ({"architectures": ["MyModel"]}, "not a causal language model"),
        ({"architectures": ["MyForCausalLM"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["MyForCausalLM"], "vision_config": {"depth": 2}}, "images"),
        ({"model_type": "llama"}, "architectures"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_by_name_and_with_the_reason(config: dict[str, Any], reason: str):
    with pytest.raises(UnsupportedArchitecture, match=reason) as refused:
        inspect_config(config)
    assert refused.value.architecture == (config.get("architectures") or [config.get("model_type")])[0]


def test_a_config_that_says_nothing_else_has_the_defaults_of_its_class():
    info = inspect_config({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "eos_token_id": [1, 2]})
    assert (info.max_model_len, info.dtype, info.eos_token_ids) == (1024, None, {1, 2})


def test_a_config_that_transformers_refuses_is_refused(llama: TinyModel):
    write_json(llama.directory / "config.json", hidden_act="no such activation")
    with pytest.raises(UnsupportedArchitecture, match="transformers refuses"):
        make_engine(llama)


def test_families_are_known_without_torch():
    import subprocess
    import sys

    code = "import sys, sllmdask.engine.families; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True).lower()) is False
