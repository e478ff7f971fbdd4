"""The demonstration behind ``scripts/quickstart``: two workers, two embedded models, one question each."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time

# Before Dask is imported: this is a demonstration, not a place for its log.
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
os.environ.setdefault("DASK_LOGGING__SLLMDASK", "warning")

from sllmdask import Client, serve
from sllmdask.errors import SllmError
from sllmdask.units import format_seconds

QUESTIONS = {"demo-llama": "What does sllmdask do?", "demo-qwen": "What is a cold start?"}


def ask(client: Client, model: str) -> None:
    """Ask a model that is not loaded, then the same once more, and print what came and how long it took."""
    question = QUESTIONS[model]
    print(f"\n{model}: {question}")
    began = time.perf_counter()
    first = client.submit(model, question, max_tokens=120, temperature=0).response(timeout=120)
    cold_s = time.perf_counter() - began
    print(f"  {first.text.strip()}")
    began = time.perf_counter()
    client.submit(model, question, max_tokens=120, temperature=0).result(timeout=120)
    warm_s = time.perf_counter() - began
    where = f"loaded from {first.cold_start} on worker {first.node}"
    print(f"  cold start, {where}: {format_seconds(cold_s)}; warm: {format_seconds(warm_s)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the answers")
    parser.add_argument("--port", type=int, default=8343, help="of the HTTP API; 0: any free one (default: 8343)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"starting a scheduler, {options.workers} workers and a front door ...", flush=True)
    try:
        with serve(n_workers=options.workers, server={"port": options.port}) as service, Client(service.url) as client:
            for model in QUESTIONS:
                service.deploy(model, source=f"demo:{model}")
                ask(client, model)
            print(f"\nAPI     {service.url}/v1   (models: {', '.join(QUESTIONS)})")
            print(f"cluster {service.url}/admin/cluster")
            print(
                f"\ncurl {service.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
                """  -d '{"model": "demo-llama", "messages": [{"role": "user", "content": "What is your name?"}]}'"""
            )
            if not options.once:
                print("\nCtrl-C stops everything.", flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped")
    except (SllmError, TimeoutError) as error:
        print(f"error: {error or 'no answer in two minutes'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
