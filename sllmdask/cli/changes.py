"""Change what is deployed, and what stays in host memory: ``update``, ``pin``, ``unpin``."""

from __future__ import annotations

from typing import Any

import click

from sllmdask.cli.deployments import absolute, names, override, read_adapters
from sllmdask.cli.output import print_json
from sllmdask.cli.shell import command, connect, json_option, server_option


@command()
@click.argument("model")
@click.option("--config", "file", metavar="FILE", help="A file with the fields to change, as in a deployment file.")
@click.option("--source", help="Where the checkpoint is; another one replaces what is loaded.")
@click.option("--num-gpus", type=int, help="GPUs of an instance; slots on a CPU worker.")
@click.option("--target", type=int, help="Requests per instance before another one is started.")
@click.option("--min-instances", type=int, help="Instances kept when there is nothing to do.")
@click.option("--max-instances", type=int, help="Instances at most.")
@click.option("--keep-alive", help="How long an idle instance stays, as 300, 5m; 0: not at all, -1: for ever.")
@click.option("--target-nodes", metavar="NODES", help="Nodes that may run it, as 0,1; an empty text: any.")
@click.option("--local-disk", metavar="NODES", help="Nodes that have its files on their disk.")
@click.option("--memory-pool", metavar="NODES", help="Nodes that have it in host memory.")
@click.option("--lora-adapters", multiple=True, metavar="NAME=SOURCE", help="LoRA adapters, in place of those that it has.")
@server_option
@json_option
def update(
    model: str,
    file: str | None,
    source: str | None,
    num_gpus: int | None,
    target: int | None,
    min_instances: int | None,
    max_instances: int | None,
    keep_alive: str | None,
    target_nodes: str | None,
    local_disk: str | None,
    memory_pool: str | None,
    lora_adapters: tuple[str, ...],
    server: str | None,
    as_json: bool,
) -> None:
    """Change a deployed MODEL: only what is given, and at once. What is loaded stays, if it may be there as it is."""
    from sllmdask.config import read_file

    changes: dict[str, Any] = dict(read_file(file) or {}) if file else {}
    scaling = {"target": target, "min_instances": min_instances, "max_instances": max_instances, "keep_alive": keep_alive}
    override(changes, {"auto_scaling_config": scaling})
    nodes = {"target_nodes": names(target_nodes), "local_disk": names(local_disk), "memory_pool": names(memory_pool)}
    override(changes, {"placement_config": nodes})
    where = absolute(source) if source else None
    override(changes, {"backend_config": {"pretrained_model_name_or_path": where, "lora_adapters": read_adapters(lora_adapters)}})
    changes |= {} if num_gpus is None else {"num_gpus": num_gpus}
    if not changes:
        raise click.UsageError("Give what is to change: --max-instances, --keep-alive, --config FILE...")
    changes.pop("model", None)
    with connect(server) as client:
        answer = client.update(model, **changes)
    for warning in answer.get("warnings", []):
        click.echo(f"Warning: {model}: {warning}", err=True)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"updated {model}")


@command()
@click.argument("model")
@click.option("--node", metavar="NODE", help="There.  [default: where it is in memory, or where it is best placed]")
@server_option
@json_option
def pin(model: str, node: str | None, server: str | None, as_json: bool) -> None:
    """Bring MODEL to the host memory of a node and keep it there, whatever else wants the room."""
    from sllmdask.units import format_bytes

    with connect(server) as client:
        pinned = client.pin(model, node)
    if as_json:
        print_json(pinned)
    else:
        where = ", ".join(pinned["nodes"])
        click.echo(f"{model} stays in the host memory of node {where}: {format_bytes(pinned['nbytes'])}")


@command()
@click.argument("model")
@click.option("--node", metavar="NODE", help="There.  [default: everywhere]")
@server_option
@json_option
def unpin(model: str, node: str | None, server: str | None, as_json: bool) -> None:
    """Let the host copy of MODEL leave again when its room is needed."""
    with connect(server) as client:
        unpinned = client.pin(model, node, False)
    if as_json:
        print_json(unpinned)
    elif unpinned["nodes"]:
        click.echo(f"{model} may leave the host memory of node {', '.join(unpinned['nodes'])}")
    else:
        click.echo(f"{model} is not pinned" + (f" on node {node}" if node else ""))
