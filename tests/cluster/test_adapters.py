"""LoRA adapters of one base behind separate programs: loaded for the requests that ask for them, and evicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file

from tests.checkpoints import make_checkpoint
from tests.cluster.harness import Processes, get, post, until, workers
from tests.engine.adapters import Adapter, make_adapter, write_adapter
from tests.engine.models import TinyModel

pytestmark = pytest.mark.cluster

PROMPT = "the quick brown fox"
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path = make_checkpoint(tmp_path_factory.mktemp("base") / "base", "llama")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return TinyModel(path, load_file(path / "model.safetensors"), reference)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: TinyModel) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, base, ("q_proj", "v_proj", "down_proj"), seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, base: TinyModel, adapters: dict[str, Adapter]) -> Iterator[str]:
    """One worker whose instances hold two adapters at once."""
    cluster = Processes(tmp_path_factory.mktemp("lora"))
    try:
        cluster.start_scheduler()
        cluster.start_worker("0", DASK_SLLMDASK__ENGINE__MAX_ADAPTERS="2")
        url = cluster.start_door()
        until("the worker joined", lambda: workers(url))
        reply = register(url, base, {name: str(adapter.directory) for name, adapter in adapters.items()})
        assert reply["status"] == "ok", reply
        yield url
    finally:
        cluster.close()


def register(url: str, base: TinyModel, adapters: dict[str, str], model: str = "base", **backend: Any) -> dict[str, Any]:
    source = {"pretrained_model_name_or_path": str(base.directory), "enable_lora": True, "lora_adapters": adapters, **backend}
    return post(url, "/register", {"model": model, "backend_config": source})


def ask(url: str, model: str = "base", **fields: Any) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
    reply = post(url, "/v1/completions", body)
    assert "choices" in reply, reply
    return str(reply["choices"][0]["text"])


def expected(model: TinyModel) -> str:
    """What plain ``generate()`` of transformers makes of the prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.directory)
    config = replace(model).reference.generation_config
    config.eos_token_id = None
    return str(tokenizer.decode(model.generate(tokenizer.encode(PROMPT), 16), skip_special_tokens=True))


def held(url: str) -> list[str]:
    (instance,) = [each for each in workers(url)[0]["instances"] if each["model"] == "base"]
    return [adapter["name"] for adapter in (instance["engine"] or {}).get("adapters", [])]


def test_each_request_gets_the_answer_of_its_own_model_whatever_was_asked_before(
    url: str, base: TinyModel, adapters: dict[str, Adapter]
):
    right = {name: expected(adapter.merged_into(base)) for name, adapter in adapters.items()}
    assert len({expected(base), *right.values()}) == 4, "the adapters are too weak to tell one from another"
    assert ask(url) == expected(base)
    for name in (*NAMES, *reversed(NAMES)):
        assert ask(url, lora_adapter_name=name) == right[name]
        assert ask(url, f"base:{name}") == right[name]
        assert ask(url) == expected(base)


def test_an_instance_holds_as_many_as_it_may_and_the_one_used_longest_ago_gives_way(url: str):
    for name in NAMES:
        ask(url, lora_adapter_name=name)
    until("the account shows the last two", lambda: held(url) == ["two", "three"])
    ask(url, lora_adapter_name="two")
    ask(url, lora_adapter_name="one")
    until("the account shows the last two", lambda: held(url) == ["two", "one"])


def test_the_base_stays_loaded_when_other_adapters_are_deployed(url: str, base: TinyModel, adapters: dict[str, Adapter]):
    ask(url)
    (instance,) = [each["instance"] for each in workers(url)[0]["instances"]]
    assert register(url, base, {"one": str(adapters["two"].directory)})["status"] == "ok"
    try:
        assert ask(url, lora_adapter_name="one") == expected(adapters["two"].merged_into(base))
        reply = post(url, "/v1/completions", {"model": "base", "prompt": PROMPT, "lora_adapter_name": "two"})
        assert (reply["status"], reply["error"]["code"]) == (404, "adapter_not_found")
        assert [each["instance"] for each in workers(url)[0]["instances"]] == [instance]
    finally:
        register(url, base, {name: str(adapter.directory) for name, adapter in adapters.items()})


def test_an_adapter_that_was_deleted_is_gone_and_the_others_stay(url: str, base: TinyModel, adapters: dict[str, Adapter]):
    try:
        assert "two" in post(url, "/delete", {"model": "base", "lora_adapters": ["two"]})["status"]
        assert post(url, "/v1/completions", {"model": "base:two", "prompt": PROMPT})["error"]["code"] == "adapter_not_found"
        assert ask(url, "base:one") == expected(adapters["one"].merged_into(base))
        assert post(url, "/delete", {"model": "base", "lora_adapters": ["two"]})["error"]["code"] == "adapter_not_found"
    finally:
        register(url, base, {name: str(adapter.directory) for name, adapter in adapters.items()})


def test_adapters_are_listed_and_an_unloaded_base_lets_go_of_them(url: str):
    ask(url, lora_adapter_name="one")
    assert {"base:one", "base:two", "base:three"} <= {model["id"] for model in get(url, "/v1/models")["data"]}
    post(url, "/admin/unload", {"model": "base"})
    assert workers(url)[0]["instances"] == []
    ask(url, lora_adapter_name="one")
    until("only one is there", lambda: held(url) == ["one"])


def test_an_adapter_for_another_model_or_none_is_refused_at_deployment(url: str, base: TinyModel, tmp_path: Path):
    import torch

    name = "model.layers.0.self_attn.q_proj"
    wrong = write_adapter(
        tmp_path / "wrong", {f"{name}.lora_A.weight": torch.ones(4, 65), f"{name}.lora_B.weight": torch.ones(64, 4)}
    )
    reply = register(url, base, {"wrong": str(wrong.directory)}, model="other")
    assert (reply["status"], reply["error"]["code"]) == (400, "unsupported_adapter")
    assert "'wrong'" in reply["error"]["message"] and name in reply["error"]["message"]
    reply = register(url, base, {"gone": str(tmp_path / "nothing")}, model="other")
    assert (reply["status"], reply["error"]["code"]) == (400, "checkpoint_not_found")
    config = json.loads((wrong.directory / "adapter_config.json").read_text())
    (wrong.directory / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert "DoRA" in register(url, base, {"wrong": str(wrong.directory)}, model="other")["error"]["message"]
    assert "other" not in {row["model"] for row in get(url, "/admin/models")["models"]}
