"""See what the control plane does, and why: ``requests``, ``explain``, ``events``; and end a request: ``cancel``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from sllmdask.cli.output import Column, print_json, print_rows
from sllmdask.cli.shell import INTERRUPTED, command, connect, json_option, server_option

#: Earlier events that are shown unless more are asked for.
N_EVENTS = 50


@command()
@server_option
@json_option
def requests(server: str | None, as_json: bool) -> None:
    """List the requests under way, then those that ended lately."""
    with connect(server) as client:
        rows = client.requests()
    if as_json:
        print_json(rows)
    else:
        print_rows(rows, _request_columns(), "No requests yet.")


def _request_columns() -> list[Column]:
    from sllmdask.units import format_seconds

    return [
        ("REQUEST", lambda row: row["id"]),
        ("MODEL", lambda row: row["model"]),
        ("STATE", lambda row: row["state"]),
        ("NODE", lambda row: row["node"] or "-"),
        ("PROMPT", lambda row: "-" if row["n_prompt_tokens"] is None else row["n_prompt_tokens"]),
        ("TOKENS", lambda row: row["n_tokens"]),
        ("TIME", lambda row: format_seconds(row["seconds"]) if row.get("seconds") is not None else "-"),
        ("PATH", lambda row: " -> ".join(row["path"]) or "-"),
        ("MOVES", _moves),
        ("PAUSE", _pause),
    ]


def _moves(row: Mapping[str, Any]) -> str:
    """How often it has moved, and, if it has, been refused, or gone on after a death."""
    outcomes = [move["outcome"] for move in row["moves"]]
    n_others = len(outcomes) - outcomes.count("moved")
    told = [f"{n_others} stayed"] if n_others else []
    told += [f"{len(row['resumes'])} resumed"] if row["resumes"] else []
    return f"{outcomes.count('moved')}" + (f" ({', '.join(told)})" if told else "")


def _pause(row: Mapping[str, Any]) -> str:
    """The longest that its client waited for a token because of a move or a death."""
    pauses_ms = [each["pause_ms"] for each in (*row["moves"], *row["resumes"]) if each.get("pause_ms") is not None]
    return f"{max(pauses_ms):.1f} ms" if pauses_ms else "-"


@command()
@click.argument("request")
@server_option
@json_option
def cancel(request: str, server: str | None, as_json: bool) -> None:
    """End REQUEST, whoever asked for it; its client is told that an operator did it."""
    with connect(server) as client:
        done = client.cancel(request)
    if as_json:
        print_json(done)
    else:
        click.echo(f"cancelled {request}" if done["cancelled"] else f"{request} has ended already: {done['state']}")


# --- events ----------------------------------------------------------------------------------------------------------


@command()
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("--model", metavar="MODEL", help="Only what is about MODEL.")
@click.option("--last", type=click.IntRange(min=0), default=N_EVENTS, show_default=True, help="Earlier events to begin with.")
@server_option
@json_option
def events(follow: bool, model: str | None, last: int, server: str | None, as_json: bool) -> None:
    """Show what the control plane did lately, one event a line; --json prints a JSON object a line."""
    import asyncio

    try:
        asyncio.run(_show_events(server, follow, model, last, as_json))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


async def _show_events(server: str | None, follow: bool, model: str | None, last: int, as_json: bool) -> None:
    from sllmdask.client import AsyncClient

    async with AsyncClient(server) as client:
        async for row in client.events(last=last, model=model, follow=follow):
            click.echo(json.dumps(row, ensure_ascii=False) if as_json else _event_line(row))


def _event_line(row: Mapping[str, Any]) -> str:
    line = f"{_clock(row['time'])}\t{row['event']}\t{row['text']}"
    return line.expandtabs(14) if sys.stdout.isatty() else line


def _clock(seconds: float) -> str:
    """The time of day, here, to the millisecond."""
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1e3) % 1000:03d}"


# --- explain ---------------------------------------------------------------------------------------------------------


@command()
@click.argument("name", metavar="REQUEST|MODEL")
@server_option
@json_option
def explain(name: str, server: str | None, as_json: bool) -> None:
    """Tell why REQUEST (its x-request-id) is served where it is, or why MODEL is where it is, and what really happened."""
    with connect(server) as client:
        told = client.explain(name)
    if as_json:
        print_json(told)
    elif told["kind"] == "model":
        _explain_model(told)
    else:
        _explain_request(told)


def _explain_request(told: Mapping[str, Any]) -> None:
    from sllmdask.units import format_seconds

    where = f" on node {' -> '.join(told['path'])}" if told["path"] else ""
    click.echo(f"request {told['id']} for {told['model']}: {told['state']}{where} after {format_seconds(told['seconds'])}")
    if told["cause"]:
        click.echo(f"cause: {told['cause']}")
    if told["reason"]:
        click.echo(f"why: {told['reason']}")
    for choice in told["choices"]:
        _show_choice(choice)
    facts = []
    if told["queue_s"] is not None:
        facts.append(f"waited {format_seconds(told['queue_s'])}")
    if told["cold_start"]:
        facts.append(f"cold start: {told['cold_start']}")
    if told["first_token_s"] is not None:
        facts.append(f"first token after {format_seconds(told['first_token_s'])}")
    if told["n_tokens"] is not None:
        facts.append(f"{told['n_prompt_tokens']} tokens of prompt, {told['n_tokens']} of answer")
    facts += _interruptions(told)
    if facts:
        click.echo(f"\nwhat happened: {', '.join(facts)}")
    if told["load"] is not None:
        click.echo(f"load: {_load_text(told['load'])}")
    _show_untold(told)
    _show_story(told["happened"])
    if told["n_others"]:
        click.echo(f"({told['n_others']} earlier requests had the same id)")


def _show_untold(told: Mapping[str, Any]) -> None:
    """Moves and losses that are not all in the story: it is bounded, and another scheduler may have seen them."""
    events = [each["event"] for each in told["happened"]]
    if events.count("moved") + events.count("stayed") < len(told["moves"]):
        for move in told["moves"]:
            click.echo(move["text"])
    if events.count("resumed") < len(told["resumes"]):
        for resume in told["resumes"]:
            click.echo(resume["text"])


def _interruptions(told: Mapping[str, Any]) -> list[str]:
    """Moves, and deaths that it went on after."""
    counts = {
        "moved": sum(move["outcome"] == "moved" for move in told["moves"]),
        "could not move": sum(move["outcome"] == "stayed" for move in told["moves"]),
        "went on after a loss": sum(resume["outcome"] == "resumed" for resume in told["resumes"]),
    }
    said = [what if n == 1 else f"{what} {n} times" for what, n in counts.items() if n]
    pauses = _pause(told)
    return said if pauses == "-" else [*said, f"at most {pauses} without a token by that"]


def _explain_model(told: Mapping[str, Any]) -> None:
    from sllmdask.units import format_seconds

    state = ", ".join(f"{each['instance']} {each['state']} on node {each['node']}" for each in told["instances"])
    click.echo(f"model {told['model']}: {state or 'not loaded'}")
    if told["reason"]:
        click.echo(f"why: {told['reason']}")
    if told["residency"]:
        files = ", ".join(f"{each['tier']} of node {each['node']}" for each in told["residency"])
        click.echo(f"files: {files}")
    if told["n_waiting"]:
        click.echo(f"waiting: {told['n_waiting']} requests, the oldest for {format_seconds(told['waited_s'])}")
    for failure in told["failures"]:
        retry = f"tried again in {format_seconds(failure['retry_in_s'])}" if failure["retry_in_s"] else "may be tried again"
        click.echo(f"failed on node {failure['node']} ({failure['n_times']}x, {retry}): {failure['reason']}")
    for instance in told["instances"]:
        click.echo(f"\n{instance['instance']} on node {instance['node']}: {instance['reason']}")
        if instance["choice"] is not None:
            _show_choice(instance["choice"])
        if instance["load"] is not None:
            click.echo(f"load: {_load_text(instance['load'])}")
    if not told["instances"] and told["choices"]:
        _show_choice(told["choices"][-1])
    _show_story(told["happened"])


def _load_text(load: Mapping[str, Any]) -> str:
    from sllmdask.units import format_seconds

    text = f"{load['instance']} from {load['tier']} on node {load['node']}, {load['outcome']}"
    predicted = "no estimate" if load["predicted_s"] is None else f"{format_seconds(load['predicted_s'])} predicted"
    if load["took_s"] is not None:
        error = "" if load["error_ratio"] is None else f", {load['error_ratio']:.0%} off"
        return f"{text} in {format_seconds(load['took_s'])} ({predicted}{error})"
    if load["ready_s"] is not None:
        return f"{text}, took requests after {format_seconds(load['ready_s'])} ({predicted})"
    return f"{text} ({predicted})" + (f": {load['reason']}" if load["reason"] else "")


def _show_choice(choice: Mapping[str, Any]) -> None:
    again = f", {choice['n_times']} times" if choice.get("n_times", 1) > 1 else ""
    after = "" if choice.get("after_s") is None else f" after {_seconds(choice['after_s'])}"
    click.echo(f"\ndecided{after}{again}: {choice['reason']}")
    if choice["options"]:
        print_rows(choice["options"], _option_columns(), "")
    if choice["n_more"]:
        click.echo(f"and {choice['n_more']} more ways, all slower")
    for unfit in choice["unfit"]:
        click.echo(f"node {unfit['node']} cannot: {unfit['reason']}")


def _option_columns() -> list[Column]:
    return [
        ("WAY", lambda row: row["way"]),
        ("NODE", lambda row: row["node"]),
        ("TIER", lambda row: row["tier"] or "-"),
        ("PREDICTED", lambda row: _seconds(row["predicted_s"])),
        ("OF THAT", lambda row: _parts(row["parts"])),
        ("INSTANCE", lambda row: row["instance"] or "-"),
        ("LEAVING", lambda row: ", ".join(_leaving(each) for each in row["leaving"]) or "-"),
        ("OUTCOME", lambda row: "chosen" if row["chosen"] else row["lost"] or "-"),
    ]


def _leaving(leaving: Mapping[str, Any]) -> str:
    return f"{leaving['instance']} to node {leaving['to']}" if leaving["to"] else str(leaving["instance"])


def _parts(parts: Mapping[str, float]) -> str:
    shown = [f"{name} {_seconds(seconds)}" for name, seconds in parts.items() if seconds]
    return ", ".join(shown) or "-"


def _seconds(seconds: float | None) -> str:
    from sllmdask.units import format_seconds

    return "never" if seconds is None else format_seconds(seconds)


def _show_story(happened: Sequence[Mapping[str, Any]]) -> None:
    lines: Iterable[str] = (
        f"  {_clock(each['time'])}  " + (f"+{_seconds(each['after_s'])}  " if "after_s" in each else "") + each["text"]
        for each in happened
    )
    if happened:
        click.echo()
        for line in lines:
            click.echo(line)
