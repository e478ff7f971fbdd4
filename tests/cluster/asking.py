"""Deploying and asking, for tests that look at where a model came from."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from tests.cluster.harness import post, workers

ASK = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def register(url: str, model: str, source: str | Path, *, node: str | None = None, **settings: Any) -> None:
    deployment = {"model": model, "backend_config": {"pretrained_model_name_or_path": str(source)}, **settings}
    if node is not None:
        deployment["placement_config"] = {"target_nodes": [node]}
    reply = post(url, "/register", deployment)
    assert reply["status"] == "ok", reply


def ask(url: str, model: str) -> tuple[str, str, str]:
    """The answer's text, the node that it came from, and what the request had to wait for."""
    body = json.dumps({"model": model, **ASK}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = json.load(response)["choices"][0]["text"]
        return text, response.headers["x-sllmdask-node"], response.headers["x-sllmdask-cold-start"]


def worker(url: str, name: str) -> dict[str, Any] | None:
    """What the cluster says of a worker; ``None``: it is not there."""
    return next((each for each in workers(url) if each["name"] == name), None)


def model_on(url: str, name: str, model: str) -> dict[str, Any]:
    """What the cluster says of a model on a worker; nothing while the worker is not there."""
    models = (worker(url, name) or {"models": []})["models"]
    return next((each for each in models if each["model"] == model), {})
