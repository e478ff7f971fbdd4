"""For ``bench_engine.py``: real servers, asked over HTTP. CPU seconds are those of all processes of a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar

from scripts.bench_engine_contenders import engine_settings
from scripts.bench_engine_measure import Ran, Work, cpu_seconds_of_tree
from scripts.bench_load_measure import BenchError

OURS = "sllmdask up, over HTTP"
SERVE = "transformers serve, over HTTP"
_START_TIMEOUT_S = 180.0
_ROOT = Path(__file__).resolve().parent.parent


class Server:
    """One server that has one model; the prompts are text."""

    #: What a request calls the model.
    model: str
    #: Fields of a request that only this server knows.
    more: ClassVar[dict[str, Any]] = {}

    def __init__(self, command: list[str], url: str, env: dict[str, str], output: IO[bytes] | None = None) -> None:
        """`output`: where what it prints goes; ``None``: to ours."""
        # A group of its own, so that no process of it is left over.
        self._process = subprocess.Popen(command, env=os.environ | env, start_new_session=True, stdout=output, stderr=output)
        self._url = url
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def run(self, work: Work) -> Ran:
        """All requests at a time, each on a connection of its own."""
        bodies = [
            {"model": self.model, "prompt": text, "max_tokens": length, "temperature": 0, **self.more}
            for text, length in zip(work.texts(), work.lengths, strict=True)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            cpu, wall = cpu_seconds_of_tree(self._process.pid), time.perf_counter()
            answers = list(pool.map(lambda body: self._ask("POST", "/v1/completions", body), bodies))
            wall_s, cpu_s = time.perf_counter() - wall, cpu_seconds_of_tree(self._process.pid) - cpu
        counted = [answer["usage"]["completion_tokens"] for answer in answers]
        if counted != work.lengths:
            raise BenchError(f"it was asked for answers of {work.lengths} tokens and gave {counted}")
        # /proc counts hundredths of a second.
        return Ran([answer["choices"][0]["text"] for answer in answers], sum(counted), wall_s, max(cpu_s, 0.01))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if self._process.poll() is not None:
                raise BenchError(f"it ended with exit code {self._process.returncode} before it answered; is it installed?")
            try:
                self._ask("GET", "/health")
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
                threading.Event().wait(0.1)
            else:
                return

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=1800) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise BenchError(f"{method} {path} gave {error.code}: {error.read()[:300].decode(errors='replace')}") from None
        return json.loads(text) if text.strip().startswith(b"{") else None


class OurServer(Server):
    """``sllmdask up`` with one worker: front door, scheduler and worker are processes."""

    model = "bench"
    more: ClassVar[dict[str, Any]] = {"ignore_eos": True}

    def __init__(self, directory: Path, dtype: str, device: str, n_threads: int, settings: dict[str, Any]) -> None:  # noqa: ARG002
        engine_settings(device, n_threads, settings)  # better refused here than in a log of the server
        port = free_port()
        engine = {"device": device, "n_threads": n_threads} | settings
        env = {f"DASK_SLLMDASK__ENGINE__{key.upper()}": str(value) for key, value in engine.items()}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        up = "from sllmdask.cli import main; main()"
        command = [sys.executable, "-c", up, "up", f"bench={directory}", "--workers", "1", "--port", str(port)]
        super().__init__(command, f"http://127.0.0.1:{port}", env)


class TransformersServe(Server):
    """``transformers serve --continuous-batching``."""

    def __init__(self, directory: Path, dtype: str, device: str, n_threads: int) -> None:  # noqa: ARG002 - by the environment
        import transformers  # noqa: F401 - says that it is missing before anything starts

        self.model = str(directory)
        port = free_port()
        serve = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(directory)]
        options = ["--continuous-batching", "--dtype", dtype, "--device", device, "--host", "127.0.0.1", "--port", str(port)]
        # As much cache and as large batches as the manager has where it takes part without a server.
        options += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
        super().__init__(serve + options, f"http://127.0.0.1:{port}", {"HF_HUB_OFFLINE": "1"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
