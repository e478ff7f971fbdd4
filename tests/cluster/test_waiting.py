"""What operators hear who wait for a load."""

from __future__ import annotations

import asyncio

import pytest

from sllmdask.cluster.waiting import N_FAILED, LoadProgress
from sllmdask.errors import LoadFailed
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.views import InstanceState, InstanceView, Tier

pytestmark = pytest.mark.asyncio


def loading(*, done: int) -> tuple[Controller, LoadProgress]:
    """An instance ``m/1`` that takes requests, and of which `done` of ten bytes are there."""
    controller = Controller(ControllerSettings())
    controller.instances["m/1"] = InstanceView("m/1", "m", "tcp://a", 1, InstanceState.READY, 0.0, loaded_from=Tier.DISK)
    progress = LoadProgress(controller, lambda: None)
    progress.reported({"instance": "m/1", "done": done, "total": 10, "tier": "disk", "bytes_per_s": 1.0})
    return controller, progress


async def test_who_waits_for_the_last_byte_of_an_instance_that_fails_hears_the_reason():
    controller, progress = loading(done=9)
    waiting = asyncio.create_task(progress.until_read("m/1"))
    await asyncio.sleep(0)
    progress.failed("m/1", "its last byte is wrong")
    del controller.instances["m/1"]
    progress.settle()
    with pytest.raises(LoadFailed, match="its last byte is wrong"):
        await waiting


async def test_so_does_who_begins_to_wait_when_it_has_failed_already():
    controller, progress = loading(done=9)
    progress.failed("m/1", "its last byte is wrong")
    del controller.instances["m/1"]
    for number in range(N_FAILED - 1):
        progress.failed(f"other/{number}", "something else")
    with pytest.raises(LoadFailed, match="its last byte is wrong"):
        await progress.until_read("m/1")


async def test_nobody_waits_for_an_instance_that_is_read_or_has_left():
    controller, progress = loading(done=10)
    await progress.until_read("m/1")
    del controller.instances["m/1"]
    await progress.until_read("m/1")
