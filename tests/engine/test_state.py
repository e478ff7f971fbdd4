"""The state of a request as a value: it leaves one engine and enters another, stops and goes on, and the answer is the same."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch

from sllmdask.batching.params import choice_seed
from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.engine import LLMEngine, StepOutput
from sllmdask.engine.state import KVChunk, KVLayout, Manifest, RequestState
from sllmdask.errors import ContextTooLong, InvalidRequest, StateRefused
from tests.engine.models import TinyModel, assert_all_free, drain, make_engine, make_model, prompts, request, tokens_of

GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
each_way_of_sampling = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])

Step = Callable[[], list[StepOutput]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def alone(model: TinyModel, prompt: list[int], max_tokens: int = 24, **params: Any) -> list[int]:
    """The answer of a request that is alone in an engine that keeps nothing."""
    engine = make_engine(model, prefix_reuse=False)
    engine.add(request("alone", prompt, max_tokens, **params))
    return drain(engine)["alone"]


def wire(data: dict[str, Any]) -> dict[str, Any]:
    """What arrives at the other end of a connection."""
    return msgpack.unpackb(msgpack.packb(data))


def add_up(engine: LLMEngine) -> None:
    stats = engine.stats()
    assert stats.blocks_total == stats.blocks_free + stats.blocks_used + stats.blocks_reserved
    assert 0 <= stats.blocks_cached <= stats.blocks_free


def nothing_left(*engines: LLMEngine) -> None:
    for engine in engines:
        assert_all_free(engine)
        stats = engine.stats()
        assert (stats.blocks_used, stats.blocks_reserved, stats.parked_nbytes, stats.n_held) == (0, 0, 0, 0)


def move(source: LLMEngine, target: LLMEngine, name: str, epoch: int = 1, between: Step | None = None) -> None:
    """Move a request as two engines on two hosts do: whole blocks while it decodes, what is in the last one, then the rest."""
    since = target.import_open(wire(source.export_open(name, epoch)))["n_tokens"]
    while True:
        chunk = source.export_read(name, epoch, since, max_tokens=32)
        if not chunk["n_tokens"]:
            break
        since = target.import_write(name, epoch, wire(chunk))["n_tokens"]
        add_up(source)
        add_up(target)
        if between:
            between()
            if source.find(name) is None:
                source.export_abort(name, epoch)
                target.import_abort(name, epoch)
                return
    since = target.import_write(name, epoch, wire(source.export_read(name, epoch, since, whole=False)))["n_tokens"]
    last = wire(source.export_freeze(name, epoch, since))
    assert target.import_commit(name, epoch, last["state"], last["kv"])
    assert source.export_commit(name, epoch)


# --- from one engine to another --------------------------------------------------------------------------------------


@each_way_of_sampling
@pytest.mark.parametrize(("from_size", "to_size"), list(itertools.product([8, 16, 32], repeat=2)))
def test_a_moved_request_gives_the_answer_of_one_that_stayed(
    model: TinyModel, from_size: int, to_size: int, params: dict[str, Any]
):
    rng = random.Random(from_size * 100 + to_size)
    [prompt, other, third] = prompts(3, 30, 90, seed=from_size + to_size)
    expected = {"a": alone(model, prompt, 30, **params), "b": alone(model, other, 30), "c": alone(model, third, 30, seed=5)}
    source = make_engine(model, block_size=from_size, max_batch_tokens=24)
    target = make_engine(model, block_size=to_size, max_batch_tokens=24)
    outputs: list[StepOutput] = []
    source.add(request("a", prompt, 30, **params))
    source.add(request("b", other, 30))
    target.add(request("c", third, 30, seed=5))

    def step() -> list[StepOutput]:
        outputs.extend(source.step() + target.step())
        return outputs

    for _ in range(rng.randint(0, 12)):
        step()
    move(source, target, "a", between=step)
    while source.has_work or target.has_work:
        step()
    assert tokens_of(outputs) == expected
    nothing_left(source, target)


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 5, 9])
def test_nothing_is_computed_twice_wherever_the_request_was(model: TinyModel, n_steps: int):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model, max_batch_tokens=16), make_engine(model, block_size=8, max_batch_tokens=16)
    outputs: list[StepOutput] = []
    source.add(request("a", prompt))
    for _ in range(n_steps):
        outputs += source.step()
    sequence = source.find("a")
    assert sequence is not None
    n_computed, n_tokens = sequence.n_computed, sequence.n_tokens
    move(source, target, "a")
    arrived = target.find("a")
    assert arrived is not None and (arrived.n_computed, arrived.n_tokens) == (n_computed, n_tokens)
    outputs += target.step()
    assert arrived.n_computed == min(n_tokens, n_computed + 16)
    drain(target, outputs)
    assert tokens_of(outputs)["a"] == model.generate(prompt, 24)
    nothing_left(source, target)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mistral-window", "opt", "qwen3"])
def test_a_request_of_any_architecture_moves(tmp_path: Any, name: str):
    model = make_model(tmp_path, name)
    [prompt] = prompts(1, 50, 50, seed=2)
    source, target = make_engine(model), make_engine(model, block_size=8)
    source.add(request("a", prompt, 20))
    outputs = [output for _ in range(6) for output in source.step()]
    move(source, target, "a")
    drain(target, outputs)
    assert tokens_of(outputs)["a"] == model.generate(prompt, 20)
    nothing_left(source, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_arrives_bit_for_bit_through_blocks_of_any_size(model: TinyModel, dtype: str):
    [prompt] = prompts(1, 70, 70)
    engines = [make_engine(model, dtype=dtype, block_size=size) for size in (16, 8, 32, 16)]
    engines[0].add(request("a", prompt))
    for _ in range(4):
        engines[0].step()

    def kv(engine: LLMEngine, epoch: int) -> bytes:
        engine.export_open("a", epoch)
        data: bytes = engine.export_freeze("a", epoch)["kv"]["data"]
        engine.export_abort("a", epoch)
        return data

    before = kv(engines[0], 1)
    assert len(before) == 73 * engines[0].stats().bytes_per_block / 16
    for epoch, (source, target) in enumerate(itertools.pairwise(engines), 2):
        move(source, target, "a", epoch)
    assert kv(engines[-1], 9) == before


def test_of_a_block_that_is_not_full_what_is_there_is_sent_while_the_request_runs(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model), make_engine(model, block_size=8)
    source.add(request("a", prompt))
    outputs = [output for _ in range(3) for output in source.step()]
    assert target.import_open(wire(source.export_open("a", 1)))["n_tokens"] == 0
    n_there = []
    for _ in range(3):
        chunk = wire(source.export_read("a", 1, sum(n_there[-1:]), whole=False))
        n_there.append(target.import_write("a", 1, chunk)["n_tokens"])
        outputs += source.step()
    assert n_there == [42, 43, 44]
    # Again, from the middle of what is there.
    assert target.import_write("a", 1, wire(source.export_read("a", 1, 13, 20, whole=False)))["n_tokens"] == 44
    last = wire(source.export_freeze("a", 1, 44))
    assert last["kv"]["n_tokens"] == 1
    assert target.import_commit("a", 1, last["state"], last["kv"]) and source.export_commit("a", 1)
    drain(target, outputs)
    assert tokens_of(outputs)["a"] == model.generate(prompt, 24)
    nothing_left(source, target)


def test_a_request_wanders_between_crowded_engines_of_all_kinds(model: TinyModel):
    """Some are too small, so that requests give way, by recompute or by parking, while they are moved."""
    rng = random.Random(7)
    asked = prompts(10, 10, 70, seed=3)
    params = [SAMPLED if i % 2 else GREEDY for i in range(len(asked))]
    expected = {str(i): alone(model, prompt, 40, **params[i]) for i, prompt in enumerate(asked)}
    engines = [
        make_engine(model, n_blocks=38, block_size=8, max_batch_tokens=32),
        make_engine(model, n_blocks=20, block_size=16, max_batch_tokens=48, parking_memory=0, prefix_reuse=False),
        make_engine(model, n_blocks=14, block_size=32, max_batch_tokens=40),
    ]
    outputs: list[StepOutput] = []
    epochs = itertools.count(1)
    n_moved = 0
    for i, prompt in enumerate(asked):
        rng.choice(engines).add(request(str(i), prompt, 40, **params[i]))

    def step() -> list[StepOutput]:
        for engine in engines:
            outputs.extend(engine.step())
            add_up(engine)
        return outputs

    while any(engine.has_work for engine in engines):
        step()
        for _ in range(3):
            source, target = rng.sample(engines, 2)
            if not source.sequences:
                continue
            name, epoch = rng.choice(source.sequences).request_id, next(epochs)
            try:
                move(source, target, name, epoch, between=step if rng.random() < 0.3 else None)
                n_moved += 1
            except StateRefused:
                # No room there, or it came to the end of what is here. It stays.
                source.export_abort(name, epoch)
                target.import_abort(name, epoch)
    assert n_moved > 20
    assert sum(engine.stats().n_preemptions for engine in engines) > 0
    assert tokens_of(sorted(outputs, key=lambda output: output.index)) == expected
    nothing_left(*engines)


def test_what_the_other_engine_has_of_the_prompt_is_not_sent(model: TinyModel):
    [prompt] = prompts(1, 64, 64)
    source, target = make_engine(model), make_engine(model, block_size=8)
    target.add(request("before", prompt, 4))
    drain(target)
    source.add(request("a", prompt))
    for _ in range(3):
        source.step()
    ticket = target.import_open(source.export_open("a", 1))
    assert ticket["n_tokens"] == 64
    last = source.export_freeze("a", 1, ticket["n_tokens"])
    assert last["kv"]["n_tokens"] == 2
    assert target.import_commit("a", 1, wire(last["state"]), wire(last["kv"])) and source.export_commit("a", 1)
    assert drain(target)["a"] == model.generate(prompt, 24)[3:]
    nothing_left(source, target)


def test_the_tokens_alone_go_on_too(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt, **SAMPLED))
    before = [output.token_id for _ in range(7) for output in source.step()]
    source.export_open("a", 1)
    state = RequestState.from_wire(wire(source.export_freeze("a", 1)["state"]))
    target.add(state.sequence())
    source.export_commit("a", 1)
    assert before + drain(target)["a"] == alone(model, prompt, **SAMPLED)
    nothing_left(source, target)


def test_a_parked_request_moves_without_coming_back(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    source, target = make_engine(model), make_engine(model, block_size=32)
    source.add(request("a", prompt))
    before = [output.token_id for _ in range(5) for output in source.step()]
    assert source.park("a")
    move(source, target, "a")
    arrived = target.find("a")
    assert arrived is not None and arrived.n_computed == 44
    assert before + drain(target)["a"] == model.generate(prompt, 24)
    nothing_left(source, target)


# --- moves that do not come to their end -----------------------------------------------------------------------------

STAGES = ["open", "reserved", "half sent", "all sent", "frozen"]


@each_way_of_sampling
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n_steps", [1, 6])
def test_a_move_that_is_called_off_leaves_no_trace(model: TinyModel, stage: str, n_steps: int, params: dict[str, Any]):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model, max_batch_tokens=40), make_engine(model, block_size=8)
    outputs: list[StepOutput] = []
    source.add(request("a", prompt, **params))
    for _ in range(n_steps):
        outputs += source.step()
    started(source, target, stage)
    outputs += source.step()
    add_up(source)
    add_up(target)
    assert source.export_abort("a", 1)
    assert target.import_abort("a", 1) == (stage != "open")
    nothing_left(target)
    drain(source, outputs)
    assert tokens_of(outputs)["a"] == alone(model, prompt, **params)
    nothing_left(source)


def started(source: LLMEngine, target: LLMEngine, stage: str) -> None:
    """Bring the move of request a to `stage`."""
    manifest = wire(source.export_open("a", 1))
    if stage == "open":
        return
    target.import_open(manifest)
    if stage == "reserved":
        return
    target.import_write("a", 1, wire(source.export_read("a", 1, 0, max_tokens=16)))
    if stage == "half sent":
        return
    target.import_write("a", 1, wire(source.export_read("a", 1, 16)))
    if stage == "frozen":
        source.export_freeze("a", 1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_that_is_aborted_while_it_moves_leaves_no_trace(model: TinyModel, stage: str):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt))
    for _ in range(4):
        source.step()
    started(source, target, stage)
    assert source.abort("a")
    assert not source.has_work
    with pytest.raises(StateRefused):
        source.export_freeze("a", 1)
    # What was sent can be sent again, until the move is over.
    kept = source.export_read("a", 1)
    assert kept["n_tokens"] == {"open": 0, "reserved": 0, "half sent": 16}.get(stage, 48)
    source.export_abort("a", 1)
    target.import_abort("a", 1)
    nothing_left(source, target)


def test_what_was_sent_can_be_sent_again_after_the_request_gave_way(model: TinyModel):
    [prompt, other] = prompts(2, 60, 60)
    source = make_engine(model, n_blocks=7, prefix_reuse=False, parking_memory=0)
    source.add(request("a", prompt))
    source.step()
    source.export_open("a", 1)
    first = source.export_read("a", 1)
    assert first["n_tokens"] == 48
    source.add(request("b", other, 1, priority=1))
    outputs = source.step()
    sequence = source.find("a")
    assert sequence is not None and not sequence.block_table and sequence.n_preemptions == 1
    assert source.export_read("a", 1) == first
    # For each layer, keys, then values, of all tokens.
    parts = torch.frombuffer(bytearray(first["data"]), dtype=torch.uint8).view(2 * len(source._runner.layers), 3, -1)
    assert source.export_read("a", 1, 32) == KVChunk.of(32, 16, parts[:, 2].numpy().tobytes()).as_wire()
    last = source.export_freeze("a", 1, 48)
    assert last["state"]["n_computed"] == 48 and last["kv"]["n_tokens"] == 0
    source.export_abort("a", 1)
    drain(source, outputs)
    nothing_left(source)


def test_requests_come_before_what_is_only_kept_to_be_sent_again(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    source = make_engine(model, n_blocks=5, prefix_reuse=False)
    source.add(request("a", prompt, 10))
    outputs = source.step()
    source.export_open("a", 1)
    assert source.export_read("a", 1)["n_tokens"] == 48
    source.recompute("a")
    # Three of five blocks are kept, and it needs four.
    outputs += source.step()
    assert source.find("a").n_computed == 61  # type: ignore[union-attr]
    source.export_abort("a", 1)
    drain(source, outputs)
    assert tokens_of(outputs)["a"] == model.generate(prompt, 10)
    nothing_left(source)


def test_every_call_may_be_repeated(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model), make_engine(model, block_size=8)
    source.add(request("a", prompt))
    before = [output.token_id for _ in range(4) for output in source.step()]
    manifest = source.export_open("a", 1)
    assert source.export_open("a", 1) == manifest
    ticket = target.import_open(manifest)
    n_free = target.stats().blocks_free
    assert target.import_open(manifest) == ticket and target.stats().blocks_free == n_free
    chunk = source.export_read("a", 1)
    assert source.export_read("a", 1) == chunk
    assert target.import_write("a", 1, chunk) == target.import_write("a", 1, chunk) == {"n_tokens": 48}
    last = source.export_freeze("a", 1, 48)
    assert source.export_freeze("a", 1, 48) == last
    assert target.import_commit("a", 1, last["state"], last["kv"])
    assert not target.import_commit("a", 1, last["state"], last["kv"])
    assert source.export_commit("a", 1)
    assert not source.export_commit("a", 1)
    assert before + drain(target)["a"] == model.generate(prompt, 24)
    assert not target.import_commit("a", 1, last["state"], last["kv"]), "it has run and ended meanwhile"
    nothing_left(source, target)


def test_a_move_ends_in_one_way_only(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt))
    source.step()
    move(source, target, "a", epoch=5)
    for call in (lambda: source.export_abort("a", 5), lambda: target.import_abort("a", 5)):
        with pytest.raises(StateRefused, match="committed already"):
            call()
    manifest = target.export_open("a", 6)
    source.import_open(manifest)
    target.export_abort("a", 6)
    source.import_abort("a", 6)
    assert not source.import_abort("a", 6)
    with pytest.raises(StateRefused, match="aborted already"):
        target.export_commit("a", 6)
    target.abort("a")
    nothing_left(source, target)


def test_a_move_that_was_followed_by_another_is_stale(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    source, target = make_engine(model), make_engine(model)
    source.add(request("a", prompt))
    source.step()
    old = source.export_open("a", 1)
    target.import_open(old)
    new = source.export_open("a", 2)
    target.import_open(new)
    assert target.stats().blocks_reserved == 5, "one promise, not two"
    stale: list[Callable[[], object]] = [
        lambda: source.export_open("a", 1),
        lambda: source.export_read("a", 1),
        lambda: source.export_freeze("a", 1),
        lambda: source.export_commit("a", 1),
        lambda: target.import_open(old),
        lambda: target.import_write("a", 1, source.export_read("a", 2)),
        lambda: target.import_commit("a", 1, {}),
    ]
    for call in stale:
        with pytest.raises(StateRefused):
            call()
    move(source, target, "a", 2)
    assert drain(target)["a"] == model.generate(prompt, 24)[1:]
    with pytest.raises(StateRefused, match="over"):
        target.import_open(new)
    nothing_left(source, target)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def leaving(model: TinyModel) -> LLMEngine:
    """An engine in which request a has answered four tokens to a prompt of 60."""
    engine = make_engine(model)
    engine.add(request("a", prompts(1, 60, 60)[0]))
    for _ in range(4):
        engine.step()
    return engine


def test_the_state_of_another_model_is_refused(model: TinyModel, leaving: LLMEngine):
    target = make_engine(model)
    leaving.model_id = "llama@1"
    target.model_id = "llama@2"
    with pytest.raises(StateRefused, match="llama@1"):
        target.import_open(leaving.export_open("a", 1))
    target.model_id = "llama@1"
    assert target.import_open(leaving.export_open("a", 1))["same_numerics"]


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"num_key_value_heads": 4}], ids=["fewer layers", "more KV heads"])
def test_kv_of_another_shape_is_refused(tmp_path: Any, leaving: LLMEngine, changes: dict[str, Any]):
    target = make_engine(make_model(tmp_path, **changes))
    with pytest.raises(StateRefused, match="layers"):
        target.import_open(leaving.export_open("a", 1))
    nothing_left(target)


def test_kv_of_another_dtype_is_refused_and_the_tokens_go_on(model: TinyModel, leaving: LLMEngine):
    target = make_engine(model, dtype="bfloat16")
    with pytest.raises(StateRefused, match=r"float32.*bfloat16"):
        target.import_open(leaving.export_open("a", 1))
    target.add(RequestState.from_wire(leaving.export_freeze("a", 1)["state"]).sequence())
    assert len(drain(target)["a"]) == 20
    nothing_left(target)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda chunk: chunk.update(data=chunk["data"][:-1] + bytes([chunk["data"][-1] ^ 1])), "changed on its way"),
        (lambda chunk: chunk.update(data=chunk["data"][:-4]), "bytes"),
        (lambda chunk: chunk.update(n_tokens=64), "bytes"),
        (lambda chunk: chunk.update(since=1), "missing"),
        (lambda chunk: chunk.update(since=-1), "cannot be read"),
        (lambda chunk: chunk.pop("crc32"), "cannot be read"),
    ],
    ids=["one bit", "too short", "too few tokens", "a gap", "before the first", "no checksum"],
)
def test_a_damaged_piece_is_refused_and_the_next_one_taken(
    model: TinyModel, leaving: LLMEngine, damage: Callable[[dict[str, Any]], object], why: str
):
    target = make_engine(model)
    target.import_open(leaving.export_open("a", 1))
    chunk = leaving.export_read("a", 1)
    damaged = dict(chunk)
    damage(damaged)
    with pytest.raises(StateRefused, match=why):
        target.import_write("a", 1, damaged)
    assert target.import_write("a", 1, chunk)["n_tokens"] == 48
    move(leaving, target, "a")
    assert drain(target)["a"] == model.generate(prompts(1, 60, 60)[0], 24)[4:]
    nothing_left(leaving, target)


@pytest.mark.parametrize("key", ["format", "epoch", "layout", "token_ids", "salt"])
def test_a_manifest_that_is_not_whole_is_refused(model: TinyModel, leaving: LLMEngine, key: str):
    manifest = leaving.export_open("a", 1)
    target = make_engine(model)
    for broken in ({k: v for k, v in manifest.items() if k != key}, {**manifest, key: "?"}):
        with pytest.raises(StateRefused):
            target.import_open(broken)
    nothing_left(target)


def test_a_state_of_other_tokens_is_refused(model: TinyModel, leaving: LLMEngine):
    target = make_engine(model)
    target.import_open(leaving.export_open("a", 1))
    state = leaving.export_freeze("a", 1)["state"]
    for wrong in ({"prompt_ids": [1, *state["prompt_ids"][1:]]}, {"request_id": "b"}, {"salt": b"x"}, {"output_ids": []}):
        with pytest.raises(StateRefused):
            target.import_commit("a", 1, {**state, **wrong})
    with pytest.raises(InvalidRequest):
        target.import_commit("a", 1, {**state, "output_ids": [*state["output_ids"], 10**6]})
    assert target.import_commit("a", 1, state)
    assert drain(target)["a"] == model.generate(prompts(1, 60, 60)[0], 24)[4:]


def test_where_there_is_no_room_the_request_stays(model: TinyModel, leaving: LLMEngine):
    manifest = leaving.export_open("a", 1)
    with pytest.raises(StateRefused, match="no room"):
        make_engine(model, n_blocks=5).import_open(manifest, 200)
    with pytest.raises(ContextTooLong):
        make_engine(model, n_blocks=3).import_open(manifest)
    busy = make_engine(model, max_running=1)
    busy.add(request("b", [1, 2, 3]))
    busy.step()
    with pytest.raises(StateRefused, match="no room"):
        busy.import_open(manifest)
    present = make_engine(model)
    present.add(request("a", [1, 2, 3]))
    with pytest.raises(InvalidRequest, match="already"):
        present.import_open(manifest)
    leaving.export_abort("a", 1)
    assert drain(leaving)["a"] == model.generate(prompts(1, 60, 60)[0], 24)[4:]


def test_room_that_is_gone_at_the_end_refuses_the_end_only(model: TinyModel, leaving: LLMEngine):
    target = make_engine(model, n_blocks=6)
    target.import_open(leaving.export_open("a", 1), 64)
    target.add(request("b", [5] * 30, 30))
    outputs = target.step()
    assert target.stats().blocks_free == 0
    outputs += [output for _ in range(2) for output in leaving.step()]
    last = leaving.export_freeze("a", 1)
    with pytest.raises(StateRefused, match="no room"):
        target.import_commit("a", 1, last["state"], last["kv"])
    target.import_abort("a", 1)
    leaving.export_abort("a", 1)
    drain(leaving)
    drain(target)
    nothing_left(leaving, target)


def test_while_a_request_leaves_nobody_else_decides_about_it(model: TinyModel, leaving: LLMEngine):
    leaving.export_open("a", 1)
    with pytest.raises(StateRefused):
        leaving.export_commit("a", 1)
    leaving.export_freeze("a", 1)
    for call in (leaving.park, leaving.resume, leaving.recompute):
        with pytest.raises(StateRefused):
            call("a")
    with pytest.raises(StateRefused):
        leaving.park_all()
    assert not leaving.has_work and leaving.step() == []
    leaving.close()


def test_the_wire_has_plain_types_and_comes_back_as_it_was():
    layout = KVLayout.from_wire({"dtype": "bfloat16", "byteorder": "little", "layers": [[2, 8, 4], [1, 8, 8]]})
    assert layout.token_nbytes == 2 * (2 * (8 + 4) + 1 * (8 + 8))
    manifest = Manifest("a", 3, "llama@1", "cpu", layout, b"\x00x", False, [1, 2, 3])
    assert Manifest.from_wire(wire(manifest.as_wire())) == manifest
    sequence = request("a", [1, 2, 3], output_ids=[4], priority=-1, arrival=9, stop=("x",), stop_token_ids=(7,))
    state = RequestState.of(sequence, 3)
    assert RequestState.from_wire(wire(state.as_wire())) == state
    again = state.sequence()
    assert (again.params, again.priority, again.token_ids(0, 4)) == (sequence.params, -1, [1, 2, 3, 4])


def test_kv_is_sent_layer_by_layer_keys_before_values(model: TinyModel, leaving: LLMEngine):
    sequence = leaving.find("a")
    assert sequence is not None
    leaving.export_open("a", 1)
    kv = leaving.export_freeze("a", 1)["kv"]
    values = torch.frombuffer(bytearray(kv["data"]), dtype=torch.float32).view(3, 2, 63, 2, 16)
    prompt = sequence.token_ids(0, sequence.n_tokens)
    with torch.no_grad():
        cache = model.reference(torch.tensor([prompt]), use_cache=True).past_key_values
    for layer in range(3):
        expected = (cache.layers[layer].keys[0], cache.layers[layer].values[0])
        for kind in range(2):
            torch.testing.assert_close(values[layer, kind], expected[kind].transpose(0, 1)[:63], rtol=1e-3, atol=1e-4)


# --- parking ---------------------------------------------------------------------------------------------------------


@each_way_of_sampling
@pytest.mark.parametrize("n_steps", [0, 1, 2, 4, 10])
def test_a_parked_request_goes_on_as_if_nothing_had_happened(model: TinyModel, n_steps: int, params: dict[str, Any]):
    [prompt, other] = prompts(2, 40, 60)
    engine = make_engine(model, max_batch_tokens=24)
    outputs: list[StepOutput] = []
    engine.add(request("a", prompt, **params))
    engine.add(request("b", other, 60))
    for _ in range(n_steps):
        outputs += engine.step()
    sequence = engine.find("a")
    assert sequence is not None
    n_computed, n_output = sequence.n_computed, len(sequence.output_ids)
    assert engine.park("a") and engine.park("a")
    assert engine.stats().parked_nbytes == -(-n_computed // 16) * engine.stats().bytes_per_block
    for _ in range(5):
        outputs += engine.step()
        add_up(engine)
    assert len(sequence.output_ids) == n_output and not sequence.block_table
    assert engine.resume("a")
    drain(engine, outputs)
    assert tokens_of(outputs) == {"a": alone(model, prompt, **params), "b": alone(model, other, 60)}
    nothing_left(engine)


@each_way_of_sampling
def test_a_recomputed_request_gives_the_same_answer(model: TinyModel, params: dict[str, Any]):
    [prompt] = prompts(1, 40, 40)
    engine = make_engine(model, prefix_reuse=False)
    outputs: list[StepOutput] = []
    engine.add(request("a", prompt, **params))
    for how in (engine.recompute, engine.recompute, engine.park, engine.recompute):
        outputs += [output for _ in range(4) for output in engine.step()]
        assert how("a")
    assert engine.stats().parked_nbytes == 0
    drain(engine, outputs)
    assert tokens_of(outputs)["a"] == alone(model, prompt, **params)
    nothing_left(engine)


def test_an_abort_of_a_parked_request_frees_host_memory(model: TinyModel):
    engine = make_engine(model)
    engine.add(request("a", [1] * 40))
    engine.step()
    engine.park("a")
    assert engine.stats().parked_nbytes > 0
    assert engine.abort("a")
    assert not engine.park("a") and not engine.resume("a") and not engine.recompute("a")
    nothing_left(engine)


def test_requests_that_give_way_are_parked_where_that_is_quicker(model: TinyModel):
    asked = prompts(6, 30, 60, seed=5)
    expected = {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    moved: list[int] = []
    engine = make_engine(model, n_blocks=24, block_size=8, prefix_reuse=False)
    read = engine._runner.read_blocks

    def noted(blocks: list[int]) -> torch.Tensor:
        moved.append(len(blocks))
        return read(blocks)

    engine._runner.read_blocks = noted  # type: ignore[method-assign, assignment]
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt))
    assert drain(engine) == expected
    assert engine.stats().n_preemptions > 0 and moved
    nothing_left(engine)


def test_where_host_memory_fails_the_tokens_are_computed_again(model: TinyModel):
    asked = prompts(6, 30, 60, seed=5)
    engine = make_engine(model, n_blocks=24, block_size=8, prefix_reuse=False)

    def fail(_blocks: object) -> torch.Tensor:
        raise MemoryError

    engine._runner.read_blocks = fail  # type: ignore[method-assign]
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt))
    assert drain(engine) == {str(i): model.generate(prompt, 24) for i, prompt in enumerate(asked)}
    assert engine.stats().n_preemptions > 0
    nothing_left(engine)


# --- time sharing ----------------------------------------------------------------------------------------------------


def test_two_engines_take_turns_with_their_memory_and_answer_as_if_they_were_alone(model: TinyModel, tmp_path: Any):
    other = make_model(tmp_path, "qwen2", seed=1)
    asked = prompts(5, 20, 60, seed=2)
    params = [SAMPLED if i % 2 else GREEDY for i in range(len(asked))]
    engines = {name: make_engine(made, max_batch_tokens=32) for name, made in (("llama", model), ("qwen2", other))}
    expected = {
        name: {str(i): alone(made, prompt, **params[i]) for i, prompt in enumerate(asked)}
        for name, made in (("llama", model), ("qwen2", other))
    }
    outputs: dict[str, list[StepOutput]] = {"llama": [], "qwen2": []}
    for engine in engines.values():
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, **params[i]))
        engine.park_all()
    rng = random.Random(1)
    for name in itertools.cycle(engines):
        engine = engines[name]
        engine.resume_all()
        for _ in range(rng.randint(1, 6)):
            outputs[name] += engine.step()
        engine.park_all()
        stats = engine.stats()
        assert not engine._runner.caches and engine.paused and not engine.has_work
        assert (stats.blocks_used, stats.blocks_cached) == (0, 0)
        if all(not engine.sequences for engine in engines.values()):
            break
    for name, engine in engines.items():
        engine.resume_all()
        assert tokens_of(outputs[name]) == expected[name]
        nothing_left(engine)


def test_requests_come_and_go_while_an_engine_is_stopped(model: TinyModel):
    [prompt, second] = prompts(2, 20, 40)
    engine = make_engine(model)
    engine.add(request("a", prompt))
    before = engine.step()
    memory = [weakref.ref(cache) for layer in engine._runner.caches for cache in layer]
    engine.park_all()
    engine.park_all()
    assert not any(cache() is not None for cache in memory), "somebody still holds the cache"
    assert engine.step() == []
    engine.add(request("b", second))
    engine.add(request("c", second))
    assert engine.abort("c")
    with pytest.raises(StateRefused):
        engine.export_open("a", 1)
    engine.resume_all()
    engine.resume_all()
    drain(engine, before)
    assert tokens_of(before) == {"a": model.generate(prompt, 24), "b": model.generate(second, 24)}
    nothing_left(engine)


# --- what is shared --------------------------------------------------------------------------------------------------


def test_reusing_prefixes_changes_no_answer(model: TinyModel):
    rng = random.Random(6)
    texts = prompts(3, 60, 80, seed=8)
    asked = [rng.choice(texts)[: rng.randint(10, 80)] + prompts(1, 1, 20, seed=i)[0] for i in range(16)]
    params = [{**SAMPLED, "seed": i} if i % 2 else GREEDY for i in range(len(asked))]
    answers = []
    for prefix_reuse in (False, True):
        engine = make_engine(model, n_blocks=45, block_size=8, max_batch_tokens=48, prefix_reuse=prefix_reuse)
        outputs: list[StepOutput] = []
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, **params[i]))
            outputs += engine.step()
            outputs += engine.step()
            add_up(engine)
        answers.append(drain(engine, outputs))
        assert (engine.stats().n_reused_tokens > 200) == prefix_reuse
        nothing_left(engine)
    assert answers[0] == answers[1] == {str(i): alone(model, prompt, **params[i]) for i, prompt in enumerate(asked)}


def test_the_second_request_with_a_prompt_computes_its_end_only(model: TinyModel):
    [prompt] = prompts(1, 70, 70)
    engine = make_engine(model)
    for name in ("a", "b"):
        engine.add(request(name, prompt))
        outputs = engine.step()
        sequence = engine.find(name)
        assert sequence is not None and sequence.n_computed == 70
        drain(engine, outputs)
        assert tokens_of(outputs)[name] == model.generate(prompt, 24)
    assert engine.stats().n_reused_tokens == 64
    assert engine.stats().blocks_cached == (70 + 23) // 16


@each_way_of_sampling
@pytest.mark.parametrize("n_blocks", [200, 26])
def test_several_answers_are_those_of_as_many_requests(model: TinyModel, n_blocks: int, params: dict[str, Any]):
    [prompt, other] = prompts(2, 45, 50, seed=4)
    engine = make_engine(model, n_blocks=n_blocks, block_size=8, max_batch_tokens=32, prefix_reuse=False)
    for choice in request("a", prompt, **params).choices(4):
        engine.add(choice)
    engine.add(request("b", other))
    outputs = [output for _ in range(5) for output in engine.step()]
    if n_blocks == 200:
        assert engine.stats().n_reused_tokens == 3 * (len(prompt) - 1)
    answers = drain(engine, outputs)
    seeds = [choice_seed(params.get("seed", 0), index) for index in range(4)]
    names = ["a", "a#1", "a#2", "a#3"]
    assert answers.pop("b") == model.generate(other, 24)
    assert answers == {name: alone(model, prompt, **{**params, "seed": seed}) for name, seed in zip(names, seeds, strict=True)}
    assert (engine.stats().n_preemptions > 0) == (n_blocks == 26)
    nothing_left(engine)


def test_one_of_several_answers_moves_and_the_others_stay(model: TinyModel):
    [prompt] = prompts(1, 45, 45)
    source, target = make_engine(model), make_engine(model, block_size=8)
    choices = request("a", prompt, **SAMPLED).choices(3)
    for choice in choices:
        source.add(choice)
    outputs = [output for _ in range(4) for output in source.step()]
    move(source, target, "a")
    move(source, target, "a#2", between=lambda: outputs.extend(source.step()) or outputs)
    drain(source, outputs)
    drain(target, outputs)
    expected = {choice.request_id: alone(model, prompt, **{**SAMPLED, "seed": choice.params.seed}) for choice in choices}
    assert tokens_of(sorted(outputs, key=lambda output: output.index)) == expected
    nothing_left(source, target)


def test_a_request_that_fails_leaves_nothing_that_others_would_find(model: TinyModel):
    engine = make_engine(model)
    [prompt] = prompts(1, 40, 40)
    engine.add(request("a", prompt))
    engine.step()
    engine._scheduler.finish("a", FinishReason.ERROR)
    assert engine.stats().blocks_cached == 0
    engine.add(request("b", prompt))
    assert drain(engine)["b"] == model.generate(prompt, 24)
    assert engine.stats().n_reused_tokens == 0


def test_a_thousand_requests_with_aborts_parking_and_moves_leave_nothing(model: TinyModel):
    rng = random.Random(12)
    engines = [make_engine(model, n_blocks=30, block_size=8), make_engine(model, n_blocks=18, block_size=16)]
    texts = prompts(5, 30, 50, seed=1)
    for i in range(1000):
        engine = rng.choice(engines)
        prompt = [*rng.choice(texts)[: rng.randint(1, 50)], rng.randrange(300)]
        for choice in request(str(i), prompt, rng.randint(1, 4), priority=rng.randint(0, 2)).choices(rng.choice([1, 1, 2])):
            engine.add(choice)
        engine.step()
        add_up(engine)
        if engine.sequences:
            name = rng.choice(engine.sequences).request_id
            what = rng.randrange(8)
            if what == 0:
                engine.abort(name)
            elif what == 1:
                engine.park(name)
            elif what == 2:
                engine.resume(name)
            elif what == 3:
                source, target = engine, engines[1 - engines.index(engine)]
                try:
                    move(source, target, name, i + 1)
                except StateRefused:
                    source.export_abort(name, i + 1)
                    target.import_abort(name, i + 1)
    for engine in engines:
        for sequence in engine.sequences:
            engine.resume(sequence.request_id)
        drain(engine)
        nothing_left(engine)


def test_an_engine_whose_memory_is_promised_says_that_it_can_do_nothing(model: TinyModel, leaving: LLMEngine):
    engine = make_engine(model, n_blocks=5)
    manifest = leaving.export_open("a", 1)
    engine.import_open(manifest)
    engine.add(request("b", [1, 2, 3]))
    assert engine.step() == []
    assert engine.has_work and engine.stalled
    engine.import_abort("a", 1)
    assert not engine.stalled
    assert drain(engine)["b"] == model.generate([1, 2, 3], 24)
    nothing_left(engine)
