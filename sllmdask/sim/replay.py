"""The event log of a live cluster as a file, and the same decisions again from it.

A line is one JSON object: first the controller's settings, then each event, and after it what was decided. Nothing in it is
executed or unpickled. What follows from an event depends on nothing but the events before it, so a controller of another
version that decides otherwise shows where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

from pydantic import TypeAdapter, ValidationError

from sllmdask import __version__
from sllmdask.errors import ConfigError, SllmError
from sllmdask.policy import events as ev
from sllmdask.policy.controller import Controller, ControllerSettings
from sllmdask.policy.decisions import Decision

_KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in get_args(ev.Event)}


def plain(value: Any) -> Any:
    """What JSON cannot write by itself: views, decisions, sets, mappings, errors."""
    if isinstance(value, SllmError):
        return value.as_wire()
    if is_dataclass(value):
        return vars(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in an event log")


def _line(kind: str, value: Any) -> str:
    return json.dumps({kind: type(value).__name__, **vars(value)}, default=plain)


class EventLog:
    """Writes a log, line by line."""

    def __init__(self, file: TextIO, settings: ControllerSettings) -> None:
        self._file = file
        self._write(json.dumps({"sllmdask": __version__, "settings": vars(settings)}, default=plain))

    def event(self, event: ev.Event) -> None:
        self._write(_line("event", event))

    def decision(self, decision: Decision) -> None:
        self._write(_line("decision", decision))

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")


@dataclass(frozen=True)
class Step:
    """One event of a log, what was decided then, and what is decided now; as plain data."""

    line: int
    event: ev.Event
    then: tuple[Any, ...]
    now: tuple[Any, ...]


def replay(path: Path) -> Iterator[Step]:
    """The events of a log, one after the other, each with its decisions; raises :class:`ConfigError` for a line that is none.

    A last line that was cut off in the middle is left out: the log of a scheduler that was killed may end so.
    """
    controller: Controller | None = None
    pending: tuple[int, ev.Event, tuple[Any, ...]] | None = None
    then: list[Any] = []
    for number, data in _lines(path):
        if pending and "decision" not in data:
            yield Step(*pending[:2], tuple(then), pending[2])
            pending, then = None, []
        if "settings" in data:  # a scheduler that was started again
            controller = Controller(_read(ControllerSettings, data["settings"], path, number))
        elif controller is None:
            raise ConfigError(f"{path} is no event log: its first line has no settings")
        elif "event" in data:
            kind = _KINDS.get(data.pop("event"))
            if kind is None:
                raise ConfigError(f"{path}, line {number}: an event that this version does not know")
            event = _read(kind, data, path, number)
            pending = number, event, tuple(json.loads(_line("decision", each)) for each in controller.handle(event))
        elif "decision" in data:
            then.append(data)
        else:
            raise ConfigError(f"{path}, line {number}: neither an event nor a decision")
    if pending:
        yield Step(*pending[:2], tuple(then), pending[2])
    if controller is None:
        raise ConfigError(f"{path} is no event log: it is empty")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    data = json.loads(line)
                except json.JSONDecodeError as error:
                    if not line.endswith("\n"):
                        return
                    raise ConfigError(f"{path}, line {number}: not JSON ({error.msg})") from None
                if not isinstance(data, dict):
                    raise ConfigError(f"{path}, line {number}: not an object")
                yield number, data
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from None


def _read(kind: type[Any], data: Any, path: Path, number: int) -> Any:
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}, line {number}: {kind.__name__} {where}: {first['msg']}") from None
