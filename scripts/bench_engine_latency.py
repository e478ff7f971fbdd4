"""``bench_engine.py``, scenarios ``latency`` and ``prefix``: what a long prompt costs its neighbours, and its successors."""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.bench_engine_clock import StepClock
from scripts.bench_engine_contenders import OurEngine
from scripts.bench_engine_measure import Work, percentile
from scripts.bench_engine_model import checkpoint, n_vocab
from scripts.bench_engine_run import Scenario
from scripts.bench_load_measure import estimate, estimate_ratio, turns
from scripts.bench_load_process import ContenderFailed, ContenderProcess
from scripts.bench_load_report import align

#: Streams that decode, and long prompts that come while they do; tokens that the first stream gets before the next one comes.
_N_DECODING, _N_LONG, _SPACING = 8, 4, 12


class Stall:
    """Decoding streams beside long prompts, in one process."""

    def __init__(self, directory: Path, device: str, n_threads: int, settings: dict[str, Any]) -> None:
        self._engine = OurEngine(directory, device, n_threads, settings, watch=StepClock)

    def run(self, decoding: list[list[int]], arriving: list[list[int]]) -> dict[str, Any]:
        """Seconds between tokens of the streams while `arriving` come, and before; seconds to each arrival's first token."""
        engine, clock = self._engine, self._engine.watched
        clock.steps = []
        left = list(arriving)
        asked: dict[str, float] = {}
        running = [str(i) for i in range(len(decoding))]

        def on_token(output: Any) -> None:
            name = output.request_id
            if name == "0" and not output.final and output.index % _SPACING == _SPACING - 1 and left:
                asked[f"long-{len(left)}"] = time.perf_counter()
                engine.submit(f"long-{len(left)}", left.pop(), 1)
            if not left and asked and all(engine.times[long] for long in asked):
                # The last long prompt is done: so is the measurement.
                for stream in running:
                    engine.thread.abort(stream)
                running.clear()

        # Enough tokens that no stream ends before the last long prompt has: each takes some steps of the smallest budget.
        length = 2048
        engine.answer(Work(decoding, [length] * len(decoding)), on_token)
        first = min(asked.values())
        gaps, quiet = [], []
        for i in range(len(decoding)):
            times = engine.times[str(i)]
            for before, after in pairwise(times):
                (gaps if after > first else quiet).append(after - before)
        overhead = sum(step["scheduling"] + step["sampling"] for step in clock.steps) / sum(step["step"] for step in clock.steps)
        ttft = [engine.times[name][0] - when for name, when in asked.items()]
        # Hundredths of a millisecond are enough for the record, and half its size.
        gaps, quiet, ttft = ([round(seconds, 5) for seconds in each] for each in (gaps, quiet, ttft))
        return {"gaps": gaps, "quiet": quiet, "ttft": ttft, "scheduling_and_sampling": overhead}

    def close(self) -> None:
        self._engine.close()


class Latency(Scenario):
    """Each variant with each budget is a contender."""

    def run(self) -> None:
        args = self.args
        uncut = _N_DECODING + args.long_prompt * _N_LONG
        for model in args.models:
            for dtype in args.dtypes:
                directory = checkpoint(args.work_dir, model, dtype, args.seed)
                with ExitStack() as stack:
                    processes: dict[str, ContenderProcess] = {}
                    for one in self.chosen:
                        bounds = {f", {budget} tokens": {"prefill_beside_decode": budget} for budget in args.budgets}
                        bounds[", uncut"] = {"prefill_beside_decode": uncut, "max_batch_tokens": uncut}
                        for label, bound in {"": {}, **bounds}.items():
                            name = one.name + label
                            settings = bound | one.settings
                            process = self.start(stack, name, Stall, directory, args.device, args.threads, settings)
                            if process is not None:
                                processes[name] = process
                    self._measure(model, dtype, processes)

    def _measure(self, model: str, dtype: str, processes: dict[str, ContenderProcess]) -> None:
        args, rng = self.args, random.Random(self.args.seed)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        self.progress.stage(f"{model} {dtype}", len(processes) * (args.repeats + 1))
        for repeat, name in [(-1, name) for name in processes] + list(turns(list(processes), args.repeats, args.seed)):
            if name not in processes:
                continue
            self.progress.step(name)
            decoding = [_prompt(rng, model, rng.randint(*args.prompt_tokens)) for _ in range(_N_DECODING)]
            arriving = [_prompt(rng, model, args.long_prompt) for _ in range(_N_LONG)]
            try:
                turn = processes[name].call("run", decoding, arriving, timeout_s=args.timeout)
            except ContenderFailed as error:
                self.fail(name, str(error))
                del processes[name], found[name]
                continue
            if repeat >= 0:
                found[name].append(turn)
        lines: list[tuple[str, ...]] = [
            ("", "p50 ms", "p99 ms", "worst ms", "p99/p50", "95 %", "alone p50 ms", "long TTFT ms", "scheduling+sampling")
        ]
        for name, of in found.items():
            p50, p99 = ([percentile(turn["gaps"], share) for turn in of] for share in (0.5, 0.99))
            ratio = estimate_ratio(p99, p50)
            result = {
                "model": model,
                "dtype": dtype,
                "contender": name,
                "p50_s": asdict(estimate(p50)),
                "p99_s": asdict(estimate(p99)),
                "worst_s": max(max(turn["gaps"]) for turn in of),
                "p99_over_p50": asdict(ratio),
                "alone_p50_s": statistics.median(gap for turn in of for gap in turn["quiet"]),
                "long_ttft_s": statistics.median(seconds for turn in of for seconds in turn["ttft"]),
                "scheduling_and_sampling": statistics.median(turn["scheduling_and_sampling"] for turn in of),
                "turns": of,
            }
            self.results.append(result)
            lines.append(
                (
                    f"* {name}",
                    *(f"{1e3 * statistics.median(values):.1f}" for values in (p50, p99)),
                    f"{1e3 * result['worst_s']:.1f}",
                    f"{ratio.median:.2f}",
                    f"{ratio.low:.2f}-{ratio.high:.2f}",
                    f"{1e3 * result['alone_p50_s']:.1f}",
                    f"{1e3 * result['long_ttft_s']:.0f}",
                    f"{result['scheduling_and_sampling']:.2%}",
                )
            )
        title = f"{model} {dtype}: {_N_DECODING} streams decode, {_N_LONG} prompts of {args.long_prompt} tokens arrive"
        self.say(f"{title}\n{align(lines)}")


class Second:
    """Two requests, one after the other, in one process."""

    def __init__(self, directory: Path, device: str, n_threads: int, settings: dict[str, Any]) -> None:
        self._engine = OurEngine(directory, device, n_threads, settings)

    def run(self, first: list[int], second: list[int]) -> dict[str, Any]:
        ttft, answers = [], []
        for prompt in (first, second):
            started = time.perf_counter()
            answers += self._engine.answer(Work([prompt], [4]))
            ttft.append(self._engine.times["0"][0] - started)
        return {"ttft": ttft, "answers": answers}

    def close(self) -> None:
        self._engine.close()


class Prefix(Scenario):
    """A fresh prefix in each turn. All variants answer the same prompts, so that their answers can be compared."""

    def run(self) -> None:
        args = self.args
        for model in args.models:
            for dtype in args.dtypes:
                directory = checkpoint(args.work_dir, model, dtype, args.seed)
                with ExitStack() as stack:
                    variants = self.chosen
                    processes = {
                        one.name: process
                        for one in variants
                        if (process := self.start(stack, one.name, Second, directory, args.device, args.threads, one.settings))
                    }
                    self._measure(model, dtype, processes)

    def _measure(self, model: str, dtype: str, processes: dict[str, ContenderProcess]) -> None:
        args = self.args
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        self.progress.stage(f"{model} {dtype}", len(processes) * (args.repeats + 1))
        for repeat, name in [(-1, name) for name in processes] + list(turns(list(processes), args.repeats, args.seed)):
            self.progress.step(name)
            rng = random.Random(f"{args.seed} {repeat}")
            shared = _prompt(rng, model, args.long_prompt)
            turn = self.ask(name, processes[name], "run", shared + _prompt(rng, model, 32), shared + _prompt(rng, model, 32))
            if repeat >= 0 and turn:
                found[name].append({"repeat": repeat, **turn})
        lines: list[tuple[str, ...]] = [("", "first TTFT ms", "second TTFT ms", "second/first", "95 %", "same answers")]
        base = next((turns_of for turns_of in found.values() if turns_of), [])
        expected = {turn["repeat"]: turn["answers"] for turn in base}
        for name, of in found.items():
            if not of:
                continue
            first, second = ([turn["ttft"][i] for turn in of] for i in (0, 1))
            ratio = estimate_ratio(second, first)
            n_same = sum(turn["answers"] == expected.get(turn["repeat"]) for turn in of)
            about = {"model": model, "dtype": dtype, "contender": name, "long_prompt": args.long_prompt}
            times = {"first_s": asdict(estimate(first)), "second_s": asdict(estimate(second)), "ratio": asdict(ratio)}
            self.results.append({**about, **times, "n_same_answers": n_same, "turns": of})
            lines.append(
                (
                    f"* {name}",
                    *(f"{1e3 * statistics.median(values):.1f}" for values in (first, second)),
                    f"{ratio.median:.3f}",
                    f"{ratio.low:.3f}-{ratio.high:.3f}",
                    f"{n_same} of {len(of)}",
                )
            )
        self.say(
            f"{model} {dtype}: two prompts of {args.long_prompt} + 32 tokens, the {args.long_prompt} the same\n{align(lines)}"
        )


def _prompt(rng: random.Random, model: str, n_tokens: int) -> list[int]:
    vocabulary = n_vocab(model)
    return [rng.randrange(vocabulary) for _ in range(n_tokens)]
