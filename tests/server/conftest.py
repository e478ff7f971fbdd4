"""A front door over a fake gateway, in the test's own loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from sllmdask.config import ServerSettings
from sllmdask.server import stream
from sllmdask.server.app import make_app, start
from tests.fakes import FakeGateway


@dataclass
class Door:
    url: str
    gateway: FakeGateway
    http: aiohttp.ClientSession
    stop: Callable[[], Awaitable[None]]


@pytest.fixture(autouse=True)
def headers_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """How long headers wait for an instance: on a busy machine too, only as long as the test says."""

    def wait(seconds: float) -> None:
        monkeypatch.setattr(stream, "HEADER_GRACE_S", seconds)

    wait(60.0)
    return wait


@pytest_asyncio.fixture
async def open_door() -> AsyncIterator[Callable[..., Awaitable[Door]]]:
    """``await open_door(model=FakeModel(...), heartbeat=0.05)``: keyword arguments are models, or settings of the server."""
    opened = []

    async def open_one(**given: object) -> Door:
        settings = ServerSettings(port=0, **{k: given.pop(k) for k in list(given) if k in ServerSettings.model_fields})
        gateway = FakeGateway(**given)
        runner, url = await start(make_app(gateway, settings), settings)
        door = Door(url, gateway, aiohttp.ClientSession(url), runner.cleanup)
        opened.append(door)
        return door

    yield open_one
    for door in opened:
        await door.http.close()
        await door.stop()
