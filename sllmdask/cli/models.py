"""What is deployed: ``deploy``, ``delete``, ``models``, and where it is: ``load``, ``unload``, ``pull``."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from sllmdask.cli.deployments import absolute, names, override, read_adapters, read_model
from sllmdask.cli.output import POLL_S, Column, print_json, print_rows, waiting_line
from sllmdask.cli.shell import FAILED, INTERRUPTED, F, command, connect, exit_code, json_option, server_option
from sllmdask.errors import LoadFailed, SllmError

if TYPE_CHECKING:
    from sllmdask.client import AsyncClient, Client

#: Instances named in one line.
N_SHOWN = 3


@command()
@click.argument("model", required=False)
@click.option("--config", "files", multiple=True, metavar="FILE", help="A deployment file; may be given several times.")
@click.option("--source", help="Where the checkpoint is: a directory, or an id on the hub.")
@click.option("--backend", help="What runs it.  [default: transformers]")
@click.option("--num-gpus", type=int, help="GPUs of an instance; slots on a CPU worker.")
@click.option("--target", type=int, help="Requests per instance before another one is started.")
@click.option("--min-instances", type=int, help="Instances kept when there is nothing to do.")
@click.option("--max-instances", type=int, help="Instances at most.")
@click.option("--keep-alive", help="How long an idle instance stays, as 300, 5m; -1: for ever.")
@click.option("--target-nodes", metavar="NODES", help="Nodes that may run it, as 0,1.  [default: any]")
@click.option("--local-disk", metavar="NODES", help="Nodes that get its files on their disk.")
@click.option("--memory-pool", metavar="NODES", help="Nodes that get it in host memory.")
@click.option("--enable-lora", is_flag=True, default=None, help="Requests may ask for LoRA adapters; --lora-adapters implies it.")
@click.option(
    "--lora-adapters", multiple=True, metavar="NAME=SOURCE", help="LoRA adapters; several are separated by spaces or commas."
)
@click.option("--wait", is_flag=True, help="Return when --min-instances are loaded.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that --wait waits.")
@server_option
@json_option
def deploy(
    model: str | None,
    files: tuple[str, ...],
    source: str | None,
    backend: str | None,
    num_gpus: int | None,
    target: int | None,
    min_instances: int | None,
    max_instances: int | None,
    keep_alive: str | None,
    target_nodes: str | None,
    local_disk: str | None,
    memory_pool: str | None,
    enable_lora: bool | None,
    lora_adapters: tuple[str, ...],
    wait: bool,
    timeout: float,
    server: str | None,
    as_json: bool,
) -> None:
    """Make MODEL available, or the models of --config files; flags go over what a file says.

    MODEL is a name (with --source), NAME=SOURCE, a directory, a URL, or the id of a model on the hub.
    """
    from sllmdask.config import Deployment, parse, read_file

    if bool(files) == bool(model) and not (model and len(files) == 1):
        raise click.UsageError("Give a MODEL, or --config FILE (with a MODEL to rename the one in it).")
    given = [dict(read_file(path) or {}) for path in files]
    if model and given:
        given[0]["model"] = model
    elif model:
        named = {"model": model} if source else read_model(model).model_dump(mode="json", exclude_unset=True)
        given = [named]
    scaling = {"target": target, "min_instances": min_instances, "max_instances": max_instances, "keep_alive": keep_alive}
    nodes = {"target_nodes": names(target_nodes), "local_disk": names(local_disk), "memory_pool": names(memory_pool)}
    deployments = []
    for deployment in given:
        override(deployment, {"auto_scaling_config": scaling, "placement_config": nodes})
        lora = {"enable_lora": enable_lora, "lora_adapters": read_adapters(lora_adapters)}
        where = absolute(source) if source else None
        override(deployment, {"backend_config": {"pretrained_model_name_or_path": where, **lora}})
        deployment |= {key: value for key, value in (("backend", backend), ("num_gpus", num_gpus)) if value is not None}
        checked = parse(Deployment, deployment, f"the deployment of {deployment.get('model', 'a model')!r}")
        deployments.append(checked.model_dump(mode="json", exclude_unset=True))
    with connect(server) as client:
        answers = [client.register(deployment) for deployment in deployments]
        if wait:
            for deployment in deployments:
                n = deployment.get("auto_scaling_config", {}).get("min_instances", 0)
                _wait_until_loaded(client, deployment["model"], n, timeout)
    for answer in answers:
        for warning in answer.get("warnings", []):
            click.echo(f"Warning: {answer['model']}: {warning}", err=True)
    if as_json:
        print_json(answers)
    else:
        for answer in answers:
            click.echo(f"deployed {answer['model']}")


def _wait_until_loaded(client: Client, model: str, n_instances: int, timeout_s: float) -> None:
    from sllmdask.units import format_bytes

    began_s = time.monotonic()
    with waiting_line() as waiting:
        while True:
            rows = client.call("GET", "/admin/models")["models"]
            row = next((row for row in rows if row["model"] == model), None)
            if row is None:
                raise LoadFailed(model, "it was deleted meanwhile")
            if row["instances"] >= n_instances:
                return
            if row["state"] == "failed":
                raise LoadFailed(model, row["reason"] or "the server does not say why")
            if time.monotonic() - began_s > timeout_s:
                raise TimeoutError(f"{model} was not loaded within {timeout_s:.0f} s; its state is {row['state']!r}.")
            done = row["progress"] or 0.0
            rate = format_bytes(done * row["nbytes"] / max(time.monotonic() - began_s, 1e-3))
            waiting.say(f"{row['state']} {model} {done:.0%} of {format_bytes(row['nbytes'])} {rate}/s")
            time.sleep(POLL_S)


@command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--lora-adapters", multiple=True, metavar="NAME", help="Take only these adapters of the one MODEL away.")
@click.option("--now", is_flag=True, help="End the requests that run, too, with an error.")
@server_option
@json_option
def delete(models: tuple[str, ...], lora_adapters: tuple[str, ...], now: bool, server: str | None, as_json: bool) -> None:
    """Take each MODEL away; its files stay. Requests that run may end, unless --now, or if it is deleted once more."""
    if lora_adapters and (len(models) > 1 or now):
        raise click.UsageError("--lora-adapters goes with one MODEL, and not with --now.")
    adapters = " ".join(lora_adapters).replace(",", " ").split() or None
    worst = 0
    results = []
    with connect(server) as client:
        for model in models:
            try:
                done = client.delete(model, adapters, force=now)
                counts = {key: done.get(key, 0) for key in ("n_running", "n_aborted")}
                results.append({"model": model, "deleted": True, "reason": None, **counts})
            except SllmError as error:
                if exit_code(error) != FAILED:
                    raise
                worst = FAILED
                results.append({"model": model, "deleted": False, "reason": error.message})
    if as_json:
        print_json(results)
    for result in results:
        if not result["deleted"]:
            click.echo(f"Error: {result['reason']}", err=True)
        elif not as_json:
            said = f"deleted {', '.join(adapters or [])}{' of ' if adapters else ''}{result['model']}"
            if result["n_running"]:
                said += f"; {result['n_running']} requests may end first: `sllmdask delete {result['model']}` again ends them"
            elif result["n_aborted"]:
                said += f" and ended {result['n_aborted']} requests"
            click.echo(said)
    sys.exit(worst)


@command()
@server_option
@json_option
def models(server: str | None, as_json: bool) -> None:
    """List what is deployed, and how far each model is from serving."""
    with connect(server) as client:
        rows = client.call("GET", "/admin/models")["models"]
    if as_json:
        print_json(rows)
    else:
        print_rows(rows, _model_columns(), "No models are deployed: sllmdask deploy MODEL")


def _model_columns() -> list[Column]:
    from sllmdask.units import format_bytes, format_seconds

    def state(row: Mapping[str, Any]) -> str:
        return f"{row['state']} {row['progress']:.0%}" if row.get("progress") is not None else str(row["state"])

    def keep_alive(row: Mapping[str, Any]) -> str:
        seconds = row.get("keep_alive")
        return "-" if seconds is None else "for ever" if seconds < 0 else format_seconds(seconds)

    return [
        ("MODEL", lambda row: row["model"]),
        ("STATE", state),
        ("INSTANCES", lambda row: row["instances"]),
        ("SIZE", lambda row: format_bytes(row["nbytes"])),
        ("CONTEXT", lambda row: row["max_model_len"]),
        ("KEEP-ALIVE", keep_alive),
        ("PINNED", lambda row: ", ".join(row.get("pinned") or ()) or "-"),
        ("REASON", lambda row: row.get("reason") or "-"),
    ]


# --- where a model is ------------------------------------------------------------------------------------------------


def _where_options(default: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in (
            click.option("--node", metavar="NODE", help=f"There, by its name in `sllmdask status`.  [default: {default}]"),
            click.option("--no-wait", is_flag=True, help="Return at once; it goes on in the cluster."),
        ):
            function = option(function)
        return function

    return add


@command()
@click.argument("model")
@click.option("--tier", type=click.Choice(["device", "host"]), default="device", show_default=True, help="How near to serving.")
@_where_options("where it is best placed")
@server_option
@json_option
def load(model: str, tier: str, node: str | None, no_wait: bool, server: str | None, as_json: bool) -> None:
    """Make MODEL ready before its first request, or bring it to a node's host memory."""

    def shown(workers: list[dict[str, Any]]) -> str:
        if tier == "host":
            return f"bringing {model} to host memory"
        loading = [instance for instance in _instances(workers, model, node) if instance["state"] in ("planned", "loading")]
        if not loading:
            return f"waiting for a slot for {model}{_in_the_way(workers, node)}"
        return _progress_text(model, loading[0])

    loaded = _follow(server, lambda client: client.load(model, node, tier, wait=not no_wait), shown, f"sllmdask unload {model}")
    if as_json:
        print_json(loaded)
    else:
        click.echo(_loaded_text(loaded))


@command()
@click.argument("model")
@_where_options("all")
@server_option
@json_option
def unload(model: str, node: str | None, no_wait: bool, server: str | None, as_json: bool) -> None:
    """Take MODEL from the devices, to host memory; requests that run may end first. Its next request loads it again."""

    def shown(workers: list[dict[str, Any]]) -> str:
        n_requests = sum(instance["n_requests"] for instance in _instances(workers, model, node))
        return f"{n_requests} requests of {model} may end first" if n_requests else f"unloading {model}"

    unloaded = _follow(server, lambda client: client.unload(model, node, wait=not no_wait), shown)
    for warning in unloaded["warnings"]:
        click.echo(f"Warning: {model}: {warning}", err=True)
    if as_json:
        print_json(unloaded)
    elif not unloaded["instances"]:
        click.echo(f"{model} is not loaded" + (f" on node {node}" if node else ""))
    else:
        nodes = ", ".join(sorted({instance["node"] for instance in unloaded["instances"]}))
        click.echo(f"{unloaded['state']} {model} from node {nodes}")


@command()
@click.argument("source", metavar="MODEL|SOURCE")
@_where_options("one that has them, or that may run it")
@server_option
@json_option
def pull(source: str, node: str | None, no_wait: bool, server: str | None, as_json: bool) -> None:
    """Bring the files of a deployed MODEL, or of a SOURCE (an id on the hub, a directory), to the disk of a node."""
    from sllmdask.units import format_bytes, format_seconds

    asked = absolute(source) if source.startswith((".", "/", "~")) else source  # a bare name is first of all a model's
    pulled = _follow(server, lambda client: client.pull(asked, node, wait=not no_wait), lambda _: f"fetching {source}")
    if as_json:
        print_json(pulled)
    elif pulled["state"] == "fetching":
        click.echo(f"fetching {source} to the disk of node {pulled['node']}")
    else:
        how = f"fetched in {format_seconds(pulled['seconds'])}" if pulled["fetched"] else "it was there already"
        click.echo(f"{source} is on the disk of node {pulled['node']}: {format_bytes(pulled['nbytes'])}, {how}")


def _follow(
    server: str | None,
    begin: Callable[[AsyncClient], Awaitable[dict[str, Any]]],
    shown: Callable[[list[dict[str, Any]]], str],
    undo: str | None = None,
) -> dict[str, Any]:
    """What `begin` answers; meanwhile, what `shown` makes of the workers' rows is on stderr."""
    import asyncio

    from sllmdask.client import AsyncClient

    async def watch() -> dict[str, Any]:
        async with AsyncClient(server) as client:
            task = asyncio.ensure_future(begin(client))
            with waiting_line() as waiting:
                while not (await asyncio.wait([task], timeout=POLL_S))[0]:
                    cluster = await client.call("GET", "/admin/cluster")
                    waiting.say(shown(cluster["workers"]))
            return task.result()

    try:
        return asyncio.run(watch())
    except KeyboardInterrupt:
        click.echo("Interrupted; it goes on in the cluster." + (f" To call it off: {undo}" if undo else ""), err=True)
        sys.exit(INTERRUPTED)


def _instances(workers: list[dict[str, Any]], model: str, node: str | None) -> Iterator[dict[str, Any]]:
    for worker in workers:
        if node in (None, worker["name"]):
            for instance in worker["instances"]:
                if instance["model"] == model:
                    yield {**instance, "node": worker["name"]}


def _in_the_way(workers: list[dict[str, Any]], node: str | None) -> str:
    """What holds the slots where a model waits for one."""
    here = [
        f"{instance['model']} on node {worker['name']} ({instance['state']}, {instance['n_requests']} requests)"
        for worker in workers
        if node in (None, worker["name"])
        for instance in worker["instances"]
    ]
    return f", taken by {', '.join(here[:N_SHOWN])}" + (" and others" if len(here) > N_SHOWN else "") if here else ""


def _progress_text(model: str, instance: Mapping[str, Any]) -> str:
    from sllmdask.units import format_bytes, format_seconds

    if instance["state"] == "planned":
        return f"waiting for a slot for {model} on node {instance['node']}"
    text = f"loading {model} on node {instance['node']}"
    told = instance["progress"]
    if not told or not told["total"]:
        return text
    text += f" {100 * told['done'] // told['total']}% of {format_bytes(told['total'])} {told['tier']}"
    if told["bytes_per_s"]:
        eta = format_seconds((told["total"] - told["done"]) / told["bytes_per_s"])
        text += f" {format_bytes(told['bytes_per_s'])}/s eta {eta}"
    return text


def _loaded_text(loaded: Mapping[str, Any]) -> str:
    from sllmdask.units import format_seconds

    model, keep_alive = loaded["model"], loaded["keep_alive"]
    if loaded["state"] == "loading":
        return f"loading {model}"
    where = f"ready on node {loaded['node']}" if loaded["state"] == "ready" else f"in the host memory of node {loaded['node']}"
    hit = loaded["cold_start"] == "hit"
    if hit:
        text = f"{model} is {where} already"
    else:
        text = f"{model} is {where}: loaded from {loaded['cold_start']} in {format_seconds(loaded['seconds'])}"
    if hit:
        return text
    if loaded["state"] == "ready" and keep_alive == 0:
        text += "; leaves at once: its keep_alive is 0"
    elif loaded["state"] == "ready" and keep_alive > 0:
        text += f"; leaves after {format_seconds(keep_alive)} without a request"
    return text
