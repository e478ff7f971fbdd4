"""The policies that a simulation compares, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Policy:
    """How the controller is set, and whether the workers tell it the bandwidth that they see."""

    about: str
    workers_measure: bool = True


POLICIES: Mapping[str, Policy] = MappingProxyType({"ours": Policy("the controller as it is")})


def unknown_policy(name: str) -> str:
    """The sentence that refuses `name`."""
    near = difflib.get_close_matches(name, list(POLICIES), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(POLICIES)}."
    return f"there is no policy {name!r}; {hint}"
