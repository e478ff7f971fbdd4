"""What a command prints: JSON, tables, and a line on stderr while there is nothing else to see."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

#: Seconds between two lines of progress where there is no terminal to redraw.
PLAIN_PROGRESS_S = 5.0
#: Seconds between two looks at what cannot be waited for.
POLL_S = 0.2

#: A column: its heading, and what it shows of a row.
Column = tuple[str, Callable[[Mapping[str, Any]], Any]]


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], empty: str) -> None:
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


class Waiting:
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
def waiting_line() -> Iterator[Waiting]:
    waiting = Waiting()
    try:
        yield waiting
    finally:
        waiting.hide()


@contextmanager
def bytes_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many of `total` bytes are done, how fast, and how long it will take; yields what is told the bytes.

    A bar on a terminal, a line every few seconds elsewhere. `total` may be unknown.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        began_s = last_s = time.monotonic()

        def say(done: int) -> None:
            nonlocal last_s
            now = time.monotonic()
            if now - last_s >= PLAIN_PROGRESS_S:
                last_s = now
                click.echo(f"{what} {_bytes_text(done, total, now - began_s)}", err=True)

        yield say
        return

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _bytes_text(done: int, total: int | None, seconds: float) -> str:
    from sllmdask.units import format_bytes, format_seconds

    rate = done / max(seconds, 1e-3)
    if not total:
        return f"{format_bytes(done)} {format_bytes(rate)}/s"
    eta = f" eta {format_seconds(max(0, total - done) / rate)}" if rate else ""
    return f"{min(100, 100 * done // total)}% of {format_bytes(total)} {format_bytes(rate)}/s{eta}"


def show_warnings() -> None:
    """What the package logs as a warning is a line on stderr, for commands that do their work here."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="Warning: %(message)s")
