"""What the live cluster decided follows from its event log alone: a fresh controller, fed the same events, decides the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sllmdask.batching.params import SamplingParams
from sllmdask.cluster.deploy import local_cluster
from sllmdask.cluster.gateway import Gateway
from sllmdask.cluster.journal import Delta, Finished, GenerateRequest
from sllmdask.cluster.scheduler_plugin import SllmSchedulerPlugin
from sllmdask.config import Deployment, EngineSettings, SchedulerSettings, Settings, parse
from sllmdask.errors import InvalidRequest, ModelNotFound
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Chose, Decision, Dispatch, Load, Refuse, ReportLoaded, Unload, WakeAt
from sllmdask.sim.replay import replay
from tests.cluster.harness import forks

pytestmark = pytest.mark.cluster

ENGINE = EngineSettings(n_threads=1)


def plain(decision: Decision) -> Any:
    """A decision that can be compared: an error is equal only to itself."""
    facts = vars(decision)
    return type(decision).__name__, {**facts, "error": decision.error.as_wire()} if isinstance(decision, Refuse) else facts


class Traffic:
    """Requests to both demo models through a gateway, as a front door makes them."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.n_asked = 0

    async def deploy(self, name: str, **settings: Any) -> None:
        source = {"pretrained_model_name_or_path": f"demo:{name}"}
        await self.gateway.register(parse(Deployment, {"model": name, "backend_config": source, **settings}))

    async def ask(self, name: str, n_tokens: int, leave_after: int | None = None) -> int:
        """Tokens that came; after `leave_after` of them the client is gone."""
        self.n_asked += 1
        params = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
        events = self.gateway.generate(GenerateRequest(f"r{self.n_asked}", name, [5, 6, 7], params))
        n_came = 0
        try:
            async for event in events:
                if isinstance(event, Finished):
                    return event.n_tokens
                if isinstance(event, Delta):
                    n_came += len(event.token_ids)
                if leave_after is not None and n_came >= leave_after:
                    break
        finally:
            await events.aclose()
        return n_came


@asynccontextmanager
async def one_slot(event_log: Path | None = None) -> AsyncIterator[tuple[SllmSchedulerPlugin, Traffic]]:
    """A scheduler in this process, one worker process of one slot, and a gateway."""
    settings = Settings(engine=ENGINE, scheduler=SchedulerSettings(patience=0.3, event_log=str(event_log or "")))
    with forks().spawning():
        async with local_cluster(1, settings) as cluster:
            gateway = Gateway(cluster.scheduler_address, settings)
            try:
                await gateway.start()
                yield cluster.scheduler.plugins[SllmSchedulerPlugin.name], Traffic(gateway)
            finally:
                await gateway.close()


async def until(what: str, check: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        await asyncio.sleep(0.02)
    return found


@pytest.mark.asyncio
async def test_a_fresh_controller_decides_from_the_event_log_what_the_live_one_decided(monkeypatch, tmp_path):
    live: list[Decision] = []
    enact = SllmSchedulerPlugin.enact

    def enact_and_record(self: SllmSchedulerPlugin, decision: Decision) -> None:
        live.append(decision)
        enact(self, decision)

    monkeypatch.setattr(SllmSchedulerPlugin, "enact", enact_and_record)
    async with one_slot(tmp_path / "events.jsonl") as (plugin, traffic):
        controller = plugin.controller
        await traffic.deploy("demo-llama")
        await traffic.deploy("demo-qwen")
        # A steady model and a waiting one; somebody who leaves in the middle, and somebody who leaves the queue.
        busy = [asyncio.create_task(traffic.ask("demo-llama", 300)) for _ in range(10)]
        other = [asyncio.create_task(traffic.ask("demo-qwen", 5)) for _ in range(3)]
        leaver = asyncio.create_task(traffic.ask("demo-qwen", 5))
        assert await traffic.ask("demo-llama", 300, leave_after=3) >= 3
        await until("requests wait", lambda: controller.waiting)
        leaver.cancel()
        assert await asyncio.gather(*busy, *other) == [300] * 10 + [5] * 3
        # Deleted under a request that waits for it.
        long = asyncio.create_task(traffic.ask("demo-llama", 300))
        await until("the long one runs", lambda: any(r.model == "demo-llama" for r in controller.running.values()))
        refused = asyncio.create_task(traffic.ask("demo-qwen", 5))
        await until("the other one waits", lambda: controller.waiting)
        await traffic.gateway.delete("demo-qwen")
        with pytest.raises(ModelNotFound):
            await refused
        assert await long == 300
        # An operator who loads under somebody's feet, unloads while it works, and is refused.
        long = asyncio.create_task(traffic.ask("demo-llama", 300))
        await until("it runs", lambda: any(r.model == "demo-llama" for r in controller.running.values()))
        leaving = asyncio.create_task(traffic.gateway.unload("demo-llama", None, True))
        assert (await traffic.gateway.load("demo-llama", "0", "device", True))["state"] == "ready"
        assert (await leaving)["state"] == "unloaded" and await long == 300
        with pytest.raises(InvalidRequest):
            await traffic.gateway.load("demo-llama", "1", "device", True)
        # A worker that dies with a request on its way, and a time to keep that ends.
        await traffic.deploy("demo-qwen", auto_scaling_config={"keep_alive": 0.1})
        (worker,) = controller.workers
        os.kill(plugin.scheduler.workers[worker].extra["sllm"]["pid"], signal.SIGKILL)
        assert await traffic.ask("demo-qwen", 5) == 5
        await until("the slot is free", lambda: not controller.instances)
        log, decided = list(plugin.events), list(live)

    kinds = {type(event) for event in log}
    assert kinds >= {ev.WorkerJoined, ev.WorkerLeft, ev.WorkerReported, ev.ModelDeployed, ev.ModelDeleted, ev.TimerFired}
    assert kinds >= {ev.RequestArrived, ev.RequestEnded, ev.LoadFinished, ev.UnloadFinished, ev.LoadRequested, ev.UnloadRequested}
    assert {type(decision) for decision in decided} == {Chose, Load, Unload, Dispatch, ReportLoaded, Refuse, WakeAt}
    fresh = Controller(controller.settings)
    again = [decision for event in log for decision in fresh.handle(event)]
    assert list(map(plain, again)) == list(map(plain, decided))
    assert (fresh.waiting, fresh.running, fresh.instances) == ({}, {}, {})
    # The same from the file that the scheduler wrote, which has no pickle in it.
    steps = list(replay(tmp_path / "events.jsonl"))
    assert [step.event for step in steps][: len(log)] == log
    assert all(step.then == step.now for step in steps)
