"""Many answers move between two real workers at the same time, while some of their clients leave."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from distributed import Client

from scripts.bench_migration_cluster import token_ids, write_tokenizer
from tests.checkpoints import VOCAB, make_checkpoint
from tests.cluster.asking import register
from tests.cluster.harness import Processes, Stream, get, post, until, workers

pytestmark = pytest.mark.cluster

#: Answers that are read to their ends, and clients that leave; tokens of an answer.
N_READ, N_LEAVE, N = 12, 4, 260


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("storm"))
    try:
        processes.start_scheduler()
        for name in ("0", "1"):
            processes.start_worker(name)
        yield processes
    finally:
        processes.close()


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("both workers joined", lambda: len(workers(url)) == 2)
    source = make_checkpoint(cluster.directory / "a", "llama", hidden=256, tokenizer=False)
    write_tokenizer(source, VOCAB)
    scaling = {"max_instances": 2, "target": 100, "keep_alive": -1}
    register(url, "a", source, auto_scaling_config=scaling, router_config={"migration_delta": 4})
    for node in ("0", "1"):
        assert post(url, "/admin/load", {"model": "a", "node": node})["node"] == node
    return url


def bodies(rng: random.Random) -> list[dict[str, Any]]:
    """Greedy and drawn, with penalties: one token that is lost, doubled or another one changes all that follow."""
    ways = ({"temperature": 0}, {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.3, "top_p": 0.9})
    return [
        {
            "model": "a",
            "prompt": [rng.randrange(2, VOCAB) for _ in range(rng.randint(3, 90))],
            "max_tokens": N,
            "ignore_eos": True,
            **ways[number % 2],
        }
        for number in range(N_READ + N_LEAVE)
    ]


def held(cluster: Processes) -> dict[str, Any]:
    """Of each worker: requests, blocks that are not free, and sequences in the engine."""

    def look(dask_worker: Any) -> tuple[int, int, int]:
        [instance] = dask_worker.plugins["sllmdask"].registry._instances.values()
        stats = instance.stats()
        n_sequences = stats["n_running"] + stats["n_waiting"] + stats["n_held"]
        return stats["n_requests"], stats["blocks_total"] - stats["blocks_free"], n_sequences

    with Client(cluster.scheduler, set_as_default=False) as client:
        found: dict[str, Any] = client.run(look)
    return found


def move(url: str, name: str, kind: str, **more: Any) -> str:
    """Move a request to where it is not; what became of it."""
    row = next(row for row in get(url, "/admin/requests")["requests"] if row["id"] == name)
    reply = post(url, "/admin/migrate", {"request": name, "to": {"0": "1", "1": "0"}[row["node"]], "kind": kind, **more})
    if "error" in reply:
        return str(reply["error"]["message"])
    return str(reply["moves"][0]["outcome"] if reply["moves"] else reply["state"])


def read(url: str, name: str, body: dict[str, Any], rng: random.Random) -> tuple[list[int], list[str], str | None]:
    """Follow one answer, which moves twice on its way: its tokens, what became of the moves, its finish reason."""
    stream = Stream(url, body, {"x-request-id": name})
    plan = sorted(rng.sample(range(2, N // 2), 2))
    tokens: list[int] = []
    outcomes: list[str] = []
    reason = None
    for chunk in stream.chunks():
        for choice in chunk["choices"]:
            tokens += token_ids(choice["text"])
            reason = choice["finish_reason"] or reason
        if plan and len(tokens) >= plan[0]:
            plan.pop(0)
            outcomes.append(move(url, name, rng.choice(("kv", "tokens"))))
    return tokens, outcomes, reason


def leave(url: str, name: str, body: dict[str, Any], rng: random.Random) -> None:
    """A client that goes away while its answer may be on its way to the other worker."""
    stream = Stream(url, body, {"x-request-id": name})
    chunks = stream.chunks()
    for _ in range(rng.randint(1, N // 3)):
        next(chunks)
    move(url, name, rng.choice(("kv", "tokens")), wait=False)
    stream.close()


def test_answers_that_move_at_the_same_time_are_those_that_stayed_and_leave_nothing_behind(url: str, cluster: Processes):
    rng = random.Random(4)
    asked = bodies(rng)
    before = held(cluster)
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda body: post(url, "/v1/completions", body), asked[:N_READ]))
        assert all("choices" in reply for reply in replies), replies
        reading = [pool.submit(read, url, f"read-{i}", asked[i], random.Random(i)) for i in range(N_READ)]
        leaving = [pool.submit(leave, url, f"leave-{i}", asked[i], random.Random(i)) for i in range(N_READ, len(asked))]
        answers = [each.result() for each in reading]
        for each in leaving:
            each.result()
    for reply, (tokens, _, reason) in zip(replies, answers, strict=True):
        [stayed] = reply["choices"]
        assert tokens == token_ids(stayed["text"]) and len(tokens) == N
        assert reason == stayed["finish_reason"]
    outcomes = [outcome for _, each, _ in answers for outcome in each]
    assert outcomes.count("moved") > N_READ, outcomes
    until("nothing stays behind", lambda: held(cluster) == before)
