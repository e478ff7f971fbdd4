"""The policies that a simulation compares, by name: the same controller, set differently."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Policy:
    """How the controller is set, and whether the workers tell it the bandwidth that they see."""

    chooser: str
    can_migrate: bool = False
    can_preempt: bool = False
    #: Whether a request takes the place of older ones of its own class.
    preempts_older: bool = False
    workers_measure: bool = True


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "ours": Policy("fastest", can_migrate=True, can_preempt=True),
        "serverlessllm": Policy("serverlessllm", can_migrate=True, workers_measure=False),
        "shepherd": Policy("shepherd", can_preempt=True, preempts_older=True, workers_measure=False),
        "locality": Policy("locality"),
        "random": Policy("random"),
    }
)


def unknown_policy(name: str) -> str:
    """The sentence that refuses `name`."""
    near = difflib.get_close_matches(name, list(POLICIES), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(POLICIES)}."
    return f"there is no policy {name!r}; {hint}"
