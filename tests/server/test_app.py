"""The front door, spoken to as clients speak: by raw HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from sllmdask.cluster.journal import Progress
from sllmdask.config import ServerSettings
from sllmdask.errors import ConfigError, LoadFailed, PortInUse, QueueFull, SllmError, WorkerLost
from sllmdask.server import app as server_app
from tests.fakes import FakeGateway, FakeModel, every_error
from tests.server.conftest import Door

pytestmark = pytest.mark.asyncio

OpenDoor = Callable[..., Awaitable[Door]]
HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


async def read_error(response: aiohttp.ClientResponse, status: int) -> dict:
    assert response.status == status
    assert response.content_type == "application/json"
    assert response.headers["x-request-id"]
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def read_events(response: aiohttp.ClientResponse) -> tuple[list[str], list[dict | str]]:
    """Comments and data of a stream, to its end."""
    comments, data = [], []
    for block in (await response.read()).decode().split("\n\n")[:-1]:
        if block.startswith(": "):
            comments.append(block[2:])
        else:
            assert block.startswith("data: ")
            data.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    return comments, data


async def test_a_chat_is_answered_in_openais_shape(open_door: OpenDoor):
    door = await open_door(m=FakeModel(cold_start="disk"))
    async with door.http.post("/v1/chat/completions", json=HI) as response:
        body = await response.json()
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json; charset=utf-8"
        assert response.headers["x-sllmdask-cold-start"] == "disk"
        assert response.headers["x-sllmdask-node"] == "0"
        assert response.headers["x-sllmdask-queue-ms"] == "250"
    n_prompt = len("<|user|>Hi\n<|assistant|>")
    assert body.pop("id").startswith("chatcmpl-") and isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello from a fake model.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": 24,
            "total_tokens": n_prompt + 24,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_a_chat_streams_role_then_text_then_reason_then_usage_then_done(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "Grüße"))
    ask = {**HI, "stream": True, "stream_options": {"include_usage": True}}
    async with door.http.post("/v1/chat/completions", json=ask) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["x-sllmdask-cold-start"] == "hit"
        comments, data = await read_events(response)
    assert comments == []
    *chunks, total, done = data
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [{"content": letter} for letter in "Grüße"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert total["choices"] == [] and total["usage"]["completion_tokens"] == 7
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, total]}) == 1


async def test_usage_is_not_streamed_unasked(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        _, data = await read_events(response)
    assert all("usage" not in chunk and chunk["choices"] for chunk in data[:-1])


async def test_usage_runs_along_when_asked_for(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda _: "abc"))
    ask = {**HI, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with door.http.post("/v1/chat/completions", json=ask) as response:
        _, data = await read_events(response)
    assert [chunk["usage"]["completion_tokens"] for chunk in data[1:-1]] == [1, 2, 3, 3, 3]


async def test_several_prompts_become_choices_of_one_completion(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=str.upper))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": ["ab", "cde"]}) as response:
        body = await response.json()
    assert body["object"] == "text_completion"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [(0, "AB", "stop"), (1, "CDE", "stop")]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 5)
    assert door.gateway.most_running == 2


async def test_several_prompts_stream_side_by_side(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=str.upper))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": ["ab", "cde"], "stream": True}) as response:
        _, data = await read_events(response)
    texts = {0: "", 1: ""}
    for chunk in data[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "AB", 1: "CDE"} and data[-1] == "[DONE]"


async def test_one_failing_prompt_closes_the_others(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=str.upper, pause=asyncio.Event(), pause_after=1, fail=WorkerLost("0")))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": ["ab", "cde"]}) as response:
        assert (await read_error(response, 502))["code"] == "worker_lost"
    assert door.gateway.n_running == 0


async def test_a_request_is_drawn_as_the_model_says_where_it_says_nothing_itself(open_door: OpenDoor):
    door = await open_door(m=FakeModel(sampling_defaults={"temperature": 0.6, "top_k": 20}))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x", "top_k": 5}) as response:
        assert response.status == 200
    params = door.gateway.asked[0].params
    assert (params.temperature, params.top_k) == (0.6, 5)


async def test_token_ids_are_a_prompt_and_ids_of_another_tokenizer_are_not(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": [1, 2, 3]}) as response:
        assert response.status == 200
    assert door.gateway.asked[0].prompt_ids == [1, 2, 3]
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": [1, 151_643]}) as response:
        error = await read_error(response, 400)
    assert error["param"] == "prompt" and "151643" in error["message"]


async def test_models_are_listed_cold_ones_too(open_door: OpenDoor):
    door = await open_door(**{"org/warm": FakeModel(created=7), "cold": FakeModel(state="disk", max_model_len=99)})
    async with door.http.get("/v1/models") as response:
        body = await response.json()
    assert body["object"] == "list"
    assert body["data"][0] == {
        "id": "org/warm",
        "object": "model",
        "created": 7,
        "owned_by": "sllmdask",
        "max_model_len": 1024,
        "status": {"value": "loaded"},
    }
    assert body["data"][1]["status"] == {"value": "unloaded"}


@pytest.mark.parametrize(
    "path", ["/v1/models/org/warm", "/v1/models/org%2Fwarm", "/v1//models/org/warm/", "//v1/models/org/warm"]
)
async def test_a_model_is_found_however_its_slash_is_written(open_door: OpenDoor, path: str):
    from yarl import URL

    door = await open_door(**{"org/warm": FakeModel()})
    async with door.http.get(URL(door.url + path, encoded=True)) as response:
        assert (await response.json())["id"] == "org/warm"


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models/", "//v1/models//", "/admin/cluster/", "/health/"])
async def test_doubled_and_trailing_slashes_are_tolerated(open_door: OpenDoor, path: str):
    door = await open_door(m=FakeModel())
    async with door.http.get(aiohttp.client.URL(door.url + path, encoded=True)) as response:
        assert response.status == 200


async def test_an_unknown_model_is_404_with_near_names_also_before_a_stream(open_door: OpenDoor):
    door = await open_door(qwen=FakeModel())
    for stream in (False, True):
        async with door.http.post("/v1/chat/completions", json={**HI, "model": "qwem", "stream": stream}) as response:
            error = await read_error(response, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert "Could not find" in error["message"] and "does not exist" in error["message"] and "'qwen'" in error["message"]
    async with door.http.get("/v1/models/qwem") as response:
        assert "'qwen'" in (await read_error(response, 404))["message"]


async def test_a_prompt_over_the_window_is_refused_with_both_numbers(open_door: OpenDoor):
    door = await open_door(m=FakeModel(max_model_len=100))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x" * 100, "stream": True}) as response:
        error = await read_error(response, 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].count("100 tokens") == 2
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x" * 99, "max_tokens": 50}) as response:
        assert (await response.json())["choices"][0]["finish_reason"] == "length"
    assert door.gateway.asked[0].params.max_tokens == 1


async def test_a_long_prompt_is_tokenised_off_the_loop_to_the_same_ids(open_door: OpenDoor):
    door = await open_door(m=FakeModel(max_model_len=100_000))
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x" * 30_000}) as response:
        assert (await response.json())["usage"]["prompt_tokens"] == 30_000


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "/nothing", None, {}, 404, "not_found"),
        ("GET", "/v1/models/", None, {}, 200, None),
        ("GET", "/v1/chat/completions", None, {}, 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", {}, 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{", {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"", {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"[]", {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"\xff\xfe\xfd", {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"temperature": NaN}', {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"[" * 200_000, {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"1" * 10_000, {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b"a=1", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/chat/completions", b" " * 300_000, {"Content-Type": "application/json"}, 413, "body_too_large"),
        ("POST", "/register", b"{}", {"Content-Type": "application/json"}, 400, "invalid_config"),
        ("POST", "/delete", b"{}", {"Content-Type": "application/json"}, 400, "invalid_request"),
        ("POST", "/delete", b'{"model":"x"}', {"Content-Type": "application/json"}, 404, "model_not_found"),
    ],
)
async def test_what_is_no_good_request_gets_the_envelope(open_door: OpenDoor, method, path, body, headers, status, code):
    door = await open_door(m=FakeModel(), max_body_bytes=256 * 1024)
    async with door.http.request(method, path, data=body, headers=headers) as response:
        if code is None:
            assert response.status == status
            return
        error = await read_error(response, status)
        assert error["code"] == code
        assert "Traceback" not in error["message"]
        if status == 405:
            assert response.headers["Allow"] in ("POST", "GET,HEAD", "GET, HEAD")


async def test_a_body_without_a_length_is_cut_at_the_limit_too(open_door: OpenDoor):
    door = await open_door(m=FakeModel(), max_body_bytes=2048)

    async def pieces():
        for _ in range(10):
            yield b" " * 1024

    async with door.http.post("/v1/completions", data=pieces(), headers={"Content-Type": "application/json"}) as response:
        assert (await read_error(response, 413))["code"] == "body_too_large"


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
async def test_every_error_of_the_gateway_is_the_envelope_that_its_class_says(open_door: OpenDoor, error: SllmError):
    door = await open_door(m=FakeModel(refuse=error))
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        got = await read_error(response, error.http_status)
        assert got == {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        retry = response.headers.get("Retry-After")
        assert retry is None or 0 < int(retry) <= 120
        assert (retry is not None) == (getattr(error, "retry_after_s", None) is not None)


async def test_a_long_retry_is_cut_to_what_clients_honour(open_door: OpenDoor):
    full = QueueFull("m", 3)
    full.retry_after_s = 900
    door = await open_door(m=FakeModel(refuse=full))
    async with door.http.post("/v1/chat/completions", json=HI) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "120")


async def test_an_error_that_is_not_ours_stays_in_the_log(open_door: OpenDoor, caplog: pytest.LogCaptureFixture):
    door = await open_door(m=FakeModel(refuse=ZeroDivisionError("secret")))
    async with door.http.post("/v1/chat/completions", json=HI, headers={"x-request-id": "abc"}) as response:
        error = await read_error(response, 500)
    assert "secret" not in error["message"] and "abc" in error["message"]
    assert "ZeroDivisionError: secret" in caplog.text and "request=abc" in caplog.text


async def test_an_error_in_the_middle_of_a_stream_is_a_frame_and_the_end(open_door: OpenDoor):
    door = await open_door(m=FakeModel(fail=WorkerLost("0"), fail_after=3))
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        assert response.status == 200
        _, data = await read_events(response)
    assert data[-1]["error"]["code"] == "worker_lost"
    assert "[DONE]" not in data
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data[:-1]) == "Hel"


async def test_a_request_id_is_taken_if_it_is_fit_for_a_header_and_made_otherwise(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/chat/completions", json=HI, headers={"x-request-id": "my-id:1"}) as response:
        assert response.headers["x-request-id"] == "my-id:1"
    assert door.gateway.asked[-1].id == "my-id:1"
    for unfit in ("a b", "x" * 129, "é", ""):
        async with door.http.get("/health", headers={"x-request-id": unfit}) as response:
            assert response.headers["x-request-id"].startswith("req-")
    async with door.http.get("/nothing", headers={"x-request-id": "lost"}) as response:
        assert response.headers["x-request-id"] == "lost"


async def test_an_id_in_use_is_echoed_but_not_given_to_a_second_request(open_door: OpenDoor):
    gate = asyncio.Event()
    door = await open_door(m=FakeModel(gate=gate))
    headers = {"x-request-id": "same"}
    both = [asyncio.create_task(_post(door, headers)) for _ in range(2)]
    await door.gateway.until(lambda: len(door.gateway.asked) == 2)
    gate.set()
    assert [await task for task in both] == ["same", "same"]
    ids = {request.id for request in door.gateway.asked}
    assert len(ids) == 2 and "same" in ids


async def _post(door: Door, headers: dict[str, str]) -> str:
    async with door.http.post("/v1/chat/completions", json=HI, headers=headers) as response:
        assert response.status == 200
        return response.headers["x-request-id"]


async def test_while_a_model_loads_comments_tell_how_far_it_is(open_door: OpenDoor, headers_wait: Callable[[float], None]):
    headers_wait(0.01)
    gate = asyncio.Event()
    loading = [Progress("loading", "loading m 10% disk 2.9 GiB/s", 1, 10), Progress("loading", "loading m\n61%", 6, 10)]
    door = await open_door(m=FakeModel(loading=loading, gate=gate, cold_start="disk"), heartbeat=0.02)
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        assert response.status == 200 and "x-sllmdask-node" not in response.headers
        assert await response.content.readuntil(b"\n\n") == b": waiting for m\n\n"
        seen = [await response.content.readuntil(b"\n\n") for _ in range(4)]
        gate.set()
        comments, data = await read_events(response)
    assert seen[:2] == [b": loading m 10% disk 2.9 GiB/s\n\n", b": loading m 61%\n\n"]
    assert set(seen[2:]) == {b": loading m 61%\n\n"}, "the heartbeat repeats what was said last"
    assert "x-sllmdask-cold-start: disk" in comments and "x-sllmdask-node: 0" in comments
    assert data[-1] == "[DONE]"


async def test_an_instance_that_is_still_read_is_told_of_until_its_first_token(open_door: OpenDoor):
    pause = asyncio.Event()
    reading = [Progress("loading", f"loading m {percent}% disk 2.9 GiB/s", percent, 100) for percent in (10, 61)]
    model = FakeModel(answer=lambda _: "ab", reading=reading, pause=pause, cold_start="disk")
    door = await open_door(m=model, heartbeat=0.02)
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": True}) as response:
        assert response.headers["x-sllmdask-cold-start"] == "disk"
        seen = [await response.content.readuntil(b"\n\n") for _ in range(4)]
        model.pause, model.pause_after = asyncio.Event(), 1
        pause.set()
        while (said := await response.content.readuntil(b"\n\n")).startswith(b": "):
            assert said == seen[3]
        assert b'"text":"a"' in said
        assert await response.content.readuntil(b"\n\n") == b": working\n\n"
        model.pause.set()
        assert (await read_events(response))[1][-1] == "[DONE]"
    assert seen[:2] == [b": loading m 10% disk 2.9 GiB/s\n\n", b": loading m 61% disk 2.9 GiB/s\n\n"]
    assert seen[2:] == seen[1:2] * 2, "the heartbeat repeats what was said last"


async def test_the_headers_are_those_of_the_instance_that_answered(open_door: OpenDoor):
    door = await open_door(m=FakeModel(died=["7", "8"], cold_start="disk"))
    where = {"x-sllmdask-node": "0", "x-sllmdask-cold-start": "disk", "x-sllmdask-queue-ms": "250"}
    for prompt in ("x", ["x", "y"]):
        async with door.http.post("/v1/completions", json={"model": "m", "prompt": prompt}) as response:
            assert {name: response.headers[name] for name in where} == where
    async with door.http.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": True}) as response:
        comments, _ = await read_events(response)
    assert comments[-3:] == [f"{name}: {where[name]}" for name in sorted(where)]


async def test_a_warm_model_needs_no_comments(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        assert (await read_events(response))[0] == []


async def test_a_stream_that_waits_opens_with_a_comment(open_door: OpenDoor, headers_wait: Callable[[float], None]):
    headers_wait(0.01)
    gate = asyncio.Event()
    door = await open_door(m=FakeModel(gate=gate), heartbeat=60)
    async with asyncio.timeout(2), door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": waiting for m\n\n"
        gate.set()
        assert (await read_events(response))[1][-1] == "[DONE]"


async def test_a_failed_load_after_the_headers_is_an_error_frame(open_door: OpenDoor, headers_wait: Callable[[float], None]):
    headers_wait(0.01)
    gate = asyncio.Event()
    door = await open_door(m=FakeModel(gate=gate, refuse=LoadFailed("m", "truncated")))
    async with door.http.post("/v1/chat/completions", json={**HI, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        gate.set()
        assert (await read_events(response))[1] == [
            {
                "error": {
                    "message": "Model 'm' could not be loaded: truncated",
                    "type": "service_unavailable",
                    "param": None,
                    "code": "load_failed",
                }
            }
        ]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["waiting", "running"])
async def test_a_client_that_leaves_cancels_its_request(open_door: OpenDoor, headers_wait, stream: bool, stage: str):
    headers_wait(0.01)
    held = {"gate": asyncio.Event()} if stage == "waiting" else {"pause": asyncio.Event(), "pause_after": 3}
    door = await open_door(m=FakeModel(**held), heartbeat=60)
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({**HI, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await door.gateway.until(lambda: door.gateway.n_running == 1)
    if stream:
        await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    async with asyncio.timeout(1):
        await door.gateway.until(lambda: len(door.gateway.closed) == 1)
    assert door.gateway.n_running == 0


async def test_a_slow_reader_holds_back_only_itself(open_door: OpenDoor):
    door = await open_door(long=FakeModel(answer=lambda _: "x" * 200_000, max_model_len=10**6), m=FakeModel(), heartbeat=60)
    slow = door.http.post("/v1/completions", json={"model": "long", "prompt": "a", "stream": True}, read_bufsize=2**10)
    async with slow as response:
        await response.content.readany()
        n_tokens = [-1, 0]
        while n_tokens[-1] != n_tokens[-2]:  # until the buffers between the two are full
            async with door.http.post("/v1/chat/completions", json=HI) as other:
                assert other.status == 200
            n_tokens.append(door.gateway.requests()[0]["n_tokens"])
        assert n_tokens[-1] < 200_000, "tokens that nobody reads are not taken from the gateway"
        response.close()
    await door.gateway.until(lambda: door.gateway.n_running == 0)


async def test_many_streams_at_once_are_each_whole(open_door: OpenDoor):
    door = await open_door(m=FakeModel(answer=lambda prompt: prompt * 20, max_model_len=10_000))

    async def one(i: int) -> str:
        async with door.http.post("/v1/completions", json={"model": "m", "prompt": f"{i};", "stream": True}) as response:
            _, data = await read_events(response)
        return "".join(chunk["choices"][0]["text"] for chunk in data[:-1])

    assert await asyncio.gather(*(one(i) for i in range(64))) == [f"{i};" * 20 for i in range(64)]


async def test_a_stopping_server_lets_requests_end_and_tells_the_late_ones(open_door: OpenDoor, monkeypatch):
    monkeypatch.setattr(server_app, "STOP_GRACE_S", 0.2)
    quick, never = asyncio.Event(), asyncio.Event()
    door = await open_door(quick=FakeModel(gate=quick), late=FakeModel(pause=never, pause_after=2), cold=FakeModel(gate=never))
    ends = door.http.post("/v1/chat/completions", json={**HI, "model": "quick"})
    late = door.http.post("/v1/chat/completions", json={**HI, "model": "late", "stream": True})
    cold = door.http.post("/v1/chat/completions", json={**HI, "model": "cold"})
    tasks = [asyncio.create_task(_status_and_text(request)) for request in (ends, late, cold)]
    await door.gateway.until(lambda: door.gateway.n_running == 3)
    stopping = asyncio.create_task(door.stop())
    quick.set()
    (ended, _), (streamed, text), (refused, why) = await asyncio.gather(*tasks)
    await stopping
    assert (ended, streamed, refused) == (200, 200, 503)
    assert "stopping" in text and '"error"' in text and "stopping" in why


async def _status_and_text(request: object) -> tuple[int, str]:
    async with request as response:  # type: ignore[attr-defined]
        return response.status, await response.text()


async def test_health_is_about_the_process_and_ready_about_work(open_door: OpenDoor):
    door = await open_door()
    door.gateway.ready = False
    async with door.http.get("/health") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with door.http.get("/ready") as response:
        assert (await read_error(response, 503))["message"] == "No worker is connected."
        assert "Retry-After" in response.headers
    door.gateway.ready = True
    async with door.http.get("/ready") as response:
        assert response.status == 200


async def test_a_serverlessllm_deployment_registers_and_says_what_has_no_effect(open_door: OpenDoor):
    door = await open_door()
    deployment = {
        "model": "facebook/opt-1.3b",
        "backend": "transformers",
        "num_gpus": 1,
        "auto_scaling_config": {"metric": "concurrency", "target": 1, "min_instances": 0, "max_instances": 10, "keep_alive": 0},
        "placement_config": {"target_nodes": ["0"]},
        "router_config": {"migration_delta": 5},
        "backend_config": {"pretrained_model_name_or_path": "facebook/opt-1.3b", "device_map": "cpu", "torch_dtype": "float16"},
    }
    async with door.http.post("/register", json=deployment) as response:
        body = await response.json()
    assert body["status"] == "ok" and body["model"] == "facebook/opt-1.3b" and "device_map" in body["warnings"][0]
    async with door.http.post("/delete", json={"model": "facebook/opt-1.3b"}) as response:
        assert (await response.json())["status"] == "deleted model facebook/opt-1.3b"
    assert door.gateway.models() == []


async def test_a_bad_deployment_is_refused_with_the_nearest_key(open_door: OpenDoor):
    door = await open_door()
    async with door.http.post("/register", json={"model": "a", "num_gpu": 1}) as response:
        error = await read_error(response, 400)
    assert error["code"] == "invalid_config" and "'num_gpus'" in error["message"] and error["param"] == "num_gpu"
    missing = {"model": "a", "backend_config": {"pretrained_model_name_or_path": "/missing/a"}}
    async with door.http.post("/register", json=missing) as response:
        assert (await read_error(response, 400))["code"] == "checkpoint_not_found"


async def test_operators_see_the_cluster_the_models_and_the_requests(open_door: OpenDoor):
    door = await open_door(m=FakeModel())
    async with door.http.post("/v1/chat/completions", json=HI, headers={"x-request-id": "seen"}) as response:
        assert response.status == 200
    async with door.http.get("/admin/cluster") as response:
        assert (await response.json())["workers"][0]["models"][0]["model"] == "m"
    async with door.http.get("/admin/models") as response:
        assert (await response.json())["models"][0]["state"] == "ready"
    async with door.http.get("/admin/requests") as response:
        row = (await response.json())["requests"][0]
    assert row["id"] == "seen" and row["n_tokens"] == 24 and row["path"] == ["0"]


async def test_a_taken_port_and_a_foreign_address_are_each_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(PortInUse, match="--port"):
            await server_app.start(server_app.make_app(FakeGateway(), settings), settings)
        with pytest.raises(PortInUse):
            server_app.check_address(settings)
    server_app.check_address(settings)
    elsewhere = ServerSettings(host="192.0.2.1", port=0)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        await server_app.start(server_app.make_app(FakeGateway(), elsewhere), elsewhere)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        server_app.check_address(elsewhere)
