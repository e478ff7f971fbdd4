"""Workers of one node have their host memory in common: real processes, which are killed, and files that are damaged."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllmdask.loader.convert import convert
from tests.checkpoints import make_checkpoint
from tests.cluster.asking import ASK, ask, model_on, register, worker
from tests.cluster.harness import post, two_workers, until, workers
from tests.cluster.test_processes import reference
from tests.loader.serving import Gate, Site

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A front door with two workers of one node, ``0`` and ``1``."""
    with two_workers(tmp_path_factory.mktemp("node")) as url:
        yield url


@pytest.fixture
def answer_of(checkpoints: dict[str, Path]) -> Any:
    """``answer_of("a")``: what plain ``generate()`` answers."""
    return lambda model: reference(checkpoints[model], ASK["prompt"], ASK["max_tokens"])


def test_the_second_worker_of_a_node_has_what_the_first_has_read(url, checkpoints, answer_of):
    register(url, "a", checkpoints["a"])
    assert post(url, "/admin/load", {"model": "a", "node": "0"})["cold_start"] == "disk"
    until("the other knows", lambda: model_on(url, "1", "a").get("tier") == "host")
    assert post(url, "/admin/load", {"model": "a", "node": "1"})["cold_start"] == "host"
    used = {each["tiers"]["host"]["used"] for each in workers(url)}
    assert len(used) == 1, "one copy, one account"
    assert ask(url, "a")[0] == answer_of("a")
    post(url, "/admin/unload", {"model": "a"})


def test_a_killed_worker_finds_its_model_in_host_memory_again(url, checkpoints, answer_of):
    register(url, "b", checkpoints["b"], node="0")
    assert ask(url, "b") == (answer_of("b"), "0", "disk")
    pid = worker(url, "0")["pid"]
    os.kill(pid, signal.SIGKILL)
    back = until("its nanny started it again", lambda: (worker(url, "0") or {"pid": pid})["pid"] != pid and worker(url, "0"))
    assert back["slots_used"] == 0
    assert model_on(url, "0", "b")["tier"] == "host"
    assert ask(url, "b") == (answer_of("b"), "0", "host")
    post(url, "/admin/unload", {"model": "b"})


def test_a_damaged_checkpoint_is_told_with_its_tensor_and_file_and_holds_no_slot(url, checkpoints, answer_of, tmp_path):
    convert(checkpoints["a"], tmp_path / "fast")
    (data,) = (tmp_path / "fast").glob("*.bin")
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        file.write(b"\xff\x00\xff\x00")
    register(url, "damaged", tmp_path / "fast", node="1")
    answer = post(url, "/v1/completions", {"model": "damaged", **ASK}, timeout_s=30)
    assert (answer["status"], answer["error"]["code"]) == (503, "load_failed")
    assert data.name in answer["error"]["message"] and "model." in answer["error"]["message"]
    assert data.exists(), "it is the user's"
    until("its slot is free", lambda: worker(url, "1")["slots_used"] == 0)
    register(url, "a", checkpoints["a"], node="1")
    assert ask(url, "a")[0] == answer_of("a")
    post(url, "/delete", {"model": "damaged"})
    post(url, "/admin/unload", {"model": "a"})


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Site]:
    """A server of one model, of several chunks."""
    make_checkpoint(tmp_path / "far", "qwen2", hidden=256)
    with Site(tmp_path / "far") as site:
        yield site


def test_a_request_runs_behind_the_reader_and_its_answer_is_the_same(url, far):
    register(url, "far", far.url, node="0")
    held = Gate()
    far.on_data = held
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask(url, "far")))
    asking.start()
    assert held.reached.wait(30)
    until("it takes requests", lambda: [each for each in worker(url, "0")["instances"] if each["n_requests"]])
    assert not answers
    held.open()
    asking.join(30)
    assert answers == [(reference(far.root, ASK["prompt"], ASK["max_tokens"]), "0", "remote")]
    post(url, "/delete", {"model": "far"})


def test_a_request_behind_a_reader_that_fails_hears_why_and_the_next_one_is_served(url, far):
    register(url, "failing", far.url, node="1")
    held = Gate()

    def gone(*request: Any) -> int:
        held(*request)
        return 404

    far.on_data = gone
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(post(url, "/v1/completions", {"model": "failing", **ASK}, timeout_s=60))
    )
    asking.start()
    assert held.reached.wait(30)
    until("it takes requests", lambda: [each for each in worker(url, "1")["instances"] if each["n_requests"]])
    held.open()
    asking.join(60)
    (answer,) = answers
    assert (answer["status"], answer["error"]["code"]) == (503, "load_failed")
    assert far.url.removeprefix("http://") in answer["error"]["message"]
    until("its slot is free", lambda: worker(url, "1")["slots_used"] == 0)
    far.on_data = lambda *_: None
    loaded = until("the pause after a failure is over", lambda: _loaded(url, "failing"))
    assert loaded["cold_start"] == "remote"
    assert ask(url, "failing")[0] == reference(far.root, ASK["prompt"], ASK["max_tokens"])
    post(url, "/delete", {"model": "failing"})


def _loaded(url: str, model: str) -> dict[str, Any] | None:
    reply = post(url, "/admin/load", {"model": model})
    return None if "error" in reply else reply
