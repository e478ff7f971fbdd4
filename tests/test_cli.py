"""The command line, against a front door over a fake gateway."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask.config
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from sllmdask import __version__
from sllmdask.batching.params import Grammar
from sllmdask.cli import main, moves
from sllmdask.cluster.journal import Progress
from sllmdask.config import Deployment, Settings
from sllmdask.errors import LoadFailed, QueueTimeout
from sllmdask.server import stream
from tests.fakes import FakeGateway, FakeModel, ServerThread, byte_tokenizer

Serve = Callable[..., ServerThread]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with ExitStack() as stack:

        def serve_one(**models: FakeModel) -> ServerThread:
            server = stack.enter_context(ServerThread(lambda: FakeGateway(**models)))
            monkeypatch.setenv("LLM_SERVER_URL", server.url)
            return server

        yield serve_one


def run(*args: str, stdin: str = "", code: int = 0) -> Result:
    result = CliRunner().invoke(main, args, input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_help_is_quick_and_lists_only_what_exists():
    heavy = "('torch','dask','distributed','aiohttp','pydantic','rich','numpy')"
    code = f"import sys, sllmdask.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    commands = {"up", "serve", "status", "deploy", "delete", "models", "load", "unload", "pull", "convert", "verify", "bench"}
    commands |= {"requests", "explain", "events", "cancel", "migrate", "drain", "simulate"}
    assert set(main.commands) == commands | {"generate", "chat", "encode", "version", "update", "pin", "unpin"}
    for command in set(main.commands) - {"bench", "simulate"}:
        assert "--debug" in run(command, "--help").output
    for command in (("bench", "load"), ("simulate", "run"), ("simulate", "sweep"), ("simulate", "replay")):
        assert "--debug" in run(*command, "--help").output


def test_version_is_told_both_ways():
    assert run("version").output == run("--version").output == f"sllmdask {__version__}\n"
    assert json.loads(run("version", "--json").output) == {"version": __version__}


def test_models_are_tsv_in_a_pipe_and_json_when_asked(serve: Serve):
    serve(qwen=FakeModel(created=5), cold=FakeModel(state="disk"))
    lines = [line.split("\t") for line in run("models").output.splitlines()]
    assert lines[0] == ["MODEL", "STATE", "INSTANCES", "SIZE", "CONTEXT", "KEEP-ALIVE", "PINNED", "REASON"]
    assert lines[1] == ["qwen", "ready", "1", "4.0 MiB", "1024", "5m00s", "-", "-"]
    rows = json.loads(run("models", "--json").output)
    assert [row["model"] for row in rows] == ["qwen", "cold"]
    keys = {"model", "state", "created", "max_model_len", "nbytes", "instances", "reason", "keep_alive", "progress"}
    assert set(rows[0]) == keys | {"task", "embedding", "adapters"}


def on_a_terminal(url: str, *args: str) -> str:
    """What a command shows there."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "LLM_SERVER_URL": url, "COLUMNS": "200", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", MAIN, *args], stdout=theirs, env=env, check=True, timeout=20)
    shown = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    return re.sub(r"\x1b\[[\d;]*m", "", shown)  # without colours


def test_models_are_a_table_on_a_terminal(serve: Serve):
    shown = on_a_terminal(serve(qwen=FakeModel()).url, "models")
    assert "─" in shown and "qwen" in shown and "\t" not in shown


def test_status_lists_moves_under_way_on_a_terminal(serve: Serve):
    server = serve(m=FakeModel())
    where = {"instance": "m/1", "model": "m", "source": "here", "destination": "there"}
    server.gateway.moves = [
        {"request": "mine", **where, "seconds": 1.5, "cause": "an operator asked"},
        {"request": None, **where, "seconds": 90.0, "cause": "makes room for n"},
    ]
    lines = [line.split() for line in on_a_terminal(server.url, "status").splitlines()]
    assert ["MOVING", "MODEL", "FROM", "TO", "FOR", "CAUSE"] in lines
    assert ["mine", "m", "here", "there", "1.5", "s", "an", "operator", "asked"] in lines
    assert ["m/1", "m", "here", "there", "1m30s", "makes", "room", "for", "n"] in lines
    assert "MOVING" not in run("status").output


def test_status_shows_workers_and_says_when_nothing_can_be_placed(serve: Serve):
    server = serve(m=FakeModel())
    lines = [line.split("\t") for line in run("status").output.splitlines()]
    memory = ["4.0 MiB of 1.0 GiB", "80.0 MiB of 1.0 GiB", "m 1.0 MiB of 64.0 MiB"]
    assert lines[1] == ["0", "tcp://127.0.0.1:1", "1", "ready", "1/2", *memory, "8% off (5 loads)", "m (ready)"]
    assert "the hardware file names node '7'" in run("status").stderr
    server.gateway.ready = False
    status = json.loads(run("status", "--json").output)
    assert list(status) == ["url", "ready", "reason", "workers", "moves", "warnings", "models", "requests"]
    assert status["ready"] is False
    assert "No worker is connected." in run("status", "--wait", "--timeout", "0.1", code=4).stderr


def test_a_server_that_is_not_there_is_exit_code_3_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LLM_SERVER_URL", raising=False)
    commands = (["models"], ["status"], ["generate", "m", "x"], ["delete", "m"], ["deploy", "m"], ["chat", "m"])
    for command in (*commands, ["load", "m"], ["unload", "m"], ["pull", "m"]):
        result = run(*command, "--server", "http://127.0.0.1:9", code=3)
        assert "sllmdask up" in result.stderr and "Connection refused" in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(main, ["models", "--server", "http://127.0.0.1:9", "--debug"])
    assert "ServerUnreachable" in repr(result.exception)


def test_deploy_takes_a_name_and_flags(serve: Serve):
    server = serve()
    result = run("deploy", "qwen", "--source", "org/qwen", "--num-gpus", "2", "--keep-alive", "5m", "--target", "3")
    assert result.output == "deployed qwen\n"
    assert list(server.gateway.deployed) == ["qwen"]
    assert json.loads(run("deploy", "org/other", "--json").output)[0]["model"] == "org/other"


def test_deploy_names_a_model_of_a_url_by_the_last_part_of_its_path(serve: Serve):
    server = serve()
    for url in ("http://127.0.0.1:1/models/qwen2.5/", "https://h.org/a/b?token=x=y", "https://h.org/c", "mine=http://h.org/d/"):
        run("deploy", url)
    assert list(server.gateway.deployed) == ["qwen2.5", "b", "c", "mine"]
    for url in ("http://h.org/", "http://h.org", "http://[h.org/x", "http://h.org/qwen%201"):
        assert f"NAME={url}" in run("deploy", url, code=2).stderr


def test_deploy_takes_files_and_flags_go_over_them(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = serve()
    seen: list[Deployment] = []
    register = server.gateway.register

    async def spy(deployment: Deployment) -> dict[str, Any]:
        seen.append(deployment)
        return await register(deployment)

    monkeypatch.setattr(server.gateway, "register", spy)
    (tmp_path / "a.json").write_text('{"model": "a", "auto_scaling_config": {"target": 2, "min_instances": 1}}')
    (tmp_path / "b.yaml").write_text("model: b\nbackend_config: {device_map: cpu}\n")
    files = ["--config", str(tmp_path / "a.json"), "--config", str(tmp_path / "b.yaml")]
    result = run("deploy", *files, "--target", "9", "--source", str(tmp_path))
    assert result.stdout == "deployed a\ndeployed b\n"
    assert "device_map has no effect" in result.stderr
    assert [(d.model, d.auto_scaling_config.target, d.source) for d in seen] == [("a", 9, str(tmp_path)), ("b", 9, str(tmp_path))]
    assert seen[0].auto_scaling_config.min_instances == 1
    run("deploy", "renamed", *files[:2])
    assert seen[-1].model == "renamed"


def test_deploy_refuses_what_is_wrong_before_it_asks_anybody(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"model": "a", "num_gpu": 2}')
    assert "'num_gpus'" in run("deploy", "--config", str(tmp_path / "a.json"), code=2).stderr
    assert "is not a name" in run("deploy", "a", "--source", "x", "--backend", "a b", code=2).stderr
    assert "no file or directory" in run("deploy", "./nowhere", code=2).stderr
    run("deploy", code=2)


def test_deploy_waits_for_instances_and_shows_how_far_they_are(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    server = serve()
    states = iter([("loading", 0.25), ("loading", 0.5), ("ready", None)])
    models = server.gateway.models

    def loading() -> list[dict[str, Any]]:
        state, progress = next(states, ("ready", None))
        return [{**row, "state": state, "progress": progress, "instances": int(state == "ready")} for row in models()]

    monkeypatch.setattr(server.gateway, "models", loading)
    result = run("deploy", "m", "--min-instances", "1", "--wait")
    assert "loading m 25% of 4.0 MiB" in result.stderr and "/s" in result.stderr and "eta" in result.stderr


def test_a_failed_load_ends_the_waiting_with_its_reason(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    server = serve()
    row = {"model": "m", "state": "failed", "instances": 0, "reason": "truncated", "progress": None, "nbytes": 1}
    monkeypatch.setattr(server.gateway, "models", lambda: [row])
    assert "truncated" in run("deploy", "m", "--min-instances", "1", "--wait", code=1).stderr


def test_delete_goes_on_after_a_failure_and_tells(serve: Serve):
    server = serve(a=FakeModel(), b=FakeModel())
    result = run("delete", "a", "none", "b", code=1)
    assert result.stdout == "deleted a\ndeleted b\n" and "'none'" in result.stderr
    assert not server.gateway.deployed
    assert json.loads(run("delete", "a", "--json", code=1).stdout)[0]["deleted"] is False


def test_delete_says_what_still_runs_and_what_it_has_ended(serve: Serve):
    server = serve(a=FakeModel(), b=FakeModel())
    server.gateway.n_running = 2
    assert run("delete", "a").output == "deleted a; 2 requests may end first: `sllmdask delete a` again ends them\n"
    assert run("delete", "b", "--now").output == "deleted b and ended 2 requests\n"


def test_update_sends_only_what_was_given(serve: Serve, tmp_path: Path):
    server = serve(m=FakeModel())
    (tmp_path / "m.json").write_text('{"model": "m", "auto_scaling_config": {"target": 2, "max_instances": 3}}')
    assert (
        run("update", "m", "--config", str(tmp_path / "m.json"), "--target", "9", "--memory-pool", "0,1").output == "updated m\n"
    )
    scaling = {"target": 9, "max_instances": 3}
    changes = {"model": "m", "auto_scaling_config": scaling, "placement_config": {"memory_pool": ["0", "1"]}}
    assert server.gateway.operated == [("update", "m", changes)]
    run("update", "m", "--target-nodes", "")
    assert server.gateway.operated[-1][2]["placement_config"] == {"target_nodes": []}
    assert "Give what is to change" in run("update", "m", code=2).stderr
    run("update", "none", "--target", "1", code=1)


def test_pin_and_unpin_say_where(serve: Serve):
    server = serve(m=FakeModel())
    assert run("pin", "m", "--node", "1").output == "m stays in the host memory of node 1: 4.0 MiB\n"
    assert run("unpin", "m").output == "m may leave the host memory of node 0\n"
    assert server.gateway.operated == [("pin", "m", "1", True), ("pin", "m", None, False)]
    run("pin", "none", code=1)


def test_generate_streams_the_answer_and_its_progress(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "HEADER_GRACE_S", 0.0)
    loading = [Progress("loading", "loading m 61% disk 2.9 GiB/s")]
    serve(m=FakeModel(answer=lambda prompt: prompt, loading=loading, cold_start="disk"))
    result = run("generate", "m", "Hi", "--max-tokens", "100")
    assert result.stdout == "<|user|>Hi\n<|assistant|>\n"
    *waiting, loading_line = result.stderr.splitlines()
    assert waiting == ["waiting", "waiting for m"] and loading_line.startswith("loading m 61% disk 2.9 GiB/s eta ")
    assert run("generate", "m", "Hi", "--raw").stdout == "Hi\n"
    assert run("generate", "m", "--raw", stdin="piped").stdout == "piped\n"
    answer = json.loads(run("generate", "m", "Hi", "--raw", "--json", "--max-tokens", "1").stdout)
    assert list(answer) == ["id", "model", "text", "finish_reason", "usage", "cold_start", "node", "queue_ms"]
    assert (answer["text"], answer["finish_reason"], answer["cold_start"]) == ("H", "length", "disk")


def test_generate_passes_sampling_on(serve: Serve):
    server = serve(m=FakeModel())
    run("generate", "m", "x", "--temperature", "0", "--seed", "5", "--max-tokens", "3")
    params = server.gateway.asked[0].params
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, 5, 3)


def test_generate_passes_any_field_on(serve: Serve, tmp_path: Path):
    server = serve(m=FakeModel())
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    options = ("--top-p", "0.5", "--stop", "a", "--stop", "b", "-p", "frequency_penalty=0.5", "-p", 'logit_bias={"3": 1}')
    run("generate", "m", "x", *options, "--json-schema", str(tmp_path / "schema.json"))
    params = server.gateway.asked[0].params
    assert (params.top_p, params.stop, params.frequency_penalty, params.logit_bias) == (0.5, ("a", "b"), 0.5, ((3, 1.0),))
    assert params.grammar == Grammar("json_schema", '{"type": "object"}')
    assert "NAME=VALUE" in run("generate", "m", "x", "-p", "seed", code=2).stderr
    assert "cannot set model" in run("generate", "m", "x", "-p", "model=n", code=2).stderr
    assert "Cannot read a JSON schema" in run("generate", "m", "x", "--json-schema", "/nowhere.json", code=2).stderr


def test_generate_prints_all_answers_and_log_probabilities_as_json(serve: Serve):
    serve(m=FakeModel(answer=str.upper))
    answer = json.loads(run("generate", "m", "ab", "--raw", "--json", "-n", "2", "--logprobs", "1").stdout)
    assert [choice["text"] for choice in answer["choices"]] == ["AB", "AB"]
    assert answer["logprobs"]["tokens"] == ["A", "B"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "ab\n\ncd\n"),
        ("a.json", '["ab", {"prompt": "cd"}]'),
        ("a.jsonl", '"ab"\n{"prompt": "cd"}\n'),
    ],
)
def test_generate_answers_a_file_in_order(serve: Serve, tmp_path: Path, name: str, text: str):
    server = serve(m=FakeModel(answer=str.upper))
    (tmp_path / name).write_text(text)
    result = run("generate", "m", "--raw", "--input", str(tmp_path / name), "--threads", "2")
    assert result.stdout == "AB\nCD\n"
    lines = run("generate", "m", "--raw", "--input", str(tmp_path / name), "--json").stdout.splitlines()
    assert [(json.loads(line)["index"], json.loads(line)["text"]) for line in lines] == [(0, "AB"), (1, "CD")]
    assert server.gateway.most_running <= 2


def test_one_bad_prompt_of_a_file_does_not_stop_the_others(serve: Serve, tmp_path: Path):
    serve(m=FakeModel(answer=str.upper, max_model_len=10))
    (tmp_path / "a.txt").write_text("ab\n" + "x" * 50 + "\ncd\n")
    result = run("generate", "m", "--raw", "--input", str(tmp_path / "a.txt"), code=1)
    assert result.stdout == "AB\nCD\n" and "prompt 2" in result.stderr and "50 tokens" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate", "none", "x"], 1, "does not exist"),
        (["generate", "m", "x", "--temperature", "-1"], 1, "temperature"),
        (["generate", "bad", "x"], 1, "could not be loaded"),
        (["generate", "late", "x"], 4, "within 3 s"),
        (["generate", "held", "x", "--timeout", "0.2"], 4, "within 0.2 s"),
        (["generate", "m", "x", "--input", "f"], 2, "not both"),
        (["generate", "m", "--input", "/nowhere.txt"], 2, "Cannot read"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_every_failure_is_one_message_and_its_exit_code(serve: Serve, args: list[str], code: int, message: str):
    server = serve(
        m=FakeModel(),
        bad=FakeModel(refuse=LoadFailed("bad", "truncated")),
        late=FakeModel(refuse=QueueTimeout("late", 3.0, "busy")),
        held=FakeModel(gate=asyncio.Event()),
    )
    result = run(*args, code=code)
    assert message in result.stderr and "Traceback" not in result.stderr
    server.until(lambda: server.gateway.n_running == 0)


def test_chat_remembers_and_forgets(serve: Serve):
    server = serve(m=FakeModel(answer=lambda prompt: str(prompt.count("<|user|>"))))
    result = run("chat", "m", "--system", "S", stdin="one\n\ntwo\n/clear\nthree\n/bye\nnever\n")
    assert result.stdout == "1\n2\n1\n"

    last = byte_tokenizer().decode(server.gateway.asked[1].prompt_ids)
    assert last == "<|system|>S\n<|user|>one\n<|assistant|>1\n<|user|>two\n<|assistant|>"


def test_chat_goes_on_after_a_refused_turn_and_ends_with_the_input(serve: Serve):
    serve(m=FakeModel(answer=lambda _: "ok", max_model_len=60))
    result = run("chat", "m", stdin="x" * 80 + "\nshort\n")
    assert result.stdout == "ok\n\n" and "80" not in result.stdout and "maximum context length" in result.stderr
    run("chat", "none", code=1)


# --- load, unload, pull ---


def test_load_says_where_the_model_is_ready_and_from_where_it_came(serve: Serve):
    server = serve(m=FakeModel(state="disk", cold_start="peer"), warm=FakeModel(cold_start="hit"))
    assert run("load", "m", "--node", "1").output == (
        "m is ready on node 1: loaded from peer in 250 ms; leaves after 5m00s without a request\n"
    )
    assert run("load", "warm").output == "warm is ready on node 0 already\n"
    assert run("load", "m", "--tier", "host").output == "m is in the host memory of node 0: loaded from peer in 250 ms\n"
    assert run("load", "m", "--no-wait").output == "loading m\n"
    assert json.loads(run("load", "m", "--json").output)["cold_start"] == "peer"
    assert server.gateway.operated[:2] == [("load", "m", "1", "device", True), ("load", "warm", None, "device", True)]
    assert server.gateway.operated[3] == ("load", "m", None, "device", False)


def test_load_shows_how_far_it_is_and_what_is_in_its_way(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    gate = asyncio.Event()
    server = serve(m=FakeModel(state="disk", gate=gate), other=FakeModel())
    told = iter([None, {"done": 2 * 1024**3, "total": 4 * 1024**3, "tier": "disk", "bytes_per_s": 1024**3}])
    cluster = server.gateway.cluster

    async def changing() -> dict[str, Any]:
        model = server.gateway.deployed["m"]
        if model.progress is None:
            model.state, model.progress = "unknown", next(told)
        else:
            gate.set()
        model.state = "loading" if model.progress else "disk"
        return await cluster()

    monkeypatch.setattr(server.gateway, "cluster", changing)
    result = run("load", "m")
    assert "waiting for a slot for m, taken by m on node 0" in result.stderr
    assert "loading m on node 0 50% of 4.0 GiB disk 1.0 GiB/s eta 2.0 s" in result.stderr
    assert result.stdout.startswith("m is ready on node 0")


def test_unload_names_the_nodes_and_says_so_when_there_was_nothing(serve: Serve):
    server = serve(m=FakeModel())
    assert run("unload", "m", "--node", "3").output == "unloaded m from node 3\n"
    assert run("unload", "m").output == "m is not loaded\n"
    assert run("unload", "m", "--node", "3").output == "m is not loaded on node 3\n"
    assert json.loads(run("unload", "m", "--json").output)["instances"] == []
    assert server.gateway.operated[0] == ("unload", "m", "3", True)


def test_drain_tells_how_far_it_is_and_what_came_of_it(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    server = serve(m=FakeModel())
    monkeypatch.setattr(moves, "LOOK_S", 0.0)
    server.gateway.draining = {"state": "drained", "requests": 0, "instances": 0, "moved": 2, "ended": 1}
    drained = run("drain", "0")
    assert drained.stdout == "node 0 is drained: 2 requests moved, 1 ended there, 0.5 s\n"
    assert "draining node 0: 3 requests and 1 instance left" in drained.stderr
    assert json.loads(run("drain", "0", "--json").stdout)["moved"] == 2
    assert run("drain", "0", "--no-wait").stdout == "draining node 0: 3 requests and 1 instance\n"
    assert run("drain", "0", "--undo").stdout == "node 0 takes requests again\n"
    assert server.gateway.operated[-2:] == [("drain", "0", False, False), ("drain", "0", False, True)]
    assert "3 requests and 1 instance left after 0 s" in run("drain", "0", "--timeout", "0", code=4).stderr
    assert "Connected are '0'" in run("drain", "7", code=1).stderr
    server.gateway.draining = None
    assert "somebody has undone it" in run("drain", "0", code=1).stderr
    server.gateway.has_worker = False
    assert run("drain", "0").stdout == "node 0 has left\n"


def test_migrate_takes_a_request_or_an_instance_and_says_what_became_of_it(serve: Serve):
    server = serve(m=FakeModel())
    moved = "r-1 moved from node 0 to 1: 68.0 KiB of KV in 2 stages, stopped for 1.2 ms\n"
    assert run("migrate", "r-1", "--to", "1").stdout == moved
    assert run("migrate", "m/1", "--to", "1").stdout == moved + "m/1 is m/2 on node 1 now\n"
    tokens = run("migrate", "r-1", "--to", "1", "--kind", "tokens").stdout
    assert tokens == "r-1 moved from node 0 to 1: 512 tokens in 2 rounds, stopped for 1.2 ms\n"
    assert run("migrate", "r-1", "--to", "1", "--no-wait").stdout == "moving r-1 to node 1\n"
    assert json.loads(run("migrate", "r-1", "--to", "1", "--json").stdout)["moves"][0]["n_tokens"] == 512
    assert server.gateway.operated[:3] == [
        ("migrate", "r-1", None, "1", None, True),
        ("migrate", None, "m/1", "1", None, True),
        ("migrate", "r-1", None, "1", "tokens", True),
    ]
    assert "has ended" in run("migrate", "gone", "--to", "1", code=1).stderr
    assert "no room" in run("migrate", "stuck", "--to", "1", code=1).stderr
    run("migrate", "r-1", code=2)


def test_pull_takes_a_model_or_a_source_and_a_directory_by_its_whole_path(serve: Serve, tmp_path: Path):
    server = serve()
    assert run("pull", "org/x", "--node", "1").output == "org/x is on the disk of node 1: 4.0 MiB, fetched in 500 ms\n"
    assert run("pull", "org/x", "--no-wait").output == "fetching org/x to the disk of node 0\n"
    run("pull", os.path.relpath(tmp_path))
    assert [each[2] for each in server.gateway.operated] == ["org/x", "org/x", str(tmp_path)]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["load", "none"], 1, "Did you mean 'qwen'"),
        (["load", "bad"], 1, "truncated"),
        (["load", "late"], 4, "busy"),
        (["load", "m", "--tier", "disk"], 2, "not one of"),
        (["unload", "none"], 1, "does not exist"),
        (["pull", "/missing/x"], 1, "no such directory"),
    ],
)
def test_what_cannot_be_loaded_is_one_message_and_its_exit_code(serve: Serve, args: list[str], code: int, message: str):
    late = FakeModel(refuse=QueueTimeout("late", 3.0, "busy"))
    serve(m=FakeModel(), bad=FakeModel(refuse=LoadFailed("bad", "truncated")), late=late)
    result = run(*args, code=code)
    assert message in result.stderr and "Traceback" not in result.stderr


#: As from a terminal: a process that a shell put into the background ignores Ctrl-C, and so do its children.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from sllmdask.cli import main; main()"


def test_ctrl_c_while_waiting_leaves_the_load_to_the_cluster_and_says_how_to_call_it_off(serve: Serve):
    server = serve(m=FakeModel(gate=asyncio.Event()))
    command = [sys.executable, "-c", MAIN, "load", "m"]
    env = {**os.environ, "LLM_SERVER_URL": server.url}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None and "loading m" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "sllmdask unload m" in process.communicate(timeout=20)[1]
    assert process.returncode == 130


# --- checkpoints, without a server ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two tensors of half precision, which have a few megabytes and compress."""
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(1024, 1024, generator=generator).to(torch.bfloat16) for name in ("a", "b")}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def test_convert_writes_a_checkpoint_that_verifies_and_says_what_it_wrote(checkpoint: Path, tmp_path: Path):
    target = tmp_path / "fast"
    result = run("convert", str(checkpoint), str(target), "--compress", "both")
    assert result.stdout.startswith(f"wrote {target}: 2 tensors, raw 4.0 MiB, split16 ")
    # Nothing, unless it takes longer than people wait without a word.
    assert all(line.startswith("converting ") for line in result.stderr.splitlines())
    assert (target / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert run("verify", str(target)).stdout.startswith(f"OK {target}: fast format (raw, split16), 2 tensors, ")
    facts = json.loads(run("verify", str(target), "--json").stdout)
    assert list(facts) == ["path", "ok", "format", "variants", "n_tensors", "nbytes", "seconds", "problems"]
    assert "no checksums" in run("verify", str(checkpoint)).stdout
    assert "--overwrite" in run("convert", str(checkpoint), str(target), code=1).stderr
    facts = json.loads(run("convert", str(checkpoint), str(target), "--overwrite", "--json").stdout)
    assert list(facts) == ["path", "n_tensors", "nbytes", "stored_nbytes", "seconds"]
    assert (facts["nbytes"], list(facts["stored_nbytes"])) == (4 * 1024**2, ["raw"])


def test_verify_has_a_line_for_each_bad_place_and_exit_code_1(checkpoint: Path, tmp_path: Path):
    target = tmp_path / "fast"
    run("convert", str(checkpoint), str(target))
    (data,) = target.glob("data-*")
    with data.open("r+b") as file:
        for offset in (100, 3 * 1024**2):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    lines = run("verify", str(target), code=1).stdout.splitlines()
    assert [line.split("[")[-1] for line in lines[:2]] == ["a]", "b]"]
    assert all(line.startswith(f"BAD {data}: ") and "checksum" in line for line in lines[:2])
    facts = json.loads(run("verify", str(target), "--json", code=1).stdout)
    assert [problem["tensors"] for problem in facts["problems"]] == [["a"], ["b"]]


@pytest.mark.parametrize("command", [["convert", "./nowhere", "x"], ["verify", "nowhere"], ["bench", "load", "nowhere"]])
def test_no_checkpoint_is_one_message(command: list[str]):
    result = run(*command, code=1)
    assert "No checkpoint at" in result.stderr and "Traceback" not in result.stderr


def test_ctrl_c_leaves_nothing_of_a_conversion_behind(tmp_path: Path):
    nbytes = 2 * 1024**3  # sparse, and so large that the signal arrives in the middle
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    (tmp_path / "source").mkdir()
    with open(tmp_path / "source" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    command = [sys.executable, "-c", MAIN, "convert", "source", "target"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".target.*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "Interrupted; nothing was written.")
    assert os.listdir(tmp_path) == ["source"]


def test_bench_load_compares_the_loaders_with_the_limit(checkpoint: Path, tmp_path: Path):
    (checkpoint / "config.json").unlink()  # two tensors make no model
    lines = [line.split("\t") for line in run("bench", "load", str(checkpoint), "--repeats", "2").stdout.splitlines()]
    assert lines[0] == ["LOADER", "SECONDS", "FROM-TO", "GB/S", "TO THE LIMIT"]
    names = ["direct reads (the limit)", "sllmdask worker", "sllmdask.load_state_dict", "safetensors load_file"]
    assert [line[0] for line in lines[1:]] == names and lines[1][4] == "1.00"
    run("bench", "load", str(checkpoint), "--repeats", "3", "--json", str(tmp_path / "out.json"))
    facts = json.loads((tmp_path / "out.json").read_text())
    assert (facts["nbytes"], facts["repeats"], [len(row["runs"]) for row in facts["loaders"]]) == (4 * 1024**2, 3, [3] * 4)


@pytest.mark.parametrize(
    ("directory", "reason"), [("nowhere", "No such file"), ("file", "Not a directory"), ("/proc", "No such")]
)
def test_bench_load_says_why_it_can_generate_nothing_in_a_directory(tmp_path: Path, directory: str, reason: str):
    (tmp_path / "file").touch()
    stderr = run("bench", "load", "--size", "1MiB", "--dir", str(tmp_path / directory), code=2).stderr
    assert f"{tmp_path / directory}: {reason}" in stderr and "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_bench_load_makes_a_model_of_its_own_and_removes_it(tmp_path: Path):
    facts = json.loads(run("bench", "load", "--size", "90MiB", "--dir", str(tmp_path), "--repeats", "1", "--json", "-").stdout)
    assert [row["name"] for row in facts["loaders"] if row["failed"]] == []
    assert {"sllmdask.load_model", "transformers from_pretrained"} < {row["name"] for row in facts["loaders"]}
    assert not list(tmp_path.iterdir())
    assert "free" in run("bench", "load", "--size", "100000TB", "--dir", str(tmp_path), code=2).stderr


# --- up and serve: what they hand to the cluster ---


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A ``sllmdask.server.service`` that starts nothing and remembers what it was asked."""
    asked: dict[str, Any] = {}
    info = {"url": "http://127.0.0.1:8343", "scheduler": "tcp://127.0.0.1:1", "dashboard": None, "workers": 2}

    def run_up(models: list[Deployment], settings: Settings, *, n_workers: int, on_ready: Callable[[dict], None]) -> None:
        asked.update(models=models, settings=settings, n_workers=n_workers)
        on_ready({**info, "models": [model.model for model in models]})

    def run_serve(scheduler_address: str, settings: Settings, on_ready: Callable[[dict], None]) -> None:
        asked.update(scheduler=scheduler_address, settings=settings)
        on_ready({**info, "models": []})

    for name in ("DISTRIBUTED", "SLLMDASK"):  # up sets what is not set
        monkeypatch.setenv(f"DASK_LOGGING__{name}", "warning")
    fake = types.ModuleType("sllmdask.server.service")
    fake.run_up, fake.run_serve = run_up, run_serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sllmdask.server.service", fake)
    with dask.config.set({"sllmdask": {"server": {"port": 0}}}):
        yield asked


def test_up_reads_every_kind_of_model(cluster: dict[str, Any], tmp_path: Path):
    (tmp_path / "file.yaml").write_text("model: from-file\nnum_gpus: 2\n")
    (tmp_path / "qwen2").mkdir()
    names = [str(tmp_path / "file.yaml"), "named=org/some", f"here={tmp_path}/qwen2", f"{tmp_path}/qwen2", "org/hub-id"]
    result = run("up", *names, "--demo", "--workers", "3", "--slots-per-worker", "2", "--port", "0")
    assert [(model.model, model.source) for model in cluster["models"]] == [
        ("from-file", "from-file"),
        ("named", "org/some"),
        ("here", f"{tmp_path}/qwen2"),
        ("qwen2", f"{tmp_path}/qwen2"),
        ("org/hub-id", "org/hub-id"),
        ("demo-llama", "demo:demo-llama"),
        ("demo-qwen", "demo:demo-qwen"),
    ]
    assert cluster["n_workers"] == 3
    assert (cluster["settings"].worker.slots, cluster["settings"].server.port) == (2, 0)
    assert "http://127.0.0.1:8343/v1" in result.stdout and "curl" in result.stdout
    assert json.loads(run("up", "--json").stdout)["scheduler"] == "tcp://127.0.0.1:1"


def test_up_reads_settings_and_models_from_a_file_and_flags_go_over_it(cluster: dict[str, Any], tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "sllmdask:\n  server: {port: 9000, heartbeat: 2s}\n  worker:\n  models:\n    a: org/a\n    b: {num_gpus: 2}\n"
    )
    run("up", "-c", str(tmp_path / "c.yaml"), "--port", "0")
    assert (cluster["settings"].server.port, cluster["settings"].server.heartbeat) == (0, 2.0)
    assert [(model.model, model.source, model.num_gpus) for model in cluster["models"]] == [("a", "org/a", 1), ("b", "b", 2)]
    (tmp_path / "d.json").write_text('{"model": "d"}')
    run("up", "-c", str(tmp_path / "d.json"))
    assert cluster["models"][0].model == "d"
    (tmp_path / "bad.yaml").write_text("server: 3\n")
    assert "'server'" in run("up", "-c", str(tmp_path / "bad.yaml"), code=2).stderr
    (tmp_path / "typo.yaml").write_text("server: {prot: 1}\n")
    assert "'port'" in run("up", "-c", str(tmp_path / "typo.yaml"), code=2).stderr


def test_up_switches_migration_off_and_on(cluster: dict[str, Any], tmp_path: Path):
    (tmp_path / "off.yaml").write_text("scheduler: {migrate: false}\n")
    for flags, on in (
        ([], True),
        (["--no-migration"], False),
        (["-c", str(tmp_path / "off.yaml")], False),
        (["-c", str(tmp_path / "off.yaml"), "--enable-migration"], True),
    ):
        run("up", *flags)
        assert cluster["settings"].scheduler.migrate is on, flags


def test_a_taken_port_is_a_failure_that_names_the_flag_before_anything_starts(cluster: dict[str, Any]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in run("up", "--port", str(taken.getsockname()[1]), code=1).stderr
    assert not cluster


@pytest.mark.parametrize("command", [["up"], ["serve", "--scheduler", "tcp://x:1"]])
def test_a_public_bind_needs_insecure_in_so_many_words(cluster: dict[str, Any], command: list[str]):
    result = run(*command, "--host", "0.0.0.0", code=2)
    assert "--insecure" in result.stderr and "settings" not in cluster
    run(*command, "--host", "0.0.0.0", "--insecure")
    assert cluster["settings"].server.host == "0.0.0.0"
    run(*command, "--host", "localhost")


def test_serve_names_its_scheduler(cluster: dict[str, Any], tmp_path: Path):
    run("serve", "--scheduler", "tcp://10.0.0.1:8786", "--port", "0")
    assert cluster["scheduler"] == "tcp://10.0.0.1:8786"
    run("serve", code=2)
    (tmp_path / "d.json").write_text('{"model": "d"}')
    assert "deploy" in run("serve", "--scheduler", "x", "-c", str(tmp_path / "d.json"), code=2).stderr


# --- embeddings and adapters -----------------------------------------------------------------------------------------

EMBEDDING = {"dimensions": 3, "prompts": {}, "default_prompt": None, "lower_case": False}


def test_encode_prints_a_line_of_numbers_for_each_text(serve: Serve, tmp_path: Path):
    server = serve(m=FakeModel(embedding=EMBEDDING))
    ids = [byte_tokenizer().encode(text) for text in ("Hi", "you!")]
    rows = [[float(len(each)), float(each[0]), float(each[-1])] for each in ids]
    lines = ["\t".join(map(str, row)) for row in rows]
    assert run("encode", "m", "Hi").stdout.splitlines() == lines[:1]
    assert run("encode", "m", stdin="Hi\n").stdout.splitlines() == lines[:1]
    inputs = {
        "a.txt": "Hi\n\nyou!\n",
        "a.json": '{"model": "m", "input": ["Hi", "you!"]}',
        "a.jsonl": '"Hi"\n{"input": "you!"}\n',
    }
    for name, content in inputs.items():
        (tmp_path / name).write_text(content)
        assert run("encode", "m", "--input", str(tmp_path / name)).stdout.splitlines() == lines, name
    printed = run("encode", "m", "Hi", "--json", "--dimensions", "2").stdout
    assert json.loads(printed) == {"index": 0, "embedding": rows[0][:2]}
    assert server.gateway.asked[-1].dimensions == 2


def test_encode_says_what_is_wrong(serve: Serve, tmp_path: Path):
    serve(m=FakeModel(embedding=EMBEDDING), text=FakeModel())
    assert "generates text" in run("encode", "text", "Hi", code=1).stderr
    assert "not both" in run("encode", "m", "Hi", "--input", "x", code=2).stderr
    (tmp_path / "a.json").write_text('[{"prompt": "Hi"}]')
    assert "Item 1" in run("encode", "m", "--input", str(tmp_path / "a.json"), code=2).stderr


def test_deploy_takes_adapters_as_serverlessllm_does(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    server = serve()
    (tmp_path / "polite").mkdir()
    monkeypatch.chdir(tmp_path)
    run(
        "deploy",
        "qwen",
        "--source",
        "org/qwen",
        "--enable-lora",
        "--lora-adapters",
        "a=org/a b=./polite",
        "--lora-adapters",
        "c=org/c,d=org/d",
    )
    (deployment,) = server.gateway.registered
    assert deployment.backend_config.enable_lora
    assert deployment.backend_config.lora_adapters == {"a": "org/a", "b": str(tmp_path / "polite"), "c": "org/c", "d": "org/d"}
    assert "NAME=SOURCE" in run("deploy", "qwen", "--lora-adapters", "org/a", code=2).stderr


def test_delete_takes_adapters_away_and_leaves_the_model(serve: Serve):
    server = serve(m=FakeModel(adapters={"a": "org/a", "b": "org/b", "c": "org/c"}), other=FakeModel())
    assert run("delete", "m", "--lora-adapters", "a,b").output == "deleted a, b of m\n"
    assert server.gateway.deployed["m"].adapters == {"c": "org/c"}
    assert "'a'" in run("delete", "m", "--lora-adapters", "a", code=1).stderr
    run("delete", "m", "other", "--lora-adapters", "c", code=2)
    run("delete", "m", "--now", "--lora-adapters", "c", code=2)
    assert run("delete", "m").output == "deleted m\n"
    assert list(server.gateway.deployed) == ["other"]
