from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sllmdask.loader.format import CheckpointIndex, ChunkEntry, FileEntry, TensorEntry
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
    assert (copy.tensor, copy.source, copy.nbytes) == ("off", 17, 24)
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
    for chunk in sorted(plan.chunks, key=lambda chunk: chunk.position):
        file = plan.files[chunk.file]
        assert chunk.position >= end, "two reads to one place"
        end = chunk.position + chunk.nbytes
        assert 0 < chunk.wanted == chunk.decoded <= chunk.nbytes < chunk.wanted + BLOCK
        assert chunk.offset + chunk.wanted <= file.nbytes
        assert (chunk.codec, chunk.checksum) == ("raw", None)
        if file.direct:
            assert chunk.offset % BLOCK == chunk.nbytes % BLOCK == chunk.position % BLOCK == 0
    assert end <= plan.nbytes

    where = {file.path: number for number, file in enumerate(plan.files)}
    for tensor in index.tensors:
        for at in {0, tensor.nbytes // 2, tensor.nbytes - 1} if tensor.nbytes else set():
            reads = {
                number: chunk.position + tensor.offset + at - chunk.offset
                for number, chunk in enumerate(plan.chunks)
                if chunk.file == where[index.path(tensor.file)] and 0 <= tensor.offset + at - chunk.offset < chunk.wanted
            }
            assert list(reads.values()) == [plan.positions[tensor.name] + at]
            assert reads.keys() <= set(plan.chunks_of[tensor.name])
        overlapping = [
            number
            for number, chunk in enumerate(plan.chunks)
            if chunk.file == where[index.path(tensor.file)]
            and max(chunk.offset, tensor.offset) < min(chunk.offset + chunk.wanted, tensor.offset + tensor.nbytes)
        ]
        assert list(plan.chunks_of[tensor.name]) == overlapping


# --- order -----------------------------------------------------------------------------------------------------------


def qwen(n_layers: int, nbytes: int) -> dict[str, int]:
    """Names and sizes as a model needs them."""
    names = ["model.embed_tokens.weight"]
    for layer in range(n_layers):
        names += [f"model.layers.{layer}.{part}.weight" for part in ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")]
    return dict.fromkeys([*names, "model.norm.weight", "lm_head.weight"], nbytes)


def needed(plan, sizes):
    """For each chunk: the first layer, counted from 1, that needs it."""
    layer_of = {name: (i + 2) // 3 for i, name in enumerate(sizes)}
    return [min(layer_of[name] for name in sizes if number in plan.chunks_of[name]) for number in range(len(plan.chunks))]


def test_chunks_are_read_in_the_order_in_which_a_model_needs_them_and_are_as_large_as_ever():
    sizes = qwen(12, 3 * MB)
    tensors, entries = [], []
    # As the hub has it: sorted by name, cut into shards.
    names = sorted(sizes)
    assert names.index("model.layers.10.mlp.up_proj.weight") < names.index("model.layers.2.mlp.up_proj.weight")
    for number, shard in enumerate((names[:20], names[20:])):
        offset = 5000
        for name in shard:
            tensors.append(TensorEntry(name, "BF16", (sizes[name] // 2,), f"{number}.safetensors", offset, sizes[name]))
            offset += sizes[name]
        entries.append(FileEntry(f"{number}.safetensors", offset, 5000))
    plan = plan_reads(CheckpointIndex("/m", tuple(tensors), tuple(entries)), 2 * MB)

    assert plan.chunks_of["model.embed_tokens.weight"][0] == 0
    assert needed(plan, sizes) == sorted(needed(plan, sizes))
    assert [chunk.nbytes for chunk in plan.chunks].count(2 * MB) >= len(plan.chunks) - len(entries)
    assert sorted((chunk.file, chunk.offset) for chunk in plan.chunks) == [
        (number, offset) for number, entry in enumerate(entries) for offset in range(4096, entry.nbytes, 2 * MB)
    ]


def test_a_chunk_comes_when_the_first_of_its_tensors_is_needed():
    sizes = qwen(30, 1000)
    names = sorted(sizes)
    tensors = tuple(TensorEntry(name, "U8", (1000,), "m", 4096 + i * 1000, 1000) for i, name in enumerate(names))
    plan = plan_reads(CheckpointIndex("/m", tensors, (FileEntry("m", 4096 + 1000 * len(names), 4096),)), BLOCK)
    assert needed(plan, sizes) == sorted(needed(plan, sizes))
    assert len(plan.chunks) > 20


def test_bytes_that_no_tensor_claims_are_read_last():
    tensors = (TensorEntry("model.norm.weight", "U8", (BLOCK,), "m", 3 * BLOCK, BLOCK),)
    plan = plan_reads(CheckpointIndex("/m", tensors, (FileEntry("m", 4 * BLOCK, BLOCK),)), BLOCK)
    assert [chunk.offset for chunk in plan.chunks] == [3 * BLOCK, BLOCK, 2 * BLOCK]


# --- our own format --------------------------------------------------------------------------------------------------


def fast_index(*files: list[ChunkEntry], tensors: list[TensorEntry]) -> CheckpointIndex:
    entries = []
    for number, chunks in enumerate(files):
        stored = max((-(-(chunk.offset + chunk.stored) // BLOCK) * BLOCK for chunk in chunks), default=0)
        logical = sum(chunk.nbytes for chunk in chunks)
        entries.append(FileEntry(f"{number}.bin", stored, 0, logical_nbytes=logical, chunks=tuple(chunks)))
    return CheckpointIndex("/m", tuple(tensors), tuple(entries), format="fast")


def test_each_stored_chunk_is_one_read_with_its_checksum_wherever_it_is_decoded_to():
    index = fast_index(
        [ChunkEntry(0, MB, 0, 700_001, 11, "split16"), ChunkEntry(MB, 2 * BLOCK, 700_416, 2 * BLOCK, 12, "raw")],
        [ChunkEntry(0, BLOCK, 0, BLOCK, 13, "raw")],
        tensors=[
            TensorEntry("layers.1.w", "BF16", (MB // 4,), "0.bin", 0, MB // 2),
            TensorEntry("layers.0.w", "BF16", (BLOCK,), "0.bin", MB, 2 * BLOCK),
            TensorEntry("embed", "BF16", (BLOCK // 2,), "1.bin", 0, BLOCK),
        ],
    )
    plan = plan_reads(index, 16 * MB)
    assert [(chunk.file, chunk.checksum) for chunk in plan.chunks] == [(1, 13), (0, 12), (0, 11)]
    raw, encoded = plan.chunks[1:]
    assert (raw.offset, raw.position, raw.nbytes, raw.wanted, raw.decoded) == (700_416, MB, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK)
    assert (encoded.offset, encoded.position, encoded.nbytes, encoded.wanted) == (0, 0, 700_416, 700_001)
    assert (encoded.decoded, encoded.codec) == (MB, "split16")
    assert plan.positions == {"layers.1.w": 0, "layers.0.w": MB, "embed": MB + 2 * BLOCK}
    assert plan.chunks_of == {"layers.1.w": (2,), "layers.0.w": (1,), "embed": (0,)}
    assert plan.nbytes == MB + 3 * BLOCK
    assert plan.payload == index.nbytes
    assert plan.largest_read == 700_416
    assert [plan.first_tensor(number) for number in range(3)] == ["embed", "layers.0.w", "layers.1.w"]


def test_aliases_share_place_and_chunks():
    index = fast_index(
        [ChunkEntry(0, BLOCK, 0, BLOCK, 1, "raw")],
        tensors=[
            TensorEntry("lm_head.weight", "F32", (4, 8), "0.bin", 0, 128),
            TensorEntry("embed.weight", "F32", (8, 4), "0.bin", 0, 128, stride=(1, 8)),
        ],
    )
    plan = plan_reads(index, MB)
    assert plan.positions["lm_head.weight"] == plan.positions["embed.weight"] == 0
    assert plan.chunks_of["lm_head.weight"] == plan.chunks_of["embed.weight"] == (0,)


def test_a_partition_without_bytes_needs_no_read():
    index = fast_index([], tensors=[TensorEntry("none", "F32", (0,), "0.bin", 0, 0)])
    plan = plan_reads(index, MB)
    assert (plan.chunks, plan.payload, plan.chunks_of) == ((), 0, {"none": ()})


def test_twenty_thousand_tensors_are_planned_at_once():
    random.seed(0)
    names = [f"model.layers.{layer}.experts.{expert}.weight" for layer in range(100) for expert in range(200)]
    random.shuffle(names)
    tensors = tuple(TensorEntry(name, "U8", (10_000,), "m", i * 10_000, 10_000) for i, name in enumerate(names))
    plan = plan_reads(CheckpointIndex("/m", tensors, (FileEntry("m", 10_000 * len(names), 0),)), 2 * MB)
    assert plan.payload == 10_000 * len(names)
    assert all(a < b for chunks in plan.chunks_of.values() for a, b in pairwise(chunks))
