"""The backend ``transformers``: its modelling code, unmodified, under our engines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sllmdask.batching.backend import EngineSpec, ModelFacts, Task
from sllmdask.config import EngineSettings
from sllmdask.engine.construct import Skeleton, SkeletonShelf
from sllmdask.engine.embedding import EmbeddingEngine, EmbeddingSkeleton, build_embedding_engine, build_embedding_skeleton
from sllmdask.engine.engine import LLMEngine, build_engine
from sllmdask.engine.families import inspect_config
from sllmdask.engine.lora import check_adapter, why_no_adapters
from sllmdask.engine.pooling import inspect_embedding, makes_embeddings
from sllmdask.errors import AdapterUnsupported, SllmError

logger = logging.getLogger(__name__)


class TransformersBackend:
    """Builds an :class:`LLMEngine`, or for vectors an :class:`EmbeddingEngine`, over the tensors of the host tier.

    Structures of closed engines are kept for the next engine of their model.
    """

    wants_tensors = True

    def __init__(self) -> None:
        self._shelf = SkeletonShelf()
        # Building is Python and holds the GIL: one at a time keeps the worker's event loop responsive.
        self._building = threading.Lock()

    def inspect(self, checkpoint_dir: Path, config: Mapping[str, Any], task: Task) -> ModelFacts:
        """What a model is for, and whether it runs: by its class, or for a class that was not tested by building its structure.

        Raises :class:`UnsupportedArchitecture`, :class:`CheckpointCorrupt` or :class:`CheckpointNotFound`.
        """
        if task.kind == "embed" or (task.kind == "auto" and makes_embeddings(checkpoint_dir, config)):
            info = inspect_embedding(checkpoint_dir, config, task.pooling, task.normalize)
            wanted = Task("embed", task.pooling, task.normalize)
            facts, tested = ModelFacts(info.architecture, info.max_model_len, info.as_wire()), info.tested
        else:
            family = inspect_config(config)
            wanted = Task("generate")
            facts, tested = ModelFacts(family.architecture, family.max_model_len), family.tested
        if not tested:
            skeleton = self._skeleton(checkpoint_dir, wanted, config)
            self._shelf.put(skeleton)
            found = skeleton.info if isinstance(skeleton, EmbeddingSkeleton) else skeleton.family
            facts = ModelFacts(found.architecture, found.max_model_len, facts.embedding)
            logger.info("can be run, by its structure path=%s architecture=%s", checkpoint_dir, facts.architecture)
        return facts

    def prepare(self, checkpoint_dir: Path, task: Task) -> None:
        """Build the structure of a model that may be wanted, so that its first load need not."""
        with suppress(SllmError):  # told to who loads it
            self._shelf.put(self._skeleton(checkpoint_dir, task))

    def check_adapter(
        self, name: str, directory: Path, shapes: Mapping[str, Sequence[int]], base_dir: Path, settings: EngineSettings
    ) -> None:
        """Look whether the adapter in `directory` is for the model in `base_dir`; raises :class:`AdapterUnsupported`."""
        skeleton = self._skeleton(base_dir, Task("generate"))
        try:
            if (reason := why_no_adapters(skeleton.paged, settings.deterministic)) is not None:
                raise AdapterUnsupported(name, reason)
            check_adapter(name, directory, shapes, skeleton.model)
        finally:
            self._shelf.put(skeleton)

    def build(self, spec: EngineSpec) -> LLMEngine | EmbeddingEngine:
        """See :func:`build_engine` and :func:`build_embedding_engine`; the latter waits for all weights."""
        assert spec.tensors is not None
        skeleton = self._skeleton(spec.checkpoint_dir, spec.task)
        engine: LLMEngine | EmbeddingEngine
        if isinstance(skeleton, EmbeddingSkeleton):
            spec.wait_for_all()
            engine = build_embedding_engine(
                spec.checkpoint_dir, spec.tensors, spec.settings, skeleton=skeleton, memory=spec.memory
            )
        else:
            engine = build_engine(
                spec.checkpoint_dir, spec.tensors, spec.settings, skeleton=skeleton, wait=spec.wait, memory=spec.memory
            )
        engine.on_closed(partial(self._shelf.put, skeleton))
        return engine

    def _skeleton(self, checkpoint_dir: Path, task: Task, config: Mapping[str, Any] | None = None) -> Skeleton:
        with self._building:
            if task.kind != "embed":
                return self._shelf.take(checkpoint_dir, config)
            return build_embedding_skeleton(checkpoint_dir, task.pooling, task.normalize, shelf=self._shelf)
