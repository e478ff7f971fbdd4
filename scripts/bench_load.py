#!/usr/bin/env python
"""How fast does a checkpoint become a model, next to every loader that can be installed, and next to the disk itself?

The checkpoint has the shapes of a real model; it and its copies in other formats are made once and kept in the work directory.

``--scenario load`` (the default): from cold files to every tensor's bytes resident and touched once.

* *Cold* means that the page cache was told to drop each file and that ``mincore`` then found no page of any of them.
* All contenders load once per repeat, in an order that is shuffled anew for each repeat, by a seed. Ratios pair loads of the
  same repeat; intervals are 95 % bootstrap intervals of the median.
* Each contender has a process of its own that stays, with imports done and one full load behind it: what is measured is the
  load, not Python. Its heap is trimmed before each load. Contenders with several settings are tried first; the best takes part.
* Memory: before each load, as much memory as it can need is taken and given back, so that the kernel's free pages are backed by
  the host. Our loader appears twice: into fresh memory, and into a pool that a load before has used (and that was overwritten).
* The end is the same for all: each tensor under its name, one byte of each page read. The sum of those bytes is checked after
  every load, SHA-256 of every tensor once per contender; a wrong byte fails the run. "private" says how much of the result
  lies in the process's own memory: a mapping of the page cache has all its bytes resident too, but they are the kernel's to drop.
* The limit is direct reads of the same files into memory that is there already, in the same shuffled order, with the number of
  threads and the size of reads that were fastest on this disk. Each format has files, and so a limit, of its own: a disk need not
  be equally fast everywhere. Compressed files are compared with the safetensors files.

``--scenario host``: from host memory (ours: the tier that the workers of a node share; others: the page cache) to a model whose
forward pass could begin, in a warm process, for three sizes; each model then proves it by a token. Also: how much memory a second
worker process takes when it has the same model ready.

``--scenario ttft``: from cold files to the first token, in a warm process, with the phases of it: ours with and without
execution while loading, ``from_pretrained`` and ``generate``, and a real ``transformers serve`` over HTTP.

    python scripts/bench_load.py --quick
    python scripts/bench_load.py --repeats 10 --json load.json --plot load.png
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_load_measure as measure
from scripts.bench_load_cold import LoadResult, LoadScenario
from scripts.bench_load_contenders import CONTENDERS, NOT_HERE, PACKAGES
from scripts.bench_load_files import Checkpoints
from scripts.bench_load_measure import MIB, BenchError, WrongBytes
from scripts.bench_load_report import Bar, Panel, Progress, check_plot, duration, plot, table
from scripts.bench_load_serving import ServingResult, ServingScenario
from scripts.bench_load_starters import HOST, TTFT
from scripts.make_checkpoint import SHAPES

SIZES = {"load": ["qwen2.5-1.5b"], "host": ["small", "qwen2.5-0.5b", "qwen2.5-1.5b"], "ttft": ["qwen2.5-0.5b"]}
#: Of the checkpoint's bytes: how much memory has to be available. Of ours, each has its own pool in the last two.
NEEDED = {"load": 2.6, "host": 4.6, "ttft": 7.0}


class Named(Protocol):
    name: ClassVar[str]
    ours: ClassVar[bool]


N = TypeVar("N", bound=type[Named])


def main() -> None:
    args = parse_arguments()
    # As Ctrl-C does: the processes of the contenders are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except (BenchError, WrongBytes) as error:
        sys.exit(f"bench_load: {error}")
    except KeyboardInterrupt:
        sys.exit("bench_load: stopped")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SIZES, default="load")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the tensors shall be; cuda: only to load")
    parser.add_argument("--size", nargs="+", choices=SHAPES, metavar="SIZE", help=f"whose shapes: {', '.join(SHAPES)}")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10, help="loads of each contender")
    parser.add_argument("--tries", type=int, default=2, help="loads of each setting before the best one is chosen")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the request whose first token is waited for")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="contenders by name: '*' and '?' match, case does not matter"
    )
    parser.add_argument("--list", action="store_true", help="name the contenders and stop")
    parser.add_argument("--seed", type=int, default=0, help="of the order of loads")
    parser.add_argument(
        "--work-dir", type=Path, default=default_work_dir(), help="on the disk to measure (%(default)s); kept and used again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every load there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the medians: .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="does it work? A tiny model, three repeats: no figures to publish")
    args = parser.parse_args(argv)
    args.size = args.size or SIZES[args.scenario]
    if args.quick:
        args.size, args.repeats, args.tries = ["tiny"], 3, 1
    if args.device == "cuda" and args.scenario != "load":
        parser.error("--device cuda is for --scenario load")
    for name in ("repeats", "tries", "shards", "prompt_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name} {path}: there is no directory {path.resolve().parent}")
    return args


def default_work_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sllmdask-bench"


def run(args: argparse.Namespace) -> None:
    if args.list:
        everybody: Sequence[Any] = {"load": CONTENDERS, "host": HOST, "ttft": TTFT}[args.scenario]
        print("\n".join(contender.name for contender in choose(everybody, args.only)))
        return
    if args.plot:
        check_plot(args.plot)
    if args.device == "cuda":
        require_cuda()
    require_memory(args.size, NEEDED[args.scenario])
    try:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--work-dir {args.work_dir}: {error.strerror}") from None
    facts = measure.machine(args.work_dir, PACKAGES)
    print_machine(facts)
    progress = Progress()
    results: list[LoadResult | ServingResult] = []
    for size in args.size:
        result = run_one(size, args, progress)
        progress.clear()
        print("\n" + (load_text(result, args) if isinstance(result, LoadResult) else result.text()), flush=True)
        results.append(result)
    if args.quick:
        print("\n--quick: these are no figures, only a sign that it works")
    # Where somebody keeps files is no fact about a machine.
    arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    if args.json:
        report = {"machine": facts, "arguments": arguments, "results": [result.as_json() for result in results]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, [panel(result, args) for result in results], about(facts, args))
    for result in results:
        for name, reason in result.failed.items():
            if name.startswith("sllmdask"):
                raise BenchError(f"{name} failed: {reason}")


def run_one(size: str, args: argparse.Namespace, progress: Progress) -> LoadResult | ServingResult:
    checkpoints = Checkpoints(args.work_dir, size, args.shards, progress)
    if args.scenario == "load":
        return LoadScenario(size, checkpoints, choose(CONTENDERS, args.only), args, progress).run()
    starters = choose(HOST, args.only) if args.scenario == "host" else choose(TTFT, args.only)
    return ServingScenario(size, checkpoints, starters, args, progress).run()


def choose(everybody: Sequence[N], patterns: Sequence[str] | None) -> list[N]:
    """Those of `everybody` whose names match one of `patterns`; all, if there are none."""
    if not patterns:
        return list(everybody)
    for pattern in patterns:
        if not any(matches(contender, pattern) for contender in everybody):
            raise BenchError(f"--only {pattern!r} matches no contender; --list names them")
    return [contender for contender in everybody if any(matches(contender, pattern) for pattern in patterns)]


def matches(contender: type[Named], pattern: str) -> bool:
    return fnmatch.fnmatchcase(contender.name.lower(), pattern.lower())


def require_memory(sizes: Sequence[str], multiple: float) -> None:
    largest = max(sizes, key=lambda size: SHAPES[size].nbytes)
    needed, available = multiple * SHAPES[largest].nbytes, measure.available_memory()
    if available < needed:
        raise BenchError(f"{largest} needs {needed / 1e9:.1f} GB of free memory; {available / 1e9:.1f} GB are left")


def require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BenchError("--device cuda: torch finds no CUDA device on this machine")


# --- what it says ------------------------------------------------------------------------------------------------------------


def print_machine(facts: dict[str, Any]) -> None:
    disk = facts["disk"]
    print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_nbytes'] / 1e9:.0f} GB, Linux {facts['kernel']}, "
        f"{disk.get('fstype', 'unknown file system')} on {disk.get('model') or disk.get('source', 'an unknown disk')}",
        flush=True,
    )


def load_text(result: LoadResult, args: argparse.Namespace) -> str:
    """All that a reader needs: the limit, the table, and who is not in it."""
    limit = measure.estimate(result.limit_s)
    n_threads, chunk = result.limit_setting
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s with {threads}" for threads, rate in result.copy_bytes_per_s.items())
    limits = ", ".join(f"{name} {statistics.median(seconds):.3f} s" for name, seconds in result.limits_s.items())
    what = f"{result.size}, {result.truth.nbytes / 1e9:.2f} GB, {len(result.truth.digests)} tensors"
    lines = [
        f"{what}: cold files to {args.device} memory",
        f"limit: {n_threads} threads, reads of {chunk // MIB} MiB; memory copies: {rates}",
        f"{args.repeats} repeats in {duration(result.wall_s)}; taking memory: {statistics.median(result.backing_s):.2f} s each",
        table(result.rows(), limit, result.truth.nbytes / limit.median),
        f"direct reads of the files of each format: {limits}",
        "* ours. x limit: over direct reads. peak x: most resident memory over the checkpoint's bytes.",
        *(f"not run: {name}: {reason}" for name, reason in (result.skipped | NOT_HERE).items()),
        *(f"FAILED: {name}: {reason}" for name, reason in result.failed.items()),
    ]
    return "\n".join(lines)


def panel(result: LoadResult | ServingResult, args: argparse.Namespace) -> Panel:
    if isinstance(result, LoadResult):
        bars = [
            Bar(row.name, row.ours, row.seconds, f"{row.seconds.median:.3g} s   {row.ratio.median:.2f}x") for row in result.rows()
        ]
        title = f"{result.size}, {result.truth.nbytes / 1e9:.2f} GB, {args.shards} shards: cold files to {args.device} memory"
        return Panel(title, "seconds until every byte is resident and touched", bars, measure.estimate(result.limit_s))
    bars = [Bar(one.name, one.ours, one.seconds, f"{one.seconds.median:.3g} s") for one in result.starters]
    title, axis = {
        "host": ("host memory to a model that is ready", "seconds until all parameters are assigned"),
        "ttft": ("cold files to the first token", "seconds until the first token"),
    }[result.scenario]
    limit = measure.estimate(result.limit_s) if result.limit_s else None
    return Panel(f"{result.size}, {result.nbytes / 1e9:.2f} GB: {title}", axis, bars, limit)


def about(facts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    packages = {name: version for name, version in facts["packages"].items() if version and name != "numpy"}
    return {facts["cpu"]: f"({facts['cores']} cores)", "repeats": args.repeats} | packages


if __name__ == "__main__":
    main()
