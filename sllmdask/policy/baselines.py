"""What others would choose, from the same options: baselines for the simulator.

Each is given every feasible way to serve a request, and takes one, or ``None``: wait until something changes. All of them use an
instance that is there, or on its way, before they place another one: that is the router's part, which the systems do alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType

from sllmdask.policy.choice import Option, Way
from sllmdask.policy.views import Tier

_THERE = (Way.LIVE, Way.COMING)
_LOADS = (Way.FREE, Way.EVICT)
_NEARNESS: Mapping[Tier | None, int] = MappingProxyType({None: 0, **{tier: i for i, tier in enumerate(Tier)}})


def _there(options: Sequence[Option]) -> Option | None:
    return min((each for each in options if each.way in _THERE), key=lambda each: each.ready_in_s, default=None)


def uniform(seed: int) -> Callable[[Sequence[Option]], Option | None]:
    """Any worker that could load it at once, all equally likely: a serverless platform that does not look at checkpoints."""
    rng = Random(f"uniform {seed}")

    def choose(options: Sequence[Option]) -> Option | None:
        loads = sorted((each for each in options if each.way in _LOADS), key=lambda each: each.worker)
        return _there(options) or (rng.choice(loads) if loads else None)

    return choose


def locality(_seed: int) -> Callable[[Sequence[Option]], Option | None]:
    """The worker with the nearest copy, and if that is busy, wait for it."""

    def choose(options: Sequence[Option]) -> Option | None:
        def rank(option: Option) -> tuple[int, float, str]:
            return _NEARNESS[option.tier], option.ready_in_s, option.node

        able = [each for each in options if each.way in (*_LOADS, Way.WAIT)]
        return _there(options) or min(able, key=rank, default=None)

    return choose


def _formula(option: Option, *names: str) -> tuple[float, str]:
    return sum(option.parts.get(name, 0.0) for name in names), option.node


def serverlessllm(_seed: int) -> Callable[[Sequence[Option]], Option | None]:
    """Load on a free slot, or migrate away what runs where it would be loaded sooner: the least of ``q + n / b``, plus what the
    moves take; nothing else is considered, and if there is neither, it waits.

    Source: ServerlessLLM (OSDI '24), section 6. That no bandwidth is learned is the workers' part, who do not tell what they see.
    """

    def choose(options: Sequence[Option]) -> Option | None:
        able = [each for each in options if each.way in (*_LOADS, Way.MIGRATE)]
        return _there(options) or min(able, key=lambda each: _formula(each, "queue", "read", "move"), default=None)

    return choose


def shepherd(_seed: int) -> Callable[[Sequence[Option]], Option | None]:
    """As :func:`serverlessllm`, but what is in the way is preempted instead of moved.

    Source: Shepherd* in the evaluation of ServerlessLLM (OSDI '24), after Shepherd (NSDI '23).
    """

    def choose(options: Sequence[Option]) -> Option | None:
        able = [each for each in options if each.way in (*_LOADS, Way.PREEMPT)]
        return _there(options) or min(able, key=lambda each: _formula(each, "queue", "read"), default=None)

    return choose
