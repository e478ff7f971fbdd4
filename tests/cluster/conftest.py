"""Small random models and a cluster of processes, both made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.backends import install
from tests.checkpoints import make_checkpoint
from tests.cluster.harness import Processes, post, until, workers


@pytest.fixture(autouse=True)
def a_store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test starts without a word about it shares files and host memory with no other test."""
    with patch.dict(os.environ):  # a nanny in this process would leave there what it sets for its worker
        monkeypatch.setenv("DASK_SLLMDASK__WORKER__STORE_DIR", str(tmp_path / "store"))
        monkeypatch.setenv("DASK_SLLMDASK__WORKER__MEMORY_GRACE", "0")
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random models, ``a`` (Llama) and ``b`` (Qwen2)."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, family) for name, family in (("a", "llama"), ("b", "qwen2"))}


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A scheduler and one worker of one slot, as two separate programs, which users would start in the same way."""
    cluster = Processes(tmp_path_factory.mktemp("processes"), from_scratch=True)
    # The worker has a backend that another distribution has brought.
    path = [str(install(cluster.directory / "site")), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        cluster.start_scheduler()
        cluster.start_worker("0", PYTHONPATH=os.pathsep.join(filter(None, path)))
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def url(processes: Processes, checkpoints: dict[str, Path]) -> str:
    """A front door on them, with both models deployed."""
    url = processes.start_door()
    until("the worker joined", lambda: workers(url))
    for name, path in checkpoints.items():
        reply = post(url, "/register", {"model": name, "backend_config": {"pretrained_model_name_or_path": str(path)}})
        assert reply["status"] == "ok", reply
    return url
