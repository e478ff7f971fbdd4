"""A worker is killed while it loads for requests that wait, or while it embeds: they begin elsewhere, and their clients wait."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import VOCAB, make_checkpoint
from tests.cluster.harness import Processes, get, post, until, workers

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
#: No two inputs are in one batch.
MAX_BATCH_TOKENS = 48
INPUTS = [[(7 * i + 3 * j + 5) % VOCAB for j in range(30 + i)] for i in range(5)]
#: Drawn, so that a token that is lost or doubled changes all that follow.
TEXT = {
    "model": "text",
    "prompt": "once upon a time",
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 3,
    "frequency_penalty": 0.3,
    "ignore_eos": True,
    "logprobs": 0,
}
#: By model: what its clients ask for. Each of them asks once.
ASKED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "text": [("/v1/completions", {**TEXT, "stream": True}), ("/v1/completions", {**TEXT, "seed": 4})],
    "vectors": [
        ("/v1/embeddings", {"model": "vectors", "input": INPUTS}),
        ("/v1/embeddings", {"model": "vectors", "input": INPUTS[::2]}),
    ],
}


@dataclass
class Cluster:
    """Two workers whose loads and embeddings wait where a test says so, and a front door."""

    processes: Processes
    url: str = ""
    #: By model: the answers of requests that nobody disturbs.
    undisturbed: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def holding(self) -> Path:
        return self.processes.directory / "holding"

    def start(self) -> None:
        self.holding.mkdir()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            "SLLMDASK_HOLDING": str(self.holding),
            "PYTHONPATH": path,
            "DASK_SLLMDASK__ENGINE__MAX_BATCH_TOKENS": str(MAX_BATCH_TOKENS),
            "DASK_SLLMDASK__ENGINE__KV_MEMORY": "64MiB",
        }
        self.processes.start_scheduler()
        for name in ("0", "1"):
            self.processes.start_worker(name, "--preload", "tests.cluster.holding", slots=2, **environment)
        self.url = self.processes.start_door()
        self.both_there()
        for model in ASKED:
            source = make_checkpoint(self.processes.directory / model, "qwen2", seed=len(model))
            backend = {"pretrained_model_name_or_path": str(source), "torch_dtype": "float32"}
            if model == "vectors":
                backend["task"] = "embed"
            scaling = {"max_instances": 1, "target": 100, "keep_alive": 600}
            reply = post(self.url, "/register", {"model": model, "backend_config": backend, "auto_scaling_config": scaling})
            assert reply["status"] == "ok", reply
        for model in ASKED:
            with self.asking(model, "undisturbed") as answers:
                self.undisturbed[model] = [answer.result() for answer in answers]

    def both_there(self) -> None:
        until("both workers are there", lambda: {each["name"] for each in workers(self.url)} == {"0", "1"})

    @contextmanager
    def asking(self, model: str, name: str) -> Iterator[list[Future[Any]]]:
        """What becomes of the requests of clients that all ask at once; they are called ``NAME-MODEL-0``, and so on."""
        with ThreadPoolExecutor(len(ASKED[model])) as clients:
            asked = enumerate(ASKED[model])
            yield [clients.submit(answer, self.url, path, body, f"{name}-{model}-{i}") for i, (path, body) in asked]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What the front door says of these requests."""
        return [row for row in get(self.url, "/admin/requests")["requests"] if row["id"].startswith(f"{name}-")]

    def hold(self, name: str, **what: str) -> None:
        """Have the loads of a model wait, or, without one, what is embedded after the first batch."""
        told = self.holding / "row.tmp"
        told.write_text(json.dumps({"name": name, **what}))
        told.rename(self.holding / "row")

    def go(self, name: str, stage: str) -> None:
        (self.holding / f"{name}.{stage}.go").touch()
        (self.holding / "row").unlink()

    def node_of(self, model: str) -> str:
        """Where the one instance of a model is, or is being made."""
        [node] = [
            worker["name"] for worker in workers(self.url) for instance in worker["instances"] if instance["model"] == model
        ]
        return str(node)

    def kill(self, node: str) -> None:
        """Its nanny starts it again."""
        [pid] = [worker["pid"] for worker in workers(self.url) if worker["name"] == node]
        os.kill(pid, signal.SIGKILL)

    def embedded(self, node: str) -> int:
        """Of how many inputs a worker has made a vector."""
        lines = map(json.loads, (self.holding / "embedded").read_text().splitlines())
        return sum(len(inputs) for name, inputs in lines if name == node)


def answer(url: str, path: str, body: dict[str, Any], name: str) -> Any:
    """What a client gets in the end, without what differs each time; anything but an answer raises."""
    headers = {"content-type": "application/json", "x-request-id": name}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        if path == "/v1/embeddings":
            return [item["embedding"] for item in json.load(response)["data"]]
        if not body.get("stream"):
            [choice] = json.load(response)["choices"]
            return choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]
        text, tokens, reason = "", [], None
        for line in response:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
                text += choice["text"]
                tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
                reason = choice["finish_reason"] or reason
        return text, tokens, reason


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Processes(tmp_path_factory.mktemp("deaths")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.processes.close()


def other(node: str) -> str:
    return {"0": "1", "1": "0"}[node]


@pytest.mark.parametrize("model", ASKED)
def test_requests_whose_worker_dies_while_it_loads_for_them_are_placed_anew(cluster: Cluster, model: str):
    cluster.both_there()
    post(cluster.url, "/admin/unload", {"model": model})
    name = f"loading-{model}"
    cluster.hold(name, loads=model)
    with cluster.asking(model, name) as answers:
        until("its load waits", (cluster.holding / f"{name}.load.reached").exists)
        until("all requests wait for it", lambda: len(cluster.rows(name)) == len(answers))
        assert [row["state"] for row in cluster.rows(name)] == ["queued"] * len(answers)
        died_on = cluster.node_of(model)
        cluster.kill(died_on)
        cluster.go(name, "load")
        assert [answer.result() for answer in answers] == cluster.undisturbed[model]
    for row in cluster.rows(name):
        # None of them had been sent to who died, so there is nothing to be continued.
        assert (row["state"], row["path"], row["resumes"]) == ("finished", [other(died_on)], [])


def test_embeddings_whose_worker_dies_begin_again_elsewhere_with_the_same_vectors(cluster: Cluster):
    cluster.both_there()
    home = cluster.node_of("vectors")
    before = {node: cluster.embedded(node) for node in ("0", "1")}
    cluster.hold("embedding")
    with cluster.asking("vectors", "embedding") as answers:
        until("its second batch waits", (cluster.holding / "embedding.embed.reached").exists)
        until("both requests are there", lambda: [row["node"] for row in cluster.rows("embedding")] == [home, home])
        cluster.kill(home)
        cluster.go("embedding", "embed")
        assert [answer.result() for answer in answers] == cluster.undisturbed["vectors"]
    n = sum(len(body["input"]) for _, body in ASKED["vectors"])
    assert cluster.embedded(home) - before[home] == 1
    # The vector that was made may have been with the front door already.
    assert cluster.embedded(other(home)) - before[other(home)] in (n - 1, n)
    for row in cluster.rows("embedding"):
        assert (row["state"], row["path"]) == ("finished", [home, other(home)])
        [resume] = row["resumes"]
        assert (resume["node"], resume["reason"], resume["outcome"], resume["to"]) == (home, "worker", "resumed", other(home))
