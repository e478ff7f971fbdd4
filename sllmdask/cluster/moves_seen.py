"""Every move of a request, as the workers tell of it that have it: under way, and over. Whoever asked for it, it is told once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sllmdask.cluster.decision_log import DecisionLog
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import InstanceState, InstanceView

#: Seconds that a front door has to say how long its client waited, before a move is told of without that.
PAUSE_S = 1.0

#: A request's key, and the epoch of its move.
MoveKey = tuple[str, int]


class MovesSeen:
    """What the scheduler knows of moves. `on` takes events to the controller."""

    def __init__(self, controller: Controller, log: DecisionLog, on: Callable[[ev.Event], None]) -> None:
        self._controller, self._log, self._on = controller, log, on
        #: Those under way: what was told of them, who tells, and since when.
        self._under_way: dict[MoveKey, tuple[Mapping[str, Any], str, float]] = {}
        #: Those of requests whose model is not ready yet where they go: what is shown of them, and since when.
        self._awaiting: list[tuple[str, Mapping[str, Any], float]] = []
        #: Those that are over, until it is known what their clients noticed.
        self._untold: dict[MoveKey, asyncio.TimerHandle] = {}

    @contextmanager
    def awaiting(self, request: str, source: InstanceView, to: str, cause: str) -> Iterator[None]:
        """While this lasts, a request is to move to node `to` as soon as its model is ready there."""
        about = {"instance": source.id, "model": source.model, "source": self._log.node(source.worker), "destination": to}
        waits = request, {**about, "cause": cause}, time.monotonic()
        self._awaiting.append(waits)
        try:
            yield
        finally:
            self._awaiting.remove(waits)

    # --- what workers tell ---

    def began(self, worker: str, told: Mapping[str, Any]) -> None:
        self._under_way[told["request"], told["epoch"]] = told, worker, time.monotonic()

    def ended(self, worker: str, told: Mapping[str, Any]) -> None:
        """A move is over: to the controller, the log, and, once the front door has told of the pause, to who follows events."""
        key, record = (told["request"], told["epoch"]), told["record"]
        self._under_way.pop(key, None)
        now = time.monotonic()
        ended = ev.MoveEnded(
            now,
            told["request"],
            told["model"],
            told["instance"],
            told["successor"],
            worker,
            told["destination"],
            record["outcome"],
            record["kind"] or "",
            record["n_tokens"],
            told["kv_nbytes"],
            record["nbytes"],
            record["seconds"],
            told["n_at_once"],
        )
        moved = record["outcome"] == "moved"
        model = self._controller.models.get(told["model"])
        expected_s = self._controller.move_times.expected_s(ended, model) if moved else None
        self._on(ended)
        about = {"model": told["model"], "instance": told["instance"], "successor": told["successor"]}
        self._log.move_ended(told["request"], {**record, **about, "expected_s": expected_s})
        if moved and self._log.is_running(told["request"]) and not self._log.knows_pause(*key):
            self._untold[key] = asyncio.get_running_loop().call_later(PAUSE_S, self._tell, key)
        else:
            self._tell_before(*key)
            self._log.tell_move(*key, now)

    def worker_left(self, worker: str) -> None:
        """What it has not told, it tells no more."""
        now = time.monotonic()
        for key in [key for key, (_, source, _) in self._under_way.items() if source == worker]:
            told, _, since = self._under_way.pop(key)
            name = self._log.node(worker)
            record = {
                "epoch": key[1],
                "source": name,
                "destination": told["to"],
                "cause": told["cause"],
                "outcome": "ended",
                "reason": f"the worker of node {name} has left",
                "kind": None,
                "steps": [],
                "nbytes": 0,
                "n_tokens": 0,
                "seconds": now - since,
                "stop_ms": None,
            }
            about = {"model": told["model"], "instance": told["instance"], "successor": told["successor"]}
            self._log.move_ended(key[0], {**record, **about, "expected_s": None})
            self._log.tell_move(*key, now)

    # --- what front doors tell ---

    def paused(self, request: str, epoch: int, pause_ms: float) -> None:
        """The first token after a move is there."""
        self._log.paused(request, epoch, pause_ms)
        if (request, epoch) in self._untold:
            self._tell((request, epoch))

    def no_more(self, request: str, moves: Iterable[Mapping[str, Any]] = ()) -> None:
        """There will be no further token where the request is; `moves` as its front door knows them."""
        for move in moves:
            if move.get("pause_ms") is not None:
                self._log.paused(request, move["epoch"], move["pause_ms"])
        for key in sorted(key for key in self._untold if key[0] == request):
            self._tell(key)

    def _tell(self, key: MoveKey) -> None:
        self._tell_before(*key)
        self._untold.pop(key).cancel()
        self._log.tell_move(*key, time.monotonic())

    def _tell_before(self, request: str, epoch: int) -> None:
        """Moves of a request are told in their order."""
        for key in sorted(key for key in self._untold if key[0] == request and key[1] < epoch):
            self._untold.pop(key).cancel()
            self._log.tell_move(*key, time.monotonic())

    # --- what is told ---

    def rows(self) -> list[dict[str, Any]]:
        """Moves under way, of requests, and of instances that the controller moves or that an operator has asked to."""
        now, log = time.monotonic(), self._log
        moves = [
            {
                "request": log.shown(told["request"]),
                "instance": told["instance"],
                "model": told["model"],
                "source": log.node(worker),
                "destination": told["to"],
                "cause": told["cause"],
                "seconds": now - since,
            }
            for (told, worker, since) in self._under_way.values()
        ]
        moves += [{"request": log.shown(key), **about, "seconds": now - since} for key, about, since in self._awaiting]
        instances = self._controller.instances
        for instance in instances.values():
            successor = instances.get(instance.successor)
            if successor is not None and instance.state is InstanceState.READY:
                moves.append(
                    {
                        "request": None,
                        "instance": instance.id,
                        "model": instance.model,
                        "source": log.node(instance.worker),
                        "destination": log.node(successor.worker),
                        "cause": log.moving_because(instance.id),
                        "seconds": now - successor.since,
                    }
                )
        return moves

    def close(self) -> None:
        for timer in self._untold.values():
            timer.cancel()
        self._untold.clear()
