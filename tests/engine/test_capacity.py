"""How large a KV cache is, whether the books agree with what a process really has, and what happens when it gets no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmdask.batching.memory import Kind, MemoryLedger
from sllmdask.engine import runner as runner_module
from sllmdask.engine.embedding import build_embedding_engine
from sllmdask.engine.engine import build_engine
from sllmdask.engine.linears import can_pack
from sllmdask.errors import InsufficientMemory
from tests.engine.adapters import make_adapter
from tests.engine.encoders import make_encoder
from tests.engine.models import TinyModel, drain, make_engine, make_model, prompts, request, settings

MiB = 1024**2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def plenty(monkeypatch: pytest.MonkeyPatch, nbytes: int = 10**12) -> None:
    """As much memory as that is free on the host."""
    monkeypatch.setattr(runner_module, "device_memory", lambda _: (nbytes, nbytes))


def n_auto(model: TinyModel, ledger: MemoryLedger, **changes: Any) -> int:
    engine = build_engine(
        model.directory, model.tensors, settings(kv_memory="auto", **changes), memory=ledger.account("a", "llama")
    )
    stats = engine.stats()
    assert ledger.used == sum(engine._runner.memory.snapshot().values())
    assert stats.kv_nbytes == (stats.blocks_total + 1) * stats.bytes_per_block == engine._runner.memory.held(Kind.KV)
    engine.add(request("a", [1, 2, 3], 3))
    assert drain(engine)["a"] == model.generate([1, 2, 3], 3)
    engine.close()
    assert ledger.used == 0
    ledger._accounts["a"].close()
    return stats.blocks_total


# --- how many blocks -------------------------------------------------------------------------------------------------


def test_a_cache_takes_no_more_than_its_requests_can_use(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    plenty(monkeypatch)
    # 512 tokens in blocks of 16.
    assert n_auto(model, MemoryLedger(10**12), max_running=5) == 5 * 32
    assert n_auto(model, MemoryLedger(10**12), max_running=5, max_batch_tokens=3) == 3 * 32
    assert n_auto(model, MemoryLedger(10**12), max_running=5, block_size=100) == 5 * 6


def test_instances_of_one_worker_share_its_memory(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    plenty(monkeypatch)
    capacity = 20 * MiB
    sizes = [n_auto(model, MemoryLedger(capacity, n_shares), pack_weights="never") for n_shares in (1, 2)]
    per_block = make_engine(model).stats().bytes_per_block
    assert (sizes[0] - sizes[1]) * per_block == pytest.approx(capacity / 2, abs=2 * per_block)
    room = n_auto(model, MemoryLedger(capacity, 2), pack_weights="always")
    assert room <= sizes[1], "nothing is left for packed weights"


def test_on_a_cpu_caches_take_half_of_what_the_host_has_left(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    per_block = make_engine(model).stats().bytes_per_block
    plenty(monkeypatch, 40 * MiB)
    for n_shares in (1, 2):
        n_blocks = n_auto(model, MemoryLedger(10**12, n_shares), max_running=64)
        assert 0.5 * 20 * MiB / n_shares < n_blocks * per_block < 0.9 * 20 * MiB / n_shares


def test_one_long_request_may_take_more_than_a_share_but_not_more_than_there_is(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    plenty(monkeypatch)
    per_block = make_engine(model).stats().bytes_per_block
    probe = make_engine(model)
    others = probe._runner.memory.held(Kind.ACTIVATIONS)
    probe.close()
    least = 33 * per_block
    assert n_auto(model, MemoryLedger(others + least, 4)) == 32
    ledger = MemoryLedger(others + least - 1, 4)
    with pytest.raises(InsufficientMemory) as refused:
        n_auto(model, ledger)
    assert (refused.value.model, refused.value.needed, refused.value.available) == ("llama", least, least - 1)
    assert "512 tokens" in refused.value.message and "engine.kv_memory" in refused.value.message
    assert ledger.used == 0


def test_a_fixed_size_is_taken_as_it_is_or_refused(model: TinyModel):
    probe = make_engine(model, n_blocks=40)
    nbytes, others = probe.stats().kv_nbytes, probe._runner.memory.held(Kind.ACTIVATIONS)
    probe.close()
    ledger = MemoryLedger(others + nbytes)
    engine = build_engine(model.directory, model.tensors, settings(kv_memory=nbytes), memory=ledger.account("a"))
    assert (engine.stats().blocks_total, ledger.free) == (40, 0)
    with pytest.raises(InsufficientMemory):
        build_engine(model.directory, model.tensors, settings(kv_memory=nbytes), memory=ledger.account("b"))
    assert ledger.used == others + nbytes
    engine.close()
    assert ledger.used == 0


def test_weights_that_find_no_room_while_they_arrive_end_the_engine_with_numbers(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error code 12")

    monkeypatch.setattr(runner_module.ModelRunner, "_convert", fail)
    ledger = MemoryLedger(10**10)
    made = settings(dtype="bfloat16")
    engine = build_engine(model.directory, model.tensors, made, wait=lambda _: None, memory=ledger.account("a", "llama"))
    engine.add(request("a", [1, 2, 3]))
    with pytest.raises(InsufficientMemory) as refused:
        engine.step()
    assert refused.value.needed == 123
    engine.close()
    assert ledger.used == 0


# --- packing, adapters -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not can_pack(torch.float32), reason="torch packs no weights here")
def test_two_models_that_pack_at_once_do_not_take_more_than_there_is(model: TinyModel):
    probe = make_engine(model, pack_weights="always")
    packed, others = probe.stats().packed_nbytes, probe._runner.memory.used - probe.stats().packed_nbytes
    probe.close()
    ledger = MemoryLedger(2 * others + packed + packed // 2)
    first, second = (
        build_engine(model.directory, model.tensors, settings(pack_weights=when, pack_after=0), memory=ledger.account(when))
        for when in ("never", "always")
    )
    assert second.stats().packed_nbytes == second._runner.memory.held(Kind.PACKED) == packed
    third = None
    first.close()
    third = build_engine(model.directory, model.tensors, settings(pack_weights="always"), memory=ledger.account("third"))
    assert 0 < third.stats().packed_nbytes == third._runner.memory.held(Kind.PACKED) < packed
    assert third._runner._packer.full and ledger.used <= ledger.capacity
    for engine in (second, third):
        for i, prompt in enumerate(prompts(2)):
            engine.add(request(str(i), prompt, 8))
        assert drain(engine) == {str(i): model.generate(prompt, 8) for i, prompt in enumerate(prompts(2))}
        engine.close()
    assert ledger.used == 0


def test_adapters_count_where_they_are_copies_and_are_refused_where_there_is_no_room(model: TinyModel, tmp_path: Path):
    written = make_adapter(tmp_path, model, ("q_proj", "v_proj"))
    plain = make_engine(model)
    assert plain.read_adapter("a", tmp_path, written.tensors).copied_nbytes == 0
    ledger = MemoryLedger(10**10)
    engine = build_engine(model.directory, model.tensors, settings(dtype="bfloat16"), memory=ledger.account("a"))
    adapter = engine.read_adapter("a", tmp_path, written.tensors)
    before = ledger.used
    for _ in range(2):
        engine.add_adapter(adapter)
        assert ledger.used - before == adapter.copied_nbytes == adapter.nbytes > 0
    engine.remove_adapter(adapter.salt)
    engine.remove_adapter(adapter.salt)
    assert ledger.used == before
    ledger.capacity = before + adapter.nbytes - 1
    with pytest.raises(InsufficientMemory, match="max_adapters"):
        engine.add_adapter(adapter)
    assert len(engine._runner.adapters) == 0 and ledger.used == before


def test_an_embedding_model_is_in_the_books_like_any_other(tmp_path: Path):
    encoder = make_encoder(tmp_path, "bert", torch.bfloat16)
    ledger = MemoryLedger(10**10)
    engine = build_embedding_engine(tmp_path, encoder.tensors, settings(dtype="float32"), memory=ledger.account("a"))
    memory = engine._runner.memory.snapshot()
    parameters = sum(parameter.nbytes for parameter in engine._runner.model.parameters())
    assert memory.keys() == {"converted", "activations"} and memory["converted"] >= parameters
    engine.close()
    assert ledger.used == 0
    ledger.capacity = memory["converted"] - 1
    with pytest.raises(InsufficientMemory):
        build_embedding_engine(tmp_path, encoder.tensors, settings(dtype="float32"), memory=ledger.account("b"))
    assert ledger.used == 0


# --- what a process really has ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Measured in a process that nobody else allocates in, with the allocator told to give back at once what is large."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.engine.capacity_child", str(tmp_path_factory.mktemp("child"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["lent", "converted", "packed beside", "packed instead"])
def test_what_the_books_say_is_what_the_process_has(child: Any, how: str):
    measured = child["measured"][how]
    books = measured["books"]
    assert "packed" not in how or books["packed"] > 40 * MiB
    assert ("converted" in books) == (how in ("converted", "packed instead"))
    del books["activations"]  # nothing runs
    assert measured["held"] == pytest.approx(sum(books.values()), rel=0.02)
    assert measured["untouched"] == pytest.approx(sum(books.values()) - books["kv"], rel=0.02, abs=MiB), (
        "pages that nobody wrote to"
    )
    assert abs(measured["left"]) <= 0.02 * measured["held"]
    assert measured["left_in_books"] == 0


def test_an_engine_whose_process_gets_no_more_memory_gives_the_same_answers(child: Any):
    limited = child["limited"]
    assert limited["n_shortages"] > 0
    assert limited["same"]


def test_an_engine_that_cannot_be_built_for_want_of_memory_says_so_and_leaves_the_others_alone(child: Any):
    limited = child["limited"]
    (fixed, auto) = limited["refused"]
    assert fixed[0] == auto[0] == "large"
    assert fixed[2] < 64 * MiB and auto[2] < 64 * MiB
    assert limited["used"] == limited["own"]
