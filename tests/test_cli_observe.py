"""``requests``, ``explain``, ``events`` and ``cancel``, against a front door over a fake gateway with a real log of decisions."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from click.testing import CliRunner, Result

from sllmdask.cli import main
from sllmdask.client import AsyncClient, Client
from sllmdask.errors import RecordNotFound
from sllmdask.policy import events as ev
from sllmdask.policy.views import ModelView
from tests.fakes import FakeGateway, FakeModel, ServerThread
from tests.server.test_lookout import cold_start

Serve = Callable[..., ServerThread]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with ExitStack() as stack:

        def serve_one(**models: FakeModel) -> ServerThread:
            server = stack.enter_context(ServerThread(lambda: FakeGateway(**models)))
            monkeypatch.setenv("LLM_SERVER_URL", server.url)
            return server

        yield serve_one


def run(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def see(server: ServerThread, happens: Callable[[FakeGateway], object]) -> None:
    """Let something happen on the server's own loop."""

    async def call() -> None:
        happens(server.gateway)

    server.call(call())


def test_a_request_is_explained_with_its_options_and_what_came_of_it(serve: Serve):
    see(serve(m=FakeModel()), cold_start)
    shown = run("explain", "id-door:1").output
    lines = shown.splitlines()
    assert re.match(r"request id-door:1 for m: running on node 0 after ", lines[0])
    assert "decided after 0 ms: a free slot is the fastest" in lines
    table = [line.split("\t") for line in lines if "\t" in line]
    assert table == [
        ["WAY", "NODE", "TIER", "PREDICTED", "OF THAT", "INSTANCE", "LEAVING", "OUTCOME"],
        ["free", "0", "disk", "2.0 s", "read 2.0 s", "-", "-", "chosen"],
        ["wait", "0", "-", "7.0 s", "wait 7.0 s", "other/1", "-", "slower by 5.0 s"],
    ]
    assert "load: m/1 from disk on node 0, loaded in 2.5 s (2.0 s predicted, 20% off)" in lines
    assert "what happened: waited 2.5 s, cold start: disk" in lines
    assert any("+2.5 s" in line and "m/1 takes requests on node 0" in line for line in lines)
    assert json.loads(run("explain", "id-door:1", "--json").output)["load"]["took_s"] == 2.5


def test_a_model_is_explained_and_what_is_unknown_is_an_error(serve: Serve):
    server = serve(m=FakeModel())
    see(server, cold_start)
    shown = run("explain", "m").output
    assert shown.startswith("model m: not loaded\nwhy: it is not deployed any more\n")
    assert "m/1 is loaded from disk on node 0, predicted to take 2.0 s" in shown
    result = run("explain", "nobody", code=1)
    assert "Nothing is known of 'nobody'" in result.stderr and "Traceback" not in result.stderr
    with Client(server.url) as client, pytest.raises(RecordNotFound):
        client.explain("org/nobody")


def test_events_are_lines_and_json_lines(serve: Serve):
    see(serve(m=FakeModel()), cold_start)
    lines = [line.split("\t") for line in run("events").output.splitlines()]
    assert [line[1] for line in lines] == ["joined", "deployed", "placed", "loaded", "dispatched"]
    assert lines[1][2] == "m is deployed, 1.0 MiB"
    rows = [json.loads(line) for line in run("events", "--json", "--model", "m", "--last", "2").output.splitlines()]
    assert [(row["event"], row["model"]) for row in rows] == [("loaded", "m"), ("dispatched", "m")]
    assert run("events", "--last", "0").output == ""


def test_events_are_followed_until_ctrl_c(serve: Serve):
    server = serve()
    see(server, cold_start)
    # Whoever runs the tests in the background has them ignore Ctrl-C, and all that they start.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv[0] = 'sllmdask'\n"
    code += "from sllmdask.cli import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "events", "-f", "--last", "1", "--server", server.url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "dispatched" in process.stdout.readline()
        see(server, lambda gateway: gateway.observer.saw(ev.ModelDeployed(30.0, ModelView("n", nbytes=1)), []))
        assert "n is deployed" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_the_client_follows_events_and_stops_when_it_is_left(serve: Serve):
    server = serve()
    see(server, cold_start)
    with Client(server.url) as client:
        events = client.events(last=1)
        assert next(events)["event"] == "dispatched"
        see(server, lambda gateway: gateway.observer.saw(ev.WorkerLeft(30.0, "tcp://1"), []))
        assert next(events)["event"] == "left"
        events.close()
        assert [row["event"] for row in client.events(follow=False, last=2)] == ["dispatched", "left"]
        assert client.requests() == []
    assert hasattr(AsyncClient, "events")


def test_requests_are_listed_and_cancelled(serve: Serve):
    server = serve(m=FakeModel())
    with Client(server.url) as client:
        future = client.submit("m", "Hi", temperature=0)
        future.result(10)
        request = future.response().id
    lines = [line.split("\t") for line in run("requests").output.splitlines()]
    assert lines[0] == ["REQUEST", "MODEL", "STATE", "NODE", "PROMPT", "TOKENS", "TIME", "PATH", "MOVES", "PAUSE"]
    assert lines[1][:4] == [request, "m", "finished", "0"] and lines[1][5] == "24"
    assert json.loads(run("requests", "--json").output)[0]["id"] == request
    assert run("cancel", request).output == f"{request} has ended already: finished\n"
    assert "Nothing is known" in run("cancel", "other", code=1).stderr


def test_moves_are_told_with_what_its_client_noticed(serve: Serve):
    server = serve(m=FakeModel())
    see(server, cold_start)
    where = {"source": "0", "destination": "1", "cause": "an operator asked", "stop_ms": None, "steps": []}
    stayed = {**where, "epoch": 1, "outcome": "stayed", "reason": "there is no room", "kind": None, "seconds": 0.1}
    moved = {**where, "epoch": 3, "outcome": "moved", "reason": None, "kind": "kv", "seconds": 0.25, "pause_ms": 3.4}
    moved |= {"stop_ms": 1.25, "steps": [2048, 512]}
    told = {"state": "finished", "n_tokens": 9, "path": ["0", "1"], "moves": [stayed, moved]}
    see(server, lambda gateway: gateway.observer.log.told("door:1", told))
    see(server, lambda gateway: gateway.observer.saw(ev.RequestEnded(20.0, "door:1"), []))
    lines = run("explain", "id-door:1").output.splitlines()
    assert lines[0] == "request id-door:1 for m: finished on node 0 -> 1 after 10.0 s"
    assert "did not move from node 0 to node 1: there is no room (an operator asked)" in lines
    took = "2.0 KiB + 512 B of KV in 2 stages, 250 ms, stopped for 1.2 ms, its client waited 3.4 ms for the next token"
    assert f"moved from node 0 to node 1: {took} (an operator asked)" in lines
    assert any(line.endswith("moved, could not move, at most 3.4 ms without a token by that") for line in lines)
