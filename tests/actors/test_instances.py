"""An instance over a real engine: what reaches the engine, and what goes back to the front door."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sllmdask.actors.adapters import AdapterUse
from sllmdask.actors.instances import Instance
from sllmdask.actors.streams import Message
from sllmdask.batching.params import Grammar, SamplingParams, TokenLogprobs
from sllmdask.engine.engine import EngineThread
from tests.engine.adapters import make_adapter
from tests.engine.models import TinyModel, make_engine, make_model
from tests.fakes import byte_tokenizer

pytestmark = pytest.mark.asyncio

DATE = Grammar("regex", r"[0-9]{4}-[0-9]{2}")


@dataclass
class Lease:
    """What an instance asks of its lease here: where the files are, and their size."""

    path: str
    nbytes: int = 1


@dataclass
class Door:
    """The worker's registry, as far as an instance sends through it."""

    sent: list[Message] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, _front_door: str, message: Message) -> None:
        self.sent.append(message)
        self.changed.set()

    def of(self, request_id: str) -> list[Message]:
        return [message for message in self.sent if message[1] == request_id]

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not enough():
                self.changed.clear()
                await self.changed.wait()

    async def until_ended(self, request_id: str) -> list[Message]:
        await self.until(lambda: any(m[0] == "error" or m[5] for m in self.of(request_id)))
        return self.of(request_id)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("llama")
    made = make_model(directory)
    byte_tokenizer()._hf.save_pretrained(directory)
    return made


@pytest_asyncio.fixture
async def instance(model: TinyModel) -> AsyncIterator[Instance]:
    made = Instance("m/1", "m", "m", "auto", Door())  # type: ignore[arg-type]
    engine = EngineThread(make_engine(model), asyncio.get_running_loop(), made.on_outputs, made.on_failed)
    made._engine, made._lease, made._whole = engine, Lease(str(model.directory)), True  # type: ignore[assignment]
    yield made
    await asyncio.to_thread(engine.close)


def door_of(instance: Instance) -> Door:
    door: Any = instance._registry
    return door


def submit(instance: Instance, request_id: str, *, output_ids: list[int] | None = None, **params: Any) -> None:
    wire = SamplingParams(**{"max_tokens": 20, "seed": 4, **params}).as_wire()
    instance.submit("door", request_id, 0, [1, 2, 3], output_ids or [], wire)


def text_of(sent: list[Message]) -> str:
    return byte_tokenizer().decode([token for message in sent for token in message[4]])


async def test_log_probabilities_go_with_their_tokens_and_those_of_the_prompt_with_the_first(instance: Instance):
    submit(instance, "asked", logprobs=2, prompt_logprobs=1, max_tokens=3)
    submit(instance, "plain", max_tokens=3)
    first, *rest = await door_of(instance).until_ended("asked")
    assert len(first) == 8 and len(first[7]) == 2
    assert all(len(TokenLogprobs.from_wire(told).top_ids) == 1 for told in first[7])
    for message in (first, *rest):
        [told] = map(TokenLogprobs.from_wire, message[6])
        assert len(told.top_ids) == 2 and told.logprob <= told.top_logprobs[0] <= 0
    assert all(message[7] is None for message in rest)
    assert all(len(message) == 6 for message in await door_of(instance).until_ended("plain"))


async def test_answers_to_one_prompt_compute_it_once_and_are_those_of_requests_by_themselves(instance: Instance):
    prompt = [n % 200 for n in range(3, 90)]
    wires = [SamplingParams(max_tokens=12, seed=seed, temperature=1.0).as_wire() for seed in range(4)]
    for seed, wire in enumerate(wires):
        instance.submit("door", f"together-{seed}", 0, prompt, [], wire, None, "group")
    together = [text_of(await door_of(instance).until_ended(f"together-{seed}")) for seed in range(4)]
    assert instance.stats()["n_reused_tokens"] == 3 * (len(prompt) - 1)
    assert not instance._leaders
    for seed, wire in enumerate(wires):
        instance.submit("door", f"alone-{seed}", 0, prompt, [], wire)
        assert text_of(await door_of(instance).until_ended(f"alone-{seed}")) == together[seed]
    assert len(set(together)) > 1


async def test_a_request_with_a_grammar_is_answered_beside_one_without(instance: Instance):
    submit(instance, "date", grammar=DATE)
    submit(instance, "plain")
    sent = await door_of(instance).until_ended("date")
    assert re.fullmatch(DATE.text, text_of(sent)) and sent[-1][5] == "stop"
    assert (await door_of(instance).until_ended("plain"))[-1][5] == "length"


async def test_others_run_while_a_grammar_is_compiled_and_one_that_is_cancelled_meanwhile_never_begins(instance: Instance):
    compiler: Any = instance._engine._engine._grammars  # type: ignore[union-attr]
    with compiler._lock:  # as if it took long
        submit(instance, "cancelled", grammar=DATE)
        submit(instance, "waits", grammar=DATE)
        submit(instance, "plain")
        await door_of(instance).until_ended("plain")
        instance.cancel("cancelled")
        assert door_of(instance).of("waits") == []
    assert re.fullmatch(DATE.text, text_of(await door_of(instance).until_ended("waits")))
    assert door_of(instance).of("cancelled") == []
    assert instance._engine is not None and instance._engine.stats()["n_output_tokens"] <= 20 + 7
    await instance.until_idle()


async def test_a_grammar_that_this_model_cannot_follow_is_answered_by_name(instance: Instance):
    submit(instance, "bad", grammar=Grammar("regex", "(a"))
    [[kind, _, _, error]] = await door_of(instance).until_ended("bad")
    assert (kind, error["error"], error["param"]) == ("error", "InvalidRequest", "grammar")
    await instance.until_idle()


async def test_a_tokenizer_is_found_where_a_completed_fetch_has_moved_it(model: TinyModel, instance: Instance, tmp_path: Path):
    moved = tmp_path / "final"
    shutil.copytree(model.directory, moved)
    compiler: Any = instance._engine._engine._grammars  # type: ignore[union-attr]
    compiler._directory = tmp_path / "gone"
    instance._lease = Lease(str(moved))  # type: ignore[assignment]
    submit(instance, "date", grammar=DATE)
    assert re.fullmatch(DATE.text, text_of(await door_of(instance).until_ended("date")))


async def test_a_request_that_moved_here_goes_on_in_its_grammar(instance: Instance):
    submit(instance, "whole", grammar=DATE)
    whole = [token for message in await door_of(instance).until_ended("whole") for token in message[4]]
    submit(instance, "moved", grammar=DATE, output_ids=whole[:4])
    sent = await door_of(instance).until_ended("moved")
    assert [token for message in sent for token in message[4]] == whole[4:]
    assert sent[0][3] == 4


@dataclass
class Adapters:
    """What an instance asks of its adapters here: one that is in the engine, once the gate is open."""

    use: AdapterUse
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    n_users: int = 0

    async def acquire(self, _name: str, _source: str) -> AdapterUse:
        await self.gate.wait()
        self.n_users += 1
        return self.use

    def release(self, _use: AdapterUse) -> None:
        self.n_users -= 1


async def test_a_request_may_have_a_grammar_and_an_adapter(instance: Instance, model: TinyModel, tmp_path: Path):
    written = make_adapter(tmp_path, model, ("q_proj", "v_proj", "down_proj"), rank=8)
    engine: Any = instance._engine
    adapter = await asyncio.wrap_future(engine.call(lambda e: e.read_adapter("a", tmp_path, written.tensors)))
    await asyncio.wrap_future(engine.call(lambda e: e.add_adapter(adapter)))
    adapters: Any = Adapters(AdapterUse(adapter.salt, None))  # type: ignore[arg-type]
    instance._adapters = adapters
    door = door_of(instance)
    wire = SamplingParams(max_tokens=20, temperature=0.0, grammar=DATE).as_wire()
    instance.submit("door", "with", 0, [1, 2, 3], [], wire, ("a", "somewhere"))
    instance.submit("door", "left", 0, [1, 2, 3], [], wire, ("a", "somewhere"))
    instance.submit("door", "without", 0, [1, 2, 3], [], wire)
    instance.cancel("left")
    assert not re.fullmatch(DATE.text, text_of(door.of("with")))
    adapters.gate.set()
    texts = [text_of(await door.until_ended(name)) for name in ("with", "without")]
    assert all(re.fullmatch(DATE.text, text) for text in texts)
    assert texts[0] != texts[1]
    assert adapters.n_users == 0
    assert door.of("left") == []


async def test_requests_that_are_given_back_end_as_if_the_instance_were_gone_and_the_others_go_on(instance: Instance):
    for name in ("kept", "lost"):
        submit(instance, name, max_tokens=3)
    assert instance.facts()["requests"] == {"kept": "door", "lost": "door"}
    assert instance.give_back(["lost", "unknown"]) == 1
    sent = door_of(instance).sent
    assert [(message[0], message[3]["error"]) for message in sent if message[1] == "lost"] == [("error", "InstanceGone")]
    assert len(await door_of(instance).until_ended("kept")) == 3
    assert instance.facts()["requests"] == {}
