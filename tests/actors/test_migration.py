"""Requests move between workers while they are answered: the same tokens, each once, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import ssl
import subprocess
import threading
from typing import Any

import pytest

from sllmdask.actors import leaving, move_wire
from sllmdask.actors.adapters import AdapterUse
from sllmdask.actors.instances import Instance
from sllmdask.actors.leaving import CHUNK_NBYTES
from sllmdask.batching.params import Grammar
from sllmdask.batching.precopy import Kind
from sllmdask.errors import InstanceGone, StateRefused
from sllmdask.loader.peer_wire import Refused, dial
from tests.actors.moving import TOKEN, Workers, workers
from tests.engine.adapters import make_adapter
from tests.engine.models import TinyModel, drain, make_engine, make_model, prompts, request
from tests.fakes import byte_tokenizer

pytestmark = pytest.mark.asyncio

GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2, "frequency_penalty": 0.4}
each_way_of_sampling = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("llama")
    made = make_model(directory)
    byte_tokenizer()._hf.save_pretrained(directory)
    return made


def undisturbed(model: TinyModel, asked: dict[str, list[int]], max_tokens: int, **params: Any) -> dict[str, list[int]]:
    """The answers of requests that stay in one engine."""
    engine = make_engine(model, prefix_reuse=False)
    for name, prompt in asked.items():
        engine.add(request(name, prompt, max_tokens, **params))
    return drain(engine)


def alone(model: TinyModel, prompt: list[int], max_tokens: int, **params: Any) -> list[int]:
    return undisturbed(model, {"alone": prompt}, max_tokens, **params)["alone"]


async def until_token(there: Workers, name: str, n: int) -> None:
    asked = there.door.asked[name]
    await there.door.until(lambda: len(asked.tokens) >= n or asked.ended)


# --- the same answer -------------------------------------------------------------------------------------------------


@each_way_of_sampling
async def test_an_answer_is_the_same_however_often_its_request_moves(model: TinyModel, params: dict[str, Any]):
    moved = {f"{kind} {n}": (kind, n) for kind in Kind for n in (0, 1, 2, 5)}
    asked = dict(zip(moved, prompts(len(moved), 20, 70, seed=8), strict=True))
    max_tokens = 160
    async with workers(model, engines={"2": {"block_size": 8}}) as there:
        for name, prompt in asked.items():
            there.door.submit(name, "1", prompt, max_tokens=max_tokens, logprobs=1, **params)

        async def wander(name: str, kind: Kind, n_moves: int) -> None:
            for i in range(n_moves):
                await until_token(there, name, 4 + 5 * i)
                record = await there.move(name, "2" if i % 2 == 0 else "1", kind)
                assert (record.outcome, record.kind) == ("moved", str(kind)), record

        await asyncio.gather(*(wander(name, *moved[name]) for name in moved))
        answers = await there.door.answers()
        await there.all_free()
    assert answers == undisturbed(model, asked, max_tokens, **params)
    for name, (_, n_moves) in moved.items():
        found = there.door.asked[name]
        assert found.reason == "length" and len(found.scores) == max_tokens and not found.n_stopped
        assert found.journal.path == ["1", "2", "1", "2", "1", "2"][: n_moves + 1]
        assert len(found.journal.moves) == n_moves


async def test_log_probabilities_are_those_of_an_answer_that_stayed(model: TinyModel):
    [prompt] = prompts(1, 30, 30)
    scores = []
    for n_moves in (0, 2):
        async with workers(model) as there:
            asked = there.door.submit("a", "1", prompt, max_tokens=30, logprobs=3)
            for i in range(n_moves):
                await until_token(there, "a", 8 * (i + 1))
                await there.move("a", "21"[i])
            await there.door.answers()
            scores.append(asked.scores)
    for stayed, moved in zip(*scores, strict=True):
        assert moved[1] == stayed[1] and moved[0] == pytest.approx(stayed[0], abs=1e-5)


async def test_requests_that_change_places_at_once_give_the_same_answers(model: TinyModel):
    asked = prompts(2, 50, 90, seed=9)
    async with workers(model) as there:
        there.door.submit("a", "1", asked[0], max_tokens=70, **SAMPLED)
        there.door.submit("b", "2", asked[1], max_tokens=70)
        for there_and_back in (("2", "1"), ("1", "2"), ("2", "1")):
            n = len(there.door.asked["a"].tokens)
            await until_token(there, "a", n + 4)
            await until_token(there, "b", 4)
            outcomes = await asyncio.gather(there.move("a", there_and_back[0]), there.move("b", there_and_back[1], Kind.TOKENS))
            assert [record.outcome for record in outcomes] == ["moved", "moved"]
        answers = await there.door.answers()
        await there.all_free()
    assert answers == {"a": alone(model, asked[0], 70, **SAMPLED), "b": alone(model, asked[1], 70)}


async def test_requests_that_wander_and_are_cancelled_at_any_moment_leave_nothing_behind(model: TinyModel):
    rng = random.Random(5)
    asked = prompts(10, 5, 90, seed=2)
    params = [SAMPLED if i % 2 else GREEDY for i in range(len(asked))]
    expected: dict[str, list[int]] = {}
    for each in (GREEDY, SAMPLED):
        alike = {str(i): prompt for i, prompt in enumerate(asked) if params[i] is each}
        expected |= undisturbed(model, alike, 50, **each)
    async with workers(model, 3, {"2": {"block_size": 8}, "3": {"n_blocks": 24, "max_batch_tokens": 48}}) as there:
        for i, prompt in enumerate(asked):
            there.door.submit(str(i), rng.choice("123"), prompt, max_tokens=50, **params[i])

        async def wander(name: str) -> None:
            while name in there.door.asked and not there.door.asked[name].ended:
                at = there.door.asked[name].journal.worker
                to = rng.choice([worker for worker in "123" if worker != at])
                moving = asyncio.ensure_future(there.move(name, to, rng.choice([Kind.KV, Kind.TOKENS, None])))
                if name in cancelled and rng.random() < 0.5:
                    for _ in range(rng.randint(1, 300)):
                        await asyncio.sleep(0)
                    there.door.cancel(name)
                try:
                    await moving
                except StateRefused:
                    await asyncio.sleep(0)

        cancelled = {"1", "4", "7", "8"}
        await asyncio.gather(*(wander(str(i)) for i in range(len(asked))))
        answers = await there.door.answers()
        await there.all_free()
        assert sum(registry.moves._arriving.n_reserved for registry in there.registries.values()) == 0  # type: ignore[union-attr]
    for name, tokens in answers.items():
        assert tokens == expected[name], name
    assert set(answers) >= {str(i) for i in range(len(asked))} - cancelled


async def test_what_is_moved_goes_on_in_its_grammar_and_with_its_adapter(model: TinyModel, tmp_path: Any):
    date = Grammar("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")
    written = make_adapter(tmp_path, model, ("q_proj", "v_proj", "down_proj"), rank=8)
    n_users = {"1": 0, "2": 0}

    class Adapters:
        def __init__(self, worker: str, use: AdapterUse) -> None:
            self.worker, self.use = worker, use

        async def acquire(self, _name: str, _source: str) -> AdapterUse:
            n_users[self.worker] += 1
            return self.use

        def release(self, _use: AdapterUse) -> None:
            n_users[self.worker] -= 1

    texts = []
    for n_moves in (0, 1):
        async with workers(model) as there:
            for worker in "12":
                engine = there.engine(worker)
                adapter = await asyncio.wrap_future(engine.call(lambda e: e.read_adapter("x", tmp_path, written.tensors)))
                await asyncio.wrap_future(engine.call(lambda e, adapter=adapter: e.add_adapter(adapter)))
                uses: Any = AdapterUse(adapter.salt, None)  # type: ignore[arg-type]
                there.instance(worker)._adapters = Adapters(worker, uses)  # type: ignore[assignment]
            there.door.submit("plain", "1", [5, 6, 7], max_tokens=40, grammar=date)
            asked = there.door.submit("a", "1", [5, 6, 7], max_tokens=40, grammar=date, adapter=("x", "somewhere"))
            await until_token(there, "a", 3)
            assert n_users == {"1": 1, "2": 0}
            for _ in range(n_moves):
                assert (await there.move("a", "2")).outcome == "moved"
                assert n_users == {"1": 0, "2": 1}
            answers = await there.door.answers()
            await there.all_free()
            assert asked.reason == "stop"
            texts.append([byte_tokenizer().decode(answers[name]) for name in ("a", "plain")])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert n_users == {"1": 0, "2": 0}


async def test_a_request_that_has_not_begun_moves_too(model: TinyModel):
    [prompt, other] = prompts(2, 60, 90, seed=1)
    async with workers(model, engines={"1": {"max_running": 1}}) as there:
        there.door.submit("first", "1", other, max_tokens=40)
        there.door.submit("waits", "1", prompt, max_tokens=20)
        record = await there.move("waits", "2", None)
        assert record.outcome == "moved"
        assert (await there.door.answers())["waits"] == alone(model, prompt, 20)
        await there.all_free()


async def test_a_request_whose_prompt_is_scored_moves_after_its_first_token(model: TinyModel):
    [prompt] = prompts(1, 80, 80)
    async with workers(model, engines={"1": {"max_batch_tokens": 16}}) as there:
        asked = there.door.submit("a", "1", prompt, max_tokens=30, logprobs=0, prompt_logprobs=1)
        record = await there.move("a", "2")
        assert record.outcome == "moved" and len(asked.tokens) >= 1
        assert (await there.door.answers())["a"] == alone(model, prompt, 30)


# --- how it goes -----------------------------------------------------------------------------------------------------


async def test_most_of_the_kv_goes_while_the_request_is_answered_and_the_record_says_so(model: TinyModel):
    [prompt] = prompts(1, 300, 300)
    async with workers(model, engines={"1": {"max_batch_tokens": 512}}) as there:
        there.door.submit("a", "1", prompt, max_tokens=100)
        await until_token(there, "a", 3)
        record = await there.move("a", "2")
        block = there.engine("1").stats()["bytes_per_block"]
        assert record.outcome == "moved" and sum(record.steps) == record.nbytes
        assert record.nbytes >= 300 // 16 * block and record.steps[-1] < record.nbytes / 2
        assert record.stop_ms is not None and record.stop_ms < 1e3 * record.seconds
        assert len(prompt) + 3 <= record.n_tokens <= len(prompt) + 100
        await there.door.answers()
        [move] = there.door.asked["a"].journal.moves
        assert (move["source"], move["destination"], move["cause"]) == ("1", "2", "a test")


async def test_the_rounds_of_a_handoff_get_shorter(model: TinyModel):
    [prompt] = prompts(1, 300, 300)
    async with workers(model, engines={"1": {"max_batch_tokens": 512}, "2": {"max_batch_tokens": 64}}) as there:
        there.door.submit("a", "1", prompt, max_tokens=190)
        await until_token(there, "a", 1)
        record = await there.move("a", "2", Kind.TOKENS)
        assert record.outcome == "moved" and record.steps[0] >= 300
        assert len(record.steps) >= 2 and record.steps[1] < record.steps[0] / 4
        assert (await there.door.answers())["a"] == alone(model, prompt, 190)


async def test_an_instance_is_emptied_and_waits_for_nobody(model: TinyModel):
    asked = prompts(12, 5, 60, seed=6)
    async with workers(model) as there:
        for i, prompt in enumerate(asked):
            there.door.submit(str(i), "1", prompt, max_tokens=40)
        await until_token(there, "3", 2)
        done = await there.registries["1"].moves.evacuate("m/1", there.order("", "1", "2", None))
        assert done["left"] == 0 and there.instance("1").request_ids == ()
        assert {record["outcome"] for record in done["moves"].values()} <= {"moved", "ended"}
        await there.instance("1").until_idle()
        answers = await there.door.answers()
        await there.all_free()
    assert answers == undisturbed(model, {str(i): prompt for i, prompt in enumerate(asked)}, 40)


async def test_what_leaves_a_worker_together_keeps_to_its_bandwidth():
    pace, never = leaving.Pace(1e6), threading.Event()
    waited: list[float] = []
    never.wait = lambda timeout=None: waited.append(timeout) or False  # type: ignore[assignment,func-returns-value]
    for _ in range(3):
        pace.wait(CHUNK_NBYTES, never)
    assert waited[0] == 0 and waited[1] == pytest.approx(2.1, abs=0.1) and waited[2] == pytest.approx(4.2, abs=0.1)
    # So that a piece is not waited for longer than the other side waits for one.
    assert (pace.piece_nbytes, leaving.Pace(0).piece_nbytes) == (125_000, CHUNK_NBYTES)


async def test_where_little_bandwidth_is_allowed_tokens_go_rather_than_kv(model: TinyModel):
    [prompt] = prompts(1, 100, 100)
    async with workers(model) as there:
        kinds = []
        for name, bytes_per_s in (("a", 0.0), ("b", 1e3)):
            there.registries["1"].moves._pace = leaving.Pace(bytes_per_s)
            there.door.submit(name, "1", prompt, max_tokens=60)
            await until_token(there, name, 2)
            kinds.append((await there.move(name, "2", None)).kind)
        assert kinds == ["kv", "tokens"]
        assert (await there.door.answers())["b"] == alone(model, prompt, 60)


# --- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_request_for_which_there_is_no_room_stays_and_may_go_later(model: TinyModel):
    [prompt, other] = prompts(2, 100, 100)
    async with workers(model, engines={"2": {"n_blocks": 12}}) as there:
        there.door.submit("big", "2", other, max_tokens=60)
        there.door.submit("a", "1", prompt, max_tokens=80)
        await until_token(there, "big", 1)
        record = await there.move("a", "2")
        assert record.outcome == "stayed" and "room" in (record.reason or "")
        there.door.cancel("big")
        await until_token(there, "a", 10)
        assert (await there.move("a", "2")).outcome == "moved"
        assert (await there.door.answers())["a"] == alone(model, prompt, 80)
        outcomes = [move["outcome"] for move in there.door.asked["a"].journal.moves]
        assert outcomes == ["stayed", "moved"] and there.door.asked["a"].journal.path == ["1", "2"]
        await there.all_free()


async def test_a_request_stays_where_nobody_answers(model: TinyModel):
    [prompt] = prompts(1, 40, 40)
    async with workers(model) as there:
        there.door.submit("a", "1", prompt, max_tokens=40)
        order = there.order("a", "1", "2")
        await there.registries["2"].moves.close()
        record = await there.registries["1"].moves.move("m/1", order)
        assert record.outcome == "stayed" and "does not answer" in (record.reason or "")
        assert (await there.door.answers())["a"] == alone(model, prompt, 40)
        await there.all_free()


async def test_a_front_door_that_does_not_come_to_the_destination_keeps_its_request(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leaving, "DOOR_S", 0.05)
    [prompt] = prompts(1, 40, 40)
    async with workers(model) as there:
        there.door.connect_at_once = False
        there.door.submit("a", "1", prompt, max_tokens=60)
        record = await there.move("a", "2")
        assert record.outcome == "stayed" and "front door" in (record.reason or "")
        assert (await there.door.answers())["a"] == alone(model, prompt, 60)
        await there.all_free()


@pytest.mark.parametrize("lost", ["commit", "answer"])
async def test_a_commit_whose_word_or_answer_is_lost_is_asked_after_and_the_request_runs_once(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, lost: str
):
    real_send, real_receive = move_wire.send, move_wire.receive
    asked_for: list[str] = []
    broken = threading.Event()

    def send(wire: Any, message: Any, payload: bytes = b"") -> None:
        if "op" in message:
            asked_for.append(message["op"])
            if message["op"] == "commit" and lost == "commit":
                broken.set()
                raise ConnectionResetError("cut by the test")
        real_send(wire, message, payload)

    def receive(wire: Any) -> Any:
        message, payload = real_receive(wire)
        if message.get("answer") == "committed" and not broken.is_set():
            broken.set()
            raise ConnectionResetError("cut by the test")
        return message, payload

    monkeypatch.setattr(move_wire, "send", send)
    monkeypatch.setattr(move_wire, "receive", receive)
    [prompt] = prompts(1, 40, 40)
    async with workers(model) as there:
        asked = there.door.submit("a", "1", prompt, max_tokens=40)
        await until_token(there, "a", 3)
        record = await there.move("a", "2")
        assert broken.is_set() and asked_for.count("query") >= 1
        assert record.outcome == ("moved" if lost == "answer" else "stayed")
        assert (await there.door.answers())["a"] == alone(model, prompt, 40)
        assert asked.n_stopped == 0
        await there.all_free()


async def test_a_request_in_doubt_is_continued_from_what_its_front_door_has_and_both_copies_are_fenced(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    """The destination has taken the request, and hangs: it says nothing of it. That the scheduler has lost it proves nothing."""
    real_send, real_arrived = move_wire.send, Instance.arrived
    hung, late = threading.Event(), []

    def send(wire: Any, message: Any, payload: bytes = b"") -> None:
        real_send(wire, message, payload)
        if message.get("op") in ("commit", "query", "abort"):
            raise TimeoutError("nothing came")

    def arrived(instance: Instance, told: Any) -> None:
        late.append(lambda: real_arrived(instance, told))
        hung.set()

    monkeypatch.setattr(move_wire, "send", send)
    monkeypatch.setattr(Instance, "arrived", arrived)
    [prompt] = prompts(1, 40, 40)
    async with workers(model) as there:
        asked = there.door.submit("a", "1", prompt, max_tokens=40)
        await until_token(there, "a", 3)
        moving = asyncio.ensure_future(there.move("a", "2"))
        assert await asyncio.to_thread(hung.wait, 20)
        await there.door.until(lambda: asked.doubted)
        there.registries["1"].moves.worker_gone("2")
        n_tokens, epoch = len(asked.tokens), asked.journal.epoch
        asked.journal.begin_anew()
        asked.journal.worker, asked.journal.instance = "2", "m/2"
        there.door._cancel("1", "a", "m/1", epoch)
        there.registries["2"]._receive("door", asked.journal.submission("a"))
        assert (await moving).outcome == "ended"
        late[0]()
        assert 0 < n_tokens < 40 and (await there.door.answers())["a"] == alone(model, prompt, 40)
        await there.all_free()


async def test_an_engine_that_dies_while_its_request_is_in_doubt_says_nothing_of_it(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    real_receive = move_wire.receive
    committed, may_go_on = threading.Event(), threading.Event()

    def receive(wire: Any) -> Any:
        message, payload = real_receive(wire)
        if message.get("answer") == "committed":
            committed.set()
            may_go_on.wait(20)
        return message, payload

    monkeypatch.setattr(move_wire, "receive", receive)
    [prompt] = prompts(1, 40, 40)
    async with workers(model) as there:
        there.door.submit("a", "1", prompt, max_tokens=40)
        await until_token(there, "a", 3)
        moving = asyncio.ensure_future(there.move("a", "2"))
        assert await asyncio.to_thread(committed.wait, 20)
        instance = there.instance("1")
        instance._adapters = None
        await asyncio.to_thread(there.engine("1").close)
        may_go_on.set()
        assert (await moving).outcome == "moved"
        assert (await there.door.answers())["a"] == alone(model, prompt, 40)
        assert instance.request_ids == ()


async def test_a_reservation_of_which_nothing_is_heard_is_given_up(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    async with workers(model) as there:
        for registry in there.registries.values():
            registry.moves._arriving.reservation_s = 0.05
        there.door.submit("a", "1", prompt, max_tokens=40)
        manifest = await reserve(there, "a")
        assert manifest["answer"] == "reserved"
        await there.all_free()
        assert (await say(there, {"op": "query", "request": "a", "epoch": 1, "to": None}))["answer"] == "aborted"
        assert (await there.door.answers())["a"] == alone(model, prompt, 40)


async def test_what_comes_late_or_twice_or_for_another_process_is_answered_by_what_is_known(model: TinyModel):
    [prompt] = prompts(1, 60, 60)
    async with workers(model) as there:
        there.door.submit("a", "1", prompt, max_tokens=40)
        query = {"op": "query", "request": "a", "epoch": 1, "to": None}
        assert (await say(there, query))["answer"] == "unknown"
        reserved = await reserve(there, "a")
        assert (reserved["answer"], reserved["door"]) == ("reserved", False)
        assert await reserve(there, "a") == reserved
        assert (await say(there, {**query, "to": "another"}))["answer"] == "unknown"
        assert (await say(there, {**query, "epoch": 0}))["answer"] == "aborted"
        abort = {**query, "op": "abort", "cause": "a test"}
        for _ in range(2):
            answer = await say(there, abort)
            assert (answer["answer"], answer["reason"]) == ("aborted", "a test")
        assert (await reserve(there, "a"))["answer"] == "aborted"
        assert (await say(there, {"op": "destroy"}))["answer"] == "unknown"
        await there.door.answers()
        await there.all_free()


async def test_who_does_not_know_the_token_moves_nothing(model: TinyModel):
    async with workers(model) as there:
        address = there.registries["2"].moves.server_address
        assert address is not None
        other = "another token of 20 b"
        with pytest.raises(Refused):
            await asyncio.to_thread(dial, address, other.encode(), None, connect_s=5, idle_s=5)
        for worker, registry in there.registries.items():
            await registry.moves.serve("127.0.0.1", worker, other)
        assert there.registries["2"].moves.server_address == address
        there.door.submit("a", "1", [1, 2, 3], max_tokens=60)
        await until_token(there, "a", 3)
        assert (await there.move("a", "2")).outcome == "moved"


async def test_a_request_moves_over_tls_where_the_cluster_has_it(model: TinyModel, tmp_path: Any):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    making = [*command, *subject, "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, making, check=True, capture_output=True)
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(certificate))
    theirs.load_cert_chain(certificate, key)
    async with workers(model, tls=(theirs, ours)) as there:
        there.door.submit("a", "1", [1, 2, 3], max_tokens=60)
        await until_token(there, "a", 3)
        assert (await there.move("a", "2")).outcome == "moved"
        assert (await there.door.answers())["a"] == alone(model, [1, 2, 3], 60)
        address = there.registries["2"].moves.server_address
        assert address is not None
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(dial, address, TOKEN.encode(), None, connect_s=0.2, idle_s=5)


async def test_what_cannot_leave_is_told_why(model: TinyModel):
    async with workers(model) as there:
        moves = there.registries["1"].moves
        with pytest.raises(InstanceGone):
            await moves.move("m/9", there.order("a", "1", "2"))
        with pytest.raises(StateRefused, match="not here"):
            await moves.move("m/1", there.order("a", "1", "2"))
        there.door.submit("a", "1", [1, 2, 3], max_tokens=200)
        moving = asyncio.ensure_future(there.move("a", "2"))
        await asyncio.sleep(0)
        with pytest.raises(StateRefused, match="moving already"):
            await there.move("a", "2")
        assert (await moving).outcome in ("moved", "ended")


async def say(there: Workers, message: dict[str, Any]) -> dict[str, Any]:
    """Say something to worker 2 as another worker would."""
    address = there.registries["2"].moves.server_address
    assert address is not None

    def ask() -> dict[str, Any]:
        wire = dial(address, TOKEN.encode(), None, connect_s=5, idle_s=20)
        try:
            move_wire.send(wire, message)
            return move_wire.receive(wire)[0]
        finally:
            wire.sock.close()

    return await asyncio.to_thread(ask)


async def reserve(there: Workers, name: str) -> dict[str, Any]:
    """Reserve room at worker 2 for a request of worker 1, as the first word of a move."""
    await asyncio.to_thread(there.instance("1").moving_engine)
    engine = there.engine("1")
    manifest = await asyncio.wrap_future(engine.call(lambda e: e.export_open(name, 1)))
    fields = {"instance": "m/2", "manifest": manifest, "front_door": "door", "adapter": None}
    facts = {"grammar": None, "n_tokens": 80, "longest": 100}
    return await say(there, {"op": "reserve", "request": name, "epoch": 1, "to": None, **fields, **facts})
