"""Several models on one worker: one ledger, refusals with numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from sllmdask.actors import instances
from sllmdask.actors.instances import InstanceRegistry, open_ledger
from sllmdask.batching.memory import MemoryLedger
from sllmdask.config import EngineSettings, WorkerSettings
from sllmdask.errors import InsufficientMemory
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.store import CheckpointStore
from tests.engine.models import make_model
from tests.loader.test_device import FakeDevice

pytestmark = pytest.mark.asyncio

MiB = 1024**2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2"):
        make_model(root / name, name)
    return root


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[CheckpointStore]:
    store = CheckpointStore(WorkerSettings(store_dir=str(tmp_path)), PrivatePool(64 * MiB))
    await store.start()
    yield store
    await store.close()


def registry_of(store: CheckpointStore, ledger: MemoryLedger, **changes: Any) -> InstanceRegistry:
    settings = EngineSettings(**{"device": "cpu", "kv_memory": 2 * MiB, "n_threads": 1, **changes})
    return InstanceRegistry(store, settings, lambda _: None, str, memory=ledger)


async def load(registry: InstanceRegistry, name: str, root: Path) -> dict[str, Any]:
    return await registry.adopt_or_create(f"{name}/1", name, str(root / name), "auto").load()


async def test_a_model_that_does_not_fit_beside_another_is_refused_and_fits_when_that_is_gone(store: CheckpointStore, root: Path):
    ledger = MemoryLedger(1000 * MiB)
    registry = registry_of(store, ledger)
    await load(registry, "llama", root)
    used = ledger.used
    snapshot = registry.snapshot()
    assert snapshot["tiers"]["device"] == {"used": used, "capacity": 1000 * MiB}
    memory = snapshot["instances"]["llama/1"]["memory"]
    assert sum(memory.values()) == used and memory["kv"] == snapshot["instances"]["llama/1"]["kv_nbytes"]
    ledger.capacity = used + used // 2
    for _ in range(2):
        with pytest.raises(InsufficientMemory) as refused:
            await load(registry, "qwen2", root)
        assert refused.value.model == "qwen2"
        assert refused.value.needed > refused.value.available
        assert (ledger.used, list(registry.snapshot()["instances"])) == (used, ["llama/1"])
        assert store.snapshot()["keys"][str(root / "qwen2")]["leases"] == 0
    await registry.unload("llama/1", forget=False)
    assert ledger.used == 0
    await load(registry, "qwen2", root)
    assert ledger.used == used
    await registry.drain(0)
    assert ledger.used == 0


async def test_a_build_that_finds_no_memory_gives_everything_back(
    store: CheckpointStore, root: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger = MemoryLedger(1000 * MiB)
    registry = registry_of(store, ledger, dtype="bfloat16", execute_while_loading=False)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error code 12")

    with monkeypatch.context() as patch:
        patch.setattr("sllmdask.engine.runner.ModelRunner._check_first_layers", fail)
        with pytest.raises(InsufficientMemory) as refused:
            await registry.adopt_or_create("llama/1", "llama", str(root / "llama"), "auto").load()
    assert (refused.value.model, refused.value.needed) == ("llama", 123)
    assert ledger.used == 0 and registry.snapshot()["instances"] == {}
    assert store.snapshot()["keys"][str(root / "llama")]["leases"] == 0
    await load(registry, "llama", root)
    await registry.drain(0)


async def test_on_a_gpu_the_weights_are_in_the_books_before_they_are_copied(
    store: CheckpointStore, root: Path, monkeypatch: pytest.MonkeyPatch
):
    """A GPU that is a buffer of this process; the model runs over it on the CPU."""
    gpu = FakeDevice(threaded=True)
    monkeypatch.setattr(instances, "pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(instances, "CudaDevice", lambda _: gpu)
    ledger = MemoryLedger(1000 * MiB)
    registry = registry_of(store, ledger)
    await load(registry, "llama", root)
    memory = registry.snapshot()["instances"]["llama/1"]["memory"]
    nbytes = store.snapshot()["keys"][str(root / "llama")]["nbytes"]
    assert nbytes <= memory["weights"] <= nbytes + 4096
    ledger.capacity = ledger.used + 1000
    n_copied = len(gpu.copies)
    with pytest.raises(InsufficientMemory) as refused:
        await load(registry, "qwen2", root)
    assert refused.value.model == "qwen2" and len(gpu.copies) == n_copied
    await registry.unload("llama/1", forget=False)
    assert ledger.used == 0 and gpu.is_clean
    await load(registry, "qwen2", root)
    await registry.drain(0)
    assert ledger.used == 0 and gpu.is_clean


async def test_a_worker_keeps_books_of_what_its_settings_leave():
    settings = WorkerSettings(slots=4, memory_fraction=0.5)
    ledger = open_ledger("cpu", settings, host_limit=2**40, host_pool=2**38)
    assert 2**39 - 2**38 - 2**34 < ledger.capacity < 2**39 - 2**38
    assert ledger.share == ledger.capacity // 4
