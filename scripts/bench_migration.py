#!/usr/bin/env python
"""What a client notices when its request moves to another worker, and what the others notice.

All is measured on ``sllmdask up`` with real workers, by clients over HTTP, in four parts.

``downtime``: the gap between the two tokens at the cut, by the length of the request, for four ways to move it, in one run:
``kv`` (its KV is copied while it decodes on) and ``tokens`` (the destination computes the KV of its tokens while it decodes on),
as anybody's requests move; and what these are measured against, made of the same engines, messages and connections: ``blocking``
(stop it, then copy all KV) and ``recompute`` (stop it, then compute all of its tokens again, as after a death).

``split``: where the gap of a move by KV goes, by the engines' own steps: what is before the destination's first step, what that
one takes longer than those after it, and what its token takes longer to the client.

``neighbours``: the gaps of streams that stay, at the source and at the destination, while others move and while none does.

``storm``: many streams and random moves. No token may be lost, doubled or another one than in the same streams undisturbed, no
stream may end or be asked for again, and afterwards nothing may stay behind.

All of it takes some twenty minutes on two cores.

    python scripts/bench_migration.py --quick
    python scripts/bench_migration.py --repeats 5 --json docs/results/migration-cpu.json --plot docs/results \\
        --page docs/migration.md
    python scripts/bench_migration.py --from docs/results/migration-cpu.json --plot .
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_engine_measure import machine
from scripts.bench_engine_model import SHAPES
from scripts.bench_load import default_work_dir
from scripts.bench_load_measure import BenchError
from scripts.bench_load_report import Progress, check_plot
from scripts.bench_migration_cluster import Cluster, Stream, checkpoint, follow, open_session
from scripts.bench_migration_moves import WAYS
from scripts.bench_migration_report import LIVE, cut_of, fill, plot_lengths, plot_timeline, report, split_of, timeline_of
from scripts.bench_migration_storm import storm

PARTS = ("downtime", "split", "neighbours", "storm")
#: Tokens decoded undisturbed before and after each move: what a step takes at that length.
N_QUIET = 12
#: Tokens of an answer, more than any of these parts waits for, and room for them and the longest prompt.
MAX_TOKENS, MAX_MODEL_LEN = 3500, 8192


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except BenchError as error:
        sys.exit(f"bench_migration: {error}")
    except KeyboardInterrupt:
        sys.exit("bench_migration: stopped")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b", help="of the model that moves one by one (%(default)s)")
    parser.add_argument("--storm-shape", choices=SHAPES, default="small", help="of the model of the storm (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096], help="prompt and answer at the cut"
    )
    parser.add_argument("--repeats", type=int, default=3, help="requests of each length, each moved in every way (%(default)s)")
    parser.add_argument("--split-moves", type=int, default=20, help="whose gaps are taken apart (%(default)s)")
    parser.add_argument("--neighbours", type=int, default=4, help="streams that stay, on each worker (%(default)s)")
    parser.add_argument("--neighbour-moves", type=int, default=6, help="moves beside them, of each live way (%(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="of the storm (%(default)s)")
    parser.add_argument("--moves", type=int, default=100, help="of the storm (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the storm (%(default)s)")
    parser.add_argument("--storm-workers", type=int, nargs="+", default=[2, 3], help="a storm for each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each engine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, orders and moves")
    parser.add_argument("--work-dir", type=Path, default=default_work_dir() / "engine", help="where the models are (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    parser.add_argument("--from", dest="read", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    parser.add_argument("--plot", type=Path, metavar="DIRECTORY", help="draw migration-timeline.png and migration.png there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the figures into this page, where it has a place for them")
    parser.add_argument("--quick", action="store_true", help="does it work? Little of everything: no figures to publish")
    args = parser.parse_args(argv)
    args.parts = args.parts or list(PARTS)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}: there are {', '.join(PARTS)}")
    if args.quick:
        args.shape, args.lengths, args.repeats = "small", [64, 256], 1
        args.split_moves, args.neighbours, args.neighbour_moves = 2, 2, 2
        args.streams, args.moves, args.seconds, args.storm_workers = 8, 10, 4.0, [2]
    for name in ("repeats", "split_moves", "neighbours", "neighbour_moves", "streams", "moves", "seconds", "threads"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if min(args.lengths) < 2 * N_QUIET or max(args.lengths) > MAX_MODEL_LEN - MAX_TOKENS:
        parser.error(f"--lengths must be from {2 * N_QUIET} to {MAX_MODEL_LEN - MAX_TOKENS}")
    if min(args.storm_workers) < 2:
        parser.error("--storm-workers must be at least 2")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {args.json.resolve().parent}")
    if args.page is not None and not args.page.is_file():
        parser.error(f"--page: there is no file {args.page}")
    if args.plot is not None and not args.plot.is_dir():
        parser.error(f"--plot: there is no directory {args.plot}")
    return args


def run(args: argparse.Namespace) -> None:
    if args.plot:
        check_plot(args.plot / "migration.png")
    if args.read:
        result = json.loads(args.read.read_text())
    else:
        result = measure(args)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    if args.quick:
        print("\n--quick: these are no figures, only a sign that it works")
    if args.page:
        fill(args.page, result)
    if args.plot and "downtime" in result:
        plot_timeline(args.plot / "migration-timeline.png", result)
        plot_lengths(args.plot / "migration.png", result)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    result: dict[str, Any] = {"machine": machine(args.threads), "load_before": os.getloadavg()[0], "arguments": arguments}
    progress = Progress()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if {"downtime", "split", "neighbours"} & set(args.parts):
        progress.stage(f"{args.shape} {args.dtype}: starting two workers")
        # Else a request that comes back would find its KV, and nothing would be measured.
        with cluster(args, args.shape, 2, prefix_reuse=False) as two:
            if "downtime" in args.parts:
                result["downtime"], result["timeline"] = asyncio.run(downtime(args, two, progress))
            if "split" in args.parts:
                result["split"] = asyncio.run(split(args, two, progress))
            if "neighbours" in args.parts:
                result["neighbours"] = asyncio.run(neighbours(args, two, progress))
    if "storm" in args.parts:
        result["storm"] = []
        for n_workers in args.storm_workers:
            progress.stage(f"{args.storm_shape}: starting {n_workers} workers")
            # So that one token that differs is one that was lost or doubled.
            with cluster(args, args.storm_shape, n_workers, deterministic=True) as several:
                result["storm"].append(asyncio.run(storm(args, several, progress)))
    progress.clear()
    return result


@contextmanager
def cluster(args: argparse.Namespace, shape: str, n_workers: int, **engine: bool) -> Any:
    """`engine`: settings beside those of all parts."""
    directory = checkpoint(args.work_dir, shape, args.dtype, args.seed, MAX_MODEL_LEN)
    settings = {"n_threads": args.threads, "kv_memory": "768MiB"} | {name: str(on).lower() for name, on in engine.items()}
    with tempfile.TemporaryDirectory(prefix="bench-migration-") as scratch:
        made = Cluster(directory, Path(scratch, "store"), n_workers, settings, Path(scratch, "log"))
        try:
            yield made
        finally:
            made.close()


# --- one by one --------------------------------------------------------------------------------------------------------------


async def downtime(args: argparse.Namespace, two: Cluster, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The moves of each length and repeat, and of one request all that happened to it."""
    rows: list[dict[str, Any]] = []
    answers: dict[int, list[list[int]]] = {}
    #: Of the length that is drawn, the last move in each live way.
    drawn = min(args.lengths, key=lambda length: abs(length - 1024))
    timeline: dict[str, Any] = {"length": drawn}
    progress.stage("downtime", args.repeats * len(args.lengths) * len(WAYS))
    async with open_session(two.url) as session:
        # What a process loads at its first move, it has then.
        warm = random.Random(f"{args.seed} warm")
        stream = await begin(two, session, "warm", prompt_of(warm, 64))
        for way in (*WAYS, *WAYS):
            await move(two, stream, way)
        await end(stream)
        for repeat in range(args.repeats):
            for length in args.lengths:
                rng = random.Random(f"{args.seed} {length}")
                stream = await begin(two, session, f"{length}-{repeat}", prompt_of(rng, length - N_QUIET))
                # Last what lets the request grow most.
                order = random.Random(f"{args.seed} {length} {repeat}").sample(["kv", "blocking", "recompute"], 3)
                for way in (*order, "tokens"):
                    progress.step(f"{way}, {length} tokens, {repeat + 1} of {args.repeats}")
                    record = await move(two, stream, way)
                    rows.append({"length": length, "repeat": repeat, "way": way, **cut_of(stream, record, N_QUIET)})
                    if length == drawn and way in LIVE:
                        timeline[way] = timeline_of(stream, record, N_QUIET)
                await end(stream)
                answers.setdefault(length, []).append(stream.ids)
    for length, all_ids in answers.items():
        n = min(map(len, all_ids))
        if any(ids[:n] != all_ids[0][:n] for ids in all_ids):
            raise BenchError(f"answers of {length} tokens to one prompt differ with when their requests moved")
    return rows, timeline


def prompt_of(rng: random.Random, n_tokens: int) -> list[int]:
    return [rng.randrange(500) for _ in range(n_tokens)]


class Running(Stream):
    """A stream, and the task that reads it; `node`: where its request is."""

    task: asyncio.Task[Stream]
    node: str


async def begin(two: Cluster, session: Any, name: str, prompt: list[int], max_tokens: int = MAX_TOKENS) -> Running:
    stream = Running(name, prompt)
    stream.task = asyncio.create_task(follow(session, stream, max_tokens))
    await stream.until(N_QUIET)
    stream.node = (await asyncio.to_thread(two.row, name))["node"]
    return stream


async def move(two: Cluster, stream: Running, way: str, number: int = 0) -> dict[str, Any]:
    """Move it, and wait for some tokens beyond; what became of it."""
    to = next(node for node in two.nodes if node != stream.node)
    record = await asyncio.to_thread(two.move, stream.node, to, way, number)
    if record["outcome"] != "moved":
        raise BenchError(f"{way}: the request {record['outcome']}: {record['reason']}")
    await stream.until(record["n_tokens"] - len(stream.prompt) + N_QUIET + 2)
    [*_, row] = (await asyncio.to_thread(two.row, stream.request))["moves"]
    stream.node = to
    return record | {"pause_ms": row["pause_ms"], "source": record["source"]}


async def end(stream: Running) -> None:
    """As a client that leaves."""
    stream.task.cancel()
    await asyncio.gather(stream.task, return_exceptions=True)


async def split(args: argparse.Namespace, two: Cluster, progress: Progress) -> dict[str, Any]:
    """Of moves by KV, there and back: what the gap consists of beyond a step, each in ms."""
    length = min(args.lengths, key=lambda length: abs(length - 1024))
    progress.stage("split", args.split_moves)
    rows: list[dict[str, float]] = []
    await asyncio.to_thread(two.note_steps)
    async with open_session(two.url) as session:
        stream = await begin(two, session, "split", prompt_of(random.Random(f"{args.seed} split"), length - N_QUIET))
        for number in range(args.split_moves):
            progress.step(f"move {number + 1} of a request of {length} tokens")
            source = stream.node
            record = await move(two, stream, "kv")
            there, here = [await asyncio.to_thread(two.steps, node) for node in (source, stream.node)]
            rows.append(split_of(stream, record, there, here, N_QUIET))
        await end(stream)
    return {"length": length, "rows": rows}


# --- beside others -----------------------------------------------------------------------------------------------------------


async def neighbours(args: argparse.Namespace, two: Cluster, progress: Progress) -> dict[str, Any]:
    """Gaps, in ms, of the streams that stay: by where they are, and what goes on."""
    rng = random.Random(f"{args.seed} neighbours")
    progress.stage("neighbours", 2 * args.neighbour_moves + 1)
    gaps: dict[str, dict[str, list[float]]] = {}
    async with open_session(two.url) as session:
        staying: list[Running] = []
        while len(staying) < 2 * args.neighbours:
            name = f"staying-{len(staying)}"
            stream = await begin(two, session, name, prompt_of(rng, 128 + 32 * len(staying)))
            here = [each for each in staying if each.node == stream.node]
            if len(here) == args.neighbours:
                # The only one that is no neighbour: the newest.
                await move(two, stream, "kv", number=-1)
            staying.append(stream)
        guest = await begin(two, session, "guest", prompt_of(rng, 1024))
        progress.step("quiet")
        began_at = time.monotonic()
        await guest.until(len(guest.ids) + 60)
        windows = [("quiet", guest.node, began_at, time.monotonic())]
        for number in range(2 * args.neighbour_moves):
            way = LIVE[number % 2]
            progress.step(f"{way} beside {args.neighbours} streams on each side")
            source = guest.node
            record = await move(two, guest, way, number=-1)
            notes = record["notes"]
            windows.append((way, source, notes[0]["began_at"], notes[-1]["ended_at"]))
        for what, source, began, ended in windows:
            for stream in staying:
                place = "quiet" if what == "quiet" else "source" if stream.node == source else "destination"
                found = gaps.setdefault(what, {}).setdefault(place, [])
                found += [1e3 * (b - a) for a, b in zip(stream.at, stream.at[1:], strict=False) if b > began and a < ended]
        errors = [stream.error or stream.reason for stream in (*staying, guest) if stream.error or stream.reason]
        await asyncio.gather(*map(end, (*staying, guest)))
    if errors:
        raise BenchError(f"a stream beside moves ended: {errors[0]}")
    guest_ms = [1e3 * (b - a) for a, b in zip(guest.at, guest.at[1:], strict=False)]
    return {"n_beside": args.neighbours, "gaps_ms": gaps, "guest_step_ms": statistics.median(guest_ms)}


if __name__ == "__main__":
    main()
