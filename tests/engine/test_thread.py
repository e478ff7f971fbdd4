from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
import torch

from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.engine import EngineStats, EngineThread, LLMEngine, StepOutput
from sllmdask.errors import ContextTooLong, EngineError, InstanceGone, SllmError
from tests.engine.models import TinyModel, make_engine, make_model, prompts, request, tokens_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


@dataclass
class Listener:
    """What the loop was given, and a way to wait for more."""

    batches: list[list[StepOutput]] = field(default_factory=list)
    failures: list[SllmError] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_outputs(self, outputs: list[StepOutput]) -> None:
        self.threads.add(threading.current_thread().name)
        self.batches.append(outputs)
        self.changed.set()

    def on_failed(self, error: SllmError) -> None:
        self.failures.append(error)
        self.changed.set()

    @property
    def outputs(self) -> list[StepOutput]:
        return [output for batch in self.batches for output in batch]

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not enough():
                self.changed.clear()
                await self.changed.wait()

    async def until_final(self, *request_ids: str) -> None:
        await self.until(lambda: {o.request_id for o in self.outputs if o.final} >= set(request_ids))


@pytest_asyncio.fixture
async def listener() -> Listener:
    return Listener()


@pytest_asyncio.fixture
async def thread(model: TinyModel, listener: Listener) -> AsyncIterator[EngineThread]:
    thread = EngineThread(make_engine(model), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed, name="llama-1")
    yield thread
    await asyncio.to_thread(thread.close)


@pytest.mark.asyncio
async def test_answers_reach_the_loop_in_its_own_thread_once_per_step(model: TinyModel, listener: Listener, thread: EngineThread):
    asked = prompts(4, 10, 40)
    for i, prompt in enumerate(asked):
        thread.submit(request(str(i), prompt, 12))
    await listener.until_final("0", "1", "2", "3")
    assert tokens_of(listener.outputs) == {str(i): model.generate(prompt, 12) for i, prompt in enumerate(asked)}
    assert listener.threads == {threading.current_thread().name}
    for batch in listener.batches:
        ids = [output.request_id for output in batch]
        assert len(ids) == len(set(ids)), "two steps in one hand-over"


@pytest.mark.asyncio
async def test_the_end_of_a_cancelled_request_is_heard_before_the_result_of_a_later_call(
    listener: Listener, thread: EngineThread
):
    thread.submit(request("a", [1, 2, 3], 200))
    thread.submit(request("b", [4, 5, 6], 200))
    await listener.until(lambda: len(listener.outputs) > 2)
    may_go_on = threading.Event()
    thread.call(lambda _: may_go_on.wait(20))
    thread.abort("a")
    later = asyncio.wrap_future(thread.call(lambda _: None))
    may_go_on.set()
    await later
    assert [output.finish_reason for output in listener.outputs if output.request_id == "a"][-1] is FinishReason.ABORT


@pytest.mark.asyncio
async def test_a_refused_request_ends_by_an_output_and_disturbs_nobody(listener: Listener, thread: EngineThread):
    thread.submit(request("good", [1, 2, 3], 4))
    thread.submit(request("too long", [1] * 600))
    await listener.until_final("good", "too long")
    [refused] = [output for output in listener.outputs if output.request_id == "too long"]
    assert isinstance(refused.error, ContextTooLong)
    assert (refused.token_id, refused.finish_reason) == (None, FinishReason.ERROR)


@pytest.mark.asyncio
async def test_an_abort_is_the_last_that_is_heard_of_a_request(listener: Listener, thread: EngineThread):
    thread.submit(request("a", [1, 2, 3], 400))
    await listener.until(lambda: len(listener.outputs) >= 3)
    thread.abort("a")
    thread.abort("unknown")
    await listener.until_final("a")
    last = [output for output in listener.outputs if output.request_id == "a"][-1]
    assert (last.finish_reason, last.token_id, last.error) == (FinishReason.ABORT, None, None)
    stats = await asyncio.wrap_future(thread.call(LLMEngine.stats))
    assert (stats.n_running, stats.blocks_free) == (0, stats.blocks_total)
    assert listener.outputs[-1] is last
    assert last.index == len(tokens_of(listener.outputs)["a"])


@pytest.mark.asyncio
async def test_a_call_runs_in_the_engines_thread_and_brings_its_error_back(thread: EngineThread):
    name = await asyncio.wrap_future(thread.call(lambda _: threading.current_thread().name))
    assert name == "sllmdask-llama-1"
    with pytest.raises(ZeroDivisionError):
        await asyncio.wrap_future(thread.call(lambda _: 1 // 0))
    assert await asyncio.wrap_future(thread.call(lambda _: torch.get_num_threads())) == 1


@pytest.mark.asyncio
async def test_stats_are_those_after_the_last_step(listener: Listener, thread: EngineThread):
    assert thread.stats()["n_steps"] == 0
    thread.submit(request("a", [1, 2, 3], 4))
    await listener.until_final("a")
    assert (thread.stats()["n_steps"], thread.stats()["n_output_tokens"], thread.stats()["n_running"]) == (4, 4, 0)


@pytest.mark.asyncio
async def test_an_idle_engine_does_not_step(thread: EngineThread):
    for _ in range(3):
        assert (await asyncio.wrap_future(thread.call(LLMEngine.stats))).n_steps == 0


@pytest.mark.asyncio
async def test_closing_ends_what_runs_and_refuses_what_comes(listener: Listener, thread: EngineThread):
    thread.submit(request("a", [1, 2, 3], 400))
    await listener.until(lambda: bool(listener.outputs))
    await asyncio.to_thread(thread.close)
    assert not thread.alive
    await listener.until_final("a")
    assert isinstance(listener.outputs[-1].error, InstanceGone)
    assert not listener.failures
    with pytest.raises(InstanceGone):
        thread.submit(request("b", [1]))
    with pytest.raises(InstanceGone):
        thread.call(LLMEngine.stats)
    thread.abort("a")
    thread.close()


@pytest.mark.asyncio
async def test_what_waits_behind_the_end_is_answered_too(model: TinyModel, listener: Listener):
    thread = EngineThread(make_engine(model), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)

    def end_and_ask(_: LLMEngine) -> Future[EngineStats]:
        thread.close()
        thread.submit(request("late", [1, 2, 3]))
        return thread.call(LLMEngine.stats)

    late = await asyncio.wrap_future(thread.call(end_and_ask))
    await listener.until_final("late")
    assert isinstance(listener.outputs[-1].error, InstanceGone)
    with pytest.raises(InstanceGone):
        late.result(10)


@pytest.mark.asyncio
async def test_a_request_that_is_nonsense_fails_alone(listener: Listener, thread: EngineThread):
    thread.submit(request("nonsense", ["one", "two"]))  # type: ignore[list-item]
    thread.submit(request("good", [1, 2, 3], 4))
    await listener.until_final("nonsense", "good")
    assert [output.request_id for output in listener.outputs if output.error] == ["nonsense"]


@pytest.mark.asyncio
async def test_when_the_engine_dies_every_request_and_the_owner_hear_of_it(
    model: TinyModel, listener: Listener, caplog: pytest.LogCaptureFixture
):
    engine = make_engine(model, max_running=1)
    step, n_steps = engine.step, 0

    def dying_step() -> list[StepOutput]:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 4:
            raise KeyError("a defect of the engine")
        return step()

    engine.step = dying_step  # type: ignore[method-assign]
    thread = EngineThread(engine, asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
    held = threading.Event()
    thread.call(lambda _: held.wait(10))
    for request_id in ("running", "waiting"):
        thread.submit(request(request_id, [1, 2, 3], 400))
    held.set()
    await listener.until(lambda: bool(listener.failures))
    errors = {output.request_id: output.error for output in listener.outputs if output.error}
    assert errors.keys() == {"running", "waiting"}
    assert all(isinstance(error, EngineError) for error in [*errors.values(), *listener.failures])
    assert len(listener.failures) == 1
    assert not thread.alive
    with pytest.raises(InstanceGone):
        thread.submit(request("late", [1]))
    thread.close()
    assert "engine died" in caplog.text


def test_a_loop_that_is_gone_does_not_keep_the_thread(model: TinyModel):
    async def start() -> EngineThread:
        listener = Listener()
        thread = EngineThread(make_engine(model), asyncio.get_running_loop(), listener.on_outputs, listener.on_failed)
        thread.submit(request("a", [1, 2, 3], 300))
        return thread

    thread = asyncio.run(start())
    thread.close(30)
    assert not thread.alive
