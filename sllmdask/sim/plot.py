"""Pictures of simulations, by matplotlib, which is an optional dependency (``sllmdask[plot]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sllmdask.errors import ConfigError
from sllmdask.sim.report import N_QUANTILES, Figure, Summary

SUFFIXES = (".png", ".svg", ".pdf")
#: Seconds below which a logarithmic axis tells nothing.
LEAST_S = 0.01
#: One colour and one dash for each policy, whatever the others are; more than these take the last.
STYLES = (
    ("#1b6ca8", "-"),
    ("#d1495b", "--"),
    ("#edae49", "-."),
    ("#66a182", ":"),
    ("#8d6a9f", (0, (5, 1))),
    ("#606060", (0, (1, 1))),
)


def check_plot(path: Path) -> None:
    """Raises :class:`ConfigError` where a picture could not be written: better before the simulation than after."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the picture is {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no directory {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'sllmdask[plot]'") from None


def plot_run(path: Path, found: Sequence[Summary], title: str) -> None:
    """The distribution of the startup latency: for each policy, the part of the requests that waited at most so long."""
    from matplotlib import pyplot

    figure, axes = _figure()
    parts = [i / N_QUANTILES for i in range(N_QUANTILES + 1)]
    for i, each in enumerate(found):
        colour, dash = STYLES[min(i, len(STYLES) - 1)]
        axes.plot([max(LEAST_S, value) for value in each.quantiles], parts, color=colour, linestyle=dash, label=each.policy)
    axes.set(
        xscale="log", xlabel="startup latency, s (less is left out)", ylabel="part of the requests", ylim=(0, 1), title=title
    )
    axes.set_xlim(left=LEAST_S)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_sweep(path: Path, key: str, points: Sequence[tuple[Any, Sequence[Summary]]], title: str) -> None:
    """Mean and 99th percentile of the startup latency over `key`, with the intervals over the seeds."""
    from matplotlib import pyplot

    figure, axes = _figure(2)
    names = [each.policy for each in points[0][1]]
    for place, (statistic, words) in zip(axes, (("mean", "mean"), ("p99", "99th percentile")), strict=True):
        for i, name in enumerate(names):
            figures = [_of(found, name)["startup_s"][statistic] for _, found in points]
            values = [value for value, _ in points]
            colour, dash = STYLES[min(i, len(STYLES) - 1)]
            middles = [max(LEAST_S, each.value) for each in figures]
            place.plot(values, middles, color=colour, linestyle=dash, marker="o", ms=3, label=name)
            lows, highs = ([max(LEAST_S, _edge(each, side)) for each in figures] for side in (0, 1))
            place.fill_between(values, lows, highs, color=colour, alpha=0.12, linewidth=0)
        place.set(xlabel=key, ylabel="startup latency, s", yscale="log", title=words)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _figure(n_panels: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, n_panels, figsize=(7 if n_panels == 1 else 11, 4.5), layout="constrained")
    for place in [axes] if n_panels == 1 else axes:
        place.grid(alpha=0.25)
    return figure, axes


def _of(found: Sequence[Summary], policy: str) -> Mapping[str, Mapping[str, Figure]]:
    return next(each for each in found if each.policy == policy).figures


def _edge(figure: Figure, side: int) -> float:
    edge = (figure.low, figure.high)[side]
    return figure.value if edge is None else edge
