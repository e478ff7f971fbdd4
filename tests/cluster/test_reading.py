"""What users see of a model that takes requests while it is being read: from a web server that a test can hold."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sllmdask.cluster import scheduler_plugin
from sllmdask.cluster.scheduler_plugin import SllmSchedulerPlugin
from tests.checkpoints import make_checkpoint
from tests.cluster.harness import Stream, get, instances, post, two_workers, until, workers
from tests.cluster.test_replay import one_slot
from tests.cluster.test_replay import until as until_async
from tests.loader.serving import Site

pytestmark = pytest.mark.cluster

ASK = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


class Tap:
    """Lets this many pieces of tensor data pass; slowly the others, once it drips; all of them when it is opened."""

    def __init__(self, n_pieces: int) -> None:
        self._pieces = threading.Semaphore(n_pieces)
        self._dripping, self._open = threading.Event(), threading.Event()
        self.drip, self.open = self._dripping.set, self._open.set

    def __call__(self, *_: object) -> None:
        while not self._open.is_set() and not self._pieces.acquire(timeout=0.05):
            if self._dripping.is_set():
                return


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """``site.url + "/NAME"`` is a model; ``site.on_data`` holds its bytes."""
    root = tmp_path_factory.mktemp("site")
    for seed, name in enumerate(("held", "lost")):
        make_checkpoint(root / name, "llama", hidden=256, seed=seed)
    with Site(root) as site:
        yield site


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A front door with two workers, ``0`` and ``1``, that read in small pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_SLLMDASK__WORKER__CHUNK_SIZE", "128KiB")
        with two_workers(tmp_path_factory.mktemp("reading")) as url:
            yield url


@pytest.fixture
def tap(site: Site) -> Iterator[Tap]:
    tap = site.on_data = Tap(8)
    yield tap
    tap.open()


def deploy(url: str, name: str, site: Site) -> None:
    source = {"pretrained_model_name_or_path": f"{site.url}/{name}"}
    assert post(url, "/register", {"model": name, "backend_config": source})["status"] == "ok"


def row_of(url: str, model: str) -> dict[str, Any]:
    return {row["model"]: row for row in get(url, "/admin/models")["models"]}[model]


def test_a_model_is_loading_for_who_looks_at_it_until_its_last_byte_is_there(url: str, site: Site, tap: Tap):
    deploy(url, "held", site)
    at_once = {"model": "held", "wait": False}
    assert post(url, "/admin/load", at_once)["state"] == "loading"
    told = until("it takes requests", lambda: post(url, "/admin/load", at_once)["progress"])
    total = told["total"]
    assert told["tier"] == "remote" and 0 <= told["done"] < total
    executor = ThreadPoolExecutor(1)
    loaded = executor.submit(post, url, "/admin/load", {"model": "held"})

    lines = Stream(url, {"model": "held", **ASK}).lines()
    first = next(line for line in lines if line.startswith(": loading held"))

    def both() -> tuple[dict[str, Any], dict[str, Any]] | None:
        row, (instance,) = row_of(url, "held"), instances(url)
        return (row, instance) if row["progress"] and row["done"] == instance["progress"]["done"] else None

    row, instance = until("some of it is there, and the model and its instance tell how much", both)
    assert (row["state"], row["instances"], row["tier"]) == ("loading", 0, "remote")
    assert 0 < row["done"] < total and row["progress"] == row["done"] / total and row["bytes_per_s"] > 0
    assert (instance["state"], instance["n_requests"]) == ("ready", 1)
    held = [(model["state"], model["tier"]) for worker in workers(url) for model in worker["models"] if worker["instances"]]
    assert ("loading", "device") not in held and ("ready", "device") not in held and "loading" in dict(held)

    tap.drip()
    percent = 100 * row["done"] // total
    moved = next(line for line in lines if line.startswith(": loading held") and f" {percent}% " not in line and line != first)
    assert moved.endswith("/s") and " remote " in moved
    assert not loaded.done()
    tap.open()
    assert loaded.result(30)["state"] == "ready" and loaded.result()["progress"] is None
    executor.shutdown()
    rest = list(lines)
    assert rest[-1] == "data: [DONE]" and sum(line.startswith("data: {") for line in rest) >= 1
    tokens = next(i for i, line in enumerate(rest) if line.startswith("data: "))
    assert not any("loading" in line for line in rest[tokens:])
    row = until("it is ready", lambda: (row := row_of(url, "held"))["state"] == "ready" and row)
    assert (row["instances"], row["progress"], row["done"], row["tier"]) == (1, None, None, None)
    assert [instance["progress"] for instance in instances(url)] == [None]
    assert post(url, "/admin/load", at_once)["state"] == "ready"


def test_the_headers_of_a_request_whose_first_worker_died_are_those_of_the_second(url: str, site: Site, tap: Tap):
    deploy(url, "lost", site)

    def ask() -> dict[str, str]:
        body = json.dumps({"model": "lost", **ASK}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(response.headers)

    def placed() -> dict[str, Any] | None:
        return next((row for row in get(url, "/admin/requests")["requests"] if row["model"] == "lost" and row["node"]), None)

    with ThreadPoolExecutor(1) as executor:
        asked_at = time.monotonic()
        asking = executor.submit(ask)
        row = until("it is dispatched", placed)
        (pid,) = (worker["pid"] for worker in workers(url) if worker["name"] == row["node"])
        killed_after_ms = 1e3 * (time.monotonic() - asked_at)
        os.kill(pid, signal.SIGKILL)
        tap.open()
        headers = asking.result(60)
    ended = placed()
    assert ended is not None and ended["path"][0] == row["node"] and len(ended["path"]) > 1
    assert headers["x-sllmdask-node"] == ended["node"] == ended["path"][-1]
    assert float(headers["x-sllmdask-queue-ms"]) > killed_after_ms - 100


@pytest.mark.asyncio
async def test_an_answer_ends_the_loading_of_its_instance_also_if_the_last_report_of_it_is_lost(monkeypatch):
    report = SllmSchedulerPlugin.worker_report
    lost: list[dict[str, Any]] = []

    def lose_the_last(self: SllmSchedulerPlugin, worker: str, message: dict[str, Any]) -> None:
        if message["kind"] == "progress" and message["done"] == message["total"]:
            lost.append(message)
        elif message["kind"] != "account":
            report(self, worker, message)

    monkeypatch.setattr(SllmSchedulerPlugin, "worker_report", lose_the_last)
    async with one_slot() as (_, traffic):
        await traffic.deploy("demo-llama")
        assert (await traffic.gateway.load("demo-llama", None, "device", False))["state"] == "loading"
        await until_async("it is told as loading", lambda: traffic.gateway.models()[0]["state"] == "loading")
        assert await traffic.ask("demo-llama", 5) == 5
        await until_async("it is ready", lambda: traffic.gateway.models()[0]["state"] == "ready", 5)
    assert lost


@pytest.mark.asyncio
async def test_an_instance_that_has_just_failed_is_no_stray_though_an_account_of_before_lists_it(monkeypatch):
    async with one_slot() as (plugin, traffic):
        await traffic.deploy("demo-llama")
        assert await traffic.ask("demo-llama", 5) == 5
        (worker,), (instance,) = plugin.controller.workers, plugin.controller.instances
        await until_async("its worker tells of it", lambda: instance in plugin._accounts[worker]["instances"], 10)
        before = {"kind": "account", "account": plugin._accounts[worker]}
        plugin.worker_report(worker, {"kind": "failed", "instance": instance, "reason": "its bytes are not the model's"})
        assert not plugin.controller.instances
        plugin.worker_report(worker, before)
        assert not plugin._strays

        # This one its worker has not ended: it is still listed when that has taken long enough.
        monkeypatch.setattr(scheduler_plugin, "FAILED_S", 0.0)
        plugin.worker_report(worker, before)
        assert plugin._strays == {instance}
        await until_async("it is unloaded", lambda: instance not in plugin._accounts[worker]["instances"], 10)
