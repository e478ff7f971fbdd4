"""Steps that find no memory: the same tokens in smaller passes, and a refusal with numbers for who does not fit alone."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllmdask.batching.memory import Kind, MemoryAccount, MemoryLedger
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.scheduler import Chunk
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.engine.engine import LLMEngine, StepOutput, build_engine
from sllmdask.engine.parking import ParkedKV
from sllmdask.engine.shortage import N_GOOD_PASSES, PassBudget, asked_nbytes, cut, is_shortage
from sllmdask.errors import InsufficientMemory, StateRefused
from tests.engine.models import (
    VOCAB,
    TinyModel,
    assert_all_free,
    drain,
    make_engine,
    make_model,
    prompts,
    request,
    settings,
    tokens_of,
)

MiB = 1024**2
OF_CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5.00 MiB is free."
OF_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000 bytes."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


# --- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "nbytes"),
    [
        (MemoryError(), None),
        (torch.OutOfMemoryError(OF_CUDA), 20 * MiB),
        (RuntimeError(OF_CPU), 40000),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
    ids=["python", "cuda", "cpu", "cublas", "mmap"],
)
def test_want_of_memory_is_known_by_its_many_names(error: Exception, nbytes: int | None):
    assert is_shortage(error)
    assert asked_nbytes(error) == nbytes


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError(errno.ENOENT, "gone")])
def test_other_failures_are_not_want_of_memory(error: Exception):
    assert not is_shortage(error)


# --- smaller passes --------------------------------------------------------------------------------------------------


def shape_of(passes: list[tuple[Chunk, ...]]) -> list[list[tuple[str, int, int]]]:
    return [[(chunk.sequence.request_id, chunk.start, chunk.stop) for chunk in some] for some in passes]


@given(lengths=st.lists(st.integers(1, 9), max_size=6), n_tokens=st.integers(1, 12))
def test_passes_have_every_token_once_in_order_and_no_sequence_twice(lengths: list[int], n_tokens: int):
    chunks = [Chunk(Sequence(str(i), [1] * 20, SamplingParams()), i, length) for i, length in enumerate(lengths)]
    passes = cut(chunks, n_tokens)
    computed: dict[str, list[int]] = {}
    for some in passes:
        assert 0 < sum(chunk.n_tokens for chunk in some) <= n_tokens
        assert len({chunk.sequence.request_id for chunk in some}) == len(some)
        for chunk in some:
            computed.setdefault(chunk.sequence.request_id, []).extend(range(chunk.start, chunk.stop))
    assert computed == {chunk.sequence.request_id: list(range(chunk.start, chunk.stop)) for chunk in chunks}
    assert len(passes) == -(-sum(lengths) // n_tokens)
    # Cut again, what was cut comes out as if it had not been.
    assert shape_of(cut([chunk for some in passes for chunk in some], 3)) == shape_of(cut(chunks, 3))


def test_after_a_shortage_passes_are_small_for_a_while():
    budget = PassBudget(64)
    chunks = (Chunk(Sequence("a", [1] * 64, SamplingParams()), 0, 64),)
    assert budget.cut(chunks) == [chunks]
    for n_tokens in (64, 32):
        assert budget.short(n_tokens)
        assert {some[0].n_tokens for some in budget.cut(chunks)} == {n_tokens // 2}
    for n_tokens in (16, 32):
        assert len(budget.cut(chunks)) == 64 // n_tokens
        for _ in range(N_GOOD_PASSES):
            budget.passed()
    assert budget.cut(chunks) == [chunks]
    assert budget.n_shortages == 2
    assert not budget.short(1)


# --- the engine ------------------------------------------------------------------------------------------------------


def limit_passes(engine: LLMEngine, fits: Callable[[torch.Tensor], bool], error: Callable[[], Exception]) -> list[int]:
    """Let the allocator fail in each pass whose tokens do not fit, deep in the model; returns the sizes of those that did."""
    sizes: list[int] = []

    def allocate(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        ids = kwargs["input_ids"]
        if not fits(ids):
            raise error()
        sizes.append(ids.numel())

    engine._runner.model.register_forward_pre_hook(allocate, with_kwargs=True)
    return sizes


@pytest.mark.parametrize(
    "error", [lambda: torch.OutOfMemoryError(OF_CUDA), lambda: RuntimeError(OF_CPU), MemoryError], ids=["cuda", "cpu", "python"]
)
def test_a_step_that_does_not_fit_runs_in_parts_with_the_same_tokens(model: TinyModel, error: Callable[[], Exception]):
    asked = prompts(6, 20, 80)
    params: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}] * 3
    expected = {}
    for i, prompt in enumerate(asked):
        alone = make_engine(model)
        alone.add(request(str(i), prompt, **params[i]))
        expected |= drain(alone)
    engine = make_engine(model, max_batch_tokens=128)
    sizes = limit_passes(engine, lambda ids: ids.numel() <= 7, error)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, **params[i]))
    assert drain(engine) == expected
    assert max(sizes) <= 7
    # It is not tried again and again: 128 is halved to 4, and doubled after a while.
    assert 5 <= engine.stats().n_shortages <= 5 + len(sizes) // N_GOOD_PASSES
    assert_all_free(engine)


def test_log_probabilities_of_a_prompt_are_told_once_however_it_is_cut(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    told = []
    for limit in (1000, 9):
        engine = make_engine(model)
        limit_passes(engine, lambda ids, limit=limit: ids.numel() <= limit, MemoryError)  # type: ignore[misc]
        engine.add(request("a", prompt, 3, prompt_logprobs=2, logprobs=1))
        outputs: list[StepOutput] = []
        drain(engine, outputs)
        told.append(
            [
                (output.token_id, output.prompt_logprobs and [each.top_ids for each in output.prompt_logprobs])
                for output in outputs
            ]
        )
    assert told[0] == told[1]
    assert len(told[0][0][1] or ()) == 59


def test_a_request_that_does_not_fit_alone_fails_with_numbers_and_the_others_go_on(model: TinyModel):
    asked = prompts(4, 10, 30)
    expected = {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    used = {token for i, prompt in enumerate(asked) for token in prompt + expected[str(i)]}
    poison = next(token for token in range(VOCAB) if token not in used)
    engine = make_engine(model)
    limit_passes(engine, lambda ids: not bool((ids == poison).any()), lambda: torch.OutOfMemoryError(OF_CUDA))
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt))
        engine.add(request(f"bad-{i}", [*prompt, poison, *prompt]))
        outputs += engine.step()
    while engine.has_work:
        outputs += engine.step()
    failed = {output.request_id: output for output in outputs if output.error}
    assert set(failed) == {f"bad-{i}" for i in range(4)}
    for output in failed.values():
        assert output.finish_reason is FinishReason.ERROR and isinstance(output.error, InsufficientMemory)
        assert output.error.needed == 20 * MiB and output.error.available > 0
    assert tokens_of([output for output in outputs if not output.error]) == expected
    assert_all_free(engine)
    # Who could not be helped is gone, so steps are whole again.
    assert engine._budget.cut((Chunk(request("x", [1] * 100), 0, 100),))[0][0].n_tokens == 100


def test_parked_kv_is_dropped_before_a_request_is_given_up(model: TinyModel):
    first, second = prompts(2, 30, 40)
    engine = make_engine(model, n_blocks=30, block_size=4)
    outputs: list[StepOutput] = []
    for request_id, prompt in (("a", first), ("b", second)):
        engine.add(request(request_id, prompt))
        outputs += engine.step()
    engine.park_all()
    assert engine.stats().parked_nbytes > 0
    engine.resume_all()
    engine._scheduler.max_running = 1  # the other one waits, with its KV in host memory
    limit_passes(engine, lambda _: not engine._parked, MemoryError)
    drain(engine, outputs)
    assert tokens_of(outputs) == {"a": model.generate(first, 24), "b": model.generate(second, 24)}
    assert engine.stats().parked_nbytes == engine._runner.memory.held(Kind.PARKED) == 0


@pytest.mark.parametrize("when", ["parking", "returning"])
def test_kv_that_cannot_be_moved_for_want_of_memory_is_computed_again(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, when: str
):
    asked = prompts(3, 30, 60)
    engine = make_engine(model, block_size=8)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate([*asked, asked[0]]):  # the last one shares the blocks of the first
        engine.add(request(str(i), prompt))
        outputs += engine.step()
    runner = engine._runner

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError(OF_CPU)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "read_blocks" if when == "parking" else "write_blocks", fail)
        for request_id in ("0", "2", "3"):
            assert engine.park(request_id)
        for request_id in ("0", "2", "3"):
            assert engine.resume(request_id)
        outputs += engine.step()
    drain(engine, outputs)
    assert tokens_of(outputs) == {str(i): model.generate(prompt, 24) for i, prompt in enumerate([*asked, asked[0]])}
    assert_all_free(engine)
    assert runner.memory.held(Kind.PARKED) == 0


def test_a_copy_of_a_shared_block_that_cannot_be_made_is_computed_instead(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    [prompt] = prompts(1, 30, 30)
    engine = make_engine(model)
    calls = []

    def fail(sources: list[int], targets: list[int]) -> None:
        calls.append((sources, targets))
        raise MemoryError

    monkeypatch.setattr(engine._runner, "copy_blocks", fail)
    for sequence in request("a", prompt, 12).choices(3):
        engine.add(sequence)
    answers = drain(engine)
    assert calls
    assert answers == {name: model.generate(prompt, 12) for name in ("a", "a#1", "a#2")}
    assert_all_free(engine)


def test_a_request_that_finds_no_memory_where_it_goes_stays(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt))
    outputs = source.step()
    manifest = source.export_open("a", 1)
    small = make_engine(model, n_blocks=5)
    with pytest.raises(StateRefused, match=r"no memory: there is no room for 200 tokens, 13 blocks \(\d.* KiB\).* 5 \(.*free"):
        small.import_open(manifest, 200)
    target.import_open(manifest)
    chunk = source.export_read("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(target._runner, "write_tokens", lambda *_: (_ for _ in ()).throw(RuntimeError(OF_CPU)))
        with pytest.raises(StateRefused, match=r"it needs 39[.]1 KiB"):
            target.import_write("a", 1, chunk)
    assert target.import_abort("a", 1) and source.export_abort("a", 1)
    drain(source, outputs)
    assert tokens_of(outputs) == {"a": model.generate(prompt, 24)}
    assert_all_free(target)


# --- taking turns ----------------------------------------------------------------------------------------------------


def an_engine(model: TinyModel, account: MemoryAccount, n_blocks: int, **changes: Any) -> LLMEngine:
    probe = make_engine(model, n_blocks=n_blocks)
    kv_memory = probe.stats().kv_nbytes
    probe.close()
    return build_engine(model.directory, model.tensors, settings(kv_memory=kv_memory, **changes), memory=account)


def test_two_models_take_turns_with_memory_for_one_cache_and_go_on_where_they_stopped(tmp_path_factory: pytest.TempPathFactory):
    models = {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "qwen2")}
    asked = prompts(5, 20, 60)
    params: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}] * 3
    ledger = MemoryLedger(1000 * MiB)
    engines: dict[str, LLMEngine] = {}
    expected = {}
    for name, model in models.items():
        engine = engines[name] = an_engine(model, ledger.account(name), 40)
        # Host memory is another memory than the one that they share, as beside a GPU.
        engine._parked = engine._transfer._parked = ParkedKV(engine._runner.memory, counted=False)  # type: ignore[assignment]
        whole = make_engine(model)
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, **params[i]))
            whole.add(request(str(i), prompt, **params[i]))
        expected[name] = drain(whole)
        engine.park_all()
        assert ledger.used == sum(each._runner.memory.held(Kind.ACTIVATIONS) for each in engines.values())
    kv_nbytes = 41 * engines["llama"].stats().bytes_per_block
    ledger.capacity = ledger.used + kv_nbytes
    outputs: dict[str, list[StepOutput]] = {name: [] for name in engines}
    rng = random.Random(1)
    while any(engine.sequences for engine in engines.values()):
        for name, other in (("llama", "qwen2"), ("qwen2", "llama")):
            engines[name].resume_all()
            assert ledger.free == 0 and engines[name].stats().kv_nbytes == kv_nbytes
            with pytest.raises(InsufficientMemory) as refused:
                engines[other].resume_all()
            assert (refused.value.needed, refused.value.available) == (kv_nbytes, 0)
            assert engines[other].paused and not engines[other].has_work
            for _ in range(rng.randint(1, 6)):
                outputs[name] += engines[name].step()
            engines[name].park_all()
            assert ledger.free == kv_nbytes
    for name, engine in engines.items():
        assert tokens_of(outputs[name]) == expected[name]
        assert engine.stats().parked_nbytes == 0
        engine.close()
    assert ledger.used == 0


def test_what_is_parked_counts_where_host_memory_is_the_device(model: TinyModel):
    ledger = MemoryLedger(1000 * MiB)
    engine = an_engine(model, ledger.account("a"), 40)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(prompts(3, 20, 60)):
        engine.add(request(str(i), prompt))
    outputs += engine.step()
    n_used, nbytes = engine.stats().blocks_used, engine.stats().bytes_per_block
    before = ledger.used
    engine.park_all()
    assert ledger.used == before - (41 - n_used) * nbytes
    assert engine._runner.memory.snapshot().keys() == {"activations", "parked"}
    assert engine.stats().parked_nbytes == engine._runner.memory.held(Kind.PARKED) == n_used * nbytes
    engine.resume_all()
    drain(engine, outputs)
    assert tokens_of(outputs) == {str(i): model.generate(prompt, 24) for i, prompt in enumerate(prompts(3, 20, 60))}
    assert engine._runner.memory.held(Kind.PARKED) == 0


def test_where_the_books_have_no_room_nothing_is_parked(model: TinyModel):
    ledger = MemoryLedger(1000 * MiB)
    engine = an_engine(model, ledger.account("a"), 40)
    ledger.capacity = ledger.used
    [prompt] = prompts(1, 40, 40)
    engine.add(request("a", prompt))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert engine.park("a") and engine.stats().parked_nbytes == 0
    assert engine.stats().blocks_used == 0
    engine.resume("a")
    drain(engine, outputs)
    assert tokens_of(outputs) == {"a": model.generate(prompt, 24)}


@pytest.mark.parametrize("room", [0, 40])
def test_what_several_answers_share_is_parked_for_each_of_them_where_there_is_room(model: TinyModel, room: int):
    [prompt] = prompts(1, 60, 60)
    ledger = MemoryLedger(1000 * MiB)
    engine = an_engine(model, ledger.account("a"), 9, block_size=8)
    stats = engine.stats()
    assert stats.blocks_total == 19
    ledger.capacity = ledger.used + room * stats.bytes_per_block
    outputs: list[StepOutput] = []
    for sequence in request("a", prompt, 12).choices(4):
        engine.add(sequence)
    for _ in range(3):
        outputs += engine.step()
    engine.park_all()
    # Eight blocks each, seven of which are the same ones.
    n_parked = engine.stats().parked_nbytes // stats.bytes_per_block
    assert n_parked == 32 if room else 16 <= n_parked <= 20
    assert engine.stats().parked_nbytes == engine._runner.memory.held(Kind.PARKED)
    ledger.capacity += stats.kv_nbytes
    engine.resume_all()
    drain(engine, outputs)
    assert tokens_of(outputs) == {name: model.generate(prompt, 12) for name in ("a", "a#1", "a#2", "a#3")}


def test_through_a_random_life_the_books_say_what_the_engine_holds(model: TinyModel):
    rng = random.Random(2)
    ledger = MemoryLedger(1000 * MiB)
    engine = an_engine(model, ledger.account("a"), 12, block_size=8, max_batch_tokens=48)
    memory = engine._runner.memory
    ledger.capacity = ledger.used + 30 * engine.stats().bytes_per_block
    asked = prompts(14, 5, 80, seed=3)
    outputs: list[StepOutput] = []
    left, held = list(enumerate(asked)), set()
    while left or engine.sequences:
        match rng.choice(["add", "step", "step", "step", "park", "resume", "recompute", "all"]):
            case "add" if left:
                i, prompt = left.pop()
                engine.add(request(str(i), prompt, 10, priority=rng.randint(0, 1)))
            case "step" if not engine.paused:
                outputs += engine.step()
            case "park" if not engine.paused and engine.sequences:
                held.add(rng.choice(engine.sequences).request_id)
                for request_id in held:
                    engine.park(request_id)
            case "resume":
                while held:
                    engine.resume(held.pop())
            case "recompute" if engine.sequences:
                request_id = rng.choice(engine.sequences).request_id
                engine.recompute(request_id)
                held.discard(request_id)
            case "all":
                if not engine.paused:
                    engine.park_all()
                else:
                    try:
                        engine.resume_all()
                    except InsufficientMemory:
                        # What is parked is in the way.
                        for sequence in engine.sequences:
                            if sequence.request_id not in held:
                                engine.recompute(sequence.request_id)
        stats = engine.stats()
        assert stats.kv_nbytes == memory.held(Kind.KV) == (0 if engine.paused else 26 * stats.bytes_per_block)
        assert stats.parked_nbytes == memory.held(Kind.PARKED) == sum(rows.nbytes for rows in engine._parked.values())
        assert ledger.used == memory.held(Kind.KV) + memory.held(Kind.PARKED) + memory.held(Kind.ACTIVATIONS) <= ledger.capacity
    assert tokens_of(outputs) == {str(i): model.generate(prompt, 10) for i, prompt in enumerate(asked)}
    assert ledger.used - memory.held(Kind.ACTIVATIONS) in (0, engine.stats().kv_nbytes)
