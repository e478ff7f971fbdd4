from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllmdask.errors import (
    Cancelled,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    DiskFull,
    TensorUnsupported,
)
from sllmdask.loader import libc, writer
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.convert import TensorSource, convert, files_beside, from_bytes, verify, write_checkpoint
from sllmdask.loader.fast_format import CHUNK
from sllmdask.loader.format import read_index
from sllmdask.loader.tiers import _DTYPES, sources_of
from tests.loader.tensors import assert_same, bits, files_of, octets

ALL_DTYPES = sorted(set(_DTYPES.values()), key=str)
COMPRESS = ["no", "yes", "both"]


def weights(n: int, seed: int = 0) -> torch.Tensor:
    """`n` numbers as a model has them, which compress."""
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) / 50).bfloat16()


@pytest.fixture
def source(tmp_path, write_sharded):
    """A model in two shards, larger than a chunk, with the files that the hub has."""
    shards = [
        {"model.layers.10.w": weights(CHUNK // 2 + 77), "model.layers.9.w": weights(999), "lm_head.weight": weights(50)},
        {"model.embed_tokens.weight": weights(CHUNK, 1), "model.layers.9.scale": torch.ones(()), "model.norm.weight": weights(7)},
    ]
    directory = write_sharded(tmp_path / "source", shards)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


# --- what is written is what was there -------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_converted_model_has_the_same_tensors_and_files(tmp_path, source, compress):
    written = convert(source, tmp_path / "target", compress)
    assert_same(read_checkpoint(tmp_path / "target"), tensors_of(source))
    assert (written.n_tensors, written.nbytes) == (6, read_index(source).nbytes)
    names = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*") if path.is_file()}
    beside = {"config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"}
    raw, packed = {"index.json", "data-00000.bin"}, {"index.split16.json", "data-00000.split16.bin"}
    assert names == beside | {"no": raw, "yes": packed, "both": raw | packed}[compress]
    for name in beside:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    for variant, nbytes in written.stored_nbytes.items():
        assert nbytes == sum(file.nbytes for file in read_index(tmp_path / "target", variant).files)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_every_variant_holds_the_same_and_the_compressed_is_smaller(tmp_path, source):
    written = convert(source, tmp_path / "both", "both")
    assert written.stored_nbytes["split16"] < 0.75 * written.stored_nbytes["raw"]
    (tmp_path / "both" / "index.json").unlink()
    assert read_index(tmp_path / "both").files[0].chunks[0].codec == "split16"
    assert_same(read_checkpoint(tmp_path / "both"), tensors_of(source))


@pytest.mark.parametrize("first", COMPRESS)
@pytest.mark.parametrize("second", COMPRESS)
def test_our_own_format_converts_to_itself(tmp_path, source, first, second):
    convert(source, tmp_path / "first", first)
    convert(tmp_path / "first", tmp_path / "second", second)
    convert(source, tmp_path / "direct", second)
    for path in (tmp_path / "direct").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "direct")).read_bytes()


def test_tensors_are_stored_in_the_order_in_which_a_model_needs_them(tmp_path, source):
    convert(source, tmp_path / "target")
    index = read_index(tmp_path / "target")
    assert [tensor.name for tensor in sorted(index.tensors, key=lambda tensor: tensor.offset)] == [
        "model.embed_tokens.weight",
        "model.layers.9.scale",
        "model.layers.9.w",
        "model.layers.10.w",
        "model.norm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("compress", ["no", "yes"])
def test_every_dtype_and_shape_survives(tmp_path, compress):
    shapes = [(), (0,), (1,), (7,), (3, 5, 2), (4, 0, 3), (1, 3000)]
    tensors = {f"{dtype} {shape}": bits(shape, dtype) for dtype in ALL_DTYPES for shape in shapes}
    # A packed pair of them is a row.
    del tensors["torch.float4_e2m1fn_x2 ()"]
    write_checkpoint(sources_of(tensors), tmp_path / "x", compress=compress)
    assert_same(read_checkpoint(tmp_path / "x"), tensors)


def test_partitions_are_cut_where_they_are_told_and_read_as_one(tmp_path):
    tensors = {f"layers.{i}.w": weights(CHUNK // 2 + i, seed=i) for i in range(5)} | {"large": weights(3 * CHUNK)}
    write_checkpoint(sources_of(tensors), tmp_path / "x", compress="both", partition_nbytes=2 * CHUNK + 4096)
    for variant in ("raw", "split16"):
        index = read_index(tmp_path / "x", variant)
        assert [sum(t.file == file.name for t in index.tensors) for file in index.files] == [2, 2, 1, 1]
        assert [file.name[:10] for file in index.files] == [f"data-0000{i}" for i in range(4)]
    assert_same(read_checkpoint(tmp_path / "x"), tensors)
    assert verify(tmp_path / "x").ok


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 700_000), max_size=8),
    compress=st.sampled_from(COMPRESS),
    partition_nbytes=st.sampled_from([CHUNK, CHUNK + 4096, 10**9]),
)
def test_any_sizes_in_any_partitions_survive(tmp_path, sizes, compress, partition_nbytes):
    data = os.urandom(0) if not sizes else bits((max(sizes),), torch.uint8).numpy().tobytes()
    tensors = {f"{i}.w": from_bytes("U8", (n,), data[:n]) for i, n in enumerate(sizes)}
    write_checkpoint(tensors, tmp_path / "x", compress=compress, partition_nbytes=partition_nbytes, overwrite=True, n_threads=3)
    loaded = read_checkpoint(tmp_path / "x")
    assert {name: octets(tensor) for name, tensor in loaded.items()} == {f"{i}.w": data[:n] for i, n in enumerate(sizes)}
    assert verify(tmp_path / "x").ok


def test_an_adapter_is_read_in_place_and_converted(tmp_path):
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{ab}.weight" for i in (0, 1) for ab in "AB"]
    adapter = {name: weights(64 * 8, i) for i, name in enumerate(names)}
    (tmp_path / "adapter").mkdir()
    safetensors.torch.save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    assert_same(read_checkpoint(tmp_path / "adapter"), adapter)
    convert(tmp_path / "adapter", tmp_path / "fast", "both")
    assert_same(read_checkpoint(tmp_path / "fast"), adapter)
    assert (tmp_path / "fast" / "adapter_config.json").read_text() == '{"r": 8}'


def test_one_file_of_tensors_is_converted_without_anything_beside_it(tmp_path, source):
    file = source / "model-00001-of-00002.safetensors"
    convert(file, tmp_path / "target")
    assert_same(read_checkpoint(tmp_path / "target"), safetensors.torch.load_file(file))
    assert sorted(os.listdir(tmp_path / "target")) == ["data-00000.bin", "index.json"]


# --- state dicts: aliases and strides ---------------------------------------------------------------------------------


def test_tied_tensors_are_written_once_and_share_memory_when_they_are_read(tmp_path):
    tied = weights(300_000).reshape(300, 1000)
    tensors = {
        "lm_head.weight": tied,
        "model.embed_tokens.weight": tied,
        "head_t": tied.T,
        "part": tied[:10],
        "bits": tied.view(torch.int16),
    }
    written = write_checkpoint(sources_of(tensors), tmp_path / "x")
    # All but the part of it are the same bytes.
    assert written.nbytes == tied.nbytes + tensors["part"].nbytes
    loaded = read_checkpoint(tmp_path / "x")
    assert_same(loaded, tensors)
    assert {loaded[name].data_ptr() for name in ("lm_head.weight", "head_t", "bits")} == {
        loaded["model.embed_tokens.weight"].data_ptr()
    }
    assert loaded["head_t"].stride() == (1, 1000)


def test_an_alias_may_be_needed_before_the_tensor_that_it_names(tmp_path):
    data = octets(weights(100))
    tensors = {
        "lm_head.weight": from_bytes("BF16", (100,), data),
        "embed.weight": from_bytes("BF16", (100,), b"", alias_of="lm_head.weight"),
        "layers.0.w": from_bytes("BF16", (100,), data),
    }
    write_checkpoint(tensors, tmp_path / "x")
    offsets = {tensor.name: tensor.offset for tensor in read_index(tmp_path / "x").tensors}
    assert offsets == {"lm_head.weight": 0, "embed.weight": 0, "layers.0.w": 256}


def test_a_permuted_tensor_keeps_its_strides_and_others_become_contiguous(tmp_path):
    base = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tensors = {
        "permuted": base.permute(2, 0, 3, 1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "sliced": base[:, 1:, ::2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "flipped": base.flip(1),
        "conjugate": torch.arange(3).to(torch.complex64).mul(1j).conj(),
        "parameter": torch.nn.Parameter(base[0, 0].T),
    }
    write_checkpoint(sources_of(tensors), tmp_path / "x")
    loaded = read_checkpoint(tmp_path / "x")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name
        kept = name in ("permuted", "channels_last", "parameter")
        assert loaded[name].stride() == (tensor.stride() if kept else tensor.detach().resolve_conj().contiguous().stride()), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(3, device="meta"), "on the meta device"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "its dtype is torch.qint8"),
        (lambda: [1, 2], "not a plain tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, make, reason):
    with pytest.raises(TensorUnsupported, match=reason) as caught:
        sources_of({"fine": torch.ones(2), "odd.weight": make()})
    assert caught.value.tensor == "odd.weight"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (from_bytes("F6", (2,), b""), "dtype 'F6' is not supported"),
        (from_bytes("F4", (3,), b""), "do not fill whole bytes"),
        (from_bytes("F32", (2, 2), bytes(16), stride=(1, 1)), "does not fill shape"),
        (from_bytes("F32", (2,), b"", alias_of="nowhere"), "cannot be an alias of 'nowhere'"),
        (from_bytes("F32", (2,), b"", alias_of="fine"), "cannot be an alias of 'fine'"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, tensor, reason):
    with pytest.raises(TensorUnsupported, match=reason) as caught:
        write_checkpoint({"fine": from_bytes("U8", (2,), b"ab"), "odd": tensor}, tmp_path / "x")
    assert caught.value.tensor == "odd"
    assert os.listdir(tmp_path) == []


# --- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "sharded", "file", "legacy", "adapter", "trainer"])
def test_pickled_weights_are_converted_with_a_warning_and_no_pickle_is_left(tmp_path, caplog, layout):
    tied = weights(64)
    tensors = {"model.embed_tokens.weight": tied, "lm_head.weight": tied, "layers.0.w": weights(9).reshape(3, 3).T}
    directory = tmp_path / "pickled"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "scheduler").write_bytes(b"\x80\x04K\x01.")
    path = directory
    if layout == "sharded":
        shards = {"pytorch_model-1.bin": ["layers.0.w"], "pytorch_model-2.bin": ["model.embed_tokens.weight", "lm_head.weight"]}
        for file, names in shards.items():
            torch.save({name: tensors[name] for name in names}, directory / file)
        weight_map = {name: file for file, names in shards.items() for name in names}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif layout == "file":
        path = directory / "consolidated.pth"
        torch.save(tensors, path)
    elif layout == "trainer":
        torch.save({"state_dict": tensors, "epoch": 3}, directory / "pytorch_model.bin")
    else:
        file = directory / ("adapter_model.bin" if layout == "adapter" else "pytorch_model.bin")
        torch.save(tensors, file, _use_new_zipfile_serialization=layout != "legacy")
    written = convert(path, tmp_path / "fast")
    assert_same(read_checkpoint(tmp_path / "fast"), tensors)
    assert written.nbytes == tied.nbytes + 18
    assert "is pickled" in caplog.text
    expected = {"index.json", "data-00000.bin"} | ({"config.json"} if path == directory else set())
    assert set(os.listdir(tmp_path / "fast")) == expected


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: torch.save({"w": Evil()}, file),
        lambda file: torch.save(torch.ones(3), file),
        lambda file: torch.save({"w": "text"}, file),
        lambda file: torch.save({}, file),
        lambda file: file.write_bytes(b"not a pickle"),
        lambda file: file.write_bytes(b""),
        lambda file: (torch.save({"w": torch.ones(3000)}, file), os.truncate(file, file.stat().st_size // 2)),
    ],
)
def test_a_pickle_that_is_not_weights_is_a_named_error_and_none_of_its_code_runs(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(CheckpointCorrupt) as caught:
        convert(tmp_path / "source", tmp_path / "fast")
    assert caught.value.file == str(tmp_path / "source" / "pytorch_model.bin")
    assert os.listdir(tmp_path) == ["source"]


# --- files beside -----------------------------------------------------------------------------------------------------


def test_weights_pickles_hidden_files_and_links_out_are_not_copied(tmp_path, caplog):
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    (source / "onnx").mkdir()
    wanted = ["config.json", "chat_template.jinja", "tokenizer.model", "modeling_x.py", "onnx/config.json"]
    unwanted = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "x.PT",
        "a.gguf",
        "onnx/m.onnx",
        ".git/c",
        ".x",
    ]
    for name in (*wanted, *unwanted, "index.json"):
        (source / name).write_text(name)
    (source / "state").write_bytes(b"\x80\x05.")
    (tmp_path / "secret").write_text("secret")
    (source / "inside.json").symlink_to("config.json")
    (source / "outside.json").symlink_to(tmp_path / "secret")
    (source / "dangling.json").symlink_to("nowhere")
    os.mkfifo(source / "pipe")
    assert sorted(files_beside(source)) == sorted([*wanted, "inside.json"])
    assert "outside.json is not copied" in caplog.text


def test_links_into_the_blobs_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file({"w": torch.ones(3)}, blobs / "1")
    (blobs / "2").write_text('{"a": 1}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    convert(snapshot, tmp_path / "fast")
    assert (tmp_path / "fast" / "config.json").read_text() == '{"a": 1}'
    assert not any(path.is_symlink() for path in (tmp_path / "fast").iterdir())


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "index.json", ""])
def test_a_file_beside_stays_inside_and_replaces_nothing(tmp_path, name):
    with pytest.raises(CheckpointCorrupt):
        write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / "x", files_beside={name: b"evil"})
    assert os.listdir(tmp_path) == []


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten_unless_told(tmp_path, source):
    convert(source, tmp_path / "x")
    before = (tmp_path / "x" / "index.json").read_bytes()
    with pytest.raises(CheckpointExists, match="something is there already"):
        convert(source, tmp_path / "x", "both")
    assert (tmp_path / "x" / "index.json").read_bytes() == before
    convert(source, tmp_path / "x", "yes", overwrite=True)
    assert sorted(os.listdir(tmp_path / "x"))[2:4] == ["data-00000.split16.bin", "index.split16.json"]
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_only_a_checkpoint_is_overwritten(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all of it")
    (tmp_path / "home" / "index.json").write_text('{"pages": []}')
    with pytest.raises(CheckpointExists, match="not a checkpoint"):
        convert(source, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "all of it"


@pytest.mark.parametrize("kind", ["safetensors", "fast", "pickled"])
@pytest.mark.parametrize(
    "name",
    ["runs/notes.txt", "thesis.tex", "optimizer.pt", "results.json", ".git/HEAD", "style.safetensors", "deep/model.safetensors"],
)
def test_a_checkpoint_with_files_that_are_no_part_of_it_is_not_overwritten(tmp_path, source, write_single, kind, name):
    target = tmp_path / "x"
    if kind == "safetensors":
        write_single(target, {"w": torch.ones(3)})
    elif kind == "fast":
        convert(source, target, "both")
    else:
        target.mkdir()
        torch.save({"w": torch.ones(3)}, target / "pytorch_model.bin")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    before = files_of(target)
    with pytest.raises(CheckpointExists, match=rf"'{name}'\. Move them away, or choose another directory"):
        convert(source, target, overwrite=True)
    assert files_of(target) == before
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_a_refusal_names_the_first_few_files_and_links_are_files(tmp_path, source):
    convert(source, tmp_path / "x")
    for name in "abcd":
        (tmp_path / "x" / name).symlink_to(tmp_path)
    with pytest.raises(CheckpointExists, match="'a', 'b', 'c' and others"):
        convert(source, tmp_path / "x", overwrite=True)


def test_what_belongs_to_a_checkpoint_is_replaced_with_it(tmp_path, source, write_sharded):
    target = write_sharded(tmp_path / "x", [{"old": torch.ones(3)}, {"other": torch.ones(3)}])
    shard, index = target / "model-00001-of-00002.safetensors", target / "model.safetensors.index.json"
    shard.rename(target / "first.safetensors")
    index.write_text(index.read_text().replace(shard.name, "first.safetensors"))
    for name in (
        "adapter_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_custom.py",
        "preprocessor_config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "README.md",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "additional_chat_templates/rag.jinja",
        ".cache/huggingface/download/config.json.metadata",
    ):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}")
    convert(source, target, "both", overwrite=True)
    convert(source, target, overwrite=True)
    convert(source, tmp_path / "y")
    assert files_of(target) == files_of(tmp_path / "y")


def test_files_of_any_name_that_are_written_again_are_not_in_the_way(tmp_path, source):
    (source / "figures").mkdir()
    (source / "figures" / "loss.svg").write_text("<svg/>")
    convert(source, tmp_path / "x")
    convert(source, tmp_path / "x", "yes", overwrite=True)
    convert(source, source, overwrite=True)
    for directory in (source, tmp_path / "x"):
        assert (directory / "figures" / "loss.svg").read_text() == "<svg/>"


def test_a_file_that_appears_while_a_checkpoint_is_written_is_not_lost(tmp_path, source):
    convert(source, tmp_path / "x")
    before = files_of(tmp_path / "x")
    with pytest.raises(CheckpointExists, match=r"'notes\.txt'"):
        convert(source, tmp_path / "x", "yes", lambda _: (tmp_path / "x" / "notes.txt").write_text("new"), overwrite=True)
    assert files_of(tmp_path / "x") == before | {"notes.txt": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_a_checkpoint_can_be_converted_in_place(tmp_path, source):
    expected = tensors_of(source)
    convert(source, source, "both", overwrite=True)
    assert_same(read_checkpoint(source), expected)
    assert not list(source.glob("*.safetensors"))


@pytest.mark.parametrize("flag", ["RENAME_NOREPLACE", "RENAME_EXCHANGE"])
def test_old_and_new_change_places_also_where_the_system_has_no_exchange(tmp_path, source, monkeypatch, flag):
    monkeypatch.setattr(libc, "renameat2", lambda *_: False)
    convert(source, tmp_path / "x")
    if flag == "RENAME_EXCHANGE":
        convert(source, tmp_path / "x", "both", overwrite=True)
        assert read_index(tmp_path / "x", "split16").tensors
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def failing(at: int) -> dict[str, TensorSource]:
    """Three chunks, of which the one with byte `at` cannot be read."""

    def read(offset, target):
        if offset <= at < offset + target.size:
            raise CheckpointCorrupt("somewhere", "w", "it is on fire")
        target[:] = 1

    return {"w": TensorSource("U8", (3 * CHUNK,), read)}


@pytest.mark.parametrize("chunk", range(3))
@pytest.mark.parametrize("compress", COMPRESS)
def test_a_source_that_fails_leaves_nothing_behind_and_what_was_there_untouched(tmp_path, n_fds, chunk, compress):
    write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / "old")
    before, fds = (tmp_path / "old" / "index.json").read_bytes(), n_fds()
    for target in ("old", "new"):
        with pytest.raises(CheckpointCorrupt, match="on fire"):
            write_checkpoint(failing(chunk * CHUNK), tmp_path / target, compress=compress, overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old" / "index.json").read_bytes() == before
    assert n_fds() == fds
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write")]


def test_a_thread_that_fails_stops_all_and_leaves_nothing(tmp_path, monkeypatch):
    encode, calls = writer.codec.encode_split16, []

    def breaking(data):
        calls.append(data.size)
        if len(calls) == 3:
            raise RuntimeError("a bug")
        return encode(data)

    monkeypatch.setattr(writer.codec, "encode_split16", breaking)
    data = octets(weights(20 * CHUNK // 2))
    with pytest.raises(RuntimeError, match="a bug"):
        write_checkpoint({"w": from_bytes("BF16", (20 * CHUNK // 2,), data)}, tmp_path / "x", compress="yes", n_threads=4)
    assert len(calls) < 12
    assert os.listdir(tmp_path) == []


def test_a_conversion_that_is_called_off_leaves_nothing(tmp_path, source):
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        convert(source, tmp_path / "x", "both", lambda done: cancel.set() if done else None, cancel, n_threads=1)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("compress", COMPRESS)
def test_progress_runs_from_nothing_to_all_bytes_and_never_back(tmp_path, source, compress):
    seen: list[int] = []
    written = convert(source, tmp_path / "x", compress, seen.append, n_threads=3)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == written.nbytes
    assert len(seen) == 1 + len(read_index(tmp_path / "x").files[0].chunks)


def test_a_source_that_became_shorter_is_named_with_its_tensor(tmp_path, source):
    file = source / "model-00002-of-00002.safetensors"

    def shorten(done):
        os.truncate(file, 5000)

    with pytest.raises(CheckpointCorrupt, match="truncated: it ends at byte 5000") as caught:
        convert(source, tmp_path / "x", on_progress=shorten)
    assert (caught.value.file, caught.value.tensor) == (str(file), "model.embed_tokens.weight")


def test_a_changed_chunk_of_the_source_is_found_while_converting(tmp_path, source):
    convert(source, tmp_path / "x", "yes")
    flip(tmp_path / "x" / "data-00000.split16.bin", 100)
    with pytest.raises(CheckpointCorrupt, match=r"bytes \[0, \d+\): their checksum is") as caught:
        convert(tmp_path / "x", tmp_path / "y")
    assert caught.value.tensor == "model.embed_tokens.weight"
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_full_disk_is_told_with_bytes_needed_and_free_and_leaves_nothing(tmp_path, source, compress):
    # A limit on the size of a file fails a write in the same place as a full disk does, and any user can set it.
    code = f"""
        import resource
        from sllmdask.errors import DiskFull
        from sllmdask.loader.convert import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            convert({str(source)!r}, {str(tmp_path / "x")!r}, {compress!r})
        except DiskFull as error:
            print(error.needed, error.free > 0, error)
    """
    ended = run(code)
    needed, free, message = ended.stdout.split(" ", 2)
    nbytes = sum(-(-tensor.nbytes // 256) * 256 for tensor in read_index(source).tensors)
    assert nbytes <= int(needed) / (2 if compress == "both" else 1) <= nbytes + 4096
    assert free == "True"
    assert "a file may not become so large here" in message and str(tmp_path / "x") in message
    assert os.listdir(tmp_path) == ["source"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_free_nbytes", lambda _: 1000)
    with pytest.raises(DiskFull) as caught:
        write_checkpoint(failing(0), tmp_path / "x")
    assert (caught.value.needed, caught.value.free) == (3 * CHUNK, 1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("free", "counted", "flags"), [(0, 0, 0), (0, 1000, os.ST_RDONLY)], ids=["nothing is counted", "read-only"]
)
def test_no_room_that_is_counted_is_no_full_disk(tmp_path, monkeypatch, free, counted, flags):
    real = os.statvfs(tmp_path)
    told = os.statvfs_result((*real[:2], counted, free, free, *real[5:8], flags, real[9]))
    monkeypatch.setattr(writer.os, "statvfs", lambda _: told)
    write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / "x")
    assert verify(tmp_path / "x").ok


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/proc/x", "No such file or directory ('/proc')"),
        ("/proc/x/y", "No such file or directory ('/proc/x')"),
        ("file/x", "Not a directory ('{root}/file')"),
        ("file/x/y", "Not a directory ('{root}/file/x')"),
        ("n" * 256, "File name too long"),
    ],
    ids=["proc", "below proc", "file", "below a file", "long"],
)
@pytest.mark.parametrize("compress", ["no", "yes"])
def test_a_place_that_cannot_be_written_is_told_with_the_systems_reason(tmp_path, target, reason, compress):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / target, compress=compress)
    assert not isinstance(caught.value, DiskFull | CheckpointExists)
    assert f"{str(tmp_path / target)!r} was not written: {reason.format(root=tmp_path)}" in caught.value.message
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_without_permission_is_told_as_such(tmp_path, source):
    (tmp_path / "locked").mkdir(mode=0o500)
    code = f"""
        import os
        from sllmdask.errors import CheckpointError, DiskFull
        from sllmdask.loader.convert import from_bytes, write_checkpoint
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            write_checkpoint({{"w": from_bytes("U8", (1,), b"a")}}, {str(tmp_path / "locked" / "x")!r})
        except CheckpointError as error:
            print(type(error).__name__, error)
    """
    told = run(code).stdout
    assert told.startswith("CheckpointError ") and "Permission denied" in told and "Choose a directory" in told


SLOW = """
    import sys, threading
    from sllmdask.loader.convert import TensorSource, write_checkpoint
    from sllmdask.loader.fast_format import CHUNK

    def read(offset, target):
        if offset == 2 * CHUNK:
            print("half", flush=True)
            sys.stdin.readline()
        target[:] = 1

    write_checkpoint({{"w": TensorSource("U8", (4 * CHUNK,), read)}}, {target!r}, compress={compress!r})
"""


@pytest.fixture
def half_written(tmp_path):
    """``half_written(compress)``: a process that has written half a checkpoint ``x``, and waits for a line."""
    started = []

    def start(compress: str) -> subprocess.Popen[str]:
        code = textwrap.dedent(SLOW.format(target=str(tmp_path / "x"), compress=compress))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("compress", ["no", "both"])
def test_a_killed_writer_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path, half_written, compress):
    process = half_written(compress)
    assert not (tmp_path / "x").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x").exists()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    with pytest.raises(CheckpointNotFound):
        read_index(tmp_path / "x")
    write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_a_writer_that_lives_is_left_alone_and_the_first_to_finish_wins(tmp_path, half_written):
    process = half_written("no")
    before = {name for name in os.listdir(tmp_path) if name.startswith(".x.")}
    write_checkpoint({"w": from_bytes("U8", (1,), b"a")}, tmp_path / "x")
    assert before < set(os.listdir(tmp_path))
    stderr = process.communicate("go on\n")[1]
    assert process.returncode == 1 and "CheckpointExists: Nothing was written" in stderr
    assert read_index(tmp_path / "x").tensors[0].nbytes == 1
    assert os.listdir(tmp_path) == ["x"]


def test_a_name_with_the_letters_of_a_pattern_cleans_up_only_its_own(tmp_path):
    tensors = {"w": from_bytes("U8", (1,), b"a")}
    for name in (".a.0badf00d.lock", ".[ab].0badf00d.lock"):
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".partial").mkdir()
    write_checkpoint(tensors, tmp_path / "[ab]")
    assert sorted(os.listdir(tmp_path)) == [".a.0badf00d.lock", ".a.0badf00d.partial", "[ab]"]
    with open(tmp_path / ".a.0badf00d.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_checkpoint(tensors, tmp_path / "a")
        assert (tmp_path / ".a.0badf00d.partial").exists()
    write_checkpoint(tensors, tmp_path / "a", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["[ab]", "a"]


def test_a_file_system_without_direct_writes_and_without_allocation_serves_as_well(tmp_path, source, monkeypatch):
    def refuse_direct(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return open_(path, flags, *mode)

    def refuse(fd, offset, nbytes):
        raise OSError(95, "Operation not supported")

    open_ = os.open
    monkeypatch.setattr(writer.os, "open", refuse_direct)
    monkeypatch.setattr(writer.libc, "allocate", refuse)
    convert(source, tmp_path / "x", "both")
    monkeypatch.undo()
    assert verify(tmp_path / "x").ok
    assert_same(read_checkpoint(tmp_path / "x"), tensors_of(source))


def test_a_conversion_holds_some_chunks_and_never_the_model(tmp_path):
    n = 40 * CHUNK

    def read(offset, target):
        target[:] = offset // CHUNK

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    write_checkpoint({"w": TensorSource("U8", (n,), read)}, tmp_path / "x", n_threads=2, compress="both")
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What is mapped shows in the process, what the codec makes in the trace.
    assert held < 8 * CHUNK
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 20 * CHUNK


# --- verify -----------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))


@pytest.fixture
def layers(tmp_path):
    """Six layers of a chunk each, in two partitions, in both variants."""
    tensors = {f"layers.{i}.w": weights(CHUNK // 2, seed=i) for i in range(6)}
    write_checkpoint(sources_of(tensors), tmp_path / "x", compress="both", partition_nbytes=3 * CHUNK)
    return tmp_path / "x"


def test_a_sound_checkpoint_has_no_problems_and_every_byte_was_read(layers):
    seen: list[int] = []
    report = verify(layers, seen.append)
    stored = sum(chunk.stored for v in ("raw", "split16") for file in read_index(layers, v).files for chunk in file.chunks)
    assert (report.ok, report.problems, report.n_tensors, report.variants) == (True, (), 6, ("raw", "split16"))
    assert report.nbytes == stored == seen[-1] and seen == sorted(seen)


def test_every_bad_chunk_is_told_with_its_tensors(layers):
    flip(layers / "data-00000.bin", CHUNK + 5)
    flip(layers / "data-00001.bin", 0)
    index = read_index(layers, "split16")
    flip(layers / "data-00001.split16.bin", index.files[1].chunks[2].offset)
    problems = {(Path(problem.file).name, problem.tensors) for problem in verify(layers).problems}
    assert problems == {
        ("data-00000.bin", ("layers.1.w",)),
        ("data-00001.bin", ("layers.3.w",)),
        ("data-00001.split16.bin", ("layers.5.w",)),
    }


def test_a_truncated_and_a_missing_partition_do_not_hide_each_other(layers):
    os.truncate(layers / "data-00000.bin", CHUNK + 1)
    os.remove(layers / "data-00001.split16.bin")
    flip(layers / "data-00001.bin", 2 * CHUNK)
    found = [(Path(problem.file).name, problem.tensors) for problem in verify(layers).problems]
    assert sorted(found) == [
        ("data-00000.bin", ()),
        ("data-00000.bin", ("layers.1.w",)),
        ("data-00000.bin", ("layers.2.w",)),
        ("data-00001.bin", ("layers.5.w",)),
        ("data-00001.split16.bin", ("layers.3.w", "layers.4.w", "layers.5.w")),
    ]


def test_each_chunk_behind_the_end_of_a_truncated_file_is_told_where_that_is(layers):
    os.truncate(layers / "data-00000.bin", CHUNK + 5)
    truncated = [problem.reason for problem in verify(layers).problems if problem.tensors]
    assert len(truncated) == 2
    for number, reason in zip((1, 2), truncated, strict=True):
        assert f"it ends at byte {CHUNK + 5}, before {(number + 1) * CHUNK}" in reason


def test_a_damaged_index_does_not_hide_the_other_variant(layers):
    flip(layers / "index.json", 500)
    flip(layers / "data-00000.split16.bin", 9)
    problems = verify(layers).problems
    assert [(Path(problem.file).name, problem.tensors) for problem in problems] == [
        ("index.json", ()),
        ("data-00000.split16.bin", ("layers.0.w",)),
    ]
    assert "changed after it was written" in problems[0].reason


def test_variants_that_do_not_hold_the_same_are_told(tmp_path, layers):
    others = {f"layers.{i}.w": weights(CHUNK // 2, seed=i + (i == 4)) for i in range(6)}
    write_checkpoint(sources_of(others), tmp_path / "y", compress="yes", partition_nbytes=3 * CHUNK)
    for file in (tmp_path / "y").iterdir():
        file.rename(layers / file.name)
    [problem] = verify(layers).problems
    assert (Path(problem.file).name, problem.tensors) == ("data-00001.split16.bin", ("layers.4.w",))
    assert "others than those of the raw variant" in problem.reason


def test_safetensors_shards_are_looked_at_one_by_one(source):
    assert verify(source).ok
    os.truncate(source / "model-00001-of-00002.safetensors", 500)
    os.remove(source / "model-00002-of-00002.safetensors")
    report = verify(source)
    assert [(Path(problem.file).name, len(problem.tensors)) for problem in report.problems] == [
        ("model-00001-of-00002.safetensors", 3),
        ("model-00002-of-00002.safetensors", 3),
    ]
    assert "are not inside the 220 bytes" in report.problems[0].reason and "No such file" in report.problems[1].reason


def test_a_wrong_shard_index_is_a_problem_and_nothing_at_all_is_an_error(tmp_path, source):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    [problem] = verify(source).problems
    assert problem.tensors == ("ghost",)
    (source / "model.safetensors.index.json").write_text("[")
    assert "not valid JSON" in verify(source).problems[0].reason
    with pytest.raises(CheckpointNotFound):
        verify(tmp_path / "nowhere")


def test_a_verification_can_be_called_off(layers):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        verify(layers, cancel=cancel)
