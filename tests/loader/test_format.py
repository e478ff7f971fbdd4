from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllmdask.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound
from sllmdask.loader.format import execution_rank, read_config, read_index, read_info

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refusal(path):
    with pytest.raises(CheckpointCorrupt) as caught:
        read_index(path)
    return caught.value


def test_an_index_says_where_every_tensor_is(tmp_path, write_raw):
    file = write_raw(
        tmp_path / "model.safetensors", {"a": F32, "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]}}, bytes(9)
    )
    index = read_index(tmp_path)
    start = file.stat().st_size - 9
    assert [(t.name, t.dtype, t.shape, t.file, t.offset, t.nbytes) for t in index.tensors] == [
        ("a", "F32", (2,), "model.safetensors", start, 8),
        ("b", "I8", (), "model.safetensors", start + 8, 1),
    ]
    assert [(f.name, f.nbytes, f.data_offset) for f in index.files] == [("model.safetensors", start + 9, start)]
    assert (index.directory, index.nbytes) == (str(tmp_path), 9)
    assert read_index(file) == index


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "F6_E2M3"}, "dtype 'F6_E2M3' is not supported"),
        ({"dtype": 3}, "dtype 3 is not supported"),
        ({"dtype": ["F32"]}, "is not supported"),
        ({"shape": [3]}, "12 bytes, but its offsets span 8"),
        ({"shape": [-2]}, "not a list of at most 64 sizes"),
        ({"shape": [True, 2]}, "not a list of at most 64 sizes"),
        ({"shape": [2.0]}, "not a list of at most 64 sizes"),
        ({"shape": "2"}, "not a list of at most 64 sizes"),
        ({"shape": [1] * 65}, "not a list of at most 64 sizes"),
        ({"shape": [2**62, 2**62]}, "more elements than can be counted"),
        ({"shape": [0, 2**62, 2**62]}, "more elements than can be counted"),
        ({"data_offsets": [0, 16]}, "not inside the 8 bytes of data"),
        ({"data_offsets": [8, 0]}, "not inside the 8 bytes of data"),
        ({"data_offsets": [-8, 0]}, "not two offsets"),
        ({"data_offsets": [0]}, "not two offsets"),
        ({"data_offsets": None}, "not two offsets"),
        ({"strides": [1]}, "needs dtype, shape and data_offsets"),
        ({"dtype": "F4", "shape": [15]}, "do not fill whole bytes"),
        ({"dtype": "F4", "shape": [2, 8, 1]}, "rows do not fill whole bytes"),
    ],
)
def test_a_wrong_entry_is_refused_with_file_tensor_and_reason(tmp_path, write_raw, change, reason):
    file = write_raw(tmp_path / "model.safetensors", {"a": {**F32, **change}}, bytes(8))
    error = refusal(tmp_path)
    assert (error.file, error.tensor) == (str(file), "a")
    assert reason in error.reason


@pytest.mark.parametrize(
    ("header", "data", "tensor", "reason"),
    [
        ({"a": F32, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "b", "overlap"),
        ({"a": F32, "b": F32}, 8, "b", "overlap"),
        ({"a": F32, "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, 16, "b", "leave a hole"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "a", "leave a hole"),
        ({"a": F32}, 9, None, "its tensors end at"),
        ({}, 1, None, "its tensors end at"),
        ({"a": F32, "__metadata__": {"n": 1}}, 8, None, "__metadata__"),
        ({"a": F32, "__metadata__": [1]}, 8, None, "__metadata__"),
        ({"a": 1}, 8, "a", "needs dtype, shape and data_offsets"),
        ([1], 8, None, "does not begin with '{'"),
        (b'{"a": ', 0, None, "not valid JSON"),
        (b'{"a": 1, "a": 2}', 0, None, "'a' occurs twice"),
        (b'{"\xff": 1}', 0, None, "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, 0, None, "not valid JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", 0, None, "not valid JSON"),
        (b"", 0, None, "does not begin with '{'"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, write_raw, header, data, tensor, reason):
    write_raw(tmp_path / "model.safetensors", header, bytes(data))
    error = refusal(tmp_path)
    assert error.tensor == tensor
    assert reason in error.reason


def test_a_header_of_absurd_length_is_refused_without_reading_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    assert "above 100000000" in refusal(tmp_path).reason


def test_a_file_cut_anywhere_is_refused(tmp_path, write_single):
    file = write_single(tmp_path, {"w": torch.arange(40.0), "v": torch.ones(3, dtype=torch.int8)}) / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert refusal(tmp_path).file == str(file)
    file.write_bytes(whole + b"\0")
    assert "its tensors end at" in refusal(tmp_path).reason


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_flipped_header_byte_ends_in_a_named_error_wherever_safetensors_refuses(tmp_path, write_single, at, flip):
    directory = tmp_path / "checkpoint"
    file = directory / "model.safetensors"
    tensors = {"layers.0.w": torch.arange(12.0).reshape(3, 4), "layers.0.b": torch.zeros(3, dtype=torch.bfloat16)}
    write_single(directory, tensors)
    data = bytearray(file.read_bytes())
    data[at % (8 + int.from_bytes(data[:8], "little"))] ^= flip
    file.write_bytes(data)
    with contextlib.suppress(CheckpointCorrupt):
        index = read_index(directory)
        with safetensors.safe_open(file, "pt") as theirs:
            assert {t.name: t.shape for t in index.tensors} == {name: shape_of(theirs, name) for name in list(theirs.keys())}


def shape_of(opened, name):
    return tuple(opened.get_slice(name).get_shape())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "F4", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), json_values), data=st.binary(max_size=16))
def test_no_header_ends_in_an_unnamed_error(tmp_path, write_raw, header, data):
    write_raw(tmp_path / "model.safetensors", header, data)
    with contextlib.suppress(CheckpointError):
        assert read_index(tmp_path).nbytes == len(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.one_of(json_values, st.fixed_dictionaries({"weight_map": json_values})))
def test_no_shard_index_ends_in_an_unnamed_error(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        read_index(tmp_path)


@pytest.mark.parametrize("shard", ["../evil", "/etc/evil", "a/../../evil", "./model", "a//b", "a\\..\\evil", "evil\0"])
def test_a_shard_outside_the_directory_is_refused(tmp_path, write_raw, shard):
    write_raw(tmp_path / "evil.safetensors", {"a": F32}, bytes(8))
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": f"{shard}.safetensors"}}))
    error = refusal(directory)
    assert (error.file, error.tensor) == (str(path), "a")
    assert "not a name inside the directory" in error.reason


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub(tmp_path, write_raw):
    blob = write_raw(tmp_path / "blob", {"a": F32}, bytes(8))
    directory = tmp_path / "snapshot"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(blob)
    assert [tensor.name for tensor in read_index(directory).tensors] == ["a"]


def test_a_pickled_shard_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    assert "not a safetensors file" in refusal(tmp_path).reason


def test_a_missing_shard_is_named(tmp_path, write_sharded):
    write_sharded(tmp_path, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    os.remove(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointNotFound, match=r"model-00002-of-00002\.safetensors cannot be read: No such file"):
        read_index(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path, write_sharded):
    write_sharded(tmp_path, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["c"] = index["weight_map"]["a"]
    path.write_text(json.dumps(index))
    error = refusal(tmp_path)
    assert (error.file, error.tensor) == (str(path), "c")


def test_the_index_decides_between_two_shards_with_one_name(tmp_path, write_sharded):
    write_sharded(tmp_path, [{"a": torch.zeros(2), "b": torch.ones(2)}, {"b": torch.zeros(3), "c": torch.ones(2)}])
    found = {tensor.name: (tensor.file[:11], tensor.shape) for tensor in read_index(tmp_path).tensors}
    assert found == {"a": ("model-00001", (2,)), "b": ("model-00002", (3,)), "c": ("model-00002", (2,))}


def test_a_name_in_two_shards_and_not_in_the_index_is_refused(tmp_path, write_sharded):
    write_sharded(tmp_path, [{"a": torch.zeros(2), "b": torch.ones(2)}, {"b": torch.zeros(3), "c": torch.ones(2)}])
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["b"]
    path.write_text(json.dumps(index))
    assert refusal(tmp_path).tensor == "b"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], r"neither model\.safetensors nor"),
        (["pytorch_model.bin"], "pickled .*runs code"),
        (["model-00001-of-00002.safetensors"], "says how shards belong together"),
    ],
)
def test_a_directory_without_weights_says_what_it_has(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFound, match=reason):
        read_index(tmp_path)


def test_what_is_not_there_or_not_a_checkpoint_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no such directory"):
        read_index(tmp_path / "nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointNotFound, match="neither a directory nor a safetensors file"):
        read_index(tmp_path / "weights.bin")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFound, match="is not a file"):
        read_index(tmp_path)


def test_info_needs_weights_and_a_config(tmp_path, write_single):
    write_single(tmp_path, {"w": torch.ones(3)})
    info = read_info("a/b", str(tmp_path))
    assert (info.source, info.path, info.nbytes, info.config) == ("a/b", str(tmp_path), 12, {"model_type": "test"})
    Path(tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointCorrupt, match="not a JSON object"):
        read_config(tmp_path)
    os.remove(tmp_path / "config.json")
    with pytest.raises(CheckpointNotFound, match=r"no config\.json"):
        read_info("a/b", str(tmp_path))


# --- adapters, fingerprints, odd texts --------------------------------------------------------------------------------


def test_an_adapter_is_a_checkpoint_of_its_own(tmp_path, write_raw):
    write_raw(tmp_path / "adapter_model.safetensors", {"base_model.model.q.lora_A.weight": F32}, bytes(8))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [tensor.name for tensor in read_index(tmp_path).tensors] == ["base_model.model.q.lora_A.weight"]


def test_a_fingerprint_changes_with_name_size_and_time_of_change_and_with_nothing_else(tmp_path, write_raw):
    file = write_raw(tmp_path / "model.safetensors", {"a": F32}, bytes(8))
    os.utime(file, ns=(0, 10**18))
    before = read_index(tmp_path).fingerprint
    assert bytes.fromhex(before)
    os.utime(file, ns=(5, 10**18))
    assert read_index(file).fingerprint == before
    os.utime(file, ns=(0, 10**18 + 1))
    later = read_index(tmp_path).fingerprint
    os.rename(file, tmp_path / "other.safetensors")
    renamed = read_index(tmp_path / "other.safetensors").fingerprint
    write_raw(file, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(16))
    os.utime(file, ns=(0, 10**18))
    assert len({before, later, renamed, read_index(tmp_path).fingerprint}) == 4


def test_half_a_surrogate_pair_is_no_text(tmp_path, write_raw):
    write_raw(tmp_path / "model.safetensors", {"\ud800": F32}, bytes(8))
    assert "not valid JSON" in refusal(tmp_path).reason
    os.remove(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "\ud800.safetensors"}}))
    error = refusal(tmp_path)
    assert (error.tensor, "is not a text" in error.reason) == ("a", True)


def test_a_shard_index_of_absurd_size_is_refused_without_reading_all_of_it(tmp_path):
    with open(tmp_path / "model.safetensors.index.json", "wb") as opened:
        opened.truncate(10**12)
    assert "larger than 100000000 bytes" in refusal(tmp_path).reason


# --- the order in which a model needs its tensors --------------------------------------------------------------------

#: Names of models of the hub, each list in the order in which a forward pass needs them.
MODELS = {
    "qwen2": [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.10.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
    "mixtral": [
        "model.embed_tokens.weight",
        "model.layers.9.block_sparse_moe.experts.2.w1.weight",
        "model.layers.9.block_sparse_moe.experts.10.w1.weight",
        "model.layers.11.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
    "gpt2": ["wpe.weight", "wte.weight", "h.0.ln_1.weight", "h.3.attn.c_attn.weight", "h.11.ln_1.bias", "ln_f.bias"],
    "gpt_neox": [
        "gpt_neox.embed_in.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.15.mlp.dense_h_to_4h.bias",
        "gpt_neox.final_layer_norm.weight",
        "embed_out.weight",
    ],
    "opt": [
        "model.decoder.embed_positions.weight",
        "model.decoder.project_in.weight",
        "model.decoder.layers.0.fc1.weight",
        "model.decoder.layers.12.fc1.weight",
        "model.decoder.final_layer_norm.weight",
        "model.decoder.project_out.weight",
    ],
    "bloom": [
        "word_embeddings.weight",
        "word_embeddings_layernorm.weight",
        "h.0.input_layernorm.weight",
        "h.20.input_layernorm.weight",
        "ln_f.weight",
    ],
    "bert": [
        "bert.embeddings.LayerNorm.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.11.output.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.weight",
        "bert.pooler.dense.weight",
    ],
    "llava": [
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "language_model.model.embed_tokens.weight",
        "vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
    "lora": [
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.10.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
    ],
}


@pytest.mark.parametrize("model", MODELS)
def test_tensors_sort_into_the_order_in_which_a_model_needs_them(model):
    assert sorted(sorted(MODELS[model]), key=execution_rank) == MODELS[model]


@settings(max_examples=300, deadline=None)
@given(names=st.lists(st.text() | st.text("0123456789.²٣abc"), max_size=6))
def test_any_names_can_be_ordered_and_no_two_are_equal(names):
    names = list(dict.fromkeys(names))
    assert sorted(sorted(names, key=execution_rank), reverse=True) == sorted(names, reverse=True)
    # 07 and 7 are one number, but 1-place texts differ.
    ranks = {execution_rank(name) for name in names if "0" not in name}
    assert len(ranks) == len([name for name in names if "0" not in name])


def test_a_name_of_a_million_digits_costs_nothing():
    assert execution_rank("layers." + "9" * 1_000_000 + ".w") > execution_rank("layers.9.w")
