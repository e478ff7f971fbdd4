"""Embedding models behind separate programs: deployed, loaded, asked, unloaded as any other model."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from sllmdask import Client
from tests.checkpoints import VOCAB, make_checkpoint, make_tokenizer
from tests.cluster.harness import BIN, Processes, get, post, until, workers

pytestmark = pytest.mark.cluster

TEXTS = ["hello world", "the quick brown fox", "once upon a time", "dog"]


def make_encoder_checkpoint(path: Path) -> Path:
    """A random BERT with sentence-transformers' files (mean, normalised, a window of 64) and a tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, where) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedders")
    return {"bert": make_encoder_checkpoint(root / "bert"), "qwen": make_checkpoint(root / "qwen", "qwen2")}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Iterator[str]:
    """One worker of one slot; ``bert``, ``qwen`` that generates, and ``qwen-embed``, the same checkpoint for embeddings."""
    cluster = Processes(tmp_path_factory.mktemp("embedding"))
    try:
        cluster.start_scheduler()
        cluster.start_worker("0")
        url = cluster.start_door()
        until("the worker joined", lambda: workers(url))
        register(url, "bert", paths["bert"], hf_model_class="AutoModel", torch_dtype="float32")
        register(url, "qwen", paths["qwen"])
        register(url, "qwen-embed", paths["qwen"], task="embed")
        yield url
    finally:
        cluster.close()


def register(url: str, model: str, path: Path, **backend: Any) -> None:
    reply = post(url, "/register", {"model": model, "backend_config": {"pretrained_model_name_or_path": str(path), **backend}})
    assert reply["status"] == "ok", reply


def expected(path: Path, text: str, pooling: str) -> torch.Tensor:
    """What plain transformers makes of one text, alone."""
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(path).encode(text)])
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double()
    vector = states.mean(0) if pooling == "mean" else states[-1]
    return vector / vector.norm()


def same(found: list[float], right: torch.Tensor) -> bool:
    return bool((torch.tensor(found, dtype=torch.float64) - right).abs().max() <= 2e-6)


def ask(url: str, model: str, inputs: Any) -> tuple[list[list[float]], str]:
    """The vectors, and what the request had to wait for."""
    body = json.dumps({"model": model, "input": inputs}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        data = json.load(response)["data"]
        return [item["embedding"] for item in data], response.headers["x-sllmdask-cold-start"]


@pytest.mark.parametrize(("model", "source", "pooling"), [("bert", "bert", "mean"), ("qwen-embed", "qwen", "last")])
def test_vectors_are_those_of_plain_transformers(url: str, paths: dict[str, Path], model: str, source: str, pooling: str):
    vectors, _ = ask(url, model, TEXTS)
    assert all(same(vector, expected(paths[source], text, pooling)) for vector, text in zip(vectors, TEXTS, strict=True))


def test_models_for_text_and_for_embeddings_take_turns_on_one_slot(url: str):
    before, _ = ask(url, "bert", TEXTS[:1])
    text = post(
        url, "/v1/completions", {"model": "qwen", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    )
    assert text["usage"]["completion_tokens"] == 4
    after, cold_start = ask(url, "bert", TEXTS[:1])
    assert cold_start == "host"
    assert after == before
    assert ask(url, "bert", TEXTS[:1])[1] == "hit"


def test_an_unloaded_embedding_model_frees_its_slot_and_comes_back(url: str):
    before, _ = ask(url, "bert", TEXTS)
    assert [each["instance"].split("/")[0] for each in post(url, "/admin/unload", {"model": "bert"})["instances"]] == ["bert"]
    assert workers(url)[0]["slots_used"] == 0
    assert ask(url, "bert", TEXTS) == (before, "host")
    (instance,) = workers(url)[0]["instances"]
    assert instance["model"] == "bert"


def test_the_record_of_a_model_says_what_it_is_for(url: str):
    rows = {row["model"]: row for row in get(url, "/admin/models")["models"]}
    assert {name: row["task"] for name, row in rows.items()} == {"bert": "embed", "qwen": "generate", "qwen-embed": "embed"}
    assert (rows["bert"]["embedding"]["pooling"], rows["bert"]["embedding"]["dimensions"], rows["bert"]["max_model_len"]) == (
        ["mean"],
        64,
        64,
    )


def test_a_request_for_the_other_task_is_refused(url: str):
    assert post(url, "/v1/embeddings", {"model": "qwen", "input": "hello"})["error"]["code"] == "wrong_task"
    chat = {"model": "bert", "messages": [{"role": "user", "content": "hello"}]}
    assert post(url, "/v1/chat/completions", chat)["error"]["code"] == "wrong_task"


def test_an_input_over_the_window_is_refused_with_both_numbers(url: str):
    reply = post(url, "/v1/embeddings", {"model": "bert", "input": [[5] * 65]})
    assert (reply["status"], reply["error"]["code"]) == (400, "context_length_exceeded")
    assert "64" in reply["error"]["message"] and "65" in reply["error"]["message"]


def test_clients_and_the_command_line_get_the_same_vectors(url: str, tmp_path: Path):
    vectors, _ = ask(url, "bert", TEXTS)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
        assert [item.embedding for item in official.embeddings.create(model="bert", input=TEXTS).data] == vectors
    with Client(url) as client:
        assert client.embed("bert", TEXTS) == vectors
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = [str(BIN / "sllmdask"), "encode", "bert", "--input", str(tmp_path / "texts.txt"), "--json"]
    done = subprocess.run(
        command, env={**os.environ, "LLM_SERVER_URL": url}, capture_output=True, text=True, check=True, timeout=60
    )
    printed = [json.loads(line)["embedding"] for line in done.stdout.splitlines()]
    assert torch.allclose(torch.tensor(printed), torch.tensor(vectors), rtol=1e-6, atol=0)


def test_a_deployment_that_makes_no_sense_is_refused(url: str, paths: dict[str, Path]):
    source = {"pretrained_model_name_or_path": str(paths["bert"])}
    for backend, words in (({"task": "generate"}, "BertModel"), ({"task": "generate", "pooling": "mean"}, "embeddings")):
        reply = post(url, "/register", {"model": "x", "backend_config": {**source, **backend}})
        assert reply["status"] == 400
        assert words in reply["error"]["message"]
