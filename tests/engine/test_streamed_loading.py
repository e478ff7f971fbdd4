"""Weights that arrive while the engine has requests already: same tokens, whatever comes first; failures and closing."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sllmdask.engine.construct import build_skeleton
from sllmdask.engine.engine import EngineThread, LLMEngine, build_engine
from sllmdask.errors import (
    Cancelled,
    CheckpointCorrupt,
    EngineError,
    InstanceGone,
    LoadFailed,
    SllmError,
    UnsupportedArchitecture,
)
from tests.engine.adapters import make_adapter
from tests.engine.models import CONFIGS, TinyModel, assert_all_free, drain, make_model, prompts, request, settings, tokens_of
from tests.engine.test_thread import Listener


class Reader:
    """Stands for the loader: memory that holds rubbish until a tensor is delivered, and a `wait` that knows what has been."""

    def __init__(self, model: TinyModel, rubbish: float = torch.nan) -> None:
        self._model = model
        self.tensors = {name: torch.full_like(tensor, rubbish) for name, tensor in model.tensors.items()}
        self.waited_for: list[frozenset[str]] = []
        self._there: set[str] = set()
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def deliver(self, *names: str) -> None:
        for name in names:
            self.tensors[name].copy_(self._model.tensors[name])
        with self._changed:
            self._there.update(names)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait(self, names: Collection[str]) -> None:
        with self._changed:
            self.waited_for.append(frozenset(names))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._there.issuperset(names))
            if self._error is not None:
                raise self._error

    def until_waited_for(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(name in names for names in self.waited_for), 30)

    def engine(self, **changes: object) -> LLMEngine:
        return build_engine(self._model.directory, self.tensors, settings(**changes), wait=self.wait)

    @contextmanager
    def delivering(self, names: list[str]) -> Iterator[None]:
        """Inside the block, another thread delivers `names` one by one."""
        thread = threading.Thread(target=lambda: [self.deliver(name) for name in names])
        thread.start()
        yield
        thread.join()


@pytest.fixture
def llama(tmp_path: Path) -> TinyModel:
    return make_model(tmp_path)


@pytest.fixture
def reader(llama: TinyModel) -> Iterator[Reader]:
    reader = Reader(llama)
    yield reader
    reader.fail(Cancelled())


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "random") for name in sorted(CONFIGS)),
        # One of each way to place weights: plain, transposed, fused, off the interface.
        *((name, order) for name in ("llama", "gpt2", "mixtral", "gptj") for order in ("as it is run", "backwards")),
    ],
)
def test_tokens_are_those_of_generate_in_whatever_order_the_tensors_arrive(model_of, name: str, order: str):
    model = model_of(name)
    reader = Reader(model)
    engine = reader.engine(max_batch_tokens=32)
    asked = prompts(3, 20, 60)
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 8))
    names = list(model.tensors)
    if order == "backwards":
        names.reverse()
    elif order == "random":
        random.Random(name).shuffle(names)
    with reader.delivering(names):
        answers = drain(engine)
    assert answers == {str(i): model.generate(prompt, 8) for i, prompt in enumerate(asked)}
    assert_all_free(engine)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt", "gemma3"])
def test_weights_that_must_be_converted_are_converted_after_they_have_arrived(tmp_path: Path, name: str):
    model = make_model(tmp_path, name, torch.bfloat16)
    whole = build_engine(model.directory, model.tensors, settings(dtype="float32"))
    reader = Reader(model)
    streamed = reader.engine(dtype="float32")
    names = list(model.tensors)
    random.Random(0).shuffle(names)
    for engine in (whole, streamed):
        engine.add(request("a", [5, 6, 7], 12))
    with reader.delivering(names):
        assert drain(streamed) == drain(whole)
    assert {parameter.dtype for parameter in streamed._runner.model.parameters()} == {torch.float32}


def test_a_layer_runs_as_soon_as_its_own_weights_are_there(llama: TinyModel, reader: Reader):
    engine = reader.engine()
    ran = threading.Event()
    engine._runner.model.get_submodule("model.layers.1").register_forward_hook(lambda *_: ran.set())
    engine.add(request("a", [1, 2, 3], 4))
    answers: list[dict[str, list[int]]] = []
    thread = threading.Thread(target=lambda: answers.append(drain(engine)))
    thread.start()
    first = [name for name in llama.tensors if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))]
    reader.deliver(*first)
    assert ran.wait(30)
    assert thread.is_alive() and not answers
    reader.deliver(*(llama.tensors.keys() - set(first)))
    thread.join(30)
    assert answers == [{"a": llama.generate([1, 2, 3], 4)}]


def test_stages_are_waited_for_in_the_order_of_a_forward_pass(tmp_path: Path):
    # OPT names its last norm before its layers.
    model = make_model(tmp_path, "opt")
    reader = Reader(model)
    engine = reader.engine()
    with reader.delivering(list(model.tensors)):
        engine.add(request("a", [1], 1))
        drain(engine)
    first = [min(names).removeprefix("model.decoder.").split(".")[0:2] for names in reader.waited_for]
    assert [path[0] for path in first] == ["embed_tokens", "embed_positions", *["layers"] * 3, "final_layer_norm", "embed_tokens"]
    assert [path[1] for path in first if path[0] == "layers"] == ["0", "1", "2"]


def test_afterwards_nothing_is_left_that_a_step_would_pay_for(llama: TinyModel, reader: Reader):
    engine = reader.engine()
    hooked = [module for module in engine._runner.model.modules() if module._forward_pre_hooks]
    assert hooked
    engine.add(request("a", [1, 2, 3], 3))
    with reader.delivering(list(llama.tensors)):
        drain(engine)
    engine.settle()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in engine._runner.model.modules())
    assert engine.build_times.check_s is not None


def test_the_first_layers_are_checked_before_a_token_is_given(llama: TinyModel, reader: Reader, monkeypatch: pytest.MonkeyPatch):
    from sllmdask.engine import attention

    original = attention.dot_product_attention
    monkeypatch.setattr(
        attention, "dot_product_attention", lambda q, k, v, options, mask: original(q, k, v, replace(options, scaling=1.0), mask)
    )
    engine = reader.engine(attention="sdpa")
    engine.add(request("a", [1, 2, 3], 3))
    with reader.delivering(list(llama.tensors)), pytest.raises(UnsupportedArchitecture, match="layer 0"):
        engine.step()


def test_what_the_names_and_shapes_tell_is_found_before_any_byte_is_there(llama: TinyModel, reader: Reader):
    gone = reader.tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointCorrupt) as refused:
        reader.engine()
    assert refused.value.tensor == "model.norm.weight"
    reader.tensors["model.norm.weight"] = gone[:3]
    with pytest.raises(CheckpointCorrupt, match=r"\[3\]"):
        reader.engine()
    assert not reader.waited_for


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (CheckpointCorrupt("model.safetensors", "model.layers.2.mlp.up_proj.weight", "its checksum differs"), CheckpointCorrupt),
        (LoadFailed("llama", "the disk is gone"), LoadFailed),
        (Cancelled("the read was called off"), Cancelled),
        (OSError(5, "Input/output error"), LoadFailed),
        (ValueError("a defect"), EngineError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.asyncio
async def test_when_the_load_fails_requests_and_owner_hear_its_error(
    llama: TinyModel, reader: Reader, failure: BaseException, expected: type[SllmError]
):
    listener = Listener()
    thread = EngineThread(reader.engine(), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
    thread.submit(request("a", [1, 2, 3]))
    thread.submit(request("b", [4, 5]))
    reader.deliver(*(name for name in llama.tensors if "layers.2" not in name))
    await asyncio.to_thread(reader.until_waited_for, "model.layers.2.mlp.up_proj.weight")
    reader.fail(failure)
    await listener.until(lambda: bool(listener.failures))
    assert {output.request_id: type(output.error) for output in listener.outputs} == {"a": expected, "b": expected}
    assert all(output.index == 0 and output.token_id is None for output in listener.outputs)
    assert [type(error) for error in listener.failures] == [expected]
    assert all(error.args == failure.args for error in listener.failures if isinstance(failure, SllmError))
    assert not thread.alive
    await asyncio.to_thread(thread.close)


@pytest.mark.asyncio
async def test_the_owner_hears_of_a_failed_load_although_nobody_asks_anything(reader: Reader):
    listener = Listener()
    thread = EngineThread(reader.engine(), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
    reader.fail(CheckpointCorrupt("model.safetensors", None, "it is truncated"))
    await listener.until(lambda: bool(listener.failures))
    assert [type(error) for error in listener.failures] == [CheckpointCorrupt]
    assert not thread.alive


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.asyncio
async def test_closing_does_not_wait_for_the_load(reader: Reader, asked: bool):
    listener = Listener()
    thread = EngineThread(reader.engine(), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
    if asked:
        thread.submit(request("a", [1, 2, 3]))
    await asyncio.to_thread(reader.until_waited_for, "model.embed_tokens.weight")
    await asyncio.wait_for(asyncio.to_thread(thread.close), 10)
    assert not thread.alive
    if asked:
        await listener.until_final("a")
        assert isinstance(listener.outputs[-1].error, InstanceGone)
    assert not listener.failures


@pytest.mark.asyncio
async def test_a_request_that_comes_before_the_weights_is_answered_when_they_are_there(llama: TinyModel, reader: Reader):
    listener = Listener()
    thread = EngineThread(reader.engine(), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
    asked = prompts(4, 10, 40)
    for i, prompt in enumerate(asked[:3]):
        thread.submit(request(str(i), prompt, 10))
    names = list(llama.tensors)
    random.Random(1).shuffle(names)
    with reader.delivering(names):
        thread.submit(request("3", asked[3], 10))
        await listener.until_final("0", "1", "2", "3")
    assert tokens_of(listener.outputs) == {str(i): llama.generate(prompt, 10) for i, prompt in enumerate(asked)}
    assert (await asyncio.wrap_future(thread.call(lambda engine: engine.build_times))).check_s is not None
    await asyncio.to_thread(thread.close)


def test_after_a_failed_or_interrupted_load_the_skeleton_can_be_filled_again(llama: TinyModel):
    skeleton = build_skeleton(llama.directory)
    for end in ("fail", "interrupt"):
        reader = Reader(llama)
        engine = build_engine(llama.directory, reader.tensors, settings(), skeleton=skeleton, wait=reader.wait)
        engine.add(request("a", [1, 2, 3], 3))
        if end == "fail":
            reader.fail(LoadFailed("llama", "no"))
            with pytest.raises(LoadFailed):
                engine.step()
        else:
            engine.interrupt()
            with pytest.raises(Cancelled):
                engine.step()
            reader.fail(Cancelled())
        engine.close()
    engine = build_engine(llama.directory, llama.tensors, settings(), skeleton=skeleton)
    engine.add(request("a", [1, 2, 3], 6))
    assert drain(engine) == {"a": llama.generate([1, 2, 3], 6)}


def test_a_request_with_an_adapter_follows_weights_that_are_on_their_way(llama: TinyModel, reader: Reader, tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", llama, ("q_proj", "down_proj"))
    engine = reader.engine(max_batch_tokens=32)
    found = engine.read_adapter("a", adapter.directory, adapter.tensors)
    engine.add_adapter(found)
    asked = prompts(4, 20, 60)
    for i, prompt in enumerate(asked):
        sequence = request(str(i), prompt, 8)
        sequence.salt = found.salt if i % 2 else b""
        engine.add(sequence)
    with reader.delivering(list(llama.tensors)):
        answers = drain(engine)
    merged = adapter.merged_into(llama)
    assert answers == {str(i): (merged if i % 2 else llama).generate(prompt, 8) for i, prompt in enumerate(asked)}
    assert_all_free(engine)
