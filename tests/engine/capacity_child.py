"""What :mod:`tests.engine.test_capacity` measures in a process of its own: bytes that an engine has, and limits that are real."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from sllmdask.batching.memory import MemoryLedger
from sllmdask.engine.construct import Skeleton, build_skeleton
from sllmdask.engine.engine import LLMEngine, build_engine
from sllmdask.engine.sizing import _status, private_memory
from sllmdask.errors import InsufficientMemory
from tests.engine.models import TinyModel, drain, make_model, prompts, request, settings

MiB = 1024**2
#: Large enough that what else a process takes and gives back is small beside it: 26 million weights.
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
}
#: What a step makes is large, and soon made.
_WIDE = {"intermediate_size": 16384, "num_hidden_layers": 2}
_KV_NBYTES = 64 * MiB
_ROOM = 20 * MiB


def give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def engine_of(model: TinyModel, ledger: MemoryLedger, holder: str, skeleton: Skeleton | None = None, **changes: Any) -> LLMEngine:
    given = settings(**{"kv_memory": _KV_NBYTES, "attention": "sdpa", **changes})
    return build_engine(model.directory, model.tensors, given, memory=ledger.account(holder, "large"), skeleton=skeleton)


def measure(model: TinyModel, skeleton: Skeleton, **changes: Any) -> dict[str, Any]:
    """Private bytes that an engine with a full KV cache has, those in the books, and what is left of both when it is closed."""
    ledger = MemoryLedger(4096 * MiB)
    give_back()
    before = private_memory()
    engine = engine_of(model, ledger, "a", skeleton, **changes)
    give_back()
    untouched = private_memory() - before
    for layer in engine._runner.caches:
        for part in layer:
            part.fill_(1)
    del layer, part
    give_back()
    held = private_memory() - before
    books = engine._runner.memory.snapshot()
    engine.close()
    del engine
    give_back()
    return {"untouched": untouched, "held": held, "books": books, "left": private_memory() - before, "left_in_books": ledger.used}


def limited(model: TinyModel) -> dict[str, Any]:
    """An engine whose steps do not get what they ask for, and beside it others that cannot be built."""
    ledger = MemoryLedger(4096 * MiB)
    asked = prompts(3, 300, 400, seed=5)
    engine = engine_of(model, ledger, "a", max_batch_tokens=1024, prefix_reuse=False)
    answers = []
    for room in (None, _ROOM):
        give_back()
        if room is not None:
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + room, resource.RLIM_INFINITY))
        for i, prompt in enumerate(asked):
            engine.add(request(f"{room} {i}", prompt, 6))
        answers.append(list(drain(engine).values()))
    n_shortages = engine.stats().n_shortages
    refused = []
    for kv_memory in (512 * MiB, "auto"):
        try:
            engine_of(model, ledger, "b", kv_memory=kv_memory).close()
        except InsufficientMemory as error:
            refused.append([error.model, error.needed, error.available, error.message])
        ledger._accounts["b"].close()
    used, own = ledger.used, sum(engine._runner.memory.snapshot().values())
    engine.add(request("after", asked[0], 6))
    answers.append([drain(engine)["after"]])
    return {
        "same": answers[0] == answers[1] and answers[2] == answers[0][:1],
        "n_shortages": n_shortages,
        "refused": refused,
        "used": used,
        "own": own,
    }


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    large = make_model(directory / "large", dtype=torch.bfloat16, **_LARGE)
    large = TinyModel(large.directory, large.tensors, None)
    skeleton = build_skeleton(large.directory)
    ways = {
        "lent": {"dtype": "bfloat16", "pack_weights": "never"},
        "converted": {"dtype": "float32", "pack_weights": "never"},
        "packed beside": {"dtype": "bfloat16", "pack_weights": "always"},
        "packed instead": {"dtype": "float32", "pack_weights": "always"},
    }
    # The first time, libraries take memory that they keep.
    found = [{how: measure(large, skeleton, **way) for how, way in ways.items()} for _ in range(2)][1]
    wide = make_model(directory / "wide", **_WIDE)
    print(json.dumps({"measured": found, "limited": limited(TinyModel(wide.directory, wide.tensors, None))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
