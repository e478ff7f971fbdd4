"""Move what runs, and empty nodes: ``migrate``, ``drain``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from sllmdask.cli.output import Waiting, print_json, waiting_line
from sllmdask.cli.shell import command, connect, json_option, server_option
from sllmdask.errors import SllmError

if TYPE_CHECKING:
    from sllmdask.client import Client

#: Seconds that a move may take, the loading of a model on the other node included.
MOVE_S = 8100.0
#: Seconds between two looks at a node that is drained.
LOOK_S = 0.5


@command()
@click.argument("what", metavar="REQUEST|INSTANCE")
@click.option("--to", "node", metavar="NODE", required=True, help="There, by its name in `sllmdask status`.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "kv", "tokens"]),
    default="auto",
    show_default=True,
    help="Copy the KV cache, or compute it again from the tokens.",
)
@click.option("--no-wait", is_flag=True, help="Return at once; it goes on in the cluster.")
@server_option
@json_option
def migrate(what: str, node: str, kind: str, no_wait: bool, server: str | None, as_json: bool) -> None:
    """Move a running REQUEST, by the id that it was answered with, or an INSTANCE with all of its requests, to NODE.

    Clients notice nothing but a short pause. An INSTANCE is named as in `sllmdask status --json`: MODEL/NUMBER.
    """
    # The ids of requests have no slash, and those of instances always have one.
    named = {"instance": what} if "/" in what else {"request": what}
    with connect(server, MOVE_S) as client, waiting_line() as waiting:
        waiting.say(f"moving {what} to node {node}")
        moved = client.migrate(node, **named, kind=kind, wait=not no_wait)
    if as_json:
        print_json(moved)
        return
    for move in moved["moves"]:
        click.echo(_move_text(move))
    if "instance" in named and moved["state"] == "moved":
        click.echo(f"{what} is {moved['instance']} on node {node} now")
    elif moved["state"] == "leaving":
        click.echo(f"{what} leaves; {moved['left']} of its requests end there first")
    elif moved["state"] == "moving":
        click.echo(f"moving {what} to node {node}")


def _move_text(move: dict[str, Any]) -> str:
    from sllmdask.units import format_bytes

    request, outcome = move["request"], move["outcome"]
    if outcome == "ended":
        return f"{request} ended before it could move"
    if outcome == "stayed":
        return f"{request} stayed on node {move['source']}: {move['reason']}"
    how = f"{format_bytes(move['nbytes'])} of KV" if move["kind"] == "kv" else f"{move['n_tokens']} tokens"
    n_steps = len(move["steps"])
    unit = "stages" if move["kind"] == "kv" else "rounds"
    where = f"from node {move['source']} to {move['destination']}"
    return f"{request} moved {where}: {how} in {n_steps} {unit}, stopped for {move['stop_ms']:.1f} ms"


@command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="The node takes requests again, with what is still on it.")
@click.option("--no-wait", is_flag=True, help="Return at once; it goes on in the cluster.")
@click.option("--timeout", type=float, help="Seconds to wait for its end; the draining goes on after that.  [default: no limit]")
@server_option
@json_option
def drain(node: str, undo: bool, no_wait: bool, timeout: float | None, server: str | None, as_json: bool) -> None:
    """Empty NODE without failing a request, to stop or repair it.

    It takes nothing new, its requests move to other nodes while they are answered, and its models leave. What cannot move ends
    there first. NODE stays drained until `sllmdask drain NODE --undo`, or until its worker is started anew.
    """
    with connect(server) as client, waiting_line() as waiting:
        drained = client.drain(node, wait=False, undo=undo)
        if not undo and not no_wait:
            drained = _until_drained(client, drained, timeout, waiting)
    if as_json:
        print_json(drained)
    elif undo:
        click.echo(f"node {node} takes requests again")
    elif drained["state"] == "draining":
        click.echo(f"draining {_left_text(drained)}")
    elif drained["state"] == "left":
        click.echo(f"node {node} has left")
    else:
        moved, ended = _count(drained["moved"], "request"), drained["ended"]
        click.echo(f"node {node} is drained: {moved} moved, {ended} ended there, {drained['seconds']:.1f} s")


def _until_drained(client: Client, drained: dict[str, Any], timeout_s: float | None, waiting: Waiting) -> dict[str, Any]:
    node, began_s = drained["node"], time.monotonic()
    told: set[tuple[str, str]] = set()
    while drained["state"] == "draining":
        for each in drained["stuck"]:
            if (each["instance"], each["why"]) not in told:
                told.add((each["instance"], each["why"]))
                waiting.hide()
                n = _count(each["requests"], "request")
                click.echo(f"{each['instance']}: {n} cannot move and will end there: {each['why']}", err=True)
        if timeout_s is not None and time.monotonic() - began_s > timeout_s:
            undo = f"sllmdask drain {node} --undo ends that."
            raise TimeoutError(f"{_left_text(drained)} left after {timeout_s:g} s. It is still being drained; {undo}")
        waiting.say(f"draining {_left_text(drained)} left")
        time.sleep(LOOK_S)
        row = next((each for each in client.status()["workers"] if each["name"] == node), None)
        if row is not None and row["draining"] is None:
            raise SllmError(f"Node {node} is not being drained any more: somebody has undone it, or it was started anew.")
        drained |= {"state": "left", "requests": 0, "instances": 0} if row is None else row["draining"]
    return drained


def _left_text(drained: dict[str, Any]) -> str:
    left = f"{_count(drained['requests'], 'request')} and {_count(drained['instances'], 'instance')}"
    return f"node {drained['node']}: {left}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
