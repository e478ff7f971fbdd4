"""The scheduler dies and comes back at the same address."""

from __future__ import annotations

import signal
import urllib.error

import pytest

from tests.cluster.harness import Processes, Stream, get, post, until, workers

pytestmark = pytest.mark.cluster

BODY = {"model": "a", "prompt": "once upon a time", "temperature": 0, "ignore_eos": True}


def test_a_stream_goes_on_without_the_scheduler_and_the_worker_joins_the_next_one(tmp_path, checkpoints):
    cluster = Processes(tmp_path)
    deployment = {"model": "a", "backend_config": {"pretrained_model_name_or_path": str(checkpoints["a"])}}
    try:
        cluster.start_scheduler()
        cluster.start_worker("0")
        url = cluster.start_door()
        (worker,) = until("the worker joined", lambda: workers(url))
        post(url, "/register", deployment)
        whole = post(url, "/v1/completions", {**BODY, "max_tokens": 1500})["choices"][0]["text"]
        stream = Stream(url, {**BODY, "max_tokens": 1500})
        chunks = stream.chunks()
        text = next(chunks)["choices"][0]["text"]
        cluster.stop("scheduler", signal.SIGKILL)
        text += "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
        assert text == whole

        answer = post(url, "/register", deployment)
        assert (answer["status"], answer["error"]["code"]) == (503, "scheduler_unreachable")

        cluster.start_scheduler()
        (again,) = until("the same worker joined again", lambda: ready(url) and workers(url))
        assert (again["pid"], again["slots_used"]) == (worker["pid"], 0)
        post(url, "/register", deployment)
        assert post(url, "/v1/completions", {**BODY, "max_tokens": 1500})["choices"][0]["text"] == whole
    finally:
        cluster.close()


def ready(url: str) -> bool:
    try:
        return bool(get(url, "/ready"))
    except urllib.error.HTTPError:
        return False
