"""What the scenarios of ``bench_engine.py`` have in common: variants of the engine, processes, results, who failed and why."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench_load_measure import BenchError
from scripts.bench_load_process import ContenderFailed, ContenderProcess, NotInstalled
from scripts.bench_load_report import Panel, Progress


@dataclass(frozen=True)
class Variant:
    """Our engine with these settings; none: as it is by default."""

    settings: dict[str, Any] = field(default_factory=dict)

    def name(self, who: str) -> str:
        return f"{who} ({', '.join(f'{key}={value}' for key, value in self.settings.items())})" if self.settings else who


@dataclass(frozen=True)
class OurVariant:
    """A contender in a scenario where all are ours."""

    name: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, variant: Variant) -> OurVariant:
        return cls(variant.name("sllmdask"), variant.settings)


def parse_variant(pairs: Sequence[str]) -> Variant:
    """``engine.key=value`` pairs. Raises :class:`BenchError`. What the engine thinks of them, it says when it is built."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        section, _, name = key.rpartition(".")
        if not equals or not name or section not in ("", "engine"):
            raise BenchError(f"--set {pair}: it takes engine.KEY=VALUE")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return Variant(settings)


class Scenario:
    """Collects what is measured, and names who could not be. Subclasses measure, in :meth:`run`."""

    def __init__(self, args: argparse.Namespace, chosen: list[Any], progress: Progress, log: Path) -> None:
        self.args, self.chosen, self.progress, self.log = args, chosen, progress, log
        self.results: list[dict[str, Any]] = []
        self.panels: list[Panel] = []
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        raise NotImplementedError

    def add(self, result: dict[str, Any], text: str, panel: Panel | None = None) -> None:
        self.say(text)
        self.results.append(result)
        if panel is not None:
            self.panels.append(panel)

    def say(self, text: str) -> None:
        self.progress.clear()
        print("\n" + text, flush=True)

    def fail(self, name: str, reason: str) -> None:
        """Goes on without `name`."""
        # Where somebody keeps files is nobody's business.
        for path, word in (
            (str(self.args.work_dir), "WORK-DIR"),
            (str(Path(__file__).resolve().parent.parent), "."),
            (str(Path.home()), "~"),
        ):
            reason = reason.replace(path, word)
        self.failed[name] = reason
        self.progress.say(f"not run: {name}: {reason}")

    def start(self, stack: ExitStack, name: str, make: Callable[..., Any], *arguments: Any) -> ContenderProcess | None:
        """`make(*arguments)` in a process that ends with `stack`; ``None``, and its reason is noted, if that fails."""
        try:
            process = ContenderProcess(make, *arguments, env=environment(self.args.threads), log=self.log)
        except (NotInstalled, ContenderFailed) as error:
            self.fail(name, str(error))
            return None
        stack.callback(process.close)
        return process

    def ask(self, name: str, process: ContenderProcess, method: str, *arguments: Any) -> Any:
        """What the method returns; ``None``, and its reason is noted, if it fails."""
        try:
            return process.call(method, *arguments, timeout_s=self.args.timeout)
        except ContenderFailed as error:
            self.fail(name, str(error))
            return None


def environment(n_threads: int) -> dict[str, str]:
    """Read when torch is imported, so before anything else: threads that wait must not spin."""
    threads = str(n_threads)
    root = str(Path(__file__).resolve().parent.parent)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }


def ratio_cell(of: dict[str, float] | None) -> str:
    return f"{of['median']:.2f} ({of['low']:.2f}-{of['high']:.2f})" if of else "1" if of is None else ""
