"""Operators who load, unload and fetch models by hand: two workers of one slot, as separate programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllmdask.loader.convert import convert
from tests.cluster.asking import register
from tests.cluster.harness import BIN, Stream, get, post, two_workers, until, workers

pytestmark = pytest.mark.cluster

ASK = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = {**ASK, "max_tokens": 1500}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Iterator[str]:
    """The URL of a front door with two workers, ``0`` and ``1``, and both models deployed."""
    with two_workers(tmp_path_factory.mktemp("operated")) as url:
        for name, path in checkpoints.items():
            register(url, name, path)
        yield url


@pytest.fixture
def url(door: str) -> str:
    """The same with nothing loaded."""
    for name in ("a", "b"):
        assert post(door, "/admin/unload", {"model": name})["state"] == "unloaded"
    return door


def loaded_on(url: str, model: str) -> list[str]:
    """Names of the nodes on which an instance of `model` is ready."""
    return sorted(
        worker["name"]
        for worker in workers(url)
        for instance in worker["instances"]
        if instance["model"] == model and instance["state"] == "ready"
    )


def ask(url: str, model: str) -> tuple[str, str]:
    """Where a short request ran, and what it had to wait for."""
    body = json.dumps({"model": model, **ASK}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["x-sllmdask-node"], response.headers["x-sllmdask-cold-start"]


def sllmdask(url: str, *args: str) -> str:
    env = {**os.environ, "LLM_SERVER_URL": url}
    done = subprocess.run([str(BIN / "sllmdask"), *args], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_is_loaded_on_the_node_that_was_named_and_its_next_request_is_a_hit(url: str):
    loaded = post(url, "/admin/load", {"model": "a", "node": "1"})
    assert (loaded["state"], loaded["node"], loaded["keep_alive"]) == ("ready", "1", 300.0)
    assert loaded["cold_start"] in ("disk", "host") and loaded["seconds"] > 0
    assert loaded_on(url, "a") == ["1"]
    again = post(url, "/admin/load", {"model": "a", "node": 1})
    assert (again["cold_start"], again["instance"]) == ("hit", loaded["instance"])
    assert ask(url, "a") == ("1", "hit")
    assert post(url, "/admin/load", {"model": "a", "node": "0"})["node"] == "0"
    assert loaded_on(url, "a") == ["0", "1"]


def test_one_that_is_busy_ends_its_requests_before_it_leaves_and_gets_no_new_ones(url: str):
    post(url, "/admin/load", {"model": "a", "node": "1"})
    stream = Stream(url, {"model": "a", **LONG, "stream_options": {"include_usage": True}})
    chunks = stream.chunks()
    next(chunks)
    assert post(url, "/admin/unload", {"model": "a", "node": "1", "wait": False})["state"] == "unloading"
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(post(url, "/admin/unload", {"model": "a", "node": "1"})))
    waiting.start()
    assert ask(url, "a")[0] == "0"
    assert list(chunks)[-1]["usage"]["completion_tokens"] == LONG["max_tokens"]
    waiting.join(30)
    assert [instance["node"] for instance in answers[0]["instances"]] == ["1"]
    assert loaded_on(url, "a") == ["0"]


def test_a_model_in_host_memory_is_on_no_device_and_loads_from_there(url: str):
    brought = post(url, "/admin/load", {"model": "b", "node": "0", "tier": "host"})
    assert (brought["state"], brought["node"], brought["instance"]) == ("host", "0", None)
    assert loaded_on(url, "b") == []
    assert post(url, "/admin/load", {"model": "b", "tier": "host"})["cold_start"] == "hit"
    loaded = post(url, "/admin/load", {"model": "b", "node": "0"})
    assert (loaded["node"], loaded["cold_start"]) == ("0", "host")


def test_who_does_not_wait_sees_it_become_ready(url: str):
    assert post(url, "/admin/load", {"model": "b", "wait": False})["state"] == "loading"
    until("it is ready", lambda: loaded_on(url, "b"))
    assert post(url, "/admin/load", {"model": "b", "wait": False})["state"] == "ready"


def test_what_cannot_be_done_is_refused_with_the_reason_and_near_names(url: str, checkpoints: dict[str, Path]):
    def refusal(path: str, body: dict[str, Any]) -> tuple[int, str, str]:
        reply = post(url, path, body)
        return reply["status"], reply["error"]["code"], reply["error"]["message"]

    for path in ("/admin/load", "/admin/unload", "/admin/pull"):
        status, code, message = refusal(path, {"model": "aa"})
        assert (status, code) == (404, "model_not_found") and "'a'" in message
        status, code, message = refusal(path, {"model": "a", "node": "7"})
        assert (status, code) == (400, "invalid_request") and "'0', '1'" in message
    register(url, "a", checkpoints["a"], auto_scaling_config={"max_instances": 1}, placement_config={"target_nodes": ["0"]})
    assert "only run on its nodes 0" in refusal("/admin/load", {"model": "a", "node": "1"})[2]
    register(url, "a", checkpoints["a"], auto_scaling_config={"max_instances": 1})
    post(url, "/admin/load", {"model": "a", "node": "0"})
    status, code, message = refusal("/admin/load", {"model": "a", "node": "1"})
    assert (status, code) == (503, "load_failed") and "loaded on node 0" in message
    register(url, "a", checkpoints["a"])


def test_a_load_that_fails_says_why_and_works_once_the_files_are_mended(url: str, tmp_path: Path, checkpoints: dict[str, Path]):
    shutil.copytree(checkpoints["a"], tmp_path / "c")
    weights = tmp_path / "c" / "model.safetensors"
    whole = weights.read_bytes()
    register(url, "c", tmp_path / "c")
    weights.write_bytes(whole[: len(whole) // 2])
    reply = post(url, "/admin/load", {"model": "c", "node": "0"})
    assert (reply["status"], reply["error"]["code"]) == (503, "load_failed") and "model.safetensors" in reply["error"]["message"]
    weights.write_bytes(whole)
    assert post(url, "/admin/load", {"model": "c", "node": "0"})["state"] == "ready"
    post(url, "/delete", {"model": "c"})


def test_a_load_of_which_only_the_last_byte_is_wrong_has_failed(url: str, tmp_path: Path, checkpoints: dict[str, Path]):
    convert(checkpoints["a"], tmp_path / "d")
    (weights,) = (tmp_path / "d").glob("*.bin")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    register(url, "d", tmp_path / "d")
    reply = post(url, "/admin/load", {"model": "d", "node": "0"})
    assert (reply["status"], reply["error"]["code"]) == (503, "load_failed") and weights.name in reply["error"]["message"]
    until("it is gone", lambda: not loaded_on(url, "d"))
    post(url, "/delete", {"model": "d"})


def test_files_are_pulled_to_a_node_and_what_is_there_is_not_fetched_again(url: str, checkpoints: dict[str, Path]):
    pulled = post(url, "/admin/pull", {"source": str(checkpoints["b"]), "node": "1"})
    assert (pulled["state"], pulled["node"], pulled["fetched"]) == ("disk", "1", False)
    assert pulled["nbytes"] == get(url, "/admin/models")["models"][-1]["nbytes"]
    assert post(url, "/admin/pull", {"source": "b"})["source"] == str(checkpoints["b"])
    reply = post(url, "/admin/pull", {"source": "/no/such/model"})
    assert (reply["status"], reply["error"]["code"]) == (400, "checkpoint_not_found")


def test_the_command_line_says_what_was_done(url: str):
    assert re.match(r"a is ready on node 1: loaded from (disk|host) in ", sllmdask(url, "load", "a", "--node", "1"))
    assert sllmdask(url, "load", "a") == "a is ready on node 1 already\n"
    assert json.loads(sllmdask(url, "unload", "a", "--json"))["instances"][0]["node"] == "1"
    assert sllmdask(url, "unload", "a") == "a is not loaded\n"
    assert "it was there already" in sllmdask(url, "pull", "a", "--node", "0")
