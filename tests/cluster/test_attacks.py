"""What goes wrong around a running cluster, and must not stop it: clients that leave, odd requests, floods, deaths, deletions."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cluster.harness import BIN, Stream, free_port, get, instances, post, until, workers
from tests.loader.serving import Gate, Site

pytestmark = pytest.mark.cluster

LONG = {"prompt": "once upon a time", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Asked(threading.Thread):
    """A question whose answer may take long; :meth:`answer` waits for it."""

    def __init__(self, url: str, model: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self._ask: Callable[[], Any] = lambda: post(url, "/v1/completions", {"model": model, **SHORT, **body})
        self.start()

    def run(self) -> None:
        self._found = self._ask()

    def answer(self) -> Any:
        self.join(60)
        return self._found


def ask(url: str, model: str, **body: Any) -> str:
    answer = post(url, "/v1/completions", {"model": model, **SHORT, **body})
    return answer["choices"][0]["text"] if "choices" in answer else f"{answer['status']} {answer['error']['code']}"


def begin(url: str, model: str) -> tuple[Stream, Iterator[dict[str, Any]]]:
    """A long stream that has begun."""
    stream = Stream(url, {"model": model, **LONG})
    chunks = stream.chunks()
    next(chunks)
    return stream, chunks


def deploy(url: str, model: str, path: Path | str, **settings: Any) -> dict[str, Any]:
    return post(url, "/register", {"model": model, "backend_config": {"pretrained_model_name_or_path": str(path)}, **settings})


def requests(url: str, state: str) -> list[dict[str, Any]]:
    return [row for row in get(url, "/admin/requests")["requests"] if row["state"] == state]


def in_loading(url: str) -> list[dict[str, Any]]:
    """Instances whose weights are on their way; they may take requests already, which wait for them."""
    return [each for each in instances(url) if each["state"] == "loading" or each["progress"] is not None]


def idle(url: str) -> bool:
    """Nobody waits or runs, by the account of the front door, the scheduler and the engines."""
    busy = [each for each in instances(url) if each["n_requests"] or (each["engine"] or {}).get("n_running")]
    return not busy and not requests(url, "queued") and not requests(url, "running")


@pytest.fixture
def held(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[tuple[str, Gate]]:
    """The address of model ``a`` at a server that gives no weights away before the gate is opened."""
    shutil.copytree(checkpoints["a"], tmp_path / "site" / "slow")
    with Site(tmp_path / "site") as site:
        gate = site.on_data = Gate()
        yield f"{site.url}/slow", gate
        gate.open()


# --- clients -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sent_to_a_worker_is_refused_and_other_streams_go_on(url):
    stream, chunks = begin(url, "a")
    for field, value in {"stop": ["\ud800"], "top_k": 10**30, "stop_token_ids": [2**63], "seed": "\udfff"}.items():
        answer = post(url, "/v1/completions", {"model": "a", **SHORT, field: value})
        assert (answer["status"], answer["error"]["param"]) == (400, field)
    assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
    stream.close()


def test_a_client_may_use_one_request_id_for_everything(url):
    def named(model: str, **body: Any) -> Any:
        data = json.dumps({"model": model, **SHORT, **body}).encode()
        headers = {"content-type": "application/json", "x-request-id": "mine"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data, headers), timeout=60) as response:
            return json.load(response)["choices"][0]["text"]

    text = named("a", max_tokens=30)
    stop = text[10:14]
    for _ in range(20):  # after a stop string the engine hears a little later than the client that its request is over
        assert named("a", max_tokens=1000, stop=[stop]) == text[: text.index(stop)]
        assert named("a", max_tokens=30) == text


def test_two_front_doors_may_be_asked_under_one_request_id(processes, url):
    other = processes.start_door("other")
    texts: dict[str, str] = {}

    def named(door: str) -> None:
        data = json.dumps({"model": "a", **LONG, "max_tokens": 300}).encode()
        headers = {"content-type": "application/json", "x-request-id": "mine"}
        with urllib.request.urlopen(urllib.request.Request(f"{door}/v1/completions", data, headers), timeout=60) as response:
            texts[door] = json.load(response)["choices"][0]["text"]

    until("the other door knows the model", lambda: "a" in {model["id"] for model in get(other, "/v1/models")["data"]})
    threads = [threading.Thread(target=named, args=(door,)) for door in (url, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    processes.stop("other")
    assert texts[url] == texts[other]
    until("nothing is left", lambda: idle(url), 5)


def test_a_client_that_leaves_the_queue_costs_nobody_a_model(url):
    ask(url, "a")
    stream, chunks = begin(url, "a")
    (before,) = instances(url)
    waiting = Stream(url, {"model": "b", **SHORT})
    next(waiting.lines())
    assert until("b is queued", lambda: requests(url, "queued"))
    waiting.close()
    until("b has left", lambda: not requests(url, "queued"), 5)
    assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
    stream.close()
    until("nothing is left", lambda: idle(url), 5)
    assert [each["instance"] for each in instances(url)] == [before["instance"]]


def test_a_client_that_leaves_while_its_model_loads_leaves_nothing_behind(url, held):
    assert deploy(url, "slow", held[0])["status"] == "ok"
    stream = Stream(url, {"model": "slow", **SHORT})
    lines = stream.lines()
    until("it loads", lambda: in_loading(url))
    next(lines)
    stream.close()
    until("nobody waits", lambda: not requests(url, "queued") and not requests(url, "running"), 5)
    assert not ask(url, "b").startswith("5")
    post(url, "/delete", {"model": "slow"})
    until("nothing is left", lambda: idle(url), 5)


def test_200_requests_at_once_for_two_models_on_one_slot_are_all_answered_and_those_who_leave_do_not_matter(url):
    """A third of the clients leave at any moment: queued, loading, in the middle, at the end."""
    texts = {model: [ask(url, model, prompt=f"story {i}", max_tokens=30) for i in range(4)] for model in ("a", "b")}
    chance = random.Random(0)

    async def one(session: aiohttp.ClientSession, i: int, patience_s: float | None) -> str:
        model, streamed = ("a", "b")[i % 2], i % 5 > 0
        body = {"model": model, **SHORT, "prompt": f"story {i // 2 % 4}", "max_tokens": 30, "stream": streamed}
        try:
            async with asyncio.timeout(patience_s), session.post(f"{url}/v1/completions", json=body) as response:
                if not streamed:
                    text = (await response.json())["choices"][0]["text"]
                else:
                    data = [line[6:] async for line in response.content if line.startswith(b"data: ")]
                    assert data.pop().strip() == b"[DONE]"
                    text = "".join(json.loads(each)["choices"][0]["text"] for each in data)
        except TimeoutError:
            return "left"
        assert text == texts[model][i // 2 % 4]
        return "answered"

    async def watch(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{url}/admin/cluster") as response:
                assert all(worker["slots_used"] <= worker["slots"] for worker in (await response.json())["workers"])
            await asyncio.sleep(0.05)

    async def flood() -> Counter[str]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            watching = asyncio.create_task(watch(session))
            patience = [chance.random() * 1.5 if i % 3 == 0 else None for i in range(200)]
            outcome = Counter(await asyncio.gather(*(one(session, i, patience[i]) for i in range(200))))
            assert not watching.done()
            watching.cancel()
            await asyncio.wait({watching})
            return outcome

    outcome = asyncio.run(flood())
    assert outcome["answered"] >= 133
    assert outcome.total() == 200
    until("nothing is left", lambda: idle(url), 5)


def test_requests_that_share_a_connection_are_answered_in_turn_and_a_header_stays_a_header(url):
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "a", **SHORT}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    two = b"".join(f"{head}x-request-id: {name}\r\n\r\n".encode() + body for name in ("one", "evil\tset-cookie: x=1"))
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(two[:100])
        sock.sendall(two[100:])
        answers = b""
        while answers.count(b'"usage"') < 2:
            answers += sock.recv(65536)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert b"x-request-id: one\r\n" in answers
    assert b"set-cookie" not in answers


# --- deployments -------------------------------------------------------------------------------------------------------


def test_a_model_that_is_deployed_anew_while_it_runs_ends_its_streams_and_then_answers_as_the_new_one(url, checkpoints):
    whole = ask(url, "a", **LONG)
    deploy(url, "changing", checkpoints["a"])
    stream = Stream(url, {"model": "changing", **LONG})
    chunks = stream.chunks()
    text = next(chunks)["choices"][0]["text"]
    assert deploy(url, "changing", checkpoints["a"])["status"] == "ok"
    assert deploy(url, "changing", checkpoints["b"])["status"] == "ok"
    new = Asked(url, "changing")
    text += "".join(chunk["choices"][0]["text"] for chunk in chunks)
    stream.close()
    assert text == whole
    assert new.answer()["choices"][0]["text"] == ask(url, "b")
    post(url, "/delete", {"model": "changing"})


def test_a_model_that_is_deleted_while_it_loads_or_waits_refuses_who_waits_and_frees_the_slot(url, checkpoints, held):
    source, gate = held
    assert deploy(url, "slow", source)["status"] == "ok"
    loading = Asked(url, "slow")
    until("it loads", lambda: in_loading(url))
    post(url, "/delete", {"model": "slow"})
    gate.open()
    # Who was sent to the instance already may finish.
    answer = loading.answer()
    assert "choices" in answer or answer["error"]["code"] == "model_not_found"
    stream, chunks = begin(url, "a")
    deploy(url, "passing", checkpoints["b"])
    waiting = Asked(url, "passing")
    until("it waits", lambda: requests(url, "queued"))
    post(url, "/delete", {"model": "passing"})
    assert waiting.answer()["error"]["code"] == "model_not_found"
    assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
    stream.close()
    until("nothing is left", lambda: idle(url) and {each["model"] for each in instances(url)} == {"a"}, 5)


def test_a_checkpoint_that_disappears_fails_its_loads_with_the_reason_and_serves_again_when_it_is_back(
    url, checkpoints, tmp_path
):
    path = tmp_path / "here"
    shutil.copytree(checkpoints["a"], path)
    deploy(url, "elusive", path)
    path.rename(tmp_path / "gone")
    answer = post(url, "/v1/completions", {"model": "elusive", **SHORT})
    assert (answer["status"], answer["error"]["code"]) == (503, "load_failed")
    assert str(path) in answer["error"]["message"]
    (tmp_path / "gone").rename(path)
    text = ask(url, "a")
    until("it serves again", lambda: ask(url, "elusive") == text, 10)
    post(url, "/delete", {"model": "elusive"})


def test_a_model_that_is_not_kept_serves_bursts_and_leaves_after_each(url, checkpoints):
    text = ask(url, "a")
    deploy(url, "fleeting", checkpoints["a"], auto_scaling_config={"keep_alive": 0})
    for _ in range(3):
        burst = [Asked(url, "fleeting") for _ in range(10)]
        assert {asked.answer()["choices"][0]["text"] for asked in burst} == {text}
        until("the slot is free", lambda: not instances(url), 5)
    post(url, "/delete", {"model": "fleeting"})


# --- deaths ------------------------------------------------------------------------------------------------------------


def test_a_request_waits_through_the_death_of_the_worker_that_loads_its_model(url, held):
    source, gate = held
    assert deploy(url, "slow", source)["status"] == "ok"
    asked = Asked(url, "slow")
    until("it loads", lambda: in_loading(url))
    os.kill(workers(url)[0]["pid"], signal.SIGKILL)
    gate.open()
    assert asked.answer()["choices"][0]["text"] == ask(url, "a")
    post(url, "/delete", {"model": "slow"})


def test_a_running_and_a_queued_request_wait_through_two_deaths_of_the_worker(url):
    long, short = ask(url, "a", **LONG), ask(url, "b")
    running = Asked(url, "a", **LONG)
    until("it runs", lambda: requests(url, "running"))
    waiting = Asked(url, "b")
    until("it waits", lambda: requests(url, "queued"))
    killed = workers(url)[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    second = until("the next worker", lambda: [each["pid"] for each in workers(url) if each["pid"] != killed])
    os.kill(second[0], signal.SIGKILL)
    assert running.answer()["choices"][0]["text"] == long
    assert waiting.answer()["choices"][0]["text"] == short
    until("nothing is left", lambda: idle(url) and workers(url)[0]["slots_used"] == 1, 5)


def test_a_worker_that_stands_still_for_a_while_goes_on_with_its_streams(url):
    body = {**LONG, "max_tokens": 800}
    whole = ask(url, "a", **body)
    stream = Stream(url, {"model": "a", **body})
    chunks = stream.chunks()
    text = next(chunks)["choices"][0]["text"]
    (worker,) = workers(url)
    os.kill(worker["pid"], signal.SIGSTOP)
    stopped = time.monotonic()
    until("3 s have passed", lambda: time.monotonic() - stopped > 3)
    os.kill(worker["pid"], signal.SIGCONT)
    text += "".join(chunk["choices"][0]["text"] for chunk in chunks)
    stream.close()
    assert text == whole


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)], ids=["Ctrl-C", "kill"])
def test_what_up_started_lets_running_answers_end_when_it_is_stopped_and_leaves_nothing_behind(number, send):
    """A terminal sends its signal to every process of the group, ``kill`` to one."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "sllmdask"), "up", "--demo", "--workers", "1", "--port", str(port)]
    up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def both_models() -> bool:
        try:
            return len(get(url, "/v1/models")["data"]) == 2
        except urllib.error.URLError:
            return False

    try:
        until("it is up", both_models)
        stream = Stream(url, {"model": "demo-llama", **LONG, "max_tokens": 300})
        chunks = stream.chunks()
        next(chunks)
        family = psutil.Process(up.pid).children(recursive=True)
        send(up.pid, number)
        assert list(chunks)[-1].get("choices", [{}])[0].get("finish_reason") == "length"
        stream.close()
        out, _ = up.communicate(timeout=20)
        assert (up.returncode, "Traceback" in out) == (0, False), out
        until("nobody is left", lambda: not [each for each in family if each.is_running() and each.status() != "zombie"], 5)
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGKILL)
            up.communicate()
