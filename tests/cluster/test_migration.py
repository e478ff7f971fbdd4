"""Answers that move between real worker processes while their clients read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.asking import register
from tests.cluster.harness import Stream, get, instances, post, two_workers, until

#: Long enough to be moved several times, and drawn so that a lost or doubled token changes all that follows.
BODY = {
    "model": "a",
    "prompt": "once upon a time",
    "max_tokens": 1500,
    "temperature": 1.0,
    "seed": 3,
    "frequency_penalty": 0.3,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[str]:
    with two_workers(tmp_path_factory.mktemp("moving")) as url:
        register(
            url,
            "a",
            checkpoints["a"],
            auto_scaling_config={"max_instances": 1, "target": 100},
            router_config={"migration_delta": 4},
        )
        yield url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> dict[str, Any]:
    """The answer of a request that stays."""
    answer: dict[str, Any] = post(url, "/v1/completions", BODY)
    return answer


def running(url: str) -> list[dict[str, Any]]:
    return [row for row in get(url, "/admin/requests")["requests"] if row["state"] == "running"]


def other(node: str) -> str:
    return {"0": "1", "1": "0"}[node]


def read(stream: Stream) -> tuple[str, str | None, dict[str, Any]]:
    """Text, finish reason and usage of a stream to its end."""
    text, reason, usage = "", None, {}
    for chunk in stream.chunks():
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
    return text, reason, usage


def test_a_stream_goes_on_through_moves_of_its_instance_and_is_the_one_that_stayed(url: str, undisturbed: dict[str, Any]):
    stream = Stream(url, {**BODY, "stream_options": {"include_usage": True}})
    [row] = until("it runs", lambda: [row for row in running(url) if row["n_tokens"] > 20])
    source = row["node"]
    [before] = instances(url)
    moved = post(url, "/admin/migrate", {"instance": before["instance"], "to": other(source)})
    assert (moved["state"], moved["left"]) == ("moved", 0), moved
    [move] = moved["moves"]
    assert (move["request"], move["source"], move["destination"]) == (row["id"], source, other(source))
    [after] = instances(url)
    assert after["instance"] == moved["instance"] != before["instance"]
    text, reason, usage = read(stream)
    [choice] = undisturbed["choices"]
    assert (text, reason) == (choice["text"], choice["finish_reason"])
    assert usage["completion_tokens"] == undisturbed["usage"]["completion_tokens"] == 1500
    [row] = [row for row in get(url, "/admin/requests")["requests"] if row["id"] == row["id"]][:1]
    assert row["path"] == [source, other(source)] and row["moves"][0]["pause_ms"] > 0
    assert until("nothing stays", lambda: not any(each["n_requests"] for each in instances(url)))


def test_a_request_moves_by_itself_there_and_back_by_either_kind(url: str, undisturbed: dict[str, Any]):
    register(url, "a", instances_source(url), auto_scaling_config={"max_instances": 2, "target": 100})
    stream = Stream(url, {**BODY, "stream_options": {"include_usage": True}})
    [row] = until("it runs", lambda: [row for row in running(url) if row["n_tokens"] > 20])
    home = row["node"]
    for to, kind in ((other(home), "tokens"), (home, "kv")):
        moved = post(url, "/admin/migrate", {"request": row["id"], "to": to, "kind": kind})
        assert moved["state"] == "moved", moved
        assert (moved["moves"][0]["kind"], moved["moves"][0]["outcome"]) == (kind, "moved")
    again = post(url, "/admin/migrate", {"request": row["id"], "to": home})
    assert (again["status"], again["error"]["param"]) == (400, "to")
    text, reason, usage = read(stream)
    [choice] = undisturbed["choices"]
    assert (text, reason, usage["completion_tokens"]) == (choice["text"], choice["finish_reason"], 1500)
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
