"""``bench_engine.py --scenario memory``: are the bytes there that the engine reports, and does anything stay behind?"""

from __future__ import annotations

import random
import statistics
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.bench_engine_contenders import OurEngine
from scripts.bench_engine_measure import Work, n_open_files, resident_of_range
from scripts.bench_engine_model import checkpoint, n_vocab
from scripts.bench_engine_run import OurVariant, Scenario
from scripts.bench_load_measure import estimate
from scripts.bench_load_process import give_back_memory, memory_of_self
from scripts.bench_load_report import align

#: Of the pool: how many tokens are asked for.
_FILLED = 0.9
_KV_MEMORY = 32 * 1024**2
#: Requests that are in the engine at a time.
_N_AT_A_TIME = 16


class Held:
    """An engine whose memory is looked at from inside its process."""

    def __init__(self, directory: Path, vocabulary: int, n_threads: int, settings: dict[str, Any]) -> None:
        # All prompts in one step: then all blocks are held at a time.
        roomy = {"kv_memory": _KV_MEMORY, "max_batch_tokens": 8192, "max_running": 256}
        self._engine = OurEngine(directory, "cpu", n_threads, roomy | settings, watch=lambda engine: engine)
        self._vocabulary = vocabulary

    def kv(self, seed: int) -> dict[str, float]:
        """Bytes of the blocks that were handed out, as the engine reports them, and those of its cache that became resident."""
        engine, rng = self._engine, random.Random(seed)
        stats = engine.stats()
        address = engine.watched._runner.caches[0][0].data_ptr()
        nbytes = stats["kv_nbytes"]
        before = resident_of_range(address, nbytes)
        n_tokens = int(stats["blocks_total"] * _FILLED) * stats["block_size"]
        # Whole blocks: a request's last token has no KV yet when it ends, so two are drawn, and one is computed.
        length = min(256, engine.watched.max_model_len - 2) // stats["block_size"] * stats["block_size"]
        prompts = [self._prompt(rng, length - 1) for _ in range(n_tokens // length)]
        blocks: set[int] = set()
        plan = engine.watched._scheduler.plan

        def plan_and_look(now: float) -> Any:
            planned = plan(now)
            for chunk in planned.chunks:
                blocks.update(chunk.sequence.block_table)
            return planned

        engine.watched._scheduler.plan = plan_and_look
        try:
            engine.answer(Work(prompts, [2] * len(prompts)))
        finally:
            engine.watched._scheduler.plan = plan
        return {
            "reported_nbytes": len(blocks) * stats["bytes_per_block"],
            "resident_nbytes": resident_of_range(address, nbytes) - before,
            "n_requests": len(prompts),
        }

    def leaks(self, n_requests: int, seed: int) -> dict[str, Any]:
        """What is held before and after `n_requests` requests of random lengths, a third of which are aborted somewhere."""
        self._answer_and_abort(min(n_requests, 100), seed + 1)  # what grows only once is there now
        before = self._held()
        n_aborted = self._answer_and_abort(n_requests, seed)
        return {"before": before, "after": self._held(), "n_requests": n_requests, "n_aborted": n_aborted}

    def close(self) -> None:
        self._engine.close()

    def _answer_and_abort(self, n_requests: int, seed: int) -> int:
        engine, rng = self._engine, random.Random(seed)
        # By request: prompt, length, and after how many tokens it is aborted, if it is.
        plans = {}
        for i in range(n_requests):
            length = rng.randint(1, 24)
            abort_after = rng.randint(0, length - 1) if rng.random() < 1 / 3 else None
            plans[f"r{i}"] = (self._prompt(rng, rng.randint(1, 200)), length, abort_after)
        left = list(plans)
        aborted = 0

        def start_next() -> None:
            if left:
                name = left.pop()
                prompt, length, abort_after = plans[name]
                engine.submit(name, prompt, length)
                if abort_after == 0:
                    engine.thread.abort(name)

        def on_token(output: Any) -> None:
            nonlocal aborted
            if output.final:
                aborted += output.finish_reason == "abort"
                start_next()
            elif output.request_id in plans and plans[output.request_id][2] == output.index + 1:
                engine.thread.abort(output.request_id)

        work = Work([self._prompt(rng, 8) for _ in range(_N_AT_A_TIME)], [1] * _N_AT_A_TIME)
        engine.answer(work, on_token)
        return aborted

    def _held(self) -> dict[str, int]:
        stats = self._engine.stats()
        give_back_memory()
        (private,) = memory_of_self("RssAnon")
        return {
            "requests": stats["n_running"] + stats["n_waiting"],
            "blocks_in_use": stats["blocks_total"] - stats["blocks_free"],
            "private_nbytes": private,
            "threads": threading.active_count(),
            "system_threads": len(list(Path("/proc/self/task").iterdir())),
            "files": n_open_files(),
        }

    def _prompt(self, rng: random.Random, n_tokens: int) -> list[int]:
        return [rng.randrange(self._vocabulary) for _ in range(n_tokens)]


class Memory(Scenario):
    """A fresh process for each repeat: pages that were touched once stay."""

    def run(self) -> None:
        for model in self.args.models:
            for dtype in self.args.dtypes:
                for one in self.chosen:
                    self._measure(model, dtype, one, checkpoint(self.args.work_dir, model, dtype, self.args.seed))

    def _measure(self, model: str, dtype: str, one: OurVariant, directory: Path) -> None:
        args = self.args
        found: list[dict[str, Any]] = []
        self.progress.stage(f"{model} {dtype}: {one.name}", args.repeats)
        for repeat in range(args.repeats):
            self.progress.step("a turn")
            with ExitStack() as stack:
                process = self.start(stack, one.name, Held, directory, n_vocab(model), args.threads, one.settings)
                if process is None:
                    return
                kv = self.ask(one.name, process, "kv", args.seed + repeat)
                leaks = self.ask(one.name, process, "leaks", args.requests, args.seed + repeat) if kv else None
                if kv is None or leaks is None:
                    return
                found.append({**kv, **leaks, "ratio": kv["resident_nbytes"] / kv["reported_nbytes"]})
        ratio = estimate([turn["ratio"] for turn in found])
        lines: list[tuple[str, ...]] = [("", "before", "after", "largest growth of a repeat")]
        for key in found[0]["before"]:
            before, after = (statistics.median(turn[when][key] for turn in found) for when in ("before", "after"))
            growth = max(turn["after"][key] - turn["before"][key] for turn in found)
            scale, unit = (1e6, " MB") if key.endswith("nbytes") else (1, "")
            name = key.replace("_nbytes", " memory").replace("_", " ")
            lines.append((f"  {name}", *(f"{value / scale:g}{unit}" for value in (before, after, growth))))
        result = {"model": model, "dtype": dtype, "contender": one.name, "resident_over_reported": asdict(ratio), "turns": found}
        reported = statistics.median(turn["reported_nbytes"] for turn in found)
        self.add(
            result,
            f"{model} {dtype}, {one.name}: KV reported {reported / 1e6:.1f} MB, resident over reported {ratio.median:.3f} "
            f"({ratio.low:.3f}-{ratio.high:.3f})\n"
            f"{args.requests} random requests, {found[0]['n_aborted']} of them aborted\n{align(lines)}",
        )
