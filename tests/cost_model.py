"""The simulator's engine as a subject of the conformance suite, and of engines that are like it but for one defect."""

from __future__ import annotations

from functools import partial

from sllmdask.batching.conformance import Subject
from sllmdask.config import EngineSettings
from sllmdask.sim.engine import CostModelEngine

N_VOCAB = 120
SETTINGS = EngineSettings(max_batch_tokens=96, parking_memory=64 * 16 * 2 * 32 * 4096 * 2)


def subject_of(engine: type[CostModelEngine]) -> Subject:
    """Room for eight requests of 100 tokens, or for two."""
    make = partial(engine, SETTINGS, max_model_len=256, n_vocab=N_VOCAB)
    return Subject(partial(make, n_blocks=64), N_VOCAB, make_tight=partial(make, n_blocks=16))


COST_MODEL = subject_of(CostModelEngine)
