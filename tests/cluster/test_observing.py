"""What operators see of a real cluster: why, what, and how much; also through a front door that a request did not come by."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.harness import BIN, Processes, Stream, get, post, until

pytestmark = pytest.mark.cluster

ASK = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def other(processes: Processes, url: str) -> Iterator[str]:
    """A second front door of the same cluster."""
    yield processes.start_door("other-door")
    processes.stop("other-door")


def ask(url: str, model: str, request_id: str) -> Any:
    """The headers of a short answer."""
    headers = {"content-type": "application/json", "x-request-id": request_id}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps({"model": model, **ASK}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
        return response.headers


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Samples by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        (each.name, *(f"{name}={value}" for name, value in sorted(each.labels.items()))): each.value
        for family in families
        for each in family.samples
        if family.type != "gauge"
    }


def test_a_cold_start_is_explained_counted_and_told_by_any_front_door(url: str, other: str):
    assert get(other, "/ready") == {"status": "ready"}
    for model in ("a", "b"):
        post(url, "/admin/unload", {"model": model})
    before = scrape(other)
    since = get_events(url)[-1]["id"]
    headers = ask(url, "a", "cold-a")
    told = until("its last byte is known of", lambda: read_load(other, "cold-a"))
    assert (told["state"], told["node"], told["path"], told["n_tokens"]) == ("finished", "0", ["0"], 8)
    assert told["cold_start"] == headers["x-sllmdask-cold-start"] == told["load"]["tier"]
    assert 0 < told["queue_s"] <= told["first_token_s"] <= told["seconds"]
    assert told["load"]["took_s"] > 0 and told["load"]["error_ratio"] is not None
    assert [each["event"] for each in told["happened"]] == ["placed", "loaded", "dispatched", "ended"]
    assert all(one["after_s"] <= two["after_s"] for one, two in pairwise(told["happened"]))
    ask(url, "a", "hit-a")
    assert get(url, "/admin/explain/hit-a")["cold_start"] == "hit"
    # The one slot goes to b.
    ask(other, "b", "cold-b")
    gone = get(url, "/admin/explain/a")
    assert gone["instances"] == [] and gone["reason"].startswith("it left node 0")
    there = get(url, "/admin/explain/b")
    assert [(each["node"], each["state"]) for each in there["instances"]] == [("0", "ready")]
    assert [(each["model"], each["node"]) for each in get(url, "/admin/instances")["instances"]] == [("b", "0")]
    rows = [row for row in get_events(other) if row["id"] > since]
    for_b = ["placed", "loaded", "dispatched"]
    assert [row["event"] for row in rows if row["model"] == "b" and row["event"] in for_b] == for_b
    assert {"evicted", "unloaded"} <= {row["event"] for row in rows if row["model"] == "a"}
    # A scrape of the other front door has the cluster's counts, and only its own requests.
    until("the load is counted", lambda: scrape(other).get(("sllmdask_cold_starts_total", "model=b", *loaded(there))))
    after = scrape(other)
    assert all(after[sample] >= n for sample, n in before.items())
    own = ("vllm:request_success_total", "finished_reason=length", "model_name=b")
    assert after[own] - before.get(own, 0) == 1
    assert ("vllm:request_success_total", "finished_reason=length", "model_name=a") not in after
    env = {**os.environ, "LLM_SERVER_URL": other}
    shown = subprocess.run([str(BIN / "sllmdask"), "explain", "cold-a"], capture_output=True, text=True, env=env, timeout=60)
    assert shown.returncode == 0 and "request cold-a for a: finished on node 0" in shown.stdout
    with pytest.raises(urllib.error.HTTPError) as unknown:
        get(url, "/admin/explain/never")
    assert unknown.value.code == 404
    unknown.value.close()


def test_a_request_is_seen_and_cancelled_through_another_front_door(url: str, other: str):
    stream = Stream(url, {"model": "b", **ASK, "max_tokens": 1500})
    lines = stream.lines()
    next(line for line in lines if line.startswith("data: "))
    request = stream.response.headers["x-request-id"]

    def row() -> dict[str, Any]:
        return next((each for each in get(other, "/admin/requests")["requests"] if each["id"] == request), {})

    assert until("tokens are counted", lambda: row().get("n_tokens", 0) > 1)
    assert (row()["state"], row()["node"], row()["path"]) == ("running", "0", ["0"])
    assert post(other, "/admin/cancel", {"request": request})["cancelled"]
    last = json.loads(list(lines)[-1].removeprefix("data: "))
    stream.close()
    assert last["error"]["code"] == "cancelled" and "operator" in last["error"]["message"]
    until("the scheduler knows", lambda: get(other, f"/admin/explain/{request}")["state"] == "cancelled")
    assert row()["state"] == "cancelled"
    assert not post(other, "/admin/cancel", {"request": request})["cancelled"]
    assert post(other, "/admin/cancel", {"request": "never"})["error"]["code"] == "record_not_found"


def read_load(url: str, request: str) -> dict[str, Any] | None:
    told = get(url, f"/admin/explain/{request}")
    return told if told["ended"] is not None and told["load"]["took_s"] is not None else None


def loaded(told: dict[str, Any]) -> tuple[str, str]:
    return "outcome=loaded", f"tier={told['instances'][0]['load']['tier']}"


def get_events(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/admin/events?follow=false", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
