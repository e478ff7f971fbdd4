"""The shell around every command: errors become one message and an exit code, and the options that many commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from sllmdask.errors import ConfigError, PortInUse, QueueTimeout, SchedulerUnreachable, SllmError

if TYPE_CHECKING:  # for annotations: importing it takes longer than printing the help
    from sllmdask.client import Client

FAILED, USAGE, UNREACHABLE, TIMED_OUT, INTERRUPTED = 1, 2, 3, 4, 130

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
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


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: a function as a command, under its own name unless another is given."""
    return click.command(name, cls=Command)


def _debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["debug"] = value


def _fail(error: Exception) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    sys.exit(exit_code(error))


def exit_code(error: Exception) -> int:
    from sllmdask.client import ServerError, ServerUnreachable

    if isinstance(error, ServerUnreachable | SchedulerUnreachable):
        return UNREACHABLE
    if isinstance(error, TimeoutError | QueueTimeout):
        return TIMED_OUT
    if isinstance(error, ConfigError) and not isinstance(error, ServerError | PortInUse):
        return USAGE
    return FAILED


def server_option(function: F) -> F:
    return click.option(
        "--server",
        envvar="LLM_SERVER_URL",
        metavar="URL",
        help="The server.  [env: LLM_SERVER_URL; default: http://127.0.0.1:8343]",
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON with stable keys.")(function)


def connect(server: str | None, timeout: float = 600.0) -> Client:
    from sllmdask.client import Client

    return Client(server, timeout=timeout)
