"""Small random models, made once, and a cluster of processes for each module that asks for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

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


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory, worker_environment: dict[str, str], from_scratch: bool
) -> Iterator[Processes]:
    """A scheduler and one worker of one slot, as two separate programs."""
    cluster = Processes(tmp_path_factory.mktemp("processes"), from_scratch=from_scratch)
    try:
        cluster.start_scheduler()
        cluster.start_worker("0", **worker_environment)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def from_scratch() -> bool:
    """Whether they are started as users start theirs, see :class:`Processes`; for a module to say."""
    return False


@pytest.fixture(scope="module")
def worker_environment() -> dict[str, str]:
    """What is set for the worker only; for a module to say."""
    return {}


@pytest.fixture(scope="module")
def url(processes: Processes, checkpoints: dict[str, Path]) -> str:
    """A front door on them, with both models deployed."""
    url = processes.start_door()
    until("the worker joined", lambda: workers(url))
    for name, path in checkpoints.items():
        reply = post(url, "/register", {"model": name, "backend_config": {"pretrained_model_name_or_path": str(path)}})
        assert reply["status"] == "ok", reply
    return url
