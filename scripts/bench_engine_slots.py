"""``bench_engine.py``, scenarios ``instances`` and ``swap``: two engines on two cores, and two models on one slot."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench_engine_contenders import OurEngine, engine_settings
from scripts.bench_engine_measure import Ran, Work, make_work, percentile
from scripts.bench_engine_model import checkpoint, load_tensors, n_vocab
from scripts.bench_engine_run import OurVariant, Scenario, environment
from scripts.bench_load_measure import estimate, estimate_ratio, turns
from scripts.bench_load_process import ContenderFailed, ContenderProcess, NotInstalled
from scripts.bench_load_report import align

#: Streams of each engine, where two share the machine.
_N_STREAMS = 8
#: Tokens of all streams together that a model gives before it makes room for the other.
_QUANTUM = 16


class Instances(Scenario):
    """One engine alone, and two at a time, for one and two threads of each; all four take turns."""

    def run(self) -> None:
        for model in self.args.models:
            for dtype in self.args.dtypes:
                for one in self.chosen:
                    self._measure(model, dtype, one, checkpoint(self.args.work_dir, model, dtype, self.args.seed))

    def _measure(self, model: str, dtype: str, one: OurVariant, directory: Path) -> None:
        args = self.args
        work = make_work(_N_STREAMS, n_vocab(model), "uniform", args.prompt_tokens, args.new_tokens, args.seed)
        with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
            pairs: dict[int, list[ContenderProcess]] = {}
            for n_threads in (1, 2):
                pairs[n_threads] = []
                for _ in range(2):
                    try:
                        process = ContenderProcess(
                            OurEngine, directory, "cpu", n_threads, one.settings, env=environment(n_threads), log=self.log
                        )
                    except (NotInstalled, ContenderFailed) as error:
                        self.fail(one.name, str(error))
                        return
                    stack.callback(process.close)
                    pairs[n_threads].append(process)
            ran: dict[str, list[float]] = {}
            cases = {f"{n} x {n_threads} threads": (n, n_threads) for n_threads in (1, 2) for n in (1, 2)}
            self.progress.stage(f"{model} {dtype}", (args.repeats + 1) * len(cases))
            for repeat, name in [(-1, name) for name in cases] + list(turns(list(cases), args.repeats, args.seed)):
                self.progress.step(name)
                n, n_threads = cases[name]
                started = time.perf_counter()
                try:
                    done: list[Ran] = list(
                        pool.map(lambda process: process.call("run", work, timeout_s=args.timeout), pairs[n_threads][:n])
                    )
                except ContenderFailed as error:
                    self.fail(f"{one.name}, {name}", str(error))
                    return
                if repeat >= 0:
                    rate = sum(each.n_tokens for each in done) / (time.perf_counter() - started)
                    ran.setdefault(name, []).append(rate)
        lines: list[tuple[str, ...]] = [("", "tokens/s", "over one with as many threads", "over one with one thread")]
        results = {}
        for name, (_, n_threads) in cases.items():
            same, single = (estimate_ratio(ran[name], ran[f"1 x {threads} threads"]) for threads in (n_threads, 1))
            results[name] = {
                "tokens_per_s": asdict(estimate(ran[name])),
                "ratio_to_one": asdict(same),
                "ratio_to_one_thread": asdict(single),
                "turns": ran[name],
            }
            cells = (f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in (same, single))
            lines.append((f"* {one.name}, {name}", f"{statistics.median(ran[name]):.1f}", *cells))
        about = {"model": model, "dtype": dtype, "contender": one.name, "streams_each": _N_STREAMS, "instances": results}
        self.add(about, f"{model} {dtype}, {_N_STREAMS} streams for each engine\n{align(lines)}")


class Swapped:
    """Two models that take turns in one process, in the midst of their answers."""

    def __init__(self, directories: list[Path], device: str, n_threads: int, settings: dict[str, Any]) -> None:
        from sllmdask.engine.construct import build_skeleton
        from sllmdask.engine.engine import LLMEngine, build_engine

        self._tensors = [load_tensors(directory) for directory in directories]
        # The pages of the mapping are there, as they are in the host tier.
        for tensors in self._tensors:
            for tensor in tensors.values():
                tensor.view(-1)[::1024].float().sum()
        made = engine_settings(device, n_threads, settings)
        skeletons = [build_skeleton(directory) for directory in directories]
        self._build = [
            partial(build_engine, directory, tensors, made, skeleton=skeleton)
            for directory, tensors, skeleton in zip(directories, self._tensors, skeletons, strict=True)
        ]
        #: How one makes room: its requests are parked, or it is closed and they are computed again.
        self.way = "park" if hasattr(LLMEngine, "park_all") else "rebuild"
        self._loops = [_Side(build, self.way) for build in self._build]

    def alone(self, work: Work) -> list[list[list[int]]]:
        """The answers of each model, when it has the slot until it is done."""
        answers = []
        for side in self._loops:
            side.enter()
            side.submit(work)
            while side.left:
                side.advance(_QUANTUM)
            side.leave()
            answers.append(side.answers())
        return answers

    def swapped(self, work: Work) -> dict[str, Any]:
        """The answers, when they take turns after some tokens, and the seconds of each swap: no step ran in them."""
        pauses: list[float] = []
        steps: list[float] = []
        for side in self._loops:
            side.submit(work)
        here = self._loops[0]
        here.enter()
        while True:
            steps += here.advance(_QUANTUM)
            other = self._loops[1 - self._loops.index(here)]
            if not other.left:
                if not here.left:
                    break
                continue
            started = time.perf_counter()
            here.leave()
            other.enter()
            pauses.append(time.perf_counter() - started)
            here = other
        here.leave()
        return {"answers": [side.answers() for side in self._loops], "pauses": pauses, "steps": steps, "way": self.way}

    def close(self) -> None:
        for side in self._loops:
            side.close()


class _Side:
    """One of two models. Its engine thread is stopped between two steps when it does not have the slot."""

    def __init__(self, build: Any, way: str) -> None:
        self._build, self._way = build, way
        self._engine: Any = build() if way == "park" else None
        if self._engine is not None:
            self._engine.park_all()
        self._sequences: list[Any] = []

    @property
    def left(self) -> bool:
        return any(sequence.finish_reason is None for sequence in self._sequences)

    def submit(self, work: Work) -> None:
        from sllmdask.batching.params import SamplingParams
        from sllmdask.batching.sequence import Sequence

        self._sequences = [
            Sequence(str(i), list(prompt), SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))
            for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True))
        ]
        if self._engine is not None:
            for sequence in self._sequences:
                self._engine.add(sequence)

    def enter(self) -> None:
        from sllmdask.batching.sequence import Sequence

        if self._way == "park":
            self._engine.resume_all()
            return
        self._engine = self._build()
        for i, old in enumerate(self._sequences):
            if old.finish_reason is None:
                self._sequences[i] = Sequence(old.request_id, old.prompt_ids, old.params, output_ids=list(old.output_ids))
                self._engine.add(self._sequences[i])

    def leave(self) -> None:
        if self._way == "park":
            self._engine.park_all()
            return
        # Closing ends the requests for the engine; for us they go on.
        kept = [sequence.finish_reason for sequence in self._sequences]
        self._engine.close()
        self._engine = None
        for sequence, reason in zip(self._sequences, kept, strict=True):
            sequence.finish_reason = reason

    def advance(self, n_tokens: int) -> list[float]:
        """Steps until they have given `n_tokens`, or all is done; seconds of each step."""
        seconds = []
        while n_tokens > 0 and self.left:
            started = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - started)
            for output in outputs:
                if output.error:
                    raise output.error
            n_tokens -= len(outputs)
        return seconds

    def answers(self) -> list[list[int]]:
        return [list(sequence.output_ids) for sequence in self._sequences]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


class Swap(Scenario):
    """The engines are stepped by hand, so that a swap falls between two steps and its seconds hold nothing else."""

    def run(self) -> None:
        for model in self.args.models:
            for dtype in self.args.dtypes:
                directories = [checkpoint(self.args.work_dir, model, dtype, self.args.seed + i) for i in range(2)]
                for one in self.chosen:
                    self._measure(model, dtype, one, directories)

    def _measure(self, model: str, dtype: str, one: OurVariant, directories: list[Path]) -> None:
        args = self.args
        work = make_work(4, n_vocab(model), "uniform", args.prompt_tokens, args.new_tokens, args.seed)
        with ExitStack() as stack:
            self.progress.stage(f"{model} {dtype}: {one.name}", args.repeats + 1)
            process = self.start(stack, one.name, Swapped, directories, args.device, args.threads, one.settings)
            if process is None:
                return
            expected = self.ask(one.name, process, "alone", work)
            found: list[dict[str, Any]] = []
            for repeat in range(-1, args.repeats):
                self.progress.step("a turn")
                turn = self.ask(one.name, process, "swapped", work)
                if turn is None:
                    return
                if repeat >= 0:
                    found.append(turn)
        answers = [
            mine == other
            for turn in found
            for ours, theirs in zip(turn.pop("answers"), expected, strict=True)
            for mine, other in zip(ours, theirs, strict=True)
        ]
        pauses = [pause for turn in found for pause in turn["pauses"]]
        pause = estimate(pauses)
        step = statistics.median(seconds for turn in found for seconds in turn["steps"])
        lines: list[tuple[str, ...]] = [
            ("", "way", "swaps", "pause p50 ms", "95 %", "p99 ms", "worst ms", "step ms", "answers as unswapped"),
            (
                f"* {one.name}",
                found[0]["way"],
                str(len(pauses)),
                f"{1e3 * pause.median:.2f}",
                f"{1e3 * pause.low:.2f}-{1e3 * pause.high:.2f}",
                f"{1e3 * percentile(pauses, 0.99):.2f}",
                f"{1e3 * max(pauses):.2f}",
                f"{1e3 * step:.1f}",
                f"{sum(answers)} of {len(answers)}",
            ),
        ]
        result = {
            "model": model,
            "dtype": dtype,
            "contender": one.name,
            "way": found[0]["way"],
            "pause_s": asdict(pause),
            "pause_p99_s": percentile(pauses, 0.99),
            "step_s": step,
            "n_answers": len(answers),
            "n_same_answers": sum(answers),
            "turns": found,
        }
        self.add(result, f"{model} {dtype}: two models on one slot, a swap after each {_QUANTUM} tokens\n{align(lines)}")
