"""Measure this machine: ``bench load``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sllmdask.cli.output import Column, print_json, print_rows, waiting_line
from sllmdask.cli.shell import FAILED, Command


class _Bench(click.Group):
    command_class = Command


@click.group(cls=_Bench)
def bench() -> None:
    """Measure what this machine can do."""


@bench.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Loads of each loader that count.")
@click.option("--json", "json_file", metavar="FILE", help="Write every load there too; '-' is stdout, without the table.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the tensors go.")
@click.option("--size", default="1GiB", show_default=True, help="Of the checkpoint that is generated where no PATH is given.")
@click.option("--dir", "directory", default=".", show_default=True, type=click.Path(path_type=Path), help="Where to generate it.")
def load(path: Path | None, repeats: int, json_file: str | None, device: str, size: str, directory: Path) -> None:
    """How fast the checkpoint at PATH is loaded here, cold, next to the disk itself and to other loaders.

    PATH may hold safetensors or the fast format. What is generated is removed at the end. "worker" reads as a worker does: into
    memory that was used before. Every load ends when each tensor is there and each of its pages was touched.
    """
    from sllmdask.units import format_bytes, parse_bytes

    nbytes = parse_bytes(size)
    with ExitStack() as stack, waiting_line() as waiting:
        waiting.say("importing the loaders")
        from sllmdask.bench import OURS, check_device, generated, measure

        check_device(device)
        if path is None:
            waiting.say(f"generating {format_bytes(nbytes)} in {directory}")
            path = stack.enter_context(generated(nbytes, directory))
        result = measure(path, repeats=repeats, device=device, on_progress=waiting.say)
    rows = [asdict(row) for row in result.rows]
    facts = {
        "path": result.path,
        "format": result.format,
        "nbytes": result.nbytes,
        "device": result.device,
        "cold": result.cold,
        "repeats": repeats,
        "loaders": rows,
    }
    damaged = any(row.failed for row in result.rows if row.name.startswith(OURS))
    if json_file == "-":
        print_json(facts)
        sys.exit(FAILED if damaged else 0)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(f"{result.path}: {result.format}, {format_bytes(result.nbytes)} to {device}, median of {repeats}", err=True)
    if not result.cold:
        click.echo("Warning: not cold: the system could not drop the files from its cache, or does not tell.", err=True)
    print_rows(rows, _columns(), "")
    for row in result.rows:
        if row.failed is not None:
            click.echo(f"{row.name} failed: {row.failed}", err=True)
    sys.exit(FAILED if damaged else 0)


def _columns() -> list[Column]:
    def shown(key: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: "-" if row[key] is None else f"{row[key]:.{digits}f}"

    return [
        ("LOADER", lambda row: row["name"]),
        ("SECONDS", shown("seconds", 3)),
        ("FROM-TO", lambda row: f"{min(row['runs']):.3f}-{max(row['runs']):.3f}" if row["runs"] else "-"),
        ("GB/S", shown("gb_per_s", 2)),
        ("TO THE LIMIT", shown("ratio", 2)),
    ]
