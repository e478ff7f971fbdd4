"""For ``bench_migration.py``: what the times mean, a report, two pictures. Pure but for writing the pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.bench_engine_measure import percentile
from scripts.bench_load_measure import BenchError
from scripts.bench_load_report import align

#: The ways that a user's request moves in, and those that they are measured against.
LIVE, STOPPED = ("kv", "tokens"), ("blocking", "recompute")
NAMES = {
    "kv": "KV copy, live",
    "tokens": "token handoff, live",
    "blocking": "stop, then copy KV",
    "recompute": "stop, then recompute",
}
#: Around what a page of the documentation has of what was measured.
BEGIN, END = "<!-- measured by scripts/bench_migration.py -->\n", "<!-- end of what was measured -->\n"
_COLOURS = {"kv": "#1b6ca8", "tokens": "#d9822b", "blocking": "#7a9cb8", "recompute": "#b8a07a"}
_SOURCE, _DESTINATION = "#404040", "#2a9d5c"


# --- numbers -----------------------------------------------------------------------------------------------------------------


def cut_of(stream: Any, record: Mapping[str, Any], n_quiet: int) -> dict[str, Any]:
    """What a client saw of a move: `gap_ms`, before the first token of the destination, and what a step takes around it.

    `stream` has the tokens' times in ``at`` (s) and its ``prompt``; `record` is a ``MoveRecord`` with ``pause_ms``.
    `step_ms`: the median gap of the `n_quiet` tokens after the first one at the destination, where nothing else is done.
    """
    first = record["n_tokens"] - len(stream.prompt)
    at = stream.at
    after = [1e3 * (at[index + 1] - at[index]) for index in range(first, first + n_quiet)]
    kept = ("n_tokens", "nbytes", "steps", "seconds", "stop_ms", "pause_ms")
    return {"gap_ms": 1e3 * (at[first] - at[first - 1]), "step_ms": statistics.median(after)} | {key: record[key] for key in kept}


def split_of(
    stream: Any,
    record: Mapping[str, Any],
    there: Sequence[tuple[float, float]],
    here: Sequence[tuple[float, float]],
    n_quiet: int,
) -> dict[str, float]:
    """What the gap at a cut consists of beyond a step, in ms.

    `there`, `here`: when the steps of the source and of the destination began and ended. ``before``: from the last one there to
    the first one here; ``longer``: that one than the `n_quiet` after it; ``later``: its token to the client than the one before.
    """
    first = record["n_tokens"] - len(stream.prompt)
    # Of the steps here, those since it left; a request that comes back was here before.
    last_end = max(end for _, end in there if end < stream.at[first])
    steps = [(begin, end) for begin, end in here if begin > last_end]
    took = [end - begin for begin, end in steps]
    seconds = {
        "before": steps[0][0] - last_end,
        "longer": took[0] - statistics.median(took[1 : n_quiet + 1]),
        "later": (stream.at[first] - steps[0][1]) - (stream.at[first - 1] - last_end),
        "step": statistics.median(took[1 : n_quiet + 1]),
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def timeline_of(stream: Any, record: Mapping[str, Any], n_quiet: int) -> dict[str, Any]:
    """The tokens around a move, by index and seconds from its beginning, and its stages."""
    first = record["n_tokens"] - len(stream.prompt)
    notes = record["notes"]
    begin = notes[0]["began_at"]
    stop = min(len(stream.at), first + n_quiet)
    # A little of before, so that what changes can be seen.
    since = begin - max(0.1, 0.25 * (stream.at[first] - begin))
    tokens = [[index, stream.at[index] - begin] for index in range(stop) if stream.at[index] > since]
    return {
        "tokens": tokens,
        "first_at_destination": first,
        "stages": stages_of(notes, begin),
        "steps": record["steps"],
        "nodes": [record["source"], record["destination"]],
    }


def stages_of(notes: Sequence[Mapping[str, Any]], begin: float) -> list[tuple[str, float, float]]:
    """Name, begin and end (s after `begin`) of what a move consists of: the reservation, each stage or round, the commit."""
    found: list[tuple[str, float, float]] = []
    for note in notes:
        name = f"{note['n_before']}" if note["op"] == "append" else note["op"]
        if name not in ("extend", "query", "abort"):
            if found and found[-1][0] == name:
                found[-1] = (name, found[-1][1], note["ended_at"] - begin)
            else:
                found.append((name, note["began_at"] - begin, note["ended_at"] - begin))
    return found


def gap_facts(gaps_ms: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(gaps_ms),
        "p50_ms": percentile(gaps_ms, 0.5),
        "p99_ms": percentile(gaps_ms, 0.99),
        "max_ms": max(gaps_ms),
    }


def by_length(rows: Sequence[Mapping[str, Any]], way: str) -> dict[int, dict[str, float]]:
    """Medians over the repeats of one way, by length. `beyond_ms`: what the gap is longer than a step.

    `transport_ms`: what the last bytes take alone, at the speed of :func:`copy_rate`.
    """
    found: dict[int, dict[str, float]] = {}
    rate = copy_rate(rows)
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length and row["way"] == way]
        if not mine:
            continue
        facts = {
            key: statistics.median(row[key] for row in mine) for key in ("gap_ms", "step_ms", "stop_ms", "seconds", "nbytes")
        }
        facts["pause_ms"] = statistics.median(row["pause_ms"] for row in mine if row["pause_ms"] is not None)
        facts["beyond_ms"] = statistics.median(row["gap_ms"] - row["step_ms"] for row in mine)
        facts["last"] = statistics.median(row["steps"][-1] for row in mine)
        facts["transport_ms"] = 1e3 * facts["last"] / rate if way == "kv" else 0.0
        facts["min_ms"], facts["max_ms"] = (extreme(row["gap_ms"] for row in mine) for extreme in (min, max))
        found[length] = facts
    return found


def copy_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Bytes of KV per second where nothing else is done, from the blocking copies of the longest requests."""
    longest = max(row["length"] for row in rows)
    seconds = [
        (row["nbytes"], (row["gap_ms"] - row["step_ms"]) / 1e3)
        for row in rows
        if row["way"] == "blocking" and row["length"] == longest
    ]
    rates = [nbytes / s for nbytes, s in seconds if s > 0]
    return statistics.median(rates) if rates else float("inf")


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was to be shown, and what came out."""
    ways = {way: by_length(rows, way) for way in NAMES}
    lengths = sorted(ways["kv"])
    shortest, longest = lengths[0], lengths[-1]
    kv, said = ways["kv"], []
    growth = kv[longest]["gap_ms"] / kv[shortest]["gap_ms"]
    said.append(f"KV copy: the gap at {longest} tokens is {growth:.2f} times that at {shortest} (at most 2 was to be).")
    for length in lengths:
        facts = kv[length]
        step, alone = facts["step_ms"], facts["beyond_ms"] - facts["transport_ms"]
        said.append(
            f"KV copy: at {length} tokens, the gap is {facts['beyond_ms']:.1f} ms longer than a step of {step:.1f} ms, "
            f"{facts['transport_ms']:.1f} of these for the last bytes; the rest is {alone / step:.2f} of a step (0.1 was to be)."
        )
    for length in lengths:
        ratio = ways["tokens"][length]["gap_ms"] / ways["recompute"][length]["gap_ms"]
        goal = " (1/20 was to be)" if length == 1024 else ""
        said.append(f"Token handoff: at {length} tokens its gap is 1/{1 / ratio:.1f} of that of recomputing{goal}.")
    for mine, other in (("kv", "blocking"), ("tokens", "recompute"), ("kv", "tokens")):
        loses = [length for length in lengths if ways[mine][length]["gap_ms"] >= ways[other][length]["gap_ms"]]
        where = "at every length" if not loses else f"but not at {', '.join(map(str, loses))} tokens"
        said.append(f"{NAMES[mine]} has a shorter gap than {NAMES[other]}, {where}.")
    faster = [length for length in lengths if ways["tokens"][length]["seconds"] < kv[length]["seconds"]]
    where = f"at {', '.join(map(str, faster))} tokens" if faster else "at no length"
    said.append(f"As a whole, the move by tokens is over sooner than that of KV {where}.")
    return said


# --- words -------------------------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> str:
    """All parts that are in `result`, as tables and sentences."""
    facts = result["machine"]
    parts = [f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_nbytes'] / 1e9:.0f} GB"]
    if "downtime" in result:
        rows = result["downtime"]
        parts += [downtime_table(rows), "\n".join(verdicts(rows))]
    if "split" in result:
        parts.append(split_text(result["split"]))
    if "neighbours" in result:
        parts.append(neighbours_table(result["neighbours"]))
    parts += [storm_text(one) for one in result.get("storm", ())]
    return "\n\n".join(parts)


def downtime_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines: list[Sequence[str]] = [
        (
            "gap at the client, ms",
            "tokens",
            "median",
            "min",
            "max",
            "a step",
            "beyond",
            "front door",
            "stopped",
            "sent last",
            "whole s",
        )
    ]
    for way, name in NAMES.items():
        for length, facts in by_length(rows, way).items():
            numbers = [facts[key] for key in ("gap_ms", "min_ms", "max_ms", "step_ms", "beyond_ms", "pause_ms", "stop_ms")]
            last = f"{facts['last'] / 1024:.0f} KiB" if way in ("kv", "blocking") else f"{facts['last']:.0f} tokens"
            lines.append((name, str(length), *(f"{number:.1f}" for number in numbers), last, f"{facts['seconds']:.2f}"))
    return align(lines)


def split_text(facts: Mapping[str, Any]) -> str:
    rows = facts["rows"]
    ms = {name: statistics.median(row[name] for row in rows) for name in ("step", "before", "longer", "later")}
    return (
        f"Of {len(rows)} moves by KV at {facts['length']} tokens, medians: {ms['before']:.1f} ms from the source's last step to "
        f"the destination's first; that one takes {ms['longer']:.1f} ms longer than those after it, of {ms['step']:.1f} ms; and "
        f"its token takes {ms['later']:.1f} ms longer to the client than the one before."
    )


def neighbours_table(facts: Mapping[str, Any]) -> str:
    lines: list[Sequence[str]] = [
        (f"gaps of {facts['n_beside']} streams that stay, on each worker, ms", "n", "p50", "p99", "max")
    ]
    for name, found in _neighbours(facts):
        lines.append((name, str(found["n"]), *(f"{found[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms"))))
    return align(lines)


def _neighbours(facts: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [
        ("nothing moves" if what == "quiet" else f"{NAMES[what]}: at the {place}", gap_facts(places[place]))
        for what, places in facts["gaps_ms"].items()
        for place in sorted(places, reverse=True)
    ]


def storm_text(one: Mapping[str, Any]) -> str:
    moved = one["outcomes"].get("moved", 0)
    ways = ", ".join(f"{n} as {way}" for way, n in sorted(one["by_way"].items()))
    others = "".join(f", {n} {outcome}" for outcome, n in sorted(one["outcomes"].items()) if outcome != "moved")
    streams = f"{one['n_streams']} streams of {one['n_tokens']} tokens on {one['n_workers']} workers"
    lines = [
        f"Storm: {streams}, {moved} moves in {one['seconds']:.0f} s ({ways}){others}",
        f"streams that failed: {one['n_failed']}; with other tokens than undisturbed: {one['n_other_tokens']}",
    ]
    for name, facts in (("undisturbed", one["quiet"]), ("with moves", one["moving"]), ("at the cuts", one["pauses"])):
        if facts:
            lines.append(
                f"gaps {name}: p50 {facts['p50_ms']:.1f} ms, p99 {facts['p99_ms']:.1f} ms, longest {facts['max_ms']:.1f} ms"
            )
    same = "as before" if one["held_after"] == one["held_before"] else f"{one['held_after']}, before {one['held_before']}"
    lines.append(f"requests, blocks and sequences held afterwards: {same}")
    lines += [f"stayed: {n} times: {reason}" for reason, n in one["reasons"].items()]
    return "\n".join(lines)


# --- a page of the documentation -----------------------------------------------------------------------------------------------


def fill(page: Path, result: Mapping[str, Any]) -> None:
    """Put what was measured into `page`, between the two lines that are there for it. Raises :class:`BenchError` without them."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{page} has no line {BEGIN.strip()!r} with {END.strip()!r} after it")
    page.write_text(before + begin + as_markdown(result) + end + after)


def as_markdown(result: Mapping[str, Any]) -> str:
    facts, arguments = result["machine"], result["arguments"]
    model = f"Model `{arguments['shape']}` of `scripts/bench_engine_model.py` in {arguments['dtype']}"
    where = f"{arguments['threads']} thread for each engine, {facts['cpu']}, {facts['cores']} cores for all processes"
    how = f"load of others: {result['load_before']:.1f}; medians of {arguments['repeats']}"
    parts = [f"{model}, {where}; {how}. The gap at the cut, at the client:"]
    if "downtime" in result:
        parts += [_downtime_markdown(result["downtime"]), "\n".join(f"- {line}" for line in verdicts(result["downtime"]))]
    if "split" in result:
        parts.append("- " + split_text(result["split"]))
    if "neighbours" in result:
        parts.append(_neighbours_markdown(result["neighbours"]))
    parts += ["- " + "\n- ".join(storm_text(one).splitlines()) for one in result.get("storm", ())]
    return "\n\n".join(parts) + "\n"


def _downtime_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    ways = {way: by_length(rows, way) for way in NAMES}
    lines = [f"| tokens | a step | {' | '.join(NAMES.values())} |", "|---|---|" + "---|" * len(NAMES)]
    for length, facts in ways["kv"].items():
        gaps = " | ".join(f"{ways[way][length]['gap_ms']:.1f} ms" for way in NAMES)
        lines.append(f"| {length} | {facts['step_ms']:.1f} ms | {gaps} |")
    return "\n".join(lines)


def _neighbours_markdown(facts: Mapping[str, Any]) -> str:
    lines = [f"| gaps of {facts['n_beside']} streams that stay, on each worker | p50 | p99 | longest |", "|---|---|---|---|"]
    for name, found in _neighbours(facts):
        lines.append(f"| {name} | " + " | ".join(f"{found[key]:.1f} ms" for key in ("p50_ms", "p99_ms", "max_ms")) + " |")
    return "\n".join(lines)


# --- pictures ----------------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _footer(figure: Any, result: Mapping[str, Any]) -> None:
    facts, arguments = result["machine"], result["arguments"]
    words = (
        f"{arguments['shape']} {arguments['dtype']}, {arguments['threads']} thread each, {facts['cpu']}, {facts['cores']} cores"
    )
    figure.supxlabel(words, fontsize=7, color="#606060")


def plot_timeline(path: Path, result: Mapping[str, Any]) -> None:
    """One request through two moves: each token when it came to the client, in the colour of who computed it."""
    pyplot = _pyplot()
    timeline = result["timeline"]
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 8), layout="constrained")
    for axes, way in zip(panels, LIVE, strict=True):
        _draw_timeline(axes, timeline[way], way)
    panels[0].set_title(f"One request of {timeline['length']} tokens moves, and its client reads on", fontsize=11)
    panels[-1].set_xlabel("seconds since the move began")
    _footer(figure, result)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_timeline(axes: Any, one: Mapping[str, Any], way: str) -> None:
    first = one["first_at_destination"]
    for colour, name, here in (
        (_SOURCE, f"source (node {one['nodes'][0]})", [token for token in one["tokens"] if token[0] < first]),
        (_DESTINATION, f"destination (node {one['nodes'][1]})", [token for token in one["tokens"] if token[0] >= first]),
    ):
        axes.plot([at for _, at in here], [index for index, _ in here], "o", markersize=2.6, color=colour, label=name)
    low, high = axes.get_ylim()
    low -= 0.15 * (high - low)
    stages = [stage for stage in one["stages"] if stage[0] not in ("reserve", "commit")]
    for number, (name, begin, end) in enumerate(stages):
        axes.axvspan(begin, end, color=_COLOURS[way], alpha=(0.28, 0.16)[number % 2], linewidth=0)
        size = one["steps"][number]
        what = f"{size / 2**20:.1f} MiB" if way == "kv" else f"{size} tokens"
        label = f"{'stage' if way == 'kv' else 'round'} {name}\n{what}"
        if end - begin > 0.04 * (one["tokens"][-1][1] - one["tokens"][0][1]):
            axes.text((begin + end) / 2, low, label, ha="center", va="bottom", fontsize=8, color="#404040")
    times = dict(one["tokens"])
    before, after = times[first - 1], times[first]
    axes.axvspan(before, after, color="#c0392b", alpha=0.35, linewidth=0)
    last = one["steps"][-1]
    sent = f"{last / 1024:.0f} KiB" if way == "kv" else f"{last} tokens"
    axes.annotate(
        f"gap {1e3 * (after - before):.0f} ms\n(stopped, {sent} sent,\nfirst step there)",
        xy=(after, first),
        xytext=(-14, -72),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#c0392b",
        arrowprops={"arrowstyle": "-", "color": "#c0392b", "linewidth": 0.8},
    )
    axes.set_ylim(low, high)
    axes.set_ylabel(f"{NAMES[way]}\ntoken of the answer")
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.25)


def plot_lengths(path: Path, result: Mapping[str, Any]) -> None:
    """The gap at the cut by the length of the request, and what it is beyond a step."""
    pyplot = _pyplot()
    rows = result["downtime"]
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for way, name in NAMES.items():
        facts = by_length(rows, way)
        lengths = list(facts)
        style = "-" if way in LIVE else "--"
        axes.plot(lengths, [facts[n]["gap_ms"] for n in lengths], "o" + style, color=_COLOURS[way], label=name, markersize=4)
        low, high = ([facts[n][key] for n in lengths] for key in ("min_ms", "max_ms"))
        axes.fill_between(lengths, low, high, color=_COLOURS[way], alpha=0.15, linewidth=0)
    facts = by_length(rows, "kv")
    axes.plot(list(facts), [one["step_ms"] for one in facts.values()], ":", color="#404040", label="a decode step")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(facts), [str(length) for length in facts])
    axes.set_xlabel("tokens of the request when it moves")
    axes.set_ylabel("ms between the two tokens at the cut, at the client")
    axes.set_title("What a client waits at the cut", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _footer(figure, result)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
