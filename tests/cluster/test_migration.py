"""Answers that move between real worker processes while their clients read them."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from prometheus_client.parser import text_string_to_metric_families

from tests.checkpoints import make_checkpoint
from tests.cluster.asking import register
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers

pytestmark = pytest.mark.cluster

#: Tokens of an answer, of a model that takes some milliseconds for each.
N = 300
#: Long enough to be moved several times, and drawn so that a lost or doubled token changes all that follows.
BODY = {
    "model": "a",
    "prompt": "once upon a time",
    "max_tokens": N,
    "temperature": 1.0,
    "seed": 3,
    "frequency_penalty": 0.3,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("moving"))
    try:
        processes.start_scheduler()
        for name in ("0", "1"):
            processes.start_worker(name)
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("both workers joined", lambda: len(workers(url)) == 2)
    scaling = {"max_instances": 1, "target": 100, "keep_alive": 0}
    source = make_checkpoint(cluster.directory / "a", "llama", hidden=512)
    register(url, "a", source, auto_scaling_config=scaling, router_config={"migration_delta": 4})
    return url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> dict[str, Any]:
    """The answer of a request that stays."""
    answer: dict[str, Any] = post(url, "/v1/completions", BODY)
    return answer


def begin(url: str, name: str) -> tuple[Stream, dict[str, Any]]:
    """A stream that has begun, and what the front door says of it."""
    stream = Stream(url, {**BODY, "stream_options": {"include_usage": True}}, {"x-request-id": name})
    next(stream.chunks())
    return stream, row_of(url, name)


def row_of(url: str, name: str) -> dict[str, Any]:
    return next(row for row in get(url, "/admin/requests")["requests"] if row["id"] == name)


def other(node: str) -> str:
    return {"0": "1", "1": "0"}[node]


def read(stream: Stream) -> tuple[str, str | None, dict[str, Any]]:
    """The rest of the text, finish reason and usage of a stream."""
    text, reason, usage = "", None, {}
    for chunk in stream.chunks():
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
    return text, reason, usage


def test_a_stream_goes_on_through_moves_of_its_instance_and_is_the_one_that_stayed(url: str, undisturbed: dict[str, Any]):
    stream, row = begin(url, "with-its-instance")
    source = row["node"]
    [before] = instances(url)
    moved = post(url, "/admin/migrate", {"instance": before["instance"], "to": other(source)})
    assert (moved.get("state"), moved.get("left")) == ("moved", 0), moved
    [move] = moved["moves"]
    assert (move["request"], move["source"], move["destination"]) == (row["id"], source, other(source))
    [after] = instances(url)
    assert after["instance"] == moved["instance"] != before["instance"]
    text, reason, usage = read(stream)
    [choice] = undisturbed["choices"]
    assert choice["text"].endswith(text) and len(text) > len(choice["text"]) / 2
    assert reason == choice["finish_reason"]
    assert usage["completion_tokens"] == undisturbed["usage"]["completion_tokens"] == N
    row = row_of(url, row["id"])
    assert row["path"] == [source, other(source)] and row["moves"][0]["pause_ms"] > 0
    assert until("nothing stays", lambda: not any(each["n_requests"] for each in instances(url)))


def test_a_request_moves_by_itself_there_and_back_by_either_kind(url: str, undisturbed: dict[str, Any]):
    register(url, "a", instances_source(url), auto_scaling_config={"max_instances": 2, "target": 100})
    stream, row = begin(url, "by-itself")
    home = row["node"]
    for to, kind in ((other(home), "tokens"), (home, "kv")):
        moved = post(url, "/admin/migrate", {"request": row["id"], "to": to, "kind": kind})
        assert moved["state"] == "moved", moved
        assert (moved["moves"][0]["kind"], moved["moves"][0]["outcome"]) == (kind, "moved")
    again = post(url, "/admin/migrate", {"request": row["id"], "to": home})
    assert (again["status"], again["error"]["param"]) == (400, "to")
    text, reason, usage = read(stream)
    [choice] = undisturbed["choices"]
    assert choice["text"].endswith(text)
    assert (reason, usage["completion_tokens"]) == (choice["finish_reason"], N)
    gone = post(url, "/admin/migrate", {"request": row["id"], "to": home})
    assert gone["status"] == 400 and "has ended" in gone["error"]["message"]
    for body, param in (
        ({"request": "nobody", "to": "1"}, "request"),
        ({"instance": "a/99", "to": "1"}, "instance"),
        ({"request": "nobody", "to": "7"}, "to"),
    ):
        answer = post(url, "/admin/migrate", body)
        assert (answer["status"], answer["error"]["param"]) == (400, param), answer


def instances_source(url: str) -> str:
    [row] = get(url, "/admin/models")["models"]
    source: str = row["source"]
    return source


def test_what_the_controller_decides_on_is_enacted(url: str, undisturbed: dict[str, Any], cluster: Processes):
    """The decision is put into the mouth of the controller, with the instance that would come of it."""

    def decide(dask_scheduler: Any) -> tuple[str, str]:
        from dataclasses import replace

        from sllmdask.policy.decisions import Migrate
        from sllmdask.policy.views import InstanceState

        plugin = dask_scheduler.plugins["sllmdask"]
        controller = plugin.controller
        source = next(each for each in controller.instances.values() if each.n_requests)
        to = next(each for each in controller.workers.values() if each.address != source.worker)
        loading = {"state": InstanceState.LOADING, "n_requests": 0, "ready_at": None}
        controller.instances["a/moved"] = replace(source, id="a/moved", worker=to.address, **loading)
        plugin.enact(Migrate(source.id, "a/moved", "a", source.worker, to.address, 1.0, "a test"))
        return source.id, to.name

    def outcome(dask_scheduler: Any) -> list[str]:
        events = dask_scheduler.plugins["sllmdask"].events
        return [repr(event) for event in events if type(event).__name__ in ("InstanceMigrated", "MigrationFailed")]

    post(url, "/admin/unload", {"model": "a"})
    stream, _ = begin(url, "by-decision")
    with Client(cluster.scheduler, set_as_default=False) as client:
        instance, to = client.run_on_scheduler(decide)
        [event] = until("it is enacted", lambda: client.run_on_scheduler(outcome))
    assert "InstanceMigrated(at=" in event and f"instance={instance!r}, successor='a/moved'" in event
    text, _, usage = read(stream)
    assert undisturbed["choices"][0]["text"].endswith(text) and usage["completion_tokens"] == N
    row = row_of(url, "by-decision")
    assert row["path"][-1] == to and row["moves"][-1]["cause"] == "a test"


# --- seeing it; the last test, since it kills a worker ---


def counted(url: str) -> dict[str, float]:
    """What is counted of moves and losses: by name and the values of labels, in the order of the labels' names."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in families
        for sample in family.samples
        if family.name.startswith(("sllmdask_migration", "sllmdask_resume")) and not sample.name.endswith("_bucket")
    }


def grown(url: str, before: dict[str, float]) -> dict[str, float] | None:
    """By how much each count has grown, once that of resumes has."""
    after = {name: n - before.get(name, 0.0) for name, n in counted(url).items()}
    return after if after.get("sllmdask_resumes_total resumed worker") else None


def events(url: str, request: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/admin/events?follow=false", timeout=30) as response:
        lines = response.read().decode().splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return [event for event in told if event["request"] == request]


def whole(url: str, request: str) -> dict[str, Any] | None:
    """The explanation of a request that has ended, once its workers have told of all its moves."""
    told: dict[str, Any] = get(url, f"/admin/explain/{request}")
    return told if told["state"] == "finished" and all(move.get("expected_s") for move in told["moves"]) else None


def test_moves_and_a_death_are_counted_told_and_explained_at_every_front_door(url: str, cluster: Processes):
    register(url, "a", instances_source(url), auto_scaling_config={"max_instances": 2, "target": 100})
    before = counted(url)
    second = cluster.start_door("second-door")
    n = 2 * N
    stream = Stream(url, {**BODY, "max_tokens": n, "stream_options": {"include_usage": True}}, {"x-request-id": "seen"})
    next(stream.chunks())
    home = row_of(url, "seen")["node"]
    key = get(second, "/admin/explain/seen")["key"]
    for to, kind in ((other(home), "kv"), (home, "tokens")):
        moved = post(second, "/admin/migrate", {"request": key, "to": to, "kind": kind})
        assert moved["state"] == "moved", moved
    until("its client has another token", lambda: row_of(url, "seen")["moves"][-1]["pause_ms"])
    cluster.stop(f"worker-{home}", signal.SIGKILL)
    _, reason, usage = read(stream)
    assert (reason, usage["completion_tokens"]) == ("length", n)

    told = until("all of it is known", lambda: whole(second, "seen"))
    assert told["path"] == [home, other(home), home, other(home)] == row_of(second, "seen")["path"]
    assert [(move["kind"], move["outcome"]) for move in told["moves"]] == [("kv", "moved"), ("tokens", "moved")]
    for move in told["moves"]:
        assert move["pause_ms"] > 0 and move["stop_ms"] > 0 and "an operator asked" in move["text"]
    (resume,) = told["resumes"]
    assert (resume["node"], resume["reason"], resume["outcome"], resume["to"]) == (home, "worker", "resumed", other(home))
    assert 0 < resume["n_tokens"] < n and resume["pause_ms"] > 0

    story = events(second, "seen")
    names = [each["event"] for each in story]
    assert names == ["dispatched", "moved", "moved", "returned", "dispatched", "resumed", "ended"]
    assert {each["id"] for each in story} <= {each["id"] for each in told["happened"]}
    for event, move in zip(story[1:3], told["moves"], strict=True):
        assert (event["kind"], event["reason"], event["pause_ms"]) == (move["kind"], "operator", move["pause_ms"])

    after = until("the metrics are new", lambda: grown(url, before))
    for move in told["moves"]:
        kind = move["kind"]
        assert after[f"sllmdask_migrations_total {kind} moved operator"] == 1
        assert after[f"sllmdask_migration_bytes_total {kind}"] == move["nbytes"]
        assert after[f"sllmdask_migration_downtime_seconds_count {kind}"] == 1
        assert after[f"sllmdask_migration_downtime_seconds_sum {kind}"] == pytest.approx(move["pause_ms"] / 1e3)
    assert after["sllmdask_resumes_total resumed worker"] == 1
    assert counted(second) == counted(url)
