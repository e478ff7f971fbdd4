"""The loader on its own: what it loads is what transformers loads, bit by bit; what it saves can be loaded."""

from __future__ import annotations

import copy
import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sllmdask
from sllmdask import load_model, load_state_dict, save_model
from sllmdask.errors import (
    CheckpointCorrupt,
    CheckpointExists,
    CheckpointNotFound,
    ConfigError,
    SllmError,
    TensorUnsupported,
    UnsupportedArchitecture,
)
from sllmdask.loader.convert import convert
from tests.engine.models import CONFIGS, VOCAB, make_model, write_json

_SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_EXPERTS = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": None}

#: Architectures that the engine does not run.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", _SMALL),
    "bert-classes": ("BertForSequenceClassification", {**_SMALL, "num_labels": 3}),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}),
    "mixtral": ("MixtralForCausalLM", {**_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", {**_SMALL, "image_size": 32, "patch_size": 8, "vocab_size": None}),
}


def make_other(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    architecture, given = OTHERS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    config = model_class.config_class(
        **{key: value for key, value in given.items() if value is not None or key == "pad_token_id"}
    )
    model = model_class._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
    model.save_pretrained(directory)
    return directory


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32, dtype=model.dtype).view(1, 3, 32, 32)}
    ids = torch.arange(12).view(1, 12) * 7 % VOCAB
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


@torch.inference_mode()
def assert_same(model: Any, expected: Any) -> None:
    assert type(model) is type(expected)
    assert not model.training
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and found[name].device == tensor.device, name
            assert found[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(found[name], tensor), name
    assert model.dtype == expected.dtype
    # Where it came from is all that may differ.
    assert {**model.config.to_dict(), "_name_or_path": ""} == {**expected.config.to_dict(), "_name_or_path": ""}
    if expected.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    given = inputs_of(expected)
    # Over copies: how memory is aligned decides on the last bit of a product.
    assert torch.equal(copy.deepcopy(model)(**given).logits, copy.deepcopy(expected)(**given).logits)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("fast", [False, True], ids=["safetensors", "fast"])
def test_a_model_is_the_one_that_transformers_loads(tmp_path: Path, name: str, fast: bool):
    source = make_model(tmp_path / "source", name, torch.bfloat16).directory
    if fast:
        convert(source, tmp_path / "fast")
    assert_same(
        load_model(tmp_path / "fast" if fast else source), transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    )


@pytest.mark.parametrize("dtype", ["auto", torch.float32, "bfloat16"])
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_so_are_models_that_the_engine_does_not_run(tmp_path: Path, name: str, dtype: Any):
    source = make_other(tmp_path / "source", name)
    expected = getattr(transformers, OTHERS[name][0]).from_pretrained(source, dtype=dtype)
    assert_same(load_model(source, dtype=dtype), expected)
    convert(source, tmp_path / "fast", compress="both")
    assert_same(load_model(tmp_path / "fast", dtype=dtype), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "bert", "t5"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, name: str):
    source = make_model(tmp_path / "a", name).directory if name in CONFIGS else make_other(tmp_path / "a", name)
    model = load_model(source)
    save_model(model, tmp_path / "saved", compress="yes")
    again = load_model(tmp_path / "saved")
    assert_same(again, model)


class _WithConfig(torch.nn.Linear):
    """A module of torch, with what it says of itself."""

    def __init__(self, **given: Any) -> None:
        super().__init__(3, 2)
        vars(self).update(given)


@pytest.mark.parametrize(
    ("given", "beside"),
    [
        ({}, set()),
        ({"config": {"n_layers": 2}, "generation_config": None}, set()),
        ({"config": transformers.LlamaConfig()}, {"config.json"}),
        (
            {"config": transformers.LlamaConfig(), "generation_config": transformers.GenerationConfig(max_length=7)},
            {"config.json", "generation_config.json"},
        ),
    ],
    ids=["none", "another program's", "config", "both"],
)
def test_any_module_is_saved_with_what_configuration_of_transformers_it_has(
    tmp_path: Path, given: dict[str, Any], beside: set[str]
):
    model = _WithConfig(**given)
    save_model(model, tmp_path / "saved")
    loaded = load_state_dict(tmp_path / "saved")
    assert loaded.keys() == {"weight", "bias"}
    assert torch.equal(loaded["weight"], model.weight) and torch.equal(loaded["bias"], model.bias)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == beside | {"index.json", "data-00000.bin"}
    if "config.json" in beside:
        config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
        assert {**config.to_dict(), "_name_or_path": ""} == given["config"].to_dict()
    if "generation_config.json" in beside:
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").max_length == 7


def test_tensors_by_name_are_saved(tmp_path: Path):
    tied = torch.arange(6.0).view(2, 3)
    tensors = {"a": tied, "b": tied, "c": torch.arange(3), "d": torch.nn.Parameter(torch.ones(2).bfloat16())}
    save_model(tensors, tmp_path / "saved", compress="both")
    loaded = load_state_dict(tmp_path / "saved")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


@pytest.mark.parametrize("what", [None, "model", [torch.ones(1)], torch.ones(1), torch.nn.Linear, {1: torch.ones(1)}], ids=repr)
def test_what_is_no_model_and_no_tensors_by_name_is_refused(tmp_path: Path, what: Any):
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module, or a mapping of names") as refused:
        save_model(what, tmp_path / "saved")
    assert refused.value.param == "model"
    assert not (tmp_path / "saved").exists()


def test_a_value_that_is_no_tensor_is_named(tmp_path: Path):
    with pytest.raises(TensorUnsupported) as refused:
        save_model({"weight": torch.ones(1), "epoch": 3}, tmp_path / "saved")
    assert refused.value.tensor == "epoch"
    assert not (tmp_path / "saved").exists()


def test_a_saved_model_is_served_by_the_engine(tmp_path: Path):
    from tests.engine.models import drain, make_engine, request

    model = make_model(tmp_path / "source", "qwen2")
    save_model(model.reference, tmp_path / "saved")
    served = type(model)(tmp_path / "saved", load_state_dict(tmp_path / "saved"), model.reference)
    engine = make_engine(served)
    engine.add(request("a", [1, 2, 3], 8))
    assert drain(engine) == {"a": model.generate([1, 2, 3], 8)}


def test_tied_weights_are_one_parameter_and_one_memory(tmp_path: Path):
    source = make_model(tmp_path / "source", "qwen2").directory
    model = load_model(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_model(model, tmp_path / "saved")
    stored = load_state_dict(tmp_path / "saved")
    assert stored["lm_head.weight"].data_ptr() == stored["model.embed_tokens.weight"].data_ptr()


def test_a_loaded_model_can_be_trained_and_the_file_stays_as_it_is(tmp_path: Path):
    source = make_model(tmp_path / "source").directory
    before = (source / "model.safetensors").read_bytes()
    model, other = load_model(source), load_model(source)
    ids = torch.arange(8)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert_same(other, transformers.AutoModelForCausalLM.from_pretrained(source))
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("wanted", ["LlamaModel", transformers.AutoModel, "AutoModel"])
def test_another_class_may_be_asked_for(tmp_path: Path, wanted: Any):
    source = make_model(tmp_path / "source").directory
    model = load_model(source, model_class=wanted)
    expected = transformers.LlamaModel.from_pretrained(source)
    assert type(model) is transformers.LlamaModel
    assert all(torch.equal(found, tensor) for found, tensor in zip(model.parameters(), expected.parameters(), strict=True))


def test_accelerate_spreads_a_model_over_the_devices_that_are_there(tmp_path: Path):
    source = make_model(tmp_path / "source").directory
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        assert_same(load_model(source, device_map=device_map), expected)


def test_attention_of_another_implementation_may_be_asked_for(tmp_path: Path):
    source = make_model(tmp_path / "source").directory
    assert load_model(source, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_script_that_was_written_for_serverlessllm_runs(tmp_path: Path):
    model = make_model(tmp_path / "source", dtype=torch.bfloat16)
    save_model(model.reference, str(tmp_path / "models" / "facebook" / "llama"))
    loaded = load_model(
        "facebook/llama",
        device_map="auto",
        torch_dtype=torch.float32,
        storage_path=str(tmp_path / "models"),
        fully_parallel=True,
        hf_model_class="AutoModelForCausalLM",
    )
    assert_same(loaded, transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32))


@pytest.mark.parametrize("fast", [False, True], ids=["safetensors", "fast"])
def test_a_state_dict_is_what_the_files_hold(tmp_path: Path, fast: bool):
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)
    path = source.directory
    if fast:
        path = tmp_path / "fast"
        convert(source.directory, path, compress="yes")
    progress: list[tuple[int, int]] = []
    loaded = load_state_dict(path, n_readers=2, progress=lambda done, total: progress.append((done, total)))
    assert loaded.keys() == source.tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.tensors.items())
    total = progress[0][1]
    assert progress[0] == (0, total) and progress[-1] == (total, total)
    assert total >= sum(tensor.nbytes for tensor in source.tensors.values())
    assert progress == sorted(progress)


def test_a_state_dict_is_converted_where_it_is_floating_point(tmp_path: Path):
    tensors = {"weight": torch.arange(5.0).bfloat16(), "index": torch.arange(3), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_state_dict(tmp_path / "model.safetensors", dtype=torch.float32)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        "weight": torch.float32,
        "index": torch.int64,
        "none": torch.float32,
    }
    assert torch.equal(loaded["weight"], torch.arange(5.0))
    assert loaded["none"].shape == (0, 4)


def test_the_memory_of_a_tensor_goes_back_when_it_goes_although_others_stay(tmp_path: Path):
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size = 16 * 1024**2
    save_file({name: torch.ones(size, dtype=torch.uint8) for name in "abc"}, tmp_path / "model.safetensors")
    loaded = load_state_dict(tmp_path)
    full = resident()
    del loaded["b"]
    assert resident() < full - size * 0.9
    assert loaded["a"].all() and loaded["c"].all()


def test_a_conversion_never_needs_twice_the_models_memory(tmp_path: Path):
    def peak() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    n = 32
    save_file({f"layers.{i}.weight": torch.ones(1024, 1024) for i in range(n)}, tmp_path / "model.safetensors")
    # Nothing that was freed is to serve again, and the peak is to be that of what follows.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    loaded = load_state_dict(tmp_path, dtype=torch.bfloat16)
    nbytes = sum(tensor.nbytes for tensor in loaded.values())
    assert nbytes == n * 2 * 1024**2
    # The file has four bytes where the result has two: it would be three times the result, if nothing went back before the end.
    assert peak() - before < 2.6 * nbytes


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path):
    source = make_model(tmp_path).directory
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorrupt) as refused:
        load_model(source)
    assert refused.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_a_tensor_of_another_shape_is_named(tmp_path: Path):
    source = make_model(tmp_path).directory
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointCorrupt, match=r"model.norm.weight.*\[3\].*\[64\]"):
        load_model(source)


@pytest.mark.parametrize("load", [load_model, load_state_dict], ids=lambda load: load.__name__)
def test_a_file_that_is_damaged_is_named_unless_it_was_not_to_be_verified(tmp_path: Path, load: Any):
    source = make_model(tmp_path / "source").directory
    convert(source, tmp_path / "fast")
    largest = max((path for path in (tmp_path / "fast").iterdir()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointCorrupt) as refused:
        load(tmp_path / "fast")
    assert refused.value.tensor is not None and largest.name in refused.value.file
    load(tmp_path / "fast", verify=False)


def test_a_truncated_file_is_damaged(tmp_path: Path):
    source = make_model(tmp_path).directory
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for load in (load_model, load_state_dict):
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
            load(source)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedArchitecture),
        ({"model_type": "no such type"}, UnsupportedArchitecture),
        ({"architectures": ["NoSuchModel"]}, UnsupportedArchitecture),
        ({"hidden_act": "no such activation"}, UnsupportedArchitecture),
        ({"num_hidden_layers": 4}, CheckpointCorrupt),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], error: type[SllmError]):
    source = make_model(tmp_path).directory
    write_json(source / "config.json", **changes)
    with pytest.raises(error):
        load_model(source)


def test_what_is_not_there_is_not_found(tmp_path: Path):
    for load in (load_model, load_state_dict):
        with pytest.raises(CheckpointNotFound):
            load(tmp_path / "nowhere")
    source = make_model(tmp_path / "source").directory
    (source / "config.json").unlink()
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):
        load_model(source)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"device": "no-such-device"}, "device"),
        ({"device": "cuda"}, "device"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map"),
        ({"model_class": "NoSuchModel"}, "model_class"),
        ({"dtype": "float13"}, "dtype"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
        ({"device": torch.device("cuda"), "device_map": {"": "cpu"}}, "device_map"),
    ],
    ids=str,
)
def test_an_argument_that_means_nothing_is_named(
    tmp_path: Path, given: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refused:
        load_model(make_model(tmp_path).directory, **given)
    assert refused.value.param == param


def test_a_checkpoint_is_replaced_only_if_that_is_asked_for(tmp_path: Path):
    first, second = (make_model(tmp_path / str(seed), seed=seed).reference for seed in (0, 1))
    save_model(first, tmp_path / "saved")
    with pytest.raises(CheckpointExists):
        save_model(second, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved").lm_head.weight, first.lm_head.weight)
    save_model(second, tmp_path / "saved", overwrite=True)
    assert torch.equal(load_model(tmp_path / "saved").lm_head.weight, second.lm_head.weight)
    with pytest.raises(ConfigError, match="compress"):
        save_model(second, tmp_path / "saved", compress="a lot")


def test_the_package_loads_torch_only_when_the_loader_is_asked_for():
    assert {"load_model", "load_state_dict", "save_model"} <= set(sllmdask.__all__)
    code = "import sys, sllmdask; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
