"""The scenario ``load`` of ``bench_load.py``: cold files to resident tensors, all contenders, repeat by repeat."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import bench_load_measure as measure
from scripts.bench_load_contenders import CONTENDERS, Contender, Load, Loading, Setting, pinned_copy_rate
from scripts.bench_load_files import Checkpoints, in_process
from scripts.bench_load_measure import MIB, BenchError, Truth, WrongBytes
from scripts.bench_load_process import ContenderFailed, ContenderProcess, NotInstalled
from scripts.bench_load_report import Progress, Row

#: The format whose files are read for the limit of contenders of another one: of their own, but for those that are smaller.
LIMIT_OF = {"split16": "safetensors"}
#: Of the checkpoint's bytes: how much memory is taken and given back before a load. A mapping, a copy of it, and some more.
BACKED = 2.2


@dataclass(frozen=True)
class LoadResult:
    """Everything that was measured. `loads` has one list per contender, `limits_s` one figure per repeat, by format."""

    size: str
    truth: Truth
    limits_s: dict[str, list[float]]
    limit_setting: tuple[int, int]
    copy_bytes_per_s: dict[str, float]
    loads: dict[str, list[Load]]
    settings: dict[str, str]
    tried: dict[str, dict[str, list[float]]]
    backing_s: list[float]
    skipped: dict[str, str]
    failed: dict[str, str]
    wall_s: float

    @property
    def limit_s(self) -> list[float]:
        """Direct reads of the safetensors files."""
        return self.limits_s["safetensors"]

    def rows(self) -> list[Row]:
        contenders = {contender.name: contender for contender in CONTENDERS}
        return [self._row(contenders[name], loads) for name, loads in self.loads.items()]

    def _row(self, contender: type[Contender], loads: list[Load]) -> Row:
        name, ours, seconds = contender.name, contender.ours, [load.seconds for load in loads]
        return Row(
            name=name,
            setting=self.settings[name],
            ours=ours,
            n_loads=len(loads),
            seconds=measure.estimate(seconds),
            ratio=measure.estimate_ratio(seconds, self.limits_s[_limit_of(contender)]),
            fastest_s=min(seconds),
            cpu_s=statistics.median(load.cpu_s for load in loads),
            bytes_per_s=self.truth.nbytes / statistics.median(seconds),
            peak=max(load.peak_nbytes for load in loads) / self.truth.nbytes,
            private=statistics.median(load.private_nbytes for load in loads) / self.truth.nbytes,
        )

    def as_json(self) -> dict[str, Any]:
        n_threads, chunk = self.limit_setting
        limit = measure.estimate(self.limit_s)
        return {
            "scenario": "load",
            "checkpoint": {"size": self.size, "nbytes": self.truth.nbytes, "tensors": len(self.truth.digests)},
            "limit": {
                "seconds": self.limits_s,
                "threads": n_threads,
                "chunk": chunk,
                "median": asdict(limit),
                "medians": {name: statistics.median(seconds) for name, seconds in self.limits_s.items()},
                "bytes_per_s": self.truth.nbytes / limit.median,
                "copy_bytes_per_s": self.copy_bytes_per_s,
            },
            "summary": [asdict(row) for row in sorted(self.rows(), key=lambda row: row.seconds.median)],
            "loads": {name: [asdict(load) for load in loads] for name, loads in self.loads.items()},
            "tried_settings": self.tried,
            "backing_s": self.backing_s,
            "not_installed": self.skipped,
            "failed": self.failed,
            "wall_s": self.wall_s,
        }


class LoadScenario:
    """Cold files to resident tensors, all contenders, repeat by repeat."""

    def __init__(
        self,
        size: str,
        checkpoints: Checkpoints,
        contenders: Sequence[type[Contender]],
        args: argparse.Namespace,
        progress: Progress,
    ) -> None:
        self._size, self._checkpoints, self._args, self._progress = size, checkpoints, args, progress
        self._skipped = {
            contender.name: self._elsewhere(contender) for contender in contenders if args.device not in contender.devices
        }
        self._contenders = {contender.name: contender for contender in contenders if args.device in contender.devices}
        self._failed: dict[str, str] = {}
        self._directories: dict[str, Path] = {}
        self._processes: dict[str, ContenderProcess] = {}
        self._settings: dict[str, Setting] = {}
        self._tried: dict[str, dict[str, list[float]]] = {}
        self._backing_s: list[float] = []

    def run(self) -> LoadResult:
        started = time.perf_counter()
        source = self._checkpoints.directory("safetensors")
        self._progress.stage("reading what the bytes must be")
        self._truth = measure.read_truth(source)
        self._names = list(self._truth.digests)
        if not measure.supports_direct_reads(measure.weights_in(source)[0]):
            raise BenchError(f"the file system of {source} has no direct reads, so there is no limit to compare with")
        self._make_formats()
        with ExitStack() as stack:
            self._progress.stage("trying settings and comparing every byte", self._n_tries())
            for name in list(self._contenders):
                self._start(name)
            stack.callback(self._close)
            self._progress.stage("finding the direct-read limit", len(measure.LIMIT_SETTINGS) * self._args.tries)
            limit_setting = measure.find_limit(source, self._args.tries, self._start_cold, self._progress.step)
            limits_s, loads = self._repeat(limit_setting)
        self._progress.stage("measuring memory copies")
        n_cores = len(os.sched_getaffinity(0))
        size = min(1024 * MIB, measure.available_memory() // 4)
        rates = {f"{n} threads": measure.copy_rate(size, n) for n in sorted({1, n_cores})}
        if self._args.device == "cuda":
            rates["pinned copies to the device"] = in_process(pinned_copy_rate, size)
        settings = {name: self._settings[name].name for name in loads}
        wall_s = time.perf_counter() - started
        return LoadResult(
            self._size,
            self._truth,
            limits_s,
            limit_setting,
            rates,
            loads,
            settings,
            self._tried,
            self._backing_s,
            self._skipped,
            self._failed,
            wall_s,
        )

    @staticmethod
    def _elsewhere(contender: type[Contender]) -> str:
        return f"it loads to {' and '.join(contender.devices)} only"

    def _make_formats(self) -> None:
        reasons: dict[str, str] = {}
        for name, contender in list(self._contenders.items()):
            if contender.format not in self._directories and contender.format not in reasons:
                try:
                    self._directories[contender.format] = self._checkpoints.directory(contender.format)
                except NotInstalled as error:
                    reasons[contender.format] = str(error)
            if contender.format in reasons:
                self._skip(name, reasons[contender.format])

    def _skip(self, name: str, reason: str) -> None:
        del self._contenders[name]
        self._skipped[name] = reason
        self._progress.say(f"not run: {name}: {reason}")

    def _fail(self, name: str, reason: str) -> None:
        self._contenders.pop(name, None)
        process = self._processes.pop(name, None)
        if process is not None:
            process.close()
        self._failed[name] = reason
        self._progress.say(f"failed: {name}: {reason}")

    # --- before the repeats --------------------------------------------------------------------------------------------------

    def _n_tries(self) -> int:
        numbers = [len(self._settings_of(contender)) for contender in self._contenders.values()]
        return len(numbers) + sum(n for n in numbers if n > 1)

    def _settings_of(self, contender: type[Contender]) -> tuple[Setting, ...]:
        return contender.settings[:2] if self._args.quick else contender.settings

    def _start(self, name: str) -> None:
        """Start the process of a contender with its best setting, and compare every byte of one load."""
        try:
            setting = self._best_setting(name)
            self._progress.step(name)
            process = self._processes[name] = self._process(name, setting)
            self._settings[name] = setting
            self._load(name, process, with_digests=True)
        except NotInstalled as error:
            self._skip(name, str(error))
        except ContenderFailed as error:
            self._fail(name, str(error))

    def _process(self, name: str, setting: Setting) -> ContenderProcess:
        log = self._checkpoints.log(name)
        return ContenderProcess(Loading, self._contenders[name], setting, self._args.device, env=dict(setting.env), log=log)

    def _best_setting(self, name: str) -> Setting:
        contender = self._contenders[name]
        settings = self._settings_of(contender)
        if len(settings) == 1:
            return settings[0]
        seconds: dict[str, list[float]] = {}
        failure: ContenderFailed | None = None
        for setting in settings:
            self._progress.step(f"{name}, {setting.name}")
            process = self._process(name, setting)
            try:
                # The first load of a process is for warming up.
                loads = [self._load(name, process) for _ in range(self._args.tries + 1)]
            except ContenderFailed as error:
                failure = error
            else:
                seconds[setting.name] = [load.seconds for load in loads[1:]]
            finally:
                process.close()
        self._tried[name] = seconds
        if not seconds:
            assert failure is not None
            raise failure
        best = min(seconds, key=lambda setting: statistics.median(seconds[setting]))
        return next(setting for setting in settings if setting.name == best)

    # --- one load ------------------------------------------------------------------------------------------------------------

    def _start_cold(self) -> None:
        nbytes = int(BACKED * self._truth.nbytes)
        self._backing_s.append(measure.start_cold(self._directories.values(), nbytes))

    def _load(self, name: str, process: ContenderProcess, *, with_digests: bool = False) -> Load:
        """One cold load, checked. Raises :class:`ContenderFailed` and, for wrong bytes, :class:`WrongBytes`."""
        directory = self._directories[self._contenders[name].format]
        self._start_cold()
        timeout_s = 120 + 60 * self._truth.nbytes / 1e9
        load: Load = process.call("load", directory, self._names, with_digests, timeout_s=timeout_s)
        check_bytes(name, load, self._truth)
        return load

    def _repeat(self, limit_setting: tuple[int, int]) -> tuple[dict[str, list[float]], dict[str, list[Load]]]:
        formats = dict.fromkeys(["safetensors", *map(_limit_of, self._contenders.values())])
        limits = {f"direct reads, {name}": name for name in formats}
        names = [*limits, *self._contenders]
        limits_s: dict[str, list[float]] = {name: [] for name in formats}
        loads: dict[str, list[Load]] = {name: [] for name in self._contenders}
        self._progress.stage("loading", self._args.repeats * len(names))
        for repeat, name in measure.turns(names, self._args.repeats, self._args.seed):
            self._progress.step(f"repeat {repeat + 1} of {self._args.repeats}: {name}")
            if name in limits:
                directory = self._checkpoints.directory(limits[name])
                limits_s[limits[name]].append(measure.limit_seconds(directory, limit_setting, self._start_cold))
            elif name in self._contenders:
                try:
                    loads[name].append(self._load(name, self._processes[name]))
                except ContenderFailed as error:
                    self._fail(name, str(error))
        # Ratios pair the loads of a repeat: who missed one has none.
        return limits_s, {name: found for name, found in loads.items() if name in self._contenders}

    def _close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()


def _limit_of(contender: type[Contender]) -> str:
    return LIMIT_OF.get(contender.format, contender.format)


def check_bytes(name: str, load: Load, truth: Truth) -> None:
    """Raises :class:`WrongBytes` where `load` differs from `truth`."""
    if load.digests is not None:
        wrong = [tensor for tensor, digest in truth.digests.items() if load.digests.get(tensor) != digest]
        if wrong:
            raise WrongBytes(f"{name} gave wrong bytes for {len(wrong)} of {len(truth.digests)} tensors, {wrong[0]!r} first")
    if load.touch_sum != truth.touch_sum:
        raise WrongBytes(f"{name} gave wrong bytes: its pages sum up to {load.touch_sum} and not to {truth.touch_sum}")
