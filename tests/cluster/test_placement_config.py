"""What an operator says of a model acts, at once and on nodes that come later: two workers with files of their own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.asking import ask, model_on, register, worker
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers
from tests.loader.serving import Site

pytestmark = pytest.mark.cluster

LONG = {"prompt": "hello", "max_tokens": 1800, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    cluster = Processes(tmp_path_factory.mktemp("placement"))
    try:
        cluster.start_scheduler()
        for name in ("0", "1"):
            start_worker(cluster, name)
        yield cluster
    finally:
        cluster.close()


def start_worker(cluster: Processes, name: str) -> None:
    cluster.start_worker(name, "--store-dir", str(cluster.directory / f"store-{name}"), slots=2)


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("both workers joined", lambda: len(workers(url)) == 2)
    return url


@pytest.fixture(scope="module")
def site(checkpoints: dict[str, Path]) -> Iterator[Site]:
    """A web server of both models."""
    with Site(checkpoints["a"].parent) as site:
        yield site


def tiers(url: str, model: str) -> dict[str, str]:
    """The tier of a model, by node."""
    return {each["name"]: found["tier"] for each in workers(url) if (found := model_on(url, each["name"], model))}


def forget(url: str, *models: str) -> None:
    for model in models:
        post(url, "/delete", {"model": model})
    until("nothing is loaded", lambda: not instances(url))


def test_files_and_memory_are_brought_where_the_deployment_says_also_to_a_node_that_joins_later(
    cluster: Processes, url: str, site: Site
):
    placement = {"target_nodes": ["0"], "local_disk": ["1", "2"], "memory_pool": ["0", "2"]}
    deployment = {
        "model": "m",
        "backend_config": {"pretrained_model_name_or_path": f"{site.url}/a"},
        "placement_config": placement,
    }
    warnings = post(url, "/register", deployment)["warnings"]
    assert [warning.split(":")[0] for warning in warnings] == ["placement_config.local_disk", "placement_config.memory_pool"]
    assert all("node '2' is not connected; it gets the checkpoint when it joins" in warning for warning in warnings)
    until("it is where it shall be", lambda: tiers(url, "m") == {"0": "host", "1": "disk"})
    assert ask(url, "m")[1:] == ("0", "host"), "the only node that may run it"

    start_worker(cluster, "2")
    until("the new node has it, too", lambda: tiers(url, "m").get("2") == "host")
    reply = post(url, "/update", {"model": "m", "placement_config": {"target_nodes": ["2"]}})
    assert reply["status"] == "ok" and reply["warnings"] == []
    assert ask(url, "m")[1:] == ("2", "host")
    cluster.stop("worker-2")
    until("it has left", lambda: worker(url, "2") is None)
    forget(url, "m")


def test_what_is_pinned_is_in_memory_and_shown_until_it_is_unpinned_or_deleted(url: str, checkpoints: dict[str, Path]):
    register(url, "a", checkpoints["a"])
    pinned = post(url, "/admin/pin", {"model": "a", "node": "1"})
    assert (pinned["pinned"], pinned["nodes"]) == (["1"], ["1"])

    def shown() -> tuple[list[str], bool, str]:
        (row,) = [row for row in get(url, "/admin/models")["models"] if row["model"] == "a"]
        found = model_on(url, "1", "a")
        return row["pinned"], found["pinned"], found["tier"]

    assert shown() == (["1"], True, "host")
    post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 1}})
    assert shown() == (["1"], True, "host")
    assert post(url, "/admin/pin", {"model": "a", "pinned": False})["nodes"] == ["1"]
    until("it may leave", lambda: shown() == ([], False, "host"))
    assert post(url, "/admin/pin", {"model": "a"})["nodes"] == ["1"], "where it is in memory"
    assert post(url, "/admin/pin", {"model": "a", "node": "7"})["status"] == 400
    assert post(url, "/admin/pin", {"model": "aa"})["error"]["code"] == "model_not_found"
    forget(url, "a")
    until("its memory is free", lambda: (worker(url, "1") or {})["tiers"]["host"]["used"] == 0)


def test_an_update_acts_at_once_and_what_is_loaded_stays(url: str, checkpoints: dict[str, Path]):
    register(url, "a", checkpoints["a"], num_gpus=2)
    assert ask(url, "a")[2] != "hit"
    (before,) = instances(url)
    assert [each["slots_used"] for each in workers(url) if each["instances"]] == [2]
    post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 2, "keep_alive": 600}})
    assert ask(url, "a")[2] == "hit" and [each["instance"] for each in instances(url)] == [before["instance"]]
    post(url, "/update", {"model": "a", "auto_scaling_config": {"min_instances": 2}})
    until("there are two", lambda: [each["state"] for each in instances(url)] == ["ready"] * 2)
    assert before["instance"] in {each["instance"] for each in instances(url)}
    post(url, "/update", {"model": "a", "auto_scaling_config": {"min_instances": 0, "keep_alive": 0}})
    until("they leave at once", lambda: not instances(url))
    assert ask(url, "a")[2] == "host"
    until("it leaves after each request", lambda: not instances(url))
    reply = post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instance": 1}})
    assert reply["status"] == 400 and "max_instances" in reply["error"]["message"]
    assert post(url, "/update", {"model": "none", "num_gpus": 1})["status"] == 404
    forget(url, "a")


@pytest.mark.parametrize("force", [True, False])
def test_deleted_once_more_or_by_force_a_model_ends_what_runs_with_one_clear_error(
    url: str, checkpoints: dict[str, Path], force: bool
):
    register(url, "a", checkpoints["a"])
    stream = Stream(url, {"model": "a", **LONG})
    lines = stream.lines()
    next(line for line in lines if line.startswith("data: "))
    if not force:
        assert post(url, "/delete", {"model": "a"})["n_running"] == 1
    ended: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: ended.append(post(url, "/delete", {"model": "a", "force": force})))
    thread.start()
    last = [line for line in lines if line.startswith("data: ")][-1]
    thread.join(30)
    assert ended[0]["n_aborted"] == 1
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "model_deleted" and "'a' was deleted while it answered" in error["message"]
    until(
        "its slots and its memory are free",
        lambda: all(each["slots_used"] == 0 and each["tiers"]["host"]["used"] == 0 for each in workers(url)),
    )
    assert post(url, "/delete", {"model": "a"})["error"]["code"] == "model_not_found"
