"""Those who answer the same requests with the same model in ``bench_engine.py``; each lives in a process of its own.

All see the weights through a mapping of one file, so that they share its pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.bench_engine_measure import Ran, Work
from scripts.bench_engine_model import load_tensors, load_transformers
from scripts.bench_load_measure import BenchError
from scripts.bench_load_process import cpu_seconds

OURS = "sllmdask"
MANAGER = "transformers, continuous batching"
STATIC = "transformers, padded batch"
ONE_BY_ONE = "transformers, one by one"


def engine_settings(device: str, n_threads: int, settings: dict[str, Any]) -> Any:
    """``EngineSettings``; raises :class:`BenchError` where the engine does not know one of `settings`."""
    from sllmdask.config import EngineSettings

    unknown = [name for name in settings if name not in EngineSettings.model_fields]
    if unknown:
        raise BenchError(f"this engine has no setting {', '.join(unknown)}")
    return EngineSettings(**({"device": device, "n_threads": n_threads} | settings))


class OurEngine:
    """The engine as an instance runs it: in its thread, with an event loop that hears of each step.

    :param settings: of ``EngineSettings``, beside device and threads
    """

    def __init__(
        self, directory: Path, device: str, n_threads: int, settings: dict[str, Any], watch: Callable[[Any], Any] | None = None
    ) -> None:
        """`watch` is called with the engine before its thread starts; what it returns is :attr:`watched`."""
        from sllmdask.engine.engine import EngineThread, build_engine

        self._loop = asyncio.new_event_loop()
        self._answers: dict[str, list[int]] = {}
        #: When the loop heard of each token.
        self.times: dict[str, list[float]] = {}
        self._n_left = 0
        self._error: Exception | None = None
        self._on_token: Callable[[Any], None] = _ignore
        engine = build_engine(directory, load_tensors(directory), engine_settings(device, n_threads, settings))
        self.watched = watch(engine) if watch else None
        self.thread = EngineThread(engine, self._loop, self._on_outputs, self._fail, name="bench")

    def run(self, work: Work) -> Ran:
        wall, cpu = time.perf_counter(), cpu_seconds()
        answers = self.answer(work)
        return Ran(answers, sum(map(len, answers)), time.perf_counter() - wall, cpu_seconds() - cpu)

    def answer(self, work: Work, on_token: Callable[[Any], None] | None = None) -> list[list[int]]:
        """Greedy answers. `on_token` hears of each output in the loop, and may call :meth:`submit` and :meth:`abort`."""
        self._answers, self.times, self._on_token = {}, {}, on_token or _ignore
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            self.submit(str(i), prompt, length)
        self._loop.run_forever()
        if self._error is not None:
            raise self._error
        return list(self._answers.values())

    def submit(self, name: str, prompt: list[int], n_tokens: int) -> None:
        from sllmdask.batching.params import SamplingParams
        from sllmdask.batching.sequence import Sequence

        self._answers[name], self.times[name] = [], []
        self._n_left += 1
        params = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        self.thread.submit(Sequence(name, list(prompt), params))

    def stats(self) -> dict[str, Any]:
        from sllmdask.engine.engine import LLMEngine

        return self.thread.call(LLMEngine.stats).result().as_wire()

    def close(self) -> None:
        self.thread.close()
        self._loop.close()

    def _on_outputs(self, outputs: list[Any]) -> None:
        now = time.perf_counter()
        for output in outputs:
            if output.error:
                self._fail(output.error)
                return
            if output.token_id is not None:
                self._answers[output.request_id].append(output.token_id)
                self.times[output.request_id].append(now)
            self._n_left -= output.final
            self._on_token(output)
        if not self._n_left:
            self._loop.stop()

    def _fail(self, error: Exception) -> None:
        # Raised where the answers are waited for: the loop would only log it.
        self._error = error
        self._loop.stop()


def _ignore(_output: Any) -> None:
    pass


class Transformers:
    """transformers' model on the same weights; the subclasses say how it answers."""

    def __init__(self, directory: Path, dtype: str, device: str, n_threads: int) -> None:
        import torch

        torch.set_num_threads(n_threads)
        self._model = load_transformers(directory, dtype, device)
        self._device = device

    def run(self, work: Work) -> Ran:
        wall, cpu = time.perf_counter(), cpu_seconds()
        answers = self.answer(work)
        return Ran(answers, sum(map(len, answers)), time.perf_counter() - wall, cpu_seconds() - cpu)

    def answer(self, work: Work) -> list[list[int]]:
        raise NotImplementedError

    def _generate(self, prompts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
        """Left-padded to the longest prompt."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device)
        output = self._model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
        return output[:, longest:].tolist()


class Manager(Transformers):
    """The continuous batching manager, started once; batch size and cache are those of our defaults, or larger."""

    def __init__(self, directory: Path, dtype: str, device: str, n_threads: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        super().__init__(directory, dtype, device, n_threads)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        )
        self._manager.start()
        self._n_runs = 0

    def answer(self, work: Work) -> list[list[int]]:
        self._n_runs += 1
        ids = [f"{self._n_runs}-{i}" for i in range(len(work.prompts))]
        for request_id, prompt, n_tokens in zip(ids, work.prompts, work.lengths, strict=True):
            self._manager.add_request(prompt, request_id=request_id, max_new_tokens=n_tokens)
        answers: dict[str, list[int]] = {}
        while len(answers) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the manager's thread has ended")
            elif result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[request_id] for request_id in ids]

    def close(self) -> None:
        self._manager.stop(block=True)


class Padded(Transformers):
    """All requests in one batch, until the last one has its tokens. What it computes beyond an answer's end does not count."""

    def answer(self, work: Work) -> list[list[int]]:
        answers = self._generate(work.prompts, max(work.lengths))
        return [answer[:length] for answer, length in zip(answers, work.lengths, strict=True)]


class OneByOne(Transformers):
    """``generate`` for one request after the other."""

    def answer(self, work: Work) -> list[list[int]]:
        return [self._generate([prompt], length)[0] for prompt, length in zip(work.prompts, work.lengths, strict=True)]

    def margin(self, ids: list[int]) -> float:
        """Between the two best logits of the token that follows `ids`."""
        import torch

        with torch.inference_mode():
            logits = self._model(torch.tensor([ids], device=self._device), use_cache=False).logits[0, -1].float()
        best, second = logits.topk(2).values.tolist()
        return best - second
