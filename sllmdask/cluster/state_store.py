"""What a scheduler must know after it was killed: the deployments, what is pinned, and which workers were there.

An SQLite file. Each change is one transaction that is on the disk before it is answered, in a thread of its own, in the order of
the changes. What is not in here is told by others: instances by their workers, requests by their front doors.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sllmdask.errors import ConfigError, StateUnwritable

logger = logging.getLogger(__name__)

#: Version of the tables; a file of a newer one is refused.
SCHEMA = 1
#: Of our files, in SQLite's header.
APPLICATION_ID = 0x736C6C6D
#: Seconds that a scheduler which is about to end may still have the file.
LOCK_S = 3.0
_TABLES = """
CREATE TABLE deployments (model TEXT PRIMARY KEY, given TEXT NOT NULL, facts TEXT NOT NULL);
CREATE TABLE pins (model TEXT, node TEXT, PRIMARY KEY (model, node));
CREATE TABLE workers (name TEXT PRIMARY KEY);
CREATE TABLE starts (n INTEGER NOT NULL);
INSERT INTO starts VALUES (0);
"""


@dataclass(frozen=True)
class StoredDeployment:
    """A deployment as it was given, and what its checkpoint turned out to be."""

    model: str
    given: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What the file had when it was opened."""

    #: How many schedulers have opened it, this one included.
    generation: int = 1
    deployments: tuple[StoredDeployment, ...] = ()
    #: Names of the nodes that keep a model's host copy, by model.
    pins: dict[str, set[str]] = field(default_factory=dict)
    #: Names of the workers that were there.
    workers: frozenset[str] = frozenset()


def default_path(port: int) -> Path:
    """The file of the scheduler at `port` of this host, under ``XDG_STATE_HOME``."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "sllmdask" / f"scheduler-{port}.sqlite"


class StateStore:
    """One file, which one scheduler has for itself. Made, and read, by :meth:`open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, found: Found) -> None:
        self.path, self.found = path, found
        self._connection, self._inode = connection, _inode(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state")

    @classmethod
    def open(cls, path: Path, lock_s: float = LOCK_S) -> StateStore:
        """Open the file, or make it. Raises :class:`ConfigError` if it cannot be used, and leaves it as it is then."""
        connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            connection = _connect(path, lock_s)
            return cls(path, connection, _open(path, connection))
        except (sqlite3.Error, OSError, ValueError, ConfigError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(_why(path, error), "scheduler.state") from None

    async def put(self, deployment: StoredDeployment) -> None:
        """Keep a deployment, in the place of one of that name. Raises :class:`StateUnwritable`."""
        row = (deployment.model, json.dumps(deployment.given), json.dumps(deployment.facts))
        await self._write("INSERT OR REPLACE INTO deployments VALUES (?, ?, ?)", [row])

    async def delete(self, model: str) -> None:
        """Forget a deployment, and where it was pinned."""
        await self._do(lambda connection: _delete(connection, model))

    async def pin(self, model: str, nodes: Iterable[str]) -> None:
        """`nodes` are those that keep a model's host copy, and no others are."""
        rows = [(model, node) for node in sorted(nodes)]
        await self._do(lambda connection: _pin(connection, model, rows))

    async def worker_joined(self, name: str) -> None:
        await self._write("INSERT OR IGNORE INTO workers VALUES (?)", [(name,)])

    async def worker_left(self, name: str) -> None:
        await self._write("DELETE FROM workers WHERE name = ?", [(name,)])

    async def all_workers_left(self) -> None:
        """None of them is waited for by the next scheduler."""
        await self._do(lambda connection: connection.execute("DELETE FROM workers"))

    async def close(self) -> None:
        """After what is under way. The file can be opened by another scheduler then."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown(wait=False)

    async def _write(self, statement: str, rows: list[tuple[str, ...]]) -> None:
        await self._do(lambda connection: connection.executemany(statement, rows))

    async def _do(self, change: Callable[[sqlite3.Connection], object]) -> None:
        try:
            # Not given up halfway by who waits for it: what was begun is written.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._change, change))
        except sqlite3.Error as error:
            raise StateUnwritable(str(self.path), f"{error} (is the disk full?)") from None
        except FileExistsError:
            reason = "the file was moved or deleted, and another one is in its place. Move that one away"
            raise StateUnwritable(str(self.path), reason) from None
        except OSError as error:
            raise StateUnwritable(str(self.path), error.strerror or str(error)) from None

    def _change(self, change: Callable[[sqlite3.Connection], object]) -> None:
        if _inode(self.path) != self._inode:
            self._put_back()
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            change(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _put_back(self) -> None:
        """The file was moved or deleted, and nobody would find there what is written to it: all of it goes to its place again.

        Raises :class:`FileExistsError` if another file is there.
        """
        copy = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._connection.execute("VACUUM INTO ?", (str(copy),))
            os.link(copy, self.path)
        finally:
            copy.unlink(missing_ok=True)
        # The old connection removes a journal by its name when it closes: before the new one has one.
        connection = _connect(self.path, LOCK_S)
        try:
            _take(connection)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            self.path.unlink(missing_ok=True)
            raise
        self._connection.close()
        self._connection, self._inode = connection, _inode(self.path)
        logger.warning("%s was moved or deleted, and was written again", self.path)


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file that is; ``None``: there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        state = path.stat()
        return state.st_dev, state.st_ino
    return None


def _connect(path: Path, lock_s: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=lock_s, isolation_level=None, check_same_thread=False)


def _take(connection: sqlite3.Connection) -> None:
    """Begin a transaction, from which on the file is this process's alone."""
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN EXCLUSIVE")


def _open(path: Path, connection: sqlite3.Connection) -> Found:
    """Take the file for this process, and read it; raises :class:`ConfigError` for one that is not of ours."""
    _take(connection)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (n_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if n_tables and application != APPLICATION_ID:
        raise ConfigError(f"scheduler.state: {path} is a database of another program. Name another file.", "scheduler.state")
    if version > SCHEMA:
        raise ConfigError(
            f"scheduler.state: {path} was written by a newer sllmdask: its tables are version {version}, and this one knows "
            f"{SCHEMA}. Start that version again, or name another file.",
            "scheduler.state",
        )
    if not n_tables:
        for statement in filter(str.strip, _TABLES.split(";")):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
    (sound,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if sound != "ok":
        raise sqlite3.DatabaseError(sound)
    connection.execute("UPDATE starts SET n = n + 1")
    ((generation,),) = connection.execute("SELECT n FROM starts")
    deployments = tuple(
        StoredDeployment(model, json.loads(given), json.loads(facts))
        for model, given, facts in connection.execute("SELECT model, given, facts FROM deployments ORDER BY rowid")
    )
    pins: dict[str, set[str]] = {}
    for model, node in connection.execute("SELECT model, node FROM pins"):
        pins.setdefault(model, set()).add(node)
    workers = frozenset(name for (name,) in connection.execute("SELECT name FROM workers"))
    connection.execute("COMMIT")
    return Found(generation, deployments, pins, workers)


def _delete(connection: sqlite3.Connection, model: str) -> None:
    connection.execute("DELETE FROM deployments WHERE model = ?", (model,))
    connection.execute("DELETE FROM pins WHERE model = ?", (model,))


def _pin(connection: sqlite3.Connection, model: str, rows: list[tuple[str, str]]) -> None:
    connection.execute("DELETE FROM pins WHERE model = ?", (model,))
    connection.executemany("INSERT INTO pins VALUES (?, ?)", rows)


def _why(path: Path, error: Exception) -> str:
    """What is wrong with the file, and what to do about it."""
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return f"scheduler.state: {path} is in use by another scheduler. Stop that one, or name another file."
    if isinstance(error, sqlite3.OperationalError | OSError):
        return f"scheduler.state: cannot use {path}: {error}. Name another file."
    return (
        f"scheduler.state: {path} is damaged, or no file of ours ({error}). It was not changed: put a copy of it back, or move "
        "it away to begin without deployments."
    )
