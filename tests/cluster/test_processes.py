"""What users see of a cluster of separate programs, with one worker of one slot for two models."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.cluster.harness import Processes, Stream, get, instances, post, until, workers

pytestmark = pytest.mark.cluster

LONG = {"prompt": "once upon a time", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def from_scratch() -> bool:
    return True


def reference(path: Path, prompt: str, max_tokens: int) -> str:
    """What plain ``generate()`` of transformers answers, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = None
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def text_of(stream: Stream) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in stream.chunks() if chunk["choices"])


def state_of(url: str, model: str) -> str:
    return {row["model"]: row["state"] for row in get(url, "/admin/models")["models"]}[model]


def n_running(url: str) -> list[int | None]:
    """Sequences in the engines, as the worker itself counts them."""
    return [(instance["engine"] or {}).get("n_running") for instance in instances(url)]


def test_two_models_take_turns_on_one_slot_and_both_answers_are_those_of_generate(url, checkpoints):
    for name in ("a", "b", "a"):
        answer = post(url, "/v1/completions", {"model": name, **SHORT})
        assert answer["choices"][0]["text"] == reference(checkpoints[name], SHORT["prompt"], SHORT["max_tokens"])
        (worker,) = workers(url)
        assert worker["slots_used"] == 1
        assert [model["model"] for model in worker["models"] if model["tier"] == "device"] == [name]


def test_a_short_answer_of_one_model_waits_for_the_long_one_of_the_other_and_hears_of_it(url, checkpoints):
    """The live-migration scenario of ServerlessLLM in its form without migration."""
    ended: dict[str, float] = {}
    texts: dict[str, str] = {}
    long_stream = Stream(url, {"model": "a", **LONG})
    chunks = long_stream.chunks()
    first = next(chunk for chunk in chunks if chunk["choices"][0]["text"])

    def rest_of_the_long_one() -> None:
        texts["a"] = first["choices"][0]["text"] + "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
        ended["a"] = time.monotonic()

    reader = threading.Thread(target=rest_of_the_long_one)
    reader.start()
    lines = list(Stream(url, {"model": "b", **SHORT}).lines())
    ended["b"] = time.monotonic()
    assert lines[0].startswith(": ")
    assert lines[-1] == "data: [DONE]"
    answers = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]
    texts["b"] = "".join(answer["choices"][0]["text"] for answer in answers)
    reader.join(60)
    assert ended["a"] < ended["b"]
    assert texts["a"] == reference(checkpoints["a"], LONG["prompt"], LONG["max_tokens"])
    assert texts["b"] == reference(checkpoints["b"], SHORT["prompt"], SHORT["max_tokens"])


def test_a_seeded_answer_is_the_same_alone_and_among_others(url):
    body = {"model": "a", "prompt": "hello world", "max_tokens": 40, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    alone = post(url, "/v1/completions", body)["choices"][0]["text"]
    others = [Stream(url, {"model": "a", "prompt": f"story {i}", "max_tokens": 200, "seed": i}) for i in range(6)]
    among = post(url, "/v1/completions", body)["choices"][0]["text"]
    for stream in others:
        stream.close()
    assert among == alone


def test_a_client_that_leaves_stops_the_engine(url):
    stream = Stream(url, {"model": "a", **LONG})
    next(stream.chunks())
    assert until("the request runs", lambda: [instance for instance in instances(url) if instance["n_requests"]])
    stream.close()
    until("the engine stopped", lambda: not any(instance["n_requests"] for instance in instances(url)), 5)
    until("the engine is empty", lambda: n_running(url) == [0], 5)


def test_an_idle_model_leaves_the_slot_after_its_keep_alive(url, checkpoints):
    source = {"pretrained_model_name_or_path": str(checkpoints["a"])}
    settings = {"model": "brief", "backend_config": source, "auto_scaling_config": {"keep_alive": 0.2}}
    assert post(url, "/register", settings)["status"] == "ok"
    post(url, "/v1/completions", {"model": "brief", **SHORT})
    until("the slot is free", lambda: workers(url)[0]["slots_used"] == 0, 5)
    until("its copy stays in memory", lambda: state_of(url, "brief") == "host", 5)
    assert post(url, "/delete", {"model": "brief"})["status"] == "deleted model brief"


def test_a_model_is_preloaded_to_the_memory_of_the_nodes_that_its_deployment_names(url, tmp_path):
    path = make_checkpoint(tmp_path / "early", "gpt2")
    deployment = {
        "model": "early",
        "backend_config": {"pretrained_model_name_or_path": str(path), "torch_dtype": "bfloat16"},
        "placement_config": {"memory_pool": ["0", "7"]},
    }
    answer = post(url, "/register", deployment)
    assert "'7' is not connected" in answer["warnings"][0]
    until("it is in memory", lambda: state_of(url, "early") == "host", 5)
    answer = post(url, "/v1/completions", {"model": "early", **SHORT})
    assert answer["usage"]["completion_tokens"] == SHORT["max_tokens"]
    post(url, "/delete", {"model": "early"})


def test_deleting_a_model_frees_its_memory(url, tmp_path):
    path = make_checkpoint(tmp_path / "passing", "opt")
    assert (
        post(url, "/register", {"model": "passing", "backend_config": {"pretrained_model_name_or_path": str(path)}})["status"]
        == "ok"
    )
    before = until("a is there", lambda: post(url, "/v1/completions", {"model": "a", **SHORT}) and workers(url)[0])
    post(url, "/v1/completions", {"model": "passing", **SHORT})
    post(url, "/delete", {"model": "passing"})
    until("its bytes are free", lambda: workers(url)[0]["tiers"]["host"]["used"] <= before["tiers"]["host"]["used"])
    answer = post(url, "/v1/completions", {"model": "passing", **SHORT})
    assert (answer["status"], answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("case", "status", "code", "words"),
    [
        ("missing", 400, "checkpoint_not_found", "no such directory"),
        ("truncated", 400, "checkpoint_corrupt", "model.safetensors"),
        ("unknown architecture", 400, "unsupported_architecture", "MambaForCausalLM"),
        ("unlisted architecture", 400, "unsupported_architecture", "no KV cache between two steps"),
        ("too large", 503, "insufficient_memory", "of memory, but a worker has"),
        ("no tokenizer", 400, "checkpoint_not_found", "tokenizer"),
    ],
)
def test_a_bad_checkpoint_gets_one_clear_error_and_nothing_else_is_lost(url, checkpoints, tmp_path, case, status, code, words):
    path = tmp_path / "model"
    if case != "missing":
        make_checkpoint(path, "llama", tokenizer=case != "no tokenizer")
    if case == "truncated":
        with (path / "model.safetensors").open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - 1000)
    if case == "unknown architecture":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    if case == "unlisted architecture":
        config = {"architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt", "n_embd": 64, "n_head": 4, "n_layer": 2}
        (path / "config.json").write_text(json.dumps(config))
    if case == "too large":
        with (path / "model.safetensors").open("wb") as file:
            header = json.dumps({"x": {"dtype": "U8", "shape": [2 * 1024**3], "data_offsets": [0, 2 * 1024**3]}}).encode()
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * 1024**3)
    answer = post(url, "/register", {"model": "bad", "backend_config": {"pretrained_model_name_or_path": str(path)}})
    if case == "no tokenizer" and answer["status"] == "ok":
        answer = post(url, "/v1/completions", {"model": "bad", **SHORT})
        post(url, "/delete", {"model": "bad"})
    assert (answer["status"], answer["error"]["code"]) == (status, code)
    assert words in answer["error"]["message"]
    assert post(url, "/v1/completions", {"model": "a", **SHORT})["choices"]


def test_bad_settings_name_the_nearest_right_one(url):
    answer = post(url, "/register", {"model": "x", "auto_scaling_config": {"keepalive": 1}})
    assert answer["status"] == 400
    assert "keep_alive" in answer["error"]["message"]


def test_a_killed_front_door_takes_only_its_own_requests_along(processes, url):
    other = processes.start_door("doomed")
    stream = Stream(other, {"model": "a", **LONG})
    next(stream.chunks())
    assert until("the request runs", lambda: [instance for instance in instances(url) if instance["n_requests"]])
    processes.stop("doomed", signal.SIGKILL)
    until("the engine stopped", lambda: not any(instance["n_requests"] for instance in instances(url)), 5)
    until("the engine is empty", lambda: n_running(url) == [0], 5)
    assert post(url, "/v1/completions", {"model": "a", **SHORT})["choices"]


def test_a_killed_worker_costs_a_pause_and_the_answers_are_those_of_an_undisturbed_run(processes, url):
    drawn = {**LONG, "temperature": 0.9, "seed": 7, "presence_penalty": 0.4, "repetition_penalty": 1.1}
    bodies = [{"model": "a", **body, "max_tokens": 1000} for body in (LONG, drawn)]
    undisturbed = [post(url, "/v1/completions", body) for body in bodies]
    streams = [Stream(url, {**body, "stream_options": {"include_usage": True}}) for body in bodies]
    begun = [stream.chunks() for stream in streams]
    heard = [[next(chunks)] for chunks in begun]
    whole = threading.Thread(target=lambda: heard.append([post(url, "/v1/completions", bodies[0])]))
    whole.start()
    (worker,) = workers(url)
    until("all three run", lambda: [each for each in instances(url) if each["n_requests"] == 3])
    os.kill(worker["pid"], signal.SIGKILL)
    for rest, chunks in zip(heard, begun, strict=False):
        rest += chunks
    whole.join()
    texts = ["".join(each["text"] for chunk in of for each in chunk["choices"]) for of in heard]
    assert texts == [undisturbed[0]["choices"][0]["text"], undisturbed[1]["choices"][0]["text"], texts[0]]
    assert [of[-1]["usage"]["completion_tokens"] for of in heard] == [1000, 1000, 1000]
    (again,) = workers(url)
    assert again["pid"] != worker["pid"]
    assert (again["slots_used"], again["instances"][0]["n_requests"]) == (1, 0)
    until("the engine is empty", lambda: n_running(url) == [0], 5)


def test_two_workers_each_run_the_model_that_their_name_was_given(tmp_path, checkpoints):
    cluster = Processes(tmp_path)
    try:
        cluster.start_scheduler()
        for node in ("0", "1"):
            cluster.start_worker(node)
        url = cluster.start_door()
        until("both workers joined", lambda: len(workers(url)) == 2)
        for model, node in (("a", "1"), ("b", "0")):
            source = {"pretrained_model_name_or_path": str(checkpoints[model])}
            deployment = {"model": model, "backend_config": source, "placement_config": {"target_nodes": [node]}}
            assert post(url, "/register", deployment)["status"] == "ok"
            answer = post(url, "/v1/completions", {"model": model, **SHORT})
            assert answer["choices"][0]["text"] == reference(checkpoints[model], SHORT["prompt"], SHORT["max_tokens"])
        ready = {worker["name"]: [instance["model"] for instance in worker["instances"]] for worker in workers(url)}
        assert ready == {"0": ["b"], "1": ["a"]}
        assert {row["node"] for row in get(url, "/admin/requests")["requests"]} == {"0", "1"}
    finally:
        cluster.close()


def test_without_a_worker_the_front_door_is_not_ready_and_says_what_to_do(tmp_path):
    cluster = Processes(tmp_path)
    try:
        cluster.start_scheduler(DASK_SLLMDASK__SCHEDULER__WORKER_WAIT="0.5")
        url = cluster.start_door()
        with pytest.raises(urllib.error.HTTPError) as error:
            get(url, "/ready")
        assert error.value.code == 503
        assert "dask worker" in json.load(error.value)["error"]["message"]
        answer = post(url, "/register", {"model": "a", "backend_config": {"pretrained_model_name_or_path": "demo:demo-llama"}})
        assert (answer["status"], answer["error"]["code"]) == (503, "no_worker")
    finally:
        cluster.close()


def test_a_front_door_without_a_scheduler_says_so_and_exits_with_3(tmp_path):
    cluster = Processes(tmp_path, from_scratch=True)
    process = cluster.start("door", "sllmdask", "serve", "--scheduler", "tcp://127.0.0.1:1", "--port", "0")
    assert process.wait(60) == 3
    assert "not reachable" in cluster.log("door")
    assert "Traceback" not in cluster.log("door")
