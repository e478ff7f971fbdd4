"""Backends by name: which there are, and an instance over an engine that another distribution brings."""

from __future__ import annotations

import asyncio
import configparser
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sllmdask.actors.backends import Backends
from sllmdask.actors.instances import Instance, InstanceRegistry
from sllmdask.actors.streams import Message
from sllmdask.batching.backend import GROUP, Task
from sllmdask.batching.params import Grammar, SamplingParams
from sllmdask.config import EngineSettings, WorkerSettings
from sllmdask.engine.backend import TransformersBackend
from sllmdask.errors import ConfigError, UnsupportedArchitecture
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.store import CheckpointStore
from tests.backends import install
from tests.engine.models import TinyModel, make_model

ROOT = Path(__file__).parents[2]


def test_ours_is_there_in_a_source_tree_and_in_the_metadata_of_an_installation():
    assert isinstance(Backends().find("transformers"), TransformersBackend)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    [line] = setup["options.entry_points"][GROUP].split("\n")[1:]
    name, value = line.split(" = ")
    module, _, found = value.partition(":")
    assert name == "transformers"
    assert (module, found) == (TransformersBackend.__module__, TransformersBackend.__name__)


def test_there_is_one_of_each():
    backends = Backends()
    assert backends.find("transformers") is backends.find("transformers")


def test_a_backend_that_is_not_installed_is_refused_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(install(tmp_path))
    with pytest.raises(ConfigError, match=r"'vllm' is not installed: the workers have costs, transformers\. Install") as caught:
        Backends().find("vllm")
    assert caught.value.param == "backend"


def test_two_backends_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(install(tmp_path))
    install(tmp_path, module="other_backend")
    with pytest.raises(
        ConfigError, match="'costs' is installed twice, as costs_backend:CostsBackend and other_backend:CostsBackend: remove one"
    ):
        Backends().find("costs")


def test_a_backend_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(install(tmp_path, module="broken_backend", source="import a_package_that_is_not_there"))
    with pytest.raises(ConfigError, match=r"broken_backend:CostsBackend.*a_package_that_is_not_there"):
        Backends().find("costs")


# --- an instance -----------------------------------------------------------------------------------------------------


class Worker:
    """The instances of a worker, over a real store, and what they send."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.sent: list[Message] = []
        self._changed = asyncio.Event()
        self.registry = InstanceRegistry(store, EngineSettings(device="cpu", n_threads=1), lambda _: None, str)
        self.registry.send = self._send  # type: ignore[method-assign]

    def _send(self, _front_door: str, message: Message) -> None:
        self.sent.append(message)
        self._changed.set()

    async def until_ended(self, request_id: str) -> list[Message]:
        async with asyncio.timeout(30):
            while True:
                mine = [message for message in self.sent if message[1] == request_id]
                if mine and (mine[-1][0] == "error" or mine[-1][5]):
                    return mine
                self._changed.clear()
                await self._changed.wait()

    @property
    def n_leases(self) -> int:
        return sum(facts["leases"] for facts in self.store.snapshot()["keys"].values())


@pytest_asyncio.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    store = CheckpointStore(WorkerSettings(store_dir=str(tmp_path / "store")), PrivatePool(2**26))
    await store.start()
    worker = Worker(store)
    yield worker
    await worker.registry.close()
    assert worker.n_leases == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("llama"))


def submit(instance: Instance, request_id: str, **params: Any) -> None:
    adapter = params.pop("adapter", None)
    wire = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, **params}).as_wire()
    instance.submit("door", request_id, 0, [1, 2, 3], [], wire, adapter)


@pytest.mark.asyncio
@pytest.mark.parametrize("wants_tensors", [False, True])
async def test_an_engine_of_another_distribution_answers(
    worker: Worker, model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants_tensors: bool
):
    module = f"costs_backend_{wants_tensors}"
    monkeypatch.syspath_prepend(install(tmp_path / "site", module=module, wants_tensors=wants_tensors))
    path = str(model.directory)
    config = json.loads((model.directory / "config.json").read_text())
    facts = await worker.registry.inspect("costs", path, config, Task())
    assert (facts.architecture, facts.max_model_len, facts.embedding) == ("LlamaForCausalLM", 128, None)
    instance = worker.registry.adopt_or_create("m/1", "m", path, "auto", None, "costs")
    done = await instance.load()
    assert done["loaded_from"] == "disk" and done["nbytes"] > 0
    # Host memory is for those who want tensors.
    assert worker.n_leases == int(wants_tensors)
    assert (worker.store.snapshot()["tiers"]["host"]["used"] > 0) is wants_tensors
    for name in ("a", "b"):
        submit(instance, name)
    answers = [[message[4][0] for message in await worker.until_ended(name)] for name in ("a", "b")]
    assert len(answers[0]) == 5 and answers[0] == answers[1]
    assert instance.stats()["n_output_tokens"] == 10
    await worker.registry.unload("m/1", forget=False)
    assert worker.n_leases == 0


@pytest.mark.asyncio
async def test_what_an_engine_does_not_have_is_answered_by_an_error(
    worker: Worker, model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(install(tmp_path / "site", module="plain_backend"))
    path = str(model.directory)
    instance = worker.registry.adopt_or_create("m/1", "m", path, "auto", None, "costs")
    await instance.load()
    submit(instance, "grammar", grammar=Grammar("regex", "a+"))
    [[kind, _, _, error]] = await worker.until_ended("grammar")
    assert (kind, error["error"], error["param"]) == ("error", "InvalidRequest", "grammar")
    submit(instance, "adapter", adapter=("polite", "/adapters/polite"))
    [[kind, _, _, error]] = await worker.until_ended("adapter")
    assert (kind, error["error"]) == ("error", "AdapterUnsupported")
    with pytest.raises(ConfigError, match="'costs' makes no embeddings"):
        await worker.registry.inspect("costs", path, {"architectures": ["LlamaForCausalLM"]}, Task("embed"))
    with pytest.raises(UnsupportedArchitecture, match="what it costs is not known"):
        await worker.registry.inspect("costs", path, {"architectures": ["OPTForCausalLM"]}, Task())


@pytest.mark.asyncio
async def test_a_load_by_a_backend_that_is_not_here_fails_by_name_and_holds_nothing(worker: Worker, model: TinyModel):
    instance = worker.registry.adopt_or_create("m/1", "m", str(model.directory), "auto", None, "vllm")
    with pytest.raises(ConfigError, match="'vllm' is not installed"):
        await instance.load()
    assert worker.n_leases == 0
    assert worker.registry.snapshot()["instances"] == {}


@pytest.mark.asyncio
async def test_the_structure_of_a_closed_engine_serves_the_next_one(worker: Worker, model: TinyModel):
    kept = []
    for number in range(2):
        instance = worker.registry.adopt_or_create(f"m/{number}", "m", str(model.directory), "auto")
        await instance.load()
        engine: Any = instance._engine
        kept.append(engine._engine._runner._skeleton)
        submit(instance, f"r{number}")
        assert (await worker.until_ended(f"r{number}"))[-1][5] == "length"
        await worker.registry.unload(instance.id, forget=False)
    assert kept[0] is kept[1]
