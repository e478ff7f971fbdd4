#!/usr/bin/env python
"""How many tokens per second does the engine generate, next to transformers on the same model?

Contenders, in one process and on the same weights, dtype and threads: our engine in its thread; transformers' continuous
batching manager in its thread; ``model.generate()`` one request after the other. They take turns, and each figure is the median
of its turns: wall and CPU seconds, prefill included. In float32 the contenders' tokens are compared as well.

    python scripts/bench_engine.py --quick
    python scripts/bench_engine.py --models 0.12b --dtypes float32 bfloat16 --streams 1 8 32 --json engine.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: Llama shapes: layers, width, heads, KV heads, width of the MLP, vocabulary.
SHAPES = {
    "small": (6, 384, 6, 2, 1024, 8000),
    "0.12b": (12, 768, 12, 4, 2048, 32000),
    "0.5b": (24, 896, 14, 2, 4864, 151936),
}
OURS, MANAGER, GENERATE = "sllmdask", "transformers continuous batching", "transformers generate, one by one"
#: ``generate`` is as fast per token for the first requests as for all of them.
N_ONE_BY_ONE = 2

Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--prompt-tokens", nargs=2, type=int, default=[32, 96], metavar=("MIN", "MAX"))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the small model, 2 turns, short answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.quick:
        args.models, args.repeats, args.new_tokens = ["small"], 2, 8
    # Read when torch is imported, so before anything of ours is.
    os.environ.update(OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads), OMP_WAIT_POLICY="PASSIVE")
    results = [result for model in args.models for dtype in args.dtypes for result in compare(model, dtype, args)]
    arguments = {name: value for name, value in vars(args).items() if name != "json"}
    report = {"machine": machine(), "arguments": arguments, "results": results}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def compare(name: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians and ratios for each number of streams."""
    model, directory = make_model(name, dtype, args.seed)
    engine = OurEngine(model, directory, args.threads)
    manager = Manager(model, args.new_tokens)
    contenders: dict[str, Callable[[Answers, int], Answers]] = {
        OURS: engine.generate,
        MANAGER: manager.generate,
        GENERATE: lambda prompts, n_tokens: one_by_one(model, prompts[:N_ONE_BY_ONE], n_tokens),
    }
    rng = random.Random(args.seed)
    results = []
    try:
        for n_streams in args.streams:
            n_vocab = SHAPES[name][-1]
            prompts = [[rng.randrange(n_vocab) for _ in range(rng.randint(*args.prompt_tokens))] for _ in range(n_streams)]
            results.append({"model": name, "dtype": dtype, "streams": n_streams} | take_turns(contenders, prompts, args))
            print_result(results[-1])
    finally:
        engine.close()
        manager.close()
    return results


def take_turns(
    contenders: dict[str, Callable[[Answers, int], Answers]], prompts: Answers, args: argparse.Namespace
) -> dict[str, Any]:
    names = list(contenders)
    answers = {name: contenders[name](prompts, args.new_tokens) for name in names}  # the turn that warms up
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            n_tokens = sum(map(len, contenders[name](prompts, args.new_tokens)))
            seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
            turns[name].append({"tokens_per_s": n_tokens / seconds, "tokens_per_cpu_s": n_tokens / cpu_seconds})
    medians = {
        name: {unit: statistics.median(turn[unit] for turn in turns[name]) for unit in ("tokens_per_s", "tokens_per_cpu_s")}
        for name in names
    }
    ratios = {name: {unit: medians[OURS][unit] / medians[name][unit] for unit in medians[name]} for name in names if name != OURS}
    same = {name: share_of_equal(answers[OURS], answers[name]) for name in names if name != OURS}
    return {"medians": medians, "ratio_of_ours_to": ratios, "equal_answers": same, "turns": turns, "load": os.getloadavg()[0]}


def share_of_equal(ours: Answers, theirs: Answers) -> float:
    return statistics.mean(mine == other for mine, other in zip(ours, theirs, strict=False))


def make_model(name: str, dtype: str, seed: int) -> tuple[Any, Path]:
    """A Llama with random weights, and a directory that holds its ``config.json``."""
    import torch
    import transformers

    n_layers, width, n_heads, n_kv_heads, mlp, n_vocab = SHAPES[name]
    config = transformers.LlamaConfig(
        num_hidden_layers=n_layers,
        hidden_size=width,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        intermediate_size=mlp,
        vocab_size=n_vocab,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    # Not `.to(dtype)` afterwards: it would round the rotary frequencies too, which `from_pretrained` does not.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    directory = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    config.save_pretrained(directory)
    return model, directory


class OurEngine:
    """The engine over the very tensors of transformers' model, as an instance runs it: in its thread, with an event loop."""

    def __init__(self, model: Any, directory: Path, n_threads: int) -> None:
        from sllmdask.config import EngineSettings
        from sllmdask.engine.engine import EngineThread, build_engine

        self._loop = asyncio.new_event_loop()
        self._answers: dict[str, list[int]] = {}
        self._n_left = 0
        settings = EngineSettings(device="cpu", n_threads=n_threads)
        self._thread = EngineThread(
            build_engine(directory, model.state_dict(), settings), self._loop, self._on_outputs, self._on_failed, name="bench"
        )

    def generate(self, prompts: Answers, n_tokens: int) -> Answers:
        from sllmdask.batching.params import SamplingParams
        from sllmdask.batching.sequence import Sequence

        self._answers, self._n_left = {str(i): [] for i in range(len(prompts))}, len(prompts)
        for i, prompt in enumerate(prompts):
            self._thread.submit(Sequence(str(i), prompt, SamplingParams(max_tokens=n_tokens, temperature=0.0)))
        self._loop.run_forever()
        return list(self._answers.values())

    def close(self) -> None:
        self._thread.close()
        self._loop.close()

    def _on_outputs(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.error:
                raise output.error
            self._answers[output.request_id].append(output.token_id)
            self._n_left -= output.final
        if not self._n_left:
            self._loop.stop()

    def _on_failed(self, error: Exception) -> None:
        raise error


class Manager:
    """transformers' continuous batching, started once; batch size and cache are those of our defaults, or larger."""

    def __init__(self, model: Any, n_tokens: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self._model = model
        model.set_attn_implementation("sdpa")
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(max_new_tokens=n_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        )
        self._manager.start()
        self._n_runs = 0

    def generate(self, prompts: Answers, n_tokens: int) -> Answers:
        self._n_runs += 1
        ids = [f"{self._n_runs}-{i}" for i in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._manager.add_request(prompt, request_id=request_id, max_new_tokens=n_tokens)
        answers: dict[str, list[int]] = {}
        while len(answers) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[request_id] for request_id in ids]

    def close(self) -> None:
        self._manager.stop(block=True)


def one_by_one(model: Any, prompts: Answers, n_tokens: int) -> Answers:
    import torch

    answers = []
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    model.set_attn_implementation(implementation)
    return answers


def machine() -> dict[str, Any]:
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = named[0] if named else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['model']} {result['dtype']}, {result['streams']} streams (load {result['load']:.1f})")
    for name, median in result["medians"].items():
        line = f"  {name:35} {median['tokens_per_s']:8.1f} tokens/s {median['tokens_per_cpu_s']:8.1f} tokens/CPU s"
        if name != OURS:
            ratio = result["ratio_of_ours_to"][name]
            line += f"   ours: {ratio['tokens_per_s']:.2f}x, by CPU {ratio['tokens_per_cpu_s']:.2f}x"
            line += f", equal answers {result['equal_answers'][name]:.0%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
