from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from sllmdask.engine.attention import (
    NAME,
    AttentionOptions,
    Backend,
    LayerProbe,
    PackedBatch,
    PagedBatch,
    Span,
    attending,
    dot_product_attention,
    make_backend,
)
from sllmdask.engine.kernels import cpu_attention
from sllmdask.errors import ConfigError
from tests.engine.models import VOCAB, make_model

D = 8
CPU = torch.device("cpu")
BACKENDS = ["sdpa", "numba"]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Written down from the formula, row by row. (Hq, n, D) over (Hkv, L, D) -> (n, Hq, D); the rows are the last n tokens."""
    n_heads, n_rows, _ = query.shape
    n_kv_heads, n_tokens, _ = key.shape
    output = torch.zeros(n_rows, n_heads, value.shape[-1])
    for head in range(n_heads):
        kv_head = head * n_kv_heads // n_heads
        for row in range(n_rows):
            position = n_tokens - n_rows + row
            first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
            scores = key[kv_head, first : position + 1] @ query[head, row] * options.scaling
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat((scores, options.sinks[head : head + 1]))
            output[row, head] = scores.softmax(0)[: position + 1 - first] @ value[kv_head, first : position + 1]
    return output


@dataclass
class Case:
    """Sequences with random keys and values, those of past tokens in a cache of their own, and the packed batch over them."""

    sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: PackedBatch

    def attend(self, backend: str | Backend, options: AttentionOptions) -> torch.Tensor:
        """(T, Hq, Dv)."""
        module = torch.nn.Module()
        module.layer_idx = 0  # type: ignore[assignment]
        chosen = make_backend(backend, CPU) if isinstance(backend, str) else backend
        output = PagedBatch(self.caches, self.batch, chosen).attend(
            module,
            torch.cat([query for query, *_ in self.sequences], 1)[None],
            torch.cat([key[:, n_past:] for _, key, _, n_past in self.sequences], 1)[None],
            torch.cat([value[:, n_past:] for _, _, value, n_past in self.sequences], 1)[None],
            options,
            {},
        )
        chosen.close()
        return output[0]


def make_case(sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]], block_size: int = 4, seed: int = 0) -> Case:
    """A batch of (query (Hq, n, D), key (Hkv, L, D), value (Hkv, L, Dv), tokens before) over scattered blocks."""
    _, key, value, _ = sequences[0]
    n_blocks = 1 + sum(-(-key.shape[1] // block_size) for _, key, _, _ in sequences)
    free = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(seed)).add(1).tolist()
    # Two more, so that block 0 and one block are nobody's.
    caches = [
        (
            torch.zeros(n_blocks + 1, block_size, key.shape[0], key.shape[2], dtype=key.dtype),
            torch.zeros(n_blocks + 1, block_size, value.shape[0], value.shape[2], dtype=value.dtype),
        )
    ]
    spans, tables, row = [], [], 0
    for query, key, value, n_past in sequences:
        n_tokens, n_new = key.shape[1], query.shape[1]
        assert n_tokens == n_past + n_new
        table = np.array([free.pop() for _ in range(-(-n_tokens // block_size))])
        slots = torch.from_numpy((table[:, None] * block_size + np.arange(block_size)).ravel()[:n_tokens])
        for cache, part in zip(caches[0], (key, value), strict=True):
            cache.flatten(0, 1)[slots[:n_past]] = part[:, :n_past].transpose(0, 1)
        spans.append(Span(row, row + n_new, n_past, slots))
        tables.append(table.astype(np.int32))
        row += n_new
    return Case(sequences, caches, PackedBatch(spans, tables, block_size))


def random_sequences(
    shapes: list[tuple[int, int]],
    n_heads: int = 4,
    n_kv_heads: int = 2,
    key_dim: int = D,
    value_dim: int = D + 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """One for each (tokens before, tokens now)."""
    torch.manual_seed(seed)
    return [
        (
            torch.randn(n_heads, n_new, key_dim).to(dtype),
            torch.randn(n_kv_heads, n_past + n_new, key_dim).to(dtype),
            torch.randn(n_kv_heads, n_past + n_new, value_dim).to(dtype),
            n_past,
        )
        for n_past, n_new in shapes
    ]


#: A decode, a fresh prompt, a middle chunk, a first token, longer ones; the ends of chunks of 32 and their neighbours.
SHAPES = [(9, 1), (0, 11), (6, 7), (0, 1), (30, 1), (31, 1), (32, 1), (63, 1), (0, 45), (40, 30), (100, 1)]
SINKS = torch.tensor([0.5, -1.0, 2.0, 7.0])

OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, sliding_window=5),
    AttentionOptions(0.3, sliding_window=1),
    AttentionOptions(0.3, sliding_window=100),
    AttentionOptions(0.3, softcap=2.0),
    AttentionOptions(0.3, sinks=SINKS),
    AttentionOptions(0.3, sliding_window=4, softcap=2.0, sinks=SINKS),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_a_packed_batch_attends_like_the_formula(options: AttentionOptions, n_kv_heads: int, backend: str):
    sequences = random_sequences(SHAPES, n_kv_heads=n_kv_heads)
    case = make_case(sequences)
    expected = torch.cat([plain(query, key, value, options) for query, key, value, _ in sequences])
    torch.testing.assert_close(case.attend(backend, options), expected, rtol=1e-4, atol=1e-5)
    assert not any(cache[0].any() for cache in case.caches[0]), "block 0 is nobody's"


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (24, 16), (192, 128), (5, 3), (16, 33)])
@pytest.mark.parametrize("n_heads", [2, 3, 10, 40])
def test_the_kernel_takes_heads_of_any_size_and_groups_of_any_number(key_dim: int, value_dim: int, n_heads: int):
    sequences = random_sequences([(33, 1), (0, 34), (20, 3)], n_heads, 1, key_dim, value_dim)
    options = AttentionOptions(key_dim**-0.5)
    expected = torch.cat([plain(query, key, value, options) for query, key, value, _ in sequences])
    torch.testing.assert_close(make_case(sequences, 16).attend("numba", options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_is_rounded_once_at_the_end(options: AttentionOptions, backend: str):
    sequences = random_sequences(SHAPES, dtype=torch.bfloat16, key_dim=24, value_dim=16)
    expected = torch.cat([plain(query.float(), key.float(), value.float(), options) for query, key, value, _ in sequences])
    found = make_case(sequences).attend(backend, options)
    assert found.dtype == torch.bfloat16
    if backend == "numba":
        # Half a unit in the last of eight places, and what float32 leaves open.
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_large_scores_neither_overflow_nor_are_lost():
    sequences = random_sequences([(50, 3), (70, 1)], key_dim=16, value_dim=16)
    options = AttentionOptions(60.0, sinks=torch.tensor([900.0, -900.0, 0.0, 100.0]))
    expected = torch.cat([plain(query, key, value, options) for query, key, value, _ in sequences])
    found = make_case(sequences).attend("numba", options)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


# --- a row's bits ----------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    n_threads = torch.get_num_threads()
    monkeypatch.setattr(cpu_attention, "_WORK_OF_THREAD", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


ROW_OPTIONS = [
    AttentionOptions(0.2),
    AttentionOptions(0.2, sliding_window=37),
    AttentionOptions(0.2, softcap=3.0, sinks=torch.linspace(-2, 2, 6)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ROW_OPTIONS, ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_a_row_has_the_same_bits_in_a_prompt_in_any_chunk_and_alone(
    options: AttentionOptions, n_kv_heads: int, dtype: torch.dtype
):
    n_tokens = 131
    [(query, key, value, _)] = random_sequences([(0, n_tokens)], 6, n_kv_heads, 40, 48, dtype)
    whole = make_case([(query, key, value, 0)], 16).attend("numba", options)
    for cuts in ([0, 50, 51, 64, 96, 131], [0, 1, 2, 3, 7, 33, 100, 129, 131], [*range(132)]):
        parts = [
            make_case([(query[:, start:stop], key[:, :stop], value[:, :stop], start)], 8, seed=stop).attend("numba", options)
            for start, stop in itertools.pairwise(cuts)
        ]
        assert bits(torch.cat(parts)) == bits(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ROW_OPTIONS, ids=str)
def test_a_row_has_the_same_bits_beside_any_neighbours_and_on_any_number_of_threads(
    options: AttentionOptions, dtype: torch.dtype, two_threads: None
):
    sequences = random_sequences([(20, 1), (0, 70), (64, 9), (150, 1), (31, 33)], 6, 2, 24, 16, dtype)
    backend = make_backend("numba", CPU)
    together = make_case(sequences, 8, seed=1).attend(backend, options)
    torch.set_num_threads(1)
    alone = [make_case([sequence], 16, seed=2).attend("numba", options) for sequence in sequences]
    assert bits(torch.cat(alone)) == bits(together)


def test_several_threads_are_used_where_there_is_work_for_them(two_threads: None):
    backend = cpu_attention.NumbaBackend()
    case = make_case(random_sequences([(20, 5), (9, 1)]))
    output = backend.attend(torch.randn(1, 4, 6, D), *case.caches[0], case.batch, OPTIONS[0])
    assert output.shape == (1, 6, 4, D + 2)
    assert backend._pool is not None
    backend.close()
    assert backend._pool is None


@pytest.mark.parametrize("n_rows", [1, 3, 4, 9])
def test_what_is_not_a_number_reaches_the_rows_that_see_it_and_no_other(n_rows: int):
    [(query, key, value, _)] = random_sequences([(0, 60)], key_dim=16, value_dim=16)
    for part in (key, value):
        spoilt = part.clone()
        spoilt[:, 40] = torch.nan
        given = (query, spoilt if part is key else key, spoilt if part is value else value)
        clean = make_case([(query, key, value, 0)]).attend("numba", OPTIONS[0])
        case = make_case([(given[0][:, 60 - n_rows - 15 :], given[1], given[2], 60 - n_rows - 15)])
        found = case.attend("numba", OPTIONS[0])
        before = max(0, 40 - (60 - n_rows - 15))
        assert bits(found[:before]) == bits(clean[60 - n_rows - 15 : 40] if before else clean[:0])
        assert found[before:].isnan().all()


# --- the batch, masks, and the hook ----------------------------------------------------------------------------------


def test_a_batch_says_where_each_sequence_is():
    case = make_case(random_sequences([(9, 1), (0, 6), (3, 2)]), block_size=4)
    batch = case.batch
    assert batch.cu_seqlens.tolist() == [0, 1, 7, 9]
    assert batch.context_lens.tolist() == [10, 6, 5]
    assert (batch.cu_seqlens.dtype, batch.context_lens.dtype, batch.block_tables.dtype) == (torch.int32,) * 3
    assert batch.block_tables.shape == (3, 3)
    assert batch.block_tables[1, 2] == batch.block_tables[2, 2] == 0
    assert (batch.n_tokens, batch.max_rows, batch.max_context) == (9, 6, 10)
    expected = [
        int(batch.block_tables[number, position // 4]) * 4 + position % 4
        for number, span in enumerate(batch.spans)
        for position in range(span.n_past, span.n_context)
    ]
    assert batch.new_slots.tolist() == expected
    made = []
    assert batch.once("a", lambda: made.append(1) or len(made)) == batch.once("a", lambda: 7) == 1


def test_a_mask_is_made_once_per_window():
    span = Span(0, 3, 4, torch.arange(7))
    assert span.mask(None) is span.mask(None)
    assert span.mask(2) is span.mask(2)
    assert span.mask(2).tolist() == [[True, True, False, False], [False, True, True, False], [False, False, True, True]]


def test_a_result_does_not_depend_on_the_neighbours_in_the_batch():
    torch.manual_seed(1)
    query, key, value = torch.randn(1, 4, 1, D), torch.randn(1, 2, 20, D), torch.randn(1, 2, 20, D)
    one = dot_product_attention(query, key, value, OPTIONS[0], None)
    assert one.shape == (1, 1, 4, D)
    assert dot_product_attention(query, key, value, OPTIONS[0], None).equal(one)


def test_the_backend_of_a_cpu_is_the_compiled_one():
    assert {name: make_backend(name, CPU).name for name in ("auto", "numba", "sdpa")} == {
        "auto": "numba",
        "numba": "numba",
        "sdpa": "sdpa",
    }


def test_a_backend_that_the_device_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="runs on the CPU only"):
        make_backend("numba", torch.device("cuda"))


@pytest.mark.parametrize("n_rows", [1, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_take_the_share_that_they_have_in_gpt_oss(n_rows: int, backend: str):
    [(query, key, value, _)] = sequences = random_sequences([(6 - n_rows, n_rows)], key_dim=16, value_dim=16)
    module = SimpleNamespace(num_key_value_groups=2, sinks=SINKS, training=False)
    mask = torch.full((n_rows, 6), -torch.inf).triu(6 - n_rows + 1)[None, None]
    expected, _ = eager_attention_forward(module, query[None], key[None], value[None], mask, 0.3)
    found = make_case(sequences).attend(backend, replace(OPTIONS[0], sinks=SINKS))
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


def test_sinks_are_no_reason_to_refuse_a_model():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    probe = LayerProbe()
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    meta = torch.empty(1, 4, 2, 16, device="meta")
    with attending(probe):
        ALL_ATTENTION_FUNCTIONS[NAME](module, meta, meta, meta, None, scaling=1.0, s_aux=torch.empty(4), position_bias=meta)
    assert probe.unknown == {"position_bias"}


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_without_a_batch_the_hook_is_plain_attention(tmp_path: Path, name: str):
    model = make_model(tmp_path, name).reference
    ids = torch.arange(60)[None] * 7 % VOCAB
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(NAME)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert whole.shape == (1, 65)


def test_triton_is_refused_by_name_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="'triton', which runs on GPUs, not on cpu"):
        make_backend("triton", CPU)
    monkeypatch.setattr("sllmdask.engine.attention.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="Triton is not installed"):
        make_backend("triton", torch.device("cuda"))


def test_where_triton_does_not_run_a_gpu_gathers_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("sllmdask.engine.attention.find_spec", lambda _name: None)
    assert make_backend("auto", torch.device("cuda")).name == "sdpa"
    assert "Triton is not installed" in caplog.text
