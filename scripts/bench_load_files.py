"""The checkpoint that ``bench_load.py`` loads, in every format: made at first use, kept in the work directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scripts import bench_load_measure as measure
from scripts.bench_load_contenders import FORMATS
from scripts.bench_load_measure import BenchError
from scripts.bench_load_process import NotInstalled
from scripts.bench_load_report import Progress
from scripts.make_checkpoint import SHAPES, make_checkpoint


class Checkpoints:
    """One checkpoint in the work directory, in all formats: made at first use, kept."""

    def __init__(self, work_dir: Path, size: str, n_shards: int, progress: Progress) -> None:
        self._home = work_dir / f"{size}-{n_shards}-shards"
        self._shape, self._n_shards, self._progress = SHAPES[size], n_shards, progress
        file_system = measure.disk_of(work_dir).get("fstype")
        if file_system in ("tmpfs", "ramfs"):
            raise BenchError(f"--work-dir {work_dir} is on {file_system}: nothing there is ever cold")

    def log(self, name: str) -> Path:
        """Where the process of contender `name` writes what it has to say."""
        directory = self._home.parent / "logs"
        directory.mkdir(exist_ok=True)
        return directory / ("".join(letter if letter.isalnum() else "-" for letter in name) + ".log")

    def directory(self, format_: str) -> Path:
        """The checkpoint in `format_`. Raises :class:`NotInstalled` where what makes the format is not there."""
        directory = self._home / format_
        if directory.is_dir():
            return directory
        free = shutil.disk_usage(self._home.parent).free
        if free < 1.2 * self._shape.nbytes:
            raise BenchError(
                f"{self._home.parent} has {free / 1e9:.1f} GB free; {format_} needs {1.2 * self._shape.nbytes / 1e9:.1f}"
            )
        self._progress.stage(f"writing {directory}")
        if format_ == "safetensors":
            in_process(make_checkpoint, directory, self._shape, self._n_shards, 0)
        else:
            in_process(_convert, format_, self.directory("safetensors"), directory)
        return directory


def _convert(format_: str, source: Path, target: Path) -> None:
    """Write `target` whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    FORMATS[format_](source, partial)
    for path in measure.files_in(partial):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(target)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a process of its own: what it imports and allocates is gone when it returns."""
    with get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(function, arguments)
        except ImportError as error:
            raise NotInstalled(f"{type(error).__name__}: {error}") from None
