#!/usr/bin/env python
"""How long does the controller take for one decision, in a cluster of many workers and models?

Everything goes through ``Controller.handle``, as in the scheduler plugin, and is timed there: workers join, models are deployed,
then requests arrive as a Poisson process under a virtual clock, for models by a Zipf law. What the controller decides is answered
as a cluster would (loads last as long as they are predicted to), so that there are cold starts, evictions and queues. The times
are by kind of event, over all of them, and over those that had consequences: decisions.

Apart from that: the search for victims among 64 candidates on one worker, for a shortage of one to eight slots, where each may be
evicted, preempted, or go to some of eight workers that are short of room.

    python scripts/bench_placement.py [--workers 1000] [--models 10000] [--requests 20000] [--json FILE]
    python scripts/bench_placement.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from sllmdask.policy import events as ev
from sllmdask.policy.choice import Way
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Decision, Dispatch, Load, Migrate, Preempt, Refuse, Unload, WakeAt
from sllmdask.policy.victims import Candidate, Leave, cheapest_victims
from sllmdask.policy.views import ModelView, RequestView, Tier, WorkerView

GIB = 1024**3
#: Seconds of a request once it runs, on average; and of an instance's leaving.
SERVICE_S, UNLOAD_S = 5.0, 0.05
SLOTS = 4
#: Candidates of one search for victims, destinations that they may go to, and the most slots that are missing.
N_CANDIDATES, N_DESTINATIONS, MAX_SHORTAGE = 64, 8, 8


@dataclass
class Times:
    """Seconds of calls of ``Controller.handle``, by kind of event, and of those whose answer was more than a timer."""

    by_event: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    decisions: list[float] = field(default_factory=list)

    def handle(self, controller: Controller, event: ev.Event) -> list[Decision]:
        began = time.perf_counter()
        found = controller.handle(event)
        seconds = time.perf_counter() - began
        self.by_event[type(event).__name__].append(seconds)
        if any(not isinstance(decision, WakeAt) for decision in found):
            self.decisions.append(seconds)
        return found

    @property
    def all(self) -> list[float]:
        return [seconds for found in self.by_event.values() for seconds in found]


# --- the cluster -----------------------------------------------------------------------------------------------------


def workers_and_models(n_workers: int, n_models: int, rng: random.Random) -> tuple[list[WorkerView], list[ModelView]]:
    """Each model is on the disks of three workers, and now and then in the memory of one of them."""
    models = [
        ModelView(f"model-{i}", nbytes=rng.choice([1, 3, 8, 16]) * GIB, n_slots=2 if rng.random() < 0.1 else 1, keep_alive_s=60.0)
        for i in range(n_models)
    ]
    residency: list[dict[str, Tier]] = [{} for _ in range(n_workers)]
    for model in models:
        holders = rng.sample(range(n_workers), min(3, n_workers))
        for holder in holders:
            residency[holder][model.name] = Tier.DISK
        if rng.random() < 0.3:
            residency[holders[0]][model.name] = Tier.HOST
    workers = [
        WorkerView(
            address=f"tcp://10.0.{i // 250}.{i % 250}:1",
            name=str(i),
            slots=SLOTS,
            host_capacity=256 * GIB,
            residency=residency[i],
            bytes_per_s={Tier.HOST: 10e9, Tier.DISK: rng.uniform(1e9, 6e9), Tier.PEER: 1.2e9},
        )
        for i in range(n_workers)
    ]
    return workers, models


class Cluster:
    """Does what a controller decides, under a virtual clock. Its memory is never full."""

    def __init__(self, controller: Controller, times: Times, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.ended: set[str] = set()
        self._controller, self._times, self._rng = controller, times, rng
        self._order = count()
        self._heap: list[tuple[float, int, ev.Event]] = []
        self._versions: Counter[str] = Counter()
        self._resident: dict[str, dict[str, Tier]] = {}
        #: Where each request runs: its end there is not told when it was sent back before.
        self._serving: dict[str, ev.RequestEnded] = {}
        self._wake_at: float | None = None

    def push(self, event: ev.Event) -> None:
        heappush(self._heap, (event.at, next(self._order), event))

    def run(self, events: Iterable[ev.Event]) -> float:
        """Until nothing is left to happen but idle instances' leaving; the virtual seconds."""
        n_open = 0
        for event in events:
            n_open += isinstance(event, ev.RequestArrived)
            self.push(event)
        now = 0.0
        while self._heap and n_open:
            now, _, event = heappop(self._heap)
            if isinstance(event, ev.TimerFired) and event.at != self._wake_at:
                continue
            if isinstance(event, ev.RequestEnded):
                if self._serving.get(event.request) is not event:
                    continue
                self.ended.add(event.request)
                n_open -= 1
            for decision in self._times.handle(self._controller, event):
                self.counts[type(decision).__name__] += 1
                n_open -= isinstance(decision, Refuse)
                self._enact(decision, now)
        return now

    def _enact(self, decision: Decision, now: float) -> None:
        match decision:
            case Load():
                ready_at = now + max(1e-3, decision.ready_in_s)
                tier = self._bring(decision.model, decision.worker, ready_at)
                self.push(ev.LoadFinished(ready_at, decision.instance, tier))
            case Unload():
                self.push(ev.UnloadFinished(now + UNLOAD_S, decision.instance))
            case Dispatch():
                end = ev.RequestEnded(now + self._rng.expovariate(1 / SERVICE_S), decision.request)
                self._serving[decision.request] = end
                self.push(end)
            case Migrate():
                moved_at = now + max(1e-3, decision.moved_in_s)
                tier = self._bring(decision.model, decision.destination, moved_at)
                self.push(ev.InstanceMigrated(moved_at, decision.instance, decision.successor, tier))
            case Preempt():
                for request in decision.requests:
                    self._serving.pop(request, None)
                    self.push(ev.RequestReturned(now, request))
            case WakeAt():
                self._wake_at = decision.at
                if decision.at is not None:
                    self.push(ev.TimerFired(decision.at))
            case _:
                pass

    def _bring(self, model: str, worker: str, at: float) -> Tier:
        """From `at` on `worker` has the model in memory, and says so; returns where it had it before."""
        view = self._controller.workers[worker]
        resident = self._resident.setdefault(worker, dict(view.residency))
        before = resident.get(model, Tier.REMOTE)
        resident[model] = Tier.HOST
        self._versions[worker] += 1
        self.push(ev.WorkerReported(at, worker, self._versions[worker], dict(resident), view.bytes_per_s, view.overhead_s))
        return before


def arrivals(models: Sequence[ModelView], n_requests: int, per_s: float, rng: random.Random) -> list[ev.Event]:
    """Poisson arrivals for models by Zipf's law with exponent 1; one in ten belongs to a higher class."""
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(models))))
    at, found = 0.0, list[ev.Event]()
    for i, model in enumerate(rng.choices(models, cum_weights=weights, k=n_requests)):
        at += rng.expovariate(per_s)
        request = RequestView(f"r{i}", model.name, "door", at, at + 300.0, priority=int(rng.random() < 0.1))
        found.append(ev.RequestArrived(at, request))
    return found


def measure_decisions(n_workers: int, n_models: int, n_requests: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(setting up, serving): times of ``handle`` by event, events per second, and what was decided."""
    rng = random.Random(seed)
    workers, models = workers_and_models(n_workers, n_models, rng)
    controller, times = Controller(ControllerSettings(max_queue=n_requests)), Times()
    for worker in workers:
        times.handle(controller, ev.WorkerJoined(0.0, worker))
    for model in models:
        times.handle(controller, ev.ModelDeployed(0.0, model))
    setup = report(times)
    times = Times()
    cluster = Cluster(controller, times, rng)
    # Requests fill a third of the slots if each has one for itself.
    per_s = n_workers * SLOTS / SERVICE_S / 3
    virtual_s = cluster.run(arrivals(models, n_requests, per_s, rng))
    serving = report(times) | {
        "virtual_s": virtual_s,
        "n_ended": len(cluster.ended),
        "decided": dict(cluster.counts),
    }
    return setup, serving


# --- victims ---------------------------------------------------------------------------------------------------------


def shortage(rng: random.Random) -> tuple[list[Candidate], int, dict[str, int]]:
    """A busy worker: candidates of one to four slots, the slots that are missing, and those that are free elsewhere."""
    names = [f"tcp://10.0.0.{i}:1" for i in range(N_DESTINATIONS)]
    candidates = []
    for i in range(N_CANDIDATES):
        leaves = [Leave(Way.MIGRATE, rng.uniform(0.2, 8.0), name) for name in names if rng.random() < 0.5]
        leaves += [Leave(Way.EVICT, rng.uniform(0.01, 0.1))] if rng.random() < 0.1 else []
        leaves += [Leave(Way.PREEMPT, rng.uniform(5.0, 60.0))] if rng.random() < 0.2 else []
        candidates.append(Candidate(f"i{i}", rng.choice([1, 1, 1, 2, 4]), tuple(leaves)))
    return candidates, rng.randint(1, MAX_SHORTAGE), {name: rng.randint(0, 2) for name in names}


def measure_victims(n_searches: int, seed: int) -> dict[str, Any]:
    seconds, n_plans, n_exact = [], 0, 0
    for i in range(n_searches):
        candidates, n_slots, room = shortage(random.Random(f"{seed} {i}"))
        began = time.perf_counter()
        plan = cheapest_victims(candidates, n_slots, room)
        seconds.append(time.perf_counter() - began)
        n_plans += plan is not None
        n_exact += plan is not None and plan.exact
    return quantiles(seconds) | {"n_candidates": N_CANDIDATES, "n_plans": n_plans, "n_exact": n_exact}


# --- the report ------------------------------------------------------------------------------------------------------


def quantiles(seconds: Iterable[float]) -> dict[str, Any]:
    found = sorted(seconds)

    def quantile(share: float) -> float:
        return 1e3 * found[min(int(share * len(found)), len(found) - 1)] if found else 0.0

    return {"n": len(found), "p50_ms": quantile(0.5), "p99_ms": quantile(0.99), "max_ms": quantile(1.0)}


def report(times: Times) -> dict[str, Any]:
    total_s = sum(times.all)
    return {
        "events": {name: quantiles(seconds) for name, seconds in sorted(times.by_event.items())},
        "all": quantiles(times.all),
        "decisions": quantiles(times.decisions),
        "events_per_s": len(times.all) / total_s if total_s else 0.0,
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'event':24} {'n':>8} {'p50':>9} {'p99':>9} {'max':>9}   (ms)"]

    def row(name: str, found: dict[str, Any]) -> None:
        lines.append(f"{name:24} {found['n']:8} {found['p50_ms']:9.3f} {found['p99_ms']:9.3f} {found['max_ms']:9.3f}")

    for part in ("setup", "serving"):
        for name, found in results[part]["events"].items():
            row(name, found)
        row(f"all of {part}", results[part]["all"])
    row("decisions of serving", results["serving"]["decisions"])
    row("search for victims", results["victims"])
    victims, serving = results["victims"], results["serving"]
    lines.append(f"{serving['events_per_s']:,.0f} events/s in serving, {results['setup']['events_per_s']:,.0f} in setup")
    lines.append(f"decided: {', '.join(f'{name} {n:,}' for name, n in sorted(serving['decided'].items()))}")
    lines.append(f"victims: a plan in {victims['n_plans']} of {victims['n']} searches, {victims['n_exact']} of them exact")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000, help="workers of four slots (default: 1000)")
    parser.add_argument("--models", type=int, default=10_000, help="deployed models (default: 10000)")
    parser.add_argument("--requests", type=int, default=20_000, help="requests that arrive (default: 20000)")
    parser.add_argument("--searches", type=int, default=2000, help="searches for victims (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 workers, 200 models, 300 requests, 100 searches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.workers, options.models, options.requests, options.searches = 20, 200, 300, 100
    if min(options.workers, options.models, options.requests, options.searches) < 1:
        parser.error("there has to be at least one worker, model, request and search")
    setup, serving = measure_decisions(options.workers, options.models, options.requests, options.seed)
    results = {"setup": setup, "serving": serving, "victims": measure_victims(options.searches, options.seed)}
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }
    print(f"{options.workers:,} workers, {options.models:,} models, {options.requests:,} requests, seed {options.seed}")
    print(table(results))
    print(f"{machine['cores']} cores, {machine['machine']}, Python {machine['python']}, load {machine['load'][0]:.1f}")
    if options.json:
        settings = {name: getattr(options, name) for name in ("workers", "models", "requests", "searches", "seed")}
        options.json.write_text(json.dumps({"machine": machine, **settings, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
