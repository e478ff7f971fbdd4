"""The command line. Commands that talk to a server need only HTTP; Dask and torch are imported by ``up`` and ``serve`` alone.

A listing is a table on a terminal, TSV elsewhere, and JSON with stable keys after ``--json``. What was asked for goes to
stdout; progress, warnings and errors go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not
reachable, 4 timed out.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from sllmdask import __version__
from sllmdask.errors import (
    ConfigError,
    LoadFailed,
    PortInUse,
    QueueTimeout,
    SchedulerUnreachable,
    SllmError,
)

if TYPE_CHECKING:  # for annotations: importing them takes longer than printing the help
    from sllmdask.client import Client, GenerateFuture
    from sllmdask.config import Deployment, Settings

FAILED, USAGE, UNREACHABLE, TIMED_OUT = 1, 2, 3, 4
#: Seconds between two lines of progress where there is no terminal to redraw.
PLAIN_PROGRESS_S = 5.0
#: Seconds between two looks at what cannot be waited for.
POLL_S = 0.2
DEMO_MODELS = {"demo-llama": "demo:demo-llama", "demo-qwen": "demo:demo-qwen"}

F = TypeVar("F", bound=Callable[..., Any])


# --- the shell around every command ----------------------------------------------------------------------------------


class _Command(click.Command):
    """A command with ``--debug``, whose errors become one message and an exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks."))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SllmError, TimeoutError) as error:
            if ctx.meta.get("debug"):
                raise
            _fail(error)


class _Group(click.Group):
    command_class = _Command


def _debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["debug"] = value


def _fail(error: Exception) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    from sllmdask.client import ServerError, ServerUnreachable

    if isinstance(error, ServerUnreachable | SchedulerUnreachable):
        return UNREACHABLE
    if isinstance(error, TimeoutError | QueueTimeout):
        return TIMED_OUT
    if isinstance(error, ConfigError) and not isinstance(error, ServerError | PortInUse):
        return USAGE
    return FAILED


def _server_option(command: F) -> F:
    return click.option(
        "--server",
        envvar="LLM_SERVER_URL",
        metavar="URL",
        help="The server.  [env: LLM_SERVER_URL; default: http://127.0.0.1:8343]",
    )(command)


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON with stable keys.")(command)


def _client(server: str | None, timeout: float = 600.0) -> Client:
    from sllmdask.client import Client

    return Client(server, timeout=timeout)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sllmdask", message="%(prog)s %(version)s")
def main() -> None:
    """Serverless LLM inference on Dask: many models, few workers, one OpenAI-compatible URL."""


@main.command()
@_json_option
def version(as_json: bool) -> None:
    """Print the version."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"sllmdask {__version__}")


# --- output ----------------------------------------------------------------------------------------------------------

#: A column: its heading, and what it shows of a row.
Column = tuple[str, Callable[[Mapping[str, Any]], Any]]


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], empty: str) -> None:
    cells = [[str(show(row)) for _, show in columns] for row in rows]
    headings = [heading for heading, _ in columns]
    if not sys.stdout.isatty():
        for line in [headings, *cells]:
            click.echo("\t".join(" ".join(cell.split()) for cell in line))
    elif not rows:
        click.echo(empty)
    else:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
        for line in cells:
            table.add_row(*map(Text, line))
        Console().print(table)


class _Waiting:
    """What the user sees on stderr while there is nothing else to see: one line redrawn, or one every few seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._showing = False
        self._began_s = time.monotonic()
        self._last_s = 0.0
        self._last_kind = ""

    def say(self, text: str) -> None:
        from rich.markup import escape

        now = time.monotonic()
        kind = re.sub(r"[\d.]+", "", text)
        text += self._eta(text, now)
        if self._status is not None:
            self._status.update(escape(text))
            if not self._showing:
                self._showing = True
                self._status.start()
        elif kind != self._last_kind or now - self._last_s >= PLAIN_PROGRESS_S:
            self._last_kind, self._last_s = kind, now
            click.echo(text, err=True)

    def hide(self) -> None:
        if self._showing and self._status is not None:
            self._showing = False
            self._status.stop()

    def _eta(self, text: str, now: float) -> str:
        """Time to the end at the pace so far, for a text that says how many percent are done and not how long it will take."""
        from sllmdask.units import format_seconds

        percent = re.search(r"\b(\d+(?:\.\d+)?)%", text)
        if percent is None or "eta" in text.lower() or not 0 < float(percent[1]) < 100:
            return ""
        return f" eta {format_seconds((now - self._began_s) * (100 / float(percent[1]) - 1))}"


@contextmanager
def _waiting() -> Iterator[_Waiting]:
    waiting = _Waiting()
    try:
        yield waiting
    finally:
        waiting.hide()


# --- run -------------------------------------------------------------------------------------------------------------


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


@main.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Worker processes.")
@click.option("--slots-per-worker", type=click.IntRange(min=1), help="Instances that a worker runs at once.  [default: 1]")
@click.option("--demo", is_flag=True, help="Also deploy the two small models that come with sllmdask.")
@_run_options
def up(
    models: tuple[str, ...],
    workers: int,
    slots_per_worker: int | None,
    demo: bool,
    host: str | None,
    port: int | None,
    insecure: bool,
    config_file: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Start scheduler, workers and front door on this host, and serve each MODEL until Ctrl-C.

    A MODEL is a deployment file, NAME=SOURCE, a directory with a checkpoint, or the id of a model on the hub.
    """
    configured, file = _read_config(config_file)
    deployments = [*configured, *map(_read_model, models)]
    if demo:
        deployments += [_read_model(f"{name}={source}") for name, source in DEMO_MODELS.items()]
    _set_up_logging(verbose)
    flags: dict[str, dict[str, Any]] = {"server": {"host": host, "port": port}, "worker": {"slots": slots_per_worker}}
    settings = _read_settings(flags, file, insecure)
    from sllmdask.server.app import check_address
    from sllmdask.server.service import run_up

    check_address(settings.server)
    with _waiting() as waiting:
        waiting.say("starting the workers")
        run_up(deployments, settings, n_workers=workers, on_ready=_announce(waiting, as_json, "everything"))


@main.command()
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

    with _waiting() as waiting:
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
        models = [_named(name, given) for name, given in models.items()]
    parse(Settings, settings, str(path))
    return [parse(Deployment, given, f"a model of {path}") for given in models], settings


def _named(name: str, given: Any) -> Any:
    """A model of a ``models:`` mapping as a deployment: its value is a source or the rest of a deployment file."""
    if isinstance(given, str):
        return {"model": name, "backend_config": {"pretrained_model_name_or_path": given}}
    return {"model": name, **(given or {})}


def _override(settings: dict[str, Any], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the flags that were given over what a file says."""
    for section, values in given.items():
        chosen = {key: value for key, value in values.items() if value is not None}
        if chosen:
            settings[section] = {**(settings.get(section) or {}), **chosen}


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


def _announce(waiting: _Waiting, as_json: bool, what_stops: str) -> Callable[[dict[str, Any]], None]:
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


# --- models ----------------------------------------------------------------------------------------------------------


def _read_model(text: str) -> Deployment:
    """A deployment from a file, ``NAME=SOURCE``, a directory, or the id of a model on the hub."""
    from sllmdask.config import Deployment, parse, read_deployment

    name, equals, source = text.partition("=")
    if not equals:
        if os.path.isfile(text):
            return read_deployment(text)
        if text.startswith((".", "/", "~")) or text.endswith((".json", ".yaml", ".yml")):
            if not os.path.isdir(os.path.expanduser(text)):
                raise ConfigError(f"There is no file or directory {text}.")
        elif not os.path.isdir(text):
            return parse(Deployment, {"model": text}, f"the model {text!r}")
        name, source = os.path.basename(os.path.abspath(os.path.expanduser(text))), text
    return parse(Deployment, _named(name, _absolute(source)), f"the model {text!r}")


def _absolute(source: str) -> str:
    """A directory here by its whole path, since workers start elsewhere; anything else is left as it is."""
    path = os.path.abspath(os.path.expanduser(source))
    return path if os.path.isdir(path) else source


@main.command()
@click.argument("model", required=False)
@click.option("--config", "files", multiple=True, metavar="FILE", help="A deployment file; may be given several times.")
@click.option("--source", help="Where the checkpoint is: a directory, or an id on the hub.")
@click.option("--backend", help="What runs it.  [default: transformers]")
@click.option("--num-gpus", type=int, help="GPUs of an instance; slots on a CPU worker.")
@click.option("--target", type=int, help="Requests per instance before another one is started.")
@click.option("--min-instances", type=int, help="Instances kept when there is nothing to do.")
@click.option("--max-instances", type=int, help="Instances at most.")
@click.option("--keep-alive", help="How long an idle instance stays, as 300, 5m; -1: for ever.")
@click.option("--wait", is_flag=True, help="Return when --min-instances are loaded.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that --wait waits.")
@_server_option
@_json_option
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
    wait: bool,
    timeout: float,
    server: str | None,
    as_json: bool,
) -> None:
    """Make MODEL available, or the models of --config files; flags go over what a file says.

    MODEL is a name (with --source), NAME=SOURCE, a directory, or the id of a model on the hub.
    """
    from sllmdask.config import Deployment, parse, read_file

    if bool(files) == bool(model) and not (model and len(files) == 1):
        raise click.UsageError("Give a MODEL, or --config FILE (with a MODEL to rename the one in it).")
    given = [dict(read_file(path) or {}) for path in files]
    if model and given:
        given[0]["model"] = model
    elif model:
        named = {"model": model} if source else _read_model(model).model_dump(mode="json", exclude_unset=True)
        given = [named]
    scaling = {"target": target, "min_instances": min_instances, "max_instances": max_instances, "keep_alive": keep_alive}
    deployments = []
    for deployment in given:
        _override(deployment, {"auto_scaling_config": scaling})
        _override(deployment, {"backend_config": {"pretrained_model_name_or_path": _absolute(source) if source else None}})
        deployment |= {key: value for key, value in (("backend", backend), ("num_gpus", num_gpus)) if value is not None}
        checked = parse(Deployment, deployment, f"the deployment of {deployment.get('model', 'a model')!r}")
        deployments.append(checked.model_dump(mode="json", exclude_unset=True))
    with _client(server) as client:
        answers = [client.register(deployment) for deployment in deployments]
        if wait:
            for deployment in deployments:
                n = deployment.get("auto_scaling_config", {}).get("min_instances", 0)
                _wait_until_loaded(client, deployment["model"], n, timeout)
    for answer in answers:
        for warning in answer.get("warnings", []):
            click.echo(f"Warning: {answer['model']}: {warning}", err=True)
    if as_json:
        _print_json(answers)
    else:
        for answer in answers:
            click.echo(f"deployed {answer['model']}")


def _wait_until_loaded(client: Client, model: str, n_instances: int, timeout_s: float) -> None:
    from sllmdask.units import format_bytes

    began_s = time.monotonic()
    with _waiting() as waiting:
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


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_server_option
@_json_option
def delete(models: tuple[str, ...], server: str | None, as_json: bool) -> None:
    """Take each MODEL away; its files stay."""
    worst = 0
    results = []
    with _client(server) as client:
        for model in models:
            try:
                client.delete(model)
                results.append({"model": model, "deleted": True, "reason": None})
            except SllmError as error:
                if _exit_code(error) != FAILED:
                    raise
                worst = FAILED
                results.append({"model": model, "deleted": False, "reason": error.message})
    if as_json:
        _print_json(results)
    for result in results:
        if not result["deleted"]:
            click.echo(f"Error: {result['reason']}", err=True)
        elif not as_json:
            click.echo(f"deleted {result['model']}")
    sys.exit(worst)


@main.command()
@_server_option
@_json_option
def models(server: str | None, as_json: bool) -> None:
    """List what is deployed, and how far each model is from serving."""
    with _client(server) as client:
        rows = client.call("GET", "/admin/models")["models"]
    if as_json:
        _print_json(rows)
    else:
        _print_rows(rows, _model_columns(), "No models are deployed: sllmdask deploy MODEL")


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
        ("REASON", lambda row: row.get("reason") or "-"),
    ]


@main.command()
@click.option("--wait", is_flag=True, help="Return when work can be placed.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds that --wait waits.")
@_server_option
@_json_option
def status(wait: bool, timeout: float, server: str | None, as_json: bool) -> None:
    """Show the server, its workers, and what they hold."""
    with _client(server) as client:
        found = _wait_until_ready(client, timeout) if wait else client.status()
    if as_json:
        _print_json(found)
        return
    if sys.stdout.isatty():
        why = "ready" if found["ready"] else f"not ready: {found['reason']}"
        running = sum(1 for request in found["requests"] if request["state"] in ("queued", "running"))
        click.echo(f"{found['url']}  {why}  {len(found['models'])} models  {running} requests under way")
    _print_rows(found["workers"], _worker_columns(), "No workers are connected.")


def _wait_until_ready(client: Client, timeout_s: float) -> dict[str, Any]:
    from sllmdask.client import ServerUnreachable

    deadline_s = time.monotonic() + timeout_s
    with _waiting() as waiting:
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


def _worker_columns() -> list[Column]:
    from sllmdask.units import format_bytes

    def host(row: Mapping[str, Any]) -> str:
        tier = row["tiers"].get("host")
        return f"{format_bytes(tier['used'])} of {format_bytes(tier['capacity'])}" if tier else "-"

    return [
        ("WORKER", lambda row: row["name"]),
        ("ADDRESS", lambda row: row["address"]),
        ("PID", lambda row: row["pid"]),
        ("SLOTS", lambda row: f"{row['slots_used']}/{row['slots']}"),
        ("HOST MEMORY", host),
        ("MODELS", lambda row: ", ".join(f"{held['model']} ({held['state']})" for held in row["models"]) or "-"),
    ]


# --- requests --------------------------------------------------------------------------------------------------------


def _sampling_options(command: F) -> F:
    for option in (
        click.option("--max-tokens", type=int, help="Tokens of the answer at most.  [default: what the window holds]"),
        click.option("--temperature", type=float, help="0 takes the likeliest token.  [default: 1]"),
        click.option("--seed", type=int, help="The same seed draws the same answer."),
        click.option("--timeout", type=float, help="Seconds that an answer may take, loading included."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--input", "input_file", metavar="FILE", help="Prompts: a line each, or JSON objects with 'prompt' or 'messages'.")
@click.option("--threads", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts of --input asked at once.")
@click.option("--raw", is_flag=True, help="Go on with the prompt's text, instead of answering it as a chat.")
@_sampling_options
@_server_option
@_json_option
def generate(
    model: str,
    prompt: str | None,
    input_file: str | None,
    threads: int,
    raw: bool,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    timeout: float | None,
    server: str | None,
    as_json: bool,
) -> None:
    """Ask MODEL. Without a PROMPT and --input, the prompt is read from stdin."""
    if prompt is not None and input_file is not None:
        raise click.UsageError("Give a PROMPT or --input, not both.")
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = {key: value for key, value in given.items() if value is not None}
    if input_file is not None:
        prompts = _read_prompts(input_file)
        with _client(server) as client:
            futures = client.map(model, prompts, max_in_flight=threads, chat=not raw, **params)
            sys.exit(_print_answers(futures, timeout, as_json))
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("Give a PROMPT, or pipe one in.")
        prompt = sys.stdin.read()
    with _client(server) as client, _waiting() as waiting:
        future = client.submit(model, prompt, chat=not raw, on_progress=waiting.say, **params)
        with _deadline(future, timeout):
            for piece in future:
                waiting.hide()
                if not as_json:
                    click.echo(piece, nl=False)
        response = future.response()
    if as_json:
        _print_json(vars(response))
    else:
        click.echo()


@contextmanager
def _deadline(future: GenerateFuture, timeout_s: float | None) -> Iterator[None]:
    """Cancel `future` when it takes too long, or when the block is left before its end."""
    import threading

    from sllmdask.errors import Cancelled

    late = threading.Event()

    def expire() -> None:
        late.set()
        future.cancel()

    timer = None if timeout_s is None else threading.Timer(timeout_s, expire)
    if timer is not None:
        timer.start()
    try:
        yield
    except Cancelled:
        if late.is_set():
            raise TimeoutError(f"The answer was not complete within {timeout_s:g} s.") from None
        raise
    finally:
        future.cancel()
        if timer is not None:
            timer.cancel()
            timer.join()


def _read_prompts(path: str) -> list[Any]:
    """Texts and lists of messages: from a JSON list, from lines of JSON, or from lines of text."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if path.endswith(".json"):
            items = json.loads(text)
            items = items if isinstance(items, list) else [items]
        elif path.endswith(".jsonl"):
            items = [json.loads(line) for line in lines]
        else:
            return lines
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    prompts = [item.get("messages", item.get("prompt")) if isinstance(item, dict) else item for item in items]
    for i, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)):
            raise ConfigError(f"Item {i} of {path} is neither a text nor an object with 'prompt' or 'messages'.")
    return prompts


def _print_answers(futures: Sequence[GenerateFuture], timeout_s: float | None, as_json: bool) -> int:
    """Print answers in the order of their prompts, one line of JSON each or the text; a failure does not stop the others."""
    worst = 0
    with _waiting() as waiting:
        for i, future in enumerate(futures):
            waiting.say(f"{i} of {len(futures)} answered")
            error: Exception | None = None
            try:
                future.result(timeout_s)
            except (SllmError, TimeoutError) as caught:
                future.cancel()
                error = caught
                worst = max(worst, _exit_code(caught))
            waiting.hide()
            if as_json:
                answer = vars(future.response()) if error is None else {}
                click.echo(json.dumps({"index": i, **answer, "error": str(error) if error else None}, ensure_ascii=False))
            elif error is None:
                click.echo(future.result())
            if error is not None:
                click.echo(f"Error: prompt {i + 1}: {str(error) or 'timed out'}", err=True)
    return worst


@main.command()
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@_sampling_options
@_server_option
def chat(
    model: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    timeout: float | None,
    server: str | None,
) -> None:
    """Talk with MODEL. /clear forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    params = {key: value for key, value in given.items() if value is not None}
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with _client(server) as client:
        client.call("GET", f"/v1/models/{urllib.parse.quote(model)}")
        while (line := _read_line()) not in (None, "/bye", "/exit"):
            if line == "/clear":
                messages = list(opening)
            elif line and line.strip():
                messages.append({"role": "user", "content": line})
                try:
                    messages.append({"role": "assistant", "content": _answer(client, model, messages, params, timeout)})
                except (SllmError, TimeoutError) as error:
                    if _exit_code(error) == UNREACHABLE:
                        raise
                    messages.pop()
                    click.echo(f"Error: {error}", err=True)


def _read_line() -> str | None:
    """The next line that the user typed; ``None`` at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history
    try:
        return input(">>> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _answer(client: Client, model: str, messages: list[dict[str, str]], params: dict[str, Any], timeout_s: float | None) -> str:
    pieces = []
    with _waiting() as waiting:
        future = client.submit(model, messages, on_progress=waiting.say, **params)
        try:
            with _deadline(future, timeout_s):
                for piece in future:
                    waiting.hide()
                    click.echo(piece, nl=False)
                    pieces.append(piece)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False, err=True)
    click.echo()
    return "".join(pieces)
