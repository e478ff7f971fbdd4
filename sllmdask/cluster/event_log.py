"""The event log of a live cluster, where ``scheduler.event_log`` names a file: what ``sllmdask simulate replay`` reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TextIO

from sllmdask.errors import ConfigError
from sllmdask.policy import events as ev
from sllmdask.policy.controller import ControllerSettings
from sllmdask.policy.decisions import Decision
from sllmdask.sim.replay import EventLog

logger = logging.getLogger(__name__)


class Recorder:
    """Appends to the file, line by line, so that a scheduler that is killed has told everything. Without a path: nothing."""

    def __init__(self, path: str, settings: ControllerSettings) -> None:
        """Raises :class:`ConfigError` for a file that cannot be written."""
        self._file: TextIO | None = None
        if path:
            try:
                self._file = open(os.path.expanduser(path), "a", buffering=1, encoding="utf-8")  # noqa: SIM115
                self._log = EventLog(self._file, settings)
            except OSError as error:
                raise ConfigError(f"scheduler.event_log: cannot write {path}: {error.strerror}", "event_log") from None

    def saw(self, event: ev.Event, decisions: Sequence[Decision]) -> None:
        """An event, and all that was decided. A log that can no longer be written is given up: requests are not."""
        if self._file is None:
            return
        try:
            self._log.event(event)
            for decision in decisions:
                self._log.decision(decision)
        except OSError as error:
            logger.error("the event log %s ends here: %s", self._file.name, error)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError:
                logger.warning("the end of the event log %s was not written", file.name)
