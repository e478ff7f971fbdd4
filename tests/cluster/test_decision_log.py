"""What is kept of the controller's events and decisions, next to what the controller itself holds and to sums made by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

import pytest

from sllmdask.cluster import observing
from sllmdask.cluster.decision_log import N_DELETED, DecisionLog
from sllmdask.cluster.explaining import explain_model, explain_request
from sllmdask.cluster.happenings import Feed
from sllmdask.cluster.observing import Observer
from sllmdask.errors import LoadFailed, RecordNotFound
from sllmdask.policy import events as ev
from sllmdask.policy.choice import Choice, Option, Way
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Chose, Decision, Dispatch, Load, Migrate, Preempt, Refuse, Unload, WakeAt
from sllmdask.policy.views import InstanceState, ModelView, RequestView, Tier, WorkerView

GiB = 1024**3
A = ModelView("a", nbytes=1 * GiB)
B = ModelView("b", nbytes=1 * GiB)
ONE = WorkerView("tcp://one", "0", slots=1, host_capacity=8 * GiB, residency={"a": Tier.DISK, "b": Tier.DISK})
TWO = WorkerView("tcp://two", "1", slots=1, host_capacity=8 * GiB, residency={"b": Tier.HOST})

FROM_DISK = Option(Way.FREE, "tcp://one", "0", 2.0, tier=Tier.DISK, parts={"overhead": 0.5, "read": 1.5})
FROM_AFAR = Option(Way.FREE, "tcp://two", "1", 9.0, tier=Tier.REMOTE, parts={"read": 9.0}, lost="slower by 7.0 s")


def asked(key: str, model: str, at: float, door: str = "door") -> ev.RequestArrived:
    return ev.RequestArrived(at, RequestView(key, model, door, at, at + 100.0))


def choice(key: str, model: str, at: float, chosen: Option | None, reason: str, *others: Option, **more: Any) -> Chose:
    return Chose(Choice(at, key, model, chosen, reason, (() if chosen is None else (chosen,)) + others, **more))


def log_of(*steps: tuple[ev.Event, Iterable[Decision]]) -> DecisionLog:
    """A log, whose clock is the epoch's, after two nodes and two models and `steps`."""
    log = DecisionLog()
    for event in (ev.WorkerJoined(0.0, ONE), ev.WorkerJoined(0.0, TWO), ev.ModelDeployed(0.0, A), ev.ModelDeployed(0.0, B)):
        log.saw(event, [])
    for event, decisions in steps:
        log.saw(event, decisions)
    return log


def cold_start() -> DecisionLog:
    """A request that waited three seconds for a load that was to take two, and ran for one."""
    log = log_of()
    log.told("door:1", {"id": "mine", "n_prompt_tokens": 7})
    made = choice("door:1", "a", 10.0, FROM_DISK, "a free slot, and its files are on the disk", FROM_AFAR, n_more=3)
    log.saw(asked("door:1", "a", 10.0), [made, Load("a/1", "a", "tcp://one", 2.0), WakeAt(20.0)])
    log.saw(ev.LoadFinished(13.0, "a/1", Tier.DISK), [Dispatch("door:1", "door", "a/1", "tcp://one", "0", 3.0, Tier.DISK)])
    log.read("a/1", {"construct_s": 0.5, "ready_s": 2.5, "read_s": 2.9})
    moves = [{"epoch": 1, "source": "0", "destination": "1", "outcome": "stayed", "reason": "no room", "cause": "a test"}]
    log.told("door:1", {"state": "finished", "n_tokens": 20, "first_token_s": 3.2, "error": None, "moves": moves})
    log.saw(ev.RequestEnded(14.0, "door:1"), [])
    return log


def samples(log: DecisionLog, name: str, holding: Any = None) -> dict[tuple[str, ...], Any]:
    (family,) = (each for each in log.tallies.families(holding or {}) if each["name"] == name)
    return {tuple(labels): rest[0] if len(rest) == 1 else rest for labels, *rest in family["samples"]}


# --- one request -----------------------------------------------------------------------------------------------------


def test_a_cold_request_is_explained_by_its_options_and_by_what_really_happened():
    log = cold_start()
    (record,) = log.find("mine")
    told = explain_request(log, record, now=99.0)
    assert (told["state"], told["node"], told["path"], told["seconds"]) == ("finished", "0", ["0"], 4.0)
    assert (told["queue_s"], told["cold_start"], told["first_token_s"]) == (3.0, "disk", 3.2)
    assert (told["n_prompt_tokens"], told["n_tokens"]) == (7, 20)
    (move,) = told["moves"]
    assert move["text"] == "did not move from node 0 to node 1: no room (a test)"
    (made,) = told["choices"]
    assert (made["after_s"], made["n_more"], made["request"]) == (0.0, 3, "mine")
    taken, lost = made["options"]
    assert taken["chosen"] and (taken["way"], taken["node"], taken["tier"], taken["predicted_s"]) == ("free", "0", "disk", 2.0)
    assert sum(taken["parts"].values()) == taken["predicted_s"]
    assert not lost["chosen"] and (lost["node"], lost["lost"]) == ("1", "slower by 7.0 s")
    load = told["load"]
    assert (load["outcome"], load["tier"], load["predicted_s"], load["ready_s"], load["took_s"]) == (
        "loaded",
        "disk",
        2.0,
        3.0,
        3.0,
    )
    assert load["error_ratio"] == pytest.approx(1 / 3)
    assert [each["event"] for each in told["happened"]] == ["placed", "loaded", "dispatched", "ended"]
    assert [each["after_s"] for each in told["happened"]] == [0.0, 3.0, 3.0, 4.0]
    json.dumps(told)


def test_a_load_has_taken_as_long_as_its_last_byte():
    log = log_of((asked("r", "a", 1.0), [Load("a/1", "a", "tcp://one", 4.0)]), (ev.LoadFinished(1.5, "a/1", Tier.DISK), []))
    load = log.loads["a/1"]
    assert (load.ready_s, load.took_s, load.error_ratio) == (0.5, None, None)
    log.read("a/1", {"ready_s": 0.4, "read_s": 5.0})
    assert (load.took_s, load.error_ratio) == (5.0, pytest.approx(0.2))
    log.read("a/1", {"ready_s": 0.4, "read_s": 9.0})
    assert load.took_s == 5.0 and samples(log, "sllmdask_cold_starts_total") == {("a", "disk", "loaded"): 1}


def test_who_finds_a_load_under_way_is_told_whose_choice_it_was():
    log = log_of()
    log.told("door:1", {"id": "first"})
    log.saw(asked("door:1", "a", 1.0), [choice("door:1", "a", 1.0, FROM_DISK, "free"), Load("a/1", "a", "tcp://one", 2.0)])
    log.saw(asked("door:2", "a", 1.5), [])
    (waiting,) = log.find("door:2")
    assert "a/1, which is being loaded on node 0" in explain_request(log, waiting, 2.0)["reason"]
    dispatches = [Dispatch(f"door:{n}", "door", "a/1", "tcp://one", "0", 2.0, Tier.DISK) for n in (1, 2)]
    log.saw(ev.LoadFinished(3.0, "a/1", Tier.DISK), dispatches)
    told = explain_request(log, waiting, 4.0)
    assert told["reason"] == "its instance was loaded for request first" and told["choices"][0]["chosen"]["node"] == "0"
    log.saw(asked("door:3", "a", 5.0), [Dispatch("door:3", "door", "a/1", "tcp://one", "0", 0.0)])
    told = explain_request(log, log.requests["door:3"], 5.0)
    assert told["cold_start"] == "hit" and "had room" in told["reason"] and told["load"] is None


def test_a_choice_that_is_made_again_and_again_is_kept_once_with_its_number():
    log = log_of((asked("r", "b", 1.0), []))
    for at in range(1, 50):
        log.saw(
            ev.TimerFired(float(at)), [choice("r", "b", float(at), None, "every slot is taken", unfit={"tcp://two": "small"})]
        )
    log.saw(ev.TimerFired(50.0), [choice("r", "b", 50.0, FROM_AFAR, "node 1 is free"), Load("b/1", "b", "tcp://two", 9.0)])
    told = explain_request(log, log.requests["r"], 60.0)
    assert [(made["n_times"], made["after_s"]) for made in told["choices"]] == [(49, 0.0), (1, 49.0)]
    assert told["choices"][0]["unfit"] == [{"node": "1", "reason": "small"}] and told["choices"][0]["chosen"] is None
    assert [happening.event for happening in log.feed.after(0, "b")].count("waiting") == 1


def test_a_refusal_and_a_client_that_leaves_are_told_apart():
    log = log_of((asked("late", "a", 1.0), []), (asked("gone", "a", 1.0), []), (asked("orphan", "a", 1.0, "other"), []))
    log.saw(ev.TimerFired(9.0), [Refuse("late", "door", LoadFailed("a", "the file is truncated"))])
    log.told("late", {"state": "refused", "n_tokens": 0})
    log.saw(ev.RequestEnded(9.1, "late"), [])
    log.saw(ev.RequestEnded(9.5, "gone"), [])
    log.saw(ev.FrontDoorLeft(9.6, "other"), [])
    states = {key: (log.requests[key].state, log.requests[key].ended_at) for key in ("late", "gone", "orphan")}
    assert states == {"late": ("refused", 9.0), "gone": ("cancelled", 9.5), "orphan": ("cancelled", 9.6)}
    assert "truncated" in explain_request(log, log.requests["late"], 10.0)["cause"]
    assert samples(log, "sllmdask_admission_rejected_total") == {("load_failed",): 1}
    assert log._told == {}


def test_a_request_that_moves_has_the_nodes_that_it_ran_on():
    log = cold_start()
    log.saw(asked("door:2", "a", 20.0), [Dispatch("door:2", "door", "a/1", "tcp://one", "0", 0.0)])
    log.saw(ev.TimerFired(21.0), [Migrate("a/1", "a/2", "a", "tcp://one", "tcp://two", 1.5, "node 0 is needed for b")])
    log.saw(ev.InstanceMigrated(23.0, "a/1", "a/2", Tier.HOST), [])
    record = log.requests["door:2"]
    assert (record.path, record.instance, set(log.loads)) == (["0", "1"], "a/2", {"a/2"})
    log.saw(ev.RequestReturned(24.0, "door:2"), [Dispatch("door:2", "door", "a/2", "tcp://two", "1", 4.0)])
    log.saw(ev.TimerFired(25.0), [Preempt("a/2", "tcp://two", ("door:2",), "a higher class waits")])
    texts = [happening.text for happening in log.feed.after(0, "a")]
    assert "a/1 is moved from node 0 to node 1, predicted to take 1.5 s: node 0 is needed for b" in texts
    assert "a/1 has moved from node 0 to node 1 after 2.0 s (1.5 s predicted), where it is a/2" in texts
    assert "1 request of a/2 on node 1 give way: a higher class waits" in texts
    # A move is no cold start, and tells nothing of how good the estimates of loads are.
    assert samples(log, "sllmdask_cold_starts_total") == {("a", "disk", "loaded"): 1}


# --- models ----------------------------------------------------------------------------------------------------------


def controller_and_log(*models: ModelView) -> tuple[Controller, DecisionLog]:
    controller, log = Controller(ControllerSettings()), DecisionLog()
    for event in (ev.WorkerJoined(0.0, ONE), *(ev.ModelDeployed(0.0, model) for model in models)):
        log.saw(event, controller.handle(event))
    return controller, log


def test_a_model_is_explained_before_its_first_request_while_it_is_there_and_after_it_has_left():
    controller, log = controller_and_log(A)

    def step(event: ev.Event) -> None:
        log.saw(event, controller.handle(event))

    def told(at: float) -> dict[str, Any]:
        return explain_model(log, controller, "a", at, at)

    assert told(1.0)["reason"] == "nobody has asked for it yet; node 0 has its files"
    assert told(1.0)["residency"] == [{"node": "0", "tier": "disk"}]
    step(asked("r", "a", 2.0))
    (instance,) = told(3.0)["instances"]
    assert (instance["node"], instance["state"], instance["since_s"]) == ("0", "loading", 1.0)
    assert instance["reason"] == "loaded for request r: loading where slots are free is the soonest"
    assert instance["choice"]["chosen"]["node"] == "0" and instance["load"]["outcome"] == "loading"
    assert told(3.0)["n_waiting"] == 1
    step(ev.LoadFinished(4.0, "a/1", Tier.DISK))
    step(ev.RequestEnded(5.0, "r"))
    step(ev.TimerFired(306.0))
    step(ev.UnloadFinished(307.0, "a/1"))
    assert told(317.0)["instances"] == []
    assert told(317.0)["reason"] == "it left node 0 10.0 s ago (keep-alive over), and nobody has asked for it since"
    assert [each["event"] for each in told(317.0)["happened"]] == ["deployed", "placed", "loaded", "unloading", "unloaded"]
    step(ev.ModelDeleted(320.0, "a"))
    assert told(321.0)["reason"] == "it is not deployed any more" and not told(321.0)["deployed"]


def test_a_model_whose_load_failed_says_where_why_and_when_it_is_tried_again():
    controller, log = controller_and_log(A)
    for event in (asked("r", "a", 2.0), ev.LoadFailed(3.0, "a/1", "model.safetensors is truncated")):
        log.saw(event, controller.handle(event))
    told = explain_model(log, controller, "a", 3.25, 3.25)
    (failure,) = told["failures"]
    assert (failure["node"], failure["n_times"], failure["retry_in_s"]) == ("0", 1, 0.75)
    assert told["reason"] == "its last load failed, on node 0 250 ms ago: model.safetensors is truncated"
    assert told["last_failure"]["outcome"] == "failed"
    assert samples(log, "sllmdask_cold_starts_total") == {("a", "disk", "failed"): 1}
    assert [happening.event for happening in log.feed.after(0)][-2:] == ["failed", "refused"]


# --- the feed --------------------------------------------------------------------------------------------------------


def test_requests_do_not_push_out_what_happened_to_models():
    feed = Feed(n_of_cluster=3, n_of_requests=5)
    feed.add(0.0, "deployed", {"model": "a", "nbytes": 1})
    for n in range(100):
        feed.add(1.0, "returned", {"request": f"r{n}", "model": "a"})
    kept = feed.after(0)
    assert [happening.id for happening in kept] == [1, 97, 98, 99, 100, 101]
    assert feed.dropped_to == 96 and feed.after(101) == [] and feed.after(0, "b") == []
    assert [happening.id for happening in feed.after(99)] == [100, 101]


def test_every_event_has_its_words():
    log = cold_start()
    instead = Option(Way.EVICT, "tcp://one", "0", 1.0, tier=Tier.DISK, leaving=(("a/1", ""),))
    made = choice("r2", "b", 20.0, instead, "what is idle gives way")
    log.saw(asked("r2", "b", 20.0), [made, Unload("a/1", "a", "tcp://one", "evicted")])
    log.saw(ev.UnloadFinished(20.5, "a/1"), [Load("b/2", "b", "tcp://one", float("inf"))])
    log.saw(ev.LoadFailed(21.0, "b/2", "no such file"), [])
    log.saw(ev.WorkerLeft(22.0, "tcp://two"), [])
    assert [happening.text for happening in log.feed.after(0)] == [
        "node 0 joined: 1 slot, 8.0 GiB of host memory",
        "node 1 joined: 1 slot, 8.0 GiB of host memory",
        "a is deployed, 1.0 GiB",
        "b is deployed, 1.0 GiB",
        "a/1 is loaded from disk on node 0, predicted to take 2.0 s",
        "a/1 takes requests on node 0 after 3.0 s (2.0 s predicted), loaded from disk",
        "request mine for a goes to a/1 on node 0 after 3.0 s, loaded from disk meanwhile",
        "request mine for a finished after 4.0 s, 20 tokens",
        "a/1 gives up its place on node 0 to b",
        "a/1 has left node 0: evicted for b",
        "b/2 is loaded from disk on node 0",
        "b/2 could not be loaded on node 0: no such file",
        "node 1 left",
    ]
    json.dumps([happening.as_row() for happening in log.feed.after(0)])


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_bounded_and_the_oldest_goes_first():
    log = DecisionLog(n_ended=10)
    for n in range(200):
        log.told(f"k{n}", {"id": f"r{n % 50}"})
        log.saw(asked(f"k{n}", "a", float(n)), [])
        log.saw(ev.RequestEnded(n + 0.5, f"k{n}"), [])
        log.saw(ev.ModelDeployed(float(n), ModelView(f"m{n}", nbytes=1)), [])
    assert (len(log.requests), log.n_kept, log.kept_since) == (10, 10, 190.5)
    assert [record.key for record in log.find("r49")] == ["k199"] and log.find("r0") == []
    for n in range(2 * N_DELETED):
        log.saw(ev.ModelDeployed(300.0, ModelView(f"m{n}", nbytes=1)), [])
        log.saw(ev.ModelDeleted(300.0, f"m{n}"), [])
    gone = [name for name, model in log.models.items() if not model.deployed]
    assert len(gone) <= N_DELETED and f"m{2 * N_DELETED - 1}" in gone
    # The same key again, after a scheduler was lost and found: it begins anew.
    log.saw(asked("k199", "a", 400.0), [])
    assert log.requests["k199"].state == "queued" and log.find("k199") and log.n_kept == 9


@pytest.mark.asyncio
async def test_what_nobody_knows_is_said_to_be_unknown_with_what_is_kept():
    observer = Observer(Controller(ControllerSettings()), {}, {})
    with pytest.raises(RecordNotFound, match="no model, and no request"):
        await observer.explain("req-1")
    observer.saw(asked("k", "a", 1.0), [])
    observer.saw(ev.RequestEnded(2.0, "k"), [])
    with pytest.raises(RecordNotFound, match="last 1 that have ended are kept"):
        await observer.cancel("req-1")
    assert await observer.cancel("k") == {"request": "k", "cancelled": False, "state": "cancelled"}


@pytest.mark.asyncio
async def test_who_follows_is_told_at_once_in_pages_and_what_was_missed():
    observer = Observer(Controller(ControllerSettings()), {}, {})
    first = await observer.events(0, None, None, 0.0)
    assert first["events"] == [] and first["complete"]
    observer.saw(ev.ModelDeployed(1.0, A), [])
    (row,) = (await observer.events(first["next"], "a", None, 60.0))["events"]
    assert (row["event"], row["model"], row["node"]) == ("deployed", "a", None)
    assert (await observer.events(row["id"], "b", None, 0.0))["events"] == []
    for n in range(1200):
        observer.saw(ev.ModelDeployed(1.0, ModelView(f"m{n}", nbytes=1)), [])
    since, seen = row["id"], []
    while rows := (page := await observer.events(since, None, None, 0.0))["events"]:
        seen += [each["id"] for each in rows]
        since = page["next"]
    assert seen == list(range(row["id"] + 1, row["id"] + 1201))
    assert [each["id"] for each in (await observer.events(0, None, 3, 0.0))["events"]] == seen[-3:]
    for _ in range(2000):
        observer.saw(ev.ModelDeployed(1.0, A), [])
    assert not (await observer.events(row["id"], None, None, 0.0))["complete"]


# --- against the controller ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_log_holds_what_the_controller_holds_and_counts_as_brute_force_does(seed: int):
    """Random arrivals, failures and losses on a cluster whose loads take random times."""
    rng = Random(seed)
    controller, log = Controller(ControllerSettings(worker_wait_s=3.0)), DecisionLog()
    order, heap = count(), list[tuple[float, int, ev.Event]]()
    held: dict[str, float] = defaultdict(float)
    tried: dict[str, int] = defaultdict(int)
    refused, wake_at, last_at, before = 0, None, 0.0, -1.0

    def push(event: ev.Event) -> None:
        heappush(heap, (event.at, next(order), event))

    workers = [
        WorkerView(f"tcp://{n}", str(n), slots=2, host_capacity=3 * GiB, residency=dict.fromkeys("abcd", Tier.DISK))
        for n in range(2)
    ]
    for worker in workers:
        push(ev.WorkerJoined(0.0, worker))
    for name in "abcd":
        push(ev.ModelDeployed(0.0, ModelView(name, nbytes=GiB, n_slots=1 + (name == "d"), keep_alive_s=2.0)))
    for n in range(150):
        at = rng.uniform(1.0, 60.0)
        push(ev.RequestArrived(at, RequestView(f"r{n}", rng.choice("abcd"), rng.choice(("x", "y")), at, at + rng.uniform(1, 20))))
    push(ev.WorkerLeft(30.0, "tcp://0"))
    push(ev.WorkerJoined(33.0, workers[0]))
    push(ev.FrontDoorLeft(40.0, "x"))
    push(ev.ModelDeleted(50.0, "c"))
    while heap:
        at, _, event = heappop(heap)
        if isinstance(event, ev.TimerFired) and event.at != wake_at:
            continue
        for instance in controller.instances.values():
            if instance.state is not InstanceState.PLANNED:
                held[instance.model] += (at - last_at) * instance.n_slots
        last_at = at
        decisions = controller.handle(event)
        log.saw(event, decisions)
        for decision in decisions:
            match decision:
                case Load(instance=name, model=model):
                    tried[model] += 1
                    done = at + rng.expovariate(2.0)
                    push(ev.LoadFailed(done, name, "bad luck") if rng.random() < 0.2 else ev.LoadFinished(done, name, Tier.DISK))
                case Unload(instance=name):
                    push(ev.UnloadFinished(at + 0.05, name))
                case Dispatch(request=request):
                    push(ev.RequestEnded(at + rng.expovariate(1.0), request))
                case Refuse():
                    refused += 1
                case WakeAt(at=wake_at) if wake_at is not None:
                    push(ev.TimerFired(wake_at))
        assert {record.key for record in log.live()} == controller.waiting.keys() | controller.running.keys()
        assert {r.key for r in log.live() if r.state == "running"} == controller.running.keys()
        there = {each.id for each in controller.instances.values() if each.state is not InstanceState.PLANNED}
        assert log.loads.keys() == there
        holding: dict[tuple[str, ...], float] = defaultdict(float)
        for load in log.loads.values():
            holding[(load.model,)] += (at - load.begun_at) * load.n_slots
        seconds = samples(log, "sllmdask_device_seconds_total", holding)
        assert seconds == pytest.approx({(model,): held[model] for model in tried})
        assert sum(seconds.values()) >= before - 1e-9
        before = sum(seconds.values())
    assert refused == sum(samples(log, "sllmdask_admission_rejected_total").values())
    outcomes = samples(log, "sllmdask_cold_starts_total")
    assert {model: sum(n for (name, *_), n in outcomes.items() if name == model) for model in tried} == tried
    assert len(log.requests) == 150 and all(record.state != "queued" for record in log.requests.values())


class Door:
    """A connection to a front door, whose answer, if it has one, comes at once."""

    def __init__(self, name: str, rows: list[dict[str, Any]] | None) -> None:
        self.name, self.rows, self.observer = name, rows, None
        self.heard: list[list[Any]] = []

    def put(self, message: list[Any]) -> None:
        self.heard.append(message)
        if message[0] == "rows" and self.rows is not None:
            self.observer.answered(self.name, message[1], self.rows)


@pytest.mark.asyncio
async def test_front_doors_are_asked_for_their_requests_and_of_silent_ones_is_told_what_is_known(monkeypatch):
    monkeypatch.setattr(observing, "ROWS_S", 0.01)
    mine, other, silent = Door("mine", []), Door("other", [{"id": "o", "state": "finished"}]), Door("silent", None)
    observer = Observer(Controller(ControllerSettings()), {each.name: each for each in (mine, other, silent)}, {})
    other.observer = observer
    for key, door in (("m:1", "mine"), ("o:1", "other"), ("s:1", "silent"), ("g:1", "gone")):
        observer.log.told(key, {"id": f"id-{key}", "n_prompt_tokens": 3})
        observer.saw(asked(key, "a", 1.0, door), [Dispatch(key, door, "a/1", "tcp://one", "0", 0.5)] if door == "silent" else [])
    observer.saw(ev.FrontDoorLeft(2.0, "gone"), [])
    rows = (await observer.requests("mine"))["requests"]
    assert [(row["id"], row["state"]) for row in rows] == [("id-s:1", "running"), ("o", "finished"), ("id-g:1", "cancelled")]
    assert rows[0] | {"seconds": 0.0} == {
        "id": "id-s:1",
        "model": "a",
        "state": "running",
        "node": "0",
        "n_prompt_tokens": 3,
        "n_tokens": 0,
        "path": ["0"],
        "moves": [],
        "resumes": [],
        "seconds": 0.0,
    }
    assert mine.heard == []
    assert await observer.cancel("id-s:1") == {"request": "id-s:1", "cancelled": True, "state": "cancelled"}
    assert silent.heard[-1] == ["cancel", "s:1"]


@pytest.mark.asyncio
async def test_preemptions_tiers_and_the_kv_cache_are_read_from_the_accounts_of_the_workers():
    controller = Controller(ControllerSettings())
    accounts: dict[str, Any] = {}
    observer = Observer(controller, {}, accounts)
    for event in (ev.WorkerJoined(0.0, ONE), ev.ModelDeployed(0.0, A), asked("r", "a", 1.0)):
        observer.saw(event, controller.handle(event))
    stats = {"model": "a", "load": {}, "blocks_total": 100, "blocks_used": 20, "blocks_reserved": 5}
    for n_preemptions in (0, 3, 3, 4):
        account = {"instances": {"a/1": {**stats, "n_preemptions": n_preemptions}}, "tiers": {"host": {"used": 7, "capacity": 9}}}
        accounts["tcp://one"] = account
        observer.saw_account(account)
    families = {each["name"]: each["samples"] for each in (await observer.metrics())["families"]}
    assert families["vllm:num_preemptions_total"] == [[["a"], 4]]
    assert families["vllm:kv_cache_usage_perc"] == [[["a"], 0.25]]
    assert families["sllmdask_tier_used_bytes"] == [[["0", "host"], 7]]
    assert families["sllmdask_tier_capacity_bytes"] == [[["0", "host"], 9]]
    assert families["sllmdask_instances"] == [[["a", "loading"], 1.0]]
    assert families["sllmdask_queue_depth"] == [[["a", "0"], 1.0]]
