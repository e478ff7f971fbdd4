"""Rules that pick one of the ways to serve a request, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from sllmdask.policy import baselines
from sllmdask.policy.choice import Option, Way

#: One of the options that can be taken, or ``None``: none of them, the request waits. They come soonest first, of equally soon
#: ones those that disturb fewer, by the order of :class:`Way`; then idle instances that were not used for longest, and names.
Chooser = Callable[[Sequence[Option]], Option | None]

_ORDER = {way: i for i, way in enumerate(Way)}


def rank(option: Option) -> tuple[float, int]:
    """Sort key of options: the predicted seconds, then whom it disturbs."""
    return option.ready_in_s, _ORDER[option.way]


def fastest(options: Sequence[Option]) -> Option | None:
    """The smallest predicted time to the first token."""
    return min(options, key=rank, default=None)


#: By name: makes a chooser from a seed, for those that need chance. The first is ours, the others are for comparison.
CHOOSERS: Mapping[str, Callable[[int], Chooser]] = MappingProxyType(
    {
        "fastest": lambda _: fastest,
        "random": baselines.uniform,
        "locality": baselines.locality,
        "serverlessllm": baselines.serverlessllm,
        "shepherd": baselines.shepherd,
    }
)
