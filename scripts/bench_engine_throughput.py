"""``bench_engine.py --scenario throughput``: tokens per second and per CPU second, next to transformers on the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts import bench_engine_http as http
from scripts.bench_engine_contenders import MANAGER, ONE_BY_ONE, OURS, STATIC, Manager, OneByOne, OurEngine, Padded
from scripts.bench_engine_measure import Ran, Work, first_difference, make_work
from scripts.bench_engine_model import checkpoint, n_vocab
from scripts.bench_engine_run import Scenario, Variant, ratio_cell
from scripts.bench_load_measure import estimate, estimate_ratio, turns
from scripts.bench_load_process import ContenderFailed, ContenderProcess
from scripts.bench_load_report import Bar, Panel, align

_UNITS = ("tokens_per_s", "tokens_per_cpu_s")


@dataclass(frozen=True)
class Entrant:
    """A contender that may take part: how to make it in its process, given directory, dtype, device and threads."""

    name: str
    ours: bool
    make: Callable[..., Any]
    #: Others are compared with the first entrant; over HTTP, with the first that is asked over HTTP.
    over_http: bool = False


def entrants(variants: Sequence[Variant]) -> list[Entrant]:
    ours = [Entrant(variant.name(OURS), True, partial(make_ours, variant.settings)) for variant in variants]
    served = [Entrant(variant.name(http.OURS), True, partial(make_our_server, variant.settings), True) for variant in variants]
    return [
        *ours,
        Entrant(MANAGER, False, Manager),
        Entrant(STATIC, False, Padded),
        Entrant(ONE_BY_ONE, False, OneByOne),
        *served,
        Entrant(http.SERVE, False, http.TransformersServe, True),
    ]


def make_ours(settings: dict[str, Any], directory: Path, dtype: str, device: str, n_threads: int) -> OurEngine:  # noqa: ARG001
    return OurEngine(directory, device, n_threads, settings)


def make_our_server(settings: dict[str, Any], directory: Path, dtype: str, device: str, n_threads: int) -> http.OurServer:
    return http.OurServer(directory, dtype, device, n_threads, settings)


class Throughput(Scenario):
    """All contenders of a kind are started once for a model, and take turns for each number of streams and kind of lengths."""

    def run(self) -> None:
        for model in self.args.models:
            for dtype in self.args.dtypes:
                directory = checkpoint(self.args.work_dir, model, dtype, self.args.seed)
                for over_http in (False, True):
                    chosen = [one for one in self.chosen if one.over_http == over_http]
                    if chosen:
                        self._compare(model, dtype, directory, chosen)

    def _compare(self, model: str, dtype: str, directory: Path, chosen: list[Entrant]) -> None:
        args = self.args
        with ExitStack() as stack:
            processes: dict[str, ContenderProcess] = {}
            for entrant in chosen:
                self.progress.stage(f"{model} {dtype}: starting {entrant.name}")
                process = self.start(stack, entrant.name, entrant.make, directory, dtype, args.device, args.threads)
                if process is not None:
                    processes[entrant.name] = process
            for n_streams in args.streams:
                for lengths in args.lengths:
                    if n_streams == 1 and lengths == "mixed" and "uniform" in args.lengths:
                        continue  # nothing to mix
                    work = make_work(n_streams, n_vocab(model), lengths, args.prompt_tokens, args.new_tokens, args.seed)
                    ran = self._take_turns(f"{model} {dtype}, {n_streams} streams, {lengths}", processes, work)
                    if not ran:
                        continue
                    ours = [entrant.name for entrant in chosen if entrant.ours and entrant.name in ran]
                    answers = {name: runs[0].answers for name, runs in ran.items()}
                    about = {"model": model, "dtype": dtype, "streams": n_streams, "lengths": lengths}
                    result = about | self._summary(ran, ours, work, chosen[0].over_http)
                    if dtype == "float32" and ours:
                        judge = processes.get(ONE_BY_ONE)
                        result["answers"] = {
                            name: compare_answers(answers[ours[0]], others, work, judge if not chosen[0].over_http else None)
                            for name, others in answers.items()
                            if name != ours[0]
                        }
                    self.add(result, text(result), panel(result, ours))

    def _take_turns(self, what: str, processes: dict[str, ContenderProcess], work: Work) -> dict[str, list[Ran]]:
        """The runs of each; the first one is to warm up. Who fails is dropped, here and from `processes`."""
        ran: dict[str, list[Ran]] = {name: [] for name in processes}
        names = list(processes)
        self.progress.stage(what, (self.args.repeats + 1) * len(names))
        order = [(0, name) for name in names] + list(turns(names, self.args.repeats, self.args.seed))
        for _, name in order:
            if name not in processes:
                continue
            self.progress.step(name)
            piece = work.first(self.args.one_by_one) if name == ONE_BY_ONE else work
            try:
                ran[name].append(processes[name].call("run", piece, timeout_s=self.args.timeout))
            except ContenderFailed as error:
                self.fail(name, f"{what}: {error}")
                processes.pop(name).close()
                del ran[name]
        return ran

    def _summary(self, ran: dict[str, list[Ran]], ours: list[str], work: Work, over_http: bool) -> dict[str, Any]:
        rates = {
            name: {
                "tokens_per_s": [run.n_tokens / run.wall_s for run in runs[1:]],
                "tokens_per_cpu_s": [run.n_tokens / run.cpu_s for run in runs[1:]],
            }
            for name, runs in ran.items()
        }
        return {
            "over_http": over_http,
            "n_tokens": sum(work.lengths),
            "contenders": {
                name: {
                    "ours": name in ours,
                    **{unit: asdict(estimate(of[unit])) for unit in _UNITS},
                    "ratio_to": {
                        other: {unit: asdict(estimate_ratio(of[unit], rates[other][unit])) for unit in _UNITS}
                        for other in rates
                        if other != name
                    },
                    "turns": of,
                }
                for name, of in rates.items()
            },
            "load": os.getloadavg()[0],
        }


def compare_answers(ours: list[Any], theirs: list[Any], work: Work, judge: ContenderProcess | None) -> dict[str, Any]:
    """How many answers are equal; for each that is not, where they part, and by how little the best token won there.

    The margin is that of a plain forward pass over what both said before.
    """
    differences = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        place = first_difference(mine, other)
        if place is None:
            continue
        margin = None
        if judge is not None:
            margin = judge.call("margin", work.prompts[number] + mine[:place], timeout_s=600)
        differences.append({"request": number, "index": place, "margin": margin})
    n = min(len(ours), len(theirs))
    return {"n": n, "n_equal": n - len(differences), "differences": differences}


def text(result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    bases = [base for base in (http.SERVE if result["over_http"] else MANAGER, ONE_BY_ONE) if base in contenders]
    lines: list[tuple[str, ...]] = [
        (
            "",
            "tokens/s",
            "95 %",
            "tokens/CPU s",
            "95 %",
            *(f"CPU x {base.split(', ')[0 if result['over_http'] else -1]}" for base in bases),
            "equal answers",
        )
    ]
    for name, of in contenders.items():
        equal = result.get("answers", {}).get(name)
        lines.append(
            (
                ("* " if of["ours"] else "  ") + name,
                *(cell for unit in _UNITS for cell in (f"{of[unit]['median']:.1f}", _range(of[unit]))),
                *(ratio_cell(of["ratio_to"].get(base, {}).get("tokens_per_cpu_s")) for base in bases),
                f"{equal['n_equal']} of {equal['n']}" if equal else "",
            )
        )
    title = "{model} {dtype}, {streams} streams, {lengths} lengths, {n_tokens} tokens (load {load:.1f})".format(**result)
    notes = [
        f"  {name}: request {one['request']} differs at token {one['index']}, margin of the two best logits there: "
        + ("not known" if one["margin"] is None else f"{one['margin']:.2g}")
        for name, equal in result.get("answers", {}).items()
        for one in equal["differences"][:4]
    ]
    return "\n".join([title, align(lines), *notes])


def _range(of: dict[str, float]) -> str:
    return f"{of['low']:.1f}-{of['high']:.1f}"


def panel(result: dict[str, Any], ours: Sequence[str]) -> Panel:
    from scripts.bench_load_measure import Estimate

    bars = [
        Bar(name, name in ours, Estimate(**of["tokens_per_cpu_s"]), f"{of['tokens_per_cpu_s']['median']:.0f}")
        for name, of in result["contenders"].items()
    ]
    title = "{model} {dtype}, {streams} streams, {lengths} lengths".format(**result)
    return Panel(title, "tokens per CPU second", bars, None)
