"""What operators see through the front door: explanations, events, requests, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sllmdask.errors import EngineError, LoadFailed
from sllmdask.policy import events as ev
from sllmdask.policy.choice import Choice, Option, Way
from sllmdask.policy.decisions import Chose, Dispatch, Load, Refuse
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView
from sllmdask.server.metrics import N_DELETED, FrontDoorMetrics
from tests.fakes import FakeGateway, FakeModel
from tests.server.conftest import Door

pytestmark = pytest.mark.asyncio

OpenDoor = Callable[..., Awaitable[Door]]

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


def cold_start(gateway: FakeGateway, key: str = "door:1", model: str = "m") -> None:
    """Let the scheduler have seen a request that waited for a load."""
    see, at = gateway.observer.saw, 10.0
    see(ev.WorkerJoined(at, WorkerView("tcp://1", "0", slots=1, host_capacity=2**30)), [])
    see(ev.ModelDeployed(at, ModelView(model, nbytes=2**20)), [])
    chosen = Option(Way.FREE, "tcp://1", "0", 2.0, tier=Tier.DISK, parts={"read": 2.0})
    lost = Option(Way.WAIT, "tcp://1", "0", 7.0, instance="other/1", parts={"wait": 7.0}, lost="slower by 5.0 s")
    choice = Choice(at, key, model, chosen, "a free slot is the fastest", (chosen, lost))
    gateway.observer.log.told(key, {"id": f"id-{key}", "n_prompt_tokens": 3})
    request = RequestView(key, model, "door", at, at + 100)
    see(ev.RequestArrived(at, request), [Chose(choice), Load(f"{model}/1", model, "tcp://1", 2.0)])
    dispatch = Dispatch(key, "door", f"{model}/1", "tcp://1", "0", 2.5, Tier.DISK)
    see(ev.LoadFinished(at + 2.5, f"{model}/1", Tier.DISK), [dispatch])
    gateway.observer.log.read(f"{model}/1", {"read_s": 2.25, "ready_s": 2.5, "construct_s": 0.5})


async def get(door: Door, path: str, **headers: str) -> tuple[int, Any]:
    async with door.http.get(path, headers=headers) as response:
        return response.status, await response.json()


#: What Prometheus itself sends.
ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=1.0.0;q=0.4,text/plain;q=0.3,*/*;q=0.1"


async def scrape(door: Door) -> dict[str, Any]:
    """Families by name, as prometheus_client's own parser reads them."""
    async with door.http.get("/metrics", headers={"Accept": ACCEPT}) as response:
        assert response.status == 200 and response.content_type == "text/plain"
        return {family.name: family for family in text_string_to_metric_families(await response.text())}


def values(family: Any, sample: str, **labels: str) -> float:
    return sum(each.value for each in family.samples if each.name == sample and labels.items() <= each.labels.items())


# --- explain, requests, instances, cancel ----------------------------------------------------------------------------


async def test_a_request_and_a_model_are_explained_and_what_is_unknown_is_404(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    cold_start(door.gateway)
    status, told = await get(door, "/admin/explain/id-door:1")
    assert (status, told["kind"], told["node"], told["load"]["predicted_s"]) == (200, "request", "0", 2.0)
    assert [(each["way"], each["chosen"]) for each in told["choices"][0]["options"]] == [("free", True), ("wait", False)]
    status, told = await get(door, "/admin//explain/m/")
    assert (status, told["kind"], told["id"]) == (200, "model", "m")
    status, told = await get(door, "/admin/explain/org/nothing-3")
    assert (status, told["error"]["code"]) == (404, "record_not_found") and "'org/nothing-3'" in told["error"]["message"]


@pytest.mark.parametrize("name", ["llama-3", "org/llama-3", "a_", "b:b", "c+", "d}"])
async def test_names_may_end_in_whatever_they_like(open_door: OpenDoor, name: str):
    door = await open_door(**{name: FakeModel()})
    status, told = await get(door, f"/v1/models/{name}")
    assert (status, told.get("id")) == (200, name)
    cold_start(door.gateway, model=name)
    assert (await get(door, f"/admin/explain/{name}"))[1]["id"] == name


async def test_instances_have_their_nodes(open_door: OpenDoor):
    door = await open_door(b=FakeModel(), a=FakeModel())
    status, told = await get(door, "/admin/instances")
    assert status == 200
    assert [(each["model"], each["node"], each["state"]) for each in told["instances"]] == [
        ("a", "0", "ready"),
        ("b", "0", "ready"),
    ]


async def test_a_cancellation_is_passed_on_and_a_bad_one_is_refused(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/chat/completions", json=HI, headers={"x-request-id": "done"}) as response:
        assert response.status == 200
    for body in ({}, {"request": ""}, {"request": 3}, {"id": "x"}, ["x"]):
        async with door.http.post("/admin/cancel", json=body) as response:
            assert response.status == 400 and (await response.json())["error"]["param"] == "request"
    async with door.http.post("/admin/cancel", json={"request": "none"}) as response:
        assert response.status == 404
    async with door.http.post("/admin/cancel", json={"request": "done"}) as response:
        assert await response.json() == {"request": "done", "cancelled": False, "state": "finished"}


# --- events ----------------------------------------------------------------------------------------------------------


async def frames(response: Any, n: int) -> list[tuple[str, Any]]:
    """The next `n` frames: id and data; a comment has the id ``:``."""
    found: list[tuple[str, Any]] = []
    number = ""
    while len(found) < n:
        line = (await asyncio.wait_for(response.content.readline(), 10)).decode()
        assert line, f"the stream ended after {found}"
        if line.startswith(":"):
            found.append((":", line[2:].strip()))
        elif line.startswith("id: "):
            number = line[4:].strip()
        elif line.startswith("data: "):
            found.append((number, json.loads(line[6:])))
    return found


async def test_events_are_replayed_followed_and_resumed(open_door: OpenDoor):
    door = await open_door(heartbeat=0.05)
    cold_start(door.gateway)
    async with door.http.get("/admin/events?follow=false") as response:
        assert response.content_type == "text/event-stream"
        rows = [json.loads(line[6:]) for line in (await response.text()).splitlines() if line.startswith("data: ")]
    assert [row["event"] for row in rows] == ["joined", "deployed", "placed", "loaded", "dispatched"]
    assert rows[-1]["request"] == "id-door:1" and rows[2]["node"] == "0"
    async with door.http.get(f"/admin/events?since={rows[2]['id']}") as response:
        assert [each["event"] for _, each in await frames(response, 2)] == ["loaded", "dispatched"]
        assert (await frames(response, 1))[0] == (":", "no events")
        door.gateway.observer.saw(ev.WorkerLeft(20.0, "tcp://1"), [])
        while (frame := (await frames(response, 1))[0])[0] == ":":
            pass
        assert frame[1]["event"] == "left" and int(frame[0]) == frame[1]["id"] == rows[-1]["id"] + 1
    async with door.http.get("/admin/events?model=m&last=1", headers={"Last-Event-ID": str(rows[0]["id"])}) as response:
        assert (await frames(response, 1))[0][1]["event"] == "dispatched"


async def test_a_reader_that_is_too_slow_is_dropped_and_told_so(open_door: OpenDoor):
    door = await open_door()
    cold_start(door.gateway)
    real = door.gateway.events

    async def late(since: int, model: str | None, last: int | None, wait_s: float) -> dict[str, Any]:
        page = await real(since, model, last, 0.0)
        return page | {"complete": since == 0}

    door.gateway.events = late
    async with door.http.get("/admin/events") as response:
        lines = (await response.text()).split("\n\n")
    assert "read too slowly" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]


async def test_those_who_follow_are_told_when_the_front_door_stops(open_door: OpenDoor):
    door = await open_door()
    cold_start(door.gateway)
    async with door.http.get("/admin/events") as response:
        await frames(response, 5)
        stopping = asyncio.create_task(door.stop())
        assert "stopping" in (await frames(response, 1))[0][1]["error"]["message"]
        await stopping


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=-1", "since"),
        ("since=x", "since"),
        ("since=" + "9" * 5000, "since"),
        ("last=1.5", "last"),
        ("follow=maybe", "follow"),
        ("sinc=3", "sinc"),
    ],
)
async def test_questions_that_make_no_sense_are_refused(open_door: OpenDoor, query: str, param: str):
    door = await open_door()
    status, told = await get(door, f"/admin/events?{query}")
    assert (status, told["error"]["param"]) == (400, param)


# --- metrics ---------------------------------------------------------------------------------------------------------

OWN = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
}
OF_CLUSTER = {
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:num_preemptions": "counter",
    "sllmdask_cold_starts": "counter",
    "sllmdask_load_duration_seconds": "histogram",
    "sllmdask_load_bytes": "counter",
    "sllmdask_load_estimate_error_ratio": "histogram",
    "sllmdask_tier_used_bytes": "gauge",
    "sllmdask_tier_capacity_bytes": "gauge",
    "sllmdask_evictions": "counter",
    "sllmdask_migrations": "counter",
    "sllmdask_migration_downtime_seconds": "histogram",
    "sllmdask_migration_bytes": "counter",
    "sllmdask_migration_estimate_error_ratio": "histogram",
    "sllmdask_resumes": "counter",
    "sllmdask_resume_downtime_seconds": "histogram",
    "sllmdask_instances": "gauge",
    "sllmdask_queue_depth": "gauge",
    "sllmdask_admission_rejected": "counter",
    "sllmdask_device_seconds": "counter",
    "sllmdask_scheduler_up": "gauge",
}


async def test_the_promised_names_and_types_are_there_and_the_scheduler_may_be_away(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    found = await scrape(door)
    assert {name: family.type for name, family in found.items()} == OWN | OF_CLUSTER
    assert values(found["sllmdask_scheduler_up"], "sllmdask_scheduler_up") == 1
    away = await open_door(m=FakeModel())
    away.gateway.ready = False
    found = await scrape(away)
    assert found.keys() == OWN.keys() | {"sllmdask_scheduler_up"}
    assert values(found["sllmdask_scheduler_up"], "sllmdask_scheduler_up") == 0


async def test_what_requests_cost_is_counted_by_model_and_by_how_they_ended(open_door: OpenDoor):
    gate = asyncio.Event()
    door = await open_door(
        m=FakeModel(answer=lambda _: "abcd"),
        waits=FakeModel(gate=gate),
        bad=FakeModel(refuse=LoadFailed("bad", "truncated")),
        breaks=FakeModel(answer=lambda _: "abcd", fail=EngineError("broken"), fail_after=2),
    )
    for body in (
        HI,
        {**HI, "n": 2},
        {**HI, "stream": True},
        {**HI, "model": "bad"},
        {**HI, "model": "breaks"},
        {**HI, "model": "x"},
    ):
        async with door.http.post("/v1/chat/completions", json=body) as response:
            await response.read()
    waiting = asyncio.create_task(door.http.post("/v1/chat/completions", json={**HI, "model": "waits"}))
    await door.gateway.until(lambda: door.gateway.n_running == 1)
    found = await scrape(door)
    n_prompt = len(door.gateway.asked[0].prompt_ids)
    assert values(found["vllm:num_requests_waiting"], "vllm:num_requests_waiting", model_name="waits") == 1
    assert values(found["vllm:generation_tokens"], "vllm:generation_tokens_total", model_name="m") == 16
    assert values(found["vllm:prompt_tokens"], "vllm:prompt_tokens_total", model_name="m") == 3 * n_prompt
    ended = {
        (each.labels["model_name"], each.labels["finished_reason"]): each.value for each in found["vllm:request_success"].samples
    }
    assert ended == {("m", "stop"): 4, ("bad", "error"): 1, ("breaks", "error"): 1}
    first, between = found["vllm:time_to_first_token_seconds"], found["vllm:inter_token_latency_seconds"]
    assert values(first, "vllm:time_to_first_token_seconds_count", model_name="m") == 4
    assert values(between, "vllm:inter_token_latency_seconds_count", model_name="m") == 12
    assert values(between, "vllm:inter_token_latency_seconds_count", model_name="breaks") == 1
    assert not any(each.labels.get("model_name") == "x" for family in found.values() for each in family.samples)
    waiting.cancel()
    await door.gateway.until(lambda: door.gateway.n_running == 0)
    for _ in range(100):
        found = await scrape(door)
        if values(found["vllm:request_success"], "vllm:request_success_total", model_name="waits", finished_reason="abort"):
            break
    assert values(found["vllm:num_requests_waiting"], "vllm:num_requests_waiting") == 0
    assert values(found["vllm:num_requests_running"], "vllm:num_requests_running") == 0
    assert values(found["vllm:request_success"], "vllm:request_success_total", model_name="waits", finished_reason="abort") == 1


async def test_what_the_cluster_did_is_counted_and_only_grows(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    cold_start(door.gateway)
    before = await scrape(door)
    cold = before["sllmdask_cold_starts"].samples
    assert [(each.labels, each.value) for each in cold] == [({"model": "m", "tier": "disk", "outcome": "loaded"}, 1)]
    load = before["sllmdask_load_duration_seconds"]
    took = {"model": "m", "tier": "disk", "phase": "total"}
    assert values(load, "sllmdask_load_duration_seconds_sum", **took) == 2.5
    assert values(load, "sllmdask_load_duration_seconds_bucket", **took, le="2.5") == 1
    assert values(load, "sllmdask_load_duration_seconds_bucket", **took, le="1.0") == 0
    assert values(load, "sllmdask_load_duration_seconds_bucket", **took, le="+Inf") == 1
    error = before["sllmdask_load_estimate_error_ratio"]
    assert values(error, "sllmdask_load_estimate_error_ratio_sum") == pytest.approx(0.2)
    assert values(before["sllmdask_load_bytes"], "sllmdask_load_bytes_total", tier="disk") == 2**20
    request = RequestView("door:2", "m", "door", 20.0, 30.0)
    refusal = Refuse("door:2", "door", LoadFailed("m", "it is gone"))
    door.gateway.observer.saw(ev.RequestArrived(20.0, request), [refusal])
    door.gateway.observer.saw(ev.WorkerLeft(21.0, "tcp://1"), [])
    # What was told a moment ago serves for a second, at one front door.
    again = await open_door(m=FakeModel())
    again.gateway.observer = door.gateway.observer
    after = await scrape(again)
    assert values(after["sllmdask_admission_rejected"], "sllmdask_admission_rejected_total", reason="load_failed") == 1
    for name, kind in OF_CLUSTER.items():
        if kind in ("counter", "histogram"):
            new = {(each.name, *sorted(each.labels.items())): each.value for each in after[name].samples}
            for each in before[name].samples:
                assert new[(each.name, *sorted(each.labels.items()))] >= each.value


async def test_series_of_models_that_are_gone_are_bounded():
    metrics = FrontDoorMetrics()
    for n in range(N_DELETED + 50):
        with metrics.watch(f"m{n}", [5], 0.0):
            pass
    families = {family["name"]: family for family in metrics.families(["m0"])}
    models = [labels[0] for labels, _ in families["vllm:request_success_total"]["samples"]]
    assert len(models) == N_DELETED + 1 and "m0" in models and "m1" not in models
