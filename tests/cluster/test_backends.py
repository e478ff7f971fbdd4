"""A model that is run by an engine of another distribution, behind separate programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.backends import install
from tests.cluster.asking import register
from tests.cluster.harness import instances, post, until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def worker_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The worker finds the other distribution."""
    path = [str(install(tmp_path_factory.mktemp("site"))), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def told(url: str, n_output_tokens: int) -> dict[str, Any] | None:
    """The account of the one engine of that model, once it has given so many tokens."""
    [found] = [each["engine"] for each in instances(url) if each["model"] == "costs"]
    return found if found and found["n_output_tokens"] == n_output_tokens else None


def test_an_engine_of_another_distribution_answers_and_leaves(url: str, checkpoints: dict[str, Path]):
    register(url, "costs", checkpoints["a"], backend="costs")
    body = {"model": "costs", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    first, again = (post(url, "/v1/completions", body) for _ in range(2))
    assert first["usage"]["completion_tokens"] == 8
    assert first["choices"][0]["text"] == again["choices"][0]["text"] != ""
    # Steps last what the cost model says: a prefill for each answer, and seven decodes.
    stats = until("the engine was heard of", lambda: told(url, n_output_tokens=16))
    assert stats["n_steps"] == 16
    assert stats["step_s"] > 14 * 0.026
    refused = post(url, "/v1/completions", {**body, "logprobs": 1})
    assert (refused["status"], refused["error"]["param"]) == (400, "logprobs")
    assert "deleted" in post(url, "/delete", {"model": "costs"})["status"]


def test_a_backend_that_no_worker_has_is_refused_at_deployment(url: str, checkpoints: dict[str, Path]):
    deployment = {"model": "x", "backend_config": {"pretrained_model_name_or_path": str(checkpoints["a"])}}
    refused = post(url, "/register", {**deployment, "backend": "vllm"})
    assert (refused["status"], refused["error"]["param"]) == (400, "backend")
    assert "the workers have costs, transformers." in refused["error"]["message"]
    adapters = {"backend_config": {**deployment["backend_config"], "lora_adapters": {"polite": str(checkpoints["b"])}}}
    refused = post(url, "/register", {**deployment, **adapters, "backend": "costs"})
    assert (refused["status"], refused["error"]["code"]) == (400, "unsupported_adapter")
    assert "'costs' takes no adapters" in refused["error"]["message"]
