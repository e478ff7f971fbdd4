"""Pieces of KV: the same bytes from wherever they are read, in blocks, kept or parked, and wherever they are written to."""

from __future__ import annotations

import mmap
import random
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from sllmdask.batching.memory import Kind
from sllmdask.engine import runner
from sllmdask.engine.engine import LLMEngine
from sllmdask.errors import InsufficientMemory, StateRefused
from tests.engine.models import TinyModel, assert_all_free, drain, make_engine, make_model, prompts, request, tokens_of

#: Keys and values of one width; of two; and a model whose attention is not ours.
MODELS = ("llama", "deepseek_v3", "bloom")
#: Copied as bytes; as torch finds them, which is how it is done on a GPU.
HOW = ("bytes", "torch")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture
def model(models: dict[str, TinyModel]) -> TinyModel:
    return models["llama"]


def copied_by(how: str, engine: LLMEngine) -> LLMEngine:
    if how == "torch":
        engine._runner._memory.clear()
    return engine


def started(model: TinyModel, n_prompt: int = 61, n_steps: int = 3, **changes: Any) -> LLMEngine:
    """An engine in which request a has had some steps, and that has begun to give it away."""
    engine = scattered(make_engine(model, **{"block_size": 8, "prefix_reuse": False, **changes}))
    engine.add(request("a", prompts(1, n_prompt, n_prompt)[0]))
    for _ in range(n_steps):
        engine.step()
    engine.export_open("a", 1)
    return engine


def scattered(engine: LLMEngine) -> LLMEngine:
    """The blocks that are free are no neighbours any more, as after some hours."""
    size, names = engine.settings.block_size, [f"brief {number}" for number in range(20)]
    for name in names:
        engine.add(request(name, [1] * (size - 2)))
    engine.step()
    for name in names[::2] + names[1::2]:
        engine.abort(name)
    return engine


def kv_of(engine: LLMEngine, blocks: Sequence[int], n_tokens: int) -> list[list[bytes]]:
    """Of each layer, keys, then values: the bytes of each token, found in the cache one by one."""
    size = engine.settings.block_size
    parts = [cache for layer in engine._runner.caches for cache in layer]
    return [
        [part[blocks[token // size], token % size].contiguous().view(torch.uint8).numpy().tobytes() for token in range(n_tokens)]
        for part in parts
    ]


def piece_of(kv: list[list[bytes]], since: int, stop: int) -> bytes:
    return b"".join(token for part in kv for token in part[since:stop])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_any_piece_has_the_bytes_of_its_tokens_wherever_they_are(models: dict[str, TinyModel], name: str, how: str, dtype: str):
    engine = copied_by(how, started(models[name], dtype=dtype))
    sequence = engine.find("a")
    assert sequence is not None and sequence.n_computed == 63
    table = sequence.block_table
    assert all(after - block not in (0, 1) for block, after in pairwise(table)), "a piece of two blocks is in two places"
    kv = kv_of(engine, table, 63)
    rng = random.Random(name + how + dtype)
    cuts = [(0, 63), (0, 1), (62, 63), (7, 9), (8, 16), (5, 6), (61, 63), *(sorted(rng.sample(range(64), 2)) for _ in range(25))]

    def read(since: int, stop: int) -> bytes:
        chunk = engine.export_read("a", 1, since, stop - since, whole=False)
        assert (chunk["since"], chunk["n_tokens"]) == (since, stop - since)
        data: bytes = chunk["data"]
        return data

    for since, stop in cuts:
        assert read(since, stop) == piece_of(kv, since, stop), "in blocks, of which more and more are kept"
    assert engine.park("a") and not sequence.block_table
    for since, stop in cuts:
        assert read(since, stop) == piece_of(kv, since, stop), "kept, but for the last block, which is parked"
    assert engine._transfer.relieve()
    for since, stop in cuts:
        assert read(since, stop) == piece_of(kv, since, stop), "parked, all of it"
        assert engine.export_freeze("a", 1, since)["kv"]["data"] == piece_of(kv, since, 63)
    engine.export_abort("a", 1)
    engine.abort("a")
    assert_all_free(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_pieces_of_any_cut_arrive_as_they_were_and_more_than_once(models: dict[str, TinyModel], name: str, how: str, dtype: str):
    """Into blocks of another size, of which the first are those of another request that began alike."""
    source = started(models[name], dtype=dtype)
    sequence = source.find("a")
    assert sequence is not None
    kv = kv_of(source, sequence.block_table, 63)
    target = scattered(copied_by(how, make_engine(models[name], dtype=dtype, block_size=16)))
    target.add(request("b", sequence.prompt_ids[:40], 60))
    target.step()
    [other] = target.sequences
    before = kv_of(target, other.block_table, other.n_computed)
    n_there = target.import_open(source.export_open("a", 1))["n_tokens"]
    assert n_there == 32, "two blocks of 16"
    rng = random.Random(name + how + dtype)
    while n_there < 63:
        # From before, or within, what is there.
        since = rng.randint(0, n_there)
        chunk = source.export_read("a", 1, since, rng.choice([1, 3, 8, 40]), whole=False)
        n_there = max(n_there, since + chunk["n_tokens"])
        for _ in range(rng.randint(1, 2)):
            assert target.import_write("a", 1, chunk) == {"n_tokens": n_there}
    incoming = target._transfer._imports["a"].incoming
    assert kv_of(target, other.block_table, other.n_computed) == before, "blocks that are shared are never written"
    arrived = kv_of(target, incoming.blocks, 63)
    assert [part[32:] for part in arrived] == [part[32:] for part in kv]
    # What is here was computed here, in the one step of the other request.
    assert [part[:32] for part in arrived] == [part[:32] for part in before]
    last = source.export_freeze("a", 1, 63)
    assert last["kv"]["n_tokens"] == 0
    assert target.import_commit("a", 1, last["state"], last["kv"]) and source.export_commit("a", 1)
    assert_all_free(source)
    if dtype == "float32":
        assert drain(target)["a"] == models[name].generate(sequence.prompt_ids, 24)[3:]


def test_of_what_is_not_computed_nothing_is_read_and_the_destination_keeps_what_it_has(model: TinyModel):
    """The source gives way after 63 tokens have gone, and is stopped before it has computed them again."""
    source, target = started(model, max_batch_tokens=16, n_steps=6), make_engine(model)
    sequence = source.find("a")
    assert sequence is not None and sequence.n_computed == 63
    target.import_open(source.export_open("a", 1))
    assert target.import_write("a", 1, source.export_read("a", 1, 0, whole=False)) == {"n_tokens": 63}
    assert source.recompute("a") and source._transfer.relieve()
    outputs = source.step()
    assert sequence.n_computed == 16
    for since in (16, 17, 63, 1000):
        for whole in (True, False):
            assert source.export_read("a", 1, since, whole=whole)["n_tokens"] == 0
    assert source.export_read("a", 1, 3, whole=False)["n_tokens"] == 13
    with pytest.raises(StateRefused, match="token 64 is beyond its 64 tokens"):
        source.export_freeze("a", 1, 64)
    last = source.export_freeze("a", 1, 63)
    assert (last["kv"]["n_tokens"], last["state"]["n_computed"]) == (0, 63)
    assert target.import_commit("a", 1, last["state"], last["kv"]) and source.export_commit("a", 1)
    arrived = target.find("a")
    assert arrived is not None and arrived.n_computed == 63
    assert drain(target, outputs)["a"] == model.generate(sequence.prompt_ids, 24)[3:]
    assert_all_free(source)


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_prompt_that_is_being_computed_the_computed_part_is_given(model: TinyModel, whole: bool):
    source = started(model, n_steps=2, max_batch_tokens=13)
    sequence = source.find("a")
    assert sequence is not None and sequence.n_computed == 26
    chunk = source.export_read("a", 1, 5, whole=whole)
    assert chunk["n_tokens"] == (24 if whole else 26) - 5
    assert chunk["data"] == piece_of(kv_of(source, sequence.block_table, 26), 5, 5 + chunk["n_tokens"])
    assert len(source._transfer._exports["a"].pinned) == 3, "a block that is not full is not kept"
    source.export_abort("a", 1)
    assert drain(source)["a"] == model.generate(sequence.prompt_ids, 24)
    assert_all_free(source)


# --- the memory that pieces are copied from ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["park_all", "close"])
def test_nothing_holds_the_memory_of_a_cache_whose_pieces_were_copied(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, end: str
):
    mappings: list[weakref.ref[mmap.mmap]] = []

    class Noted(mmap.mmap):
        def __init__(self, *_: Any) -> None:
            mappings.append(weakref.ref(self))

    monkeypatch.setattr(runner.mmap, "mmap", Noted)
    source, target = started(model), make_engine(model)
    target.import_open(source.export_open("a", 1))
    kept = source.export_read("a", 1, 0, 8), source.export_read("a", 1, 8, whole=False)
    for chunk in kept:
        target.import_write("a", 1, chunk)
    source.export_abort("a", 1)
    target.import_abort("a", 1)
    assert len(mappings) == 2 and all(mapping() is not None for mapping in mappings)
    for engine in (source, target):
        getattr(engine, end)()
    assert all(mapping() is None for mapping in mappings)


def test_a_cache_that_is_there_in_part_is_given_back_and_taken_anew(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    source = started(model)
    source.export_abort("a", 1)
    source.park_all()

    def fail(_: object) -> memoryview:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_memory", fail)
        with pytest.raises(InsufficientMemory):
            source.resume_all()
    assert source.paused and source.stats().kv_nbytes == source._runner.memory.held(Kind.KV) == 0
    source.resume_all()
    assert source.stats().kv_nbytes == source._runner.memory.held(Kind.KV) > 0
    outputs = source.step()
    drain(source, outputs)
    assert tokens_of(outputs)["a"] == model.generate(prompts(1, 61, 61)[0], 24)[3:]
