"""The Python client, against a front door over a fake gateway."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from sllmdask import errors
from sllmdask.client import AsyncClient, Client, Response, ServerError, ServerUnreachable, server_error
from sllmdask.cluster.journal import Progress
from sllmdask.server import stream
from tests.fakes import FakeGateway, FakeModel, ServerThread, byte_tokenizer, every_error

Serve = Callable[..., ServerThread]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda **models: stack.enter_context(ServerThread(lambda: FakeGateway(**models)))


def test_it_needs_neither_dask_nor_torch():
    code = "import sys, sllmdask; sllmdask.Client; print([m for m in ('dask','distributed','torch','numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_submitted_prompt_is_a_turn_of_a_chat_and_its_future_has_the_text(serve: Serve):
    server = serve(m=FakeModel(answer=lambda prompt: prompt, cold_start="disk"))
    with Client(server.url) as client:
        future = client.submit("m", "Hello", max_tokens=300)
        assert future.result(timeout=10) == "<|user|>Hello\n<|assistant|>"
        assert future.done() and not future.cancel()
        response = future.response()
    assert response == Response(
        id=server.gateway.asked[0].id,
        model="m",
        text="<|user|>Hello\n<|assistant|>",
        finish_reason="stop",
        usage=response.usage,
        cold_start="disk",
        node="0",
        queue_ms=250,
        choices=[{"index": 0, "text": response.text, "finish_reason": "stop", "logprobs": None}],
    )
    assert response.usage["completion_tokens"] == 27


def test_a_model_is_loaded_and_unloaded_and_files_are_pulled(serve: Serve):
    server = serve(m=FakeModel(state="disk", cold_start="peer"))
    with Client(server.url) as client:
        loaded = client.load("m", node="1")
        assert (loaded["state"], loaded["node"], loaded["cold_start"]) == ("ready", "1", "peer")
        assert client.load("m", tier="host", wait=False)["state"] == "loading"
        assert client.unload("m")["instances"] == [{"instance": "m/1", "node": "0"}]
        assert client.pull("org/x", node="1")["fetched"] is True
        assert client.migrate("1", request="r-1")["moves"][0]["destination"] == "1"
        assert client.drain("0")["state"] == "drained" and client.drain("0", undo=True)["state"] == "ready"
        with pytest.raises(errors.MoveFailed, match="no room"):
            client.migrate("1", request="stuck")
        with pytest.raises(errors.ModelNotFound):
            client.load("none")
    assert server.gateway.operated[:4] == [
        ("load", "m", "1", "device", True),
        ("load", "m", None, "host", False),
        ("unload", "m", None, True),
        ("pull", None, "org/x", "1", True),
    ]


def test_messages_and_raw_prompts_are_prompts_too(serve: Serve):
    server = serve(m=FakeModel(answer=lambda prompt: prompt))
    with Client(server.url + "/v1/") as client:
        assert client.submit("m", [{"role": "system", "content": "S"}]).result() == "<|system|>S\n<|assistant|>"
        assert client.submit("m", "Once", chat=False, stop="c").result() == "On"


def test_pieces_come_while_the_request_runs(serve: Serve):
    pause = asyncio.Event()
    server = serve(m=FakeModel(answer=lambda _: "abcdef", pause=pause, pause_after=3))
    with Client(server.url) as client:
        future = client.submit("m", "x")
        pieces = iter(future)
        assert [next(pieces) for _ in range(3)] == ["a", "b", "c"]
        assert not future.done()
        with pytest.raises(TimeoutError):
            future.result(timeout=0.01)
        server.open(pause)
        assert "".join(pieces) == "def"
        assert list(future) == list("abcdef"), "every reader starts at the beginning"


def test_pieces_come_in_another_event_loop_too(serve: Serve):
    server = serve(m=FakeModel(answer=lambda _: "abc"))
    with Client(server.url) as client:

        async def read() -> tuple[list[str], str]:
            future = client.submit("m", "x")
            return [piece async for piece in future], await future

        assert asyncio.run(read()) == (["a", "b", "c"], "abc")


def test_cancelling_frees_the_place_in_the_cluster(serve: Serve):
    server = serve(m=FakeModel(gate=asyncio.Event()))
    with Client(server.url) as client:
        future = client.submit("m", "x")
        server.until(lambda: server.gateway.n_running == 1)
        assert future.cancel()
        with pytest.raises(errors.Cancelled):
            future.result(timeout=5)
        server.until(lambda: server.gateway.n_running == 0)
    assert server.gateway.closed == [server.gateway.asked[0].id]


def test_leaving_a_stream_early_cancels_it(serve: Serve):
    server = serve(m=FakeModel(pause=asyncio.Event(), pause_after=2))
    with Client(server.url) as client:
        pieces = client.stream("m", "x")
        assert next(pieces) == "H"
        pieces.close()
        server.until(lambda: len(server.gateway.closed) == 1)


def test_closing_the_client_cancels_what_runs(serve: Serve):
    server = serve(m=FakeModel(gate=asyncio.Event()))
    client = Client(server.url)
    future = client.submit("m", "x")
    server.until(lambda: server.gateway.n_running == 1)
    client.close()
    client.close()
    server.until(lambda: len(server.gateway.closed) == 1)
    with pytest.raises(errors.Cancelled):
        future.result()


def test_map_gathers_in_order_and_keeps_its_bound(serve: Serve):
    server = serve(m=FakeModel(answer=str.upper))
    prompts = [f"p{i}" for i in range(40)]
    with Client(server.url) as client:
        futures = client.map("m", prompts, max_in_flight=5, chat=False)
        assert client.gather(futures) == [prompt.upper() for prompt in prompts]
    assert 1 < server.gateway.most_running <= 5


def test_the_first_failure_of_a_gathering_cancels_the_rest(serve: Serve):
    server = serve(m=FakeModel(gate=asyncio.Event()), bad=FakeModel(refuse=errors.LoadFailed("bad", "why")))
    with Client(server.url) as client:
        futures = [client.submit("m", "x"), client.submit("bad", "x")]
        with pytest.raises(errors.LoadFailed):
            client.gather(futures)
        with pytest.raises(errors.Cancelled):
            futures[0].result(timeout=5)


def test_progress_is_told_while_a_model_loads(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "HEADER_GRACE_S", 0.0)
    gate = asyncio.Event()
    server = serve(m=FakeModel(loading=[Progress("loading", "loading m 61% disk 2.9 GiB/s")], gate=gate, cold_start="disk"))
    with Client(server.url) as client:
        said: list[str] = []
        future = client.submit("m", "x", on_progress=lambda text: (said.append(text), server.open(gate)))
        assert future.result(timeout=5)
        assert said[:2] == ["waiting", "waiting for m"]
        assert said[-1] == future.progress == "loading m 61% disk 2.9 GiB/s"
        assert future.response().cold_start == "disk", "it came as a comment: the headers had gone"


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_an_error_of_the_server_is_the_class_that_its_code_names(error: errors.SllmError):
    envelope = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    told = server_error(error.http_status, envelope, "rid")
    assert isinstance(told, ServerError)
    if type(error) not in (errors.SllmError, errors.RequestError, errors.PortInUse, errors.DeterminismUnavailable):
        assert isinstance(told, type(error))
    again = pickle.loads(pickle.dumps(told))
    for one in (told, again):
        assert (one.message, one.http_status, one.code, one.param) == (
            error.message,
            error.http_status,
            error.code,
            error.param,
        )
        assert one.request_id == "rid"


def test_errors_over_our_own_connections_are_not_confused_by_the_clients_classes():
    for error in every_error():
        assert type(errors.from_wire(error.as_wire())) is type(error)


def test_errors_reach_the_caller_before_and_in_the_middle_of_an_answer(serve: Serve):
    server = serve(m=FakeModel(fail=errors.WorkerLost("0"), fail_after=2))
    with Client(server.url) as client:
        with pytest.raises(errors.ModelNotFound, match="does not exist"):
            client.submit("none", "x").result()
        with pytest.raises(errors.InvalidRequest, match="temperature"):
            client.submit("m", "x", temperature=-1).result()
        future = client.submit("m", "x")
        with pytest.raises(errors.WorkerLost):
            future.result()
        assert future._pieces == ["H", "e"]
        with pytest.raises(errors.WorkerLost):
            list(future)


def test_deployments_come_and_go(serve: Serve):
    server = serve()
    with Client(server.url) as client:
        deployed = client.deploy("qwen", source="/models/qwen", num_gpus=2, backend_config={"device_map": "cpu"})
        assert deployed["model"] == "qwen" and len(deployed["warnings"]) == 1
        assert [model["id"] for model in client.models()] == ["qwen"]
        client.delete("qwen")
        assert client.models() == []
        with pytest.raises(errors.ModelNotFound):
            client.delete("qwen")
        with pytest.raises(errors.ConfigError, match="num_gpus"):
            client.register({"model": "a", "num_gpu": 2})
        with pytest.raises(errors.CheckpointNotFound):
            client.deploy("a", source="/missing/a")


def test_status_is_one_picture(serve: Serve):
    server = serve(m=FakeModel())
    server.gateway.ready = False
    with Client(server.url) as client:
        status = client.status()
    assert list(status) == ["url", "ready", "reason", "workers", "moves", "warnings", "models", "requests"]
    assert (status["ready"], status["reason"]) == (False, "No worker is connected.")


def test_a_server_that_is_not_there_says_what_to_do():
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(ServerUnreachable, match="sllmdask up"):
            client.models()
        with pytest.raises(ServerUnreachable):
            client.submit("m", "x").result()
    with Client("nonsense") as client, pytest.raises(errors.ConfigError, match="not a server's URL"):
        client.models()


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_SERVER_URL", "http://there:1/")
    with Client() as client:
        assert client.url == "http://there:1"


def test_a_silent_server_times_out(serve: Serve):
    server = serve(m=FakeModel(gate=asyncio.Event()))
    with Client(server.url, timeout=0.2) as client, pytest.raises(TimeoutError, match="no sign of life"):
        client.submit("m", "x").result()


def test_a_forgotten_client_ends_its_thread(serve: Serve):
    server = serve(m=FakeModel())
    client = Client(server.url)
    client.submit("m", "x").result()
    thread = client._thread
    del client
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.asyncio
async def test_the_async_client_has_the_same_methods(serve: Serve):
    server = await asyncio.to_thread(serve, m=FakeModel(answer=str.upper))
    async with AsyncClient(server.url) as client:
        future = client.submit("m", "ab", chat=False)
        assert [piece async for piece in future] == ["A", "B"]
        assert await future == "AB"
        assert await client.gather(client.map("m", ["ab", "cd"], chat=False)) == ["AB", "CD"]
        assert [piece async for piece in client.stream("m", "ab", chat=False)] == ["A", "B"]
        assert (await client.models())[0]["id"] == "m"
        await client.deploy("b", source="x")
        await client.delete("b")
        assert (await client.status())["ready"]
        waiting = client.submit("m", "x")
        with pytest.raises(RuntimeError, match="await future"):
            waiting.result()
        assert await waiting
        with pytest.raises(errors.ModelNotFound):
            await client.submit("none", "x")


def test_log_probabilities_of_a_stream_are_put_together(serve: Serve):
    server = serve(m=FakeModel(answer=lambda _: "aü"))
    with Client(server.url) as client:
        chat = client.submit("m", "x", logprobs=2).response(10)
        raw = client.submit("m", "x", chat=False, logprobs=0, echo=True).response(10)
        plain = client.submit("m", "x").response(10)
    assert [entry["token"] for entry in chat.logprobs["content"]] == ["a", "\\xc3", "\\xbc"]
    assert {len(entry["top_logprobs"]) for entry in chat.logprobs["content"]} == {2}
    assert chat.logprobs["refusal"] is None
    assert raw.text == "xaü"
    assert raw.logprobs["tokens"] == ["x", "a", "\\xc3", "\\xbc"]
    assert raw.logprobs["text_offset"] == [0, 1, 2, 2]
    assert plain.logprobs is None


def test_of_several_answers_the_first_is_the_text_and_all_are_choices(serve: Serve):
    server = serve(m=FakeModel(answer=str.upper))
    with Client(server.url) as client:
        future = client.submit("m", "ab", chat=False, n=3, logprobs=1)
        assert list(future) == ["A", "B"]
        response = future.response(10)
    assert response.text == "AB"
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in response.choices] == [
        (index, "AB", "stop") for index in range(3)
    ]
    assert response.choices[0]["logprobs"] == response.logprobs
    assert response.usage["prompt_tokens"] == 2


def test_embeddings_come_in_the_order_of_the_inputs_however_many_there_are(serve: Serve):
    embedding = {"dimensions": 3, "prompts": {"query": "? "}, "default_prompt": None, "lower_case": False}
    server = serve(m=FakeModel(embedding=embedding))
    texts = [f"{'x' * (i % 7)} {i}" for i in range(600)]

    def vector(text: str) -> list[float]:
        ids = byte_tokenizer().encode(text)
        return [float(len(ids)), float(ids[0]), float(ids[-1])]

    with Client(server.url) as client:
        assert client.embed("m", texts) == [vector(text) for text in texts]
        assert len(server.gateway.asked) == 3
        assert client.embed("m", "one") == [vector("one")]
        assert client.embed("m", [[1, 2], [3]], dimensions=2) == [[2.0, 1.0], [1.0, 3.0]]
        assert client.embed("m", "one", prompt_name="query") == [vector("? one")]
        assert client.embed("m", []) == []
        with pytest.raises(errors.InvalidRequest, match="3 numbers"):
            client.embed("m", texts, dimensions=4)


def test_a_model_for_the_other_task_is_told(serve: Serve):
    server = serve(m=FakeModel(embedding={"dimensions": 3}), text=FakeModel())
    with Client(server.url) as client:
        with pytest.raises(errors.WrongTask):
            client.embed("text", "Hi")
        with pytest.raises(errors.WrongTask):
            client.submit("m", "Hi").result(timeout=10)


def test_an_adapter_is_asked_for_by_name(serve: Serve):
    server = serve(m=FakeModel(adapters={"polite": "org/polite"}))
    with Client(server.url) as client:
        client.submit("m", "Hi", lora_adapter_name="polite").result(timeout=10)
        client.submit("m:polite", "Hi").result(timeout=10)
        assert [asked.adapter for asked in server.gateway.asked] == [("polite", "org/polite")] * 2
        with pytest.raises(errors.AdapterNotFound, match="polite"):
            client.submit("m", "Hi", lora_adapter_name="polit").result(timeout=10)
