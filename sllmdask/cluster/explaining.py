"""The answer to "why?": what the log and the controller know of a request or a model, as plain types."""

from __future__ import annotations

from math import isfinite
from typing import Any

from sllmdask.cluster.decision_log import DecisionLog
from sllmdask.cluster.happenings import Happening, move_text, resume_text
from sllmdask.cluster.move_tallies import estimate_error
from sllmdask.cluster.records import ChoiceRecord, LoadRecord, ModelRecord, RequestRecord
from sllmdask.policy.choice import Choice, Option
from sllmdask.policy.controller import Controller
from sllmdask.policy.views import Tier
from sllmdask.units import format_seconds

#: A ready instance was taken without looking at anything else.
HIT = "a ready instance had room, which is the fastest way there is"


def explain_request(log: DecisionLog, record: RequestRecord, now: float) -> dict[str, Any]:
    """Why a request was, or is to be, served the way it is, and what really happened. `now` is in seconds since the epoch."""
    choices, reason = [_made(log, made, record.arrived_at) for made in record.choices], ""
    borrowed = record.load.choice if record.load is not None else None
    if not choices and borrowed is not None:
        # It found an instance on its way that somebody else's choice had begun.
        choices = [_choice(log, borrowed)]
        reason = f"its instance was loaded for request {_id(log, borrowed.request)}"
    elif not choices:
        reason = HIT if record.cold_start == "hit" else _why_waiting(log, record)
    ended = record.ended_at
    return {
        "kind": "request",
        "id": record.id,
        "key": record.key,
        "model": record.model,
        "state": record.state,
        "node": record.path[-1] if record.path else None,
        "instance": record.instance,
        "path": list(record.path),
        "moves": [explained_move(move) for move in record.moves],
        "resumes": [explained_resume(resume) for resume in record.resumes],
        "priority": record.priority,
        "front_door": record.front_door or None,
        "arrived": record.arrived_at,
        "ended": ended,
        "seconds": (now if ended is None else ended) - record.arrived_at,
        "queue_s": record.queue_s if record.state != "queued" else now - record.arrived_at,
        "cold_start": record.cold_start,
        "first_token_s": record.first_token_s,
        "n_prompt_tokens": record.n_prompt_tokens,
        "n_tokens": record.n_tokens,
        "cause": record.error,
        "reason": reason,
        "choices": choices,
        "n_choices": record.n_choices,
        "load": None if record.load is None else load_row(record.load, now),
        "happened": _story([*record.happened, *_meanwhile(log, record)], record.arrived_at),
    }


def explain_model(log: DecisionLog, controller: Controller, name: str, at: float, now: float) -> dict[str, Any]:
    """Why a model is where it is, or why it is not loaded. `at` is `now` by the controller's clock."""
    model = log.models.get(name) or ModelRecord(name)
    view = controller.models.get(name)
    key = name if view is None else view.checkpoint_key
    instances = []
    for instance in controller.instances_of(name):
        load = log.loads.get(instance.id)
        instances.append(
            {
                "instance": instance.id,
                "node": log.node(instance.worker),
                "state": str(instance.state),
                "n_requests": instance.n_requests,
                "since_s": at - instance.since,
                "idle_s": None if instance.idle_since is None else at - instance.idle_since,
                "leaving": instance.draining,
                "reason": _why_there(log, load),
                "choice": None if load is None or load.choice is None else _choice(log, load.choice),
                "load": None if load is None else load_row(load, now),
            }
        )
    waiting = [request for request in controller.waiting.values() if request.model == name and not request.load_only]
    residency = [(worker.name, worker.residency.get(key)) for worker in controller.workers.values()]
    return {
        "kind": "model",
        "id": name,
        "model": name,
        "deployed": view is not None,
        "nodes": list(view.nodes) if view is not None else [],
        "reason": _why_not_loaded(controller, model, bool(waiting), now) if not instances else "",
        "instances": instances,
        "residency": [{"node": node, "tier": str(tier)} for node, tier in sorted(residency) if tier is not None],
        "n_waiting": len(waiting),
        "waited_s": max((at - request.arrived_at for request in waiting), default=None),
        "last_failure": None if model.failure is None else load_row(model.failure, now),
        "failures": [
            {
                "node": log.node(worker),
                "reason": failure.reason,
                "n_times": failure.n_times,
                "retry_in_s": max(0.0, failure.until - at),
            }
            for worker, failure in controller.back_off.of(name).items()
        ],
        "choices": [_made(log, made, None) for made in model.choices],
        "loads": [load_row(load, now) for load in model.loads],
        "happened": _story(model.happened, None),
    }


def explained_move(move: dict[str, Any]) -> dict[str, Any]:
    """A move, how far its expected duration was off, and all of it in words."""
    return {**move, "error_ratio": estimate_error(move), "text": move_text(move)}


def explained_resume(resume: dict[str, Any]) -> dict[str, Any]:
    """A loss of a worker or an instance, and in words."""
    return {**resume, "text": resume_text(resume)}


def load_row(load: LoadRecord, now: float) -> dict[str, Any]:
    """One load: what was predicted, and what it turned out to be. Times are in seconds."""
    return {
        "instance": load.instance,
        "node": load.node,
        "tier": load.tier,
        "outcome": load.outcome,
        "begun": load.begun_at,
        "predicted_s": load.predicted_s if isfinite(load.predicted_s) else None,
        "ready_s": load.ready_s,
        "took_s": load.took_s,
        "error_ratio": load.error_ratio,
        "phases": dict(load.phases),
        "held_s": (now if load.ended_at is None else load.ended_at) - load.begun_at,
        "reason": load.failed or load.leaving,
    }


def _made(log: DecisionLog, made: ChoiceRecord, arrived_at: float | None) -> dict[str, Any]:
    row = _choice(log, made.choice) | {"time": made.first_at, "n_times": made.n_times}
    return row if arrived_at is None else row | {"after_s": made.first_at - arrived_at}


def _choice(log: DecisionLog, choice: Choice) -> dict[str, Any]:
    chosen = None if choice.chosen is None else _option(choice.chosen, True)
    others = [_option(option, False) for option in choice.options if option != choice.chosen]
    return {
        "request": _id(log, choice.request) or None,
        "chosen": chosen,
        "reason": choice.reason,
        "options": ([] if chosen is None else [chosen]) + others,
        "n_more": choice.n_more,
        "unfit": [{"node": log.node(address), "reason": reason} for address, reason in choice.unfit.items()],
    }


def _option(option: Option, chosen: bool) -> dict[str, Any]:
    return {
        "way": str(option.way),
        "node": option.node,
        "worker": option.worker,
        "instance": option.instance or None,
        "tier": None if option.tier is None else str(option.tier),
        "predicted_s": option.ready_in_s if isfinite(option.ready_in_s) else None,
        "parts": {name: seconds for name, seconds in option.parts.items() if isfinite(seconds)},
        "leaving": [{"instance": instance, "to": to or None} for instance, to in option.leaving],
        "chosen": chosen,
        "lost": option.lost or None,
    }


def _id(log: DecisionLog, key: str) -> str:
    """What its client calls a request."""
    record = log.requests.get(key)
    return key if record is None else record.id


def _story(happened: Any, begun_at: float | None) -> list[dict[str, Any]]:
    found: dict[int, Happening] = {happening.id: happening for happening in happened}
    rows = [found[number] for number in sorted(found)]
    return [
        {
            "id": happening.id,
            "time": happening.at,
            "event": happening.event,
            "text": happening.text,
            **({} if begun_at is None else {"after_s": happening.at - begun_at}),
        }
        for happening in rows
    ]


def _meanwhile(log: DecisionLog, record: RequestRecord) -> list[Happening]:
    """What happened to the model of a request that still waits."""
    model = log.models.get(record.model)
    if record.state != "queued" or model is None:
        return []
    return [happening for happening in model.happened if happening.at >= record.arrived_at]


def _why_waiting(log: DecisionLog, record: RequestRecord) -> str:
    if record.state != "queued":
        return ""
    loading = [load for load in log.loads.values() if load.model == record.model and load.ready_at is None]
    if loading:
        return f"it waits for {loading[0].instance}, which is being loaded on node {loading[0].node}"
    return "it waits its turn behind others"


def _why_there(log: DecisionLog, load: LoadRecord | None) -> str:
    if load is None:
        return "its slots are being freed"
    if load.moved_from:
        return f"it has taken over from {load.moved_from}"
    wish = log.requests.get(load.choice.request) if load.choice is not None else None
    if load.choice is not None and wish is not None and wish.load_only:
        return f"an operator asked for it, or moved requests there: {load.choice.reason}"
    if load.choice is not None and load.choice.request:
        return f"loaded for request {_id(log, load.choice.request)}: {load.choice.reason}"
    if load.choice is not None:
        return f"one more instance was wanted: {load.choice.reason}"
    return "the number of requests, or min_instances, asked for one more instance"


def _why_not_loaded(controller: Controller, model: ModelRecord, waited_for: bool, now: float) -> str:
    """One sentence on why there is no instance."""
    if model.name not in controller.models:
        return "it is not deployed any more"
    if not controller.workers:
        return "no worker is connected"
    last_choice = model.choices[-1].choice if model.choices else None
    if waited_for and last_choice is not None and last_choice.chosen is None:
        return last_choice.reason
    if waited_for:
        return "requests wait for it, and every slot is taken by other models"
    last = model.loads[-1] if model.loads else None
    if last is not None and last.failed:
        return f"its last load failed, on node {last.node} {_ago(last, now)}: {last.failed}"
    if last is not None:
        why = f" ({last.leaving})" if last.leaving else ""
        return f"it left node {last.node} {_ago(last, now)}{why}, and nobody has asked for it since"
    key = controller.models[model.name].checkpoint_key
    held = [worker.name for worker in controller.workers.values() if worker.residency.get(key) in (Tier.HOST, Tier.DISK)]
    where = f"; node {', '.join(sorted(held))} has its files" if held else ""
    return f"nobody has asked for it yet{where}"


def _ago(load: LoadRecord, now: float) -> str:
    return f"{format_seconds(max(0.0, now - (load.ended_at or now)))} ago"
