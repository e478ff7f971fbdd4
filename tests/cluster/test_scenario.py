"""The scenario of ServerlessLLM's documentation, its files unchanged: a long answer goes to the other node to make room.

Two workers of one slot, the long model on both, the short one on node 0 only. Then what goes wrong on the way. The order of the
tests matters: the last one kills a worker.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from signal import SIGKILL
from types import ModuleType
from typing import Any

import pytest
from distributed import Client, Scheduler

from sllmdask.cluster.scheduler_plugin import SllmSchedulerPlugin
from sllmdask.config import SchedulerSettings, Settings
from sllmdask.policy import events as ev
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView
from tests.checkpoints import make_checkpoint
from tests.cluster.asking import ask, register, worker
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers

pytestmark = pytest.mark.cluster

#: Of the long model: some milliseconds for a token. Tokens of an answer where one runs, and where two do.
HIDDEN, N_ALONE, N = 768, 400, 200
LONG, SHORT = "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
#: Drawn so that a lost or doubled token changes all that follows.
BODY = {"model": "long", "max_tokens": N, "temperature": 1.0, "frequency_penalty": 0.3, "ignore_eos": True, "logprobs": 0}
BODIES = [BODY | {"prompt": "once upon a time " * 10, "seed": 3}, BODY | {"prompt": "the quick brown fox " * 20, "seed": 4}]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """``examples/live_migration/run.py``."""
    path = Path(__file__).parents[2] / "examples" / "live_migration" / "run.py"
    spec = importlib.util.spec_from_file_location("live_migration", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("scenario"))
    try:
        processes.start_scheduler("--enable-migration")
        for name in ("0", "1"):
            processes.start_worker(name, "--store-dir", str(processes.directory / f"store-{name}"))
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    make_checkpoint(cluster.directory / "long", "qwen2", hidden=HIDDEN)
    make_checkpoint(cluster.directory / "short", "qwen2", seed=1)
    until("both workers joined", lambda: len(workers(url)) == 2, timeout_s=90.0)
    return url


def on_scheduler(cluster: Processes, do: Callable[..., Any], **arguments: Any) -> Any:
    with Client(cluster.scheduler, set_as_default=False) as client:
        return client.run_on_scheduler(do, **arguments)


def allow(dask_scheduler: Any, moves: bool) -> None:
    """What ``scheduler.migrate`` does when the scheduler starts."""
    dask_scheduler.plugins["sllmdask"].controller.finder.migration_lost = "" if moves else "this run has none"


@pytest.fixture(scope="module")
def runs(cluster: Processes, url: str, example: ModuleType) -> dict[str, tuple[Any, Any]]:
    """The long and the short answer, without and with migration."""
    for file, name in ((example.LONG_FILE, "long"), (example.SHORT_FILE, "short")):
        reply = post(url, "/register", example.deployment(file, str(cluster.directory / name)))
        assert reply["status"] == "ok", reply
    found = {}
    for name, moves in (("without", False), ("with", True)):
        on_scheduler(cluster, allow, moves=moves)
        found[name] = example.play(url, LONG, SHORT, n_long=N_ALONE, n_short=8)
        for model in (LONG, SHORT):
            post(url, "/admin/unload", {"model": model})
    for model in (LONG, SHORT):
        post(url, "/delete", {"model": model})
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("migrate", [True, False])
async def test_the_setting_decides_whether_anything_moves_by_itself(migrate: bool):
    scheduler = Scheduler(dashboard=False)
    settings = Settings(scheduler=SchedulerSettings(migrate=migrate))
    assert SllmSchedulerPlugin(scheduler, settings).controller.settings.can_migrate is migrate
    await scheduler.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(("lost", "closed"), [("a/1", True), ("a/2", False)])
async def test_a_request_that_is_lost_after_it_has_moved_closes_nothing_that_it_has_left(
    monkeypatch: pytest.MonkeyPatch, lost: str, closed: bool
):
    scheduler = Scheduler(dashboard=False)
    plugin = SllmSchedulerPlugin(scheduler, Settings())
    monkeypatch.setattr(plugin.effects, "enact", lambda _: None)
    for event in (
        ev.WorkerJoined(0.0, WorkerView("tcp://one", "0", 1, 1000, residency={"a": Tier.DISK})),
        ev.ModelDeployed(0.0, ModelView("a", nbytes=10)),
        *(ev.RequestArrived(0.0, RequestView(name, "a", "door", 0.0, 1e9)) for name in ("stays", "moves")),
        ev.LoadFinished(0.1, "a/1", Tier.DISK),
    ):
        plugin.controller.handle(event)
    assert plugin.controller.instances["a/1"].n_requests == 2
    told = {"id": "moves", "n_prompt_tokens": 1, "max_new_tokens": 1, "lost": lost}
    plugin._receive("door", ["returned", "moves", "a", 0, None, told])
    assert bool(plugin.controller.instances["a/1"].draining) is closed
    assert plugin.controller.instances["a/1"].n_requests == (1 if closed else 2), "it takes the request again, if it may"
    await scheduler.close()


def test_without_migration_the_short_answer_waits_for_the_long_one(runs: dict[str, tuple[Any, Any]]):
    long, short = runs["without"]
    assert short.ended_s > long.ended_s
    assert (long.path, short.path) == (("0",), ("0",))


def test_with_migration_the_short_answer_comes_first_and_the_long_one_is_the_same(runs: dict[str, tuple[Any, Any]]):
    long, short = runs["with"]
    assert short.ended_s < long.ended_s
    assert (long.path, short.path) == (("0", "1"), ("0",))
    assert [move["outcome"] for move in long.moves] == ["moved"]
    assert long.moves[0]["cause"] == f"makes room for {SHORT}"
    assert len(long.tokens) == N_ALONE
    for with_, without in zip(runs["with"], runs["without"], strict=True):
        assert (with_.tokens, with_.text, with_.finish_reason) == (without.tokens, without.text, without.finish_reason)
        assert with_.usage == without.usage


# --- several requests, and what goes wrong ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(cluster: Processes, url: str, runs: dict[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    """The answers to `BODIES`, at once and on one instance."""
    scaling = {"target": 100, "max_instances": 1}
    for name, nodes in (("long", ["0", "1"]), ("short", ["0"])):
        settings = {"placement_config": {"local_disk": nodes}, "scheduler_config": {"alpha": 0.0, "beta": 0.1}}
        register(url, name, cluster.directory / name, auto_scaling_config=scaling, **settings)
    post(url, "/admin/load", {"model": "long", "node": "0"})
    with ThreadPoolExecutor() as pool:
        return [told(each) for each in pool.map(lambda body: post(url, "/v1/completions", body), BODIES)]


def told(*parts: dict[str, Any]) -> dict[str, Any]:
    """What is said by an answer, or by the chunks of a stream."""
    choices = [choice for part in parts for choice in part["choices"]]
    return {
        "text": "".join(choice["text"] for choice in choices),
        "tokens": [token for choice in choices for token in (choice["logprobs"] or {"tokens": []})["tokens"]],
        "reason": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": [part["usage"] for part in parts if part.get("usage")],
    }


class Contention:
    """Both `BODIES` under way on node 0, the first as a stream, and the short model asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        for model in ("long", "short"):  # the instances of before, wherever they have gone to
            post(url, "/admin/unload", {"model": model})
        post(url, "/admin/load", {"model": "long", "node": "0"})
        self._before = {row["id"] for row in get(url, "/admin/requests")["requests"]}
        self._pool = ThreadPoolExecutor()
        #: Who has ended, in order.
        self.ended: list[str] = []
        whole = partial(post, url, "/v1/completions", BODIES[1])
        self.long = [self._begin("long", self._stream), self._begin("long", lambda: told(whole()))]
        until("both have begun", lambda: [row["n_tokens"] > 0 for row in self.rows()] == [True, True])
        self.short = self._begin("short", lambda: ask(url, "short"))

    def _begin(self, name: str, do: Callable[[], Any]) -> Future[Any]:
        future = self._pool.submit(do)
        future.add_done_callback(lambda _: self.ended.append(name))
        return future

    def _stream(self) -> dict[str, Any]:
        return told(*Stream(self.url, BODIES[0] | {"stream_options": {"include_usage": True}}).chunks())

    def rows(self) -> list[dict[str, Any]]:
        """The requests for the long model."""
        rows = get(self.url, "/admin/requests")["requests"]
        return [row for row in rows if row["model"] == "long" and row["id"] not in self._before]

    def answers(self) -> list[dict[str, Any]]:
        """Of the long model, once all three have ended."""
        self._pool.shutdown()
        return [each.result() for each in self.long]


def failures(cluster: Processes) -> list[str]:
    """Why decided moves have failed."""

    def read(dask_scheduler: Any) -> list[str]:
        events = dask_scheduler.plugins["sllmdask"].events
        return [event.reason for event in events if type(event).__name__ == "MigrationFailed"]

    reasons: list[str] = on_scheduler(cluster, read)
    return reasons


def test_several_requests_move_streamed_and_not_and_their_answers_are_the_same(url: str, undisturbed: list[dict[str, Any]]):
    contention = Contention(url)
    assert contention.answers() == undisturbed
    assert contention.ended == ["short", "long", "long"]
    assert [row["path"] for row in contention.rows()] == [["0", "1"]] * 2
    assert contention.short.result()[1] == "0"


def test_of_a_move_that_fails_half_way_everything_comes_back_and_who_waits_is_served_afterwards(
    cluster: Processes, url: str, undisturbed: list[dict[str, Any]]
):
    """The requests have moved when it fails; the failure is put into the mouth of the mechanism."""

    def fail_once(dask_scheduler: Any) -> None:
        effects = dask_scheduler.plugins["sllmdask"].effects
        evacuate = effects._evacuate

        async def fail(migrate: Any) -> str | None:
            effects._evacuate = evacuate
            dask_scheduler.plugins["sllmdask"].controller.finder.migration_lost = "once is enough"
            return await evacuate(migrate) or "a test says so"

        effects._evacuate = fail

    on_scheduler(cluster, fail_once)
    contention = Contention(url)
    assert contention.answers() == undisturbed
    assert contention.ended == ["long", "long", "short"]
    assert failures(cluster) == ["a test says so"]
    assert [row["path"] for row in contention.rows()] == [["0", "1", "0"]] * 2
    assert [move["outcome"] for row in contention.rows() for move in row["moves"]] == ["moved"] * 4
    until("nothing stays on node 1", lambda: not (worker(url, "1") or {})["instances"])
    on_scheduler(cluster, allow, moves=True)


def test_when_the_destination_is_killed_the_long_answers_go_on_where_they_were(
    cluster: Processes, url: str, undisturbed: list[dict[str, Any]]
):
    def hold(dask_worker: Any) -> None:
        """The first bytes are due in an hour."""
        pace = dask_worker.plugins["sllmdask"].registry.moves._pace
        pace._bytes_per_s, pace._free_at = 1.0, time.monotonic() + 3600.0

    def moving(dask_scheduler: Any) -> bool:
        return bool(dask_scheduler.plugins["sllmdask"].moving._under_way)

    with Client(cluster.scheduler, set_as_default=False) as client:
        client.run(hold, workers=[(worker(url, "0") or {})["address"]])
        contention = Contention(url)
        until("they are on their way", lambda: client.run_on_scheduler(moving))
    cluster.stop("worker-1", SIGKILL)
    assert contention.answers() == undisturbed
    assert contention.ended == ["long", "long", "short"]
    assert "has left" in failures(cluster)[-1]
    rows = contention.rows()
    assert [row["path"] for row in rows] == [["0"]] * 2
    assert {move["outcome"] for row in rows for move in row["moves"]} == {"stayed"}
    [instance] = instances(url)
    assert (instance["model"], instance["n_requests"]) == ("short", 0)
