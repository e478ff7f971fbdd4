"""Files that anyone may have written: whatever they hold, a parser answers with an index or a named error, in bounded memory."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sllmdask.errors import CheckpointError
from sllmdask.loader.convert import from_bytes, write_checkpoint
from sllmdask.loader.fast_format import CHUNK, parse_index
from sllmdask.loader.format import BITS, CheckpointIndex, read_index

#: Bytes that a parser may take for each byte of its input, at worst, and whatever it is given.
PER_BYTE, AT_LEAST = 64, 500_000

fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

KEYS = [
    "name",
    "dtype",
    "shape",
    "data_offsets",
    "partition",
    "offset",
    "nbytes",
    "stride",
    "alias_of",
    "chunks",
    "a",
    "\ud800",
    "",
]
numbers = st.sampled_from([0, 1, 2, 8, 255, 256, 4096, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, -1, 10**30]) | st.integers()
leaves = (
    st.none() | st.booleans() | numbers | st.floats() | st.sampled_from([*KEYS, "F32", "BF16", "F4", "raw", "0" * 16]) | st.text()
)
json_values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12
)


def bounded(nbytes: int, parse) -> CheckpointIndex | None:
    """What `parse` makes of an input of `nbytes`; ``None`` for a named error. Any other error, or much memory, fails the test."""
    for again in (True, True, False):
        tracemalloc.start()
        try:
            index = parse()
        except CheckpointError:
            index = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        # Other threads of this process are counted, too: what is the parser's own is there each time.
        if peak < PER_BYTE * nbytes + AT_LEAST:
            break
        assert again, f"{peak} bytes for an input of {nbytes}"
    return index


def assert_sound(index: CheckpointIndex) -> None:
    """What everyone who has an index relies on."""
    files = {file.name: file for file in index.files}
    assert len({tensor.name for tensor in index.tensors}) == len(index.tensors)
    ranges: dict[str, set[tuple[int, int]]] = {name: set() for name in files}
    for tensor in index.tensors:
        file = files[tensor.file]
        assert tensor.nbytes * 8 == math.prod(tensor.shape) * BITS[tensor.dtype]
        assert file.data_offset <= tensor.offset <= tensor.offset + tensor.nbytes <= (file.logical_nbytes or file.nbytes)
        if tensor.nbytes:
            ranges[tensor.file].add((tensor.offset, tensor.offset + tensor.nbytes))
    for taken in ranges.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(taken)))
    for file in index.files:
        assert sum(chunk.nbytes for chunk in file.chunks) == file.logical_nbytes


# --- safetensors ------------------------------------------------------------------------------------------------------


def parse_header(directory: Path, data: bytes) -> CheckpointIndex | None:
    (directory / "model.safetensors").write_bytes(data)
    index = bounded(len(data), lambda: read_index(directory))
    if index is not None:
        assert_sound(index)
        assert index.nbytes == sum(tensor.nbytes for tensor in index.tensors)
    return index


def with_length(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I8", "shape": [], "data_offsets": [24, 25]},
    "c": {"dtype": "BF16", "shape": [0], "data_offsets": [25, 25]},
    "__metadata__": {"format": "pt"},
}


@fuzz
@given(data=st.binary(max_size=200), header=st.booleans())
def test_any_bytes_as_a_safetensors_file(tmp_path, data, header):
    parse_header(tmp_path, with_length(data) if header else data)


@fuzz
@given(header=json_values | st.dictionaries(st.text(max_size=3), json_values, max_size=4), data=st.binary(max_size=40))
def test_any_json_as_a_safetensors_header(tmp_path, header, data):
    parse_header(tmp_path, with_length(json.dumps(header).encode(), data))


def mutated(draw: st.DrawFn, value: object) -> object:
    """`value` with up to three of its parts, at any depth, replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at, parent = value, None
        for _ in range(draw(st.integers(1, 6))):
            if not isinstance(at, dict | list) or not at:
                break
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            at, parent = at[key], (at, key)
        if parent is None:
            return draw(json_values)
        container, key = parent
        how = draw(st.integers(0, 3))
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif how == 1:
            container[draw(st.sampled_from(KEYS))] = container[key]
        elif how == 2 and isinstance(container[key], int):
            container[key] += draw(st.sampled_from([-4096, -256, -1, 1, 8, 256, 4096, 2**40]))
        else:
            container[key] = draw(json_values)
    return value


mutated_header = st.composite(mutated)(HEADER)


@fuzz
@given(header=mutated_header, nbytes=st.sampled_from([25, 24, 49]))
def test_a_safetensors_header_with_parts_changed(tmp_path, header, nbytes):
    parse_header(tmp_path, with_length(json.dumps(header).encode(), bytes(nbytes)))


@fuzz
@given(at=st.integers(0, 10**4), octets=st.binary(min_size=1, max_size=9), cut=st.integers(0, 10**4))
def test_a_safetensors_file_with_bytes_changed_or_cut(tmp_path, at, octets, cut):
    whole = with_length(json.dumps(HEADER).encode(), bytes(25))
    assert parse_header(tmp_path, whole) is not None
    at %= len(whole)
    parse_header(tmp_path, (whole[:at] + octets + whole[at + len(octets) :])[: len(whole) - cut % 3 * 10])


# --- the weight map ----------------------------------------------------------------------------------------------------


def parse_map(directory: Path, text: bytes) -> None:
    (directory / "model.safetensors.index.json").write_bytes(text)
    (directory / "s.safetensors").write_bytes(with_length(json.dumps(HEADER).encode(), bytes(25)))
    index = bounded(len(text), lambda: read_index(directory))
    if index is not None:
        assert_sound(index)
        assert {file.name for file in index.files} == {"s.safetensors"}


@fuzz
@given(text=st.binary(max_size=200))
@example(b'{"weight_map": {"a": "' + b"s" * 5000 + b'.safetensors"}}')
@example(b'{"weight_map": {"a": "\\udc80.safetensors"}}')
def test_any_bytes_as_a_weight_map(tmp_path, text):
    parse_map(tmp_path, text)


names = st.sampled_from(["a", "b", "c", "\ud800", ""]) | st.text(max_size=4)
shards = (
    st.sampled_from(["s.safetensors", "../s.safetensors", "\0.safetensors", ".safetensors", "s.bin"])
    | json_values
    | st.text().map("{}.safetensors".format)
)


@fuzz
@given(weight_map=st.dictionaries(names, shards, max_size=4) | json_values, more=json_values)
def test_any_json_as_a_weight_map(tmp_path, weight_map, more):
    parse_map(tmp_path, json.dumps({"weight_map": weight_map, "metadata": more}).encode())


# --- our own index ------------------------------------------------------------------------------------------------------


def signed(rest: bytes) -> bytes:
    """`rest` behind a first line that is right about it."""
    return f'{{"magic":"sllmdask-checkpoint","sha256":"{hashlib.sha256(rest).hexdigest()}",\n'.encode() + rest


def parse_ours(text: bytes) -> CheckpointIndex | None:
    index = bounded(len(text), lambda: parse_index(text, "/somewhere/index.json", "raw"))
    if index is not None:
        assert_sound(index)
        assert all(tensor.offset % 256 == 0 for tensor in index.tensors)
        assert all("/" not in file.name and not file.name.startswith(".") for file in index.files)
    return index


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The index of a small checkpoint with all that there may be in one, as JSON."""
    directory = tmp_path_factory.mktemp("fuzz") / "x"
    tensors = {
        "embed": from_bytes("BF16", (2, 4), bytes(16)),
        "head": from_bytes("BF16", (4, 2), b"", stride=(1, 4), alias_of="embed"),
        "layers.0.w": from_bytes("F32", (CHUNK // 4,), bytes(CHUNK)),
        "layers.1.w": from_bytes("F4", (2, 2), bytes(2)),
        "none": from_bytes("U8", (0,), b""),
    }
    write_checkpoint(tensors, directory, partition_nbytes=CHUNK)
    text = (directory / "index.json").read_bytes()
    assert parse_ours(text) is not None
    return {key: value for key, value in json.loads(text).items() if key not in ("magic", "sha256")}


@fuzz
@given(text=st.binary(max_size=200), first=st.booleans())
def test_any_bytes_as_an_index(text, first):
    assert parse_ours(signed(text) if first else text) is None


@fuzz
@given(data=st.dictionaries(st.sampled_from(["version", "variant", "creator", "info", "partitions", "tensors"]), json_values))
def test_any_json_as_an_index(data):
    assert parse_ours(signed(json.dumps(data).encode()[1:])) is None


@fuzz
@given(data=st.data())
def test_an_index_with_parts_changed(written, data):
    changed = mutated(data.draw, written)
    if isinstance(changed, dict):
        parse_ours(signed(json.dumps(changed).encode()[1:]))


@fuzz
@given(at=st.integers(0, 10**5), octets=st.binary(min_size=1, max_size=9))
def test_an_index_with_bytes_changed(written, at, octets):
    rest = json.dumps(written).encode()[1:]
    at %= len(rest)
    changed = rest[:at] + octets + rest[at + len(octets) :]
    parse_ours(signed(changed))
    if changed != rest:
        # Whoever cannot sign it is found out.
        assert parse_ours(signed(rest)[: -len(rest)] + changed) is None


@pytest.mark.parametrize("unit", ["[]", "{}", "12", "[[]]", '""', '{"a":1}', "1e9", '"\\ud800"'])
@pytest.mark.parametrize("where", ["tensors", "partitions", "info", "chunks"])
def test_thousands_of_anything_take_memory_in_proportion(unit, where):
    many = f"[{','.join([unit] * 20_000)}]"
    if where == "chunks":
        many = f'[{{"file":"a","logical_nbytes":0,"stored_nbytes":0,"chunks":{many}}}]'
    parts = {"info": "{}", "partitions": "[]", "tensors": "[]"} | {"partitions" if where == "chunks" else where: many}
    rest = '"version":1,"variant":"raw","creator":"",' + ",".join(f'"{key}":{value}' for key, value in parts.items()) + "}"
    assert parse_ours(signed(rest.encode())) is None


def test_deep_nesting_is_refused(tmp_path):
    for text in (b'"tensors":' + b"[" * 200_000, b'"tensors":' + b'{"a":' * 200_000):
        assert parse_ours(signed(text)) is None
        assert parse_header(tmp_path, with_length(b"{" + text)) is None
