"""How much does everything around the engine add to a warm request?

One request at a time, one token each, over one kept-alive connection to a real front door, scheduler and worker process. The
engine's own time is the worker's count of seconds inside steps; what is left is HTTP, tokenising, placement by the scheduler, the
stream to the worker and back, and the waking of four processes.

    scripts/bench_overhead.py [--n 500] [--json FILE]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
os.environ.setdefault("DASK_LOGGING__SLLMDASK", "warning")

from sllmdask import serve


class Connection:
    """One kept-alive HTTP connection."""

    def __init__(self, url: str) -> None:
        self._http = http.client.HTTPConnection(urlsplit(url).netloc)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"content-type": "application/json"}
        self._http.request(method, path, None if body is None else json.dumps(body), headers)
        response = self._http.getresponse()
        answer = json.load(response)
        assert response.status == 200, answer
        return answer

    def engine(self) -> dict[str, Any]:
        """Counters of the one engine."""
        (worker,) = self.ask("GET", "/admin/cluster")["workers"]
        (instance,) = worker["instances"]
        return instance["engine"]


def measure(connection: Connection, n: int, *, stream: bool) -> list[float]:
    """Seconds of each of `n` requests: to the whole answer, or to the end of the stream."""
    body = {"model": "demo-qwen", "prompt": "Hello", "max_tokens": 1, "temperature": 0, "stream": stream}
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        if stream:
            connection._http.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            connection._http.getresponse().read()
        else:
            connection.ask("POST", "/v1/completions", body)
        seconds.append(time.perf_counter() - began)
    return seconds


def settled(connection: Connection) -> dict[str, Any]:
    """The engine's counters once the worker has reported and nothing changes any more."""
    before: dict[str, Any] = {}
    while True:
        time.sleep(3)  # longer than it takes a heartbeat to be folded in
        after = connection.engine()
        if after == before and "step_s" in after:
            return after
        before = after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="requests of each kind (default: 500)")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with serve(n_workers=1, server={"port": 0}) as service:
        service.deploy("demo-qwen", source="demo:demo-qwen")
        connection = Connection(service.url)
        measure(connection, 50, stream=False)
        for name, stream in (("whole", False), ("streamed", True)):
            before = settled(connection)
            seconds = sorted(measure(connection, options.n, stream=stream))
            after = settled(connection)
            engine_s = (after["step_s"] - before["step_s"]) / options.n
            p50 = statistics.median(seconds)
            results[name] = {
                "p50_ms": 1e3 * p50,
                "p90_ms": 1e3 * seconds[int(0.9 * len(seconds))],
                "p99_ms": 1e3 * seconds[int(0.99 * len(seconds))],
                "engine_ms": 1e3 * engine_s,
                "overhead_p50_ms": 1e3 * (p50 - engine_s),
                "seconds": seconds,
            }
    print(
        f"{'request':10} {'p50':>8} {'p90':>8} {'p99':>8} {'engine':>8} {'p50 over the engine':>20}   (ms, {options.n} requests)"
    )
    for name, row in results.items():
        figures = " ".join(f"{row[key]:8.2f}" for key in ("p50_ms", "p90_ms", "p99_ms", "engine_ms"))
        print(f"{name:10} {figures} {row['overhead_p50_ms']:20.2f}")
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }
    print(f"{machine['cores']} cores, {machine['machine']}, Python {machine['python']}, load {machine['load'][0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "n": options.n, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
