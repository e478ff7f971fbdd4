"""Nodes that are emptied while their answers are read: by an operator, by SIGTERM, by Dask."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from distributed import Client

from sllmdask.cli import main
from tests.checkpoints import make_checkpoint
from tests.cluster.asking import register, worker
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers

pytestmark = pytest.mark.cluster

#: Tokens of an answer, of a model that takes some milliseconds for each. Drawn: a lost or doubled one changes what follows.
N = 400
#: Seconds that a worker may take to join.
JOIN_S = 90.0
BODY = {
    "model": "a",
    "prompt": "once upon a time",
    "max_tokens": N,
    "temperature": 1.0,
    "seed": 3,
    "frequency_penalty": 0.3,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Node 1 has no nanny."""
    processes = Processes(tmp_path_factory.mktemp("draining"))
    try:
        processes.start_scheduler()
        processes.start_worker("0")
        processes.start_worker("1", "--no-nanny")
        processes.start_worker("2")
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("all workers joined", lambda: len(workers(url)) == 3, JOIN_S)
    source = make_checkpoint(cluster.directory / "a", "llama", hidden=512)
    register(url, "a", source, auto_scaling_config={"max_instances": 1, "target": 100, "keep_alive": 60})
    return url


@pytest.fixture(scope="module")
def undisturbed(url: str) -> str:
    """The text of a request that stays."""
    return str(post(url, "/v1/completions", BODY)["choices"][0]["text"])


def row_of(url: str, name: str) -> dict[str, Any]:
    return next(row for row in get(url, "/admin/requests")["requests"] if row["id"] == name)


class Reading:
    """A stream that a thread reads to its end."""

    def __init__(self, url: str, name: str) -> None:
        self._stream = Stream(url, BODY, {"x-request-id": name})
        self._chunks = self._stream.chunks()
        self.text = next(self._chunks)["choices"][0]["text"]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self.text += "".join(choice["text"] for chunk in self._chunks for choice in chunk["choices"])

    def whole(self) -> str:
        self._reader.join(60)
        assert not self._reader.is_alive()
        return self.text


def run(url: str, *args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*args, "--server", url])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_drained_node_gives_its_requests_away_takes_nothing_new_and_can_be_had_back(url: str, undisturbed: str):
    answers = [Reading(url, f"off-{i}") for i in range(2)]
    node = row_of(url, "off-0")["node"]
    drained = post(url, "/admin/drain", {"node": node})
    assert (drained.get("state"), drained.get("requests"), drained.get("instances")) == ("drained", 0, 0), drained
    assert (drained["moved"], drained["ended"], drained["stuck"]) == (2, 0, [])
    assert [answer.whole() for answer in answers] == [undisturbed] * 2
    rows = [row_of(url, f"off-{i}") for i in range(2)]
    elsewhere = rows[0]["path"][-1]
    assert [row["path"] for row in rows] == [[node, elsewhere]] * 2 and node != elsewhere
    assert (worker(url, node)["draining"]["state"], worker(url, elsewhere)["draining"]) == ("drained", None)
    assert not worker(url, node)["instances"]
    assert {move["cause"] for row in rows for move in row["moves"]} == {"its node is drained"}
    for path, body in (
        ("/admin/load", {"model": "a", "node": node}),
        ("/admin/pin", {"model": "a", "node": node}),
        ("/admin/migrate", {"instance": worker(url, elsewhere)["instances"][0]["instance"], "to": node}),
    ):
        refused = post(url, path, body)
        assert (refused["status"], refused["error"]["code"]) == (409, "node_draining"), refused
        assert "drain NODE --undo" in refused["error"]["message"]
    assert "drained" in run(url, "status").output
    assert run(url, "drain", node).output.startswith(f"node {node} is drained: 2 requests moved")
    assert run(url, "drain", node, "--undo").output == f"node {node} takes requests again\n"
    assert worker(url, node)["draining"] is None


def test_an_instance_too_many_gives_its_requests_to_the_other_and_leaves(url: str, undisturbed: str):
    assert post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 2, "target": 1}})["status"] == "ok"
    answers = [Reading(url, f"too-many-{i}") for i in range(2)]
    until("there are two", lambda: [each["state"] for each in instances(url)] == ["ready"] * 2)
    answers += [Reading(url, f"too-many-{i}") for i in range(2, 4)]
    assert post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 1, "target": 100}})["status"] == "ok"
    until("there is one", lambda: len(instances(url)) == 1)
    assert [answer.whole() for answer in answers] == [undisturbed] * 4
    moves = [move for i in range(4) for move in row_of(url, f"too-many-{i}")["moves"]]
    assert {(move["cause"], move["outcome"]) for move in moves} == {("max_instances", "moved")}


def test_on_the_only_node_left_requests_end_and_the_operator_hears_why(url: str, undisturbed: str):
    answer = Reading(url, "stays")
    node = row_of(url, "stays")["node"]
    for each in {"0", "1", "2"} - {node}:
        assert post(url, "/admin/drain", {"node": each})["state"] == "drained"
    late = run(url, "drain", node, "--timeout", "0", code=4)
    assert "1 request cannot move" in late.stderr and "no other node is connected" in late.stderr
    assert "still being drained" in late.stderr and "--undo" in late.stderr
    assert "Connected are '0', '1', '2'" in run(url, "drain", "7", code=1).stderr
    told = run(url, "drain", node)
    assert "0 requests moved, 1 ended there" in told.stdout
    assert answer.whole() == undisturbed
    for each in ("0", "1", "2"):
        post(url, "/admin/drain", {"node": each, "undo": True})
    assert post(url, "/v1/completions", {**BODY, "max_tokens": 1})["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("node", ["0", "1"], ids=["with a nanny", "without"])
def test_sigterm_moves_the_requests_of_a_worker_before_it_ends(cluster: Processes, url: str, undisturbed: str, node: str):
    post(url, "/admin/unload", {"model": "a"})
    post(url, "/admin/load", {"model": "a", "node": node})
    answer = Reading(url, f"leaves-{node}")
    assert row_of(url, f"leaves-{node}")["node"] == node
    process = cluster.running.pop(f"worker-{node}")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 0, cluster.log(f"worker-{node}")
    assert answer.whole() == undisturbed
    row = row_of(url, f"leaves-{node}")
    assert len(row["path"]) == 2 and row["moves"][0]["outcome"] == "moved", row
    assert worker(url, node) is None


def test_dask_retires_a_worker_once_its_requests_have_left(cluster: Processes, url: str, undisturbed: str):
    answer = Reading(url, "retired")
    (last,) = workers(url)
    with Client(cluster.scheduler, set_as_default=False) as client:
        assert list(client.retire_workers([last["address"]])) == [last["address"]]
    assert answer.whole() == undisturbed
