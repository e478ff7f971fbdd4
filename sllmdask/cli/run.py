"""Start the service or its parts, and see how it is: ``up``, ``serve``, ``status``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from sllmdask.cli.deployments import named, read_model
from sllmdask.cli.output import POLL_S, Column, Waiting, print_json, print_rows, waiting_line
from sllmdask.cli.shell import F, command, connect, json_option, server_option
from sllmdask.errors import ConfigError

if TYPE_CHECKING:
    from sllmdask.client import Client
    from sllmdask.config import Deployment, Settings

DEMO_MODELS = {"demo-llama": "demo:demo-llama", "demo-qwen": "demo:demo-qwen"}


def _run_options(command: F) -> F:
    for option in (
        click.option("--host", help="Address to listen on.  [default: 127.0.0.1]"),
        click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes any free one.  [default: 8343]"),
        click.option("--insecure", is_flag=True, help="Allow --host to be reachable by others, without keys."),
        click.option(
            "-c", "--config", "config_file", metavar="FILE", help="Settings of the cluster, and models, as YAML or JSON."
        ),
        click.option("-v", "--verbose", is_flag=True, help="Log every decision."),
        click.option("--json", "as_json", is_flag=True, help="When ready, print the URLs as one line of JSON."),
    ):
        command = option(command)
    return command


@command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Worker processes.")
@click.option("--slots-per-worker", type=click.IntRange(min=1), help="Instances that a worker runs at once.  [default: 1]")
@click.option("--demo", is_flag=True, help="Also deploy the two small models that come with sllmdask.")
@click.option("--hardware-config", metavar="FILE", help="Sizes and bandwidths of the nodes, which estimates begin with.")
@click.option(
    "--enable-migration/--no-migration",
    default=None,
    help="Whether running models go to other workers to make room.  [default: enable-migration]",
)
@_run_options
def up(
    models: tuple[str, ...],
    workers: int,
    slots_per_worker: int | None,
    demo: bool,
    hardware_config: str | None,
    enable_migration: bool | None,
    host: str | None,
    port: int | None,
    insecure: bool,
    config_file: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Start scheduler, workers and front door on this host, and serve each MODEL until Ctrl-C.

    A MODEL is a deployment file, NAME=SOURCE, a directory with a checkpoint, a URL, or the id of a model on the hub.
    """
    configured, file = _read_config(config_file)
    deployments = [*configured, *map(read_model, models)]
    if demo:
        deployments += [read_model(f"{name}={source}") for name, source in DEMO_MODELS.items()]
    _set_up_logging(verbose)
    flags: dict[str, dict[str, Any]] = {
        "server": {"host": host, "port": port},
        "worker": {"slots": slots_per_worker},
        "scheduler": {"hardware_config": hardware_config, "migrate": enable_migration},
    }
    settings = _read_settings(flags, file, insecure)
    from sllmdask.config import read_hardware
    from sllmdask.server.app import check_address
    from sllmdask.server.service import run_up

    check_address(settings.server)
    if settings.scheduler.hardware_config:
        read_hardware(settings.scheduler.hardware_config)
    with waiting_line() as waiting:
        waiting.say("starting the workers")
        run_up(deployments, settings, n_workers=workers, on_ready=_announce(waiting, as_json, "everything"))


@command()
@click.option("--scheduler", required=True, metavar="ADDRESS", help="Of the Dask scheduler, for example tcp://127.0.0.1:8786.")
@_run_options
def serve(
    scheduler: str, host: str | None, port: int | None, insecure: bool, config_file: str | None, verbose: bool, as_json: bool
) -> None:
    """Start a front door on a Dask cluster that runs already, and serve until Ctrl-C."""
    configured, file = _read_config(config_file)
    if configured:
        raise click.UsageError("serve takes settings only: deploy models with `sllmdask deploy --config FILE`.")
    if others := sorted(file.keys() - {"server"}):
        raise ConfigError(
            f"{config_file} sets {', '.join(others)}, which a front door does not read. Give the scheduler and the workers their "
            "settings in Dask's configuration.",
            others[0],
        )
    _set_up_logging(verbose)
    settings = _read_settings({"server": {"host": host, "port": port}}, file, insecure)
    from sllmdask.server.service import run_serve

    with waiting_line() as waiting:
        waiting.say(f"connecting to {scheduler}")
        run_serve(scheduler, settings, on_ready=_announce(waiting, as_json, "the front door"))


def _read_config(path: str | None) -> tuple[list[Deployment], dict[str, Any]]:
    """The deployments and the settings in a file: a deployment, or settings with ``models:`` beside them."""
    from sllmdask.config import Deployment, Settings, parse, read_file

    if path is None:
        return [], {}
    data = read_file(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings by name, as in configs/reference.yaml.")
    if "model" in data:
        return [parse(Deployment, data, f"the deployment {path}")], {}
    settings = {section: values for section, values in (data.get("sllmdask", data) or {}).items() if values is not None}
    models = settings.pop("models", [])
    for section, values in settings.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{section!r} in {path} must hold settings by name, as in configs/reference.yaml.", section)
    if isinstance(models, dict):
        models = [named(name, given) for name, given in models.items()]
    parse(Settings, settings, str(path))
    return [parse(Deployment, given, f"a model of {path}") for given in models], settings


def _read_settings(flags: Mapping[str, Mapping[str, Any]], file: dict[str, Any], insecure: bool) -> Settings:
    import ipaddress

    from sllmdask.cluster.dask_settings import read_settings

    settings: Settings = read_settings(flags, file)
    host = settings.server.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not insecure:
        raise ConfigError(
            f"--host {host} would let anybody who can reach this machine use the models: API keys are not built yet. "
            "Use 127.0.0.1 and a tunnel, or add --insecure if the network is yours alone.",
            "server.host",
        )
    return settings


def _set_up_logging(verbose: bool) -> None:
    """Warnings, and our decisions with ``-v``. Before Dask is imported: it reads these variables then, and so do its workers."""
    import logging

    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
    os.environ.setdefault("DASK_LOGGING__SLLMDASK", "info" if verbose else "warning")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if verbose:
        logging.getLogger("sllmdask").setLevel(logging.INFO)


def _announce(waiting: Waiting, as_json: bool, what_stops: str) -> Callable[[dict[str, Any]], None]:
    def on_ready(info: dict[str, Any]) -> None:
        waiting.hide()
        if as_json:
            click.echo(json.dumps(info))
            return
        models = info.get("models") or []
        click.echo(f"API        {info['url']}/v1")
        click.echo(f"scheduler  {info['scheduler']}")
        if info.get("dashboard"):
            click.echo(f"dashboard  {info['dashboard']}")
        click.echo(f"models     {', '.join(models) or 'none yet: sllmdask deploy MODEL'}")
        if models:
            body = json.dumps({"model": models[0], "messages": [{"role": "user", "content": "What is your name?"}]})
            click.echo(f"\nTry: curl {info['url']}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
        click.echo(f"A model loads on its first request. Ctrl-C stops {what_stops}.")

    return on_ready


@command()
@click.option("--wait", is_flag=True, help="Return when work can be placed.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds that --wait waits.")
@server_option
@json_option
def status(wait: bool, timeout: float, server: str | None, as_json: bool) -> None:
    """Show the server, its workers, and what they hold."""
    with connect(server) as client:
        found = _wait_until_ready(client, timeout) if wait else client.status()
    if as_json:
        print_json(found)
        return
    if sys.stdout.isatty():
        why = "ready" if found["ready"] else f"not ready: {found['reason']}"
        running = sum(1 for request in found["requests"] if request["state"] in ("queued", "running"))
        click.echo(f"{found['url']}  {why}  {len(found['models'])} models  {running} requests under way")
    print_rows(found["workers"], _worker_columns(), "No workers are connected.")
    if found.get("moves") and sys.stdout.isatty():  # who reads lines reads one table
        print_rows(found["moves"], _move_columns(), "")
    for warning in found.get("warnings") or ():
        click.echo(f"Warning: {warning}", err=True)


def _wait_until_ready(client: Client, timeout_s: float) -> dict[str, Any]:
    from sllmdask.client import ServerUnreachable

    deadline_s = time.monotonic() + timeout_s
    with waiting_line() as waiting:
        while True:
            try:
                found = client.status()
                if found["ready"]:
                    return found
                reason = str(found["reason"])
            except ServerUnreachable as error:
                reason = error.message
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"The server was not ready within {timeout_s:.0f} s. {reason}")
            waiting.say(f"not ready: {reason}")
            time.sleep(POLL_S)


def _move_columns() -> list[Column]:
    """Of moves under way."""
    from sllmdask.units import format_seconds

    return [
        ("MOVING", lambda row: row["request"] or row["instance"]),
        ("MODEL", lambda row: row["model"]),
        ("FROM", lambda row: row["source"]),
        ("TO", lambda row: row["destination"]),
        ("FOR", lambda row: format_seconds(row["seconds"])),
        ("CAUSE", lambda row: row["cause"] or "-"),
    ]


def _worker_columns() -> list[Column]:
    from sllmdask.units import format_bytes

    def memory(row: Mapping[str, Any], name: str) -> str:
        tier = row["tiers"].get(name)
        return f"{format_bytes(tier['used'])} of {format_bytes(tier['capacity'])}" if tier else "-"

    def estimate(row: Mapping[str, Any]) -> str:
        """How far the predicted times of its last loads were off."""
        error = row.get("estimate") or {}
        return f"{error['error_ratio']:.0%} off ({error['n']} loads)" if error.get("n") else "-"

    def model(held: Mapping[str, Any]) -> str:
        return f"{held['model']} ({held['state']}{', pinned' if held.get('pinned') else ''})"

    def kv(row: Mapping[str, Any]) -> str:
        """Of each model that generates text, how much of its KV cache requests have."""
        engines = [each["engine"] for each in row.get("instances", ()) if (each["engine"] or {}).get("blocks_total")]
        shown = [
            f"{engine['model']} {format_bytes(engine['blocks_used'] * engine['bytes_per_block'])} of "
            f"{format_bytes(engine['blocks_total'] * engine['bytes_per_block'])}"
            for engine in engines
        ]
        return ", ".join(shown) or "-"

    return [
        ("WORKER", lambda row: row["name"]),
        ("ADDRESS", lambda row: row["address"]),
        ("PID", lambda row: row["pid"]),
        ("STATE", lambda row: (row.get("draining") or {"state": "ready"})["state"]),
        ("SLOTS", lambda row: f"{row['slots_used']}/{row['slots']}"),
        ("HOST MEMORY", lambda row: memory(row, "host")),
        ("DEVICE MEMORY", lambda row: memory(row, "device")),
        ("KV CACHE", kv),
        ("ESTIMATE", estimate),
        ("MODELS", lambda row: ", ".join(map(model, row["models"])) or "-"),
    ]
