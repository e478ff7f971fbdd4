from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sllmdask.loader.format import CheckpointIndex, FileEntry, TensorEntry
from sllmdask.loader.plan import BLOCK, plan_reads

MB = 1024**2


def index_of(*files: tuple[int, list[int]], dtype: str = "I8") -> CheckpointIndex:
    """Files of (data offset, bytes of each tensor)."""
    entries, tensors = [], []
    for number, (data_offset, sizes) in enumerate(files):
        name, offset = f"{number}.safetensors", data_offset
        for size in sizes:
            tensors.append(TensorEntry(f"t{len(tensors)}", dtype, (size,), name, offset, size))
            offset += size
        entries.append(FileEntry(name, offset, data_offset))
    return CheckpointIndex("/models/m", tuple(tensors), tuple(entries))


def test_a_file_of_many_small_tensors_is_one_read():
    plan = plan_reads(index_of((5000, [10] * 1000)), 16 * MB)
    (chunk,) = plan.chunks
    assert (chunk.offset, chunk.position, chunk.wanted, chunk.payload) == (4096, 0, 10_904, 10_000)
    assert chunk.nbytes == 12_288
    assert plan.positions["t1"] == 5000 - 4096 + 10


def test_chunks_are_as_large_as_asked_for():
    plan = plan_reads(index_of((8, [50 * MB])), 16 * MB)
    assert [chunk.nbytes for chunk in plan.chunks] == [16 * MB] * 3 + [2 * MB + BLOCK]
    assert [chunk.wanted for chunk in plan.chunks] == [16 * MB] * 3 + [2 * MB + 8]


def test_a_file_whose_data_starts_off_a_word_goes_through_the_page_cache_to_an_aligned_place():
    plan = plan_reads(index_of((8, [8]), (13, [100])), 16 * MB)
    assert [file.direct for file in plan.files] == [True, False]
    assert (plan.chunks[1].offset, plan.chunks[1].position, plan.chunks[1].nbytes) == (13, BLOCK, 100)
    assert plan.positions["t1"] == BLOCK


def test_only_the_tensor_that_its_dtype_cannot_have_there_is_copied():
    index = CheckpointIndex(
        "/models/m",
        (
            TensorEntry("ok", "F32", (2,), "m", 8, 8),
            TensorEntry("flag", "BOOL", (1,), "m", 16, 1),
            TensorEntry("off", "F64", (3,), "m", 17, 24),
            TensorEntry("none", "F64", (0,), "m", 41, 0),
        ),
        (FileEntry("m", 41, 8),),
    )
    plan = plan_reads(index, 16 * MB)
    (copy,) = plan.copies
    assert (copy.source, copy.nbytes) == (17, 24)
    assert copy.target == plan.positions["off"] == BLOCK
    assert plan.nbytes == 2 * BLOCK


def test_a_checkpoint_of_empty_tensors_needs_no_read():
    assert plan_reads(index_of((8, [0, 0])), 16 * MB).chunks == ()


@given(
    files=st.lists(st.tuples(st.integers(8, 20_000), st.lists(st.integers(0, 20_000), max_size=5)), min_size=1, max_size=4),
    chunk_size=st.integers(1, 20_000),
)
def test_every_byte_of_data_is_read_once_to_its_place_and_nothing_else_is_hit(files, chunk_size):
    index = index_of(*files)
    plan = plan_reads(index, chunk_size)
    assert plan.payload == index.nbytes
    assert plan.nbytes % BLOCK == 0

    end = 0
    for chunk in plan.chunks:
        file = plan.files[chunk.file]
        assert chunk.position >= end, "two reads to one place"
        end = chunk.position + chunk.nbytes
        assert 0 < chunk.wanted <= chunk.nbytes < chunk.wanted + BLOCK
        assert chunk.offset + chunk.wanted <= file.nbytes
        if file.direct:
            assert chunk.offset % BLOCK == chunk.nbytes % BLOCK == chunk.position % BLOCK == 0
    assert end <= plan.nbytes

    where = {file.path: number for number, file in enumerate(plan.files)}
    for tensor in index.tensors:
        for at in {0, tensor.nbytes // 2, tensor.nbytes - 1} if tensor.nbytes else set():
            reads = [
                chunk.position + tensor.offset + at - chunk.offset
                for chunk in plan.chunks
                if chunk.file == where[index.path(tensor.file)] and 0 <= tensor.offset + at - chunk.offset < chunk.wanted
            ]
            assert reads == [plan.positions[tensor.name] + at]
