"""Placement by what storage gives: the scenario of ServerlessLLM's documentation, its files unchanged, and what loads teach.

Two workers with disks of their own, as separate programs. Their disks are made slow by ``worker.read_limit``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.cluster.asking import register, worker
from tests.cluster.harness import BIN, Processes, get, instances, post, until, workers
from tests.test_config import HARDWARE, OPT_1_3B, OPT_2_7B

pytestmark = pytest.mark.cluster

#: Bytes per second that each worker may read.
LIMITS = {"0": 20_000_000, "1": 400_000_000}
#: Hidden size of a checkpoint that the slower one reads for more than half a second.
WIDE = 320


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    cluster = Processes(tmp_path_factory.mktemp("storage"))
    (cluster.directory / "hardware_config.json").write_text(HARDWARE)
    try:
        cluster.start_scheduler("--hardware-config", "hardware_config.json")
        for name, limit in LIMITS.items():
            # Memory that is not taken before it is written to: the checkpoints of the documentation are large.
            environment = {"SHARED_MEMORY": "false", "PREFAULT": "false", "READ_LIMIT": str(limit)}
            cluster.start_worker(
                name,
                *("--store-dir", str(cluster.directory / f"store-{name}"), "--host-memory", "16GiB"),
                **{f"DASK_SLLMDASK__WORKER__{key}": value for key, value in environment.items()},
            )
        yield cluster
    finally:
        cluster.close()


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


def test_the_documented_files_give_the_documented_estimates_and_nodes(cluster: Processes, url: str):
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
    shutil.rmtree(root)

    for name, family in (("opt-2.7b", "opt"), ("opt-1.3b", "opt")):
        make_checkpoint(root / name, family, seed=len(name))
    deploy(cluster, url)
    assert (chat(url, "opt-2.7b"), chat(url, "opt-1.3b"), chat(url, "opt-2.7b")) == ("0", "1", "0")
    for model in ("opt-2.7b", "opt-1.3b"):
        post(url, "/delete", {"model": model})
    until("both slots are free", lambda: not instances(url))


def test_after_five_loads_from_a_slow_disk_the_estimate_is_right_and_the_other_node_is_taken(
    cluster: Processes, url: str, tmp_path: Path
):
    first = make_checkpoint(tmp_path / "0", "opt", hidden=WIDE)
    copies = [first, *(shutil.copytree(first, tmp_path / str(number)) for number in range(1, 8))]
    for number, path in enumerate(copies):
        # Those between the first and the last are nowhere else: node 0 has them from its disk alone.
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


def test_what_a_worker_has_measured_is_known_to_its_successor(cluster: Processes, url: str):
    before = worker(url, "0")
    assert before is not None and before["bandwidth"]["disk"]["n_loads"] >= 7
    os.kill(before["pid"], 9)
    after = until("a new process is there", lambda: (new := worker(url, "0")) and new["pid"] != before["pid"] and new)
    assert after["bandwidth"]["disk"] == before["bandwidth"]["disk"]
