from __future__ import annotations

import gc

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sllmdask.loader.buffers import BufferPool, address_of
from sllmdask.loader.checkpoint import read_checkpoint
from sllmdask.loader.format import BITS, read_index
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.tiers import _DTYPES, tensor_views
from tests.loader.tensors import bits

#: safetensors has all but these two.
ALL_DTYPES = sorted(set(_DTYPES.values()) - {torch.complex32, torch.complex128}, key=str)


def test_every_dtype_of_the_format_has_a_torch_type_of_its_size():
    assert _DTYPES.keys() == BITS.keys()
    # torch packs two F4 into its one byte.
    assert {name: dtype.itemsize * 8 for name, dtype in _DTYPES.items()} == {**BITS, "F4": 8}


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5, 2), (4, 0, 3)], ids=str)
def test_every_dtype_and_shape_is_what_safetensors_makes_of_it(tmp_path, write_single, assert_equal, dtype, shape):
    if dtype is torch.float4_e2m1fn_x2 and shape == ():
        shape = (1,)  # safetensors cannot write a packed pair without a dimension
    write_single(tmp_path, {"x": bits(shape, dtype), "y": bits((3,), torch.uint8)})
    assert_equal(read_checkpoint(tmp_path), safetensors.torch.load_file(tmp_path / "model.safetensors"))


def test_shards_and_dtypes_in_one_checkpoint(tmp_path, write_sharded, assert_equal):
    shards = [{f"{i}.{dtype}": bits((i + 1, 11), dtype, seed=i) for dtype in ALL_DTYPES} for i in range(3)]
    write_sharded(tmp_path, shards)
    expected = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        expected |= safetensors.torch.load_file(file)
    assert_equal(read_checkpoint(tmp_path, chunk_size=4096, n_readers=3), expected)


def test_a_tensor_that_lies_off_its_alignment_is_copied_to_where_it_may_lie(tmp_path, write_raw, assert_equal):
    header = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "double": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        "half": {"dtype": "F16", "shape": [], "data_offsets": [17, 19]},
        "empty": {"dtype": "F64", "shape": [0, 2], "data_offsets": [19, 19]},
    }
    data = b"\x01" + torch.tensor([1.5, -2.5], dtype=torch.float64).numpy().tobytes() + torch.tensor(0.5).half().numpy().tobytes()
    text = str(header).replace("'", '"').encode()
    file = write_raw(tmp_path / "model.safetensors", text + b" " * (-len(text) % 8), data)
    tensors = read_checkpoint(file)
    assert_equal(tensors, safetensors.torch.load_file(file))
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in tensors.values())


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
named = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(shapes, st.sampled_from([dtype for dtype in ALL_DTYPES if dtype is not torch.float4_e2m1fn_x2])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.lists(named, min_size=1, max_size=3), chunk_size=st.integers(1, 30_000), n_readers=st.integers(1, 5))
def test_any_checkpoint_is_read_as_it_was_written(tmp_path, write_sharded, assert_equal, shards, chunk_size, n_readers):
    written = [{f"{i}/{name}": bits(*spec, seed=i) for name, spec in shard.items()} for i, shard in enumerate(shards)]
    for file in tmp_path.glob("*"):
        file.unlink()
    write_sharded(tmp_path, written)
    expected = {name: tensor for shard in written for name, tensor in shard.items()}
    assert_equal(read_checkpoint(tmp_path, chunk_size=chunk_size, n_readers=n_readers), expected)


def test_tensors_are_views_and_keep_the_buffer_alive(tmp_path, write_single):
    write_single(tmp_path, {"a": torch.arange(1000.0), "b": torch.ones(10, dtype=torch.bfloat16)})
    index = read_index(tmp_path)
    plan = plan_reads(index, 4096)
    pool = BufferPool(2**20)
    buffer = pool.lease(plan.nbytes)
    start = address_of(buffer)
    read_chunks(plan, start)
    tensors = tensor_views(index, plan, buffer)
    assert all(start <= tensor.data_ptr() < start + plan.nbytes for tensor in tensors.values())
    assert tensors["a"].untyped_storage().nbytes() == 4000, "a storage of its own, so that saving one does not save all"

    part = tensors["a"][-1:]
    del buffer, tensors
    gc.collect()
    assert pool.used > 0
    assert part.item() == 999.0
    del part
    assert pool.used == 0
