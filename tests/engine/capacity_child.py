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

from sllmdask.engine.engine import LLMEngine, build_engine
from sllmdask.engine.memory import MemoryLedger
from sllmdask.engine.sizing import _status, private_memory
from sllmdask.errors import InsufficientMemory
from tests.engine.models import TinyModel, drain, make_model, prompts, request, settings

MiB = 1024**2
#: Large enough that what else a process takes and gives back is small beside it: 26 million weights.
_SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "max_position_embeddings": 2048,
}
_KV_NBYTES = 48 * MiB


def give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def engine_of(model: TinyModel, ledger: MemoryLedger, holder: str, **changes: Any) -> LLMEngine:
    given = {"kv_memory": _KV_NBYTES, "attention": "sdpa", **changes}
    return build_engine(model.directory, model.tensors, settings(**given), memory=ledger.account(holder, "large"))


def measure(model: TinyModel, **changes: Any) -> dict[str, Any]:
    """Private bytes that an engine with a full KV cache has, those in the books, and what is left of both when it is closed."""
    ledger = MemoryLedger(4096 * MiB)
    give_back()
    before = private_memory()
    engine = engine_of(model, ledger, "a", **changes)
    give_back()
    untouched = private_memory() - before
    for cache in engine._runner._parts():
        cache.fill_(1)
    give_back()
    held = private_memory() - before
    books = engine._runner.memory.snapshot()
    engine.close()
    del engine
    give_back()
    return {"untouched": untouched, "held": held, "books": books, "left": private_memory() - before, "left_in_books": ledger.used}


def limited(model: TinyModel) -> dict[str, Any]:
    """An engine whose steps do not get what they ask for, and then one that cannot be built."""
    ledger = MemoryLedger(4096 * MiB)
    asked = prompts(3, 900, 1000, seed=5)
    engine = engine_of(model, ledger, "a", max_batch_tokens=2048)
    answers = []
    for room in (None, 24 * MiB):
        give_back()
        if room is not None:
            resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + room, resource.RLIM_INFINITY))
        for i, prompt in enumerate(asked):
            engine.add(request(str(i), prompt, 6))
        answers.append(drain(engine))
    n_shortages = engine.stats().n_shortages
    refused = []
    for kv_memory in (512 * MiB, "auto"):
        try:
            engine_of(model, ledger, "b", kv_memory=kv_memory, dtype="float32", pack_weights="always").close()
        except InsufficientMemory as error:
            refused.append([error.model, error.needed, error.available, error.advice])
        ledger._accounts["b"].close()
    used = ledger.used
    engine.add(request("after", asked[0], 6))
    after = drain(engine)["after"]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    own = sum(engine._runner.memory.snapshot().values())
    return {
        "same": answers[0] == answers[1] and after == answers[0]["0"],
        "n_shortages": n_shortages,
        "refused": refused,
        "used": used,
        "own": own,
    }


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    tiny = make_model(directory / "tiny")
    # What libraries take once, and keep.
    for dtype in ("float32", "bfloat16"):
        warm = engine_of(tiny, MemoryLedger(4096 * MiB), "warm", dtype=dtype, pack_weights="always")
        warm.add(request("a", [1, 2, 3], 3))
        drain(warm)
        warm.close()
    model = make_model(directory / "large", dtype=torch.bfloat16, **_SIZES)
    model = TinyModel(model.directory, model.tensors, None)
    measure(model, dtype="float32", pack_weights="always")
    found = {
        "lent": measure(model, dtype="bfloat16", pack_weights="never"),
        "converted": measure(model, dtype="float32", pack_weights="never"),
        "packed beside": measure(model, dtype="bfloat16", pack_weights="always"),
        "packed instead": measure(model, dtype="float32", pack_weights="always"),
    }
    print(json.dumps({"measured": found, "limited": limited(model)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
