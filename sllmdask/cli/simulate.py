"""Without a cluster: ``simulate run`` and ``simulate sweep`` compare policies, ``simulate replay`` reads an event log."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sllmdask.cli.output import Column, Waiting, print_json, print_rows, waiting_line
from sllmdask.cli.shell import FAILED, Command, json_option
from sllmdask.errors import ConfigError

if TYPE_CHECKING:
    from sllmdask.sim.report import Summary
    from sllmdask.sim.scenario import Scenario


#: Events that are named where the decisions differ.
N_DIFFERENT = 5


class _Simulate(click.Group):
    command_class = Command


@click.group(cls=_Simulate)
def simulate() -> None:
    """Run the live controller under a virtual clock, on clusters and workloads that a file describes."""


def _choices(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--plot", "plot_file", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw a picture."),
        click.option(
            "--json", "json_file", metavar="FILE", help="Write every figure there too; '-' is stdout, without the table."
        ),
        click.option("--seeds", type=click.IntRange(min=1), help="Workloads, from seed 0 on, instead of the file's."),
        click.option("--policy", "policies", metavar="NAME", multiple=True, help="Instead of the file's; may be repeated."),
    ):
        function = option(function)
    return function


@simulate.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_choices
def run(
    files: tuple[Path, ...], policies: tuple[str, ...], seeds: int | None, json_file: str | None, plot_file: Path | None
) -> None:
    """Serve the workload of each FILE by each policy, and compare the startup latencies.

    The seconds are those of the model in FILE. They compare policies; they do not say how fast a machine is.
    """
    from sllmdask.sim.report import run_facts

    _check_json(json_file)
    scenarios = [(path, _scenario(path, policies, seeds)) for path in files]
    if plot_file is not None:
        if len(files) > 1:
            raise click.UsageError("--plot draws one FILE")
        _check_plot(plot_file)
    facts, rows = [], []
    for path, scenario in scenarios:
        with waiting_line() as waiting:
            found = _summaries(scenario, waiting, f"{path.stem}: ")
        facts.append(run_facts(scenario, found, path.name))
        rows += [{"file": path.stem, **row} for row in _rows(found)]
        if plot_file is not None:
            from sllmdask.sim.plot import plot_run

            plot_run(plot_file, found, _title(path, scenario))
    several: list[Column] = [("FILE", lambda row: row["file"])] if len(files) > 1 else []
    _tell(facts[0] if len(facts) == 1 else facts, rows, several, json_file)


@simulate.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--over", required=True, metavar="KEY=A,B,...", help="What to vary, and its values: rps=0.2,0.4,0.8")
@_choices
def sweep(
    file: Path, over: str, policies: tuple[str, ...], seeds: int | None, json_file: str | None, plot_file: Path | None
) -> None:
    """Serve the workload of FILE again for each value of one of its keys."""
    from sllmdask.sim.report import sweep_facts
    from sllmdask.sim.scenario import read_variation, varied

    _check_json(json_file)
    key, values = read_variation(over)
    scenario = _scenario(file, policies, seeds)
    scenarios = [(value, varied(scenario, key, value)) for value in values]
    if plot_file is not None:
        _check_plot(plot_file)
        if not all(isinstance(value, int | float) for value in values):
            raise click.UsageError(f"--plot needs numbers for {key}")
    points: list[tuple[Any, Sequence[Summary]]] = []
    with waiting_line() as waiting:
        for i, (value, each) in enumerate(scenarios):
            points.append((value, _summaries(each, waiting, f"{key} {value}: ", i, len(values))))
    if plot_file is not None:
        from sllmdask.sim.plot import plot_sweep

        plot_sweep(plot_file, key, points, _title(file, scenario, key))
    rows = [{"value": value, **row} for value, found in points for row in _rows(found)]
    _tell(sweep_facts(scenario, key, points, file.name), rows, [(key.upper(), lambda row: row["value"])], json_file)


def _scenario(path: Path, policies: Sequence[str], seeds: int | None) -> Scenario:
    from sllmdask.sim.scenario import read_scenario, with_choices

    return with_choices(read_scenario(path), policies, seeds)


def _check_json(json_file: str | None) -> None:
    """Better before the simulation than after."""
    if json_file not in (None, "-") and (not Path(json_file).parent.is_dir() or Path(json_file).is_dir()):
        raise ConfigError(f"--json {json_file}: a file cannot be written there")


def _check_plot(path: Path) -> None:
    from sllmdask.sim.plot import check_plot

    check_plot(path)


def _summaries(scenario: Scenario, waiting: Waiting, what: str, n_before: int = 0, n_parts: int = 1) -> list[Summary]:
    """Every policy with every seed. `n_before` of `n_parts` such comparisons are over, for the line of progress."""
    from sllmdask.sim.experiment import simulate_policy
    from sllmdask.sim.report import summaries

    pairs = [(policy, seed) for policy in scenario.policies for seed in scenario.seeds]
    runs = []
    for i, (policy, seed) in enumerate(pairs):

        def say(part: float, words: str = f"{what}{policy}, seed {seed}", n_over: int = i) -> None:
            percent = 100 * (n_before + (n_over + part) / len(pairs)) / n_parts
            waiting.say(f"{words} {percent:.0f}%")

        say(0.0)
        runs.append(simulate_policy(scenario, policy, seed, on_progress=say))
    return summaries(runs)


def _title(path: Path, scenario: Scenario, key: str = "") -> str:
    workers, workload = scenario.workers, scenario.workload
    n_models = sum(spec.count for spec in scenario.models)
    cv = f" of CV {workload.cv:g}" if workload.arrivals == "gamma" else ""
    rate = "" if key.rpartition(".")[2] == "rps" else f", {workload.rps:g} requests/s"
    return f"simulated: {path.stem}, {n_models} models, {workers.count * workers.slots} slots, {workload.arrivals}{cv}{rate}"


# --- what is printed -------------------------------------------------------------------------------------------------


def _rows(found: Sequence[Summary]) -> list[dict[str, Any]]:
    from sllmdask.sim.report import as_facts

    return [as_facts(each) for each in found]


def _tell(facts: Any, rows: list[dict[str, Any]], before: list[Column], json_file: str | None) -> None:
    if json_file == "-":
        print_json(facts)
        return
    if json_file is not None:
        Path(json_file).write_text(json.dumps(facts, indent=1) + "\n")
    click.echo("Simulated seconds, of the model in the file; mean over the seeds, 95 % interval in brackets.", err=True)
    print_rows(rows, [*before, *_columns()], "")


def _columns() -> list[Column]:
    def seconds(measure: str, statistic: str, *, interval: bool = False) -> Callable[[Mapping[str, Any]], str]:
        def shown(row: Mapping[str, Any]) -> str:
            found = row[measure][statistic]
            text = f"{found['value']:.2f}"
            return f"{text} [{found['low']:.2f} {found['high']:.2f}]" if interval and found["low"] is not None else text

        return shown

    def cold(row: Mapping[str, Any]) -> str:
        starts = row["starts"]
        return " ".join(f"{starts[tier]} {tier}" for tier in ("host", "disk", "peer", "remote") if starts[tier]) or "0"

    return [
        ("POLICY", lambda row: row["policy"]),
        ("STARTUP MEAN", seconds("startup_s", "mean", interval=True)),
        ("P50", seconds("startup_s", "p50")),
        ("P95", seconds("startup_s", "p95")),
        ("P99", seconds("startup_s", "p99", interval=True)),
        ("TTFT P99", seconds("ttft_s", "p99")),
        ("STALLED MEAN", seconds("stalled_s", "mean")),
        ("WITH STALLS P99", seconds("delay_s", "p99", interval=True)),
        ("COLD STARTS", cold),
        ("MOVED", lambda row: row["migrations"]),
        ("PREEMPTED", lambda row: row["preemptions"]),
        ("REFUSED", lambda row: f"{row['starts']['refused']} of {row['n_requests']}"),
    ]


# --- replay ----------------------------------------------------------------------------------------------------------


@simulate.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@json_option
def replay(file: Path, as_json: bool) -> None:
    """Decide again what a live cluster decided, from its event log (scheduler.event_log), and compare."""
    from sllmdask.sim.replay import replay as steps_of

    steps = list(steps_of(file))
    # The log of a scheduler that was killed may lack decisions of its last event.
    different = [
        step for step in steps if step.now[: len(step.then)] != step.then or (step is not steps[-1] and step.then != step.now)
    ]
    rows = [
        {"at": step.event.at, "event": type(step.event).__name__, "line": step.line, **decision}
        for step in steps
        for decision in step.now
        if decision["decision"] != "WakeAt"
    ]
    if as_json:
        print_json(
            {"same": not different, "n_events": len(steps), "different": [step.line for step in different], "decisions": rows}
        )
    else:
        print_rows([row for row in rows if row["decision"] != "Chose"], _DECISION_COLUMNS, "Nothing was decided.")
        if not different:
            click.echo(f"{len(steps)} events lead to the same decisions as they did.", err=True)
    for step in different[:N_DIFFERENT]:
        where = f"line {step.line}: {type(step.event).__name__} at {step.event.at:.3f}"
        click.echo(f"{where}: {_difference(step.then, step.now)}", err=True)
    if different:
        click.echo(f"Error: of {len(steps)} events, {len(different)} lead to other decisions than they did.", err=True)
        sys.exit(FAILED)


def _difference(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """The first decision that is another one, or is missing."""
    pairs = zip_longest(then, now)
    old, new = next((old, new) for old, new in pairs if old != new)
    return f"then {json.dumps(old) if old else 'nothing more'}; now {json.dumps(new) if new else 'nothing more'}"


def _fact(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row.get(name, ""))


_DECISION_COLUMNS: list[Column] = [
    ("AT", lambda row: f"{row['at']:.3f}"),
    ("EVENT", _fact("event")),
    ("DECISION", _fact("decision")),
    ("MODEL", _fact("model")),
    ("REQUEST", lambda row: row.get("request") or " ".join(row.get("requests", ()))),
    ("INSTANCE", _fact("instance")),
    ("WORKER", _fact("worker")),
    ("WHY", lambda row: row.get("cause") or (row["error"]["error"] if "error" in row else "")),
]
