"""Decode steps over buffers that stay in place. On the CPU nothing is recorded; the buffers and the padding are the same."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sllmdask.engine.attention import AttentionOptions
from sllmdask.engine.graphs import DecodeGraphs, DecodeInputs, NoRecorder, Recorder

BLOCK_SIZE, VOCAB, DIM = 4, 50, 6
CPU = torch.device("cpu")
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


class Summer:
    """A model whose answer depends on all that it may read: a row's logits are the sum of what its tokens put into the cache.

    A token puts its embedding, times its position plus one.
    """

    def __init__(self, n_blocks: int, device: torch.device = CPU) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).to(device)
        self.cache = torch.zeros(n_blocks, BLOCK_SIZE, DIM, dtype=torch.float64, device=device)
        self.batch_sizes: list[int] = []

    def __call__(self, inputs: DecodeInputs) -> Tensor:
        self.batch_sizes.append(len(inputs.rows))
        new = self.embeddings[inputs.ids[0]] * (inputs.positions[0] + 1)[:, None]
        self.cache.flatten(0, 1).index_copy_(0, inputs.new_slots, new)
        n_tokens = inputs.max_context
        token = torch.arange(n_tokens, device=new.device)
        seen = token < inputs.context_lens[:, None]
        blocks = inputs.block_tables[:, : n_tokens // BLOCK_SIZE].repeat_interleave(BLOCK_SIZE, 1)
        values = self.cache[blocks, token % BLOCK_SIZE].masked_fill(~seen[..., None], 0.0)
        return values.sum(1)[inputs.rows]


class Conversation:
    """Sequences that grow by a token a step, and what their logits must be."""

    def __init__(self, n_sequences: int, seed: int, max_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self.rng = random.Random(seed)
        free = list(range(1, n_sequences * max_blocks + 1))
        self.rng.shuffle(free)
        self.tables = [[free.pop() for _ in range(max_blocks)] for _ in range(n_sequences)]
        self.tokens: list[list[int]] = [[] for _ in range(n_sequences)]

    def step(self, members: list[int]) -> tuple[list[int], list[int], SimpleNamespace]:
        ids = [self.rng.randrange(VOCAB) for _ in members]
        for member, token in zip(members, ids, strict=True):
            self.tokens[member].append(token)
        lengths = [len(self.tokens[member]) for member in members]
        positions = [length - 1 for length in lengths]
        tables = torch.zeros(len(members), -(-max(lengths) // self.block_size), dtype=torch.int32)
        for row, member, length in zip(tables, members, lengths, strict=True):
            n_blocks = -(-length // self.block_size)
            row[:n_blocks] = torch.tensor(self.tables[member][:n_blocks])
        slots = [
            self.tables[member][position // self.block_size] * self.block_size + position % self.block_size
            for member, position in zip(members, positions, strict=True)
        ]
        return (
            ids,
            positions,
            SimpleNamespace(
                new_slots=torch.tensor(slots), context_lens=torch.tensor(lengths, dtype=torch.int32), block_tables=tables
            ),
        )

    def expected(self, members: list[int], embeddings: Tensor) -> Tensor:
        return torch.stack(
            [
                sum((embeddings[token] * (i + 1) for i, token in enumerate(self.tokens[member])), torch.zeros(DIM))
                for member in members
            ]
        )


def make(model: Callable[[DecodeInputs], Tensor], recorder: Recorder | None = None, **changes: int) -> DecodeGraphs:
    sizes = {"max_running": 11, "max_blocks": 300, "block_size": BLOCK_SIZE, **changes}
    return DecodeGraphs(model, device=CPU, recorder=recorder, **sizes)


def test_batch_sizes_double_and_widths_grow_up_to_the_largest():
    graphs = make(Summer(1))
    assert graphs.batch_sizes == (1, 2, 4, 8, 11)
    assert graphs.widths == (64, 256, 300)
    small = make(Summer(1), max_running=1, max_blocks=64)
    assert small.batch_sizes == (1,)
    assert small.widths == (64,)


@pytest.mark.parametrize("seed", range(2))
def test_steps_of_changing_members_give_each_its_own_logits(seed: int):
    n_sequences, max_blocks = 11, 80
    talk = Conversation(n_sequences, seed, max_blocks)
    model = Summer(1 + n_sequences * max_blocks)
    graphs = make(model, max_blocks=max_blocks)
    for _ in range(300):
        members = talk.rng.sample(range(n_sequences), talk.rng.randint(1, n_sequences))
        logits = graphs.run(*talk.step(members))
        assert logits is not None
        torch.testing.assert_close(logits, talk.expected(members, model.embeddings))
    assert set(model.batch_sizes) == {1, 2, 4, 8, 11}
    assert graphs.recorded <= {(size, width) for size in (1, 2, 4, 8, 11) for width in (64, 80)}


def test_rows_that_belong_to_nobody_write_to_no_block_but_the_first():
    talk = Conversation(5, 0, 4)
    model = Summer(40)
    graphs = make(model)
    graphs.run(*talk.step([0, 1, 2, 3, 4]))
    before = model.cache.clone()
    ids, positions, step = talk.step([3])
    graphs.run(ids, positions, step)
    graphs.run(*talk.step([0, 1, 2]))
    written = (model.cache != before).any(-1).flatten().nonzero().flatten()
    mine = {talk.tables[member][0] * BLOCK_SIZE + 1 for member in (0, 1, 2, 3)}
    assert {int(slot) for slot in written} - set(range(BLOCK_SIZE)) == mine


def test_a_recording_is_made_once_for_a_size_and_a_width_and_reads_the_same_memory():
    recorded: list[Callable[[], Tensor]] = []

    class Counting(NoRecorder):
        def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            recorded.append(run)
            return run

    seen: list[tuple[int, ...]] = []
    model = Summer(1 + 4 * 80)

    def run(inputs: DecodeInputs) -> Tensor:
        tensors = (inputs.ids, inputs.positions, inputs.new_slots, inputs.context_lens, inputs.block_tables)
        seen.append(tuple(tensor.data_ptr() for tensor in tensors))
        return model(inputs)

    talk = Conversation(4, 1, 80)
    graphs = make(run, Counting(), max_blocks=80)
    for members in ([0], [1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2]):
        graphs.run(*talk.step(members))
    assert graphs.recorded == {(1, 64), (2, 64), (4, 64)}
    assert len(recorded) == 3
    assert len(set(seen)) == 1
    for _ in range(64 * BLOCK_SIZE):
        logits = graphs.run(*talk.step([3]))
    assert logits is not None
    torch.testing.assert_close(logits, talk.expected([3], model.embeddings))
    assert graphs.recorded == {(1, 64), (2, 64), (4, 64), (1, 80)}


def test_a_step_that_is_too_large_is_left_to_the_caller():
    model = Summer(1000)
    graphs = make(model, max_running=2, max_blocks=3)
    talk = Conversation(3, 0, 4)
    assert graphs.run(*talk.step([0, 1, 2])) is None
    for _ in range(11):
        assert graphs.run(*talk.step([0])) is not None
    assert graphs.run(*talk.step([0])) is None, "the fourth block"


def test_where_recording_fails_steps_are_left_to_the_caller_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture):
    class Narrow(NoRecorder):
        """Has no memory left after its first recording."""

        n_left = 1

        def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            if not self.n_left:
                raise RuntimeError("CUDA out of memory")
            self.n_left -= 1
            return run

    model = Summer(100)
    graphs = make(model, Narrow())
    talk = Conversation(4, 0, 8)
    with caplog.at_level(logging.WARNING):
        assert graphs.run(*talk.step([0])) is not None
        assert graphs.run(*talk.step([0, 1])) is None
        assert graphs.run(*talk.step([0, 1, 2])) is None
    assert [record.getMessage() for record in caplog.records] == [
        "decode steps of other sizes run without CUDA graphs: sequences=2 blocks=64 cause=RuntimeError('CUDA out of memory')"
    ]
    logits = graphs.run(*talk.step([3]))
    assert logits is not None, "what was recorded stays"
    torch.testing.assert_close(logits, talk.expected([3], model.embeddings))


def test_closed_graphs_run_nothing():
    model = Summer(100)
    graphs = make(model)
    talk = Conversation(1, 0, 8)
    assert graphs.run(*talk.step([0])) is not None
    graphs.close()
    assert graphs.recorded == frozenset()
    assert graphs.run(*talk.step([0])) is None
    assert len(model.batch_sizes) == 1


# --- on a GPU ------------------------------------------------------------------------------------------------------------


class Layers:
    """A few layers of attention over a paged cache, by the Triton kernels, and what lies between them."""

    n_layers, n_heads, n_kv_heads, head_dim, n_blocks, block_size = 3, 8, 2, 64, 400, 16

    def __init__(self, dtype: torch.dtype) -> None:
        from sllmdask.engine.kernels.triton_attention import TritonBackend

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * 0.1).to(dtype).cuda()

        width = self.n_heads * self.head_dim
        self.embeddings = draw(VOCAB, width)
        self.inward = [draw(width, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim) for _ in range(self.n_layers)]
        self.outward = [draw(width, width) for _ in range(self.n_layers)]
        shape = (self.n_blocks, self.block_size, self.n_kv_heads, self.head_dim)
        self.caches = [tuple(torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2)) for _ in range(self.n_layers)]
        self.backend = TritonBackend()

    def __call__(self, inputs: DecodeInputs) -> Tensor:
        options = AttentionOptions(self.head_dim**-0.5)
        hidden = self.embeddings[inputs.ids]
        sizes = [heads * self.head_dim for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        for (keys, values), inward, outward in zip(self.caches, self.inward, self.outward, strict=True):
            query, key, value = (
                part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (hidden @ inward).split(sizes, -1)
            )
            self.backend.store(key, value, keys, values, inputs)
            attended = self.backend.attend(query, keys, values, inputs, options)
            hidden = hidden + torch.tanh(attended.flatten(2) @ outward)
        return (hidden[0] @ self.embeddings.T)[inputs.rows]


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.fixture(autouse=True)
    def _needs_triton(self):
        pytest.importorskip("triton")

    def make(self, model: Callable[[DecodeInputs], Tensor], recorder: Recorder | None = None) -> DecodeGraphs:
        device = torch.device("cuda", torch.cuda.current_device())
        return DecodeGraphs(model, max_running=6, max_blocks=66, block_size=16, device=device, recorder=recorder)

    def conversation(self, seed: int) -> Conversation:
        talk = Conversation(6, seed, 66, block_size=16)
        for i, tokens in enumerate(talk.tokens):
            # Some are long from the start; what is in the cache there is zeros.
            tokens += [0] * (150 * i)
        return talk

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.inference_mode()
    def test_a_replayed_graph_gives_the_bits_of_the_same_step_run_eagerly(self, dtype: torch.dtype):
        recorded, eager = self.make(Layers(dtype)), self.make(Layers(dtype), NoRecorder())
        talk = self.conversation(0)
        for _ in range(60):
            step = talk.step(talk.rng.sample(range(6), talk.rng.randint(1, 6)))
            logits, expected = recorded.run(*step), eager.run(*step)
            assert logits is not None and expected is not None
            assert logits.isfinite().all() and logits.equal(expected)
        assert {size for size, _ in recorded.recorded} == {1, 2, 4, 6}
        recorded.close()

    @torch.inference_mode()
    def test_what_a_graph_took_is_free_when_it_is_closed(self):
        model = Layers(torch.float32)
        talk = self.conversation(1)
        warm = self.make(model)
        warm.run(*talk.step([0]))
        warm.close()
        del warm
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs = self.make(model)
        for members in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4]):
            graphs.run(*talk.step(members))
        assert len(graphs.recorded) == 4
        graphs.close()
        del graphs
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before

    @torch.inference_mode()
    def test_a_step_that_waits_for_the_device_cannot_be_recorded_and_goes_on_eagerly(self, caplog: pytest.LogCaptureFixture):
        model = Layers(torch.float32)

        def waits(inputs: DecodeInputs) -> Tensor:
            assert int(inputs.context_lens.max()) > 0
            return model(inputs)

        graphs = self.make(waits)
        talk = self.conversation(2)
        with caplog.at_level(logging.WARNING):
            assert graphs.run(*talk.step([0, 1])) is None
        assert "without CUDA graphs" in caplog.text
        step = talk.step([0, 1])
        assert graphs.run(*step) is None
        # The device is none the worse for it.
        logits = self.make(model, NoRecorder()).run(*step)
        assert logits is not None and logits.isfinite().all()
        graphs.close()
