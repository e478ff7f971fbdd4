"""For ``bench_engine.py``: where a step of the engine spends its time, and what the machine could do.

The timers are hung in from outside; nothing of them is in the engine. Each costs about a microsecond, some hundred times a step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: The parts that a step is divided into; ``model`` is the forward pass without linear layers and attention.
PARTS = ("linears", "attention", "model", "sampling", "scheduling", "rest")
#: Elements that the memory's rate is measured over: far more than any cache holds.
_N_READ = 64 * 1024**2


class StepClock:
    """Times each step of an engine and its parts. Made before the engine's thread begins, or used without one."""

    def __init__(self, engine: Any) -> None:
        #: Seconds of each step with work, by part and ``step`` in all; and how many tokens it computed.
        self.steps: list[dict[str, float]] = []
        self._now: Counter[str] = Counter()
        self._engine = engine
        step = engine.step

        def timed_step() -> Any:
            self._now = Counter()
            started = time.perf_counter()
            outputs = step()
            self._now["step"] = time.perf_counter() - started
            if self._now["n_tokens"]:
                self.steps.append(self._parts())
            return outputs

        engine.step = timed_step
        for name in ("plan", "advance", "finish"):
            setattr(engine._scheduler, name, self._timed("scheduling", getattr(engine._scheduler, name)))
        forward = self._timed("forward", engine._runner.forward)

        def timed_forward(chunks: Any, *arguments: Any) -> Any:
            self._now["n_tokens"] += sum(chunk.n_tokens for chunk in chunks)
            return forward(chunks, *arguments)

        engine._runner.forward = timed_forward
        self._watch_sampler()
        self._watch_attention()
        for module in linears(engine):
            self._watch_module(module)

    def _parts(self) -> dict[str, float]:
        now = self._now
        model = now["forward"] - now["linears"] - now["attention"]
        rest = now["step"] - now["forward"] - now["sampling"] - now["scheduling"]
        named = {part: now[part] for part in ("linears", "attention", "sampling", "scheduling", "step", "n_tokens")}
        return {**named, "model": model, "rest": rest}

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._now[part] += time.perf_counter() - started

        return timed

    def _watch_sampler(self) -> None:
        # One engine for each process, so that what a module holds may be replaced.
        from sllmdask.engine import engine as module

        module.sample = self._timed("sampling", module.sample)

    def _watch_attention(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from sllmdask.engine.attention import NAME

        ALL_ATTENTION_FUNCTIONS.register(NAME, self._timed("attention", ALL_ATTENTION_FUNCTIONS[NAME]))

    def _watch_module(self, module: Any) -> None:
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))

        def note(*_: Any) -> None:
            self._now["linears"] += time.perf_counter() - started.pop()

        module.register_forward_hook(note)


def linears(engine: Any) -> list[Any]:
    """The modules that multiply by a matrix, whatever form of it they hold."""
    return [module for module in engine._runner.model.modules() if "Linear" in type(module).__name__]


def shares(steps: list[dict[str, float]]) -> dict[str, float]:
    """The part of all steps' seconds that each of :data:`PARTS` took."""
    whole = sum(step["step"] for step in steps)
    return {part: sum(step[part] for step in steps) / whole for part in PARTS}


# --- the machine -------------------------------------------------------------------------------------------------------------


def read_rate() -> float:
    """Bytes per second that torch's threads read from memory: the best of sums and products with a vector."""
    import torch

    matrix = torch.ones(_N_READ // 4096, 4096)
    vector = torch.ones(4096)
    best = min(_fastest(matrix.sum), _fastest(lambda: matrix @ vector))
    return matrix.nbytes / best


def product_rate(dtype: str) -> float:
    """Floating-point operations per second of products of matrices in `dtype`: the best shape, plain or packed for oneDNN."""
    import torch

    best = 0.0
    for rows, inner, columns in ((32, 896, 4864), (128, 896, 4864), (256, 768, 2048), (512, 896, 4864), (512, 2048, 2048)):
        left = torch.randn(rows, inner).to(getattr(torch, dtype))
        right = torch.randn(columns, inner).to(getattr(torch, dtype))
        ways: list[Callable[[], Any]] = [lambda left=left, right=right: torch.nn.functional.linear(left, right)]
        with suppress(RuntimeError, AttributeError):
            packed = torch.ops.mkldnn._reorder_linear_weight(right)
            ways.append(lambda left=left, packed=packed: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))
            ways[-1]()
        for way in ways:
            with suppress(RuntimeError):
                best = max(best, 2 * rows * inner * columns / _fastest(way))
    return best


def _fastest(run: Callable[[], Any], n: int = 7) -> float:
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
