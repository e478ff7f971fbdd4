"""Stand-ins for what is slow or far away. They keep the promises of what they stand for; a test decides when things happen."""

from __future__ import annotations

import asyncio
import copy
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sllmdask.batching.params import TokenLogprobs
from sllmdask.batching.sequence import FinishReason
from sllmdask.cluster.journal import (
    Delta,
    Embedded,
    EmbedRequest,
    Finished,
    GatewayEvent,
    GenerateRequest,
    Journal,
    Progress,
    Started,
)
from sllmdask.cluster.observing import Observer
from sllmdask.config import Deployment, ServerSettings
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import (
    AdapterNotFound,
    CheckpointNotFound,
    InvalidRequest,
    ModelNotFound,
    MoveFailed,
    RecordNotFound,
    SchedulerUnreachable,
    SllmError,
)
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.server import app as server_app
from sllmdask.server import openai

CHAT_TEMPLATE = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@lru_cache(maxsize=1)
def byte_tokenizer() -> Tokenizer:
    """A real tokenizer whose tokens are bytes, so that characters span tokens: 256 of them, and an end of text."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>")
    hf_tokenizer.chat_template = CHAT_TEMPLATE
    return Tokenizer(hf_tokenizer)


def told_of(token_id: int, n_top: int) -> TokenLogprobs:
    """Log probabilities that name their token: it is the second likeliest."""
    return TokenLogprobs(-token_id / 100, (7, token_id, 9)[:n_top], (-0.001, -token_id / 100, -9.5)[:n_top])


@dataclass
class FakeModel:
    """One deployment. An event that is set opens its gate; ``None`` is no gate."""

    answer: Callable[[str], str] = lambda _: "Hello from a fake model."
    state: str = "ready"
    max_model_len: int = 1024
    cold_start: str = "hit"
    #: Of the model's ``generation_config.json``.
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 4 * 1024**2
    created: int = field(default_factory=lambda: int(time.time()))
    #: How far its loading is, as ``GET /admin/cluster`` tells it.
    progress: dict[str, Any] | None = None
    #: What is said while the request waits.
    loading: Sequence[Progress] = ()
    #: Passed after `loading`, before the instance takes the request.
    gate: asyncio.Event | None = None
    #: What is said after an instance took the request, and nodes whose instances took it before and died.
    reading: Sequence[Progress] = ()
    died: Sequence[str] = ()
    #: Passed when this many tokens were sent.
    pause_after: int = 0
    pause: asyncio.Event | None = None
    #: Raised before the instance takes the request, and when `fail_after` tokens were sent.
    refuse: Exception | None = None
    fail: Exception | None = None
    fail_after: int = 0
    #: How it makes embeddings, if it does; the vector of an input is its number of tokens, its first id, its last id.
    embedding: dict[str, Any] | None = None
    #: Sources of its LoRA adapters, by name.
    adapters: dict[str, str] = field(default_factory=dict)


class FakeGateway:
    """The gateway's interface over answers known beforehand, token by token."""

    def __init__(self, **models: FakeModel) -> None:
        self.deployed = dict(models)
        self.ready = True
        self.not_ready_reason = "No worker is connected."
        #: Every request that came, and the ids of those that were closed before their end.
        self.asked: list[GenerateRequest | EmbedRequest] = []
        self.closed: list[str] = []
        self.registered: list[Deployment] = []
        #: What operators asked for, in order.
        self.operated: list[tuple[Any, ...]] = []
        #: What is told of its one worker, and whether that is there.
        self.draining: dict[str, Any] | None = None
        #: Moves under way.
        self.moves: list[dict[str, Any]] = []
        self.has_worker = True
        #: What the scheduler would have seen; a test tells it.
        self.observer = Observer(Controller(ControllerSettings()), {}, {})
        self.n_running = 0
        self.most_running = 0
        self._journals: dict[str, Journal] = {}
        self._changed = asyncio.Condition()

    def models(self) -> list[dict[str, Any]]:
        return [
            {
                "model": name,
                "state": model.state,
                "created": model.created,
                "max_model_len": model.max_model_len,
                "nbytes": model.nbytes,
                "instances": int(model.state == "ready"),
                "reason": None,
                "keep_alive": 300.0,
                "progress": None,
                "task": "embed" if model.embedding else "generate",
                "embedding": model.embedding,
                "adapters": model.adapters,
            }
            for name, model in self.deployed.items()
        ]

    async def tokenizer(self, model: str) -> Tokenizer:
        openai.find_model(self.models(), model)
        tokenizer = copy.copy(byte_tokenizer())
        tokenizer.sampling_defaults = self.deployed[model].sampling_defaults
        return tokenizer

    def resolve(self, model: str, adapter: str | None) -> tuple[str, tuple[str, str] | None]:
        base, _, named = model.rpartition(":")
        if model not in self.deployed and base in self.deployed and not adapter:
            model, adapter = base, named
        found = openai.find_model(self.models(), model)["adapters"]
        if adapter and adapter not in found:
            raise AdapterNotFound(model, adapter, list(found))
        return model, (adapter, found[adapter]) if adapter else None

    def embedding(self, model: str) -> dict[str, Any] | None:
        return openai.find_model(self.models(), model)["embedding"]

    def max_model_len(self, model: str) -> int:
        return self.deployed[model].max_model_len

    async def register(self, deployment: Deployment) -> dict[str, Any]:
        if deployment.source.startswith("/missing"):
            raise CheckpointNotFound(deployment.source, "there is no such directory")
        self.registered.append(deployment)
        self.deployed[deployment.model] = FakeModel(state="disk")
        return {"model": deployment.model, "warnings": deployment.warnings()}

    async def update(self, model: str, changes: dict[str, Any]) -> dict[str, Any]:
        self.operated.append(("update", model, changes))
        if model not in self.deployed:
            raise ModelNotFound(model)
        return {"model": model, "warnings": []}

    async def delete(self, model: str, adapters: list[str] | None = None, force: bool = False) -> dict[str, Any]:
        if model not in self.deployed:
            raise ModelNotFound(model)
        if adapters is None:
            del self.deployed[model]
        for name in adapters or ():
            if self.deployed[model].adapters.pop(name, None) is None:
                raise AdapterNotFound(model, name)
        n = self.n_running
        return {"model": model, "n_running": 0 if force else n, "n_aborted": n if force else 0} if adapters is None else {}

    async def load(self, model: str, node: str | None, tier: str, wait: bool) -> dict[str, Any]:
        self.operated.append(("load", model, node, tier, wait))
        await self._tell()
        held = self.deployed.get(model)
        if held is None:
            raise ModelNotFound(model, ["qwen"])
        if held.refuse is not None:
            raise held.refuse
        said = {"model": model, "tier": tier, "keep_alive": 300.0, "progress": None}
        if not wait:
            return said | {"state": "loading", "node": node, "instance": None, "cold_start": None, "seconds": None}
        if held.gate is not None:
            held.state = "loading"
            await held.gate.wait()
        held.state = "ready"
        here = {"state": "ready", "instance": f"{model}/1"} if tier == "device" else {"state": "host", "instance": None}
        return said | here | {"node": node or "0", "cold_start": held.cold_start, "seconds": 0.25}

    async def unload(self, model: str, node: str | None, wait: bool) -> dict[str, Any]:
        self.operated.append(("unload", model, node, wait))
        if model not in self.deployed:
            raise ModelNotFound(model)
        loaded = self.deployed[model].state == "ready"
        self.deployed[model].state = "host"
        gone = [{"instance": f"{model}/1", "node": node or "0"}] if loaded else []
        return {"model": model, "state": "unloaded" if wait else "unloading", "instances": gone, "warnings": []}

    async def pin(self, model: str, node: str | None, pinned: bool) -> dict[str, Any]:
        self.operated.append(("pin", model, node, pinned))
        if model not in self.deployed:
            raise ModelNotFound(model)
        nodes = [node or "0"]
        return {"model": model, "pinned": nodes if pinned else [], "nodes": nodes, "nbytes": 4 * 1024**2, "seconds": 0.25}

    async def pull(self, model: str | None, source: str | None, node: str | None, wait: bool) -> dict[str, Any]:
        self.operated.append(("pull", model, source, node, wait))
        said = {"source": model or source, "node": node or "0", "fetched": True}
        if (source or "").startswith("/missing"):
            raise CheckpointNotFound(source or "", "there is no such directory")
        return said | (
            {"state": "disk", "nbytes": 4 * 1024**2, "seconds": 0.5}
            if wait
            else {"state": "fetching", "nbytes": None, "seconds": None}
        )

    async def migrate(self, request: str | None, instance: str | None, to: str, kind: str | None, wait: bool) -> dict[str, Any]:
        self.operated.append(("migrate", request, instance, to, kind, wait))
        if request == "gone":
            raise InvalidRequest("The request 'gone' has ended.", "request")
        if request == "stuck":
            raise MoveFailed("The request 'stuck'", to, "there is no room")
        if not wait:
            return {"state": "moving", "to": to, "moves": []}
        move = {"request": request or "r-1", "source": "0", "destination": to, "outcome": "moved", "reason": None}
        move |= {"kind": kind or "kv", "steps": [65536, 4096], "nbytes": 69632, "n_tokens": 512, "stop_ms": 1.25}
        return {"state": "moved", "to": to, "instance": "m/2", "left": 0, "moves": [move]}

    async def drain(self, node: str, wait: bool, undo: bool) -> dict[str, Any]:
        self.operated.append(("drain", node, wait, undo))
        if node == "7":
            raise InvalidRequest("There is no node '7'. Connected are '0'.", "node")
        if undo:
            return {"node": node, "state": "ready"}
        told = {"moved": 2, "ended": 1, "seconds": 0.5, "stuck": []}
        left = (
            {"requests": 0, "instances": 0, "state": "drained"} if wait else {"requests": 3, "instances": 1, "state": "draining"}
        )
        return {"node": node, **told, **left}

    def requests(self) -> list[dict[str, Any]]:
        return [journal.as_row() for journal in self._journals.values()]

    async def all_requests(self) -> list[dict[str, Any]]:
        return self.requests()

    async def explain(self, name: str) -> dict[str, Any]:
        return await self.observer.explain(name)

    async def events(self, since: int, model: str | None, last: int | None, wait_s: float) -> dict[str, Any]:
        return await self.observer.events(since, model, last, wait_s)

    async def families(self) -> list[dict[str, Any]]:
        if not self.ready:
            raise SchedulerUnreachable("tcp://127.0.0.1:1", "it went away")
        return list((await self.observer.metrics())["families"])

    async def cancel(self, request: str) -> dict[str, Any]:
        self.operated.append(("cancel", request))
        if request not in self._journals:
            raise RecordNotFound(request, len(self._journals), 1.0)
        state = self._journals[request].state
        ended = state not in ("queued", "running")
        return {"request": request, "cancelled": not ended, "state": state if ended else "cancelled"}

    async def cluster(self) -> dict[str, Any]:
        held = [{"model": name, "state": m.state, "tier": "device", "nbytes": m.nbytes} for name, m in self.deployed.items()]
        worker = {"name": "0", "address": "tcp://127.0.0.1:1", "pid": 1, "slots": 2, "slots_used": len(held), "models": held}
        worker["instances"] = [
            {
                "instance": f"{name}/1",
                "model": name,
                "state": model.state,
                "n_requests": 0,
                "progress": model.progress,
                "engine": {"model": name, "blocks_used": 64, "blocks_total": 4096, "bytes_per_block": 16384},
            }
            for name, model in self.deployed.items()
        ]
        worker["draining"] = self.draining
        worker["estimate"] = {"n": 5, "error_ratio": 0.08}
        warnings = ["the hardware file names node '7', which is not connected"]
        device, host = {"used": 80 * 1024**2, "capacity": 1024**3}, {"used": 4 * 1024**2, "capacity": 1024**3}
        workers = [{**worker, "tiers": {"device": device, "host": host}}] if self.has_worker else []
        return {"workers": workers, "moves": self.moves, "warnings": warnings}

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GatewayEvent]:
        journal = self._journals[request.id] = Journal(request)
        self.asked.append(request)
        self.n_running += 1
        self.most_running = max(self.most_running, self.n_running)
        await self._tell()
        try:
            async for event in self._run(journal, self.deployed[request.model]):
                yield event
            journal.state = "finished"
        finally:
            self.n_running -= 1
            if journal.state != "finished":
                self.closed.append(request.id)
            journal.state = "finished"
            await asyncio.shield(self._tell())

    async def embed(self, request: EmbedRequest) -> AsyncIterator[GatewayEvent]:
        model = self.deployed[request.model]
        journal = self._journals[request.id] = Journal(request)
        self.asked.append(request)
        await self._tell()
        try:
            yield Progress("queued", f"waiting for {request.model}")
            if model.gate is not None:
                await model.gate.wait()
            if model.refuse is not None:
                raise model.refuse
            yield Started("0", model.cold_start, 0.25)
            for index, ids in reversed(list(enumerate(request.inputs))):
                if model.fail is not None and index == model.fail_after:
                    raise model.fail
                vector = [float(len(ids)), float(ids[0]), float(ids[-1])][: request.dimensions]
                yield Embedded(index, struct.pack(f"<{len(vector)}f", *vector))
            journal.state = "finished"
            yield Finished(FinishReason.STOP, request.n_prompt_tokens, 0)
        finally:
            if journal.state != "finished":
                self.closed.append(request.id)
            await asyncio.shield(self._tell())

    async def _run(self, journal: Journal, model: FakeModel) -> AsyncIterator[GatewayEvent]:
        request, tokenizer = journal.request, byte_tokenizer()
        yield Progress("queued", f"waiting for {request.model}")
        for progress in model.loading:
            yield progress
        if model.gate is not None:
            await model.gate.wait()
        if model.refuse is not None:
            raise model.refuse
        journal.state, journal.node = "running", "0"
        for node in model.died:
            journal.path.append(node)
            yield Started(node, "remote", 0.125)
        journal.path.append("0")
        yield Started("0", model.cold_start, 0.25)
        for progress in model.reading:
            yield progress
        text = tokenizer.stream(request.params.stop)
        answer = tokenizer.encode(model.answer(tokenizer.decode(request.prompt_ids)))
        for index, token_id in enumerate(answer[: request.params.max_tokens]):
            if model.pause is not None and index == model.pause_after:
                await model.pause.wait()
            if model.fail is not None and index == model.fail_after:
                raise model.fail
            await asyncio.sleep(0)
            shown = text.push(journal.accept(0, index, [token_id]))
            n_top, n_top_prompt = request.params.logprobs, request.params.prompt_logprobs
            told = () if n_top is None else (told_of(token_id, n_top),)
            of_prompt = None
            if n_top_prompt is not None and index == 0:
                of_prompt = tuple(told_of(each, n_top_prompt) for each in request.prompt_ids[1:])
            yield Delta(shown, (token_id,), told, of_prompt)
            if text.stopped:
                break
        if rest := text.flush():
            yield Delta(rest, ())
        ended = text.stopped or len(journal.output_ids) == len(answer)
        n_tokens = len(journal.output_ids)
        yield Finished(FinishReason.STOP if ended else FinishReason.LENGTH, len(request.prompt_ids), n_tokens)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something to become true of this gateway; fails the test after five seconds."""
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(holds)


class ServerThread:
    """A front door over a :class:`FakeGateway` on a thread, for tests of what blocks."""

    def __init__(self, make_gateway: Callable[[], FakeGateway], settings: ServerSettings | None = None) -> None:
        self._make_gateway = make_gateway
        self._settings = settings or ServerSettings(port=0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> ServerThread:
        self._thread.start()
        self.gateway, self._runner, self.url = self.call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Any) -> Any:
        """Run `coroutine` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    def until(self, holds: Callable[[], bool]) -> None:
        self.call(self.gateway.until(holds))

    def open(self, gate: asyncio.Event) -> None:
        self._loop.call_soon_threadsafe(gate.set)

    async def _start(self) -> Any:
        gateway = self._make_gateway()
        runner, url = await server_app.start(server_app.make_app(gateway, self._settings), self._settings)
        return gateway, runner, url


def every_error() -> list[SllmError]:
    """One error of each class of :mod:`sllmdask.errors`."""
    from sllmdask import errors

    return [
        errors.SllmError("something"),
        errors.ConfigError("bad", "key"),
        errors.PortInUse("127.0.0.1", 1),
        errors.DeterminismUnavailable("gone"),
        errors.CheckpointError("bad files"),
        errors.CheckpointNotFound("/x", "no such directory"),
        errors.CheckpointCorrupt("a.safetensors", "w", "truncated"),
        errors.UnsupportedArchitecture("Mamba", "no attention"),
        errors.AdapterUnsupported("polite", "of another shape"),
        errors.RequestError("bad"),
        errors.InvalidRequest("bad", "field"),
        errors.ContextTooLong(10, 5),
        errors.ModelNotFound("a", ["b"]),
        errors.AdapterNotFound("a", "b", ["c"]),
        errors.RecordNotFound("r", 3, 2.5),
        errors.WrongTask("a", "embed"),
        errors.RouteNotFound("GET", "/x"),
        errors.MethodNotAllowed("GET", "/x", ["POST"]),
        errors.UnsupportedMediaType("text/plain"),
        errors.BodyTooLarge(7),
        errors.Unavailable("later"),
        errors.QueueFull("a", 3),
        errors.QueueTimeout("a", 1.5, "all slots are busy"),
        errors.NoWorker("a", "none connected"),
        errors.InsufficientMemory("a", 2, 1),
        errors.LoadFailed("a", "reason"),
        errors.SchedulerUnreachable("tcp://x", "refused"),
        errors.WorkerLost("0"),
        errors.InstanceGone("a/0"),
        errors.Cancelled(),
        errors.EngineError("reason"),
    ]
