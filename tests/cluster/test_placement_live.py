"""Placement by what storage gives and by what operators say: the scenario of ServerlessLLM's documentation, its files unchanged,
what loads teach, and what acts on nodes that come later.

Workers with disks and memory of their own, as separate programs. Their disks are made slow by ``worker.read_limit``. The order
of the tests matters: the estimates of the documentation are those of workers that have loaded nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.cluster.asking import ask, model_on, register, worker
from tests.cluster.harness import BIN, Processes, Stream, get, instances, post, until, workers
from tests.loader.serving import Site
from tests.test_config import HARDWARE, OPT_1_3B, OPT_2_7B

pytestmark = pytest.mark.cluster

#: Bytes per second that each worker may read.
LIMITS = {"0": 20_000_000, "1": 400_000_000, "2": 400_000_000}
#: Hidden size of a checkpoint that the slower one reads for more than half a second.
WIDE = 320
LONG = {"prompt": "hello", "max_tokens": 1800, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    cluster = Processes(tmp_path_factory.mktemp("storage"))
    (cluster.directory / "hardware_config.json").write_text(HARDWARE)
    try:
        cluster.start_scheduler("--hardware-config", "hardware_config.json")
        for name in ("0", "1"):
            start_worker(cluster, name)
        yield cluster
    finally:
        cluster.close()


def start_worker(cluster: Processes, name: str) -> None:
    # Memory that is not taken before it is written to: the checkpoints of the documentation are large.
    settings = {"SHARED_MEMORY": "false", "PREFAULT": "false", "PEERS": "false", "READ_LIMIT": str(LIMITS[name])}
    cluster.start_worker(
        name,
        *("--store-dir", str(cluster.directory / f"store-{name}"), "--host-memory", "16GiB"),
        slots=2,
        **{f"DASK_SLLMDASK__WORKER__{key}": value for key, value in settings.items()},
    )


@pytest.fixture(scope="module")
def site(checkpoints: dict[str, Path]) -> Iterator[Site]:
    """A web server of both models."""
    with Site(checkpoints["a"].parent) as site:
        yield site


@pytest.fixture(scope="module")
def url(cluster: Processes) -> str:
    url = cluster.start_door()
    until("both workers joined", lambda: len(workers(url)) == 2)
    return url


def make_hollow(path: Path, hidden: int, n_layers: int) -> None:
    """An OPT checkpoint of the real size, of which only the header takes room on the disk."""
    config = OPTConfig(
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=32,
        word_embed_proj_dim=hidden,
        architectures=["OPTForCausalLM"],
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.mkdir(parents=True)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def cold(directory: Path) -> Path:
    """Not in the page cache any more."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return directory


def deploy(cluster: Processes, url: str) -> None:
    """As the documentation does: both files, unchanged, by the command line."""
    for name, text in (("config-opt-2.7b.json", OPT_2_7B), ("config-opt-1.3b.json", OPT_1_3B)):
        (cluster.directory / name).write_text(text)
        command = [str(BIN / "sllmdask"), "deploy", "--config", name]
        env = {**os.environ, "LLM_SERVER_URL": url}
        done = subprocess.run(command, cwd=cluster.directory, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def chat(url: str, model: str) -> str:
    """The node that answered."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is your name?"},
    ]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["x-sllmdask-node"]


def decided(cluster: Processes, model: str) -> tuple[str, str]:
    """Address and predicted seconds of the last load of `model`, from the log."""
    found = re.findall(rf"load model={re.escape(model)} worker=(\S+) \S+ ready_in_s=(\S+) ", cluster.log("scheduler"))
    return found[-1]


def test_the_documented_files_give_the_documented_estimates(cluster: Processes, url: str):
    root = cluster.directory / "facebook"
    address = {each["name"]: each["address"] for each in workers(url)}
    make_hollow(root / "opt-2.7b", 2560, 32)
    make_hollow(root / "opt-1.3b", 2048, 24)
    deploy(cluster, url)
    for model, node, estimate in (("opt-2.7b", "0", "0.98780"), ("opt-1.3b", "1", "0.49016")):
        assert post(url, "/admin/load", {"model": model, "wait": False})["state"] == "loading"
        assert decided(cluster, model) == (address[node], estimate)
        assert [instance["model"] for instance in (worker(url, node) or {})["instances"]] == [model]
        assert post(url, "/admin/unload", {"model": model})["state"] == "unloaded"
        post(url, "/delete", {"model": model})
    shutil.rmtree(root)


def test_after_five_loads_from_a_slow_disk_the_estimate_is_right_and_the_other_node_is_taken(
    cluster: Processes, url: str, tmp_path: Path
):
    first = make_checkpoint(tmp_path / "0", "opt", hidden=WIDE)
    copies = [first, *(shutil.copytree(first, tmp_path / str(number)) for number in range(1, 8))]
    for number, path in enumerate(copies):
        register(url, f"wide-{number}", cold(path), node="0" if 0 < number < 7 else None)
    nbytes = get(url, "/admin/models")["models"][-1]["nbytes"]
    assert nbytes / LIMITS["0"] > 0.5
    if post(url, "/admin/load", {"model": "wide-0"})["seconds"] < 0.5:
        pytest.skip("the files stay in the page cache here")
    assert [instance["model"] for instance in (worker(url, "0") or {})["instances"]] == ["wide-0"], "of equal nodes the first"
    for number in range(1, 7):
        assert post(url, "/admin/load", {"model": f"wide-{number}"})["cold_start"] == "disk"
    _, predicted_s = decided(cluster, "wide-6")
    assert float(predicted_s) == pytest.approx(nbytes / LIMITS["0"], rel=0.15)
    until("the last load is told", lambda: worker(url, "0")["estimate"]["n"] >= 7)
    assert worker(url, "0")["bandwidth"]["disk"]["bytes_per_s"] == pytest.approx(LIMITS["0"], rel=0.1)

    for number in range(7):
        post(url, "/admin/unload", {"model": f"wide-{number}"})
    assert post(url, "/admin/load", {"model": "wide-7"})["node"] == "1"
    for number in range(8):
        post(url, "/delete", {"model": f"wide-{number}"})
    until("both slots are free", lambda: not instances(url))


def test_requests_go_to_the_documented_nodes(cluster: Processes, url: str):
    for seed, name in enumerate(("opt-2.7b", "opt-1.3b")):
        make_checkpoint(cluster.directory / "facebook" / name, "opt", seed=seed)
    deploy(cluster, url)
    assert (chat(url, "opt-2.7b"), chat(url, "opt-1.3b"), chat(url, "opt-2.7b")) == ("0", "1", "0")
    for model in ("opt-2.7b", "opt-1.3b"):
        post(url, "/delete", {"model": model})
    until("both slots are free", lambda: not instances(url))


# --- what an operator says of a model -----------------------------------------------------------------------------------


def tiers(url: str, model: str) -> dict[str, str]:
    """The tier of a model, by node."""
    return {each["name"]: found["tier"] for each in workers(url) if (found := model_on(url, each["name"], model))}


def forget(url: str, *models: str) -> None:
    for model in models:
        post(url, "/delete", {"model": model})
    until("nothing is loaded", lambda: not instances(url))


def test_files_and_memory_are_brought_where_the_deployment_says_also_to_a_node_that_joins_later(
    cluster: Processes, url: str, site: Site
):
    placement = {"target_nodes": ["0"], "local_disk": ["1", "2"], "memory_pool": ["0", "2"]}
    deployment = {
        "model": "m",
        "backend_config": {"pretrained_model_name_or_path": f"{site.url}/a"},
        "placement_config": placement,
    }
    warnings = post(url, "/register", deployment)["warnings"]
    assert [warning.split(":")[0] for warning in warnings] == ["placement_config.local_disk", "placement_config.memory_pool"]
    assert all("node '2' is not connected; it gets the checkpoint when it joins" in warning for warning in warnings)
    until("it is where it shall be", lambda: tiers(url, "m") == {"0": "host", "1": "disk"})
    assert ask(url, "m")[1:] == ("0", "host"), "the only node that may run it"

    start_worker(cluster, "2")
    until("the new node has it, too", lambda: tiers(url, "m").get("2") == "host")
    reply = post(url, "/update", {"model": "m", "placement_config": {"target_nodes": ["2"]}})
    assert reply["status"] == "ok" and reply["warnings"] == []
    assert ask(url, "m")[1:] == ("2", "host")
    cluster.stop("worker-2")
    until("it has left", lambda: worker(url, "2") is None)
    forget(url, "m")


def test_what_is_pinned_is_in_memory_and_shown_until_it_is_unpinned_or_deleted(url: str, checkpoints: dict[str, Path]):
    register(url, "a", checkpoints["a"])
    pinned = post(url, "/admin/pin", {"model": "a", "node": "1"})
    assert (pinned["pinned"], pinned["nodes"]) == (["1"], ["1"])

    def shown() -> tuple[list[str], bool, str]:
        (row,) = [row for row in get(url, "/admin/models")["models"] if row["model"] == "a"]
        found = model_on(url, "1", "a")
        return row["pinned"], found["pinned"], found["tier"]

    assert shown() == (["1"], True, "host")
    post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 1}})
    assert shown() == (["1"], True, "host")
    assert post(url, "/admin/pin", {"model": "a", "pinned": False})["nodes"] == ["1"]
    until("it may leave", lambda: shown() == ([], False, "host"))
    assert post(url, "/admin/pin", {"model": "a"})["nodes"] == ["1"], "where it is in memory"
    assert post(url, "/admin/pin", {"model": "a", "node": "7"})["status"] == 400
    assert post(url, "/admin/pin", {"model": "aa"})["error"]["code"] == "model_not_found"
    forget(url, "a")
    until("its memory is free", lambda: (worker(url, "1") or {})["tiers"]["host"]["used"] == 0)


def test_an_update_acts_at_once_and_what_is_loaded_stays(url: str, checkpoints: dict[str, Path]):
    register(url, "a", checkpoints["a"], num_gpus=2)
    assert ask(url, "a")[2] != "hit"
    (before,) = instances(url)
    assert [each["slots_used"] for each in workers(url) if each["instances"]] == [2]
    post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instances": 2, "keep_alive": 600}})
    assert ask(url, "a")[2] == "hit" and [each["instance"] for each in instances(url)] == [before["instance"]]
    post(url, "/update", {"model": "a", "auto_scaling_config": {"min_instances": 2}})
    until("there are two", lambda: [each["state"] for each in instances(url)] == ["ready"] * 2)
    assert before["instance"] in {each["instance"] for each in instances(url)}
    post(url, "/update", {"model": "a", "auto_scaling_config": {"min_instances": 0, "keep_alive": 0}})
    until("they leave at once", lambda: not instances(url))
    assert ask(url, "a")[2] == "host"
    until("it leaves after each request", lambda: not instances(url))
    reply = post(url, "/update", {"model": "a", "auto_scaling_config": {"max_instance": 1}})
    assert reply["status"] == 400 and "max_instances" in reply["error"]["message"]
    assert post(url, "/update", {"model": "none", "num_gpus": 1})["status"] == 404
    forget(url, "a")


@pytest.mark.parametrize("force", [True, False])
def test_deleted_once_more_or_by_force_a_model_ends_what_runs_with_one_clear_error(
    url: str, checkpoints: dict[str, Path], force: bool
):
    register(url, "a", checkpoints["a"])
    stream = Stream(url, {"model": "a", **LONG})
    lines = stream.lines()
    next(line for line in lines if line.startswith("data: "))
    if not force:
        assert post(url, "/delete", {"model": "a"})["n_running"] == 1
    ended: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: ended.append(post(url, "/delete", {"model": "a", "force": force})))
    thread.start()
    last = [line for line in lines if line.startswith("data: ")][-1]
    thread.join(30)
    assert ended[0]["n_aborted"] == 1
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "model_deleted" and "'a' was deleted while it answered" in error["message"]
    until(
        "its slots and its memory are free",
        lambda: all(each["slots_used"] == 0 and each["tiers"]["host"]["used"] == 0 for each in workers(url)),
    )
    assert post(url, "/delete", {"model": "a"})["error"]["code"] == "model_not_found"
