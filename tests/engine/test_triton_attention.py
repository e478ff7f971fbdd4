"""The Triton kernels against attention written down from the formula in float64.

Where there is no GPU they run in Triton's interpreter (``tests/__init__.py`` asks for it): the same code, a program at a time,
on numpy.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sllmdask.engine.attention import AttentionOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")

from sllmdask.engine.kernels.triton_attention import TritonBackend, paged_attention, splits_for, store_kv  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """(tokens before, tokens now) of each sequence, and what their attention is."""

    shapes: tuple[tuple[int, int], ...]
    n_kv_heads: int = 2
    group: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


PREFILL = ((0, 37), (0, 1), (0, 64))
CHUNK = ((33, 21), (64, 16))
DECODE = ((9, 1), (0, 1), (130, 1), (63, 1), (64, 1))
MIXED = ((30, 1), (0, 19), (45, 33), (0, 1), (100, 1))
FEATURES = [
    {},
    {"window": 5},
    {"window": 1},
    {"window": 70},
    {"window": 1000},
    {"softcap": 2.0},
    {"has_sinks": True},
    {"window": 20, "softcap": 3.0, "has_sinks": True},
]


@dataclass
class Batch:
    """A case as tensors. Whatever no row may see is not a number, in the caches and in block 0."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens: Tensor
    sinks: Tensor | None
    #: Of each sequence: its query, and all keys and values.
    sequences: list[tuple[Tensor, Tensor, Tensor]]
    case: Case

    def attend(self, **options: int | None) -> Tensor:
        case = self.case
        return paged_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.context_lens,
            self.cu_seqlens,
            **{
                "scaling": 0.3,
                "sliding_window": case.window,
                "softcap": case.softcap,
                "sinks": self.sinks,
                **options,
            },
        )

    def expected(self) -> Tensor:
        """(T, Hq, Dv), float64, a row at a time."""
        case, rows = self.case, []
        for query, keys, values in self.sequences:
            keys, values = (part.double().repeat_interleave(case.group, 1) for part in (keys, values))
            for row in range(len(query)):
                position = len(keys) - len(query) + row
                seen = slice(0 if case.window is None else max(0, position - case.window + 1), position + 1)
                scores = (keys[seen] * query[row].double()).sum(-1) * 0.3
                if case.softcap is not None:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                weights = scores.exp()
                extra = 0.0 if self.sinks is None else self.sinks.double().exp()
                rows.append((weights[..., None] * values[seen]).sum(0) / (weights.sum(0) + extra)[:, None])
        return torch.stack(rows)


def make(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(case.seed)
    n_heads = case.n_kv_heads * case.group

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(DEVICE)

    n_of_each = [-(-(n_past + n_new) // case.block_size) for n_past, n_new in case.shapes]
    free = (torch.randperm(sum(n_of_each) + 7, generator=generator) + 1).tolist()
    caches = [
        torch.full((sum(n_of_each) + 8, case.block_size, case.n_kv_heads, dim), NAN, dtype=case.dtype, device=DEVICE)
        for dim in (case.key_dim, case.value_dim)
    ]
    tables = torch.zeros(len(case.shapes), max(n_of_each) + 1, dtype=torch.int32)
    sequences = []
    for table, n_blocks, (n_past, n_new) in zip(tables, n_of_each, case.shapes, strict=True):
        n_tokens = n_past + n_new
        blocks = torch.tensor([free.pop() for _ in range(n_blocks)])
        table[:n_blocks] = blocks
        slots = (blocks[:, None] * case.block_size + torch.arange(case.block_size)).flatten()[:n_tokens].to(DEVICE)
        keys = draw(n_tokens, case.n_kv_heads, case.key_dim)
        values = draw(n_tokens, case.n_kv_heads, case.value_dim)
        first = 0 if case.window is None else max(0, n_past - case.window + 1)
        for cache, part in zip(caches, (keys, values), strict=True):
            cache.flatten(0, 1)[slots[first:]] = part[first:]
        sequences.append((draw(n_new, n_heads, case.key_dim), keys, values))
    n_new_tokens = torch.tensor([n_new for _, n_new in case.shapes])
    return Batch(
        torch.cat([query for query, _, _ in sequences]),
        *caches,
        tables.to(DEVICE),
        torch.tensor([n_past + n_new for n_past, n_new in case.shapes], dtype=torch.int32, device=DEVICE),
        torch.cat([torch.zeros(1, dtype=torch.long), n_new_tokens.cumsum(0)]).int().to(DEVICE),
        draw(n_heads) if case.has_sinks else None,
        sequences,
        case,
    )


def check(case: Case, **options: int | None) -> None:
    batch = make(case)
    output = batch.attend(**options)
    assert output.dtype == case.dtype
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    torch.testing.assert_close(output.double(), batch.expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("shapes", [PREFILL, CHUNK, DECODE, MIXED], ids=["prefill", "chunk", "decode", "mixed"])
def test_ragged_batches_attend_like_the_formula(shapes: tuple[tuple[int, int], ...], features: dict[str, object]):
    check(Case(shapes, **features))


@pytest.mark.parametrize("shapes", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(("n_kv_heads", "group"), [(3, 1), (2, 2), (2, 7), (1, 8), (1, 71)])
def test_query_heads_attend_to_the_keys_of_their_group(shapes: tuple[tuple[int, int], ...], n_kv_heads: int, group: int):
    case = Case(shapes, n_kv_heads=n_kv_heads, group=group, has_sinks=True)
    check(case)
    if shapes is DECODE:
        check(case, max_rows=1)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 16), (8, 40), (64, 64), (80, 80), (128, 128), (192, 128)])
def test_heads_may_have_any_dimension_and_values_another_one_than_keys(key_dim: int, value_dim: int):
    check(Case(MIXED, key_dim=key_dim, value_dim=value_dim, window=40))


@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 128])
def test_blocks_may_have_any_size(block_size: int):
    check(Case(MIXED, block_size=block_size))
    check(Case(MIXED, block_size=block_size, window=17))


@pytest.mark.parametrize("features", [{}, {"window": 70}, {"softcap": 2.0, "has_sinks": True}], ids=str)
@pytest.mark.parametrize("n_splits", [1, 2, 5])
def test_a_walk_may_be_split_into_parts_some_of_them_empty(n_splits: int, features: dict[str, object]):
    long = ((400, 1), (0, 1), (64, 1), (190, 1))
    check(Case(long, **features), n_splits=n_splits)
    check(Case(long, **features), n_splits=n_splits, max_rows=1)
    check(Case(((30, 3), (0, 9), (100, 1)), group=1, **features), n_splits=n_splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_splits", [1, 3])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, n_splits: int):
    check(Case(((30, 1), (45, 9)), dtype=dtype, key_dim=64, value_dim=64, has_sinks=True), n_splits=n_splits)
    check(Case(((700, 1), (0, 20)), dtype=dtype), n_splits=n_splits)


@pytest.mark.parametrize("seed", range(24))
def test_random_batches_attend_like_the_formula(seed: int):
    rng = random.Random(seed)
    # The interpreter puts parts together a row and a head at a time, so few rows are split.
    n_splits = rng.choice([None, 1, 2])
    most = 5 if n_splits == 2 else 40
    shapes = tuple(
        (rng.choice([0, rng.randrange(150)]), rng.choice([1, 1, rng.randint(1, most)])) for _ in range(rng.randint(1, 5))
    )
    case = Case(
        shapes,
        n_kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 7, 8]),
        key_dim=rng.choice([16, 24, 64, 80]),
        value_dim=rng.choice([16, 24, 64, 80]),
        block_size=rng.choice([8, 16, 32]),
        window=rng.choice([None, rng.randint(1, 120)]),
        softcap=rng.choice([None, 5.0]),
        has_sinks=rng.random() < 0.5,
        seed=seed,
    )
    check(case, n_splits=n_splits)


def test_one_row_each_gives_the_same_bits_whether_it_is_told_or_not():
    batch = make(Case(DECODE, group=7))
    assert batch.attend(n_splits=1, max_rows=1).equal(batch.attend(n_splits=1, max_rows=1, max_context=4096))
    torch.testing.assert_close(batch.attend(n_splits=1, max_rows=1), batch.attend(n_splits=1), rtol=1e-5, atol=1e-6)


def test_a_sequence_has_the_same_bits_alone_and_among_others():
    batch = make(Case(MIXED, window=40, has_sinks=True))
    together = batch.attend(n_splits=1)
    for i in range(len(MIXED)):
        begin, end = int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1])
        alone = replace(
            batch,
            query=batch.query[begin:end],
            block_tables=batch.block_tables[i : i + 1],
            context_lens=batch.context_lens[i : i + 1],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
        )
        assert alone.attend(n_splits=1).equal(together[begin:end])


@pytest.mark.parametrize("n_splits", [1, 3])
def test_rows_that_belong_to_nobody_give_zeros_and_disturb_nobody(n_splits: int):
    batch = make(Case(DECODE))
    n_rows, n_padding = len(batch.query), 3
    padded = replace(
        batch,
        query=torch.cat([batch.query, torch.full_like(batch.query[:n_padding], NAN)]),
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables[:n_padding])]),
        context_lens=torch.cat([batch.context_lens, torch.zeros_like(batch.context_lens[:n_padding])]),
        cu_seqlens=torch.arange(n_rows + n_padding + 1, dtype=torch.int32, device=DEVICE),
    )
    for max_rows in (None, 1):
        output = padded.attend(n_splits=n_splits, max_rows=max_rows)
        assert output[:n_rows].equal(batch.attend(n_splits=n_splits, max_rows=max_rows))
        assert not output[n_rows:].any()


def test_a_batch_without_rows_is_no_failure():
    batch = make(Case(DECODE))
    empty = replace(batch, query=batch.query[:0], context_lens=batch.context_lens[:0], cu_seqlens=batch.cu_seqlens[:1])
    assert empty.attend().shape == (0, 4, 16)


@pytest.mark.parametrize(("key_dim", "value_dim", "block_size"), [(16, 16, 16), (24, 80, 5)])
def test_new_keys_and_values_go_to_their_slots_and_nowhere_else(key_dim: int, value_dim: int, block_size: int):
    torch.manual_seed(0)
    n_tokens, n_heads = 11, 3
    # As they come out of a layer: (1, heads, T, D), the values a view.
    key = torch.randn(1, n_heads, n_tokens, key_dim, device=DEVICE)
    value = torch.randn(1, n_tokens, n_heads, value_dim, device=DEVICE).transpose(1, 2)
    caches = [torch.randn(9, block_size, n_heads, dim, device=DEVICE) for dim in (key_dim, value_dim)]
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(9 * block_size)[:n_tokens]
    slots[4] = -1
    for cache, part in zip(expected, (key, value), strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // block_size, slot % block_size] = part[0, :, token]
    store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), *caches, slots.to(DEVICE))
    assert all(cache.equal(wanted) for cache, wanted in zip(caches, expected, strict=True))


def test_a_cache_may_have_more_elements_than_an_int32_counts():
    block_size, dim = 16, 64
    n_blocks = 2**31 // (block_size * dim) + 2
    if DEVICE.type == "cuda":
        caches = [torch.zeros(n_blocks, block_size, 1, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    else:
        # Memory that is not there until it is written.
        maps = [mmap.mmap(-1, n_blocks * block_size * dim * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
        caches = [torch.frombuffer(each, dtype=torch.bfloat16).view(n_blocks, block_size, 1, dim) for each in maps]
    batch = make(Case(((20, 1),), n_kv_heads=1, key_dim=dim, value_dim=dim, dtype=torch.bfloat16))
    (query, keys, values) = batch.sequences[0]
    table = torch.tensor([[n_blocks - 1, n_blocks - 2]], dtype=torch.int32, device=DEVICE)
    slots = (table[0].long()[:, None] * block_size + torch.arange(block_size, device=DEVICE)).flatten()[:21]
    store_kv(keys, values, *caches, slots)
    far = replace(batch, key_cache=caches[0], value_cache=caches[1], block_tables=table)
    assert far.attend().equal(batch.attend())
    assert len(query) == 1


def test_the_backend_takes_what_a_layer_gives():
    case = Case(MIXED, window=30, has_sinks=True, softcap=4.0)
    batch = make(case)
    packed = SimpleNamespace(
        new_slots=torch.cat(
            [
                (batch.block_tables[i].long()[:, None] * 16 + torch.arange(16, device=DEVICE)).flatten()[n_past : n_past + n_new]
                for i, (n_past, n_new) in enumerate(MIXED)
            ]
        ),
        cu_seqlens=batch.cu_seqlens,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        max_rows=max(n_new for _, n_new in MIXED),
        max_context=int(batch.context_lens.max()),
    )
    new_keys, new_values = (
        torch.cat([sequence[part][n_past:] for sequence, (n_past, _) in zip(batch.sequences, MIXED, strict=True)])
        for part in (1, 2)
    )
    for cache in (batch.key_cache, batch.value_cache):
        cache.flatten(0, 1)[packed.new_slots] = NAN
    backend = TritonBackend()
    backend.check(DEVICE)
    as_given = [part.transpose(0, 1)[None] for part in (new_keys, new_values, batch.query)]
    backend.store(as_given[0], as_given[1], batch.key_cache, batch.value_cache, packed)
    options = AttentionOptions(0.3, sliding_window=30, softcap=4.0, sinks=batch.sinks)
    output = backend.attend(as_given[2], batch.key_cache, batch.value_cache, packed, options)
    assert output.shape == (1, len(batch.query), 4, 16)
    torch.testing.assert_close(output[0].double(), batch.expected(), rtol=2e-5, atol=2e-5)
    backend.close()


def test_the_backend_says_what_keeps_its_kernels_from_running():
    with pytest.raises(RuntimeError, match="do not run here"):
        TritonBackend().check(torch.device("meta"))


def test_walks_are_split_where_few_programs_would_go_far():
    assert splits_for(n_programs=8, n_tokens=100_000, n_processors=132) == 32
    assert splits_for(n_programs=8, n_tokens=2048, n_processors=132) == 8, "parts of 256 tokens at least"
    assert splits_for(n_programs=64, n_tokens=100_000, n_processors=132) == 4
    assert splits_for(n_programs=1000, n_tokens=100_000, n_processors=132) == 1, "they fill the device already"
    assert splits_for(n_programs=8, n_tokens=100, n_processors=132) == 1
    assert splits_for(n_programs=0, n_tokens=0, n_processors=1) == 1


#: Compiles each kernel for two generations of GPUs, which needs none: the interpreter takes much that the compiler refuses.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sllmdask.engine.kernels import triton_attention as kernels

INT64 = {"new_slots"}
INT32 = {"block_tables", "context_lens", "cu_seqlens"}
FLOAT32 = {"maxima", "sums", "parts"}

def compile_(kernel, dtype, pointers, floats, constants, capability):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            split_output = name == "output" and constants.get("is_split")
            element = "i64" if name in INT64 else "i32" if name in INT32 else "fp32" if name in FLOAT32 or split_output else dtype
            types[name] = "*" + element
        else:
            types[name] = "fp32" if name in floats else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    print(kernel.__name__, dtype, capability, compiled.metadata.shared)

POINTERS = {"query", "key_cache", "value_cache", "output", "sinks"} | INT32 | FLOAT32
HEADS = [("bf16", True, 128, 128, 8, True), ("fp32", False, 24, 16, 7, False), ("fp16", False, 192, 128, 1, True)]
for capability in (80, 90):
    for dtype, one_row, key_dim, value_dim, group, every in HEADS:
        pads = {"key_pad": kernels._padded(key_dim), "value_pad": kernels._padded(value_dim)}
        dims = {"block_size": 16, "key_dim": key_dim, "value_dim": value_dim, **pads}
        tile = kernels._tile_shape(one_row, *pads.values(), 4 if dtype == "fp32" else 2)
        features = {name: every for name in ("has_window", "has_softcap", "has_sinks")}
        walk = dict(zip(("n_pairs", "n_tokens"), tile), one_row=one_row, is_split=one_row, upcast=False, n_heads=8, group=group)
        compile_(kernels._attend, dtype, POINTERS, {"scaling", "softcap"}, {**dims, **walk, **features}, capability)
    parts = {"n_heads": 8, "splits_pad": 8, "value_dim": 80, "value_pad": 128, "has_sinks": True}
    compile_(kernels._combine, "bf16", POINTERS, set(), parts, capability)
    compile_(kernels._store, "bf16", {"key", "value", "key_cache", "value_cache", "new_slots"}, set(), dims, capability)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_fit_into_their_shared_memory(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    compiled = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    sizes = [int(line.split()[-1]) for line in compiled.stdout.splitlines()]
    assert len(sizes) == 2 * 5
    assert max(sizes) <= 99 * 1024, "what the smallest of these GPUs gives a program"
