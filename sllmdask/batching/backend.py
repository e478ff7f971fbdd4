"""What makes engines: a backend, by the name that a deployment gives it (``backend``). No torch.

A backend is a class, or a function that returns one of its kind, without arguments; a worker makes one of each. Distributions
name theirs in the entry-point group :data:`GROUP`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sllmdask.batching.memory import MemoryAccount
from sllmdask.batching.protocol import EngineProtocol
from sllmdask.config import EngineSettings

GROUP = "sllmdask.engines"


@dataclass(frozen=True)
class Task:
    """What a model is for. `kind`: ``generate``, text; ``embed``, vectors; ``auto``: what the checkpoint is made for.

    `pooling` and `normalize` say how vectors are made; ``None``: as the checkpoint says.
    """

    kind: str = "auto"
    pooling: str | None = None
    normalize: bool | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a backend says of a checkpoint that it can run."""

    architecture: str
    #: Tokens of one request, prompt and answer.
    max_model_len: int
    #: Of a model that makes vectors, what front doors need to know, as plain msgpack types (the fields of
    #: :class:`~sllmdask.engine.pooling.EmbeddingInfo`); ``None``: it generates text.
    embedding: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class EngineSpec:
    """What an engine is built of."""

    #: The model's name, for messages.
    model: str
    #: ``config.json``, tokenizer, and for a backend that reads them itself the weights.
    checkpoint_dir: Path
    settings: EngineSettings
    #: ``generate`` or ``embed``, as :meth:`Backend.inspect` has found.
    task: Task = field(default_factory=lambda: Task("generate"))
    #: torch tensors by their names in the checkpoint, on the device of the settings: on a CPU views of memory that others read,
    #: too, not to be written to. They stay until the engine is closed. ``None``: the backend wants none.
    tensors: Mapping[str, Any] | None = None
    #: The bytes behind `tensors` are still arriving: ``wait(names)`` blocks until those of these names are there, or raises what
    #: the load has failed of. It may be called on any thread. ``None``: all are there.
    wait: Callable[[Collection[str]], None] | None = None
    #: The books of the worker's memory: what an engine takes beside `tensors` it asks for there. ``None``: there are none.
    memory: MemoryAccount | None = None

    def wait_for_all(self) -> None:
        """Until every byte is there."""
        if self.wait is not None and self.tensors is not None:
            self.wait(tuple(self.tensors))


class Backend(Protocol):
    """Looks at checkpoints, and builds engines over them. Methods are called on threads, not on the worker's event loop."""

    #: Whether engines are built over tensors: the worker then reads the checkpoint into host memory, which instances share, and
    #: brings it to the device. Otherwise it brings the files to its disk and no further.
    wants_tensors: bool

    def inspect(self, checkpoint_dir: Path, config: Mapping[str, Any], task: Task) -> ModelFacts:
        """Whether the checkpoint with this ``config.json`` can be run; its weights need not be there.

        Raises :class:`~sllmdask.errors.UnsupportedArchitecture` with the reason, or another
        :class:`~sllmdask.errors.CheckpointError`.
        """
        ...

    def build(self, spec: EngineSpec) -> EngineProtocol:
        """An engine that takes requests. One at a time is built on a worker, and run by a thread of its own then.

        Raises :class:`~sllmdask.errors.SllmError`; :class:`~sllmdask.errors.CheckpointNotFound` for a file that is missing, which
        is tried again if the directory was renamed meanwhile.
        """
        ...


@runtime_checkable
class PreparesModels(Protocol):
    """A backend that can do something before a model is loaded, so that the load need not."""

    def prepare(self, checkpoint_dir: Path, task: Task) -> None:
        """The model was deployed. What goes wrong is told to who loads it."""
        ...


@runtime_checkable
class ChecksAdapters(Protocol):
    """A backend whose engines take LoRA adapters."""

    def check_adapter(
        self, name: str, directory: Path, shapes: Mapping[str, Sequence[int]], base_dir: Path, settings: EngineSettings
    ) -> None:
        """Look whether the adapter in `directory`, with tensors of these shapes, is for the model in `base_dir`.

        Raises :class:`~sllmdask.errors.AdapterUnsupported` with the reason.
        """
        ...
