"""Operators' routes that load, unload and fetch: what they take, refuse and answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sllmdask.errors import LoadFailed
from tests.fakes import FakeModel
from tests.server.conftest import Door

pytestmark = pytest.mark.asyncio

OpenDoor = Callable[..., Awaitable[Door]]


async def post(door: Door, path: str, body: Any) -> tuple[int, Any]:
    async with door.http.post(path, json=body) as response:
        return response.status, await response.json()


async def test_a_load_is_answered_when_it_is_done_or_at_once(open_door: OpenDoor):
    gate = asyncio.Event()
    door = await open_door(m=FakeModel(state="disk", gate=gate, cold_start="disk"))
    assert await post(door, "/admin/load", {"model": "m", "wait": False}) == (
        202,
        {
            "model": "m",
            "tier": "device",
            "keep_alive": 300.0,
            "state": "loading",
            "node": None,
            "instance": None,
            "cold_start": None,
            "seconds": None,
            "progress": None,
        },
    )
    waiting = asyncio.create_task(post(door, "/admin/load", {"model": "m"}))
    await door.gateway.until(lambda: len(door.gateway.operated) == 2)
    assert not waiting.done()
    gate.set()
    status, loaded = await waiting
    assert (status, loaded["state"], loaded["cold_start"]) == (200, "ready", "disk")


async def test_what_is_asked_reaches_the_gateway(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    for path, body in (
        ("/admin/load", {"model": "m", "node": 1, "tier": "host"}),
        ("/admin/load/", {"model": "m", "node": None, "tier": None, "wait": None}),
        ("/admin/unload", {"model": "m", "node": "1", "wait": False}),
        ("/admin/pull", {"model": "m"}),
        ("/admin/pull", {"source": "org/x", "node": "0", "wait": False}),
        ("/admin/migrate", {"request": "r-1", "to": 1, "kind": "auto"}),
        ("/admin/migrate", {"instance": "m/1", "to": "1", "kind": "kv", "wait": False}),
        ("/admin/drain", {"node": 1}),
        ("/admin/drain", {"node": "1", "wait": False}),
        ("/admin/drain", {"node": "1", "undo": True}),
        ("/admin/pin", {"model": "m"}),
        ("/admin/pin", {"model": "m", "node": 1, "pinned": False}),
        ("/update", {"model": "m", "num_gpus": 2}),
    ):
        status, _ = await post(door, path, body)
        assert status == (202 if body.get("wait") is False else 200)
    assert door.gateway.operated == [
        ("load", "m", "1", "host", True),
        ("load", "m", None, "device", True),
        ("unload", "m", "1", False),
        ("pull", "m", None, None, True),
        ("pull", None, "org/x", "0", False),
        ("migrate", "r-1", None, "1", None, True),
        ("migrate", None, "m/1", "1", "kv", False),
        ("drain", "1", True, False),
        ("drain", "1", False, False),
        ("drain", "1", True, True),
        ("pin", "m", None, True),
        ("pin", "m", "1", False),
        ("update", "m", {"model": "m", "num_gpus": 2}),
    ]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/admin/load", {}, "model", "must be a name"),
        ("/admin/load", {"model": ["m"]}, "model", "must be a name"),
        ("/admin/load", {"model": "m", "tier": "disk"}, "tier", "'device' or 'host'"),
        ("/admin/load", {"model": "m", "node": True}, "node", "must be a name"),
        ("/admin/load", {"model": "m", "wait": "no"}, "wait", "true or false"),
        ("/admin/load", {"model": "m", "nod": "1"}, "nod", "Did you mean 'node'?"),
        ("/admin/unload", {"model": "m", "tier": "host"}, "tier", "Known are 'model', 'node', 'wait'."),
        ("/admin/pull", {}, "model", "either 'model'"),
        ("/admin/pull", {"model": "m", "source": "x"}, "model", "either 'model'"),
        ("/admin/pull", ["m"], None, "JSON object"),
        ("/delete", {"name": "m"}, "name", "Unknown field"),
        ("/admin/migrate", {"to": "1"}, "request", "Give either"),
        ("/admin/migrate", {"to": "1", "request": "r", "instance": "m/1"}, "request", "Give either"),
        ("/admin/migrate", {"request": "r"}, "to", "to must name the node"),
        ("/admin/migrate", {"request": "r", "to": "1", "kind": "copy"}, "kind", "must be"),
        ("/admin/drain", {}, "node", "node must name the node"),
        ("/admin/drain", {"node": "1", "undo": "yes"}, "undo", "undo must be true or false"),
        ("/admin/drain", {"node": "1", "force": True}, "force", "Known are 'node', 'wait', 'undo'."),
        ("/delete", {"model": "m", "force": "yes"}, "force", "force must be true or false"),
        ("/admin/pin", {"model": "m", "pinned": 1.5}, "pinned", "pinned must be true or false"),
        ("/admin/pin", {"model": "m", "tier": "host"}, "tier", "Known are"),
        ("/update", {"num_gpus": 1}, "model", "must be a name"),
        ("/update", ["m"], None, "JSON object"),
    ],
)
async def test_what_makes_no_sense_is_refused_before_anybody_is_asked(
    open_door: OpenDoor, path: str, body: Any, param: str | None, message: str
):
    door = await open_door(m=FakeModel())
    status, answer = await post(door, path, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_request", param)
    assert message in answer["error"]["message"]
    assert door.gateway.operated == []


async def test_what_the_cluster_refuses_has_its_status_and_reason(open_door: OpenDoor):
    door = await open_door(bad=FakeModel(refuse=LoadFailed("bad", "truncated")))
    status, answer = await post(door, "/admin/load", {"model": "bad"})
    assert (status, answer["error"]["code"]) == (503, "load_failed") and "truncated" in answer["error"]["message"]
    status, answer = await post(door, "/admin/unload", {"model": "none"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = await post(door, "/admin/migrate", {"request": "gone", "to": "1"})
    assert (status, answer["error"]["param"]) == (400, "request")
    status, answer = await post(door, "/admin/migrate", {"request": "stuck", "to": "1"})
    assert (status, answer["error"]["code"]) == (409, "move_failed") and "no room" in answer["error"]["message"]
    async with door.http.get("/admin/load") as response:
        assert response.status == 405
