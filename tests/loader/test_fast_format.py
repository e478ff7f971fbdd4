"""Our own format against its page, ``docs/format.md``: the page's bytes are what is written and what is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from itertools import product
from operator import mul
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sllmdask
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, CheckpointTooNew
from sllmdask.loader import kernels
from sllmdask.loader.buffers import address_of
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.convert import TensorSource, from_bytes, write_checkpoint
from sllmdask.loader.fast_format import CHUNK, MAX_CHUNK, MAX_INDEX, VERSION, is_dense, place
from sllmdask.loader.format import read_index, variants
from tests.loader.xxh64 import xxh64_by_the_book

PAGE = (Path(sllmdask.__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")


def page_index() -> bytes:
    return re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1].encode()


def page_data() -> bytes:
    data = bytearray(4096)
    for line in re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1].splitlines():
        at, *octets = line.split()
        data[int(at, 16) : int(at, 16) + 16] = bytes.fromhex("".join(octets))
    return bytes(data)


def page_tensors() -> dict[str, TensorSource]:
    return {
        "lm_head.weight": from_bytes("BF16", (2, 4), b"", alias_of="model.embed_tokens.weight"),
        "model.embed_tokens.weight": from_bytes("BF16", (2, 4), bytes.fromhex("803f 0040 4040 8040 a040 c040 e040 0041")),
        "model.layers.0.mlp.weight": from_bytes("F32", (2, 3), struct.pack("<6f", 1, 4, 2, 5, 3, 6), stride=(1, 2)),
        "model.layers.0.scale": from_bytes("I64", (), struct.pack("<q", -2)),
        "unused": from_bytes("F16", (0, 4), b""),
    }


@pytest.fixture
def page(tmp_path):
    """The page's example, written by hand."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.json").write_bytes(page_index())
    (tmp_path / "page" / "data-00000.bin").write_bytes(page_data())
    return tmp_path / "page"


def test_what_is_written_is_what_the_page_shows_byte_for_byte(tmp_path):
    write_checkpoint(page_tensors(), tmp_path / "x", creator="sllmdask 0.1.0", info={"source": "example"})
    assert (tmp_path / "x" / "index.json").read_bytes() == page_index()
    assert (tmp_path / "x" / "data-00000.bin").read_bytes() == page_data()
    assert sorted(os.listdir(tmp_path / "x")) == ["data-00000.bin", "index.json"]
    assert os.listdir(tmp_path) == ["x"]


def test_the_bytes_of_the_page_are_read_as_the_tensors_that_it_names(page, assert_equal):
    embedding = torch.arange(1, 9).reshape(2, 4).bfloat16()
    tensors = read_checkpoint(page)
    assert tensors["model.layers.0.mlp.weight"].stride() == (1, 2)
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    tensors["model.layers.0.mlp.weight"] = tensors["model.layers.0.mlp.weight"].contiguous()
    assert_equal(
        tensors,
        {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding,
            "model.layers.0.mlp.weight": torch.arange(1.0, 7.0).reshape(2, 3),
            "model.layers.0.scale": torch.tensor(-2),
            "unused": torch.empty(0, 4, dtype=torch.float16),
        },
    )


def test_the_index_of_the_page_says_where_its_tensors_and_chunks_are(page):
    index = read_index(page)
    assert (index.format, index.directory, index.nbytes) == ("fast", str(page), 4096)
    assert index.fingerprint == hashlib.sha256(page_index().split(b"\n", 1)[1]).hexdigest()
    places = {t.name.rpartition(".")[0] or t.name: (t.offset, t.nbytes, t.stride) for t in index.tensors}
    assert places == {
        "model.embed_tokens": (0, 16, None),
        "lm_head": (0, 16, None),
        "model.layers.0.mlp": (256, 24, (1, 2)),
        "model.layers.0": (512, 8, None),
        "unused": (0, 0, None),
    }
    [file] = index.files
    [chunk] = file.chunks
    assert (file.name, file.nbytes, file.logical_nbytes) == ("data-00000.bin", 4096, 4096)
    assert (chunk.position, chunk.nbytes, chunk.offset, chunk.stored, chunk.codec) == (0, 4096, 0, 4096, "raw")
    assert chunk.checksum == xxh64_by_the_book(page_data())


def test_the_checksum_is_xxh64():
    # Values of the reference implementation's own test: 0 bytes; and ours of both kinds of end.
    assert xxh64_by_the_book(b"") == 0xEF46DB3751D8E999
    data = torch.randint(0, 256, (4096 + 24,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for n in (0, 8, 32, 56, 4096, 4120):
        assert kernels.xxh64(address_of(data), n) == xxh64_by_the_book(data[:n].tobytes())


# --- what is refused -------------------------------------------------------------------------------------------------


def signed(data: dict[str, object]) -> bytes:
    """An index with a right first line, whatever else it says."""
    rest = (json.dumps({key: value for key, value in data.items() if key not in ("magic", "sha256")}) + "\n").encode()[1:]
    return f'{{"magic":"sllmdask-checkpoint","sha256":"{hashlib.sha256(rest).hexdigest()}",\n'.encode() + rest


def refusal(page: Path, change) -> CheckpointCorrupt:
    data = json.loads(page_index())
    changed = change(data)
    (page / "index.json").write_bytes(signed(data if changed is None else changed))
    with pytest.raises(CheckpointCorrupt) as caught:
        read_index(page)
    assert caught.value.file == str(page / "index.json")
    return caught.value


def test_an_index_that_is_written_otherwise_but_says_the_same_is_read(page):
    before = read_index(page)
    (page / "index.json").write_bytes(signed(json.loads(page_index())))
    after = read_index(page)
    assert (after.tensors, after.files) == (before.tensors, before.files)
    assert after.fingerprint != before.fingerprint


EMBEDDING, HEAD, MATRIX, SCALE, UNUSED = range(5)


@pytest.mark.parametrize(
    ("tensor", "change", "reason"),
    [
        (SCALE, {"dtype": "F6_E2M3"}, "dtype 'F6_E2M3' is not supported"),
        (SCALE, {"dtype": "BF16"}, "is 2 bytes, not 8"),
        (SCALE, {"shape": [2]}, "is 16 bytes, not 8"),
        (SCALE, {"shape": [1.0]}, "not a list of at most 64 sizes"),
        (SCALE, {"shape": [2**62, 4]}, "more elements than can be counted"),
        (SCALE, {"offset": 520}, "not a multiple of 256"),
        (SCALE, {"offset": 4096}, "are not inside the 4096"),
        (SCALE, {"offset": -256}, "are no sizes"),
        (SCALE, {"offset": 256}, "overlap"),
        (SCALE, {"offset": 0}, "overlap"),
        (SCALE, {"nbytes": True}, "are no sizes"),
        (SCALE, {"partition": 1}, "partition is not one of the 1"),
        (SCALE, {"partition": None}, "partition is not one of the 1"),
        (SCALE, {"extra": 1}, "it needs"),
        (SCALE, {"alias_of": 7}, "alias_of is not the name"),
        (UNUSED, {"alias_of": "model.layers.0.scale"}, "alias_of is not the name"),
        (UNUSED, {"offset": 256}, "not the start of partition 0"),
        (UNUSED, {"stride": [4, 1]}, "does not fill shape"),
        (MATRIX, {"stride": [1, 3]}, "does not fill shape"),
        (MATRIX, {"stride": [0, 1]}, "does not fill shape"),
        (MATRIX, {"stride": [1]}, "one per size"),
        (MATRIX, {"stride": [1, -2]}, "one per size"),
        (HEAD, {"alias_of": "nowhere"}, "is not there, or is itself an alias"),
        (HEAD, {"alias_of": "lm_head.weight"}, "is not there, or is itself an alias"),
        (HEAD, {"alias_of": "model.layers.0.scale"}, "but has other bytes"),
        (HEAD, {"alias_of": None}, "alias_of is not the name"),
        (HEAD, {"name": "model.layers.0.scale"}, "occurs twice"),
    ],
)
def test_a_wrong_tensor_is_refused_with_its_name(page, tensor, change, reason):
    name = json.loads(page_index())["tensors"][tensor]["name"]
    error = refusal(page, lambda data: data["tensors"][tensor].update(change))
    assert reason in error.reason
    # Of two that share bytes, either may be the wrong one.
    assert error.tensor == change.get("name", name) or "overlap" in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../data-00000.bin"}, "not a plain name"),
        ({"file": "/etc/passwd"}, "not a plain name"),
        ({"file": ".."}, "not a plain name"),
        ({"file": "a" * 201}, "not a plain name"),
        ({"file": "data\n"}, "not a plain name"),
        ({"file": None}, "not a plain name"),
        ({"logical_nbytes": 8192}, "4096 logical bytes, not 8192"),
        ({"stored_nbytes": 8192}, "stored in 4096 bytes, not 8192"),
        ({"stored_nbytes": -1}, "no sizes"),
        ({"chunks": []}, "its chunks have 0 logical bytes"),
        ({"chunks": None}, "are not a list"),
        ({"chunks": [[0, 4096, 0, 4096]]}, "chunk 0 is not [position"),
        ({"chunks": [[0, 4096, 0.0, 4096, "5a10f7fa4e3915b2", "raw"]]}, "chunk 0 is not [position"),
        ({"chunks": [[0, 4096, 0, 4096, "00", "raw"]]}, "chunk 0 has a checksum that is not"),
        ({"chunks": [[0, 4096, 0, 4096, "5A10F7FA4E3915B2", "raw"]]}, "chunk 0 has a checksum that is not"),
        ({"chunks": [[0, 4096, 0, 4096, "5a10f7fa4e3915b2", "zip"]]}, "codec that is not one of raw"),
        ({"chunks": [[0, 4096, 0, 4000, "5a10f7fa4e3915b2", "split16"]]}, "codec that is not one of raw"),
        ({"chunks": [[0, 4096, 0, 4000, "5a10f7fa4e3915b2", "raw"]]}, "stores 4096 raw bytes in 4000"),
        ({"chunks": [[0, 4095, 0, 4095, "5a10f7fa4e3915b2", "raw"]]}, "not a multiple of 4096"),
        ({"chunks": [[0, 0, 0, 0, "5a10f7fa4e3915b2", "raw"]]}, "not a multiple of 4096"),
        ({"chunks": [[0, MAX_CHUNK + 4096, 0, MAX_CHUNK + 4096, "5a10f7fa4e3915b2", "raw"]]}, "not a multiple of 4096"),
        ({"chunks": [[4096, 4096, 0, 4096, "5a10f7fa4e3915b2", "raw"]]}, "begins at logical byte 4096, not 0"),
        ({"chunks": [[0, 4096, 4096, 4096, "5a10f7fa4e3915b2", "raw"]]}, "begins at byte 4096 of the file, not 0"),
        ({"more": 1}, "it needs file"),
    ],
)
def test_a_wrong_partition_is_refused(page, change, reason):
    error = refusal(page, lambda data: data["partitions"][0].update(change))
    assert error.tensor is None
    assert reason in error.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 0}, "version is not a number"),
        ({"version": "1"}, "version is not a number"),
        ({"version": True}, "version is not a number"),
        ({"variant": "split16"}, "not of variant 'raw'"),
        ({"creator": 1}, "creator is not a text"),
        ({"info": {"a": 1}}, "info does not map"),
        ({"partitions": []}, "no partitions"),
        ({"partitions": {}}, "no partitions"),
        ({"partitions": [1]}, "partition 0: it needs"),
        ({"tensors": {}}, "tensors are not a list"),
        ({"tensors": [None]}, "tensor 0 has no name"),
        ({"tensors": [{"name": ""}]}, "tensor 0 has no name"),
        ({"more": 1}, "it needs creator"),
    ],
)
def test_an_index_that_lacks_something_is_refused(page, change, reason):
    assert reason in refusal(page, lambda data: data.update(change)).reason


def test_two_partitions_with_one_file_are_refused(page):
    assert "two partitions have one file" in refusal(page, lambda data: data["partitions"].append(data["partitions"][0])).reason


def test_a_later_version_is_refused_by_its_number_with_what_to_do(page):
    data = json.loads(page_index())
    # What a later version adds is not what is wrong with it.
    data.update(version=VERSION + 1, shapes="new")
    (page / "index.json").write_bytes(signed(data))
    with pytest.raises(CheckpointTooNew) as caught:
        read_index(page)
    assert (caught.value.version, caught.value.known) == (VERSION + 1, VERSION)
    assert "Update sllmdask, or convert the checkpoint again" in str(caught.value)


def test_any_flipped_bit_of_an_index_is_found(page):
    whole = page_index()
    for at in range(len(whole)):
        (page / "index.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(CheckpointCorrupt) as caught:
            read_index(page)
        assert caught.value.file == str(page / "index.json")


def test_an_index_cut_anywhere_is_refused(page):
    whole = page_index()
    for length in range(len(whole)):
        (page / "index.json").write_bytes(whole[:length])
        with pytest.raises(CheckpointCorrupt):
            read_index(page)


def test_a_key_that_occurs_twice_is_refused_though_the_checksum_is_right(page):
    rest = page_index().split(b"\n", 1)[1].replace(b'"offset":512', b'"offset":512,"offset":768')
    first = f'{{"magic":"sllmdask-checkpoint","sha256":"{hashlib.sha256(rest).hexdigest()}",\n'.encode()
    (page / "index.json").write_bytes(first + rest)
    with pytest.raises(CheckpointCorrupt, match="'offset' occurs twice"):
        read_index(page)


def test_an_index_of_absurd_size_is_refused_without_reading_all_of_it(page):
    with open(page / "index.json", "ab") as opened:
        opened.truncate(MAX_INDEX * 100)
    with pytest.raises(CheckpointCorrupt, match=f"larger than {MAX_INDEX}"):
        read_index(page)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_truncated_partition_is_refused_with_the_first_tensor_that_is_lost(tmp_path):
    tensors = {f"layers.{i}.w": from_bytes("U8", (CHUNK,), bytes(CHUNK)) for i in range(3)}
    write_checkpoint(tensors, tmp_path / "x")
    file = tmp_path / "x" / "data-00000.bin"
    os.truncate(file, 2 * CHUNK - 1)
    with pytest.raises(CheckpointCorrupt, match="truncated: it has 4194303 bytes of 6291456") as caught:
        read_index(tmp_path / "x")
    assert (caught.value.file, caught.value.tensor) == (str(file), "layers.1.w")
    os.truncate(file, 4 * CHUNK)
    with pytest.raises(CheckpointCorrupt, match="too long"):
        read_index(tmp_path / "x")


def test_a_missing_partition_is_named(page):
    os.remove(page / "data-00000.bin")
    with pytest.raises(CheckpointNotFound, match=r"data-00000\.bin cannot be read: No such file"):
        read_index(page)
    os.mkfifo(page / "data-00000.bin")
    with pytest.raises(CheckpointNotFound, match=r"data-00000\.bin is not a file"):
        read_index(page)


def test_both_variants_can_be_chosen_and_the_raw_one_comes_first(tmp_path):
    noise = torch.randn(CHUNK // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    source = from_bytes("BF16", tuple(noise.shape), noise.view(torch.uint8).numpy())
    write_checkpoint({"w": source}, tmp_path / "both", compress="both")
    write_checkpoint({"w": source}, tmp_path / "packed", compress="yes")
    write_checkpoint({"w": source}, tmp_path / "raw", compress="no")
    assert [variants(tmp_path / name) for name in ("both", "packed", "raw")] == [("raw", "split16"), ("split16",), ("raw",)]
    assert read_index(tmp_path / "both").files[0].chunks[0].codec == "raw"
    for index in (read_index(tmp_path / "both", "split16"), read_index(tmp_path / "packed")):
        [chunk] = index.files[0].chunks
        assert chunk.codec == "split16"
        # bfloat16 of a normal distribution: 2.6 bits of exponent instead of 8.
        assert 0.6 < chunk.stored / chunk.nbytes < 0.75
        assert index.nbytes == chunk.nbytes == CHUNK
        assert index.files[0].nbytes == -(-chunk.stored // 4096) * 4096
    with pytest.raises(CheckpointNotFound, match="no variant 'split16', but raw"):
        read_index(tmp_path / "raw", "split16")
    with pytest.raises(CheckpointNotFound, match="no variant 'zip'"):
        read_index(tmp_path / "both", "zip")


def test_safetensors_has_only_the_raw_variant(tmp_path, write_single):
    write_single(tmp_path, {"w": torch.ones(3)})
    assert variants(tmp_path) == variants(tmp_path / "model.safetensors") == ("raw",)
    assert read_index(tmp_path, "raw") == read_index(tmp_path)
    with pytest.raises(CheckpointNotFound, match="no variant 'split16'"):
        read_index(tmp_path, "split16")
    assert variants(tmp_path / "nowhere") == ()


def test_another_programs_index_beside_safetensors_is_no_checkpoint_of_ours(tmp_path, write_single):
    write_single(tmp_path, {"w": torch.ones(3)})
    (tmp_path / "index.json").write_text('{"pages": 3}')
    assert read_index(tmp_path).format == "safetensors"


# --- places ----------------------------------------------------------------------------------------------------------


def test_tensors_lie_at_multiples_of_256_in_partitions_that_none_spans():
    places, logical = place([100, 0, 256, 1, 5000, 700, 300], 1000)
    #          100     0       256       1         5000    700     300
    assert places == [(0, 0), (0, 0), (0, 256), (0, 512), (1, 0), (2, 0), (3, 0)]
    assert logical == [4096, 8192, 4096, 4096]
    assert place([], 1000) == ([], [0])
    assert place([5000, 1], 1000) == ([(0, 0), (1, 0)], [8192, 4096])


@settings(max_examples=300, deadline=None)
@given(
    layout=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 8)), max_size=3)
    | st.permutations([(2, 1), (3, 2), (4, 6)])
    | st.permutations([(1, 5), (3, 1), (2, 3)])
)
def test_a_tensor_is_dense_if_its_elements_fill_their_bytes_once(layout):
    shape, stride = [size for size, _ in layout], [step for _, step in layout]
    places = [sum(map(mul, at, stride)) for at in product(*map(range, shape))]
    assert is_dense(shape, stride) == (sorted(places) == list(range(len(places))))
