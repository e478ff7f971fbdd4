"""What every scenario of ``bench_engine.py`` stands on: the work that is asked for, processes seen from outside, percentiles.

Nothing here comes from the package that is measured, and nothing imports torch.
"""

from __future__ import annotations

import os
import random
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts import bench_load_measure

PACKAGES = ("torch", "transformers", "sllmdask", "numba", "numpy")
#: Tokens of an answer where lengths are mixed: median and spread of the lognormal distribution, and its bounds.
MIXED_MEDIAN, MIXED_SIGMA, MIXED_BOUNDS = 22, 0.8, (4, 128)
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    """Requests that arrive together: their prompts, and how many tokens each answer has."""

    prompts: list[list[int]]
    lengths: list[int]

    def first(self, n: int) -> Work:
        return Work(self.prompts[:n], self.lengths[:n])

    def texts(self) -> list[str]:
        """The prompts as text: one letter, one token, as the checkpoint's tokenizer knows no merges."""
        return ["".join(chr(ord("a") + token % 26) for token in prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Ran:
    """What became of a piece of work: the answers (token ids or text), their tokens, and the seconds."""

    answers: list[Any]
    n_tokens: int
    wall_s: float
    cpu_s: float


def make_work(n: int, vocabulary: int, lengths: str, prompt_tokens: Sequence[int], new_tokens: int, seed: int) -> Work:
    """`lengths`: ``uniform``, `new_tokens` each, or ``mixed``, lognormal, with a median that goes with `new_tokens`."""
    rng = random.Random(f"{seed} {n} {lengths}")
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(*prompt_tokens))] for _ in range(n)]
    if lengths == "uniform":
        return Work(prompts, [new_tokens] * n)
    low, high = MIXED_BOUNDS
    scale = MIXED_MEDIAN * new_tokens / 32
    drawn = (round(scale * rng.lognormvariate(0.0, MIXED_SIGMA)) for _ in range(n))
    return Work(prompts, [min(max(length, low), high) for length in drawn])


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """The first place where they differ; ``None`` if they do not."""
    for place, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(np.asarray(values), share))


def machine(n_threads: int) -> dict[str, Any]:
    """What a reader needs to know of this machine; disks play no part here."""
    facts = bench_load_measure.machine(Path(tempfile.gettempdir()), PACKAGES)
    del facts["disk"]
    return facts | {"threads": n_threads}


# --- processes, from outside -------------------------------------------------------------------------------------------------


def cpu_seconds_of_tree(pid: int) -> float:
    """User and system time of `pid` and of all that descend from it, those that they have waited for included."""
    return sum(sum(map(int, fields[11:15])) for fields in _tree(pid)) / _TICKS


def _tree(pid: int) -> list[list[str]]:
    """The fields of ``/proc/PID/stat`` after the name, of `pid` and its descendants."""
    known: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            known[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    tree, left = [], [pid]
    while left:
        parent = left.pop()
        if parent in known:
            tree.append(known[parent])
        left += [child for child, fields in known.items() if int(fields[1]) == parent]
    return tree


def n_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_of_range(address: int, nbytes: int) -> int:
    """Bytes of the pages from `address` on that are in memory, by ``/proc/self/pagemap``.

    Not by ``smaps``: neighbouring mappings are one mapping there.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first, stop = address // page, -(-(address + nbytes) // page)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entries = array("Q", os.pread(file.fileno(), 8 * (stop - first), 8 * first))
    return page * sum(entry >> 63 for entry in entries)
