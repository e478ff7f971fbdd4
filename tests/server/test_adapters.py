"""Requests that ask for a LoRA adapter, in each of the ways in which clients name one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes import FakeModel
from tests.server.conftest import Door

pytestmark = pytest.mark.asyncio

OpenDoor = Callable[..., Awaitable[Door]]
ADAPTERS = {"polite": "/adapters/polite", "terse": "org/terse"}


async def open_it(open_door: OpenDoor) -> Door:
    return await open_door(**{"org/base": FakeModel(adapters=ADAPTERS), "plain": FakeModel(), "org/base:v2": FakeModel()})


@pytest.mark.parametrize(
    ("fields", "base", "adapter"),
    [
        ({"model": "org/base"}, "org/base", None),
        ({"model": "org/base", "lora_adapter_name": "polite"}, "org/base", ("polite", "/adapters/polite")),
        ({"model": "org/base", "adapter_name": "terse"}, "org/base", ("terse", "org/terse")),
        ({"model": "org/base:terse"}, "org/base", ("terse", "org/terse")),
        ({"model": "org/base", "lora_adapter_name": None}, "org/base", None),
        ({"model": "org/base", "lora_adapter_name": ""}, "org/base", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_adapter_is_named_by_a_field_or_behind_the_model(
    open_door: OpenDoor, fields: dict[str, Any], base: str, adapter: tuple[str, str] | None, stream: bool
):
    door = await open_it(open_door)
    async with door.http.post("/v1/completions", json={"prompt": "Hi", "stream": stream, **fields}) as response:
        assert response.status == 200
        await response.read()
    (asked,) = door.gateway.asked
    assert (asked.model, asked.adapter) == (base, adapter)


async def test_the_answer_is_from_the_model_that_was_asked_for(open_door: OpenDoor):
    door = await open_it(open_door)
    body = {"model": "org/base:polite", "messages": [{"role": "user", "content": "Hi"}]}
    async with door.http.post("/v1/chat/completions", json=body) as response:
        assert (await response.json())["model"] == "org/base:polite"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"model": "org/base", "lora_adapter_name": "polit"}, "adapter_not_found", "'polite'"),
        ({"model": "org/base:none"}, "adapter_not_found", "Could not find the adapter 'none'"),
        ({"model": "plain", "lora_adapter_name": "polite"}, "adapter_not_found", "does not exist here"),
        ({"model": "nobody", "lora_adapter_name": "polite"}, "model_not_found", "nobody"),
    ],
    ids=str,
)
async def test_an_unknown_adapter_is_404_with_near_names(open_door: OpenDoor, fields: dict[str, Any], code: str, words: str):
    door = await open_it(open_door)
    async with door.http.post("/v1/completions", json={"prompt": "Hi", **fields}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (404, code)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_adapter_name": 5}, "lora_adapter_name"),
        ({"adapter_name": ["polite"]}, "adapter_name"),
        ({"lora_adapter_name": "polite", "adapter_name": "terse"}, "lora_adapter_name"),
    ],
    ids=str,
)
async def test_a_name_that_is_none_is_refused(open_door: OpenDoor, fields: dict[str, Any], param: str):
    door = await open_it(open_door)
    async with door.http.post("/v1/completions", json={"model": "org/base", "prompt": "Hi", **fields}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param)


async def test_adapters_are_listed_among_the_models(open_door: OpenDoor):
    door = await open_it(open_door)
    async with door.http.get("/v1/models") as response:
        listed = {model["id"]: model.get("parent") for model in (await response.json())["data"]}
    assert listed == {
        "org/base": None,
        "org/base:polite": "org/base",
        "org/base:terse": "org/base",
        "plain": None,
        "org/base:v2": None,
    }
    async with door.http.get("/v1/models/org/base:terse") as response:
        assert (await response.json())["id"] == "org/base:terse"
