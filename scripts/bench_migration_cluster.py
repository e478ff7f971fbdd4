"""For ``bench_migration.py``: a cluster of real processes, clients that note when each token came, and orders to the workers.

Requests are asked for over HTTP, as anybody's are. That a request moves is told to the worker that has it, since two of the ways
to move are nobody's to ask for (``bench_migration_moves.py``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import bench_engine_model, bench_migration_moves
from scripts.bench_engine_http import free_port
from scripts.bench_load_measure import BenchError

_ROOT = Path(__file__).resolve().parent.parent
MODEL = "bench"
#: The text of token `i` is the character of this number and `i`: so the text of an answer has the ids of its tokens.
FIRST_CHARACTER = 0x10000
_START_TIMEOUT_S = 120.0


# --- models ------------------------------------------------------------------------------------------------------------------


def checkpoint(work_dir: Path, shape: str, dtype: str, seed: int, max_model_len: int) -> Path:
    """A model of ``bench_engine.py`` with a longer window, and a tokenizer of one character for each token."""
    plain = bench_engine_model.checkpoint(work_dir, shape, dtype, seed)
    directory = work_dir / f"{plain.name}-moving-{max_model_len}"
    if directory.is_dir():
        return directory
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.link(plain / "model.safetensors", partial / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_model_len}))
    write_tokenizer(partial, config["vocab_size"])
    partial.rename(directory)
    return directory


def write_tokenizer(directory: Path, n_vocab: int) -> None:
    """One in which each token is a character, so that a text has the ids of its tokens: :func:`token_ids`."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {chr(FIRST_CHARACTER + token): token for token in range(n_vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def token_ids(text: str) -> list[int]:
    """The tokens that `text` was made of."""
    return [ord(character) - FIRST_CHARACTER for character in text]


# --- the cluster -------------------------------------------------------------------------------------------------------------


class Cluster:
    """``sllmdask up`` with some workers, an instance of the model on each."""

    def __init__(self, directory: Path, store_dir: Path, n_workers: int, engine: dict[str, Any], log: Path) -> None:
        """`engine`: settings of the engines, as in ``configs/reference.yaml``."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        env = {f"DASK_SLLMDASK__ENGINE__{key.upper()}": str(value) for key, value in engine.items()}
        env["DASK_SLLMDASK__WORKER__STORE_DIR"] = str(store_dir)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        up = [sys.executable, "-c", "from sllmdask.cli import main; main()", "up", "--json"]
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*up, "--workers", str(n_workers), "--port", str(port)],
                env=os.environ | env,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._dask: Any = None
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                raise BenchError(f"the cluster did not start:\n{log.read_text()[-2000:]}")
            from distributed import Client

            self._dask = Client(json.loads(line)["scheduler"], set_as_default=False)
            scaling = {"max_instances": n_workers, "target": 1000, "keep_alive": -1}
            backend = {"pretrained_model_name_or_path": str(directory)}
            self.post("/register", {"model": MODEL, "backend_config": backend, "auto_scaling_config": scaling})
            self.nodes = sorted(worker["name"] for worker in self.workers())
            for node in self.nodes:
                self.post("/admin/load", {"model": MODEL, "node": node})
            self._addresses = {worker["name"]: worker["address"] for worker in self.workers()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._dask is not None:
            self._dask.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_START_TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise BenchError(f"POST {path} gave {error.code}: {error.read()[:300].decode(errors='replace')}") from None

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/admin/cluster")["workers"]
        return found

    def row(self, request: str) -> dict[str, Any]:
        """What the front door says of a request."""
        rows = self.get("/admin/requests")["requests"]
        return next(row for row in rows if row["id"] == request)

    def usage(self) -> dict[str, tuple[int, int, int]]:
        """Of each node: requests of its instance, KV blocks that are not free, and places that are taken."""
        return {node: tuple(self.run(node, bench_migration_moves.usage)) for node in self.nodes}

    def run(self, node: str, function: Any, *arguments: Any) -> Any:
        """Call ``function(*arguments, dask_worker=...)`` on a worker's loop."""
        address = self._addresses[node]
        return self._dask.run(function, *arguments, workers=[address])[address]

    def note_steps(self) -> None:
        for node in self.nodes:
            self.run(node, bench_migration_moves.note_steps)

    def steps(self, node: str) -> list[tuple[float, float]]:
        """When the newest steps of a node's engine began and ended, since :meth:`note_steps`."""
        return list(map(tuple, self.run(node, bench_migration_moves.steps)))

    def move(self, source: str, destination: str, way: str, number: int = 0) -> dict[str, Any]:
        """Move request `number` of `source`, of those that came the oldest first; what became of it, and when it said what."""
        to = self.run(destination, bench_migration_moves.address)
        return dict(self.run(source, bench_migration_moves.move, number, source, {**to, "node": destination}, way))


# --- clients -----------------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """A streamed answer: its tokens, and by ``time.monotonic()`` when each came; tokens of one chunk came together."""

    request: str
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    reason: str | None = None
    error: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (after - before) for before, after in zip(self.at, self.at[1:], strict=False)]

    async def until(self, n_tokens: int) -> None:
        """Until so many tokens are there. Raises :class:`BenchError` if they will not come."""
        while len(self.ids) < n_tokens:
            if self.error or self.reason is not None:
                raise BenchError(f"the answer ended after {len(self.ids)} tokens: {self.error or self.reason}")
            self.changed.clear()
            await self.changed.wait()


async def follow(session: Any, stream: Stream, max_tokens: int, **more: Any) -> Stream:
    """Ask, and note what comes; on one connection, of which nothing is tried twice."""
    import aiohttp

    body = {
        "model": MODEL,
        "prompt": list(stream.prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        **more,
    }
    try:
        async with session.post("/v1/completions", json=body, headers={"x-request-id": stream.request}) as response:
            if response.status != 200:
                stream.error = f"{response.status} {(await response.text())[:300]}"
                return stream
            async for line in response.content:
                now = time.monotonic()
                if not line.startswith(b"data: {"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    stream.error = str(frame["error"])[:300]
                for choice in frame.get("choices") or ():
                    fresh = token_ids(choice["text"])
                    stream.ids += fresh
                    stream.at += [now] * len(fresh)
                    stream.reason = choice["finish_reason"] or stream.reason
                stream.changed.set()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        stream.error = repr(error)[:300]
    finally:
        stream.changed.set()
    return stream


def open_session(url: str) -> Any:
    import aiohttp

    return aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0))
