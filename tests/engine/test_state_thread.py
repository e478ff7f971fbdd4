"""Requests that stop and move while the engines' threads run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from sllmdask.engine.engine import EngineThread, LLMEngine, StepOutput
from tests.engine.models import TinyModel, make_engine, make_model, prompts, request, tokens_of

T = TypeVar("T")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


class Instances:
    """Threads over engines, and everything that they said."""

    def __init__(self, *engines: LLMEngine) -> None:
        self.outputs: list[StepOutput] = []
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.threads = [EngineThread(engine, loop, self.hear, lambda error: pytest.fail(str(error))) for engine in engines]

    def hear(self, outputs: list[StepOutput]) -> None:
        self.outputs += outputs
        self.changed.set()

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not enough():
                self.changed.clear()
                await self.changed.wait()

    async def call(self, index: int, run: Callable[[LLMEngine], T]) -> T:
        return await asyncio.wrap_future(self.threads[index].call(run))


@pytest_asyncio.fixture
async def instances(model: TinyModel) -> AsyncIterator[Instances]:
    made = Instances(make_engine(model, block_size=16), make_engine(model, n_blocks=22, block_size=8))
    yield made
    for thread in made.threads:
        await asyncio.to_thread(thread.close)


@pytest.mark.asyncio
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
async def test_a_request_moves_from_thread_to_thread_and_back_while_it_answers(
    model: TinyModel, instances: Instances, params: dict[str, Any]
):
    [prompt] = prompts(1, 40, 40)
    alone = make_engine(model)
    alone.add(request("a", prompt, 120, **params))
    expected = [output.token_id for _ in range(120) for output in alone.step()]
    instances.threads[0].submit(request("a", prompt, 120, **params))
    for epoch, (source, target) in enumerate([(0, 1), (1, 0), (0, 1)], 1):
        n_heard = len(instances.outputs)
        await instances.until(lambda n=n_heard: len(instances.outputs) >= n + 10)  # type: ignore[misc]
        manifest = await instances.call(source, lambda engine, e=epoch: engine.export_open("a", e))  # type: ignore[misc]
        ticket = await instances.call(target, lambda engine, m=manifest: engine.import_open(m, 168))  # type: ignore[misc]
        since = ticket["n_tokens"]
        for _ in range(3):
            chunk = await instances.call(source, lambda engine, e=epoch, s=since: engine.export_read("a", e, s))  # type: ignore[misc]
            wrote = await instances.call(target, lambda engine, e=epoch, c=chunk: engine.import_write("a", e, c))  # type: ignore[misc]
            since = wrote["n_tokens"]
        last = await instances.call(source, lambda engine, e=epoch, s=since: engine.export_freeze("a", e, s))  # type: ignore[misc]
        state, kv = last["state"], last["kv"]
        assert await instances.call(target, lambda engine, e=epoch, s=state, k=kv: engine.import_commit("a", e, s, k))  # type: ignore[misc]
        assert await instances.call(source, lambda engine, e=epoch: engine.export_commit("a", e))  # type: ignore[misc]
    await instances.until(lambda: any(output.final for output in instances.outputs))
    assert tokens_of(instances.outputs)["a"] == expected
    for index in range(2):
        stats = await instances.call(index, LLMEngine.stats)
        assert stats.blocks_free == stats.blocks_total


@pytest.mark.asyncio
async def test_a_thread_whose_engine_can_do_nothing_sleeps_until_something_changes(model: TinyModel, instances: Instances):
    """Blocks that are promised are not there, and steps without end would not bring them."""
    [prompt] = prompts(1, 40, 40)
    instances.threads[0].submit(request("a", prompt, 200))
    await instances.until(lambda: len(instances.outputs) >= 3)
    manifest = await instances.call(0, lambda engine: engine.export_open("a", 1))
    await instances.call(1, lambda engine: engine.import_open(manifest, 168))
    instances.threads[1].submit(request("b", [1] * 20, 3))
    # Each call ends one sleep, and lets the engine try once.
    before = (await instances.call(1, LLMEngine.stats)).n_steps
    after = [(await instances.call(1, LLMEngine.stats)).n_steps for _ in range(20)]
    assert after[-1] - before <= 20
    assert not any(output.request_id == "b" for output in instances.outputs)
    await instances.call(1, lambda engine: engine.import_abort("a", 1))
    await instances.until(lambda: any(output.request_id == "b" and output.final for output in instances.outputs))
    instances.threads[0].abort("a")
    await instances.until(lambda: any(output.request_id == "a" and output.final for output in instances.outputs))
