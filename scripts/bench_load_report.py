"""How ``bench_load.py`` speaks: progress while it runs, a table, a picture. Pure but for printing."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench_load_measure import BenchError, Estimate


@dataclass(frozen=True)
class Row:
    """One contender's loads, summed up. Ratios are to the direct-read limit of the same run."""

    name: str
    setting: str
    ours: bool
    n_loads: int
    seconds: Estimate
    ratio: Estimate
    fastest_s: float
    cpu_s: float
    bytes_per_s: float
    #: Of the checkpoint's bytes: most that was resident at a time; how much of it is private memory in the end.
    peak: float
    private: float


HEADINGS = ("", "median s", "95 %", "x limit", "95 %", "min s", "CPU s", "GB/s", "peak x", "private")


def table(rows: Sequence[Row], limit: Estimate, limit_bytes_per_s: float) -> str:
    """The rows from fast to slow, under the limit. Peak and private memory are in multiples of the checkpoint's bytes."""
    lines = [HEADINGS]
    lines.append(
        (
            "direct reads, safetensors",
            f"{limit.median:.3f}",
            _range(limit),
            "1.00",
            "",
            "",
            "",
            f"{limit_bytes_per_s / 1e9:.2f}",
            "",
            "",
        )
    )
    for row in sorted(rows, key=lambda row: row.seconds.median):
        label = row.name if row.setting == "default" else f"{row.name} ({row.setting})"
        lines.append(
            (
                ("* " if row.ours else "  ") + label,
                f"{row.seconds.median:.3f}",
                _range(row.seconds),
                f"{row.ratio.median:.2f}",
                _range(row.ratio, 2),
                f"{row.fastest_s:.3f}",
                f"{row.cpu_s:.2f}",
                f"{row.bytes_per_s / 1e9:.2f}",
                f"{row.peak:.2f}",
                f"{row.private:.0%}",
            )
        )
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _range(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.low:.{digits}f}-{estimate.high:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``41 s``, ``12 min``, ``1 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """One line on the terminal that is written over; elsewhere, one line per stage."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stage = ""
        self._started = time.perf_counter()
        self._n_done = self._n = 0

    def stage(self, name: str, n: int = 0) -> None:
        """From here on: `name`, which has `n` steps (0: unknown)."""
        self.clear()
        self._stage, self._n, self._n_done, self._started = name, n, 0, time.perf_counter()
        if self._live:
            self._show("")
        else:
            print(name, file=sys.stderr, flush=True)

    def step(self, what: str) -> None:
        """Now `what` begins; the step before, if there was one, is done."""
        if self._live:
            self._show(what)
        self._n_done += 1

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self, what: str) -> None:
        line = self._stage
        if self._n:
            line += f" {self._n_done + 1}/{self._n}"
            if self._n_done:
                left = (time.perf_counter() - self._started) / self._n_done * (self._n - self._n_done)
                line += f", {duration(left)} left"
        if what:
            line += f": {what}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{line[:width]}", end="", file=sys.stderr, flush=True)


def check_plot(path: Path) -> None:
    """Raises :class:`BenchError` where :func:`plot` could not write `path`: better before the measurements than after."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise BenchError(f"--plot {path}: the picture is .png, .svg or .pdf")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from None


@dataclass(frozen=True)
class Bar:
    """One contender in a picture; `label` stands beside its bar."""

    name: str
    ours: bool
    seconds: Estimate
    label: str


@dataclass(frozen=True)
class Panel:
    """One part of a picture; `limit`: direct reads of the files, drawn as a line."""

    title: str
    axis: str
    bars: Sequence[Bar]
    limit: Estimate | None


def plot(path: Path, panels: Sequence[Panel], facts: Mapping[str, Any]) -> None:
    """Panels one above the other: bars of the medians with their intervals, the fastest at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [1.4 + 0.36 * len(panel.bars) for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(10, sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    for panel, place in zip(panels, axes[:, 0], strict=True):
        _draw(panel, place)
    # No-break spaces: a name stays with its value.
    words = ", ".join(f"{name} {value}".replace(" ", "\u00a0") for name, value in facts.items())
    figure.supxlabel("\n".join(textwrap.wrap(words, 130)), fontsize=7, color="#606060")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(panel: Panel, axes: Any) -> None:
    from matplotlib.patches import Patch

    bars = sorted(panel.bars, key=lambda bar: bar.seconds.median, reverse=True)
    ours, others = "#1b6ca8", "#b8b8b8"
    axes.barh(
        [bar.name for bar in bars],
        [bar.seconds.median for bar in bars],
        xerr=[[bar.seconds.median - bar.seconds.low for bar in bars], [bar.seconds.high - bar.seconds.median for bar in bars]],
        color=[ours if bar.ours else others for bar in bars],
        error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "#303030"},
    )
    style = {"fontsize": 9, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}}
    for position, bar in enumerate(bars):
        axes.annotate(bar.label, (bar.seconds.high, position), xytext=(5, 0), textcoords="offset points", va="center", **style)
    legend = [Patch(color=ours, label="sllmdask"), Patch(color=others, label="others")]
    if panel.limit is not None:
        seconds = panel.limit.median
        legend.append(
            axes.axvline(seconds, color="#c0392b", linewidth=1.4, linestyle="--", label=f"direct reads: {seconds:.3g} s")
        )
    # Room for the labels.
    axes.set_xlim(0, max(bar.seconds.high for bar in bars) * 1.25)
    axes.set_xlabel(f"{panel.axis} (median, 95 % interval)")
    axes.set_title(panel.title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=legend, loc="upper right", frameon=False)
