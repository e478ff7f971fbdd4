"""Those who bring a model to its first token, for the scenarios ``host`` and ``ttft`` of ``bench_load.py``.

Each lives in a process of its own that is warm: all is imported and a tiny model has answered a request. None tokenizes but
transformers' server, which cannot do without.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from scripts.bench_load_measure import HUGE_PAGE, BenchError, make_warm, weights_in
from scripts.bench_load_process import give_back_memory

T = TypeVar("T")

#: Bytes of KV cache: it belongs to no scenario, so it is small, and the same for all who can be told.
KV_NBYTES = 64 * 1024**2
#: Seconds until a pool must have pages ready.
_PREFAULT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Started:
    """One start: seconds in all, seconds of its phases (which may overlap), and the first token, greedy."""

    seconds: float
    phases: dict[str, float]
    token: int | None


class Starter:
    """Somebody who starts models. The constructor imports and warms up; `tiny` is a checkpoint for that."""

    name: ClassVar[str]
    ours: ClassVar[bool] = False
    format: ClassVar[str] = "safetensors"

    def __init__(self, tiny: Path, pool: str) -> None:
        """`pool` names the host memory that ours share."""

    def forget(self, directory: Path) -> None:
        """Let go of the model and of every copy of it in this process's memory, and be ready to start it again."""
        raise NotImplementedError

    def first_token(self, directory: Path, prompt: list[int]) -> Started:
        """From the files to the first token; the model stays."""
        raise NotImplementedError


class HostStarter(Starter):
    """A starter that knows a model that is in host memory already."""

    def warm(self, directory: Path) -> None:
        """Bring the bytes to host memory, in whatever way this starter finds them there."""
        raise NotImplementedError

    def unload(self) -> None:
        """Let go of the model; its bytes stay in host memory."""
        raise NotImplementedError

    def ready(self, directory: Path) -> Started:
        """From host memory to a model whose forward pass could begin; it stays. No token yet."""
        raise NotImplementedError

    def answer(self, prompt: list[int]) -> int:
        """The first token of the model that is ready."""
        raise NotImplementedError


# --- ours --------------------------------------------------------------------------------------------------------------------


class Ours(HostStarter):
    """A worker's parts: its store over host memory that the node's workers share, and its engine."""

    ours = True
    overlap: ClassVar[bool] = True
    #: Whether the structure of an unloaded model is kept for its next start.
    keep_structure: ClassVar[bool] = False
    shared: ClassVar[bool] = True

    def __init__(self, tiny: Path, pool: str) -> None:
        from sllmdask.config import EngineSettings, WorkerSettings
        from sllmdask.engine.construct import SkeletonShelf, build_skeleton
        from sllmdask.engine.engine import build_engine
        from sllmdask.engine.warm import warm_up
        from sllmdask.loader.kernels import warm_up as warm_kernels

        warm_kernels()
        warm_up("cpu")
        self._build_skeleton, self._build_engine = build_skeleton, build_engine
        self._settings = EngineSettings.model_validate({"device": "cpu", "kv_memory": KV_NBYTES})
        self._worker_settings = WorkerSettings()
        self._pool_name = pool
        self._shelf = SkeletonShelf()
        self._lease: Any = None
        self._engine: Any = None
        self._skeleton: Any = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()
        self._store: Any = None
        self._pool: Any = None
        self._run(self._open())
        self.first_token(tiny, [1, 2, 3])
        self.forget(tiny)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        from sllmdask.loader.private_pool import PrivatePool
        from sllmdask.loader.shared_pool import SharedPool
        from sllmdask.loader.store import CheckpointStore

        capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 4
        if self.shared:
            self._pool = SharedPool(self._pool_name, capacity, grace_s=1.0, trim_s=600.0, populate=True)
        else:
            self._pool = PrivatePool(capacity)
        self._store = CheckpointStore(self._worker_settings, self._pool)
        await self._store.start()

    def reopen(self) -> None:
        """Leave the shared host memory and join it again, as a worker does that was just started."""
        self.unload()
        self._run(self._store.close())
        self._run(self._open())

    def keeper_pid(self) -> int | None:
        """The process that keeps the shared host memory."""
        pid: int | None = self._pool.keeper_pid if self.shared else None
        return pid

    def forget(self, directory: Path) -> None:
        self.unload()
        give_back_memory()
        self._run(self._evict(directory))

    async def _evict(self, directory: Path) -> None:
        """Out of host memory; afterwards, the pool has pages for as much as was there, as it sees to by itself."""
        await self._store.evict(str(directory))
        nbytes = sum(path.stat().st_size for path in weights_in(directory))
        self._pool.prefault(nbytes)
        deadline = time.monotonic() + _PREFAULT_TIMEOUT_S
        # Whole huge pages: the last one may be missing.
        while self._pool.prefaulted < nbytes - HUGE_PAGE:
            if time.monotonic() > deadline:
                raise BenchError(f"the pool has {self._pool.prefaulted} of {nbytes} bytes ready after {_PREFAULT_TIMEOUT_S} s")
            await asyncio.sleep(0.02)

    def warm(self, directory: Path) -> None:
        self._run(self._warm(directory))

    async def _warm(self, directory: Path) -> None:
        (await self._store.load(str(directory), str(directory))).release()

    def unload(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self.keep_structure and self._skeleton is not None:
            self._shelf.put(self._skeleton)
        lease, self._lease = self._lease, None
        self._engine = self._skeleton = None
        if lease is not None:
            self._loop.call_soon_threadsafe(lease.release)
        give_back_memory()

    def ready(self, directory: Path) -> Started:
        return self._run(self._ready(directory, whole=True))

    async def _ready(self, directory: Path, *, whole: bool) -> Started:
        started = time.perf_counter()
        take = self._shelf.take if self.keep_structure else self._build_skeleton

        def construct() -> tuple[Any, float]:
            began = time.perf_counter()
            return take(directory), time.perf_counter() - began

        building = asyncio.ensure_future(asyncio.to_thread(construct))
        self._lease = await self._store.load(str(directory), str(directory), whole=whole)
        leased_s = time.perf_counter() - started
        self._skeleton, construct_s = await building
        wait = None if self._lease.arrivals is None else self._lease.arrivals.wait
        self._engine = await asyncio.to_thread(
            self._build_engine, directory, self._lease.tensors, self._settings, skeleton=self._skeleton, wait=wait
        )
        seconds = time.perf_counter() - started
        phases = {"lease": leased_s, "construct": construct_s, "assign": self._engine.build_times.assign_s}
        return Started(seconds, phases, None)

    def answer(self, prompt: list[int]) -> int:
        from sllmdask.batching.params import SamplingParams
        from sllmdask.batching.sequence import Sequence

        self._engine.add(Sequence("first", prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
        outputs: list[Any] = []
        while not any(output.final for output in outputs):
            outputs += self._engine.step()
        if outputs[-1].error is not None:
            raise outputs[-1].error
        token: int = outputs[-1].token_id
        return token

    def first_token(self, directory: Path, prompt: list[int]) -> Started:
        return self._run(self._first_token(directory, prompt))

    async def _first_token(self, directory: Path, prompt: list[int]) -> Started:
        started = time.perf_counter()
        ready = await self._ready(directory, whole=not self.overlap)
        answering = asyncio.ensure_future(asyncio.to_thread(self.answer, prompt))
        await self._lease.complete()
        read_s = time.perf_counter() - started if self.overlap else ready.phases["lease"]
        token = await answering
        seconds = time.perf_counter() - started
        phases = {
            "read": read_s,
            "construct": ready.phases["construct"],
            "assign": ready.phases["assign"],
            "first forward": seconds - ready.seconds,
        }
        return Started(seconds, phases, token)

    def close(self) -> None:
        self.unload()
        self._run(self._store.close())


class OursLater(Ours):
    name, overlap = "sllmdask, first read, then execute", False


class OursOverlapped(Ours):
    name = "sllmdask, execute while loading"


class OursOverlappedFast(Ours):
    name, format = "sllmdask, execute while loading, fast format", "fast"


class OursOverlappedCompressed(Ours):
    name, format = "sllmdask, execute while loading, compressed", "split16"


class OursOverlappedPrivate(Ours):
    name, shared = "sllmdask, execute while loading, private memory", False


class OursHit(Ours):
    name = "sllmdask, host tier"


class OursHitAgain(Ours):
    name, keep_structure = "sllmdask, host tier, structure kept", True


class OursHitOther(Ours):
    """Each start is the first of a worker that has just joined: another one had brought the checkpoint."""

    name = "sllmdask, host tier, brought by another worker"


# --- transformers ------------------------------------------------------------------------------------------------------------


class FromPretrained(HostStarter):
    """``from_pretrained`` and ``generate``; "host memory" is the page cache."""

    name = "transformers from_pretrained"

    def __init__(self, tiny: Path, pool: str) -> None:
        super().__init__(tiny, pool)
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch, self._class = torch, transformers.AutoModelForCausalLM
        self._model: Any = None
        self.first_token(tiny, [1, 2, 3])
        self.forget(tiny)

    def forget(self, directory: Path) -> None:  # noqa: ARG002 - one model at a time
        self.unload()

    def warm(self, directory: Path) -> None:
        make_warm(weights_in(directory))

    def unload(self) -> None:
        self._model = None
        give_back_memory()

    def ready(self, directory: Path) -> Started:
        started = time.perf_counter()
        self._model = self._class.from_pretrained(directory, dtype="auto")
        seconds = time.perf_counter() - started
        return Started(seconds, {"from_pretrained": seconds}, None)

    def answer(self, prompt: list[int]) -> int:
        ids = self._torch.tensor([prompt])
        mask = self._torch.ones_like(ids)
        output = self._model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return int(output[0, -1])

    def first_token(self, directory: Path, prompt: list[int]) -> Started:
        started = time.perf_counter()
        ready = self.ready(directory)
        token = self.answer(prompt)
        seconds = time.perf_counter() - started
        return Started(seconds, ready.phases | {"first forward": seconds - ready.seconds}, token)


class SafetensorsAssign(FromPretrained):
    """The model on the meta device, the file mapped, its tensors assigned: what can be done by hand with the page cache."""

    name = "safetensors mmap, load_state_dict(assign=True)"

    def ready(self, directory: Path) -> Started:
        from safetensors.torch import load_file
        from transformers import AutoConfig

        started = time.perf_counter()
        config = AutoConfig.from_pretrained(directory)
        with self._torch.device("meta"):
            model = self._class.from_config(config, dtype=self._torch.bfloat16).eval()
        constructed_s = time.perf_counter() - started
        tensors = {name: tensor for path in weights_in(directory) for name, tensor in load_file(path).items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        # Buffers that no checkpoint holds were made on the meta device, too.
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=config)
        self._model = model
        seconds = time.perf_counter() - started
        return Started(seconds, {"construct": constructed_s, "map and assign": seconds - constructed_s}, None)


class TransformersServe(Starter):
    """A real ``transformers serve``, asked over HTTP; ``POST /reset`` makes it forget the model."""

    name = "transformers serve, over HTTP"

    def __init__(self, tiny: Path, pool: str) -> None:
        super().__init__(tiny, pool)
        command = Path(sys.executable).with_name("transformers")
        if not command.exists():
            raise ImportError(f"there is no {command}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._server = subprocess.Popen(
            [command, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            self._wait_for_server()
            self.first_token(tiny, [1, 2, 3])
            self.forget(tiny)
        except BaseException:
            self.close()
            raise

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            if self._server.poll() is not None:
                raise ImportError(f"transformers serve ended with exit code {self._server.returncode}: see its log")
            try:
                self._ask("GET", "/health")
            except urllib.error.URLError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())

    def forget(self, directory: Path) -> None:  # noqa: ARG002 - it forgets all
        self._ask("POST", "/reset")

    def first_token(self, directory: Path, prompt: list[int]) -> Started:
        # One letter, one token: the checkpoint's tokenizer knows no merges.
        text = "".join(chr(ord("a") + token % 26) for token in prompt)
        started = time.perf_counter()
        answer = self._ask(
            "POST", "/v1/completions", {"model": str(directory), "prompt": text, "max_tokens": 1, "temperature": 0}
        )
        seconds = time.perf_counter() - started
        n_tokens = answer["usage"]["completion_tokens"]
        if n_tokens != 1:
            raise BenchError(f"transformers serve answered with {n_tokens} tokens, not with one")
        return Started(seconds, {"request": seconds}, None)

    def close(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


HOST: tuple[type[HostStarter], ...] = (OursHit, OursHitAgain, OursHitOther, FromPretrained, SafetensorsAssign)
TTFT: tuple[type[Starter], ...] = (
    OursOverlapped,
    OursLater,
    OursOverlappedFast,
    OursOverlappedCompressed,
    OursOverlappedPrivate,
    FromPretrained,
    TransformersServe,
)
