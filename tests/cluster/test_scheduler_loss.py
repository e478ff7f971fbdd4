"""The scheduler is killed and started again at the same address: nobody loses anything by it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sllmdask.actors.streams import messages, open_stream
from sllmdask.batching.params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.cluster.asking import register
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers
from tests.loader.serving import Site

pytestmark = pytest.mark.cluster

#: An instance takes two requests at once, so that others wait, and takes none before it is loaded.
SETTINGS = {
    "DASK_SLLMDASK__ENGINE__MAX_RUNNING": "2",
    "DASK_SLLMDASK__ENGINE__KV_MEMORY": "64MiB",
    "DASK_SLLMDASK__ENGINE__EXECUTE_WHILE_LOADING": "false",
}
LONG = {"model": "a", "prompt": "once upon a time", "temperature": 1.0, "seed": 3, "ignore_eos": True, "max_tokens": 700}
SHORT = {**LONG, "prompt": "hello", "max_tokens": 20}


class Asked(threading.Thread):
    """A completion in a thread: its text, and what its headers say, once it has ended."""

    def __init__(self, url: str, asked: dict[str, Any], *, stream: bool = False) -> None:
        super().__init__(daemon=True)
        self.url, self.asked, self.stream = url, asked, stream
        self.text = ""
        self.begun = threading.Event()
        self.headers: dict[str, str] = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            if self.stream:
                with closing(Stream(self.url, self.asked)) as stream:
                    for chunk in stream.chunks():
                        assert "error" not in chunk, chunk
                        self.text += chunk["choices"][0]["text"] if chunk["choices"] else ""
                        if self.text:
                            self.begun.set()
                return
            request = urllib.request.Request(
                f"{self.url}/v1/completions", json.dumps(self.asked).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=90) as response:
                self.headers = dict(response.headers)
                self.text = json.load(response)["choices"][0]["text"]
        except Exception as error:  # noqa: BLE001 - shown by whoever looks at it
            self.error = error

    def answer(self) -> str:
        self.join(90)
        assert not self.is_alive() and self.error is None, self.error
        return self.text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two workers of one slot, apart."""
    cluster = Processes(tmp_path_factory.mktemp("loss"))
    cluster.environment |= SETTINGS
    try:
        cluster.start_scheduler()
        for name in ("0", "1"):
            cluster.start_worker(name)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("both workers joined", lambda: len(workers(url)) == 2, 60)
    return url


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """``site.url + "/b"`` is a model."""
    root = tmp_path_factory.mktemp("site")
    make_checkpoint(root / "b", "qwen2")
    with Site(root) as site:
        yield site


def slots(url: str) -> list[tuple[str, int, int]]:
    """By worker: its name, its process, its slots in use."""
    return sorted((each["name"], each["pid"], each["slots_used"]) for each in workers(url))


def ids(url: str) -> list[str]:
    return sorted(each["instance"] for each in instances(url))


def rows(url: str, state: str) -> list[dict[str, Any]]:
    return [row for row in get(url, "/admin/requests")["requests"] if row["state"] == state]


def ready(url: str) -> bool:
    try:
        return bool(get(url, "/ready"))
    except urllib.error.HTTPError as error:
        error.close()
        return False


def test_streams_go_on_deployments_return_and_busy_instances_are_adopted(cluster: Processes, url: str):
    source = make_checkpoint(cluster.directory / "a", "llama", hidden=512)
    register(url, "a", source, auto_scaling_config={"min_instances": 2, "target": 64})
    until("both are loaded", lambda: [each["state"] for each in instances(url)] == ["ready", "ready"])
    long, short = (post(url, "/v1/completions", asked)["choices"][0]["text"] for asked in (LONG, SHORT))
    before, loaded = slots(url), ids(url)

    streams = [Asked(url, LONG, stream=True) for _ in range(4)]
    for stream in streams:
        assert stream.begun.wait(60), stream.error
    waiting = [Asked(url, SHORT) for _ in range(2)]
    until("two wait", lambda: len(rows(url, "queued")) == 2)
    cluster.stop("scheduler", signal.SIGKILL)
    n_before = {row["id"]: row["n_tokens"] for row in rows(url, "running")}
    until("the loss is known", lambda: not ready(url))
    until("streams go on", lambda: all(row["n_tokens"] > n_before[row["id"]] for row in rows(url, "running")))
    # So that they are not over before the next scheduler is there.
    cluster.signal_workers(signal.SIGSTOP)
    assert get(url, "/health")["status"] == "ok"
    for path, asked in (("/register", {"model": "c"}), ("/admin/load", {"model": "a"})):
        answer = post(url, path, asked)
        assert (answer["status"], answer["error"]["code"]) == (503, "scheduler_unreachable")
    waiting.append(Asked(url, SHORT))
    until("three wait", lambda: len(rows(url, "queued")) == 3)

    cluster.start_scheduler()
    until("the front door is there", lambda: cluster.log("scheduler").count("front door joined") == 2)
    assert not ready(url)
    cluster.signal_workers(signal.SIGCONT)
    until("the same workers are back", lambda: ready(url) and slots(url) == before)
    assert ids(url) == loaded
    # Those that run count where they run, can be cancelled, and moved.
    first, *others = rows(url, "running")
    assert post(url, "/admin/cancel", {"request": first["id"]})["cancelled"]
    assert [each.answer() for each in waiting] == [short] * 3
    assert [each.headers["x-sllmdask-cold-start"] for each in waiting] == ["hit"] * 3
    crowded = max("01", key=[row["node"] for row in others].count)
    moves = next(row for row in rows(url, "running") if row["node"] == crowded)
    moved = post(url, "/admin/migrate", {"request": moves["id"], "to": {"0": "1", "1": "0"}[crowded]})
    assert moved.get("state") == "moved", moved
    for stream in streams:
        stream.join(60)
    assert sorted(stream.text == long for stream in streams) == [False, True, True, True]
    assert [stream.error is None for stream in streams if stream.text == long] == [True] * 3
    until("all is idle", lambda: [each["n_requests"] for each in instances(url)] == [0, 0])
    assert (slots(url), ids(url)) == (before, loaded)
    until("no block is kept", lambda: [each["engine"]["blocks_used"] for each in instances(url)] == [0, 0])


def test_a_load_goes_on_and_what_is_deployed_pinned_and_deleted_is_as_it_was(cluster: Processes, url: str, site: Site):
    opened = threading.Event()
    site.on_data = lambda *_: opened.wait(90) and None
    post(url, "/delete", {"model": "a"})
    until("the slots are free", lambda: [used for *_, used in slots(url)] == [0, 0])
    register(url, "b", f"{site.url}/b", auto_scaling_config={"keep_alive": 77})
    asked = Asked(url, {**SHORT, "model": "b"})
    (loading,) = until("it loads", lambda: site.data and ids(url))
    cluster.stop("scheduler", signal.SIGKILL)
    cluster.start_scheduler()
    until("the workers are back", lambda: ready(url) and len(workers(url)) == 2)
    assert [(each["instance"], each["state"]) for each in instances(url)] == [(loading, "loading")]
    (model,) = get(url, "/admin/models")["models"]
    assert (model["model"], model["keep_alive"]) == ("b", 77)
    opened.set()
    assert asked.answer()
    assert ids(url) == [loading] and asked.headers["x-sllmdask-cold-start"] == "remote"
    # An instance that is loaded now is called otherwise than any before.
    post(url, "/admin/unload", {"model": "b"})
    post(url, "/admin/load", {"model": "b"})
    assert loading not in ids(url) and len(ids(url)) == 1
    # A model that is deleted, and one whose directory is gone.
    source = make_checkpoint(cluster.directory / "c", "llama")
    register(url, "c", source)
    post(url, "/delete", {"model": "b"})
    shutil.rmtree(source)
    cluster.stop("scheduler", signal.SIGKILL)
    cluster.start_scheduler()
    until("the workers are back", lambda: ready(url) and len(workers(url)) == 2)
    (model,) = until("it is known why", lambda: [each for each in get(url, "/admin/models")["models"] if each["reason"]])
    assert (model["model"], model["state"]) == ("c", "failed") and str(source) in model["reason"]
    until("the slots are free", lambda: [used for *_, used in slots(url)] == [0, 0])


@pytest.mark.asyncio
async def test_requests_that_no_front_door_claims_are_ended_and_their_instances_leave(cluster: Processes, url: str):
    source = make_checkpoint(cluster.directory / "g", "llama", hidden=512)
    for model, node in (("g", "0"), ("h", "1"), ("i", "0"), ("j", "1")):
        register(url, model, source, node=node)
    for model in ("g", "h"):
        post(url, "/admin/load", {"model": model})
    before = ids(url)
    # Two of a front door that is about to die, and three of one that will not remember them.
    other = cluster.start_door("doomed")
    doomed = [Asked(other, {**LONG, "model": "g"}, stream=True) for _ in range(2)]
    for stream in doomed:
        assert stream.begun.wait(60), stream.error
    (there,) = (each for each in workers(url) if each["name"] == "1")
    (instance,) = (each["instance"] for each in there["instances"])
    worker = await open_stream(there["address"], "sllm-stream", timeout_s=10, front_door="forgetful")
    params = SamplingParams(max_tokens=700, temperature=0.0, ignore_eos=True).as_wire()
    asked = [f"forgetful:{number}" for number in range(3)]
    await worker.write([["submit", key, 0, instance, [1, 2, 3], [], params, None, "", 0] for key in asked])
    replies = messages(worker)
    assert (await anext(replies))[0] == "tokens"

    cluster.signal_workers(signal.SIGSTOP)
    os.killpg(cluster.running["doomed"].pid, signal.SIGSTOP)
    cluster.stop("scheduler", signal.SIGKILL)
    n_joined = cluster.log("scheduler").count("front door joined")
    cluster.start_scheduler("--preload", str(Path(__file__).with_name("impatient.py")))
    until("the other front door is there", lambda: cluster.log("scheduler").count("front door joined") > n_joined)
    scheduler = await open_stream(cluster.scheduler, "sllm-front-door", timeout_s=60, front_door="forgetful")
    cluster.signal_workers(signal.SIGCONT)
    until("the workers are back", lambda: ready(url) and len(workers(url)) == 2)
    assert ids(url) == before
    # Others need the slots.
    waiting = [Asked(url, {**SHORT, "model": model}) for model in ("i", "j")]
    cluster.stop("doomed", signal.SIGKILL)
    ended: dict[str, str] = {}
    async with asyncio.timeout(60):
        while len(ended) < len(asked):
            message = await anext(replies)
            if message[0] == "error":
                ended[message[1]] = message[3]["error"]
            assert message[0] == "error" or message[5] is None, "it ran to its end"
    assert ended == dict.fromkeys(asked, "InstanceGone")
    assert all([await asyncio.to_thread(each.answer) for each in waiting])
    assert "cancelled=2" in cluster.log("worker-0")
    until("all is idle", lambda: [each["n_requests"] for each in instances(url)] == [0, 0])
    assert sorted(each["model"] for each in instances(url)) == ["i", "j"]
    assert [used for *_, used in slots(url)] == [1, 1]
    for comm in (worker, scheduler):
        await comm.close()
    for model in ("g", "h", "i", "j"):
        post(url, "/delete", {"model": model})
    until("the slots are free", lambda: [used for *_, used in slots(url)] == [0, 0])


@contextmanager
def no_room(cluster: Processes) -> Iterator[None]:
    """The scheduler cannot write beyond a few bytes of any file, as if its disk were full."""
    pid = cluster.running["scheduler"].pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    os.truncate(cluster.directory / "scheduler.log", 0)  # what it logs meanwhile is to be read
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8000, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def test_while_its_file_cannot_be_written_changes_are_refused_and_all_else_goes_on(cluster: Processes, url: str):
    source = make_checkpoint(cluster.directory / "e", "llama")
    register(url, "e", source, auto_scaling_config={"keep_alive": 77})
    post(url, "/delete", {"model": "c"})
    (path,) = (cluster.directory / "state" / "sllmdask").glob("*.sqlite")
    before = get(url, "/admin/models")["models"]
    with no_room(cluster):
        for route, asked in (
            ("/register", {"model": "f", "backend_config": {"pretrained_model_name_or_path": str(source)}}),
            ("/register", {"model": "e", "backend_config": {"pretrained_model_name_or_path": str(source)}}),
            ("/update", {"model": "e", "auto_scaling_config": {"keep_alive": 1}}),
            ("/delete", {"model": "e"}),
            ("/admin/pin", {"model": "e", "node": "0"}),
        ):
            answer = post(url, route, asked)
            assert (answer.get("status"), answer["error"]["code"]) == (503, "state_unwritable"), (route, answer)
            assert str(path) in answer["error"]["message"]
        assert not any(model["pinned"] for each in workers(url) for model in each["models"])
        ((row,), (was,)) = get(url, "/admin/models")["models"], before
        assert [row[key] for key in ("model", "keep_alive", "pinned")] == [was[key] for key in ("model", "keep_alive", "pinned")]
        # Workers leave and join, and models are loaded there.
        pid = next(each["pid"] for each in workers(url) if each["name"] == "0")
        os.kill(pid, signal.SIGKILL)
        until("its nanny has another one", lambda: len(slots(url)) == 2 and pid not in [each["pid"] for each in workers(url)])
        assert post(url, "/admin/load", {"model": "e", "node": "0"})["state"] == "ready"
        assert Asked(url, {**SHORT, "model": "e"}).answer()
        until("it is told", lambda: "cannot write its state" in cluster.log("scheduler"))
    # There is room again; and somebody has deleted the file of the scheduler that runs.
    loaded = ids(url)
    assert post(url, "/update", {"model": "e", "auto_scaling_config": {"keep_alive": 78}})["status"] == "ok"
    shutil.rmtree(path.parent)
    register(url, "f", source)
    cluster.stop("scheduler", signal.SIGKILL)
    cluster.start_scheduler()
    until("the workers are back", lambda: ready(url) and len(workers(url)) == 2)
    assert {each["model"]: each["keep_alive"] for each in get(url, "/admin/models")["models"]}["e"] == 78
    assert ids(url) == loaded
    assert Asked(url, {**SHORT, "model": "f"}).answer()
    for model in ("e", "f"):
        post(url, "/delete", {"model": model})
    until("the slots are free", lambda: [used for *_, used in slots(url)] == [0, 0])


def test_a_second_scheduler_on_the_same_file_is_refused(cluster: Processes, url: str, tmp_path):
    (path,) = (cluster.directory / "state" / "sllmdask").glob("*.sqlite")
    second = Processes(tmp_path)
    second.start_scheduler("--state", str(path))
    assert second.running["scheduler"].wait(60) == 2
    (line,) = [line for line in second.log("scheduler").splitlines() if str(path) in line]
    assert "in use by another scheduler" in line


def test_a_request_that_finds_no_scheduler_in_its_time_gets_one_clear_error(cluster: Processes, tmp_path):
    url = cluster.start_door("hasty", DASK_SLLMDASK__SCHEDULER__REQUEST_DEADLINE="0.5s")
    register(url, "d", make_checkpoint(tmp_path / "d", "llama"))
    cluster.stop("scheduler", signal.SIGKILL)
    until("the loss is known", lambda: not ready(url))
    answer = post(url, "/v1/completions", {**SHORT, "model": "d"})
    assert (answer["status"], answer["error"]["code"]) == (503, "queue_timeout")
    assert cluster.scheduler in answer["error"]["message"]
    assert rows(url, "queued") == []
