"""An event log as a file: what was decided is decided again, and what is not a log is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sllmdask.cli import main
from sllmdask.errors import ConfigError
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.views import HeldInstance, InstanceState, ModelView, RequestView, Tier, WorkerView
from sllmdask.sim.replay import EventLog, replay

GiB = 1024**3


def events():
    """Two models on one slot, one that fails, a request that nobody knows, a worker that comes and goes."""
    nodes = {"a": Tier.DISK, "b": Tier.DISK}
    yield ev.WorkerJoined(0.0, WorkerView("w", "0", 1, 8 * GiB, residency=nodes, bytes_per_s={Tier.DISK: 1.0 * GiB}))
    for name in "ab":
        yield ev.ModelDeployed(0.0, ModelView(name, nbytes=GiB, nodes=("0",)))
    for i, model in enumerate("abz"):
        yield ev.RequestArrived(1.0 + i, RequestView(f"r{i}", model, "door", 1.0 + i, float("inf")))
    yield ev.LoadFinished(5.0, "a/1", Tier.DISK)
    yield ev.WorkerReported(5.0, "w", 1, {"a": Tier.HOST, "b": Tier.DISK}, {Tier.DISK: 2.0 * GiB}, {}, None, frozenset({"a/1"}))
    yield ev.RequestEnded(7.0, "r0")
    yield ev.UnloadFinished(7.1, "a/1")
    yield ev.LoadFailed(8.0, "b/2", "the disk is gone")
    yield ev.TimerFired(9.5)
    yield ev.WorkerLeft(10.0, "w")
    # Under another scheduler it might be back, with what it had.
    yield ev.WorkersAwaited(10.1, frozenset({"0"}), 20.0)
    yield ev.RequestClaimed(10.2, RequestView("old", "a", "door", 1.0, float("inf"), instance="a/7", dispatched_at=2.0))
    has = (HeldInstance("a/7", "a", 1, "a", GiB, InstanceState.READY, 2), HeldInstance("z/1", "z", 1, "z", GiB, leaving="moved"))
    yield ev.WorkerJoined(10.3, WorkerView("w", "0", 2, 8 * GiB, residency=nodes, bytes_per_s={Tier.DISK: 1.0 * GiB}), has)
    yield ev.FrontDoorLeft(11.0, "door")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    controller = Controller(ControllerSettings(patience_s=3.0))
    with path.open("w") as file:
        writer = EventLog(file, controller.settings)
        for event in events():
            writer.event(event)
            for decision in controller.handle(event):
                writer.decision(decision)
    return path


def test_events_come_back_as_they_were_and_lead_to_the_same_decisions(log):
    steps = list(replay(log))
    assert [step.event for step in steps] == list(events())
    assert all(step.then == step.now for step in steps)
    kinds = {decision["decision"] for step in steps for decision in step.then}
    assert kinds >= {"Chose", "Load", "Dispatch", "Refuse", "Unload", "WakeAt"}


def test_a_node_that_is_drained_is_drained_again(tmp_path):
    path = tmp_path / "events.jsonl"
    controller = Controller(ControllerSettings(can_move=True))
    nodes = [WorkerView(f"w{i}", str(i), 1, 8 * GiB, residency={"a": Tier.DISK}) for i in range(2)]
    with path.open("w") as file:
        writer = EventLog(file, controller.settings)
        for event in (
            *(ev.WorkerJoined(0.0, node) for node in nodes),
            ev.ModelDeployed(0.0, ModelView("a", nbytes=GiB)),
            ev.RequestArrived(1.0, RequestView("r", "a", "door", 1.0, 100.0)),
            ev.LoadFinished(2.0, "a/1", Tier.DISK),
            ev.WorkerDrains(3.0, "w0", "an operator asked"),
            ev.LoadFinished(4.0, "a/2", Tier.DISK),
            ev.RequestStayed(4.1, "r", "no room"),
            ev.TimerFired(4.4),
            ev.RequestMoved(4.5, "r", "a/2"),
            ev.WorkerUndrained(5.0, "w0"),
        ):
            writer.event(event)
            for decision in controller.handle(event):
                writer.decision(decision)
    steps = list(replay(path))
    assert all(step.then == step.now for step in steps)
    assert [decision["decision"] for step in steps for decision in step.then].count("Move") == 2


def test_a_decision_that_was_another_one_then_is_found(log):
    text = log.read_text().replace('"cause": "evicted"', '"cause": "for fun"')
    log.write_text(text)
    (step,) = [step for step in replay(log) if step.then != step.now]
    assert step.event == ev.RequestEnded(7.0, "r0")


def test_the_log_of_a_scheduler_that_was_killed_ends_in_the_middle_of_a_line(log):
    text = log.read_text()
    log.write_text(text[:-10])
    steps = list(replay(log))
    assert [step.event for step in steps] == list(events())[: len(steps)] and len(steps) >= len(list(events())) - 1
    assert all(step.now[: len(step.then)] == step.then for step in steps)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "Explosion", "at": 1}', "an event that this version does not know"),
        ('{"event": "TimerFired"}', "TimerFired at: Field required"),
        ('{"event": "LoadFinished", "at": 1, "instance": "a", "loaded_from": "attic"}', "LoadFinished loaded_from"),
        ('{"weather": "fine"}', "neither an event nor a decision"),
        ("[]", "not an object"),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_is_none_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "log"
    with path.open("w") as file:
        EventLog(file, ControllerSettings())
        file.write(line + "\n")
    with pytest.raises(ConfigError) as error:
        list(replay(path))
    assert f"{path}, line 2" in str(error.value) and message in str(error.value)


def test_the_command_tells_of_every_decision_and_that_they_are_the_same(log):
    result = CliRunner().invoke(main, ["simulate", "replay", str(log)])
    assert result.exit_code == 0, result.output
    heading, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert heading == ["AT", "EVENT", "DECISION", "MODEL", "REQUEST", "INSTANCE", "WORKER", "WHY"]
    assert ["5.000", "LoadFinished", "Dispatch", "", "r0", "a/1", "w", ""] in rows
    assert f"{len(list(events()))} events" in result.stderr and "the same decisions" in result.stderr
    assert json.loads(CliRunner().invoke(main, ["simulate", "replay", str(log), "--json"]).stdout)["same"] is True


def test_the_command_fails_where_the_decisions_differ(log):
    log.write_text(log.read_text().replace('"cause": "evicted"', '"cause": "for fun"'))
    result = CliRunner().invoke(main, ["simulate", "replay", str(log)])
    assert result.exit_code == 1 and "RequestEnded at 7.000" in result.stderr
    assert '"cause": "for fun"' in result.stderr and '"cause": "evicted"' in result.stderr
