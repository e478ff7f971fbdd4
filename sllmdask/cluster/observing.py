"""The scheduler's side of ``explain``, ``events``, ``requests``, ``cancel``, ``/metrics``: it looks on, and decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from sllmdask.actors.streams import Outbox
from sllmdask.cluster.decision_log import DecisionLog
from sllmdask.cluster.explaining import explain_model, explain_request
from sllmdask.cluster.records import RequestRecord
from sllmdask.cluster.tallies import Counter, Family, Labels, gauge
from sllmdask.errors import RecordNotFound
from sllmdask.policy.controller import Controller
from sllmdask.policy.decisions import Decision
from sllmdask.policy.events import Event, WorkerReported

logger = logging.getLogger(__name__)

#: Events told at a time; who follows asks again.
N_TOLD = 500
#: Seconds that front doors have to say which requests they have.
ROWS_S = 1.0
#: Requests of front doors that have left that are still listed.
N_ORPHANS = 256


class Observer:
    """Sees every event and decision. `doors` and `accounts` are the scheduler plugin's own, by front door and by worker."""

    def __init__(self, controller: Controller, doors: Mapping[str, Outbox], accounts: Mapping[str, dict[str, Any]]) -> None:
        self._controller, self._doors, self._accounts = controller, doors, accounts
        self._epoch_s = time.time() - time.monotonic()
        # Ids of events go on to grow when another scheduler takes over: readers resume after the last one that they saw.
        self._news = asyncio.Event()
        self.log = DecisionLog(lambda at: at + self._epoch_s, first_id=int(1e3 * time.time()), on_news=self._news.set)
        #: Front doors that were asked for their requests and have not answered, and what the others said, by question.
        self._questions: dict[int, tuple[set[str], list[dict[str, Any]], asyncio.Future[None]]] = {}
        self._numbers = itertools.count(1)
        self._preemptions = Counter("vllm:num_preemptions_total", "Sequences that gave way to others in an engine.", "model_name")
        #: What was counted of them already, by instance.
        self._preempted: dict[str, int] = {}

    @property
    def handlers(self) -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
        """What front doors may ask, by the name of the operation."""
        return {
            "sllm_explain": self.explain,
            "sllm_events": self.events,
            "sllm_requests": self.requests,
            "sllm_cancel": self.cancel,
            "sllm_metrics": self.metrics,
        }

    def _now(self) -> float:
        """Seconds since the epoch, by a clock that never goes back."""
        return time.monotonic() + self._epoch_s

    # --- what is seen ---

    def saw(self, event: Event, decisions: Iterable[Decision]) -> None:
        """What the controller decided on `event`; never raises, since nothing depends on it."""
        try:
            self.log.saw(event, decisions)
            if isinstance(event, WorkerReported) and len(self.log.loads) > len(self._controller.instances):
                self._reconcile()
        except Exception:
            logger.exception("cannot record what was decided on %r", event)

    def _reconcile(self) -> None:
        """An instance that its worker does not have any more is dropped by the controller without a word."""
        self.log.reconcile(self._controller.instances, time.monotonic())

    def saw_account(self, account: Mapping[str, Any]) -> None:
        """A worker's account of itself."""
        for instance, stats in account["instances"].items():
            if "read_s" in stats.get("load", {}):
                self.log.read(instance, stats["load"])
            n_preemptions = stats.get("n_preemptions", 0)
            if n_preemptions > self._preempted.get(instance, 0):
                self._preemptions.add(n_preemptions - self._preempted.get(instance, 0), stats["model"])
                self._preempted[instance] = n_preemptions

    def answered(self, front_door: str, number: int, rows: list[dict[str, Any]]) -> None:
        """A front door has said which requests it has."""
        question = self._questions.get(number)
        if question is None or front_door not in question[0]:
            return
        silent, said, done = question
        silent.discard(front_door)
        said.extend(rows)
        if not silent and not done.done():
            done.set_result(None)

    # --- what is told ---

    async def explain(self, name: str) -> dict[str, Any]:
        """Why a request, by its client's id, or a model is served as it is; raises :class:`RecordNotFound`."""
        self._reconcile()
        now = self._now()
        found = self.log.find(name)
        if name in self._controller.models or (not found and name in self.log.models):
            return explain_model(self.log, self._controller, name, time.monotonic(), now)
        if not found:
            since = self.log.kept_since
            raise RecordNotFound(name, self.log.n_kept, 0.0 if since is None else now - since)
        return explain_request(self.log, found[-1], now) | {"n_others": len(found) - 1}

    async def events(self, since: int, model: str | None, last: int | None, wait_s: float) -> dict[str, Any]:
        """What happened after `since`, the oldest first, or only the `last` of it; waits up to `wait_s` for there to be any.

        ``next`` is what to ask for then. ``complete`` is false if what came right after `since` is not kept any more.
        """
        feed = self.log.feed
        since = min(since, feed.latest)  # another scheduler's numbers
        complete = since >= feed.dropped_to
        deadline = time.monotonic() + wait_s
        while not (found := feed.after(since, model)) and (left_s := deadline - time.monotonic()) > 0:
            since = feed.latest
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left_s)
        page = found[:N_TOLD] if last is None else found[max(0, len(found) - last) :][:N_TOLD]
        following = page[-1].id if page and page[-1] is not found[-1] else max(feed.latest, since)
        return {"events": [happening.as_row() for happening in page], "next": following, "complete": complete}

    async def requests(self, front_door: str) -> dict[str, Any]:
        """Requests of all front doors but `front_door`, which knows its own: those that run, then those that have ended."""
        others = {name for name in self._doors if name != front_door}
        number = next(self._numbers)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        silent = set(others)
        said: list[dict[str, Any]] = []
        if silent:
            self._questions[number] = silent, said, done
            for name in others:
                self._doors[name].put(["rows", number])
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(done, ROWS_S)
            finally:
                del self._questions[number]
        # Of those who did not answer, or have left, what is known here.
        unheard = [record for record in self.log.requests.values() if record.front_door not in (others - silent) | {front_door}]
        rows = said + [_row(record, self._now()) for record in unheard[-N_ORPHANS:] if not record.load_only]
        return {"requests": sorted(rows, key=lambda row: row["state"] not in ("queued", "running"))}

    async def cancel(self, request: str) -> dict[str, Any]:
        """Tell the front doors that have `request` to end it; raises :class:`RecordNotFound`."""
        found = [record for record in self.log.find(request) if not record.load_only]
        if not found:
            since = self.log.kept_since
            raise RecordNotFound(request, self.log.n_kept, 0.0 if since is None else self._now() - since)
        running = [record for record in found if record.ended_at is None and record.front_door in self._doors]
        for record in running:
            logger.info("cancel request=%s model=%s cause=an operator asked", record.key, record.model)
            self._doors[record.front_door].put(["cancel", record.key])
        return {"request": request, "cancelled": bool(running), "state": "cancelled" if running else found[-1].state}

    async def metrics(self) -> dict[str, Any]:
        """The families of the cluster, see :mod:`sllmdask.cluster.tallies`."""
        return {"families": self._families()}

    # --- metrics ---

    def _families(self) -> list[Family]:
        self._reconcile()
        now = self._now()
        holding: dict[Labels, float] = defaultdict(float)
        for load in self.log.loads.values():
            holding[(load.model,)] += (now - load.begun_at) * load.n_slots
        instances = Tally((instance.model, str(instance.state)) for instance in self._controller.instances.values())
        queued = Tally(
            (request.model, str(request.priority)) for request in self._controller.waiting.values() if not request.load_only
        )
        self._preempted = {key: n for key, n in self._preempted.items() if key in self._controller.instances}
        return [
            *self.log.tallies.families(holding),
            *self.log.move_tallies.families(),
            self._preemptions.family(),
            gauge(
                "sllmdask_instances", "Instances by state.", ("model", "state"), {key: float(n) for key, n in instances.items()}
            ),
            gauge(
                "sllmdask_queue_depth",
                "Requests that wait for an instance.",
                ("model", "priority"),
                {key: float(n) for key, n in queued.items()},
            ),
            *self._tiers(),
            gauge(
                "vllm:kv_cache_usage_perc",
                "Share of the KV blocks of a model's instances that is in use; 1 is all of them.",
                ("model_name",),
                self._kv_usage(),
            ),
        ]

    def _tiers(self) -> list[Family]:
        used: dict[Labels, float] = {}
        capacity: dict[Labels, float] = {}
        for worker in self._controller.workers.values():
            for tier, room in self._accounts.get(worker.address, {}).get("tiers", {}).items():
                if room.get("used") is not None:
                    used[worker.name, tier] = room["used"]
                if room.get("capacity") is not None:
                    capacity[worker.name, tier] = room["capacity"]
        labels = ("node", "tier")
        return [
            gauge("sllmdask_tier_used_bytes", "Bytes that checkpoints take in a tier of a node.", labels, used),
            gauge("sllmdask_tier_capacity_bytes", "Bytes that checkpoints may take in a tier of a node.", labels, capacity),
        ]

    def _kv_usage(self) -> dict[Labels, float]:
        blocks: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for account in self._accounts.values():
            for stats in account["instances"].values():
                if stats.get("blocks_total"):
                    blocks[stats["model"]][0] += stats.get("blocks_used", 0) + stats.get("blocks_reserved", 0)
                    blocks[stats["model"]][1] += stats["blocks_total"]
        return {(model,): used / total for model, (used, total) in blocks.items()}


def _row(record: RequestRecord, now: float) -> dict[str, Any]:
    """As :meth:`sllmdask.cluster.journal.Journal.as_row`, of a request whose front door does not answer."""
    return {
        "id": record.id,
        "model": record.model,
        "state": record.state,
        "node": record.path[-1] if record.path else None,
        "n_prompt_tokens": record.n_prompt_tokens,
        "n_tokens": record.n_tokens or 0,
        "path": list(record.path),
        "moves": list(record.moves),
        "resumes": list(record.resumes),
        "seconds": (now if record.ended_at is None else record.ended_at) - record.arrived_at,
    }
