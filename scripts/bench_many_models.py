#!/usr/bin/env python
"""Many models on a machine that has room for few: how long until the first token, and does anything get lost?

Each contender is a real server of its own, asked over HTTP by one client that sends at the times of one trace, whether or not
earlier answers have come: arrivals in bursts (Gamma, coefficient of variation ``--cv``), models by Zipf's law. All get the same
trace, one after the other, and the whole machine. Answers are streamed, greedy, ``--new-tokens`` long at most; the time to the
first token is from the moment the request was due.

``sllmdask``: ``sllmdask up`` with as many slots as there is room. ``naive``: an aiohttp server that keeps the models used last,
as many, by ``from_pretrained`` and ``generate`` (``bench_many_models_naive.py``): what a team would write in an afternoon.
``transformers serve``: it loads what is asked for, one at a time, and lets go after ``--model-timeout``; it has no bound on how
many it keeps, so it may have room for all.

Afterwards nothing may be lost or stuck: every request has its answer, and our cluster holds the slots and the bytes that it
held when it was idle before.

    python scripts/bench_many_models.py --quick
    python scripts/bench_many_models.py --seconds 120 --repeats 3 --json many.json --plot many.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_engine_http import Server, free_port
from scripts.bench_engine_measure import machine, percentile
from scripts.bench_load import default_work_dir
from scripts.bench_load_measure import BenchError
from scripts.bench_load_report import Progress, align, check_plot

_ROOT = Path(__file__).resolve().parent.parent
#: Seconds after the last arrival within which every answer has to be there.
DRAIN_S = 180.0
#: Seconds after which an idle instance of ours leaves, so that "back to the start" can be seen; longer than any gap of the trace.
KEEP_ALIVE_S = 60.0


@dataclass(frozen=True)
class Arrival:
    """A request: seconds from the start, and the number of its model."""

    at: float
    model: int


@dataclass(frozen=True)
class Answer:
    """What became of a request: seconds from when it was due; ``None``: it never came. `error` is empty if all is well."""

    at: float
    model: int
    first_token_s: float | None
    whole_s: float | None
    n_tokens: int
    error: str = ""


def make_trace(n_models: int, seconds: float, per_s: float, cv: float, zipf: float, seed: int) -> list[Arrival]:
    """Arrivals whose gaps are Gamma-distributed with mean ``1 / per_s`` and coefficient of variation `cv`; a model of rank ``r``
    is asked for in proportion to ``r ** -zipf``."""
    rng = random.Random(f"many models {seed}")
    shape = cv**-2
    weights = [(rank + 1) ** -zipf for rank in range(n_models)]
    order = list(range(n_models))
    rng.shuffle(order)
    trace, at = [], 0.0
    while True:
        at += rng.gammavariate(shape, 1 / (shape * per_s))
        if at >= seconds:
            return trace
        trace.append(Arrival(at, rng.choices(order, weights)[0]))


def make_models(work_dir: Path, n: int) -> list[Path]:
    """`n` directories with the demo models in turn; each is a model of its own for whoever serves it."""
    directories = [work_dir / f"model-{number:02}" for number in range(n)]
    for number, directory in enumerate(directories):
        if not directory.is_dir():
            demo = _ROOT / "sllmdask" / "demo" / ("demo-llama", "demo-qwen")[number % 2]
            partial = directory.with_name(directory.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(demo, partial)
            partial.rename(directory)
    return directories


# --- contenders ------------------------------------------------------------------------------------------------------


class Contender(Server):
    """A server of many models, by number."""

    name: ClassVar[str]

    def __init__(self, command: list[str], port: int, directories: Sequence[Path], env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.directories = directories
        with tempfile.TemporaryFile() as log:
            try:
                super().__init__(command, self.url, env, log)
            except BenchError:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace")[-2000:])
                raise

    def model_name(self, number: int) -> str:
        return str(self.directories[number])

    def wait_for_models(self) -> None:
        """Until all are there to be asked for."""

    def state(self) -> dict[str, Any] | None:
        """What is held now; ``None``: it does not say."""
        return None


class Ours(Contender):
    name = "sllmdask"

    def __init__(self, directories: Sequence[Path], room: int) -> None:
        port = free_port()
        up = [sys.executable, "-c", "from sllmdask.cli import main; main()", "up"]
        models = [f"{self._name(number)}={directory}" for number, directory in enumerate(directories)]
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "DASK_SLLMDASK__SCHEDULER__KEEP_ALIVE": f"{KEEP_ALIVE_S:.0f}s",
            "DASK_SLLMDASK__ENGINE__N_THREADS": "1",
        }
        command = [*up, *models, "--workers", "1", "--slots-per-worker", str(room), "--port", str(port)]
        super().__init__(command, port, directories, env)

    @staticmethod
    def _name(number: int) -> str:
        return f"model-{number:02}"

    def model_name(self, number: int) -> str:
        return self._name(number)

    def wait_for_models(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=30) as response:
                if len(json.load(response)["data"]) == len(self.directories):
                    return
            if time.monotonic() > deadline:
                raise BenchError("not all models were deployed within a minute")
            time.sleep(0.1)

    def state(self) -> dict[str, Any] | None:
        with urllib.request.urlopen(f"{self.url}/admin/cluster", timeout=30) as response:
            workers = json.load(response)["workers"]
        return {
            "slots_used": sum(worker["slots_used"] for worker in workers),
            "n_requests": sum(one["n_requests"] for worker in workers for one in worker["instances"]),
            "host_used": sum(worker["tiers"]["host"]["used"] for worker in workers),
            "host_capacity": sum(worker["tiers"]["host"]["capacity"] for worker in workers),
        }


class Naive(Contender):
    name = "naive"

    def __init__(self, directories: Sequence[Path], room: int) -> None:
        port = free_port()
        script = str(Path(__file__).with_name("bench_many_models_naive.py"))
        command = [sys.executable, script, "--port", str(port), "--room", str(room)]
        super().__init__(command, port, directories, {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})


class TransformersServe(Contender):
    name = "transformers serve"

    def __init__(self, directories: Sequence[Path], room: int) -> None:  # noqa: ARG002 - it has no such bound
        port = free_port()
        serve = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
        options = ["--dtype", "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        timeout = ["--model-timeout", f"{KEEP_ALIVE_S:.0f}"]
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        super().__init__([*serve, *options, *timeout], port, directories, env)


CONTENDERS: Mapping[str, Callable[[Sequence[Path], int], Contender]] = {one.name: one for one in (Ours, Naive, TransformersServe)}


# --- one turn ----------------------------------------------------------------------------------------------------------


async def play(contender: Contender, trace: Sequence[Arrival], new_tokens: int, progress: Progress) -> list[Answer]:
    """Send every request when it is due; all answers, in the order of the trace."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=trace[-1].at + DRAIN_S)
    async with aiohttp.ClientSession(contender.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        begin = time.perf_counter() + 0.5
        tasks = []
        for arrival in trace:
            await asyncio.sleep(max(0.0, begin + arrival.at - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, contender, arrival, begin, new_tokens)))
            progress.step(f"{arrival.at:.0f} s, {sum(task.done() for task in tasks)} of {len(tasks)} answered")
        return list(await asyncio.gather(*tasks))


async def ask(session: Any, contender: Contender, arrival: Arrival, begin: float, new_tokens: int) -> Answer:
    import aiohttp

    due = begin + arrival.at
    body = {
        "model": contender.model_name(arrival.model),
        "messages": [{"role": "user", "content": "Tell me a story about a fox and a bear."}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
    }
    first: float | None = None
    n_tokens = 0
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                return Answer(arrival.at, arrival.model, None, None, 0, f"{response.status} {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    return Answer(arrival.at, arrival.model, first, None, n_tokens, str(frame["error"])[:200])
                choices = frame.get("choices") or [{}]
                if choices[0].get("delta", {}).get("content"):
                    first = time.perf_counter() - due if first is None else first
                    n_tokens += 1
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        return Answer(arrival.at, arrival.model, first, None, n_tokens, repr(error)[:200])
    if first is None:
        return Answer(arrival.at, arrival.model, None, None, 0, "no token came")
    return Answer(arrival.at, arrival.model, first, time.perf_counter() - due, n_tokens)


def turn(name: str, directories: Sequence[Path], trace: Sequence[Arrival], args: argparse.Namespace, progress: Progress) -> Any:
    """A server from its start to its end: its answers, and what it held before and after."""
    contender = CONTENDERS[name](directories, args.room)
    try:
        contender.wait_for_models()
        # One request that does not count: what a process loads at its first one, it has then.
        warm = asyncio.run(play(contender, [Arrival(0.0, trace[0].model)], 2, progress))
        if warm[0].error:
            raise BenchError(f"it cannot serve: {warm[0].error}")
        before = wait_for_rest(contender)
        progress.stage(f"{name}: {len(trace)} requests in {args.seconds:.0f} s", len(trace))
        answers = asyncio.run(play(contender, trace, args.new_tokens, progress))
        return answers, before, wait_for_rest(contender)
    finally:
        contender.close()


def wait_for_rest(contender: Contender) -> dict[str, Any] | None:
    """What it holds when its idle instances have left."""
    deadline = time.monotonic() + KEEP_ALIVE_S + 30
    while (state := contender.state()) is not None and state["slots_used"]:
        if time.monotonic() > deadline:
            return state
        time.sleep(0.5)
    return state


# --- report ------------------------------------------------------------------------------------------------------------


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    good = [one.first_token_s for one in answers if not one.error and one.first_token_s is not None]
    whole = [one.whole_s for one in answers if one.whole_s is not None]
    facts: dict[str, float] = {"n": len(answers), "n_failed": sum(bool(one.error) for one in answers)}
    if good:
        facts |= {"mean_s": sum(good) / len(good), "p50_s": percentile(good, 0.5), "p99_s": percentile(good, 0.99)}
        facts |= {"max_s": max(good), "whole_p50_s": percentile(whole, 0.5), "whole_p99_s": percentile(whole, 0.99)}
    return facts


def table(results: Mapping[str, list[list[Answer]]]) -> str:
    """All turns of a contender together."""
    lines: list[Sequence[str]] = [("", "requests", "failed", "mean ms", "p50 ms", "p99 ms", "max ms", "answer p50 ms", "p99 ms")]
    for name, turns in results.items():
        facts = summary([answer for answers in turns for answer in answers])
        numbers = [facts.get(key) for key in ("mean_s", "p50_s", "p99_s", "max_s", "whole_p50_s", "whole_p99_s")]
        cells = ["-" if number is None else f"{1e3 * number:.0f}" for number in numbers]
        lines.append((("* " if name == Ours.name else "  ") + name, str(facts["n"]), str(facts["n_failed"]), *cells))
    return align(lines)


def plot(path: Path, results: Mapping[str, list[list[Answer]]], title: str) -> None:
    """The share of requests whose first token came within so many seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, turns in results.items():
        seconds = sorted(one.first_token_s for answers in turns for one in answers if one.first_token_s is not None)
        n = sum(map(len, turns))
        axes.step(seconds, [100 * (rank + 1) / n for rank in range(len(seconds))], where="post", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("requests, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except BenchError as error:
        sys.exit(f"bench_many_models: {error}")
    except KeyboardInterrupt:
        sys.exit("bench_many_models: stopped")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--models", type=int, default=12, help="how many there are (%(default)s)")
    parser.add_argument("--room", type=int, default=3, help="how many can be loaded at a time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals (%(default)s)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second (%(default)s)")
    parser.add_argument("--cv", type=float, default=4.0, help="coefficient of variation of the gaps (%(default)s)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the models' popularity (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each contender, each with a trace of its own")
    parser.add_argument("--seed", type=int, default=0, help="of the traces")
    parser.add_argument("--work-dir", type=Path, default=default_work_dir() / "many", help="where the models are (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the distribution: .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="does it work? Few requests: no figures to publish")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.room, args.seconds, args.rate = 3, 2, 3.0, 2.0
    for name in ("models", "room", "new_tokens", "repeats", "seconds", "rate", "cv"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{name}: there is no directory {path.resolve().parent}")
    return args


def run(args: argparse.Namespace) -> None:
    if args.plot:
        check_plot(args.plot)
    progress = Progress()
    directories = make_models(args.work_dir, args.models)
    facts = machine(1)
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_nbytes'] / 1e9:.0f} GB", flush=True)
    results: dict[str, list[list[Answer]]] = {}
    held: dict[str, list[Any]] = {}
    failed: dict[str, str] = {}
    for repeat in range(args.repeats):
        trace = make_trace(args.models, args.seconds, args.rate, args.cv, args.zipf, args.seed + repeat)
        order = [name for name in args.contenders if name not in failed]
        random.Random(f"{args.seed} {repeat}").shuffle(order)
        for name in order:
            progress.stage(f"{name}: starting")
            with tempfile.TemporaryDirectory(prefix="bench-many-") as home:
                os.environ["DASK_SLLMDASK__WORKER__STORE_DIR"] = home
                try:
                    answers, before, after = turn(name, directories, trace, args, progress)
                except (BenchError, ImportError, OSError) as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    progress.say(f"not run: {name}: {failed[name]}")
                    continue
            results.setdefault(name, []).append(answers)
            held.setdefault(name, []).append({"before": before, "after": after})
    progress.clear()
    if not results:
        raise BenchError("nobody could be measured")
    title = f"{args.models} models, room for {args.room}, {args.rate:g} requests/s, CV {args.cv:g}, Zipf {args.zipf:g}"
    print(f"\n{title}, {args.seconds:.0f} s, {args.new_tokens} tokens each\n{table(results)}")
    for name, states in held.items():
        for state in states:
            if state["before"] is not None:
                print(f"{name}: held before {state['before']}, after {state['after']}")
    for name, turns in results.items():
        for error in sorted({one.error for answers in turns for one in answers if one.error})[:5]:
            print(f"{name}: failed: {error}")
    if args.quick:
        print("\n--quick: these are no figures, only a sign that it works")
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        answers = {name: [[asdict(one) for one in answers] for answers in turns] for name, turns in results.items()}
        sums = {name: summary([one for answers in turns for one in answers]) for name, turns in results.items()}
        report = {"machine": facts, "arguments": arguments, "summary": sums, "held": held, "failed": failed, "answers": answers}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, results, title)


if __name__ == "__main__":
    main()
