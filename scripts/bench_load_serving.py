"""The scenarios ``host`` and ``ttft`` of ``bench_load.py``: host memory to a model that is ready, cold files to a first token."""

from __future__ import annotations

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import bench_load_measure as measure
from scripts.bench_load_files import Checkpoints
from scripts.bench_load_measure import Estimate, WrongBytes
from scripts.bench_load_process import ContenderFailed, ContenderProcess, NotInstalled, proportional_memory
from scripts.bench_load_report import Progress, align
from scripts.bench_load_starters import FromPretrained, OursHitOther, Started, Starter

LIMIT = "direct reads"
#: Of the checkpoint's bytes: as for loads.
BACKED = 2.2
_TIMEOUT_S = 600.0
#: The process that has the model, where a second one is looked at.
_DONOR = "another worker"


@dataclass(frozen=True)
class Starts:
    """What one starter did. `settled`: bytes that a second worker process with the same model adds; ``None``: not measured."""

    name: str
    ours: bool
    starts: list[Started]
    added_nbytes: int | None = None

    @property
    def seconds(self) -> Estimate:
        return measure.estimate([start.seconds for start in self.starts])

    @property
    def phases(self) -> dict[str, float]:
        """Medians."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for start in self.starts:
            for phase, seconds in start.phases.items():
                found[phase].append(seconds)
        return {phase: statistics.median(seconds) for phase, seconds in found.items()}

    @property
    def token(self) -> int | None:
        return self.starts[-1].token

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ours": self.ours,
            "seconds": asdict(self.seconds),
            "fastest_s": min(start.seconds for start in self.starts),
            "phases": self.phases,
            "added_nbytes": self.added_nbytes,
            "starts": [asdict(start) for start in self.starts],
        }


@dataclass(frozen=True)
class ServingResult:
    """One scenario with one model."""

    scenario: str
    size: str
    nbytes: int
    starters: list[Starts]
    #: Seconds of direct reads of the same files, one per repeat; none in scenario ``host``.
    limit_s: list[float]
    skipped: dict[str, str]
    failed: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "size": self.size,
            "nbytes": self.nbytes,
            "limit_s": self.limit_s,
            "starters": [starts.as_json() for starts in self.starters],
            "not_installed": self.skipped,
            "failed": self.failed,
        }

    def text(self) -> str:
        """A table, from fast to slow."""
        ordered = sorted(self.starters, key=lambda starts: starts.seconds.median)
        host = self.scenario == "host"
        lines = [["", "median s", "95 %", "min s", "added MB" if host else "x ours", "token", "phases (medians, s)"]]
        fastest_of_ours = min((starts.seconds.median for starts in ordered if starts.ours), default=None)
        if self.limit_s:
            limit = measure.estimate(self.limit_s)
            shown = [f"{limit.median:.3f}", f"{limit.low:.3f}-{limit.high:.3f}", f"{min(self.limit_s):.3f}"]
            lines.append(["direct reads of the files", *shown, "", "", ""])
        for starts in ordered:
            seconds = starts.seconds
            if host:
                extra = "" if starts.added_nbytes is None else f"{starts.added_nbytes / 1e6:.1f}"
            else:
                extra = f"{seconds.median / fastest_of_ours:.2f}" if fastest_of_ours else ""
            lines.append(
                [
                    ("* " if starts.ours else "  ") + starts.name,
                    f"{seconds.median:.3f}",
                    f"{seconds.low:.3f}-{seconds.high:.3f}",
                    f"{min(start.seconds for start in starts.starts):.3f}",
                    extra,
                    "" if starts.token is None else str(starts.token),
                    ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in starts.phases.items()),
                ]
            )
        what = {
            "host": "from host memory to a model that is ready; MB that a second worker process with the model adds",
            "ttft": "from cold files to the first token, process warm",
        }[self.scenario]
        notes = [f"not run: {name}: {reason}" for name, reason in self.skipped.items()]
        notes += [f"FAILED: {name}: {reason}" for name, reason in self.failed.items()]
        return "\n".join([f"{self.size}, {self.nbytes / 1e9:.2f} GB: {what}", align(lines), *notes])


class ServingScenario:
    """One scenario with one model: the processes of its starters, and their turns."""

    def __init__(
        self,
        size: str,
        checkpoints: Checkpoints,
        starters: Sequence[type[Starter]],
        args: argparse.Namespace,
        progress: Progress,
    ) -> None:
        self._size, self._checkpoints, self._args, self._progress = size, checkpoints, args, progress
        self._tiny = Checkpoints(args.work_dir, "tiny", args.shards, progress).directory("safetensors")
        self._starters = {starter.name: starter for starter in starters}
        self._prompt = [token % 256 for token in range(args.prompt_tokens)]
        self._directories: dict[str, Path] = {}
        self._processes: dict[str, ContenderProcess] = {}
        self._starts: dict[str, list[Started]] = {name: [] for name in self._starters}
        self._added: dict[str, int] = {}
        self._skipped: dict[str, str] = {}
        self._failed: dict[str, str] = {}

    def run(self) -> ServingResult:
        source = self._checkpoints.directory("safetensors")
        self._nbytes = sum(path.stat().st_size for path in measure.weights_in(source))
        self._directories["safetensors"] = source
        limit_s: list[float] = []
        with ExitStack() as stack:
            stack.callback(self._close)
            self._progress.stage("starting processes", len(self._starters))
            for name in list(self._starters):
                self._progress.step(name)
                self._attempt(name, self._open)
            if self._args.scenario == "host":
                self._run_host()
            else:
                limit_s = self._run_cold(source)
            self._progress.clear()
            kept = [name for name in self._starters if self._starts[name]]
            self._compare_tokens(kept)
        starters = [Starts(name, self._starters[name].ours, self._starts[name], self._added.get(name)) for name in kept]
        return ServingResult(self._args.scenario, self._size, self._nbytes, starters, limit_s, self._skipped, self._failed)

    # --- processes -----------------------------------------------------------------------------------------------------------

    def _open(self, name: str) -> None:
        starter = self._starters[name]
        if starter.format not in self._directories:
            self._directories[starter.format] = self._checkpoints.directory(starter.format)
        self._processes[name] = self._process(name, starter, self._pool(name))
        if starter is OursHitOther:
            # The worker that brings the checkpoint, and stays, so that the shared memory does.
            donor = self._processes[_DONOR] = self._process(_DONOR, starter, self._pool(name))
            donor.call("warm", self._directories[starter.format], timeout_s=_TIMEOUT_S)

    def _process(self, name: str, starter: type[Starter], pool: str) -> ContenderProcess:
        return ContenderProcess(starter, self._tiny, pool, env={}, log=self._checkpoints.log(name))

    def _pool(self, name: str) -> str:
        """A host memory of its own for each of ours, so that none finds what another has read."""
        number = list(self._starts).index(name) if name in self._starts else len(self._starts)
        return f"bench-{os.getpid()}-{number}"

    def _attempt(self, name: str, function: Any) -> None:
        """Call `function` with `name`; a starter that fails is out, and named."""
        try:
            function(name)
        except NotInstalled as error:
            self._skipped[name] = str(error)
        except ContenderFailed as error:
            self._failed[name] = str(error)
        else:
            return
        del self._starters[name]
        process = self._processes.pop(name, None)
        if process is not None:
            process.close()
        self._progress.say(f"{'not run' if name in self._skipped else 'failed'}: {name}: {(self._skipped | self._failed)[name]}")

    def _close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _call(self, name: str, method: str, *arguments: Any) -> Any:
        return self._processes[name].call(method, *arguments, timeout_s=_TIMEOUT_S)

    # --- from cold files -----------------------------------------------------------------------------------------------------

    def _run_cold(self, source: Path) -> list[float]:
        self._progress.stage("finding the direct-read limit", len(measure.LIMIT_SETTINGS) * self._args.tries)
        setting = measure.find_limit(source, self._args.tries, self._start_cold, self._progress.step)
        limit_s = []
        self._progress.stage("starting models", self._args.repeats * (len(self._starters) + 1))
        for repeat, name in measure.turns([LIMIT, *self._starters], self._args.repeats, self._args.seed):
            self._progress.step(f"repeat {repeat + 1} of {self._args.repeats}: {name}")
            if name == LIMIT:
                limit_s.append(measure.limit_seconds(source, setting, self._start_cold))
            elif name in self._starters:
                self._attempt(name, self._start)
        return limit_s

    def _start_cold(self) -> None:
        measure.start_cold(self._directories.values(), int(BACKED * self._nbytes))

    def _start(self, name: str) -> None:
        directory = self._directories[self._starters[name].format]
        self._call(name, "forget", directory)
        self._start_cold()
        self._starts[name].append(self._call(name, "first_token", directory, self._prompt))
        # Mapped files cannot be dropped from the page cache.
        self._call(name, "forget", directory)

    # --- from host memory ----------------------------------------------------------------------------------------------------

    def _run_host(self) -> None:
        self._progress.stage("making models ready", self._args.repeats * len(self._starters))
        for repeat, name in measure.turns(list(self._starters), self._args.repeats, self._args.seed):
            self._progress.step(f"repeat {repeat + 1} of {self._args.repeats}: {name}")
            if name in self._starters:
                self._attempt(name, self._make_ready)
        self._progress.stage("measuring what a second process adds", 2)
        for name in (OursHitOther.name, FromPretrained.name):
            if name in self._starters:
                self._progress.step(name)
                self._attempt(name, self._measure_second)

    def _make_ready(self, name: str) -> None:
        directory = self._directories[self._starters[name].format]
        if self._starters[name] is OursHitOther:
            self._call(name, "reopen")
        else:
            self._call(name, "warm", directory)
        started: Started = self._call(name, "ready", directory)
        token = self._call(name, "answer", self._prompt)
        self._starts[name].append(Started(started.seconds, started.phases, token))
        self._call(name, "unload")

    def _measure_second(self, name: str) -> None:
        """Bytes of memory that all processes have more when a second one has the model ready, too, over what it had before."""
        directory = self._directories[self._starters[name].format]
        if self._starters[name] is OursHitOther:
            first = self._processes[_DONOR]
        else:
            first = self._processes[_DONOR] = self._process(_DONOR, self._starters[name], self._pool(_DONOR))
        second = self._processes[name]
        pids = [first.pid, second.pid]
        if self._starters[name].ours:
            pids.append(second.call("keeper_pid", timeout_s=_TIMEOUT_S))

        def use(process: ContenderProcess) -> None:
            process.call("warm", directory, timeout_s=_TIMEOUT_S)
            process.call("ready", directory, timeout_s=_TIMEOUT_S)
            process.call("answer", self._prompt, timeout_s=_TIMEOUT_S)

        # What the first answer of a process leaves behind belongs to the process, not to the model.
        for process in (first, second):
            use(process)
            process.call("unload", timeout_s=_TIMEOUT_S)
        use(first)
        before = _total_memory(pids)
        use(second)
        self._added[name] = _total_memory(pids) - before
        for process in (first, second):
            process.call("unload", timeout_s=_TIMEOUT_S)

    # --- the answers ---------------------------------------------------------------------------------------------------------

    def _compare_tokens(self, names: Iterable[str]) -> None:
        """Raises :class:`WrongBytes` where ours do not all begin with the same token: they run the same weights."""
        tokens = {start.token: name for name in names if self._starters[name].ours for start in self._starts[name]}
        if len(tokens) > 1:
            raise WrongBytes("first tokens differ: " + ", ".join(f"{token} of {name}" for token, name in tokens.items()))


def _total_memory(pids: Iterable[int]) -> int:
    return sum(proportional_memory(pid) for pid in pids)
