"""Workers of different nodes supply each other with checkpoints: real processes, each with memory and a disk tier of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.asking import ASK, ask, model_on, register, worker
from tests.cluster.harness import get, post, two_workers, until
from tests.cluster.test_processes import reference
from tests.loader.serving import Site

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A front door with a worker on each of two nodes, ``0`` and ``1``."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DASK_SLLMDASK__WORKER__SHARED_MEMORY", "false")
        with two_workers(tmp_path_factory.mktemp("nodes"), apart=True) as url:
            yield url


@pytest.fixture
def site(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[Site]:
    """A server of both models, which a test may stop."""
    for name, path in checkpoints.items():
        shutil.copytree(path, tmp_path / "site" / name)
    with Site(tmp_path / "site") as site:
        yield site


def load(url: str, model: str, node: str) -> str:
    """What the load had to wait for."""
    reply = post(url, "/admin/load", {"model": model, "node": node})
    assert "error" not in reply, reply
    return reply["cold_start"]


def forget(url: str, *models: str) -> None:
    for model in models:
        post(url, "/delete", {"model": model})


def test_what_one_node_has_in_use_comes_from_there_when_its_source_is_gone(url, site, checkpoints):
    register(url, "a", f"{site.url}/a")
    assert load(url, "a", "0") == "remote"
    until("all of it is there", lambda: worker(url, "0")["tiers"]["disk"]["used"] > 0)
    n_asked = len(site.data)
    site.on_data = lambda *_: 404
    assert load(url, "a", "1") == "peer"
    assert len(site.data) == n_asked
    post(url, "/admin/unload", {"model": "a", "node": "0"})
    assert ask(url, "a") == (reference(checkpoints["a"], ASK["prompt"], ASK["max_tokens"]), "1", "hit")
    forget(url, "a")


def test_what_one_node_has_on_disk_comes_from_there_and_the_request_says_so(url, site, checkpoints):
    register(url, "b", f"{site.url}/b", node="1")
    pulled = post(url, "/admin/pull", {"model": "b", "node": "0"})
    assert (pulled["state"], pulled["node"]) == ("disk", "0")
    until("it is told", lambda: model_on(url, "0", "b").get("tier") == "disk")
    site.on_data = lambda *_: 404
    assert ask(url, "b") == (reference(checkpoints["b"], ASK["prompt"], ASK["max_tokens"]), "1", "peer")
    until("a disk copy is made beside", lambda: (worker(url, "1") or {})["tiers"]["disk"]["used"] > 0)
    forget(url, "b")


def test_where_no_node_has_it_the_source_is_asked_and_its_loss_is_named(url, site):
    register(url, "c", f"{site.url}/a")

    site.on_data = lambda *_: 404
    reply = post(url, "/v1/completions", {"model": "c", **ASK})
    assert (reply["status"], reply["error"]["code"]) == (503, "load_failed")
    assert site.url.removeprefix("http://") in reply["error"]["message"]
    assert get(url, "/health")["status"] == "ok"
    forget(url, "c")
