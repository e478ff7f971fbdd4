"""Move what runs: ``migrate``."""

from __future__ import annotations

from typing import Any

import click

from sllmdask.cli.output import print_json, waiting_line
from sllmdask.cli.shell import command, connect, json_option, server_option

#: Seconds that a move may take, the loading of a model on the other node included.
MOVE_S = 8100.0


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
