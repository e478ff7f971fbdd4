"""``bench_engine.py --scenario roofline``: how much of what the machine could do the engine does, and where the rest goes."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.bench_engine_clock import PARTS, StepClock, linears, product_rate, read_rate, shares
from scripts.bench_engine_contenders import OurEngine
from scripts.bench_engine_measure import make_work
from scripts.bench_engine_model import checkpoint, load_tensors, n_vocab
from scripts.bench_engine_run import Scenario
from scripts.bench_load_measure import estimate, turns
from scripts.bench_load_report import align


class Probe:
    """An engine whose steps are timed, and the rates of the machine, in one process."""

    def __init__(self, directory: Path, dtype: str, n_threads: int, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(n_threads)
        self._engine = OurEngine(directory, "cpu", n_threads, settings, watch=_Watched)
        self._dtype = dtype
        tensors = load_tensors(directory)
        # Each decode step reads all matrices once; of the input embeddings a few rows, unless they are the output's, too.
        tied = "lm_head.weight" not in tensors
        matrices = [tensor for name, tensor in tensors.items() if tensor.ndim == 2 and (tied or "embed_tokens" not in name)]
        self.facts = {
            "matrix_nbytes": sum(tensor.nbytes for tensor in matrices),
            "matrix_elements": sum(tensor.numel() for tensor in matrices),
            # The output's matrix meets only the rows that a token is drawn from.
            "output_elements": (tensors["model.embed_tokens.weight"] if tied else tensors["lm_head.weight"]).numel(),
            "kv_nbytes_per_token": self._engine.watched.kv_nbytes_per_token,
            "n_linears": self._engine.watched.n_linears,
        }

    def rates(self) -> dict[str, float]:
        return {"read_bytes_per_s": read_rate(), "flop_per_s": product_rate(self._dtype)}

    def steps(self, prompts: list[list[int]], n_tokens: int) -> list[dict[str, float]]:
        """The steps in which all `prompts` are answered with `n_tokens` each."""
        from scripts.bench_engine_measure import Work

        clock = self._engine.watched.clock
        clock.steps = []
        self._engine.answer(Work(prompts, [n_tokens] * len(prompts)))
        return list(clock.steps)

    def about(self) -> dict[str, float]:
        return self.facts

    def close(self) -> None:
        self._engine.close()


class _Watched:
    def __init__(self, engine: Any) -> None:
        self.clock = StepClock(engine)
        self.kv_nbytes_per_token = engine._runner.bytes_per_block / engine.settings.block_size
        self.n_linears = len(linears(engine))


class Roofline(Scenario):
    """Decode with as many streams as asked for, and a prefill of one full batch; all variants take turns."""

    def run(self) -> None:
        for model in self.args.models:
            for dtype in self.args.dtypes:
                self._model(model, dtype, checkpoint(self.args.work_dir, model, dtype, self.args.seed))

    def _model(self, model: str, dtype: str, directory: Path) -> None:
        args = self.args
        with ExitStack() as stack:
            probes = {}
            for one in self.chosen:
                self.progress.stage(f"{model} {dtype}: starting {one.name}")
                process = self.start(stack, one.name, Probe, directory, dtype, args.threads, one.settings)
                if process is not None:
                    probes[one.name] = process
            cases = [("decode", n) for n in args.streams] + [("prefill", 1)]
            measured: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
            self.progress.stage(f"{model} {dtype}", args.repeats * len(probes))
            for repeat, name in [(-1, name) for name in probes] + list(turns(list(probes), args.repeats, args.seed)):
                self.progress.step(name)
                rates = self.ask(name, probes[name], "rates")
                for phase, n in cases:
                    steps = self.ask(name, probes[name], "steps", *self._case(model, phase, n))
                    if repeat >= 0 and rates and steps:
                        facts = probes[name].call("about", timeout_s=60)
                        found = self._turn(phase, n, steps, facts, rates)
                        measured.setdefault((name, phase, n), []).append(found)
        self._report(model, dtype, measured)

    def _case(self, model: str, phase: str, n: int) -> tuple[list[list[int]], int]:
        if phase == "prefill":
            # As many tokens as one step takes by default.
            n_prompt = 64 if self.args.quick else 512
            return make_work(1, n_vocab(model), "uniform", (n_prompt, n_prompt), 1, self.args.seed).prompts, 1
        return make_work(n, n_vocab(model), "uniform", (64, 64), 1, self.args.seed).prompts, 4 if self.args.quick else 17

    def _turn(
        self, phase: str, n: int, steps: list[dict[str, float]], facts: dict[str, float], rates: dict[str, float]
    ) -> dict[str, Any]:
        counted = [step for step in steps if (step["n_tokens"] == n) == (phase == "decode")]
        seconds = statistics.median(step["step"] for step in counted)
        n_tokens = statistics.median(step["n_tokens"] for step in counted)
        n_drawn = n if phase == "decode" else 1
        inner = facts["matrix_elements"] - facts["output_elements"]
        flop = 2 * (inner * n_tokens + facts["output_elements"] * n_drawn)
        # 64 tokens of prompt, and about half of the answer.
        kv_nbytes = facts["kv_nbytes_per_token"] * n * 72 if phase == "decode" else 0
        memory_s = (facts["matrix_nbytes"] + kv_nbytes) / rates["read_bytes_per_s"]
        product_s = flop / rates["flop_per_s"]
        return {
            "step_s": seconds,
            "bound_s": max(memory_s, product_s),
            "bound_by": "memory" if memory_s > product_s else "products",
            "fraction": max(memory_s, product_s) / seconds,
            "shares": shares(counted),
            "rates": rates,
        }

    def _report(self, model: str, dtype: str, measured: dict[tuple[str, str, int], list[dict[str, Any]]]) -> None:
        lines: list[tuple[str, ...]] = [("", "step ms", "bound ms", "by", "fraction", *PARTS, "scheduling+sampling")]
        results = []
        for (name, phase, n), found in measured.items():
            share = {part: statistics.median(one["shares"][part] for one in found) for part in PARTS}
            overhead = statistics.median(one["shares"]["scheduling"] + one["shares"]["sampling"] for one in found)
            fraction = estimate([one["fraction"] for one in found])
            step = estimate([one["step_s"] for one in found])
            bound = statistics.median(one["bound_s"] for one in found)
            results.append(
                {
                    "contender": name,
                    "phase": phase,
                    "streams": n,
                    "step_s": asdict(step),
                    "bound_s": bound,
                    "fraction": asdict(fraction),
                    "shares": share,
                    "scheduling_and_sampling": overhead,
                    "turns": found,
                }
            )
            lines.append(
                (
                    f"* {name}, {phase}" + (f" of {n}" if phase == "decode" else ""),
                    f"{1e3 * step.median:.2f}",
                    f"{1e3 * bound:.2f}",
                    found[0]["bound_by"],
                    f"{fraction.median:.2f} ({fraction.low:.2f}-{fraction.high:.2f})",
                    *(f"{share[part]:.1%}" for part in PARTS),
                    f"{overhead:.2%}",
                )
            )
        if not results:
            return
        rates = [one["rates"] for found in measured.values() for one in found]
        read, product = (statistics.median(rate[key] for rate in rates) for key in ("read_bytes_per_s", "flop_per_s"))
        title = f"{model} {dtype}: memory {read / 1e9:.1f} GB/s, products {product / 1e9:.0f} GFLOP/s"
        about = {"model": model, "dtype": dtype, "read_bytes_per_s": read, "flop_per_s": product}
        self.add({**about, "cases": results}, f"{title}\n{align(lines)}")
