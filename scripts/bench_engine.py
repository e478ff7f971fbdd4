#!/usr/bin/env python
"""What does the engine do with a CPU second, next to transformers on the same model, and what holds the rest?

The models have the shapes of real ones and random weights; they are made once and kept in the work directory. Each contender
has a process of its own that stays, with one turn behind it that does not count; a turn is timed inside. Contenders take one
turn each per repeat, in an order shuffled anew by a seed; figures are medians with 95 % bootstrap intervals, and ratios pair
turns of the same repeat. Sampling is greedy and no answer ends early. Threads that wait do not spin
(OMP_WAIT_POLICY=PASSIVE).

``--scenario throughput`` (the default): tokens per second and per CPU second, prefill included, of requests that arrive
together: our engine in its thread, by default and with settings that may make it faster or exact; transformers' continuous
batching manager; ``generate`` with all requests in one left-padded batch, and one by one (some of them, as its rate does not
depend on how many). Over HTTP: ``sllmdask up`` and ``transformers serve --continuous-batching``; CPU seconds there are those
of all processes of the server. Lengths of answers are ``uniform``, or ``mixed``: lognormal, 4 to 128. In float32 answers are
compared token for token with those of our first contender; where they differ, the margin between the two best logits is
reported.

``--scenario roofline``: the fraction of what the machine could do, and where a step's time goes. A decode step cannot be
faster than its weights and KV come from memory, nor than its products are computed; a prefill step not than its products.
Both rates are measured, and the best of several ways counts. Shares are from timers around the parts of a step, which the
script hangs in.

``--scenario latency``: time between tokens of streams that decode while prompts of 1,024 tokens arrive, as the engine cuts these
by itself, for several bounds of the pieces, and with prompts that are not cut.

``--scenario prefix``: time to the first token of a second request that begins with the same 1,024 tokens, over the first's.

``--scenario instances``: two engines in two processes, over one.

``--scenario swap``: two models take turns on one slot in the midst of answers, the weights of both staying in memory; the
pause of each swap. An engine that can park its requests does; otherwise it is closed and built anew, and they are computed
again. The answers must be those of models that were never swapped.

``--scenario memory``: the KV bytes that the engine reports over those that are resident; and what is left of 1,000 random
requests, many of them aborted: blocks, memory, threads, file handles.

    python scripts/bench_engine.py --quick
    python scripts/bench_engine.py --models 0.12b --dtypes float32 bfloat16 --repeats 3 --json engine.json
    python scripts/bench_engine.py --only 'sllmdask*' --set engine.max_batch_tokens=256 --set engine.block_size=32
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_engine_latency import Latency, Prefix
from scripts.bench_engine_measure import machine
from scripts.bench_engine_memory import Memory
from scripts.bench_engine_model import SHAPES
from scripts.bench_engine_roofline import Roofline
from scripts.bench_engine_run import OurVariant, Scenario, Variant, parse_variant
from scripts.bench_engine_slots import Instances, Swap
from scripts.bench_engine_throughput import Throughput, entrants
from scripts.bench_load import choose, default_work_dir
from scripts.bench_load_measure import BenchError
from scripts.bench_load_report import Progress, check_plot, plot

SCENARIOS: dict[str, type[Scenario]] = {
    "throughput": Throughput,
    "roofline": Roofline,
    "latency": Latency,
    "prefix": Prefix,
    "instances": Instances,
    "swap": Swap,
    "memory": Memory,
}
#: Our engine beside its defaults, where `--set` says nothing. What it does not know yet is named, and the rest goes on.
VARIANTS = {
    "throughput": [Variant({"pack_weights": "always"}), Variant({"deterministic": True})],
    "roofline": [Variant({"pack_weights": "always"}), Variant({"deterministic": True})],
    "latency": [Variant({"pack_weights": "always"})],
    "prefix": [Variant({"prefix_reuse": False})],
}
MODELS = {"roofline": ["0.12b", "0.5b"], "memory": ["small"], "throughput": ["0.12b"]}


def main() -> None:
    args = parse_arguments()
    # As Ctrl-C does: the processes of the contenders are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except BenchError as error:
        sys.exit(f"bench_engine: {error}")
    except KeyboardInterrupt:
        sys.exit("bench_engine: stopped")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, default="throughput")
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, help="shapes (default: 0.12b; memory: small; roofline: 0.12b 0.5b)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: CPU seconds say little then")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32], help="requests at a time")
    parser.add_argument("--lengths", nargs="+", choices=["uniform", "mixed"], default=["uniform", "mixed"])
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer; the median of mixed ones is 22/32 of it")
    parser.add_argument("--prompt-tokens", nargs=2, type=int, default=[32, 96], metavar=("MIN", "MAX"))
    parser.add_argument("--long-prompt", type=int, default=1024, help="tokens of the prompts of latency and prefix")
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256, 512], help="tokens of prefill beside decodes")
    parser.add_argument("--requests", type=int, default=1000, help="random requests, for memory")
    parser.add_argument("--one-by-one", type=int, default=4, metavar="N", help="requests that one by one is timed with at most")
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        metavar="engine.KEY=VALUE",
        help="one more contender, our engine with these settings, in place of those that a scenario has; may be repeated",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="contenders by name: '*' and '?' match, case does not matter"
    )
    parser.add_argument("--list", action="store_true", help="name the contenders and stop")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts, lengths and the order of turns")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a turn has failed")
    parser.add_argument(
        "--work-dir", type=Path, default=default_work_dir() / "engine", help="where the models are kept (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the medians: .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="does it work? A tiny model, two repeats: no figures to publish")
    args = parser.parse_args(argv)
    args.models = args.models or MODELS.get(args.scenario, ["0.12b"])
    if args.quick:
        args.models, args.dtypes, args.streams, args.repeats, args.new_tokens = ["tiny"], ["float32"], [1, 4], 2, 6
        args.long_prompt, args.budgets, args.requests, args.one_by_one = 96, [16, 32], 40, 2
    for name in ("repeats", "threads", "new_tokens", "long_prompt", "requests", "one_by_one"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name}: there is no directory {path.resolve().parent}")
    if args.device == "cuda" and args.scenario in ("roofline", "memory", "instances"):
        parser.error(f"--scenario {args.scenario} is for the CPU")
    return args


def run(args: argparse.Namespace) -> None:
    variants = [Variant(), *(map(parse_variant, args.set) if args.set else VARIANTS.get(args.scenario, []))]
    everybody: list[Any] = (
        entrants(variants) if args.scenario == "throughput" else [OurVariant.of(variant) for variant in variants]
    )
    chosen = choose(everybody, args.only)
    if args.list:
        print("\n".join(one.name for one in chosen))
        return
    if args.plot:
        check_plot(args.plot)
    try:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--work-dir {args.work_dir}: {error.strerror}") from None
    facts = machine(args.threads)
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_nbytes'] / 1e9:.0f} GB; {args.threads} threads", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as logs:
        log = Path(logs) / "contenders.log"
        scenario = SCENARIOS[args.scenario](args, chosen, Progress(), log)
        scenario.run()
    for name, reason in scenario.failed.items():
        print(f"not run: {name}: {reason}")
    if args.quick:
        print("\n--quick: these are no figures, only a sign that it works")
    if args.json:
        # Where somebody keeps files is no fact about a machine.
        arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        report = {"machine": facts, "arguments": arguments, "results": scenario.results, "failed": scenario.failed}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and scenario.panels:
        plot(
            args.plot,
            scenario.panels,
            {facts["cpu"]: f"({facts['cores']} cores)", "threads": args.threads, "repeats": args.repeats},
        )
    if not scenario.results:
        raise BenchError("nobody could be measured")


if __name__ == "__main__":
    main()
