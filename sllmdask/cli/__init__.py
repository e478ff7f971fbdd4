"""The command line. Commands that talk to a server need only HTTP; Dask and torch are imported by the commands that need them.

A listing is a table on a terminal, TSV elsewhere, and JSON with stable keys after ``--json``. What was asked for goes to
stdout; progress, warnings and errors go to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not
reachable, 4 timed out, 130 interrupted while it wrote files.
"""

from __future__ import annotations

import json

import click

from sllmdask import __version__
from sllmdask.cli import changes, checkpoints, measure, models, moves, observe, requests, run, simulate
from sllmdask.cli.shell import command, json_option


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sllmdask", message="%(prog)s %(version)s")
def main() -> None:
    """Serverless LLM inference on Dask: many models, few workers, one OpenAI-compatible URL."""


@command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"sllmdask {__version__}")


for each in (
    run.up,
    run.serve,
    run.status,
    models.deploy,
    changes.update,
    models.delete,
    models.models,
    models.load,
    models.unload,
    models.pull,
    changes.pin,
    changes.unpin,
    checkpoints.convert,
    checkpoints.verify,
    measure.bench,
    simulate.simulate,
    requests.generate,
    requests.chat,
    requests.encode,
    moves.migrate,
    moves.drain,
    observe.requests,
    observe.explain,
    observe.events,
    observe.cancel,
    version,
):
    main.add_command(each)
