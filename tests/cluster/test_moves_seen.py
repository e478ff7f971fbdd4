"""What the scheduler makes of moves of requests, as workers and front doors tell of them, in whatever order they do."""

from __future__ import annotations

import asyncio
import json
from itertools import permutations
from typing import Any

import pytest

from sllmdask.cluster.decision_log import DecisionLog
from sllmdask.cluster.explaining import explain_model, explain_request
from sllmdask.cluster.move_tallies import cause_class
from sllmdask.cluster.moves_seen import MovesSeen
from sllmdask.cluster.records import merged_moves
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Load
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView

GiB = 1024**3
A = ModelView("a", nbytes=1 * GiB, max_instances=2, alpha=0.01, beta=0.1)
ONE, TWO = (
    WorkerView(f"tcp://{number}", name, slots=1, host_capacity=8 * GiB, residency={"a": Tier.HOST})
    for number, name in (("one", "0"), ("two", "1"))
)
#: As a front door tells of a request that ended.
ENDED = {"state": "finished", "n_tokens": 40, "path": ["0", "1"], "error": None, "first_token_s": 0.1}


class Head:
    """The scheduler's part: a controller, the log of what it does, and what is seen of moves; its clock is set by hand."""

    def __init__(self) -> None:
        self.controller = Controller(ControllerSettings())
        self.log = DecisionLog()
        self.seen = MovesSeen(self.controller, self.log, self.on)
        self.at = 0.0
        for event in (ev.WorkerJoined(0.0, ONE), ev.WorkerJoined(0.0, TWO), ev.ModelDeployed(0.0, A)):
            self.on(event)

    def on(self, event: ev.Event) -> list[Any]:
        decisions = self.controller.handle(event)
        self.log.saw(event, decisions)
        return decisions

    def two_instances(self) -> tuple[str, str]:
        """Of the model, one on each worker, and a request ``mine`` on the first."""
        self.log.told("door:1", {"id": "mine", "n_prompt_tokens": 10})
        first = self.load(RequestView("door:1", "a", "door", 1.0, 99.0, n_tokens=10))
        second = self.load(RequestView("wish", "a", "", 2.0, 99.0, load_only=True, node="1"))
        return first, second

    def load(self, request: RequestView) -> str:
        event = ev.LoadRequested if request.load_only else ev.RequestArrived
        (load,) = (each for each in self.on(event(request.arrived_at, request)) if isinstance(each, Load))
        self.on(ev.LoadFinished(request.arrived_at + 0.5, load.instance, Tier.HOST))
        return load.instance

    def samples(self, name: str) -> dict[tuple[str, ...], Any]:
        (family,) = (each for each in self.log.move_tallies.families() if each["name"] == name)
        return {tuple(labels): rest[0] if len(rest) == 1 else rest for labels, *rest in family["samples"]}

    def events(self) -> list[dict[str, Any]]:
        return [happening.as_row() for happening in self.log.feed.after(0) if happening.event in ("moved", "stayed", "resumed")]

    def counts(self) -> dict[str, int]:
        return {instance.id: instance.n_requests for instance in self.controller.instances.values()}


def move(epoch: int = 1, outcome: str = "moved", key: str = "door:1", there: tuple[str, str] = ("a/1", "a/2"), **record: Any):
    """What the worker of the first instance tells of a move."""
    known = {
        "epoch": epoch,
        "source": "0",
        "destination": "1",
        "cause": "an operator asked",
        "outcome": outcome,
        "reason": None if outcome == "moved" else "no room",
        "kind": "kv",
        "steps": [2**20, 2**15],
        "nbytes": 2**20 + 2**15,
        "n_tokens": 300,
        "seconds": 0.02,
        "stop_ms": 1.5,
        **record,
    }
    instance, successor = there
    about = {"request": key, "epoch": epoch, "model": "a", "instance": instance, "successor": successor}
    return {**about, "destination": "tcp://two", "kv_nbytes": 2**21, "n_at_once": 1.0, "record": known}


@pytest.mark.asyncio
@pytest.mark.parametrize("order", list(permutations(("report", "pause", "end"))))
async def test_a_move_is_counted_and_told_once_with_its_pause_whoever_speaks_first(order: tuple[str, ...]):
    head = Head()
    head.two_instances()
    told = {**move()["record"], "pause_ms": 4.5}

    def end() -> None:
        head.seen.no_more("door:1", [told])
        head.log.told("door:1", {**ENDED, "moves": [told]})
        head.on(ev.RequestEnded(9.0, "door:1", 40))

    steps = {
        "report": lambda: head.seen.ended("tcp://one", move()),
        "pause": lambda: head.seen.paused("door:1", 1, 4.5),
        "end": end,
    }
    for step in order:
        steps[step]()
    assert head.samples("sllmdask_migrations_total") == {("kv", "operator", "moved"): 1}
    assert head.samples("sllmdask_migration_bytes_total") == {("kv",): 2**20 + 2**15}
    buckets, total_s = head.samples("sllmdask_migration_downtime_seconds")[("kv",)]
    assert total_s == 0.0045 and (buckets[-1][1], dict(map(tuple, buckets))[0.005]) == (1, 1)
    (event,) = head.events()
    assert {name: event[name] for name in ("event", "request", "model", "node", "to", "kind", "reason", "pause_ms")} == {
        "event": "moved",
        "request": "mine",
        "model": "a",
        "node": "0",
        "to": "1",
        "kind": "kv",
        "reason": "operator",
        "pause_ms": 4.5,
    }
    assert "1.0 MiB + 32.0 KiB of KV in 2 stages" in event["text"] and "stopped for 1.5 ms" in event["text"]
    (record,) = head.log.find("mine")
    explained = explain_request(head.log, record, 10.0)
    assert explained["path"] == ["0", "1"]
    (only,) = explained["moves"]
    assert (only["pause_ms"], only["expected_s"] > 0, only["error_ratio"] > 0) == (4.5, True, True)
    assert only["text"] in event["text"]
    json.dumps([explained, event, explain_model(head.log, head.controller, "a", 10.0, 10.0)])


@pytest.mark.asyncio
async def test_a_move_whose_client_never_gets_another_token_is_told_when_the_no_more():
    head = Head()
    head.two_instances()
    head.seen.ended("tcp://one", move())
    assert head.events() == []
    head.seen.no_more("door:1", [{**move()["record"], "pause_ms": None}])
    (event,) = head.events()
    assert event["pause_ms"] is None and "waited" not in event["text"]
    assert head.samples("sllmdask_migration_downtime_seconds") == {}


@pytest.mark.asyncio
async def test_a_move_is_told_at_once_where_its_pause_is_known_and_moves_in_their_order():
    head = Head()
    first, second = head.two_instances()
    head.seen.paused("door:1", 1, 4.5)
    head.seen.ended("tcp://one", move(1))
    assert [event["pause_ms"] for event in head.events()] == [4.5]
    head.seen.ended("tcp://two", move(2, there=(second, first)))
    head.seen.ended("tcp://one", move(3))
    head.seen.paused("door:1", 3, 6.0)  # no token came between the two
    assert [(event["move"]["epoch"], event["pause_ms"]) for event in head.events()] == [(1, 4.5), (2, None), (3, 6.0)]


@pytest.mark.asyncio
async def test_the_path_of_a_request_is_known_while_it_runs():
    head = Head()
    first, second = head.two_instances()
    head.seen.ended("tcp://one", move(1))
    head.seen.paused("door:1", 1, 3.0)
    back = move(2, there=(second, first), source="1", destination="0", kind="tokens", steps=[310, 2], nbytes=4 * 312)
    head.seen.ended("tcp://two", {**back, "destination": "tcp://one"})
    head.seen.paused("door:1", 2, 9.0)
    (record,) = head.log.find("mine")
    assert (record.path, record.instance) == (["0", "1", "0"], first)
    assert "310 + 2 tokens computed again in 2 rounds" in head.events()[1]["text"]
    model = explain_model(head.log, head.controller, "a", 5.0, 5.0)
    assert [each["event"] for each in model["happened"]].count("moved") == 2


@pytest.mark.asyncio
async def test_the_controller_counts_a_request_where_it_is_after_a_move_and_where_it_was_after_none():
    head = Head()
    first, second = head.two_instances()
    assert head.counts() == {first: 1, second: 0}
    head.seen.ended("tcp://one", move(1, "stayed"))
    assert head.counts() == {first: 1, second: 0}
    head.seen.ended("tcp://one", move(3, "moved"))
    head.on(ev.RequestMoved(5.0, "door:1", second))  # the answer to the order says the same
    assert head.counts() == {first: 0, second: 1}
    assert [request.id for request in head.controller.queue.on_instance(second)] == ["door:1"]
    head.on(ev.RequestEnded(6.0, "door:1", 40))
    head.seen.ended("tcp://two", move(4, "ended", there=(second, first)))
    assert head.counts() == {first: 0, second: 0}
    assert head.samples("sllmdask_migrations_total") == {
        ("kv", "operator", "ended"): 1,
        ("kv", "operator", "moved"): 1,
        ("kv", "operator", "stayed"): 1,
    }
    assert [(each["event"], each["outcome"]) for each in head.events()][:1] == [("stayed", "stayed")]
    assert "no room" in head.events()[0]["text"]


@pytest.mark.asyncio
async def test_what_is_under_way_is_listed_until_it_is_over_or_its_worker_has_left():
    head = Head()
    head.two_instances()
    for epoch, key in ((1, "door:1"), (7, "door:unknown")):
        about = {"request": key, "epoch": epoch, "model": "a", "instance": "a/1", "successor": "a/2", "destination": "tcp://two"}
        head.seen.began("tcp://one", {**about, "to": "1", "cause": "drain of node 0"})
    rows = head.seen.rows()
    assert [(row["request"], row["source"], row["destination"]) for row in rows] == [
        ("mine", "0", "1"),
        ("door:unknown", "0", "1"),
    ]
    head.seen.ended("tcp://one", move())
    assert [row["request"] for row in head.seen.rows()] == ["door:unknown"]
    head.seen.worker_left("tcp://one")
    assert head.seen.rows() == []
    assert head.samples("sllmdask_migrations_total") == {
        ("kv", "operator", "moved"): 1,
        ("none", "drain", "ended"): 1,
    }
    assert "the worker of node 0 has left" in head.events()[0]["text"]
    head.seen.close()


@pytest.mark.asyncio
async def test_a_move_whose_model_is_being_loaded_where_it_goes_is_shown_until_that_comes_to_an_end():
    head = Head()
    first, _ = head.two_instances()
    source = head.controller.instances[first]
    with head.seen.awaiting("door:1", source, "1", "an operator asked"):
        (row,) = head.seen.rows()
        assert row.pop("seconds") >= 0
        assert row == {
            "request": "mine",
            "instance": first,
            "model": "a",
            "source": "0",
            "destination": "1",
            "cause": "an operator asked",
        }
    with pytest.raises(KeyError), head.seen.awaiting("door:1", source, "1", "an operator asked"):
        raise KeyError
    assert head.seen.rows() == []


@pytest.mark.asyncio
async def test_a_request_that_goes_on_after_a_death_is_counted_and_told_by_its_outcome():
    head = Head()
    head.two_instances()
    lost = {"node": "0", "reason": "worker", "n_tokens": 57, "to": "1", "pause_ms": 812.0, "outcome": "resumed"}
    head.log.told("door:1", {"n_output": 57})
    head.on(ev.RequestReturned(4.0, "door:1"))
    head.log.resumed("door:1", lost, 5.0)
    head.log.resumed("door:1", {**lost, "outcome": "failed", "to": None, "pause_ms": None}, 6.0)
    assert head.samples("sllmdask_resumes_total") == {("worker", "failed"): 1, ("worker", "resumed"): 1}
    _, total_s = head.samples("sllmdask_resume_downtime_seconds")[()]
    assert total_s == 0.812
    (event,) = head.events()
    assert "went on on node 1: its worker on node 0 was lost with 57 tokens of its answer" in event["text"]
    (record,) = head.log.find("mine")
    first, second = explain_request(head.log, record, 9.0)["resumes"]
    assert "812 ms" in first["text"] and "could not go on" in second["text"]
    # It has not waited for a place while it ran.
    (dispatched,) = (each for each in head.log.feed.after(0) if each.event == "dispatched" and each.at == 4.0)
    assert dispatched.facts["seconds"] == 0.0 and record.queue_s == 0.5


@pytest.mark.asyncio
async def test_the_last_word_on_a_move_comes_after_a_second_where_the_front_door_is_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sllmdask.cluster.moves_seen.PAUSE_S", 0.0)
    news = asyncio.Event()
    head = Head()
    head.log.feed._on_news = news.set
    head.two_instances()
    news.clear()
    head.seen.ended("tcp://one", move())
    await asyncio.wait_for(news.wait(), 10)
    (event,) = head.events()
    assert event["pause_ms"] is None


def test_moves_as_two_know_them_are_one_list_by_epoch():
    known = [{"epoch": 1, "expected_s": 0.5, "pause_ms": None}, {"epoch": 3, "expected_s": 0.7}]
    told = [{"epoch": 1, "pause_ms": 4.0}, {"epoch": 5, "pause_ms": None}]
    assert merged_moves(known, told) == [
        {"epoch": 1, "expected_s": 0.5, "pause_ms": 4.0},
        {"epoch": 3, "expected_s": 0.7},
        {"epoch": 5, "pause_ms": None},
    ]


def test_causes_are_a_few_words_in_labels():
    causes = {
        "an operator asked": "operator",
        "its node is drained": "drain",
        "makes room for drain": "placement",
        "migration failed": "placement",
        "scaled down": "scale-in",
        "max_instances": "scale-in",
        "replaced": "replaced",
        "deleted": "deleted",
        "who knows": "other",
    }
    assert {cause: cause_class(cause) for cause in causes} == causes
