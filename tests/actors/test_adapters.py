"""The adapters of one instance: a real store and a real engine; loads, evictions, failures, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sllmdask.actors.adapters import InstanceAdapters
from sllmdask.actors.embeddings import InputLedger
from sllmdask.actors.instances import InstanceRegistry
from sllmdask.config import EngineSettings, WorkerSettings
from sllmdask.engine.engine import EngineThread, LLMEngine
from sllmdask.errors import AdapterUnsupported, CheckpointNotFound, InstanceGone
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.store import CheckpointStore
from tests.engine.adapters import make_adapter
from tests.engine.models import TinyModel, make_engine, make_model

pytestmark = pytest.mark.asyncio

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    root = tmp_path_factory.mktemp("model")
    model = make_model(root / "base")
    for seed, name in enumerate(NAMES):
        make_adapter(root / name, model, ("q_proj",), seed=seed)
    make_adapter(root / "wrong", make_model(root / "wider", hidden_size=128), ("q_proj",))
    return model


class Held:
    """An instance's adapters, at most two, and what they are made of."""

    def __init__(self, model: TinyModel, store: CheckpointStore) -> None:
        self.root = model.directory.parent
        self.store = store
        self.engine = make_engine(model)
        self.thread = EngineThread(self.engine, asyncio.get_running_loop(), lambda _: None, lambda _: None)
        self.adapters = InstanceAdapters(store, str, self.engine.read_adapter, self.thread.call, 2)

    async def acquire(self, name: str) -> Any:
        return await asyncio.wait_for(self.adapters.acquire(name, str(self.root / name)), 30)

    @property
    def names(self) -> list[str]:
        return [each["name"] for each in self.adapters.snapshot()]

    async def n_in_engine(self) -> int:
        def count(engine: LLMEngine) -> int:
            return len(engine._runner.adapters)

        return await asyncio.wrap_future(self.thread.call(count))

    @property
    def n_leases(self) -> int:
        return sum(facts["leases"] for facts in self.store.snapshot()["keys"].values())


@pytest_asyncio.fixture
async def held(model: TinyModel, tmp_path: Path) -> AsyncIterator[Held]:
    store = CheckpointStore(WorkerSettings(store_dir=str(tmp_path / "store")), PrivatePool(2**26))
    await store.start()
    held = Held(model, store)
    yield held
    await asyncio.to_thread(held.thread.close)
    await held.adapters.close()
    assert held.n_leases == 0
    await store.close()


async def test_requests_for_one_adapter_share_one_load(held: Held):
    uses = await asyncio.gather(*(held.acquire("a") for _ in range(5)))
    assert len({use.salt for use in uses}) == 1
    assert (held.n_leases, await held.n_in_engine()) == (1, 1)
    assert held.adapters.snapshot()[0]["n_requests"] == 5
    for use in uses:
        held.adapters.release(use)
    assert held.names == ["a"], "it stays for the next request"


async def test_the_one_used_longest_ago_gives_way(held: Held):
    for name in ("a", "b", "a", "c"):
        held.adapters.release(await held.acquire(name))
    assert held.names == ["a", "c"]
    assert (held.n_leases, await held.n_in_engine()) == (2, 2)


async def test_an_adapter_that_requests_have_stays_and_another_one_waits(held: Held):
    first, second = await held.acquire("a"), await held.acquire("b")
    waiting = asyncio.create_task(held.acquire("c"))
    # One that is there is had at once, whoever waits for a place.
    again = await held.acquire("a")
    assert not waiting.done()
    held.adapters.release(first)
    held.adapters.release(again)
    third = await waiting
    assert held.names == ["b", "c"]
    assert await held.n_in_engine() == 2
    held.adapters.release(second)
    held.adapters.release(third)


async def test_a_load_that_fails_is_told_to_all_who_wait_and_takes_no_place(held: Held):
    for name, error in (("wrong", AdapterUnsupported), ("gone", CheckpointNotFound)):
        results = await asyncio.gather(*(held.acquire(name) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [error] * 3
    assert (held.names, held.n_leases, await held.n_in_engine()) == ([], 0, 0)
    for name in ("a", "b"):
        held.adapters.release(await held.acquire(name))
    assert held.names == ["a", "b"]


async def test_one_that_stops_waiting_leaves_the_others_alone(held: Held):
    leaving = [asyncio.create_task(held.acquire("a")) for _ in range(3)]
    staying = asyncio.create_task(held.acquire("a"))
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    use = await staying
    assert held.adapters.snapshot()[0]["n_requests"] == 1
    held.adapters.release(use)


async def test_who_waits_for_a_place_when_the_instance_ends_is_told(held: Held):
    await held.acquire("a")
    await held.acquire("b")
    waiting = asyncio.create_task(held.acquire("c"))
    await asyncio.sleep(0)
    await asyncio.to_thread(held.thread.close)
    await held.adapters.close()
    with pytest.raises(InstanceGone):
        await waiting
    with pytest.raises(InstanceGone):
        await held.acquire("a")
    assert held.n_leases == 0


async def test_an_instance_that_ends_during_a_load_keeps_nothing(held: Held):
    loading = asyncio.create_task(held.acquire("a"))
    await asyncio.sleep(0)
    await asyncio.to_thread(held.thread.close)
    await held.adapters.close()
    with pytest.raises(InstanceGone):
        await loading
    assert held.n_leases == 0


# --- inputs of embedding requests ------------------------------------------------------------------------------------


async def test_inputs_are_known_by_their_request_and_their_index_until_the_engine_is_done():
    ledger = InputLedger()
    sequences = ledger.begin("r", [(3, (1, 2)), (5, (7,))], 8)
    assert [(each.prompt_ids, each.dimensions) for each in sequences] == [([1, 2], 8), ([7], 8)]
    assert not ledger.is_done("r")
    assert [ledger.take(each.request_id) for each in sequences] == [("r", 3), ("r", 5)]
    assert ledger.is_done("r")
    assert ledger.take(sequences[0].request_id) is None
    assert ledger.end("r") == []


async def test_a_request_that_ends_early_tells_what_the_engine_still_has():
    ledger = InputLedger()
    first, second = ledger.begin("r", [(0, (1,)), (1, (2,))], None)
    (other,) = ledger.begin("s", [(0, (1,))], None)
    assert ledger.take(first.request_id) == ("r", 0)
    assert ledger.end("r") == [second.request_id]
    assert ledger.take(second.request_id) is None
    assert ledger.take(other.request_id) == ("s", 0)


async def test_a_deployment_hears_that_an_engine_takes_no_adapters(held: Held, tmp_path: Path):
    adapter, base = str(held.root / "a"), str(held.root / "base")
    plain = InstanceRegistry(held.store, EngineSettings(device="cpu"), lambda _: None, str)
    await plain.check_adapter("a", adapter, base)
    exact = InstanceRegistry(held.store, EngineSettings(device="cpu", deterministic=True), lambda _: None, str)
    with pytest.raises(AdapterUnsupported, match=r"engine\.deterministic"):
        await exact.check_adapter("a", adapter, base)
    make_model(tmp_path, "gptj")
    with pytest.raises(AdapterUnsupported, match="attention of its own"):
        await plain.check_adapter("a", adapter, str(tmp_path))
